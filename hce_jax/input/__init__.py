"""The input pipeline: blocks of a store -> windows -> batches -> devices -> dense."""

from jax.sharding import NamedSharding

from hce_jax.input.batch import CellBatch, DenseBatch, batch_of_values, dense_batch, densify, row_width
from hce_jax.input.expression import Expression, rows_in_steps
from hce_jax.input.pipeline import Hosts, StreamedSplit, batches_per_epoch, evaluation_batches, training_batches
from hce_jax.input.resident import ResidentSplit
from hce_jax.input.source import Shuffle
from hce_jax.store import Split, hold

__all__ = [
    "PLACES",
    "CellBatch",
    "DenseBatch",
    "Expression",
    "Hosts",
    "ResidentSplit",
    "Shuffle",
    "StreamedSplit",
    "batch_of_values",
    "batches_per_epoch",
    "dense_batch",
    "densify",
    "evaluation_batches",
    "place_cells",
    "row_width",
    "rows_in_steps",
    "training_batches",
]

#: Where cells can be kept while a model is trained.
PLACES = ("disk", "host", "device")


def place_cells(split: Split, batch_size: int, sharding: NamedSharding, place: str) -> StreamedSplit | ResidentSplit:
    """Leave the cells of a split on disk, or read them into the memory of the host or of the devices, packed.

    The batches are the same wherever the cells are.

    Raises
    ------
    ConfigError, StoreError
        If they do not fit there.

    Examples
    --------
    >>> place_cells(split, 2048, sharding, "device").evaluation_batches()  # doctest: +SKIP
    """
    if place == "device":
        return ResidentSplit(split, batch_size, sharding)
    return StreamedSplit(hold(split) if place == "host" else split, batch_size, sharding)
