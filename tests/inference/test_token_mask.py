"""Token masks and kept prefixes: a request's result is that of plain forwards, whoever shares its batch."""

import dataclasses
import json

import numpy as np
import pytest
import random_decoders
from random_decoders import CONFIG, EOS, TAG, VOCAB, full_model, random_model

from safelm.inference import Beam, Engine, EngineRequest, Greedy, SafeBeam, Sampling, TagPenalty, programs, run_all
from safelm.inference import token_mask as masks
from safelm.inference.grammar import GrammarVocabulary
from safelm.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")
FORCED = (7, 8, 9, 11, 3)


class Script:
    """A mask by a list: at every place the ids that may stand there (None: any); then the end."""

    def __init__(self, places, *, tells_forced=True, words=None):
        self._left, self._tells_forced = list(places), tells_forced
        self._num_words = words or masks.num_words(CONFIG)

    def consume(self, tokens):
        for token in tokens:
            place = self._left.pop(0) if self._left else {EOS}
            if place is not None and token not in place:
                raise ValueError(f"script: {token} can't stand here")

    def forced(self):
        found = []
        for place in self._left if self._tells_forced else []:
            if place is None or len(place) > 1:
                break
            found += place
        return found

    def allowed(self):
        place = self._left[0] if self._left else {EOS}
        return None if place is None else masks.only(sorted(place), self._num_words)


def places(seed):
    rng = np.random.default_rng(seed)

    def some(count):
        return set(rng.choice(np.arange(1, TAG), count, replace=False).tolist())

    return [some(5), *({token} for token in FORCED), None, some(3), {12}, {13}, some(4)]


def masked(seed, **changes):
    request = EngineRequest((5, 6 + seed), Greedy(), 14, (EOS,), mask=lambda: Script(places(seed)))
    return dataclasses.replace(request, **changes)


@pytest.fixture(scope="module")
def params():
    return random_model(7, eos_bias=1.2, tag_bias=1.5)


def make_engine(params, **settings):
    return Engine(CONFIG, params, **({"harm_tag_id": TAG, "slots": 4, "steps_per_call": 3} | settings))


def by_hand(params, request):
    """Tokens, log-prob and P(tag) of each: whole forwards, and at every place the likeliest of what may stand there."""
    language_model, mask, tokens, log_prob, tag_probs = full_model(params), request.mask(), [], 0.0, []
    while len(tokens) < request.max_new_tokens and (not tokens or tokens[-1] != EOS):
        log_probs_V = language_model([*request.prompt, *tokens])
        allowed_X = mask.allowed()
        bits = np.unpackbits(
            (masks.all_ids(CONFIG, 1)[0] if allowed_X is None else allowed_X).view(np.uint8), bitorder="little"
        )
        may = [token for token in np.flatnonzero(bits).tolist() if token < VOCAB and token != TAG]
        tokens.append(max(may, key=lambda token: (log_probs_V[token], -token)))
        mask.consume(tokens[-1:])
        log_prob += log_probs_V[tokens[-1]]
        tag_probs.append(
            np.exp(
                language_model([*request.prompt, *tokens][: len(request.prompt) + len(tokens) - (tokens[-1] == EOS)])[
                    TAG
                ]
            )
        )
    return tokens, log_prob, tag_probs


def assert_by_hand(params, request, found):
    tokens, log_prob, tag_probs = by_hand(params, request)
    assert found.tokens == tokens and found.stopped_by == ("eos" if tokens[-1] == EOS else "length")
    assert found.logprob == pytest.approx(log_prob, abs=1e-4)
    np.testing.assert_allclose(found.tag_probs, tag_probs, atol=1e-5)


def test_masks_hold_beside_requests_without_and_change_nothing_of_those(params):
    free = [
        EngineRequest((3, 4), Greedy(), 9, (EOS,)),
        EngineRequest((2,), Sampling(1.3), 8, (EOS,), seed=5),
        EngineRequest((9, 8, 7), SafeBeam(2, 3), 6, (EOS,)),
    ]
    held = [masked(0), masked(1, max_new_tokens=4), masked(2, mask=lambda: Script(places(2), tells_forced=False))]
    found = run_all(make_engine(params), [*free, *held])
    for alone, got in zip(run_all(make_engine(params), free), found, strict=False):
        assert got.tokens == alone.tokens and got.logprob == pytest.approx(alone.logprob, abs=1e-4)
    for request, got in zip(held, found[3:], strict=True):
        assert_by_hand(params, request, got)
    assert [got.stopped_by for got in found[3:]] == ["eos", "length", "eos"]


@pytest.mark.parametrize("limit", [3, 5, 6, 7, 14])
def test_forced_tokens_may_be_cut_by_the_limit(limit, params):
    request = masked(3, max_new_tokens=limit)
    assert_by_hand(params, request, run_all(make_engine(params), [request])[0])


def test_draws_stay_within_the_mask(params):
    request = masked(4, method=Sampling(2.0))
    for seed in range(5):
        (found,) = run_all(make_engine(params), [dataclasses.replace(request, seed=seed)])
        Script(places(4)).consume(found.tokens)  # raises where it can't be
        assert found.tokens[1:6] == list(FORCED)


def test_forced_tokens_take_one_forward_and_no_mask_compiles_anything(params, monkeypatch):
    engine = make_engine(params)
    scripts = [[place or set(range(1, TAG)) for place in places(seed)] for seed in (0, 5)]  # that don't end before
    requests = [masked(5, mask=lambda script=script: Script(script)) for script in scripts]
    run_all(engine, requests[:1])
    ran, compiled = [], (programs.run, programs.jump, programs.place)
    sizes = [program._cache_size() for program in compiled]
    monkeypatch.setattr(programs, "jump", lambda *args: ran.append(args[-1].tolist()) or compiled[1](*args))
    (found,) = run_all(engine, requests[1:])
    assert ran == [[1 + len(FORCED)], [3]] and len(found.tokens) == len(scripts[1]) + 1
    assert [program._cache_size() for program in compiled] == sizes


@pytest.mark.slow
def test_programs_of_jumps_are_compiled_aside(params):
    engine = make_engine(params, compiles_aside=True)
    for _ in range(3):
        engine.submit(masked(0))
        updates = []
        while not engine.is_idle:
            engine._compiler.wait()
            updates += engine.step()
        assert [token for update in updates for token in update.tokens] == by_hand(params, masked(0))[0]


@pytest.mark.parametrize("method", [Beam(2), SafeBeam(2, 3), TagPenalty()], ids=lambda method: type(method).__name__)
def test_a_method_that_tries_several_tokens_takes_no_mask(method, params):
    message = f"a token mask goes with Greedy or Sampling, not with {type(method).__name__}"
    with pytest.raises(ValueError, match=message):
        make_engine(params).submit(masked(0, method=method))


def _raises():
    raise ValueError("no such form")


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (_raises, "no such form"),
        (lambda: Script([{4, 5}, {TAG}]), "it allows no token of the vocabulary"),
        (lambda: Script([{4, 5}, {6, 7}], words=9), "9 words, the vocabulary takes"),
    ],
)
def test_a_mask_that_fails_ends_its_request_alone(mask, error, params):
    engine, free = make_engine(params), EngineRequest((3, 4), Greedy(), 9, (EOS,))
    (alone,) = run_all(make_engine(params), [free])
    bad, good = engine.submit(masked(0, mask=mask)), engine.submit(free)
    updates = []
    while not engine.is_idle:
        updates += engine.step()
    (failed,) = [update for update in updates if update.request_id == bad and update.finished]
    assert failed.finished == "error" and error in failed.error
    assert [token for update in updates if update.request_id == good for token in update.tokens] == alone.tokens


def test_a_mask_that_fails_at_once_is_told_however_soon_its_text_ends(params):
    engine, one = make_engine(params), masked(0, mask=_raises, max_new_tokens=1)
    (free,) = run_all(engine, [dataclasses.replace(one, mask=None)])
    for request in (one, dataclasses.replace(one, max_new_tokens=9, end_ids=tuple(free.tokens))):
        engine.submit(request)
        updates = [update for _ in range(3) for update in engine.step()]
        assert [(update.finished, update.error) for update in updates] == [("error", "no such form")]
        assert engine.is_idle


def test_watched_log_probs_are_of_the_first_token_before_any_mask(params):
    watched = (4, 0, TAG)
    requests = [masked(0, watch_ids=watched), EngineRequest((3,), SafeBeam(2, 3), 3, (EOS,), watch_ids=watched[:1])]
    for request, found in zip(requests, run_all(make_engine(params), requests), strict=True):
        want = full_model(params)(list(request.prompt))[list(request.watch_ids)]
        np.testing.assert_allclose(found.watched, want, atol=1e-5)
    with pytest.raises(ValueError, match="watch_ids=50 is not in"):
        make_engine(params).submit(masked(0, watch_ids=(VOCAB,)))


# ---- kept prefixes


def test_a_kept_prefix_is_read_once_and_changes_no_result(params, monkeypatch):
    shared, longer = (5, 6, 7, 8, 9), (5, 6, 7, 8, 9, 10, 11)
    prompts = [(*shared, 3), (*longer, 4, 3), longer, (5, 6), (4, *shared)]
    requests = [EngineRequest(prompt, method, 6, (EOS,)) for prompt in prompts for method in (Greedy(), SafeBeam(2, 3))]
    want = run_all(make_engine(params), requests)
    read, read_chunk = [], programs.read_chunk

    def note(config, weights, chunk, *behind):
        for prompt in range(chunk.prompts_T.max() + 1):
            own = chunk.prompts_T == prompt
            read.append((int(behind[1]) if chunk.is_behind_T[own].any() else 0, int(own.sum())))
        return read_chunk(config, weights, chunk, *behind)

    monkeypatch.setattr(programs, "read_chunk", note)
    engine = make_engine(params)
    for prefix in (shared, longer, shared):
        engine.keep_prefix(prefix)
    assert read == [(0, 5), (5, 2)], "the longer one begins with the shorter"
    read.clear()
    for got, expected in zip(run_all(engine, requests), want, strict=True):
        assert got.tokens == expected.tokens and got.logprob == pytest.approx(expected.logprob, abs=1e-4)
        np.testing.assert_allclose(got.tag_probs, expected.tag_probs, atol=1e-5, rtol=1e-3)
    assert sorted(read) == sorted(2 * [(5, 1), (7, 2), (5, 2), (0, 2), (0, 6)])
    engine.drop_prefix(longer)
    read.clear()
    run_all(engine, requests[2:3])
    assert read == [(5, 4)]


@pytest.mark.parametrize(
    ("prefix", "message"),
    [((), "prefix: it has no token"), ((VOCAB,), "prefix: id 50"), ((1,) * 23, "prefix: its 23 tokens .* of 24")],
)
def test_what_can_be_no_prefix_is_refused(prefix, message, params):
    with pytest.raises(ValueError, match=message):
        make_engine(params).keep_prefix(prefix)


# ---- grammars


def test_answers_hold_to_a_schema_whatever_the_model_would_say():
    tokenizer = Tokenizer.train(['{"name": "abc", "count": 12, "kind": "odd"} even odd'] * 3, 400)
    config, params = random_decoders.wild_model(tokenizer.vocab_size, max_seq_len=256)
    end_ids = tokenizer.conventions.end_ids
    vocabulary = GrammarVocabulary(tokenizer, vocab_size=config.padded_vocab_size, end_ids=end_ids)
    properties = {"kind": {"enum": ["odd", "even"]}, "count": {"type": "integer", "minimum": 10, "maximum": 99}}
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    grammar = vocabulary.json_schema({**schema, "x-guidance": {"whitespace_flexible": False}})
    engine = Engine(config, params, harm_tag_id=tokenizer.harm_tag_id, slots=4)
    requests = [
        EngineRequest(tuple(tokenizer.encode(text)), method, 60, end_ids, mask=grammar.start)
        for text in ("odd", "12 even")
        for method in (Greedy(), Sampling(2.0))
    ]
    for found in run_all(engine, requests):
        answer = json.loads(tokenizer.decode(found.text_tokens))
        assert found.stopped_by == "eos" and list(answer) == ["kind", "count"]
        assert answer["kind"] in ("odd", "even") and 10 <= answer["count"] <= 99
    assert (
        tokenizer.decode(
            run_all(engine, [dataclasses.replace(requests[0], mask=vocabulary.regex("a{3}").start)])[0].text_tokens
        )
        == "aaa"
    )
    for make in (lambda: vocabulary.regex("(a"), lambda: vocabulary.json_schema({"type": "nonsense"})):
        with pytest.raises(ValueError, match=r"^grammar: "):
            make()
    with pytest.raises(ValueError, match=r"^grammar: "):
        vocabulary.regex("a+").start(tokenizer.encode("b"))
