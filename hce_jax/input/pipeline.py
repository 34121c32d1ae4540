"""From a split to batches: Grain reads windows ahead in threads; batches are cut from them, joined, and prefetched."""

import dataclasses
from collections import deque
from collections.abc import Iterator
from typing import Any

import grain
import jax
from jax.sharding import NamedSharding

from hce_jax.errors import ConfigError
from hce_jax.input.batch import capacities, check_batch_fits, host_sharding, make_batch
from hce_jax.input.source import Shuffle, WindowSource, n_shards, plan_windows, stretch, training_windows
from hce_jax.store import Block, Split
from hce_jax.store.split import n_readers

#: Cells that an unshuffled pass reads at a time.
_PLAIN_WINDOW = 2048


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Which of how many hosts reads."""

    index: int
    count: int


_ONE_HOST = Hosts(index=0, count=1)


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


def training_batches(
    split: Split, batch_size: int, shuffle: Shuffle, shuffle_window: int, *, n_parts: int = 1, hosts: Hosts = _ONE_HOST
) -> grain.IterDataset:
    """One epoch of shuffled batches; the incomplete last one is dropped, as published.

    Parameters
    ----------
    split
        The cells.
    batch_size
        Cells b of each batch, over all hosts.
    shuffle
        data_seed and epoch.
    shuffle_window
        Cells that are mixed at a time. They are held in memory, packed, and as many again are read ahead.
    n_parts
        Parts that the streams of a batch come in, one for each of this host's devices: a divisor of its rows.
    hosts
        This host's place: it gets its rows of each batch, and reads the blocks of its own shards only.

    Returns
    -------
    Grain dataset of :class:`CellBatch`; its iterators have a state that can be saved. They raise StoreError where a
    block is damaged; to ask again is to read again.

    Raises
    ------
    ConfigError
        As :func:`batches_per_epoch`; or if the batch does not divide among the hosts, or is too large.

    Examples
    --------
    >>> for batch in training_batches(split, 2048, Shuffle(0, epoch=0), 32768):  # doctest: +SKIP
    ...     print(batch.targets.shape)
    """
    n_batches = batches_per_epoch(split, batch_size)  # refuses a batch that no split fills
    shards = n_shards(batch_size, len(split.block_sizes))
    if shards % hosts.count:
        raise ConfigError(
            f"{hosts.count} hosts cannot share the {shards} logical shards of the {split.name} split equally (as many "
            f"as divide 16 and config.batch_size={batch_size}, with two blocks or more each)"
        )
    share = shards // hosts.count
    owned = range(hosts.index * share, (hosts.index + 1) * share)
    windows = training_windows(split.block_sizes, batch_size, shuffle_window, shuffle, owned)
    cells = _Pass(WindowSource(split, windows, shuffle), batch_size // shards, n_batches, read_ahead=max(share, 2))
    return _batches(cells, batch_size // hosts.count, n_parts)


def evaluation_batches(
    split: Split, batch_size: int, *, n_parts: int = 1, hosts: Hosts = _ONE_HOST
) -> grain.IterDataset:
    """One pass in the order of the store that gives every cell once; the last batch is filled up and marked.

    Each host reads a stretch of the split of its own; all give the same number of batches, the last of which may have
    few cells or none.

    Parameters
    ----------
    split
        The cells.
    batch_size
        Rows b of each batch, over all hosts: a multiple of their number.
    n_parts, hosts
        As in :func:`training_batches`.

    Returns
    -------
    Grain dataset of :class:`CellBatch`.

    Examples
    --------
    >>> sum(int(batch.real.sum()) for batch in evaluation_batches(split, 2048))  # doctest: +SKIP
    3500032
    """
    blocks_per_window = max(1, _PLAIN_WINDOW // int(split.block_sizes.max()))
    n_batches, n_rows = -(-split.n_cells // batch_size), batch_size // hosts.count
    first = hosts.index * n_batches * n_rows
    windows = plan_windows({0: stretch(split.block_sizes, first, first + n_batches * n_rows)}, blocks_per_window, None)
    cells = _Pass(WindowSource(split, windows, None), n_rows, n_batches, read_ahead=2 * n_readers())
    return _batches(cells, n_rows, n_parts)


class StreamedSplit:
    """The cells of a split, read for each pass and put on the devices ahead of their use, by each host on its own.

    Parameters
    ----------
    split
        Where they are read: in a store, or held in memory.
    batch_size
        Cells b of each batch over all hosts, a multiple of the number of devices.
    sharding
        How the first axis of every array of a batch is split over the devices of all hosts.

    Examples
    --------
    >>> cells = StreamedSplit(split, 2048, sharding)  # doctest: +SKIP
    >>> for batch in cells.training_batches(Shuffle(0, epoch=0), 32768):  # doctest: +SKIP
    ...     state, metrics = train_step(state, batch)
    """

    def __init__(self, split: Split, batch_size: int, sharding: NamedSharding):
        self._split, self._batch_size = split, batch_size
        self._own_devices = host_sharding(sharding)
        self._hosts = Hosts(jax.process_index(), jax.process_count())

    def training_batches(self, shuffle: Shuffle, shuffle_window: int) -> grain.IterDataset:
        """Give this host's rows of the batches of :func:`training_batches`, on its devices."""
        n_parts = self._own_devices.num_devices
        return self._on_devices(
            training_batches(self._split, self._batch_size, shuffle, shuffle_window, n_parts=n_parts, hosts=self._hosts)
        )

    def evaluation_batches(self) -> grain.IterDataset:
        """Give this host's rows of the batches of :func:`evaluation_batches`, on its devices."""
        n_parts = self._own_devices.num_devices
        return self._on_devices(evaluation_batches(self._split, self._batch_size, n_parts=n_parts, hosts=self._hosts))

    def _on_devices(self, batches: grain.IterDataset) -> grain.IterDataset:
        # No buffer on the host: the batches are prefetched there already.
        return grain.experimental.device_put(batches, self._own_devices, cpu_buffer_size=0, device_buffer_size=2)


def _batches(cells: "_Pass", n_rows: int, n_parts: int) -> grain.IterDataset:
    split = cells.source.split
    check_batch_fits(split, n_rows // n_parts)
    sizes = capacities(split.count_entries, split.value_entries, n_rows // n_parts)
    batches = cells.map(lambda pieces: make_batch(pieces, n_rows, sizes, n_parts))
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2)


class _Pass(grain.IterDataset):
    """The cells of each batch, as pieces of blocks in the order of its rows.

    Parameters
    ----------
    source
        The windows of all shards, in the order in which they are needed.
    n_rows
        Cells that a batch takes of each shard.
    n_batches
        Batches; the last may find fewer cells.
    read_ahead
        Windows that are read while others are used up.
    """

    def __init__(self, source: WindowSource, n_rows: int, n_batches: int, read_ahead: int):
        super().__init__()
        self.source, self.n_rows, self.n_batches = source, n_rows, n_batches
        self.read_options = grain.ReadOptions(num_threads=n_readers(), prefetch_buffer_size=read_ahead)

    def __iter__(self) -> "_PassIterator":
        return _PassIterator(self)


class _PassIterator(grain.DatasetIterator):
    """Where a pass stands; its state is the number of the next batch."""

    def __init__(self, cells: _Pass):
        super().__init__()
        self._pass = cells
        self._go_to(0)

    def get_state(self) -> dict[str, Any]:
        return {"next_index": self._next_batch}

    def set_state(self, state: dict[str, Any]) -> None:
        self._windows.close()
        self._go_to(state["next_index"])

    def _go_to(self, batch: int) -> None:
        """Go on at a batch: windows that it and later ones do not need are not read."""
        source, begin = self._pass.source, batch * self._pass.n_rows
        self._next_batch = batch
        self._ahead = deque(window for window in source.windows if window.start + window.n_cells > begin)
        needed = dataclasses.replace(source, windows=list(self._ahead))
        self._windows = iter(grain.MapDataset.source(needed).to_iter_dataset(self._pass.read_options))
        self._held: dict[int, deque[tuple[int, Block]]] = {window.shard: deque() for window in source.windows}

    def __next__(self) -> list[Block]:
        if self._next_batch >= self._pass.n_batches:
            raise StopIteration
        begin = self._next_batch * self._pass.n_rows
        end = begin + self._pass.n_rows
        try:
            while self._ahead and self._ahead[0].start < end:
                window = self._ahead.popleft()
                self._held[window.shard].append((window.start, next(self._windows)))
        except Exception:
            self.set_state(self.get_state())  # or the window that could not be read would be passed over
            raise
        self._next_batch += 1
        pieces = [piece for held in self._held.values() for piece in _take(held, begin, end)]
        return pieces or [self._pass.source.split.read_block(0).slice(0, 0)]  # other hosts have cells yet

    def close(self) -> None:
        self._windows.close()
        super().close()


def _take(held: deque[tuple[int, Block]], begin: int, end: int) -> Iterator[Block]:
    """Yield a shard's cells from begin to end, and let go of the windows that they use up."""
    for start, cells in list(held):
        yield cells.slice(max(begin - start, 0), min(end - start, len(cells)))
        if start + len(cells) <= end:
            held.popleft()
