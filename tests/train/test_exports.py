"""Exports while a run trains: whole, once, loadable, equal in logits to the model at that step."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny_runs

from safelm.checkpoints import checkpoint
from safelm.formats import huggingface
from safelm.io import remote
from safelm.models import decoder
from safelm.models.config import ModelConfig
from safelm.tags import HARM_TAG
from safelm.text.tokenizer import Tokenizer
from safelm.train import exports, run

EXPORTS = {
    "export.at_steps": (2,),
    "export.every_steps": 3,
    "export.dtype": "float32",
    "chat_template": "user-assistant",
}


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """A run of six steps that exports after 2, 3 and 6."""
    workdir = tmp_path_factory.mktemp("run")
    run.train(tiny_runs.tiny_config(inputs, **EXPORTS, **{"checkpoint.keep_last": 5}), str(workdir))
    return workdir


def test_chosen_steps_and_the_last_are_exported_and_are_the_checkpoints_parameters(trained):
    assert sorted(path.name for path in (trained / "exports").iterdir()) == ["2", "3", "6"]
    for step in (3, 6):
        config, params, tokenizer = checkpoint.load_for_inference(str(trained), step=step)
        again_config, again = huggingface.read_folder(trained / f"exports/{step}")
        assert again_config.num_params == config.num_params
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, params), again)
        exported = Tokenizer.from_pretrained(str(trained / f"exports/{step}"))
        assert exported.hash == tokenizer.hash and exported.harm_tag_id == tokenizer.harm_tag_id
        assert exported.conventions.chat_template == tokenizer.conventions.chat_template is not None
    assert json.loads((trained / "exports/6" / exports.RECORD).read_text())["step"] == 6


def test_transformers_loads_an_export_with_the_same_logits(trained):
    torch, transformers = parity.module("torch"), parity.module("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(trained / "exports/6")
    loaded = transformers.AutoTokenizer.from_pretrained(trained / "exports/6")
    config, params, tokenizer = checkpoint.load_for_inference(str(trained), step=6)
    ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, (2, 16)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    ours = jax.jit(decoder.apply, static_argnums=0)(config, params, ids)[..., : tokenizer.vocab_size]
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert loaded.convert_tokens_to_ids(HARM_TAG) == tokenizer.harm_tag_id
    rendered = loaded.apply_chat_template([{"role": "user", "content": "the cat"}], tokenize=False)
    assert rendered.strip() == "<|endoftext|>User: the cat"  # texts begin behind the end of a document


def test_a_resumed_run_exports_nothing_twice_and_mends_what_is_of_other_parameters(
    trained, inputs, tmp_path, monkeypatch
):
    config, workdir = tiny_runs.tiny_config(inputs, **EXPORTS), tmp_path / "run"
    written = []
    write = exports.HuggingFaceExport._write
    monkeypatch.setattr(
        exports.HuggingFaceExport,
        "_write",
        lambda self, target, *rest: written.append(target) or write(self, target, *rest),
    )
    update = run.Run._update

    def killed_before_step_6(self, batch):
        if self.step == 6:
            raise RuntimeError("killed")
        update(self, batch)

    monkeypatch.setattr(run.Run, "_update", killed_before_step_6)
    with pytest.raises(RuntimeError, match="killed"):
        run.train(config, str(workdir))
    record = workdir / "exports/2" / exports.RECORD
    (workdir / "exports/3/config.json").write_text("kept as it is")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"parameters": {}}))
    shutil.rmtree(workdir / "checkpoints")  # so that it begins anew
    monkeypatch.setattr(run.Run, "_update", update)
    run.train(config, str(workdir))
    assert [target.rsplit("/", 1)[1] for target in written] == ["2", "3", "2", "6"]
    assert (workdir / "exports/3/config.json").read_text() == "kept as it is"
    for name in ("2", "6"):
        for path in (trained / "exports" / name).iterdir():
            assert path.read_bytes() == (workdir / "exports" / name / path.name).read_bytes(), path.name
    assert {path.name for path in (workdir / "exports").iterdir()} == {"2", "3", "6"}


@pytest.mark.parametrize("is_local", [True, False])
def test_an_export_that_is_being_replaced_is_not_called_whole(tmp_path, monkeypatch, is_local):
    def killed(*_, **__):
        raise RuntimeError("killed")

    config = ModelConfig(**tiny_runs.model_fields())
    place = str(tmp_path) if is_local else f"memory://{tmp_path.name}"
    settings = {"dtype": "float32", "saw_tag": lambda: None, "should_stop": lambda: False, "note": lambda text: None}
    export = exports.HuggingFaceExport(1, (), place, config, tiny_runs.tokenizer(), **settings)
    params = [
        jax.tree.map(lambda leaf, value=value: jnp.full(leaf.shape, value), decoder.abstract_params(config))
        for value in (0.0, 1.0)
    ]
    export(params[0], 1)
    files, inner = remote.filesystem(f"{place}/exports/1")
    assert files.exists(f"{inner}/{exports.RECORD}")
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(*((shutil, "rmtree") if is_local else (remote, "upload")), killed)
        export(params[1], 1)
    assert files.exists(f"{inner}/config.json") and not files.exists(f"{inner}/{exports.RECORD}")
    export(params[1], 1)
    assert files.exists(f"{inner}/{exports.RECORD}")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("export.dtype", "float16", "export.dtype is 'float16'"),
        ("export.at_steps", (0,), "export.at_steps has 0"),
        ("export.at_steps", (6, 7), r"export.at_steps has 7: the run has 6 steps \(total_steps\)"),
        ("export.every_steps", -1, "export.every_steps is -1"),
    ],
)
def test_bad_fields_are_named(inputs, tmp_path, field, value, message):
    with pytest.raises(ValueError, match=message):
        run.train(tiny_runs.tiny_config(inputs, **{field: value}), str(tmp_path / "run"))


def test_a_full_disk_leaves_no_export(inputs, tmp_path, monkeypatch):
    def full(folder, *_, **__):
        (folder / "model.safetensors").write_text("half of i")
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(huggingface, "write_folder", full)
    with pytest.raises(OSError, match="No space left"):
        run.train(tiny_runs.tiny_config(inputs, **EXPORTS), str(tmp_path / "run"))
    assert list((tmp_path / "run/exports").iterdir()) == []
    state = json.loads((tmp_path / "run/progress.json").read_text())
    assert state["state"] == "failed" and "No space left" in state["error"] and state["command"] == "safelm.train"
