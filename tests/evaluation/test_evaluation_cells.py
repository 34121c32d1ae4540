"""Cells to evaluate on: which of a source, under which label, and what their blocks hold."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from memory_source import MemorySource, cells_of, counts_of, genes_of
from scipy import sparse
from stores import FIRST_CELL, LABELS, SIZES, expression, label_of, write_tiny_store
from stores import cells_of as cells_of_store

from hce_jax.errors import SourceError, StoreError
from hce_jax.evaluation import cells as cells_module
from hce_jax.evaluation.cells import OBS_COLUMNS, SourceCells, StoreCells
from hce_jax.hierarchy.cell_ontology import CellOntology, Term
from hce_jax.store import SideFiles, convert, open_store
from hce_jax.store.cell_source import TERM_COLUMN, TEXT_COLUMNS
from hce_jax.store.h5ad import H5adSource

TERMS = {
    "CL:0000001": Term("T cell", synonyms=("T lymphocyte",)),
    "CL:0000002": Term("B cell"),
    "CL:0000003": Term("neuron", synonyms=("nerve cell",)),
    "CL:0000004": Term("obsolete old T cell", obsolete=True, replaced_by="CL:0000001"),
}
ONTOLOGY = CellOntology("2026-01-01", "the tests", TERMS)
N_CELLS, N_GENES = 60, 11
#: What the cells are called, in turn; the label and the id by which a model with T cells, B cells and blobs finds them.
NAMES = (
    ("T cell", "CL:0000001", "T cell"),
    ("neuron", "CL:0000003", None),
    ("helper", "CL:0000001", "T cell"),  # by its id
    ("nerve cell", "CL:0000002", "B cell"),  # the id counts more than what the label stands for
    ("B cell", "CL:0000003", "B cell"),  # the same text counts more than the id
    ("old T cell", "unknown", "T cell"),  # nobody knows the id, so the label counts
    ("blob", "CL:7777777", "blob"),  # of which no ontology knows
    ("Blob", "unknown", None),
    ("unknown", "unknown", None),
)
TYPES = ("B cell", "T cell", "blob")


def all_cells(names=NAMES):
    cells = np.arange(N_CELLS)
    return pd.DataFrame({
        "cell": 3 * cells,
        "soma_joinid": 1_000 + 7 * cells,
        "is_primary_data": cells % 9 > 0,
        **{name: [f"{name} {cell % 4}" for cell in cells] for name in TEXT_COLUMNS},
        "donor_id": [f"donor {99 - cell}" for cell in cells],
        "dataset_id": [f"study {cell // 20}" for cell in cells],
        "cell_type": [names[cell % len(names)][0] for cell in cells],
        TERM_COLUMN: [names[cell % len(names)][1] for cell in cells],
    })  # fmt: skip


def source_of(obs=None, genes=range(N_GENES)[::-1], **options):
    """Make a source with genes in another order than the model's."""
    its_genes = genes_of(N_GENES).iloc[list(genes)].reset_index(drop=True)
    return MemorySource(all_cells() if obs is None else obs, its_genes, **options)


def side_files(labels=TYPES, cl_ids=None, n_genes=N_GENES):
    ids, names = (tuple(genes_of(n_genes)[name]) for name in ("feature_id", "feature_name"))
    return SideFiles(Path("model.ckpt"), ids, names, tuple(labels), cl_ids, np.eye(len(labels)), {})


def choose(source=None, side=None, dataset_ids=None):
    return SourceCells.choose(source or source_of(), side or side_files(), ONTOLOGY, dataset_ids)


def chosen(names=NAMES):
    """Choose in plain pandas."""
    obs = all_cells(names)
    meant = pd.Series([names[cell % len(names)][2] for cell in range(N_CELLS)])
    return obs[meant.notna()].assign(cell_type=meant[meant.notna()])


def table_of(cells):
    """Put together what the blocks say of their cells, in words."""
    blocks = [cells.read_block(index) for index in range(len(cells.block_sizes))]
    assert [len(block) for block in blocks] == cells.block_sizes.tolist()
    texts = {"cell_type": cells.side.labels, **cells.lookups}
    table = {name: np.concatenate([block.column(name) for block in blocks]) for name in ("soma_joinid", *texts)}
    words = {name: np.array(texts[name], object)[codes] for name, codes in table.items() if name in texts}
    return blocks, pd.DataFrame(table | words)


# --- which cells of a source, and their blocks ------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cells_module, "_BLOCK_SIZE", 16)


@pytest.mark.parametrize("batch_sizes", [(17, 0, 5), (1,), (N_CELLS,)])
def test_blocks_hold_the_cells_of_the_model_s_types_with_its_genes_in_order(batch_sizes):
    cells, expected = choose(source_of(batch_sizes=batch_sizes)), chosen()
    blocks, table = table_of(cells)
    assert cells.n_cells == len(expected) > 32
    assert cells.block_sizes.tolist() == [16, 16, len(expected) - 32]
    for name in ("soma_joinid", *TEXT_COLUMNS):
        assert table[name].tolist() == expected[name].tolist(), name
    counts = counts_of(expected["cell"], N_GENES)
    assert (np.concatenate([block.counts.toarray() for block in blocks]) == counts).all()
    x = np.log1p(counts * (1e4 / counts.sum(axis=1, keepdims=True)))
    np.testing.assert_allclose(np.concatenate([block.x.toarray() for block in blocks]), x, rtol=1e-6)
    assert cells.title == "memory"


def test_expression_is_scaled_over_the_genes_that_the_model_knows():
    side = side_files(n_genes=5)
    (block, *_), table = table_of(choose(source_of(), side))
    counts = counts_of((table["soma_joinid"][:16] - 1_000) // 7 * 3, N_GENES)[:, :5]
    assert (cells_of(block.counts) == (table["soma_joinid"][:16] - 1_000) // 7 * 3).all()
    np.testing.assert_allclose(block.column("scale"), 1e4 / counts.sum(axis=1), rtol=1e-6)


def test_texts_are_sorted_and_each_has_a_cell():
    cells = choose()
    assert set(cells.lookups) == set(OBS_COLUMNS) == set(TEXT_COLUMNS) - {"cell_type"}
    for name, texts in cells.lookups.items():
        assert list(texts) == sorted(set(chosen()[name])), name


def test_few_bytes_of_a_cell_are_kept():
    cells = choose()
    assert cells.rows.itemsize + sum(values.itemsize for values in cells.columns.values()) == 8 + 8 + 8


@pytest.mark.parametrize(
    ("cl_ids", "found"),
    [
        (None, {"T cell": {"T cell", "helper", "old T cell"}, "B cell": {"B cell", "nerve cell"}, "blob": {"blob"}}),
        (
            ("CL:0000003", "CL:0000004", "CL:7777777"),
            {"T cell": {"T cell", "helper", "old T cell"}, "B cell": {"B cell", "neuron"}, "blob": {"blob"}},
        ),
    ],
    ids=["by labels alone", "by the model's ids too"],
)
def test_a_label_is_the_type_of_the_same_text_or_what_its_id_stands_for(cl_ids, found):
    _, table = table_of(choose(side=side_files(cl_ids=cl_ids)))
    originals = all_cells().set_index("soma_joinid")["cell_type"][table["soma_joinid"]].to_numpy()
    assert {name: set(originals[rows]) for name, rows in table.groupby("cell_type").indices.items()} == found


def test_without_ids_a_label_is_what_the_ontology_says_it_stands_for():
    cells = choose(source_of(all_cells().drop(columns=TERM_COLUMN)), side_files(("neuron", "T lymphocyte")))
    assert cells.taken_as == {("nerve cell", "neuron"): 7, ("T cell", "T lymphocyte"): 7,
                              ("old T cell", "T lymphocyte"): 7}  # fmt: skip
    assert cells.left_out == {"helper": 7, "B cell": 7, "blob": 6, "Blob": 6, "unknown": 6}


def test_an_id_that_the_ontology_does_not_know_is_still_an_id_which_is_said(capsys):
    cells = choose(side=side_files(("lump", "lost"), ("CL:7777777", "unknown")))
    assert cells.taken_as == {("blob", "lump"): 6}
    expected = (
        "Cell Ontology 2026-01-01 (the tests) does not tell what 'lump', 'lost' of model.ckpt stand for: cells of"
    )
    expected += " these types are found by the same label or id only\n"
    assert capsys.readouterr().err == expected


def test_a_label_counts_more_than_the_id_unless_the_model_has_ids_too():
    names = (("B cell", "CL:0000003", None),)
    assert choose(source_of(all_cells(names)), side_files(("neuron", "B cell"))).taken_as == {}
    by_id = choose(source_of(all_cells(names)), side_files(("neuron", "B cell"), ("CL:0000003", "CL:0000002")))
    assert by_id.taken_as == {("B cell", "neuron"): N_CELLS}
    with pytest.raises(SourceError, match="no cell of memory is of one of the model's 1 types"):
        choose(source_of(all_cells(names)), side_files(("B cell",), ("CL:0000002",)))
    without = all_cells(names).drop(columns=TERM_COLUMN)
    assert choose(source_of(without), side_files(("B cell",), ("CL:0000003",))).taken_as == {}


def test_types_that_the_ontology_takes_for_one_are_found_by_their_text_alone():
    cells = choose(side=side_files(("T cell", "old T cell", "neuron")))
    assert cells.taken_as == {("B cell", "neuron"): 7}
    assert set(cells.left_out) == {"helper", "nerve cell", "blob", "Blob", "unknown"}


def test_cells_of_chosen_studies_only():
    cells = choose(dataset_ids=["study 2", "study 0"])
    expected = chosen().query("dataset_id != 'study 1'")
    assert table_of(cells)[1]["soma_joinid"].tolist() == expected["soma_joinid"].tolist()
    assert cells.n_in_source == 40
    assert cells.title == "studies 'study 0', 'study 2'"
    assert " of 40 in studies 'study 0', 'study 2' are of " in cells.report()
    assert sum(cells.left_out.values()) == 40 - len(expected)
    says = "memory has no cell of the study 'study 7'; its studies are 'study 0', 'study 1', 'study 2'"
    with pytest.raises(SourceError, match=says):
        choose(dataset_ids=["study 1", "study 7"])


@pytest.mark.parametrize(
    ("n_studies", "title"),
    [(1, "study 's0'"), (3, "studies 's0', 's1', 's2'"), (5, "studies 's0', 's1', 's2' and 2 more")],
)
def test_chosen_studies_are_named_if_they_are_few(n_studies, title):
    obs = all_cells().assign(dataset_id=[f"s{cell // 12}" for cell in range(N_CELLS)])
    assert choose(source_of(obs), dataset_ids=[f"s{each}" for each in range(n_studies)]).title == title


def test_a_report_says_which_cells_these_are():
    report = choose().report().splitlines()
    assert report[0] == f"cells       {len(chosen())} of 60 in memory are of 3 of the model's 3 types, from 3 studies"
    assert report[1:4] == ["taken as    helper -> T cell: 7", "taken as    nerve cell -> B cell: 7",
                           "taken as    old T cell -> T cell: 7"]  # fmt: skip
    assert report[4:7] == ["left out    neuron: 7", "left out    Blob: 6", "left out    unknown: 6"]
    assert report[7:] == ["genes       11 of the model's 11 are in memory"]


def test_a_report_is_short_whatever_the_cells_are_called(monkeypatch):
    monkeypatch.setattr(cells_module, "_MOST_LINES", 1)
    report = choose().report().splitlines()
    assert report[2] == "taken as    2 other labels: 14"
    assert report[4] == "left out    2 other labels: 12"


# --- nothing to evaluate on -------------------------------------------------------------------------------------------


def test_no_cell_of_the_model_s_types_is_an_error_that_names_labels_of_both():
    says = "no cell of memory is of one of the model's 2 types: its cells are called 'B cell', 'T cell', 'helper', "
    says += r"'nerve cell', 'neuron', 'old T cell' and 3 more; the model knows 'hepatocyte', 'lymph'; .*--label_column"
    with pytest.raises(SourceError, match=says):
        choose(side=side_files(("hepatocyte", "lymph")))
    with pytest.raises(SourceError, match="memory has no cells"):
        choose(source_of(all_cells()[:0], batch_sizes=(5,)))


def test_few_genes_are_worth_a_warning_and_none_an_error(capsys):
    choose(source_of(genes=[3, 0, 5]), side_files(("T cell", "B cell"), n_genes=7))
    expected = "memory has only 3 of the model's 7 genes; the others are 0 in its cells\n"
    assert capsys.readouterr().err == expected
    side = side_files()
    mouse = SideFiles(side.path, ("ENSMUSG1",), ("Cd4",), side.labels, None, side.reachability, {})
    with pytest.raises(SourceError, match=r"none of the 11 genes of memory .*ENSMUSG1; by name Cd4\); .*--gene-column"):
        choose(side=mouse)


# --- h5ad files -------------------------------------------------------------------------------------------------------


def write_h5ad(path, obs, genes):
    var = pd.DataFrame(index=genes_of(N_GENES)["feature_id"].iloc[list(genes)].to_numpy())
    counts = sparse.csr_array(counts_of(obs["cell"], N_GENES)[:, list(genes)].astype(np.float32))
    anndata.AnnData(counts, obs.drop(columns=["cell", "donor_id"]).set_index("soma_joinid").set_axis(
        [str(cell) for cell in obs["cell"]]), var).write_h5ad(path)  # fmt: skip


def test_files_with_other_genes_are_read_by_several_threads_and_donors_may_be_unknown(tmp_path):
    obs = all_cells()
    write_h5ad(tmp_path / "a.h5ad", obs[:25], range(N_GENES))
    write_h5ad(tmp_path / "b.h5ad", obs[25:], [2, 0, 1, 7])
    cells, expected = choose(H5adSource.open(tmp_path, needs_donors=False)), chosen()
    counts = counts_of(expected["cell"], N_GENES)
    counts[np.ix_(expected.index >= 25, [3, 4, 5, 6, 8, 9, 10])] = 0
    with ThreadPoolExecutor(4) as pool:
        for index, block in enumerate(pool.map(cells.read_block, [0, 1, 2] * 8)):
            start = index % 3 * 16
            assert (block.counts.toarray() == counts[start : start + 16]).all()
    _, table = table_of(cells)
    assert table["cell_type"].tolist() == expected["cell_type"].tolist()
    assert cells.lookups["donor_id"] == ("unknown",)
    assert cells.report().splitlines()[-2:] == [
        "genes       4 of the model's 11 are in b.h5ad", "genes       11 of the model's 11 are in a.h5ad"]  # fmt: skip
    with pytest.raises(SourceError, match=r"a.h5ad has no column 'donor_id' in obs; .* the donors"):
        H5adSource.open(tmp_path)


# --- the split of a store ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_store(tmp_path_factory):
    return write_tiny_store(tmp_path_factory.mktemp("stores") / "tiny")


@pytest.mark.parametrize("kind", ["merlin", "cells"])
def test_a_store_s_cells_are_those_of_its_split(tiny_store, tmp_path, kind):
    path = tiny_store if kind == "merlin" else tmp_path / "cells"
    if kind == "cells":
        convert(tiny_store, path)
    cells = StoreCells(open_store(path).split("test"))
    expected = FIRST_CELL["test"] + np.arange(SIZES["test"])
    blocks, table = table_of(cells)
    x = np.concatenate([block.x.toarray() for block in blocks])
    assert (cells_of_store(x) == expected).all()
    np.testing.assert_allclose(x, expression(expected), atol=1e-6)
    assert table["soma_joinid"].tolist() == expected.tolist()
    assert table["cell_type"].tolist() == [LABELS[label] for label in label_of(expected)]
    assert all(set(table[name]) == {"a"} for name in OBS_COLUMNS)
    assert cells.lookups == dict.fromkeys(OBS_COLUMNS, ("a", "b"))
    assert cells.title == f"test split of {path}"
    assert cells.n_cells == 17
    assert len(cells.block_sizes) == (3 if kind == "merlin" else 1)


def test_a_column_without_texts_has_its_codes_as_texts_and_a_column_must_be_there(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    store = write_tiny_store(tmp_path / "tiny", sizes={"test": 17})
    (store / "categorical_lookup" / "assay.parquet").unlink()
    part = store / "test" / "part.0.parquet"
    table = pq.read_table(part)
    place, codes = table.column_names.index("assay"), np.arange(17) % 4

    def with_assays(values):
        pq.write_table(table.set_column(place, "assay", pa.array(values)), part, row_group_size=8)
        return open_store(store).split("test")

    cells = StoreCells(with_assays(codes))
    assert cells.lookups["assay"] == ("0", "1", "2", "3")
    assert table_of(cells)[1]["assay"].tolist() == [str(code) for code in codes]
    with pytest.raises(StoreError, match=r"the test split of .*tiny has the assay code -1; codes are 0 or more"):
        StoreCells(with_assays(codes - 1))
    pq.write_table(table.drop_columns("disease"), part, row_group_size=8)
    with pytest.raises(StoreError, match=r"part.0.parquet has no column 'disease'"):
        StoreCells(open_store(store).split("test")).read_block(0)


# --- real cells -------------------------------------------------------------------------------------------------------


def test_of_a_real_study_the_cells_of_the_store_s_types_are_taken(real_dir):
    side = open_store(real_dir / "pbmc_store").side
    cells = SourceCells.choose(H5adSource.open(real_dir / "ood_h5ad"), side, CellOntology.open())
    original = anndata.read_h5ad(real_dir / "ood_h5ad" / "zilionis2019.h5ad")
    original = original[original.obs["cell_type"].isin(side.labels)]
    blocks, table = table_of(cells)
    assert len(table) == len(original) == 134
    for name in ("cell_type", "donor_id", "tissue", "disease", "soma_joinid"):
        assert table[name].tolist() == original.obs[name].tolist(), name
    counts = sparse.vstack([block.counts for block in blocks]).toarray()
    places = [place for place, gene in enumerate(side.gene_ids) if gene in original.var_names]
    assert (counts[:, places] == original[:, [side.gene_ids[place] for place in places]].X.toarray()).all()
    assert not np.delete(counts, places, axis=1).any()
    assert cells.left_out["macrophage"] == 44
    assert "genes       2,245 of the model's 2,314 are in zilionis2019.h5ad" in cells.report()
