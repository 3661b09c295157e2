"""The API's paths: each parses a request and writes a reply or a stream of events."""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from aiohttp import web

from safelm.inference.methods import METHODS
from safelm.serving import metrics as metrics_lib
from safelm.serving import request as request_lib
from safelm.serving.access import patience
from safelm.serving.connections import Connection
from safelm.serving.errors import ApiError, log_defect, timed_out
from safelm.serving.fields import read_body
from safelm.serving.generation import RunningGeneration
from safelm.serving.limits import Admission, Limits, Shapes
from safelm.serving.merging import merged
from safelm.serving.metrics import Metrics
from safelm.serving.models import ServedModel
from safelm.serving.numbers import summarize
from safelm.serving.replies import Replies, describe_piece, encode, method_name
from safelm.serving.request import GenerationRequest
from safelm.serving.worker import EngineWorker

log = logging.getLogger(__name__)
_STARTED = int(time.time())
_MANY_TOKENS = 4096  # of a reply, from which it is made off the event loop
Reader = Callable[..., GenerationRequest]
T = TypeVar("T")


@dataclasses.dataclass
class Service:
    """The state that the routes share.

    Attributes:
      models: models by name; the first serves requests that name none.
      default_method: the decoding method of requests that name none.
      is_warm: whether the first programs are compiled.
    """

    models: Mapping[str, ServedModel]
    worker: EngineWorker
    limits: Limits
    admission: Admission
    shapes: Shapes
    metrics: Metrics
    default_method: str
    is_warm: bool = True
    _large_replies: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)  # built one at a time

    def routes(self) -> list[web.RouteDef]:
        """Every path except the playground's."""
        return [
            web.get("/health", self.health),
            web.get("/metrics", self.expose_metrics),
            web.get("/v1/models", self.list_models),
            web.get("/v1/models/{name}", self.describe_model),
            web.post("/v1/completions", self.complete),
            web.post("/v1/chat/completions", self.chat),
            web.post("/v1/safelm/score", self.score),
        ]

    async def health(self, _: web.Request) -> web.Response:
        """Returns 200 while requests are accepted.

        503 while warming up or draining, or if the computing thread has died.
        """
        status = "ok" if self.is_warm else "warming_up"
        status = status if self.worker.is_alive else "failed"
        status = "draining" if self.admission.is_draining else status
        return web.json_response({"status": status}, status=200 if status == "ok" else 503)

    async def expose_metrics(self, _: web.Request) -> web.Response:
        """Prometheus' text format."""
        load = {name: getattr(self.worker, f"num_{name}") for name in ("waiting", "active")}
        load["tokens_reserved"], prefixes = self.worker.tokens_reserved, self.worker.prefixes
        for what in ("asked", "found", "tokens", "kept"):
            load[f"prefix_{what}"] = {name: counts[what] for name, counts in prefixes.items()}
        body = self.metrics.expose(num_open=self.admission.num_open, load=load)
        return web.Response(body=body, headers={"Content-Type": metrics_lib.CONTENT_TYPE})

    async def list_models(self, _: web.Request) -> web.Response:
        """All models, the default first."""
        return web.json_response({"object": "list", "data": [self._model(each) for each in self.models.values()]})

    async def describe_model(self, request: web.Request) -> web.Response:
        """One model."""
        return web.json_response(self._model(self.find(request.match_info["name"])))

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Continues a text."""
        return await self._generate(request, request_lib.read_completion)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Answers a conversation."""
        return await self._generate(request, request_lib.read_chat)

    async def score(self, request: web.Request) -> web.Response:
        """P(tag) after every token of a text, without generating."""
        parsed = request_lib.read_score(await self._read(request))
        model = self.find(parsed.model)
        with self._admitted(request):
            try:
                tokens = await asyncio.to_thread(model.encode, parsed.input, is_chat=False)
            except ValueError as error:
                raise ApiError(400, str(error), param="input") from None
            most = min(self.limits.score_tokens, model.config.max_seq_len)
            if len(tokens) > most:
                raise ApiError(
                    400,
                    f"input has {len(tokens)} tokens: want at most {most}",
                    param="input",
                    code="context_length_exceeded",
                )
            try:
                async with asyncio.timeout(self.limits.request_seconds):
                    pieces = await self.worker.call(lambda: model.score(tokens))
                    # A text's tokens: what the model's texts begin with isn't the caller's.
                    pieces = pieces[model.num_begin_ids if isinstance(parsed.input, str) and parsed.input else 0 :]
            except TimeoutError:
                raise timed_out("the time for a request passed before its scores") from None
        self.metrics.prompt_tokens.labels(model.name).inc(len(tokens))
        log.info("score: model %s, %d tokens", model.name, len(tokens))

        def reply() -> str:
            return encode(
                {
                    "object": "safelm.score",
                    "model": model.name,
                    "tokens": [describe_piece(piece) for piece in pieces],
                    "summary": summarize([piece.tag_prob for piece in pieces]),
                    "usage": {"prompt_tokens": len(tokens), "total_tokens": len(tokens)},
                }
            )

        text = await self._build(reply, is_large=len(pieces) > _MANY_TOKENS)
        return web.Response(text=text, content_type="application/json")

    @contextlib.contextmanager
    def _admitted(self, request: web.Request, num_choices: int = 1) -> Iterator[None]:
        """Context manager that counts a request as being answered and protects its connection."""
        assert isinstance(request.protocol, Connection)
        with self.admission.enter(num_choices), request.protocol.answered():
            yield

    async def _build(self, reply: Callable[[], T], *, is_large: bool) -> T:
        """Builds the reply; a large one off the event loop, one at a time."""
        if not is_large:
            return reply()
        async with self._large_replies:
            return await asyncio.to_thread(reply)

    async def _generate(self, request: web.Request, read: Reader) -> web.StreamResponse:
        began = time.monotonic()
        deadline = asyncio.get_running_loop().time() + self.limits.request_seconds
        parsed = read(await self._read(request), self.limits, default_method=self.default_method)
        model = self.find(parsed.model)
        choices = parsed.choices()
        with self._admitted(request, len(choices)):
            prepare = functools.partial(RunningGeneration.prepare, model, limits=self.limits)
            generations = [await prepare(request=each) for each in choices]
            self.shapes.take(parsed.steering.method)
            try:
                if parsed.stream:
                    return await self._stream(request, generations, deadline)
                await self._complete(generations, deadline)
                num_tokens = sum(len(each.pieces) + len(each.echoed) for each in generations)
                is_large = parsed.steering.want_trace or num_tokens > _MANY_TOKENS
                reply = await self._build(Replies(generations).whole, is_large=is_large)
                return web.Response(text=reply, content_type="application/json")
            finally:
                for each in generations:
                    self._account(each, began)

    async def _complete(self, generations: Sequence[RunningGeneration], deadline: float) -> None:
        """Runs generations to their end; the first failure cancels the others."""

        async def complete(generation: RunningGeneration) -> None:
            async for _ in generation.chunks(self.worker, deadline=deadline):
                pass
            await generation.finish(self.worker, deadline=deadline)

        tasks = [asyncio.ensure_future(complete(each)) for each in generations]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _stream(
        self, request: web.Request, generations: Sequence[RunningGeneration], deadline: float
    ) -> web.StreamResponse:
        """Sends server-sent events. A failure before the first event still gets its own HTTP status."""
        replies = Replies(generations)
        is_large = generations[0].request.steering.want_trace
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
                "X-Content-Type-Options": "nosniff",
            }
        )
        streams = [each.streamed(self.worker, deadline=deadline) for each in generations]
        try:
            async with contextlib.aclosing(merged(streams)) as chunks:
                async for index, chunk in chunks:
                    if not response.prepared:
                        await response.prepare(request)
                    if chunk is None:
                        ending = functools.partial(replies.ending, index)
                        await self._send(request, response, await self._build(ending, is_large=is_large))
                    else:
                        await self._send(request, response, replies.chunk(chunk, index))
            for event in [*replies.usage(), "[DONE]"]:
                await self._send(request, response, event)
        except Exception as error:
            if not response.prepared or isinstance(error, ConnectionError):
                raise
            if not isinstance(error, ApiError):
                log_defect("a stream failed", error)
                error = ApiError(500, "a defect of the server")
            await self._send(request, response, encode(error.body()))
        return response

    async def _send(self, request: web.Request, response: web.StreamResponse, data: str) -> None:
        """Sends one event."""
        async with patience(request, self.limits.body_seconds):
            await response.write(f"data: {data}\n\n".encode())

    async def _read(self, request: web.Request) -> dict[str, Any]:
        return await read_body(request, most_bytes=self.limits.body_bytes, seconds=self.limits.body_seconds)

    def find(self, name: str | None) -> ServedModel:
        """The model of a name, the first for None. Raises ApiError if there is none."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise ApiError(
                404, f"model {name[:80]!r}: want one of {', '.join(self.models)}", param="model", code="model_not_found"
            )
        return self.models[name]

    def _model(self, model: ServedModel) -> dict[str, Any]:
        limits = self.limits
        return {
            "id": model.name,
            "object": "model",
            "created": _STARTED,
            "owned_by": "safelm",
            "safelm": {
                "context": model.config.max_seq_len,
                "parameters": model.config.num_params,
                "methods": list(METHODS),
                "default_method": self.default_method,
                "saw_tag": model.saw_tag,
                "vocabulary": model.tokenizer.hash,
                "limits": {name: getattr(limits, name) for name in _TOLD_LIMITS},
            },
        }

    def _account(self, generation: RunningGeneration, began: float) -> None:
        """Updates metrics and log after a generation, however it ended, with ids, counts and times only."""
        model, method = generation.model.name, method_name(generation.engine_request.method)
        stopped_by = generation.stopped_by or "cancelled"
        self.metrics.prompt_tokens.labels(model).inc(generation.num_prompt_tokens)
        self.metrics.new_tokens.labels(model, method).inc(generation.num_tokens)
        self.metrics.ended.labels(model, method, stopped_by).inc()
        if generation.first_token_at is not None:
            self.metrics.first_token_seconds.labels(model, method).observe(generation.first_token_at - began)
        if generation.pieces and generation.pieces[0].tag_prob is not None:
            self.metrics.max_tag_prob.labels(model, method).observe(max(each.tag_prob for each in generation.pieces))
        log.info(
            "generation: model %s, %s, %d prompt tokens, %d new, ended by %s, %.3f s",
            model,
            method,
            generation.num_prompt_tokens,
            generation.num_tokens,
            stopped_by,
            time.monotonic() - began,
        )


_TOLD_LIMITS = ("prompt_tokens", "score_tokens", "new_tokens", "choices", "beams", "candidates")
