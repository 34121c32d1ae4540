import errno

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from coded_cells import label_of
from evaluated import CodedCells, CodedClassifier, probabilities_of

from hce_jax.errors import StoreError
from hce_jax.evaluation import detailed
from hce_jax.evaluation.detailed import DetailedResults
from hce_jax.evaluation.predict import classified

CELLS = np.arange(23)


def write(path, cells, fail_at=None):
    with DetailedResults(path, cells.side.labels, cells.lookups) as file:
        for number, batch in enumerate(classified(cells, [CodedClassifier()], 4)):
            if number == fail_at:
                raise KeyboardInterrupt
            predictions = batch.probabilities[0].argmax(axis=1)
            predictions[batch.block.column("soma_joinid") % 10 == 3] = -1
            file.add(batch.block, predictions, batch.probabilities[0])


def test_every_cell_is_there_with_labels_what_is_said_of_it_and_all_probabilities(tmp_path, monkeypatch):
    monkeypatch.setattr(detailed, "_ROW_GROUP", 8)
    cells, path = CodedCells([4, 4, 4, 4, 4, 3]), tmp_path / "detailed.parquet"
    write(path, cells)
    table = pd.read_parquet(path)
    assert list(table.columns) == [
        "y_true", "y_pred", "cell_type", "soma_joinid", "assay", "dataset_id", "donor_id", "development_stage",
        "disease", "tissue", "tissue_general", "y_probs",
    ]  # fmt: skip
    labels = [f"T{code}" for code in label_of(CELLS)]
    assert list(table["y_true"]) == list(table["cell_type"]) == labels
    expected = [f"T{code}" if cell % 10 != 3 else "unassigned" for cell, code in enumerate(CELLS % 7)]
    assert list(table["y_pred"]) == expected
    np.testing.assert_array_equal(table["soma_joinid"], CELLS + 10**10)
    for name, texts in cells.lookups.items():
        assert list(table[name]) == [texts[cell % len(texts)] for cell in CELLS]
    np.testing.assert_array_equal(np.stack(table["y_probs"]), probabilities_of(CELLS))
    assert table["y_probs"][0].dtype == np.float32
    assert pq.ParquetFile(path).num_row_groups == 3  # 8, 8, 7: written on the way


@pytest.mark.parametrize("fail_at", [0, 5])
def test_nothing_is_left_of_an_evaluation_that_ends_early(tmp_path, monkeypatch, fail_at):
    monkeypatch.setattr(detailed, "_ROW_GROUP", 8)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "detailed.parquet", CodedCells([4] * 6), fail_at)
    assert not list(tmp_path.iterdir())


def test_an_older_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "detailed.parquet"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write(path, CodedCells([4] * 6), fail_at=3)
    assert path.read_text() == "old"
    write(path, CodedCells([4] * 6))
    assert len(pd.read_parquet(path)) == 24


def test_a_full_disk_is_one_line_that_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, "Error writing bytes to file")  # arrow names no file

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(StoreError, match=r"cannot use .*detailed\.parquet: No space left on device"):
        write(tmp_path / "detailed.parquet", CodedCells([4] * 6))
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(StoreError, match="nowhere"):
        write(tmp_path / "nowhere" / "detailed.parquet", CodedCells([4]))
