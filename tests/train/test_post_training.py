"""Instruction tuning and finetuning go on from any checkpoint; tag and chat tokens survive every stage."""

import importlib
import json

import numpy as np
import pytest
import tiny_runs

from safelm.checkpoints import checkpoint
from safelm.text.prompting import chat_prompt
from safelm.text.tokenizer import Tokenizer
from safelm.train.run import train


def stage(inputs, file, variant, init, **overrides):
    """A post-training config of `configs/` as a run of three tiny steps that takes model and tokenizer from `init`."""
    config = tiny_runs.shrink(importlib.import_module(f"configs.{file}").get_config(variant), inputs)
    with config.unlocked():
        config.tokenizer, config.init_checkpoint, config.total_steps = "", str(init), 3
        config.model.update(dict.fromkeys(("vocab_size", "num_layers", "d_model", "d_ff", "num_heads"), None))
        config.model.update(num_kv_heads=None, head_dim=None)
    config.update_from_flattened_dict(overrides)
    return config


@pytest.fixture(scope="module")
def stages(inputs, tmp_path_factory):
    """Pretrained, instruction-tuned and finetuned: the folders of one model."""
    root = tmp_path_factory.mktemp("stages")
    train(tiny_runs.tiny_config(inputs), str(root / "pretrained"))
    train(stage(inputs, "instruction_tune", "tiny_tagged", root / "pretrained"), str(root / "tuned"))
    train(stage(inputs, "benign_finetune", "tiny", root / "tuned"), str(root / "finetuned"))
    return [root / name for name in ("pretrained", "tuned", "finetuned")]


def test_tag_and_chat_tokens_survive_every_stage(stages, inputs):
    first = Tokenizer.from_pretrained(str(inputs / "tokenizer"))
    messages = [{"role": "user", "content": "the cat"}]
    for folder in stages:
        config, params, tokenizer = checkpoint.load_for_inference(str(folder))
        assert tokenizer.hash == first.hash and tokenizer.vocab_size <= config.vocab_size
        for name in ("harm_tag_id", "chat_start_id", "chat_end_id", "eos_id"):
            assert getattr(tokenizer, name) == getattr(first, name) is not None, (folder, name)
        assert chat_prompt(tokenizer, messages) == [first.eos_id, *chat_prompt(first, messages)]
        table = np.asarray(params["embedding"]) if "embedding" in params else None
        assert table is None or np.isfinite(table[tokenizer.harm_tag_id]).all()


def test_a_stage_begins_with_the_parameters_of_the_one_before(stages, inputs, tmp_path):
    config = stage(inputs, "benign_finetune", "tiny", stages[1], **{"optimizer.peak_lr": 0.0})
    train(config, str(tmp_path / "still"))
    before, still = (checkpoint.load_for_inference(str(folder))[1] for folder in (stages[1], tmp_path / "still"))
    moved = checkpoint.load_for_inference(str(stages[2]))[1]
    import jax

    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), before, still)
    assert all(jax.tree.leaves(same))
    other = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), before, moved)
    assert not all(jax.tree.leaves(other))


def test_the_stage_is_a_mixture_with_a_tenth_of_tagged_answers(stages):
    tuned = json.loads((stages[1] / "config.json").read_text())
    assert tuned["data"]["phases"][0]["rates"]["harm_tagged_chat"] == 0.1 and tuned["data"]["packing"] == "fit"
    finetuned = json.loads((stages[2] / "config.json").read_text())
    assert finetuned["data"]["phases"][0]["rates"] == {"gsm8k": 1.0}
