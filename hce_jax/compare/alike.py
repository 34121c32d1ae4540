"""Whether runs can be compared: only what differs on purpose may differ."""

import itertools
import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from typing import Any

import numpy as np

from hce_jax.compare.trained import CROSS_ENTROPY, TrainedRun
from hce_jax.errors import CheckpointError, ConfigError

#: Fields of a configuration that change nothing of what is trained, or say where it lies.
_NOT_TRAINED_ON = {
    "data_path", "log_dir", "cells_in", "log_every_n_steps", "checkpoint_every_minutes", "profile_steps", "save_top_k",
    "seeds", "losses",
}  # fmt: skip
#: Fields in which runs of one model and loss may differ, and those in which the losses of a model do.
_OF_SEED, OF_LOSS = {"seed", "data_seed"}, {"use_hierarchical_loss", "epsilon"}


def check_alike(runs: Sequence[TrainedRun]) -> None:
    """Check that runs can be compared: the same types, cells, seeds of each loss, and recipe.

    Parameters
    ----------
    runs
        All evaluated on the same splits.

    Raises
    ------
    CheckpointError
        If two know other types or another hierarchy, were evaluated on other cells, or trained by other recipes.
    ConfigError
        If two are of the same model, loss and seed, or a loss lacks a seed that another has.

    Examples
    --------
    >>> check_alike(comparison.runs)  # doctest: +SKIP
    """
    for other in runs[1:]:
        _check_types(runs[0], other)
        for split in runs[0].counts:
            _check_cells(runs[0], other, split)
    _check_pairs(runs)
    _check_fields(runs)


def differences(one: TrainedRun, other: TrainedRun, besides: Set[str]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Give the fields in which the training of two runs differs, with both values, but for some fields.

    Examples
    --------
    >>> from pathlib import Path
    >>> ours, theirs = (TrainedRun(Path("version_0"), "mlp", "CE", 1, {"seed": seed}, {}) for seed in (1, 2))
    >>> list(differences(ours, theirs, {"data_seed"}))
    [('seed', (1, 2))]
    """
    for name in sorted({*one.config, *other.config} - _NOT_TRAINED_ON - besides):
        values = tuple(run.config.get(name, "not there") for run in (one, other))
        if values[0] != values[1]:
            yield name, (values[0], values[1])


def grouped(runs: Sequence[TrainedRun]) -> dict[tuple[str, str], list[TrainedRun]]:
    """Return the runs of each model and loss.

    Examples
    --------
    >>> from pathlib import Path
    >>> [*grouped([TrainedRun(Path("version_0"), "mlp", "CE", 1, {}, {})])]
    [('mlp', 'CE')]
    """
    groups = defaultdict(list)
    for run in runs:
        groups[run.model, run.loss].append(run)
    return groups


def _check_types(one: TrainedRun, other: TrainedRun) -> None:
    """Check that two runs know the same types, in the same order, with the same hierarchy."""
    ours, theirs = one.counts["id"], other.counts["id"]
    remedy = "compare runs of one store"
    if ours.labels != theirs.labels:
        pairs = itertools.zip_longest(ours.labels, theirs.labels)
        code, (a, b) = next((code, pair) for code, pair in enumerate(pairs) if pair[0] != pair[1])
        raise CheckpointError(
            f"{one.folder} knows {len(ours.labels)} cell types and {other.folder} {len(theirs.labels)}, and type "
            f"{code} is {a!r} in the one and {b!r} in the other; {remedy}"
        )
    if len(places := np.argwhere(ours.reachability != theirs.reachability)):
        above, below = (ours.labels[code] for code in places[0])
        raise CheckpointError(
            f"{one.folder} and {other.folder} have other hierarchies: only in one of them {below!r} is below "
            f"{above!r}; {remedy}"
        )
    for split in one.counts:
        for run, counts in ((one, one.counts[split]), (other, other.counts[split])):
            if counts.labels != ours.labels or not np.array_equal(counts.reachability, ours.reachability):
                raise CheckpointError(
                    f"{run.folder} was evaluated with other types or another hierarchy in {split} than in id; evaluate "
                    f"it again: python evaluate.py --split {split} --run {shlex.quote(str(run.folder))}"
                )


def _check_cells(one: TrainedRun, other: TrainedRun, split: str) -> None:
    """Check that two runs were evaluated on the same cells, with the same back-off."""
    ours, theirs = one.counts[split], other.counts[split]
    both = f"{one.folder} and {other.folder} were evaluated on other cells ({split}"
    remedy = f"evaluate both on the same: python evaluate.py --split {split} --run RUN,RUN"
    if ours.studies != theirs.studies:
        only = sorted({*ours.studies} ^ {*theirs.studies})
        what = f"only one of them on the study {only[0]!r}" if only else "studies in another order"
        raise CheckpointError(f"{both}, {what}); {remedy}")
    ours_sc, theirs_sc = (counts.decoders["argmax"].by_study[:, 2] for counts in (ours, theirs))
    if len(places := np.argwhere(ours_sc != theirs_sc)):
        study, code = places[0]
        raise CheckpointError(
            f"{both}: {ours_sc[study, code]:,} and {theirs_sc[study, code]:,} of {ours.labels[code]!r} in the study "
            f"{ours.studies[study]!r}); {remedy}"
        )
    if ours.backoff != theirs.backoff:
        asked = [" ".join(f"{name} {value:g}" for name, value in each.backoff.items()) for each in (ours, theirs)]
        raise CheckpointError(
            f"back-off asked for {asked[0]} in {one.folder} and for {asked[1]} in {other.folder} ({split}); evaluate "
            "both with the same --confidence or --max_error"
        )


def _check_pairs(runs: Sequence[TrainedRun]) -> None:
    """Check that each model has one run of every loss with each of its seeds."""
    by_place: dict[tuple[str, str, int], TrainedRun] = {}
    for run in runs:
        if (twin := by_place.setdefault((run.model, run.loss, run.seed), run)) is not run:
            raise ConfigError(
                f"{twin.folder} and {run.folder} are both of {run.model}, {run.loss}, seed {run.seed}; name one of them"
            )
    losses = sorted({run.loss for run in runs})
    for model in sorted({run.model for run in runs}):
        seeds = sorted({run.seed for run in runs if run.model == model})
        for loss in losses:
            if missing := [seed for seed in seeds if (model, loss, seed) not in by_place]:
                names = f"seed{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
                raise ConfigError(
                    f"{model} has no run with {loss} of {names}, but with another loss; seeds are compared in pairs: "
                    "train what is missing, or name runs that pair"
                )


def _check_fields(runs: Sequence[TrainedRun]) -> None:
    """Check that runs of a model and loss differ in their seed alone."""
    for (model, loss), group in grouped(runs).items():
        for other in group[1:]:
            for name, (a, b) in differences(group[0], other, _OF_SEED):
                if not (name == "epsilon" and loss == CROSS_ENTROPY):  # which has none
                    raise CheckpointError(
                        f"runs of {model}, {loss} may differ in their seed only, but {name} is {a!r} in "
                        f"{group[0].folder} and {b!r} in {other.folder}; compare runs of one recipe"
                    )
