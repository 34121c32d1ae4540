"""Cells a second that loaders deliver as shuffled batches, on this machine.

    python3.12 -m venv peers                                   annbatch needs Python 3.12 or newer
    peers/bin/pip install 'annbatch[zarrs]' scDataset
    python benchmarks/input.py --peers peers/bin/python        the tables of the documentation
    python benchmarks/input.py --n_cells 4096 --rounds 1 --seconds 1       small, to see that it runs

Simulated cells of 19,331 genes, about 2,140 of them expressed, as a merlin store, as a cell store, and as the peers
like them. They are made once, in --folder (about 9 GB for 200,704 cells), and lie in the page cache afterwards. The
loaders run one after the other, each in a process of its own, and that several times over: the table gives the median
and the range. Ours is measured over whole epochs from the moment one is asked for to its last batch; each batch of
2,048 cells is what goes to a device, packed, and has the labels. The peers' batches are sparse (input_peers.py says how
they are measured), pyarrow's are dense and in the order of the store.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import scipy.sparse as sp

from hce_jax.input import Shuffle, training_batches
from hce_jax.preprocess import normalize_log1p
from hce_jax.store import Store, convert, hold, open_store
from hce_jax.store.merlin_write import write_side_files, write_split
from hce_jax.store.schema import CATEGORICAL_COLUMNS
from hce_jax.store.split import n_readers

N_GENES, N_TYPES = 19_331, 164
CELLS_PER_CHUNK = 7_168  # of the simulation, and of a part of the merlin store: whole row groups of 1,024
BATCH_SIZE, WINDOW = 2_048, 32_768
FEW_CELLS, MANY_CELLS = 20_480, 409_600


# --- the cells --------------------------------------------------------------------------------------------------------


def simulate(chunk: int, n_cells: int) -> tuple[sp.csr_array, np.ndarray]:
    """Draw a chunk of cells: counts (n, g) from the profile of a type, and the types."""
    shared, rng = np.random.default_rng(0), np.random.default_rng([1, chunk])
    profiles = shared.lognormal(0, 2.0, N_GENES) * shared.lognormal(0, 0.7, (N_TYPES, N_GENES))
    cumulative = np.cumsum(profiles / profiles.sum(axis=1, keepdims=True), axis=1)
    types = rng.integers(0, N_TYPES, n_cells)
    depths = np.maximum(rng.lognormal(np.log(4_300), 0.55, n_cells), 500).astype(int)
    rows = []
    for cell_type, depth in zip(types, depths, strict=True):
        genes = np.minimum(np.searchsorted(cumulative[cell_type], rng.random(depth)), N_GENES - 1)
        rows.append(sp.csr_array(np.bincount(genes, minlength=N_GENES)[None].astype(np.int32)))
    return sp.vstack(rows, "csr"), types


def write_chunk(folder: Path, chunk: int, n_cells: int) -> None:
    """Simulate a chunk; keep its counts for the peers and write it as a part of the merlin store."""
    counts, types = simulate(chunk, n_cells)
    sp.save_npz(folder / f"chunk.{chunk}.npz", sp.csr_matrix(counts), compressed=False)
    np.save(folder / f"types.{chunk}.npy", types)
    obs = pd.DataFrame({column: np.zeros(n_cells, int) for column in CATEGORICAL_COLUMNS})
    obs = obs.assign(cell_type=types, soma_joinid=chunk * CELLS_PER_CHUNK + np.arange(n_cells), is_primary_data=True)
    aside = folder / f"part.{chunk}"
    write_split(aside, normalize_log1p(counts), obs, rows_per_part=CELLS_PER_CHUNK)
    (aside / "part.0.parquet").rename(folder / "merlin" / "train" / f"part.{chunk}.parquet")
    aside.rmdir()


def make_stores(folder: Path, n_cells: int) -> None:
    """Make the merlin store and the peers' input, unless they are there."""
    if (folder / "merlin").exists():
        return
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "merlin" / "train").mkdir(parents=True)
    genes = pd.DataFrame({name: [f"SIM{gene}" for gene in range(N_GENES)] for name in ("feature_id", "feature_name")})
    lookups = {column: ["simulated"] for column in CATEGORICAL_COLUMNS}
    lookups["cell_type"] = [f"type {number}" for number in range(N_TYPES)]
    write_side_files(partial / "merlin", genes, lookups, class_weights=np.ones(N_TYPES), child_matrix=np.eye(N_TYPES))
    sizes = [min(CELLS_PER_CHUNK, n_cells - start) for start in range(0, n_cells, CELLS_PER_CHUNK)]
    with ProcessPoolExecutor(n_readers()) as pool:
        list(pool.map(write_chunk, [partial] * len(sizes), range(len(sizes)), sizes))
    join_chunks(partial, len(sizes))
    (partial / "cells").rename(folder / "counts")
    (partial / "merlin").rename(folder / "merlin")
    shutil.rmtree(partial)


def join_chunks(partial: Path, n_chunks: int) -> None:
    """Write the counts of all chunks as one CSR matrix in .npy files, which input_peers.py reads."""
    (partial / "cells").mkdir()
    chunks = [sp.load_npz(partial / f"chunk.{chunk}.npz") for chunk in range(n_chunks)]
    for name in ("data", "indices"):
        np.save(partial / "cells" / f"{name}.npy", np.concatenate([getattr(each, name) for each in chunks]))
    sizes = np.concatenate([np.diff(each.indptr) for each in chunks])
    np.save(partial / "cells" / "indptr.npy", np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]))
    types = [np.load(partial / f"types.{chunk}.npy") for chunk in range(n_chunks)]
    np.save(partial / "cells" / "labels.npy", np.concatenate(types).astype(np.int64))
    (partial / "cells" / "shape.json").write_text(json.dumps({"n_genes": N_GENES}))


def repeat_store(folder: Path, source: Path, n_cells: int) -> Path:
    """Make a cell store with (at least) this many cells out of the parts of another; its content is written anew."""
    destination = folder / f"cells_{n_cells}"
    if not destination.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            merlin = Path(scratch) / "merlin"
            shutil.copytree(source, merlin, ignore=shutil.ignore_patterns("part.*"))
            parts = sorted((source / "train").glob("part.*.parquet"))
            for number in range(-(-n_cells // CELLS_PER_CHUNK)):
                (merlin / "train" / f"part.{number}.parquet").symlink_to(parts[number % len(parts)].resolve())
            convert(merlin, destination)
    return destination


# --- the loaders ------------------------------------------------------------------------------------------------------


def epochs_of_ours(store: Store, held: bool) -> Callable[[int], Iterator[int]]:
    """Return a function that streams an epoch and yields the cells of each batch."""
    split = hold(store.split("train")) if held else store.split("train")

    def epoch(number: int) -> Iterator[int]:
        batches = iter(training_batches(split, BATCH_SIZE, Shuffle(0, number), WINDOW))
        for batch in batches:
            yield len(batch.targets)
        batches.close()

    return epoch


def epochs_of_pyarrow(store: Path, n_threads: int) -> Callable[[int], Iterator[int]]:
    """Return a function that reads the row groups of a merlin store one by one, or by several threads."""
    parts = sorted((store / "train").glob("part.*.parquet"))
    groups = [(part, group) for part in parts for group in range(pq.ParquetFile(part).num_row_groups)]

    def read(part_and_group: tuple[Path, int]) -> int:
        part, group = part_and_group
        table = pq.ParquetFile(part).read_row_group(group, columns=["X", "cell_type"], use_threads=n_threads == 1)
        x_ng = table["X"].combine_chunks().flatten().to_numpy().reshape(-1, N_GENES)
        return min(len(x_ng), len(table["cell_type"].to_numpy()))

    def epoch(number: int) -> Iterator[int]:
        if n_threads == 1:
            yield from map(read, groups)
        else:
            with ThreadPoolExecutor(n_threads) as pool:
                yield from pool.map(read, groups)

    return epoch


LOADERS: dict[str, Callable[[Path], Callable[[int], Iterator[int]]]] = {
    "hce_jax, cell store": lambda folder: epochs_of_ours(open_store(folder / "cells"), held=False),
    "hce_jax, cell store in host memory": lambda folder: epochs_of_ours(open_store(folder / "cells"), held=True),
    "hce_jax, merlin store": lambda folder: epochs_of_ours(open_store(folder / "merlin"), held=False),
    "pyarrow, merlin store": lambda folder: epochs_of_pyarrow(folder / "merlin", 1),
    "pyarrow, merlin store, a thread a core": lambda folder: epochs_of_pyarrow(folder / "merlin", n_readers()),
}
PEERS = ("annbatch", "scdataset")


def measure(epoch: Callable[[int], Iterator[int]], seconds: float) -> dict[str, float]:
    """Stream whole epochs, at least for so many seconds."""
    peak = PeakMemory()
    n_cells, start, number = 0, time.perf_counter(), 0
    while True:
        n_cells += sum(epoch(number))
        spent, number = time.perf_counter() - start, number + 1
        if spent > seconds:
            return {"cells_per_s": n_cells / spent, "rss_anon_mb": peak.stop()}


class PeakMemory:
    """The most anonymous memory of this process, looked at ten times a second (Linux)."""

    def __init__(self) -> None:
        self.most, self._stopped = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.1):
            lines = Path("/proc/self/status").read_text().splitlines()
            kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.most = max(self.most, kilobytes / 1024)

    def stop(self) -> float:
        """Return it, in MB."""
        self._stopped.set()
        self._thread.join()
        return self.most


# --- the tables -------------------------------------------------------------------------------------------------------


def run_apart(*command: str | Path) -> dict[str, Any]:
    """Run a command and read the line of JSON that it prints."""
    output = subprocess.run([str(each) for each in command], stdout=subprocess.PIPE, check=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def bytes_per_cell(store: Path, n_cells: int) -> float:
    """Return the size of a store's training split on disk."""
    return sum(path.stat().st_size for path in (store / "train").iterdir()) / n_cells


def compare(args: argparse.Namespace) -> None:
    """Print cells a second of all loaders, which take turns."""
    folder = args.folder
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(args.rounds):
        for name in LOADERS:
            command = [sys.executable, __file__, "--folder", folder, "--seconds", str(args.seconds), "--loader", name]
            found.setdefault(name, []).append(run_apart(*command))
        for peer in PEERS if args.peers else ():
            script = Path(__file__).with_name("input_peers.py")
            command = [args.peers, script, "run", peer, "--folder", folder / "peers", "--seconds", str(args.seconds)]
            result = run_apart(*command)
            found.setdefault(f"{result['name']} {result['version']} ({result['settings']})", []).append(result)
    sizes = {kind: bytes_per_cell(folder / kind, args.n_cells) for kind in ("cells", "merlin")}
    print("\n| loader | cells/s | range | bytes a cell on disk | peak RssAnon, MB |\n| --- | --- | --- | --- | --- |")
    for name, runs in found.items():
        rates = [run["cells_per_s"] for run in runs]
        size = runs[0].get("bytes_per_cell", sizes["merlin" if "merlin" in name else "cells"])
        memory = max(run["rss_anon_mb"] for run in runs)
        between = f"{min(rates):,.0f} - {max(rates):,.0f}"
        print(f"| {name} | {statistics.median(rates):,.0f} | {between} | {size:,.0f} | {memory:,.0f} |")


def compare_memory(args: argparse.Namespace) -> None:
    """Print the memory of streaming few and many cells."""
    print("\n| cells of the split | peak RssAnon, MB |\n| --- | --- |")
    for n_cells in (FEW_CELLS, MANY_CELLS):
        repeat_store(args.folder, args.folder / "merlin", n_cells)
        name = f"cells_{n_cells}"
        result = run_apart(sys.executable, __file__, "--folder", args.folder, "--seconds", "5", "--loader", name)
        print(f"| {n_cells:,} | {result['rss_anon_mb']:,.0f} |", flush=True)


def compare_conversion(args: argparse.Namespace) -> None:
    """Print the speed of convert beside that of reading its source."""
    rates = []
    for _ in range(args.rounds):
        read = measure(epochs_of_pyarrow(args.folder / "merlin", n_readers()), seconds=0)["cells_per_s"]
        with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
            start = time.perf_counter()
            convert(args.folder / "merlin", Path(scratch) / "cells")
            rates.append((read, args.n_cells / (time.perf_counter() - start)))
    read, converted = (statistics.median(each) for each in zip(*rates, strict=True))
    print("\n| | cells/s |\n| --- | --- |")
    print(f"| pyarrow reads the merlin store, a thread a core | {read:,.0f} |")
    print(f"| hce_jax convert | {converted:,.0f} ({converted / read:.0%}) |")


def main() -> None:
    """Make what is missing, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("data/benchmark_input"), help="where the stores are made")
    parser.add_argument("--n_cells", type=int, default=200_704, help="cells of the comparison")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement, at least")
    parser.add_argument("--rounds", type=int, default=3, help="how often each loader is measured")
    parser.add_argument("--peers", help="python of the environment with annbatch and scDataset")
    parser.add_argument("--loader", help=argparse.SUPPRESS)  # in the process of one loader
    args = parser.parse_args()
    if args.loader:
        if args.loader in LOADERS:
            epoch = LOADERS[args.loader](args.folder)
        else:
            epoch = epochs_of_ours(open_store(args.folder / args.loader), held=False)
        print(json.dumps(measure(epoch, args.seconds)))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    print(f"{args.n_cells:,} cells of {N_GENES:,} genes, batches of {BATCH_SIZE:,}, {os.cpu_count()} cores")
    make_stores(args.folder, args.n_cells)
    if not (args.folder / "cells").exists():
        convert(args.folder / "merlin", args.folder / "cells")
    if args.peers:
        script = Path(__file__).with_name("input_peers.py")
        cells, stores = args.folder / "counts", args.folder / "peers"
        subprocess.run([args.peers, script, "prepare", "--cells", cells, "--folder", stores], check=True)
    compare(args)
    compare_conversion(args)
    compare_memory(args)


if __name__ == "__main__":
    main()
