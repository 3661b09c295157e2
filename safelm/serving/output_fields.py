"""Reads the fields of a request that say how many texts to write and what to report about their tokens."""

import dataclasses

from safelm.inference.token_log_probs import MOST_ALTERNATIVES
from safelm.serving.errors import ApiError
from safelm.serving.fields import Fields

Prompt = str | tuple[int, ...]


def read_prompts(fields: Fields, name: str, *, most: int = 1) -> tuple[Prompt, ...]:
    """A field of one prompt or several, each a string or token ids."""
    value = fields.take(name)
    if value is None:
        raise ApiError(400, f"{name} is missing: want a string or an array of token ids", param=name)
    if isinstance(value, list) and value and all(isinstance(each, str | list) for each in value):
        if len(value) > most:
            raise ApiError(400, f"{name} has {len(value)} prompts: want at most {most}", param=name)
        return tuple(_prompt(each, name) for each in value)
    return (_prompt(value, name),)


def read_text(value: str, name: str) -> str:
    """The text. Raises ApiError for lone surrogates, which JSON can spell and UTF-8 can't encode."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ApiError(
            400, f"{name}: a lone surrogate at character {error.start}, which no text can hold", param=name
        ) from None
    return value


@dataclasses.dataclass(frozen=True)
class Output:
    """What a reply holds beyond the new text.

    Attributes:
      num_samples: texts for each prompt.
      alternatives: the likeliest tokens to report at every place; None for no log-probs at all.
      echo: whether the prompt precedes the new text, in the log-probs also.
    """

    num_samples: int = 1
    alternatives: int | None = None
    echo: bool = False

    def refuse_in_stream(self) -> None:
        """Raises ApiError for what only a whole reply has."""
        if self.echo:
            raise ApiError(400, "echo=true: not in a stream; want stream=false", param="echo")


def read_completion_output(fields: Fields, *, num_prompts: int, most_choices: int) -> Output:
    """Takes `n`, `best_of`, `logprobs` and `echo` of `/v1/completions`."""
    num_samples = _read_n(fields, num_prompts, most_choices)
    best_of = fields.integer("best_of", 1)
    if best_of is not None and best_of != num_samples:
        raise ApiError(
            400,
            f"best_of is not supported: want it absent or equal to n={num_samples}",
            param="best_of",
            code="unsupported_field",
        )
    return Output(num_samples, fields.integer("logprobs", 0, MOST_ALTERNATIVES), fields.flag("echo"))


def read_chat_output(fields: Fields, *, most_choices: int) -> Output:
    """Takes `n`, `logprobs` and `top_logprobs` of `/v1/chat/completions`."""
    num_samples = _read_n(fields, 1, most_choices)
    wants_log_probs = fields.flag("logprobs")
    alternatives = fields.integer("top_logprobs", 0, MOST_ALTERNATIVES)
    if alternatives and not wants_log_probs:
        raise ApiError(400, f"top_logprobs={alternatives}: want logprobs=true with it", param="top_logprobs")
    return Output(num_samples, (alternatives or 0) if wants_log_probs else None)


def _read_n(fields: Fields, num_prompts: int, most_choices: int) -> int:
    num_samples = fields.integer("n", 1, most_choices) or 1
    if num_prompts * num_samples > most_choices:
        raise ApiError(400, f"n={num_samples}: with {num_prompts} prompts more than {most_choices} choices", param="n")
    return num_samples


def _prompt(value: object, name: str) -> Prompt:
    if isinstance(value, str):
        return read_text(value, name)
    if isinstance(value, list) and all(type(token) is int for token in value):
        return tuple(value)
    raise ApiError(400, f"{name}: want a string or an array of token ids", param=name)
