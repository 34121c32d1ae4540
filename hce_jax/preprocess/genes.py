"""Gene alignment: which column of some cells' counts is which gene of a store or model."""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from hce_jax.errors import SourceError

#: An Ensembl gene id with its version, which says nothing about which gene it is.
_VERSIONED = re.compile(r"(ENS[A-Z]*G\d{11})\.\d+")


@dataclasses.dataclass(frozen=True)
class GeneAlignment:
    """Where the genes of some cells lie among ours.

    Attributes
    ----------
    places_t
        For each of their genes its column among ours, or -1 if we lack it, (t,) int64.
    n_genes
        Number of our genes g.
    by
        Whether genes were found by "feature_id" or by "feature_name".
    """

    places_t: np.ndarray
    n_genes: int
    by: str

    @property
    def n_found(self) -> int:
        """Number of our genes that they have; the others are 0 in every cell."""
        return int(np.count_nonzero(self.places_t >= 0))

    def apply(self, counts: sparse.csr_array | sparse.csr_matrix) -> sparse.csr_array:
        """Bring counts (n, t) into our order of genes, (n, g), of the same type; the genes that we lack are left out.

        Examples
        --------
        >>> align_genes(["B", "C"], ["A", "B"], ["a", "b"]).apply(sparse.csr_array([[3.0, 4.0]])).toarray()
        array([[0., 3.]])
        """
        if np.array_equal(self.places_t, np.arange(self.n_genes)):  # as in files that were written for us
            same = sparse.csr_array(counts)
            return same if same.has_sorted_indices else same.sorted_indices()
        kept = np.flatnonzero(self.places_t >= 0)
        n_theirs = len(self.places_t)
        column_g = np.full(self.n_genes, n_theirs, np.int32)  # of a gene that they have not: a column of zeros behind
        column_g[self.places_t[kept]] = kept
        # By columns and back: genes are chosen and sorted in two passes over the counts, without comparing.
        by_gene = sparse.csc_array(counts)
        by_gene.resize((counts.shape[0], n_theirs + 1))
        return by_gene[:, column_g].tocsr()


def align_genes(
    theirs: Sequence[str], gene_ids: Sequence[str], gene_names: Sequence[str], where: str = "the data"
) -> GeneAlignment:
    """Find the genes of some cells among ours, by id or by name, whichever finds more (by id if both find as many).

    Versions of Ensembl ids are ignored. A name that stands for several of our genes finds none of them.

    Parameters
    ----------
    theirs
        Ids or names of their genes (t,), in the order of the columns of their counts.
    gene_ids, gene_names
        Ids and names of our genes (g,).
    where
        What to call the cells in a message, e.g. their file.

    Raises
    ------
    SourceError
        If none of our genes is found, or one is found twice.

    Examples
    --------
    >>> align_genes(["ENSG00000010610.9", "X"], ["ENSG00000010610"], ["CD4"]).places_t.tolist()
    [0, -1]
    >>> align_genes(["CD8A", "CD4"], ["ENSG00000010610"], ["CD4"]).by
    'feature_name'
    """
    bare, bare_ids = [*map(without_version, theirs)], [*map(without_version, gene_ids)]
    best = max((_find(bare, bare_ids, "feature_id"), _find(bare, gene_names, "feature_name")), key=_n_found)
    if not best.n_found:
        raise SourceError(
            f"none of the {len(bare):,} genes of {where} ({_some(bare)}) is among the {len(gene_ids):,} asked for "
            f"({_some(gene_ids)}; by name {_some(gene_names)}); name the column of var that has Ensembl ids or gene "
            "names (--gene-column), or ask for other genes"
        )
    found = best.places_t[best.places_t >= 0]
    repeated = [place for place, count in Counter(found.tolist()).items() if count > 1]
    if repeated:
        ours = gene_ids if best.by == "feature_id" else gene_names
        raise SourceError(
            f"{where} has {len(repeated):,} genes more than once (first: {ours[repeated[0]]}); keep one column of "
            "each, or add them up, or name a column of var whose entries differ (--gene-column)"
        )
    return best


def without_version(name: str) -> str:
    """Return an Ensembl gene id without its version, any other name as it is.

    Examples
    --------
    >>> without_version("ENSG00000010610.9"), without_version("CD4.1")
    ('ENSG00000010610', 'CD4.1')
    """
    return match[1] if (match := _VERSIONED.fullmatch(name)) else name


def _find(theirs: Sequence[str], ours: Sequence[str], by: str) -> GeneAlignment:
    several = {name for name, count in Counter(ours).items() if count > 1}
    place = {name: index for index, name in enumerate(ours) if name not in several}
    return GeneAlignment(np.array([place.get(name, -1) for name in theirs], np.int64), len(ours), by)


def _n_found(alignment: GeneAlignment) -> int:
    return len(set(alignment.places_t[alignment.places_t >= 0].tolist()))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
