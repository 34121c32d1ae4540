import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import f1_score, multilabel_confusion_matrix

from hce_jax.metrics import class_counts, classification_report_frames, f1_from_counts, types_present

GOLDEN_TOLERANCE = 1e-6


def random_cells(seed, n_cells=300, n_types=12):
    """Labels of types 0 to n - 3 and predictions of types 2 to n - 1: some types occur in one only."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, n_types - 2, n_cells)
    predictions = np.where((rng.random(n_cells) < 0.5) & (targets >= 2), targets, rng.integers(2, n_types, n_cells))
    return targets, predictions


@pytest.mark.golden("f1")
def test_golden_f1(golden):
    arrays, n_types = golden.arrays, golden.config["num_classes"]
    per_batch = [
        class_counts(arrays[f"targets_{i}"], arrays[f"preds_{i}"], n_types) for i in range(golden.config["n_batches"])
    ]
    for convert in (np.asarray, jnp.asarray):
        batches = [convert(counts) for counts in per_batch]
        total = sum(batches[1:], start=batches[0])
        for average, key in (("macro", "f1_macro"), ("micro", "f1_micro"), ("none", "f1_per_class")):
            np.testing.assert_allclose(f1_from_counts(total, average), arrays[key], atol=GOLDEN_TOLERANCE, rtol=0)
        for average in ("macro", "micro"):
            found = [f1_from_counts(counts, average) for counts in batches]
            np.testing.assert_allclose(found, arrays[f"f1_{average}_per_batch"], atol=GOLDEN_TOLERANCE, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_sklearn_s_confusion_matrices(seed):
    targets, predictions = random_cells(seed)
    matrices = multilabel_confusion_matrix(targets, predictions, labels=range(12))
    right, predicted, actual = np.asarray(class_counts(targets, predictions, 12))
    np.testing.assert_array_equal(right, matrices[:, 1, 1])
    np.testing.assert_array_equal(predicted, matrices[:, :, 1].sum(1))
    np.testing.assert_array_equal(actual, matrices[:, 1, :].sum(1))


def test_masked_rows_are_not_counted_whatever_they_hold():
    targets, predictions = random_cells(0)
    padding = np.array([0, 11, -1, 99])
    padded_targets, padded_predictions = np.append(targets, padding), np.append(predictions, [0, 11, -1, 98])
    mask = np.arange(padded_targets.size) < targets.size
    found = jax.jit(class_counts, static_argnums=2)(padded_targets, padded_predictions, 12, mask)
    np.testing.assert_array_equal(found, class_counts(targets, predictions, 12))


def test_counts_of_batches_add_up_to_those_of_all_cells():
    targets, predictions = random_cells(1)
    parts = [slice(0, 128), slice(128, 256), slice(256, 300)]
    total = sum(class_counts(targets[part], predictions[part], 12) for part in parts)
    np.testing.assert_array_equal(total, class_counts(targets, predictions, 12))


@pytest.mark.parametrize("seed", range(3))
def test_f1_is_sklearn_s_over_the_types_that_occur(seed):
    targets, predictions = random_cells(seed)
    counts = class_counts(targets, predictions, 15)  # types 12 to 14 occur nowhere
    per_type = f1_score(targets, predictions, labels=range(15), average=None, zero_division=0)
    for average, expected in (
        ("macro", f1_score(targets, predictions, average="macro", zero_division=0)),
        ("micro", np.mean(targets == predictions)),
        ("none", per_type),
    ):
        np.testing.assert_allclose(f1_from_counts(np.asarray(counts), average), expected, rtol=1e-15)
        jitted = jax.jit(f1_from_counts, static_argnums=1)
        np.testing.assert_allclose(jitted(counts, average), expected, rtol=1e-6)


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_f1_over_labelled_types_alone_is_sklearn_s_for_each_of_several_groups(average):
    cells = [random_cells(seed) for seed in range(3)]
    expected = [f1_score(*each, labels=np.unique(each[0]), average=average, zero_division=0) for each in cells]
    counts = np.stack([np.asarray(class_counts(*each, 15)) for each in cells], axis=1)
    found = f1_from_counts(counts, average, labelled_only=True)
    np.testing.assert_allclose(found, expected, rtol=1e-15)
    assert (found > f1_from_counts(counts, average)).all()
    on_device = jax.jit(f1_from_counts, static_argnames=("average", "labelled_only"))
    np.testing.assert_allclose(on_device(jnp.asarray(counts), average=average, labelled_only=True), expected, rtol=1e-6)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_f1_of_no_cells_is_zero(convert):
    counts = convert(np.zeros((3, 4), int))
    assert f1_from_counts(counts, "macro") == 0
    assert f1_from_counts(counts, "micro") == 0
    np.testing.assert_array_equal(f1_from_counts(counts, "none"), np.zeros(4))


def test_an_unknown_average_is_named():
    with pytest.raises(ValueError, match="average is 'weighted'"):
        f1_from_counts(np.zeros((3, 4), int), "weighted")


def test_report_agrees_with_counts():
    targets, predictions = random_cells(2)
    overall, per_type = classification_report_frames(targets, predictions)
    counts = np.asarray(class_counts(targets, predictions, 12))
    assert list(overall.index) == ["accuracy", "macro avg", "weighted avg"]
    assert list(per_type.index) == [str(code) for code in range(12)]
    np.testing.assert_allclose(per_type["f1-score"], f1_from_counts(counts, "none"), rtol=1e-12)
    np.testing.assert_allclose(overall["f1-score"]["macro avg"], f1_from_counts(counts), rtol=1e-12)
    np.testing.assert_allclose(overall.loc["accuracy"], np.mean(targets == predictions), rtol=1e-15)


def test_report_over_labelled_types_keeps_their_numbers_and_still_counts_the_errors():
    targets, predictions = random_cells(2)
    _, everything = classification_report_frames(targets, predictions)
    overall, per_type = classification_report_frames(targets, predictions, types_present(targets))
    assert list(overall.index) == ["micro avg", "macro avg", "weighted avg"]
    assert list(per_type.index) == [str(code) for code in range(10)]
    np.testing.assert_array_equal(per_type, everything.iloc[:10])
    assert overall["recall"]["micro avg"] == np.mean(targets == predictions)
    assert overall["precision"]["micro avg"] > overall["recall"]["micro avg"]
