"""One of the models that are trained together: the folder of its run, and the saves and checkpoints in it."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hce_jax.checkpoint import (
    ModelCard,
    clear_unfinished,
    delete_checkpoint,
    load_state,
    recover_states,
    save_model,
    save_state,
    state_about,
)
from hce_jax.errors import CheckpointError, ConfigError
from hce_jax.files import written_aside
from hce_jax.runs import (
    RESULT_FILE,
    checkpoint_name,
    find_run,
    held_folder,
    new_run_folder,
    read_config,
    version_of,
    versions,
)
from hce_jax.training.config import loss_name
from hce_jax.training.hosts import is_first
from hce_jax.training.logging import ScalarWriter, write_description
from hce_jax.training.progress import Progress
from hce_jax.training.steps import Evaluation, TrainState, state_arrays

#: Saves for going on that stay.
_KEPT_SAVES = 2


class Member:
    """A model in training; its arrays lie with those of the other members.

    Parameters
    ----------
    config
        Its own configuration.
    parent
        The folder of all versions of its run.

    Attributes
    ----------
    run
        The folder of its run; None as long as there is none.
    progress
        How far it is.
    writer
        TensorBoard, on the first host, once it trains.
    """

    def __init__(self, config: ConfigDict, parent: Path):
        self.config, self._parent = config, parent
        self.run: Path | None = None
        self.progress = Progress(config)
        self.writer: ScalarWriter | None = None
        #: The names of the checkpoints that each save counts on.
        self._counted_on: dict[int, list[str]] = {}
        self._result: dict[str, Any] | None = None

    # --- its run

    def find_run(self) -> int:
        """Return the newest version with this very configuration; -1 if there is none."""
        run = find_run(self._parent, self.config.to_dict())
        return -1 if run is None else version_of(run)

    def unlike_newest(self) -> str:
        """Say in which fields the configuration differs from that of the newest run; nothing if there is none."""
        for version in reversed(versions(self._parent)):
            theirs = read_config(self._parent / f"version_{version}")
            if theirs is not None:
                ours = json.loads(json.dumps(self.config.to_dict()))
                fields = [name for name in ours if name not in theirs or ours[name] != theirs[name]]
                return f"unlike version_{version} in {', '.join(fields)}" if fields else ""
        return ""

    def new_run(self, hyper_parameters: Mapping[str, Any]) -> int:
        """Begin a run; return its version."""
        run = new_run_folder(self._parent)
        write_description(run, self.config.to_dict(), hyper_parameters)
        return version_of(run)

    def beginning(self) -> AbstractContextManager[None]:
        """Have other processes that would begin a run like this one wait."""
        return held_folder(self._parent)

    def use_run(self, version: int) -> None:
        """Take a version as its run, if it is one."""
        self.run = self._parent / f"version_{version}" if version >= 0 else None

    @property
    def name(self) -> str:
        """Tell it from others: model, loss, version."""
        return f"{self._parent.parent.name}/{self.folder.name}"

    @property
    def label(self) -> str:
        """Tell it from the other members, in short: loss and seed."""
        return f"{loss_name(self.config)} seed {self.config.seed}"

    @property
    def folder(self) -> Path:
        """The folder of its run, which it has when it is trained."""
        if self.run is None:
            raise RuntimeError("this member has no run yet")
        return self.run

    @property
    def result(self) -> dict[str, Any] | None:
        """What a finished run has come to."""
        path = self.run / RESULT_FILE if self.run else None
        if self._result is None and path and path.exists():
            try:
                written = json.loads(path.read_text())
                self._result = {name: written[name] for name in ("checkpoint", "val_f1_macro", "epochs", "test")}
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{path} is damaged; remove it, and the same command tests the run again and writes it anew"
                ) from error
        return self._result

    @property
    def best_checkpoint(self) -> Path:
        """Its best checkpoint."""
        return self._checkpoints / self.progress.best.kept[0][1]

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    # --- its saves, from which it can go on

    def saves(self) -> list[int]:
        """Return the steps of its saves, in order."""
        folder = self._checkpoints / "last"
        return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())

    def recover(self) -> None:
        """Bring its folder in order after a kill."""
        clear_unfinished(self._checkpoints)
        recover_states(self._checkpoints / "last")
        # The end of an epoch is saved right after its checkpoint: without any save there can be the first one only.
        lost = [path for path in self._checkpoints.glob("*.ckpt") if "epoch=0_" not in path.name]
        if lost and not self.saves():
            raise CheckpointError(
                f"the run {self.folder} has checkpoints but no save to go on from; bring back its checkpoints/last, or "
                "begin again with --new_run"
            )

    def progress_at(self, step: int) -> Progress:
        """Return the progress of the save of a step.

        Raises
        ------
        CheckpointError
            If it is damaged, saying how to go on.
        """
        with self._remedy(step):
            return Progress.from_json(self.config, state_about(self._save_path(step)))

    def go_on(self, step: int) -> dict[str, np.ndarray]:
        """Take up the progress of the save of a step; return its arrays.

        Raises
        ------
        CheckpointError
            If it is damaged, saying how to go on.
        """
        with self._remedy(step):
            arrays, written = load_state(self._save_path(step))
            progress = Progress.from_json(self.config, written)
            for _, name in progress.best.kept:
                if not (self._checkpoints / name).is_dir():
                    raise CheckpointError(
                        f"{self._checkpoints / name} is missing, on which the save of step {step} counts"
                    )
        self.progress = progress
        return arrays

    @contextmanager
    def _remedy(self, step: int) -> Iterator[None]:
        """Say how to go on where the save of a step is damaged."""
        try:
            yield
        except CheckpointError as error:
            earlier = [each for each in self.saves() if each < step]
            remedy = f"go on from the one before it with --resume_from={earlier[-1]}, or " if earlier else ""
            raise CheckpointError(f"{error}; {remedy}begin again with --new_run") from error

    def begin_at(self, step: int) -> None:
        """Forget what a killed process left after the save of this step, and write to TensorBoard from there on."""
        if not is_first():
            return
        for later in [each for each in self.saves() if each > step]:
            delete_checkpoint(self._save_path(later))
        for earlier in self.saves():
            with suppress(CheckpointError):  # a damaged save counts on nothing
                self._counted_on[earlier] = [name for _, name in state_about(self._save_path(earlier))["best"]]
        self._delete_checkpoints()
        again = any(self.folder.glob("events.out.tfevents.*"))
        self.writer = ScalarWriter(self.folder, purge_step=step if again else None)

    def flush(self) -> None:
        """Bring what was written to TensorBoard to the disk."""
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """Write to TensorBoard no more."""
        if self.writer is not None:
            self.writer.close()

    def save(self, state: TrainState, progress: Mapping[str, Any], card: ModelCard | None, reach: np.ndarray) -> None:
        """Write a state (without the axis of members) and progress; with a card, its model as a checkpoint, too."""
        if card is not None:
            name = checkpoint_name(card.epoch, card.scores["val_f1_macro"])
            save_model(self._checkpoints / name, card, reach, state.params, state.stats)
        step = int(state.step)
        save_state(self._save_path(step), state_arrays(state), progress)
        self._counted_on[step] = [name for _, name in progress["best"]]

    def tidy(self) -> None:
        """Remove all saves but the newest two, and the checkpoints that none of these counts on."""
        if not is_first():
            return
        for old in sorted(self._counted_on)[:-_KEPT_SAVES]:
            del self._counted_on[old]
            delete_checkpoint(self._save_path(old))
        self._delete_checkpoints()

    def finish(self, test: Evaluation | None) -> None:
        """Leave the best checkpoints only, and say in result.json that the run is finished."""
        self._result = {  # on all hosts: none waits for the file
            "checkpoint": self.best_checkpoint.name,
            "val_f1_macro": self.progress.best.score,
            "epochs": self.progress.epoch,
            "test": None if test is None else test._asdict(),
        }
        if not is_first():
            return
        self.flush()
        self._counted_on = {0: [name for _, name in self.progress.best.kept]}
        self._delete_checkpoints()
        with written_aside(self.folder / RESULT_FILE) as aside:  # last: nobody looks after a finished run
            aside.write_text(json.dumps(self._result, indent=2))

    def _save_path(self, step: int) -> Path:
        return self._checkpoints / "last" / str(step)

    def _delete_checkpoints(self) -> None:
        counted_on = set(itertools.chain(*self._counted_on.values()))
        for path in list(self._checkpoints.glob("*.ckpt")):
            if path.name not in counted_on:
                delete_checkpoint(path)


def common_save(runs: Mapping[str, Sequence[int]], wanted: int | None = None) -> int:
    """Return the newest step of which all members have a save: from there they go on; 0 if they begin.

    Parameters
    ----------
    runs
        The steps of the saves of each member, under its name for a message.
    wanted
        The step the user names.

    Raises
    ------
    ConfigError
        If a member lacks the wanted one, or they have gone on without each other.

    Examples
    --------
    >>> common_save({"version_0": [100, 200], "version_1": [100]})
    100
    """
    common = set.intersection(*map(set, runs.values()))
    found = "; ".join(f"{name}: {', '.join(map(str, steps)) or 'none'}" for name, steps in runs.items())
    if wanted is not None and wanted not in common:
        raise ConfigError(f"there is no save of step {wanted} to go on from; there are those of steps {found}")
    if wanted is None and not common and any(len(steps) > 1 for steps in runs.values()):
        raise ConfigError(
            f"these runs stand at different steps ({found}); continue each alone with its --config.seed, "
            "or begin again with --new_run"
        )
    return max(common, default=0) if wanted is None else wanted
