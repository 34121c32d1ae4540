"""The verb convert."""

import argparse
import shlex

from hce_jax.errors import ConfigError
from hce_jax.store.convert import convert

PURPOSE = "make a fast cell store of a store in the published format"


def describe(parser: argparse.ArgumentParser) -> None:
    """Add its description and its arguments."""
    parser.description = (
        "Make a cell store, which is smaller and many times as fast to train from, of a store in the published merlin "
        "format. Interrupted, the same command goes on with what is not finished. Expression comes back within 1e-6."
    )
    parser.add_argument("source", metavar="SOURCE", help="folder of the merlin store; it is only read")
    parser.add_argument("destination", metavar="DESTINATION", help="folder of the cell store; must not exist yet")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare the result with the source before it gets its name; where DESTINATION is there already, only "
        "compare it",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="files at a time; by default one for each processor, as far as 4 GiB of memory suffice",
    )


def run(arguments: argparse.Namespace) -> None:
    """Do it, and say what was done."""
    if arguments.workers is not None and arguments.workers < 1:
        raise ConfigError(f"--workers={arguments.workers}: at least one is needed")
    done = convert(arguments.source, arguments.destination, workers=arguments.workers, verify=arguments.verify)
    cells, as_counts = sum(done.cells.values()), done.cells_as_counts
    splits = ", ".join(f"{name} {n_cells:,}" for name, n_cells in done.cells.items())
    print(f"store       {done.store}{', compared with its source: no difference' if done.verified else ''}")
    print(f"cells       {cells:,} ({splits})")
    print(f"size        {done.bytes / 1e6:,.1f} MB in {done.files:,} files, {done.bytes / cells:,.0f} bytes a cell")
    print(f"kept as     counts {as_counts:,} ({as_counts / cells:.2%}), values {cells - as_counts:,}")
    if done.new_cells:
        rate = done.new_cells / done.seconds
        print(f"time        {done.seconds:,.0f} s for {done.new_cells:,} cells, {rate:,.0f} cells/s")
    print(f"next        DATA_PATH={shlex.quote(str(done.store))} python train.py --config configs/tabnet_hce.py")
