"""A question about a document as token ids: the model's own chat template around it, the document encoded literally.

The template and the question are the model's maker's and ours: special tokens they spell become their ids. The document
is never rendered with them: the rendered text is cut where it goes, and its ids are put there.
"""

import dataclasses
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safelm.tokenizer import CHAT_END, CHAT_START, Tokenizer

_ANY_DAY = datetime.date(2026, 1, 1)  # for templates that tell the date: a score must not depend on it
_SLOT = "0a9f2c71-the-document-goes-here"
_MARK = "\ufdd0"  # a noncharacter: in no text
_CHATML = (
    "{% for message in messages %}{{ '" + CHAT_START + "' + message.role + '\n' + message.content + '" + CHAT_END
    + "\n' }}{% endfor %}{% if add_generation_prompt %}{{ '" + CHAT_START + "assistant\n' }}{% endif %}"
)  # fmt: skip
_PLAIN = (
    "{% for message in messages %}{{ message.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Answer:\n{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Frame:
    """What stands around every document.

    Attributes:
      before, after: ids in front of the document and behind it, up to where the answer begins.
      end_id: what ends an answer.
      text: the frame as text, for fingerprints.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    end_id: int
    text: str


@runtime_checkable
class Question(Protocol):
    """What is asked: who the model is, and the user's message in front of the document and behind it."""

    @property
    def system(self) -> str: ...
    @property
    def before(self) -> str: ...
    @property
    def after(self) -> str: ...


class ChatTemplate:
    """The chat template of the folder `source`, else ChatML, else (a vocabulary without it) the messages as text.

    Attributes:
      text: the template.
    """

    def __init__(self, tokenizer: Tokenizer, *, source: str):
        """Raises ValueError for a template that isn't one."""
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = _ANY_DAY.strftime
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        self.text, self._special = _template(source, tokenizer)
        try:
            self._template = environment.from_string(self.text)
        except jinja2.TemplateError as error:
            raise self._problem(source, error) from error
        self._tokenizer, self._source = tokenizer, source
        added = json.loads(tokenizer.to_json())["added_tokens"]
        self._ids = {token["content"]: token["id"] for token in added if token["special"]}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def frame(self, question: Question) -> Frame:
        """Raises ValueError for a template that can't be rendered, or that changes or repeats a message."""
        user = question.before + _SLOT + question.after
        apart = [{"role": "system", "content": question.system}, {"role": "user", "content": user}]
        joined = [{"role": "user", "content": f"{question.system}\n\n{user}"}]
        rendered = self._render(apart, joined)
        before, *others = rendered.split(_SLOT)
        if len(others) != 1 or question.system not in rendered:
            raise ValueError(f"{self._source}: its chat template doesn't give a message as it is, once")
        ends = self.end_id(rendered)
        return Frame(tuple(self.encode(before)), tuple(self.encode(others[0])), end_id=ends, text=rendered)

    def end_id(self, rendered: str) -> int:
        """What ends a reply in a rendered conversation: the end of a turn in ChatML, else that of a document."""
        is_chatml = self._tokenizer.chat_end_id is not None and CHAT_END in rendered
        return self._tokenizer.chat_end_id if is_chatml else self._tokenizer.eos_id

    def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True, open_last: bool = False
    ) -> str:
        """A conversation as text for `encode`, special tokens of the template spelled out.

        One that a message spells stays text: a noncharacter in it, which `encode` takes out again, keeps it apart.

        Args:
          messages: each with "role" and "content".
          add_generation_prompt: open the assistant's turn at the end.
          open_last: end in the last message's content, to be continued (without a generation prompt).

        Raises:
          ValueError: a template that can't render it.
        """
        marked = [{**each, "content": self._cut.sub(_mark, each["content"])} for each in messages]
        if not open_last:
            return self._render(marked, add_generation_prompt=add_generation_prompt)
        marked[-1]["content"] += _SLOT
        return self._render(marked, add_generation_prompt=False).split(_SLOT)[0]

    def encode(self, text: str) -> list[int]:
        """The ids of a rendered text, special tokens that it spells as their ids."""
        ids: list[int] = []
        for piece in self._cut.split(text):
            ids += [self._ids[piece]] if piece in self._ids else self._tokenizer.encode(piece.replace(_MARK, ""))
        return ids

    def _render(self, *conversations: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        import jinja2

        problem: Exception | None = None
        for messages in conversations:  # some templates take no system message
            try:
                return self._template.render(
                    messages=messages, add_generation_prompt=add_generation_prompt, **self._special
                )
            except (jinja2.TemplateError, TypeError, KeyError) as error:
                problem = error
        raise self._problem(self._source, problem) from problem

    def _problem(self, source: str, error: Exception | None) -> ValueError:
        return ValueError(f"{source}: its chat template can't be rendered ({error})")


def _mark(special: re.Match[str]) -> str:
    return special[0][0] + _MARK + special[0][1:]


def make_frame(tokenizer: Tokenizer, question: Question, *, source: str) -> Frame:
    """One question in the template of `source`; raises as `ChatTemplate` does."""
    return ChatTemplate(tokenizer, source=source).frame(question)


def has_own_template(source: str) -> bool:
    """Whether the folder `source` brings a chat template."""
    return "://" not in source and _own_template(Path(source)) is not None


def _template(source: str, tokenizer: Tokenizer) -> tuple[str, dict[str, str]]:
    """The template and the values of bos_token and eos_token that go with it."""
    own = _own_template(Path(source)) if "://" not in source else None
    if own is not None:
        return own
    return (_PLAIN if tokenizer.chat_end_id is None or tokenizer.chat_start_id is None else _CHATML), {}


def _own_template(folder: Path) -> tuple[str, dict[str, str]] | None:
    config: dict[str, Any] = {}
    if (path := folder / "tokenizer_config.json").is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error})") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((each["template"] for each in template if each.get("name") == "default"), None)
    if (path := folder / "chat_template.jinja").is_file():
        template = path.read_text(encoding="utf-8")
    if template is None:
        return None
    tokens = {name: config.get(name) for name in ("bos_token", "eos_token")}
    return template, {
        name: token.get("content", "") if isinstance(token, dict) else (token or "") for name, token in tokens.items()
    }
