import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import precision_recall_fscore_support

from hce_jax.errors import StoreError, UserError
from hce_jax.evaluation.reports import (
    PUBLISHED_SUBSET,
    overall_table,
    published_subset,
    read_subset,
    write_id_reports,
)
from hce_jax.hierarchy.reachability import correct_predictions
from hce_jax.metrics import classification_report_frames, types_present

# Type 1 is a kind of type 0. Type 3 is only predicted, type 4 occurs nowhere.
REACHABILITY = np.eye(5, dtype=np.int64)
REACHABILITY[0, 1] = 1
TARGETS = np.array([0, 0, 1, 2, 2, 2])
PREDICTIONS = np.array([0, 1, 0, 2, 3, 3])


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
    write_id_reports(tmp_path, "mlp", a["id/y_true"], a["id/y_pred"], a["child_matrix"], a["id/subset_labels"])
    expected = [file for file in golden.beside("eval_report_csv") if file.path.parent.name == "id"]
    assert {path.name for path in tmp_path.iterdir()} == {f"mlp_{file.path.name}" for file in expected}
    for file in expected:
        assert (tmp_path / f"mlp_{file.path.name}").read_bytes() == file.path.read_bytes()


def test_predictions_below_the_label_count_as_the_label(tmp_path):
    reports = write_id_reports(tmp_path / "new" / "folder", "linear", TARGETS, PREDICTIONS, REACHABILITY)
    corrected = np.array([0, 0, 0, 2, 3, 3])
    precision, recall, f1, support = precision_recall_fscore_support(TARGETS, corrected, zero_division=0)
    np.testing.assert_allclose(reports.per_type.to_numpy(), np.stack([precision, recall, f1, support], axis=1))
    assert reports.overall["f1-score"]["accuracy"] == 0.5
    assert reports.subset is None
    written = tmp_path / "new" / "folder"
    assert sorted(path.name for path in written.iterdir()) == [
        "linear_overall_metrics.csv",
        "linear_per_class_metrics.csv",
    ]
    read = pd.read_csv(written / "linear_per_class_metrics.csv", index_col=0)
    np.testing.assert_array_equal(read.to_numpy(), reports.per_type.to_numpy())


def test_subset_may_hold_types_that_do_not_occur(tmp_path):
    reports = write_id_reports(tmp_path, "linear", TARGETS, PREDICTIONS, REACHABILITY, np.array([2, 4]))
    assert reports.subset is not None
    assert reports.subset["f1-score"]["macro avg"] == pytest.approx((0.5 + 0) / 2)
    assert reports.subset["support"]["macro avg"] == 3


def test_subset_of_types_without_cells_is_all_zero(tmp_path):
    reports = write_id_reports(tmp_path, "linear", TARGETS, PREDICTIONS, REACHABILITY, np.array([4]))
    assert reports.subset is not None
    assert not reports.subset.to_numpy().any()


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


def test_split_without_cells_is_named(tmp_path):
    none = np.array([], int)
    with pytest.raises(StoreError, match="no cells"):
        write_id_reports(tmp_path, "linear", none, none, REACHABILITY)


def test_published_subset_is_for_the_published_types_alone(real_dir):
    labels = list(pd.read_csv(real_dir / "sctab_cell_types.csv")["label"])
    np.testing.assert_array_equal(published_subset(labels), PUBLISHED_SUBSET)
    assert published_subset(labels[::-1]) is None
    assert published_subset(labels[:-1]) is None


def test_published_subset_is_eighty_of_the_164_types():
    assert len(PUBLISHED_SUBSET) == 80
    assert list(PUBLISHED_SUBSET) == sorted(set(PUBLISHED_SUBSET) & set(range(164)))


def test_table_tells_the_two_macro_averages_apart():
    corrected = correct_predictions(TARGETS, PREDICTIONS, REACHABILITY)
    lines = overall_table(*classification_report_frames(TARGETS, corrected)).splitlines()
    f1 = {0: 0.8, 1: 0.0, 2: 0.5, 3: 0.0}  # by hand: 2 TP / (predicted + actual)
    rows = {line[:22].strip(): line[22:].split() for line in lines[1:5]}
    assert rows["accuracy"] == ["0.5000"]
    assert rows["macro, all types"][-1] == f"{sum(f1.values()) / 4:.4f}"
    assert rows["macro, labelled types"][-1] == f"{(f1[0] + f1[1] + f1[2]) / 3:.4f}"
    assert rows["weighted by cells"][-1] == f"{(2 * f1[0] + 1 * f1[1] + 3 * f1[2]) / 6:.4f}"
    assert lines[5].startswith("6 cells of 3 labelled types; 4 types")


def test_labelled_macro_of_the_table_is_that_of_the_ood_rule():
    rng = np.random.default_rng(0)
    targets, predictions = rng.integers(0, 5, 200), rng.integers(0, 9, 200)
    ood, _ = classification_report_frames(targets, predictions, types_present(targets))
    expected = "".join(f"{value:>10.4f}" for value in ood.loc["macro avg"].iloc[:3])
    assert f"macro, labelled types {expected}" in overall_table(*classification_report_frames(targets, predictions))
