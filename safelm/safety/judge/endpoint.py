"""A language model behind any OpenAI-compatible address as the judge of harm.

The `openai` client retries what may pass (429 by the server's Retry-After, 5xx, timeouts, lost connections) with
growing pauses. What it gives up on ends the run with one line that names the address; an answer that came but isn't
the JSON asked for is counted and gives a verdict without a score, until too many are so.
"""

import asyncio
import dataclasses
import hashlib
import json
import logging
import os
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from safelm.safety.judge import chunks
from safelm.safety.judge.answer import SCHEMA, Answer, read_answer
from safelm.safety.judge.options import make_settings
from safelm.safety.judge.rubric import Rubric, load_rubric
from safelm.safety.scorer import Verdict

KEY_VARIABLES = ("SAFELM_ENDPOINT_KEY", "OPENAI_API_KEY")
_LOGGERS = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")  # at DEBUG they record requests: documents and keys
_JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA}}
_REFUSES = (400, 413, 422)  # what a server says to one request: a field that it doesn't know, a text too long for it
# Fields that some servers or models refuse: by what a refusal of each is known.
_OPTIONAL_FIELDS = {
    "response_format": ("response_format", "response format", "json_schema", "guided", "structured"),
    "max_tokens": ("max_completion_tokens' instead", "unsupported parameter: 'max_tokens'"),
    "temperature": ("'temperature' does not support", "unsupported parameter: 'temperature'"),
}
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an endpoint is asked.

    Attributes:
      concurrency: requests under way at once.
      timeout_s: of one request, in seconds.
      retries: of one request that failed in passing.
      chunk_chars: a longer document is cut into chunks of so many characters and the highest score is taken.
      max_chunks: of longer documents so many chunks are read, evenly spread; 0 reads all.
      max_tokens: of an answer.
      max_unusable: share of unusable answers, counted from the 20th answer on, above which the run stops.
      schema: ask for the JSON schema; a server that refuses it is asked without from then on. So it is with
        temperature 0 and the limit of tokens, which some models want under another name.
      rubric: version.
    """

    concurrency: int = 8
    timeout_s: float = 60.0
    retries: int = 6
    chunk_chars: int = 24_000
    max_chunks: int = 0
    max_tokens: int = 200
    max_unusable: float = 0.5
    schema: bool = True
    rubric: int = 1

    def __post_init__(self) -> None:
        smallest = {"concurrency": 1, "retries": 0, "chunk_chars": 1, "max_chunks": 0, "max_tokens": 16}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ValueError(f"endpoint: {name}={getattr(self, name)}: must be at least {least}")
        if not self.timeout_s > 0:
            raise ValueError(f"endpoint: timeout_s={self.timeout_s}: must be above 0")
        if not 0 <= self.max_unusable <= 1:
            raise ValueError(f"endpoint: max_unusable={self.max_unusable}: must be a share from 0 to 1")


_MIN_ANSWERS = 20  # before their share of unusable ones says anything
_COST_ONLY = ("concurrency", "timeout_s", "retries", "max_unusable")  # settings that no score depends on


@dataclasses.dataclass
class Ledger:
    """What an endpoint was asked (the client's own retries not counted) and the cost, in tokens as the server counts.

    Attributes:
      answers: one a chunk.
      unusable: of these, without the JSON asked for.
      refused: of those, for which the server refused the request itself (400, 413, 422).
    """

    requests: int = 0
    answers: int = 0
    unusable: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class EndpointError(OSError):
    """The endpoint can't be used: the message names the address, without a key or anything of a document."""


class EndpointJudge:
    """A scorer. Neither documents nor the key are ever logged or shown.

    Attributes:
      name: prefix of output columns.
      fingerprint: sha256 (hex) over address, model, rubric and settings; the model behind an address can change unseen.
      ledger: requests, answers and tokens so far.
    """

    def __init__(self, url: str, model: str, settings: Settings | None = None, *, name: str = "endpoint"):
        """`url` is the API's base, such as http://localhost:8000/v1.

        Raises:
          ImportError: openai isn't installed.
          ValueError: no http(s) address, an address with a password in it, or no model.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"endpoint {url!r}: expected an address such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            shown = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
            raise ValueError(f"endpoint {shown}: no user, password or query in the address; {_key_help()}")
        if not model:
            raise ValueError(f"endpoint {url}: no model named; expected endpoint:{url}#MODEL")
        self.name, self.url, self.model, self.settings = name, url, model, settings or Settings()
        self.ledger = Ledger()
        self._rubric: Rubric = load_rubric(self.settings.rubric)
        self._left_out = set() if self.settings.schema else {"response_format"}
        shaping = {k: v for k, v in dataclasses.asdict(self.settings).items() if k not in _COST_ONLY}
        identity = [url, model, self._rubric.hash, shaping]
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def score(self, texts: Sequence[str]) -> list[Verdict]:
        """One verdict a text, its score None where no usable answer came.

        Raises EndpointError if the endpoint is down, keeps failing, refuses the key or the model, doesn't speak the
        API, or gives too many unusable answers.
        """
        return _run(self._score(texts)) if texts else []

    async def _score(self, texts: Sequence[str]) -> list[Verdict]:
        settings = self.settings
        cut = [
            [text[start:end] for start, end in chunks.spans(len(text), settings.chunk_chars, settings.max_chunks)]
            for text in texts
        ]
        free = asyncio.Semaphore(settings.concurrency)
        async with self._client() as client:
            tasks = [[asyncio.create_task(self._ask(client, free, chunk)) for chunk in pieces] for pieces in cut]
            every = [task for of_text in tasks for task in of_text]
            try:
                await asyncio.gather(*every)
            except BaseException:  # the first failure ends the run: what is under way goes with it
                for task in every:
                    task.cancel()
                await asyncio.gather(*every, return_exceptions=True)
                raise
        if self.ledger.refused == self.ledger.answers:
            raise EndpointError(f"{self._label}: refused all of {self.ledger.refused} requests (400, 413 or 422)")
        return [chunks.combine([(task.result(), {}) for task in of_text]) for of_text in tasks]

    def _client(self) -> Any:
        import openai

        for logger in _LOGGERS:
            logging.getLogger(logger).setLevel(logging.WARNING)
        key = next((os.environ[name].strip() for name in KEY_VARIABLES if os.environ.get(name, "").strip()), "none")
        return openai.AsyncOpenAI(
            base_url=self.url, api_key=key, max_retries=self.settings.retries, timeout=self.settings.timeout_s
        )

    async def _ask(self, client: Any, free: asyncio.Semaphore, chunk: str) -> Answer | None:
        async with free:
            reply = await self._reply(client, chunk)
        answer = None if reply is None else read_answer(reply)
        ledger = self.ledger
        ledger.answers += 1
        ledger.unusable += answer is None
        if ledger.answers >= _MIN_ANSWERS and ledger.unusable > self.settings.max_unusable * ledger.answers:
            raise EndpointError(
                f"{self._label}: {ledger.unusable} of {ledger.answers} answers are unusable, of which {ledger.refused} "
                f"refused requests and the others not the JSON asked for (max_unusable={self.settings.max_unusable})"
            )
        return answer

    async def _reply(self, client: Any, chunk: str) -> str | None:
        """The text of the answer; None where there is none: the server refused this request, or filtered its answer."""
        import openai

        self.ledger.requests += 1
        fields = self._fields()
        try:
            completion = await client.chat.completions.create(
                model=self.model,
                messages=[
                    {"role": "system", "content": self._rubric.system},
                    {"role": "user", "content": self._rubric.user(chunk)},
                ],
                **fields,
            )
        except openai.APIStatusError as error:
            if refused := _refused_fields(error, fields):
                self._left_out |= refused
                return await self._reply(client, chunk)
            if error.status_code in _REFUSES:
                self.ledger.refused += 1
                return None
            raise EndpointError(f"{self._label}: {_explain(error.status_code)}") from None
        except openai.APITimeoutError:
            tried = f"{self.settings.retries + 1} times timeout_s={self.settings.timeout_s}"
            raise EndpointError(f"{self._label}: no answer within {tried}") from None
        except openai.APIConnectionError as error:
            raise EndpointError(f"{self._label}: can't be reached ({type(error.__cause__).__name__})") from None
        except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:  # such as a body that isn't JSON
            raise EndpointError(f"{self._label}: no OpenAI-compatible answer ({type(error).__name__})") from None
        return self._read(completion)

    def _fields(self) -> dict[str, Any]:
        """The request's optional fields, but for those that the server has refused."""
        limit = "max_completion_tokens" if "max_tokens" in self._left_out else "max_tokens"
        fields = {"response_format": _JSON_SCHEMA, "temperature": 0, limit: self.settings.max_tokens}
        return {name: value for name, value in fields.items() if name not in self._left_out}

    @property
    def _label(self) -> str:
        return f"endpoint {self.url}, model {self.model}"

    def _read(self, completion: Any) -> str | None:
        """Books an answer's tokens and takes its text out of a structure that a foreign server made."""
        usage = getattr(completion, "usage", None)
        self.ledger.prompt_tokens += getattr(usage, "prompt_tokens", None) or 0
        self.ledger.completion_tokens += getattr(usage, "completion_tokens", None) or 0
        choices = getattr(completion, "choices", None)
        if not isinstance(choices, list):  # a page of HTML arrives as a string, other JSON without choices
            what = "HTML or plain text" if isinstance(completion, str) else "JSON without choices"
            raise EndpointError(f"{self._label}: answers with {what}: is it the API's base, such as .../v1?")
        content = getattr(getattr(choices[0], "message", None), "content", None) if choices else None
        return content if isinstance(content, str) else None


def load(url: str, model: str, *, name: str = "endpoint", **settings: Any) -> EndpointJudge:
    """See `safelm.safety.judge.load_endpoint`."""
    return EndpointJudge(url, model, make_settings(Settings, settings, where="endpoint", others="name"), name=name)


def _key_help() -> str:
    return f"the key goes into the environment variable {' or '.join(KEY_VARIABLES)}"


def _explain(status: int) -> str:
    """What a status that stayed means to the user."""
    reasons = {
        401: f"401, the key is refused; {_key_help()}",
        403: f"403, the key may not do this; {_key_help()}",
        404: "404, no such address or model",
        429: "429, too many requests, and it stays so; a smaller concurrency may help",
    }
    return reasons.get(status, f"status {status}, and it stays so" if status >= 500 else f"status {status}")


def _refused_fields(error: Any, sent: Mapping[str, Any]) -> set[str]:
    """The optional fields that a status says a server doesn't take."""
    if error.status_code not in (*_REFUSES, 404, 415, 501) or error.body is None:
        return set()
    text = json.dumps(error.body, default=str).lower()
    return {name for name, signs in _OPTIONAL_FIELDS.items() if name in sent and any(sign in text for sign in signs)}


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    """Runs to the end, in a thread of its own where this one has an event loop already (notebooks)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((asyncio.run(work), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    value, error = outcome[0]
    if error is not None:
        raise error
    return value
