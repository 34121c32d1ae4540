import dataclasses
import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from coded_cells import N_GENES, N_TYPES, block_of, check_rows, coded_split, counts_of, expression, label_of
from flax import nnx

from hce_jax.errors import ConfigError, StoreError
from hce_jax.input import ResidentSplit, Shuffle, StreamedSplit, batch_of_values, dense_batch, densify, row_width
from hce_jax.input.batch import Capacity, capacities, check_batch_fits, make_batch, smallest_capacity
from hce_jax.models import build_model
from hce_jax.store import Block, Entries, HeldSplit
from hce_jax.store.block import COUNTS, VALUES
from hce_jax.training.mesh import batch_sharding, data_mesh, replicated
from hce_jax.training.optim import published_optimizer
from hce_jax.training.steps import Objective, init_state, make_eval_step, make_train_step
from hce_jax.typing import PRECISIONS

ROOM = [Capacity(20_000, 20_000)]


def pieces_of(cells):
    """Give the cells as pieces of unequal size."""
    block, bounds = block_of(cells), [0, 1, 1, min(5, len(cells)), len(cells)]
    return [block.slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def test_the_coded_cells_have_what_is_hard_to_pack():
    cells = np.arange(30)
    block, counts = block_of(cells), counts_of(cells)
    assert 0 < np.count_nonzero(block.column("scale")) < 30  # some are kept as counts, some as values
    assert counts.max() > 2 * 255
    assert {0, 2, N_GENES} <= set((counts > 0).sum(axis=1))
    assert np.diff(np.flatnonzero(counts[4])).max() == 300


@pytest.mark.parametrize("n_parts", [1, 2, 3])
@pytest.mark.parametrize("n_cells", [12, 11, 7, 3, 1])
def test_a_batch_is_dense_again_whatever_its_parts_and_its_other_rows_are_zero(n_cells, n_parts):
    cells = np.arange(5, 5 + n_cells)
    batch = make_batch(pieces_of(cells), 12, ROOM, n_parts)
    assert batch.counts.gaps.shape == (n_parts, 20_000)
    x = np.asarray(densify(batch))
    assert (x.shape, x.dtype) == ((12, N_GENES), np.float32)
    check_rows(x[:n_cells], batch.targets[:n_cells], cells)
    assert not x[n_cells:].any()
    assert batch.real.tolist() == [True] * n_cells + [False] * (12 - n_cells)
    assert not batch.targets[n_cells:].any()


@pytest.mark.parametrize(
    ("backend", "widths"), [("cpu", [1, 127, 128, 129, 19331]), ("gpu", [128, 128, 128, 256, 19456])]
)
def test_rows_are_as_wide_as_the_genes_on_a_cpu_and_whole_lines_elsewhere(backend, widths, monkeypatch):
    assert [row_width(n_genes, backend) for n_genes in (1, 127, 128, 129, 19331)] == widths
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert row_width(19331) == widths[-1]


@pytest.mark.parametrize("width", [N_GENES, N_GENES + 1, 640])
@pytest.mark.parametrize("n_parts", [1, 3])
def test_a_wide_batch_has_the_same_cells_and_zeros_after_their_genes(n_parts, width):
    cells = np.arange(11)
    batch = make_batch(pieces_of(cells), 12, ROOM, n_parts)
    expected = np.zeros((12, width), np.float32)
    expected[:11, :N_GENES] = expression(cells)
    x = np.asarray(densify(batch, width))
    np.testing.assert_allclose(x, expected, rtol=0, atol=1.1e-6)
    assert not x[:, N_GENES:].any()
    np.testing.assert_array_equal(x[:, :N_GENES], densify(batch))


def test_a_dense_batch_is_as_wide_as_the_backend_wants_it(monkeypatch):
    batch, sharding = jax.device_put(make_batch(pieces_of(np.arange(12)), 12, ROOM)), batch_sharding(data_mesh(), 12)
    narrow = dense_batch(batch, sharding)
    assert narrow.x.shape == (12, N_GENES)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    wide = dense_batch(batch, sharding)
    assert wide.x.shape == (12, 640)
    np.testing.assert_array_equal(wide.x[:, :N_GENES], narrow.x)


def test_values_are_kept_bit_for_bit():
    x = sp.random_array((9, 2000), density=0.01, rng=np.random.default_rng(0), dtype=np.float32).toarray()
    x[3], x[:, 1999] = 0, 0
    np.testing.assert_array_equal(densify(batch_of_values(x, np.arange(9))), x)


def test_expression_that_comes_from_counts_is_the_logarithm_of_scipy_s_sums():
    """A count above 255 is several entries at one place: scipy adds them up as well."""
    block = block_of(np.array([1, 2, 3, 7]))
    stream = block.stream(COUNTS)
    places = np.cumsum(stream.gaps, dtype=np.int64) - 1
    counts = sp.coo_array((stream.amounts.astype(int), (places // N_GENES, places % N_GENES)), shape=(4, N_GENES))
    expected = np.log1p(counts.toarray() * block.column("scale")[:, None])
    np.testing.assert_allclose(densify(make_batch([block], 4, ROOM)), expected, rtol=0, atol=1e-6)


def test_the_smallest_size_that_holds_every_part_is_taken():
    sizes = [Capacity(128, 256), Capacity(256, 512), Capacity(512, 1024)]
    needed = [((0, 0), 0), ((128, 256), 0), ((129, 0), 1), ((0, 257), 1), ((257, 1), 2), ((512, 1024), 2)]
    for each, size in needed:
        assert smallest_capacity(sizes, Capacity(*each)) == sizes[size]
    dense, empty = block_of(np.array([13])), block_of(np.array([5]))
    alone = len(dense.stream(COUNTS).gaps)
    for cells in ([dense, empty], [empty, dense]):
        assert make_batch(cells, 2, [Capacity(alone - 1, 0), Capacity(alone, 0)], 2).counts.gaps.shape == (2, alone)


def test_cells_with_more_entries_than_their_store_says_are_not_cut_but_an_error():
    with pytest.raises(StoreError, match=r"by the store's own account at most 128 and 128; its store.json is damaged"):
        make_batch([block_of(np.arange(12))], 12, [Capacity(128, 128)])


@pytest.mark.parametrize("n_cells", [1, 7, 100, 2048])
def test_the_largest_size_holds_the_most_there_can_be_and_the_smallest_most_random_batches(n_cells):
    rng = np.random.default_rng(0)
    for entries in (rng.integers(0, 9000, 5000), rng.poisson(40, 5000), 6000 * (rng.random(5000) < 0.01)):
        said = Entries(float(entries.mean()), int(entries.max()))
        sizes = [size.counts for size in capacities(said, Entries(0.0, 0), n_cells)]
        assert len(sizes) == 3
        assert sizes == sorted(sizes)
        assert 0 <= sizes[2] - n_cells * entries.max() < 128
        assert sizes[0] < 2 * n_cells * entries.mean() + 6 * np.sqrt(n_cells * entries.mean() * entries.max()) + 128
        needed = rng.choice(entries, (1000, n_cells)).sum(axis=1)
        assert (needed <= sizes[0]).mean() > 0.9  # Cantelli: 1 - 1 / (1 + 3^2), whatever the distribution


def test_a_stream_that_no_cell_uses_takes_no_room():
    assert {size.values for size in capacities(Entries(3.0, 9), Entries(0.0, 0), 64)} == {0}


@pytest.mark.parametrize("n_genes", [1, 254, 255, 256, 257, 600, 2000])
def test_values_of_a_cell_take_at_most_as_many_entries_as_there_are_genes(n_genes):
    """A gap of d places takes ceil(d / 255) entries, no more than d, and the gaps of a cell add up to the genes.

    So the room that a merlin store asks for, whose cells nobody has counted, holds every batch.
    """
    rng = np.random.default_rng(0)
    for density in (0, 0.001, 0.01, 0.1, 0.5, 1):
        x = rng.random((20, n_genes), np.float32) * (rng.random((20, n_genes)) < density)
        stream = Block.of_values(x, {"cell_type": np.zeros(20, int)}).stream(VALUES)
        assert np.diff(stream.offsets).max() <= n_genes
        assert np.diff(stream.offsets).min() >= 1


def test_a_batch_whose_places_int32_cannot_number_is_refused():
    split = coded_split([8])
    most = (2**31 - 1) // max(N_GENES, split.count_entries.most, split.value_entries.most)
    check_batch_fits(split, most)
    with pytest.raises(ConfigError, match=f"a batch of {most + 1} cells a device is too large.* at most {most} fit"):
        check_batch_fits(split, most + 1)


def test_places_are_counted_in_rows_as_wide_as_they_will_be(monkeypatch):
    side = dataclasses.replace(coded_split([8]).side, gene_ids=("G",) * 5000)  # more than any cell has entries
    split, most = HeldSplit("train", side, (block_of(np.arange(8)),)), (2**31 - 1) // 5120
    check_batch_fits(split, most + 1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    check_batch_fits(split, most)
    with pytest.raises(ConfigError, match=f"at most {most} fit"):
        check_batch_fits(split, most + 1)


SHARDED = """
import sys
sys.path[:0] = sys.argv[1:]
import jax, numpy as np
from coded_cells import block_of, check_rows
from hce_jax.input import densify
from hce_jax.input.batch import Capacity, make_batch
from hce_jax.training.mesh import batch_sharding, data_mesh, replicated
assert jax.device_count() == 2
cells = np.arange(12)
batch = make_batch([block_of(cells)], 12, [Capacity(20_000, 20_000)], 2)
batch = jax.device_put(batch, batch_sharding(data_mesh(), 12))
compiled = jax.jit(densify).lower(batch).compile()
text = compiled.as_text()
assert "num_partitions=2" in text, text
for word in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
    assert word not in text, word
x = compiled(batch)
assert x.sharding.is_equivalent_to(batch.scale.sharding, 2), x.sharding
check_rows(np.asarray(x), batch.targets, cells)
"""


def test_each_device_makes_its_own_rows_dense_without_the_others(pytestconfig):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    paths = [str(pytestconfig.rootpath), str(pytestconfig.rootpath / "tests")]
    subprocess.run([sys.executable, "-c", SHARDED, *paths], check=True, env=environment)


def split_of_all_densities():
    """Nine in ten cells express nothing; the others lie together and express a few genes, or all, some as values."""
    x = np.zeros((450, 512), np.float32)
    x[300:315] = np.log1p(np.float32(2))
    x[330:345, ::3] = np.log1p(np.float32(2))
    x[360:375] = np.arange(512) % 7 / 10 + 0.05
    x[390:405, ::3] = np.arange(171) % 7 / 10 + 0.05
    x[420:423] = np.log1p(np.float32(2))
    blocks = [Block.of_recovered_counts(each, {"cell_type": label_of(np.arange(15))}) for each in np.split(x, 30)]
    return HeldSplit("train", dataclasses.replace(coded_split([1]).side, gene_ids=("G",) * 512), tuple(blocks))


@pytest.mark.parametrize("place", [StreamedSplit, ResidentSplit])
def test_steps_are_compiled_once_and_unpacking_at_most_three_times_though_cells_express_no_gene_or_all(place):
    sharding = batch_sharding(data_mesh(), 15)
    objective = Objective(jnp.eye(N_TYPES), jnp.ones(N_TYPES), use_hierarchical_loss=False, epsilon=None)
    optimizer = published_optimizer(lambda step: 0.01, weight_decay=0.0, gradient_clip_val=0.0)
    cells = place(split_of_all_densities(), 15, sharding)
    model = build_model({"model_type": "linear"}, 512, N_TYPES, nnx.Rngs(0), precision=PRECISIONS["float32"])
    graphdef, state = init_state([model], optimizer)
    state = jax.device_put(state, replicated(sharding.mesh))
    train_step = make_train_step(graphdef, [objective], optimizer, jax.random.key(0)[None])
    eval_step = make_eval_step(graphdef, [objective])
    rooms = set()
    for batch in cells.training_batches(Shuffle(0, 0), 15):
        rooms.add((batch.counts.gaps.shape, batch.values.gaps.shape))
        state, _ = train_step(state, dense_batch(batch, sharding))
    for batch in cells.evaluation_batches():
        eval_step(state.params, state.stats, dense_batch(batch, sharding))
    assert len(rooms) == 3
    assert train_step.func._cache_size() == 1
    assert eval_step._cache_size() == 1
