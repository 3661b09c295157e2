"""A SeqIO data source of web documents and conversations in files of rows, local or behind any fsspec URL."""

import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from data_tasks.held_out import TRAIN, VALIDATION, CorpusSplit
from data_tasks.readers import Document, MalformedLimit, ReadReport, RowFormat, WebDocuments, read_documents
from safelm.documents import annotations, notes, spans
from safelm.io import remote

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 20


class WebDocumentSource(seqio.DataSource):
    """The documents below a folder, as examples `{"id": string, "text": string, "harm_score": int32}`.
    A row format with spans or notes adds `"spans": string` or `"notes": string`, their JSON, one with metadata columns
    `"metadata": string`.

    A split's files are `<folder>/train-*` and `<folder>/validation-*`, also in subfolders as on the hub (a row format
    may use other names), in the formats of `safelm.documents` and in the order of their paths. A single such file may
    replace the folder. Of a corpus without validation files `validation_fraction` of the document ids is held out of
    "train", as `data_tasks.held_out` says. Each file is a shard. Documents are streamed in batches. For malformed rows
    see `data_tasks.readers`; with `quarantine_dir` they are kept in
    `<quarantine_dir>/<split>/<file>.malformed` (for a hash split all under "train").

    `num_input_examples` is None, since counting would read everything, so SeqIO's `Mixture.num_input_examples`, which
    adds the counts up, can't be used.
    """

    def __init__(
        self,
        folder: str,
        *,
        needs_score: bool = False,
        row_format: RowFormat | None = None,
        validation_fraction: float = 0.01,
        limit: MalformedLimit | None = None,
        quarantine_dir: str | None = None,
        split: CorpusSplit | None = None,
    ):
        """`folder` is an fsspec URL or a local path; nothing is read until a split, a shard or data is asked for.

        `row_format`: what rows are, if not web documents with (`needs_score`) or without a harm score.
        `split`: that of all tasks of this corpus, with its own fraction; by default the source is split by itself.
        """
        super().__init__(splits=())
        self.folder = folder.rstrip("/")
        self._reports: dict[tuple[str, int, int], ReadReport] = {}
        self._row_format = row_format or WebDocuments(needs_score)
        self._limit = limit or MalformedLimit()
        self._split = split or CorpusSplit(folder, self._row_format, validation_fraction, self._limit)
        self._quarantine_dir = quarantine_dir

    @property
    def splits(self) -> Sequence[str]:
        """ "train", and "validation" if the corpus has validation files or a hash split."""
        has_validation = self._split.fraction > 0 or bool(self._split.files[VALIDATION])
        return (TRAIN, VALIDATION) if has_validation else (TRAIN,)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """False, since each file is a shard."""
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        """URLs of the split's files. Raises FileNotFoundError if there are none, ValueError for an unknown split."""
        if split not in self.splits:
            raise ValueError(f"{self.folder}: no split {split!r}, it has {', '.join(self.splits)}")
        files = self._split.files[TRAIN if self._split.is_by_hash else split]
        if not files:
            named = {TRAIN: self._row_format.train_files, VALIDATION: self._row_format.validation_files}[split]
            pattern = f"{self.folder}/**/{named[0]}{{{','.join(self._row_format.suffixes)}}}"
            raise FileNotFoundError(f"empty corpus: no file matches {pattern}")
        return files

    def check_annotations(self, split: str) -> None:
        """Raises FileNotFoundError or ValueError naming a file of the split that an annotation folder doesn't cover."""
        for folder in self._row_format.annotations:
            for path in self.list_shards(split):
                annotations.of_file(path, folder)

    def get_dataset(
        self,
        split: str = TRAIN,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        *,
        sequence_length: Mapping[str, int] | None = None,
        use_cached: bool = False,
        num_epochs: int | None = 1,
    ) -> tf.data.Dataset:
        """Documents in file order; `shuffle` shuffles files (SeqIO's task shuffles documents)."""
        index, num_shards = (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)
        files = self._files_of(split, index, num_shards)
        if shuffle:
            np.random.default_rng(seed).shuffle(files)

        def batches() -> Iterator[dict[str, Any]]:  # tf.data takes one Python call per batch instead of per document
            return map(self._columns, self._batches(files, split, index, num_shards))

        kinds = {"id": tf.string, "text": tf.string, "harm_score": tf.int32}
        kinds |= dict.fromkeys(self._annotated, tf.string)
        signature = {name: tf.TensorSpec([None], kind) for name, kind in kinds.items()}
        return tf.data.Dataset.from_generator(batches, output_signature=signature).unbatch()

    def document_batches(self, split: str, index: int, num_shards: int) -> Iterator[list[Document]]:
        """The documents of one shard as lists, in file order (`safelm.caching.batches`)."""
        return self._batches(self._files_of(split, index, num_shards), split, index, num_shards)

    def shard_report(self, split: str, index: int, num_shards: int) -> ReadReport:
        """What has been read of a shard, the last time that its documents were asked for."""
        return self._reports[split, index, num_shards]

    def _files_of(self, split: str, index: int, num_shards: int) -> list[str]:
        files = list(self.list_shards(split))
        if len(files) < num_shards:
            raise ValueError(f"{self.folder}: {len(files)} files can't make {num_shards} shards")
        return files[index::num_shards]

    def _batches(self, files: Sequence[str], split: str, index: int, num_shards: int) -> Iterator[list[Document]]:
        report = self._reports[split, index, num_shards] = ReadReport()  # shards may be read at once, by threads
        batch: list[Document] = []
        characters = 0
        for path in files:
            for document in self._documents(path, split, report):
                batch.append(document)
                characters += len(document.text)
                if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
                    yield batch
                    batch, characters = [], 0
        if batch:
            yield batch
        if num_shards == 1 and report.rows == report.malformed:
            raise ValueError(
                f"empty corpus: {self.folder} split {split!r} has no usable row in {len(files)} files "
                f"({report.malformed} malformed)"
            )

    @property
    def _annotated(self) -> list[str]:
        """What documents have beside their text."""
        if not isinstance(self._row_format, WebDocuments):
            return []
        has = {"spans": self._row_format.has_spans, "notes": self._row_format.has_notes}
        has |= {"metadata": bool(self._row_format.metadata_columns)}
        return [name for name, is_there in has.items() if is_there]

    def _columns(self, batch: Sequence[Document]) -> dict[str, Any]:
        columns = {
            "id": [document.id.encode() for document in batch],
            "text": [document.text.encode() for document in batch],
            "harm_score": [document.harm_score for document in batch],
        }
        spelled = {"spans": spans.to_json, "notes": notes.to_json, "metadata": str}
        return columns | {
            name: [spelled[name](getattr(document, name)).encode() for document in batch] for name in self._annotated
        }

    def _documents(self, path: str, split: str, report: ReadReport) -> Iterator[Document]:
        # Malformed rows of a hash split belong to neither part: "train" counts and keeps them, once.
        held_out = self._split.is_by_hash and split == VALIDATION
        quarantine = None if held_out else self._quarantine_file(path, split)
        tally = ReadReport() if held_out else report
        documents = read_documents(
            path, row_format=self._row_format, limit=self._limit, report=tally, quarantine=quarantine
        )
        for document in documents:
            if self._split.holds_out(document.split_id) == held_out:
                report.beside.update(document.beside())
                yield document
        if held_out:
            report.rows += tally.rows - tally.malformed

    def _quarantine_file(self, path: str, split: str) -> str | None:
        if not self._quarantine_dir:
            return None
        (_, root), (_, inner) = remote.filesystem(self.folder), remote.filesystem(path)
        name = posixpath.basename(inner) if inner == root else posixpath.relpath(inner, root).replace("/", "__")
        return os.path.join(self._quarantine_dir, split, f"{name}.malformed")
