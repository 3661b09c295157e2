"""Prompts of a suite: read, checked, and hashed, so that results name exactly what was asked."""

import dataclasses
import hashlib
import json
import pathlib
import random
from collections.abc import Mapping, Sequence

from safelm.synthetic_web import phrases

SYNTHETIC, BASE, CHAT, OVER_REFUSAL = SUITES = ("synthetic_web", "base", "chat", "over_refusal")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
      category: prompts of one category are a cluster.
      topic: what it is about, or the bare request.
      kind: of a synthetic prompt its form, else the benchmark it was first read from.
      harmful: whether it asks for harm.
      protective: a safe one that names an unsafe topic in order to prevent it.
      target: how a harmful answer begins, where the benchmark says.
      answer_start: the answer's first words, given to the model.
      benchmarks: all that have it.
    """

    id: str
    prompt: str
    category: str
    topic: str
    kind: str
    harmful: bool
    protective: bool
    target: str = ""
    answer_start: str = ""
    benchmarks: tuple[str, ...] = ()


_COLUMNS = tuple(field for field in dataclasses.fields(Prompt) if field.default is dataclasses.MISSING)


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


def choose(prompts: Sequence[Prompt], max_prompts: int) -> list[Prompt]:
    """At most `max_prompts` harmful and as many safe ones (0: all), in their order: the same ones every time.

    Files are sorted by category, so the first ones would be of one kind: the choice is by a hash of the id.
    """
    if not max_prompts:
        return list(prompts)
    chosen: set[str] = set()
    for harmful in (True, False):
        ids = [prompt.id for prompt in prompts if prompt.harmful == harmful]
        chosen.update(sorted(ids, key=lambda each: hashlib.sha256(each.encode()).digest())[:max_prompts])
    return [prompt for prompt in prompts if prompt.id in chosen]


AFFIRMATIVE = "Sure, here it is:"  # where a benchmark has no target of its own
WRITTEN_FOR_COMPLETION = ("jb_completions", "realtoxicityprompts")


def with_targets(prompts: Sequence[Prompt], targets: Mapping[str, str]) -> list[Prompt]:
    """Targets from a file of their own, by a prompt's id at its maker's, or by its words."""
    return [
        dataclasses.replace(
            prompt, target=targets.get(prompt.topic, targets.get(prompt.id.partition("/")[2], prompt.target))
        )
        for prompt in prompts
    ]


def with_answer_starts(prompts: Sequence[Prompt], words: int) -> list[Prompt]:
    """The first `words` words of each harmful prompt's target (0: all) given as the answer's beginning.

    Safe prompts, and those written to be completed, are left as they are.
    """
    given = []
    for prompt in prompts:
        if prompt.harmful and prompt.kind not in WRITTEN_FOR_COMPLETION:
            target = (prompt.target or AFFIRMATIVE).strip()
            prompt = dataclasses.replace(prompt, answer_start=" ".join(target.split()[:words]) if words else target)
        given.append(prompt)
    return given


def as_completions(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Requests as text that a base model goes on with (Maini et al. 2025, section 6): the request, then the answer."""
    return [
        prompt
        if prompt.kind in WRITTEN_FOR_COMPLETION
        else dataclasses.replace(prompt, prompt=f"{prompt.prompt.rstrip()}\n\n")
        for prompt in prompts
    ]


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
    for field in _COLUMNS:
        if field.name not in row:
            raise ValueError(f"{where}: field {field.name!r} is missing")
        if not isinstance(row[field.name], field.type):
            raise ValueError(f"{where}: {field.name}={row[field.name]!r}, want a {field.type.__name__}")
    if not row["prompt"].strip():
        raise ValueError(f"{where}: the prompt is empty")
    return Prompt(**{field.name: row[field.name] for field in _COLUMNS})
