"""Sends documents through writer and gates; a failed draft is written again in another style, up to a limit."""

import collections
import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence

from safelm.safety.reasoning import without_reasoning
from safelm.safety.scoring.shard import no_quotations
from safelm.safety.synthesis.gate import Gate
from safelm.safety.synthesis.gates import run_gates
from safelm.safety.synthesis.journal import Journal
from safelm.safety.synthesis.kinds import Draft, Source
from safelm.safety.synthesis.notes.places import ReadingPauses
from safelm.safety.synthesis.prompt_files import Prompts, choose_style
from safelm.safety.synthesis.report import Attempt
from safelm.safety.synthesis.requests import join_replies, make_requests
from safelm.safety.synthesis.writer import Reply, Request, Writer

MIN_REPLIES = 20  # before the share of those without text says anything
_PROBE = 32  # requests after which it is looked whether the writer writes at all


@dataclasses.dataclass
class Trial:
    """A source and all attempts at it in order; it passed if the last one did.

    Attributes:
      row: the source's place in its file, from 1.
      drafts: the draft of each attempt, None if there is none.
    """

    row: int
    source: Source
    attempts: list[Attempt] = dataclasses.field(default_factory=list)
    drafts: list[Draft | None] = dataclasses.field(default_factory=list)

    @property
    def passed(self) -> bool:
        return bool(self.attempts) and self.attempts[-1].passed


@dataclasses.dataclass(frozen=True)
class Rules:
    """The settings of writing.

    Attributes:
      seed: decides styles and sampling.
      attempts: the most attempts at one document.
      max_new_tokens: the most tokens of one reply.
      max_without_text: share of replies without text above which a run stops, from the 20th reply on.
    """

    prompts: Prompts
    seed: int = 0
    attempts: int = 3
    max_new_tokens: int = 1024
    max_without_text: float = 0.5


class Desk:
    """A writer and gates, loaded once per process and used by one shard at a time.

    Attributes:
      replies: number of replies from the writer in this process.
      without_text: number of those without text, by reason.
      pauses: of kinds of notes, what finds their places.
    """

    def __init__(self, writer: Writer, gates: Sequence[Gate], rules: Rules, pauses: ReadingPauses | None = None):
        self.writer, self.gates, self.rules, self.pauses = writer, list(gates), rules, pauses
        self.replies = 0
        self.without_text: collections.Counter[str] = collections.Counter()
        self.lock = threading.Lock()
        self._worth_another = {gate.name for gate in gates if gate.worth_another}

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """The fingerprints of the writer and of each gate, by name."""
        return tuple(f"{part.name} {part.fingerprint}" for part in (self.writer, *self.gates))

    def work_through(
        self, trials: Sequence[Trial], journal: Journal, on_reply: Callable[[], object] = lambda: None
    ) -> None:
        """Writes and checks until every trial has passed, is beyond help or has used up its attempts.

        Replies in the journal are not requested again. Raises ValueError if the writer writes (almost) nothing or
        doesn't answer, and OSError as writers do.
        """
        pending = list(trials)
        for attempt in range(self.rules.attempts):
            drafts = self._drafts(pending, attempt, journal, on_reply)
            there = [draft for _, draft, _ in drafts if draft is not None]
            texts = [text for draft in there for text in (draft.text, draft.source.text)]
            with no_quotations("gates", texts):
                checked = iter(run_gates(self.gates, there))
            for trial, (style, draft, reason) in zip(pending, drafts, strict=True):
                trial.attempts.append(Attempt(style, () if draft is None else next(checked), reason))
                trial.drafts.append(draft)
            pending = [trial for trial in pending if self._may_try_again(trial)]

    def _may_try_again(self, trial: Trial) -> bool:
        failed = {finding.gate for finding in trial.attempts[-1].findings if not finding.passed}
        return not trial.passed and failed <= self._worth_another

    def _drafts(
        self, trials: Sequence[Trial], attempt: int, journal: Journal, on_reply: Callable[[], object]
    ) -> list[tuple[str, Draft | None, str]]:
        """(style, draft or None, reason for None) of each trial's next attempt."""
        rules, requests = self.rules, []
        for trial in trials:
            style = choose_style(rules.prompts, trial.source.id, rules.seed, attempt)
            made = make_requests(
                rules.prompts,
                trial.source,
                style,
                seed=rules.seed,
                attempt=attempt,
                max_document_chars=self.writer.max_document_chars,
                max_new_tokens=rules.max_new_tokens,
            )
            requests.append((style, made))
        replies = self._ask([request for _, made in requests for request in made], journal, on_reply)
        drafts = []
        for trial, (style, made) in zip(trials, requests, strict=True):
            found = [replies[request.key] for request in made]
            draft, reason = join_replies(rules.prompts.kind, trial.source, style, found, attempt)
            drafts.append((style, draft, reason))
        return drafts

    def _ask(
        self, requests: Sequence[Request], journal: Journal, on_reply: Callable[[], object]
    ) -> Mapping[str, Reply]:
        replies = {request.key: journal.replies[request.key] for request in requests if request.key in journal.replies}
        missing = [request for request in requests if request.key not in replies]
        first = _PROBE if self.replies == 0 else len(missing)
        for some in (missing[:first], missing[first:]):
            if some:
                replies |= self._write(some, journal, on_reply)
                self._check_writes()
        return replies

    def _write(self, requests: Sequence[Request], journal: Journal, on_reply: Callable[[], object]) -> dict[str, Reply]:
        """Asks the writer. A reply without text is not kept, so that a later run asks again."""
        found: dict[int, Reply] = {}
        with self.lock:
            booked = dict(self.writer.ledger())

            def book() -> None:
                now = dict(self.writer.ledger())
                journal.spend({name: amount - booked.get(name, 0) for name, amount in now.items()})
                booked.update(now)

            def receive(index: int, reply: Reply) -> None:
                if index in found:
                    raise ValueError(f"writer {self.writer.name}: two replies to one request")
                found[index] = reply
                self.replies += 1
                if (missing := _why_no_text(reply)) is None:
                    if journal.is_due:
                        book()
                    journal.add(requests[index].key, reply)
                else:
                    self.without_text[missing] += 1
                on_reply()

            try:
                self.writer.write(requests, receive)
            finally:
                book()
        if len(found) < len(requests):
            raise ValueError(
                f"writer {self.writer.name}: no reply to {len(requests) - len(found)} of {len(requests)} requests"
            )
        return {request.key: found[index] for index, request in enumerate(requests)}

    def _check_writes(self) -> None:
        if self.replies >= MIN_REPLIES and self.without_text.total() > self.rules.max_without_text * self.replies:
            raise ValueError(nothing_written(self.writer.name, self.without_text, self.replies))


def nothing_written(name: str, without_text: Mapping[str, int], replies: int) -> str:
    """The message about a writer that writes (almost) nothing; `without_text` counts replies by reason."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(without_text.items()))
    total = sum(without_text.values())
    return (
        f"writer {name}: {total} of {replies} replies have no text ({reasons}), see --max_without_text; what has text "
        "is kept, and running again asks for the rest"
    )


def _why_no_text(reply: Reply) -> str | None:
    """Why a reply has no text; None if it has."""
    if reply.text is None:
        return reply.reason or reply.stopped_by
    answer = without_reasoning(reply.text)
    if answer is None:
        return "reasoning without an answer"
    return None if answer.strip() else "empty"
