"""One step of training and of evaluation: pure functions of arrays, jitted."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding

from hce_jax.hierarchy import correct_predictions
from hce_jax.input import DenseBatch
from hce_jax.losses import cross_entropy, hierarchical_cross_entropy
from hce_jax.metrics import class_counts, f1_from_counts
from hce_jax.models import split_model
from hce_jax.training.augment import augment
from hce_jax.training.optim import global_norm
from hce_jax.typing import AnyArray, Array, Float, Int, Key, Variables

_Item = TypeVar("_Item")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, of e members that are trained together: arrays only, to be jitted, sharded and saved.

    The variables are plain dictionaries, which JAX takes apart in C++: with ``nnx.State`` that alone, in Python, would
    cost the host a millisecond at each step of TabNet.

    Attributes
    ----------
    step
        Steps taken, by all members alike.
    params
        Parameters of the model; the first axis of each is that of the members.
    stats
        Its other variables: running statistics of batch norms.
    opt_state
        State of the optimiser.
    """

    step: Int[AnyArray, ""]
    params: Variables
    stats: Variables
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
    """What a step tells of each member: loss, norm of the gradients before clipping, counts of its cells (e, 3, c)."""

    loss: Float[AnyArray, "e"]
    grad_norm: Float[AnyArray, "e"]
    counts: Int[AnyArray, "e 3 c"]


class Evaluation(NamedTuple):
    """Result of a pass over a split: mean loss, and F1 from counts over all of its cells."""

    loss: float
    f1_macro: float
    f1_micro: float


def init_state(
    models: Sequence[nnx.Module], optimizer: optax.GradientTransformation
) -> tuple[nnx.GraphDef, TrainState]:
    """Split new models, one for each member, into their common structure and the state of step 0.

    Examples
    --------
    >>> graphdef, state = init_state([model], optimizer)  # doctest: +SKIP
    """
    graphdefs, *variables = zip(*map(split_model, models), strict=True)
    params, stats = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) for each in variables)
    return graphdefs[0], TrainState(jnp.zeros((), jnp.int32), params, stats, jax.vmap(optimizer.init)(params))


def state_arrays(state: TrainState) -> dict[str, Any]:
    """Return the arrays of a state under names, as they are saved.

    Examples
    --------
    >>> list(state_arrays(state))[:2]  # doctest: +SKIP
    ['step', 'params.linear.bias.value']
    """
    return {_name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}


def state_of_arrays(arrays: Mapping[str, AnyArray], like: TrainState) -> TrainState:
    """Return the state with these arrays: the reverse of :func:`state_arrays`, given a state of the same form.

    Raises
    ------
    ValueError
        If the arrays are not those of such a state.

    Examples
    --------
    >>> state_of_arrays(state_arrays(state), state).step == state.step  # doctest: +SKIP
    True
    """
    expected = state_arrays(like)
    for name in sorted({*expected, *arrays}):
        shapes = [each[name].shape if name in each else "not there" for each in (arrays, expected)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} is {shapes[0]}, not {shapes[1]}")
    return jax.tree.map_with_path(lambda path, _: arrays[_name_of(path)], like)


def _name_of(path: tuple[Any, ...]) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    # Saves have always called a variable so.
    return f"{name}.value" if isinstance(path[-1], jax.tree_util.DictKey) else name


def make_train_step(
    graphdef: nnx.GraphDef,
    objectives: Sequence[Objective],
    optimizer: optax.GradientTransformation,
    keys: Key[Array, "e"],
    augmentations: Float[Array, "a g"] | None = None,
    replicated: NamedSharding | None = None,
) -> Callable[[TrainState, DenseBatch], tuple[TrainState, StepMetrics]]:
    """Return the jitted training step, (state, batch) -> (state, metrics); it consumes the state it is given.

    All members see the same cells, and nothing else of each other: each has its objective, and its random numbers of
    step n come from its key folded with n, so the state carries no generator. Every row of a training batch is a real
    cell. With ``augmentations`` each cell is moved along one of these vectors. The metrics count corrected predictions,
    as published.

    Parameters
    ----------
    graphdef
        Structure of the model.
    objectives, keys
        Of each member.
    optimizer
        Of each member, too.
    augmentations
        None: no augmentation.
    replicated
        How the result lies on the devices of a mesh.

    Examples
    --------
    >>> train_step = make_train_step(graphdef, [objective], optimizer, jax.random.split(key, 1))  # doctest: +SKIP
    >>> state, metrics = train_step(state, batch)  # doctest: +SKIP
    """

    def train_step(state: TrainState, batch: DenseBatch, augmentations: Array | None) -> tuple[TrainState, StepMetrics]:
        def apply_member(params: Variables, stats: Variables, key: Array) -> tuple[Array, Array, Variables]:
            augment_key, model_key = jax.random.split(jax.random.fold_in(key, state.step))
            x_bw = jnp.asarray(batch.x)
            if augmentations is not None:
                with jax.named_scope("augment"):
                    x_bw = augment(x_bw, augmentations, augment_key)
            model = nnx.merge(graphdef, params, stats)  # its variables are its own: it updates statistics in place
            with _context(replicated):
                logits_bc, auxiliary_b = model(x_bw, train=True, key=model_key)
            return logits_bc, auxiliary_b.mean(), split_model(model)[2]

        def loss_of(params: Variables) -> tuple[Array, tuple[Array, Array, Variables]]:
            logits_ebc, auxiliary_e, stats = jax.vmap(apply_member)(params, state.stats, keys)
            with jax.named_scope("loss"):
                members = zip(objectives, logits_ebc, strict=True)
                losses_e = jnp.stack([own.training_loss(logits_bc, batch.targets) for own, logits_bc in members])
                losses_e += auxiliary_e
            return losses_e.sum(), (losses_e, logits_ebc, stats)  # a member's gradient is that of its own summand

        (_, (losses_e, logits_ebc, stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        with jax.named_scope("optimizer"):
            norms_e = jax.vmap(global_norm)(grads)  # computed once: the compiler finds the same in the clipping
            updates, opt_state = jax.vmap(optimizer.update)(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        with jax.named_scope("metrics"):
            metrics = StepMetrics(losses_e, norms_e, _corrected_counts(objectives[0], logits_ebc, batch))
        return TrainState(state.step + 1, params, stats, opt_state), metrics

    # The vectors are an argument: as a constant of the program they would be compiled into it, hundreds of megabytes.
    return partial(
        jax.jit(train_step, donate_argnums=0, out_shardings=replicated),
        augmentations=augmentations,
    )


def _context(replicated: NamedSharding | None) -> AbstractContextManager[Any]:
    """Tell what is traced inside over which devices its arrays are spread."""
    return nullcontext() if replicated is None else jax.sharding.use_abstract_mesh(replicated.mesh.abstract_mesh)


class _BatchEvaluation(NamedTuple):
    loss_sum: Float[Array, "e"]
    counts: Int[Array, "e 3 c"]


EvalStep = Callable[[Variables, Variables, DenseBatch], _BatchEvaluation]


def make_eval_step(
    graphdef: nnx.GraphDef, objectives: Sequence[Objective], replicated: NamedSharding | None = None
) -> EvalStep:
    """Return the jitted evaluation of one batch, (params, stats, batch) -> each member's sums over its real cells.

    As published: the F1 compares corrected predictions with the labels; the loss, without class weights, is taken
    against corrected targets (the prediction, where it is a descendant of the label).

    Parameters
    ----------
    graphdef, objectives, replicated
        As in :func:`make_train_step`.

    Examples
    --------
    >>> eval_step = make_eval_step(graphdef, [objective])  # doctest: +SKIP
    """

    def eval_step(params: Variables, stats: Variables, batch: DenseBatch) -> _BatchEvaluation:
        apply_member = jax.vmap(lambda params, stats: nnx.merge(graphdef, params, stats)(batch.x))
        with _context(replicated):
            logits_ebc, auxiliary_eb = apply_member(params, stats)
        members = zip(objectives, logits_ebc, auxiliary_eb, strict=True)
        losses_e = [_loss_sum(own, logits_bc, auxiliary_b, batch) for own, logits_bc, auxiliary_b in members]
        return _BatchEvaluation(jnp.stack(losses_e), _corrected_counts(objectives[0], logits_ebc, batch))

    return jax.jit(eval_step, out_shardings=replicated)


def _loss_sum(objective: Objective, logits_bc: Array, auxiliary_b: Array, batch: DenseBatch) -> Float[Array, ""]:
    predictions_b = jnp.argmax(logits_bc, axis=1)
    corrected_b = correct_predictions(batch.targets, predictions_b, objective.reachability)
    corrected_targets_b = jnp.where(corrected_b == batch.targets, predictions_b, batch.targets)
    losses_b = objective.evaluation_losses(logits_bc, corrected_targets_b) + auxiliary_b
    return jnp.sum(losses_b, where=batch.real)


def _corrected_counts(objective: Objective, logits_ebc: Array, batch: DenseBatch) -> Int[Array, "e 3 c"]:
    def counts_of(logits_bc: Array) -> Array:
        corrected_b = correct_predictions(batch.targets, jnp.argmax(logits_bc, axis=1), objective.reachability)
        return class_counts(batch.targets, corrected_b, objective.reachability.shape[0], batch.real)

    return jax.vmap(counts_of)(logits_ebc)


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


def evaluate(
    eval_step: EvalStep, params: Variables, stats: Variables, batches: Iterable[DenseBatch]
) -> list[Evaluation]:
    """Evaluate the members on all batches of a split; counts are exact whatever the batches.

    Parameters
    ----------
    eval_step
        From :func:`make_eval_step`.
    params, stats
        The models' variables, their first axis that of the members.
    batches
        Each cell once, the last batch filled up.

    Examples
    --------
    >>> evaluate(eval_step, state.params, state.stats, batches)[0].f1_macro  # doctest: +SKIP
    0.812
    """
    results = [jax.device_get(result) for result in one_late(eval_step(params, stats, batch) for batch in batches)]
    loss_sums = np.sum([result.loss_sum.astype(np.float64) for result in results], axis=0)
    counts = np.sum([result.counts.astype(np.int64) for result in results], axis=0)
    return [
        Evaluation(
            float(loss_sum / own[2].sum()), float(f1_from_counts(own, "macro")), float(f1_from_counts(own, "micro"))
        )
        for loss_sum, own in zip(loss_sums, counts, strict=True)
    ]
