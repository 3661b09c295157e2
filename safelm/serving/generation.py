"""Runs one request: prompt to ids, ids to the engine, the engine's tokens to text until something ends it."""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from safelm.inference.planning import planner
from safelm.inference.prompts import TooLongError
from safelm.inference.requests import EngineRequest, Update
from safelm.inference.token_log_probs import compile_log_probs, token_log_probs
from safelm.inference.token_mask import MakeMask
from safelm.serving.constraint_fields import Schema
from safelm.serving.errors import ApiError, timed_out
from safelm.serving.limits import Limits
from safelm.serving.log_probs import ScoredText
from safelm.serving.models import ServedModel
from safelm.serving.request import GenerationRequest
from safelm.serving.text_stream import Piece, TextStream
from safelm.serving.worker import EngineWorker

log = logging.getLogger(__name__)
_FIRST_SCORED = 4  # tokens of the first piece of a stream with log-probs
_LONG_TEXT = 4096  # characters, from which a prompt is encoded off the event loop


@dataclasses.dataclass(frozen=True)
class Chunk:
    """New text, the tokens that it completes and, if they were asked for, their log-probs."""

    text: str
    pieces: Sequence[Piece]
    scored: ScoredText | None = None


class RunningGeneration:
    """A checked request to a model; `chunks` runs it, and the other attributes are final once it has ended.

    Attributes:
      num_prompt_tokens: number of prompt tokens.
      num_tokens: number of new tokens, including the ending token, those cut off by a stop string, and the token with
        which a knob made the answer begin.
      stopped_by: "" while it runs and if the client went away; "eos", "length"; "stop" (a stop string); "tag" (the tag
        was chosen); "threshold" (P(tag) above `stop_above`); "withheld" (a knob or the method said something else);
        "time" (the server's limit; the reply is what there was by then); "error".
      log_prob: log-probability of all new tokens under the model (nats); None if the server ended the text itself
        or it was withheld.
      first_token_at: time.monotonic() of the first text.
      echoed: the prompt's tokens, if they were asked for; without those that the model's texts begin with.
      scored: the reply's tokens with their log-probs, if they were asked for.
    """

    def __init__(self, model: ServedModel, request: GenerationRequest, engine_request: EngineRequest):
        self.model, self.request, self.engine_request = model, request, engine_request
        self.num_prompt_tokens, self.num_tokens = len(engine_request.prompt), 0
        self.stopped_by, self.log_prob = "", None
        self.first_token_at: float | None = None
        self.pieces: list[Piece] = []
        self.trace: Any = None
        self.echoed: list[Piece] = []
        self.scored: ScoredText | None = None
        self._ending: int | None = None  # the token that ended the text
        self._text = TextStream(model.tokenizer, request.stop)

    @classmethod
    async def prepare(cls, model: ServedModel, request: GenerationRequest, limits: Limits) -> "RunningGeneration":
        """Encodes the prompt. Raises ApiError if it is too long or the model can't take it."""
        kwargs = request.template_kwargs
        encode = functools.partial(model.encode, request.prompt, is_chat=request.is_chat, template_kwargs=kwargs)
        try:
            is_slow = request.is_chat or len(request.prompt) > _LONG_TEXT  # a chat's template may do anything
            ids = await asyncio.to_thread(encode) if is_slow else encode()
        except ValueError as error:
            raise ApiError(400, str(error), param=request.prompt_field) from None
        room = model.config.max_seq_len - len(ids)
        max_tokens = min(limits.new_tokens, room) if request.max_tokens is None else request.max_tokens
        longest = min(limits.prompt_tokens, model.config.max_seq_len - 1)
        if len(ids) > longest:
            raise _too_long(request, f"the prompt has {len(ids)} tokens: want at most {longest}")
        if max_tokens > room:
            raise _too_long(
                request,
                f"the prompt's {len(ids)} tokens and max_tokens={max_tokens} make {len(ids) + max_tokens}, "
                f"more than the model's context of {model.config.max_seq_len}",
            )
        foreign = next((token for token, _ in request.adjustment.logit_bias if token >= model.config.vocab_size), None)
        if foreign is not None:
            message = f"logit_bias: id {foreign} is not in the model's vocabulary of {model.config.vocab_size}"
            raise ApiError(400, message, param="logit_bias")
        steering, method = request.steering, model.steered(request.steering.method)
        try:
            plan = planner(model.config, model.tokenizer, method, is_chat=request.is_chat, knob=model.knob)
        except ValueError as error:
            raise ApiError(400, str(error), param="safelm.method") from None
        engine_request = EngineRequest(
            prompt=tuple(ids),
            method=method,
            max_new_tokens=max_tokens,
            end_ids=model.end_ids,
            seed=request.seed,
            want_trace=steering.want_trace,
            mask=await _mask(model, request.schema),
            adjustment=request.adjustment,
            plan=plan,
        )
        return cls(model, request, engine_request)

    async def chunks(self, worker: EngineWorker, *, deadline: float) -> AsyncIterator[Chunk]:
        """Yields the text as it becomes certain; the last chunk completes it.

        Args:
          deadline: on the event loop's clock.

        Raises ApiError if the engine refuses the request or fails, or if the deadline passes before the first token.
        """
        if not self.engine_request.max_new_tokens:
            self.stopped_by = "length"
            return
        async with contextlib.aclosing(worker.generate(self.model.name, self.engine_request)) as updates:
            while not self.stopped_by:
                try:
                    async with asyncio.timeout_at(deadline):
                        update = await anext(updates)
                except TimeoutError:
                    if not self.num_tokens:
                        raise timed_out("the time for a request passed before its first token") from None
                    self.stopped_by = "time"
                    break
                except TooLongError as error:
                    raise _too_long(self.request, str(error)) from None
                except ValueError as error:
                    raise ApiError(400, str(error), param="safelm.method") from None
                except RuntimeError as error:
                    self.stopped_by = "error"
                    raise ApiError(500, str(error), code="engine_failed") from None
                self._take(update)
                if not self.stopped_by and (chunk := self._release()):
                    yield chunk
        self._text.finish()
        if chunk := self._release():
            yield chunk

    async def streamed(self, worker: EngineWorker, *, deadline: float) -> AsyncIterator[Chunk]:
        """`chunks` for a stream; with log-probs in pieces of 4, 8, 16, .. tokens, each of which takes a forward."""
        async with contextlib.aclosing(self.chunks(worker, deadline=deadline)) as chunks:
            if self.request.output.alternatives is None:
                async for chunk in chunks:
                    yield chunk
                return
            text, told, wanted = "", 0, _FIRST_SCORED
            async for chunk in chunks:
                text += chunk.text
                if len(self.pieces) - told >= wanted:
                    yield await self._scored_chunk(worker, text, told, deadline=deadline)
                    text, told, wanted = "", len(self.pieces), 2 * wanted
        rest = await self._scored_chunk(worker, text, told, deadline=deadline, is_last=True)
        if rest.text or rest.scored.pieces:
            yield rest

    async def _scored_chunk(
        self, worker: EngineWorker, text: str, told: int, *, deadline: float, is_last: bool = False
    ) -> Chunk:
        """The text of the pieces from the `told`-th on, with their log-probs."""
        new, before = self.pieces[told:], self.pieces[:told]
        scored = await self._scores(worker, new, len(self.engine_request.prompt) + told, deadline, is_last=is_last)
        offset = sum(len(piece.text) for piece in before)
        return Chunk(text, new, dataclasses.replace(scored, offset=offset))

    async def finish(self, worker: EngineWorker, *, deadline: float) -> None:
        """Adds the prompt's tokens and log-probs, as requested, once the text has ended.

        Raises ApiError if the deadline passes.
        """
        output, prompt = self.request.output, self.engine_request.prompt
        if output.echo:
            num_own = self.model.num_begin_ids if isinstance(self.request.prompt, str) and self.request.prompt else 0
            self.echoed = self.model.pieces(prompt[num_own:])
        if output.alternatives is not None:
            pieces = [*self.echoed, *self.pieces]
            first = len(prompt) - len(self.echoed)
            self.scored = await self._scores(worker, pieces, first, deadline, is_last=True)

    async def _scores(
        self, worker: EngineWorker, pieces: Sequence[Piece], first: int, deadline: float, *, is_last: bool
    ) -> ScoredText:
        """The log-probs of some pieces, the first of which is the `first`-th token of prompt and text."""
        new = [piece.id for piece in self.pieces]
        ended = [self._ending] if is_last and self._ending is not None else []
        config, params, tokens = self.model.config, self.model.params, [*self.engine_request.prompt, *new, *ended]
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.to_thread(compile_log_probs, config, params, len(tokens))
                scores = await worker.call(lambda: token_log_probs(config, params, tokens))
        except TimeoutError:
            raise timed_out("the time for a request passed before its log-probs") from None
        if not self.request.is_chat:  # whose clients take a reply of one token to have one entry
            shown = (Piece(token, "", None, self.model.tokenizer.special_token(token)) for token in ended)
            pieces = [*pieces, *shown]
        return ScoredText(self.model.tokenizer, pieces, scores, first, self.request.output.alternatives)

    def _take(self, update: Update) -> None:
        if update.finished in ("cancelled", "error"):
            self.stopped_by = "error"
            reason = update.error or update.finished
            told = "its token mask failed" if self.engine_request.mask else reason  # a mask's error may show the text
            log.error("generation: model %s: the engine ended a request: %s", self.model.name, told)
            raise ApiError(500, f"the engine ended the request ({reason})", code="engine_failed")
        stop_above = self.request.steering.stop_above
        self.num_tokens += update.untold
        num_before = self.num_tokens
        for token, tag_prob in zip(update.tokens, update.tag_probs or [None] * len(update.tokens), strict=True):
            self.num_tokens += 1
            is_last = bool(update.finished) and self.num_tokens - num_before == len(update.tokens)
            if tag_prob is not None and tag_prob > stop_above:
                self.stopped_by = "threshold"
            elif token in self.engine_request.end_ids:
                self.stopped_by = "eos"
            elif update.finished == "tag" and is_last:
                self.stopped_by = "tag"
            else:
                self._text.add(token, tag_prob)
                self.stopped_by = "stop" if self._text.is_stopped else ""
            if self.stopped_by:
                self._ending = token if self.stopped_by in ("eos", "tag") else None
                break
        if update.finished:
            self.stopped_by = self.stopped_by or update.finished
            self.trace = update.trace
            if self.stopped_by == update.finished and self.stopped_by != "withheld":
                self.log_prob = update.log_prob

    def _release(self) -> Chunk | None:
        text, pieces = self._text.release()
        self.pieces += pieces
        if (text or pieces) and self.first_token_at is None:
            self.first_token_at = time.monotonic()
        return Chunk(text, pieces) if text or pieces else None


async def _mask(model: ServedModel, schema: Schema | None) -> MakeMask | None:
    """Makes masks of texts that keep to a JSON schema. Raises ApiError naming the parts that aren't supported."""
    if schema is None:
        return None
    try:
        grammar = await asyncio.to_thread(model.json_grammar, schema)
    except ModuleNotFoundError:
        message = "response_format: this server has no llguidance: scripts/install.sh scoring"
        raise ApiError(400, message, param="response_format", code="unsupported_field") from None
    except ValueError as error:
        raise ApiError(400, f"response_format: {str(error)[:200]}", param="response_format") from None
    return grammar.start


def _too_long(request: GenerationRequest, message: str) -> ApiError:
    return ApiError(400, message, param=request.prompt_field, code="context_length_exceeded")
