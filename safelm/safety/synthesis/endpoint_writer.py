"""A writer behind any OpenAI-compatible address: vLLM, SGLang, llama.cpp, a hosted model."""

import asyncio
import collections
import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from safelm.safety import endpoint_client
from safelm.safety.endpoint_client import Completion, EndpointClient, EndpointError, PassingError, RequestRefusedError
from safelm.safety.judge.options import make_settings
from safelm.safety.synthesis.requests import user_message
from safelm.safety.synthesis.writer import OnReply, Reply, Request

log = logging.getLogger(__name__)

_COST_ONLY = ("concurrency", "timeout_s", "retries", "input_price", "output_price", "give_up_after")
_MIN_ANSWERS = 20  # before "all of them refused" says anything
_PROBE = [{"role": "user", "content": "Answer with the word yes."}]
_PROBE_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an endpoint is asked.

    Attributes:
      concurrency: requests under way at once.
      timeout_s: of one request, in seconds.
      retries: of one request that failed in passing.
      temperature, top_p: of sampling. A server that refuses one is asked without it from then on.
      seeded: send each request's seed, likewise.
      max_document_chars: a longer document comes in parts.
      input_price, output_price: per million tokens, in whatever currency the cost shall be counted.
      give_up_after: so many requests that failed at every retry are set aside before the endpoint is asked whether it
        still answers at all.
    """

    concurrency: int = 8
    timeout_s: float = 300.0
    retries: int = 8
    temperature: float = 0.7
    top_p: float = 1.0
    seeded: bool = True
    max_document_chars: int = 12_000
    input_price: float = 0.0
    output_price: float = 0.0
    give_up_after: int = 8

    def __post_init__(self) -> None:
        smallest = {
            "concurrency": 1, "retries": 0, "temperature": 0, "max_document_chars": 1, "input_price": 0,
            "output_price": 0, "give_up_after": 1,
        }  # fmt: skip
        for name, least in smallest.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"endpoint: {name}={getattr(self, name)}: must be at least {least}")
        if not self.timeout_s > 0:
            raise ValueError(f"endpoint: timeout_s={self.timeout_s}: must be above 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"endpoint: top_p={self.top_p}: must be above 0 and at most 1")


@dataclasses.dataclass
class _Task:
    index: int
    request: Request
    failures: int = 0


@dataclasses.dataclass
class _Run:
    """One `write`. `aside`: tasks that failed at every retry, and how: the last of it stands for all."""

    waiting: collections.deque[_Task]
    on_reply: OnReply
    aside: list[tuple[_Task, PassingError]] = dataclasses.field(default_factory=list)
    error: EndpointError | None = None
    lock: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)


class EndpointWriter:
    """A writer. Neither documents nor the key are ever logged or shown.

    A request that fails at every retry is asked again at the end, provided that the endpoint answers something else;
    if it fails again its reply is an error. If the endpoint answers nothing any more, no reply is made up:
    `write` raises, so that an outage costs no document.

    Attributes:
      name: the model's.
      fingerprint: sha256 (hex) over address, model and settings; the model behind an address can change unseen.
    """

    def __init__(self, url: str, model: str, settings: Settings | None = None, *, name: str = ""):
        """`url` is the API's base, such as http://localhost:8000/v1.

        Raises ValueError: no http(s) address, an address with a password in it, or no model.
        """
        self.settings = settings or Settings()
        self._endpoint = EndpointClient(url, model, timeout_s=self.settings.timeout_s, retries=self.settings.retries)
        if not self.settings.seeded:
            self._endpoint.left_out.add("seed")
        self.name, self.max_document_chars = name or model, self.settings.max_document_chars
        shaping = {k: v for k, v in dataclasses.asdict(self.settings).items() if k not in _COST_ONLY}
        self.fingerprint = hashlib.sha256(json.dumps([url, model, shaping], sort_keys=True).encode()).hexdigest()
        self._counts: collections.Counter[str] = collections.Counter()
        self._served: set[str] = {model}

    def write(self, requests: Sequence[Request], on_reply: OnReply) -> None:
        """See `Writer`; `on_reply` may be called in another thread where this one has an event loop (notebooks).

        Raises EndpointError if the endpoint is down, keeps failing, refuses the key or the model or every request, or
        doesn't speak the API. What is under way then is still waited for and handed over.
        """
        if requests:
            endpoint_client.run(self._write(requests, on_reply))

    def ledger(self) -> Mapping[str, int | float]:
        """Counts so far.

        `requests` sent and `retries` of them; `answers`, of which `truncated` at the limit of tokens, `empty`,
        `filtered`, `refused` and `failed`, and `uncounted` came without a count of tokens, so that `prompt_tokens`,
        `completion_tokens` and `cost` (by the settings' prices) are too small.
        """
        names = ("answers", "truncated", "empty", "filtered", "refused", "failed", "uncounted", "prompt_tokens",
                 "completion_tokens")  # fmt: skip
        counts = {name: self._counts[name] for name in names}
        cost = (
            counts["prompt_tokens"] * self.settings.input_price
            + counts["completion_tokens"] * self.settings.output_price
        ) / 1e6
        return {"requests": self._endpoint.num_requests, "retries": self._endpoint.num_retries, **counts, "cost": cost}

    async def _write(self, requests: Sequence[Request], on_reply: OnReply) -> None:
        run = _Run(collections.deque(_Task(*pair) for pair in enumerate(requests)), on_reply)
        async with self._endpoint.open() as client:
            while run.waiting and run.error is None:
                count = min(self.settings.concurrency, len(run.waiting))
                workers = [asyncio.create_task(self._work(client, run)) for _ in range(count)]
                try:
                    await asyncio.gather(*workers)
                except BaseException:  # an interrupt, or the receiver's own failure: what is under way goes with it
                    for worker in workers:
                        worker.cancel()
                    await asyncio.gather(*workers, return_exceptions=True)
                    raise
                await self._settle(client, run)
        if run.error is not None:
            raise run.error

    async def _work(self, client: Any, run: _Run) -> None:
        """Asks one request after the other until none waits or the endpoint proves unusable."""
        while run.waiting and run.error is None:
            task = run.waiting.popleft()
            try:
                reply = await self._ask(client, task.request)
            except PassingError as error:
                task.failures += 1
                run.aside.append((task, error))
                if len(run.aside) >= self.settings.give_up_after:
                    await self._settle(client, run)
            except EndpointError as error:
                run.error = run.error or error
            else:
                self._deliver(run, task, reply)

    async def _settle(self, client: Any, run: _Run) -> None:
        """Decides on what was set aside: asked again, given up, or, if nothing is answered any more, the end."""
        async with run.lock:
            if not run.aside or run.error is not None:
                return
            aside, run.aside = run.aside, []
            try:
                self._book(await self._endpoint.complete(client, _PROBE, {"max_tokens": _PROBE_TOKENS}))
            except RequestRefusedError:
                pass  # that is an answer
            except EndpointError as error:
                run.error = error
                return
            for task, _ in aside:
                if task.failures < 2:
                    run.waiting.append(task)
                else:
                    self._deliver(run, task, Reply(None, "error", reason="failed at every retry, twice"))

    def _deliver(self, run: _Run, task: _Task, reply: Reply) -> None:
        counts = self._counts
        counts["answers"] += 1
        counts["truncated"] += reply.stopped_by == "length"
        counts["empty"] += reply.text is not None and not reply.text.strip()
        counts["filtered"] += reply.stopped_by == "filtered"
        counts["refused"] += reply.stopped_by == "refused"
        counts["failed"] += reply.stopped_by == "error"
        run.on_reply(task.index, reply)
        if counts["answers"] >= _MIN_ANSWERS and counts["refused"] == counts["answers"]:
            run.error = EndpointError(
                f"{self._endpoint.label}: refused all of {counts['refused']} requests ({reply.reason})"
            )

    async def _ask(self, client: Any, request: Request) -> Reply:
        settings = self.settings
        messages = [{"role": "system", "content": request.system}, {"role": "user", "content": user_message(request)}]
        fields = {"temperature": settings.temperature, "max_tokens": request.max_new_tokens, "seed": request.seed}
        if settings.top_p < 1:
            fields["top_p"] = settings.top_p
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
        if completion.finish_reason == "error":
            return Reply(None, "error", *tokens, reason="the server broke off")
        return Reply(completion.text or "", "length" if completion.finish_reason == "length" else "end", *tokens)

    def _book(self, completion: Completion) -> tuple[int, int]:
        """Counts an answer's tokens; says once if another model than the one asked for gives them."""
        if completion.model not in self._served and completion.model:
            self._served.add(completion.model)
            log.warning("%s: answers as %.80r", self._endpoint.label, completion.model)
        tokens = completion.prompt_tokens or 0, completion.completion_tokens or 0
        self._counts["uncounted"] += completion.completion_tokens is None
        self._counts["prompt_tokens"] += tokens[0]
        self._counts["completion_tokens"] += tokens[1]
        return tokens


def load(url: str, model: str, *, name: str = "", **settings: Any) -> EndpointWriter:
    """The writer of these options; ValueError for one that doesn't exist, is out of range or of another type."""
    return EndpointWriter(url, model, make_settings(Settings, settings, where="endpoint", others="name"), name=name)
