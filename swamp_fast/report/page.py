"""Builds a page from its parts and the templates: one HTML file without scripts or requests.

Python computes the content of a page, and the files in templates/ lay it out. Jinja escapes all text except Markup,
which only templates and this project's drawings produce.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from shlex import quote
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import swamp_fast.report.formats as formats
from swamp_fast.report.canvas import COLOURS, InlineSvg, inline_svg, svg

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Picture:
    """A figure, with the numbers that it shows.

    name     name of the files: figures/NAME.svg, figures/NAME.png and numbers/NAME.csv
    caption  what the figure shows, and what it does not show
    drawing  the matplotlib figure
    rows     the numbers, for the CSV file
    """

    name: str
    title: str
    caption: str
    drawing: Any
    rows: Rows

    @cached_property
    def svg(self) -> str:
        """The drawing as the text of an SVG file."""
        return svg(self.drawing)

    @property
    def inline(self) -> InlineSvg:
        """The drawing as an SVG to be placed in a page."""
        return inline_svg(self.svg, self.name)


@dataclass(frozen=True)
class Table:
    """A table whose cells are already formatted. The first `text_columns` columns hold text, the others numbers.

    label  what the table holds, for screen readers
    """

    label: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    text_columns: int = 1


@dataclass(frozen=True)
class Section:
    """A section of a page: its heading, its template, and the values and pictures that the template shows."""

    heading: str
    template: str
    values: Mapping[str, Any] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()

    @property
    def html(self) -> Markup:
        """The HTML of the section, without the heading."""
        return render(self.template, pictures=self.pictures, **self.values)


@dataclass(frozen=True)
class Page:
    """A page: title, introduction, the few most important numbers, and sections.

    lead    the introduction
    facts   label -> one of the most important numbers
    tables  name -> rows that are written to numbers/NAME.csv, in addition to those of the pictures
    """

    title: str
    lead: Markup
    facts: Mapping[str, str]
    sections: Sequence[Section]
    tables: Mapping[str, Rows] = field(default_factory=dict)

    @property
    def pictures(self) -> list[Picture]:
        """The pictures of all sections."""
        return [picture for section in self.sections for picture in section.pictures]

    def html(self) -> str:
        """The HTML text of the page."""
        return render("page.html", page=self, colours=COLOURS) + "\n"


def render(template: str, **values: Any) -> Markup:
    """Fill a template of this package with values."""
    return Markup(_environment().get_template(template).render(values))


def code(text: Any) -> Markup:
    """A text in a <code> element, for use in a line or a table cell."""
    return Markup("<code>{}</code>").format(text)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("swamp_fast.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": formats.percent,
        "duration": formats.duration,
        "grouped": formats.grouped,
        "python": formats.python_literal,
        "quote": quote,
    }
    return environment
