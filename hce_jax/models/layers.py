"""Layers that several models share, initialised as PyTorch does."""

import math

import jax
from flax import nnx

from hce_jax.typing import Precision


def dense(n_in: int, n_out: int, *, precision: Precision, rngs: nnx.Rngs) -> nnx.Linear:
    """Return a linear layer x W + b whose W (in, out) and b start uniform in +-1/sqrt(n_in).

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
        n_in, n_out, dtype=precision.dtype, precision=precision.matmul, kernel_init=init, bias_init=init, rngs=rngs
    )
