import graphlib

import numpy as np
import pytest

from hce_jax.errors import HierarchyError
from hce_jax.hierarchy import correct_predictions, propagate, reachability_from_edges, validate_reachability


def closure_by_sets(n_types, edges):
    """Independent oracle: descendants as sets, children before parents."""
    children = {i: {c for p, c in edges if p == i} for i in range(n_types)}
    below = {}
    for i in graphlib.TopologicalSorter(children).static_order():
        below[i] = {i}.union(*(below[c] for c in children[i]))
    return np.array([[float(j in below[i]) for j in range(n_types)] for i in range(n_types)])


@pytest.mark.parametrize("seed", range(5))
def test_closure_equals_descendant_sets_of_a_random_dag(seed):
    rng = np.random.default_rng(seed)
    names = rng.permutation(30).tolist()
    edges = [(names[i], names[j]) for i in range(30) for j in range(i + 1, 30) if rng.random() < 0.08]
    np.testing.assert_array_equal(reachability_from_edges(30, edges), closure_by_sets(30, edges))


@pytest.mark.golden("hierarchy_correct")
def test_golden_closure_and_correction(golden):
    arrays = golden.arrays
    reach = arrays["child_matrix"]
    edges = np.argwhere(arrays["direct_edges"] - np.diag(np.diag(arrays["direct_edges"])))
    np.testing.assert_array_equal(reachability_from_edges(len(reach), [tuple(map(int, e)) for e in edges]), reach)
    corrected = correct_predictions(arrays["targets"], arrays["preds"], reach)
    np.testing.assert_array_equal(corrected, arrays["corrected_preds"])
    np.testing.assert_array_equal(corrected, arrays["correct_labels"])


def test_an_ancestor_of_the_label_stays_wrong_and_a_descendant_becomes_the_label():
    reach = reachability_from_edges(3, [(0, 1), (1, 2)])
    targets, predictions = np.array([0, 1, 2, 1]), np.array([2, 0, 0, 2])
    assert correct_predictions(targets, predictions, reach).tolist() == [0, 0, 0, 1]


def test_propagate_sums_each_subtree():
    reach = reachability_from_edges(4, [(0, 1), (0, 2), (2, 3)])
    np.testing.assert_allclose(propagate(np.array([[0.1, 0.2, 0.3, 0.4]]), reach), [[1.0, 0.2, 0.7, 0.4]])


def matrix(*ones, n=3):
    m = np.eye(n)
    for i, j in ones:
        m[i, j] = 1
    return m


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (np.ones((2, 3)), r"not square: its shape is \(2, 3\)"),
        (np.ones(3), "not square"),
        (matrix() * 2, "other than 0 and 1"),
        (np.full((3, 3), np.nan), "other than 0 and 1"),
        (np.diag([1, 0, 1]), r"not reflexive: type 1 \(b\)"),
        (matrix((0, 1), (1, 0)), r"a cycle: types 0 \(a\) and 1 \(b\)"),
        (matrix((0, 1), (1, 2)), r"not transitive: 0 \(a\) contains 1 \(b\), which contains 2 \(c\)"),
        (np.eye(4), "4 rows, but the cell type lookup has 3 labels"),
    ],
)
def test_what_is_no_reachability_matrix_is_named(bad, says):
    with pytest.raises(HierarchyError, match=says):
        validate_reachability(bad, ["a", "b", "c"], where="child_matrix.npy")


def test_edges_with_a_cycle_or_a_foreign_type_are_refused():
    with pytest.raises(HierarchyError, match="cycle"):
        reachability_from_edges(3, [(0, 1), (1, 2), (2, 0)])
    with pytest.raises(HierarchyError, match=r"edge \(0, 3\)"):
        reachability_from_edges(3, [(0, 3)])
