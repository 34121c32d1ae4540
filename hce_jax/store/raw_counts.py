"""Which matrix of an h5ad file has the raw counts."""

import dataclasses
from collections.abc import Mapping

import h5py
import numpy as np

from hce_jax.errors import SourceError
from hce_jax.store.matrices import Place, kind_of

#: Raw counts of hardly a cell stay below this, normalised values of every cell do.
LARGEST_NORMALIZED = 20
#: Values, those of some hundred cells, that tell whether a matrix has raw counts.
_LOOKED_AT = 1 << 18


def find_raw_counts(name: str, file: h5py.File, places: Mapping[str, Place]) -> tuple[str, str]:
    """Find the matrix with raw counts: the first of raw, X, the layer "counts" and the others that looks like it.

    That is one of whole numbers that are not negative; where there is none, one whose values are too large for
    normalised ones, as programs that take ambient RNA away leave them; else one of zeros. The first values of a matrix
    decide.

    Parameters
    ----------
    name
        What to call the file.
    file
        The file.
    places
        Its :func:`matrices_of`, at least one.

    Returns
    -------
    The name of the matrix; and, for a person, how it was found, empty where there was no choice.

    Raises
    ------
    SourceError
        If there is none, saying what was seen in each.

    Examples
    --------
    >>> import io
    >>> from hce_jax.store.matrices import matrices_of
    >>> file = h5py.File(io.BytesIO(), "w")
    >>> file["X"], file["layers/counts"] = np.array([[0.7, 1.1]]), np.array([[1, 2]])
    >>> find_raw_counts("study.h5ad", file, matrices_of(file))
    ('counts', 'raw counts taken from layers/counts (X: not whole numbers, 0 to 1.1)')
    """
    first = [each for each in ("raw", "X", "counts") if each in places]
    seen: dict[str, _Values] = {}
    for each in [*first, *(other for other in places if other not in first)]:
        seen[each] = _Values.of(file[places[each].matrix])
        if seen[each].are_counts:
            found = each
            break
    else:
        others = [each for each, values in seen.items() if values.may_be_counts]
        found = next(iter(others + [each for each, values in seen.items() if values.are_zeros]), "")
    looked_at = "; ".join(f"{places[each]}: {values}" for each, values in seen.items() if each != found)
    if not found:
        raise SourceError(
            f"{name} has no raw counts; looked in {looked_at}; get them from those who made the file, or name the "
            "matrix that is to be taken for raw counts (--counts)"
        )
    not_seen = ", ".join(str(place) for each, place in places.items() if each not in seen)
    notes = [*filter(None, [looked_at, not_seen and f"not looked at: {not_seen}"])]
    return found, f"raw counts taken from {places[found]} ({'; '.join(notes)})" if notes else ""


@dataclasses.dataclass(frozen=True)
class _Values:
    """What the first values of a matrix look like.

    Attributes
    ----------
    numbers
        They are numbers.
    whole
        All are whole numbers.
    lowest, highest
        The smallest and largest, 0 among them; NaN if one is NaN.
    """

    numbers: bool
    whole: bool = False
    lowest: float = 0.0
    highest: float = 0.0

    @staticmethod
    def of(matrix: h5py.Group | h5py.Dataset) -> "_Values":
        """Look at those of the first cells; where a matrix is kept by gene, of the first genes."""
        dense = kind_of(matrix) == "dense"
        values = matrix[: _LOOKED_AT // max(matrix.shape[1], 1) + 1] if dense else matrix["data"][:_LOOKED_AT]
        if values.dtype.kind not in "biuf":
            return _Values(numbers=False)
        whole = bool((values == np.rint(values)).all())
        return _Values(True, whole, float(values.min(initial=0)), float(values.max(initial=0)))

    @property
    def are_counts(self) -> bool:
        """They are whole numbers and not negative, and not all 0, which says nothing."""
        return self.numbers and self.whole and 0 <= self.lowest and 0 < self.highest < np.inf

    @property
    def are_zeros(self) -> bool:
        """They are all 0, or there are none."""
        return self.numbers and self.lowest == self.highest == 0

    @property
    def may_be_counts(self) -> bool:
        """They are not negative, and too large for normalised values."""
        return self.numbers and 0 <= self.lowest and LARGEST_NORMALIZED <= self.highest < np.inf

    def __str__(self) -> str:
        if not self.numbers:
            return "no numbers"
        if self.are_zeros:
            return "only zeros"
        if not np.isfinite([self.lowest, self.highest]).all():
            return "values that are not finite"
        return f"{'' if self.whole else 'not '}whole numbers, {self.lowest:.3g} to {self.highest:.3g}"
