"""TabNet as the paper uses it: attention selects genes by a sparse mask, and a stack of gated layers reads them.

Arik and Pfister 2021 (arXiv:1908.07442), with 1.5-entmax or sparsemax. What is computed is what the published network
computes (golden README, section 5); how, follows from the shape of the data: 19,331 genes and layers of a few hundred
units. The cost lies in the few arrays of (cells, genes), so that

- the first batch norm is never applied to the expression matrix: it scales and shifts the rows of the first kernel;
- the batch norm of an attention layer takes its statistics from the small covariance of that layer's input;
- on a CPU the wide arrays exist for one ghost batch at a time, and the backward pass computes them again.

The published network's multi-task outputs are left out on purpose: there is one output, the cell type.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hce_jax.errors import ConfigError
from hce_jax.models.layers import BatchNorm, widened
from hce_jax.ops import batch_norm
from hce_jax.ops.entmax import THRESHOLD, entmax15, sparsemax
from hce_jax.ops.gated_norm import MAX_ROWS, RESIDUAL_SCALE, gated_norm
from hce_jax.ops.selection import EPSILON, select_genes
from hce_jax.typing import Array, Float, Key, Precision

#: Score of the columns that only fill a row up.
_NEVER = -1e30
#: Momentum of the batch norm of the input, whatever that of the others.
_INPUT_MOMENTUM = 0.01

_SELECTORS = {"entmax": entmax15, "sparsemax": sparsemax}


@dataclasses.dataclass(frozen=True)
class TabNetConfig:
    """Hyper-parameters of TabNet, named and set as published.

    Attributes
    ----------
    n_d
        Width of a step's output, and of the embedding.
    n_a
        Width of the attention's input.
    n_steps
        Number of decision steps, each with a mask of its own.
    gamma
        A gene that a step has used with weight M comes to the next with its score times gamma - M.
    n_independent, n_shared
        Gated layers of each transformer: its own, and those common to all of them.
    virtual_batch_size
        Size of the ghost batches; a smaller batch is one ghost batch.
    momentum
        Share of the new value in the running statistics of the ghost batch norms.
    mask_type
        ``entmax`` (1.5-entmax) or ``sparsemax``.
    lambda_sparse
        Weight of the masks' entropy in the objective.

    Raises
    ------
    ConfigError
        If a size is below 1, there is no gated layer at all, the momentum is outside (0, 1], gamma below 1,
        lambda_sparse below 0, or there is no such mask type.

    Examples
    --------
    >>> TabNetConfig(n_steps=0)
    Traceback (most recent call last):
    hce_jax.errors.ConfigError: config.n_steps is 0; it must be 1 or more
    """

    n_d: int = 128
    n_a: int = 64
    n_steps: int = 1
    gamma: float = 1.3
    n_independent: int = 5
    n_shared: int = 3
    virtual_batch_size: int = 256
    momentum: float = 0.02
    mask_type: str = "entmax"
    lambda_sparse: float = 1e-5

    def __post_init__(self) -> None:
        for name, least in (("n_d", 1), ("n_a", 1), ("n_steps", 1), ("virtual_batch_size", 1), ("n_independent", 0),
                            ("n_shared", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"config.{name} is {getattr(self, name)!r}; it must be {least} or more")
        if self.n_independent == self.n_shared == 0:
            raise ConfigError("config.n_independent and config.n_shared are both 0; TabNet needs at least one layer")
        if not 1 <= self.gamma < math.inf:
            raise ConfigError(f"config.gamma is {self.gamma!r}; it must be 1 or more and finite")
        if not 0 <= self.lambda_sparse < math.inf:
            raise ConfigError(f"config.lambda_sparse is {self.lambda_sparse!r}; it must be 0 or more and finite")
        if not 0 < self.momentum <= 1:
            raise ConfigError(f"config.momentum is {self.momentum!r}; it must be above 0 and at most 1")
        if self.mask_type not in _SELECTORS:
            raise ConfigError(f"config.mask_type is {self.mask_type!r}; choose one of {', '.join(_SELECTORS)}")


class _Encoding(NamedTuple):
    """What the network makes of a batch, before the linear classifier."""

    embedding_bh: Array
    #: sum_g M log(M + 1e-15), mean over steps: minus the entropy, at most zero.
    negative_entropy_b: Array
    #: Masks M and outputs d of the steps.
    masks: list[Array]
    outputs: list[Array]


class TabNet(nnx.Module):
    """TabNet for one multi-class output.

    Parameters
    ----------
    config
        Hyper-parameters.
    n_genes, n_types
        Sizes of the input and of the output.
    precision
        How the large matrix products are computed.
    rngs
        Source of the initial weights, stream ``params``.

    Examples
    --------
    >>> from hce_jax.typing import PRECISIONS
    >>> model = TabNet(TabNetConfig(n_d=4, n_a=2), 50, 3, precision=PRECISIONS["float32"], rngs=nnx.Rngs(0))
    >>> logits, auxiliary_loss = model(jnp.ones((6, 50)))
    >>> logits.shape
    (6, 3)
    """

    def __init__(self, config: TabNetConfig, n_genes: int, n_types: int, *, precision: Precision, rngs: nnx.Rngs):
        self.config, self.precision = config, precision
        self.input_norm = BatchNorm(n_genes, momentum=_INPUT_MOMENTUM)
        self.shared_kernels = nnx.List(_gated_kernels(config.n_shared, n_genes, config, rngs))
        first_own = config.n_d + config.n_a if config.n_shared else n_genes
        self.splitter, *transformers = (
            Transformer(config, first_own, precision=precision, rngs=rngs) for _ in range(config.n_steps + 1)
        )
        self.transformers = nnx.List(transformers)
        self.attentions = nnx.List([Attention(config, n_genes, rngs=rngs) for _ in range(config.n_steps)])
        self.head = _kernel(config.n_d, n_types, 1.0, rngs)

    def __call__(
        self, x_bw: Float[Array, "b w"], *, train: bool = False, key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "b c"], Float[Array, "b"]]:
        """Return the logits and each cell's auxiliary loss.

        The loss is -lambda_sparse * sum_g M log(M + 1e-15), mean over the steps: lambda_sparse times the entropy of the
        cell's masks, as published (there: the loss minus lambda_sparse * M_loss). Nothing is drawn with ``key``.
        """
        encoding = self._encode(x_bw, train)
        return self.classify(encoding.embedding_bh), -self.config.lambda_sparse * encoding.negative_entropy_b

    def embed(self, x_bw: Float[Array, "b w"]) -> Float[Array, "b h"]:
        """Return the sum of the steps' outputs (b, n_d)."""
        return self._encode(x_bw, train=False).embedding_bh

    def classify(self, embedding_bh: Float[Array, "b h"]) -> Float[Array, "b c"]:
        """Return the logits of cells, given their embedding."""
        return self.precision.product(embedding_bh, self.head[...])

    def explain(self, x_bw: Float[Array, "b w"]) -> tuple[Float[Array, "b w"], list[Float[Array, "b w"]]]:
        """Return the importance of every gene for every cell, and the mask of each step.

        The importance is the sum over the steps of the mask times the sum of the step's output (b, n_d); it is not
        normalised.
        """
        encoding = self._encode(x_bw, train=False, keep_masks=True)
        weighted = [m * d.sum(1, keepdims=True) for m, d in zip(encoding.masks, encoding.outputs, strict=True)]
        return sum(weighted[1:], weighted[0]), encoding.masks

    def read(self, x_bw: Float[Array, "b w"], masks: list[Float[Array, "b w"]]) -> Float[Array, "b c"]:
        """Return the logits of cells that are read through given masks, one a step, whatever x would attend to.

        Through their own masks, as :meth:`explain` gives them, cells have the logits that they have anyway.
        """
        shared = [kernel[...] for kernel in self.shared_kernels]
        scale_w, shift_w = self._input_affine(x_bw, train=False)
        rows_bw = batch_norm.scale_shift(x_bw, scale_w, shift_w)
        outputs = []
        for mask_bw, transformer in zip(masks, self.transformers, strict=True):
            kernel_wh = widened(transformer.first_kernel(shared), x_bw.shape[1])
            out_bh = transformer(self.precision.product(mask_bw * rows_bw, kernel_wh), shared, train=False)
            outputs.append(jax.nn.relu(out_bh[:, : self.config.n_d]))
        return self.classify(sum(outputs[1:], outputs[0]))

    def _encode(self, x_bw: Array, train: bool, keep_masks: bool = False) -> _Encoding:
        config, sizes = self.config, batch_norm.part_sizes(x_bw.shape[0], self.config.virtual_batch_size)
        shared = [kernel[...] for kernel in self.shared_kernels]
        with jax.named_scope("input_norm"):
            scale_w, shift_w = self._input_affine(x_bw, train)
        x_bw = x_bw.astype(self.precision.dtype)  # from here on only products of this precision read it
        with jax.named_scope("splitter"):
            # (x * scale + shift) W = x (scale * W) + shift W
            kernel_wh = widened(self.splitter.first_kernel(shared), x_bw.shape[1])
            shift_h = jnp.matmul(shift_w, kernel_wh, precision=jax.lax.Precision.HIGHEST)
            first_bh = self.precision.product(x_bw, scale_w[:, None] * kernel_wh) + shift_h[None, :]
            attended_bk = self.splitter(first_bh, shared, train=train)[:, config.n_d :]

        prior_bw, masks, outputs, entropies = None, [], [], []
        for step, (attention, transformer) in enumerate(zip(self.attentions, self.transformers, strict=True)):
            read = attention.reader(
                scale_w, shift_w, transformer.first_kernel(shared), self.precision, config.mask_type,
                train=train, keep_mask=keep_masks or step + 1 < config.n_steps,
            )  # fmt: skip
            (first_bh, entropy_b, mask_bw), statistics_vg = batch_norm.over_parts(
                _each_part(read), sizes, attended_bk, x_bw, prior_bw
            )
            if train:
                attention.norm.update(statistics_vg, sizes)
            if step + 1 < config.n_steps:
                prior_bw = (config.gamma - mask_bw) * (1.0 if prior_bw is None else prior_bw)
            with jax.named_scope("transformer"):
                out_bh = transformer(first_bh, shared, train=train)
            outputs.append(jax.nn.relu(out_bh[:, : config.n_d]))
            attended_bk = out_bh[:, config.n_d :]
            masks.append(mask_bw)
            entropies.append(entropy_b)
        return _Encoding(sum(outputs[1:], outputs[0]), sum(entropies) / config.n_steps, masks, outputs)

    def _input_affine(self, x_bw: Array, train: bool) -> tuple[Array, Array]:
        """Return the scale and shift (w,) of the first batch norm, which is over the whole batch."""
        affine = self.input_norm.running_affine()
        if train:
            n_genes = len(affine[0])
            statistics_g = jax.tree.map(lambda value: value[:n_genes], batch_norm.moments(x_bw))
            statistics_vg = jax.tree.map(lambda value: value[None, :], statistics_g)
            self.input_norm.update(statistics_vg, [x_bw.shape[0]])
            affine = self.input_norm.affine(statistics_g)
        scale_w, shift_w = (widened(value, x_bw.shape[1]) for value in affine)
        return scale_w, shift_w


class Transformer(nnx.Module):
    """Feature transformer: gated layers y <- (y + glu(norm(y W))) sqrt(1/2), the first one without the sum.

    The shared kernels come first and are passed in, for they belong to the network; each use has its own batch norm.

    Parameters
    ----------
    config
        Hyper-parameters.
    n_in
        Width of the input of the first kernel of its own.
    precision
        How matrix products are computed.
    rngs
        Source of the initial weights, stream ``params``.

    Examples
    --------
    >>> from hce_jax.typing import PRECISIONS
    >>> config = TabNetConfig(n_d=4, n_a=2, n_shared=0)
    >>> transformer = Transformer(config, 50, precision=PRECISIONS["float32"], rngs=nnx.Rngs(0))
    >>> transformer(jnp.ones((6, 12)), [], train=False).shape
    (6, 6)
    """

    def __init__(self, config: TabNetConfig, n_in: int, *, precision: Precision, rngs: nnx.Rngs):
        self.precision = precision
        self.kernels = nnx.List(_gated_kernels(config.n_independent, n_in, config, rngs))
        self.norms = nnx.List(
            [_ghost_norm(2 * (config.n_d + config.n_a), config) for _ in range(config.n_shared + config.n_independent)]
        )

    def first_kernel(self, shared: list[Array]) -> Float[Array, "g h"]:
        """Return the kernel that the input is to be multiplied with before it is given to the transformer."""
        return shared[0] if shared else self.kernels[0][...]

    def __call__(self, first_bh: Float[Array, "b h"], shared: list[Array], *, train: bool) -> Float[Array, "b half_h"]:
        """Transform the product of the input with the first kernel."""
        kernels = shared + [kernel[...] for kernel in self.kernels]
        dtype = self.precision.dtype
        y_bh, same_bh = _gated(self.norms[0], first_bh, None, dtype, train)
        for kernel, norm in zip(kernels[1:], self.norms[1:], strict=True):
            y_bh, same_bh = _gated(norm, self.precision.product(y_bh, kernel), same_bh, dtype, train)
        return same_bh


def _gated(
    norm: BatchNorm, product_bh: Array, residual_bu: Array | None, dtype: DTypeLike, train: bool
) -> tuple[Array, Array]:
    """Return what a gated layer makes of its product and of what it has read, twice; see :func:`gated_norm`."""
    sizes = batch_norm.part_sizes(product_bh.shape[0], norm.virtual_batch_size)
    if train and sizes[0] <= MAX_ROWS and _in_one_pass():

        def gate(product_vnh: Array, residual_vnu: Array | None) -> tuple[Any, batch_norm.Moments]:
            return gated_norm(product_vnh, norm.weight[...], norm.bias[...], residual_vnu, dtype)

        rows_bu, statistics_vh = batch_norm.over_parts(batch_norm.on_own_parts(gate), sizes, product_bh, residual_bu)
        norm.update(statistics_vh, sizes)
        return rows_bu
    gated_bu = _glu(norm(product_bh, train=train))
    y_bu = gated_bu if residual_bu is None else (residual_bu + gated_bu) * RESIDUAL_SCALE
    return y_bu, y_bu


class Attention(nnx.Module):
    """Attentive transformer: scores of the genes = ghost batch norm of (attended W), and from them the mask.

    Parameters
    ----------
    config
        Hyper-parameters.
    n_genes
        Number of scores.
    rngs
        Source of the initial weights, stream ``params``.

    Examples
    --------
    >>> Attention(TabNetConfig(n_a=2), 50, rngs=nnx.Rngs(0)).kernel.shape
    (2, 50)
    """

    def __init__(self, config: TabNetConfig, n_genes: int, *, rngs: nnx.Rngs):
        self.kernel = _kernel(config.n_a, n_genes, 1.0, rngs)
        self.norm = _ghost_norm(n_genes, config)

    def reader(
        self,
        scale_w: Float[Array, "w"],
        shift_w: Float[Array, "w"],
        first_kernel_gh: Float[Array, "g h"],
        precision: Precision,
        mask_type: str,
        *,
        train: bool,
        keep_mask: bool,
    ) -> Callable[..., tuple[Any, Any]]:
        """Return the function that selects the genes of one ghost batch and multiplies them with the first kernel.

        It takes attended (n, k), x (n, w) and the prior (n, w) or None, and returns ((product (n, h), negative entropy
        (n,), mask (n, w) or None), moments (g,) or None). It changes nothing, so that it can be mapped and recomputed.
        """
        kernel_kg, width = self.kernel[...], len(scale_w)
        n_more = width - kernel_kg.shape[1]
        kernel_kw, first_kernel_wh = jnp.pad(kernel_kg, ((0, 0), (0, n_more))), widened(first_kernel_gh, width)

        def read(attended_nk: Array, x_nw: Array, prior_nw: Array | None) -> tuple[Any, Any]:
            with jax.named_scope("attention"):
                statistics_g = _moments_of_product(attended_nk, kernel_kg) if train else None
                affine = self.norm.running_affine() if statistics_g is None else self.norm.affine(statistics_g)
                scale, shift = widened(affine[0], width), jnp.pad(affine[1], (0, n_more), constant_values=_NEVER)
            with jax.named_scope("select"):
                if _in_one_pass() and prior_nw is None and not keep_mask:
                    mask_nw, rows = (
                        None,
                        (precision.product(attended_nk, kernel_kw), scale, shift, x_nw, scale_w, shift_w),
                    )
                    selected_nw, negative_entropy_n = select_genes(*rows, mask_type, precision.dtype)
                else:
                    scores_nw = _product_shift(attended_nk, scale[None, :] * kernel_kw, shift, precision)
                    mask_nw = _SELECTORS[mask_type](scores_nw if prior_nw is None else scores_nw * prior_nw)
                    selected_nw = mask_nw * batch_norm.scale_shift(x_nw.astype(jnp.float32), scale_w, shift_w)
                    negative_entropy_n = jnp.sum(mask_nw * jnp.log(mask_nw + EPSILON), 1)
                product_nh = precision.product(selected_nw, first_kernel_wh)
            return (product_nh, negative_entropy_n, mask_nw if keep_mask else None), statistics_g

        return read


def _in_one_pass() -> bool:
    """Say whether there are kernels for what is otherwise many passes over the cells."""
    return jax.default_backend() == "gpu"


def _each_part(function: Callable[..., Any]) -> Callable[..., Any]:
    """Apply a function of the rows of one part to (v, n, ...): one after the other on a lone CPU, else all at once.

    On a CPU the arrays of one part stay in the cache, and the backward pass computes them again from the thresholds of
    the masks instead of writing and reading those of the whole batch. Where the parts lie on several devices, to take
    one after the other would bring all of them to each.
    """
    if _in_one_pass():
        return batch_norm.on_own_parts(jax.vmap(function))
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return jax.vmap(function)
    policy = jax.checkpoint_policies.save_only_these_names(THRESHOLD)
    recomputed = jax.checkpoint(function, policy=policy)
    return lambda *parts: jax.lax.map(lambda part: recomputed(*part), parts)


def _moments_of_product(x_nk: Array, kernel_kg: Array) -> batch_norm.Moments:
    """Return the moments of x W over the rows from those of x: mean(x) W and diag(W' cov(x) W)."""
    highest = jax.lax.Precision.HIGHEST
    mean_k = batch_norm.column_mean(x_nk)
    centred_nk = x_nk - mean_k[None, :]
    covariance_kk = jnp.matmul(centred_nk.T, centred_nk, precision=highest) / x_nk.shape[0]
    spread_kg = kernel_kg * jnp.matmul(covariance_kk, kernel_kg, precision=highest)
    mean_g = jnp.matmul(mean_k, kernel_kg, precision=highest)
    return batch_norm.Moments(mean_g, batch_norm.column_mean(spread_kg) * kernel_kg.shape[0])


def _product_shift(x_nk: Array, kernel_kg: Array, shift_g: Array, precision: Precision) -> Array:
    """Return x W + shift: in full float32 as one product, so that no second pass over (n, g) adds the shift.

    Its gradient comes with that of W, too. In a product of lower precision the shift would be rounded, so it is added.
    """
    if precision.matmul != jax.lax.Precision.HIGHEST:
        return precision.product(x_nk, kernel_kg) + shift_g[None, :]
    ones_n1 = jnp.ones((x_nk.shape[0], 1), x_nk.dtype)
    return precision.product(jnp.concatenate([x_nk, ones_n1], 1), jnp.concatenate([kernel_kg, shift_g[None, :]]))


def _glu(x_bh: Array) -> Array:
    value, gate = jnp.split(x_bh, 2, axis=1)
    return value * jax.nn.sigmoid(gate)


def _ghost_norm(n_features: int, config: TabNetConfig) -> BatchNorm:
    return BatchNorm(n_features, momentum=config.momentum, virtual_batch_size=config.virtual_batch_size)


def _gated_kernels(n_layers: int, n_in: int, config: TabNetConfig, rngs: nnx.Rngs) -> list[nnx.Param]:
    """Return the kernels of gated layers, the first of which reads ``n_in`` features."""
    width = config.n_d + config.n_a
    return [_kernel(width if layer else n_in, 2 * width, math.sqrt(2), rngs) for layer in range(n_layers)]


def _kernel(n_in: int, n_out: int, gain: float, rngs: nnx.Rngs) -> nnx.Param:
    """Return a kernel (in, out) drawn from a normal of standard deviation gain * n_in^(-1/4) (surprise 20)."""
    return nnx.Param(gain * n_in**-0.25 * jax.random.normal(rngs.params(), (n_in, n_out)))
