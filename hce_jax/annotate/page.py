"""A page of HTML made of elements, so that it is well nested and nothing that a user wrote can become a part of it."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

Element = ElementTree.Element
#: What stands in an element: text, which is escaped when the page is written, or another element.
Content = str | Element

#: Keeps a number and its sign on one line.
_SPACE = "\N{NO-BREAK SPACE}"
#: Marks are told apart without their colours.
_MARKS = {"fine": "✓ fine", "look": "● look", "bad": "✗ bad"}

_STYLE_FILE = Path(__file__).with_name("page.css")
#: The page asks for nothing but itself; a browser is told to hold it to that.
_ALLOWED = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def element(tag: str, *content: Content, **attributes: str) -> Element:
    """Make an element.

    Parameters
    ----------
    tag
        Its name.
    *content
        What stands in it.
    **attributes
        A trailing ``_`` is dropped, ``class_`` for example, and ``_`` within a name stands for ``-``.

    Examples
    --------
    >>> ElementTree.tostring(element("p", "a < b ", element("b", "c"), " d", class_="small")).decode()
    '<p class="small">a &lt; b <b>c</b> d</p>'
    """
    made = Element(tag, {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()})
    last: Element | None = None
    for each in content:
        if isinstance(each, Element):
            made.append(last := each)
        elif last is None:
            made.text = (made.text or "") + each
        else:
            last.tail = (last.tail or "") + each
    return made


def table(header: Sequence[str], rows: Iterable[Sequence[Content]], numbers: Sequence[int] = ()) -> Element:
    """Make a table that can be scrolled sideways where the page is narrow.

    Parameters
    ----------
    header
        Names of the columns.
    rows
        The cells of each row.
    numbers
        The columns, by position, that hold numbers.

    Examples
    --------
    >>> made = table(["type", "cells"], [["B cell", "7"]], numbers=[1])
    >>> [cell.text for cell in made.iter("td")]
    ['B cell', '7']
    """
    kinds = [{"class_": "number"} if place in numbers else {} for place in range(len(header))]
    head = [element("th", name, scope="col", **kind) for name, kind in zip(header, kinds, strict=True)]
    body = [
        element("tr", *(element("td", each, **kind) for each, kind in zip(row, kinds, strict=True))) for row in rows
    ]
    made = element("table", element("thead", element("tr", *head)), element("tbody", *body))
    return element("div", made, class_="scroll")


def mark(kind: str) -> Element:
    """Make the mark of what is ``fine``, worth a ``look``, or ``bad``.

    Examples
    --------
    >>> mark("look").text
    '● look'
    """
    return element("span", _MARKS[kind], class_=f"mark {kind}")


def marked(value: float, limits: tuple[float, float]) -> Element:
    """Make the mark of a value that is worth a look below the first limit, and bad below the second.

    Examples
    --------
    >>> [marked(value, (0.8, 0.5)).text for value in (0.9, 0.8, 0.7, 0.4)]
    ['✓ fine', '✓ fine', '● look', '✗ bad']
    """
    return mark("fine" if value >= limits[0] else "look" if value >= limits[1] else "bad")


def html(title: str, content: Iterable[Element]) -> str:
    """Return a whole page, with the style of :file:`page.css` in it.

    Parameters
    ----------
    title
        For the browser's window.
    content
        What it shows.

    Examples
    --------
    >>> html("cells", [element("p", "few")]).endswith('<p>few</p></main></body></html>')
    True
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_ALLOWED),
        element("title", title),
        element("style", _STYLE_FILE.read_text(encoding="utf-8")),
    )
    page = element("html", head, element("body", element("main", *content)), lang="en")
    return f"<!DOCTYPE html>\n{ElementTree.tostring(page, encoding='unicode', method='html')}"


def share(part: int | float, whole: int | float) -> str:
    """Write a share in percent; 0 % and 100 % are said only of none and of all.

    Examples
    --------
    >>> [share(part, 10_000).replace("\N{NO-BREAK SPACE}", " ") for part in (0, 1, 3_333, 9_999, 10_000)]
    ['0 %', '<0.1 %', '33.3 %', '>99.9 %', '100 %']
    """
    percent = 100 * part / whole if whole else 0.0
    if percent in (0, 100):
        return f"{percent:.0f}{_SPACE}%"
    if not 0.05 <= percent < 99.95:
        return f"<0.1{_SPACE}%" if percent < 50 else f">99.9{_SPACE}%"
    return f"{percent:.1f}{_SPACE}%"


def said_of(number: int, one: str, several: str | None = None) -> str:
    """Write a number of things.

    Examples
    --------
    >>> said_of(1, "cell"), said_of(1234, "cell"), said_of(2, "is", "are")
    ('1 cell', '1,234 cells', '2 are')
    """
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def rounded(probability: float) -> str:
    """Write a probability with two digits, cut off: 1.00 is said only of what is sure.

    Examples
    --------
    >>> rounded(0.5), rounded(0.98), rounded(0.997), rounded(1.0)
    ('0.50', '0.98', '0.99', '1.00')
    """
    # A float32 such as 0.98 can lie a little below what it was written as.
    return f"{math.floor(100 * probability + 1e-4) / 100:.2f}"
