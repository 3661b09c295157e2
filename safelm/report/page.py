"""A report as one self-contained HTML page. Templates escape everything except the SVG of `charts`."""

import dataclasses
import functools
import re
from collections.abc import Sequence

import jinja2

from safelm.report.charts import Chart
from safelm.report.table import Table


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph, followed by a list if it has `items`."""

    text: str
    items: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Fold:
    """Blocks that are hidden until their summary line is opened."""

    summary: str
    blocks: Sequence["Block"]


Block = Table | Chart | Text | Fold


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a page with an entry in the table of contents."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclasses.dataclass(frozen=True)
class Fact:
    """A key figure and its label."""

    value: str
    label: str
    interval: str = ""


@dataclasses.dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
      headline: what was found, in one sentence.
      about: the data and settings behind it, in small print.
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
