"""The learning-rate range test: a few steps at rising learning rates, and the one where the loss falls most steeply."""

import itertools
import math
import os
from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from hce_jax.errors import ConfigError
from hce_jax.files import written_aside
from hce_jax.progress import progress
from hce_jax.store import open_store
from hce_jax.training.config import member_configs, resolve_config
from hce_jax.training.hosts import say
from hce_jax.training.trainer import Trainer
from hce_jax.typing import Float

#: Fewer steps are too far apart to show where the loss falls.
_MIN_STEPS = 20
#: Share of the earlier steps in the running mean of the loss.
_BETA = 0.98
#: The test ends when the running mean is this many times its lowest value.
_DIVERGED = 4.0
#: Steps that are not suggested: the first, whose means are too low, and the last, where the loss may have diverged.
_SKIPPED_FIRST, _SKIPPED_LAST = 10, 1

_LINE_COLOUR, _DOT_COLOUR, _GREY = "#3b6fa0", "#c0392b", "#bbbbbb"
_PICTURES = (".png", ".pdf", ".svg")


class LearningRates(NamedTuple):
    """What a range test found; n steps were taken.

    Attributes
    ----------
    rates
        Learning rate of each step.
    losses
        Training loss of each step, before its update, as a running mean; only the last one may be no finite number.
    suggestion
        The rate where that mean falls most steeply; None if it diverged after too few steps to tell.
    """

    rates: Float[np.ndarray, "n"]
    losses: Float[np.ndarray, "n"]
    suggestion: float | None


def find_learning_rate(
    config: ConfigDict, min_lr: float = 1e-8, max_lr: float = 1.0, n_steps: int = 100
) -> LearningRates:
    """Train for some steps, each at a higher learning rate than the one before, and look at the loss.

    The published estimator's ``find_lr``, that is ``Tuner.lr_find`` of Lightning 2.4 with its defaults; from 2.5.3 on
    Lightning takes the slope against the learning rate itself, which favours the lowest ones. The steps are those of
    the run, from its first batch on, but for the learning rate and its schedule, which are not used. Of several seeds
    or losses only the first model is trained. Nothing is written.

    Parameters
    ----------
    config
        From ``configs/``.
    min_lr, max_lr
        Learning rate of the first and the last step.
    n_steps
        Steps to take; fewer are taken if the loss diverges. They go on with the next epoch where one does not suffice.

    Raises
    ------
    UserError
        If the configuration, the range or the store cannot be used.

    Examples
    --------
    >>> from configs import linear_hce
    >>> find_learning_rate(linear_hce.get_config()).suggestion  # doctest: +SKIP
    0.0021
    """
    _check_range(min_lr, max_lr, n_steps)
    config = member_configs(resolve_config(config))[0]
    config.cells_in = "disk"  # a few steps do not repay reading all cells; the batches are the same
    rates = rising_rates(min_lr, max_lr, n_steps)
    table = jnp.asarray(rates, jnp.float32)
    trainer = Trainer([config], open_store(config.data_path), schedule=lambda step: table[step])
    lines = trainer.summary().splitlines()
    say("\n".join(line for line in lines if not line.startswith("training")))  # epochs and steps are those of a run
    with closing(_losses(trainer, n_steps)) as losses:
        return range_test(rates, losses)


def _check_range(min_lr: float, max_lr: float, n_steps: int) -> None:
    if not 0 < min_lr < max_lr < math.inf:
        raise ConfigError(f"learning rates from {min_lr} to {max_lr}: both must be finite, and 0 < min_lr < max_lr")
    if n_steps < _MIN_STEPS:
        raise ConfigError(f"{n_steps} steps are too few to see where the loss falls; at least {_MIN_STEPS} are needed")


def rising_rates(min_lr: float, max_lr: float, n_steps: int) -> Float[np.ndarray, "n"]:
    """Return min_lr^(1 - r) max_lr^r for r = 0, 2/n, 3/n, ..., 1: as published, the first stride is a double one.

    Examples
    --------
    >>> [round(float(rate), 4) for rate in rising_rates(0.0001, 1.0, 4)]
    [0.0001, 0.01, 0.1, 1.0]
    """
    r = np.arange(1, n_steps + 1) / n_steps
    r[0] = 0
    return min_lr ** (1 - r) * max_lr**r


def range_test(rates: Float[np.ndarray, "m"], losses: Iterable[float]) -> LearningRates:
    """Follow the losses of steps at these rates until they diverge, and suggest a rate.

    The loss is smoothed by a running mean, m_n = (0.98 s_(n-1) + 0.02 loss_n) / (1 - 0.98^(n + 1)), s_n the numerator.
    It has diverged where m_n is above four times its lowest value before, or no finite number. As published, the
    exponent is n + 1, though n would be right: the first means are too low, by a half, by a third, ..., and still by
    7 % at the eleventh step, the first that can be suggested. The last one cannot: its mean may have diverged.

    Parameters
    ----------
    rates
        Learning rate of each step.
    losses
        Training loss of each step before its update; none is taken after the mean diverged.

    Examples
    --------
    >>> found = range_test(rising_rates(1e-4, 1.0, 40), [3.0] * 20 + [1.0] * 20)
    >>> round(found.suggestion, 4)
    0.0126
    """
    means: list[float] = []
    weighted, lowest = 0.0, math.inf
    for n, loss in enumerate(losses, start=1):
        weighted = _BETA * weighted + (1 - _BETA) * loss
        means.append(weighted / (1 - _BETA ** (n + 1)))
        if not math.isfinite(means[-1]) or means[-1] > _DIVERGED * lowest:
            break
        lowest = min(lowest, means[-1])
    seen = means[_SKIPPED_FIRST:-_SKIPPED_LAST]
    suggestion = float(rates[_SKIPPED_FIRST + np.gradient(seen).argmin()]) if len(seen) >= 2 else None
    return LearningRates(rates[: len(means)], np.array(means), suggestion)


def _losses(trainer: Trainer, n_steps: int) -> Generator[float, None, None]:
    for epoch, first in enumerate(range(0, n_steps, trainer.steps_per_epoch)):
        n_here = min(trainer.steps_per_epoch, n_steps - first)
        with progress(trainer.training_batches(epoch), n_here, f"epoch {epoch}") as bar:
            for batch in itertools.islice(bar, n_here):
                yield float(trainer.step(batch).loss[0])


def check_plot_path(path: Path) -> None:
    """Check that a picture can be written there, before the work that it shows.

    Raises
    ------
    ConfigError
        If it cannot.

    Examples
    --------
    >>> check_plot_path(Path("plot.txt"))
    Traceback (most recent call last):
    hce_jax.errors.ConfigError: plot.txt is no name for a picture; it must end in .png or .pdf or .svg
    """
    if path.suffix not in _PICTURES:
        raise ConfigError(f"{path} is no name for a picture; it must end in {' or '.join(_PICTURES)}")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a picture that is not there yet")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{path} cannot be written: the folder {path.parent} does not exist, or is not yours to write"
        )


def learning_rate_plot(found: LearningRates, path: Path, title: str) -> None:
    """Draw the loss against the learning rate: the first means, which are too low, in grey; a dot at the suggestion.

    Parameters
    ----------
    found
        Of :func:`find_learning_rate`.
    path
        The picture to write: PNG, PDF or SVG.
    title
        Above it.

    Examples
    --------
    >>> import tempfile
    >>> found = LearningRates(np.array([1e-3, 1e-2, 1e-1]), np.array([3.0, 2.0, 4.0]), 1e-2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     learning_rate_plot(found, Path(folder) / "plot.png", "example")
    ...     [path.name for path in Path(folder).iterdir()]
    ['plot.png']
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(found.rates[: _SKIPPED_FIRST + 1], found.losses[: _SKIPPED_FIRST + 1], color=_GREY)
    axes.plot(found.rates[_SKIPPED_FIRST:], found.losses[_SKIPPED_FIRST:], color=_LINE_COLOUR)
    if found.suggestion is not None:
        there = found.suggestion, found.losses[found.rates == found.suggestion][0]
        axes.plot(*there, "o", markersize=7, color=_DOT_COLOUR)
        axes.annotate(f"{found.suggestion:.1e}", there, (7, 4), textcoords="offset points", color=_DOT_COLOUR)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate", fontsize=9)
    axes.set_ylabel("training loss, running mean (grey: begins too low)", fontsize=9)
    axes.set_title(title, loc="left", fontsize=10)
    axes.tick_params(labelsize=8)
    axes.grid(linewidth=0.4, color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=150)
