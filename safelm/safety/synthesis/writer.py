"""What a writer is: requests in, replies out, each handed back as soon as it is there."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

StoppedBy = Literal["end", "length", "filtered", "refused", "error"]


@dataclasses.dataclass(frozen=True)
class Request:
    """One thing to write.

    A writer puts `before`, the escaped `document` and `after` into the user's message. The document is data: no writer
    may let it become special tokens, markup of the prompt, or instructions.

    Attributes:
      key: unique in a run; may be logged.
      document: the source or a part of it, as it is (unescaped).
      reply_start: what the reply begins with, for writers that can be held to it; part of the reply's text.
      seed: of everything random in writing this; the same request gives the same reply where the writer allows.
      facts: kind, style, harm_score, part and the like, for writers that need no model.
    """

    key: str
    system: str = dataclasses.field(repr=False)
    before: str = dataclasses.field(repr=False)
    document: str = dataclasses.field(repr=False)
    after: str = dataclasses.field(repr=False)
    reply_start: str = ""
    max_new_tokens: int = 1024
    seed: int = 0
    facts: Mapping[str, str | int] = dataclasses.field(default_factory=dict, repr=False)


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
      text: None where there is none: filtered, refused by the server as a request, or failed. Stripped of nothing.
      stopped_by: "end" by itself, "length" at the limit of tokens, "filtered" or "refused" by a server, "error".
      reason: for None, in a few words that hold nothing of the document.
    """

    text: str | None = dataclasses.field(repr=False)
    stopped_by: StoppedBy = "end"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reason: str = ""


OnReply = Callable[[int, Reply], None]


@runtime_checkable
class Writer(Protocol):
    """Writes replies to requests.

    Attributes:
      name: for columns and reports, e.g. the model's name; never a key or a path of this machine.
      fingerprint: sha256 (hex) over everything that replies depend on, as far as it can be known.
      max_document_chars: a longer document is split before it comes here.
    """

    name: str
    fingerprint: str
    max_document_chars: int

    def write(self, requests: Sequence[Request], on_reply: OnReply) -> None:
        """Answers every request exactly once by on_reply(index, reply), in any order, as soon as each is there.

        Raises OSError where nothing more can be written (an endpoint that is down, a key that is refused); replies
        handed over before stay good.
        """
        ...

    def ledger(self) -> Mapping[str, int | float]:
        """Requests, tokens, cost so far: numbers that add up over processes."""
        ...
