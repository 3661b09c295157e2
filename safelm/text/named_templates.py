"""Chat templates that a command's `--chat_template` gives: one of ours by name, or a file.

For models that are published without one, or whose own is not wanted. It takes the place of the model's own, is kept by
what is converted or trained, and counts in an evaluation's protocol.
"""

import contextlib
import logging
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping

from safelm.text import chat_template

log = logging.getLogger(__name__)

_FOLDER = pathlib.Path(__file__).with_name("chat_templates")
NAMES = ("chatml", *sorted(path.stem for path in _FOLDER.glob("*.jinja")))
HELP = f"{', '.join(NAMES)} or a .jinja file, in place of the model's own chat template"
_TOKEN = re.compile(r"<\|?[a-z][a-z0-9_]*\|?>")  # as vocabularies spell what structures a chat
# What no plain text is meant by: <|im_end|>, DeepSeek's with wide bars, and the names that families share.
_TOKEN_FOR_SURE = re.compile(r"<[|\uff5c][^\s<>]+[|\uff5c]>|</?(?:s|bos|eos|start_of_turn|end_of_turn)>")
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

    Raises ValueError for one that can't be rendered, or that writes a token which the vocabulary lacks: it would be
    plain text. Of a file's words in tags (`<think>`) that is only told, since plain text may be meant.
    """
    text = source(template)
    turns = [{"role": role, "content": "a"} for role in ("user", chat_template.ASSISTANT)]
    try:
        written = chat_template.render(text, turns, add_generation_prompt=True, special_tokens=special_tokens)
    except ValueError as error:
        raise ValueError(f"chat template {template}: {error}") from error
    with contextlib.suppress(ValueError):  # some take no system message
        turns = [{"role": "system", "content": "a"}, *turns]
        written += chat_template.render(text, turns, add_generation_prompt=True, special_tokens=special_tokens)
    _check_tokens(template, chat_template.without_marks(written), vocabulary, where)
    return text


def _check_tokens(template: str, written: str, vocabulary: Collection[str], where: str) -> None:
    patterns = (_TOKEN, _TOKEN_FOR_SURE) if template in NAMES else (_TOKEN_FOR_SURE,)
    lacking = "writes {}, which is no token of the vocabulary of " + where
    if missing := _missing(patterns, written, vocabulary):
        raise ValueError(f"chat template {template}: {lacking.format(missing[0])}: take another one")
    if missing := _missing((_TOKEN,), written, vocabulary):
        log.warning("chat template %s: %s: it will be plain text", template, lacking.format(missing[0]))


def _missing(patterns: Iterable[re.Pattern[str]], written: str, vocabulary: Collection[str]) -> list[str]:
    return sorted({token for pattern in patterns for token in pattern.findall(written)} - set(vocabulary))
