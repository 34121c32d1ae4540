"""A trained model, ready for cells: probabilities, embeddings, explanations."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from flax import nnx

from hce_jax.errors import CheckpointError
from hce_jax.input import Expression, row_width, rows_in_steps
from hce_jax.models import MODELS
from hce_jax.ops.csr import csr_product
from hce_jax.store import SideFiles
from hce_jax.typing import Array, Float, Variables

#: Expression (n, g): what numpy can read as a matrix, or a scipy sparse matrix.
Cells: TypeAlias = Any

FORMAT_VERSION = 1


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


class Contrast(NamedTuple):
    """Why some cells are one type and not another; see :meth:`Predictor.contrast`.

    Attributes
    ----------
    log_odds
        Log of the mass of the one type over that of the other (n,), in nats.
    gradient
        Its derivative by the expression of each gene (n, g).
    importance
        Share of each gene in the importance of the cell's masks (n, g); None of a model without masks.
    """

    log_odds: Float[np.ndarray, "n"]
    gradient: Float[np.ndarray, "n g"]
    importance: Float[np.ndarray, "n g"] | None


class Prediction(NamedTuple):
    """What a model makes of n cells.

    Attributes
    ----------
    probabilities
        Of each type (n, c).
    embedding
        (n, h); None where there is none, of a linear model and of several models together.
    """

    probabilities: Float[np.ndarray, "n c"]
    embedding: Float[np.ndarray, "n h"] | None


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
        params: Variables,
        stats: Variables,
    ):
        self.path, self.card, self.reachability = path, card, reachability
        self.graphdef, self.params, self.stats = graphdef, params, stats
        self._apply = jax.jit(self._apply_to_batch, static_argnums=0)

    @property
    def model_type(self) -> str:
        """The kind of model: linear, mlp or tabnet."""
        return self.card.config["model_type"]

    @property
    def loss(self) -> str:
        """The loss it was trained with, for a person."""
        return "hierarchical cross entropy" if self.card.loss["use_hierarchical_loss"] else "cross entropy"

    @property
    def title(self) -> str:
        """Model and loss, for a person."""
        return f"{self.model_type}, {self.loss}"

    @property
    def side(self) -> SideFiles:
        """Genes, cell types and hierarchy, as those of a store."""
        card = self.card
        lists = (card.gene_ids, card.gene_names, card.labels, card.cl_ids)
        return SideFiles(self.path, *lists, reachability=self.reachability, about={})

    def predict_proba(self, x: Cells, batch_size: int = 2048) -> Float[np.ndarray, "n c"]:
        """Return the probability of each cell type for each cell, float32, rows summing to one.

        Examples
        --------
        >>> predictor.predict_proba(x).shape  # doctest: +SKIP
        (1000, 164)
        """
        if not (sp.issparse(x) and self.reads_sparse):
            return np.concatenate(list(self._in_batches(_probabilities, x, batch_size)))
        return np.concatenate([self._probabilities_of_csr(sp.csr_array(rows)) for rows in self._cut(x, batch_size)])

    def predict_block(self, cells: Expression) -> Float[np.ndarray, "n c"]:
        """Return the same for cells of a store or another source; several threads may ask at a time.

        Examples
        --------
        >>> predictor.predict_block(Expression(split.read_block(0))).shape  # doctest: +SKIP
        (512, 164)
        """
        if self.reads_sparse:
            return self._probabilities_of_csr(cells.x)
        return np.asarray(self._apply(_probabilities, self.params, self.stats, cells.dense))[: len(cells)]

    @cached_property
    def embedding_size(self) -> int | None:
        """The number of columns h of an embedding; None if the model has none."""
        _, model_class = MODELS[self.model_type]
        if not hasattr(model_class, "embed"):
            return None
        n_genes = len(self.card.gene_ids)
        embed = partial(self._apply_to_batch, _embedding, self.params, self.stats)
        return jax.eval_shape(embed, jax.ShapeDtypeStruct((1, row_width(n_genes)), np.float32)).shape[1]

    def predict_and_embed(self, cells: Expression) -> Prediction:
        """Return probabilities and embedding of some cells, computed together; several threads may ask at a time.

        Examples
        --------
        >>> predictor.predict_and_embed(Expression(split.read_block(0))).embedding.shape  # doctest: +SKIP
        (512, 128)
        """
        if self.embedding_size is None:
            return Prediction(self.predict_block(cells), None)
        variables = self.params, self.stats
        if self.reads_sparse:
            outputs = self._apply(_both_after_first_layer, *variables, self._first_layer_of_csr(cells.x))
        else:
            outputs = self._apply(_both, *variables, cells.dense)
        return Prediction(*(np.asarray(output)[: len(cells)] for output in outputs))

    @cached_property
    def reads_sparse(self) -> bool:
        """Whether only the expressed genes of a cell are read, and it is never made dense: on a CPU, in float32."""
        _, model_class = MODELS[self.model_type]
        on_cpu = jax.local_devices()[0].platform == "cpu"
        return on_cpu and hasattr(model_class, "after_first_layer") and self._model.first_layer.dtype == np.float32

    @property
    def _model(self) -> nnx.Module:
        return nnx.merge(self.graphdef, self.params, self.stats)

    @cached_property
    def _first_layer(self) -> tuple[np.ndarray, np.ndarray]:
        layer = self._model.first_layer
        return np.array(layer.kernel[...]), np.array(layer.bias[...])

    def _first_layer_of_csr(self, x: sp.csr_array) -> Float[np.ndarray, "b h"]:
        kernel, bias = self._first_layer
        h_bh = np.zeros((rows_in_steps(x.shape[0]), len(bias)), np.float32)
        h_bh[: x.shape[0]] = csr_product(x, kernel) + bias
        return h_bh

    def _probabilities_of_csr(self, x: sp.csr_array) -> Float[np.ndarray, "n c"]:
        h_bh = self._first_layer_of_csr(x)
        outputs = self._apply(_probabilities_after_first_layer, self.params, self.stats, h_bh)
        return np.asarray(outputs)[: x.shape[0]]

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
            jax.tree.map(lambda wide: sp.csr_array(wide[:, : len(self.card.gene_ids)]), importance_and_masks)
            for importance_and_masks in self._in_batches(_explanation, x, batch_size)
        ]
        importance, masks = zip(*sparse, strict=True)
        return Explanation(sp.vstack(importance, "csr"), [sp.vstack(step, "csr") for step in zip(*masks, strict=True)])

    def contrast(
        self, x: Cells, types_nc: Float[np.ndarray, "n c"], rivals_nc: Float[np.ndarray, "n c"], batch_size: int = 256
    ) -> Iterator[Contrast]:
        r"""Yield, one batch of cells after the other, the log-odds of one type against another, and their gradient.

        With the logits z of a cell, the types K that belong to the one and those, L, that belong to the other,

        .. math:: S = \log \sum_{j \in K} e^{z_j} - \log \sum_{j \in L} e^{z_j}

        Where K and L are one type each, the gradient of a linear model is the difference of their weights. Of TabNet it
        is that with the cell's masks held as they are: of the genes that no mask lets through it is zero.

        Parameters
        ----------
        x
            Expression of the cells.
        types_nc, rivals_nc
            For each cell 1 for the types of K, of L, and 0 for the others.
        batch_size
            Cells at a time.

        Examples
        --------
        >>> t_cell, b_cell = predictor.reachability[[4, 7]]  # doctest: +SKIP
        >>> next(predictor.contrast(x[:1], t_cell[None], b_cell[None])).gradient.argmax()  # doctest: +SKIP
        """
        n_genes = len(self.card.gene_ids)
        for log_odds, *wide in self._in_batches(_contrast, x, batch_size, types_nc, rivals_nc):
            yield Contrast(log_odds, *jax.tree.map(lambda each: each[:, :n_genes], wide))

    def _require(self, method: str, what: str) -> None:
        _, model_class = MODELS[self.model_type]
        if not hasattr(model_class, method):
            raise CheckpointError(f"{self.path} is a {self.model_type} model, which has no {what}")

    def _in_batches(self, function: Callable[..., Any], x: Cells, batch_size: int, *more: np.ndarray) -> Iterator[Any]:
        """Apply a function of the model, a batch (b, w) and the same rows of more; yield what it gives for real rows.

        It is given, and gives, any tree of arrays whose first axis is that of the cells; numpy arrays are yielded.
        """
        width = row_width(len(self.card.gene_ids))
        for number, rows in enumerate(self._cut(x, batch_size)):
            dense = rows if isinstance(rows, np.ndarray) else rows.toarray()
            start = number * batch_size
            padded = [_padded(each[start : start + len(dense)], batch_size, each.shape[1]) for each in more]
            outputs = self._apply(function, self.params, self.stats, _padded(dense, batch_size, width), *padded)
            yield jax.tree.map(lambda output: np.asarray(output)[: len(dense)], outputs)  # noqa: B023 (used at once)

    def _cut(self, x: Cells, batch_size: int) -> Iterator[Cells]:
        """Cut cells into batches, after a check; without any cell, one batch without any."""
        if batch_size < 1:
            raise CheckpointError(f"batch_size is {batch_size}; it must be 1 or more")
        n_genes = len(self.card.gene_ids)
        x = x.tocsr() if sp.issparse(x) else np.asarray(x)
        if x.ndim != 2 or x.shape[1] != n_genes:
            raise CheckpointError(
                f"x has shape {tuple(x.shape)}, but the model {self.path.name} expects (cells, {n_genes} genes)"
            )
        return (x[start : start + batch_size] for start in range(0, max(x.shape[0], 1), batch_size))

    def _apply_to_batch(
        self, function: Callable[..., Any], params: Variables, stats: Variables, x_bw: Array, *more: Array
    ) -> Any:
        return function(nnx.merge(self.graphdef, params, stats), x_bw, *more)

    def check_store(self, side: SideFiles) -> None:
        """Check that a store has this model's genes and labels, in the same order.

        Raises
        ------
        CheckpointError
            If it has not, naming the first difference.
        """
        remedy = "evaluate it on the store it was trained on, or one made with the same lists"
        self._check_lists(f"the store {side.path}", side.gene_ids, side.labels, remedy)

    def check_alike(self, other: "Predictor", remedy: str) -> None:
        """Check that another model has the same genes and labels, so that both can be asked about the same cells.

        Parameters
        ----------
        other
            The other model.
        remedy
            What the message says a person can do.

        Raises
        ------
        CheckpointError
            If it has not, naming the first difference.
        """
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
            self.predictors[0].check_alike(other, "the members of an ensemble are trained on the same store")
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
        losses = sorted({predictor.loss for predictor in self.predictors}, reverse=True)
        kinds = sorted({predictor.model_type for predictor in self.predictors})
        count = f"{len(self.predictors)} x " if len(self.predictors) > 1 else ""
        what = f"{count}{kinds[0]}" if len(kinds) == 1 else f"ensemble of {' and '.join(kinds)}"
        return f"{what}, {' and '.join(losses)}"

    def predict_proba(self, x: Cells, batch_size: int = 2048) -> Float[np.ndarray, "n c"]:
        """Return the mean of the members' probabilities; arguments as of :meth:`Predictor.predict_proba`."""
        return np.mean([predictor.predict_proba(x, batch_size) for predictor in self.predictors], axis=0)

    @property
    def side(self) -> SideFiles:
        """Genes, cell types and hierarchy of the first member, as those of a store."""
        return self.predictors[0].side

    def predict_block(self, cells: Expression) -> Float[np.ndarray, "n c"]:
        """Return the mean of the members' probabilities; see :meth:`Predictor.predict_block`."""
        members = [predictor.predict_block(cells) for predictor in self.predictors]
        return members[0] if len(members) == 1 else np.mean(members, axis=0)

    @property
    def embedding_size(self) -> int | None:
        """The lone member's :attr:`Predictor.embedding_size`; None of several, which have no embedding in common."""
        return self.predictors[0].embedding_size if len(self.predictors) == 1 else None

    def predict_and_embed(self, cells: Expression) -> Prediction:
        """Return the mean of the members' probabilities, and a lone member's embedding."""
        if len(self.predictors) == 1:
            return self.predictors[0].predict_and_embed(cells)
        return Prediction(self.predict_block(cells), None)

    @property
    def reads_sparse(self) -> bool:
        """Whether no member makes cells dense."""
        return all(predictor.reads_sparse for predictor in self.predictors)


def _padded(rows: np.ndarray, n_rows: int, width: int) -> Float[np.ndarray, "b w"]:
    """Put rows into a matrix of zeros: batches of one shape are compiled once."""
    padded = np.zeros((n_rows, width), np.float32)
    padded[: rows.shape[0], : rows.shape[1]] = rows
    return padded


def _probabilities(model: nnx.Module, x_bw: Array) -> Float[Array, "b c"]:
    return jax.nn.softmax(model(x_bw)[0])


def _embedding(model: nnx.Module, x_bw: Array) -> Float[Array, "b h"]:
    return model.embed(x_bw)


def _explanation(model: nnx.Module, x_bw: Array) -> tuple[Float[Array, "b w"], list[Float[Array, "b w"]]]:
    return model.explain(x_bw)


def _contrast(
    model: nnx.Module, x_bw: Array, types_bc: Array, rivals_bc: Array
) -> tuple[Float[Array, "b"], Float[Array, "b w"], Float[Array, "b w"] | None]:
    importance_bw, logits = None, lambda x_bw: model(x_bw)[0]
    if hasattr(model, "explain"):
        importance_bw, masks = model.explain(x_bw)
        importance_bw /= jnp.maximum(importance_bw.sum(axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        logits = partial(model.read, masks=masks)

    def log_odds(x_bw: Array) -> Float[Array, "b"]:
        logits_bc = logits(x_bw)
        # A large negative number for minus infinity, which would make the gradients of rows without types NaN.
        types_b, rivals_b = (
            jax.nn.logsumexp(jnp.where(which_bc > 0, logits_bc, -1e30), axis=1) for which_bc in (types_bc, rivals_bc)
        )
        return types_b - rivals_b

    log_odds_b, gradient = jax.vjp(log_odds, x_bw)
    return log_odds_b, gradient(jnp.ones_like(log_odds_b))[0], importance_bw


def _probabilities_after_first_layer(model: nnx.Module, h_bh: Float[Array, "b h"]) -> Float[Array, "b c"]:
    return jax.nn.softmax(model.after_first_layer(h_bh)[0])


def _both(model: nnx.Module, x_bw: Array) -> tuple[Float[Array, "b c"], Float[Array, "b h"]]:
    embedding_bh = model.embed(x_bw)
    return jax.nn.softmax(model.classify(embedding_bh)), embedding_bh


def _both_after_first_layer(
    model: nnx.Module, first_bh: Float[Array, "b f"]
) -> tuple[Float[Array, "b c"], Float[Array, "b h"]]:
    embedding_bh = model.embed_after_first_layer(first_bh)
    return jax.nn.softmax(model.classify(embedding_bh)), embedding_bh
