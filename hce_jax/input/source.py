"""The order of cells in a pass over a split, and its windows as a random-access source for Grain.

The cells of a split, in the order of the store, are cut into a fixed number of logical shards of equal size (within one
cell); every batch takes an equal part of each. The blocks of a shard are put in random order and grouped into windows,
whose cells are shuffled. So what meets in a batch comes from all over the split, a window can be read on its own, and
the order depends on (data_seed, epoch), batch size and window alone: not on who reads it.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from hce_jax.store import Block, Split
from hce_jax.typing import Int

#: Shards of a pass, if the batch size divides by it: hosts and devices own whole shards.
MOST_SHARDS = 16


class Shuffle(NamedTuple):
    """What an epoch's order depends on."""

    data_seed: int
    epoch: int

    def permutation(self, n: int, *where: int) -> np.ndarray:
        """Draw a permutation for a shard, or for a window of a shard."""
        return np.random.default_rng([self.data_seed, self.epoch, *where]).permutation(n)


class Window(NamedTuple):
    """Some cells of a shard that are read together.

    Attributes
    ----------
    start
        Cells of the shard before it.
    shard
        The shard, 0 to 15.
    number
        Its number in the shard.
    n_cells
        Its cells.
    pieces
        Block, and the first and last + 1 of its cells that belong to the shard (m, 3).
    """

    start: int
    shard: int
    number: int
    n_cells: int
    pieces: np.ndarray


def n_shards(batch_size: int) -> int:
    """Return the number of logical shards for a batch size: the largest divisor that it shares with 16.

    Examples
    --------
    >>> n_shards(2048), n_shards(100)
    (16, 4)
    """
    return math.gcd(MOST_SHARDS, batch_size)


def plan_windows(
    block_sizes: np.ndarray, n_shards: int, shards: range, window_cells: int, shuffle: Shuffle | None
) -> list[Window]:
    """List the windows of some shards in the order in which a reader of batches needs them.

    Parameters
    ----------
    block_sizes
        Cells of each block of the split (n_blocks,).
    n_shards, shards
        Logical shards in all, and those wanted.
    window_cells
        Cells that are mixed at a time, over all shards: rounded to whole blocks, at least one for each shard. The
        largest block counts where they differ.
    shuffle
        None: the order of the store.

    Examples
    --------
    >>> [window.pieces.tolist() for window in plan_windows(np.array([8, 8, 4]), 2, range(2), 8, None)]
    [[[0, 0, 8]], [[1, 2, 8]], [[1, 0, 2]], [[2, 0, 4]]]
    """
    ends = np.cumsum(block_sizes)
    starts, n_cells = ends - block_sizes, int(ends[-1])
    blocks_per_window = max(1, round(window_cells / n_shards / int(block_sizes.max())))
    windows = []
    for shard in shards:
        low, high = shard * n_cells // n_shards, (shard + 1) * n_cells // n_shards
        blocks = np.flatnonzero((starts < high) & (ends > low))
        if shuffle is not None:
            blocks = blocks[shuffle.permutation(len(blocks), shard)]
        first = np.maximum(low - starts[blocks], 0)
        last = np.minimum(high - starts[blocks], block_sizes[blocks])
        before = np.concatenate([[0], np.cumsum(last - first)])
        pieces = np.stack([blocks, first, last], axis=1)
        for number, at in enumerate(range(0, len(blocks), blocks_per_window)):
            end = min(at + blocks_per_window, len(blocks))
            windows.append(Window(int(before[at]), shard, number, int(before[end] - before[at]), pieces[at:end]))
    return sorted(windows, key=lambda window: (window.start, window.shard))


def cells_of_windows(block_sizes: np.ndarray, windows: list[Window], shuffle: Shuffle | None) -> dict[int, np.ndarray]:
    """Return, for each shard, its cells in the order of the pass, as positions in the split.

    Examples
    --------
    >>> windows = plan_windows(np.array([8, 8, 4]), 2, range(2), 8, None)
    >>> cells_of_windows(np.array([8, 8, 4]), windows, None)[1]
    array([10, 11, 12, 13, 14, 15, 16, 17, 18, 19])
    """
    starts = np.cumsum(block_sizes) - block_sizes
    cells: dict[int, list[np.ndarray]] = {}
    for window in windows:
        found = np.concatenate([starts[block] + np.arange(first, last) for block, first, last in window.pieces])
        if shuffle is not None:
            found = found[shuffle.permutation(window.n_cells, window.shard, window.number)]
        cells.setdefault(window.shard, []).append(found)
    return {shard: np.concatenate(each) for shard, each in cells.items()}


def cells_of_batches(
    block_sizes: np.ndarray, batch_size: int, window_cells: int, shuffle: Shuffle
) -> Int[np.ndarray, "t b"]:
    """Return the cells of all t whole batches of an epoch, as positions in the split: a row is a batch.

    Parameters
    ----------
    block_sizes, window_cells, shuffle
        As for :func:`plan_windows`.
    batch_size
        Cells of a batch; those of shard 0 come first in it, then those of shard 1, and so on.

    Examples
    --------
    >>> cells_of_batches(np.array([8, 8, 4]), 6, 8, Shuffle(data_seed=0, epoch=0)).shape
    (3, 6)
    """
    n_batches, shards = int(block_sizes.sum()) // batch_size, n_shards(batch_size)
    windows = plan_windows(block_sizes, shards, range(shards), window_cells, shuffle)
    share = batch_size // shards
    cells = cells_of_windows(block_sizes, windows, shuffle)
    taken = [cells[shard][: n_batches * share].reshape(n_batches, share) for shard in range(shards)]
    return np.concatenate(taken, axis=1)


@dataclasses.dataclass(frozen=True)
class WindowSource:
    """The cells of windows.

    Parameters
    ----------
    split
        Where they are.
    windows
        From :func:`plan_windows`.
    shuffle
        None: the order of the store.

    Examples
    --------
    >>> shuffle = Shuffle(data_seed=0, epoch=3)
    >>> windows = plan_windows(split.block_sizes, 16, range(16), 32768, shuffle)  # doctest: +SKIP
    >>> len(WindowSource(split, windows, shuffle)[0])  # doctest: +SKIP
    2048
    """

    split: Split
    windows: list[Window]
    shuffle: Shuffle | None

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.windows)

    def __getitem__(self, index: int) -> Block:
        """Read a window, its cells shuffled."""
        window = self.windows[index]
        blocks = (self.split.read_block(block).slice(first, last) for block, first, last in window.pieces.tolist())
        cells = Block.concatenate(list(blocks))
        if self.shuffle is None:
            return cells
        return cells.take(self.shuffle.permutation(len(cells), window.shard, window.number))
