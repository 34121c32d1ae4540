"""Temperature scaling against float64 by the definition, on logits of which the true temperature is known."""

import numpy as np
import pytest

from hce_jax.evaluation.temperature import TEMPERATURES, TemperatureFit, tempered
from hce_jax.hierarchy import reachability_from_edges

# Two roots (0, 1), three types below each (2 to 7), three leaves below each of these (8 to 25).
EDGES = [(0, 2), (0, 3), (0, 4), (1, 5), (1, 6), (1, 7)] + [(2 + k // 3, 8 + k) for k in range(18)]
REACHABILITY = reachability_from_edges(26, EDGES)
PARENT = {child: parent for parent, child in EDGES}


def softmax(logits):
    power = np.exp(logits - logits.max(axis=1, keepdims=True))
    return power / power.sum(axis=1, keepdims=True)


def simulated(true_temperature, n_cells, seed):
    """Probabilities, and labels that softmax(ln p / T) gives: a leaf, or at random one of the two types above it."""
    rng = np.random.default_rng(seed)
    logits = np.full((n_cells, 26), -200.0)  # so improbable that float32 says 0
    logits[:, 8:] = 2.5 * rng.normal(size=(n_cells, 18))
    drawn = (softmax(logits / true_temperature).cumsum(axis=1) > rng.random((n_cells, 1))).argmax(axis=1)
    up = rng.choice(3, n_cells, p=[0.5, 0.3, 0.2])
    labels = np.array([[leaf, PARENT[leaf], PARENT[PARENT[leaf]]][k] for leaf, k in zip(drawn, up, strict=True)])
    return softmax(logits).astype(np.float32), labels


def loss_by_definition(probabilities, labels, temperature, reachability=REACHABILITY):
    """The mean of minus ln of the mass of the label's subtree, in float64, with 0 as the smallest normal float32."""
    share = softmax(np.log(np.maximum(probabilities.astype(float), 2.0**-126)) / temperature)
    return -np.log((share * reachability[labels]).sum(axis=1)).mean()


def fit_of(probabilities, labels, n_batches=3, reachability=REACHABILITY):
    fit = TemperatureFit(reachability)
    parts = zip(np.array_split(probabilities, n_batches), np.array_split(labels, n_batches), strict=True)
    for part in parts:
        fit.add(*part)
    return fit


@pytest.mark.parametrize("true", [0.3, 1.0, 2.4])
def test_the_true_temperature_is_found_within_the_error_of_sampling(true):
    probabilities, labels = simulated(true, 4000, seed=int(10 * true))
    found = fit_of(probabilities, labels).temperature()

    around = np.exp(np.log(found) + 0.02 * np.arange(-1, 2))
    low, middle, high = (len(labels) * loss_by_definition(probabilities, labels, t) for t in around)
    error = 0.02 / np.sqrt(low + high - 2 * middle)  # 1 / sqrt(information) of ln T
    assert 0.005 < error < 0.05  # or this test shows little
    assert abs(np.log(found / true)) < 3 * error

    grid = found * np.exp(np.linspace(-0.01, 0.01, 41))
    losses = [loss_by_definition(probabilities, labels, t) for t in grid]
    assert np.argmin(losses) in range(18, 23)  # within 0.1 % of the least
    coarse = np.geomspace(*TEMPERATURES, 60)
    assert min(loss_by_definition(probabilities, labels, t) for t in coarse) >= min(losses)


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 20.0])
def test_the_loss_is_that_of_the_definition(temperature):
    probabilities, labels = simulated(1.3, 300, seed=1)
    expected = loss_by_definition(probabilities, labels, temperature)
    assert fit_of(probabilities, labels).loss(temperature) == pytest.approx(expected, rel=1e-5)


def test_of_two_minima_the_lower_one_is_found():
    logits = np.full((2, 12), -20.0)
    logits[0, [0, 1, 2, 3, 11]] = -2.3, -0.5, -3.1, -3.3, -0.1
    logits[1, [0, 1, 2, 3, 5, 8, 9, 11]] = -4.4, -2.7, -0.2, -1.4, -0.4, -1.9, -2.2, -0.3
    reach = reachability_from_edges(12, [(0, k) for k in range(1, 5)])
    probabilities, labels = np.repeat(softmax(logits), [7, 93], axis=0).astype(np.float32), np.repeat([11, 0], [7, 93])
    losses = [loss_by_definition(probabilities, labels, t, reach) for t in np.geomspace(*TEMPERATURES, 400)]
    falls = np.diff(losses) < 0
    assert np.count_nonzero(~falls[1:] & falls[:-1]) == 1  # a minimum inside the range
    assert not falls[0]  # and another one at its end
    found = fit_of(probabilities, labels, reachability=reach).temperature()
    assert loss_by_definition(probabilities, labels, found, reach) == pytest.approx(min(losses), rel=1e-6)


def test_where_the_likelihood_grows_up_to_an_end_that_end_is_given():
    probabilities = np.full((50, 26), 0.001, np.float32)
    labels = 8 + np.arange(50) % 18
    probabilities[np.arange(50), labels] = 0.975
    assert fit_of(probabilities, labels).temperature() == TEMPERATURES[0]  # right, always
    assert fit_of(probabilities, 8 + (labels - 7) % 18).temperature() == TEMPERATURES[1]  # wrong, always


def test_cells_that_tell_nothing_change_nothing():
    probabilities, labels = simulated(2.0, 600, seed=3)
    reach = np.pad(REACHABILITY, [(0, 1), (0, 1)])
    reach[26] = 1  # a root above all
    probabilities = np.pad(probabilities, [(0, 0), (0, 1)])
    alone = fit_of(probabilities, labels, reachability=reach).temperature()
    others = np.full(500, 26), np.full((500, 27), 1 / 27, np.float32)
    told = fit_of(np.vstack([probabilities, others[1]]), np.append(labels, others[0]), 5, reach)
    assert told.temperature() == alone
    nothing = fit_of(others[1], others[0], reachability=reach)
    assert (nothing.temperature(), nothing.loss(2.0)) == (1, 0)
    assert fit_of(np.full((9, 26), 1 / 26, np.float32), np.arange(9)).temperature() == 1  # the same at any temperature


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 3.0, 20.0])
def test_tempered_shares_are_those_of_the_definition_and_keep_their_order(temperature):
    probabilities, _ = simulated(1.0, 200, seed=2)
    assert (probabilities == 0).any()
    found = tempered(probabilities, temperature)
    expected = softmax(np.log(np.maximum(probabilities.astype(float), 2.0**-126)) / temperature)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.argmax(axis=1), probabilities.argmax(axis=1))
    if temperature == 1:
        np.testing.assert_allclose(found, probabilities, atol=3e-7)


def test_no_probabilities_stay_none():
    assert not tempered(np.zeros((2, 5), np.float32), 3.0).any()
