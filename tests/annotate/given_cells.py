"""Cells as users keep them, in every kind of file."""

import gzip
import warnings
from collections.abc import Mapping

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.io
from anndata import AnnData
from scipy import sparse

N_CELLS, N_GENES = 30, 8


def counts_of(cells, n_genes=N_GENES):
    """Every count tells its cell and its gene; a third is zero."""
    cell, gene = np.asarray(cells)[:, None] + 1, np.arange(n_genes)[None] + 1
    return np.where((cell + gene) % 3 == 0, 0, 10 * cell + gene).astype(np.float32)


def given_cells():
    """Cells with something in each of the places of an AnnData."""
    rng = np.random.default_rng(0)
    names = [f"cell {cell}" for cell in range(N_CELLS)]
    obs = pd.DataFrame({"leiden": pd.Categorical(list("abc") * 10), "n": range(N_CELLS)}, index=names)
    var = pd.DataFrame({"feature_name": [f"G{gene}" for gene in range(N_GENES)]}, index=ids_of(range(N_GENES)))
    counts = counts_of(range(N_CELLS))
    adata = AnnData(sparse.csr_matrix(np.log1p(counts)), obs, var)
    adata.raw = AnnData(sparse.csr_matrix(counts_of(range(N_CELLS), 12)), obs, pd.DataFrame(index=ids_of(range(12))))
    adata.layers["counts"] = sparse.csc_matrix(counts)
    adata.layers["in full"] = counts.astype(np.int32)
    adata.obsm["X_pca"] = rng.random((N_CELLS, 4))
    adata.obsm["X_umap"] = rng.random((N_CELLS, 2))
    adata.obsm["table"] = pd.DataFrame({"score": rng.random(N_CELLS)}, index=names)
    adata.obsp["distances"] = sparse.csr_matrix(np.eye(N_CELLS))
    adata.varm["PCs"] = rng.random((N_GENES, 4))
    adata.uns = {
        "log1p": {"base": 2.0},
        "leiden_colors": np.array(["#111111", "#222222"], object),
        "neighbors": {"params": {"n": 3, "method": "umap", "none": None}, "table": pd.DataFrame({"a": [1, 2]})},
        "scalar": 2.5,
    }
    return adata


def plain_cells():
    """Cells with nothing but a matrix."""
    return AnnData(counts_of(range(N_CELLS)), pd.DataFrame(index=[f"cell {cell}" for cell in range(N_CELLS)]))


def ids_of(genes):
    return [f"ENSG{gene:011d}" for gene in genes]


def write(adata, path, zarr_format=2):
    """Write cells as h5ad or zarr."""
    if path.suffix == ".h5ad":
        adata.write_h5ad(path)
    else:
        with anndata.settings.override(zarr_write_format=zarr_format), warnings.catch_warnings(action="ignore"):
            adata.write_zarr(path)
    return path


def read(path):
    """Read cells as anndata does."""
    return anndata.read_h5ad(path) if path.suffix == ".h5ad" else anndata.read_zarr(path)


def check_same(found, expected):
    """Check that two AnnData are the same, in all their places."""
    for place in ("X", "obs", "var", "layers", "obsm", "varm", "obsp", "varp", "uns"):
        check_equal(getattr(found, place), getattr(expected, place))
    assert (found.raw is None) == (expected.raw is None)
    if found.raw is not None:
        check_equal(found.raw.X, expected.raw.X)
        check_equal(found.raw.var, expected.raw.var)


def check_equal(found, expected):
    if isinstance(expected, Mapping):
        assert set(found) == set(expected)
        for name, value in expected.items():
            check_equal(found[name], value)
        return
    assert type(found) is type(expected)
    if isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected)
    elif sparse.issparse(expected):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found.toarray(), expected.toarray())
    elif isinstance(expected, np.ndarray):
        if expected.dtype.kind in "OT":  # anndata gives texts from h5ad and zarr in arrays of different types
            found, expected = found.astype(object), expected.astype(object)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


def write_tenx(path, version=3, n_cells=N_CELLS, genome="GRCh38"):
    """Write the counts as Cell Ranger 2 or 3 does, in a .h5 file; its columns are cells."""
    matrix = sparse.csr_matrix(counts_of(range(n_cells)).astype(np.int32))
    with h5py.File(path, "a") as file:
        group = file.create_group("matrix" if version == 3 else genome)
        for part in ("data", "indices", "indptr"):
            group[part] = getattr(matrix, part).astype(np.int64 if part != "data" else np.int32)
        group["shape"] = np.array([N_GENES, n_cells], np.int32)
        group["barcodes"] = np.array([f"cell {cell}" for cell in range(n_cells)], "S18")
        ids, names = np.array(ids_of(range(N_GENES)), "S"), np.array([f"G{gene}" for gene in range(N_GENES)], "S")
        if version == 2:
            group["genes"], group["gene_names"] = ids, names
        else:
            group["features/id"], group["features/name"] = ids, names
            group["features/feature_type"] = np.array(["Gene Expression"] * 7 + ["Antibody Capture"], "S")
            group["features/genome"] = np.array(["GRCh38"] * N_GENES, "S")
            group["features/_all_tag_keys"] = np.array(["genome"], "S")
    return path


def write_tenx_folder(path, version=3, packed=True):
    """Write the counts as Cell Ranger 2 or 3 does, in a folder."""
    path.mkdir()
    scipy.io.mmwrite(path / "matrix.mtx", sparse.coo_matrix(counts_of(range(N_CELLS)).T.astype(np.int32)))
    genes = [[gene_id, f"G{gene}", "Gene Expression"] for gene, gene_id in enumerate(ids_of(range(N_GENES)))]
    genes = [columns[:2] if version == 2 else columns for columns in genes]
    name = "genes.tsv" if version == 2 else "features.tsv"
    (path / name).write_text("".join("\t".join(columns) + "\n" for columns in genes))
    (path / "barcodes.tsv").write_text("".join(f"cell {cell}\n" for cell in range(N_CELLS)))
    for file in list(path.iterdir()) if packed else []:
        (path / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    return path
