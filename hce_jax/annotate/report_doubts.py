"""What to look at first in an annotation: mixed clusters, doubtful labels, doubtful cells."""

import numpy as np

from hce_jax.annotate.labels import NO_LABEL
from hce_jax.annotate.page import Content, Element, element, marked, rounded, share, table
from hce_jax.annotate.report_input import ReportInput
from hce_jax.evaluation.decoders import UNASSIGNED
from hce_jax.typing import Int

#: Rows of a table of labels, and of cells; finest types named beside a label.
_MOST_LABELS, _MOST_CELLS, _MOST_LEAVES = 10, 20, 3
#: Agreement of a cluster below which it is worth a look, and is bad.
_AGREEMENT = (0.8, 0.6)


def look_first(report: ReportInput) -> list[Element]:
    """Make the chapter: tables, each with what is most doubtful on top.

    Parameters
    ----------
    report
        What the report is made of.

    Examples
    --------
    >>> import pandas as pd
    >>> types, none = (("B cell",), ("CL:0000236",), np.eye(1)), (np.array([-1]), np.array([0.0]))
    >>> empty = ReportInput("cells.h5ad", {}, *types, *none, *none, pd.Index(["AAAC-1"]))
    >>> [part.text for part in look_first(empty)]
    ['What to look at first', 'Nothing: no cell has a label, and none has a most probable type.']
    """
    parts = [*_mixed_groups(report), *_disagreeing_labels(report), *_doubtful_labels(report), *_doubtful_cells(report)]
    nothing = element("p", "Nothing: no cell has a label, and none has a most probable type.")
    return [element("h2", "What to look at first"), *(parts or [nothing])]


def _mixed_groups(report: ReportInput) -> list[Element]:
    if report.groups is None:
        return []
    ranked = report.groups.sort_values(["agreement", "cells"], ascending=[True, False], kind="stable")
    columns = (ranked[name].tolist() for name in ("group", "cells", "label", "agreement", "unassigned"))
    rows: list[list[Content]] = [
        [
            marked(agreement, _AGREEMENT),
            *(str(group), f"{cells:,}", str(label), share(agreement, 1), share(unassigned, 1)),
        ]
        for group, cells, label, agreement, unassigned in zip(*columns, strict=True)
    ]
    words = (
        "The label of a cluster is the deepest type that holds more than half of its cells. Agreement is the share of "
        "its cells whose own label is that type or below it; a low one says that the cluster is mixed or hard to name."
    )
    return [
        element("h3", "Clusters, the most mixed first"),
        element("p", words, class_="small"),
        table(["", "cluster", "cells", "label", "agreement", NO_LABEL], rows, numbers=[2, 4, 5]),
    ]


def _disagreeing_labels(report: ReportInput) -> list[Element]:
    """Rank labels, and none, by the number of their cells whose most probable type is another one."""
    n_types = len(report.labels)
    given = report.leaf_codes != UNASSIGNED
    place_n = np.where(report.labelled, report.codes, n_types)[given].astype(np.int64)  # after the types: no label
    pairs = np.bincount(place_n * n_types + report.leaf_codes[given], minlength=(n_types + 1) * n_types)
    others = pairs.reshape(n_types + 1, n_types)
    np.fill_diagonal(others, 0)
    is_finer = np.vstack([report.reachability > 0, np.ones(n_types, bool)])  # any type is finer than none
    is_wider = np.vstack([report.reachability.T > 0, np.zeros(n_types, bool)])
    finer, wider, elsewhere = ((others * each).sum(axis=1) for each in (is_finer, is_wider, ~is_finer & ~is_wider))
    cells = np.append(report.cells_of, report.n_unassigned)
    ranked = np.argsort(-others.sum(axis=1), kind="stable")[:_MOST_LABELS].tolist()
    rows = [
        [
            NO_LABEL if code == n_types else report.labels[code],
            *(f"{each[code]:,}" for each in (cells, finer, wider, elsewhere)),
            _most(report, others[code]),
        ]
        for code in ranked
        if others[code].any()
    ]
    if not rows:
        return []
    words = (
        "Cells whose most probable type (hce_leaf_label) is not their label. Finer: it lies below the label, and was "
        "not sure enough. Wider: it lies above; the label and the types below it, together, were sure enough. "
        "Elsewhere: it lies in another branch; look at these cells first."
    )
    return [
        element("h3", "Labels that are not the most probable type"),
        element("p", words, class_="small"),
        table(["label", "cells", "finer", "wider", "elsewhere", "most probable, instead"], rows, numbers=[1, 2, 3, 4]),
    ]


def _most(report: ReportInput, counts: Int[np.ndarray, " c"]) -> str:
    """Name the most frequent types with their shares."""
    order = np.argsort(-counts, kind="stable")[:_MOST_LEAVES].tolist()
    n_cells, of_all = counts.tolist(), int(counts.sum())
    return "; ".join(f"{report.labels[code]} {share(n_cells[code], of_all)}" for code in order if n_cells[code])


def _doubtful_labels(report: ReportInput) -> list[Element]:
    if not report.n_labelled:
        return []
    means = report.sure_of / np.maximum(report.cells_of, 1)
    ranked = sorted(report.by_frequency, key=means.__getitem__)[:_MOST_LABELS]
    rows = [
        [
            report.labels[code],
            f"{report.cells_of[code]:,}",
            rounded(means[code]),
            f"{report.cells_of[code] - report.sure_of[code]:,.1f}",
        ]
        for code in ranked
    ]
    words = (
        "Expected to be wrong, if the confidence holds and all of them can be judged: the cells times what the mean "
        "confidence lacks to 1."
    )
    return [
        element("h3", "Labels of the lowest confidence"),
        element("p", words, class_="small"),
        table(["label", "cells", "mean confidence", "expected to be wrong"], rows, numbers=[1, 2, 3]),
    ]


def _doubtful_cells(report: ReportInput) -> list[Element]:
    if not report.n_labelled:
        return []
    rows = np.flatnonzero(report.labelled)
    least = rows[np.argsort(report.confidence[rows], kind="stable")[:_MOST_CELLS]].tolist()
    cells: list[list[Content]] = [
        [
            element("code", str(report.barcodes[row])),
            report.name(int(report.codes[row])),
            rounded(float(report.confidence[row])),
            report.name(int(report.leaf_codes[row])),
            rounded(float(report.leaf_confidence[row])),
        ]
        for row in least
    ]
    header = ["cell", "label", "confidence", "most probable type", "its confidence"]
    return [element("h3", "The least sure of the cells with a label"), table(header, cells, numbers=[2, 4])]
