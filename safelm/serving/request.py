"""Parses and checks bodies of `/v1/completions`, `/v1/chat/completions` and `/v1/safelm/score`."""

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any

from safelm.inference.adjustments import NEUTRAL, Adjustment
from safelm.serving.constraint_fields import Schema, read_adjustment, read_response_format
from safelm.serving.errors import ApiError
from safelm.serving.fields import Fields
from safelm.serving.limits import Limits
from safelm.serving.method_fields import Steering, read_steering
from safelm.serving.output_fields import Output, read_chat_output, read_completion_output, read_prompts, read_text
from safelm.text import chat_template

_MOST_STOPS, _LONGEST_STOP = 8, 200  # strings, characters
_MOST_MESSAGES = 500
_DEFAULT_TOKENS = 16  # of OpenAI's /v1/completions
_SEED_STEP = 0x9E3779B1  # between a prompt's samples
Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """A request for continuations.

    Attributes:
      model: its name; None for the server's first.
      prompt: a text, token ids, or the messages of a chat.
      max_tokens: None for as many as the server and the context allow; 0 only where the prompt is echoed.
      seed: of sampling; drawn at random if the request has none.
      include_usage: whether to send token counts at the end of a stream.
      template_kwargs: further variables of the chat template.
      adjustment: of the scores by which tokens are chosen.
      schema: a JSON schema that the text keeps to; None for any text.
      more_prompts: prompts to continue beside the first.
      sample: which of its prompt's samples this is.
    """

    model: str | None
    prompt: str | tuple[int, ...] | tuple[Message, ...]
    is_chat: bool
    steering: Steering
    max_tokens: int | None
    stop: tuple[str, ...]
    seed: int
    stream: bool
    include_usage: bool
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    output: Output = dataclasses.field(default_factory=Output)
    adjustment: Adjustment = NEUTRAL
    schema: Schema | None = None
    more_prompts: tuple[str | tuple[int, ...], ...] = ()
    sample: int = 0

    @property
    def prompt_field(self) -> str:
        """The name that the prompt has in the request."""
        return "messages" if self.is_chat else "prompt"

    def choices(self) -> list["GenerationRequest"]:
        """A request for each text of the reply, in its order: every prompt's samples together, each with its seed."""
        return [
            dataclasses.replace(
                self, prompt=prompt, more_prompts=(), sample=sample, seed=(self.seed + sample * _SEED_STEP) % 2**31
            )
            for prompt in (self.prompt, *self.more_prompts)
            for sample in range(self.output.num_samples)
        ]


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
    """A text (or token ids) whose tokens are scored by P(tag)."""

    model: str | None
    input: str | tuple[int, ...]


def read_completion(body: Mapping[str, Any], limits: Limits, *, default_method: str) -> GenerationRequest:
    """Parses a body of `/v1/completions`. Raises ApiError naming a field that is wrong, unknown or unsupported."""
    fields = Fields(dict(body))
    first, *more = read_prompts(fields, "prompt", most=limits.choices)
    output = read_completion_output(fields, num_prompts=1 + len(more), most_choices=limits.choices)
    fields.neutral("suffix", "")
    max_tokens = fields.integer("max_tokens", 0 if output.echo else 1, limits.new_tokens)
    return _rest(
        fields,
        limits,
        default_method,
        prompt=first,
        more_prompts=tuple(more),
        output=output,
        is_chat=False,
        max_tokens=min(_DEFAULT_TOKENS, limits.new_tokens) if max_tokens is None else max_tokens,
    )


def read_chat(body: Mapping[str, Any], limits: Limits, *, default_method: str) -> GenerationRequest:
    """Parses a body of `/v1/chat/completions`. Raises ApiError naming a field that is wrong, unknown or unsupported."""
    fields = Fields(dict(body))
    messages = _messages(fields)
    old, new = (fields.integer(name, 1, limits.new_tokens) for name in ("max_tokens", "max_completion_tokens"))
    if old is not None and new is not None and old != new:
        raise ApiError(400, f"max_tokens={old} and max_completion_tokens={new}: want one of them", param="max_tokens")
    output = read_chat_output(fields, most_choices=limits.choices)
    fields.neutral("tools", [])
    fields.neutral("functions", [])
    fields.neutral("tool_choice", "none", "auto")
    fields.neutral("function_call", "none", "auto")
    fields.neutral("parallel_tool_calls", False, True)
    fields.neutral("modalities", ["text"])
    fields.neutral("store", False)
    for name in ("reasoning_effort", "verbosity", "audio", "prediction", "web_search_options"):
        fields.neutral(name)
    kwargs = _template_kwargs(fields)
    return _rest(
        fields,
        limits,
        default_method,
        prompt=messages,
        output=output,
        is_chat=True,
        max_tokens=new or old,
        template_kwargs=kwargs,
    )


def read_score(body: Mapping[str, Any]) -> ScoreRequest:
    """Parses a body of `/v1/safelm/score`."""
    fields = Fields(dict(body))
    request = ScoreRequest(model=fields.text("model"), input=read_prompts(fields, "input")[0])
    fields.refuse_rest()
    return request


def _rest(fields: Fields, limits: Limits, default_method: str, **known: Any) -> GenerationRequest:
    """The fields that both kinds of request share."""
    steering = read_steering(fields, limits, default_method=default_method)
    for name in ("user", "safety_identifier", "service_tier", "prompt_cache_key"):  # nothing depends on them
        fields.text(name)
    fields.object("metadata")
    stream = fields.flag("stream")
    if stream:
        known["output"].refuse_in_stream()
    if steering.want_trace and len(known.get("more_prompts", ())) + known["output"].num_samples > 1:
        raise ApiError(400, "safelm.want_trace: only with one choice", param="safelm.want_trace")
    options = fields.object("stream_options")
    include_usage = options.flag("include_usage")
    options.flag("include_obfuscation")
    options.refuse_rest()
    seed = fields.integer("seed", -(2**63), 2**64 - 1)
    request = GenerationRequest(
        model=fields.text("model"),
        steering=steering,
        adjustment=read_adjustment(fields, steering.method),
        schema=read_response_format(fields, steering.method),
        stop=_stop(fields),
        seed=secrets.randbits(31) if seed is None else seed % 2**31,
        stream=stream,
        include_usage=include_usage,
        **known,
    )
    fields.refuse_rest()
    return request


def _messages(fields: Fields) -> tuple[Message, ...]:
    value = fields.take("messages")
    if not isinstance(value, list) or not 1 <= len(value) <= _MOST_MESSAGES:
        raise ApiError(400, f"messages: want an array of 1 to {_MOST_MESSAGES} messages", param="messages")
    return tuple(_message(each, f"messages[{index}]") for index, each in enumerate(value))


def _template_kwargs(fields: Fields) -> dict[str, Any]:
    name = "chat_template_kwargs"
    value = fields.take(name)
    try:
        return chat_template.check_kwargs({} if value is None else value, name)
    except ValueError as error:
        raise ApiError(400, str(error), param=name) from None


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise ApiError(400, f"{where}: want an object with role and content", param=where)
    fields = Fields(value, prefix=f"{where}.")
    role = fields.choice("role", ("system", "developer", "user", "assistant"))
    if role is None:
        raise ApiError(400, f"{where}.role is missing", param=f"{where}.role")
    content = fields.take("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise ApiError(400, f"{where}.content: want a string or an array of text parts", param=f"{where}.content")
    fields.text("name")
    fields.text("refusal")  # of replies that are sent back as history
    for name in ("tool_calls", "annotations"):
        fields.neutral(name, [])
    for name in ("function_call", "audio"):
        fields.neutral(name)
    fields.refuse_rest()
    return {"role": "system" if role == "developer" else role, "content": read_text(content, f"{where}.content")}


def _part(value: Any, where: str) -> str:
    if not isinstance(value, dict) or value.get("type") != "text" or not isinstance(value.get("text"), str):
        raise ApiError(400, f"{where}: want an object with type 'text' and a text", param=where)
    return value["text"]


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    strings = [value] if isinstance(value, str) else [] if value is None else value
    if (
        not isinstance(strings, list)
        or len(strings) > _MOST_STOPS
        or not all(isinstance(each, str) and 1 <= len(each) <= _LONGEST_STOP for each in strings)
    ):
        raise ApiError(
            400, f"stop: want a string or up to {_MOST_STOPS} strings of 1 to {_LONGEST_STOP} characters", param="stop"
        )
    return tuple(strings)
