"""Work on many files at a time, under a progress bar that counts cells."""

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from tqdm import tqdm

#: Counts cells that are done; raises when all shall stop, so a task calls it often.
Tick = Callable[[int], None]

#: Between two lines of progress where no terminal shows a bar.
SECONDS_PER_LINE = 10.0


def run_in_threads(
    title: str, task: Callable[[str, Tick], None], names: Sequence[str], workers: int, *, total: int, done: int = 0
) -> None:
    """Do a task for each name; at the first failure, and at an interrupt, all stop soon.

    Numpy and arrow leave Python free while they compute: threads use all processors.

    Parameters
    ----------
    title
        Stands before the bar.
    task
        Called with a name and the function that counts cells.
    names
        In the order in which they are begun.
    workers
        Tasks at a time.
    total, done
        Cells in all, and those that are done at the beginning.

    Raises
    ------
    Exception
        What a task raises.

    Examples
    --------
    >>> cells = {"part.0": 3, "part.1": 2}
    >>> run_in_threads("count", lambda name, tick: tick(cells[name]), list(cells), workers=2, total=5)
    """
    stopped, lock = threading.Event(), threading.Lock()
    with CellBar(title, total, done) as bar, ThreadPoolExecutor(workers) as pool:

        def tick(n_cells: int) -> None:
            if stopped.is_set():
                raise _Stopped
            with lock:
                bar.update(n_cells)

        def run(name: str) -> None:
            try:
                tick(0)
                task(name, tick)
            except _Stopped:
                return
            except BaseException:
                stopped.set()
                raise

        tasks = [pool.submit(run, name) for name in names]
        try:
            for finished in as_completed(tasks):
                finished.result()
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


class _Stopped(Exception):
    """Raised in the tasks that stop because another has failed."""


class CellBar(tqdm):
    """A progress bar on a terminal, a plain line now and then elsewhere.

    Parameters
    ----------
    title
        Stands before the bar.
    total, done
        Cells in all, and those that are done at the beginning.

    Examples
    --------
    >>> with CellBar("count", total=5) as bar:
    ...     _ = bar.update(5)
    """

    def __init__(self, title: str, total: int, done: int = 0):
        self._on_terminal = sys.stderr.isatty()
        pause = 0.1 if self._on_terminal else SECONDS_PER_LINE
        super().__init__(
            desc=title,
            total=total,
            initial=done,
            unit=" cells",
            unit_scale=True,
            leave=False,
            miniters=1,
            mininterval=pause,
            delay=0 if self._on_terminal else pause,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:  # type: ignore[override]
        """Show how far it is; called by tqdm."""
        if self._on_terminal:
            return super().display(msg, pos)
        if msg is None:
            print(self, file=self.fp, flush=True)
        return False
