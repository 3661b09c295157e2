"""HF `datasets` and LitData for `scripts/bench/data.py`, in their own environment (.venv-bench); not started by hand.

Reads the documents that the parent wrote (<folder>/<source>/tokens.npy and lengths.npy), stores them as each library
does, then obeys lines on stdin, `<variant> <seconds>`: opens the variant anew, drains 16 batches, answers tokens/s.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


def documents(folder: str) -> Iterator[dict[str, np.ndarray]]:
    """The documents of a source, one after the other."""
    tokens = np.load(os.path.join(folder, "tokens.npy"), mmap_mode="r")
    ends = np.cumsum(np.load(os.path.join(folder, "lengths.npy")))
    for start, end in zip(np.append(0, ends[:-1]), ends, strict=True):
        yield {"input_ids": np.asarray(tokens[start:end])}


def litdata_tokens(index: int, folder: str) -> Iterator[Any]:
    """LitData's unit of work: a folder's documents as tensors."""
    import torch

    for document in documents(folder):
        yield torch.from_numpy(document["input_ids"].astype(np.int32))


def store_arrow(folder: str) -> None:
    """A source as an Arrow data set on disk."""
    import datasets

    features = datasets.Features({"input_ids": datasets.List(datasets.Value("uint16"))})
    made = datasets.Dataset.from_generator(
        documents, features=features, gen_kwargs={"folder": folder}, cache_dir=os.path.join(folder, "cache")
    )
    made.save_to_disk(os.path.join(folder, "arrow"), num_shards=8)


def store_litdata(folder: str) -> None:
    """A source as LitData's chunks of tokens, as LitGPT's data modules prepare theirs."""
    import litdata

    litdata.optimize(
        fn=functools.partial(litdata_tokens, folder=folder),
        inputs=[0],
        output_dir=os.path.join(folder, "litdata"),
        chunk_bytes="8MB",
        item_loader=litdata.TokensLoader(),
        num_workers=1,
    )


def group(rows: dict[str, list[np.ndarray]], seq_len: int) -> dict[str, list[np.ndarray]]:
    """transformers' run_clm packing: joins a thousand documents, cuts rows, drops what is left over."""
    joined = np.concatenate(rows["input_ids"]).astype(np.int64)
    packed = list(joined[: len(joined) // seq_len * seq_len].reshape(-1, seq_len))
    return {"input_ids": packed, "labels": [row.copy() for row in packed]}


def hugging_face(folders: dict[str, float], seq_len: int, batch_size: int, workers: int) -> Iterator[dict]:
    """Streaming from Arrow: shards and a buffer shuffled, sources mixed by document, packed while reading."""
    import datasets
    import torch

    sources = []
    for seed, folder in enumerate(folders):
        stored = datasets.load_from_disk(os.path.join(folder, "arrow")).to_iterable_dataset(num_shards=8)
        sources.append(stored.shuffle(seed=seed, buffer_size=1000, max_buffer_input_shards=4).repeat(None))  # 2 workers
    probabilities = [rate / sum(folders.values()) for rate in folders.values()]
    mixed = sources[0] if len(sources) == 1 else datasets.interleave_datasets(sources, probabilities, seed=0)
    mixed = mixed.with_format("numpy").map(
        functools.partial(group, seq_len=seq_len), batched=True, batch_size=1000, remove_columns=["input_ids"]
    )
    if not workers:
        return iter(mixed.batch(batch_size, drop_last_batch=True))
    loader = torch.utils.data.DataLoader(mixed.with_format("torch"), batch_size, num_workers=workers, drop_last=True)
    return iter(loader)


def litdata_rows(folders: dict[str, float], seq_len: int, batch_size: int, workers: int) -> Iterator[Any]:
    """LitGPT's way: StreamingDataset with a TokensLoader of seq_len + 1, mixed by CombinedStreamingDataset."""
    import litdata

    sources = [
        litdata.StreamingDataset(
            os.path.join(folder, "litdata"), item_loader=litdata.TokensLoader(seq_len + 1), shuffle=True, drop_last=True
        )
        for folder in folders
    ]
    weights = [rate / sum(folders.values()) for rate in folders.values()]
    mixed = sources[0]
    if len(sources) > 1:
        mixed = litdata.CombinedStreamingDataset(sources, weights=weights, seed=0, iterate_over_all=False)
    loader = litdata.StreamingDataLoader(
        mixed, batch_size=batch_size, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )
    while True:
        yield from loader


def litdata_stream(folders: dict[str, float], seq_len: int, batch_size: int, workers: int) -> Iterator[Any]:
    """The two arrays of a batch as litgpt/pretrain.py makes them."""
    for rows in litdata_rows(folders, seq_len, batch_size, workers):
        yield {"inputs": rows[:, :seq_len].contiguous().long(), "targets": rows[:, 1:].contiguous().long()}


def litdata_documents(folders: dict[str, float], seq_len: int, batch_size: int, workers: int) -> Iterator[Any]:
    """The five arrays that keep documents apart, found by their end token 0, as one would make them with numpy."""
    index = np.arange(seq_len, dtype=np.int32)
    for rows in litdata_rows(folders, seq_len, batch_size, workers):
        tokens = rows.numpy().astype(np.int32, copy=False)
        inputs = np.ascontiguousarray(tokens[:, :seq_len])
        is_end = inputs == 0
        starts = np.zeros_like(is_end)
        starts[:, 1:] = is_end[:, :-1]
        yield {
            "inputs": inputs,
            "targets": np.where(is_end, 0, tokens[:, 1:]),
            "positions": index - np.maximum.accumulate(np.where(starts, index, 0), axis=1),
            "segments": np.cumsum(starts, axis=1, dtype=np.int32) + 1,
            "mask": (~is_end).astype(np.float32),
        }


def touch(batch: Any) -> int:
    """Reads every byte of a batch; the number of rows."""
    for array in batch.values():
        array = np.asarray(array).reshape(-1)
        array.view(np.int64 if array.nbytes % 8 == 0 else array.dtype).sum()
    return max(len(array) for array in batch.values())


def measure(batches: Iterator[Any], seq_len: int, seconds: float) -> float:
    """Tokens a second over at least `seconds`, after draining what was read ahead."""
    for _ in range(16):
        touch(next(batches))
    rows, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        rows += touch(next(batches))
    return rows * seq_len / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rates", help="JSON: folder of a source -> its share")
    parser.add_argument("--seq_len", type=int, required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    args = parser.parse_args()
    folders = json.loads(args.rates)
    for folder in folders:
        store_arrow(folder)
        store_litdata(folder)
    one = dict(list(folders.items())[:1])
    make: dict[str, Callable[..., Iterator[Any]]] = {
        "datasets": hugging_face,
        "litdata": litdata_stream,
        "litdata-documents": litdata_documents,
    }
    answer({"ready": True})
    for line in sys.stdin:
        kind, sources, workers, seconds = line.split()
        chosen = one if sources == "1" else folders
        batches = make[kind](chosen, args.seq_len, args.batch_size, int(workers))
        answer({"rate": measure(batches, args.seq_len, float(seconds))})
        del batches


def answer(value: dict[str, Any]) -> None:
    print("BENCH " + json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
