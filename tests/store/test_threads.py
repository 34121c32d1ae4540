import threading
import time

import pytest

from hce_jax.store import threads
from hce_jax.store.threads import run_in_threads

NAMES = [f"file {i}" for i in range(6)]


def test_every_task_is_done_once_and_begun_in_order_by_one_worker():
    begun = []
    run_in_threads("work", lambda name, tick: begun.append(name), NAMES, workers=1, total=0)
    assert begun == NAMES


def test_workers_work_at_the_same_time():
    meeting = threading.Barrier(3, timeout=10)
    run_in_threads("work", lambda name, tick: meeting.wait(), NAMES, workers=3, total=0)


@pytest.mark.parametrize("error", [ValueError("first"), KeyboardInterrupt("first")], ids=["error", "interrupt"])
def test_a_failure_stops_the_tasks_that_run_and_begins_no_other(error):
    done, meeting = [], threading.Barrier(2, timeout=10)

    def task(name, tick):
        done.append(name)
        meeting.wait()
        if name == NAMES[0]:
            raise error
        for _ in range(1000):
            tick(1)
            time.sleep(0.01)
        pytest.fail("was not stopped")

    with pytest.raises(type(error), match="first"):
        run_in_threads("work", task, NAMES, workers=2, total=0)
    assert sorted(done) == NAMES[:2]


def test_lines_tell_the_cells_that_are_done_with_those_of_an_earlier_attempt(monkeypatch, capsys):
    monkeypatch.setattr(threads, "SECONDS_PER_LINE", 0)
    run_in_threads("work", lambda name, tick: tick(10), NAMES, workers=3, total=100, done=40)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("|")[-1].split()[0] for line in lines] == [
        f"{n}/100" for n in ("40.0", "50.0", "60.0", "70.0", "80.0", "90.0", "100")
    ]
    assert all(line.startswith("work: ") and "cells/s" in line for line in lines)
