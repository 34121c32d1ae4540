import importlib.util
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"

# Sizes in bytes: x 2,000; table 40,000; w 400. A name says what its computation is for.
HLO = r"""HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[10,50]{1,0})->f32[10,10]{1,0}}

FileNames
1 "step.py"

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %added = f32[] add(%a, %b)
}

%rows_of_a_table (table.1: f32[100,100], at.1: s32[3], x.1: f32[10,50]) -> f32[3,100] {
  %x.1 = f32[10,50]{1,0} parameter(2)
  %table.1 = f32[100,100]{1,0} parameter(0)
  %at.1 = s32[3]{0} parameter(1)
  %flat = f32[100,100]{1,0} bitcast(%table.1)
  %gathered = f32[3,100]{1,0} gather(%flat, %at.1), slice_sizes={1,100}, metadata={op_name="jit(step)/augment/gather"}
  %some = f32[3,5]{1,0} slice(%x.1), slice={[0:3], [0:5]}
  %more = f32[2,5]{1,0} slice(%x.1), slice={[0:2], [0:5]}
  ROOT %moved = f32[3,100]{1,0} custom(%gathered, %some, %more), metadata={op_name="jit(step)/add"}
}

%a_place_and_a_whole (table.2: f32[100,100], row: f32[1,100], zero: s32[]) -> (f32[100,100], f32[1,100]) {
  %table.2 = f32[100,100]{1,0} parameter(0)
  %row = f32[1,100]{1,0} parameter(1)
  %zero = s32[] parameter(2)
  %doubled = f32[1,100]{1,0} add(%row, %row)
  %placed = f32[100,100]{1,0} dynamic-update-slice(%table.2, %doubled, %zero, %zero)
  ROOT %both = (f32[100,100]{1,0}, f32[1,100]{1,0}) tuple(%placed, %doubled)
}

%scattered (table.3: f32[100,100], at.3: s32[3,1], new: f32[3,100]) -> f32[10000] {
  %table.3 = f32[100,100]{1,0} parameter(0)
  %at.3 = s32[3,1]{1,0} parameter(1)
  %new = f32[3,100]{1,0} parameter(2)
  %full = f32[100,100]{1,0} scatter(%table.3, %at.3, %new), update_window_dims={1}, to_apply=%sum
  ROOT %as_list = f32[10000]{0} bitcast(%full)
}

%scattered_into_new (at.4: s32[3,1], new.4: f32[3,100]) -> f32[100,100] {
  %at.4 = s32[3,1]{1,0} parameter(0)
  %new.4 = f32[3,100]{1,0} parameter(1)
  %none = f32[] constant(0)
  %zeros = f32[100,100]{1,0} broadcast(%none), dimensions={}
  ROOT %full.4 = f32[100,100]{1,0} scatter(%zeros, %at.4, %new.4), update_window_dims={1}, to_apply=%sum
}

%left (x.5: f32[10,50]) -> bf16[10,50] {
  %x.5 = f32[10,50]{1,0} parameter(0)
  ROOT %halved = bf16[10,50]{1,0} convert(%x.5)
}

%product (x.6: f32[10,50], w.6: bf16[50,20]) -> f32[10,20] {
  %x.6 = f32[10,50]{1,0} parameter(0)
  %w.6 = bf16[50,20]{1,0} parameter(1)
  %nested = bf16[10,50]{1,0} fusion(%x.6), kind=kCustom, calls=%left
  ROOT %dot = f32[10,20]{1,0} dot(%nested, %w.6), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%three_turns (state: (s32[], f32[10])) -> (s32[], f32[10]) {
  %state = (s32[], f32[10]{0}) parameter(0)
  %turn = s32[] get-tuple-element(%state), index=0
  %v = f32[10]{0} get-tuple-element(%state), index=1
  %grown = f32[10]{0} add(%v, %v), metadata={op_name="jit(step)/optimizer/while/body/add"}
  ROOT %next = (s32[], f32[10]{0}) tuple(%turn, %grown)
}

%fewer_than_three (state.1: (s32[], f32[10])) -> pred[] {
  %state.1 = (s32[], f32[10]{0}) parameter(0)
  %turn.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %going = pred[] compare(%turn.1, %turn.1), direction=LT
}

%unknown_turns (state.2: (s32[], f32[10])) -> (s32[], f32[10]) {
  %state.2 = (s32[], f32[10]{0}) parameter(0)
  %turn.2 = s32[] get-tuple-element(%state.2), index=0
  %v.2 = f32[10]{0} get-tuple-element(%state.2), index=1
  %grown.2 = f32[10]{0} negate(%v.2)
  ROOT %next.2 = (s32[], f32[10]{0}) tuple(%turn.2, %grown.2)
}

%until_small (state.3: (s32[], f32[10])) -> pred[] {
  %state.3 = (s32[], f32[10]{0}) parameter(0)
  %v.3 = f32[10]{0} get-tuple-element(%state.3), index=1
  ROOT %small = pred[] is-small(%v.3)
}

%command_buffer (x.7: f32[10,50]) -> f32[10,50] {
  %x.7 = f32[10,50]{1,0} parameter(0)
  ROOT %copied = f32[10,50]{1,0} copy(%x.7)
}

ENTRY %main (x: f32[10,50], table: f32[100,100], at: s32[3], w: bf16[50,20]) -> f32[10,20] {
  %x = f32[10,50]{1,0} parameter(0)
  %table = f32[100,100]{1,0} parameter(1)
  %at = s32[3]{0} parameter(2)
  %w = bf16[50,20]{1,0} parameter(3)
  %begin = (s32[], f32[10]{0}) tuple(%at, %at)
  %rows = f32[3,100]{1,0} fusion(%table, %at, %x), kind=kLoop, calls=%rows_of_a_table, metadata={op_name="jit(step)/add"}
  %one = f32[1,100]{1,0} pallas(%rows), metadata={op_name="jit(step)/transpose(jvp(vmap(attention)))/select/pallas_call"}
  %zero.1 = s32[] constant(0)
  %both.1 = (f32[100,100]{1,0}, f32[1,100]{1,0}) fusion(%table, %one, %zero.1), kind=kLoop, calls=%a_place_and_a_whole
  %at.9 = s32[3,1]{1,0} bitcast(%at)
  %list = f32[10000]{0} fusion(%table, %at.9, %rows), kind=kInput, calls=%scattered
  %new.9 = f32[100,100]{1,0} fusion(%at.9, %rows), kind=kInput, calls=%scattered_into_new
  %library = (f32[10,20]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %own = f32[10,20]{1,0} fusion(%x, %w), kind=kCustom, calls=%product, metadata={op_name="jit(step)/transformer/dot_general"}
  %known = (s32[], f32[10]{0}) while(%begin), condition=%fewer_than_three, body=%three_turns, backend_config={"known_trip_count":{"n":"3"}}
  %unknown = (s32[], f32[10]{0}) while(%known), condition=%until_small, body=%unknown_turns
  %picked = u8[3]{0} gather(%table, %at), slice_sizes={1,1}
  %called = f32[10,50]{1,0} call(%x), to_apply=%command_buffer
  %sent = ((f32[10,20]{1,0}), f32[10,20]{1,0}) all-reduce-start(%own), to_apply=%sum
  ROOT %received = f32[10,20]{1,0} all-reduce-done(%sent)
}
"""  # noqa: E501

TURNS = 8  # LOOP_TRIPS of scaling.py

#: Name: bytes read, bytes written, operations, times; all by hand.
EXPECTED = {
    "rows": (3 * 400 + 3 * 4 + (15 + 10) * 4, 1200, 0, 1),
    "one": (1200, 400, 0, 1),
    "both.1": (400 + 4, 400 + 400, 0, 1),
    "list": (12 + 1200, 1200, 0, 1),
    "new.9": (12 + 1200, 40_000, 0, 1),
    "library": (2000 + 2000, 800, 2 * 10 * 20 * 50, 1),
    "own": (2000 + 2000, 800, 2 * 10 * 20 * 50, 1),
    "grown": (40, 40, 0, 3),
    "small": (40, 1, 0, TURNS + 1),
    "grown.2": (40, 40, 0, TURNS),
    "picked": (3 + 12, 3, 0, 1),
    "copied": (2000, 2000, 0, 1),
    "sent": (800, 800, 0, 1),
}


@pytest.fixture
def gpu_program(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return import_module("gpu_program")


def test_what_each_kernel_moves_computes_and_how_often_it_runs(gpu_program):
    counted = gpu_program.count(HLO)
    found = {one.name: (one.n_read, one.n_written, one.operations, one.times) for one in counted.kernels}
    assert found == EXPECTED
    assert counted.n_waiting_loops == 1


def test_sums_are_over_all_runs_of_all_kernels(gpu_program):
    counted = gpu_program.count(HLO)
    assert counted.n_kernels == 10 + 3 + TURNS + 1 + TURNS
    assert counted.n_bytes == sum(times * (read + written) for read, written, _, times in EXPECTED.values())
    assert counted.total("operations") == 2 * 20_000


def test_a_kernel_belongs_to_the_last_stage_that_it_or_what_is_in_it_names(gpu_program):
    stages = {one.name: one.stage for one in gpu_program.count(HLO).kernels}
    known = {"rows": "augment", "one": "select", "own": "transformer", "grown": "optimizer"}
    assert stages == {name: known.get(name, "other") for name in EXPECTED}


@pytest.mark.parametrize(
    ("source", "stage"),
    [
        ("jit(step)/transpose(jvp(vmap(attention)))/mul", "attention"),
        ("jit(step)/transformer/attention/transformer/mul", "transformer"),
        ("jit(step)/select_n", ""),
        ("", ""),
    ],
)
def test_stages_in_paths(gpu_program, source, stage):
    assert gpu_program.stage_of(source) == stage


def test_the_tables(gpu_program, capsys):
    counted = gpu_program.count(HLO)
    gpu_program.print_count(("linear step", "tf32", "1"), counted, 5_000_000)
    gpu_program.print_kernels(counted, 2)
    gpu_program.print_stages(counted)
    row, first, second, *stages = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert row == ["linear", "step", "tf32", "1", "30", "0.00", "0.00", "0.00", "0.000", "0.00", "1", "5"]
    assert [first[-1], first[-2]] == ["new.9", "kInput"]
    assert second[-1] == "library"  # of two that move as much, the first
    assert [line[:2] for line in stages] == [
        ["augment", "1"], ["select", "1"], ["transformer", "1"], ["optimizer", "3"], ["other", "24"],
    ]  # fmt: skip


@pytest.mark.skipif(
    any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)), reason="the plugin is there"
)
def test_without_the_plugin_it_says_what_to_install():
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    command = [sys.executable, str(FOLDER / "gpu_program.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "no plugin for CUDA" in line
    assert "pip install 'hce_jax[cuda]'" in line
