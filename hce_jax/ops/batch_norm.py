"""PyTorch's batch norm and the ghost batch norm of TabNet, as functions of arrays.

Normalisation takes the biased variance of the batch, the running variance the unbiased one, and a running value becomes
(1 - momentum) * old + momentum * new. A ghost batch norm splits the batch as ``torch.chunk`` does, normalises each part
by itself and updates the running values once per part, in order (golden README, surprises 12 to 14).

Sums over cells are written as products with a row of ones: XLA's own column sums are up to fifteen times slower on a
CPU (docs/log.md), and the product is as good elsewhere. Their gradients are again such sums, hence :func:`scale_shift`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from hce_jax.errors import ConfigError
from hce_jax.ops.common_operand import common_operand
from hce_jax.typing import Array, Float

#: PyTorch's default, added to every variance.
EPSILON = 1e-5


class Moments(NamedTuple):
    """Mean and biased variance of each feature in each part of the batch, (v, h) both."""

    mean: Array
    variance: Array


def part_sizes(n_rows: int, virtual_batch_size: int | None) -> list[int]:
    """Return how many rows each ghost batch gets: ``torch.chunk`` into max(n_rows // virtual_batch_size, 1) parts.

    All parts have ceil(n_rows / parts) rows but the last, which may be shorter; there may be fewer parts than asked.
    Without a virtual batch size, or with one larger than the batch, the batch is one part.

    Examples
    --------
    >>> part_sizes(70, 16)
    [18, 18, 18, 16]
    >>> part_sizes(25, 4)
    [5, 5, 5, 5, 5]
    """
    size = -(-n_rows // max(n_rows // (virtual_batch_size or n_rows), 1))
    return [min(size, n_rows - start) for start in range(0, n_rows, size)]


def over_parts(function: Callable[..., tuple[Any, Any]], sizes: Sequence[int], *rows: Array | None) -> tuple[Any, Any]:
    """Apply a function to the parts of a batch.

    Parameters
    ----------
    function
        Takes arrays (v, n, ...), v parts of n rows; returns a tree of arrays (v, n, ...) and one of arrays (v, ...).
        It is called once for the parts of equal size and once for a shorter last one.
    sizes
        From :func:`part_sizes`.
    rows
        Arrays (b, ...), or None where there is nothing to split.

    Returns
    -------
    tuple
        The first tree with all rows (b, ...), the second with all parts (v, ...).

    Examples
    --------
    >>> over_parts(lambda x: (x, x.sum(1)), [2, 1], jnp.array([1.0, 2.0, 3.0]))[1].tolist()
    [3.0, 3.0]
    """
    n_even = sizes.count(sizes[0])
    groups = [(0, n_even, sizes[0]), (n_even * sizes[0], 1, sizes[-1])][: 1 if n_even == len(sizes) else 2]
    outputs = [
        function(*(x if x is None else x[start : start + v * n].reshape(v, n, *x.shape[1:]) for x in rows))
        for start, v, n in groups
    ]
    by_row = [jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows) for rows, _ in outputs]
    return _concatenate(by_row), _concatenate([parts for _, parts in outputs])


def on_own_parts(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let each device of the mesh in whose context this is traced apply a function to its own parts (v, ...).

    So XLA need not know how to divide what the function calls, a kernel for instance. Values that the function closes
    over lie on every device. Without a mesh, or on one device, it is the function itself.

    Examples
    --------
    >>> on_own_parts(jnp.sin)(jnp.zeros(2)).tolist()
    [0.0, 0.0]
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    parts = PartitionSpec(mesh.axis_names)
    return jax.shard_map(function, in_specs=parts, out_specs=parts, check_vma=False)


def _concatenate(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees) if len(trees) > 1 else trees[0]


def column_mean(x: Float[Array, "*v n h"]) -> Float[Array, "*v h"]:
    """Return the mean over rows, as a product with a row of ones.

    Examples
    --------
    >>> column_mean(jnp.array([[1.0, 2.0], [3.0, 6.0]])).tolist()
    [2.0, 4.0]
    """
    # A power of two is divided by in the row of ones, exactly: a GPU would divide the sums in a program of their own.
    n_rows = x.shape[-2]
    power = 1 << (n_rows - 1).bit_length()
    sums = _column_sum(x, 1 / power)
    return sums if n_rows == power else sums / (n_rows / power)


def _column_sum(x: Array, weight: float = 1.0) -> Array:
    weights = jnp.full((*x.shape[:-2], 1, x.shape[-2]), weight, x.dtype)
    return jnp.matmul(weights, x, precision=jax.lax.Precision.HIGHEST)[..., 0, :]


def moments(x: Float[Array, "*v n h"]) -> Moments:
    """Return mean and biased variance over rows, in two passes.

    Examples
    --------
    >>> moments(jnp.array([[1.0], [3.0]])).variance.tolist()
    [1.0]
    """
    mean = column_mean(x)
    # The variance does not depend on the mean to first order, so the gradient need not pass through it here.
    centred = x - jax.lax.stop_gradient(mean)[..., None, :]
    return Moments(mean, column_mean(centred * centred))


@jax.custom_vjp
def scale_shift(x: Float[Array, "*v n h"], scale: Float[Array, "*v h"], shift: Float[Array, "*v h"]) -> Array:
    """Return x * scale + shift, feature by feature.

    Examples
    --------
    >>> scale_shift(jnp.ones((1, 2)), jnp.array([2.0, 3.0]), jnp.array([0.0, 1.0])).tolist()
    [[2.0, 4.0]]
    """
    return x * scale[..., None, :] + shift[..., None, :]


def _scale_shift_forward(x: Array, scale: Array, shift: Array) -> tuple[Array, tuple[Array, Array]]:
    return scale_shift(x, scale, shift), (x, scale)


def _scale_shift_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array, Array]:
    x, scale = residuals
    return g * scale[..., None, :], _column_sum(g * x), _column_sum(g)


scale_shift.defvjp(_scale_shift_forward, _scale_shift_backward)


def affine(
    statistics: Moments, weight: Float[Array, "h"], bias: Float[Array, "h"]
) -> tuple[Float[Array, "*v h"], Float[Array, "*v h"]]:
    """Return the scale and shift that a batch norm amounts to: weight / sqrt(variance + 1e-5), bias - mean * scale.

    Examples
    --------
    >>> scale, shift = affine(Moments(jnp.array([2.0]), jnp.array([4.0])), jnp.array([1.0]), jnp.array([0.0]))
    >>> round(float(scale[0]), 3), round(float(shift[0]), 3)
    (0.5, -1.0)
    """
    weight, bias = (value.reshape((1,) * (statistics.mean.ndim - 1) + (-1,)) for value in (weight, bias))
    scale = weight * jax.lax.rsqrt(statistics.variance + EPSILON)
    return scale, bias - statistics.mean * scale


def update_running(running: Moments, batch: Moments, sizes: Sequence[int], momentum: float) -> Moments:
    """Return the running mean and (unbiased) variance (h,) after the parts' moments (v, h), one part after the other.

    The sequence running <- (1 - m) running + m part is one weighted sum, with weight m (1 - m)^(V - 1 - v) for part v.

    Raises
    ------
    ConfigError
        If a part has a single row: its variance is not defined.

    Examples
    --------
    >>> start = Moments(jnp.zeros(1), jnp.ones(1))
    >>> update_running(start, Moments(jnp.ones((2, 1)), jnp.ones((2, 1))), [4, 4], 0.5).mean.tolist()
    [0.75]
    """
    if 1 in sizes:
        parts = f", cut into {len(sizes)} ghost batches of which the last has one cell" if len(sizes) > 1 else ""
        raise ConfigError(
            f"config.batch_size is {sum(sizes)}{parts}, and a batch norm cannot train on a single cell; change "
            "config.batch_size or config.virtual_batch_size"
        )
    keep = (1 - momentum) ** np.arange(len(sizes), -1, -1)
    weights = common_operand(jnp.asarray(momentum * keep[1:], jnp.float32))[:, None]
    unbiased = jnp.asarray([n / (n - 1) for n in sizes], jnp.float32)[:, None]
    return Moments(
        np.float32(keep[0]) * running.mean + jnp.sum(weights * batch.mean, 0),
        np.float32(keep[0]) * running.variance + jnp.sum(weights * unbiased * batch.variance, 0),
    )
