"""Rows of x that go on with zeros change nothing: neither what a model says of a cell, nor how it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import compiled

from hce_jax.models import MLPConfig, build_model
from hce_jax.typing import PRECISIONS

N_GENES, N_TYPES, N_CELLS = 45, 7, 24
SIZES = {"linear": {}, "mlp": vars(MLPConfig(hidden_size=16, n_hidden=2, dropout=0.2))}
#: No wider than the genes, by one column, by several.
WIDTHS = (N_GENES, N_GENES + 1, 64)


def model_of(kind, precision="float32"):
    sizes = (N_GENES, N_TYPES, nnx.Rngs(0))
    return build_model({"model_type": kind, **SIZES[kind]}, *sizes, precision=PRECISIONS[precision])


def cells(width=N_GENES):
    x = np.zeros((N_CELLS, width), np.float32)
    x[:, :N_GENES] = np.random.default_rng(0).gamma(1, 1, (N_CELLS, N_GENES))
    return jnp.asarray(x)


def training_step(kind, x):
    """Give the loss, the logits, the statistics and the gradients of a step of training."""
    graphdef, params, stats = nnx.split(model_of(kind), nnx.Param, ...)

    @jax.jit
    def loss_of(params):
        model = nnx.merge(graphdef, params, stats, copy=True)
        logits, _ = model(x, train=True, key=jax.random.key(1))
        weights = jnp.cos(jnp.arange(logits.size, dtype=jnp.float32)).reshape(logits.shape)
        return jnp.mean(weights * logits**2), (logits, nnx.state(model, nnx.BatchStat))

    (loss, (logits, stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return {"loss": loss, "logits": logits, "stats": stats, "grads": grads}


@pytest.mark.parametrize("kind", SIZES)
def test_loss_statistics_and_gradients_of_wide_rows_are_those_of_the_genes_alone(kind):
    expected, found = training_step(kind, cells()), training_step(kind, cells(64))
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)
    for value, own in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(value, own, rtol=1e-6, atol=1e-6)
    assert np.asarray(jax.tree.leaves(expected["grads"])[-1]).any()


@pytest.mark.parametrize("kind", SIZES)
def test_predictions_and_embeddings_of_wide_rows_are_those_of_the_genes_alone(kind):
    model = model_of(kind)
    for method in ["__call__", "embed"][: 1 + hasattr(model, "embed")]:
        expected, *wide = (jax.tree.leaves(compiled(model, method)(cells(width)))[0] for width in WIDTHS)
        for found in wide:
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", SIZES)
def test_rows_of_the_genes_alone_are_read_by_the_same_program_as_ever(kind):
    """No pad: on a CPU the numbers stay what they were, bit for bit."""
    for width, n_pads in zip(WIDTHS, (0, 1, 1), strict=True):
        program = str(jax.make_jaxpr(lambda x: model_of(kind)(x)[0])(cells(width)))
        assert program.count(" pad[") == n_pads


@pytest.mark.parametrize("kind", SIZES)
def test_in_bf16_the_kernel_is_converted_before_it_is_widened(kind):
    program = str(jax.make_jaxpr(lambda x: model_of(kind, "bf16")(x)[0])(cells(64)))
    widened = [line for line in program.splitlines() if " pad[" in line]
    assert len(widened) == 1
    assert "bf16[64," in widened[0]


@pytest.mark.parametrize("kind", SIZES)
def test_rows_that_lack_a_gene_are_refused(kind):
    with pytest.raises(ValueError, match="negative"):
        model_of(kind)(cells()[:, 1:])
