import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hce_jax.training.optim import clip_by_global_norm, published_optimizer, step_schedule


def test_learning_rate_falls_after_each_step_size_epochs():
    schedule = step_schedule(0.1, gamma=0.9, step_size=2, steps_per_epoch=5)
    found = [float(schedule(step)) for step in (0, 9, 10, 19, 20)]
    np.testing.assert_allclose(found, [0.1, 0.1, 0.09, 0.09, 0.081], rtol=1e-6)


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
