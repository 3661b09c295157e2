"""A judge that asks once: verdicts are kept in a journal, so a stopped run goes on at the next answer."""

import hashlib
import json
import pathlib
from collections.abc import Sequence

import tqdm

from safelm.evaluation.journal import open_journal
from safelm.evaluation.judges import Judge
from safelm.evaluation.judges.verdicts import UNSCORED, Exchange

AT_ONCE = 32  # what a stop may lose


class RememberingJudge:
    """Another judge with a memory: hashes of exchanges and verdicts, no text. What was unscored is asked anew."""

    def __init__(self, judge: Judge, folder: pathlib.Path):
        self._judge = judge
        self.name, self.version, self.tier = judge.name, judge.version, judge.tier
        self.judges_harm, self.judges_manner = judge.judges_harm, judge.judges_manner
        digest = hashlib.sha256(judge.version.encode()).hexdigest()[:12]
        self._path = folder / f"verdicts.{judge.name}.{digest}.jsonl"

    def judge(self, exchanges: Sequence[Exchange]) -> list[str]:
        """See `safelm.evaluation.judges.Judge`."""
        keys = [_key(exchange) for exchange in exchanges]
        verdicts: dict[str, str] = {}
        with open_journal(self._path) as journal:
            verdicts |= {key: journal.rows[key]["verdict"] for key in keys if key in journal.rows}
            missing = {key: each for key, each in zip(keys, exchanges, strict=True) if key not in verdicts}
            with tqdm.tqdm(total=len(missing), unit=" verdicts", desc=self.name, leave=False, disable=None) as progress:
                for start in range(0, len(missing), AT_ONCE):
                    batch = dict(list(missing.items())[start : start + AT_ONCE])
                    found = dict(zip(batch, self._judge.judge(list(batch.values())), strict=True))
                    journal.add({key: {"verdict": verdict} for key, verdict in found.items() if verdict != UNSCORED})
                    verdicts |= found
                    progress.update(len(batch))
        return [verdicts[key] for key in keys]


def _key(exchange: Exchange) -> str:
    parts = [exchange.request, exchange.start, exchange.answer, exchange.asks_harm]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
