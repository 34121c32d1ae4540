"""What every kind of store gives of a split: its blocks, one at a time."""

import abc
import dataclasses
import os
from typing import NamedTuple

import numpy as np

from hce_jax.errors import StoreError
from hce_jax.store.block import Block
from hce_jax.store.schema import LABEL_COLUMN, SideFiles

#: More threads than this leave each other waiting.
_MOST_READERS = 16


class Entries(NamedTuple):
    """How many entries the cells of a split have in a packed stream: on average, and at most."""

    mean: float
    most: int


@dataclasses.dataclass(frozen=True)
class Split(abc.ABC):
    """The cells of one split, in blocks.

    Attributes
    ----------
    name
        train, val or test.
    side
        The side files of its store.
    """

    name: str
    side: SideFiles

    @property
    @abc.abstractmethod
    def block_sizes(self) -> np.ndarray:
        """Cells of each block, (n_blocks,) int64."""

    @property
    @abc.abstractmethod
    def count_entries(self) -> Entries:
        """Entries a cell in the stream of counts."""

    @property
    @abc.abstractmethod
    def value_entries(self) -> Entries:
        """Entries a cell in the stream of values."""

    @abc.abstractmethod
    def read_block(self, index: int, columns: tuple[str, ...] = (LABEL_COLUMN,)) -> Block:
        """Read one block with its expression and the named columns; safe to call from several threads.

        Raises
        ------
        StoreError
            If the block is damaged, or a code has no entry in its lookup.
        """

    @property
    def n_cells(self) -> int:
        """Cells of the split."""
        return int(self.block_sizes.sum())


def n_readers() -> int:
    """Return the number of threads for reading blocks: one for each core of this process, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_READERS)


def check_codes(file: object, column: str, lowest: int, highest: int, side: SideFiles) -> None:
    """Check that a column's codes are in its lookup table.

    Raises
    ------
    StoreError
        If one is not, naming the file.
    """
    size = side.lookup_sizes.get(column)
    if size is not None and not 0 <= lowest <= highest < size:
        outside = lowest if lowest < 0 else highest
        raise StoreError(f"{file} has the {column} code {outside}, but {column}.parquet has the codes 0 to {size - 1}")
