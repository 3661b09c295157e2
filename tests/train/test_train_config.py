"""Fields out of range, and learning-rate schedules that are no part of the compiled program."""

import jax
import numpy as np
import pytest
import tiny_runs
import tokenizers

from safelm.formats import huggingface
from safelm.models import decoder, sharding
from safelm.models.config import ModelConfig
from safelm.text.conventions import Declared
from safelm.text.prompting import chat_prompt, text_prompt
from safelm.text.tokenizer import Tokenizer
from safelm.train import config as train_config
from safelm.train import program as train_program
from safelm.train import step as train_step
from safelm.train.defaults import default_config
from safelm.train.run import train

OTHER_RATES = [
    {"optimizer.peak_lr": 1e-4, "optimizer.min_lr": 1e-5, "optimizer.warmup_steps": 3},
    {"optimizer.decay_steps": 5, "total_steps": 9},
    {"optimizer.schedule": "cosine"},
]


TURNS = "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"


def imported(folder, *, template, begins=True):
    """A model of another program whose texts begin with <bos>, in a folder of Hugging Face."""
    vocabulary = tokenizers.Tokenizer.from_str(tiny_runs.tokenizer().to_json())
    names = ("<bos>", "<start_of_turn>", "<end_of_turn>")
    vocabulary.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
    begin_ids = (vocabulary.token_to_id("<bos>"),) if begins else ()
    declared = Declared(template, (("bos_token", "<bos>"), ("eos_token", "<|endoftext|>")), begin_ids=begin_ids)
    tokenizer = Tokenizer(vocabulary, declared=declared)
    model = ModelConfig(**tiny_runs.model_fields(vocab_size=tokenizer.vocab_size, max_seq_len=64))
    params = jax.tree.map(np.asarray, decoder.init(model, jax.random.key(0)))
    huggingface.write_folder(folder, model, params, tokenizer)
    return str(folder)


def resolved_from(source):
    config = default_config()
    config.update(init_checkpoint=source, total_steps=1, seq_len=16)
    return train_config.resolve(config).tokenizer


def prompts_of(tokenizer):
    return [text_prompt(tokenizer, "the cat"), chat_prompt(tokenizer, [{"role": "user", "content": "the cat"}])]


def test_a_finetuned_models_texts_and_chats_begin_as_those_of_the_model_that_it_was(tmp_path):
    source = imported(tmp_path / "theirs", template="{{ bos_token }}" + TURNS)
    before, after = Tokenizer.from_pretrained(source), resolved_from(source)
    assert prompts_of(before) == prompts_of(after) and before.special_token(prompts_of(after)[1][0]) == "<bos>"
    after.save(str(tmp_path / "kept"))
    assert prompts_of(Tokenizer.from_pretrained(tmp_path / "kept")) == prompts_of(before)
    # A template that writes no beginning leaves it to what stands before every document of training.
    source = imported(tmp_path / "bare", template=TURNS)
    before, after = Tokenizer.from_pretrained(source), resolved_from(source)
    assert prompts_of(after) == [prompts_of(before)[0], [*before.conventions.begin_ids, *prompts_of(before)[1]]]


def test_models_whose_texts_begin_with_nothing_begin_with_the_end_of_a_document(inputs, tmp_path):
    after = resolved_from(imported(tmp_path / "theirs", template=TURNS, begins=False))
    assert after.conventions.begin_ids == after.conventions.chat_begin_ids == (after.eos_id,)
    ours = train_config.resolve(tiny_runs.tiny_config(inputs)).tokenizer
    assert ours.conventions.begin_ids == ours.conventions.chat_begin_ids == (ours.eos_id,)


def program_text(config):
    config, model_config = train_config.resolve_sizes(config)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    program, _ = train_program.make_program(config, model_config, mesh)
    batch = train_step.abstract_batch(program, config.batch_size, config.seq_len)
    with jax.set_mesh(mesh):
        return program.step.lower(program.abstract_state, batch, train_step.abstract_controls(mesh)).as_text()


@pytest.mark.parametrize(
    ("field", "dtype", "message"),
    [
        ("param_dtype", "bfloat16", r"model.param_dtype is 'bfloat16': parameters are trained in float32"),
        ("param_dtype", "float16", r"model.param_dtype is 'float16': parameters are trained in float32"),
        ("dtype", "float16", r"model.dtype is 'float16': training doesn't scale its loss"),
    ],
)
def test_dtypes_in_which_updates_would_be_lost_are_refused(inputs, field, dtype, message):
    with pytest.raises(ValueError, match=message):
        program_text(tiny_runs.tiny_config(inputs, **{f"model.{field}": dtype}))


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
