"""The verb reproduce."""

import argparse
from pathlib import Path

from hce_jax import command
from hce_jax.errors import Preempted

PURPOSE = "the paper's study: train, evaluate and compare three models, two losses, four seeds"


def describe(parser: argparse.ArgumentParser) -> None:
    """Add its description and its arguments."""
    parser.description = (
        "Train each model with each loss and seed, evaluate all on held-out donors and new studies, and compare the "
        "losses. Says first what is left to do and about how long it takes. Stopped by whatever, the same command goes "
        "on; what is finished is never done again."
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        required=True,
        help="the study, configs/paper.py; --config.field=value changes a field, --config.tabnet.field=value one of a "
        "model",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the comparison; comparison/ beside the runs if not given"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what is left to do, and how long it takes")


def run(arguments: argparse.Namespace) -> None:
    """Do it, saying what comes, and what came of it."""
    from hce_jax import reproduce  # takes seconds, which the other verbs do not need
    from hce_jax.training.hosts import say
    from hce_jax.verbs import compare

    study = reproduce.Study.of(arguments.config)
    out = arguments.out or study.comparison
    compare.check_place(out)
    parts = reproduce.plan(study)
    for part in parts:
        say(str(part))
    say(f"comparison  {out}")
    say(f"in all      {reproduce.duration(sum(part.seconds for part in parts))} at most")
    if arguments.dry_run:
        return
    try:
        runs = reproduce.train(study)
    except Preempted as told:
        say(str(told))
        return
    with command.sigterm_as_ctrl_c("the same command goes on"):
        reproduce.evaluate_all(study)
        compare.write(runs, out)
