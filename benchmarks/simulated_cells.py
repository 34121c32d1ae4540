"""Simulated cells for benchmarks that have no store: in packed blocks, and packed in the memory of a device.

As in the published atlas about one gene in nine is expressed, mostly by 1 to 3 counts. Few cells are drawn and then
repeated, so that as many lie in memory as a measurement needs.
"""

import dataclasses
import itertools
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax.sharding import Mesh

from hce_jax.input import CellBatch
from hce_jax.input.batch import LINE, capacities, make_batch
from hce_jax.input.resident import _gather, _Lines, _Resident
from hce_jax.preprocess.normalize import COUNTS_PER_CELL
from hce_jax.store import LABEL_COLUMN, Block, Entries, SideFiles
from hce_jax.store.block import AMOUNT_TYPES, COUNTS, SCALE, VALUES
from hce_jax.store.held import HeldSplit
from hce_jax.store.packing import Places, Stream

#: Share of the genes that a cell expresses, 2,190 of 19,331 in the published atlas.
EXPRESSED = 2_190 / 19_331
BLOCK_SIZE = 512
#: Of the geometric distribution of counts above zero: 1 to 3 with probability 0.94.
_MORE_COUNTS = 0.6


class PlainCells(NamedTuple):
    """Cells with counts, in numpy.

    Attributes
    ----------
    counts
        The walk over them.
    columns
        Factor of the counts and label of each (n,).
    """

    counts: Stream
    columns: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PlainBlock(Block):
    """A block of a store without pyarrow, as far as a batch is joined from it; its cells are :class:`PlainCells`."""

    cells: PlainCells

    @staticmethod
    def of_counts(counts: sp.csr_array, columns: Mapping[str, np.ndarray]) -> "PlainBlock":
        """Pack counts (n, g), as a block of a store does.

        Examples
        --------
        >>> len(PlainBlock.of_counts(sp.csr_array(np.eye(2)), {LABEL_COLUMN: np.array([1, 0])}))
        2
        """
        scale = (COUNTS_PER_CELL / counts.sum(axis=1)).astype(np.float32)
        stream = Places.of_csr(counts).pack(AMOUNT_TYPES[COUNTS])
        return PlainBlock(PlainCells(stream, {**columns, SCALE: scale}), counts.shape[1])

    def __len__(self) -> int:
        return len(self.cells.counts.offsets) - 1

    def stream(self, names: tuple[str, str]) -> Stream:
        """Return one of the two streams; that of values is empty."""
        if names == COUNTS:
            return self.cells.counts
        return Stream(np.zeros(0, np.uint8), np.zeros(0, AMOUNT_TYPES[VALUES]), np.zeros(len(self) + 1, np.int64))

    def column(self, name: str) -> np.ndarray:
        """Return a column of numbers (n,)."""
        return self.cells.columns[name]

    def slice(self, start: int, stop: int) -> "PlainBlock":
        """Return the cells from start to before stop, without copying."""
        (gaps, amounts, offsets), columns = self.cells
        offsets = offsets[start : stop + 1]
        entries = slice(offsets[0], offsets[-1])
        counts = Stream(gaps[entries], amounts[entries], offsets - offsets[0])
        return PlainBlock(PlainCells(counts, {name: each[start:stop] for name, each in columns.items()}), self.n_genes)

    def copy(self) -> "PlainBlock":
        """Return the same cells elsewhere in memory."""
        counts = Stream(*(array.copy() for array in self.cells.counts))
        return PlainBlock(self.cells._replace(counts=counts), self.n_genes)


def simulate(n_cells: int, n_genes: int, n_types: int, kind: type[Block] = PlainBlock) -> list[Block]:
    """Draw cells, in blocks of 512 and a last one that may have fewer.

    A gene is expressed with probability 1 - exp(-depth * level), with log-normal levels of genes and depths of cells.

    Examples
    --------
    >>> [len(block) for block in simulate(600, n_genes=100, n_types=3)]
    [512, 88]
    """
    level = np.random.default_rng(0).lognormal(0, 1.5, n_genes).astype(np.float32)
    low, high = 0.0, 100.0
    while high - low > 1e-4:  # the factor of the levels at which the mean is right
        middle = (low + high) / 2
        low, high = (middle, high) if -np.expm1(-middle * level).mean() < EXPRESSED else (low, middle)
    sizes = [min(BLOCK_SIZE, n_cells - start) for start in range(0, n_cells, BLOCK_SIZE)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda k: _simulate_block(k, sizes[k], low * level, n_types, kind), range(len(sizes))))


def _simulate_block(number: int, n_cells: int, level_g: np.ndarray, n_types: int, kind: type[Block]) -> Block:
    rng = np.random.default_rng([1, number])
    depth_n = rng.lognormal(0, 0.4, (n_cells, 1)).astype(np.float32)
    expressed = rng.random((n_cells, len(level_g)), np.float32) < -np.expm1(-depth_n * level_g)
    expressed[:, rng.integers(len(level_g))] = True  # no cell is empty
    rows, genes = np.nonzero(expressed)
    counts = rng.geometric(_MORE_COUNTS, len(genes))
    csr = sp.csr_array((counts, genes, np.searchsorted(rows, np.arange(n_cells + 1))), shape=expressed.shape)
    return kind.of_counts(csr, {LABEL_COLUMN: rng.integers(0, n_types, n_cells)})


def repeated(blocks: Sequence[Block], n_cells: int) -> list[Block]:
    """Return copies of the blocks, one after the other, until there are so many cells.

    Examples
    --------
    >>> len(repeated(simulate(512, 100, 3), n_cells=1024))
    2
    """
    copies: list[Block] = []
    while sum(map(len, copies)) < n_cells:
        block = blocks[len(copies) % len(blocks)]
        copies.append(block.copy() if isinstance(block, PlainBlock) else block.take(np.arange(len(block))))
    return copies


def entries_of(blocks: Sequence[Block]) -> Entries:
    """Return the entries of counts of a cell, on average and at most.

    Examples
    --------
    >>> entries_of([PlainBlock.of_counts(sp.csr_array(np.eye(2)), {LABEL_COLUMN: np.array([1, 0])})])
    Entries(mean=1.5, most=2)
    """
    sizes = np.concatenate([np.diff(block.stream(COUNTS).offsets) for block in blocks])
    return Entries(float(sizes.mean()), int(sizes.max()))


class Pieces:
    """Batches of pieces of blocks, as a batch of training joins pieces of 16 shards.

    Parameters
    ----------
    blocks
        The cells.
    batch_size
        Cells of a batch.

    Examples
    --------
    >>> pieces = Pieces(simulate(1024, 100, 3), batch_size=64)
    >>> len(pieces), pieces[3].targets.shape
    (16, (64,))
    """

    def __init__(self, blocks: Sequence[Block], batch_size: int):
        self._blocks, self._batch_size = blocks, batch_size
        self._sizes = capacities(entries_of(blocks), Entries(0.0, 0), batch_size)
        self._piece = math.gcd(max(batch_size // 16, 1), *map(len, blocks), batch_size)
        starts = [(number, at) for number, block in enumerate(blocks) for at in range(0, len(block), self._piece)]
        self._starts = np.random.default_rng(2).permutation(starts).tolist()

    def __len__(self) -> int:
        return len(self._starts) * self._piece // self._batch_size

    def __getitem__(self, number: int) -> CellBatch:
        count = self._batch_size // self._piece
        chosen = self._starts[number * count : (number + 1) * count]
        return self._join([self._blocks[block].slice(at, at + self._piece) for block, at in chosen])

    def first(self, count: int) -> list[CellBatch]:
        """Return the first batches, as many as there are.

        Examples
        --------
        >>> len(Pieces(simulate(1024, 100, 3), batch_size=256).first(8))
        4
        """
        return [self[number] for number in range(min(count, len(self)))]

    def of_cells(self, cells: np.ndarray) -> CellBatch:
        """Return the batch of these cells, given by their positions (b,).

        Examples
        --------
        >>> Pieces(simulate(1024, 100, 3), batch_size=2).of_cells(np.array([1000, 7])).targets.shape
        (2,)
        """
        starts = np.cumsum([0, *map(len, self._blocks)])
        blocks = np.searchsorted(starts, cells, side="right") - 1
        found = zip(blocks.tolist(), (cells - starts[blocks]).tolist(), strict=True)
        return self._join([self._blocks[block].slice(at, at + 1) for block, at in found])

    def _join(self, cells: Sequence[Block]) -> CellBatch:
        return make_batch(cells, self._batch_size, self._sizes)


def joined_ahead(pieces: Pieces) -> Iterator[CellBatch]:
    """Yield batches in order, joined ahead of their use in threads.

    Examples
    --------
    >>> len(list(joined_ahead(Pieces(simulate(1024, 100, 3), batch_size=64))))
    16
    """
    threads = min(os.cpu_count() or 1, 8)
    with ThreadPoolExecutor(threads) as pool:
        numbers = iter(range(len(pieces)))
        waiting = deque(pool.submit(pieces.__getitem__, number) for number in itertools.islice(numbers, 2 * threads))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(pieces.__getitem__, number) for number in itertools.islice(numbers, 1))


def held_split(blocks: Sequence[Block], n_types: int) -> HeldSplit:
    """Return blocks of a store as a split that is held in host memory.

    Examples
    --------
    >>> held_split(simulate(1024, 100, 3, Block), n_types=3).n_cells  # doctest: +SKIP
    1024
    """
    genes, types = (tuple(map(str, range(count))) for count in (blocks[0].n_genes, n_types))
    side = SideFiles(Path(), genes, genes, types, None, np.eye(n_types, dtype=np.float32), {})
    return HeldSplit("train", side, tuple(blocks))


class OnDevice:
    """The cells of some blocks, repeated, packed on one device as :class:`hce_jax.input.ResidentSplit` packs them.

    Parameters
    ----------
    blocks
        The cells.
    copies
        How often they are repeated, in the device's memory.
    batch_size
        Cells of a batch.
    mesh
        Of one device.

    Attributes
    ----------
    n_cells
        Cells on the device.
    n_bytes
        What they take.

    Examples
    --------
    >>> cells = OnDevice(simulate(512, 100, 3), copies=2, batch_size=64, mesh=data_mesh())  # doctest: +SKIP
    >>> cells.n_cells  # doctest: +SKIP
    1024
    """

    def __init__(self, blocks: Sequence[Block], copies: int, batch_size: int, mesh: Mesh):
        self._mesh, self._n_genes, self._batch_size = mesh, blocks[0].n_genes, batch_size
        streams = [block.stream(COUNTS) for block in blocks]
        lines_n = np.concatenate([-(-np.diff(stream.offsets) // LINE) for stream in streams])
        self._lines_n = np.tile(lines_n, copies)
        first_n = np.concatenate([[0], np.cumsum(self._lines_n)]).astype(np.int32)
        gaps, amounts = (_in_lines(streams, lines_n, which, copies) for which in ("gaps", "amounts"))
        self.n_cells = len(self._lines_n)
        self.n_bytes = gaps.nbytes + amounts.nbytes
        no_gaps, no_values = (jnp.zeros((1, 0, LINE), kind) for kind in (np.uint8, AMOUNT_TYPES[VALUES]))
        scale, targets = (
            np.tile(np.concatenate([block.column(name) for block in blocks]), copies)[None]
            for name in (SCALE, LABEL_COLUMN)
        )
        self._cells = _Resident(
            _Lines(gaps, amounts, jnp.asarray(first_n[None])),
            _Lines(no_gaps, no_values, jnp.zeros_like(first_n[None])),
            *jax.device_put((scale.astype(np.float32), targets.astype(np.int32))),
        )

    def order(self, n_batches: int) -> np.ndarray:
        """Return the cells of the first batches (t, b), drawn at random.

        Examples
        --------
        >>> cells.order(3).shape  # doctest: +SKIP
        (3, 64)
        """
        n_batches = min(n_batches, self.n_cells // self._batch_size)
        drawn = np.random.default_rng(3).permutation(self.n_cells)[: n_batches * self._batch_size]
        return drawn.reshape(n_batches, self._batch_size).astype(np.int32)

    def batches(self, order_tb: np.ndarray) -> Iterator[CellBatch]:
        """Yield the batches of an order, gathered on the device.

        Examples
        --------
        >>> next(cells.batches(cells.order(3))).targets.shape  # doctest: +SKIP
        (64,)
        """
        entries = self._lines_n[order_tb].sum(1) * LINE
        mean, most = float(self._lines_n.mean()) * LINE, int(self._lines_n.max()) * LINE
        sizes = capacities(Entries(mean, most), Entries(0.0, 0), self._batch_size)
        order = jax.device_put(order_tb[:, None, :])
        gather = partial(_gather, self._cells, order, mesh=self._mesh, n_genes=self._n_genes)
        for step, needed in enumerate(entries):
            yield gather(step, room=next(size for size in sizes if size.counts >= needed))


def _in_lines(streams: Sequence[Stream], lines_n: np.ndarray, which: str, copies: int) -> jax.Array:
    """Return the entries of all cells, each beginning with a line (1, l, 128), on the device."""
    entries = np.concatenate([getattr(stream, which) for stream in streams])
    sizes_n = np.concatenate([np.diff(stream.offsets) for stream in streams])
    shift_n = (np.cumsum(lines_n) - lines_n) * LINE - (np.cumsum(sizes_n) - sizes_n)
    lines = np.zeros((int(lines_n.sum()), LINE), entries.dtype)
    lines.reshape(-1)[np.arange(len(entries)) + np.repeat(shift_n, sizes_n)] = entries
    return _tiled(jnp.asarray(lines), copies)


@partial(jax.jit, static_argnames="copies")
def _tiled(lines: jax.Array, copies: int) -> jax.Array:
    return jnp.tile(lines, (copies, 1))[None]
