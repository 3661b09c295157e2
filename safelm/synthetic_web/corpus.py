"""Writes the whole corpus: its documents, their rows in the published columns, and their files."""

import dataclasses
import datetime
import gzip
import hashlib
import io
import json
import logging
import os
import pathlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

from safelm.documents import declare_no_documents
from safelm.io import files as whole_files
from safelm.io import records, remote
from safelm.io.progress import Bar
from safelm.jobs.output import OutputFolder
from safelm.jobs.settings import check_same
from safelm.synthetic_web.chats import CHAT_SETS
from safelm.synthetic_web.counterparts import write_moral_education, write_refusal, write_safeweb
from safelm.synthetic_web.documents import UNSAFE_SCORES, Draft, write_draft, write_reference
from safelm.synthetic_web.prompts import write_chat_prompts, write_prompts
from safelm.synthetic_web.topics import Topic, harmful_topics, protective_topics, safe_topics

_logger = logging.getLogger("safelm.synthetic_web")

VERSION = 1
SOURCES = ("raw_web", "safeweb", "refuseweb", "moral_education")
FORMATS = ("jsonl", "parquet")
RECIPE_FILE = "corpus.json"
BEGUN_FILE = "_begun.json"  # the recipe, while the folder is not complete
_REMEDY = "remove the folder or choose another --output"
# More unsafe text than the web has: enough for a model of a few million parameters to learn it from raw text.
SCORE_SHARES = {0: 0.60, 1: 0.08, 2: 0.07, 3: 0.05, 4: 0.11, 5: 0.09}
UNSAFE_SHARE = 0.20  # of scores 4 and 5 together
PROTECTIVE_SHARE = 0.12  # of the documents of score 0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All settings that decide the corpus's bytes; `documents` is the number of raw training documents."""

    seed: int = 0
    documents: int = 10_000
    validation_documents: int = 500
    prompts: int = 120  # of each of harmful and safe
    format: str = "jsonl"
    chats: int = 0  # training conversations like UltraChat's; of the other sets there is a third of that each
    missed_harm: float = 0.0  # share of unsafe documents whose recorded score is 0: what a scorer misses
    unsafe: float = UNSAFE_SHARE  # share of documents of scores 4 and 5; the others keep their proportions
    references: float = 0.0  # share of the documents of score 0 that name what harm is made of, apart from each other

    def __post_init__(self) -> None:
        if self.chats < 0:
            raise ValueError(f"--chats={self.chats}: must be at least 0")
        for name in ("missed_harm", "unsafe", "references"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"--{name}={getattr(self, name)}: must be from 0 to below 1")
        for name in ("documents", "validation_documents", "prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)}: must be at least 1")
        if self.format not in FORMATS:
            raise ValueError(f"--format={self.format}: one of {', '.join(FORMATS)}")

    @property
    def hardness(self) -> dict[str, float]:
        """What `draft` and `rows` take of it by name."""
        return {"unsafe": self.unsafe, "references": self.references}


def score_shares(unsafe: float = UNSAFE_SHARE) -> dict[int, float]:
    """The share of every score, where scores 4 and 5 have `unsafe` together."""
    if unsafe == UNSAFE_SHARE:
        return SCORE_SHARES
    scale = {True: unsafe / UNSAFE_SHARE, False: (1 - unsafe) / (1 - UNSAFE_SHARE)}
    return {score: share * scale[score in UNSAFE_SCORES] for score, share in SCORE_SHARES.items()}


def draft(seed: int, split: str, number: int, *, unsafe: float = UNSAFE_SHARE, references: float = 0.0) -> Draft:
    """Raw document `number` of a split: a pure function of its arguments, the last two as in `Recipe`."""
    rng, shares = _rng(seed, split, number, "raw_web"), score_shares(unsafe)
    score = rng.choices(list(shares), list(shares.values()))[0]
    if score == 0 and references and _rng(seed, split, number, "reference").random() < references:
        return write_reference(rng, rng.choice(harmful_topics()))
    return write_draft(rng, _topic(rng, score), score)


def rows(
    seed: int,
    split: str,
    number: int,
    missed_harm: float = 0.0,
    *,
    unsafe: float = UNSAFE_SHARE,
    references: float = 0.0,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(source, row) of raw document `number` and of its counterparts; a missed one has score 0 and no counterparts."""
    source = draft(seed, split, number, unsafe=unsafe, references=references)
    if source.score >= 4 and missed_harm and _rng(seed, split, number, "missed").random() < missed_harm:
        source = dataclasses.replace(source, score=0)
    raw_id = f"synthetic-{seed}-{split}-{number:07d}"
    yield "raw_web", _row(raw_id, source.text, source, number, genre=source.genre)
    if 1 <= source.score <= 3:
        text, style = write_safeweb(_rng(seed, split, number, "safeweb"), source)
        yield "safeweb", _row(f"{raw_id}-safeweb", text, source, number, genre=style)
    elif source.score >= 4:
        text = write_refusal(_rng(seed, split, number, "refuseweb"), source)
        yield "refuseweb", _row(f"{raw_id}-refuseweb", text, source, number, genre="dialogue")
        text = write_moral_education(_rng(seed, split, number, "moral_education"), source)
        yield "moral_education", _row(f"{raw_id}-moral", text, source, number, genre="lesson")


def write_corpus(output: str, recipe: Recipe) -> dict[str, Any]:
    """Writes `<output>/<source>/<split>-*` and `<output>/prompts/*.jsonl`; returns the content of `corpus.json`.

    With `recipe.chats` it also writes the sets of `safelm.synthetic_web.chats` and `<output>/chat_prompts/*.jsonl`. The
    same recipe gives the same bytes. `corpus.json` is written last and marks the folder as complete; a second call then
    writes what is missing, and nothing else.

    Raises ValueError if the folder holds other files, a corpus of another recipe or a file that was changed, and
    BusyError if another process writes there.
    """
    if remote.is_remote(output):
        raise ValueError(f"--output={output}: must be a local folder")
    folder = pathlib.Path(output)
    if (found := _complete(folder, recipe)) is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with whole_files.locked(folder / ".lock", f"--output={output}: another process is writing there"):
        if (found := _complete(folder, recipe)) is not None:
            return found
        _begin(folder, recipe)
        files = {**_write_documents(folder, recipe), **_write_prompts(folder, recipe), **_write_chats(folder, recipe)}
        summary = {"note": "synthetic, non-operational text", "recipe": _settings(recipe), "files": files}
        _write(folder, RECIPE_FILE, (json.dumps(summary, indent=1) + "\n").encode(), 0)
        (folder / BEGUN_FILE).unlink()
    return summary


def _settings(recipe: Recipe) -> dict[str, Any]:
    return {"version": VERSION, **dataclasses.asdict(recipe)}


def _complete(folder: pathlib.Path, recipe: Recipe) -> dict[str, Any] | None:
    """The content of `corpus.json`; None if there is none or a file that it lists is missing.

    Raises ValueError for another recipe and for a file of another size.
    """
    try:
        found = records.read(folder / RECIPE_FILE, _REMEDY)
    except FileNotFoundError:
        return None
    made, listed = found.get("recipe"), found.get("files")
    if not isinstance(made, dict) or dataclasses.asdict(Recipe()) | made != _settings(recipe):
        raise ValueError(f"--output={folder}: holds a corpus made by another recipe, {made}")
    if not isinstance(listed, dict) or not all(isinstance(facts, dict) for facts in listed.values()):
        raise ValueError(f"{folder / RECIPE_FILE}: damaged, lists no files; {_REMEDY}")
    missing = [name for name in listed if not (folder / name).is_file()]
    for name in set(listed) - set(missing):
        if (size := os.path.getsize(folder / name)) != listed[name].get("bytes"):
            was = f"{RECIPE_FILE} lists it with {listed[name].get('bytes')}"
            raise ValueError(f"{folder / name}: has {size} bytes, and {was}: remove the file, and it is written again")
    return None if missing else found


def _begin(folder: pathlib.Path, recipe: Recipe) -> None:
    """Records the recipe of what is about to be written; `corpus.json` vouches for nothing until that is done.

    Raises ValueError if the folder was begun with another recipe, or holds files and was not begun by this command.
    """
    begun = folder / BEGUN_FILE
    if begun.exists():
        flags = {field.name: f"--{field.name}" for field in dataclasses.fields(Recipe)}
        former = dataclasses.asdict(Recipe()) | records.read(begun, _REMEDY)
        check_same(f"--output={folder}", former, _settings(recipe), flags)
    elif not (folder / RECIPE_FILE).exists() and not OutputFolder(str(folder)).is_empty():
        raise ValueError(f"--output={folder}: it holds other files; choose a new folder, or remove that one")
    if (folder / RECIPE_FILE).exists():
        _logger.info("%s: writes again what is missing of the files that %s lists", folder, RECIPE_FILE)
    records.write(begun, _settings(recipe))
    (folder / RECIPE_FILE).unlink(missing_ok=True)
    for unfinished in folder.rglob(f"{whole_files.UNFINISHED}*"):
        unfinished.unlink()


def _write_documents(folder: pathlib.Path, recipe: Recipe) -> dict[str, dict[str, Any]]:
    files: dict[str, dict[str, Any]] = {}
    for split, count in (("train", recipe.documents), ("validation", recipe.validation_documents)):
        by_source: dict[str, list[dict[str, Any]]] = {source: [] for source in SOURCES}
        for number in Bar(range(count), desc=f"compose {split}", unit=" documents", disable=None):
            for source, row in rows(recipe.seed, split, number, recipe.missed_harm, **recipe.hardness):
                by_source[source].append(row)
        for source, found_rows in by_source.items():
            files |= _write_split(folder, source, split, found_rows, recipe.format)
    return files


def _write_prompts(folder: pathlib.Path, recipe: Recipe) -> dict[str, dict[str, Any]]:
    files: dict[str, dict[str, Any]] = {}
    for name in ("harmful", "safe"):
        prompts = write_prompts(recipe.seed, harmful=name == "harmful", count=recipe.prompts)
        files |= _write(folder, f"prompts/{name}.jsonl", _jsonl(prompts), len(prompts))
        if recipe.chats:
            prompts = write_chat_prompts(recipe.seed, harmful=name == "harmful", count=recipe.prompts)
            files |= _write(folder, f"chat_prompts/{name}.jsonl", _jsonl(prompts), len(prompts))
    for name in ("prompts", *(["chat_prompts"] if recipe.chats else [])):
        declare_no_documents(str(folder / name), "safelm.synthetic_web")
    return files


def _write_chats(folder: pathlib.Path, recipe: Recipe) -> dict[str, dict[str, Any]]:
    files = {}
    for name, write in CHAT_SETS.items() if recipe.chats else ():
        train = recipe.chats if name == "ultrachat" else -(-recipe.chats // 3)
        for split, count in (("train", train), ("validation", -(-train // 20))):
            found = [write(_rng(recipe.seed, split, number, name)) for number in range(count)]
            files |= _write_split(folder, name, split, found, recipe.format)
    return files


def _topic(rng: random.Random, score: int) -> Topic:
    if score >= 3:
        return rng.choice(harmful_topics())
    return rng.choice(protective_topics() if score == 0 and rng.random() < PROTECTIVE_SHARE else safe_topics())


def _rng(seed: int, split: str, number: int, source: str) -> random.Random:
    return random.Random(f"safelm-synthetic-web/{VERSION}/{seed}/{split}/{number}/{source}")


def _row(row_id: str, text: str, source: Draft, number: int, *, genre: str) -> dict[str, Any]:
    date = datetime.datetime(2024, 1, 1) + datetime.timedelta(hours=number % 8760)
    metadata = {
        "dump": "SYNTHETIC-2024",
        "url": f"https://synthetic.invalid/{source.topic.category}/{row_id}",
        "date": date.isoformat(),
        "file_path": f"synthetic/{row_id}",
        "language": "en",
        "language_score": 1.0,
        "token_count": round(1.3 * len(text.split())),  # an estimate: four words make about five tokens
        "score": float(source.score),
        "int_score": source.score,
        "harm_score": source.score,
        "text_harm_score": source.score if text is source.text else 0,  # what is made of a document is harmless
        "category": source.topic.category,
        "topic": source.topic.infinitive,
        "genre": genre,
    }
    return {"id": row_id, "text": text, "metadata": metadata}


def _write_split(
    folder: pathlib.Path, source: str, split: str, found_rows: list[dict[str, Any]], file_format: str
) -> dict[str, dict[str, Any]]:
    """Writes a split's shards: four for training, so that caching runs in parallel, and one for validation."""
    shards = 4 if split == "train" else 1
    files = {}
    for shard in range(shards):
        part = found_rows[shard::shards]
        name = f"{source}/{split}-{shard:05d}-of-{shards:05d}"
        if file_format == "jsonl":
            files |= _write(
                folder, f"{name}.jsonl.gz", gzip.compress(_jsonl(part), compresslevel=6, mtime=0), len(part)
            )
        else:
            schema = None if source in SOURCES else _chat_schema(found_rows)
            files |= _write(folder, f"{name}.parquet", _parquet(part, schema), len(part))
    return files


def _jsonl(found_rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found_rows).encode()


def _chat_schema(found_rows: list[dict[str, Any]]) -> Any:
    """The schema of all rows of a chat set's split, so that a shard without rows has the columns too."""
    import pyarrow as pa

    return pa.Table.from_pylist(found_rows).schema


def _parquet(found_rows: list[dict[str, Any]], schema: Any | None) -> bytes:
    """A table of rows, of documents where `schema` is None."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if schema is None:
        schema = _document_schema()
        found_rows = [
            row | {"metadata": row["metadata"] | {"date": datetime.datetime.fromisoformat(row["metadata"]["date"])}}
            for row in found_rows
        ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(found_rows, schema=schema), buffer)
    return buffer.getvalue()


def _document_schema() -> Any:
    import pyarrow as pa

    text, number, count = pa.string(), pa.float64(), pa.int64()
    kinds: Mapping[str, pa.DataType] = {
        "dump": text,
        "url": text,
        "date": pa.timestamp("s"),
        "file_path": text,
        "language": text,
        "language_score": number,
        "token_count": count,
        "score": number,
        "int_score": count,
        "harm_score": count,
        "text_harm_score": count,
        "category": text,
        "topic": text,
        "genre": text,
    }
    return pa.schema({"id": text, "text": text, "metadata": pa.struct(list(kinds.items()))})


def _write(folder: pathlib.Path, name: str, content: bytes, count: int) -> dict[str, dict[str, Any]]:
    """Writes a file atomically unless it is there; returns its entry in `corpus.json`."""
    path = folder / name
    if not path.is_file() or path.read_bytes() != content:
        whole_files.write_whole(path, content)
    return {name: {"rows": count, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
