"""Where each type stands in a picture of the ontology that can carry all names: an indented tree in several columns.

A layered drawing of 164 nodes has no room for their names. Here every type has a row of its own, below its parent and
further to the right; an edge to a further parent is a line of its own. Types without relatives stand apart, last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hce_jax.figure_style import lines, widest
from hce_jax.hierarchy import direct_edges, tree_order
from hce_jax.typing import Bool, Int

#: Points.
NAME_SIZE, SMALL_SIZE = 6.0, 5.5

#: Inches: a row of one line, a further line of a name, the indentation of a child, from a node to its name, between
#: columns; a column with what stands between it and the next, and the most that one may be high on a page of A4.
ROW_HEIGHT, LINE_HEIGHT, INDENT, NAME_GAP, GUTTER = 0.104, 0.088, 0.115, 0.075, 0.12
COLUMN_WIDTH, PAGE_HEIGHT = 3.4, 9.4
#: Inches: between two trees; types that fit in so much are left in one column.
TREE_GAP, SINGLE_COLUMN_HEIGHT = 0.05, 5.2

#: Stands above the types without relatives.
ISOLATED_TITLE = "no relatives among the types"


@dataclass(frozen=True, eq=False)
class TreeLayout:
    """Where everything stands, in inches from the top left corner.

    Attributes
    ----------
    x, y
        Of the node of each type, (c,); y grows downwards.
    names
        Of each type, with line breaks where a name is too long for its column.
    drawn, further
        [parent, child] (c, c): the edges from the parent that a type is indented below, and from its other parents.
    named
        The edges between columns: these parents are named below the type.
    notes
        For each type what is written in small below its name: the parents of ``named``.
    titles
        Places (x, y) where a block of types without relatives begins.
    width, height
        Of all of it.
    """

    x: np.ndarray
    y: np.ndarray
    names: list[str]
    drawn: Bool[np.ndarray, "c d"]
    further: Bool[np.ndarray, "c d"]
    named: Bool[np.ndarray, "c d"]
    notes: list[str]
    titles: list[tuple[float, float]]
    width: float
    height: float


@dataclass
class _Column:
    """What stands in a column, in this order: types with relatives, and those without."""

    connected: list[int] = field(default_factory=list)
    isolated: list[int] = field(default_factory=list)
    height: float = 0.0


def tree_parents(reachability: np.ndarray) -> Int[np.ndarray, " c"]:
    """Give the parent that each type stands below in tree order; -1 for a root.

    In depth-first order that is the last of its parents before it.

    Parameters
    ----------
    reachability
        R (c, c).

    Examples
    --------
    >>> diamond = np.array([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1]])
    >>> tree_parents(diamond).tolist()
    [-1, 0, 0, 1]
    """
    edges_cc, order = direct_edges(reachability), tree_order(reachability)
    parents = np.full(len(order), -1)
    for place, code in enumerate(order):
        above = [earlier for earlier in order[:place] if edges_cc[earlier, code]]
        parents[code] = above[-1] if above else -1
    return parents


def tree_layout(reachability: np.ndarray, labels: Sequence[str]) -> TreeLayout:
    """Place the types in an indented tree that is wrapped over columns of about equal height.

    A column begins with a new root where it can. Where a tree is too high for that, it begins at a type of the least
    indentation that makes columns low enough.

    Parameters
    ----------
    reachability
        R (c, c).
    labels
        Names of the c types.

    Examples
    --------
    >>> layout = tree_layout(np.array([[1, 1], [0, 1]]), ["T cell", "memory T cell"])
    >>> bool(layout.y[1] > layout.y[0]), bool(layout.x[1] > layout.x[0])
    (True, True)
    """
    edges_cc, parents = direct_edges(reachability), tree_parents(reachability)
    is_isolated = ~(edges_cc | edges_cc.T).any(axis=1)
    order, indents = tree_order(reachability), np.zeros(len(parents), np.int64)
    for code in order:
        indents[code] = indents[parents[code]] + 1 if parents[code] >= 0 else 0
    names = [_broken(label, NAME_SIZE, indent) for label, indent in zip(labels, indents.tolist(), strict=True)]

    heights = np.array([ROW_HEIGHT + LINE_HEIGHT * name.count("\n") for name in names])
    total = heights.sum()
    n_columns = 1 if total <= SINGLE_COLUMN_HEIGHT else max(2, int(np.ceil(1.03 * total / PAGE_HEIGHT)))
    connected = [code for code in order.tolist() if not is_isolated[code]]
    pieces = _pieces(connected, indents, heights, 1.15 * total / n_columns)
    columns = _filled(pieces, heights, n_columns, float(heights[is_isolated].sum()))
    column_of = np.full(len(parents), -1)
    for number, column in enumerate(columns):
        column_of[column.connected] = number

    within = edges_cc & np.equal.outer(column_of, column_of)
    drawn = within & np.equal.outer(np.arange(len(parents)), parents)
    named = edges_cc & ~within
    above = [
        "below " + " and ".join(labels[parent] for parent in np.flatnonzero(column).tolist()) for column in named.T
    ]
    notes = [
        _broken(text, SMALL_SIZE, indent) if column.any() else ""
        for text, indent, column in zip(above, indents.tolist(), named.T, strict=True)
    ]
    heights += [LINE_HEIGHT * (note.count("\n") + 1) if note else 0.0 for note in notes]
    gaps = np.where(drawn.any(axis=0) | is_isolated, 0.0, TREE_GAP)
    _add_isolated(columns, [code for code in order.tolist() if is_isolated[code]], heights, gaps)
    x, y, titles = _placed(columns, indents, heights, gaps)
    width, height = COLUMN_WIDTH * len(columns), max(column.height for column in columns)
    return TreeLayout(x, y, names, drawn, within & ~drawn, named, notes, titles, width, height)


def _broken(text: str, size: float, indent: int) -> str:
    """Break a name that is too wide for what its indentation leaves of the column."""
    room = max(COLUMN_WIDTH - GUTTER - INDENT * (indent + 0.5) - NAME_GAP, 1.0)
    return text if widest([text], size) <= room else "\n".join(lines(text, size, room))


def _pieces(connected: list[int], indents: np.ndarray, heights: np.ndarray, most: float) -> list[list[int]]:
    """Cut the types, in tree order, before each whose indentation is the least that makes pieces small enough."""
    pieces: list[list[int]] = []
    for deepest in range(int(indents.max(initial=0)) + 1):
        pieces = []
        for code in connected:
            if indents[code] <= deepest:
                pieces.append([])
            pieces[-1].append(code)
        if all(heights[piece].sum() <= most for piece in pieces):
            break
    return pieces


def _filled(pieces: list[list[int]], heights: np.ndarray, n_columns: int, isolated: float) -> list[_Column]:
    """Put pieces into columns as low as can be, where types without relatives need so much room behind them."""
    sizes = [float(heights[piece].sum()) + TREE_GAP for piece in pieces]
    height = max([(sum(sizes) + isolated) / n_columns, *sizes])
    while True:
        columns = [_Column()]
        for piece, size in zip(pieces, sizes, strict=True):
            if columns[-1].height + size > height + 1e-9:
                columns.append(_Column())
            columns[-1].connected += piece
            columns[-1].height += size
        if len(columns) <= n_columns:
            return columns + [_Column() for _ in range(n_columns - len(columns))]
        height += ROW_HEIGHT / 2


def _add_isolated(columns: list[_Column], isolated: list[int], heights: np.ndarray, gaps: np.ndarray) -> None:
    """Put types without relatives where there is room left, so that columns are as low as can be; drop empty ones."""
    taken = [float((heights + gaps)[column.connected].sum()) for column in columns]
    height = max((sum(taken) + float(heights[isolated].sum())) / len(columns), *taken, 2 * ROW_HEIGHT)
    left = isolated
    while True:
        for column, top in zip(columns, taken, strict=True):
            column.height, column.isolated = top, []
            if left and top + 3 * ROW_HEIGHT <= height:  # a title with one row below it is not worth it
                column.height += ROW_HEIGHT
                while left and column.height + heights[left[0]] <= height + 1e-9:
                    column.height += heights[left[0]]
                    column.isolated.append(left[0])
                    left = left[1:]
        if not left:
            break
        left = isolated
        height += ROW_HEIGHT / 2
    columns[:] = [column for column in columns if column.connected or column.isolated]


def _placed(
    columns: list[_Column], indents: np.ndarray, heights: np.ndarray, gaps: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[tuple[float, float]]]:
    """Give x and y of each type, and of the titles of the blocks of types without relatives."""
    x, y, titles = np.zeros(len(heights)), np.zeros(len(heights)), []
    for number, column in enumerate(columns):
        left, top = number * COLUMN_WIDTH + INDENT / 2, 0.0
        for code in column.connected:
            top += gaps[code] if top else 0.0
            x[code], y[code] = left + INDENT * (indents[code] + 0.5), top + ROW_HEIGHT / 2
            top += heights[code]
        if column.isolated:
            top += TREE_GAP if top else 0.0
            titles.append((left, top + ROW_HEIGHT / 2))
            top += ROW_HEIGHT
        for code in column.isolated:
            x[code], y[code] = left + INDENT / 2, top + ROW_HEIGHT / 2
            top += heights[code]
    return x, y, titles
