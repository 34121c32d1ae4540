"""The kernels of a GPU in what JAX's profiler writes, read with the standard library."""

import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple


class Kernel(NamedTuple):
    """A kernel in a trace: seconds of all its runs, their number, and where in the program it comes from."""

    name: str
    seconds: float
    runs: int
    scope: str


def read_kernels(trace: Path) -> list[Kernel]:
    """Read the kernels that a GPU ran out of a trace of JAX's profiler (trace events as JSON, compressed)."""
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {(e["name"], e["pid"], e.get("tid")): e["args"].get("name", "") for e in events if e.get("ph") == "M"}
    devices = {pid for (what, pid, _), name in names.items() if what == "process_name" and "GPU" in name}
    streams = {
        (pid, tid)
        for (what, pid, tid), name in names.items()
        if what == "thread_name" and pid in devices and name.startswith("Stream")
    }
    runs: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("ph") == "X" and (event["pid"], event.get("tid")) in streams:
            runs.setdefault(event["name"], []).append(event)
    return [
        Kernel(name, sum(event["dur"] for event in own) / 1e6, len(own), scope_of(own[0].get("args", {})))
        for name, own in runs.items()
    ]


def scope_of(args: dict[str, Any]) -> str:
    """Return the name of the operation that a kernel belongs to, as far as the trace has it."""
    return str(next((args[key] for key in ("tf_op", "name", "hlo_op") if args.get(key)), ""))
