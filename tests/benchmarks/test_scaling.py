import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"

HLO = """HloModule jit_step, entry_computation_layout={(f32[2,3]{1,0})->f32[2,3]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%any_of (flags: pred[4]) -> pred[] {
  ROOT %all-reduce.9 = pred[] all-reduce(%flags), to_apply=%or, metadata={op_name="jit(step)/while"}
}

%going_on (state: (f32[], s32[])) -> pred[] {
  ROOT %call.1 = pred[] call(%state), to_apply=%any_of
}

%round (state: (f32[], s32[])) -> (f32[], s32[]) {
  %far = bf16[2,5]{1,0:T(8,128)(2,1)} collective-permute(%state), source_target_pairs={{0,1}}
}

ENTRY %main (x: f32[2,3]) -> f32[2,3] {
  %one = f32[] all-reduce(%x), to_apply=%add
  %many = (f32[1,20]{1,0}, s32[4]{0}, f32[], f32[], f32[], /*index=5*/f64[2]{0}) all-reduce(%x, %y), to_apply=%add
  %start = f32[8,2]{1,0} all-reduce-start(%x), to_apply=%add
  %done = f32[8,2]{1,0} all-reduce-done(%start)
  %fused = f32[100]{0} fusion(%many), kind=kLoop, calls=%add, metadata={op_name="jit(step)/ all-gather("}
  %whole = f32[4,3]{1,0} all-gather(%x), dimensions={0}, metadata={op_name="jit(step)/dot_general" stack_frame_id=3}
  ROOT %loop = (f32[], s32[]) while(%start), condition=%going_on, body=%round
}
"""


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return import_module("scaling")


def run(options: str) -> list[list[str]]:
    command = [sys.executable, str(FOLDER / "scaling.py"), *options.split()]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return [line.split() for line in output.splitlines()]


def test_every_collective_is_read_with_its_bytes_and_whether_a_loop_repeats_it(scaling):
    assert sorted(scaling.collectives(HLO)) == [
        ("all-gather", 48, "jit(step)/dot_general", False),
        ("all-reduce", 1, "jit(step)/while", True),
        ("all-reduce", 4, "", False),
        ("all-reduce", 64, "", False),
        ("all-reduce", 80 + 16 + 12 + 16, "", False),
        ("collective-permute", 20, "", True),
    ]


def test_the_time_of_rings_by_hand(scaling):
    system = scaling.System(matrix=1.0, memory=1.0, levels=((8, 100.0), (8, 10.0)))
    within, between = 2 * 7 / 8 * 400 / 100, 2 * 3 / 4 * 50 / 10
    assert scaling.all_reduce_seconds(400, 3, 1, system) == 0
    assert scaling.all_reduce_seconds(400, 3, 8, system) == pytest.approx(within + 3 * scaling.LATENCY)
    assert scaling.all_reduce_seconds(400, 3, 32, system) == pytest.approx(within + between + 6 * scaling.LATENCY)


def test_the_linear_model_sends_its_gradients_and_counts_and_nothing_else():
    rows = run("--models linear --genes 50 --types 7 --batch_size 16 --members 2")
    needed = f"{4 * (50 * 7 + 7 + 3 * 7 + 2):,}"
    assert rows[2][:7] == ["linear", "357", needed, needed, "3", "0", "0"]
    assert [row[:2] for row in rows[5:8]] == [["linear", "H200,"], ["linear", "H200,"], ["linear", "TPU"]]
    assert [row[:2] for row in rows[-2:]] == [["decoding", "0"], ["linear", "2"]]


@pytest.mark.slow
def test_tabnet_reduces_within_the_loops_of_its_mask_and_gathers_nothing():
    row = run("--models tabnet --genes 300 --types 7 --batch_size 256 --members")[2]
    assert row[5:7] == ["2", "0"]
