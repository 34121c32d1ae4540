"""The arrays of a training: data, models and jitted steps of all members, and what describes them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from hce_jax.checkpoint import NORMALISATION, ModelCard, load_model
from hce_jax.errors import CheckpointError, TrainingError
from hce_jax.input import (
    CellBatch,
    DenseBatch,
    ResidentSplit,
    Shuffle,
    StreamedSplit,
    batches_per_epoch,
    dense_batch,
    place_cells,
    row_width,
)
from hce_jax.models import build_model, model_config
from hce_jax.progress import progress
from hce_jax.store import Split, Store
from hce_jax.training.augment import widened_vectors
from hce_jax.training.mesh import batch_sharding, check_ghost_batches, data_mesh, replicated
from hce_jax.training.optim import published_optimizer, step_schedule
from hce_jax.training.steps import (
    Evaluation,
    Objective,
    StepMetrics,
    TrainState,
    evaluate,
    init_state,
    make_eval_step,
    make_train_step,
    state_of_arrays,
)
from hce_jax.typing import Key, Variables, resolve_precision


class Trainer:
    """The data, and the members that are trained on them in one program.

    Parameters
    ----------
    configs
        The checked configuration of each member; they differ in seed and loss only.
    store
        Where the cells are.
    schedule
        Learning rate by step; that of the configuration if not given.

    Attributes
    ----------
    state
        Of all members that are still trained.

    Raises
    ------
    UserError
        If they do not fit together.
    """

    def __init__(self, configs: Sequence[ConfigDict], store: Store, schedule: optax.Schedule | None = None):
        self.configs, self.store = list(configs), store
        self.config = config = self.configs[0]
        side = store.side
        self.train_split = store.split("train", config.sub_sample_frac)
        self.val_split = store.split("val", config.sub_sample_frac)
        # Checked now, not after training.
        self.test_split = store.split("test") if store.has_split("test") else None
        self.steps_per_epoch = batches_per_epoch(self.train_split, config.batch_size)
        mesh = data_mesh()
        self._batch_sharding, self._replicated = batch_sharding(mesh, config.batch_size), replicated(mesh)
        if config.model_type == "tabnet":
            check_ghost_batches(config.batch_size, config.virtual_batch_size, mesh.size)
        self.precision = resolve_precision(config.precision)
        self.schedule = schedule or step_schedule(
            config.learning_rate, config.lr_scheduler_gamma, config.lr_scheduler_step_size, self.steps_per_epoch
        )
        self._optimizer = published_optimizer(self.schedule, config.weight_decay, config.gradient_clip_val)
        self._weights = jnp.asarray(side.class_weights(config.class_weights_filename))
        self._reachability = jnp.asarray(side.reachability)
        self._width = row_width(side.n_genes)
        augmentations = widened_vectors(side.augmentations(), self._width) if config.augment_training_data else None
        self._augmentations = jax.device_put(augmentations, self._replicated)
        keys = [jax.random.split(jax.random.key(member.seed)) for member in self.configs]
        self._graphdef, state = init_state([self._build(init_key) for init_key, _ in keys], self._optimizer)
        self.state = jax.device_put(state, self._replicated)
        self._keys = jnp.stack([step_key for _, step_key in keys])
        self._make_steps()
        # Traced now, so that a batch that the model cannot take is found before anything is written.
        jax.eval_shape(lambda state: self._train_step(state, self._empty_batch())[1], self.state)
        self._train_cells, self._val_cells = (
            place_cells(split, config.batch_size, self._batch_sharding, config.cells_in)
            for split in (self.train_split, self.val_split)
        )

    def _build(self, key: Key[jax.Array, ""]) -> nnx.Module:
        side, config = self.store.side, self.config.to_dict()
        return build_model(config, side.n_genes, side.n_types, nnx.Rngs(params=key), precision=self.precision)

    def _loss(self, config: ConfigDict) -> dict[str, Any]:
        return {"use_hierarchical_loss": config.use_hierarchical_loss, "epsilon": config.epsilon or None}

    def _objective(self, loss: Mapping[str, Any]) -> Objective:
        return Objective(reachability=self._reachability, class_weights=self._weights, **loss)

    def _make_steps(self) -> None:
        objectives = [self._objective(self._loss(config)) for config in self.configs]
        self._train_step = make_train_step(
            self._graphdef, objectives, self._optimizer, self._keys, self._augmentations, self._replicated
        )
        self._eval_step = make_eval_step(self._graphdef, objectives, self._replicated)

    def _empty_batch(self) -> DenseBatch:
        n_cells = self.config.batch_size
        x = jnp.zeros((n_cells, self._width))
        return DenseBatch(x, jnp.zeros(n_cells, jnp.int32), jnp.ones(n_cells, bool))

    def training_batches(self, epoch: int) -> grain.IterDataset:
        """Give the batches of an epoch, packed: every cell of the split once, less the incomplete last batch."""
        return self._train_cells.training_batches(Shuffle(self.config.data_seed, epoch), self.config.shuffle_window)

    def step(self, batch: CellBatch) -> StepMetrics:
        """Take a training step."""
        self.state, metrics = self._train_step(self.state, dense_batch(batch, self._batch_sharding))
        return metrics

    def validate(self, watch: Callable[[int], object]) -> list[Evaluation]:
        """Evaluate the members on the validation split; ``watch`` is called with the number of each batch."""
        return self._evaluate(
            self._eval_step, self._val_cells, self.val_split, self.state.params, self.state.stats, watch
        )

    def test(self, checkpoints: Sequence[Path], watch: Callable[[int], object]) -> Sequence[Evaluation | None]:
        """Evaluate checkpoints on the test split, which is never sub-sampled; None where the store has none."""
        if self.test_split is None:
            return [None for _ in checkpoints]
        predictors = [load_model(checkpoint, self.precision) for checkpoint in checkpoints]
        variables = [jax.device_get((predictor.params, predictor.stats)) for predictor in predictors]
        params, stats = jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *variables), self._replicated)
        objectives = [self._objective(predictor.card.loss) for predictor in predictors]
        eval_step = make_eval_step(self._graphdef, objectives, self._replicated)
        cells = StreamedSplit(self.test_split, self.config.batch_size, self._batch_sharding)
        return self._evaluate(eval_step, cells, self.test_split, params, stats, watch)

    def _evaluate(
        self,
        eval_step: Any,
        cells: StreamedSplit | ResidentSplit,
        split: Split,
        params: Variables,
        stats: Variables,
        watch: Callable[[int], object],
    ) -> list[Evaluation]:
        n_batches = -(-split.n_cells // self.config.batch_size)

        def watched(bar: tqdm) -> Any:
            for number, batch in enumerate(bar):
                watch(number)
                yield dense_batch(batch, self._batch_sharding)

        with progress(cells.evaluation_batches(), n_batches, split.name) as bar:
            return evaluate(eval_step, params, stats, watched(bar))

    # --- the states of the members, as they are saved

    def states(self) -> list[TrainState]:
        """Copy the state of each member to the host, without the axis of members.

        Raises
        ------
        TrainingError
            If it holds numbers that are none: such a state is never saved.
        """
        state = jax.tree.map(np.array, self.state)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state)):
            raise TrainingError(f"weights became infinite or no number before step {state.step}; nothing was saved")
        return [_member_of(state, number) for number in range(len(self.configs))]

    def state_of(self, arrays: Mapping[str, np.ndarray], run: Path) -> TrainState:
        """Return the state with the arrays of a save.

        Raises
        ------
        CheckpointError
            If they are those of another model.
        """
        try:
            return state_of_arrays(arrays, _member_of(self.state, 0))
        except ValueError as error:
            raise CheckpointError(
                f"the save of {run} does not fit the model of this version ({error}); begin again with --new_run"
            ) from error

    def load(self, states: Sequence[TrainState], step: int) -> None:
        """Set the state from those of the members, and the step at which they stand."""
        parts = [(state.params, state.stats, state.opt_state) for state in states]
        state = TrainState(jnp.asarray(step, jnp.int32), *jax.tree.map(lambda *leaves: np.stack(leaves), *parts))
        self.state = jax.device_put(state, self._replicated)

    def keep(self, members: Sequence[int]) -> None:
        """Go on with some of the members only."""
        states = self.states()
        self.configs = [self.configs[member] for member in members]
        self._keys = self._keys[np.asarray(members)]
        self.load([states[member] for member in members], int(self.state.step))
        self._make_steps()

    def card(self, member: int, epoch: int, val: Evaluation) -> ModelCard:
        """Describe a member's present model."""
        config, side = self.configs[member], self.store.side
        return ModelCard(
            config={**self._model_settings(), "precision": self.precision.name},
            gene_ids=side.gene_ids,
            gene_names=side.gene_names,
            labels=side.labels,
            cl_ids=side.cl_ids,
            ontology_release=side.about.get("ontology_release"),
            normalisation=NORMALISATION,
            loss=self._loss(config),
            data_path=str(side.path.absolute()),
            epoch=epoch,
            step=int(self.state.step),
            scores={"val_loss": val.loss, "val_f1_macro": val.f1_macro, "val_f1_micro": val.f1_micro},
        )

    def _model_settings(self) -> dict[str, Any]:
        return {"model_type": self.config.model_type, **vars(model_config(self.config.to_dict()))}

    def hyper_parameters(self, config: ConfigDict) -> dict[str, Any]:
        """Return what the published code puts into hparams.yaml."""
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
        """Describe data, models and devices for a person."""
        config, side, params = self.config, self.store.side, self.state.params
        sizes = {name: sum(leaf[0].size for leaf in jax.tree.leaves(part)) for name, part in params.items()}
        parts = ", ".join(f"{name} {size:,}" for name, size in sizes.items()) if len(sizes) > 1 else ""
        hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
        place = f"the memory of the {config.cells_in}" if config.cells_in != "disk" else "files on disk"
        return (
            f"data        {side.path}: {self.train_split.n_cells:,} training and {self.val_split.n_cells:,} validation "
            f"cells, {side.n_genes:,} genes, {side.n_types} cell types; cells in {place}\n"
            f"model       {config.model_type}, {sum(sizes.values()):,} parameters{f' ({parts})' if parts else ''}\n"
            f"training    {self.steps_per_epoch:,} steps of {config.batch_size:,} cells an epoch, "
            f"at most {config.max_epochs} epochs\n"
            f"devices     {jax.device_count()} x {jax.devices()[0].device_kind}{hosts}, {self.precision.name}"
        )


def _member_of(state: TrainState, number: int) -> TrainState:
    parts = jax.tree.map(lambda leaf: np.asarray(leaf[number]), (state.params, state.stats, state.opt_state))
    return TrainState(state.step, *parts)
