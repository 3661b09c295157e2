"""Decoding against full forwards: greedy, beams, ragged batches, sampling's distribution, errors, the command."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safe_beam_reference as reference
from random_decoders import CONFIG, EOS, TAG, VOCAB, full_model, random_model, random_prompts

from safelm import generate, inference
from safelm.checkpoints import checkpoint
from safelm.formats import huggingface
from safelm.inference import Beam, Greedy, SafeBeam, Sampling, TagPenalty
from safelm.inference.asked import ask
from safelm.inference.prompts import batches
from safelm.inference.truncation import filtered
from safelm.models import decoder as model
from safelm.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")
NEW_TOKENS = 7
PROMPTS = random_prompts(11, 8)


@functools.cache
def params():
    return random_model(7, eos_bias=1.5, tag_bias=1.5)


def decode(prompts, method, *, seed=0, max_new_tokens=NEW_TOKENS, **settings):
    return inference.generate(
        CONFIG,
        params(),
        prompts,
        method,
        max_new_tokens=max_new_tokens,
        end_ids=[EOS],
        harm_tag_id=TAG,
        seed=seed,
        **settings,
    )


def test_greedy_is_the_argmax_of_the_full_forward():
    generations = decode(PROMPTS, Greedy())
    for prompt, got in zip(PROMPTS, generations, strict=True):
        want = reference.greedy(full_model(params()), prompt, eos_id=EOS, masked={TAG}, max_new_tokens=NEW_TOKENS)
        assert got.tokens == want
    assert {g.stopped_by for g in generations} == {"eos", "length"}


def test_the_tag_can_be_masked_allowed_or_stop_greedy_decoding():
    language_model, ends = full_model(params()), {}
    for tag_candidate in ("mask", "allow", "stop"):
        generations = decode(PROMPTS, Greedy(tag_candidate=tag_candidate))
        ends[tag_candidate] = {g.stopped_by for g in generations}
        if tag_candidate == "allow":
            for prompt, got in zip(PROMPTS, generations, strict=True):
                want = reference.greedy(language_model, prompt, eos_id=EOS, masked=set(), max_new_tokens=NEW_TOKENS)
                assert got.tokens == want
            assert any(TAG in g.tokens for g in generations)
    assert "tag" not in ends["mask"] | ends["allow"]
    assert "tag" in ends["stop"]


@pytest.mark.parametrize("method", [Beam(num_beams=3), Beam(num_beams=4, length_penalty=1.0)], ids=str)
def test_beam_equals_the_slow_reference(method):
    for prompt, got in zip(PROMPTS, decode(PROMPTS, method), strict=True):
        want = reference.beam_search(
            full_model(params()),
            prompt,
            num_beams=method.num_beams,
            length_penalty=method.length_penalty,
            eos_id=EOS,
            masked={TAG},
            max_new_tokens=NEW_TOKENS,
        )
        assert (got.tokens, got.stopped_by) == (want.new, want.stopped_by)
        assert got.logprob == pytest.approx(want.log_prob, abs=1e-4)


@pytest.mark.parametrize("method", [Sampling(), SafeBeam()], ids=str)
def test_a_ragged_batch_equals_one_by_one(method):
    together = decode(PROMPTS, method, batch_size=8)
    in_parts = decode(PROMPTS, method, batch_size=1)
    assert [g.tokens for g in together] == [g.tokens for g in in_parts]
    np.testing.assert_allclose([g.logprob for g in together], [g.logprob for g in in_parts], atol=1e-4)


def test_log_prob_and_trace_are_the_models_own():
    method = Sampling(temperature=0.7, top_k=20)
    for prompt, got in zip(PROMPTS, decode(PROMPTS, method), strict=True):
        language_model, log_prob = full_model(params()), 0.0
        for index, token in enumerate(got.tokens):
            log_prob += language_model(prompt + got.tokens[:index])[token]
            end = index if token == EOS else index + 1
            want = np.exp(language_model(prompt + got.tokens[:end])[TAG])
            assert got.tag_probs[index] == pytest.approx(want, abs=1e-5)
        assert got.logprob == pytest.approx(log_prob, abs=1e-4)


def test_sampling_follows_the_seed():
    assert decode(PROMPTS, Sampling(), seed=1) == decode(PROMPTS, Sampling(), seed=1)
    assert decode(PROMPTS, Sampling(), seed=1) != decode(PROMPTS, Sampling(), seed=2)
    same_prompt = decode([PROMPTS[0]] * 8, Sampling())
    assert len({tuple(g.tokens) for g in same_prompt}) > 4, "prompts must draw independently"


def chi_square(tokens, probs):
    counts = np.bincount(tokens, minlength=len(probs))
    expected = len(tokens) * probs
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 5], expected[expected > 5]
    return float(((counts - expected) ** 2 / expected).sum()), len(expected)


def test_sampling_draws_from_the_tempered_distribution():
    prompt, temperature = PROMPTS[0], 1.3
    log_probs = full_model(params())(prompt)
    log_probs[TAG] = -np.inf
    probs = np.exp(log_probs / temperature)
    draws = decode([prompt] * 1024, Sampling(temperature=temperature), max_new_tokens=1, batch_size=1024)
    statistic, cells = chi_square([g.tokens[0] for g in draws], probs / probs.sum())
    assert statistic < cells + 4 * np.sqrt(2 * cells)


def test_top_k_keeps_the_k_likeliest_and_top_p_the_smallest_set_that_reaches_it():
    log_probs = jnp.log(jnp.array([[0.1, 0.4, 0.25, 0.05, 0.2], [0.2, 0.2, 0.2, 0.2, 0.2]]))

    def cut(*, top_k, top_p):
        each = [jnp.full(2, value) for value in (top_k, top_p, True)]
        return filtered(log_probs, top_k_P=each[0], top_p_P=each[1], is_used_P=each[2])

    def kept(**settings):
        return [np.flatnonzero(np.isfinite(row)).tolist() for row in cut(**settings)]

    assert kept(top_k=0, top_p=1.0) == [[0, 1, 2, 3, 4]] * 2
    assert kept(top_k=2, top_p=1.0) == [[1, 2], [0, 1]]
    assert kept(top_k=0, top_p=0.6) == [[1, 2], [0, 1, 2]]
    assert kept(top_k=0, top_p=0.7) == [[1, 2, 4], [0, 1, 2, 3]]
    assert kept(top_k=2, top_p=0.6) == [[1], [0, 1]]  # 0.4 / 0.65 reaches 0.6 alone
    assert kept(top_k=9, top_p=1e-9) == [[1], [0]]
    np.testing.assert_array_equal(cut(top_k=2, top_p=1.0)[0, 1:3], log_probs[0, 1:3])


def test_without_penalty_it_is_sampling():
    penalised = decode(PROMPTS, TagPenalty(penalty=0.0), seed=3)
    assert [g.tokens for g in penalised] == [g.tokens for g in decode(PROMPTS, Sampling(), seed=3)]


def test_the_penalty_with_all_candidates_draws_from_the_penalised_distribution():
    prompt, penalty, threshold = PROMPTS[1], 1.5, 0.03
    language_model = full_model(params())
    log_probs = language_model(prompt).copy()
    tag_prob = np.array([np.exp(language_model([*prompt, token])[TAG]) for token in range(VOCAB)])
    tag_prob[EOS] = np.exp(log_probs[TAG])
    assert 5 < (tag_prob > threshold).sum() < 45
    log_probs -= penalty * (tag_prob > threshold)
    log_probs[TAG] = -np.inf
    probs = np.exp(log_probs)
    method = TagPenalty(num_candidates=VOCAB, penalty=penalty, threshold=threshold)
    draws = decode([prompt] * 512, method, max_new_tokens=1, batch_size=512)
    statistic, cells = chi_square([g.tokens[0] for g in draws], probs / probs.sum())
    assert statistic < cells + 4 * np.sqrt(2 * cells)


def test_padded_ids_and_a_masked_tag_are_never_chosen():
    log_probs = jnp.zeros((1, CONFIG.padded_vocab_size))
    choosable = ask([(1, 1, (EOS,), Greedy(), 0)], harm_tag_id=TAG).choosable(CONFIG, log_probs)
    assert np.flatnonzero(np.isfinite(choosable[0])).tolist() == [*range(TAG)]
    wide = decode(PROMPTS, Sampling(temperature=100.0), max_new_tokens=NEW_TOKENS)
    assert max(max(g.tokens) for g in wide) < TAG


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt 1: it has no token"):
        decode([[EOS], []], Greedy())


def test_any_of_several_ids_ends_a_text():
    (alone,) = decode([PROMPTS[0]], Greedy())
    second = alone.tokens[1]
    (got,) = inference.generate(
        CONFIG, params(), [PROMPTS[0]], Greedy(), max_new_tokens=NEW_TOKENS, end_ids=[EOS, second], harm_tag_id=TAG
    )
    assert got.tokens == alone.tokens[: alone.tokens.index(second) + 1] and got.stopped_by == "eos"


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 5e-39, 1e-45, 1e-300])
def test_the_coldest_draws_are_the_likeliest_tokens(temperature):
    drawn = decode(PROMPTS[:2], Sampling(temperature=temperature))
    assert [each.tokens for each in drawn] == [each.tokens for each in decode(PROMPTS[:2], Greedy())]


def test_a_vocabulary_without_the_tag_decodes_without_a_trace():
    (got,) = inference.generate(
        CONFIG, params(), [[5]], Greedy(), max_new_tokens=NEW_TOKENS, end_ids=[EOS], harm_tag_id=None
    )
    assert got.tag_probs == []


def test_tag_probability_is_the_full_forwards():
    token_lists = [[3], [], list(range(1, 20)), [7, 7]]
    probs = inference.tag_probability(CONFIG, params(), token_lists, harm_tag_id=TAG)
    assert [len(p) for p in probs] == [1, 0, 19, 2]
    for tokens, got in zip(token_lists, probs, strict=True):
        want = [np.exp(full_model(params())(tokens[: end + 1])[TAG]) for end in range(len(tokens))]
        np.testing.assert_allclose(got, want, atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="token list 0: 25 tokens, the model's context is 24"):
        inference.tag_probability(CONFIG, params(), [[1] * 25], harm_tag_id=TAG)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], [2] * 20], {}, "prompt 1: its 20 tokens and max_new_tokens=7 make 27, more than the .* context of 24"),
        ([[1]], {"max_new_tokens": 24}, "its 1 tokens and max_new_tokens=24 make 25"),
        ([[VOCAB]], {}, "prompt 0: id 50 is not in the model's vocabulary of 50"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ([[1]], {"batch_size": 0}, "batch_size=0: must be at least 1"),
    ],
)
def test_bad_prompts_are_refused(prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        decode(prompts, Greedy(), **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampling(temperature=0.0), "temperature=0.0, want a number above 0"),
        (lambda: Sampling(top_p=0.0), r"top_p=0.0, want in \(0, 1\]"),
        (lambda: Sampling(top_k=-1), "top_k=-1"),
        (lambda: Beam(length_penalty=-1.0), "length_penalty=-1.0"),
        (lambda: TagPenalty(penalty=float("inf")), "penalty=inf, want a finite number"),
        (lambda: Greedy(tag_candidate="keep"), "tag_candidate='keep'"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_batches_hold_every_prompt_once_in_few_shapes():
    rows = [[1] * (1 + (index * 7) % 90) for index in range(101)]
    found = list(batches(rows, max_rows=16, max_len=100))
    assert sorted(index for batch in found for index in batch.indices) == list(range(101))
    assert {batch.tokens_PT.shape[1] for batch in found} == {16, 32, 64, 100}
    for batch in found:
        assert batch.lengths_P[: len(batch.indices)].tolist() == [len(rows[index]) for index in batch.indices]
        assert not batch.lengths_P[len(batch.indices) :].any()


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory):
    tokenizer = Tokenizer.train(["the quick brown fox jumps over the lazy dog"] * 4, vocab_size=300)
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    folder = str(tmp_path_factory.mktemp("model"))
    checkpoint.save_params(folder, config, model.init(config, jax.random.key(0)), tokenizer)
    return folder


def run_command(*flags):
    generate.cli.run(generate.main, generate.arguments(), flags)


def test_the_command_prints_the_text_and_all_about_it(checkpoint_folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the fox", "id": "a"}\n\n{"prompt": "", "id": "b"}\n')
    flags = [f"--checkpoint={checkpoint_folder}", "--max_new_tokens=4", "--num_beams=2", "--method=safe_beam"]
    run_command(*flags, f"--prompts_file={prompts}", "--json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["id"] for row in rows] == ["a", "b"]
    for row in rows:
        assert 1 <= len(row["tokens"]) == len(row["tag_probs"]) <= 4
        assert row["logprob"] < 0 and row["stopped_by"] in ("eos", "length")
    prompts.write_bytes(b"\xef\xbb\xbf" + '{"prompt": "a\u2028b"}\r\n{"prompt": "{}"}'.encode())
    assert generate.read_prompts(str(prompts)) == [{"prompt": "a\u2028b"}, {"prompt": "{}"}]
    run_command(*flags, "--prompt=the fox")
    assert capsys.readouterr().out == rows[0]["text"] + "\n"


def test_the_command_takes_a_hugging_face_folder(checkpoint_folder, tmp_path, capsys):
    huggingface.write_folder(tmp_path / "exported", *checkpoint.load_for_inference(checkpoint_folder))
    for folder in (checkpoint_folder, tmp_path / "exported"):
        run_command(f"--checkpoint={folder}", "--prompt=the fox", "--max_new_tokens=4", "--json")
    ours, exported = map(json.loads, capsys.readouterr().out.splitlines())
    assert exported["tokens"] == ours["tokens"] and len(ours["tokens"]) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt=a", "--checkpoint=/nowhere/x"], "/nowhere/x: no such file or folder"),
        (["--prompt=a", "--temperature=2"], "--temperature=2.0: --method=greedy does not take it"),
        (["--prompt=a", "--method=beam", "--num_beams=0"], "num_beams=0, want at least 1"),
        (["--prompt=a", "--max_new_tokens=99"], "max_new_tokens=99 make"),
        (["--prompts_file=BAD"], "row 2: field 'prompt' is "),
        (["--prompts_file=NONE"], "NONE"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(flags, message, checkpoint_folder, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x"}\n{"text": "y"}\n')
    with pytest.raises(SystemExit) as stop:
        run_command(f"--checkpoint={checkpoint_folder}", *(flag.replace("BAD", str(bad)) for flag in flags))
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("python -m safelm.generate")]
    assert message in line
