"""On which scale values are, and how they go back to what is proportional to a cell's counts.

A model sees ln(1 + 10,000 c_g / sum_g c_g) of its own genes, so the counts c of a cell are needed up to a factor s
only. Values s c, log_b(1 + s c) with any base, and the latter taken twice, are brought back exactly; scaled (centred),
regressed, imputed or corrected values are not.

What a matrix has is found from some of its cells. Counts are whole numbers, so what was made of them is, once the right
logarithm is undone, a whole multiple of one value in each cell. Where values are no multiples, such as TPM, the right
logarithm is the one that leaves the same total in every cell. What most cells are is what the matrix is; a cell that
is surely something else, among those looked at or read later, is refused.
"""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Literal

import numpy as np
from scipy import sparse

from hce_jax.errors import SourceError

#: Values on a log scale stay below this: ln(1 + x) of the largest share of 100 million; counts of hardly a cell do.
LARGEST_LOGARITHM = 20.0

#: The largest logarithms of half of the cells differ by less: log2 of a factor of 4.
_LOGARITHMS_DIFFER = 2.0

#: Cells that tell the scale; more do not tell more.
_LOOKED_AT = 128
#: Values other than the smallest of their cell that must tell whether they are multiples.
_MIN_TELLING = 10
#: Fewer cells than this share say nothing of the others.
_HARDLY_ANY = 0.05
#: The logarithms that may have been taken, the first taken first: of one base, none, or twice.
_LOGARITHMS = (), (np.e,), (2.0,), (10.0,), (np.e, np.e)
#: A cell is on another scale if its values would be multiples there by accident with less than this chance.
_ACCIDENT = 1e-9
#: Values of a cell that are asked whether it is on another scale: few, which rule out most, and then more.
_ASKED = 16, 256
#: The smallest value of a cell may stand for up to so many counts.
_LARGEST_SMALLEST = 8
#: What float32 leaves uncertain of a value, relatively: a few roundings of 6e-8.
_ROUNDING = 5e-7
#: Totals of cells are the same when 9 of 10 differ by less: values rounded to 3 decimals, genes of few cells left out.
_SAME_TOTAL = 5e-3
#: No matrix of so many genes of single cells has fewer zeros than this share, unless they were filled in.
_FEWEST_ZEROS, _MANY_GENES = 0.25, 1000
#: Values worked on at a time: they stay in a core's cache.
_VALUES_AT_A_TIME = 1 << 16


@dataclasses.dataclass(frozen=True)
class Scale:
    """What the values of a matrix are; see :func:`recognise`.

    Attributes
    ----------
    what
        For a person: what they are.
    where
        The matrix and its file, for a message.
    kind
        "counts": whole numbers as stored. "multiples": the counts can be found, as whole multiples of one value in each
        cell. "proportional": values proportional to the counts can.
    bases
        Of the logarithms that were taken, the first taken first.
    step
        The values are rounded to multiples of it; 0: to float32.
    """

    what: str
    where: str
    kind: Literal["counts", "multiples", "proportional"]
    bases: tuple[float, ...] = ()
    step: float = 0.0

    @property
    def words(self) -> str:
        """For a person: what they are and what is done with them."""
        if self.kind == "multiples":
            return f"{self.what}, taken back to whole counts"
        return f"{self.what}, taken back to what is proportional to counts" if self.bases else self.what

    def to_counts(self, values: sparse.csr_array) -> sparse.csr_array:
        """Bring values (n, t) to what is proportional to the counts of each cell, float32; the counts where possible.

        The counts of a cell may have lost a common factor. A cell whose values are no multiples (of another study, say)
        keeps them with the logarithms undone.

        Parameters
        ----------
        values
            Of any cells of the matrix, (n, t) float32. Not changed.

        Raises
        ------
        SourceError
            If a value is negative or not finite, or cells are surely on another scale.

        Examples
        --------
        >>> raw = sparse.csr_array([[3.0, 0, 1, 2], [0, 10, 4, 1]])
        >>> scale = Scale("ln(1 + x)", "X", "multiples", (np.e,))
        >>> scale.to_counts(np.log1p(raw * 0.3)).toarray()
        array([[ 3.,  0.,  1.,  2.],
               [ 0., 10.,  4.,  1.]], dtype=float32)
        """
        given = _without_zeros(values)
        if not (given.data.min(initial=0) >= 0 and given.data.max(initial=0) < np.inf):  # so that NaN is caught
            bad = given.data[~(np.isfinite(given.data) & (given.data >= 0))]
            raise SourceError(
                f"{self.where}: {len(bad):,} values are negative or not finite (first: {bad[0]:g}), where those looked "
                f"at first are {self.what}; give raw counts, or leave such cells out"
            )
        result, n_others = self.undone(given)
        if n_others:
            raise SourceError(
                f"{self.where}: {n_others:,} of {given.shape[0]:,} cells read together are on another scale than "
                f"those looked at first, {self.what}; give one matrix in which all cells are on one scale"
            )
        return result

    def undone(self, given: sparse.csr_array) -> tuple[sparse.csr_array, int]:
        """Return what :meth:`to_counts` does of positive values, and how many cells are surely on another scale."""
        lengths_n = np.diff(given.indptr)
        lengths_n = lengths_n[lengths_n > 0]
        if self.kind == "counts":
            return given, int(np.count_nonzero(~_are_whole(given.data, lengths_n)))
        ends_n = np.cumsum(lengths_n)
        result = np.empty_like(given.data)
        first = n_others = 0
        while first < len(lengths_n):  # some cells at a time, at least one
            start = ends_n[first] - lengths_n[first]
            last = max(first + 1, int(np.searchsorted(ends_n, start + _VALUES_AT_A_TIME, "right")))
            part = slice(int(start), int(ends_n[last - 1]))
            result[part], others_n = self._undone(given.data[part].astype(np.float64), lengths_n[first:last])
            n_others += int(np.count_nonzero(others_n))
            first = last
        return sparse.csr_array((result, given.indices, given.indptr), given.shape), n_others

    def _undone(self, values: np.ndarray, lengths_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        result, fits_n = _undo(values, self.bases), np.zeros(len(lengths_n), bool)
        if self.kind == "multiples":
            uncertainty_n = _uncertainty(values, lengths_n, self.bases, self.step)
            result, fits_n = _whole_multiples(result, lengths_n, uncertainty_n)
        others_n = np.maximum.reduceat(values, _starts(lengths_n)) > _highest(self.bases)
        if self.bases:  # whole numbers can fit logarithms where there are few
            fits_n &= ~_are_whole(values, lengths_n)
        asked = np.flatnonzero(~fits_n & ~others_n)
        for n_asked, chance in zip(_ASKED, (1.0, _ACCIDENT), strict=True):
            if len(asked):
                some = _some_values(values, lengths_n, asked, n_asked)
                asked = asked[_on_another_scale(*some, self.bases, self.step, chance)]
        others_n[asked] = True
        return result, others_n


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which matrix is taken, of those there are; see :func:`choose_matrix`.

    Attributes
    ----------
    name
        Its name.
    scale
        What its values are.
    notes
        For a person: what was seen in each of the others.
    """

    name: str
    scale: Scale
    notes: tuple[str, ...] = ()


def recognise(sample: sparse.csr_array, where: str, log1p_base: float | None = None) -> Scale:
    """Find out from some cells what the values of a matrix are.

    Parameters
    ----------
    sample
        The values of some hundred cells, best from all over the file, (n, t).
    where
        What to call the matrix in a message, e.g. "X of pbmc.h5ad".
    log1p_base
        The base of logarithms that the file states, if it states one. What the values themselves tell goes before.

    Raises
    ------
    SourceError
        If counts do not follow from the values, even up to a factor of each cell, or one cannot tell.

    Notes
    -----
    In this order: whole numbers are raw counts; multiples of one value in each cell are counts scaled cell by cell,
    with or without a logarithm; without multiples, a total that is the same in all cells tells the logarithm; else
    values too large for a logarithm are taken as proportional to counts, as programs that take ambient RNA away leave
    them; else, where a cell has too few values to tell, the file's own word is taken. Most cells decide. Cells that do
    not fit are taken too, but none that is surely on another scale: where one value cannot be on this one, where whole
    numbers lie among logarithms or others among counts, or where values are multiples on another scale.

    Examples
    --------
    >>> counts = np.arange(75).reshape(5, 15) % 11
    >>> recognise(sparse.csr_array(np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)), "X").words
    'ln(1 + x) of counts scaled to 10,000 per cell, taken back to whole counts'
    >>> recognise(sparse.csr_array(counts - 5.5), "X")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    hce_jax.errors.SourceError: X: negative values, -5.5 to 4.5, as scaling and regression leave them; give raw ...
    """
    found = _recognise(sample, where, log1p_base)
    if isinstance(found, str):
        raise SourceError(f"{where}: {found}; give raw counts, or log1p values of them")
    return found


def choose_matrix(samples: Mapping[str, sparse.csr_array], title: str, log1p_base: float | None = None) -> Choice:
    """Choose the matrix from which counts follow best.

    Matrices with the counts go before those with values proportional to them; of these, those of more genes (``raw``
    often has all where X has the variable ones), then counts as stored, then in the order raw, X, the layer "counts",
    others.

    Parameters
    ----------
    samples
        The values of some hundred cells of each matrix by name: "raw", "X", and layers; (n, t), each with its own t.
    title
        What to call the file in a message.
    log1p_base
        See :func:`recognise`.

    Raises
    ------
    SourceError
        If counts follow from none, saying what was seen in each.

    Examples
    --------
    >>> scaled, counts = sparse.csr_array([[-1.2, 3.4]]), sparse.csr_array([[0.0, 5.0]])
    >>> choice = choose_matrix({"X": scaled, "counts": counts}, "study.h5ad")
    >>> choice.name, choice.scale.words, choice.notes
    ('counts', 'raw counts', ('X: negative values, -1.2 to 3.4, as scaling and regression leave them',))
    """
    first = [name for name in ("raw", "X", "counts") if name in samples]
    order = [*first, *(name for name in samples if name not in first)]
    seen = {name: _recognise(samples[name], f"{_place(name)} of {title}", log1p_base) for name in order}
    usable = {name: scale for name, scale in seen.items() if isinstance(scale, Scale)}
    if not usable:
        looked_at = "; ".join(f"{_place(name)}: {words}" for name, words in seen.items())
        raise SourceError(
            f"{title} has no counts, and no values from which they follow; looked in {looked_at or 'vain'}; give a "
            "file with raw counts or log1p values of them, or name another matrix (--counts NAME)"
        )

    def rank(name: str) -> tuple[bool, int, bool]:
        kind = usable[name].kind
        return kind != "proportional", samples[name].shape[1], kind == "counts"

    best = max(usable, key=rank)  # the first of equals
    words = {name: scale.words if isinstance(scale, Scale) else scale for name, scale in seen.items() if name != best}
    return Choice(best, usable[best], tuple(f"{_place(name)}: {each}" for name, each in words.items()))


def _place(name: str) -> str:
    return name if name in ("raw", "X") else f"layers/{name}"


def _recognise(sample: sparse.csr_array, where: str, log1p_base: float | None) -> Scale | str:
    """Return the scale, or in words what the values are instead."""
    given = _without_zeros(sample)
    data = given.data
    if unusable := _unusable(data):
        return unusable
    if (data == np.rint(data)).all():
        what = "raw counts" if data.max() > 1 else "zeros and ones, which say what is expressed and not how much"
        return Scale(what, where, "counts")
    filled = np.flatnonzero(np.diff(given.indptr))
    looked_at = given[filled[np.unique(np.linspace(0, len(filled) - 1, _LOOKED_AT).astype(np.int64))]]
    seen = _Seen(looked_at.data.astype(np.float64), np.diff(looked_at.indptr), _step(data))
    found = seen.from_multiples(where, log1p_base) or seen.without_multiples(given, where, log1p_base)
    if isinstance(found, Scale) and (n_others := found.undone(given)[1]):
        return _different_scales(n_others, len(filled), found.what)
    return found


def _different_scales(n_others: int, n_cells: int, what: str) -> str:
    return (
        f"cells on different scales, {n_others:,} of {n_cells:,} on another than the others ({what}), where all cells "
        "of one matrix must be on one scale"
    )


def _without_zeros(values: sparse.csr_array) -> sparse.csr_array:
    result = sparse.csr_array(values, dtype=np.float32)
    if not result.data.all():
        result = result.copy()
        result.eliminate_zeros()
    return result


def _unusable(data: np.ndarray) -> str:
    """Say what makes values useless by themselves, or nothing."""
    if not len(data):
        return "only zeros"
    if n_bad := np.count_nonzero(~np.isfinite(data)):
        return f"{n_bad:,} of the values looked at are not finite (NaN or infinite)"
    if data.min() < 0:
        return f"negative values, {data.min():.3g} to {data.max():.3g}, as scaling and regression leave them"
    return ""


def _step(data: np.ndarray) -> float:
    """Return the step of values that were rounded to some decimals, or 0."""
    for decimals in range(2, 6):
        if np.spacing(data.min()) > 0.1 * 10.0**-decimals:  # float32 itself has about such steps
            return 0.0
        if np.array_equal(np.round(data.astype(np.float64), decimals).astype(np.float32), data):
            return 10.0**-decimals
    return 0.0


@dataclasses.dataclass(frozen=True)
class _Seen:
    """The values of some cells, none of them 0, and what they tell of their scale.

    Attributes
    ----------
    values
        Those of one cell after the other, float64.
    lengths_n
        How many each cell has, at least one.
    step
        See :attr:`Scale.step`.
    """

    values: np.ndarray
    lengths_n: np.ndarray
    step: float

    def from_multiples(self, where: str, log1p_base: float | None) -> Scale | str | None:
        """Return the scale on which most cells have multiples, if there is one, or say that cells are on several."""
        bases = max(_bases(log1p_base), key=lambda each: self.share(self.fitting(each), each))
        what, fits_n = self.describe(bases), self.fitting(bases)
        if not bases:
            are_whole_n = _are_whole(self.values, self.lengths_n)
            if are_whole_n.mean() >= 0.5:
                return Scale("raw counts", where, "counts")
            # Cells without multiples may be of a study whose values never were such; but not if they are small where
            # those of the others are no logarithms.
            small_n = (self.highest_n < LARGEST_LOGARITHM) & ~self.multiples(bases)[1]
            if min(self.share(fits_n & ~are_whole_n, bases), self.share(small_n, bases)) > _HARDLY_ANY:
                return _different_scales(int(np.count_nonzero(small_n)), len(small_n), what)
        share = self.share(fits_n, bases)
        if share < 0.5:
            return None
        what += f" (in {share:.0%} of cells)" if share < 1 - _HARDLY_ANY else ""
        return Scale(what, where, "multiples", bases, self.step)

    def without_multiples(self, sample: sparse.csr_array, where: str, log1p_base: float | None) -> Scale | str:
        """Return the scale of values that are no multiples, or what they look like."""
        n_cells, n_genes = sample.shape
        looks = f"not whole numbers, {sample.data.min():.3g} to {sample.data.max():.3g}"
        if n_genes >= _MANY_GENES and sample.nnz > (1 - _FEWEST_ZEROS) * n_cells * n_genes:
            return f"{looks}, hardly any of them 0, as imputation and correction leave them"
        bases = min(_bases(log1p_base), key=self.spread_of_totals)
        if self.spread_of_totals(bases) < _SAME_TOTAL:
            return Scale(f"{_logarithms(bases)}values scaled {self.scaled(bases)}", where, "proportional", bases)
        squares = dataclasses.replace(self, values=self.values**2)
        if squares.share(squares.fitting(()), ()) > 0.5:
            return f"{looks}, square roots of counts"
        if self.too_large_for_logarithms:
            what = "counts that are not whole numbers, as taking ambient RNA away leaves them"
            return Scale(what, where, "proportional")
        stated = _stated(log1p_base)
        if stated and self.undoable(stated).all() and np.count_nonzero(self.telling(stated)) < _MIN_TELLING:
            return Scale(f"{_logarithms(stated)}values, as the file states", where, "proportional", stated)
        return f"{looks}, neither multiples of one value in each cell nor of one total in all cells"

    @cached_property
    def highest_n(self) -> np.ndarray:
        """The largest value of each cell, (n,)."""
        return np.maximum.reduceat(self.values, _starts(self.lengths_n))

    @property
    def too_large_for_logarithms(self) -> bool:
        """Whether the values of most cells are, by the largest of each.

        The largest logarithms of two cells differ little, while largest counts differ as the sizes of the cells do, so
        some of them may be small.
        """
        middle, nearly_largest = np.quantile(self.highest_n, [0.5, 1 - _HARDLY_ANY])
        differ = np.median(np.abs(self.highest_n - middle)) > _LOGARITHMS_DIFFER
        return bool(middle >= LARGEST_LOGARITHM or (nearly_largest >= LARGEST_LOGARITHM and differ))

    def undoable(self, bases: tuple[float, ...]) -> np.ndarray:
        """Return in which cells these logarithms may have been taken, (n,) bool."""
        return self.highest_n <= _highest(bases)

    def multiples(self, bases: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return the counts, and which cells have some, (n,) bool."""
        uncertainty_n = _uncertainty(self.values, self.lengths_n, bases, self.step)
        counts, fits_n = _whole_multiples(_undo(self.values, bases), self.lengths_n, uncertainty_n)
        return counts, fits_n & self.undoable(bases)

    def describe(self, bases: tuple[float, ...]) -> str:
        """Say what values are that are multiples once these logarithms are undone."""
        x, counts = _undo(self.values, bases), self.multiples(bases)[0]
        unscaled = np.mean(np.abs(x - counts) < 0.01 * counts) > 0.9
        what = _logarithms(bases) + ("raw counts" if unscaled else f"counts scaled {self.scaled(bases)}")
        return f"{what}, rounded to {self.step:g}" if self.step else what

    def telling(self, bases: tuple[float, ...]) -> np.ndarray:
        """Return which values would tell whether they are multiples.

        A value tells when it is not the smallest of its cell, and multiples differ by much more than it is uncertain.
        """
        x = _undo(self.values, bases)
        ratio = x / np.repeat(np.minimum.reduceat(x, _starts(self.lengths_n)), self.lengths_n)
        uncertainty_n = _uncertainty(self.values, self.lengths_n, bases, self.step)
        return (ratio > 1.5) & (ratio * np.repeat(uncertainty_n, self.lengths_n) < 0.05)

    def fitting(self, bases: tuple[float, ...]) -> np.ndarray:
        """Return which of the cells that tell have multiples, (n,) bool; none if too few values tell."""
        tells = self.telling(bases)
        if np.count_nonzero(tells) < _MIN_TELLING:
            return np.zeros(len(self.lengths_n), bool)
        return np.logical_or.reduceat(tells, _starts(self.lengths_n)) & self.multiples(bases)[1]

    def share(self, cells_n: np.ndarray, bases: tuple[float, ...]) -> float:
        """Return the share that some cells, (n,) bool, have of those that tell or cannot be on this scale."""
        tells_n = np.logical_or.reduceat(self.telling(bases), _starts(self.lengths_n)) | ~self.undoable(bases)
        return int(np.count_nonzero(cells_n & tells_n)) / max(int(np.count_nonzero(tells_n)), 1)

    def spread_of_totals(self, bases: tuple[float, ...]) -> float:
        """Return by how much the totals of 9 of 10 cells differ at most, as a share; infinite if few cells tell."""
        total_n = self.totals(bases)
        if len(total_n) < 5 or self.undoable(bases).mean() < 0.9:
            return np.inf
        return float(np.quantile(np.abs(total_n / np.median(total_n) - 1), 0.9))

    def totals(self, bases: tuple[float, ...]) -> np.ndarray:
        """Return the total of each cell that has at least 3 values: one value, or two, may have any."""
        total_n = np.add.reduceat(_undo(self.values, bases), _starts(self.lengths_n))
        return total_n[self.lengths_n >= 3]

    def scaled(self, bases: tuple[float, ...]) -> str:
        """Say to which total the cells were scaled."""
        if self.spread_of_totals(bases) >= _SAME_TOTAL:
            return "cell by cell"
        total = np.median(self.totals(bases))
        return f"to {total:,.0f} per cell" if total >= 10 else f"to {total:.3g} per cell"


def _logarithms(bases: tuple[float, ...]) -> str:
    if not bases:
        return ""
    name = "ln" if bases[0] == np.e else f"log{bases[0]:g}"
    return f"{name}(1 + x){', taken twice,' if len(bases) > 1 else ''} of "


def _stated(log1p_base: float | None) -> tuple[float, ...]:
    return (float(log1p_base),) if log1p_base and log1p_base > 1 else ()


def _bases(log1p_base: float | None) -> list[tuple[float, ...]]:
    """Return which logarithms may have been taken; the base that the file states is among them."""
    return [*dict.fromkeys([*_LOGARITHMS, _stated(log1p_base)])]


def _highest(bases: tuple[float, ...]) -> float:
    """Return the largest value that there may be once these logarithms are taken."""
    highest = np.inf
    for base in bases:
        highest = min(LARGEST_LOGARITHM, np.log1p(highest)) / np.log(base)
    return highest


def _undo(values: np.ndarray, bases: tuple[float, ...]) -> np.ndarray:
    values = np.minimum(values, _highest(bases))  # beyond, nothing follows from them
    for base in reversed(bases):
        values = np.expm1(values * np.log(base))
    return values


def _are_whole(values: np.ndarray, lengths_n: np.ndarray) -> np.ndarray:
    """Return which cells have whole numbers only, (n,) bool."""
    return np.logical_and.reduceat(values == np.rint(values), _starts(lengths_n)) if len(values) else lengths_n > 0


def _some_values(
    values: np.ndarray, lengths_n: np.ndarray, cells: np.ndarray, n_asked: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return some values of some cells, the smallest of each among them, and how many of each."""
    starts_k, of_k = _starts(lengths_n)[cells], lengths_n[cells]
    smallest_k = np.minimum.reduceat(values, _starts(lengths_n))[cells]
    asked_k = np.minimum(of_k, n_asked)
    turn = np.arange(asked_k.sum()) - np.repeat(_starts(asked_k), asked_k)
    spread = np.repeat(starts_k, asked_k) + turn * np.repeat(of_k, asked_k) // np.repeat(asked_k, asked_k)
    return np.insert(values[spread], _starts(asked_k), smallest_k), asked_k + 1


def _on_another_scale(
    values: np.ndarray, lengths_n: np.ndarray, bases: tuple[float, ...], step: float, chance: float
) -> np.ndarray:
    """Return which cells that do not fit a scale are on another, by accident with this chance at most, (n,) bool.

    They have whole numbers where the scale is logarithms, or multiples on another scale and not on this.
    """
    starts_n = _starts(lengths_n)
    differ_n = np.maximum.reduceat(values, starts_n) > np.minimum.reduceat(values, starts_n)
    others_n = _are_whole(values, lengths_n) & (differ_n | (chance == 1)) if bases else np.zeros(len(lengths_n), bool)
    for other in _LOGARITHMS:
        if other != bases:
            others_n |= _accident(values, lengths_n, other, step) <= chance
    return others_n if chance == 1 else others_n & (_accident(values, lengths_n, bases, step) >= 1)


def _accident(values: np.ndarray, lengths_n: np.ndarray, bases: tuple[float, ...], step: float) -> np.ndarray:
    """Bound the chance that any values of the cells would be multiples as these are, (n,); infinite where none."""
    starts_n = _starts(lengths_n)
    uncertainty_n = _uncertainty(values, lengths_n, bases, step)
    counts, fits_n = _whole_multiples(_undo(values, bases), lengths_n, uncertainty_n)
    cell = np.repeat(np.arange(len(lengths_n)), lengths_n)
    order = np.lexsort((counts, cell))
    ratio = counts[order] / np.repeat(np.minimum.reduceat(counts, starts_n), lengths_n)
    # Of a value that is so many times the smallest, this share of all that it may be is as near to a multiple.
    chance = np.minimum(2 * _LARGEST_SMALLEST * ratio * np.repeat(uncertainty_n, lengths_n), 1)
    chance[np.diff(counts[order], prepend=-1) == 0] = 1  # the same again
    chance[starts_n] = 1
    fits_n &= np.maximum.reduceat(values, starts_n) <= _highest(bases)
    return np.where(fits_n, np.multiply.reduceat(chance, starts_n), np.inf)


def _starts(lengths_n: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths_n) - lengths_n


def _uncertainty(values: np.ndarray, lengths_n: np.ndarray, bases: tuple[float, ...], step: float) -> np.ndarray:
    """Bound by how much the ratio of a value of a cell to its smallest may be wrong, once logarithms are undone, (n,).

    Relatively; a value is the most uncertain where it is the smallest or the largest, depending on how it was rounded.
    """
    of_extreme = []
    for extreme in (np.minimum, np.maximum):
        value_n = extreme.reduceat(values, _starts(lengths_n))
        error_n = step / 2 + _ROUNDING * value_n
        x_n = _undo(value_n, bases)
        of_extreme.append((_undo(value_n + error_n, bases) - x_n) / x_n + _ROUNDING)
    return of_extreme[0] + np.maximum(*of_extreme)


def _whole_multiples(
    x: np.ndarray, lengths_n: np.ndarray, uncertainty_n: np.ndarray, smallest: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Return the whole numbers of which the values of a cell are multiples, and which cells (n,) have such.

    The smallest value of a cell stands for ``smallest`` or, if that does not fit, more; where nothing fits, the values
    stay.
    """
    starts_n = _starts(lengths_n)
    multiple = x / np.repeat(np.minimum.reduceat(x, starts_n) / smallest, lengths_n)
    whole = np.rint(multiple)
    off_n = np.maximum.reduceat(np.abs(multiple / whole - 1), starts_n)
    fits_n = off_n <= np.minimum(uncertainty_n, 0.05 / smallest)  # else any value is a multiple
    fits = np.repeat(fits_n, lengths_n)
    result = np.where(fits, whole, x)
    if smallest < _LARGEST_SMALLEST and not fits_n.all():
        others_n = ~fits_n
        result[~fits], fits_n[others_n] = _whole_multiples(
            x[~fits], lengths_n[others_n], uncertainty_n[others_n], smallest + 1
        )
    return result, fits_n
