"""Makes the ladder's corpus from real public text: a folder with `text/`, `classifier/` and `sft/`.

`safelm.ladder.prepare_real_text` reads the first two, this module the files of `sft/` that it names.

| part of the corpus            | from                                                                             |
|-------------------------------|----------------------------------------------------------------------------------|
| raw_web                       | WikiText-2 and C4 (score 0), labelled comments (`ladder.prepare_real_text`)      |
| safeweb, refuseweb, moral_education | raw_web of scores 1 to 3, and 4 and 5, by safelm.synthesize's template writer |
| ultrachat                     | Alpaca and Dolly                                                                  |
| wildguardmix                  | half of the safe answers to harmful instructions; comments of score 5 as answers  |
| wildjailbreak                 | the other half, and as many instructions of Alpaca and Dolly                      |
| gsm8k                         | GSM8K                                                                             |

No text is logged. The rows have the published columns, so the tasks of `data_tasks` can read them.
"""

import gzip
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from safelm import documents
from safelm.io import records
from safelm.ladder.processes import run_command

_SCORER = "python:safelm.safety.lexicon_scorer:LexiconScorer"
_TAGGED_ANSWERS = 1500
_REWRITTEN = 2000  # documents of scores 1 to 3, and as many of 4 and 5
_KINDS = {"safeweb": "1,2,3", "refuseweb": "4,5", "moral_education": "4,5"}


def write_real_corpus(source: str, corpus: pathlib.Path) -> None:
    """Writes the corpus unless it is complete. Raises FileNotFoundError or ValueError naming what `source` lacks."""
    if (corpus / "corpus.json").exists():
        return
    corpus.mkdir(parents=True, exist_ok=True)
    raw_web = corpus / "raw_web"
    if not (raw_web / "validation-00000-of-00001.jsonl.gz").exists():  # the last that is written of it
        shutil.rmtree(raw_web, ignore_errors=True)
        run_command("safelm.ladder.prepare_real_text", f"--source={source}", f"--output={corpus}")
    rewrite(corpus, _KINDS, lambda: list(_sample(corpus)))
    for name, rows in _conversations(pathlib.Path(source) / "sft", corpus).items():
        _write(corpus / name / "train-00000-of-00001.jsonl.gz", rows)
    about = {"note": "made from real public text", "source": pathlib.Path(source).name}
    records.write(corpus / "corpus.json", about | {"sha256": text_hash(corpus)})


def text_hash(corpus: pathlib.Path) -> str:
    """SHA-256 of all texts and conversations that are trained on, by source: what two machines' corpora must share."""
    digest = hashlib.sha256()
    for path in sorted(corpus.glob("*/train-*.jsonl.gz")):
        digest.update(path.parent.name.encode() + b"\0")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                digest.update(json.dumps(row.get("text") or row.get("messages")).encode() + b"\n")
    return digest.hexdigest()


def rewrite(corpus: pathlib.Path, kinds: Mapping[str, str], rows: Callable[[], list[dict[str, Any]]]) -> None:
    """Writes safe counterparts of documents by the template writer into folders of the corpus, as far as missing.

    Args:
      kinds: for each kind of `safelm.synthesize` the harm scores of the documents that it is made of.
    """
    sample = corpus / "to_rewrite" / "documents.jsonl.gz"
    if not sample.exists():
        documents.declare_no_documents(str(sample.parent), "safelm.ladder")  # they stand in raw_web
        _write(sample, rows())
    for kind, scores in kinds.items():
        flags = [f"--kind={kind}", f"--input={sample}", f"--output={corpus}/{kind}", f"--scores={scores}"]
        run_command("safelm.synthesize", *flags, "--writer=template:", f"--scorer={_SCORER}", "--workers=1")


def _sample(corpus: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The longest documents of the scores that are rewritten, as many for each kind of rewriting as it needs."""
    by_kind: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for row in _raw_rows(corpus):
        if score := row["metadata"]["harm_score"]:
            by_kind[score >= 4].append(row)
    for rows in by_kind.values():
        yield from sorted(rows, key=lambda row: (-len(row["text"]), row["id"]))[:_REWRITTEN]


def _conversations(sft: pathlib.Path, corpus: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    helpful = [
        _pair(row)
        for row in (*_read(sft / "alpaca_en_demo.json.gz"), *_read(sft / "dolly_hhrlhf_train_small.jsonl.gz"))
    ]
    refused = [_pair(row) for row in _read(sft / "safety_only_data_Instructions.json.gz")]
    harmful = [row["text"] for row in _raw_rows(corpus) if row["metadata"]["harm_score"] == 5][:_TAGGED_ANSWERS]
    labels = {"adversarial": False, "prompt_harm_label": "harmful"}
    safe = {"response_harm_label": "unharmful", "response_refusal_label": "refusal"}
    tagged = {"response_harm_label": "harmful", "response_refusal_label": "compliance", "prompt": "Write a comment."}
    guard = [{"prompt": user, "response": said} | labels | safe for user, said in refused[::2]]
    guard += [{"response": text} | labels | tagged for text in harmful]
    jail = [(user, said, "vanilla_harmful") for user, said in refused[1::2]]
    jail += [(user, said, "vanilla_benign") for user, said in helpful[: len(jail)]]
    return {
        "ultrachat": [
            {"messages": [{"role": "user", "content": u}, {"role": "assistant", "content": a}]} for u, a in helpful
        ],
        "wildguardmix": guard,
        "wildjailbreak": [
            {"vanilla": user, "adversarial": "", "completion": said, "data_type": kind} for user, said, kind in jail
        ],
        "gsm8k": list(_read(sft / "gsm8k_train.jsonl.gz")),
    }


def _pair(row: dict[str, Any]) -> tuple[str, str]:
    asked = row.get("instruction") or row.get("prompt") or ""
    asked = asked.split("### Instruction:\n")[-1].split("\n\n### Response:")[0]
    more = row.get("input") or row.get("context") or ""
    return (f"{asked}\n\n{more}" if more else asked).strip(), row.get("output") or row.get("response") or ""


def _read(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = json.load(file) if path.name.endswith(".json.gz") else [json.loads(line) for line in file]
    except FileNotFoundError:
        raise FileNotFoundError(f"--config.real: there is no file {path}") from None
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: can't be read ({error})") from error
    return (row for row in rows if all(_pair(row)) or "question" in row)


def _raw_rows(corpus: pathlib.Path) -> Iterator[dict[str, Any]]:
    with gzip.open(corpus / "raw_web" / "train-00000-of-00001.jsonl.gz", "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def _write(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with gzip.open(partial, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    partial.rename(path)
