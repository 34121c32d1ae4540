"""What is in a store: cells of each type, tech_sample, assay, tissue, study and disease, as a table and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hce_jax.files import written_aside
from hce_jax.store.schema import LABEL_COLUMN, SPLITS

#: The columns that are summed up, in the order of the table.
SUMMARY_COLUMNS = (LABEL_COLUMN, "tech_sample", "assay", "tissue", "tissue_general", "dataset_id", "disease")
SAMPLE_COLUMN, STUDY_COLUMN = "tech_sample", "dataset_id"

TABLE_FILE, PLOT_FILE = "data_summary.csv", "data_summary.png"

#: A mark for each split: shape, and how far it lies below the middle of its row. They differ in shape, in place and in
#: colour, for val and test have about as many cells.
_MARKS = {"train": ("o", "#3b6fa0", 0.0), "val": ("^", "#d97706", 0.2), "test": ("v", "#7a3e9d", -0.2)}
BAR_COLOUR, GREY = "#c9d6e3", "#767676"
#: Rows of a small panel; what is beyond is summed up in a line, and stands in the table.
_PANEL_ROWS = 20
#: Where the axes of cells begin: a bar of one cell must be seen.
_LEAST = 0.8

# Inches; as in hce_jax.evaluation.plots, a row has room for a name of 8 points.
ROW_HEIGHT, NAME_SIZE, NUMBER_SIZE = 0.165, 8, 7
BARS_WIDTH, PANEL_WIDTH, NUMBER_WIDTH = 4.5, 2.4, 0.85
MARGIN, NAME_GAP, COLUMN_GAP = 0.15, 0.1, 0.35
TITLE_HEIGHT, HEAD_HEIGHT, FOOT_HEIGHT, HISTOGRAM_HEIGHT = 0.35, 0.3, 0.5, 1.6
DOTS_PER_INCH = 150


def data_summary(obs: pd.DataFrame) -> pd.DataFrame:
    """Count the cells of each label of each of the :data:`SUMMARY_COLUMNS`.

    Parameters
    ----------
    obs
        One row per cell; categorical columns of these names, and ``split`` (train, val or test).

    Returns
    -------
    pandas.DataFrame
        One row per column and label that some cell has: ``column``, ``label``, the cells in ``train``, ``val``,
        ``test`` and in ``total``; for cell types also the number of ``tech_samples`` (a donor of a study) and of
        ``studies`` (dataset_id) that have such cells, empty for the others. In the order of the columns, then by total,
        the largest first; equal ones in the order of the categories.

    Raises
    ------
    ValueError
        If a cell lacks a label, or is in another split.

    Examples
    --------
    >>> obs = pd.DataFrame({column: ["a", "b", "a"] for column in SUMMARY_COLUMNS}).assign(split="train")
    >>> data_summary(obs.astype("category")).query("column == 'assay'")[["label", "total"]].to_numpy().tolist()
    [['a', 2], ['b', 1]]
    """
    split_n = _codes(obs["split"].cat.set_categories(SPLITS))
    counts = pd.concat([_count(obs[column], split_n) for column in SUMMARY_COLUMNS], ignore_index=True)
    for name, column in (("tech_samples", SAMPLE_COLUMN), ("studies", STUDY_COLUMN)):
        of_type = _different(obs[LABEL_COLUMN], obs[column])
        numbers = of_type.reindex(counts["label"]).to_numpy()
        counts[name] = pd.array(numbers, "Int64")
        counts.loc[counts["column"] != LABEL_COLUMN, name] = pd.NA
    return counts


def _codes(values: pd.Series) -> np.ndarray:
    codes = values.cat.codes.to_numpy()
    if codes.min(initial=0) < 0:
        raise ValueError(f"a cell has no {values.name}, or an unknown one")
    return codes


def _count(values: pd.Series, split_n: np.ndarray) -> pd.DataFrame:
    """Count the cells of each label and split."""
    labels, code_n = values.cat.categories, _codes(values)
    cells_ls = np.bincount(code_n * np.int64(len(SPLITS)) + split_n, minlength=len(labels) * len(SPLITS))
    counts = pd.DataFrame(cells_ls.reshape(-1, len(SPLITS)), columns=list(SPLITS))
    counts.insert(0, "column", str(values.name))
    counts.insert(1, "label", labels.astype(str))
    counts["total"] = counts[list(SPLITS)].sum(axis=1)
    return counts[counts["total"] > 0].sort_values("total", ascending=False, kind="stable")


def _different(values: pd.Series, others: pd.Series) -> pd.Series:
    """Count, for each label, the labels of another column that its cells have."""
    meet = np.zeros((len(values.cat.categories), len(others.cat.categories)), bool)
    meet[_codes(values), _codes(others)] = True
    return pd.Series(meet.sum(axis=1), values.cat.categories.astype(str))


def write_summary(folder: Path, counts: pd.DataFrame) -> None:
    """Write ``data_summary.csv`` and ``data_summary.png``.

    Parameters
    ----------
    folder
        Where to; it must exist.
    counts
        From :func:`data_summary`.

    Raises
    ------
    OSError
        If they cannot be written.

    Examples
    --------
    >>> write_summary(Path("store"), data_summary(obs))  # doctest: +SKIP
    """
    with written_aside(folder / TABLE_FILE) as aside:
        counts.to_csv(aside, index=False)
    n_labels = counts["column"].value_counts()
    n_cells = counts.loc[counts["column"] == LABEL_COLUMN, "total"].sum()
    title = (
        f"{n_cells:,} cells, {n_labels[LABEL_COLUMN]:,} cell types, {n_labels[STUDY_COLUMN]:,} studies, "
        f"{n_labels[SAMPLE_COLUMN]:,} tech_samples"
    )
    summary_plot(counts, folder / PLOT_FILE, title)


def summary_plot(counts: pd.DataFrame, path: Path, title: str) -> None:
    """Draw the cells of every type in each split; beside it tissues, assays, and how many cells tech_samples have.

    Numbers of cells are on a logarithmic axis: a bar for all cells of a type, and a mark for each split that has some.
    Nothing is stacked, for on such an axis equal lengths are equal ratios, not equal numbers.

    Parameters
    ----------
    counts
        From :func:`data_summary`.
    path
        The PNG to write.
    title
        Above the picture.

    Examples
    --------
    >>> summary_plot(data_summary(obs), Path("data_summary.png"), "The atlas")  # doctest: +SKIP
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    of = {column: rows.reset_index(drop=True) for column, rows in counts.groupby("column")}
    types, tissues, assays = of[LABEL_COLUMN], of["tissue_general"], of["assay"]
    panels = [_shortened(tissues), _shortened(assays)]
    names_width = _text_width(types["label"])
    panel_names_width = max(_text_width(panel["label"]) for panel in panels)
    types_x = MARGIN + names_width + NAME_GAP
    panel_x = types_x + BARS_WIDTH + 3 * NUMBER_WIDTH + COLUMN_GAP + panel_names_width + NAME_GAP
    width = panel_x + PANEL_WIDTH + NUMBER_WIDTH + MARGIN
    frame = HEAD_HEIGHT + FOOT_HEIGHT
    panels_height = sum(len(panel) * ROW_HEIGHT + frame for panel in panels) + HISTOGRAM_HEIGHT + frame
    height = TITLE_HEIGHT + max(len(types) * ROW_HEIGHT + frame, panels_height)
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.text(MARGIN / width, 1 - 0.12 / height, title, va="top", fontsize=11)

    top = TITLE_HEIGHT + HEAD_HEIGHT
    axes = _axes(figure, types_x, top, BARS_WIDTH, len(types) * ROW_HEIGHT)
    _draw_rows(axes, types, ("total", "tech_samples", "studies"))
    _draw_marks(axes, types)
    for panel, name in zip(panels, ("tissue_general", "assay"), strict=True):
        axes = _axes(figure, panel_x, top, PANEL_WIDTH, len(panel) * ROW_HEIGHT)
        _draw_rows(axes, panel, ("total",))
        axes.set_title(name, loc="left", fontsize=NAME_SIZE, pad=4)
        top += len(panel) * ROW_HEIGHT + frame
    _draw_histogram(_axes(figure, panel_x, top, PANEL_WIDTH, HISTOGRAM_HEIGHT), of[SAMPLE_COLUMN]["total"])
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=DOTS_PER_INCH)


def _text_width(texts: pd.Series) -> float:
    """Return the width in inches of the widest name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    renderer, font = FigureCanvasAgg(Figure(dpi=DOTS_PER_INCH)).get_renderer(), FontProperties(size=NAME_SIZE)
    return max(renderer.get_text_width_height_descent(text, font, False)[0] for text in texts) / DOTS_PER_INCH


def _shortened(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the largest rows and one for all others together, if they are more than a small panel has."""
    if len(rows) <= _PANEL_ROWS:
        return rows
    shown, others = rows[: _PANEL_ROWS - 1], rows[_PANEL_ROWS - 1 :]
    together = pd.DataFrame({"label": [f"{len(others)} others together"], "total": [others["total"].sum()]})
    return pd.concat([shown[["label", "total"]], together], ignore_index=True)


def _axes(figure: Any, left: float, top: float, width: float, height: float) -> Any:
    """Add axes, placed in inches from the upper left corner."""
    full_width, full_height = figure.get_size_inches()
    lower = full_height - top - height
    return figure.add_axes((left / full_width, lower / full_height, width / full_width, height / full_height))


def _draw_rows(axes: Any, rows: pd.DataFrame, numbers: Sequence[str]) -> None:
    """Draw a bar for each row, its name on the left and columns of numbers on the right."""
    places = np.arange(len(rows))
    axes.barh(places, rows["total"], height=0.8, color=BAR_COLOUR, label="all cells")
    axes.set(xscale="log", xlim=(_LEAST, 1.5 * rows["total"].max()), ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(places, rows["label"], fontsize=NAME_SIZE)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=NUMBER_SIZE)
    axes.set_xlabel("cells (logarithmic)", fontsize=NAME_SIZE)
    axes.grid(axis="x", linewidth=0.4, color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["right", "top"]].set_visible(False)
    axes_width = axes.get_position().width * axes.figure.get_figwidth()
    grey = {"ha": "right", "fontsize": NUMBER_SIZE, "color": GREY}
    for number, name in enumerate(numbers):
        right = 1 + (number + 1) * NUMBER_WIDTH / axes_width
        head = "cells" if name == "total" else name
        axes.annotate(head, (right, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", **grey)
        for place, value in enumerate(rows[name]):
            axes.text(right, place, f"{value:,}", transform=axes.get_yaxis_transform(), va="center", **grey)


def _draw_marks(axes: Any, rows: pd.DataFrame) -> None:
    """Draw the marks of the splits, and what they mean above the axes."""
    for split, (shape, colour, offset) in _MARKS.items():
        there = rows[split] > 0
        if there.any():
            places = np.flatnonzero(there) + offset
            axes.plot(rows.loc[there, split], places, shape, color=colour, markersize=4, mew=0, label=split)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=4,
        fontsize=NAME_SIZE,
        frameon=False,
        borderpad=0.1,
        borderaxespad=0,
    )


def _draw_histogram(axes: Any, cells: pd.Series) -> None:
    """Draw how many tech_samples have how many cells."""
    n_bins = int(np.clip(np.sqrt(len(cells)), 5, 30))
    bins = np.geomspace(1, cells.max() + 1, n_bins + 1)
    axes.hist(cells, bins=bins, color=BAR_COLOUR)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.axvline(cells.median(), color="black", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", xlim=(_LEAST, bins[-1]))
    axes.tick_params(labelsize=NUMBER_SIZE)
    axes.set_xlabel(f"cells of a tech_sample (dashed: median, {cells.median():,.0f})", fontsize=NAME_SIZE)
    axes.set_ylabel("tech_samples", fontsize=NAME_SIZE)
    axes.spines[["right", "top"]].set_visible(False)
