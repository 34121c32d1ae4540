"""Layers that several models share, initialised as PyTorch does."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hce_jax.ops import batch_norm
from hce_jax.ops.common_operand import common_operand
from hce_jax.typing import Array, Float, Precision


def dense(n_in: int, n_out: int, *, precision: Precision, rngs: nnx.Rngs) -> nnx.Linear:
    """Return a linear layer x W + b whose W (in, out) and b start uniform in +-1/sqrt(n_in).

    Rows of x may be wider than n_in: W goes on with zeros, see :func:`widened`.
    This is the initialisation of ``torch.nn.Linear`` (golden README, surprise 20). PyTorch stores W as (out, in).

    Examples
    --------
    >>> from hce_jax.typing import PRECISIONS
    >>> dense(4, 3, precision=PRECISIONS["float32"], rngs=nnx.Rngs(0)).kernel.shape
    (4, 3)
    """
    bound = 1.0 / math.sqrt(n_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Linear(
        n_in,
        n_out,
        dtype=precision.dtype,
        precision=precision.matmul,
        kernel_init=init,
        bias_init=init,
        dot_general=_dot_of_wide_rows,
        rngs=rngs,
    )


def _dot_of_wide_rows(x: Array, kernel: Array, *how: Any, **more: Any) -> Array:
    return jax.lax.dot_general(x, widened(kernel, x.shape[-1]), *how, **more)


def widened(kernel_gh: Float[Array, "g *h"], width: int) -> Float[Array, "w *h"]:
    """Return a kernel, or a vector, with rows of zeros after its own: what rows of x as wide as that are read with.

    Its gradient is a slice. With as many rows as it has, it is returned as it is.

    Parameters
    ----------
    kernel_gh
        Its first axis is that of the genes.
    width
        Rows w of the result, at least g; see :func:`hce_jax.input.row_width`.

    Raises
    ------
    ValueError
        If there are fewer.

    Examples
    --------
    >>> widened(jnp.ones((2, 1)), 3).tolist()
    [[1.0], [1.0], [0.0]]
    """
    n_more = width - kernel_gh.shape[0]
    return jnp.pad(kernel_gh, [(0, n_more), *[(0, 0)] * (kernel_gh.ndim - 1)]) if n_more else kernel_gh


class BatchNorm(nnx.Module):
    """PyTorch's batch norm: over the whole batch, or over ghost batches.

    Parameters
    ----------
    n_features
        Width of the input.
    momentum
        Share of the new value in the running mean and variance, PyTorch's convention.
    virtual_batch_size
        Size of the ghost batches; None for the whole batch.

    Examples
    --------
    >>> norm = BatchNorm(3)
    >>> norm(jnp.ones((2, 3)), train=False).shape
    (2, 3)
    """

    def __init__(self, n_features: int, *, momentum: float = 0.1, virtual_batch_size: int | None = None):
        self.momentum, self.virtual_batch_size = momentum, virtual_batch_size
        self.weight = nnx.Param(jnp.ones(n_features))
        self.bias = nnx.Param(jnp.zeros(n_features))
        self.running_mean = nnx.BatchStat(jnp.zeros(n_features))
        self.running_variance = nnx.BatchStat(jnp.ones(n_features))
        self.n_updates = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x_bh: Float[Array, "b h"], *, train: bool) -> Float[Array, "b h"]:
        """Normalise by the batch's own statistics and update the running ones, or by the running ones."""
        if not train:
            return batch_norm.scale_shift(x_bh, *self.running_affine())

        def normalise(x_vnh: Array) -> tuple[Array, batch_norm.Moments]:
            statistics = batch_norm.moments(x_vnh)
            return batch_norm.scale_shift(x_vnh, *self.affine(statistics)), statistics

        sizes = batch_norm.part_sizes(x_bh.shape[0], self.virtual_batch_size)
        y_bh, statistics_vh = batch_norm.over_parts(normalise, sizes, x_bh)
        self.update(statistics_vh, sizes)
        return y_bh

    def affine(self, statistics: batch_norm.Moments) -> tuple[Float[Array, "*v h"], Float[Array, "*v h"]]:
        """Return the scale and shift that normalise by these statistics, (h,) or (v, h)."""
        return batch_norm.affine(statistics, self.weight[...], self.bias[...])

    def running_affine(self) -> tuple[Float[Array, "h"], Float[Array, "h"]]:
        """Return the scale and shift of evaluation mode."""
        return self.affine(batch_norm.Moments(self.running_mean[...], self.running_variance[...]))

    def update(self, statistics_vh: batch_norm.Moments, sizes: list[int]) -> None:
        """Update the running statistics with those of the parts of a batch."""
        running = batch_norm.Moments(self.running_mean[...], self.running_variance[...])
        statistics_vh = jax.lax.stop_gradient(statistics_vh)
        self.running_mean[...], self.running_variance[...] = batch_norm.update_running(
            running, statistics_vh, sizes, self.momentum
        )
        self.n_updates[...] += common_operand(jnp.int32(len(sizes)))
