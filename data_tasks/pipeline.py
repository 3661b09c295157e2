"""The steps of a SeqIO task: `tf.data` around the pure functions of `data_tasks.preprocessors`.

Text is processed in Python in batches of documents (`tf.numpy_function`), because a call per document would cost more
than tokenizing it; the tokenizer uses all cores and releases Python's lock. Order is kept and nothing depends on time
or batch, so reading twice gives the same examples.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence

import numpy as np
import tensorflow as tf
from jaxtyping import Float32, Int, Int32

from data_tasks.chats import Openings, encode_chat, map_content
from data_tasks.intervention_settings import InterventionSettings
from data_tasks.interventions import Intervention, mark_documents, spans_of
from data_tasks.preprocessors import NO_SCORE, append_end_of_document
from data_tasks.readers import Document
from data_tasks.vocabulary import SafeLMVocabulary
from safelm.data.token_kinds import CONTROL, MASKED, TEXT
from safelm.documents import ID_COLUMN, harm, missing_column
from safelm.documents.notes import from_json
from safelm.tags import MAX_SCORE
from safelm.text.chat_template import ASSISTANT
from safelm.text.harm_tags import remove_harm_tags
from safelm.text.tokenizer import Tokenizer

_BATCH_DOCUMENTS = 256

PrepareText = Callable[[str, str, int], str]  # (id, text without literal tags, harm score) -> text to tokenize


@dataclasses.dataclass(frozen=True)
class EncodedDocuments:
    """A batch of documents as one array, with the end-of-document id after each; counts are per document."""

    tokens: Int32[np.ndarray, " tokens"]
    loss_weight: Float32[np.ndarray, " tokens"]  # 1, and in a conversation 0 for what the assistant doesn't say
    lengths: Int32[np.ndarray, " documents"]
    lost_bytes: Int32[np.ndarray, " documents"]
    removed_tags: Int32[np.ndarray, " documents"]


def encode_documents(
    ids: Sequence[str],
    texts: Sequence[str],
    scores: Int[np.ndarray, " documents"],
    *,
    tokenizer: Tokenizer,
    prepare: PrepareText,
    is_tagged: bool,
) -> EncodedDocuments:
    """Tokenizes documents: removes literal tags, applies `prepare`, encodes, and appends the end of document.

    Only with `is_tagged` does the tag's string in a prepared text become the tag's id.
    """
    cleaned = [remove_harm_tags(text) for text in texts]
    prepared = [
        prepare(*document) for document in zip(ids, (text for text, _ in cleaned), scores.tolist(), strict=True)
    ]
    documents = (tokenizer.encode_tagged_batch if is_tagged else tokenizer.encode_batch)(prepared)
    tokens, lengths = append_end_of_document(documents, tokenizer.eos_id)
    lost_bytes = np.array([tokenizer.count_lost_bytes(text) for text in prepared], np.int32)
    removed = np.array([count for _, count in cleaned], np.int32)
    return EncodedDocuments(tokens, np.ones(len(tokens), np.float32), lengths, lost_bytes, removed)


def encode_chats(
    ids: Sequence[str],
    texts: Sequence[str],
    scores: Int[np.ndarray, " documents"],
    *,
    tokenizer: Tokenizer,
    prepare: PrepareText,
    is_tagged: bool,
    openings: Openings | None = None,
) -> EncodedDocuments:
    """Like `encode_documents` for conversations (`data_tasks.chats`); `prepare` is applied to the assistant's words.

    `openings`: the control tokens before answers.
    """
    encoded, lost_bytes, removed = [], [], []
    for doc_id, text, score in zip(ids, texts, scores.tolist(), strict=True):
        counts = {"removed": 0, "lost": 0}

        def change(role, content, doc_id=doc_id, score=score, counts=counts):
            content, found = remove_harm_tags(content)
            content = prepare(doc_id, content, score) if role == ASSISTANT else content
            counts["removed"] += found
            counts["lost"] += tokenizer.count_lost_bytes(content)
            return content

        changed = map_content(text, change)
        encoded.append(encode_chat(changed, tokenizer, is_tagged=is_tagged, openings=openings))
        removed.append(counts["removed"])
        lost_bytes.append(counts["lost"])
    tokens, weights = ([arrays[i] for arrays in encoded] for i in (0, 1))
    lengths = np.array([len(array) for array in tokens], np.int32)
    counted = (np.array(counts, np.int32) for counts in (lost_bytes, removed))
    return EncodedDocuments(np.concatenate(tokens), np.concatenate(weights), lengths, *counted)


def select_columns(
    dataset: tf.data.Dataset,
    *,
    text_column: str = "text",
    id_column: str = ID_COLUMN,
    score_column: str | None = None,
) -> tf.data.Dataset:
    """Examples with just `id`, `text` and `harm_score`, from a TFDS data set's own columns.

    The harm score is found as in `safelm.documents.harm`.

    Raises ValueError if the id, the text or `score_column` is missing.
    """
    columns = dataset.element_spec
    for name in (id_column, text_column):
        if name not in columns or columns[name].dtype != tf.string:
            raise missing_column("TFDS data set", name, columns)
    names = _names(columns)
    if score_column and score_column not in names:
        raise missing_column("TFDS data set", score_column, names)
    chosen = harm.choose_column(names, score_column)

    def select(example):
        return {"id": example[id_column], "text": example[text_column], "harm_score": _score(example, chosen)}

    return dataset.map(select, num_parallel_calls=tf.data.AUTOTUNE)


def keep_scores(scores: Collection[int]) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """A step that keeps the documents with one of these harm scores."""

    def keep(dataset: tf.data.Dataset) -> tf.data.Dataset:
        wanted = tf.constant(sorted(scores), tf.int32)
        return dataset.filter(lambda example: tf.reduce_any(tf.equal(example["harm_score"], wanted)))

    return keep


def tokenize(
    vocabulary: SafeLMVocabulary,
    prepare: PrepareText,
    *,
    is_tagged: bool = False,
    is_chat: bool = False,
    openings: Openings | None = None,
) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """A step from text to `targets`, the ids with the end of document.

    Beside `targets` an example keeps its `id` and `harm_score` and gets `lost_bytes` (bytes without a token) and
    `removed_tags` (literal tags removed from the source text); its text is dropped. With `is_chat` the text is a
    conversation (`data_tasks.chats`), and an example also gets `loss_weight`, how much each of its `targets` counts in
    the loss. `openings` as in `encode_chats`: of each token an example then also says its `kind`.
    """
    named = ("targets", *(("loss_weight",) if is_chat else ()), *(("kind",) if openings else ()))

    def encode(ids, texts, scores):
        encode_all = functools.partial(encode_chats, openings=openings) if is_chat else encode_documents
        encoded = encode_all(
            [doc_id.decode() for doc_id in ids],
            [text.decode() for text in texts],
            scores,
            tokenizer=vocabulary.tokenizer,
            prepare=prepare,
            is_tagged=is_tagged,
        )
        return encoded.tokens, encoded.loss_weight, encoded.lengths, encoded.lost_bytes, encoded.removed_tags

    def step(batch):
        inputs = [batch["id"], batch["text"], batch["harm_score"]]
        kinds = [tf.int32, tf.float32, tf.int32, tf.int32, tf.int32]
        arrays = tf.numpy_function(encode, inputs, kinds, stateful=False)
        tokens, loss_weight, lengths, lost_bytes, removed_tags = (tf.ensure_shape(array, [None]) for array in arrays)
        found = {"targets": tokens, "loss_weight": loss_weight}
        if openings:
            opening_ids = tf.constant(sorted(openings.ids(vocabulary.tokenizer)))
            is_opening = tf.reduce_any(tokens[:, None] == opening_ids[None], axis=1)
            found["kind"] = tf.where(is_opening, CONTROL, tf.where(loss_weight > 0, TEXT, MASKED))
        ragged = {name: tf.RaggedTensor.from_row_lengths(found[name], lengths, validate=False) for name in named}
        counts = {"lost_bytes": lost_bytes, "removed_tags": removed_tags}
        return {**ragged, "id": batch["id"], "harm_score": batch["harm_score"], **counts}

    def run(dataset: tf.data.Dataset) -> tf.data.Dataset:
        encoded = dataset.batch(_BATCH_DOCUMENTS).map(step, num_parallel_calls=2, deterministic=True)
        return encoded.unbatch().map(
            lambda example: {**example, **{name: tf.convert_to_tensor(example[name]) for name in named}},
            num_parallel_calls=1,
        )

    return run


def intervene(
    vocabulary: SafeLMVocabulary, intervention: Intervention, settings: InterventionSettings
) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """A step from text and what is known of it to `targets` with their `loss_weight`, as an intervention has them.

    Beside what `tokenize` gives, an example has the `kind` of each of its `targets` (`safelm.data.token_kinds`) and,
    where the intervention makes tokens unlikely, their `unlikelihood`.
    """
    ragged = ("targets", "kind", "loss_weight", *(("unlikelihood",) if intervention.has_unlikelihood else ()))

    def encode(ids, texts, scores, *beside):
        rows = []
        for doc_id, text, score, *known in zip(ids, texts, scores.tolist(), *beside, strict=True):
            spans, notes, metadata = (each.decode() for each in known)
            document = Document(
                doc_id.decode(), text.decode(), score, spans=spans_of(spans), notes=from_json(notes), metadata=metadata
            )
            rows.append(document)
        made = mark_documents(intervention, settings, vocabulary.tokenizer, rows)
        lost = [vocabulary.tokenizer.count_lost_bytes(text) for text in (row.text for row in rows)]
        counts = ([len(each.tokens) for each in made], lost)
        counts += tuple([getattr(each, name) for each in made] for name in ("removed_tags", "cut_tokens"))
        return (
            *(np.concatenate([getattr(each, name) for each in made]) for name in ("tokens", *ragged[1:])),
            *(np.array(count, np.int32) for count in counts),
        )

    def step(batch):
        none = tf.fill(tf.shape(batch["id"]), "")
        beside = [batch.get(name, none) for name in ("spans", "notes", "metadata")]
        kinds = [tf.int32, tf.int32, *[tf.float32] * (len(ragged) - 2), *[tf.int32] * 4]
        inputs = [batch["id"], batch["text"], batch["harm_score"], *beside]
        found = tf.numpy_function(encode, inputs, kinds, stateful=False)
        lengths, lost_bytes, removed_tags, cut_tokens = (tf.ensure_shape(a, [None]) for a in found[len(ragged) :])
        cut = {
            name: tf.RaggedTensor.from_row_lengths(values, lengths, validate=False)
            for name, values in zip(ragged, found[: len(ragged)], strict=True)
        }
        counts = {"lost_bytes": lost_bytes, "removed_tags": removed_tags, "cut_tokens": cut_tokens}
        return {**cut, "id": batch["id"], "harm_score": batch["harm_score"], **counts}

    def run(dataset: tf.data.Dataset) -> tf.data.Dataset:
        encoded = dataset.batch(_BATCH_DOCUMENTS).map(step, num_parallel_calls=2, deterministic=True)
        return encoded.unbatch().map(
            lambda example: {
                **example,
                **{name: tf.ensure_shape(tf.convert_to_tensor(example[name]), [None]) for name in ragged},
            },
            num_parallel_calls=1,
        )

    return run


def _names(columns) -> list[str]:
    """The names of columns, and of fields of structs as `struct.field`."""
    nested = [f"{name}.{inner}" for name, kind in columns.items() if isinstance(kind, dict) for inner in _names(kind)]
    return [*columns, *nested]


def _score(example, column: str | None) -> tf.Tensor:
    if column is None:
        return tf.constant(NO_SCORE, tf.int32)
    value = example
    for name in [column] if column in example else column.split("."):
        value = value[name]
    value = tf.cast(value, tf.float64)
    is_score = (value >= 0) & (value <= MAX_SCORE)  # not of NaN
    return tf.where(is_score, tf.cast(tf.floor(tf.where(is_score, value, 0.0) + 0.5), tf.int32), NO_SCORE)
