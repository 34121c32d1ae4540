import numpy as np

from hce_jax.evaluation.tally import CONFIDENCE_BINS, GROUP_COLUMNS, Tally
from hce_jax.hierarchy import reachability_from_edges

#: 0 above 1 and 2, 3 below both 1 and 2; 4 by itself.
REACHABILITY = reachability_from_edges(5, [(0, 1), (0, 2), (1, 3), (2, 3)])
N_GROUPS = {column: 2 + place for place, column in enumerate(GROUP_COLUMNS)}


def some_cells(n_cells, seed=0):
    rng = np.random.default_rng(seed)
    labels, predictions = rng.integers(0, 5, n_cells), rng.integers(-1, 5, n_cells)
    confidence = np.where(predictions < 0, 0, rng.random(n_cells)).astype(np.float32)
    confidence[:3] = 1.0, 0.0, 0.5
    return labels, predictions, confidence, {name: rng.integers(0, n, n_cells) for name, n in N_GROUPS.items()}


def tally_of(*batches):
    tally = Tally(REACHABILITY, N_GROUPS)
    for batch in batches:
        tally.add(*batch)
    return tally


def part(cells, start, stop):
    *arrays, groups = cells
    return *(each[start:stop] for each in arrays), {name: each[start:stop] for name, each in groups.items()}


def test_counts_are_those_of_one_cell_after_the_other():
    cells = some_cells(400)
    tally = tally_of(cells)
    confusion, bins = np.zeros((5, 6)), np.zeros((CONFIDENCE_BINS, 3))
    groups = {name: np.zeros((n, 3, 5)) for name, n in N_GROUPS.items()}
    for cell, (label, prediction, confidence) in enumerate(zip(*cells[:3], strict=True)):
        confusion[label, prediction if prediction >= 0 else 5] += 1
        right = prediction >= 0 and REACHABILITY[label, prediction] == 1
        corrected = label if right else prediction
        for name, counts in groups.items():
            of_group = counts[cells[3][name][cell]]
            of_group[2, label] += 1
            if corrected >= 0:
                of_group[1, corrected] += 1
            of_group[0, label] += right
        if prediction >= 0:
            bins[min(int(float(confidence) * CONFIDENCE_BINS), CONFIDENCE_BINS - 1)] += 1, confidence, right
    np.testing.assert_array_equal(tally.confusion, confusion)
    for name, counts in groups.items():
        np.testing.assert_array_equal(tally.groups[name], counts)
        np.testing.assert_array_equal(tally.counts, counts.sum(axis=0))
    np.testing.assert_array_equal(tally.calibration[:, [0, 2]], bins[:, [0, 2]])
    np.testing.assert_allclose(tally.calibration[:, 1], bins[:, 1])
    assert tally.n_cells == 400


def test_batches_add_up_to_exactly_the_whole():
    cells = some_cells(300)
    whole, parts = tally_of(cells), tally_of(part(cells, 0, 1), part(cells, 1, 250), part(cells, 250, 300))
    np.testing.assert_array_equal(parts.confusion, whole.confusion)
    for name in GROUP_COLUMNS:
        np.testing.assert_array_equal(parts.groups[name], whole.groups[name])
    np.testing.assert_allclose(parts.calibration, whole.calibration, rtol=1e-12)


def test_corrected_confusion_moves_what_lies_below_the_label_and_nothing_else():
    tally = Tally(REACHABILITY, N_GROUPS)
    tally.confusion[:] = np.arange(30).reshape(5, 6)
    # By hand: label 0 accepts 1, 2, 3; labels 1 and 2 accept 3.
    expected = [
        [0 + 1 + 2 + 3, 0, 0, 0, 4, 5],
        [6, 7 + 9, 8, 0, 10, 11],
        [12, 13, 14 + 15, 0, 16, 17],
        [18, 19, 20, 21, 22, 23],
        [24, 25, 26, 27, 28, 29],
    ]
    assert tally.corrected.tolist() == expected
    assert tally.confusion[0, 1] == 1  # and is left as it is
