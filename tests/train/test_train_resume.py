"""Branches of a WSD run, changed plans at a resume, and what a resumed run needs of where it came from."""

import hashlib
import json
import re
import shutil
from operator import not_

import pytest
import tiny_runs
from ml_collections import ConfigDict

from safelm.checkpoints import checkpoint
from safelm.models.config import ModelConfig
from safelm.train import config as train_config
from safelm.train import resume
from safelm.train.config_fields import get_field
from safelm.train.defaults import default_config
from safelm.train.run import train

BATCH_TOKENS = 8 * 16
RATES = {"raw_web": 0.7, "harm_tagged_web": 0.3}
LATER = {"raw_web": 0.2, "harm_tagged_web": 0.5, "safeweb": 0.3}
PHASES = ({"start": 0.0, "rates": RATES}, {"start": 0.25, "rates": LATER})
TRUNK = {
    "total_steps": 12,
    "data.phases": PHASES,
    "optimizer.warmup_steps": 2,
    "optimizer.decay_steps": 3,
    "checkpoint.keep_every": 3,
    "log.every_steps": 3,
}


@pytest.fixture(scope="module")
def trunk(inputs, tmp_path_factory):
    """Twelve steps: warmup to 2, stable to 9, decay; checkpoints 3, 6, 9, 12."""
    workdir = tmp_path_factory.mktemp("trunk")
    train(tiny_runs.tiny_config(inputs, **TRUNK), str(workdir))
    return workdir


@pytest.fixture
def stopped(trunk, tmp_path):
    """The trunk as if killed after step 6."""
    shutil.copytree(trunk, tmp_path / "stopped")
    for step in ("9", "12"):
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / step)
    return tmp_path / "stopped"


def run(inputs, workdir, **overrides):
    train(tiny_runs.tiny_config(inputs, **(TRUNK | overrides)), str(workdir))


def meta_of(workdir, step):
    return checkpoint.open_checkpoint(str(workdir), step=step)[2]


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def learning_rates(workdir):
    return {line["step"]: line["learning_rate"] for line in tiny_runs.metric_lines(workdir)}


def test_a_branch_is_the_run_that_had_planned_its_decay_there(inputs, trunk, tmp_path):
    before = contents(trunk)
    branch = {"branch.workdir": str(trunk), "branch.step": 6}
    run(inputs, tmp_path / "branch", **branch)
    phases = ({"start": 0.0, "rates": RATES}, {"start_tokens": 3 * BATCH_TOKENS, "rates": LATER})
    run(inputs, tmp_path / "planned", total_steps=9, **{"data.phases": phases})
    tiny_runs.assert_same_checkpoint(tmp_path / "branch", tmp_path / "planned", 9)
    assert checkpoint.open_checkpoint(str(tmp_path / "branch"))[1] == 9
    assert contents(trunk) == before
    # It decays (a run that took the trunk's schedule would be at the peak), and is its own run from then on.
    assert learning_rates(tmp_path / "branch") == {9: pytest.approx(3e-3 / 3)} != learning_rates(trunk)
    assert meta_of(tmp_path / "branch", 9)["data"]["rows_given"] == meta_of(trunk, 9)["data"]["rows_given"]
    changed = ["optimizer.decay_steps", "total_steps"]
    (entry,) = meta_of(tmp_path / "branch", 9)["history"]
    assert entry["step"] == 6 and entry["branched_from"] == str(trunk)
    assert [line.split(":")[0] for line in entry["changed"]] == changed[1:]
    assert json.loads((tmp_path / "branch" / "config.json").read_text())["branch"] == {"step": 6, "workdir": str(trunk)}


@pytest.mark.slow
def test_a_branch_is_resumed_like_any_run_even_when_its_trunk_is_gone(inputs, trunk, tmp_path):
    shutil.copytree(trunk, tmp_path / "trunk")
    branch = {"branch.workdir": str(tmp_path / "trunk"), "branch.step": 6, "checkpoint.every_steps": 2}
    run(inputs, tmp_path / "branch", **branch)
    shutil.copytree(tmp_path / "branch", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "9")
    shutil.rmtree(tmp_path / "trunk")
    run(inputs, tmp_path / "killed", **branch)
    tiny_runs.assert_same_checkpoint(tmp_path / "branch", tmp_path / "killed", 9)
    assert len(meta_of(tmp_path / "killed", 9)["history"]) == 1
    with pytest.raises(ValueError, match=r"another run: branch.step is 6 there, 8 here"):
        run(inputs, tmp_path / "killed", **(branch | {"branch.step": 8}))


def test_a_branchs_length_and_phases(inputs):
    config = tiny_runs.tiny_config(inputs, **TRUNK, **{"branch.workdir": "elsewhere", "branch.step": 8})
    resolved = train_config._settle_run(config)
    assert (resolved.total_steps, resolved.optimizer.decay_steps, resolved.total_tokens) == (11, 3, 11 * BATCH_TOKENS)
    assert [phase.get("start_tokens") for phase in resolved.data.phases] == [None, 3 * BATCH_TOKENS]
    config.optimizer.decay_steps, config.optimizer.decay_fraction = 0, 0.2
    resolved = train_config._settle_run(config)
    assert (resolved.total_steps, resolved.optimizer.decay_steps) == (10, 2)  # a fifth of the branch's ten


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"branch.step": 0}, ValueError, r"branch.step is 0: give the step of a checkpoint of branch.workdir"),
        ({"branch.step": 5}, FileNotFoundError, r"branch.step=5: no such .* in .*, which has 3, 6, 9, 12"),
        ({"branch.step": 12}, ValueError, r"branch.step 12: the decay of checkpoint .*12 had begun after step 9"),
        ({"branch.workdir": "/no/such"}, FileNotFoundError, r"no checkpoint at /no/such"),
        ({"optimizer.schedule": "cosine"}, ValueError, r"optimizer.schedule is 'cosine': only wsd has branches"),
        ({"optimizer.peak_lr": 1e-3}, ValueError, r"optimizer.peak_lr: 0.003 -> 0.001. .*accept_changes=optimizer"),
        ({"seed": 1}, ValueError, r"another run: seed is 0 there, 1 here"),
        ({"model.d_ff": 48}, ValueError, r"another model: d_ff is 32 there, 48 here"),
        ({"total_steps": 20}, ValueError, r"data.phases gave it .* start_tokens doesn't move"),
        ({"data.phases": (*PHASES, {"start": 0.6, "rates": RATES})}, ValueError, r"data.phases: .*accept_changes=data"),
        ({"optimizer.decay_steps": 0, "optimizer.decay_fraction": 1.0}, ValueError, r"optimizer.decay_fraction is 1"),
    ],
)
def test_branches_that_are_refused(inputs, trunk, tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        run(inputs, tmp_path / "run", **({"branch.workdir": str(trunk), "branch.step": 6} | overrides))


def test_a_run_of_another_schedule_has_no_branches(inputs, tmp_path):
    one_phase = {"data.phases": ({"start": 0.0, "rates": RATES},)}
    run(inputs, tmp_path / "cosine", total_steps=3, **one_phase, **{"optimizer.schedule": "cosine"})
    branch = {"branch.workdir": str(tmp_path / "cosine"), "branch.step": 3}
    with pytest.raises(ValueError, match=r"whose optimizer.schedule is cosine: only wsd has branches"):
        run(inputs, tmp_path / "run", **one_phase, **branch)


def test_a_stable_run_is_made_longer_without_asking(inputs, stopped):
    run(inputs, stopped, total_steps=15, **{"data.phases": ({"start": 0.0, "rates": RATES}, at(3, LATER))})
    assert learning_rates(stopped)[12] == pytest.approx(3e-3)
    (entry,) = meta_of(stopped, 15)["history"]
    assert entry == {"step": 6, "changed": ["total_steps: 12 -> 15"]}


def at(step, rates):
    return {"start_tokens": step * BATCH_TOKENS, "rates": rates}


NEXT = {"data.phases": (*PHASES, at(8, {"safeweb": 1.0}))}


@pytest.mark.parametrize(
    ("group", "overrides", "changed"),
    [
        ("optimizer", {"optimizer.peak_lr": 1e-3}, "optimizer.peak_lr: 0.003 -> 0.001"),
        pytest.param(
            *("optimizer", {"optimizer.schedule": "linear"}, "optimizer.decay_steps: 3 -> None"),
            marks=pytest.mark.slow,
        ),
        ("data", NEXT, "data.phases: [{'start_step': 0"),
    ],
)
def test_a_changed_plan_is_accepted_only_by_name_and_recorded(inputs, stopped, capsys, group, overrides, changed):
    other = {"optimizer": "data", "data": "optimizer"}[group]
    for accepted in ((), (other,)):
        with pytest.raises(ValueError, match=rf"planned otherwise: .*give --config.accept_changes={group}"):
            run(inputs, stopped, accept_changes=accepted, **overrides)
    run(inputs, stopped, accept_changes=(group,), **overrides)
    (entry,) = meta_of(stopped, 12)["history"]
    assert entry["step"] == 6 and any(line.startswith(changed) for line in entry["changed"])
    told = capsys.readouterr().err
    assert "plan changed, step 6" in told and "tokens given, against the plan:" in told
    if group == "data":
        lines = {line["step"]: line for line in tiny_runs.metric_lines(stopped)}
        given, before = ({source: lines[step][f"tokens/{source}"] for source in LATER} for step in (12, 9))
        assert given["safeweb"] - before["safeweb"] == 3 * BATCH_TOKENS and sum(given.values()) == 12 * BATCH_TOKENS
        assert f"safeweb: {given['safeweb']:,} tokens" in told
    run(inputs, stopped, **overrides)  # there is nothing to accept any more


# What is compared by other names than the config's own.
BY_OTHER_NAMES = {
    "tokenizer": "the vocabulary's hash",
    "document_end": "that of the stores",
    "data.root": "the stores' checksums",
    "data.split": "the stores' checksums",
    "data.phases": "the schedule's hash, and the rows given",
    "total_tokens": "total_steps",
    "optimizer.decay_fraction": "decay_steps",
    "branch.step": "itself, in the run's record",
    **dict.fromkeys(("lora.rank", "lora.alpha", "lora.targets"), "the model's adapters"),
    **dict.fromkeys(("routing.labelled", "routing.mixed", "routing.heads", "routing.mlp_units"), "the model's routing"),
    **{f"model.{name}": "the model" for name in (*checkpoint.ARCHITECTURE_FIELDS, "param_dtype")},
}
VALUES = {int: lambda value: value + 1, float: lambda value: value / 2 + 0.125, str: "other{}".format, bool: not_}
ALLOWED = {"optimizer.name": "muon", "optimizer.schedule": "linear", "model.dtype": "float32", "data.packing": "fit"}


def fields_of(config, prefix=""):
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from fields_of(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def is_free(name):
    return any(name == free or name.startswith(f"{free}.") for free in resume.FREE_FIELDS)


def settled(**overrides):
    """A settled run without stores, and what a checkpoint of its step 500 says."""
    config, vocabulary = default_config(), tiny_runs.tokenizer()
    config.update(total_steps=1000, total_tokens=1000 * 8 * 256)
    config.optimizer.decay_steps = 200
    model = {name: overrides.pop(name) for name in ("dtype", "param_dtype") if name in overrides}
    config.model.update(tiny_runs.model_fields(dtype="bfloat16") | model)
    config.update_from_flattened_dict(overrides)
    fields = {name: config.model[name] for name in ("dtype", "param_dtype", "max_seq_len") if config.model[name]}
    run = train_config.Resolved(config, ModelConfig(**(tiny_runs.model_fields() | fields)), vocabulary)
    data = {"stores": {}, "rows_given": {}, "schedule_hash": "", "phases": []}
    return run, data, resume.run_record(run, data, []) | {"step": 500}


def test_every_field_is_planned_or_fixed_or_free_and_no_other_may_change_unnoticed():
    _, data, meta = settled()
    meta["step"] = 900  # in the decay
    planned = set(fields_of(ConfigDict(meta["plan"])))
    names = set(fields_of(default_config()))
    kinds = [planned, set(resume.FIXED_FIELDS), {name for name in names if is_free(name)}, set(BY_OTHER_NAMES)]
    assert {name for kind in kinds for name in kind} == names
    assert sum(map(len, kinds)) == len(names), "each is of one kind"
    for name in sorted(names - set(BY_OTHER_NAMES)):
        value = get_field(settled()[0].config, name)
        if type(value) not in VALUES and name not in ALLOWED:
            assert is_free(name)  # tuples, and what is taken from a model
            continue
        run, _, _ = settled(**{name: ALLOWED.get(name) or VALUES[type(value)](value)})
        if is_free(name):
            assert resume.check_resumable(meta, run, data, where="it") == []
            continue
        with pytest.raises(ValueError, match=re.escape(name)):
            resume.check_resumable(meta, run, data, where="it")
        if name in planned - {"optimizer.name"}:
            run.config.accept_changes = ("optimizer",)
            (entry,) = resume.check_resumable(meta, run, data, where="it")
            assert entry["step"] == 900 and any(line.startswith(f"{name}: ") for line in entry["changed"])


def test_the_dtype_of_parameters_is_fixed_and_older_records_say_the_others():
    run, data, meta = settled(param_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"another run: model.param_dtype is 'float32' there, 'bfloat16' here"):
        resume.check_resumable(settled()[2], run, data, where="it")
    older = {**meta, "plan": {name: meta["plan"][name] for name in ("total_steps", "optimizer")}}
    assert resume.check_resumable(older, run, data, where="it") == []
    other, _, _ = settled(dtype="float32", param_dtype="bfloat16")
    for check in (resume.check_resumable, resume.check_branch):
        with pytest.raises(ValueError, match=r"model.dtype: bfloat16 -> float32. To go on .*accept_changes=optimizer"):
            check(older, other, data, where="it")


def test_another_past_is_refused_whatever_is_accepted(inputs, stopped):
    with pytest.raises(ValueError, match=r"data.phases gave it"):
        run(inputs, stopped, accept_changes=("data",), **{"data.phases": ({"start": 0.0, "rates": RATES},)})
    with pytest.raises(ValueError, match=r"checkpoints/6 is of another run: optimizer.name is 'adamw' there, 'muon'"):
        run(inputs, stopped, accept_changes=("optimizer",), **{"optimizer.name": "muon"})


def test_a_finished_run_decays_again_only_if_asked(inputs, trunk, tmp_path):
    shutil.copytree(trunk, tmp_path / "run")
    phases = ({"start": 0.0, "rates": RATES}, at(3, LATER))
    with pytest.raises(ValueError, match=r"total_steps: 12 -> 15. .*accept_changes=optimizer"):
        run(inputs, tmp_path / "run", total_steps=15, **{"data.phases": phases})


def test_a_resumed_run_needs_neither_its_initial_checkpoint_nor_its_fields(inputs, trunk, tmp_path):
    shutil.copytree(trunk, tmp_path / "first")
    config = tiny_runs.tiny_config(inputs, **(TRUNK | {"init_checkpoint": str(tmp_path / "first"), "tokenizer": ""}))
    with config.unlocked():
        config.model = default_config().model
        config.model.dtype = "float32"
        config.total_steps = 5
    train(config, str(tmp_path / "run"))
    shutil.rmtree(tmp_path / "first")
    config.total_steps = 8
    config.data.phases = ({"start": 0.0, "rates": RATES}, at(2, LATER))
    config.accept_changes = ("optimizer",)
    train(config, str(tmp_path / "run"))
    assert meta_of(tmp_path / "run", 6)["model"] == meta_of(tmp_path / "run", 3)["model"]
    with pytest.raises(FileNotFoundError, match="first: no such file or folder"):
        train(config, str(tmp_path / "another"))
