"""Fields out of range, and learning-rate schedules that are no part of the compiled program."""

import jax
import pytest
import tiny_runs

from safelm.models import sharding
from safelm.train import config as train_config
from safelm.train import program as train_program
from safelm.train import step as train_step
from safelm.train.run import train

OTHER_RATES = [
    {"optimizer.peak_lr": 1e-4, "optimizer.min_lr": 1e-5, "optimizer.warmup_steps": 3},
    {"optimizer.decay_steps": 5, "total_steps": 9},
    {"optimizer.schedule": "cosine"},
]


def program_text(config):
    config, model_config = train_config.resolve_sizes(config)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    program, _ = train_program.make_program(config, model_config, mesh)
    batch = train_step.abstract_batch(program, config.batch_size, config.seq_len)
    with jax.set_mesh(mesh):
        return program.step.lower(program.abstract_state, batch, train_step.abstract_controls(mesh)).as_text()


def test_no_learning_rate_is_in_the_program(inputs):
    text = program_text(tiny_runs.tiny_config(inputs))
    for overrides in OTHER_RATES:
        assert program_text(tiny_runs.tiny_config(inputs, **overrides)) == text
    # What is in the program makes another one, so the comparison can fail.
    assert program_text(tiny_runs.tiny_config(inputs, **{"optimizer.weight_decay": 0.5})) != text


def test_another_schedule_compiles_nothing_anew(inputs, tmp_path):
    """A restart with another schedule finds every program in the cache of compiled programs."""
    events, own = [], {"optimizer.weight_decay": 0.77}
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    try:
        train(tiny_runs.tiny_config(inputs, **own), str(tmp_path / "first"))
        assert "/jax/compilation_cache/cache_misses" in events
        events.clear()
        train(tiny_runs.tiny_config(inputs, **own, **OTHER_RATES[2], **OTHER_RATES[0]), str(tmp_path / "second"))
        assert "/jax/compilation_cache/cache_hits" in events
        assert "/jax/compilation_cache/cache_misses" not in events
    finally:
        jax.monitoring.clear_event_listeners()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("optimizer.peak_lr", -1e-3, r"optimizer.peak_lr is -0.001: it must be in 0 .. 1000"),
        ("optimizer.peak_lr", float("nan"), r"optimizer.peak_lr is nan"),
        ("optimizer.min_lr", -1.0, r"optimizer.min_lr is -1.0: it must be in"),
        ("optimizer.min_lr", 0.5, r"optimizer.min_lr is 0.5, above peak_lr 0.003"),
        ("optimizer.warmup_steps", -1, r"optimizer.warmup_steps is -1: it must be in"),
        ("optimizer.decay_steps", -5, r"optimizer.decay_steps is -5: it must be in"),
        ("optimizer.decay_fraction", 1.5, r"optimizer.decay_fraction is 1.5: it must be in 0 .. 1"),
        ("optimizer.decay_fraction", -0.1, r"optimizer.decay_fraction is -0.1"),
        ("optimizer.b1", 1.0, r"optimizer.b1 is 1.0: it must be in 0 .. 0.999999"),
        ("optimizer.b2", -0.5, r"optimizer.b2 is -0.5"),
        ("optimizer.b2", 1.0, r"optimizer.b2 is 1.0"),
        ("optimizer.eps", 0.0, r"optimizer.eps is 0.0: it must be in 1e-30 .. 1"),
        ("optimizer.weight_decay", -0.01, r"optimizer.weight_decay is -0.01"),
        ("optimizer.clip_norm", -1.0, r"optimizer.clip_norm is -1.0"),
        ("log.assumed_mfu", 0.0, r"log.assumed_mfu is 0.0: it must be in 0.001 .. 1"),
        ("branch.step", -1, r"branch.step is -1"),
        ("eval.every_steps", 100, r"eval.every_steps is 100: eval.sources must name what to evaluate on"),
        ("accept_changes", ("schedule",), r"accept_changes names 'schedule': known are optimizer, data"),
    ],
)
def test_a_value_out_of_range_is_named(inputs, field, value, message):
    with pytest.raises(ValueError, match=message):
        train_config.resolve(tiny_runs.tiny_config(inputs, **{field: value}))
