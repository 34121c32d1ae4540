"""From a split to batches: Grain reads windows ahead in threads and cuts them into batches."""

import dataclasses

import grain

from hce_jax.errors import ConfigError
from hce_jax.input.batch import CellBatch, make_batch
from hce_jax.input.source import Shuffle, WindowSource
from hce_jax.store import LABEL_COLUMN, Block, Split

#: Unshuffled passes read this many batches at once: block ends that fall inside are not read twice.
_PLAIN_WINDOW_BATCHES = 8


@dataclasses.dataclass(frozen=True)
class _CutIntoBatches(grain.experimental.FlatMapTransform):
    batch_size: int
    drop_last: bool
    max_fan_out: int

    def flat_map(self, element: Block) -> list["_Rows"]:
        starts = range(0, len(element), self.batch_size)
        rows = [_Rows(element, start, self.batch_size) for start in starts]
        return [each for each in rows if each.is_full or not self.drop_last]


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A batch still inside its window: making it dense is left to the moment it is asked for."""

    window: Block
    start: int
    batch_size: int

    @property
    def is_full(self) -> bool:
        return self.start + self.batch_size <= len(self.window)

    def to_batch(self) -> CellBatch:
        cells = self.window.take(slice(self.start, self.start + self.batch_size))
        return make_batch(cells.x, cells.columns[LABEL_COLUMN], self.batch_size)


def batches_per_epoch(split: Split, batch_size: int) -> int:
    """Return the number of whole batches in a split: the steps of a training epoch.

    Raises
    ------
    ConfigError
        If there is none, because the batch is larger than the split.

    Examples
    --------
    >>> batches_per_epoch(split, 2048)  # doctest: +SKIP
    7441
    """
    if batch_size > split.n_cells:
        raise ConfigError(
            f"config.batch_size is {batch_size}, but the {split.name} split has {split.n_cells} cells; "
            f"pass --config.batch_size={split.n_cells} or less"
        )
    return split.n_cells // batch_size


def training_batches(split: Split, batch_size: int, shuffle: Shuffle, shuffle_window: int) -> grain.IterDataset:
    """One epoch of shuffled batches; the incomplete last one is dropped, as published.

    Parameters
    ----------
    split
        The cells.
    batch_size
        Cells b of each batch.
    shuffle
        data_seed and epoch: the order is a function of them alone.
    shuffle_window
        Cells that are mixed at a time, rounded down to whole batches (at least one): they are held in memory, sparse,
        a few times over while windows are read ahead.

    Returns
    -------
    Grain dataset of :class:`CellBatch`; its iterators have a state that can be saved.

    Raises
    ------
    ConfigError
        As :func:`batches_per_epoch`.

    Examples
    --------
    >>> for batch in training_batches(split, 2048, Shuffle(0, epoch=0), 32768):  # doctest: +SKIP
    ...     print(batch.x.shape)
    """
    batches_per_epoch(split, batch_size)  # refuses a batch that no split fills
    window_batches = max(shuffle_window // batch_size, 1)
    return _batches(WindowSource(split, window_batches * batch_size, shuffle), batch_size, drop_last=True)


def evaluation_batches(split: Split, batch_size: int) -> grain.IterDataset:
    """One pass in the order of the store that gives every cell once; the last batch is filled up and marked.

    Parameters
    ----------
    split
        The cells.
    batch_size
        Rows b of each batch.

    Returns
    -------
    Grain dataset of :class:`CellBatch`.

    Examples
    --------
    >>> sum(int(batch.real.sum()) for batch in evaluation_batches(split, 2048))  # doctest: +SKIP
    3500032
    """
    return _batches(WindowSource(split, _PLAIN_WINDOW_BATCHES * batch_size, None), batch_size, drop_last=False)


def _batches(source: WindowSource, batch_size: int, *, drop_last: bool) -> grain.IterDataset:
    cut = _CutIntoBatches(batch_size, drop_last, max_fan_out=source.window_cells // batch_size)
    # One window is read while the one before is used up: enough for order, little for memory.
    windows = grain.MapDataset.source(source).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
    rows = grain.experimental.FlatMapIterDataset(windows, cut)
    batches = rows.map(lambda each: each.to_batch())
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2)
