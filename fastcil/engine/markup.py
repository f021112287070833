"""Pieces of HTML, with everything that comes from outside escaped."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_DROPPED = ("metadata", "style")


class Html(str):
    """Text that is HTML already; any other string is escaped where it is put into a page."""

    __slots__ = ()


def text(value: Any) -> Html:
    """A value as HTML text.

    Example:
        >>> text("a < b"), text(Html("<b>"))
        ('a &lt; b', '<b>')
    """
    return value if isinstance(value, Html) else Html(escape(str(value)))


def tag(name: str, *content: Any, **attributes: Any) -> Html:
    """An element; an attribute's trailing underscore is dropped, None leaves it out.

    Example:
        >>> tag("p", "1 < 2", class_="note")
        '<p class="note">1 &lt; 2</p>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>{''.join(text(part) for part in content)}</{name}>")


def image(source: str, description: str) -> Html:
    """A picture from a ``data:`` URI; nothing is ever fetched.

    Example:
        >>> image("https://example.org/x.png", "x")
        '<span class="note">x: no picture</span>'
    """
    if not source.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")):
        return tag("span", f"{description}: no picture", class_="note")
    return Html(f'<img src="{escape(source)}" alt="{escape(description)}">')


def table(columns: Sequence[Any], rows: Iterable[Sequence[Any]]) -> Html:
    """A table that scrolls sideways where it is too wide; all columns but the first are figures.

    Args:
        columns: Headings.
        rows: Cells, `Html` or anything to be escaped.
    """
    head = tag("tr", *(tag("th", column, scope="col") for column in columns))
    body = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="wide")


def definitions(entries: Mapping[str, Any]) -> Html:
    """A definition list."""
    parts = [tag("div", tag("dt", name), tag("dd", value)) for name, value in entries.items()]
    return tag("dl", *parts)


def details(summary: Any, *content: Any, shown: bool = False) -> Html:
    """Content that opens and closes."""
    opened = {"open": ""} if shown else {}
    return tag("details", tag("summary", summary), *content, **opened)


def plot(figure: Figure, description: str, caption: Any = None) -> Html:
    """A figure as inline SVG, its text as text in the page's font.

    Args:
        figure: The figure.
        description: What a screen reader says; different for every plot of a page.
        caption: What stands above, or None.
    """
    above = [] if caption is None else [tag("figcaption", caption)]
    return tag("figure", *above, _svg(figure, description), class_="plot")


def _svg(figure: Figure, description: str) -> Html:
    """The SVG element, without namespaces, metadata and fonts; its ids are its own."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    own = f"p{zlib.crc32(description.encode()):08x}-"
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in _DROPPED:
                parent.remove(child)
    references = {
        value.partition("#")[2].rstrip(")")
        for element in root.iter()
        for value in element.attrib.values()
        if value.startswith(("#", "url(#"))
    }
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {
            key.rpartition("}")[2]: value
            for key, value in _attributes(element.attrib, references, own)
        }
    root.attrib |= {"role": "img", "aria-label": description}
    return Html(ElementTree.tostring(root, encoding="unicode"))


def _attributes(
    attributes: Mapping[str, str], references: set[str], own: str
) -> Iterable[tuple[str, str]]:
    """An element's attributes, ids made unique or dropped, fonts left to the page."""
    for key, value in attributes.items():
        if key == "id":
            if value in references:
                yield key, own + value
        elif value.startswith(("#", "url(#")):
            yield key, value.replace("#", f"#{own}", 1)
        elif key == "style":
            kept = [part for part in value.split("; ") if not part.startswith("font-family")]
            yield key, "; ".join(kept)
        else:
            yield key, value


def format_bytes(count: float) -> str:
    """Bytes as people read them, in powers of 1024.

    Example:
        >>> format_bytes(812), format_bytes(409600), format_bytes(1.5 * 1024**2)
        ('812 B', '400 KiB', '1.5 MiB')
    """
    place = 0
    while abs(count) >= 1024 and place < len(_UNITS) - 1:
        count, place = count / 1024, place + 1
    return f"{count:.0f} {_UNITS[place]}" if count >= 100 else f"{count:.3g} {_UNITS[place]}"


def format_seconds(seconds: float) -> str:
    """A stretch of time as people read it.

    Example:
        >>> format_seconds(3.21), format_seconds(75), format_seconds(8000)
        ('3.2 s', '1 min 15 s', '2 h 13 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def format_figure(mean: float, half: float | None = None, sign: bool = False) -> str:
    """A mean with the half-width of its interval, if it has one.

    Example:
        >>> format_figure(61.234, 1.5), format_figure(2.0, sign=True), format_figure(float("nan"))
        ('61.23 ± 1.50', '+2.00', '–')
    """
    if mean != mean:
        return "–"
    shown = f"{mean:+.2f}" if sign else f"{mean:.2f}"
    return shown if half is None else f"{shown} ± {half:.2f}"
