"""What an evaluation counts while it predicts: as little for ten million cells as for ten thousand."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

#: Columns whose values are groups of cells that are scored one by one, and the donors, over whom is resampled.
GROUP_COLUMNS = ("assay", "dataset_id", "disease", "tissue", "tissue_general", "donor_id")
#: Equal-width bins of confidence: a multiple of the 15 of a reliability diagram, fine enough for a curve.
CONFIDENCE_BINS = 1_500


class Tally:
    """Counts of a decoder's predictions. Whole numbers: those of several batches add up to exactly those of all.

    Parameters
    ----------
    reachability
        R (c, c).
    n_groups
        Number of groups of each of the :data:`GROUP_COLUMNS`.

    Attributes
    ----------
    confusion
        Cells by label and prediction, not corrected (c, c + 1); the last column counts the unassigned.
    groups
        For each column: of each group the cells rightly predicted, predicted, and labelled as each type (n, 3, c),
        after a prediction below the label has been counted as the label.
    calibration
        Of each bin of confidence: cells, sum of their confidence, cells predicted rightly (the label, or below it)
        (k, 3); without the unassigned.

    Examples
    --------
    >>> tally = Tally(np.array([[1, 1], [0, 1]]), {column: 1 for column in GROUP_COLUMNS})
    >>> one = {column: np.zeros(2, int) for column in GROUP_COLUMNS}
    >>> tally.add(np.array([0, 1]), np.array([1, -1]), np.array([0.9, 0.0]), one)
    >>> tally.confusion.tolist()
    [[0, 1, 0], [0, 0, 1]]
    >>> tally.groups["assay"].tolist()
    [[[1, 0], [1, 0], [1, 1]]]
    """

    def __init__(self, reachability: np.ndarray, n_groups: Mapping[str, int]):
        n_types = len(reachability)
        self.reachability = reachability
        self._accepted = np.column_stack([reachability > 0, np.zeros(n_types, bool)])  # unassigned is never right
        self.confusion: Int[np.ndarray, "c d"] = np.zeros((n_types, n_types + 1), np.int64)
        self.groups: dict[str, Int[np.ndarray, "n 3 c"]] = {
            column: np.zeros((n_groups[column], 3, n_types), np.int64) for column in GROUP_COLUMNS
        }
        self.calibration: Float[np.ndarray, "k 3"] = np.zeros((CONFIDENCE_BINS, 3))

    def add(
        self,
        labels: Int[np.ndarray, "n"],
        predictions: Int[np.ndarray, "n"],
        confidence: Float[np.ndarray, "n"],
        groups: Mapping[str, Int[np.ndarray, "n"]],
    ) -> None:
        """Count some cells.

        Parameters
        ----------
        labels
            Codes of their types.
        predictions
            Codes, not corrected; -1 for unassigned.
        confidence
            In [0, 1].
        groups
            For each of the :data:`GROUP_COLUMNS` the code of each cell's group.
        """
        n_types = len(self.confusion)
        places = labels * (n_types + 1) + predictions % (n_types + 1)
        self.confusion += np.bincount(places, minlength=self.confusion.size).reshape(self.confusion.shape)

        right = self._accepted[labels, predictions]
        corrected = np.where(right, labels, predictions)
        assigned = np.flatnonzero(predictions >= 0)
        for column, counts in self.groups.items():
            first = 3 * n_types * groups[column]  # where the counts of each cell's group begin
            np.add.at(counts.reshape(-1), (first + labels)[right], 1)
            np.add.at(counts.reshape(-1), (first + n_types + corrected)[assigned], 1)
            np.add.at(counts.reshape(-1), first + 2 * n_types + labels, 1)

        confidence = confidence[assigned].astype(np.float64)
        bins = np.minimum((confidence * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)
        for place, weights in enumerate((None, confidence, right[assigned])):
            self.calibration[:, place] += np.bincount(bins, weights, minlength=CONFIDENCE_BINS)

    @property
    def n_cells(self) -> int:
        """Cells counted."""
        return int(self.confusion.sum())

    @property
    def corrected(self) -> Int[np.ndarray, "c d"]:
        """Cells by label and prediction (c, c + 1), a prediction below the label counted as the label."""
        return corrected_confusion(self.confusion, self.reachability)

    @property
    def counts(self) -> Int[np.ndarray, "3 c"]:
        """Cells rightly predicted, predicted, and labelled as each type, after correction."""
        corrected = self.corrected[:, :-1]
        return np.stack([corrected.diagonal(), corrected.sum(axis=0), self.confusion.sum(axis=1)])


def corrected_confusion(confusion: Int[np.ndarray, "c d"], reachability: np.ndarray) -> Int[np.ndarray, "c d"]:
    """Count predictions below the label as the label.

    Parameters
    ----------
    confusion
        Cells by label and prediction (c, c + 1); the last column counts the unassigned, which are never right.
    reachability
        R (c, c).

    Examples
    --------
    >>> corrected_confusion(np.array([[5, 2, 1], [3, 4, 0]]), np.array([[1, 1], [0, 1]])).tolist()
    [[7, 0, 1], [3, 4, 0]]
    """
    accepted = np.column_stack([np.asarray(reachability) > 0, np.zeros(len(confusion), bool)])
    corrected = np.where(accepted, 0, confusion)
    types = np.arange(len(corrected))
    corrected[types, types] = np.where(accepted, confusion, 0).sum(axis=1)
    return corrected
