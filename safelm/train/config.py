"""The config of a training run, settled: what it leaves open is filled in, what it names is loaded.

`safelm.train.resume` says which fields may change when a run is resumed.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from safelm import documents
from safelm.checkpoints import checkpoint
from safelm.checkpoints.integrity import CorruptCheckpointError
from safelm.data.schedule import Phase
from safelm.formats import sources
from safelm.io import hub, records, remote
from safelm.models.config import ModelConfig
from safelm.text import prompting
from safelm.text.tokenizer import Tokenizer
from safelm.train import config_fields
from safelm.train.config_checks import check_export_steps, check_numbers
from safelm.train.defaults import NOT_TRAINED

_OF_A_HUB = ("tokenizer", "init_checkpoint")  # what may be a name there


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A config without open fields, with the model and tokenizer that it names."""

    config: ConfigDict
    model: ModelConfig
    tokenizer: Tokenizer


def resolve(config: ConfigDict, workdir: str = "") -> Resolved:
    """Fills in a config's open fields (steps, tokenizer, model) and loads what it names.

    Open fields are taken from the workdir's own checkpoint, else the branch's, else `init_checkpoint`: the first that
    exists is the only one that is opened. Raises ValueError or OSError naming the field and its value.
    """
    config = _settle_run(config)
    origin = _origin(config, workdir)
    tokenizer = _load_tokenizer(config, origin)
    tokenizer = _beginning(tokenizer, origin)
    return Resolved(*_settle_model(config, _resolve_model(config, tokenizer, origin)), tokenizer)


def resolve_sizes(config: ConfigDict) -> tuple[ConfigDict, ModelConfig]:
    """`resolve` for what needs shapes only: loads the tokenizer only if `model.vocab_size` is not set."""
    config = _settle_run(config)
    origin = _origin(config, "")
    tokenizer = None if config.model.vocab_size else _load_tokenizer(config, origin)
    return _settle_model(config, _resolve_model(config, tokenizer, origin))


def store(workdir: str, run: Resolved, note: Callable[[str], None]) -> None:
    """Keeps the resolved config and the tokenizer with the run; notes what has changed since it was last started."""
    new = json.loads(run.config.to_json_best_effort())
    try:
        lines = config_fields.changed_fields(_stored(workdir) or new, new)
    except ValueError as error:
        lines = [str(error)]
    for line in lines:
        note(f"changed since the last start: {line}")
    records.write(_stored_at(workdir), new)
    documents.declare_no_documents(workdir, "safelm.train")
    checkpoint.save_tokenizer(workdir, run.tokenizer)


def _stored(workdir: str) -> dict[str, Any]:
    """The config that `store` kept, {} where there is none. Raises ValueError for a damaged one."""
    try:
        return records.read(_stored_at(workdir), "written anew")
    except FileNotFoundError:
        return {}


def _stored_at(workdir: str) -> str:
    return f"{workdir.rstrip('/')}/config.json"


def _settle_run(config: ConfigDict) -> ConfigDict:
    """An unlocked copy with its steps settled."""
    config = config.copy_and_resolve_references().unlock()
    check_numbers(config)
    config.total_steps = _total_steps(config)
    check_export_steps(config)  # of a branch against the other run's steps: it is that run's command
    if config.branch.workdir:
        _plan_branch(config)
    config.total_tokens = config.total_steps * config.batch_size * config.seq_len
    if config.optimizer.schedule == "wsd" and not config.optimizer.decay_steps:
        config.optimizer.decay_steps = round(config.optimizer.decay_fraction * config.total_steps)
    return config


def _settle_model(config: ConfigDict, model: ModelConfig) -> tuple[ConfigDict, ModelConfig]:
    if config.seq_len > model.max_seq_len:
        raise ValueError(f"seq_len is {config.seq_len}, longer than model.max_seq_len {model.max_seq_len}")
    fields = dataclasses.asdict(model)
    config.model = ConfigDict({name: value for name, value in fields.items() if name not in NOT_TRAINED})
    return config.lock(), model


def _total_steps(config: ConfigDict) -> int:
    if bool(config.total_steps) == bool(config.total_tokens):
        both = f"total_steps is {config.total_steps} and total_tokens is {config.total_tokens}"
        raise ValueError(f"{both}: give one of them, the other 0")
    return config.total_steps or -(-config.total_tokens // (config.batch_size * config.seq_len))


def _plan_branch(config: ConfigDict) -> None:
    """Settles a branch's length, and the phases' starts, which are fractions of the other run."""
    step, optimizer = config.branch.step, config.optimizer
    if step < 1:
        raise ValueError(f"branch.step is {step}: give the step of a checkpoint of branch.workdir")
    if optimizer.schedule != "wsd":
        raise ValueError(
            f"branch.workdir is set and optimizer.schedule is {optimizer.schedule!r}: only wsd has branches"
        )
    if not optimizer.decay_steps:
        if optimizer.decay_fraction == 1:
            raise ValueError("optimizer.decay_fraction is 1: a branch has a stable phase before its decay")
        optimizer.decay_steps = round(step / (1 - optimizer.decay_fraction)) - step
    batch_tokens, phases = config.batch_size * config.seq_len, []
    for phase in map(_parse_phase, config.data.phases):
        start_tokens = phase.start_step(batch_tokens, config.total_steps) * batch_tokens
        phases.append({"rates": phase.rates} | ({"start_tokens": start_tokens} if start_tokens else {"start": 0.0}))
    config.data.phases = tuple(phases)
    config.total_steps = step + optimizer.decay_steps


def _parse_phase(phase: Any) -> Phase:
    try:
        return Phase.parse(phase)
    except ValueError as error:
        raise ValueError(f"data.phases: {error}") from error


def _origin(config: ConfigDict, workdir: str) -> tuple[str, str, checkpoint.Meta] | None:
    """Name, folder and record of the checkpoint that the run will begin with, if any; names of a hub are pinned."""
    if workdir and (meta := _newest_record(workdir)):
        _keep_commits(config, workdir)
        return f"checkpoint {workdir}", workdir, meta  # a hub that is gone stops no run that has begun
    for field in _OF_A_HUB:
        config[field] = hub.pinned(config[field])
    if folder := config.branch.workdir:
        checkpoints, _, meta = checkpoint.open_checkpoint(folder, step=config.branch.step, setting="branch.step")
        checkpoints.close()
        return f"branch.workdir {folder}", folder, meta
    if source := config.init_checkpoint:
        return f"init_checkpoint {source}", source, sources.read_meta(source)
    return None


def _keep_commits(config: ConfigDict, workdir: str) -> None:
    """Pins a hub's names as they were when the run began."""
    try:
        stored = _stored(workdir)
    except ValueError:  # which `store` tells
        return
    for field in _OF_A_HUB:
        config[field] = hub.pinned_as(config[field], stored.get(field, ""))


def _newest_record(workdir: str) -> checkpoint.Meta | None:
    """The record of a folder's newest checkpoint that can be read, or None where there is none."""
    if not remote.is_dir(f"{workdir}/checkpoints"):
        return None
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        for step in reversed(checkpoints.steps()):
            try:
                return checkpoints.read_meta(step)
            except CorruptCheckpointError:
                continue
    return None


def _load_tokenizer(config: ConfigDict, origin: tuple[str, str, checkpoint.Meta] | None) -> Tokenizer:
    found = _own_tokenizer(config, origin)
    return found.with_document_end(config.document_end).with_chat_template(config.chat_template)


def _own_tokenizer(config: ConfigDict, origin: tuple[str, str, checkpoint.Meta] | None) -> Tokenizer:
    has_begun = origin is not None and origin[0].startswith("checkpoint ")
    if config.tokenizer and not (has_begun and hub.is_name(config.tokenizer)):
        return Tokenizer.from_pretrained(config.tokenizer)
    if origin:
        return sources.load_tokenizer(origin[1])
    raise ValueError("tokenizer is not set: give --config.tokenizer=PATH or an init_checkpoint that has one")


def _beginning(tokenizer: Tokenizer, origin: tuple[str, str, checkpoint.Meta] | None) -> Tokenizer:
    """The tokenizer with the id with which the run's texts and chats begin, as `safelm.data.rows` has them.

    It is the end of a document, or that of the model which the run begins with, if it is another single one.
    """
    own = origin and sources.load_tokenizer(origin[1])
    begin_ids = own.conventions.begin_ids if own and own.hash == tokenizer.hash else ()
    if len(begin_ids) != 1 or begin_ids == (own.eos_id,):
        return tokenizer.beginning_with([tokenizer.eos_id])
    begun = tokenizer.beginning_with(begin_ids)
    try:
        chat = prompting.chat_prompt(begun, [{"role": "user", "content": "a"}])
    except ValueError:  # it has no chats
        return begun
    writes_it = tuple(chat[:2]) == begin_ids * 2  # the template itself, as most of such models' do
    return tokenizer.beginning_with(begin_ids, begins_chats=False) if writes_it else begun


def _resolve_model(
    config: ConfigDict, tokenizer: Tokenizer | None, origin: tuple[str, str, checkpoint.Meta] | None
) -> ModelConfig:
    """The model; without a tokenizer its vocabulary is taken from the config and not compared with any."""
    fields = config.model.to_dict()
    if origin:
        where, _, meta = origin
        theirs = dataclasses.asdict(checkpoint.model_config_from_meta(meta, where=where))
        fields |= {name: value for name, value in theirs.items() if name in fields and fields[name] is None}
        if tokenizer is not None:
            checkpoint.check_vocabulary(meta, tokenizer, where=where)
        checkpoint.check_model(meta, ModelConfig(**fields), where=where)
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    if tokenizer is not None:
        defaults["vocab_size"] = tokenizer.vocab_size
    for name in [name for name, value in fields.items() if value is None]:
        if defaults[name] is dataclasses.MISSING:
            raise ValueError(f"model.{name} is not set: give it, or an init_checkpoint to take it from")
        fields[name] = defaults[name]
    if tokenizer is not None and fields["vocab_size"] < tokenizer.vocab_size:
        raise ValueError(f"model.vocab_size is {fields['vocab_size']}, the tokenizer has {tokenizer.vocab_size} ids")
    routed = config.routing.to_dict() if config.routing.labelled else None
    return ModelConfig(**fields, lora=config.lora.to_dict() if config.lora.rank else None, routed=routed)
