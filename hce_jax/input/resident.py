"""A split that lies packed on the devices: batches are gathered there, in the order in which streaming gives them."""

from functools import partial
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hce_jax.errors import ConfigError
from hce_jax.input.batch import (
    LINE,
    Capacity,
    CellBatch,
    PackedStream,
    capacities,
    check_batch_fits,
    smallest_capacity,
)
from hce_jax.input.pipeline import batches_per_epoch
from hce_jax.input.source import Shuffle, cells_of_batches, cells_of_pieces, deal, n_shards
from hce_jax.store import LABEL_COLUMN, Block, Entries, Split
from hce_jax.store.block import AMOUNT_TYPES, COUNTS, SCALE, VALUES
from hce_jax.store.held import read_blocks
from hce_jax.typing import Array, Float, Int, Num, UInt8


class _Lines(NamedTuple):
    """One stream of all cells, on d devices; each cell begins with a line, so that a batch is gathered by lines.

    Attributes
    ----------
    gaps, amounts
        Lines of entries (d, l, 128), filled up with zeros.
    first
        The first line of each cell, and one more (d, n + 1).
    """

    gaps: UInt8[Array, "d l e"]
    amounts: Num[Array, "d l e"]
    first: Int[Array, "d m"]


class _Resident(NamedTuple):
    """All cells, on d devices: the streams, and scale and target of each cell (d, n)."""

    counts: _Lines
    values: _Lines
    scale: Float[Array, "d n"]
    targets: Int[Array, "d n"]


class ResidentSplit:
    """The cells of a split on the devices, each with the cells of its own logical shards.

    Parameters
    ----------
    split
        Where the cells are read, twice: for their sizes, and to send them.
    batch_size
        Cells b of each batch.
    sharding
        How the first axis of every array of a batch is split over the devices.

    Raises
    ------
    ConfigError
        If the batch cannot be divided among the devices, the split does not fit in their memory, or there are several
        hosts.
    StoreError
        If a block is damaged.

    Examples
    --------
    >>> cells = ResidentSplit(split, 2048, sharding)  # doctest: +SKIP
    >>> for batch in cells.training_batches(Shuffle(0, epoch=0), 32768):  # doctest: +SKIP
    ...     state, metrics = train_step(state, batch)
    """

    def __init__(self, split: Split, batch_size: int, sharding: NamedSharding):
        self._split, self._batch_size, self._sharding = split, batch_size, sharding
        self._mesh = mesh = sharding.mesh
        shards = n_shards(batch_size, len(split.block_sizes))
        if jax.process_count() > 1 or shards % mesh.size:
            raise ConfigError(
                f"config.cells_in=device needs one host and a number of devices that divides the {shards} logical "
                f"shards of the {split.name} split; there are {jax.process_count()} hosts and {mesh.size} devices; "
                "pass --config.cells_in=host"
            )
        check_batch_fits(split, batch_size // mesh.size)
        # The devices divide the shards, so that this deals each device its shards, one after the other.
        self._pieces = deal(split.block_sizes, mesh.size)
        #: The cells of each device, as positions in the split.
        self._owned = [cells_of_pieces(split.block_sizes, own) for own in self._pieces]
        #: Lines of each cell in the two streams (n,).
        self._lines = [np.concatenate(each) for each in zip(*map(_lines_of_cells, read_blocks(split)), strict=True)]
        self._check_memory()
        self._cells = self._send()

    def training_batches(self, shuffle: Shuffle, shuffle_window: int) -> grain.IterDataset:
        """Give the batches of :func:`hce_jax.input.training_batches`, from the devices' memory."""
        batches_per_epoch(self._split, self._batch_size)  # refuses a batch that no split fills
        order = cells_of_batches(self._split.block_sizes, self._batch_size, shuffle_window, shuffle)
        return self._batches(order.reshape(len(order), self._mesh.size, -1))

    def evaluation_batches(self) -> grain.IterDataset:
        """Give every cell once, each device its own in their order; the last batches are filled up and marked."""
        n_rows = self._batch_size // self._mesh.size
        n_steps = -(-max(map(len, self._owned)) // n_rows)
        order = np.full((self._mesh.size, n_steps * n_rows), -1)
        for row, cells in zip(order, self._owned, strict=True):
            row[: len(cells)] = cells
        return self._batches(order.reshape(-1, n_steps, n_rows).swapaxes(0, 1))

    def _batches(self, order_tdr: np.ndarray) -> grain.IterDataset:
        """Gather the cells of an order: steps, devices, rows; positions in the split, or -1 for none."""
        position = np.full(self._split.n_cells + 1, -1, np.int32)  # on the cell's device; the last is that of -1
        for cells in self._owned:
            position[cells] = np.arange(len(cells))
        local = position[order_tdr]
        order = jax.device_put(local, NamedSharding(self._mesh, PartitionSpec(None, *self._sharding.spec)))
        gather = partial(_gather, self._cells, order, mesh=self._mesh, n_genes=self._split.side.n_genes)
        rooms = self._rooms(order_tdr)
        batches = grain.MapDataset.range(len(rooms)).map(lambda step: gather(step, room=rooms[step]))
        return batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))

    def _rooms(self, order_tdr: np.ndarray) -> list[Capacity]:
        """Return, for each step, the smallest of three sizes that holds the part of every device, as in streaming."""
        entries = [lines * LINE for lines in self._lines]
        counts, values = (Entries(float(each.mean()), int(each.max())) for each in entries)
        sizes = capacities(counts, values, order_tdr.shape[2])
        needed = (np.append(each, 0)[order_tdr].sum(axis=2).max(axis=1) for each in entries)  # 0 for position -1
        return [smallest_capacity(sizes, Capacity(*each)) for each in zip(*needed, strict=True)]

    def _check_memory(self) -> None:
        entry_bytes = [1 + np.dtype(AMOUNT_TYPES[names]).itemsize for names in (COUNTS, VALUES)]
        needed = max(
            sum(int(lines[cells].sum()) * LINE * size for lines, size in zip(self._lines, entry_bytes, strict=True))
            for cells in self._owned
        )
        memory = self._mesh.devices.flat[0].memory_stats() or {}  # a CPU does not tell
        free = memory.get("bytes_limit", np.inf) - memory.get("bytes_in_use", 0)
        if needed > free:
            raise ConfigError(
                f"the {self._split.name} split takes {needed / 2**30:.1f} GiB on each device, and {free / 2**30:.1f} "
                "GiB are free; pass --config.cells_in=host or disk, or use a part of it (--config.sub_sample_frac)"
            )

    def _send(self) -> _Resident:
        devices = self._mesh.devices.flat
        shares = [self._send_cells(number, device) for number, device in enumerate(devices)]

        def joined(*arrays: Array) -> Array:
            shape = (len(arrays), *arrays[0].shape[1:])
            return jax.make_array_from_single_device_arrays(shape, self._sharding, list(arrays))

        return jax.tree.map(joined, *shares)

    def _send_cells(self, number: int, device: jax.Device) -> _Resident:
        """Send the cells of a device, block by block: the host never holds them all."""
        most_cells = max(map(len, self._owned))
        block_starts = np.cumsum(self._split.block_sizes) - self._split.block_sizes
        streams = []
        for names, lines in zip((COUNTS, VALUES), self._lines, strict=True):
            # A block is sent with empty lines behind it, up to the size of the largest: one shape, one compilation.
            n_sent = int(np.add.reduceat(lines, block_starts).max())
            n_lines = max(int(lines[cells].sum()) for cells in self._owned) + n_sent
            first = np.concatenate([[0], np.cumsum(lines[self._owned[number]])])
            streams.append(_StreamBuffer(names, first, n_lines, n_sent, device))
        scale, targets = np.zeros(most_cells, np.float32), np.zeros(most_cells, np.int32)
        blocks, firsts, lasts = self._pieces[number].T.tolist()
        position = 0
        for block, first, last in zip(read_blocks(self._split, blocks), firsts, lasts, strict=True):
            cells = block.slice(first, last)
            into = slice(position, position + len(cells))
            scale[into], targets[into] = cells.column(SCALE), cells.column(LABEL_COLUMN)
            for stream in streams:
                stream.send(cells, position)
            position += len(cells)
        counts, values = (stream.lines(most_cells) for stream in streams)
        return _Resident(counts, values, *jax.device_put((scale[None], targets[None]), device))


class _StreamBuffer:
    """One stream of a device's cells while it is sent.

    Parameters
    ----------
    names
        Which stream.
    first
        The first line of each cell, and one more (n + 1,).
    n_lines
        Lines of the buffer.
    n_sent
        Lines that are sent at a time.
    device
        Where to.
    """

    def __init__(self, names: tuple[str, str], first: np.ndarray, n_lines: int, n_sent: int, device: jax.Device):
        self._names, self._first, self._n_sent, self._device = names, first, n_sent, device
        # The axis of devices is there from the beginning: to add it would copy the buffer.
        self._gaps, self._amounts = (
            jnp.zeros((1, n_lines, LINE), dtype, device=device) for dtype in (np.uint8, AMOUNT_TYPES[names])
        )

    def send(self, cells: Block, position: int) -> None:
        """Send the cells that come at this position of the device's."""
        stream, first = cells.stream(self._names), self._first[position : position + len(cells) + 1]
        shift = (first[:-1] - first[0]) * LINE - stream.offsets[:-1]
        places = np.arange(len(stream.gaps)) + np.repeat(shift, np.diff(stream.offsets))

        def put(buffer: Array, entries: np.ndarray) -> Array:
            lines = np.zeros((1, self._n_sent, LINE), entries.dtype)
            lines.reshape(-1)[places] = entries
            return _put_lines(buffer, jax.device_put(lines, self._device), int(first[0]))

        self._gaps, self._amounts = put(self._gaps, stream.gaps), put(self._amounts, stream.amounts)

    def lines(self, most_cells: int) -> _Lines:
        """Return what was sent; of cells that this device has not, the first line is the end."""
        first = np.pad(self._first, (0, most_cells + 1 - len(self._first)), mode="edge").astype(np.int32)
        return _Lines(self._gaps, self._amounts, jax.device_put(first[None], self._device))


@partial(jax.jit, donate_argnums=0)
def _put_lines(buffer: Array, lines: Array, at: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_update_slice(buffer, lines, (0, at, 0))


def _lines_of_cells(block: Block) -> list[np.ndarray]:
    return [-(-np.diff(block.stream(names).offsets) // LINE) for names in (COUNTS, VALUES)]


@partial(jax.jit, static_argnames=("mesh", "n_genes", "room"))
def _gather(
    cells: _Resident, order_tdr: Int[Array, "t d r"], step: Int[Array, ""], *, mesh: Mesh, n_genes: int, room: Capacity
) -> CellBatch:
    """Gather the batch of a step of the order; ``room`` are the entries of its streams on each device."""
    axis = PartitionSpec(*mesh.axis_names)

    @partial(jax.shard_map, mesh=mesh, in_specs=axis, out_specs=axis)
    def gather(cells: _Resident, chosen_dr: Array) -> CellBatch:
        chosen_r, real_r = jnp.maximum(chosen_dr[0], 0), chosen_dr[0] >= 0
        counts, values = (
            _gather_stream(lines, chosen_r, real_r, n_entries // LINE)
            for lines, n_entries in zip((cells.counts, cells.values), room, strict=True)
        )
        scale, targets = (jnp.where(real_r, column[0][chosen_r], 0) for column in (cells.scale, cells.targets))
        return CellBatch(counts, values, scale, targets, real_r, n_genes)

    return gather(cells, jax.lax.dynamic_index_in_dim(order_tdr, step, keepdims=False))


def _gather_stream(lines: _Lines, chosen_r: Array, real_r: Array, n_lines: int) -> PackedStream:
    """Gather the lines of the chosen cells of this device, one after the other.

    Searches, of a few turns that need no word from the host, take the place of ``jnp.repeat`` and ``jnp.flatnonzero``,
    which are a dozen small kernels on a GPU.
    """
    n_rows = len(chosen_r)
    if not n_lines:
        gaps, amounts = (jnp.zeros((1, 0), entries.dtype) for entries in (lines.gaps, lines.amounts))
        return PackedStream(gaps, amounts, jnp.zeros((1, n_rows), jnp.int32))
    first_r = lines.first[0][chosen_r]
    size_r = jnp.where(real_r, lines.first[0][chosen_r + 1] - first_r, 0)
    end_r, n_walked_r = jnp.cumsum(jnp.stack([size_r, size_r > 0]), axis=1)

    number_l = jnp.arange(n_lines)
    row_l = jnp.searchsorted(end_r, number_l, side="right", method="scan_unrolled")
    used_l = number_l < end_r[-1]
    line_l = jnp.where(used_l, (first_r + size_r - end_r)[row_l] + number_l, 0)
    gaps, amounts = (
        jnp.where(used_l[:, None], entries[0][line_l], 0).reshape(1, -1) for entries in (lines.gaps, lines.amounts)
    )
    number_r = jnp.arange(n_rows)
    walked_r = jnp.searchsorted(n_walked_r, number_r, side="right", method="scan_unrolled")
    return PackedStream(gaps, amounts, jnp.where(number_r < n_walked_r[-1], walked_r, 0).astype(jnp.int32)[None])
