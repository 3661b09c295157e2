"""Reads, checks and hashes the prompts of a suite, so that results identify them exactly."""

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
    """A prompt.

    Attributes:
      category: prompts of one category are a cluster.
      topic: the topic, or the bare request.
      kind: the form of a synthetic prompt, otherwise the benchmark it was first read from.
      harmful: whether it asks for harm.
      protective: whether it is a safe prompt that names an unsafe topic in order to prevent it.
      target: the beginning of a harmful answer, if the benchmark has one.
      answer_start: the answer's first words, prefilled for the model.
      benchmarks: all benchmarks that have the prompt.
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
    """Reads `harmful.jsonl` and `safe.jsonl` of a folder, at most `max_prompts` of each (0: all).

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
    """At most `max_prompts` harmful and as many safe prompts (0: all), in their order and the same every time.

    Files are sorted by category, so the first prompts would be of one kind; a hash of the id chooses instead.
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
    """The prompts with targets from a separate file, matched by the publisher's id or by the prompt's words."""
    return [
        dataclasses.replace(
            prompt, target=targets.get(prompt.topic, targets.get(prompt.id.partition("/")[2], prompt.target))
        )
        for prompt in prompts
    ]


def with_answer_starts(prompts: Sequence[Prompt], words: int) -> list[Prompt]:
    """The prompts with the first `words` words (0: all) of each harmful one's target prefilled.

    Safe prompts, and prompts written to be completed, are unchanged.
    """
    given = []
    for prompt in prompts:
        if prompt.harmful and prompt.kind not in WRITTEN_FOR_COMPLETION:
            target = (prompt.target or AFFIRMATIVE).strip()
            prompt = dataclasses.replace(prompt, answer_start=" ".join(target.split()[:words]) if words else target)
        given.append(prompt)
    return given


def as_completions(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Requests as text for a base model to continue (Maini et al. 2025, section 6): the request, then the answer."""
    return [
        prompt
        if prompt.kind in WRITTEN_FOR_COMPLETION
        else dataclasses.replace(prompt, prompt=f"{prompt.prompt.rstrip()}\n\n")
        for prompt in prompts
    ]


def as_requests(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The synthetic prompts as user messages to an assistant: a request for the topic, in held-out words.

    A page's beginning or a dialogue with speaker names would not fit a user's turn. The prompt's id decides the
    wording.
    """
    return [dataclasses.replace(prompt, prompt=_request(prompt), kind="request") for prompt in prompts]


def _request(prompt: Prompt) -> str:
    rng = random.Random(f"safelm-synthetic-web/requests/{prompt.id}")
    return rng.choice(phrases.HELD_OUT_REQUESTS).replace("{t}", prompt.topic)


def hash_prompts(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of all fields of the prompts, in order."""
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
