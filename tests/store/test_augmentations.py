import collections
import dataclasses
import itertools
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest

from hce_jax.errors import ConfigError, StoreError, UserError
from hce_jax.store import HeldSplit, SideFiles, augmentations
from hce_jax.store.augmentations import PUBLISHED_PAIRS, AugmentationOptions, augmentation_vectors
from hce_jax.store.block import Block
from hce_jax.store.cells import CellSplit, write_part

N_GENES, N_TYPES, N_SAMPLES, N_CELLS = 70, 5, 9, 400
#: All differences, in the order of their pairs.
ALL = AugmentationOptions(cells=300, pairs_per_type=12, clusters=1, min_cluster_size=0, vectors=1000)


@dataclasses.dataclass(frozen=True)
class NotingSplit(HeldSplit):
    """Notes the blocks that are read."""

    reads: list[int] = dataclasses.field(default_factory=list)

    def read_block(self, index, columns=("cell_type",)):
        self.reads.append(index)
        return super().read_block(index, columns)


def split_of(x, types, samples, block_sizes=None):
    x = np.asarray(x, np.float32)
    names = tuple(f"G{gene}" for gene in range(x.shape[1]))
    labels = tuple(f"T{label}" for label in range(max(types) + 1))
    side = SideFiles(Path("memory"), names, names, labels, None, np.eye(len(labels), dtype=np.float32), {})
    ends = np.cumsum(block_sizes or [len(x)])
    assert ends[-1] == len(x)
    columns = {"cell_type": np.asarray(types), "tech_sample": np.asarray(samples)}
    cuts = [slice(end - size, end) for end, size in zip(ends, np.diff(ends, prepend=0), strict=True)]
    blocks = (Block.of_values(x[cut], {name: codes[cut] for name, codes in columns.items()}) for cut in cuts)
    return NotingSplit("train", side, tuple(blocks))


def drawn_cells():
    """Expression of about 400 cells, with types of very different size and tech_samples that shift some genes."""
    rng = np.random.default_rng(7)
    types = rng.choice(N_TYPES, N_CELLS, p=[0.5, 0.3, 0.1, 0.08, 0.02])
    samples = rng.integers(N_SAMPLES, size=N_CELLS)
    x = rng.gamma(0.5, 1.0, (N_CELLS, N_GENES)) + ((samples[:, None] + np.arange(N_GENES)) % 9 == 0) * 3
    return np.where(rng.random(x.shape) < 0.4, x, 0), types, samples


def dense_recipe(x, types, samples, options):
    """Compute all differences as published, dense, for the cells and pairs that are drawn."""
    rng = np.random.default_rng(options.seed)
    cells = augmentations._weighted_sample(types, options.cells, rng)
    x, types, samples = x[cells].astype(np.float32).astype(float), types[cells], samples[cells]
    groups = sorted({*zip(types.tolist(), samples.tolist(), strict=True)})
    means = {group: x[(types == group[0]) & (samples == group[1])].mean(axis=0) for group in groups}
    pairs = augmentations._draw_pairs(np.array([group[0] for group in groups]), options.pairs_per_type, rng)
    difference = np.array([means[groups[one]] - means[groups[other]] for one, other in pairs])
    difference[abs(difference) <= options.threshold] = 0
    return np.clip(difference, -options.limit, options.limit), len(groups)


@pytest.mark.parametrize("pairs_per_type", [1, 12, 100], ids=["few groups", "most groups", "all groups"])
def test_the_vectors_are_those_of_the_dense_recipe(pairs_per_type):
    cells, options = drawn_cells(), dataclasses.replace(ALL, pairs_per_type=pairs_per_type)
    expected, n_groups = dense_recipe(*cells, options)
    found = augmentation_vectors(split_of(*cells), options)
    assert found.vectors.dtype == np.float32
    np.testing.assert_allclose(found.vectors, expected, rtol=0, atol=1e-6)
    assert 0.1 < (expected != 0).mean() < 0.9
    assert (expected == 1.5).any()
    assert (found.cells, found.groups, found.pairs) == (300, n_groups, len(expected))
    assert (found.clusters_kept, found.clusters) == (1, 1)


def test_several_passes_give_the_same_bits_as_one_and_read_the_split_no_more_often(monkeypatch):
    split = split_of(*drawn_cells(), block_sizes=[40] * 10)
    expected = augmentation_vectors(split, ALL).vectors
    assert {*collections.Counter(split.reads).values()} == {2}
    split.reads.clear()
    passes, means = [], augmentations._means
    monkeypatch.setattr(augmentations, "_means", lambda *args: passes.append(args) or means(*args))
    monkeypatch.setattr(augmentations, "_SUMS_BUDGET", 7 * 2 * N_GENES * 8)
    monkeypatch.setattr(augmentations, "_PAIRS_AT_ONCE", 3)
    monkeypatch.setattr(augmentations, "BLOCK_SIZE", 5)
    np.testing.assert_array_equal(augmentation_vectors(split, ALL).vectors, expected)
    assert len(passes) == -(-len(expected) // 7)
    assert max(len(groups) for _, _, groups in passes) <= 14
    assert {*collections.Counter(split.reads).values()} == {2}


@pytest.mark.parametrize("block_sizes", [[1] * 400, [399, 1], [3, 0, 250, 147]], ids=["ones", "two", "uneven"])
def test_how_cells_are_cut_into_blocks_does_not_matter(block_sizes):
    cells = drawn_cells()
    options = dataclasses.replace(ALL, clusters=2, vectors=20)
    expected = augmentation_vectors(split_of(*cells), options).vectors
    np.testing.assert_array_equal(augmentation_vectors(split_of(*cells, block_sizes), options).vectors, expected)


def test_a_store_on_disk_gives_the_same_as_memory(tmp_path):
    split = split_of(*drawn_cells())
    (tmp_path / "train").mkdir()
    part = write_part(tmp_path / "train" / "part.0.arrow", split.blocks, 32)
    side = dataclasses.replace(split.side, path=tmp_path)
    stored = CellSplit("train", side, (part,), 32, tuple(split.blocks[0].cells.schema.names))
    expected = augmentation_vectors(split, ALL).vectors
    np.testing.assert_array_equal(augmentation_vectors(stored, ALL).vectors, expected)


def test_the_same_seed_gives_the_same_vectors_another_others():
    split = split_of(*drawn_cells())
    options = AugmentationOptions(cells=300, clusters=8, min_cluster_size=PUBLISHED_PAIRS // 8, vectors=20)
    found = [augmentation_vectors(split, options) for _ in range(3)]
    assert 0 < found[0].clusters_kept < found[0].clusters
    for each in found[1:]:
        np.testing.assert_array_equal(each.vectors, found[0].vectors)
    other = augmentation_vectors(split, dataclasses.replace(options, seed=2)).vectors
    assert not np.array_equal(found[0].vectors, other)


def test_differences_at_the_threshold_vanish_and_beyond_the_limit_are_clipped():
    above = np.nextafter(np.float32(0.25), np.float32(1))
    values = np.array([0.25, above, 0.1, 1.5, np.nextafter(np.float32(1.5), np.float32(2)), 7.0, 0.0], np.float32)
    expected = np.array([0, above, 0, 1.5, 1.5, 1.5, 0], np.float32)
    x = np.stack([np.append(values, values * 0), np.append(values * 0, values)])
    found = augmentation_vectors(split_of(x, [0, 0], [0, 1]), ALL)
    np.testing.assert_array_equal(found.vectors, [np.append(expected, -expected)])


def test_threshold_and_limit_are_options():
    options = dataclasses.replace(ALL, threshold=0.5, limit=0.75)
    found = augmentation_vectors(split_of([[0.5, 0.6, 2.0], [0, 0, 0]], [0, 0], [0, 1]), options)
    np.testing.assert_allclose(found.vectors, [[0, 0.6, 0.75]])


@pytest.mark.parametrize(("n_drawn", "of_rare"), [(1, 1 / 2), (2, 5 / 6)])
def test_cells_are_drawn_with_weights_one_by_the_size_of_their_type(n_drawn, of_rare):
    """By hand: weights 1, 1/2, 1/2; the first with 1/2, or after one of the others with 1 / (1 + 1/2)."""
    rng = np.random.default_rng(0)
    draws = [augmentations._weighted_sample(np.array([0, 1, 1]), n_drawn, rng) for _ in range(4000)]
    assert all(len(draw) == n_drawn and (np.diff(draw) > 0).all() for draw in draws)
    assert np.mean([0 in draw for draw in draws]) == pytest.approx(of_rare, abs=0.03)


def test_cells_are_drawn_as_numpy_draws_them_one_after_the_other():
    types = np.repeat([0, 1, 2], [600, 60, 6])
    p = 1 / np.bincount(types)[types] / 3
    rng = np.random.default_rng(0)
    drawn = [augmentations._weighted_sample(types, 100, rng) for _ in range(400)]
    expected = [rng.choice(666, 100, replace=False, p=p) for _ in range(400)]
    found, expected = (np.bincount(types[np.concatenate(draws)]) / 400 for draws in (drawn, expected))
    np.testing.assert_allclose(found, expected, atol=1.5)
    assert found[2] > 5.9
    assert found[1] > 35


@pytest.mark.parametrize("n_cells", [400, 401, 10_000])
def test_a_small_split_is_taken_whole(n_cells):
    options = dataclasses.replace(ALL, cells=n_cells)
    assert augmentation_vectors(split_of(*drawn_cells()), options).cells == 400


def test_pairs_are_of_one_type_each_once_and_all_where_there_are_few():
    types = np.array([0, 0, 0, 0, 2, 3, 3])
    pairs = augmentations._draw_pairs(types, 6, np.random.default_rng(0))
    assert pairs.tolist() == [*map(list, itertools.combinations(range(4), 2)), [5, 6]]


def test_where_there_are_many_pairs_each_is_as_likely():
    rng, found = np.random.default_rng(0), collections.Counter()
    for _ in range(3000):
        pairs = augmentations._draw_pairs(np.array([1, 1, 1, 1, 1, 1, 4]), 4, rng).tolist()
        assert len({*map(tuple, pairs)}) == 4
        found.update(map(tuple, pairs))
    assert {*found} == {*itertools.combinations(range(6), 2)}
    np.testing.assert_allclose([*found.values()], 3000 * 4 / 15, rtol=0.12)


def planted(sizes):
    """Types with two cells each, of two tech_samples; of ``sizes[f]`` types they differ in gene f."""
    gene = np.repeat(np.arange(len(sizes)), sizes)
    types = np.repeat(np.arange(len(gene)), 2)
    x = np.zeros((len(types), len(sizes)))
    x[1::2][np.arange(len(gene)), gene] = 2.0
    return split_of(x, types, np.arange(len(types)))


@pytest.mark.parametrize(("min_cluster_size", "n_kept"), [(39, 2), (40, 1)])
def test_clusters_of_more_than_the_least_size_are_kept_which_is_a_share_of_fewer_vectors(min_cluster_size, n_kept):
    of_published = min_cluster_size * PUBLISHED_PAIRS // 200
    options = AugmentationOptions(clusters=3, min_cluster_size=of_published)
    found = augmentation_vectors(planted([150, 40, 10]), options)
    assert (found.pairs, found.clusters, found.clusters_kept) == (200, 3, n_kept)
    np.testing.assert_array_equal((found.vectors == -1.5).sum(axis=0), [150, 40 * (n_kept > 1), 0])
    assert (found.vectors != 0).sum() == len(found.vectors)


def test_of_more_vectors_than_published_a_cluster_must_not_be_larger():
    cluster_p = np.repeat([0, 1], [PUBLISHED_PAIRS, 2001])
    assert augmentations._draw_vectors(cluster_p, AugmentationOptions(), np.random.default_rng(0))[1] == 2
    assert augmentations._draw_vectors(cluster_p[:-1], AugmentationOptions(), np.random.default_rng(0))[1] == 1


def test_vectors_are_drawn_without_replacement_from_large_clusters():
    rng = np.random.default_rng(0)
    cluster_p = np.tile([0, 1, 1], 100)
    options = AugmentationOptions(vectors=150, min_cluster_size=150 * PUBLISHED_PAIRS // 300)
    drawn, n_kept = augmentations._draw_vectors(cluster_p, options, rng)
    assert n_kept == 1
    assert len({*drawn.tolist()}) == 150
    assert (cluster_p[drawn] == 1).all()


@pytest.mark.parametrize(("n_pairs", "n_clusters"), [(1, 1), (39, 1), (40, 2), (119, 5), (500, 6)])
def test_few_vectors_are_put_into_few_clusters(n_pairs, n_clusters):
    assert augmentation_vectors(planted([n_pairs]), AugmentationOptions(clusters=6)).clusters == n_clusters


def test_with_one_tech_sample_in_each_type_there_are_no_vectors():
    split = split_of(np.ones((6, 4)), [0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1])
    found = augmentation_vectors(split)
    assert found.vectors.shape == (0, 4)
    assert (found.cells, found.groups, found.pairs, found.clusters, found.clusters_kept) == (6, 3, 0, 0, 0)
    assert split.reads == [0]


def test_equal_means_give_zeros():
    split = split_of(np.ones((100, 4)), np.repeat(np.arange(50), 2), np.arange(100) % 2)
    found = augmentation_vectors(split)
    assert found.clusters == 2
    np.testing.assert_array_equal(found.vectors, np.zeros((50, 4)))


def test_the_temporary_files_lie_where_asked_and_are_removed(tmp_path, monkeypatch):
    seen, means = [], augmentations._means
    monkeypatch.setattr(augmentations, "_means", lambda *args: seen.extend(tmp_path.iterdir()) or means(*args))
    augmentation_vectors(split_of(*drawn_cells()), ALL, scratch=tmp_path)
    assert len(seen) == 1
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("named", [True, False], ids=["in a folder that is named", "in the system's"])
def test_where_temporary_files_cannot_be_written_it_says_so(tmp_path, monkeypatch, named):
    absent = tmp_path / "absent"
    monkeypatch.setattr(tempfile, "tempdir", str(absent))
    remedy = "free some space there" if named else "set TMPDIR to a folder where there is space"
    message = rf"temporary files in {re.escape(str(absent))} cannot be written \(.*\); {remedy}$"
    with pytest.raises(StoreError, match=message):
        augmentation_vectors(split_of(*drawn_cells()), ALL, scratch=absent if named else None)


def test_more_entries_than_k_means_can_index_are_told(monkeypatch):
    monkeypatch.setattr(augmentations, "_MOST_ENTRIES", 100)
    with pytest.raises(ConfigError, match=r"and k-means can take 100; lower --augment-pairs-per-type"):
        augmentation_vectors(split_of(*drawn_cells()), ALL)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("cells", 0, "--augment-cells must be a number of at least 1, not 0"),
        ("pairs_per_type", 0, "--augment-pairs-per-type must be a number of at least 1, not 0"),
        ("threshold", -0.1, "--augment-threshold must be a number of at least 0.0, not -0.1"),
        ("threshold", float("nan"), "--augment-threshold must be a number of at least 0.0, not nan"),
        ("limit", 0.1, "--augment-limit must be a number of at least 0.25, not 0.1"),
        ("limit", float("inf"), "--augment-limit must be a number of at least 0.25, not inf"),
        ("clusters", 0, "--augment-clusters must be a number of at least 1, not 0"),
        ("min_cluster_size", -1, "--augment-min-cluster-size must be a number of at least 0, not -1"),
        ("vectors", 0, "--augment-vectors must be a number of at least 1, not 0"),
        ("seed", -1, "--augment-seed must be a number of at least 0, not -1"),
    ],
)
def test_a_number_out_of_range_is_named_as_its_flag(field, value, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        AugmentationOptions(**{field: value})


def test_the_defaults_are_the_published_numbers():
    options = AugmentationOptions()
    assert (options.cells, options.pairs_per_type, options.vectors) == (500_000, 300, 5_000)
    assert (options.threshold, options.limit) == (0.25, 1.5)
    assert (options.clusters, options.min_cluster_size) == (50, 2_000)
