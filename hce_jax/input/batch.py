"""A batch of cells: packed on the host, dense on the devices."""

import dataclasses
import math
from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hce_jax.errors import ConfigError, StoreError
from hce_jax.store import LABEL_COLUMN, Block, Entries, Split
from hce_jax.store.block import AMOUNT_TYPES, COUNTS, SCALE, VALUES
from hce_jax.store.packing import Stream
from hce_jax.typing import AnyArray, Array, Bool, Float, Int, Num, UInt8

#: Standard deviations above the mean that the smallest size has room for.
_DEVIATIONS = 3
#: Entries of a line: streams are filled up to whole lines.
LINE = 128
#: On an accelerator the rows of x are multiples of this.
_COLUMNS = 128


class PackedStream(NamedTuple):
    """The walks of hce_jax.store.packing over the cells of a batch, one for each of the p parts it is given in.

    Attributes
    ----------
    gaps, amounts
        Entries (p, e), filled up with zeros.
    rows
        The row within its part of each cell in the walk (p, b / p), filled up with zeros.
    """

    gaps: UInt8[AnyArray, "p e"]
    amounts: Num[AnyArray, "p e"]
    rows: Int[AnyArray, "p r"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CellBatch:
    """One batch; numpy arrays on the host, JAX arrays on the devices. All are split over devices by their first axis.

    Attributes
    ----------
    counts, values
        Expression of the cells that are known by counts, and of the others; see :func:`densify`.
    scale
        Factor of each cell's counts (b,).
    targets
        Label of each cell (b,), int32.
    real
        False for the rows that only fill the last batch up (b,).
    n_genes
        Genes g.
    """

    counts: PackedStream
    values: PackedStream
    scale: Float[AnyArray, "b"]
    targets: Int[AnyArray, "b"]
    real: Bool[AnyArray, "b"]
    n_genes: int = dataclasses.field(metadata={"static": True})


class DenseBatch(NamedTuple):
    """One batch as the model takes it, of all hosts together; split over all devices by the first axis.

    Attributes
    ----------
    x
        Expression (b, w), sf-log1p; the columns after the g genes are zero, see :func:`row_width`.
    targets
        Label of each cell (b,), int32.
    real
        False for the rows that only fill the last batch up (b,).
    """

    x: Float[AnyArray, "b w"]
    targets: Int[AnyArray, "b"]
    real: Bool[AnyArray, "b"]


def row_width(n_genes: int, backend: str | None = None) -> int:
    """Return the columns w of a dense batch: the genes on a CPU, the next multiple of 128 elsewhere.

    An accelerator multiplies matrices whose rows begin at a multiple of some bytes. With 19,331 genes they do not, and
    the compiler would copy the whole batch before each product with it.

    Parameters
    ----------
    n_genes
        Genes g.
    backend
        ``cpu``, ``gpu`` or ``tpu``; JAX's own default backend if not given.

    Examples
    --------
    >>> row_width(19331, "cpu"), row_width(19331, "gpu")
    (19331, 19456)
    """
    return n_genes if (backend or jax.default_backend()) == "cpu" else -(-n_genes // _COLUMNS) * _COLUMNS


class Capacity(NamedTuple):
    """Entries that the two streams of one part of a batch have room for."""

    counts: int
    values: int


def capacities(counts: Entries, values: Entries, n_cells: int) -> tuple[Capacity, ...]:
    r"""Return the three sizes that parts of n cells come in.

    With mean m and most M of a cell, the smallest holds :math:`n m + 3 \sqrt{n m (M - m)}`: n cells drawn at random
    have that mean, and no larger standard deviation, whatever the distribution between 0 and M. The next holds twice
    as much; the last n M, the most there can be. A part takes the smallest that holds it, so a step is compiled at most
    three times, and nothing is ever cut off.

    Parameters
    ----------
    counts, values
        Entries of a cell in the two streams.
    n_cells
        Cells of a part.

    Examples
    --------
    >>> capacities(Entries(2190.0, 7000), Entries(0.0, 0), 2048)
    (Capacity(counts=4925824, values=0), Capacity(counts=9851520, values=0), Capacity(counts=14336000, values=0))
    """
    return tuple(map(Capacity, _rooms(counts, n_cells), _rooms(values, n_cells)))


def _rooms(entries: Entries, n_cells: int) -> list[int]:
    mean, most = entries
    likely = n_cells * mean + _DEVIATIONS * math.sqrt(n_cells * mean * max(most - mean, 0))
    largest = n_cells * most
    return [math.ceil(min(room, largest) / LINE) * LINE for room in (likely, 2 * likely, largest)]


def smallest_capacity(sizes: Sequence[Capacity], needed: Capacity) -> Capacity:
    """Return the first of the sizes with enough room.

    Raises
    ------
    StoreError
        If there is none: the store is wrong about the most entries of a cell.

    Examples
    --------
    >>> smallest_capacity([Capacity(128, 0), Capacity(256, 0)], Capacity(130, 0))
    Capacity(counts=256, values=0)
    """
    for size in sizes:
        if needed.counts <= size.counts and needed.values <= size.values:
            return size
    raise StoreError(
        f"a batch has {needed.counts} entries of counts and {needed.values} of values, but by the store's own account "
        f"at most {sizes[-1].counts} and {sizes[-1].values}; its store.json is damaged, convert its source again"
    )


def make_batch(cells: Sequence[Block], batch_size: int, sizes: Sequence[Capacity], n_parts: int = 1) -> CellBatch:
    """Join at most ``batch_size`` cells and fill the batch up with empty rows that are marked as not real.

    Parameters
    ----------
    cells
        Pieces of blocks, at least one, in the order of the rows.
    batch_size
        Rows b of the result, a multiple of ``n_parts``.
    sizes
        From :func:`capacities`, for b / n_parts cells.
    n_parts
        Parts of equal numbers of rows with streams of their own: one for each device.

    Raises
    ------
    StoreError
        If none of the sizes has enough room.

    Examples
    --------
    >>> block = Block.of_values(np.eye(2, dtype=np.float32), {"cell_type": np.array([1, 0])})
    >>> batch = make_batch([block], 3, [Capacity(0, 128)])
    >>> batch.real.tolist(), densify(batch).tolist()
    ([True, True, False], [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    """
    n_rows, n_real = batch_size // n_parts, sum(len(block) for block in cells)
    parts = _parts(cells, n_rows, n_parts)
    counts, values = ([[block.stream(names) for block in part] for part in parts] for names in (COUNTS, VALUES))
    size = smallest_capacity(sizes, Capacity(_most_entries(counts), _most_entries(values)))
    scale, targets = np.zeros(batch_size, np.float32), np.zeros(batch_size, np.int32)
    np.concatenate([block.column(SCALE) for block in cells], out=scale[:n_real])
    np.concatenate([block.column(LABEL_COLUMN) for block in cells], out=targets[:n_real], casting="same_kind")
    return CellBatch(
        counts=_join(counts, AMOUNT_TYPES[COUNTS], size.counts, n_rows),
        values=_join(values, AMOUNT_TYPES[VALUES], size.values, n_rows),
        scale=scale,
        targets=targets,
        real=np.arange(batch_size) < n_real,
        n_genes=cells[0].n_genes,
    )


def batch_of_values(x_ng: Float[np.ndarray, "n g"], targets: Int[np.ndarray, "n"]) -> CellBatch:
    """Make a batch of dense expression, sf-log1p.

    Examples
    --------
    >>> densify(batch_of_values(np.eye(2, dtype=np.float32), np.array([1, 0]))).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    block = Block.of_values(x_ng, {LABEL_COLUMN: targets})
    return make_batch([block], len(block), [Capacity(0, len(block.stream(VALUES).gaps))])


def _parts(cells: Sequence[Block], n_rows: int, n_parts: int) -> list[list[Block]]:
    """Cut a sequence of blocks into parts of n_rows cells; the last ones may have fewer, or none."""
    parts: list[list[Block]] = [[] for _ in range(n_parts)]
    row = 0
    for block in cells:
        start = 0
        while start < len(block):
            stop = min(len(block), start + n_rows - row % n_rows)
            parts[row // n_rows].append(block.slice(start, stop))
            row, start = row + stop - start, stop
    return parts


def _most_entries(parts: Sequence[Sequence[Stream]]) -> int:
    return max(sum(len(stream.gaps) for stream in part) for part in parts)


def _join(parts: Sequence[Sequence[Stream]], dtype: type, n_entries: int, n_rows: int) -> PackedStream:
    joined = PackedStream(
        np.empty((len(parts), n_entries), np.uint8),
        np.empty((len(parts), n_entries), dtype),
        np.zeros((len(parts), n_rows), np.int32),
    )
    for part, gaps, amounts, rows in zip(parts, *joined, strict=True):
        entry, sizes = 0, [np.zeros(0, np.int64)]
        for stream in part:
            into = slice(entry, entry := entry + len(stream.gaps))
            gaps[into], amounts[into] = stream.gaps, stream.amounts
            sizes.append(np.diff(stream.offsets))
        gaps[entry:], amounts[entry:] = 0, 0
        walked = np.flatnonzero(np.concatenate(sizes))
        rows[: len(walked)] = walked
    return joined


def densify(batch: CellBatch, width: int | None = None) -> Float[Array, "b w"]:
    """Return the expression of a batch, sf-log1p: ``ln(1 + scale * counts) + values``. For use inside jit.

    One cumulative sum and one scatter-add for each stream; see hce_jax.store.packing.

    Parameters
    ----------
    batch
        The cells.
    width
        Columns w of the result, of which those after the genes are zero; the genes if not given.

    Examples
    --------
    >>> x = np.log1p(np.array([[2500.0, 7500.0]], np.float32))
    >>> block = Block.of_recovered_counts(x, {"cell_type": np.array([3])})
    >>> np.expm1(densify(make_batch([block], 1, [Capacity(128, 0)]), 3)).round().tolist()
    [[2500.0, 7500.0, 0.0]]
    """
    shape = batch.targets.shape[0], batch.n_genes, width or batch.n_genes
    with jax.named_scope("decode"):
        counts_bw, values_bw = (_walk(stream, *shape) for stream in (batch.counts, batch.values))
        return jnp.log1p(counts_bw * jnp.asarray(batch.scale)[:, None]) + values_bw


def dense_batch(batch: CellBatch, sharding: NamedSharding) -> DenseBatch:
    """Make a batch dense, each host its own rows on its own devices, and join the hosts' rows to the global batch.

    So the hosts need not agree on the room of their streams, and a step is compiled for one shape only. Rows are as
    wide as :func:`row_width` says.

    Parameters
    ----------
    batch
        This host's rows, packed, on its devices (:func:`host_sharding`).
    sharding
        How the first axis of the global batch is split over the devices of all hosts.

    Examples
    --------
    >>> dense_batch(packed, batch_sharding(data_mesh(), 2048)).x.shape  # doctest: +SKIP
    (2048, 19456)
    """
    own = _densify(batch, width=row_width(batch.n_genes), sharding=host_sharding(sharding))
    n_hosts = sharding.num_devices // len(sharding.addressable_devices)
    if n_hosts == 1:
        return own

    def joined(rows: Array) -> Array:
        pieces = [shard.data for shard in rows.addressable_shards]
        return jax.make_array_from_single_device_arrays((n_hosts * len(rows), *rows.shape[1:]), sharding, pieces)

    return jax.tree.map(joined, own)


@cache
def host_sharding(sharding: NamedSharding) -> NamedSharding:
    """Return how this host's rows are split over its own devices; with one host, the same sharding.

    Examples
    --------
    >>> host_sharding(batch_sharding(data_mesh(), 2048)).num_devices  # doctest: +SKIP
    8
    """
    mesh = sharding.mesh
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return NamedSharding(Mesh(np.asarray(own), mesh.axis_names, axis_types=mesh.axis_types), sharding.spec)


@partial(jax.jit, static_argnames=("width", "sharding"))
def _densify(batch: CellBatch, *, width: int, sharding: NamedSharding) -> DenseBatch:
    dense = DenseBatch(densify(batch, width), batch.targets, batch.real)
    return jax.lax.with_sharding_constraint(dense, sharding)


def _walk(stream: PackedStream, n_cells: int, n_genes: int, width: int) -> Float[Array, "b w"]:
    n_parts, n_entries = stream.gaps.shape
    n_rows = n_cells // n_parts
    if not n_entries:
        return jnp.zeros((n_cells, width))

    def walk_part(gaps: Array, amounts: Array, rows: Array) -> Array:
        place = jnp.cumsum(gaps.astype(jnp.int32)) - 1
        at = rows[place // n_genes] * width + place % n_genes
        return jnp.zeros(n_rows * width).at[at].add(amounts.astype(jnp.float32))

    return jax.vmap(walk_part)(*jax.tree.map(jnp.asarray, stream)).reshape(n_cells, width)


def check_batch_fits(split: Split, n_cells: int) -> None:
    """Refuse parts of a batch whose places or entries would not be numbered by int32.

    Raises
    ------
    ConfigError
        If there are too many, naming the most cells that fit.
    """
    widest = max(row_width(split.side.n_genes), split.count_entries.most, split.value_entries.most)
    limit = (2**31 - 1) // widest
    if n_cells > limit:
        raise ConfigError(
            f"a batch of {n_cells} cells a device is too large: with {split.side.n_genes} genes at most {limit} fit; "
            "lower --config.batch_size"
        )
