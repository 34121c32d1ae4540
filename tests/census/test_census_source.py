"""Cells and counts of a Census, against what cellxgene_census itself reads and against what was written."""

import json
from concurrent.futures import ThreadPoolExecutor

import cellxgene_census
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiledbsoma
from scipy import sparse
from small_census import small_census_counts, small_census_obs, small_census_var, write_small_census

from hce_jax.census import CensusSource
from hce_jax.census import open as census_open
from hce_jax.census import source as census_source
from hce_jax.errors import SourceError
from hce_jax.store.cell_source import TERM_COLUMN, TEXT_COLUMNS

N_GENES = 40
EMPTY = (0, 100, 101, -1)


def small_cells():
    """The cells of both layouts: some say nothing of a disease or of being primary, some express nothing."""
    obs = small_census_obs("A")
    obs.loc[[3, 70], "disease"] = None
    obs["is_primary_data"] = obs["is_primary_data"].astype("boolean")
    obs.loc[5, "is_primary_data"] = None
    counts = small_census_counts(obs, N_GENES).toarray()
    counts[list(EMPTY)] = 0
    return obs, sparse.csr_array(counts)


@pytest.fixture(scope="module", params=["2023", "2025"])
def small(request, tmp_path_factory):
    """A small Census in either layout: its folder, obs and counts."""
    obs, counts = small_cells()
    path = tmp_path_factory.mktemp("copies") / f"census {request.param}"
    var = small_census_var(N_GENES)
    write_small_census(path, obs=obs, var=var, counts=counts, build_date="2023-05-15", layout=request.param)
    return path, obs, counts


@pytest.fixture
def source(small):
    with CensusSource(str(small[0])) as source:
        yield source


@pytest.fixture
def read_in_pieces(monkeypatch):
    """Let tiles, queries and batches be so small that the small Census has many of each."""
    monkeypatch.setattr(census_source, "_TILE", 16)
    monkeypatch.setattr(census_source, "_CELLS", 32)
    monkeypatch.setattr(census_source, "_OBS_ROWS", 50)


SHUFFLED = np.random.default_rng(0).permutation(N_GENES)


def our_genes():
    """Three quarters of its genes in another order, and between them some that it lacks."""
    ids = [f"ENSG{1000 + gene:011d}" for gene in SHUFFLED[:30]]
    return [*ids[:10], "ENSG99999999998", *ids[10:], "ENSG99999999999"]


def expected_counts(counts, rows):
    """The same, gene by gene."""
    theirs = {f"ENSG{1000 + gene:011d}": gene for gene in range(N_GENES)}
    dense = np.zeros((len(rows), len(our_genes())), np.float32)
    for column, name in enumerate(our_genes()):
        if name in theirs:
            dense[:, column] = counts.toarray()[rows, theirs[name]]
    return dense


def test_the_genes_come_by_soma_joinid_with_their_type_where_it_is_known(small, source):
    expected = small_census_var(N_GENES)[["feature_id", "feature_name", "feature_type"]]
    if small[0].name.endswith("2023"):
        expected = expected.drop(columns="feature_type")
    pd.testing.assert_frame_equal(source.genes(), expected, check_dtype=False)


@pytest.mark.parametrize("pieces", [False, True], ids=["in one batch", "in many"])
def test_every_cell_comes_once_in_order_with_what_the_census_says_of_it(small, source, pieces, request):
    if pieces:
        request.getfixturevalue("read_in_pieces")
    batches = list(source.obs_batches())
    assert [len(batch) for batch in batches] == ([50] * 5 + [34] if pieces else [284])
    for batch in batches:
        assert list(batch) == ["row", "soma_joinid", "is_primary_data", *TEXT_COLUMNS, TERM_COLUMN]
        assert batch.dtypes.astype(str).to_list() == ["int64", "int64", "bool"] + ["category"] * 9
    read = pd.concat([batch.astype(dict.fromkeys((*TEXT_COLUMNS, TERM_COLUMN), object)) for batch in batches])
    _, obs, _ = small
    assert read["row"].to_list() == read["soma_joinid"].to_list() == list(range(len(obs)))
    assert read["is_primary_data"].to_list() == obs["is_primary_data"].fillna(False).to_list()
    for name in (*TEXT_COLUMNS, TERM_COLUMN):
        assert read[name].to_list() == obs[name].fillna("unknown").to_list()
    assert read["disease"].to_list()[70] == "unknown"


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(np.arange(284), id="all"),
        pytest.param(np.array([0]), id="the first, which expresses nothing"),
        pytest.param(np.array([0, 3, 4, 5, 47, 99, 100, 101, 102, 282, 283]), id="with gaps, first and last"),
        pytest.param(np.arange(1, 284, 2), id="every second"),
        pytest.param(np.array([], np.int64), id="none"),
    ],
)
@pytest.mark.parametrize("pieces", [False, True], ids=["in one query", "in many"])
def test_counts_are_those_of_the_rows_asked_for_in_our_order_of_genes(small, source, rows, pieces, request):
    if pieces:
        request.getfixturevalue("read_in_pieces")
    read = source.read_counts(rows, source.align(our_genes(), ["" for _ in our_genes()]))
    assert isinstance(read, sparse.csr_array)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read.toarray(), expected_counts(small[2], rows))
    assert read.has_canonical_format
    assert read.nnz == np.count_nonzero(expected_counts(small[2], rows))


@pytest.mark.filterwarnings("ignore:Transforming to str index")
def test_counts_and_cells_are_those_that_cellxgene_census_gives(small, source):
    rows = [2, 3, 4, 50, 100, 200, 201, 282]
    with cellxgene_census.open_soma(uri=str(small[0])) as census:
        theirs = cellxgene_census.get_anndata(census, "homo_sapiens", obs_coords=rows)
    theirs = theirs[np.argsort(theirs.obs["soma_joinid"].to_numpy())]
    names = theirs.var["feature_id"].to_list()
    ours = [name for name in our_genes() if name in names]
    read = source.read_counts(np.array(rows), source.align(ours, ours))
    np.testing.assert_array_equal(read.toarray(), theirs.X.toarray()[:, [names.index(name) for name in ours]])
    cells = next(source.obs_batches()).iloc[rows]
    for name in TEXT_COLUMNS:
        assert cells[name].to_list() == theirs.obs[name].astype(object).fillna("unknown").to_list()


def test_counts_that_come_in_many_tables_are_put_together(small, monkeypatch):
    monkeypatch.setitem(census_open._TILEDB, "soma.init_buffer_bytes", 4096)
    with CensusSource(str(small[0])) as source:
        tables = list(source._x.read().tables())
        read = source.read_counts(np.arange(284), source.align(our_genes(), our_genes()))
    assert len(tables) > 5
    np.testing.assert_array_equal(read.toarray(), expected_counts(small[2], np.arange(284)))


def test_rows_that_do_not_ascend_are_refused(source):
    for rows in ([4, 3], [3, 3]):
        with pytest.raises(ValueError, match="ascend"):
            source.read_counts(np.array(rows), source.align(our_genes(), our_genes()))


def test_queries_are_cut_between_tiles(read_in_pieces):
    rows = np.array([0, 1, 17, *range(20, 60), 70, 500, 501])
    cut = census_source._in_tiles(rows)
    assert [(len(some), some[0], some[-1]) for some in cut] == [(43, 0, 59), (3, 70, 501)]
    np.testing.assert_array_equal(np.concatenate(cut), rows)
    assert census_source._in_tiles(rows[:0]) == []


def test_several_threads_may_read_at_a_time(small, source, read_in_pieces):
    alignments = source.align(our_genes(), our_genes())
    asked = [np.arange(start, 284, step) for start in range(4) for step in (1, 2, 3)]
    with ThreadPoolExecutor(4) as threads:
        for rows, read in zip(
            asked, threads.map(lambda rows: source.read_counts(rows, alignments), asked), strict=True
        ):
            np.testing.assert_array_equal(read.toarray(), expected_counts(small[2], rows))


class BreaksOff:
    """Reads of counts that give a table and then fail, ``failures`` times."""

    def __init__(self, failures):
        self.failures, self.read = failures, tiledbsoma.SparseNDArray.read

    def __call__(self, array, coords):
        tables = self.read(array, coords).tables()
        if self.failures:
            self.failures -= 1
            return BrokenOff(tables)
        return self.read(array, coords)


class BrokenOff:
    def __init__(self, tables):
        self.whole = tables

    def tables(self):
        yield next(self.whole)
        raise tiledbsoma.SOMAError("S3: curlCode: 56, Failure when receiving data from the peer")


@pytest.fixture
def far(source, monkeypatch):
    """The source, as if it lay in a bucket."""
    monkeypatch.setattr(census_open.time, "sleep", lambda seconds: None)
    source.census = census_open.Census(source.census.soma, None, source.census.name, remote=True)
    return source


def breaking_off(monkeypatch, failures):
    reads = BreaksOff(failures)
    monkeypatch.setattr(tiledbsoma.SparseNDArray, "read", lambda array, coords: reads(array, coords))
    return reads


def test_counts_whose_reading_broke_off_are_read_again_from_the_start(small, far, monkeypatch):
    alignments = far.align(our_genes(), our_genes())
    reads = breaking_off(monkeypatch, failures=3)
    read = far.read_counts(np.arange(284), alignments)
    assert reads.failures == 0
    np.testing.assert_array_equal(read.toarray(), expected_counts(small[2], np.arange(284)))


def test_counts_that_cannot_be_read_at_all_are_told(far, monkeypatch):
    alignments = far.align(our_genes(), our_genes())
    reads = breaking_off(monkeypatch, failures=100)
    with pytest.raises(SourceError) as caught:
        far.read_counts(np.arange(3, 9), alignments)
    assert reads.failures == 96
    assert str(caught.value) == (
        f"cannot read the counts of cells 3 to 8 of {far.title} with tiledbsoma {tiledbsoma.__version__} (SOMAError: "
        "S3: curlCode: 56, Failure when receiving data from the peer); it was tried 4 times: check the network; "
        "the same command goes on"
    )


def test_a_damaged_copy_is_told_at_once(tmp_path, monkeypatch):
    obs, counts = small_cells()
    path = tmp_path / "copy"
    write_small_census(path, obs=obs, var=small_census_var(N_GENES), counts=counts, build_date="2023-05-15")
    (file,) = (path / "census_data/homo_sapiens/ms/RNA/X/raw/__fragments").glob("*/a0.tdb")
    file.unlink()
    monkeypatch.setattr(census_open.time, "sleep", lambda seconds: pytest.fail("waited"))
    with CensusSource(str(path)) as source, pytest.raises(SourceError, match=r"of cells 1 to 1 of Census at copy .*a0"):
        source.read_counts(np.array([1]), source.align(our_genes(), our_genes()))


class GenesOf:
    """What a var reads as."""

    def __init__(self, **columns):
        self.table = pa.table(columns)
        self.schema = self.table.schema

    def read(self, column_names):
        return self

    def concat(self):
        return self.table


def test_genes_in_another_order_are_put_in_order_and_a_gap_is_told(source):
    names = {"feature_id": ["c", "a", "b"], "feature_name": ["C", "A", "B"]}
    source._var = GenesOf(soma_joinid=[2, 0, 1], **names)
    assert source.genes()["feature_id"].to_list() == ["a", "b", "c"]
    source._var = GenesOf(soma_joinid=[3, 0, 1], **names)
    with pytest.raises(SourceError, match="are not numbered 0 to 2"):
        source.genes()


def test_none_of_our_genes_is_told_with_the_name_of_the_census(source):
    with pytest.raises(SourceError, match="none of the 40 genes of Census at census 202"):
        source.align(["ENSG77777777777"], ["X"])


def test_it_says_what_it_is_without_saying_where_it_lies(small, source):
    name = small[0].name
    assert source.about() == {
        "census_copy": name,
        "census_build_date": "2023-05-15",
        "organism": "homo_sapiens",
        "cells": 284,
    }
    assert str(small[0].parent) not in json.dumps(source.about()) + source.title
    assert source.title == f"Census at {name}"


def test_it_is_closed_at_the_end_and_when_it_cannot_be_used(small, monkeypatch):
    with CensusSource(str(small[0])) as source:
        pass
    assert source.census.soma.closed
    opened = []
    keep = cellxgene_census.open_soma
    monkeypatch.setattr(cellxgene_census, "open_soma", lambda **given: opened.append(keep(**given)) or opened[0])
    with pytest.raises(SourceError, match="has no mus_musculus") as caught:
        CensusSource(str(small[0]), "mus_musculus")
    assert opened[0].closed
    assert caught.tb is not None  # it holds what was opened: nothing was closed by being forgotten
