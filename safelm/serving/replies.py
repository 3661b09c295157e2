"""Builds the objects of the OpenAI API, with P(tag) in an extra `safelm` object."""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from safelm.inference.methods import METHODS, Method, described
from safelm.serving.generation import Chunk, RunningGeneration
from safelm.serving.numbers import rounded, summarize
from safelm.serving.text_stream import Piece
from safelm.serving.trace import encode_trace

_FINISH = {"eos": "stop", "stop": "stop", "length": "length", "time": "length"}  # else content_filter
_METHOD_NAMES = {kind: name for name, kind in METHODS.items()}


class Replies:
    """Writes the reply of generations: `whole`, or `chunk` for each chunk, `ending` of each, and `usage`."""

    def __init__(self, generations: Sequence[RunningGeneration]):
        self._generations = generations
        self._generation, self._is_chat = generations[0], generations[0].request.is_chat
        self._begun: set[int] = set()
        self.id = f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self) -> str:
        """The reply of a request without `stream`, as JSON; of several choices each has its own `safelm`."""
        choices = [self._choice(index, each) for index, each in enumerate(self._generations)]
        reply = self._object("chat.completion" if self._is_chat else "text_completion", choices)
        reply |= {"usage": self._usage()}
        if len(choices) == 1:
            return self._encode(reply, self._own(self._generation))
        for choice, generation in zip(choices, self._generations, strict=True):
            choice["safelm"] = self._own(generation)
        return encode(reply)

    def _choice(self, index: int, generation: RunningGeneration) -> dict[str, Any]:
        text, scored = "".join(piece.text for piece in [*generation.echoed, *generation.pieces]), generation.scored
        finish = finish_reason(generation.stopped_by)
        if self._is_chat:
            message = {"role": "assistant", "content": text, "refusal": None}
            return _choice({"message": message}, finish, index, scored and scored.for_chat())
        return _choice({"text": text}, finish, index, scored and scored.for_completion())

    def _own(self, generation: RunningGeneration) -> dict[str, Any]:
        return {"tokens": [describe_piece(piece) for piece in generation.pieces]} | _outcome(generation)

    def chunk(self, chunk: Chunk, index: int = 0) -> str:
        """One event of a stream, as JSON."""
        tokens = [describe_piece(each) for each in chunk.pieces]
        scored = chunk.scored
        log_probs = scored and (scored.for_chat() if self._is_chat else scored.for_completion())
        return encode(self._event(chunk.text, None, index, log_probs) | {"safelm": {"tokens": tokens}})

    def ending(self, index: int = 0) -> str:
        """The last event of a choice: why its text ended."""
        generation = self._generations[index]
        return self._encode(self._event("", finish_reason(generation.stopped_by), index), _outcome(generation))

    def usage(self) -> list[str]:
        """An event with token counts, if requested."""
        if not self._generation.request.include_usage:
            return []
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return [encode(self._object(kind, []) | {"usage": self._usage()})]

    def _encode(self, reply: dict[str, Any], outcome: dict[str, Any]) -> str:
        """JSON with the outcome under `safelm` and, if requested, the trace as its last entry."""
        text = encode(reply | {"safelm": outcome})
        if self._generation.request.steering.want_trace:
            trace = encode_trace(self._generation.trace, self._generation.model.tokenizer)
            text = f'{text[:-2]},"trace":{trace}}}}}'
        return text

    def _event(self, text: str, finish: str | None, index: int, log_probs: Any = None) -> dict[str, Any]:
        is_first = index not in self._begun
        self._begun.add(index)
        if self._is_chat:
            delta: dict[str, Any] = {"content": text} if text or is_first else {}
            kind, content = "chat.completion.chunk", {"delta": {"role": "assistant"} | delta if is_first else delta}
        else:
            kind, content = "text_completion", {"text": text}
        usage = {"usage": None} if self._generation.request.include_usage else {}
        return self._object(kind, [_choice(content, finish, index, log_probs)]) | usage

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = self._generation.model.name
        return {"id": self.id, "object": kind, "created": self._created, "model": name, "choices": choices}

    def _usage(self) -> dict[str, int]:
        prompt = sum(each.num_prompt_tokens for each in self._generations if not each.request.sample)
        new = sum(each.num_tokens for each in self._generations)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _choice(content: dict[str, Any], finish: str | None, index: int = 0, log_probs: Any = None) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": log_probs, "finish_reason": finish}


def _outcome(generation: RunningGeneration) -> dict[str, Any]:
    return {
        **describe_method(generation.engine_request.method),
        "stopped_by": generation.stopped_by,
        "summary": summarize([piece.tag_prob for piece in generation.pieces if piece.tag_prob is not None]),
        "log_prob": rounded(generation.log_prob),
    }


def encode(value: Any) -> str:
    """JSON without spaces."""
    return json.dumps(value, separators=(",", ":"))


def finish_reason(stopped_by: str) -> str:
    """OpenAI's name of the reason; a text ended because of P(tag) counts as cut by a content filter."""
    return _FINISH.get(stopped_by, "content_filter")


def describe_method(method: Method) -> dict[str, Any]:
    """The method's name and settings."""
    return {"method": method_name(method), "settings": described(method)}


def method_name(method: Method) -> str:
    """The method's name as requests spell it."""
    return _METHOD_NAMES[type(method)]


def describe_piece(piece: Piece) -> dict[str, Any]:
    """A token for a reply; `special` is there only for special tokens."""
    described: dict[str, Any] = {"id": piece.id, "text": piece.text}
    if piece.special is not None:
        described["special"] = piece.special
    return described | {"tag_prob": rounded(piece.tag_prob)}
