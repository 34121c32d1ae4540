import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hce_jax.input import DenseBatch
from hce_jax.training.optim import published_optimizer
from hce_jax.training.steps import Objective, init_state, make_train_step, one_late


def test_results_come_one_step_late_and_none_is_lost():
    made, read = [], []
    for item in one_late(made.append(i) or i for i in range(4)):
        read.append((item, len(made)))
    assert read == [(0, 2), (1, 3), (2, 4), (3, 4)]


def test_a_step_s_random_numbers_come_from_seed_and_step_alone():
    """The same step taken after other steps draws the same numbers: nothing random hides in the state."""

    class Noisy(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((3, 2)))

        def __call__(self, x, *, train=False, key=None):
            return x @ self.w[...] + jax.random.normal(key, (len(x), 2)), jnp.zeros(len(x))

    objective = Objective(jnp.eye(2), jnp.ones(2), use_hierarchical_loss=False, epsilon=None)
    optimizer = published_optimizer(lambda step: 0.0, weight_decay=0.0, gradient_clip_val=0.0)
    batch = DenseBatch(np.ones((4, 3), np.float32), np.array([0, 1, 0, 1]), np.ones(4, bool))

    def losses(seed):
        graphdef, state = init_state([Noisy()], optimizer)
        step = make_train_step(graphdef, [objective], optimizer, jax.random.key(seed)[None])
        found = []
        for _ in range(3):
            state, metrics = step(state, batch)
            found.append(float(metrics.loss[0]))
        return found

    assert losses(0) == losses(0)
    assert len(set(losses(0) + losses(1))) == 6
