"""Self-contained checkpoints: a trained model with all that inference needs. The only module that knows Orbax."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from flax import nnx
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from hce_jax.errors import CheckpointError
from hce_jax.models import build_model
from hce_jax.runs import resolve_checkpoint
from hce_jax.store import SideFiles
from hce_jax.typing import Array, Float, Precision, resolve_precision

FORMAT_VERSION = 1
NORMALISATION = "sf-log1p: counts scaled to 10,000 a cell over these genes, then ln(1 + x)"


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What a checkpoint says about its model, beside the weights; stored as JSON.

    Attributes
    ----------
    config
        ``model_type`` and the model's hyper-parameters.
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
    try:
        ocp.save_checkpointables(path.absolute(), {"model": arrays}, custom_metadata=dataclasses.asdict(card))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {path} could not be written: {error}") from error


def delete_checkpoint(path: Path) -> None:
    """Remove a checkpoint; a half-removed one never stays under its name.

    Examples
    --------
    >>> delete_checkpoint(run / "checkpoints" / name)  # doctest: +SKIP
    """
    aside = path.with_name(f".deleted-{path.name}")
    path.rename(aside)
    shutil.rmtree(aside)


class Predictor:
    """A trained model, ready for cells.

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
        self._probabilities = jax.jit(self._softmax)

    @property
    def model_type(self) -> str:
        """The kind of model: linear, mlp or tabnet."""
        return self.card.config["model_type"]

    def _softmax(self, params: nnx.State, stats: nnx.State, x_bg: Float[Array, "b g"]) -> Float[Array, "b c"]:
        logits_bc, _ = nnx.merge(self.graphdef, params, stats)(x_bg)
        return jax.nn.softmax(logits_bc)

    def predict_proba(
        self, x: np.ndarray | sp.csr_array | sp.csr_matrix, batch_size: int = 2048
    ) -> Float[np.ndarray, "n c"]:
        """Return the probability of each cell type for each cell.

        Parameters
        ----------
        x
            Expression (n, g), sf-log1p, in the model's gene order; dense or CSR.
        batch_size
            Cells computed at a time: it bounds the memory, not the result.

        Returns
        -------
        float32 array (n, c), rows summing to one.

        Raises
        ------
        CheckpointError
            If x has another number of genes than the model.

        Examples
        --------
        >>> predictor.predict_proba(x).shape  # doctest: +SKIP
        (1000, 164)
        """
        n_genes = len(self.card.gene_ids)
        if x.ndim != 2 or x.shape[1] != n_genes:
            raise CheckpointError(
                f"x has shape {tuple(x.shape)}, but the model {self.path.name} expects (cells, {n_genes} genes)"
            )
        parts = [
            self._predict_rows(x[start : start + batch_size], batch_size) for start in range(0, x.shape[0], batch_size)
        ]
        return np.concatenate(parts) if parts else np.empty((0, len(self.card.labels)), np.float32)

    def _predict_rows(self, rows: Any, batch_size: int) -> np.ndarray:
        dense = rows.toarray() if sp.issparse(rows) else np.asarray(rows)
        padded = np.zeros((batch_size, dense.shape[1]), np.float32)  # one shape, one compilation
        padded[: len(dense)] = dense
        return np.asarray(self._probabilities(self.params, self.stats, padded))[: len(dense)]

    def check_store(self, side: SideFiles) -> None:
        """Check that a store has this model's genes and labels, in the same order.

        Raises
        ------
        CheckpointError
            If it has not, naming the first difference.
        """
        for what, ours, theirs in (
            ("gene", self.card.gene_ids, side.gene_ids),
            ("cell type", self.card.labels, side.labels),
        ):
            if ours == theirs:
                continue
            remedy = "evaluate it on the store it was trained on, or one made with the same lists"
            if len(ours) != len(theirs):
                raise CheckpointError(
                    f"the checkpoint {self.path} has {len(ours)} {what}s, "
                    f"the store {side.path} has {len(theirs)}; {remedy}"
                )
            at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            raise CheckpointError(
                f"the checkpoint {self.path} and the store {side.path} list other {what}s: "
                f"number {at} is {ours[at]!r} in the one and {theirs[at]!r} in the other; {remedy}"
            )


def load_model(path: str | Path, precision: Precision | None = None) -> Predictor:
    """Load a checkpoint.

    Parameters
    ----------
    path
        A checkpoint folder, or a run folder (its best checkpoint is taken).
    precision
        How matrix products are computed; float32 on a CPU and TF32 on an accelerator if not given.

    Raises
    ------
    CheckpointError
        If there is no readable checkpoint.

    Examples
    --------
    >>> load_model("tb_logs/linear/default/version_0").card.labels[0]  # doctest: +SKIP
    'B cell'
    """
    path = resolve_checkpoint(Path(path))
    card = _read_card(path)
    n_genes, n_types = len(card.gene_ids), len(card.labels)
    model = nnx.eval_shape(
        lambda: build_model(
            card.config, n_genes, n_types, nnx.Rngs(0), precision=precision or resolve_precision("auto")
        )
    )
    graphdef, params, stats = nnx.split(model, nnx.Param, ...)
    on_device = SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_device),
        {
            "params": nnx.to_pure_dict(params),
            "stats": nnx.to_pure_dict(stats),
            "reachability": jax.ShapeDtypeStruct((n_types, n_types), jnp.float32),
        },
    )
    try:
        arrays = ocp.load_checkpointables(path.absolute(), {"model": abstract})["model"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {str(error).splitlines()[0]}") from error
    nnx.replace_by_pure_dict(params, arrays["params"])
    nnx.replace_by_pure_dict(stats, arrays["stats"])
    return Predictor(path, card, np.asarray(arrays["reachability"]), graphdef, params, stats)


def _read_card(path: Path) -> ModelCard:
    try:
        fields = ocp.checkpointables_metadata(path.absolute()).custom_metadata
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(fields, dict) or "format_version" not in fields:
        raise CheckpointError(f"{path} is not a checkpoint of hce_jax; name a *.ckpt folder or a version_N folder")
    if fields["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint {path} has format version {fields['format_version']}, this hce_jax reads up to "
            f"{FORMAT_VERSION}; install a newer one"
        )
    lists = {name: tuple(fields[name]) for name in ("gene_ids", "gene_names", "labels")}
    cl_ids = tuple(fields["cl_ids"]) if fields["cl_ids"] is not None else None
    return ModelCard(**{**fields, **lists, "cl_ids": cl_ids})
