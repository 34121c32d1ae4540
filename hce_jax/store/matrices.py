"""The matrices of cells x genes in an h5ad or zarr file, and their cells, some at a time."""

import itertools
import sys
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy import sparse

from hce_jax.errors import SourceError
from hce_jax.store.anndata_file import Array, Group

#: Values read at a time: some 2,000 cells, 32 MB.
_VALUES_AT_A_TIME = 1 << 22
#: Cells are read in one go when no more values lie between them: reading these costs less than finding a new place.
_GAP = 1 << 15


class Place(NamedTuple):
    """Where a matrix lies in its file, and the table of its genes."""

    matrix: str
    var: str

    def __str__(self) -> str:
        return "raw" if self.matrix == "raw/X" else self.matrix


def matrices_of(file: Group) -> dict[str, Place]:
    """Find the matrices of a file by name: layers, X and raw.

    Examples
    --------
    >>> matrices_of(h5py.File("study.h5ad"))  # doctest: +SKIP
    {'X': Place(matrix='X', var='var'), 'raw': Place(matrix='raw/X', var='raw/var')}
    """
    layers = file["layers"] if "layers" in file else ()
    places = {name: Place(f"layers/{name}", "var") for name in layers}
    for name, place in (("X", Place("X", "var")), ("raw", Place("raw/X", "raw/var"))):
        if place.matrix in file:
            places[name] = place
    return {name: place for name, place in places.items() if kind_of(file[place.matrix]) is not None}


def kind_of(matrix: Group | Array) -> str | None:
    """Tell how a matrix is kept: by cell ("csr"), by gene ("csc"), in full ("dense"); None if it is none.

    Examples
    --------
    >>> import io, h5py
    >>> kind_of(h5py.File(io.BytesIO(), "w").create_dataset("X", data=np.eye(2)))
    'dense'
    """
    if isinstance(matrix, Array):
        return "dense" if matrix.ndim == 2 else None
    return {"csr_matrix": "csr", "csc_matrix": "csc"}.get(matrix.attrs.get("encoding-type"))


def has_numbers(matrix: Group | Array) -> bool:
    """Tell whether the values of a matrix are numbers.

    Examples
    --------
    >>> import io, h5py
    >>> has_numbers(h5py.File(io.BytesIO(), "w").create_dataset("X", data=[[b"a word"]]))
    False
    """
    return (matrix if isinstance(matrix, Array) else matrix["data"]).dtype.kind in "biuf"


class RowReader:
    """Reads cells of one matrix of a file, as they are stored; safe to use from several threads.

    A matrix kept by gene, in which one cell cannot be found without reading all, is read whole when the first cell is
    asked for, and kept; which is said on stderr.

    Attributes
    ----------
    title
        What to call the file.
    name
        What to call the matrix.
    kind
        As :func:`kind_of` tells it.
    shape
        Numbers of cells and of genes.

    Examples
    --------
    >>> import io, h5py
    >>> matrix = h5py.File(io.BytesIO(), "w").create_dataset("X", data=np.eye(3))
    >>> (part,) = RowReader("cells.h5ad", "X", "dense", (3, 3)).parts(matrix, np.array([1]))
    >>> part.toarray()
    array([[0., 1., 0.]])
    """

    def __init__(self, title: str, name: str, kind: str, shape: tuple[int, int]):
        self.title, self.name, self.kind, self.shape = title, name, kind, shape
        self._lock = threading.Lock()
        self._whole: sparse.csr_array | None = None

    @classmethod
    def of(cls, title: str, name: str, matrix: Group | Array, n_cells: int, n_genes: int) -> "RowReader":
        """Make one for a matrix as anndata writes it.

        Raises
        ------
        SourceError
            If the matrix has not as many cells and genes as obs and var.
        """
        kind = kind_of(matrix) or ""
        shape_of = matrix.shape if kind == "dense" else matrix.attrs["shape"]
        reader = cls(title, name, kind, (int(shape_of[0]), int(shape_of[1])))
        reader.check(n_cells, n_genes)
        return reader

    def check(self, n_cells: int, n_genes: int) -> None:
        """Raise a SourceError if the matrix has not as many cells and genes as obs and var."""
        if self.shape != (n_cells, n_genes):
            raise SourceError(
                f"{self.title} is damaged: {self.name} has {self.shape[0]:,} cells and {self.shape[1]:,} genes, but "
                f"obs has {n_cells:,} and var {n_genes:,}"
            )

    def parts(self, matrix: Group | Array, rows: np.ndarray) -> Iterator[sparse.csr_array]:
        """Read some cells, some at a time.

        Parameters
        ----------
        matrix
            The matrix, in the open file.
        rows
            Which cells, (n,), ascending, at least one.

        Yields
        ------
        csr_array
            The values of the next cells, (k, t), of the stored type; genes in any order, some perhaps twice.
        """
        if self.kind == "csr":
            return _parts_of_csr(matrix, rows, self.shape[1])
        if self.kind == "dense":
            return parts_of_dense(matrix, rows)
        with self._lock:  # of several threads only one reads it
            if self._whole is None:
                self._whole = self._read_by_gene(matrix)
        return iter([self._whole[rows]])

    def _read_by_gene(self, matrix: Group) -> sparse.csr_array:
        print(f"{self.title} keeps {self.name} by gene (CSC): all of it is read into memory", file=sys.stderr)
        values = (matrix["data"][:], matrix["indices"][:], matrix["indptr"][:])
        by_gene = sparse.csc_array(values, shape=self.shape)
        by_gene.check_format()  # else a damaged one may end the process
        return sparse.csr_array(by_gene)


def _stretches(start_n: np.ndarray, stop_n: np.ndarray) -> list[slice]:
    """Cut cells, given the places of their first and past their last values, into stretches to be read in one go."""
    far = (start_n[1:] - stop_n[:-1] > _GAP) | (np.diff(start_n // _VALUES_AT_A_TIME) > 0)
    ends = [0, *(np.flatnonzero(far) + 1).tolist(), len(start_n)]
    return [slice(low, high) for low, high in itertools.pairwise(ends)]


def _parts_of_csr(matrix: Group, rows: np.ndarray, n_genes: int) -> Iterator[sparse.csr_array]:
    first = int(rows[0])
    ends = matrix["indptr"][first : int(rows[-1]) + 2].astype(np.int64)
    for stretch in _stretches(ends[rows - first], ends[rows - first + 1]):
        low, high = rows[stretch][0] - first, rows[stretch][-1] - first + 1
        start, stop = int(ends[low]), int(ends[high])
        values = (matrix["data"][start:stop], matrix["indices"][start:stop], ends[low : high + 1] - start)
        part = sparse.csr_array(values, shape=(high - low, n_genes))
        part.check_format()  # else a damaged one may end the process
        yield part if stretch.stop - stretch.start == high - low else part[rows[stretch] - first - low]


def parts_of_dense(matrix: Array | np.ndarray, rows: np.ndarray) -> Iterator[sparse.csr_array]:
    """Read cells of a matrix kept in full, in a file or in memory; see :meth:`RowReader.parts`.

    Examples
    --------
    >>> (part,) = parts_of_dense(np.eye(3), np.array([1]))
    >>> part.toarray()
    array([[0., 1., 0.]])
    """
    n_genes = matrix.shape[1]
    for stretch in _stretches(rows * n_genes, (rows + 1) * n_genes):
        low, high = int(rows[stretch][0]), int(rows[stretch][-1]) + 1
        yield sparse.csr_array(matrix[low:high][rows[stretch] - low])
