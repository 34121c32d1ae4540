"""The Cell Ontology in one pinned release: labels and ids of cell types, what is below what, and R for a set of types.

A release decides what a label means and which type lies below which, so results on labels depend on it. It is named by
its date and never chosen by what happens to be newest.
"""

import dataclasses
import difflib
import graphlib
import gzip
import importlib.metadata
import logging
import re
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from hce_jax.errors import OntologyError
from hce_jax.hierarchy.reachability import validate_reachability

#: The release used unless another is asked for: that of CELLxGENE schema 7.1.0.
DEFAULT_RELEASE = "2026-03-26"

#: The package that carries releases.
GUIDE = "cellxgene-ontology-guide"

#: The published rule chooses cell types with more ancestors than this.
PUBLISHED_DEPTH = 7

#: Types of the published list that tell whether a release reaches as deep as the one the list was chosen with. In
#: cl-simple of 2022-12-15 every published type has 8 ancestors or more; the files of the package leave out ancestors
#: of some (they hold what cl.owl asserts, not what a reasoner adds). These are the types with the fewest ancestors
#: there, and those that lose most in the files.
DEPTH_WITNESSES = (
    "CL:0000738",  # leukocyte: 8 ancestors in 2022-12-15, 5 in 2026-03-26
    "CL:0002573",  # Schwann cell: 8, 5
    "CL:2000093",  # bronchus fibroblast of lung: 8, 6
    "CL:0002548",  # fibroblast of cardiac tissue: 8, 6
    "CL:0002062",  # type I pneumocyte: 8, 9
    "CL:0000540",  # neuron: 9, 6
    "CL:0000115",  # endothelial cell: 9, 2
    "CL:0000071",  # blood vessel endothelial cell: 12, 4
    "CL:0000501",  # granulosa cell: 12, 5
    "CL:0002453",  # oligodendrocyte precursor cell: 10, 8, but 3 in the package's file of 2024-01-04
)

CL_ID = re.compile(r"CL:\d{7}")
OBSOLETE = re.compile(r"^obsolete[\s:]+", re.IGNORECASE)
EXACT_SYNONYM = re.compile(r'"((?:[^"\\]|\\.)*)" EXACT\b')

#: At most so many unusable names are explained in one message, and so many labels suggested for each.
N_SHOWN = 3

#: Why a name is not the current one (`Mapped.why`), where what it named is no more.
REPLACED = "obsolete, replaced"
MERGED = "merged"


@dataclasses.dataclass(frozen=True)
class Term:
    """What a release says about one id.

    Attributes
    ----------
    label
        Empty for an id that was merged into another.
    parents
        Ids that the term is directly below (is_a), of the Cell Ontology only.
    synonyms
        Exact ones.
    obsolete
        The id should no longer be used.
    replaced_by
        The one id to use in place of an obsolete one; "" where there is none.
    consider
        Ids to think of where no single one replaces it.
    """

    label: str
    parents: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()
    obsolete: bool = False
    replaced_by: str = ""
    consider: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Mapped:
    """A name, and the current cell type that it stands for.

    Attributes
    ----------
    given
        The name: a label or an id.
    cl_id, label
        The type's id and current label.
    why
        Why the name is not simply that: "obsolete, replaced", "merged", "synonym", "letter case or blanks" or "synonym,
        letter case or blanks"; empty when it is.
    """

    given: str
    cl_id: str
    label: str
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Resolution:
    """The cell types that a list of names stands for.

    Attributes
    ----------
    cl_ids
        Current ids, in the order of the names.
    mapped
        The names that are neither the current id nor the current label of their type, in the same order.
    """

    cl_ids: tuple[str, ...]
    mapped: tuple[Mapped, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class CellOntology:
    """One release of the Cell Ontology.

    Attributes
    ----------
    release
        Its date, such as "2026-03-26"; of a file of one's own, what its data-version says.
    source
        What it was read from: the package and its version, or the name of an OBO file.
    terms
        Every id of the Cell Ontology, obsolete and merged ones among them.

    Examples
    --------
    >>> ontology = CellOntology.open()
    >>> ontology.release
    '2026-03-26'
    >>> ontology.resolve(["T cell", "nerve cell"]).cl_ids
    ('CL:0000084', 'CL:0000540')
    """

    release: str
    source: str
    terms: Mapping[str, Term]

    @classmethod
    def open(cls, spec: str | Path | None = None) -> "CellOntology":
        """Read a release of the Cell Ontology.

        Parameters
        ----------
        spec
            None: the default release. A date such as "2025-07-30": a release that the installed package
            cellxgene-ontology-guide carries. Else the path of an OBO file, plain or .gz, of which the is_a edges
            between Cell Ontology terms are used (not part_of and the like).

        Returns
        -------
        CellOntology

        Raises
        ------
        OntologyError
            If there is no such release or file, or the file is no whole OBO file with Cell Ontology terms.

        Examples
        --------
        >>> CellOntology.open("2025-07-30").release
        '2025-07-30'
        """
        spec = DEFAULT_RELEASE if spec is None else spec
        carried = _carried_releases()
        release = str(spec).removeprefix("v")
        if release in carried:
            source = f"{GUIDE} {importlib.metadata.version(GUIDE)}"
            return cls(release, source, _terms_of_guide(_guide_file(carried[release])))
        path = Path(spec)
        if not path.is_file():
            raise OntologyError(
                f"no release {str(spec)!r} of the Cell Ontology, and no file of that name; the installed {GUIDE} "
                f"carries {', '.join(sorted(carried))}; the path of an OBO file (plain or .gz) will do as well"
            )
        release, terms = _read_obo(path)
        return cls(release, path.name, terms)

    def __str__(self) -> str:
        return f"Cell Ontology {self.release} ({self.source})"

    def __repr__(self) -> str:
        return f"<{self}: {len(self.terms)} ids>"

    def label(self, cl_id: str) -> str:
        """Give the label of an id, "obsolete ..." for an obsolete one.

        Raises
        ------
        OntologyError
            If the release does not have the id, or has it only as merged into another.

        Examples
        --------
        >>> CellOntology.open().label("CL:0000540")
        'neuron'
        """
        term = self._term(cl_id)
        if not term.label:
            raise OntologyError(
                f"{cl_id} has no label in the {self}: it was merged into {self._list([term.replaced_by])}"
            )
        return term.label

    def ancestors(self, cl_id: str) -> frozenset[str]:
        """Give the ids of all types that a type lies below, without itself: the closure of is_a.

        An obsolete type has none.

        Raises
        ------
        OntologyError
            If the release does not have the id.

        Examples
        --------
        >>> ontology = CellOntology.open()
        >>> sorted(ontology.label(each) for each in ontology.ancestors("CL:0000255"))
        ['cell']
        """
        self._term(cl_id)
        return _reached(cl_id, self._parents)

    def descendants(self, cl_id: str) -> frozenset[str]:
        """Give the ids of all types below a type, without itself.

        Raises
        ------
        OntologyError
            If the release does not have the id.

        Examples
        --------
        >>> "CL:0000084" in CellOntology.open().descendants("CL:0000542")
        True
        """
        self._term(cl_id)
        return _reached(cl_id, self._children)

    @property
    def has_published_depth(self) -> bool:
        """Whether "more than 7 ancestors" chooses here what it chose for the published list of cell types.

        It does in a release in which every published type passes; `DEPTH_WITNESSES` decide it.

        Examples
        --------
        >>> CellOntology.open().has_published_depth
        False
        """
        return all(
            witness in self.terms and len(self.ancestors(witness)) > PUBLISHED_DEPTH for witness in DEPTH_WITNESSES
        )

    def resolve(self, names: Sequence[str]) -> Resolution:
        """Find the current cell types that labels and ids stand for.

        Parameters
        ----------
        names
            Labels and ids, mixed as one likes. Beside current ones, what follows is accepted, and recorded: an obsolete
            id or label whose replacement the release names, also without its "obsolete"; an id that was merged into
            another; an exact synonym; another letter case or blanks. Two names may stand for the same type.

        Returns
        -------
        Resolution

        Raises
        ------
        OntologyError
            If a name is unknown (the nearest labels are given), stands for several types, or for an obsolete one that
            no current one replaces.

        Examples
        --------
        >>> CellOntology.open().resolve(["neuron", "t cell"]).mapped
        (Mapped(given='t cell', cl_id='CL:0000084', label='T cell', why='letter case or blanks'),)
        """
        found = [self.find(name) for name in names]
        lost = [name for name, one in zip(names, found, strict=True) if one is None]
        if lost:
            count = f"{len(lost)} of {len(names)} names cannot be used: " if len(lost) > 1 else ""
            more = f"; and {len(lost) - N_SHOWN} more" if len(lost) > N_SHOWN else ""
            raise OntologyError(f"{self}: {count}{'; '.join(map(self.explain, lost[:N_SHOWN]))}{more}")
        types = tuple(one for one in found if one is not None)
        return Resolution(tuple(one.cl_id for one in types), tuple(one for one in types if one.why))

    def find(self, name: str) -> Mapped | None:
        """Find the current cell type that one label or id stands for; None where that is not a single one.

        Examples
        --------
        >>> CellOntology.open().find("nerve cell")
        Mapped(given='nerve cell', cl_id='CL:0000540', label='neuron', why='synonym')
        """
        ids, how = self._meant(name)
        current = self._current(ids)
        if len(current) != 1:
            return None
        (found,) = current
        gone = [self.terms[cl_id] for cl_id in ids if cl_id != found and self._current([cl_id])]
        if gone:
            how = REPLACED if any(term.label for term in gone) else MERGED
        return Mapped(name, found, self.terms[found].label, how)

    def explain(self, name: str) -> str:
        """Say why `find` gives None for a name, and what to give instead.

        Examples
        --------
        >>> CellOntology.open().explain("CL:0000045")
        'CL:0000045 (obsolete thymus processed stem cell) is obsolete and no current type replaces it'
        """
        ids, _ = self._meant(name)
        current = self._current(ids)
        if current:
            return f'"{name}" stands for {len(current)} types, {self._list(sorted(current))}: give the id of one'
        if ids:
            chain = self._chain(min(ids))
            passed = f" (replaced by {self._list(chain[1:])})" if chain[1:] else ""
            others = [other for cl_id in chain if cl_id in self.terms for other in self.terms[cl_id].consider]
            consider = f"; consider {self._list(others)}" if others else ""
            return f"{self._list(chain[:1])} is obsolete and no current type replaces it{passed}{consider}"
        nearest = ", ".join(f'"{label}"' for label in self._nearest(name))
        return f'"{name}" is no label, exact synonym or id' + (f"; the nearest: {nearest}" if nearest else "")

    def reachability(self, cl_ids: Sequence[str]) -> Float[np.ndarray, "c d"]:
        """Compute R of a list of cell types: R[i, j] = 1 when j is i or a descendant of i.

        Paths through types outside the list count. An obsolete type is neither above nor below another: `resolve` leads
        to the one that replaces it.

        Parameters
        ----------
        cl_ids
            C different ids.

        Returns
        -------
        float32 array (C, C) of zeros and ones.

        Raises
        ------
        OntologyError
            If an id is unknown or occurs twice.

        Examples
        --------
        >>> CellOntology.open().reachability(["CL:0000084", "CL:0000540", "CL:0000542"]).astype(int).tolist()
        [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
        """
        position: dict[str, int] = {}
        for index, cl_id in enumerate(cl_ids):
            if cl_id in position:
                raise OntologyError(f"{self._list([cl_id])} is given twice, as types {position[cl_id]} and {index}")
            position[cl_id] = index
        reach = np.eye(len(cl_ids), dtype=bool)
        for cl_id, index in position.items():
            above = [position[ancestor] for ancestor in self.ancestors(cl_id) if ancestor in position]
            reach[above, index] = True
        return validate_reachability(reach)

    @cached_property
    def _parents(self) -> dict[str, tuple[str, ...]]:
        return {cl_id: term.parents for cl_id, term in self.terms.items()}

    @cached_property
    def _children(self) -> dict[str, list[str]]:
        children = defaultdict(list)
        for cl_id, term in self.terms.items():
            for parent in term.parents:
                children[parent].append(cl_id)
        return children

    @cached_property
    def _lookups(self) -> tuple[tuple[str, Callable[[str], str], dict[str, set[str]]], ...]:
        """Where names are looked for, in this order: what a name found there is, its key, and key -> ids."""
        current = [(cl_id, term) for cl_id, term in self.terms.items() if not term.obsolete]
        old = [(cl_id, term) for cl_id, term in self.terms.items() if term.obsolete and term.label]
        labels = [(term.label, cl_id) for cl_id, term in current]
        others = [(synonym, cl_id) for cl_id, term in current for synonym in term.synonyms]
        others += [(label, cl_id) for cl_id, term in old for label in (term.label, OBSOLETE.sub("", term.label))]
        return (
            ("", str, _index(labels)),
            ("synonym", str, _index(others)),
            ("letter case or blanks", _loosely, _index(labels, _loosely)),
            ("synonym, letter case or blanks", _loosely, _index(others, _loosely)),
        )

    def _meant(self, name: str) -> tuple[set[str], str]:
        """Give the ids, current or not, that a name stands for, and what it is to them."""
        if CL_ID.fullmatch(name):
            return {name} & self.terms.keys(), ""
        for how, key, ids in self._lookups:
            if key(name) in ids:
                return ids[key(name)], how
        return set(), ""

    def _chain(self, cl_id: str) -> list[str]:
        """Follow what replaces an obsolete id, to the end or until it comes round."""
        chain = [cl_id]
        while (term := self.terms.get(chain[-1])) and term.obsolete and term.replaced_by not in ("", *chain):
            chain.append(term.replaced_by)
        return chain

    def _current(self, cl_ids: Iterable[str]) -> set[str]:
        """Give the current ids that the ids lead to."""
        ends = {self._chain(cl_id)[-1] for cl_id in cl_ids}
        return {end for end in ends if end in self.terms and not self.terms[end].obsolete}

    def _nearest(self, name: str) -> list[str]:
        """Give the labels of up to three current types with a name written much like this one."""
        (_, _, labels), (_, _, others) = self._lookups[2:]
        found = difflib.get_close_matches(name.casefold(), [*labels, *others], n=4 * N_SHOWN)
        ids = [cl_id for each in found for cl_id in sorted(self._current(labels.get(each) or others[each]))]
        return [self.terms[cl_id].label for cl_id in dict.fromkeys(ids)][:N_SHOWN]

    def _term(self, cl_id: str) -> Term:
        if cl_id not in self.terms:
            raise OntologyError(f'"{cl_id}" is no id of the {self}')
        return self.terms[cl_id]

    def _list(self, cl_ids: Iterable[str]) -> str:
        """Write ids for a message, with the labels of those that have one."""
        labels = {cl_id: self.terms[cl_id].label if cl_id in self.terms else "" for cl_id in cl_ids}
        return ", ".join(f"{cl_id} ({label})" if label else cl_id for cl_id, label in labels.items())


def _loosely(name: str) -> str:
    return " ".join(name.split()).casefold()


def _index(names: Iterable[tuple[str, str]], key: Callable[[str], str] = str) -> dict[str, set[str]]:
    """Collect pairs (name, id) by the name's key."""
    index = defaultdict(set)
    for name, cl_id in names:
        index[key(name)].add(cl_id)
    return dict(index)


def _reached(start: str, step: Mapping[str, Sequence[str]]) -> frozenset[str]:
    """Give all that can be reached from a start in one step or more."""
    reached: set[str] = set()
    ahead = [start]
    while ahead:
        new = set(step.get(ahead.pop(), ())) - reached
        reached |= new
        ahead += new
    return frozenset(reached)


def _carried_releases() -> dict[str, str]:
    """Give the releases that the installed package carries, each with a schema version that stands for it."""
    from cellxgene_ontology_guide.supported_versions import load_supported_versions

    return {
        about["ontologies"]["CL"]["version"].removeprefix("v"): schema
        for schema, about in load_supported_versions().items()
    }


def _guide_file(schema: str) -> dict[str, Any]:
    """Read the package's file of the Cell Ontology for a schema version."""
    from cellxgene_ontology_guide.supported_versions import CXGSchema

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # asking for an older release is no mistake
        return CXGSchema(schema).ontology("CL")


def _terms_of_guide(file: Mapping[str, Any]) -> dict[str, Term]:
    """Read what the package's file says of each id. It holds exact synonyms only, and merged ids without a label."""
    return {
        cl_id: Term(
            label=entry["label"],
            parents=tuple(ancestor for ancestor, distance in entry["ancestors"].items() if distance == 1),
            synonyms=tuple(entry.get("synonyms", ())),
            obsolete=entry["deprecated"],
            replaced_by=entry.get("replaced_by", ""),
            # some are written as obo.CL_0000162
            consider=tuple(other.removeprefix("obo.").replace("_", ":") for other in entry.get("consider", ())),
        )
        for cl_id, entry in file.items()
    }


def _read_obo(path: Path) -> tuple[str, dict[str, Term]]:
    """Read and check an OBO file; return its release and terms."""
    graph = _obo_graph(path)
    if "format-version" not in graph.graph:
        raise OntologyError(f"{path} is no OBO file: it does not begin with a format-version")
    # a node without a name and all else is only named as a parent
    terms = {str(node): _obo_term(graph, node) for node, about in graph.nodes(data=True) if about and _is_cl(node)}
    if not terms:
        raise OntologyError(f"{path} holds no terms of the Cell Ontology (ids such as CL:0000000)")
    for cl_id, about in graph.nodes(data=True):
        for merged in filter(_is_cl, about.get("alt_id", ())):
            terms.setdefault(merged, Term("", obsolete=True, replaced_by=str(cl_id)))
    for cl_id, term in terms.items():
        for parent in term.parents:
            if parent not in terms:
                raise OntologyError(f"{path} puts {cl_id} below {parent}, which it does not hold; is the file whole?")
    try:
        graphlib.TopologicalSorter({cl_id: term.parents for cl_id, term in terms.items()}).prepare()
    except graphlib.CycleError as error:
        raise OntologyError(f"{path} has a cycle of is_a: {' > '.join(error.args[1])}") from error
    version = graph.graph.get("data-version", "")
    if not version:
        raise OntologyError(f"{path} does not say which release it is; add a line data-version: ... to its head")
    date = re.search(r"\d{4}-\d{2}-\d{2}", version)
    return date.group() if date else version.removeprefix("v"), terms


def _obo_graph(path: Path) -> Any:
    """Parse an OBO file into the graph that obonet makes of it."""
    import obonet

    unreadable = f"{path} is no whole OBO file"
    silenced = logging.root.manager.disable
    logging.disable(logging.WARNING)  # obonet prints what it misses in a head; we say it in our own words
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            return obonet.read_obo(file, ignore_obsolete=False)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise OntologyError(f"{unreadable} ({error})") from error
    except KeyError as error:
        raise OntologyError(f"{unreadable} (a term without an id)") from error
    finally:
        logging.disable(silenced)


def _is_cl(cl_id: object) -> bool:
    return CL_ID.fullmatch(str(cl_id)) is not None


def _obo_term(graph: Any, cl_id: str) -> Term:
    """Collect what an OBO graph says about an id."""
    about = graph.nodes[cl_id]
    exact = [match for text in about.get("synonym", ()) if (match := EXACT_SYNONYM.match(text))]
    replaced_by, consider = about.get("replaced_by", []), about.get("consider", [])
    return Term(
        label=about.get("name", cl_id),
        parents=tuple(to for _, to, kind in graph.out_edges(cl_id, keys=True) if kind == "is_a" and _is_cl(to)),
        synonyms=tuple(re.sub(r"\\(.)", r"\1", match[1]) for match in exact),
        obsolete=about.get("is_obsolete") == "true",
        replaced_by=replaced_by[0] if len(replaced_by) == 1 else "",
        consider=tuple(consider if len(replaced_by) == 1 else replaced_by + consider),
    )
