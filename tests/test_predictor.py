"""Predictions for cells of a store: by the expressed genes alone on a CPU, else dense."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.sparse as sp
from coded_cells import N_GENES, N_TYPES, block_of, expression
from flax import nnx
from networks import compiled

from hce_jax import predictor as predictor_module
from hce_jax.input import Expression
from hce_jax.input import expression as expression_module
from hce_jax.models import MLPConfig, TabNetConfig, build_model, split_model
from hce_jax.predictor import Ensemble, ModelCard, Predictor
from hce_jax.typing import PRECISIONS

SIZES = {
    "linear": {},
    "mlp": {**vars(MLPConfig(hidden_size=16, n_hidden=2))},
    "tabnet": {**vars(TabNetConfig(n_d=8, n_a=8, n_steps=1, n_independent=1, n_shared=1))},
}
CELLS = np.arange(37)


def predictor_of(kind, seed=0, precision="float32", use_hierarchical_loss=True):
    config = {"model_type": kind, "precision": precision, **SIZES[kind]}
    model = build_model(config, N_GENES, N_TYPES, nnx.Rngs(seed), precision=PRECISIONS[precision])
    graphdef, params, stats = split_model(model)
    stats = jax.tree.map(lambda leaf: leaf + 0.3 if leaf.dtype == np.float32 else leaf, stats)
    names = tuple(f"G{gene}" for gene in range(N_GENES))
    labels = tuple(f"T{label}" for label in range(N_TYPES))
    loss = {"use_hierarchical_loss": use_hierarchical_loss, "epsilon": 1e-6}
    card = ModelCard(config, names, names, labels, None, None, "", loss, "store", 0, 0, {})
    return Predictor(Path(f"{kind}-{seed}"), card, np.eye(N_TYPES, dtype=np.float32), graphdef, params, stats)


def oracle(predictor, cells):
    """The model itself on dense expression, its softmax in float64."""
    model = nnx.merge(predictor.graphdef, predictor.params, predictor.stats)
    logits = np.asarray(compiled(model)(expression(cells))[0], np.float64)
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("kind", "reads_sparse"), [("linear", True), ("mlp", True), ("tabnet", False)])
def test_probabilities_of_a_block_are_the_model_s(kind, reads_sparse):
    predictor = predictor_of(kind)
    assert predictor.reads_sparse is reads_sparse
    expected = oracle(predictor, CELLS)
    assert expected.std(axis=0).max() > 1e-3  # cells differ
    given = predictor.predict_block(Expression(block_of(CELLS)))
    assert given.shape == (37, N_TYPES)
    np.testing.assert_allclose(given, expected, atol=2e-5)
    for x in (expression(CELLS), sp.csr_array(expression(CELLS))):
        np.testing.assert_allclose(predictor.predict_proba(x, batch_size=16), expected, atol=2e-5)


@pytest.mark.parametrize("kind", SIZES)
def test_answers_are_the_same_from_wide_rows_and_as_long_as_the_model_s_lists(kind, monkeypatch):
    predictor = predictor_of(kind)
    predictor.reads_sparse = False  # as on an accelerator
    asked = ["predict_proba", *(name for name in ("embed", "explain") if hasattr(predictor._model, name))]
    x = expression(CELLS)

    def answers():
        return [predictor.predict_block(Expression(block_of(CELLS))), *(getattr(predictor, name)(x) for name in asked)]

    narrow = answers()
    for module in (expression_module, predictor_module):
        monkeypatch.setattr(module, "row_width", lambda n_genes: n_genes + 40)
    assert Expression(block_of(CELLS)).dense.shape == (64, N_GENES + 40)
    for expected, found in zip(jax.tree.leaves(narrow), jax.tree.leaves(answers()), strict=True):
        assert found.shape == expected.shape
        dense = [each.toarray() if sp.issparse(each) else each for each in (found, expected)]
        np.testing.assert_allclose(*dense, atol=2e-6)


def test_precision_that_was_asked_for_is_kept():
    assert not predictor_of("linear", precision="bf16").reads_sparse


def test_block_of_an_ensemble_gets_the_mean_of_its_members():
    members = [predictor_of("linear"), predictor_of("tabnet", 1)]
    cells = Expression(block_of(CELLS))
    expected = np.mean([oracle(each, CELLS) for each in members], axis=0)
    ensemble = Ensemble(members)
    assert not ensemble.reads_sparse
    np.testing.assert_allclose(ensemble.predict_block(cells), expected, atol=2e-5)


@pytest.mark.parametrize(("kind", "size"), [("linear", None), ("mlp", 16), ("tabnet", 8)])
def test_embedding_comes_with_the_probabilities(kind, size):
    predictor = predictor_of(kind)
    assert predictor.embedding_size == size
    lone, several = Ensemble([predictor]), Ensemble([predictor, predictor_of(kind, 1)])
    expected = oracle(predictor, CELLS)
    for reads_sparse in (True, False) if predictor.reads_sparse else (False,):
        predictor.reads_sparse = reads_sparse
        given = lone.predict_and_embed(Expression(block_of(CELLS)))
        np.testing.assert_allclose(given.probabilities, expected, atol=2e-5)
        if size is None:
            assert given.embedding is None
        else:
            assert given.embedding.shape == (37, size)
            np.testing.assert_allclose(given.embedding, predictor.embed(expression(CELLS)), atol=2e-5)
    assert several.embedding_size is None
    both = several.predict_and_embed(Expression(block_of(CELLS)))
    assert both.embedding is None
    np.testing.assert_allclose(both.probabilities, several.predict_block(Expression(block_of(CELLS))), atol=1e-6)


def test_threads_may_ask_at_a_time():
    predictor = predictor_of("mlp")
    blocks = [block_of(np.arange(start, start + 20)) for start in range(0, 200, 20)]
    with ThreadPoolExecutor(4) as pool:
        given = list(pool.map(lambda block: predictor.predict_block(Expression(block)), blocks))
    np.testing.assert_allclose(np.concatenate(given), oracle(predictor, np.arange(200)), atol=2e-5)


def test_a_predictor_tells_its_genes_and_types_as_a_store_does():
    predictor = predictor_of("linear")
    assert predictor.side.gene_ids == predictor.card.gene_ids
    assert predictor.side.labels == predictor.card.labels
    assert predictor.side.n_types == N_TYPES
    np.testing.assert_array_equal(predictor.side.reachability, np.eye(N_TYPES))


def test_title_names_models_and_losses():
    ce = predictor_of("linear", 1, use_hierarchical_loss=False)
    assert predictor_of("linear").title == "linear, hierarchical cross entropy"
    assert Ensemble([predictor_of("linear"), ce]).title == "2 x linear, hierarchical cross entropy and cross entropy"
    assert Ensemble([ce, predictor_of("mlp")]).model_type == "ensemble"
