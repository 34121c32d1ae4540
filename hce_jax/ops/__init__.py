"""Numerical operations, pure ``jax.numpy``: sparse projections onto the simplex and PyTorch's batch norm."""

from hce_jax.ops.entmax import entmax15, sparsemax

__all__ = ["entmax15", "sparsemax"]
