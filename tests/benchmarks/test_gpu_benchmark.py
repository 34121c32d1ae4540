"""benchmarks/gpu.py: what it counts, what it simulates, and a small run where few packages are installed."""

# ruff: noqa: E402 (the benchmarks are in no package)

import ast
import gzip
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import gpu_floor, gpu_steps, simulated_cells, stand_ins
from benchmarks.gpu_report import Report, targets
from benchmarks.kernel_trace import read_kernels
from benchmarks.peer_process import PeerError, PeerProcess
from benchmarks.step import HYPER_PARAMETERS, MODELS
from hce_jax.input import DenseBatch, densify
from hce_jax.models import build_model
from hce_jax.store import Block
from hce_jax.store.block import COUNTS, VALUES
from hce_jax.training.mesh import batch_sharding, data_mesh
from hce_jax.typing import PRECISIONS

# What jax, flax and optax bring along themselves.
WITH_JAX = {"absl", "orbax", "psutil", "yaml"}
CORE = {"jax", "flax", "optax", "numpy", "scipy", "hce_jax", "configs"}

# --- stand-ins


def test_every_package_that_hce_jax_imports_can_be_stood_in_for():
    imported = set()
    for file in (ROOT / "hce_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    assert imported - {*sys.stdlib_module_names} - CORE <= {*stand_ins.PACKAGES}


def test_only_what_is_absent_is_stood_in_for(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    for name in ("absent_one", "absent_one.part", "colorsys"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert stand_ins.stand_in(["colorsys", "absent_one"]) == ["absent_one"]
    import colorsys

    import absent_one.part

    assert colorsys.rgb_to_hsv(0, 0, 1)[2] == 1
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("absent_two")

    @absent_one.jit(cache=True)
    class Derived(absent_one.part.Base[int], dict):
        field: absent_one.Array | None

    assert Derived is absent_one.anything
    assert list(absent_one.part.rows) == []
    assert not hasattr(absent_one, "__version__")


# --- what a step needs


@pytest.mark.parametrize("model", MODELS)
def test_parameters_are_those_of_the_models(model):
    config = {"model_type": model, **HYPER_PARAMETERS}
    built = nnx.eval_shape(lambda: build_model(config, 300, 7, nnx.Rngs(0), precision=PRECISIONS["float32"]))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(built, nnx.Param)))
    assert gpu_floor.n_parameters(model, 300, 7) == count


def products(jaxpr):
    """Add up 2 m n k over the matrix products of a program."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        for param in jax.tree.leaves([*equation.params.values()], is_leaf=lambda param: hasattr(param, "eqns")):
            inner = getattr(param, "jaxpr", param)
            total += products(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("model", MODELS)
def test_operations_are_those_of_the_programs(model, monkeypatch):
    # As on an accelerator: on a CPU TabNet takes ghost batches in a loop, and computes masks a second time.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    data = gpu_steps.Data(1024, 7, batch_sharding(data_mesh(), 512), jnp.eye(7), jnp.ones((3, 1024)))
    batch = DenseBatch(jnp.ones((512, 1024)), jnp.zeros(512, jnp.int32), jnp.ones(512, bool))

    def traced():  # within a trace nothing is compiled
        training = gpu_steps.Training(data, model, "float32")
        trained.append(jax.make_jaxpr(training.step)(training.state, batch))
        predicted.append(jax.make_jaxpr(training.probabilities)(*training.weights, batch.x))

    trained, predicted = [], []
    jax.eval_shape(traced)
    for task, programs in (("training", trained), ("inference", predicted)):
        needed = gpu_floor.needs(model, task, 512, 1024, 7, 0, 3).operations
        # Beside them come sums over cells and covariances, written as products.
        assert needed <= products(programs[0].jaxpr) < 1.12 * needed, task


def test_bytes_of_a_linear_step_by_hand():
    # 5 genes, 3 types: 18 parameters; 100 bytes of packed cells; batch 2.
    training = gpu_floor.needs("linear", "training", 2, 5, 3, 100, vectors=9)
    assert training == (100 + 2 * 3 * 4 * 18, 2 * 2 * 2 * 5 * 3, 100)
    inference = gpu_floor.needs("linear", "inference", 2, 5, 3, 100, vectors=9)
    assert inference == (100 + 4 * 18 + 4 * 2 * 3, 2 * 2 * 5 * 3, 100)


def test_augmentation_reads_no_more_vectors_than_there_are():
    def of(batch, vectors):
        return gpu_floor.needs("mlp", "training", batch, 50, 3, 0, vectors).memory

    assert of(8, 4) - of(8, 0) == 4 * 4 * 50
    assert of(8, 400) - of(8, 0) == 4 * 8 * 50


def test_members_share_the_cells_but_not_the_weights():
    one, four = (gpu_floor.needs("linear", "training", 2, 5, 3, 100, 9, members) for members in (1, 4))
    assert four == (100 + 4 * (one.memory - 100), 4 * one.operations, 100)


@pytest.mark.parametrize(
    ("needed", "floor"),
    [((20, 5, 1), (2.0, "memory")), ((20, 30, 1), (3.0, "operations")), ((20, 30, 4), (4.0, "link"))],
)
def test_the_floor_is_the_longest_of_three_times(needed, floor):
    card = gpu_floor.Card(bandwidth=10, link=1, operations={"bf16": 10})
    assert gpu_floor.Needs(*needed).floor(card, "bf16") == floor


# --- simulated cells


@pytest.fixture(scope="module")
def blocks():
    return simulated_cells.simulate(600, n_genes=700, n_types=5)


def test_simulated_cells_are_as_sparse_as_the_atlas(blocks):
    assert [len(block) for block in blocks] == [512, 88]
    scale = np.concatenate([block.column("scale") for block in blocks])
    assert scale.min() > 0
    x = densify(simulated_cells.Pieces(blocks, 600).of_cells(np.arange(600)))
    counts = np.rint(np.expm1(np.asarray(x)) / scale[:, None])
    assert abs((counts > 0).mean() - 2190 / 19331) < 0.01
    assert 0.9 < (counts[counts > 0] <= 3).mean() < 0.97
    np.testing.assert_allclose(np.expm1(x).sum(1), 1e4, rtol=1e-4)


def test_plain_blocks_are_blocks_of_a_store(blocks):
    stored = simulated_cells.simulate(600, 700, 5, Block)
    for block, other in zip(blocks, stored, strict=True):
        ours, theirs = block.slice(3, 40), other.slice(3, 40)
        for names in (COUNTS, VALUES):
            for array, expected in zip(ours.stream(names), theirs.stream(names), strict=True):
                np.testing.assert_array_equal(array, expected)
                assert array.dtype == expected.dtype
        np.testing.assert_array_equal(ours.column("scale"), theirs.column("scale"))
        np.testing.assert_array_equal(ours.column("cell_type"), theirs.column("cell_type"))


def test_pieces_give_each_cell_once(blocks):
    pieces = simulated_cells.Pieces(blocks, 40)
    scales = np.concatenate([batch.scale for batch in simulated_cells.joined_ahead(pieces)])
    assert len(pieces) == 15
    assert sorted(scales) == sorted(np.concatenate([block.column("scale") for block in blocks]))


def test_cells_on_the_device_are_the_cells(blocks):
    cells = simulated_cells.OnDevice(blocks, copies=3, batch_size=40, mesh=data_mesh())
    order = cells.order(1000)
    assert order.shape == (45, 40)
    assert sorted(order.ravel()) == list(range(1800))
    for batch, chosen in zip(cells.batches(order), order[:3], strict=False):
        expected = simulated_cells.Pieces(blocks, 40).of_cells(chosen % 600)
        np.testing.assert_array_equal(batch.targets, expected.targets)
        np.testing.assert_allclose(densify(batch), densify(expected), atol=1e-6)


def test_repeated_cells_lie_elsewhere(blocks):
    copies = simulated_cells.repeated(blocks, 1300)
    assert [len(block) for block in copies] == [512, 88, 512, 88, 512]
    assert not np.shares_memory(copies[0].stream(COUNTS).gaps, blocks[0].stream(COUNTS).gaps)
    np.testing.assert_array_equal(copies[3].stream(COUNTS).gaps, blocks[1].stream(COUNTS).gaps)


# --- timing and telling


def test_programs_take_turns():
    taken = []

    def program(name, seconds):
        def run(n_steps):
            taken.append(name)
            return n_steps * seconds

        return run

    times = gpu_steps.take_turns({"a": program("a", 0.125), "b": program("b", 0.25)})
    assert times == {"a": (0.125, 0.0), "b": (0.25, 0.0)}
    assert taken[4:] == ["a", "b"] * gpu_steps.N_STRETCHES


def test_what_does_not_fit_is_left_out_and_what_fails_is_told(capsys):
    report = Report(minutes=60, sections=["training"])
    with report.part("epoch", "not asked for") as go:
        assert not go
    with report.part("training", "of less weight", vital=False):
        raise MemoryError
    assert not report.failed
    report.notes.clear()
    with report.part("training", "first") as go:
        assert go
        raise MemoryError("no room\nsecond line")
    assert report.failed
    assert report.notes == ["FAILED training: first: MemoryError: no room"]
    report.row("training", "a row", model="mlp", ms=1.0)
    report.row("training", "a row", model="mlp", ms=2.0)
    assert report.find("training", model="mlp")["ms"] == 2.0
    assert report.find("training", model="linear") is None
    short = Report(minutes=0)
    with short.part("training", "first") as go:
        assert not go
    assert short.notes == ["left out, no time: training: first"]
    assert not short.failed
    capsys.readouterr()


def test_targets_say_whether_they_are_reached():
    report = Report(minutes=1)
    case = {"precision": "tf32", "batch": 2048}
    report.rows += [
        {"section": "training", "model": "tabnet", "ms": 2.0, "torch_ms": 15.0, "cells_per_second": 1.0, **case},
        {"section": "training", "model": "mlp", "ms": 1.0, "torch_ms": None, "cells_per_second": 2e6, **case},
        {"section": "epoch", "model": "tabnet", "where": "host memory", "epoch_seconds": 61.0, **case},
    ]
    told = [line.rpartition(": ")[2] for line in targets(report, "tabnet", case, "a card")]
    assert told[1:] == ["2.00 ms, yes", "7.50 times, NO", "not measured", "2,000,000.00 cells/s, yes", "61.00 s, NO",
                        "not measured"]  # fmt: skip


def test_kernels_are_read_from_a_trace(tmp_path):
    def named(what, pid, name, tid=None):
        return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}

    def ran(name, pid, tid, dur, **args):
        return {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": 0, "dur": dur, "args": args}

    events = [
        named("process_name", 1, "/device:GPU:0"), named("process_name", 2, "/host:CPU"),
        named("thread_name", 1, "Stream #13(Compute)", 5), named("thread_name", 1, "XLA Ops", 6),
        named("thread_name", 2, "Stream of thought", 5),
        ran("gemm", 1, 5, 30.0, hlo_op="dot.1", tf_op="step/forward"), ran("gemm", 1, 5, 10.0), ran("add", 1, 5, 2.0),
        ran("gemm", 1, 6, 99.0), ran("python", 2, 5, 99.0), {},
    ]  # fmt: skip
    with gzip.open(tmp_path / "x.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    gemm, add = read_kernels(tmp_path / "x.trace.json.gz")
    assert (gemm.name, gemm.runs, gemm.scope) == ("gemm", 2, "step/forward")
    assert gemm.seconds == pytest.approx(40e-6)
    assert (add.name, add.seconds, add.scope) == ("add", pytest.approx(2e-6), "")


# --- the peers

ANSWERING = """
import json, sys, time
for line in sys.stdin:
    request = json.loads(line)
    if request.get("run") == 3: print("{not whole", flush=True)
    elif request.get("run") == 4: sys.exit()
    elif request.get("prepare") == {"sleep": 1}: time.sleep(60)
    elif request.get("prepare") == {"fail": 1}: print('{"error": "out of memory"}', flush=True)
    else: print(json.dumps({"seconds": 0.5 * request.get("run", 0)}), flush=True)
"""


@pytest.fixture
def peer(monkeypatch):
    process = PeerProcess("torch", 5, 3)
    monkeypatch.setattr(process, "_command", [sys.executable, "-S", "-c", ANSWERING])
    yield process
    process.close()


def test_a_peer_that_fails_is_told_and_asked_again(peer):
    peer.prepare({}, 20)
    assert peer.run(2) == 1.0
    with pytest.raises(PeerError, match="torch did not run: out of memory"):
        peer.prepare({"fail": 1}, 20)
    assert peer.run(6) == 3.0
    with pytest.raises(PeerError, match="its process has ended"):
        peer.run(4)
    with pytest.raises(PeerError, match="no answer in time"):
        peer.prepare({"sleep": 1}, 0.2)
    peer.prepare({}, 20)
    with pytest.raises(PeerError, match="torch did not run"):
        peer.run(3)


# --- all of it

SMALL = [
    "--models", "linear", "--genes", "50", "--types", "5", "--batch_sizes", "32", "--cells", "512", "--vectors", "4",
    "--members", "2", "--peers", "--json",
]  # fmt: skip
ALONE = """
import importlib.machinery, itertools, json, sys
hidden, arguments = json.loads(sys.argv[1]), json.loads(sys.argv[2])
find = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in hidden else find(name, path, target)
importlib.machinery.PathFinder.find_spec = find_spec
sys.path.insert(0, ".")
from benchmarks import gpu, gpu_check, gpu_steps
gpu_steps.STRETCH_SECONDS = 0.01
cases = gpu_check.cases
gpu_check.cases = lambda *given: itertools.islice(cases(*given), 2)  # the others take longer
sys.exit(gpu.main(arguments))
"""


@pytest.mark.slow
def test_a_small_run_with_jax_flax_and_optax_alone(tmp_path):
    hidden = [*({*stand_ins.PACKAGES} - WITH_JAX)]
    arguments = [json.dumps(each) for each in (hidden, [*SMALL, str(tmp_path / "rows.json")])]
    result = subprocess.run(
        [sys.executable, "-c", ALONE, *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    told = json.loads((tmp_path / "rows.json").read_text())
    sections = {row["section"] for row in told["rows"]}
    assert sections == {"check", "card", "training", "inference", "stages", "epoch", "ensemble"}
    assert told["notes"] == ["left out, the profiler tells of no kernels: stages: the dearest kernels"]
    assert {row["where"] for row in told["rows"] if row["section"] == "epoch"} == {"host memory", "device memory"}
    stand_in_line = result.stdout.splitlines()[1]
    assert {*stand_in_line.partition("installed: ")[2].split(", ")} == {*hidden}
    assert "| linear | float32 | 32 |" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("- 15,240,192 cells of linear from device memory <= 30 s: ")
