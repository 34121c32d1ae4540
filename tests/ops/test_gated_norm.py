import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hce_jax.models import TabNetConfig, tabnet
from hce_jax.models.tabnet import Transformer
from hce_jax.ops import gated_norm
from hce_jax.typing import PRECISIONS

CASES = [
    pytest.param((3, 6, 19), True, jnp.float32, id="neither rows nor units fill a power of two"),
    pytest.param((2, 8, 4), False, jnp.bfloat16, id="without a residual, for products in bfloat16"),
]


def drawn(shape, has_residual):
    """Draw h far from zero mean, weight and bias for two members, a residual, and the gradients of both copies."""
    v, n, u = shape
    rng = np.random.default_rng(0)
    layer = 3 * rng.normal(size=(2, v, n, 2 * u)) + 5, rng.normal(size=(2, 2 * u)), rng.normal(size=(2, 2 * u))
    residual, first, second = rng.normal(size=(3, *shape))
    first = np.asarray(jnp.asarray(first, jnp.bfloat16), np.float64)  # numbers that all types hold
    return layer, residual if has_residual else None, (first, second)


def written_out(arguments, gradient):
    """Give the rows and the gradients of all arguments: the layer part by part, and autodiff back through it."""

    def rows(h, weight, bias, residual):
        parts = []
        for part in h:
            z = (part - part.mean(0, keepdims=True)) / jnp.sqrt(part.var(0, keepdims=True) + 1e-5)
            value, gate = jnp.split(z * weight[None, :] + bias[None, :], 2, axis=1)
            parts.append(value / (1 + jnp.exp(-gate)))
        return jnp.stack(parts) if residual is None else (residual + jnp.stack(parts)) / np.sqrt(2)

    outputs, back = jax.vjp(rows, *arguments)
    return outputs, back(gradient)


def to_float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


@functools.partial(jax.jit, static_argnums=3)
def through_the_kernel(layers, residual, gradients, dtype):
    """Give, of members that share what is added, the rows, the gradients of all arguments, and the moments."""

    def member(layer):
        outputs, back, moments = jax.vjp(lambda *of: gated_norm.gated_norm(*of, dtype), *layer, residual, has_aux=True)
        return outputs, back((gradients[0].astype(dtype), gradients[1])), moments

    return jax.vmap(member)(layers)


@pytest.mark.parametrize(("shape", "has_residual", "dtype"), CASES)
def test_rows_moments_and_gradients_of_members_are_those_written_out_in_float64(shape, has_residual, dtype):
    layers, residual, gradients = drawn(shape, has_residual)
    found = through_the_kernel(*to_float32((layers, residual, gradients)), dtype)
    with jax.enable_x64(True):
        members = [(*(each[index] for each in layers), residual) for index in range(2)]
        expected = [jax.jit(written_out)(member, sum(gradients)) for member in members]
    for index, (rows, d_arguments) in enumerate(expected):
        outputs, d_found, moments = jax.tree.map(lambda x, index=index: x[index], found)
        np.testing.assert_allclose(outputs[1], rows, atol=2e-5)
        np.testing.assert_array_equal(outputs[0], outputs[1].astype(dtype))
        assert jax.tree.structure(d_found) == jax.tree.structure(d_arguments)
        for one, other in zip(jax.tree.leaves(d_found), jax.tree.leaves(d_arguments), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)
        np.testing.assert_allclose(moments.mean, layers[0][index].mean(1), rtol=1e-6)
        np.testing.assert_allclose(moments.variance, layers[0][index].var(1), rtol=1e-5)


def transformer():
    config = TabNetConfig(n_d=3, n_a=2, n_independent=2, n_shared=0, virtual_batch_size=5, momentum=0.3)
    return Transformer(config, 12, precision=PRECISIONS["float32"], rngs=nnx.Rngs(0))


def test_a_transformer_trained_through_the_kernel_is_the_plain_one(monkeypatch):
    graphdef, params, stats = nnx.split(transformer(), nnx.Param, ...)
    rng = np.random.default_rng(0)
    first, gradient = (jnp.asarray(rng.normal(size=(10, width)), jnp.float32) for width in (10, 5))

    def step():
        def loss(first, params):
            model = nnx.merge(graphdef, params, stats, copy=True)
            total = (model(first, [], train=True) * gradient).sum()
            return total, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(first, params)

    expected = step()
    monkeypatch.setattr(tabnet, "_in_one_pass", lambda: True)
    for one, other in zip(jax.tree.leaves(step()), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize(
    ("n_cells", "train", "one_pass", "sizes"),
    [
        pytest.param(10, True, True, [(2, 5)] * 2, id="even ghost batches"),
        pytest.param(13, True, True, [(1, 7), (1, 6)] * 2, id="a shorter last ghost batch"),
        pytest.param(10, False, True, [], id="evaluation"),
        pytest.param(10, True, False, [], id="where there is no kernel"),
        pytest.param(9, True, True, [], id="ghost batches that registers do not hold"),
    ],
)
def test_which_layers_the_kernel_is_given(n_cells, train, one_pass, sizes, monkeypatch):
    calls = []

    def noted(h, *rest):
        calls.append(h.shape[:2])
        return gated_norm.gated_norm(h, *rest)

    monkeypatch.setattr(tabnet, "gated_norm", noted)
    monkeypatch.setattr(tabnet, "MAX_ROWS", 8)
    monkeypatch.setattr(tabnet, "_in_one_pass", lambda: one_pass)
    jax.eval_shape(lambda: transformer()(jnp.ones((n_cells, 10)), [], train=train))
    assert calls == sizes
