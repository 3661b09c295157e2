"""The protocol of writers: requests in, replies out, each delivered as soon as it arrives."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

StoppedBy = Literal["end", "length", "filtered", "refused", "error"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A request for one text.

    A writer puts `before`, the escaped `document` and `after` into the user's message. The document is data: no writer
    may let it become special tokens, markup of the prompt, or instructions.

    Attributes:
      key: unique in a run; may be logged.
      document: the source or a part of it, unescaped.
      reply_start: required beginning of the reply, for writers that support it; part of the reply's text.
      seed: of all randomness in this reply, so that the same request gives the same reply if the writer can.
      facts: kind, style, harm_score, part and the like, for writers without a model.
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
    """The reply to one request.

    Attributes:
      text: the unstripped text; None if the reply was filtered, refused by the server, or failed.
      stopped_by: "end" by itself, "length" at the limit of tokens, "filtered" or "refused" by a server, "error".
      reason: why `text` is None, in a few words without the document's text.
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
      fingerprint: SHA-256 (hex) of everything that replies depend on, as far as it is known.
      max_document_chars: longer documents are split before they get here.
    """

    name: str
    fingerprint: str
    max_document_chars: int

    def write(self, requests: Sequence[Request], on_reply: OnReply) -> None:
        """Answers every request exactly once by on_reply(index, reply), in any order, as soon as each reply arrives.

        Raises OSError if nothing more can be written (an endpoint that is down, a refused key); delivered replies stay
        valid.
        """
        ...

    def ledger(self) -> Mapping[str, int | float]:
        """Requests, tokens and cost so far, as numbers that add up over processes."""
        ...
