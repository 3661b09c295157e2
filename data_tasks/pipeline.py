"""The preprocessors as steps of a SeqIO task: `tf.data` around the pure functions of `data_tasks.preprocessors`.

Text work runs in Python on batches of documents (`tf.numpy_function`), because a call for every document costs more
than tokenizing it; the tokenizer uses all cores and lets go of Python's lock meanwhile. Order is kept and nothing
depends on time or on the batch, so two readings give the same examples.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence

import numpy as np
import tensorflow as tf
from jaxtyping import Int, Int32

from data_tasks.preprocessors import append_end_of_document, remove_harm_tags
from data_tasks.readers import MAX_SCORE, NO_SCORE, SCORE_FIELDS, missing_column
from data_tasks.vocabulary import SafeLMVocabulary
from safelm.tokenizer import Tokenizer

_BATCH_DOCUMENTS = 256

PrepareText = Callable[[str, str, int], str]  # (id, text without literal tags, harm score) -> text to tokenize


@dataclasses.dataclass(frozen=True)
class EncodedDocuments:
    """A batch of documents end to end, the end of document after each; counts are per document."""

    tokens: Int32[np.ndarray, " tokens"]
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
    """Tokenizes documents: literal tags out, `prepare`, ids, end of document.

    Only with `is_tagged` does the tag's string in a prepared text become the tag's id.
    """
    cleaned = [remove_harm_tags(text) for text in texts]
    prepared = [
        prepare(*document) for document in zip(ids, (text for text, _ in cleaned), scores.tolist(), strict=True)
    ]
    documents = (tokenizer.encode_tagged_batch if is_tagged else tokenizer.encode_batch)(prepared)
    tokens, lengths = append_end_of_document(documents, tokenizer.eos_id)
    lost_bytes = np.array([tokenizer.count_lost_bytes(text) for text in prepared], np.int32)
    return EncodedDocuments(tokens, lengths, lost_bytes, np.array([count for _, count in cleaned], np.int32))


def select_columns(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Examples with only `id`, `text` and `harm_score`, from a source's own columns (WebDocumentSource, TFDS).

    The harm score is found as in `data_tasks.readers`. Raises ValueError if there is no `id` or no `text`.
    """
    columns = dataset.element_spec
    for name in ("id", "text"):
        if name not in columns or columns[name].dtype != tf.string:
            raise missing_column("TFDS data set", name, [name], columns)

    def select(example):
        return {"id": example["id"], "text": example["text"], "harm_score": _score(example)}

    return dataset.map(select, num_parallel_calls=tf.data.AUTOTUNE)


def keep_scores(scores: Collection[int]) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """A step that keeps the documents with one of these harm scores."""

    def keep(dataset: tf.data.Dataset) -> tf.data.Dataset:
        wanted = tf.constant(sorted(scores), tf.int32)
        return dataset.filter(lambda example: tf.reduce_any(tf.equal(example["harm_score"], wanted)))

    return keep


def tokenize(
    vocabulary: SafeLMVocabulary, prepare: PrepareText, *, is_tagged: bool = False
) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """A step from text to `targets`, the ids with the end of document.

    Beside `targets` an example keeps its `id` and `harm_score` and gets `lost_bytes` (bytes without a token) and
    `removed_tags` (literal tags taken out of the source text). The text goes.
    """

    def encode(ids, texts, scores):
        encoded = encode_documents(
            [doc_id.decode() for doc_id in ids],
            [text.decode() for text in texts],
            scores,
            tokenizer=vocabulary.tokenizer,
            prepare=prepare,
            is_tagged=is_tagged,
        )
        return encoded.tokens, encoded.lengths, encoded.lost_bytes, encoded.removed_tags

    def step(batch):
        inputs = [batch["id"], batch["text"], batch["harm_score"]]
        tokens, lengths, lost_bytes, removed_tags = tf.numpy_function(encode, inputs, [tf.int32] * 4, stateful=False)
        tokens, lengths, lost_bytes, removed_tags = (
            tf.ensure_shape(array, [None]) for array in (tokens, lengths, lost_bytes, removed_tags)
        )
        targets = tf.RaggedTensor.from_row_lengths(tokens, lengths, validate=False)
        counts = {"lost_bytes": lost_bytes, "removed_tags": removed_tags}
        return {"targets": targets, "id": batch["id"], "harm_score": batch["harm_score"], **counts}

    def run(dataset: tf.data.Dataset) -> tf.data.Dataset:
        encoded = dataset.batch(_BATCH_DOCUMENTS).map(step, num_parallel_calls=2, deterministic=True)
        return encoded.unbatch().map(
            lambda example: {**example, "targets": tf.convert_to_tensor(example["targets"])}, num_parallel_calls=1
        )

    return run


def _score(example) -> tf.Tensor:
    for field in SCORE_FIELDS:
        outer, _, inner = field.rpartition(".")
        holder = example.get(outer) if outer else example
        if isinstance(holder, dict) and inner in holder:
            value = tf.cast(holder[inner], tf.float64)
            is_score = (value >= 0) & (value <= MAX_SCORE)  # not of NaN
            return tf.where(is_score, tf.cast(tf.floor(tf.where(is_score, value, 0.0) + 0.5), tf.int32), NO_SCORE)
    return tf.constant(NO_SCORE, tf.int32)
