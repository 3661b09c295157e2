"""The checkpoints that are served, by name: what each knows of text, chats and P(tag)."""

import dataclasses
from collections.abc import Sequence

import jax

from safelm.formats.sources import read_model, saw_tag
from safelm.inference import tag_probability
from safelm.lm import LanguageModel
from safelm.serving.errors import shown
from safelm.serving.request import Message
from safelm.serving.text_stream import Piece, TextStream
from safelm.text import prompting


@dataclasses.dataclass(frozen=True)
class ServedModel(LanguageModel):
    """A model ready to be asked.

    Attributes:
      name: clients ask for it by this.
      saw_tag: whether its P(tag) means something; None if that isn't known.
    """

    name: str
    saw_tag: bool | None = None

    def encode(self, prompt: str | tuple[int, ...] | tuple[Message, ...], *, is_chat: bool) -> list[int]:
        """The ids of a prompt, never none. A prompt of ids stays as it is.

        Raises ValueError: the vocabulary knows no chat, an id outside of it, or messages its template doesn't take.
        """
        if is_chat:
            return prompting.chat_prompt(self.tokenizer, prompt)
        if isinstance(prompt, str):
            return prompting.text_prompt(self.tokenizer, prompt)
        foreign = next((token for token in prompt if not 0 <= token < self.config.vocab_size), None)
        if foreign is not None:
            raise ValueError(f"id {shown(foreign)} is not in the model's vocabulary of {self.config.vocab_size}")
        return list(prompt) or prompting.text_prompt(self.tokenizer, "")

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Those that end a continuation."""
        return self.tokenizer.conventions.end_ids

    @property
    def num_begin_ids(self) -> int:
        """How many ids `encode` puts in front of a text."""
        return len(self.tokenizer.conventions.begin_ids)

    def score(self, tokens: Sequence[int]) -> list[Piece]:
        """Every token with its share of the text and P(tag | text up to and with it). Computes: for the worker."""
        (probs_T,) = tag_probability(self.config, self.params, [tokens], harm_tag_id=self.tokenizer.harm_tag_id)
        text = TextStream(self.tokenizer)
        for token, tag_prob in zip(tokens, probs_T, strict=True):
            text.add(token, float(tag_prob))
        text.finish()
        return text.release()[1]


def load(name: str, source: str, *, dtype: str = "") -> ServedModel:
    """Reads a checkpoint of ours, a Hugging Face folder or a GGUF file; ValueError or OSError if it can't be."""
    config, params, tokenizer = read_model(source)
    config = dataclasses.replace(config, dtype=dtype or config.dtype, attention="xla", remat="none")
    return ServedModel(config, jax.device_put(params), tokenizer, name, saw_tag(source))
