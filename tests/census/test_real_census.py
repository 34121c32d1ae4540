"""The real Census: HCE_CENSUS is a version to read from the network ("2023-05-15"), or the folder of a copy."""

import os

import cellxgene_census
import numpy as np
import pytest

from hce_jax.census import CensusSource, dataset_ids, open_census
from hce_jax.errors import SourceError
from hce_jax.store.cell_source import TEXT_COLUMNS

#: By build date: human cells, studies of all organisms (documentation of the Census, "Census data releases").
PUBLISHED = {"2023-05-15": (53_794_728, 562)}


@pytest.fixture(scope="module")
def source():
    version = os.environ.get("HCE_CENSUS")
    if not version:
        pytest.skip('HCE_CENSUS is not set: name a version ("2023-05-15") or the folder of a copy')
    with CensusSource(version) as source:
        yield source


def test_it_has_the_published_numbers_of_cells_and_studies(source):
    about = source.about()
    if about["census_build_date"] not in PUBLISHED:
        pytest.skip(f"no published numbers are known here of {source.title}")
    found = about["cells"], len(dataset_ids(source.census))
    assert found == PUBLISHED[about["census_build_date"]]


@pytest.mark.filterwarnings("ignore:Transforming to str index")
def test_cells_are_those_that_cellxgene_census_gives(source):
    rows = np.array([0, 1, 5000, source.about()["cells"] // 2])
    theirs = cellxgene_census.get_anndata(source.census.soma, "homo_sapiens", obs_coords=rows.tolist())
    theirs = theirs[np.argsort(theirs.obs["soma_joinid"].to_numpy())]
    ids = source.genes()["feature_id"].to_list()[::-1]
    counts = source.read_counts(rows, source.align(ids, ids))
    np.testing.assert_array_equal(counts.toarray(), theirs.X.toarray()[:, ::-1])
    cells = next(source.obs_batches())
    for name in TEXT_COLUMNS:
        assert cells[name].iloc[rows[:3]].to_list() == theirs.obs[name].to_list()[:3]


def test_an_unknown_version_is_told_with_those_there_are(source):
    if source.census.version is None:
        pytest.skip("HCE_CENSUS is a copy: versions are not looked up")
    with pytest.raises(SourceError, match=r"2023-05-15 \(LTS"), open_census("2023-05-16"):
        pass
