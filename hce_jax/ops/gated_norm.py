"""TabNet's gated layers on a GPU: all that follows a layer's matrix product in one pass, and back in another.

A gated layer is y = glu(norm(h)), or (r + glu(norm(h))) sqrt(1/2) with what it has read, r, added: h is a product of
(cells, 2 u), norm a ghost batch norm in training, and glu(z) = z_value sigmoid(z_gate) of the two halves of the units.
One operation after the other, this is a dozen kernels that hold next to no bytes, and there are 16 such layers in a
step. Here one program, for a ghost batch and a few units, keeps the columns of both halves in registers: it takes their
moments, normalises, gates and adds. On the way back, one more gives the gradients of h, weight, bias and r.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike

from hce_jax.ops.batch_norm import EPSILON, Moments
from hce_jax.typing import Array, Float

#: Of the sum of what a layer has read and what it makes of it, so that the variance stays.
RESIDUAL_SCALE = 0.5**0.5
#: Rows of a ghost batch that a program can keep in registers.
MAX_ROWS = 1024
#: Warps of a program, the most units that it takes (64 bytes of a row), and the most entries of them (16 a thread).
_N_WARPS, _MAX_UNITS, _ENTRIES = 8, 16, 4096


class _Layer(NamedTuple):
    """What both passes read; see :func:`gated_norm`."""

    h: Any
    weight: Any
    bias: Any
    residual: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def gated_norm(
    h_vnk: Float[Array, "v n k"],
    weight_k: Float[Array, "k"],
    bias_k: Float[Array, "k"],
    residual_vnu: Float[Array, "v n u"] | None,
    dtype: DTypeLike,
) -> tuple[tuple[Float[Array, "v n u"], Float[Array, "v n u"]], Moments]:
    """Return y = (r + glu(z)) sqrt(1/2) for z = (h - mean) / sqrt(variance + 1e-5) weight + bias, and the moments of h.

    Without a residual r, glu(z) itself. Mean and biased variance are those of each column over the rows of its ghost
    batch, taken in two passes; through them as results no gradient passes. A Pallas kernel (Triton) on a GPU, the same
    kernel interpreted elsewhere, that computes in float32. For one device: XLA cannot divide it.

    Parameters
    ----------
    h_vnk
        The products: v ghost batches of n rows, at most ``MAX_ROWS``, and k = 2 u units, first values, then gates.
    weight_k, bias_k
        Those of the batch norm.
    residual_vnu
        What is added, or None.
    dtype
        Of the rows for the next product.

    Returns
    -------
    tuple
        The rows y (v, n, u), twice: for the next product, and in float32 for the next sum. Their gradients so come back
        apart, and are added in the kernel. Then mean and variance (v, k).

    Raises
    ------
    ValueError
        If ghost batches have more rows.

    Examples
    --------
    >>> h = jnp.array([[[1.0, 0.0], [3.0, 0.0]]])
    >>> (y, _), moments = gated_norm(h, jnp.ones(2), jnp.zeros(2), None, jnp.float32)
    >>> y.round(3).tolist(), moments.mean.tolist(), moments.variance.tolist()
    ([[[-0.5], [0.5]]], [[2.0, 0.0]], [[1.0, 0.0]])
    """
    return _gate_forward(h_vnk, weight_k, bias_k, residual_vnu, dtype)[0]


def _gate_forward(*arguments: Any) -> tuple[tuple[tuple[Array, Array], Moments], tuple[_Layer, Moments]]:
    *inputs, dtype = arguments
    layer = _Layer(*inputs)
    n_parts, n_rows, width = layer.h.shape
    by_part = jax.ShapeDtypeStruct((n_parts, width), jnp.float32)
    # What is float32 anyway is written once.
    types = [jnp.float32] if jnp.dtype(dtype) == jnp.float32 else [dtype, jnp.float32]
    rows = [jax.ShapeDtypeStruct((n_parts, n_rows, width // 2), each) for each in types]
    rows_vnu, mean_vk, variance_vk = _call(_gate_kernel, (rows, by_part, by_part), layer)
    moments = Moments(mean_vk, variance_vk)
    return ((rows_vnu[0], rows_vnu[-1]), moments), (layer, moments)


def _gate_backward(
    dtype: DTypeLike, residuals: tuple[_Layer, Moments], gradient: tuple[tuple[Array, Array], Moments]
) -> tuple[Array, Array, Array, Array | None]:
    layer, moments = residuals
    by_part = jax.ShapeDtypeStruct(moments.mean.shape, jnp.float32)
    d_layer = _Layer(
        jax.ShapeDtypeStruct(layer.h.shape, jnp.float32),
        by_part,
        by_part,
        None if layer.residual is None else jax.ShapeDtypeStruct(layer.residual.shape, jnp.float32),
    )
    (d_layer,) = _call(_gate_backward_kernel, (d_layer,), layer._replace(residual=None), moments, *gradient[0])
    return d_layer.h, d_layer.weight.sum(0), d_layer.bias.sum(0), d_layer.residual


gated_norm.defvjp(_gate_forward, _gate_backward)


def _call(kernel: Callable[..., None], outputs: Any, layer: _Layer, *inputs: Any) -> Any:
    """Run a program for each ghost batch and block of units."""
    n_parts, n_rows, width = layer.h.shape
    if n_rows > MAX_ROWS:
        raise ValueError(f"ghost batches of {n_rows} rows; a program keeps at most {MAX_ROWS} in registers")
    n_units = min(_MAX_UNITS, _ENTRIES // pl.next_power_of_2(n_rows))
    return pl.pallas_call(
        functools.partial(kernel, layer.h.shape, n_units),
        out_shape=outputs,
        grid=(n_parts, pl.cdiv(width // 2, n_units)),
        interpret=jax.default_backend() != "gpu",
        compiler_params=triton.CompilerParams(num_warps=_N_WARPS, num_stages=1),
        name=kernel.__name__.strip("_"),
    )(layer, *inputs)


class _Columns:
    """Some columns of the rows of a program's ghost batch; in registers, a vector is (1, columns)."""

    def __init__(self, n_rows: int, columns: Array, known: Array):
        self._n_rows, self._columns, self._known = n_rows, columns, known
        self._part, self._rows = pl.program_id(0), jnp.arange(pl.next_power_of_2(n_rows))
        self._inside = (self._rows < n_rows)[:, None] & known[None, :]

    def _place(self, ref: Any) -> tuple[Any, Array]:
        if len(ref.shape) == 3:
            return ref.at[self._part, self._rows[:, None], self._columns[None, :]], self._inside
        return ref.at[self._part, self._columns] if len(ref.shape) == 2 else ref.at[self._columns], self._known

    def load(self, ref: Any) -> Array:
        """Read the columns of (v, n, ...), (v, ...) or (...); zeros beyond the rows."""
        place, inside = self._place(ref)
        value = triton.load(place, mask=inside, other=0.0).astype(jnp.float32)
        return value if len(ref.shape) == 3 else value[None, :]

    def store(self, ref: Any, value: Array) -> None:
        """Write the columns of (v, n, ...) or (v, ...)."""
        place, inside = self._place(ref)
        triton.store(place, (value if len(ref.shape) == 3 else value[0]).astype(ref.dtype), mask=inside)

    def centred(self, h: Array, mean: Array) -> Array:
        """Return h less its mean; zeros beyond the rows."""
        return jnp.where(self._inside, h - mean, 0)

    def mean(self, value: Array) -> Array:
        """Return the mean over the rows."""
        return jnp.sum(value, 0, keepdims=True) / self._n_rows


def _halves(shape: tuple[int, ...], n_units: int) -> tuple[_Columns, _Columns]:
    """Return the columns of the values and of the gates of a program's units."""
    n_rows, half = shape[1], shape[2] // 2
    units = pl.program_id(1) * n_units + jnp.arange(n_units)
    return _Columns(n_rows, units, units < half), _Columns(n_rows, half + units, units < half)


def _gate_kernel(shape: tuple[int, ...], n_units: int, layer: _Layer, rows: list[Any], *moments: Any) -> None:
    halves, z = _halves(shape, n_units), []
    for columns in halves:
        h = columns.load(layer.h)
        mean = columns.mean(h)
        centred = columns.centred(h, mean)
        variance = columns.mean(centred * centred)
        z.append(centred * (columns.load(layer.weight) * jax.lax.rsqrt(variance + EPSILON)) + columns.load(layer.bias))
        for ref, moment in zip(moments, (mean, variance), strict=True):
            columns.store(ref, moment)
    value, gate = z
    gated = value * jax.nn.sigmoid(gate)
    if layer.residual is not None:
        gated = (halves[0].load(layer.residual) + gated) * RESIDUAL_SCALE
    for ref in rows:
        halves[0].store(ref, gated)


def _gate_backward_kernel(
    shape: tuple[int, ...],
    n_units: int,
    layer: _Layer,
    moments: Moments,
    d_y: Any,
    d_y_too: Any,
    d_layer: _Layer,
) -> None:
    halves, normalised, z, scales = _halves(shape, n_units), [], [], []
    for columns in halves:
        weight, inverse = columns.load(layer.weight), jax.lax.rsqrt(columns.load(moments.variance) + EPSILON)
        normalised.append(columns.centred(columns.load(layer.h), columns.load(moments.mean)) * inverse)
        z.append(normalised[-1] * weight + columns.load(layer.bias))
        scales.append(weight * inverse)
    d_gated = halves[0].load(d_y) + halves[0].load(d_y_too)
    if d_layer.residual is not None:
        d_gated = d_gated * RESIDUAL_SCALE
        halves[0].store(d_layer.residual, d_gated)
    value, gate = z[0], jax.nn.sigmoid(z[1])
    d_z = d_gated * gate, d_gated * value * gate * (1 - gate)
    for columns, x, scale, d in zip(halves, normalised, scales, d_z, strict=True):
        mean, mean_x = columns.mean(d), columns.mean(d * x)
        columns.store(d_layer.h, scale * (d - mean - x * mean_x))
        columns.store(d_layer.weight, mean_x * shape[1])
        columns.store(d_layer.bias, mean * shape[1])
