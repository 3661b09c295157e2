"""Spikes and numbers that aren't finite: halt, skip or roll back; and that a resumed run decides the same."""

import json
import math
import shutil

import numpy as np
import pytest
import tiny_runs
from ml_collections import ConfigDict

from safelm.checkpoints import checkpoint
from safelm.train import data as train_data
from safelm.train import faults as train_faults
from safelm.train.defaults import default_config
from safelm.train.run import train

POISONED = 5


def policy(**values) -> ConfigDict:
    return ConfigDict({**default_config().faults.to_dict(), "spike_window": 3, **values})


def drive(faults, steps, *, first=1, normal=(2.0, 1.0), odd=None):
    """Feeds numbers as the devices would judge them; returns the actions by step."""
    actions = {}
    for step in range(first, steps + 1):
        loss, norm = (odd or {}).get(step, normal)
        max_loss, max_norm = faults.limits(step)
        applied = math.isfinite(loss) and math.isfinite(norm) and loss <= max_loss and norm <= max_norm
        actions[step] = faults.judge(step, loss, norm, applied=applied).action
    return actions


def test_limits_are_medians_of_applied_updates_two_steps_back():
    faults = train_faults.Faults(policy(on_spike="skip", spike_loss_ratio=1.5, spike_grad_norm_ratio=10.0))
    for step, loss in enumerate([4.0, 3.0, 2.0, 1.0], 1):
        assert faults.limits(step) == (math.inf, math.inf)
        faults.judge(step, loss, loss / 2, applied=True)
    assert faults.limits(5) == (1.5 * 3.0, 10.0 * 1.5)  # of steps 1 to 3: step 4 may still be running
    faults.judge(5, 100.0, 1.0, applied=False)
    assert faults.limits(6) == (1.5 * 2.0, 10.0 * 1.0)  # of steps 2 to 4
    assert train_faults.Faults(policy()).limits(100) == (math.inf, math.inf)


def test_a_reloaded_record_decides_the_same():
    config = policy(on_spike="skip", on_nonfinite="skip")
    odd = {6: (9.0, 1.0), 9: (math.nan, 1.0), 11: (2.0, 50.0), 15: (4.1, 1.0)}
    whole = train_faults.Faults(config)
    wanted = drive(whole, 20, odd=odd)
    assert [step for step, action in wanted.items() if action == "skip"] == [6, 9, 11, 15]
    for cut in range(1, 20):
        first, second = train_faults.Faults(config), train_faults.Faults(config)
        actions = drive(first, cut, odd=odd)
        second.load(json.loads(json.dumps(first.record())))
        assert actions | drive(second, 20, first=cut + 1, odd=odd) == wanted
        assert second.record() == whole.record()


def test_too_many_skips_or_rollbacks_halt():
    faults = train_faults.Faults(policy(on_nonfinite="skip", max_skips=2))
    with pytest.raises(FloatingPointError, match=r"step 9: .*nan.* after 3 skips in 3 steps \(faults.max_skips 2\)"):
        drive(faults, 20, odd={step: (math.nan, 1.0) for step in (3, 7, 8, 9)})
    faults = train_faults.Faults(policy(on_nonfinite="rollback", max_rollbacks=1))
    assert drive(faults, 4, odd={4: (1.0, math.inf)})[4] == "rollback"
    faults.roll_back(4, {})
    with pytest.raises(FloatingPointError, match=r"step 6: .*after 1 rollbacks \(faults.max_rollbacks 1\)"):
        drive(faults, 6, first=5, odd={6: (1.0, math.inf)})


@pytest.mark.parametrize(
    ("field", "value"),
    [("on_nonfinite", "ignore"), ("on_spike", "halt"), ("spike_loss_ratio", 0.9), ("spike_window", 0), ("grace_s", 0)],
)
def test_bad_policy_names_the_field(field, value):
    with pytest.raises(ValueError, match=rf"faults\.{field} is {value!r}"):
        train_faults.check_config(policy(**{field: value}))


@pytest.fixture
def poison(monkeypatch):
    """poison(f): the loss weights of the batch of step POISONED goes through f."""

    def apply(change):
        batches = train_data.TrainData.batches

        def poisoned(self, start_step, sharding):
            for step, batch in enumerate(batches(self, start_step, sharding), start_step + 1):
                bad = step == POISONED
                yield batch._replace(loss_weight_BT=change(batch.loss_weight_BT)) if bad else batch

        monkeypatch.setattr(train_data.TrainData, "batches", poisoned)

    return apply


def events(workdir, name):
    lines = [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def test_skip_leaves_the_state_and_a_resumed_run_is_the_same(inputs, tmp_path, poison):
    poison(lambda mask: mask * np.nan)
    config = tiny_runs.tiny_config(inputs, **{"faults.on_nonfinite": "skip", "total_steps": 8})
    train(config, str(tmp_path / "whole"))
    (skip,) = events(tmp_path / "whole", "skip")
    assert skip["step"] == POISONED and "nan" in skip["reason"]
    lines = tiny_runs.metric_lines(tmp_path / "whole")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["steps_not_applied"] for line in lines] == [int(line["step"] >= POISONED) for line in lines]
    assert all(("loss" in line) == (line["step"] != POISONED) for line in lines)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for step in ("6", "8"):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / step, ignore_errors=True)
    train(config, str(tmp_path / "resumed"))
    tiny_runs.assert_same_checkpoint(tmp_path / "whole", tmp_path / "resumed", 8)
    assert tiny_runs.metric_lines(tmp_path / "resumed") == lines


@pytest.mark.parametrize(
    "log_every", [1, pytest.param(4, marks=pytest.mark.slow)]
)  # the bad step's numbers are read at once, or while the next one runs
def test_rollback_goes_on_behind_the_bad_batch_and_a_resumed_run_does_the_same(inputs, tmp_path, poison, log_every):
    poison(lambda mask: mask.at[:].set(0.0).at[0, 0].set(1.0) * np.inf)
    overrides = {"faults.on_nonfinite": "rollback", "total_steps": 8, "log.every_steps": log_every}
    config = tiny_runs.tiny_config(inputs, **overrides)
    train(config, str(tmp_path / "whole"))
    (undone,) = events(tmp_path / "whole", "rolled_back")
    assert (undone["step"], undone["to"], undone["steps_undone"]) == (POISONED, 3, 2)
    lines = tiny_runs.metric_lines(tmp_path / "whole")
    assert [line["step"] for line in lines] == list(range(log_every, 9, log_every))
    assert lines[-1]["steps_not_applied"] == 2 and lines[-1]["tokens/raw_web"] == 8 * 6 * 16
    meta = checkpoint.open_checkpoint(str(tmp_path / "whole"))[2]
    assert meta["faults"]["rollbacks"] == [{"step": POISONED, "to": 3}]

    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for step in ("6", "8"):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / step, ignore_errors=True)
    train(config, str(tmp_path / "resumed"))  # from step 3, through the bad step again
    tiny_runs.assert_same_checkpoint(tmp_path / "whole", tmp_path / "resumed", 8)
    assert tiny_runs.metric_lines(tmp_path / "resumed") == lines


@pytest.mark.slow
def test_a_rollback_before_the_first_checkpoint_begins_anew_behind_the_bad_batch(inputs, tmp_path, poison):
    poison(lambda mask: mask * np.nan)
    config = tiny_runs.tiny_config(inputs, **{"faults.on_nonfinite": "rollback", "checkpoint.every_steps": 100})
    train(config, str(tmp_path))
    (undone,) = events(tmp_path, "rolled_back")
    assert (undone["to"], undone["steps_undone"]) == (0, POISONED)


def test_a_spike_is_skipped(inputs, tmp_path, poison):
    poison(lambda mask: mask.at[:].set(0.0).at[0, 0].set(1.0))  # the gradient of one token: not averaged out
    spike = {"faults.spike_loss_ratio": 0.0, "faults.spike_grad_norm_ratio": 1.5, "faults.spike_window": 2}
    train(tiny_runs.tiny_config(inputs, **{"faults.on_spike": "skip"} | spike), str(tmp_path))
    assert [event["step"] for event in events(tmp_path, "skip")] == [POISONED]
    assert tiny_runs.metric_lines(tmp_path)[-1]["steps_not_applied"] == 1
