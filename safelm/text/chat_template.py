"""Renders conversations as text, by the model's own Jinja template or in ChatML.

The text spells the template's control tokens (`<|im_end|>`) and contains marks: characters that Unicode reserves from
text, which `safelm.text.prompting` removes again. A mark inside a control token that a *message* spells keeps it from
becoming one; other marks tell where to cut ids and which words are the assistant's.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from safelm.io import records
from safelm.text import stranger_worker

CHAT_START = "<|im_start|>"
CHAT_END = "<|im_end|>"
ASSISTANT = "assistant"
BROKEN, CUT, LEARNED, LEARNED_END = MARKS = "\ufdd0\ufdd1\ufdd2\ufdd3"
Messages = Sequence[Mapping[str, str]]

CHATML = (
    "{% for message in messages %}{{ '"
    + CHAT_START
    + "' + message.role + '\n' + message.content + '"
    + CHAT_END
    + "\n' }}{% endfor %}{% if add_generation_prompt %}{{ '"
    + CHAT_START
    + ASSISTANT
    + "\n' }}{% endif %}"
)
KWARGS_HELP = """variables of the model's chat template, as JSON: '{"enable_thinking": false}'"""
_GIVEN = "messages add_generation_prompt generation_marks bos_token eos_token unk_token pad_token".split()
_GIVEN += ["raise_exception", "strftime_now"]
_NO_MARKS = str.maketrans(dict.fromkeys(MARKS))


def begun(template: str, beginning: str) -> str:
    """The template with a fixed text before every conversation."""
    return f"{{{{ {json.dumps(beginning, ensure_ascii=False)} }}}}{template}" if beginning else template


def read_kwargs(text: str, flag: str) -> dict[str, Any]:
    """The template's variables that a flag gives as JSON; ValueError names the flag."""
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{flag}={text}: not JSON ({error})") from error
    return check_kwargs(values, flag)


def check_kwargs(values: Any, where: str) -> dict[str, Any]:
    """The values, if they are variables for a template: by names that it isn't given anyway. ValueError otherwise."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: want a JSON object of names and values, got {type(values).__name__}")
    for name in values:
        if name in _GIVEN:
            raise ValueError(f"{where}: {name!r} is given to every template and can't be set")
        if not name.isidentifier():
            raise ValueError(f"{where}: {name[:40]!r} is no name of a template's variable")
    records.check_depth(values, where)
    return values


def without_marks(text: str) -> str:
    """The text without the characters that serve as marks."""
    return text.translate(_NO_MARKS)


def render_chatml(messages: Messages, *, add_generation_prompt: bool) -> str:
    """A conversation in ChatML.

    Ids are cut at the start of each message, so an answer has the same ids as after a prompt.
    """
    text = ""
    for message in messages:
        start, end = (LEARNED, LEARNED_END) if message["role"] == ASSISTANT else (CUT, "")
        text += f"{CHAT_START}{message['role']}\n{start}{message['content']}{CHAT_END}{end}\n"
    return text + (f"{CHAT_START}{ASSISTANT}\n{CUT}" if add_generation_prompt else "")


def render_plain(messages: Messages, *, add_generation_prompt: bool) -> str:
    """A conversation as plain text, for vocabularies without tokens for turns."""
    said = "".join(f"{message['content']}\n\n" for message in messages)
    return said + ("Answer:\n" if add_generation_prompt else "")


def render(
    template: str,
    messages: Messages,
    *,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
    kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Renders a conversation by a Jinja template in a separate process.

    Text between `{% generation %}` and `{% endgeneration %}` is put between LEARNED and LEARNED_END.

    `kwargs` are further variables of the template (see `check_kwargs`).

    Raises ValueError if the template can't render these messages.
    """
    values = {"messages": [dict(message) for message in messages], "add_generation_prompt": add_generation_prompt}
    values |= {"generation_marks": [LEARNED, LEARNED_END], **special_tokens, **(kwargs or {})}
    try:
        return stranger_worker.render({"template": template, "values": values})
    except ValueError as error:
        raise ValueError(f"chat template can't be rendered ({error})") from error


def end_of_turn(template: str, special_tokens: Mapping[str, str], control_tokens: Sequence[str]) -> str | None:
    """The control token that a template writes after the assistant's words; None if it writes none."""
    said = "0a9f2c71"
    turns = [("user", "a"), (ASSISTANT, said), ("user", "b")]
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = render(template, messages, add_generation_prompt=False, special_tokens=special_tokens)
    except ValueError:
        return None  # told where a chat is asked for
    if said not in text or not control_tokens:
        return None
    found = control_pattern(control_tokens).search(without_marks(text.split(said, 1)[1]))
    return found[0] if found else None


def control_pattern(control_tokens: Sequence[str]) -> re.Pattern[str]:
    """A regular expression that finds unbroken control tokens, the longest first."""
    longest_first = "|".join(map(re.escape, sorted(control_tokens, key=len, reverse=True)))
    return re.compile(f"(?<!{BROKEN})(?:{longest_first or '(?!)'})")
