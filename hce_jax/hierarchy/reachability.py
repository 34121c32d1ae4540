"""The reachability matrix R of a cell type hierarchy, and what follows from it.

R[i, j] = 1 when type j is type i or a descendant of it: the reflexive transitive closure of the hierarchy's edges
(Cultrera di Montesano et al., Nat Comput Sci 2026, Methods). The published store keeps it as ``child_matrix.npy``.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from hce_jax.errors import HierarchyError

AnyArray = Any  # a numpy or a JAX array; this package itself never imports JAX


def reachability_from_edges(n_types: int, edges: Iterable[tuple[int, int]]) -> Float[np.ndarray, "c d"]:
    """Close the edges (parent, child) of a directed acyclic graph.

    Parameters
    ----------
    n_types
        Number of types C.
    edges
        Pairs (parent, child) of indices in [0, C). Any number of parents per child, in any order.

    Returns
    -------
    float32 array (C, C) of zeros and ones.

    Raises
    ------
    HierarchyError
        If an index is out of range or the edges contain a cycle.

    Examples
    --------
    >>> reachability_from_edges(3, [(0, 1), (1, 2)]).astype(int).tolist()
    [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
    """
    reach = np.eye(n_types, dtype=bool)
    for parent, child in edges:
        if not (0 <= parent < n_types and 0 <= child < n_types):
            raise HierarchyError(f"edge ({parent}, {child}) names a type outside 0..{n_types - 1}")
        reach[parent, child] = True
    for via in range(n_types):  # Warshall: after this round every path through `via` is in
        reach |= reach[:, via, None] & reach[None, via, :]
    return validate_reachability(reach)


def validate_reachability(
    matrix: np.ndarray, labels: Sequence[str] | None = None, where: str = "the child matrix"
) -> Float[np.ndarray, "c d"]:
    """Check that a matrix is the reachability matrix of a directed acyclic graph.

    Parameters
    ----------
    matrix
        Array of zeros and ones, any numeric or boolean type.
    labels
        Names of the types, for the messages.
    where
        What to call the matrix in the messages, e.g. its file.

    Returns
    -------
    The same matrix as float32.

    Raises
    ------
    HierarchyError
        If it is not square, holds something else than 0 and 1, does not match the number of labels, or is not
        reflexive, antisymmetric (no cycle) and transitive.

    Examples
    --------
    >>> validate_reachability(np.array([[1, 1], [0, 1]])).dtype
    dtype('float32')
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise HierarchyError(f"{where} is not square: its shape is {matrix.shape}")
    n_types = matrix.shape[0]
    if labels is not None and len(labels) != n_types:
        raise HierarchyError(f"{where} has {n_types} rows, but the cell type lookup has {len(labels)} labels")
    if not np.isin(matrix, (0, 1)).all():
        raise HierarchyError(f"{where} holds values other than 0 and 1")

    def name(index: int) -> str:
        return f"{index} ({labels[index]})" if labels is not None else str(index)

    reach = matrix.astype(bool)
    if not reach.diagonal().all():
        missing = int(np.argmin(reach.diagonal()))
        raise HierarchyError(f"{where} is not reflexive: type {name(missing)} does not contain itself")
    strict = reach & ~np.eye(n_types, dtype=bool)
    cycles = np.argwhere(strict & strict.T)
    if len(cycles):
        first, second = (name(int(i)) for i in cycles[0])
        raise HierarchyError(f"{where} has a cycle: types {first} and {second} are below each other")
    two_steps = (strict.astype(np.float32) @ strict.astype(np.float32)) > 0
    gaps = np.argwhere(two_steps & ~reach)
    if len(gaps):
        top, bottom = (int(i) for i in gaps[0])
        middle = int(np.argmax(strict[top] & strict[:, bottom]))
        raise HierarchyError(
            f"{where} is not transitive: {name(top)} contains {name(middle)}, which contains {name(bottom)}, "
            f"but {name(top)} does not contain {name(bottom)}"
        )
    return reach.astype(np.float32)


def correct_predictions(targets: AnyArray, predictions: AnyArray, reachability: AnyArray) -> AnyArray:
    """Count a prediction that is a descendant of the label as the label.

    An author who wrote "T cell" is not contradicted by "CD8-positive T cell". A prediction that is an ancestor of the
    label stays as it is, and so stays wrong. Pinned by the golden files ``hierarchy_correct``.

    Parameters
    ----------
    targets, predictions
        Integer arrays (n,) of types.
    reachability
        R (c, c).

    Returns
    -------
    Array (n,): the target where R[target, prediction] is 1, the prediction elsewhere. Works on numpy arrays and, also
    inside ``jax.jit``, on JAX arrays.

    Examples
    --------
    >>> reach = np.array([[1, 1], [0, 1]])
    >>> correct_predictions(np.array([0, 1]), np.array([1, 0]), reach).tolist()
    [0, 0]
    """
    accepted = (reachability[targets, predictions] > 0).astype(targets.dtype)
    return predictions + accepted * (targets - predictions)


def propagate(probabilities: AnyArray, reachability: AnyArray) -> AnyArray:
    """Sum each type's probability over the type and its descendants: P R^T.

    Parameters
    ----------
    probabilities
        Array (n, c), rows summing to one.
    reachability
        R (c, c).

    Returns
    -------
    Array (n, c): the probability mass of each type's subtree, in [0, 1].

    Examples
    --------
    >>> propagate(np.array([[0.25, 0.75]]), np.array([[1, 1], [0, 1]])).tolist()
    [[1.0, 0.75]]
    """
    return probabilities @ reachability.T
