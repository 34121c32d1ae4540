"""The cells that a user gives, whatever they are kept in."""

import abc
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import pandas as pd
import zarr
from anndata import AnnData
from anndata.abc import CSCDataset, CSRDataset
from scipy import sparse

from hce_jax.annotate.tenx import TENX_FILES, is_tenx_folder, read_tenx_folder, read_tenx_tables, tenx_group
from hce_jax.errors import SourceError
from hce_jax.store.anndata_file import Array, Group, modernized, read_columns, read_element, reading
from hce_jax.store.matrices import RowReader, has_numbers, matrices_of, parts_of_dense

#: What the names of pictures in obsm contain, the best first.
_PICTURES = ("umap", "tsne", "draw_graph", "pca")
#: What a zarr store has in its folder, of one version of the format or the other.
ZARR_MARKS = (".zgroup", "zarr.json")


class QueryMatrix(abc.ABC):
    """A matrix of cells x genes, read by rows; safe to use from several threads.

    Attributes
    ----------
    name
        What a person calls it: "X", "raw", or the name of a layer.
    n_cells
        Number of its rows.
    var
        What is known of its genes; the index is var_names (t,).
    """

    def __init__(self, name: str, n_cells: int, var: pd.DataFrame):
        self.name, self.n_cells, self.var = name, n_cells, var

    def rows(self, rows: slice | np.ndarray) -> sparse.csr_array:
        """Read some cells.

        Parameters
        ----------
        rows
            Which, as an index of an array of all cells; in the order of the file is fastest.

        Returns
        -------
        csr_array
            (k, t) float32 with sorted indices and no explicit zeros; the values as they are stored, unchecked.

        Raises
        ------
        SourceError
            If the file is damaged.
        IndexError
            If there is no such row.

        Examples
        --------
        >>> with open_query(AnnData(np.eye(3, dtype=np.float32))) as query:
        ...     query.matrices["X"].rows(slice(1, 3)).toarray()
        array([[0., 1., 0.],
               [0., 0., 1.]], dtype=float32)
        """
        wanted = np.arange(self.n_cells)[rows]
        ascending, place = np.unique(wanted, return_inverse=True)
        parts = [part.astype(np.float32, copy=False) for part in self._parts(ascending)] if len(ascending) else []
        empty = sparse.csr_array((0, len(self.var)), dtype=np.float32)
        read = parts[0] if len(parts) == 1 else sparse.vstack([empty, *parts], format="csr")
        if not np.array_equal(wanted, ascending):
            read = read[place]
        read.sum_duplicates()
        read.eliminate_zeros()
        return read

    @abc.abstractmethod
    def _parts(self, rows: np.ndarray) -> Iterator[sparse.csr_array]:
        """Read some cells, ascending, at least one, some at a time, in arrays of their own."""


class _StoredMatrix(QueryMatrix):
    """A matrix in a file."""

    def __init__(
        self, var: pd.DataFrame, reader: RowReader, matrix: Group | Array, where: Path | str, form: str = "h5ad"
    ):
        super().__init__(reader.name, reader.shape[0], var)
        self._reader, self._matrix, self._where, self._form = reader, matrix, where, form

    def _parts(self, rows: np.ndarray) -> Iterator[sparse.csr_array]:
        with reading(self._where, self._form):
            yield from self._reader.parts(self._matrix, rows)


class _MemoryMatrix(QueryMatrix):
    """A matrix in memory."""

    def __init__(self, name: str, var: pd.DataFrame, values: np.ndarray | sparse.sparray | sparse.spmatrix):
        super().__init__(name, values.shape[0], var)
        self._values, self._lock = values, threading.Lock()

    @cached_property
    def _by_cell(self) -> sparse.csr_array:
        return sparse.csr_array(self._values)

    def _parts(self, rows: np.ndarray) -> Iterator[sparse.csr_array]:
        if not sparse.issparse(self._values):
            return parts_of_dense(np.asarray(self._values), rows)
        with self._lock:  # of several threads only one turns it
            by_cell = self._by_cell
        return iter([by_cell[rows]])


class Query(abc.ABC):
    """The cells that a user gives; see :func:`open_query`. A context manager: it closes what it has opened.

    Attributes
    ----------
    title
        What to call them: the file's name, or "the given AnnData".
    path
        The file or folder, also of a backed AnnData; None for one in memory.
    n_cells
        Number of cells.
    barcodes
        The names of the cells, as text; no two are the same.
    matrices
        Matrices of numbers of cells x genes, by name, at least one.
    log1p_base
        The base of the logarithm that ``uns["log1p"]`` states; None where it states none.

    Raises
    ------
    SourceError
        If there are no cells, no genes or no matrix, or if two cells have the same barcode.
    """

    def __init__(self, title: str, path: Path | None, barcodes: pd.Index, matrices: Mapping[str, QueryMatrix]):
        self.title, self.path, self.barcodes, self.matrices = title, path, barcodes, dict(matrices)
        self.n_cells = len(barcodes)
        self.log1p_base: float | None = None
        if not self.n_cells:
            raise SourceError(f"{title} has no cells")
        if not self.matrices:
            raise SourceError(f"{title} has no matrix of numbers of cells x genes, neither X nor raw nor a layer")
        if not any(len(matrix.var) for matrix in self.matrices.values()):
            raise SourceError(f"{title} has no genes")
        if n_twice := (twice := barcodes.duplicated()).sum():
            raise SourceError(
                f"{title} has {n_twice:,} barcodes that occur twice (first: {barcodes[twice][0]}), but cells go by "
                "them; make them different (adata.obs_names_make_unique()) and write the file again"
            )

    @property
    @abc.abstractmethod
    def obs_columns(self) -> tuple[str, ...]:
        """The names of the columns of obs."""

    @abc.abstractmethod
    def _read_column(self, name: str) -> pd.Series:
        """Read a column of obs that is there."""

    @abc.abstractmethod
    def _embeddings(self) -> Mapping[str, Any]:
        """Return obsm, each in memory or not."""

    def obs_column(self, name: str) -> pd.Series:
        """Return a column of obs, (n,), by barcode.

        Raises
        ------
        SourceError
            If there is no such column, or the file is damaged.

        Examples
        --------
        >>> adata = AnnData(np.eye(2), pd.DataFrame({"leiden": [0, 1]}, index=["a", "b"]))
        >>> open_query(adata).obs_column("leiden").tolist()
        [0, 1]
        """
        if name not in self.obs_columns:
            has = ", ".join(self.obs_columns) or "none"
            raise SourceError(f"{self.title} has no column {name!r} in obs; its columns are {has}")
        return self._read_column(name).set_axis(self.barcodes)

    def picture(self) -> tuple[str, np.ndarray] | None:
        """Return a picture of the cells that is there: the key in obsm and its first two columns, (n, 2).

        UMAP before t-SNE before a drawn graph before principal components; None where there is none of these.

        Raises
        ------
        SourceError
            If it has another number of cells, or the file is damaged.

        Examples
        --------
        >>> adata = AnnData(np.eye(2), obsm={"X_pca": np.ones((2, 9)), "X_umap": np.zeros((2, 2))})
        >>> open_query(adata).picture()
        ('X_umap', array([[0., 0.],
               [0., 0.]]))
        """
        embeddings = self._embeddings()
        for key in (key for word in _PICTURES for key in embeddings if word in key.lower()):
            values = embeddings[key]
            if isinstance(values, np.ndarray | Array) and values.ndim == 2 and values.shape[1] >= 2:
                n_cells = values.shape[0]
                if n_cells != self.n_cells:
                    raise SourceError(
                        f"{self.title} is damaged: obsm/{key} has {n_cells:,} cells, but obs has {self.n_cells:,}"
                    )
                return key, np.asarray(values[:, :2])
        return None

    @abc.abstractmethod
    def close(self) -> None:
        """Close what was opened; nothing can be read any more."""

    def __enter__(self) -> "Query":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FileQuery(Query):
    """The cells of an h5ad file or a zarr store, read where they are.

    Attributes
    ----------
    file
        The open file; of one from before anndata 0.7 what it would be now, in memory.
    is_as_stored
        Whether that is the file itself.
    """

    def __init__(self, path: Path):
        if path.is_dir():
            with reading(path, "zarr"):
                self.file, self.is_as_stored = zarr.open_group(path, mode="r"), True
                if not {"obs", "var"} <= set(self.file):
                    raise SourceError(f"{path} is a zarr store, but none of anndata: it has no obs and var")
        else:
            modern = modernized(path)
            with reading(path):
                self.file, self.is_as_stored = h5py.File(path) if modern is None else modern, modern is None
        try:
            self._look_through(path)
        except BaseException:
            self.close()
            raise

    def _look_through(self, path: Path) -> None:
        with reading(path, self._form):
            obs = self.file["obs"]
            barcodes = pd.Index(np.asarray(read_element(obs[obs.attrs["_index"]]), object)).astype(str)
            matrices, tables = {}, {}
            for name, place in matrices_of(self.file).items():
                if has_numbers(matrix := self.file[place.matrix]):
                    if place.var not in tables:
                        tables[place.var] = read_element(self.file[place.var])
                    var = tables[place.var]
                    reader = RowReader.of(path.name, name, matrix, len(barcodes), len(var))
                    matrices[name] = _StoredMatrix(var, reader, matrix, path, self._form)
            super().__init__(path.name, path, barcodes, matrices)
            base = read_element(self.file[_BASE]) if _BASE in self.file else None
            self.log1p_base = _number(base)

    @property
    def obs_columns(self) -> tuple[str, ...]:
        """The names of the columns of obs."""
        return tuple(map(str, self.file["obs"].attrs["column-order"]))

    def _read_column(self, name: str) -> pd.Series:
        assert self.path is not None
        with reading(self.path, self._form):
            return read_columns(self.file["obs"], [name], self.n_cells)[name]

    def _embeddings(self) -> Mapping[str, Any]:
        return {key: self.file["obsm"][key] for key in self.file["obsm"]} if "obsm" in self.file else {}

    @property
    def _form(self) -> str:
        return "h5ad" if isinstance(self.file, h5py.Group) else "zarr"

    def close(self) -> None:
        """Close the file."""
        if isinstance(self.file, h5py.File):
            self.file.close()


class TableQuery(Query):
    """Cells whose tables are in memory, as an AnnData; of a 10x file, the matrix is not.

    Attributes
    ----------
    adata
        The AnnData.
    outside
        The open 10x file's matrix, if that is where X is; by cell.
    """

    def __init__(
        self,
        title: str,
        path: Path | None,
        adata: AnnData,
        matrices: Mapping[str, QueryMatrix],
        outside: h5py.Group | None = None,
    ):
        super().__init__(title, path, adata.obs_names.astype(str), matrices)
        self.adata, self.outside = adata, outside
        log1p = adata.uns.get("log1p")
        self.log1p_base = _number(log1p.get("base")) if isinstance(log1p, Mapping) else None

    @property
    def obs_columns(self) -> tuple[str, ...]:
        """The names of the columns of obs."""
        return tuple(map(str, self.adata.obs))

    def _read_column(self, name: str) -> pd.Series:
        return self.adata.obs[name]

    def _embeddings(self) -> Mapping[str, Any]:
        return self.adata.obsm

    def close(self) -> None:
        """Close the 10x file."""
        if self.outside is not None:
            self.outside.file.close()


def open_query(source: str | Path | AnnData) -> Query:
    """Open the cells that a user gives.

    Of a file, tables are read when they are asked for and matrices some rows at a time; a 10x folder, whose numbers
    are text, is read whole. What it is is told by what is in it, not by its name.

    Parameters
    ----------
    source
        An h5ad file, a zarr store as anndata writes it, a 10x .h5 file (Cell Ranger 2 or later), a 10x folder with
        matrix.mtx, or an AnnData, in memory or backed.

    Raises
    ------
    SourceError
        If there is no such file, it is none of these or damaged, it has no cells, no genes or no matrix of numbers, or
        two cells have the same barcode.

    Examples
    --------
    >>> with open_query("cells.h5ad") as query:  # doctest: +SKIP
    ...     query.n_cells, [*query.matrices]
    (700, ['X', 'raw'])
    """
    if isinstance(source, AnnData):
        return _open_adata(source)
    path = Path(source)
    if not path.exists():
        raise SourceError(f"{path} does not exist; name an h5ad file, a zarr store, or {TENX_FILES}")
    if path.is_dir():
        if any((path / mark).exists() for mark in ZARR_MARKS):
            return FileQuery(path)
        if is_tenx_folder(path):
            adata = read_tenx_folder(path)
            return TableQuery(path.name, path, adata, {"X": _MemoryMatrix("X", adata.var, adata.X)})
        raise SourceError(f"the folder {path} is neither a zarr store nor a 10x folder with matrix.mtx")
    with reading(path):
        if not h5py.is_hdf5(path):
            raise SourceError(f"{path} is no HDF5 file; name an h5ad file, a zarr store, or {TENX_FILES}")
        file = h5py.File(path)
    if (group := tenx_group(file, path)) is None:
        file.close()
        return FileQuery(path)
    return _open_tenx(path, group)


def _open_tenx(path: Path, group: h5py.Group) -> Query:
    try:
        with reading(path, "10x .h5"):
            adata = read_tenx_tables(group)
            n_genes, n_cells = map(int, group["shape"])
            reader = RowReader(path.name, "X", "csr", (n_cells, n_genes))  # its columns are cells
            reader.check(*adata.shape)
            matrix = _StoredMatrix(adata.var, reader, group, path, "10x .h5")
            return TableQuery(path.name, path, adata, {"X": matrix}, outside=group)
    except BaseException:
        group.file.close()
        raise


def _open_adata(adata: AnnData) -> Query:
    title = "the given AnnData"
    given = {name: (values, adata.var) for name, values in adata.layers.items()}
    given["X"] = (adata.X, adata.var)
    if adata.raw is not None:
        given["raw"] = (adata.raw.X, adata.raw.var)
    matrices: dict[str, QueryMatrix] = {}
    for name, (values, var) in given.items():
        if isinstance(values, CSRDataset | CSCDataset | Array):  # backed
            stored = values if isinstance(values, Array) else values.group
            reader = RowReader.of(title, name, stored, adata.n_obs, len(var))
            matrices[name] = _StoredMatrix(var, reader, stored, title)
        elif isinstance(values, np.ndarray) or sparse.issparse(values):
            if values.dtype.kind in "biuf":
                matrices[name] = _MemoryMatrix(name, var, values)
        elif values is not None:
            kind = f"{type(values).__module__.split('.')[0]} {type(values).__name__}"
            raise SourceError(
                f"{title}: {name} is a {kind}, which is not read; give it as a numpy array or a scipy CSR matrix (one "
                "that is read lazily: adata.to_memory())"
            )
    return TableQuery(title, Path(adata.filename) if adata.isbacked else None, adata, matrices)


#: Where scanpy keeps the base of the logarithm.
_BASE = "uns/log1p/base"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float | np.number) else None
