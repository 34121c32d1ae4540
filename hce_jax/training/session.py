"""The loop over epochs and steps, for all members together, until each is trained, tested and saved."""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType

import jax
import numpy as np

from hce_jax.checkpoint import ModelCard
from hce_jax.errors import CheckpointError, Preempted, TrainingError
from hce_jax.progress import progress
from hce_jax.training.hosts import Preemption, say
from hce_jax.training.logging import epoch_line, log_epoch, log_step, log_test
from hce_jax.training.member import Member
from hce_jax.training.profile import Profile
from hce_jax.training.steps import StepMetrics
from hce_jax.training.trainer import Trainer

#: Seconds between two texts of the progress bar.
_REFRESH_SECONDS = 0.5


class Saver:
    """Writes saves one after the other, in a thread, while training goes on.

    Examples
    --------
    >>> with Saver() as saver:
    ...     saver.write(lambda: None)
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Saver":
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish what is being written."""
        self._thread.shutdown()
        if error is None:
            self.wait()

    def write(self, work: Callable[[], None]) -> None:
        """Begin to write, once the write before is done."""
        self.wait()
        self._writing = self._thread.submit(work)

    def wait(self) -> None:
        """Wait until all is written; raise what writing raised."""
        if self._writing is None:
            return
        try:
            self._writing.result()
        except CheckpointError as error:
            raise CheckpointError(f"{error}; once this is mended, give the same command again") from error


class Session:
    """The training of some members, from where they stand to their end.

    Parameters
    ----------
    trainer
        Their arrays; those of members that are trained already are left alone.
    members
        In the order of the trainer's.
    saver, preemption
        Write, and tell when to end.

    Examples
    --------
    >>> with Preemption() as preemption, Saver() as saver:  # doctest: +SKIP
    ...     Session(trainer, members, saver, preemption).run()
    """

    def __init__(self, trainer: Trainer, members: Sequence[Member], saver: Saver, preemption: Preemption):
        self._trainer, self._members = trainer, list(members)
        self._saver, self._preemption = saver, preemption
        self._step = int(trainer.state.step)
        self._unread: StepMetrics | None = None
        self._profile = Profile(members[0].folder, trainer.config.profile_steps)
        self._cells_per_second = 0.0
        going = [member for member in members if not member.progress.trained]
        self._saved = (self._step, going[0].progress.epoch) if self._step and going else None
        self._saved_at = time.monotonic()

    def run(self) -> None:
        """Train, test and finish every member.

        Raises
        ------
        Preempted
            If the process was told to end; everything is saved then.
        TrainingError
            If a loss is no number any more.
        CheckpointError
            If something cannot be written.
        """
        try:
            self._finish_trained()
            while self._members:
                self._train_epoch()
                self._end_epoch()
                self._finish_trained()
        except Preempted:
            if not self._members[0].progress.trained:
                self._save()
            self._saver.wait()
            raise Preempted(
                f"told to end (SIGTERM); saved at step {self._step:,}, from where the same command goes on"
            ) from None
        except KeyboardInterrupt:
            where = f"from step {self._saved[0]:,}" if self._saved else "from the beginning"
            raise KeyboardInterrupt(f"interrupted; the same command goes on {where}") from None

    # --- an epoch

    def _train_epoch(self) -> None:
        config, epoch = self._trainer.config, self._members[0].progress.epoch
        n_steps = self._trainer.steps_per_epoch
        first = self._step - epoch * n_steps
        began = shown = time.perf_counter()
        with progress(self._trainer.training_batches(epoch), n_steps, f"epoch {epoch}", first) as bar:
            for batch in bar:
                metrics = self._trainer.step(batch)
                self._read()
                self._unread, self._step = metrics, self._step + 1
                self._profile.after_step(metrics)
                if self._preemption.check(self._step, self._save_due()) and self._step % n_steps:
                    self._save()
                now = time.perf_counter()
                if not bar.disable and now - shown > _REFRESH_SECONDS and self._step - epoch * n_steps > first + 1:
                    rate = (self._step - epoch * n_steps - first) * config.batch_size / (now - began)
                    bar.set_postfix_str(f"{self._so_far()}, {rate:,.0f} cells/s", refresh=False)
                    shown = now
        self._read()
        self._profile.close()
        self._cells_per_second = (n_steps - first) * config.batch_size / (time.perf_counter() - began)

    def _read(self) -> None:
        """Read the metrics of the last step: called when the next one is under way, so that the devices never wait."""
        if self._unread is None:
            return
        metrics, self._unread = jax.device_get(self._unread), None
        step, every = self._step - 1, self._trainer.config.log_every_n_steps
        for member, loss, grad_norm, counts in zip(self._members, *metrics, strict=True):
            for what, value in (("loss", loss), ("norm of the gradients", grad_norm)):
                if not math.isfinite(value):
                    raise TrainingError(self._no_number(member, step, f"{what} became {value}"))
            member.progress.meter.add(float(loss), counts)
            if member.writer is not None and (step + 1) % every == 0:
                log_step(member.writer, step, float(loss), counts, float(self._trainer.schedule(step)))

    def _no_number(self, member: Member, step: int, what: str) -> str:
        saved = f"the last save is that of step {self._saved[0]}" if self._saved else "nothing was saved before"
        others = "" if len(self._members) == 1 else "; leave its seed out of --config.seeds to go on with the others"
        return (
            f"{member.name}: the training {what} at step {step}; the step before it was well, and {saved}; lower "
            f"--config.learning_rate, or look for unusual values in the data{others}"
        )

    def _so_far(self) -> str:
        meters = [member.progress.meter for member in self._members]
        loss, f1 = (float(np.mean(each)) for each in zip(*((m.loss, m.f1("macro")) for m in meters), strict=True))
        return f"loss {loss:.3f}, F1 {f1:.3f}"

    def _end_epoch(self) -> None:
        """Validate, tell of it, and save."""
        cards: list[ModelCard | None] = []
        n_steps = self._trainer.steps_per_epoch
        rate = self._trainer.schedule((self._members[0].progress.epoch + 1) * n_steps - 1)
        for number, (member, val) in enumerate(
            zip(self._members, self._trainer.validate(self._preemption.check), strict=True)
        ):
            progress = member.progress
            epoch, meter = progress.epoch, progress.meter
            if member.writer is not None:
                log_epoch(member.writer, epoch, self._step, meter, val)
            name = f"{member.label}  " if len(self._members) > 1 else ""
            say(f"{name}{epoch_line(epoch, meter, val)}  lr {rate:.2e}  {self._cells_per_second:,.0f} cells/s")
            keep = progress.end_epoch(val.f1_macro)
            cards.append(self._trainer.card(number, epoch, val) if keep else None)
            if progress.stopping.stopped:
                say(f"{name}no better validation macro F1 in {progress.stopping.patience} epochs: stopped early")
        self._save(cards)

    def _finish_trained(self) -> None:
        """Test and finish the members that are trained, and go on with the others."""
        trained = [member for member in self._members if member.progress.trained]
        if not trained:
            return
        self._saver.wait()
        going = [number for number, member in enumerate(self._members) if not member.progress.trained]
        tests = self._trainer.test([member.best_checkpoint for member in trained], self._preemption.check)
        for member, test in zip(trained, tests, strict=True):
            best = member.progress.best
            say(f"best        {member.best_checkpoint} (validation macro F1 {best.score:.4f})")
            if member.writer is not None:
                log_test(member.writer, self._trainer.steps_per_epoch * member.progress.epoch, best.score, test)
            member.finish(test)
        if going:
            self._trainer.keep(going)
        self._members = [self._members[number] for number in going]

    # --- saves

    def _save_due(self) -> bool:
        minutes = self._trainer.config.checkpoint_every_minutes
        return bool(minutes) and time.monotonic() - self._saved_at > 60 * minutes

    def _save(self, cards: Sequence[ModelCard | None] | None = None) -> None:
        """Begin to save every member as it is now; with cards, their models as checkpoints, too."""
        self._read()
        now = (self._step, self._members[0].progress.epoch)
        if not self._step or now == self._saved:
            return
        for member in self._members:
            member.flush()
        states = self._trainer.states()
        written = [
            (
                member,
                partial(member.save, state, member.progress.to_json(), card, self._trainer.store.side.reachability),
            )
            for member, state, card in zip(self._members, states, cards or [None] * len(states), strict=True)
        ]
        self._saver.write(partial(_write, written))
        if jax.process_count() > 1:  # Orbax lets the hosts speak by the devices, which must not meet a step that does
            self._saver.wait()
        self._saved, self._saved_at = now, time.monotonic()


def _write(saves: Sequence[tuple[Member, Callable[[], None]]]) -> None:
    for _, save in saves:
        save()
    for member, _ in saves:  # only now: all have the new save
        member.tidy()
