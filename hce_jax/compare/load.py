"""Runs, read and checked against each other."""

import dataclasses
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from hce_jax.compare.alike import check_alike
from hce_jax.compare.notes import notes
from hce_jax.compare.trained import LOSSES, Comparison, TrainedRun, loss_name
from hce_jax.compare.training_store import training_cells, training_store
from hce_jax.errors import CheckpointError, ConfigError
from hce_jax.evaluation.counts import Counts, counts_path
from hce_jax.evaluation.reports import RULES
from hce_jax.runs import CONFIG_FILE, RESULT_FILE, read_config, results_folder
from hce_jax.store import Store

#: Fields of a configuration that a comparison looks at.
_NEEDED = ("model_name", "model_type", "seed", "use_hierarchical_loss", "epsilon", "data_path")
#: Of runs that are left out, so many are named.
_MOST_NAMES = 5


def load_comparison(paths: Sequence[Path], data_path: Path | None = None, baseline: str | None = None) -> Comparison:
    """Read runs and what their evaluations counted, and check that they can be compared. No model is loaded.

    Parameters
    ----------
    paths
        Run folders (version_N: their best checkpoint), checkpoints of runs, or folders with runs below, such as
        tb_logs: all that are finished. Each needs its evaluation on held-out donors (id), and all or none that on new
        studies (ood).
    data_path
        The store that all of them were trained on, where it does not lie where their configurations say.
    baseline
        The loss that the others are compared with: CE if not given, or else the first of the others.

    Raises
    ------
    CheckpointError
        If a path is no run, a run is not finished or not evaluated, or two of them cannot be compared: they know other
        types, were evaluated on other cells, trained on other cells, or with other fields of their configurations.
    ConfigError
        If there are not several losses, or not the same models and seeds of each.
    StoreError
        If the store is there and cannot be read, or is not the one that they were trained on.

    Examples
    --------
    >>> load_comparison([Path("store/tb_logs")]).losses  # doctest: +SKIP
    ('CE', 'HCE')
    """
    checkpoints, left_out = _find(paths)
    runs = [_read(run, checkpoint) for run, checkpoint in checkpoints.items()]
    splits = _splits(runs)
    models, losses = tuple(dict.fromkeys(run.model for run in runs)), _losses(runs, baseline)
    runs.sort(key=lambda run: (models.index(run.model), losses.index(run.loss), run.seed))
    check_alike(runs)
    store = training_store(runs, data_path)
    first = runs[0].counts["id"]
    comparison = Comparison(
        runs=tuple(runs),
        models=models,
        losses=losses,
        seeds=tuple(sorted({run.seed for run in runs})),
        splits=splits,
        labels=first.labels,
        cl_ids=first.cl_ids,
        reachability=first.reachability,
        n_train=None if store is None else training_cells(store, _sub_sample(runs)),
        store=_store_title(runs, store),
        ontology_release=None if store is None else store.side.about.get("ontology_release"),
        notes=(),
    )
    return dataclasses.replace(comparison, notes=(*notes(comparison, store), *left_out))


def _losses(runs: Sequence[TrainedRun], baseline: str | None) -> tuple[str, ...]:
    """Return the losses, the baseline first."""
    found = sorted({run.loss for run in runs}, key=lambda loss: ([*LOSSES, loss].index(loss), loss))
    if len(found) == 1:
        raise ConfigError(
            f"all {len(runs)} runs are of the loss {found[0]}, so there is nothing to compare; name others"
        )
    if baseline is not None and baseline not in found:
        raise ConfigError(f"--baseline={baseline}: no run has this loss; give one of {', '.join(found)}")
    return tuple(sorted(found, key=lambda loss: loss != baseline))


# --- which runs


def _find(paths: Sequence[Path]) -> tuple[dict[Path, Path | None], list[str]]:
    """Return the named runs, with a checkpoint where one is named, and a note on those that are not finished."""
    found: dict[Path, Path | None] = {}
    unfinished: list[Path] = []
    for path in map(Path.absolute, paths):
        if not path.exists():
            raise CheckpointError(
                f"{path} does not exist; name runs (version_N), or a folder with runs below (tb_logs)"
            )
        if path.suffix == ".ckpt" and path.parent.name == "checkpoints" and _is_run(path.parent.parent):
            run = path.parent.parent
            if (other := found.get(run) or path) != path:
                raise ConfigError(f"{path} and {other.name} are of the same run; name one of them")
            found[run] = path
        elif _is_run(path):
            found.setdefault(path)
        else:
            below = sorted(run for run in path.rglob("version_*") if _is_run(run)) if path.is_dir() else []
            if not below:
                raise CheckpointError(
                    f"{path} is no run and has none below; name runs (version_N), or a folder with runs below (tb_logs)"
                )
            finished = [run for run in below if (run / RESULT_FILE).is_file()]
            unfinished += [run for run in below if run not in finished]
            if not finished:
                raise CheckpointError(f"no run below {path} is finished; train them to their end first")
            for run in finished:
                found.setdefault(run)
    if not unfinished:
        return found, []
    return found, [f"Left out, for they are no finished runs: {_listed([_title(run) for run in unfinished])}."]


def _is_run(path: Path) -> bool:
    return re.fullmatch(r"version_\d+", path.name) is not None and path.is_dir()


def _read(run: Path, checkpoint: Path | None) -> TrainedRun:
    """Read a run: its configuration, and the counts of the checkpoint's evaluations, or else of its best one's."""
    config = read_config(run)
    if not isinstance(config, dict) or any(name not in config for name in _NEEDED):
        if not (run / CONFIG_FILE).exists():
            raise CheckpointError(
                f"{run} has no {CONFIG_FILE}, as a run of the published PyTorch code has none: its seed is not known, "
                "by which runs are paired; compare runs of hce_jax"
            )
        raise CheckpointError(f"{run / CONFIG_FILE} is damaged; bring it back, or leave the run out")
    best = run / "checkpoints" / _best(run)
    evaluated = checkpoint or best
    counts = {}
    for split in RULES:
        path = counts_path(results_folder([evaluated], split), config["model_type"])
        if path.is_file():
            counts[split] = Counts.read(path)
    found = TrainedRun(run, config["model_name"], loss_name(config), config["seed"], config, counts)
    if "id" not in counts:
        flag, path = ("--run", run) if checkpoint is None else ("--checkpoint", checkpoint)
        raise CheckpointError(
            f"{run} has no counts of an evaluation on held-out donors: python evaluate.py --split id {flag} "
            f"{shlex.quote(str(path))}"
        )
    return found


def _best(run: Path) -> str:
    """Return the name of the best checkpoint of a finished run."""
    path = run / RESULT_FILE
    if not path.is_file():
        raise CheckpointError(f"{run} is not finished; train it to its end with the command that began it")
    try:
        return str(json.loads(path.read_text())["checkpoint"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged; remove it, and the command that trained the run writes it anew"
        ) from error


def _splits(runs: Sequence[TrainedRun]) -> tuple[str, ...]:
    """Return the splits that all runs were evaluated on."""
    there, absent = ([run for run in runs if ("ood" in run.counts) == known] for known in (True, False))
    if there and absent:
        raise CheckpointError(
            f"{there[0].folder} was evaluated on new studies, {absent[0].folder} was not: python evaluate.py --split "
            f"ood --run {shlex.quote(str(absent[0].folder))}, with --ood_data if they are no studies of the Census"
        )
    return ("id", "ood") if there else ("id",)


def _store_title(runs: Sequence[TrainedRun], store: Store | None) -> str:
    name = Path(runs[0].config["data_path"]).name if store is None else store.side.path.absolute().name
    return f"{name} (simulated cells)" if store is not None and store.side.about.get("simulated") else name


def _sub_sample(runs: Sequence[TrainedRun]) -> float:
    """Return the largest share of the training cells that a run saw."""
    return max(float(run.config.get("sub_sample_frac", 1.0)) for run in runs)


def _title(run: Path) -> str:
    """Name a run in few words."""
    return "/".join(run.parts[-3:])


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
