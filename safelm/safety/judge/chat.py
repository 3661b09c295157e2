"""The judge's question as token ids: the model's own chat template around the rubric, the document encoded literally.

The template and the rubric are ours and the model's maker's: special tokens they spell become their ids. The document
is never rendered with them: the rendered text is cut where it goes, and its ids are put there.
"""

import dataclasses
import datetime
import json
import re
from pathlib import Path
from typing import Any

from safelm.safety.judge.rubric import Rubric
from safelm.tokenizer import CHAT_END, CHAT_START, Tokenizer

_ANY_DAY = datetime.date(2026, 1, 1)  # for templates that tell the date: a score must not depend on it
_SLOT = "0a9f2c71-the-document-goes-here"
_CHATML = (
    "{% for message in messages %}{{ '" + CHAT_START + "' + message.role + '\n' + message.content + '" + CHAT_END
    + "\n' }}{% endfor %}{{ '" + CHAT_START + "assistant\n' }}"
)  # fmt: skip
_PLAIN = "{% for message in messages %}{{ message.content + '\n\n' }}{% endfor %}Answer:\n"


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


def make_frame(tokenizer: Tokenizer, rubric: Rubric, *, source: str) -> Frame:
    """The rubric in the chat template of the folder `source`, else in ChatML, else (a vocabulary without it) as text.

    Raises ValueError for a template that can't be rendered, or that changes or repeats a message.
    """
    template, special = _template(source, tokenizer)
    user = rubric.before + _SLOT + rubric.after
    apart = [{"role": "system", "content": rubric.system}, {"role": "user", "content": user}]
    joined = [{"role": "user", "content": f"{rubric.system}\n\n{user}"}]
    rendered = _render(template, special, (apart, joined), source)
    before, *others = rendered.split(_SLOT)
    if len(others) != 1 or rubric.system not in rendered:
        raise ValueError(f"{source}: its chat template doesn't give a message as it is, once")
    ids = [tuple(_encode_with_specials(tokenizer, part)) for part in (before, others[0])]
    is_chatml = tokenizer.chat_end_id is not None and CHAT_END in rendered
    return Frame(*ids, end_id=tokenizer.chat_end_id if is_chatml else tokenizer.eos_id, text=rendered)


def _render(template: str, special: dict[str, str], conversations: tuple[list[dict], ...], source: str) -> str:
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
    problem: Exception | None = None
    for messages in conversations:  # some templates take no system message
        try:
            return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special)
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            problem = error
    raise ValueError(f"{source}: its chat template can't be rendered ({problem})") from problem


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


def _encode_with_specials(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text of ours, special tokens that it spells as their ids."""
    added = json.loads(tokenizer.to_json())["added_tokens"]
    specials = {token["content"]: token["id"] for token in added if token["special"]}
    longest_first = sorted(specials, key=len, reverse=True)
    ids: list[int] = []
    for piece in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text):
        ids += [specials[piece]] if piece in specials else tokenizer.encode(piece)
    return ids
