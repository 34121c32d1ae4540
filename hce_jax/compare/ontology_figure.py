"""The change in F1 on the ontology: an indented tree with every name, and a compact drawing in layers without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve
from matplotlib.ticker import EngFormatter

from hce_jax.compare.tree_layout import (
    COLUMN_WIDTH,
    INDENT,
    ISOLATED_TITLE,
    NAME_GAP,
    NAME_SIZE,
    SMALL_SIZE,
    TreeLayout,
    tree_layout,
    tree_parents,
)
from hce_jax.figure_style import GREY, MARGIN_SIDE, axes_at, new_figure, widest
from hce_jax.hierarchy import direct_edges, tree_order
from hce_jax.typing import Float, Int

#: Of a gain and of a loss (Okabe & Ito 2008, told apart by the colour-blind), through nearly white for none.
GAIN_COLOUR, LOSS_COLOUR, MIDDLE_COLOUR = "#0072b2", "#d55e00", "#f7f7f7"
#: Of types that are not in the test set, of edges, and of those from further parents.
ABSENT_COLOUR, EDGE_COLOUR, FURTHER_COLOUR = "#c4c4c4", "#a8a8a8", "#a0458a"
CHANGES = LinearSegmentedColormap.from_list("changes", [LOSS_COLOUR, MIDDLE_COLOUR, GAIN_COLOUR])

TITLE_SIZE = 8.0
#: Points: diameter of the nodes with the fewest and the most training cells, and of all where these are not known.
LEAST_NODE, LARGEST_NODE, EQUAL_NODE = 2.6, 8.4, 5.5
#: Inches.
LEGEND_HEIGHT, LAYER_HEIGHT, PAGE_WIDTH = 0.62, 0.45, 7.1
#: Without names: inches between two leaves, at least and at most, and between two types without relatives.
LEAST_DISTANCE, LARGEST_DISTANCE, ISOLATED_DISTANCE = 0.075, 0.3, 0.17
#: There nodes are so much smaller, so that neighbours do not overlap.
SCALE = 0.68
ITALICS: dict[str, Any] = {"fontsize": NAME_SIZE, "style": "italic", "color": GREY}


def colour_limit(changes: Float[np.ndarray, " c"]) -> float:
    """Choose where the colours end, in points: a multiple of 5 that 95 % of the changes do not exceed, up or down.

    Parameters
    ----------
    changes
        In points; NaN where there is none.

    Examples
    --------
    >>> colour_limit(np.array([-3.0, 12.0, np.nan]))
    15.0
    """
    sizes = np.abs(changes[np.isfinite(changes)])
    return max(5.0, 5.0 * float(np.ceil(np.quantile(sizes, 0.95) / 5))) if len(sizes) else 5.0


def node_areas(n_train: Int[np.ndarray, " c"] | None, n_types: int) -> Float[np.ndarray, " c"]:
    """Give the area of each node in square points; its diameter grows with the logarithm of the training cells.

    Parameters
    ----------
    n_train
        Training cells of each type; None: all nodes are equal.
    n_types
        Number of types.

    Examples
    --------
    >>> areas = node_areas(np.array([100, 1_000, 10_000]), 3)
    >>> np.sqrt(areas).round(1).tolist()
    [2.6, 5.5, 8.4]
    """
    if n_train is None:
        return np.full(n_types, EQUAL_NODE**2)
    return _diameters(n_train, _decades(n_train)) ** 2


def ontology_figure(
    reachability: np.ndarray,
    labels: Sequence[str],
    changes: Float[np.ndarray, " c"],
    n_train: Int[np.ndarray, " c"] | None,
    title: str,
) -> Figure:
    """Draw the types as an indented tree with their names, coloured by the change in F1.

    A grey line leads to each type from the parent that it is indented below, a purple curve from each other parent; a
    parent in another column is named instead.

    Parameters
    ----------
    reachability
        R (c, c).
    labels
        Names of the c types.
    changes
        In points of F1; NaN: not in the test set (grey).
    n_train
        Training cells of each type, the size of its node; None: all equal.
    title
        What was compared.

    Examples
    --------
    >>> reach = np.array([[1, 1], [0, 1]])
    >>> figure = ontology_figure(reach, ["T cell", "memory T cell"], np.array([12.0, np.nan]), None, "MLP")
    >>> figure.get_size_inches()[0].round(1)
    np.float64(3.7)
    """
    layout = tree_layout(reachability, labels)
    width, height = layout.width, layout.height + 0.04
    figure = new_figure(width + 2 * MARGIN_SIDE, LEGEND_HEIGHT + height + 0.06, title, TITLE_SIZE)
    axes = _plane(figure, LEGEND_HEIGHT, width, height)
    _draw_edges(axes, layout)
    _draw_nodes(axes, layout.x, layout.y, changes, n_train)
    for code, name in enumerate(layout.names):
        place, colour = layout.x[code] + NAME_GAP, "black" if np.isfinite(changes[code]) else GREY
        text: dict[str, Any] = {"va": "top", "parse_math": False, "linespacing": 1.05}
        axes.text(place, layout.y[code] - 0.045, name, fontsize=NAME_SIZE, color=colour, **text)
        if layout.notes[code]:
            below = layout.y[code] - 0.04 + 0.088 * (name.count("\n") + 1)
            axes.text(place, below, layout.notes[code], fontsize=SMALL_SIZE, color=GREY, style="italic", **text)
    for left, top in layout.titles:
        axes.text(left, top, ISOLATED_TITLE, va="center", **ITALICS)
    _draw_legend(figure, changes, n_train, bool(layout.further.any()))
    return figure


def dag_figure(
    reachability: np.ndarray,
    changes: Float[np.ndarray, " c"],
    n_train: Int[np.ndarray, " c"] | None,
    title: str,
) -> Figure:
    """Draw the types in layers, parents above children, without names; types without relatives in rows below.

    Edges from further parents are purple.

    Parameters
    ----------
    reachability, changes, n_train, title
        As of :func:`ontology_figure`.

    Examples
    --------
    >>> figure = dag_figure(np.array([[1, 1], [0, 1]]), np.array([12.0, np.nan]), None, "MLP")
    >>> len(figure.axes[0].collections[0].get_segments())
    1
    """
    x, y, width, height = layered_places(reachability)
    edges_cc, parents = direct_edges(reachability), tree_parents(reachability)
    figure = new_figure(width + 2 * MARGIN_SIDE, LEGEND_HEIGHT + height, title, TITLE_SIZE)
    axes = _plane(figure, LEGEND_HEIGHT, width, height)
    ends = [[(x[parent], y[parent]), (x[child], y[child])] for parent, child in np.argwhere(edges_cc)]
    first = [parents[child] == parent for parent, child in np.argwhere(edges_cc)]
    colours = np.where(first, EDGE_COLOUR, FURTHER_COLOUR).tolist()
    axes.add_collection(LineCollection(ends, colors=colours, linewidths=0.5, zorder=1))
    _draw_nodes(axes, x, y, changes, n_train, SCALE)
    isolated = ~(edges_cc.any(axis=0) | edges_cc.any(axis=1))
    if isolated.any():
        axes.text(0.0, y[isolated].min() - 0.16, ISOLATED_TITLE, va="center", **ITALICS)
    _draw_legend(figure, changes, n_train, not all(first), SCALE)
    return figure


def layered_places(reachability: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Place the types in layers: each one layer below the lowest of its parents, between the types below it.

    Across, leaves stand in tree order at equal distances, and the others at the mean of those indented below them, so
    that only edges from further parents cross others.

    Parameters
    ----------
    reachability
        R (c, c).

    Returns
    -------
    x and y of each type in inches from the top left, y downwards, and width and height of it all.

    Examples
    --------
    >>> x, y, _, _ = layered_places(np.array([[1, 1, 1], [0, 1, 0], [0, 0, 1]]))
    >>> bool(y[0] < y[1] == y[2]), bool(x[1] < x[0] < x[2])
    (True, True)
    """
    edges_cc, parents, order = direct_edges(reachability), tree_parents(reachability), tree_order(reachability)
    is_isolated = ~(edges_cc | edges_cc.T).any(axis=1)
    levels, connected = _levels(edges_cc), [code for code in order.tolist() if not is_isolated[code]]
    slots, n_slots = np.zeros(len(edges_cc)), 0
    for code in reversed(connected):  # those below a type come before it
        below = slots[parents == code]
        slots[code] = below.mean() if len(below) else n_slots
        n_slots += not len(below)
    widest_page = max(PAGE_WIDTH - 2 * MARGIN_SIDE, LEAST_DISTANCE * n_slots)
    width = min(max(COLUMN_WIDTH, LARGEST_DISTANCE * n_slots), widest_page)
    x = width * (1 - (slots + 0.5) / max(n_slots, 1))
    y = 0.1 + LAYER_HEIGHT * levels
    top = 0.4 + (y[connected].max() if connected else 0.0)
    isolated, per_row = np.flatnonzero(is_isolated), int(width / ISOLATED_DISTANCE)
    for start in range(0, len(isolated), per_row):
        row = isolated[start : start + per_row]
        x[row], y[row] = ISOLATED_DISTANCE * (np.arange(len(row)) + 0.5), top
        top += 0.17
    return x, y, width, top


def _levels(edges_cc: np.ndarray) -> np.ndarray:
    """Count the edges on the longest way down to each type."""
    levels = np.zeros(len(edges_cc), np.int64)
    while True:
        lowest = np.max(np.where(edges_cc, levels[:, None] + 1, 0), axis=0, initial=0)
        if np.array_equal(lowest, levels):
            return levels
        levels = lowest


def _plane(figure: Figure, bottom: float, width: float, height: float) -> Axes:
    """Add axes without a frame whose coordinates are inches from the top left."""
    axes = axes_at(figure, MARGIN_SIDE, bottom, width, height)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return axes


def _draw_edges(axes: Axes, layout: TreeLayout) -> None:
    """Draw the edges to indented types as elbows, those from further parents as curves left of all between."""
    elbows = [
        [(layout.x[parent], layout.y[parent]), (layout.x[parent], layout.y[child]), (layout.x[child], layout.y[child])]
        for parent, child in np.argwhere(layout.drawn)
    ]
    axes.add_collection(LineCollection(elbows, colors=EDGE_COLOUR, linewidths=0.5, zorder=1))
    for number, (parent, child) in enumerate(np.argwhere(layout.further)):
        start, end = (layout.x[parent], layout.y[parent]), (layout.x[child], layout.y[child])
        low, high = sorted((start[1], end[1]))
        # The column's own types alone: in another column others stand beside these rows.
        beside = (low <= layout.y) & (layout.y <= high) & (np.abs(layout.x - start[0]) < 2)
        lane = layout.x[beside].min() - INDENT * (0.35 + 0.13 * (number % 3))
        vertices = [start, (lane, start[1]), (lane, (start[1] + end[1]) / 2), (lane, end[1]), end]
        curve = Curve(vertices, [Curve.MOVETO, Curve.CURVE3, Curve.CURVE3, Curve.CURVE3, Curve.CURVE3])
        axes.add_patch(PathPatch(curve, facecolor="none", edgecolor=FURTHER_COLOUR, linewidth=0.6, zorder=1.5))


def _draw_nodes(
    axes: Axes, x: np.ndarray, y: np.ndarray, changes: np.ndarray, n_train: np.ndarray | None, scale: float = 1.0
) -> PathCollection:
    """Draw a node for each type, by area and colour; the larger ones below."""
    areas, limit = scale**2 * node_areas(n_train, len(x)), colour_limit(changes)
    colours = CHANGES(Normalize(-limit, limit)(np.where(np.isfinite(changes), changes, 0)))
    colours[~np.isfinite(changes)] = to_rgba(ABSENT_COLOUR)
    edges = np.where(np.isfinite(changes), "#404040", ABSENT_COLOUR)
    return axes.scatter(x, y, s=areas, c=colours, edgecolors=edges.tolist(), linewidths=0.4, zorder=2, clip_on=False)


def _decades(n_train: np.ndarray) -> tuple[int, int]:
    """Give the powers of ten between which the numbers of cells lie."""
    present = n_train[n_train > 0]
    if not len(present):
        return 0, 1
    low, high = int(np.floor(np.log10(present.min()))), int(np.ceil(np.log10(present.max())))
    return low, max(high, low + 1)


def _diameters(n_cells: np.ndarray, decades: tuple[int, int]) -> np.ndarray:
    low, high = decades
    share = (np.log10(np.maximum(n_cells, 10.0**low)) - low) / (high - low)
    return LEAST_NODE + (LARGEST_NODE - LEAST_NODE) * share


def _draw_legend(
    figure: Figure, changes: np.ndarray, n_train: np.ndarray | None, further: bool, scale: float = 1.0
) -> None:
    """Say below the picture what colours, sizes and curves mean; on two lines where it is narrow."""
    limit = colour_limit(changes)
    bar = axes_at(figure, MARGIN_SIDE + 0.1, 0.36, 1.2, 0.08)
    beyond = np.abs(changes[np.isfinite(changes)]).max(initial=0) > limit
    colours = ScalarMappable(Normalize(-limit, limit), CHANGES)
    figure.colorbar(colours, cax=bar, orientation="horizontal", extend="both" if beyond else "neither", extendfrac=0.06)
    bar.spines["outline"].set_linewidth(0.4)
    bar.set_xticks([-limit, 0, limit], [f"\N{MINUS SIGN}{limit:g}", "0", f"+{limit:g}"], fontsize=SMALL_SIZE)
    bar.tick_params(length=2, width=0.4, pad=1.5)
    bar.set_xlabel("change in F1 (points)", fontsize=SMALL_SIZE, labelpad=1.5)

    width = figure.get_figwidth() - 2 * MARGIN_SIDE
    axes = _plane(figure, 0.0, width, LEGEND_HEIGHT)
    place, middle = 1.55, 0.2
    marks: list[tuple[float, str, str]] = [(EQUAL_NODE, ABSENT_COLOUR, "not in the test set")]
    if n_train is not None:
        low, high = _decades(n_train)
        cells, formatter = np.logspace(low, high, high - low + 1), EngFormatter(sep="")
        sizes = _diameters(cells, (low, high)).tolist()
        marks += [(size, "white", formatter(number)) for size, number in zip(sizes, cells, strict=True)]
        marks[-1] = (*marks[-1][:2], f"{marks[-1][2]} training cells")
    for size, colour, text in marks:
        needed = 0.2 + widest([text], SMALL_SIZE)
        if place + needed > width:
            place, middle = 1.55, middle + 0.14
        edge = ABSENT_COLOUR if colour == ABSENT_COLOUR else "#404040"
        axes.scatter([place], [middle], s=(scale * size) ** 2, c=colour, edgecolors=edge, linewidths=0.4)
        axes.text(place + 0.08, middle, text, va="center", fontsize=SMALL_SIZE)
        place += needed
    if further:
        axes.plot([1.5, 1.75], [middle + 0.14] * 2, color=FURTHER_COLOUR, linewidth=0.6)
        axes.text(1.8, middle + 0.14, "from a further parent", va="center", fontsize=SMALL_SIZE)
