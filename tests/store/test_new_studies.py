"""New studies of a source, written for a store: which cells, in which form, and what interruptions leave."""

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from memory_source import MemorySource, counts_of, genes_of
from scipy import sparse

from hce_jax.errors import SourceError, StoreError
from hce_jax.hierarchy.cell_ontology import CellOntology, Term
from hce_jax.store import new_studies, open_store
from hce_jax.store.cell_source import TERM_COLUMN, TEXT_COLUMNS
from hce_jax.store.h5ad import H5adSource
from hce_jax.store.new_studies import (
    ABOUT_FILE,
    digest_of,
    refuse_incomplete,
    refuse_other_request,
    write_new_studies,
)
from hce_jax.store.schema import SideFiles
from hce_jax.store.simulate import simulate_atlas

TERMS = {
    "CL:0000001": Term("T cell"),
    "CL:0000002": Term("B cell", synonyms=("B lymphocyte",)),
    "CL:0000003": Term("neuron"),
    "CL:0000004": Term("obsolete T lymphocyte", obsolete=True, replaced_by="CL:0000001"),
    "CL:0000005": Term("obsolete lost cell", obsolete=True),
}
ONTOLOGY = CellOntology("2026-01-01", "the tests", TERMS)
N_CELLS, N_GENES = 100, 11
#: In turn: what the cells of the source are called. The store knows T and B cells, but calls T cells "T lymphocyte".
LABELS = ("T cell", "B cell", "neuron", "unknown", "B lymphocyte", "no such cell", "obsolete lost cell", "b CELL")
IDS = ("CL:0000001", "CL:0000002", "CL:0000003", "unknown", "CL:0000002", "CL:9999999", "CL:0000005", "CL:0000002")
MEANT = ("T lymphocyte", "B cell", None, None, "B cell", None, None, "B cell")


def all_cells():
    cells = np.arange(N_CELLS)
    return pd.DataFrame({
        "cell": 10 * cells,
        "soma_joinid": 1_000 + 7 * cells,
        "is_primary_data": cells % 9 > 0,
        **{name: [f"{name} {cell % 3}" for cell in cells] for name in TEXT_COLUMNS},
        "assay": np.where(cells % 5 == 0, "Smart-seq2", "10x 3' v3"),
        "dataset_id": [f"study {cell // 10}" for cell in cells],
        "cell_type": np.array(LABELS)[cells % len(LABELS)],
        TERM_COLUMN: np.array(IDS)[cells % len(IDS)],
    })  # fmt: skip


def source_of(obs=None, genes=range(N_GENES)[::-1], **options):
    """Make a source with genes in another order than the store's."""
    its_genes = genes_of(N_GENES).iloc[list(genes)].reset_index(drop=True)
    return MemorySource(all_cells() if obs is None else obs, its_genes, **options)


def side_files(labels=("B cell", "T lymphocyte"), cl_ids=("CL:0000002", "CL:0000004"), n_genes=N_GENES):
    ids, names = (tuple(genes_of(n_genes)[name]) for name in ("feature_id", "feature_name"))
    return SideFiles(Path("store"), ids, names, labels, cl_ids, np.eye(len(labels)), {})


KNOWN = {"study 0", "study 4", "study 5", "a study that is not there"}
ASSAYS = ("10x 3' v3", "10x 5' v1")


def chosen():
    """Filter the cells in plain pandas."""
    obs = all_cells()
    meant = obs["cell_type"].map(dict(zip(LABELS, MEANT, strict=True)))
    kept = obs["is_primary_data"] & obs["assay"].isin(ASSAYS) & ~obs["dataset_id"].isin(KNOWN) & meant.notna()
    return obs[kept].assign(cell_type=meant[kept])


def write(source, destination, side=None, **changes):
    options = {"ontology": ONTOLOGY, "assays": ASSAYS, "chunk_cells": 8} | changes
    return write_new_studies(source, side or side_files(), KNOWN, destination, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- which cells, in which form ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_terms", [True, False])
@pytest.mark.parametrize("batch_sizes", [(17, 0, 5), (1,), (N_CELLS,)])
def test_chunks_hold_the_raw_counts_of_new_studies_in_the_store_s_order_of_genes(tmp_path, with_terms, batch_sizes):
    obs = all_cells() if with_terms else all_cells().drop(columns=TERM_COLUMN)
    write(source_of(obs, batch_sizes=batch_sizes), tmp_path / "new")
    expected = chosen()
    chunks = [anndata.read_h5ad(tmp_path / "new" / f"chunk_{n}.h5ad") for n in range(-(-len(expected) // 8))]
    assert [len(chunk) for chunk in chunks[:-1]] == [8] * (len(chunks) - 1)
    assert len(chunks) == len(list((tmp_path / "new").glob("*.h5ad"))) > 2
    for chunk in chunks:
        assert isinstance(chunk.X, sparse.csr_matrix)
        assert chunk.X.dtype == np.float32
        assert list(chunk.var_names) == list(chunk.var["feature_id"]) == list(side_files().gene_ids)
        assert list(chunk.var["feature_name"]) == list(side_files().gene_names)
        assert set(chunk.obs) == {"soma_joinid", "is_primary_data", *TEXT_COLUMNS, TERM_COLUMN}
        assert list(chunk.obs_names) == [str(number) for number in chunk.obs["soma_joinid"]]
        for name in (*TEXT_COLUMNS, TERM_COLUMN):
            assert set(chunk.obs[name].cat.categories) == set(chunk.obs[name]), name  # none that is not used
    x = np.concatenate([chunk.X.toarray() for chunk in chunks])
    assert (x == counts_of(expected["cell"], N_GENES)).all()
    obs = pd.concat([chunk.obs.astype(object) for chunk in chunks])
    for name in ("soma_joinid", "is_primary_data", *TEXT_COLUMNS):
        assert obs[name].tolist() == expected[name].tolist(), name
    ids = expected["cell_type"].map({"B cell": "CL:0000002", "T lymphocyte": "CL:0000001"})
    assert obs[TERM_COLUMN].tolist() == ids.tolist()


def test_a_chunk_can_be_read_from_its_file_some_cells_at_a_time(tmp_path):
    write(source_of(), tmp_path / "new")
    chunk = anndata.read_h5ad(tmp_path / "new" / "chunk_1.h5ad", backed="r")
    assert (chunk.X[2:5].toarray() == counts_of(chosen()["cell"][8:16], N_GENES)[2:5]).all()
    chunk.file.close()
    source = H5adSource.open(tmp_path / "new")
    obs = pd.concat([batch.astype(object) for batch in source.obs_batches()])
    assert obs["soma_joinid"].tolist() == sorted(chosen()["soma_joinid"])


def test_any_assay_will_do_if_none_is_named(tmp_path):
    found = write(source_of(), tmp_path / "new", assays=None, chunk_cells=1000)
    assert set(anndata.read_h5ad(tmp_path / "new" / "chunk_0.h5ad").obs["assay"]) == {"Smart-seq2", "10x 3' v3"}
    assert "of these assays" not in found.dropped


def test_named_studies_are_taken_known_or_not_and_alone_where_none_is_known(tmp_path):
    named = ("study 4", "study 7")
    for known, rule in ((None, "of the named studies"), (KNOWN, "of new studies")):
        options = {"ontology": ONTOLOGY, "assays": ASSAYS, "dataset_ids": named}
        found = write_new_studies(source_of(), side_files(), known, tmp_path / rule, **options)
        obs = anndata.read_h5ad(tmp_path / rule / "chunk_0.h5ad").obs
        originals = all_cells().set_index("soma_joinid").loc[obs["soma_joinid"]]
        wanted = {f"study {n}" for n in range(10)} - KNOWN | {*named} if known else {*named}
        assert set(originals["dataset_id"]) == wanted
        assert set(chosen()["dataset_id"]) == {f"study {n}" for n in range(10)} - KNOWN
        assert found.steps[3].rule == rule
        about = json.loads((tmp_path / rule / ABOUT_FILE).read_text())
        assert about["named_studies"] == sorted(named)
        assert about["known_studies"] == (len(KNOWN) if known else None)
    says = (
        r"no cell of memory is of the study 'Study 4' or 'study 44'; .* dataset_id, such as study 0, study 1, study 2"
    )
    options["dataset_ids"] = ("study 44", "study 4", "Study 4")
    with pytest.raises(SourceError, match=says):
        write_new_studies(source_of(), side_files(), None, tmp_path / "none", **options)


B_CELLS = {"B cell", "B lymphocyte", "b CELL"}


@pytest.mark.parametrize(
    ("cl_ids", "called"),
    [
        (None, {"neuron": {"neuron"}, "T cell": {"T cell"}}),
        (None, {"b lymphocyte": B_CELLS}),
        (("CL:0000003", "CL:0000004"), {"an old name": {"neuron"}, "B cell": {"T cell"}}),
    ],
    ids=["labels", "a synonym", "ids, which count more than labels"],
)
def test_types_are_those_of_the_store_s_ids_or_of_its_labels_if_it_has_none(tmp_path, cl_ids, called):
    write(source_of(), tmp_path / "new", side_files(tuple(called), cl_ids), chunk_cells=1000)
    obs = anndata.read_h5ad(tmp_path / "new" / "chunk_0.h5ad").obs
    originals = all_cells().set_index("soma_joinid")["cell_type"][obs["soma_joinid"]]
    pairs = pd.DataFrame({"label": obs["cell_type"].astype(str).to_numpy(), "original": originals.to_numpy()})
    assert {label: set(each["original"]) for label, each in pairs.groupby("label")} == called


def test_what_was_found_is_counted_rule_by_rule(tmp_path, capsys):
    found = write(source_of(), tmp_path / "new")
    obs, expected = all_cells(), chosen()
    left = [obs]
    for kept in (obs["is_primary_data"], obs["assay"].isin(ASSAYS), ~obs["dataset_id"].isin(KNOWN)):
        left.append(left[-1][kept.reindex(left[-1].index)])
    n_left = [*map(len, left), len(expected)]
    rules = ["in memory", "primary data", "of these assays", "of new studies", "of the store's types"]
    assert [(step.rule, step.cells) for step in found.steps] == list(zip(rules, n_left, strict=True))
    assert found.dropped == dict(zip(rules[1:], -np.diff(n_left), strict=True))
    assert (found.folder, found.cells) == (tmp_path / "new", len(expected))
    assert found.chunks == -(-len(expected) // 8)
    assert found.studies == expected["dataset_id"].value_counts().to_dict()
    others = left[-1][~left[-1].index.isin(expected.index)]
    assert found.left_out_types == others["cell_type"].value_counts().to_dict()
    about = json.loads((tmp_path / "new" / ABOUT_FILE).read_text())
    assert about["source"] == {"title": "memory", **source_of().about()}
    assert about["known_studies"] == len(KNOWN)
    assert about["left_after_each_rule"] == dict(zip(rules, n_left, strict=True))
    assert about["studies"] == found.studies
    assert about["left_out_types"] == found.left_out_types
    assert about["genes"] == {"memory": {"found": N_GENES, "of": N_GENES, "by": "feature_id"}}
    assert about["ontology"] == "Cell Ontology 2026-01-01 (the tests)"
    assert sum(about["chunks"].values()) == len(expected)
    report = found.report()
    assert f"{len(expected):15,}   of the store's types" in report
    assert f"left out    neuron: {found.left_out_types['neuron']}" in report
    assert f"study       study 1: {found.studies['study 1']}" in report
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"is_primary_data": False}, "primary data"),
        ({"is_primary_data": [assay == "Smart-seq2" for assay in all_cells()["assay"]]}, "of these assays"),
        ({"dataset_id": "study 4"}, "of new studies"),
        ({TERM_COLUMN: "CL:0000003"}, "of the store's types"),
    ],
)
def test_an_error_names_the_rule_that_leaves_nothing_and_what_the_others_left(tmp_path, change, rule):
    with pytest.raises(SourceError, match=rf"no cell is left after the rule [\"']{rule}.*in memory 100.*{rule} 0$"):
        write(source_of(all_cells().assign(**change)), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_source_without_cells_and_an_assay_that_none_has_are_errors(tmp_path):
    with pytest.raises(SourceError, match="memory has no cells"):
        write(source_of(all_cells()[:0], batch_sizes=(5,)), tmp_path / "new")
    with pytest.raises(SourceError, match=r"no cell of memory has the assay 'Drop-seq'; .* any"):
        write(source_of(), tmp_path / "new", assays=("10x 3' v3", "Drop-seq"))


def test_few_of_the_store_s_genes_are_worth_a_warning(tmp_path, capsys):
    write(source_of(genes=[3, 0, 5]), tmp_path / "new", side_files(n_genes=6), chunk_cells=1000)
    assert capsys.readouterr().err == ""
    write(source_of(genes=[3, 0, 5]), tmp_path / "few", side_files(n_genes=7), chunk_cells=1000)
    expected = "memory has only 3 of the store's 7 genes; the others are 0 in its cells\n"
    assert capsys.readouterr().err == expected
    x = anndata.read_h5ad(tmp_path / "few" / "chunk_0.h5ad").X.toarray()
    assert (x[:, [0, 3, 5]] == counts_of(chosen()["cell"])[:, [0, 3, 5]]).all()
    assert not x[:, [1, 2, 4, 6]].any()


def test_types_of_the_store_that_the_ontology_lacks_or_takes_for_one_are_found_by_their_own_label_and_id(
    tmp_path, capsys
):
    obs = all_cells().replace(
        {"cell_type": {"no such cell": "T lymphocyte"}, TERM_COLUMN: {"CL:9999999": "CL:0000004"}}
    )
    side = side_files(
        ("obsolete lost cell", "T cell", "lump", "no such"), ("CL:0000005", "CL:0000001", "CL:0000004", "?")
    )
    found = write(source_of(obs), tmp_path / "new", side, chunk_cells=1000)
    expected = (
        "Cell Ontology 2026-01-01 (the tests) does not tell what 'obsolete lost cell', 'T cell', 'lump' and 1 more "
    )
    expected += "of store stand for: cells of these types are found by the same label or id only\n"
    assert capsys.readouterr().err == expected
    obs = anndata.read_h5ad(tmp_path / "new" / "chunk_0.h5ad").obs
    originals = all_cells().set_index("soma_joinid")["cell_type"][obs["soma_joinid"]].to_numpy()
    assert {(new, old) for new, old in zip(obs["cell_type"], originals, strict=True)} == {
        ("obsolete lost cell", "obsolete lost cell"), ("T cell", "T cell"), ("lump", "no such cell")
    }  # fmt: skip
    ids = {"obsolete lost cell": "CL:0000005", "T cell": "CL:0000001", "lump": "CL:0000001"}
    assert obs[TERM_COLUMN].tolist() == [ids[label] for label in obs["cell_type"]]
    assert found.cells == len(obs) > 12


# --- memory, interruptions, what is there already ---------------------------------------------------------------------


@pytest.fixture
def three_at_a_time(monkeypatch):
    monkeypatch.setattr(new_studies, "_CELLS_AT_A_TIME", 3)


@pytest.fixture
def expected(tmp_path, three_at_a_time):
    write(source_of(), tmp_path / "expected")
    return contents(tmp_path / "expected")


def rows_read(source):
    return [row for rows in source.reads for row in rows]


def test_few_cells_are_read_at_a_time(tmp_path, three_at_a_time):
    source = source_of()
    write(source, tmp_path / "new")
    assert [len(rows) for rows in source.reads[:6]] == [3, 3, 2, 3, 3, 2]
    assert rows_read(source) == chosen().index.tolist()


@pytest.mark.parametrize("call", [0, 1, 3, 5, 8])
def test_after_a_failure_only_the_missing_chunks_are_read(tmp_path, expected, call):
    source = source_of(fails_at=call, error=OSError("the machine went away"))
    with pytest.raises(StoreError, match=r"the machine went away; .* are finished and kept in .*new.partial"):
        write(source, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    again = source_of()
    write(again, tmp_path / "new")
    assert rows_read(again) == chosen().index.tolist()[8 * (call // 3) :]
    assert contents(tmp_path / "new") == expected
    assert {path.name for path in tmp_path.iterdir()} == {"new", "expected"}


def test_an_interrupted_call_is_not_taken_up_for_other_cells(tmp_path, three_at_a_time):
    t_cells = all_cells().assign(**{TERM_COLUMN: "CL:0000001"})
    begun = t_cells.assign(is_primary_data=t_cells.index != 16)
    with pytest.raises(SourceError, match="it forgot"):
        write(source_of(begun, fails_at=4), tmp_path / "new")
    another_cell = source_of(t_cells.assign(is_primary_data=t_cells.index != 17))
    for source, changes in (
        (another_cell, {}),
        (source_of(begun.assign(**{TERM_COLUMN: "CL:0000002"})), {}),
        (source_of(begun.assign(soma_joinid=np.arange(N_CELLS))), {}),
        (source_of(begun), {"chunk_cells": 9}),
        (source_of(begun), {"side": side_files(("b lymphocyte", "T cell"))}),
    ):
        with pytest.raises(StoreError, match=r"new.partial was begun with .* delete .*new.partial to begin anew"):
            write(source, tmp_path / "new", **changes)
        assert source.reads == []
    found = write(another_cell, tmp_path / "new", force=True)
    assert len(rows_read(another_cell)) == found.cells


def test_what_is_there_is_left_alone_unless_it_is_to_be_made_anew(tmp_path, expected):
    folder = tmp_path / "expected"
    with pytest.raises(StoreError, match="expected is there already; --force-download makes it anew"):
        write(source_of(), folder)
    assert contents(folder) == expected
    found = write(source_of(), folder, assays=None, force=True)
    assert found.cells > len(chosen())
    assert contents(folder) != expected
    write(source_of(), folder, force=True)
    assert contents(folder) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["expected"]


def test_nothing_is_removed_that_is_not_new_studies_or_when_no_cell_would_take_its_place(tmp_path, expected):
    folder = tmp_path / "expected"
    with pytest.raises(SourceError, match="no cell is left"):
        write(source_of(all_cells().assign(is_primary_data=False)), folder, force=True)
    assert contents(folder) == expected
    (folder / "thesis.txt").write_text("three years of work")
    with pytest.raises(StoreError, match=r"expected also holds thesis.txt, which is not to be lost; move it away"):
        write(source_of(), folder, force=True)
    assert contents(folder) == expected | {"thesis.txt": b"three years of work"}
    (tmp_path / "file").write_text("a file")
    with pytest.raises(StoreError, match=r"cannot use .*file: Not a directory"):
        write(source_of(), tmp_path / "file", force=True)


def test_a_folder_in_which_a_file_is_missing_is_not_read(tmp_path, expected):
    folder = tmp_path / "expected"
    refuse_incomplete(folder)
    n_files = len(expected) - 1
    (folder / "chunk_2.h5ad").unlink()
    says = rf"expected lacks chunk_2.h5ad of the {n_files} files that its new_studies.json names; bring back"
    for read in (refuse_incomplete, H5adSource.open):
        with pytest.raises(StoreError, match=says):
            read(folder)
    (folder / "chunk_0.h5ad").unlink()
    with pytest.raises(StoreError, match=r"expected lacks chunk_0.h5ad and 1 more of the"):
        refuse_incomplete(folder)
    (folder / ABOUT_FILE).write_text('{"chunks')
    with pytest.raises(StoreError, match=r"expected/new_studies.json is not a readable JSON object"):
        refuse_incomplete(folder)
    (folder / ABOUT_FILE).unlink()
    assert len(H5adSource.open(folder).files) == n_files - 2  # some h5ad files, of which nothing is known


def test_a_folder_tells_for_which_request_it_was_made(tmp_path):
    request = {"Census": "B", "assays": ["x", "y"], **digest_of(side_files())}
    write(source_of(), tmp_path / "new", request=request)
    refuse_other_request(tmp_path / "new", request)
    others = side_files(("T lymphocyte", "B cell"), ("CL:0000004", "CL:0000002"))
    for other, says in (
        ({"Census": "C"}, "was made with Census B, not C;"),
        ({"assays": "any"}, "was made with assays x, y, not any;"),
        (digest_of(side_files(n_genes=10)), "was made for other genes;"),
        (digest_of(others), "was made for other types;"),
        ({"release": "1"}, "was made with release None, not 1;"),
    ):
        with pytest.raises(StoreError, match=f"new {says} --force-download makes it anew"):
            refuse_other_request(tmp_path / "new", request | other)
    write(source_of(), tmp_path / "unasked")
    (tmp_path / "published").mkdir()
    for name in ("unasked", "published"):
        with pytest.raises(StoreError, match=rf"{name} has no new_studies.json that says what was asked for; --force"):
            refuse_other_request(tmp_path / name, request)


# --- other sources ----------------------------------------------------------------------------------------------------


def test_the_new_studies_of_the_simulated_atlas_come_through(tmp_path):
    simulate_atlas(tmp_path / "atlas", scale=0.1)
    side = open_store(tmp_path / "atlas").side
    source = H5adSource.open(tmp_path / "atlas" / "ood")
    ontology = CellOntology.open(side.about["ontology_release"])
    known = side.lookup("dataset_id")
    found = write_new_studies(source, side, known, tmp_path / "new", ontology=ontology, assays=None, chunk_cells=300)
    originals = [anndata.read_h5ad(path) for path in sorted((tmp_path / "atlas" / "ood").iterdir())]
    chunks = [anndata.read_h5ad(tmp_path / "new" / f"chunk_{number}.h5ad") for number in range(found.chunks)]
    whole, made = anndata.concat(originals), anndata.concat(chunks)
    assert found.cells == len(whole) == len(made)
    assert len(found.studies) == 4
    assert (whole.X != made.X).nnz == 0
    for name in ("soma_joinid", "cell_type", TERM_COLUMN, "donor_id", "dataset_id", "assay"):
        assert made.obs[name].tolist() == whole.obs[name].tolist(), name


def test_a_real_study_comes_through_with_the_types_that_a_real_store_has(real_dir, tmp_path):
    side = open_store(real_dir / "pbmc_store").side
    source = H5adSource.open(real_dir / "ood_h5ad")
    options = {"ontology": CellOntology.open(), "assays": None}
    found = write_new_studies(source, side, side.lookup("dataset_id"), tmp_path / "new", **options)
    original = anndata.read_h5ad(real_dir / "ood_h5ad" / "zilionis2019.h5ad")
    original = original[original.obs["cell_type"].isin(side.labels)]
    chunk = anndata.read_h5ad(tmp_path / "new" / "chunk_0.h5ad")
    assert found.cells == len(chunk) == len(original) == 134
    assert chunk.obs["cell_type"].tolist() == original.obs["cell_type"].tolist()
    genes = [gene for gene in side.gene_ids if gene in original.var_names]
    assert (chunk[:, genes].X != original[:, genes].X).nnz == 0
    assert chunk.X.nnz == chunk[:, genes].X.nnz
    assert found.left_out_types["macrophage"] == 44
    with pytest.raises(SourceError, match=r"no cell of zilionis2019.h5ad has the assay .*; its cells have 'inDrop'"):
        write_new_studies(source, side, set(), tmp_path / "none", **options | {"assays": ("10x 3' v2",)})
