"""The change in F1 of every cell type, sorted: a row a type, in columns that fit on a page."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from hce_jax.compare.ontology_figure import GAIN_COLOUR, LOSS_COLOUR, TITLE_SIZE
from hce_jax.compare.tree_layout import (
    COLUMN_WIDTH,
    PAGE_HEIGHT,
    SINGLE_COLUMN_HEIGHT,
    SMALL_SIZE,
)
from hce_jax.figure_style import GREY, GRID_COLOUR, MARGIN_SIDE, axes_at, lines, new_figure, widest

#: Inches: a row of one line, a further line of a name, the names, and the two columns of numbers. Rows are as low as
#: text of 5.5 points allows: 164 of them have to find room on a page.
ROW_HEIGHT, LINE_HEIGHT, NAMES_WIDTH, NUMBER_WIDTHS = 0.096, 0.081, 1.75, (0.29, 0.37)
BOTTOM, ABOVE, NAME_ROOM, BARS_SHIFT = 0.4, 0.22, 0.06, 0.06
#: The adjusted p below which a type has a star.
SIGNIFICANT = 0.05


def waterfall_figure(rows: pd.DataFrame, title: str) -> Figure:
    """Draw the change in F1 of every cell type as a bar, the largest gain first, with the numbers beside.

    Parameters
    ----------
    rows
        One for each type: ``label``, ``difference`` (of F1, as a share of 1; NaN: no bar, last), ``p_holm`` (NaN: no
        test), ``n_cells`` in the test set, ``n_train`` (NaN where not known).
    title
        What was compared.

    Examples
    --------
    >>> rows = pd.DataFrame({"label": ["B cell", "T cell"], "difference": [-0.02, 0.1], "p_holm": [0.5, 0.01],
    ...                      "n_cells": [100, 2_000], "n_train": [1_000, 30_000]})
    >>> figure = waterfall_figure(rows, "MLP")
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['T cell', 'B cell']
    """
    ranked = rows.sort_values("difference", ascending=False, kind="stable", ignore_index=True)
    room = NAMES_WIDTH - NAME_ROOM
    names = [
        label if widest([label], SMALL_SIZE) <= room else "\n".join(lines(label, SMALL_SIZE, room))
        for label in ranked["label"]
    ]
    heights = np.array([ROW_HEIGHT + LINE_HEIGHT * name.count("\n") for name in names])
    total = heights.sum()
    n_columns = 1 if total <= SINGLE_COLUMN_HEIGHT else max(2, int(np.ceil(total / PAGE_HEIGHT)))
    ends = np.cumsum(heights)
    column_of = np.minimum(((ends - heights / 2) * n_columns / total).astype(int), n_columns - 1)
    height = max(heights[column_of == number].sum() for number in range(n_columns))

    figure = new_figure(COLUMN_WIDTH * n_columns + 2 * MARGIN_SIDE, BOTTOM + height + ABOVE, title, TITLE_SIZE)
    span = _span(100 * ranked["difference"].to_numpy(float))
    for number in range(n_columns):
        chosen = np.flatnonzero(column_of == number)
        left, down = MARGIN_SIDE + COLUMN_WIDTH * number, heights[chosen].sum()
        place = left + NAMES_WIDTH, BOTTOM + height - down, _bars_width(), down
        _draw_column(figure, place, ranked.iloc[chosen], [names[row] for row in chosen], heights[chosen], span)
    return figure


def _bars_width() -> float:
    return COLUMN_WIDTH - NAMES_WIDTH - BARS_SHIFT - sum(NUMBER_WIDTHS) - 0.1


def _span(points: np.ndarray) -> tuple[float, float]:
    """Choose the range of the bars, with room for a star at either end."""
    seen = points[np.isfinite(points)]
    low, high = min(seen.min(initial=0.0), 0.0), max(seen.max(initial=0.0), 0.0)
    if low == high:
        return -1.0, 1.0
    room = 0.1 * (high - low)
    return low - room if low < 0 else low, high + room


def _draw_column(
    figure: Figure,
    place: tuple[float, float, float, float],
    rows: pd.DataFrame,
    names: list[str],
    heights: np.ndarray,
    span: tuple[float, float],
) -> None:
    """Draw some types below each other; the vertical coordinates are inches from the top."""
    axes = axes_at(figure, *place)
    _, _, width, height = place
    middles = np.cumsum(heights) - heights / 2
    points = 100 * rows["difference"].to_numpy(float)
    axes.set(xlim=span, ylim=(height, 0))
    colours = np.where(points < 0, LOSS_COLOUR, GAIN_COLOUR).tolist()
    axes.barh(middles, np.nan_to_num(points), height=0.07, color=colours)
    axes.axvline(0, color="black", linewidth=0.5)
    axes.set_yticks(middles, names, fontsize=SMALL_SIZE, parse_math=False, linespacing=1.05)
    axes.tick_params(axis="y", length=0, pad=2)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.tick_params(axis="x", labelsize=SMALL_SIZE, length=2, width=0.4, pad=1.5)
    axes.set_xlabel("change in F1 (points)", fontsize=SMALL_SIZE, labelpad=1.5)
    axes.grid(axis="x", linewidth=0.4, color=GRID_COLOUR)
    axes.set_axisbelow(True)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_linewidth(0.4)
    for middle, change, p in zip(middles, points, rows["p_holm"], strict=True):
        if p < SIGNIFICANT:
            beside: dict[str, Any] = {"ha": "right" if change < 0 else "left", "va": "center_baseline"}
            axes.annotate(
                "*",
                (change, middle + 0.02),
                (-1 if change < 0 else 1, 0),
                textcoords="offset points",
                fontsize=8,
                annotation_clip=False,
                **beside,
            )

    numbers = {"cells": _short(rows["n_cells"])}
    if rows["n_train"].notna().any():
        numbers["training"] = _short(rows["n_train"])
    for column, (heading, texts) in enumerate(numbers.items()):
        right = 1 + (BARS_SHIFT + sum(NUMBER_WIDTHS[: column + 1]) - 0.02) / width
        grey: dict[str, Any] = {"ha": "right", "fontsize": SMALL_SIZE, "color": GREY}
        for middle, text in zip(middles, texts, strict=True):
            axes.text(right, middle, text, transform=axes.get_yaxis_transform(), va="center_baseline", **grey)
        axes.annotate(heading, (right, 1), (0, 3), xycoords="axes fraction", textcoords="offset points", **grey)


def _short(numbers: pd.Series) -> list[str]:
    """Write numbers in three digits: 1.23M."""
    formatter = EngFormatter(sep="")
    return [formatter(float(f"{number:.3g}")) if np.isfinite(number) else "" for number in numbers]
