"""The metric files of an evaluation, and the tables that a person reads."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from hce_jax.errors import StoreError, UserError
from hce_jax.evaluation.decoders import BACKOFF, DECODERS, TEMPERATURE
from hce_jax.evaluation.hierarchical import calibration_table, decoder_scores, stratified_table
from hce_jax.evaluation.tally import Tally
from hce_jax.files import written_aside
from hce_jax.metrics import classification_report_frames, f1_from_counts, types_present
from hce_jax.store.work_folder import named_in_errors
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


#: The groups of cells that have a table each, as its file is called, and their column.
STRATA = {
    "assay": "assay",
    "dataset": "dataset_id",
    "disease": "disease",
    "tissue": "tissue",
    "tissue_general": "tissue_general",
}


class Rule(NamedTuple):
    """Over which types a macro average goes, and over which cells its interval is resampled.

    Attributes
    ----------
    labelled_only
        Only over types that occur among the labels; else also over those that are only predicted.
    resampled
        Column of the groups of cells that are drawn.
    """

    labelled_only: bool
    resampled: str


#: The published rules of the two evaluations; the interval is over what makes the noise.
RULES = {"id": Rule(labelled_only=False, resampled="donor_id"), "ood": Rule(labelled_only=True, resampled="dataset_id")}


class Reports(NamedTuple):
    """The tables of an evaluation.

    Attributes
    ----------
    overall
        The published averages: accuracy (or micro avg), macro avg, weighted avg; as the next two with the columns
        precision, recall, f1-score, support.
    per_type
        One row per type that is averaged over, indexed by its code as text.
    subset
        Averages over the types of the subset alone, or None where there is no subset.
    strata
        For each of the :data:`STRATA` one row per group.
    decoders
        One row per decoder: the ``confidence`` that it asked for or the ``max_error`` that it promised, if it does, its
        ``temperature`` T, if it has one, and every number of :func:`hce_jax.evaluation.hierarchical.decoder_scores`.
    calibration
        Of :func:`hce_jax.evaluation.hierarchical.calibration_table`.
    """

    overall: pd.DataFrame
    per_type: pd.DataFrame
    subset: pd.DataFrame | None
    strata: dict[str, pd.DataFrame]
    decoders: pd.DataFrame
    calibration: pd.DataFrame

    def files(self, model_type: str) -> dict[str, pd.DataFrame | None]:
        """Return the tables by the names of their files."""
        tables = {"overall": self.overall, "per_class": self.per_type, "subset": self.subset}
        tables |= {f"per_{name}": table for name, table in self.strata.items()}
        tables["hierarchical"] = self.decoders
        return {f"{model_type}_{name}_metrics.csv": table for name, table in tables.items()} | {
            f"{model_type}_calibration.csv": self.calibration
        }


def make_reports(
    tallies: Mapping[str, Tally],
    decoder: str,
    rule: Rule,
    lookups: Mapping[str, Sequence[str]],
    subset_labels: Int[np.ndarray, " k"] | None = None,
    *,
    backoff: Mapping[str, float],
    temperature: float | None = None,
) -> Reports:
    """Make the tables of what was counted. A prediction that is a descendant of the cell's label counts as the label.

    Parameters
    ----------
    tallies
        What was counted for each decoder.
    decoder
        Whose predictions all tables but that of the decoders are about.
    rule
        One of the :data:`RULES`.
    lookups
        Names of the groups of each column.
    subset_labels
        Codes to average over in the subset table; they need not occur. :func:`published_subset` gives those of the
        published store, :func:`read_subset` those of a file.
    backoff
        What back-off asked for, which the table of the decoders says: ``confidence`` or ``max_error``.
    temperature
        T, if one was counted as a decoder; the table says it too.

    Raises
    ------
    StoreError
        If there is no cell.

    Examples
    --------
    >>> from hce_jax.evaluation.tally import GROUP_COLUMNS
    >>> tally = Tally(np.array([[1, 1], [0, 1]]), dict.fromkeys(GROUP_COLUMNS, 1))  # type 1 is a kind of type 0
    >>> one = dict.fromkeys(GROUP_COLUMNS, np.zeros(2, int))
    >>> tally.add(np.array([0, 1]), np.array([1, 1]), np.array([0.9, 0.8]), one)
    >>> lookups = dict.fromkeys(GROUP_COLUMNS, ["blood"])
    >>> reports = make_reports({"argmax": tally}, "argmax", RULES["ood"], lookups, backoff={"confidence": 0.5})
    >>> float(reports.overall.loc["accuracy", "f1-score"])
    1.0
    """
    tally = tallies[decoder]
    if not tally.n_cells:
        raise StoreError("there is no cell to report on; choose another split, or other cells")
    labels, predictions = np.nonzero(tally.corrected)
    n_cells = tally.corrected[labels, predictions]
    types = types_present(labels)
    if not rule.labelled_only:
        types = np.union1d(types, predictions)
        types = types[types < len(tally.confusion)]  # the column behind the types: unassigned
    overall, per_type = classification_report_frames(labels, predictions, types, n_cells)
    subset = None
    if subset_labels is not None:
        subset, _ = classification_report_frames(labels, predictions, subset_labels, n_cells)
    nothing = {"confidence": np.nan, "max_error": np.nan, "temperature": np.nan}
    own = {BACKOFF: dict(backoff)} | ({} if temperature is None else {TEMPERATURE: {"temperature": temperature}})
    scores = {name: nothing | own.get(name, {}) | _scores(each, rule) for name, each in tallies.items()}
    return Reports(
        overall=overall,
        per_type=per_type,
        subset=subset,
        strata={name: stratified_table(tally.groups[column], lookups[column], name) for name, column in STRATA.items()},
        decoders=pd.DataFrame.from_dict(scores, orient="index").rename_axis("decoder"),
        calibration=calibration_table(tally.calibration),
    )


def _scores(tally: Tally, rule: Rule) -> dict[str, float]:
    groups = tally.groups[rule.resampled]
    return decoder_scores(tally.confusion, groups, tally.calibration, tally.reachability, rule.labelled_only)


def write_reports(folder: str | Path, model_type: str, reports: Reports) -> None:
    """Write the tables as CSV files, the published ones byte for byte as the published evaluation writes them.

    Parameters
    ----------
    folder
        Where the files go; made if it is not there.
    model_type
        The beginning of the files' names.
    reports
        Of :func:`make_reports`.

    Examples
    --------
    >>> write_reports("results", "linear", reports)  # doctest: +SKIP
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, table in reports.files(model_type).items():
        if table is not None:
            with named_in_errors(Path(folder) / name) as path, written_aside(path) as aside:
                table.to_csv(aside, index=table is not reports.calibration)


def overall_table(tally: Tally) -> str:
    """Lay out the averages for a terminal, and say what each of the two macro averages counts.

    Parameters
    ----------
    tally
        What was counted.

    Examples
    --------
    >>> from hce_jax.evaluation.tally import GROUP_COLUMNS
    >>> tally = Tally(np.eye(4), dict.fromkeys(GROUP_COLUMNS, 1))
    >>> one = dict.fromkeys(GROUP_COLUMNS, np.zeros(4, int))
    >>> tally.add(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 3]), np.ones(4), one)
    >>> print(overall_table(tally))
                           precision    recall        F1
    accuracy                                      0.7500
    macro, all types          0.6667    0.5000    0.5556
    macro, labelled types     1.0000    0.7500    0.8333
    weighted by cells         1.0000    0.7500    0.8333
    4 cells of 2 labelled types; 3 types among labels and predictions.
    All types: a type that is only predicted counts as 0 (macro avg of the id files).
    Labelled types: only types that occur among the labels (macro avg of the ood files).
    """
    right, predicted, actual = tally.counts
    scores = np.stack(
        [right / np.maximum(predicted, 1), right / np.maximum(actual, 1), f1_from_counts(tally.counts, "none")]
    )
    labelled, occurring = actual > 0, predicted + actual > 0
    averages = {
        "macro, all types": scores[:, occurring].mean(axis=1),
        "macro, labelled types": scores[:, labelled].mean(axis=1),
        "weighted by cells": scores @ actual / actual.sum(),
    }
    lines = [
        f"{'':22}{'precision':>10}{'recall':>10}{'F1':>10}",
        f"{'accuracy':22}{'':>20}{right.sum() / tally.n_cells:>10.4f}",
    ]
    lines += [f"{name:22}" + "".join(f"{score:>10.4f}" for score in row) for name, row in averages.items()]
    return "\n".join(
        [
            *lines,
            f"{tally.n_cells:,} cells of {labelled.sum()} labelled types; {occurring.sum()} types among labels and "
            "predictions.",
            "All types: a type that is only predicted counts as 0 (macro avg of the id files).",
            "Labelled types: only types that occur among the labels (macro avg of the ood files).",
        ]
    )


def decoder_name(
    decoder: str, confidence: float = np.nan, max_error: float = np.nan, temperature: float = np.nan
) -> str:
    """Name a decoder for a person, with the confidence that it asks for, the error that it promises, or its T.

    Examples
    --------
    >>> decoder_name("backoff", 0.9), decoder_name("backoff", max_error=0.05), decoder_name("argmax", 0.9)
    ('backoff 0.9', 'backoff, error <= 5 %', 'argmax')
    >>> decoder_name("temperature", temperature=1.834)
    'argmax, T = 1.83'
    """
    if decoder == TEMPERATURE:
        return f"{DECODERS[0]}, T = {temperature:.3g}"
    if decoder != BACKOFF:
        return decoder
    return f"{decoder} {confidence:g}" if np.isnan(max_error) else f"{decoder}, error <= {100 * max_error:g} %"


def decoder_table(decoders: pd.DataFrame) -> str:
    """Lay out the comparison of the decoders for a terminal.

    Parameters
    ----------
    decoders
        Of :class:`Reports`.

    Examples
    --------
    >>> print(decoder_table(reports.decoders))  # doctest: +SKIP
    """
    shares = ["exact", "descendant", "ancestor", "sibling", "elsewhere", "unassigned"]
    asked_for = decoders[["confidence", "max_error", "temperature"]]
    names = [decoder_name(str(name), **row) for name, row in asked_for.iterrows()]
    width = max(13, *(len(name) + 2 for name in names))
    columns = f"{'macro F1 (95 %)':24}{'accuracy':>9}{'hier. F1':>9}{'distance':>9}{'ECE':>7}{'wrong':>7}"
    lines = [f"{'decoder':{width}}{columns}   {'/'.join(shares)}"]
    for name, (_, row) in zip(names, decoders.iterrows(), strict=True):
        interval = "" if np.isnan(row["f1_macro_low"]) else f" ({row['f1_macro_low']:.4f}-{row['f1_macro_high']:.4f})"
        lines.append(
            f"{name:{width}}{f'{row.f1_macro:.4f}{interval}':24}{row['accuracy']:>9.4f}"
            f"{row['hierarchical_f1']:>9.4f}{row['ontology_distance']:>9.3f}{row['ece']:>7.3f}{row['wrong']:>7.3f}   "
            + "/".join(f"{row[share]:.3f}" for share in shares)
        )
    return "\n".join(lines)


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
