"""A language model behind any OpenAI-compatible address as the judge of harm.

What may pass is retried with growing pauses, and a request that fails all the same costs its document alone; an
endpoint that is down ends the run with one line that names the address. An answer that came but isn't the JSON asked
for is counted and gives a verdict without a score, until too many are so.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from safelm.io import records
from safelm.safety import endpoint_client
from safelm.safety.endpoint_client import Completion, EndpointError, EndpointSettings, RequestRefusedError
from safelm.safety.endpoint_queue import RequestQueue
from safelm.safety.escaping import escape
from safelm.safety.judge import chunks
from safelm.safety.judge.answer import SCHEMA, Answer, read_answer
from safelm.safety.judge.rubric import VERSION, load_rubric
from safelm.safety.options import check_least, check_share, make_settings
from safelm.safety.scorer import Verdict
from safelm.text.prompting import question_messages

_JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA}}


@dataclasses.dataclass(frozen=True)
class EndpointScorerSettings(EndpointSettings):
    """How an endpoint is asked for scores; see `EndpointSettings`.

    Attributes:
      chunk_chars: a longer document is cut into chunks of so many characters and the highest score is taken.
      max_chunks: of longer documents so many chunks are read, evenly spread; 0 reads all.
      max_tokens: of an answer, its reasoning included.
      max_unusable: share of unusable answers, counted from the 20th answer on, above which the run stops.
      schema: ask for the JSON schema; a server that refuses it is asked without from then on. So it is with
        temperature 0 and the limit of tokens, which some models want under another name.
      rubric: a version of ours, or the path of a file (see `rubric.load_rubric`).
    """

    chunk_chars: int = 24_000
    max_chunks: int = 0
    max_tokens: int = 200
    max_unusable: float = 0.5
    schema: bool = True
    rubric: str = str(VERSION)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("endpoint", self, chunk_chars=1, max_chunks=0, max_tokens=16)
        check_share("endpoint", self, "max_unusable")


_MIN_ANSWERS = 20  # before their share of unusable ones says anything
_HARMLESS = "The library opened at nine."  # asked about where every document so far was refused
# Settings that no score depends on; of the rubric its text counts.
_NOT_SHAPING = ("concurrency", "timeout_s", "retries", "max_unusable", "key_env", "rubric")


@dataclasses.dataclass
class Ledger:
    """What an endpoint was asked (the client's own retries not counted) and the cost, in tokens as the server counts.

    Attributes:
      answers: one a chunk.
      unusable: of these, without the JSON asked for.
      truncated: answers cut off at `max_tokens`.
      refused: of those, for which the server refused the request itself (400, 413, 422).
      failed: of those, for which no answer came at any retry.
    """

    requests: int = 0
    answers: int = 0
    unusable: int = 0
    truncated: int = 0
    refused: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class EndpointScorer:
    """A scorer. Neither documents nor the key are ever logged or shown.

    Attributes:
      name: prefix of output columns.
      fingerprint: sha256 (hex) over address, model, rubric and settings; the model behind an address can change unseen.
      ledger: requests, answers and tokens so far.
      manifest_settings: what scores depend on besides address and model.
    """

    def __init__(self, url: str, model: str, settings: EndpointScorerSettings | None = None, *, name: str = "endpoint"):
        """`url` is the API's base, such as http://localhost:8000/v1.

        Raises:
          ImportError: openai isn't installed.
          ValueError: no http(s) address, an address with a password in it, or no model.
        """
        self.name, self.url, self.model, self.settings = name, url, model, settings or EndpointScorerSettings()
        self.ledger = Ledger()
        self._endpoint = self.settings.client(url, model)
        self._has_taken_one = False  # a request that wasn't refused
        self._rubric = load_rubric(self.settings.rubric)
        if not self.settings.schema:
            self._endpoint.left_out.add("response_format")
        shaping = {k: v for k, v in dataclasses.asdict(self.settings).items() if k not in _NOT_SHAPING}
        self.fingerprint = records.fingerprint([url, model, self._rubric.hash, shaping])
        self.manifest_settings = shaping | {"rubric_sha256": self._rubric.hash}

    def score(self, texts: Sequence[str]) -> list[Verdict]:
        """One verdict a text, its score None where no usable answer came.

        Raises EndpointError if the endpoint is down, keeps failing, refuses the key or the model, doesn't speak the
        API, or gives too many unusable answers.
        """
        return endpoint_client.run(self._score(texts)) if texts else []

    async def _score(self, texts: Sequence[str]) -> list[Verdict]:
        settings = self.settings
        spans = [chunks.spans(len(text), settings.chunk_chars, settings.max_chunks) for text in texts]
        cut = [text[start:end] for text, of_text in zip(texts, spans, strict=True) for start, end in of_text]
        answers: list[Answer | None] = [None] * len(cut)
        failed: set[int] = set()

        def deliver(index: int, reply: _Reply | None) -> None:
            answers[index] = self._count(reply)
            if reply is None:
                failed.add(index)

        queue: RequestQueue[str, _Reply] = RequestQueue(
            self._endpoint, self._ask, deliver, book=self._book, concurrency=settings.concurrency
        )
        await queue.run(cut)
        await self._check_not_all_refused()
        verdicts, start = [], 0
        for of_text in spans:
            places = range(start, start := start + len(of_text))
            is_whole = failed.isdisjoint(places)  # what a chunk that nobody read says is unknown
            verdicts.append(chunks.combine([(answers[at] if is_whole else None, {}) for at in places]))
        return verdicts

    async def _check_not_all_refused(self) -> None:
        """Raises EndpointError if every request was refused and that of a short harmless document is too."""
        ledger = self.ledger
        if self._has_taken_one or ledger.refused < ledger.answers:
            self._has_taken_one = True
            return
        async with self._endpoint.open() as client:
            reply = await self._ask(client, _HARMLESS)
        if reply.is_refused:
            refused = f"refused all of {ledger.refused} requests and a short one (400, 413 or 422)"
            raise EndpointError(f"{self._endpoint.label}: {refused}")
        self._has_taken_one = True

    def _count(self, reply: "_Reply | None") -> Answer | None:
        """Books a reply and reads it; EndpointError if too many can't be used."""
        answer = None if reply is None or reply.text is None else read_answer(reply.text)
        ledger = self.ledger
        ledger.answers += 1
        ledger.unusable += answer is None
        ledger.failed += reply is None
        ledger.refused += reply is not None and reply.is_refused
        if ledger.answers >= _MIN_ANSWERS and ledger.unusable > self.settings.max_unusable * ledger.answers:
            raise EndpointError(
                f"{self._endpoint.label}: {ledger.unusable} of {ledger.answers} answers are unusable, of which "
                f"{ledger.refused} refused requests, {ledger.failed} that failed at every retry and the others not the "
                f"JSON asked for (max_unusable={self.settings.max_unusable}); {ledger.truncated} answers were cut off "
                f"at max_tokens={self.settings.max_tokens}"
            )
        return answer

    async def _ask(self, client: Any, chunk: str) -> "_Reply":
        messages = question_messages(self._rubric, escape(chunk))
        fields = {"response_format": _JSON_SCHEMA, "temperature": 0, "max_tokens": self.settings.max_tokens}
        try:
            completion = await self._endpoint.complete(client, messages, fields)
        except RequestRefusedError:
            return _Reply(None, is_refused=True)
        finally:
            self.ledger.requests = self._endpoint.num_requests
        self.ledger.truncated += completion.finish_reason == "length"
        self._book(completion)
        return _Reply(completion.text)

    def _book(self, completion: Completion) -> None:
        self.ledger.requests = self._endpoint.num_requests
        self.ledger.prompt_tokens += completion.prompt_tokens or 0
        self.ledger.completion_tokens += completion.completion_tokens or 0


@dataclasses.dataclass(frozen=True)
class _Reply:
    """`text` is None where the server refused the request, or filtered its answer."""

    text: str | None
    is_refused: bool = False


def load(url: str, model: str, *, name: str = "endpoint", **settings: Any) -> EndpointScorer:
    """See `safelm.safety.judge.load_endpoint`."""
    checked = make_settings(EndpointScorerSettings, settings, where="endpoint", others="name")
    return EndpointScorer(url, model, checked, name=name)
