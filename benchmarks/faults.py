"""Kill a training at random moments, go on with it each time, and compare it with one that nothing disturbed.

    python benchmarks/faults.py                   20 kills of a linear model on the simulated atlas, about 5 minutes
    python benchmarks/faults.py --kills 5 --model tabnet --epochs 6

Every kill is SIGKILL. Every second one falls into a save: the process is killed as soon as a half-written save is seen,
a few milliseconds later each time. At the end the saves, the best checkpoints, the result and TensorBoard's points of
the two runs are compared bit for bit; the exit code is 1 if anything differs.
"""

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from hce_jax.checkpoint import load_model, load_state
from hce_jax.store.builtin import builtin_atlas

ROOT = Path(__file__).parents[1]
#: Longest that a training is left alone after its first words, in seconds.
_LONGEST = 6.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--model", choices=("linear", "mlp", "tabnet"), default="linear")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--train_arguments", nargs="*", default=[], metavar="--config.X=Y", help="further ones")
    args = parser.parse_args(arguments)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = (Path(folder) / name for name in ("whole", "killed"))
        began = time.monotonic()
        process = start(args, whole)
        check_ended(process)
        print(
            f"undisturbed: {time.monotonic() - began:.0f} s\n\nkill  went on from  after, s  during a save  left behind"
        )
        for number in range(args.kills):
            process = start(args, killed)
            row = kill(process, killed, rng, in_a_save=number % 2 == 1)
            if row is None:
                print(f"the training was over before kill {number + 1}: more --epochs are needed")
                return 1
            print(f"{number + 1:>4}  {row}", flush=True)
        check_ended(start(args, killed))
        runs = [run_of(log_dir) for log_dir in (whole, killed)]
        found = differences(*runs)
        print("\n" + ("\n".join(found) or f"after {args.kills} kills everything is equal, bit for bit"))
    return 1 if found else 0


def start(args: argparse.Namespace, log_dir: Path) -> subprocess.Popen[str]:
    """Start the training, or go on with it: it is the same command."""
    command = [
        sys.executable, str(ROOT / "train.py"), "--config", str(ROOT / "configs" / f"{args.model}_hce.py"),
        f"--config.data_path={builtin_atlas().absolute()}", f"--config.log_dir={log_dir}", "--config.batch_size=256",
        f"--config.max_epochs={args.epochs}", f"--config.early_stopping_patience={args.epochs}",
        "--config.checkpoint_every_minutes=0.005", "--config.save_top_k=2", "--config.log_every_n_steps=10",
        *args.train_arguments,
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def check_ended(process: subprocess.Popen[str]) -> None:
    """Wait for a training's end, which must be a good one."""
    output, errors = process.communicate()
    if process.returncode:
        sys.exit(f"the training ended with {process.returncode}:\n{output}\n{errors}")


def kill(process: subprocess.Popen[str], log_dir: Path, rng: random.Random, in_a_save: bool) -> str | None:
    """Kill a training once it trains; return what there is to say, or None if it ended by itself."""
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(iter(process.stdout.readline, "")))  # type: ignore[union-attr]
    reader.start()
    while not any(line.startswith("run ") for line in said) and process.poll() is None:
        time.sleep(0.01)
    began, wait = time.monotonic(), rng.uniform(0.5, _LONGEST)
    time.sleep(wait)
    if in_a_save:
        while not half_written(log_dir) and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.03))
    process.send_signal(signal.SIGKILL)
    after = time.monotonic() - began
    ended = process.wait() != -signal.SIGKILL
    reader.join()
    if ended:
        return None
    step = next((match[1] for line in said if (match := re.search(r"^goes on .* from step ([\d,]+), in", line))), "0")
    left = ", ".join(sorted({path.name.split(".orbax")[0] + " half" for path in half_written(log_dir)}))
    return f"step {step:>7}  {after:>8.2f}  {'yes' if in_a_save else 'no':<13}  {left or 'nothing half'}"


def half_written(log_dir: Path) -> list[Path]:
    """Return the saves and checkpoints that are being written or replaced."""
    folders = list(log_dir.glob("*/default/version_0/checkpoints"))
    inside = [path for folder in folders for path in (*folder.glob("*"), *folder.glob("last/*"))]
    return [path for path in inside if "orbax-checkpoint-tmp" in path.name or path.suffix in (".new", ".replaced")]


def run_of(log_dir: Path) -> Path:
    """Return the one run under a folder."""
    [run] = log_dir.glob("*/default/version_*")
    return run


def differences(one: Path, other: Path) -> list[str]:
    """Compare two runs bit for bit."""
    found = []
    for what, read in (("result", result_of), ("saves", saves_of), ("checkpoints", models_of), ("points", points_of)):
        ours, theirs = read(one), read(other)
        different = [name for name in {*ours, *theirs} if name not in ours or not same(ours[name], theirs.get(name))]
        found += [f"{what}: {name} differs" for name in sorted(map(str, different))]
        print(f"compared {what}: {len(ours)}")
    return found


def same(ours: Any, theirs: Any) -> bool:
    """Tell whether two values, or arrays, are the same bits."""
    if isinstance(ours, np.ndarray):
        return isinstance(theirs, np.ndarray) and ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()
    return ours == theirs


def result_of(run: Path) -> dict[str, Any]:
    """Return what result.json says."""
    return json.loads((run / "result.json").read_text())


def saves_of(run: Path) -> dict[str, Any]:
    """Return the arrays and the progress of every save; the steps of the saves before the last one are accidents."""
    newest = max((run / "checkpoints" / "last").iterdir(), key=lambda path: int(path.name))
    arrays, progress = load_state(newest)
    return {"step": newest.name, **arrays, **progress}


def models_of(run: Path) -> dict[str, Any]:
    """Return the weights in every checkpoint."""
    found: dict[str, Any] = {}
    for path in (run / "checkpoints").glob("*.ckpt"):
        predictor = load_model(path)
        for where, leaf in jax.tree.leaves_with_path((predictor.params, predictor.stats)):
            found[f"{path.name} {jax.tree_util.keystr(where)}"] = np.asarray(leaf)
    return found


def points_of(run: Path) -> dict[Any, Any]:
    """Return the values of TensorBoard's points by tag and step: one each, where killed processes' points are void.

    Those of the test at the end are there twice if the kill fell between them and result.json.
    """
    points: dict[Any, Any] = {}
    files = [events(path.read_bytes()) for path in run.glob("events.out.tfevents.*")]
    for file in sorted(filter(None, files), key=lambda file: file[0].wall_time):
        for event in file:
            if event.HasField("session_log"):
                points = {key: value for key, value in points.items() if key[1] < event.step}
            for value in event.summary.value:
                key = (value.tag, event.step)
                earlier = [] if value.tag == "hp_metric" or value.tag.startswith("test_") else points.get(key, [])
                points[key] = [*earlier, value.simple_value]
    return points


def events(data: bytes) -> list[Event]:
    """Read a record file as far as it is whole: length, its checksum, an event, its checksum."""
    found = []
    while len(data) > 12:
        length = int.from_bytes(data[:8], "little")
        record, checksum = data[12 : 12 + length], data[12 + length : 16 + length]
        if int.from_bytes(checksum, "little") != masked_crc32c(record):
            break
        found.append(Event.FromString(record))
        data = data[16 + length :]
    return found


if __name__ == "__main__":
    sys.exit(main())
