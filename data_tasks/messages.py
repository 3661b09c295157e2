"""Reads a row's conversation as published sets write it: a list of messages, each with a speaker and a text.

The list is called `messages`, `conversations` or `conversation`; a message has `role` and `content`, or ShareGPT's
`from` and `value`. Content is a string or a list of text parts. Roles become system, user, assistant and tool; tool
calls appear in the assistant's content as `<tool_call>` elements around their JSON. A system prompt in a column of its
own, `system` or `system_prompt`, becomes the first message.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from safelm.documents import MalformedError
from safelm.text.chat_template import ASSISTANT

COLUMNS = ("messages", "conversations", "conversation")
SYSTEM_COLUMNS = ("system", "system_prompt")
Messages = list[dict[str, str]]
_SYSTEM, _USER, _TOOL = "system", "user", "tool"
_ROLES = {
    **dict.fromkeys((_SYSTEM, "developer"), _SYSTEM),
    **dict.fromkeys((_USER, "human"), _USER),
    **dict.fromkeys((ASSISTANT, "gpt", "chatgpt", "bot", "model", "bard", "bing", "function_call"), ASSISTANT),
    **dict.fromkeys((_TOOL, "function", "function_response", "observation", "ipython", "environment"), _TOOL),
}


def read_messages(row: Mapping[str, Any]) -> Messages:
    """The row's messages with `role` and `content`, without empty system messages.

    Raises MalformedError for a message of another form or role, an empty user or assistant message, or a conversation
    without words of the assistant.
    """
    column = next((name for name in COLUMNS if row.get(name) is not None), COLUMNS[0])
    found = row.get(column)
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise MalformedError(f"field {column!r} is no list of messages")
    messages = [_message(message, column) for message in found]
    if all(message["role"] != ASSISTANT for message in messages):
        raise MalformedError(f"field {column!r} has nothing that the assistant says")
    prompt = next((row[name] for name in SYSTEM_COLUMNS if isinstance(row.get(name), str)), "")
    if messages[0]["role"] != _SYSTEM:
        messages.insert(0, {"role": _SYSTEM, "content": prompt})
    return [message for message in messages if message["role"] != _SYSTEM or message["content"].strip()]


def _message(message: Any, column: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise MalformedError(f"field {column!r} holds what is no message")
    speaker, said = ("role", "content") if message.get("role") is not None else ("from", "value")
    role = message.get(speaker)
    if not isinstance(role, str) or role.lower() not in _ROLES:
        known = ", ".join(dict.fromkeys(_ROLES.values()))
        raise MalformedError(f"field {column!r} holds one whose role is none of {known}")
    role = _ROLES[role.lower()]
    content = _content(message.get(said), said)
    if role == ASSISTANT:
        content = "\n".join(part for part in (content, *_tool_calls(message)) if part)
    if not content.strip() and role in (_USER, ASSISTANT):
        is_missing = message.get(said) is None
        raise MalformedError(f"field {said!r} is missing" if is_missing else f"field {said!r} is empty")
    return {"role": role, "content": content}


def _content(value: Any, name: str) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "".join(_part(part, name) for part in value)
    if value is not None and not isinstance(value, str):
        raise MalformedError(f"field {name!r} is not a string")
    return value or ""


def _part(part: Any, name: str) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        raise MalformedError(f"field {name!r} holds a part that is no text")
    return text


def _tool_calls(message: Mapping[str, Any]) -> list[str]:
    calls = message.get("tool_calls") or []
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise MalformedError("field 'tool_calls' is no list")
    return [f"<tool_call>\n{_call(call)}\n</tool_call>" for call in calls]


def _call(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise MalformedError("field 'tool_calls' holds one without a name")
    arguments = function.get("arguments")
    try:
        if isinstance(arguments, str):  # JSON, as OpenAI's API has it
            with contextlib.suppress(ValueError):
                arguments = json.loads(arguments)
        return json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False, default=str)
    except RecursionError:
        raise MalformedError("field 'tool_calls' is nested too deep") from None
