"""Memory and speed of building a store from a Census, as the Census grows.

    python -m benchmarks.build_store                  10,000, 50,000 and 200,000 cells, about 10 GB of disk
    python -m benchmarks.build_store --cells 2000     small, to see that it runs

Simulated cells of 19,331 genes, about 2,140 of them expressed, as a SOMA Census with the layout and the tiles of the
public one, on this machine's disk. `build-store` reads them in a process of its own: the table gives its peak of
resident memory, the cells a second of reading and shuffling together, and beside them those of
cellxgene_census.get_anndata, which the published notebook reads the Census with, for the same cells in steps of 10,000;
it only reads, and keeps nothing.
"""

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cellxgene_census
import numpy as np
import psutil
import scipy.sparse as sp

from benchmarks.input import N_GENES, simulate

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from small_census import small_census_obs, small_census_var, write_small_census

DONORS = 50
PEER_CELLS = 10_000


def make_census(folder: Path, n_cells: int) -> Path:
    """Write a Census of about so many cells, if it is not there yet."""
    path = folder / f"census_{n_cells}"
    if not path.exists():
        obs = small_census_obs("A", donors=DONORS, cells_per_donor=max(n_cells // (4 * DONORS), 6))
        aside = path.with_suffix(".partial")
        shutil.rmtree(aside, ignore_errors=True)
        var = small_census_var(N_GENES)
        write_small_census(aside, obs=obs, var=var, counts=_pieces(len(obs)), build_date="2025-01-01", layout="2025")
        aside.rename(path)
    return path


def _pieces(n_cells: int) -> Iterator[sp.csr_array]:
    for number, start in enumerate(range(0, n_cells, 4096)):
        yield simulate(number, min(4096, n_cells - start))[0].astype(np.float32)


def build(census: Path, destination: Path) -> tuple[float, str]:
    """Run build-store; return its peak of resident memory, in GiB, and its line about time."""
    shutil.rmtree(destination, ignore_errors=True)
    command = [sys.executable, "-m", "hce_jax", "build-store", str(destination), "--census-version", str(census)]
    command += ["--min-cells=1", "--min-tech-samples=1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = [0]
    watched = threading.Thread(target=_watch, args=(psutil.Process(process.pid), peak))
    watched.start()
    out = process.communicate()[0]
    watched.join()
    if process.returncode:
        sys.exit(f"build-store ended with {process.returncode}")
    return peak[0] / 2**30, next(line for line in out.splitlines() if line.startswith("time"))


def _watch(process: psutil.Process, peak: list[int]) -> None:
    while True:
        try:
            peak[0] = max(peak[0], process.memory_info().rss)
        except psutil.Error:
            return
        if process.status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)


def peer(census: Path) -> float:
    """Return cells a second of get_anndata, over at most 40,000 cells."""
    with cellxgene_census.open_soma(uri=str(census)) as soma:
        n_cells = min(soma["census_data"]["homo_sapiens"].obs.count, 4 * PEER_CELLS)
        started = time.perf_counter()
        for start in range(0, n_cells, PEER_CELLS):
            rows = list(range(start, min(start + PEER_CELLS, n_cells)))
            cellxgene_census.get_anndata(soma, "homo_sapiens", X_name="raw", obs_coords=rows)
        return n_cells / (time.perf_counter() - started)


def main() -> None:
    """Print a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[10_000, 50_000, 200_000])
    parser.add_argument("--folder", type=Path, default=Path("data/benchmark_census"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print(f"{len(os.sched_getaffinity(0))} cores")
    for n_cells in arguments.cells:
        census = make_census(arguments.folder, n_cells)
        peak, line = build(census, arguments.folder / "store")
        print(
            f"{n_cells:9,} cells   peak {peak:.2f} GiB   {line}   get_anndata {peer(census):,.0f} cells/s", flush=True
        )


if __name__ == "__main__":
    main()
