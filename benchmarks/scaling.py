"""Weak scaling on paper: what the devices send each other in a training step, and what time that would cost them.

    python benchmarks/scaling.py                         the tables of docs/scaling.md; two minutes, 1 GB
    python benchmarks/scaling.py --models linear --genes 200 --types 9 --batch_size 64      small, to see that it runs

Nothing is trained. The training step of the package is compiled for two make-believe devices (of the CPU, but the way
accelerators compute TabNet), and its collectives are read out of the compiled program. By the bytes that the parameters
and the batch statistics amount to one can see whether something crosses that should not. Together with operations and
bytes of memory by XLA's own account, and the peak rates of two systems, this gives an estimate of the step's time for
8 and 64 devices: compute and communication one after the other. The last table is the memory of the step on a CPU.
"""

import argparse
import os
from typing import Any, NamedTuple
from unittest import mock

import hlo
import numpy as np
from step import HYPER_PARAMETERS, MODELS, OPTIMIZER

N_DEVICES = (8, 64)
#: Assumed: share of the peak of the matrix units and of the memory that a step reaches.
MATRIX_SHARE, MEMORY_SHARE = 0.4, 0.7
#: Assumed: seconds that each collective costs on each level whatever its size.
LATENCY = 20e-6
#: Checks whether Newton's iteration of entmax is done, in each of its two loops; more than any of our trials needed.
LOOP_TRIPS = 8
#: Cells a second of one core, loading from disk (docs/input.md: 190,000 with two).
CELLS_PER_CORE = 95_000
#: Share of the genes that a cell expresses, mean and most: 2,190 of 19,331 on average in the published atlas.
EXPRESSED = (0.1133, 0.3621)
#: Assumed: augmentation vectors of a store (their memory only).
N_VECTORS = 1000
_COLLECTIVES = (
    "all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute", "collective-broadcast",
    "ragged-all-to-all",
)  # fmt: skip


class System(NamedTuple):
    """Peak rates of a device (operations/s, bytes/s), and how devices are joined: (how many, bytes/s) of each level."""

    matrix: float
    memory: float
    levels: tuple[tuple[int, float], ...]


#: Data sheets: H200 SXM (dense TF32, HBM3e, NVLink 4 one way), 400 Gb/s InfiniBand; TPU v5e (TF32 is three passes of
#: bf16 there; HBM2; 400 Gb/s each way on each of its four links, of which a ring along one axis of the torus uses two).
SYSTEMS = {
    "H200, port a GPU": System(495e12, 4.8e12, ((8, 450e9), (8, 50e9))),
    "H200, port a node": System(495e12, 4.8e12, ((8, 450e9), (8, 50e9 / 8))),
    "TPU v5e": System(197e12 / 3, 0.819e12, ((8, 100e9), (8, 100e9))),
}


class Collective(NamedTuple):
    """An operation of all devices together: kind, bytes of its result, place in the source, whether in a loop."""

    kind: str
    n_bytes: int
    source: str
    in_loop: bool


class Program:
    """A compiled program: collectives, operations, bytes moved to and from memory, and the memory of its arrays."""

    def __init__(self, compiled: Any):
        cost, sizes = compiled.cost_analysis(), compiled.memory_analysis()
        self.collectives = collectives(compiled.as_text())
        self.flops, self.n_bytes = cost["flops"], cost["bytes accessed"]
        self.arguments, self.results = sizes.argument_size_in_bytes, sizes.output_size_in_bytes
        # Results that lie where arguments lay.
        self.in_place, self.temporary = sizes.alias_size_in_bytes, sizes.temp_size_in_bytes
        self.memory = self.arguments + self.results - self.in_place + self.temporary

    def sent(self) -> tuple[int, int]:
        """Return bytes and number of the collectives of one run."""
        rounds = [(LOOP_TRIPS if one.in_loop else 1, one) for one in self.collectives]
        return sum(n * one.n_bytes for n, one in rounds), sum(n for n, _ in rounds)


#: A training step, the number of its model's parameters, and the bytes that have to be all-reduced.
Step = tuple[Program, int, int]


def collectives(text: str) -> list[Collective]:
    """Read the collectives out of the text of a compiled program; of an asynchronous one its start is counted."""
    program = hlo.computations(text)
    in_loops = _in_loops(program)
    return [
        Collective(kind, hlo.n_bytes(one.shape), one.source, name in in_loops)
        for name, body in program.items()
        for one in body.values()
        if (kind := one.op.removesuffix("-start")) in _COLLECTIVES
    ]


def _in_loops(program: hlo.Computations) -> set[str]:
    """Return the computations that loops run, and those that these call."""
    called = {name: {other for one in body.values() for other in one.called} for name, body in program.items()}
    loops = [one for body in program.values() for one in body.values() if one.op == "while"]
    new = {other for one in loops for other in one.called}
    reached: set[str] = set()
    while new:
        reached |= new
        new = set().union(*(called.get(name, set()) for name in new)) - reached
    return reached


def lower_step(
    args: argparse.Namespace,
    model_type: str,
    mesh: Any,
    precision: str,
    n_members: int = 1,
    n_vectors: int = N_VECTORS,
) -> tuple[Any, int, int]:
    """Trace the package's own training step, ``args.batch_size`` cells a device; return it with the numbers of Step."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from hce_jax.input import DenseBatch, row_width
    from hce_jax.models import build_model
    from hce_jax.training.mesh import batch_sharding, check_ghost_batches, replicated
    from hce_jax.training.optim import published_optimizer, step_schedule
    from hce_jax.training.steps import Objective, init_state, make_train_step
    from hce_jax.typing import PRECISIONS

    config = {"model_type": model_type, **HYPER_PARAMETERS}
    optimizer = published_optimizer(step_schedule(OPTIMIZER[model_type][0], 0.9, 1, 1000), 0.05, 1.0)

    def init() -> Any:
        models = [build_model(config, args.genes, args.types, nnx.Rngs(0), precision=PRECISIONS[precision])]
        return init_state(models * n_members, optimizer)

    def shape(sharding: Any, dtype: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    graphdef, state = jax.eval_shape(init)
    n_cells, width, whole = mesh.size * args.batch_size, row_width(args.genes), replicated(mesh)
    if model_type == "tabnet":
        check_ghost_batches(n_cells, HYPER_PARAMETERS["virtual_batch_size"], mesh.size)
    objective = Objective(jnp.eye(args.types), jnp.ones(args.types), True, 1e-6)
    keys = jax.random.split(jax.random.key(0), n_members)
    train_step: Any = make_train_step(graphdef, [objective] * n_members, optimizer, keys, None, whole)
    state = jax.tree.map(lambda leaf: shape(whole, leaf.dtype, *leaf.shape), state)
    split = batch_sharding(mesh, n_cells)
    x, targets = shape(split, jnp.float32, n_cells, width), shape(split, jnp.int32, n_cells)
    batch = DenseBatch(x, targets, shape(split, bool, n_cells))
    # The recipes of the MLP and of TabNet augment. How many vectors there are changes their own memory only.
    vectors = None if model_type == "linear" else shape(whole, jnp.float32, n_vectors, width)
    n_parameters, n_running = (
        sum(leaf.size for leaf in jax.tree.leaves(tree) if leaf.dtype == jnp.float32)
        for tree in (state.params, state.stats)
    )
    # Each gradient and each batch statistic once; counts of F1, of which the labels' are common; two sums of the loss.
    needed = n_parameters + n_running + (2 * n_members + 1) * args.types + 2 * n_members
    return train_step.func.lower(state, batch, augmentations=vectors), n_parameters, 4 * needed


def compile_step(
    args: argparse.Namespace, model_type: str, *, n_devices: int, n_members: int = 1, like_accelerator: bool = True
) -> Step:
    """Compile the training step for devices of the CPU, without running it."""
    import jax
    from jax.sharding import Mesh

    from hce_jax.training.mesh import data_mesh

    mesh, precision = data_mesh(), "tf32" if like_accelerator else "float32"
    mesh = Mesh(mesh.devices[:n_devices], mesh.axis_names, axis_types=mesh.axis_types)
    # Only a lone CPU takes the ghost batches one after the other.
    with mock.patch.object(jax, "device_count", return_value=2 if like_accelerator else n_devices):
        lowered, n_parameters, needed = lower_step(args, model_type, mesh, precision, n_members)
    return Program(lowered.compile()), n_parameters, needed


def packed_batch(args: argparse.Namespace) -> Any:
    """Return a packed batch of one part, with the room that one of the published atlas has; its cells are empty."""
    from hce_jax.input import CellBatch
    from hce_jax.input.batch import PackedStream, capacities
    from hce_jax.store import Entries

    n_cells, counts = args.batch_size, Entries(EXPRESSED[0] * args.genes, int(EXPRESSED[1] * args.genes))
    n_entries = capacities(counts, Entries(0.0, 0), n_cells)[0].counts
    gaps, rows, nothing = np.zeros((1, n_entries), np.uint8), np.zeros((1, n_cells), np.int32), np.zeros((1, 0))
    return CellBatch(
        counts=PackedStream(gaps, gaps, rows),
        values=PackedStream(nothing.astype(np.uint8), nothing.astype(np.float32), rows),
        scale=rows[0].astype(np.float32),
        targets=rows[0],
        real=rows[0] == 0,
        n_genes=args.genes,
    )


def compile_decoding(args: argparse.Namespace) -> Program:
    """Compile what makes a packed batch dense, before the step, for one device."""
    import jax

    from hce_jax.input import densify

    return Program(jax.jit(densify).lower(packed_batch(args)).compile())


def compute_seconds(program: Program, system: System) -> float:
    """Return the longer of the times for its operations and for its memory, at the assumed shares of the peaks."""
    return max(program.flops / (MATRIX_SHARE * system.matrix), program.n_bytes / (MEMORY_SHARE * system.memory))


def all_reduce_seconds(n_bytes: float, n_collectives: int, n_devices: int, system: System) -> float:
    """Return the time of rings, level by level: 2 (n-1)/n bytes / bandwidth + latency, with 1/n of the bytes above."""
    seconds = 0.0
    for most, bandwidth in system.levels:
        n = min(most, n_devices)
        if n > 1:
            seconds += 2 * (n - 1) / n * n_bytes / bandwidth + n_collectives * LATENCY
        n_bytes, n_devices = n_bytes / n, n_devices // n
    return seconds


def print_communication(steps: dict[str, Step]) -> None:
    """Print the table of what crosses between the devices, and whatever is no all-reduce."""
    print(f"{'model':8}{'parameters':>12}{'bytes reduced':>15}{'needed':>13}{'all-reduces':>13}{'in loops':>10}"
          f"{'others':>8}{'GB a device':>13}")  # fmt: skip
    for name, (program, n_parameters, needed) in steps.items():
        others = [one for one in program.collectives if one.kind != "all-reduce"]
        reduces = [one for one in program.collectives if one.kind == "all-reduce"]
        in_loops = sum(one.in_loop for one in reduces)
        print(f"{name:8}{n_parameters:12,}{sum(one.n_bytes for one in reduces):15,}{needed:13,}"
              f"{len(reduces) - in_loops:13}{in_loops:10}{len(others):8}{program.memory / 1e9:13.2f}")  # fmt: skip
        for one in others:
            print(f"    {one.kind} of {one.n_bytes:,} bytes{' in a loop' if one.in_loop else ''}: {one.source}")


def print_times(steps: dict[str, Step], decoding: Program, batch_size: int) -> None:
    """Print the table of estimated times."""
    columns = "".join(f"{f'{n} dev. ms':>12}{'efficiency':>12}" for n in N_DEVICES)
    print(f"\n{'model':8}{'system':19}{'1 dev. ms':>10}{columns}{'cells/s of 8':>14}{'cores for it':>14}")
    for name, (program, *_) in steps.items():
        for system_name, system in SYSTEMS.items():
            alone = compute_seconds(program, system) + compute_seconds(decoding, system)
            times = [alone + all_reduce_seconds(*program.sent(), n, system) for n in N_DEVICES]
            columns = "".join(f"{1e3 * time:12.2f}{alone / time:12.2f}" for time in times)
            wanted = N_DEVICES[0] * batch_size / times[0]
            print(f"{name:8}{system_name:19}{1e3 * alone:10.2f}{columns}{wanted:14,.0f}{wanted / CELLS_PER_CORE:14.0f}")


def print_memory(args: argparse.Namespace, decoding: Program) -> None:
    """Print the table of memory on one device of a CPU."""
    columns = ("arguments", "results", "in place", "temporary", "together")
    print(f"\n{'CPU, MB':10}{'members':>8}{''.join(f'{column:>12}' for column in columns)}")

    def print_row(name: str, members: str, program: Program) -> None:
        parts = program.arguments, program.results, program.in_place, program.temporary, program.memory
        print(f"{name:10}{members:>8}" + "".join(f"{part / 1e6:12,.0f}" for part in parts), flush=True)

    print_row("decoding", "", decoding)
    for name in args.models:
        for n_members in args.members:
            step = compile_step(args, name, n_devices=1, n_members=n_members, like_accelerator=False)
            print_row(name, str(n_members), step[0])


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--batch_size", type=int, default=2048, help="cells a device")
    parser.add_argument("--genes", type=int, default=19_331)
    parser.add_argument("--types", type=int, default=164)
    parser.add_argument("--members", type=int, nargs="*", default=(1, 4), help="for the table of memory")
    return parser.parse_args()


def main() -> None:
    """Print the tables."""
    args = parse_args()
    os.environ |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    print(f"{args.batch_size} cells a device, {args.genes:,} genes, {args.types} types")
    steps = {name: compile_step(args, name, n_devices=2) for name in args.models}
    decoding = compile_decoding(args)
    print_communication(steps)
    print_times(steps, decoding, args.batch_size)
    print_memory(args, decoding)


if __name__ == "__main__":
    main()
