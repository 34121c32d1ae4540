r"""All numbers of a comparison, as tables.

F1 are shares of 1, of corrected predictions: one below the label counts as the label. "difference" is always that of a
loss minus the baseline loss of the same model, on the same cells, the runs of one seed with each other; its tables have
no rows of the baseline. A number that cannot be had is NaN: a spread with one seed, an interval over one study.

Macro F1 goes over the types that the evaluation of the split averages over (:data:`hce_jax.evaluation.reports.RULES`):
in the id split those that occur among labels or predictions, in the ood split those that occur among labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import ttest_rel

from hce_jax.compare.trained import Comparison, TrainedRun
from hce_jax.evaluation.counts import DecoderCounts
from hce_jax.evaluation.hierarchical import (
    calibration_table,
    decoder_scores,
    expected_calibration_error,
    resampled_counts,
)
from hce_jax.evaluation.reports import RULES
from hce_jax.hierarchy import depths, direct_edges
from hce_jax.metrics import f1_from_counts
from hce_jax.typing import Bool, Float, Int

#: The paper's macro F1 by model type, loss and split (Cultrera di Montesano et al., Nat Comput Sci 2026). Those of id
#: are very probably over its 80 shared types, and it states no value of HCE but the gain on new studies.
PUBLISHED = {
    ("linear", "CE", "id"): 0.80,
    ("mlp", "CE", "id"): 0.82,
    ("tabnet", "CE", "id"): 0.84,
    ("linear", "CE", "ood"): 0.55,
    ("mlp", "CE", "ood"): 0.57,
    ("tabnet", "CE", "ood"): 0.52,
}
#: What the paper says that HCE gains in macro F1 on new studies, of the three models the least and the most.
PUBLISHED_GAIN = (0.12, 0.15)

#: The mean over labelled types, where macro F1 counts those that are only predicted as 0: the id split.
MACRO_LABELLED = "macro, labelled types"
#: The decoder of all numbers but those that compare decoders: the published one.
_DECODER = "argmax"
#: The same types, with the confidence after temperature scaling.
_TEMPERED = "temperature"
#: Differences of several seeds that are closer than this are equal, and differ by rounding.
_ROUNDING = 1e-12


class Tables(NamedTuple):
    """Every table of a comparison; of each the function of its name says what is in it."""

    overall: pd.DataFrame
    by_seed: pd.DataFrame
    per_type: pd.DataFrame
    by_class: pd.DataFrame
    decoders: pd.DataFrame
    calibration: pd.DataFrame
    reliability: pd.DataFrame


def tables(comparison: Comparison) -> Tables:
    """Make every table.

    Examples
    --------
    >>> tables(load_comparison([Path("store/tb_logs")])).overall  # doctest: +SKIP
    """
    return Tables(
        overall=overall(comparison),
        by_seed=by_seed(comparison),
        per_type=per_type(comparison),
        by_class=by_class(comparison),
        decoders=decoders(comparison),
        calibration=calibration(comparison),
        reliability=reliability(comparison),
    )


def averages(counts: Int[np.ndarray, "3 *r c"], labelled_only: bool) -> dict[str, Float[np.ndarray, "*r"]]:
    """Give macro, micro and weighted F1.

    Parameters
    ----------
    counts
        Cells rightly predicted, predicted, and labelled as each type.
    labelled_only
        Whether types that are only predicted are left out, as :func:`hce_jax.metrics.f1_from_counts` has it.

    Returns
    -------
    By name: ``macro``; where that counts types that are only predicted, also :data:`MACRO_LABELLED`, which does not;
    ``micro``; ``weighted``, by labelled cells.

    Examples
    --------
    >>> {name: float(f1) for name, f1 in averages(np.array([[1, 0], [2, 0], [1, 1]]), labelled_only=True).items()}
    {'macro': 0.3333333333333333, 'micro': 0.5, 'weighted': 0.3333333333333333}
    """
    labelled = counts[2]
    weighted = (f1_from_counts(counts, "none") * labelled).sum(axis=-1) / np.maximum(labelled.sum(axis=-1), 1)
    found = {"macro": f1_from_counts(counts, labelled_only=labelled_only)}
    if not labelled_only:
        found[MACRO_LABELLED] = f1_from_counts(counts, labelled_only=True)
    found |= {"micro": f1_from_counts(counts, "micro", labelled_only=labelled_only), "weighted": weighted}
    return {name: np.asarray(f1) for name, f1 in found.items()}


def overall(comparison: Comparison) -> pd.DataFrame:
    """Give macro, micro and weighted F1 of each loss, over seeds, and what it gains on the baseline.

    Returns
    -------
    ``model``, ``loss``, ``split``, ``average`` (of :func:`averages`); ``mean`` and ``sd`` over ``n_seeds`` seeds;
    ``difference`` of the mean to that of the baseline (NaN in its own rows); ``low``, ``high``: its 95 % interval from
    the 2.5th to the 97.5th percentile of 1,000 resamples of the studies, the same for all runs (a paired bootstrap).
    It says how much the gain hangs on which studies there are; how much it hangs on the seed, ``sd`` says.

    Examples
    --------
    >>> overall(comparison).query("split == 'ood' and average == 'macro'")  # doctest: +SKIP
    """
    rows = []
    for model, split in _groups(comparison):
        scores = {loss: _averages_of(comparison.of(model, loss), split) for loss in comparison.losses}
        resampled = {loss: _resampled_of(comparison.of(model, loss), split) for loss in comparison.losses}
        for loss in comparison.losses:
            for average, f1_s in scores[loss].items():
                row = {"model": model, "loss": loss, "split": split, "average": average, "mean": f1_s.mean()}
                row |= {"sd": float(_sd(f1_s)), "n_seeds": len(f1_s)} | dict.fromkeys(
                    ("difference", "low", "high"), np.nan
                )
                if loss != comparison.losses[0]:
                    row["difference"] = row["mean"] - scores[comparison.losses[0]][average].mean()
                    differences = resampled[loss][average] - resampled[comparison.losses[0]][average]
                    row["low"], row["high"] = np.percentile(differences, [2.5, 97.5])
                rows.append(row)
    return pd.DataFrame(rows)


def by_seed(comparison: Comparison) -> pd.DataFrame:
    """Give macro, micro and weighted F1 of each run.

    Returns
    -------
    ``model``, ``loss``, ``seed``, ``split``, ``average``, ``f1``: to the last digit what the evaluation's table says,
    where micro F1 is its row "accuracy" or "micro avg".

    Examples
    --------
    >>> by_seed(comparison).pivot_table("f1", ["model", "split", "average"], ["loss", "seed"])  # doctest: +SKIP
    """
    rows = []
    for run in comparison.runs:
        for split in comparison.splits:
            for average, f1_s in _averages_of([run], split).items():
                rows.append((run.model, run.loss, run.seed, split, average, float(f1_s[0])))
    return pd.DataFrame(rows, columns=["model", "loss", "seed", "split", "average", "f1"])


def per_type(comparison: Comparison) -> pd.DataFrame:
    """Give the F1 of each cell type with each loss and with the baseline, and whether they differ.

    Returns
    -------
    One row for each type that occurs among the labels of the split: ``model``, ``loss`` (never the baseline),
    ``split``; ``code``, ``label``, ``cl_id``; ``depth``: its ancestors among the types; ``is_leaf``: no type is below
    it; ``is_connected``: some type is above or below it; ``n_train``: training cells; ``n_cells``, ``n_studies``:
    labelled cells and studies that have some; ``f1_baseline``, ``f1``: means over seeds, and their ``_sd``;
    ``difference``; ``t``, ``p`` of the two-sided paired t-test over seeds, as the paper's; ``p_holm``: p adjusted for
    all types of these rows (:func:`holm`). All three are NaN with one seed, and where the difference is the same with
    every seed: then there is no spread to compare it with.

    Examples
    --------
    >>> per_type(comparison).query("split == 'ood' and p_holm < 0.05 and difference < 0")  # doctest: +SKIP
    """
    return pd.concat([_per_type(comparison, *pair) for pair in _pairs(comparison)], ignore_index=True)


def holm(p: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    r"""Adjust p values so that all together are wrong with the probability of one (Holm, Scand J Stat 1979).

    .. math:: \tilde p_{(i)} = \max_{j \le i} \min\left(1, (m - j + 1)\, p_{(j)}\right)

    with the p values in ascending order.

    Parameters
    ----------
    p
        Numbers; those that are NaN stay so and do not count among the m.

    Examples
    --------
    >>> holm(np.array([0.02, np.nan, 0.01, 0.4])).tolist()
    [0.04, nan, 0.03, 0.4]
    """
    adjusted = np.full(len(p), np.nan)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN sorts behind all numbers
    steps = np.minimum(np.arange(len(order), 0, -1) * p[order], 1)
    adjusted[order] = np.maximum.accumulate(steps)
    return adjusted


def by_class(comparison: Comparison) -> pd.DataFrame:
    """Give the mean difference in F1 of the types at each depth, of leaves and others, of isolated types and others.

    Returns
    -------
    ``model``, ``loss``, ``split``; ``grouping``: depth, leaf or connected; ``value``: the depth as text, leaf or
    internal, connected or isolated; ``n_types`` of these that occur among the labels of the split; ``seed``;
    ``difference``: the mean over these types. A type without relatives counts as a leaf.

    Examples
    --------
    >>> by_class(comparison).query("grouping == 'connected'")  # doctest: +SKIP
    """
    rows = []
    classes = list(_classes(comparison.reachability))
    for model, loss, split, baseline, runs in _pairs(comparison):
        is_labelled_c = _labelled_cells(runs[0], split).any(axis=0)
        difference_sc = _f1_per_type(runs, split) - _f1_per_type(baseline, split)
        for grouping, value, is_in_c in classes:
            types = np.flatnonzero(is_in_c & is_labelled_c)
            if len(types):
                means = difference_sc[:, types].mean(axis=1)
                for run, mean in zip(runs, means, strict=True):
                    rows.append((model, loss, split, grouping, value, len(types), run.seed, mean))
    columns = ["model", "loss", "split", "grouping", "value", "n_types", "seed", "difference"]
    return pd.DataFrame(rows, columns=columns)


def decoders(comparison: Comparison) -> pd.DataFrame:
    """Give the scores of each decoder, means over seeds.

    Returns
    -------
    ``model``, ``loss``, ``split``, ``decoder``; every number of
    :func:`hce_jax.evaluation.hierarchical.decoder_scores` but the interval of macro F1; ``confidence`` or
    ``max_error``: what back-off asked for. A decoder that not all seeds have has no row.

    Examples
    --------
    >>> decoders(comparison).query("split == 'ood'").set_index("decoder")["hierarchical_f1"]  # doctest: +SKIP
    """
    rows = []
    for model, loss, split, runs in _all_groups(comparison):
        for name in _common_decoders(runs, split):
            scores = pd.DataFrame([_scores(comparison, run, split, name) for run in runs]).mean(skipna=False)
            backoff = runs[0].counts[split].backoff if name == "backoff" else {}
            asked_for = {"confidence": np.nan, "max_error": np.nan} | backoff
            rows.append({"model": model, "loss": loss, "split": split, "decoder": name} | scores.to_dict() | asked_for)
    return pd.DataFrame(rows)


def calibration(comparison: Comparison) -> pd.DataFrame:
    """Give the expected calibration error before and after temperature scaling, means over seeds.

    Returns
    -------
    ``model``, ``loss``, ``split``; ``temperature``, fitted on validation data; ``ece_before``, ``ece_after``, of the
    predictions of the most probable type. NaN where not all seeds have a temperature.

    Examples
    --------
    >>> calibration(comparison).query("split == 'ood'")  # doctest: +SKIP
    """
    rows: list[dict[str, Any]] = []
    for model, loss, split, runs in _all_groups(comparison):
        counts = [run.counts[split] for run in runs]
        row: dict[str, Any] = {"model": model, "loss": loss, "split": split, "temperature": np.nan}
        row["ece_before"] = np.mean([_ece(each.decoders[_DECODER]) for each in counts])
        row["ece_after"] = np.nan
        if _TEMPERED in _common_decoders(runs, split):
            row["temperature"] = np.mean([each.temperature for each in counts])
            row["ece_after"] = np.mean([_ece(each.decoders[_TEMPERED]) for each in counts])
        rows.append(row)
    return pd.DataFrame(rows)


def reliability(comparison: Comparison) -> pd.DataFrame:
    """Lay out confidence against accuracy in 15 bins, the cells of all seeds together.

    Returns
    -------
    ``model``, ``loss``, ``split``; ``scaled``: after temperature scaling (rows that are only there where all seeds have
    a temperature); ``confidence_from``, ``confidence_to``, ``cells``, ``confidence``, ``accuracy`` of
    :func:`hce_jax.evaluation.hierarchical.calibration_table`.

    Examples
    --------
    >>> reliability(comparison).query("model == 'mlp' and split == 'ood' and not scaled")  # doctest: +SKIP
    """
    parts = []
    for model, loss, split, runs in _all_groups(comparison):
        common = _common_decoders(runs, split)
        for decoder in (_DECODER, _TEMPERED):
            if decoder in common:
                pooled = np.sum([run.counts[split].decoders[decoder].calibration for run in runs], axis=0)
                table = calibration_table(pooled).drop(columns=["coverage", "accuracy_at_coverage"])
                named = {"model": model, "loss": loss, "split": split, "scaled": decoder == _TEMPERED}
                parts.append(pd.DataFrame(named, index=table.index).join(table))
    return pd.concat(parts, ignore_index=True)


def _groups(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """Give each model and split."""
    for model in comparison.models:
        for split in comparison.splits:
            yield model, split


def _all_groups(comparison: Comparison) -> Iterator[tuple[str, str, str, list[TrainedRun]]]:
    """Give each model, loss and split, and its runs."""
    for model in comparison.models:
        for loss in comparison.losses:
            for split in comparison.splits:
                yield model, loss, split, comparison.of(model, loss)


def _pairs(comparison: Comparison) -> Iterator[tuple[str, str, str, list[TrainedRun], list[TrainedRun]]]:
    """Give each model, loss but the baseline and split, the runs of the baseline, and those of the same seeds."""
    for model, loss, split, runs in _all_groups(comparison):
        if loss != comparison.losses[0]:
            yield model, loss, split, comparison.of(model, comparison.losses[0]), runs


def _averages_of(runs: Sequence[TrainedRun], split: str) -> dict[str, Float[np.ndarray, " s"]]:
    """Return each average F1 of each run."""
    found = []
    for run in runs:
        counts = run.counts[split].decoders[_DECODER].by_study.sum(axis=0)
        # Added up over the types that occur alone, as scikit-learn does, it is the same to the last digit.
        occurring = counts[:, counts[1:].any(axis=0)]
        labelled = counts[:, counts[2] > 0]
        rule = RULES[split].labelled_only
        found.append(averages(labelled if rule else occurring, rule))
    return {name: np.array([float(each[name]) for each in found]) for name in found[0]}


def _resampled_of(runs: Sequence[TrainedRun], split: str) -> dict[str, Float[np.ndarray, " k"]]:
    """Return each average F1 of each resample of the studies, its mean over the runs; NaN of fewer than two studies."""
    labelled_only = RULES[split].labelled_only
    of_runs = []
    for run in runs:
        by_study = run.counts[split].decoders[_DECODER].by_study
        parts = [averages(counts, labelled_only) for counts in resampled_counts(by_study)]
        enough = np.nan if len(by_study) < 2 else 1.0
        of_runs.append({name: enough * np.concatenate([part[name] for part in parts]) for name in parts[0]})
    return {name: np.mean([each[name] for each in of_runs], axis=0) for name in of_runs[0]}


def _per_type(
    comparison: Comparison,
    model: str,
    loss: str,
    split: str,
    baseline: Sequence[TrainedRun],
    runs: Sequence[TrainedRun],
) -> pd.DataFrame:
    """Return the rows of a pair."""
    labelled_sc = _labelled_cells(runs[0], split)
    types = np.flatnonzero(labelled_sc.any(axis=0))
    theirs, ours = (_f1_per_type(each, split)[:, types] for each in (baseline, runs))
    t, p = _paired_t_test(ours, theirs)
    edges = direct_edges(comparison.reachability)
    n_train = np.full(len(edges), np.nan) if comparison.n_train is None else comparison.n_train.astype(np.float64)
    return pd.DataFrame(
        {
            "model": model,
            "loss": loss,
            "split": split,
            "code": types,
            "label": [comparison.labels[code] for code in types],
            "cl_id": [comparison.cl_ids[code] for code in types],
            "depth": depths(comparison.reachability)[types],
            "is_leaf": _leaves(edges)[types],
            "is_connected": _connected(edges)[types],
            "n_train": n_train[types],
            "n_cells": labelled_sc.sum(axis=0)[types],
            "n_studies": np.count_nonzero(labelled_sc, axis=0)[types],
            "f1_baseline": theirs.mean(axis=0),
            "f1_baseline_sd": _sd(theirs),
            "f1": ours.mean(axis=0),
            "f1_sd": _sd(ours),
            "difference": (ours - theirs).mean(axis=0),
            "t": t,
            "p": p,
            "p_holm": holm(p),
        }
    )


def _paired_t_test(
    ours: Float[np.ndarray, "s m"], theirs: Float[np.ndarray, "s m"]
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Return t and p of each column; NaN where all differences are equal."""
    t, p = np.full((2, ours.shape[1]), np.nan)
    varies = np.ptp(ours - theirs, axis=0) > _ROUNDING
    if varies.any():
        t[varies], p[varies] = ttest_rel(ours[:, varies], theirs[:, varies], axis=0)
    return t, p


def _leaves(edges: Bool[np.ndarray, "c d"]) -> Bool[np.ndarray, " c"]:
    """Return which types have none below."""
    return ~np.asarray(edges.any(axis=1))


def _connected(edges: Bool[np.ndarray, "c d"]) -> Bool[np.ndarray, " c"]:
    """Return which types have some above or below."""
    return np.asarray((edges | edges.T).any(axis=1))


def _classes(reachability: np.ndarray) -> Iterator[tuple[str, str, Bool[np.ndarray, " c"]]]:
    """Give each class of types: of what grouping it is, its name, and which types are in it."""
    edges, depth_c = direct_edges(reachability), depths(reachability)
    for depth in np.unique(depth_c):
        yield "depth", str(depth), depth_c == depth
    is_leaf_c, is_connected_c = _leaves(edges), _connected(edges)
    yield "leaf", "leaf", is_leaf_c
    yield "leaf", "internal", ~is_leaf_c
    yield "connected", "connected", is_connected_c
    yield "connected", "isolated", ~is_connected_c


def _labelled_cells(run: TrainedRun, split: str) -> Int[np.ndarray, "s c"]:
    """Return the labelled cells of each study and type, which are the same for all runs."""
    return run.counts[split].decoders[_DECODER].by_study[:, 2]


def _f1_per_type(runs: Sequence[TrainedRun], split: str) -> Float[np.ndarray, "s c"]:
    """Return the F1 of each run and type; 0 for a type that does not occur."""
    counts = [run.counts[split].decoders[_DECODER].by_study.sum(axis=0) for run in runs]
    return np.asarray(f1_from_counts(np.stack(counts, axis=1), "none"))


def _common_decoders(runs: Sequence[TrainedRun], split: str) -> list[str]:
    """Return the decoders that all runs have."""
    return [name for name in runs[0].counts[split].decoders if all(name in run.counts[split].decoders for run in runs)]


def _scores(comparison: Comparison, run: TrainedRun, split: str, decoder: str) -> dict[str, float]:
    counts = run.counts[split].decoders[decoder]
    all_cells = counts.by_study.sum(axis=0, keepdims=True)  # as one group there is no interval, which takes long
    rule, reach = RULES[split], comparison.reachability
    scores = decoder_scores(counts.confusion, all_cells, counts.calibration, reach, rule.labelled_only)
    return {name: value for name, value in scores.items() if name not in ("f1_macro_low", "f1_macro_high")}


def _ece(counts: DecoderCounts) -> float:
    return expected_calibration_error(counts.calibration)


def _sd(values: Float[np.ndarray, "s *m"]) -> Float[np.ndarray, "*m"]:
    """Return the standard deviation over seeds, n - 1; NaN of one."""
    if len(values) < 2:
        return np.full(values.shape[1:], np.nan)
    return np.asarray(values.std(axis=0, ddof=1))
