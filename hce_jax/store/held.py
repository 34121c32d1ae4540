"""A split held in host memory: read once, then its blocks cost nothing."""

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
import psutil
from tqdm import tqdm

from hce_jax.errors import StoreError
from hce_jax.store.block import COUNTS, VALUES, Block
from hce_jax.store.schema import LABEL_COLUMN
from hce_jax.store.split import Entries, Split, n_readers

#: Bytes of an entry in each stream, and of a cell beside its entries.
_ENTRY_BYTES = {COUNTS: 2, VALUES: 5}
_CELL_BYTES = 44


@dataclasses.dataclass(frozen=True)
class HeldSplit(Split):
    """All blocks of a split, packed, with its labels; the same blocks as the split it was read from.

    Attributes
    ----------
    blocks
        From :func:`hold`.
    """

    blocks: tuple[Block, ...]

    @cached_property
    def block_sizes(self) -> np.ndarray:
        """Cells of each block, (n_blocks,) int64."""
        return np.array([len(block) for block in self.blocks], dtype=np.int64)

    @cached_property
    def count_entries(self) -> Entries:
        """Entries a cell in the stream of counts."""
        return self._entries(COUNTS)

    @cached_property
    def value_entries(self) -> Entries:
        """Entries a cell in the stream of values."""
        return self._entries(VALUES)

    def _entries(self, names: tuple[str, str]) -> Entries:
        entries = np.concatenate([np.diff(block.stream(names).offsets) for block in self.blocks])
        return Entries(float(entries.mean()), int(entries.max()))

    def read_block(self, index: int, columns: tuple[str, ...] = (LABEL_COLUMN,)) -> Block:
        """Return one block; only the label column is held."""
        return self.blocks[index]


def read_blocks(split: Split, chosen: Sequence[int] | None = None) -> Iterator[Block]:
    """Read blocks of a split, all or those chosen, in order, with a thread for each core, under a progress bar.

    Raises
    ------
    StoreError
        If a block is damaged.

    Examples
    --------
    >>> sum(len(block) for block in read_blocks(split))  # doctest: +SKIP
    15240192
    """
    readers, sizes = n_readers(), split.block_sizes
    indices = np.arange(len(sizes)) if chosen is None else np.asarray(chosen, np.int64)
    n_cells, waiting = int(sizes[indices].sum()), iter(indices.tolist())
    with (
        ThreadPoolExecutor(readers) as pool,
        tqdm(total=n_cells, desc=f"reading {split.name}", unit="cell", leave=False, disable=None) as bar,
    ):
        reading = deque(pool.submit(split.read_block, index) for index in itertools.islice(waiting, 4 * readers))
        while reading:
            block = reading.popleft().result()
            reading.extend(pool.submit(split.read_block, index) for index in itertools.islice(waiting, 1))
            bar.update(len(block))
            yield block


def hold(split: Split) -> HeldSplit:
    """Read a split into memory.

    Raises
    ------
    StoreError
        If a block is damaged, or the split is larger than the memory that is free.

    Examples
    --------
    >>> held = hold(open_store("cells").split("train"))  # doctest: +SKIP
    """
    n_bytes = split.n_cells * (
        _CELL_BYTES + _ENTRY_BYTES[COUNTS] * split.count_entries.mean + _ENTRY_BYTES[VALUES] * split.value_entries.mean
    )
    if n_bytes > (free := psutil.virtual_memory().available):
        raise StoreError(
            f"the {split.name} split of {split.side.path} takes about {n_bytes / 2**30:.1f} GiB of memory, and "
            f"{free / 2**30:.1f} GiB are free; pass --config.cells_in=disk, or use a part of it "
            "(--config.sub_sample_frac)"
        )
    return HeldSplit(split.name, split.side, tuple(read_blocks(split)))
