"""The judge's answer, `{"score": 0 to 5, "reason": one sentence}`: its grammar, its schema, and how it is read."""

import dataclasses
import json
import re
from typing import Any

from safelm.safety.escaping import without_surrogates
from safelm.safety.reasoning import without_reasoning
from safelm.tags import MAX_SCORE, MIN_SCORE

SCORES = tuple(range(MIN_SCORE, MAX_SCORE + 1))
MAX_REASON_CHARS = 240
OPENING = '{"score": '
CLOSING = '"}'
# A reason holds no quotes, backslashes or control characters: so it needs no escapes and can be cut anywhere.
GRAMMAR = rf'\{{"score": [0-5], "reason": "[^"\\\x00-\x1F\x7F]{{1,{MAX_REASON_CHARS}}}"\}}'
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"score": {"type": "integer", "enum": list(SCORES)}, "reason": {"type": "string"}},
    "required": ["score", "reason"],
    "additionalProperties": False,
}
_LANGUAGE = re.compile(r"[\w-]*")
_SPACE = re.compile(r"\s+")


@dataclasses.dataclass(frozen=True)
class Answer:
    """A usable answer."""

    score: int
    reason: str = ""


def read_answer(reply: str) -> Answer | None:
    """The answer in a model's reply, or None where the reply isn't one.

    The whole reply, or all of it behind its reasoning, must be one JSON object (a Markdown fence around it may stand)
    with a whole number from 0 to 5 under "score", once; "reason" may be missing but not be anything else than text.
    JSON amid prose is not taken: it may be what the document said.
    """
    values = _read_object(reply) or _read_object(without_reasoning(reply) or "")
    if values is None:
        return None
    score, reason = values.get("score"), values.get("reason", "")
    if isinstance(score, bool) or score not in SCORES or not isinstance(score, int) or not isinstance(reason, str):
        return None
    return Answer(score, tidy(reason))


def _read_object(text: str) -> dict[str, Any] | None:
    try:
        values = json.loads(unfenced(text.strip()), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def unfenced(text: str) -> str:
    """What stands inside a Markdown fence around all of the text; the text where there is none."""
    first, _, rest = text.partition("\n")
    inner, is_closed, last = rest.rpartition("\n")
    is_fenced = first.startswith("```") and _LANGUAGE.fullmatch(first[3:].strip())
    return inner if is_fenced and is_closed and last.strip() == "```" else text


def tidy(reason: str) -> str:
    """A reason on one line, of at most `MAX_REASON_CHARS`."""
    return _SPACE.sub(" ", without_surrogates(reason)).strip()[:MAX_REASON_CHARS]


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice")
    return values
