"""Our models begin their texts behind an end-of-document token: learned, kept, and given by every command."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny_runs
import tokenizers
from serving_fakes import FakeEngine, Script, running, tiny_model
from serving_fakes import http as ask

from safelm import inference
from safelm.checkpoints import checkpoint
from safelm.data.store import Manifest, ShardWriter, write_manifest
from safelm.formats import huggingface
from safelm.models import decoder as model
from safelm.text.prompting import chat_example, chat_prompt, question_frame, text_prompt
from safelm.text.tokenizer import Tokenizer
from safelm.train.run import train

PLAIN = tiny_runs.tokenizer()
OURS = PLAIN.beginning_with([PLAIN.eos_id])
MESSAGES = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
QUESTION = types.SimpleNamespace(system="judge", before="read: ", after="\nanswer")
FIRST, SHARE = (20, 21), 0.75  # of documents that begin with the first of them


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of documents that begin with either of two tokens."""
    inputs = tiny_runs.write_inputs(tmp_path_factory.mktemp("inputs"))
    directory = inputs / "tokens" / "raw_web" / "train"
    for path in directory.iterdir():
        path.unlink()
    rng = np.random.default_rng(0)
    with ShardWriter(directory, 0, 1, np.uint16, harm_tag_id=PLAIN.harm_tag_id) as writer:
        for index in range(400):
            begin = FIRST[0] if index % 4 < 4 * SHARE else FIRST[1]
            writer.add([begin, *rng.integers(30, 40, rng.integers(1, 6)), PLAIN.eos_id])
        info = writer.close()
    numbers = {"num_documents": 400, "num_tokens": info.num_tokens, "num_tag_tokens": 0}
    ids = {"eos_id": PLAIN.eos_id, "harm_tag_id": PLAIN.harm_tag_id}
    vocabulary = {"vocab_hash": PLAIN.hash, "vocab_size": PLAIN.vocab_size, "dtype": "uint16"}
    write_manifest(directory, Manifest("raw_web", "train", **vocabulary, **ids, shards=(info,), **numbers))
    settings = {"total_steps": 60, "checkpoint.every_steps": 60, "optimizer.peak_lr": 0.02, "batch_size": 16}
    phases = ({"start": 0.0, "rates": {"raw_web": 1.0}},)
    workdir = str(tmp_path_factory.mktemp("run"))
    train(tiny_runs.tiny_config(inputs, **settings, **{"data.phases": phases}), workdir)
    return checkpoint.load_for_inference(workdir)


def test_an_empty_prompt_has_the_first_tokens_share(trained):
    config, params, tokenizer = trained
    prompt = text_prompt(tokenizer, "")
    assert tokenizer.conventions.begin_ids == (tokenizer.eos_id,) and prompt == [tokenizer.eos_id]
    logits_V = model.apply(config, params, jnp.array([prompt]))[0, -1, : tokenizer.vocab_size]
    probs_V = np.asarray(jax.nn.softmax(logits_V.astype(jnp.float32)))
    assert probs_V[list(FIRST)] == pytest.approx([SHARE, 1 - SHARE], abs=0.08)
    (continued,) = inference.generate(
        config, params, [prompt], inference.Greedy(), max_new_tokens=1, end_ids=[tokenizer.eos_id], harm_tag_id=None
    )
    assert continued.tokens[0] == FIRST[0]


def reloaded(folder) -> Tokenizer:
    OURS.save(str(folder))
    return Tokenizer.from_pretrained(folder)


def test_the_beginning_is_kept_by_saving_and_by_tokenizers(tmp_path):
    again = reloaded(tmp_path)
    assert again.conventions == OURS.conventions and again.hash == PLAIN.hash
    text = "the cat<|endoftext|> sat"
    assert text_prompt(again, text) == [PLAIN.eos_id, *PLAIN.encode(text)]
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("the cat sat").ids == text_prompt(again, "the cat sat")
    assert text_prompt(PLAIN, text) == PLAIN.encode(text) and text_prompt(PLAIN, "") == [PLAIN.eos_id]


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ '<|im_start|>' + m.content }}{% endfor %}"])
def test_conversations_begin_once_and_examples_are_left_to_the_rows(tmp_path, template):
    PLAIN.save(str(tmp_path / "plain"))
    if template is not None:
        (tmp_path / "plain" / "chat_template.jinja").write_text(template)
    plain = Tokenizer.from_pretrained(tmp_path / "plain")
    ours = plain.beginning_with([plain.eos_id])
    ours.save(str(tmp_path / "ours"))
    loaded = Tokenizer.from_pretrained(tmp_path / "ours")
    assert loaded.conventions == ours.conventions
    for tokenizer in (ours, loaded, loaded.beginning_with([plain.eos_id])):
        assert chat_prompt(tokenizer, MESSAGES) == [plain.eos_id, *chat_prompt(plain, MESSAGES)]
        frame, without = question_frame(tokenizer, QUESTION), question_frame(plain, QUESTION)
        assert frame.before == (plain.eos_id, *without.before) and frame.after == without.after
    if template is None:
        assert chat_example(loaded, MESSAGES) == chat_example(plain, MESSAGES)


def test_an_export_begins_the_same_in_transformers(tmp_path):
    transformers = parity.module("transformers")
    config = model.ModelConfig(**tiny_runs.model_fields())
    huggingface.write_folder(tmp_path, config, model.init(config, jax.random.key(0)), OURS)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("the cat sat")["input_ids"] == text_prompt(OURS, "the cat sat")
    rendered = theirs.apply_chat_template(MESSAGES[:1], add_generation_prompt=True, return_dict=False)
    assert rendered == chat_prompt(OURS, MESSAGES[:1])


def log_probs_of_next(config, params, tokens):
    """At every position, of the token that follows, by one whole pass over at most 16 tokens."""
    padded = jnp.zeros((1, 16), jnp.int32).at[0, : len(tokens)].set(jnp.array(tokens, jnp.int32))
    logits_TV = jax.jit(model.apply, static_argnums=0)(config, params, padded)[0, : len(tokens), : OURS.vocab_size]
    return np.asarray(jax.nn.log_softmax(logits_TV.astype(jnp.float32)))


@pytest.mark.parametrize("length", [1, 16, 40])
def test_rolling_windows_are_those_of_a_slow_reference(length):
    from lm_eval.api.instance import Instance

    from safelm.evaluate.capability.lm_eval_model import SafeLM

    config = model.ModelConfig(**tiny_runs.model_fields(max_seq_len=16, init_std=0.4))
    params = model.init(config, jax.random.key(0))
    text = OURS.decode(OURS.encode("the dog did not, " * 40)[:length])
    tokens = OURS.encode(text)
    whole, nats = [OURS.eos_id, *tokens], 0.0
    for start in range(0, len(tokens), 16):  # a window predicts what is new, with all the context that fits
        stop = min(start + 16, len(tokens))
        first = max(0, stop - 16)
        log_probs_TV = log_probs_of_next(config, params, whole[first:stop])
        nats += sum(log_probs_TV[t - first, whole[t + 1]] for t in range(start, stop))
    harness = SafeLM(config, params, OURS)
    instance = Instance("loglikelihood_rolling", {}, (text,), 0)
    assert harness.loglikelihood_rolling([instance]) == pytest.approx([nats], rel=1e-4)
    ((logprob, _),) = harness.loglikelihood([Instance("loglikelihood", {}, ("", OURS.decode(tokens[:3])), 0)])
    log_probs_TV = log_probs_of_next(config, params, whole[:3])
    wanted = sum(log_probs_TV[t, whole[t + 1]] for t in range(min(3, len(tokens))))
    assert logprob == pytest.approx(wanted, rel=1e-4)


def test_a_score_is_of_the_callers_tokens_behind_the_beginning():
    served = dataclasses.replace(tiny_model(), tokenizer=OURS)
    with running({"tiny": served}, {"tiny": lambda: FakeEngine(Script())}) as server:
        reply = ask(server, "POST", "/v1/safelm/score", {"input": "the cat"}).json
    ids = PLAIN.encode("the cat")
    (want,) = inference.tag_probability(
        served.config, served.params, [[PLAIN.eos_id, *ids]], harm_tag_id=PLAIN.harm_tag_id
    )
    assert [token["id"] for token in reply["tokens"]] == ids
    assert [token["tag_prob"] for token in reply["tokens"]] == pytest.approx(want.tolist()[1:], rel=1e-4)


def test_the_harness_and_embeddings_give_the_beginning_too():
    from safelm.safety.embedding.chunking import of_decoder

    (chunk,) = (ids.tolist() for _, ids in of_decoder(OURS).chunks(["the cat"], 16))
    assert chunk == text_prompt(OURS, "the cat")
    from safelm.evaluate.capability.lm_eval_model import SafeLM

    config = model.ModelConfig(**tiny_runs.model_fields())
    harness = SafeLM(config, {}, OURS)
    assert harness.prefix_token_id == OURS.eos_id
    assert harness.tok_encode("the cat") == text_prompt(OURS, "the cat")
    assert harness.tok_encode(harness.apply_chat_template(MESSAGES)) == chat_prompt(OURS, MESSAGES)
