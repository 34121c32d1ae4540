"""Training, from a configuration to the best checkpoint."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from hce_jax.checkpoint import NORMALISATION, ModelCard, delete_checkpoint, load_model, save_model
from hce_jax.input import (
    CellBatch,
    ResidentSplit,
    Shuffle,
    StreamedSplit,
    batch_of_values,
    batches_per_epoch,
    place_cells,
)
from hce_jax.models import build_model, model_config
from hce_jax.progress import progress
from hce_jax.runs import checkpoint_name, new_run_folder
from hce_jax.store import Split, Store, open_store
from hce_jax.training.config import resolve_config
from hce_jax.training.logging import EpochMeter, log_epoch, log_test, write_description
from hce_jax.training.mesh import batch_sharding, data_mesh, replicated
from hce_jax.training.optim import published_optimizer, step_schedule
from hce_jax.training.steps import (
    Evaluation,
    Objective,
    StepMetrics,
    evaluate,
    init_state,
    make_eval_step,
    make_train_step,
    one_late,
)
from hce_jax.typing import resolve_precision


class FitResult(NamedTuple):
    """What training left behind.

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


def fit(config: ConfigDict) -> FitResult:
    """Train a model as a configuration says and keep its best checkpoint.

    After each epoch the model is validated; training ends after ``max_epochs``, or when ``early_stopping_patience``
    epochs in a row brought no better validation macro F1. The best checkpoint is then evaluated on the test split.

    Parameters
    ----------
    config
        From ``configs/``; see ``configs/common.py`` for the fields.

    Raises
    ------
    UserError
        If the configuration, the store or the place for the run cannot be used.

    Examples
    --------
    >>> from configs import linear_hce
    >>> fit(linear_hce.get_config()).checkpoint  # doctest: +SKIP
    """
    config = resolve_config(config)
    store = open_store(config.data_path)
    trainer = Trainer(config, store)
    log_dir = Path(config.log_dir).expanduser() if config.log_dir else store.side.path / "tb_logs"
    run = new_run_folder(log_dir, config.model_name, config.use_hierarchical_loss)
    write_description(run, config.to_dict(), trainer.hyper_parameters())
    print(f"{trainer.summary()}\nrun         {run}", flush=True)

    best = BestCheckpoints(run / "checkpoints", config.save_top_k, config.checkpoint_interval)
    stopping = EarlyStopping(config.early_stopping_patience)
    with SummaryWriter(str(run)) as writer:
        for epoch in range(config.max_epochs):
            meter = trainer.train_epoch(epoch, writer)
            val = trainer.validate()
            log_epoch(writer, epoch, trainer.steps_taken, meter, val)
            stops_early = stopping.stops_after(val.f1_macro)
            last = stops_early or epoch + 1 == config.max_epochs
            best.offer(epoch, val.f1_macro, partial(trainer.save, epoch=epoch, val=val), last)
            if stops_early:
                print(f"no better validation macro F1 in {stopping.patience} epochs: stopped early")
                break
        print(f"best        {best.path} (validation macro F1 {best.score:.4f})", flush=True)
        test = trainer.test(best.path)
        log_test(writer, trainer.steps_taken, best.score, test)
    return FitResult(run, best.path, best.score, epoch + 1, test)


class EarlyStopping:
    """Tells when a score has not risen for ``patience`` epochs in a row (Lightning's EarlyStopping, min_delta 0).

    Examples
    --------
    >>> stopping = EarlyStopping(patience=2)
    >>> [stopping.stops_after(score) for score in (0.5, 0.5, 0.4)]
    [False, False, True]
    """

    def __init__(self, patience: int):
        self.patience = patience
        self._best, self._waited = float("-inf"), 0

    def stops_after(self, score: float) -> bool:
        """Take the score of the next epoch."""
        self._waited = 0 if score > self._best else self._waited + 1
        self._best = max(self._best, score)
        return self._waited >= self.patience


class BestCheckpoints:
    """Keeps the ``top_k`` checkpoints with the highest scores; of equal scores the earlier stays, as published.

    Parameters
    ----------
    folder
        Where they lie.
    top_k
        How many to keep.
    interval
        Only every ``interval``-th epoch is offered a place.
    """

    def __init__(self, folder: Path, top_k: int, interval: int):
        self._folder, self._top_k, self._interval = folder, top_k, interval
        self._kept: list[tuple[float, Path]] = []  # best first

    def offer(self, epoch: int, score: float, save: Callable[[Path], None], last: bool = False) -> None:
        """Save this epoch's model if it is among the best, then delete the one it replaces.

        The last epoch is saved whatever the interval if none was before it: no training ends with nothing.
        """
        due = (epoch + 1) % self._interval == 0 or (last and not self._kept)
        full = len(self._kept) == self._top_k
        if not due or (full and score <= self._kept[-1][0]):
            return
        path = self._folder / checkpoint_name(epoch, score)
        save(path)
        self._kept = sorted([*self._kept, (score, path)], key=lambda kept: -kept[0])
        if full:
            delete_checkpoint(self._kept.pop()[1])

    @property
    def path(self) -> Path:
        """The best checkpoint."""
        return self._kept[0][1]

    @property
    def score(self) -> float:
        """Its score."""
        return self._kept[0][0]


class Trainer:
    """One run's data, model and jitted steps.

    Parameters
    ----------
    config
        The checked configuration.
    store
        Where the cells are.

    Raises
    ------
    UserError
        If they do not fit together.
    """

    def __init__(self, config: ConfigDict, store: Store):
        self.config, self.store = config, store
        side = store.side
        self.train_split = store.split("train", config.sub_sample_frac)
        self.val_split = store.split("val", config.sub_sample_frac)
        # Checked now, not after training.
        self.test_split = store.split("test") if store.has_split("test") else None
        self.steps_per_epoch = batches_per_epoch(self.train_split, config.batch_size)
        mesh = data_mesh()
        self._batch_sharding, self._replicated = batch_sharding(mesh, config.batch_size), replicated(mesh)
        self.precision = resolve_precision(config.precision)
        self._schedule = step_schedule(
            config.learning_rate, config.lr_scheduler_gamma, config.lr_scheduler_step_size, self.steps_per_epoch
        )
        self._objective = Objective(
            reachability=jnp.asarray(side.reachability),
            class_weights=jnp.asarray(side.class_weights(config.class_weights_filename)),
            use_hierarchical_loss=config.use_hierarchical_loss,
            epsilon=config.epsilon or None,
        )
        init_key, step_key = jax.random.split(jax.random.key(config.seed))
        model = build_model(
            config.to_dict(), side.n_genes, side.n_types, nnx.Rngs(params=init_key), precision=self.precision
        )
        optimizer = published_optimizer(self._schedule, config.weight_decay, config.gradient_clip_val)
        graphdef, state = init_state(model, optimizer)
        self.state = jax.device_put(state, self._replicated)
        augmentations = side.augmentations() if config.augment_training_data else None
        self._train_step = make_train_step(
            graphdef, self._objective, optimizer, step_key, jax.device_put(augmentations, self._replicated)
        )
        self._eval_step = make_eval_step(graphdef, self._objective)
        # Traced now, so that a batch that the model cannot take is found before anything is written.
        batch = batch_of_values(
            np.zeros((config.batch_size, side.n_genes), np.float32), np.zeros(config.batch_size, np.int64)
        )
        jax.eval_shape(lambda state: self._train_step(state, batch)[1], self.state)
        self._train_cells, self._val_cells = (
            place_cells(split, config.batch_size, self._batch_sharding, config.cells_in)
            for split in (self.train_split, self.val_split)
        )

    @property
    def steps_taken(self) -> int:
        """Training steps so far."""
        return int(self.state.step)

    def train_epoch(self, epoch: int, writer: SummaryWriter) -> EpochMeter:
        """Train on every cell of the split once, less the incomplete last batch."""
        config = self.config
        shuffle = Shuffle(config.data_seed, epoch)
        batches = self._train_cells.training_batches(shuffle, config.shuffle_window)
        meter = EpochMeter(writer, self._schedule, config.log_every_n_steps, config.batch_size)
        first_step = epoch * self.steps_per_epoch
        with progress(batches, self.steps_per_epoch, f"epoch {epoch}") as bar:
            for step, metrics in enumerate(one_late(self._step(batch) for batch in bar), first_step):
                meter.read(step, metrics, bar)
        meter.finish(first_step + self.steps_per_epoch - 1)
        return meter

    def _step(self, batch: CellBatch) -> StepMetrics:
        self.state, metrics = self._train_step(self.state, batch)
        return metrics

    def validate(self) -> Evaluation:
        """Evaluate the present weights on the validation split."""
        return self._evaluate(self._val_cells, self.val_split, self.state.params, self.state.stats)

    def test(self, checkpoint: Path) -> Evaluation | None:
        """Evaluate a checkpoint on the test split, which is never sub-sampled; None where the store has none."""
        if self.test_split is None:
            return None
        predictor = load_model(checkpoint, self.precision)
        params, stats = jax.device_put((predictor.params, predictor.stats), self._replicated)
        cells = StreamedSplit(self.test_split, self.config.batch_size, self._batch_sharding)
        return self._evaluate(cells, self.test_split, params, stats)

    def _evaluate(
        self, cells: StreamedSplit | ResidentSplit, split: Split, params: nnx.State, stats: nnx.State
    ) -> Evaluation:
        n_batches = -(-split.n_cells // self.config.batch_size)
        with progress(cells.evaluation_batches(), n_batches, split.name) as bar:
            return evaluate(self._eval_step, params, stats, iter(bar))

    def save(self, path: Path, epoch: int, val: Evaluation) -> None:
        """Write the present weights as a self-contained checkpoint."""
        config, side = self.config, self.store.side
        card = ModelCard(
            config={**self._model_settings(), "precision": self.precision.name},
            gene_ids=side.gene_ids,
            gene_names=side.gene_names,
            labels=side.labels,
            cl_ids=side.cl_ids,
            ontology_release=side.about.get("ontology_release"),
            normalisation=NORMALISATION,
            loss={"use_hierarchical_loss": config.use_hierarchical_loss, "epsilon": config.epsilon or None},
            data_path=str(side.path.absolute()),
            epoch=epoch,
            step=self.steps_taken,
            scores={"val_loss": val.loss, "val_f1_macro": val.f1_macro, "val_f1_micro": val.f1_micro},
        )
        save_model(path, card, side.reachability, self.state.params, self.state.stats)

    def _model_settings(self) -> dict[str, Any]:
        return {"model_type": self.config.model_type, **vars(model_config(self.config.to_dict()))}

    def hyper_parameters(self) -> dict[str, Any]:
        """Return what the published code puts into hparams.yaml."""
        config = self.config
        return {
            **self._model_settings(),
            "gene_dim": self.store.side.n_genes,
            "type_dim": self.store.side.n_types,
            "train_set_size": self.train_split.n_cells,
            "val_set_size": self.val_split.n_cells,
            "batch_size": config.batch_size,
            "learning_rate": config.learning_rate,
            "weight_decay": config.weight_decay,
            "optimizer": "AdamW",
            "lr_scheduler": "StepLR",
            "lr_scheduler_kwargs": {"step_size": config.lr_scheduler_step_size, "gamma": config.lr_scheduler_gamma},
            "use_hierarchical_loss": config.use_hierarchical_loss,
        }

    def summary(self) -> str:
        """Describe data, model and devices for a person."""
        config, side = self.config, self.store.side
        n_parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        loss = "hierarchical cross entropy" if config.use_hierarchical_loss else "cross entropy"
        return (
            f"data        {side.path}: {self.train_split.n_cells:,} training and {self.val_split.n_cells:,} validation "
            f"cells, {side.n_genes:,} genes, {side.n_types} cell types\n"
            f"model       {config.model_type}, {n_parameters:,} parameters, {loss}, seed {config.seed}\n"
            f"training    {self.steps_per_epoch:,} steps of {config.batch_size:,} cells an epoch, "
            f"at most {config.max_epochs} epochs\n"
            f"devices     {jax.device_count()} x {jax.devices()[0].device_kind}, {self.precision.name}; "
            f"cells in {'the memory of the ' if config.cells_in != 'disk' else 'files on '}{config.cells_in}"
        )
