"""Reads conversations in the columns of the published instruction sets, by pure functions without TensorFlow.

    ultrachat      `messages` (UltraChat-200k) or ShareGPT's `conversations` (`data_tasks.messages`)
    wildguardmix   `prompt`, `response`, `response_harm_label`, `prompt_harm_label`, `response_refusal_label`
    wildjailbreak  `vanilla`, `adversarial`, `completion`, and `data_type`, which says which of the prompts it is
    gsm8k          `question`, `answer`
    instructions   `instruction` or `prompt`, perhaps `input` or `context`; `output` or `response`

A conversation travels as JSON in the `text` of a document whose harm score is 0, HARMFUL_SCORE for an answer that gives
the harm (WildGuardMix: `response_harm_label` "harmful"; without a label, a harmful prompt that wasn't refused), or
NO_SCORE without an answer, since WildGuardMix has bare prompts too. Rows with an `id` or `prompt_id` keep it; for
others the id is a hash of the messages, the same in all tasks, whatever else they read of a row.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from data_tasks.messages import COLUMNS, SYSTEM_COLUMNS, Messages, read_messages
from data_tasks.preprocessors import NO_SCORE, SAFE_SCORE
from data_tasks.readers import Document
from safelm.documents import SUFFIXES, TSV_SUFFIXES, MalformedError, check_text
from safelm.text.chat_template import ASSISTANT
from safelm.text.control_tokens import control_id
from safelm.text.prompting import chat_example
from safelm.text.tokenizer import Tokenizer

HARMFUL_SCORE = 5
REFUSES = "refuses"  # of an answer in a conversation's JSON: whether it refuses
CATEGORY = "category"  # and, of one that does, what of: a value of the row's column, where it has one


@dataclasses.dataclass(frozen=True)
class ChatRows:
    """A format of rows (a `data_tasks.readers.RowFormat`): its columns, and how to find a row's messages."""

    name: str
    columns: Mapping[str, Sequence[str]]
    optional: Sequence[str]
    converse: Callable[[Mapping[str, Any]], tuple[Messages, int]]  # row -> (messages, harm score)
    train_files: Sequence[str] = ("train-*",)
    validation_files: Sequence[str] = ("validation-*",)
    suffixes: tuple[str, ...] = (*SUFFIXES, *TSV_SUFFIXES)
    text_column: None = None
    annotations: tuple[()] = ()

    def required(self, path: str) -> Mapping[str, Sequence[str]]:
        """The required columns, equal for all files."""
        return self.columns

    def parse(self, row: Mapping[str, Any], path: str = "") -> Document:
        """The row's conversation as a document with JSON text. Raises MalformedError naming the field that is wrong."""
        messages, score = self.converse(row)
        text = json.dumps(messages, ensure_ascii=False)
        try:
            digest = hashlib.blake2b(_said(messages).encode(), digest_size=12).hexdigest()
        except UnicodeEncodeError:
            raise MalformedError("half a Unicode pair in what is said") from None
        own = next((row[name] for name in ("id", "prompt_id") if isinstance(row.get(name), str | int)), "")
        check_text(str(own), "id")
        return Document(str(own) or f"{self.name}-{digest}", text, score)


@dataclasses.dataclass(frozen=True)
class Openings:
    """The control tokens with which answers begin (refusal tokens, Jain et al. 2024, arXiv 2412.06748).

    Attributes:
      respond: of an answer that doesn't refuse.
      refuse: of a refusal whose category has no token of its own.
      by_category: of a refusal, by its category.
    """

    respond: str
    refuse: str
    by_category: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The ids of all of them. Raises ValueError where the vocabulary lacks one."""
        return frozenset(
            control_id(tokenizer, each) for each in (self.respond, self.refuse, *self.by_category.values())
        )

    def of(self, answer: Mapping[str, Any]) -> str:
        """The token of an answer in a conversation's JSON."""
        refusal = self.by_category.get(answer.get(CATEGORY, ""), self.refuse)
        return refusal if answer.get(REFUSES) else self.respond


def encode_chat(
    text: str, tokenizer: Tokenizer, *, is_tagged: bool = False, openings: Openings | None = None
) -> tuple[Int32[np.ndarray, " tokens"], Float32[np.ndarray, " tokens"]]:
    """The ids of a document's conversation in the model's own template with the document's end, and the loss weights.

    The weights are 1 for the assistant's words and the end of its turn, and 0 for all else. Only with `is_tagged` does
    a harm tag in those words become the tag's id.

    Args:
      openings: the tokens before answers, of rows with `REFUSES`.

    Raises ValueError if the template puts other than one range of words where an answer is, or the vocabulary lacks a
    token.
    """
    messages = json.loads(text)
    ids, spans = chat_example(tokenizer, messages, is_tagged=is_tagged)
    loss_weight = np.zeros(len(ids) + 1, np.float32)
    for start, stop in spans:
        loss_weight[start:stop] = 1
    if openings:
        answers = [message for message in messages if message["role"] == ASSISTANT]
        if len(answers) != len(spans):
            raise ValueError(f"the chat template has {len(spans)} ranges of words for {len(answers)} answers")
        places = [start for start, _ in spans]
        ids = np.insert(ids, places, [control_id(tokenizer, openings.of(answer)) for answer in answers]).tolist()
        loss_weight = np.insert(loss_weight, places, 1)
    return np.array([*ids, tokenizer.eos_id], np.int32), loss_weight


def map_content(text: str, change: Callable[[str, str], str]) -> str:
    """A document's conversation with every content replaced by `change(role, content)`."""
    messages = json.loads(text)
    return json.dumps([{**m, "content": change(m["role"], m["content"])} for m in messages], ensure_ascii=False)


def _said(messages: Messages) -> str:
    """The messages as JSON, without what labels say of them."""
    plain = [{name: value for name, value in each.items() if name not in (REFUSES, CATEGORY)} for each in messages]
    return json.dumps(plain, ensure_ascii=False)


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise MalformedError(f"field {name!r} is missing" if value is None else f"field {name!r} is not a string")
    if not value.strip():
        raise MalformedError(f"field {name!r} is empty")
    return value


def _label(row: Mapping[str, Any], name: str, known: Sequence[str]) -> str | None:
    value = row.get(name)
    if value is not None and value not in known:
        raise MalformedError(f"field {name!r} is not one of {', '.join(known)} or null")
    return value


def _turns(user: str, assistant: str) -> Messages:
    return [{"role": "user", "content": user}, {"role": ASSISTANT, "content": assistant}]


def _messages(row: Mapping[str, Any]) -> tuple[Messages, int]:
    return read_messages(row), SAFE_SCORE


def _wildguardmix(row: Mapping[str, Any]) -> tuple[Messages, int]:
    harms = ("harmful", "unharmful")
    prompt_label, response_label = (_label(row, f"{of}_harm_label", harms) for of in ("prompt", "response"))
    refusal = _label(row, "response_refusal_label", ("refusal", "compliance"))
    prompt = _text(row, "prompt")
    if row.get("response") is None:
        return [{"role": "user", "content": prompt}], NO_SCORE
    is_harmful = response_label == "harmful" or (
        response_label is None and prompt_label == "harmful" and refusal != "refusal"
    )
    return _turns(prompt, _text(row, "response")), HARMFUL_SCORE if is_harmful else SAFE_SCORE


def _wildjailbreak(row: Mapping[str, Any]) -> tuple[Messages, int]:
    kinds = ("vanilla_harmful", "vanilla_benign", "adversarial_harmful", "adversarial_benign")
    if row.get("data_type") not in kinds:
        raise MalformedError(f"field 'data_type' is not one of {', '.join(kinds)}")
    prompt = _text(row, row["data_type"].split("_")[0])
    return _turns(prompt, _text(row, "completion")), SAFE_SCORE


def _gsm8k(row: Mapping[str, Any]) -> tuple[Messages, int]:
    return _turns(_text(row, "question"), _text(row, "answer")), SAFE_SCORE


def _instructions(row: Mapping[str, Any]) -> tuple[Messages, int]:
    asked = _text(row, next((name for name in ("instruction", "prompt") if row.get(name) is not None), "instruction"))
    _, is_framed, framed = asked.rstrip().partition("### Instruction:\n")  # a prompt in Alpaca's frame
    if is_framed and framed.endswith("\n### Response:"):
        asked = framed.removesuffix("### Response:").rstrip("\n")
    more = next((row[name] for name in ("input", "context") if isinstance(row.get(name), str)), "").strip()
    answer = _text(row, next((name for name in ("output", "response") if row.get(name) is not None), "output"))
    return _turns(f"{asked}\n\n{more}" if more else asked, answer), SAFE_SCORE


def _refusing(row: Mapping[str, Any]) -> tuple[Messages, int]:
    """WildGuardMix with what its labels say of the answer; without a label a row has no score."""
    messages, score = _wildguardmix(row)
    label = row.get("response_refusal_label")
    return _labelled(messages, label == "refusal"), score if label or score == NO_SCORE else NO_SCORE


def _refusing_jailbreaks(row: Mapping[str, Any]) -> tuple[Messages, int]:
    """WildJailbreak, whose completions refuse what is harmful."""
    messages, score = _wildjailbreak(row)
    return _labelled(messages, row["data_type"].endswith("_harmful")), score


def _with_category(
    converse: Callable[[Mapping[str, Any]], tuple[Messages, int]], column: str, row: Mapping[str, Any]
) -> tuple[Messages, int]:
    """A row's conversation whose refusals say their category, where the row has one."""
    messages, score = converse(row)
    category = row.get(column)
    if category is None:
        return messages, score
    if not isinstance(category, str):
        raise MalformedError(f"field {column!r} is not a string")
    return [{**each, CATEGORY: category} if each.get(REFUSES) else each for each in messages], score


def _labelled(messages: Messages, refuses: bool) -> Messages:
    return [{**each, REFUSES: refuses} if each["role"] == ASSISTANT else each for each in messages]


_IDS = ("id", "prompt_id")
MESSAGES = ChatRows(
    "ultrachat",
    {"messages": COLUMNS},
    (*_IDS, *SYSTEM_COLUMNS),
    _messages,
    train_files=("train-*", "train_sft-*"),
    validation_files=("validation-*", "test_sft-*"),
)
WILDGUARDMIX = ChatRows(
    "wildguardmix",
    {"prompt": ("prompt",), "response": ("response",), "harm label": ("response_harm_label", "prompt_harm_label")},
    (*_IDS, "response_refusal_label"),
    _wildguardmix,
    train_files=("train-*", "wildguard_train*"),
)
WILDJAILBREAK = ChatRows(
    "wildjailbreak",
    {name: (name,) for name in ("vanilla", "adversarial", "completion", "data_type")},
    _IDS,
    _wildjailbreak,
    train_files=("train-*", "train.tsv"),
)
GSM8K = ChatRows("gsm8k", {"question": ("question",), "answer": ("answer",)}, _IDS, _gsm8k)
INSTRUCTIONS = ChatRows(
    "instructions",
    {"instruction": ("instruction", "prompt"), "output": ("output", "response")},
    (*_IDS, "input", "context"),
    _instructions,
)
CHAT_ROWS: Mapping[str, ChatRows] = MappingProxyType(
    {rows.name: rows for rows in (MESSAGES, WILDGUARDMIX, WILDJAILBREAK, GSM8K, INSTRUCTIONS)}
)
# Of the tasks whose answers begin with a refusal token (arXiv 2412.06748): rows that say whether an answer refuses.
REFUSAL_ROWS: Mapping[str, ChatRows] = MappingProxyType(
    {
        "refusal_ultrachat": MESSAGES,
        "refusal_wildguardmix": dataclasses.replace(WILDGUARDMIX, converse=_refusing),
        "refusal_wildjailbreak": dataclasses.replace(WILDJAILBREAK, converse=_refusing_jailbreaks),
    }
)


def refusal_rows(source: str, category_column: str = "") -> ChatRows | None:
    """The rows of a task of `REFUSAL_ROWS`, None for another; with a column, its values are refusals' categories.

    WildGuardMix must have the column, `subcategory` as published; WildJailbreak, which has none as published, may.
    """
    rows = REFUSAL_ROWS.get(source)
    if rows is None or not category_column or rows is MESSAGES:
        return rows
    is_required = rows.name == WILDGUARDMIX.name
    return dataclasses.replace(
        rows,
        columns={**rows.columns, "category": (category_column,)} if is_required else rows.columns,
        optional=(*rows.optional, category_column),
        converse=functools.partial(_with_category, rows.converse, category_column),
    )
