"""The report of an annotation: one HTML file that says what was done, what came of it and what to look at first."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hce_jax.annotate.labels import NO_LABEL
from hce_jax.annotate.page import Content, Element, element, html, mark, marked, rounded, said_of, share, table
from hce_jax.annotate.report_doubts import look_first
from hce_jax.annotate.report_input import ReportInput
from hce_jax.annotate.report_pictures import histogram, pictures
from hce_jax.evaluation.calibration import MOST_HARDLY_JUDGED
from hce_jax.files import written_aside
from hce_jax.hierarchy import direct_edges, tree_order
from hce_jax.store.work_folder import named_in_errors

__all__ = ["ReportInput", "write_report"]

#: Shares of the model's genes, and of the counts in them, below which they are worth a look, and are bad.
_COVERAGE = (0.8, 0.5)
#: Shares of cells with a label; a promise of 5 % can well leave a tenth of good cells without one.
_LABELLED = (0.8, 0.5)
#: What :attr:`hce_jax.preprocess.scale.Scale.words` says where nothing of the counts is lost.
_COUNTS = ("raw counts", "whole counts")


def write_report(path: str | Path, report: ReportInput) -> None:
    """Write a report as one HTML file that needs nothing else: no script, and no picture or font from elsewhere.

    The same input gives the same bytes.

    Parameters
    ----------
    path
        The file; it appears when it is complete.
    report
        What it is made of.

    Raises
    ------
    StoreError
        If it cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> import pandas as pd
    >>> about = {"model": "linear", "ontology_release": None, "time": "2026-01-01", "versions": {"hce_jax": "0.1.0"},
    ...          "confidence": 0.8, "input": {"warnings": [], "notes": []}}
    >>> types, cell = (("B cell",), ("CL:0000236",), np.eye(1)), (np.array([0]), np.array([0.9]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "report.html"
    ...     write_report(path, ReportInput("cells.h5ad", about, *types, *cell, *cell, pd.Index(["AAAC-1"])))
    ...     "Cell types of cells.h5ad" in path.read_text(encoding="utf-8")
    True
    """
    chapters = (_summary, _checks, _tree, _confidence, pictures, look_first, _why, _everything)
    page = html(f"Cell types of {report.title}", [part for chapter in chapters for part in chapter(report)])
    with named_in_errors(Path(path)), written_aside(Path(path)) as aside:
        aside.write_bytes(page.encode("utf-8", "xmlcharrefreplace"))  # the name of a file can hold what is no text


def _summary(report: ReportInput) -> list[Element]:
    about, n_labels = report.about, len(report.by_frequency)
    release = f" of the Cell Ontology, release {about['ontology_release']}" if about["ontology_release"] else ""
    types = said_of(len(report.labels), "cell type")
    figures = [
        (f"{report.n_cells:,}", "cell" if report.n_cells == 1 else "cells"),
        (f"{report.n_labelled:,}", f"with a label ({share(report.n_labelled, report.n_cells)})"),
        (f"{n_labels:,}", "label" if n_labels == 1 else "different labels"),
        (f"{report.n_unassigned:,}", f"{NO_LABEL} ({share(report.n_unassigned, report.n_cells)})"),
    ]
    return [
        element("h1", f"Cell types of {report.title}"),
        element("p", f"Annotated by a model ({about['model']}) that knows {types}{release}."),
        element("p", f"{about['time']}, hce_jax {about['versions']['hce_jax']}", class_="small"),
        *_warnings(report),
        element("div", *(element("div", element("b", number), what) for number, what in figures), class_="figures"),
        element("p", *_how_fine(report)),
        element("p", *_promise(report)),
    ]


def _warnings(report: ReportInput) -> list[Element]:
    warnings = report.about["input"]["warnings"]
    if not warnings:
        return []
    title = element("h2", said_of(len(warnings), "warning"))
    return [element("section", title, _items(warnings), class_="warnings")]


def _how_fine(report: ReportInput) -> list[Content]:
    if not report.n_labelled:
        return ["No cell has a label: of none of them was the model sure enough, however wide the type."]
    n_finest = int(report.cells_of[(report.reachability > 0).sum(axis=1) == 1].sum())
    cells = said_of(n_finest, "cell")
    words = f" of the labels are as fine as the model knows them: types with nothing below them ({cells}). "
    n_wider = report.n_labelled - n_finest
    wider = f"{share(n_wider, report.n_labelled)} are wider, for those cells do not say more. " if n_wider else ""
    none = f"A cell is {NO_LABEL} where no type passes, not even a wide one." if report.n_unassigned else ""
    return [element("strong", share(n_finest, report.n_labelled)), words, wider, none]


def _promise(report: ReportInput) -> list[Content]:
    about = report.about
    if "max_error" not in about:
        mass = f"the type and those below it hold at least {about['confidence']:g} of the probability"
        return [element("strong", "No error is promised."), f" A label is the deepest type for which {mass}."]
    promise = element("strong", f"Of the labels at most {100 * about['max_error']:g} % should be wrong")
    meaning = (
        "A label is right if it is the author's label or one above it; whether a finer one is right the author's label "
        "does not tell, and it counts as neither right nor wrong."
    )
    return [promise, f": {about['calibration']}. {meaning} The less your cells are like those, the less this holds."]


def _checks(report: ReportInput) -> list[Element]:
    checked = [*_checked(report)]
    is_doubtful = any(sign.text == mark("bad").text for sign, _, _ in checked)
    checked += _expected(report, is_doubtful or report.about.get("hardly_judged", 0) > MOST_HARDLY_JUDGED)
    rows: list[list[Content]] = [[sign, check, found] for sign, check, found in checked]
    notes = report.about["input"]["notes"]
    return [
        element("h2", "Checks"),
        table(["", "check", "found"], rows),
        *([_items(notes, class_="small")] if notes else []),
    ]


def _checked(report: ReportInput) -> Iterator[tuple[Element, str, str]]:
    """Give mark, name and result of each check of which something is known."""
    about = report.about["input"]
    if "matrix" in about:
        yield mark("fine"), "matrix", about["matrix"]
    if "scale" in about:
        is_known = any(words in about["scale"] for words in _COUNTS)
        yield mark("fine" if is_known else "look"), "its values", about["scale"]
    if "species" in about:
        yield mark("fine"), "species", about["species"]
    if "genes_by" in about:
        yield mark("fine"), "genes matched by", about["genes_by"]
    if "genes_found" in about:
        found, of_all = about["genes_found"], about["genes_of_model"]
        words = f"{found:,} of {of_all:,} ({share(found, of_all)})"
        yield marked(found / of_all, _COVERAGE), "the model's genes in the file", words
    if "share_of_counts" in about:
        held = about["share_of_counts"]
        yield marked(held, _COVERAGE), "counts that lie in the model's genes", share(held, 1)
    labelled = report.n_labelled / max(report.n_cells, 1)
    words = f"{report.n_labelled:,} of {report.n_cells:,} ({share(report.n_labelled, report.n_cells)})"
    yield marked(labelled, _LABELLED), "cells with a label", words


def _expected(report: ReportInput, is_doubtful: bool) -> Iterator[tuple[Element, str, str]]:
    """Check the promise by the confidence; where there is reason to doubt that, it is never fine."""
    if "max_error" in report.about and report.n_labelled:
        max_error, wrong = report.about["max_error"], 1 - float(report.sure_of.sum()) / report.n_labelled
        words = (
            f"{share(wrong, 1)} of those that can be judged, if the confidence holds for these cells; errors below a "
            "coarse label of the calibration are not seen"
        )
        if "hardly_judged" in report.about:
            words += f". Of {share(report.about['hardly_judged'], 1)} of the labels the calibration says little"
        sign = mark("look") if is_doubtful and wrong <= max_error else marked(-wrong, (-max_error, -2 * max_error))
        yield sign, "labels expected to be wrong", words


def _tree(report: ReportInput) -> list[Element]:
    title = element("h2", "Labels on the ontology")
    if not report.n_labelled:
        return [title, element("p", "No cell has a label.")]
    key = element(
        "p",
        *("Cells labelled with the type itself (", element("span", "", class_="key own")),
        *("), and with a type below it (", element("span", "", class_="key below")),
        "). A type with several parents stands below one of them and is counted at all of them. "
        "Types without a cell at or below them are left out.",
        class_="small",
    )
    longest = max(int(report.cells_below.max()), report.n_unassigned)
    items = [element("li", _row(["type"], {}, "itself", "with those below", "row head")), *_roots(report, longest)]
    if n_none := report.n_unassigned:
        items.append(element("li", _row([NO_LABEL], {"own": n_none / longest}, f"{n_none:,}", "")))
    return [title, key, element("ul", *items, class_="tree")]


def _roots(report: ReportInput, longest: int) -> list[Element]:
    """Make nested items of the types with cells at or below them; gives the topmost. A full bar is ``longest``."""
    edges_cc = direct_edges(report.reachability)
    items: dict[int, Element] = {}
    roots = []
    for code in tree_order(report.reachability).tolist():
        own, below = int(report.cells_of[code]), int(report.cells_below[code])
        if not below:
            continue
        # One of its parents alone comes before it: depth first, each takes the children that are left.
        parent = next((each for each in items if edges_cc[each, code]), None)
        name: list[Content] = [f"{report.labels[code]} ", element("small", report.cl_ids[code])]
        others = [report.labels[each] for each in np.flatnonzero(edges_cc[:, code]).tolist() if each != parent]
        if others:
            name.append(element("small", f"; also below {' and '.join(others)}"))
        bars = {"own": own / longest, "below": (below - own) / longest}
        items[code] = element("li", _row(name, bars, f"{own:,}", f"{below:,}"))
        if parent is None:
            roots.append(items[code])
            continue
        if items[parent][-1].tag != "ul":
            items[parent].append(element("ul"))
        items[parent][-1].append(items[code])
    return roots


def _row(name: Sequence[Content], bars: dict[str, float], own: str, below: str, kind: str = "row") -> Element:
    """Make a row of the tree: a name, bars as shares of the room for them, by their class, and two numbers."""
    parts = [element("span", "", class_=each, style=f"width:{100 * size:.2f}%") for each, size in bars.items() if size]
    counts = [element("span", text, class_="count") for text in (own, below)]
    return element(
        "div", element("span", *name, class_="name"), element("span", *parts, class_="bar"), *counts, class_=kind
    )


def _confidence(report: ReportInput) -> list[Element]:
    if not report.n_labelled:
        return []
    about = report.about
    meaning = (
        "the share of such labels that were right on the cells of the calibration, of those that could be judged"
        if "max_error" in about
        else "the probability that the model gives to the label and all types below it"
    )
    needed = f" A label needs at least {about['confidence']:.2g} (dashed)." if "confidence" in about else ""
    words = (
        f"The confidence (hce_confidence) is {meaning}.{needed} The depth of a label is the number of its ancestors "
        "among the model's types. Each histogram has its own height."
    )
    given = np.unique(report.depths[report.by_frequency]).tolist()
    never = np.flatnonzero(np.isinf(about.get("thresholds", ()))).tolist()
    no_label = f"No label is given at depth {', '.join(map(str, never))}: there the model is never sure enough."
    return [
        element("h2", "How sure are the labels?"),
        element("p", words),
        element("div", *(_histogram(report, depth) for depth in given), class_="grid"),
        *([element("p", no_label, class_="small")] if never else []),
    ]


def _histogram(report: ReportInput, depth: int) -> Element:
    confidence = report.confidence[report.labelled & (report.depths[report.codes] == depth)]
    frequent = next(code for code in report.by_frequency if report.depths[code] == depth)
    words = f": {said_of(len(confidence), 'cell')}, most often {report.labels[frequent]}; "
    mean = f"mean {rounded(confidence.mean(dtype=np.float64))}"
    caption = element("figcaption", element("strong", f"Depth {depth}"), words, mean)
    return element("figure", caption, histogram(confidence, report.about.get("confidence")))


def _why(report: ReportInput) -> list[Element]:
    if not report.explanation:
        return []
    words = "What speaks for a label and against its nearest rival: the genes that tell the two apart in these cells."
    return [element("h2", "Why these labels?"), element("p", words), _items(report.explanation)]


def _everything(report: ReportInput) -> list[Element]:
    rows: list[list[Content]] = [[element("code", key), value] for key, value in _flat(report.about, "")]
    where = element("p", 'As it stands in the annotated file, in uns["hce_jax"].', class_="small")
    details = element("details", element("summary", "Show it"), where, table(["", ""], rows))
    return [element("h2", "All that was done"), details]


def _flat(about: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in about.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", "; ".join(map(_text, value)) or "none"
        else:
            yield f"{prefix}{key}", _text(value)


def _text(value: Any) -> str:
    return "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _items(texts: Sequence[str], **attributes: str) -> Element:
    return element("ul", *(element("li", text) for text in texts), **attributes)
