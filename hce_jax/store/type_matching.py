"""Which of a store's or a model's cell types the names that others give their cells stand for."""

import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

from hce_jax.hierarchy.cell_ontology import CL_ID, CellOntology
from hce_jax.store.cell_source import TERM_COLUMN, UNKNOWN
from hce_jax.store.schema import LABEL_COLUMN

#: Types that a warning names.
_MOST_NAMES = 3


class TypeMatcher:
    """Finds types by labels, and by what labels and Cell Ontology ids stand for in one release of the ontology.

    Parameters
    ----------
    labels, cl_ids
        Of the types (c,); without ids, the labels say what the types are.
    ontology
        The release.

    Attributes
    ----------
    cl_ids
        Id of each type in the release; where it does not know the type, the given one, or "unknown".
    by_text
        Labels of the types that the release does not know, or takes for the same as another of the types: they are
        found by their own label or id only.

    Examples
    --------
    >>> matcher = TypeMatcher(["T cell", "neuron"], None, CellOntology.open())
    >>> matcher.match("nerve cell", None), matcher.match("helper", "CL:0000084"), matcher.match("B cell", None)
    (1, 0, -1)
    """

    def __init__(self, labels: Sequence[str], cl_ids: Sequence[str] | None, ontology: CellOntology):
        self._ontology = ontology
        self._code_of_label = {label: code for code, label in enumerate(labels)}
        self._code_of_given_id = {id_: code for code, id_ in enumerate(cl_ids or ()) if CL_ID.fullmatch(id_)}
        found = [ontology.find(name) for name in cl_ids or labels]
        times = Counter(one.cl_id for one in found if one is not None)
        self._code_of_id = {one.cl_id: code for code, one in enumerate(found) if one and times[one.cl_id] == 1}
        known = set(self._code_of_id.values())
        self._known_by_id = known if cl_ids else set[int]()
        given = cl_ids or [UNKNOWN] * len(labels)
        self.cl_ids = tuple(one.cl_id if one else cl_id for one, cl_id in zip(found, given, strict=True))
        self.by_text = tuple(label for code, label in enumerate(labels) if code not in known)

    def warn(self, where: object) -> None:
        """Say on stderr which types of a store or a model are found by their own label or id only."""
        if self.by_text:
            more = f" and {len(self.by_text) - _MOST_NAMES} more" if len(self.by_text) > _MOST_NAMES else ""
            print(
                f"{self._ontology} does not tell what {', '.join(map(repr, self.by_text[:_MOST_NAMES]))}{more} of "
                f"{where} stand for: cells of these types are found by the same label or id only",
                file=sys.stderr,
            )

    def match(self, label: str, cl_id: str | None) -> int:
        """Return the code of the type that a label with an id, or without one, stands for, -1 if it is none of them.

        It is the type of the same label, unless both have ids and the ontology takes these for different types; else
        the type that the id stands for; else, if the ontology does not know the id, the type that the label stands for.
        """
        by_label = self._code_of_label.get(label, -1)
        by_id = -1 if cl_id is None else self._stands_for(cl_id)
        id_is_known = cl_id is not None and (by_id >= 0 or self._ontology.find(cl_id) is not None)
        if by_label >= 0 and not (id_is_known and by_label in self._known_by_id):
            return by_label
        return by_id if id_is_known else self._stands_for(label)

    def codes(self, obs: pd.DataFrame) -> np.ndarray:
        """Return the code of each cell's type (n,) int64, -1 if it is none of them.

        Parameters
        ----------
        obs
            As :meth:`hce_jax.store.cell_source.CellSource.obs_batches` gives it: ``cell_type`` and, perhaps, ids.

        Examples
        --------
        >>> matcher = TypeMatcher(["T cell", "neuron"], None, CellOntology.open())
        >>> matcher.codes(pd.DataFrame({"cell_type": pd.Categorical(["neuron", "B cell", "neuron"])}))
        array([ 1, -1,  1])
        """
        label, has_ids = obs[LABEL_COLUMN].cat, TERM_COLUMN in obs
        cl_id = obs[TERM_COLUMN].cat if has_ids else label
        pair_n = label.codes.to_numpy(np.int64) * len(cl_id.categories) + cl_id.codes.to_numpy(np.int64)
        pairs, place_n = np.unique(pair_n, return_inverse=True)
        labels, cl_ids = np.divmod(pairs, max(len(cl_id.categories), 1))
        codes = [
            self.match(label.categories[one], cl_id.categories[other] if has_ids else None)
            for one, other in zip(labels, cl_ids, strict=True)
        ]
        return np.array(codes, np.int64)[place_n]

    def _stands_for(self, name: str) -> int:
        """Return the code of the type that an id or a label stands for in the ontology, or whose id it is."""
        if name in self._code_of_given_id:
            return self._code_of_given_id[name]
        found = self._ontology.find(name)
        return -1 if found is None else self._code_of_id.get(found.cl_id, -1)
