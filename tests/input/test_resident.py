import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from coded_cells import FIRST_CELL, check_rows, coded_split, write_cell_store, write_merlin_store
from test_source import epoch_by_the_rule

from hce_jax.errors import ConfigError, StoreError
from hce_jax.input import PLACES, ResidentSplit, Shuffle, StreamedSplit, densify, place_cells
from hce_jax.input import resident as resident_module
from hce_jax.store import open_store
from hce_jax.training.mesh import batch_sharding, data_mesh

SIZES = {"train": 90, "val": 23}
BLOCKS = [8] * 11 + [2]
dense = jax.jit(densify)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resident")
    write_merlin_store(folder / "merlin", SIZES, rows_per_part=32, rows_per_group=8)
    write_cell_store(folder / "cells", SIZES, rows_per_part=32, block_size=8)
    return folder


def place(split, batch_size, where="device"):
    return place_cells(split, batch_size, batch_sharding(data_mesh(), batch_size), where)


def check_same(batches, others):
    """Check that batches are equal bit for bit, whatever the form of their streams."""
    for batch, other in zip(batches, others, strict=True):
        np.testing.assert_array_equal(batch.targets, other.targets)
        np.testing.assert_array_equal(batch.real, other.real)
        np.testing.assert_array_equal(dense(batch), dense(other))


def dealt(block_sizes):
    """The cells of a split in the order in which its blocks are dealt out."""
    blocks = np.split(np.arange(sum(block_sizes)), np.cumsum(block_sizes)[:-1])
    return np.concatenate([blocks[i] for i in np.random.default_rng(0).permutation(len(blocks))])


@pytest.mark.parametrize("kind", ["merlin", "cells"])
@pytest.mark.parametrize("batch_size", [16, 7])
def test_the_same_batches_come_from_the_disk_the_host_and_the_device(stores, kind, batch_size):
    split = open_store(stores / kind).split("train")
    epochs = [list(place(split, batch_size, where).training_batches(Shuffle(0, 1), 40)) for where in PLACES]
    expected = epoch_by_the_rule(BLOCKS, batch_size, 40, 0, 1)
    for batch, cells in zip(epochs[0], expected, strict=True):
        check_rows(dense(batch), batch.targets, np.array(cells))
    for others in epochs[1:]:
        check_same(epochs[0], others)


def test_epochs_differ_and_the_split_is_read_twice_before_all_of_them():
    split = coded_split(BLOCKS)
    cells = place(split, 16)
    orders = [np.concatenate([batch.targets for batch in cells.training_batches(Shuffle(0, e), 40)]) for e in (0, 1)]
    assert not np.array_equal(*orders)
    assert sorted(split.reads) == sorted(2 * list(range(12)))


@pytest.mark.parametrize(
    ("block_sizes", "as_values"),
    [([40, 1, 1, 9, 30], False), ([40, 1, 1, 9, 30], True), ([6], False), ([1] * 33, False)],
    ids=["unequal", "as values", "one", "of one cell"],
)
def test_blocks_of_any_sizes_lie_on_the_device_as_they_are(block_sizes, as_values):
    split = coded_split(block_sizes, as_values)
    (batch,) = place(split, sum(block_sizes)).evaluation_batches()
    check_rows(dense(batch), batch.targets, dealt(block_sizes), exact=as_values)


@pytest.mark.parametrize("batch_size", [7, 16, 64])
def test_evaluation_has_every_cell_once_and_fills_the_last_batch_up(stores, batch_size):
    batches = list(place(open_store(stores / "cells").split("val"), batch_size).evaluation_batches())
    assert len(batches) == -(-23 // batch_size)
    x, targets, real = (
        np.concatenate(each)
        for each in zip(*((dense(batch), batch.targets, batch.real) for batch in batches), strict=True)
    )
    check_rows(x[real], targets[real], FIRST_CELL["val"] + dealt([8, 8, 7]))
    assert not x[~real].any()


@pytest.mark.parametrize("taken", [0, 2, 5])
def test_it_goes_on_from_the_state_of_either_place_with_the_very_next_batch(taken):
    split = coded_split(BLOCKS)
    datasets = [place(split, 16, where).training_batches(Shuffle(2, 0), 40) for where in ("device", "disk")]
    whole = list(datasets[0])
    for dataset in datasets:
        iterator = iter(dataset)
        for _ in range(taken):
            next(iterator)
        state = iterator.get_state()
        iterator.close()
        for other in datasets:
            resumed = iter(other)
            resumed.set_state(state)
            check_same(list(resumed), whole[taken:])


def test_a_batch_larger_than_the_split_can_be_evaluated_but_not_trained_on():
    cells = place(coded_split(BLOCKS), 91)
    assert sum(int(batch.real.sum()) for batch in cells.evaluation_batches()) == 90
    with pytest.raises(ConfigError, match=r"config.batch_size is 91, but the train split has 90 cells"):
        cells.training_batches(Shuffle(0, 0), 40)


def test_a_damaged_block_is_named():
    split = coded_split(BLOCKS)
    split.damaged.add(7)
    with pytest.raises(StoreError, match="block 7 is damaged"):
        place(split, 16)


def test_a_split_that_does_not_fit_is_refused_with_both_sizes_before_it_is_sent(monkeypatch):
    kind, sent = type(jax.devices()[0]), []
    monkeypatch.setattr(kind, "memory_stats", lambda device: {"bytes_limit": 2**20, "bytes_in_use": 2**20 - 2**10})
    monkeypatch.setattr(resident_module, "_StreamBuffer", sent.append)
    with pytest.raises(ConfigError, match=r"the train split takes 0.0 GiB on each device, and 0.0 GiB are free; pass"):
        place(coded_split(BLOCKS), 16)
    assert not sent


def test_what_is_said_to_be_needed_is_what_lies_on_the_device(monkeypatch):
    split = coded_split([8] * 40)
    cells = place(split, 16)._cells
    lying = sum(array.nbytes for lines in (cells.counts, cells.values) for array in (lines.gaps, lines.amounts))
    kind = type(jax.devices()[0])
    for free, fits in ((lying, True), (lying // 2, False)):
        monkeypatch.setattr(kind, "memory_stats", lambda device, free=free: {"bytes_limit": free, "bytes_in_use": 0})
        if fits:
            place(split, 16)
        else:
            with pytest.raises(ConfigError, match="GiB are free"):
                place(split, 16)


THREE_DEVICES = """
import sys
sys.path[:0] = sys.argv[2:]
import jax, numpy as np, pytest
from coded_cells import check_rows, coded_split, rows_of
from jax.sharding import AxisType, Mesh
from pathlib import Path
from test_resident import check_same, dealt, place
from hce_jax.errors import ConfigError
from hce_jax.input import PLACES, Shuffle, place_cells, training_batches
from hce_jax.store import open_store
from hce_jax.training.mesh import batch_sharding
assert jax.device_count() == 3
with pytest.raises(ConfigError, match=r"needs one host and a number of devices that divides the 16 logical shards of "
                   r"the train split; there are 1 hosts and 3 devices; pass --config.cells_in=host"):
    place(coded_split([1] * 60), 48)
mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
for kind, batch_size in (("merlin", 20), ("cells", 16)):
    split = open_store(Path(sys.argv[1]) / kind).split("train")
    sharding = batch_sharding(mesh, batch_size)
    expected = list(training_batches(split, batch_size, Shuffle(0, 1), 40))
    for where in PLACES:
        batches = list(place_cells(split, batch_size, sharding, where).training_batches(Shuffle(0, 1), 40))
        leaves = [leaf for leaf in jax.tree.leaves(batches) if leaf.size]
        assert all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf in leaves)
        assert batches[0].counts.rows.shape == (2, batch_size // 2)
        check_same(batches, expected)
block_sizes = [8, 8, 7, 8]
batches = list(place_cells(coded_split(block_sizes), 6, batch_sharding(mesh, 6), "device").evaluation_batches())
assert len(batches) == 6  # 15 and 16 cells, 3 of each device in a batch
x, targets, real = (
    np.concatenate([np.asarray(each).reshape(2, 3, -1) for each in which], axis=1)
    for which in zip(*((rows_of(batch), batch.targets, batch.real) for batch in batches))
)
assert not x[~real[..., 0]].any()
check_rows(x[real[..., 0]], targets[real], dealt(block_sizes))  # those of the first device come first
"""


def test_two_devices_have_the_same_batches_and_three_cannot_share_the_shards(stores, pytestconfig):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_PLATFORMS": "cpu"}
    root = pytestconfig.rootpath
    paths = [str(root), str(root / "tests"), str(root / "tests" / "input")]
    subprocess.run([sys.executable, "-c", THREE_DEVICES, str(stores), *paths], check=True, env=environment)


def test_a_place_is_one_of_three():
    split, sharding = coded_split(BLOCKS), batch_sharding(data_mesh(), 16)
    assert PLACES == ("disk", "host", "device")
    kinds = [type(place_cells(split, 16, sharding, where)) for where in PLACES]
    assert kinds == [StreamedSplit, StreamedSplit, ResidentSplit]
    assert sorted(split.reads) == sorted(3 * list(range(12)))  # the host reads once, the device twice, the disk later
