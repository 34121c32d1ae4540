"""A user's cells, whatever they are kept in; the counts tell their cell and gene."""

import re
from concurrent.futures import ThreadPoolExecutor

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata import AnnData
from anndata.io import write_elem
from given_cells import (
    N_CELLS,
    N_GENES,
    counts_of,
    given_cells,
    ids_of,
    write,
    write_tenx,
    write_tenx_folder,
)
from scipy import sparse

from hce_jax.annotate.query import open_query
from hce_jax.errors import SourceError

#: Ways to keep the same AnnData, in a folder.
KEPT = {
    "h5ad": lambda folder: write(given_cells(), folder / "cells.h5ad"),
    "zarr of version 2": lambda folder: write(given_cells(), folder / "v2.zarr"),
    "zarr of version 3": lambda folder: write(given_cells(), folder / "v3.zarr", zarr_format=3),
    "in memory": lambda folder: given_cells(),
    "a view": lambda folder: given_cells()[:, :],
    "backed": lambda folder: anndata.read_h5ad(write(given_cells(), folder / "backed.h5ad"), backed="r"),
}


@pytest.fixture(scope="module", params=KEPT)
def kept(request, tmp_path_factory):
    """The same AnnData, kept in every way."""
    return KEPT[request.param](tmp_path_factory.mktemp("kept"))


MATRICES = {
    "X": np.log1p(counts_of(range(N_CELLS))),
    "raw": counts_of(range(N_CELLS), 12),
    "counts": counts_of(range(N_CELLS)),
    "in full": counts_of(range(N_CELLS)),
}
ROWS = (slice(None), slice(3, 9), slice(29, 99), np.array([0, 29]), np.array([7, 2, 2]), np.array([], int), slice(5, 5))


def test_matrices_are_read_by_rows_wherever_they_are(kept):
    with open_query(kept) as query:
        assert set(query.matrices) == set(MATRICES)
        for name, matrix in query.matrices.items():
            assert (matrix.name, matrix.n_cells) == (name, N_CELLS)
            assert matrix.var.index.tolist() == ids_of(range(12 if name == "raw" else N_GENES))
            assert ("feature_name" in matrix.var) == (name != "raw")
            for rows in ROWS:
                found = matrix.rows(rows)
                assert isinstance(found, sparse.csr_array)
                assert found.dtype == np.float32
                assert found.has_canonical_format
                assert (found.data != 0).all()
                np.testing.assert_array_equal(found.toarray(), MATRICES[name][rows])


def test_what_is_said_of_the_cells_is_read(kept):
    adata = given_cells()
    with open_query(kept) as query:
        assert query.n_cells == N_CELLS
        assert query.barcodes.tolist() == adata.obs_names.tolist()
        assert query.log1p_base == 2.0
        assert query.obs_column("leiden").tolist() == adata.obs["leiden"].tolist()
        assert query.obs_column("n").index.equals(query.barcodes)
        name, place = query.picture()
        assert name == "X_umap"
        np.testing.assert_array_equal(place, adata.obsm["X_umap"])
        with pytest.raises(SourceError, match=r"has no column 'louvain' in obs; its columns are leiden, n$"):
            query.obs_column("louvain")


def test_titles_are_the_names_of_files(tmp_path):
    assert open_query(str(write(given_cells(), tmp_path / "cells.h5ad"))).title == "cells.h5ad"
    assert open_query(given_cells()).title == "the given AnnData"


@pytest.mark.parametrize("version", [2, 3])
def test_10x_files_are_read(tmp_path, version):
    with open_query(write_tenx(tmp_path / "cells.h5", version)) as query:
        check_tenx(query, version == 3)
        assert ("genome" in query.matrices["X"].var) == (version == 3)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_10x_folders_are_read(tmp_path, version, packed):
    with open_query(write_tenx_folder(tmp_path / "cells", version, packed)) as query:
        check_tenx(query, version == 3)


def check_tenx(query, has_types):
    assert query.barcodes.tolist() == [f"cell {cell}" for cell in range(N_CELLS)]
    (matrix,) = query.matrices.values()
    for rows in ROWS:
        np.testing.assert_array_equal(matrix.rows(rows).toarray(), counts_of(range(N_CELLS))[rows])
    assert matrix.var.index.tolist() == matrix.var["feature_id"].tolist() == ids_of(range(N_GENES))
    assert matrix.var["feature_name"].tolist() == [f"G{gene}" for gene in range(N_GENES)]
    assert ("feature_types" in matrix.var) == has_types
    assert query.picture() is query.log1p_base is None
    with pytest.raises(SourceError, match="its columns are none"):
        query.obs_column("leiden")


def test_a_file_from_before_anndata_07_is_read(tmp_path):
    records = np.array([("a", 1), ("b", 2)], [("index", h5py.string_dtype()), ("n", "i4")])
    with h5py.File(tmp_path / "cells.h5ad", "w") as file:
        file["obs"] = records
        file["var"] = np.array([(name,) for name in ids_of(range(3))], [("index", h5py.string_dtype())])
        file["X"] = counts_of(range(2), 3)
    with open_query(tmp_path / "cells.h5ad") as query:
        np.testing.assert_array_equal(query.matrices["X"].rows(slice(1, 2)).toarray(), counts_of([1], 3))
        assert query.obs_column("n").tolist() == [1, 2]


def test_cells_may_be_read_by_several_threads_and_a_matrix_by_gene_is_read_once(kept, capsys):
    with open_query(kept) as query, ThreadPoolExecutor(8) as pool:
        for name in ("X", "counts"):
            rows = [slice(row, row + 1) for row in range(N_CELLS)]
            for row, found in enumerate(pool.map(query.matrices[name].rows, rows)):
                np.testing.assert_array_equal(found.toarray(), MATRICES[name][[row]])
    said = capsys.readouterr().err.splitlines()
    says = [f"{query.title} keeps counts by gene (CSC): all of it is read into memory"]
    assert said == ([] if isinstance(kept, AnnData) else says)  # the layers of an AnnData are in memory


def test_values_are_given_as_they_are_stored_but_for_zeros_and_double_entries(tmp_path):
    x = sparse.csr_matrix((np.float32([5, 0, -1, np.nan, 7, 3]), [3, 1, 0, 0, 2, 2], [0, 3, 6]), shape=(2, 4))
    adata = AnnData(x)
    for source in (adata, write(adata, tmp_path / "cells.h5ad")):
        found = open_query(source).matrices["X"].rows(slice(None))
        assert found.indices.tolist() == [0, 3, 0, 2]
        np.testing.assert_array_equal(found.data, [-1, 5, np.nan, 10])
    assert x.nnz == 6  # the given matrix is not changed


def test_only_matrices_of_numbers_are_given(tmp_path):
    adata = given_cells()
    adata.layers["words"] = np.full(adata.shape, "word", object)
    assert "words" not in open_query(adata).matrices
    with h5py.File(write(given_cells(), tmp_path / "cells.h5ad"), "r+") as file:
        file["layers/words"] = np.full(adata.shape, b"word")
        file["layers/list"] = np.ones(3)
    assert set(open_query(tmp_path / "cells.h5ad").matrices) == set(MATRICES)


@pytest.mark.parametrize(
    ("obsm", "name"),
    [
        ({"X_pca": 3, "X_tsne": 2, "X_scVI": 9}, "X_tsne"),
        ({"X_pca": 3, "X_UMAP_harmony": 2}, "X_UMAP_harmony"),
        ({"X_pca": 50, "X_umap": 1}, "X_pca"),
        ({"X_scVI": 9}, None),
        ({}, None),
    ],
)
def test_the_picture_is_the_best_there_is(tmp_path, obsm, name):
    adata = AnnData(np.eye(3), obsm={key: np.full((3, n), n) for key, n in obsm.items()})
    for source in (adata, write(adata, tmp_path / "cells.h5ad")):
        picture = open_query(source).picture()
        assert (picture and picture[0]) == name
        if picture:
            np.testing.assert_array_equal(picture[1], np.full((3, 2), obsm[name]))


@pytest.mark.parametrize("uns", [{}, {"log1p": {}}, {"log1p": {"base": None}}, {"log1p": 3}, {"log1p": {"base": "e"}}])
def test_a_base_that_is_not_stated_is_none(tmp_path, uns):
    adata = AnnData(np.eye(3), uns=uns)
    assert open_query(adata).log1p_base is None
    assert open_query(write(adata, tmp_path / "cells.h5ad")).log1p_base is None


# --- what cannot be used ----------------------------------------------------------------------------------------------


def refused(source, says):
    with pytest.raises(SourceError, match=says) as caught:
        open_query(source)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_of_cells_is_refused(tmp_path):
    (tmp_path / "text.h5ad").write_text("cell_type,donor_id\n")
    (tmp_path / "empty").mkdir()
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["matrix"] = [1]
    zarr.open_group(tmp_path / "other.zarr", mode="w")
    refused(tmp_path / "absent.h5ad", r"absent.h5ad does not exist; name an h5ad file, a zarr store, or 10x output")
    refused(tmp_path / "text.h5ad", r"text.h5ad is no HDF5 file; name an h5ad file, a zarr store, or 10x output \(.h5")
    refused(tmp_path / "empty", r"the folder .*empty is neither a zarr store nor a 10x folder with matrix.mtx")
    refused(tmp_path / "other.h5", r"other.h5 is an HDF5 file, but no h5ad file: it has no obs and var")
    refused(tmp_path / "other.zarr", r"other.zarr is a zarr store, but none of anndata: it has no obs and var")


def test_truncated_files_are_refused(tmp_path):
    for path in (write(given_cells(), tmp_path / "cells.h5ad"), write_tenx(tmp_path / "cells.h5")):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        refused(path, rf"{path.name} cannot be read as h5ad, it may be damaged \(.*truncated")


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)], ids=["no cells", "no genes"])
@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix])
def test_a_file_without_cells_or_genes_is_refused(tmp_path, shape, kind):
    adata = AnnData(kind(np.zeros(shape, np.float32)))
    says = "has no cells" if shape[0] == 0 else "has no genes"
    refused(adata, f"^the given AnnData {says}$")
    refused(write(adata, tmp_path / "cells.h5ad"), f"^cells.h5ad {says}$")
    refused(write(adata, tmp_path / "cells.zarr"), f"^cells.zarr {says}$")


def test_a_file_without_a_matrix_is_refused(tmp_path):
    adata = AnnData(obs=pd.DataFrame(index=["a", "b"]), var=pd.DataFrame(index=["G"]))
    for source in (adata, write(adata, tmp_path / "cells.h5ad")):
        refused(source, "has no matrix of numbers of cells x genes, neither X nor raw nor a layer")


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_barcodes_that_occur_twice_are_refused(tmp_path):
    adata = AnnData(np.eye(5), pd.DataFrame(index=list("abcba")))
    says = r"has 2 barcodes that occur twice \(first: b\).*\(adata.obs_names_make_unique\(\)\)"
    refused(adata, says)
    refused(write(adata, tmp_path / "cells.h5ad"), f"cells.h5ad {says}")


def short_x(file):
    file["X"].attrs["shape"] = (29, N_GENES)


def narrow_raw(file):
    file["raw/X"].attrs["shape"] = (N_CELLS, 11)


def without_index(file):
    del file["obs/_index"]


def without_data(file):
    del file["X/data"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (short_x, "cells.h5ad is damaged: X has 29 cells and 8 genes, but obs has 30 and var 8"),
        (narrow_raw, "cells.h5ad is damaged: raw has 30 cells and 11 genes, but obs has 30 and var 12"),
        (without_index, r"cells.h5ad cannot be read as h5ad, it may be damaged \(.*_index"),
        (without_data, r"cells.h5ad cannot be read as h5ad, it may be damaged \(.*data"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, says):
    path = write(given_cells(), tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        change(file)
    refused(path, says)


def test_damage_that_shows_later_is_an_error_too(tmp_path):
    path = write(given_cells(), tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        file["X/indices"][7] = N_GENES
        del file["obsm/X_umap"], file["obs/n"]
        write_elem(file["obsm"], "X_umap", np.ones((29, 2)))
        write_elem(file["obs"], "n", np.ones(29))
    query = open_query(path)
    with pytest.raises(SourceError, match=r"cells.h5ad cannot be read as h5ad, it may be damaged"):
        query.matrices["X"].rows(slice(0, 5))
    with pytest.raises(SourceError, match=r"cells.h5ad cannot be read as h5ad, it may be damaged"):
        query.obs_column("n")
    with pytest.raises(SourceError, match=r"cells.h5ad is damaged: obsm/X_umap has 29 cells, but obs has 30"):
        query.picture()


def test_a_damaged_zarr_store_is_refused(tmp_path):
    path = write(given_cells(), tmp_path / "cells.zarr", zarr_format=3)
    (path / "zarr.json").write_text("{")
    refused(path, r"cells.zarr cannot be read as zarr, it may be damaged")


@pytest.mark.parametrize(
    ("lacking", "says"),
    [
        ("barcodes.tsv", "no barcodes.tsv, with or without .gz"),
        ("features.tsv", "no features.tsv or genes.tsv, with or"),
    ],
)
def test_a_10x_folder_that_lacks_a_file_is_refused(tmp_path, lacking, says):
    path = write_tenx_folder(tmp_path / "cells", packed=False)
    (path / lacking).unlink()
    refused(path, f"the folder .*cells has a matrix.mtx, but {says}")


def test_damaged_10x_output_is_refused(tmp_path):
    path = write_tenx_folder(tmp_path / "cells", packed=False)
    (path / "barcodes.tsv").write_text("a\nb\n")
    refused(path, "matrix.mtx has 8 genes and 30 cells, but features.tsv has 8 lines and barcodes.tsv 2")
    (path / "matrix.mtx").write_text("1 2 3\n")
    refused(path, "cells cannot be read as a 10x folder, it may be damaged")
    with h5py.File(write_tenx(tmp_path / "cells.h5"), "r+") as file:
        file["matrix/shape"][:] = [N_GENES, 29]
    refused(tmp_path / "cells.h5", "cells.h5 is damaged: X has 29 cells and 8 genes, but obs has 30 and var 8")


def test_a_10x_file_of_several_genomes_is_refused(tmp_path):
    path = write_tenx(tmp_path / "cells.h5", 2)
    write_tenx(path, 2, genome="mm10")
    refused(path, r"cells.h5 has the cells of several genomes: GRCh38, mm10; .*\(scanpy.read_10x_h5\(..., genome='GRC")


def test_arrays_that_are_not_in_memory_are_refused_by_their_kind():
    class Array:
        """Stands for a dask array; dask need not be installed."""

    Array.__module__ = "dask.array.core"
    adata = given_cells()
    adata._X = Array()
    says = "the given AnnData: X is a dask Array, which is not read; give it as a numpy array or a scipy CSR matrix"
    refused(adata, re.escape(says))


def test_a_query_closes_its_file(tmp_path):
    for path in (write(given_cells(), tmp_path / "cells.h5ad"), write_tenx(tmp_path / "cells.h5")):
        with open_query(path) as query:
            query.matrices["X"].rows(slice(1))
        with h5py.File(path, "r+") as file:  # refused while it is open to be read
            file.attrs["changed"] = True
