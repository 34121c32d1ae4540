"""The picture of an evaluation: F1 of every cell type."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hce_jax.files import written_aside

BAR_COLOUR = "#3b6fa0"
GREY = "#767676"

# Inches. A row is high enough for an 8-point name (0.11 in), so that every name can be read however many types there
# are; the names' column is as wide as the longest name asks for.
ROW_HEIGHT = 0.165
CHARACTER_WIDTH = 0.062
BARS_WIDTH = 5.0
SUPPORT_WIDTH = 0.85
MARGIN_TOP, MARGIN_BOTTOM, MARGIN_SIDE = 0.75, 0.45, 0.15
DOTS_PER_INCH = 150


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

    figure, axes = _framed_axes(n_rows=len(ranked), longest_name=max(map(len, names)))
    rows = range(len(ranked))
    bars = axes.barh(rows, f1, height=0.72, color=BAR_COLOUR)
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the dashed line must not cross a number
    axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7, color=BAR_COLOUR, bbox=white)
    grey: dict[str, Any] = {"ha": "right", "fontsize": 7, "color": GREY}
    right = 1 + (SUPPORT_WIDTH - MARGIN_SIDE) / BARS_WIDTH
    for row in rows:
        axes.text(right, row, f"{int(support[row]):,}", transform=axes.get_yaxis_transform(), va="center", **grey)
    axes.annotate("cells", (right, 1), (0, 5.5), xycoords="axes fraction", textcoords="offset points", **grey)
    axes.set_yticks(rows, names, fontsize=8)
    for label, n_cells in zip(axes.get_yticklabels(), support, strict=True):
        label.set_color("black" if n_cells else GREY)
    labelled = support > 0
    mean = float(f1[labelled].mean()) if labelled.any() else 0.0
    axes.axvline(mean, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel(f"F1 (dashed: mean over the {int(labelled.sum())} labelled types, {mean:.3f})", fontsize=8)
    figure.text(MARGIN_SIDE / figure.get_figwidth(), 1 - 0.12 / figure.get_figheight(), title, va="top", fontsize=10)

    with written_aside(Path(path)) as aside:
        figure.savefig(aside, dpi=DOTS_PER_INCH)


def _framed_axes(n_rows: int, longest_name: int) -> tuple[Figure, Axes]:
    """Make a figure whose axes have a fixed height per row and room for the names, whatever their number and length."""
    names_width = CHARACTER_WIDTH * longest_name
    width = MARGIN_SIDE + names_width + BARS_WIDTH + SUPPORT_WIDTH
    height = MARGIN_TOP + ROW_HEIGHT * n_rows + MARGIN_BOTTOM
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes(
        (
            (MARGIN_SIDE + names_width) / width,
            MARGIN_BOTTOM / height,
            BARS_WIDTH / width,
            ROW_HEIGHT * n_rows / height,
        )
    )
    axes.set(xlim=(0, 1), ylim=(n_rows - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, labeltop=True, top=True)
    axes.grid(axis="x", linewidth=0.4, color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["right"]].set_visible(False)
    return figure, axes
