"""The steps of a SeqIO task: `tf.data` around the pure functions of `data_tasks.encoding`.

A step is called with a data set, as SeqIO does, or its `on_documents` with a batch of documents, as
`safelm.caching.batches` does, which spares TensorFlow's work on single examples: both give the same.

Text is processed in Python in batches of documents (`tf.numpy_function`), because a call per document would cost more
than tokenizing it; the tokenizer uses all cores and releases Python's lock. Order is kept and nothing depends on time
or batch, so reading twice gives the same examples.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from data_tasks.preprocessors import NO_SCORE
from data_tasks.readers import Document
from data_tasks.vocabulary import SafeLMVocabulary
from safelm.caching.batches import EncodedBatch
from safelm.documents import ID_COLUMN, harm, missing_column, notes, spans
from safelm.tags import MAX_SCORE

_BATCH_DOCUMENTS = 256
_BESIDE = ("spans", "notes", "metadata")  # strings that an example may have beside its text
_COUNTS = ("lost_bytes", "removed_tags", "cut_tokens", "unmarked")


@dataclasses.dataclass(frozen=True, eq=False)
class KeepScores:
    """A step that keeps the documents with one of these harm scores."""

    scores: Collection[int]

    def __call__(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        wanted = tf.constant(sorted(self.scores), tf.int32)
        return dataset.filter(lambda example: tf.reduce_any(tf.equal(example["harm_score"], wanted)))

    def on_documents(self, documents: Sequence[Document]) -> Sequence[Document]:
        """The documents of a batch that are kept."""
        return [document for document in documents if document.harm_score in self.scores]


@dataclasses.dataclass(frozen=True, eq=False)
class Encode:
    """A step from text, and what is known of it, to `targets`, the ids with the end of document.

    Beside `targets` an example keeps its `id` and `harm_score` and gets the channels and the counts of
    `safelm.caching.batches.EncodedBatch`; its text is dropped.

    Attributes:
      encode: makes the batch of documents and `tokenizer`, which is loaded when it is first needed.
      channel_names: of the batch's channels.
      sought: what the documents that are not `unmarked` have, in words; "" for tasks that mark nothing beside a text.
    """

    vocabulary: SafeLMVocabulary
    encode: Callable[..., EncodedBatch]
    channel_names: Sequence[str] = ()
    sought: str = ""

    def on_documents(self, documents: Sequence[Document]) -> EncodedBatch:
        """A batch of documents encoded."""
        return self.encode(documents, tokenizer=self.vocabulary.tokenizer)

    def __call__(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        encoded = dataset.batch(_BATCH_DOCUMENTS).map(self._step, num_parallel_calls=2, deterministic=True)
        names = ("targets", *self.channel_names)
        return encoded.unbatch().map(
            lambda example: {
                **example,
                **{name: tf.ensure_shape(tf.convert_to_tensor(example[name]), [None]) for name in names},
            },
            num_parallel_calls=1,
        )

    def _step(self, batch: dict[str, tf.Tensor]) -> dict[str, Any]:
        none = tf.fill(tf.shape(batch["id"]), "")
        inputs = [batch["id"], batch["text"], batch["harm_score"], *(batch.get(name, none) for name in _BESIDE)]
        dtypes = [tf.int32 if name == "kind" else tf.float32 for name in self.channel_names]
        outputs = [tf.int32, *dtypes, tf.int32, *[tf.int32] * len(_COUNTS)]
        arrays = tf.numpy_function(self._arrays, inputs, outputs, stateful=False)
        arrays = [tf.ensure_shape(array, [None]) for array in arrays]
        named = dict(zip(("targets", *self.channel_names, "lengths", *_COUNTS), arrays, strict=True))
        lengths = named.pop("lengths")
        ragged = {
            name: tf.RaggedTensor.from_row_lengths(named.pop(name), lengths, validate=False)
            for name in ("targets", *self.channel_names)
        }
        return {**ragged, "id": batch["id"], "harm_score": batch["harm_score"], **named}

    def _arrays(self, ids, texts, scores, *beside) -> tuple[np.ndarray, ...]:
        """Tokens, channels, lengths and counts of documents as TensorFlow has them."""
        documents = []
        for doc_id, text, score, *known in zip(ids, texts, scores.tolist(), *beside, strict=True):
            marked, noted, metadata = (each.decode() for each in known)
            found = spans.from_json(marked) if marked else ()
            beside_it = {"spans": found, "notes": notes.from_json(noted), "metadata": metadata}
            documents.append(Document(doc_id.decode(), text.decode(), score, **beside_it))
        made = self.on_documents(documents)
        channels = (made.channels[name] for name in self.channel_names)
        return (made.tokens, *channels, made.lengths, *(getattr(made, name) for name in _COUNTS))


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
