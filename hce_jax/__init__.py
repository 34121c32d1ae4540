"""hce_jax: hierarchical cross-entropy cell-type annotation at atlas scale, in JAX."""

__version__ = "0.1.0"
