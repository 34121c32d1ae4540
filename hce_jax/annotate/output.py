"""The annotated copy of a user's cells, which appears when it is complete."""

import abc
import errno
import io
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr
from anndata.io import write_elem

from hce_jax.annotate.query import ZARR_MARKS, FileQuery, Query, TableQuery
from hce_jax.errors import SourceError
from hce_jax.files import written_aside
from hce_jax.store.anndata_file import Array, Group, is_of_anndata_07, read_element
from hce_jax.store.matrices import kind_of

#: Our entry in uns.
UNS_KEY = "hce_jax"
#: Where that says which columns of obs and arrays in obsm came with it.
_WRITTEN = "written"
#: Values copied at a time, and values in a chunk of a zarr array: 16 MB.
_VALUES_AT_A_TIME = 1 << 22
#: Bytes to be left on the disk, for what HDF5 keeps of its own.
_ROOM_TO_SPARE = 1 << 16


@runtime_checkable
class Rows(Protocol):
    """An array that is written rows by rows, from one thread at a time: ``array[start:stop] = values``."""

    def __setitem__(self, rows: slice, values: np.ndarray) -> None: ...


class Output(abc.ABC):
    """Where the annotation goes; see :func:`open_output`."""

    @abc.abstractmethod
    def array(self, name: str, shape: tuple[int, ...]) -> Rows:
        """Make an array in obsm, (n, ...) float32, zero where nothing is written.

        Raises
        ------
        SourceError
            If it cannot be written, for want of room for example; so does writing to the array.
        """

    @abc.abstractmethod
    def finish(self, obs: pd.DataFrame, uns: Mapping[str, Any]) -> None:
        """Write columns of obs and ``uns["hce_jax"]``; those of the same name are replaced.

        Parameters
        ----------
        obs
            The columns, by barcode; text becomes categorical.
        uns
            Dictionaries, texts, numbers, arrays, tables.

        Raises
        ------
        SourceError
            If it cannot be written.
        ValueError
            If the barcodes are not those of the cells.
        """


@contextmanager
def open_output(query: Query, path: Path | None = None, *, overwrite: bool = False) -> Iterator[Output]:
    """Begin an annotated copy of some cells.

    The copy is written under a hidden name beside ``path`` and takes its name when the block ends; nothing is left of
    it when an exception leaves the block. All else that the file has stays as it is: from h5ad to h5ad and from zarr
    to zarr the files are copied, from one to the other and from 10x output their contents are, some rows of a matrix
    at a time. What an earlier annotation has left there is taken away.

    Parameters
    ----------
    query
        The cells, open.
    path
        The copy, .h5ad or .zarr; None: the given AnnData itself gets it all by :meth:`Output.finish`, and what it was
        read from stays as it is.
    overwrite
        Whether a file or store of that name is replaced.

    Raises
    ------
    SourceError
        If ``path`` has another suffix, exists, is the input or within it, has no folder, or cannot be written.

    Examples
    --------
    >>> from hce_jax.annotate.query import open_query
    >>> adata = anndata.AnnData(np.eye(2, dtype=np.float32))
    >>> with open_query(adata) as query, open_output(query) as output:
    ...     output.array("X_hce", (2, 3))[0:2] = np.ones((2, 3))
    ...     output.finish(pd.DataFrame({"hce_label": ["T cell", "neuron"]}, index=["0", "1"]), {})
    >>> adata.obs["hce_label"].tolist(), adata.obsm["X_hce"].shape
    (['T cell', 'neuron'], (2, 3))
    """
    if path is None:
        if not isinstance(query, TableQuery):
            raise ValueError(f"{query.title} is no AnnData: name the file that the annotation goes to")
        yield _MemoryOutput(query)
        return
    check_target(query, path, overwrite)
    with _replaced(path) as aside, _copied(query, path, aside) as file:
        with _writing(path):
            output = _FileOutput(path, file, query)
        yield output


class _MemoryOutput(Output):
    def __init__(self, query: TableQuery):
        self._adata = query.adata
        self._barcodes = query.barcodes
        self._arrays: dict[str, np.ndarray] = {}

    def array(self, name: str, shape: tuple[int, ...]) -> Rows:
        """Make an array; see :meth:`Output.array`."""
        self._arrays[name] = np.zeros(_checked(shape, self._barcodes), np.float32)
        return cast("Rows", self._arrays[name])

    def finish(self, obs: pd.DataFrame, uns: Mapping[str, Any]) -> None:
        """Set everything; see :meth:`Output.finish`."""
        columns = _columns(obs, self._barcodes)
        adata = self._adata
        earlier = _written(adata.uns.get(UNS_KEY))
        for table, names in ((adata.obs, earlier["obs"]), (adata.obsm, earlier["obsm"])):
            for name in names & {*table}:
                del table[name]
        for name, values in columns.items():
            adata.obs[name] = values.values
        adata.obsm.update(self._arrays)
        adata.uns[UNS_KEY] = _entry(uns, columns, self._arrays)


class _FileOutput(Output):
    """A copy of everything, with what an earlier annotation left taken away."""

    def __init__(self, path: Path, file: h5py.File | zarr.Group, query: Query):
        self._path, self._file, self._barcodes = path, file, query.barcodes
        for name in ("obsm", "uns"):
            if name not in file:
                _put(file, name, {})
        obs = file["obs"]
        if is_of_anndata_07(obs):
            _put(file, "obs", read_element(obs))
        self._arrays: list[str] = []
        if UNS_KEY in file["uns"]:
            self._remove(_written(read_element(file["uns"][UNS_KEY])))

    def _remove(self, earlier: Mapping[str, set[str]]) -> None:
        for key, names in earlier.items():
            for name in names & {*self._file[key]}:
                del self._file[key][name]
        attributes = self._file["obs"].attrs
        attributes["column-order"] = [name for name in attributes["column-order"] if name not in earlier["obs"]]

    def array(self, name: str, shape: tuple[int, ...]) -> Rows:
        """Make an array; see :meth:`Output.array`."""
        dtype = np.dtype(np.float32)
        with _writing(self._path):
            _check_room(self._path, math.prod(_checked(shape, self._barcodes)) * dtype.itemsize)
            obsm = self._file["obsm"]
            if name in obsm:
                del obsm[name]
            array = _new_array(obsm, name, shape, dtype)
        self._arrays.append(name)
        return _FileRows(array, self._path)

    def finish(self, obs: pd.DataFrame, uns: Mapping[str, Any]) -> None:
        """Write the columns and uns; see :meth:`Output.finish`."""
        columns = _columns(obs, self._barcodes)
        entry = _entry(uns, columns, self._arrays)
        with _writing(self._path):
            trial = io.BytesIO()
            with h5py.File(trial, "w") as file:
                _write_new(file.create_group("obs"), file.create_group("uns"), columns, entry)
            _check_room(self._path, trial.getbuffer().nbytes)
            table = self._file["obs"]
            _write_new(table, self._file["uns"], columns, entry)
            table.attrs["column-order"] = [*dict.fromkeys([*table.attrs["column-order"], *columns])]


class _FileRows:
    """An array in a file that says which file cannot be written."""

    def __init__(self, array: Array, path: Path):
        self._array, self._path = array, path

    def __setitem__(self, rows: slice, values: np.ndarray) -> None:
        with _writing(self._path):
            self._array[rows] = np.asarray(values, np.float32)


def _put(group: Group, name: str, value: Any) -> None:
    with warnings.catch_warnings(action="ignore"):  # about what the next version of anndata will do by itself
        write_elem(group, name, value)


def _write_new(obs: Group, uns: Group, columns: Mapping[str, pd.Series], entry: Mapping[str, Any]) -> None:
    for name, values in columns.items():
        _put(obs, name, values.values)
    _put(uns, UNS_KEY, dict(entry))


def _entry(uns: Mapping[str, Any], columns: Iterable[str], arrays: Iterable[str]) -> dict[str, Any]:
    """Return our entry of uns: what is given, and what was written, so that a later annotation can take it away."""
    return {**uns, _WRITTEN: {"obs": np.array([*columns], object), "obsm": np.array([*arrays], object)}}


def _written(earlier: Any) -> dict[str, set[str]]:
    """Return what an earlier annotation says that it has written."""
    written = earlier.get(_WRITTEN, {}) if isinstance(earlier, Mapping) else {}
    return {key: {*map(str, written.get(key, ()))} for key in ("obs", "obsm")}


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Name the file when it cannot be written: h5py does not, and others name what lies aside."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # h5py raises the latter when it closes
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise SourceError(f"{path} cannot be written ({why}); see to it, or name another place (-o)") from error


def _check_room(path: Path, n_bytes: int) -> None:
    """Raise an error if there is no room: HDF5 writes small pieces late, when it cannot raise one any more."""
    if shutil.disk_usage(path.parent).free < n_bytes + _ROOM_TO_SPARE:
        raise OSError(errno.ENOSPC, "no room")


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """Do as :func:`hce_jax.files.written_aside`, for files and folders."""
    with written_aside(path) as aside:
        try:
            yield aside
            if path.is_dir():
                shutil.rmtree(path)
        except BaseException:
            if aside.is_dir():
                shutil.rmtree(aside)
            raise


def check_suffix(path: Path) -> None:
    """Raise a SourceError if a file of that name cannot be an annotated copy."""
    if path.suffix not in (".h5ad", ".zarr"):
        raise SourceError(f"'{path}': an annotated copy is written as .h5ad or .zarr; name it so (-o)")


def check_target(query: Query, path: Path, overwrite: bool) -> None:
    """Raise a SourceError if the annotated copy cannot be written there; arguments as of :func:`open_output`."""
    check_suffix(path)
    source = query.path
    if source is not None:
        place = source.resolve()
        if path.resolve() == place or (path.exists() and path.samefile(source)):
            raise SourceError(f"{path} is the input itself, which stays as it is; name another file (-o)")
        if isinstance(query, FileQuery) and place in path.resolve().parents:
            raise SourceError(f"{path} lies within the input {source}, which stays as it is; name another place (-o)")
    if not path.parent.is_dir():
        raise SourceError(f"the folder of {path} does not exist; make it, or name another place (-o)")
    if not os.access(path.parent, os.W_OK):
        raise SourceError(f"the folder of {path} cannot be written to; name another place (-o)")
    if os.path.lexists(path) and not overwrite:
        raise SourceError(f"{path} exists already; name another file (-o), or remove it")
    if path.is_dir() and not (path.suffix == ".zarr" and any((path / mark).exists() for mark in ZARR_MARKS)):
        raise SourceError(f"{path} is a folder, and none of zarr; name another file (-o), or remove it")
    if path.is_file() and path.suffix == ".zarr":
        raise SourceError(f"{path} is a file, and zarr is a folder; name another place (-o), or remove it")


@contextmanager
def _copied(query: Query, path: Path, aside: Path) -> Iterator[h5py.File | zarr.Group]:
    """Copy all cells, give the open copy, and complete it if nothing was raised."""
    file = None
    try:
        with _writing(path):
            is_zarr = aside.suffix == ".zarr"
            alike = (
                isinstance(query, FileQuery) and query.is_as_stored and isinstance(query.file, zarr.Group) == is_zarr
            )
            if alike and query.path is not None:
                _copy_all(query.path, aside)
            elif not is_zarr:
                _check_room(path, _bytes_of(query))
            file = _open_zarr(aside, is_new=not alike) if is_zarr else h5py.File(aside, "a")
            if not alike:
                _write(query, file)
        yield file
        with _writing(path):
            if isinstance(file, h5py.File):
                file.close()
            else:
                with warnings.catch_warnings(action="ignore"):  # that version 3 of the format does not have this yet
                    zarr.consolidate_metadata(file.store)
    except BaseException:
        if isinstance(file, h5py.File):
            with suppress(Exception):
                os.truncate(aside, 0)  # room on a full disk: HDF5 crashes at the end if it cannot write what it must
                file.close()
        raise


def _bytes_of(query: Query) -> int:
    if isinstance(query, FileQuery):
        return _bytes_in(query.file)
    assert isinstance(query, TableQuery)
    return sys.getsizeof(query.adata) + (0 if query.outside is None else _bytes_in(query.outside))


def _bytes_in(element: Group | Array) -> int:
    return int(element.nbytes) if isinstance(element, Array) else sum(_bytes_in(element[name]) for name in element)


def _copy_all(source: Path, aside: Path) -> None:
    if not source.is_dir():
        shutil.copyfile(source, aside)
        return
    for folder, _, names in os.walk(source, followlinks=True):
        place = aside / Path(folder).relative_to(source)
        place.mkdir()
        for name in names:
            shutil.copyfile(Path(folder, name), place / name)


def _open_zarr(aside: Path, is_new: bool) -> zarr.Group:
    version = anndata.settings.zarr_write_format if is_new else None
    return zarr.open_group(aside, mode="a", zarr_format=version, use_consolidated=False)


def _write(query: Query, file: Group) -> None:
    if isinstance(query, TableQuery):
        _put(file, "/", query.adata)
        if query.outside is not None:
            _copy_sparse(query.outside, file, "X", [*query.adata.shape], "csr")
        return
    assert isinstance(query, FileQuery)
    file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    for name in query.file:
        _copy(query.file[name], file, name)


def _copy(element: Group | Array, group: Group, name: str) -> None:
    """Copy what anndata has written from one kind of file to the other."""
    kind = element.attrs.get("encoding-type", "dict" if not isinstance(element, Array) else "")
    if isinstance(element, Array):
        if kind == "array" and element.dtype.kind in "biuf" and element.ndim:
            _copy_values(element, _new_array(group, name, element.shape, element.dtype))
            return
    elif (form := kind_of(element)) is not None:
        _copy_sparse(element, group, name, [int(n) for n in element.attrs["shape"]], form)
        return
    elif kind in ("dict", "raw"):
        inner = group.create_group(name)
        inner.attrs.update({"encoding-type": kind, "encoding-version": "0.1.0"})
        for key in element:
            _copy(element[key], inner, key)
        return
    _put(group, name, read_element(element))


def _copy_sparse(matrix: Group, group: Group, name: str, shape: list[int], form: str) -> None:
    copy = group.create_group(name)
    copy.attrs.update({"encoding-type": f"{form}_matrix", "encoding-version": "0.1.0"})
    copy.attrs["shape"] = shape
    for part in ("data", "indices", "indptr"):
        _copy_values(matrix[part], _new_array(copy, part, matrix[part].shape, matrix[part].dtype))


def _copy_values(array: Array, copy: Array) -> None:
    step = max(1, _VALUES_AT_A_TIME // max(1, math.prod(array.shape[1:])))
    for start in range(0, array.shape[0], step):
        copy[start : start + step] = array[start : start + step]


def _new_array(group: Group, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Array:
    if isinstance(group, zarr.Group):
        rows = max(1, min(shape[0], _VALUES_AT_A_TIME // max(1, math.prod(shape[1:]))))
        array = group.create_array(name, shape=shape, dtype=dtype, chunks=(rows, *(max(1, n) for n in shape[1:])))
    else:
        array = group.create_dataset(name, shape, dtype)
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    return array


def _columns(obs: pd.DataFrame, barcodes: pd.Index) -> dict[str, pd.Series]:
    if not obs.index.equals(barcodes):
        raise ValueError(f"{len(obs):,} barcodes are not those of the {len(barcodes):,} cells in their order")
    texts = obs.select_dtypes(["object", "string"])
    return {str(name): values.astype("category") if name in texts else values for name, values in obs.items()}


def _checked(shape: tuple[int, ...], barcodes: pd.Index) -> tuple[int, ...]:
    if shape[0] != len(barcodes):
        raise ValueError(f"an array of {shape[0]:,} rows for {len(barcodes):,} cells")
    return shape
