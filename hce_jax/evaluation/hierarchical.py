"""Numbers beyond the paper's: how wrong, how sure and how certain, from counts of cells.

Everything is computed from counts that add up exactly over blocks of cells:

* ``confusion`` (c, c + 1): cells by label and uncorrected prediction; the last column: unassigned;
* ``group_counts`` (groups, 3, c): of each group of cells true positives, predicted and actual, after correction;
* ``calibration`` (bins, 3): of the assigned cells, by equal-width bin of their confidence from 0 to 1, how many there
  are, the sum of their confidence, and how many are right (the prediction is the label or below it).

A ratio over no cells at all is NaN, but for precision, recall and F, which are 0 as in scikit-learn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from scipy.special import digamma

from hce_jax.hierarchy import ontology_distances, siblings
from hce_jax.metrics import f1_from_counts
from hce_jax.typing import Float, Int, Num

#: Bins of the calibration table and of the calibration error (Guo et al. 2017).
CALIBRATION_BINS = 15

#: Resampled studies (or donors) of one macro F1; the draws then move the interval's ends by about 2 % of its width.
RESAMPLES = 1000

#: Resamples computed at a time: of 5,000 donors their draws take 4 MB.
RESAMPLES_AT_ONCE = 100


def agreement(confusion: Int[np.ndarray, "c d"], reachability: np.ndarray) -> dict[str, float]:
    """Give the shares of the cells by what the prediction is to the label.

    Parameters
    ----------
    confusion
        At least one cell by label and uncorrected prediction, (c, c + 1).
    reachability
        R (c, c).

    Returns
    -------
    ``exact``; ``descendant``: the prediction is below the label (over-specific; the published rule counts it as right);
    ``ancestor``: above it (under-specific); ``sibling``: both share a direct parent; ``elsewhere``: none of these;
    ``unassigned``. They sum to one.

    Examples
    --------
    >>> reach = np.array([[1, 1], [0, 1]])  # 1 below 0
    >>> agreement(np.array([[2, 1, 0], [3, 2, 2]]), reach)["ancestor"]
    0.3
    """
    reach_cc = np.asarray(reachability) > 0
    same_cc = np.eye(len(reach_cc), dtype=bool)
    siblings_cc = siblings(reach_cc)
    relations = {
        "exact": same_cc,
        "descendant": reach_cc & ~same_cc,
        "ancestor": reach_cc.T & ~same_cc,
        "sibling": siblings_cc,
        "elsewhere": ~(reach_cc | reach_cc.T | siblings_cc),
    }
    n_cells, assigned_cc = confusion.sum(), confusion[:, :-1]
    shares = {name: float(assigned_cc[related_cc].sum() / n_cells) for name, related_cc in relations.items()}
    return shares | {"unassigned": float(confusion[:, -1].sum() / n_cells)}


def hierarchical_scores(confusion: Int[np.ndarray, "c d"], reachability: np.ndarray) -> dict[str, float]:
    r"""Give precision, recall and F1 on ancestor sets, and the mean ontology distance.

    With the ancestor sets :math:`A(k) = \{i : R_{ik} = 1\}` (the type itself and those above it), label t and
    prediction p of each cell, and A of an unassigned prediction empty,

    .. math::

        hP = \frac{\sum |A(t) \cap A(p)|}{\sum |A(p)|}, \quad hR = \frac{\sum |A(t) \cap A(p)|}{\sum |A(t)|}, \quad
        hF = \frac{2\,hP\,hR}{hP + hR}

    with sums over cells (Kiritchenko et al., Canadian AI 2006, who leave the root of the ontology out; the C types have
    no common root here either).

    Parameters
    ----------
    confusion
        Cells by label and uncorrected prediction, (c, c + 1).
    reachability
        R (c, c).

    Returns
    -------
    ``hierarchical_precision``, ``hierarchical_recall``, ``hierarchical_f1``; ``ontology_distance``: the mean over
    assigned cells of the number of edges between label and prediction
    (:func:`hce_jax.hierarchy.ontology_distances`).

    Examples
    --------
    >>> reach = np.array([[1, 1], [0, 1]])  # 1 below 0
    >>> hierarchical_scores(np.array([[0, 0, 0], [1, 1, 0]]), reach)["hierarchical_recall"]
    0.75
    """
    reach_cc = (np.asarray(reachability) > 0).astype(np.int64)
    n_ancestors_c = reach_cc.sum(axis=0)
    assigned_cc = confusion[:, :-1]
    common = (assigned_cc * (reach_cc.T @ reach_cc)).sum()
    predicted, actual = assigned_cc.sum(axis=0) @ n_ancestors_c, confusion.sum(axis=1) @ n_ancestors_c
    return {
        "hierarchical_precision": float(common / max(predicted, 1)),
        "hierarchical_recall": float(common / max(actual, 1)),
        "hierarchical_f1": float(2 * common / max(predicted + actual, 1)),
        "ontology_distance": float(_ratio((assigned_cc * ontology_distances(reach_cc)).sum(), assigned_cc.sum())),
    }


def bootstrap_f1_macro(
    group_counts: Int[np.ndarray, "r 3 c"], labelled_only: bool, n_resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Give a 95 % interval of macro F1 by resampling groups of cells, such as studies or donors.

    Cells of one study resemble each other, so that an interval over cells would be far too narrow. A resample draws as
    many groups as there are, with replacement, and adds up their counts; the interval is from the 2.5th to the 97.5th
    percentile of the resamples' macro F1 (Efron & Tibshirani 1993, ch. 13).

    Parameters
    ----------
    group_counts
        Corrected counts of each group. Groups without cells do not take part.
    labelled_only
        As :func:`hce_jax.metrics.f1_from_counts`, applied to each resample: True for the out-of-distribution rule.
    n_resamples, seed
        Number of resamples, and the seed of their draws.

    Returns
    -------
    Lower and upper end; NaN with fewer than two groups.

    Examples
    --------
    >>> right, wrong = np.array([[5, 5], [5, 5], [5, 5]]), np.array([[0, 0], [5, 5], [5, 5]])
    >>> bootstrap_f1_macro(np.stack([right, wrong]), labelled_only=True)
    (0.0, 1.0)
    """
    counts = group_counts[group_counts[:, 2].any(axis=1)]
    if len(counts) < 2:
        return np.nan, np.nan
    scores = [
        f1_from_counts(resampled, labelled_only=labelled_only)
        for resampled in resampled_counts(counts, n_resamples, seed)
    ]
    low, high = np.percentile(np.concatenate(scores), [2.5, 97.5])
    return float(low), float(high)


def resampled_counts(
    group_counts: Int[np.ndarray, "r 3 c"], n_resamples: int = RESAMPLES, seed: int = 0
) -> Iterator[Int[np.ndarray, "3 k c"]]:
    """Give the added-up counts of groups that are drawn with replacement, as many as there are.

    Parameters
    ----------
    group_counts
        Counts of each group. The draws hang on the number of groups and the seed alone: counts of the same groups by
        several models are resampled alike.
    n_resamples, seed
        Number of resamples, and the seed of their draws.

    Yields
    ------
    Some resamples at a time: their counts, in the order that :func:`hce_jax.metrics.f1_from_counts` takes.

    Examples
    --------
    >>> [counts] = resampled_counts(np.array([[[1, 1], [1, 1], [1, 1]]]), n_resamples=5)
    >>> counts.shape, counts.min(), counts.max()
    ((3, 5, 2), np.int64(1), np.int64(1))
    """
    n_groups, _, n_types = group_counts.shape
    rng = np.random.default_rng(seed)
    flat = group_counts.reshape(n_groups, -1).astype(np.float64)  # exact up to 2**53 cells, and BLAS multiplies it
    for start in range(0, n_resamples, RESAMPLES_AT_ONCE):
        n_rows = min(RESAMPLES_AT_ONCE, n_resamples - start)
        draws = rng.integers(n_groups, size=(n_rows, n_groups)) + n_groups * np.arange(n_rows)[:, None]
        times = np.bincount(draws.ravel(), minlength=n_rows * n_groups).reshape(n_rows, n_groups)
        resampled = (times.astype(np.float64) @ flat).reshape(n_rows, 3, n_types).astype(np.int64)
        yield resampled.swapaxes(0, 1)


def calibration_table(calibration: Float[np.ndarray, "k 3"]) -> pd.DataFrame:
    """Lay out confidence against accuracy, and accuracy against coverage, in 15 bins of confidence.

    Parameters
    ----------
    calibration
        Cells, sum of confidence and right cells in a multiple of 15 equal-width bins from 0 to 1.

    Returns
    -------
    Rows from the least confident bin to the most confident one. ``confidence_from``, ``confidence_to``: the bin;
    ``cells``; ``confidence``, ``accuracy``: their means in the bin; ``coverage``: the share of the assigned cells that
    are in this bin or a more confident one; ``accuracy_at_coverage``: the accuracy of these.

    Examples
    --------
    >>> fine = np.zeros((15, 3))
    >>> fine[14] = 4, 3.9, 3
    >>> calibration_table(fine).iloc[14].round(3).to_dict()["accuracy"]
    0.75
    """
    bins = _coarse(calibration)
    cells, confidence, right = bins.T
    edges = np.arange(CALIBRATION_BINS + 1) / CALIBRATION_BINS
    cells_from, _, right_from = np.cumsum(bins[::-1], axis=0)[::-1].T
    return pd.DataFrame(
        {
            "confidence_from": edges[:-1],
            "confidence_to": edges[1:],
            "cells": cells.astype(np.int64),
            "confidence": _ratio(confidence, cells),
            "accuracy": _ratio(right, cells),
            "coverage": _ratio(cells_from, cells_from[0]),
            "accuracy_at_coverage": _ratio(right_from, cells_from),
        }
    )


def expected_calibration_error(calibration: Float[np.ndarray, "k 3"]) -> float:
    r"""Give the expected calibration error over 15 equal-width bins of confidence.

    .. math:: ECE = \sum_b \frac{n_b}{n} \left| accuracy_b - confidence_b \right|

    (Guo et al., ICML 2017, arXiv 1706.04599.)

    Parameters
    ----------
    calibration
        As :func:`calibration_table`.

    Examples
    --------
    >>> fine = np.zeros((15, 3))
    >>> fine[14] = 4, 3.8, 3
    >>> round(expected_calibration_error(fine), 3)
    0.2
    """
    cells, confidence, right = _coarse(calibration).T
    return float(_ratio(np.abs(right - confidence).sum(), cells.sum()))


def coverage_curve(calibration: Float[np.ndarray, "k 3"]) -> tuple[Float[np.ndarray, " j"], Float[np.ndarray, " j"]]:
    """Give the accuracy among the most confident cells, for each share of the assigned cells that they are.

    Parameters
    ----------
    calibration
        As :func:`calibration_table`.

    Returns
    -------
    Coverage, increasing to 1, and accuracy: one point per bin with cells, which has the cells of this bin and of those
    above it.

    Examples
    --------
    >>> coverage, accuracy = coverage_curve(np.array([[6, 2.0, 0], [0, 0, 0], [2, 1.9, 2]]))
    >>> coverage.tolist(), accuracy.tolist()
    ([0.25, 1.0], [1.0, 0.25])
    """
    occupied = calibration[calibration[:, 0] > 0][::-1]
    cells, _, right = np.cumsum(occupied, axis=0).T
    return cells / occupied[:, 0].sum(), right / cells


def area_under_risk_coverage(calibration: Float[np.ndarray, "k 3"]) -> float:
    r"""Give the area under the risk-coverage curve: 0 if every cell is right, small if the wrong are the least sure.

    .. math:: AURC = \frac{1}{n} \sum_{m=1}^{n} \frac{\text{wrong among the } m \text{ most confident cells}}{m}

    (Geifman et al., ICLR 2019, arXiv 1805.08206.) Cells of the same bin count as equally confident: the value is the
    mean over all their orders.

    Parameters
    ----------
    calibration
        As :func:`calibration_table`.

    Notes
    -----
    A bin of n cells, w of them wrong, after N more confident cells, W of them wrong, adds in the mean of all orders

    .. math::

        \sum_{m=1}^{n} \frac{W + m w / n}{N + m} = w + \left(W - N \frac{w}{n}\right) \left(H_{N+n} - H_N\right)

    with the harmonic numbers :math:`H_m = \psi(m + 1) + \gamma`.

    Examples
    --------
    >>> round(area_under_risk_coverage(np.array([[1, 0.2, 0], [0, 0, 0], [1, 0.9, 1]])), 6)
    0.25
    """
    occupied = calibration[calibration[:, 0] > 0][::-1]
    cells, wrong = occupied[:, 0], occupied[:, 0] - occupied[:, 2]
    cells_before, wrong_before = np.cumsum(cells) - cells, np.cumsum(wrong) - wrong
    harmonic = digamma(cells_before + cells + 1) - digamma(cells_before + 1)
    areas = wrong + (wrong_before - cells_before * wrong / cells) * harmonic
    return float(_ratio(areas.sum(), cells.sum()))


def decoder_scores(
    confusion: Int[np.ndarray, "c d"],
    group_counts: Int[np.ndarray, "r 3 c"],
    calibration: Float[np.ndarray, "k 3"],
    reachability: np.ndarray,
    labelled_only: bool,
) -> dict[str, float]:
    """Give every number of one decoder, in the order of the columns of the table that compares them.

    Parameters
    ----------
    confusion, calibration
        Of all cells.
    group_counts
        Of the groups that the interval of macro F1 is resampled over; together they hold all cells.
    reachability
        R (c, c).
    labelled_only
        Macro F1 over the labelled types alone (the out-of-distribution rule).

    Returns
    -------
    ``f1_macro``, ``f1_macro_low``, ``f1_macro_high`` (95 %), ``accuracy`` (an unassigned cell is wrong; these four
    after correction); what :func:`agreement` gives; ``wrong``: of the assigned cells whose label is not too coarse to
    say (those not below it), the share that is neither the label nor above it; what :func:`hierarchical_scores` gives;
    ``ece``, ``aurc`` (of the assigned cells).

    Examples
    --------
    >>> scores = decoder_scores(
    ...     np.array([[1, 0, 0], [0, 1, 0]]), np.ones((1, 3, 2), int), np.zeros((15, 3)), np.eye(2), False
    ... )
    >>> list(scores)[:5]
    ['f1_macro', 'f1_macro_low', 'f1_macro_high', 'accuracy', 'exact']
    """
    low, high = bootstrap_f1_macro(group_counts, labelled_only)
    shares = agreement(confusion, reachability)
    wrong = shares["sibling"] + shares["elsewhere"]
    return {
        "f1_macro": float(f1_from_counts(group_counts.sum(axis=0), labelled_only=labelled_only)),
        "f1_macro_low": low,
        "f1_macro_high": high,
        "accuracy": shares["exact"] + shares["descendant"],
        **shares,
        "wrong": float(_ratio(np.float64(wrong), np.float64(wrong + shares["exact"] + shares["ancestor"]))),
        **hierarchical_scores(confusion, reachability),
        "ece": expected_calibration_error(calibration),
        "aurc": area_under_risk_coverage(calibration),
    }


def stratified_table(group_counts: Int[np.ndarray, "r 3 c"], names: Sequence[str], column: str) -> pd.DataFrame:
    """Give F1 and accuracy of each group of cells, over the types that occur among the group's labels.

    Parameters
    ----------
    group_counts
        Corrected counts of each group.
    names
        Of the groups.
    column
        What the groups are, such as "tissue": the name of the index.

    Returns
    -------
    One row per group with cells, the largest first, of equal ones by name: ``f1_macro``, ``f1_micro``, ``f1_weighted``,
    ``accuracy``, ``n_cells``, ``n_cell_types``. The three F1 are scikit-learn's
    ``f1_score(labels=np.unique(targets), zero_division=0)``; micro F1 exceeds the accuracy where cells are predicted to
    be of types that the group does not have.

    Examples
    --------
    >>> counts = np.array([[[1, 0], [2, 0], [1, 1]], [[3, 0], [3, 0], [3, 0]], [[0, 0], [0, 0], [0, 0]]])
    >>> stratified_table(counts, ["lung", "blood", "liver"], "tissue")["accuracy"].to_dict()
    {'blood': 1.0, 'lung': 0.5}
    """
    counts = group_counts.swapaxes(0, 1)
    right, _, actual = counts
    n_cells = actual.sum(axis=1)
    at_least_one = np.maximum(n_cells, 1)
    table = pd.DataFrame(
        {
            "f1_macro": f1_from_counts(counts, labelled_only=True),
            "f1_micro": f1_from_counts(counts, "micro", labelled_only=True),
            "f1_weighted": (f1_from_counts(counts, "none") * actual).sum(axis=1) / at_least_one,
            "accuracy": right.sum(axis=1) / at_least_one,
            "n_cells": n_cells,
            "n_cell_types": (actual > 0).sum(axis=1),
        },
        index=pd.Index(names, name=column),
    )
    by_name = table[n_cells > 0].sort_index()
    return by_name.sort_values("n_cells", ascending=False, kind="stable")


def _coarse(calibration: Float[np.ndarray, "k 3"]) -> Float[np.ndarray, "15 3"]:
    """Add up the bins to those of the table."""
    return calibration.reshape(CALIBRATION_BINS, -1, calibration.shape[1]).sum(axis=1)


def _ratio(part: Num[np.ndarray, "..."] | np.number, whole: Num[np.ndarray, "..."] | np.number) -> np.ndarray:
    """Divide; NaN where there is nothing to divide by."""
    return np.asarray(part / np.where(np.asarray(whole) > 0, whole, np.nan))
