"""A trained model, whoever trained it: a checkpoint of this package, or of the published PyTorch code."""

from pathlib import Path

from hce_jax.checkpoint import load_model
from hce_jax.errors import CheckpointError
from hce_jax.models import MODELS
from hce_jax.predictor import Predictor
from hce_jax.runs import resolve_checkpoint, stated_model_type
from hce_jax.store import SideFiles
from hce_jax.torch_import import load_torch_checkpoint, published_f1


def open_model(path: str | Path, side: SideFiles | None = None, hparams_path: str | Path | None = None) -> Predictor:
    """Load a checkpoint of this package or of the published code.

    Parameters
    ----------
    path
        A checkpoint (a folder of ours, a ``.ckpt`` file of the published code), or a run folder of either (its best).
    side
        Side files of the store that the model was trained on: a published checkpoint names neither genes nor labels.
        Those of ours need none.
    hparams_path
        Of a published checkpoint, as :func:`hce_jax.torch_import.load_torch_checkpoint`.

    Raises
    ------
    CheckpointError
        If there is no readable checkpoint, it is of another kind than its run folder says, or ``side`` is missing.

    Examples
    --------
    >>> open_model("tb_logs/cxg_2023_05_15_mlp/default/version_0", store.side).model_type  # doctest: +SKIP
    'mlp'
    """
    published = published_checkpoint(Path(path))
    if published is None:
        predictor = load_model(path)
    elif side is None:
        raise CheckpointError(
            f"{published} is of the published PyTorch code and names neither its genes nor its cell types; name the "
            "store that it was trained on"
        )
    else:
        predictor = load_torch_checkpoint(published, side, hparams_path)
    stated = stated_model_type(predictor.path, MODELS)
    if stated not in (None, predictor.model_type):
        raise CheckpointError(
            f"{predictor.path} is a {predictor.model_type} model, but its run folder says {stated}: it lies in the "
            "wrong place; move it, or name another"
        )
    return predictor


def published_checkpoint(path: Path) -> Path | None:
    """Return the file of the published code that a user names: itself, or the best of a run; None for one of ours.

    Raises
    ------
    CheckpointError
        If there is none of either.

    Examples
    --------
    >>> published_checkpoint(Path("tb_logs/linear/default/version_0"))  # doctest: +SKIP
    """
    if resolve_checkpoint(path).is_dir():
        return None
    return resolve_checkpoint(path, exact_score=published_f1)
