"""A user's cells annotated from end to end, in every disguise, against labels worked out with loops."""

import hashlib

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from scipy import sparse
from small_model import (
    ABOVE,
    CL_IDS,
    CURVES,
    GENE_IDS,
    LABELS,
    expected_labels,
    raw_counts,
    save_small_model,
)  # fmt: skip
from verbs import in_process

from hce_jax.annotate import annotate, annotate_file
from hce_jax.errors import CheckpointError, ConfigError, SourceError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("annotation") / "model.ckpt")


@pytest.fixture(scope="module")
def expected():
    return expected_labels(raw_counts())


def log1p(cells, total=1e4, base=None):
    cells = cells.copy()
    sc.pp.normalize_total(cells, target_sum=total)
    sc.pp.log1p(cells, base=base)
    return cells


def in_layer(cells):
    return AnnData(cells.X * 0.5 - 0.2 * (cells.X > 0), cells.obs, cells.var, layers={"counts": cells.X})


def in_raw(cells):
    scaled = cells.copy()
    scaled.raw = cells
    scaled.X = cells.X.toarray() - 3.0
    return scaled[:, :9].copy()


def renamed(cells, names):
    return AnnData(cells.X, cells.obs, pd.DataFrame(index=pd.Index(names)))


def halved(cells):
    """Every gene twice, each with a part of its counts."""
    part = sparse.csr_matrix(np.minimum(cells.X.toarray(), 1))
    parts = AnnData(sparse.hstack([part, cells.X - part], "csr"), cells.obs)
    parts.var_names = [*cells.var_names, *(f"{name}.7" for name in cells.var_names)]
    return parts


def beside_tpm(cells):
    """Values that are no multiples in X, and counts in a layer whose name says nothing."""
    per_length = cells.X.toarray() / np.random.default_rng(2).uniform(0.5, 8, cells.n_vars)
    tpm = per_length / per_length.sum(axis=1, keepdims=True) * 1e6
    return AnnData(tpm, cells.obs, cells.var, layers={"umi": cells.X})


DISGUISES = {
    "raw": lambda cells: cells,
    "log1p of 10,000": log1p,
    "log1p of a million": lambda cells: log1p(cells, 1e6),
    "log2": lambda cells: log1p(cells, base=2),
    "counts in a layer": in_layer,
    "counts in raw": in_raw,
    "counts in an odd layer": beside_tpm,
    "dense": lambda cells: AnnData(cells.X.toarray(), cells.obs, cells.var),
    "by gene": lambda cells: AnnData(cells.X.tocsc(), cells.obs, cells.var),
    "genes shuffled": lambda cells: cells[:, np.random.default_rng(1).permutation(cells.n_vars)].copy(),
    "ids with versions": lambda cells: renamed(cells, [f"{name}.{len(name)}" for name in cells.var_names]),
    "symbols": lambda cells: renamed(cells, cells.var["feature_name"]),
    "genes in two columns": halved,
}


@pytest.mark.parametrize("disguise", DISGUISES.values(), ids=DISGUISES)
def test_every_form_of_the_same_cells_gets_the_labels_of_the_oracle(disguise, checkpoint, expected):
    given = annotate(disguise(raw_counts()), checkpoint).obs
    assert given["hce_label"].tolist() == [label for label, _, _ in expected]
    assert given["hce_leaf_label"].tolist() == [leaf for _, _, leaf in expected]
    assert len(set(given["hce_label"])) >= 5  # of six and "unassigned"
    for (name, held, _), confidence in zip(expected, given["hce_confidence"], strict=True):
        depth = len(ABOVE[LABELS.index(name)]) - 1 if name in LABELS else 0
        intercept, slope = CURVES[depth]
        odds = np.exp(intercept) * (held / max(1 - held, 1e-9)) ** slope
        assert confidence == pytest.approx(odds / (1 + odds), abs=2e-4)


def test_the_anndata_is_given_back_with_new_columns_and_its_values_as_they_were(checkpoint):
    cells = raw_counts()
    before = cells.copy()
    given = annotate(cells, checkpoint, probabilities=True)
    assert given is cells
    assert (given.X != before.X).nnz == 0
    terms = dict(zip([*LABELS, "unassigned"], [*CL_IDS, "unknown"], strict=True))
    assert given.obs["hce_label_ontology_term_id"].tolist() == [terms[label] for label in given.obs["hce_label"]]
    mass = given.obsm["hce_probabilities"]
    np.testing.assert_allclose(mass[:, [0, 5]].sum(axis=1), 1, atol=1e-5)  # the two topmost types hold everything
    assert (mass[:, 1] >= mass[:, 2] + mass[:, 3] - 1e-5).all()
    about = given.uns["hce_jax"]
    assert list(about["types"]) == list(LABELS)
    assert (about["input"]["matrix"], about["input"]["genes_found"], about["max_error"]) == ("X", 40, 0.05)
    assert about["ontology_release"] == "v2026-03-26"
    assert all(value is not None for value in about.values())  # which not every reader of h5ad knows
    assert "1 cells have no counts" in about["input"]["warnings"][0]
    assert "X_hce" not in given.obsm  # a linear model has none


def test_what_was_seen_of_genes_is_written_down(checkpoint):
    about = annotate(halved(raw_counts()), checkpoint).uns["hce_jax"]["input"]
    assert "40 genes are the sum of 80 columns" in list(about["notes"])
    few = raw_counts()[:, [*GENE_IDS[:10]]].copy()
    about = annotate(few, checkpoint).uns["hce_jax"]["input"]
    assert "only 10 of the model's 40 genes" in about["warnings"][0]
    assert about["share_of_counts"] == 1


def test_a_view_is_copied(checkpoint):
    cells = raw_counts()
    given = annotate(cells[:7], checkpoint)
    assert given.n_obs == 7
    assert "hce_label" not in cells.obs


@pytest.mark.parametrize(("fewer", "is_warned_of"), [(1, True), (0, False)])
def test_labels_that_the_calibration_could_hardly_judge_are_warned_of_at_the_end(
    fewer, is_warned_of, checkpoint, expected, tmp_path
):
    names, cells = np.array([label for label, _, _ in expected]), raw_counts()
    doubtful, others = (np.flatnonzero(names == name) for name in ("CD8-positive T cell", "B cell"))
    n_others = 9 * len(doubtful) - fewer  # so that they are a tenth, or a little more
    rows = [*doubtful, *np.resize(others, n_others), 59]
    AnnData(cells.X[rows], var=cells.var).write_h5ad(tmp_path / "cells.h5ad")
    said = []
    made = annotate_file(tmp_path / "cells.h5ad", tmp_path / "a.h5ad", checkpoint, say=said.append)
    assert made.about["hardly_judged"] == pytest.approx(len(doubtful) / (len(doubtful) + n_others))
    warnings = [
        "1 cells have no counts in the model's genes and get no label",
        f"{len(doubtful)} labels (10 %) are of types of which few cells of the calibration could tell whether they are "
        "right (CD8-positive T cell: 20 of 41): they may be too fine, or wrong, whatever their confidence",
    ][: 1 + is_warned_of]
    assert made.about["input"]["warnings"] == warnings
    assert said[1:] == [f"WARNING     {warning}" for warning in warnings]
    html = (tmp_path / "a_report.html").read_text()
    assert ("CD8-positive T cell: 20 of 41" in html) == is_warned_of


def test_a_threshold_takes_the_place_of_the_promise(checkpoint):
    given = annotate(raw_counts(), checkpoint, confidence=0.999)
    assert given.uns["hce_jax"]["confidence"] == 0.999
    assert {"max_error", "calibration"}.isdisjoint(given.uns["hce_jax"])
    labelled = given.obs[given.obs["hce_label"] != "unassigned"]
    assert 0 < len(labelled) < 60
    assert (labelled["hce_confidence"] >= 0.999 - 1e-6).all()  # the mass itself


def test_clusters_get_a_label_beside_their_cells(checkpoint):
    given = annotate(raw_counts(), checkpoint, group_by="leiden")
    groups = given.uns["hce_jax"]["groups"].set_index("group")
    assert groups["cells"].to_dict() == given.obs["leiden"].value_counts().to_dict()
    assert (given.obs["hce_group_label"].astype(str) == groups["label"].loc[given.obs["leiden"]].to_numpy()).all()


def test_clusters_without_cells_are_none_and_measurements_are_no_clusters(checkpoint):
    cells = raw_counts()
    cells.obs["leiden"] = pd.Categorical(cells.obs["leiden"], ["z", "b", "a"])
    cells.obs["depth"] = np.linspace(0, 1, 60)
    given = annotate(cells, checkpoint, group_by="leiden")
    assert given.uns["hce_jax"]["groups"]["group"].tolist() == ["b", "a"]
    with pytest.raises(SourceError, match="measurements"):
        annotate(cells, checkpoint, group_by="depth")


def checksum(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_copied_with_a_report_and_stays_as_it_was(checkpoint, expected, tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "cells.h5ad", tmp_path / "out" / "annotated.h5ad"
    out.parent.mkdir()
    raw_counts().write_h5ad(source)
    before = checksum(source)
    arguments = ("annotate", source, "--checkpoint", checkpoint, "-o", out, "--group-by=leiden", "--explain")
    said = in_process(monkeypatch, capsys, *map(str, arguments))
    assert checksum(source) == before
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "annotated.h5ad", "annotated_explanation.csv", "annotated_report.html",
    ]  # fmt: skip
    given = anndata.read_h5ad(out)
    assert given.obs["hce_label"].tolist() == [label for label, _, _ in expected]
    n_labelled = sum(label != "unassigned" for label, _, _ in expected)
    assert f"labels      {n_labelled} of 60 cells have one" in said
    assert "genes       40 of the model's 40 (100.0%)" in said
    html = (out.parent / "annotated_report.html").read_text()
    assert "cells.h5ad" in html
    assert "CD8-positive T cell" in html
    explanation = pd.read_csv(out.parent / "annotated_explanation.csv")
    assert set(explanation["label"]) == {label for label, _, _ in expected} - {"unassigned"}

    again = in_process(monkeypatch, capsys, *map(str, arguments))
    assert "annotated.h5ad exists already" in again
    out.rename(tmp_path / "first.h5ad")
    again = in_process(monkeypatch, capsys, *map(str, arguments))
    assert "annotated_report.html exists already" in again
    in_process(monkeypatch, capsys, *map(str, arguments), "--overwrite")
    assert anndata.read_h5ad(out).obs.equals(given.obs)


def broken(name):
    cells = raw_counts(20)
    if name == "no cells":
        return cells[:0].copy()
    if name == "no shared genes":
        cells.var_names = [f"X{number}" for number in range(cells.n_vars)]
        cells.var = cells.var[[]]
    if name == "mouse genes":
        cells = renamed(cells, [f"ENSMUSG{number:011}" for number in range(cells.n_vars)])
    if name == "proteins":
        cells.var["feature_types"] = "Antibody Capture"
    if name == "missing values":
        cells.X = cells.X.astype(np.float32)
        cells.X.data[40] = np.nan
    if name == "scaled":
        cells.X = cells.X.toarray() - 0.731
    if name == "few genes":
        cells = cells[:, ~cells.var_names.isin(GENE_IDS[1:])].copy()
    return cells


BROKEN = {
    "no cells": "no cells",
    "no shared genes": "none of the",
    "mouse genes": "mouse",
    "proteins": "gene",
    "missing values": "not finite",
    "scaled": "negative",
    "few genes": "5 %",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_annotated_is_one_line_and_leaves_nothing(name, checkpoint, tmp_path):
    source = tmp_path / "cells.h5ad"
    broken(name).write_h5ad(source)
    with pytest.raises(SourceError) as error:
        annotate_file(source, tmp_path / "annotated.h5ad", checkpoint, say=lambda line: None)
    assert BROKEN[name] in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["cells.h5ad"]


def test_an_error_in_the_last_cells_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("hce_jax.annotate.prepared._BLOCK_SIZE", 16)
    monkeypatch.setattr("hce_jax.annotate.prepared._SAMPLE", 4)
    cells = raw_counts()
    cells.X.data[-5] = np.nan
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(SourceError, match="finite"):
        annotate_file(tmp_path / "cells.h5ad", tmp_path / "a.h5ad", checkpoint, say=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["cells.h5ad"]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"max_error": 0.1, "confidence": 0.5}, "exclude each other"),
        ({"confidence": 0.0}, "above 0"),
        ({"confidence": 1.5}, "at most 1"),
        ({"confidence": float("nan")}, "above 0"),
        ({"batch_size": 0}, "at least one"),
        ({"max_error": 0.0001}, "promised"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, problem, checkpoint):
    with pytest.raises(ConfigError, match=problem):
        annotate(raw_counts(3), checkpoint, **settings)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "text.ckpt").write_text("text")
    for named, problem in ((tmp_path, "not a"), (tmp_path / "text.ckpt", "is no checkpoint"), ([], "no checkpoint is")):
        with pytest.raises(CheckpointError, match=problem):
            annotate(raw_counts(3), named)


@pytest.mark.parametrize("name", ["", "/", "annotated.csv", "none/annotated.h5ad"])
def test_a_place_that_cannot_be_is_refused_before_the_model_is_read(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    raw_counts(3).write_h5ad("cells.h5ad")
    said = in_process(monkeypatch, capsys, "annotate", "cells.h5ad", "--checkpoint", "none", "-o", name)
    assert "(-o)" in said


def test_batches_do_not_change_what_comes_out(checkpoint, monkeypatch):
    whole = annotate(raw_counts(), checkpoint, probabilities=True)
    monkeypatch.setattr("hce_jax.annotate.prepared._BLOCK_SIZE", 16)
    parts = annotate(raw_counts(), checkpoint, probabilities=True, batch_size=7)
    pd.testing.assert_frame_equal(parts.obs, whole.obs)
    np.testing.assert_allclose(parts.obsm["hce_probabilities"], whole.obsm["hce_probabilities"], atol=1e-6)
