"""One HTML page that needs nothing else: no script, no request; light and dark; for a phone, a desktop and paper."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from swamp_fast.report.drawings import COLOURS, inlined, svg


class Html(str):
    """Text that is HTML already; every other text is escaped, also where it is added to it."""

    def __add__(self, other: str) -> Html:
        """HTML, and what comes after it."""
        return Html(str(self) + str(text(other)))


@dataclass(frozen=True)
class Picture:
    """A figure with its numbers, and one sentence of what is seen and of the caution that belongs to it.

    name     of its files: figures/NAME.svg, figures/NAME.png, numbers/NAME.csv
    drawing  matplotlib's
    """

    name: str
    title: str
    caption: str
    drawing: Any
    rows: Sequence[Mapping[str, Any]]

    @cached_property
    def svg(self) -> str:
        """As an SVG file."""
        return svg(self.drawing)


@dataclass(frozen=True)
class Section:
    """A heading, what is said, pictures, and what comes after them."""

    heading: str
    text: Iterable[Any] = ()
    pictures: Sequence[Picture] = ()
    after: Iterable[Any] = ()


@dataclass(frozen=True)
class Page:
    """A page: title, first sentences, the few numbers that matter most, sections; and tables that are files alone."""

    title: str
    lead: Sequence[str]
    facts: Mapping[str, str]
    sections: Sequence[Section]
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    @property
    def pictures(self) -> list[Picture]:
        """Those of all sections."""
        return [picture for section in self.sections for picture in section.pictures]

    def html(self) -> str:
        """The page's text."""
        places = {f"s{number}": section for number, section in enumerate(self.sections, 1)}
        numbers = (tag("div", tag("dt", name) + tag("dd", value)) for name, value in self.facts.items())
        links = (link(f"#{place}", section.heading) for place, section in places.items())
        body = tag("h1", self.title) + joined(tag("p", line, "lead") for line in self.lead)
        body += tag("dl", joined(numbers), "facts") + tag("nav", joined(links))
        body += joined(_section(place, section) for place, section in places.items())
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
            'img-src data:">\n<link rel="icon" href="data:,">\n'
            f"<title>{text(self.title)}</title>\n<style>\n{_css()}</style>\n</head>\n<body>\n<main>\n{body}</main>\n"
            "</body>\n</html>\n"
        )


def text(content: Any) -> Html:
    """Any content as HTML: escaped, unless it is HTML already; a number and its per cent stay on one line."""
    return content if isinstance(content, Html) else Html(html.escape(str(content)).replace(" %", "&nbsp;%"))


def joined(parts: Iterable[Any]) -> Html:
    """Contents one after the other."""
    return Html("".join(map(text, parts)))


def tag(name: str, content: Any, kind: str = "") -> Html:
    """An element around a content, with its class."""
    attribute = f' class="{kind}"' if kind else ""
    return Html(f"<{name}{attribute}>{text(content)}</{name}>\n")


def table(rows: Sequence[Sequence[Any]], head: Sequence[str], about: str, words: int = 1) -> Html:
    """A table that scrolls within itself; its first `words` columns are text, the others numbers.

    about  what it holds, for those who hear it
    """
    kinds = ["" if column < words else "n" for column in range(len(head))]
    first = joined(map(tag, ["th"] * len(head), head, kinds))
    lines = (tag("tr", joined(map(tag, ["td"] * len(head), row, kinds))) for row in rows)
    inner = tag("thead", tag("tr", first)) + tag("tbody", joined(lines))
    return Html(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(about)}">'
        f"<table>{inner}</table></div>\n"
    )


def pairs(items: Mapping[str, Any]) -> Html:
    """Names and what they stand for."""
    return tag("dl", joined(tag("dt", name) + tag("dd", value) for name, value in items.items()), "pairs")


def code(content: str) -> Html:
    """Lines to copy."""
    return Html(f'<pre tabindex="0"><code>{html.escape(content)}</code></pre>\n')


def details(summary: str, content: Any) -> Html:
    """What is shown when asked for."""
    return tag("details", tag("summary", summary) + text(content))


def bullets(items: Iterable[Any]) -> Html:
    """A list."""
    return tag("ul", joined(tag("li", item) for item in items))


def link(address: str, name: str) -> Html:
    """A link, which loads nothing until it is followed."""
    return Html(f'<a href="{html.escape(address)}">{text(name)}</a>')


def _section(place: str, section: Section) -> Html:
    body = tag("h2", section.heading) + joined(map(_block, section.text))
    if section.pictures:
        kind = "figures" if len(section.pictures) > 1 else "alone"
        body += tag("div", joined(_figure(each, kind == "figures") for each in section.pictures), kind)
    return Html(f'<section id="{place}">\n{body}{joined(map(_block, section.after))}</section>\n')


def _block(content: Any) -> Html:
    return content if isinstance(content, Html) else tag("p", content)


def _figure(picture: Picture, titled: bool) -> Html:
    name = picture.name
    drawn = Html(inlined(picture.svg, name, f"{picture.title}. {picture.caption}"))
    files = {"SVG": f"figures/{name}.svg", "PNG": f"figures/{name}.png", "CSV": f"numbers/{name}.csv"}
    links = tag("p", joined(link(address, kind) + " " for kind, address in files.items()), "files")
    title = tag("h3", picture.title) if titled else Html()
    return tag("figure", title + drawn + tag("figcaption", tag("p", picture.caption) + links))


def _css() -> str:
    light, dark = (" ".join(f"--{name}: {pair[theme]};" for name, pair in COLOURS.items()) for theme in (0, 1))
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{CSS}"


CSS = """\
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p, li { max-width: 44rem; margin: 0 0 .6rem; overflow-wrap: anywhere; }
.lead { font-size: 1.06rem; }
a { color: var(--blue); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; margin-top: 1.25rem; font-size: .92rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .9rem 1.5rem; }
.facts { margin: 1.25rem 0 0; }
.facts dt { color: var(--muted); font-size: .85rem; line-height: 1.3; }
.facts dd { margin: 0; font-size: 1.3rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
.pairs { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .2rem 1.25rem; margin: 0 0 1rem; }
.pairs dt { color: var(--muted); }
.pairs dd { margin: 0; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 2rem 2.5rem; }
.figures { align-items: start; }
.figures, .alone { margin: 1rem 0 1.25rem; }
figure { margin: 0; min-width: 0; max-width: 35rem; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg text { font-family: inherit !important; }
figcaption { margin-top: .6rem; font-size: .92rem; }
figcaption p { margin-bottom: .25rem; }
.files { font-size: .85rem; word-spacing: .4rem; }
/* A shadow at an edge beyond which there is more: what is of the paper's colour scrolls along and covers it. */
.scroll { overflow-x: auto; max-width: 100%; margin: 0 0 1rem; background:
  linear-gradient(to right, var(--paper) 40%, transparent) 0 0 / 2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--paper) 40%, transparent) 100% 0 / 2.5rem 100% no-repeat local,
  linear-gradient(to right, var(--muted), transparent) 0 0 / .7rem 100% no-repeat scroll,
  linear-gradient(to left, var(--muted), transparent) 100% 0 / .7rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { padding-left: 0; }
.n { text-align: right; }
pre { overflow-x: auto; padding: .75rem .9rem; border: 1px solid var(--grid); border-radius: .3rem; }
pre { font-size: .88rem; line-height: 1.45; margin: 0 0 1rem; max-width: 100%; }
code { font-family: ui-monospace, Menlo, Consolas, monospace; }
:not(pre) > code { overflow-wrap: anywhere; font-size: .92em; }
ul { padding-left: 1.3rem; }
details { margin: 0 0 1rem; }
summary { cursor: pointer; margin-bottom: .5rem; }
.warn { border-left: 3px solid var(--red); padding-left: .8rem; }
@media (min-width: 60rem) {
  .alone figure { display: grid; grid-template-columns: 35rem minmax(0, 1fr); gap: 2.5rem; max-width: none; }
}
@media (max-width: 30rem) {
  .pairs { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .pairs dd { margin-bottom: .5rem; }
  .facts { grid-template-columns: 1fr 1fr; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
}
@media print {
  @page { margin: 1.5cm; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  nav, .files { display: none; }
  .figures { grid-template-columns: 1fr 1fr; gap: 1rem; }
  figure, tr, pre { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  figure svg { max-height: 10cm; }
  .scroll, pre { overflow: visible; background: none; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  table { font-size: 7.5pt; }
  th, td { padding: .15rem .35rem; }
}
"""
