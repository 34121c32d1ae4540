"""Opening a Census: published versions (of a directory made here), copies, and what can be wrong with them."""

import shutil
import socket
from pathlib import Path

import pytest
import requests
import tiledbsoma
from scipy import sparse
from small_census import small_census_obs, small_census_var, write_small_census

from hce_jax.census import CensusSource, census_facts, dataset_ids, open_census
from hce_jax.census import open as census_open
from hce_jax.errors import SourceError

RELEASES = {
    "stable": "2025-01-30",
    "latest": "2025-03-10",
    "V1": "2023-05-15",
    "2023-05-15": {"release_build": "2023-05-15", "flags": {"lts": True}},
    "2024-07-01": {"release_build": "2024-05-20", "flags": {"lts": True}},
    "V3": "2024-07-01",
    "2025-01-30": {"release_build": "2025-01-30", "flags": {"lts": True}},
    "2025-03-10": {"release_build": "2025-03-10", "flags": {"lts": False}},
    "2025-02-01": {"release_build": "2025-02-01", "flags": {"lts": True, "retracted": True}},
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Fail at the first attempt to look up or reach another machine (what TileDB itself opens is not seen)."""

    def refused(*args, **kwargs):
        raise AssertionError(f"the network was used: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(requests, "get", refused)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    obs, var = small_census_obs("B", donors=2, cells_per_donor=3), small_census_var(8)
    counts = sparse.csr_array(sparse.eye_array(len(obs), len(var)))
    path = tmp_path_factory.mktemp("copies") / "small"
    return write_small_census(path, obs=obs, var=var, counts=counts, build_date="2023-12-15")


@pytest.fixture
def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copied"))


@pytest.fixture
def published(folder, monkeypatch):
    """Let the directory of versions be RELEASES, all of them the small Census."""
    for release in RELEASES.values():
        if isinstance(release, dict):
            release["soma"] = {"uri": "s3://nowhere", "relative_uri": str(folder), "s3_region": "us-west-2"}
    here = {"provider": "S3", "base_uri": "file:///", "region": "us-west-2"}
    answers = {"release.json": RELEASES, "mirrors.json": {"default": "here", "here": here}}

    def get(url, **kwargs):
        answer = requests.Response()
        answer.status_code = 200
        answer.json = lambda: dict(answers[url.rsplit("/", 1)[1]])
        return answer

    monkeypatch.setattr(requests, "get", get)


def message_of(version):
    with pytest.raises(SourceError) as caught, open_census(version):
        pass
    return str(caught.value)


@pytest.mark.parametrize(
    ("asked", "opened"),
    [("2023-05-15", "2023-05-15"), ("stable", "2025-01-30"), ("latest", "2025-03-10"), ("V3", "2024-07-01")],
)
def test_a_published_version_is_opened_under_its_date_and_nothing_is_printed(published, caplog, asked, opened):
    with open_census(asked) as census:
        assert (census.version, census.title, census.remote) == (opened, f"Census {opened}", True)
        assert census.experiment().obs.count > 0
    assert census.soma.closed
    assert not caplog.records


def test_an_unknown_version_is_answered_with_those_there_are_newest_first(published):
    assert message_of("2023-05-16") == (
        "no Census '2023-05-16', and no folder of that name; published are 2025-03-10 (latest), "
        "2025-01-30 (LTS, stable), 2024-07-01 (LTS, V3), 2023-05-15 (LTS, V1)"
    )


@pytest.mark.parametrize("error", [requests.ConnectionError, requests.Timeout, requests.exceptions.ProxyError])
def test_without_network_a_version_says_what_was_tried_and_how_to_make_a_copy(monkeypatch, error):
    def get(*args, **kwargs):
        raise error("pool(host='far') (Caused by: no route)")

    monkeypatch.setattr(requests, "get", get)
    message = message_of("2023-05-15")
    assert message.startswith(f"cannot look up Census 2023-05-15 at census.cellxgene.cziscience.com: {error.__name__}")
    assert "no route" in message
    assert message.endswith(
        "aws s3 sync --no-sign-request s3://cellxgene-census-public-us-west-2/cell-census/2023-05-15/soma/ FOLDER"
    )
    assert "/VERSION/soma/" in message_of("stable")


def test_a_bucket_that_cannot_be_reached_says_so(published, monkeypatch):
    import cellxgene_census

    def open_soma(**kwargs):
        raise tiledbsoma.SOMAError("S3: Error while listing: curlCode: 6, Could not resolve hostname")

    monkeypatch.setattr(cellxgene_census, "open_soma", open_soma)
    for version, title in (("stable", "Census 2025-01-30"), ("s3://far/soma", "Census at s3://far/soma")):
        message = message_of(version)
        assert message.startswith(f"cannot open {title} with tiledbsoma {tiledbsoma.__version__} (SOMAError: S3")
        assert "check the network, or give the folder of a copy" in message


@pytest.mark.parametrize("written", [str, lambda path: f"file://{path}", lambda path: path.name])
def test_a_folder_is_opened_without_network_under_its_own_name(folder, monkeypatch, written):
    monkeypatch.chdir(folder.parent)
    with open_census(written(folder)) as census:
        assert (census.version, census.title, census.remote) == (None, "Census at small", False)
        assert census_facts(census) == {"build_date": "2023-12-15", "total_cells": 56}
        assert dataset_ids(census) == [
            *("new-kidney", "blood-v3", "new-atlas", "blood-v2", "blood-smart", "atlas", "lung", "new-blood")
        ]


def test_a_folder_that_is_not_there_is_not_looked_up(tmp_path):
    assert message_of(str(tmp_path / "2023-05-15")).startswith(f"no such folder: {tmp_path / '2023-05-15'}.")


def test_a_summary_without_rows_tells_nothing(tmp_path, folder, monkeypatch):
    import small_census

    monkeypatch.setattr(small_census, "SUMMARY", ("census_schema_version",))
    obs, var = small_census_obs(donors=1, cells_per_donor=2), small_census_var(3)
    counts = sparse.csr_array((len(obs), 3))
    write_small_census(tmp_path / "c", obs=obs, var=var, counts=counts, build_date="2023-12-15", datasets=["x", "b"])
    with open_census(str(tmp_path / "c")) as census:
        assert census_facts(census) == {}
        assert dataset_ids(census) == ["x", "b"]


def test_a_folder_without_a_census_is_told(tmp_path, folder):
    assert message_of(str(tmp_path)).startswith(f"there is no Census at {tmp_path.name}. A copy is made with: aws s3")
    message = message_of(str(folder / "census_info"))
    assert message.startswith("there is no Census at census_info: it lacks census_data or census_info. A copy")


@pytest.mark.parametrize("missing", ["obs", "ms/RNA", "ms/RNA/X/raw"])
def test_a_census_that_lacks_a_part_is_told(copied, missing):
    parent, name = (copied / "census_data/homo_sapiens" / missing).parent, missing.rsplit("/", 1)[-1]
    with tiledbsoma.open(str(parent), "d") as group:
        del group[name]
    with pytest.raises(SourceError, match=r"^there is no Census at copied: it lacks obs, ms/RNA/var or ms/RNA/X/raw"):
        CensusSource(str(copied))


@pytest.mark.parametrize("missing", ["obs", "ms/RNA/X/raw", "ms/RNA/X/raw/__commits", "obs/__commits"])
def test_a_copy_that_lacks_files_is_told(copied, missing):
    shutil.rmtree(copied / "census_data/homo_sapiens" / missing)
    with pytest.raises(SourceError, match="is the copy complete"):
        CensusSource(str(copied))


def test_an_organism_that_is_not_there_is_told(folder):
    with open_census(str(folder)) as census, pytest.raises(SourceError) as caught:
        census.experiment("mus_musculus")
    assert str(caught.value) == "Census at small has no mus_musculus; it has homo_sapiens"


def test_a_census_written_in_a_newer_way_is_told(folder, monkeypatch):
    from tiledbsoma import _constants

    monkeypatch.setattr(_constants, "SUPPORTED_SOMA_ENCODING_VERSIONS", {"0"})
    message = message_of(str(folder))
    assert message.startswith(
        f"cannot open Census at small with tiledbsoma {tiledbsoma.__version__} (ValueError: Unsup"
    )
    assert message.endswith("install a newer tiledbsoma")


@pytest.mark.parametrize(("remote", "attempts"), [(True, 4), (False, 1)])
def test_only_what_comes_from_the_network_is_read_again(folder, monkeypatch, remote, attempts):
    waited, tried = [], []
    monkeypatch.setattr(census_open.time, "sleep", waited.append)

    def fails():
        tried.append(1)
        raise tiledbsoma.SOMAError("S3: Timeout was reached")

    with open_census(str(folder)) as census:
        far = census_open.Census(census.soma, None, "far", remote)
        with pytest.raises(
            SourceError, match=r"^cannot read the genes of Census at far .*Timeout was reached"
        ) as caught:
            far.read("the genes", fails)
    assert len(tried) == attempts
    assert len(waited) == attempts - 1
    assert ("the same command goes on" in str(caught.value)) == remote
