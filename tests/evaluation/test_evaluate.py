import numpy as np
import pandas as pd
import pytest
from coded_cells import label_of
from evaluated import REACHABILITY, CodedCells, CodedClassifier, probabilities_of

from hce_jax.errors import StoreError
from hce_jax.evaluation.decoders import Decoders
from hce_jax.evaluation.evaluate import Job, Settings, evaluate

CELLS = np.arange(60)
FILES = (
    "overall_metrics.csv per_class_metrics.csv per_assay_metrics.csv per_dataset_metrics.csv per_disease_metrics.csv "
    "per_tissue_metrics.csv per_tissue_general_metrics.csv hierarchical_metrics.csv calibration.csv calibration.png "
    "confusion_ontology.png performance_plot.png"
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


def test_probabilities_of_an_older_evaluation_do_not_lie_beside_the_new_tables(tmp_path):
    for detailed in (True, False):
        evaluate(CodedCells([30]), [Job(CodedClassifier(), tmp_path)], Settings("id", detailed=detailed))
        assert (tmp_path / "coded_detailed_results.parquet").exists() is detailed


def test_a_failure_leaves_no_half_file_and_no_new_table(tmp_path):
    with pytest.raises(StoreError, match="block 4 is damaged"):
        evaluate(CodedCells([10] * 6, damaged=4), [Job(CodedClassifier(), tmp_path)], Settings("ood", detailed=True))
    assert names(tmp_path) == []


def test_no_cells_are_one_line(tmp_path):
    with pytest.raises(StoreError, match="coded cells holds no cells"):
        evaluate(CodedCells([]), [Job(CodedClassifier(), tmp_path)], Settings("id"))
