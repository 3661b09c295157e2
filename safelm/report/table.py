"""A table of values, rendered for the terminal, as Markdown, as JSON or as HTML."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Cell:
    """A value and its presentation.

    Attributes:
      value: for JSON: a number, a string, None, or a mapping with `value`, `low`, `high`.
      interval: the formatted interval; in brackets in print, under the value on a page.
      note: a second line on a page, left out in print.
      shade: strength of the background on a page, 0 to 1; None for no background.
    """

    text: str
    value: Any = None
    interval: tuple[str, str] | None = None
    note: str = ""
    shade: float | None = None

    def __str__(self) -> str:
        return f"{self.text} [{', '.join(self.interval)}]" if self.interval else self.text

    @property
    def under(self) -> str:
        """The second line on a page."""
        return " to ".join(self.interval) if self.interval else self.note

    @property
    def sorts_by(self) -> Any:
        """The key by which a page sorts this cell; None for its text."""
        value = self.value.get("value") if isinstance(self.value, Mapping) else self.value
        return None if isinstance(value, str) else "-Infinity" if value is None else value


NOTHING = Cell("–")


@dataclasses.dataclass(frozen=True)
class Table:
    """Column heads and rows; the first column names the row.

    Attributes:
      tall: whether the table scrolls in a box of its own on a page.
    """

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    tall: bool = False

    @property
    def words(self) -> list[bool]:
        """Whether each column holds words rather than numbers."""
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.heads)
        return [all(isinstance(cell.value, str) for cell in column) for column in columns]

    def without_zeros(self) -> "Table":
        """A copy without rows whose numbers are all 0; the caption says how many were left out."""
        rows = [row for row in self.rows if any(_amount(cell) for cell in row[1:])]
        gone = len(self.rows) - len(rows)
        told = f" Not shown: {gone} {'row' if gone == 1 else 'rows'} of zeros." if gone else ""
        return dataclasses.replace(self, rows=rows, caption=self.caption + told)

    def transposed(self) -> "Table":
        """A copy with rows and columns exchanged."""
        columns = list(zip(*self.rows, strict=True))
        rows = [[words(head), *cells] for head, cells in zip(self.heads[1:], columns[1:], strict=True)]
        return Table(self.caption, [self.heads[0], *(cell.text for cell in columns[0])], rows)

    def to_json(self) -> list[dict[str, Any]]:
        """One mapping per row, keyed by column head; numbers stay numbers, estimates have `value`, `low` and `high`."""
        return [{head: cell.value for head, cell in zip(self.heads, row, strict=True)} for row in self.rows]

    def markdown(self) -> str:
        """The table in Markdown."""
        return markdown(self.heads, self.rows)

    def plain(self) -> str:
        """The table as aligned text."""
        lines = [[str(cell) for cell in line] for line in (self.heads, *self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.heads))]
        text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def markdown(heads: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table of any printable values."""
    header, *body = (f"| {' | '.join(_inline(cell) for cell in line)} |" for line in (heads, *rows))
    return "\n".join([header, "|" + " --- |" * len(heads), *body])


def _inline(cell: Any) -> str:
    return " ".join(str(cell).split()).replace("|", "/")


def _amount(cell: Cell) -> bool:
    value = cell.value.get("value") if isinstance(cell.value, Mapping) else cell.value
    return isinstance(value, int | float) and value != 0


def words(text: Any) -> Cell:
    """A cell of words, or of any value by its name."""
    return Cell(str(text), str(text))


def count(value: int, note: str = "") -> Cell:
    """A cell with a whole number."""
    return Cell(f"{value:,}", value, note=note)


def amount(value: int | float | None) -> Cell:
    """A cell with a number in three digits."""
    return Cell(number(value), value)


def share(found: Mapping[str, Any] | None) -> Cell:
    """A cell with an estimate of a share (`value`, `low`, `high` from 0 to 1) in percent."""
    return _estimate(found, lambda value: f"{100 * value:.1f}")


def points(found: Mapping[str, Any] | None) -> Cell:
    """A cell with an estimated difference of shares in percentage points, with its sign."""
    return _estimate(found, lambda value: f"{100 * value:+.1f}")


def estimate(found: Mapping[str, Any] | None, digits: int = 2) -> Cell:
    """A cell with an estimate in its own unit."""
    return _estimate(found, lambda value: f"{value:.{digits}f}")


def _estimate(found: Mapping[str, Any] | None, shown: Any) -> Cell:
    if not found or found["value"] is None:
        return NOTHING
    return Cell(shown(found["value"]), dict(found), interval=(shown(found["low"]), shown(found["high"])))


def number(value: int | float | None) -> str:
    """A number in three digits, without an exponent."""
    if value is None:
        return "–"
    if not value:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 4)}f}"


def percent(value: int | float | None) -> str:
    """A share as a percentage with three digits."""
    return "–" if value is None else f"{100 * value:.3g}%"
