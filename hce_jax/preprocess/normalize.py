"""Size-factor log1p, the scale on which every model works. This is its only definition."""

from typing import TypeVar

import numpy as np
from scipy import sparse

from hce_jax.errors import UserError

#: Every cell is scaled to this many counts.
COUNTS_PER_CELL = 10_000.0

Counts = TypeVar("Counts", np.ndarray, sparse.sparray, sparse.spmatrix)


def normalize_log1p(counts: Counts) -> Counts:
    """Scale each cell to 10,000 counts and take ln(1 + x).

    ``y_ng = ln(1 + 10_000 * x_ng / max(sum_g x_ng, 1 if the cell is empty))``: an empty cell stays zero. The total is
    that of the genes given, so select genes first. Computed in float64 and rounded to float32 once.

    Parameters
    ----------
    counts
        Counts, (cells, genes), of any real type: a numpy array or a scipy CSR array or matrix. Not changed.

    Returns
    -------
    ndarray, csr_array or csr_matrix
        The normalised values, float32, in the kind of container that was given.

    Raises
    ------
    UserError
        If a count is negative or not finite, or the sparse format is not CSR.

    Notes
    -----
    The normalisation of scTab (Fischer et al., Nat Commun 2024), on which the published models were trained.

    Examples
    --------
    >>> normalize_log1p(np.array([[3, 1, 0], [0, 0, 0]])).round(3)
    array([[8.923, 7.824, 0.   ],
           [0.   , 0.   , 0.   ]], dtype=float32)
    """
    if sparse.issparse(counts):
        return _normalize_csr(counts)
    values_ng = np.asarray(counts, dtype=np.float64)
    _check(values_ng)
    return np.log1p(values_ng * _scale(values_ng.sum(axis=1))[:, None]).astype(np.float32)


def _normalize_csr(counts: sparse.sparray | sparse.spmatrix) -> sparse.sparray | sparse.spmatrix:
    if counts.format != "csr":
        raise UserError(
            f"the counts are a sparse matrix in {counts.format} format, expected csr; convert with .tocsr()"
        )
    result = counts.astype(np.float64)  # a copy
    result.sum_duplicates()  # ln(1 + a) + ln(1 + b) is not ln(1 + a + b)
    _check(result.data)
    scale_n = _scale(np.asarray(result.sum(axis=1)).ravel())
    result.data = np.log1p(result.data * np.repeat(scale_n, np.diff(result.indptr))).astype(np.float32)
    return result


def _scale(total_n: np.ndarray) -> np.ndarray:
    return COUNTS_PER_CELL / np.where(total_n == 0, 1.0, total_n)


def _check(values: np.ndarray) -> None:
    usable = np.isfinite(values) & (values >= 0)
    if not usable.all():
        raise UserError(
            f"{np.count_nonzero(~usable):,} of the given counts are negative or not finite (first: "
            f"{values[~usable][0]:g}); give raw counts, not scaled or centred values"
        )
