"""Studies of a Census, downloaded once: which folder, which cells, and when it is used again."""

import json
import shutil
from pathlib import Path

import anndata
import numpy as np
import pytest
from small_census import small_census_counts, small_census_obs, small_census_var, write_small_census

from hce_jax.census import chunks_folder, download, download_new_studies
from hce_jax.errors import ConfigError, SourceError, StoreError
from hce_jax.hierarchy.cell_ontology import CellOntology
from hce_jax.store import SideFiles

N_GENES = 40
LABELS = ("natural killer cell", "B cell", "T cell", "CD4-positive, alpha-beta T cell")
ONTOLOGY = CellOntology.open()


def obs_of(version):
    return small_census_obs(version, donors=3, cells_per_donor=8)


@pytest.fixture(scope="module")
def censuses(tmp_path_factory):
    """The Censuses A and B, a newer one, in one folder."""
    folder = tmp_path_factory.mktemp("censuses")
    for version in "AB":
        obs, var = obs_of(version), small_census_var(N_GENES)
        write_small_census(
            folder / version, obs=obs, var=var, counts=small_census_counts(obs, N_GENES), build_date="2023-12-15"
        )
    return folder


@pytest.fixture
def folder(censuses, tmp_path, monkeypatch):
    monkeypatch.chdir(censuses)
    return tmp_path


def side_files(genes=range(N_GENES)[::-2], labels=LABELS):
    var = small_census_var(N_GENES).iloc[list(genes)]
    ids, names = (tuple(var[name]) for name in ("feature_id", "feature_name"))
    return SideFiles(Path("model.ckpt"), ids, names, labels, None, np.eye(len(labels)), {})


def fetch(folder, side=None, **changes):
    options = {"census_version": "B", "dataset_ids": ["diff_A"], "ontology": ONTOLOGY} | changes
    return download_new_studies(side or side_files(), folder, **options)


def chosen(*studies):
    obs = obs_of("B")
    return obs[obs["dataset_id"].isin(studies) & obs["is_primary_data"] & obs["cell_type"].isin(LABELS)]


NEW = ("new-kidney", "new-atlas", "new-blood")


def test_the_studies_that_an_older_census_had_not_lie_in_the_published_folder(folder, capsys):
    made = fetch(folder)
    assert made == folder / "diff_A_B_chunks"
    assert {path.name for path in made.iterdir()} == {"chunk_0.h5ad", "new_studies.json"}
    chunk, expected = anndata.read_h5ad(made / "chunk_0.h5ad"), chosen(*NEW)
    assert chunk.obs["soma_joinid"].tolist() == expected.index.tolist()
    assert set(chunk.obs["dataset_id"]) == {*NEW}
    counts = small_census_counts(expected, N_GENES).toarray()[:, ::-2]
    assert (chunk.X.toarray() == counts).all()
    assert f"{len(expected):15,}   of the store's types" in capsys.readouterr().out


def test_named_studies_are_taken_whether_they_are_new_or_not(folder):
    one, several = fetch(folder, dataset_ids=["lung"]), fetch(folder, dataset_ids=("new-blood", "lung"))
    assert one == folder / "lung_B_chunks"
    assert several == chunks_folder(folder, {"lung", "new-blood"}, "somewhere/B/")
    assert several.name.startswith("2_studies_")
    assert several != chunks_folder(folder, {"lung", "new-kidney"}, "B")
    both = fetch(folder, dataset_ids=("diff_A", "lung"))
    for made, studies in ((one, ["lung"]), (several, ["lung", "new-blood"]), (both, ["lung", *NEW])):
        joinids = anndata.read_h5ad(made / "chunk_0.h5ad").obs["soma_joinid"].tolist()
        assert joinids == chosen(*studies).index.tolist()


def test_published_assays_are_taken_or_any(folder):
    with pytest.raises(SourceError, match=r"no cell is left after the rule 'of the named studies'"):
        fetch(folder, dataset_ids=["blood-smart"])
    made = fetch(folder, dataset_ids=["blood-smart"], assays=None)
    assert set(anndata.read_h5ad(made / "chunk_0.h5ad").obs["assay"]) == {"Smart-seq2"}


def test_what_is_there_is_used_without_a_census(folder, monkeypatch, capsys):
    made = fetch(folder)
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    capsys.readouterr()
    monkeypatch.setattr(download, "open_census", None)
    monkeypatch.setattr(download, "CensusSource", None)
    assert fetch(folder) == made
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before
    assert capsys.readouterr().out == ""
    for side, changes, says in (
        (side_files(range(9)), {}, "for other genes"),
        (side_files(labels=LABELS[::-1]), {}, "for other types"),
        (None, {"assays": None}, "with assays 10x 3' transcription profiling, .*, not any"),
        (None, {"ontology": CellOntology("2020-01-01", "", ONTOLOGY.terms)}, "with Cell Ontology .*, not 2020-01-01"),
    ):
        with pytest.raises(StoreError, match=rf"diff_A_B_chunks was made {says}; --force-download makes it anew"):
            fetch(folder, side, **changes)
    (made / "chunk_0.h5ad").unlink()
    with pytest.raises(StoreError, match=r"diff_A_B_chunks lacks chunk_0.h5ad of the 1 files"):
        fetch(folder)


def test_it_is_made_anew_if_that_is_asked_for(folder):
    made = fetch(folder)
    again = fetch(folder, side_files(range(9)), force=True)
    assert again == made
    assert anndata.read_h5ad(made / "chunk_0.h5ad").n_vars == 9
    request = json.loads((made / "new_studies.json").read_text())["request"]
    assert request["studies"] == ["diff_A"]
    assert str(folder) not in json.dumps(request)


def test_an_interrupted_download_goes_on(folder, monkeypatch):
    def killed(self, rows, alignments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(download.CensusSource, "read_counts", killed)
        with pytest.raises(KeyboardInterrupt, match=r"0 of 1 files are finished and kept in .*diff_A_B_chunks.partial"):
            fetch(folder)
    assert [path.name for path in folder.iterdir()] == ["diff_A_B_chunks.partial"]
    assert [path.name for path in fetch(folder).parent.iterdir()] == ["diff_A_B_chunks"]


def test_mistakes_are_told_before_cells_are_read(folder, monkeypatch):
    with pytest.raises(ConfigError, match="no study is named"):
        fetch(folder, dataset_ids=())
    with pytest.raises(SourceError, match="nowhere"):
        fetch(folder, dataset_ids=["diff_./nowhere"])
    monkeypatch.setattr(download.CensusSource, "obs_batches", None)
    with pytest.raises(SourceError, match=r"Census at B has no study 'lungs' or 'new'; name a dataset_id of it"):
        fetch(folder, dataset_ids=["new", "lung", "lungs"])
    assert [*folder.iterdir()] == []


def test_a_copy_goes_by_the_last_part_of_its_path(censuses, tmp_path):
    shutil.copytree(censuses / "A", tmp_path / "copies" / "2023-05-15")
    made = fetch(
        tmp_path, census_version=str(censuses / "B"), dataset_ids=[f"diff_{tmp_path / 'copies' / '2023-05-15'}"]
    )
    assert made == tmp_path / "diff_2023-05-15_B_chunks"
