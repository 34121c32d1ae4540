"""The multilayer perceptron of the paper: linear, batch norm, SiLU, dropout, eight times."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from hce_jax.errors import ConfigError
from hce_jax.models.layers import BatchNorm, dense
from hce_jax.typing import Array, Float, Key, Precision


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """Hyper-parameters of the MLP, named and set as published.

    Attributes
    ----------
    hidden_size
        Width of every hidden layer.
    n_hidden
        Number of hidden layers.
    dropout
        Probability that training drops a hidden unit.

    Raises
    ------
    ConfigError
        If a size is below 1, or the dropout outside [0, 1).

    Examples
    --------
    >>> MLPConfig(dropout=-0.1)
    Traceback (most recent call last):
    hce_jax.errors.ConfigError: config.dropout is -0.1; it must be at least 0 and below 1
    """

    hidden_size: int = 128
    n_hidden: int = 8
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("hidden_size", "n_hidden"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config.{name} is {getattr(self, name)!r}; it must be 1 or more")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"config.dropout is {self.dropout!r}; it must be at least 0 and below 1")


class MLP(nnx.Module):
    """Hidden layers h <- dropout(silu(batch_norm(h W + b))), then logits = h W + b.

    Parameters
    ----------
    config
        Hyper-parameters.
    n_genes, n_types
        Sizes of the input and of the output; rows of the input may be longer, by zeros.
    precision
        How matrix products are computed.
    rngs
        Source of the initial weights, stream ``params``.

    Examples
    --------
    >>> from hce_jax.typing import PRECISIONS
    >>> model = MLP(MLPConfig(n_hidden=2), n_genes=5, n_types=3, precision=PRECISIONS["float32"], rngs=nnx.Rngs(0))
    >>> logits, auxiliary_loss = model(jnp.zeros((4, 5)))
    >>> logits.shape
    (4, 3)
    """

    def __init__(self, config: MLPConfig, n_genes: int, n_types: int, *, precision: Precision, rngs: nnx.Rngs):
        self.dropout = config.dropout
        sizes = [n_genes] + [config.hidden_size] * config.n_hidden
        self.layers = nnx.List(
            [dense(n_in, n_out, precision=precision, rngs=rngs) for n_in, n_out in itertools.pairwise(sizes)]
        )
        self.norms = nnx.List([BatchNorm(config.hidden_size) for _ in self.layers])
        self.linear = dense(config.hidden_size, n_types, precision=precision, rngs=rngs)

    @property
    def first_layer(self) -> nnx.Linear:
        """The layer that reads the genes."""
        return self.layers[0]

    def __call__(
        self, x_bw: Float[Array, "b w"], *, train: bool = False, key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "b c"], Float[Array, "b"]]:
        """Return the logits and each cell's auxiliary loss, zero.

        Raises
        ------
        ValueError
            If training drops units and there is no ``key`` to draw them with.
        """
        return self.after_first_layer(self.first_layer(x_bw), train=train, key=key)

    def after_first_layer(
        self, h_bh: Float[Array, "b h"], *, train: bool = False, key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "b c"], Float[Array, "b"]]:
        """Return what the model does, given what its first layer makes of the genes."""
        return self.classify(self._encode(h_bh, train, key)), jnp.zeros(h_bh.shape[0], jnp.float32)

    def embed(self, x_bw: Float[Array, "b w"]) -> Float[Array, "b h"]:
        """Return the last hidden layer."""
        return self.embed_after_first_layer(self.first_layer(x_bw))

    def embed_after_first_layer(self, h_bh: Float[Array, "b h"]) -> Float[Array, "b h"]:
        """Return the last hidden layer, given what the first one makes of the genes."""
        return self._encode(h_bh, train=False, key=None)

    def classify(self, embedding_bh: Float[Array, "b h"]) -> Float[Array, "b c"]:
        """Return the logits of cells, given their embedding."""
        return self.linear(embedding_bh).astype(jnp.float32)

    def _encode(self, h_bh: Array, train: bool, key: Array | None) -> Array:
        for index, norm in enumerate(self.norms):
            if index:
                h_bh = self.layers[index](h_bh)
            h_bh = jax.nn.silu(norm(h_bh.astype(jnp.float32), train=train))
            if train and self.dropout:
                h_bh = _drop(h_bh, self.dropout, key, index)
        return h_bh


def _drop(h_bh: Array, rate: float, key: Array | None, layer: int) -> Array:
    if key is None:
        raise ValueError("training with dropout needs a random key")
    keep_bh = jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - rate, h_bh.shape)
    return jnp.where(keep_bh, h_bh / (1 - rate), 0)
