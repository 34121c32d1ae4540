"""The flags of new-studies that say which studies, as a person gives them."""

import anndata
import numpy as np
import pytest
from small_census import small_census_counts, small_census_obs, small_census_var, write_small_census
from verbs import in_process

from hce_jax.store.merlin_write import write_side_files
from hce_jax.store.schema import CATEGORICAL_COLUMNS

N_GENES = 30
LABELS = ("natural killer cell", "B cell", "T cell")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two Censuses, and the side files of a store, which does not say what its source had."""
    folder = tmp_path_factory.mktemp("verb")
    var = small_census_var(N_GENES)
    for version in "AB":
        obs = small_census_obs(version, donors=2, cells_per_donor=8)
        counts = small_census_counts(obs, N_GENES)
        write_small_census(folder / version, obs=obs, var=var, counts=counts, build_date="2025-01-01")
    lookups = {name: LABELS if name == "cell_type" else ["lung"] for name in CATEGORICAL_COLUMNS}
    write_side_files(folder / "store", var, lookups, class_weights=np.ones(3), child_matrix=np.eye(3))
    return folder


@pytest.mark.parametrize(
    ("flags", "studies"),
    [
        (["--dataset-ids", "lung", "new-blood"], {"lung", "new-blood"}),
        (["--dataset-ids", "lung,new-blood"], {"lung", "new-blood"}),
        (["--dataset-ids=diff_A"], {"new-kidney", "new-atlas", "new-blood"}),
        (["--old-census=A"], {"new-kidney", "new-atlas", "new-blood"}),
        (["--dataset-ids", "lung", "--old-census=A"], {"lung", "new-kidney", "new-atlas", "new-blood"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_studies_are_those_that_the_flags_name(folder, tmp_path, monkeypatch, capsys, flags, studies):
    monkeypatch.chdir(folder)
    said = in_process(
        monkeypatch, capsys, "new-studies", "store", str(tmp_path / "new"), "--census-version=./B", *flags
    )
    assert set(anndata.read_h5ad(tmp_path / "new" / "chunk_0.h5ad").obs["dataset_id"]) == studies
    assert "which studies" not in said


def test_a_study_that_is_not_there_is_one_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    flags = ("--census-version=./B", "--dataset-ids", "lungs")
    said = in_process(monkeypatch, capsys, "new-studies", "store", str(tmp_path / "new"), *flags)
    assert "no cell of Census at B is of the study 'lungs'; studies go by their dataset_id, such as atlas," in said
    assert [*tmp_path.iterdir()] == []
