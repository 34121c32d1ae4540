import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hce_jax.models import TabNet, TabNetConfig, tabnet
from hce_jax.ops import batch_norm, gated_norm
from hce_jax.typing import PRECISIONS

CASES = [
    pytest.param((3, 6, 5), True, id="rows and units fill no power of two"),
    pytest.param((2, 8, 20), True, id="more than one block of units"),
    pytest.param((1, 7, 3), False, id="without a residual"),
]


def drawn(shape, has_residual, seed=0):
    """Draw h far from zero mean, weight, bias, residual, and the gradients of both copies of the rows."""
    v, n, u = shape
    rng = np.random.default_rng(seed)
    layer = 3 * rng.normal(size=(v, n, 2 * u)) + 5, rng.normal(size=2 * u), rng.normal(size=2 * u)
    residual, first, second = rng.normal(size=(3, *shape))
    return *layer, residual if has_residual else None, (first, second)


def plain(h, weight, bias, residual):
    """Write the layer out part by part, for autodiff to go back through."""
    parts = []
    for part in h:
        z = (part - part.mean(0, keepdims=True)) / jnp.sqrt(part.var(0, keepdims=True) + 1e-5)
        value, gate = jnp.split(z * weight[None, :] + bias[None, :], 2, axis=1)
        parts.append(value / (1 + jnp.exp(-gate)))
    return jnp.stack(parts) if residual is None else (residual + jnp.stack(parts)) / np.sqrt(2)


def to_float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


@pytest.mark.parametrize(("shape", "has_residual"), CASES)
def test_rows_moments_and_gradients_are_those_of_the_layer_written_out_in_float64(shape, has_residual):
    *arguments, gradients = drawn(shape, has_residual)
    with jax.enable_x64(True):
        rows, back = jax.vjp(plain, *jax.tree.map(jnp.asarray, arguments))
        expected = jax.tree.map(np.asarray, ((rows, rows), back(jnp.asarray(sum(gradients)))))
    h, weight, bias, residual = to_float32(arguments)
    outputs, back, moments = jax.vjp(gated_norm.gated_norm, h, weight, bias, residual, has_aux=True)
    found = outputs, back(to_float32(gradients))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    np.testing.assert_allclose(moments.mean, arguments[0].mean(1), rtol=1e-6)
    np.testing.assert_allclose(moments.variance, arguments[0].var(1), rtol=1e-5)


def test_members_are_mapped_over_with_an_input_that_they_share():
    *arguments, gradients = (to_float32(each) for each in drawn((2, 5, 4), True))
    others = [to_float32(each) for each in drawn((2, 5, 4), True, seed=1)[:4]]

    def layer(h, weight, bias):
        (rows, _), back, moments = jax.vjp(gated_norm.gated_norm, h, weight, bias, arguments[3], has_aux=True)
        return rows, moments, back(gradients)

    members = [arguments[:3], others[:3]]
    together = jax.vmap(layer)(*(jnp.stack(each) for each in zip(*members, strict=True)))
    for index, member in enumerate(members):
        for one, all_of_them in zip(jax.tree.leaves(layer(*member)), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(all_of_them[index], one, atol=1e-5)


@pytest.mark.parametrize(
    ("most_rows", "n_kernels"),
    [pytest.param(1024, 4, id="one kernel a layer"), pytest.param(4, 0, id="ghost batches that are too large")],
)
def test_a_step_of_tabnet_through_the_kernel_is_the_plain_one(monkeypatch, most_rows, n_kernels):
    config = TabNetConfig(n_d=3, n_a=2, n_independent=1, n_shared=1, virtual_batch_size=5, momentum=0.3)
    x = jnp.asarray(np.random.default_rng(0).random((13, 12)), jnp.float32)
    calls = []

    def step():
        model = TabNet(config, 12, 3, precision=PRECISIONS["float32"], rngs=nnx.Rngs(0))
        graphdef, params, stats = nnx.split(model, nnx.Param, ...)

        def loss(params):
            model = nnx.merge(graphdef, params, stats, copy=True)
            logits, auxiliary = model(x, train=True)
            return (logits**2).mean() + auxiliary.mean(), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    def counted(*arguments):
        calls.append(arguments)
        return gated_norm.gated_norm(*arguments)

    monkeypatch.setattr(tabnet, "gated_norm", counted)
    monkeypatch.setattr(tabnet, "MAX_ROWS", most_rows)
    expected = step()
    assert not calls
    monkeypatch.setattr(tabnet, "_in_one_pass", lambda: True)
    found = step()
    n_sizes = len(set(batch_norm.part_sizes(13, 5)))
    assert len(calls) == n_kernels * n_sizes == 2 * n_kernels
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
