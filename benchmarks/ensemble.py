"""What several models trained together cost, beside one, and beside as many trained one after the other.

    python -m benchmarks.ensemble                               linear models, batch 2,048, 19,331 genes
    python -m benchmarks.ensemble --models mlp tabnet --steps 2
    python -m benchmarks.ensemble --n_cells 512 --batch_size 64 --steps 2      small, to see that it runs

Simulated cells (benchmarks/input.py) lie in a cell store; a step is all of it: reading, decoding, the batch to the
device, unpacking, the training step. One member and several take turns, some steps each, in one process; the table
gives the median of the turns. On the left stands what the members would cost alone, one after the other.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from benchmarks.input import N_TYPES, make_stores
from configs import linear_hce, mlp_hce, tabnet_hce
from hce_jax.store import Store, convert, open_store
from hce_jax.training.config import member_configs
from hce_jax.training.trainer import Trainer

CONFIGS = {"linear": linear_hce, "mlp": mlp_hce, "tabnet": tabnet_hce}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=["linear"])
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=2048)
    parser.add_argument("--n_cells", type=int, default=21_504)
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the store is kept for the next time")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        store = make_store(args.folder or Path(scratch), args.n_cells)
        device = jax.devices()[0].device_kind
        print(
            f"{device}, batch {args.batch_size:,}, {store.side.n_genes:,} genes, {N_TYPES} types, one stream of cells\n"
        )
        print(f"| model | {args.members} alone, s a step | {args.members} together | one | together / one |")
        print("| --- | --- | --- | --- | --- |")
        for model in args.models:
            one, several = measure(args, store, model)
            alone = f"{args.members * one:.3f}"
            print(f"| {model} | {alone} | {several:.3f} | {one:.3f} | {several / one:.2f} |", flush=True)


def make_store(folder: Path, n_cells: int) -> Store:
    """Return the cell store of simulated cells, made when it is not there yet."""
    if not (folder / "cells").exists():
        folder.mkdir(exist_ok=True)
        make_stores(folder, n_cells)
        (folder / "merlin" / "val").mkdir(exist_ok=True)
        first = folder / "merlin" / "val" / "part.0.parquet"
        first.symlink_to((folder / "merlin" / "train" / "part.0.parquet").resolve())
        convert(folder / "merlin", folder / "cells")
    return open_store(folder / "cells")


def measure(args: argparse.Namespace, store: Store, model: str) -> tuple[float, float]:
    """Return the seconds a step takes with one member and with several."""
    contenders = [steps_of(args, store, model, n_members) for n_members in (1, args.members)]
    times: list[list[float]] = [[], []]
    for _ in range(args.turns):
        for contender, own in zip(contenders, times, strict=True):
            own.append(next(contender))
    one, several = map(statistics.median, times)
    return one, several


def steps_of(args: argparse.Namespace, store: Store, model: str, n_members: int) -> Iterator[float]:
    """Train for ever; yield the seconds a step took, in the mean over each turn."""
    config = CONFIGS[model].get_config()
    config.update(data_path=str(store.side.path), batch_size=args.batch_size, augment_training_data=False)
    config.seeds = tuple(range(n_members))
    trainer = Trainer(member_configs(config), store)

    def batches() -> Iterator[object]:
        epoch = 0
        while True:
            yield from trainer.training_batches(epoch)
            epoch += 1

    stream = batches()
    for _ in range(2):  # compiled, and the first windows read
        trainer.step(next(stream))  # type: ignore[arg-type]
    while True:
        jax.block_until_ready(trainer.state)
        began = time.perf_counter()
        for _ in range(args.steps):
            trainer.step(next(stream))  # type: ignore[arg-type]
        jax.block_until_ready(trainer.state)
        yield (time.perf_counter() - began) / args.steps


if __name__ == "__main__":
    main()
