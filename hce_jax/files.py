"""Files that are whole or absent."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hce_jax.errors import StoreError

#: In a folder of results: what is being written, or what a killed process left of it.
_UNFINISHED = ".unfinished"


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; what was written takes the place of ``path`` if nothing was raised.

    The name keeps the suffix, from which writers tell the format.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with written_aside(Path(folder) / "table.csv") as aside:
    ...         _ = aside.write_text("a,b")
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['table.csv']
    """
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def written_together(folder: Path) -> Iterator[Path]:
    """Give a folder to write files to; they take their places in ``folder`` together if nothing was raised.

    Else nothing is left of them, and what was there stays. What a killed process left is removed by the next one.

    Parameters
    ----------
    folder
        Made if it is not there, and removed again if nothing comes of it.

    Raises
    ------
    StoreError
        If another process is writing there.
    OSError
        If it cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     with written_together(Path(place) / "results") as aside:
    ...         _ = (aside / "table.csv").write_text("a,b")
    ...     [path.name for path in (Path(place) / "results").iterdir()]
    ['table.csv']
    """
    aside = folder / _UNFINISHED
    is_new = not folder.exists()
    aside.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(aside, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(f"another process is writing results to {folder}; let it finish, or end it") from error
        try:
            for left in aside.iterdir():
                left.unlink()
            yield aside
            for path in sorted(aside.iterdir()):
                path.replace(folder / path.name)
            is_new = False
        finally:
            shutil.rmtree(aside)
            if is_new:
                with contextlib.suppress(OSError):  # something else has been put there
                    folder.rmdir()
    finally:
        os.close(descriptor)
