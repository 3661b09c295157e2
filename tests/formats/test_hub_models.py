"""Models of a hub by name, at every place that takes a model: a hub on loopback serves random weights."""

import json

import jax
import numpy as np
import pytest
import tiny_runs

from safelm import cli, convert, documents, lm
from safelm.checkpoints import checkpoint
from safelm.formats import huggingface, sources
from safelm.io import hub as hub_names
from safelm.models import decoder as model
from safelm.models.config import ModelConfig
from safelm.safety import embedding, engine_models
from safelm.safety.scoring import plan, scorers
from safelm.serving import models as serving_models
from safelm.text.tokenizer import Tokenizer
from safelm.train.run import train

NAME = "hf:someone/tiny-1.7b"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model as a Hugging Face folder."""
    config = ModelConfig(**tiny_runs.model_fields())
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype("f"), model.abstract_params(config))
    folder = tmp_path_factory.mktemp("published") / "model"
    huggingface.write_folder(folder, config, params, tiny_runs.tokenizer())
    return folder


@pytest.fixture
def commit(hub, folder):
    """The model is on the hub, as this commit of its branch main."""
    return hub.add("someone/tiny-1.7b", folder, kind="models")


def published_again(hub, folder, tmp_path):
    """Another model on the same branch: its commit."""
    config, params = huggingface.read_folder(folder)
    huggingface.write_folder(tmp_path / "again", config, jax.tree.map(lambda p: p * 2, params), tiny_runs.tokenizer())
    return hub.add("someone/tiny-1.7b", tmp_path / "again", kind="models")


def test_a_name_is_the_model_that_the_folder_holds(hub, commit, folder, tmp_path):
    here, named = sources.read_model(str(folder)), sources.read_model(NAME)
    assert (
        named[0] == here[0] and named[2].hash == here[2].hash and sources.saw_tag(NAME) is sources.saw_tag(str(folder))
    )
    jax.tree.map(np.testing.assert_array_equal, named[1], here[1])
    assert lm.load(f"{NAME}@{commit}").config == here[0]
    assert sources.source_kind(NAME) == "huggingface"
    meta = sources.read_meta(NAME)
    assert meta == sources.read_meta(str(folder)) and meta["vocab_hash"] == here[2].hash
    assert sources.load_tokenizer(NAME).hash == Tokenizer.from_pretrained(NAME).hash == here[2].hash


def test_a_served_a_judging_and_an_embedding_model_by_name(hub, commit):
    assert serving_models.load_model("tiny", NAME).saw_tag is sources.saw_tag(NAME)
    place, (config, _, _) = engine_models.read_engine_model(NAME, "bfloat16", where="judge")
    assert place == f"{NAME}@{commit}" and config.dtype == "bfloat16"
    backbone = embedding.load_backbone(NAME)
    assert backbone.spec["source"] == f"{NAME}@{commit}" and backbone.name == "tiny-1.7b"
    hub.asked.clear()
    assert embedding.load_backbone(**backbone.spec).fingerprint == backbone.fingerprint and not hub.asked


def test_a_later_run_with_the_same_name_and_another_commit_has_another_scorer(hub, commit, folder, tmp_path):
    def described(flag):
        specs = scorers.parse_specs(flag)
        return plan.scorer_facts(scorers.ScorerSpec(specs[0].spec, "a", "b"))

    first = described(f"harm=judge:{NAME}?reason_tokens=0")
    again = published_again(hub, folder, tmp_path)
    second = described(f"harm=judge:{NAME}?reason_tokens=0")
    assert first["spec"] == f"judge:{NAME}@{commit}?reason_tokens=0"
    assert second["spec"] == f"judge:{NAME}@{again}?reason_tokens=0"
    assert described("judge:/a/folder") == {"name": "a", "fingerprint": "b"}


def test_a_checkpoint_records_what_it_was_converted_from(hub, commit, folder, tmp_path):
    for source, name in ((NAME, "named"), (str(folder), "local")):
        convert.convert(source, str(tmp_path / name))
    records = [checkpoint.open_checkpoint(str(tmp_path / name))[2] for name in ("named", "local")]
    assert records[0]["source"] == f"{NAME}@{commit}" and "source" not in records[1]
    assert records[0]["fingerprints"] == records[1]["fingerprints"]


def test_a_run_begins_with_a_model_by_name_and_records_its_commit(hub, commit, folder, tmp_path, capsys):
    inputs = tiny_runs.write_inputs(tmp_path / "inputs")
    train(tiny_runs.tiny_config(inputs, init_checkpoint=NAME, tokenizer="", total_steps=1), str(tmp_path / "named"))
    before, after = (
        source(str(place))[1]
        for source, place in ((sources.read_model, folder), (checkpoint.load_for_inference, tmp_path / "named"))
    )
    assert all(0 < np.abs(a - b).max() < 0.05 for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))
    stored = json.loads((tmp_path / "named" / "config.json").read_text())
    assert stored["init_checkpoint"] == f"{NAME}@{commit}"
    hub.files.clear()  # what has begun needs the hub no more
    again = tiny_runs.tiny_config(inputs, init_checkpoint=NAME, tokenizer="", total_steps=1)
    capsys.readouterr()
    train(again, str(tmp_path / "named"))
    assert "changed since the last start" not in capsys.readouterr().err
    assert json.loads((tmp_path / "named" / "config.json").read_text()) == stored
    train(tiny_runs.tiny_config(inputs, init_checkpoint=NAME, tokenizer=NAME, total_steps=1), str(tmp_path / "named"))
    with pytest.raises(FileNotFoundError, match=r"^hf:someone/nothing: no such model"):
        train(tiny_runs.tiny_config(inputs, init_checkpoint="hf:someone/nothing"), str(tmp_path / "none"))


def test_a_dry_run_reads_a_tokenizer_by_name_and_the_data(hub, commit, tmp_path, capsys):
    inputs = tiny_runs.write_inputs(tmp_path / "inputs")
    train(tiny_runs.tiny_config(inputs, tokenizer=NAME), "", dry_run=True)
    said = capsys.readouterr().out
    assert "not there" not in said and "tokens (75.000% planned" in said
    with pytest.raises(FileNotFoundError, match=r"^hf:someone/nothing: no such model"):
        train(tiny_runs.tiny_config(inputs, tokenizer="hf:someone/nothing"), "", dry_run=True)


def test_names_of_models_in_flags(hub, commit):
    assert cli.checkpoint(NAME) == ("tiny-1.7b", NAME)
    assert cli.checkpoint(f"{NAME}@refs/pr/1") == ("tiny-1.7b", f"{NAME}@refs/pr/1")
    assert cli.checkpoint(f"mine@tuned={NAME}@{commit}") == ("mine@tuned", f"{NAME}@{commit}")
    with pytest.raises(ValueError, match=r"^hf:someone/web: documents of a hub are named hf://datasets/ORG/NAME"):
        documents.find("hf:someone/web")
    assert hub_names.pinned_in(f"judge:{NAME}?name=a") == f"judge:{NAME}@{commit}?name=a"
    assert hub_names.pinned_in(f"classifier:DIR?backbone={NAME}") == f"classifier:DIR?backbone={NAME}@{commit}"
    for spec in ("rules", "judge:/a/hf:b", "endpoint:https://h/v1#hf-model", "classifier:hf://datasets/a/b"):
        assert hub_names.pinned_in(spec) == spec
    with pytest.raises(FileNotFoundError, match=r"^hf:someone/nothing: no such model"):
        hub_names.pinned_in("judge:hf:someone/nothing?name=a")
