import itertools

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from stores import write_tiny_store

from configs import linear_ce, linear_hce
from hce_jax.errors import ConfigError
from hce_jax.training.find_lr import (
    LearningRates,
    check_plot_path,
    find_learning_rate,
    learning_rate_plot,
    range_test,
    rising_rates,
)
from hce_jax.training.trainer import Trainer

# What Lightning 2.4.0 made of lr_find(min_lr=1e-4, max_lr=10, num_training=30) with torch 2.15.0, the linear model
# and the batches of golden/trajectory_linear_ce.npz: the losses of its steps, and its results.
LIGHTNING_RAW = [
    2.86642, 2.26217, 2.62205, 2.76407, 2.26737, 2.17362, 2.75278, 2.11946, 2.39941, 2.43885, 1.77969, 1.57667, 1.83470,
    1.17417, 0.946960, 0.829163, 0.268436, 0.179167, 0.0556606, 0.159634, 0.00116512, 0.00588128, 0.000120738, 0.109808,
    9.15744e-08, 0.0, 6.06605e-08, 0.0, 0.000683209, 4.19918e-09,
]  # fmt: skip
LIGHTNING_LOSS = [
    1.44769, 1.72469, 1.95587, 2.12411, 2.14921, 2.15291, 2.23330, 2.21961, 2.23926, 2.25930, 2.21474, 2.15949, 2.13312,
    2.05976, 1.97918, 1.90006, 1.79302, 1.69176, 1.59332, 1.51038, 1.42627, 1.34983, 1.27957, 1.22057, 1.16083, 1.10561,
    1.05443, 1.00686, 0.962588, 0.921224,
]  # fmt: skip
LIGHTNING_LR = {0: 0.0001, 1: 0.0002154434690031884, 2: 0.000316227766016838, 29: 10.0}
LIGHTNING_SUGGESTION = 0.06812920690579612


@pytest.fixture(scope="module")
def store_path(tmp_path_factory):
    return write_tiny_store(tmp_path_factory.mktemp("find_lr") / "store")


def small(module, store_path, **changes):
    config = module.get_config()
    config.update(data_path=str(store_path), batch_size=30, **changes)  # three steps an epoch
    return config


# --- the range test by itself


def test_rates_means_and_suggestion_are_those_of_lightning():
    rates = rising_rates(1e-4, 10.0, 30)
    for step, rate in LIGHTNING_LR.items():
        assert rates[step] == pytest.approx(rate, rel=1e-12)
    found = range_test(rates, LIGHTNING_RAW)
    np.testing.assert_allclose(found.losses, LIGHTNING_LOSS, rtol=1e-5)
    assert found.suggestion == pytest.approx(LIGHTNING_SUGGESTION, rel=1e-12)


def lightning_s_algorithm(rates, raw):
    """Weighted sums, not a recursion; all losses are looked at, and those after the end thrown away."""
    n = np.arange(1, len(raw) + 1)
    weights = np.tril(0.02 * 0.98 ** np.abs(np.subtract.outer(n, n)))
    means = np.array([row[:k] @ raw[:k] for k, row in zip(n, weights, strict=True)]) / (1 - 0.98 ** (n + 1))
    above = [k for k in n[1:] if means[k - 1] > 4 * means[: k - 1].min()]
    means = means[: above[0]] if above else means
    candidates = means[10:-1][np.isfinite(means[10:-1])]
    suggestion = rates[10 + np.gradient(candidates).argmin()] if len(candidates) > 1 else None
    return means, suggestion


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("falls, then rises", lambda t: 3 - 2 * np.exp(-30 * (t - 0.6) ** 2)),
        ("diverges", lambda t: 2 + np.exp(50 * (t - 0.7))),
        ("diverges at once", lambda t: np.where(t > 0.05, 1e4, 1.0)),
        ("becomes no number", lambda t: np.where(t > 0.7, np.nan, 3 - t)),
        ("becomes infinite", lambda t: np.where(t > 0.5, np.inf, 3 - t)),
        ("was no number", lambda t: np.full_like(t, np.nan)),
    ],
)
def test_against_an_independent_account_of_the_algorithm(name, loss):
    rates = rising_rates(1e-8, 1.0, 100)
    raw = loss(np.linspace(0, 1, 100)) * np.random.default_rng(3).uniform(0.9, 1.1, 100)
    means, suggestion = lightning_s_algorithm(rates, raw)
    found = range_test(rates, raw)
    np.testing.assert_allclose(found.losses, means[: len(found.losses)], rtol=1e-9)
    assert not np.isfinite(means[len(found.losses) :]).any()  # nothing that counts was left out
    assert len(found.rates) == len(found.losses)
    assert np.isfinite(found.losses[:-1]).all()
    assert found.suggestion == suggestion


@pytest.mark.parametrize(
    ("falls", "steepest"),
    [
        ({15: 4.0, 16: 1.0, 17: 0.9}, 15),  # slopes from 14 on: (4 - 5) / 2, (1 - 5) / 2, (0.9 - 4) / 2
        ({11: 2.0}, 10),  # the first that counts, whose slope is 2 - 5; the next has (2 - 5) / 2
        ({38: 2.0}, 38),  # the last that counts
    ],
)
def test_the_suggestion_of_curves_worked_by_hand(falls, steepest):
    means = np.full(40, 5.0)
    means[4] = 9.0  # to 5 at once, but among the first ten
    for step, mean in falls.items():
        means[step:] = mean
    means[39] = -9.0  # the last, which does not count
    n = np.arange(1, 41)
    weighted = np.concatenate([[0], means * (1 - 0.98 ** (n + 1))])
    raw = (weighted[1:] - 0.98 * weighted[:-1]) / 0.02
    rates = rising_rates(1e-6, 1.0, 40)
    found = range_test(rates, raw)
    np.testing.assert_allclose(found.losses, means, rtol=1e-9)
    assert found.suggestion == rates[steepest]


@pytest.mark.parametrize(("steps", "suggests"), [(3, False), (12, False), (13, True)])
def test_a_slope_needs_two_means_that_count(steps, suggests):
    found = range_test(rising_rates(1e-6, 1.0, 40), [1.0] * (steps - 1) + [1e6] * 5)
    assert len(found.rates) == steps
    assert (found.suggestion is not None) == suggests


def test_no_loss_is_asked_for_after_the_end():
    taken = iter([1.0] * 20 + [1e6] + [1.0] * 20)
    assert len(range_test(rising_rates(1e-6, 1.0, 41), taken).rates) == 21
    assert len(list(taken)) == 20


# --- on a model


def test_step_k_is_taken_at_rate_k_and_epochs_follow_each_other(store_path, monkeypatch):
    applied, epochs = [], []
    step, batches = Trainer.step, Trainer.training_batches

    def spied(self, batch):
        before = np.array(self.state.params["linear"]["kernel"])
        metrics = step(self, batch)
        applied.append(np.median(1 - np.array(self.state.params["linear"]["kernel"]) / before))
        return metrics

    monkeypatch.setattr(Trainer, "step", spied)
    monkeypatch.setattr(
        Trainer, "training_batches", lambda self, epoch: (epochs.append(epoch), batches(self, epoch))[1]
    )
    # Decay so strong that it is all there is in an update: it multiplies a parameter by 1 - rate x decay.
    found = find_learning_rate(small(linear_ce, store_path, weight_decay=1e6), 1e-8, 5e-7, 20)
    np.testing.assert_allclose(applied, found.rates * 1e6, rtol=1e-3)
    np.testing.assert_allclose(np.log(found.rates / 1e-8) / np.log(50), [0, *np.arange(2, 21) / 20], atol=1e-12)
    assert epochs == list(range(7))


def test_only_the_first_of_several_models_is_trained_from_disk_and_nothing_is_written(store_path, capsys):
    before = sorted(store_path.rglob("*"))
    several = small(linear_ce, store_path, seeds=(7, 8), losses=("hce", "ce"), cells_in="host")
    found = find_learning_rate(several, 1e-5, 1.0, 25)
    assert "cells in files on disk\nmodel       linear, 65 parameters" in capsys.readouterr().out
    alone = find_learning_rate(small(linear_hce, store_path, seed=7), 1e-5, 1.0, 25)
    np.testing.assert_array_equal(found.losses, alone.losses)
    assert found.suggestion == alone.suggestion
    assert sorted(store_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((0.1, 0.1, 100), "learning rates from 0.1 to 0.1: both must be finite, and 0 < min_lr < max_lr"),
        ((0.0, 0.1, 100), "0 < min_lr"),
        ((float("nan"), 0.1, 100), "from nan to 0.1"),
        ((0.1, float("inf"), 100), "must be finite"),
        ((0.1, 1.0, 19), "19 steps are too few to see where the loss falls; at least 20"),
    ],
)
def test_a_range_that_is_none_is_refused_before_the_store_is_opened(given, says, tmp_path):
    with pytest.raises(ConfigError) as refused:
        find_learning_rate(small(linear_ce, tmp_path / "nowhere"), *given)
    assert says in str(refused.value)


# --- the picture


@pytest.mark.parametrize("name", ["plot", "plot.txt", "folder.png", "nowhere/plot.png"])
def test_a_place_for_no_picture_is_refused(name, tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ConfigError, match=r"plot|folder"):
        check_plot_path(tmp_path / name)
    check_plot_path(tmp_path / "plot.svg")


def test_the_plot_marks_the_suggestion_on_a_logarithmic_axis(tmp_path, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *given, **how: (figures.append(self), save(self, *given, **how))
    )
    rates = rising_rates(1e-4, 1.0, 30)
    losses = np.linspace(3, 2, 30)
    learning_rate_plot(LearningRates(rates, losses, float(rates[17])), tmp_path / "plot.png", "mlp")
    (axes,) = figures[0].axes
    first, later, dot = axes.lines
    assert axes.get_xscale() == "log"
    np.testing.assert_array_equal(first.get_xydata(), np.stack([rates, losses], 1)[:11])
    np.testing.assert_array_equal(later.get_xydata(), np.stack([rates, losses], 1)[10:])
    assert dot.get_xydata().tolist() == [[rates[17], losses[17]]]
    assert axes.get_title("left") == "mlp"
    assert matplotlib.image.imread(tmp_path / "plot.png").std() > 0
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


@pytest.mark.parametrize("losses", [[np.nan], [2.0, np.inf], [3.0, 2.0, 9.0]])
def test_a_curve_that_ended_at_once_is_drawn_without_a_dot(losses, tmp_path, recwarn):
    rates = rising_rates(1e-4, 1.0, 30)[: len(losses)]
    learning_rate_plot(LearningRates(rates, np.array(losses), None), tmp_path / "plot.png", "tabnet")
    assert list(itertools.islice(recwarn, 1)) == []
    assert (tmp_path / "plot.png").stat().st_size > 1000
