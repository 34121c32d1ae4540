"""The pictures of a comparison, in one style, each as PNG and as PDF.

Everything is drawn from the tables of :mod:`hce_jax.compare.numbers`; text is never below 5.5 points, and most pictures
are as wide as the text of a page of A4. Blue is a gain or the hierarchical loss, orange a loss or the baseline.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.lines import Line2D

from hce_jax.compare.numbers import PUBLISHED, Tables
from hce_jax.compare.ontology_figure import TITLE_SIZE, dag_figure, ontology_figure
from hce_jax.compare.tree_layout import NAME_SIZE, SMALL_SIZE
from hce_jax.compare.trained import Comparison
from hce_jax.compare.waterfall import SIGNIFICANT, waterfall_figure
from hce_jax.figure_style import GREY, GRID_COLOUR, MARGIN_SIDE, axes_at, new_figure, save

#: Of the losses, the baseline first, and of the models (Okabe & Ito 2008: told apart by the colour-blind).
LOSS_COLOURS = ("#e69f00", "#0072b2", "#009e73", "#cc79a7")
MODEL_COLOURS, MODEL_MARKERS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"), "osD^v"
BEFORE_COLOUR, AFTER_COLOUR = "#e69f00", "#0072b2"
#: How pictures name the splits.
SPLITS = {"id": "held-out donors", "ood": "new studies"}

DOTS_PER_INCH = 200
MINUS = "\N{MINUS SIGN}"
#: Inches.
LEFT, BOTTOM, LINE, GAP = 0.42, 0.5, 0.1, 0.22
PANEL_HEIGHT, CLASS_HEIGHT, SQUARE = 2.2, 1.35, 1.5
#: Of the place of a model, taken up by its losses; of the place of a loss, taken up by its seeds.
SHARE, SPREAD = 0.72, 0.4


class Figure(NamedTuple):
    """A picture that was drawn.

    Attributes
    ----------
    name
        Of the files, without suffix: there is a PNG and a PDF.
    caption
        What is drawn, of which data, and what the marks mean.
    """

    name: str
    caption: str


def draw(comparison: Comparison, tables: Tables, folder: Path) -> list[Figure]:
    """Draw everything.

    Parameters
    ----------
    comparison
        What is compared.
    tables
        Its numbers.
    folder
        Where the files are put; it must be there.

    Returns
    -------
    The pictures in the order in which a report shows them: ``overall``; for each model and split (and each loss, where
    several are compared with the baseline) ``waterfall_{model}_{split}``, ``ontology_{model}_{split}`` and
    ``dag_{model}_{split}``; ``by_class``; ``calibration``.

    Raises
    ------
    OSError
        If a file cannot be written; the message names it.

    Examples
    --------
    >>> draw(comparison, tables(comparison), Path("comparison"))[0].name  # doctest: +SKIP
    'overall'
    """
    drawn = []
    for name, picture, caption in _pictures(comparison, tables):
        for suffix in (".png", ".pdf"):
            save(picture, folder / f"{name}{suffix}", DOTS_PER_INCH)
        drawn.append(Figure(name, caption))
    return drawn


def _pictures(comparison: Comparison, tables: Tables) -> Iterator[tuple[str, Picture, str]]:
    """Give each picture with its name and its caption, one at a time."""
    yield "overall", *overall_figure(comparison, tables)
    for loss in comparison.losses[1:]:
        for model in comparison.models:
            for split in comparison.splits:
                several = (loss,) if len(comparison.losses) > 2 else ()
                ending = "_".join(_file_name(part) for part in (model, split, *several))
                for kind, picture, caption in _of_types(comparison, tables, model, loss, split):
                    yield f"{kind}_{ending}", picture, caption
    for loss in comparison.losses[1:]:
        name = "by_class" if len(comparison.losses) == 2 else f"by_class_{_file_name(loss)}"
        yield name, *by_class_figure(comparison, tables, loss)
    yield "calibration", *calibration_figure(comparison, tables)


def _of_types(
    comparison: Comparison, tables: Tables, model: str, loss: str, split: str
) -> Iterator[tuple[str, Picture, str]]:
    """Give the three pictures of single types: of a model, a loss and a split."""
    table = tables.per_type
    rows = table[(table["model"] == model) & (table["loss"] == loss) & (table["split"] == split)]
    what = f"{model}, {SPLITS[split]}: change in F1, {loss} {MINUS} {comparison.losses[0]}"
    said = f"Change in F1 (points, {loss} minus {comparison.losses[0]}, {_mean_of(comparison)}) of "
    of_these = f"on {SPLITS[split]}. {_data(comparison)}"

    tested = (
        f"A star: p < {SIGNIFICANT} in a paired t-test over seeds, adjusted after Holm for all types in the picture."
        if len(comparison.seeds) > 1
        else "With one seed there is no test."
    )
    trained = " and of training cells" if comparison.n_train is not None else ""
    beside = f"Beside the bars: the numbers of labelled cells{trained}."
    caption = f"{said}each of the {len(rows)} cell types in the test set of {model} {of_these} {tested} {beside}"
    yield "waterfall", waterfall_figure(rows, what), caption

    changes = np.full(len(comparison.labels), np.nan)
    changes[rows["code"].to_numpy(int)] = 100 * rows["difference"].to_numpy(float)
    sizes = (
        "The size of a node grows with the logarithm of its training cells."
        if comparison.n_train is not None
        else "All nodes have the same size: the numbers of training cells are not known."
    )
    marks = f"Blue: a gain; orange: a loss; grey: not in the test set. {sizes}"
    caption = (
        f"{said}{model} {of_these} Each type stands below its parent; purple: an edge from a further parent. {marks}"
    )
    yield (
        "ontology",
        ontology_figure(comparison.reachability, comparison.labels, changes, comparison.n_train, what),
        caption,
    )
    caption = f"{said}{model} {of_these} The same as a graph in layers, parents above their children. {marks}"
    yield "dag", dag_figure(comparison.reachability, changes, comparison.n_train, what), caption


def overall_figure(comparison: Comparison, tables: Tables) -> tuple[Picture, str]:
    """Draw macro F1 of every model and loss, a panel for each split, with the differences above.

    Examples
    --------
    >>> overall_figure(comparison, tables)[0].axes[0].get_title()  # doctest: +SKIP
    'held-out donors'
    """
    n_models, losses, splits = len(comparison.models), comparison.losses, comparison.splits
    panel = max(1.05 * n_models, 2.6)
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
    intervals = "the difference to " + losses[0] + " in points with its 95 % interval by bootstrap over studies"
    published = " Open diamonds: the published value, on the published data." if has_published else ""
    caption = (
        f"Macro F1 of each model and loss on {' and on '.join(SPLITS[split] for split in splits)}. Dots: "
        f"{_n_seeds(comparison)}; lines: their mean; above: {intervals}.{published} {_data(comparison)}"
    )
    return figure, caption


def _draw_scores(axes: Axes, comparison: Comparison, tables: Tables, split: str) -> bool:
    """Draw the scores of one split; True if published ones are among them."""
    losses, step = comparison.losses, SHARE / len(comparison.losses)
    scores = tables.by_seed[(tables.by_seed["split"] == split) & (tables.by_seed["average"] == "macro")]
    overall = tables.overall[(tables.overall["split"] == split) & (tables.overall["average"] == "macro")]
    means = overall.set_index(["model", "loss"])
    has_published = False
    for at, model in enumerate(comparison.models):
        for place, loss in enumerate(losses):
            x = at + step * (place - (len(losses) - 1) / 2)
            row, colour = means.loc[(model, loss)], _loss_colour(place)
            f1 = 100 * scores[(scores["model"] == model) & (scores["loss"] == loss)]["f1"].to_numpy(float)
            axes.hlines(100 * row["mean"], x - 0.42 * step, x + 0.42 * step, color=colour, linewidth=1.4, zorder=2)
            _dots(axes, x, f1, SPREAD * step, colour, "o")
            if (model, loss, split) in PUBLISHED:
                has_published = True
                style: dict[str, Any] = {"markersize": 4, "markerfacecolor": "white", "markeredgewidth": 0.8}
                axes.plot(x, 100 * PUBLISHED[model, loss, split], "D", markeredgecolor=colour, zorder=4, **style)
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


def by_class_figure(comparison: Comparison, tables: Tables, loss: str) -> tuple[Picture, str]:
    """Draw the change in F1 by depth, of leaves and others, of connected and isolated types, for all models.

    Examples
    --------
    >>> len(by_class_figure(comparison, tables, "HCE")[0].axes)  # doctest: +SKIP
    6
    """
    table = tables.by_class[tables.by_class["loss"] == loss]
    groupings = {"depth": "depth (number of ancestors)", "leaf": "", "connected": ""}
    values = {grouping: _values(table, grouping) for grouping in groupings}
    n_values = sum(max(len(each), 1) for each in values.values())
    room = max(7.1 - 2 * MARGIN_SIDE - 3 * LEFT, 0.14 * len(comparison.models) * n_values)
    row_height = CLASS_HEIGHT + 0.45
    what = f"Change in F1 by kind of cell type, {loss} {MINUS} {comparison.losses[0]}"
    height = BOTTOM - 0.15 + row_height * len(comparison.splits)
    figure = new_figure(room + 3 * LEFT + 2 * MARGIN_SIDE, height, what, TITLE_SIZE)
    for number, split in enumerate(comparison.splits):
        left, bottom = MARGIN_SIDE + LEFT, height - row_height * (number + 1) + 0.28
        for grouping, heading in groupings.items():
            width = room * max(len(values[grouping]), 1) / n_values
            axes = axes_at(figure, left, bottom, width, CLASS_HEIGHT)
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
        f"ontology, of leaves and internal types, and of types with and without relatives among the types. Dots: "
        f"{_n_seeds(comparison)}; lines: their mean; in parentheses: the number of types. {_data(comparison)}"
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


def calibration_figure(comparison: Comparison, tables: Tables) -> tuple[Picture, str]:
    """Draw accuracy against confidence of every model, loss and split, before and after temperature scaling.

    Examples
    --------
    >>> len(calibration_figure(comparison, tables)[0].axes)  # doctest: +SKIP
    12
    """
    rows = [(split, loss) for split in comparison.splits for loss in comparison.losses]
    across, down = SQUARE + LEFT, SQUARE + 0.36
    width = LEFT + across * len(comparison.models) + 2 * MARGIN_SIDE
    height = BOTTOM + down * len(rows)
    figure = new_figure(max(width, 3.4), height, "Reliability of the confidence", TITLE_SIZE)
    for number, (split, loss) in enumerate(rows):
        for column, model in enumerate(comparison.models):
            bottom = height - down * (number + 1) + 0.16
            axes = axes_at(figure, MARGIN_SIDE + LEFT + across * column, bottom, SQUARE, SQUARE)
            _draw_reliability(axes, tables, model, loss, split)
            axes.set_title(f"{model}, {loss}, {SPLITS[split]}", fontsize=NAME_SIZE, pad=3, parse_math=False)
            if column == 0:
                axes.set_ylabel("accuracy", fontsize=NAME_SIZE)
            if number == len(rows) - 1:
                axes.set_xlabel("confidence", fontsize=NAME_SIZE, labelpad=1.5)
    scaled = tables.calibration["temperature"].notna().any()
    marks = [_reliability_marks(BEFORE_COLOUR, "as predicted")]
    if scaled:
        marks.append(_reliability_marks(AFTER_COLOUR, "after temperature scaling"))
    _legend(figure, marks)
    after = (
        " before (orange) and after (blue) temperature scaling, T fitted on validation data; ECE: the expected "
        "calibration error before and after (T and ECE are means over seeds)."
        if scaled
        else "; no temperature was fitted. ECE: the expected calibration error."
    )
    caption = (
        f"Accuracy against confidence in 15 bins, the cells of all seeds together,{after} Dashed: as it should be; below "
        f"it a model is surer of itself than it should be. {_data(comparison)}"
    )
    return figure, caption.replace("together,;", "together;").replace("together, before", "together, before")


def _draw_reliability(axes: Axes, tables: Tables, model: str, loss: str, split: str) -> None:
    def of_this(table: pd.DataFrame) -> pd.DataFrame:
        return table[(table["model"] == model) & (table["loss"] == loss) & (table["split"] == split)]

    axes.plot([0, 1], [0, 1], color="black", linewidth=0.6, linestyle="--", zorder=1)
    bins = of_this(tables.reliability)
    for is_scaled, colour in ((False, BEFORE_COLOUR), (True, AFTER_COLOUR)):
        used = bins[(bins["scaled"] == is_scaled) & (bins["cells"] > 0)]
        style = {"color": colour, "linewidth": 0.8, "markersize": 2.6, "clip_on": False}
        axes.plot(used["confidence"], used["accuracy"], "-o", zorder=2 + is_scaled, **style)
    for _, row in of_this(tables.calibration).iterrows():
        text = f"ECE {row['ece_before']:.3f}"
        if np.isfinite(row["temperature"]):
            text += f" \N{RIGHTWARDS ARROW} {row['ece_after']:.3f}\nT = {row['temperature']:.2f}"
        axes.text(0.97, 0.04, text, ha="right", va="bottom", fontsize=NAME_SIZE, linespacing=1.2)
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


def _plain(axes: Axes, grid: str) -> None:
    axes.tick_params(labelsize=NAME_SIZE, length=2, width=0.4, pad=1.5)
    axes.tick_params(axis="x", length=0 if grid == "y" else 2)
    axes.grid(axis=grid, linewidth=0.4, color=GRID_COLOUR)
    axes.set_axisbelow(True)
    axes.spines[["right", "top"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_linewidth(0.4)


def _legend(figure: Picture, marks: list[Line2D]) -> None:
    """Explain the marks at the bottom."""
    place = (MARGIN_SIDE / figure.get_figwidth(), 0.06 / figure.get_figheight())
    style: dict[str, Any] = {"frameon": False, "borderpad": 0, "borderaxespad": 0, "handlelength": 1.8}
    legend = figure.legend(
        handles=marks,
        loc="lower left",
        bbox_to_anchor=place,
        ncols=len(marks),
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


def _file_name(text: str) -> str:
    """Write a model or a loss as part of a file name: LaTeX takes what follows a full stop for the suffix."""
    return re.sub("[^a-z0-9]+", "_", text.lower()).strip("_")


def _data(comparison: Comparison) -> str:
    return f"Trained on: {comparison.store}."


def _n_seeds(comparison: Comparison) -> str:
    return f"{len(comparison.seeds)} seeds" if len(comparison.seeds) > 1 else "the only seed"


def _mean_of(comparison: Comparison) -> str:
    return f"mean over {len(comparison.seeds)} seeds" if len(comparison.seeds) > 1 else "one seed"
