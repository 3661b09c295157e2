"""Embedding of texts against transformers and sentence-transformers' own batching: documents/s, MB/s, ratios, one run.

    python scripts/bench/embedding.py                                  # MiniLM and SmolLM2-135M layer 15, 2 threads
    python scripts/bench/embedding.py --backbones=minilm --texts='corpus/*.jsonl.gz' --documents=2000 --rounds=5

All sides embed the same texts in float32 with the same weights on the same threads, and their embeddings must agree
within 1e-4 (a unit of length), or the run ends with an error. A text longer than the backbone's chunk is cut there on
all sides: rivals truncate, so ours gets the truncated text too. What is timed is text in, vectors out, tokenising
included, compilation not (it is printed: once a process, one program a bucket). The rivals, torch with
transformers' model, its fused attention and inference mode:

- sorted: what sentence-transformers' `encode` does: texts sorted by length, longest first, batches of 32, padded to the
  longest of a batch, pooled after each; the batch size of 4 to 64 that was fastest on a sample is used.
- in order: batches of 32 as they come, as transformers' pipelines and a streaming job do it.

In every round each side runs once, ours first in even rounds and last in odd ones; a ratio is theirs / ours in a round,
and the table gives the median over rounds with the smallest and largest.

Measured on two cores of an AMD EPYC with AVX-512, two threads on all sides, load 2 (the run itself), JAX 0.10, compile
cache warm. Ratios to the sorted batches (of 8) and to those in order; in runs that chose batches of 4 for the rival
2.39 (2.29 to 2.45; synthetic web, 200 documents) and 2.21 (2.13 to 2.32; C4, 100):

| backbone, texts, median tokens                                | documents/s |  MB/s | sorted              | in order |
|---------------------------------------------------------------|------------:|------:|---------------------|---------:|
| minilm, synthetic web, `--documents=400`, 132                 |       117.6 | 0.069 | 2.41 (2.38 to 2.43) |     3.92 |
| minilm, C4's validation pages, `--documents=200`, 229         |        85.3 | 0.070 | 2.20 (1.86 to 2.32) |     3.14 |
| minilm, comments of civil_toxic, `--documents=500`, 33        |       326.1 | 0.065 | 2.34 (2.29 to 3.09) |     7.62 |
| smollm2, synthetic web, `--documents=64 --rounds=3`, 128      |        24.6 | 0.014 | 2.52 (2.51 to 2.53) |     4.39 |

Where MiniLM's time goes there: tokenising 0.6%, making batches nothing to speak of. Two cores do 450 to 490 GFLOP/s in
float32 products of these shapes (PyTorch 210 to 220), so that the products of 71,077 tokens, 1,513 GFLOP, take 3.2 s at
best; without attention, GELU and layer norm a batch of 512 tokens takes 26 ms (products alone 23), with them 35.
Of the gain over one batch at a time on both cores, bucket lengths of all multiples of 8 give 7% (padding 11% to 4%) and
a core for each batch 13%. They cost compilation: up to 32 programs for MiniLM, three to five seconds a process.
"""

import glob
import gzip
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from safelm import cli

RIVAL_BATCH = 32
TOLERANCE = 1e-4


def read_texts(pattern: str | None, count: int) -> list[str]:
    """The column `text` of jsonl(.gz) files, or pages of the synthetic web."""
    if pattern is None:
        from safelm.synthetic_web import corpus

        rows = (row for number in range(count) for _, row in corpus.rows(0, "train", number))
        return [row["text"] for row, _ in zip(rows, range(count), strict=False)]
    texts: list[str] = []
    for path in sorted(glob.glob(pattern)):
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            texts += [json.loads(line)["text"] for line in file]
        if len(texts) >= count:
            break
    if not texts:
        raise ValueError(f"--texts={pattern}: no texts found")
    return texts[:count]


class Rival:
    """transformers' model in torch, with sentence-transformers' way of making batches."""

    def __init__(self, name: str, backbone: Any):
        import torch

        self._torch, self._backbone = torch, backbone
        self._model, self._batch_size = _torch_model(name), RIVAL_BATCH

    def tune(self, texts: Sequence[str]) -> int:
        """Takes the fastest batch size on a sample."""
        seconds = {}
        for self._batch_size in (4, 8, 16, 32, 64):
            self.embed_sorted(texts[:32])
            start = time.perf_counter()
            self.embed_sorted(texts)
            seconds[self._batch_size] = time.perf_counter() - start
        self._batch_size = min(seconds, key=seconds.__getitem__)
        return self._batch_size

    def embed_sorted(self, texts: Sequence[str]) -> Any:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        return self._embed(texts, order, self._batch_size)

    def embed_in_order(self, texts: Sequence[str]) -> Any:
        return self._embed(texts, range(len(texts)), RIVAL_BATCH)

    def _embed(self, texts: Sequence[str], order: Sequence[int], batch_size: int) -> Any:
        import numpy as np

        found = np.empty((len(texts), self._backbone.dim), np.float32)
        for start in range(0, len(order), batch_size):
            batch = list(order[start : start + batch_size])
            found[batch] = self._forward([texts[i] for i in batch])
        return found

    def _forward(self, texts: Sequence[str]) -> Any:
        torch, tokenizer = self._torch, self._backbone.tokenizer
        chunks = [chunk for _, chunk in tokenizer.chunks(texts, self._backbone.max_tokens)]
        longest = max(map(len, chunks))
        tokens = torch.full((len(chunks), longest), tokenizer.pad_id, dtype=torch.long)
        mask = torch.zeros((len(chunks), longest), dtype=torch.long)
        for row, chunk in enumerate(chunks):
            tokens[row, : len(chunk)] = torch.from_numpy(chunk)
            mask[row, : len(chunk)] = 1
        with torch.inference_mode():
            states = self._model(input_ids=tokens, attention_mask=mask).last_hidden_state
            pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            return (torch.nn.functional.normalize(pooled) if self._backbone.is_normalized else pooled).numpy()


def _torch_model(name: str) -> Any:
    import torch
    import transformers

    from safelm.safety.embedding import installed_path

    path = installed_path(name)
    if name == "minilm":
        return transformers.AutoModel.from_pretrained(path, attn_implementation="sdpa").float().eval()
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from safelm.safety.embedding.backbone import SMOLLM2_LAYER

    settings = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    whole = transformers.LlamaForCausalLM(settings)
    whole.load_state_dict(
        load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=whole)["tensors"], strict=False
    )
    cut = whole.model
    cut.layers, cut.norm = cut.layers[:SMOLLM2_LAYER], torch.nn.Identity()  # no more work than the layer needs
    return cut.float().eval()


def truncated(backbone: Any, texts: Sequence[str]) -> list[str]:
    """Every text cut in characters until it fits into one chunk."""
    cut = []
    for text in texts:
        while len(list(backbone.tokenizer.chunks([text], backbone.max_tokens))) > 1:
            text = text[: int(len(text) * 0.9)]
        cut.append(text)
    return cut


def measure(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def check_equal(name: str, ours: Any, theirs: Any) -> float:
    """The largest difference as a share of an embedding's length; ValueError if it is above the tolerance."""
    import numpy as np

    difference = float((np.abs(ours - theirs).max(axis=1) / np.linalg.norm(theirs, axis=1)).max())
    if difference > TOLERANCE:
        raise ValueError(f"{name}: embeddings differ by {difference:.1e}, more than {TOLERANCE}")
    return difference


def bench(name: str, texts: Sequence[str], rounds: int) -> None:
    from safelm.safety.embedding import Embedder, load_backbone

    backbone = load_backbone(name)
    texts = truncated(backbone, texts)
    embedder, rival = Embedder(backbone), Rival(name, backbone)
    start = time.perf_counter()
    ours, _ = embedder.embed(texts)
    first = time.perf_counter() - start
    size = rival.tune(texts[: min(len(texts), 128)])
    difference = max(
        check_equal(name, ours, rival.embed_sorted(texts)), check_equal(name, ours, rival.embed_in_order(texts))
    )
    sides = {
        "safelm": lambda: embedder.embed(texts),
        f"sentence-transformers' batches of {size}": lambda: rival.embed_sorted(texts),
        f"transformers, batches of {RIVAL_BATCH} in order": lambda: rival.embed_in_order(texts),
    }
    seconds = measure(sides, rounds)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokens = sorted(len(chunk) for _, chunk in backbone.tokenizer.chunks(texts, backbone.max_tokens))
    print(
        f"{name}: {len(texts)} texts, {megabytes:.2f} MB, {sum(tokens)} tokens (median {statistics.median(tokens)}, "
        f"largest {tokens[-1]})"
    )
    print(f"embeddings within {difference:.1e}; our first pass, compiling: {first:.1f} s")
    for side, values in seconds.items():
        middle = statistics.median(values)
        ratios = [value / ours_s for value, ours_s in zip(values, seconds["safelm"], strict=True)]
        print(
            f"| {side} | {len(texts) / middle:.1f} documents/s | {megabytes / middle:.3f} MB/s | "
            f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )


def main() -> None:
    parser = cli.parser("scripts.bench.embedding", __doc__)
    parser.add_argument("--backbones", default="minilm,smollm2")
    parser.add_argument("--texts", help="jsonl(.gz) files with a column text; the synthetic web when not given")
    parser.add_argument("--documents", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--devices", type=int, default=1, help="CPU devices of ours: N single-threaded ones for 2 and up"
    )
    arguments = parser.parse_args()
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={arguments.devices}"
    if arguments.threads == 1 or arguments.devices > 1:
        flags += " --xla_cpu_multi_thread_eigen=false"
    os.environ |= {"OMP_NUM_THREADS": str(arguments.threads), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])  # the same cores for all sides
    import torch

    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads, {arguments.devices} devices of ours, load {os.getloadavg()[0]:.1f}")
    texts = read_texts(arguments.texts, arguments.documents)
    for name in arguments.backbones.split(","):
        bench(name, texts, arguments.rounds)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"scripts/bench/embedding.py: {error}")
