"""A client of OpenAI-compatible endpoints for judges and writers: asks for chat completions and classifies failures.

The `openai` client retries what may pass (429 by the server's Retry-After, 5xx, timeouts, lost connections, an error in
a body with status 200) with growing pauses. The result is one of four: an answer, a request that the server refuses, a
failure that might have passed later, an unusable endpoint. Neither the key nor any part of a message is ever logged or
shown.

The key is SAFELM_ENDPOINT_KEY or the variable named by `key_env`; OPENAI_API_KEY is only sent to OpenAI's own host.
Redirects are not followed, so neither key nor document reaches a host that wasn't named.
"""

import asyncio
import dataclasses
import json
import logging
import os
import re
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from safelm.safety.endpoint_log_probs import first_tokens
from safelm.safety.options import check_least

KEY_VARIABLE, OPENAIS_VARIABLE = "SAFELM_ENDPOINT_KEY", "OPENAI_API_KEY"
_OPENAIS_HOST = "api.openai.com"
_OPENAIS_HOSTS = re.compile(r"([a-z0-9-]+\.)*api\.openai\.com")  # with the regional ones
_LOGGERS = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")  # at DEBUG they record requests: documents and keys
_NO_KEY = "none"  # the client wants some key; servers that need none take it
_REFUSES = (400, 413, 422)  # what a server says to one request: a field that it doesn't know, a text too long for it
_PASSES = (408, 409, 429)  # and 500 and above
# Fields that some servers or models refuse: by what a refusal of each is known.
_OPTIONAL_FIELDS = {
    "response_format": ("response_format", "response format", "json_schema", "guided", "structured"),
    "max_tokens": ("max_completion_tokens' instead", "unsupported parameter: 'max_tokens'"),
    "temperature": ("'temperature' does not support", "unsupported parameter: 'temperature'"),
    "top_p": ("'top_p' does not support", "unsupported parameter: 'top_p'"),
    "seed": ("'seed'", '\\"seed\\"', "field seed", "argument supplied: seed", "seed is not supported"),
}
_NO_MODEL = re.compile(r"model\b[^.]{0,120}(?:not found|not exist|doesn't exist|not available|unknown)|unknown model")
_CODE = re.compile(r"[\w.-]{1,40}")
_FILTERS = ("content_filter", "content filter", "content_policy", "responsibleai")
_KEY_HELP = f"the key goes into the environment variable {KEY_VARIABLE}, or the one that key_env= names"
_T = TypeVar("_T")


class EndpointError(OSError):
    """The endpoint is unusable; the message names the address but neither the key nor any part of a document."""


class PassingError(EndpointError):
    """A request failed at every retry in a way that may pass."""


class RequestRefusedError(Exception):
    """The server refuses one request.

    Attributes:
      is_filtered: whether a content filter refused it, rather than its form or length.
    """

    def __init__(self, status: int, *, is_filtered: bool):
        super().__init__(f"status {status}")
        self.status, self.is_filtered = status, is_filtered


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer of the endpoint.

    Attributes:
      text: None if the answer has no text.
      finish_reason: the server's word, e.g. "stop", "length", "content_filter"; "" if it gives none.
      is_refusal: whether the model sent a refusal in place of content.
      prompt_tokens, completion_tokens: None if the server doesn't count.
      model: the name of the model that answered, as the server gives it.
      first_tokens: the likeliest first tokens with their log-probs (nats), where they were asked for and given.
    """

    text: str | None = dataclasses.field(repr=False)
    finish_reason: str = ""
    is_refusal: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    model: str = ""
    first_tokens: tuple[tuple[str, float], ...] = dataclasses.field(default=(), repr=False)


@dataclasses.dataclass(frozen=True)
class EndpointSettings:
    """How requests are sent to an endpoint.

    Attributes:
      concurrency: the most open requests.
      timeout_s: seconds for the whole reply to one request.
      retries: the most retries of one request.
      key_env: the environment variable with the key, if not SAFELM_ENDPOINT_KEY.
    """

    concurrency: int = 8
    timeout_s: float = 60.0
    retries: int = 6
    key_env: str = ""

    def __post_init__(self) -> None:
        check_least("endpoint", self, concurrency=1, retries=0)
        if not self.timeout_s > 0:
            raise ValueError(f"endpoint: timeout_s={self.timeout_s}: must be above 0")

    def client(self, url: str, model: str) -> "EndpointClient":
        """An `EndpointClient` with these settings."""
        return EndpointClient(url, model, timeout_s=self.timeout_s, retries=self.retries, key_env=self.key_env)


class EndpointClient:
    """A model at an address.

    Attributes:
      left_out: optional fields no longer sent, because the server refused them.
      num_requests: requests sent so far, without the openai client's retries.
      num_retries: those retries, as far as the client reports them.
    """

    def __init__(self, url: str, model: str, *, timeout_s: float, retries: int, key_env: str = ""):
        """Checks the address; nothing is sent.

        Args:
          url: the API's base, such as http://localhost:8000/v1.
          timeout_s: seconds for the whole reply to one request.
          retries: the most retries of one request.
          key_env: the environment variable with the key, in place of KEY_VARIABLE.

        Raises ValueError for an address that isn't http(s) or has a password in it, no model, or a variable that isn't
        set.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"endpoint {url!r}: expected an address such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            shown = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
            raise ValueError(f"endpoint {shown}: no user, password or query in the address; {_KEY_HELP}")
        if not model:
            raise ValueError(f"endpoint {url}: no model named; expected endpoint:{url}#MODEL")
        self.url, self.model, self.timeout_s, self.retries = url, model, timeout_s, retries
        self.left_out: set[str] = set()
        self.num_requests = self.num_retries = 0
        self._key_env, self._host, self._is_secure = key_env, parts.hostname, parts.scheme == "https"
        self._has_answered = False
        self._key()

    @property
    def label(self) -> str:
        """The endpoint's name in messages."""
        return f"endpoint {self.url}, model {self.model}"

    def open(self) -> Any:
        """An `openai.AsyncOpenAI`, to be entered in the event loop that uses it. Raises ImportError without openai."""
        import openai

        from safelm.safety.endpoint_http import BoundedClient

        for logger in _LOGGERS:
            logging.getLogger(logger).setLevel(logging.WARNING)
        key = self._key() or _NO_KEY
        return openai.AsyncOpenAI(
            base_url=self.url,
            api_key=key,
            max_retries=self.retries,
            timeout=self.timeout_s,
            http_client=BoundedClient(key, timeout_s=self.timeout_s, find_trouble=self._find_trouble),
        )

    async def complete(
        self, client: Any, messages: Sequence[Mapping[str, str]], fields: Mapping[str, Any]
    ) -> Completion:
        """Asks for an answer through `client`, which `open` made.

        Args:
          fields: the request's optional fields. A field that the server refuses is left out from then on; "max_tokens"
            is then sent under its newer name.

        Raises:
          RequestRefusedError: the server refuses this request.
          PassingError: no answer after all retries (429, 5xx, timeout, no connection).
          EndpointError: no request can succeed: a missing or wrong key, an unknown model or address, another API.
        """
        import openai

        self.num_requests += 1
        sent = {name: value for name, value in fields.items() if name not in self.left_out}
        if "max_tokens" in self.left_out and "max_tokens" in fields:
            sent["max_completion_tokens"] = fields["max_tokens"]
        try:
            raw = await client.chat.completions.with_raw_response.create(
                model=self.model, messages=list(messages), **sent
            )
            self.num_retries += raw.retries_taken
            answer = raw.parse()
        except openai.APIStatusError as error:
            self._count_retries(error)
            if refused := _refused_fields(error, sent):
                self.left_out |= refused
                return await self.complete(client, messages, fields)
            raise self._status_error(error) from None
        except openai.APITimeoutError as error:
            self._count_retries(error)
            tried = f"{self.retries + 1} times timeout_s={self.timeout_s}"
            raise PassingError(f"{self.label}: no answer within {tried}") from None
        except openai.APIConnectionError as error:
            self._count_retries(error)
            raise PassingError(f"{self.label}: {_reason(error.__cause__)}") from None
        except (openai.OpenAIError, ValueError, TypeError, AttributeError, RecursionError) as error:  # no JSON, or such
            raise EndpointError(f"{self.label}: no OpenAI-compatible answer ({type(error).__name__})") from None
        completion = self._read(answer)
        self._has_answered = True
        return completion

    def _count_retries(self, error: Any) -> None:
        self.num_retries += int(error.request.headers.get("x-stainless-retry-count") or 0)

    def _status_error(self, error: Any) -> Exception:
        """The error for a status that remained after all retries."""
        from safelm.safety.endpoint_http import TROUBLE

        if trouble := error.response.extensions.get(TROUBLE):
            return PassingError(f"{self.label}: {trouble}, and it stays so")
        status, said = error.status_code, _said(error)
        if status in _REFUSES and _NO_MODEL.search(said):
            return EndpointError(f"{self.label}: {status}, no such model")
        if status in _REFUSES:
            return RequestRefusedError(status, is_filtered=any(sign in said for sign in _FILTERS))
        kind = PassingError if status in _PASSES or status >= 500 else EndpointError
        return kind(f"{self.label}: {self._explain(status)}")

    def _read(self, answer: Any) -> Completion:
        """Reads an answer from the server's untrusted structure."""
        choices = getattr(answer, "choices", None)
        if not isinstance(choices, list):  # a page of HTML arrives as a string, other JSON without choices
            what = "HTML or plain text" if isinstance(answer, str) else "JSON without choices"
            raise EndpointError(f"{self.label}: answers with {what}: is it the API's base, such as .../v1?")
        usage, message = getattr(answer, "usage", None), getattr(choices[0], "message", None) if choices else None
        content = getattr(message, "content", None)
        return Completion(
            text=content.encode(errors="replace").decode() if isinstance(content, str) else None,  # lone surrogates
            finish_reason=str(getattr(choices[0], "finish_reason", None) or "") if choices else "",
            is_refusal=bool(getattr(message, "refusal", None)),
            prompt_tokens=_count(getattr(usage, "prompt_tokens", None)),
            completion_tokens=_count(getattr(usage, "completion_tokens", None)),
            model=str(getattr(answer, "model", None) or ""),
            first_tokens=first_tokens(choices[0]) if choices else (),
        )

    def _find_trouble(self, content: bytes) -> str:
        """Why a body with status 200 may be better at the next try; "" if it is an answer or never will be one."""
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            body = None
        fields = body if isinstance(body, dict) else {}
        choices = fields.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        error = fields.get("error") or (fields if fields.get("object") == "error" else None) or choice.get("error")
        if error or choice.get("finish_reason") == "error":
            code = error.get("code") if isinstance(error, dict) else None
            is_shown = isinstance(code, str | int) and _CODE.fullmatch(str(code))
            return "answers 200 with an error in the body" + (f" (code {code})" if is_shown else "")
        if self._has_answered and not isinstance(choices, list):
            return f"answers with {'HTML or plain text' if body is None else 'JSON without choices'} now"
        return ""

    def _key(self) -> str:
        """The key, "" for none. Raises ValueError if the named variable is empty or no header can hold the key."""
        names = [self._key_env or KEY_VARIABLE]
        if not self._key_env and self._is_openais():
            names.append(OPENAIS_VARIABLE)
        name, key = next(((n, k) for n in names if (k := os.environ.get(n, "").strip())), ("", ""))
        if self._key_env and not key:  # the name isn't shown: it may be a key
            raise ValueError(f"endpoint {self.url}: key_env: no environment variable of that name is set")
        if not all("!" <= character <= "~" for character in key):
            raise ValueError(f"endpoint {self.url}: the key in {name} holds characters that no key has")
        return key

    def _is_openais(self) -> bool:
        return self._is_secure and bool(_OPENAIS_HOSTS.fullmatch(self._host))

    def _explain(self, status: int) -> str:
        """Advice for the user about a status that remained after all retries."""
        is_withheld = not self._is_openais() and os.environ.get(OPENAIS_VARIABLE)
        withheld = f" ({OPENAIS_VARIABLE} goes to {_OPENAIS_HOST} only)" if is_withheld else ""
        missing = f"a key is asked for and none is set{withheld}"
        if 300 <= status < 400:
            return f"status {status}, a redirect, which is not followed: give the address that answers itself"
        reasons = {
            401: f"401, {'the key is refused' if self._key() else missing}; {_KEY_HELP}",
            403: f"403, the key may not do this; {_KEY_HELP}",
            404: "404, no such address or model",
            429: "429, too many requests, and it stays so; a smaller concurrency may help",
        }
        return reasons.get(status, f"status {status}, and it stays so" if status >= 500 else f"status {status}")


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """Runs a coroutine to its end, in a thread of its own if this thread already has an event loop (notebooks)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    outcome: list[Any] = []

    def in_thread() -> None:
        try:
            outcome.append((asyncio.run(work), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def _reason(cause: BaseException | None) -> str:
    """Why no reply arrived."""
    from safelm.safety.endpoint_http import UnusableReplyError

    return str(cause) if isinstance(cause, UnusableReplyError) else f"can't be reached ({type(cause).__name__})"


def _count(value: Any) -> int | None:
    """A number of tokens as an untrusted server reports it."""
    return value if type(value) is int and 0 <= value < 1 << 53 else None


def _said(error: Any) -> str:
    """A failure's body in lower case, to be searched for signs; may contain the document."""
    return "" if error.body is None else json.dumps(error.body, default=str).lower()


def _refused_fields(error: Any, sent: Mapping[str, Any]) -> set[str]:
    """The optional fields that, by its error, the server doesn't accept."""
    if error.status_code not in (*_REFUSES, 404, 415, 501):
        return set()
    said = _said(error)
    return {name for name, signs in _OPTIONAL_FIELDS.items() if name in sent and any(sign in said for sign in signs)}
