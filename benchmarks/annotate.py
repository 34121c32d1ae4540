"""What annotating one's own cells costs, whole processes: hce_jax's TabNet beside CellTypist, and memory by file size.

    python -m benchmarks.annotate                                the table of the documentation (hce_jax[bench])
    python -m benchmarks.annotate --cells 50000 200000 500000 --peers          ours alone, as the file grows
    python -m benchmarks.annotate --n_cells 1024 --cells 2048 --sample 500     small, to see that it runs

Simulated cells of 19,331 genes and 164 types (benchmarks/input.py), as many as --n_cells and then the same again until
a file has --cells. Both models are trained on them, TabNet for --epochs, CellTypist (one-versus-rest, SGD, ten passes)
on --sample of them; neither is trained to the end, for its speed hangs on its size, not on its weights. How sparse
TabNet's masks are by then is said.

Ours is `python -m hce_jax annotate` of a file of raw counts: it writes a copy with labels and embedding, and a report.
CellTypist is given the file that it wants, of log1p values, and writes the labels alone: `celltypist.annotate` on all
cells, which it makes dense, and on 10,000 at a time. (A model trained with `with_mean=False` would keep them sparse,
but CellTypist 1.7.1 fails with it under SciPy 1.17.) What does not fit into the memory that is free at the start is
said not to. Times are those of the process from its start to its end, on --cpus cores, everything it reads and writes
included; files are in the page cache, if they fit. Memory is the most that was resident at a time (maximum resident set
size).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import psutil
import scipy.sparse as sp

from benchmarks.ensemble import make_store
from benchmarks.input import N_GENES
from hce_jax.checkpoint import load_model
from hce_jax.preprocess import normalize_log1p

#: Cells that CellTypist is given at a time, by what the table calls it; 0: all.
PEERS = {"CellTypist": 0, "CellTypist, 10,000 cells at a time": 10_000}
#: Of the memory that is free, what a peer must leave alone.
_SPARE = 2 * 2**30
#: Exit code of a peer that needs more.
_TOO_LARGE = 3
#: Cells whose masks are looked at.
_MASKED = 256


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", type=int, default=[100_000], help="cells of the files")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--n_cells", type=int, default=21_504, help="different cells, which are repeated")
    parser.add_argument("--epochs", type=int, default=2, help="of TabNet's training")
    parser.add_argument("--sample", type=int, default=4_000, help="cells that CellTypist is trained on")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where stores, models and files are kept for the next time")
    parser.add_argument("--json", type=Path, help="file for all rows")
    parser.add_argument("--as_peer", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.as_peer:
        peer(*args.as_peer)
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cpus])  # and all that it starts
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(args, args.folder or Path(scratch))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Make what is missing, run everything once, and print a row for each."""
    folder.mkdir(parents=True, exist_ok=True)
    make_store(folder, args.n_cells)
    run, rows = trained(folder, args), []
    print(f"{args.cpus} CPU cores; {N_GENES:,} genes, {masks_of(folder, run)}\n")
    print(
        "| cells | | time, s | cells a second | CPU time, s | peak memory, MB |\n| --- | --- | --- | --- | --- | --- |"
    )
    for n_cells in args.cells:
        out = folder / f"annotated_{n_cells}.h5ad"
        ours = [sys.executable, "-m", "hce_jax", "annotate", str(cells_file(folder, n_cells)), "--overwrite"]
        ours += ["--checkpoint", str(run), "--confidence=0.5", "-o", str(out)]
        contenders = {"hce_jax, TabNet": ours}
        for name in args.peers:
            model, log1p = peer_model(folder, args.sample), cells_file(folder, n_cells, log1p=True)
            contenders[name] = as_peer("annotate", model, log1p, folder / f"labels_{n_cells}.csv", PEERS[name])
        for name, command in contenders.items():
            row = {"cells": n_cells, "what": name} | watched(command)
            rows.append(row)
            print(as_line(row), flush=True)
        out.unlink()  # as large as what it is a copy of
    return rows


def as_line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    numbers = [row["seconds"], row["cells"] / row["seconds"], row["cpu_seconds"], row["peak_mb"]]
    said = [f"{number:,.0f}" for number in numbers] if row["failed"] is None else [row["failed"], "", "", ""]
    return f"| {row['cells']:,} | {row['what']} | {' | '.join(said)} |"


def watched(command: list[str]) -> dict[str, Any]:
    """Run a command, and return what it took; that a peer has not memory enough is said, anything else is the end."""
    with tempfile.TemporaryFile("w+") as said:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        lines = said.read().splitlines()
    if process.returncode not in (0, _TOO_LARGE):
        sys.exit("\n".join([*lines[-20:], f"{' '.join(command)} ended with {process.returncode}"]))
    failed = lines[-1] if process.returncode else None
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": usage.ru_maxrss / 1024, "failed": failed}


# --- files and models -------------------------------------------------------------------------------------------------


def counts_of(folder: Path) -> tuple[sp.csr_array, np.ndarray]:
    """Return counts (n, g) and types of all different cells."""
    data, indices, indptr, labels = (
        np.load(folder / "counts" / f"{name}.npy") for name in ("data", "indices", "indptr", "labels")
    )
    return sp.csr_array((data.astype(np.float32), indices, indptr), shape=(len(labels), N_GENES)), labels


def cells_file(folder: Path, n_cells: int, log1p: bool = False) -> Path:
    """Return a file of so many cells, raw counts or log1p to 10,000; written when it is not there yet."""
    path = folder / f"{'log1p' if log1p else 'counts'}_{n_cells}.h5ad"
    if not path.exists():
        x = counts_of(folder)[0]
        x = sp.csr_matrix(normalize_log1p(x) if log1p else x)
        aside = path.with_suffix(".partial")
        obs, var = (pd.DataFrame(index=[f"{what}{number}" for number in range(count)])
                    for what, count in (("cell", n_cells), ("SIM", N_GENES)))  # fmt: skip
        anndata.AnnData(obs=obs, var=var).write_h5ad(aside)
        with h5py.File(aside, "a") as file:
            anndata.io.write_elem(file, "X", x[: min(n_cells, x.shape[0])])
            for start in range(x.shape[0], n_cells, x.shape[0]):
                anndata.io.sparse_dataset(file["X"]).append(x[: min(n_cells - start, x.shape[0])])
        aside.rename(path)
    return path


def trained(folder: Path, args: argparse.Namespace) -> Path:
    """Return the run of TabNet, trained when it is not there yet."""
    logs = folder / "runs"
    if not (done := sorted(logs.glob("*/*/version_*/result.json"))):
        command = [sys.executable, "train.py", "--config=configs/tabnet_hce.py", f"--config.max_epochs={args.epochs}"]
        command += [f"--config.data_path={folder / 'cells'}", f"--config.log_dir={logs}"]
        command += ["--config.batch_size=512", "--config.augment_training_data=false"]
        subprocess.run(command, cwd=Path(__file__).parents[1], check=True, stdout=sys.stderr)
        done = sorted(logs.glob("*/*/version_*/result.json"))
    return done[0].parent


def masks_of(folder: Path, run: Path) -> str:
    """Say how many genes a mask of TabNet lets through, in the mean."""
    x = normalize_log1p(counts_of(folder)[0][:_MASKED])
    masks = load_model(run).explain(x, _MASKED).masks
    return f"of which a cell's mask lets {sum(mask.nnz for mask in masks) / len(masks) / x.shape[0]:,.0f} through"


def peer_model(folder: Path, sample: int) -> Path:
    """Return a model of CellTypist, trained when it is not there yet."""
    path = folder / "celltypist.pkl"
    if not path.exists():
        subprocess.run(as_peer("train", path, folder, sample), check=True, stdout=sys.stderr)
    return path


# --- the process of a peer --------------------------------------------------------------------------------------------


def as_peer(*what: Any) -> list[str]:
    """Return the command of a process of CellTypist's own."""
    return [sys.executable, "-m", "benchmarks.annotate", "--as_peer", *map(str, what)]


def peer(task: str, model: str, *rest: str) -> None:
    """Train a model of CellTypist, or annotate with one."""
    limit = psutil.virtual_memory().available - _SPARE
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # rather an error of its own than the end of another
    try:
        if task == "train":
            train_peer(model, Path(rest[0]), int(rest[1]))
        else:
            annotate_by_peer(model, *rest)
    except MemoryError:
        print(f"does not fit into {limit / 2**30:.0f} GiB")
        sys.exit(_TOO_LARGE)


def train_peer(model: str, folder: Path, sample: int) -> None:
    """Train on the first cells."""
    import celltypist

    counts, types = counts_of(folder)
    var = pd.DataFrame(index=[f"SIM{gene}" for gene in range(N_GENES)])
    adata = anndata.AnnData(sp.csr_matrix(normalize_log1p(counts[:sample])), var=var)
    celltypist.train(adata, types[:sample].astype(str), use_SGD=True, max_iter=10, n_jobs=-1).write(model)


def annotate_by_peer(model: str, cells: str, labels: str, at_a_time: str) -> None:
    """Read a file, all of it or some cells at a time, and write labels."""
    import celltypist

    adata, step = anndata.read_h5ad(cells, backed="r" if int(at_a_time) else None), int(at_a_time)
    starts = range(0, adata.n_obs, step or adata.n_obs)
    parts = (adata[start : start + step].to_memory() for start in starts) if step else [adata]
    found = [celltypist.annotate(part, model=model).predicted_labels for part in parts]
    pd.concat(found).to_csv(labels)


if __name__ == "__main__":
    main()
