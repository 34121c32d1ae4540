import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stores import LABELS, N_GENES, cells_of, expression, label_of, write_tiny_store

from hce_jax.errors import HierarchyError, StoreError
from hce_jax.store import open_store
from hce_jax.store.block import COUNTS, VALUES
from hce_jax.store.schema import CHILD_MATRIX_FILE


@pytest.fixture
def store_path(tmp_path):
    return write_tiny_store(tmp_path / "store")


def read_all(split):
    blocks = [split.read_block(i, ("cell_type", "soma_joinid")) for i in range(len(split.block_sizes))]
    return (
        np.concatenate([block.x.toarray() for block in blocks]),
        np.concatenate([block.column("cell_type") for block in blocks]),
        np.concatenate([block.column("soma_joinid") for block in blocks]),
    )


def test_every_cell_comes_with_its_expression_label_and_id(store_path):
    for name, first, size in (("train", 0, 90), ("val", 1000, 23), ("test", 2000, 17)):
        split = open_store(store_path).split(name)
        x, labels, ids = read_all(split)
        cells = first + np.arange(size)
        np.testing.assert_array_equal(ids, cells)
        np.testing.assert_array_equal(x, expression(cells))
        np.testing.assert_array_equal(labels, label_of(cells))
        assert split.n_cells == size


def test_a_block_is_packed_as_the_values_it_has_and_they_take_no_more_entries_than_the_split_says(store_path):
    split = open_store(store_path).split("train")
    block = split.read_block(2)
    assert split.count_entries == (0, 0)
    assert len(block.stream(COUNTS).gaps) == 0
    assert np.diff(block.stream(VALUES).offsets).max() <= split.value_entries.most == N_GENES
    x, columns = split.read_dense(2, ("soma_joinid",))
    np.testing.assert_array_equal(x, expression(np.arange(16, 24)))
    np.testing.assert_array_equal(columns["soma_joinid"], np.arange(16, 24))


def test_a_column_that_the_part_has_not_is_named(store_path):
    with pytest.raises(StoreError, match=r"part.0.parquet has no column 'n_counts'"):
        open_store(store_path).split("train").read_block(0, ("cell_type", "n_counts"))


def test_parts_come_in_the_order_of_their_numbers_not_of_their_names(tmp_path):
    path = write_tiny_store(tmp_path / "store", rows_per_part=8)  # 12 parts: part.10 sorts before part.2 by name
    _, _, ids = read_all(open_store(path).split("train"))
    np.testing.assert_array_equal(ids, np.arange(90))


def test_columns_are_found_by_name_in_whatever_order_and_dask_s_metadata_files_do_not_matter(store_path):
    for part in (store_path / "train").glob("part.*.parquet"):
        table = pq.read_table(part)
        pq.write_table(table.select(table.column_names[::-1]), part, row_group_size=5)
    (store_path / "train" / "_metadata").write_bytes(b"not read")
    x, labels, ids = read_all(open_store(store_path).split("train"))
    np.testing.assert_array_equal(ids, np.arange(90))
    np.testing.assert_array_equal(x, expression(ids))
    np.testing.assert_array_equal(labels, label_of(ids))


@pytest.mark.parametrize(("fraction", "cells"), [(1.0, 90), (0.34, 64), (0.33, 32), (0.001, 32)])
def test_a_fraction_takes_the_first_parts_rounded_up(store_path, fraction, cells):
    split = open_store(store_path).split("train", fraction)
    np.testing.assert_array_equal(cells_of(read_all(split)[0]), np.arange(cells))


def test_side_files(store_path):
    side = open_store(store_path).side
    assert (side.n_genes, side.n_types, side.labels, side.cl_ids) == (N_GENES, len(LABELS), LABELS, None)
    assert (side.gene_ids[3], side.gene_names[3]) == ("ENSG00000000003", "G3")
    np.testing.assert_array_equal(side.class_weights(), np.linspace(0.5, 1.5, 5, dtype=np.float32))
    assert side.about == {}


def rewrite(part, change):
    pq.write_table(change(pq.read_table(part)), part, row_group_size=8)


def with_column(table, name, values):
    return table.set_column(table.column_names.index(name), name, pa.array(values, table.schema.field(name).type))


def shorten_one(table):
    return with_column(table, "X", [row if i else row[:-1] for i, row in enumerate(table["X"].to_pylist())])


def shorten_all(table):
    return with_column(table, "X", [row[:-1] for row in table["X"].to_pylist()])


def uneven_but_right_in_sum(table):
    rows = table["X"].to_pylist()
    return with_column(table, "X", [rows[0][:-1], [*rows[1], 0.0], *rows[2:]])


def foreign_code(table):
    return with_column(table, "cell_type", [*table["cell_type"].to_pylist()[:-1], 5])


def negative_code(table):
    return with_column(table, "cell_type", [-1, *table["cell_type"].to_pylist()[1:]])


def text_label(table):
    return table.set_column(table.column_names.index("cell_type"), "cell_type", pa.array(["B cell"] * len(table)))


def text_genes(table):
    return table.set_column(table.column_names.index("X"), "X", pa.array([["a"] * N_GENES] * len(table)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (text_label, r"part.1.parquet has cell_type of type string; it must be the integer code"),
        (text_genes, r"part.1.parquet has X of type list<\w+: string>; write it as list<float>"),
        (lambda table: table.drop_columns(["cell_type"]), r"part.1.parquet lacks the column 'cell_type'; it has X"),
        (lambda table: table.drop_columns(["X"]), r"part.1.parquet lacks the column 'X'"),
        (shorten_all, r"part.1.parquet holds X of length 11, but var.parquet names 12 genes"),
        (shorten_one, r"part.1.parquet holds X of length 11.875"),
        (foreign_code, r"part.1.parquet has the cell_type code 5, but cell_type.parquet has the codes 0 to 4"),
        (negative_code, r"part.1.parquet has the cell_type code -1"),
    ],
)
def test_a_bad_part_is_named_before_any_cell_is_read(store_path, change, says):
    rewrite(store_path / "train" / "part.1.parquet", change)
    with pytest.raises(StoreError, match=says):
        open_store(store_path).split("train")


def test_lengths_that_are_right_only_in_sum_are_found_when_the_block_is_read(store_path):
    rewrite(store_path / "train" / "part.1.parquet", uneven_but_right_in_sum)
    split = open_store(store_path).split("train")
    with pytest.raises(StoreError, match=r"part.1.parquet holds an X of length 11, but"):
        split.read_block(4)


def set_value(value):
    def change(table):
        rows = table["X"].to_pylist()
        rows[3][4] = value
        return with_column(table, "X", rows)

    return change


def raw_counts(table):
    return with_column(table, "X", [[float(round(v)) for v in row] for row in table["X"].to_pylist()])


def no_label(table):
    return with_column(table, "cell_type", [None, *table["cell_type"].to_pylist()[1:]])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_value(float("nan")), "holds an X with a negative or non-finite value"),
        (set_value(float("inf")), "holds an X with a negative or non-finite value"),
        (set_value(-0.5), "holds an X with a negative or non-finite value"),
        (raw_counts, "holds whole numbers only, which look like raw counts"),
        (set_value(None), "holds an X with empty entries"),
        (no_label, "has a cell without cell_type in row group 0"),
    ],
)
def test_a_value_that_no_cell_can_have_is_found_when_its_block_is_read(store_path, change, says):
    part = store_path / "train" / "part.1.parquet"
    rewrite(part, change)
    split = open_store(store_path).split("train")
    with pytest.raises(StoreError, match=rf"part.1.parquet {says}"):
        split.read_block(4)


def test_a_gene_or_a_label_named_twice_is_an_error(store_path):
    genes = pq.read_table(store_path / "var.parquet").to_pandas()
    genes.loc[3, "feature_id"] = genes.loc[2, "feature_id"]
    genes.to_parquet(store_path / "var.parquet")
    with pytest.raises(StoreError, match=r"var.parquet names 'ENSG00000000002' more than once"):
        open_store(store_path)


def test_a_truncated_part_is_named(store_path):
    part = store_path / "val" / "part.0.parquet"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(StoreError, match=r"val/part.0.parquet is truncated or not a parquet file"):
        open_store(store_path).split("val")


def test_bytes_damaged_inside_a_part_are_named(store_path):
    part = store_path / "train" / "part.0.parquet"
    data = bytearray(part.read_bytes())
    data[4:300] = bytes(296)
    part.write_bytes(data)
    with pytest.raises(StoreError, match=r"train/part.0.parquet is damaged: row group 0 cannot be read"):
        open_store(store_path).split("train").read_block(0)


def test_missing_files_are_named(store_path, tmp_path):
    with pytest.raises(StoreError, match=r"the store \S+/nowhere does not exist; set DATA_PATH"):
        open_store(tmp_path / "nowhere")
    shutil.rmtree(store_path / "val")
    with pytest.raises(StoreError, match=r"val holds no part.N.parquet; the store lacks its val split"):
        open_store(store_path).split("val")
    for name, says in (
        ("var.parquet", "var.parquet does not exist"),
        ("categorical_lookup/cell_type.parquet", "cell_type.parquet does not exist"),
        (CHILD_MATRIX_FILE, "child_matrix.npy does not exist"),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(store_path, copy)
        (copy / name).unlink()
        with pytest.raises(StoreError, match=says):
            open_store(copy)
        shutil.rmtree(copy)


def test_side_files_that_do_not_agree_are_named(store_path):
    np.save(store_path / "class_weights.npy", np.ones(4))
    with pytest.raises(StoreError, match=r"class_weights.npy has shape \(4,\), but the store has 5 cell types"):
        open_store(store_path).side.class_weights()
    np.save(store_path / "class_weights.npy", np.array([1, 1, np.nan, 1, 1]))
    with pytest.raises(StoreError, match="negative or non-finite weight"):
        open_store(store_path).side.class_weights()
    np.save(store_path / CHILD_MATRIX_FILE, np.eye(4))
    with pytest.raises(HierarchyError, match=r"child_matrix.npy has 4 rows, but the cell type lookup has 5 labels"):
        open_store(store_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (CHILD_MATRIX_FILE, b"text", "child_matrix.npy is not a readable .npy file"),
        ("var.parquet", b"text", "var.parquet is not a readable parquet file"),
        ("store.json", b"[", "store.json is not a readable JSON object"),
        ("store.json", json.dumps(5).encode(), "store.json is not a readable JSON object"),
    ],
)
def test_damaged_side_files_are_named(store_path, name, content, says):
    (store_path / name).write_bytes(content)
    with pytest.raises(StoreError, match=says):
        open_store(store_path)
