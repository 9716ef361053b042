"""Plots for a page: inline SVG that follows its colours, and the same as PNG."""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from hf_adapt.storage.text_file import write_figure

INK = "#24292f"
"""Text and axes; in a page, the colour of the text around the plot."""
COLOURS = ("#2a78c2", "#d9622b", "#2e9e6b", "#a259c4", "#c0392b", "#8a6d3b", "#d6579a", "#5b8c00")
LINES = ("-", "--", "-.", ":")
GREY = "#8b95a1"
MOST_CLASSES = 12
"""Up to this number of classes a plot names them and colours each."""
MOST_CONFUSIONS = 50
"""Where there are more classes, a table has so many of their confusions."""
MOST_GROUPS = 30
WIDTH = 4.6
"""Of a plot, in inches; a smaller one is given where it is drawn."""

STYLE: dict[Any, Any] = {
    "axes.edgecolor": GREY,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.labelsize": 8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.size": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "hf_adapt",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}
SVG = "{http://www.w3.org/2000/svg}"
TEXTS = {f"{SVG}{name}" for name in ("text", "tspan", "title", "desc")}
LINK = "{http://www.w3.org/1999/xlink}href"
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def printable(text: object) -> str:
    """Text without characters that neither XML nor UTF-8 has."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(text))


def short(text: object, most: int = 26) -> str:
    """A name as it stands in a plot, where there is little room."""
    name = printable(text).replace("\n", " ")
    name = name if len(name) <= most else f"{name[: most - 1]}…"
    return f" {name}" if name.startswith("_") else name  # matplotlib leaves out _names


def colour(number: int) -> tuple[str, str]:
    """The colour and the dashes of the n-th line."""
    return COLOURS[number % len(COLOURS)], LINES[number // len(COLOURS) % len(LINES)]


def domain_colour(number: int) -> str:
    """Blue for the source, orange for the target."""
    return COLOURS[number]


def class_colour(number: int) -> str:
    """The colour of a class: that of no domain, while there are enough."""
    return COLOURS[(number + 2) % len(COLOURS)]


@contextmanager
def style() -> Iterator[None]:
    """Draw as a page needs it, and without a warning of characters that a font lacks."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


@dataclass(frozen=True)
class Column:
    """The head of a column.

    Args:
        text: What it says.
        oracle: Whether it needs target labels.
        numeric: Whether it is set to the right.
    """

    text: str
    oracle: bool = False
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Args:
        caption: What it shows.
        columns: Its columns; the first names the row.
        rows: The cells.
        oracle_rows: Numbers of the rows that need target labels.
    """

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    oracle_rows: Sequence[int] = ()

    @property
    def oracle(self) -> bool:
        """Whether all of its rows need target labels."""
        return len(self.oracle_rows) == len(self.rows)


@dataclass(frozen=True)
class Plot:
    """A plot of the page.

    Args:
        name: The name of its file, without the ending.
        title: What stands above it.
        description: The same for who does not see it.
        size: Width and height, in inches.
        draw: Draws on the axes it is given.
        table: The numbers behind it.
        oracle: Whether it needs target labels.
        panels: Axes side by side.
    """

    name: str
    title: str
    description: str
    size: tuple[float, float]
    draw: Callable[..., None]
    table: Table
    oracle: bool = False
    panels: int = 1

    def figure(self) -> Figure:
        """The plot, drawn."""
        figure = Figure(figsize=self.size)
        self.draw(*figure.subplots(1, self.panels, squeeze=False)[0])
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, not for each file
        return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a picture whole or not at all."""
    write_figure(path, figure, facecolor="white", metadata={"Software": None})


def svg(figure: Figure, key: str, title: str, description: str) -> Markup:
    """A figure as an element of a page: the same text for the same figure.

    Args:
        figure: What to show.
        key: Prefix of its ids, that of no other plot of the page.
        title: Its name for a screen reader.
        description: What it shows.
    """
    buffer = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    root = ET.fromstring(buffer.getvalue())
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style"):  # its rules would hold for the page
                parent.remove(child)
    ids: dict[str, str] = {}
    for element in root.iter():
        _localise(element, ids, key)
    for element in root.iter():
        _shorten(element)
    width, height = (
        float(root.attrib.pop(side).removesuffix("pt")) for side in ("width", "height")
    )
    root.attrib.update(
        {
            "role": "img",
            "aria-labelledby": f"{key}-title {key}-text",
            "style": f"width:{width * 4 / 3:.0f}px",
            "viewBox": f"0 0 {width:g} {height:g}",
        }
    )
    for place, (tag, name, text) in enumerate(
        (("title", "title", title), ("desc", "text", description))
    ):
        element = ET.Element(f"{SVG}{tag}", {"id": f"{key}-{name}"})
        element.text = printable(text)
        root.insert(place, element)
    ET.register_namespace("", SVG[1:-1])
    ET.register_namespace("xlink", LINK[1:].partition("}")[0])
    return Markup(ET.tostring(root, encoding="unicode"))


def _localise(element: ET.Element, ids: dict[str, str], key: str) -> None:
    """Ids that no other plot of the page has, and the page's own colour of text."""
    values = element.attrib

    def local(name: str) -> str:
        return ids.setdefault(name, f"{key}-{len(ids)}")

    if element.tag == f"{SVG}g":  # a group is never referred to
        values.pop("id", None)
    if "id" in values:
        values["id"] = local(values["id"])
    if LINK in values:
        values["href"] = f"#{local(values.pop(LINK).removeprefix('#'))}"
    if "clip-path" in values:
        name = values["clip-path"].removeprefix("url(#").removesuffix(")")
        values["clip-path"] = f"url(#{local(name)})"
    if "style" in values:
        text = values["style"].replace(INK, "currentColor")
        values["style"] = re.sub(r"(font: [\d.]+px) [^;]*", r"\1 sans-serif", text)


def _shorten(element: ET.Element) -> None:
    """Half the bytes: no more digits than a screen shows, and one style for all points."""
    element.tail = None
    if element.tag not in TEXTS:
        element.text = None
    for name in ("x", "y", "d"):
        if name in element.attrib:
            text = re.sub(r"-?\d+\.\d+", lambda n: f"{float(n[0]):.2f}", element.attrib[name])
            element.attrib[name] = " ".join(text.split())
    styles = {child.get("style") for child in element}
    if len(element) > 1 and len(styles) == 1 and all(each.tag == f"{SVG}use" for each in element):
        for child in element:
            element.attrib["style"] = child.attrib.pop("style")
