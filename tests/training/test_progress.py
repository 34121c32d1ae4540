import numpy as np
import pytest

from configs import common
from hce_jax.training.progress import BestCheckpoints, EarlyStopping, Progress


def test_patience_counts_epochs_in_a_row_and_an_equal_score_is_no_better():
    stopping, stopped = EarlyStopping(patience=3), []
    for score in [0.1, 0.2, 0.2, 0.1, 0.3, 0.3, 0.3, 0.2]:
        stopping.take(score)
        stopped.append(stopping.stopped)
    assert stopped == [False] * 7 + [True]


@pytest.mark.parametrize(
    ("top_k", "interval", "kept"),
    [(1, 1, [3]), (2, 1, [1, 3]), (3, 1, [1, 2, 3]), (1, 2, [1]), (2, 2, [1, 3])],
)
def test_the_best_checkpoints_stay_and_of_equals_the_earlier(top_k, interval, kept):
    # With interval 2 epochs 1, 3, 5 are offered; 3 scores lower than 1 there.
    scores = [0.1, 0.8, 0.7, 0.9 if interval == 1 else 0.75, 0.2, 0.7]
    best = BestCheckpoints(top_k, interval)
    names = [best.offer(epoch, score) for epoch, score in enumerate(scores)]
    assert sorted(names.index(name) for _, name in best.kept) == kept
    assert best.kept[0][1].startswith("val_f1_macro_epoch=3_" if interval == 1 else "val_f1_macro_epoch=1_")
    assert best.score == (0.9 if interval == 1 else 0.8)


def test_the_last_epoch_is_kept_when_the_interval_left_no_other():
    best = BestCheckpoints(top_k=1, interval=9)
    assert [best.offer(epoch, 0.5, last=epoch == 1) for epoch in range(2)] == [
        None,
        "val_f1_macro_epoch=1_val_f1_macro=0.500.ckpt",
    ]


def test_progress_comes_back_from_json_as_it_was():
    config = common.get_config()
    config.max_epochs, config.early_stopping_patience = 9, 2
    progress = Progress(config)
    for score in (0.1, 1 / 3, 0.2):
        progress.end_epoch(score)
    progress.meter.add(0.1, np.array([[1, 2], [3, 4], [5, 6]]))
    again = Progress.from_json(config, progress.to_json())
    assert again.to_json() == progress.to_json()
    assert not again.trained
    for each in (progress, again):
        each.end_epoch(1 / 3)  # the second epoch in a row that is no better
    assert progress.trained
    assert again.trained
    assert again.best.kept == progress.best.kept
