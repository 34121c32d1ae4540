"""Twelve training steps of each model, and the validation of what they arrive at, as published."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import golden_config, golden_model, under

from hce_jax.hierarchy import correct_predictions
from hce_jax.input import DenseBatch
from hce_jax.models import model_config, split_model
from hce_jax.torch_import import params_from_state_dict
from hce_jax.training.optim import published_optimizer, step_schedule
from hce_jax.training.steps import Objective, evaluate, init_state, make_eval_step, make_train_step

# Base tolerance of the parameters after training (golden README, section 6).
FINAL_TOLERANCE = {"linear": 1e-6, "mlp": 2e-6, "tabnet": 1e-5}


def objective_of(golden):
    return Objective(
        reachability=jnp.asarray(golden.arrays["child_matrix"], jnp.float32),
        class_weights=jnp.asarray(golden.arrays["class_weights"]),
        use_hierarchical_loss=golden.config["use_hierarchical_loss"],
        epsilon=1e-6,
    )


def batch_of(x, targets, n_filler=0):
    """A batch whose last rows only fill it up."""
    x = np.concatenate([x, np.full((n_filler, x.shape[1]), 7, np.float32)])
    targets = np.concatenate([targets, np.zeros(n_filler, int)])
    return DenseBatch(x, targets.astype(np.int32), np.arange(len(x)) < len(x) - n_filler)


def irreproducible(path):
    """Say whether golden values follow rounding noise: biases of the MLP before a batch norm, and its running means."""
    return (path[0] == "layers" and path[-1] == "bias") or path[-1] == "running_mean"


def check_arranged(golden, model_type, found, prefix, base):
    """Compare a tree of variables with the golden state dict under a prefix, at its noise."""
    config = model_config(golden_config(golden, model_type))
    whole = under(golden.arrays, "params/")

    def arranged(prefix, default=None):
        given = under(golden.arrays, prefix)
        filled = {key: given.get(key, np.zeros_like(array) if default is None else default)
                  for key, array in whole.items()}  # fmt: skip
        filled = {key: np.broadcast_to(array, whole[key].shape) for key, array in filled.items()}
        return nnx.traversals.flatten_mapping(params_from_state_dict(model_type, filled, config))

    expected, noise = arranged(prefix), arranged(f"noise/{prefix}", default=0.0)
    flat = nnx.traversals.flatten_mapping(found)
    compared = [path for path in flat if not (model_type == "mlp" and irreproducible(path))]
    assert len(compared) >= len(flat) / 2
    for path in compared:
        error = np.abs(np.asarray(flat[path], np.float64) - expected[path])
        assert (error <= base + 10 * noise[path]).all(), (path, error.max())


def check_trajectory(golden, model_type):
    config, arrays = golden.config, golden.arrays
    model, objective = golden_model(golden, model_type), objective_of(golden)
    schedule = step_schedule(config["lr"], config["lr_gamma"], config["lr_step_size_epochs"], config["steps_per_epoch"])
    optimizer = published_optimizer(schedule, config["weight_decay"], config["clip_norm"])
    graphdef, state = init_state([model], optimizer)
    step = make_train_step(graphdef, [objective], optimizer, jax.random.key(0)[None])
    found = []
    for index in range(config["epochs"] * config["steps_per_epoch"]):
        at = index % config["steps_per_epoch"]
        state, metrics = step(state, batch_of(arrays["x"][at], arrays["targets"][at]))
        found.append((metrics.loss[0], metrics.grad_norm[0], schedule(index)))
        if index == 0:
            right = int((arrays["step0_corrected_preds"] == arrays["targets"][0]).sum())
            assert int(metrics.counts[0, 0].sum()) == right
    losses, norms, rates = map(np.asarray, zip(*found, strict=True))
    np.testing.assert_allclose(losses, arrays["losses"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(norms, arrays["grad_norm"], rtol=1e-4)
    np.testing.assert_allclose(rates, arrays["lr"], rtol=1e-6)
    for variables in (state.params, state.stats):
        own = jax.tree.map(lambda leaf: leaf[0], variables)
        check_arranged(golden, model_type, own, "params_final/", FINAL_TOLERANCE[model_type])


def check_first_gradient(golden, model_type):
    arrays, objective = golden.arrays, objective_of(golden)
    graphdef, params, stats = split_model(golden_model(golden, model_type))

    def loss_of(params):
        logits, auxiliary = nnx.merge(graphdef, params, stats, copy=True)(jnp.asarray(arrays["x"][0]), train=True)
        return objective.training_loss(logits, jnp.asarray(arrays["targets"][0], jnp.int32)) + auxiliary.mean()

    check_arranged(golden, model_type, jax.jit(jax.grad(loss_of))(params), "grad_step0/", 1e-5)


def check_validation(golden, model_type):
    arrays = golden.arrays
    model = golden_model(golden, model_type, prefix="params_final/")
    graphdef, params, stats = split_model(model)
    logits, _ = jax.jit(lambda x: nnx.merge(graphdef, params, stats, copy=True)(x))(jnp.asarray(arrays["val_x"]))
    np.testing.assert_allclose(logits, arrays["val_logits"], atol=2e-5, rtol=0)
    predictions = np.asarray(logits).argmax(1)
    corrected = correct_predictions(arrays["val_targets"], predictions, arrays["child_matrix"])
    np.testing.assert_array_equal(corrected, arrays["val_corrected_preds"])
    step = make_eval_step(graphdef, [objective_of(golden)])
    x, targets = arrays["val_x"], arrays["val_targets"]
    batches = [batch_of(x[:-4], targets[:-4]), batch_of(x[-4:], targets[-4:], n_filler=len(x) - 8)]
    params, stats = jax.tree.map(lambda leaf: leaf[None], (params, stats))
    [result] = evaluate(step, params, stats, batches)
    np.testing.assert_allclose(result.loss, arrays["val_loss"], atol=2e-5)
    assert result.f1_micro == pytest.approx((corrected == targets).mean(), abs=1e-7)


@pytest.mark.golden("trajectory")
def test_golden_trajectory_of_losses_norms_rates_and_final_parameters(golden):
    check_trajectory(golden, golden.config["model"])


@pytest.mark.golden("trajectory")
def test_golden_first_gradient(golden):
    check_first_gradient(golden, golden.config["model"])


@pytest.mark.golden("trajectory")
def test_golden_validation_of_the_final_parameters(golden):
    check_validation(golden, golden.config["model"])
