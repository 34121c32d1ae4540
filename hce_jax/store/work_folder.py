"""A folder that is made file by file, over several attempts if need be, and appears when it is complete.

Until then the work lies in ``NAME.partial`` beside the destination:

    store/      the folder to be; each file appears in it when it is complete
    scratch/    files that only the work needs; they are removed at the end
    records/    for each finished file a JSON object about it, with size and time of the file it was made from
    begun.json  what is made, and how
    lock        held while a process works here

A record is written after its file, so that a killed process leaves no record without a file; what has none is made
anew. At the end ``store/`` is renamed to the destination.
"""

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hce_jax.errors import StoreError
from hce_jax.files import written_aside

_STORE, _RECORDS, _BEGUN, _LOCK = "store", "records", "begun.json", "lock"
#: Files whose names begin with this are for the work only.
SCRATCH = "scratch"


def work_path(destination: Path) -> Path:
    """Return where the work for a destination lies.

    Examples
    --------
    >>> work_path(Path("data/cells")).as_posix()
    'data/cells.partial'
    """
    return destination.with_name(f"{destination.name}.partial")


@dataclasses.dataclass(frozen=True)
class WorkFolder:
    """The work for one destination, held by this process alone; see :func:`open_work_folder`.

    Attributes
    ----------
    path
        ``NAME.partial``.
    sources
        By the name of each file to be made, the file it is made from.
    """

    path: Path
    sources: Mapping[str, Path]

    @property
    def store(self) -> Path:
        """The folder to be."""
        return self.path / _STORE

    def place(self, name: str) -> Path:
        """Return where a file lies: in the folder to be, or, if its name begins with "scratch/", beside it."""
        return (self.path if name.startswith(f"{SCRATCH}/") else self.store) / name

    def finished(self) -> dict[str, dict[str, Any]]:
        """Return what is recorded about each finished file."""
        records = {name: record["about"] for name, record in self._records().items()}
        return {name: about for name, about in records.items() if _size(self.place(name)) == about["bytes"]}

    def finish(self, name: str, make: Callable[[Path], dict[str, Any]]) -> None:
        """Make a file and then its record.

        Parameters
        ----------
        name
            The file's name in the folder to be.
        make
            Makes the file, whole or not at all, and returns what is to be recorded about it, ``bytes`` among it.

        Raises
        ------
        StoreError
            If the system does not let it be written: the disk is full, for one.
        """
        stamp, record = _stamp(self.sources[name]), self._record(name)
        with named_in_errors(self.place(name)) as path:
            for file in (path, record):
                file.parent.mkdir(parents=True, exist_ok=True)
            about = make(path)
            with written_aside(record) as aside:
                aside.write_text(json.dumps({"source": stamp, "about": about}))

    def forget(self, name: str) -> None:
        """Have a file made anew next time."""
        self._record(name).unlink(missing_ok=True)

    def publish(self, destination: Path) -> None:
        """Give the complete folder its name, and remove the rest."""
        with named_in_errors(destination):
            refuse_existing(destination)
            self.store.rename(destination)
            shutil.rmtree(self.path)

    def _record(self, name: str) -> Path:
        return self.path / _RECORDS / f"{name}.json"

    def _records(self) -> dict[str, dict[str, Any]]:
        folder = self.path / _RECORDS
        found = {path: _read_json(path) for path in sorted(folder.rglob("*.json")) if not path.name.startswith(".")}
        return {path.relative_to(folder).with_suffix("").as_posix(): record for path, record in found.items() if record}

    def _begin(self, about: Mapping[str, Any]) -> None:
        begun = self.path / _BEGUN
        self._check_same(_read_json(begun), about)
        with named_in_errors(self.path):
            for aside in self.path.rglob(".*"):  # of a killed process
                aside.unlink()
            self.store.mkdir(exist_ok=True)
            with written_aside(begun) as aside:
                aside.write_text(json.dumps(about))
        if finished := self.finished():
            print(f"resuming: {len(finished)} of {len(self.sources)} files are finished in {self.path}", flush=True)

    def _check_same(self, begun: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        for key, was in begun.items():
            if was != about[key]:
                tells = not isinstance(was, dict)
                how = f"the {key} {was}, not {about[key]}" if tells else f"another {key}"
                raise StoreError(
                    f"{self.path} was begun with {how}; name another destination, or delete {self.path} to begin anew"
                )
        for name, record in self._records().items():
            if name not in self.sources:
                raise StoreError(
                    f"{self.path} has {name}, which the source lacks now; delete {self.path} to begin anew"
                )
            if record["source"] != _stamp(self.sources[name]):
                raise StoreError(
                    f"{self.sources[name]} has changed since {self.path} was begun; put it back as it was, or delete "
                    f"{self.path} to begin anew"
                )

    def _kept(self) -> str:
        n_finished, n_files = len(self.finished()), len(self.sources)
        return (
            f"{n_finished} of {n_files} files are finished and kept in {self.path}; the same command goes on from there"
        )


@contextmanager
def open_work_folder(destination: Path, about: Mapping[str, Any], sources: Mapping[str, Path]) -> Iterator[WorkFolder]:
    """Begin the work for a destination, or take it up where an earlier attempt ended.

    Parameters
    ----------
    destination
        The folder to be; must not exist. Missing parents are made.
    about
        What is made, and how, for JSON: must be the same at every attempt.
    sources
        By the name of each file to be made, the file it is made from.

    Raises
    ------
    StoreError
        If the destination exists or cannot be written, another process works for it, or an earlier attempt was about
        something else or a source that has changed since. Errors and interrupts inside the block leave it with a word
        on what is kept.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.txt").write_text("a")
    >>> with open_work_folder(folder / "copy", {"format": 1}, {"b.txt": folder / "a.txt"}) as work:
    ...     work.finish("b.txt", lambda path: {"bytes": path.write_text("b")})
    ...     work.publish(folder / "copy")
    >>> (folder / "copy" / "b.txt").read_text()
    'b'
    """
    work = WorkFolder(work_path(destination), sources)
    with locked(work.path):
        refuse_existing(destination)  # another process may have just finished it
        work._begin(about)
        try:
            yield work
        except StoreError as error:
            raise StoreError(f"{error}; {work._kept()}") from error
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(f"interrupted; {work._kept()}") from interrupt


def refuse_existing(destination: Path) -> None:
    """Raise an error if there is something already.

    Raises
    ------
    StoreError
        That is this error.

    Examples
    --------
    >>> refuse_existing(Path("no/such/folder"))
    """
    if destination.exists():
        raise StoreError(f"{destination} exists already; remove it or name another folder")


@contextmanager
def named_in_errors(path: Path) -> Iterator[Path]:
    """Make an error of the system, in which arrow names no file, one that does.

    Raises
    ------
    StoreError
        In place of OSError.

    Examples
    --------
    >>> with named_in_errors(Path("part.0.arrow")):
    ...     raise OSError(28, "Error writing bytes to file")
    Traceback (most recent call last):
        ...
    hce_jax.errors.StoreError: cannot use part.0.arrow: No space left on device
    """
    try:
        yield path
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StoreError(f"cannot use {error.filename or path}: {reason}") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the folder of some work for this process, and make it if it is not there.

    Raises
    ------
    StoreError
        If it holds something else than work, another process holds it, or it cannot be made.

    Examples
    --------
    >>> import tempfile
    >>> with locked(Path(tempfile.mkdtemp()) / "store.partial"):
    ...     pass
    """
    strangers = {each.name for each in path.glob("[!.]*")} - {_STORE, SCRATCH, _RECORDS, _BEGUN, _LOCK}
    if strangers:
        raise StoreError(f"{path} is needed for the work, but holds {min(strangers)!r}; move it away")
    with named_in_errors(path / _LOCK) as file:
        path.mkdir(parents=True, exist_ok=True)
        lock = file.open("w")
    with lock:
        with named_in_errors(file):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StoreError(f"another process is at work in {path}; let it finish, or end it") from error
        yield


def _read_json(path: Path) -> dict[str, Any]:
    """Read a file of ours; one that is absent or empty, as after a power cut, says nothing."""
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _stamp(path: Path) -> dict[str, int] | None:
    """Return what changes when a file does."""
    if not path.is_file():
        return None
    status = path.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
