import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hce_jax.errors import ConfigError
from hce_jax.ops import batch_norm
from hce_jax.ops.batch_norm import Moments


@pytest.mark.parametrize(
    ("n_rows", "virtual", "sizes"),
    [
        pytest.param(64, 16, [16] * 4, id="even parts"),
        pytest.param(70, 16, [18, 18, 18, 16], id="a shorter last part"),
        pytest.param(25, 4, [5] * 5, id="fewer parts than asked for"),
        pytest.param(2047, 256, [293] * 6 + [289], id="a real batch, one short"),
        pytest.param(100, 256, [100], id="a ghost batch larger than the batch"),
        pytest.param(100, None, [100], id="no ghost batches"),
        pytest.param(21, 4, [5, 5, 5, 5, 1], id="a last part of one row"),
    ],
)
def test_parts_are_those_of_torch_chunk(n_rows, virtual, sizes):
    assert batch_norm.part_sizes(n_rows, virtual) == sizes


def test_over_parts_puts_uneven_parts_back_in_order():
    x = np.arange(14, dtype=np.float32).reshape(7, 2)
    rows, parts = batch_norm.over_parts(
        lambda x, nothing: ((x + 1, nothing), x.sum(1)), batch_norm.part_sizes(7, 3), jnp.asarray(x), None
    )
    np.testing.assert_array_equal(rows[0], x + 1)
    assert rows[1] is None
    np.testing.assert_array_equal(parts, [x[:4].sum(0), x[4:].sum(0)])


def test_running_statistics_follow_the_parts_one_after_the_other_with_the_unbiased_variance():
    rng = np.random.default_rng(0)
    mean, variance, sizes, momentum = rng.normal(size=(3, 4)), rng.random((3, 4)), [5, 5, 3], 0.3
    running = [rng.normal(size=4), rng.random(4)]
    start = Moments(*(jnp.asarray(values, jnp.float32) for values in running))
    for part, n in enumerate(sizes):
        running[0] = (1 - momentum) * running[0] + momentum * mean[part]
        running[1] = (1 - momentum) * running[1] + momentum * variance[part] * n / (n - 1)
    batch = Moments(jnp.asarray(mean, jnp.float32), jnp.asarray(variance, jnp.float32))
    found = batch_norm.update_running(start, batch, sizes, momentum)
    np.testing.assert_allclose(found.mean, running[0], atol=1e-6)
    np.testing.assert_allclose(found.variance, running[1], atol=1e-6)


def test_a_part_of_one_cell_is_refused_with_the_fields_to_change():
    one = Moments(jnp.ones((2, 1)), jnp.ones((2, 1)))
    with pytest.raises(
        ConfigError,
        match=r"config.batch_size is 21, cut into .* one cell.*config.batch_size or config.virtual_batch_size",
    ):
        batch_norm.update_running(Moments(jnp.zeros(1), jnp.ones(1)), one, [20, 1], 0.1)


def test_moments_are_numpy_s_even_for_columns_far_from_zero():
    x = np.random.default_rng(0).normal([0, 1, 10, 100, 0, 0, 0], size=(200, 7))
    x[:, 5] = 3
    found = batch_norm.moments(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.variance, x.var(0), rtol=1e-5, atol=1e-9)


def test_gradient_of_the_batch_norm_is_that_of_its_plain_formula():
    rng = np.random.default_rng(0)
    x, weight, bias, cotangent = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 9, 4), (4,), (4,), (2, 9, 4))
    )

    def ours(x, weight, bias):
        return jnp.sum(cotangent * batch_norm.scale_shift(x, *batch_norm.affine(batch_norm.moments(x), weight, bias)))

    def plain(x, weight, bias):
        normalised = (x - x.mean(1, keepdims=True)) / jnp.sqrt(x.var(1, keepdims=True) + 1e-5)
        return jnp.sum(cotangent * (normalised * weight[None, None] + bias[None, None]))

    for found, expected in zip(*(jax.grad(f, (0, 1, 2))(x, weight, bias) for f in (ours, plain)), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)
