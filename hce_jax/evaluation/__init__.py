"""Evaluation of checkpoints: predictions, metric files, plots."""

from hce_jax.evaluation.predict import predict, test, validate

__all__ = ["predict", "test", "validate"]
