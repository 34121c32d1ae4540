"""The number of devices does not change what is trained: fake CPU devices, in processes of their own."""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fits import fit_one as fit
from stores import N_GENES, write_tiny_store

from configs import linear_ce, mlp_ce, tabnet_ce, tabnet_hce
from hce_jax.checkpoint import load_model
from hce_jax.errors import ConfigError
from hce_jax.input import dense_batch
from hce_jax.models import tabnet
from hce_jax.store import open_store
from hce_jax.training import trainer
from hce_jax.training.config import member_configs
from hce_jax.training.mesh import batch_sharding, check_ghost_batches, data_mesh
from hce_jax.training.optim import published_optimizer
from hce_jax.training.steps import state_arrays

ROOT = Path(__file__).parents[2]
#: With jax 0.10 four fake devices on two cores can hang in an all-reduce; two never did, nor more with jax 0.12.
COUNTS = (2, 8) if jax.__version_info__ >= (0, 12) else (2,)
MLP = {"hidden_size": 16, "n_hidden": 1, "dropout": 0.3}
TABNET = {"n_d": 8, "n_a": 4, "n_steps": 1, "n_independent": 0, "n_shared": 2, "virtual_batch_size": 8, "momentum": 0.3}
#: Several times float32's rounding (6e-8), for sums over 64 cells and variances up to 20 that four steps go through;
#: measured: 1.5e-5 at most, in one norm of TabNet's gradients.
TOLERANCE = 5e-5
#: In the place of a backend: the kernels for a GPU, interpreted.
KERNELS = "kernels"
#: Configuration, changes, and the backend that TabNet is told: on a CPU it takes ghost batches one after the other.
CASES = {
    "two linear": (linear_ce, {"losses": ("ce", "hce")}, "cpu"),
    "mlp": (mlp_ce, MLP, "cpu"),
    "tabnet": (tabnet_hce, TABNET, "cpu"),
    "tabnet, ghost batches all at once": (tabnet_ce, TABNET, "tpu"),
    "tabnet, by kernels": (tabnet_hce, TABNET, KERNELS),
}


@pytest.fixture(scope="module")
def store_path(tmp_path_factory):
    path = write_tiny_store(tmp_path_factory.mktemp("devices") / "store", {"train": 256, "val": 23, "test": 17})
    vectors = np.random.default_rng(0).normal(0, 0.05, (7, N_GENES))
    np.save(path / "augmentations.npy", vectors.astype(np.float32))
    return path


def small(module, store_path, **changes):
    config = module.get_config()
    config.update(data_path=str(store_path), log_dir=f"{store_path}.logs{jax.device_count()}", batch_size=64)
    config.update({"max_epochs": 2, "learning_rate": 0.05, "precision": "float32", **changes})
    return config


def steps_of(case, store_path):
    """Train two members, with cross entropy and with HCE, for an epoch; return all that comes of it.

    By plain gradient descent: what differs between parameters is what differs between gradients. (Adam would make steps
    of full size of the rounding noise of a gradient that is zero: that of a bias before a batch norm, or of HCE for a
    cell that is labelled with the root.)
    """
    module, changes, backend = CASES[case]
    config = small(module, store_path, augment_training_data=True, **changes)
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(trainer, "published_optimizer", return_value=optax.sgd(0.1)))
        if backend == KERNELS:
            patches.enter_context(mock.patch.object(tabnet, "_in_one_pass", return_value=True))
        else:
            patches.enter_context(mock.patch.object(jax, "default_backend", return_value=backend))
        both = trainer.Trainer(member_configs(config), open_store(store_path))
        steps = [both.step(batch) for batch in both.training_batches(epoch=0)]
        val = both.validate(lambda _: None)
    assert len(steps) == 4
    metrics = jax.tree.map(lambda *values: np.stack(values), *steps)._asdict()
    return {**metrics, "val": np.array(val), **state_arrays(both.state)}


def pmapped(store_path):
    """Train the linear model as :func:`sharded` does, by an update of its own for jax.pmap."""
    config = small(linear_ce, store_path)
    whole = trainer.Trainer([config], open_store(store_path))
    weights = jnp.asarray(whole.store.side.class_weights(config.class_weights_filename))
    optimizer = published_optimizer(whole.schedule, config.weight_decay, config.gradient_clip_val)

    def update(params, opt_state, x_bg, targets_b):
        own_weights_b = weights[targets_b]
        weight = jax.lax.psum(own_weights_b.sum(), "devices")

        def share_of_loss(params):
            log_p_bc = jax.nn.log_softmax(x_bg @ params["kernel"] + params["bias"][None])
            return -(own_weights_b * log_p_bc[jnp.arange(len(targets_b)), targets_b]).sum() / weight

        loss, grads = jax.lax.psum(jax.value_and_grad(share_of_loss)(params), "devices")
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    update = jax.pmap(update, axis_name="devices", in_axes=(None, None, 0, 0), out_axes=None)
    params = {name: value[0] for name, value in whole.state.params["linear"].items()}
    opt_state, losses = optimizer.init(params), []
    for epoch in range(2):
        for packed in whole.training_batches(epoch):
            batch = dense_batch(packed, batch_sharding(data_mesh(), config.batch_size))
            per_device = (np.reshape(each, (jax.device_count(), -1, *each.shape[1:])) for each in batch[:2])
            params, opt_state, loss = update(params, opt_state, *per_device)
            losses.append(loss)
    return {"loss": np.stack(losses), **params}


def sharded(store_path):
    """Train the linear model, two epochs with the published optimiser."""
    whole = trainer.Trainer([small(linear_ce, store_path)], open_store(store_path))
    losses = [whole.step(batch).loss[0] for epoch in range(2) for batch in whole.training_batches(epoch)]
    return {"loss": np.stack(losses), **{name: value[0] for name, value in whole.state.params["linear"].items()}}


def fitted(store_path):
    """Return the weights of a whole run, as its checkpoint has them."""
    result = fit(small(linear_ce, store_path))
    return {"kernel": load_model(result.checkpoint).params["linear"]["kernel"][...], "f1": result.val_f1_macro}


def refusal(config):
    with pytest.raises(ConfigError) as refused:
        fit(config)
    return str(refused.value)


def save_all(store_path, folder, n_devices):
    """Train everything, in a process with so many devices."""
    assert jax.device_count() == int(n_devices)

    def save(name, arrays):
        np.savez(f"{folder}/{name}.npz", **arrays)

    for case in CASES:
        save(case, steps_of(case, store_path))
    for function in (pmapped, sharded, fitted):
        save(function.__name__, function(store_path))
    if jax.device_count() > 1:
        odd = refusal(small(linear_ce, store_path, batch_size=63))
        straddling = refusal(small(tabnet_ce, store_path, **{**TABNET, "virtual_batch_size": 64}))
        save("refused", {"odd": odd, "straddling": straddling})


@pytest.fixture(scope="module")
def results(store_path, tmp_path_factory):
    """Train everything on each number of devices; give what was saved, by number and name."""
    parent, running = tmp_path_factory.mktemp("results"), []
    paths = (ROOT, ROOT / "tests", ROOT / "tests" / "training")
    command = "import sys, test_devices; test_devices.save_all(*sys.argv[1:])"
    for count in (1, *COUNTS):
        (parent / str(count)).mkdir()
        flags = f"--xla_force_host_platform_device_count={count}"
        environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(map(str, paths))}
        arguments = [sys.executable, "-c", command, str(store_path), str(parent / str(count)), str(count)]
        running.append(subprocess.Popen(arguments, env={**os.environ, **environment}))
    try:
        assert [process.wait(timeout=300) for process in running] == [0] * len(running)
    finally:
        for process in running:
            process.kill()
    return {count: {path.stem: np.load(path) for path in (parent / str(count)).iterdir()} for count in (1, *COUNTS)}


def assert_same(found, expected, tolerance=TOLERANCE):
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_statistics_and_scores_are_those_of_one_device(results, case, count):
    one = results[1][case]
    assert set(one) > {"loss", "grad_norm", "counts", "val", "step"}
    assert ("stats" in " ".join(one)) == (case != "two linear")
    assert_same(results[count][case], one)


@pytest.mark.parametrize("count", COUNTS)
def test_the_published_optimiser_and_the_checkpoint_are_those_of_one_device(results, count):
    assert_same(results[count]["fitted"], results[1]["fitted"], 1e-6)


@pytest.mark.parametrize("count", COUNTS)
def test_the_sharded_step_is_the_same_update_written_for_pmap(results, count):
    assert results[count]["sharded"]["loss"].shape == (8,)
    assert_same(results[count]["sharded"], results[count]["pmapped"], 1e-6)


@pytest.mark.parametrize("count", COUNTS)
def test_batches_that_the_devices_cannot_share_are_refused_with_the_numbers(results, count):
    says = results[count]["refused"]
    assert f"config.batch_size is 63, which does not divide by the {count} devices" in str(says["odd"])
    assert f"--config.batch_size={63 // count * count}" in str(says["odd"])
    assert "config.batch_size=64 into ghost batches of 64 cells" in str(says["straddling"])
    assert f"each of the {count} devices has {64 // count};" in str(says["straddling"])


@pytest.mark.parametrize(
    ("batch_size", "virtual_batch_size", "n_devices"),
    [(2048, 256, 1), (2048, 256, 8), (64, 8, 8), (64, 16, 2), (70, 16, 1), (64, 4096, 1), (1, 256, 1)],
)
def test_ghost_batches_that_lie_on_one_device_each_are_allowed(batch_size, virtual_batch_size, n_devices):
    check_ghost_batches(batch_size, virtual_batch_size, n_devices)


@pytest.mark.parametrize(
    ("batch_size", "virtual_batch_size", "n_devices", "of_part", "of_device"),
    [
        pytest.param(2048, 256, 16, 256, 128, id="larger than the share of a device"),
        pytest.param(64, 4096, 2, 64, 32, id="the whole batch"),
        pytest.param(48, 16, 2, 16, 24, id="the middle one"),
        pytest.param(70, 16, 2, 18, 35, id="unequal ones"),
    ],
)
def test_a_ghost_batch_on_two_devices_is_refused(batch_size, virtual_batch_size, n_devices, of_part, of_device):
    with pytest.raises(ConfigError) as refused:
        check_ghost_batches(batch_size, virtual_batch_size, n_devices)
    says = str(refused.value)
    assert f"config.virtual_batch_size={virtual_batch_size} cuts config.batch_size={batch_size} into" in says
    assert f"ghost batches of {of_part} cells, and each of the {n_devices} devices has {of_device};" in says
    check_ghost_batches(int(says.split("--config.batch_size=")[1].split()[0]), virtual_batch_size, n_devices)
