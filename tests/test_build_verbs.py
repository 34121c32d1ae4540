"""The verbs build-store, ontology and new-studies, as a person runs them."""

import json
import re
import sys

import anndata
import numpy as np
import pandas as pd
import pytest
from small_census import small_census_counts, small_census_obs, small_census_var, write_small_census
from verbs import in_process

import hce_jax.__main__
from hce_jax.store import open_store
from hce_jax.store.split_cells import SplitTable

N_GENES = 150
FEW = ("--min-cells=20", "--min-tech-samples=5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two Censuses, A without and B with types of genes, and the cells of A as h5ad files, one for each study."""
    folder = tmp_path_factory.mktemp("verbs")
    var = small_census_var(N_GENES)
    for version, layout in (("A", "2023"), ("B", "2025")):
        obs = small_census_obs(version, donors=6, cells_per_donor=24)
        counts = small_census_counts(obs, N_GENES)
        write_small_census(folder / version, obs=obs, var=var, counts=counts, build_date="2025-01-01", layout=layout)
        if version == "A":
            (folder / "h5ad").mkdir()
            for study, rows in obs.groupby("dataset_id").indices.items():
                cells = obs.iloc[rows].assign(soma_joinid=rows).set_index(rows.astype(str))
                adata = anndata.AnnData(counts[rows], obs=cells, var=var.set_index("feature_id", drop=False))
                adata.write_h5ad(folder / "h5ad" / f"{study}.h5ad")
    var.iloc[::-1].to_csv(folder / "genes.csv", index=False)
    pd.DataFrame({"gene_names": var["feature_name"][:60]}).to_csv(folder / "names.csv", index=False)
    return folder


def run(monkeypatch, capsys, folder, *arguments):
    monkeypatch.chdir(folder)
    return in_process(monkeypatch, capsys, *map(str, arguments))


def joinids(store):
    splits = (store.split(name) for name in ("train", "val", "test"))
    return sorted(
        joinid
        for split in splits
        for index in range(len(split.block_sizes))
        for joinid in split.read_block(index, ("soma_joinid",)).column("soma_joinid").tolist()
    )


def test_build_store_says_what_it_did_and_what_comes_next(folder, monkeypatch, capsys):
    said = run(monkeypatch, capsys, folder, "build-store", "said", "--census-version=./B", *FEW, "--assays", "any")
    for line in (
        r" +\d+ +\d+   in Census at B",
        r" +\d+ +\d+   primary data",
        r" +\d+ +\d+   at least 5 tech_samples",
        r"note        native cell is cell in Cell Ontology 2026-03-26 \(obsolete, replaced\)",
        r"note        the published rule of at least 8 ancestors is off: Cell Ontology 2026-03-26 .*",
        r"store       said",
        r"cells       \d+ \(train \d+, val \d+, test \d+\)",
        r"types       9, Cell Ontology 2026-03-26 from cellxgene-ontology-guide [\d.]+",
        r"genes       120 of 120 are in Census at B",
        r"copies      24 cells have the counts of another cell; \d+ of them would lie in another split",
        r"augment     [\d,]+ vectors of [\d,]+ differences of \d+ means \(of a type in a tech_sample\), \d+ of .*",
        r"time        \d+ s to read and shuffle [\d,]+ cells, [\d,]+ cells/s",
        r"note        \d donor_id lie in more than one split, in different studies; .*",
        r"look at     said/data_summary.png",
        rf"next        DATA_PATH={folder}/said python train.py --config configs/tabnet_hce.py --config.batch_size=32",
    ):
        assert re.search(f"^{line}$", said, re.MULTILINE), (line, said)
    assert "of these assays" not in said
    about = json.loads((folder / "said" / "store.json").read_text())
    assert about["source"]["census_copy"] == "B"
    assert str(folder) not in json.dumps(about)


def test_every_rule_has_its_flag(folder, monkeypatch, capsys):
    rules = ("--include-secondary", "--tissues", "blood", "--assays", "10x 3' v3", "Smart-seq2", "--below=T cell")
    rest = ("--min-cells=1", "--min-tech-samples=1", "--min-ancestors=1", "--keep-copies", "--no-augmentations")
    said = run(monkeypatch, capsys, folder, "build-store", "ruled", "--census-version=./B", *rules, *rest, "--seed=3")
    obs = small_census_obs("B", donors=6, cells_per_donor=24)
    below = {"CD4-positive, alpha-beta T cell", "CD8-positive, alpha-beta T cell",
             "naive thymus-derived CD4-positive, alpha-beta T cell"}  # fmt: skip
    kept = obs[(obs["tissue_general"] == "blood") & obs["assay"].isin(["10x 3' v3", "Smart-seq2"])]
    kept = kept[kept["cell_type"].isin(below)]
    assert not kept["is_primary_data"].all()
    assert joinids(open_store(folder / "ruled")) == kept.index.tolist()
    assert "primary data" not in said
    assert json.loads((folder / "ruled" / "store.json").read_text())["seed"] == 3


def test_notes_tell_of_splits_and_donors_that_need_a_look(folder, monkeypatch, capsys):
    obs = small_census_obs("A", donors=6, cells_per_donor=24)
    table = pd.DataFrame({"tech_sample": (obs["dataset_id"] + "_" + obs["donor_id"]).unique(), "split": "train"})
    table.assign(split=["test" if name.endswith("D3") else "train" for name in table["tech_sample"]]).to_csv(
        folder / "samples.csv"
    )
    adata = anndata.read_h5ad(folder / "h5ad" / "lung.h5ad")
    adata.obs["donor_id"] = np.where(np.arange(adata.n_obs) < 7, None, adata.obs["donor_id"].astype(str))
    adata.write_h5ad(folder / "lung.h5ad")
    flags = ("--genes=all", "--min-cells=1", "--min-tech-samples=1", "--no-augmentations")
    said = run(monkeypatch, capsys, folder, "build-store", "noted", "--h5ad", "lung.h5ad", *flags)
    assert "\nnote        7 cells have no donor; they count as one donor of their study\n" in said
    assert "more than one split" not in said
    arguments = ("--census-version=./B", "--splits=samples.csv", *flags)
    said = run(monkeypatch, capsys, folder, "build-store", "no_val", *arguments)
    assert "\nnote        no cell goes into val; train.py needs val" in said
    assert "--config.augment_training_data=false\n" in said


def test_a_table_by_soma_joinid_needs_such_numbers(folder, monkeypatch, capsys):
    adata = anndata.read_h5ad(folder / "h5ad" / "lung.h5ad")
    adata.obs["soma_joinid"] = [*adata.obs["soma_joinid"][1:], adata.obs["soma_joinid"].iloc[-1]]
    adata.write_h5ad(folder / "twice.h5ad")
    pd.DataFrame({"soma_joinid": adata.obs["soma_joinid"][:9], "split": "train"}).to_csv(folder / "joinids.csv")
    arguments = ("--h5ad", "twice.h5ad", "--splits=joinids.csv", "--genes=all")
    monkeypatch.setattr(sys, "argv", ["hce_jax", "build-store", "new", *arguments])
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="2"):
        hce_jax.__main__.main()
    note, error = capsys.readouterr().err.splitlines()
    assert note.startswith("twice.h5ad: soma_joinid is left aside and cells are numbered")
    assert error.startswith("error: joinids.csv names cells by soma_joinid, but not every file of twice.h5ad has")


def test_h5ad_files_give_the_store_that_the_census_gives(folder, monkeypatch, capsys):
    plain = ("--no-augmentations", "--keep-copies")  # which of two copies comes first depends on the names of files
    for name, source in (("of_census", ("--census-version", "./A")), ("of_h5ad", ("--h5ad", "h5ad"))):
        genes = ("--genes", "genes.csv")
        run(monkeypatch, capsys, folder, "build-store", name, *source, *genes, *FEW, *plain)
    one, other = open_store(folder / "of_census"), open_store(folder / "of_h5ad")
    assert one.side.gene_ids == other.side.gene_ids == tuple(small_census_var(N_GENES)["feature_id"][::-1])
    assert one.side.labels == other.side.labels
    assert joinids(one) == joinids(other)
    assert not (folder / "of_h5ad" / "augmentations.npy").exists()


def test_names_of_genes_leave_them_in_the_order_of_the_source(folder, monkeypatch, capsys):
    arguments = ("--census-version=./A", "--genes=names.csv", *FEW, "--no-augmentations", "--format=merlin")
    run(monkeypatch, capsys, folder, "build-store", "named", *arguments)
    assert (folder / "named" / "train" / "part.0.parquet").is_file()
    assert open_store(folder / "named").side.gene_ids == tuple(small_census_var(60)["feature_id"])


def test_splits_may_lie_in_a_column_and_counts_in_a_layer(folder, monkeypatch, capsys):
    (folder / "split").mkdir()
    for path in (folder / "h5ad").iterdir():
        adata = anndata.read_h5ad(path)
        adata.layers["mine"], adata.X = adata.X.copy(), adata.X * 0
        adata.obs["mine"] = np.where(adata.obs["donor_id"].isin(["D0", "D1"]), "test", "train")
        adata.write_h5ad(folder / "split" / path.name)
    arguments = ("--h5ad", "split", "--counts=mine", "--split-column=mine", "--genes=all", *FEW, "--no-augmentations")
    run(monkeypatch, capsys, folder, "build-store", "by_column", *arguments)
    zeros = run(
        monkeypatch, capsys, folder, "build-store", "zeros", "--h5ad", "split", "--counts=X", "--genes=all", *FEW
    )
    assert "cells expresses any of the 150 genes of the store" in zeros
    assert not (folder / "zeros").exists()
    store = open_store(folder / "by_column")
    assert not store.has_split("val")
    donors = store.side.lookup("donor_id")
    split = store.split("test")
    for index in range(len(split.block_sizes)):
        codes = split.read_block(index, ("donor_id",)).column("donor_id")
        assert {donors[code] for code in codes} <= {"D0", "D1"}


def test_new_studies_are_those_that_the_store_does_not_know(folder, monkeypatch, capsys):
    arguments = ("--census-version=./A", "--genes=genes.csv", *FEW, "--no-augmentations")
    run(monkeypatch, capsys, folder, "build-store", "old", *arguments)
    run(monkeypatch, capsys, folder, "new-studies", "old", "unseen", "--census-version=./B")
    run(monkeypatch, capsys, folder, "new-studies", "old", "same", "--census-version=./B", "--old-census=./A")
    obs = small_census_obs("B", donors=6, cells_per_donor=24)
    labels = open_store(folder / "old").side.labels
    kept = obs[obs["dataset_id"].str.startswith("new-") & obs["is_primary_data"] & obs["cell_type"].isin(labels)]
    for name in ("unseen", "same"):
        [chunk] = (folder / name).glob("chunk_*.h5ad")
        assert anndata.read_h5ad(chunk).obs["soma_joinid"].tolist() == kept.index.tolist()
    again = run(monkeypatch, capsys, folder, "new-studies", "old", "unseen", "--census-version=./B")
    assert "unseen is there already; --force-download makes it anew" in again


def test_ontology_diff_prints_what_changes(folder, monkeypatch, capsys):
    run(monkeypatch, capsys, folder, "build-store", "typed", "--census-version=./B", *FEW, "--no-augmentations")
    (folder / "small.obo").write_text(
        "format-version: 1.2\ndata-version: cl/releases/2020-01-01/cl.owl\nontology: cl\n\n"
        "[Term]\nid: CL:0000000\nname: cell\n\n[Term]\nid: CL:0000084\nname: T lymphocyte\nis_a: CL:0000000\n"
    )
    same = run(monkeypatch, capsys, folder, "ontology", "diff", "typed")
    assert "2026-03-26" in same
    other = run(monkeypatch, capsys, folder, "ontology", "diff", "typed", "--ontology=small.obo")
    assert "T lymphocyte" in other
    assert "2020-01-01" in other


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "required: DESTINATION"),
        (("new",), "say where the cells are: either --census-version VERSION or --h5ad FILE"),
        (("new", "--census-version=./A", "--h5ad", "h5ad"), "say where the cells are: either"),
        (("new", "--census-version=./nowhere"), "nowhere"),
        (("new", "--census-version=./A", "--label-column=x"), "label are for --h5ad"),
        (("new", "--census-version=./A", "--split-column=x"), "split are for --h5ad"),
        (("new", "--census-version=./A"), "does not say which genes code for proteins"),
        (("new", "--census-version=./B", "--organism=mus_musculus"), "has no mus_musculus"),
        (("new", "--census-version=./B"), "no cell is left after the rule 'at least 5,000 cells'"),
        (
            ("new", "--census-version=./B", "--assays", "10x"),
            "no cell of Census at B has the assay '10x'; its",
        ),
        (("new", "--census-version=./B", "--below=nerve cells"), "nerve cell"),
        (("new", "--census-version=./B", "--ontology=1999"), "1999"),
        (("new", "--census-version=./B", "--genes=absent.csv"), "protein-coding or all) absent.csv does not exist"),
        (("new", "--census-version=./B", "--splits=absent.csv"), "the table of splits absent.csv does not exist"),
        (("new", "--census-version=./B", "--augment-vectors=0"), "--augment-vectors"),
        (("new", "--census-version=./B", "--workers=0"), "--workers=0: at least one is needed"),
        (("new", "--census-version=./B", "--min-cells=some"), "--min-cells: invalid int value"),
        (("new", "--h5ad", "absent.h5ad"), "absent.h5ad"),
        (("new", "--h5ad", "genes.csv"), "genes.csv"),
        (("new", "--h5ad", "h5ad", "--genes=all", "--label-column=label"), "label"),
        (("new", "--h5ad", "h5ad", "--genes=all", "--label-column=sex"), "male"),
        (("h5ad", "--census-version=./B"), "h5ad exists already; remove it or name another folder"),
    ],
)
def test_a_mistake_is_one_line(folder, arguments, says, monkeypatch, capsys):
    assert says in run(monkeypatch, capsys, folder, "build-store", *arguments)
    assert not (folder / "new").exists()
    assert not (folder / "new.partial").exists()


def test_the_blood_store_comes_back_from_its_cells(real_dir, tmp_path, monkeypatch, capsys):
    said = run(
        monkeypatch, capsys, tmp_path, "build-store", "blood", "--h5ad", real_dir / "h5ad_raw", "--min-cells=1",
        "--min-tech-samples=1", f"--genes={real_dir / 'pbmc_store' / 'var.parquet'}", "--format=merlin",
        f"--splits={real_dir / 'pbmc_store_cells.csv.gz'}", "--no-augmentations",
    )  # fmt: skip
    assert re.search(r"^cells       7,424 \(train 6,400, val 576, test 448\)$", said, re.MULTILINE)
    ours, theirs = open_store(tmp_path / "blood"), open_store(real_dir / "pbmc_store")
    assert ours.side.labels == theirs.side.labels
    np.testing.assert_array_equal(ours.side.reachability, theirs.side.reachability)
    np.testing.assert_array_equal(ours.side.class_weights(), theirs.side.class_weights())
    for name in ("train", "val", "test"):
        one, other = (expression(store.split(name)) for store in (ours, theirs))
        assert one.keys() == other.keys()
        for joinid, (label, x) in one.items():
            assert label == other[joinid][0]
            np.testing.assert_array_equal(x, other[joinid][1])
    assert len(SplitTable.read(real_dir / "pbmc_store_cells.csv.gz").table) == 7424


def expression(split):
    """Return label and expression of each cell, by its soma_joinid."""
    cells = {}
    for index in range(len(split.block_sizes)):
        block = split.read_block(index, ("soma_joinid", "cell_type"))
        rows = zip(block.column("cell_type").tolist(), block.x.toarray(), strict=True)
        cells |= dict(zip(block.column("soma_joinid").tolist(), rows, strict=True))
    return cells
