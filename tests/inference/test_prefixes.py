"""Prompts read in chunks and from kept rows give what reading them whole gives; nothing is compiled after the start."""

import dataclasses
import threading

import jax
import numpy as np
import pytest
from engine_runs import assert_same, make_engine, random_request, run_alone, told
from random_decoders import CONFIG, EOS, TAG, VOCAB, random_model

from safelm.inference import Beam, EngineRequest, Greedy, SafeBeam, Sampling, catalog, kv_cache, prefixes, reading
from safelm.inference.prefixes import Prefixes

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True, scope="module")
def short_rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "SHORTEST_CACHE", 12)
        patch.setattr(prefixes, "SHORTEST_SHARED", 3)
        patch.setattr(reading, "SMALLEST_CHUNK", 4)
        yield


@pytest.fixture(scope="module")
def params():
    return random_model(7, eos_bias=1.2, tag_bias=1.5)


def related_request(rng):
    """One of few beginnings, or none of them."""
    shared = [(5, 6, 7, 8, 9, 10), (5, 6, 7, 3, 3, 3, 3), ()][rng.integers(3)]
    request = random_request(rng, method=[Greedy(), Sampling(), SafeBeam(2, 3, 0.3)][rng.integers(3)])
    return dataclasses.replace(request, prompt=(*shared[: rng.integers(0, 8)], *request.prompt[:8]))


def test_chunks_and_kept_rows_change_no_result(params):
    """Random requests, some of which go on from others' texts, while others run, end and are cancelled."""
    rng, alone = np.random.default_rng(5), make_engine(params)
    engine = make_engine(params, read_at_once=8, read_between=8, prefix_tokens=72)
    requests, updates, cancelled, left = {}, {}, set(), 32
    while left or not engine.is_idle:
        for _ in range(min(left, rng.integers(0, 4))):
            request = related_request(rng)
            over = [id_ for id_, news in updates.items() if news[-1].finished not in ("", "cancelled")]
            if over and rng.random() < 0.4:
                before = requests[(number := int(rng.choice(over)))]
                said = [token for update in updates[number] for token in update.tokens if token != TAG]
                request = dataclasses.replace(request, prompt=(*before.prompt, *said, 4)[: rng.integers(1, 15)])
            requests[engine.submit(request)] = request
            left -= 1
        if requests and rng.random() < 0.1:
            cancelled.add(int(rng.choice(list(requests))))
            engine.cancel(max(cancelled))
        for update in engine.step():
            updates.setdefault(update.request_id, []).append(update)
        assert engine.prefixes.num_tokens <= 72
    for number, request in requests.items():
        got, want = told(updates[number]), run_alone(alone, request)
        if got[2] == "cancelled":
            assert got[0] == want[0][: len(got[0])]
        else:
            assert_same(got, want)
    assert 5 < engine.prefixes.num_found < engine.prefixes.num_asked <= 32
    assert alone.prefixes.num_found == alone.prefixes.num_tokens == 0


def test_a_long_prompt_is_read_while_others_go_on(params):
    engine = make_engine(params, read_at_once=4, read_between=4)
    first = engine.submit(EngineRequest((3, 4), Greedy(), 12, (VOCAB - 2,)))
    assert [(update.request_id, len(update.tokens)) for update in engine.step()] == [(first, 1)]
    engine.submit(EngineRequest((5,) * 15, Greedy(), 4, (VOCAB - 2,)))
    news = [{update.request_id: len(update.tokens) for update in engine.step()} for _ in range(4)]
    assert news[:3] == [{first: 1}] * 3, "a step between two of its four parts"
    assert news[3] == {first: 1, first + 1: 1}


def test_beams_tell_what_all_of_them_begin_with(params):
    """The same text in the end; some of it comes before."""
    rng, engine, early = np.random.default_rng(3), make_engine(params, steps_per_call=1), 0
    for _ in range(8):
        method = SafeBeam(2, 3) if rng.random() < 0.7 else Beam(3, length_penalty=0.5)
        request = dataclasses.replace(random_request(rng, method=method), max_new_tokens=9)
        engine.submit(request)
        updates = []
        while not engine.is_idle:
            updates += engine.step()
        assert_same(told(updates), run_alone(engine, dataclasses.replace(request, want_trace=True)))
        early += sum(len(update.tokens) for update in updates[:-1])
    assert early > 12


@pytest.mark.slow
def test_nobody_waits_for_the_compiler_after_compiling_ahead(params):
    here = []

    def note(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration" and threading.current_thread() is main:
            here.append(str(fun_name))

    main, rng = threading.current_thread(), np.random.default_rng(1)
    sizes = {"slots": 8, "steps_per_call": 2, "read_at_once": 8, "read_between": 8, "prefix_tokens": 48}
    engine = make_engine(params, compiles_aside=True, **sizes)
    assert sum(1 for _ in engine.compile_ahead([Greedy()], longest=CONFIG.max_seq_len)) > 20
    run_alone(engine, EngineRequest((1,), Greedy(), 2, (EOS,)))  # what is not of the engine, such as constants
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        left = 20
        while left or not engine.is_idle:
            for _ in range(min(left, rng.integers(0, 4))):
                engine.submit(dataclasses.replace(related_request(rng), method=Sampling()))
                left -= 1
            engine.step()
            if left % 5 == 0:
                engine._compiler.wait()  # so that tighter programs take over
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
        engine._compiler.wait()
    ours = ("run", "start", "place", "read_chunk", "resize", "extend", "put_behind", "take_slot")
    assert not [name for name in here if any(own in name for own in ours)]
    assert engine.prefixes.num_found > 0


def test_rows_are_kept_by_use_within_their_room():
    rng, kept, shortest = np.random.default_rng(0), Prefixes(4 * 12), prefixes.SHORTEST_SHARED
    pinned = kv_cache.empty_cache(CONFIG, 1, 12)
    kept.pin((9, 9, 9, 9), pinned)
    for _ in range(150):
        ids = rng.integers(0, 2, size=rng.integers(1, 9)).tolist()
        found = kept.longest(ids)
        kept.count(found)
        if found is not None:
            assert shortest <= found.length < len(ids)
        if kept.wants(ids, 12):
            assert len(ids) >= shortest
            kept.add(ids, kv_cache.empty_cache(CONFIG, 1, 12))
            longest = kept.longest([*ids, 5])
            assert longest.length == len(ids), "what was just kept is found, whole"
            assert not kept.wants(ids, 12)
        assert kept.num_tokens <= 48
    assert kept.longest((9, 9, 9, 9, 1)).cache is pinned and kept.longest((9, 9, 9, 1)) is None
    kept.unpin((9, 9, 9, 9))
    assert kept.longest((9, 9, 9, 9, 1)) is None and not Prefixes(0).wants([1] * 40, 12)
