"""Labels from probabilities, worked by hand on a small tree."""

import numpy as np
import pandas as pd
import pytest

from hce_jax.annotate.labels import Labeller, Labels
from hce_jax.evaluation.calibration import Calibration

# lymphocyte > T cell > {CD4, CD8}; lymphocyte > B cell; neuron
LABELS = ("lymphocyte", "T cell", "CD4", "CD8", "B cell", "neuron")
IDS = tuple(f"CL:{number}" for number in range(6))
REACH = np.eye(6, dtype=np.float32)
REACH[0, :5] = 1
REACH[1, 2:4] = 1
ALL = np.ones(1, bool)


def labeller(threshold, calibration=None, reachability=REACH):
    return Labeller(LABELS, IDS, reachability, threshold, calibration)


def label(probabilities, threshold, expressed=ALL, calibration=None):
    given = labeller(threshold, calibration).label(np.array([probabilities], np.float32), expressed)

    def name(code):
        return None if code == -1 else LABELS[code]

    return (
        name(given.codes[0]),
        round(float(given.confidence[0]), 3),
        name(given.leaf_codes[0]),
        round(float(given.leaf_confidence[0]), 3),
        name(given.next_codes[0]),
    )


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.45, ("CD4", 0.5, "CD4", 0.5, None)),
        (0.6, ("T cell", 0.8, "CD4", 0.5, "CD4")),
        (0.85, ("lymphocyte", 0.9, "CD4", 0.5, "T cell")),
        (0.95, (None, 0, "CD4", 0.5, "lymphocyte")),
        (
            np.array([0.95, 0.7, 0.6]),
            ("T cell", 0.8, "CD4", 0.5, "CD4"),
        ),  # by depth: a root, then one ancestor, then two
        (np.array([0.85, np.inf, np.inf]), ("lymphocyte", 0.9, "CD4", 0.5, "T cell")),
    ],
)
def test_label_is_as_deep_as_the_mass_allows(threshold, expected):
    assert label([0.02, 0.03, 0.5, 0.27, 0.08, 0.1], threshold) == expected


def test_a_cell_without_counts_gets_no_label_however_sure_the_model_is():
    assert label([0, 0, 1, 0, 0, 0], 0.5, np.zeros(1, bool)) == (None, 0, None, 0, None)


def test_confidence_is_calibrated_by_the_depth_of_the_type():
    curves = np.array([[0, 1], [-1, 0.5], [0, 2]])  # of a root, below it, and below that
    promise, counts = (np.array([0.05]), np.array([0.9])), [np.full(6, 9)] * 2
    calibration = Calibration("cells", 9, "donor", 2, (), "", *promise, curves, *counts, 1.0)
    given = labeller(0.6, calibration).label(np.array([[0.02, 0.03, 0.5, 0.25, 0.1, 0.1]], np.float32), ALL)
    odds = np.exp(-1) * (0.78 / 0.22) ** 0.5  # T cell, depth 1; the leaf, CD4, has as much for as against it
    np.testing.assert_allclose([given.confidence[0], given.leaf_confidence[0]], [odds / (1 + odds), 0.5], rtol=1e-5)


def test_columns_of_obs():
    rows = [0, 0, 0.9, 0.1, 0, 0], [0, 0, 0.5, 0.5, 0, 0], [0.3, 0, 0, 0, 0, 0.7], [0.5, 0, 0, 0, 0, 0.5]
    given = labeller(0.6).label(np.array(rows, np.float32), np.ones(4, bool))
    table = labeller(0.6).table(given, pd.Index(["a", "b", "c", "d"]))
    assert table.index.tolist() == ["a", "b", "c", "d"]
    assert [*table] == [
        "hce_label", "hce_label_ontology_term_id", "hce_confidence", "hce_leaf_label", "hce_leaf_confidence",
        "hce_next_label", "hce_path",
    ]  # fmt: skip
    assert table["hce_label"].tolist() == ["CD4", "T cell", "neuron", "unassigned"]
    assert table["hce_label_ontology_term_id"].tolist() == ["CL:2", "CL:1", "CL:5", "unknown"]
    assert table["hce_next_label"].tolist() == ["", "CD4", "", "lymphocyte"]
    assert table["hce_path"].tolist() == ["lymphocyte > T cell > CD4", "lymphocyte > T cell", "neuron", ""]
    assert table["hce_label"].cat.categories.tolist() == ["CD4", "T cell", "neuron", "unassigned"]
    assert table["hce_confidence"].dtype == np.float32


def test_path_of_a_type_with_two_parents_goes_through_the_deeper():
    reach = REACH.copy()
    reach[5, 3] = 1  # CD8 below neuron, too, which is not as deep as T cell
    assert labeller(0.5, reachability=reach).paths[3] == "lymphocyte > T cell > CD8"
    reach = np.eye(6, dtype=np.float32)
    reach[0, 3] = reach[5, 3] = 1  # as deep: the lower code
    assert labeller(0.5, reachability=reach).paths[3] == "lymphocyte > CD8"


def test_consensus_of_a_cluster_is_what_most_of_its_cells_are():
    cells = {
        "a": [2, 2, 2, 3, 1],  # three of five CD4
        "b": [2, 2, 3, 3, 1],  # all T cells
        "c": [2, 4, 4, 5, 5],  # three of five lymphocytes, not more of any
        "d": [4, 5, -1, -1],  # nothing holds more than half
        "e": [-1],
        "f": [4, 4, 5, 5],  # half is not more than half
    }
    codes = np.array([code for each in cells.values() for code in each] + [5])
    groups = pd.Categorical([name for name, each in cells.items() for _ in each] + [None])
    given = labeller(0.5).consensus(codes, groups)
    assert given["group"].tolist() == [*"abcdef"]
    assert given["cells"].tolist() == [5, 5, 5, 4, 1, 4]
    assert given["label"].tolist() == ["CD4", "T cell", "lymphocyte", *["unassigned"] * 3]
    assert given["label_ontology_term_id"].tolist() == ["CL:2", "CL:1", "CL:0", *["unknown"] * 3]
    np.testing.assert_allclose(given["agreement"], [0.6, 1, 0.6, 0, 0, 0])
    np.testing.assert_allclose(given["unassigned"], [0, 0, 0, 0.5, 1, 0])


def test_parts_are_put_together_in_order():
    probabilities = np.random.default_rng(0).dirichlet(np.ones(6), size=9).astype(np.float32)
    one = labeller(0.5).label(probabilities, np.ones(9, bool))
    several = Labels.concatenate(
        [labeller(0.5).label(probabilities[start : start + 4], np.ones(4, bool)[: 9 - start]) for start in (0, 4, 8)]
    )
    for name in ("codes", "confidence", "leaf_codes", "leaf_confidence", "next_codes"):
        np.testing.assert_array_equal(getattr(one, name), getattr(several, name))
