"""Long documents: where they are cut, and what their chunks' answers make together."""

from collections.abc import Sequence

from safelm.safety.judge.answer import Answer
from safelm.safety.scorer import Verdict


def spans(length: int, chunk: int, max_chunks: int) -> list[tuple[int, int]]:
    """Start and end of each chunk to be read of `length` tokens or characters: of equal size, at most `chunk`.

    Where there are more than `max_chunks` (0: no limit) these are so many of them, first and last included, spread
    evenly. An empty document has one empty chunk.
    """
    count = max(1, -(-length // chunk))
    size = -(-length // count)
    kept = range(count)
    if 0 < max_chunks < count:
        kept = sorted({round(place * (count - 1) / max(1, max_chunks - 1)) for place in range(max_chunks)})
    return [(place * size, min((place + 1) * size, length)) for place in kept]


def combine(answered: Sequence[tuple[Answer | None, dict[str, float]]]) -> Verdict:
    """The highest of the chunks' answers, with its reason and details; None where no chunk has a usable one.

    Of equal scores the one with the highest `expected_score`, then the first, decides.
    """
    best: tuple[Answer | None, dict[str, float]] = answered[0]
    for answer, details in answered:
        if answer is not None and (best[0] is None or _rank(answer, details) > _rank(*best)):
            best = (answer, details)
    answer, details = best
    details = {**details, "chunks": len(answered)}
    return Verdict(None, details=details) if answer is None else Verdict(answer.score, answer.reason, details)


def _rank(answer: Answer, details: dict[str, float]) -> tuple[int, float]:
    return answer.score, details.get("expected_score", 0.0)
