"""Rows of benchmarks/gpu.py: printed as they come, within a time; and what is said of them at the end."""

import contextlib
import math
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

#: Share of the minutes after which no row of a section is begun any more.
SECTIONS = {
    "check": 0.12, "card": 0.5, "training": 0.5, "inference": 0.6, "compiled": 0.7, "stages": 0.77, "epoch": 0.9,
    "ensemble": 0.96,
}  # fmt: skip
#: Cells of the published training split.
EPOCH_CELLS = 15_240_192
_COLUMNS = ("model", "precision", "batch", "ms", "spread", "cells/s", "floor ms", "of floor", "torch ms", "x")


class Report:
    """Rows, printed as they come; and the clock that says whether there is time for another.

    Parameters
    ----------
    minutes
        For everything.
    sections
        The others are not measured.

    Attributes
    ----------
    rows, notes
        What was measured, and what was not.
    failed
        Whether a row of ours failed, or a check found something wrong.
    """

    def __init__(self, minutes: float, sections: Collection[str] = SECTIONS):
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.failed = False
        self._sections = sections
        self._began, self._budget = time.monotonic(), 60 * minutes
        self._dearest: dict[str, float] = {}
        self._incomplete: set[str] = set()

    def remaining(self, section: str) -> float:
        """Return the seconds until the end of a section."""
        return SECTIONS[section] * self._budget - (time.monotonic() - self._began)

    def say(self, line: str) -> None:
        """Print a line with the time so far."""
        print(f"[{time.monotonic() - self._began:4.0f} s] {line}", flush=True)

    def note(self, line: str) -> None:
        """Say what is missing, now and at the end."""
        self.notes.append(line)
        self.say(line)

    def row(self, section: str, line: str, **values: Any) -> None:
        """Keep a row, and print it."""
        self.rows.append({"section": section, **values})
        self.say(line)

    @contextlib.contextmanager
    def part(self, section: str, what: str, like: str = "", vital: bool = True) -> Iterator[bool]:
        """Give whether there is time for a part: as much as the longest that was ``like`` it took. Catch its errors.

        Where one that is ``vital`` fails, the run has failed.
        """
        name = f"{section}: {what}"
        like = like or section
        if section not in self._sections:
            yield False
            return
        if self.remaining(section) < self._dearest.get(like, 0.0):
            self._incomplete.add(section)
            self.note(f"left out, no time: {name}")
            yield False
            return
        began = time.monotonic()
        try:
            yield True
        except Exception as error:  # noqa: BLE001 (out of memory, say: what else can be measured is)
            self.failed = self.failed or vital
            self.note(f"FAILED {name}: {type(error).__name__}: {error}".splitlines()[0][:300])
        self._dearest[like] = max(self._dearest.get(like, 0.0), time.monotonic() - began)

    def complete(self, section: str) -> bool:
        """Say whether nothing of a section was left out for want of time."""
        return section not in self._incomplete

    def all(self, section: str) -> list[dict[str, Any]]:
        """Return the rows of a section."""
        return [row for row in self.rows if row["section"] == section]

    def find(self, section: str, **values: Any) -> dict[str, Any] | None:
        """Return the last row with these values, if there is one."""
        rows = reversed(self.all(section))
        return next((row for row in rows if all(row[name] == value for name, value in values.items())), None)


def header(section: str) -> str:
    """Return the names of the columns of training and inference."""
    return "  ".join((section, *_COLUMNS[1:]))


def columns(row: dict[str, Any]) -> list[str]:
    """Return a row of training or inference as text, column by column."""
    torch, floor = row["torch_ms"], ("-", "-")
    if math.isfinite(row["floor_ms"]):  # else the card was not measured
        floor = f"{row['floor_ms']:.3f} {row['bound']}", f"{100 * row['of_floor']:.0f}%"
    return [
        row["model"], row["precision"], f"{row['batch']}", f"{row['ms']:.3f}", f"{100 * row['spread']:.0f}%",
        f"{row['cells_per_second']:,.0f}", *floor,
        *(("-", "-") if torch is None else (f"{torch:.3f}", f"{torch / row['ms']:.1f}")),
    ]  # fmt: skip


def summary(report: Report) -> Iterator[str]:
    """Yield the lines of the summary, in Markdown."""
    yield "Ours from packed cells in host memory; PyTorch's from dense cells on the device, without augmentation."
    yield ""
    for section in ("training", "inference"):
        rows = report.all(section)
        if rows:
            yield f"| {section} | " + " | ".join(_COLUMNS[1:]) + " |"
            yield "| --- " * len(_COLUMNS) + "|"
            yield from ("| " + " | ".join(columns(row)) + " |" for row in rows)
            yield ""
    checks = report.all("check")
    if checks:
        n_wrong = sum(not row["ok"] for row in checks)
        missing = "" if report.complete("check") else "; NOT ALL, for want of time"
        yield f"- {len(checks)} results checked against plain ones: {n_wrong or 'none'} WRONG{missing}"
    for row in report.rows:
        what = f"{row.get('model')} {row.get('precision')} {row.get('batch')}"
        if row["section"] == "compiled":
            ratio = row["torch_ms"] / row["ms"]
            yield f"- torch.compile, training {what}: {row['torch_ms']:.3f} ms, {ratio:.1f} times ours"
        if row["section"] == "epoch":
            measured = f"extrapolated from {row['steps'] * row['batch']:,} cells, with {row['cells']:,} held"
            yield f"- {EPOCH_CELLS:,} cells from {row['where']}, {what}: {row['epoch_seconds']:.1f} s, {measured}"
        if row["section"] == "ensemble":
            yield f"- {row['members']} members, {what}: {row['ratio']:.2f} times one"


def targets(report: Report, model: str, case: dict[str, Any], where: str) -> Iterator[str]:
    """Yield each target beside what was measured.

    Parameters
    ----------
    report
        With the rows.
    model
        Whose epochs are looked at.
    case
        Precision and batch of the rows that are looked at.
    where
        The device and the sizes, for a person.
    """

    def line(target: str, value: float | None, unit: str, limits: Sequence[float]) -> str:
        if value is None:
            return f"- {target}: not measured"
        low, high = limits
        return f"- {target}: {value:,.2f} {unit}, {'yes' if low <= value <= high else 'NO'}"

    yield f"Targets (tf32, batch 2,048, 19,331 genes, one H200) beside what was measured on {where}:"
    tabnet = report.find("training", model="tabnet", **case) or {"ms": None, "torch_ms": None}
    yield line("TabNet's training step <= 2.5 ms", tabnet["ms"], "ms", (0, 2.5))
    ratio = tabnet["torch_ms"] / tabnet["ms"] if tabnet["torch_ms"] else None
    yield line("TabNet's training step >= 8 times PyTorch eager", ratio, "times", (8, float("inf")))
    for other in ("linear", "mlp"):
        row = report.find("training", model=other, **case)
        rate = row["cells_per_second"] if row else None
        yield line(f"training of {other} >= 1,000,000 cells/s", rate, "cells/s", (1e6, float("inf")))
    for place, limit in (("host memory", 60), ("device memory", 30)):
        row = report.find("epoch", where=place, model=model, **case)
        name = f"{EPOCH_CELLS:,} cells of {model} from {place} <= {limit} s"
        yield line(name, row["epoch_seconds"] if row else None, "s", (0, limit))
