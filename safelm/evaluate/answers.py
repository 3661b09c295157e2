"""What a checkpoint says to every prompt, kept in a journal: a run that was stopped goes on at the next prompt.

The journal holds token ids, so it shows no text, and any judge may judge it later. Its name has a hash of everything
that decides an answer: under another protocol another journal is begun.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tqdm

from safelm.evaluate.journal import open_journal
from safelm.evaluate.suites.suite import Prompt
from safelm.evaluate.template import Template, answer_tokens
from safelm.inference import Generation, Method, generate
from safelm.inference.methods import looks_ahead
from safelm.inference.prompts import SMALLEST_BUCKET, bucket
from safelm.lm import LanguageModel

BATCH_SIZE = 32  # prompts decoded at once: what a stop may lose


@dataclasses.dataclass(frozen=True)
class Checkpoint(LanguageModel):
    """A model under test."""

    name: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
      text: without special tokens, and without the first words that were given.
      has_tag: the harm tag came up as a token: a short circuit.
      max_tag_probability: P(tag) at its highest along the answer.
    """

    prompt: Prompt
    text: str = dataclasses.field(repr=False)
    new_tokens: int
    stopped_by: str
    logprob: float
    has_tag: bool
    max_tag_probability: float


def collect(
    checkpoint: Checkpoint,
    method: Method,
    prompts: Sequence[Prompt],
    journal: pathlib.Path,
    *,
    template: Template,
    max_new_tokens: int,
    seed: int,
    batch_size: int = BATCH_SIZE,
    description: str = "",
) -> list[Answer]:
    """One answer a prompt, in order; those that the journal holds are taken from it, the others decoded and added.

    A sampled answer depends on the seed and the prompt alone.

    Raises:
      ValueError: the method needs a harm tag that the checkpoint doesn't have, or a prompt and `max_new_tokens` don't
        fit its context; before anything is decoded.
      OSError: another process writes to the journal.
    """
    check_tag(checkpoint, method)
    tokenizer = checkpoint.tokenizer
    ids = [template.encode(tokenizer, prompt.prompt, answer_start=prompt.answer_start) for prompt in prompts]
    _check_lengths(checkpoint, prompts, ids, max_new_tokens)
    keys = [_key(tokens) for tokens in ids]
    with open_journal(journal) as stored:
        missing = {key: tokens for key, tokens in zip(keys, ids, strict=True) if key not in stored.rows}
        bar = tqdm.tqdm(
            total=len(prompts),
            initial=len(prompts) - len(missing),
            unit=" answers",
            desc=description,
            leave=False,
            disable=None,
        )
        with bar:
            for batch in _batches(missing, batch_size, checkpoint.config.max_seq_len):
                generations = generate(
                    checkpoint.config,
                    checkpoint.params,
                    [missing[key] for key in batch],
                    method,
                    max_new_tokens=max_new_tokens,
                    end_ids=tokenizer.conventions.end_ids,
                    harm_tag_id=tokenizer.harm_tag_id,
                    seeds=[_seed(seed, key) for key in batch],
                    batch_size=batch_size,
                )
                stored.add({key: _row(generation) for key, generation in zip(batch, generations, strict=True)})
                bar.update(len(batch))
    return [_answer(checkpoint, prompt, stored.rows[key]) for prompt, key in zip(prompts, keys, strict=True)]


def check_tag(checkpoint: Checkpoint, method: Method) -> None:
    """Raises ValueError where a method needs the harm tag and the checkpoint has none."""
    if looks_ahead(method) and checkpoint.tokenizer.harm_tag_id >= checkpoint.config.vocab_size:
        raise ValueError(
            f"--checkpoint={checkpoint.name}: {type(method).__name__} needs the harm tag, and this model's vocabulary "
            f"of {checkpoint.config.vocab_size} has none"
        )


def _check_lengths(
    checkpoint: Checkpoint, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens={max_new_tokens}: must be at least 1")
    room = checkpoint.config.max_seq_len - max_new_tokens
    for prompt, tokens in zip(prompts, ids, strict=True):
        if len(tokens) > room:
            raise ValueError(
                f"--checkpoint={checkpoint.name}: prompt {prompt.id} of {len(tokens)} tokens and --max_new_tokens="
                f"{max_new_tokens} don't fit the context of {checkpoint.config.max_seq_len}"
            )


def _batches(missing: Mapping[str, Sequence[int]], batch_size: int, longest: int) -> Iterator[list[str]]:
    """Keys of prompts of about one length: each batch is one compiled program's."""
    by_width: dict[int, list[str]] = {}
    for key in sorted(missing, key=lambda key: (len(missing[key]), key)):
        by_width.setdefault(bucket(len(missing[key]), SMALLEST_BUCKET, longest), []).append(key)
    for keys in by_width.values():
        for start in range(0, len(keys), batch_size):
            yield keys[start : start + batch_size]


def _row(generation: Generation) -> dict[str, Any]:
    return {
        "tokens": [int(token) for token in generation.tokens],
        "stopped_by": generation.stopped_by,
        "logprob": generation.logprob,
        "tag": float(max(generation.tag_probs, default=0.0)),
    }


def _answer(checkpoint: Checkpoint, prompt: Prompt, row: Mapping[str, Any]) -> Answer:
    tokenizer, tokens = checkpoint.tokenizer, row["tokens"]
    own = answer_tokens(tokenizer, tokens)
    return Answer(
        prompt=prompt,
        text=tokenizer.decode(own, keep_special=False),
        new_tokens=len(tokens),
        stopped_by=row["stopped_by"],
        logprob=row["logprob"],
        has_tag=row["stopped_by"] == "tag" or tokenizer.harm_tag_id in own,
        max_tag_probability=row["tag"],
    )


def _key(tokens: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()[:32]


def _seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:4])
