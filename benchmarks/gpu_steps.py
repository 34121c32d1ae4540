"""Steps of training and of inference as programs that can be timed, and their stages."""

import collections
import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from benchmarks.gpu_floor import AUGMENTED
from benchmarks.step import CLIP_NORM, HYPER_PARAMETERS, OPTIMIZER
from hce_jax.input import CellBatch, dense_batch
from hce_jax.models import build_model
from hce_jax.training.augment import augment
from hce_jax.training.mesh import data_mesh, replicated
from hce_jax.training.optim import published_optimizer, step_schedule
from hce_jax.training.steps import Objective, init_state, make_train_step, one_late
from hce_jax.typing import PRECISIONS, Array

#: Stretches of steps that a median is taken of, and the seconds of each.
N_STRETCHES, STRETCH_SECONDS = 5, 0.25
#: n steps -> the seconds that they took.
Program = Callable[[int], float]


@dataclasses.dataclass(frozen=True)
class Data:
    """What a training needs beside its cells.

    Attributes
    ----------
    n_genes, n_types
        Sizes of the models.
    sharding
        Of the cells of a batch.
    reachability
        R (c, c).
    augmentations
        Vectors as wide as the rows of a batch (a, w).
    """

    n_genes: int
    n_types: int
    sharding: NamedSharding
    reachability: Array
    augmentations: Array


class Training:
    """A training as the package does it: the jitted step and its state.

    Parameters
    ----------
    data
        Shared by all.
    model, precision, members
        What is trained.

    Attributes
    ----------
    state
        Of the training.
    step
        The package's own: (state, dense batch) -> (state, metrics).
    probabilities
        (parameters, statistics, expression (b, w)) -> probabilities (b, c).
    """

    def __init__(self, data: Data, model: str, precision: str, members: int = 1):
        self.sharding, everywhere = data.sharding, replicated(data_mesh())
        config = {"model_type": model, **HYPER_PARAMETERS}
        self.model = model
        rate, decay = OPTIMIZER[model]
        self.optimizer = published_optimizer(step_schedule(rate, 0.9, 1, 1000), decay, CLIP_NORM)
        models = [
            build_model(config, data.n_genes, data.n_types, nnx.Rngs(seed), precision=PRECISIONS[precision])
            for seed in range(members)
        ]
        self.graphdef, state = init_state(models, self.optimizer)
        self.state = jax.device_put(state, everywhere)
        self.objectives = [Objective(data.reachability, jnp.ones(data.n_types), True, 1e-6)] * members
        self.keys = jax.random.split(jax.random.key(0), members)
        self.vectors = data.augmentations if model in AUGMENTED else None
        self.step = make_train_step(self.graphdef, self.objectives, self.optimizer, self.keys, self.vectors, everywhere)
        self.probabilities = jax.jit(functools.partial(_probabilities, self.graphdef))

    @functools.cached_property
    def weights(self) -> tuple[Any, Any]:
        """Weights and statistics of the first member as they are when they are first asked for."""
        return jax.tree.map(lambda leaf: leaf[0], (self.state.params, self.state.stats))

    def train(self, batches: Iterable[CellBatch]) -> None:
        """Train on batches that lie on the device, as the training loop does; wait for the last."""

        def steps() -> Iterator[Any]:
            for batch in batches:
                self.state, metrics = self.step(self.state, dense_batch(batch, self.sharding))
                yield metrics

        for metrics in one_late(steps()):
            loss, *_ = jax.tree.map(np.asarray, metrics)
        jax.block_until_ready(self.state)
        if not np.isfinite(loss).all():
            raise ArithmeticError(f"the loss became {loss}")

    def predict(self, batches: Iterable[CellBatch]) -> None:
        """Bring the probabilities of batches that lie on the device to the host."""
        results = (self.probabilities(*self.weights, dense_batch(batch, self.sharding).x) for batch in batches)
        for probabilities in one_late(results):
            np.asarray(probabilities)


def _probabilities(graphdef: nnx.GraphDef, params: Any, stats: Any, x: jax.Array) -> jax.Array:
    return jax.nn.softmax(nnx.merge(graphdef, params, stats)(x)[0])


def on_device(batches: Iterable[CellBatch], sharding: NamedSharding) -> Iterator[CellBatch]:
    """Put batches on the device in a thread, two ahead of their use, as the input pipeline does."""
    with ThreadPoolExecutor(1) as thread:
        ahead: collections.deque[Future[CellBatch]] = collections.deque()
        for batch in batches:
            ahead.append(thread.submit(jax.device_put, batch, sharding))
            if len(ahead) > 2:
                yield ahead.popleft().result()
        yield from (each.result() for each in ahead)


def in_turn(
    function: Callable[[Iterable[CellBatch]], None], packed: Sequence[CellBatch], sharding: NamedSharding
) -> Program:
    """Return the program that gives a function n batches out of those in host memory."""

    def program(n_steps: int) -> float:
        began = time.perf_counter()
        function(on_device(itertools.islice(itertools.cycle(packed), n_steps), sharding))
        return time.perf_counter() - began

    return program


class Timing(NamedTuple):
    """Median seconds a step, and (longest - shortest) / median of the stretches."""

    seconds: float
    spread: float


def take_turns(programs: dict[str, Program]) -> dict[str, Timing]:
    """Let programs take turns, a stretch of steps each, and return what a step of each takes."""
    lengths: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for name, program in programs.items():
        program(2)
        lengths[name] = min(max(math.ceil(STRETCH_SECONDS / (program(3) / 3)), 3), 1000)
    for _ in range(N_STRETCHES):
        for name, program in programs.items():
            times[name].append(program(lengths[name]) / lengths[name])
    medians = {name: statistics.median(each) for name, each in times.items()}
    return {name: Timing(medians[name], (max(each) - min(each)) / medians[name]) for name, each in times.items()}


def seconds_of(function: Callable[[], Any], repeats: int = 10) -> float:
    """Return the median time of a call that ends when its result is complete."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def many(function: Callable[[], Any], count: int = 10) -> float:
    """Return the median time of a call among several that are dispatched together."""
    return seconds_of(lambda: [function() for _ in range(count)], 5) / count


def stage_seconds(training: Training, packed: CellBatch) -> Iterator[tuple[str, float]]:
    """Yield the stages of a step and what each takes: differences of programs that end after each of them.

    The forward pass is the training step of which only the loss is asked, the backward pass that of which the norm of
    the gradients is asked: the compiler leaves out the rest. Only the transfer is the time from its begin to its end;
    in a loop it is hidden behind the step before.
    """
    yield "transfer", seconds_of(lambda: jax.device_put(packed, training.sharding), 20)
    on_card = jax.device_put(packed, training.sharding)
    yield "decode", many(lambda: dense_batch(on_card, training.sharding))
    dense, vectors = dense_batch(on_card, training.sharding), training.vectors
    before = 0.0
    if vectors is not None:
        augmented, key = jax.jit(augment), jax.random.key(0)
        before = many(lambda: augmented(dense.x, vectors, key))
        yield "augment", before
    results: dict[str, Callable[[Any, Any], Any]] = {
        "forward": lambda state, metrics: metrics.loss,
        "backward": lambda state, metrics: metrics.grad_norm,
        "optimiser": lambda state, metrics: (state, metrics),
    }
    for name, result in results.items():

        @jax.jit
        def program(state: Any, dense: Any, vectors: Any, result: Any = result) -> Any:
            step = make_train_step(training.graphdef, training.objectives, training.optimizer, training.keys, vectors)
            return result(*step(state, dense))

        until = many(lambda: program(training.state, dense, vectors))
        yield name, until - before
        before = until
