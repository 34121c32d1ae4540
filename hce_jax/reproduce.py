"""The paper's study from a store to the comparison: trained, evaluated and compared, from wherever it stands."""

import dataclasses
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from hce_jax.checkpoint import load_model
from hce_jax.errors import CheckpointError, ConfigError
from hce_jax.evaluation.calibration import MOST_CELLS, Calibration, calibrate, calibration_path, keep
from hce_jax.evaluation.cells import Cells, SourceCells, StoreCells
from hce_jax.evaluation.counts import Counts, counts_path
from hce_jax.evaluation.evaluate import Job, Settings, evaluate
from hce_jax.evaluation.reports import published_subset
from hce_jax.hierarchy.cell_ontology import CellOntology
from hce_jax.predictor import Ensemble
from hce_jax.runs import results_folder
from hce_jax.store import Store, open_store
from hce_jax.store.h5ad import H5adSource
from hce_jax.training.config import resolve_configs
from hce_jax.training.hosts import say
from hce_jax.training.loop import fit, members_of
from hce_jax.training.member import Member
from hce_jax.training.trainer import Trainer

#: The fields of a study that are not those of a run.
_OF_STUDY = ("models", "new_studies")
#: In place of new studies: none.
NO_NEW_STUDIES = "none"
#: Steps that are not timed, for they wait for compilation and the first cells; how many are, and for how long at most.
_UNTIMED_STEPS, _TIMED_STEPS, _TIMED_SECONDS = 2, 20, 10.0
#: Steps of an epoch that are fewer than a recipe for large stores is meant for.
_FEW_STEPS = 30
#: Computing a cell forwards takes about a third of what it takes in a training step, which also goes backwards.
_FORWARD = 1 / 3
#: Seconds that loading, tables and pictures of an evaluated model take, whatever the number of cells.
_EACH_MODEL = 3.0


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """What is trained, evaluated and compared.

    Attributes
    ----------
    configs
        The configuration of each model by its name in the study; its ``seeds`` and ``losses`` are the study's.
    store
        Where the cells are.
    cells
        What is evaluated on, by split: "id", and "ood" where there are new studies.
    """

    configs: dict[str, ConfigDict]
    store: Store
    cells: dict[str, Cells]

    @classmethod
    def of(cls, config: ConfigDict) -> "Study":
        """Check the configuration of a study, and find its cells; new studies that are to be downloaded are, now.

        Parameters
        ----------
        config
            As ``configs/paper.py`` has it.

        Raises
        ------
        UserError
            If the configuration, the store or the new studies cannot be used.

        Examples
        --------
        >>> Study.of(paper.get_config()).configs["mlp"].seeds  # doctest: +SKIP
        (1, 2, 3, 4)
        """
        configs = model_configs(config)
        store = open_store(next(iter(configs.values())).data_path)
        cells: dict[str, Cells] = {"id": StoreCells(store.split("test"))}
        if config.new_studies != NO_NEW_STUDIES:
            source = H5adSource.open([_new_studies(store, config.new_studies)], needs_donors=False)
            cells["ood"] = new = SourceCells.choose(source, store.side, CellOntology.open())
            say(new.report())
        return cls(configs, store, cells)

    @property
    def comparison(self) -> Path:
        """The folder of the comparison, if no other is named: beside the runs."""
        first = next(iter(self.configs.values()))
        return Path(first.log_dir or first.data_path) / "comparison"


def model_configs(config: ConfigDict) -> dict[str, ConfigDict]:
    """Return the configuration of each model of a study.

    Parameters
    ----------
    config
        As ``configs/paper.py`` has it: fields of all models, and one section for each.

    Raises
    ------
    ConfigError
        If it is none of a study, or a model's is not sound.

    Examples
    --------
    >>> from configs import paper
    >>> config = paper.get_config()
    >>> config.data_path = "store"
    >>> {name: each.learning_rate for name, each in model_configs(config).items()}
    {'linear': 0.0005, 'mlp': 0.002, 'tabnet': 0.005}
    """
    fields = config.to_dict()
    if not isinstance(fields.get("models"), tuple) or not isinstance(fields.get("new_studies"), str):
        raise ConfigError("this is no configuration of a study, which names its models; begin with configs/paper.py")
    sections = {name: value for name, value in fields.items() if isinstance(value, dict)}
    shared = {name: value for name, value in fields.items() if name not in (*_OF_STUDY, *sections)}
    if unknown := [name for name in fields["models"] if name not in sections]:
        raise ConfigError(f"config.models names {unknown[0]!r}; there are {', '.join(sections)}")
    if not fields["models"] or len({*fields["models"]}) < len(fields["models"]):
        raise ConfigError(
            f"config.models is {fields['models']!r}; name one or more of {', '.join(sections)}, each once"
        )
    if not shared.get("seeds") or len(shared.get("losses") or ()) < 2:
        raise ConfigError(
            "a study compares losses over seeds; config.losses needs two or more, config.seeds one or more"
        )
    alone = {"seed": 1, "use_hierarchical_loss": False}  # fields of one model, which seeds and losses stand for
    each = [ConfigDict({**sections[name], **shared, **alone}) for name in fields["models"]]
    if len({every.model_name for every in each}) < len(each):
        raise ConfigError("two models of the study have the same model_name, by which their runs are known")
    return dict(zip(fields["models"], resolve_configs(each), strict=True))


def _new_studies(store: Store, named: str) -> Path:
    """Return where the new studies are: as named, in the store's folder, or downloaded."""
    if named:
        return Path(named).expanduser()
    here = store.side.path / "ood"
    if any(here.glob("*.h5ad")):
        return here
    from hce_jax.census.download import download_new_studies  # takes seconds, which other stores do not need

    return download_new_studies(store.side, store.side.path)


# --- the plan


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the study: what it is, and what is left to do.

    Attributes
    ----------
    name
        Of the part.
    text
        What is done, and what is left of it, for a person.
    seconds
        What is left takes so long, at most.
    """

    name: str
    text: str
    seconds: float

    def __str__(self) -> str:
        """Return it as a line."""
        time_left = duration(self.seconds) if self.seconds else "done"
        return f"{self.name:12}{self.text}: {time_left}"


def plan(study: Study) -> list[Part]:
    """Look what there is of a study, and estimate what the rest takes; a few steps of each model are timed.

    Nothing is written. The estimate is for all epochs: training may stop early.

    Parameters
    ----------
    study
        Of :meth:`Study.of`.

    Raises
    ------
    UserError
        If runs that are there cannot be read, or a model and the store do not fit together.

    Examples
    --------
    >>> for part in plan(study):  # doctest: +SKIP
    ...     print(part)
    linear      8 models (ce, hce x seeds 1, 2, 3, 4), at most 20 epochs of 93 steps, 0.02 s a step: about 37 s
    """
    parts, left = [], 0.0
    n_evaluated, n_models = 0, 0
    n_cells = sum(cells.n_cells for cells in study.cells.values())
    n_cells += min(study.store.split("val").n_cells, MOST_CELLS)  # for the calibration
    for name, config in study.configs.items():
        members = [_with_run(member) for member in members_of(config)]
        unfinished = [member for member in members if member.result is None]
        unevaluated = [member for member in members if member in unfinished or not _is_evaluated(study, member)]
        timed = _time_steps(unfinished or unevaluated, study.store)
        parts.append(_training_part(name, config, members, unfinished, timed))
        left += len(unevaluated) * (_EACH_MODEL + n_cells * timed.forward)
        n_evaluated, n_models = n_evaluated + len(members) - len(unevaluated), n_models + len(members)
    splits = " and ".join(f"{cells.n_cells:,} ({split})" for split, cells in study.cells.items())
    return [*parts, Part("evaluation", f"{n_evaluated} of {n_models} models are evaluated on {splits} cells", left)]


class _Timed(NamedTuple):
    """Seconds of a training step and of an epoch of some members together, and of classifying a cell with one."""

    step: float = 0.0
    epoch: float = 0.0
    forward: float = 0.0
    steps_per_epoch: int = 0


def _time_steps(members: Sequence[Member], store: Store) -> _Timed:
    """Take some training steps, of which nothing is kept."""
    if not members:
        return _Timed()
    configs = [ConfigDict({**member.config.to_dict(), "cells_in": "disk"}) for member in members]
    trainer, seconds = Trainer(configs, store), list[float]()
    with closing(iter(trainer.training_batches(0))) as batches:
        for batch in islice(batches, _UNTIMED_STEPS + _TIMED_STEPS):
            start = time.perf_counter()
            jax.block_until_ready(trainer.step(batch))
            seconds.append(time.perf_counter() - start)
            if sum(seconds[_UNTIMED_STEPS:]) > _TIMED_SECONDS:
                break
    step, n_steps = float(np.median(seconds[_UNTIMED_STEPS:] or seconds)), trainer.steps_per_epoch
    forward = step / (len(members) * trainer.config.batch_size) * _FORWARD
    return _Timed(step, n_steps * step + trainer.val_split.n_cells * len(members) * forward, forward, n_steps)


def _with_run(member: Member) -> Member:
    """Find the run of a member, if there is one."""
    member.use_run(member.find_run())
    return member


def _training_part(
    name: str, config: ConfigDict, members: Sequence[Member], unfinished: Sequence[Member], timed: _Timed
) -> Part:
    """Say what is trained of a model."""
    losses, seeds = ", ".join(config.losses), ", ".join(map(str, config.seeds))
    what = f"{len(members)} models ({losses} x seeds {seeds})"
    if not unfinished:
        return Part(name, f"{what} are trained", 0.0)
    done = [member.progress_at(max(saves)).epoch for member in unfinished if member.run and (saves := member.saves())]
    begun = min(done) if len(done) == len(unfinished) else 0
    n_epochs = config.max_epochs - begun
    if len(unfinished) < len(members):
        what += f", {len(unfinished)} of them unfinished"
    if begun:
        what += f", from epoch {begun}"
    few = f" (few: lower --config.{name}.batch_size)" if timed.steps_per_epoch < _FEW_STEPS else ""
    text = f"{what}, at most {n_epochs} epochs of {timed.steps_per_epoch:,} steps{few}, {timed.step:.2g} s a step"
    return Part(name, text, n_epochs * timed.epoch)


def duration(seconds: float) -> str:
    """Write how long something takes, for a person.

    Examples
    --------
    >>> duration(42.0), duration(1000.0), duration(20_000.0)
    ('about 42 s', 'about 17 min', 'about 5.6 h')
    """
    if seconds < 100:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 6000 else f"about {seconds / 3600:.1f} h"


# --- the work


def train(study: Study) -> list[Path]:
    """Train what is not trained yet; return the folders of all runs.

    Raises
    ------
    Preempted
        If the process was told to end; everything is saved then.
    UserError
        As :func:`hce_jax.training.fit`.

    Examples
    --------
    >>> runs = train(study)  # doctest: +SKIP
    """
    return [result.run for config in study.configs.values() for result in fit(config)]


def evaluate_all(study: Study) -> None:
    """Calibrate the trained models on the validation split and evaluate them, but for those that are evaluated.

    The models of one kind see the same cells, which are read once.

    Raises
    ------
    UserError
        If a checkpoint or cells cannot be read, or results not written.

    Examples
    --------
    >>> evaluate_all(study)  # doctest: +SKIP
    """
    validation = StoreCells(study.store.split("val"))
    for config in study.configs.values():
        members = [_with_run(member) for member in members_of(config)]
        for split, cells in study.cells.items():
            left = [_checkpoint(member) for member in members if not _is_evaluated(study, member, split)]
            jobs = [_job(checkpoint, split, validation) for checkpoint in left]
            subset = published_subset(study.store.side.labels) if split == "id" else None
            # Back-off by one confidence for all models: a promised error may be more than a calibration can give.
            settings = Settings(split, max_error=None, subset_labels=subset)
            for job, result in zip(jobs, evaluate(cells, jobs, settings) if jobs else [], strict=True):
                f1 = float(result.reports.overall["f1-score"]["macro avg"])
                say(f"evaluated   {job.folder}: macro F1 {f1:.4f}")


def _checkpoint(member: Member) -> Path:
    result = member.result
    if result is None:
        raise CheckpointError(f"the run {member.run} is not finished; train it first")
    return member.folder / "checkpoints" / result["checkpoint"]


def _job(checkpoint: Path, split: str, validation: Cells) -> Job:
    """Load a model, and calibrate it unless it is."""
    model, path = Ensemble([load_model(checkpoint)]), calibration_path(checkpoint)
    if path.exists():
        calibration = Calibration.read(path, model.side)
    else:
        keep(calibration := calibrate(validation, model, "donor"), path)
    return Job(model, results_folder([checkpoint], split), calibration)


def _is_evaluated(study: Study, member: Member, *splits: str) -> bool:
    """Tell whether there are results of a trained member on these very cells, with its calibration."""
    checkpoint = _checkpoint(member)
    for split in splits or study.cells:
        cells = study.cells[split]
        try:
            counts = Counts.read(counts_path(results_folder([checkpoint], split), member.config.model_type))
        except CheckpointError:  # none, or of an older version
            return False
        if (counts.n_cells, counts.title) != (cells.n_cells, cells.title) or counts.temperature is None:
            return False
        if counts.backoff != {"confidence": Settings.confidence}:  # as of evaluate.py --max_error: not comparable
            return False
    return True
