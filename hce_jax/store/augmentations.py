"""Augmentation vectors as published: how the cells of a type differ from one tech_sample to another.

The recipe of scTab (Fischer et al., Nat Commun 2024, 10.1038/s41467-024-51059-5), here with a split of any size read
block by block. Its 500,000 cells are never dense at once: they are copied to a small split of their own, in a temporary
folder, from which sums over tech_samples are taken, some of them at a time; the differences lie beside it in files that
are mapped into memory, not read. Measured with 15 M cells of 19,331 genes in 41,000 pairs of type and tech_sample:
0.5 GB at the peak, beside 0.8 GB of mapped files.
"""

import dataclasses
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from hce_jax.errors import ConfigError, StoreError
from hce_jax.store.block import PACKED_COLUMNS, Block
from hce_jax.store.cells import BLOCK_SIZE, CellSplit, write_part
from hce_jax.store.held import read_blocks
from hce_jax.store.schema import LABEL_COLUMN
from hce_jax.store.split import Split, n_readers
from hce_jax.store.threads import Tick, run_in_threads

SAMPLE_COLUMN = "tech_sample"

#: 300 pairs of each of 164 types: so many vectors were clustered, at most, when more than 2,000 was a large cluster.
PUBLISHED_PAIRS = 164 * 300
#: A cluster has at least so many vectors on average, or fewer clusters are made.
_VECTORS_PER_CLUSTER = 20

#: Bytes for the sums that are taken in one pass over the subsample.
_SUMS_BUDGET = 512 << 20
#: Differences that are dense at once.
_PAIRS_AT_ONCE = 128
#: The most non-zero differences that k-means can index.
_MOST_ENTRIES = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class AugmentationOptions:
    """The numbers of the recipe; the defaults are the published ones.

    Attributes
    ----------
    cells
        Training cells of the subsample.
    pairs_per_type
        Pairs of tech_samples drawn for each cell type, at most.
    threshold
        Differences of this size or less are set to zero; sf-log1p.
    limit
        Differences are clipped to plus or minus this; sf-log1p.
    clusters
        Clusters of k-means.
    min_cluster_size
        Clusters with more vectors than this are kept, where 49,200 vectors or more are clustered; of fewer vectors the
        same share.
    vectors
        Vectors drawn from the clusters that are kept.
    seed
        Decides what is drawn.

    Raises
    ------
    ConfigError
        If a number is out of its range; it is named as the flag ``--augment-...``.

    Examples
    --------
    >>> AugmentationOptions(vectors=100).clusters
    50
    """

    cells: int = 500_000
    pairs_per_type: int = 300
    threshold: float = 0.25
    limit: float = 1.5
    clusters: int = 50
    min_cluster_size: int = 2_000
    vectors: int = 5_000
    seed: int = 1

    def __post_init__(self) -> None:
        least = {"threshold": 0.0, "limit": self.threshold, "min_cluster_size": 0, "seed": 0}
        for field in dataclasses.fields(self):
            value, lowest = getattr(self, field.name), least.get(field.name, 1)
            if not lowest <= value < np.inf:
                flag = f"--augment-{field.name.replace('_', '-')}"
                raise ConfigError(f"{flag} must be a number of at least {lowest}, not {value}")


@dataclasses.dataclass(frozen=True)
class Augmentations:
    """The vectors, and how they came about.

    Attributes
    ----------
    vectors
        (n, g) float32, sf-log1p; n is 0 where no cell type has two tech_samples, or no cluster is large enough.
    cells
        Cells of the subsample.
    groups
        Pairs (cell type, tech_sample) that occur in it, of each of which a mean could be taken.
    pairs
        Differences of such means, which were clustered.
    clusters_kept, clusters
        Clusters that were large enough, and all.
    """

    vectors: np.ndarray
    cells: int
    groups: int
    pairs: int
    clusters_kept: int
    clusters: int


def augmentation_vectors(
    split: Split, options: AugmentationOptions | None = None, *, scratch: Path | None = None
) -> Augmentations:
    """Compute augmentation vectors from the training cells of a store.

    With x a cell's expression (sf-log1p), for a cell type c and two of its tech_samples s and t::

        d = mean(x | c, s) - mean(x | c, t);    d = 0 where |d| <= threshold;    d = clip(d, -limit, limit)

    1. Cells of the subsample are drawn without replacement with weights 1 / (number of cells of the cell's type): those
       with the smallest E / weight, where E is exponentially distributed (Efraimidis and Spirakis, Inf Process Lett
       2006). This is distributed as if they were drawn one after the other, and takes a second for 15 M cells.
    2. Of each type, pairs of tech_samples in the subsample are drawn without replacement, all if there are not so many;
       s is the one with the smaller code. A mean may be that of a single cell, as published.
    3. The differences are clustered by k-means, from one start of k-means++; the small clusters are left out.
    4. The vectors are drawn from the others, without replacement.

    Where fewer vectors are clustered than the published 49,200, a cluster may be as much smaller, and there are no more
    clusters than one for each 20 vectors, but one at least. Where fewer vectors are left than asked for, all are taken.

    The result follows from the cells in their order and the options; how the cells lie in blocks does not matter.

    Parameters
    ----------
    split
        Cells with the columns ``cell_type`` and ``tech_sample``. It is read twice.
    options
        By default the published numbers.
    scratch
        Folder for up to 2 GB of temporary files (at the published numbers); by default the system's.

    Raises
    ------
    StoreError
        If a block is damaged, the column ``tech_sample`` is absent, or the temporary files cannot be written.
    ConfigError
        If there are more pairs than k-means can index.

    Examples
    --------
    >>> from hce_jax.store import open_store
    >>> augmentation_vectors(open_store("store").split("train")).vectors.shape  # doctest: +SKIP
    (5000, 19331)
    """
    options = options or AugmentationOptions()
    rng = np.random.default_rng(options.seed)
    cells_m, type_m, sample_m = _draw_cells(split, options.cells, rng)
    group_m, type_k = _groups(type_m, sample_m)
    pairs_p2 = _draw_pairs(type_k, options.pairs_per_type, rng)
    vectors, clusters_kept, clusters = np.zeros((0, split.side.n_genes), np.float32), 0, 0
    if len(pairs_p2):
        used = np.isin(group_m, pairs_p2)
        try:
            with tempfile.TemporaryDirectory(prefix="augmentations-", dir=scratch) as folder:
                subsample = _copy_cells(split, cells_m[used], Path(folder))
                _write_differences(subsample, group_m[used], pairs_p2, options, Path(folder))
                cluster_p, clusters = _cluster(_differences(split, Path(folder)), options.clusters, rng)
                kept_v, clusters_kept = _draw_vectors(cluster_p, options, rng)
                vectors = _differences(split, Path(folder))[kept_v].toarray()
        except OSError as error:
            remedy = "free some space there" if scratch else "set TMPDIR to a folder where there is space"
            where = scratch or tempfile.gettempdir()
            raise StoreError(f"temporary files in {where} cannot be written ({error}); {remedy}") from error
    return Augmentations(vectors, len(cells_m), len(type_k), len(pairs_p2), clusters_kept, clusters)


def _draw_cells(split: Split, n_cells: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw cells; return their positions in the split, in order, with codes of cell type and tech_sample, each (m,)."""
    stops = np.cumsum(split.block_sizes)
    codes_2n = np.empty((2, split.n_cells), np.int32)

    def read(index: str, tick: Tick) -> None:
        block = split.read_block(int(index), (LABEL_COLUMN, SAMPLE_COLUMN))
        stop = stops[int(index)]
        codes_2n[:, stop - len(block) : stop] = block.column(LABEL_COLUMN), block.column(SAMPLE_COLUMN)
        tick(len(block))

    indices = [str(index) for index in range(len(stops))]
    run_in_threads("cell types and tech_samples", read, indices, n_readers(), total=split.n_cells)
    cells_m = _weighted_sample(codes_2n[0], n_cells, rng)
    return cells_m, *codes_2n[:, cells_m]


def _weighted_sample(type_n: np.ndarray, n_cells: int, rng: np.random.Generator) -> np.ndarray:
    """Draw cells with weights 1 / (number of cells of the type), without replacement; positions (m,) in order."""
    if n_cells >= len(type_n):
        return np.arange(len(type_n))
    key_n = rng.standard_exponential(len(type_n))
    key_n *= np.bincount(type_n)[type_n]
    return np.sort(np.argpartition(key_n, n_cells)[:n_cells])


def _groups(type_m: np.ndarray, sample_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group cells by type and tech_sample; give each cell's group (m,) and each group's type (k,), in order."""
    n_samples = int(sample_m.max()) + 1
    codes_k, group_m = np.unique(type_m.astype(np.int64) * n_samples + sample_m, return_inverse=True)
    return group_m, codes_k // n_samples


def _draw_pairs(type_k: np.ndarray, n_pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Draw pairs of groups of the same type, (p, 2), each pair once and the smaller number first."""
    pairs = [np.zeros((0, 2), np.int64)]
    for first, size in zip(*np.unique(type_k, return_index=True, return_counts=True)[1:], strict=True):
        # All pairs in order: (0, 1), (0, 2), ..., (1, 2), ...; that of number r has its first group from row_starts.
        row_sizes = np.arange(size - 1, -1, -1)
        row_starts = np.cumsum(row_sizes) - row_sizes
        n_all = int(row_sizes.sum())
        drawn = np.sort(rng.choice(n_all, min(n_pairs, n_all), replace=False))
        one = np.searchsorted(row_starts[:-1], drawn, side="right") - 1
        other = one + 1 + drawn - row_starts[one]
        pairs.append(first + np.stack([one, other], axis=1))
    return np.concatenate(pairs)


def _copy_cells(split: Split, cells_m: np.ndarray, folder: Path) -> CellSplit:
    """Write some cells, given by their positions in order, as a split that can be read as often as needed."""
    name, columns = "subsample", (*PACKED_COLUMNS, LABEL_COLUMN)
    stops = np.cumsum(split.block_sizes)
    bounds = np.searchsorted(cells_m, [0, *stops])
    chosen = np.flatnonzero(np.diff(bounds))

    def blocks() -> Iterator[Block]:
        for index, block in zip(chosen, read_blocks(split, chosen.tolist()), strict=True):
            rows = cells_m[bounds[index] : bounds[index + 1]] - (stops[index] - len(block))
            yield Block(block.cells.select(columns), block.n_genes).take(rows)

    (folder / name).mkdir()
    part = write_part(folder / name / "part.0.arrow", blocks(), BLOCK_SIZE)
    side = dataclasses.replace(split.side, path=folder)
    return CellSplit(name, side, (part,), BLOCK_SIZE, columns)


def _write_differences(
    subsample: Split, group_m: np.ndarray, pairs_p2: np.ndarray, options: AugmentationOptions, folder: Path
) -> None:
    """Write the differences of means of pairs of groups (p, g), CSR, as three files in a folder."""
    n_genes, row_ends = subsample.side.n_genes, [np.zeros(1, np.int64)]
    pairs_per_pass = max(1, _SUMS_BUDGET // (2 * n_genes * 8))  # of a pair at most two sums are new
    with (folder / "values").open("wb") as values, (folder / "genes").open("wb") as genes:
        for start in range(0, len(pairs_p2), pairs_per_pass):
            groups, pairs = np.unique(pairs_p2[start : start + pairs_per_pass], return_inverse=True)
            mean_kg = _means(subsample, group_m, groups)
            for first in range(0, len(pairs), _PAIRS_AT_ONCE):
                one, other = pairs[first : first + _PAIRS_AT_ONCE].T
                difference = mean_kg[one] - mean_kg[other]
                difference[abs(difference) <= options.threshold] = 0
                rows = sp.csr_array(difference.clip(-options.limit, options.limit).astype(np.float32))
                rows.data.tofile(values)
                rows.indices.astype(np.int32, copy=False).tofile(genes)
                row_ends.append(row_ends[-1][-1] + rows.indptr[1:])
            del mean_kg  # before the sums of the next pass
    if (n_entries := row_ends[-1][-1]) > _MOST_ENTRIES:
        raise ConfigError(
            f"{len(pairs_p2):,} pairs of tech_samples differ in {n_entries:,} entries, and k-means can take "
            f"{_MOST_ENTRIES:,}; lower --augment-pairs-per-type"
        )
    np.save(folder / "rows.npy", np.concatenate(row_ends).astype(np.int32))


def _differences(split: Split, folder: Path) -> sp.csr_array:
    """Return the differences (p, g), CSR float32, mapped from their files."""
    rows = np.load(folder / "rows.npy")
    data = _mapped(folder / "values", np.float32), _mapped(folder / "genes", np.int32), rows
    return sp.csr_array(data, shape=(len(rows) - 1, split.side.n_genes))


def _mapped(path: Path, dtype: type) -> np.ndarray:
    # An empty file cannot be mapped. "c": k-means refuses what is read-only, but writes nothing.
    return np.memmap(path, dtype, mode="c") if path.stat().st_size else np.zeros(0, dtype)


def _means(subsample: Split, group_m: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the mean expression (k, g) float64 of some groups, given by their numbers in order."""
    stops, n_genes = np.cumsum(subsample.block_sizes), subsample.side.n_genes
    place_m = np.searchsorted(groups, group_m).clip(max=len(groups) - 1)
    place_m[groups[place_m] != group_m] = -1
    sums_kg = np.zeros((len(groups), n_genes))
    chosen = np.unique(np.searchsorted(stops, np.flatnonzero(place_m >= 0), side="right"))
    for index, block in zip(chosen, read_blocks(subsample, chosen.tolist()), strict=True):
        place_n = place_m[stops[index] - len(block) : stops[index]]
        rows = np.flatnonzero(place_n >= 0)
        x = block.take(rows).x
        at = np.repeat(place_n[rows] * n_genes, np.diff(x.indptr)) + x.indices
        np.add.at(sums_kg.reshape(-1), at, x.data.astype(np.float64))  # cell after cell, whatever the blocks
    sums_kg /= np.bincount(place_m[place_m >= 0], minlength=len(groups))[:, None]
    return sums_kg


def _cluster(difference_pg: sp.csr_array, n_clusters: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Return the cluster of each vector (p,), and the number of clusters."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    n_clusters = min(n_clusters, max(1, difference_pg.shape[0] // _VECTORS_PER_CLUSTER))
    k_means = KMeans(n_clusters, random_state=int(rng.integers(2**32)), algorithm="elkan", copy_x=False)
    with warnings.catch_warnings(), threadpool_limits(1):  # threads add in any order: the last bits would vary
        warnings.simplefilter("ignore")  # that there are fewer distinct vectors than clusters, or a single cluster
        return k_means.fit(difference_pg).labels_, n_clusters


def _draw_vectors(
    cluster_p: np.ndarray, options: AugmentationOptions, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Draw vectors (v,) of the clusters that are large enough, in order; and return the number of these clusters."""
    smallest = options.min_cluster_size * min(1.0, len(cluster_p) / PUBLISHED_PAIRS)
    large_c = np.bincount(cluster_p) > smallest
    left = np.flatnonzero(large_c[cluster_p])
    drawn = rng.choice(left, min(options.vectors, len(left)), replace=False)
    return np.sort(drawn), int(large_c.sum())
