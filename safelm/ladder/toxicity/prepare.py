"""Prepares the data of the toxicity ladder: corpus, classifiers, vocabulary, and the token stores that rungs name.

A store of another corpus folder has a name of its own (`STORES`), so that a mixture can name both.
"""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from safelm.data.store import MANIFEST_NAME
from safelm.ladder.plan import TOXICITY, Model
from safelm.ladder.processes import run_command
from safelm.ladder.real import rewrite
from safelm.ladder.toxicity import corpus as corpus_files
from safelm.ladder.toxicity import judges
from safelm.tags import TAG_RATE

PARTS = ("text", "classifier", "eval_prompts")  # folders of --config.real
SPELLED = ("raw_web",)  # what the vocabulary is made of
# Name of a store -> (task, folder of the corpus that it is made of)
STORES = {
    "classified_web": ("filtered_web", "classified"),
    "clean_text": ("raw_web", "clean"),
    "toxic_text": ("raw_web", "toxic"),
}
_REWRITTEN = {kind: str(corpus_files.TOXIC) for kind in ("safeweb", "refuseweb", "moral_education")}
_MOST_REWRITTEN = 2000


def prepare(
    config: ConfigDict, output: pathlib.Path, models: Sequence[Model], vocabulary: Callable[[], pathlib.Path]
) -> None:
    """Makes the data that is still missing. Raises OSError or ValueError if a step fails."""
    corpus, classifiers = output / "corpus", output / "classifiers"
    corpus_files.write_corpus(config.real, corpus, config.toxic_share)
    judges.train(config.real, classifiers, **config.judges)
    judges.load(config.real, classifiers)
    if not (output / "filter.json").exists():
        texts = [text for _, text, _ in corpus_files.read_corpus(corpus / "raw_web")]
        model, threshold = judges.load_filter(config.real, classifiers)
        corpus_files.write_classified(corpus, judges.values(model, texts), threshold, output / "filter.json")
    needed = {name for model in models for name in config.rates[model.rung]}
    needed |= {name for stage in TOXICITY.stages[1:] for name in config.rates[stage]}
    if needed & _REWRITTEN.keys():
        rewrite(corpus, _REWRITTEN, lambda: _to_rewrite(corpus))
    _write_stores(output, vocabulary(), sorted(needed), {model.rung for model in models if model.needs_spans}, config)


def _to_rewrite(corpus: pathlib.Path) -> list[dict[str, Any]]:
    rows = [row for row in corpus_files.read_corpus(corpus / "raw_web") if row[2]]
    longest = sorted(rows, key=lambda row: (-len(row[1]), row[0]))[:_MOST_REWRITTEN]
    return [{"id": name, "text": text, "metadata": {"harm_score": corpus_files.TOXIC}} for name, text, _ in longest]


def _write_stores(
    output: pathlib.Path, vocabulary: pathlib.Path, needed: Sequence[str], of_spans: set[str], config: ConfigDict
) -> None:
    folder, spans = output / f"tokens-rate-{round(100 * TAG_RATE)}", output / "spans"
    with_spans = {name for rung in of_spans for name in config.rates[rung]}
    if with_spans and not (spans / "manifest.json").exists():
        own = [f"--spans={output}/corpus/own_spans", f"--output={spans}", "--workers=1"]
        run_command("safelm.annotate", f"--input={output}/corpus/raw_web", *own)
    by_corpus: dict[tuple[str, bool], list[str]] = {}
    for name in needed:
        if not (folder / name / "train" / MANIFEST_NAME).exists():
            by_corpus.setdefault((STORES.get(name, (name, ""))[1], name in with_spans), []).append(name)
    for (of, has_spans), names in by_corpus.items():
        tasks = ",".join(STORES.get(name, (name, ""))[0] for name in names)
        place = output / f"tokens-{of}" if of else folder
        flags = [f"--data_dir={output}/corpus/{of}".rstrip("/"), f"--tokenizer={vocabulary}", f"--output={place}"]
        beside = [f"--annotations={spans}"] if has_spans else []
        run_command("safelm.cache_tasks", f"--tasks={tasks}", *flags, f"--tag_rate={TAG_RATE}", "--workers=1", *beside)
        for name in names if of else ():
            folder.mkdir(exist_ok=True)
            os.symlink(os.path.relpath(place / STORES[name][0], folder), folder / name)
