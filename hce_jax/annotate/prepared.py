"""A user's cells made ready for a model: which matrix, on which scale, with which genes."""

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse

from hce_jax.annotate.query import Query, QueryMatrix
from hce_jax.errors import SourceError
from hce_jax.evaluation.cells import Cells
from hce_jax.preprocess.genes import GeneAlignment, check_coverage, match_genes
from hce_jax.preprocess.scale import Choice, Scale, choose_matrix
from hce_jax.preprocess.species import recognise_species
from hce_jax.store import LABEL_COLUMN, Block, SideFiles

#: Column of a block: how many of the model's genes a cell expresses.
EXPRESSED = "n_expressed"
#: Cells of a block.
_BLOCK_SIZE = 2048
#: Cells, spread evenly over all, that tell what a matrix holds.
_SAMPLE = 512


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedCells(Cells):
    """Cells of a :class:`Query`, in the genes of a model; see :meth:`of`.

    Attributes
    ----------
    title, side, block_sizes, lookups
        As of :class:`hce_jax.evaluation.cells.Cells`; of labels and other columns nothing is known.
    matrix
        Where the values are.
    scale
        What they are.
    alignment
        Where its genes lie among the model's.
    share_of_counts
        Share of the genes' counts that lies in the model's genes, mean over the sample.
    notes, warnings
        What was done, and what should be looked at, in sentences.
    """

    title: str
    side: SideFiles
    block_sizes: np.ndarray
    lookups: dict[str, tuple[str, ...]]
    matrix: QueryMatrix
    scale: Scale
    alignment: GeneAlignment
    share_of_counts: float
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @classmethod
    def of(
        cls, query: Query, side: SideFiles, counts: str | None = None, gene_column: str | None = None
    ) -> "PreparedCells":
        """Choose matrix and genes, and look at a sample of the cells.

        Parameters
        ----------
        query
            The cells.
        side
            The model's genes and types.
        counts
            Name of the matrix (``--counts``); None: the one with raw counts, else one whose values can be brought back
            to them.
        gene_column
            Column of var with ids or names of the genes (``--gene-column``); None: whichever finds most.

        Raises
        ------
        SourceError
            If no matrix will do, too few of the model's genes are there, or they are of another species.

        Examples
        --------
        >>> with open_query("cells.h5ad") as query:  # doctest: +SKIP
        ...     PreparedCells.of(query, load_model(run).side).scale.words
        'raw counts'
        """
        choice, sample = _choose(query, _named(query, counts))
        matrix = query.matrices[choice.name]
        alignment = match_genes(matrix.var, side.gene_ids, side.gene_names, query.title, gene_column)
        warning = check_coverage(alignment, query.title, "the model's")
        counts_nt = choice.scale.to_counts(sample)
        warnings = [] if warning is None else [warning]
        if choice.scale.kind == "counts" and counts_nt.data.max(initial=0) <= 1:
            warnings.append(f"{matrix.name} has {choice.scale.what}: labels are less certain than they look")
        return cls(
            title=query.title,
            side=side,
            block_sizes=np.diff([*range(0, query.n_cells, _BLOCK_SIZE), query.n_cells]),
            lookups={},
            matrix=matrix,
            scale=choice.scale,
            alignment=alignment,
            share_of_counts=alignment.share_of_counts(counts_nt),
            notes=(*choice.notes, *alignment.notes),
            warnings=tuple(warnings),
        )

    def read_block(self, index: int) -> Block:
        """Read one block; its columns are :data:`EXPRESSED` and a cell type without meaning.

        See :meth:`hce_jax.evaluation.cells.Cells.read_block`.
        """
        start = index * _BLOCK_SIZE
        return self.read_rows(slice(start, start + int(self.block_sizes[index])))

    def read_rows(self, rows: slice | np.ndarray) -> Block:
        """Read some cells, by their rows in the file, ascending."""
        counts = self.alignment.apply(self.scale.to_counts(self.matrix.rows(rows)))
        n_expressed = np.diff(counts.indptr)
        return Block.of_counts(counts, {LABEL_COLUMN: np.zeros_like(n_expressed), EXPRESSED: n_expressed})

    def report(self) -> str:
        """Say what was understood, in lines for a person."""
        alignment = self.alignment
        share = alignment.n_found / alignment.n_genes
        lines = [
            f"cells       {self.n_cells:,} in {self.title}",
            f"values      {self.matrix.name}: {self.scale.words}",
            f"genes       {alignment.n_found:,} of the model's {alignment.n_genes:,} ({share:.1%}), by {alignment.by}; "
            f"{self.share_of_counts:.1%} of the counts lie in them",
        ]
        lines += [f"note        {note}" for note in self.notes]
        return "\n".join(lines + [f"WARNING     {warning}" for warning in self.warnings])

    @cached_property
    def about(self) -> dict[str, Any]:
        """What was understood of the input, for uns and the report."""
        species = recognise_species([*self.matrix.var.index])
        return {
            "title": self.title,
            "cells": self.n_cells,
            "matrix": self.matrix.name,
            "scale": self.scale.words,
            **({} if species is None else {"species": f"{species} ({species.seen})"}),
            "genes_by": self.alignment.by,
            "genes_found": self.alignment.n_found,
            "genes_of_model": self.alignment.n_genes,
            "share_of_counts": self.share_of_counts,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


def _choose(query: Query, matrices: Mapping[str, QueryMatrix]) -> tuple[Choice, sparse.csr_array]:
    """Choose a matrix by a sample of the cells, and return the sample."""
    rows = np.unique(np.linspace(0, query.n_cells - 1, min(_SAMPLE, query.n_cells)).astype(np.int64))
    usual = [name for name in ("raw", "X", "counts") if name in matrices] or [*matrices]
    samples = {name: matrices[name].rows(rows) for name in usual}
    with suppress(SourceError):
        choice = choose_matrix(samples, query.title, query.log1p_base)
        if choice.scale.kind != "proportional":  # others are not looked at: those kept by gene would be read whole
            return choice, samples[choice.name]
    samples |= {name: matrix.rows(rows) for name, matrix in matrices.items() if name not in samples}
    choice = choose_matrix(samples, query.title, query.log1p_base)
    return choice, samples[choice.name]


def _named(query: Query, counts: str | None) -> dict[str, QueryMatrix]:
    if counts is None:
        return query.matrices
    name = counts.removeprefix("layers/")
    if name not in query.matrices:
        has = ", ".join(query.matrices) or "none"
        raise SourceError(f"{query.title} has no matrix {name!r}; it has {has} (--counts)")
    return {name: query.matrices[name]}
