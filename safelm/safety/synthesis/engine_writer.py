"""A writer on our own engine: a checkpoint of ours, a Hugging Face folder or a GGUF file."""

import collections
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safelm import inference
from safelm.inference.methods import Greedy, Method, Sampling
from safelm.models import decoder as model
from safelm.safety.engine_models import read_engine_model
from safelm.safety.escaping import escape
from safelm.safety.model_fingerprint import model_fingerprint
from safelm.safety.options import check_least, make_settings
from safelm.safety.reasoning import has_reasoning
from safelm.safety.synthesis.writer import OnReply, Reply, Request
from safelm.text.chat_template import read_kwargs
from safelm.text.prompting import question_frame
from safelm.text.tokenizer import Tokenizer

_SPEED_ONLY = ("slots", "lookup_tokens")  # settings that no reply depends on
_LEAST_REPLY = 32  # tokens that must be left in the context for a reply
_CHARS_A_TOKEN = 3  # of English text, rather few
_FRAME_TOKENS = 1400  # of the longest prompt, without the document


@dataclasses.dataclass(frozen=True)
class EngineWriterSettings:
    """How a model writes.

    Attributes:
      slots: requests written at once.
      temperature: 0 always takes the likeliest token.
      top_k, top_p: as in `safelm.inference.Sampling`.
      max_document_chars: longer documents are split; 0 for what the model's context holds, at most 6,000.
      lookup_tokens: guessed from the document and checked at once: the same replies, faster where they copy.
      chat_template_kwargs: JSON of further variables of the chat template, such as {"enable_thinking":false}.
    """

    slots: int = 32
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    max_document_chars: int = 0
    lookup_tokens: int = 0
    chat_template_kwargs: str = ""

    def __post_init__(self) -> None:
        read_kwargs(self.chat_template_kwargs, "engine: chat_template_kwargs")
        check_least("engine", self, slots=1, temperature=0, top_k=0, max_document_chars=0)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"engine: top_p={self.top_p}: must be above 0 and at most 1")

    @property
    def method(self) -> Method:
        return Greedy() if self.temperature == 0 else Sampling(self.temperature, self.top_k, self.top_p)


@dataclasses.dataclass(frozen=True)
class _Question:
    system: str
    before: str
    after: str


class EngineWriter:
    """A writer on our own engine.

    The prompt goes through the model's own chat template. The document is escaped and encoded literally, so none of its
    text becomes a special token. A reply depends neither on other requests nor on `slots` (up to float rounding).

    Attributes:
      name: the model's folder or file.
      fingerprint: SHA-256 (hex) of weights, vocabulary, template and settings.
    """

    def __init__(
        self,
        config: model.ModelConfig,
        params: model.Params,
        tokenizer: Tokenizer,
        settings: EngineWriterSettings | None = None,
        *,
        name: str = "engine",
        weights: str = "",
    ):
        """Takes a model of ours; `weights` as in `Engine`.

        Raises ValueError for an unusable chat template, or a context too small for the prompts.
        """
        self.name, self.settings = name, settings or EngineWriterSettings()
        self._config = dataclasses.replace(config, attention="xla", remat="none")
        kwargs = read_kwargs(self.settings.chat_template_kwargs, "engine: chat_template_kwargs")
        self._tokenizer = tokenizer = tokenizer.with_template_kwargs(kwargs)
        frame = question_frame(tokenizer, _Question("system", "before", "after"))
        room = (config.max_seq_len - _FRAME_TOKENS) // 2 * _CHARS_A_TOKEN
        self.max_document_chars = self.settings.max_document_chars or max(1, min(6_000, room))
        shaping = {k: v for k, v in dataclasses.asdict(self.settings).items() if k not in _SPEED_ONLY}
        shaping |= {"weights": weights} if weights else {}
        self.fingerprint = model_fingerprint(config, params, tokenizer.hash, text=frame.text, settings=shaping)
        self._engine = inference.Engine(
            self._config,
            params,
            harm_tag_id=tokenizer.harm_tag_id,
            slots=self.settings.slots,
            lookup_tokens=self.settings.lookup_tokens,
            weights=weights,
        )
        self._counts: collections.Counter[str] = collections.Counter()
        self._seconds = 0.0

    def write(self, requests: Sequence[Request], on_reply: OnReply) -> None:
        """See `Writer`. A request that doesn't fit the context gets an error as its reply."""
        prompts: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            prompt = self.encode(request)
            if len(prompt) + _LEAST_REPLY > self._config.max_seq_len:
                reason = f"its {len(prompt)} tokens don't fit a context of {self._config.max_seq_len}"
                self._hand_over(index, Reply(None, "error", len(prompt), reason=reason), on_reply)
            else:
                prompts[index] = prompt
        started = time.monotonic()
        try:
            self._generate(requests, prompts, on_reply)
        finally:
            self._seconds += time.monotonic() - started

    def encode(self, request: Request) -> list[int]:
        """The prompt's ids: the template around the message with the document literal, then the reply's beginning."""
        frame = question_frame(self._tokenizer, request)
        document = self._tokenizer.encode(escape(self._tokenizer.normalized(request.document)))
        return [*frame.before, *document, *frame.after, *self._tokenizer.encode(request.reply_start)]

    def ledger(self) -> Mapping[str, int | float]:
        """Counts so far: `requests`, those `truncated` at the limit of tokens or `failed`, tokens, and `seconds`."""
        names = ("requests", "truncated", "failed", "prompt_tokens", "completion_tokens")
        return {**{name: self._counts[name] for name in names}, "seconds": self._seconds}

    def _generate(self, requests: Sequence[Request], prompts: Mapping[int, list[int]], on_reply: OnReply) -> None:
        """Delivers each reply as it ends and starts the next request in its place."""
        index_of: dict[int, int] = {}
        end_ids = self._tokenizer.conventions.end_ids
        for index, prompt in prompts.items():
            limit = min(requests[index].max_new_tokens, self._config.max_seq_len - len(prompt))
            seed = requests[index].seed
            wanted = inference.EngineRequest(tuple(prompt), self.settings.method, limit, end_ids, seed)
            index_of[self._engine.submit(wanted)] = index
        tokens: dict[int, list[int]] = {index: [] for index in prompts}
        try:
            while index_of:
                for update in self._engine.step():
                    index = index_of[update.request_id]
                    tokens[index] += update.tokens
                    if update.finished:
                        del index_of[update.request_id]
                        reply = self._reply(requests[index], len(prompts[index]), tokens.pop(index), update)
                        self._hand_over(index, reply, on_reply)
        finally:
            self._engine.clear()  # also where the caller was interrupted

    def _reply(self, request: Request, prompt_tokens: int, tokens: list[int], last: inference.Update) -> Reply:
        if last.finished == "error":
            return Reply(None, "error", prompt_tokens, reason=f"the engine: {last.error}")
        text_tokens = tokens if last.finished == "length" else tokens[:-1]
        text = self._tokenizer.decode(text_tokens)
        if not has_reasoning(text):  # whose marks are special tokens in some vocabularies
            text = self._tokenizer.decode(text_tokens, keep_special=False)
        stopped_by = "length" if last.finished == "length" else "end"
        return Reply(request.reply_start + text, stopped_by, prompt_tokens, len(tokens))

    def _hand_over(self, index: int, reply: Reply, on_reply: OnReply) -> None:
        self._counts.update(
            requests=1,
            truncated=int(reply.stopped_by == "length"),
            failed=int(reply.text is None),
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
        )
        on_reply(index, reply)


def load_engine_writer(
    source: str, *, dtype: str = "", chat_template: str = "", weights: str = "", name: str = "", **settings: Any
) -> EngineWriter:
    """Loads the writer of a model at `source` ("smollm2": the installed weights).

    Args:
      dtype: of the computation, float32 or bfloat16; empty for the model's own.
      chat_template: a name or file that replaces the model's own template.
      weights: float32, bfloat16 or int8; empty for `dtype`.
      settings: fields of `EngineWriterSettings`.

    Raises:
      FileNotFoundError: nothing at `source`.
      ValueError: the model is unsupported, or an option doesn't exist or is out of range.
    """
    checked = make_settings(
        EngineWriterSettings, settings, where="engine", others="dtype, chat_template, weights, name"
    )
    place, model_parts = read_engine_model(source, dtype, where="engine", chat_template=chat_template)
    shown = name or (source if source == "smollm2" else Path(place.rstrip("/")).name.partition("@")[0])
    return EngineWriter(*model_parts, checked, name=shown, weights=weights)
