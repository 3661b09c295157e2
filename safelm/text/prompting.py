"""Turns prompts into ids: plain text, a conversation, or a question around a document.

Every command, judge and writer asks a model through this module; nothing else adds tokens around a prompt. Control
tokens come only from the model's chat template (or a question of ours); a prompt, message or document that spells one
stays text.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from safelm.tags import HARM_TAG
from safelm.text import chat_template
from safelm.text.chat_template import ASSISTANT, BROKEN, CHAT_END, CHAT_START, CUT, LEARNED, LEARNED_END, Messages
from safelm.text.tokenizer import Tokenizer

Span = tuple[int, int]
_SLOT = "0a9f2c71-the-document-goes-here"


@runtime_checkable
class Question(Protocol):
    """A question to a model: a system message, and the user's message before and after the document."""

    @property
    def system(self) -> str: ...
    @property
    def before(self) -> str: ...
    @property
    def after(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Frame:
    """The ids around every document: before it, and after it up to the start of the answer.

    Attributes:
      text: the frame as text, for fingerprints.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    text: str


def text_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text to continue, after the ids with which the model's texts begin; never empty."""
    conventions = tokenizer.conventions
    return [*conventions.begin_ids, *tokenizer.encode(text)] or [conventions.document_end_id]


def prompt_ids(tokenizer: Tokenizer, prompt: str, *, is_chat: bool, answer_start: str = "") -> list[int]:
    """The ids of a prompt, as a user's message or as plain text, followed by the first words of its answer."""
    if is_chat:
        return chat_prompt(tokenizer, [{"role": "user", "content": prompt}], answer_start=answer_start)
    return text_prompt(tokenizer, prompt + answer_start)


def chat_prompt(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    answer_start: str = "",
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """The ids of a conversation up to the assistant's turn, followed by the answer's first words.

    `template_kwargs` come before those that the tokenizer holds.

    Raises ValueError for a message without role or content, a template that can't render the messages, or a vocabulary
    with neither a chat template nor the tokens of ChatML.
    """
    _require_chat(tokenizer)
    ids, _ = encode_rendered(tokenizer, render_chat(tokenizer, messages, template_kwargs=template_kwargs))
    return [*tokenizer.conventions.chat_begin_ids, *ids, *(tokenizer.encode(answer_start) if answer_start else [])]


def assistant_header(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that open the assistant's turn in the model's own template, behind the turn before it.

    Raises ValueError as `chat_prompt` does, or if the template doesn't add a header to what stands before.
    """
    _require_chat(tokenizer)
    messages = [{"role": "user", "content": "x"}]
    without = render_chat(tokenizer, messages, add_generation_prompt=False)
    with_header = render_chat(tokenizer, messages)
    if not with_header.startswith(without) or with_header == without:
        raise ValueError(f"{tokenizer.origin}: its chat template has no header of the assistant's turn; give one")
    return tuple(encode_rendered(tokenizer, with_header[len(without) :])[0])


def chat_example(tokenizer: Tokenizer, messages: Messages, *, is_tagged: bool = False) -> tuple[list[int], list[Span]]:
    """The ids of a whole conversation and the ranges [start, stop) that the assistant writes, ends included.

    The ids with which conversations begin are left out, since training adds them to every document
    (`safelm.data.rows`). If the template has `{% generation %}`, it sets the ranges; otherwise a range goes from where
    a prompt would end to the end of the turn.

    Args:
      is_tagged: whether the harm tag's string in the assistant's words becomes its id (see `Tokenizer.encode_tagged`).

    Raises ValueError as `chat_prompt` does, or if the template changes earlier turns when a later one is added.
    """
    _require_chat(tokenizer)
    text = render_chat(tokenizer, messages, add_generation_prompt=False, is_tagged=is_tagged)
    if LEARNED not in text:
        text = _with_answers_marked(tokenizer, messages, text, is_tagged)
    return encode_rendered(tokenizer, text)


def question_messages(question: Question, document: str) -> list[dict[str, str]]:
    """A question about a document as a conversation; the document stands in it as it is, so escape it before."""
    user = question.before + document + question.after
    return [{"role": "system", "content": question.system}, {"role": "user", "content": user}]


def question_frame(tokenizer: Tokenizer, question: Question) -> Frame:
    """A question in the model's own template, ready to hold any document, which will be encoded literally.

    Raises ValueError if the template can't be rendered, or changes or repeats a message.
    """
    apart = question_messages(question, _SLOT)
    joined = [{"role": "user", "content": "\n\n".join(message["content"] for message in apart)}]
    try:
        rendered = _render(tokenizer, apart, add_generation_prompt=True)
    except ValueError:  # some templates take no system message
        rendered = _render(tokenizer, joined, add_generation_prompt=True)
    before, *others = rendered.split(_SLOT)
    if len(others) != 1 or question.system not in rendered:
        raise ValueError(f"{tokenizer.origin}: its chat template changes or repeats a message")
    ids = [tuple(encode_rendered(tokenizer, part)[0]) for part in (before, others[0])]
    conventions = tokenizer.conventions
    begin_ids = conventions.chat_begin_ids if knows_chats(tokenizer) else conventions.begin_ids
    return Frame((*begin_ids, *ids[0]), ids[1], chat_template.without_marks(rendered))


def render_chat(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    add_generation_prompt: bool = True,
    open_last: bool = False,
    is_tagged: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """A conversation as text for `encode_rendered`.

    Args:
      add_generation_prompt: whether to open the assistant's turn at the end.
      open_last: whether to end inside the last message, to be continued (without a generation prompt).
      is_tagged: whether a harm tag spelled by the assistant becomes the tag's id.
      template_kwargs: as in `chat_prompt`.

    Raises:
      ValueError: a message lacks a key or has a line break in its role, or a template can't render it.
    """
    controls = chat_template.control_pattern(list(tokenizer.conventions.control_tokens))
    marked = [_marked(index, message, controls, is_tagged) for index, message in enumerate(messages)]
    if not open_last:
        return _render(tokenizer, marked, add_generation_prompt=add_generation_prompt, template_kwargs=template_kwargs)
    marked[-1]["content"] += _SLOT
    return _render(tokenizer, marked, add_generation_prompt=False, template_kwargs=template_kwargs).split(_SLOT)[0]


def encode_rendered(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[Span]]:
    """The ids of a rendered text, with the control tokens it spells as ids, and the ranges to learn."""
    controls = tokenizer.conventions.control_tokens
    pattern = chat_template.control_pattern(list(controls)).pattern
    ids: list[int] = []
    spans: list[Span] = []
    start = 0
    for piece in re.split(f"([{CUT}{LEARNED}{LEARNED_END}]|{pattern})", text):
        if piece in controls:
            ids.append(controls[piece])
        elif piece == LEARNED:
            start = len(ids)
        elif piece == LEARNED_END:
            spans.append((start, len(ids)))
        else:
            ids += tokenizer.encode(chat_template.without_marks(piece))
    return ids, spans


def _with_answers_marked(tokenizer: Tokenizer, messages: Messages, text: str, is_tagged: bool) -> str:
    """A rendered conversation with marks around the assistant's words and their end-of-turn token."""
    ends = [token for token, i in tokenizer.conventions.control_tokens.items() if i in tokenizer.conventions.end_ids]
    marked = text
    for index in reversed([i for i, message in enumerate(messages) if message["role"] == ASSISTANT]):
        prompt = render_chat(tokenizer, messages[:index], is_tagged=is_tagged)
        through = render_chat(tokenizer, messages[: index + 1], add_generation_prompt=False, is_tagged=is_tagged)
        if not (text.startswith(through) and through.startswith(prompt)):
            raise ValueError(
                f"{tokenizer.origin}: its chat template has no {{% generation %}} and changes message {index} when"
                " later ones are added, so the assistant's words can't be located"
            )
        end = chat_template.control_pattern(ends).search(through, len(prompt))
        stop = end.end() if end else len(through)
        marked = marked[: len(prompt)] + LEARNED + text[len(prompt) : stop] + LEARNED_END + marked[stop:]
    return marked


def knows_chats(tokenizer: Tokenizer) -> bool:
    """Whether the model has a chat template or the tokens of ChatML."""
    return tokenizer.conventions.chat_template is not None or tokenizer.has_chatml


def _require_chat(tokenizer: Tokenizer) -> None:
    if not knows_chats(tokenizer):
        raise ValueError(
            f"{tokenizer.origin}: this vocabulary has no {CHAT_START} and {CHAT_END}: it can't render a chat"
        )


def _render(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    add_generation_prompt: bool,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    conventions = tokenizer.conventions
    if template_kwargs and conventions.chat_template is None:
        raise ValueError(f"{tokenizer.origin}: has no chat template that chat_template_kwargs could go to")
    if conventions.chat_template is not None:
        controls = chat_template.control_pattern(list(conventions.control_tokens))
        kwargs = {**conventions.template_kwargs, **(template_kwargs or {})}
        try:
            return chat_template.render(
                conventions.chat_template,
                messages,
                add_generation_prompt=add_generation_prompt,
                special_tokens=conventions.special_tokens,
                kwargs={name: _literal(value, controls) for name, value in kwargs.items()},
            )
        except ValueError as error:
            raise ValueError(f"{tokenizer.origin}: its {error}") from error
    if tokenizer.has_chatml:
        return chat_template.render_chatml(messages, add_generation_prompt=add_generation_prompt)
    return chat_template.render_plain(messages, add_generation_prompt=add_generation_prompt)


def _marked(index: int, message: Mapping[str, str], controls: re.Pattern[str], is_tagged: bool) -> dict[str, str]:
    """The message with its control tokens broken up by marks, so that they stay text."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str) or not role or "\n" in role:
        raise ValueError(f"message {index}: needs a one-line role and a content string, got {dict(message)!r}")
    kept = HARM_TAG if is_tagged and role == ASSISTANT else None
    return {"role": _broken(role, controls, kept), "content": _broken(content, controls, kept)}


def _broken(text: str, controls: re.Pattern[str], kept: str | None = None) -> str:
    """The text with its control tokens, but for the one that is kept, broken up."""

    def broken(found: re.Match[str]) -> str:
        token = found[0]
        return token if token == kept else token[: len(token) > 1] + BROKEN + token[len(token) > 1 :]

    return controls.sub(broken, chat_template.without_marks(text))


def _literal(value: Any, controls: re.Pattern[str]) -> Any:
    """A JSON value whose strings spell no control token."""
    if isinstance(value, str):
        return _broken(value, controls)
    if isinstance(value, list):
        return [_literal(each, controls) for each in value]
    if isinstance(value, dict):
        return {_broken(name, controls): _literal(each, controls) for name, each in value.items()}
    return value
