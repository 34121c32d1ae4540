import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from hce_jax.losses import cross_entropy, hierarchical_cross_entropy


def losses_of(arrays, epsilon):
    """The four losses of a golden file as functions of the logits."""
    targets, weights = jnp.asarray(arrays["targets"]), jnp.asarray(arrays["class_weights"])
    reach = jnp.asarray(arrays["child_matrix"], jnp.float32)
    return {
        ("ce", "weighted"): lambda z: cross_entropy(z, targets, weights),
        ("ce", "unweighted"): lambda z: cross_entropy(z, targets),
        ("hce", "weighted"): lambda z: hierarchical_cross_entropy(z, targets, reach, weights, epsilon),
        ("hce", "unweighted"): lambda z: hierarchical_cross_entropy(z, targets, reach, None, epsilon),
    }


@pytest.mark.golden("hce_loss")
def test_golden_losses_and_gradients(golden):
    arrays = golden.arrays
    for (loss, weighting), function in losses_of(arrays, golden.config["log_epsilon"]).items():
        value, gradient = jax.jit(jax.value_and_grad(function))(jnp.asarray(arrays["logits"]))
        np.testing.assert_allclose(value, arrays[f"{loss}_loss_{weighting}"], rtol=2e-6, atol=5e-6)
        np.testing.assert_allclose(gradient, arrays[f"{loss}_grad_{weighting}"], rtol=0, atol=2e-6)


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    reach = np.triu(np.ones((6, 6)))  # a chain: type i contains every later one
    return rng.normal(size=(9, 6)) * 3, rng.integers(0, 6, 9), reach, rng.uniform(0.5, 2, 6)


def test_exact_form_equals_float64_log_sum_exp(case):
    logits, targets, reach, weights = case
    mass = np.array([logsumexp(z[reach[t] > 0]) for z, t in zip(logits, targets, strict=True)])
    expected = (weights[targets] * (logsumexp(logits, axis=1) - mass)).sum() / weights[targets].sum()
    found = hierarchical_cross_entropy(
        jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(reach), jnp.asarray(weights), epsilon=None
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_exact_form_keeps_its_gradient_where_the_published_one_saturates():
    logits, targets, reach = jnp.array([[60.0, -60.0]]), jnp.array([1]), jnp.eye(2)
    published = jax.grad(lambda z: hierarchical_cross_entropy(z, targets, reach))(logits)
    exact = jax.grad(lambda z: hierarchical_cross_entropy(z, targets, reach, epsilon=None))(logits)
    np.testing.assert_array_equal(published, 0)
    np.testing.assert_allclose(exact, [[1.0, -1.0]], atol=1e-6)


def test_without_hierarchy_the_exact_form_is_cross_entropy(case):
    logits, targets, _, _ = case
    expected = -log_softmax(logits, axis=1)[np.arange(9), targets]
    arguments = jnp.asarray(logits), jnp.asarray(targets)
    np.testing.assert_allclose(cross_entropy(*arguments, reduction="none"), expected, rtol=1e-5, atol=1e-6)
    flat = hierarchical_cross_entropy(*arguments, jnp.eye(6), epsilon=None, reduction="none")
    np.testing.assert_allclose(flat, expected, rtol=1e-5, atol=1e-6)


def test_reduction_none_times_weights_gives_the_mean(case):
    logits, targets, reach, weights = map(jnp.asarray, case)
    each = hierarchical_cross_entropy(logits, targets, reach, weights, reduction="none")
    mean = hierarchical_cross_entropy(logits, targets, reach, weights)
    np.testing.assert_allclose(each.sum() / weights[targets].sum(), mean, rtol=1e-6)


def test_an_unknown_reduction_is_refused(case):
    logits, targets, _, _ = case
    with pytest.raises(ValueError, match="not 'sum'"):
        cross_entropy(jnp.asarray(logits), jnp.asarray(targets), reduction="sum")
