"""A training that was stopped, in whatever way, goes on as if it had not been."""

import errno
import json
import os
import shutil
import signal
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
import pytest
from fits import fit_one as fit
from stores import write_tiny_store

from benchmarks.faults import differences
from configs import linear_hce, mlp_ce
from hce_jax import checkpoint
from hce_jax.errors import CheckpointError, ConfigError, Preempted
from hce_jax.runs import held_run
from hce_jax.training import member
from hce_jax.training.member import Member
from hce_jax.training.session import Session
from hce_jax.training.trainer import Trainer

STEPS = 3  # of an epoch


@pytest.fixture(scope="module")
def store_path(tmp_path_factory):
    return write_tiny_store(tmp_path_factory.mktemp("resume") / "store")


def config_of(store_path, log_dir, module=linear_hce, **changes):
    config = module.get_config()
    config.update(data_path=str(store_path), log_dir=str(log_dir), batch_size=30, max_epochs=3, learning_rate=0.05)
    config.update(n_hidden=2, hidden_size=8, log_every_n_steps=1, save_top_k=1, augment_training_data=False)
    config.update({"checkpoint_every_minutes": 1e-9, **changes})  # a save after every step
    return config


@pytest.fixture(scope="module")
def whole(store_path, tmp_path_factory):
    """Give the runs that nothing disturbed, by module."""
    folder = tmp_path_factory.mktemp("whole")
    return {module: fit(config_of(store_path, folder, module)).run for module in (linear_hce, mlp_ce)}


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


#: What a training does to files, and its steps: it can be killed before each of these.
EVENTS = ((Trainer, "step"), (Trainer, "validate"), (Trainer, "test"), (checkpoint.ocp, "save_checkpointables"),
          (Path, "rename"), (shutil, "rmtree"), (member, "written_aside"))  # fmt: skip


def killed_at(monkeypatch, number, log_dir):
    """Have the event of this number, and all after it, raise.

    Returns the list of the events, and how much of TensorBoard's files was on the disk at that moment.
    """
    events, on_disk = [], {}

    def watched(name, function):
        def call(*args, **kwargs):
            events.append(name)
            if len(events) > number:
                found = Path(log_dir).rglob("events.out.tfevents.*")
                on_disk.update({path: path.stat().st_size for path in found if path not in on_disk})
                raise Killed
            return function(*args, **kwargs)

        return call

    for owner, name in EVENTS:
        monkeypatch.setattr(owner, name, watched(name, getattr(owner, name)))
    return events, on_disk


def fit_killed(monkeypatch, config, number):
    """Train up to the event of this number; return the events, or None if the training ended before it."""
    with monkeypatch.context() as patched:
        events, on_disk = killed_at(patched, number, config.log_dir)
        try:
            fit(config)
        except Killed:
            for path, size in on_disk.items():
                os.truncate(path, size)
            return events
    return None


@pytest.mark.parametrize("first", [2, 5])
def test_killed_at_any_moment_and_continued_it_ends_bit_for_bit_as_if_nothing_had_been(
    store_path, whole, tmp_path, monkeypatch, first
):
    config = config_of(store_path, tmp_path)
    kills = []  # in steps, in saves, between their renames, in the test at the end
    while events := fit_killed(monkeypatch, config, first + 9 + len(kills)):
        kills.append(events[-1])
        for save in tmp_path.glob("*/default/version_0/checkpoints/last/?"):  # what a save counts on is there
            for _, name in checkpoint.state_about(save)["best"]:
                assert (save.parents[1] / name).is_dir()
    assert len(kills) >= 3
    assert len(set(kills)) > 1
    assert differences(whole[linear_hce], fit(config).run) == []


def test_dropout_and_batch_norm_go_on_as_they_were(store_path, whole, tmp_path, monkeypatch):
    config = config_of(store_path, tmp_path, mlp_ce)
    fit_killed(monkeypatch, config, 12)
    assert differences(whole[mlp_ce], fit(config).run) == []


def test_the_comparison_sees_another_weight(store_path, whole, tmp_path):
    other = fit(config_of(store_path, tmp_path, seed=2)).run
    found = differences(whole[linear_hce], other)
    assert any(line.startswith("saves: params") for line in found)
    assert any(line.startswith("checkpoints: ") for line in found)
    assert any(line.startswith("points: ") for line in found)


# --- which run


def test_a_finished_run_is_left_alone_and_gives_its_result_again(store_path, tmp_path, capsys):
    config = config_of(store_path, tmp_path)
    first = fit(config)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert fit(config) == first
    assert capsys.readouterr().out.splitlines()[-1] == f"finished    {first.run}: nothing to do; --new_run trains again"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files


@pytest.mark.parametrize("change", [{"seed": 2}, {"learning_rate": 0.04}])
def test_another_configuration_is_another_run(store_path, tmp_path, change):
    runs = [fit(config_of(store_path, tmp_path, **{"max_epochs": 1, **each})).run for each in ({}, change)]
    assert [run.name for run in runs] == ["version_0", "version_1"]


def test_new_run_begins_again_and_the_command_then_means_the_newest(store_path, tmp_path, monkeypatch):
    config = config_of(store_path, tmp_path)
    fit_killed(monkeypatch, config, 9)
    new = fit(config, new_run=True)
    assert new.run.name == "version_1"
    assert fit(config) == new
    assert not (new.run.parent / "version_0" / "result.json").exists()


def test_a_run_that_another_process_trains_is_not_touched(store_path, tmp_path, monkeypatch):
    config = config_of(store_path, tmp_path)

    run, refused = Session.run, []

    def meanwhile(self):
        with pytest.raises(ConfigError, match=r"another process is training the run .*version_0; wait for it") as error:
            fit(config)
        refused.append(error)
        run(self)

    monkeypatch.setattr(Session, "run", meanwhile)
    assert fit(config).run.name == "version_0"
    assert len(refused) == 1


def test_a_run_that_another_process_began_meanwhile_is_not_begun_twice(store_path, tmp_path, monkeypatch):
    config, build = config_of(store_path, tmp_path), Trainer.__init__
    with ExitStack() as held:

        def slowly(self, configs, *rest):
            build(self, configs, *rest)
            other = Member(configs[0], tmp_path / "linear_hierarchical_loss" / "default")
            with other.beginning():
                other.use_run(other.new_run({}))
            held.enter_context(held_run(other.folder))

        monkeypatch.setattr(Trainer, "__init__", slowly)
        with pytest.raises(ConfigError, match=r"another process is training the run .*version_0"):
            fit(config)
    assert [path.name for path in (tmp_path / "linear_hierarchical_loss" / "default").iterdir()] == ["version_0"]


@pytest.mark.parametrize("content", ["", '{"che', "{}", "[]"])
def test_a_damaged_result_is_named(store_path, tmp_path, content):
    member = Member(config_of(store_path, tmp_path), tmp_path)
    (tmp_path / "version_0").mkdir()
    member.use_run(0)
    assert member.result is None
    (tmp_path / "version_0" / "result.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"version_0/result.json is damaged; remove it"):
        member.result  # noqa: B018


def stopped_run(store_path, tmp_path, monkeypatch):
    assert fit_killed(monkeypatch, config_of(store_path, tmp_path), 45)
    return tmp_path / "linear_hierarchical_loss" / "default" / "version_0"


def test_a_run_whose_configuration_cannot_be_read_is_not_passed_over(store_path, tmp_path, monkeypatch):
    run = stopped_run(store_path, tmp_path, monkeypatch)
    (run / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json cannot be read, so which run it is cannot be told"):
        fit(config_of(store_path, tmp_path))
    assert fit(config_of(store_path, tmp_path), new_run=True).run.name == "version_1"


def test_checkpoints_without_any_save_are_not_deleted(store_path, tmp_path, monkeypatch):
    run = stopped_run(store_path, tmp_path, monkeypatch)
    (best,) = (run / "checkpoints").glob("*.ckpt")
    renamed = best.rename(best.with_name(best.name.replace("epoch=0", "epoch=1")))
    shutil.rmtree(run / "checkpoints" / "last")
    with pytest.raises(CheckpointError, match=r"version_0 has checkpoints but no save to go on from"):
        fit(config_of(store_path, tmp_path))
    assert renamed.is_dir()


def test_a_checkpoint_that_a_save_needs_is_missed_at_once(store_path, tmp_path, monkeypatch):
    run = stopped_run(store_path, tmp_path, monkeypatch)
    for path in (run / "checkpoints").glob("*.ckpt"):
        shutil.rmtree(path)
    with pytest.raises(CheckpointError, match=r"\d\.\d+\.ckpt is missing, on which the save of step"):
        fit(config_of(store_path, tmp_path))


@pytest.mark.parametrize("finished", [False, True])
def test_to_go_on_from_a_step_needs_a_run_that_can(store_path, whole, tmp_path, finished):
    log_dir = whole[linear_hce].parents[2] if finished else tmp_path
    with pytest.raises(ConfigError, match="the run is finished" if finished else "there is no run with this config"):
        fit(config_of(store_path, log_dir), resume_from=3)


# --- SIGTERM


@pytest.mark.parametrize(("where", "step"), [("step", 5), ("validate", 2), ("test", 1)])
def test_told_to_end_it_saves_where_it_is_and_goes_on_from_there(
    store_path, whole, tmp_path, monkeypatch, capsys, where, step
):
    config = config_of(store_path, tmp_path, checkpoint_every_minutes=0)
    function, calls = getattr(Trainer, where), []

    def told(self, *args):
        calls.append(self)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(self, *args)

    saved = {"step": 5, "validate": 6, "test": 9}[where]
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, where, told)
        with pytest.raises(Preempted, match=rf"told to end \(SIGTERM\); saved at step {saved}, from where the same"):
            fit(config)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    again = fit(config).run
    assert f"from step {saved}, in epoch {saved // STEPS if where != 'validate' else 1}" in capsys.readouterr().out
    assert differences(whole[linear_hce], again) == []


# --- saves


def test_the_newest_two_saves_stay(whole):
    saves = (whole[linear_hce] / "checkpoints" / "last").iterdir()
    assert {path.name for path in saves} == {"8", "9"}


def damage(save):
    """Change a byte in the middle of the largest file."""
    path = max((path for path in save.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def test_a_damaged_save_is_named_and_the_one_before_is_used_only_when_asked_for(
    store_path, whole, tmp_path, monkeypatch, capsys
):
    config = config_of(store_path, tmp_path)
    assert fit_killed(monkeypatch, config, 45)
    run = tmp_path / "linear_hierarchical_loss" / "default" / "version_0"
    older, newest = sorted(int(path.name) for path in (run / "checkpoints" / "last").glob("?"))[-2:]
    damage(run / "checkpoints" / "last" / str(newest))
    with pytest.raises(CheckpointError, match=f"last/{newest} is damaged.*--resume_from={older}, or begin.*--new_run"):
        fit(config)
    with pytest.raises(ConfigError, match=f"no save of step 77 to go on from; .*version_0: .*{older}, {newest}"):
        fit(config, resume_from=77)
    again = fit(config, resume_from=older).run
    assert f"from step {older}, in epoch" in capsys.readouterr().out
    assert differences(whole[linear_hce], again) == []


def test_a_full_disk_ends_training_with_one_line_and_the_last_save_still_loads(
    store_path, whole, tmp_path, monkeypatch
):
    config, write = config_of(store_path, tmp_path), checkpoint.ocp.save_checkpointables

    def full(path, *args, **kwargs):
        if path.name.startswith("5"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.ocp, "save_checkpointables", full)
        with pytest.raises(CheckpointError, match=r"last/5 could not be written: .*No space left on device"):
            fit(config)
    assert differences(whole[linear_hce], fit(config).run) == []


def test_a_save_of_another_model_is_refused(store_path, tmp_path, monkeypatch):
    config = config_of(store_path, tmp_path)
    fit_killed(monkeypatch, config, 9)
    (run,) = tmp_path.glob("*/default/version_0")
    described = json.loads((run / "config.json").read_text())
    described["config"]["model_type"] = "mlp"
    (run / "config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"the save of .*version_0 does not fit the model of this version"):
        fit(config_of(store_path, tmp_path, model_type="mlp"))


def test_weights_that_are_no_numbers_are_never_saved(store_path, tmp_path, monkeypatch):
    step = Trainer.step

    def poisoned(self, batch):
        metrics = step(self, batch)
        if int(self.state.step) == 5:
            self.state = jax.tree.map(lambda leaf: leaf * np.nan if leaf.dtype == np.float32 else leaf, self.state)
        return metrics

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(Exception, match="weights became infinite or no number before step 5; nothing was saved"):
        fit(config_of(store_path, tmp_path))
    assert {path.name for path in tmp_path.glob("*/default/version_0/checkpoints/last/*")} <= {"3", "4"}
