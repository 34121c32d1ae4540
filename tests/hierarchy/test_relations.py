import networkx
import numpy as np
import pytest

from hce_jax.hierarchy import (
    depths,
    direct_edges,
    ontology_distances,
    reachability_from_edges,
    siblings,
    tree_order,
    validate_reachability,
)

# 0 -> 1, 0 -> 2, 1 -> 3 <- 2 (a type with two parents), and 4 alone; the edge 0 -> 3 is implied.
FIVE_TYPES = reachability_from_edges(5, [(0, 1), (0, 2), (1, 3), (2, 3), (0, 3)])


def random_dag(seed, n_types=30, density=0.1):
    """R of a random DAG with codes in random order, several roots, and the same as a networkx graph."""
    rng = np.random.default_rng(seed)
    codes = rng.permutation(n_types).tolist()
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(n_types))
    graph.add_edges_from(
        (codes[i], codes[j]) for i in range(n_types) for j in range(i + 1, n_types) if rng.random() < density
    )
    return reachability_from_edges(n_types, graph.edges), graph


def reduction(graph):
    """Edges of networkx's transitive reduction."""
    return set(networkx.transitive_reduction(graph).edges)


def test_the_relations_of_five_types_worked_by_hand():
    edges = [[0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(direct_edges(FIVE_TYPES), edges)
    np.testing.assert_array_equal(depths(FIVE_TYPES), [0, 1, 1, 3, 0])
    distances = [[0, 1, 1, 2, 2], [1, 0, 2, 1, 3], [1, 2, 0, 1, 3], [2, 1, 1, 0, 4], [2, 3, 3, 4, 0]]
    np.testing.assert_array_equal(ontology_distances(FIVE_TYPES), distances)
    assert np.argwhere(siblings(FIVE_TYPES)).tolist() == [[1, 2], [2, 1]]  # not 0 and 4, which have no parent
    assert tree_order(FIVE_TYPES).tolist() == [0, 1, 3, 2, 4]


@pytest.mark.parametrize("seed", range(5))
def test_relations_of_a_random_dag_are_networkx_s(seed):
    reach, graph = random_dag(seed)
    reduced = reduction(graph)
    assert set(map(tuple, np.argwhere(direct_edges(reach)).tolist())) == reduced
    assert depths(reach).tolist() == [len(networkx.ancestors(graph, code)) for code in range(30)]

    rooted = networkx.Graph(list(reduced))
    rooted.add_edges_from((30, code) for code in range(30) if graph.in_degree(code) == 0)
    length = dict(networkx.all_pairs_shortest_path_length(rooted))
    expected = [[length[i][j] for j in range(30)] for i in range(30)]
    np.testing.assert_array_equal(ontology_distances(reach), expected)

    parents = [{parent for parent, child in reduced if child == code} for code in range(30)]
    shared = [[i != j and bool(parents[i] & parents[j]) for j in range(30)] for i in range(30)]
    np.testing.assert_array_equal(siblings(reach), shared)
    assert not (siblings(reach) & (reach > 0)).any()  # neither is above the other


@pytest.mark.golden("hierarchy_correct")
def test_golden_direct_edges_without_those_that_follow_from_others(golden):
    edges = golden.arrays["direct_edges"].astype(bool)
    np.fill_diagonal(edges, False)
    reach = validate_reachability(golden.arrays["child_matrix"])
    expected = reduction(networkx.DiGraph(np.argwhere(edges).tolist()))
    assert set(map(tuple, np.argwhere(direct_edges(reach)).tolist())) == expected


@pytest.mark.parametrize("seed", range(5))
def test_in_tree_order_every_type_stands_once_and_right_after_a_relative(seed):
    reach, graph = random_dag(seed)
    order = tree_order(reach).tolist()
    assert sorted(order) == list(range(30))
    edges = direct_edges(reach)
    for place, code in enumerate(order[1:], start=1):
        before = order[place - 1]
        parents = set(np.flatnonzero(edges[:, code]).tolist())
        # Directly below the type before it, or next in line below one of that type's ancestors; a root starts anew.
        assert not parents or parents & {before, *networkx.ancestors(graph, before)}


def test_in_tree_order_large_families_come_first_and_equal_ones_by_code():
    edges = [(3, 2), (5, 1), (5, 6), (6, 4)]  # 0 and 7 alone; of 5's children 6 has a child
    assert tree_order(reachability_from_edges(8, edges)).tolist() == [5, 6, 4, 1, 3, 2, 0, 7]


def test_types_without_a_hierarchy_are_two_apart_and_keep_their_order():
    reach = np.eye(3, dtype=np.float32)
    assert not direct_edges(reach).any()
    assert not siblings(reach).any()
    np.testing.assert_array_equal(ontology_distances(reach), 2 * (1 - np.eye(3)))
    assert tree_order(reach).tolist() == [0, 1, 2]
