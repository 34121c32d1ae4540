import sys
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
from coded_cells import label_of
from evaluated import CodedCells, CodedClassifier, probabilities_of

from hce_jax.errors import StoreError
from hce_jax.evaluation.predict import classified
from hce_jax.store.split import n_readers


def numbers(batch):
    return batch.block.column("soma_joinid") - 10**10


@pytest.mark.parametrize(
    ("block_sizes", "batch_size", "together", "computed"),
    [
        ([4, 4, 4], 8, [8, 4], [8, 4]),
        ([4, 4, 4], 7, [4, 4, 4], [4, 4, 4]),
        ([10, 3, 1], 4, [10, 4], [4, 4, 2, 4]),
        ([5], 1, [5], [1] * 5),
        ([1] * 40, 100, [40], [40]),
        ([8, 1], 8, [8, 1], [8, 1]),  # a last batch of a single cell
    ],
)
def test_every_cell_comes_once_and_in_order_whatever_the_batches(block_sizes, batch_size, together, computed):
    cells, classifier = CodedCells(block_sizes), CodedClassifier()
    found = list(classified(cells, [classifier], batch_size))
    assert [len(batch.block) for batch in found] == together
    assert sorted(classifier.batches) == sorted(computed)
    assert sorted(cells.reads) == list(range(len(block_sizes)))
    np.testing.assert_array_equal(np.concatenate([numbers(batch) for batch in found]), np.arange(sum(block_sizes)))
    for batch in found:
        np.testing.assert_array_equal(batch.block.column("cell_type"), label_of(numbers(batch)))
        np.testing.assert_array_equal(batch.probabilities[0], probabilities_of(numbers(batch)))


def test_cells_are_read_once_for_all_classifiers():
    cells = CodedCells([6] * 10)
    classifiers = [CodedClassifier(shift) for shift in range(3)]
    for batch in classified(cells, classifiers, 12):
        for shift, probabilities in enumerate(batch.probabilities):
            np.testing.assert_array_equal(probabilities, probabilities_of(numbers(batch), shift))
    assert sorted(cells.reads) == list(range(10))
    assert [sum(each.batches) for each in classifiers] == [60, 60, 60]


class AtOnce(ThreadPoolExecutor):
    """Does what it is given before it returns."""

    def submit(self, task, *arguments):
        done = Future()
        done.set_result(task(*arguments))
        return done


def test_what_is_read_ahead_stays_bounded(monkeypatch):
    monkeypatch.setattr(sys.modules[classified.__module__], "ThreadPoolExecutor", AtOnce)
    cells = CodedCells([2] * 1000)
    batches = classified(cells, [CodedClassifier()], 2)
    for taken in range(1, 4):
        next(batches)
        assert len(cells.reads) == n_readers() + taken
    batches.close()


def test_a_damaged_block_ends_it_after_the_batches_before():
    batches = classified(CodedCells([4] * 50, damaged=20), [CodedClassifier()], 4)
    found = [next(batches) for _ in range(20)]
    assert len(found[-1].block) == 4
    with pytest.raises(StoreError, match="block 20 is damaged"):
        next(batches)
