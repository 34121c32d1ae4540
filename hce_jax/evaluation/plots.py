"""The pictures of an evaluation: F1 of every cell type, calibration, and which types are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from hce_jax.figure_style import GREY, GRID_COLOUR, MARGIN_SIDE, axes_at, lines, new_figure, save, widest
from hce_jax.hierarchy import tree_order
from hce_jax.typing import Float, Int

BAR_COLOUR = "#3b6fa0"
GAP_COLOUR = "#d98c5f"
FRAME_COLOUR = "#c0562b"
COUNTS_TITLE = "cells"

# Points.
NAME_SIZE, SMALL_SIZE = 8.0, 7.0

# Inches. A row is high enough for its name (8 points are 0.11, 7 are 0.10), so that every name can be read however many
# types there are; the names' column is as wide as the widest name.
ROW_HEIGHT = 0.165
BARS_WIDTH = 5.0
SCORE_WIDTH, COUNTS_GAP = 0.35, 0.12
MARGIN_BOTTOM, TICKS_ABOVE = 0.45, 0.46
TICK_ROOM = 0.09
LEAST_SQUARE, LARGEST_SQUARE, MATRIX_WIDTH = 0.125, 0.3, 5.0
BAND_HEIGHT, CAPTION_LINE, LEAST_CAPTION_WIDTH = 0.6, 0.14, 4.5


def performance_plot(per_type: pd.DataFrame, type_labels: Sequence[str], path: str | Path, title: str) -> None:
    """Draw F1 of every cell type as horizontal bars, the best at the top, with the number of labelled cells beside.

    A type that is only predicted, never labelled, has no cells and F1 0; its name is grey.

    Parameters
    ----------
    per_type
        One row per type, indexed by its code as text, with columns ``f1-score`` and ``support``
        (:func:`hce_jax.metrics.classification_report_frames`).
    type_labels
        Names of all the store's cell types, in the order of their codes.
    path
        The PNG to write.
    title
        What was evaluated, above the bars.

    Examples
    --------
    >>> import tempfile
    >>> table = pd.DataFrame({"f1-score": [0.5, 0.9], "support": [10.0, 20.0]}, index=["0", "1"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     performance_plot(table, ["B cell", "T cell"], Path(folder) / "plot.png", "example")
    ...     [path.name for path in Path(folder).iterdir()]
    ['plot.png']
    """
    # Equal values (many are exactly 0) in the order of their codes.
    ranked = per_type.sort_values("f1-score", ascending=False, kind="stable")
    names = [type_labels[int(code)] for code in ranked.index]
    f1, support = ranked["f1-score"].to_numpy(), ranked["support"].to_numpy()
    counts = _thousands(support)

    figure, axes = _framed_axes(names, counts, title)
    rows = range(len(ranked))
    bars = axes.barh(rows, f1, height=0.72, color=BAR_COLOUR)
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the dashed line must not cross a number
    axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=SMALL_SIZE, color=BAR_COLOUR, bbox=white)
    _write_counts(figure, axes, counts, SCORE_WIDTH)
    axes.set_yticks(rows, names, fontsize=NAME_SIZE, parse_math=False)
    for label, n_cells in zip(axes.get_yticklabels(), support, strict=True):
        label.set_color("black" if n_cells else GREY)
    labelled = support > 0
    mean = float(f1[labelled].mean()) if labelled.any() else 0.0
    axes.axvline(mean, color="black", linewidth=0.8, linestyle="--")
    types = "type" if labelled.sum() == 1 else "types"
    axes.set_xlabel(f"F1 (dashed: mean over the {int(labelled.sum())} labelled {types}, {mean:.3f})", fontsize=8)
    save(figure, path)


def calibration_plot(
    table: pd.DataFrame,
    coverage: Float[np.ndarray, "k"],
    accuracy: Float[np.ndarray, "k"],
    ece: float,
    path: str | Path,
    title: str,
) -> None:
    """Draw accuracy against confidence, with the number of cells of each bin below, and accuracy against coverage.

    Where points lie below the diagonal, the model is surer of itself than it should be.

    Parameters
    ----------
    table
        One row per bin of confidence: ``confidence_from``, ``confidence_to``, ``cells``, ``confidence`` (the mean) and
        ``accuracy``; the last two are NaN where a bin has no cells.
    coverage, accuracy
        Of the cells with the greatest confidence: their share of all cells, ascending, and the share of them that is
        right. Empty, as the bins, where no cell has a prediction.
    ece
        Expected calibration error: mean distance of the points from the diagonal, weighted by their cells.
    path
        The PNG to write.
    title
        What was evaluated, above the pictures.

    Examples
    --------
    >>> import tempfile
    >>> table = pd.DataFrame({"confidence_from": [0.0, 0.5], "confidence_to": [0.5, 1.0], "cells": [0, 4],
    ...                       "confidence": [np.nan, 0.9], "accuracy": [np.nan, 0.75]})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     calibration_plot(table, np.array([0.5, 1]), np.array([1, 0.75]), 0.15, Path(folder) / "plot.png", "example")
    ...     [path.name for path in Path(folder).iterdir()]
    ['plot.png']
    """
    width, side, below, between = 9.1, 3.6, 0.9, 0.12
    figure = new_figure(width, MARGIN_BOTTOM + below + between + side + 0.15, title)
    reliability = axes_at(figure, 0.6, MARGIN_BOTTOM + below + between, side, side)
    histogram = axes_at(figure, 0.6, MARGIN_BOTTOM, side, below)
    curve = axes_at(figure, 4.95, MARGIN_BOTTOM, 4.0, below + between + side)

    used = table[table["cells"] > 0]
    reliability.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--")
    reliability.vlines(used["confidence"], used["confidence"], used["accuracy"], color=GAP_COLOUR, linewidth=2)
    reliability.plot(used["confidence"], used["accuracy"], "o", color=BAR_COLOUR, markersize=5, clip_on=False, zorder=3)
    reliability.set(xlim=(0, 1), ylim=(0, 1))
    reliability.set_ylabel("accuracy (dashed: as it should be)", fontsize=8)
    reliability.tick_params(labelbottom=False)

    start, bin_width = table["confidence_from"], table["confidence_to"] - table["confidence_from"]
    histogram.set(xlim=(0, 1), ylim=(0.5, 3 * max(table["cells"].max(), 1)))
    histogram.set_yscale("log")
    histogram.bar(start, table["cells"], bin_width, align="edge", color=BAR_COLOUR, edgecolor="white")
    histogram.yaxis.set_major_locator(LogLocator(numticks=4))
    histogram.yaxis.set_major_formatter(EngFormatter(sep=""))
    histogram.yaxis.set_minor_locator(NullLocator())
    histogram.set_ylabel("cells", fontsize=8)
    error = f"calibration error {ece:.3f}" if table["cells"].any() else "no cell is assigned a type"
    histogram.set_xlabel(f"confidence ({len(table)} bins; {error})", fontsize=8)

    curve.plot(coverage, accuracy, color=BAR_COLOUR, linewidth=1.5, clip_on=False)
    curve.plot(coverage[-1:], accuracy[-1:], "o", color=BAR_COLOUR, markersize=5, clip_on=False)
    curve.set(xlim=(0, 1), ylim=(max(0.0, np.floor(20 * accuracy.min(initial=1)) / 20 - 0.05), 1))
    curve.set_ylabel("accuracy", fontsize=8)
    of_all = f"{accuracy[-1]:.3f}" if len(accuracy) else "none"
    curve.set_xlabel(f"coverage, the most confident cells first (all assigned: {of_all})", fontsize=8)
    for axes in (reliability, histogram, curve):
        axes.tick_params(labelsize=8)
        axes.grid(linewidth=0.4, color=GRID_COLOUR)
        axes.set_axisbelow(True)
        axes.spines[["right", "top"]].set_visible(False)
    save(figure, path)


def confusion_plot(
    confusion: Int[np.ndarray, "c d"],
    type_labels: Sequence[str],
    reachability: Float[np.ndarray, "c c"],
    path: str | Path,
    title: str,
) -> None:
    """Draw which share of each label's cells got which prediction, in the order of the ontology.

    One row for each label that occurs, with its number of cells; one column for each type that occurs as a label or a
    prediction, and one for cells without a prediction where there are such. A type is followed by what lies below it.
    Framed: the predictions that count as right for a label, itself and what lies below it. The name of a type that is
    only predicted is grey.

    Parameters
    ----------
    confusion
        Number of cells by label and prediction (c, c + 1); the last column: without a prediction.
    type_labels
        Names of all the store's cell types, in the order of their codes.
    reachability
        R (c, c).
    path
        The PNG to write.
    title
        What was evaluated, above the picture.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     reach = np.array([[1.0, 1.0], [0.0, 1.0]])
    ...     counts = np.array([[5, 1, 0], [0, 7, 2]])
    ...     confusion_plot(counts, ["cell", "B cell"], reach, Path(folder) / "plot.png", "example")
    ...     [path.name for path in Path(folder).iterdir()]
    ['plot.png']
    """
    n_types, order = len(type_labels), tree_order(reachability)
    cells_c, predicted_c = confusion.sum(axis=1), confusion.sum(axis=0)
    rows = order[cells_c[order] > 0]
    columns = order[(cells_c + predicted_c[:-1])[order] > 0]
    if predicted_c[-1]:
        columns = np.append(columns, n_types)
    shares = confusion[np.ix_(rows, columns)] / cells_c[rows, None]
    right = np.pad(reachability, ((0, 0), (0, 1)))[np.ix_(rows, columns)] > 0

    names = [*type_labels, "unassigned"]
    row_names, column_names = [names[row] for row in rows], [names[column] for column in columns]
    counts = _thousands(cells_c[rows])
    figure, axes, colours = _matrix_axes(row_names, column_names, counts, title)
    # The square root of a share: one cell in a hundred can still be seen.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), aspect="auto", interpolation="nearest")
    frames = PatchCollection(
        _frames(right), facecolor="none", edgecolor=FRAME_COLOUR, linewidth=0.6, zorder=3, clip_on=False
    )
    axes.add_collection(frames)
    for label, column in zip(axes.get_xticklabels(), columns, strict=True):
        label.set_color("black" if column < n_types and cells_c[column] else GREY)
    _write_counts(figure, axes, counts, COUNTS_GAP)
    figure.colorbar(image, cax=colours, orientation="horizontal", ticks=[0, 0.01, 0.1, 0.25, 0.5, 1], format="%g")
    colours.tick_params(labelsize=SMALL_SIZE)
    save(figure, path)


def _frames(right: np.ndarray) -> list[Rectangle]:
    """Make a rectangle round each run of cells of a row that are true."""
    edges = np.diff(np.pad(right.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    starts, stops = np.argwhere(edges == 1), np.argwhere(edges == -1)
    return [
        Rectangle((start - 0.5, row - 0.5), stop - start, 1)
        for (row, start), (_, stop) in zip(starts.tolist(), stops.tolist(), strict=True)
    ]


def _framed_axes(names: Sequence[str], counts: Sequence[str], title: str) -> tuple[Figure, Axes]:
    """Make a figure whose axes have a fixed height per row and room for the names, whatever their number and length."""
    names_width, n_rows = widest(names, NAME_SIZE) + TICK_ROOM, len(names)
    width = MARGIN_SIDE + names_width + BARS_WIDTH + SCORE_WIDTH + _counts_width(counts) + MARGIN_SIDE
    figure = new_figure(width, MARGIN_BOTTOM + ROW_HEIGHT * n_rows + TICKS_ABOVE, title)
    axes = axes_at(figure, MARGIN_SIDE + names_width, MARGIN_BOTTOM, BARS_WIDTH, ROW_HEIGHT * n_rows)
    axes.set(xlim=(0, 1), ylim=(n_rows - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, labeltop=True, top=True)
    axes.grid(axis="x", linewidth=0.4, color=GRID_COLOUR)
    axes.set_axisbelow(True)
    axes.spines[["right"]].set_visible(False)
    return figure, axes


def _matrix_axes(
    row_names: Sequence[str], column_names: Sequence[str], counts: Sequence[str], title: str
) -> tuple[Figure, Axes, Axes]:
    """Make axes with a square for each pair of names, and small axes below for what the colours mean."""
    square = min(max(MATRIX_WIDTH / len(column_names), LEAST_SQUARE), LARGEST_SQUARE)
    left = MARGIN_SIDE + widest(row_names, SMALL_SIZE) + TICK_ROOM
    matrix_width, matrix_height = square * len(column_names), square * len(row_names)
    needed = left + matrix_width + COUNTS_GAP + _counts_width(counts) + MARGIN_SIDE
    width = max(needed, LEAST_CAPTION_WIDTH + 2 * MARGIN_SIDE)
    caption = lines(
        "Each row: the predictions for the cells of one label, as shares of them. "
        "Framed: counts as right, the label itself or below it.",
        SMALL_SIZE,
        width - 2 * MARGIN_SIDE,
    )
    bottom = BAND_HEIGHT + CAPTION_LINE * len(caption)
    names_height = widest(column_names, SMALL_SIZE) + TICK_ROOM
    figure = new_figure(width, bottom + matrix_height + names_height + 0.1, title)
    text: dict[str, Any] = {"va": "bottom", "fontsize": SMALL_SIZE, "color": GREY, "linespacing": 1.25}
    figure.text(MARGIN_SIDE / width, 0.1 / figure.get_figheight(), "\n".join(caption), **text)

    axes = axes_at(figure, left, bottom, matrix_width, matrix_height)
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(column_names)), column_names, rotation=90, fontsize=SMALL_SIZE, parse_math=False)
    axes.set_yticks(range(len(row_names)), row_names, fontsize=SMALL_SIZE, parse_math=False)
    axes.set_xticks(np.arange(len(column_names) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(row_names) + 1) - 0.5, minor=True)
    axes.tick_params(length=0, which="both")
    axes.grid(which="minor", linewidth=0.4, color=GRID_COLOUR)
    axes.spines[:].set_color(GRID_COLOUR)
    return figure, axes, axes_at(figure, MARGIN_SIDE + 0.1, bottom - 0.3, 2.5, 0.12)


def _thousands(numbers: np.ndarray) -> list[str]:
    return [f"{int(number):,}" for number in numbers]


def _counts_width(counts: Sequence[str]) -> float:
    return widest([*counts, COUNTS_TITLE], SMALL_SIZE)


def _write_counts(figure: Figure, axes: Axes, counts: Sequence[str], gap: float) -> None:
    """Write the number of cells of each row behind it, after a gap in inches."""
    across = axes.get_position().width * figure.get_figwidth()
    right = 1 + (gap + _counts_width(counts)) / across
    grey: dict[str, Any] = {"ha": "right", "fontsize": SMALL_SIZE, "color": GREY}
    for row, count in enumerate(counts):
        axes.text(right, row, count, transform=axes.get_yaxis_transform(), va="center", **grey)
    axes.annotate(COUNTS_TITLE, (right, 1), (0, 5.5), xycoords="axes fraction", textcoords="offset points", **grey)
