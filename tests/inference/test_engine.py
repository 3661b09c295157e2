"""The engine: a request's result is its own, whatever comes before, beside or after it, and memory stays bounded."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safe_beam_reference as reference
from engine_runs import SLOTS, assert_same, make_engine, random_request, run_alone, told
from random_decoders import CONFIG, EOS, TAG, VOCAB, full_model, random_model

from safelm.inference import Beam, EngineRequest, Greedy, SafeBeam, Sampling, catalog, lookup
from safelm.inference import weights as weights_lib
from safelm.inference.adjustments import Adjustment
from safelm.models import sharding

pytestmark = pytest.mark.usefixtures("quick_compilation")
LONGEST = CONFIG.max_seq_len


@pytest.fixture
def short_caches(monkeypatch):
    """So that caches grow and shrink within the few tokens of these tests; others have one size, and fewer programs."""
    monkeypatch.setattr(catalog, "SHORTEST_CACHE", 6)


@pytest.fixture(scope="module")
def params():
    return random_model(7, eos_bias=1.2, tag_bias=1.5)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))])
def test_a_result_depends_on_no_neighbour_order_or_cancellation(seed, params, short_caches):
    rng = np.random.default_rng(seed)
    max_tokens = 3 * LONGEST
    engine, alone = make_engine(params, max_tokens=max_tokens), make_engine(params)
    requests, updates, cancelled, left = {}, {}, set(), 24
    while left or not engine.is_idle:
        for _ in range(min(left, rng.integers(0, 5))):
            request = random_request(rng)
            requests[engine.submit(request)] = request
            left -= 1
        if requests and rng.random() < 0.2:
            cancelled.add(int(rng.choice(list(requests))))
            engine.cancel(max(cancelled))
        for update in engine.step():
            updates.setdefault(update.request_id, []).append(update)
        rows = sum(getattr(r.method, "num_beams", 1) for r in requests.values())
        assert engine.tokens_reserved <= max_tokens and engine.num_active <= min(SLOTS, rows)
        assert engine.step() == [] if engine.is_idle else True
    assert set(updates) == set(requests)
    assert engine.tokens_reserved == engine.num_active == engine.num_waiting == 0
    for request_id, request in requests.items():
        tokens, _, finished, _ = told(updates[request_id])
        want = run_alone(alone, request)
        if finished == "cancelled":
            assert request_id in cancelled
            assert tokens == want[0][: len(tokens)]
        else:
            assert_same(told(updates[request_id]), want)


def test_it_is_the_slow_reference(params):
    rng, engine, language_model = np.random.default_rng(9), make_engine(params), full_model(params)
    requests = {}
    for index in range(16):
        method = SafeBeam(2, 3, tag_candidate="stop") if index % 2 else Greedy()
        request = random_request(rng, method=method, prompt=tuple(rng.integers(1, TAG, size=index).tolist() or [EOS]))
        request = dataclasses.replace(
            request, max_new_tokens=min(request.max_new_tokens, LONGEST - len(request.prompt))
        )
        requests[engine.submit(request)] = request
    updates = {}
    while not engine.is_idle:
        for update in engine.step():
            updates.setdefault(update.request_id, []).append(update)
    for request_id, request in requests.items():
        prompt, limit = list(request.prompt), {"max_new_tokens": request.max_new_tokens}
        got = told(updates[request_id])
        if isinstance(request.method, Greedy):
            assert list(got[0]) == reference.greedy(language_model, prompt, eos_id=EOS, masked={TAG}, **limit)
            continue
        want = reference.decode(language_model, prompt, request.method, eos_id=EOS, tag_id=TAG, **limit)
        assert_same(got, (tuple(want.new), want.trace, want.stopped_by, want.log_prob))


def test_greedy_tokens_come_as_they_are_made_and_a_freed_slot_is_taken_at_once(params):
    engine = make_engine(params, slots=1, steps_per_call=2)
    never = EngineRequest((3, 4), Greedy(), 8, end_ids=(VOCAB - 2,))
    first, second = engine.submit(never), engine.submit(dataclasses.replace(never, prompt=(5,), max_new_tokens=3))
    seen = []
    while not engine.is_idle:
        seen.append([(u.request_id, len(u.tokens), u.finished) for u in engine.step()])
    assert seen[:4] == [[(first, 2, "")]] * 3 + [[(first, 2, "length")]]
    assert seen[4:] == [[(second, 2, "")], [(second, 1, "length")]]


def test_a_cancelled_request_makes_room(params):
    engine = make_engine(params, slots=1)
    first, waiting, last = (engine.submit(EngineRequest((7,), Greedy(), 20, end_ids=(TAG - 1,))) for _ in range(3))
    engine.step()
    assert (engine.num_active, engine.num_waiting) == (1, 2)
    engine.cancel(first)
    engine.cancel(waiting)
    updates = engine.step()
    assert [(u.request_id, u.finished) for u in updates if u.finished] == [(first, "cancelled"), (waiting, "cancelled")]
    assert {u.request_id for u in updates if not u.finished} == {last}
    engine.cancel(last)
    engine.cancel(first)  # gone already: nothing
    engine.cancel(12345)
    assert [u.finished for u in engine.step()] == ["cancelled"]
    assert engine.is_idle and engine.step() == []


def test_looking_up_tokens_changes_no_text_and_saves_passes(params):
    """Greedy and drawn texts, ended by themselves or at the limit, and one that a bias makes repeat a token."""
    rng, results, calls = np.random.default_rng(3), {}, {}
    requests = [random_request(rng, method=method) for method in [Greedy(), Greedy("stop"), Sampling(0.7)] * 3]
    bias = Adjustment(logit_bias=((5, 100.0),))
    requests.append(EngineRequest((3, 4), Greedy(), 12, (VOCAB - 2,), adjustment=bias))
    for lookup_tokens in (0, 3):
        engine, updates = make_engine(params, steps_per_call=1, lookup_tokens=lookup_tokens), {}
        ids = [engine.submit(request) for request in requests]
        while not engine.is_idle:
            for update in engine.step():
                updates.setdefault(update.request_id, []).append(update)
        results[lookup_tokens] = [told(updates[request_id]) for request_id in ids]
        calls[lookup_tokens] = len(updates[ids[-1]])
    for plain, looked_up in zip(results[0], results[3], strict=True):
        assert_same(looked_up, plain)
    assert results[0][-1][0] == (5,) * 12
    assert calls[3] <= 8 < calls[0]
    with pytest.raises(ValueError, match="lookup_tokens=16"):
        make_engine(params, lookup_tokens=16)


def test_guesses_follow_the_last_place_of_the_last_tokens():
    texts = [[1, 2, 9, 5, 1, 2, 7, 1, 2, 0, 0], [9, 1, 2, 3, 8, 9, 1, 2, 4, 1, 9, 1, 2], [4] * 6]
    lengths, longest = jnp.array([9, 13, 6]), max(map(len, texts))
    found, has_guess = lookup.guesses(jnp.array([[*text, *[0] * (longest - len(text))] for text in texts]), lengths, 2)
    assert has_guess.tolist() == [False, True, True]  # two tokens are not enough
    assert found[1].tolist() == [4, 1] and found[2].tolist() == [4, 4]  # the last place with two behind it


@pytest.mark.parametrize("method", [SafeBeam(2, 3), pytest.param(SafeBeam(1, 4), marks=pytest.mark.slow)], ids=str)
def test_the_trace_tells_how_the_result_came_about(method, params):
    end_id = VOCAB - 2
    request = EngineRequest((5, 6), method, 9, (end_id,), want_trace=True)
    engine = make_engine(params)
    engine.submit(request)
    while not engine.is_idle:
        updates = engine.step()
    (update,) = updates
    beams = [()]
    for step in update.trace:
        tried = method.num_candidates
        assert len(step) == sum(1 if beam and beam[-1].token == end_id else tried for beam in beams)
        dropped = [c for c in step if c.outcome == "dropped"]
        assert len(dropped) == len(step) // 2
        lowest = min((c.tag_prob for c in dropped), default=1.0)
        assert lowest >= max(c.tag_prob for c in step if c.outcome != "dropped")
        kept = sorted((c for c in step if c.outcome == "kept"), key=lambda c: c.beam)
        outranked = [c.log_prob for c in step if c.outcome == "outranked"]
        assert [c.beam for c in kept] == list(range(len(kept)))
        assert [c.log_prob for c in kept] == sorted((c.log_prob for c in kept), reverse=True)
        assert not outranked or max(outranked) <= kept[-1].log_prob
        beams = [beams[c.parent] if c.token is None else (*beams[c.parent], c) for c in kept]
    assert tuple(c.token for c in beams[0]) == update.tokens
    assert beams[0][-1].log_prob == pytest.approx(update.log_prob)
    np.testing.assert_allclose([c.tag_prob for c in beams[0]], update.tag_probs, rtol=1e-5)
    assert any(c.outcome == "dropped" for step in update.trace for c in step)


def test_many_settings_share_a_program(params):
    from safelm.inference import programs

    engine = make_engine(params)
    run_alone(engine, EngineRequest((1,), Sampling(), 4, (EOS,)))
    run_alone(engine, EngineRequest((1,), SafeBeam(2, 3), 4, (EOS,)))
    before = programs.run._cache_size()
    for method in (Greedy(), Sampling(0.5, 3, 0.9, "stop"), SafeBeam(2, 3, 0.25, "stop"), SafeBeam(2, 3, 0.0)):
        run_alone(engine, EngineRequest((1,), method, 5, (3,), seed=4))
    assert programs.run._cache_size() == before


def test_new_programs_are_compiled_aside_while_requests_go_on(params, short_caches):
    compiled = []

    def note(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append((threading.current_thread() is threading.main_thread(), str(fun_name)))

    engine = make_engine(params, slots=8, steps_per_call=1, compiles_aside=True)
    first = EngineRequest((3, 4), Greedy(), 22, end_ids=(VOCAB - 2,))
    others = [EngineRequest((5,) * (1 + 7 * index), Beam(3), 4, end_ids=(VOCAB - 2,)) for index in range(2)]
    updates = {engine.submit(first): []}
    updates[0] += engine.step()  # nothing to wait for: compiles here
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        updates |= {engine.submit(other): [] for other in others}
        while not engine.is_idle:
            engine._compiler.wait()  # else the first request would be over before
            for update in engine.step():
                updates[update.request_id].append(update)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    aside = {name for is_main, name in compiled if not is_main}
    here = {name for is_main, name in compiled if is_main}
    ours = {"run", "place", "read_chunk", "resize", "extend", "put_behind", "take_slot"}
    assert {"run", "place"} <= {name for name in ours for said in aside if name in said}
    assert not {said for said in here for name in ours if name in said}, "nobody waits for the compiler"
    assert len(updates[0]) >= 20, "a token at every step"
    alone = make_engine(params, slots=8)
    for request, got in zip([first, *others], updates.values(), strict=True):
        assert_same(told(got), run_alone(alone, request))
    with pytest.raises(ValueError, match="compiles_aside=True: not with a mesh"):
        make_engine(params, compiles_aside=True, mesh=sharding.make_mesh({"data": 8}))


def test_a_broken_model_ends_requests_with_an_error():
    params = random_model(0)
    params["final_norm"]["scale"] = params["final_norm"]["scale"] * np.nan
    engine = make_engine(params)
    requests = [EngineRequest((1, 2), Greedy(), 16, (EOS + 5,)), EngineRequest((1,), Greedy(), 1, (EOS + 5,))]
    ids = [engine.submit(request) for request in requests]
    told = engine.step()  # of 16 tokens none is the last yet
    assert [update.request_id for update in told] == ids and engine.is_idle
    assert all(update.finished == "error" and "not numbers" in update.error for update in told)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": (1,) * 20, "max_new_tokens": 9}, "20 tokens and max_new_tokens=9 make 29, more than .* of 24"),
        ({"prompt": (1,) * 12}, "take 24 tokens of cache, the engine's has 20"),
        ({"prompt": (VOCAB,)}, "prompt: id 50 is not in the model's vocabulary of 50"),
        ({"prompt": (-1,)}, "prompt: id -1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ({"end_ids": (VOCAB,)}, "end_ids=50 is not in"),
        ({"method": Beam(5)}, "num_beams=5 is more than the engine's 4 slots"),
        ({"method": SafeBeam(2, 51)}, "num_candidates=51 is more than the vocabulary"),
    ],
)
def test_what_can_never_run_is_refused(changes, message, params, short_caches):
    engine = make_engine(params, max_tokens=20)
    with pytest.raises(ValueError, match=message):
        engine.submit(dataclasses.replace(EngineRequest((1,), Greedy(), 4, (EOS,)), **changes))
    assert engine.is_idle


def test_without_the_tag_there_is_no_trace_of_it(params):
    engine = make_engine(params, harm_tag_id=None)
    assert run_alone(engine, EngineRequest((4,), Greedy(tag_candidate="allow"), 3, (EOS,)))[1] == []
    with pytest.raises(ValueError, match="SafeBeam needs a model with the harm tag"):
        engine.submit(EngineRequest((4,), SafeBeam(2, 3), 3, (EOS,)))
    with pytest.raises(ValueError, match="slots=0: must be at least 1"):
        make_engine(params, slots=0)


def run_all(engine, requests):
    updates = {engine.submit(request): [] for request in requests}
    while not engine.is_idle:
        for update in engine.step():
            updates[update.request_id].append(update)
    return [told(each) for each in updates.values()]


REQUESTS = [
    EngineRequest(tuple(range(1, 2 + index)), SafeBeam(2, 3) if index % 2 else Greedy(), 8, (EOS,))
    for index in range(4)
]


def test_a_mesh_changes_no_token(params):
    engine = make_engine(params, mesh=sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    for got, want in zip(run_all(engine, REQUESTS), run_all(make_engine(params), REQUESTS), strict=True):
        assert_same(got, want)


def test_a_mesh_must_divide_the_model(params):
    with pytest.raises(ValueError, match=r"mesh.tensor=8 does not divide"):
        make_engine(params, mesh=sharding.make_mesh({"tensor": 8}))


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 2**-7), ("int8", 2**-5), ("int8_weight_only", 2**-5)])
def test_rounded_weights_give_nearly_the_same_products(dtype, error, params):
    config = dataclasses.replace(CONFIG, tie_embeddings=False)
    exact, rounded = (weights_lib.prepare(config, params, name) for name in ("float32", dtype))
    x = jax.random.normal(jax.random.key(1), (3, CONFIG.d_model))
    for kernel, other in (
        (exact.layers[1].gate, rounded.layers[1].gate),
        (exact.layers[0].query, rounded.layers[0].query),
    ):
        want, got = weights_lib.product(x, kernel), weights_lib.product(x, other)
        np.testing.assert_allclose(want, x @ kernel.values, atol=1e-4)
        assert 0 < np.abs(got - want).max() < error * np.abs(want).max()
        np.testing.assert_allclose(weights_lib.product(x[1], other), got[1], atol=1e-5)  # a row alone
        if dtype == "int8_weight_only":
            np.testing.assert_allclose(got, x @ (other.values * other.scales), atol=1e-3 * np.abs(want).max())
    tokens = jax.numpy.arange(5)
    np.testing.assert_allclose(
        weights_lib.look_up(rounded.embedding, tokens, "float32"), params["embedder"]["embedding"][:5], atol=0.01
    )
    assert rounded.layers[0].down.values.dtype == dtype.split("_")[0]
    with pytest.raises(ValueError, match="weights='int4': one of float32, bfloat16, int8, int8_weight_only"):
        make_engine(params, weights="int4")


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.slow
def test_rounded_weights_decode_like_exact_ones(weights, params):
    exact, rounded = (run_all(make_engine(params, weights=name), REQUESTS) for name in ("float32", weights))
    first_log_probs = [(a[3], b[3]) for a, b in zip(exact, rounded, strict=True) if a[0] == b[0]]
    assert len(first_log_probs) >= len(REQUESTS) // 2, "most results are the same tokens"
    for want, got in first_log_probs:
        assert got == pytest.approx(want, abs=0.5)
