import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import assert_running_statistics, assert_within_noise, compiled, golden_config, golden_model

from hce_jax import models
from hce_jax.errors import ConfigError
from hce_jax.models import TabNet, TabNetConfig, model_config
from hce_jax.ops import batch_norm, entmax15, sparsemax
from hce_jax.typing import PRECISIONS

SELECTORS = {"entmax": entmax15, "sparsemax": sparsemax}
SMALL = TabNetConfig(n_d=6, n_a=3, n_independent=2, n_shared=2, virtual_batch_size=8)


def tabnet(n_genes=200, seed=0, precision="float32", **config):
    config = dataclasses.replace(SMALL, **config)
    return TabNet(config, n_genes, 5, precision=PRECISIONS[precision], rngs=nnx.Rngs(seed))


def cells(n_cells=32, n_genes=200, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.random((n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < 0.3), jnp.float32)


@pytest.mark.golden("tabnet")
def test_golden_tabnet(golden):
    config = model_config(golden_config(golden, "tabnet"))
    model, x = golden_model(golden, "tabnet"), jnp.asarray(golden.arrays["x"])
    assert batch_norm.part_sizes(len(x), config.virtual_batch_size) == golden.config["train_chunk_sizes"]
    logits, auxiliary = compiled(model, train=True)(x)
    assert_within_noise(golden, "train_logits", logits, 1e-5)
    assert_within_noise(golden, "train_m_loss", auxiliary.mean() / -config.lambda_sparse, 1e-5)
    assert_running_statistics(golden, model, "tabnet", 5e-6)

    evaluate = nnx.jit(lambda model, x: (model(x), model.embed(x), model.explain(x)))  # with the updated statistics
    (logits, auxiliary), embedding, (importance, masks) = evaluate(model, x)
    assert_within_noise(golden, "eval_logits", logits, 1e-5)
    assert_within_noise(golden, "eval_m_loss", auxiliary.mean() / -config.lambda_sparse, 1e-5)
    assert_within_noise(golden, "eval_embedding", embedding, 1e-5)
    assert_within_noise(golden, "eval_m_explain", importance, 1e-5)
    assert len(masks) == golden.config["n_steps"]
    for step, mask in enumerate(masks):
        assert_within_noise(golden, f"eval_mask_{step}", mask, 1e-5)


def test_the_defaults_are_the_published_hyper_parameters():
    assert TabNetConfig() == TabNetConfig(128, 64, 1, 1.3, 5, 3, 256, 0.02, "entmax", 1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_steps": 0}, "config.n_steps is 0; it must be 1 or more"),
        ({"n_shared": -1}, "config.n_shared is -1; it must be 0 or more"),
        ({"n_shared": 0, "n_independent": 0}, "n_independent and config.n_shared are both 0"),
        ({"mask_type": "softmax"}, "config.mask_type is 'softmax'; choose one of entmax, sparsemax"),
        ({"virtual_batch_size": 0}, "config.virtual_batch_size is 0; it must be 1 or more"),
    ],
)
def test_a_bad_hyper_parameter_is_named_with_its_value_and_rule(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("n_cells", "changes"),
    [(29, {"n_shared": 0}), (32, {"n_independent": 0}), (29, {"n_steps": 2, "mask_type": "sparsemax"})],
)
def test_every_option_agrees_with_the_network_written_out_plainly(n_cells, changes):
    model, x = tabnet(**changes), cells(n_cells)
    np.testing.assert_allclose(compiled(model, train=True)(x)[0], nnx.jit(plain_logits)(model, x), atol=1e-3)


def plain_logits(model, x):
    """Give the training logits step by step as the golden README says it, with nothing folded or mapped."""
    config = model.config
    sizes = batch_norm.part_sizes(len(x), config.virtual_batch_size)

    def norm(x):
        return (x - x.mean(0, keepdims=True)) / jnp.sqrt(x.var(0, keepdims=True) + 1e-5)

    def ghost(x):
        return jnp.concatenate([norm(part) for part in jnp.split(x, np.cumsum(sizes)[:-1])])

    def transform(x, transformer):
        kernels = [*model.shared_kernels, *transformer.kernels]
        for index, kernel in enumerate(kernels):
            value, gate = jnp.split(ghost(x @ kernel[...]), 2, axis=1)
            gated = value / (1 + jnp.exp(-gate))
            x = gated if index == 0 else (x + gated) * np.sqrt(0.5).astype(np.float32)
        return x

    x = norm(x)
    attended, prior, embedding = transform(x, model.splitter)[:, config.n_d :], jnp.ones_like(x), 0.0
    for attention, transformer in zip(model.attentions, model.transformers, strict=True):
        mask = SELECTORS[config.mask_type](ghost(attended @ attention.kernel[...]) * prior)
        prior = prior * (config.gamma - mask)
        out = transform(mask * x, transformer)
        embedding, attended = embedding + jnp.maximum(out[:, : config.n_d], 0), out[:, config.n_d :]
    return embedding @ model.head[...]


def step_of(n_cells, width=200, **config):
    """Give loss, statistics and gradients of a step of training."""
    model = tabnet(n_independent=1, n_shared=1, virtual_batch_size=16, lambda_sparse=0.1, **config)
    graphdef, params, stats = nnx.split(model, nnx.Param, ...)
    x = jnp.pad(cells(n_cells), ((0, 0), (0, width - 200)))

    def loss(params):
        model = nnx.merge(graphdef, params, stats, copy=True)
        logits, auxiliary = model(x, train=True)
        weights = jnp.arange(1.0, 1 + logits.size).reshape(logits.shape) / logits.size
        return (weights * logits**2).mean() + auxiliary.mean(), nnx.state(model, nnx.BatchStat)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.mark.parametrize(
    ("kernel", "n_cells", "config"),
    [
        (True, 29, {}),  # ghost batches of 15 and 14 rows
        (True, 32, {"mask_type": "sparsemax"}),
        (False, 29, {"n_steps": 2}),
    ],
)
def test_genes_selected_by_the_kernel_from_wide_rows_give_the_same_step(monkeypatch, kernel, n_cells, config):
    plain = step_of(n_cells, **config)
    if kernel:
        monkeypatch.setattr(models.tabnet, "_in_one_pass", lambda: True)
        monkeypatch.setattr(models.tabnet, "_each_part", jax.vmap)
    found = step_of(n_cells, width=256, **config)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, plain)
    for value, expected in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5 * max(np.abs(expected).max(), 1e-2))


def test_one_ghost_batch_at_a_time_and_all_at_once_give_the_same_step(monkeypatch):
    def step():
        model = tabnet(n_independent=1, n_shared=1, virtual_batch_size=16)
        graphdef, params, stats = nnx.split(model, nnx.Param, ...)

        def loss(params):
            model = nnx.merge(graphdef, params, stats, copy=True)
            logits, auxiliary = model(cells(61), train=True)
            return (jnp.arange(61.0)[:, None] / 61 * logits**2).mean() + auxiliary.mean(), nnx.to_pure_dict(
                nnx.state(model, nnx.BatchStat)
            )

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    mapped = step()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    at_once = step()
    for found, expected in zip(jax.tree.leaves(mapped), jax.tree.leaves(at_once), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_ghost_batch_larger_than_the_batch_is_one_ghost_batch():
    larger, equal = tabnet(virtual_batch_size=500), tabnet(virtual_batch_size=12)
    np.testing.assert_array_equal(*(compiled(model, train=True)(cells(12))[0] for model in (larger, equal)))
    assert larger.attentions[0].norm.n_updates[...] == larger.splitter.norms[0].n_updates[...] == 1


def test_masks_are_distributions_over_few_genes_and_the_auxiliary_loss_is_their_weighted_entropy():
    model, x = tabnet(n_steps=2, lambda_sparse=0.5, momentum=0.9), cells()
    compiled(model, train=True)(x)
    importance, masks = compiled(model, "explain")(x)
    entropy = 0.0
    for mask in masks:
        np.testing.assert_allclose(mask.sum(1), 1, atol=1e-5)
        assert 0 < float((mask > 0).mean()) < 0.5
        entropy = entropy - np.where(mask > 0, mask * np.log(np.maximum(mask, 1e-30)), 0).sum(1)
    np.testing.assert_allclose(compiled(model)(x)[1], 0.5 * entropy / 2, atol=1e-5)
    assert importance.shape == x.shape
    assert (np.asarray(importance) >= 0).all()


def test_evaluation_leaves_the_running_statistics_alone_and_takes_cells_one_by_one():
    model = tabnet()
    compiled(model, train=True)(cells(seed=1))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    evaluate = compiled(model)
    together = evaluate(cells())[0]
    alone = jnp.concatenate([evaluate(row[None, :])[0] for row in cells()])
    np.testing.assert_allclose(together, alone, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))


def test_kernels_start_normal_with_the_published_standard_deviations():
    model = TabNet(TabNetConfig(), 3000, 100, precision=PRECISIONS["float32"], rngs=nnx.Rngs(0))
    for kernel, expected in (
        (model.attentions[0].kernel, 64**-0.25),
        (model.head, 128**-0.25),
        (model.shared_kernels[0], 2**0.5 * 3000**-0.25),
        (model.shared_kernels[1], 2**0.5 * 192**-0.25),
        (model.transformers[0].kernels[0], 2**0.5 * 192**-0.25),
    ):
        values = np.asarray(kernel[...])
        np.testing.assert_allclose(values.std(), expected, rtol=0.02)
        assert abs(values.mean()) < 0.02 * expected * 3


def test_shared_kernels_are_one_set_of_weights_and_every_use_has_its_own_norm():
    model = tabnet(n_steps=3)
    kernels = [leaf for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)) if leaf.shape == (200, 18)]
    assert len(kernels) == 1
    assert len({id(transformer.norms[0]) for transformer in (model.splitter, *model.transformers)}) == 4


def test_bf16_products_give_float32_logits():
    logits, _ = compiled(tabnet(precision="bf16"), train=True)(cells())
    assert logits.dtype == jnp.float32
    assert np.isfinite(np.asarray(logits)).all()
