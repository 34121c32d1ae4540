"""What XLA makes of our programs for an H200, counted without one: kernels, bytes, operations, waits of the host.

    python benchmarks/gpu_program.py                          steps, decoding, predictions; pip install 'hce_jax[cuda]'
    python benchmarks/gpu_program.py --models tabnet --kernels 20 --stages
    python benchmarks/gpu_program.py --models linear --genes 200 --types 9 --batch_size 64   small, to see that it runs

Nothing runs, and no GPU is needed. The training step of each model, the decoding of a packed batch and the prediction
of a batch are compiled for an H200, and the kernels are read out of the compiled programs. The bytes of a kernel are
its operands and its results, each once: of an operand of which only slices are read, and of a result that is a place
of an operand, the slices. That is an upper bound where a kernel skips more than that, and where the cache of 50 MB
keeps what another has just written; it is too little where a gather or a scatter touches single numbers, of which
each costs 32 bytes. Operations are those of the matrix products. The two times, of the bytes and of the operations
alone at assumed rates, are no forecast: a step also has the start of each kernel, a few microseconds for the small.
A loop whose end depends on the data is taken to run a number of turns (see LOOP_TRIPS of scaling.py), and before each
the host waits for the device.
"""

import argparse
import contextlib
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import hlo
from scaling import LOOP_TRIPS, N_VECTORS, lower_step, packed_batch
from stand_ins import stand_in
from step import HYPER_PARAMETERS, MODELS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # hce_jax need not be installed

#: Assumed bytes/s of a kernel that streams: nine tenths of an H200's 4.8 TB/s.
MEMORY_RATE = 4.3e12
#: Assumed operations/s of the matrix products: eight tenths of the dense peaks of its data sheet.
MATRIX_RATES = {"float32": 54e12, "tf32": 400e12, "bf16": 800e12}
#: Names that the programs give to their parts (jax.named_scope).
STAGES = (
    "decode", "augment", "input_norm", "splitter", "attention", "select", "transformer", "loss", "metrics", "optimizer",
)  # fmt: skip
#: Instructions for which the device does nothing.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "opt-barrier",
    "partition-id", "replica-id", "async-update", "async-done",
}  # fmt: skip
_CALLS = {"call", "conditional", "async-start"}
_SLICES = {"slice", "dynamic-slice", "gather"}
_IN_PLACE = {"dynamic-update-slice", "scatter"}
#: The chip that is compiled for, in the words of XLA's GpuTargetConfigProto.
_H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 device_memory_size: 150754820096
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 13 minor: 0 patch: 0 }
"""


class Kernel(NamedTuple):
    """A kernel: name, kind, op_name, stage, bytes read and written, matrix operations, how often a program runs it."""

    name: str
    kind: str
    source: str
    stage: str
    n_read: int
    n_written: int
    operations: int
    times: int

    @property
    def n_bytes(self) -> int:
        """Bytes that it moves in one run of the program."""
        return self.times * (self.n_read + self.n_written)


class Count(NamedTuple):
    """The kernels of a program, and how many of its loops end when the data say so."""

    kernels: list[Kernel]
    n_waiting_loops: int

    def total(self, field: str) -> int:
        """Return the sum of a field over all runs of all kernels."""
        return sum(one.times * getattr(one, field) for one in self.kernels)

    @property
    def n_kernels(self) -> int:
        """Kernels that one run of the program starts."""
        return sum(one.times for one in self.kernels)

    @property
    def n_bytes(self) -> int:
        """Bytes that they read and write."""
        return self.total("n_read") + self.total("n_written")


def count(text: str) -> Count:
    """Read the kernels out of the text of a compiled program."""
    program, kernels, loops = hlo.computations(text), list[Kernel](), list[str]()

    def run(name: str, times: int) -> None:
        for one in program[name].values():
            if one.op == "while":
                turns = one.attribute(r'"known_trip_count":\{"n":"(\d+)"')
                if turns is None:
                    loops.append(one.name)
                    run(one.attribute(r"condition=%([\w.\-]+)") or "", times * (LOOP_TRIPS + 1))
                run(one.attribute(r"body=%([\w.\-]+)") or "", times * int(turns or LOOP_TRIPS))
            elif one.op in _CALLS:  # of a conditional every branch, as an upper bound
                for called in one.called:
                    run(called, times)
            elif one.op not in _FREE and not one.op.endswith("-done"):
                kernels.append(_kernel(program, program[name], one, times))

    run(program.entry, 1)
    return Count(kernels, len(loops))


def _kernel(program: hlo.Computations, body: hlo.Computation, one: hlo.Instruction, times: int) -> Kernel:
    kind = one.attribute(r"kind=(\w+)") or one.attribute(r'custom_call_target="([^"]*)"') or one.op
    sources = [one.source, *(inner.source for name in one.called for inner in reversed(program[name].values()))]
    stage = next((stage for stage in map(stage_of, sources) if stage), "other")
    places = {name: one.operands.index(name) for name in one.operands}
    n_read = sum(_n_read(program, body, one, at) for at in places.values())
    operations = _operations(program, body, one)
    return Kernel(one.name, kind, one.source, stage, n_read, _n_written(program, body, one), operations, times)


def stage_of(source: str) -> str:
    """Return the last of the known stages in the path of an op_name, or nothing.

    Examples
    --------
    >>> stage_of("jit(train_step)/transpose(jvp(vmap(transformer)))/attention/dot_general")
    'attention'
    """
    return next((part for part in reversed(re.findall(r"\w+", source)) if part in STAGES), "")


def _n_read(program: hlo.Computations, body: hlo.Computation, one: hlo.Instruction, at: int) -> int:
    """Return the bytes that an instruction reads of one of its operands."""
    whole = hlo.n_bytes(body[one.operands[at]].shape)
    if one.op == "fusion":
        inside = program[one.called[0]]
        parameter = next(inner for inner in inside.values() if (inner.op, inner.arguments) == ("parameter", str(at)))
        return min(whole, _n_read_of(program, inside, parameter))
    if one.op == "bitcast" and not one.is_root:
        return min(whole, _n_read_of(program, body, one))
    if one.op in _SLICES and at == 0:
        return hlo.n_bytes(one.shape)
    return 0 if at == 0 and _in_place(body, one) else whole


def _n_read_of(program: hlo.Computations, body: hlo.Computation, one: hlo.Instruction) -> int:
    """Return the bytes that the others of a computation read of an instruction's result."""
    users = [(user, at) for user in body.values() for at, name in enumerate(user.operands) if name == one.name]
    return sum(_n_read(program, body, user, at) for user, at in users)


def _n_written(program: hlo.Computations, body: hlo.Computation, one: hlo.Instruction) -> int:
    """Return the bytes that an instruction writes."""
    if one.op == "fusion":
        inside = program[one.called[0]]
        return sum(_n_written(program, inside, result) for result in _results(inside))
    if _in_place(body, one):  # operands, places, updates; of each as many
        return sum(hlo.n_bytes(body[name].shape) for name in _updates(one))
    if one.op == "custom-call":  # of a library its room to work in is a result as well
        return sum(hlo.n_bytes(part) for part in re.findall(r"\w+\[[\d,]*\]", one.shape) if not part.startswith("s8"))
    given = 0
    if one.op.endswith("-start") and one.shape.startswith("("):  # it passes its operands on
        given = sum(hlo.n_bytes(body[name].shape) for name in one.operands)
    return hlo.n_bytes(one.shape) - given


def _in_place(body: hlo.Computation, one: hlo.Instruction) -> bool:
    """Return whether it changes places of an operand that is given, and these are all that is written."""
    if one.op not in _IN_PLACE or one not in _results(body):
        return False
    return _behind_bitcasts(body, body[one.operands[0]]).op == "parameter"


def _results(body: hlo.Computation) -> list[hlo.Instruction]:
    root = next(one for one in body.values() if one.is_root)
    parts = [body[name] for name in root.operands] if root.op == "tuple" else [root]
    return [_behind_bitcasts(body, part) for part in parts]


def _behind_bitcasts(body: hlo.Computation, one: hlo.Instruction) -> hlo.Instruction:
    while one.op == "bitcast":
        one = body[one.operands[0]]
    return one


def _updates(one: hlo.Instruction) -> list[str]:
    if one.op == "dynamic-update-slice":
        return one.operands[1:2]
    n = len(one.operands) // 2  # a scatter has n operands, the places, n updates
    return one.operands[n + 1 :]


def _operations(program: hlo.Computations, body: hlo.Computation, one: hlo.Instruction) -> int:
    """Return the multiplications and additions of the matrix products in an instruction."""
    if one.op == "fusion":
        inside = program[one.called[0]]
        return sum(_operations(program, inside, inner) for inner in inside.values())
    axes = one.attribute(r'lhs_contracting_dim(?:s=\{|ensions":\[)([^}\]]*)')  # a dot's, a library call's
    if axes is None:
        return 0
    left = _lengths(body[one.operands[0]].shape)
    return 2 * math.prod(_lengths(one.shape)) * math.prod(left[axis] for axis in hlo.sizes(axes))


def _lengths(shape: str) -> list[int]:
    """Return the sizes of the first array of a shape."""
    found = re.search(r"\[([\d,]*)\]", shape)
    return hlo.sizes(found[1]) if found else []


@contextlib.contextmanager
def h200s(n_devices: int) -> Iterator[Any]:
    """Give a mesh of H200s that are not there, for which programs can be traced and compiled inside.

    It is the one place that reaches into JAX's private parts. JAX calls such devices "gpu", and asks the backends that
    run which vendor's they are, but none runs: here the answer is always "cuda". Seen to be needed, and to be enough,
    with jax 0.10.2 and its plugin for CUDA 12, and with jax 0.12.0.1 and its plugin for CUDA 13.

    Raises
    ------
    NotImplementedError
        If JAX has no plugin for CUDA.
    """
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    import jax
    import numpy as np
    from jax._src import xla_bridge
    from jax.experimental.topologies import get_topology_desc

    devices = get_topology_desc(platform="cuda", target_config=_H200, topology=f"1x1x{n_devices}").devices
    from hce_jax.training.mesh import AXIS  # seconds, spared where there is no plugin

    mesh = jax.sharding.Mesh(np.array(devices), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    canonical = xla_bridge.canonicalize_platform
    with (
        mock.patch.object(
            xla_bridge, "canonicalize_platform", lambda name: "cuda" if name == "gpu" else canonical(name)
        ),
        mock.patch.object(jax, "default_backend", return_value="gpu"),  # what the package asks
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),  # what Pallas asks, which compiles for one chip
    ):
        yield mesh


def programs(args: argparse.Namespace) -> Iterator[tuple[tuple[str, str, str], Any]]:
    """Yield what identifies each program (what it does, precision, members), and the program, compiled."""
    with h200s(args.devices) as mesh:
        for model_type in args.models:
            for precision in args.precisions:
                for n_members in args.members:
                    lowered, *_ = lower_step(args, model_type, mesh, precision, n_members, args.vectors)
                    yield (f"{model_type} step", precision, str(n_members)), lowered.compile()
    with h200s(1) as mesh:  # each device does these for itself
        yield ("decoding", "", ""), lower_decoding(args, mesh).compile()
        for model_type in args.models:
            for precision in args.precisions:
                yield (
                    (f"{model_type} prediction", precision, ""),
                    lower_prediction(args, model_type, mesh, precision).compile(),
                )


def lower_decoding(args: argparse.Namespace, mesh: Any) -> Any:
    """Trace what makes a packed batch dense, rows as wide as an accelerator has them."""
    import jax

    from hce_jax.input import densify, row_width
    from hce_jax.training.mesh import replicated

    packed = _abstract(packed_batch(args), replicated(mesh))
    return jax.jit(densify, static_argnums=1).lower(packed, row_width(args.genes))


def lower_prediction(args: argparse.Namespace, model_type: str, mesh: Any, precision: str) -> Any:
    """Trace the probabilities of a batch."""
    import jax
    import numpy as np
    from flax import nnx

    from hce_jax.input import row_width
    from hce_jax.models import build_model
    from hce_jax.predictor import Predictor, _probabilities
    from hce_jax.training.mesh import replicated
    from hce_jax.typing import PRECISIONS

    config = {"model_type": model_type, **HYPER_PARAMETERS}

    def init() -> Any:
        model = build_model(config, args.genes, args.types, nnx.Rngs(0), precision=PRECISIONS[precision])
        return nnx.split(model, nnx.Param, ...)

    graphdef, params, stats = jax.eval_shape(init)
    card: Any = None  # it is not asked
    predictor = Predictor(Path(), card, np.eye(args.types), graphdef, params, stats)
    x = jax.ShapeDtypeStruct((args.batch_size, row_width(args.genes)), np.float32)
    return predictor._apply.lower(_probabilities, *_abstract((params, stats, x), replicated(mesh)))


def _abstract(tree: Any, sharding: Any) -> Any:
    """Return the shapes of the arrays of a tree, lying as told."""
    import jax

    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def print_head(args: argparse.Namespace) -> None:
    """Print what was compiled, and the head of the table."""
    print(f"{args.batch_size} cells a device, {args.genes:,} genes, {args.types} types, {args.devices} H200")
    print(f"{'program':20}{'prec.':9}{'members':>7}{'kernels':>9}{'GB read':>9}{'written':>9}{'ms':>8}{'TFLOP':>9}"
          f"{'ms':>8}{'waits':>7}{'temp. MB':>9}")  # fmt: skip


def print_count(names: tuple[str, str, str], counted: Count, n_temporary: int) -> None:
    """Print the row of a program."""
    operations = counted.total("operations")
    matrix_ms = f"{1e3 * operations / MATRIX_RATES[names[1]]:.2f}" if operations else "-"
    print(f"{names[0]:20}{names[1]:9}{names[2]:>7}{counted.n_kernels:9,}{counted.total('n_read') / 1e9:9.2f}"
          f"{counted.total('n_written') / 1e9:9.2f}{1e3 * counted.n_bytes / MEMORY_RATE:8.2f}{operations / 1e12:9.3f}"
          f"{matrix_ms:>8}{counted.n_waiting_loops:7}{n_temporary / 1e6:9,.0f}", flush=True)  # fmt: skip


def print_kernels(counted: Count, n: int) -> None:
    """Print the n kernels that move most."""
    for one in sorted(counted.kernels, key=lambda one: -one.n_bytes)[:n]:
        print(f"    {one.n_read / 1e6:8.1f} MB read{one.n_written / 1e6:8.1f} written{one.times:4} x  {one.stage:12}"
              f"{one.kind:12} {one.name:32} {one.source}")  # fmt: skip


def print_stages(counted: Count) -> None:
    """Print kernels, bytes and operations by stage."""
    by_stage = defaultdict[str, list[Kernel]](list)
    for one in counted.kernels:
        by_stage[one.stage].append(one)
    for stage in sorted(by_stage, key=(*STAGES, "other").index):
        part = Count(by_stage[stage], 0)
        print(f"    {stage:14}{part.n_kernels:6,} kernels{part.n_bytes / 1e9:8.2f} GB"
              f"{1e3 * part.n_bytes / MEMORY_RATE:8.2f} ms{part.total('operations') / 1e12:9.3f} TFLOP")  # fmt: skip


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--precisions", nargs="+", choices=MATRIX_RATES, default=("tf32", "bf16"))
    parser.add_argument("--members", type=int, nargs="+", default=(1,), help="trained together, in the step")
    parser.add_argument("--batch_size", type=int, default=2048, help="cells a device")
    parser.add_argument("--genes", type=int, default=19_331)
    parser.add_argument("--types", type=int, default=164)
    parser.add_argument("--vectors", type=int, default=N_VECTORS, help="for augmentation")
    parser.add_argument("--devices", type=int, default=1, help="of the step, on one machine")
    parser.add_argument("--kernels", type=int, default=0, metavar="N", help="print the N kernels that move most")
    parser.add_argument("--stages", action="store_true", help="print the sums of each stage")
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    args = parse_args()
    stand_in()
    try:
        for number, (names, compiled) in enumerate(programs(args)):
            if number == 0:
                print_head(args)
            counted = count(compiled.as_text())
            print_count(names, counted, compiled.memory_analysis().temp_size_in_bytes)
            print_kernels(counted, args.kernels)
            if args.stages:
                print_stages(counted)
    except NotImplementedError:  # of the first
        message = "JAX has no plugin for CUDA here, and without it compiles for no GPU: pip install 'hce_jax[cuda]'"
        print(message, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
