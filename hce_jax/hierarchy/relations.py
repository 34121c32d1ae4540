"""Who is whose parent, sibling and how far away: what follows from the reachability matrix R alone.

R is as :func:`hce_jax.hierarchy.validate_reachability` gives it. All of these speak of the C types of R and of nothing
else: a type of the Cell Ontology that a store does not have is nobody's parent here, and the nearest ancestors among
the C types take its place.
"""

import numpy as np
from jaxtyping import Bool, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import shortest_path


def direct_edges(reachability: np.ndarray) -> Bool[np.ndarray, "c d"]:
    r"""Give the fewest edges whose closure is R: the transitive reduction, drawn as a Hasse diagram.

    .. math:: E_{ij} = [i \ne j]\, R_{ij} \prod_{k \ne i, j} (1 - R_{ik} R_{kj})

    Parameters
    ----------
    reachability
        R (c, c).

    Returns
    -------
    True at [parent, child] when child is below parent and no other type lies between them. For a directed acyclic graph
    there is one such set of edges (Aho, Garey & Ullman, SIAM J. Comput. 1, 131, 1972).

    Examples
    --------
    >>> chain = np.array([[1, 1, 1], [0, 1, 1], [0, 0, 1]])
    >>> direct_edges(chain).astype(int).tolist()
    [[0, 1, 0], [0, 0, 1], [0, 0, 0]]
    """
    below_cc = _below(reachability)
    via_another_cc = below_cc.astype(np.float32) @ below_cc.astype(np.float32) > 0
    return below_cc & ~via_another_cc


def depths(reachability: np.ndarray) -> Int[np.ndarray, " c"]:
    r"""Count each type's ancestors among the C types, without itself: 0 for a root, always more for what is below.

    .. math:: depth_j = \sum_i R_{ij} - 1

    Parameters
    ----------
    reachability
        R (c, c).

    Examples
    --------
    >>> depths(np.array([[1, 1, 1], [0, 1, 1], [0, 0, 1]])).tolist()
    [0, 1, 2]
    """
    return _below(reachability).sum(axis=0)


def ontology_distances(reachability: np.ndarray) -> Int[np.ndarray, "c d"]:
    """Count the edges on the shortest path between any two types, up or down, in the Hasse diagram.

    A virtual root is put above the types that have no parent, so that two types of separate trees have a distance too:
    that of two roots is 2.

    Parameters
    ----------
    reachability
        R (c, c).

    Returns
    -------
    Symmetric, 0 on the diagonal: a parent or child is at 1, a sibling or grandparent at 2.

    Examples
    --------
    >>> two_trees = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]])  # 1 below 0; 2 alone
    >>> ontology_distances(two_trees).tolist()
    [[0, 1, 2], [1, 0, 3], [2, 3, 0]]
    """
    edges_cc = direct_edges(reachability)
    n_types = len(edges_cc)
    roots = np.flatnonzero(~edges_cc.any(axis=0))
    parents, children = np.nonzero(edges_cc)
    parents = np.concatenate([parents, np.full(len(roots), n_types)])  # the virtual root's index is C
    children = np.concatenate([children, roots])
    graph = coo_array((np.ones(len(parents)), (parents, children)), shape=(n_types + 1, n_types + 1))
    distances = shortest_path(graph.tocsr(), directed=False, unweighted=True)
    return distances[:n_types, :n_types].astype(np.int64)


def siblings(reachability: np.ndarray) -> Bool[np.ndarray, "c d"]:
    """Mark the pairs of types that share a direct parent. Types without a parent are no siblings.

    Parameters
    ----------
    reachability
        R (c, c).

    Returns
    -------
    Symmetric, False on the diagonal. Of two siblings neither is above the other: the edge from their parent to the
    lower one would not be direct.

    Examples
    --------
    >>> fork = np.array([[1, 1, 1], [0, 1, 0], [0, 0, 1]])
    >>> siblings(fork).astype(int).tolist()
    [[0, 0, 0], [0, 0, 1], [0, 1, 0]]
    """
    edges_cc = direct_edges(reachability).astype(np.float32)
    shared_cc = edges_cc.T @ edges_cc > 0
    np.fill_diagonal(shared_cc, False)
    return shared_cc


def tree_order(reachability: np.ndarray) -> Int[np.ndarray, " c"]:
    """Order the types so that each stands near its relatives: for the rows of a picture.

    Depth-first through the Hasse diagram: a type, then what is below it, then its next sibling. Of siblings, and of
    roots, the one with more descendants comes first, then the lower code, so that types that are related to none come
    last. A type with several parents stands below the first of them.

    Parameters
    ----------
    reachability
        R (c, c).

    Returns
    -------
    The codes in that order, each once.

    Examples
    --------
    >>> tree_order(np.array([[1, 0, 0, 0], [0, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 1]])).tolist()
    [1, 2, 3, 0]
    """
    edges_cc = direct_edges(reachability)
    n_below = _below(reachability).sum(axis=1)

    def first_on_top(codes: np.ndarray) -> list[int]:
        return sorted(codes.tolist(), key=lambda code: (n_below[code], -code))

    order: dict[int, None] = {}  # a set that remembers the order
    stack = first_on_top(np.flatnonzero(~edges_cc.any(axis=0)))
    while stack:
        code = stack.pop()
        if code not in order:
            order[code] = None
            stack += first_on_top(np.flatnonzero(edges_cc[code]))
    return np.array(list(order), dtype=np.int64)


def _below(reachability: np.ndarray) -> Bool[np.ndarray, "c d"]:
    """R without its diagonal."""
    below_cc = np.asarray(reachability) > 0
    np.fill_diagonal(below_cc, False)
    return below_cc
