"""1.5-entmax and sparsemax without sorting.

Both project a row z on the probability simplex and leave most entries exactly zero. They look for the threshold tau at
which a norm of what lies above it is one:

- sparsemax: p = max(z - tau, 0), and the sum of max(z - tau, 0) is 1;
- 1.5-entmax: p = max(z/2 - tau, 0)^2, and the Euclidean norm of max(z/2 - tau, 0) is 1.

Either norm F(tau) is convex and decreasing, and the threshold lies in [max - 1, max). Newton's iteration from the left
never overshoots, and by convexity F'[i+1]/F'[i] + (F[i+1] - 1)/(F[i] - 1) <= 1, so that the product of excess and slope
shrinks at least fourfold in every step. It starts at no more than D^2 for a row of D entries, hence about
log4(D^2 / 1e-7) steps always suffice (29 for D = 100,000); six are usual. A sort of 19,331 genes a cell would be the
dearest operation of TabNet.

Most of these steps are made on a small subset of the row: the maxima of eight slices, which hold nearly all of the
support. The threshold of a subset is never larger than that of the whole, so it is a valid start from the left.

Sources: Martins and Astudillo 2016 (arXiv:1602.02068), Peters, Niculae and Martins 2019 (arXiv:1905.05702).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hce_jax.typing import Array, Float

#: Under this name ``jax.checkpoint`` can keep the thresholds: recomputing a row from them needs no Newton steps.
THRESHOLD = "entmax_threshold"

MAX_STEPS = 40
TOLERANCE = 2.0**-22  # thresholds lie in [-1, 0): two units in the last place
_N_SLICES = 8
_MIN_SLICE = 16

_Step = Callable[[Array, Array], Array]


def entmax15(z: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """Return the 1.5-entmax of z along an axis: p = max(z/2 - tau, 0)^2 with tau such that p sums to one.

    The derivative is the closed form s g - s (sum s g) / (sum s) with s = sqrt(p), exactly zero outside the support.
    An entry of minus infinity gets probability zero; a row that holds NaN or plus infinity, or nothing but minus
    infinity, becomes NaN.

    Parameters
    ----------
    z
        Scores, any shape.
    axis
        The axis along which the result sums to one.

    Examples
    --------
    >>> entmax15(jnp.array([2.0, 2.0, -5.0])).round(5).tolist()
    [0.5, 0.5, 0.0]
    """
    return jnp.moveaxis(_entmax15(jnp.moveaxis(z, axis, -1)), -1, axis)


def sparsemax(z: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """Return the Euclidean projection of z on the simplex: p = max(z - tau, 0) with tau such that p sums to one.

    The derivative is g minus its mean over the support, exactly zero outside. An entry that merely equals the threshold
    is not part of the support. Infinities and NaN as in :func:`entmax15`.

    Parameters
    ----------
    z
        Scores, any shape.
    axis
        The axis along which the result sums to one.

    Examples
    --------
    >>> sparsemax(jnp.array([1.0, 0.5, -5.0])).tolist()
    [0.75, 0.25, 0.0]
    """
    return jnp.moveaxis(_sparsemax(jnp.moveaxis(z, axis, -1)), -1, axis)


@jax.custom_vjp
def _entmax15(z: Array) -> Array:
    return _entmax15_forward(z)[0]


def _entmax15_forward(z: Array) -> tuple[Array, Array]:
    top = _row_max(z)
    tau = _threshold(z, top, 0.5, _entmax15_step)
    p = jnp.square(jnp.maximum((z - top) * 0.5 - tau, 0))
    return p, p


def _entmax15_backward(p: Array, g: Array) -> tuple[Array]:
    s = jnp.sqrt(p)
    return (s * (g - jnp.sum(s * g, -1, keepdims=True) / jnp.sum(s, -1, keepdims=True)),)


_entmax15.defvjp(_entmax15_forward, _entmax15_backward)


@jax.custom_vjp
def _sparsemax(z: Array) -> Array:
    return _sparsemax_forward(z)[0]


def _sparsemax_forward(z: Array) -> tuple[Array, Array]:
    top = _row_max(z)
    tau = _threshold(z, top, 1.0, _sparsemax_step)
    p = jnp.maximum(z - top - tau, 0)
    return p, p


def _sparsemax_backward(p: Array, g: Array) -> tuple[Array]:
    g = jnp.where(p > 0, g, 0)
    return (jnp.where(p > 0, g - jnp.sum(g, -1, keepdims=True) / jnp.sum(p > 0, -1, keepdims=True), 0),)


_sparsemax.defvjp(_sparsemax_forward, _sparsemax_backward)


def _entmax15_step(y: Array, tau: Array) -> Array:
    """Newton's step for the Euclidean norm: (F - 1) F / (sum of what lies above the threshold)."""
    above = jnp.maximum(y - tau, 0)
    total = jnp.sum(above, -1, keepdims=True)
    norm = jnp.sqrt(jnp.sum(above * above, -1, keepdims=True))
    return (norm - 1) * norm / total


def _sparsemax_step(y: Array, tau: Array) -> Array:
    """Newton's step for the sum: (F - 1) / (number of entries above the threshold)."""
    total = jnp.sum(jnp.maximum(y - tau, 0), -1, keepdims=True)
    return (total - 1) / jnp.sum(y > tau, -1, keepdims=True)


def _threshold(z: Array, top: Array, scale: float, step: _Step) -> Array:
    """Return tau (..., 1) for the rows (z - top) * scale."""
    tau = jnp.full_like(top, -1)
    for rows in (_slice_maxima(z), z) if z.shape[-1] >= _N_SLICES * _MIN_SLICE else (z,):
        tau = _newton(functools.partial(lambda rows, tau: step((rows - top) * scale, tau), rows), tau)
    return checkpoint_name(tau, THRESHOLD)


def _newton(step: Callable[[Array], Array], tau: Array) -> Array:
    """Iterate tau + step(tau) until no row moves."""

    def moving(state: tuple[Array, Array, Array]) -> Array:
        _, last, count = state
        return jnp.any(last > TOLERANCE) & (count < MAX_STEPS)

    def advance(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tau, _, count = state
        last = jnp.maximum(step(tau), 0)  # rounding must not turn the iteration round
        return tau + last, last, count + 1

    return jax.lax.while_loop(moving, advance, (tau, jnp.ones_like(tau), jnp.zeros((), jnp.int32)))[0]


def _slice_maxima(z: Array) -> Array:
    """Return the elementwise maximum of equally wide slices of z, and the up to seven entries that are left over.

    Each is a different entry of z, and the largest of all is among them: so the threshold is well defined, and no
    larger than that of z.
    """
    width = z.shape[-1] // _N_SLICES
    maxima = functools.reduce(jnp.maximum, (z[..., i * width : (i + 1) * width] for i in range(_N_SLICES)))
    return jnp.concatenate([maxima, z[..., _N_SLICES * width :]], -1)


def _row_max(z: Array) -> Array:
    return checkpoint_name(jax.lax.stop_gradient(jnp.max(z, -1, keepdims=True)), THRESHOLD)
