"""MLP and TabNet from a store to embeddings and explanations, with the shipped configurations made small."""

import jax
import numpy as np
import pytest
import scipy.sparse as sp
from fits import fit_one as fit
from stores import N_GENES, N_TYPES, expression, write_tiny_store

from configs import linear_hce, mlp_ce, mlp_hce, tabnet_ce, tabnet_hce
from hce_jax import evaluation
from hce_jax.checkpoint import load_model
from hce_jax.errors import CheckpointError, ConfigError, StoreError

SMALL = {
    "mlp": {"hidden_size": 16, "n_hidden": 2},
    "tabnet": {"n_d": 8, "n_a": 4, "n_steps": 2, "n_independent": 1, "n_shared": 1, "virtual_batch_size": 15},
}


@pytest.fixture(scope="module")
def store_path(tmp_path_factory):
    path = write_tiny_store(tmp_path_factory.mktemp("models") / "store")
    rng = np.random.default_rng(0)
    np.save(path / "augmentations.npy", rng.normal(0, 0.05, (7, N_GENES)).astype(np.float32))
    return path


def small(module, store_path, **changes):
    config = module.get_config()
    config.update(data_path=str(store_path), batch_size=30, max_epochs=2, **SMALL.get(config.model_type, {}))
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def trained(store_path):
    """One run of each model."""
    return {
        module.get_config().model_type: fit(small(module, store_path)) for module in (mlp_hce, tabnet_hce, linear_hce)
    }


CELLS = 2000 + np.arange(17)


@pytest.mark.parametrize("model_type", ["mlp", "tabnet"])
def test_a_checkpoint_gives_back_statistics_and_all_so_that_scores_repeat(trained, model_type):
    result = trained[model_type]
    assert evaluation.test(result.checkpoint).f1_macro == result.test.f1_macro
    assert evaluation.validate(result.checkpoint).f1_macro == result.val_f1_macro
    p = load_model(result.checkpoint).predict_proba(expression(CELLS))
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-5)
    stats = jax.tree.leaves(load_model(result.checkpoint).stats)
    assert stats
    assert any(np.asarray(values).any() for values in stats)


@pytest.mark.parametrize(("model_type", "width"), [("mlp", 16), ("tabnet", 8)])
def test_embeddings_do_not_depend_on_the_batch_or_the_kind_of_input(trained, model_type, width):
    predictor, x = load_model(trained[model_type].run), expression(CELLS)
    whole = predictor.embed(x)
    assert whole.shape == (17, width)
    np.testing.assert_allclose(predictor.embed(sp.csr_array(x), batch_size=4), whole, atol=1e-5)


def test_the_importance_of_genes_is_the_masks_weighted_by_the_steps(trained):
    predictor, x = load_model(trained["tabnet"].run), expression(CELLS)
    explanation = predictor.explain(x, batch_size=5)
    assert explanation.importance.shape == (17, N_GENES)
    assert len(explanation.masks) == 2
    for mask in explanation.masks:
        assert mask.min() >= 0
        np.testing.assert_allclose(mask.sum(axis=1), 1, atol=1e-5)
    # Each step's weight is the sum of its output, so the importance sums to the sum of the embedding.
    np.testing.assert_allclose(explanation.importance.sum(axis=1), predictor.embed(x).sum(axis=1), rtol=1e-4, atol=1e-5)
    dense = explanation.importance.toarray()
    totals = dense.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(explanation.normalised().toarray(), dense / np.where(totals > 0, totals, 1), atol=1e-6)
    for row, indices in zip(dense, explanation.gene_indices(), strict=True):
        np.testing.assert_array_equal(np.sort(indices), np.flatnonzero(row > 0))


def test_no_cells_give_empty_results(trained):
    predictor, none = load_model(trained["tabnet"].run), expression(CELLS)[:0]
    assert predictor.embed(none).shape == (0, 8)
    explanation = predictor.explain(none)
    assert explanation.importance.shape == (0, N_GENES)
    assert explanation.gene_indices() == []


def test_what_a_model_cannot_do_is_said(trained):
    x = expression(CELLS)
    with pytest.raises(CheckpointError, match="is a linear model, which has no embedding: MLP and TabNet have one"):
        load_model(trained["linear"].run).embed(x)
    with pytest.raises(CheckpointError, match="is a mlp model, which has no masks: TabNet has them"):
        load_model(trained["mlp"].run).explain(x)


@pytest.mark.parametrize("module", [mlp_ce, tabnet_ce])
def test_dropout_and_augmentation_follow_the_seed(store_path, tmp_path, module):
    def weights(**changes):
        shape = {"n_steps": 1} if module is tabnet_ce else {"n_hidden": 1}
        result = fit(small(module, store_path, log_dir=str(tmp_path), max_epochs=1, **shape, **changes))
        return [np.asarray(leaf) for leaf in jax.tree.leaves(load_model(result.checkpoint).params)]

    base, same, plain = weights(), weights(), weights(augment_training_data=False)
    assert all(np.array_equal(a, b) for a, b in zip(base, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(base, plain, strict=True))


def test_precision_bf16_trains_like_float32(store_path, tmp_path):
    def scores(precision):
        result = fit(small(mlp_hce, store_path, log_dir=str(tmp_path), precision=precision, max_epochs=6))
        return result.test.f1_micro, load_model(result.checkpoint)

    full, _ = scores("float32")
    half, predictor = scores("bf16")
    assert abs(full - half) < 0.2
    assert all(leaf.dtype != "bfloat16" for leaf in jax.tree.leaves(predictor.params))


@pytest.mark.parametrize(
    ("module", "changes", "error", "says"),
    [
        (tabnet_ce, {"n_steps": 0}, ConfigError, "config.n_steps is 0"),
        (tabnet_ce, {"n_shared": 0, "n_independent": 0}, ConfigError, "both 0"),
        (
            tabnet_ce,
            {"mask_type": "softmax"},
            ConfigError,
            "config.mask_type is 'softmax'; choose one of entmax, sparse",
        ),
        (tabnet_ce, {"batch_size": 31, "virtual_batch_size": 2}, ConfigError, "cannot train on a single cell"),
        (mlp_ce, {"dropout": -0.1}, ConfigError, "config.dropout is -0.1"),
        (tabnet_ce, {"gamma": 0.5}, ConfigError, "config.gamma is 0.5; it must be 1 or more"),
        (tabnet_ce, {"lambda_sparse": float("nan")}, ConfigError, "config.lambda_sparse is nan"),
        (tabnet_ce, {"momentum": 0.0}, ConfigError, "config.momentum is 0.0"),
    ],
)
def test_a_bad_hyper_parameter_is_named_before_a_run_folder_is_made(store_path, tmp_path, module, changes, error, says):
    with pytest.raises(error, match=says):
        fit(small(module, store_path, log_dir=str(tmp_path), **changes))
    assert not list(tmp_path.iterdir())


def test_a_ghost_batch_larger_than_the_batch_is_one_ghost_batch(store_path, tmp_path):
    results = [
        fit(small(tabnet_ce, store_path, log_dir=str(tmp_path), max_epochs=1, virtual_batch_size=size, n_steps=1))
        for size in (30, 4096)
    ]
    first, second = (load_model(result.checkpoint).predict_proba(expression(CELLS)) for result in results)
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_augmentation_vectors_of_another_length_or_absent_are_named(tmp_path):
    path = write_tiny_store(tmp_path / "store")
    with pytest.raises(StoreError, match=r"augmentations.npy does not exist"):
        fit(small(mlp_ce, path))
    for content, says in (
        (np.zeros((0, N_GENES)), "holds no vectors"),
        (np.full((2, N_GENES), np.nan), "holds a non-finite value"),
        (np.full((2, N_GENES), "a"), "holds no numbers"),
    ):
        np.save(path / "augmentations.npy", content)
        with pytest.raises(StoreError, match=f"augmentations.npy {says}"):
            fit(small(mlp_ce, path))
    np.save(path / "augmentations.npy", np.zeros((3, N_GENES + 1)))
    with pytest.raises(StoreError, match=rf"augmentations.npy has shape \(3, 13\), but the store has {N_GENES} genes"):
        fit(small(mlp_ce, path))


def test_a_store_without_augmentation_vectors_trains_without_augmentation(tmp_path):
    path = write_tiny_store(tmp_path / "store")
    result = fit(small(mlp_ce, path, augment_training_data=False))
    assert load_model(result.run).predict_proba(expression(CELLS)).shape == (17, N_TYPES)
