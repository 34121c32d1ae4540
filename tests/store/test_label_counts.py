import numpy as np
import pyarrow.parquet as pq
import pytest
from stores import FIRST_CELL, N_TYPES, SIZES, label_of, write_tiny_store

from hce_jax.errors import StoreError
from hce_jax.store import convert, open_store
from hce_jax.store.label_counts import label_counts


@pytest.fixture
def merlin(tmp_path):
    return write_tiny_store(tmp_path / "merlin")


@pytest.fixture(params=["merlin", "cells"])
def store(request, merlin, tmp_path):
    if request.param == "merlin":
        return merlin
    convert(merlin, tmp_path / "cells", workers=1)
    return tmp_path / "cells"


def expected(split, n_cells=None):
    """Labels of the cells as they were made, counted one by one."""
    counts = [0] * N_TYPES
    for cell in range(FIRST_CELL[split], FIRST_CELL[split] + (n_cells or SIZES[split])):
        counts[label_of(cell)] += 1
    return counts


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_cell_of_a_split_is_counted_once(store, split):
    counts = label_counts(open_store(store).split(split))
    assert counts.tolist() == expected(split)
    assert counts.dtype == np.int64


def test_cells_of_parts_that_are_left_out_do_not_count(store):
    # 90 cells in parts of 32: the first two of three.
    assert label_counts(open_store(store).split("train", 0.5)).tolist() == expected("train", 64)


def test_types_without_cells_count_none(tmp_path):
    write_tiny_store(tmp_path, sizes={"train": 2})
    counts = label_counts(open_store(tmp_path).split("train"))
    assert counts.tolist() == [1, 0, 1, 0, 0]


def test_blocks_are_counted_all_and_without_their_expression(merlin, tmp_path, monkeypatch):
    convert(merlin, tmp_path / "cells", workers=1)
    for folder in (merlin, tmp_path / "cells"):
        split = open_store(folder).split("train")
        monkeypatch.setattr(type(split), "read_block", None)
        assert label_counts(split).tolist() == expected("train")


def test_a_part_that_cannot_be_read_is_an_error(store):
    split = open_store(store).split("train")
    part = max((store / "train").glob("part.*"), key=lambda path: int(path.name.split(".")[1]))
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    with pytest.raises(StoreError, match=rf"{part} is damaged: its labels cannot be read"):
        label_counts(split)


def test_a_label_without_an_entry_is_an_error(merlin):
    split = open_store(merlin).split("train")
    part = merlin / "train/part.1.parquet"
    table = pq.read_table(part)
    labels = table["cell_type"].to_numpy().copy()
    labels[5] = N_TYPES
    place = table.column_names.index("cell_type")
    pq.write_table(table.set_column(place, "cell_type", [labels]), part)
    with pytest.raises(
        StoreError, match=r"part.1.parquet has the cell_type code 5, but cell_type.parquet has the codes"
    ):
        label_counts(split)
