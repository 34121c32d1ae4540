"""The pictures of a comparison that show all models at once: macro F1, the change by kind of type, the calibration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hce_jax.compare.numbers import PUBLISHED, Tables
from hce_jax.compare.ontology_figure import TITLE_SIZE
from hce_jax.compare.trained import Comparison
from hce_jax.compare.tree_layout import NAME_SIZE, PAGE_HEIGHT, SMALL_SIZE
from hce_jax.figure_style import GRID_COLOUR, MARGIN_SIDE, axes_at, new_figure, widest

#: Of the losses, the baseline first, and of the models (Okabe & Ito 2008: told apart by the colour-blind).
LOSS_COLOURS = ("#e69f00", "#0072b2", "#009e73", "#cc79a7")
MODEL_COLOURS, MODEL_MARKERS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"), "osD^v"
BEFORE_COLOUR, AFTER_COLOUR = "#e69f00", "#0072b2"
#: How pictures name the splits.
SPLITS = {"id": "held-out donors", "ood": "new studies"}

MINUS = "\N{MINUS SIGN}"
#: Inches.
LEFT, BOTTOM, LINE, PAGE_WIDTH = 0.42, 0.5, 0.1, 7.1
PANEL_HEIGHT, CLASS_HEIGHT, SQUARE, ABOVE_SQUARE = 2.2, 1.35, 1.5, 0.36
#: Of the place of a model, taken up by its losses; of the place of a loss, taken up by its seeds.
SHARE, SPREAD = 0.72, 0.4
#: Square points: of the dot of a bin with no cells, and what one with all of them has more.
LEAST_AREA, LARGEST_AREA = 2.0, 60.0
#: The place of a class that is named by a word, where that of a depth is 1.
WORD = 1.4


def overall_figure(comparison: Comparison, tables: Tables) -> tuple[Figure, str]:
    """Draw macro F1 of every model and loss, a panel for each split, with the differences above.

    Examples
    --------
    >>> overall_figure(comparison, tables)[0].axes[0].get_title()  # doctest: +SKIP
    'held-out donors'
    """
    n_models, losses, splits = len(comparison.models), comparison.losses, comparison.splits
    panel = max(0.99 * n_models, 2.6)
    above = LINE * len(losses) + 0.22
    width = len(splits) * (LEFT + panel) + 2 * MARGIN_SIDE
    figure = new_figure(width, BOTTOM + PANEL_HEIGHT + above, "Macro F1 by model and loss", TITLE_SIZE)
    has_published = False
    for number, split in enumerate(splits):
        left = MARGIN_SIDE + LEFT + number * (LEFT + panel)
        axes = axes_at(figure, left, BOTTOM, panel, PANEL_HEIGHT)
        has_published |= _draw_scores(axes, comparison, tables, split)
        axes.set_title(SPLITS[split], fontsize=7, pad=72 * (above - 0.14), loc="left")
        axes.set_xlim(-0.5, n_models - 0.5)
        axes.set_xticks(range(n_models), comparison.models, fontsize=7, parse_math=False)
        _plain(axes, "y")
        if number == 0:
            axes.set_ylabel("macro F1 (%)", fontsize=7)
    marks: list[Line2D] = [
        Line2D([], [], color=_loss_colour(place), marker="o", markersize=3, linewidth=1.4, label=loss)
        for place, loss in enumerate(losses)
    ]
    if has_published:
        style: dict[str, Any] = {"marker": "D", "markersize": 4, "linestyle": "none", "markerfacecolor": "white"}
        marks.append(Line2D([], [], markeredgecolor="#404040", label="published, on the published data", **style))
    _legend(figure, marks)
    intervals = f"the difference to {losses[0]} in points with its 95 % interval by bootstrap over two or more studies"
    published = " Open diamonds: the published value, on the published data." if has_published else ""
    caption = (
        f"Macro F1 of each model and loss on {' and on '.join(SPLITS[split] for split in splits)}. "
        f"{_dots_and_lines(comparison)} Above: {intervals}.{published}"
    )
    return figure, caption


def _draw_scores(axes: Axes, comparison: Comparison, tables: Tables, split: str) -> bool:
    """Draw the scores of one split; True if published ones are among them."""
    losses, step = comparison.losses, SHARE / len(comparison.losses)
    scores = tables.by_seed[(tables.by_seed["split"] == split) & (tables.by_seed["average"] == "macro")]
    overall = tables.overall[(tables.overall["split"] == split) & (tables.overall["average"] == "macro")]
    has_published = False
    for at, model in enumerate(comparison.models):
        for place, loss in enumerate(losses):
            x = at + step * (place - (len(losses) - 1) / 2)
            row = overall[(overall["model"] == model) & (overall["loss"] == loss)].iloc[0]
            colour = _loss_colour(place)
            f1 = 100 * scores[(scores["model"] == model) & (scores["loss"] == loss)]["f1"].to_numpy(float)
            axes.hlines(100 * row["mean"], x - 0.42 * step, x + 0.42 * step, color=colour, linewidth=1.4, zorder=2)
            _dots(axes, x, f1, SPREAD * step, colour, "o")
            known = PUBLISHED.get((comparison.of(model, loss)[0].config["model_type"], loss, split))
            if known is not None:
                has_published = True
                style: dict[str, Any] = {"markersize": 4, "markerfacecolor": "white", "markeredgewidth": 0.8}
                axes.plot(x, 100 * known, "D", markeredgecolor=colour, zorder=4, **style)
            if place:
                height = 4 + 72 * LINE * (len(losses) - 1 - place)
                axes.annotate(
                    _difference(row),
                    (at, 1),
                    (0, height),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                    ha="center",
                    fontsize=SMALL_SIZE,
                    color=colour,
                )
    return has_published


def by_class_figure(comparison: Comparison, tables: Tables, loss: str) -> tuple[Figure, str]:
    """Draw the change in F1 by depth, of leaves and others, of connected and isolated types, for all models.

    Examples
    --------
    >>> len(by_class_figure(comparison, tables, "HCE")[0].axes)  # doctest: +SKIP
    6
    """
    table = tables.by_class[tables.by_class["loss"] == loss]
    groupings = {"depth": "depth (number of ancestors)", "leaf": "", "connected": ""}
    values = {grouping: _values(table, grouping) for grouping in groupings}
    places = {name: (1 if name == "depth" else WORD) * max(len(each), 1) for name, each in values.items()}
    n_values = sum(places.values())
    room = max(PAGE_WIDTH - 2 * MARGIN_SIDE - 3 * LEFT, 0.115 * len(comparison.models) * n_values)
    row_height = CLASS_HEIGHT + 0.5
    what = f"Change in F1 by kind of cell type, {loss} {MINUS} {comparison.losses[0]}"
    height = BOTTOM - 0.15 + row_height * len(comparison.splits)
    figure = new_figure(room + 3 * LEFT + 2 * MARGIN_SIDE, height, what, TITLE_SIZE)
    for number, split in enumerate(comparison.splits):
        first: Axes | None = None
        left, bottom = MARGIN_SIDE + LEFT, height - row_height * (number + 1) + 0.28
        for grouping, heading in groupings.items():
            width = room * places[grouping] / n_values
            axes = axes_at(figure, left, bottom, width, CLASS_HEIGHT)
            if first is None:
                first = axes
            else:
                axes.sharey(first)
            rows = table[(table["split"] == split) & (table["grouping"] == grouping)]
            _draw_classes(axes, comparison, rows, values[grouping])
            axes.set_xlabel(heading, fontsize=NAME_SIZE, labelpad=1.5)
            if grouping == "depth":
                axes.set_title(SPLITS[split], fontsize=7, pad=3, loc="left")
                axes.set_ylabel("change in F1 (points)", fontsize=NAME_SIZE)
            left += width + LEFT
    _legend(
        figure,
        [
            Line2D([], [], color=colour, marker=marker, markersize=3, linewidth=1.2, label=model)
            for model, colour, marker in _model_marks(comparison)
        ],
    )
    caption = (
        f"Mean change in F1 (points, {loss} minus {comparison.losses[0]}) of the cell types at each depth in the "
        f"ontology, of leaves and internal types, and of types with and without relatives among the types. "
        f"{_dots_and_lines(comparison)} In parentheses: the number of types."
    )
    return figure, caption


def _values(table: pd.DataFrame, grouping: str) -> list[str]:
    """Give the values of a grouping that occur: depths by number, the others in their order."""
    found = list(dict.fromkeys(table[table["grouping"] == grouping]["value"]))
    return sorted(found, key=int) if grouping == "depth" else found


def _draw_classes(axes: Axes, comparison: Comparison, rows: pd.DataFrame, values: list[str]) -> None:
    step = SHARE / len(comparison.models)
    names = []
    for at, value in enumerate(values):
        of_value = rows[rows["value"] == value]
        names.append(f"{value}\n({of_value['n_types'].iloc[0]})" if len(of_value) else value)
        for place, (model, colour, marker) in enumerate(_model_marks(comparison)):
            points = 100 * of_value[of_value["model"] == model]["difference"].to_numpy(float)
            x = at + step * (place - (len(comparison.models) - 1) / 2)
            if len(points):
                axes.hlines(points.mean(), x - 0.42 * step, x + 0.42 * step, color=colour, linewidth=1.2, zorder=2)
                _dots(axes, x, points, SPREAD * step, colour, marker)
    axes.axhline(0, color="black", linewidth=0.5, zorder=1)
    axes.set_xlim(-0.5, max(len(values), 1) - 0.5)
    axes.set_xticks(range(len(values)), names, fontsize=NAME_SIZE)
    _plain(axes, "y")


def calibration_figure(comparison: Comparison, tables: Tables) -> tuple[Figure, str]:
    """Draw accuracy against confidence of every model, loss and split, before and after temperature scaling.

    Examples
    --------
    >>> len(calibration_figure(comparison, tables)[0].axes)  # doctest: +SKIP
    12
    """
    splits, losses, models = comparison.splits, comparison.losses, comparison.models
    panels = [(split, loss, model) for split in splits for loss in losses for model in models]
    n_columns = len(models) if len(models) > 1 else len(losses)
    n_rows = len(panels) // n_columns
    square = min(SQUARE, (PAGE_HEIGHT - BOTTOM) / n_rows - ABOVE_SQUARE)
    across, down = square + LEFT, square + ABOVE_SQUARE
    width, height = LEFT + across * n_columns + 2 * MARGIN_SIDE, BOTTOM + down * n_rows
    figure = new_figure(max(width, 3.4), height, "Reliability of the confidence", TITLE_SIZE)
    for number, (split, loss, model) in enumerate(panels):
        row, column = divmod(number, n_columns)
        bottom = height - down * (row + 1) + 0.16
        axes = axes_at(figure, MARGIN_SIDE + LEFT + across * column, bottom, square, square)
        _draw_reliability(axes, tables, model, loss, split)
        axes.set_title(f"{model}, {loss}", fontsize=NAME_SIZE, pad=3, parse_math=False)
        if column == 0:
            axes.set_ylabel(f"{SPLITS[split]}\naccuracy", fontsize=NAME_SIZE)
        if row == n_rows - 1:
            axes.set_xlabel("confidence", fontsize=NAME_SIZE, labelpad=1.5)
    scaled = tables.calibration["temperature"].notna().any()
    marks = [_reliability_marks(BEFORE_COLOUR, "as predicted")]
    if scaled:
        marks.append(_reliability_marks(AFTER_COLOUR, "after temperature scaling"))
    _legend(figure, marks)
    after = (
        "Orange: as predicted; blue: after temperature scaling, T fitted on validation data. ECE: the expected "
        "calibration error before and after; T and ECE are means over seeds."
        if scaled
        else "No temperature was fitted. ECE: the expected calibration error, the mean over seeds."
    )
    caption = (
        f"Accuracy against confidence in 15 bins, the cells of all seeds together; the area of a dot grows with its "
        f"share of them. {after} Dashed: as it should be; below it a model is surer of itself than it should be."
    )
    return figure, caption


def _draw_reliability(axes: Axes, tables: Tables, model: str, loss: str, split: str) -> None:
    def of_this(table: pd.DataFrame) -> pd.DataFrame:
        return table[(table["model"] == model) & (table["loss"] == loss) & (table["split"] == split)]

    axes.plot([0, 1], [0, 1], color="black", linewidth=0.6, linestyle="--", zorder=1)
    bins = of_this(tables.reliability)
    for is_scaled, colour in ((False, BEFORE_COLOUR), (True, AFTER_COLOUR)):
        used = bins[(bins["scaled"] == is_scaled) & (bins["cells"] > 0)]
        style: dict[str, Any] = {"color": colour, "zorder": 2 + is_scaled, "clip_on": False}
        axes.plot(used["confidence"], used["accuracy"], linewidth=0.6, **style)
        areas = LEAST_AREA + LARGEST_AREA * used["cells"] / max(used["cells"].sum(), 1)
        axes.scatter(used["confidence"], used["accuracy"], s=areas, linewidths=0, **style)
    for _, row in of_this(tables.calibration).iterrows():
        text = f"ECE {row['ece_before']:.3f}"
        if np.isfinite(row["temperature"]):
            text += f" \N{RIGHTWARDS ARROW} {row['ece_after']:.3f}\nT = {row['temperature']:.2f}"
        white = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5}
        place: dict[str, Any] = {"ha": "right", "va": "bottom", "zorder": 5, "bbox": white}
        axes.text(0.98, 0.03, text, fontsize=SMALL_SIZE, linespacing=1.2, **place)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    _plain(axes, "both")


def _reliability_marks(colour: str, label: str) -> Line2D:
    return Line2D([], [], color=colour, marker="o", markersize=2.6, linewidth=0.8, label=label)


def _dots(axes: Axes, x: float, values: np.ndarray, spread: float, colour: str, marker: str) -> None:
    """Draw a dot for each seed, side by side in their order."""
    aside = np.linspace(-spread / 2, spread / 2, len(values)) if len(values) > 1 else np.zeros(len(values))
    style: dict[str, Any] = {"markersize": 2.8, "markeredgecolor": "white", "markeredgewidth": 0.25}
    axes.plot(x + aside, values, marker, color=colour, zorder=3, clip_on=False, **style)


def _plain(axes: Axes, grid: Literal["y", "both"]) -> None:
    axes.tick_params(labelsize=NAME_SIZE, length=2, width=0.4, pad=1.5)
    axes.tick_params(axis="x", length=0 if grid == "y" else 2)
    axes.grid(axis=grid, linewidth=0.4, color=GRID_COLOUR)
    axes.set_axisbelow(True)
    axes.spines[["right", "top"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_linewidth(0.4)


def _legend(figure: Figure, marks: list[Line2D]) -> None:
    """Explain the marks at the bottom, on two lines where the picture is narrow."""
    place = (MARGIN_SIDE / figure.get_figwidth(), 0.06 / figure.get_figheight())
    width = sum(0.42 + widest([str(mark.get_label())], NAME_SIZE) for mark in marks)
    n_lines = 1 if width < figure.get_figwidth() - 2 * MARGIN_SIDE else 2
    style: dict[str, Any] = {"frameon": False, "borderpad": 0, "borderaxespad": 0, "handlelength": 1.8}
    legend = figure.legend(
        handles=marks,
        loc="lower left",
        bbox_to_anchor=place,
        ncols=-(-len(marks) // n_lines),
        fontsize=NAME_SIZE,
        columnspacing=1.4,
        **style,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _difference(row: pd.Series) -> str:
    """Write a difference in points with its interval."""
    text = f"{100 * row['difference']:+.1f}"
    if np.isfinite(row["low"]):
        text += f" ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
    return text.replace("-", MINUS)


def _loss_colour(place: int) -> str:
    return LOSS_COLOURS[place % len(LOSS_COLOURS)]


def _model_marks(comparison: Comparison) -> Iterator[tuple[str, str, str]]:
    """Give each model with its colour and its marker."""
    for place, model in enumerate(comparison.models):
        yield model, MODEL_COLOURS[place % len(MODEL_COLOURS)], MODEL_MARKERS[place % len(MODEL_MARKERS)]


def _dots_and_lines(comparison: Comparison) -> str:
    if len(comparison.seeds) > 1:
        return f"Dots: {len(comparison.seeds)} seeds; lines: their mean."
    return "There is one seed."
