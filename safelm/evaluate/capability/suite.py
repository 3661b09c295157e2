"""Runs the nine tasks on a loaded model and returns accuracies with intervals, as in the paper's table 1."""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from safelm.evaluate.capability import documents
from safelm.io.files import file_sha256
from safelm.models import decoder as model
from safelm.stats.intervals import Estimate, rate
from safelm.text.tokenizer import Tokenizer

# name -> (the metric of the table, its filter, the column's head). Length-normalised where choices are sentences, as
# is usual for these tasks; the paper doesn't say.
TASKS: dict[str, tuple[str, str, str]] = {
    "arc_challenge": ("acc_norm", "none", "ARC-C"),
    "arc_easy": ("acc_norm", "none", "ARC-E"),
    "commonsense_qa": ("acc", "none", "CSQA"),
    "gsm8k": ("exact_match", "flexible-extract", "GSM8K"),
    "openbookqa": ("acc_norm", "none", "OBQA"),
    "piqa": ("acc_norm", "none", "PIQA"),
    "triviaqa": ("exact_match", "remove_whitespace", "TriviaQA"),
    "winogrande": ("acc", "none", "WinoGrande"),
    "mmlu": ("acc", "none", "MMLU"),
}
TASK_FOLDER = pathlib.Path(__file__).parent / "tasks"


@dataclasses.dataclass(frozen=True)
class CapabilityOptions:
    """Settings that all models share.

    Attributes:
      data: folders with the benchmarks' files.
      max_items: items per task, drawn at random with a fixed seed; 0 for all.
      num_fewshot: examples for GSM8K, the only task with examples (the harness's default is 5; none without
        gsm8k_train).
      max_gen_toks: the most tokens per answer; 0 leaves it to the task (TriviaQA 32, GSM8K 256).
      chat: whether prompts go through the chat template.
    """

    data: tuple[str, ...]
    tasks: tuple[str, ...] = tuple(TASKS)
    max_items: int = 0
    num_fewshot: int = 5
    max_gen_toks: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        for name in self.tasks:
            if name not in TASKS:
                raise ValueError(f"--tasks={','.join(self.tasks)}: unknown task {name!r}, one of {', '.join(TASKS)}")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"--tasks={','.join(self.tasks)}: want at least one task, each once")


def run_capability(
    config: model.ModelConfig, params: model.Params, tokenizer: Tokenizer, options: CapabilityOptions, **model_args: Any
) -> dict[str, Any]:
    """Every task's accuracy and their average; `model_args` go to `SafeLM`.

    Raises ModuleNotFoundError without the package lm_eval, and the errors of reading the data.
    """
    from safelm.evaluate.capability.lm_eval_model import SafeLM

    return run_harness(SafeLM(config, params, tokenizer, **model_args), options)


def run_harness(language_model: Any, options: CapabilityOptions) -> dict[str, Any]:
    """Like `run_capability` for any model of the harness, to compare two implementations.

    Returns {"tasks": name -> {"metric", "value", "low", "high", "cases", "metrics", "correct", "responses"}, "average":
    .., "protocol": ..}; `correct` is the metric of each item in file order, and `responses` a hash of each generated
    text.
    """
    protocol = task_protocol(options)
    with _quiet():
        samples = _samples(language_model, options)
    found = {name: _task_result(name, samples[f"safelm_{name}"]) for name in options.tasks}
    return {
        "tasks": found,
        "average": dataclasses.asdict(average([_estimate(result) for result in found.values()])),
        "protocol": protocol,
    }


def task_protocol(options: CapabilityOptions) -> dict[str, Any]:
    """Everything except the model that decides the numbers. Raises the errors of finding the files."""
    files = {name: documents.find(name, options.data) for name in options.tasks}
    if "gsm8k" in files and documents.candidates("gsm8k_train", options.data):
        files["gsm8k_train"] = documents.find("gsm8k_train", options.data)
    return {
        "harness": importlib.metadata.version("lm_eval"),
        **{key: value for key, value in dataclasses.asdict(options).items() if key != "data"},
        "files": {name: file_sha256(str(path)) for name, path in files.items()},
        "task_files": _task_files_hash(),
    }


def merge(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges results of one model on different tasks. Raises ValueError if their settings differ."""
    tasks = {name: task for result in results for name, task in result["tasks"].items()}
    protocol = dict(results[0]["protocol"])
    for result in results:
        for key, value in result["protocol"].items():
            if key not in ("tasks", "files") and value != protocol[key]:
                raise ValueError(f"tasks were run under different protocols: {key} is {protocol[key]} and {value}")
    protocol["tasks"] = list(tasks)
    protocol["files"] = {name: file for result in results for name, file in result["protocol"]["files"].items()}
    mean = average([_estimate(task) for task in tasks.values()])
    return {"tasks": tasks, "average": dataclasses.asdict(mean), "protocol": protocol}


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The plain mean over tasks, whose items differ, with the interval that theirs give (Zou and Donner 2008)."""
    value = sum(estimate.value for estimate in estimates) / len(estimates)
    below = math.hypot(*(each.value - each.low for each in estimates)) / len(estimates)
    above = math.hypot(*(each.high - each.value for each in estimates)) / len(estimates)
    return Estimate(value, value - below, value + above, sum(each.cases for each in estimates))


def _samples(language_model: Any, options: CapabilityOptions) -> dict[str, list[dict[str, Any]]]:
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    metadata = {"data": ",".join(options.data), "max_items": options.max_items}
    manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False, metadata=metadata)
    loaded = manager.load([f"safelm_{name}" for name in options.tasks])
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot"):
            task.set_config(key="num_fewshot", value=options.num_fewshot if "train" in task.dataset else 0)
        if options.max_gen_toks and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value={"max_gen_toks": options.max_gen_toks}, update=True)
        task.set_fewshot_seed(seed=1234)
    results = evaluate(
        language_model,
        loaded,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=options.chat,
        fewshot_as_multiturn=options.chat,
    )
    return results["samples"]


def _task_result(name: str, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    metric, chosen_filter, _ = TASKS[name]
    values: dict[str, list[float]] = {}
    for sample in sorted(samples, key=lambda each: each["doc_id"]):
        for each in sample["metrics"]:
            key = each if sample["filter"] == "none" else f"{each},{sample['filter']}"
            values.setdefault(key, []).append(float(sample[each]))
    main = metric if chosen_filter == "none" else f"{metric},{chosen_filter}"
    return {
        "metric": main,
        **dataclasses.asdict(_rate(values[main])),
        "metrics": {key: dataclasses.asdict(_rate(each)) for key, each in values.items()},
        "correct": {key: [int(value) for value in each] for key, each in values.items()},
        "responses": _response_hashes(samples),
    }


def _response_hashes(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """A hash of each item's generated text; nothing for a task without generation."""
    texts = {sample["doc_id"]: sample["resps"][0][0] for sample in samples}
    if not all(isinstance(text, str) for text in texts.values()):
        return []
    return [hashlib.sha256(texts[item].encode()).hexdigest()[:12] for item in sorted(texts)]


def _rate(values: Sequence[float]) -> Estimate:
    return rate(int(np.sum(values)), len(values))


def _estimate(result: Mapping[str, Any]) -> Estimate:
    return Estimate(**{field.name: result[field.name] for field in dataclasses.fields(Estimate)})


def _task_files_hash() -> str:
    contents = {path.name: path.read_text(encoding="utf-8") for path in sorted(TASK_FOLDER.iterdir()) if path.is_file()}
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager that silences the harness's advice, a paragraph per task."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
