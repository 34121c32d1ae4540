import itertools

import numpy as np
import pytest
from coded_cells import check_rows, coded_split

from hce_jax.input import Shuffle
from hce_jax.input.source import (
    WindowSource,
    cells_of_batches,
    cells_of_windows,
    deal,
    n_shards,
    plan_windows,
    stretch,
    training_windows,
)


def epoch_by_the_rule(block_sizes, batch_size, window_cells, data_seed, epoch):
    """The order of an epoch in plain words: lists of cells, one for each batch."""
    n_cells = sum(block_sizes)
    blocks, cell = [], 0
    for size in block_sizes:
        blocks.append(list(range(cell, cell + size)))
        cell += size
    most = len(blocks) // 2
    shards = max(shards for shards in (1, 2, 4, 8, 16) if shards == 1 or (batch_size % shards == 0 and shards <= most))
    per_window = max(1, round(window_cells / shards / max(block_sizes)))
    order_of_shards = []
    for shard in range(shards):
        begin, end = shard * n_cells // shards, (shard + 1) * n_cells // shards
        own, place = [], 0
        for i in np.random.default_rng(0).permutation(len(blocks)):
            own.append([cell for number, cell in enumerate(blocks[i], place) if begin <= number < end])
            place += len(blocks[i])
        own = [block for block in own if block]
        drawn = np.random.default_rng([data_seed, epoch, 1, shard]).permutation(len(own))
        order = []
        for number, first in enumerate(range(0, len(own), per_window)):
            window = [cell for i in drawn[first : first + per_window] for cell in own[i]]
            rng = np.random.default_rng([data_seed, epoch, 2, shard, number])
            order += [window[i] for i in rng.permutation(len(window))]
        order_of_shards.append(order)
    share = batch_size // shards
    return [
        [cell for order in order_of_shards for cell in order[batch * share : (batch + 1) * share]]
        for batch in range(n_cells // batch_size)
    ]


CASES = [
    ([8] * 12, 16, 64, 0, 0),
    ([8] * 12, 16, 64, 7, 3),
    ([8] * 11 + [2], 20, 40, 0, 1),
    ([3, 9, 1, 1, 30, 2, 7], 6, 10, 1, 0),
    ([10, 10, 5], 7, 1000, 2, 2),
    ([5] * 9, 1, 15, 3, 0),
    ([50], 48, 16, 0, 0),
    ([1] * 100, 32, 1, 0, 5),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_order_follows_the_written_rule(case):
    sizes, batch_size, window_cells, data_seed, epoch = case
    order = cells_of_batches(np.array(sizes), batch_size, window_cells, Shuffle(data_seed, epoch))
    assert order.tolist() == epoch_by_the_rule(*case)


def test_the_orders_of_these_seeds_are_these():
    sizes = np.array([4, 4, 4, 4, 4])
    first, other = (cells_of_batches(sizes, 6, 8, Shuffle(*each)).tolist() for each in ((0, 0), (7, 3)))
    assert first == [[17, 19, 16, 0, 1, 2], [18, 12, 13, 3, 4, 6], [11, 10, 8, 7, 5, 15]]
    assert other == [[9, 11, 10, 15, 14, 7], [8, 12, 13, 6, 4, 5], [19, 16, 17, 2, 3, 1]]


def test_another_epoch_or_data_seed_gives_another_order_and_the_same_ones_the_same():
    sizes = np.full(20, 8)
    orders = [cells_of_batches(sizes, 16, 64, Shuffle(*each)).tolist() for each in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] != orders[3] != orders[0]


def splits_of_all_sizes():
    rng = np.random.default_rng(0)
    for _ in range(150):
        sizes = rng.integers(1, rng.integers(2, 40), size=rng.integers(1, 30))
        yield sizes, int(rng.integers(1, sizes.sum() + 1)), int(rng.integers(1, 3 * sizes.sum()))


def test_no_cell_comes_twice_and_only_the_incomplete_last_batch_is_dropped():
    for sizes, batch_size, window_cells in splits_of_all_sizes():
        order = cells_of_batches(sizes, batch_size, window_cells, Shuffle(0, 0))
        assert order.shape == (sizes.sum() // batch_size, batch_size)
        assert len(np.unique(order)) == order.size
        assert 0 <= order.min() <= order.max() < sizes.sum()


def test_every_logical_shard_gives_an_equal_part_of_each_batch_in_its_own_rows():
    for sizes, batch_size, window_cells in splits_of_all_sizes():
        order, shards = (
            cells_of_batches(sizes, batch_size, window_cells, Shuffle(0, 0)),
            n_shards(batch_size, len(sizes)),
        )
        of_block = np.repeat(np.arange(len(sizes)), sizes)
        for pieces, rows in zip(deal(sizes, shards), np.split(order, shards, axis=1), strict=True):
            assert set(of_block[rows.ravel()]) <= set(pieces[:, 0])


def test_dealing_gives_each_cell_to_one_shard_and_shards_are_equal_within_a_cell():
    for sizes, batch_size, _ in splits_of_all_sizes():
        starts, shards = np.cumsum(sizes) - sizes, n_shards(batch_size, len(sizes))
        cells = [
            [cell for block, first, last in pieces for cell in range(starts[block] + first, starts[block] + last)]
            for pieces in deal(sizes, shards)
        ]
        assert sorted(itertools.chain(*cells)) == list(range(sizes.sum()))
        assert max(map(len, cells)) - min(map(len, cells)) <= 1


def test_neighbouring_blocks_are_dealt_to_all_shards():
    first_quarter = [np.mean(pieces[:, 0] < 400) for pieces in deal(np.full(1600, 256), 16)]
    assert 0.1 < min(first_quarter) < max(first_quarter) < 0.4


@pytest.mark.parametrize(
    ("batch_size", "n_blocks", "shards"),
    [(2048, 1000, 16), (100, 1000, 4), (24, 1000, 8), (7, 1000, 1), (2048, 32, 16), (2048, 31, 8), (2048, 1, 1)],
)
def test_shards_divide_16_and_the_batch_and_have_two_blocks_or_more(batch_size, n_blocks, shards):
    assert n_shards(batch_size, n_blocks) == shards


def test_windows_hold_whole_blocks_of_a_shard_as_many_as_fit_best():
    windows = training_windows(np.full(64, 10), 4, 130, Shuffle(0, 0))
    assert {len(window.pieces) for window in windows} == {3, 1}  # 130 cells / 4 shards / 10 a block; 16 blocks a shard
    assert sum(window.n_cells for window in windows) == 640
    assert len(training_windows(np.full(64, 10), 4, 1, Shuffle(0, 0))) == 64
    assert len(training_windows(np.full(64, 10), 4, 10**9, Shuffle(0, 0))) == 4


def test_windows_come_as_a_reader_of_batches_needs_them():
    for sizes, batch_size, window_cells in splits_of_all_sizes():
        shards = n_shards(batch_size, len(sizes))
        windows = training_windows(sizes, batch_size, window_cells, Shuffle(0, 0))
        starts = [window.start for window in windows]
        assert starts == sorted(starts)
        for shard in range(shards):
            own = [window for window in windows if window.shard == shard]
            assert [window.number for window in own] == list(range(len(own)))
            ends = np.cumsum([window.n_cells for window in own])
            assert [window.start for window in own] == [0, *ends[:-1]]


@pytest.mark.parametrize("shuffle", [None, Shuffle(3, 1)], ids=["in the order of the store", "shuffled"])
def test_a_window_can_be_read_on_its_own_in_any_order_and_has_the_cells_that_were_planned(shuffle):
    split = coded_split([8, 3, 8, 8, 1, 5, 7])
    sizes = split.block_sizes
    windows = (
        plan_windows({0: stretch(sizes, 0, int(sizes.sum()))}, 2, None)
        if shuffle is None
        else training_windows(sizes, 4, 20, shuffle)
    )
    planned = cells_of_windows(split.block_sizes, windows, shuffle)
    source = WindowSource(split, windows, shuffle)
    assert len(source) == len(windows) >= 4
    for index in reversed(range(len(source))):
        window, cells = windows[index], source[index]
        expected = planned[window.shard][window.start : window.start + window.n_cells]
        check_rows(cells.x.toarray(), cells.column("cell_type"), expected)
    if shuffle is None:
        assert planned[0].tolist() == list(range(40))
