import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hce_jax.input import DenseBatch
from hce_jax.models import build_model
from hce_jax.training.optim import published_optimizer
from hce_jax.training.steps import Objective, init_state, make_train_step, one_late, state_arrays, state_of_arrays
from hce_jax.typing import PRECISIONS

VARIABLES = [
    "layers.0.bias.value", "layers.0.kernel.value", "layers.1.bias.value", "layers.1.kernel.value",
    "linear.bias.value", "linear.kernel.value",
    "norms.0.bias.value", "norms.0.weight.value", "norms.1.bias.value", "norms.1.weight.value",
]  # fmt: skip
STATISTICS = [
    f"norms.{layer}.{name}.value" for layer in (0, 1) for name in ("n_updates", "running_mean", "running_variance")
]


def mlp_training(seed=0, augmentations=None):
    """A small model's step and state."""
    config = {"model_type": "mlp", "hidden_size": 4, "n_hidden": 2, "dropout": 0.1}
    model = build_model(config, 5, 3, nnx.Rngs(seed), precision=PRECISIONS["float32"])
    optimizer = published_optimizer(lambda step: 1e-3, weight_decay=0.1, gradient_clip_val=1.0)
    graphdef, state = init_state([model], optimizer)
    objective = Objective(jnp.eye(3), jnp.ones(3), use_hierarchical_loss=True, epsilon=1e-6)
    keys = jax.random.split(jax.random.key(0), 1)
    return make_train_step(graphdef, [objective], optimizer, keys, augmentations), state


def mlp_batch():
    x = np.random.default_rng(0).random((4, 5), np.float32)
    return DenseBatch(x, np.array([0, 1, 2, 0], np.int32), np.ones(4, bool))


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


def test_arrays_of_a_state_have_the_names_that_saves_have_always_had():
    _, state = mlp_training()
    names = ["step", *(f"params.{name}" for name in VARIABLES), *(f"stats.{name}" for name in STATISTICS)]
    names += ["opt_state.1.0.count", *(f"opt_state.1.0.mu.{name}" for name in VARIABLES)]
    names += [*(f"opt_state.1.0.nu.{name}" for name in VARIABLES), "opt_state.1.2.count"]
    assert list(state_arrays(state)) == names


def test_a_state_comes_back_from_its_arrays_under_their_names():
    step, state = mlp_training(seed=1)
    saved, _ = step(state, mlp_batch())
    arrays = dict(reversed(state_arrays(saved).items()))
    found = state_of_arrays(arrays, like=mlp_training(seed=2)[1])
    assert jax.tree.structure(found) == jax.tree.structure(saved)
    for theirs, ours in zip(jax.tree.leaves(found), jax.tree.leaves(saved), strict=True):
        np.testing.assert_array_equal(theirs, ours)
    kernel = arrays["opt_state.1.0.mu.layers.1.kernel.value"]
    assert np.any(kernel)
    np.testing.assert_array_equal(found.opt_state[1][0].mu["layers"][1]["kernel"], kernel)


def test_a_step_takes_and_gives_plain_dictionaries_of_arrays():
    """Which JAX takes apart in C++; what flax would have them in is Python."""

    def check(state):
        adam = state.opt_state[1][0]
        for tree in (state.params, state.stats, adam.mu, adam.nu):
            kinds = {type(key) for path, _ in jax.tree.leaves_with_path(tree) for key in path}
            assert kinds == {jax.tree_util.DictKey}

    step, state = mlp_training()
    check(state)
    check(step(state, mlp_batch())[0])


def test_a_profile_shows_the_stages_of_a_step():
    step, state = mlp_training(augmentations=jnp.ones((2, 5)))
    leaves, structure = jax.tree.flatten(state)
    traced = jax.jit(lambda leaves: jax.tree.leaves(step(jax.tree.unflatten(structure, leaves), mlp_batch())))
    program = traced.lower(leaves).as_text(debug_info=True)
    for stage in ("augment", "loss", "optimizer", "metrics"):
        assert f"{stage}/" in program or f"{stage})" in program, stage
