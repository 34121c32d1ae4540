"""The order of cells in an epoch, and its windows as a random-access source for Grain.

An epoch's order is made in two steps. The blocks of a split (what a store reads at once) are put in random order; that
gives a sequence of all cells. The sequence is cut into windows of a whole number of batches, and the cells of each
window are shuffled. So a window can be read on its own, its batches are cut from it without remainder, and the order
depends on (data_seed, epoch) alone.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from hce_jax.store import Block, Split


class Shuffle(NamedTuple):
    """What an epoch's order depends on."""

    data_seed: int
    epoch: int


@dataclasses.dataclass(frozen=True)
class WindowSource:
    """The windows of one pass over a split.

    Parameters
    ----------
    split
        The cells.
    window_cells
        Cells of a window; the last one may have fewer.
    shuffle
        None: the order of the store.

    Examples
    --------
    >>> source = WindowSource(split, window_cells=32768, shuffle=Shuffle(data_seed=0, epoch=3))  # doctest: +SKIP
    >>> len(source[0])  # doctest: +SKIP
    32768
    """

    split: Split
    window_cells: int
    shuffle: Shuffle | None

    def __len__(self) -> int:
        """Return the number of windows."""
        return -(-self.split.n_cells // self.window_cells)

    def __getitem__(self, window: int) -> Block:
        """Read window number ``window``, its cells shuffled."""
        order = self._block_order()
        ends = np.cumsum(self.split.block_sizes[order])
        starts = ends - self.split.block_sizes[order]
        low, high = window * self.window_cells, min((window + 1) * self.window_cells, self.split.n_cells)
        pieces = []
        for position in np.flatnonzero((starts < high) & (ends > low)):
            block = self.split.read_block(int(order[position]))
            first, last = max(low - starts[position], 0), min(high - starts[position], len(block))
            pieces.append(block.take(slice(first, last)) if last - first < len(block) else block)
        cells = Block.concatenate(pieces)
        return cells if self.shuffle is None else cells.take(self._rng(window).permutation(len(cells)))

    def _block_order(self) -> np.ndarray:
        n_blocks = len(self.split.block_sizes)
        return np.arange(n_blocks) if self.shuffle is None else self._rng().permutation(n_blocks)

    def _rng(self, *window: int) -> np.random.Generator:
        """Make the generator of the block order, or of one window's order."""
        assert self.shuffle is not None
        return np.random.default_rng([self.shuffle.data_seed, self.shuffle.epoch, *window])
