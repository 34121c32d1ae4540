"""The verb find-lr."""

import argparse
from pathlib import Path

PURPOSE = "suggest a learning rate for a configuration"


def describe(parser: argparse.ArgumentParser) -> None:
    """Add its description and its arguments."""
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


def run(arguments: argparse.Namespace) -> None:
    """Do it, and say what was found."""
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
