"""Makes one shard of a token store from a SeqIO task's examples of one source file.

It is a module of its own so that worker processes can import it. TensorFlow and SeqIO are imported by the functions
that run a task, never by the module.
"""

import builtins
import contextlib
import dataclasses
import importlib
import inspect
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from safelm.caching.batches import BatchedTask, batched
from safelm.data.channels import CHANNELS, KIND, LOSS_WEIGHT, TASK_CHANNELS
from safelm.data.shard import ShardInfo, ShardWriter
from safelm.data.token_kinds import KINDS
from safelm.documents import content_sha256, has_changed
from safelm.io.collector import imports_left_alone

_PYTHON_ERROR = re.compile(r"^(?:\{\{.*?\}\} ?)?(?P<kind>\w+): (?P<message>.*)$", re.MULTILINE)
_LINE_OF_TENSORFLOW = re.compile(
    r"WARNING: All log messages before absl::InitializeLog|[IWE]\d{4} [\d:.]+ +\d+ \w+\.(cc|h):\d+\]"
    r"|\d{4}-\d\d-\d\d [\d:.]+: [IWE] (tensorflow|external|xla)/"
)
_REPORT_EVERY_DOCUMENTS = 256
_MOST_NAMES = 50
_COUNTED = ("lost_bytes", "removed_tags", "cut_tokens", "unmarked")  # of an example or batch
UNMARKED = "num_unmarked_documents"  # of a manifest: documents without a span, note or host that the task marks
BESIDE = "beside_text"  # and what the documents have beside their text, by name, the most frequent of a shard
TOKEN_KINDS = "token_kinds"  # of a manifest: how many of its tokens are of each of `KINDS`, but for text


@dataclasses.dataclass(frozen=True)
class TaskModule:
    """A module that registers SeqIO tasks, and the arguments of its `register` function, if it has one."""

    name: str
    arguments: Mapping[str, Any]

    def load(self) -> Any:
        """Imports the module and calls `register` if it has one; returns its result or None."""
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        try:
            with _without_lines_of_tensorflow():
                import absl.logging
                import tensorflow

                absl.logging.set_verbosity(absl.logging.WARNING)  # SeqIO and TFDS may log examples below that
                with contextlib.suppress(RuntimeError):  # the process already uses TensorFlow, with the devices it has
                    tensorflow.config.set_visible_devices([], "GPU")
                tensorflow.constant(0)  # looks for devices, and says so
                module = importlib.import_module(self.name)
        except ModuleNotFoundError as error:
            if error.name != self.name and not self.name.startswith(f"{error.name}."):
                raise
            raise ValueError(f"--module: no module named {self.name!r} can be imported") from error
        register = getattr(module, "register", None)
        if register is None:
            return None
        taken = inspect.signature(register).parameters
        arguments = {name: value for name, value in self.arguments.items() if name in taken or value is not None}
        if unknown := arguments.keys() - taken.keys():
            raise ValueError(f"--module {self.name}: its register() takes no {sorted(unknown)[0]!r}")
        return register(**arguments)


@contextlib.contextmanager
def _without_lines_of_tensorflow() -> Iterator[None]:
    """Holds back standard error, and then tells it without what TensorFlow's C++ says of the processor and of CUDA.

    No setting of TensorFlow's keeps these lines back, which come before its logging is set up.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held, contextlib.ExitStack() as stack:
        stderr = os.dup(2)
        stack.callback(os.close, stderr)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            held.seek(0)
            for line in held.read().decode(errors="replace").splitlines():
                if not _LINE_OF_TENSORFLOW.match(line):
                    print(line, file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class CacheJob:
    """Everything a worker needs to write one shard."""

    source_name: str
    task_name: str
    split: str
    index: int
    num_shards: int
    directory: str
    fingerprint: str
    dtype: str
    eos_id: int
    harm_tag_id: int
    path: str = ""  # of the source file, where it has one


def write_shard(job: CacheJob, on_documents: Callable[[int], object] = lambda count: None) -> ShardInfo:
    """Runs the task over one shard of its source and writes the tokens; on an error nothing is left under its name.

    An example's features that are named as one of `safelm.data.channels.TASK_CHANNELS` go into that channel:
    `loss_weight`, one number for each of its `targets`, says how much each counts in the loss (default: 1), and
    `unlikelihood` how much -log(1 - p) does; `kind` says what each is (`safelm.data.token_kinds`), and how many are of
    which kind is added up for the manifest.

    `on_documents` is told now and then how many more documents are done. Raises ValueError or OSError with one clear
    line for bad input, also where TensorFlow wraps the error.
    """
    import seqio

    task = seqio.TaskRegistry.get(job.task_name)
    content = _content(job)
    in_batches = batched(task)
    examples = None if in_batches else _examples(task, job)
    features = in_batches.encoder.channel_names if in_batches else examples.element_spec
    declared = [each for each in TASK_CHANNELS if each in CHANNELS or each.name in features]
    writer = ShardWriter(
        *(job.directory, job.index, job.num_shards, job.dtype),
        harm_tag_id=job.harm_tag_id,
        fingerprint=job.fingerprint,
        channels=declared,
    )
    tally = _Tally()
    with writer, imports_left_alone():
        if in_batches:
            _write_batches(in_batches, job, writer, tally, on_documents)
        else:
            _write_examples(examples, job, writer, tally, on_documents)
        counts = tally.counts(KIND.name in features)
        if hasattr(task.source, "shard_report"):
            report = task.source.shard_report(job.split, job.index, job.num_shards)
            counts |= {"num_quarantined": report.malformed, "num_rows": report.rows}
            counts["score_columns"] = dict(report.score_columns)
            if beside := getattr(report, "beside", None):
                counts[BESIDE] = dict(beside.most_common(_MOST_NAMES))
        if has_changed(job.path, content):
            raise ValueError(f"{job.path}: it was changed while it was cached: run again")
        return writer.close(counts | {"input": content})


@dataclasses.dataclass
class _Tally:
    """What is counted of a shard's documents."""

    lost_bytes: int = 0
    removed_tags: int = 0
    loss_tokens: int = 0
    cut_tokens: int = 0
    unmarked: int = 0
    kinds: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(len(KINDS), np.int64))

    def add(self, num_tokens: int, channels: Mapping[str, np.ndarray], counted: Mapping[str, Any]) -> None:
        """Adds documents, whose counts are numbers or arrays of them."""
        weights = channels.get(LOSS_WEIGHT.name)
        self.loss_tokens += num_tokens if weights is None else int((weights > 0).sum())
        self.kinds += np.bincount(channels.get(KIND.name, ()), minlength=len(KINDS))
        for name in _COUNTED:
            setattr(self, name, getattr(self, name) + int(np.sum(counted.get(name, 0))))

    def counts(self, has_kinds: bool) -> dict[str, Any]:
        """For the shard's record."""
        found: dict[str, Any] = {"num_lost_bytes": self.lost_bytes, "num_removed_tags": self.removed_tags}
        found["num_loss_tokens"] = self.loss_tokens
        if has_kinds:
            found[TOKEN_KINDS] = dict(zip(KINDS[1:], self.kinds.tolist()[1:], strict=True))
        rare = {"num_cut_tokens": self.cut_tokens, UNMARKED: self.unmarked}
        return found | {name: count for name, count in rare.items() if count}


def _write_batches(
    task: BatchedTask, job: CacheJob, writer: ShardWriter, tally: _Tally, on_documents: Callable[[int], object]
) -> None:
    try:
        with contextlib.closing(task.batches(job.split, job.index, job.num_shards)) as batches:
            for batch in batches:
                ends = np.cumsum(batch.lengths) - 1
                if batch.lengths.min() < 1 or (batch.tokens[ends] != job.eos_id).any():
                    raise _without_end(job)
                try:
                    writer.add_many(batch.tokens, batch.lengths, **batch.channels)
                except ValueError:
                    for doc_id, tokens, channels in batch.one_by_one():  # which says of which document it is
                        _add(writer, job, doc_id, tokens, channels)
                    raise
                tally.add(len(batch.tokens), batch.channels, {name: getattr(batch, name) for name in _COUNTED})
                on_documents(len(batch.lengths))
    except ValueError as error:
        if not str(error).startswith("id "):
            raise
        raise ValueError(f"{job.path}, {error}") from None


def _write_examples(
    examples: Any, job: CacheJob, writer: ShardWriter, tally: _Tally, on_documents: Callable[[int], object]
) -> None:
    import tensorflow as tf

    unreported = 0
    try:
        for example in examples.as_numpy_iterator():
            tokens = example["targets"]
            if not len(tokens) or tokens[-1] != job.eos_id:
                raise _without_end(job)
            channels = {each.name: example[each.name] for each in TASK_CHANNELS if each.name in example}
            _add(writer, job, _spelled_id(example), tokens, channels)
            tally.add(len(tokens), channels, example)
            unreported += 1
            if unreported == _REPORT_EVERY_DOCUMENTS:
                on_documents(unreported)
                unreported = 0
    except tf.errors.OpError as error:
        raise _clear_error(error, job.path) from None
    on_documents(unreported)


def _add(
    writer: ShardWriter, job: CacheJob, doc_id: str, tokens: np.ndarray, channels: Mapping[str, np.ndarray]
) -> None:
    try:
        writer.add(tokens, **channels)
    except ValueError as error:
        raise ValueError(f"{job.path or job.task_name}, id {doc_id}: {error}") from None


def _without_end(job: CacheJob) -> ValueError:
    return ValueError(f"task {job.task_name}: a document's targets don't end in eos_id {job.eos_id}")


def _spelled_id(example: Mapping[str, Any]) -> str:
    doc_id = example.get("id", b"?")
    return doc_id.decode("utf-8", "replace") if isinstance(doc_id, bytes) else str(doc_id)


def _content(job: CacheJob) -> dict[str, Any]:
    return content_sha256(job.path) if os.path.isfile(job.path) else {}


def _examples(task: Any, job: CacheJob) -> Any:
    import seqio

    return task.get_dataset(
        split=job.split,
        shuffle=False,
        shard_info=seqio.ShardInfo(job.index, job.num_shards),
        num_epochs=1,
        trim_output_features=False,
        try_in_mem_cache=False,
    )


def _clear_error(error: Exception, path: str = "") -> Exception:
    """The ValueError or OSError that Python code inside tf.data raised; any other error unchanged.

    An error that begins with a document's id is about a document of the file `path`.
    """
    found = _PYTHON_ERROR.search(str(error))
    kind = getattr(builtins, found["kind"], None) if found else None
    if not isinstance(kind, type):
        return error
    if issubclass(kind, FileNotFoundError):
        return FileNotFoundError(found["message"])
    if issubclass(kind, OSError):
        return OSError(found["message"])
    message = f"{path}, {found['message']}" if found["message"].startswith("id ") else found["message"]
    return ValueError(message) if issubclass(kind, ValueError) else error
