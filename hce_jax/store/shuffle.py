"""Shuffle any number of cells on disk, in two passes and in bounded memory.

The cells of a split are put in an order drawn uniformly from all orders, so no cell keeps a neighbour of its study.
The first pass reads the source in its own order, a chunk at a time. It writes each chunk with its cells sorted by where
they go, one record batch for each part of the store that gets some of them. The second pass makes the parts, one at a
time, each from its record batch of every chunk. Memory holds one chunk or one part; the disk holds all cells twice.

Between the passes the cells that are there more than once are found: each chunk has for each of its cells a checksum of
its counts.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import xxhash

from hce_jax.files import written_aside
from hce_jax.store.block import COUNTS, PACKED_COLUMNS, VALUES, Block

#: Cells read at a time, of a chunk (which decides how often the second pass looks into a chunk), and of a part.
CELLS_PER_READ, CELLS_PER_CHUNK, CELLS_PER_PART = 8_192, 32_768, 32_768
#: Cells with fewer expressed genes may well be equal by chance.
FEWEST_GENES_TO_TELL = 25
_CELL, _FINGERPRINT = "cell", "fingerprint"
_OPTIONS = ipc.IpcWriteOptions(compression=pa.Codec("zstd", 1))


@dataclasses.dataclass(frozen=True)
class Shuffle:
    """Where each cell goes. Cells are numbered in the order of the source.

    Attributes
    ----------
    split_n
        Code of the split of each cell (n,).
    place_n
        Its place in its split (n,), before copies are dropped.
    n_genes
        Genes g of the expression.
    cells_per_chunk, cells_per_part
        Cells of a chunk and of a part.
    """

    split_n: np.ndarray
    place_n: np.ndarray
    n_genes: int
    cells_per_chunk: int = CELLS_PER_CHUNK
    cells_per_part: int = CELLS_PER_PART

    @staticmethod
    def draw(split_n: np.ndarray, n_genes: int, seed: int, **sizes: int) -> "Shuffle":
        """Draw an order for each split.

        Examples
        --------
        >>> Shuffle.draw(np.array([0, 1, 0, 0]), n_genes=5, seed=1).place_n.tolist()
        [0, 0, 1, 2]
        """
        place_n = np.empty(len(split_n), np.int64)
        for split in np.unique(split_n):
            cells = np.flatnonzero(split_n == split)
            place_n[cells] = np.random.default_rng([seed, int(split)]).permutation(len(cells))
        return Shuffle(split_n, place_n, n_genes, **sizes)

    @property
    def n_chunks(self) -> int:
        """Number of chunks of the first pass."""
        return -(-len(self.split_n) // self.cells_per_chunk)

    def chunk_cells(self, chunk: int) -> np.ndarray:
        """Return the numbers of the cells of a chunk."""
        start = chunk * self.cells_per_chunk
        return np.arange(start, min(start + self.cells_per_chunk, len(self.split_n)))

    def write_chunk(
        self, chunk: int, path: Path, read: Callable[[np.ndarray], Block], done: Callable[[int], None]
    ) -> dict[str, Any]:
        """Read a chunk and write it, sorted by where its cells go.

        Parameters
        ----------
        chunk
            Its number.
        path
            The file.
        read
            Gives the cells with these numbers, without columns.
        done
            Called with the number of cells each time that some are read.

        Returns
        -------
        What is to be recorded: the size of the file, cells without any expressed gene, cells kept as values.
        """
        cells = self.chunk_cells(chunk)
        blocks = []
        for start in range(0, len(cells), CELLS_PER_READ):
            numbers = cells[start : start + CELLS_PER_READ]
            block = read(numbers)
            blocks.append(block.with_columns({_CELL: numbers, _FINGERPRINT: fingerprints(block)}))
            done(len(numbers))
        n_empty = sum(int((_expressed(each) == 0).sum()) for each in blocks)
        block = Block.concatenate(blocks)
        blocks.clear()  # they take as much memory again
        order = np.lexsort((self.place_n[cells], self._bucket(cells)))
        ends = np.cumsum(np.unique(self._bucket(cells), return_counts=True)[1])
        with written_aside(path) as aside:
            with ipc.new_file(aside, block.cells.schema, options=_OPTIONS) as file:
                for rows in np.split(order, ends[:-1]):
                    file.write_batch(block.take(rows).cells)
            size = aside.stat().st_size
        return {"bytes": size, "empty": n_empty, "cells_as_values": int((block.column("scale") == 0).sum())}

    def originals(self, folder: Path) -> np.ndarray:
        """Find for each cell the first cell with the same counts, itself for most, (n,); all chunks must be there.

        Cells with fewer than :data:`FEWEST_GENES_TO_TELL` expressed genes are not compared.
        """
        fingerprint_n = np.empty(len(self.split_n), np.int64)
        for chunk in range(self.n_chunks):
            for cells in _batches(chunk_path(folder, chunk), (_CELL, _FINGERPRINT)):
                fingerprint_n[cells.column(_CELL).to_numpy()] = cells.column(_FINGERPRINT).to_numpy()
        order = np.argsort(fingerprint_n, kind="stable")
        sorted_n = fingerprint_n[order]
        is_first = np.concatenate([[True], (sorted_n[1:] != sorted_n[:-1]) | (sorted_n[1:] == 0)])
        original_n = np.empty_like(order)
        original_n[order] = order[np.flatnonzero(is_first)[np.cumsum(is_first) - 1]]
        return original_n

    def parts(self, split: int, dropped_n: np.ndarray) -> list[np.ndarray]:
        """Return the numbers of the cells of each part of a split, in the order in which they lie there.

        Parameters
        ----------
        split
            Its code.
        dropped_n
            Which cells are left out, (n,) bool.
        """
        cells = np.flatnonzero(self.split_n == split)
        ordered = np.empty_like(cells)
        ordered[self.place_n[cells]] = cells
        kept = ordered[~dropped_n[ordered]]
        return [kept[start : start + self.cells_per_part] for start in range(0, len(kept), self.cells_per_part)]

    def read_part(self, cells: np.ndarray, folder: Path) -> Block:
        """Gather the cells with these numbers from the chunks, in this order, without columns."""
        chunk_of, bucket_of = cells // self.cells_per_chunk, self._bucket(cells)
        blocks = []
        for chunk in np.unique(chunk_of):
            wanted = np.searchsorted(self._buckets(int(chunk)), np.unique(bucket_of[chunk_of == chunk]))
            batches = _batches(chunk_path(folder, int(chunk)), (*PACKED_COLUMNS, _CELL), wanted)
            blocks += [Block(each, self.n_genes) for each in batches]
        block = Block.concatenate(blocks)
        found = np.argsort(block.column(_CELL))
        return block.take(found[np.searchsorted(block.column(_CELL)[found], cells)])

    def _bucket(self, cells: np.ndarray) -> np.ndarray:
        """Return for each of these cells the part that it goes to, numbered over all splits."""
        return self.split_n[cells].astype(np.int64) << 40 | self.place_n[cells] // self.cells_per_part

    @functools.cached_property
    def _of_chunks(self) -> dict[int, np.ndarray]:
        return {}

    def _buckets(self, chunk: int) -> np.ndarray:
        """Return to which parts the record batches of a chunk go."""
        if chunk not in self._of_chunks:
            self._of_chunks[chunk] = np.unique(self._bucket(self.chunk_cells(chunk)))
        return self._of_chunks[chunk]


def chunk_path(folder: Path, chunk: int) -> Path:
    """Return the file of a chunk.

    Examples
    --------
    >>> chunk_path(Path("chunks"), 3).as_posix()
    'chunks/chunk.3.arrow'
    """
    return folder / f"chunk.{chunk}.arrow"


def fingerprints(block: Block) -> np.ndarray:
    """Return a checksum of the expression of each cell, (n,) int64; 0 for a cell that has too few genes to tell.

    Examples
    --------
    >>> fingerprints(Block.of_values(np.ones((2, 30)), {}))[0] == fingerprints(Block.of_values(np.ones((1, 30)), {}))[0]
    np.True_
    """
    digest_n = np.zeros(len(block), np.uint64)
    for names in (COUNTS, VALUES):
        stream = block.stream(names)
        ends = stream.offsets.tolist()
        for cell, (start, end) in enumerate(itertools.pairwise(ends)):
            if end > start:
                seed = xxhash.xxh3_64_intdigest(stream.gaps[start:end].data)
                digest_n[cell] = xxhash.xxh3_64_intdigest(stream.amounts[start:end].data, seed=seed)
    digest_n[_expressed(block) < FEWEST_GENES_TO_TELL] = 0
    return digest_n.view(np.int64)


def _expressed(block: Block) -> np.ndarray:
    """Count the expressed genes of each cell (n,)."""
    counted = np.zeros(len(block), np.int64)
    for names in (COUNTS, VALUES):
        stream = block.stream(names)
        is_gene = (stream.amounts != 0) & (stream.gaps != 0)  # with gap 0 it is the rest of a count above 255
        counted += np.diff(np.concatenate([[0], np.cumsum(is_gene)])[stream.offsets])
    return counted


def _batches(path: Path, columns: tuple[str, ...], wanted: np.ndarray | None = None) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(str(path)) as opened:
        schema = ipc.open_file(opened).schema
        fields = sorted(map(schema.get_field_index, columns))
        reader = ipc.open_file(opened, options=ipc.IpcReadOptions(use_threads=False, included_fields=fields))
        for batch in range(reader.num_record_batches) if wanted is None else wanted.tolist():
            yield reader.get_batch(batch)
