import csv
import importlib.util
import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.utils.class_weight import compute_class_weight

from hce_jax.errors import StoreError
from hce_jax.store import simulate

SCALE = 0.1  # 33 cells per donor
SPLITS = ("train", "val", "test")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    destination = tmp_path_factory.mktemp("simulated") / "atlas"
    simulate.simulate_atlas(destination, scale=SCALE)
    return destination


@pytest.fixture(scope="module")
def ancestors() -> dict[str, set[str]]:
    """For each label its ancestors' labels, by walking up the table."""
    lines = (ROOT / "hce_jax" / "store" / "simulated_cell_types.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    label = {row["cl_id"]: row["label"] for row in rows}
    parents = {row["cl_id"]: [cl_id for cl_id in row["parents"].split(";") if cl_id] for row in rows}
    result = {}
    for cl_id in label:
        waiting, above = list(parents[cl_id]), set()
        while waiting:
            above.add(waiting[0])
            waiting += parents[waiting.pop(0)]
        result[label[cl_id]] = {label[ancestor] for ancestor in above}
    return result


def labels(store: Path, column: str) -> np.ndarray:
    return np.array(pq.read_table(store / "categorical_lookup" / f"{column}.parquet")["label"].to_pylist())


def read_split(store: Path, split: str) -> pa.Table:
    n_parts = len(list((store / split).iterdir()))
    return pa.concat_tables([pq.read_table(store / split / f"part.{part}.parquet") for part in range(n_parts)])


def expression(table: pa.Table) -> np.ndarray:
    return table["X"].combine_chunks().values.to_numpy().reshape(table.num_rows, -1)


def test_the_table_of_types_is_what_the_ontology_package_says():
    path = ROOT / "tools" / "simulated_cell_types.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert simulate.CELL_TYPES_FILE.read_text(encoding="utf-8") == tool.table_text()
    assert simulate.CELL_TYPES_FILE == tool.TABLE


def test_the_store_says_that_it_is_simulated_and_how_many_cells_it_has(store):
    said = json.loads((store / "store.json").read_text())
    assert said["format"] == "merlin"
    assert said["simulated"] is True
    assert said["note"].startswith("SIMULATED")
    assert said["ontology_release"].startswith("v20")
    assert said["splits"] == {"train": {"cells": 12 * 6 * 33}, "val": {"cells": 12 * 33}, "test": {"cells": 12 * 33}}
    for split in SPLITS:
        assert read_split(store, split).num_rows == said["splits"][split]["cells"]
    assert sum(study["cells"] for study in said["ood"].values()) == 4 * 4 * 33


def test_no_donor_is_in_two_splits_and_every_study_is_in_all(store):
    tables = {split: read_split(store, split) for split in SPLITS}
    donors = [set(table["donor_id"].to_pylist()) for table in tables.values()]
    assert not donors[0] & donors[1] | donors[0] & donors[2] | donors[1] & donors[2]
    assert sum(map(len, donors)) == len(labels(store, "donor_id")) == 12 * 8
    for table in tables.values():
        assert set(table["dataset_id"].to_pylist()) == set(range(12))


def test_tech_sample_is_study_and_donor(store):
    table = read_split(store, "train")
    study, donor, sample = (labels(store, name)[table[name]] for name in ("dataset_id", "donor_id", "tech_sample"))
    assert sample.tolist() == [f"{s}_{d}" for s, d in zip(study, donor, strict=True)]


def test_a_cell_has_one_id_in_the_whole_atlas(store):
    ids = [read_split(store, split)["soma_joinid"].to_numpy() for split in SPLITS]
    ids += [anndata.read_h5ad(path).obs["soma_joinid"].to_numpy() for path in (store / "ood").iterdir()]
    assert len(np.unique(np.concatenate(ids))) == sum(map(len, ids))


@pytest.mark.parametrize("split", SPLITS)
def test_the_values_are_size_factor_log1p_of_whole_counts(store, split):
    scaled = np.expm1(expression(read_split(store, split)).astype(np.float64))
    np.testing.assert_allclose(scaled.sum(axis=1), 10_000, rtol=1e-5)
    one_count = np.where(scaled > 0, scaled, np.inf).min(axis=1, keepdims=True)
    counts = scaled / one_count  # every simulated cell has a gene with a single count
    np.testing.assert_allclose(counts, np.rint(counts), atol=2e-3)
    np.testing.assert_allclose(counts.sum(axis=1), 10_000 / one_count[:, 0], rtol=1e-5)


def test_about_a_tenth_of_the_values_are_not_zero(store):
    x = expression(read_split(store, "train"))
    assert x.shape == (2376, 2000)
    assert 0.08 < (x > 0).mean() < 0.12


def test_the_side_files_agree_in_size(store):
    n_types = len(labels(store, "cell_type"))
    assert 40 <= n_types <= 60
    assert labels(store, "cell_type").tolist() == sorted(labels(store, "cell_type"))
    assert np.load(store / "cell_type_hierarchy" / "child_matrix.npy").shape == (n_types, n_types)
    assert pq.read_table(store / "var.parquet").num_rows == 2000
    assert pq.read_table(store / "var.parquet")["feature_id"][0].as_py() == "SIMG00000000001"
    assert not {name.as_py()[:4] for name in pq.read_table(store / "var.parquet")["feature_id"]} - {"SIMG"}


def test_the_child_matrix_holds_exactly_the_walks_up_the_table(store, ancestors):
    child_matrix = np.load(store / "cell_type_hierarchy" / "child_matrix.npy")
    names = labels(store, "cell_type")
    expected = [[float(above == name or above in ancestors[name]) for name in names] for above in names]
    assert child_matrix.dtype == np.float64
    assert child_matrix.tolist() == expected
    deepest = max(len(above) for above in ancestors.values())
    assert deepest >= 6  # and some types have ancestors along two ways


def test_the_class_weights_are_scikit_learns_balanced_ones(store):
    label = read_split(store, "train")["cell_type"].to_numpy()
    classes = np.arange(len(labels(store, "cell_type")))
    expected = compute_class_weight("balanced", classes=classes, y=label)
    np.testing.assert_allclose(np.load(store / "class_weights.npy"), expected, rtol=1e-12)


def test_augmentation_vectors_are_cut_differences_of_means_within_a_type(store):
    vectors = np.load(store / "augmentations.npy")
    assert vectors.dtype == np.float32
    assert np.abs(vectors).max() <= 1.5
    assert np.abs(vectors[vectors != 0]).min() >= 0.25
    train = read_split(store, "train")
    x = expression(train)
    cells = (
        pd.DataFrame({"type": train["cell_type"], "sample": train["tech_sample"]}).groupby(["type", "sample"]).indices
    )
    means = {}
    for (cell_type, _), rows in cells.items():
        if len(rows) >= simulate.MIN_CELLS_PER_MEAN:
            means.setdefault(cell_type, []).append(x[rows].mean(axis=0))
    possible = [a - b for same_type in means.values() for a in same_type for b in same_type if a is not b]
    possible = np.array([np.where(np.abs(d) < 0.25, 0, d).clip(-1.5, 1.5) for d in possible])
    for vector in vectors[:20]:
        assert (np.isclose(possible, vector, atol=1e-5).mean(axis=1) > 0.999).any()  # at 0.25 rounding may decide


def test_a_study_names_every_cell_by_its_finest_type_or_an_ancestor(ancestors):
    world = simulate.draw_world(simulate.read_cell_types())
    names = np.array(world.types.labels)
    coarse = []
    for number in range(simulate.N_STUDIES):
        _, obs = simulate.simulate_study(number, world, ["train"], cells_per_donor=100)
        pairs = list(zip(names[obs["leaf"]], obs["cell_type"], strict=True))
        assert all(label == leaf or label in ancestors[leaf] for leaf, label in pairs)
        assert not set(names[obs["leaf"]]) & set().union(*ancestors.values())  # cells are born as leaves
        coarse.append(np.mean([label != leaf for leaf, label in pairs]))
    assert min(coarse) < 0.25 < 0.6 < max(coarse)  # studies differ in how finely they name


def test_new_studies_are_as_a_download_of_the_census_would_be(store, ancestors):
    cl_id = pq.read_table(store / "categorical_lookup" / "cell_type.parquet").to_pandas().set_index("label")["cl_id"]
    paths = sorted((store / "ood").iterdir())
    assert len(paths) == 4
    finest = []
    for path in paths:
        adata = anndata.read_h5ad(path)
        assert (np.rint(adata.X.data) == adata.X.data).all()
        assert adata.X.data.min() >= 1
        assert adata.var[["feature_id", "feature_name"]].equals(
            pq.read_table(store / "var.parquet").to_pandas().set_axis(adata.var_names)
        )
        obs = adata.obs
        assert cl_id[obs["cell_type"].astype(str)].tolist() == obs["cell_type_ontology_term_id"].tolist()
        assert set(obs["dataset_id"]) == {path.stem}
        assert not set(obs["dataset_id"]) & set(labels(store, "dataset_id"))
        assert not set(obs["donor_id"]) & set(labels(store, "donor_id"))
        for column in ("assay", "development_stage", "disease", "tissue", "tissue_general"):
            assert obs[column].astype(str).str.len().min() > 0
        assert obs["is_primary_data"].dtype == bool
        finest.append(not set(obs["cell_type"]) & set().union(*ancestors.values()))
    assert finest[0]
    assert not finest[3]


def test_the_same_atlas_comes_out_every_time(store, tmp_path, capfd):
    simulate.simulate_atlas(tmp_path / "again", scale=SCALE)
    assert capfd.readouterr() == ("", "")
    for path in sorted(store.rglob("*")):
        again = tmp_path / "again" / path.relative_to(store)
        if path.suffix == ".h5ad":
            first, second = anndata.read_h5ad(path), anndata.read_h5ad(again)
            assert (first.X != second.X).nnz == 0
            assert first.obs.equals(second.obs)
        elif path.is_file():
            assert path.read_bytes() == again.read_bytes(), path


def test_an_atlas_too_small_for_its_types_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"no training cell of .*simulate a larger atlas"):
        simulate.simulate_atlas(tmp_path / "atlas", scale=0.01)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_before_any_work(store, monkeypatch):
    monkeypatch.setattr(simulate, "draw_world", None)
    with pytest.raises(StoreError, match="exists already"):
        simulate.simulate_atlas(store)
