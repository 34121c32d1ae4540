"""The pictures of an annotation's report: histograms of the confidence as SVG, cells as points in PNG."""

import base64
import io

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from hce_jax.annotate.labels import NO_LABEL
from hce_jax.annotate.page import Content, Element, element, said_of
from hce_jax.annotate.report_input import ReportInput
from hce_jax.evaluation.decoders import UNASSIGNED
from hce_jax.typing import Float, Int

#: For labels, the most frequent first. Each is as far from those before it, and from grey, as colours allow that can be
#: seen on white: by CIE 1976 distance, the least of normal sight and, counted 1.6 times, of the three kinds of colour
#: blindness after Machado et al., IEEE Trans. Vis. Comput. Graph. 15, 1291, 2009. That does for the first few; numbers
#: in the picture tell all of them apart.
COLOURS = (
    *("#0078b4", "#ff780f", "#c300ff", "#874b0f", "#4be169", "#ff5af0", "#ff003c", "#a50f87", "#c31e4b", "#783cc3"),
    *("#69b469", "#f0a5f0", "#69a5ff", "#96d23c", "#96783c", "#6900ff", "#874b69", "#2d69ff", "#f000b4", "#87d2a5"),
)
#: Of cells with a label that has no colour of its own, and of those without a label.
OTHER_COLOUR, UNASSIGNED_COLOUR = "#b4b4b4", "#646464"
_OTHER, _UNASSIGNED = -1, -2

#: Points of a picture; of more cells, so many chosen at random. They are drawn over each other in a random order, so
#: that no label hides another. Both are the same every time.
_MOST_POINTS, _SEED = 50_000, 0
#: What the keys of obsm are called.
_NAMES = {"X_umap": "UMAP", "X_tsne": "t-SNE", "X_pca": "PCA"}

#: Inches and dots of the square that cells are drawn in.
_SQUARE, _DOTS_PER_INCH = 5.2, 140
_N_BINS = 20
#: Units of the SVG: what is drawn in, and the room for the numbers of the axis below and beside.
_WIDTH, _HEIGHT, _BELOW, _SIDE = 240, 70, 14, 8


def histogram(values: Float[np.ndarray, " n"], threshold: float | None) -> Element:
    """Draw how often values occur, in bins of 0.05 from 0 to 1; the highest bar fills the height.

    Parameters
    ----------
    values
        In [0, 1].
    threshold
        Where a dashed line stands; None: nowhere.

    Examples
    --------
    >>> drawn = histogram(np.array([0.5, 0.52, 0.99]), None)
    >>> [float(bar.get("height")) for bar in drawn.iter("rect")]
    [70.0, 35.0]
    """
    counts, edges = np.histogram(values, _N_BINS, (0, 1))
    inner = _WIDTH - 2 * _SIDE
    parts = []
    for start, height in zip(edges[:-1], _HEIGHT * counts / max(counts.max(), 1), strict=True):
        if height:
            size = {"width": f"{inner / _N_BINS - 1:.1f}", "height": f"{height:.1f}"}
            parts.append(element("rect", x=f"{_SIDE + inner * start:.1f}", y=f"{_HEIGHT - height:.1f}", **size))
    parts.append(element("line", x1=str(_SIDE), x2=str(_WIDTH - _SIDE), y1=str(_HEIGHT), y2=str(_HEIGHT)))
    for value in (0, 0.25, 0.5, 0.75, 1):
        place = {"x": f"{_SIDE + inner * value:.1f}", "y": str(_HEIGHT + 11)}
        parts.append(element("text", f"{value:g}", text_anchor="middle", **place))
    if threshold is not None:
        x = f"{_SIDE + inner * threshold:.1f}"
        parts.append(element("line", x1=x, x2=x, y1="0", y2=str(_HEIGHT), class_="threshold"))
    box = f"0 -2 {_WIDTH} {_HEIGHT + _BELOW + 2}"
    return element("svg", *parts, viewBox=box, role="img", aria_label="histogram of the confidence")


def pictures(report: ReportInput) -> list[Element]:
    """Make the chapter with the cells in the plane: by label, and by confidence.

    Parameters
    ----------
    report
        What the report is made of.

    Examples
    --------
    >>> import pandas as pd
    >>> types, cell = (("B cell",), ("CL:0000236",), np.eye(1)), (np.array([0]), np.array([0.9]))
    >>> one = ReportInput("x", {}, *types, *cell, *cell, pd.Index(["AAAC-1"]), ("X_umap", np.zeros((1, 2))))
    >>> [image.get("alt") for part in pictures(one) for image in part.iter("img")]
    ['UMAP of the cells by label', 'UMAP of the cells by confidence']
    """
    if report.picture is None:
        return []
    key, points = report.picture
    rows = np.flatnonzero(np.isfinite(points).all(axis=1))
    if not len(rows):
        return []
    name = _NAMES.get(key, key)
    words = f"{name}, as it is in the file"
    if len(rows) > _MOST_POINTS:
        words += f"; {_MOST_POINTS:,} of {len(rows):,} cells, chosen at random"
        rows = np.sort(np.random.default_rng(_SEED).choice(rows, _MOST_POINTS, replace=False))
    points = points[rows].astype(np.float64)
    drawn = [_by_label(report, rows, points, name)]
    if report.n_labelled:
        drawn.append(_by_confidence(report, rows, points, name))
    return [
        element("h2", "Where the cells lie"),
        element("p", f"{words}."),
        element("div", *drawn, class_="pictures"),
    ]


def _by_label(report: ReportInput, rows: Int[np.ndarray, " k"], points: Float[np.ndarray, "k 2"], name: str) -> Element:
    shown, others = report.by_frequency[: len(COLOURS)], report.by_frequency[len(COLOURS) :]
    place_of = np.full(len(report.labels) + 1, _OTHER)
    place_of[shown] = range(len(shown))
    place_of[UNASSIGNED] = _UNASSIGNED  # -1: the last
    place_k = place_of[report.codes[rows]]
    colours_k = to_rgba_array([*COLOURS, UNASSIGNED_COLOUR, OTHER_COLOUR])[place_k]
    numbers = {str(place + 1): points[place_k == place] for place in range(len(shown)) if (place_k == place).any()}
    entries = [
        (COLOURS[place], str(place + 1), f"{report.labels[code]}, {report.cells_of[code]:,}")
        for place, code in enumerate(shown)
    ]
    if others:
        n_others = int(report.cells_of[others].sum())
        entries.append((OTHER_COLOUR, "", f"{said_of(len(others), 'other label')}, {n_others:,}"))
    if report.n_unassigned:
        entries.append((UNASSIGNED_COLOUR, "", f"{NO_LABEL}, {report.n_unassigned:,}"))
    legend = [element("li", _swatch(colour, number), text) for colour, number, text in entries]
    return element(
        "figure",
        element("figcaption", element("strong", "By label"), ", with the number of cells"),
        element("img", src=_draw(points, colours_k, numbers), alt=f"{name} of the cells by label"),
        element("ul", *legend, class_="legend"),
    )


def _by_confidence(
    report: ReportInput, rows: Int[np.ndarray, " k"], points: Float[np.ndarray, "k 2"], name: str
) -> Element:
    labelled_k, confidence_k = report.labelled[rows], report.confidence[rows]
    # Where the colours begin: few cells are less sure, and would take most of the colours.
    few = np.quantile(confidence_k[labelled_k], 0.01) if labelled_k.any() else 0.0
    lowest = float(min(np.floor(10 * few) / 10, 0.9))
    colours_k = _confidence_colours(confidence_k, lowest)
    colours_k[~labelled_k] = to_rgba_array(OTHER_COLOUR)
    gradient = ", ".join(to_hex(colour) for colour in _confidence_colours(np.linspace(lowest, 1, 7), lowest))
    bar = element("i", "", style=f"background:linear-gradient(to right, {gradient})")
    unassigned: list[Content] = [f"; {NO_LABEL}:", _swatch(OTHER_COLOUR)] if report.n_unassigned else []
    return element(
        "figure",
        element("figcaption", element("strong", "By confidence")),
        element("img", src=_draw(points, colours_k, {}), alt=f"{name} of the cells by confidence"),
        element("div", f"{lowest:.1f}", bar, "1", *unassigned, class_="scale"),
    )


def _confidence_colours(confidence: Float[np.ndarray, " n"], lowest: float) -> Float[np.ndarray, "n 4"]:
    """Return colours (RGBA): dark blue for 1, through red to orange for the lowest, below 1, and what is less."""
    doubt = np.clip((1 - confidence) / (1 - lowest), 0, 1)
    return colormaps["plasma"](0.75 * doubt)  # beyond lies yellow, which cannot be seen on white


def _swatch(colour: str, number: str = "") -> Element:
    return element("span", number or "\N{NO-BREAK SPACE}", class_="swatch", style=f"background:{colour}")


def _draw(points: Float[np.ndarray, "k 2"], colours_k: Float[np.ndarray, "k 4"], names: dict[str, np.ndarray]) -> str:
    """Draw points, and names each in the midst of its points; gives the PNG as a ``data:`` address."""
    figure = Figure(figsize=(_SQUARE, _SQUARE), dpi=_DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    low, high = points.min(axis=0), points.max(axis=0)
    margin = np.where(high > low, 0.04 * (high - low), 1)
    (left, bottom), (right, top) = low - margin, high + margin
    axes = figure.add_axes((0, 0, 1, 1), frameon=False, xticks=[], yticks=[], xlim=(left, right), ylim=(bottom, top))
    order = np.random.default_rng(_SEED).permutation(len(points))
    size = float(np.clip(20_000 / len(points), 1.5, 30))  # in square points
    axes.scatter(points[order, 0], points[order, 1], s=size, c=colours_k[order], linewidths=0)
    for name, of_name in names.items():
        # The point nearest to the middle: the middle itself can lie beside a bent cloud.
        x, y = of_name[np.abs(of_name - np.median(of_name, axis=0)).sum(axis=1).argmin()]
        white = [withStroke(linewidth=3, foreground="white")]
        axes.text(x, y, name, ha="center", va="center", fontsize=11, fontweight="bold", path_effects=white)
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=_DOTS_PER_INCH)
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"
