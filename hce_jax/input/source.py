"""The order of cells in a pass over a split, and its windows as a random-access source for Grain.

The blocks of a split are dealt out, once and for all, to a fixed number of logical shards of equal size (within one
cell); every batch takes an equal part of each. In an epoch the blocks of a shard are put in random order and grouped
into windows, whose cells are shuffled. So what meets in a batch, or in the rows of one shard, comes from all over the
split, a window can be read on its own, and the order depends on (data_seed, epoch), batch size and window alone: not on
who reads it.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from hce_jax.store import Block, Split
from hce_jax.typing import Int

#: Shards of a split, if the batch size divides by it: hosts and devices own whole shards.
MOST_SHARDS = 16
#: Any number would do; with another one every order of cells is another.
_DEALING_SEED = 0


class Shuffle(NamedTuple):
    """What an epoch's order depends on."""

    data_seed: int
    epoch: int

    def permutation(self, n: int, *where: int) -> np.ndarray:
        """Draw a permutation for a shard, or for a window of a shard."""
        # The length is drawn from too: numpy fills short seeds up with zeros, which would make (3,) and (3, 0) one.
        return np.random.default_rng([self.data_seed, self.epoch, len(where), *where]).permutation(n)


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


def n_shards(batch_size: int, n_blocks: int) -> int:
    """Return the number of logical shards: the most that divide 16 and the batch size, with two blocks or more each.

    Examples
    --------
    >>> n_shards(2048, n_blocks=14_883), n_shards(100, n_blocks=14_883), n_shards(2048, n_blocks=24)
    (16, 4, 8)
    """
    shards = math.gcd(MOST_SHARDS, batch_size)
    while shards > 1 and 2 * shards > n_blocks:
        shards //= 2
    return shards


def deal(block_sizes: np.ndarray, n_shards: int) -> list[Int[np.ndarray, "m 3"]]:
    """Return the pieces of blocks of each shard: block, and the first and last + 1 of its cells there.

    The blocks are put in an order that looks random and is always the same, for neighbours in a store are alike, and
    the sequence of their cells is cut into equal parts.

    Examples
    --------
    >>> [pieces.tolist() for pieces in deal(np.array([8, 8, 4]), 2)]
    [[[2, 0, 4], [0, 0, 6]], [[0, 6, 8], [1, 0, 8]]]
    """
    blocks = np.random.default_rng(_DEALING_SEED).permutation(len(block_sizes))
    bounds = [shard * int(block_sizes.sum()) // n_shards for shard in range(n_shards + 1)]
    return [_cut(blocks, block_sizes, low, high) for low, high in itertools.pairwise(bounds)]


def _cut(blocks: np.ndarray, block_sizes: np.ndarray, low: int, high: int) -> np.ndarray:
    """Cut the cells from position low to high out of the sequence of the cells of blocks."""
    ends = np.cumsum(block_sizes[blocks])
    starts = ends - block_sizes[blocks]
    own = np.flatnonzero((starts < high) & (ends > low))
    first, last = np.maximum(low, starts[own]) - starts[own], np.minimum(high, ends[own]) - starts[own]
    return np.stack([blocks[own], first, last], axis=1)


def stretch(block_sizes: np.ndarray, low: int, high: int) -> Int[np.ndarray, "m 3"]:
    """Return the cells from position ``low`` to ``high`` of a split as pieces of blocks, in the order of the store.

    Examples
    --------
    >>> stretch(np.array([8, 4]), 6, 100).tolist()
    [[0, 6, 8], [1, 0, 4]]
    """
    return _cut(np.arange(len(block_sizes)), block_sizes, low, high)


def plan_windows(
    shards: Mapping[int, Int[np.ndarray, "m 3"]], blocks_per_window: int, shuffle: Shuffle | None
) -> list[Window]:
    """List the windows of some shards in the order in which a reader of batches needs them.

    Parameters
    ----------
    shards
        The pieces of each shard that is wanted.
    blocks_per_window
        Blocks, or pieces of blocks, that a window holds.
    shuffle
        None: the order given.

    Examples
    --------
    >>> windows = plan_windows(dict(enumerate(deal(np.array([8, 8, 4]), 2))), 1, None)
    >>> [(window.shard, window.pieces.tolist()) for window in windows]
    [(0, [[2, 0, 4]]), (1, [[0, 6, 8]]), (1, [[1, 0, 8]]), (0, [[0, 0, 6]])]
    """
    windows = []
    for shard, pieces in shards.items():
        if shuffle is not None:
            pieces = pieces[shuffle.permutation(len(pieces), shard)]
        before = np.concatenate([[0], np.cumsum(pieces[:, 2] - pieces[:, 1])])
        for number, at in enumerate(range(0, len(pieces), blocks_per_window)):
            end = min(at + blocks_per_window, len(pieces))
            windows.append(Window(int(before[at]), shard, number, int(before[end] - before[at]), pieces[at:end]))
    return sorted(windows, key=lambda window: (window.start, window.shard))


def training_windows(
    block_sizes: np.ndarray, batch_size: int, window_cells: int, shuffle: Shuffle, owned: range | None = None
) -> list[Window]:
    """List the windows of an epoch, of all shards or those owned.

    Parameters
    ----------
    block_sizes
        Cells of each block of the split (n_blocks,).
    batch_size
        Cells of a batch, over all shards.
    window_cells
        Cells that are mixed at a time, over all shards: rounded to whole blocks, at least one for each shard. The
        largest block counts where they differ.
    shuffle
        data_seed and epoch.
    owned
        Shards; None for all.

    Examples
    --------
    >>> windows = training_windows(np.full(64, 256), 2048, 8192, Shuffle(data_seed=0, epoch=0))
    >>> len(windows), windows[0].n_cells
    (32, 512)
    """
    shards = n_shards(batch_size, len(block_sizes))
    dealt = deal(block_sizes, shards)
    blocks_per_window = max(1, round(window_cells / shards / int(block_sizes.max())))
    return plan_windows({shard: dealt[shard] for shard in owned or range(shards)}, blocks_per_window, shuffle)


def cells_of_pieces(block_sizes: np.ndarray, pieces: Int[np.ndarray, "m 3"]) -> Int[np.ndarray, "n"]:
    """Return the cells of pieces of blocks, as positions in the split.

    Examples
    --------
    >>> cells_of_pieces(np.array([8, 8, 4]), np.array([[2, 1, 4], [0, 0, 2]]))
    array([17, 18, 19,  0,  1])
    """
    starts = np.cumsum(block_sizes) - block_sizes
    return np.concatenate([np.arange(start + first, start + last) for start, (first, last) in
                           zip(starts[pieces[:, 0]], pieces[:, 1:], strict=True)])  # fmt: skip


def cells_of_windows(block_sizes: np.ndarray, windows: list[Window], shuffle: Shuffle | None) -> dict[int, np.ndarray]:
    """Return, for each shard, its cells in the order of the pass, as positions in the split.

    Examples
    --------
    >>> windows = plan_windows(dict(enumerate(deal(np.array([8, 8, 4]), 2))), 1, None)
    >>> cells_of_windows(np.array([8, 8, 4]), windows, None)[1]
    array([ 6,  7,  8,  9, 10, 11, 12, 13, 14, 15])
    """
    cells: dict[int, list[np.ndarray]] = {}
    for window in windows:
        found = cells_of_pieces(block_sizes, window.pieces)
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
        As for :func:`training_windows`.
    batch_size
        Cells of a batch; those of shard 0 come first in it, then those of shard 1, and so on.

    Examples
    --------
    >>> cells_of_batches(np.array([8, 8, 4]), 6, 8, Shuffle(data_seed=0, epoch=0)).shape
    (3, 6)
    """
    n_batches, shards = int(block_sizes.sum()) // batch_size, n_shards(batch_size, len(block_sizes))
    windows = training_windows(block_sizes, batch_size, window_cells, shuffle)
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
        From :func:`training_windows` or :func:`plan_windows`.
    shuffle
        None: the order of the store.

    Examples
    --------
    >>> shuffle = Shuffle(data_seed=0, epoch=3)
    >>> windows = training_windows(split.block_sizes, 2048, 32768, shuffle)  # doctest: +SKIP
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
