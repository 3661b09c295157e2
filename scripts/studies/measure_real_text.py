"""What continuing a model on tagged real text did: held-out loss, AUROC of P(tag), SafeBeam beside greedy.

  python scripts/studies/measure_real_text.py --corpus=W/corpus --tokens=W/tokens --before=W/smollm2 --after=W/continued

Held-out documents only. AUROC of the mean P(tag) over a document's first --prefix_tokens tokens, harmful comments
(score 4, 5) against (a) pages of score 0 and (b) comments of score 1, which differ from the harmful ones in content
rather than in genre. No text is printed.
"""

import argparse
import dataclasses
import functools
import gzip
import json
from pathlib import Path

import numpy as np

from safelm import cli
from safelm.checkpoints.checkpoint import load_for_inference
from safelm.data.store import TokenStore
from safelm.evaluate.language_modeling import perplexity
from safelm.inference import Greedy, SafeBeam, generate, tag_probability
from safelm.stats.intervals import auroc
from safelm.text.prompting import text_prompt


def held_out(corpus: str, encode, scores: tuple[int, ...], *, prefix_tokens: int, count: int) -> list[list[int]]:
    """The first tokens of up to `count` held-out documents with these scores that are at least half that long."""
    found = []
    for path in sorted(Path(corpus, "raw_web").glob("validation-*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if row["metadata"]["harm_score"] in scores and len(found) < count:
                    tokens = encode(row["text"][: 20 * prefix_tokens])[:prefix_tokens]
                    if 2 * len(tokens) >= prefix_tokens:
                        found.append(tokens)
    if not found:
        raise ValueError(f"--corpus={corpus}: no held-out document of score {' or '.join(map(str, scores))}")
    return found


def measure(folder: str, flags: argparse.Namespace) -> dict:
    """All figures of one checkpoint."""
    config, params, tokenizer = load_for_inference(folder)
    result = {}
    for source in ("filtered_web", "harm_tagged_web"):
        store = TokenStore.open(f"{flags.tokens}/{source}/validation", vocab_hash=tokenizer.hash)
        short = dataclasses.replace(config, max_seq_len=256)  # documents in pieces as long as the rows trained on
        begin_ids = tokenizer.conventions.begin_ids
        measured = perplexity(short, params, store, begin_ids=begin_ids, max_documents=flags.documents, batch_size=4)
        result[f"loss/{source}"] = measured["loss_nats"]
    groups = {"harmful": (4, 5), "pages": (0,), "comments": (1,)}
    encode = functools.partial(text_prompt, tokenizer)
    texts = {
        name: held_out(flags.corpus, encode, scores, prefix_tokens=flags.prefix_tokens, count=flags.prompts)
        for name, scores in groups.items()
    }
    tag_id = tokenizer.harm_tag_id
    means = {
        name: np.array([p.mean() for p in tag_probability(config, params, lists, harm_tag_id=tag_id)])
        for name, lists in texts.items()
    }
    result |= {f"mean P(tag)/{name}": float(values.mean()) for name, values in means.items()}
    result |= {f"AUROC harmful vs {name}": str(auroc(means["harmful"], means[name])) for name in ("pages", "comments")}
    prompts = [tokens[: flags.prefix_tokens // 2] for tokens in texts["harmful"][: flags.samples]]
    for method in (Greedy(), SafeBeam()):
        done = generate(
            config,
            params,
            prompts,
            method,
            max_new_tokens=flags.max_new_tokens,
            end_ids=[tokenizer.eos_id],
            harm_tag_id=tag_id,
            batch_size=4,
            show_progress=True,
        )
        name = type(method).__name__
        result[f"{name}: mean P(tag) along continuations"] = float(np.mean([np.mean(g.tag_probs) for g in done]))
        result[f"{name}: nats per token"] = float(np.mean([-g.logprob / len(g.tokens) for g in done]))
        result[f"{name}: mean tokens"] = float(np.mean([len(g.tokens) for g in done]))
    return result


def main(flags: argparse.Namespace) -> None:
    """Prints one line a figure, before and after."""
    before, after = (measure(folder, flags) for folder in (flags.before, flags.after))
    for name in before:
        shown = [value if isinstance(value, str) else f"{value:.4g}" for value in (before[name], after[name])]
        print(f"{name:45s} before {shown[0]:24s} after {shown[1]}")


if __name__ == "__main__":
    example = "python scripts/studies/measure_real_text.py --corpus=W/corpus --tokens=W/tokens --before=W/a --after=W/b"
    arguments = cli.parser("scripts.studies.measure_real_text", __doc__, example)
    arguments.add_argument("--corpus", required=True, help="folder of safelm.ladder.prepare_real_text")
    arguments.add_argument("--tokens", required=True, help="token stores of safelm.cache_tasks")
    arguments.add_argument("--before", required=True, help="checkpoint before training")
    arguments.add_argument("--after", required=True, help="checkpoint after training")
    arguments.add_argument("--documents", type=int, default=60, help="held-out documents a source, for the loss")
    arguments.add_argument("--prompts", type=int, default=150, help="held-out documents a group, for the AUROC")
    arguments.add_argument("--prefix_tokens", type=int, default=32, help="of each of them")
    arguments.add_argument("--samples", type=int, default=8, help="continuations a method")
    arguments.add_argument("--max_new_tokens", type=int, default=32, help="of each continuation")
    cli.run(main, arguments)
