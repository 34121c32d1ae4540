"""What all pictures share: axes placed in inches, texts measured before they are drawn, files that are whole.

Figures are drawn on their own canvas: pyplot, with its global state, takes no part.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from hce_jax.files import written_aside
from hce_jax.store.work_folder import named_in_errors

GRID_COLOUR = "#dddddd"
GREY = "#767676"

#: Inches: round everything, above the title, and of each line of the title.
MARGIN_SIDE, TITLE_TOP, TITLE_LINE = 0.15, 0.12, 0.17
#: Points.
TITLE_SIZE = 10.0
DOTS_PER_INCH = 150


def new_figure(width: float, height: float, title: str, size: float = TITLE_SIZE) -> Figure:
    """Make a figure with a title, of as many lines as it needs, above so much space.

    Parameters
    ----------
    width, height
        Inches, the height without the title.
    title
        Written at the top left.
    size
        Of the title, in points.

    Examples
    --------
    >>> figure = new_figure(7.0, 2.0, "F1 of every cell type")
    >>> figure.get_size_inches().round(2).tolist()
    [7.0, 2.29]
    """
    titles, line = lines(title, size, width - 2 * MARGIN_SIDE), TITLE_LINE * size / TITLE_SIZE
    figure = Figure(figsize=(width, height + TITLE_TOP + line * len(titles)), dpi=DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    place = MARGIN_SIDE / width, 1 - TITLE_TOP / figure.get_figheight()
    figure.text(*place, "\n".join(titles), va="top", fontsize=size, parse_math=False)
    return figure


def axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Add axes at a place in inches.

    Examples
    --------
    >>> float(axes_at(new_figure(4.0, 2.0, ""), 1.0, 0.5, 2.0, 1.0).get_position().width)
    0.5
    """
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def widest(texts: Sequence[str], size: float) -> float:
    """Return the width in inches of the widest of some texts of a size in points.

    Examples
    --------
    >>> widest(["T cell", "T cell of the thymus"], 8.0) > 2 * widest(["T cell"], 8.0)
    True
    """
    return max(_width(text, size) for text in texts)


@lru_cache(maxsize=4096)  # the same names are measured for figure after figure
def _width(text: str, size: float) -> float:
    renderer, font = RendererAgg(1, 1, DOTS_PER_INCH), FontProperties(size=size)
    return renderer.get_text_width_height_descent(text, font, ismath=False)[0] / DOTS_PER_INCH


def lines(text: str, size: float, width: float) -> list[str]:
    """Break a text of a size in points into lines that are not wider than so many inches.

    Examples
    --------
    >>> lines("CD4-positive, alpha-beta T cell", 8.0, 1.2)
    ['CD4-positive,', 'alpha-beta T cell']
    """
    n_characters = int(0.92 * width * len(text) / widest([text], size)) if text else 1
    return textwrap.wrap(text, max(n_characters, 1))


def save(figure: Figure, path: str | Path, dots_per_inch: int = DOTS_PER_INCH) -> None:
    """Write a figure in the format of the path's suffix, whole or not at all; the same figure gives the same file.

    In a PDF the fonts are embedded as TrueType, so that its text can be searched and edited.

    Raises
    ------
    OSError
        If it cannot be written; the message names the path.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(new_figure(1.0, 1.0, "title"), Path(folder) / "figure.pdf")
    ...     (Path(folder) / "figure.pdf").read_bytes()[:5]
    b'%PDF-'
    """
    metadata = {"CreationDate": None} if Path(path).suffix == ".pdf" else None
    with named_in_errors(Path(path)), written_aside(Path(path)) as aside, mpl.rc_context({"pdf.fonttype": 42}):
        figure.savefig(aside, dpi=dots_per_inch, metadata=metadata)
