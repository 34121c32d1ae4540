"""h5ad files as a source of cells; the oracle is anndata and scipy on the same cells."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from hce_jax.errors import SourceError
from hce_jax.store import matrices, raw_counts
from hce_jax.store.cell_source import TERM_COLUMN, TEXT_COLUMNS
from hce_jax.store.h5ad import H5adColumns, H5adSource

N_GENES = 17
LABELS = {"T cell": "CL:0000084", "neuron": "CL:0000540", "B cell": "CL:0000236"}


def ids_of(genes):
    return [f"ENSG{gene:011d}" for gene in genes]


def counts_of(cells, genes):
    """Every count tells its cell and its gene; a third is zero."""
    cell, gene = np.asarray(cells)[:, None] + 1, np.asarray(genes)[None] + 1
    return np.where((cell + gene) % 3 == 0, 0, 100 * cell + gene).astype(np.float32)


def cells_of(cells, genes=range(N_GENES)):
    cells = np.asarray(cells)
    labels = np.array(list(LABELS))[cells % 3]
    obs = pd.DataFrame({
        "cell_type": pd.Categorical(labels),
        TERM_COLUMN: pd.Categorical([LABELS[label] for label in labels]),
        "donor_id": pd.Categorical([f"donor {cell % 4}" for cell in cells]),
        "dataset_id": pd.Categorical([f"study {cell // 10}" for cell in cells]),
        "assay": pd.Categorical(np.where(cells % 2, "10x 3' v2", "10x 3' v3")),
        "is_primary_data": cells % 5 > 0,
        "soma_joinid": 1_000 + 3 * cells,
    }, index=[f"cell {cell}" for cell in cells])  # fmt: skip
    var = pd.DataFrame({"feature_name": [f"G{gene}" for gene in genes]}, index=ids_of(genes))
    return anndata.AnnData(sparse.csr_array(counts_of(cells, genes)), obs, var)


def counts(source, rows, genes=range(N_GENES)):
    alignments = source.align(ids_of(genes), [f"G{gene}" for gene in genes])
    found = source.read_counts(np.asarray(rows, np.int64), alignments)
    assert isinstance(found, sparse.csr_array)
    assert found.dtype == np.float32
    assert found.has_canonical_format
    assert (found.data != 0).all()
    return found.toarray()


def obs_of(source):
    return pd.concat([batch.astype({"row": object}) for batch in source.obs_batches()], ignore_index=True)


# --- counts -----------------------------------------------------------------------------------------------------------

KINDS = {
    "by cell": sparse.csr_matrix,
    "by gene": sparse.csc_matrix,
    "in full": lambda x: x.toarray(),
    "by cell, 64-bit integers": lambda x: sparse.csr_matrix(x).astype(np.int64),
    "in full, 16-bit integers": lambda x: x.toarray().astype(np.uint16),
    "by cell, doubles": lambda x: sparse.csr_matrix(x).astype(np.float64),
}
ROWS = (range(40), [7], [0, 39], range(11, 29), [1, 3, 4, 17, 19, 21, 30, 38])


@pytest.fixture
def small_reads(monkeypatch):
    """Let some dozen counts be many."""
    monkeypatch.setattr(matrices, "_VALUES_AT_A_TIME", 50)
    monkeypatch.setattr(matrices, "_GAP", 20)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_counts_are_those_that_anndata_reads(tmp_path, small_reads, kind, compression):
    adata = cells_of(range(40))
    adata.X = kind(adata.X)
    adata.write_h5ad(tmp_path / "cells.h5ad", compression=compression)
    source, whole = H5adSource.open(tmp_path / "cells.h5ad"), anndata.read_h5ad(tmp_path / "cells.h5ad")
    for rows in ROWS:
        read = whole[list(rows)].X
        expected = read.toarray() if sparse.issparse(read) else read
        assert (counts(source, rows) == expected).all()
        assert (expected == counts_of(rows, range(N_GENES))).all()


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_matrix])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64])
def test_places_of_genes_may_be_integers_of_any_kind(tmp_path, kind, dtype):
    adata = cells_of(range(40))
    adata.X = kind(adata.X)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        places = file["X/indices"][:]
        del file["X/indices"]
        file["X/indices"] = places.astype(dtype)
    assert (counts(H5adSource.open(tmp_path), [3, 4, 30]) == counts_of([3, 4, 30], range(N_GENES))).all()


def test_nothing_but_the_stretches_that_hold_the_cells_is_read(tmp_path, small_reads, monkeypatch):
    cells_of(range(40)).write_h5ad(tmp_path / "cells.h5ad")
    read, get = [], h5py.Dataset.__getitem__

    def reading(dataset, *args):
        values = get(dataset, *args)
        if dataset.name == "/X/data":
            read.append(len(values))
        return values

    source = H5adSource.open(tmp_path / "cells.h5ad")
    monkeypatch.setattr(h5py.Dataset, "__getitem__", reading)
    counts(source, [3, 20, 21, 22, 39])
    assert read == [11, 34, 11]  # 11 or 12 values a cell: cell 3; 20 to 22; 39
    read.clear()
    counts(source, range(40))
    assert sum(read) == 453
    assert max(read) <= 50 + 12
    assert len(read) == 9


def test_stretches_end_before_wide_gaps_and_when_they_hold_much(monkeypatch):
    monkeypatch.setattr(matrices, "_VALUES_AT_A_TIME", 100)
    monkeypatch.setattr(matrices, "_GAP", 30)
    start = np.array([0, 10, 51, 82, 95, 105, 300])
    stop = np.array([10, 20, 60, 95, 105, 200, 310])
    assert matrices._stretches(start, stop) == [slice(0, 2), slice(2, 5), slice(5, 6), slice(6, 7)]


@pytest.mark.parametrize("genes", [range(N_GENES), [3, 0, 16, 5], [4, 99]], ids=["all", "some", "one it lacks"])
def test_files_with_other_genes_in_another_order_are_read_in_ours(tmp_path, genes):
    files = {"b": (range(12), range(N_GENES)), "a": (range(12, 19), range(N_GENES)[::-1]), "c": ([19], [4, 2, 3, 16])}
    for name, (cells, its_genes) in files.items():
        cells_of(cells, its_genes).write_h5ad(tmp_path / f"{name}.h5ad")
    source = H5adSource.open([tmp_path / "b.h5ad", tmp_path / "a.h5ad", tmp_path / "c.h5ad"])
    expected = counts_of(range(20), genes)
    expected[:, np.isin(genes, 99)] = 0
    expected[19, ~np.isin(genes, [4, 2, 3, 16])] = 0
    assert (counts(source, range(20), genes) == expected).all()
    for rows in ([11, 12], [0, 13, 19], [18], [15, 16, 17]):
        assert (counts(source, rows, genes) == expected[rows]).all()
    assert counts(source, [], genes).shape == (0, len(genes))


def with_layers(path):
    """Write the counts in a layer and in raw, whose genes lie in another order and are more."""
    adata = cells_of(range(9), [2, 1, 0])
    full = cells_of(range(9))
    adata.raw = full
    adata.layers["counts"] = sparse.csc_matrix(adata.X * 2)
    adata.X = np.asarray(counts_of(range(9), [2, 1, 0])) * 3
    adata.write_h5ad(path)


@pytest.mark.parametrize(
    ("counts_in", "factor", "genes_of"),
    [(None, 1, range(N_GENES)), ("raw", 1, range(N_GENES)), ("X", 3, range(3)), ("counts", 2, range(3))],
)
def test_the_matrix_is_raw_where_there_is_one_or_the_one_named(tmp_path, counts_in, factor, genes_of):
    with_layers(tmp_path / "cells.h5ad")
    source = H5adSource.open(tmp_path / "cells.h5ad", H5adColumns(counts=counts_in))
    expected = factor * counts_of([1, 8], range(N_GENES))
    expected[:, ~np.isin(range(N_GENES), genes_of)] = 0
    assert (counts(source, [1, 8]) == expected).all()
    assert source.about()["h5ad"][0]["counts"] == (counts_in or "raw")
    assert len(source.genes()) == len(genes_of)


LOOKS = {
    "counts": lambda x: x,
    "other counts": lambda x: x * 2,
    "counts as integers": lambda x: x.astype(np.int64),
    "normalised": lambda x: np.log1p(x),
    "scaled": lambda x: x - 100,
    "corrected": lambda x: x * np.float32(0.75),
    "not finite": lambda x: np.where(x == 101, np.inf, x),
    "NaN": lambda x: np.where(x == 101, np.nan, x),
    "empty": lambda x: x * 0,
}
LOG = "not whole numbers, 0 to 6.82"


@pytest.mark.parametrize(
    ("looks", "taken", "said"),
    [
        ({"X": "counts"}, "X", None),
        ({"X": "counts as integers"}, "X", None),
        ({"X": "corrected"}, "X", None),
        ({"X": "empty"}, "X", None),
        ({"X": "empty", "counts": "counts"}, "counts", "layers/counts (X: only zeros)"),
        ({"X": "empty", "a": "normalised"}, "X", f"X (layers/a: {LOG})"),
        ({"X": "empty", "a": "corrected"}, "a", "layers/a (X: only zeros)"),
        ({"raw": "counts", "X": "normalised"}, "raw", "raw (not looked at: X)"),
        ({"raw": "normalised", "X": "counts"}, "X", f"X (raw: {LOG})"),
        ({"X": "normalised", "a": "other counts", "counts": "counts"}, "counts",
         f"layers/counts (X: {LOG}; not looked at: layers/a)"),
        ({"X": "scaled", "raw": "normalised", "a": "normalised", "b": "counts"}, "b",
         f"layers/b (raw: {LOG}; X: whole numbers, -100 to 817; layers/a: {LOG})"),
        ({"X": "not finite", "a": "counts"}, "a", "layers/a (X: values that are not finite)"),
        ({"X": "NaN", "a": "counts"}, "a", "layers/a (X: values that are not finite)"),
        ({"X": "corrected", "a": "counts"}, "a", "layers/a (X: not whole numbers, 0 to 688)"),
        ({"X": "corrected", "a": "normalised"}, "X", f"X (layers/a: {LOG})"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_raw_counts_are_looked_for_in_raw_x_and_the_layers(tmp_path, capsys, looks, taken, said):
    adata, x = cells_of(range(9)), counts_of(range(9), range(N_GENES))
    made = {name: sparse.csr_matrix(LOOKS[look](x)) for name, look in looks.items()}
    adata.X = made.pop("X")
    if "raw" in made:
        adata.raw = anndata.AnnData(made.pop("raw"), adata.obs, adata.var)
    for name, matrix in made.items():
        adata.layers[name] = matrix
    adata.write_h5ad(tmp_path / "cells.h5ad")
    source = H5adSource.open(tmp_path)
    assert capsys.readouterr().err == (f"cells.h5ad: raw counts taken from {said}\n" if said else "")
    assert source.about()["h5ad"][0]["counts"] == taken
    assert (counts(source, [3, 8]) == LOOKS[looks[taken]](x)[[3, 8]]).all()


@pytest.mark.parametrize(
    ("looks", "says"),
    [
        ({"X": "normalised"}, f"X: {LOG}"),
        ({"X": "scaled", "counts": "normalised"}, f"X: whole numbers, -100 to 817; layers/counts: {LOG}"),
        ({"X": "NaN", "a": "not finite"}, "X: values that are not finite; layers/a: values that are not finite"),
    ],
)
def test_a_file_without_raw_counts_is_refused_with_what_was_seen_unless_a_matrix_is_named(tmp_path, looks, says):
    adata, x = cells_of(range(9)), counts_of(range(9), range(N_GENES))
    for name, look in looks.items():
        if name == "X":
            adata.X = LOOKS[look](x)
        else:
            adata.layers[name] = LOOKS[look](x)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    refused(re.escape(f"cells.h5ad has no raw counts; looked in {says}; get them from "), tmp_path)
    H5adSource.open(tmp_path, H5adColumns(counts="X"))


def test_files_of_which_the_same_is_to_be_said_share_a_line(tmp_path, capsys):
    for name in ("a", "b", "c"):
        adata = cells_of(range(4))
        adata.raw = adata
        adata.X = np.log1p(adata.X.toarray())
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    H5adSource.open(tmp_path)
    assert capsys.readouterr().err == "a.h5ad and 2 more: raw counts taken from raw (not looked at: X)\n"


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
def test_few_values_tell_where_the_raw_counts_are(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(raw_counts, "_LOOKED_AT", 50)
    adata = cells_of(range(40))
    adata.X = kind(adata.X.toarray())
    adata.write_h5ad(tmp_path / "cells.h5ad")
    read, get = [], h5py.Dataset.__getitem__

    def reading(dataset, *args):
        values = get(dataset, *args)
        if dataset.name in ("/X/data", "/X"):
            read.append(values.size)
        return values

    monkeypatch.setattr(h5py.Dataset, "__getitem__", reading)
    H5adSource.open(tmp_path)
    assert read == [51 if kind is np.asarray else 50]  # of 680 and 453; three rows of 17 genes


def test_a_layer_called_raw_is_raw_where_there_is_no_other(tmp_path):
    adata = cells_of(range(4))
    adata.layers["raw"] = adata.X * 5
    adata.write_h5ad(tmp_path / "cells.h5ad")
    for columns in (H5adColumns(), H5adColumns(counts="raw")):
        found = counts(H5adSource.open(tmp_path, columns), range(4))
        assert (found == 5 * counts_of(range(4), range(N_GENES))).all()


def test_stored_zeros_unsorted_genes_and_entries_in_two_pieces_do_no_harm(tmp_path):
    adata = cells_of(range(2), range(4))
    adata.X = sparse.csr_matrix((np.float32([5, 0, 1, 2, 7, 3]), [3, 1, 0, 0, 2, 0], [0, 4, 6]), shape=(2, 4))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    expected = [[3, 0, 0, 5], [3, 0, 7, 0]]
    assert counts(H5adSource.open(tmp_path / "cells.h5ad"), [0, 1], range(4)).tolist() == expected


def test_rows_that_do_not_ascend_or_do_not_exist_are_refused(tmp_path):
    cells_of(range(5)).write_h5ad(tmp_path / "cells.h5ad")
    source = H5adSource.open(tmp_path / "cells.h5ad")
    for rows in ([1, 0], [2, 2], [-1, 0], [4, 5]):
        with pytest.raises(ValueError, match="the rows must ascend and lie between 0 and 4"):
            counts(source, rows)


def test_a_file_kept_by_gene_is_read_once_which_is_said_whatever_the_threads(tmp_path, capsys, monkeypatch):
    for name, kind in (("a", sparse.csc_matrix), ("b", sparse.csr_matrix)):
        adata = cells_of(range(30))
        adata.X = kind(adata.X)
        del adata.obs["soma_joinid"]
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    source = H5adSource.open(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        for rows, found in enumerate(pool.map(lambda row: counts(source, [row, row + 30]), range(30))):
            assert (found == counts_of([rows, rows], range(N_GENES))).all()
    said = capsys.readouterr().err.splitlines()
    assert said == ["a.h5ad keeps X by gene (CSC): all of it is read into memory"]


# --- values that are no raw counts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, -0.5, np.nan, np.inf])
def test_negative_and_non_finite_values_are_an_error_that_names_the_other_matrices(tmp_path, value):
    adata = cells_of(range(6))
    adata.layers["counts"] = adata.X.copy()
    adata.X.data[[3, 40]] = value
    adata.write_h5ad(tmp_path / "cells.h5ad")
    source = H5adSource.open(tmp_path / "cells.h5ad", H5adColumns(counts="X"))
    n_values = adata.X.nnz
    expected = f"cells.h5ad: 2 of {n_values} values read from X are negative or not finite (first: {value:g}); raw "
    expected += "counts are needed; name another matrix (--counts): it has counts"
    with pytest.raises(SourceError, match=re.escape(expected)):
        counts(source, range(6))
    assert (counts(source, [1]) == counts_of([1], range(N_GENES))).all()  # the bad ones lie in other cells


@pytest.mark.parametrize(
    ("factor", "others", "said"),
    [
        (0.5, (), "cells.h5ad: X has counts that are not whole numbers; they are kept as they are"),
        (0.01, (), "cells.h5ad: X looks normalised already (its values are not whole numbers, and the largest of the "
                   "first cells is 2.17); it is taken for raw counts; it has no other matrix"),
        (0.01, ("counts",), "cells.h5ad: X looks normalised already (its values are not whole numbers, and the largest "
                            "of the first cells is 2.17); it is taken for raw counts; name another matrix (--counts): "
                            "it has counts"),
    ],
)  # fmt: skip
def test_counts_that_are_not_whole_are_kept_which_is_said_once(tmp_path, capsys, factor, others, said):
    adata = cells_of(range(6))
    for name in others:
        adata.layers[name] = adata.X
    adata.X = adata.X * np.float32(factor)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    source = H5adSource.open(tmp_path / "cells.h5ad", H5adColumns(counts="X"))
    for rows in ([0, 1], range(6), [5]):
        expected = counts_of(rows, range(N_GENES)) * np.float32(factor)
        np.testing.assert_array_equal(counts(source, rows), expected)
    assert capsys.readouterr().err.splitlines() == [said]


# --- obs --------------------------------------------------------------------------------------------------------------


def test_obs_is_what_the_files_say_of_their_cells_one_file_after_the_other(tmp_path):
    parts = {"2.h5ad": range(12), "1.h5ad": range(12, 31)}
    for name, cells in parts.items():
        cells_of(cells).write_h5ad(tmp_path / name)
    source = H5adSource.open([tmp_path / name for name in parts])
    batches = list(source.obs_batches())
    expected = pd.concat([cells_of(cells).obs for cells in parts.values()], ignore_index=True)
    for batch in batches:
        assert batch["row"].dtype == batch["soma_joinid"].dtype == np.int64
        assert batch["is_primary_data"].dtype == bool
        for name in (*TEXT_COLUMNS, TERM_COLUMN):
            assert list(batch[name].cat.categories) == sorted(set(batch[name])), name
        assert set(batch) == {"row", "soma_joinid", "is_primary_data", *TEXT_COLUMNS, TERM_COLUMN}
    obs = obs_of(source)
    assert obs["row"].tolist() == list(range(31))
    for name in ("soma_joinid", "is_primary_data", "cell_type", TERM_COLUMN, "donor_id", "dataset_id", "assay"):
        assert obs[name].tolist() == expected[name].tolist(), name
    for name in ("development_stage", "disease", "tissue", "tissue_general"):
        assert set(obs[name]) == {"unknown"}


def test_columns_go_by_the_names_that_are_given(tmp_path):
    adata = cells_of(range(6))
    adata.obs["cluster"] = pd.Categorical(["a", "b", None, "a", "", "b"])
    adata.obs["patient"] = [7, 7, 8, 8, 9, 9]
    adata.obs["project"] = ["x", "y", None, "x", "y", "z"]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    (batch,) = H5adSource.open(
        tmp_path / "cells.h5ad", H5adColumns(label="cluster", donor="patient", dataset="project")
    ).obs_batches()
    assert batch["cell_type"].tolist() == ["a", "b", "unknown", "a", "unknown", "b"]
    assert batch["donor_id"].tolist() == ["7", "7", "8", "8", "9", "9"]
    assert batch["dataset_id"].tolist() == ["x", "y", "unknown", "x", "y", "z"]
    assert list(batch["cell_type"].cat.categories) == ["a", "b", "unknown"]
    assert TERM_COLUMN not in batch


def test_terms_are_given_if_every_file_has_them(tmp_path):
    cells_of(range(4)).write_h5ad(tmp_path / "a.h5ad")
    adata = cells_of(range(4, 6))
    del adata.obs[TERM_COLUMN]
    adata.write_h5ad(tmp_path / "b.h5ad")
    assert all(TERM_COLUMN not in batch for batch in H5adSource.open(tmp_path).obs_batches())
    assert TERM_COLUMN in obs_of(H5adSource.open(tmp_path / "a.h5ad"))


def test_a_file_without_studies_is_one_and_its_cells_are_primary_data(tmp_path):
    for name in ("first", "second"):
        adata = cells_of(range(3))
        adata.obs = adata.obs[["cell_type", "donor_id"]]
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    obs = obs_of(H5adSource.open(tmp_path))
    assert obs["dataset_id"].tolist() == ["first"] * 3 + ["second"] * 3
    assert obs["is_primary_data"].all()
    assert set(obs["assay"]) == {"unknown"}


@pytest.mark.parametrize(
    "values", [[True, False, True], ["True", "False", "True"], [1, 0, 1], ["TRUE", "FALSE", "TRUE"],
               pd.array([True, False, True], "boolean")],
    ids=["bool", "text", "numbers", "text of R", "nullable"],
)  # fmt: skip
def test_primary_data_may_be_said_in_several_ways(tmp_path, values):
    adata = cells_of(range(3))
    adata.obs["is_primary_data"] = values
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert obs_of(H5adSource.open(tmp_path))["is_primary_data"].tolist() == [True, False, True]


def without(adata, name):
    adata.obs = adata.obs.drop(columns=name)


def as_text(adata, name):
    adata.obs[name] = adata.obs[name].astype(str)


def repeated(adata, name):
    adata.obs[name] = 1_000


@pytest.mark.parametrize("change", [without, as_text, repeated])
def test_cells_are_numbered_unless_all_files_have_ids_that_tell_them_apart(tmp_path, change):
    cells_of(range(4)).write_h5ad(tmp_path / "a.h5ad")
    cells_of(range(4, 6)).write_h5ad(tmp_path / "b.h5ad")
    assert obs_of(H5adSource.open(tmp_path))["soma_joinid"].tolist() == [1000, 1003, 1006, 1009, 1012, 1015]
    adata = cells_of(range(4, 6))
    change(adata, "soma_joinid")
    adata.write_h5ad(tmp_path / "b.h5ad")
    assert obs_of(H5adSource.open(tmp_path))["soma_joinid"].tolist() == list(range(6))


def test_the_split_is_given_where_its_column_is_named(tmp_path):
    adata = cells_of(range(4))
    adata.obs["fold"] = ["train", "val", "test", "train"]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert obs_of(H5adSource.open(tmp_path, H5adColumns(split="fold")))["split"].tolist() == list(adata.obs["fold"])
    assert "split" not in obs_of(H5adSource.open(tmp_path))
    adata.obs["fold"] = ["train", "valid", "test", "train"]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    source = H5adSource.open(tmp_path, H5adColumns(split="fold"))
    with pytest.raises(SourceError, match=r"cells.h5ad: fold is 'valid' for some cells, not one of train, val, test"):
        list(source.obs_batches())


# --- genes ------------------------------------------------------------------------------------------------------------


def test_genes_are_those_of_all_files_in_order_of_appearance_without_versions(tmp_path):
    for name, genes, suffix in (("a", [3, 1], ".4"), ("b", [1, 2, 0], ""), ("c", [3, 5], ".7")):
        adata = cells_of(range(2), genes)
        adata.var_names = [each + suffix for each in adata.var_names]
        adata.var["feature_type"] = ["protein_coding", *["lncRNA"] * (len(genes) - 1)]
        del adata.obs["soma_joinid"]
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    genes = H5adSource.open(tmp_path).genes()
    assert genes["feature_id"].tolist() == ids_of([3, 1, 2, 0, 5])
    assert genes["feature_name"].tolist() == ["G3", "G1", "G2", "G0", "G5"]
    assert genes["feature_type"].tolist() == ["protein_coding", "lncRNA", "lncRNA", "lncRNA", "lncRNA"]
    del adata.var["feature_type"]
    adata.write_h5ad(tmp_path / "c.h5ad")
    assert set(H5adSource.open(tmp_path).genes()) == {"feature_id", "feature_name"}


@pytest.mark.parametrize(
    ("columns", "index", "gene", "ids", "names"),
    [
        ({}, ["CD4", "CD8A"], None, ["CD4", "CD8A"], ["CD4", "CD8A"]),
        ({"gene_symbols": ["CD4", None]}, ["E1", "E2"], None, ["E1", "E2"], ["CD4", "E2"]),
        ({"feature_id": ["E1", "E2"]}, ["CD4", "CD8A"], None, ["E1", "E2"], ["E1", "E2"]),
        ({"feature_id": ["E1", "E2"], "ens": ["F1", None]}, ["CD4", "CD8A"], "ens", ["F1", "CD8A"], ["F1", "CD8A"]),
        ({"feature_name": pd.Categorical(["CD4", "CD8A"])}, ["E1", "E2"], None, ["E1", "E2"], ["CD4", "CD8A"]),
    ],
)
def test_ids_and_names_of_genes_come_from_where_they_are(tmp_path, columns, index, gene, ids, names):
    adata = cells_of(range(3), [5, 6])
    adata.var = pd.DataFrame(columns, index=index)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    source = H5adSource.open(tmp_path, H5adColumns(gene=gene))
    assert source.genes()[["feature_id", "feature_name"]].to_numpy().T.tolist() == [ids, names]
    found = source.read_counts(np.arange(3), source.align([ids[1], ids[0]], ["", ""])).toarray()
    assert (found == counts_of(range(3), [6, 5])).all()


def test_a_gene_that_is_there_twice_is_an_error_only_if_it_is_asked_for(tmp_path):
    adata = cells_of(range(3), [5, 6, 7])
    adata.var["ens"] = ids_of([5, 6, 6])
    adata.write_h5ad(tmp_path / "cells.h5ad")
    source = H5adSource.open(tmp_path, H5adColumns(gene="ens"))
    assert source.genes()["feature_id"].tolist() == ids_of([5, 6])
    assert (counts(source, range(3), [5]) == counts_of(range(3), [5])).all()
    with pytest.raises(SourceError, match=r"cells.h5ad has 1 genes more than once"):
        counts(source, range(3), [5, 6])


# --- what it is -------------------------------------------------------------------------------------------------------


def test_it_says_what_it_is_without_folders_and_differently_when_a_file_changes(tmp_path):
    for name in "ab":
        cells_of(range(3)).write_h5ad(tmp_path / f"{name}.h5ad")
    source = H5adSource.open(tmp_path)
    about = source.about()
    assert str(tmp_path) not in json.dumps(about)
    assert [each["file"] for each in about["h5ad"]] == ["a.h5ad", "b.h5ad"]
    assert about["h5ad"][0]["bytes"] == (tmp_path / "a.h5ad").stat().st_size
    assert about["columns"]["label"] == "cell_type"
    assert source.title == "2 h5ad files (a.h5ad, ...)"
    assert H5adSource.open(str(tmp_path / "b.h5ad")).title == "b.h5ad"
    assert H5adSource.open(tmp_path).about() == about
    cells_of(range(3)).write_h5ad(tmp_path / "b.h5ad")
    assert H5adSource.open(tmp_path).about() != about


# --- older files ------------------------------------------------------------------------------------------------------


def rewritten_as_of_anndata_07(path):
    """Rewrite obs and var with categories apart from their columns, as anndata 0.7 did."""
    with h5py.File(path, "r+") as file:
        for name in ("obs", "var"):
            new = file[name]
            old = file.create_group(f"{name}.old")
            old.attrs.update(dict(new.attrs) | {"encoding-version": "0.1.0"})
            for column, values in new.items():
                if isinstance(values, h5py.Group):
                    old[column] = values["codes"][:]
                    old[f"__categories/{column}"] = values["categories"][:]
                    old[column].attrs["categories"] = old[f"__categories/{column}"].ref
                else:
                    old[column] = values[:]  # which did not say what they are
            del file[name]
            file.move(f"{name}.old", name)


def written_as_by_anndata_06(path, adata):
    """Write tables of records, with categories in uns, and the old marks of a sparse matrix, as before anndata 0.7."""
    text = h5py.string_dtype()
    with h5py.File(path, "w") as file:
        for name, table in (("obs", adata.obs), ("var", adata.var)):
            categorical = [column for column in table if isinstance(table[column].dtype, pd.CategoricalDtype)]
            kinds = [("index", text)]
            kinds += [(column, "i1" if column in categorical else table[column].to_numpy().dtype) for column in table]
            kinds = [(column, text if kind is np.dtype(object) else kind) for column, kind in kinds]
            records = np.empty(len(table), kinds)
            records["index"] = table.index
            for column in table:
                records[column] = table[column].cat.codes if column in categorical else table[column]
                if column in categorical:
                    categories = np.array(table[column].cat.categories, object)
                    file.create_dataset(f"uns/{column}_categories", data=categories, dtype=text)
            file[name] = records
        for place, x in (("X", adata.X), ("raw.X", adata.X * 2)):
            group = file.create_group(place)
            group.attrs.update({"h5sparse_format": "csr", "h5sparse_shape": x.shape})
            for part in ("data", "indices", "indptr"):
                group[part] = getattr(x, part)
        file.copy("var", "raw.var")


def test_files_of_anndata_07_are_read(tmp_path):
    cells_of(range(20)).write_h5ad(tmp_path / "new.h5ad")
    cells_of(range(20)).write_h5ad(tmp_path / "old.h5ad")
    rewritten_as_of_anndata_07(tmp_path / "old.h5ad")
    old, new = H5adSource.open(tmp_path / "old.h5ad"), H5adSource.open(tmp_path / "new.h5ad")
    assert (counts(old, range(3, 9)) == counts_of(range(3, 9), range(N_GENES))).all()
    pd.testing.assert_frame_equal(obs_of(old), obs_of(new))
    pd.testing.assert_frame_equal(old.genes(), new.genes())


@pytest.mark.parametrize(("counts_in", "factor"), [(None, 2), ("X", 1)])
def test_files_from_before_anndata_07_are_read(tmp_path, counts_in, factor):
    adata = cells_of(range(20))
    written_as_by_anndata_06(tmp_path / "old.h5ad", adata)
    old = H5adSource.open(tmp_path / "old.h5ad", H5adColumns(counts=counts_in))
    assert (counts(old, range(3, 9)) == factor * counts_of(range(3, 9), range(N_GENES))).all()
    for name in ("cell_type", "donor_id", "dataset_id", "soma_joinid", "is_primary_data", TERM_COLUMN):
        assert obs_of(old)[name].tolist() == adata.obs[name].tolist(), name
    assert old.genes()["feature_name"].tolist() == adata.var["feature_name"].tolist()


# --- files that cannot be used ----------------------------------------------------------------------------------------


def refused(says, *args, **columns):
    with pytest.raises(SourceError, match=says) as caught:
        H5adSource.open(*args, H5adColumns(**columns))
    assert "\n" not in str(caught.value)


def test_what_is_no_h5ad_file_is_refused_by_name(tmp_path):
    (tmp_path / "text.h5ad").write_text("cell_type,donor_id\n")
    (tmp_path / "empty.h5ad").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".hidden.h5ad").write_bytes(b"")
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["matrix"] = [1]
    refused(r"absent.h5ad does not exist; name h5ad files or a folder", tmp_path / "absent.h5ad")
    refused(r"folder has no \*.h5ad files; name h5ad files or a folder that has some", tmp_path / "folder")
    refused(r"no h5ad files were named", [])
    refused(r"text.h5ad cannot be read as h5ad, it may be damaged \(.*signature", tmp_path / "text.h5ad")
    refused(r"empty.h5ad cannot be read as h5ad", tmp_path / "empty.h5ad")
    refused(r"other.h5ad is an HDF5 file, but no h5ad file: it has no obs and var", tmp_path / "other.h5ad")


def test_a_file_given_twice_and_two_files_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        cells_of(range(3)).write_h5ad(tmp_path / folder / "cells.h5ad")
    (tmp_path / "link.h5ad").symlink_to(tmp_path / "a" / "cells.h5ad")
    file = tmp_path / "a" / "cells.h5ad"
    refused(r"a/cells.h5ad is given twice; give each file once", [file, file])
    refused(r"a/cells.h5ad is given twice", [file, tmp_path / "a"])
    refused(r"link.h5ad is given twice", [file, tmp_path / "link.h5ad"])
    refused(r"b/cells.h5ad and .*a/cells.h5ad have the same name, and files go by it", [file, tmp_path / "b"])


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"label": "type"}, r"cells.h5ad has no column 'type' in obs; its columns are cell_type, .*soma_joinid; name "
                            r"the one with the cell types \(--label-column\)"),
        ({"donor": "who"}, r"no column 'who' in obs; .* the donors, who decide about the split \(--donor-column\)"),
        ({"dataset": "study"}, r"no column 'study' in obs; .* the studies \(--dataset-column\)"),
        ({"split": "fold"}, r"no column 'fold' in obs; .* the splits \(--split-column\)"),
        ({"gene": "ensembl"}, r"no column 'ensembl' in var; its columns are feature_name \(--gene-column\)"),
        ({"counts": "umi"}, r"cells.h5ad has no matrix 'umi'; it has X; name the one with raw counts \(--counts\)"),
        ({"counts": "raw"}, r"cells.h5ad has no matrix 'raw'; it has X"),
    ],
)  # fmt: skip
def test_what_is_named_and_not_there_is_an_error_that_says_what_is(tmp_path, columns, says):
    cells_of(range(3)).write_h5ad(tmp_path / "cells.h5ad")
    refused(says, tmp_path, **columns)


def test_a_file_without_donors_is_refused(tmp_path):
    adata = cells_of(range(3))
    without(adata, "donor_id")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    refused(r"cells.h5ad has no column 'donor_id' in obs; .*\(--donor-column\)", tmp_path)


def no_matrix(file):
    del file["X"]


def a_table(file):
    del file["X"]
    file.copy("var", "X")


def a_list(file):
    del file["X"]
    file["X"] = np.ones(5)


def of_words(file):
    del file["X"]
    file["X"] = np.full((5, N_GENES), b"word")


def short(file):
    file["X"].attrs["shape"] = (4, N_GENES)


def narrow(file):
    file["X"].attrs["shape"] = (5, N_GENES - 1)


def without_data(file):
    del file["X/data"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (no_matrix, "cells.h5ad has no matrix 'X'; it has none"),
        (a_table, "cells.h5ad has no matrix 'X'; it has none"),
        (a_list, "cells.h5ad has no matrix 'X'; it has none"),
        (of_words, r"cells.h5ad has no raw counts; looked in X: no numbers; .*\(--counts\)"),
        (short, "cells.h5ad is damaged: X has 4 cells and 17 genes, but obs has 5 and var 17"),
        (narrow, "cells.h5ad is damaged: X has 5 cells and 16 genes, but obs has 5 and var 17"),
        (without_data, r"cells.h5ad cannot be read as h5ad, it may be damaged \(.*data"),
    ],
)
def test_a_matrix_that_is_none_or_of_another_size_is_refused(tmp_path, change, says):
    cells_of(range(5)).write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        change(file)
    refused(says, tmp_path)


def test_a_named_matrix_without_numbers_is_refused(tmp_path):
    cells_of(range(5)).write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        of_words(file)
    refused(r"cells.h5ad: X is no matrix of numbers; name another \(--counts\)", tmp_path, counts="X")


def gene_out_of_range(file):
    file["X/indices"][7] = N_GENES


def gene_below_zero(file):
    file["X/indices"][7] = -1


def ends_too_late(file):
    file["X/indptr"][-1] += 5


def ends_before_it_starts(file):
    file["X/indptr"][3] = 1


@pytest.mark.parametrize("change", [gene_out_of_range, gene_below_zero, ends_too_late, ends_before_it_starts])
@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_matrix])
def test_a_damaged_matrix_is_noticed_when_it_is_read(tmp_path, change, kind):
    adata = cells_of(range(5))
    adata.X = kind(adata.X)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        change(file)
    source = H5adSource.open(tmp_path)
    for rows in (range(5), [0, 2, 4]):
        with pytest.raises(SourceError, match=r"cells.h5ad cannot be read as h5ad, it may be damaged"):
            counts(source, rows)


def test_a_damaged_column_is_noticed_when_it_is_read(tmp_path):
    cells_of(range(5)).write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        codes = file["obs/donor_id/codes"][:4]
        del file["obs/donor_id/codes"]
        file["obs/donor_id/codes"] = codes
        file["obs/donor_id/codes"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    with pytest.raises(SourceError, match=r"cells.h5ad cannot be read as h5ad, it may be damaged"):
        obs_of(H5adSource.open(tmp_path))


def test_a_truncated_file_is_refused(tmp_path):
    cells_of(range(200)).write_h5ad(tmp_path / "cells.h5ad")
    data = (tmp_path / "cells.h5ad").read_bytes()
    (tmp_path / "cells.h5ad").write_bytes(data[: len(data) // 2])
    refused(r"cells.h5ad cannot be read as h5ad", tmp_path)


def test_primary_data_that_is_neither_true_nor_false_is_an_error(tmp_path):
    adata = cells_of(range(4))
    adata.obs["is_primary_data"] = ["True", "maybe", "no", "False"]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(SourceError, match=r"cells.h5ad: is_primary_data is neither true nor false for 2 cells"):
        obs_of(H5adSource.open(tmp_path))


def test_genes_of_which_none_is_asked_for_are_an_error_that_names_the_file(tmp_path):
    cells_of(range(3)).write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(SourceError, match=r"none of the 17 genes of cells.h5ad"):
        H5adSource.open(tmp_path).align(["MOUSE1"], ["Cd4"])


# --- real cells -------------------------------------------------------------------------------------------------------


def test_real_cells_are_those_that_anndata_reads(real_dir):
    source = H5adSource.open(real_dir / "h5ad_raw")
    files = sorted((real_dir / "h5ad_raw").glob("*.h5ad"))
    whole = anndata.concat([anndata.read_h5ad(path) for path in files], join="outer", fill_value=0)
    genes = whole.var_names[::7]
    rows = np.sort(np.random.default_rng(0).choice(whole.n_obs, 500, replace=False))
    found = source.read_counts(rows, source.align(list(genes), list(genes)))
    assert (found != sparse.csr_array(whole[rows, genes].X)).nnz == 0
    obs = obs_of(source)
    assert obs["soma_joinid"].tolist() == whole.obs["soma_joinid"].tolist()
    assert obs["cell_type"].tolist() == whole.obs["cell_type"].tolist()
    assert len(source.genes()) == whole.n_vars
