"""Self-contained checkpoints: a trained model with all that inference needs. The only module that knows Orbax."""

import dataclasses
import gc
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from flax import nnx
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from hce_jax.errors import CheckpointError
from hce_jax.models import build_model, split_model
from hce_jax.predictor import FORMAT_VERSION, ModelCard, Predictor
from hce_jax.runs import resolve_checkpoint
from hce_jax.typing import Precision, Variables, resolve_precision

#: What the user can do something about, in the long text of a library.
_CAUSES = ("No space left on device", "Disk quota exceeded", "Permission denied", "Read-only file system")
#: Names of states that are being replaced, and of checkpoints that are being deleted.
_NEW, _REPLACED, _DELETED = ".new", ".replaced", ".deleted-"
NORMALISATION = "sf-log1p: counts scaled to 10,000 a cell over these genes, then ln(1 + x)"


# Orbax logs every error, with a traceback of each of its threads, before it raises it; asyncio what that left behind.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


@contextmanager
def _orbax_errors(problem: str) -> Iterator[None]:
    """Turn an error of Orbax into a CheckpointError, and clear away what Orbax leaves behind.

    When it fails it drops unfinished coroutines, which complain on standard error whenever they are collected: that is
    done here, silently, while nothing holds on to the error.
    """
    try:
        yield
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        known = next((what for what in _CAUSES if what in str(error)), None)
        missing = "its metadata cannot be read" if isinstance(error, KeyError) else None
        reason = known or missing or (str(error).splitlines()[0][:200] if str(error) else type(error).__name__)
    hook = sys.unraisablehook
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.unraisablehook = lambda _: None
        gc.collect()
        sys.unraisablehook = hook
    raise CheckpointError(f"{problem}: {reason}")


def save_model(path: Path, card: ModelCard, reachability: np.ndarray, params: Variables, stats: Variables) -> None:
    """Write a checkpoint; it appears under its name only when it is complete.

    Parameters
    ----------
    path
        The checkpoint's folder; it must not exist yet.
    card
        Description of the model.
    reachability
        R (c, c).
    params, stats
        The model's variables.

    Raises
    ------
    CheckpointError
        If it exists already or cannot be written.

    Examples
    --------
    >>> save_model(run / "checkpoints" / name, card, reachability, state.params, state.stats)  # doctest: +SKIP
    """
    if path.exists():
        raise CheckpointError(f"the checkpoint {path} exists already; it is not overwritten")
    arrays = {
        "params": params,
        "stats": stats,
        "reachability": np.asarray(reachability, np.float32),
    }
    with _orbax_errors(f"the checkpoint {path} could not be written"):
        ocp.save_checkpointables(path.absolute(), {"model": arrays}, custom_metadata=dataclasses.asdict(card))


def save_state(path: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write arrays, with a checksum of each, and what JSON can hold of them; replaces what is there, as a whole.

    Parameters
    ----------
    path
        A folder; killed at any moment, it is there as it was or as it shall be (:func:`recover_states`).
    arrays, about
        What :func:`load_state` gives back.

    Raises
    ------
    CheckpointError
        If it cannot be written.

    Examples
    --------
    >>> save_state(run / "checkpoints" / "last" / "1200", {"step": np.array(1200)}, {"epoch": 3})  # doctest: +SKIP
    """
    metadata = {"about": dict(about), "checksums": {name: _checksum(array) for name, array in arrays.items()}}
    new = path.with_name(f"{path.name}{_NEW}")
    with _orbax_errors(f"the checkpoint {path} could not be written"):
        ocp.save_checkpointables(new.absolute(), {"state": dict(arrays)}, custom_metadata=metadata)
    if jax.process_index() == 0:
        replaced = path.with_name(f"{path.name}{_REPLACED}")
        if path.exists():
            path.rename(replaced)
        new.rename(path)
        if replaced.exists():
            delete_checkpoint(replaced)


def recover_states(folder: Path) -> None:
    """Bring the states of a folder in order after a kill: what was not finished goes, what was replaced comes back.

    Examples
    --------
    >>> recover_states(run / "checkpoints" / "last")  # doctest: +SKIP
    """
    for path in list(folder.glob(f"*{_REPLACED}")):
        name = path.with_name(path.name.removesuffix(_REPLACED))
        if not name.exists():
            path.rename(name)
    clear_unfinished(folder)


def clear_unfinished(folder: Path) -> None:
    """Remove what killed processes left half written or half deleted in a folder of checkpoints.

    Examples
    --------
    >>> clear_unfinished(run / "checkpoints")  # doctest: +SKIP
    """
    for path in list(folder.glob("*")):
        if path.name.startswith(_DELETED) or "orbax-checkpoint-tmp" in path.name or path.suffix in (_NEW, _REPLACED):
            shutil.rmtree(path)


def state_about(path: Path) -> dict[str, Any]:
    """Read what JSON holds of a state, only.

    Raises
    ------
    CheckpointError
        If it is damaged.

    Examples
    --------
    >>> state_about(run / "checkpoints" / "last" / "1200")["epoch"]  # doctest: +SKIP
    3
    """
    with _orbax_errors(f"the checkpoint {path} is damaged"):
        return ocp.checkpointables_metadata(path.absolute()).custom_metadata["about"]


def load_state(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what :func:`save_state` wrote.

    Raises
    ------
    CheckpointError
        If it is damaged.

    Examples
    --------
    >>> arrays, about = load_state(run / "checkpoints" / "last" / "1200")  # doctest: +SKIP
    """
    with _orbax_errors(f"the checkpoint {path} is damaged"):
        metadata = ocp.checkpointables_metadata(path.absolute()).custom_metadata
        arrays = ocp.load_checkpointables(path.absolute())["state"]
        checksums, about = metadata["checksums"], metadata["about"]
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
    for name in {*checksums, *arrays}:
        if name not in arrays or _checksum(arrays[name]) != checksums.get(name):
            raise CheckpointError(f"the checkpoint {path} is damaged: {name} is not what was written")
    return arrays, about


def _checksum(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape} {xxhash.xxh3_64_hexdigest(array.tobytes())}"


def delete_checkpoint(path: Path) -> None:
    """Remove a checkpoint; a half-removed one never stays under its name.

    Examples
    --------
    >>> delete_checkpoint(run / "checkpoints" / name)  # doctest: +SKIP
    """
    aside = path.with_name(f"{_DELETED}{path.name}")
    path.rename(aside)
    shutil.rmtree(aside)


def load_model(path: str | Path, precision: Precision | None = None) -> Predictor:
    """Load a checkpoint.

    Parameters
    ----------
    path
        A checkpoint folder, or a run folder (its best checkpoint is taken).
    precision
        How matrix products are computed; as in training if not given.

    Raises
    ------
    CheckpointError
        If there is no readable checkpoint.

    Examples
    --------
    >>> load_model("tb_logs/linear/default/version_0").card.labels[0]  # doctest: +SKIP
    'B cell'
    """
    path = resolve_checkpoint(Path(path), exact_score=lambda each: _read_card(each).scores.get("val_f1_macro", 0.0))
    card = _read_card(path)
    n_genes, n_types = len(card.gene_ids), len(card.labels)
    model = nnx.eval_shape(
        lambda: build_model(
            card.config,
            n_genes,
            n_types,
            nnx.Rngs(0),
            precision=precision or resolve_precision(card.config["precision"]),
        )
    )
    graphdef, params, stats = split_model(model)
    on_device = SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_device),
        {
            "params": params,
            "stats": stats,
            "reachability": jax.ShapeDtypeStruct((n_types, n_types), jnp.float32),
        },
    )
    with _orbax_errors(f"the checkpoint {path} is damaged"):
        arrays = ocp.load_checkpointables(path.absolute(), {"model": abstract})["model"]
    return Predictor(path, card, np.asarray(arrays["reachability"]), graphdef, arrays["params"], arrays["stats"])


def _read_card(path: Path) -> ModelCard:
    with _orbax_errors(f"{path} is not a readable checkpoint"):
        fields = ocp.checkpointables_metadata(path.absolute()).custom_metadata
    if not isinstance(fields, dict) or "format_version" not in fields:
        raise CheckpointError(f"{path} is not a checkpoint of hce_jax; name a *.ckpt folder or a version_N folder")
    if fields["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint {path} has format version {fields['format_version']}, this hce_jax reads up to "
            f"{FORMAT_VERSION}; install a newer one"
        )
    try:
        return _card_of(fields)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the card of the checkpoint {path} is damaged: {error}") from error


def _card_of(fields: dict[str, Any]) -> ModelCard:
    lists = {name: tuple(fields[name]) for name in ("gene_ids", "gene_names", "labels")}
    cl_ids = tuple(fields["cl_ids"]) if fields["cl_ids"] is not None else None
    return ModelCard(**{**fields, **lists, "cl_ids": cl_ids})
