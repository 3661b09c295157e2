"""A report as one HTML page that needs nothing else. The templates escape everything but the SVG of `charts`."""

import dataclasses
import functools
import re
from collections.abc import Sequence

import jinja2

from safelm.report.charts import Chart
from safelm.report.table import Table


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph; with `items` also a list under it."""

    text: str
    items: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Fold:
    """Blocks behind a line that opens them."""

    summary: str
    blocks: Sequence["Block"]


Block = Table | Chart | Text | Fold


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a page with its place in the contents."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclasses.dataclass(frozen=True)
class Fact:
    """A number worth standing out, and what it is of."""

    value: str
    label: str
    interval: str = ""


@dataclasses.dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
      headline: what was found, in one sentence.
      about: what it was found on, quietly.
    """

    title: str
    headline: str
    sections: Sequence[Section]
    facts: Sequence[Fact] = ()
    about: str = ""


def render(page: Page) -> str:
    """The page as HTML."""
    return _template().render(page=page)


def _kind(block: Block) -> str:
    return type(block).__name__


@functools.cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("safelm.report")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["kind"] = _kind
    return environment.get_template("page.html")
