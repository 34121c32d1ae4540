import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from hce_jax.errors import StoreError
from hce_jax.store.merlin_write import complete_or_absent, write_part, write_side_files, write_split

CODES = (
    "cell_type",
    "dataset_id",
    "donor_id",
    "assay",
    "development_stage",
    "disease",
    "tissue",
    "tissue_general",
    "tech_sample",
)
N_CELLS, N_GENES = 23, 7


def cells_that_betray_misalignment() -> tuple[sparse.csr_array, pd.DataFrame]:
    """Every value and every code encodes its cell and its column; every third gene is zero."""
    cell, gene = np.mgrid[1 : N_CELLS + 1, 1 : N_GENES + 1]
    x = np.where((cell + gene) % 3 == 0, 0, 100 * cell + gene).astype(np.float32)
    cells = np.arange(1, N_CELLS + 1)
    obs = pd.DataFrame({name: 1_000 * cells + number for number, name in enumerate(CODES)})
    obs["soma_joinid"] = 7 * cells
    obs["is_primary_data"] = cells % 2 == 0
    obs.index = pd.Index(cells[::-1])  # positions count, not the index
    return sparse.csr_array(x), obs


def test_parts_read_back_cell_by_cell_and_gene_by_gene(tmp_path):
    x, obs = cells_that_betray_misalignment()
    write_split(tmp_path / "train", x, obs, rows_per_part=10, rows_per_group=4)
    names = [f"part.{part}.parquet" for part in range(3)]
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == names
    table = pa.concat_tables([pq.read_table(tmp_path / "train" / name) for name in names])
    assert table["X"].to_pylist() == x.toarray().tolist()
    for column in (*CODES, "soma_joinid", "is_primary_data"):
        assert table[column].to_pylist() == obs[column].tolist(), column
    assert table["idx"].to_pylist() == list(range(N_CELLS))


def test_a_part_has_the_published_columns_and_types(tmp_path):
    x, obs = cells_that_betray_misalignment()
    write_split(tmp_path, x, obs.astype(dict.fromkeys(CODES, np.int8)), rows_per_part=100, rows_per_group=8)
    schema = pq.read_schema(tmp_path / "part.0.parquet")
    integers = {*CODES, "soma_joinid", "idx"}
    assert set(schema.names) == {"X", "is_primary_data", *integers}
    assert schema.field("X").type.value_type == pa.float32()
    assert schema.field("is_primary_data").type == pa.bool_()
    assert {schema.field(name).type for name in integers} == {pa.int64()}


@pytest.mark.parametrize(("size", "of_a_part"), [(4, [4, 4, 2]), (3, [3, 3, 3, 1]), (5, [5, 5])], ids=str)
def test_row_groups_have_the_asked_size_and_only_the_last_of_a_part_is_short(tmp_path, size, of_a_part):
    x, obs = cells_that_betray_misalignment()
    write_split(tmp_path, x, obs, rows_per_part=10, rows_per_group=size)
    sizes = []
    for part in range(3):
        metadata = pq.read_metadata(tmp_path / f"part.{part}.parquet")
        sizes.append([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
    assert sizes == [of_a_part, of_a_part, [3]]


def test_no_more_than_one_row_group_is_made_dense_at_a_time(tmp_path, monkeypatch):
    x, obs = cells_that_betray_misalignment()
    densified = []
    to_array = sparse.csr_array.toarray
    monkeypatch.setattr(sparse.csr_array, "toarray", lambda self: densified.append(self.shape[0]) or to_array(self))
    write_split(tmp_path, x, obs, rows_per_part=10, rows_per_group=4)
    assert max(densified) == 4


def test_a_part_is_the_row_groups_it_is_given_one_by_one(tmp_path):
    x, obs = cells_that_betray_misalignment()
    obs["idx"] = np.arange(100, 100 + N_CELLS)
    cuts = [(0, 9), (9, 10), (10, 23)]
    write_part(tmp_path / "part.4.parquet", ((x[start:stop], obs[start:stop]) for start, stop in cuts))
    file = pq.ParquetFile(tmp_path / "part.4.parquet")
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [9, 1, 13]
    table = file.read()
    assert table["X"].to_pylist() == x.toarray().tolist()
    for column in (*CODES, "soma_joinid", "is_primary_data", "idx"):
        assert table[column].to_pylist() == obs[column].tolist(), column


def test_a_part_of_a_split_is_what_it_is_when_it_is_written_alone(tmp_path):
    x, obs = cells_that_betray_misalignment()
    write_split(tmp_path / "split", x, obs, rows_per_part=10, rows_per_group=4)
    obs["idx"] = np.arange(N_CELLS)
    write_part(tmp_path / "alone", ((x[start:stop], obs[start:stop]) for start, stop in ((10, 14), (14, 18), (18, 20))))
    assert (tmp_path / "split" / "part.1.parquet").read_bytes() == (tmp_path / "alone").read_bytes()


def test_a_table_of_cells_of_another_length_is_refused(tmp_path):
    x, obs = cells_that_betray_misalignment()
    with pytest.raises(ValueError, match="obs has 22 rows, x has 23"):
        write_split(tmp_path, x, obs.iloc[:-1])


@pytest.mark.parametrize("cl_ids", [None, ["CL:0000236", "CL:0000084"]], ids=["as published", "with CL ids"])
def test_side_files_read_back(tmp_path, cl_ids):
    genes = pd.DataFrame({"feature_name": ["CD4", "CD8A"], "feature_id": ["ENSG00000010610", "ENSG00000153563"]})
    lookups = {"cell_type": ["B cell", "T cell"], "assay": ["10x 3' v3"]}
    write_side_files(
        tmp_path,
        genes,
        lookups,
        class_weights=np.array([0.5, 2], dtype=np.float32),
        child_matrix=np.array([[True, False], [True, True]]),
        augmentations=np.array([[0.5, -1.5]]) if cl_ids else None,
        cl_ids=cl_ids,
    )
    assert pq.read_table(tmp_path / "var.parquet").to_pylist() == genes[["feature_id", "feature_name"]].to_dict(
        "records"
    )
    cell_type = {"label": ["B cell", "T cell"]} | ({"cl_id": cl_ids} if cl_ids else {})
    assert pq.read_table(tmp_path / "categorical_lookup" / "cell_type.parquet").to_pydict() == cell_type
    assert pq.read_table(tmp_path / "categorical_lookup" / "assay.parquet").to_pydict() == {"label": ["10x 3' v3"]}
    weights = np.load(tmp_path / "class_weights.npy")
    child_matrix = np.load(tmp_path / "cell_type_hierarchy" / "child_matrix.npy")
    assert (weights.dtype, weights.tolist()) == (np.float64, [0.5, 2.0])
    assert (child_matrix.dtype, child_matrix.tolist()) == (np.float64, [[1.0, 0.0], [1.0, 1.0]])
    assert (tmp_path / "augmentations.npy").exists() == (cl_ids is not None)


def test_a_store_gets_its_name_when_it_is_complete(tmp_path):
    destination = tmp_path / "new" / "store"
    with complete_or_absent(destination) as folder:
        assert folder.parent == destination.parent
        assert folder.name.startswith("store.partial-")
        assert not destination.exists()
        (folder / "file").touch()
    assert [path.name for path in destination.parent.iterdir()] == ["store"]
    assert (destination / "file").exists()


def test_a_store_that_fails_half_way_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "file").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), complete_or_absent(tmp_path / "store") as folder:
        fail(folder)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_store_is_never_replaced(tmp_path):
    destination = tmp_path / "store"
    with pytest.raises(StoreError, match="exists already"), complete_or_absent(destination):
        destination.mkdir()  # another process was quicker
    with pytest.raises(StoreError, match="exists already"), complete_or_absent(destination):
        pytest.fail("the block must not run")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
