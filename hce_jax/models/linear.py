"""The linear classifier: one matrix, one bias."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from hce_jax.models.layers import dense
from hce_jax.typing import Array, Float, Key, Precision


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    """The linear model has no hyper-parameters of its own."""


class Linear(nnx.Module):
    """Logits = x W + b, with PyTorch's initialisation.

    Parameters
    ----------
    config
        Hyper-parameters (none).
    n_genes, n_types
        Sizes of the input and of the output; rows of the input may be longer, by zeros.
    precision
        How the matrix product is computed.
    rngs
        Source of the initial weights, stream ``params``.

    Examples
    --------
    >>> from hce_jax.typing import PRECISIONS
    >>> model = Linear(LinearConfig(), n_genes=5, n_types=3, precision=PRECISIONS["float32"], rngs=nnx.Rngs(0))
    >>> logits, auxiliary_loss = model(jnp.zeros((2, 5)))
    >>> logits.shape
    (2, 3)
    """

    def __init__(self, config: LinearConfig, n_genes: int, n_types: int, *, precision: Precision, rngs: nnx.Rngs):
        self.linear = dense(n_genes, n_types, precision=precision, rngs=rngs)

    @property
    def first_layer(self) -> nnx.Linear:
        """The layer that reads the genes."""
        return self.linear

    def __call__(
        self, x_bw: Float[Array, "b w"], *, train: bool = False, key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "b c"], Float[Array, "b"]]:
        """Return the logits and each cell's auxiliary loss, zero. Training mode and key change nothing here."""
        return self.after_first_layer(self.first_layer(x_bw))

    def after_first_layer(self, h_bh: Float[Array, "b h"]) -> tuple[Float[Array, "b c"], Float[Array, "b"]]:
        """Return what the model does, given what its first layer makes of the genes."""
        return h_bh.astype(jnp.float32), jnp.zeros(h_bh.shape[0], jnp.float32)
