"""Where runs lie and what is in them: names only, as the published code has them.

{log_dir}/{model_name}[_hierarchical_loss]/default/version_{N}/
    hparams.yaml  parameters.json  config.json  events.out.tfevents.*  result.json, once it is finished
    checkpoints/val_f1_macro_epoch={E}_val_f1_macro={F:.3f}.ckpt/
    checkpoints/last/{step}/                                            for going on
    sctab_test/val_f1_macro_epoch={E}_val_f1_macro={F:.3f}/
"""

import fcntl
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hce_jax.errors import CheckpointError, ConfigError

CONFIG_FILE = "config.json"
RESULT_FILE = "result.json"
_CHECKPOINT = re.compile(r"val_f1_macro_epoch=(\d+)_val_f1_macro=(\d+\.\d+)\.ckpt")


def runs_folder(log_dir: Path, model_name: str, use_hierarchical_loss: bool) -> Path:
    """Return the folder of all versions of a run.

    Examples
    --------
    >>> runs_folder(Path("tb_logs"), "linear", use_hierarchical_loss=True).as_posix()
    'tb_logs/linear_hierarchical_loss/default'
    """
    return log_dir / (model_name + ("_hierarchical_loss" if use_hierarchical_loss else "")) / "default"


def version_of(run: Path) -> int:
    """Return the version of a run.

    Examples
    --------
    >>> version_of(Path("tb_logs/linear/default/version_3"))
    3
    """
    return int(run.name.removeprefix("version_"))


def versions(parent: Path) -> list[int]:
    """Return the versions there are, in order.

    Examples
    --------
    >>> versions(Path("no/such/folder"))
    []
    """
    if not parent.is_dir():
        return []
    return sorted(int(match[1]) for path in parent.iterdir() if (match := re.fullmatch(r"version_(\d+)", path.name)))


def find_run(parent: Path, config: Mapping[str, Any]) -> Path | None:
    """Return the newest run with this very configuration; None if there is none.

    Raises
    ------
    ConfigError
        If a run's configuration cannot be read.

    Examples
    --------
    >>> find_run(Path("no/such/folder"), {}) is None
    True
    """
    wanted = json.loads(json.dumps(dict(config)))
    for version in reversed(versions(parent)):
        run = parent / f"version_{version}"
        found = read_config(run)
        if found == wanted:
            return run
        if found is None and (run / "checkpoints" / "last").exists():  # ours, and perhaps the very one
            raise ConfigError(
                f"{run / CONFIG_FILE} cannot be read, so which run it is cannot be told; bring it back, or move {run} "
                "away, or begin another run with --new_run"
            )
    return None


def read_config(run: Path) -> dict[str, Any] | None:
    """Return the configuration of a run; None where it has none that can be read.

    Examples
    --------
    >>> read_config(Path("no/such/run")) is None
    True
    """
    try:
        return json.loads((run / CONFIG_FILE).read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Have other processes wait while this one looks for a run there and begins one.

    Examples
    --------
    >>> with held_folder(parent):  # doctest: +SKIP
    ...     ...
    """
    _make(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def held_run(run: Path) -> Iterator[None]:
    """Keep other processes from training this run; a killed process lets go of it.

    Raises
    ------
    ConfigError
        If another process trains it.

    Examples
    --------
    >>> with held_run(run):  # doctest: +SKIP
    ...     ...
    """
    with (run / CONFIG_FILE).open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another process is training the run {run}; wait for it, or begin a run of its own with --new_run"
            ) from error
        yield


def _make(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write the run to {folder} ({error.strerror}); pass a writable folder with --config.log_dir"
        ) from error
    return folder


def new_run_folder(parent: Path) -> Path:
    """Make the folder of the next version of a run; the caller holds ``parent`` (:func:`held_folder`).

    Raises
    ------
    ConfigError
        If it cannot be written there.

    Examples
    --------
    >>> import tempfile
    >>> new_run_folder(Path(tempfile.mkdtemp())).name
    'version_0'
    """
    _make(parent)
    return _make(parent / f"version_{max(versions(parent), default=-1) + 1}")


def checkpoint_name(epoch: int, val_f1_macro: float) -> str:
    """Return the name of a checkpoint.

    Examples
    --------
    >>> checkpoint_name(3, 0.81234)
    'val_f1_macro_epoch=3_val_f1_macro=0.812.ckpt'
    """
    return f"val_f1_macro_epoch={epoch}_val_f1_macro={val_f1_macro:.3f}.ckpt"


def epoch_and_score(name: str) -> tuple[int, float] | None:
    """Return the epoch and the validation macro F1 in the name of a checkpoint; None if it is another name.

    Examples
    --------
    >>> epoch_and_score("val_f1_macro_epoch=3_val_f1_macro=0.812.ckpt")
    (3, 0.812)
    """
    match = _CHECKPOINT.fullmatch(name)
    return (int(match[1]), float(match[2])) if match else None


def best_checkpoint(run: Path, exact_score: Callable[[Path], float] = lambda path: 0.0) -> Path | None:
    """Return the checkpoint of a run with the highest F1 in its name; None if there is none.

    Names hold three digits: of checkpoints with the same, the one with the highest exact score, and then the earliest,
    is taken. A checkpoint of ours is a folder, one of the published code a file.

    Examples
    --------
    >>> best_checkpoint(Path("no/such/run")) is None
    True
    """
    found = [
        (*described, path) for path in (run / "checkpoints").glob("*") if (described := epoch_and_score(path.name))
    ]
    best = [(epoch, path) for epoch, score, path in found if score == max(other for _, other, _ in found)]
    if len(best) > 1:
        best.sort(key=lambda each: (-exact_score(each[1]), each[0]))
    return best[0][1] if best else None


def newest_run(log_dir: Path) -> Path:
    """Return the run that was started last, of those that have a checkpoint.

    Raises
    ------
    CheckpointError
        If there is none.

    Examples
    --------
    >>> newest_run(Path("data/tb_logs"))  # doctest: +SKIP
    """
    configs = sorted(log_dir.glob(f"*/default/version_*/{CONFIG_FILE}"), key=lambda path: path.stat().st_mtime_ns)
    runs = [path.parent for path in configs if best_checkpoint(path.parent)]
    if not runs:
        raise CheckpointError(
            f"no trained run under {log_dir}; train one with train.py, or name one with --run or --checkpoint"
        )
    return runs[-1]


def resolve_checkpoint(path: Path, exact_score: Callable[[Path], float] = lambda path: 0.0) -> Path:
    """Return the checkpoint that a user names: a checkpoint itself, or the best one of a run folder.

    ``exact_score`` as in :func:`best_checkpoint`.

    Raises
    ------
    CheckpointError
        If there is none.

    Examples
    --------
    >>> resolve_checkpoint(Path("tb_logs/linear/default/version_0"))  # doctest: +SKIP
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; name a checkpoint (*.ckpt) or a run folder (version_N)")
    if (path / "checkpoints").is_dir():
        checkpoint = best_checkpoint(path, exact_score)
        if checkpoint is None:
            raise CheckpointError(f"the run {path} has no checkpoint yet; it saves one after its first epoch")
        return checkpoint
    return path


def stated_model_type(checkpoint: Path, model_types: Collection[str]) -> str | None:
    """Return what its run folder says that a checkpoint is: by its configuration, or else by the name of the model.

    None where there is no run folder, or it does not say.

    Examples
    --------
    >>> path = Path("tb_logs/cxg_2023_05_15_mlp_hierarchical_loss/default/version_0/checkpoints/a.ckpt")
    >>> stated_model_type(path, ["linear", "mlp", "tabnet"])
    'mlp'
    """
    run = checkpoint.parent.parent
    if checkpoint.parent.name != "checkpoints" or not re.fullmatch(r"version_\d+", run.name):
        return None
    stated = (read_config(run) or {}).get("model_type")
    named = [each for each in model_types if each in run.absolute().parts[-3]]
    return stated or (named[0] if len(named) == 1 else None)


def results_folder(checkpoints: Sequence[Path], split: str) -> Path:
    """Return where the results of a checkpoint, or of several asked together, are written.

    On held-out donors (id) that is sctab_test/ of the run, on new studies (ood) a folder beside the checkpoint, as
    published; of several a folder beside their runs.

    Raises
    ------
    ConfigError
        If they are several, and not checkpoints of runs.

    Examples
    --------
    >>> results_folder([Path("version_0/checkpoints/a.ckpt")], "id").as_posix()
    'version_0/sctab_test/a'
    >>> results_folder([Path("version_0/checkpoints/a.ckpt")], "ood").as_posix()
    'version_0/checkpoints/a'
    >>> results_folder([Path(f"linear/default/version_{k}/checkpoints/a.ckpt") for k in (0, 1)], "id").as_posix()
    'linear/default/ensemble_0_1/sctab_test'
    """
    if len(checkpoints) > 1:
        return _ensemble_folder(checkpoints) / ("sctab_test" if split == "id" else "ood")
    (checkpoint,) = checkpoints
    parent, name = checkpoint.parent, checkpoint.stem if checkpoint.suffix in (".ckpt", ".pkl") else checkpoint.name
    if split == "id":
        return (parent.parent if parent.name == "checkpoints" else parent) / "sctab_test" / name
    return parent / (name if name != checkpoint.name else f"{name}_ood")


def _ensemble_folder(checkpoints: Sequence[Path]) -> Path:
    runs = [checkpoint.parent.parent for checkpoint in checkpoints]
    if not all(re.fullmatch(r"version_\d+", run.name) for run in runs):
        raise ConfigError("where the results of these checkpoints belong cannot be told; name a folder: --output_dir")
    parents = {run.parent for run in runs}
    names = [str(version_of(run)) if len(parents) == 1 else f"{run.parts[-3]}-{version_of(run)}" for run in runs]
    return runs[0].parent / f"ensemble_{'_'.join(names)}"


def listed_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints that a file names, one a line, or that lie below a folder.

    A line may itself name a folder: a checkpoint, or one that has some below it. Empty lines and comments (#) do not
    count. Relative names are seen from the working directory, or else from the folder of the file.

    Raises
    ------
    CheckpointError
        If there is no such file or folder, or no checkpoint.

    Examples
    --------
    >>> listed_checkpoints(Path("checkpoint_list.txt"))  # doctest: +SKIP
    """
    if path.is_dir():
        return _checkpoints_in(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; name a file with a checkpoint a line, or a folder of runs")
    found: list[Path] = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        if not (name := line.strip()) or name.startswith("#"):
            continue
        named = next((each for each in (Path(name), path.parent / name) if each.exists()), None)
        if named is None:
            raise CheckpointError(f"{path}, line {number}: {name} does not exist; name a checkpoint or a folder a line")
        found += _checkpoints_in(named) if named.is_dir() else [named]
    if not found:
        raise CheckpointError(f"{path} names no checkpoint; name one a line")
    if len({each.resolve() for each in found}) < len(found):
        double = next(each for number, each in enumerate(found) if each.resolve() in map(Path.resolve, found[:number]))
        raise CheckpointError(f"{path} names {double} twice; name each checkpoint once")
    return found


def _checkpoints_in(folder: Path) -> list[Path]:
    """Return a folder that is a checkpoint itself, or all checkpoints below it."""
    if folder.suffix == ".ckpt" or (folder / "_CHECKPOINT_METADATA").exists():
        return [folder]
    # Neither what lies in a checkpoint, nor what is being deleted.
    below = list(folder.rglob("[!.]*.ckpt"))
    found = sorted(path for path in below if not any(other in path.parents for other in below))
    if not found:
        raise CheckpointError(f"there is no checkpoint (*.ckpt) below {folder}")
    return found
