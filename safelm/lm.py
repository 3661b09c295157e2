"""`LanguageModel`: a model with its vocabulary for use from Python; `safelm.load` reads one."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int

from safelm import inference
from safelm.formats.sources import read_model
from safelm.inference import Greedy, Knob, Method, monitors
from safelm.inference.monitors import Monitor
from safelm.inference.prompts import batches
from safelm.models import decoder
from safelm.models.config import ModelConfig
from safelm.text import prompting
from safelm.text.prompting import Messages
from safelm.text.tokenizer import Tokenizer

_GREEDY = Greedy()


@dataclasses.dataclass(frozen=True)
class Completion:
    """A prompt's continuation.

    Attributes:
      text: the new text.
      tokens: the new ids, including the one that ended the text, if any.
      logprob: log-probability of all new tokens under the model (nats), without temperature or filters; of a withheld
        one 0.
      tag_probs: P(tag | prompt and tokens up to and including this one), for every new token; of a withheld one none.
      stopped_by: "eos", "tag", "length" or, if a knob or a method put the text in place of the answer, "withheld".
    """

    text: str
    tokens: list[int]
    logprob: float
    tag_probs: list[float]
    stopped_by: str


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A decoder with its vocabulary.

    Attributes:
      config: sizes and numerics.
      params: the parameters, as `safelm.models.decoder` takes them.
      tokenizer: the vocabulary with the harm tag, and how the model's texts begin and end.
    """

    config: ModelConfig
    params: decoder.Params = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)

    @overload
    def generate(self, prompts: str, method: Method = ..., **settings: Any) -> Completion: ...
    @overload
    def generate(self, prompts: Sequence[str], method: Method = ..., **settings: Any) -> list[Completion]: ...

    def generate(
        self,
        prompts: str | Sequence[str],
        method: Method = _GREEDY,
        **settings: Any,
    ) -> Completion | list[Completion]:
        """Continues texts.

        Args:
          prompts: one text, or several; an empty text begins a document.
          method: `safelm.Greedy()`, `Sampling(...)`, `Beam(...)`, `SafeBeam(...)`, `TagPenalty(...)`, `AnyDepth(...)`
            or `SelfStop(...)`.
          **settings: those of `complete`, such as `max_new_tokens`, `seed` and `mesh`.

        Returns:
          A completion for one text, a list of them for several.

        Raises:
          ValueError: a prompt leaves no room for `max_new_tokens` in the model's context, or the method needs the harm
            tag and the vocabulary has none.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        found = self.complete([prompting.text_prompt(self.tokenizer, text) for text in texts], method, **settings)
        return found[0] if isinstance(prompts, str) else found

    def chat(
        self,
        messages: str | Messages,
        method: Method = _GREEDY,
        **settings: Any,
    ) -> Completion:
        """Answers a conversation in the model's own chat template (ChatML if it has none).

        Args:
          messages: dicts with "role" and "content", or one user's message as a string.
          method: as in `generate`.
          **settings: those of `complete`.

        Raises:
          ValueError: the vocabulary has no chat template, the template refuses the messages, or as in `generate`.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.complete([prompting.chat_prompt(self.tokenizer, messages)], method, is_chat=True, **settings)[0]

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        method: Method = _GREEDY,
        *,
        max_new_tokens: int = 64,
        seed: int = 0,
        batch_size: int = 64,
        weights: str = "",
        lookup_tokens: int = 0,
        mesh: Mesh | None = None,
        knob: Knob | None = None,
        is_chat: bool = False,
        show_progress: bool = False,
    ) -> list[Completion]:
        """Continues prompts given as ids of the vocabulary.

        Args:
          prompts: none of them empty.
          method: as in `generate`.
          max_new_tokens: the most tokens to add.
          seed: of sampling.
          batch_size: prompts decoded at once.
          weights: "float32", "bfloat16" or "int8"; "" for the model's own dtype.
          lookup_tokens: guessed from the text so far and checked at once: the same text, faster where it copies.
          mesh: splits weights and cache over its devices; None for the first device.
          knob: how readily it refuses (`safelm.read_knob`).
          is_chat: whether the prompts end where the assistant's turn begins.
          show_progress: whether to show a bar over prompts (only on a terminal).

        Raises:
          ValueError: as in `generate`, or an id is outside the vocabulary, or a mesh doesn't divide the model.
        """
        found = inference.generate(
            self.config,
            self.params,
            prompts,
            method,
            max_new_tokens=max_new_tokens,
            end_ids=self.tokenizer.conventions.end_ids,
            harm_tag_id=self.tokenizer.harm_tag_id,
            seed=seed,
            batch_size=batch_size,
            weights=weights,
            lookup_tokens=lookup_tokens,
            mesh=mesh,
            planner=inference.planner(self.config, self.tokenizer, method, is_chat=is_chat, knob=knob),
            show_progress=show_progress,
        )
        return [
            Completion(
                text=self.tokenizer.decode(each.text_tokens),
                tokens=each.tokens,
                logprob=each.logprob,
                tag_probs=each.tag_probs,
                stopped_by=each.stopped_by,
            )
            for each in found
        ]

    def tokens(self, text: str) -> list[str]:
        """The string of each of the text's T tokens; the methods below return one value for each."""
        return [self.tokenizer.decode([token]) for token in self.tokenizer.encode(text)]

    def tag_probabilities(self, text: str) -> Float32[np.ndarray, " T"]:
        """P(tag | text up to and including a token), for each of its T tokens (Maini et al. 2025, section 4.1).

        Raises ValueError for a text that is empty or longer than the context.
        """
        start, ids = self._ids(text)
        (found_T,) = inference.tag_probability(self.config, self.params, [ids], harm_tag_id=self.tokenizer.harm_tag_id)
        return found_T[start:]

    def monitor_levels(self, text: str, monitor: Monitor) -> Float32[np.ndarray, " T"]:
        """A monitor's level, from 0 to 1, at each of the text's T tokens (`safelm.load_monitor`).

        Raises ValueError as `tag_probabilities` does, or for a monitor of another model.
        """
        start, ids = self._ids(text)
        (found_T,) = monitors.levels(self.config, self.params, monitor, [ids])
        return found_T[start:]

    def log_probs(self, text: str) -> Float32[np.ndarray, " T"]:
        """log P(token | all before it) in nats, for each of the text's T tokens.

        The first token's value is NaN if the model's texts begin with no token of their own, since nothing predicts it.

        Raises ValueError as `tag_probabilities` does.
        """
        start, ids = self._ids(text)
        found_T = self._read(_log_probs, ids)
        return found_T[start:]

    def hidden_states(self, text: str, layer: int | None = None) -> Float32[np.ndarray, "T D"]:
        """The residual stream at each of the text's T tokens.

        Args:
          text: any text that fits the context.
          layer: number of blocks, for the stream after them without norm (0: the embeddings); None for the last one
            after the final norm.

        Raises:
          ValueError: the model has no such layer, or as in `tag_probabilities`.
        """
        start, ids = self._ids(text)
        return self._read(functools.partial(_hidden_states, layer=layer), ids)[start:]

    def _ids(self, text: str) -> tuple[int, list[int]]:
        """The position where the text's own tokens begin, and all ids that the model reads."""
        begin = list(self.tokenizer.conventions.begin_ids)
        own = self.tokenizer.encode(text)
        if not own:
            raise ValueError("the text is empty: it has no token")
        if len(begin) + len(own) > self.config.max_seq_len:
            raise ValueError(
                f"the text has {len(begin) + len(own)} tokens, the model's context is {self.config.max_seq_len}"
            )
        return len(begin), begin + own

    def _read(self, program: Callable[..., Array], ids: list[int]) -> np.ndarray:
        """A program's result at each of these tokens; texts are padded to few lengths, so it is rarely compiled."""
        (batch,) = batches([ids], max_rows=1, max_len=self.config.max_seq_len)
        return np.asarray(program(self.config, self.params, batch.tokens_PT), np.float32)[0, : len(ids)]


def load(
    source: str | os.PathLike[str],
    *,
    step: int | None = None,
    dtype: str = "",
    chat_template: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """Loads a model.

    Args:
      source: a workdir of `safelm.train` or `safelm.convert` (local or gs://), a Hugging Face folder, a GGUF file, or a
        model of a hub by name: "hf:ORG/NAME" or "hf:ORG/NAME@REVISION".
      step: of a checkpoint of ours; None for the newest.
      dtype: of the computation, such as "bfloat16"; "" for the model's own.
      chat_template: a name ("chatml", "llama-3", ..) or a .jinja file, in place of the model's own.
      chat_template_kwargs: further variables of its chat template: `{"enable_thinking": False}` for a hybrid reasoning
        model.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: the model is unsupported; the message names the file and the field.
    """
    config, params, tokenizer = read_model(os.fspath(source), step=step, chat_template=chat_template)
    tokenizer = tokenizer.with_template_kwargs(chat_template_kwargs or {})
    return LanguageModel(dataclasses.replace(config, dtype=dtype or config.dtype), params, tokenizer)


@functools.partial(jax.jit, static_argnames="config")
def _log_probs(config: ModelConfig, params: decoder.Params, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """log P of every token; the first one's is NaN."""
    logits_BTV = decoder.apply(config, params, tokens_BT)[:, :-1]
    found_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), tokens_BT[:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(found_BT, ((0, 0), (1, 0)), constant_values=jnp.nan)


@functools.partial(jax.jit, static_argnames=("config", "layer"))
def _hidden_states(
    config: ModelConfig, params: decoder.Params, tokens_BT: Int[Array, "B T"], *, layer: int | None
) -> Float[Array, "B T D"]:
    config = dataclasses.replace(config, attention="xla")
    return decoder.hidden_states(config, params, tokens_BT, layer=layer)
