import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from hce_jax.errors import StoreError, UserError
from hce_jax.evaluation.hierarchical import bootstrap_f1_macro
from hce_jax.evaluation.reports import (
    PUBLISHED_SUBSET,
    RULES,
    decoder_table,
    make_reports,
    overall_table,
    published_subset,
    read_subset,
    write_reports,
)
from hce_jax.evaluation.tally import GROUP_COLUMNS, Tally
from hce_jax.hierarchy.reachability import correct_predictions
from hce_jax.metrics import classification_report_frames, types_present

# Type 1 is a kind of type 0. Type 3 is only predicted, type 4 occurs nowhere.
REACHABILITY = np.eye(5, dtype=np.int64)
REACHABILITY[0, 1] = 1
TARGETS = np.array([0, 0, 1, 2, 2, 2])
PREDICTIONS = np.array([0, 1, 0, 2, 3, 3])
LOOKUPS = {column: [f"{column} {code}" for code in range(3)] for column in GROUP_COLUMNS}


def counted(targets, predictions, reachability=REACHABILITY, groups=None):
    """What is counted of these cells, all of confidence 0.5 and of the first group of each column."""
    tally = Tally(reachability, {column: len(LOOKUPS[column]) for column in GROUP_COLUMNS})
    groups = np.zeros(len(targets), int) if groups is None else groups
    tally.add(targets, predictions, np.full(len(targets), 0.5), dict.fromkeys(GROUP_COLUMNS, groups))
    return tally


def reports_of(tally, split="id", subset=None):
    return make_reports({"argmax": tally}, "argmax", RULES[split], LOOKUPS, subset, backoff={"confidence": 0.5})


@pytest.mark.golden("eval_report")
def test_golden_report_tables(golden, tmp_path):
    tables = golden.beside("eval_report_csv")
    assert tables
    for file in tables:
        # A table lies in the folder of its case, whose arrays carry the case's name in front.
        case = file.path.parent.relative_to(golden.path.parent).as_posix()
        a = {key.removeprefix(f"{case}/"): value for key, value in golden.arrays.items()}
        corrected = correct_predictions(a["y_true"], a["y_pred"], a["child_matrix"])
        np.testing.assert_array_equal(corrected, a["y_pred_corrected"])
        labels = types_present(a["y_true"]) if case.startswith("ood") else None
        labels = a["subset_labels"] if file.path.stem == "subset_metrics" else labels
        overall, per_type = classification_report_frames(a["y_true"], corrected, labels)
        (per_type if file.path.stem == "per_class_metrics" else overall).to_csv(tmp_path / "table.csv")
        assert (tmp_path / "table.csv").read_bytes() == file.path.read_bytes(), file.name


@pytest.mark.golden("eval_report")
def test_golden_report_files(golden, tmp_path):
    a = golden.arrays
    for case in ("id", "ood", "ood_closed"):
        tally = counted(a[f"{case}/y_true"], a[f"{case}/y_pred"], a["child_matrix"])
        subset = a["id/subset_labels"] if case == "id" else None
        write_reports(tmp_path / case, "mlp", reports_of(tally, case.removesuffix("_closed"), subset))
        expected = [file for file in golden.beside("eval_report_csv") if file.path.parent.name == case]
        assert len(expected) == (3 if case == "id" else 2)
        for file in expected:
            assert (tmp_path / case / f"mlp_{file.path.name}").read_bytes() == file.path.read_bytes()


def test_predictions_below_the_label_count_as_the_label(tmp_path):
    reports = reports_of(counted(TARGETS, PREDICTIONS))
    corrected = np.array([0, 0, 0, 2, 3, 3])
    precision, recall, f1, support = precision_recall_fscore_support(TARGETS, corrected, zero_division=0)
    np.testing.assert_allclose(reports.per_type.to_numpy(), np.stack([precision, recall, f1, support], axis=1))
    assert reports.overall["f1-score"]["accuracy"] == 0.5
    assert reports.subset is None
    write_reports(tmp_path / "new" / "folder", "linear", reports)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "linear_calibration.csv",
        "linear_hierarchical_metrics.csv",
        "linear_overall_metrics.csv",
        "linear_per_assay_metrics.csv",
        "linear_per_class_metrics.csv",
        "linear_per_dataset_metrics.csv",
        "linear_per_disease_metrics.csv",
        "linear_per_tissue_general_metrics.csv",
        "linear_per_tissue_metrics.csv",
    ]
    read = pd.read_csv(tmp_path / "new" / "folder" / "linear_per_class_metrics.csv", index_col=0)
    np.testing.assert_array_equal(read.to_numpy(), reports.per_type.to_numpy())


def test_on_new_studies_types_that_are_only_predicted_have_no_row():
    reports = reports_of(counted(TARGETS, PREDICTIONS), "ood")
    assert list(reports.per_type.index) == ["0", "1", "2"]
    assert list(reports.overall.index) == ["micro avg", "macro avg", "weighted avg"]
    corrected = correct_predictions(TARGETS, PREDICTIONS, REACHABILITY)
    expected = f1_score(TARGETS, corrected, labels=[0, 1, 2], average=None)
    np.testing.assert_allclose(reports.per_type["f1-score"], expected)
    assert reports.decoders.loc["argmax", "f1_macro"] == pytest.approx(expected.mean())


def test_unassigned_cells_are_wrong_and_no_type_of_their_own():
    predictions = np.array([0, -1, 1, 2, -1, 3])
    for split, rows in (("id", ["0", "1", "2", "3"]), ("ood", ["0", "1", "2"])):
        reports = reports_of(counted(TARGETS, predictions), split)
        assert list(reports.per_type.index) == rows
        np.testing.assert_allclose(reports.per_type["recall"].iloc[:3], [1 / 2, 1, 1 / 3])
        np.testing.assert_allclose(reports.per_type["precision"].iloc[:3], 1)
        assert reports.decoders.loc["argmax", "unassigned"] == pytest.approx(2 / 6)
        assert reports.decoders.loc["argmax", "accuracy"] == pytest.approx(3 / 6)


def test_tables_of_groups_are_scikit_learn_s_of_each_group_and_named_by_it(tmp_path):
    rng = np.random.default_rng(0)
    targets, predictions, groups = rng.integers(0, 5, 300), rng.integers(0, 5, 300), rng.integers(0, 3, 300)
    reports = reports_of(counted(targets, predictions, groups=groups))
    corrected = correct_predictions(targets, predictions, REACHABILITY)
    write_reports(tmp_path, "linear", reports)
    table = pd.read_csv(tmp_path / "linear_per_tissue_metrics.csv", index_col="tissue")
    assert sorted(table.index) == LOOKUPS["tissue"]
    assert table["n_cells"].is_monotonic_decreasing
    assert table["n_cells"].nunique() > 1
    for group in range(3):
        row, of_group = table.loc[f"tissue {group}"], groups == group
        pair = targets[of_group], corrected[of_group]
        for average in ("macro", "micro", "weighted"):
            assert row[f"f1_{average}"] == pytest.approx(f1_score(*pair, labels=np.unique(pair[0]), average=average))
        assert row["accuracy"] == pytest.approx(accuracy_score(*pair))
        assert row["n_cells"] == of_group.sum()
        assert row["n_cell_types"] == len(np.unique(pair[0]))


def test_interval_is_over_donors_on_held_out_donors_and_over_studies_on_new_studies():
    rng = np.random.default_rng(1)
    targets, predictions, groups = rng.integers(0, 3, 200), rng.integers(0, 3, 200), rng.integers(0, 3, 200)
    tally = counted(targets, predictions, groups=groups)
    tally.groups["donor_id"][0] *= 0  # so that the two differ
    for split, column in (("id", "donor_id"), ("ood", "dataset_id")):
        row = reports_of(tally, split).decoders.loc["argmax"]
        expected = bootstrap_f1_macro(tally.groups[column], labelled_only=split == "ood")
        assert (row["f1_macro_low"], row["f1_macro_high"]) == expected
    assert bootstrap_f1_macro(tally.groups["donor_id"], False) != bootstrap_f1_macro(tally.groups["dataset_id"], False)


def test_subset_may_hold_types_that_do_not_occur():
    reports = reports_of(counted(TARGETS, PREDICTIONS), subset=np.array([2, 4]))
    assert reports.subset is not None
    assert reports.subset["f1-score"]["macro avg"] == pytest.approx((0.5 + 0) / 2)
    assert reports.subset["support"]["macro avg"] == 3


def test_subset_of_types_without_cells_is_all_zero():
    reports = reports_of(counted(TARGETS, PREDICTIONS), subset=np.array([4]))
    assert reports.subset is not None
    assert not reports.subset.to_numpy().any()


def test_the_comparison_says_what_back_off_asked_for():
    tallies = dict.fromkeys(("argmax", "backoff"), counted(TARGETS, PREDICTIONS))
    decoders = make_reports(tallies, "argmax", RULES["id"], LOOKUPS, backoff={"confidence": 0.9}).decoders
    assert list(decoders.columns[:3]) == ["confidence", "max_error", "temperature"]
    assert decoders.loc["backoff", "confidence"] == 0.9
    assert np.isnan(decoders.loc["argmax", "confidence"])
    assert [line.split("  ")[0] for line in decoder_table(decoders).splitlines()[1:]] == ["argmax", "backoff 0.9"]


def test_the_comparison_says_what_back_off_promised():
    tallies = dict.fromkeys(("argmax", "backoff"), counted(TARGETS, PREDICTIONS))
    decoders = make_reports(tallies, "argmax", RULES["id"], LOOKUPS, backoff={"max_error": 0.025}).decoders
    heading, argmax, backoff = decoder_table(decoders).splitlines()
    assert backoff.startswith("backoff, error <= 2.5 %  0.3")
    assert heading.index("macro F1") == argmax.index("0.3") == backoff.index("0.3")
    assert heading.split()[-2:] == ["wrong", "exact/descendant/ancestor/sibling/elsewhere/unassigned"]
    assert backoff.split()[-2] == "0.400"  # two exact, an ancestor, two elsewhere; the descendant is not told


def test_the_comparison_says_the_temperature():
    tallies = dict.fromkeys(("argmax", "backoff", "temperature"), counted(TARGETS, PREDICTIONS))
    backoff = {"confidence": 0.9}
    decoders = make_reports(tallies, "argmax", RULES["id"], LOOKUPS, backoff=backoff, temperature=1.826).decoders
    np.testing.assert_array_equal(decoders["temperature"], [np.nan, np.nan, 1.826])
    rows = decoder_table(decoders).splitlines()[1:]
    assert [row.split("  ")[0] for row in rows] == ["argmax", "backoff 0.9", "argmax, T = 1.83"]


def test_subset_file_names_types_by_label_or_code(tmp_path):
    file = tmp_path / "subset.txt"
    file.write_text("T cell\n\n 2 \nB cell\n")
    np.testing.assert_array_equal(read_subset(file, ["B cell", "NK cell", "mast cell", "T cell"]), [3, 2, 0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("T cell\nT cel", r"subset.txt, line 2: 'T cel' is no cell type of this store; did you mean 'T cell'\?"),
        ("2", "line 1: '2' is no cell type of this store; give a label or a code of 0 to 1"),
        ("-1", "line 1: '-1' is no cell type"),
        ("T cell\n1", "line 2: '1' is named twice"),
        ("\n", "names no cell type"),
    ],
)
def test_unusable_line_of_a_subset_file_is_named(text, message, tmp_path):
    (tmp_path / "subset.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_subset(tmp_path / "subset.txt", ["B cell", "T cell"])


def test_missing_subset_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no such file: .*subset.txt"):
        read_subset(tmp_path / "subset.txt", ["B cell"])


def test_no_cells_are_named():
    none = np.array([], int)
    with pytest.raises(StoreError, match="no cell"):
        reports_of(counted(none, none))


def test_published_subset_is_for_the_published_types_alone(real_dir):
    labels = list(pd.read_csv(real_dir / "sctab_cell_types.csv")["label"])
    np.testing.assert_array_equal(published_subset(labels), PUBLISHED_SUBSET)
    assert published_subset(labels[::-1]) is None
    assert published_subset(labels[:-1]) is None


def test_published_subset_is_eighty_of_the_164_types():
    assert len(PUBLISHED_SUBSET) == 80
    assert list(PUBLISHED_SUBSET) == sorted(set(PUBLISHED_SUBSET) & set(range(164)))


def test_table_tells_the_two_macro_averages_apart():
    lines = overall_table(counted(TARGETS, PREDICTIONS)).splitlines()
    f1 = {0: 0.8, 1: 0.0, 2: 0.5, 3: 0.0}  # by hand: 2 TP / (predicted + actual)
    rows = {line[:22].strip(): line[22:].split() for line in lines[1:5]}
    assert rows["accuracy"] == ["0.5000"]
    assert rows["macro, all types"][-1] == f"{sum(f1.values()) / 4:.4f}"
    assert rows["macro, labelled types"][-1] == f"{(f1[0] + f1[1] + f1[2]) / 3:.4f}"
    assert rows["weighted by cells"][-1] == f"{(2 * f1[0] + 1 * f1[1] + 3 * f1[2]) / 6:.4f}"
    assert lines[5].startswith("6 cells of 3 labelled types; 4 types")


def test_averages_of_the_table_are_those_of_the_files():
    rng = np.random.default_rng(0)
    targets, predictions = rng.integers(0, 5, 200), rng.integers(0, 9, 200)
    tally = counted(targets, predictions, np.eye(9))
    table = overall_table(tally)
    for name, labels in (("macro, labelled types", types_present(targets)), ("macro, all types", None)):
        overall, _ = classification_report_frames(targets, predictions, labels)
        expected = "".join(f"{value:>10.4f}" for value in overall.loc["macro avg"].iloc[:3])
        assert f"{name:22}{expected}" in table


def test_comparison_of_decoders_shows_the_interval_where_there_is_one():
    one_study = reports_of(counted(TARGETS, PREDICTIONS), "ood").decoders
    assert decoder_table(one_study).splitlines()[1].startswith("argmax       0.4333  ")
    groups = np.array([0, 0, 0, 1, 1, 1])
    two = reports_of(counted(TARGETS, PREDICTIONS, groups=groups), "ood").decoders
    low, high = two.loc["argmax", ["f1_macro_low", "f1_macro_high"]]
    assert f"0.4333 ({low:.4f}-{high:.4f})" in decoder_table(two)
