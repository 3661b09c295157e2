"""The served checkpoints by name, with their vocabulary, chat template and P(tag)."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from safelm.formats.sources import read_model, saw_tag
from safelm.inference import Knob, Method, SafeBeam, planner, tag_probability
from safelm.inference.grammar import Grammar, GrammarVocabulary
from safelm.inference.monitors import Monitor
from safelm.io import hub
from safelm.lm import LanguageModel
from safelm.safety.monitors.loading import load_monitor
from safelm.serving.errors import shown
from safelm.serving.request import Message
from safelm.serving.text_stream import Piece, TextStream
from safelm.text import prompting


@dataclasses.dataclass(frozen=True)
class ServedModel(LanguageModel):
    """A model ready for requests.

    Attributes:
      name: the name that clients ask for.
      saw_tag: whether it was trained with the tag, so that P(tag) means something; None if unknown.
      knob: how readily it refuses.
      monitor: what SafeBeam goes by in the place of P(tag).
    """

    name: str
    saw_tag: bool | None = None
    knob: Knob | None = None
    monitor: Monitor | None = None

    def steered(self, method: Method) -> Method:
        """The method, SafeBeam with the monitor."""
        is_monitored = self.monitor is not None and isinstance(method, SafeBeam)
        return dataclasses.replace(method, monitor=self.monitor) if is_monitored else method

    @property
    def watched_id(self) -> int:
        """The token whose probability stands beside every token: the harm tag, or the red flag of its knob."""
        flag_id = self.knob.bound(self.tokenizer).flag_id if self.knob else None
        return self.tokenizer.harm_tag_id if flag_id is None else flag_id

    def encode(
        self,
        prompt: str | tuple[int, ...] | tuple[Message, ...],
        *,
        is_chat: bool,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of a prompt, never empty. A prompt of ids is returned unchanged.

        Raises ValueError if the vocabulary has no chat template, an id is outside it, or the template refuses the
        messages.
        """
        if is_chat:
            return prompting.chat_prompt(self.tokenizer, prompt, template_kwargs=template_kwargs)
        if isinstance(prompt, str):
            return prompting.text_prompt(self.tokenizer, prompt)
        foreign = next((token for token in prompt if not 0 <= token < self.config.vocab_size), None)
        if foreign is not None:
            raise ValueError(f"id {shown(foreign)} is not in the model's vocabulary of {self.config.vocab_size}")
        return list(prompt) or prompting.text_prompt(self.tokenizer, "")

    @functools.cached_property
    def _grammar_vocabulary(self) -> GrammarVocabulary:
        return GrammarVocabulary(self.tokenizer, vocab_size=self.config.padded_vocab_size, end_ids=self.end_ids)

    def json_grammar(self, schema: Mapping[str, Any]) -> Grammar:
        """The JSON texts of a schema; the first call builds the vocabulary's part.

        Raises ValueError for a schema that isn't supported, ModuleNotFoundError if llguidance isn't installed.
        """
        return self._grammar_vocabulary.json_schema(schema)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a continuation."""
        return self.tokenizer.conventions.end_ids

    @property
    def num_begin_ids(self) -> int:
        """The number of ids that `encode` puts before a text."""
        return len(self.tokenizer.conventions.begin_ids)

    def score(self, tokens: Sequence[int]) -> list[Piece]:
        """Each token with its share of the text and P(tag | text up to and including it).

        Runs the model: call it in the worker.
        """
        (probs_T,) = tag_probability(self.config, self.params, [tokens], harm_tag_id=self.tokenizer.harm_tag_id)
        return self.pieces(tokens, probs_T.tolist())

    def pieces(self, tokens: Sequence[int], tag_probs: Sequence[float] | None = None) -> list[Piece]:
        """Each token with its share of the text, and its P(tag) if given."""
        text = TextStream(self.tokenizer)
        for token, tag_prob in zip(tokens, tag_probs or [None] * len(tokens), strict=True):
            text.add(token, tag_prob)
        text.finish()
        return text.release()[1]


def load_model(
    name: str,
    source: str,
    *,
    dtype: str = "",
    chat_template: str = "",
    template_kwargs: Mapping[str, Any] | None = None,
    knob: Knob | None = None,
    monitor: str = "",
) -> ServedModel:
    """Loads a model of any kind (`safelm.formats.sources`).

    Args:
      chat_template: a name or file that replaces its own template.
      template_kwargs: further variables of its chat template.
      knob: how readily it refuses.
      monitor: what SafeBeam goes by in the place of P(tag), as `generate --monitor` takes it.

    Raises ValueError or OSError if it can't be read, has no token that its knob needs, or its monitor is another
    model's or doesn't go with the knob.
    """
    source = hub.pinned(source)
    config, params, tokenizer = read_model(source, chat_template=chat_template)
    tokenizer = tokenizer.with_template_kwargs(template_kwargs or {})
    config = dataclasses.replace(config, dtype=dtype or config.dtype, attention="xla", remat="none")
    if knob is not None:
        knob.bound(tokenizer)
    served = ServedModel(config, jax.device_put(params), tokenizer, name, saw_tag(source), knob)
    if not monitor:
        return served
    loaded = load_monitor(monitor, served)
    try:
        planner(config, tokenizer, SafeBeam(monitor=loaded), knob=knob)  # whether they go together
    except ValueError as error:
        raise ValueError(f"--monitor={monitor}: {error}") from None
    return dataclasses.replace(served, monitor=loaded)
