"""From the probabilities of cells to what is written about them: labels at the depth that the data support."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pandas as pd

from hce_jax.evaluation.calibration import Calibration
from hce_jax.evaluation.decoders import BACKOFF, UNASSIGNED, Decoders
from hce_jax.hierarchy import depths, direct_edges, propagate
from hce_jax.typing import Bool, Float, Int

#: What a cell without a label is called, and the Cell Ontology id that it has then.
NO_LABEL, NO_TERM = "unassigned", "unknown"
#: Stands between the types of a path.
_BELOW = " > "


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
    """What is said of n cells; codes are those of the model's types, -1 for none.

    Attributes
    ----------
    codes
        The deepest type whose subtree mass passes the threshold of its depth.
    confidence
        That mass, calibrated where there is a calibration; 0 of a cell without a label.
    leaf_codes, leaf_confidence
        The most probable type, whatever its probability; and the same of it.
    next_codes
        Of the types right below the label (of a cell without one: of the topmost types), the one of the largest mass;
        -1 where none is below it.
    """

    codes: Int[np.ndarray, " n"]
    confidence: Float[np.ndarray, " n"]
    leaf_codes: Int[np.ndarray, " n"]
    leaf_confidence: Float[np.ndarray, " n"]
    next_codes: Int[np.ndarray, " n"]

    @classmethod
    def concatenate(cls, parts: Sequence["Labels"]) -> "Labels":
        """Put the cells of several together.

        Examples
        --------
        >>> none = np.array([], np.int16), np.array([], np.float32)
        >>> len(Labels.concatenate([Labels(none[0], none[1], none[0], none[1], none[0])]).codes)
        0
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in fields})


@dataclasses.dataclass(frozen=True, eq=False)
class Labeller:
    """Gives labels by probabilities.

    Attributes
    ----------
    labels, cl_ids
        Of the types (c,).
    reachability
        R (c, c).
    threshold
        Mass that a label's subtree must hold: one for all types, or by depth (n_depths,), infinite where no type of
        that depth is given.
    calibration
        Makes confidence of mass; None: the mass itself.

    Examples
    --------
    >>> reach = np.array([[1, 1, 1], [0, 1, 0], [0, 0, 1]])  # 1 and 2 below 0
    >>> labeller = Labeller(("T cell", "CD4 T cell", "CD8 T cell"), ("a", "b", "c"), reach, threshold=0.7)
    >>> given = labeller.label(np.array([[0.1, 0.5, 0.4]], np.float32), np.array([True]))
    >>> labeller.labels[given.codes[0]], labeller.labels[given.next_codes[0]], given.confidence.tolist()
    ('T cell', 'CD4 T cell', [1.0])
    """

    labels: tuple[str, ...]
    cl_ids: tuple[str, ...]
    reachability: np.ndarray
    threshold: float | Float[np.ndarray, " d"]
    calibration: Calibration | None = None

    def label(self, probabilities: Float[np.ndarray, "n c"], expressed: Bool[np.ndarray, " n"]) -> Labels:
        """Give the labels of some cells.

        Parameters
        ----------
        probabilities
            Of each type.
        expressed
            Whether a cell has any count in the model's genes; one that has none gets no label at all, for the model
            knows nothing of it.

        Raises
        ------
        CheckpointError
            If probabilities are not finite.
        """
        label = self._decoders.decode(BACKOFF, probabilities)
        leaf = self._decoders.decode("argmax", probabilities)
        next_codes = self._next(label.codes, self.masses(probabilities))

        def of_expressed(values: np.ndarray, otherwise: int, dtype: type) -> np.ndarray:
            return np.where(expressed, values, otherwise).astype(dtype)

        return Labels(
            codes=of_expressed(label.codes, UNASSIGNED, np.int16),
            confidence=of_expressed(self._calibrated(label.confidence, label.codes), 0, np.float32),
            leaf_codes=of_expressed(leaf.codes, UNASSIGNED, np.int16),
            leaf_confidence=of_expressed(self._calibrated(leaf.confidence, leaf.codes), 0, np.float32),
            next_codes=of_expressed(next_codes, UNASSIGNED, np.int16),
        )

    def masses(self, probabilities: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
        """Return the mass of every type's subtree: the sum of the probabilities of the type and those below it."""
        return propagate(probabilities, self.reachability)

    def table(self, given: Labels, barcodes: pd.Index) -> pd.DataFrame:
        """Return the columns of obs, with text for codes; all of one beginning, ``hce_``."""
        return pd.DataFrame(
            {
                "hce_label": self._texts(given.codes, self.labels, NO_LABEL),
                "hce_label_ontology_term_id": self._texts(given.codes, self.cl_ids, NO_TERM),
                "hce_confidence": given.confidence,
                "hce_leaf_label": self._texts(given.leaf_codes, self.labels, NO_LABEL),
                "hce_leaf_confidence": given.leaf_confidence,
                "hce_next_label": self._texts(given.next_codes, self.labels, ""),
                "hce_path": self._texts(given.codes, self.paths, ""),
            },
            index=barcodes,
        )

    def consensus(self, codes: Int[np.ndarray, " n"], groups: pd.Categorical) -> pd.DataFrame:
        """Give one label to each group of cells, a cluster: the deepest type that holds more than half of its cells.

        A type holds the cells whose own label is that type or below it. Where no type holds so many, the group has no
        label.

        Parameters
        ----------
        codes
            Labels of the cells.
        groups
            Which group each belongs to; cells of none have a missing value.

        Returns
        -------
        One row per group, in their order: ``group``, ``cells``, ``label``, ``label_ontology_term_id``, ``agreement``
        (the share of its cells that the label holds) and ``unassigned`` (the share of those without a label).
        """
        n_groups, n_types = len(groups.categories), len(self.labels)
        place_n = np.where(codes == UNASSIGNED, n_types, codes)[groups.codes >= 0]
        group_of_n = groups.codes[groups.codes >= 0].astype(np.int64)
        counts = np.bincount(group_of_n * (n_types + 1) + place_n, minlength=n_groups * (n_types + 1))
        counts_gc = counts.reshape(n_groups, n_types + 1)
        cells_g = counts_gc.sum(axis=1)
        share_gc = counts_gc[:, :-1] @ (np.asarray(self.reachability).T > 0) / np.maximum(cells_g, 1)[:, None]
        depth_gc = np.where(share_gc > 0.5, self._depths, -1)
        # Two types that each hold more than half can be equally deep, below several parents: the one that holds more.
        deepest_gc = np.where(depth_gc == depth_gc.max(axis=1, keepdims=True), share_gc, -1)
        codes_g = np.where(depth_gc.max(axis=1) < 0, UNASSIGNED, deepest_gc.argmax(axis=1))
        return pd.DataFrame(
            {
                "group": groups.categories.astype(str),
                "cells": cells_g,
                "label": self._texts(codes_g, self.labels, NO_LABEL).astype(str),
                "label_ontology_term_id": self._texts(codes_g, self.cl_ids, NO_TERM).astype(str),
                "agreement": np.where(codes_g == UNASSIGNED, 0.0, share_gc[np.arange(n_groups), codes_g]),
                "unassigned": counts_gc[:, -1] / np.maximum(cells_g, 1),
            }
        )

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """For each type the types above it, from the topmost, and itself; of several parents the deepest one."""
        edges_cc, paths = direct_edges(self.reachability), [""] * len(self.labels)
        for code in np.argsort(self._depths, kind="stable").tolist():  # parents have fewer ancestors
            parents = np.flatnonzero(edges_cc[:, code])
            above = [paths[parents[self._depths[parents].argmax()]]] if len(parents) else []
            paths[code] = _BELOW.join([*above, self.labels[code]])
        return tuple(paths)

    def _next(self, codes: Int[np.ndarray, " n"], mass_nc: Float[np.ndarray, "n c"]) -> Int[np.ndarray, " n"]:
        children_nc = self._children[codes]  # of -1, the last row: the topmost types
        next_n = np.where(children_nc, mass_nc, -1).argmax(axis=1)
        return np.where(children_nc.any(axis=1), next_n, UNASSIGNED)

    def _calibrated(self, mass_n: Float[np.ndarray, " n"], codes: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        if self.calibration is None:
            return mass_n
        confidence_n = self.calibration.confidence(mass_n, self._depths[np.maximum(codes, 0)])
        return np.where(codes == UNASSIGNED, 0, confidence_n)

    def _texts(self, codes: Int[np.ndarray, " n"], texts: Sequence[str], otherwise: str) -> pd.Categorical:
        """Return text for codes, as categories that occur; types of the same text are one."""
        all_texts = pd.Categorical([*texts, otherwise])
        every = pd.Categorical.from_codes(all_texts.codes[codes], all_texts.categories)  # of -1, the last: otherwise
        return every.remove_unused_categories()

    @cached_property
    def _decoders(self) -> Decoders:
        return Decoders(self.reachability, self.threshold)

    @cached_property
    def _depths(self) -> Int[np.ndarray, " c"]:
        return depths(self.reachability)

    @cached_property
    def _children(self) -> Bool[np.ndarray, "c d"]:
        """Right below each type (c + 1, c); the last row has the topmost types."""
        edges_cc = direct_edges(self.reachability)
        return np.vstack([edges_cc, ~edges_cc.any(axis=0)])
