"""Training, from a configuration to the best checkpoints: it goes on where it was stopped, whatever stopped it."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from hce_jax.errors import ConfigError
from hce_jax.runs import held_run, runs_folder, version_of
from hce_jax.store import open_store
from hce_jax.training.config import loss_name, member_configs, resolve_config
from hce_jax.training.hosts import Preemption, on_first, say
from hce_jax.training.member import Member, common_save
from hce_jax.training.session import Saver, Session
from hce_jax.training.steps import Evaluation
from hce_jax.training.trainer import Trainer

_LOSS_TITLES = {
    "ce": "cross entropy",
    "hce": "hierarchical cross entropy",
    "exact": "exact hierarchical cross entropy",
}


class FitResult(NamedTuple):
    """What the training of a model left behind.

    Attributes
    ----------
    run
        Folder of the run.
    checkpoint
        Its best checkpoint.
    val_f1_macro
        Validation macro F1 of that checkpoint.
    epochs
        Epochs trained.
    test
        Evaluation of that checkpoint on the test split; None where the store has none.
    """

    run: Path
    checkpoint: Path
    val_f1_macro: float
    epochs: int
    test: Evaluation | None


def fit(config: ConfigDict, *, new_run: bool = False, resume_from: int | None = None) -> list[FitResult]:
    """Train as a configuration says and keep the best checkpoints; go on with a run that is not finished.

    After each epoch the model is validated; training ends after ``max_epochs``, or when ``early_stopping_patience``
    epochs in a row brought no better validation macro F1. The best checkpoint is then evaluated on the test split. The
    state is saved every ``checkpoint_every_minutes`` and after each epoch. A run with the very same configuration goes
    on from its newest save, as if it had never been stopped; a finished one is left alone. Several models are trained
    together where the configuration has ``seeds`` or ``losses``.

    Parameters
    ----------
    config
        From ``configs/``; see ``configs/common.py`` for the fields.
    new_run
        Begin a new run whatever is there.
    resume_from
        Step of the save to go on from; the newest if not given.

    Returns
    -------
    One result for each model.

    Raises
    ------
    UserError
        If the configuration, the store, a save or the place for the run cannot be used.
    Preempted
        If the process was told to end (SIGTERM); everything is saved then.

    Examples
    --------
    >>> from configs import linear_hce
    >>> [result] = fit(linear_hce.get_config())  # doctest: +SKIP
    """
    config = resolve_config(config)
    store = open_store(config.data_path)
    members = members_of(config)
    if not new_run:
        _use_runs(members, on_first(lambda: [member.find_run() for member in members], len(members)))
    if resume_from is not None and any(member.run is None for member in members):
        raise ConfigError("there is no run with this configuration to go on with; begin one without --resume_from")
    if resume_from is not None and any(member.result for member in members):
        raise ConfigError("the run is finished, so there is nothing to go on with; --new_run trains again")
    unfinished = [member for member in members if member.result is None]
    for member in members:
        if member not in unfinished:
            say(f"finished    {member.run}: nothing to do; --new_run trains again")
    if unfinished:
        with ExitStack() as held:
            preemption = held.enter_context(Preemption())
            trainer = Trainer([member.config for member in unfinished], store)
            _hold_runs(unfinished, trainer, held, new_run=new_run)
            for member in unfinished:
                held.callback(member.close)
            _go_on(unfinished, trainer, resume_from)
            with Saver() as saver:
                Session(trainer, unfinished, saver, preemption).run()
    return [_result(member) for member in members]


def members_of(config: ConfigDict) -> list[Member]:
    """Return the models that a configuration trains, without their runs.

    Parameters
    ----------
    config
        Checked, with a ``data_path``.

    Examples
    --------
    >>> [member.label for member in members_of(resolve_config(config))]  # doctest: +SKIP
    ['ce seed 1', 'hce seed 1']
    """
    log_dir = Path(config.log_dir or Path(config.data_path) / "tb_logs")
    return [
        Member(own, runs_folder(log_dir, own.model_name, own.use_hierarchical_loss)) for own in member_configs(config)
    ]


def _use_runs(members: Sequence[Member], versions: Sequence[int]) -> None:
    for member, version in zip(members, versions, strict=True):
        member.use_run(version)


def _hold_runs(members: Sequence[Member], trainer: Trainer, held: ExitStack, *, new_run: bool) -> None:
    """Begin the runs that are not there yet, and keep other processes from all of them."""

    def hold() -> list[int]:
        for member in members:
            with member.beginning():
                if not new_run and member.run is None:
                    member.use_run(member.find_run())  # begun meanwhile by another process, which holds it
                if member.run is None:
                    if len(members) == 1 and (unlike := member.unlike_newest()):
                        say(f"new run     {unlike}")
                    member.use_run(member.new_run(trainer.hyper_parameters(member.config)))
                held.enter_context(held_run(member.folder))
        return [version_of(member.folder) for member in members]

    _use_runs(members, on_first(hold, len(members)))
    say(trainer.summary())
    for member in members:
        say(f"run         {member.run} (seed {member.config.seed}, {_LOSS_TITLES[loss_name(member.config)]})")


def _go_on(members: Sequence[Member], trainer: Trainer, resume_from: int | None) -> None:
    """Take up the newest saves, or the one that is asked for, where there is any."""
    steps = on_first(partial(_choose_saves, members, resume_from), len(members))
    states = trainer.states()
    for number, (member, step) in enumerate(zip(members, steps, strict=True)):
        if step:
            states[number] = trainer.state_of(member.go_on(step), member.folder)
            say(f"goes on     {member.folder} from step {step:,}, in epoch {member.progress.epoch}")
        member.begin_at(step)
    going = [step for member, step in zip(members, steps, strict=True) if not member.progress.trained]
    trainer.load(states, max(going or steps))


def _choose_saves(members: Sequence[Member], resume_from: int | None) -> list[int]:
    """Return the step of each member's save to go on from, 0 for none.

    Members that only want their test go on from their own newest one, the others from the newest that all have.
    """
    newest = {}
    for member in members:
        member.recover()
        step = max(member.saves(), default=0)
        if step and resume_from is None and member.progress_at(step).trained:
            newest[member] = step
    others = [member for member in members if member not in newest]
    common = common_save({member.name: member.saves() for member in others}, resume_from) if others else 0
    return [newest.get(member, common) for member in members]


def _result(member: Member) -> FitResult:
    result, folder = member.result or {}, member.folder
    test = Evaluation(**result["test"]) if result["test"] else None
    checkpoint = folder / "checkpoints" / result["checkpoint"]
    return FitResult(folder, checkpoint, result["val_f1_macro"], result["epochs"], test)
