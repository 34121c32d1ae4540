import re
import threading
import time
from collections import Counter

import jax
import numpy as np
import pytest
from coded_cells import FIRST_CELL, check_rows, coded_split, rows_of, write_cell_store, write_merlin_store
from test_source import epoch_by_the_rule

from hce_jax.errors import ConfigError, StoreError
from hce_jax.input import (
    Hosts,
    Shuffle,
    StreamedSplit,
    batches_per_epoch,
    evaluation_batches,
    training_batches,
)
from hce_jax.store import open_store
from hce_jax.training.mesh import batch_sharding, data_mesh

SIZES = {"train": 90, "val": 23, "test": 17}
BLOCKS = [8] * 11 + [2]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    merlin = write_merlin_store(folder / "merlin", SIZES, rows_per_part=32, rows_per_group=8)
    cells = write_cell_store(folder / "cells", SIZES, rows_per_part=32, block_size=8)
    return {"merlin": open_store(merlin), "cells": open_store(cells)}


def check_batch(batch, cells):
    """Check expression and label of every row of a batch."""
    assert batch.real.all()
    check_rows(rows_of(batch), batch.targets, np.array(cells))


def same(batch, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(other), strict=True))


def wait_for_no_threads(before):
    """Wait until the threads that were not there before have ended."""
    end = time.monotonic() + 20
    while set(threading.enumerate()) - before:
        assert time.monotonic() < end, threading.enumerate()
        time.sleep(0.01)


# --- the order, and what is in it


@pytest.mark.parametrize("kind", ["merlin", "cells"])
@pytest.mark.parametrize(("batch_size", "window", "seeds"), [(16, 40, (0, 0)), (20, 64, (7, 3)), (7, 16, (0, 1))])
def test_batches_of_a_store_follow_the_written_rule_and_each_row_has_its_own_cell(
    stores, kind, batch_size, window, seeds
):
    split = stores[kind].split("train")
    assert split.block_sizes.tolist() == [8] * 11 + [2]
    expected = epoch_by_the_rule(BLOCKS, batch_size, window, *seeds)
    found = list(training_batches(split, batch_size, Shuffle(*seeds), window))
    assert len(found) == len(expected) == batches_per_epoch(split, batch_size) == 90 // batch_size
    for batch, cells in zip(found, expected, strict=True):
        check_batch(batch, cells)


@pytest.mark.parametrize("block_sizes", [[40, 1, 1, 9, 30], [90], [1] * 33], ids=["unequal", "one", "of one cell"])
@pytest.mark.parametrize("batch_size", [1, 32])
def test_blocks_of_any_sizes_are_mixed_by_the_rule(block_sizes, batch_size):
    split = coded_split(block_sizes)
    found = training_batches(split, batch_size, Shuffle(1, 2), 24)
    for batch, cells in zip(found, epoch_by_the_rule(block_sizes, batch_size, 24, 1, 2), strict=True):
        check_batch(batch, cells)


def test_parts_may_cut_through_the_share_of_a_shard():
    split = coded_split(BLOCKS)
    expected = epoch_by_the_rule(BLOCKS, 12, 40, 0, 0)  # 4 shards of 3 cells
    for n_parts in (1, 3, 6):
        batches = list(training_batches(split, 12, Shuffle(0, 0), 40, n_parts=n_parts))
        assert batches[0].counts.rows.shape == (n_parts, 12 // n_parts)
        for batch, cells in zip(batches, expected, strict=True):
            check_batch(batch, cells)


@pytest.mark.parametrize("kind", ["merlin", "cells"])
@pytest.mark.parametrize(("name", "fraction", "size"), [("train", 0.5, 64), ("train", 0.3, 32), ("val", 0.5, 23)])
def test_a_sub_sample_is_the_first_parts(stores, kind, name, fraction, size):
    split = stores[kind].split(name, fraction)
    assert split.n_cells == size
    (batch,) = evaluation_batches(split, 64)
    check_rows(rows_of(batch)[:size], batch.targets[:size], FIRST_CELL[name] + np.arange(size))


# --- hosts


@pytest.mark.parametrize("n_hosts", [1, 2, 4])
def test_each_host_gets_its_rows_of_the_same_batches_and_reads_the_blocks_of_its_shards_only(n_hosts):
    expected = epoch_by_the_rule(BLOCKS, 32, 40, 3, 1)
    dealt = np.random.default_rng(0).permutation(len(BLOCKS))
    of_cell = np.repeat(dealt, np.array(BLOCKS)[dealt])  # the block of each cell, as they are dealt out
    block_of = np.repeat(np.arange(len(BLOCKS)), BLOCKS)
    for host in range(n_hosts):
        split = coded_split(BLOCKS)
        found = list(training_batches(split, 32, Shuffle(3, 1), 40, hosts=Hosts(host, n_hosts)))
        for batch, cells in zip(found, expected, strict=True):
            check_batch(batch, np.split(np.array(cells), n_hosts)[host])
        low, high = 90 * host // n_hosts, 90 * (host + 1) // n_hosts
        # The last window, of which no batch is left, may be read ahead or not.
        needed = {block_of[cell] for cells in expected for cell in np.split(np.array(cells), n_hosts)[host]}
        assert needed <= set(split.reads) <= set(of_cell[low:high])


def test_hosts_that_cannot_share_a_batch_equally_are_an_error():
    split = coded_split(BLOCKS)
    for batch_size, n_hosts in ((30, 3), (20, 8), (16, 32)):
        with pytest.raises(ConfigError, match=rf"{n_hosts} hosts cannot share the \d logical shards"):
            training_batches(split, batch_size, Shuffle(0, 0), 40, hosts=Hosts(0, n_hosts))


@pytest.mark.parametrize("n_hosts", [1, 2, 4])
@pytest.mark.parametrize(
    ("block_sizes", "batch_size"),
    [
        pytest.param(BLOCKS, 20, id="90 cells in 5 batches: the last host has fewer"),
        pytest.param([8, 8, 7], 20, id="23 cells in 2 batches: the last of four hosts has none"),
        pytest.param([3], 64, id="3 cells in a batch: all but the first host have none"),
        pytest.param([8] * 5, 40, id="40 cells in a whole batch"),
        pytest.param([1], 4, id="a single cell"),
    ],
)
def test_the_hosts_evaluate_every_cell_once_and_each_gives_as_many_batches(block_sizes, batch_size, n_hosts):
    n_cells, n_rows, seen = sum(block_sizes), batch_size // n_hosts, []
    for host in range(n_hosts):
        batches = list(evaluation_batches(coded_split(block_sizes), batch_size, hosts=Hosts(host, n_hosts)))
        assert len(batches) == -(-n_cells // batch_size)
        for batch in batches:
            assert batch.targets.shape == batch.real.shape == (n_rows,)
            x, n_real = rows_of(batch), int(batch.real.sum())
            assert batch.real[:n_real].all()
            assert not x[n_real:].any()
            check_rows(x[:n_real], batch.targets[:n_real], len(seen) + np.arange(n_real))
            seen += range(len(seen), len(seen) + n_real)
    assert len(seen) == n_cells


# --- reading


def test_each_block_is_read_once_an_epoch_and_once_more_for_each_shard_bound_in_it():
    split = coded_split([5] * 32)  # 10 cells a shard: no bound lies in a block
    assert len(list(training_batches(split, 16, Shuffle(0, 0), 40))) == 10
    assert sorted(split.reads) == list(range(32))
    split = coded_split([8] * 15)  # 120 cells in 4 shards: bounds at 30, 60, 90 of the cells as they are dealt out
    assert len(list(training_batches(split, 16, Shuffle(0, 0), 40))) == 7
    dealt = np.random.default_rng(0).permutation(15)
    assert Counter(split.reads) == {block: 1 + (block in dealt[[3, 7, 11]]) for block in range(15)}


def test_evaluation_reads_each_block_once_in_order():
    split = coded_split([8] * 15)
    list(evaluation_batches(split, 7))
    assert sorted(split.reads) == list(range(15))


# --- resuming


def streamed(split, batch_size, shuffle, window):
    return StreamedSplit(split, batch_size, batch_sharding(data_mesh(), batch_size)).training_batches(shuffle, window)


@pytest.mark.parametrize("dataset_of", [training_batches, streamed])
@pytest.mark.parametrize("taken", [0, 1, 2, 5, 11])
def test_an_iterator_goes_on_from_a_saved_state_with_the_very_next_batch(dataset_of, taken):
    dataset = dataset_of(coded_split(BLOCKS), 8, Shuffle(3, 1), 24)
    whole = list(dataset)
    assert len(whole) == 11
    iterator = iter(dataset)
    for _ in range(taken):
        next(iterator)
    state = iterator.get_state()
    iterator.close()
    resumed = iter(dataset)
    next(resumed)  # what was done before does not matter
    for _ in range(2):
        resumed.set_state(state)
        assert resumed.get_state() == state
        rest = list(resumed)
        assert len(rest) == 11 - taken
        assert all(map(same, rest, whole[taken:]))


def test_little_is_read_again_on_resuming():
    split = coded_split([4] * 256)  # 16 shards of 16 blocks, in 16 windows of a block each
    dataset = training_batches(split, 16, Shuffle(0, 0), 64)
    resumed = iter(dataset)
    resumed.set_state({"next_index": 50})
    assert len(list(resumed)) == 14
    assert len(split.reads) == 16 * 4  # of the 64 cells of a shard 50 are done: the last 4 blocks are needed


def test_a_state_of_a_longer_epoch_gives_no_batches():
    resumed = iter(training_batches(coded_split(BLOCKS), 8, Shuffle(0, 0), 24))
    resumed.set_state({"next_index": 100})
    assert list(resumed) == []


# --- evaluation


@pytest.mark.parametrize("kind", ["merlin", "cells"])
@pytest.mark.parametrize("batch_size", [1, 7, 23, 64])
def test_evaluation_sees_every_cell_once_in_order_and_fills_the_last_batch_up(stores, kind, batch_size):
    batches = list(evaluation_batches(stores[kind].split("val"), batch_size))
    assert len(batches) == -(-23 // batch_size)
    x, targets, real = (
        np.concatenate(each)
        for each in zip(*((rows_of(batch), batch.targets, batch.real) for batch in batches), strict=True)
    )
    check_rows(x[real], targets[real], FIRST_CELL["val"] + np.arange(23))
    assert real.tolist() == [True] * 23 + [False] * (len(batches) * batch_size - 23)
    assert not x[~real].any()


def test_evaluation_of_many_windows_has_every_cell_in_order():
    split = coded_split([1024, 1024, 700, 1024, 5], as_values=True)
    targets = np.concatenate([batch.targets[batch.real] for batch in evaluation_batches(split, 512)])
    np.testing.assert_array_equal(targets, np.arange(3777) * 5 % 7)


# --- what goes wrong


def test_a_batch_larger_than_the_split_is_an_error_with_both_numbers():
    with pytest.raises(ConfigError, match=r"config.batch_size is 91, but the train split has 90 cells; .*=90 or less"):
        training_batches(coded_split(BLOCKS), 91, Shuffle(0, 0), 40)


def until_an_error(iterator):
    """Return what came before it, and the error."""
    found = []
    try:
        while True:
            found.append(next(iterator))
    except StoreError as error:
        return found, str(error)


def test_damage_in_the_middle_of_an_epoch_is_named_and_leaves_no_threads_behind(tmp_path):
    split = open_store(write_cell_store(tmp_path / "store", {"train": 90}, 32, 8)).split("train")
    part = tmp_path / "store" / "train" / "part.1.arrow"
    damaged = bytearray(part.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    part.write_bytes(damaged)
    before = set(threading.enumerate())
    training = [dataset_of(split, 2, Shuffle(0, 2), 8) for dataset_of in (training_batches, streamed)]
    for batches in (*training, evaluation_batches(split, 2)):
        iterator = iter(batches)
        found, error = until_an_error(iterator)
        assert re.fullmatch(rf"block 2 of {part} cannot be read \(wrong checksum.*", error)
        assert len(found) == (37 if batches in training else 0)  # evaluation reads this small split at once
        iterator.close()
        wait_for_no_threads(before)


def test_after_an_error_the_same_batch_comes_next_not_a_later_one():
    split = coded_split(BLOCKS)
    whole = list(training_batches(split, 2, Shuffle(0, 0), 8))
    split.damaged.add(5)
    iterator, found = iter(training_batches(split, 2, Shuffle(0, 0), 8)), []
    for _ in range(3):
        before, error = until_an_error(iterator)
        found += before
        assert error == "block 5 is damaged"
    split.damaged.clear()
    found += list(iterator)
    assert len(found) == len(whole) == 45
    assert all(map(same, found, whole))


@pytest.mark.parametrize("dataset_of", [training_batches, streamed])
@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_an_iterator_that_is_left_early_leaves_no_threads_behind(dataset_of, how):
    before = set(threading.enumerate())
    iterator = iter(dataset_of(coded_split(BLOCKS), 2, Shuffle(0, 0), 8))
    next(iterator)
    assert set(threading.enumerate()) - before
    if how == "closed":
        iterator.close()
        iterator.close()
        with pytest.raises(ValueError, match="closed"):
            next(iterator)
    else:
        del iterator
    wait_for_no_threads(before)
