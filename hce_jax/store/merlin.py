"""The published "merlin" store: one folder of parquet parts per split, expression as dense float32 lists."""

import dataclasses
import math
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hce_jax.errors import StoreError
from hce_jax.store.block import Block
from hce_jax.store.schema import EXPRESSION_COLUMN, LABEL_COLUMN, SPLITS, SideFiles
from hce_jax.store.split import Entries, Split, check_codes

_PART = re.compile(r"part\.(\d+)\.parquet")


@dataclasses.dataclass(frozen=True)
class MerlinSplit(Split):
    """One split of a merlin store; its blocks are the row groups of its parts, in numeric order.

    Attributes
    ----------
    row_groups
        For each block its part, the number of the row group in it, and its cells.
    """

    row_groups: tuple[tuple[Path, int, int], ...]

    @cached_property
    def block_sizes(self) -> np.ndarray:
        """Cells of each block, (n_blocks,) int64."""
        return np.array([size for _, _, size in self.row_groups], dtype=np.int64)

    @property
    def count_entries(self) -> Entries:
        """None: the expression stays as it is."""
        return Entries(0.0, 0)

    @property
    def value_entries(self) -> Entries:
        """The store does not say how many; about one gene in ten is expressed, at most all are."""
        return Entries(self.side.n_genes / 10, self.side.n_genes)

    def read_block(self, index: int, columns: tuple[str, ...] = (LABEL_COLUMN,)) -> Block:
        """Read one block with its expression and the named columns."""
        return Block.of_values(*self.read_dense(index, columns))

    def read_dense(
        self, index: int, columns: tuple[str, ...] = (LABEL_COLUMN,)
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Read one block's expression, dense (n, g) float32, and the named columns.

        Raises
        ------
        StoreError
            If the part is damaged or lacks a column, an X has the wrong length, or a code has no entry in its lookup.
        """
        part, row_group, _ = self.row_groups[index]
        try:
            # The file is opened anew for each block: a parquet reader must not be shared between threads.
            table = pq.ParquetFile(part).read_row_group(row_group, columns=[EXPRESSION_COLUMN, *columns])
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"{part} is damaged: row group {row_group} cannot be read ({error})") from error
        absent = [name for name in columns if name not in table.column_names]
        if absent:
            raise StoreError(f"{part} has no column {absent[0]!r}")
        without = [name for name in columns if table[name].null_count]
        if without:
            raise StoreError(f"{part} has a cell without {without[0]} in row group {row_group}")
        codes = {name: table[name].to_numpy().astype(np.int64, copy=False) for name in columns}
        for name, values in codes.items():
            check_codes(part, name, values.min().item(), values.max().item(), self.side)
        return _dense_rows(table[EXPRESSION_COLUMN], part, self.side.n_genes), codes


def _dense_rows(column: pa.ChunkedArray, part: Path, n_genes: int) -> np.ndarray:
    lists = column.combine_chunks()
    lengths = np.diff(lists.offsets.to_numpy())
    if lists.null_count or not (lengths == n_genes).all():
        wrong = "an empty X" if lists.null_count else f"an X of length {lengths[lengths != n_genes][0]}"
        raise StoreError(f"{part} holds {wrong}, but var.parquet names {n_genes} genes")
    values = lists.flatten()
    if values.null_count:
        raise StoreError(f"{part} holds an X with empty entries; write 0 for a gene without counts")
    x_ng = values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(-1, n_genes)
    lowest, highest = x_ng.min(initial=0), x_ng.max(initial=0)  # a NaN makes both NaN
    if not (lowest >= 0 and highest < np.inf):
        raise StoreError(f"{part} holds an X with a negative or non-finite value; X is ln(1 + counts), scaled per cell")
    if highest > 0 and _whole(x_ng[0]) and _whole(x_ng):
        raise StoreError(
            f"{part} holds whole numbers only, which look like raw counts; X is scaled to 10,000 counts a cell, then "
            "ln(1 + x): see hce_jax.preprocess.normalize_log1p"
        )
    return x_ng


def _whole(values: np.ndarray) -> bool:
    return bool((values == np.rint(values)).all())


def _check_part(part: Path, side: SideFiles) -> list[tuple[Path, int, int]]:
    """Check what the part's footer tells, without reading cells, and list its row groups."""
    try:
        with pq.ParquetFile(part) as file:
            schema, meta = file.schema_arrow, file.metadata
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{part} is truncated or not a parquet file ({error})") from error
    for column in (EXPRESSION_COLUMN, LABEL_COLUMN):
        if schema.names.count(column) > 1:
            raise StoreError(f"{part} has {schema.names.count(column)} columns {column!r}; it must have one")
        if column not in schema.names:
            raise StoreError(f"{part} lacks the column {column!r}; it has {', '.join(schema.names)}")
    x_type, label_type = (schema.field(column).type for column in (EXPRESSION_COLUMN, LABEL_COLUMN))
    if not (pa.types.is_list(x_type) and pa.types.is_floating(x_type.value_type)):
        raise StoreError(f"{part} has X of type {x_type}; write it as list<float>")
    if not pa.types.is_integer(label_type):
        raise StoreError(f"{part} has cell_type of type {label_type}; it must be the integer code of the label")
    leaves = [meta.schema.column(i).path.split(".")[0] for i in range(meta.num_columns)]
    x, label = leaves.index(EXPRESSION_COLUMN), leaves.index(LABEL_COLUMN)
    groups = []
    for index in range(meta.num_row_groups):
        group = meta.row_group(index)
        if group.column(x).num_values != group.num_rows * side.n_genes:
            length = group.column(x).num_values / max(group.num_rows, 1)
            raise StoreError(f"{part} holds X of length {length:g}, but var.parquet names {side.n_genes} genes")
        statistics = group.column(label).statistics
        if statistics is not None and statistics.has_min_max:
            check_codes(part, LABEL_COLUMN, statistics.min, statistics.max, side)
        groups.append((part, index, group.num_rows))
    return groups


class MerlinStore:
    """The published store, opened and checked.

    Opening reads the side files; asking for a split reads the footer of each of its parts. Parts sort by their number,
    columns are found by name; ``_metadata`` files are not needed.

    Parameters
    ----------
    side
        Its side files.

    Raises
    ------
    StoreError
        From :meth:`split`, if a part is damaged or does not agree with the side files.

    Examples
    --------
    >>> from hce_jax.store import open_store
    >>> open_store("store").split("train").n_cells  # doctest: +SKIP
    15240192
    """

    def __init__(self, side: SideFiles):
        self.side = side

    def has_split(self, name: str) -> bool:
        """Tell whether the store has cells of this split."""
        return bool(self.parts(name))

    def parts(self, name: str) -> list[Path]:
        """Return the files of a split, in numeric order."""
        found = (self.side.path / name).glob("part.*.parquet")
        numbered = [(int(match[1]), path) for path in found if (match := _PART.fullmatch(path.name))]
        return [path for _, path in sorted(numbered)]

    def split(self, name: str, sub_sample_frac: float = 1.0) -> MerlinSplit:
        """Return the blocks of ``train``, ``val`` or ``test``, or of the first ceil(fraction x parts) of its parts."""
        if name not in SPLITS:
            raise ValueError(f"a split is one of {', '.join(SPLITS)}, not {name!r}")
        folder = self.side.path / name
        parts = self.parts(name)
        if not parts:
            raise StoreError(f"{folder} holds no part.N.parquet; the store lacks its {name} split")
        parts = parts[: math.ceil(sub_sample_frac * len(parts))]
        with ThreadPoolExecutor(max_workers=16) as pool:  # footers are small: on a network disk this is waiting time
            groups = [group for part in pool.map(lambda part: _check_part(part, self.side), parts) for group in part]
        groups = [group for group in groups if group[2]]
        if not groups:
            raise StoreError(f"the {name} split in {folder} is empty")
        return MerlinSplit(name, self.side, tuple(groups))
