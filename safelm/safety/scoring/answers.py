"""What scorers say of the texts of a shard, as a matrix with a row for each; texts that come again are not asked about.

A text is known by a hash of 128 bits, as long as fewer than REMEMBERED other texts came since its last copy. So memory
is bounded, and a file of fewer texts, in one part, has each of them scored once.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from safelm.documents import Malformed
from safelm.safety.ensemble import Agreement
from safelm.safety.scorer import Verdict
from safelm.safety.scoring import annotation_rows, shard
from safelm.safety.scoring.annotation_rows import Block
from safelm.safety.scoring.columns import Columns
from safelm.safety.scoring.shard import LoadedScorers

REMEMBERED = 1 << 19  # texts of a shard
FLAGS = ("", "empty", "unscored", "malformed")
EMPTY, UNSCORED, MALFORMED = range(1, len(FLAGS))
_FLUSH_ROWS = 1 << 16  # pending rows, of which many may be repetitions
_DIGEST_BYTES = 16
_MOST_WHOLE = (1 << 31) - 1


def numeric(columns: Columns) -> dict[str, str]:
    """The columns of annotations by name, with their Arrow types: of a scorer's columns those that are numbers."""
    kinds = {name: kind for name, kind in columns.types.items() if kind in ("int64", "float64")}
    scores = {"harm_score", *(f"score_{name}" for name in columns.details)}
    return {
        name: "int8" if name in scores else {"int64": "int32", "float64": "float32"}[kind]
        for name, kind in kinds.items()
    }


class Answers:
    """The scorers' answers to the rows of a shard.

    Attributes:
      asked: texts that scorers were asked about. bytes: of all texts, as far as they are scored.
      agreement: of the scorers, on the texts that they were asked about.
    """

    def __init__(self, columns: Columns, loaded: LoadedScorers, on_malformed: annotation_rows.OnMalformed):
        self.asked = self.bytes = 0
        self.agreement = Agreement(loaded.ensemble.names)
        self._columns, self._loaded, self._on_malformed = columns, loaded, on_malformed
        self._column = {name: index for index, name in enumerate(numeric(columns), start=1)}
        self._slots: OrderedDict[bytes, int] = OrderedDict()  # the text that was not seen for longest comes first
        self._free: list[int] = []
        self._value_SC = np.full((1024, 1 + len(self._column)), np.nan)
        self._pending: list[tuple[Block, list[int]]] = []
        self._texts: list[tuple[str, int]] = []  # of the pending rows, those to be asked about, and their slots
        self._pending_rows = self._pending_characters = 0

    def rows(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, Float64[np.ndarray, "N C"]]]:
        """Each block with a row of values for every row of it: which of FLAGS, then the columns; NaN for null."""
        for block in blocks:
            self._take(block)
            if (
                len(self._texts) >= shard.BATCH_ROWS * self._loaded.batch_scale
                or self._pending_characters >= shard.BATCH_CHARACTERS * self._loaded.batch_scale
                or self._pending_rows >= _FLUSH_ROWS
            ):
                yield from self._flush()
        yield from self._flush()

    def _take(self, block: Block) -> None:
        known, blake2b, new = self._slots, hashlib.blake2b, self._new_slot
        slots, fresh = [], []
        for text in block.texts:
            key = b"" if text is None else blake2b(text, digest_size=_DIGEST_BYTES).digest()
            slot = known.get(key)
            if slot is None:
                known[key] = slot = new()
                fresh.append((text, slot))
            else:
                known.move_to_end(key)
            slots.append(slot)
        self._first_seen(fresh)
        is_malformed_N = self._value_SC[np.array(slots, np.int64), 0] == MALFORMED
        for offset in np.flatnonzero(is_malformed_N).tolist():
            if block.texts[offset] is not None:  # else who read it has said so
                self._on_malformed(Malformed(int(block.row_N[offset]), "not UTF-8", ""))
        self.bytes += sum(map(len, filter(None, block.texts)))
        self._pending.append((block, slots))
        self._pending_rows += len(slots)

    def _first_seen(self, fresh: Sequence[tuple[bytes | None, int]]) -> None:
        self._value_SC[[slot for _, slot in fresh]] = np.nan
        for text, slot in fresh:
            try:
                decoded = None if text is None else text.decode()
            except UnicodeDecodeError:
                decoded = None
            if decoded is None:
                self._value_SC[slot, 0] = MALFORMED
            elif not decoded or decoded.isspace():
                self._value_SC[slot, :2] = EMPTY, 0  # the flag, and harm_score by rule
            else:
                self._texts.append((decoded, slot))
                self._pending_characters += len(decoded)

    def _new_slot(self) -> int:
        """A place for the values of a text that is not known."""
        if self._free:
            return self._free.pop()
        slot = len(self._slots)
        if slot == len(self._value_SC):
            more_SC = np.full((min(slot, _FLUSH_ROWS), self._value_SC.shape[1]), np.nan)
            self._value_SC = np.concatenate([self._value_SC, more_SC])
        return slot

    def _forget(self) -> None:
        """Frees the places of the texts not seen for longest. Only where no row is pending: those read their places."""
        while len(self._slots) > REMEMBERED:
            _, slot = self._slots.popitem(last=False)
            self._free.append(slot)

    def _flush(self) -> Iterator[tuple[Block, Float64[np.ndarray, "N C"]]]:
        for batch in shard.batches(iter(self._texts), self._loaded.batch_scale):
            self._ask([text for text, _ in batch], [slot for _, slot in batch])
        for block, slots in self._pending:
            yield block, self._value_SC[np.array(slots, np.int64)]
        self._pending, self._texts, self._pending_rows, self._pending_characters = [], [], 0, 0
        self._forget()

    def _ask(self, texts: Sequence[str], slots: Sequence[int]) -> None:
        value_TC = np.full((len(texts), self._value_SC.shape[1]), np.nan)
        verdicts = self._loaded.ask_all(texts)
        for name, given in verdicts.items():
            score_T = [verdict.score for verdict in given]
            value_TC[:, self._column[f"score_{name}"]] = np.array(score_T, np.float64)
            self._take_details(name, given, value_TC)
        score_TS = value_TC[:, [self._column[f"score_{name}"] for name in verdicts]]
        self.agreement.add_scores(score_TS)
        harm_T = np.where(np.isnan(score_TS), -1, score_TS).max(axis=1)
        value_TC[:, 0] = np.where(harm_T < 0, UNSCORED, 0)
        value_TC[:, self._column["harm_score"]] = np.where(harm_T < 0, np.nan, harm_T)
        self._value_SC[np.array(slots, np.int64)] = value_TC
        self.asked += len(texts)

    def _take_details(self, name: str, verdicts: Sequence[Verdict], value_TC: Float64[np.ndarray, "T C"]) -> None:
        """The numbers among a scorer's details. Raises ValueError as `Columns.values` for others than it began with."""
        known = self._columns.details[name]
        names = set(known)
        for verdict in verdicts:
            if len(verdict.details) > len(known) or not verdict.details.keys() <= names:
                self._columns.values(verdict, {name: verdict})
        for detail in known:
            column = f"{name}_{detail}"
            values = [value if _is_finite(value) else None for value in (each.details.get(detail) for each in verdicts)]
            for kind in set(map(type, values)):
                example = next(value for value in values if type(value) is kind)
                self._columns.typed(column, example)
            if column in self._column:
                value_TC[:, self._column[column]] = _numbers(column, self._columns.types[column], values)


def _is_finite(value: Any) -> bool:
    """False for the floats that `Columns.typed` takes for null, whatever the column holds."""
    return not isinstance(value, float) or math.isfinite(value)


def _numbers(column: str, kind: str, values: Sequence[Any]) -> Float64[np.ndarray, " T"]:
    """A column's values, NaN for those that are not finite as float32. Raises ValueError for one beyond int32."""
    if kind == "int64":
        for value in values:
            if value is not None and _is_finite(value) and not -_MOST_WHOLE <= value <= _MOST_WHOLE:
                raise ValueError(
                    f"column {column!r}: {value}: whole numbers of annotations lie within {_MOST_WHOLE:,} around 0; "
                    "the scorer may give it as a float"
                )
    with np.errstate(over="ignore"):
        value_T = np.array([math.nan if value is None else float(value) for value in values])
        return np.where(np.isfinite(value_T.astype(np.float32)), value_T, np.nan)
