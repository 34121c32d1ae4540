import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hce_jax.training.optim import clip_by_global_norm, global_norm, published_optimizer, step_schedule


def test_learning_rate_falls_after_each_step_size_epochs():
    schedule = step_schedule(0.1, gamma=0.9, step_size=2, steps_per_epoch=5)
    found = [float(schedule(step)) for step in (0, 9, 10, 19, 20)]
    np.testing.assert_allclose(found, [0.1, 0.1, 0.09, 0.09, 0.081], rtol=1e-6)


def test_learning_rate_of_a_number_is_a_number_and_the_same_inside_a_step():
    schedule = step_schedule(0.1, gamma=0.9, step_size=1, steps_per_epoch=7)
    steps = [0, 6, 7, 13, 14, 70 * 7 - 1, 70 * 7, 2**31 - 1]
    with jax.transfer_guard("disallow"):
        rates = [schedule(step) for step in steps]
    assert {type(rate) for rate in rates} == {float}
    np.testing.assert_allclose(rates, [0.1 * 0.9 ** (step // 7) for step in steps], rtol=1e-12)
    inside = jax.jit(jax.vmap(schedule))(jnp.array(steps, jnp.int32))
    np.testing.assert_allclose(inside, rates, rtol=1e-5, atol=1e-38)


@pytest.mark.parametrize("norm", [0.5, 5.0])
def test_clipping_scales_all_gradients_together(norm):
    direction = {"a": jnp.array([0.6]), "b": jnp.array([0.0, 0.8])}
    gradients = {name: norm * values for name, values in direction.items()}
    clipped, _ = clip_by_global_norm(1.0).update(gradients, optax.EmptyState())
    factor = min(1.0, 1.0 / (norm + 1e-6))
    for name in gradients:
        np.testing.assert_allclose(clipped[name], factor * gradients[name], rtol=1e-6)


def adamw_by_hand(p, gradients, lr, decay):
    """PyTorch's AdamW in float64: decay first, then the bias-corrected update."""
    m = v = np.zeros_like(p)
    for t, g in enumerate(gradients, 1):
        p = p * (1 - lr * decay)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return p


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_optimiser_equals_adamw_by_hand_with_and_without_clipping(clip):
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=4), list(rng.normal(size=(6, 4)))
    optimizer = published_optimizer(lambda step: 0.01, weight_decay=0.1, gradient_clip_val=clip)
    p = jnp.asarray(start)
    state = optimizer.init(p)
    for g in gradients:
        updates, state = optimizer.update(jnp.asarray(g), state, p)
        p = optax.apply_updates(p, updates)
    if clip:
        gradients = [g * min(1, clip / np.linalg.norm(g)) for g in gradients]
    np.testing.assert_allclose(p, adamw_by_hand(start, gradients, 0.01, 0.1), rtol=1e-5)


def test_norm_is_over_all_arrays_together_small_and_large_and_the_small_ones_are_summed_as_one():
    rng = np.random.default_rng(0)
    arrays = [
        rng.normal(size=shape).astype(np.float32) for shape in [(), (7,), (2, 3), (300, 500), (5, 1, 2), (400, 400)]
    ]
    tree = dict(enumerate(arrays))
    expected = np.linalg.norm(np.concatenate([array.ravel() for array in arrays]).astype(np.float64))
    np.testing.assert_allclose(global_norm(tree), expected, rtol=1e-6)
    sums = [each for each in jax.make_jaxpr(global_norm)(tree).eqns if each.primitive.name == "reduce_sum"]
    assert len(sums) == 3


@pytest.mark.parametrize("size", [2**17 - 1, 2**17, 2**17 + 1])
def test_norm_of_a_single_array_whatever_its_size(size):
    np.testing.assert_allclose(global_norm(jnp.full(size, 2.0)), 2 * np.sqrt(size), rtol=1e-6)


def test_norms_of_members_are_apart():
    tree = {"a": jnp.array([[3.0], [0.0]]), "b": jnp.array([[[4.0]], [[2.0]]])}
    np.testing.assert_allclose(jax.vmap(global_norm)(tree), [5.0, 2.0], rtol=1e-6)
