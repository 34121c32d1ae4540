"""What Cell Ranger writes: a .h5 file, or a folder with matrix.mtx."""

import gzip
import warnings
from pathlib import Path

import h5py
import pandas as pd
import scipy.io
from anndata import AnnData
from scipy import sparse

from hce_jax.errors import SourceError
from hce_jax.store.anndata_file import reading

#: For messages.
TENX_FILES = "10x output (.h5, or the folder with matrix.mtx)"
#: What every matrix in a 10x file has.
_PARTS = {"barcodes", "data", "indices", "indptr", "shape"}
#: Columns of var, by their names in a .h5 file: of Cell Ranger 3 and later, and of 2.
_FEATURES = {"id": "feature_id", "name": "feature_name", "feature_type": "feature_types", "genome": "genome"}
_GENES = {"genes": "feature_id", "gene_names": "feature_name"}


def tenx_group(file: h5py.File, path: Path) -> h5py.Group | None:
    """Find the matrix of a 10x .h5 file; None if it is none.

    Raises
    ------
    SourceError
        If it has one for each of several genomes, as Cell Ranger 2 wrote them.

    Examples
    --------
    >>> tenx_group(h5py.File("cells.h5ad"), Path("cells.h5ad"))  # doctest: +SKIP
    """
    names = [name for name, group in file.items() if isinstance(group, h5py.Group) and set(group) >= _PARTS]
    if len(names) > 1:
        raise SourceError(
            f"{path} has the cells of several genomes: {', '.join(names)}; write those of one to a file of its own "
            f"(scanpy.read_10x_h5(..., genome={names[0]!r}).write_h5ad(...))"
        )
    return file[names[0]] if names else None


def read_tenx_tables(group: h5py.Group) -> AnnData:
    """Read what a 10x .h5 file says of its cells and genes; an AnnData without X.

    Examples
    --------
    >>> read_tenx_tables(h5py.File("filtered_feature_bc_matrix.h5")["matrix"]).var.columns.tolist()  # doctest: +SKIP
    ['feature_id', 'feature_name', 'feature_types', 'genome']
    """
    columns = {f"features/{name}": column for name, column in _FEATURES.items()} | _GENES
    var = {column: group[place].asstr()[:] for place, column in columns.items() if place in group}
    return _tables(group["barcodes"].asstr()[:].tolist(), pd.DataFrame(var))


def is_tenx_folder(path: Path) -> bool:
    """Tell whether a folder has a matrix.mtx, packed or not.

    Examples
    --------
    >>> is_tenx_folder(Path("filtered_feature_bc_matrix"))
    False
    """
    return _find(path, "matrix.mtx") is not None


def read_tenx_folder(path: Path) -> AnnData:
    """Read a 10x folder.

    Returns
    -------
    The counts of cells x genes as X, CSR; with the columns of var ``feature_id``, ``feature_name`` and, if they are
    there, ``feature_types``.

    Raises
    ------
    SourceError
        If a file of the folder is missing or damaged, or does not agree with another.

    Examples
    --------
    >>> read_tenx_folder(Path("filtered_feature_bc_matrix")).X  # doctest: +SKIP
    """
    matrix, barcodes = _find(path, "matrix.mtx"), _find(path, "barcodes.tsv")
    features = _find(path, "features.tsv") or _find(path, "genes.tsv")
    if matrix is None or barcodes is None or features is None:
        lacks = "features.tsv or genes.tsv" if features is None else "barcodes.tsv"
        raise SourceError(f"the folder {path} has a matrix.mtx, but no {lacks}, with or without .gz; put it beside")
    with reading(path, "a 10x folder"):
        cells, genes = _lines(barcodes), _lines(features)
        counts = sparse.coo_array(scipy.io.mmread(matrix))
        if counts.shape != (len(genes), len(cells)):
            raise SourceError(
                f"{path} is damaged: {matrix.name} has {counts.shape[0]:,} genes and {counts.shape[1]:,} cells, but "
                f"{features.name} has {len(genes):,} lines and {barcodes.name} {len(cells):,}"
            )
        columns = ["feature_id", "feature_name", "feature_types"][: min(map(len, genes), default=3)]
        var = pd.DataFrame([line[: len(columns)] for line in genes], columns=columns)
        adata = _tables([line[0] for line in cells], var)
        adata.X = sparse.csr_matrix(counts.T)
    return adata


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _lines(path: Path) -> list[list[str]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return [line.rstrip("\r\n").split("\t") for line in file]


def _tables(barcodes: list[str], var: pd.DataFrame) -> AnnData:
    with warnings.catch_warnings(action="ignore"):  # about names that occur twice
        return AnnData(obs=pd.DataFrame(index=barcodes), var=var.set_axis(var["feature_id"].to_numpy()))
