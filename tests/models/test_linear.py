import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hce_jax.errors import ConfigError
from hce_jax.models import build_model, model_config
from hce_jax.typing import PRECISIONS, resolve_precision


def linear(n_genes=400, n_types=7, seed=0):
    return build_model({"model_type": "linear"}, n_genes, n_types, nnx.Rngs(seed), precision=PRECISIONS["float32"])


def test_weights_start_as_pytorch_s_uniform_within_one_over_root_of_genes():
    model = linear()
    bound = 1 / np.sqrt(400)
    for values in (np.asarray(model.linear.kernel), np.asarray(model.linear.bias)):
        assert np.abs(values).max() <= bound
    kernel = np.asarray(model.linear.kernel)
    np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.05)  # of a uniform distribution
    np.testing.assert_allclose(kernel.mean(), 0, atol=bound / 20)


def test_logits_are_x_w_plus_b_and_the_auxiliary_loss_is_zero():
    model, x = linear(), np.random.default_rng(0).normal(size=(3, 400)).astype(np.float32)
    logits, auxiliary = model(jnp.asarray(x), train=True)
    expected = x.astype(np.float64) @ np.asarray(model.linear.kernel, np.float64) + np.asarray(model.linear.bias)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_array_equal(auxiliary, np.zeros(3))


def test_another_seed_gives_other_weights_and_the_same_seed_the_same():
    first, same, other = (np.asarray(linear(seed=seed).linear.kernel) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


def test_an_unknown_model_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"config.model_type is 'forest'; choose one of linear"):
        model_config({"model_type": "forest"})


@pytest.mark.parametrize(
    ("name", "backend", "expected"),
    [("auto", "cpu", "float32"), ("auto", "gpu", "tf32"), ("auto", "tpu", "tf32"), ("bf16", "cpu", "bf16")],
)
def test_precision_auto_is_float32_on_a_cpu_and_tf32_elsewhere(name, backend, expected):
    assert resolve_precision(name, backend).name == expected
