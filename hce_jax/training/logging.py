"""What a run writes and shows: its description files, TensorBoard scalars, a line per epoch."""

import importlib.metadata
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from hce_jax import __version__
from hce_jax.files import written_aside
from hce_jax.metrics import f1_from_counts
from hce_jax.runs import CONFIG_FILE
from hce_jax.training.progress import EpochMeter
from hce_jax.training.steps import Evaluation

#: Seconds after which a new point brings all to the disk.
_FLUSH_SECONDS = 10
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


class ScalarWriter:
    """Writes TensorBoard's scalars, in this thread: after :meth:`flush` a kill takes none of them away.

    (tensorboardX's own writer leaves them to another thread, which a flush does not wait for.)

    Parameters
    ----------
    folder
        Of the run.
    purge_step
        Points that lie in the folder from this step on are of a process that was killed, and do not count.

    Examples
    --------
    >>> writer = ScalarWriter(run)  # doctest: +SKIP
    >>> writer.add_scalar("val_loss", 0.7, step=92)  # doctest: +SKIP
    """

    def __init__(self, folder: Path, purge_step: int | None = None):
        # tensorboardX's own name holds the second: a run that goes on within one would write over its points.
        self._events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._flushed_at = time.monotonic()
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(step=purge_step, session_log=start, wall_time=time.time()))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write a point."""
        point = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        self._events.write_event(Event(step=step, summary=point, wall_time=time.time()))
        if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Bring all points to the disk."""
        self._events.flush()
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Bring all points to the disk, and write no more."""
        self._events.close()


def log_step(writer: ScalarWriter, step: int, loss: float, counts: np.ndarray, learning_rate: float) -> None:
    """Write a training step's scalars under the published tags.

    Examples
    --------
    >>> log_step(writer, 49, 0.7, counts, 5e-4)  # doctest: +SKIP
    """
    for tag, value in (
        ("train_loss", loss),
        ("train_f1_macro_step", f1_from_counts(counts, "macro")),
        ("train_f1_micro_step", f1_from_counts(counts, "micro")),
        ("lr-AdamW", learning_rate),
    ):
        writer.add_scalar(tag, float(value), step)


def log_epoch(writer: ScalarWriter, epoch: int, steps: int, meter: EpochMeter, val: Evaluation) -> None:
    """Write an epoch's scalars under the published tags.

    Examples
    --------
    >>> log_epoch(writer, epoch, steps, meter, val)  # doctest: +SKIP
    """
    scalars = {
        "epoch": float(epoch),
        "train_f1_macro_epoch": meter.f1("macro"),
        "train_f1_micro_epoch": meter.f1("micro"),
        "val_loss": val.loss,
        "val_f1_macro": val.f1_macro,
        "val_f1_micro": val.f1_micro,
    }
    for tag, value in scalars.items():
        writer.add_scalar(tag, value, steps - 1)


def epoch_line(epoch: int, meter: EpochMeter, val: Evaluation) -> str:
    """Return what a person wants to know of an epoch.

    Examples
    --------
    >>> epoch_line(3, meter, val)  # doctest: +SKIP
    'epoch   3  train loss 0.8121 F1 0.7411  val loss 0.9102 F1 macro 0.7211 micro 0.8033'
    """
    return (
        f"epoch {epoch:>3}  train loss {meter.loss:.4f} F1 {meter.f1('macro'):.4f}  "
        f"val loss {val.loss:.4f} F1 macro {val.f1_macro:.4f} micro {val.f1_micro:.4f}"
    )


def log_test(writer: ScalarWriter, steps: int, best_val_f1_macro: float, test: Evaluation | None) -> None:
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
