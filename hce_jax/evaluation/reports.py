"""The metric files of the in-distribution evaluation, and the table that a person reads."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from hce_jax.errors import StoreError, UserError
from hce_jax.files import written_aside
from hce_jax.hierarchy.reachability import correct_predictions
from hce_jax.metrics import classification_report_frames
from hce_jax.typing import Int

#: Codes of the 80 shared cell types over which the published evaluation of the held-out donors averages once more
#: (microsoft/hce-classification).
# fmt: off
PUBLISHED_SUBSET = (
    0, 3, 5, 10, 14, 17, 18, 19, 20, 21, 22, 24, 34, 35, 36, 40, 43, 46, 47, 49, 50, 52, 53, 54, 59, 60, 63, 64, 65, 68,
    70, 77, 78, 79, 80, 82, 83, 86, 90, 92, 94, 96, 99, 100, 101, 104, 106, 107, 108, 109, 113, 114, 116, 117, 118, 119,
    122, 123, 124, 125, 127, 128, 129, 130, 131, 132, 133, 134, 135, 136, 138, 140, 141, 144, 145, 154, 155, 161, 162,
    163,
)
# fmt: on

#: SHA-256 of the published store's 164 labels in the order of their codes, joined by newlines. The subset's codes mean
#: something for this list alone.
PUBLISHED_LABELS_SHA256 = "dbb5bca6ce7cc8e5be9dd58e0310075a4343aff351715d3980847ea77f0e7530"


class IdReports(NamedTuple):
    """The tables of an in-distribution evaluation; the columns of each are precision, recall, f1-score, support.

    Attributes
    ----------
    overall
        Rows accuracy, macro avg, weighted avg, over every type among the labels or the corrected predictions.
    per_type
        One row per such type, indexed by its code as text.
    subset
        Averages over the types of the subset alone, or None where there is no subset.
    """

    overall: pd.DataFrame
    per_type: pd.DataFrame
    subset: pd.DataFrame | None


def published_subset(type_labels: Sequence[str]) -> np.ndarray | None:
    """Give the codes of the published subset if these are the published store's 164 cell types, else None.

    Parameters
    ----------
    type_labels
        A store's cell types, in the order of their codes.

    Examples
    --------
    >>> published_subset(["B cell", "T cell"]) is None
    True
    """
    digest = hashlib.sha256("\n".join(type_labels).encode()).hexdigest()
    return np.array(PUBLISHED_SUBSET) if digest == PUBLISHED_LABELS_SHA256 else None


def read_subset(path: str | Path, type_labels: Sequence[str]) -> np.ndarray:
    """Read the cell types of a subset table: a file with one type a line, its label or its code.

    Parameters
    ----------
    path
        A text file. Empty lines do not count.
    type_labels
        The store's cell types, in the order of their codes.

    Returns
    -------
    Codes (k,), in the order of the file.

    Raises
    ------
    UserError
        If the file is not there, holds no type, or a line names no type of the store or one named before.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "subset.txt"
    ...     _ = path.write_text("T cell" + chr(10) + "0")
    ...     read_subset(path, ["B cell", "T cell"]).tolist()
    [1, 0]
    """
    if not Path(path).is_file():
        raise UserError(f"no such file: {path}; it should name one cell type a line, by label or code")
    code_of = {label: code for code, label in enumerate(type_labels)}
    codes: list[int] = []
    # A byte that is not UTF-8 makes its line an unknown type, which is named.
    for number, line in enumerate(Path(path).read_text(errors="replace").splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        code = code_of.get(name, int(name) if name.isdecimal() else -1)
        if not 0 <= code < len(type_labels):
            near = difflib.get_close_matches(name, type_labels, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"give a label or a code of 0 to {len(type_labels) - 1}"
            raise UserError(f"{path}, line {number}: {name!r} is no cell type of this store; {hint}")
        if code in codes:
            raise UserError(f"{path}, line {number}: {name!r} is named twice; give each cell type once")
        codes.append(code)
    if not codes:
        raise UserError(f"{path} names no cell type; give one a line, by label or code")
    return np.array(codes)


def write_id_reports(
    folder: str | Path,
    model_type: str,
    targets: Int[np.ndarray, " n"],
    predictions: Int[np.ndarray, " n"],
    reachability: np.ndarray,
    subset_labels: Int[np.ndarray, " k"] | None = None,
) -> IdReports:
    """Write the metric files of a held-out split and return their tables.

    A prediction that is a descendant of the cell's label counts as the label. The files are
    ``{model_type}_overall_metrics.csv``, ``{model_type}_per_class_metrics.csv`` and, with ``subset_labels``,
    ``{model_type}_subset_metrics.csv``, byte for byte as the published evaluation writes them.

    Parameters
    ----------
    folder
        Where the files go; made if it is not there.
    model_type
        ``linear``, ``mlp`` or ``tabnet``: the beginning of the files' names.
    targets
        Labels of the split's cells (codes).
    predictions
        Predicted types, uncorrected: the argmax of the probabilities.
    reachability
        R (c, c): 1 at [i, j] when type j is i or a descendant of i.
    subset_labels
        Codes to average over in the subset table; they need not occur. :func:`published_subset` gives those of the
        published store, :func:`read_subset` those of a file.

    Raises
    ------
    StoreError
        If there is no cell.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> reachability = np.array([[1, 1], [0, 1]])  # type 1 is a kind of type 0
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     reports = write_id_reports(folder, "linear", np.array([0, 1]), np.array([1, 1]), reachability)
    >>> float(reports.overall.loc["accuracy", "f1-score"])
    1.0
    """
    if targets.size == 0:
        raise StoreError("the split holds no cells, so there is nothing to report on; choose another split")
    corrected = np.asarray(correct_predictions(targets, predictions, reachability))
    overall, per_type = classification_report_frames(targets, corrected)
    subset = None
    if subset_labels is not None:
        subset, _ = classification_report_frames(targets, corrected, subset_labels)
    reports = IdReports(overall, per_type, subset)

    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, table in zip(("overall", "per_class", "subset"), reports, strict=True):
        path = Path(folder) / f"{model_type}_{name}_metrics.csv"
        if table is None:
            path.unlink(missing_ok=True)  # an older evaluation's must not lie beside the new ones
        else:
            with written_aside(path) as aside:
                table.to_csv(aside)
    return reports


def overall_table(overall: pd.DataFrame, per_type: pd.DataFrame) -> str:
    """Lay out the averages for a terminal, and say what each of the two macro averages counts.

    Parameters
    ----------
    overall, per_type
        As :func:`hce_jax.metrics.classification_report_frames` gives them without a label list.

    Examples
    --------
    >>> import numpy as np
    >>> print(overall_table(*classification_report_frames(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 3]))))
                           precision    recall        F1
    accuracy                                      0.7500
    macro, all types          0.6667    0.5000    0.5556
    macro, labelled types     1.0000    0.7500    0.8333
    weighted by cells         1.0000    0.7500    0.8333
    4 cells of 2 labelled types; 3 types among labels and predictions.
    All types: a type that is only predicted counts as 0 (macro avg of the id files).
    Labelled types: only types that occur among the labels (the ood rule).
    """
    labelled = per_type[per_type["support"] > 0]
    averages = {
        "macro, all types": overall.loc["macro avg"],
        "macro, labelled types": labelled.mean(),
        "weighted by cells": overall.loc["weighted avg"],
    }
    lines = [
        f"{'':22}{'precision':>10}{'recall':>10}{'F1':>10}",
        f"{'accuracy':22}{'':>20}{overall['f1-score']['accuracy']:>10.4f}",
    ]
    for name, row in averages.items():
        precision, recall, f1 = row[["precision", "recall", "f1-score"]]
        lines.append(f"{name:22}{precision:>10.4f}{recall:>10.4f}{f1:>10.4f}")
    n_cells = int(per_type["support"].sum())
    lines += [
        f"{n_cells:,} cells of {len(labelled)} labelled types; {len(per_type)} types among labels and predictions.",
        "All types: a type that is only predicted counts as 0 (macro avg of the id files).",
        "Labelled types: only types that occur among the labels (the ood rule).",
    ]
    return "\n".join(lines)
