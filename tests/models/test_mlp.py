import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import assert_running_statistics, assert_within_noise, compiled, golden_model

from hce_jax.errors import ConfigError
from hce_jax.models import MLP, MLPConfig
from hce_jax.typing import PRECISIONS


def mlp(n_genes=50, seed=0, precision="float32", **config):
    return MLP(MLPConfig(**config), n_genes, 7, precision=PRECISIONS[precision], rngs=nnx.Rngs(seed))


def cells(n_cells=32, n_genes=50):
    return jnp.asarray(np.random.default_rng(0).normal(size=(n_cells, n_genes)), jnp.float32)


@pytest.mark.golden("mlp")
def test_golden_mlp(golden):
    model, x = golden_model(golden, "mlp"), jnp.asarray(golden.arrays["x"])
    evaluate = compiled(model)
    assert_within_noise(golden, "eval_logits_before", evaluate(x)[0], 5e-6)
    assert_within_noise(golden, "train_logits", compiled(model, train=True)(x)[0], 5e-6)
    assert_running_statistics(golden, model, "mlp", 5e-6)
    logits, auxiliary = evaluate(x)
    assert_within_noise(golden, "eval_logits", logits, 5e-6)
    assert_within_noise(golden, "eval_embedding", compiled(model, "embed")(x), 5e-6)
    np.testing.assert_array_equal(auxiliary, np.zeros(len(x)))


def test_the_defaults_are_the_published_hyper_parameters():
    assert MLPConfig() == MLPConfig(hidden_size=128, n_hidden=8, dropout=0.1)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [("hidden_size", 0, "1 or more"), ("n_hidden", 0, "1 or more"), ("dropout", -0.1, "at least 0 and below 1"),
     ("dropout", 1.0, "at least 0 and below 1")],
)  # fmt: skip
def test_a_bad_hyper_parameter_is_named_with_its_value_and_rule(field, value, rule):
    with pytest.raises(ConfigError, match=f"config.{field} is {value}; it must be {rule}"):
        MLPConfig(**{field: value})


def test_dropout_drops_its_share_in_training_only_and_keeps_the_mean():
    model = mlp(n_hidden=1, hidden_size=2000, dropout=0.25)
    x = cells()
    kept = model._encode(model.first_layer(x), train=True, key=jax.random.key(0))
    undropped = mlp(n_hidden=1, hidden_size=2000, dropout=0.0)
    whole = undropped._encode(undropped.first_layer(x), train=True, key=None)
    assert abs(float((kept == 0).mean()) - 0.25) < 0.01
    np.testing.assert_allclose(kept[kept != 0], (whole / 0.75)[kept != 0], rtol=1e-5)
    np.testing.assert_array_equal(model(x)[0], model(x, key=jax.random.key(1))[0])


def test_another_key_drops_others_the_same_key_the_same_and_no_key_is_refused():
    first, same, other = (mlp()(cells(), train=True, key=jax.random.key(seed))[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)
    with pytest.raises(ValueError, match="needs a random key"):
        mlp()(cells(), train=True)


def test_evaluation_leaves_the_running_statistics_alone_and_takes_cells_one_by_one():
    model = mlp()
    model(cells() * 3 + 1, train=True, key=jax.random.key(0))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    evaluate = compiled(model)
    together = evaluate(cells())[0]
    alone = jnp.concatenate([evaluate(row[None, :])[0] for row in cells()])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))


def test_a_training_batch_of_one_cell_is_refused():
    with pytest.raises(ConfigError, match="cannot train on a single cell"):
        mlp()(cells(1), train=True, key=jax.random.key(0))


def test_bf16_products_stay_near_float32_and_give_float32():
    narrow, wide = (mlp(precision=name)(cells())[0] for name in ("bf16", "float32"))
    assert narrow.dtype == jnp.float32
    assert 0 < float(jnp.abs(narrow - wide).max()) < 0.05
