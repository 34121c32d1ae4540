"""Cells read and classified by several threads, in order; and what checkpoints say of a store's splits."""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from hce_jax.checkpoint import load_model
from hce_jax.evaluation.cells import Cells, StoreCells
from hce_jax.input import DenseBatch, Expression, densify, evaluation_batches, row_width
from hce_jax.predictor import Predictor
from hce_jax.progress import progress
from hce_jax.store import Block, SideFiles, Split, open_store
from hce_jax.store.split import n_readers
from hce_jax.store.threads import CellBar
from hce_jax.training.steps import Evaluation, Objective, evaluate, make_eval_step
from hce_jax.typing import Float

#: Batches that are dense at a time, each some hundred MB: one is computed, one is made ready.
_DENSE_BATCHES = 2

_Result = TypeVar("_Result")


@runtime_checkable
class Classifier(Protocol):
    """What can be evaluated: a model of ours, several together, or one of another kind."""

    @property
    def model_type(self) -> str:
        """How the files of its results begin."""

    @property
    def title(self) -> str:
        """What it is, for a person."""

    @property
    def side(self) -> SideFiles:
        """Its genes, cell types and hierarchy."""

    @property
    def reads_sparse(self) -> bool:
        """Whether it never makes a batch dense."""

    def predict_block(self, cells: Expression) -> Float[np.ndarray, "n c"]:
        """Return the probability of each type for each cell; several threads may ask at a time."""


class Classified(NamedTuple):
    """Some cells, and for each classifier the probabilities of their types.

    Attributes
    ----------
    block
        The cells; their columns as :meth:`Cells.read_block` gives them.
    probabilities
        (n, c) float32 each.
    """

    block: Block
    probabilities: list[Float[np.ndarray, "n c"]]


def classified(cells: Cells, classifiers: Sequence[Classifier], batch_size: int = 2048) -> Iterator[Classified]:
    """Go through all cells in their order, under a progress bar. Memory holds a few batches.

    Parameters
    ----------
    cells
        The cells.
    classifiers
        All of them see each batch, which is read once.
    batch_size
        Cells that are computed together, at most.

    Yields
    ------
    Classified
        Some whole blocks of the cells.

    Examples
    --------
    >>> for batch in classified(StoreCells(split), [load_model(run)]):  # doctest: +SKIP
    ...     batch.probabilities[0].argmax(axis=1)
    """
    sparse = all(each.reads_sparse for each in classifiers)
    for block, parts in computed(
        cells, lambda part: [each.predict_block(part) for each in classifiers], sparse, batch_size
    ):
        yield Classified(block, [np.concatenate(each) for each in zip(*parts, strict=True)])


def computed(
    cells: Cells, compute: Callable[[Expression], _Result], sparse: bool, batch_size: int = 2048
) -> Iterator[tuple[Block, list[_Result]]]:
    """Compute something of all cells in their order, in several threads, under a progress bar.

    Parameters
    ----------
    cells
        The cells.
    compute
        What is computed of some cells; several threads may call it.
    sparse
        Whether it leaves cells sparse; else only few batches are computed at a time, for they are large when dense.
    batch_size
        Cells that are computed together, at most.

    Yields
    ------
    Some whole blocks of the cells, and the results of their parts.

    Examples
    --------
    >>> for block, parts in computed(cells, predictor.predict_and_embed, predictor.reads_sparse):  # doctest: +SKIP
    ...     parts[0].embedding.shape
    """
    slots = nullcontext() if sparse else threading.Semaphore(_DENSE_BATCHES)

    def compute_blocks(blocks: range) -> tuple[Block, list[_Result]]:
        block = Block.concatenate([cells.read_block(index) for index in blocks])
        parts = [block.slice(start, min(start + batch_size, len(block))) for start in range(0, len(block), batch_size)]
        with slots:
            return block, [compute(Expression(part)) for part in parts]

    with (
        CellBar(cells.title, int(cells.block_sizes.sum())) as bar,
        ThreadPoolExecutor(n_readers()) as pool,
    ):
        batches = _batches(cells.block_sizes, batch_size)
        waiting: deque[Future[tuple[Block, list[_Result]]]] = deque()
        try:
            for batch in itertools.chain(batches, itertools.repeat(None)):
                if batch is not None:
                    waiting.append(pool.submit(compute_blocks, batch))
                    if len(waiting) <= n_readers():
                        continue
                elif not waiting:
                    return
                block, results = waiting.popleft().result()
                bar.update(len(block))
                yield block, results
        finally:
            pool.shutdown(cancel_futures=True)


def _batches(block_sizes: np.ndarray, batch_size: int) -> Iterator[range]:
    """Take as many blocks together as make up a batch, or one that is larger."""
    first, n_cells = 0, 0
    for index, size in enumerate(block_sizes.tolist()):
        if n_cells and n_cells + size > batch_size:
            yield range(first, index)
            first, n_cells = index, 0
        n_cells += size
    if n_cells:
        yield range(first, len(block_sizes))


def predict(
    checkpoint: str | Path, data_path: str | Path | None = None, split: str = "test", batch_size: int = 2048
) -> Float[np.ndarray, "n c"]:
    """Return the class probabilities of a split's cells, in the order of the store.

    Parameters
    ----------
    checkpoint
        A checkpoint or run folder.
    data_path
        The store; the one the model was trained on if not given.
    split
        train, val or test.
    batch_size
        Cells computed at a time.

    Returns
    -------
    float32 array (n, c).

    Raises
    ------
    UserError
        If checkpoint or store cannot be read or do not belong together.

    Examples
    --------
    >>> predict("tb_logs/linear/default/version_0").shape  # doctest: +SKIP
    (3448832, 164)
    """
    predictor, cells = _open(checkpoint, data_path, split)
    return np.concatenate([batch.probabilities[0] for batch in classified(StoreCells(cells), [predictor], batch_size)])


def validate(checkpoint: str | Path, data_path: str | Path | None = None, batch_size: int = 2048) -> Evaluation:
    """Return loss and F1 of a checkpoint on the validation split, as training computes them.

    Parameters and errors as :func:`predict`.

    Examples
    --------
    >>> validate("tb_logs/linear/default/version_0").f1_macro  # doctest: +SKIP
    0.81
    """
    return _evaluate(checkpoint, data_path, "val", batch_size)


def test(checkpoint: str | Path, data_path: str | Path | None = None, batch_size: int = 2048) -> Evaluation:
    """Return loss and F1 of a checkpoint on the test split; parameters and errors as :func:`predict`.

    Examples
    --------
    >>> test("tb_logs/linear/default/version_0").f1_macro  # doctest: +SKIP
    0.79
    """
    return _evaluate(checkpoint, data_path, "test", batch_size)


def _evaluate(checkpoint: str | Path, data_path: str | Path | None, split: str, batch_size: int) -> Evaluation:
    predictor, cells = _open(checkpoint, data_path, split)
    objective = Objective(
        reachability=jnp.asarray(predictor.reachability),
        class_weights=jnp.ones(len(predictor.card.labels)),  # evaluation does not weigh
        **predictor.card.loss,
    )
    eval_step = make_eval_step(predictor.graphdef, [objective])
    params, stats = jax.tree.map(lambda leaf: leaf[None], (predictor.params, predictor.stats))
    width = row_width(cells.side.n_genes)
    with progress(evaluation_batches(cells, batch_size), -(-cells.n_cells // batch_size), split) as bar:
        dense = (DenseBatch(densify(batch, width), batch.targets, batch.real) for batch in bar)
        [result] = evaluate(eval_step, params, stats, dense)
    return result


def _open(checkpoint: str | Path, data_path: str | Path | None, split: str) -> tuple[Predictor, Split]:
    predictor = load_model(checkpoint)
    store = open_store(data_path or predictor.card.data_path)
    predictor.check_store(store.side)
    return predictor, store.split(split)
