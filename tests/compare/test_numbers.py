"""Oracles: scikit-learn on cells that are made again from the counts, and values worked by hand."""

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
import pytest
from comparisons import make_comparison, reachability
from sklearn.metrics import classification_report, f1_score

from hce_jax.compare.numbers import (
    MACRO_LABELLED,
    Tables,
    averages,
    by_class,
    by_seed,
    calibration,
    decoders,
    holm,
    overall,
    per_type,
    reliability,
    tables,
)
from hce_jax.evaluation.hierarchical import decoder_scores, resampled_counts

# Of comparisons.EDGES with ten types, by hand.
DEPTHS = [0, 1, 1, 2, 2, 3, 4, 4, 0, 0]
LEAVES, CONNECTED = {3, 4, 6, 7, 8, 9}, set(range(8))
#: Types that occur among the labels (comparisons.random_cells).
LABELLED = {"id": range(9), "ood": range(1, 9)}
GROUP = ["model", "loss", "split"]


@pytest.fixture(scope="module")
def comparison():
    return make_comparison()


@pytest.fixture(scope="module")
def every(comparison):
    return tables(comparison)


def cells_of(run, split, decoder="argmax"):
    """Label, corrected prediction (-1: none) of each cell, from the counts."""
    confusion = run.counts[split].decoders[decoder].confusion
    n_types = len(confusion)
    reach = reachability(n_types)
    pairs = [
        (label, label if column < n_types and reach[label, column] else (column if column < n_types else -1))
        for label, column in itertools.product(range(n_types), range(n_types + 1))
        for _ in range(confusion[label, column])
    ]
    return np.array(pairs).T


def report_of(run, split):
    """What the published evaluation prints: of new studies only over the types that are labelled."""
    labels, predictions = cells_of(run, split)
    only = np.unique(labels) if split == "ood" else None
    return classification_report(labels, predictions, labels=only, output_dict=True, zero_division=0)


def f1_of(counts):
    """F1 of each type from right, predicted and labelled cells, in plain numbers."""
    return [2 * r / (p + a) if p + a else 0.0 for r, p, a in zip(*counts.tolist(), strict=True)]


def adjusted(p):
    """Adjust p values after Holm, by his words: go through them in order until one is above alpha / those left."""
    p = list(p)

    def is_rejected(place, alpha):
        for left, other in zip(range(len(p), 0, -1), sorted(range(len(p)), key=p.__getitem__), strict=True):
            if p[other] > alpha / left:
                return False
            if other == place:
                return True

    # The adjusted value is the least alpha at which it is rejected: one of these, as that is where anything changes.
    levels = sorted({min(1.0, left * value) for left in range(1, len(p) + 1) for value in p} | {1.0})
    return [next((each for each in levels if is_rejected(place, each * (1 + 1e-12))), 1.0) for place in range(len(p))]


def with_changes(comparison, change):
    """Have ``change(run, counts)`` make other counts of each evaluation."""
    runs = tuple(
        dataclasses.replace(run, counts={split: change(run, counts) for split, counts in run.counts.items()})
        for run in comparison.runs
    )
    return dataclasses.replace(comparison, runs=runs)


def with_by_study(counts, by_study):
    argmax = counts.decoders["argmax"]._replace(by_study=by_study)
    studies = tuple(f"study {number}" for number in range(len(by_study)))
    return dataclasses.replace(counts, studies=studies, decoders={**counts.decoders, "argmax": argmax})


# --- averages


def test_f1_of_each_run_is_to_the_last_digit_what_scikit_learn_reports(comparison, every):
    found = every.by_seed.set_index(["model", "loss", "seed", "split", "average"])["f1"]
    assert len(found) == 2 * 2 * 4 * (4 + 3)  # models, losses, seeds; averages of id and ood
    for run, split in itertools.product(comparison.runs, comparison.splits):
        report, place = report_of(run, split), (run.model, run.loss, run.seed, split)
        micro = report["accuracy"] if "accuracy" in report else report["micro avg"]["f1-score"]
        assert found[(*place, "macro")] == report["macro avg"]["f1-score"]
        assert found[(*place, "weighted")] == report["weighted avg"]["f1-score"]
        assert found[(*place, "micro")] == micro
        if split == "id":
            labels, predictions = cells_of(run, split)
            of_labelled = f1_score(labels, predictions, labels=np.unique(labels), average="macro", zero_division=0)
            assert found[(*place, MACRO_LABELLED)] == pytest.approx(of_labelled, rel=1e-12)
            assert of_labelled > report["macro avg"]["f1-score"]  # one type is only predicted


def test_a_type_that_is_only_predicted_counts_in_the_id_split_alone(comparison):
    run = comparison.runs[0]
    for split, n_types in (("id", 10), ("ood", 8)):
        labels, predictions = cells_of(run, split)
        f1_s = f1_score(labels, predictions, labels=np.unique(labels), average=None)
        expected = f1_s.sum() / n_types
        one = dataclasses.replace(comparison, runs=(run,), splits=(split,))
        macro = by_seed(one).set_index("average")["f1"]["macro"]
        assert macro == pytest.approx(expected, rel=1e-12)


def test_averages_of_several_groups_at_a_time():
    counts = np.array([[[1, 0, 0], [0, 2, 0]], [[2, 0, 0], [0, 3, 1]], [[1, 1, 0], [0, 4, 0]]])
    found = averages(counts, labelled_only=False)
    assert found["macro"].tolist() == pytest.approx([(2 / 3 + 0) / 2, (4 / 7 + 0) / 2])
    assert found["micro"].tolist() == pytest.approx([2 / 4, 4 / 8])
    assert found["weighted"].tolist() == pytest.approx([1 / 3, 4 / 7])
    assert found[MACRO_LABELLED].tolist() == pytest.approx([1 / 3, 4 / 7])
    labelled = averages(counts, labelled_only=True)
    assert MACRO_LABELLED not in labelled
    assert labelled["macro"].tolist() == pytest.approx([1 / 3, 4 / 7])
    assert labelled["micro"].tolist() == pytest.approx([2 / 4, 4 / 7])


def test_the_overall_table_is_of_the_seeds(comparison, every):
    found = every.overall.set_index([*GROUP, "average"])
    assert list(found.columns) == ["mean", "sd", "n_seeds", "difference", "low", "high"]
    assert len(found) == 2 * 2 * (4 + 3)
    for model, split in itertools.product(comparison.models, comparison.splits):
        f1 = {
            loss: [report_of(run, split)["macro avg"]["f1-score"] for run in comparison.of(model, loss)]
            for loss in comparison.losses
        }
        for loss, values in f1.items():
            mean = sum(values) / 4
            row = found.loc[model, loss, split, "macro"]
            assert row["mean"] == pytest.approx(mean, rel=1e-12)
            assert row["sd"] == pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in values) / 3), rel=1e-9)
            assert row["n_seeds"] == 4
        baseline, other = (found.loc[model, loss, split, "macro"] for loss in ("CE", "HCE"))
        assert baseline[["difference", "low", "high"]].isna().all()
        gain = sum(b - a for a, b in zip(f1["CE"], f1["HCE"], strict=True)) / 4
        assert other["difference"] == pytest.approx(gain, rel=1e-9)
        assert other["low"] < gain < other["high"]


def test_the_interval_is_that_of_resampled_studies_which_all_runs_share(comparison):
    """Of two studies there are three resamples: both, or twice the one or the other, one time in four each."""

    def two_studies(run, counts):
        by_study = counts.decoders["argmax"].by_study
        return with_by_study(counts, np.stack([by_study[:2].sum(axis=0), by_study[2:].sum(axis=0)]))

    small = with_changes(comparison, two_studies)
    found = overall(small).set_index([*GROUP, "average"])
    for model, split in itertools.product(small.models, small.splits):
        differences = []
        for first, second in ((0, 0), (0, 1), (1, 1)):
            macro = {"CE": [], "HCE": []}
            for run in (*small.of(model, "CE"), *small.of(model, "HCE")):
                by_study = run.counts[split].decoders["argmax"].by_study
                counts = by_study[first] + by_study[second]
                over = [n for n in range(10) if counts[2, n] or (split == "id" and counts[1, n])]
                macro[run.loss].append(sum(f1_of(counts)[n] for n in over) / len(over))
            differences.append(np.mean(macro["HCE"]) - np.mean(macro["CE"]))
        row = found.loc[model, "HCE", split, "macro"]
        assert row["low"] == pytest.approx(min(differences), abs=1e-12)
        assert row["high"] == pytest.approx(max(differences), abs=1e-12)


def test_the_interval_leaves_out_the_25_least_and_the_25_most_of_1000_resamples(comparison):
    micro = {}
    for loss in comparison.losses:
        of_runs = []
        for run in comparison.of("mlp", loss):
            by_study = run.counts["id"].decoders["argmax"].by_study
            counts = np.concatenate([*resampled_counts(by_study)], axis=1).sum(axis=-1)
            of_runs.append(counts[0] / counts[2])  # every cell has a prediction: the share of right ones
        micro[loss] = np.mean(of_runs, axis=0)
    ordered = sorted(micro["HCE"] - micro["CE"])
    assert len(ordered) == 1000
    row = overall(comparison).set_index([*GROUP, "average"]).loc["mlp", "HCE", "id", "micro"]
    assert ordered[24] <= row["low"] <= ordered[25] < ordered[49]
    assert ordered[950] < ordered[974] <= row["high"] <= ordered[975]


def test_losses_that_predict_alike_differ_by_nothing_in_every_resample(comparison):
    first = {run.seed: run.counts for run in comparison.of("linear", "CE")}
    alike = with_changes(comparison, lambda run, counts: first[run.seed][counts.split])
    gains = overall(alike).query("loss == 'HCE'")[["difference", "low", "high"]]
    assert (gains == 0).all(axis=None)
    types = per_type(alike)
    assert (types["difference"] == 0).all()
    assert types[["t", "p", "p_holm"]].isna().all(axis=None)  # and nothing for a test to compare them with


def test_one_study_has_a_difference_and_no_interval(comparison):
    one = with_changes(
        comparison,
        lambda run, counts: with_by_study(counts, counts.decoders["argmax"].by_study.sum(axis=0, keepdims=True)),
    )
    rows = overall(one).query("loss == 'HCE'")
    assert rows["difference"].notna().all()
    assert rows[["low", "high"]].isna().all(axis=None)


def test_one_seed_has_no_spread_and_no_test():
    single = tables(make_comparison(models=("linear",), seeds=(3,)))
    assert single.overall["sd"].isna().all()
    assert single.overall.query("loss == 'HCE'")["low"].notna().all()
    assert single.per_type[["f1_sd", "f1_baseline_sd", "t", "p", "p_holm"]].isna().all(axis=None)
    assert single.per_type["difference"].notna().all()


# --- types


def test_the_table_of_types_says_what_each_is(comparison, every):
    for _, rows in every.per_type.groupby(GROUP):
        split = rows["split"].iloc[0]
        codes = list(LABELLED[split])
        assert rows["code"].tolist() == codes
        assert rows["label"].tolist() == [f"type {code}" for code in codes]
        assert rows["cl_id"].tolist() == [f"CL:{code:07d}" if code else None for code in codes]
        assert rows["depth"].tolist() == [DEPTHS[code] for code in codes]
        assert rows["is_leaf"].tolist() == [code in LEAVES for code in codes]
        assert rows["is_connected"].tolist() == [code in CONNECTED for code in codes]
        assert rows["n_train"].tolist() == [100 * (code + 1) ** 2 for code in codes]
        labels, _ = cells_of(comparison.runs[0], split)
        assert rows["n_cells"].tolist() == [(labels == code).sum() for code in codes]
        of_study = comparison.runs[0].counts[split].decoders["argmax"].by_study[:, 2]
        assert rows["n_studies"].tolist() == [sum(cells[code] > 0 for cells in of_study) for code in codes]
    assert set(every.per_type["loss"]) == {"HCE"}
    assert len(every.per_type) == 2 * (9 + 8)


def test_types_without_all_studies_say_of_how_many_they_are(comparison):
    def first_study_alone(run, counts):
        by_study = counts.decoders["argmax"].by_study.copy()
        by_study[0, :, 4] += by_study[1:, :, 4].sum(axis=0)
        by_study[1:, :, 4] = 0
        return with_by_study(counts, by_study)

    rows = per_type(with_changes(comparison, first_study_alone))
    assert set(rows.loc[rows["code"] == 4, "n_studies"]) == {1}


def test_training_cells_that_are_not_known_are_left_open():
    assert per_type(make_comparison(models=("linear",), n_train=False))["n_train"].isna().all()


def f1_by_type(comparison, model, loss, split):
    """F1 of each type that is labelled, (seeds, types), by scikit-learn."""
    codes = list(LABELLED[split])
    runs = comparison.of(model, loss)
    return np.array([f1_score(*cells_of(run, split), labels=codes, average=None, zero_division=0) for run in runs])


def test_f1_of_types_and_their_test_over_seeds(comparison, every):
    for (model, loss, split), rows in every.per_type.groupby(GROUP):
        theirs, ours = (f1_by_type(comparison, model, name, split) for name in ("CE", loss))
        np.testing.assert_allclose(rows["f1"], ours.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(rows["f1_baseline"], theirs.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(rows["f1_sd"], ours.std(axis=0, ddof=1), rtol=1e-9)
        np.testing.assert_allclose(rows["f1_baseline_sd"], theirs.std(axis=0, ddof=1), rtol=1e-9)
        difference = ours - theirs
        np.testing.assert_allclose(rows["difference"], difference.mean(axis=0), rtol=1e-9)
        t = difference.mean(axis=0) / (difference.std(axis=0, ddof=1) / np.sqrt(4))
        np.testing.assert_allclose(rows["t"], t, rtol=1e-7)
        # Student's distribution with 3 degrees of freedom has a closed form.
        a = np.abs(t) / np.sqrt(3)
        np.testing.assert_allclose(rows["p"], 1 - 2 / np.pi * (np.arctan(a) + a / (1 + a**2)), rtol=1e-6)
        np.testing.assert_allclose(rows["p_holm"], adjusted(rows["p"]), rtol=1e-9)


def test_a_type_whose_difference_is_the_same_with_every_seed_has_no_test_and_counts_for_no_other(comparison):
    def constant(run, counts):
        by_study = counts.decoders["argmax"].by_study.copy()
        by_study[:, 0, 3] = 0  # never right: F1 0 with every seed and loss
        return with_by_study(counts, by_study)

    rows = per_type(with_changes(comparison, constant)).query("model == 'linear' and split == 'id'").set_index("code")
    assert rows.loc[3, ["t", "p", "p_holm"]].isna().all()
    others = rows.drop(index=3)
    np.testing.assert_allclose(others["p_holm"], adjusted(others["p"]), rtol=1e-9)
    assert others["p"].min() * 8 == pytest.approx(others["p_holm"].min())


def test_holm_worked_by_hand():
    # Holm 1979: in ascending order times 4, 3, 2, 1, never below the one before, never above 1.
    assert holm(np.array([0.04, 0.01, np.nan, 0.03, 0.005])).tolist() == pytest.approx(
        [0.06, 0.03, np.nan, 0.06, 0.02], nan_ok=True
    )
    assert holm(np.array([0.9, 0.6])).tolist() == [1.0, 1.0]
    assert holm(np.full(2, np.nan)).tolist() == pytest.approx([np.nan, np.nan], nan_ok=True)


def test_classes_of_types_are_means_over_their_types_for_each_seed(comparison, every):
    for model, split in itertools.product(comparison.models, comparison.splits):
        codes = list(LABELLED[split])
        theirs, ours = (f1_by_type(comparison, model, name, split) for name in ("CE", "HCE"))
        expected = []
        for grouping, value, members in (
            *(("depth", str(depth), {n for n in codes if DEPTHS[n] == depth}) for depth in range(5)),
            ("leaf", "leaf", LEAVES),
            ("leaf", "internal", {0, 1, 2, 5}),
            ("connected", "connected", CONNECTED),
            ("connected", "isolated", {8, 9}),
        ):
            places = [codes.index(code) for code in members & {*codes}]
            for seed, mean in zip((1, 2, 3, 4), (ours - theirs)[:, places].mean(axis=1), strict=True):
                expected.append((model, "HCE", split, grouping, value, len(places), seed, mean))
        rows = every.by_class.query("model == @model and split == @split").reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, pd.DataFrame(expected, columns=rows.columns))


def test_a_class_without_labelled_types_has_no_rows():
    # Of three types none is isolated, and the root is not labelled in new studies: nor any type of depth 0.
    found = by_class(make_comparison(models=("linear",), n_types=3)).query("split == 'ood'")
    assert set(zip(found["grouping"], found["value"], strict=True)) == {
        ("depth", "1"),
        ("leaf", "leaf"),
        ("connected", "connected"),
    }


# --- decoders and calibration


def test_decoders_are_means_of_their_scores_over_seeds(comparison, every):
    found = every.decoders.set_index([*GROUP, "decoder"])
    assert len(found) == 2 * 2 * 2 * 4
    reach = reachability(10)
    for (model, loss, split, decoder), row in found.iterrows():
        scores = []
        for run in comparison.of(model, loss):
            labels, predictions = cells_of(run, split, decoder)
            counts = run.counts[split].decoders[decoder]
            groups = counts.by_study.sum(axis=0, keepdims=True)
            all_scores = decoder_scores(counts.confusion, groups, counts.calibration, reach, split == "ood")
            over = np.unique(labels) if split == "ood" else np.unique([*labels, *predictions[predictions >= 0]])
            macro = f1_score(labels, predictions, labels=over, average="macro", zero_division=0)
            scores.append({**all_scores, "f1_macro": macro, "accuracy": (labels == predictions).mean(),
                           "unassigned": (predictions < 0).mean()})  # fmt: skip
        names = [name for name in scores[0] if name not in ("f1_macro_low", "f1_macro_high")]
        assert list(found.columns) == [*names, "confidence", "max_error"]
        for name in names:
            assert row[name] == pytest.approx(sum(each[name] for each in scores) / 4, rel=1e-9), name
        assert row["confidence"] == pytest.approx(0.5 if decoder == "backoff" else np.nan, nan_ok=True)
        assert np.isnan(row["max_error"])


def test_a_score_that_a_seed_does_not_have_has_no_mean(comparison):
    def nothing_assigned(run, counts):
        if run.seed != 2:
            return counts
        backoff = counts.decoders["backoff"]
        confusion = np.zeros_like(backoff.confusion)
        confusion[:, -1] = backoff.confusion.sum(axis=1)
        by_study = backoff.by_study * np.array([0, 0, 1])[:, None]
        changed = type(backoff)(confusion, by_study, np.zeros_like(backoff.calibration))
        return dataclasses.replace(counts, decoders={**counts.decoders, "backoff": changed})

    found = decoders(with_changes(comparison, nothing_assigned)).set_index("decoder")
    assert found.loc["backoff", "ece"].isna().all()
    assert found.loc["backoff", "unassigned"].notna().all()
    assert found.loc["argmax", "ece"].notna().all()


def test_an_error_that_back_off_promises_stands_in_its_row(comparison):
    promised = with_changes(comparison, lambda run, counts: dataclasses.replace(counts, backoff={"max_error": 0.05}))
    found = decoders(promised).set_index("decoder")
    assert set(found.loc["backoff", "max_error"]) == {0.05}
    assert found["confidence"].isna().all()
    assert found.drop(index="backoff")["max_error"].isna().all()


def bins_of(calibration):
    """Cells, confidence and accuracy of each of the 15 bins, in plain numbers."""
    for number in range(15):
        cells, confidence, right = calibration[100 * number : 100 * number + 100].sum(axis=0)
        yield (cells, confidence / cells, right / cells) if cells else (0, np.nan, np.nan)


def ece_of(calibration):
    """The mean distance of confidence and accuracy, of bins weighted by their cells."""
    return sum(n * abs(a - c) for n, c, a in bins_of(calibration) if n) / calibration[:, 0].sum()


def test_calibration_before_and_after_scaling(comparison):
    hotter = with_changes(
        comparison, lambda run, counts: dataclasses.replace(counts, temperature=1.0 + run.seed * (run.loss == "HCE"))
    )
    found = calibration(hotter)
    assert list(found.columns) == [*GROUP, "temperature", "ece_before", "ece_after"]
    assert len(found) == 2 * 2 * 2
    for (model, loss, split), row in found.set_index(GROUP).iterrows():
        assert row["temperature"] == (3.5 if loss == "HCE" else 1.0)
        for column, decoder in (("ece_before", "argmax"), ("ece_after", "temperature")):
            each = [ece_of(run.counts[split].decoders[decoder].calibration) for run in hotter.of(model, loss)]
            assert row[column] == pytest.approx(sum(each) / 4, rel=1e-12)
    assert (found["ece_before"] != found["ece_after"]).all()


def test_reliability_is_of_the_cells_of_all_seeds(comparison, every):
    found = every.reliability
    assert list(found.columns) == [
        *(*GROUP, "scaled"),
        *("confidence_from", "confidence_to", "cells", "confidence", "accuracy"),
    ]
    assert len(found) == 2 * 2 * 2 * 2 * 15
    for (model, loss, split, scaled), rows in found.groupby([*GROUP, "scaled"]):
        decoder = "temperature" if scaled else "argmax"
        pooled = sum(run.counts[split].decoders[decoder].calibration for run in comparison.of(model, loss))
        np.testing.assert_allclose(rows[["cells", "confidence", "accuracy"]], list(bins_of(pooled)), rtol=1e-12)
        np.testing.assert_allclose(rows["confidence_from"], np.arange(15) / 15, rtol=1e-12)
        np.testing.assert_allclose(rows["confidence_to"], np.arange(1, 16) / 15, rtol=1e-12)
        assert rows["cells"].sum() == 4 * 400


def test_without_temperatures_of_all_seeds_there_is_nothing_after_scaling(comparison):
    def without(run, counts):
        if (run.model, run.loss, run.seed) != ("mlp", "CE", 3):
            return counts
        kept = {name: each for name, each in counts.decoders.items() if name != "temperature"}
        return dataclasses.replace(counts, decoders=kept, temperature=None)

    partly = with_changes(comparison, without)
    spoilt = "model == 'mlp' and loss == 'CE'"
    table = calibration(partly)
    assert table.query(spoilt)[["temperature", "ece_after"]].isna().all(axis=None)
    assert table["ece_before"].notna().all()
    assert table.query(f"not ({spoilt})").notna().all(axis=None)
    assert set(reliability(partly).query(spoilt)["scaled"]) == {False}
    assert set(decoders(partly).query(spoilt)["decoder"]) == {"argmax", "backoff", "min-distance"}
    assert "temperature" in set(decoders(partly).query(f"not ({spoilt})")["decoder"])


def test_tables_holds_what_the_functions_of_their_names_give(comparison, every):
    assert Tables._fields == (
        "overall", "by_seed", "per_type", "by_class", "decoders", "calibration", "reliability",
    )  # fmt: skip
    for table, make in zip(
        every, (overall, by_seed, per_type, by_class, decoders, calibration, reliability), strict=True
    ):
        pd.testing.assert_frame_equal(table, make(comparison))


def test_several_losses_are_each_compared_with_the_first():
    three = make_comparison(models=("linear",), losses=("HCE", "CE", "HCE exact"), seeds=(1, 2))
    found = overall(three).query("split == 'ood' and average == 'macro'").set_index("loss")
    assert found.index.tolist() == ["HCE", "CE", "HCE exact"]
    assert found["difference"].tolist() == pytest.approx(
        [np.nan, *(found.loc[loss, "mean"] - found.loc["HCE", "mean"] for loss in ("CE", "HCE exact"))], nan_ok=True
    )
    assert list(per_type(three)["loss"].unique()) == ["CE", "HCE exact"]
    both = per_type(three).query("split == 'ood'").set_index(["loss", "code"])["f1_baseline"]
    assert both["CE"].tolist() == both["HCE exact"].tolist()
