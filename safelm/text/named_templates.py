"""Chat templates that a command's `--chat_template` gives: one of ours by name, or a file.

For models that are published without one, or whose own is not wanted. It takes the place of the model's own, is kept by
what is converted or trained, and counts in an evaluation's protocol.
"""

import logging
import pathlib
import re
from collections.abc import Collection, Mapping

from safelm.text import chat_template

log = logging.getLogger(__name__)

_FOLDER = pathlib.Path(__file__).with_name("chat_templates")
NAMES = ("chatml", *sorted(path.stem for path in _FOLDER.glob("*.jinja")))
HELP = f"{', '.join(NAMES)} or a .jinja file, in place of the model's own chat template"
_TOKEN = re.compile(r"<\|?[a-z][a-z0-9_]*\|?>")  # as vocabularies spell what structures a chat
_MOST_BYTES = 1 << 20


def source(template: str) -> str:
    """The Jinja source of a name or file; ValueError or OSError names what was given."""
    if template in NAMES:
        return chat_template.CHATML if template == "chatml" else (_FOLDER / f"{template}.jinja").read_text("utf-8")
    path = pathlib.Path(template)
    if not path.is_file():
        raise FileNotFoundError(f"chat template {template!r}: no such file, and not one of {', '.join(NAMES)}")
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"chat template {template}: {path.stat().st_size} bytes, at most {_MOST_BYTES} are read")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"chat template {template}: not UTF-8 ({error})") from error
    if not text.strip():
        raise ValueError(f"chat template {template}: the file is empty")
    return text


def usable(template: str, vocabulary: Collection[str], special_tokens: Mapping[str, str], *, where: str) -> str:
    """`source`, tried once. `where` names the vocabulary.

    Raises ValueError for one that can't be rendered, or one of ours with a token that the vocabulary lacks.
    """
    text = source(template)
    _check_tokens(template, text, vocabulary, where)
    turns = [{"role": role, "content": "a"} for role in ("user", chat_template.ASSISTANT)]
    try:
        chat_template.render(text, turns, add_generation_prompt=True, special_tokens=special_tokens)
    except ValueError as error:
        raise ValueError(f"chat template {template}: {error}") from error
    return text


def _check_tokens(template: str, text: str, vocabulary: Collection[str], where: str) -> None:
    missing = sorted(set(_TOKEN.findall(text)) - set(vocabulary))
    if not missing:
        return
    message = f"chat template {template}: writes {missing[0]}, which is no token of the vocabulary of {where}"
    if template in NAMES:
        raise ValueError(f"{message}: take another one")
    log.warning("%s: it will be plain text", message)
