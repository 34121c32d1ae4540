import numpy as np
import pyarrow.parquet as pq
import pytest
from stores import cells_of, expression, label_of, write_tiny_store

from hce_jax.errors import ConfigError, StoreError
from hce_jax.input import Shuffle, evaluation_batches, training_batches
from hce_jax.store import open_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return open_store(write_tiny_store(tmp_path_factory.mktemp("pipeline") / "store"))


def cells(dataset):
    return [cells_of(batch.x[batch.real]) for batch in dataset]


def epoch(store, batch_size=20, data_seed=0, number=0, window=40):
    return cells(training_batches(store.split("train"), batch_size, Shuffle(data_seed, number), window))


def test_an_epoch_has_each_cell_at_most_once_and_drops_only_the_incomplete_last_batch(store):
    found = epoch(store)
    assert [len(batch) for batch in found] == [20, 20, 20, 20]
    assert len(np.unique(np.concatenate(found))) == 80
    assert np.concatenate(found).max() < 90  # no cell of another split


def test_every_row_keeps_its_own_expression_and_label(store):
    for batch in training_batches(store.split("train"), 20, Shuffle(0, 0), 40):
        numbers = cells_of(batch.x)
        np.testing.assert_array_equal(batch.x, expression(numbers))
        np.testing.assert_array_equal(batch.targets, label_of(numbers))
        assert batch.real.all()


# Worked out by hand from the rule: numpy's default_rng([data_seed, epoch]).permutation(12) gives the block order,
# default_rng([data_seed, epoch, window]).permutation(40) the order in a window of 40 cells; blocks hold 8, the last 2.
def expected_epoch(data_seed, number):
    blocks = [np.arange(8 * i, min(8 * i + 8, 90)) for i in range(12)]
    order = np.concatenate([blocks[i] for i in np.random.default_rng([data_seed, number]).permutation(12)])
    windows = [order[start : start + 40] for start in (0, 40, 80)]
    return np.concatenate(
        [w[np.random.default_rng([data_seed, number, i]).permutation(len(w))] for i, w in enumerate(windows)]
    )


@pytest.mark.parametrize(("data_seed", "number"), [(0, 0), (0, 1), (7, 3)])
def test_the_order_follows_the_written_rule(store, data_seed, number):
    found = np.concatenate(epoch(store, data_seed=data_seed, number=number))
    np.testing.assert_array_equal(found, expected_epoch(data_seed, number)[:80])


def test_the_order_of_seed_0_epoch_0_is_this_one(store):
    first = epoch(store)[0].tolist()
    assert first == [19, 35, 76, 32, 63, 74, 75, 42, 58, 73, 18, 62, 60, 34, 36, 38, 45, 46, 57, 72]


def test_another_epoch_or_data_seed_gives_another_order(store):
    orders = {tuple(np.concatenate(epoch(store, data_seed=s, number=e))) for s, e in ((0, 0), (0, 1), (1, 0))}
    assert len(orders) == 3


@pytest.mark.parametrize("batch_size", [1, 7, 23, 64])
def test_evaluation_sees_every_cell_once_in_order_and_fills_the_last_batch_up(store, batch_size):
    batches = list(evaluation_batches(store.split("val"), batch_size))
    np.testing.assert_array_equal(np.concatenate(cells(batches)), 1000 + np.arange(23))
    assert all(batch.x.shape == (batch_size, 12) for batch in batches)
    filler = batches[-1].x[~batches[-1].real]
    np.testing.assert_array_equal(filler, 0)


@pytest.mark.parametrize("taken", [0, 1, 2, 3])
def test_an_iterator_continues_from_its_saved_state_with_the_very_next_batch(store, taken):
    dataset = training_batches(store.split("train"), 20, Shuffle(3, 1), 40)
    iterator = iter(dataset)
    for _ in range(taken):
        next(iterator)
    state = iterator.get_state()
    rest = cells(iterator)
    resumed = iter(dataset)
    resumed.set_state(state)
    np.testing.assert_array_equal(cells(resumed), rest)
    assert len(rest) == 4 - taken


def test_a_batch_larger_than_the_split_is_an_error_with_both_numbers(store):
    with pytest.raises(ConfigError, match=r"config.batch_size is 91, but the train split has 90 cells"):
        training_batches(store.split("train"), 91, Shuffle(0, 0), 40)


def test_an_error_in_the_reading_thread_reaches_the_reader_as_it_is(tmp_path):
    path = write_tiny_store(tmp_path / "store")
    part = path / "train" / "part.1.parquet"
    split = open_store(path).split("train")
    table = pq.read_table(part)
    pq.write_table(table.slice(0, 8), part)
    with pytest.raises(StoreError, match=r"part.1.parquet is damaged"):
        cells(training_batches(split, 20, Shuffle(0, 0), 40))
