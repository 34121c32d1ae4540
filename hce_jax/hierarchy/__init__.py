"""Cell type hierarchies: reachability, checks, what they mean for predictions, and the Cell Ontology they come from."""

from hce_jax.hierarchy.cell_ontology import CellOntology, Mapped, Resolution
from hce_jax.hierarchy.ontology_diff import OntologyDiff, diff_ontology
from hce_jax.hierarchy.reachability import (
    correct_predictions,
    propagate,
    reachability_from_edges,
    validate_reachability,
)

__all__ = [
    "CellOntology",
    "Mapped",
    "OntologyDiff",
    "Resolution",
    "correct_predictions",
    "diff_ontology",
    "propagate",
    "reachability_from_edges",
    "validate_reachability",
]
