import itertools

import networkx
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from hce_jax.evaluation.hierarchical import (
    agreement,
    area_under_risk_coverage,
    bootstrap_f1_macro,
    calibration_table,
    coverage_curve,
    decoder_scores,
    expected_calibration_error,
    hierarchical_scores,
    stratified_table,
)
from hce_jax.hierarchy import correct_predictions, reachability_from_edges
from hce_jax.metrics import f1_from_counts

# 0 -> 1, 0 -> 2, 1 -> 3 <- 2 (a type with two parents), and 4 alone.
FIVE_TYPES = reachability_from_edges(5, [(0, 1), (0, 2), (1, 3), (2, 3)])
N_BINS = 1500

# Ten cells of them, label and prediction, and what the prediction is to the label.
TEN_CELLS = [
    (0, 0),  # exact
    (0, 0),
    (3, 3),
    (0, 3),  # descendant, two steps below
    (2, 3),  # descendant
    (1, 0),  # ancestor
    (1, 2),  # sibling
    (3, 4),  # elsewhere, in another tree
    (3, 4),
    (4, -1),  # unassigned
]


def confusion_of(targets, predictions, n_types):
    confusion = np.zeros((n_types, n_types + 1), np.int64)
    np.add.at(confusion, (targets, predictions), 1)
    return confusion


def counts_of(targets, predictions, n_types):
    right = np.bincount(targets[targets == predictions], minlength=n_types)
    predicted = np.bincount(predictions[predictions >= 0], minlength=n_types)
    return np.stack([right, predicted, np.bincount(targets, minlength=n_types)])


def calibration_of(confidence, right):
    calibration = np.zeros((N_BINS, 3))
    bins = np.minimum((confidence * N_BINS).astype(int), N_BINS - 1)
    np.add.at(calibration, bins, np.stack([np.ones(len(bins)), confidence, right], axis=1))
    return calibration


def random_groups(seed, n_groups=4, n_cells=240, n_types=9):
    """Cells of several groups, some of whose types occur in few groups only, or among predictions only."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, n_groups, n_cells)
    targets = np.minimum(rng.integers(0, 3, n_cells) + groups, n_types - 2)
    predictions = np.where(rng.random(n_cells) < 0.6, targets, rng.integers(0, n_types, n_cells))
    counts = [counts_of(targets[groups == g], predictions[groups == g], n_types) for g in range(n_groups)]
    return groups, targets, predictions, np.stack(counts)


def test_agreement_of_ten_cells_worked_by_hand():
    shares = agreement(confusion_of(*np.array(TEN_CELLS).T, 5), FIVE_TYPES)
    expected = {
        "exact": 0.3,
        "descendant": 0.2,
        "ancestor": 0.1,
        "sibling": 0.1,
        "elsewhere": 0.2,
        "unassigned": 0.1,
    }
    assert list(shares) == list(expected)
    assert shares == pytest.approx(expected)


def test_hierarchical_scores_of_ten_cells_worked_by_hand():
    # Sizes of the ancestor sets of types 0 to 4: 1, 2, 2, 4, 1. Common ancestors, in the order of the cells:
    # 1 + 1 + 4 + 1 + 2 + 1 + 1 + 0 + 0 + 0 = 11; of the predictions 1 + 1 + 4 + 4 + 4 + 1 + 2 + 1 + 1 + 0 = 19; of the
    # labels 1 + 1 + 4 + 1 + 2 + 2 + 2 + 4 + 4 + 1 = 22. Distances of the nine assigned: 0 0 0 2 1 1 2 4 4.
    scores = hierarchical_scores(confusion_of(*np.array(TEN_CELLS).T, 5), FIVE_TYPES)
    assert scores == pytest.approx(
        {
            "hierarchical_precision": 11 / 19,
            "hierarchical_recall": 11 / 22,
            "hierarchical_f1": 22 / 41,
            "ontology_distance": 14 / 9,
        }
    )


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_random_cells_are_those_of_their_ancestor_sets_and_paths(seed):
    rng = np.random.default_rng(seed)
    edges = [(i, j) for i in range(12) for j in range(i + 1, 12) if rng.random() < 0.2]
    graph = networkx.DiGraph(edges)
    graph.add_nodes_from(range(12))
    reach = reachability_from_edges(12, edges)
    targets, predictions = rng.integers(0, 12, 200), rng.integers(-1, 12, 200)
    confusion = confusion_of(targets, predictions, 12)

    above = np.vstack(
        [[i in networkx.ancestors(graph, j) | {j} for i in range(12)] for j in range(12)] + [[False] * 12]
    )
    *expected, _ = precision_recall_fscore_support(above[targets], above[predictions], average="micro", zero_division=0)
    scores = hierarchical_scores(confusion, reach)
    found = [scores[f"hierarchical_{name}"] for name in ("precision", "recall", "f1")]
    np.testing.assert_allclose(found, expected, rtol=1e-12)

    reduced = networkx.Graph(networkx.transitive_reduction(graph).edges)
    reduced.add_edges_from(("root", code) for code in range(12) if graph.in_degree(code) == 0)
    lengths = [
        networkx.shortest_path_length(reduced, int(t), int(p))
        for t, p in zip(targets, predictions, strict=True)
        if p >= 0
    ]
    assert scores["ontology_distance"] == pytest.approx(np.mean(lengths))

    shares = agreement(confusion, reach)
    assert sum(shares.values()) == pytest.approx(1)
    corrected = np.where(predictions < 0, -1, correct_predictions(targets, predictions, reach))
    assert shares["exact"] + shares["descendant"] == pytest.approx(np.mean(corrected == targets))


def test_where_every_cell_is_unassigned_nothing_is_precise_and_nothing_has_a_distance():
    confusion = confusion_of(np.array([0, 3]), np.array([-1, -1]), 5)
    assert agreement(confusion, FIVE_TYPES)["unassigned"] == 1
    scores = hierarchical_scores(confusion, FIVE_TYPES)
    assert np.isnan(scores.pop("ontology_distance"))
    assert not any(scores.values())


@pytest.mark.parametrize("labelled_only", [True, False])
def test_the_interval_is_that_of_sklearn_s_f1_of_the_drawn_groups_cells(labelled_only):
    groups, targets, predictions, counts = random_groups(0)
    scores = []
    for draw in np.random.default_rng(5).integers(4, size=(120, 4)):  # more than are computed at a time
        cells = np.concatenate([np.flatnonzero(groups == group) for group in draw])
        labels = np.unique(targets[cells]) if labelled_only else None
        scores.append(f1_score(targets[cells], predictions[cells], labels=labels, average="macro", zero_division=0))
    found = bootstrap_f1_macro(counts, labelled_only, n_resamples=120, seed=5)
    np.testing.assert_allclose(found, np.percentile(scores, [2.5, 97.5]), rtol=1e-12)

    with_an_empty_group = np.insert(counts, 2, 0, axis=0)
    assert bootstrap_f1_macro(with_an_empty_group, labelled_only, n_resamples=120, seed=5) == found


def test_groups_that_are_all_alike_have_an_interval_without_width():
    _, _, _, counts = random_groups(1)
    low, high = bootstrap_f1_macro(counts[[0, 0, 0]], labelled_only=True)
    assert low == high == pytest.approx(f1_from_counts(counts[0], labelled_only=True))


def test_fewer_than_two_groups_with_cells_have_no_interval():
    _, _, _, counts = random_groups(1)
    counts[1:] = 0
    assert np.isnan(bootstrap_f1_macro(counts, labelled_only=True)).all()


def test_a_calibration_table_worked_by_hand():
    confidence = np.array([0.999, 0.999, 0.95, 0.95, 0.5, 0.5, 0.5, 0.01])
    right = np.array([1, 1, 1, 0, 1, 0, 0, 0])
    calibration = calibration_of(confidence, right)
    table = calibration_table(calibration)
    assert list(table.columns) == [
        "confidence_from",
        "confidence_to",
        "cells",
        "confidence",
        "accuracy",
        "coverage",
        "accuracy_at_coverage",
    ]
    np.testing.assert_allclose(table["confidence_from"], np.arange(15) / 15)
    np.testing.assert_allclose(table["confidence_to"], np.arange(1, 16) / 15)
    occupied = table[table["cells"] > 0]
    expected = [
        # bin, cells, confidence, accuracy, coverage, accuracy at coverage
        [0, 1, 0.01, 0, 1, 4 / 8],
        [7, 3, 0.5, 1 / 3, 7 / 8, 4 / 7],
        [14, 4, 0.9745, 3 / 4, 4 / 8, 3 / 4],
    ]
    np.testing.assert_allclose(occupied.drop(columns=["confidence_from", "confidence_to"]).reset_index(), expected)
    empty = table.drop(index=occupied.index)
    assert empty[["confidence", "accuracy"]].isna().all(axis=None)
    assert empty.loc[8:, "coverage"].tolist() == [4 / 8] * 6
    assert empty.loc[1:6, "accuracy_at_coverage"].tolist() == [4 / 7] * 6

    # |0 - 0.01| + |1 - 1.5| + |3 - 3.898| = 1.408
    assert expected_calibration_error(calibration) == pytest.approx(1.408 / 8)

    coverage, accuracy = coverage_curve(calibration)
    np.testing.assert_allclose(coverage, [2 / 8, 4 / 8, 7 / 8, 1])
    np.testing.assert_allclose(accuracy, [1, 3 / 4, 4 / 7, 4 / 8])


def test_the_calibration_error_of_random_cells_is_that_of_their_raw_confidences():
    rng = np.random.default_rng(0)
    confidence = rng.beta(4, 1, 2000)
    right = rng.random(2000) < 0.75  # too little confidence in some bins, too much in others
    bins = np.digitize(confidence, np.linspace(0, 1, 16)[1:-1])
    expected = sum(
        np.mean(bins == b) * abs(right[bins == b].mean() - confidence[bins == b].mean()) for b in np.unique(bins)
    )
    assert expected_calibration_error(calibration_of(confidence, right)) == pytest.approx(expected, rel=1e-9)


def aurc(right):
    """Of cells from the most confident one down."""
    return np.mean(np.cumsum(~right) / np.arange(1, len(right) + 1))


def test_the_area_under_the_risk_coverage_curve_is_that_of_the_sorted_cells():
    rng = np.random.default_rng(0)
    bins = rng.permutation(N_BINS)[:400]  # one cell a bin
    right = rng.random(400) < bins / N_BINS
    found = area_under_risk_coverage(calibration_of((bins + 0.5) / N_BINS, right))
    assert found == pytest.approx(aurc(right[np.argsort(-bins)]), rel=1e-9)


def test_cells_of_one_bin_count_in_the_mean_of_all_their_orders():
    first, second, third = (True, True, False), (True, False, False, True), (False,)
    orders = itertools.product(*map(itertools.permutations, (first, second, third)))
    expected = np.mean([aurc(np.array([*a, *b, *c])) for a, b, c in orders])
    confidence = np.repeat([0.9, 0.4, 0.1], [3, 4, 1])
    found = area_under_risk_coverage(calibration_of(confidence, np.array([*first, *second, *third])))
    assert found == pytest.approx(expected, rel=1e-9)


def test_confidence_without_cells_gives_no_numbers():
    calibration = np.zeros((N_BINS, 3))
    assert np.isnan(expected_calibration_error(calibration))
    assert np.isnan(area_under_risk_coverage(calibration))
    assert coverage_curve(calibration)[0].size == 0
    table = calibration_table(calibration)
    assert not table["cells"].any()
    assert table[["confidence", "accuracy", "coverage", "accuracy_at_coverage"]].isna().all(axis=None)


@pytest.mark.parametrize("labelled_only", [True, False])
def test_the_row_of_a_decoder_has_the_numbers_of_its_parts(labelled_only):
    targets, predictions = np.array([*TEN_CELLS[:-1], (3, -1)]).T  # type 4 is predicted only
    corrected = np.where(predictions < 0, -1, correct_predictions(targets, predictions, FIVE_TYPES))
    group_counts = np.stack([counts_of(targets[half], corrected[half], 5) for half in (slice(0, 5), slice(5, 10))])
    calibration = calibration_of(np.linspace(0.1, 0.9, 9), (corrected == targets)[:9])
    confusion = confusion_of(targets, predictions, 5)
    row = decoder_scores(confusion, group_counts, calibration, FIVE_TYPES, labelled_only)
    low, high = bootstrap_f1_macro(group_counts, labelled_only)
    labels = np.unique(targets) if labelled_only else range(5)
    expected = {
        "f1_macro": f1_score(targets, corrected, labels=labels, average="macro", zero_division=0),
        "f1_macro_low": low,
        "f1_macro_high": high,
        "accuracy": accuracy_score(targets, corrected),
        **agreement(confusion, FIVE_TYPES),
        "wrong": 3 / 7,
        **hierarchical_scores(confusion, FIVE_TYPES),
        "ece": expected_calibration_error(calibration),
        "aurc": area_under_risk_coverage(calibration),
    }
    assert list(row) == list(expected)
    assert row == pytest.approx(expected)
    assert all(type(value) is float for value in row.values())


def test_each_row_of_a_stratified_table_is_sklearn_s():
    groups, targets, predictions, counts = random_groups(2)
    names = ["lung", "blood", "brain", "kidney"]
    table = stratified_table(counts, names, "tissue")
    assert table.index.name == "tissue"
    assert list(table.columns) == ["f1_macro", "f1_micro", "f1_weighted", "accuracy", "n_cells", "n_cell_types"]
    for group, name in enumerate(names):
        cells = targets[groups == group], predictions[groups == group]
        present = np.unique(cells[0])
        assert (~np.isin(cells[1], present)).any()  # or micro F1 would be the accuracy
        for average in ("macro", "micro", "weighted"):
            expected = f1_score(*cells, labels=present, average=average, zero_division=0)
            assert table.loc[name, f"f1_{average}"] == pytest.approx(expected, rel=1e-12)
        assert table.loc[name, "accuracy"] == pytest.approx(accuracy_score(*cells))
        assert table.loc[name, ["n_cells", "n_cell_types"]].tolist() == [len(cells[0]), len(present)]


def test_a_stratified_table_has_the_largest_groups_first_then_goes_by_name_and_leaves_out_the_empty():
    one_cell, no_cell = np.ones((3, 1), int), np.zeros((3, 1), int)
    counts = np.stack([one_cell, 2 * one_cell, no_cell, one_cell, 3 * one_cell, one_cell])
    table = stratified_table(counts, ["skin", "liver", "eye", "brain", "lung", "heart"], "tissue")
    assert table.index.tolist() == ["lung", "liver", "brain", "heart", "skin"]
    pd.testing.assert_series_equal(
        table["n_cells"], pd.Series([3, 2, 1, 1, 1], index=table.index, name="n_cells"), check_dtype=False
    )
