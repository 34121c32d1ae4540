"""Augmentation: a cell is moved along a direction in which real studies differ, up or down."""

import jax
import jax.numpy as jnp
import numpy as np

from hce_jax.typing import Array, Float, Int, Key

#: Values after augmentation stay in this range, as published.
CLIP_RANGE = (0.0, 9.0)


def widened_vectors(augmentations_ag: Float[np.ndarray, "a g"], width: int) -> Float[np.ndarray, "a w"]:
    """Return the vectors with zeros after their genes, for rows of x as wide as that.

    Parameters
    ----------
    augmentations_ag
        The vectors.
    width
        Columns w of the result, at least g; see :func:`hce_jax.input.row_width`.

    Examples
    --------
    >>> widened_vectors(np.ones((1, 2)), 3).tolist()
    [[1.0, 1.0, 0.0]]
    """
    n_more = width - augmentations_ag.shape[1]
    return np.pad(augmentations_ag, [(0, 0), (0, n_more)]) if n_more else augmentations_ag


def augment(
    x_bw: Float[Array, "b w"], augmentations_aw: Float[Array, "a w"], key: Key[Array, ""]
) -> Float[Array, "b w"]:
    """Return x + sign * vector, clipped to [0, 9], with one vector and one sign drawn for each cell.

    Vector and sign are independent and uniform (golden README, section 7). Pure, so that it runs inside the step.
    Columns that are zero in both stay zero.

    Parameters
    ----------
    x_bw
        Cells, sf-log1p.
    augmentations_aw
        The vectors of a store's ``augmentations.npy``, as wide as x (:func:`widened_vectors`).
    key
        Decides what is drawn.

    Examples
    --------
    >>> augment(jnp.ones((2, 3)), jnp.ones((5, 3)), jax.random.key(0)).shape
    (2, 3)
    """
    index_key, sign_key = jax.random.split(key)
    n_cells = x_bw.shape[0]
    indices_b = jax.random.randint(index_key, (n_cells,), 0, augmentations_aw.shape[0])
    signs_b = jax.random.rademacher(sign_key, (n_cells,), x_bw.dtype)
    return apply_augmentations(x_bw, augmentations_aw, indices_b, signs_b)


def apply_augmentations(
    x_bw: Float[Array, "b w"],
    augmentations_aw: Float[Array, "a w"],
    indices_b: Int[Array, "b"],
    signs_b: Float[Array, "b"],
) -> Float[Array, "b w"]:
    """Return clip(x + signs * augmentations[indices], 0, 9): :func:`augment` once the numbers are drawn.

    Examples
    --------
    >>> x, vectors = jnp.array([[1.0, 1.0]]), jnp.array([[2.0, 0.5]])
    >>> apply_augmentations(x, vectors, jnp.array([0]), jnp.array([-1.0])).tolist()
    [[0.0, 0.5]]
    """
    return jnp.clip(x_bw + signs_b[:, None] * augmentations_aw[indices_b], *CLIP_RANGE)
