"""A judge that asks once: verdicts are kept in a journal, so a stopped run goes on at the next answer."""

import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from safelm.evaluate.journal import open_journal
from safelm.evaluate.judges import Judge, ask, check_replies
from safelm.evaluate.judges.verdicts import UNSCORED, Exchange
from safelm.io.progress import Bar

AT_ONCE = 32  # what a stop may lose


class RememberingJudge:
    """Another judge with a memory: hashes, verdicts and scores, no text.

    Unscored answers are not kept: a run that goes on asks for them anew. One that is done keeps its results.
    """

    def __init__(self, judge: Judge, folder: pathlib.Path):
        self._judge = judge
        self.name, self.version, self.tier = judge.name, judge.version, judge.tier
        self.judges_harm, self.judges_manner = judge.judges_harm, judge.judges_manner
        self.scale = getattr(judge, "scale", "")
        digest = hashlib.sha256(judge.version.encode()).hexdigest()[:12]
        self._path = folder / f"verdicts.{judge.name}.{digest}.jsonl"

    def judge(self, exchanges: Sequence[Exchange]) -> list[str]:
        """See `safelm.evaluate.judges.Judge`."""
        return self.judge_and_score(exchanges)[0]

    def judge_and_score(self, exchanges: Sequence[Exchange]) -> tuple[list[str], list[float | None]]:
        """See `safelm.evaluate.judges.judge_and_score`."""
        keys = [_key(exchange) for exchange in exchanges]
        rows: dict[str, dict[str, Any]] = {}
        with open_journal(self._path) as journal:
            rows |= {key: journal.rows[key] for key in keys if key in journal.rows}
            missing = {key: each for key, each in zip(keys, exchanges, strict=True) if key not in rows}
            with Bar(total=len(missing), unit=" verdicts", desc=self.name, leave=False, disable=None) as progress:
                for start in range(0, len(missing), AT_ONCE):
                    batch = dict(list(missing.items())[start : start + AT_ONCE])
                    verdicts, scores = ask(self._judge, list(batch.values()))
                    found = {
                        key: {"verdict": verdict, "score": score}
                        for key, verdict, score in zip(batch, verdicts, scores, strict=True)
                    }
                    journal.add({key: row for key, row in found.items() if row["verdict"] != UNSCORED})
                    check_replies(self._judge)  # what could be read is kept
                    rows |= found
                    progress.update(len(batch))
        return [rows[key]["verdict"] for key in keys], [rows[key].get("score") for key in keys]


def _key(exchange: Exchange) -> str:
    parts = [exchange.request, exchange.start, exchange.answer, exchange.asks_harm]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
