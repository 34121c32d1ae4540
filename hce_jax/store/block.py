"""A block: some cells with their packed expression and their integer columns."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from hce_jax.preprocess.normalize import COUNTS_PER_CELL, normalize_log1p
from hce_jax.store.packing import Places, Stream, expression, unpack

#: Columns of a block that hold its expression: two packed streams of (gaps, amounts), and the factor of each cell's
#: counts, 0 for a cell that is kept as values.
COUNTS, VALUES = ("count_gaps", "counts"), ("value_gaps", "values")
SCALE = "scale"
PACKED_COLUMNS = (*COUNTS, *VALUES, SCALE)

#: Type of the amounts of each stream.
AMOUNT_TYPES = {COUNTS: np.uint8, VALUES: np.float32}
#: A cell with a larger count is kept as values: its count would take too many entries.
_LARGEST_COUNT = 2**16 - 1
#: How far the expression computed from counts may lie from the one given.
TOLERANCE = 1e-6
#: What the smallest expression of a cell may be, as a count.
_SMALLEST_COUNTS = (1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Block:
    """Some cells, as they lie in a store or mixed.

    The expression of a cell is ``ln(1 + scale * count)`` where its counts are known (scale > 0), else the values as
    they are (scale = 0). Each cell is in one of the two streams and has no entries in the other.

    Attributes
    ----------
    cells
        One row per cell: the :data:`PACKED_COLUMNS` and int64 columns; ``cell_type`` is always there.
    n_genes
        Genes g of the expression.
    """

    cells: pa.RecordBatch
    n_genes: int

    @staticmethod
    def of_values(x_ng: np.ndarray, columns: Mapping[str, np.ndarray]) -> "Block":
        """Pack expression (n, g), sf-log1p, as the float32 values it has.

        Parameters
        ----------
        x_ng
            The expression; other types are rounded to float32.
        columns
            Whole numbers of each cell (n,), ``cell_type`` among them.

        Examples
        --------
        >>> Block.of_values(np.array([[0.5, 0.0]], np.float32), {"cell_type": np.array([3])}).x.toarray().tolist()
        [[0.5, 0.0]]
        """
        places = Places.of(x_ng)
        return _block(places, places.values, np.zeros(len(x_ng), np.float32), columns, x_ng.shape[1])

    @staticmethod
    def of_recovered_counts(x_ng: np.ndarray, columns: Mapping[str, np.ndarray]) -> "Block":
        """Pack expression (n, g), sf-log1p, as the counts behind it where they give it back within 1e-6.

        This is decided for each cell; a cell that no counts explain keeps its values, bit for bit. Counts that have a
        common divisor cannot be told from the counts divided by it.

        Parameters
        ----------
        x_ng
            The expression, 0 or above; other types are rounded to float32.
        columns
            Whole numbers of each cell (n,), ``cell_type`` among them.

        Examples
        --------
        >>> x = np.log1p(np.array([[2500.0, 7500.0]], np.float32))
        >>> Block.of_recovered_counts(x, {"cell_type": np.array([3])}).counts.toarray().tolist()
        [[1, 3]]
        """
        places = Places.of(x_ng.astype(np.float32, copy=False))
        counts, scale_n = _recover_counts(places)
        return _block(places, counts, scale_n, columns, x_ng.shape[1])

    @staticmethod
    def of_counts(counts: sp.csr_array, columns: Mapping[str, np.ndarray]) -> "Block":
        """Pack raw counts (n, g), to be scaled to 10,000 a cell.

        A cell whose counts are not whole numbers, or too large, is kept as the values that follow from them.

        Parameters
        ----------
        counts
            CSR with sorted indices, 0 or above.
        columns
            Whole numbers of each cell (n,), ``cell_type`` among them.

        Examples
        --------
        >>> block = Block.of_counts(sp.csr_array([[1.0, 3.0], [0.5, 0.0]]), {"cell_type": np.array([3, 4])})
        >>> block.counts.toarray().tolist(), block.column("scale").tolist()
        ([[1, 3], [0, 0]], [2500.0, 0.0])
        """
        counts = counts.astype(np.float64)
        counts.eliminate_zeros()
        sizes, total_n = np.diff(counts.indptr), counts.sum(axis=1)
        odd = (counts.data != np.rint(counts.data)) | (counts.data > _LARGEST_COUNT)
        odd_n = np.bincount(np.repeat(np.arange(len(sizes)), sizes)[odd], minlength=len(sizes)) > 0
        scale_n = np.where(odd_n, 0, COUNTS_PER_CELL / np.where(total_n == 0, 1, total_n)).astype(np.float32)
        if odd_n.any():
            of_odd = np.repeat(odd_n, sizes)
            counts.data[of_odd] = normalize_log1p(counts[np.flatnonzero(odd_n)]).data
        places = Places.of_csr(counts)
        return _block(places, places.values, scale_n, columns, counts.shape[1])

    def __len__(self) -> int:
        """Return the number of cells."""
        return self.cells.num_rows

    def column(self, name: str) -> np.ndarray:
        """Return a column of numbers (n,), not to be written to.

        Examples
        --------
        >>> Block.of_values(np.eye(2), {"cell_type": np.array([3, 4])}).column("cell_type").tolist()
        [3, 4]
        """
        return self.cells.column(name).to_numpy()

    def stream(self, names: tuple[str, str]) -> Stream:
        """Return one of the two streams, COUNTS or VALUES, without copying.

        Examples
        --------
        >>> Block.of_values(np.eye(2), {"cell_type": np.array([3, 4])}).stream(VALUES).gaps.tolist()
        [1, 1, 2]
        """
        gap_column, amount_column = (self.cells.column(name) for name in names)
        gaps, offsets = cell_bytes(gap_column)
        return Stream(gaps, cell_bytes(amount_column)[0].view(AMOUNT_TYPES[names]), offsets)

    @property
    def counts(self) -> sp.csr_array:
        """Counts (n, g), CSR; none for the cells that are kept as values."""
        return unpack(self.stream(COUNTS), self.n_genes)

    @property
    def x(self) -> sp.csr_array:
        """Expression (n, g), CSR float32."""
        return expression(self.stream(COUNTS), self.stream(VALUES), self.column(SCALE), self.n_genes)

    def take(self, rows: np.ndarray) -> "Block":
        """Return the cells at these positions, in this order; a position may come more than once.

        Examples
        --------
        >>> Block.of_values(np.eye(2), {"cell_type": np.array([3, 4])}).take(np.array([1, 0, 1])).x.toarray().tolist()
        [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
        """
        return Block(self.cells.take(pa.array(rows)), self.n_genes)

    def slice(self, start: int, stop: int) -> "Block":
        """Return the cells from start to before stop, without copying.

        Examples
        --------
        >>> Block.of_values(np.eye(2), {"cell_type": np.array([3, 4])}).slice(1, 2).x.toarray().tolist()
        [[0.0, 1.0]]
        """
        return Block(self.cells.slice(start, stop - start), self.n_genes)

    def with_columns(self, columns: Mapping[str, np.ndarray]) -> "Block":
        """Return the cells with these integer columns in place of theirs.

        Examples
        --------
        >>> block = Block.of_values(np.eye(2), {"cell": np.array([3, 4])})
        >>> block.with_columns({"cell_type": np.array([0, 1])}).column("cell_type").tolist()
        [0, 1]
        """
        packed = {name: self.cells.column(name) for name in PACKED_COLUMNS}
        return Block(pa.record_batch(packed | _integers(columns)), self.n_genes)

    @staticmethod
    def concatenate(blocks: "Sequence[Block]") -> "Block":
        """Join blocks, at least one, that have the same genes and columns.

        Examples
        --------
        >>> block = Block.of_values(np.eye(2), {"cell_type": np.array([3, 4])})
        >>> len(Block.concatenate([block, block.slice(0, 1)]))
        3
        """
        return blocks[0] if len(blocks) == 1 else Block(pa.concat_batches([b.cells for b in blocks]), blocks[0].n_genes)


def cell_bytes(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes of a large_binary column (b,) and where each row's begin and end (n + 1,), without copying.

    Examples
    --------
    >>> of_all, offsets = cell_bytes(pa.array([b"no", b"a", b"bc"], pa.large_binary())[1:])
    >>> of_all.tobytes(), offsets.tolist()
    (b'abc', [0, 1, 3])
    """
    _, offset_buffer, data = column.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[column.offset : column.offset + len(column) + 1]
    return np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]], offsets - offsets[0]


def _block(
    places: Places, counts: np.ndarray, scale_n: np.ndarray, columns: Mapping[str, np.ndarray], n_genes: int
) -> Block:
    """Make a block of cells with a scale above 0 as counts, the others as values."""
    arrays: dict[str, pa.Array] = {}
    for names, chosen, amounts in ((COUNTS, scale_n > 0, counts), (VALUES, scale_n == 0, places.values)):
        stream = places._replace(values=amounts).take(chosen).pack(AMOUNT_TYPES[names])
        entries = np.zeros(len(chosen), np.int64)
        entries[chosen] = np.diff(stream.offsets)
        offsets = np.concatenate([[0], np.cumsum(entries)])
        for name, data in zip(names, (stream.gaps, stream.amounts), strict=True):
            buffers = [None, pa.py_buffer(offsets * data.itemsize), pa.py_buffer(data)]
            arrays[name] = pa.Array.from_buffers(pa.large_binary(), len(chosen), buffers)
    arrays[SCALE] = pa.array(scale_n)
    return Block(pa.record_batch(arrays | _integers(columns)), n_genes)


def _integers(columns: Mapping[str, np.ndarray]) -> dict[str, pa.Array]:
    return {name: pa.array(values.astype(np.int64, copy=False)) for name, values in columns.items()}


def _recover_counts(places: Places) -> tuple[np.ndarray, np.ndarray]:
    """Return counts (k,) and a factor for each cell (n,) with ln(1 + factor * count) within TOLERANCE of its values.

    The smallest expression of a cell is taken as 1 count, then as 2, then as 3; the others follow from it. The factor
    is 0 where none of these explains all values. A cell without expression has factor 1.
    """
    n_cells = len(places.offsets) - 1
    counts, scale_n = np.zeros(len(places.values), np.float32), np.zeros(n_cells, np.float32)
    for smallest in _SMALLEST_COUNTS:
        unexplained = scale_n == 0
        if not unexplained.any():
            break
        tried_counts, tried_scale_n = _explain(places.take(unexplained), smallest)
        counts[np.repeat(unexplained, np.diff(places.offsets))] = tried_counts
        scale_n[unexplained] = tried_scale_n
    return counts, scale_n


def _explain(places: Places, smallest: int) -> tuple[np.ndarray, np.ndarray]:
    """Take the smallest expression of each cell as this many counts; return the same as _recover_counts."""
    starts, sizes = places.offsets[:-1], np.diff(places.offsets)
    # What overflows, is negative or is not a number fails the comparison at the end.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        scaled = np.maximum(np.expm1(places.values), 0)
        least_n = np.minimum.reduceat(np.where(scaled > 0, scaled, np.inf), starts)
        scale_n = np.where(least_n < np.inf, least_n / smallest, 1).astype(np.float32)
        scale = np.repeat(scale_n, sizes)
        counts = np.rint(scaled / scale)
        missed_n = np.maximum.reduceat(abs(np.log1p(counts * scale) - places.values), starts)
    largest_n = np.maximum.reduceat(counts, starts)
    return counts, np.where((missed_n <= TOLERANCE) & (largest_n <= _LARGEST_COUNT), scale_n, 0)
