"""A writer behind an OpenAI-compatible address: vLLM, SGLang, llama.cpp, a hosted model."""

import collections
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from safelm.io import records
from safelm.safety import endpoint_client
from safelm.safety.endpoint_client import Completion, EndpointError, EndpointSettings, RequestRefusedError
from safelm.safety.endpoint_queue import GIVE_UP_AFTER, RequestQueue
from safelm.safety.options import check_least, make_settings
from safelm.safety.synthesis.requests import user_message
from safelm.safety.synthesis.writer import OnReply, Reply, Request
from safelm.text.chat_template import read_kwargs

log = logging.getLogger(__name__)

_COST_ONLY = ("concurrency", "timeout_s", "retries", "input_price", "output_price", "give_up_after", "key_env")
_MIN_ANSWERS = 20  # before "all of them refused" says anything


@dataclasses.dataclass(frozen=True)
class EndpointWriterSettings(EndpointSettings):
    """How an endpoint is asked for texts; see `EndpointSettings`.

    Attributes:
      temperature, top_p: of sampling; no longer sent once the server refuses one.
      seeded: whether to send each request's seed, until the server refuses it.
      max_document_chars: longer documents are split.
      chat_template_kwargs: JSON of further variables of the chat template, such as {"enable_thinking":false}, for
        servers that take them (vLLM, SGLang, llama.cpp, ours).
      input_price, output_price: prices per million tokens, in any currency.
      give_up_after: number of requests that failed at every retry after which the endpoint is tested with a short
        request.
    """

    timeout_s: float = 300.0
    retries: int = 8
    temperature: float = 0.7
    top_p: float = 1.0
    seeded: bool = True
    max_document_chars: int = 12_000
    chat_template_kwargs: str = ""
    input_price: float = 0.0
    output_price: float = 0.0
    give_up_after: int = GIVE_UP_AFTER

    def __post_init__(self) -> None:
        super().__post_init__()
        read_kwargs(self.chat_template_kwargs, "endpoint: chat_template_kwargs")
        check_least("endpoint", self, temperature=0, max_document_chars=1, input_price=0, output_price=0)
        check_least("endpoint", self, give_up_after=1)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"endpoint: top_p={self.top_p}: must be above 0 and at most 1")


class EndpointWriter:
    """A writer behind an address. Neither documents nor the key are ever logged or shown.

    A request that fails at every retry is asked again at the end; if it fails again, its reply is an error, unless the
    endpoint has stopped answering (see `RequestQueue`).

    Attributes:
      name: the model's name.
      fingerprint: SHA-256 (hex) of address, model and settings; a changed model behind the address goes unnoticed.
    """

    def __init__(self, url: str, model: str, settings: EndpointWriterSettings | None = None, *, name: str = ""):
        """`url` is the API's base, such as http://localhost:8000/v1.

        Raises ValueError for an address that isn't http(s) or has a password in it, or no model.
        """
        self.settings = settings or EndpointWriterSettings()
        self._endpoint = self.settings.client(url, model)
        if not self.settings.seeded:
            self._endpoint.left_out.add("seed")
        self.name, self.max_document_chars = name or model, self.settings.max_document_chars
        shaping = {k: v for k, v in dataclasses.asdict(self.settings).items() if k not in _COST_ONLY}
        self.fingerprint = records.fingerprint([url, model, shaping])
        self._counts: collections.Counter[str] = collections.Counter()
        self._served: set[str] = {model}

    def write(self, requests: Sequence[Request], on_reply: OnReply) -> None:
        """See `Writer`; `on_reply` may run in another thread if this one already has an event loop (notebooks).

        Raises EndpointError if the endpoint is down, keeps failing, refuses the key, the model or every request, or
        doesn't speak the API. Replies to open requests are still awaited and delivered.
        """
        if requests:
            endpoint_client.run(self._write(requests, on_reply))

    def ledger(self) -> Mapping[str, int | float]:
        """Counts so far.

        `requests` and `retries` were sent. Of the `answers`, `truncated` reached the limit of tokens; others are
        `empty`, `filtered`, `refused` or `failed`. `uncounted` answers came without token counts, so `prompt_tokens`,
        `completion_tokens` and `cost` (by the settings' prices) are too small.
        """
        names = (
            "answers",
            "truncated",
            "empty",
            "filtered",
            "refused",
            "failed",
            "uncounted",
            "prompt_tokens",
            "completion_tokens",
        )
        counts = {name: self._counts[name] for name in names}
        cost = (
            counts["prompt_tokens"] * self.settings.input_price
            + counts["completion_tokens"] * self.settings.output_price
        ) / 1e6
        return {"requests": self._endpoint.num_requests, "retries": self._endpoint.num_retries, **counts, "cost": cost}

    async def _write(self, requests: Sequence[Request], on_reply: OnReply) -> None:
        def deliver(index: int, reply: Reply | None) -> None:
            self._deliver(index, reply or Reply(None, "error", reason="failed at every retry, twice"), on_reply)

        queue: RequestQueue[Request, Reply] = RequestQueue(
            self._endpoint,
            self._ask,
            deliver,
            book=self._book,
            concurrency=self.settings.concurrency,
            give_up_after=self.settings.give_up_after,
        )
        await queue.run(requests)

    def _deliver(self, index: int, reply: Reply, on_reply: OnReply) -> None:
        counts = self._counts
        counts["answers"] += 1
        counts["truncated"] += reply.stopped_by == "length"
        counts["empty"] += reply.text is not None and not reply.text.strip()
        counts["filtered"] += reply.stopped_by == "filtered"
        counts["refused"] += reply.stopped_by == "refused"
        counts["failed"] += reply.stopped_by == "error"
        on_reply(index, reply)
        if counts["answers"] >= _MIN_ANSWERS and counts["refused"] == counts["answers"]:
            raise EndpointError(f"{self._endpoint.label}: refused all of {counts['refused']} requests ({reply.reason})")

    async def _ask(self, client: Any, request: Request) -> Reply:
        settings = self.settings
        messages = [{"role": "system", "content": request.system}, {"role": "user", "content": user_message(request)}]
        fields = {"temperature": settings.temperature, "max_tokens": request.max_new_tokens, "seed": request.seed}
        if settings.top_p < 1:
            fields["top_p"] = settings.top_p
        if kwargs := read_kwargs(settings.chat_template_kwargs, "endpoint: chat_template_kwargs"):
            fields["extra_body"] = {"chat_template_kwargs": kwargs}
        try:
            completion = await self._endpoint.complete(client, messages, fields)
        except RequestRefusedError as error:
            return Reply(None, "filtered" if error.is_filtered else "refused", reason=f"status {error.status}")
        return self._reply(completion)

    def _reply(self, completion: Completion) -> Reply:
        tokens = self._book(completion)
        if completion.finish_reason == "content_filter":
            return Reply(None, "filtered", *tokens, reason="the server filtered the answer")
        if completion.is_refusal:
            return Reply(None, "refused", *tokens, reason="the model refused")
        return Reply(completion.text or "", "length" if completion.finish_reason == "length" else "end", *tokens)

    def _book(self, completion: Completion) -> tuple[int, int]:
        """Counts an answer's tokens; warns once if another model than the requested one answers."""
        if completion.model not in self._served and completion.model:
            self._served.add(completion.model)
            log.warning("%s: answers as %.80r", self._endpoint.label, completion.model)
        tokens = completion.prompt_tokens or 0, completion.completion_tokens or 0
        self._counts["uncounted"] += completion.completion_tokens is None
        self._counts["prompt_tokens"] += tokens[0]
        self._counts["completion_tokens"] += tokens[1]
        return tokens


def load_endpoint_writer(url: str, model: str, *, name: str = "", **settings: Any) -> EndpointWriter:
    """The writer with these options.

    Raises ValueError for an option that doesn't exist, is out of range or of another type.
    """
    return EndpointWriter(
        url, model, make_settings(EndpointWriterSettings, settings, where="endpoint", others="name"), name=name
    )
