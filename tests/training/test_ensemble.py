"""Several models trained together are what each would be alone."""

import re

import numpy as np
import pytest
from fits import fit_one
from stores import N_GENES, write_tiny_store

from benchmarks.faults import models_of, result_of, saves_of
from configs import linear_ce, mlp_ce, tabnet_ce
from hce_jax.checkpoint import load_model
from hce_jax.errors import CheckpointError, ConfigError
from hce_jax.predictor import Ensemble
from hce_jax.runs import read_config
from hce_jax.training import fit
from hce_jax.training.config import member_configs
from hce_jax.training.member import common_save
from hce_jax.training.trainer import Trainer

SMALL = {
    "n_hidden": 2,
    "hidden_size": 8,
    "n_d": 4,
    "n_a": 2,
    "n_shared": 1,
    "n_independent": 1,
    "virtual_batch_size": 15,
}


@pytest.fixture(scope="module")
def store_path(tmp_path_factory):
    store = write_tiny_store(tmp_path_factory.mktemp("ensemble") / "store")
    np.save(store / "augmentations.npy", np.random.default_rng(0).normal(0, 0.1, (5, N_GENES)).astype(np.float32))
    return store


def config_of(module, store_path, log_dir, **changes):
    config = module.get_config()
    config.update(data_path=str(store_path), log_dir=str(log_dir), batch_size=30, max_epochs=2, learning_rate=0.01)
    config.update({**SMALL, **changes})
    return config


def assert_alike(ours, theirs, tolerance):
    """Compare two runs' weights and scores to rounding.

    A bias of the MLP before a batch norm has no gradient but rounding noise, and its running mean follows it.
    """
    for read in (saves_of, models_of, result_of):
        one, other = read(ours), read(theirs)
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, (np.ndarray, float)) and not re.search(r"layers.*bias|running_mean", str(name)):
                np.testing.assert_allclose(value, other[name], rtol=0, atol=tolerance, err_msg=str(name))


@pytest.mark.parametrize("module", [linear_ce, mlp_ce, tabnet_ce])
def test_each_member_is_the_model_of_its_seed_trained_alone(store_path, tmp_path, module):
    together = fit(config_of(module, store_path, tmp_path / "together", seeds=(3, 4)))
    assert [result.run.name for result in together] == ["version_0", "version_1"]
    result, alone = together[1], fit_one(config_of(module, store_path, tmp_path / "alone", seed=4))
    ours, theirs = read_config(result.run), read_config(alone.run)
    assert ours.pop("log_dir") != theirs.pop("log_dir")
    assert ours == theirs
    assert {path.name for path in result.run.iterdir() if "events" not in path.name} == {
        path.name for path in alone.run.iterdir() if "events" not in path.name
    }
    assert_alike(result.run, alone.run, {linear_ce: 2e-6, mlp_ce: 1e-4, tabnet_ce: 1e-4}[module])
    kernels = [next(value for name, value in models_of(result.run).items() if "kernel" in name) for result in together]
    assert not np.allclose(*kernels, atol=1e-3)


def test_members_of_all_losses_lie_under_their_own_names(store_path, tmp_path):
    results = fit(config_of(linear_ce, store_path, tmp_path, losses=("ce", "hce", "exact"), seeds=(1,), epsilon=0.1))
    places = [f"{result.run.parent.parent.name}/{result.run.name}" for result in results]
    assert places == ["linear/version_0", "linear_hierarchical_loss/version_0", "linear_hierarchical_loss/version_1"]
    configs = [read_config(result.run) for result in results]
    assert [config["use_hierarchical_loss"] for config in configs] == [False, True, True]
    assert [config["epsilon"] for config in configs] == [0.1, 0.1, 0.0]
    for result, epsilon in zip(results[1:], (0.1, 0.0), strict=True):
        changes = {"use_hierarchical_loss": True, "epsilon": epsilon}
        alone = fit_one(config_of(linear_ce, store_path, tmp_path / f"alone {epsilon}", **changes))
        # HCE's gradient for a cell labelled with the root is rounding noise, which Adam scales up.
        assert_alike(result.run, alone.run, 5e-3)
    kernels = [load_model(result.run).params["linear"]["kernel"][...] for result in results]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.02
    assert np.abs(kernels[1] - kernels[2]).max() > 0.02


def test_a_member_that_stops_early_leaves_the_others_as_they_were(store_path, tmp_path, monkeypatch):
    validate = Trainer.validate

    def first_is_bad(self, watch):
        scores = validate(self, watch)
        return [score._replace(f1_macro=0.0) if config.seed == 3 else score
                for config, score in zip(self.configs, scores, strict=True)]  # fmt: skip

    monkeypatch.setattr(Trainer, "validate", first_is_bad)
    changes = {"max_epochs": 4, "early_stopping_patience": 2}
    stopped, other = fit(config_of(linear_ce, store_path, tmp_path, seeds=(3, 4), **changes))
    assert (stopped.epochs, other.epochs) == (3, 4)
    alone = fit_one(config_of(linear_ce, store_path, tmp_path / "alone", seed=4, **changes))
    assert_alike(other.run, alone.run, 2e-6)


class Killed(BaseException):
    pass


def test_an_ensemble_goes_on_with_the_members_that_are_not_finished(store_path, tmp_path, monkeypatch, capsys):
    changes = {"max_epochs": 3, "checkpoint_every_minutes": 1e-9}
    whole = fit(config_of(linear_ce, store_path, tmp_path / "whole", seeds=(3, 4), **changes))
    fit_one(config_of(linear_ce, store_path, tmp_path, seed=3, **changes))
    config, step = config_of(linear_ce, store_path, tmp_path, seeds=(3, 4), **changes), Trainer.step

    def killed(self, batch):
        if int(self.state.step) == 5:
            raise Killed
        return step(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", killed)
        with pytest.raises(Killed):
            fit(config)
    results = fit(config)
    assert "version_0: nothing to do" in capsys.readouterr().out
    for result, expected in zip(results, whole, strict=True):
        assert_alike(result.run, expected.run, 2e-6)


@pytest.mark.parametrize(
    ("saves", "wanted", "step"),
    [({"a": []}, None, 0), ({"a": [3, 6], "b": [3]}, None, 3), ({"a": [3, 6], "b": [6, 9]}, None, 6),
     ({"a": [3], "b": []}, None, 0), ({"a": [3, 6], "b": [3, 6]}, 3, 3)],
)  # fmt: skip
def test_members_go_on_from_the_newest_save_that_all_have(saves, wanted, step):
    assert common_save(saves, wanted) == step


def test_members_that_went_on_without_each_other_are_not_thrown_together():
    with pytest.raises(ConfigError, match=r"different steps \(a: 3, 6; b: 9, 12\); continue each alone"):
        common_save({"a": [3, 6], "b": [9, 12]})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seeds": (1, 1)}, r"config.seeds is \(1, 1\); it must be different whole numbers"),
        ({"seeds": (1, -1)}, r"config.seeds is \(1, -1\)"),
        ({"seeds": (1, "a")}, r"config.seeds is \(1, 'a'\)"),
        ({"losses": ("mse",)}, r"config.losses is \('mse',\); it must be different ones out of ce, hce, exact"),
        ({"losses": ("hce", "exact"), "epsilon": 0.0}, "the losses hce and exact are the same"),
    ],
)
def test_seeds_and_losses_that_make_no_sense_are_named(store_path, tmp_path, changes, says):
    with pytest.raises(ConfigError, match=says):
        fit(config_of(linear_ce, store_path, tmp_path, **changes))


def test_without_seeds_and_losses_there_is_one_member_as_configured():
    config = linear_ce.get_config()
    [member] = member_configs(config)
    assert member.to_dict() == config.to_dict()


def test_the_probabilities_of_an_ensemble_are_the_mean_of_its_members(store_path, tmp_path):
    results = fit(config_of(linear_ce, store_path, tmp_path, seeds=(3, 4), losses=("ce", "hce"), max_epochs=1))
    members = [load_model(result.run) for result in results]
    x = np.random.default_rng(0).random((5, 12), np.float32)
    ensemble = Ensemble(members)
    expected = sum(member.predict_proba(x).astype(np.float64) for member in members) / 4
    np.testing.assert_allclose(ensemble.predict_proba(x), expected, rtol=1e-6)
    assert ensemble.title == "4 x linear, hierarchical cross entropy and cross entropy"
    with pytest.raises(CheckpointError, match=r"version_0\S* is named twice"):
        Ensemble([members[0], members[1], load_model(results[0].run)])
