"""Training: :func:`fit` takes a configuration to a checkpoint."""

from hce_jax.training.loop import FitResult, fit

__all__ = ["FitResult", "fit"]
