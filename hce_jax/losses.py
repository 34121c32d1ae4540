"""Cross entropy and the hierarchical cross entropy (HCE).

Both return the weighted mean as published, sum_b w[y_b] l_b / sum_b w[y_b]: divided by the sum of the weights, not by
the number of cells (``torch.nn.functional.cross_entropy`` does the same). All arithmetic is float32.
"""

import jax
import jax.numpy as jnp

from hce_jax.typing import AnyArray, Array, Float, Int


def cross_entropy(
    logits: Float[Array, "b c"],
    targets: Int[AnyArray, "b"],
    class_weights: Float[Array, "c"] | None = None,
    *,
    reduction: str = "mean",
) -> Float[Array, ""] | Float[Array, "b"]:
    """Softmax cross entropy, l_b = -log softmax(z_b)[y_b].

    Parameters
    ----------
    logits
        Array (b, c).
    targets
        Labels (b,), each in [0, c).
    class_weights
        Weight of each type (c,); 1 for all if not given.
    reduction
        ``"mean"``: the weighted mean. ``"none"``: w[y_b] l_b for each cell.

    Examples
    --------
    >>> round(float(cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3]))), 4)  # log 4
    1.3863
    """
    log_p_bc = jax.nn.log_softmax(logits.astype(jnp.float32))
    losses_b = -jnp.take_along_axis(log_p_bc, targets[:, None], axis=1)[:, 0]
    return _reduce(losses_b, targets, class_weights, reduction)


def hierarchical_cross_entropy(
    logits: Float[Array, "b c"],
    targets: Int[AnyArray, "b"],
    reachability: Float[Array, "c d"],
    class_weights: Float[Array, "c"] | None = None,
    epsilon: float | None = 1e-6,
    *,
    reduction: str = "mean",
) -> Float[Array, ""] | Float[Array, "b"]:
    """Cross entropy of the summed probability of the label and its descendants.

    With p = softmax(z), l_b = -log(sum_d R[y_b, d] p_bd + epsilon) (Cultrera di Montesano et al., Nat Comput Sci 2026,
    Methods; epsilon as in the published code). The epsilon bounds the loss of a cell by -log(epsilon) = 13.8, and lets
    the gradient vanish where the subtree holds less than about epsilon.

    Parameters
    ----------
    logits
        Array (b, c).
    targets
        Labels (b,), each in [0, c).
    reachability
        R (c, c): R[i, j] = 1 when j is i or a descendant of i.
    class_weights
        Weight of each type (c,); 1 for all if not given.
    epsilon
        Added to the sum before the logarithm. None gives the exact form, logsumexp(all logits) - logsumexp(logits of
        the label's subtree), which is unbounded and keeps its gradient.
    reduction
        ``"mean"``: the weighted mean. ``"none"``: w[y_b] l_b for each cell.

    Examples
    --------
    >>> reach = jnp.array([[1.0, 1.0], [0.0, 1.0]])
    >>> z = jnp.zeros((1, 2))
    >>> abs(float(hierarchical_cross_entropy(z, jnp.array([0]), reach))) < 2e-6  # the root holds everything
    True
    >>> round(float(hierarchical_cross_entropy(z, jnp.array([1]), reach, epsilon=None)), 4)  # log 2
    0.6931
    """
    logits = logits.astype(jnp.float32)
    subtree_bc = reachability[targets]  # a gather and a sum: no matrix product whose precision could be lowered
    if epsilon is None:
        losses_b = jax.nn.logsumexp(logits, axis=1) - jax.nn.logsumexp(logits, axis=1, where=subtree_bc > 0)
    else:
        mass_b = jnp.sum(jax.nn.softmax(logits) * subtree_bc, axis=1)
        losses_b = -jnp.log(mass_b + epsilon)
    return _reduce(losses_b, targets, class_weights, reduction)


def _reduce(
    losses_b: Float[Array, "b"], targets: Int[AnyArray, "b"], class_weights: Float[Array, "c"] | None, reduction: str
) -> Float[Array, ""] | Float[Array, "b"]:
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction is "mean" or "none", not {reduction!r}')
    weights_b = jnp.ones_like(losses_b) if class_weights is None else class_weights[targets]
    weighted_b = weights_b * losses_b
    return weighted_b if reduction == "none" else weighted_b.sum() / weights_b.sum()
