"""A page from its parts and the templates: one HTML file that needs no script and makes no request.

Python computes what a page says; the files in templates/ lay it out. Jinja escapes every text that goes into a page,
except Markup: what a template rendered, and drawings of this project.
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
    """A figure with the numbers it shows.

    name     of its files: figures/NAME.svg, figures/NAME.png and numbers/NAME.csv
    caption  what is seen, and how it must not be read
    drawing  matplotlib's figure
    """

    name: str
    title: str
    caption: str
    drawing: Any
    rows: Rows

    @cached_property
    def svg(self) -> str:
        """The text of its SVG file."""
        return svg(self.drawing)

    @property
    def inline(self) -> InlineSvg:
        """The drawing for the page."""
        return inline_svg(self.svg, self.name)


@dataclass(frozen=True)
class Table:
    """A table of finished cells; the first `text_columns` columns hold text, the others numbers.

    label  what the table holds, for screen readers
    """

    label: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    text_columns: int = 1


@dataclass(frozen=True)
class Section:
    """A part of a page: its heading, its template, and the values that the template uses beside the pictures."""

    heading: str
    template: str
    values: Mapping[str, Any] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()

    @property
    def html(self) -> Markup:
        """The section below its heading."""
        return render(self.template, pictures=self.pictures, **self.values)


@dataclass(frozen=True)
class Page:
    """A page: title, introduction, the few numbers that matter most, and sections.

    lead    the introduction, from its own template
    tables  name -> rows of a table that is written to numbers/NAME.csv, but is not on the page
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
        """The text of the page."""
        return render("page.html", page=self, colours=COLOURS) + "\n"


def render(template: str, **values: Any) -> Markup:
    """Fill in a template of this package."""
    return Markup(_environment().get_template(template).render(values))


def code(text: Any) -> Markup:
    """A text as code within a line or a cell."""
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
