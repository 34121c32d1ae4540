"""What one GPU does with this package, beside what it could do and beside PyTorch: one command, one table.

    python benchmarks/gpu.py                                   19,331 genes, 164 types, under 8 minutes on one H200
    python benchmarks/gpu.py --models tabnet --json rows.json
    python benchmarks/gpu.py --genes 200 --types 9 --batch_sizes 64 --cells 2048 --vectors 50       small, on a CPU

It needs jax, flax and optax, and PyTorch for the peers; what else hce_jax imports may be absent (stand_ins.py), and
hce_jax itself need not be installed. Sections come in the order of what they tell, and each row is printed as soon as
it is known; what would not fit in the time is left out and named. The exit code is 1 if a row of ours failed, or if
what a fast path gives is wrong.

- Before anything is timed, fast paths are checked against plain ones on inputs drawn anew (gpu_check.py).
- A step of ours begins with packed cells in host memory: transfer, decoding, augmentation (MLP and TabNet, as
  published), forward, backward, clipping, AdamW; dispatched as training does it, with the metrics of a step read when
  the next one is under way, over several batches in turn. Inference begins there too and ends with probabilities in
  host memory.
- A step of PyTorch begins with dense float32 cells that lie on the device already, and has no augmentation, which
  favours it. It runs in a process of its own (peers.py), in turns with ours, a stretch of steps each: eager, and in a
  section of its own with torch.compile.
- Times are medians over stretches, the first steps not counted; the spread is (longest - shortest) / median.
- The floor of a row is the longest of: bytes that must move in the device's memory, over the measured bandwidth;
  operations of the matrix products, over the measured rate in that precision; bytes from the host, over the measured
  rate of the link (:func:`benchmarks.gpu_floor.needs`).
- Cells are simulated, with about 2,190 of 19,331 genes expressed, mostly by 1 to 3 counts.
"""

# ruff: noqa: E402 (the stand-ins come before the imports that need them)
import argparse
import functools
import importlib.util
import itertools
import json
import math
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs room, too
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.stand_ins import stand_in

ABSENT = stand_in()

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_check
from benchmarks.gpu_floor import Card, Needs, needs
from benchmarks.gpu_report import EPOCH_CELLS, SECTIONS, Report, columns, header, summary, targets
from benchmarks.gpu_steps import Data, Training, in_turn, on_device, seconds_of, stage_seconds, take_turns
from benchmarks.kernel_trace import read_kernels
from benchmarks.peer_process import PeerError, PeerProcess
from benchmarks.simulated_cells import (
    OnDevice,
    Pieces,
    PlainBlock,
    entries_of,
    held_split,
    joined_ahead,
    repeated,
    simulate,
)
from benchmarks.step import MODELS
from hce_jax.input import CellBatch, Shuffle, StreamedSplit, dense_batch, row_width
from hce_jax.store import Block
from hce_jax.training.augment import widened_vectors
from hce_jax.training.mesh import batch_sharding, data_mesh, replicated
from hce_jax.typing import PRECISIONS

ON_CPU = jax.default_backend() == "cpu"
#: Different batches, taken in turn.
N_BATCHES = 8
#: Seconds after which an epoch is cut short.
EPOCH_SECONDS = 6
#: Seconds that a peer has to prepare its step.
PATIENCE = 90


class Bench:
    """What is measured, section by section.

    Parameters
    ----------
    options
        The command line.
    report
        Where the rows go.
    """

    def __init__(self, options: argparse.Namespace, report: Report):
        self.options, self.report = options, report
        self.mesh = data_mesh()
        self.data = Data(
            options.genes,
            options.types,
            batch_sharding(self.mesh, math.gcd(*options.batch_sizes)),
            jnp.asarray(random_tree(options.types)),
            jax.device_put(random_vectors(options.vectors, options.genes), replicated(self.mesh)),
        )
        kind = PlainBlock if "pyarrow" in ABSENT else Block
        self.blocks = simulate(min(options.cells, options.distinct_cells), options.genes, options.types, kind)
        mean, most = entries_of(self.blocks)
        report.say(f"simulated {sum(map(len, self.blocks)):,} cells: {mean:,.0f} entries a cell, at most {most:,}")
        self.packed = {batch: Pieces(self.blocks, batch).first(N_BATCHES) for batch in options.batch_sizes}
        self.card = Card(math.nan, math.nan, dict.fromkeys(options.precisions, math.nan))
        #: Where only one precision and batch size is measured.
        self.precision, self.batch = options.precisions[0], options.batch_sizes[0]
        self.peers = {
            name: PeerProcess(name, options.genes, options.types)
            for name in options.peers
            if importlib.util.find_spec("torch")
        }
        if options.peers and not self.peers:
            report.note("PyTorch is not installed: no peers")
        self.training = functools.cache(functools.partial(Training, self.data))

    def run(self) -> None:
        """Check the fast paths, then measure everything that there is time for."""
        smaller = (16, 1, 1) if ON_CPU else ()  # there the kernels are interpreted
        sizes = gpu_check.Sizes(self.options.genes, self.options.types, *smaller)
        gpu_check.run(self.report, sizes, self.options.seed)
        with self.report.part("card", "the card") as go:
            if go:
                self.card = measure_card(self.report, self.options.precisions, self.packed[self.batch][0], self.data)
        try:
            for section in ("training", "inference"):
                if section in self.options.sections:
                    self.report.say(header(section))
                for batch, precision, model in self.cases():
                    with self.report.part(section, f"{model} {precision} {batch}", f"{section} {model}") as go:
                        if go:
                            self.step_row(section, model, precision, batch)
            if "torch.compile" in self.peers:
                self.each_model("compiled", self.compiled_row, "torch.compile, ")
        finally:
            for peer in self.peers.values():
                peer.close()
        self.each_model("stages", self.stages_row)
        with self.report.part("stages", "the dearest kernels", vital=False) as go:
            if go:
                self.kernels(self.options.models[0])
        self.each_model("epoch", self.host_epoch_row, "from host memory, ")
        self.device_epochs()
        self.each_model("ensemble", self.ensemble_row, f"{self.options.members} members, ")

    def cases(self) -> Iterator[tuple[int, str, str]]:
        """Yield batch size, precision and model."""
        yield from itertools.product(self.options.batch_sizes, self.options.precisions, self.options.models)

    def each_model(self, section: str, row: Callable[[str], None], what: str = "") -> None:
        """Measure a row for each model, while there is time."""
        for model in self.options.models:
            like = f"{'training' if section == 'ensemble' else section} {model}"
            with self.report.part(section, f"{what}{model}", like) as go:
                if go:
                    row(model)

    def case(self, model: str) -> dict[str, Any]:
        """Return what a row says of itself where only one precision and batch size is measured."""
        return {"model": model, "precision": self.precision, "batch": self.batch}

    def floor(self, section: str, model: str, precision: str, batch: int, members: int = 1) -> tuple[float, str]:
        """Return the floor in seconds, and what it comes from."""
        packed_bytes = sum(array.nbytes for array in jax.tree.leaves(self.packed[batch][0]))
        options = self.options
        of_step: Needs = needs(
            model, section, batch, options.genes, options.types, packed_bytes, options.vectors, members
        )
        return of_step.floor(self.card, precision)

    # --- training and inference

    def step_row(self, section: str, model: str, precision: str, batch: int) -> None:
        """Measure our step, in turns with PyTorch's."""
        times = self.beside("torch", section, model, precision, batch)
        ours, (floor, bound) = times["hce_jax"], self.floor(section, model, precision, batch)
        row = {
            "model": model, "precision": precision, "batch": batch, "ms": 1e3 * ours.seconds, "spread": ours.spread,
            "cells_per_second": batch / ours.seconds, "floor_ms": 1e3 * floor, "bound": bound,
            "of_floor": floor / ours.seconds, "torch_ms": 1e3 * times["torch"].seconds if "torch" in times else None,
        }  # fmt: skip
        self.report.row(section, "  ".join(columns(row)), **row)

    def compiled_row(self, model: str) -> None:
        """Measure our training step, in turns with that of torch.compile."""
        times = self.beside("torch.compile", "training", model, self.precision, self.batch)
        if "torch.compile" in times:
            ours, torch = (1e3 * times[name].seconds for name in ("hce_jax", "torch.compile"))
            line = f"torch.compile, training {model} {self.precision} {self.batch}: {torch:.3f} ms, "
            line += f"{torch / ours:.1f} times ours ({ours:.3f} ms)"
            self.report.row("compiled", line, **self.case(model), ms=ours, torch_ms=torch)

    def beside(self, name: str, section: str, model: str, precision: str, batch: int) -> dict[str, Any]:
        """Time our step, and that of a peer if it can be had."""
        training = self.training(model, precision)
        function = training.train if section == "training" else training.predict
        programs = {"hce_jax": in_turn(function, self.packed[batch], self.data.sharding)}
        programs["hce_jax"](1)  # compiles; if it fails, the peer need not begin
        if name not in self.peers:
            return take_turns(programs)
        peer, compiled = self.peers[name], name == "torch.compile"
        try:
            request = {"model": model, "precision": precision, "batch": batch, "task": section, "compiled": compiled}
            peer.prepare(request, PATIENCE)
            return take_turns(programs | {name: peer.run})
        except PeerError as error:
            self.report.note(f"{section} {model} {precision} {batch}: {error}")
            return take_turns(programs)

    # --- where the time goes

    def stages_row(self, model: str) -> None:
        """Measure the stages of a training step."""
        seconds = dict(stage_seconds(self.training(model, self.precision), self.packed[self.batch][0]))
        stages = {name: 1e3 * each for name, each in seconds.items()}
        line = ", ".join(f"{name} {ms:.3f}" for name, ms in stages.items())
        line = f"stages of {model} {self.precision} {self.batch}, ms: {line}"
        self.report.row("stages", line, **self.case(model), ms=stages)

    def kernels(self, model: str) -> None:
        """List the kernels of a training step that take longest, if the profiler tells."""
        training, n_steps = self.training(model, self.precision), 5
        program = in_turn(training.train, self.packed[self.batch], self.data.sharding)
        program(n_steps)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                program(n_steps)
            found = [kernel for file in Path(folder).rglob("*.trace.json.gz") for kernel in read_kernels(file)]
        if not found:
            self.report.note("left out, the profiler tells of no kernels: stages: the dearest kernels")
            return
        runs, seconds = sum(kernel.runs for kernel in found), sum(kernel.seconds for kernel in found)
        told = f"{runs / n_steps:.0f} kernels and copies a step, {1e3 * seconds / n_steps:.3f} ms together"
        self.report.say(f"{model} {self.precision} {self.batch}: {told}; the dearest:")
        for kernel in sorted(found, key=lambda kernel: -kernel.seconds)[:10]:
            ms, a_step = 1e3 * kernel.seconds / n_steps, kernel.runs / n_steps
            line = f"{ms:8.3f} ms  {a_step:5.1f} x  {kernel.name[:60]}  {kernel.scope[:70]}"
            self.report.row("kernels", line, **self.case(model), ms=ms, runs=a_step, name=kernel.name)

    # --- epochs

    def host_epoch_row(self, model: str) -> None:
        """Measure training fed from host memory."""
        n_cells, who, batches = self.host_cells
        self.epoch_row(model, "host memory", n_cells, who, batches())

    @functools.cached_property
    def host_cells(self) -> tuple[int, str, Callable[[], Iterable[CellBatch]]]:
        """Cells in host memory, who joins them to batches, and what gives the batches of a pass on the device."""
        blocks = repeated(self.blocks, self.options.cells)
        n_cells = sum(map(len, blocks))
        if {"grain", "pyarrow"} & {*ABSENT}:
            pieces = Pieces(blocks, self.batch)
            return n_cells, "joined by threads", lambda: on_device(joined_ahead(pieces), self.data.sharding)
        cells = StreamedSplit(held_split(blocks, self.options.types), self.batch, self.data.sharding)
        return n_cells, "hce_jax.input's pipeline", lambda: cells.training_batches(Shuffle(0, 0), 32_768)

    def device_epochs(self) -> None:
        """Measure training fed from the device's memory."""
        base, most = sum(map(len, self.blocks)), most_on_device(self.options, self.blocks)
        # Fewer than 2^31 entries first: for more, other code is compiled, which may fail.
        few = min(most, 2**31 // int(entries_of(self.blocks).mean + 256))
        sizes = [(few, self.options.models[:1])] if few < most else []
        for n_cells, models in [*sizes, (most, self.options.models)]:
            with self.report.part("epoch", f"{n_cells:,} cells in device memory", "device") as go:
                if go:
                    self.device_epoch_rows(max(n_cells // base, 1), models)

    def device_epoch_rows(self, copies: int, models: Sequence[str]) -> None:
        """Measure with the simulated cells so many times on the device."""
        cells = OnDevice(self.blocks, copies, self.batch, self.mesh)
        order = cells.order(EPOCH_CELLS // self.batch)
        self.check_gathered(next(cells.batches(order)), order[0])
        for model in models:
            who = f"gathered on the device, {cells.n_bytes / 1e9:.1f} GB"
            self.epoch_row(model, "device memory", cells.n_cells, who, cells.batches(order))

    def check_gathered(self, gathered: CellBatch, chosen: np.ndarray) -> None:
        """Compare a batch gathered on the device with the same cells joined on the host."""
        cells = chosen % sum(map(len, self.blocks))
        joined = Pieces(self.blocks, len(cells)).of_cells(cells)
        expected = dense_batch(jax.device_put(joined, self.data.sharding), self.data.sharding)
        found = dense_batch(gathered, self.data.sharding)
        if not jnp.array_equal(found.targets, expected.targets) or jnp.abs(found.x - expected.x).max() > 1e-5:
            raise ArithmeticError("a batch gathered in device memory has other cells than it should have")

    def epoch_row(self, model: str, where: str, n_cells: int, who: str, batches: Iterable[CellBatch]) -> None:
        """Train on batches that come from somewhere, for one pass or some seconds."""
        n_steps, seconds = fed(self.training(model, self.precision), iter(batches))
        rate = n_steps * self.batch / seconds
        line = (f"{model} {self.precision} {self.batch} from {where} ({n_cells:,} cells, {who}): {rate:,.0f} cells/s "
                f"over {n_steps} steps; {EPOCH_CELLS:,} cells would take {EPOCH_CELLS / rate:.1f} s")  # fmt: skip
        self.report.row("epoch", line, **self.case(model), where=where, cells=n_cells, who=who, steps=n_steps,
                        cells_per_second=rate, epoch_seconds=EPOCH_CELLS / rate)  # fmt: skip

    # --- ensembles

    def ensemble_row(self, model: str) -> None:
        """Measure several members trained together, in turns with one."""
        members, packed = self.options.members, self.packed[self.batch]
        times = take_turns({
            str(count): in_turn(self.training(model, self.precision, count).train, packed, self.data.sharding)
            for count in (1, members)
        })  # fmt: skip
        one, several = (1e3 * times[str(count)].seconds for count in (1, members))
        floor, bound = self.floor("training", model, self.precision, self.batch, members)
        line = (f"{members} members, {model} {self.precision} {self.batch}: {several:.3f} ms, {several / one:.2f} "
                f"times one ({one:.3f} ms); floor {1e3 * floor:.3f} ms {bound}")  # fmt: skip
        self.report.row("ensemble", line, **self.case(model), members=members, ms=several, one_ms=one,
                        ratio=several / one, floor_ms=1e3 * floor)  # fmt: skip


def measure_card(report: Report, precisions: Sequence[str], batch: CellBatch, data: Data) -> Card:
    """Measure a copy, matrix products, and the transfer of a packed batch, all of random data."""
    words, size, repeats = (2**22, 512, 1) if ON_CPU else (2**30, 8192, 10)
    x = jax.random.bits(jax.random.key(0), (words,), jnp.uint32)
    inverted = jax.jit(jnp.invert)
    bandwidth = 8 * words / seconds_of(lambda: inverted(x))
    report.row("card", f"copy in device memory: {bandwidth / 1e12:.3f} TB/s", what="copy", value=bandwidth)
    operations = {}
    for name in precisions:
        precision = PRECISIONS[name]
        a, b = jax.random.normal(jax.random.key(1), (2, size, size)).astype(precision.dtype)
        product = jax.jit(functools.partial(jnp.matmul, precision=precision.matmul))
        run = functools.partial(lambda product, a, b: [product(a, b) for _ in range(repeats)], product, a, b)
        operations[name] = repeats * 2 * size**3 / seconds_of(run, 5)
        line = f"matrix product {size}^3, {name}: {operations[name] / 1e12:.1f} TFLOP/s"
        report.row("card", line, what=f"product {name}", value=operations[name])
    n_bytes = sum(array.nbytes for array in jax.tree.leaves(batch))
    link = n_bytes / seconds_of(lambda: jax.device_put(batch, data.sharding), 20)
    report.row("card", f"host to device, a packed batch of {n_bytes / 1e6:.2f} MB: {link / 1e9:.2f} GB/s",
               what="link", value=link)  # fmt: skip
    return Card(bandwidth, link, operations)


def fed(training: Training, batches: Iterator[CellBatch]) -> tuple[int, float]:
    """Train on the batches of a pass, or as many as fit in some seconds; return the steps and the seconds.

    The first steps are not counted: they wait for the first cells.
    """
    n_steps = 0

    def counted(until: float) -> Iterator[CellBatch]:
        nonlocal n_steps
        for batch in batches:
            n_steps += 1
            yield batch
            if time.perf_counter() > until:
                return

    training.train(itertools.islice(batches, 5))
    began = time.perf_counter()
    training.train(counted(began + EPOCH_SECONDS))
    return n_steps, time.perf_counter() - began


def most_on_device(options: argparse.Namespace, blocks: Sequence[Block]) -> int:
    """Return the cells that fit in the given share of the device's free memory, at most those of the published split.

    Where a device does not tell of its memory, as a CPU, as many as in host memory.
    """
    memory = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" not in memory:
        return options.cells
    free = memory["bytes_limit"] - memory["bytes_in_use"]
    return int(min(EPOCH_CELLS, options.device_share * free / (2 * (entries_of(blocks).mean + 128))))


def random_vectors(n_vectors: int, n_genes: int) -> np.ndarray:
    """Return augmentation vectors, as wide as the rows of a batch."""
    drawn = np.random.default_rng(0).standard_normal((n_vectors, n_genes), np.float32)
    return widened_vectors(0.1 * drawn, row_width(n_genes))


def random_tree(n_types: int) -> np.ndarray:
    """Return the reachability matrix (c, c) of a random tree."""
    rng, reachability = np.random.default_rng(0), np.eye(n_types, dtype=np.float32)
    for child in range(1, n_types):
        reachability[:, child] = np.maximum(reachability[:, child], reachability[:, rng.integers(child)])
    return reachability


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    precisions = ["float32"] if ON_CPU else ["tf32", "bf16"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["tabnet", "linear", "mlp"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=precisions)
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--genes", type=int, default=19_331)
    parser.add_argument("--types", type=int, default=164)
    parser.add_argument("--vectors", type=int, default=5_000, help="augmentation vectors")
    parser.add_argument("--members", type=int, default=4, help="of the ensemble")
    parser.add_argument("--cells", type=int, default=1_048_576, help="in host memory, for the epoch")
    parser.add_argument("--distinct_cells", type=int, default=16_384, help="drawn; the others repeat them")
    parser.add_argument("--device_share", type=float, default=0.75, help="of the device's free memory, for cells")
    parser.add_argument("--minutes", type=float, default=8, help="for everything; what does not fit is left out")
    parser.add_argument("--peers", nargs="*", choices=["torch", "torch.compile"], default=["torch", "torch.compile"])
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="of the checks; anew in each run")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=[*SECTIONS])
    parser.add_argument("--json", type=Path, help="file for all rows")
    options = parser.parse_args(arguments)
    if min(options.cells, options.distinct_cells) < max(options.batch_sizes):
        parser.error("--cells and --distinct_cells must be no less than the largest of --batch_sizes")
    if min(options.genes, options.types, options.vectors, options.members, *options.batch_sizes) < 1:
        parser.error("--genes, --types, --vectors, --members and --batch_sizes must be 1 or more")
    if not (0 < options.minutes < math.inf and 0 < options.device_share < 1 and options.seed >= 0):
        parser.error("--minutes must be above 0, --device_share above 0 and below 1, --seed not negative")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    return options


def as_json(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with null for what is no number, which JSON does not know."""
    return [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    options = parse_args(arguments)
    report, device = Report(options.minutes, options.sections), jax.devices()[0]
    machine = f"{device.device_kind}, {os.cpu_count()} CPU cores, jax {jax.__version__}"
    report.say(f"{machine}, Python {sys.version.split()[0]}")
    report.say(f"stand-ins for what is not installed: {', '.join(ABSENT) or 'none'}")
    bench = Bench(options, report)
    try:
        bench.run()
    except KeyboardInterrupt:
        report.note("interrupted")
        report.failed = True
    if options.json:
        options.json.write_text(json.dumps({"rows": as_json(report.rows), "notes": report.notes}, indent=1))
    case = {"precision": bench.precision, "batch": bench.batch}
    where = f"{device.device_kind} ({bench.precision}, batch {bench.batch:,}, {options.genes:,} genes)"
    lines = ["", *summary(report), "", *report.notes, "", *targets(report, options.models[0], case, where)]
    print("\n".join(lines), flush=True)
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
