"""Our checkpoints as a model of lm-evaluation-harness (0.4): log-likelihoods, generation, chat.

`python -m safelm.lm_eval` is the harness's command line with this model registered as `safelm`. It needs neither torch
nor transformers. Importing this module needs the package `lm_eval` (the extra `eval`) and registers the model.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from safelm.formats import sources
from safelm.inference import Greedy, Method, Sampling, continuations, generate_until, score_continuations
from safelm.models import decoder as model
from safelm.text import chat_template as chat_templates
from safelm.text import prompting
from safelm.text.tokenizer import Tokenizer

_GENERATION_SETTINGS = ("do_sample", "temperature", "top_k", "top_p", "until", "max_gen_toks")


def _rows_at_once(batch_size: int | str) -> int:
    text = str(batch_size)
    if text.startswith("auto") or text == "1":
        return 2**16
    if not text.isdecimal() or text == "0":
        raise ValueError(f"batch_size={batch_size}: want a number of at least 1, or auto")
    return int(text)


@register_model("safelm")
class SafeLM(TemplateLM):
    """A model for the harness.

    Args:
      method: the decoding method of `generate_until` if the task doesn't sample.
      batch_size: rows at once; "auto" and 1 (the harness's default) mean as many as fit in `tokens_at_once`.
      max_length: tokens of prompt and answer, to use less than the model's context.
      max_gen_toks: tokens to generate if a task doesn't say.
    """

    def __init__(
        self,
        config: model.ModelConfig,
        params: model.Params,
        tokenizer: Tokenizer,
        *,
        method: Method | None = None,
        batch_size: int | str = "auto",
        tokens_at_once: int = continuations.TOKENS_AT_ONCE,
        max_length: int = 0,
        max_gen_toks: int = 256,
        seed: int = 0,
        origin: str = "",
    ):
        super().__init__()
        if not 0 <= max_length <= config.max_seq_len:
            raise ValueError(f"max_length={max_length}: the model's context is {config.max_seq_len}")
        self.max_length = max_length or config.max_seq_len
        self._config, self._params = dataclasses.replace(config, max_seq_len=self.max_length), params
        self.vocabulary = tokenizer  # not `tokenizer`: the harness takes that for one of transformers
        self._method, self._seed, self._max_gen_toks, self._origin = method or Greedy(), seed, max_gen_toks, origin
        self._rows = _rows_at_once(batch_size)
        self._tokens_at_once = tokens_at_once
        self._renders_chats = False

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Mapping[str, Any], additional_config: Any = None) -> "SafeLM":
        """`--model_args`: checkpoint=MODEL, and those of `known` below; as the harness' own models have them
        `enable_thinking` and `chat_template_args`, variables of the chat template.

        Raises ValueError for another argument, and whatever loading a checkpoint raises.
        """
        arguments = {**arg_dict, **{key: value for key, value in (additional_config or {}).items() if value}}
        for given_to_any_model in ("device", "max_batch_size"):
            arguments.pop(given_to_any_model, None)
        known = ("step", "dtype", "chat_template", "batch_size", "tokens_at_once", "max_length", "max_gen_toks", "seed")
        if "checkpoint" not in arguments:
            raise ValueError("--model_args: want checkpoint=DIR, a folder or file of a model, or hf:ORG/NAME")
        kwargs = dict(arguments.pop("chat_template_args", None) or {})
        if "enable_thinking" in arguments:
            kwargs["enable_thinking"] = arguments.pop("enable_thinking")
        folder, step, dtype = str(arguments.pop("checkpoint")), arguments.pop("step", None), arguments.pop("dtype", "")
        if unknown := sorted(arguments.keys() - set(known)):
            raise ValueError(
                f"--model_args: {unknown[0]}={arguments[unknown[0]]}: unknown, one of checkpoint, {', '.join(known)}"
            )
        config, params, tokenizer = sources.read_model(
            folder, step=step, chat_template=str(arguments.pop("chat_template", ""))
        )
        if dtype:
            config = dataclasses.replace(config, dtype=dtype)
        return cls(config, params, tokenizer.with_template_kwargs(kwargs), **arguments, origin=folder)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> "SafeLM":
        """Like `create_from_arg_obj`, from `key=value,key=value`."""
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        return self.vocabulary.eos_id

    @property
    def tokenizer_name(self) -> str:
        return f"safelm-{self.vocabulary.hash[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """The description that the harness stores with the results."""
        return {
            "model_num_parameters": self._config.num_params,
            "model_dtype": self._config.dtype,
            "vocabulary_sha256": self.vocabulary.hash,
            "checkpoint": self._origin,
        }

    @property
    def prefix_token_id(self) -> int:
        """The token before an empty context: the model's own beginning, else its BOS or EOS, as the harness does."""
        conventions = self.vocabulary.conventions
        if conventions.begin_ids:
            return conventions.begin_ids[-1]
        beginning = conventions.special_tokens.get("bos_token", "")
        return conventions.control_tokens.get(beginning, conventions.document_end_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a string. Only control tokens of a chat template become their ids; a benchmark's text stays text.

        `add_special_tokens=False` leaves out the ids with which a text begins.
        """
        if self._is_rendered(string):
            ids, _ = prompting.encode_rendered(self.vocabulary, string)
            return ids if add_special_tokens is False else [*self.vocabulary.conventions.chat_begin_ids, *ids]
        if add_special_tokens is False:
            return self.vocabulary.encode(string)
        return prompting.text_prompt(self.vocabulary, string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of context and continuation; after a chat prompt an answer has the same ids as when it is generated."""
        if self._is_rendered(context):
            return self.tok_encode(context), self.vocabulary.encode(continuation)
        if not context.strip():  # the harness moves it into the continuation, and what is left is an empty context
            begin_ids = list(self.vocabulary.conventions.begin_ids) or [self.prefix_token_id]
            return begin_ids, self.vocabulary.encode(context + continuation)
        return super()._encode_pair(context, continuation)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return (self.vocabulary.conventions.chat_template or chat_templates.CHATML) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; without the generation prompt the last message stays open."""
        self._renders_chats = True
        return chat_templates.CUT + prompting.render_chat(
            self.vocabulary,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            open_last=not add_generation_prompt,
        )

    def _is_rendered(self, string: str) -> bool:
        """Whether a string came from `apply_chat_template`, told by a mark that no text contains."""
        return self._renders_chats and string.startswith(chat_templates.CUT)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        scores = score_continuations(
            self._config,
            self._params,
            [(context, continuation) for _, context, continuation in requests],
            tokens_at_once=self._tokens_at_once,
            max_rows=self._rows,
            show_progress=not disable_tqdm,
        )
        answers = [(score.logprob, score.is_greedy) for score in scores]
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            parts = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, parts):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts: dict[int, str] = {}
        for settings, members in groups.items():
            made = self._generate([prompts[number] for number in members], json.loads(settings), disable_tqdm)
            for number, text in zip(members, made, strict=True):
                texts[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return [texts[number] for number in range(len(requests))]

    def _generate(self, prompts: Sequence[list[int]], settings: dict[str, Any], disable_tqdm: bool) -> list[str]:
        wanted = normalize_gen_kwargs(settings, self._max_gen_toks)
        if unknown := sorted(wanted.keys() - set(_GENERATION_SETTINGS)):
            raise ValueError(f"generation_kwargs: {unknown[0]}={wanted[unknown[0]]!r} is not supported")
        room = self.max_length - wanted["max_gen_toks"]
        if room < 1:
            raise ValueError(f"max_gen_toks={wanted['max_gen_toks']}: the context is {self.max_length}")
        method = self._method
        if wanted["do_sample"] and wanted.setdefault("temperature", 1.0) > 0:
            named = {key: wanted[key] for key in ("temperature", "top_k", "top_p") if key in wanted}
            method = Sampling(**named)
        return generate_until(
            self._config,
            self._params,
            self.vocabulary,
            [prompt[-room:] for prompt in prompts],
            method,
            until=wanted["until"],
            max_new_tokens=wanted["max_gen_toks"],
            end_ids=self.vocabulary.conventions.end_ids,
            seed=self._seed,
            batch_size=min(self._rows, 64),
            show_progress=not disable_tqdm,
        )
