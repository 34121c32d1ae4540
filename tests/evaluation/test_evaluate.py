import errno

import numpy as np
import pandas as pd
import pytest
from coded_cells import label_of
from evaluated import REACHABILITY, CodedCells, CodedClassifier, probabilities_of

from hce_jax.errors import ConfigError, StoreError
from hce_jax.evaluation.calibration import Calibration
from hce_jax.evaluation.decoders import Decoders
from hce_jax.evaluation.evaluate import Job, Settings, evaluate

CELLS = np.arange(60)
FILES = (
    "overall_metrics.csv per_class_metrics.csv per_assay_metrics.csv per_dataset_metrics.csv per_disease_metrics.csv "
    "per_tissue_metrics.csv per_tissue_general_metrics.csv hierarchical_metrics.csv calibration.csv calibration.png "
    "confusion_ontology.png performance_plot.png counts.npz"
).split()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_each_model_gets_its_files_and_cells_are_read_once(tmp_path):
    cells = CodedCells([10] * 6)
    jobs = [Job(CodedClassifier(shift, "linear"), tmp_path / str(shift)) for shift in (0, 2)]
    results = evaluate(cells, jobs, Settings("ood", batch_size=20, detailed=True))
    assert sorted(cells.reads) == list(range(6))
    for job, result in zip(jobs, results, strict=True):
        assert names(job.folder) == sorted(f"linear_{name}" for name in [*FILES, "detailed_results.parquet"])
        predictions = probabilities_of(CELLS, job.classifier.shift).argmax(axis=1)
        right = REACHABILITY[label_of(CELLS), predictions] > 0
        table = pd.read_csv(job.folder / "linear_hierarchical_metrics.csv", index_col="decoder")
        assert table.loc["argmax", "accuracy"] == pytest.approx(right.mean())
        assert list(table.index) == ["argmax", "backoff", "min-distance"]
        assert result.tallies["argmax"].n_cells == 60
    assert results[0].reports.overall["f1-score"].iloc[1] != results[1].reports.overall["f1-score"].iloc[1]


@pytest.mark.parametrize("decoder", ["argmax", "backoff", "min-distance"])
def test_files_are_about_the_decoder_that_was_asked_for(tmp_path, decoder):
    settings = Settings("ood", decoder=decoder, confidence=0.75, detailed=True)
    [result] = evaluate(CodedCells([60]), [Job(CodedClassifier(), tmp_path)], settings)
    codes, confidence = Decoders(REACHABILITY, 0.75).decode(decoder, probabilities_of(CELLS))
    detailed = pd.read_parquet(tmp_path / "coded_detailed_results.parquet")
    assert list(detailed["y_pred"]) == [f"T{code}" if code >= 0 else "unassigned" for code in codes]
    tissue = pd.read_csv(tmp_path / "coded_per_tissue_metrics.csv", index_col="tissue")
    right = (codes >= 0) & (REACHABILITY[label_of(CELLS), codes] > 0)
    assert tissue.loc["tissue 0", "accuracy"] == pytest.approx(right[CELLS % 7 == 0].mean())
    calibration = pd.read_csv(tmp_path / "coded_calibration.csv")
    assert calibration["cells"].sum() == np.count_nonzero(codes >= 0)
    assert (calibration["cells"] * calibration["confidence"]).sum() == pytest.approx(confidence.sum())
    written = pd.read_csv(tmp_path / "coded_overall_metrics.csv", index_col=0)
    np.testing.assert_allclose(result.reports.overall, written, rtol=1e-12)


def calibration_of(temperature):
    curves = np.array([[0.0, 1.0], [0.2, 1.5], [0.0, 0.7]])
    errors, confidences = np.array([0.02, 0.05, 0.1]), np.array([0.9, 0.55, 0.5])
    judged = [np.full(len(REACHABILITY), 9)] * 2
    return Calibration(
        "cells", 9, "study", 2, ("a", "b"), "", errors, confidences, curves, *judged, temperature=temperature
    )


def test_back_off_goes_by_the_calibration_of_a_model_that_has_one(tmp_path):
    calibration = calibration_of(2.5)
    jobs = [Job(CodedClassifier(), tmp_path / "plain"), Job(CodedClassifier(), tmp_path / "calibrated", calibration)]
    evaluate(CodedCells([60]), jobs, Settings("ood", decoder="backoff", confidence=0.75, max_error=0.06, detailed=True))
    probabilities = probabilities_of(CELLS)
    for name, confidence in (("plain", 0.75), ("calibrated", calibration.thresholds_at(0.05))):
        codes, _ = Decoders(REACHABILITY, confidence).decode("backoff", probabilities)
        detailed = pd.read_parquet(tmp_path / name / "coded_detailed_results.parquet")
        assert list(detailed["y_pred"]) == [f"T{code}" if code >= 0 else "unassigned" for code in codes]
        row = pd.read_csv(tmp_path / name / "coded_hierarchical_metrics.csv", index_col="decoder").loc["backoff"]
        assert row["unassigned"] == (codes == -1).mean()
        asked_for = [0.75, np.nan] if name == "plain" else [np.nan, 0.06]
        np.testing.assert_array_equal(row[["confidence", "max_error"]], asked_for)
    read = pd.read_csv(tmp_path / "plain" / "coded_overall_metrics.csv")
    assert not read.equals(pd.read_csv(tmp_path / "calibrated" / "coded_overall_metrics.csv"))


@pytest.mark.parametrize(("max_error", "asked_for"), [(0.06, [np.nan, 0.06]), (None, [0.75, np.nan])])
def test_temperature_has_a_row_of_its_own_and_needs_no_promise(tmp_path, max_error, asked_for):
    jobs = [Job(CodedClassifier(), tmp_path / str(t), calibration_of(t)) for t in (0.4, 2.5)]
    evaluate(CodedCells([60]), jobs, Settings("ood", confidence=0.75, max_error=max_error))
    p = probabilities_of(CELLS).astype(float)
    for job, temperature in zip(jobs, (0.4, 2.5), strict=True):
        table = pd.read_csv(job.folder / "coded_hierarchical_metrics.csv", index_col="decoder")
        assert list(table.index) == ["argmax", "backoff", "min-distance", "temperature"]
        np.testing.assert_array_equal(table.loc["backoff", ["confidence", "max_error"]].astype(float), asked_for)
        assert table["temperature"].dropna().to_dict() == {"temperature": temperature}
        same = [name for name in table if name not in ("confidence", "max_error", "temperature", "ece", "aurc")]
        pd.testing.assert_series_equal(table.loc["argmax", same], table.loc["temperature", same], check_names=False)
        power = p ** (1 / temperature) / (p ** (1 / temperature)).sum(axis=1, keepdims=True)
        codes = p.argmax(axis=1)
        confidence = (power * REACHABILITY[codes]).sum(axis=1)
        right, bins = REACHABILITY[label_of(CELLS), codes] > 0, (confidence * 15).astype(int)
        gaps = [abs((right - confidence)[bins == each].sum()) for each in range(15)]
        assert table.loc["temperature", "ece"] == pytest.approx(sum(gaps) / 60, abs=1e-6)
        assert table.loc["argmax", "ece"] != pytest.approx(sum(gaps) / 60, abs=0.01)


def test_what_an_older_evaluation_wrote_and_this_one_did_not_is_removed_and_said(tmp_path, capsys):
    subset = np.array([0, 2])
    evaluate(CodedCells([30]), [Job(CodedClassifier(), tmp_path)], Settings("id", detailed=True, subset_labels=subset))
    first = names(tmp_path)
    assert {"coded_detailed_results.parquet", "coded_subset_metrics.csv"} < {*first}
    assert not capsys.readouterr().err
    (tmp_path / "coded_notes.txt").write_text("mine")
    evaluate(CodedCells([30]), [Job(CodedClassifier(), tmp_path)], Settings("id"))
    gone = {"coded_detailed_results.parquet", "coded_subset_metrics.csv"}
    assert set(names(tmp_path)) == {*first, "coded_notes.txt"} - gone
    said = capsys.readouterr().err
    assert all(f"{name} was of an older evaluation and is removed" in said for name in gone)


def test_a_failure_leaves_no_file_and_no_folder_of_its_own(tmp_path):
    cells = CodedCells([10] * 6, damaged=4)
    with pytest.raises(StoreError, match="block 4 is damaged"):
        evaluate(cells, [Job(CodedClassifier(), tmp_path / "new")], Settings("ood", detailed=True))
    assert names(tmp_path) == []


@pytest.mark.parametrize("writer", ["pandas.DataFrame.to_csv", "matplotlib.figure.Figure.savefig"])
def test_a_disk_that_is_full_at_the_end_is_one_line_and_the_older_results_stay(tmp_path, monkeypatch, writer):
    jobs = [Job(CodedClassifier(shift), tmp_path / str(shift)) for shift in (0, 1)]
    evaluate(CodedCells([30]), jobs, Settings("ood", detailed=True))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert len(before) == 2 * (len(FILES) + 1)
    written = []

    def full(self, path, *arguments, **named):
        written.append(path)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "no room")
        path.write_text("begun")

    monkeypatch.setattr(writer, full)
    with pytest.raises(StoreError, match=r"cannot use .*coded_.*: No space left on device"):
        evaluate(CodedCells([30]), jobs, Settings("ood", decoder="backoff"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_confidence_out_of_range_is_found_before_anything_is_read(tmp_path):
    cells = CodedCells([10])
    with pytest.raises(ConfigError, match="--confidence"):
        evaluate(cells, [Job(CodedClassifier(), tmp_path / "new")], Settings("id", confidence=2.0))
    assert not cells.reads
    assert names(tmp_path) == []


def test_no_cells_are_one_line(tmp_path):
    with pytest.raises(StoreError, match="coded cells holds no cells"):
        evaluate(CodedCells([]), [Job(CodedClassifier(), tmp_path)], Settings("id"))
