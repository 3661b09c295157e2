"""`import safelm` as a user would use it, on a tiny run; and the examples of README.md and docs/api.md."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_runs

import safelm
from safelm import convert, inference
from safelm.models import sharding
from safelm.synthetic_web.corpus import Recipe, write_corpus
from safelm.train.run import train

ROOT = Path(__file__).parents[2]
TEXT = "the cat sat on the mat"
SCORER = "python:scorers_for_tests:LevelScorer"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    sizes = {"model.num_kv_heads": 2, "model.max_seq_len": 128}
    train(tiny_runs.tiny_config(tiny_runs.write_inputs(folder), **sizes), str(folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def lm(run) -> safelm.LanguageModel:
    return safelm.load(run)


def python(code: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=600)


def test_importing_is_light_and_names_come_when_they_are_used():
    done = python(
        "import sys, safelm\n"
        "heavy = {'jax', 'jaxlib', 'tensorflow', 'flax', 'numpy', 'seqio', 'apache_beam', 'safelm.lm', 'safelm.api'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert set(safelm.__all__) <= set(dir(safelm)) and 'tensorflow' not in sys.modules\n"
        "assert safelm.HARM_TAG and safelm.SafeBeam(num_beams=2)\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    assert done.returncode == 0, done.stderr


def test_every_name_is_there_typed_and_an_unknown_one_is_told():
    for name in safelm.__all__:
        value = getattr(safelm, name)
        assert value.__doc__ and (name == "HARM_TAG" or inspect.signature(value)), name
    typed = inspect.getsource(safelm).partition("if TYPE_CHECKING:")[2].partition("__all__")[0]
    assert set(re.findall(r"\w+", typed)) >= set(safelm.__all__)
    with pytest.raises(AttributeError, match="module 'safelm' has no attribute 'nothing'"):
        _ = safelm.nothing


@pytest.mark.parametrize("name", ["score", pytest.param("report_card", marks=pytest.mark.slow)])
def test_a_function_and_the_command_module_of_one_name(name):
    """Whichever comes first, the command's import or the function's use."""
    checks = f"assert callable(safelm.{name}); assert hasattr(safelm.{name}, 'main')\n"
    done = python(f"import safelm\n{checks}import safelm.{name}\n{checks}from safelm import {name}\n{name}()")
    assert "TypeError" in done.stderr and f"{name}() missing" in done.stderr


def test_one_prompt_gives_a_completion_and_several_a_list(lm):
    one = lm.generate("the cat", max_new_tokens=5)
    many = lm.generate(["the cat", ""], max_new_tokens=5)
    assert isinstance(one, safelm.Completion) and len(many) == 2 and lm.generate([]) == []
    assert one.tokens == many[0].tokens and one.logprob == pytest.approx(many[0].logprob, abs=1e-4)
    assert len(one.tag_probs) == len(one.tokens) <= 5 and one.stopped_by in ("eos", "length")
    assert one.text == lm.tokenizer.decode(one.tokens[: len(one.tokens) - (one.stopped_by == "eos")])


@pytest.mark.parametrize("method", [safelm.Greedy(), safelm.Sampling(top_k=5), safelm.SafeBeam()], ids=repr)
def test_a_method_gives_what_inference_gives(lm, method):
    ids = lm.tokenizer.encode(TEXT)
    settings = {"max_new_tokens": 4, "seed": 3}
    conventions = lm.tokenizer.conventions
    (want,) = inference.generate(
        lm.config,
        lm.params,
        [[*conventions.begin_ids, *ids]],
        method,
        end_ids=conventions.end_ids,
        harm_tag_id=lm.tokenizer.harm_tag_id,
        **settings,
    )
    got = lm.generate(TEXT, method, **settings)
    assert (got.tokens, got.logprob, got.stopped_by) == (want.tokens, want.logprob, want.stopped_by)


@pytest.mark.slow
def test_a_mesh_changes_no_token(lm):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    prompts = ["the cat", ""]
    alone = lm.generate(prompts, max_new_tokens=5)
    together = lm.generate(prompts, max_new_tokens=5, mesh=mesh)
    assert [each.tokens for each in together] == [each.tokens for each in alone]
    np.testing.assert_allclose([each.logprob for each in together], [each.logprob for each in alone], rtol=1e-4)
    with pytest.raises(ValueError, match=r"mesh\.tensor=8 does not divide"):
        lm.generate(prompts, mesh=sharding.make_mesh({"tensor": 8}))


def test_chat(lm):
    conversation = [{"role": "user", "content": "the cat"}]
    assert lm.chat("the cat", max_new_tokens=4) == lm.chat(conversation, max_new_tokens=4)
    told = lm.chat([{"role": "system", "content": "sat"}, *conversation], max_new_tokens=4)
    assert told != lm.chat("the cat", max_new_tokens=4)
    with pytest.raises(ValueError, match="message 0: needs a one-line role and a content string"):
        lm.chat([{"content": "the cat"}])


def test_what_a_model_makes_of_a_text(lm):
    begin, ids = lm.tokenizer.conventions.begin_ids, lm.tokenizer.encode(TEXT)
    assert begin and "".join(lm.tokens(TEXT)) == TEXT and len(ids) > 3
    read = [*begin, *ids]
    (want_T,) = inference.tag_probability(lm.config, lm.params, [read], harm_tag_id=lm.tokenizer.harm_tag_id)
    np.testing.assert_array_equal(lm.tag_probabilities(TEXT), want_T[len(begin) :])

    (score,) = inference.score_continuations(lm.config, lm.params, [(begin, ids)])
    assert lm.log_probs(TEXT).shape == (len(ids),)
    assert lm.log_probs(TEXT).sum() == pytest.approx(score.logprob, abs=1e-4)

    width = lm.config.d_model
    states = [lm.hidden_states(TEXT, layer) for layer in (0, 1, 2, None)]
    assert all(state.shape == (len(ids), width) for state in states)
    np.testing.assert_array_equal(states[0], np.asarray(lm.params["embedder"]["embedding"])[ids])
    scale_D = np.asarray(lm.params["final_norm"]["scale"])
    normed_TD = states[2] / np.sqrt((states[2] ** 2).mean(axis=1, keepdims=True) + lm.config.rms_norm_eps)
    np.testing.assert_allclose(states[3], normed_TD * scale_D, rtol=1e-4, atol=1e-5)


def test_a_model_whose_texts_begin_with_no_token(lm):
    """Nothing predicts the first token; tag and stream are those of the bare text."""
    bare = dataclasses.replace(lm, tokenizer=lm.tokenizer.beginning_with(()))
    ids = lm.tokenizer.encode(TEXT)
    (score,) = inference.score_continuations(lm.config, lm.params, [(ids[:1], ids[1:])])
    found_T = bare.log_probs(TEXT)
    assert np.isnan(found_T[0]) and found_T[1:].sum() == pytest.approx(score.logprob, abs=1e-4)
    assert len(found_T) == len(bare.tag_probabilities(TEXT)) == len(bare.hidden_states(TEXT)) == len(ids)


def test_models_from_a_step_and_from_a_hugging_face_folder(lm, run, tmp_path):
    early = safelm.load(str(run), step=3)
    assert not np.array_equal(early.params["embedder"]["embedding"], lm.params["embedder"]["embedding"])
    convert.convert(str(run), str(tmp_path / "hf"), step=3)
    exported = safelm.load(tmp_path / "hf", dtype="float32")
    assert exported.generate(TEXT, max_new_tokens=5).tokens == early.generate(TEXT, max_new_tokens=5).tokens
    np.testing.assert_allclose(exported.log_probs(TEXT), early.log_probs(TEXT), atol=1e-4)
    assert safelm.load(run, dtype="bfloat16").config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        (FileNotFoundError, lambda lm: safelm.load("/nowhere/x"), "/nowhere/x: no such file or folder"),
        (ValueError, lambda lm: lm.generate(["ok", TEXT * 30]), "prompt 1: its "),
        (ValueError, lambda lm: lm.generate(TEXT, max_new_tokens=0), "max_new_tokens=0: must be at least 1"),
        (ValueError, lambda lm: safelm.SafeBeam(drop_fraction=1.0), "SafeBeam: drop_fraction=1.0, want"),
        (ValueError, lambda lm: lm.log_probs(""), "the text is empty"),
        (ValueError, lambda lm: lm.tag_probabilities(TEXT * 30), "tokens, the model's context is 128"),
        (ValueError, lambda lm: lm.hidden_states(TEXT, 3), "layer=3: the model has layers 0 to 2"),
        (ValueError, lambda lm: safelm.score("a", "nothing"), "scorer 'nothing': expected one of bundled, classifier:"),
        (FileNotFoundError, lambda lm: safelm.report_card("/nowhere/*.jsonl"), "/nowhere/*.jsonl: no such file"),
    ],
)
def test_bad_input_is_one_clear_line(lm, kind, call, message):
    with pytest.raises(kind) as error:
        call(lm)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_step_or_a_dtype_that_is_not_there(run):
    with pytest.raises(FileNotFoundError, match=r"step=5: no such checkpoint in .*, which has 3, 6"):
        safelm.load(run, step=5)
    with pytest.raises(ValueError, match="float7"):
        safelm.load(run, dtype="float7")


def test_scores():
    one = safelm.score("level3", SCORER)
    assert (one.score, one.reason) == (3, "it names level 3")
    found = safelm.score(["level5", " \n", "unusable"], safelm.load_scorer(SCORER))
    assert [verdict.score for verdict in found] == [5, 0, None] and found[1].reason == "empty"
    assert safelm.score([], SCORER) == []
    with pytest.raises(ValueError, match="an error whose message quotes a document"):
        safelm.score("refused: a long text that must not be told", SCORER)


def test_a_tag_is_put_in_and_taken_out():
    text = "one two three"
    tagged = safelm.inject_harm_tag(text, harm_score=5, doc_id="a", seed=0, tag_rate=1.0)
    assert tagged == f"one{safelm.HARM_TAG} two{safelm.HARM_TAG} three"
    assert safelm.remove_harm_tags(tagged) == (text, 2)


def test_the_examples_run(run, tmp_path, monkeypatch, capsys):
    """README.md's and docs/api.md's, each page from top to bottom, where the quickstart's results would lie."""
    quickstart = tmp_path / "runs/quickstart"
    quickstart.mkdir(parents=True)
    (quickstart / "safety").symlink_to(run)
    write_corpus(str(quickstart / "corpus"), Recipe(documents=20, validation_documents=20, prompts=1))
    monkeypatch.chdir(tmp_path)
    for page in ("README.md", "docs/api.md"):
        blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
        assert blocks, page
        names = {}
        for block in blocks:
            exec(compile(block, page, "exec"), names)
        assert isinstance(names["lm"], safelm.LanguageModel)
    assert names["removed"] and names["clean"] == "one two three four" and names["verdict"].score == 0
    assert names["card"]["slices"][0]["documents"] == 20 and names["stream"].shape[1] == 16
    assert len(names["answers"]) == 2 and len(jax.devices()) == 8
    assert "Figs" not in capsys.readouterr().err
