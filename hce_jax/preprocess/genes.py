"""Gene alignment: which column of some cells' counts is which gene of a store or model.

Stores are built by :func:`align_genes`, which is told what the genes are called and refuses what it would have to mend.
A user's own file goes through :func:`match_genes`, which looks for the names, and says what it did.
"""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from scipy import sparse

from hce_jax.errors import SourceError
from hce_jax.preprocess.species import Species, other_species, recognise_species, without_genome

#: An Ensembl gene id with its version, which says nothing about which gene it is.
_VERSIONED = re.compile(r"(ENS[A-Z]*G\d{11})\.\d+")
#: Columns of var whose name has one of these may say what genes are called; what they hold decides.
_TELLING_COLUMNS = re.compile(r"gene|feature|ensembl|symbol|hgnc|accession|index|^names?$|^ids?$", re.IGNORECASE)
#: Columns of var that say what its rows are: Cell Ranger's, the same in anndata, muon's.
_KIND_COLUMNS = ("feature_types", "feature_type", "modality")
#: What they say of genes; where some rows are these, the others are none.
_GENES = ("gene expression", "rna", "gex")
#: What they say of others. (The Census's feature_type says what kind of gene it is, such as protein_coding.)
_NO_GENES = (
    *("antibody capture", "antigen capture", "crispr guide capture", "multiplexing capture", "custom", "peaks"),
    *("protein", "prot", "adt", "hto", "atac", "spike-in"),
)
#: Below this share of a model's genes its answers mean nothing; below that they mean less than they say.
LEAST_COVERAGE, LOW_COVERAGE = 0.05, 0.5


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
        How genes were found: "feature_id" or "feature_name"; of :func:`match_genes` in words.
    notes
        For a person: what else was seen or done.
    are_genes_t
        Which of their columns are genes of our species, (t,) bool; None: all.
    """

    places_t: np.ndarray
    n_genes: int
    by: str
    notes: tuple[str, ...] = ()
    are_genes_t: np.ndarray | None = None

    @property
    def n_found(self) -> int:
        """Number of our genes that they have; the others are 0 in every cell."""
        return len(np.unique(self.places_t[self.places_t >= 0]))

    def share_of_counts(self, counts: sparse.csr_array) -> float:
        """Return which share of the counts (n, t) of their genes lies in ours, mean over the cells that have some.

        What is no gene of our species (antibodies, say) is in neither.

        Examples
        --------
        >>> align_genes(["B", "C"], ["A", "B"], ["a", "b"]).share_of_counts(sparse.csr_array([[3.0, 1.0], [0, 0]]))
        0.75
        """
        are_genes_t = np.ones(counts.shape[1], bool) if self.are_genes_t is None else self.are_genes_t
        total_n, found_n = (counts @ each.astype(np.float64) for each in (are_genes_t, self.places_t >= 0))
        return float((found_n[total_n > 0] / total_n[total_n > 0]).mean()) if total_n.any() else 0.0

    def apply(self, counts: sparse.csr_array | sparse.csr_matrix) -> sparse.csr_array:
        """Bring counts (n, t) into our order of genes, (n, g), of the same type; the genes that we lack are left out.

        Columns that are the same gene of ours are added up.

        Examples
        --------
        >>> align_genes(["B", "C"], ["A", "B"], ["a", "b"]).apply(sparse.csr_array([[3.0, 4.0]])).toarray()
        array([[0., 3.]])
        """
        if np.array_equal(self.places_t, np.arange(self.n_genes)):  # as in files that were written for us
            same = sparse.csr_array(counts)
            return same if same.has_sorted_indices else same.sorted_indices()
        kept = np.flatnonzero(self.places_t >= 0)
        first = np.unique(self.places_t[kept], return_index=True)[1]
        if len(first) < len(kept):
            return self._with(kept[first]).apply(counts) + self._with(np.delete(kept, first)).apply(counts)
        n_theirs = len(self.places_t)
        column_g = np.full(self.n_genes, n_theirs, np.int32)  # of a gene that they have not: a column of zeros behind
        column_g[self.places_t[kept]] = kept
        # By columns and back: genes are chosen and sorted in two passes over the counts, without comparing.
        by_gene = sparse.csc_array(counts)
        by_gene.resize((counts.shape[0], n_theirs + 1))
        return by_gene[:, column_g].tocsr()

    def _with(self, columns: np.ndarray) -> "GeneAlignment":
        """Return the same for some of their columns only."""
        places_t = np.full_like(self.places_t, -1)
        places_t[columns] = self.places_t[columns]
        return dataclasses.replace(self, places_t=places_t)


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


def match_genes(
    var: pd.DataFrame,
    gene_ids: Sequence[str],
    gene_names: Sequence[str],
    where: str,
    column: str | None = None,
) -> GeneAlignment:
    """Find a model's genes in a file, whatever its genes are called and wherever it says so.

    The index of var and its columns that may name genes are tried, each as ids and as names; what finds most of our
    genes is taken, the index and ids where others find as many. Versions of Ensembl ids are ignored. Upper and lower
    case are the same where the names as they are find less than half of the genes. A name that stands for several of
    our genes finds none; several columns of theirs may be one gene of ours, and are added up. Rows that are no genes
    (antibodies, peaks, guides), and genes of another species in a mixture (mm10_Cd3d), are left out.

    Parameters
    ----------
    var
        The table of their genes (t,).
    gene_ids, gene_names
        Ids and names of our genes (g,).
    where
        What to call the cells in a message, e.g. their file.
    column
        The only column of var to look in (``--gene-column``); None: in all.

    Raises
    ------
    SourceError
        If there is no such column, no row is a gene, genes are of another species, or none is ours.

    Examples
    --------
    >>> var = pd.DataFrame({"gene_ids": ["ENSG00000153563.9", "ENSG00000010610.9", "x"]}, ["CD8A", "CD4", "other"])
    >>> found = match_genes(var, ["ENSG00000010610", "ENSG00000153563"], ["CD4", "CD8A"], "pbmc.h5ad")
    >>> found.places_t.tolist(), found.by
    ([1, 0, -1], 'the column gene_ids of var, as gene ids')
    """
    species = recognise_species(gene_ids) or recognise_species(gene_names)
    are_genes_t, notes = _which_are_genes(var, where)
    names = _names_in(var, column, where, are_genes_t)
    named, are_ours_t, foreign = _of_our_species(names, species)
    ours = {"gene ids": [*map(without_version, gene_ids)], "gene names": [*gene_names]}
    best = _best(named, ours)
    for place, other in _other_species(names, named, species):
        if species and best.n_found < LEAST_COVERAGE * best.n_genes:
            do = f"map them to {species.called} orthologues first"
            raise SourceError(f"{where} has {other}, the model knows {species}; {do}")
        notes = [*notes, f"{place} has {other}"]
    if best.n_found < LOW_COVERAGE * best.n_genes:
        folded = {what: [*map(str.upper, known)] for what, known in ours.items()}
        again = _best({place: [*map(str.upper, each)] for place, each in named.items()}, folded)
        best = max(best, dataclasses.replace(again, by=f"{again.by}, in upper or lower case"), key=_n_found)
    if not best.n_found:
        raise SourceError(_none_found(named, gene_ids, gene_names, where))
    counts = Counter(best.places_t[best.places_t >= 0].tolist())
    if several := [count for count in counts.values() if count > 1]:
        notes = [*notes, f"{len(several):,} genes are the sum of {sum(several):,} columns"]
    return dataclasses.replace(best, notes=(*notes, *foreign), are_genes_t=are_genes_t & are_ours_t)


def check_coverage(alignment: GeneAlignment, where: str, whose: str = "the model's") -> str | None:
    """Return a warning if few of a model's genes are in a file.

    Parameters
    ----------
    alignment
        Where its genes are among the model's.
    where
        What to call the cells, e.g. their file.
    whose
        Whose genes they are to have.

    Returns
    -------
    The warning if fewer than half of the genes are there, else None.

    Raises
    ------
    SourceError
        If fewer than 5 % are.

    Examples
    --------
    >>> check_coverage(GeneAlignment(np.array([0, 2, -1]), 10, "the index of var"), "my.h5ad")  # doctest: +ELLIPSIS
    "my.h5ad has only 2 of the model's 10 genes (20 %; looked in the index of var); the others are 0 in its cells, ..."
    """
    share = alignment.n_found / alignment.n_genes
    if share >= LOW_COVERAGE:
        return None
    found = f"only {alignment.n_found:,} of {whose} {alignment.n_genes:,} genes"
    few = f"{where} has {found} ({100 * share:.2g} %; looked in {alignment.by})"
    if share < LEAST_COVERAGE:
        raise SourceError(
            f"{few}, too few to tell cell types; name the column of var that has Ensembl ids or gene names "
            "(--gene-column), or give a file with all genes"
        )
    return f"{few}; the others are 0 in its cells, and labels are less certain than they look"


def without_version(name: str) -> str:
    """Return an Ensembl gene id without its version, any other name as it is.

    Examples
    --------
    >>> without_version("ENSG00000010610.9"), without_version("CD4.1")
    ('ENSG00000010610', 'CD4.1')
    """
    return match[1] if (match := _VERSIONED.fullmatch(name)) else name


def _which_are_genes(var: pd.DataFrame, where: str) -> tuple[np.ndarray, list[str]]:
    """Return which rows of var are genes, (t,) bool, and what is said of the others."""
    are_genes_t = np.ones(len(var), bool)
    left_out = Counter[str]()
    for column in _KIND_COLUMNS:
        if column not in var:
            continue
        kind_t = var[column].astype(str).to_numpy(str)
        known_t = np.char.lower(kind_t)
        genes_t = np.isin(known_t, _GENES)
        others_t = are_genes_t & (~genes_t if genes_t.any() else np.isin(known_t, _NO_GENES))
        left_out.update(kind_t[others_t].tolist())
        are_genes_t &= ~others_t
    if left_out and not are_genes_t.any():
        raise SourceError(f"{where} has no genes: its rows of var are {', '.join(left_out)}; give one with genes")
    return are_genes_t, [f"{count:,} rows of var that are {kind} are left out" for kind, count in left_out.items()]


def _names_in(var: pd.DataFrame, column: str | None, where: str, are_genes_t: np.ndarray) -> dict[str, list[str]]:
    """Return what var may call its genes, by place, "" in rows that are none."""
    texts = [
        name
        for name, values in var.items()
        if isinstance(values.dtype, pd.CategoricalDtype) or pd.api.types.is_string_dtype(values.dtype)
    ]
    if column is None:
        columns = [name for name in texts if _TELLING_COLUMNS.search(str(name)) and name not in _KIND_COLUMNS]
        places = {"the index of var": var.index.to_series()}
    elif column in texts:
        columns, places = [column], {}
    else:
        has = ", ".join(map(str, texts)) or "none"
        raise SourceError(f"{where} has no column {column!r} of text in var (--gene-column); those it has: {has}")
    places |= {f"the column {name} of var": var[name] for name in columns}
    return {place: [*np.where(are_genes_t, names.astype(str), "")] for place, names in places.items()}


def _of_our_species(
    names: dict[str, list[str]], species: Species | None
) -> tuple[dict[str, list[str]], np.ndarray, list[str]]:
    """Return names without genomes and versions, "" for genes of other genomes than ours; which rows are none of these.

    And what is said of them.
    """
    bare: dict[str, list[str]] = {}
    are_ours_t = np.ones(len(next(iter(names.values()))), bool)
    left_out = Counter[str]()
    for place, each in names.items():
        split = [without_genome(name) for name in each]
        foreign = Counter(of for _, of in split if of and species and of not in species.names)
        bare[place] = [without_version("" if of in foreign else name) for name, of in split]
        are_ours_t &= [of not in foreign for _, of in split]
        left_out |= foreign
    return bare, are_ours_t, [f"{count:,} genes of {of} are left out" for of, count in left_out.items()]


def _other_species(
    names: dict[str, list[str]], named: dict[str, list[str]], species: Species | None
) -> Iterator[tuple[str, Species]]:
    """Find places whose genes are of another species than ours, those of other genomes only where there are no more."""
    for place, each in names.items():
        genes = [name for name in named[place] if name] or [without_genome(name)[0] for name in each if name]
        if 2 * len(set(genes)) > len(genes) and (other := other_species(genes, species)):  # no classes, such as Coding
            yield place, other


def _best(named: dict[str, list[str]], ours: dict[str, list[str]]) -> GeneAlignment:
    """Return the alignment that finds most of our genes, the first of equals."""
    tried = itertools.product(ours.items(), named.items())
    return max((_find(names, known, f"{place}, as {what}") for (what, known), (place, names) in tried), key=_n_found)


def _none_found(named: dict[str, list[str]], gene_ids: Sequence[str], gene_names: Sequence[str], where: str) -> str:
    looked_in = "; ".join(f"{place}: {_some([name for name in names if name])}" for place, names in named.items())
    return (
        f"none of the genes of {where} is among the {len(gene_ids):,} of the model ({_some(gene_ids)}; by name "
        f"{_some(gene_names)}); looked in {looked_in}; name the column of var that has Ensembl ids or gene names "
        "(--gene-column)"
    )


def _find(theirs: Sequence[str], ours: Sequence[str], by: str) -> GeneAlignment:
    several = {name for name, count in Counter(ours).items() if count > 1}
    place = {name: index for index, name in enumerate(ours) if name not in several}
    return GeneAlignment(np.array([place.get(name, -1) for name in theirs], np.int64), len(ours), by)


def _n_found(alignment: GeneAlignment) -> int:
    return alignment.n_found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
