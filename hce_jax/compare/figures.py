"""The pictures of a comparison, in one style, each as PNG and as PDF.

Everything is drawn from the tables of :mod:`hce_jax.compare.numbers`; text is never below 5.5 points, and most pictures
are as wide as the text of a page of A4. Blue is a gain or the hierarchical loss, orange a loss or the baseline.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure as Picture

from hce_jax.compare.numbers import Tables
from hce_jax.compare.ontology_figure import dag_figure, ontology_figure
from hce_jax.compare.panels import MINUS, SPLITS, by_class_figure, calibration_figure, overall_figure
from hce_jax.compare.trained import Comparison
from hce_jax.compare.waterfall import SIGNIFICANT, waterfall_figure
from hce_jax.figure_style import save

DOTS_PER_INCH = 200


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
    data = f" Trained on: {comparison.store}."
    yield "overall", *_with(overall_figure(comparison, tables), data)
    for loss in comparison.losses[1:]:
        for model in comparison.models:
            for split in comparison.splits:
                several = (loss,) if len(comparison.losses) > 2 else ()
                ending = "_".join(_file_name(part) for part in (model, split, *several))
                for kind, picture, caption in _of_types(comparison, tables, model, loss, split):
                    yield f"{kind}_{ending}", picture, caption + data
    for loss in comparison.losses[1:]:
        name = "by_class" if len(comparison.losses) == 2 else f"by_class_{_file_name(loss)}"
        yield name, *_with(by_class_figure(comparison, tables, loss), data)
    yield "calibration", *_with(calibration_figure(comparison, tables), data)


def _with(drawn: tuple[Picture, str], data: str) -> tuple[Picture, str]:
    """Add to a caption which data it is about."""
    picture, caption = drawn
    return picture, caption + data


def _of_types(
    comparison: Comparison, tables: Tables, model: str, loss: str, split: str
) -> Iterator[tuple[str, Picture, str]]:
    """Give the three pictures of single types: of a model, a loss and a split."""
    table = tables.per_type
    rows = table[(table["model"] == model) & (table["loss"] == loss) & (table["split"] == split)]
    what = f"{model}, {SPLITS[split]}: change in F1, {loss} {MINUS} {comparison.losses[0]}"
    seeds = f"mean over {len(comparison.seeds)} seeds" if len(comparison.seeds) > 1 else "one seed"
    said = f"Change in F1 (points, {loss} minus {comparison.losses[0]}, {seeds}) of "
    of_these = f"on {SPLITS[split]}."

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
        f"{said}{model} {of_these} Each type stands below its parent, which is named where it is in another column; "
        f"purple: an edge from a further parent. {marks}"
    )
    yield (
        "ontology",
        ontology_figure(comparison.reachability, comparison.labels, changes, comparison.n_train, what),
        caption,
    )
    caption = f"{said}{model} {of_these} The same as a graph in layers, parents above their children. {marks}"
    yield "dag", dag_figure(comparison.reachability, changes, comparison.n_train, what), caption


def _file_name(text: str) -> str:
    """Write a model or a loss as part of a file name: LaTeX takes what follows a full stop for the suffix."""
    return re.sub("[^a-z0-9]+", "_", text.lower()).strip("_")
