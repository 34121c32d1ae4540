"""Cells a second that annbatch and scDataset deliver as shuffled batches. Called by benchmarks/input.py.

The peers live in an environment of their own, for annbatch needs Python 3.12 or newer:

    python3.12 -m venv peers
    peers/bin/pip install 'annbatch[zarrs]' scDataset

    peers/bin/python benchmarks/input_peers.py prepare --cells CELLS --folder STORES     their stores, once
    peers/bin/python benchmarks/input_peers.py run annbatch --folder STORES              one line of JSON
    peers/bin/python benchmarks/input_peers.py run scdataset --folder STORES

CELLS holds the cells as one CSR matrix: data.npy (counts), indices.npy, indptr.npy, labels.npy and shape.json with
n_genes. Both peers store the counts as float32, which is how AnnData files come, and hand out sparse CSR batches in
host memory with the labels; nothing is made dense here.

annbatch reads the sharded, pre-shuffled collection its own writer makes (64 cells a chunk, Blosc LZ4: its defaults)
through the zarrs codec pipeline, without a GPU. scDataset reads an h5ad file without compression, the fastest of those
that anndata writes (gzip: 5 kB a cell, but several times slower), and fetches by a mask, for which anndata reads whole
blocks; the fetch that comes with scDataset makes the cells dense, at a third of the speed. Every setting of SETTINGS is
tried for a quarter of the seconds, in a process of its own, and the fastest is measured. Memory is RssAnon, which
leaves out the batches that scDataset's workers put in shared memory; it is read from /proc, hence Linux only.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

# annbatch 0.3: its defaults (which its FAQ recommends), those of its README and of its quickstart. scDataset 0.3: the
# blocks of its examples; its suggest_parameters gives at most 256 batches of 64 a fetch, which are 8 of 2,048.
SETTINGS: dict[str, list[dict[str, int]]] = {
    "annbatch": [
        {"chunk_size": 512, "preload_nchunks": 32},
        {"chunk_size": 32, "preload_nchunks": 256},
        {"chunk_size": 64, "preload_nchunks": 32},
    ],
    "scdataset": [
        {"block_size": block_size, "fetch_factor": 8, "num_workers": num_workers}
        for block_size in (16, 64)
        for num_workers in (0, 2)
    ],
}
PACKAGES = {"annbatch": "annbatch", "scdataset": "scDataset"}
STORES = {"annbatch": "annbatch.zarr", "scdataset": "scdataset.h5ad"}

PIECE = 10_000  # cells written at a time
DATASET_SIZE = 50_000  # cells annbatch shuffles in memory at a time: about 4 GB with its copies
LABEL = "cell_type"

Batch = tuple[Any, np.ndarray]  # counts (b, g), labels (b,)


def prepare(cells: Path, folder: Path) -> None:
    """Make the stores of both peers, each under a temporary name first; those that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    h5ad, collection = folder / STORES["scdataset"], folder / STORES["annbatch"]
    if not h5ad.exists():
        aside = h5ad.with_suffix(".unfinished")
        write_h5ad(cells, aside)
        aside.rename(h5ad)
    if not collection.exists():
        aside = collection.with_suffix(".unfinished.zarr")
        write_collection(h5ad, aside)
        aside.rename(collection)


def write_h5ad(cells: Path, path: Path) -> None:
    """Write the cells as an AnnData file, piece by piece."""
    import anndata
    import h5py
    import pandas as pd

    data, indices = (np.load(cells / f"{name}.npy", mmap_mode="r") for name in ("data", "indices"))
    indptr, labels = (np.load(cells / f"{name}.npy") for name in ("indptr", "labels"))
    n_genes = json.loads((cells / "shape.json").read_text())["n_genes"]

    def piece(start: int) -> sp.csr_matrix:
        pointers = indptr[start : start + PIECE + 1]
        values = slice(pointers[0], pointers[-1])
        shape = (len(pointers) - 1, n_genes)
        return sp.csr_matrix((data[values].astype(np.float32), indices[values], pointers - pointers[0]), shape=shape)

    types = [f"type_{index}" for index in range(labels.max() + 1)]
    cell_types = pd.Categorical.from_codes(labels, pd.Index(types))
    obs = pd.DataFrame({LABEL: cell_types}, index=np.arange(len(labels)).astype(str))
    var = pd.DataFrame(index=[f"gene_{index}" for index in range(n_genes)])
    with h5py.File(path, "w") as file:
        anndata.io.write_elem(file, "/", anndata.AnnData(obs=obs, var=var))
        anndata.io.write_elem(file, "X", piece(0))
        for start in range(PIECE, len(labels), PIECE):
            anndata.io.sparse_dataset(file["X"]).append(piece(start))


def write_collection(h5ad: Path, path: Path) -> None:
    """Write annbatch's collection from the AnnData file."""
    import zarr
    from annbatch import DatasetCollection

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    rng = np.random.default_rng(0)
    DatasetCollection(zarr.open_group(path, mode="w")).add_adatas([h5ad], dataset_size=DATASET_SIZE, rng=rng)


def annbatch_epochs(store: Path, settings: dict[str, int], batch_size: int) -> Iterator[Iterator[Batch]]:
    """Yield epochs of annbatch without end, each an iterator over its batches."""
    import anndata
    import zarr
    from annbatch import DatasetCollection, Loader

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})

    def load(group: zarr.Group) -> anndata.AnnData:
        return anndata.AnnData(X=anndata.io.sparse_dataset(group["X"]), obs=anndata.io.read_elem(group["obs"])[[LABEL]])

    loader = Loader(
        **settings, batch_size=batch_size, shuffle=True, preload_to_gpu=False, to="torch", rng=np.random.default_rng(0)
    )
    loader.use_collection(DatasetCollection(store, mode="r"), load_adata=load)
    while True:
        yield ((batch["X"], batch["obs"][LABEL].cat.codes.to_numpy()) for batch in loader)


class BackedCells:
    """An AnnData file that every worker opens for itself: an HDF5 file must not be shared across a fork."""

    def __init__(self, path: Path, n_cells: int) -> None:
        self.path, self.n_cells = path, n_cells
        self._adata: Any = None

    def __len__(self) -> int:
        return self.n_cells

    def fetch(self, rows: np.ndarray) -> Batch:
        """Return the cells of some sorted rows and their labels."""
        import anndata

        if self._adata is None:
            self._adata = anndata.read_h5ad(self.path, backed="r")
        mask = np.zeros(self.n_cells, bool)
        mask[rows] = True
        return self._adata.X[mask], self._adata.obs[LABEL].cat.codes.to_numpy()[rows]


def pick_tensors(fetched: Batch, rows: np.ndarray) -> Any:
    """Return a batch of what was fetched as tensors: they leave a worker in shared memory and not through a pipe."""
    import torch

    x, labels = (part[rows] for part in fetched)
    return *map(torch.from_numpy, (x.data, x.indices, x.indptr)), x.shape, torch.from_numpy(labels)


def scdataset_epochs(store: Path, settings: dict[str, int], batch_size: int) -> Iterator[Iterator[Batch]]:
    """Yield epochs of scDataset without end, each an iterator over its batches."""
    import h5py
    from scdataset import BlockShuffling, scDataset
    from torch.utils.data import DataLoader

    with h5py.File(store) as file:
        cells = BackedCells(store, len(file["X/indptr"]) - 1)
    dataset = scDataset(
        cells, BlockShuffling(settings["block_size"]), batch_size=batch_size, fetch_factor=settings["fetch_factor"],
        fetch_callback=BackedCells.fetch, batch_callback=pick_tensors, seed=0,
    )  # fmt: skip
    workers = settings["num_workers"]
    # scDataset recommends a prefetch factor one above the fetch factor.
    several: dict[str, Any] = {
        "prefetch_factor": settings["fetch_factor"] + 1, "persistent_workers": True, "multiprocessing_context": "spawn",
    } if workers else {}  # fmt: skip
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, **several)
    while True:
        yield (
            (sp.csr_matrix((data.numpy(), indices.numpy(), indptr.numpy()), shape=shape), labels.numpy())
            for data, indices, indptr, shape, labels in loader
        )


EPOCHS = {"annbatch": annbatch_epochs, "scdataset": scdataset_epochs}


def batches_a_window(peer: str, settings: dict[str, int], batch_size: int) -> int:
    """Return how many batches come out of what the peer reads at a time."""
    if peer == "annbatch":
        return max(1, settings["chunk_size"] * settings["preload_nchunks"] // batch_size)
    return settings["fetch_factor"] * max(1, settings["num_workers"])


def measure(peer: str, store: Path, settings: dict[str, int], seconds: float, batch_size: int) -> dict[str, float]:
    """Stream batches, epoch after epoch, for so many seconds; return the cells a second and the peak of memory.

    The clock starts at the first batch and stops at a first batch too: the first of an epoch or of a window read
    from disk, so that every window counted was also read within the time.
    """
    memory = PeakMemory()
    window = batches_a_window(peer, settings, batch_size)
    start, delivered = 0.0, 0
    for epoch in EPOCHS[peer](store, settings, batch_size):
        for index, (x, labels) in enumerate(epoch):
            start = start or time.perf_counter()
            elapsed = time.perf_counter() - start
            if delivered and elapsed >= seconds and index % window == 0:
                result = {"cells_per_s": delivered / elapsed, "rss_anon_mb": memory.stop() / 1e6}
                for _ in epoch:  # torch's workers abort, and say so at length, when stopped with batches under way
                    pass
                return result
            assert x.shape[0] == len(labels)
            delivered += len(labels)
    raise AssertionError("the epochs have no end")


class PeakMemory:
    """The largest anonymous resident memory of this process and its descendants, looked at ten times a second."""

    def __init__(self) -> None:
        self._peak, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            self._peak = max(self._peak, anonymous_memory(os.getpid()))

    def stop(self) -> int:
        """Stop looking; return the peak in bytes."""
        self._ended.set()
        self._thread.join()
        return self._peak


def anonymous_memory(root: int) -> int:
    """Return RssAnon of a process and its descendants, in bytes."""
    parents, memory = {}, {}
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
        except OSError:  # the process ended
            continue
        parents[int(fields["Pid"])] = int(fields["PPid"])
        memory[int(fields["Pid"])] = 1024 * int(fields.get("RssAnon", "0 kB").split()[0])
    family, grown = {root}, True
    while grown:
        found = {pid for pid, parent in parents.items() if parent in family} - family
        family |= found
        grown = bool(found)
    return sum(memory.get(pid, 0) for pid in family)


def quieten() -> None:
    """Leave standard output to the result, and drop zarr's warnings about what its specification does not have yet."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    warnings.simplefilter("ignore")


def measure_apart(*arguments: Any) -> dict[str, float]:
    """Measure in a fresh process, so that no setting meets the memory of another."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=quieten) as executor:
        return executor.submit(measure, *arguments).result()


def run(peer: str, folder: Path, seconds: float, batch_size: int) -> dict[str, Any]:
    """Find the best settings of a peer and measure it with them."""
    store = folder / STORES[peer]
    files = [store] if store.is_file() else [path for path in store.rglob("*") if path.is_file()]
    size = 0
    for path in files:  # into the page cache
        with path.open("rb") as file:
            size += sum(len(block) for block in iter(lambda: file.read(1 << 24), b""))
    tried = [measure_apart(peer, store, settings, seconds / 4, batch_size) for settings in SETTINGS[peer]]
    for settings, result in zip(SETTINGS[peer], tried, strict=True):
        print(peer, settings, {name: round(value) for name, value in result.items()}, file=sys.stderr)
    best = max(range(len(tried)), key=lambda index: tried[index]["cells_per_s"])
    result = measure_apart(peer, store, SETTINGS[peer][best], seconds, batch_size)
    return {
        "name": peer,
        "version": importlib.metadata.version(PACKAGES[peer]),
        "settings": SETTINGS[peer][best],
        "cells_per_s": round(result["cells_per_s"]),
        "bytes_per_cell": round(size / count_cells(folder)),
        "rss_anon_mb": round(result["rss_anon_mb"]),
    }


def count_cells(folder: Path) -> int:
    """Return the number of cells in the stores."""
    import h5py

    with h5py.File(folder / STORES["scdataset"]) as file:
        return len(file["X/indptr"]) - 1


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare_parser = commands.add_parser("prepare", help="make the stores of the peers")
    prepare_parser.add_argument("--cells", type=Path, required=True, help="folder of the cells as .npy files")
    prepare_parser.add_argument("--folder", type=Path, required=True, help="where the stores go")
    run_parser = commands.add_parser("run", help="measure one peer")
    run_parser.add_argument("peer", choices=tuple(SETTINGS))
    run_parser.add_argument("--folder", type=Path, required=True, help="where the stores are")
    run_parser.add_argument("--seconds", type=float, default=20)
    run_parser.add_argument("--batch-size", type=int, default=2048)
    return parser.parse_args()


def main() -> None:
    """Prepare the stores or measure a peer."""
    args = parse_args()
    if args.command == "prepare":
        warnings.simplefilter("ignore")
        prepare(args.cells, args.folder)
    elif not (args.folder / STORES[args.peer]).exists():
        sys.exit(f"{args.folder / STORES[args.peer]} is not there; make it with the command prepare.")
    else:
        print(json.dumps(run(args.peer, args.folder, args.seconds, args.batch_size)))


if __name__ == "__main__":
    main()
