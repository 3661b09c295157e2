"""Reads the nine benchmarks from local JSON files into documents of one form.

Columns may be those published on Hugging Face or flattened ones: `query`, `choices`, `gold` (and `context_options`,
`context`), as in MosaicML's evaluation files. The form is detected.
"""

import gzip
import json
import pathlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Document = dict[str, Any]
Row = Mapping[str, Any]
_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_LISTED_CHOICE = re.compile(r"^([A-Z])\. (.*)$", re.MULTILINE)


def read(name: str, folders: Sequence[str]) -> list[Document]:
    """All documents of one of `FILES`, in the file's order.

    Raises:
      FileNotFoundError: no folder has the file.
      ValueError: several files match, a row is not an object or lacks a column (the message names file, row and
        column), or the file has no rows.
    """
    path = find(name, folders)
    _, convert = FILES[name]
    documents = []
    for number, row in enumerate(_rows(path), 1):
        try:
            documents.append(convert(row))
        except KeyError as error:
            raise ValueError(f"{path}, row {number}: column {error.args[0]!r} is missing") from error
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path}, row {number}: not a row of {name} ({error})") from error
    if not documents:
        raise ValueError(f"{path}: holds no rows")
    return documents


def find(name: str, folders: Sequence[str]) -> pathlib.Path:
    """The file of a benchmark in the folders. Raises FileNotFoundError for none, ValueError for several."""
    found = candidates(name, folders)
    if not found:
        names = ", ".join(f"{stem}.jsonl[.gz]" for stem in FILES[name][0])
        raise FileNotFoundError(f"--data={','.join(folders)}: no file of {name} (want {names} or .json[.gz])")
    if len(found) > 1:
        raise ValueError(f"--data={','.join(folders)}: {name} is there twice: {found[0]} and {found[1]}")
    return found[0]


def candidates(name: str, folders: Sequence[str]) -> list[pathlib.Path]:
    """All files in the folders that have a benchmark's name."""
    wanted = {stem + suffix for stem in FILES[name][0] for suffix in _SUFFIXES}
    files = [path for folder in folders if pathlib.Path(folder).is_dir() for path in pathlib.Path(folder).iterdir()]
    return sorted(path for path in files if path.name.lower() in wanted)


def sample(documents: Sequence[Document], max_items: int, seed: int = 0) -> list[Document]:
    """At most `max_items` documents (0: all), drawn at random but the same for every model, in their order."""
    if not max_items or max_items >= len(documents):
        return list(documents)
    return [documents[index] for index in sorted(random.Random(seed).sample(range(len(documents)), max_items))]


def _rows(path: pathlib.Path) -> list[Row]:
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    try:
        with opened as file:
            text = file.read()
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not JSON or JSON lines ({error})") from error
    if (wrong := next((row for row in rows if not isinstance(row, dict)), None)) is not None:
        raise ValueError(f"{path}: holds a {type(wrong).__name__}, want objects")
    return rows


def _choice(question: str, choices: Sequence[str], answer: int, **more: str) -> Document:
    if not 0 <= answer < len(choices):
        raise ValueError(f"answer {answer} of {len(choices)} choices")
    return {"question": question.strip(), "choices": [str(choice) for choice in choices], "answer": answer, **more}


def _multiple_choice(row: Row) -> Document:
    """ARC, CommonsenseQA and OpenBookQA, published with `choices: {text, label}` and `answerKey`."""
    if "query" in row:
        return _flat(row)
    question = row["question_stem"] if "question_stem" in row else row["question"]
    labels = [str(label) for label in row["choices"]["label"]]
    return _choice(question, row["choices"]["text"], labels.index(row["answerKey"].strip()))


def _flat(row: Row) -> Document:
    query, choices = row["query"].strip().removeprefix("Question:").removesuffix("Answer:"), row["choices"]
    if "\nChoices:\n" in query:  # the choices stand in the query, and only their letters are answers
        query, listed = query.split("\nChoices:\n")
        texts = dict(_LISTED_CHOICE.findall(listed))
        choices = [texts[letter] for letter in choices]
    return _choice(query, choices, row["gold"])


def _piqa(row: Row) -> Document:
    return _flat(row) if "query" in row else _choice(row["goal"], [row["sol1"], row["sol2"]], int(row["label"]))


def _mmlu(row: Row) -> Document:
    return _choice(row["question"], row["choices"], int(row["answer"]), subject=row["subject"].replace("_", " "))


def _winogrande(row: Row) -> Document:
    """WinoGrande: two contexts before one continuation."""
    if "sentence" not in row:
        contexts, continuation, answer = row["context_options"], row["continuation"], row["gold"]
    else:
        before, continuation = row["sentence"].split("_")
        contexts, answer = [before + row["option1"], before + row["option2"]], int(row["answer"]) - 1
    if not 0 <= answer < len(contexts):
        raise ValueError(f"answer {answer} of {len(contexts)} contexts")
    return {"contexts": contexts, "continuation": continuation.strip(), "answer": answer}


def _triviaqa(row: Row) -> Document:
    if "context" in row and "question" not in row:
        question, aliases = row["context"].removeprefix("Question:").removesuffix("Answer:"), row["aliases"]
        aliases = [row["answer"], *aliases]
    else:
        question, aliases = row["question"], row["answer"]["aliases"]
    return {"question": question.strip(), "aliases": list(dict.fromkeys(aliases))}


def _gsm8k(row: Row) -> Document:
    return {"question": row["question"], "answer": row["answer"]}


# name -> (file names without suffix, conversion of a row)
FILES: dict[str, tuple[tuple[str, ...], Callable[[Row], Document]]] = {
    "arc_challenge": (("arc_challenge", "arc-challenge"), _multiple_choice),
    "arc_easy": (("arc_easy", "arc-easy"), _multiple_choice),
    "commonsense_qa": (("commonsense_qa", "commonsenseqa"), _multiple_choice),
    "gsm8k": (("gsm8k_test", "gsm8k"), _gsm8k),
    "gsm8k_train": (("gsm8k_train",), _gsm8k),
    "openbookqa": (("openbookqa", "openbook_qa"), _multiple_choice),
    "piqa": (("piqa",), _piqa),
    "triviaqa": (("triviaqa", "trivia_qa", "triviaqa_sm_sub"), _triviaqa),
    "winogrande": (("winogrande", "winogrande_xl"), _winogrande),
    "mmlu": (("mmlu", "mmlu_test"), _mmlu),
}
