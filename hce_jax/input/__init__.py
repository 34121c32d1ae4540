"""The input pipeline: blocks of a store -> windows -> batches."""

from hce_jax.input.batch import CellBatch
from hce_jax.input.pipeline import batches_per_epoch, evaluation_batches, training_batches
from hce_jax.input.source import Shuffle

__all__ = ["CellBatch", "Shuffle", "batches_per_epoch", "evaluation_batches", "training_batches"]
