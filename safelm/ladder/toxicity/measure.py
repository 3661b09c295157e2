"""Measures how toxic a model's continuations of RealToxicityPrompts are (Gehman et al. 2020), and whether it is broken.

Every prompt is continued 25 times by nucleus sampling, or once by beam search or SafeBeam. Of each judge and prompt are
kept the share of toxic continuations and the largest probability among them, whose means over prompts are the toxicity
of a continuation and the expected maximum toxicity; a share above 0 counts for the toxicity probability. Beside them
stand distinct-1 to 3 of a prompt's continuations (Li et al. 2016) and the perplexity of held-out pages.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from safelm import inference
from safelm.checkpoints import checkpoint
from safelm.evaluate import language_modeling
from safelm.inference.methods import METHODS, Method, Sampling
from safelm.ladder.plan import MODELS, SAMPLE, Job
from safelm.ladder.prepare_real_text import untokenised, wikitext_articles
from safelm.ladder.toxicity import judges as judges_lib
from safelm.ladder.toxicity.corpus import read_rows
from safelm.ladder.toxicity.judges import Judge
from safelm.text.control_tokens import control_id
from safelm.text.prompting import prompt_ids
from safelm.text.tokenizer import Tokenizer

KINDS = ("toxic", "nontoxic")  # of prompts
NUCLEUS = 0.9  # as Gehman et al. 2020, section 3
_BATCH = 256
_GRAMS = (1, 2, 3)
_PAGE_CHARACTERS = 2000  # of each held-out page


def measure_toxicity(config: ConfigDict, output: pathlib.Path, job: Job, workdir: pathlib.Path) -> dict[str, Any]:
    """The values of every prompt by judge, distinct-n and perplexities, as a JSON object."""
    model_config, params, tokenizer = checkpoint.load_for_inference(str(workdir))
    opening = MODELS[job.model].opening
    prompts = read_prompts(config.real, config.prompts)
    samples = config.samples if job.method == SAMPLE else 1
    asked = [prompt for kind in KINDS for prompt in prompts[kind]]
    contexts = [opened(tokenizer, prompt_ids(tokenizer, text, is_chat=False), opening) for text in asked]
    generations = inference.generate(
        model_config,
        params,
        [context for context in contexts for _ in range(samples)],
        _method(job.method),
        max_new_tokens=config.max_new_tokens,
        end_ids=tokenizer.conventions.end_ids,
        harm_tag_id=tokenizer.harm_tag_id,
        seed=job.seed,
        batch_size=_BATCH,
    )
    texts = [tokenizer.decode(generation.text_tokens, keep_special=False) for generation in generations]
    judges = judges_lib.load(config.real, output / "classifiers")
    kept = {"texts": texts} if config.keep_texts else {}
    return {
        "values": {judge.name: _of_judge(judge, texts, samples, len(prompts[KINDS[0]])) for judge in judges},
        "samples": samples,
        "distinct": distinct([texts[start : start + samples] for start in range(0, len(texts), samples)]),
        "perplexity": {
            name: language_modeling.perplexity(
                model_config,
                params,
                Pages([tokenizer.encode(page) for page in pages], tokenizer.conventions.document_end_id),
                begin_ids=opened(tokenizer, prompt_ids(tokenizer, "", is_chat=False), opening),
            )["perplexity"]
            for name, pages in held_out_pages(config.real, config.pages).items()
        },
        "prompts_sha256": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        "judge": "toxicity-1",
        **kept,
    }


def _method(name: str) -> Method:
    return Sampling(top_p=NUCLEUS) if name == SAMPLE else METHODS[name]()


def _of_judge(judge: Judge, texts: Sequence[str], samples: int, toxic: int) -> dict[str, dict[str, list[float]]]:
    """For each kind of prompts the share of toxic continuations and the largest probability, prompt by prompt."""
    probability_PS = judge.probabilities(texts).reshape(-1, samples)
    share_P, most_P = (probability_PS >= judges_lib.TOXIC_FROM).mean(1), probability_PS.max(1)
    parts = {"share": share_P, "maximum": most_P}
    split = {KINDS[0]: slice(toxic), KINDS[1]: slice(toxic, None)}
    return {
        kind: {name: [round(float(value), 3) for value in value_P[rows]] for name, value_P in parts.items()}
        for kind, rows in split.items()
    }


def distinct(groups: Sequence[Sequence[str]]) -> dict[str, float]:
    """distinct-n for n = 1, 2, 3: different n-grams over all of a prompt's continuations, the mean over prompts."""
    found = {}
    for size in _GRAMS:
        shares = []
        for texts in groups:
            grams = [
                tuple(words[i : i + size]) for words in map(str.split, texts) for i in range(len(words) - size + 1)
            ]
            shares += [len(set(grams)) / len(grams)] if grams else []
        found[str(size)] = round(float(np.mean(shares)), 4) if shares else 0.0
    return found


def opened(tokenizer: Tokenizer, ids: Sequence[int], opening: str) -> list[int]:
    """A plain text's ids with a control token behind what the model's texts begin with, as in training; "" for none."""
    start = len(prompt_ids(tokenizer, "", is_chat=False))
    return [*ids[:start], *([control_id(tokenizer, opening)] if opening else []), *ids[start:]]


class Pages:
    """Tokens of some pages as the store that `language_modeling.perplexity` reads."""

    def __init__(self, pages: Iterable[Sequence[int]], end_id: int):
        self._pages = [np.array([*page, end_id], np.int32) for page in pages]
        self.num_documents = len(self._pages)

    def document(self, index: int) -> Int[np.ndarray, " T"]:
        """The tokens of a page."""
        return self._pages[index]


def read_prompts(source: str, count: int) -> Mapping[str, list[str]]:
    """`count` toxic and as many non-toxic prompts, spread evenly over the files.

    Raises FileNotFoundError or ValueError naming the file under `eval_prompts/` and what it lacks.
    """
    found = {}
    for kind in KINDS:
        path = pathlib.Path(source) / "eval_prompts" / f"realtoxicityprompts_{kind}.jsonl.gz"
        rows = read_rows(path)
        if len(rows) < count:
            raise ValueError(f"{path}: {len(rows)} prompts, --config.prompts wants {count}")
        try:
            found[kind] = [rows[place * len(rows) // count]["prompt"]["text"] for place in range(count)]
        except (KeyError, TypeError):
            raise ValueError(f"{path}: a row without prompt.text") from None
    return found


def held_out_pages(source: str, count: int) -> dict[str, list[str]]:
    """The beginnings of the first `count` pages of C4's and articles of WikiText's parts for validation."""
    folder = pathlib.Path(source) / "text"
    pages = [row["text"] for row in read_rows(folder / "c4_validation.jsonl.gz")]
    articles = [untokenised(article).strip() for article in wikitext_articles(folder / "wiki.valid.tokens.gz")]
    found = {"c4": pages, "wikitext": [article for article in articles if article]}
    return {name: [text[:_PAGE_CHARACTERS] for text in texts[:count]] for name, texts in found.items()}
