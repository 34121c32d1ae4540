"""Cells with raw counts, wherever they lie: what a store is built from."""

import abc
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from hce_jax.preprocess.genes import GeneAlignment

#: What is said of each cell in words: categorical columns of the batches of :meth:`CellSource.obs_batches`.
TEXT_COLUMNS = (
    "dataset_id",
    "donor_id",
    "assay",
    "cell_type",
    "development_stage",
    "disease",
    "tissue",
    "tissue_general",
)
#: The Cell Ontology id of the label; a source may lack this column.
TERM_COLUMN = "cell_type_ontology_term_id"
#: What a source says of a cell of which it does not know more.
UNKNOWN = "unknown"
#: A source that has fewer of the store's genes is worth a warning.
_FEW_GENES = 0.5


class CellSource(abc.ABC):
    """A Census, or some h5ad files.

    Cells are numbered by ``row``, ascending in the order in which the source keeps them; reading counts of neighbours
    together is fast. Genes are those of :meth:`genes`.
    """

    @property
    @abc.abstractmethod
    def title(self) -> str:
        """What to call it in messages, e.g. "Census 2023-05-15"."""

    @property
    def has_joinids(self) -> bool:
        """Whether ``soma_joinid`` is the source's own, not a running number."""
        return True

    @abc.abstractmethod
    def about(self) -> dict[str, Any]:
        """Say what it is, for store.json; changes when its cells do. Without paths of this machine's folders above."""

    @abc.abstractmethod
    def genes(self) -> pd.DataFrame:
        """Return its genes: ``feature_id``, ``feature_name`` and, where it is known, ``feature_type``, as text."""

    @abc.abstractmethod
    def obs_batches(self) -> Iterator[pd.DataFrame]:
        """Go through all its cells, ordered by row, some at a time.

        Yields
        ------
        DataFrame
            ``row`` int64; ``soma_joinid`` int64, another for each cell; ``is_primary_data`` bool; the
            :data:`TEXT_COLUMNS` and, where the source has it, :data:`TERM_COLUMN`, all categorical; missing is
            :data:`UNKNOWN`. A source that knows the splits adds ``split``, categorical: train, val, test.

        Raises
        ------
        SourceError
            If it cannot be read.
        """

    @abc.abstractmethod
    def align(self, gene_ids: Sequence[str], gene_names: Sequence[str]) -> dict[str, GeneAlignment]:
        """Find its genes among ours, for :meth:`read_counts`; by file, or under one name.

        Raises
        ------
        SourceError
            If none is found, or one is found twice.
        """

    @abc.abstractmethod
    def read_counts(self, rows: np.ndarray, alignments: dict[str, GeneAlignment]) -> sparse.csr_array:
        """Read the raw counts of some cells in our order of genes, (n, g) float32 with sorted indices.

        Parameters
        ----------
        rows
            Their rows, (n,) int64, ascending.
        alignments
            Of :meth:`align`.

        Raises
        ------
        SourceError
            If they cannot be read.
        """


def warn_of_few_genes(alignments: dict[str, GeneAlignment], whose: str = "the store's") -> None:
    """Say on stderr which files have fewer than half of our genes, and whose genes ours are.

    Examples
    --------
    >>> warn_of_few_genes({"study.h5ad": GeneAlignment(np.array([0, 1]), 2, "feature_id")})
    """
    for title, alignment in alignments.items():
        if alignment.n_found < _FEW_GENES * alignment.n_genes:
            few = f"only {alignment.n_found:,} of {whose} {alignment.n_genes:,} genes"
            print(f"{title} has {few}; the others are 0 in its cells", file=sys.stderr)
