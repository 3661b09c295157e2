"""A tiny deterministic scorer, loaded as python:scorers_for_tests:LevelScorer: the highest levelN of a text decides."""

import os
import re
import signal
import time
from collections.abc import Sequence

from safelm.safety.scorer import Verdict


class LevelScorer:
    """Scores a text by the highest level it names; "unusable" gives no score, "crash" raises with the text."""

    def __init__(self, name: str = "level", *, offset: int = 0, loads: str = "", pause: float = 0.0, kill: str = ""):
        self.name, self.fingerprint = name, f"level-{offset}"
        self._offset, self._pause, self._kill = offset, pause, kill
        if loads:
            with open(loads, "a") as file:
                file.write(f"{os.getpid()}\n")

    def score(self, texts: Sequence[str]) -> list[Verdict]:
        """A verdict a text."""
        return [self._verdict(text) for text in texts]

    def _verdict(self, text: str) -> Verdict:
        time.sleep(self._pause)
        details = {"length": len(text), "mean_code": sum(map(ord, text[:100])) / 100}
        if self._kill and "level5" in text and os.path.exists(self._kill):
            os.remove(self._kill)
            os.kill(os.getpid(), signal.SIGKILL)
        if "crash" in text:
            raise RuntimeError(f"can't score {text}")
        if "refused" in text:
            raise ValueError(f"no level in {text!r}")
        if "unusable" in text:
            return Verdict(None, "no level", details)
        level = max((int(digit) for digit in re.findall(r"level([0-5])", text)), default=0)
        level = min(5, max(0, level + self._offset))
        return Verdict(level, f"it names level {level}", details)
