"""Augmentation: a cell is moved along a direction in which real studies differ, up or down."""

import jax
import jax.numpy as jnp

from hce_jax.typing import Array, Float, Int, Key

#: Values after augmentation stay in this range, as published.
CLIP_RANGE = (0.0, 9.0)


def augment(
    x_bg: Float[Array, "b g"], augmentations_ag: Float[Array, "a g"], key: Key[Array, ""]
) -> Float[Array, "b g"]:
    """Return x + sign * vector, clipped to [0, 9], with one vector and one sign drawn for each cell.

    Vector and sign are independent and uniform (golden README, section 7). Pure, so that it runs inside the step.

    Parameters
    ----------
    x_bg
        Cells, sf-log1p.
    augmentations_ag
        The vectors of a store's ``augmentations.npy``.
    key
        Decides what is drawn.

    Examples
    --------
    >>> augment(jnp.ones((2, 3)), jnp.ones((5, 3)), jax.random.key(0)).shape
    (2, 3)
    """
    index_key, sign_key = jax.random.split(key)
    n_cells = x_bg.shape[0]
    indices_b = jax.random.randint(index_key, (n_cells,), 0, augmentations_ag.shape[0])
    signs_b = jax.random.rademacher(sign_key, (n_cells,), x_bg.dtype)
    return apply_augmentations(x_bg, augmentations_ag, indices_b, signs_b)


def apply_augmentations(
    x_bg: Float[Array, "b g"],
    augmentations_ag: Float[Array, "a g"],
    indices_b: Int[Array, "b"],
    signs_b: Float[Array, "b"],
) -> Float[Array, "b g"]:
    """Return clip(x + signs * augmentations[indices], 0, 9): :func:`augment` once the numbers are drawn.

    Examples
    --------
    >>> x, vectors = jnp.array([[1.0, 1.0]]), jnp.array([[2.0, 0.5]])
    >>> apply_augmentations(x, vectors, jnp.array([0]), jnp.array([-1.0])).tolist()
    [[0.0, 0.5]]
    """
    return jnp.clip(x_bg + signs_b[:, None] * augmentations_ag[indices_b], *CLIP_RANGE)
