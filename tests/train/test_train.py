"""Whole runs of a tiny model: resume, halt, initial checkpoints, every config, and each kind of bad input."""

import errno
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from safelm import convert
from safelm.checkpoints import checkpoint
from safelm.formats import sources
from safelm.models import decoder as model
from safelm.train import config_fields, trackers
from safelm.train import data as train_data
from safelm.train import metrics as train_metrics
from safelm.train.defaults import default_config
from safelm.train.run import train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """An uninterrupted run of six steps."""
    workdir = tmp_path_factory.mktemp("finished")
    train(tiny_runs.tiny_config(inputs, **{"eval.every_steps": 3, "eval.sources": ("safeweb",)}), str(workdir))
    return workdir


def test_a_run_leaves_all_it_needs(finished):
    names = {"checkpoints", "config.json", "events.jsonl", "manifest.json", "metrics.jsonl", "progress.json"}
    assert {path.name for path in finished.iterdir()} == names | {"tensorboard", "tokenizer"}
    lines = tiny_runs.metric_lines(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["tokens/raw_web"] == 6 * 6 * 16 and lines[-1]["tokens/harm_tagged_web"] == 6 * 2 * 16
    assert [line["step"] for line in lines if "eval_loss/safeweb" in line] == [3, 6]
    assert json.loads((finished / "config.json").read_text())["model"]["vocab_size"] == tiny_runs.tokenizer().vocab_size
    config, params, tokenizer = checkpoint.load_for_inference(str(finished))
    assert config.d_model == 16 and tokenizer.hash == tiny_runs.tokenizer().hash
    assert model.apply(config, params, jnp.asarray([[5, 6, 7]])).shape == (1, 3, config.padded_vocab_size)


def test_resumed_is_uninterrupted_bit_for_bit(inputs, finished, copy):
    shutil.rmtree(copy / "checkpoints" / "6")
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # a line cut by a kill
    train(tiny_runs.tiny_config(inputs, **{"eval.every_steps": 3, "eval.sources": ("safeweb",)}), str(copy))
    tiny_runs.assert_same_checkpoint(finished, copy, 6)
    assert tiny_runs.metric_lines(copy) == tiny_runs.metric_lines(finished)


def test_running_a_finished_run_again_changes_nothing(inputs, finished, copy):
    (copy / "config.json").write_text('{"seed": 0, "mod')  # cut by a full disk
    train(tiny_runs.tiny_config(inputs), str(copy))
    tiny_runs.assert_same_checkpoint(finished, copy, 6)
    assert tiny_runs.metric_lines(copy) == tiny_runs.metric_lines(finished)
    assert json.loads((copy / "config.json").read_text())["seq_len"] == 16


def test_resume_on_another_mesh_with_more_steps(inputs, copy, capsys):
    changed = {"mesh.data": 2, "mesh.fsdp": 4, "total_steps": 8, "grad_accum_steps": 1, "log.every_steps": 2}
    train(tiny_runs.tiny_config(inputs, accept_changes=("optimizer",), **changed), str(copy))
    assert checkpoint.open_checkpoint(str(copy))[1] == 8
    assert "changed since the last start: total_steps: 6 -> 8" in capsys.readouterr().err
    assert [line["step"] for line in tiny_runs.metric_lines(copy)] == [1, 2, 3, 4, 5, 6, 8]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", 1, r"seed is 0 there, 1 here"),
        ("batch_size", 16, r"batch_size is 8 there, 16 here"),
        ("seq_len", 32, r"seq_len is 16 there, 32 here"),
        ("data.packing", "fit", r"data.packing is 'concat' there, 'fit' here"),
        ("model.d_ff", 48, r"d_ff is 32 there, 48 here"),
        ("model.rope_theta", 5e4, r"rope_theta is 10000.0 there, 50000.0 here"),
        ("data.phases", ({"start": 0.0, "rates": {"raw_web": 0.5, "safeweb": 0.5}},), r"data.phases gave it"),
        ("total_steps", 4, r"past the run's end: total_steps is 4"),
    ],
)
def test_resuming_another_run_names_the_field(inputs, finished, field, value, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_runs.tiny_config(inputs, **{field: value}), str(finished))


def test_resuming_with_another_store_or_tokenizer_names_it(inputs, finished, tmp_path):
    shutil.copytree(inputs, tmp_path / "inputs")
    tiny_runs.write_store(tmp_path / "inputs" / "tokens", "raw_web", seed=5)
    with pytest.raises(ValueError, match=r"another run: data.root's raw_web is 40 documents"):
        train(tiny_runs.tiny_config(tmp_path / "inputs"), str(finished))


def test_nan_halts_and_keeps_the_last_good_checkpoint(inputs, finished, tmp_path, monkeypatch):
    batches = train_data.TrainData.batches

    def poisoned(self, start_step, sharding):
        for step, batch in enumerate(batches(self, start_step, sharding), start_step + 1):
            yield batch if step != 5 else batch._replace(loss_weight_BT=batch.loss_weight_BT * np.nan)

    monkeypatch.setattr(train_data.TrainData, "batches", poisoned)
    with pytest.raises(FloatingPointError, match=r"step 5: the loss is nan"):
        train(tiny_runs.tiny_config(inputs), str(tmp_path))
    assert checkpoint.Checkpoints(str(tmp_path), read_only=True).steps() == [3]
    assert [line["step"] for line in tiny_runs.metric_lines(tmp_path)] == [1, 2, 3, 4]
    monkeypatch.undo()
    train(tiny_runs.tiny_config(inputs), str(tmp_path))
    tiny_runs.assert_same_checkpoint(finished, tmp_path, 6)


def test_metrics_are_on_disk_when_written_and_hide_no_error(tmp_path):
    def full_disk():
        raise OSError(errno.ENOSPC, "No space left on device")

    def opened():
        return [trackers.TensorBoard(str(tmp_path / "tensorboard"), purge_step=1)]

    with (
        pytest.raises(FloatingPointError),
        train_metrics.MetricsLog(str(tmp_path), start_step=0, trackers=opened) as log,
    ):
        log.write(1, {"loss": 2.0})
        (events,) = (tmp_path / "tensorboard").iterdir()
        assert b"loss" in events.read_bytes() and tiny_runs.metric_lines(tmp_path) == [{"step": 1, "loss": 2.0}]
        log._trackers[0].flush = full_disk
        with pytest.raises(OSError, match=r"cannot write the metrics of step 2: No space left on device.*metrics"):
            log.write(2, {"loss": 1.0})
        raise FloatingPointError


def test_keep_policy(inputs, tmp_path):
    keep = {"checkpoint.every_steps": 1, "checkpoint.keep_last": 2, "checkpoint.keep_every": 3}
    train(tiny_runs.tiny_config(inputs, **keep), str(tmp_path))
    assert checkpoint.Checkpoints(str(tmp_path), read_only=True).steps() == [3, 5, 6]


def test_a_checkpoint_says_whether_the_model_ever_saw_the_tag(inputs, finished, tmp_path):
    assert checkpoint.saw_tag(str(finished)) is False
    shutil.copytree(inputs / "tokens", tmp_path / "tokens")
    shutil.rmtree(tmp_path / "tokens" / "harm_tagged_web" / "train")
    tiny_runs.write_store(tmp_path / "tokens", "harm_tagged_web", has_tag=True)
    root = {"data.root": str(tmp_path / "tokens"), "total_steps": 1}
    train(tiny_runs.tiny_config(inputs, init_checkpoint=str(finished), **root), str(tmp_path / "tagged"))
    assert checkpoint.saw_tag(str(tmp_path / "tagged")) is True
    plain = {"data.phases": ({"start": 0.0, "rates": {"raw_web": 1.0}},), "init_checkpoint": str(tmp_path / "tagged")}
    train(tiny_runs.tiny_config(inputs, **root, **plain), str(tmp_path / "plain"))
    assert checkpoint.saw_tag(str(tmp_path / "plain")) is True, "what it once saw it still knows"
    convert.convert(str(tmp_path / "tagged"), str(tmp_path / "export"))
    exported = {"init_checkpoint": str(tmp_path / "export"), "export.at_steps": (1,)}
    train(tiny_runs.tiny_config(inputs, **root, **(plain | exported)), str(tmp_path / "goes_on"))
    assert checkpoint.saw_tag(str(tmp_path / "goes_on")) is True, "also what began with an export"
    assert sources.saw_tag(str(tmp_path / "goes_on" / "exports" / "1")) is True
    config, params, tokenizer = checkpoint.load_for_inference(str(finished))
    checkpoint.save_params(str(tmp_path / "imported"), config, params, tokenizer)
    assert checkpoint.saw_tag(str(tmp_path / "imported")) is None


def test_init_checkpoint_gives_parameters_and_model(inputs, finished, tmp_path):
    config = tiny_runs.tiny_config(inputs, init_checkpoint=str(finished), tokenizer="", total_steps=1)
    with config.unlocked():
        config.model = default_config().model
        config.model.dtype = "float32"
        config.optimizer.peak_lr = 0.0
    train(config, str(tmp_path))
    theirs, ours = (checkpoint.load_for_inference(str(path))[:2] for path in (finished, tmp_path))
    assert theirs[0] == ours[0]
    jax.tree.map(np.testing.assert_array_equal, theirs[1], ours[1])
    with pytest.raises(ValueError, match=r"another model: num_layers is 2 there, 3 here"):
        train(tiny_runs.tiny_config(inputs, init_checkpoint=str(finished), **{"model.num_layers": 3}), str(tmp_path))


def test_a_folder_of_parameters_only_is_not_resumed(inputs, finished, tmp_path):
    config, params, tokenizer = checkpoint.load_for_inference(str(finished))
    checkpoint.save_params(str(tmp_path), config, params, tokenizer)
    with pytest.raises(ValueError, match=r"parameters only: give its folder as init_checkpoint"):
        train(tiny_runs.tiny_config(inputs), str(tmp_path))


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"seq_len": 4096}, ValueError, r"seq_len is 4096, longer than model.max_seq_len 2048"),
        ({"batch_size": 9, "grad_accum_steps": 2}, ValueError, r"batch_size 9 is not a multiple of grad_accum_steps 2"),
        ({"batch_size": 12}, ValueError, r"batch_size.*12.*8"),
        ({"mesh.data": 3}, ValueError, r"mesh.data=3"),
        ({"total_tokens": 100}, ValueError, r"total_steps is 6 and total_tokens is 100"),
        ({"total_steps": 0}, ValueError, r"total_steps is 0 and total_tokens is 0"),
        ({"batch_size": 0}, ValueError, r"batch_size is 0"),
        ({"tokenizer": ""}, ValueError, r"tokenizer is not set"),
        ({"tokenizer": "/no/such"}, FileNotFoundError, r"/no/such"),
        ({"data.root": "/no/such"}, FileNotFoundError, r"data.phases: data.root '/no/such' lacks source harm"),
        ({"data.phases": ({"start": 0.0, "rates": {"raw_web": 0.5}},)}, ValueError, r"data.phases: phase 0: rates sum"),
        ({"data.packing": "greedy"}, ValueError, r"greedy"),
        ({"optimizer.schedule": "step"}, ValueError, r"optimizer.schedule is 'step'"),
        ({"optimizer.name": "sgd"}, ValueError, r"optimizer.name is 'sgd'"),
        ({"optimizer.warmup_steps": 7}, ValueError, r"optimizer.warmup_steps is 7"),
        ({"model.num_kv_heads": 3}, ValueError, r"num_kv_heads"),
        ({"model.vocab_size": 99}, ValueError, r"model.vocab_size is 99, the tokenizer has"),
        ({"init_checkpoint": "/no/such"}, FileNotFoundError, r"/no/such: no such file or folder"),
        ({"eval.every_steps": 1, "eval.sources": ("poems",)}, FileNotFoundError, r"^eval.sources: .* source poems"),
        (
            {"eval.every_steps": 1, "eval.sources": ("raw_web",), "eval.split": "test"},
            FileNotFoundError,
            r"^eval.sources: source raw_web has no split test in .* \(it has train, validation\); `cache_tasks",
        ),
        (
            {"data.phases": ({"start": 0.0, "rates": {"raw_web": 0.5, "poems": 0.5}},)},
            FileNotFoundError,
            r"^data.phases: .* lacks source poems \(it has filtered_web, .*raw_web",
        ),
    ],
)
def test_bad_input_is_one_clear_error(inputs, tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        train(tiny_runs.tiny_config(inputs, **overrides), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_store_of_another_vocabulary_is_refused(inputs, tmp_path):
    shutil.copytree(inputs, tmp_path / "inputs")
    tiny_runs.write_store(tmp_path / "inputs" / "tokens", "raw_web", vocab_hash="ab" * 32)
    with pytest.raises(ValueError, match=r"raw_web/train.*vocabulary"):
        train(tiny_runs.tiny_config(tmp_path / "inputs"), str(tmp_path / "run"))


def test_unset_model_field_is_named(inputs, tmp_path):
    config = tiny_runs.tiny_config(inputs)
    with config.unlocked():
        config.model = default_config().model
    with pytest.raises(ValueError, match=r"model\.\w+ is not set"):
        train(config, str(tmp_path))


def test_dry_run_says_what_it_would_do_and_writes_nothing(inputs, tmp_path, capsys):
    train(tiny_runs.tiny_config(inputs), str(tmp_path / "run"), dry_run=True)
    out = capsys.readouterr().out
    assert re.search(r"parameters: [\d,]+\ntokens: +768 \(8 x 16 a step\)\nsteps: +6\n", out)
    assert "raw_web: 576 tokens" in out and not (tmp_path / "run").exists()


CONFIGS = [
    *("quickstart:raw", "quickstart:safety", "smollm2_135m", "smollm2_360m", "smollm2_1b7"),
    *("safelm_1b7_paper", "safelm_1b7_paper:start_20", "smollm2_135m_real_text", "tiny_cpu"),
    *("instruction_tune:1b7", "instruction_tune:tiny_tagged", "benign_finetune:135m"),
]


def test_every_config_is_listed():
    files = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"base", "__init__"}
    # Those of `safelm.train_classifier` and `safelm.ladder`.
    files = {name for name in files if not name.startswith("classifier_") and name != "ladder"}
    assert {name.split(":")[0] for name in CONFIGS} == files
    for name in files:
        document = (ROOT / "configs" / f"{name}.py").read_text()
        assert "python -m safelm.train --config=configs/" in document and "Hardware:" in document, name


def built(name, inputs):
    """The config of that name as a run of one tiny step."""
    file, *variant = name.split(":")
    config = importlib.import_module(f"configs.{file}").get_config(*variant)
    assert config.is_locked
    return tiny_runs.shrink(config, inputs)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_locks_and_gives_a_plan(inputs, tmp_path, monkeypatch, capsys, name):
    monkeypatch.syspath_prepend(str(ROOT))
    train(built(name, inputs), str(tmp_path / "run"), dry_run=True)
    assert "steps:      1\n" in capsys.readouterr().out


TRAINED = ("quickstart:safety", "smollm2_1b7", "instruction_tune:tiny_tagged")


@pytest.mark.parametrize(
    "name", [name if name in TRAINED else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_every_config_trains_a_step(inputs, tmp_path, monkeypatch, name):
    monkeypatch.syspath_prepend(str(ROOT))
    train(built(name, inputs), str(tmp_path))
    assert tiny_runs.metric_lines(tmp_path)[-1]["step"] == 1


def test_unknown_field_is_named_with_its_siblings(inputs):
    config = tiny_runs.tiny_config(inputs)
    with pytest.raises(AttributeError):
        config.lerning_rate = 1
    unknown = config_fields.unknown_field
    assert unknown(config, ["--config=x.py", "--config.optimizer.peak_lr=1", "--other"]) is None
    line = unknown(config, ["--config.loss.zloss=1"])
    assert line == "unknown config field --config.loss.zloss=1: config.loss has vocab_chunks, z_loss"
    assert "it is a value" in unknown(config, ["--config.seed.x=1"])


def test_the_command(inputs, tmp_path):
    """Unknown field: one line, code 2; else it trains, keeps the resolved config, and imports no TensorFlow."""
    command = [sys.executable, "-m", "safelm.train", "--config=configs/tiny_cpu.py", f"--workdir={tmp_path}"]
    run = subprocess.run([*command, "--config.modle.d_model=3"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and len(run.stderr.strip().splitlines()) == 1
    assert "unknown config field --config.modle.d_model=3" in run.stderr
    command += [f"--config.tokenizer={inputs}/tokenizer", f"--config.data.root={inputs}/tokens"]
    command += ["--config.mesh.data=8", "--config.batch_size=16", "--config.total_steps=2"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "config.json").read_text())["total_steps"] == 2 and "!!python" not in run.stdout
    assert "step 2/2  loss" in run.stderr
    assert "tokens/s" in run.stderr and "ETA" in run.stderr and "MFU n/a" in run.stderr
