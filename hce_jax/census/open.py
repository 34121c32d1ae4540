"""Opening a Census, of a published version or a copy; the only way to cellxgene_census and tiledbsoma.

Both are imported when a Census is opened, since that takes seconds.
"""

import contextlib
import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from hce_jax.errors import SourceError

#: How TileDB reads. A column's buffer holds 8 million coordinates, so that a table has as many counts; 32 and 128 MiB
#: are as fast. Without the second limit TileDB keeps up to 1 GiB of tiles, and is no faster (200,000 cells with 2,000
#: counts each). Its total budget stays as it is, since the index of a whole Census has to lie within a tenth of it.
_TILEDB = {"soma.init_buffer_bytes": 64 << 20, "sm.mem.tile_upper_memory_limit": 128 << 20}
#: Seconds to wait before a read from the network is tried again.
_WAITS = (2.0, 10.0, 30.0)
#: Where the versions are published, and the cells of each.
_DIRECTORY = "census.cellxgene.cziscience.com"
_BUCKET = "s3://cellxgene-census-public-us-west-2/cell-census"

_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Census:
    """An opened Census.

    Attributes
    ----------
    soma
        The tiledbsoma.Collection.
    version
        The published version, its date also where it was asked for as "stable"; None for a copy.
    name
        The version, the name of a copy's folder, or its URI.
    remote
        Whether reading it needs the network.
    """

    soma: Any
    version: str | None
    name: str
    remote: bool

    @property
    def title(self) -> str:
        """What to call it in messages: "Census 2023-05-15", or "Census at NAME"."""
        return f"Census {self.version}" if self.version else f"Census at {self.name}"

    def read(self, what: str, action: Callable[[], _Result]) -> _Result:
        """Return what ``action`` reads; from the network it is tried again some times.

        Parameters
        ----------
        what
            What is read, for a message, e.g. "the genes".
        action
            Reads it as a whole.

        Raises
        ------
        SourceError
            If it cannot be read.
        """
        from tiledbsoma import SOMAError

        waits = _WAITS if self.remote else ()
        for wait in waits:
            with contextlib.suppress(SOMAError, RuntimeError):
                return action()
            time.sleep(wait)
        try:
            return action()
        except (SOMAError, RuntimeError) as error:
            remedy = (
                f"it was tried {len(waits) + 1} times: check the network; the same command goes on"
                if self.remote
                else "is the copy complete? aws s3 sync fetches what is missing"
            )
            raise SourceError(f"cannot read {what} of {self.title} with {_reason(error)}; {remedy}") from error

    def experiment(self, organism: str = "homo_sapiens") -> Any:
        """Return the tiledbsoma.Experiment of an organism.

        Raises
        ------
        SourceError
            If it is not there, or has no raw counts.
        """
        organisms = self.read("census_data", lambda: sorted(self.soma["census_data"].keys()))
        if organism not in organisms:
            raise SourceError(f"{self.title} has no {organism}; it has {', '.join(organisms) or 'nothing'}")

        def opened() -> Any:
            experiment = self.soma["census_data"][organism]
            rna = experiment["ms"]["RNA"]
            return experiment, experiment["obs"], rna["var"], rna["X"]["raw"]

        try:
            return self.read(f"what it has of {organism}", opened)[0]
        except KeyError as error:
            raise SourceError(
                f"there is no Census at {self.name}: it lacks obs, ms/RNA/var or ms/RNA/X/raw of {organism} "
                f"({error.args[0]}). {_how_to_copy(self.version)}"
            ) from error


@contextlib.contextmanager
def open_census(version: str) -> Iterator[Census]:
    """Open a Census for reading; it is closed at the end of the ``with`` block.

    Parameters
    ----------
    version
        A published version ("2023-05-15", "stable", "latest"), or a copy: a folder, or a URI ("s3://...").
        A folder is read without any network.

    Raises
    ------
    SourceError
        If there is no such version or folder, the network cannot be reached, or it is no Census that the installed
        tiledbsoma can read.

    Examples
    --------
    >>> with open_census("2023-05-15") as census:  # doctest: +SKIP
    ...     census.experiment().obs.count
    53794728
    """
    version = version.removeprefix("file://")
    if "://" in version:
        census = _open(version, None, version, remote=True)
    elif "/" in version or Path(version).exists():
        census = _open_folder(Path(version).expanduser())
    else:
        version = _published(version)
        census = _open(None, version, version, remote=True)
    with census.soma:
        if not {"census_data", "census_info"} <= set(census.soma):
            raise SourceError(
                f"there is no Census at {census.name}: it lacks census_data or census_info. {_how_to_copy()}"
            )
        yield census


def dataset_ids(census: Census) -> list[str]:
    """Return the dataset_id of each study, of all organisms, in the order of the Census.

    Raises
    ------
    SourceError
        If they cannot be read.
    """
    frame = _info(census, "datasets", ["soma_joinid", "dataset_id"])
    return [str(name) for name in frame.sort_values("soma_joinid")["dataset_id"]]


def census_facts(census: Census) -> dict[str, Any]:
    """Return what a Census says of itself, as far as it does: "build_date", and "total_cells" of all organisms.

    Raises
    ------
    SourceError
        If it cannot be read.
    """
    summary = _info(census, "summary", ["label", "value"])
    told = dict(zip(summary["label"].astype(str), summary["value"].astype(str), strict=True))
    facts: dict[str, Any] = {}
    if "census_build_date" in told:
        facts["build_date"] = told["census_build_date"]
    if told.get("total_cell_count", "").isdecimal():
        facts["total_cells"] = int(told["total_cell_count"])
    return facts


def _info(census: Census, name: str, columns: list[str]) -> Any:
    try:
        return census.read(
            f"census_info/{name}",
            lambda: census.soma["census_info"][name].read(column_names=columns).concat().to_pandas(),
        )
    except KeyError as error:
        raise SourceError(f"there is no Census at {census.name}: it lacks census_info/{name}") from error


def _open_folder(folder: Path) -> Census:
    if not folder.is_dir():
        raise SourceError(f"no such folder: {folder}. {_how_to_copy()}")
    folder = folder.resolve()  # TileDB keeps the working directory of its first use
    return _open(str(folder), None, folder.name, remote=False)


def _published(version: str) -> str:
    """Return the date of a published version; asked for as "stable", cellxgene_census would print it."""
    import cellxgene_census

    try:
        directory = cellxgene_census.get_census_version_directory()
    except OSError as error:  # every exception of requests is one
        raise SourceError(
            f"cannot look up Census {version} at {_DIRECTORY}: {_tail(error)}; check the network, or give the folder "
            f"of a copy. {_how_to_copy(version)}"
        ) from error
    builds = {name: description["release_build"] for name, description in directory.items()}
    dates = sorted((name for name in builds if name[:1].isdecimal()), reverse=True)
    if version in builds:
        same = [date for date in dates if builds[date] == builds[version]]
        return version if version in dates or not same else same[0]
    known = []
    for date in dates:
        marks = ["LTS"] if directory[date].get("flags", {}).get("lts") else []
        marks += [name for name, build in builds.items() if name not in dates and build == builds[date]]
        known.append(f"{date} ({', '.join(marks)})" if marks else date)
    raise SourceError(f"no Census {version!r}, and no folder of that name; published are {', '.join(known)}")


def _open(uri: str | None, version: str | None, name: str, remote: bool) -> Census:
    import cellxgene_census
    import tiledbsoma

    title = Census(None, version, name, remote).title
    try:
        context = cellxgene_census.get_default_soma_context(_TILEDB)
        soma = cellxgene_census.open_soma(uri=uri, census_version=version, context=context)
    except tiledbsoma.DoesNotExistError as error:
        raise SourceError(f"there is no Census at {name}. {_how_to_copy(version)}") from error
    except (tiledbsoma.SOMAError, RuntimeError, OSError) as error:
        remedy = "check the network, or give the folder of a copy" if remote else "the copy is incomplete or damaged"
        raise SourceError(f"cannot open {title} with {_reason(error)}; {remedy}. {_how_to_copy(version)}") from error
    except ValueError as error:  # written in a way that it does not know
        raise SourceError(f"cannot open {title} with {_reason(error)}; install a newer tiledbsoma") from error
    return Census(soma, version, name, remote)


def _how_to_copy(version: str | None = None) -> str:
    date = version if version and version[:1].isdecimal() else "VERSION"
    return f"A copy is made with: aws s3 sync --no-sign-request {_BUCKET}/{date}/soma/ FOLDER"


def _reason(error: Exception) -> str:
    return f"tiledbsoma {importlib.metadata.version('tiledbsoma')} ({_tail(error)})"


def _tail(error: Exception) -> str:
    """Give the end of an error's text, where these libraries say what went wrong."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 160 else '...' + text[-157:]}"
