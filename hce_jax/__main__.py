"""The verbs of hce_jax.

    python -m hce_jax VERB ...        or, the same, hce-jax VERB ...
    python -m hce_jax VERB --help     the arguments and flags of a verb

In verbs and flags, hyphens and underscores are alike. The verbs:
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple, NoReturn

from hce_jax import command
from hce_jax.errors import ConfigError
from hce_jax.store import convert

#: How a flag begins that changes a field of the configuration.
_CHANGE = "--config."


class Verb(NamedTuple):
    """A verb: what it is for, and what it does with its arguments.

    Attributes
    ----------
    purpose
        In some words.
    describe
        Adds its description and its arguments to a parser.
    run
        Does it. Where there is an argument ``config``, it is the configuration, with changed fields.
    """

    purpose: str
    describe: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


class _Parser(argparse.ArgumentParser):
    """A parser that raises a user's mistake, for the one line that every command ends with."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _describe_convert(parser: argparse.ArgumentParser) -> None:
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


def _convert(arguments: argparse.Namespace) -> None:
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


def _describe_find_lr(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Find a learning rate, as the published estimator does: train for some steps at ever higher ones, and suggest "
        "the one where the loss, smoothed, falls most steeply. Look at the plot too: on either side of the suggestion "
        "the loss should fall. No run is begun and no checkpoint written."
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        required=True,
        help="the configuration, a file in configs/; --config.field=value changes a field of it, as for train.py",
    )
    parser.add_argument("--min-lr", type=float, default=1e-8, metavar="LR", help="the first one; 1e-8 if not given")
    parser.add_argument("--max-lr", type=float, default=1.0, metavar="LR", help="the last one; 1 if not given")
    parser.add_argument("--num-training", type=int, default=100, metavar="N", help="steps; 100 if not given")
    parser.add_argument(
        "--plot", type=Path, metavar="PATH", help="the picture to write; find_lr_MODEL.png here if not given"
    )


def _find_lr(arguments: argparse.Namespace) -> None:
    from hce_jax.training import find_lr  # takes seconds, which the other verbs do not need
    from hce_jax.training.config import check_config

    config, n_steps = arguments.config, arguments.num_training
    check_config(config.to_dict())
    plot = arguments.plot or Path(f"find_lr_{config.model_type}.png")
    find_lr.check_plot_path(plot)
    found = find_lr.find_learning_rate(config, arguments.min_lr, arguments.max_lr, n_steps)
    find_lr.learning_rate_plot(found, plot, config.model_type)
    n_taken, diverged = len(found.rates), ": then the loss diverged" if len(found.rates) < n_steps else ""
    print(f"steps       {n_taken:,} of {n_steps:,}, learning rate up to {found.rates[-1]:.1e}{diverged}")
    if found.suggestion is None:
        print("suggested   none: too few steps to see where the loss falls; lower --min-lr, or look for unusual values")
    else:
        print(f"suggested   --config.learning_rate={found.suggestion:.1e}")
    print(f"plot        {plot}")


VERBS = {
    "convert": Verb("make a fast cell store of a store in the published format", _describe_convert, _convert),
    "find-lr": Verb("suggest a learning rate for a configuration", _describe_find_lr, _find_lr),
}


def main() -> None:
    """Run the verb that the command line names.

    Examples
    --------
    >>> sys.argv[1:] = ["convert", "merlin", "cells"]  # doctest: +SKIP
    >>> main()  # doctest: +SKIP
    """
    with command.exit_codes():
        name, arguments = _hyphened(sys.argv[1:])
        if name in ("--help", "-h", "help"):
            print(__doc__, *(f"    {name:12}{verb.purpose}" for name, verb in VERBS.items()), sep="\n")
            return
        if name not in VERBS:
            near = get_close_matches(name, VERBS, n=1) or VERBS
            problem = f"no verb {name!r}" if name else "a verb is needed"
            raise ConfigError(f"{problem}; there is {', '.join(near)} (see python -m hce_jax --help)")
        parser = _Parser(prog=f"python -m hce_jax {name}", allow_abbrev=False)
        VERBS[name].describe(parser)
        VERBS[name].run(_parsed(parser, arguments))


def _hyphened(arguments: list[str]) -> tuple[str, list[str]]:
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    flags = [each.partition("=") for each in rest]
    rest = [f.replace("_", "-") + eq + value if _is_own_flag(f) else f + eq + value for f, eq, value in flags]
    return verb.replace("_", "-"), rest


def _is_own_flag(name: str) -> bool:
    return name.startswith("--") and not name.startswith(_CHANGE)


def _parsed(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parse; where the verb has --config, give the configuration in place of its file."""
    changes = [each for each in arguments if each.startswith(_CHANGE)]
    parsed = parser.parse_args([each for each in arguments if each not in changes])
    if "config" in parsed:
        parsed.config = command.read_config(parsed.config, changes)
    elif changes:
        parser.error(f"unrecognized arguments: {' '.join(changes)}")
    return parsed


if __name__ == "__main__":
    main()
