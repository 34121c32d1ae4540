"""Conversions that are killed, interrupted, or cannot write, and what is left of them."""

import errno
import fcntl
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from stores import N_TYPES, write_tiny_store

from hce_jax.errors import StoreError
from hce_jax.store import convert
from hce_jax.store.work_folder import open_work_folder

module = importlib.import_module("hce_jax.store.convert")  # the package's `convert` is the function

N_PARTS = 6  # of train: 90 cells, 16 a part; val and test have 2 each
FILES = re.compile(r"(\d+) of (\d+) files are finished and kept in (.*)\.partial; the same command goes on from there")


@pytest.fixture
def source(tmp_path):
    return write_tiny_store(tmp_path / "merlin", rows_per_part=16)


@pytest.fixture
def expected(source, tmp_path):
    convert(source, tmp_path / "expected")
    return contents(tmp_path / "expected")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def files(folder):
    return {path.relative_to(folder): (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in folder.rglob("*") if path.is_file() and path.name != "store.json"}  # fmt: skip


def fails_at(monkeypatch, name, error):
    """Let the writing of one file fail in its middle, with a part of it written."""
    write_part = module.write_part

    def writing(path, blocks):
        def spoiled():
            for index, block in enumerate(blocks):
                if path.name == name and index == 1:
                    raise error
                yield block

        return write_part(path, spoiled())

    monkeypatch.setattr(module, "write_part", writing)


def no_space():
    return OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device")


KILLED = """
import importlib, os, signal, sys
from hce_jax.store import convert
module = importlib.import_module("hce_jax.store.convert")
write_part = module.write_part
def writing(path, blocks):
    def killed():
        for index, block in enumerate(blocks):
            if path.name == "part.3.arrow" and index == 1:
                assert list(path.parent.glob(".part.3.*")), "nothing has been written yet"
                os.kill(os.getpid(), signal.SIGKILL)
            yield block
    return write_part(path, killed())
module.write_part = writing
convert(sys.argv[1], sys.argv[2], workers=1)
"""


def test_a_killed_conversion_is_resumed_and_what_was_finished_is_not_written_again(source, expected, tmp_path, capsys):
    killed = subprocess.run([sys.executable, "-c", KILLED, source, tmp_path / "cells"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "cells").exists()
    left = files(tmp_path / "cells.partial" / "store")
    asides = [path for path in left if path.name.startswith(".")]
    assert len(asides) == 1
    finished = {path: status for path, status in left.items() if path not in asides}
    assert len([path for path in finished if path.suffix == ".arrow"]) == 3

    done = convert(source, tmp_path / "cells", verify=True)
    assert f"resuming: {len(finished)} of {len(expected) - 1} files are finished in" in capsys.readouterr().out
    assert finished.items() <= files(tmp_path / "cells").items()
    assert done.new_cells == 130 - 3 * 16
    assert contents(tmp_path / "cells") == expected
    assert not (tmp_path / "cells.partial").exists()


def test_a_resumed_conversion_gives_the_same_bytes(source, expected, tmp_path, monkeypatch):
    fails_at(monkeypatch, "part.2.arrow", no_space())
    with pytest.raises(StoreError):
        convert(source, tmp_path / "cells", workers=1)
    monkeypatch.undo()
    convert(source, tmp_path / "cells", workers=3)
    assert contents(tmp_path / "cells") == expected


def test_a_full_disk_names_the_file_and_what_is_kept(source, tmp_path, monkeypatch):
    fails_at(monkeypatch, "part.1.arrow", no_space())
    with pytest.raises(StoreError) as caught:
        convert(source, tmp_path / "cells", workers=1)
    partial = tmp_path / "cells.partial"
    assert str(caught.value).startswith(f"cannot use {partial}/store/train/part.1.arrow: No space left on device; ")
    n_finished, n_files, destination = FILES.search(str(caught.value)).groups()
    assert destination == str(tmp_path / "cells")
    assert int(n_finished) == len(contents(partial / "store")) == int(n_files) - N_PARTS - 4 + 1  # side files, one part
    assert not (tmp_path / "cells").exists()


LIMITED = """
import resource, sys
from hce_jax import command
from hce_jax.store import convert
with command.exit_codes():
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
    convert(sys.argv[1], sys.argv[2], workers=1)
"""


def test_a_write_that_the_system_refuses_leaves_only_whole_files(tmp_path):
    source = write_tiny_store(tmp_path / "merlin", {"train": 90, "val": 900}, rows_per_part=900)
    arguments = [sys.executable, "-c", LIMITED, source, tmp_path / "cells"]
    whole = convert(source, tmp_path / "whole")
    sizes = [path.stat().st_size for path in sorted((tmp_path / "whole").rglob("*")) if path.is_file()]
    done = subprocess.run([*arguments, str(max(sizes) - 100)], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    told, error = done.stderr.splitlines()
    assert "lacks its test split" in told
    assert re.fullmatch(r"error: cannot use \S+/val/part.0.arrow: File too large; \d+ of .* goes on from there", error)
    assert not (tmp_path / "cells").exists()
    left = contents(tmp_path / "cells.partial" / "store")
    assert left.items() <= contents(tmp_path / "whole").items()
    assert Path("train/part.0.arrow") in left
    done = subprocess.run([*arguments, str(max(sizes))], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "cells") == contents(tmp_path / "whole")
    assert whole.new_cells == 990


def test_an_interrupt_keeps_what_is_finished_and_says_so(source, expected, tmp_path, monkeypatch):
    fails_at(monkeypatch, "part.4.arrow", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt, match=r"interrupted; \d+ of \d+ files are finished and kept in"):
        convert(source, tmp_path / "cells", workers=2)
    monkeypatch.undo()
    convert(source, tmp_path / "cells")
    assert contents(tmp_path / "cells") == expected


def test_a_damaged_part_keeps_the_others_and_can_be_replaced(source, expected, tmp_path):
    part = source / "train" / "part.3.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:4] + bytes(296) + whole[300:])
    with pytest.raises(
        StoreError, match=r"train/part.3.parquet is damaged: row group .* files are finished and kept in"
    ):
        convert(source, tmp_path / "cells", workers=1)
    before = files(tmp_path / "cells.partial" / "store")
    part.write_bytes(whole)
    os.utime(part, ns=(1, 1))  # a part that is not converted yet may be another file than before
    convert(source, tmp_path / "cells")
    assert contents(tmp_path / "cells") == expected
    assert before.items() <= files(tmp_path / "cells").items()


@pytest.fixture
def interrupted(source, tmp_path, monkeypatch):
    fails_at(monkeypatch, "part.3.arrow", no_space())
    with pytest.raises(StoreError):
        convert(source, tmp_path / "cells", workers=1)
    monkeypatch.undo()
    return tmp_path / "cells"


def test_resuming_from_another_source_is_refused(source, interrupted, tmp_path):
    other = shutil.copytree(source, tmp_path / "other")
    with pytest.raises(StoreError) as caught:
        convert(other, interrupted)
    assert str(caught.value) == (
        f"{interrupted}.partial was begun with the source {source}, not {other}; name another destination, or delete "
        f"{interrupted}.partial to begin anew"
    )


@pytest.mark.parametrize("name", ["train/part.1.parquet", "var.parquet"])
def test_resuming_is_refused_when_a_converted_file_has_changed(source, interrupted, name):
    os.utime(source / name, ns=(1, 1))
    with pytest.raises(StoreError) as caught:
        convert(source, interrupted)
    assert str(caught.value) == (
        f"{source / name} has changed since {interrupted}.partial was begun; put it back as it was, or delete "
        f"{interrupted}.partial to begin anew"
    )
    (source / name).rename(source / f"{name}.away")
    with pytest.raises(StoreError, match=r"which the source lacks now; delete|var.parquet does not exist"):
        convert(source, interrupted)


def test_a_finished_file_that_is_gone_or_cut_is_made_anew(source, interrupted, expected):
    store = Path(f"{interrupted}.partial") / "store"
    (store / "var.parquet").unlink()
    (store / "train" / "part.0.arrow").write_bytes(b"cut")
    (store.parent / "records" / "train" / "part.1.arrow.json").write_text("")  # after a power cut
    convert(source, interrupted, verify=True)
    assert contents(interrupted) == expected


def test_a_second_conversion_into_the_same_place_is_refused(source, interrupted, tmp_path):
    with (tmp_path / "cells.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(
            StoreError, match=r"another process is at work in .*cells.partial; let it finish, or end it"
        ):
            convert(source, interrupted)
    convert(source, interrupted)


def test_a_destination_that_comes_into_being_meanwhile_is_not_overwritten(source, tmp_path, monkeypatch):
    make_files = module._make_files

    def meanwhile(*arguments):
        (tmp_path / "cells").mkdir()
        return make_files(*arguments)

    monkeypatch.setattr(module, "_make_files", meanwhile)
    with pytest.raises(
        StoreError, match=r"cells exists already; remove it or name another folder; .* are finished and kept"
    ):
        convert(source, tmp_path / "cells")
    assert not contents(tmp_path / "cells")
    (tmp_path / "cells").rmdir()
    monkeypatch.undo()
    assert convert(source, tmp_path / "cells").new_cells == 0


def test_a_stranger_s_folder_in_the_place_of_the_work_is_left_alone(source, tmp_path):
    (tmp_path / "cells.partial").mkdir()
    (tmp_path / "cells.partial" / "thesis.tex").write_text("mine")
    (tmp_path / "cells.partial" / ".git").write_text("mine")
    with pytest.raises(StoreError, match=r"cells.partial is needed for the work, but holds 'thesis.tex'; move it away"):
        convert(source, tmp_path / "cells")
    assert len(contents(tmp_path / "cells.partial")) == 2


@pytest.mark.parametrize(("key", "was"), [("format_version", 0), ("block_size", 64)])
def test_work_begun_in_another_way_is_not_mixed_with_ours(source, interrupted, key, was):
    begun = Path(f"{interrupted}.partial") / "begun.json"
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {key: was}))
    with pytest.raises(StoreError, match=rf"was begun with the {key} {was}, not .*; name another"):
        convert(source, interrupted)


def test_a_place_that_may_not_be_written_is_named(source, tmp_path, monkeypatch):
    make = Path.mkdir

    def refused(path, *arguments, **flags):  # root may write anywhere, so that no mode of a folder would do
        if path.name == "cells.partial":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        make(path, *arguments, **flags)

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(StoreError, match=r"cannot use .*closed/cells.partial: Permission denied"):
        convert(source, tmp_path / "closed" / "cells")


def test_tiny_stores_have_the_types_that_these_tests_count_on(source):
    assert N_TYPES == 5
    assert len(list((source / "train").glob("part.*"))) == N_PARTS


MADE = dict.fromkeys(["a.txt", "b/c.txt", "scratch/d.txt", "scratch/e/f.txt"], Path("none"))


def write(work, name):
    work.finish(name, lambda path: {"bytes": path.write_text(name), "name": name})


def test_files_for_the_work_only_lie_beside_the_folder_to_be_and_go_when_it_is_complete(tmp_path):
    destination, partial = tmp_path / "made", tmp_path / "made.partial"
    with open_work_folder(destination, {"format": 1}, MADE) as work:
        for name in MADE:
            write(work, name)
        assert work.place("scratch/d.txt") == partial / "scratch" / "d.txt"
        assert work.place("b/c.txt") == partial / "store" / "b" / "c.txt"
        assert set(contents(partial / "scratch")) == {Path("d.txt"), Path("e/f.txt")}
        assert set(contents(partial / "store")) == {Path("a.txt"), Path("b/c.txt")}
        assert work.finished() == {name: {"bytes": len(name), "name": name} for name in MADE}
        work.publish(destination)
    assert contents(destination) == {Path("a.txt"): b"a.txt", Path("b/c.txt"): b"b/c.txt"}
    assert list(tmp_path.iterdir()) == [destination]


def test_files_for_the_work_only_are_found_again_when_it_is_taken_up(tmp_path, capsys):
    destination, partial = tmp_path / "made", tmp_path / "made.partial"

    def interrupted():
        with open_work_folder(destination, {"format": 1}, MADE) as work:
            for name in ("a.txt", "scratch/d.txt", "scratch/e/f.txt"):
                write(work, name)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="interrupted; 3 of 4 files are finished and kept in"):
        interrupted()
    before = files(partial / "scratch")
    (partial / "scratch" / "e" / ".f.7.txt").write_text("begun")  # of a killed process
    (partial / "scratch" / "d.txt").write_text("cut")
    with open_work_folder(destination, {"format": 1}, MADE) as work:
        assert set(work.finished()) == {"a.txt", "scratch/e/f.txt"}
        assert f"resuming: 2 of 4 files are finished in {partial}" in capsys.readouterr().out
        assert files(partial / "scratch" / "e") == {Path("f.txt"): before[Path("e/f.txt")]}
        write(work, "scratch/d.txt")
        work.forget("a.txt")
        assert set(work.finished()) == {"scratch/d.txt", "scratch/e/f.txt"}
        work.publish(destination)
    assert set(contents(tmp_path)) == {Path("made/a.txt")}


def test_a_file_whose_name_only_begins_like_scratch_is_part_of_the_folder(tmp_path):
    with open_work_folder(tmp_path / "made", {}, {"scratched.txt": Path("none")}) as work:
        write(work, "scratched.txt")
        work.publish(tmp_path / "made")
    assert set(contents(tmp_path)) == {Path("made/scratched.txt")}
