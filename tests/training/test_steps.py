import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hce_jax.input import CellBatch
from hce_jax.models import build_model
from hce_jax.training.optim import published_optimizer, step_schedule
from hce_jax.training.steps import Objective, evaluate, init_state, make_eval_step, make_train_step
from hce_jax.typing import PRECISIONS

# Base tolerance of the parameters after training (golden README, section 6).
FINAL_TOLERANCE = {"linear": 1e-6}


def batch_of(x, targets, real=None):
    real = np.ones(len(targets), bool) if real is None else real
    return CellBatch(jnp.asarray(x), jnp.asarray(targets, jnp.int32), jnp.asarray(real))


def set_linear(model, arrays, prefix):
    model.linear.kernel[...] = jnp.asarray(arrays[f"{prefix}/weight"].T)
    model.linear.bias[...] = jnp.asarray(arrays[f"{prefix}/bias"])


def golden_case(golden):
    config, arrays = golden.config, golden.arrays
    model = build_model({"model_type": config["model"]}, config["gene_dim"], config["type_dim"], nnx.Rngs(0),
                        precision=PRECISIONS["float32"])  # fmt: skip
    objective = Objective(
        reachability=jnp.asarray(arrays["child_matrix"], jnp.float32),
        class_weights=jnp.asarray(arrays["class_weights"]),
        use_hierarchical_loss=config["use_hierarchical_loss"],
        epsilon=1e-6,
    )
    schedule = step_schedule(config["lr"], config["lr_gamma"], config["lr_step_size_epochs"], config["steps_per_epoch"])
    return model, objective, schedule, published_optimizer(schedule, config["weight_decay"], config["clip_norm"])


@pytest.mark.golden("trajectory", model="linear")
def test_golden_trajectory_of_losses_norms_rates_and_final_parameters(golden):
    config, arrays = golden.config, golden.arrays
    model, objective, schedule, optimizer = golden_case(golden)
    set_linear(model, arrays, "params")
    graphdef, state = init_state(model, optimizer)
    step = make_train_step(graphdef, objective, optimizer, jax.random.key(0))
    found = []
    for index in range(config["epochs"] * config["steps_per_epoch"]):
        at = index % config["steps_per_epoch"]
        state, metrics = step(state, batch_of(arrays["x"][at], arrays["targets"][at]))
        found.append((metrics.loss, metrics.grad_norm, schedule(index)))
        if index == 0:
            right = int((arrays["step0_corrected_preds"] == arrays["targets"][0]).sum())
            assert int(metrics.counts[0].sum()) == right
    losses, norms, rates = map(np.asarray, zip(*found, strict=True))
    np.testing.assert_allclose(losses, arrays["losses"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(norms, arrays["grad_norm"], rtol=1e-4)
    np.testing.assert_allclose(rates, arrays["lr"], rtol=1e-6)
    final = nnx.to_pure_dict(state.params)["linear"]
    for name, values in (("weight", final["kernel"].T), ("bias", final["bias"])):
        tolerance = FINAL_TOLERANCE[config["model"]] + 10 * arrays[f"noise/params_final/{name}"]
        np.testing.assert_allclose(values, arrays[f"params_final/{name}"], atol=tolerance, rtol=0)


@pytest.mark.golden("trajectory", model="linear")
def test_golden_validation_loss_and_corrected_predictions(golden):
    arrays = golden.arrays
    model, objective, _, optimizer = golden_case(golden)
    set_linear(model, arrays, "params_final")
    graphdef, state = init_state(model, optimizer)
    logits, _ = model(jnp.asarray(arrays["val_x"]))
    np.testing.assert_allclose(logits, arrays["val_logits"], atol=2e-5, rtol=0)
    targets = arrays["val_targets"]
    # Two batches, the second filled up with rows that must not count.
    filler = np.full((len(targets) - 4, arrays["val_x"].shape[1]), 7.0, np.float32)
    batches = [
        batch_of(arrays["val_x"][:-4], targets[:-4]),
        batch_of(np.concatenate([arrays["val_x"][-4:], filler]), np.r_[targets[-4:], np.zeros(len(filler), int)],
                 np.arange(len(targets)) < 4),
    ]  # fmt: skip
    result = evaluate(make_eval_step(graphdef, objective), state.params, state.stats, batches)
    np.testing.assert_allclose(result.loss, arrays["val_loss"], atol=2e-5)
    right = (arrays["val_corrected_preds"] == targets).mean()
    assert result.f1_micro == pytest.approx(right, abs=1e-7)


def test_a_step_s_random_numbers_come_from_seed_and_step_alone():
    """The same step taken after other steps draws the same numbers: nothing random hides in the state."""

    class Noisy(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((3, 2)))

        def __call__(self, x, *, train=False, key=None):
            return x @ self.w[...] + jax.random.normal(key, (len(x), 2)), jnp.zeros(len(x))

    objective = Objective(jnp.eye(2), jnp.ones(2), use_hierarchical_loss=False, epsilon=None)
    optimizer = published_optimizer(lambda step: 0.0, weight_decay=0.0, gradient_clip_val=0.0)
    batch = batch_of(np.ones((4, 3), np.float32), [0, 1, 0, 1])

    def losses(seed):
        graphdef, state = init_state(Noisy(), optimizer)
        step = make_train_step(graphdef, objective, optimizer, jax.random.key(seed))
        found = []
        for _ in range(3):
            state, metrics = step(state, batch)
            found.append(float(metrics.loss))
        return found

    assert losses(0) == losses(0)
    assert len(set(losses(0) + losses(1))) == 6
