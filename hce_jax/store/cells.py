"""The cell store: one Arrow IPC file of packed blocks for each part of a split, described by store.json.

Each file holds record batches of :attr:`CellSplit.block_size` cells (the last may have fewer), zstd level 1. A batch
carries in its metadata the number of genes and the xxh3 checksum of each of its columns, which every reading compares.
The checksum is seeded with the place of the block (split, file, number), so that a sound block in a wrong place is
found too. Damage can also hit what Arrow reads before a checksum can be taken: of a batch, nothing is touched before
its schema, its lengths and the sizes of its buffers are known to be as written.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import xxhash

from hce_jax.errors import StoreError
from hce_jax.files import written_aside
from hce_jax.store.block import COUNTS, PACKED_COLUMNS, SCALE, VALUES, Block, cell_bytes
from hce_jax.store.schema import LABEL_COLUMN, LOOKUP_FOLDER, SPLITS, STORE_FILE, VAR_FILE, SideFiles
from hce_jax.store.split import Entries, Split, check_codes

FORMAT = "cells"
FORMAT_VERSION = 1
#: Cells of a block. Smaller ones are mixed better, larger ones read faster (docs/input.md has the measurements).
BLOCK_SIZE = 512

_COMPRESSION = pa.Codec("zstd", 1)
_CHECKSUMS, _N_GENES = b"xxh3_64", b"n_genes"  # in the metadata of a batch
_TYPES = {**dict.fromkeys((*COUNTS, *VALUES), pa.large_binary()), SCALE: pa.float32()}  # the other columns are int64
_REMEDY = "take the file from a copy of the store, or convert its source again"


@dataclasses.dataclass(frozen=True)
class Part:
    """What store.json says of one file.

    Attributes
    ----------
    file
        Its name in the folder of the split.
    cells, cells_as_counts
        Its cells, and those of them that are kept as counts.
    non_zeros
        Expressed genes, over all cells.
    count_entries, most_count_entries, value_entries, most_value_entries
        Entries of the two streams: all, and of the cell that has most.
    bytes, xxh3_64
        Size and checksum of the file.
    """

    file: str
    cells: int
    cells_as_counts: int
    non_zeros: int
    count_entries: int
    most_count_entries: int
    value_entries: int
    most_value_entries: int
    bytes: int
    xxh3_64: str


def checksum(path: Path) -> str:
    """Return the xxh3 checksum of a file, hexadecimal.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "empty"
    >>> _ = path.write_bytes(b"")
    >>> checksum(path)
    '2d06800538d394c2'
    """
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def write_part(path: Path, blocks: Iterable[Block], block_size: int = BLOCK_SIZE) -> Part:
    """Write blocks as one file, which appears when it is complete.

    Parameters
    ----------
    path
        The file, ``SPLIT/part.N.arrow``; it can be read under the name of this folder and file only.
    blocks
        Cells in order, in blocks of any size, all with the same columns; at least one block, which may be empty.
    block_size
        Cells of a block in the file.

    Raises
    ------
    OSError
        If it cannot be written.
    ValueError
        If there are no blocks.

    Examples
    --------
    >>> import tempfile
    >>> x = np.log1p(np.array([[2500.0, 7500.0]], np.float32))
    >>> block = Block.of_recovered_counts(x, {"cell_type": np.array([3])})
    >>> write_part(Path(tempfile.mkdtemp()) / "part.0.arrow", [block]).cells_as_counts
    1
    """
    options = ipc.IpcWriteOptions(compression=_COMPRESSION)
    totals, most = np.zeros(5, np.int64), np.zeros(2, np.int64)
    with written_aside(path) as aside:
        blocks = iter(blocks)
        first = next(blocks, None)
        if first is None:
            raise ValueError(f"{path} needs at least one block, which tells its columns")
        with ipc.new_file(aside, first.cells.schema, options=options) as file:
            for index, block in enumerate(_reblocked(itertools.chain([first], blocks), block_size)):
                checksums = _checksums(block.cells, f"{path.parent.name}/{path.name}", index)
                file.write_batch(block.cells, {_CHECKSUMS: " ".join(checksums), _N_GENES: str(block.n_genes)})
                streams = block.stream(COUNTS), block.stream(VALUES)
                expressed = sum(np.count_nonzero((stream.gaps > 0) & (stream.amounts != 0)) for stream in streams)
                as_counts = np.count_nonzero(block.column(SCALE))
                totals += np.array([len(block), as_counts, expressed, *(len(stream.gaps) for stream in streams)])
                most = np.maximum(most, [np.diff(stream.offsets).max() for stream in streams])
        size, digest = aside.stat().st_size, checksum(aside)
    cells, cells_as_counts, non_zeros, count_entries, value_entries = totals.tolist()
    most_count_entries, most_value_entries = most.tolist()
    return Part(
        file=path.name,
        cells=cells,
        cells_as_counts=cells_as_counts,
        non_zeros=non_zeros,
        count_entries=count_entries,
        most_count_entries=most_count_entries,
        value_entries=value_entries,
        most_value_entries=most_value_entries,
        bytes=size,
        xxh3_64=digest,
    )


def _reblocked(blocks: Iterable[Block], block_size: int) -> Iterator[Block]:
    """Cut a sequence of blocks anew, into blocks of this size; the last may have fewer cells."""
    waiting: list[Block] = []
    for block in blocks:
        waiting.append(block)
        n_waiting = sum(len(each) for each in waiting)
        if n_waiting >= block_size:
            joined = Block.concatenate(waiting)
            whole = n_waiting - n_waiting % block_size
            yield from (_copied(joined, start, start + block_size) for start in range(0, whole, block_size))
            waiting = [joined.slice(whole, n_waiting)]
    if any(len(block) for block in waiting):
        joined = Block.concatenate(waiting)
        yield _copied(joined, 0, len(joined))


def _copied(block: Block, start: int, stop: int) -> Block:
    """Copy some cells: Arrow fills up what it writes of a slice with what lies behind it."""
    return block.take(np.arange(start, stop))


def _checksums(cells: pa.RecordBatch, file: str, block: int) -> list[str]:
    """Return the checksum of each column of a block of a file, which is named with its split."""
    digests, seed = [], xxhash.xxh3_64_intdigest(f"{file} {block}".encode())
    for column in cells.columns:
        digest = xxhash.xxh3_64(seed=seed)
        arrays = cell_bytes(column) if pa.types.is_large_binary(column.type) else (column.to_numpy(),)
        for array in arrays:
            digest.update(np.ascontiguousarray(array).data)
        digests.append(digest.hexdigest())
    return digests


class _Selection(NamedTuple):
    """Some columns of a part: their numbers, and what to ask Arrow for."""

    wanted: list[int]
    schema: pa.Schema
    options: ipc.IpcReadOptions


@dataclasses.dataclass(frozen=True)
class CellSplit(Split):
    """One split of a cell store.

    Attributes
    ----------
    parts
        Its files, in numeric order.
    block_size
        Cells of each block but the last of a file.
    columns
        All columns of the files, in order.
    """

    parts: tuple[Part, ...]
    block_size: int
    columns: tuple[str, ...]

    @cached_property
    def _first_blocks(self) -> list[int]:
        """Number of the first block of each part, and one more."""
        return list(itertools.accumulate((-(-part.cells // self.block_size) for part in self.parts), initial=0))

    @cached_property
    def _selections(self) -> dict[tuple[str, ...], "_Selection"]:
        """What :meth:`_select` has made."""
        return {}

    @cached_property
    def block_sizes(self) -> np.ndarray:
        """Cells of each block, (n_blocks,) int64."""
        size = self.block_size
        starts = ((part, start) for part in self.parts for start in range(0, part.cells, size))
        return np.array([min(size, part.cells - start) for part, start in starts], dtype=np.int64)

    @property
    def count_entries(self) -> Entries:
        """Entries a cell in the stream of counts."""
        total = sum(part.count_entries for part in self.parts)
        return Entries(total / self.n_cells, max(part.most_count_entries for part in self.parts))

    @property
    def value_entries(self) -> Entries:
        """Entries a cell in the stream of values."""
        total = sum(part.value_entries for part in self.parts)
        return Entries(total / self.n_cells, max(part.most_value_entries for part in self.parts))

    def read_block(self, index: int, columns: tuple[str, ...] = (LABEL_COLUMN,)) -> Block:
        """Read one block with its expression and the named columns, and compare its checksums.

        Raises
        ------
        StoreError
            If the store has no such column, the block cannot be read or is damaged, or a code has no entry in its
            lookup.
        """
        number = bisect.bisect_right(self._first_blocks, index) - 1
        file, block = f"{self.name}/{self.parts[number].file}", index - self._first_blocks[number]
        selection = self._select(columns)
        try:
            cells = self._read_cells(file, block, selection)
            if len(cells) != self.block_sizes[index]:
                raise ValueError(f"it has {len(cells)} cells instead of {self.block_sizes[index]}")
        except (OSError, pa.ArrowException, LookupError, TypeError, ValueError) as error:
            path = self.side.path / file
            raise StoreError(f"block {block} of {path} cannot be read ({error}); {_REMEDY}") from error
        read = Block(cells, self.side.n_genes)
        for name in columns:
            codes = read.column(name)
            check_codes(f"{self.side.path}/{file}", name, codes.min().item(), codes.max().item(), self.side)
        return read

    def _select(self, columns: tuple[str, ...]) -> "_Selection":
        """Return how to read the expression and these columns; kept, for a block is read in a millisecond."""
        if columns not in self._selections:
            absent = [name for name in columns if name not in self.columns]
            if absent:
                theirs = ", ".join(name for name in self.columns if name not in PACKED_COLUMNS)
                raise StoreError(f"{self.side.path / STORE_FILE} lists no column {absent[0]!r}; it has {theirs}")
            wanted = sorted(map(self.columns.index, {*PACKED_COLUMNS, *columns}))
            schema = pa.schema([(name, _TYPES.get(name, pa.int64())) for name in map(self.columns.__getitem__, wanted)])
            options = ipc.IpcReadOptions(use_threads=False, included_fields=wanted)
            self._selections[columns] = _Selection(wanted, schema, options)
        return self._selections[columns]

    def _read_cells(self, file: str, block: int, selection: "_Selection") -> pa.RecordBatch:
        """Read the wanted columns of a block, and raise some error if they are not as written."""
        # Opened anew for each block: a reader must not be shared between threads.
        with pa.OSFile(f"{self.side.path}/{file}") as opened:
            cells, metadata = ipc.open_file(opened, options=selection.options).get_batch_with_custom_metadata(block)
        if not cells.schema.equals(selection.schema):
            raise ValueError(f"its columns are not {', '.join(selection.schema.names)}")
        cells.validate()
        if (n_genes := int(metadata[_N_GENES])) != self.side.n_genes:
            raise ValueError(f"its cells have {n_genes} genes, but {VAR_FILE} names {self.side.n_genes}")
        written = metadata[_CHECKSUMS].decode().split()
        if _checksums(cells, file, block) != [written[column] for column in selection.wanted]:
            raise ValueError("wrong checksum: these are not the cells that were written there")
        return cells


class CellStore:
    """A cell store, opened and checked.

    Parameters
    ----------
    side
        Its side files.

    Raises
    ------
    StoreError
        If store.json is of a newer format or damaged; from :meth:`split`, if a file is absent or truncated.

    Examples
    --------
    >>> from hce_jax.store import open_store
    >>> open_store("cells").split("train").n_cells  # doctest: +SKIP
    15240192
    """

    def __init__(self, side: SideFiles):
        self.side = side
        file, about = side.path / STORE_FILE, side.about
        version = about.get("format_version")
        if version != FORMAT_VERSION:
            raise StoreError(
                f"{file} has format version {version}, this hce_jax reads version {FORMAT_VERSION}; install the "
                "hce_jax that wrote it, or convert the source again"
            )
        try:
            self._block_size, self._columns = about["block_size"], tuple(about["columns"])
            self._parts = {name: tuple(map(_part, split["parts"])) for name, split in about["splits"].items()}
            for name, split in about["splits"].items():
                found = sum(part.cells for part in self._parts[name])
                if split.get("cells", found) != found:
                    raise ValueError(f"the parts of {name} have {found} cells, not {split['cells']}")
            if type(self._block_size) is not int or self._block_size < 1:
                raise ValueError(f"block_size is {self._block_size!r}")
            if not {*PACKED_COLUMNS, LABEL_COLUMN} <= {*self._columns}:
                raise ValueError(f"columns are {', '.join(self._columns)}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{file} is damaged ({type(error).__name__}: {error}); {_REMEDY}") from error

    def check_meaning(self) -> None:
        """Check that the files that say what genes and codes mean are those that came with the cells.

        Raises
        ------
        StoreError
            If one is not.
        """
        for name, said in self.side.about.get("side_files", {}).items():
            if name == VAR_FILE or name.startswith(f"{LOOKUP_FOLDER}/"):
                path = self.side.path / name
                if not path.is_file() or checksum(path) != said["xxh3_64"]:
                    raise StoreError(f"{path} is not the file that {STORE_FILE} describes; {_REMEDY}")

    def has_split(self, name: str) -> bool:
        """Tell whether the store has cells of this split."""
        return bool(self._parts.get(name))

    def split(self, name: str, sub_sample_frac: float = 1.0) -> CellSplit:
        """Return the blocks of ``train``, ``val`` or ``test``, or of the first ceil(fraction x parts) of its parts."""
        if name not in SPLITS:
            raise ValueError(f"a split is one of {', '.join(SPLITS)}, not {name!r}")
        if not self.has_split(name):
            raise StoreError(f"{self.side.path / STORE_FILE} lists no {name} parts; the store lacks its {name} split")
        parts = self._parts[name]
        parts = parts[: math.ceil(sub_sample_frac * len(parts))]
        for part in parts:
            path = self.side.path / name / part.file
            if not path.is_file():
                raise StoreError(f"{path} does not exist, but {STORE_FILE} lists it; {_REMEDY}")
            if (size := path.stat().st_size) != part.bytes:
                raise StoreError(f"{path} has {size} bytes, but {STORE_FILE} says {part.bytes}; {_REMEDY}")
        if not any(part.cells for part in parts):
            raise StoreError(f"the {name} split in {self.side.path / name} is empty")
        return CellSplit(name, self.side, parts, self._block_size, self._columns)


def _part(said: dict[str, Any]) -> Part:
    for field in dataclasses.fields(Part):
        value = said[field.name]
        if type(value) is not field.type or (field.type is int and value < 0):
            raise ValueError(f"{field.name} of a part is {value!r}")
    return Part(**said)
