"""Cell type hierarchies: reachability, checks, and what they mean for predictions."""

from hce_jax.hierarchy.reachability import (
    correct_predictions,
    propagate,
    reachability_from_edges,
    validate_reachability,
)

__all__ = ["correct_predictions", "propagate", "reachability_from_edges", "validate_reachability"]
