"""Stores built from small Censuses, against what pandas, scanpy and scikit-learn make of the same cells."""

import dataclasses
import filecmp
import json

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scanpy
import scipy.sparse as sp
from cellxgene_ontology_guide.ontology_parser import OntologyParser
from fits import fit_one
from sklearn.utils.class_weight import compute_class_weight
from small_census import (
    TERM_IDS,
    small_census_counts,
    small_census_obs,
    small_census_var,
    write_small_census,
)

from configs import mlp_hce
from hce_jax.census import CensusSource
from hce_jax.errors import SourceError, StoreError
from hce_jax.hierarchy.cell_ontology import CellOntology
from hce_jax.store import SPLITS, open_store
from hce_jax.store.augmentations import AugmentationOptions
from hce_jax.store.build import Recipe, build_store
from hce_jax.store.merlin_write import PART_SCHEMA
from hce_jax.store.schema import CATEGORICAL_COLUMNS
from hce_jax.store.selection import PUBLISHED_ASSAYS, Rules
from hce_jax.store.split_cells import SplitTable

N_GENES = 150
RULES = Rules(min_cells=20, min_tech_samples=5)
ALL = Rules(min_cells=1, min_tech_samples=1)
RECIPE = Recipe(rules=RULES, augmentations=None)
#: Small parts and chunks, so that there are several.
SIZES = {"cells_per_part": 64, "cells_per_chunk": 50}


@pytest.fixture(scope="module")
def ontology():
    return CellOntology.open()


@pytest.fixture(scope="module")
def census(tmp_path_factory):
    """A Census in the newer layout, with its obs and counts."""
    obs, var = small_census_obs("A", donors=6, cells_per_donor=24), small_census_var(N_GENES)
    counts = small_census_counts(obs, N_GENES)
    path = tmp_path_factory.mktemp("census") / "A"
    write_small_census(path, obs=obs, var=var, counts=counts, build_date="2025-01-01", layout="2025")
    return path, obs, var, counts


def chosen(obs, with_copies):
    """Choose the cells by plain pandas."""
    kept = obs[obs["is_primary_data"] & obs["assay"].isin(PUBLISHED_ASSAYS) & (obs["cell_type"] != "unknown")]
    of_type = (kept["dataset_id"] + kept["donor_id"]).groupby(kept["cell_type"])
    common = (of_type.size() >= RULES.min_cells) & (of_type.nunique() >= RULES.min_tech_samples)
    kept = kept[kept["cell_type"].map(common)]
    return kept if with_copies else kept.drop_duplicates("cell")


def read(store):
    """Read all of a store: for each split expression (n, g) and integer columns."""
    columns = ("soma_joinid", "is_primary_data", *CATEGORICAL_COLUMNS, "idx")
    out = {}
    for name in SPLITS:
        split = store.split(name)
        blocks = [split.read_block(index, columns) for index in range(len(split.block_sizes))]
        x = sp.vstack([block.x for block in blocks]).toarray()
        out[name] = x, pd.DataFrame({column: np.concatenate([b.column(column) for b in blocks]) for column in columns})
    return out


def build(path, destination, ontology, recipe=RECIPE, **options):
    with CensusSource(str(path)) as source:
        return build_store(source, destination, recipe, ontology=ontology, **{**SIZES, **options})


@pytest.fixture(scope="module", params=["cells", "merlin"])
def built(request, census, ontology, tmp_path_factory):
    destination = tmp_path_factory.mktemp("built") / request.param
    recipe = dataclasses.replace(RECIPE, format=request.param)
    return build(census[0], destination, ontology, recipe)


def test_the_cells_are_those_of_the_rules(built, census):
    _, obs, _, _ = census
    expected = chosen(obs, with_copies=False)
    splits = read(open_store(built.store))
    joinids = np.concatenate([frame["soma_joinid"] for _, frame in splits.values()])
    assert sorted(joinids) == expected.index.tolist()
    copies = chosen(obs, with_copies=True)
    assert built.copies.cells == len(copies) - len(expected) > 0
    assert built.cells == {name: len(frame) for name, (_, frame) in splits.items()}
    primary = obs[obs["is_primary_data"]]
    of_10x = primary[primary["assay"].isin(PUBLISHED_ASSAYS)]
    labelled = of_10x[of_10x["cell_type"] != "unknown"]
    after = [obs, primary, of_10x, labelled, labelled, copies, copies]
    steps = [(step.cells, step.types) for step in built.selection.steps]
    assert steps == [(len(each), each["cell_type"].nunique()) for each in after]


def test_values_are_those_of_scanpy(built, census):
    _, _, var, counts = census
    coding = (var["feature_type"] == "protein_coding").to_numpy()
    for x, frame in read(open_store(built.store)).values():
        theirs = counts[frame["soma_joinid"].to_numpy()][:, np.flatnonzero(coding)]
        adata = anndata.AnnData(sp.csr_matrix(theirs))
        scanpy.pp.normalize_total(adata, target_sum=1e4)
        scanpy.pp.log1p(adata)
        np.testing.assert_allclose(x, adata.X.toarray(), rtol=0, atol=1e-6)


def test_words_and_codes_agree_with_obs(built, census):
    _, obs, var, _ = census
    store = open_store(built.store)
    for _, frame in read(store).values():
        theirs = obs.loc[frame["soma_joinid"]].reset_index(drop=True)
        theirs["tech_sample"] = theirs["dataset_id"] + "_" + theirs["donor_id"]
        for column in CATEGORICAL_COLUMNS:
            labels = store.side.lookup(column)
            assert list(labels) == sorted(labels)
            assert [labels[code] for code in frame[column]] == theirs[column].tolist()
        assert frame["idx"].tolist() == list(range(len(frame)))
        assert frame["is_primary_data"].all()
    assert store.side.cl_ids == tuple(TERM_IDS[label] for label in store.side.labels)
    assert list(store.side.gene_ids) == var["feature_id"][var["feature_type"] == "protein_coding"].tolist()


def test_the_hierarchy_is_that_of_the_ontology(built):
    side = open_store(built.store).side
    guide = OntologyParser(schema_version="v7.1.0")
    for row, above in enumerate(side.cl_ids):
        below = [above in guide.get_term_ancestors(cl_id, include_self=True) for cl_id in side.cl_ids]
        assert side.reachability[row].astype(bool).tolist() == below
    assert side.reachability.sum() > side.n_types
    assert side.about["ontology_release"] == "2026-03-26"


def test_splits_are_by_tech_sample_and_weights_are_balanced(built):
    splits = read(open_store(built.store))
    samples = {name: set(frame["tech_sample"]) for name, (_, frame) in splits.items()}
    n_samples = sum(map(len, samples.values()))
    assert n_samples == len(set.union(*samples.values()))
    assert [len(samples[name]) for name in ("val", "test")] == [int(np.ceil(0.15 * n_samples))] * 2
    train = splits["train"][1]["cell_type"].to_numpy()
    expected = compute_class_weight("balanced", classes=np.unique(train), y=train)
    np.testing.assert_allclose(open_store(built.store).side.class_weights(), expected, rtol=1e-6)


def test_parts_are_full_and_no_study_stays_together(built):
    suffix = "arrow" if open_store(built.store).side.about["format"] == "cells" else "parquet"
    for name in SPLITS:
        n_parts = len(list((built.store / name).glob(f"part.*.{suffix}")))
        assert n_parts == -(-built.cells[name] // SIZES["cells_per_part"])
    frame = read(open_store(built.store))["train"][1]
    study = frame["dataset_id"].to_numpy()
    together = (study[1:] == study[:-1]).mean()
    expected = (np.bincount(study) ** 2).sum() / len(study) ** 2
    assert abs(together - expected) < 4 * np.sqrt(expected * (1 - expected) / len(study))


def test_the_merlin_format_is_the_published_one(census, ontology, tmp_path):
    recipe = dataclasses.replace(RECIPE, format="merlin")
    built = build(census[0], tmp_path / "merlin", ontology, recipe, cells_per_part=2048)
    part = pq.ParquetFile(built.store / "train" / "part.0.parquet")
    assert part.schema_arrow == PART_SCHEMA
    groups = [part.metadata.row_group(index).num_rows for index in range(part.num_row_groups)]
    assert sum(groups) == built.cells["train"]
    assert set(groups[:-1]) <= {1024}


def test_copies_may_be_kept(census, ontology, tmp_path):
    built = build(census[0], tmp_path / "store", ontology, dataclasses.replace(RECIPE, keep_copies=True))
    joinids = np.concatenate([frame["soma_joinid"] for _, frame in read(open_store(built.store)).values()])
    assert sorted(joinids) == chosen(census[1], with_copies=True).index.tolist()


def test_the_same_call_gives_the_same_store(census, ontology, tmp_path):
    one, other = (build(census[0], tmp_path / name, ontology).store for name in ("one", "other"))
    compared = filecmp.dircmp(one, other)
    assert not compared.left_only
    for split in SPLITS:
        names = [path.name for path in (one / split).iterdir()]
        assert filecmp.cmpfiles(one / split, other / split, names, shallow=False) == (names, [], [])
    seeded = build(census[0], tmp_path / "seeded", ontology, dataclasses.replace(RECIPE, seed=2))
    assert read(open_store(seeded.store))["train"][1]["soma_joinid"].tolist() != (
        read(open_store(one))["train"][1]["soma_joinid"].tolist()
    )


@pytest.mark.parametrize("fails_at", [1, 4, 9])
def test_a_killed_build_goes_on(census, ontology, tmp_path, monkeypatch, fails_at):
    undisturbed = build(census[0], tmp_path / "undisturbed", ontology, workers=1)
    reads = []
    read_counts = CensusSource.read_counts

    def failing(self, rows, alignments):
        reads.append(len(rows))
        if len(reads) == fails_at:
            raise SourceError("the network is gone")
        return read_counts(self, rows, alignments)

    monkeypatch.setattr(CensusSource, "read_counts", failing)
    with pytest.raises(SourceError, match="the network is gone"):
        build(census[0], tmp_path / "store", ontology, workers=1)
    assert not (tmp_path / "store").exists()
    n_before = len(reads)
    built = build(census[0], tmp_path / "store", ontology, workers=1)
    assert len(reads) - n_before == undisturbed.new_cells // 50 + 1 - (fails_at - 1)
    for split in SPLITS:
        names = [path.name for path in (built.store / split).iterdir()]
        same = filecmp.cmpfiles(built.store / split, undisturbed.store / split, names, shallow=False)
        assert same == (names, [], [])
    assert not (tmp_path / "store.partial").exists()


def test_another_choice_does_not_go_on_with_what_was_begun(census, ontology, tmp_path, monkeypatch):
    monkeypatch.setattr(CensusSource, "read_counts", lambda *_: (_ for _ in ()).throw(SourceError("no")))
    with pytest.raises(SourceError, match="no"):
        build(census[0], tmp_path / "store", ontology)
    with pytest.raises(
        StoreError, match=r"was begun with another choice of cells and genes .* name another destination"
    ):
        build(census[0], tmp_path / "store", ontology, dataclasses.replace(RECIPE, rules=ALL))


def test_splits_may_be_given(census, ontology, tmp_path):
    _, obs, _, _ = census
    table = tmp_path / "splits.csv"
    blood = {"blood-v3": "train", "blood-v2": "val", "lung": "test"}
    pd.DataFrame({"dataset_id": list(blood), "split": list(blood.values())}).to_csv(table)
    built = build(census[0], tmp_path / "store", ontology, splits=SplitTable.read(table))
    expected = chosen(obs, with_copies=False)
    for name, (_, frame) in read(open_store(built.store)).items():
        theirs = expected[expected["dataset_id"].map(blood) == name]
        assert sorted(frame["soma_joinid"]) == theirs.index.tolist()


def test_an_empty_result_names_the_rule(census, ontology, tmp_path):
    rules = dataclasses.replace(RULES, min_cells=1_000_000)
    with pytest.raises(SourceError, match=r"no cell is left after the rule 'at least 1,000,000 cells'.*below cell \d+"):
        build(census[0], tmp_path / "store", ontology, Recipe(rules=rules))
    assert not list(tmp_path.iterdir())


def test_without_training_cells_there_is_no_store(census, ontology, tmp_path):
    table = tmp_path / "splits.csv"
    pd.DataFrame({"dataset_id": ["lung"], "split": ["test"]}).to_csv(table)
    recipe = dataclasses.replace(RECIPE, rules=ALL)
    with pytest.raises(SourceError, match="none of the 144 cells that are left goes into train"):
        build(census[0], tmp_path / "store", ontology, recipe, splits=SplitTable.read(table))


def test_a_type_without_training_cells_has_weight_0_and_is_named(census, ontology, tmp_path):
    _, obs, _, _ = census
    kept = chosen(obs, with_copies=False)
    table = pd.DataFrame({"soma_joinid": kept.index, "split": np.where(kept["cell_type"] == "B cell", "val", "train")})
    table.to_csv(tmp_path / "splits.csv")
    built = build(census[0], tmp_path / "store", ontology, splits=SplitTable.read(tmp_path / "splits.csv"))
    side = open_store(built.store).side
    assert built.untrained == ("B cell",)
    assert side.class_weights()[side.labels.index("B cell")] == 0
    assert (np.delete(side.class_weights(), side.labels.index("B cell")) > 0).all()


def test_a_built_store_trains(census, ontology, tmp_path):
    vectors = AugmentationOptions(cells=200, clusters=3, vectors=20)
    recipe = dataclasses.replace(RECIPE, augmentations=vectors)
    store = build(census[0], tmp_path / "store", ontology, recipe).store
    assert (store / "data_summary.png").is_file()
    about = json.loads((store / "store.json").read_text())
    assert about["side_files"]["augmentations.npy"]["bytes"] == (store / "augmentations.npy").stat().st_size
    config = mlp_hce.get_config()
    config.update(data_path=str(store), batch_size=32, max_epochs=3, hidden_size=16, n_hidden=1, learning_rate=0.02)
    assert fit_one(config).val_f1_macro > 0.3
