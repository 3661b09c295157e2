"""Plans a token cache: a store's settings and inputs, and which of its shards are missing."""

import contextlib
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from safelm import documents
from safelm.caching.shards import BESIDE, TOKEN_KINDS, UNMARKED, CacheJob
from safelm.caching.upload import SETTINGS_NAME, Bucket
from safelm.data.channels import CHANNELS
from safelm.data.shard import ShardInfo, read_shard_info, shard_file, token_dtype
from safelm.data.store import FORMAT_VERSION, MANIFEST_NAME, Manifest, TokenStore, read_manifest, write_manifest
from safelm.data.token_kinds import KINDS
from safelm.io import records
from safelm.jobs.settings import check_same
from safelm.text.tokenizer import Tokenizer

_SHOWN_NAMES = 8


@dataclasses.dataclass
class StorePlan:
    """One store: its finished shards, the jobs for the missing ones, and the content of its manifest.

    With a `bucket`, a shard is finished if it is in the bucket, or here and waiting to be uploaded. `sought` says what
    the task marks in documents ("" for a task that marks nothing beside their text), `allows_unmarked` that a store
    may be made in which nothing is marked although there is something beside the text.
    """

    source_name: str
    task_name: str
    split: str
    directory: str
    tokenizer: Tokenizer
    settings: Mapping[str, Any]
    num_shards: int
    bucket: Bucket | None = None
    sought: str = ""
    allows_unmarked: bool = False
    done: dict[int, ShardInfo] = dataclasses.field(default_factory=dict)
    jobs: list[CacheJob] = dataclasses.field(default_factory=list)
    pending_bytes: int = 0

    @property
    def place(self) -> str:
        """The store's path or URL, for messages."""
        return self.bucket.url if self.bucket else self.directory

    @property
    def elsewhere(self) -> Mapping[str, int] | None:
        """Names and sizes (bytes) of the files in the bucket."""
        return self.bucket.sizes if self.bucket else None

    @property
    def needs_writing(self) -> bool:
        """Whether the store, in a bucket, isn't whole there."""
        shards = [self.done[index] for index in sorted(self.done)]
        if self.jobs or not all(self.bucket.holds(info, self.num_shards) for info in shards):
            return True
        is_empty = self.split != "train" and not any(info.num_documents for info in shards)
        return not is_empty and MANIFEST_NAME not in self.bucket.sizes

    def finish(self) -> Manifest | None:
        """Writes and returns the manifest; None for a split other than train without documents.

        Raises ValueError if the train split has no document, or if its task marks what is beside the text, nothing of
        what is there is that, and that isn't allowed; the shards stay.
        """
        shards = tuple(self.done[index] for index in range(self.num_shards))
        if not any(shard.num_documents for shard in shards):
            if self.split != "train":
                return None
            rows = sum(shard.extra.get("num_rows", 0) for shard in shards)
            raise ValueError(f"empty corpus: task {self.task_name} keeps none of {rows} rows of split {self.split!r}")
        is_there = os.path.exists(os.path.join(self.directory, MANIFEST_NAME))
        if self.split == "train" and not is_there:
            self._check_marks(shards)
        totals = {
            name: sum(shard.extra.get(name, 0) for shard in shards)
            for name in ("num_lost_bytes", "num_quarantined", "num_removed_tags", "num_loss_tokens", "num_rows")
        }
        manifest = Manifest(
            task=self.source_name,
            split=self.split,
            vocab_hash=self.tokenizer.hash,
            vocab_size=self.tokenizer.vocab_size,
            eos_id=self.tokenizer.eos_id,
            harm_tag_id=self.tokenizer.harm_tag_id,
            dtype=token_dtype(self.tokenizer.vocab_size).name,
            shards=shards,
            num_documents=sum(shard.num_documents for shard in shards),
            num_tokens=sum(shard.num_tokens for shard in shards),
            num_tag_tokens=sum(shard.num_tag_tokens for shard in shards),
            num_lost_bytes=totals.pop("num_lost_bytes"),
            num_quarantined=totals.pop("num_quarantined"),
            extra={
                "seqio_task": self.task_name,
                "settings": dict(self.settings),
                "score_columns": dict(sum((Counter(shard.extra.get("score_columns")) for shard in shards), Counter())),
                **totals,
                **_rare_counts(shards),
                **_beside(shards),
                **_token_kinds(shards),
            },
        )
        if not is_there:
            write_manifest(self.directory, manifest, elsewhere=self.elsewhere)
            if self.bucket:
                self.bucket.push(MANIFEST_NAME)
        return manifest

    def _check_marks(self, shards: Sequence[ShardInfo]) -> None:
        """Raises ValueError if the store would be that of an unmarked corpus in disguise."""
        if not self.sought or self.allows_unmarked or not _marks_nothing(shards):
            return
        beside = _beside(shards)[BESIDE]
        shown = ", ".join(f"{count:,} {name}" for name, count in list(beside.items())[:_SHOWN_NAMES])
        raise ValueError(
            f"{self.place}: {self.source_name} would mark nothing: none of "
            f"{sum(shard.num_documents for shard in shards):,} documents has {self.sought}; there are {shown}"
            f"{', ..' if len(beside) > _SHOWN_NAMES else ''}; if nothing is to be marked here, --allow_unmarked makes "
            "the store of the shards that are done"
        )


def _marks_nothing(shards: Sequence[ShardInfo]) -> bool:
    """Whether documents have something beside their text, and none has what the task marks."""
    unmarked = _rare_counts(shards).get(UNMARKED, 0)
    return bool(_beside(shards)) and unmarked == sum(shard.num_documents for shard in shards)


def _rare_counts(shards: Sequence[ShardInfo]) -> dict[str, int]:
    """The tokens that a task of notes cut off, and the documents in which a task had nothing to mark, if any."""
    found = {name: sum(shard.extra.get(name, 0) for shard in shards) for name in ("num_cut_tokens", UNMARKED)}
    return {name: count for name, count in found.items() if count}


def _beside(shards: Sequence[ShardInfo]) -> dict[str, Any]:
    """What a store's documents had beside their text, the most frequent first, if anything."""
    counts = sum((Counter(shard.extra.get(BESIDE)) for shard in shards), Counter())
    return {BESIDE: dict(counts.most_common())} if counts else {}


def _token_kinds(shards: Sequence[ShardInfo]) -> dict[str, Any]:
    """The tokens of a store by kind, where its task counts them."""
    counted = [shard.extra[TOKEN_KINDS] for shard in shards if TOKEN_KINDS in shard.extra]
    return {TOKEN_KINDS: {kind: sum(each.get(kind, 0) for each in counted) for kind in KINDS[1:]}} if counted else {}


def find_tasks(names: Sequence[str], registration: Any) -> dict[str, str]:
    """Source name -> SeqIO task name of every requested task; a mixture stands for its tasks.

    A name is a source or a rung of the registration, or any name in SeqIO's registry. Raises ValueError for others.
    """
    import seqio

    sources = dict(getattr(registration, "tasks", {}))
    mixtures = dict(getattr(registration, "mixtures", {}))
    source_names = {task_name: source_name for source_name, task_name in sources.items()}
    found = {}
    for name in names:
        seqio_name = sources.get(name) or mixtures.get(name.removeprefix("ladder_")) or name
        if seqio_name not in (*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()):
            known = ", ".join([*sources, *mixtures.values()] or seqio.TaskRegistry.names())
            raise ValueError(f"--tasks: no task or mixture {name!r}; there are {known}")
        provider = seqio.get_mixture_or_task(seqio_name)
        for task in provider.tasks if isinstance(provider, seqio.Mixture) else [provider]:
            found[source_names.get(task.name, task.name)] = task.name
    return found


def plan_store(
    source_name: str,
    task_name: str,
    split: str,
    directory: str,
    tokenizer: Tokenizer,
    settings: Mapping[str, Any],
    bucket: Bucket | None = None,
    *,
    allows_unmarked: bool = False,
) -> StorePlan | None:
    """Plans one store; None if the task lacks the split (other than train).

    Raises ValueError if the folder holds, or was begun with, another task, `settings`, vocabulary or input files,
    FileNotFoundError if there is no input, or no annotations of some input file where the task needs them, and
    NotHeldError if the bucket may not be written although it must.
    """
    import seqio

    task = seqio.TaskRegistry.get(task_name)
    if split not in task.splits:
        if split == "train":
            raise ValueError(f"task {task_name}: no split {split!r}, it has {', '.join(task.splits)}")
        return None
    _check_vocabulary(task, tokenizer)
    paths = task.source.list_shards(split)
    if check := getattr(task.source, "check_annotations", None):
        check(split)  # before a shard is made with annotations that lack the next one's
    inputs = [_describe_input(path) for path in paths]
    wanted = dict(settings) | {"task": task_name, "split": split, "vocab_hash": tokenizer.hash, "inputs": inputs}
    wanted |= {"format_version": FORMAT_VERSION, "channels": [dataclasses.asdict(channel) for channel in CHANNELS]}
    wanted |= {"document_end": tokenizer.special_token(tokenizer.eos_id), "chat_template": tokenizer.chat_template_hash}
    wanted = json.loads(json.dumps(wanted))  # as a former run's are read
    sought = getattr(task.preprocessors[-1], "sought", "") if task.preprocessors else ""
    what = (source_name, task_name, split, directory, tokenizer, wanted, len(inputs), bucket, sought)
    plan = StorePlan(*what, allows_unmarked)
    former = _check_settings(plan)
    _drop_broken_manifest(plan)
    is_new = bucket is not None and (SETTINGS_NAME not in bucket.sizes or former != wanted)
    if is_new:
        bucket.check_held()
    os.makedirs(directory, exist_ok=True)
    records.write(os.path.join(directory, SETTINGS_NAME), wanted)
    if is_new:
        bucket.push(SETTINGS_NAME)
    for index, (path, file) in enumerate(zip(paths, inputs, strict=True)):
        _plan_shard(plan, index, path, file)
    if plan.jobs:
        _drop_manifest(plan)
    return plan


def _plan_shard(plan: StorePlan, index: int, path: str, file: Mapping[str, Any]) -> None:
    """Adds a finished shard to the plan, or the job that makes it.

    Raises ValueError if its input was changed in place.
    """
    settings = {key: value for key, value in plan.settings.items() if key != "inputs"}
    fingerprint = records.fingerprint(settings | {"input": file})
    info = _read_done(plan, index, fingerprint)
    if info is not None:
        if documents.has_changed(path, info.extra.get("input", {})):
            raise ValueError(
                f"{path}: it was changed after it was cached in {plan.place}: choose another --output, or remove that "
                "folder"
            )
        plan.done[index] = info
        return
    plan.pending_bytes += file.get("bytes", 0)
    plan.jobs.append(
        CacheJob(
            source_name=plan.source_name,
            task_name=plan.task_name,
            split=plan.split,
            index=index,
            num_shards=plan.num_shards,
            directory=plan.directory,
            fingerprint=fingerprint,
            dtype=token_dtype(plan.tokenizer.vocab_size).name,
            eos_id=plan.tokenizer.eos_id,
            harm_tag_id=plan.tokenizer.harm_tag_id,
            path=path,
        )
    )


def _read_done(plan: StorePlan, index: int, fingerprint: str) -> ShardInfo | None:
    """Reads a finished shard, checking all of its local files; None, after deleting its record, if it is damaged."""
    where = (plan.directory, index, plan.num_shards)
    info = read_shard_info(*where, fingerprint=fingerprint, elsewhere=plan.elsewhere, verify_checksums=True)
    path = os.path.join(plan.directory, shard_file("shard", index, plan.num_shards))
    if info is None and os.path.exists(path):
        os.remove(path)
    return info


def _check_vocabulary(task: Any, tokenizer: Tokenizer) -> None:
    used = getattr(task.output_features["targets"].vocabulary, "tokenizer", None)
    if used is not None and used.hash != tokenizer.hash:
        raise ValueError(f"task {task.name} has vocabulary {used.hash}, --tokenizer is {tokenizer.hash}")


def _describe_input(path: str) -> dict[str, Any]:
    """A source file's name, size and content identifier, so that a moved copy is the same input."""
    try:
        facts = documents.describe(documents.file_at(path))
    except FileNotFoundError:
        facts = {"path": path}
    return documents.without_place(facts)


def _check_settings(plan: StorePlan) -> Mapping[str, Any]:
    """Raises ValueError if a finished shard was made with other settings.

    Input files of unfinished shards may change; without finished shards, so may every setting. The shards of a store
    that was refused because nothing is marked in it make way for other settings.
    """
    path, wanted = os.path.join(plan.directory, SETTINGS_NAME), plan.settings
    try:
        former = records.read(path, "remove the folder or choose another --output")
    except FileNotFoundError:
        if os.path.exists(os.path.join(plan.directory, MANIFEST_NAME)):
            former = dict(read_manifest(plan.directory).extra.get("settings", {}))
        else:
            return {}
    inputs = former.get("inputs", [])
    done = [
        read_shard_info(plan.directory, index, len(inputs), elsewhere=plan.elsewhere) for index in range(len(inputs))
    ]
    if not any(done):
        return former
    if all(done) and _marks_nothing(done) and not os.path.exists(os.path.join(plan.directory, MANIFEST_NAME)):
        if former != wanted:
            _drop_shards(plan, len(inputs))
        return former
    began_with = former
    if len(inputs) == len(wanted["inputs"]):
        former = former | {
            "inputs": [
                old if is_done else new for old, new, is_done in zip(inputs, wanted["inputs"], done, strict=True)
            ]
        }
    else:
        former = former | {"inputs": f"of {len(inputs)} files"}
        wanted = dict(wanted) | {"inputs": f"{len(wanted['inputs'])} files"}
    check_same(plan.place, former, wanted)
    return began_with


def _drop_broken_manifest(plan: StorePlan) -> None:
    """Removes the manifest of a store whose shards are missing or truncated, so that they are made again."""
    if os.path.exists(os.path.join(plan.directory, MANIFEST_NAME)):
        try:
            TokenStore.open(plan.place, vocab_hash=plan.tokenizer.hash, verify_checksums=False)
        except (FileNotFoundError, ValueError):
            _drop_manifest(plan)


def _drop_shards(plan: StorePlan, num_shards: int) -> None:
    """Removes the shards' records, so that a run with other settings makes them anew."""
    for index in range(num_shards):
        name = shard_file("shard", index, num_shards)
        if plan.bucket:
            plan.bucket.drop(name)
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(plan.directory, name))


def _drop_manifest(plan: StorePlan) -> None:
    path = os.path.join(plan.directory, MANIFEST_NAME)
    if os.path.exists(path):
        if plan.bucket:
            plan.bucket.drop(MANIFEST_NAME)
        os.remove(path)
