"""Files as anndata writes them, h5ad (HDF5) or zarr: how they are opened, and how their tables are read."""

import io
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import anndata
import h5py
import pandas as pd
import zarr
from anndata.io import read_elem, write_elem

from hce_jax.errors import SourceError, UserError

#: What a file is made of, in either kind.
Group: TypeAlias = h5py.Group | zarr.Group
Array: TypeAlias = h5py.Dataset | zarr.Array


@contextmanager
def reading(path: Path | str, form: str = "h5ad") -> Iterator[None]:
    """Raise a SourceError that names the file for whatever a damaged one makes h5py, zarr and anndata raise.

    Examples
    --------
    >>> with reading(Path("cells.h5ad")):
    ...     {}["obs"]
    Traceback (most recent call last):
    hce_jax.errors.SourceError: cells.h5ad cannot be read as h5ad, it may be damaged ('obs')
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the three have no error of their own: they may raise anything
        raise SourceError(f"{path} cannot be read as {form}, it may be damaged ({error})") from error


@contextmanager
def opened(path: Path, modern: h5py.File | None = None) -> Iterator[h5py.File]:
    """Open an h5ad file to read; or give what :func:`modernized` made of it.

    Examples
    --------
    >>> with opened(Path("cells.h5ad")) as file:  # doctest: +SKIP
    ...     "X" in file
    True
    """
    if modern is not None:
        yield modern
        return
    with reading(path), h5py.File(path) as file:
        yield file


def modernized(path: Path) -> h5py.File | None:
    """Bring a file from before anndata 0.7, which can only be read whole, into today's form, in memory.

    Returns
    -------
    None for any other file: it is read where it is.

    Raises
    ------
    SourceError
        If it is no h5ad file, or damaged.

    Examples
    --------
    >>> modernized(Path("cells.h5ad"))  # doctest: +SKIP
    """
    with opened(path) as file:
        if not {"obs", "var"} <= set(file):
            raise SourceError(f"{path} is an HDF5 file, but no h5ad file: it has no obs and var")
        if not isinstance(file["obs"], h5py.Dataset):
            return None
        modern = h5py.File(io.BytesIO(), "w")
        with warnings.catch_warnings(action="ignore"):  # about the old form
            write_elem(modern, "/", anndata.read_h5ad(path))
        return modern


def read_element(element: Group | Array) -> Any:
    """Read what anndata has written, as what it was.

    Examples
    --------
    >>> file = h5py.File(io.BytesIO(), "w")
    >>> write_elem(file, "var", pd.DataFrame({"gene_symbols": ["CD4"]}, index=["ENSG00000010610"]))
    >>> read_element(file["var"])["gene_symbols"].tolist()
    ['CD4']
    """
    with warnings.catch_warnings(action="ignore", category=anndata.OldFormatWarning):
        return read_elem(element)


def is_of_anndata_07(table: Group) -> bool:
    """Tell whether a table keeps its categories apart from their columns, so that it can only be read whole.

    Examples
    --------
    >>> file = h5py.File(io.BytesIO(), "w")
    >>> write_elem(file, "obs", pd.DataFrame(index=["AAAC-1"]))
    >>> is_of_anndata_07(file["obs"])
    False
    """
    return table.attrs.get("encoding-version") == "0.1.0"


def read_columns(table: Group, names: Iterable[str], n_rows: int) -> pd.DataFrame:
    """Read some columns of obs or var, (n_rows,) each; without the index.

    Raises
    ------
    ValueError
        If a column is of another length.

    Examples
    --------
    >>> file = h5py.File(io.BytesIO(), "w")
    >>> write_elem(file, "obs", pd.DataFrame({"leiden": [0, 1]}, index=["a", "b"]))
    >>> read_columns(file["obs"], ["leiden"], 2)["leiden"].tolist()
    [0, 1]
    """
    if is_of_anndata_07(table):
        return read_element(table).reset_index(drop=True)[[*dict.fromkeys(names)]]
    return pd.DataFrame({name: read_element(table[name]) for name in names}, index=pd.RangeIndex(n_rows))
