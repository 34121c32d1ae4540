"""Why this label and not its rival: against numpy, by weights and by differences, and against tables worked by hand."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from flax import nnx

from hce_jax import predictor as predictor_module
from hce_jax.annotate.contrast import contrast_table, sample_rows, sentences
from hce_jax.errors import CheckpointError
from hce_jax.hierarchy import reachability_from_edges
from hce_jax.models import MLPConfig, TabNetConfig, build_model, split_model
from hce_jax.predictor import ModelCard, Predictor
from hce_jax.typing import PRECISIONS

LABELS = ("T", "CD4", "CD8", "B", "platelet", "CD4 CD8", "memory CD4", "gamma-delta T")
T, CD4, CD8, B, PLATELET, BOTH, MEMORY, GAMMA_DELTA = range(8)
#: CD4 CD8 has two parents; T, B and platelet have none.
EDGES = [(T, CD4), (T, CD8), (T, GAMMA_DELTA), (CD4, BOTH), (CD8, BOTH), (CD4, MEMORY)]
REACH = reachability_from_edges(len(LABELS), EDGES).astype(np.float32)
N_GENES = 30
SIZES = {
    "linear": {},
    "mlp": vars(MLPConfig(hidden_size=6, n_hidden=2)),
    "tabnet": vars(TabNetConfig(n_d=4, n_a=3, n_steps=2, n_independent=0, n_shared=1, mask_type="sparsemax")),
}


def predictor_of(kind, reachability=REACH, seed=0):
    config = {"model_type": kind, "precision": "float32", **SIZES[kind]}
    model = build_model(config, N_GENES, len(reachability), nnx.Rngs(seed), precision=PRECISIONS["float32"])
    graphdef, params, stats = split_model(model)
    stats = jax.tree.map(lambda leaf: leaf + 0.3 if leaf.dtype == np.float32 else leaf, stats)
    ids, names = (tuple(f"{prefix}{gene}" for gene in range(N_GENES)) for prefix in ("ENSG", "G"))
    labels = LABELS[: len(reachability)]
    cl_ids = tuple(f"CL:{code}" for code in range(len(labels)))
    card = ModelCard(config, ids, names, labels, cl_ids, None, "", {}, "store", 0, 0, {})
    return Predictor(Path(kind), card, reachability, graphdef, params, stats)


@pytest.fixture(scope="module")
def tabnet():
    return predictor_of("tabnet")


def linear_of(weights, biases, reachability=REACH):
    predictor = predictor_of("linear", reachability)
    predictor.params = {"linear": {"kernel": np.float32(weights), "bias": np.float32(biases)}}
    return predictor


def cells(n_cells, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.gamma(2, 1, (n_cells, N_GENES)) * (rng.random((n_cells, N_GENES)) < 0.6)).astype(np.float32)


def test_rows_are_spread_over_the_cells_of_each_label():
    codes = np.array([2, 2, -1, 0, 2, 2, 2, -1, 0, 2])  # 2 at 0, 1, 4, 5, 6, 9
    assert sample_rows(codes, per_label=3).tolist() == [0, 3, 4, 8, 9]  # the first, the middle one, the last
    assert sample_rows(codes).tolist() == [0, 1, 3, 4, 5, 6, 8, 9]
    assert len(sample_rows(np.zeros(12_345, int))) == 100
    assert sample_rows(np.array([-1, -1])).tolist() == []


def mean_weights(logits_n, weights_gc, types):
    """Weights of a set of types: their mean, weighted by the softmax within the set; in float64."""
    share = np.exp(logits_n[:, types] - logits_n[:, types].max(axis=1, keepdims=True))
    return share / share.sum(axis=1, keepdims=True) @ weights_gc[:, types].T


def test_contributions_of_a_linear_model_are_weights_times_expression():
    rng = np.random.default_rng(1)
    weights, biases = rng.normal(0, 0.3, (N_GENES, 8)), np.array([0, 2, 0, 3, 1, 0, 2, -4.0])
    x, codes = cells(600), rng.choice([CD4, B, MEMORY, -1], 600, p=[0.5, 0.2, 0.2, 0.1])
    table = contrast_table(linear_of(weights, biases), sp.csr_array(x), codes, n_genes_shown=N_GENES)
    assert list(table.columns) == ["label", "label_ontology_term_id", "rival", "rival_ontology_term_id", "cells",
        "rank", "gene_id", "gene_name", "contribution", "expression", "elsewhere"]  # fmt: skip

    logits = x.astype(float) @ weights + biases
    means = {code: x[codes == code].mean(axis=0) for code in (CD4, B, MEMORY)}
    # CD4 and CD8 are both above CD4 CD8, which counts for neither; B is elsewhere for CD4, but memory CD4 is not.
    expected = {
        CD4: (CD8, [CD4, MEMORY], [CD8], means[B]),
        B: (T, [B], [T, CD4, CD8, BOTH, MEMORY, GAMMA_DELTA], (means[CD4] + means[MEMORY]) / 2),
        MEMORY: (BOTH, [MEMORY], [BOTH], means[B]),
    }
    assert table["label"].unique().tolist() == ["CD4", "B", "memory CD4"]
    for code, (rival, types, rivals, elsewhere) in expected.items():
        own = codes == code
        slope = mean_weights(logits[own], weights, types) - mean_weights(logits[own], weights, rivals)
        contribution = ((x[own] - elsewhere) * slope).mean(axis=0)
        found = table[table["label"] == LABELS[code]]
        assert (found["rival"] == LABELS[rival]).all()
        assert (found["label_ontology_term_id"] == f"CL:{code}").all()
        assert (found["rival_ontology_term_id"] == f"CL:{rival}").all()
        assert (found["cells"] == own.sum()).all()
        order = np.argsort(-contribution)
        n_for = int((contribution > 0).sum())
        genes = [*order[:n_for], *order[::-1][:3]]
        assert 2 < n_for < N_GENES - 3
        assert found["rank"].tolist() == [*range(1, n_for + 1), -1, -2, -3]
        assert found["gene_name"].tolist() == [f"G{gene}" for gene in genes]
        assert found["gene_id"].tolist() == [f"ENSG{gene}" for gene in genes]
        for column, value in {"contribution": contribution, "expression": means[code], "elsewhere": elsewhere}.items():
            np.testing.assert_allclose(found[column].astype(float), value[genes], atol=2e-5, err_msg=column)


def test_contributions_of_a_linear_model_add_up_to_the_log_odds():
    weights, biases = np.random.default_rng(2).normal(0, 0.3, (N_GENES, 8)), np.arange(8.0)
    x, predictor = cells(20), linear_of(weights, biases)
    (found,) = predictor.contrast(x, np.tile(np.eye(8)[B], (20, 1)), np.tile(np.eye(8)[MEMORY], (20, 1)))
    p = predictor.predict_proba(x, 256).astype(float)
    np.testing.assert_allclose(found.log_odds, np.log(p[:, B] / p[:, MEMORY]), atol=2e-5)
    by_genes = (found.gradient * x).sum(axis=1)
    np.testing.assert_allclose(by_genes + biases[B] - biases[MEMORY], found.log_odds, atol=2e-5)


def test_gradients_of_an_mlp_are_those_of_differences_in_float64():
    predictor = predictor_of("mlp")
    params, stats = (jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), each)
                     for each in (predictor.params, predictor.stats))  # fmt: skip

    def log_odds(x):
        hidden = (each.values() for each in (params["layers"], params["norms"], stats["norms"]))
        for layer, norm, running in zip(*hidden, strict=True):
            x = x @ layer["kernel"] + layer["bias"]
            x = (x - running["running_mean"]) / np.sqrt(running["running_variance"] + 1e-5)
            x = x * norm["weight"] + norm["bias"]
            x = x / (1 + np.exp(-x))
        e = np.exp(x @ params["linear"]["kernel"] + params["linear"]["bias"])
        return np.log(e[:, [CD4, MEMORY]].sum(axis=1) / e[:, [B, PLATELET]].sum(axis=1))

    x, step = cells(300), 1e-5
    types, rivals = np.zeros((2, 300, 8))
    types[:, [CD4, MEMORY]], rivals[:, [B, PLATELET]] = 1, 1
    batches = list(predictor.contrast(sp.csr_array(x), types, rivals))
    assert [len(batch.log_odds) for batch in batches] == [256, 44]
    np.testing.assert_allclose(np.concatenate([batch.log_odds for batch in batches]), log_odds(x), atol=2e-6)
    gradient = np.concatenate([batch.gradient for batch in batches])
    expected = np.stack([(log_odds(x + step * each) - log_odds(x - step * each)) / (2 * step)
                         for each in np.eye(N_GENES)], axis=1)  # fmt: skip
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert all(batch.importance is None for batch in batches)


def test_gradients_of_tabnet_hold_its_masks(tabnet):
    x = cells(12)
    types, rivals = np.tile(np.eye(8)[CD4], (12, 1)), np.tile(np.eye(8)[PLATELET], (12, 1))
    (found,) = tabnet.contrast(x, types, rivals)
    p = tabnet.predict_proba(x, 256).astype(float)
    np.testing.assert_allclose(found.log_odds, np.log(p[:, CD4] / p[:, PLATELET]), atol=2e-5)

    explanation = tabnet.explain(x, 256)
    masks = [mask.toarray() for mask in explanation.masks]
    unseen = sum(masks) == 0
    assert 0.1 < unseen.mean() < 0.9
    assert not found.gradient[unseen].any()
    np.testing.assert_allclose(found.importance, explanation.normalised().toarray(), atol=1e-6)

    read, step = jax.jit(tabnet._model.read), 0.05

    def log_odds(x):
        logits = np.asarray(read(x, masks), np.float64)
        return logits[:, CD4] - logits[:, PLATELET]

    expected = np.stack([(log_odds(x + step * each) - log_odds(x - step * each)) / (2 * step)
                         for each in np.eye(N_GENES, dtype=np.float32)], axis=1)  # fmt: skip
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(found.gradient, expected, atol=2e-3)


def test_table_of_tabnet_tells_the_share_of_the_masks(tabnet):
    x = cells(300)
    codes = np.where(np.arange(300) % 3 == 0, B, CD4)
    table = contrast_table(tabnet, sp.csr_array(x), codes)
    share = tabnet.explain(x, 256).normalised().toarray()
    assert set(table["label"]) == {"B", "CD4"}
    for row in table.itertuples():
        expected = share[codes == LABELS.index(row.label), int(row.gene_name[1:])].mean()
        np.testing.assert_allclose(row.mask, expected, atol=1e-6)
    assert (table["mask"] > 0).all()


def test_contrasts_of_wide_rows_are_those_of_the_genes_alone(tabnet, monkeypatch):
    x = cells(5)
    sets = np.tile(REACH[T], (5, 1)), np.tile(REACH[B], (5, 1))
    (narrow,) = tabnet.contrast(x, *sets)
    monkeypatch.setattr(predictor_module, "row_width", lambda n_genes: n_genes + 10)
    (wide,) = tabnet.contrast(x, *sets)
    for expected, found in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("label", "masses", "rival"),
    [
        pytest.param(CD4, {CD8: 0.2, GAMMA_DELTA: 0.1, B: 0.3}, CD8, id="a sibling, though a stranger has more"),
        pytest.param(CD4, {CD8: 0.1, GAMMA_DELTA: 0.2, BOTH: 0.3}, GAMMA_DELTA, id="what both share is not counted"),
        pytest.param(CD8, {CD4: 0.1, MEMORY: 0.2, GAMMA_DELTA: 0.2}, CD4, id="descendants count for a sibling"),
        pytest.param(B, {PLATELET: 0.2, T: 0.1, CD8: 0.15}, T, id="of a root, another root with what is below it"),
        pytest.param(B, {PLATELET: 0.3, T: 0.1, CD8: 0.1}, PLATELET, id="of a root, the more probable root"),
    ],
)
def test_rival_is_the_most_probable_sibling(label, masses, rival):
    assert rival_of(label, masses, REACH) == rival


def rival_of(label, masses, reachability):
    """Name the rival of the label of cells that all have these probabilities, the rest being the label's."""
    p = np.full(len(reachability), 1e-4)
    p[list(masses)] = list(masses.values())
    p[label] = 1 - sum(masses.values())
    weights = np.random.default_rng(3).normal(0, 1e-4, (N_GENES, len(p)))  # that there are contributions
    x = cells(4)
    table = contrast_table(linear_of(weights, np.log(p), reachability), sp.csr_array(x), np.full(4, label))
    assert (table["elsewhere"] == 0).all()  # no cell has another label
    return LABELS.index(table["rival"].unique().item())


def test_label_without_siblings_is_set_against_what_is_neither_above_nor_below_it():
    two_chains = reachability_from_edges(4, [(0, 1), (2, 3)]).astype(np.float32)
    assert rival_of(1, {0: 0.5, 2: 0.05, 3: 0.1}, two_chains) == 2
    assert rival_of(0, {1: 0.5, 2: 0.1, 3: 0.05}, two_chains) == 2
    upside_down = reachability_from_edges(4, [(0, 1), (3, 2)]).astype(np.float32)
    for label in (0, 1):  # nothing is lost from 3 to 2
        assert rival_of(label, {2: 0.1, 3: 1e-12}, upside_down) == 3


def test_genes_that_say_nothing_are_left_out():
    weights, x = np.zeros((N_GENES, 8)), cells(5) + 1
    weights[4, B] = 0.5
    table = contrast_table(linear_of(weights, np.zeros(8)), sp.csr_array(x), np.full(5, B))
    assert table[["rank", "gene_name"]].to_numpy().tolist() == [[1, "G4"]]
    np.testing.assert_allclose(table["contribution"].item(), 0.5 * x[:, 4].mean(), rtol=1e-5)


def test_label_that_all_types_are_above_or_below_has_no_rival():
    chain = reachability_from_edges(3, [(0, 1), (1, 2)]).astype(np.float32)
    table = contrast_table(predictor_of("linear", chain), sp.csr_array(cells(9)), np.arange(9) % 3)
    assert len(table) == 0
    assert sentences(table) == []


def test_without_labels_the_table_is_empty_and_has_its_columns(tabnet):
    for predictor, last in ((predictor_of("linear"), "elsewhere"), (tabnet, "mask")):
        table = contrast_table(predictor, sp.csr_array(cells(3)), np.full(3, -1))
        assert len(table) == 0
        assert table.columns[-1] == last
        assert sentences(table) == []


def test_ids_of_types_are_those_given_else_those_of_the_model_else_unknown():
    predictor, given = predictor_of("linear"), [f"given:{code}" for code in range(8)]

    def ids(**options):
        table = contrast_table(predictor, sp.csr_array(cells(3)), np.full(3, CD4), 1, **options)
        assert table["rival"].unique().tolist() == ["CD8"]
        return [*table["label_ontology_term_id"].unique(), *table["rival_ontology_term_id"].unique()]

    predictor.params["linear"]["bias"] = np.eye(8, dtype=np.float32)[CD8]
    assert ids() == ["CL:1", "CL:2"]
    assert ids(cl_ids=given) == ["given:1", "given:2"]
    predictor.card = dataclasses.replace(predictor.card, cl_ids=None)
    assert ids(cl_ids=given) == ["given:1", "given:2"]
    assert ids() == ["unknown", "unknown"]


def test_other_genes_are_refused():
    with pytest.raises(CheckpointError, match=r"\(3, 29\), but the model linear expects \(cells, 30 genes\)"):
        contrast_table(predictor_of("linear"), sp.csr_array(cells(3)[:, 1:]), np.zeros(3, int))


def test_sentences_name_what_there_is_much_and_little_of():
    rows = [("B", "T", 1, "CD79A", 2.0, 0.1), ("B", "T", 2, "CD3D", 0.1, 1.0), ("B", "T", 3, "CD74", 3.0, 2.0),
            ("B", "T", -1, "IL7R", 1.0, 0.2), ("T", "B", 1, "IL7R", 0.0, 0.5), ("CD8", "CD4", -1, "LTB", 1.0, 0.0),
            *(("CD4", "CD8", rank, f"G{rank}", 1.0, 0.0) for rank in range(1, 8))]  # fmt: skip
    table = pd.DataFrame(rows, columns=["label", "rival", "rank", "gene_name", "expression", "elsewhere"])
    assert sentences(table) == [
        "B and not T: CD79A, CD74; little CD3D",
        "T and not B: little IL7R",
        "CD8 and not CD4: no single gene",
        "CD4 and not CD8: G1, G2, G3, G4, G5",
    ]
