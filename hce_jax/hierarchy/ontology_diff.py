"""What becomes of a store's cell types, and of the edges between them, in another release of the Cell Ontology."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from hce_jax.hierarchy.cell_ontology import MERGED, REPLACED, CellOntology, Mapped


@dataclasses.dataclass(frozen=True)
class OntologyDiff:
    """How a store's types and their hierarchy look in another release. Its types go by the store's labels.

    Attributes
    ----------
    before
        The release that the store was made with, None where it does not say.
    after
        What it is compared with.
    n_types, n_compared
        How many types the store has, and between how many of them edges are compared: those that are found and stay
        types of their own.
    renamed
        Types that have another label now: (label, current label).
    replaced
        Types that are obsolete or merged into another, with what stands in their place.
    united
        Types that become one: (their labels, the current label).
    missing
        Types that do not lead to one current type: (label, why, and the nearest labels).
    added, removed
        Strict edges of R among the types compared: (label above, label below).
    n_edges_before, n_edges_after
        How many strict edges of R there are among the types compared.
    """

    before: str | None
    after: str
    n_types: int
    n_compared: int
    renamed: tuple[tuple[str, str], ...]
    replaced: tuple[Mapped, ...]
    united: tuple[tuple[tuple[str, ...], str], ...]
    missing: tuple[tuple[str, str], ...]
    added: tuple[tuple[str, str], ...]
    removed: tuple[tuple[str, str], ...]
    n_edges_before: int
    n_edges_after: int

    @property
    def is_empty(self) -> bool:
        """Whether nothing changes."""
        return not any((self.renamed, self.replaced, self.united, self.missing, self.added, self.removed))

    def report(self) -> str:
        """Write the changes as text for a terminal, without a line break at its end.

        Examples
        --------
        >>> ontology = CellOntology.open()
        >>> diff = diff_ontology(["nerve cell", "cell"], None, np.eye(2), ontology, "2022-12-15")
        >>> print(diff.report())  # doctest: +ELLIPSIS
        2 cell types of Cell Ontology 2022-12-15, in Cell Ontology 2026-03-26 (cellxgene-ontology-guide ...)
        <BLANKLINE>
        Renamed (1):
          nerve cell -> neuron
        <BLANKLINE>
        Edges among all types: 0 before, 1 after
          + cell > nerve cell
        """
        before = f"Cell Ontology {self.before}" if self.before else "an unrecorded release of the Cell Ontology"
        sections = [
            ("Renamed", [f"{old} -> {new}" for old, new in self.renamed]),
            ("Obsolete or merged", [f"{one.given} -> {one.label} ({one.cl_id}; {one.why})" for one in self.replaced]),
            ("Become one", [f"{'; '.join(old)} -> {new}" for old, new in self.united]),
            ("Not found", [why if f'"{label}"' in why else f"{label}: {why}" for label, why in self.missing]),
        ]
        parts = [f"{self.n_types} cell types of {before}, in {self.after}"]
        parts += ["\n  ".join([f"{title} ({len(lines)}):", *lines]) for title, lines in sections if lines]
        edges = [f"+ {above} > {below}" for above, below in self.added]
        edges += [f"- {above} > {below}" for above, below in self.removed]
        among = (
            "all types"
            if self.n_compared == self.n_types
            else f"{self.n_compared} of {self.n_types} types (left out: not found, or become one)"
        )
        counts = f"Edges among {among}: {self.n_edges_before} before, {self.n_edges_after} after"
        parts += ["\n  ".join([counts, *edges])]
        return "\n\n".join([*parts, "Nothing changes."] if self.is_empty else parts)


def diff_ontology(
    labels: Sequence[str],
    cl_ids: Sequence[str] | None,
    reachability: Float[np.ndarray, "c d"],
    ontology: CellOntology,
    release: str | None,
) -> OntologyDiff:
    """Compare a store's types and their hierarchy with what a release of the Cell Ontology says.

    Parameters
    ----------
    labels, cl_ids, reachability
        The store's C types: their labels, their ids where the store has them (else types are looked up by label), and
        R (c, c).
    ontology
        The release to compare with.
    release
        The release that the store was made with, where it is recorded.

    Returns
    -------
    OntologyDiff
        A type that is not found is no error but listed; it, and types that become one, are left out of the edges.

    Examples
    --------
    >>> diff_ontology(["cell", "neuron"], None, np.eye(2), CellOntology.open(), None).added
    (('cell', 'neuron'),)
    """
    names = labels if cl_ids is None else cl_ids
    found = {index: one for index, name in enumerate(names) if (one := ontology.find(name))}
    sharing = defaultdict(list)
    for index, one in found.items():
        sharing[one.cl_id].append(index)
    kept = [index for index, one in found.items() if len(sharing[one.cl_id]) == 1]
    old = reachability[np.ix_(kept, kept)] > 0
    new = ontology.reachability([found[index].cl_id for index in kept]) > 0

    def edges(matrix: np.ndarray) -> tuple[tuple[str, str], ...]:
        return tuple((labels[kept[above]], labels[kept[below]]) for above, below in np.argwhere(matrix))

    gone = {index: one for index, one in found.items() if one.why in (REPLACED, MERGED)}
    return OntologyDiff(
        before=release,
        after=str(ontology),
        n_types=len(labels),
        n_compared=len(kept),
        renamed=tuple(
            (labels[index], one.label)
            for index, one in found.items()
            if index not in gone and one.label != labels[index]
        ),
        replaced=tuple(dataclasses.replace(one, given=labels[index]) for index, one in gone.items()),
        united=tuple(
            (tuple(labels[index] for index in group), found[group[0]].label)
            for group in sharing.values()
            if len(group) > 1
        ),
        missing=tuple(
            (label, ontology.explain(name))
            for index, (label, name) in enumerate(zip(labels, names, strict=True))
            if index not in found
        ),
        added=edges(new & ~old),
        removed=edges(old & ~new),
        n_edges_before=int(old.sum()) - len(kept),
        n_edges_after=int(new.sum()) - len(kept),
    )
