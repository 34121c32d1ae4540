"""What an evaluation costs: metrics beside the published way, prediction beside PyTorch, memory at two sizes.

    python -m benchmarks.evaluate                                   all three (pip install 'hce_jax[bench]')
    python -m benchmarks.evaluate --parts metrics --predictions 3400000
    python -m benchmarks.evaluate --parts predict --models linear mlp tabnet
    python -m benchmarks.evaluate --parts memory --sizes 50000 500000
    python -m benchmarks.evaluate --predictions 5000 --n_cells 512 --sizes 512 1024 --turns 1    small, to see it run

Metrics: random predictions of 164 types, counted and made into every table. The published way is a loop over the cells
that corrects labels, and scikit-learn's report; here it makes only the two tables that the published code has.
Prediction: simulated cells of 19,331 genes (benchmarks/input.py) from a cell store, as evaluate.py reads them, beside
PyTorch on batches that lie dense in memory (reading and unpacking costs it nothing) and on the same store's cells,
read and made dense by one thread. Contenders take turns in one process; medians of the turns, in cells a second.
Memory: what evaluate.py does, with the parquet file of every cell's probabilities, in a process of its own for each
size; the peak of what the process itself holds (RssAnon), which does not count files in the page cache.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from flax import nnx
from sklearn.metrics import classification_report

from benchmarks.ensemble import make_store
from benchmarks.input import repeat_store
from benchmarks.step import HYPER_PARAMETERS, torch_model
from hce_jax.evaluation.cells import StoreCells
from hce_jax.evaluation.decoders import DECODERS
from hce_jax.evaluation.evaluate import Job, Settings, evaluate
from hce_jax.evaluation.predict import classified
from hce_jax.evaluation.reports import RULES, make_reports
from hce_jax.evaluation.tally import GROUP_COLUMNS, Tally
from hce_jax.hierarchy import reachability_from_edges
from hce_jax.models import build_model, split_model
from hce_jax.predictor import ModelCard, Predictor
from hce_jax.store import Split, open_store
from hce_jax.typing import resolve_precision

PARTS = ("metrics", "predict", "memory")
BATCH = 2048


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--predictions", type=int, default=3_400_000)
    parser.add_argument("--types", type=int, default=164)
    parser.add_argument("--models", nargs="+", choices=("linear", "mlp", "tabnet"), default=("linear", "mlp", "tabnet"))
    parser.add_argument("--n_cells", type=int, default=21_504)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", type=int, default=(50_000, 500_000), help="cells, for memory")
    parser.add_argument("--folder", type=Path, help="where the store is kept for the next time")
    parser.add_argument("--watched", nargs=2, help=argparse.SUPPRESS)  # store and results: one size of memory
    args = parser.parse_args(arguments)
    if args.watched:
        watched_evaluation(*map(Path, args.watched))
        return
    if "metrics" in args.parts:
        measure_metrics(args)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        if "predict" in args.parts:
            measure_prediction(args, folder)
        if "memory" in args.parts:
            measure_memory(args, folder)


def measure_metrics(args: argparse.Namespace) -> None:
    """Count predictions and make the tables, in our way and in the published one."""
    rng = np.random.default_rng(0)
    parents = [(int(rng.integers(child)), child) for child in range(1, args.types) if rng.random() < 0.7]
    reachability = reachability_from_edges(args.types, parents)
    labels = rng.integers(0, args.types, args.predictions)
    predictions = np.where(rng.random(len(labels)) < 0.7, labels, rng.integers(0, args.types, len(labels)))
    confidence = rng.random(len(labels)).astype(np.float32)
    sizes = dict(zip(GROUP_COLUMNS, (10, 300, 80, 200, 50, 5_000), strict=True))
    groups = {column: rng.integers(0, size, len(labels)) for column, size in sizes.items()}

    def ours() -> pd.DataFrame:
        tallies = {name: Tally(reachability, sizes) for name in DECODERS}  # each decoder's predictions are counted
        for start in range(0, len(labels), BATCH):
            part = slice(start, start + BATCH)
            for tally in tallies.values():
                tally.add(
                    labels[part],
                    predictions[part],
                    confidence[part],
                    {name: each[part] for name, each in groups.items()},
                )
        names = {column: [str(code) for code in range(size)] for column, size in sizes.items()}
        return make_reports(tallies, "argmax", RULES["id"], names, backoff={"confidence": 0.5}).per_type

    def published() -> pd.DataFrame:
        below = {label: np.flatnonzero(row) for label, row in enumerate(reachability)}
        corrected = [
            label if prediction in below[label] else prediction
            for label, prediction in zip(labels, predictions, strict=True)
        ]
        return pd.DataFrame(classification_report(labels, corrected, output_dict=True, zero_division=0)).T.iloc[:-3]

    print(f"Metrics of {len(labels):,} predictions of {args.types} types\n\n| | seconds |\n| --- | --- |")
    tables = []
    for name, way in (("all tables, three decoders", ours), ("the published two tables, its way", published)):
        began = time.perf_counter()
        tables.append(way())
        print(f"| {name} | {time.perf_counter() - began:.1f} |", flush=True)
    np.testing.assert_allclose(*tables)
    print()


def predictor_of(model_type: str, split: Split) -> Predictor:
    """Return a model with initial weights."""
    side, config = split.side, {"model_type": model_type, "precision": "auto", **HYPER_PARAMETERS}
    precision = resolve_precision("auto")
    model = build_model(config, side.n_genes, side.n_types, nnx.Rngs(0), precision=precision)
    loss = {"use_hierarchical_loss": True, "epsilon": 1e-6}
    card = ModelCard(config, side.gene_ids, side.gene_names, side.labels, None, None, "", loss, "", 0, 0, {})
    return Predictor(Path(model_type), card, side.reachability, *split_model(model))


def measure_prediction(args: argparse.Namespace, folder: Path) -> None:
    """Let the contenders take turns."""
    split = make_store(folder, args.n_cells).split("train")
    print(f"Prediction, {split.side.n_genes:,} genes, {split.side.n_types} types, cells a second\n")
    print("| model | hce_jax, from the cell store | torch, dense in memory | torch, from the cell store |")
    print("| --- | --- | --- | --- |")
    for model_type in args.models:
        n_cells = split.n_cells if model_type != "tabnet" else min(split.n_cells, 3 * BATCH)
        contenders = [hce_jax_run(model_type, split), *torch_runs(args, model_type, split)]
        times: list[list[float]] = [[] for _ in contenders]
        for contender in contenders:
            contender(min(n_cells, BATCH))  # compiled
        for _ in range(args.turns):
            for contender, own in zip(contenders, times, strict=True):
                began = time.perf_counter()
                own.append(contender(n_cells) / (time.perf_counter() - began))
        rates = " | ".join(f"{statistics.median(own):,.0f} ({min(own):,.0f}-{max(own):,.0f})" for own in times)
        print(f"| {model_type} | {rates} |", flush=True)
    print()


def hce_jax_run(model_type: str, split: Split) -> Callable[[int], int]:
    """Return what reads so many cells and classifies them, and gives how many they were."""
    cells, predictor = StoreCells(split), predictor_of(model_type, split)

    def run(n_cells: int) -> int:
        done, batches = 0, classified(cells, [predictor], BATCH)
        for batch in batches:
            done += len(batch.block)
            if done >= n_cells:
                break
        batches.close()
        return done

    return run


def torch_runs(args: argparse.Namespace, model_type: str, split: Split) -> list[Callable[[int], int]]:
    """Return the same by PyTorch: on a batch that lies in memory, and on the cells of the store."""
    import torch

    model = torch_model(argparse.Namespace(genes=split.side.n_genes, types=split.side.n_types), model_type).eval()
    blocks_of_batch = BATCH // int(split.block_sizes.max())

    def dense(first: int) -> torch.Tensor:
        blocks = range(first, min(first + blocks_of_batch, len(split.block_sizes)))
        return torch.from_numpy(np.concatenate([split.read_block(index).x.toarray() for index in blocks]))

    def classify(x: torch.Tensor) -> int:
        with torch.inference_mode():
            output = model(x)
            return len(torch.softmax(output[0] if isinstance(output, tuple) else output, 1).numpy())

    in_memory = dense(0)

    def from_memory(n_cells: int) -> int:
        return sum(classify(in_memory) for _ in range(max(n_cells // len(in_memory), 1)))

    def from_store(n_cells: int) -> int:
        done, first = 0, 0
        while done < n_cells:
            done += classify(dense(first))
            first = (first + blocks_of_batch) % len(split.block_sizes)
        return done

    return [from_memory, from_store]


def measure_memory(args: argparse.Namespace, folder: Path) -> None:
    """Evaluate stores of several sizes, each in a process of its own."""
    make_store(folder, args.n_cells)
    print("Memory of an evaluation (linear), its parquet file included\n")
    print(
        "| cells | peak RssAnon, MB | cells a second, all of it | parquet, MB |\n| --- | --- | --- | --- |", flush=True
    )
    for n_cells in args.sizes:
        store, results = repeat_store(folder, folder / "merlin", n_cells), folder / f"results_{n_cells}"
        command = [sys.executable, "-m", "benchmarks.evaluate", "--watched", str(store), str(results)]
        subprocess.run(command, check=True)


def watched_evaluation(store: Path, results: Path) -> None:
    """Evaluate a linear model on a store's cells, while a thread watches the memory of this process."""
    split = open_store(store).split("train")
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            lines = Path("/proc/self/status").read_text().splitlines()
            peak[0] = max(peak[0], next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    job = Job(predictor_of("linear", split), results)
    evaluate(StoreCells(split), [job], Settings("ood", detailed=True))
    rate = split.n_cells / (time.perf_counter() - began)
    ended.set()
    watcher.join()
    parquet = results / "linear_detailed_results.parquet"
    print(
        f"| {split.n_cells:,} | {peak[0] / 1024:,.0f} | {rate:,.0f} | {parquet.stat().st_size / 1e6:,.0f} |", flush=True
    )
    parquet.unlink()


if __name__ == "__main__":
    main()
