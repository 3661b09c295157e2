"""Tokens/s of caching a SeqIO task against tokenizing document by document: compare the ratio of one run, not rates.

    python scripts/bench/cache.py [--tokenizer=DIR_OR_GGUF] [--megabytes=24]

Both read the same generated web-like files through the same source, filter and harm tag. The slow way maps
`vocabulary.encode_tf` over single documents, as `seqio.preprocessors.tokenize` does, and writes nothing.
"""

import gzip
import json
import os
import tempfile
import time

import numpy as np

from safelm import cli
from safelm.text.tokenizer import Tokenizer

_WORD_COUNT = 8000


def main() -> None:
    """Prints both rates and their ratio."""
    parser = cli.parser("scripts.bench.cache", __doc__)
    parser.add_argument("--tokenizer", help="default: one trained on the generated words")
    parser.add_argument("--megabytes", type=int, default=24, help="of generated text")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words = _words(np.random.default_rng(0))
        tokenizer = os.path.join(folder, "tokenizer")
        trained = Tokenizer.from_pretrained(flags.tokenizer) if flags.tokenizer else Tokenizer.train(words * 2, 4096)
        trained.save(tokenizer)  # as JSON, which loads in a second; reading a GGUF vocabulary takes several
        _write_corpus(os.path.join(folder, "corpus", "raw_web"), words, flags.megabytes)
        _measure(folder, tokenizer)


def _measure(folder: str, tokenizer: str) -> None:
    from data_tasks import tasks
    from safelm import cache_tasks
    from safelm.data.store import TokenStore

    corpus, output = os.path.join(folder, "corpus"), os.path.join(folder, "tokens")
    tasks.register(corpus, tokenizer, settings={"validation_fraction": 0.0})
    one_by_one_tokens, one_by_one_seconds = _one_by_one("safelm_raw_web")
    argv = ["--tasks=raw_web", f"--data_dir={corpus}", f"--tokenizer={tokenizer}", f"--output={output}"]
    started = time.perf_counter()
    cache_tasks.main(
        cache_tasks.arguments().parse_args([*argv, "--splits=train", "--validation_fraction=0", "--workers=1"])
    )
    seconds = time.perf_counter() - started
    tokens = TokenStore.open(os.path.join(output, "raw_web", "train")).num_tokens
    rate, slow_rate = tokens / seconds, one_by_one_tokens / one_by_one_seconds
    print(f"one by one, nothing written: {slow_rate:12,.0f} tokens/s ({one_by_one_tokens:,} tokens)")
    print(f"cache_tasks, one process:    {rate:12,.0f} tokens/s ({tokens:,} tokens)")
    print(f"ratio:                       {rate / slow_rate:12.2f}")


def _one_by_one(task_name: str) -> tuple[int, float]:
    import seqio

    task = seqio.get_mixture_or_task(task_name)
    vocabulary = task.output_features["targets"].vocabulary
    vocabulary.encode("loaded before the clock starts")
    started = time.perf_counter()
    documents = task.source.get_dataset(split="train", shuffle=False).map(lambda e: vocabulary.encode_tf(e["text"]))
    tokens = sum(len(ids) + 1 for ids in documents.as_numpy_iterator())
    return tokens, time.perf_counter() - started


def _words(generator: np.random.Generator) -> list[str]:
    letters, lengths = np.array(list("etaoinshrdlucmfwypvbgk")), generator.integers(2, 9, _WORD_COUNT)
    weights = 1 / np.arange(2, len(letters) + 2)
    return ["".join(generator.choice(letters, length, p=weights / weights.sum())) for length in lengths]


def _write_corpus(folder: str, words: list[str], megabytes: int) -> None:
    generator, written, shard = np.random.default_rng(1), 0, 0
    frequencies = 1 / np.arange(2, _WORD_COUNT + 2)
    os.makedirs(folder)
    while written < megabytes << 20:
        with gzip.open(os.path.join(folder, f"train-{shard:05d}.jsonl.gz"), "wt", compresslevel=1) as file:
            for i in range(2000):
                length = int(generator.integers(50, 900))
                text = " ".join(generator.choice(words, length, p=frequencies / frequencies.sum()))
                file.write(json.dumps({"id": f"{shard}-{i}", "text": text, "harm_score": i % 6}) + "\n")
                written += len(text)
        shard += 1


if __name__ == "__main__":
    main()
