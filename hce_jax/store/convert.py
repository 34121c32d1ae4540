"""Convert a merlin store into a cell store, one file for each part of a split; compare the two."""

import dataclasses
import functools
import json
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hce_jax.errors import StoreError
from hce_jax.files import written_aside
from hce_jax.store.block import PACKED_COLUMNS, TOLERANCE, Block
from hce_jax.store.cells import BLOCK_SIZE, FORMAT, FORMAT_VERSION, CellSplit, CellStore, checksum, write_part
from hce_jax.store.merlin import MerlinSplit, MerlinStore
from hce_jax.store.schema import EXPRESSION_COLUMN, SPLITS, STORE_FILE, read_side_files
from hce_jax.store.split import n_readers
from hce_jax.store.threads import Tick, run_in_threads
from hce_jax.store.work_folder import WorkFolder, named_in_errors, open_work_folder, refuse_existing, work_path

#: The default number of workers keeps within this many bytes, so that a machine with 8 GiB can convert any store.
_MEMORY = 4 << 30
#: A worker takes up to this many times the dense expression of a row group (measured: most of it arrow's reader).
_ROW_GROUPS_PER_WORKER = 8


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A cell store that was made, or compared with its source.

    Attributes
    ----------
    store
        Its folder.
    cells
        Cells of each split.
    cells_as_counts
        Cells whose counts were recovered; the others are kept as the values they have.
    files, bytes
        Number and size of the files that hold cells.
    new_cells, seconds
        Cells that this call converted, and the time that took.
    verified
        Whether it was compared with its source.
    """

    store: Path
    cells: dict[str, int]
    cells_as_counts: int
    files: int
    bytes: int
    new_cells: int
    seconds: float
    verified: bool


def convert(
    source: str | Path, destination: str | Path, *, workers: int | None = None, verify: bool = False
) -> Conversion:
    """Convert a merlin store into a cell store, which is smaller and read many times as fast.

    Expression comes back within 1e-6: as counts where they explain it, decided cell by cell, else as the values it
    has. Integer and boolean columns and the side files are kept. An interrupted conversion is taken up by the same
    call; a store whose conversion is finished is only compared with its source, if ``verify`` says so.

    Parameters
    ----------
    source
        Folder of a merlin store; it is only read.
    destination
        Folder of the cell store. It appears when it is complete; until then the work lies in ``NAME.partial`` beside.
    workers
        Files converted at a time, each by a thread. By default one for each processor, as far as 4 GiB of memory
        suffice for their row groups.
    verify
        Read all of the result again and compare it with the source before it gets its name.

    Raises
    ------
    StoreError
        If the source cannot be converted, the destination exists or cannot be written, another process converts into
        it, or the comparison finds a difference. What is finished is kept.

    Examples
    --------
    >>> convert("merlin_cxg_2023_05_15_sf-log1p", "cells").cells["train"]  # doctest: +SKIP
    15240192
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    source, destination = Path(source), Path(destination)
    _check_places(source, destination)
    if not verify:
        refuse_existing(destination)
    plan = _Plan.of(source)
    workers = workers or plan.default_workers()
    if destination.exists():
        print(f"{destination} exists: comparing it with {source}, converting nothing", flush=True)
        about = read_side_files(destination).about
        _verify(plan, destination, about, workers)
        return _conversion(destination, about, verified=True)
    started = time.perf_counter()
    with open_work_folder(destination, plan.settings, {name: plan.source_file(name) for name in plan.names}) as work:
        new_cells = _make_files(plan, work, workers)
        seconds = time.perf_counter() - started
        about = plan.describe(work.finished())
        with named_in_errors(work.store / STORE_FILE) as path, written_aside(path) as aside:
            aside.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        if verify:
            _verify(plan, work.store, about, workers, forget=work.forget)
        work.publish(destination)
    return _conversion(destination, about, verified=verify, new_cells=new_cells, seconds=seconds)


def _conversion(
    store: Path, about: dict[str, Any], *, verified: bool, new_cells: int = 0, seconds: float = 0.0
) -> Conversion:
    parts = {name: split["parts"] for name, split in about["splits"].items()}
    every = [part for each in parts.values() for part in each]
    return Conversion(
        store=store,
        cells={name: sum(part["cells"] for part in each) for name, each in parts.items()},
        cells_as_counts=sum(part["cells_as_counts"] for part in every),
        files=len(every),
        bytes=sum(part["bytes"] for part in every),
        new_cells=new_cells,
        seconds=seconds,
        verified=verified,
    )


def _check_places(source: Path, destination: Path) -> None:
    if not source.is_dir():
        raise StoreError(f"{source} is not a folder; name the folder of a merlin store")
    inner, outer = source.resolve(), destination.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner) or inner.is_relative_to(work_path(outer)):
        raise StoreError(f"{source} and {destination} lie in one another; name a destination beside the source")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What there is to convert.

    Attributes
    ----------
    store
        The source.
    parts
        By the name of the file to be made, ``train/part.0.arrow``, the cells that it will hold.
    side_files
        Names of the files to be copied.
    columns
        Names of the integer columns.
    """

    store: MerlinStore
    parts: dict[str, MerlinSplit]
    side_files: tuple[str, ...]
    columns: tuple[str, ...]

    @staticmethod
    def of(source: Path) -> "_Plan":
        """Look through a store, without reading its cells."""
        side = read_side_files(source)
        kind = side.about.get("format", "merlin")
        if kind != "merlin":
            what = "is a cell store already" if kind == FORMAT else f"is a store of the format {kind!r}"
            raise StoreError(f"{source} {what}; convert takes a store in the merlin format")
        store = MerlinStore(side)
        splits = [store.split(name) for name in SPLITS if store.has_split(name)]
        if not splits:
            raise StoreError(f"{source} has no {'/, '.join(SPLITS)}/ with part.N.parquet files; nothing to convert")
        if absent := [name for name in SPLITS if not store.has_split(name)]:
            print(f"{source} lacks its {' and '.join(absent)} split; converting what is there", file=sys.stderr)
        parts, paths = {}, []
        for split in splits:
            groups = defaultdict(list)
            for group in split.row_groups:
                groups[group[0]].append(group)
            for path in store.parts(split.name):
                parts[f"{split.name}/{path.stem}.arrow"] = dataclasses.replace(split, row_groups=tuple(groups[path]))
                paths.append(path)
            _say_gaps(store.parts(split.name))
        return _Plan(store, parts, tuple(_side_files(source)), _common_columns(paths))

    @property
    def names(self) -> list[str]:
        """The files to be made."""
        return [*self.side_files, *self.parts]

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same when the work is taken up again."""
        return {
            "source": str(self.store.side.path.resolve()),
            "format_version": FORMAT_VERSION,
            "block_size": BLOCK_SIZE,
        }

    def source_file(self, name: str) -> Path:
        """Return the file of the source from which one is made."""
        path = self.store.side.path / name
        return path.with_suffix(".parquet") if name in self.parts else path

    def default_workers(self) -> int:
        """One for each processor, as far as memory suffices."""
        largest = max(split.block_sizes.max(initial=1) for split in self.parts.values())
        each = _ROW_GROUPS_PER_WORKER * int(largest) * self.store.side.n_genes * 4
        return max(1, min(n_readers(), _MEMORY // each))

    def blocks(self, name: str) -> Iterator[Block]:
        """Read the cells of a file to be made, packed."""
        split = self.parts[name]
        if not split.row_groups:  # a part without cells still counts as a part
            no_cells = np.zeros((0, self.store.side.n_genes), np.float32)
            yield Block.of_values(no_cells, dict.fromkeys(self.columns, np.zeros(0, np.int64)))
        for index in range(len(split.row_groups)):
            yield Block.of_recovered_counts(*split.read_dense(index, self.columns))

    def describe(self, finished: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Return what store.json says."""
        splits: dict[str, dict[str, Any]] = {}
        for split in dict.fromkeys(part.name for part in self.parts.values()):
            parts = [finished[name] for name in self.parts if name.startswith(f"{split}/")]
            total = {key: sum(part[key] for part in parts) for key in ("cells", "non_zeros", "cells_as_counts")}
            splits[split] = total | {
                "cells_as_values": total["cells"] - total["cells_as_counts"],
                "blocks": sum(-(-part["cells"] // BLOCK_SIZE) for part in parts),
                "parts": parts,
            }
        return self.store.side.about | {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "source": str(self.store.side.path),
            "block_size": BLOCK_SIZE,
            "columns": [*PACKED_COLUMNS, *self.columns],
            "splits": splits,
            "side_files": {name: finished[name] for name in self.side_files},
        }


def _say_gaps(parts: Sequence[Path]) -> None:
    there = {path.name for path in parts}
    last = int(parts[-1].name.split(".")[1])
    absent = [name for number in range(last) if (name := f"part.{number}.parquet") not in there]
    if absent:
        print(f"{parts[0].parent} lacks {', '.join(absent[:5])}; converting what is there", file=sys.stderr)


def _common_columns(parts: Sequence[Path]) -> tuple[str, ...]:
    """Return the integer and boolean columns of the parts, which must all have the same."""
    with ThreadPoolExecutor(max_workers=16) as pool:
        schemas = list(pool.map(pq.read_schema, parts))
    columns = [tuple(field.name for field in schema if _is_integer(field.type)) for schema in schemas]
    first = columns[0]
    for part, names in zip(parts, columns, strict=True):
        differing = set(names) ^ set(first)
        if differing:
            one, other = (part, parts[0]) if differing & set(names) else (parts[0], part)
            raise StoreError(f"{one} has the column {min(differing)!r}, {other} has not; all parts must have the same")
        wrong = [name for name in names if name in PACKED_COLUMNS or names.count(name) > 1]
        if wrong:
            why = "of which a cell store keeps its own" if wrong[0] in PACKED_COLUMNS else "more than once"
            raise StoreError(f"{part} has a column {wrong[0]!r}, {why}; rename it")
    others = [name for name in schemas[0].names if name not in (*first, EXPRESSION_COLUMN)]
    if others:
        print(f"left out, because they are not integers: {', '.join(others)}", flush=True)
    return first


def _is_integer(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _side_files(source: Path) -> Iterator[str]:
    """Name all files that are not parts, hidden, store.json, of a run, or parquet's own notes on the parts."""
    for folder, folders, files in os.walk(source, followlinks=True):
        inside = Path(folder).relative_to(source)
        folders[:] = sorted(each for each in folders if not each.startswith(".") and inside / each != Path("tb_logs"))
        for file in sorted(files):
            of_split = inside.parts[:1] and inside.parts[0] in SPLITS
            about_parts = of_split and file.startswith(("part.", "_"))
            if not file.startswith(".") and not about_parts and inside / file != Path(STORE_FILE):
                yield (inside / file).as_posix()


def _make_files(plan: _Plan, work: WorkFolder, workers: int) -> int:
    """Make the files that are not finished; return the cells in them."""
    finished = work.finished()
    names = [name for name in plan.names if name not in finished]
    n_finished = sum(about.get("cells", 0) for about in finished.values())
    n_new = sum(plan.parts[name].n_cells for name in names if name in plan.parts)

    def make(name: str, tick: Tick) -> None:
        if name in plan.parts:
            work.finish(name, lambda path: dataclasses.asdict(write_part(path, _ticking(plan.blocks(name), tick))))
        else:
            work.finish(name, lambda path: _copy(plan.source_file(name), path))

    run_in_threads("convert", make, names, workers, done=n_finished, total=n_finished + n_new)
    return n_new


def _copy(source: Path, path: Path) -> dict[str, Any]:
    with written_aside(path) as aside:
        with source.open("rb") as original, aside.open("wb") as copy:
            shutil.copyfileobj(original, copy, 1 << 22)
        return {"bytes": aside.stat().st_size, "xxh3_64": checksum(aside)}


def _ticking(blocks: Iterator[Block], tick: Tick) -> Iterator[Block]:
    for block in blocks:
        yield block
        tick(len(block))


def _verify(
    plan: _Plan, folder: Path, about: dict[str, Any], workers: int, forget: Callable[[str], None] = lambda name: None
) -> None:
    """Read a cell store again and compare it with its source; a file that differs is forgotten."""
    if about.get("format") != FORMAT:
        raise StoreError(f"{folder} is not a cell store; name another folder")
    store = CellStore(dataclasses.replace(plan.store.side, path=folder, about=about))
    splits = {name: store.split(name) for name in SPLITS if store.has_split(name)}
    made = {f"{name}/{part.file}": part for name, split in splits.items() for part in split.parts}
    files = [*about.get("side_files", {}), *made]
    differing = set(files) ^ set(plan.names)
    if differing or about["columns"] != [*PACKED_COLUMNS, *plan.columns]:
        what = f"the file {min(differing)}" if differing else "other columns"
        raise StoreError(f"{folder} is no conversion of {plan.store.side.path}: {what} is in one of them only")

    def compare(name: str, tick: Tick) -> None:
        try:
            if name in made:
                split = splits[plan.parts[name].name]
                _compare_cells(plan, name, dataclasses.replace(split, parts=(made[name],)), tick)
                expected = made[name].xxh3_64
            else:
                expected = about["side_files"][name]["xxh3_64"]
                if checksum(plan.source_file(name)) != expected:
                    raise StoreError(f"{folder / name} is not a copy of {plan.source_file(name)}")
            with named_in_errors(folder / name) as path:
                if checksum(path) != expected:
                    raise StoreError(f"{path} is damaged: its checksum is not that in {STORE_FILE}")
        except StoreError:
            forget(name)
            raise

    run_in_threads("verify", compare, files, workers, total=sum(part.cells for part in made.values()))


def _compare_cells(plan: _Plan, name: str, cells: CellSplit, tick: Tick) -> None:
    original = plan.parts[name]
    path = cells.side.path / name
    if cells.n_cells != original.n_cells:
        raise StoreError(f"{path} has {cells.n_cells} cells, {plan.source_file(name)} has {original.n_cells}")
    size = cells.block_size
    read = functools.lru_cache(maxsize=1)(lambda number: cells.read_block(number, plan.columns))  # may span row groups
    start = 0
    for index, n_cells in enumerate(original.block_sizes):
        x_ng, columns = original.read_dense(index, plan.columns)
        stop = start + int(n_cells)
        for number in range(start // size, -(-stop // size)):
            low, high = max(start, number * size), min(stop, (number + 1) * size)
            block, rows = read(number).slice(low % size, low % size + high - low), slice(low - start, high - start)
            missed = abs(block.x.toarray() - x_ng[rows]).max()
            wrong = [each for each in plan.columns if not np.array_equal(block.column(each), columns[each][rows])]
            if not missed <= TOLERANCE or wrong:
                what = f"the column {wrong[0]!r}" if wrong else f"expression (by {missed:.2g})"
                raise StoreError(f"{path} differs from {plan.source_file(name)} in block {number}: {what}")
            tick(high - low)
        start = stop
