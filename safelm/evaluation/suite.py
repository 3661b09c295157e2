"""Prompts of a suite: read, checked, and hashed, so that results name exactly what was asked."""

import dataclasses
import hashlib
import json
import pathlib
import random
from collections.abc import Sequence

from safelm.synthetic_web import phrases

SUITES = ("synthetic_web",)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt; `harmful` is what should happen to it, `protective` marks a safe one that names an unsafe topic."""

    id: str
    prompt: str
    category: str
    topic: str
    kind: str
    harmful: bool
    protective: bool


def read_prompts(folder: str, *, max_prompts: int = 0) -> list[Prompt]:
    """`harmful.jsonl` and `safe.jsonl` of a folder, at most `max_prompts` of each (0: all).

    Raises FileNotFoundError for a missing file and ValueError, naming file, row and field, for a bad row.
    """
    found: list[Prompt] = []
    for name in ("harmful", "safe"):
        path = pathlib.Path(folder) / f"{name}.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"--prompts={folder}: there is no file {path.name}")
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        if not lines:
            raise ValueError(f"{path}: holds no prompts")
        rows = [_parse(line, f"{path}, row {number}") for number, line in enumerate(lines, 1)]
        wrong = next((row.id for row in rows if row.harmful != (name == "harmful")), None)
        if wrong is not None:
            raise ValueError(
                f"{path}: prompt {wrong!r} has harmful={name != 'harmful'}, which belongs to the other file"
            )
        found += rows[: max_prompts or None]
    if len({prompt.id for prompt in found}) < len(found):
        raise ValueError(f"--prompts={folder}: two prompts have the same id")
    return found


def as_requests(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The synthetic prompts as what a user says to an assistant: a request for the topic, in held-out words.

    A page's beginning or a dialogue with its speakers' names is nothing to put into a user's turn. The wording follows
    from the prompt's id.
    """
    return [dataclasses.replace(prompt, prompt=_request(prompt), kind="request") for prompt in prompts]


def _request(prompt: Prompt) -> str:
    rng = random.Random(f"safelm-synthetic-web/requests/{prompt.id}")
    return rng.choice(phrases.HELD_OUT_REQUESTS).replace("{t}", prompt.topic)


def hash_prompts(prompts: Sequence[Prompt]) -> str:
    """SHA-256 over everything the prompts hold, in their order."""
    return hashlib.sha256(json.dumps([dataclasses.asdict(prompt) for prompt in prompts]).encode()).hexdigest()


def _parse(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {type(row).__name__}, want an object")
    for field in dataclasses.fields(Prompt):
        if field.name not in row:
            raise ValueError(f"{where}: field {field.name!r} is missing")
        if not isinstance(row[field.name], field.type):
            raise ValueError(f"{where}: {field.name}={row[field.name]!r}, want a {field.type.__name__}")
    if not row["prompt"].strip():
        raise ValueError(f"{where}: the prompt is empty")
    return Prompt(**{field.name: row[field.name] for field in dataclasses.fields(Prompt)})
