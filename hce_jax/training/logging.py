"""What a run writes and shows: its description files, TensorBoard scalars, a progress bar, a line per epoch."""

import importlib.metadata
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import yaml
from tensorboardX import SummaryWriter
from tqdm import tqdm

from hce_jax import __version__
from hce_jax.errors import TrainingError
from hce_jax.files import written_aside
from hce_jax.metrics import f1_from_counts
from hce_jax.runs import CONFIG_FILE
from hce_jax.training.steps import Evaluation, StepMetrics

#: Seconds between two readings of the step's metrics for the progress bar.
_REFRESH_SECONDS = 0.5
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def write_description(run: Path, config: Mapping[str, Any], hyper_parameters: Mapping[str, Any]) -> None:
    """Write hparams.yaml (of the model), parameters.json (the flags) and config.json (all, with versions).

    Examples
    --------
    >>> write_description(run, config, {"gene_dim": 19331, "type_dim": 164})  # doctest: +SKIP
    """
    versions = {"hce_jax": __version__} | {name: importlib.metadata.version(name) for name in _PACKAGES}
    described = {"config": dict(config), "versions": versions}
    for name, text in (
        ("hparams.yaml", yaml.safe_dump(dict(hyper_parameters), sort_keys=True)),
        ("parameters.json", json.dumps(dict(config), indent=4)),
        (CONFIG_FILE, json.dumps(described, indent=2, sort_keys=True)),
    ):
        with written_aside(run / name) as aside:
            aside.write_text(text)


class EpochMeter:
    """Collects and shows the metrics of an epoch's steps.

    Parameters
    ----------
    writer
        TensorBoard.
    schedule
        Learning rate by step.
    every
        Steps from one TensorBoard point to the next.
    batch_size
        Cells of a step.
    """

    def __init__(self, writer: SummaryWriter, schedule: optax.Schedule, every: int, batch_size: int):
        self._writer, self._schedule, self._every, self._batch_size = writer, schedule, every, batch_size
        self._counts: jax.Array | int = 0
        self._losses: list[float] = []
        self._started = self._shown = time.perf_counter()
        self.learning_rate = 0.0
        self.cells_per_second = 0.0

    def read(self, step: int, metrics: StepMetrics, bar: tqdm) -> None:
        """Read the metrics of step number ``step`` (from 0) and show them.

        Raises
        ------
        TrainingError
            If the loss is not finite.
        """
        self._counts = self._counts + metrics.counts
        self._losses.append(float(metrics.loss))
        if not math.isfinite(self._losses[-1]):
            raise TrainingError(
                f"the training loss became {self._losses[-1]} at step {step}; lower --config.learning_rate, or look "
                "for unusual values in the data"
            )
        if (step + 1) % self._every == 0:
            self._log(step, metrics)
        now = time.perf_counter()
        if not bar.disable and now - self._shown > _REFRESH_SECONDS:
            rate = len(self._losses) * self._batch_size / (now - self._started)
            text = f"loss {self._losses[-1]:.3f}, F1 {self.f1('macro'):.3f}, {rate:,.0f} cells/s"
            bar.set_postfix_str(text, refresh=False)
            self._shown = now

    def finish(self, last_step: int) -> None:
        """Fix the epoch's speed and learning rate; call it when the last step has been read."""
        self.cells_per_second = len(self._losses) * self._batch_size / (time.perf_counter() - self._started)
        self.learning_rate = float(self._schedule(last_step))

    def _log(self, step: int, metrics: StepMetrics) -> None:
        counts = np.asarray(metrics.counts)
        for tag, value in (
            ("train_loss", self._losses[-1]),
            ("train_f1_macro_step", f1_from_counts(counts, "macro")),
            ("train_f1_micro_step", f1_from_counts(counts, "micro")),
            ("lr-AdamW", self._schedule(step)),
        ):
            self._writer.add_scalar(tag, float(value), step)

    def f1(self, average: str) -> float:
        """Return the F1 of the epoch so far, of corrected predictions."""
        return float(f1_from_counts(np.asarray(self._counts, np.int64), average))

    @property
    def loss(self) -> float:
        """Mean loss of the epoch's steps so far."""
        return float(np.mean(self._losses))


def log_epoch(writer: SummaryWriter, epoch: int, steps: int, meter: EpochMeter, val: Evaluation) -> None:
    """Write an epoch's scalars under the published tags, and leave a line on the screen.

    Examples
    --------
    >>> log_epoch(writer, epoch, steps, meter, val)  # doctest: +SKIP
    """
    scalars = {
        "epoch": epoch,
        "train_f1_macro_epoch": meter.f1("macro"),
        "train_f1_micro_epoch": meter.f1("micro"),
        "val_loss": val.loss,
        "val_f1_macro": val.f1_macro,
        "val_f1_micro": val.f1_micro,
    }
    for tag, value in scalars.items():
        writer.add_scalar(tag, value, steps - 1)
    print(
        f"epoch {epoch:>3}  train loss {meter.loss:.4f} F1 {meter.f1('macro'):.4f}  "
        f"val loss {val.loss:.4f} F1 macro {val.f1_macro:.4f} micro {val.f1_micro:.4f}  "
        f"lr {meter.learning_rate:.2e}  {meter.cells_per_second:,.0f} cells/s",
        flush=True,
    )


def log_test(writer: SummaryWriter, steps: int, best_val_f1_macro: float, test: Evaluation | None) -> None:
    """Write the scalars of a finished run: its best validation macro F1 as ``hp_metric``, and the test scores.

    Examples
    --------
    >>> log_test(writer, steps, 0.81, test)  # doctest: +SKIP
    """
    writer.add_scalar("hp_metric", best_val_f1_macro, steps - 1)
    if test is not None:
        for tag, value in (
            ("test_loss", test.loss),
            ("test_f1_macro", test.f1_macro),
            ("test_f1_micro", test.f1_micro),
        ):
            writer.add_scalar(tag, value, steps - 1)
