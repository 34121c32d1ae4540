"""One step of training and of evaluation: pure functions of arrays, jitted."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from hce_jax.hierarchy import correct_predictions
from hce_jax.input import CellBatch, densify
from hce_jax.losses import cross_entropy, hierarchical_cross_entropy
from hce_jax.metrics import class_counts, f1_from_counts
from hce_jax.training.augment import augment
from hce_jax.typing import AnyArray, Array, Float, Int, Key

_Item = TypeVar("_Item")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes: arrays only, so that it can be jitted, sharded and saved.

    Attributes
    ----------
    step
        Steps taken.
    params
        Parameters of the model.
    stats
        Its other variables: running statistics of batch norms.
    opt_state
        State of the optimiser.
    """

    step: Int[Array, ""]
    params: nnx.State
    stats: nnx.State
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a run.

    Attributes
    ----------
    reachability
        R (c, c).
    class_weights
        Weight of each type in training (c,).
    use_hierarchical_loss
        HCE if true, cross entropy if not.
    epsilon
        HCE's; None for the exact form.
    """

    reachability: Float[Array, "c d"]
    class_weights: Float[Array, "c"]
    use_hierarchical_loss: bool
    epsilon: float | None

    def training_loss(self, logits: Float[Array, "b c"], targets: Int[AnyArray, "b"]) -> Float[Array, ""]:
        """Return the weighted mean against the authors' labels."""
        return self._loss(logits, targets, self.class_weights, "mean")

    def evaluation_losses(self, logits: Float[Array, "b c"], targets: Int[AnyArray, "b"]) -> Float[Array, "b"]:
        """Return the unweighted loss of each cell."""
        return self._loss(logits, targets, None, "none")

    def _loss(self, logits: Array, targets: AnyArray, class_weights: Array | None, reduction: str) -> Array:
        if self.use_hierarchical_loss:
            return hierarchical_cross_entropy(
                logits, targets, self.reachability, class_weights, self.epsilon, reduction=reduction
            )
        return cross_entropy(logits, targets, class_weights, reduction=reduction)


class StepMetrics(NamedTuple):
    """What a training step tells: loss, global norm of the gradients before clipping, counts of its cells (3, c)."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    counts: Int[Array, "3 c"]


class Evaluation(NamedTuple):
    """Result of a pass over a split: mean loss, and F1 from counts over all of its cells."""

    loss: float
    f1_macro: float
    f1_micro: float


def init_state(model: nnx.Module, optimizer: optax.GradientTransformation) -> tuple[nnx.GraphDef, TrainState]:
    """Split a new model into its structure and the state of step 0.

    Examples
    --------
    >>> graphdef, state = init_state(model, optimizer)  # doctest: +SKIP
    """
    graphdef, params, stats = nnx.split(model, nnx.Param, ...)
    return graphdef, TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params))


def make_train_step(
    graphdef: nnx.GraphDef,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    augmentations: Float[Array, "a g"] | None = None,
) -> Callable[[TrainState, CellBatch], tuple[TrainState, StepMetrics]]:
    """Return the jitted training step, (state, batch) -> (state, metrics); it consumes the state it is given.

    Every row of a training batch is a real cell. Random numbers of step n come from ``key`` folded with n, so the state
    carries no generator. With ``augmentations`` each cell is moved along one of these vectors. The metrics count
    corrected predictions, as published.

    Examples
    --------
    >>> train_step = make_train_step(graphdef, objective, optimizer, jax.random.key(0))  # doctest: +SKIP
    >>> state, metrics = train_step(state, batch)  # doctest: +SKIP
    """
    n_types = objective.reachability.shape[0]

    def train_step(state: TrainState, batch: CellBatch, augmentations: Array | None) -> tuple[TrainState, StepMetrics]:
        augment_key, model_key = jax.random.split(jax.random.fold_in(key, state.step))
        x_bg = densify(batch)
        if augmentations is not None:
            x_bg = augment(x_bg, augmentations, augment_key)

        def loss_of(params: nnx.State) -> tuple[Array, tuple[Array, nnx.State]]:
            # A copy, made inside the trace: the model updates its statistics in place.
            model = nnx.merge(graphdef, params, state.stats, copy=True)
            logits_bc, auxiliary_b = model(x_bg, train=True, key=model_key)
            loss = objective.training_loss(logits_bc, batch.targets) + auxiliary_b.mean()
            return loss, (logits_bc, nnx.state(model, nnx.Not(nnx.Param)))

        (loss, (logits_bc, stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        corrected_b = correct_predictions(batch.targets, jnp.argmax(logits_bc, axis=1), objective.reachability)
        counts = class_counts(batch.targets, corrected_b, n_types, batch.real)
        metrics = StepMetrics(loss, optax.tree.norm(grads), counts)
        return TrainState(state.step + 1, params, stats, opt_state), metrics

    # The vectors are an argument: as a constant of the program they would be compiled into it, hundreds of megabytes.
    return partial(jax.jit(train_step, donate_argnums=0), augmentations=augmentations)


class _BatchEvaluation(NamedTuple):
    loss_sum: Float[Array, ""]
    counts: Int[Array, "3 c"]


EvalStep = Callable[[nnx.State, nnx.State, CellBatch], _BatchEvaluation]


def make_eval_step(graphdef: nnx.GraphDef, objective: Objective) -> EvalStep:
    """Return the jitted evaluation of one batch, (params, stats, batch) -> sums over its real cells.

    As published: the F1 compares corrected predictions with the labels; the loss, without class weights, is taken
    against corrected targets (the prediction, where it is a descendant of the label).

    Examples
    --------
    >>> eval_step = make_eval_step(graphdef, objective)  # doctest: +SKIP
    """
    n_types = objective.reachability.shape[0]

    def eval_step(params: nnx.State, stats: nnx.State, batch: CellBatch) -> _BatchEvaluation:
        logits_bc, auxiliary_b = nnx.merge(graphdef, params, stats)(densify(batch))
        predictions_b = jnp.argmax(logits_bc, axis=1)
        corrected_b = correct_predictions(batch.targets, predictions_b, objective.reachability)
        corrected_targets_b = jnp.where(corrected_b == batch.targets, predictions_b, batch.targets)
        losses_b = objective.evaluation_losses(logits_bc, corrected_targets_b) + auxiliary_b
        loss_sum = jnp.sum(losses_b, where=batch.real)
        return _BatchEvaluation(loss_sum, class_counts(batch.targets, corrected_b, n_types, batch.real))

    return jax.jit(eval_step)


def one_late(items: Iterable[_Item]) -> Iterator[_Item]:
    """Yield each item when the next one has been made.

    Reading the result of a step then never leaves the devices idle, as the next step is already dispatched; and no more
    than two batches are ever under way.

    Examples
    --------
    >>> list(one_late("abc"))
    ['a', 'b', 'c']
    """
    earlier: list[_Item] = []
    for item in items:
        yield from earlier
        earlier = [item]
    yield from earlier


def evaluate(eval_step: EvalStep, params: nnx.State, stats: nnx.State, batches: Iterable[CellBatch]) -> Evaluation:
    """Evaluate a model on all batches of a split; counts are exact whatever the batches.

    Parameters
    ----------
    eval_step
        From :func:`make_eval_step`.
    params, stats
        The model's variables.
    batches
        Each cell once, the last batch filled up.

    Examples
    --------
    >>> evaluate(eval_step, state.params, state.stats, batches).f1_macro  # doctest: +SKIP
    0.812
    """
    results = [
        (float(result.loss_sum), np.asarray(result.counts, np.int64))
        for result in one_late(eval_step(params, stats, batch) for batch in batches)
    ]
    loss_sum = sum(loss for loss, _ in results)
    counts = np.sum([counts for _, counts in results], axis=0)
    n_cells = int(counts[2].sum())
    return Evaluation(
        loss_sum / n_cells, float(f1_from_counts(counts, "macro")), float(f1_from_counts(counts, "micro"))
    )
