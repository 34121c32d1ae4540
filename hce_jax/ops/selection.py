"""TabNet's selection of genes on a GPU: from scores to masked input in one pass, and back in another.

A mask is 1.5-entmax or sparsemax of a row of scores z = a W + b (:mod:`hce_jax.ops.entmax`), and what it lets through
is p (x scale + shift). One operation after the other, this reads and writes arrays of (cells, genes) a dozen times, and
the host waits for every Newton step. Here one program a cell keeps its row of scores in registers, finds the threshold
and writes what is selected; on the way back, one program a cell turns the gradient of that into the gradient of the
scores. The mask is never stored: it follows from the scores and the threshold.

With u = max((z - max z) c - tau, 0): entmax has c = 1/2, p = u^2, s = u, and sparsemax c = 1, p = u, s = [u > 0]. In
both the gradient of the scores is s (dp - (sum s dp) / (sum s)), and Newton's step a function of sum p and sum s.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike

from hce_jax.ops.entmax import MAX_STEPS, TOLERANCE
from hce_jax.typing import Array, Float

#: Keeps the logarithm of an entry of the mask finite.
EPSILON = 1e-15
#: Warps of the program of a cell, and entries of a row that these load at once: 16 bytes a thread.
_N_WARPS = 16
_PIECE = 4 * 32 * _N_WARPS
#: Cells and genes that a program of sums reads at once.
_CELLS, _GENES = 16, 128


class Selection(NamedTuple):
    """What the masks of some cells let through.

    Attributes
    ----------
    selected
        Mask times normalised input (n, g), in the type of the precision.
    negative_entropy
        sum_g p log(p + 1e-15) of each mask p (n,), at most zero.
    """

    selected: Float[Array, "n g"]
    negative_entropy: Float[Array, "n"]


class _Mask(NamedTuple):
    """The constant c, the functions p(u) and s(u), and Newton's step for tau from sum p and sum s."""

    scale: float
    of: Callable[[Array], Array]
    slope: Callable[[Array], Array]
    step: Callable[[Array, Array], Array]


def _entmax_step(sum_p: Array, sum_s: Array) -> Array:
    norm = jnp.sqrt(sum_p)
    return (norm - 1) * norm / sum_s


_MASKS = {
    "entmax": _Mask(0.5, jnp.square, lambda u: u, _entmax_step),
    "sparsemax": _Mask(1.0, lambda u: u, lambda u: (u > 0).astype(u.dtype), lambda p, s: (p - 1) / s),
}


class _Entry:
    """Entries of a mask that follow from scores z, the largest of their row, and tau."""

    def __init__(self, kind: _Mask, z: Array, top: Array, tau: Array):
        u = jnp.maximum((z - top) * kind.scale - tau, 0)
        self.mask, self.slope = kind.of(u), kind.slope(u)

    def d_mask(self, d_selected: Array, d_negative_entropy: Array) -> Array:
        """Return the gradient of the mask from those of what it lets through (times the input) and of its entropy."""
        p = self.mask
        return d_selected + d_negative_entropy * (jnp.log(p + EPSILON) + p / (p + EPSILON))


class _Rows(NamedTuple):
    """What both passes read; see :func:`select_genes`."""

    scores: Any
    score_scale: Any
    score_shift: Any
    x: Any
    scale: Any
    shift: Any


class _Threshold(NamedTuple):
    """The largest of the scores z and tau of each cell (n,)."""

    top: Any
    tau: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def select_genes(
    scores_ng: Float[Array, "n g"],
    score_scale_g: Float[Array, "g"],
    score_shift_g: Float[Array, "g"],
    x_ng: Float[Array, "n g"],
    scale_g: Float[Array, "g"],
    shift_g: Float[Array, "g"],
    mask_type: str,
    dtype: DTypeLike,
) -> Selection:
    """Return p (x scale + shift) and the negative entropy of p, for the mask p of z = scores score_scale + score_shift.

    A Pallas kernel (Triton) on a GPU, the same kernel interpreted elsewhere. For one device: XLA cannot divide it.

    Parameters
    ----------
    scores_ng, score_scale_g, score_shift_g
        The scores, and the batch norm that is folded in. A shift of -1e30 keeps a gene out.
    x_ng, scale_g, shift_g
        The input, and the batch norm that is folded in.
    mask_type
        ``entmax`` or ``sparsemax``.
    dtype
        Of ``selected``, and of the gradient of the scores.

    Examples
    --------
    >>> one, zero = jnp.ones(3), jnp.zeros(3)
    >>> scores, x = jnp.array([[2.0, 2.0, -5.0]]), jnp.array([[4.0, 6.0, 8.0]])
    >>> select_genes(scores, one, zero, x, one, zero, "entmax", jnp.float32).selected.round(5).tolist()
    [[2.0, 3.0, 0.0]]
    """
    rows = scores_ng, score_scale_g, score_shift_g, x_ng, scale_g, shift_g
    return _select_forward(*rows, mask_type, dtype)[0]


def _select_forward(*arguments: Any) -> tuple[Selection, tuple[_Rows, _Threshold]]:
    rows, (mask_type, dtype) = _Rows(*arguments[:6]), arguments[6:]
    by_cell: Any = jax.ShapeDtypeStruct(rows.x.shape[:1], jnp.float32)
    selected: Any = jax.ShapeDtypeStruct(rows.x.shape, dtype)
    outputs = Selection(selected, by_cell), _Threshold(by_cell, by_cell)
    selection, threshold = _call(_forward_kernel, mask_type, len(rows.x), outputs, rows)
    return selection, (rows, threshold)


def _select_backward(
    mask_type: str, dtype: DTypeLike, residuals: tuple[_Rows, _Threshold], gradient: Selection
) -> tuple[Array, ...]:
    rows, threshold = residuals
    (n_cells, width), kind = rows.x.shape, _MASKS[mask_type]
    by_cell, by_gene = (jax.ShapeDtypeStruct((n,), jnp.float32) for n in (n_cells, width))
    outputs = jax.ShapeDtypeStruct(rows.scores.shape, dtype), by_cell
    d_scores_ng, mean_n = _call(_backward_kernel, mask_type, n_cells, outputs, rows, threshold, gradient)
    # The sums over cells read the arrays once more: cheaper than to write and read others for them.
    sums = _call(_sums_kernel, mask_type, pl.cdiv(width, _GENES), (by_gene,) * 4, rows, threshold, gradient, mean_n)
    z_ng = rows.scores * rows.score_scale[None, :] + rows.score_shift[None, :]
    mask_ng = _Entry(kind, z_ng, *(each[:, None] for each in threshold)).mask
    d_x_ng = gradient.selected * mask_ng * rows.scale[None, :]  # not computed where nobody asks for it
    return d_scores_ng.astype(jnp.float32), *sums[:2], d_x_ng.astype(rows.x.dtype), *sums[2:]


select_genes.defvjp(_select_forward, _select_backward)


def _call(kernel: Callable[..., None], mask_type: str, n_programs: int, outputs: Any, *inputs: Any) -> Any:
    """Run the programs of a kernel; it is given references to inputs and outputs as they are nested."""
    return pl.pallas_call(
        functools.partial(kernel, _MASKS[mask_type], inputs[0].x.shape),
        out_shape=outputs,
        grid=(n_programs,),
        interpret=jax.default_backend() != "gpu",
        compiler_params=triton.CompilerParams(num_warps=_N_WARPS, num_stages=1),
        name=kernel.__name__.strip("_"),
    )(*inputs)


class _Row:
    """The pieces of a row of (n, g), or of (g,) that all rows share, in registers."""

    def __init__(self, width: int):
        self._width, self._row = width, pl.program_id(0)
        self.starts = range(0, width, _PIECE)

    def _place(self, ref: Any, start: int) -> tuple[Any, Array]:
        columns = start + jnp.arange(_PIECE)
        return ref.at[self._row, columns] if len(ref.shape) == 2 else ref.at[columns], columns < self._width

    def load(self, ref: Any, start: int, other: float = 0.0) -> Array:
        """Read a piece as float32; ``other`` stands for what lies beyond the row."""
        place, inside = self._place(ref, start)
        return triton.load(place, mask=inside, other=other).astype(jnp.float32)

    def store(self, ref: Any, start: int, value: Array) -> None:
        """Write a piece."""
        place, inside = self._place(ref, start)
        triton.store(place, value.astype(ref.dtype), mask=inside)

    def scores(self, rows: _Rows) -> list[Array]:
        """Read the pieces of z = scores score_scale + score_shift; minus infinity beyond the row."""
        return [
            self.load(rows.scores, start) * self.load(rows.score_scale, start)
            + self.load(rows.score_shift, start, -jnp.inf)
            for start in self.starts
        ]

    def normalised(self, rows: _Rows, start: int) -> Array:
        """Read a piece of x scale + shift."""
        return self.load(rows.x, start) * self.load(rows.scale, start) + self.load(rows.shift, start)

    def value(self, ref: Any) -> Array:
        """Read the row's entry of (n,)."""
        return ref[self._row]

    def set(self, ref: Any, value: Array) -> None:
        """Write the row's entry of (n,)."""
        ref[self._row] = value


def _total(pieces: list[Array]) -> Array:
    """Return the sum of all entries: across the pieces first, so that the threads meet once."""
    return jnp.sum(functools.reduce(jnp.add, pieces))


def _forward_kernel(
    kind: _Mask, shape: tuple[int, int], rows: _Rows, selection: Selection, threshold: _Threshold
) -> None:
    row = _Row(shape[1])
    z = row.scores(rows)
    top = jnp.max(functools.reduce(jnp.maximum, z))
    y = [(piece - top) * kind.scale for piece in z]

    def moving(state: tuple[Array, Array, Array]) -> Array:
        _, last, count = state
        return (last > TOLERANCE) & (count < MAX_STEPS)

    def advance(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tau, _, count = state
        above = [jnp.maximum(piece - tau, 0) for piece in y]
        step = kind.step(_total([kind.of(u) for u in above]), _total([kind.slope(u) for u in above]))
        last = jnp.maximum(step, 0)
        return tau + last, last, count + 1

    tau, _, _ = jax.lax.while_loop(moving, advance, (jnp.float32(-1), jnp.float32(1), jnp.int32(0)))
    p = [kind.of(jnp.maximum(piece - tau, 0)) for piece in y]
    for start, piece in zip(row.starts, p, strict=True):
        row.store(selection.selected, start, piece * row.normalised(rows, start))
    row.set(selection.negative_entropy, _total([piece * jnp.log(piece + EPSILON) for piece in p]))
    row.set(threshold.top, top)
    row.set(threshold.tau, tau)


def _backward_kernel(
    kind: _Mask,
    shape: tuple[int, int],
    rows: _Rows,
    threshold: _Threshold,
    gradient: Selection,
    d_scores: Any,
    mean: Any,
) -> None:
    row = _Row(shape[1])
    top, tau, d_entropy = (row.value(ref) for ref in (*threshold, gradient.negative_entropy))
    slopes, d_masks = [], []
    for start, z in zip(row.starts, row.scores(rows), strict=True):
        entry = _Entry(kind, z, top, tau)
        d_selected = row.load(gradient.selected, start) * row.normalised(rows, start)
        slopes.append(entry.slope)
        d_masks.append(entry.d_mask(d_selected, d_entropy))
    average = _total([s * dp for s, dp in zip(slopes, d_masks, strict=True)]) / _total(slopes)
    for start, s, dp in zip(row.starts, slopes, d_masks, strict=True):
        row.store(d_scores, start, s * (dp - average) * row.load(rows.score_scale, start))
    row.set(mean, average)


def _sums_kernel(
    kind: _Mask,
    shape: tuple[int, int],
    rows: _Rows,
    threshold: _Threshold,
    gradient: Selection,
    mean: Any,
    *sums: Any,
) -> None:
    """Sum over the cells, for some genes: the gradients of the scores' scale and shift, and of the input's."""
    genes = pl.program_id(0) * _GENES + jnp.arange(_GENES)
    by_gene = [_load(ref, genes, shape[1])[None, :] for ref in (*rows[1:3], *rows[4:])]

    def add(chunk: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        cells = chunk * _CELLS + jnp.arange(_CELLS)
        scores, x, d_selected = (
            _load_tile(ref, cells, genes, shape) for ref in (rows.scores, rows.x, gradient.selected)
        )
        # Rows that are not there have no gradient, so nothing comes from them.
        by_cell = (*threshold, gradient.negative_entropy, mean)
        top, tau, d_entropy, average = (_load(ref, cells, shape[0])[:, None] for ref in by_cell)
        score_scale, score_shift, scale, shift = by_gene
        entry = _Entry(kind, scores * score_scale + score_shift, top, tau)
        d_z = entry.slope * (entry.d_mask(d_selected * (x * scale + shift), d_entropy) - average)
        d_normalised = d_selected * entry.mask
        return tuple(map(jnp.add, totals, (d_z * scores, d_z, d_normalised * x, d_normalised)))

    nothing = (jnp.zeros((_CELLS, _GENES), jnp.float32),) * 4
    totals = jax.lax.fori_loop(0, pl.cdiv(shape[0], _CELLS), add, nothing)
    for ref, total in zip(sums, totals, strict=True):
        triton.store(ref.at[genes], jnp.sum(total, 0), mask=genes < shape[1])


def _load(ref: Any, places: Array, length: int) -> Array:
    return triton.load(ref.at[places], mask=places < length, other=0.0).astype(jnp.float32)


def _load_tile(ref: Any, cells: Array, genes: Array, shape: tuple[int, int]) -> Array:
    inside = (cells < shape[0])[:, None] & (genes < shape[1])[None, :]
    return triton.load(ref.at[cells[:, None], genes[None, :]], mask=inside, other=0.0).astype(jnp.float32)
