"""The template writer with ways to go wrong, loaded as python:writers_for_tests:TroubledWriter?trouble=..."""

import json
import os
import signal
from collections.abc import Mapping, Sequence

from safelm.safety.synthesis import template_writer
from safelm.safety.synthesis.writer import OnReply, Reply, Request

HARM = "Nobody will trace it."  # the lexicon scorer gives 4


class TroubledWriter:
    """Writes as the template writer does, but for its trouble.

    Args:
      trouble: "nothing" (no text), "blank", "twice" (two replies to one request), "lost" (half of the replies),
        "outage" (raises after `after` replies), "defect" (raises with a document in the message), "killed" (SIGKILL
        after `after` replies), "harmful" (all drafts, or those of the first `after` attempts), "surrogate" (half a
        character in every second reply).
      cure: a file; where it exists the trouble is over. The fingerprint doesn't tell.
      log: a file that gets a line for each reply that was handed over.
    """

    name, fingerprint, max_document_chars = "troubled", "troubled-1", 12_000

    def __init__(self, *, trouble: str = "", after: int = 0, cure: str = "", log: str = ""):
        self._trouble, self._after, self._cure, self._log = trouble, after, cure, log
        self._inner = template_writer.load_template_writer()
        self._given = 0

    def write(self, requests: Sequence[Request], on_reply: OnReply) -> None:
        trouble = "" if self._cure and os.path.exists(self._cure) else self._trouble
        if trouble == "lost":
            requests = requests[: len(requests) // 2]
        if trouble == "defect":
            raise KeyError(requests[0].document)

        def receive(index: int, reply: Reply) -> None:
            if trouble == "nothing":
                reply = Reply(None, "filtered")
            elif trouble == "blank":
                reply = Reply(" \n ")
            elif trouble == "harmful" and (not self._after or int(requests[index].key.split("/")[2]) < self._after):
                reply = Reply(f"{reply.text} {HARM}")
            elif trouble == "surrogate" and self._given % 2:
                reply = Reply(f"{reply.text[:40]}\ud83d{reply.text[40:]}")
            on_reply(index, reply)
            if trouble == "twice":
                on_reply(index, reply)
            self._given += 1
            if self._log:
                with open(self._log, "a") as file:
                    file.write(json.dumps([os.getpid(), requests[index].key]) + "\n")
            if self._given == self._after and trouble == "outage":
                raise OSError("the endpoint is down")
            if self._given == self._after and trouble == "killed":
                os.kill(os.getpid(), signal.SIGKILL)

        self._inner.write(requests, receive)

    def ledger(self) -> Mapping[str, int | float]:
        return self._inner.ledger()


class NoWriter:
    """Lacks what writers have."""

    name = "none"


def broken() -> None:
    """A factory that fails."""
    raise ValueError("no model is there")
