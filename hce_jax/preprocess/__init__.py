"""From counts to a model's input."""

from hce_jax.preprocess.normalize import normalize_log1p

__all__ = ["normalize_log1p"]
