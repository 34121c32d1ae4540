"""Predictions and scores of a checkpoint on a store's splits."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hce_jax.checkpoint import Ensemble, Predictor, load_model
from hce_jax.input import CellBatch, DenseBatch, densify, evaluation_batches
from hce_jax.progress import progress
from hce_jax.store import Split, open_store
from hce_jax.training.steps import Evaluation, Objective, evaluate, make_eval_step
from hce_jax.typing import Float, Int


class LabelledPredictions(NamedTuple):
    """Targets and predictions of a split's cells, in the order of the store, each (n,).

    Attributes
    ----------
    targets
        The authors' labels.
    predictions
        argmax of the softmax, not corrected.
    """

    targets: Int[np.ndarray, "n"]
    predictions: Int[np.ndarray, "n"]


def predict_split(ensemble: Ensemble, split: Split, batch_size: int = 2048) -> LabelledPredictions:
    """Predict the cells of a split, in batches.

    Examples
    --------
    >>> predict_split(Ensemble([load_model(run)]), open_store(path).split("test")).predictions.shape  # doctest: +SKIP
    (3448832,)
    """
    targets, predictions = [], []
    for batch, probabilities in _predicted_batches(ensemble, split, batch_size):
        targets.append(batch.targets[batch.real])
        predictions.append(probabilities.argmax(axis=1))
    return LabelledPredictions(np.concatenate(targets), np.concatenate(predictions))


def _predicted_batches(
    ensemble: Ensemble, split: Split, batch_size: int
) -> Iterator[tuple[CellBatch, Float[np.ndarray, "n c"]]]:
    with progress(evaluation_batches(split, batch_size), -(-split.n_cells // batch_size), split.name) as bar:
        for batch in bar:
            yield batch, ensemble.predict_batch(batch)


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
    return np.concatenate(
        [probabilities for _, probabilities in _predicted_batches(Ensemble([predictor]), cells, batch_size)]
    )


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
    with progress(evaluation_batches(cells, batch_size), -(-cells.n_cells // batch_size), split) as bar:
        dense = (DenseBatch(densify(batch), batch.targets, batch.real) for batch in bar)
        [result] = evaluate(eval_step, params, stats, dense)
    return result


def _open(checkpoint: str | Path, data_path: str | Path | None, split: str) -> tuple[Predictor, Split]:
    predictor = load_model(checkpoint)
    store = open_store(data_path or predictor.card.data_path)
    predictor.check_store(store.side)
    return predictor, store.split(split)
