"""Several processes that train one model as one does; how they stop, go on, and fail together."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from fits import fit_one as fit
from messages import one_line_error
from stores import write_tiny_store

from configs import linear_ce
from hce_jax.checkpoint import load_model
from hce_jax.errors import ConfigError
from hce_jax.training import hosts

ROOT = Path(__file__).parents[2]
#: Seconds after which a process that hangs is killed.
LIMIT = 120
#: Cross entropy, since HCE's gradient for a cell labelled with the root is rounding noise, which Adam scales up.
RECIPE = {"batch_size": 30, "max_epochs": 20, "early_stopping_patience": 20, "learning_rate": 0.005}


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def start():
    """Start a command; whatever still runs at the end is killed."""
    running = []

    def start_one(*arguments):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
        running.append(subprocess.Popen([sys.executable, *map(str, arguments)], env=environment, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE))  # fmt: skip
        return running[-1]

    yield start_one
    for process in running:
        process.kill()
        process.communicate()


def start_pair(start, stores, log_dir):
    """Start two hosts, each with a store."""
    port = free_port()
    recipe = [f"--config.{name}={value}" for name, value in RECIPE.items()]
    return [start(ROOT / "train.py", f"--config={ROOT}/configs/linear_ce.py", *recipe, f"--config.data_path={store}",
                  f"--config.log_dir={log_dir}", f"--coordinator_address=localhost:{port}", "--num_processes=2",
                  f"--process_id={index}") for index, store in enumerate(stores)]  # fmt: skip


def ended(process, before=()):
    """Wait for a process; give what subprocess.run does. ``before``: the lines that were read already."""
    out, err = process.communicate(timeout=LIMIT)
    lines = [*before, *out.splitlines(keepends=True)]
    out = "".join(line for line in lines if not line.startswith("[Gloo]"))  # that of JAX's CPU hosts
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="module")
def store_path(tmp_path_factory):
    return write_tiny_store(tmp_path_factory.mktemp("hosts") / "store")


@pytest.fixture(scope="module")
def pair(store_path, start):
    """Train on two hosts, which are told to end in between; give the folder of the run and what they printed."""
    log_dir = store_path.parent / "two"
    first, second = start_pair(start, [store_path] * 2, log_dir)
    before = []
    for line in first.stdout:
        before.append(line)
        if line.startswith("epoch   0 "):
            second.send_signal(signal.SIGTERM)
            break
    said = [[ended(first, before), ended(second)]]
    saves = sorted(int(path.name) for path in (log_dir / "linear/default/version_0/checkpoints/last").iterdir())
    said += [[ended(process) for process in start_pair(start, [store_path] * 2, log_dir)] for _ in range(2)]
    return log_dir / "linear" / "default" / "version_0", saves, said


def test_when_one_host_is_told_to_end_all_save_and_the_same_command_goes_on(pair):
    run, saves, (stopped, went_on, _) = pair
    assert [done.returncode for done in (*stopped, *went_on)] == [0] * 4, stopped + went_on
    told = re.search(r"told to end \(SIGTERM\); saved at step (\d+), from where the same command", stopped[0].stdout)
    assert 3 <= int(told[1]) == saves[-1] < 60
    assert f"goes on     {run} from step {told[1]}, in epoch " in went_on[0].stdout
    epochs = re.findall(r"^epoch +(\d+) ", stopped[0].stdout + went_on[0].stdout, re.MULTILINE)
    assert list(map(int, epochs)) == list(range(20))


def test_only_the_first_host_speaks_and_nobody_warns(pair):
    _, _, said = pair
    for first, second in said:
        assert "devices     2 x cpu on 2 hosts" in first.stdout or "nothing to do" in first.stdout
        assert (second.stdout, first.stderr, second.stderr) == ("", "", "")


def test_a_finished_run_is_left_alone_by_both(pair):
    run, _, (_, _, (first, second)) = pair
    assert (first.returncode, second.returncode) == (0, 0)
    assert f"finished    {run}: nothing to do" in first.stdout


def test_two_hosts_train_the_same_model_as_one_and_leave_the_same_files(store_path, pair):
    run, _, _ = pair
    config = linear_ce.get_config()
    config.update(data_path=str(store_path), log_dir=str(store_path.parent / "one"), **RECIPE)
    one = fit(config)
    names, expected = (
        {str(path.relative_to(folder)) for path in (*folder.glob("*"), *folder.glob("checkpoints/*"),
                                                    *folder.glob("checkpoints/last/*")) if "tfevents" not in path.name}
        for folder in (run, one.run)
    )  # fmt: skip
    assert names == expected
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    config.log_dir = str(run.parents[2])
    two = fit(config)  # it is finished: only read
    assert (two.checkpoint.name, two.epochs) == (one.checkpoint.name, one.epochs)
    assert two.val_f1_macro == pytest.approx(one.val_f1_macro, abs=1e-12)
    assert two.test == pytest.approx(one.test, abs=1e-6)
    weights, expected = (load_model(each.checkpoint).params["linear"]["kernel"][...] for each in (two, one))
    np.testing.assert_allclose(weights, expected, atol=1e-6)


def test_an_error_on_one_host_ends_all_and_is_one_line(store_path, start, tmp_path):
    damaged = write_tiny_store(tmp_path / "damaged")
    part = damaged / "train" / "part.0.parquet"
    data = bytearray(part.read_bytes())
    data[4:300] = bytes(296)
    part.write_bytes(data)
    first, second = map(ended, start_pair(start, [store_path, damaged], tmp_path / "logs"))
    assert "train/part.0.parquet is damaged: row group" in one_line_error(second)
    assert first.returncode not in (0, 2)


# --- meeting


@pytest.fixture
def no_meeting(monkeypatch):
    def initialize(*arguments, **options):
        raise AssertionError("JAX was asked to meet other hosts")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)


def test_one_host_alone_meets_nobody(no_meeting):
    hosts.connect(None, None, None)


@pytest.mark.parametrize(
    ("address", "count", "index", "environment", "says"),
    [
        ("localhost:1234", 2, None, {}, "give all of --coordinator_address, --num_processes and --process_id"),
        (None, 2, 0, {}, "give all of --coordinator_address"),
        (None, None, None, {"JAX_PROCESS_ID": "0"}, "or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        ("localhost:1234", 2, 2, {}, "--process_id=2 is not below --num_processes=2; they are counted from 0"),
        ("localhost:1234", 2, None, {"JAX_PROCESS_ID": "7"}, "--process_id=7 is not below --num_processes=2"),
        ("localhost:1234", 2, None, {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID is '-1'; it must be a number"),
        ("localhost:1234", None, 0, {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'; it must be a number"),
        ("localhost", 2, 1, {}, "--coordinator_address=localhost is not of the form host:port"),
        ("localhost:port", 2, 0, {}, "--coordinator_address=localhost:port is not of the form host:port"),
        ("localhost:70000", 2, 0, {}, "--coordinator_address=localhost:70000 is not of the form host:port"),
    ],
)
def test_what_cannot_be_is_said_before_anybody_waits(no_meeting, monkeypatch, address, count, index, environment, says):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=re.escape(says)):
        hosts.connect(address, count, index)


def test_a_port_that_is_in_use_is_named(no_meeting):
    with socket.create_server(("localhost", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of this machine is in use, by another process with"):
            hosts.connect(f"localhost:{port}", 2, 0)


def test_hosts_that_do_not_meet_say_so_in_one_line(start):
    program = "import sys; from hce_jax.training import hosts; hosts._PATIENCE = 1; hosts.connect(sys.argv[1], 2, {})"
    ports = [free_port() for _ in range(2)]
    waiting = [start("-c", program.format(index), f"localhost:{port}") for index, port in enumerate(ports)]
    for index, (port, process) in enumerate(zip(ports, waiting, strict=True)):
        line = one_line_error(ended(process))
        assert f"process {index} of 2 did not meet the others at localhost:{port} in 1 seconds; start all" in line
