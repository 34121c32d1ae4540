"""What the report of an annotation is made of, and what is counted of it."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from hce_jax.annotate.labels import NO_LABEL
from hce_jax.evaluation.decoders import UNASSIGNED
from hce_jax.hierarchy import depths
from hce_jax.typing import Bool, Float, Int


@dataclasses.dataclass(frozen=True, eq=False)
class ReportInput:
    """What a report is made of.

    Attributes
    ----------
    title
        Name of the input.
    about
        What was done, as written to ``uns["hce_jax"]``: ``model``, ``ontology_release`` (or None), ``time`` and
        ``versions``; ``confidence``, which a label needs, or ``max_error`` with ``thresholds`` (by depth; infinite
        where no label is given), ``calibration`` (a sentence) and ``hardly_judged`` (the share of labels of which the
        calibration says little), where ``confidence`` may stand, too; and ``input``
        with ``warnings``, ``notes`` and, as far as they are known, ``matrix``, ``scale``, ``species``, ``genes_by``,
        ``genes_found`` with ``genes_of_model``, and ``share_of_counts``. Whatever else it holds is listed.
    labels, cl_ids
        Names and Cell Ontology ids of the types (c,).
    reachability
        R (c, c).
    codes, confidence
        The label of each cell (n,), -1 for none, and how sure it is, in [0, 1].
    leaf_codes, leaf_confidence
        The same of the most probable type.
    barcodes
        Names of the cells (n,).
    picture
        Where the cells lie, (n, 2), for example as a UMAP, with its name; None: there is none.
    groups
        One row per cluster: ``group``, ``cells``, ``label``, ``agreement`` (the share of its cells that the label
        holds) and ``unassigned`` (the share without a label); None: none were given.
    explanation
        Sentences, one per label, that say what speaks for it.
    """

    title: str
    about: dict[str, Any]
    labels: tuple[str, ...]
    cl_ids: tuple[str, ...]
    reachability: np.ndarray
    codes: Int[np.ndarray, " n"]
    confidence: Float[np.ndarray, " n"]
    leaf_codes: Int[np.ndarray, " n"]
    leaf_confidence: Float[np.ndarray, " n"]
    barcodes: pd.Index
    picture: tuple[str, np.ndarray] | None = None
    groups: pd.DataFrame | None = None
    explanation: Sequence[str] = ()

    def name(self, code: int) -> str:
        """Return what a code means."""
        return NO_LABEL if code == UNASSIGNED else self.labels[code]

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.codes)

    @property
    def n_labelled(self) -> int:
        """Number of cells with a label."""
        return int(self.cells_of.sum())

    @property
    def n_unassigned(self) -> int:
        """Number of cells without one."""
        return self.n_cells - self.n_labelled

    @cached_property
    def labelled(self) -> Bool[np.ndarray, " n"]:
        """Which cells have a label."""
        return self.codes != UNASSIGNED

    @cached_property
    def cells_of(self) -> Int[np.ndarray, " c"]:
        """Number of cells with each label."""
        return np.bincount(self.codes[self.labelled], minlength=len(self.labels))

    @cached_property
    def cells_below(self) -> Int[np.ndarray, " c"]:
        """Number of cells whose label is a type or lies below it."""
        return (self.reachability > 0).astype(np.int64) @ self.cells_of

    @cached_property
    def sure_of(self) -> Float[np.ndarray, " c"]:
        """Sum of the confidence of the cells with each label: how many are expected to be right, if all are judged."""
        return np.bincount(self.codes[self.labelled], self.confidence[self.labelled], len(self.labels))

    @cached_property
    def depths(self) -> Int[np.ndarray, " c"]:
        """Number of ancestors of each type."""
        return depths(self.reachability)

    @cached_property
    def by_frequency(self) -> list[int]:
        """The labels that occur, the most frequent first."""
        return np.argsort(-self.cells_of, kind="stable")[: np.count_nonzero(self.cells_of)].tolist()
