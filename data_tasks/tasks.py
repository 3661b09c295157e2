"""SeqIO tasks and mixtures of safety pretraining, for any SeqIO user.

    SAFELM_DATA_DIR=corpus SAFELM_TOKENIZER=tokenizer python
    >>> import data_tasks.tasks, seqio
    >>> seqio.get_mixture_or_task("safelm_harm_tagged_web").get_dataset(split="train", shuffle=False)

Importing this module registers them from the environment: SAFELM_DATA_DIR and SAFELM_TOKENIZER (both or neither), and
SAFELM_TAG_RATE, SAFELM_TASK_SEED, SAFELM_QUARANTINE_DIR and SAFELM_ANNOTATIONS. `register` does the same from
arguments, under another prefix for a second set.

| task            | corpus folder   | documents                                                         |
|-----------------|-----------------|-------------------------------------------------------------------|
| raw_web         | raw_web         | all, as they are                                                  |
| filtered_web    | raw_web         | harm score 0                                                      |
| harm_tagged_web | raw_web         | harm score of at least `min_harm_score` (4), harm tag injected    |
| safeweb         | safeweb         | recontextualized scores 1 to 3                                    |
| refuseweb       | refuseweb       | refusal dialogues, speaker labels replaced                        |
| moral_education | moral_education | all                                                               |
| ultrachat       | ultrachat       | conversations; loss on what the assistant says, in all below      |
| wildguardmix    | wildguardmix    | answers that give no harm: refusals and harmless ones             |
| harm_tagged_chat| wildguardmix    | answers that do, the harm tag injected into them                  |
| wildjailbreak   | wildjailbreak   | all                                                               |
| gsm8k           | gsm8k           | all                                                               |
| instructions    | instructions    | all                                                               |
| refusal_...     | ultrachat, wildguardmix, wildjailbreak: every answer behind a refusal token         |
| canaries        | canaries        | all, none held out (`safelm.canaries`)                            |
| alignment_text  | alignment_text  | all, none held out: a folder of your own                          |

The tasks of `data_tasks.interventions` are made of raw_web too: masked_web, masked_unsafe_web, unlikelihood_web,
weighted_web, span_tagged_web, red_flag_span_web (these need annotations with spans), token_tagged_web, red_flag_web,
conditioned_web, unsafe_web and safer_web (these and masked_unsafe_web need harm scores), reflected_web and
preflected_web (these need annotations with notes), and metadata_web.

Columns and files of the conversations: `data_tasks.chats`. Examples have a `loss_weight` beside their `targets`.
A corpus is a folder under `data_dir` (or wherever `corpora` says: an fsspec URL, or `tfds:NAME` for a TFDS data set
with the same features). Mixtures `<prefix>_ladder_<rung>` hold the rungs of `data_tasks.rates`, `<prefix>_instruction`,
`_instruction_tagged` and `_benign` what comes after pretraining. Their rates are shares of tokens while SeqIO draws
documents, so a mixture divides each rate by the mean length of the task's first documents: an approximation. Training
reads token stores, where `safelm.data` keeps the rates exactly.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from data_tasks import encoding, intervention_settings, pipeline, rates
from data_tasks.chats import CHAT_ROWS, Openings, refusal_rows
from data_tasks.held_out import CorpusSplit
from data_tasks.intervention_settings import InterventionSettings
from data_tasks.interventions import INTERVENTIONS
from data_tasks.preprocessors import SAFE_SCORE, replace_speaker_names
from data_tasks.readers import MalformedLimit, RowFormat, WebDocuments
from data_tasks.sources import WebDocumentSource
from data_tasks.vocabulary import SafeLMVocabulary
from safelm.documents.annotations import parse as parse_annotations
from safelm.tags import MAX_SCORE, TAG_RATE
from safelm.text.harm_tags import inject_harm_tag
from safelm.text.tokenizer import Tokenizer

TFDS_PREFIX = "tfds:"
CANARIES, ALIGNMENT_TEXT = "canaries", "alignment_text"
_WHOLE = (CANARIES, ALIGNMENT_TEXT)  # of these nothing is held out: each document is there to be learned
NO_DATA_DIR = "(no --data_dir given)"  # what an error then names as the folder
CORPORA = {source: source for source in (*rates.SOURCES, *rates.CHAT_SOURCES)} | {
    "filtered_web": "raw_web",
    "harm_tagged_web": "raw_web",
    "harm_tagged_chat": "wildguardmix",
    CANARIES: CANARIES,
    ALIGNMENT_TEXT: ALIGNMENT_TEXT,
    **{source: source.removeprefix("refusal_") for source in rates.REFUSAL_SOURCES},
    **dict.fromkeys(INTERVENTIONS, "raw_web"),
}
_SCORED = ("filtered_web", "harm_tagged_web", *(name for name, each in INTERVENTIONS.items() if each.needs_score))
_PAGES = "raw_web"
_REWRITES = ("safeweb", "refuseweb", "moral_education")
PREPROCESSING_VERSION = 3  # raise it when the same documents and settings would give other tokens
_DOCUMENTS_MEASURED = 256


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """The settings that decide a task's tokens, beside documents and vocabulary."""

    tag_rate: float = TAG_RATE  # probability of the tag at a word gap
    seed: int = 0
    min_harm_score: int = 4  # documents from this score on are tagged
    validation_fraction: float = 0.01  # of a corpus without validation files

    def __post_init__(self):
        if not 0.0 <= self.tag_rate <= 1.0:
            raise ValueError(f"tag_rate must be from 0 to 1, got {self.tag_rate}")
        if not 1 <= self.min_harm_score <= MAX_SCORE:
            raise ValueError(f"min_harm_score must be 1 to {MAX_SCORE}, got {self.min_harm_score}")
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ValueError(f"validation_fraction must be from 0 to below 1, got {self.validation_fraction}")


@dataclasses.dataclass(frozen=True)
class Registration:
    """The result of `register`: SeqIO names by source name and by rung, and the settings."""

    tasks: Mapping[str, str]
    mixtures: Mapping[str, str]
    settings: Mapping[str, Any]


def register(
    data_dir: str | None,
    tokenizer: str | Tokenizer,
    *,
    prefix: str = "safelm",
    settings: TaskSettings | Mapping[str, Any] | None = None,
    corpora: Mapping[str, str] | None = None,
    tfds_data_dir: str | None = None,
    limit: MalformedLimit | Mapping[str, Any] | None = None,
    quarantine_dir: str | None = None,
    columns: Mapping[str, str] | None = None,
    annotations: str | None = None,
    interventions: InterventionSettings | Mapping[str, Any] | None = None,
) -> Registration:
    """Registers all tasks and mixtures under `prefix`, replacing earlier ones of that prefix.

    Nothing is read yet: missing files and a bad tokenizer show when a task is used.

    Args:
      corpora: other places of corpus folders by name; without `data_dir` only these can be read.
      quarantine_dir: folder for malformed rows, in `<quarantine_dir>/<source>/<split>/`.
      columns: names of web documents' columns: `text_column`, `id_column`, `score_column`.
      annotations: folders of annotations of `raw_web` (`safelm.documents.annotations`), by comma: harm scores beside
        the text, spans and notes.
      interventions: parameters of the interventions that are not the defaults.

    Raises ValueError for settings out of range and unknown corpora.
    """
    if not isinstance(settings, TaskSettings):
        settings = TaskSettings(**(settings or {}))
    if not isinstance(limit, MalformedLimit):
        limit = MalformedLimit(**(limit or {}))
    corpora, folder = dict(corpora or {}), (data_dir or NO_DATA_DIR).rstrip("/")
    if unknown := corpora.keys() - CORPORA.values():
        raise ValueError(f"unknown corpus {sorted(unknown)[0]!r}: one of {', '.join(sorted(set(CORPORA.values())))}")
    vocabulary = SafeLMVocabulary(tokenizer)
    parameters = _intervention_settings(interventions, settings)
    columns = dict(columns or {})
    folders = parse_annotations(annotations)
    places = {corpus: corpora.get(corpus, f"{folder}/{corpus}") for corpus in CORPORA.values()}
    splits = _splits(places, columns, {"annotations": folders}, settings.validation_fraction, limit)
    tasks = {}
    for source_name, corpus in CORPORA.items():
        place = places[corpus]
        beside = {"annotations": folders} if corpus == _PAGES else {}
        if place.startswith(TFDS_PREFIX):
            if any(_needed(source_name, parameters).values()) and not (folders and beside):
                continue  # of files only, which have annotations beside them
            source = _tfds_source(place, corpus, tfds_data_dir, has_annotations=bool(folders and beside))
            select = [functools.partial(pipeline.select_columns, **columns)]
        else:
            source = WebDocumentSource(
                place,
                row_format=_row_format(source_name, parameters, columns | beside),
                split=splits[corpus],
                limit=limit,
                quarantine_dir=quarantine_dir and os.path.join(quarantine_dir, source_name),
            )
            select = []
        name = f"{prefix}_{source_name}"
        if source_name in INTERVENTIONS:
            tasks[source_name] = _add_intervention(name, source_name, source, select, vocabulary, parameters)
        else:
            openings = _openings(parameters) if source_name in rates.REFUSAL_SOURCES else None
            tasks[source_name] = _add_task(name, source_name, source, select, vocabulary, settings, openings)
    mixtures = {rung: _add_mixture(f"{prefix}_ladder_{rung}", rung, tasks) for rung in rates.LADDER}
    mixtures |= {name: _add_mixture(f"{prefix}_{name}", name, tasks) for name in rates.POST_TRAINING}
    decides_tokens = dataclasses.asdict(settings) | {"preprocessing_version": PREPROCESSING_VERSION, **columns}
    decides_tokens |= {"annotations": [folder.identity for folder in folders]} if folders else {}
    decides_tokens |= {"interventions": dataclasses.asdict(parameters)} if interventions else {}
    return Registration(tasks, mixtures, decides_tokens)


def _splits(
    places: Mapping[str, str],
    columns: Mapping[str, str],
    annotated: Mapping[str, Any],
    fraction: float,
    limit: MalformedLimit,
) -> dict[str, CorpusSplit]:
    """What is held out of each corpus of files. Rewrites go where the page goes."""
    found: dict[str, CorpusSplit] = {}
    for corpus in (_PAGES, *(corpus for corpus in places if corpus != _PAGES)):
        if places[corpus].startswith(TFDS_PREFIX):
            continue
        beside = annotated if corpus == _PAGES else {"are_rewrites": corpus in _REWRITES}
        rows = CHAT_ROWS.get(corpus) or WebDocuments(**columns, **beside)
        pages = found.get(_PAGES) if corpus in _REWRITES else None
        found[corpus] = CorpusSplit(places[corpus], rows, 0.0 if corpus in _WHOLE else fraction, limit, pages)
    return found


def _tfds_source(place: str, corpus: str, data_dir: str | None, *, has_annotations: bool) -> seqio.TfdsDataSource:
    if has_annotations:
        raise ValueError(f"corpus {corpus}: {place} is no folder of files, which alone have annotations")
    if corpus in CHAT_ROWS:
        raise ValueError(f"corpus {corpus}: {place} can't be read: conversations come from files")
    return seqio.TfdsDataSource(place.removeprefix(TFDS_PREFIX), data_dir)


def _row_format(source_name: str, parameters: InterventionSettings, web: Mapping[str, Any]) -> RowFormat:
    """What the rows of a task's files are; `web`: of web documents, more arguments of `WebDocuments`."""
    refusals = refusal_rows(source_name, parameters.refuse_column if parameters.refuse_tokens else "")
    if chats := refusals or CHAT_ROWS.get(CORPORA[source_name]):
        return chats
    needed = _needed(source_name, parameters) | {"are_rewrites": source_name in _REWRITES}
    return WebDocuments(source_name in _SCORED, **needed, **web)


def _needed(source_name: str, parameters: InterventionSettings) -> dict[str, Any]:
    """What a source needs beside text and harm score, as arguments of `WebDocuments`."""
    intervention = INTERVENTIONS.get(source_name)
    if intervention is None:
        return {}
    has = {"has_spans": intervention.needs_spans, "has_notes": intervention.needs_notes}
    return has | {"metadata_columns": parameters.metadata_columns if intervention.needs_metadata else ()}


def _intervention_settings(
    given: InterventionSettings | Mapping[str, Any] | None, settings: TaskSettings
) -> InterventionSettings:
    """The parameters of interventions; those that other tasks have too are theirs. ValueError for an unknown one."""
    if isinstance(given, InterventionSettings):
        return given
    shared = {name: getattr(settings, name) for name in ("tag_rate", "min_harm_score", "seed")}
    try:
        return intervention_settings.read(given or {}, **shared)
    except ValueError as error:
        raise ValueError(f"interventions: {error}") from None


def _openings(parameters: InterventionSettings) -> Openings:
    return Openings(parameters.respond_token, parameters.refuse_token, parameters.refuse_tokens)


def _add_intervention(
    name: str,
    source_name: str,
    source: seqio.DataSource,
    steps: list[Any],
    vocabulary: SafeLMVocabulary,
    parameters: InterventionSettings,
) -> str:
    intervention = INTERVENTIONS[source_name]
    if intervention.is_unsafe_only:
        steps.append(pipeline.KeepScores(range(parameters.min_harm_score, MAX_SCORE + 1)))
    if intervention.is_safe_only:
        steps.append(pipeline.KeepScores(range(SAFE_SCORE, parameters.min_harm_score)))
    encode = functools.partial(encoding.encode_marked, intervention=intervention, settings=parameters)
    sought = intervention.sought(parameters) if intervention.sought else ""
    steps.append(pipeline.Encode(vocabulary, encode, encoding.intervention_channels(intervention), sought))
    return _add(name, source, steps, vocabulary)


def _add_task(
    name: str,
    source_name: str,
    source: seqio.DataSource,
    steps: list[Any],
    vocabulary: SafeLMVocabulary,
    settings: TaskSettings,
    openings: Openings | None,
) -> str:
    prepare, is_tagged = _keep_text, source_name.startswith("harm_tagged")
    if source_name == "filtered_web":
        steps.append(pipeline.KeepScores({SAFE_SCORE}))
    elif is_tagged:
        steps.append(pipeline.KeepScores(range(settings.min_harm_score, MAX_SCORE + 1)))
        prepare = functools.partial(_tag, settings)
    elif source_name == "refuseweb":
        prepare = functools.partial(_rename_speakers, settings)
    elif source_name in ("wildguardmix", "refusal_wildguardmix"):
        steps.append(pipeline.KeepScores({SAFE_SCORE}))
    is_chat = source_name in (*rates.CHAT_SOURCES, *rates.REFUSAL_SOURCES)
    encode = functools.partial(encoding.encode_documents, prepare=prepare, is_tagged=is_tagged)
    channels: tuple[str, ...] = ()
    if is_chat:
        encode = functools.partial(encoding.encode_chats, prepare=prepare, is_tagged=is_tagged, openings=openings)
        channels = ("loss_weight", *(("kind",) if openings else ()))
    steps.append(pipeline.Encode(vocabulary, encode, channels))
    return _add(name, source, steps, vocabulary)


def _add(name: str, source: seqio.DataSource, steps: Sequence[Any], vocabulary: SafeLMVocabulary) -> str:
    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=steps,
        output_features={"targets": seqio.Feature(vocabulary, add_eos=False, dtype=tf.int32)},
        metric_fns=[],
    )
    return name


def _add_mixture(name: str, rung: str, tasks: Mapping[str, str]) -> str:
    shares = [(tasks[source], functools.partial(_document_rate, share)) for source, share in rates.rates(rung).items()]
    seqio.MixtureRegistry.remove(name)
    seqio.MixtureRegistry.add(name, shares)
    return name


def _document_rate(share: float, task: seqio.Task) -> float:
    return share / _mean_tokens(task)


@functools.cache
def _mean_tokens(task: seqio.Task) -> float:
    """Mean length in tokens of a task's first documents, read once per process."""
    documents = task.get_dataset(split="train", shuffle=False, try_in_mem_cache=False).take(_DOCUMENTS_MEASURED)
    lengths = [len(example["targets"]) for example in documents.as_numpy_iterator()]
    if not lengths:
        raise ValueError(f"task {task.name} has no documents in split 'train': it can't be mixed")
    return sum(lengths) / len(lengths)


def _keep_text(doc_id: str, text: str, score: int) -> str:
    return text


def _tag(settings: TaskSettings, doc_id: str, text: str, score: int) -> str:
    return inject_harm_tag(
        text,
        harm_score=score,
        doc_id=doc_id,
        seed=settings.seed,
        tag_rate=settings.tag_rate,
        min_harm_score=settings.min_harm_score,
    )


def _rename_speakers(settings: TaskSettings, doc_id: str, text: str, score: int) -> str:
    return replace_speaker_names(text, doc_id=doc_id, seed=settings.seed)


def register_from_environment() -> None:
    """Registers the tasks of the environment variables above. Raises ValueError if one is missing or not a number."""
    data_dir, tokenizer = os.environ.get("SAFELM_DATA_DIR"), os.environ.get("SAFELM_TOKENIZER")
    if not data_dir and not tokenizer:
        return
    if not data_dir or not tokenizer:
        missing = "SAFELM_TOKENIZER" if data_dir else "SAFELM_DATA_DIR"
        raise ValueError(f"{missing} is not set: the tasks need SAFELM_DATA_DIR and SAFELM_TOKENIZER")
    settings: dict[str, Any] = {}
    for variable, field, kind in (("SAFELM_TAG_RATE", "tag_rate", float), ("SAFELM_TASK_SEED", "seed", int)):
        if value := os.environ.get(variable):
            try:
                settings[field] = kind(value)
            except ValueError:
                raise ValueError(f"{variable} must be a number, got {value!r}") from None
    quarantine = os.environ.get("SAFELM_QUARANTINE_DIR") or None
    annotations = os.environ.get("SAFELM_ANNOTATIONS") or None
    register(data_dir, tokenizer, settings=settings, quarantine_dir=quarantine, annotations=annotations)


register_from_environment()
