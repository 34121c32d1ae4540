"""Where runs lie and what is in them: names only, as the published code has them.

{log_dir}/{model_name}[_hierarchical_loss]/default/version_{N}/
    hparams.yaml  parameters.json  config.json  events.out.tfevents.*
    checkpoints/val_f1_macro_epoch={E}_val_f1_macro={F:.3f}.ckpt/
    sctab_test/val_f1_macro_epoch={E}_val_f1_macro={F:.3f}/
"""

import re
from collections.abc import Callable
from pathlib import Path

from hce_jax.errors import CheckpointError, ConfigError

CONFIG_FILE = "config.json"
_CHECKPOINT = re.compile(r"val_f1_macro_epoch=(\d+)_val_f1_macro=([0-9.]+)\.ckpt")


def new_run_folder(log_dir: Path, model_name: str, use_hierarchical_loss: bool) -> Path:
    """Make the folder of the next version of a run.

    Raises
    ------
    ConfigError
        If it cannot be written there.

    Examples
    --------
    >>> import tempfile
    >>> new_run_folder(Path(tempfile.mkdtemp()), "linear", use_hierarchical_loss=True).name
    'version_0'
    """
    parent = log_dir / (model_name + ("_hierarchical_loss" if use_hierarchical_loss else "")) / "default"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        versions = [int(match[1]) for path in parent.iterdir() if (match := re.fullmatch(r"version_(\d+)", path.name))]
        version = max(versions, default=-1) + 1
        while True:
            try:
                folder = parent / f"version_{version}"
                folder.mkdir()
                return folder
            except FileExistsError:  # another run took the number in between
                version += 1
    except OSError as error:
        raise ConfigError(
            f"cannot write the run to {parent} ({error.strerror}); pass a writable folder with --config.log_dir"
        ) from error


def checkpoint_name(epoch: int, val_f1_macro: float) -> str:
    """Return the name of a checkpoint.

    Examples
    --------
    >>> checkpoint_name(3, 0.81234)
    'val_f1_macro_epoch=3_val_f1_macro=0.812.ckpt'
    """
    return f"val_f1_macro_epoch={epoch}_val_f1_macro={val_f1_macro:.3f}.ckpt"


def best_checkpoint(run: Path, exact_score: Callable[[Path], float] = lambda path: 0.0) -> Path | None:
    """Return the checkpoint of a run with the highest F1 in its name; None if there is none.

    Names hold three digits: of checkpoints with the same, the one with the highest exact score, and then the earliest,
    is taken.

    Examples
    --------
    >>> best_checkpoint(Path("no/such/run")) is None
    True
    """
    found = [(match, path) for path in (run / "checkpoints").glob("*") if (match := _CHECKPOINT.fullmatch(path.name))]
    best = [(match, path) for match, path in found if float(match[2]) == max(float(other[2]) for other, _ in found)]
    if len(best) > 1:
        best.sort(key=lambda each: (-exact_score(each[1]), int(each[0][1])))
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
    """Return the checkpoint that a user names: a checkpoint folder itself, or the best one of a run folder.

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
        raise CheckpointError(f"{path} does not exist; name a checkpoint folder (*.ckpt) or a run folder (version_N)")
    if (path / "checkpoints").is_dir():
        checkpoint = best_checkpoint(path, exact_score)
        if checkpoint is None:
            raise CheckpointError(f"the run {path} has no checkpoint yet; it saves one after its first epoch")
        return checkpoint
    return path


def id_results_folder(checkpoint: Path) -> Path:
    """Return where the ID evaluation of a checkpoint is written: sctab_test/ of its run, or beside a lone checkpoint.

    Examples
    --------
    >>> id_results_folder(Path("version_0/checkpoints/a.ckpt")).as_posix()
    'version_0/sctab_test/a'
    """
    parent = checkpoint.parent
    return (
        (parent.parent if parent.name == "checkpoints" else parent)
        / "sctab_test"
        / checkpoint.name.removesuffix(".ckpt")
    )
