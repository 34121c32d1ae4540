"""Why this label and not its rival: for each label that was given, the genes that speak for it and against it."""

from collections.abc import Iterator, Sequence
from functools import reduce

import numpy as np
import pandas as pd
import scipy.sparse as sp

from hce_jax.annotate.labels import NO_TERM
from hce_jax.evaluation.decoders import UNASSIGNED
from hce_jax.hierarchy import depths, siblings
from hce_jax.predictor import Predictor
from hce_jax.typing import Float, Int

#: Genes in a sentence, and genes of a table that speak against a label.
_GENES_OF_A_SENTENCE, _GENES_AGAINST = 5, 3
#: Cells at a time: 20 MB for each dense array of an atlas's genes.
_BATCH = 256
#: Columns of the table that say which label and which gene; those of numbers follow.
_COLUMNS = (
    "label", "label_ontology_term_id", "rival", "rival_ontology_term_id", "cells", "rank", "gene_id", "gene_name"
)  # fmt: skip


def sample_rows(codes: Int[np.ndarray, " n"], per_label: int = 100) -> Int[np.ndarray, " m"]:
    """Choose some cells of each label, evenly spread over those that have it.

    Parameters
    ----------
    codes
        Label of each cell, -1 for none; cells without one are not chosen.
    per_label
        The most cells of a label.

    Returns
    -------
    Rows of the chosen cells, ascending.

    Examples
    --------
    >>> sample_rows(np.array([0, 0, 0, -1, 0, 1]), per_label=2).tolist()
    [0, 4, 5]
    """
    chosen = [np.zeros(0, np.int64)]
    for code in np.unique(codes[codes != UNASSIGNED]):
        rows = np.flatnonzero(codes == code)
        chosen.append(rows[np.linspace(0, len(rows) - 1, min(per_label, len(rows))).round().astype(np.int64)])
    return np.sort(np.concatenate(chosen))


def contrast_table(
    predictor: Predictor,
    x: sp.csr_array,
    codes: Int[np.ndarray, " n"],
    n_genes_shown: int = 10,
    cl_ids: Sequence[str] | None = None,
) -> pd.DataFrame:
    r"""Say, for each label that was given, which genes speak for it and not for its rival.

    The rival of a type k is the sibling with the largest mean probability in the label's cells, its descendants
    included. Where k has no sibling, it is chosen among all types that are neither above nor below k, so that a root's
    is another root; where there are none of these either, nothing is said of the label. With K the types of k's
    subtree and L those of its rival's, both without what they share, and logits z of a cell, a gene contributes

    .. math:: (x_g - \bar x_g) \, \partial S / \partial x_g, \qquad
              S = \log \sum_{j \in K} e^{z_j} - \log \sum_{j \in L} e^{z_j}

    to the log-odds S of label against rival, in nats (:meth:`hce_jax.predictor.Predictor.contrast`): its weight times
    how much more it is expressed than elsewhere. Elsewhere, :math:`\bar x`, is the mean of the other labels' means, of
    those that are neither above nor below k; without any, zero. Without it the genes that every cell expresses most
    would seem to matter most. A gene also speaks for a label by what is missing of it: the B cells' CD3D.

    Parameters
    ----------
    predictor
        The model that gave the labels.
    x
        Expression (n, g) of some labelled cells, see :func:`sample_rows`: sf-log1p, in the model's gene order.
    codes
        The label of each, any type; -1 for none: such a cell is left out.
    n_genes_shown
        The most genes that speak for a label. Of those that speak against it there are three at most.
    cl_ids
        Cell Ontology ids of all types; None: those that the model knows.

    Returns
    -------
    One row per label and gene, labels by code: ``label``, ``rival`` and the ids of both, ``cells`` (those that the
    means are over), ``rank`` (1 for the gene that speaks most for the label, 2, ...; -1 for the one that speaks most
    against it, -2, ...), ``gene_id``, ``gene_name``, ``contribution`` (mean over the cells), ``expression`` (mean of
    x), ``elsewhere`` and, if the model has masks, ``mask`` (mean share of the gene in the importance of a cell's
    masks).

    Raises
    ------
    CheckpointError
        If x has not the model's number of genes.

    Examples
    --------
    >>> rows = sample_rows(codes)  # doctest: +SKIP
    >>> contrast_table(predictor, x[rows], codes[rows])  # doctest: +SKIP
    """
    x, codes = sp.csr_array(x)[codes != UNASSIGNED], codes[codes != UNASSIGNED]
    given_k, label_n, cells_k = np.unique(codes, return_inverse=True, return_counts=True)
    entries = (1 / cells_k[label_n]).astype(np.float32), (label_n, np.arange(len(codes)))
    mean_kn = sp.csc_array(entries, shape=(len(given_k), len(codes)))  # times values of cells: the means of labels
    rivals_k = _rivals(predictor.reachability, given_k, mean_kn @ predictor.predict_proba(x, _BATCH))
    values = _values_of_genes(predictor, x, mean_kn, given_k, rivals_k)

    card = predictor.card
    cl_ids = cl_ids or card.cl_ids or (NO_TERM,) * len(card.labels)
    rows: list[tuple] = []
    for k, (code, rival) in enumerate(zip(given_k, rivals_k, strict=True)):
        about = card.labels[code], cl_ids[code], card.labels[rival], cl_ids[rival], cells_k[k]
        ranked = _ranked(values["contribution"][k], n_genes_shown) if rival != UNASSIGNED else ()
        for rank, gene in ranked:
            of_gene = rank, card.gene_ids[gene], card.gene_names[gene]
            rows.append((*about, *of_gene, *(value_kg[k, gene] for value_kg in values.values())))
    return pd.DataFrame(rows, columns=[*_COLUMNS, *values])


def sentences(table: pd.DataFrame) -> list[str]:
    """Say in words, for each label of a table, which genes speak most for it and not for its rival.

    Parameters
    ----------
    table
        As :func:`contrast_table` returns it.

    Returns
    -------
    One for each label: first the genes that it has more of than there is elsewhere, then those that it has little of.

    Examples
    --------
    >>> genes = {"gene_name": ["CD79A", "CD3D", "CD74"], "expression": [2.0, 0.1, 3.0], "elsewhere": [0.1, 1.0, 2.0]}
    >>> sentences(pd.DataFrame({"label": "B cell", "rival": "T cell", "rank": [1, 2, 3], **genes}))
    ['B cell and not T cell: CD79A, CD74; little CD3D']
    """
    said = []
    for (label, rival), of_label in table.groupby(["label", "rival"], sort=False):
        speak_for = of_label[of_label["rank"] > 0]
        more = speak_for["expression"] > speak_for["elsewhere"]
        much, little = (", ".join(speak_for["gene_name"][which][:_GENES_OF_A_SENTENCE]) for which in (more, ~more))
        reasons = [*([much] if much else []), *([f"little {little}"] if little else [])]
        said.append(f"{label} and not {rival}: {'; '.join(reasons) or 'no single gene'}")
    return said


def _values_of_genes(
    predictor: Predictor, x: sp.csr_array, mean_kn: sp.csc_array, given_k: np.ndarray, rivals_k: np.ndarray
) -> dict[str, Float[np.ndarray, "k g"]]:
    """Return the numbers of the table for all genes; of a label without a rival they mean nothing."""
    reachability = predictor.reachability
    sums = _means_in_parts(predictor, x, mean_kn, reachability[given_k], reachability[rivals_k])
    gradient_kg, gradient_times_x_kg, *mask = reduce(lambda one, other: list(map(np.add, one, other)), sums)
    expression_kg = (mean_kn @ x).toarray()
    unrelated_kk = ((reachability + reachability.T) == 0)[np.ix_(given_k, given_k)]
    elsewhere_kg = unrelated_kk @ expression_kg / np.maximum(unrelated_kk.sum(axis=1, keepdims=True), 1)
    contribution_kg = gradient_times_x_kg - gradient_kg * elsewhere_kg
    values = {"contribution": contribution_kg, "expression": expression_kg, "elsewhere": elsewhere_kg}
    values |= dict(zip(["mask"], mask, strict=False))
    return {name: value_kg.astype(np.float32) for name, value_kg in values.items()}


def _means_in_parts(
    predictor: Predictor, x: sp.csr_array, mean_kn: sp.csc_array, types_kc: np.ndarray, rivals_kc: np.ndarray
) -> Iterator[list[Float[np.ndarray, "k g"]]]:
    """Yield what a batch of cells after the other adds to the means of gradient, gradient times x, and mask."""
    shared_kc, label_n = types_kc * rivals_kc, mean_kn.indices
    start = 0
    for batch in predictor.contrast(x, (types_kc - shared_kc)[label_n], (rivals_kc - shared_kc)[label_n], _BATCH):
        rows = slice(start, start + len(batch.log_odds))
        of_cells = [batch.gradient, batch.gradient * x[rows].toarray()]
        mask = [] if batch.importance is None else [batch.importance]
        yield [mean_kn[:, rows] @ each for each in (*of_cells, *mask)]
        start = rows.stop


def _rivals(
    reachability: Float[np.ndarray, "c d"], given_k: Int[np.ndarray, " k"], p_kc: Float[np.ndarray, "k c"]
) -> Int[np.ndarray, " k"]:
    """Return the rival of each label, -1 where there is none, given the mean probabilities of its cells."""
    siblings_cc, unrelated_cc = siblings(reachability), (reachability + reachability.T) == 0
    candidates_kc = np.where(siblings_cc.any(axis=1, keepdims=True), siblings_cc, unrelated_cc)[given_k]
    # What lies below a candidate and below the label, too, makes it no stronger a rival.
    mass_kc = np.where(candidates_kc, (p_kc * (1 - reachability[given_k])) @ reachability.T, -1)
    # A type and one below it that has all its mass are equal, to rounding: of these, the one above.
    largest_kc = candidates_kc & (mass_kc == mass_kc.max(axis=1, keepdims=True))
    rivals_k = np.where(largest_kc, depths(reachability), len(reachability)).argmin(axis=1)
    return np.where(candidates_kc.any(axis=1), rivals_k, UNASSIGNED)


def _ranked(contribution_g: Float[np.ndarray, " g"], n_genes_shown: int) -> Iterator[tuple[int, int]]:
    """Yield rank and gene: of those that add most, then of those that take most away."""
    order = np.argsort(-contribution_g, kind="stable")
    most, least = order[:n_genes_shown], order[::-1][:_GENES_AGAINST]
    yield from ((rank, gene) for rank, gene in enumerate(most.tolist(), 1) if contribution_g[gene] > 0)
    yield from ((-rank, gene) for rank, gene in enumerate(least.tolist(), 1) if contribution_g[gene] < 0)
