"""A table of values, shown alike in print, in Markdown, as JSON and on a page."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Cell:
    """A value and how it is shown.

    Attributes:
      value: what JSON holds: a number, words, None, or a mapping with `value`, `low`, `high`.
      interval: its ends as shown: in print in brackets, on a page under the value.
      note: a second line on a page, left out in print.
      shade: 0 to 1, the strength of a page's background; None for none.
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
        """What a page sorts by; None: the text."""
        value = self.value.get("value") if isinstance(self.value, Mapping) else self.value
        return None if isinstance(value, str) else "-Infinity" if value is None else value


NOTHING = Cell("–")


@dataclasses.dataclass(frozen=True)
class Table:
    """Heads and rows; the first column names the row.

    Attributes:
      tall: scrolls by itself on a page.
    """

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    tall: bool = False

    @property
    def words(self) -> list[bool]:
        """Which columns hold words; the others hold numbers."""
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.heads)
        return [all(isinstance(cell.value, str) for cell in column) for column in columns]

    def without_zeros(self) -> "Table":
        """Without the rows that hold no number but 0; the caption says how many there were."""
        rows = [row for row in self.rows if any(_amount(cell) for cell in row[1:])]
        gone = len(self.rows) - len(rows)
        told = f" Not shown: {gone} {'row' if gone == 1 else 'rows'} of zeros." if gone else ""
        return dataclasses.replace(self, rows=rows, caption=self.caption + told)

    def transposed(self) -> "Table":
        """With a column a row."""
        columns = list(zip(*self.rows, strict=True))
        rows = [[words(head), *cells] for head, cells in zip(self.heads[1:], columns[1:], strict=True)]
        return Table(self.caption, [self.heads[0], *(cell.text for cell in columns[0])], rows)

    def to_json(self) -> list[dict[str, Any]]:
        """A mapping a row, by head: numbers are numbers, estimates have `value`, `low` and `high`."""
        return [{head: cell.value for head, cell in zip(self.heads, row, strict=True)} for row in self.rows]

    def markdown(self) -> str:
        """As a Markdown table."""
        return markdown(self.heads, self.rows)

    def plain(self) -> str:
        """As aligned text."""
        lines = [[str(cell) for cell in line] for line in (self.heads, *self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.heads))]
        text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def markdown(heads: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """Anything that can be shown as a Markdown table."""
    header, *body = (f"| {' | '.join(_inline(cell) for cell in line)} |" for line in (heads, *rows))
    return "\n".join([header, "|" + " --- |" * len(heads), *body])


def _inline(cell: Any) -> str:
    return " ".join(str(cell).split()).replace("|", "/")


def _amount(cell: Cell) -> bool:
    value = cell.value.get("value") if isinstance(cell.value, Mapping) else cell.value
    return isinstance(value, int | float) and value != 0


def words(text: Any) -> Cell:
    """Words, or any value by its name."""
    return Cell(str(text), str(text))


def count(value: int, note: str = "") -> Cell:
    """A whole number."""
    return Cell(f"{value:,}", value, note=note)


def amount(value: int | float | None) -> Cell:
    """A number with three digits."""
    return Cell(number(value), value)


def share(found: Mapping[str, Any] | None) -> Cell:
    """A stored estimate of a share (`value`, `low`, `high`, 0 to 1) in percent."""
    return _estimate(found, lambda value: f"{100 * value:.1f}")


def points(found: Mapping[str, Any] | None) -> Cell:
    """A stored difference of shares in points, with its sign."""
    return _estimate(found, lambda value: f"{100 * value:+.1f}")


def estimate(found: Mapping[str, Any] | None, digits: int = 2) -> Cell:
    """A stored estimate as it is."""
    return _estimate(found, lambda value: f"{value:.{digits}f}")


def _estimate(found: Mapping[str, Any] | None, shown: Any) -> Cell:
    if not found or found["value"] is None:
        return NOTHING
    return Cell(shown(found["value"]), dict(found), interval=(shown(found["low"]), shown(found["high"])))


def number(value: int | float | None) -> str:
    """An amount as people read it: three digits, no exponent."""
    if value is None:
        return "–"
    if not value:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 4)}f}"


def percent(value: int | float | None) -> str:
    """A share in percent, three digits."""
    return "–" if value is None else f"{100 * value:.3g}%"
