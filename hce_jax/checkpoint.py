"""Self-contained checkpoints: a trained model with all that inference needs. The only module that knows Orbax."""

import dataclasses
import gc
import itertools
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
import xxhash
from flax import nnx
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from hce_jax.errors import CheckpointError
from hce_jax.input import CellBatch, densify
from hce_jax.models import MODELS, build_model
from hce_jax.runs import resolve_checkpoint
from hce_jax.store import SideFiles
from hce_jax.typing import Array, Float, Precision, resolve_precision

#: Expression (n, g): what numpy can read as a matrix, or a scipy sparse matrix.
Cells: TypeAlias = Any

FORMAT_VERSION = 1
#: What the user can do something about, in the long text of a library.
_CAUSES = ("No space left on device", "Disk quota exceeded", "Permission denied", "Read-only file system")
#: Names of states that are being replaced, and of checkpoints that are being deleted.
_NEW, _REPLACED, _DELETED = ".new", ".replaced", ".deleted-"
NORMALISATION = "sf-log1p: counts scaled to 10,000 a cell over these genes, then ln(1 + x)"


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What a checkpoint says about its model, beside the weights; stored as JSON.

    Attributes
    ----------
    config
        ``model_type``, the model's hyper-parameters, and the precision of training.
    gene_ids, gene_names
        The genes of the input, in order.
    labels, cl_ids
        The cell types of the output, in order; ids are None where the store had none.
    ontology_release
        Release of the Cell Ontology behind the reachability matrix; None where the store does not tell.
    normalisation
        The input's normalisation.
    loss
        ``use_hierarchical_loss`` and ``epsilon``, so that a validation loss can be computed again.
    data_path
        The store it was trained on.
    epoch, step
        Training epochs (from 0) and steps behind the weights.
    scores
        Validation loss and F1 at that moment.
    format_version
        Version of this layout.
    """

    config: dict[str, Any]
    gene_ids: tuple[str, ...]
    gene_names: tuple[str, ...]
    labels: tuple[str, ...]
    cl_ids: tuple[str, ...] | None
    ontology_release: str | None
    normalisation: str
    loss: dict[str, Any]
    data_path: str
    epoch: int
    step: int
    scores: dict[str, float]
    format_version: int = FORMAT_VERSION


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


def save_model(path: Path, card: ModelCard, reachability: np.ndarray, params: nnx.State, stats: nnx.State) -> None:
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
        "params": nnx.to_pure_dict(params),
        "stats": nnx.to_pure_dict(stats),
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


class Explanation(NamedTuple):
    """Which genes a model looked at, for each cell; sparse, since a trained mask leaves about 1 % of the genes.

    Attributes
    ----------
    importance
        Importance of each gene (n, g), CSR: the sum over the decision steps of mask times the step's summed output.
    masks
        The mask of each decision step (n, g), CSR; each row sums to one.
    """

    importance: sp.csr_array
    masks: list[sp.csr_array]

    def normalised(self) -> sp.csr_array:
        """Return the importance with rows that sum to one; a row without importance stays zero."""
        totals = self.importance.sum(axis=1)
        return sp.diags_array(1 / np.where(totals > 0, totals, 1)).tocsr() @ self.importance

    def gene_indices(self) -> list[np.ndarray]:
        """Return, for each cell, the positions of the genes with an importance above zero."""
        bounds = itertools.pairwise(self.importance.indptr)
        return [self.importance.indices[start:end] for start, end in bounds]


class Predictor:
    """A trained model, ready for cells.

    The methods take expression x (n, g), sf-log1p, in the model's gene order, dense (whatever numpy can read) or
    sparse (best CSR), and compute ``batch_size`` cells at a time: it bounds the memory, not the result. They raise
    ``CheckpointError`` if x has another number of genes than the model, or the model cannot do what is asked.

    Attributes
    ----------
    path
        The checkpoint.
    card
        What it says: genes, labels, ontology, scores.
    reachability
        R (c, c) float32.
    graphdef, params, stats
        The model's structure and variables.

    Examples
    --------
    >>> predictor = load_model("tb_logs/linear/default/version_0")  # doctest: +SKIP
    >>> predictor.predict_proba(x).argmax(axis=1)  # doctest: +SKIP
    """

    def __init__(
        self,
        path: Path,
        card: ModelCard,
        reachability: np.ndarray,
        graphdef: nnx.GraphDef,
        params: nnx.State,
        stats: nnx.State,
    ):
        self.path, self.card, self.reachability = path, card, reachability
        self.graphdef, self.params, self.stats = graphdef, params, stats
        self._apply = jax.jit(self._apply_to_batch, static_argnums=0)

    @property
    def model_type(self) -> str:
        """The kind of model: linear, mlp or tabnet."""
        return self.card.config["model_type"]

    def predict_proba(self, x: Cells, batch_size: int = 2048) -> Float[np.ndarray, "n c"]:
        """Return the probability of each cell type for each cell, float32, rows summing to one.

        Examples
        --------
        >>> predictor.predict_proba(x).shape  # doctest: +SKIP
        (1000, 164)
        """
        return np.concatenate(list(self._in_batches(_probabilities, x, batch_size)))

    def embed(self, x: Cells, batch_size: int = 2048) -> Float[np.ndarray, "n h"]:
        """Return the embedding of each cell: MLP, the last hidden layer; TabNet, the sum of the steps' outputs.

        Examples
        --------
        >>> predictor.embed(x).shape  # doctest: +SKIP
        (1000, 128)
        """
        self._require("embed", "embedding: MLP and TabNet have one")
        return np.concatenate(list(self._in_batches(_embedding, x, batch_size)))

    def explain(self, x: Cells, batch_size: int = 2048) -> Explanation:
        """Return the importance of the genes for each cell, and the masks of the decision steps (TabNet).

        Examples
        --------
        >>> explanation = predictor.explain(x)  # doctest: +SKIP
        >>> [predictor.card.gene_names[i] for i in explanation.gene_indices()[0]]  # doctest: +SKIP
        """
        self._require("explain", "masks: TabNet has them")
        sparse = [
            jax.tree.map(sp.csr_array, importance_and_masks)
            for importance_and_masks in self._in_batches(_explanation, x, batch_size)
        ]
        importance, masks = zip(*sparse, strict=True)
        return Explanation(sp.vstack(importance, "csr"), [sp.vstack(step, "csr") for step in zip(*masks, strict=True)])

    def _require(self, method: str, what: str) -> None:
        _, model_class = MODELS[self.model_type]
        if not hasattr(model_class, method):
            raise CheckpointError(f"{self.path} is a {self.model_type} model, which has no {what}")

    def _in_batches(self, function: Callable[[nnx.Module, Array], Any], x: Cells, batch_size: int) -> Iterator[Any]:
        """Apply a function of the model and a batch (b, g); yield what it gives for the real rows, as numpy arrays."""
        if batch_size < 1:
            raise CheckpointError(f"batch_size is {batch_size}; it must be 1 or more")
        n_genes = len(self.card.gene_ids)
        x = x.tocsr() if sp.issparse(x) else np.asarray(x)
        if x.ndim != 2 or x.shape[1] != n_genes:
            raise CheckpointError(
                f"x has shape {tuple(x.shape)}, but the model {self.path.name} expects (cells, {n_genes} genes)"
            )
        for start in range(0, max(x.shape[0], 1), batch_size):  # no cells: one batch, of which no row is real
            rows = x[start : start + batch_size]
            dense = rows if isinstance(rows, np.ndarray) else rows.toarray()
            padded = np.zeros((batch_size, n_genes), np.float32)  # one shape, one compilation
            padded[: len(dense)] = dense
            outputs = self._apply(function, self.params, self.stats, padded)
            yield jax.tree.map(lambda output: np.asarray(output)[: len(dense)], outputs)  # noqa: B023 (used at once)

    def _apply_to_batch(
        self, function: Callable[[nnx.Module, Array], Any], params: nnx.State, stats: nnx.State, x_bg: Array
    ) -> Any:
        return function(nnx.merge(self.graphdef, params, stats), x_bg)

    def probabilities(self, x_bg: Float[Array, "b g"]) -> Float[Array, "b c"]:
        """Return the probabilities of a batch that is on the device, as :meth:`predict_proba`.

        Examples
        --------
        >>> predictor.probabilities(densify(batch)).shape  # doctest: +SKIP
        (2048, 164)
        """
        return self._apply(_probabilities, self.params, self.stats, x_bg)

    def check_store(self, side: SideFiles) -> None:
        """Check that a store has this model's genes and labels, in the same order.

        Raises
        ------
        CheckpointError
            If it has not, naming the first difference.
        """
        remedy = "evaluate it on the store it was trained on, or one made with the same lists"
        self._check_lists(f"the store {side.path}", side.gene_ids, side.labels, remedy)

    def check_member(self, other: "Predictor") -> None:
        """Check that another model has the same genes and labels, so that their probabilities can be averaged.

        Raises
        ------
        CheckpointError
            If it has not, naming the first difference.
        """
        remedy = "the members of an ensemble are trained on the same store"
        self._check_lists(f"the checkpoint {other.path}", other.card.gene_ids, other.card.labels, remedy)

    def _check_lists(self, where: str, gene_ids: tuple[str, ...], labels: tuple[str, ...], remedy: str) -> None:
        for what, ours, theirs in (("gene", self.card.gene_ids, gene_ids), ("cell type", self.card.labels, labels)):
            if ours == theirs:
                continue
            if len(ours) != len(theirs):
                raise CheckpointError(
                    f"the checkpoint {self.path} has {len(ours)} {what}s, {where} has {len(theirs)}; {remedy}"
                )
            at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            raise CheckpointError(
                f"the checkpoint {self.path} and {where} list other {what}s: "
                f"number {at} is {ours[at]!r} in the one and {theirs[at]!r} in the other; {remedy}"
            )


class Ensemble:
    """Several models that are asked together: the mean of their probabilities (one model: its own).

    Parameters
    ----------
    predictors
        The members, of the same genes and labels.

    Raises
    ------
    CheckpointError
        If they have others, naming the first difference.

    Examples
    --------
    >>> ensemble = Ensemble([load_model(f"tb_logs/tabnet/default/version_{k}") for k in range(5)])  # doctest: +SKIP
    >>> ensemble.predict_proba(x).shape  # doctest: +SKIP
    (1000, 164)
    """

    def __init__(self, predictors: Sequence[Predictor]):
        self.predictors = list(predictors)
        for number, other in enumerate(self.predictors[1:], 1):
            self.predictors[0].check_member(other)
            if other.path.resolve() in [each.path.resolve() for each in self.predictors[:number]]:
                raise CheckpointError(f"the checkpoint {other.path} is named twice; the members of an ensemble differ")

    @property
    def card(self) -> ModelCard:
        """The first member's card; genes and labels are those of all."""
        return self.predictors[0].card

    @property
    def reachability(self) -> np.ndarray:
        """R (c, c), the first member's."""
        return self.predictors[0].reachability

    @property
    def model_type(self) -> str:
        """The members' kind; "ensemble" if they differ."""
        kinds = {predictor.model_type for predictor in self.predictors}
        return kinds.pop() if len(kinds) == 1 else "ensemble"

    @property
    def title(self) -> str:
        """Models and losses, for a person."""
        losses = {predictor.card.loss["use_hierarchical_loss"] for predictor in self.predictors}
        names = [
            name for hce, name in ((True, "hierarchical cross entropy"), (False, "cross entropy")) if hce in losses
        ]
        count = f"{len(self.predictors)} x " if len(self.predictors) > 1 else ""
        return f"{count}{self.model_type}, {' and '.join(names)}"

    def predict_proba(self, x: Cells, batch_size: int = 2048) -> Float[np.ndarray, "n c"]:
        """Return the mean of the members' probabilities; arguments as of :meth:`Predictor.predict_proba`."""
        return np.mean([predictor.predict_proba(x, batch_size) for predictor in self.predictors], axis=0)

    def predict_batch(self, batch: CellBatch) -> Float[np.ndarray, "n c"]:
        """Return the mean of the members' probabilities for the real cells of a batch of the input pipeline."""
        x_bg = _densify(batch)
        mean = np.mean([np.asarray(predictor.probabilities(x_bg)) for predictor in self.predictors], axis=0)
        return mean[np.asarray(batch.real)]


_densify = jax.jit(densify)


def _probabilities(model: nnx.Module, x_bg: Array) -> Float[Array, "b c"]:
    return jax.nn.softmax(model(x_bg)[0])


def _embedding(model: nnx.Module, x_bg: Array) -> Float[Array, "b h"]:
    return model.embed(x_bg)


def _explanation(model: nnx.Module, x_bg: Array) -> tuple[Float[Array, "b g"], list[Float[Array, "b g"]]]:
    return model.explain(x_bg)


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
    path = resolve_checkpoint(Path(path), exact_score=lambda each: _read_card(each).scores["val_f1_macro"])
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
    graphdef, params, stats = nnx.split(model, nnx.Param, ...)
    on_device = SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_device),
        {
            "params": nnx.to_pure_dict(params),
            "stats": nnx.to_pure_dict(stats),
            "reachability": jax.ShapeDtypeStruct((n_types, n_types), jnp.float32),
        },
    )
    with _orbax_errors(f"the checkpoint {path} is damaged"):
        arrays = ocp.load_checkpointables(path.absolute(), {"model": abstract})["model"]
    nnx.replace_by_pure_dict(params, arrays["params"])
    nnx.replace_by_pure_dict(stats, arrays["stats"])
    return Predictor(path, card, np.asarray(arrays["reachability"]), graphdef, params, stats)


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
