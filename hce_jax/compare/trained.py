"""What is compared: trained models of the same data, and what their evaluations counted."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hce_jax.evaluation.counts import Counts
from hce_jax.typing import Int

#: The losses in the order in which they are compared; others come behind them.
LOSSES = CROSS_ENTROPY, HIERARCHICAL, EXACT = "CE", "HCE", "HCE exact"
#: What the paper's loss adds before the logarithm.
PUBLISHED_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedRun:
    """A finished run and what its evaluations counted.

    Attributes
    ----------
    folder
        The run, version_N.
    model, loss, seed
        Of its configuration: its ``model_name``, :func:`loss_name`, and its seed.
    config
        Its configuration.
    counts
        By split, "id" and, where it was evaluated on new studies, "ood".

    Examples
    --------
    >>> TrainedRun(Path("tb_logs/linear/default/version_0"), "linear", "CE", 1, {"seed": 1}, {}).loss
    'CE'
    """

    folder: Path
    model: str
    loss: str
    seed: int
    config: dict[str, Any]
    counts: dict[str, Counts]


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Runs on the same cells, which differ in model, loss and seed.

    Attributes
    ----------
    runs
        One for each model, loss, and seed of the model, in this order.
    models, losses
        In order; the first of the losses is the baseline.
    seeds
        Of all models.
    splits
        ("id", "ood") or ("id",).
    labels, cl_ids, reachability
        Of the c types: names, Cell Ontology ids, and R (c, c).
    n_train
        Training cells of each type (c,); None where the store is not there.
    store
        Name of the training store, and that its cells are simulated if they are.
    ontology_release
        Of the Cell Ontology, which the training store names; None if it is not known.
    notes
        What a reader must know, a sentence or two each.

    Examples
    --------
    >>> comparison = load_comparison([Path("store/tb_logs")])  # doctest: +SKIP
    >>> comparison.models, comparison.losses, comparison.seeds  # doctest: +SKIP
    (('linear', 'mlp'), ('CE', 'HCE'), (1, 2, 3, 4))
    """

    runs: tuple[TrainedRun, ...]
    models: tuple[str, ...]
    losses: tuple[str, ...]
    seeds: tuple[int, ...]
    splits: tuple[str, ...]
    labels: tuple[str, ...]
    cl_ids: tuple[str | None, ...]
    reachability: np.ndarray
    n_train: Int[np.ndarray, " c"] | None
    store: str
    ontology_release: str | None
    notes: tuple[str, ...]

    def of(self, model: str, loss: str) -> list[TrainedRun]:
        """Return the runs of a model with a loss, in the order of their seeds."""
        return sorted((run for run in self.runs if (run.model, run.loss) == (model, loss)), key=lambda run: run.seed)


def loss_name(config: Mapping[str, Any]) -> str:
    """Name the loss of a run: by its epsilon, where that is not the published one.

    Examples
    --------
    >>> [loss_name({"use_hierarchical_loss": True, "epsilon": epsilon}) for epsilon in (1e-6, 0.0, 0.001)]
    ['HCE', 'HCE exact', 'HCE (epsilon 0.001)']
    """
    if not config["use_hierarchical_loss"]:
        return CROSS_ENTROPY
    named = {PUBLISHED_EPSILON: HIERARCHICAL, 0.0: EXACT}
    return named.get(config["epsilon"], f"{HIERARCHICAL} (epsilon {config['epsilon']:g})")
