"""Cell type hierarchies: reachability, what follows from it, and the Cell Ontology they come from."""

from hce_jax.hierarchy.cell_ontology import CellOntology, Mapped, Resolution
from hce_jax.hierarchy.ontology_diff import OntologyDiff, diff_ontology
from hce_jax.hierarchy.reachability import (
    correct_predictions,
    propagate,
    reachability_from_edges,
    validate_reachability,
)
from hce_jax.hierarchy.relations import depths, direct_edges, ontology_distances, siblings, tree_order

__all__ = [
    "CellOntology",
    "Mapped",
    "OntologyDiff",
    "Resolution",
    "correct_predictions",
    "depths",
    "diff_ontology",
    "direct_edges",
    "ontology_distances",
    "propagate",
    "reachability_from_edges",
    "siblings",
    "tree_order",
    "validate_reachability",
]
