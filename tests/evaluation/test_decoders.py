import numpy as np
import pytest

from hce_jax.errors import CheckpointError, ConfigError
from hce_jax.evaluation.decoders import DECODERS, UNASSIGNED, Decoders
from hce_jax.hierarchy import depths, ontology_distances, propagate, reachability_from_edges

# 0 -> 1, 0 -> 2, 1 -> 3 <- 2 (a type with two parents), and 4 alone.
FIVE_TYPES = reachability_from_edges(5, [(0, 1), (0, 2), (1, 3), (2, 3)])


def random_hierarchy(rng, n_types=30):
    codes = rng.permutation(n_types).tolist()
    edges = [(codes[i], codes[j]) for i in range(n_types) for j in range(i + 1, n_types) if rng.random() < 0.1]
    return reachability_from_edges(n_types, edges)


def decoded_by_hand(name, p, reach, confidence):
    """One cell in float64, type by type; the oracle of the random tests. The confidence is that of each type."""
    types = range(len(p))
    mass = [sum(p[j] for j in types if reach[i, j]) for i in types]
    if name == "argmax":
        code = max(types, key=lambda i: (p[i], -i))
    elif name == "backoff":
        held = [i for i in types if mass[i] >= confidence[i]]
        code = max(held, key=lambda i: (reach[:, i].sum(), mass[i], -i), default=-1)
    else:
        distance = ontology_distances(reach)
        code = min(types, key=lambda i: (sum(p[j] * distance[i, j] for j in types), i))
    return code, 0.0 if code == -1 else mass[code]


@pytest.mark.parametrize(
    ("probabilities", "confidence", "codes", "masses"),
    [
        # Masses 0.9, 0.5, 0.6, 0.3, 0.1; expected distances 1.3, 1.3, 1.1, 1.1, 2.7.
        pytest.param((0.1, 0.2, 0.3, 0.3, 0.1), 0.5, (2, 2, 2), (0.6, 0.6, 0.6), id="equals go to the lower code"),
        pytest.param((0.1, 0.2, 0.3, 0.3, 0.1), 0.3, (2, 3, 2), (0.6, 0.3, 0.6), id="less mass asked for: deeper"),
        pytest.param((0.1, 0.2, 0.3, 0.3, 0.1), 0.9, (2, 0, 2), (0.6, 0.9, 0.6), id="more mass asked for: higher"),
        pytest.param((0.1, 0.2, 0.3, 0.3, 0.1), 0.95, (2, -1, 2), (0.6, 0.0, 0.6), id="no subtree holds so much"),
        # Masses 0.5, 0.5, 0.05, 0.05, 0.5; expected distances 1.55 for 0, 1 and 4.
        pytest.param((0.0, 0.45, 0.0, 0.05, 0.5), 0.5, (4, 1, 0), (0.5, 0.5, 0.5), id="three decoders, three types"),
        # Masses 0.7, 0.35, 0.4, 0.05, 0.3; expected distances of 0 to 4: 1.35, 1.65, 1.55, 1.85, 2.25.
        pytest.param((0.0, 0.3, 0.35, 0.05, 0.3), 0.4, (2, 2, 0), (0.4, 0.4, 0.7), id="the parent of two"),
        # Masses of 1 and 2: 0.5 and 0.5.
        pytest.param((0.0, 0.375, 0.375, 0.125, 0.125), 0.5, (1, 1, 0), (0.5, 0.5, 0.875), id="equal depth and mass"),
    ],
)
def test_five_types_worked_by_hand(probabilities, confidence, codes, masses):
    decoded = Decoders(FIVE_TYPES, confidence).decode_all(np.array([probabilities], np.float32))
    assert list(decoded) == list(DECODERS)
    assert tuple(int(each.codes[0]) for each in decoded.values()) == codes
    np.testing.assert_allclose([each.confidence[0] for each in decoded.values()], masses, rtol=1e-6)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("seed", range(2))
def test_random_cells_are_decoded_as_one_would_by_hand(seed, name):
    rng = np.random.default_rng(seed)
    reach = random_hierarchy(rng)
    confidence = (0.35, 0.6)[seed]
    probabilities = rng.dirichlet(np.full(30, 0.1), size=150).astype(np.float32)
    codes, masses = zip(
        *(decoded_by_hand(name, p.astype(float), reach, [confidence] * 30) for p in probabilities), strict=True
    )
    decoded = Decoders(reach, confidence).decode(name, probabilities)
    assert decoded.codes.tolist() == list(codes)
    assert decoded.confidence.dtype == np.float32
    np.testing.assert_allclose(decoded.confidence, masses, atol=1e-6)


def test_each_depth_may_ask_for_another_mass_and_infinity_for_none_of_its_types():
    rng = np.random.default_rng(4)
    reach = random_hierarchy(rng)
    depth = depths(reach)
    threshold = rng.uniform(0.2, 0.9, depth.max() + 1)
    threshold[2] = np.inf
    probabilities = rng.dirichlet(np.full(30, 0.1), size=300).astype(np.float32)
    expected = [decoded_by_hand("backoff", p.astype(float), reach, threshold[depth])[0] for p in probabilities]
    codes = Decoders(reach, threshold).decode("backoff", probabilities).codes
    assert codes.tolist() == expected
    assert {*depth[codes[codes >= 0]]} > {0, 1}
    assert (depth[codes[codes >= 0]] != 2).all()
    nothing = Decoders(reach, np.full(depth.max() + 1, np.inf)).decode_all(probabilities)
    assert (nothing["backoff"].codes == UNASSIGNED).all()
    plain = Decoders(reach).decode_all(probabilities)  # the other decoders ask for nothing
    assert (nothing["argmax"].codes == plain["argmax"].codes).all()
    assert (nothing["min-distance"].codes == plain["min-distance"].codes).all()


@pytest.mark.parametrize(
    "threshold", [[0.5, 0.5], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5, 0.5], [0.5, 0, 0.5, 0.5], [0.5, np.nan, 0.5, 0.5]]
)
def test_thresholds_that_are_not_one_above_zero_for_each_depth_are_refused(threshold):
    assert depths(FIVE_TYPES).max() == 3
    with pytest.raises(ConfigError, match="the hierarchy has 4 depths and needs one above 0 for each"):
        Decoders(FIVE_TYPES, np.array(threshold))


def test_equal_expected_distances_are_equal_whatever_float32_makes_of_them():
    rng = np.random.default_rng(0)
    reach = random_hierarchy(rng)
    weights = rng.integers(0, 3, (1000, 30)) * (rng.random((1000, 30)) < 0.1)  # few values: many equal distances
    weights[:, 0] += weights.sum(axis=1) == 0
    exact = (weights @ ontology_distances(reach)).argmin(axis=1)
    probabilities = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    np.testing.assert_array_equal(Decoders(reach).decode("min-distance", probabilities).codes, exact)


def test_a_root_that_holds_everything_holds_it_after_rounding_too():
    rng = np.random.default_rng(0)
    reach = np.ones((31, 31), np.float32)  # type 30 above all others
    reach[:30] = np.pad(random_hierarchy(rng), [(0, 0), (0, 1)])
    logits = rng.normal(size=(500, 31)).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    share = probabilities / probabilities.sum(axis=1, keepdims=True)
    assert (propagate(share, reach)[:, 30] < 1).any()  # or this test shows nothing
    decoded = Decoders(reach, confidence=1.0).decode("backoff", probabilities)
    assert (decoded.codes == 30).all()
    assert decoded.confidence.max() <= 1


def test_probabilities_that_do_not_sum_to_one_are_scaled_and_rows_of_zeros_stay_zero():
    rng = np.random.default_rng(1)
    reach = random_hierarchy(rng)
    probabilities = rng.dirichlet(np.full(30, 0.3), size=100).astype(np.float32)
    scaled = probabilities * np.float32(2) ** rng.integers(-6, 4, (100, 1)).astype(np.float32)
    decoders = Decoders(reach, 0.4)
    for one, other in zip(
        decoders.decode_all(probabilities).values(), decoders.decode_all(scaled).values(), strict=True
    ):
        np.testing.assert_array_equal(one.codes, other.codes)
        np.testing.assert_allclose(one.confidence, other.confidence, rtol=1e-5)

    nothing = decoders.decode_all(np.zeros((2, 30), np.float32))
    assert [each.codes.tolist() for each in nothing.values()] == [[0, 0], [-1, -1], [0, 0]]
    assert not any(each.confidence.any() for each in nothing.values())


def test_the_largest_probability_is_found_before_the_division_that_can_make_two_equal():
    first = np.float32(0.9183673)
    probabilities = np.array([[first, np.nextafter(first, np.float32(1)), 0.6]], np.float32)
    share = probabilities / probabilities.sum(axis=1, keepdims=True)
    assert share[0, 0] == share[0, 1]  # or this test shows nothing
    assert Decoders(np.eye(3)).decode("argmax", probabilities).codes.tolist() == [1]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_a_temperature_changes_the_confidence_of_argmax_and_nothing_else(temperature):
    rng = np.random.default_rng(5)
    reach = random_hierarchy(rng)
    probabilities = rng.dirichlet(np.full(30, 0.2), size=200).astype(np.float32) * np.float32(
        0.7
    )  # they need no sum of 1
    probabilities[:2] = 0
    decoders = Decoders(reach, 0.6, temperature)
    decoded, plain = decoders.decode_all(probabilities), Decoders(reach, 0.6).decode_all(probabilities)
    assert list(decoded) == [*DECODERS, "temperature"]
    for name, each in plain.items():
        np.testing.assert_array_equal(decoded[name].codes, each.codes)
        np.testing.assert_array_equal(decoded[name].confidence, each.confidence)
    codes, confidence = decoders.decode("temperature", probabilities)
    np.testing.assert_array_equal(codes, plain["argmax"].codes)
    power = probabilities.astype(float) ** (1 / temperature)
    expected = (power * reach[codes]).sum(axis=1)[2:] / power.sum(axis=1)[2:]
    assert confidence.dtype == np.float32
    np.testing.assert_allclose(confidence[2:], expected, atol=2e-6)
    assert not confidence[:2].any()  # without probabilities there is no confidence at any temperature


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_that_is_not_above_zero_is_refused(temperature):
    with pytest.raises(ConfigError, match=r"the temperature is .*; it lies above 0"):
        Decoders(FIVE_TYPES, temperature=temperature)


def test_one_decoder_gives_what_all_give():
    rng = np.random.default_rng(2)
    decoders = Decoders(random_hierarchy(rng))
    probabilities = rng.dirichlet(np.full(30, 0.2), size=50).astype(np.float32)
    for name, decoded in decoders.decode_all(probabilities).items():
        for one, other in zip(decoders.decode(name, probabilities), decoded, strict=True):
            np.testing.assert_array_equal(one, other)


def test_backing_off_never_goes_below_a_type_that_holds_less():
    rng = np.random.default_rng(3)
    reach = random_hierarchy(rng)
    probabilities = rng.dirichlet(np.full(30, 0.2), size=200).astype(np.float32)
    before = np.full(200, 30)
    for confidence in (0.2, 0.5, 0.8, 1.0):
        codes = Decoders(reach, confidence).decode("backoff", probabilities).codes
        depth = np.where(codes < 0, -1, depths(reach)[codes])
        assert (depth <= before).all()
        before = depth


@pytest.mark.parametrize("confidence", [0.0, -0.5, 1.5, float("nan")])
def test_a_confidence_outside_zero_to_one_is_refused(confidence):
    with pytest.raises(ConfigError, match="--confidence="):
        Decoders(FIVE_TYPES, confidence)


def test_an_unknown_decoder_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ConfigError, match=r"--decoder=best: .* argmax, backoff, min-distance"):
        Decoders(FIVE_TYPES).decode("best", np.full((1, 5), 0.2, np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_probabilities_that_are_not_numbers_are_refused(value):
    probabilities = np.full((3, 5), 0.2, np.float32)
    probabilities[1, 2] = value
    with pytest.raises(CheckpointError, match="1 of 3 cells"):
        Decoders(FIVE_TYPES).decode("argmax", probabilities)
