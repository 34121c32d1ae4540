"""What a model in training has been through: all that decides how it goes on, beside its arrays."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hce_jax.metrics import f1_from_counts
from hce_jax.runs import checkpoint_name
from hce_jax.typing import Int


class EpochMeter:
    """Adds up the metrics of an epoch's steps, of one member.

    Examples
    --------
    >>> meter = EpochMeter()
    >>> meter.add(0.5, np.array([[3], [4], [5]]))
    >>> meter.add(0.25, np.array([[1], [2], [1]]))
    >>> meter.loss, round(meter.f1("micro"), 3)
    (0.375, 0.667)
    """

    def __init__(self) -> None:
        self._n_steps, self._loss_sum = 0, 0.0
        self._counts: np.ndarray = np.zeros((3, 1), np.int64)

    def add(self, loss: float, counts: Int[np.ndarray, "3 c"]) -> None:
        """Add a step."""
        self._n_steps += 1
        self._loss_sum += loss
        self._counts = self._counts + counts

    def f1(self, average: str) -> float:
        """Return the F1 of the epoch so far, of corrected predictions."""
        return float(f1_from_counts(self._counts, average))

    @property
    def loss(self) -> float:
        """Mean loss of the epoch's steps so far."""
        return self._loss_sum / self._n_steps

    def to_json(self) -> dict[str, Any]:
        """Return it as what JSON holds exactly."""
        return {"n_steps": self._n_steps, "loss_sum": self._loss_sum, "counts": self._counts.tolist()}

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> "EpochMeter":
        """Return what :meth:`to_json` was given by."""
        meter = cls()
        meter._n_steps, meter._loss_sum = written["n_steps"], written["loss_sum"]
        meter._counts = np.asarray(written["counts"], np.int64)
        return meter


@dataclasses.dataclass
class EarlyStopping:
    """Tells when a score has not risen for ``patience`` epochs in a row (Lightning's EarlyStopping, min_delta 0).

    Examples
    --------
    >>> stopping = EarlyStopping(patience=2)
    >>> for score in (0.5, 0.5, 0.4):
    ...     stopping.take(score)
    >>> stopping.stopped
    True
    """

    patience: int
    best: float = -1.0  # below every F1
    waited: int = 0

    def take(self, score: float) -> None:
        """Take the score of the next epoch."""
        self.waited = 0 if score > self.best else self.waited + 1
        self.best = max(self.best, score)

    @property
    def stopped(self) -> bool:
        """Whether training is to end."""
        return self.waited >= self.patience


@dataclasses.dataclass
class BestCheckpoints:
    """Which checkpoints are the ``top_k`` with the highest scores; of equal scores the earlier stays, as published.

    Only every ``interval``-th epoch is offered a place.

    Examples
    --------
    >>> best = BestCheckpoints(top_k=1, interval=1)
    >>> best.offer(0, 0.5), best.offer(1, 0.4), best.score
    ('val_f1_macro_epoch=0_val_f1_macro=0.500.ckpt', None, 0.5)
    """

    top_k: int
    interval: int
    kept: list[tuple[float, str]] = dataclasses.field(default_factory=list)  # best first

    def offer(self, epoch: int, score: float, last: bool = False) -> str | None:
        """Return the name under which this epoch's model is to be kept; None if it is not among the best.

        The last epoch is kept whatever the interval if none was before it: no training ends with nothing.
        """
        due = (epoch + 1) % self.interval == 0 or (last and not self.kept)
        if not due or (len(self.kept) == self.top_k and score <= self.kept[-1][0]):
            return None
        name = checkpoint_name(epoch, score)
        self.kept = sorted([*self.kept, (score, name)], key=lambda kept: -kept[0])[: self.top_k]
        return name

    @property
    def score(self) -> float:
        """The best score."""
        return self.kept[0][0]


class Progress:
    """How far a model is.

    Parameters
    ----------
    config
        Its configuration.

    Attributes
    ----------
    epoch
        The epoch that is being trained, from 0.
    meter
        The metrics of that epoch so far.
    best, stopping
        What its validations led to.

    Examples
    --------
    >>> from configs import common
    >>> progress = Progress(common.get_config())
    >>> progress.end_epoch(0.8), progress.epoch, progress.trained
    ('val_f1_macro_epoch=0_val_f1_macro=0.800.ckpt', 1, False)
    """

    def __init__(self, config: ConfigDict):
        self.epoch, self.meter = 0, EpochMeter()
        self.best = BestCheckpoints(config.save_top_k, config.checkpoint_interval)
        self.stopping = EarlyStopping(config.early_stopping_patience)
        self._max_epochs = config.max_epochs

    @property
    def trained(self) -> bool:
        """Whether all epochs are done, or training has stopped early."""
        return self.stopping.stopped or self.epoch >= self._max_epochs

    def end_epoch(self, score: float) -> str | None:
        """Take the score of the epoch; return the name under which its model is to be kept, if it is."""
        self.stopping.take(score)
        self.epoch, self.meter = self.epoch + 1, EpochMeter()
        return self.best.offer(self.epoch - 1, score, last=self.trained)

    def to_json(self) -> dict[str, Any]:
        """Return it as what JSON holds exactly."""
        return {
            "epoch": self.epoch,
            "meter": self.meter.to_json(),
            "best": list(self.best.kept),
            "stopping": [self.stopping.best, self.stopping.waited],
        }

    @classmethod
    def from_json(cls, config: ConfigDict, written: Mapping[str, Any]) -> "Progress":
        """Return what :meth:`to_json` was given by."""
        progress = cls(config)
        progress.epoch, progress.meter = written["epoch"], EpochMeter.from_json(written["meter"])
        progress.best.kept = [(score, name) for score, name in written["best"]]
        progress.stopping.best, progress.stopping.waited = written["stopping"]
        return progress
