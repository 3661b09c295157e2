"""The C++ kernels against slow references, and who computes products where they can't run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_builds import compiled
from random_decoders import TINY, UNTIED, random_params

from safelm.inference import Beam, Engine, EngineRequest, Greedy, SafeBeam, generate, placement, run_all
from safelm.inference import weights as weights_lib
from safelm.inference.adjustments import Adjustment
from safelm.models import cpu_kernels, sharding
from safelm.models.cpu_kernels import building, choosing
from safelm.models.cpu_kernels.products import MOST_INPUTS


@pytest.fixture
def nothing_known():
    """What was found and said before is forgotten, now and afterwards."""
    yield from _forgetting()


def _forgetting():
    caches = (building.find, building.register, choosing._tell)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def int8_reference(x_RK, values_KN, scales_N, num_terms):
    """In numpy: rows rounded to int8, products of whole numbers, then the scales."""
    scale_R1 = np.maximum(np.abs(x_RK).max(axis=1, keepdims=True), np.float32(1e-30)) / np.float32(127)
    first_RK = np.rint(x_RK / scale_R1)
    sums_RN = (first_RK.astype(np.int64) @ values_KN.astype(np.int64)).astype(np.float32)
    if num_terms == 2:
        rest_RK = np.rint((x_RK / scale_R1 - first_RK) * np.float32(254))
        sums_RN += (rest_RK.astype(np.int64) @ values_KN.astype(np.int64)).astype(np.float32) / np.float32(254)
    return sums_RN * (scale_R1 * scales_N)


def random_int8(rng, num_inputs, num_outputs):
    values_KN = rng.integers(-127, 128, (num_inputs, num_outputs), dtype=np.int8)
    return values_KN, rng.random(num_outputs, dtype=np.float32) / 100


SIZES = [(1, 576, 64), (2, 16, 1), (3, 7, 33), (4, 30, 96), (5, 64, 31), (8, 12, 40), (16, 100, 32), (31, 5, 70)]
SIZES += [(32, 48, 200), (130, 9, 35), (9, 128, 33), (16, 64, 96), (17, 64, 40), (45, 192, 64), (150, 64, 32)]


@pytest.mark.parametrize("num_terms", [1, 2])
@pytest.mark.parametrize(("num_rows", "num_inputs", "num_outputs"), SIZES)
def test_int8_products_are_those_of_whole_numbers_to_the_last_bit(
    vectors, num_terms, num_rows, num_inputs, num_outputs
):
    rng = np.random.default_rng(num_rows)
    values_KN, scales_N = random_int8(rng, num_inputs, num_outputs)
    values_KN[:, 0] = 127 * rng.choice([-1, 1], num_inputs)  # the largest sums
    x_RK = rng.standard_normal((num_rows, num_inputs), dtype=np.float32)
    x_RK[0] = np.sign(values_KN[:, 0])
    kernel = cpu_kernels.pack(values_KN, scales_N, num_terms=num_terms)
    (got,) = compiled(cpu_kernels.multiply)(x_RK, [kernel])
    np.testing.assert_array_equal(got, int8_reference(x_RK, values_KN, scales_N, num_terms))


@pytest.mark.parametrize(("num_rows", "num_inputs", "num_outputs"), SIZES)
def test_float32_products_are_near_those_in_float64_and_a_row_knows_no_other(
    vectors, num_rows, num_inputs, num_outputs
):
    rng = np.random.default_rng(num_rows)
    x_RK, values_KN = (
        rng.standard_normal(shape, dtype=np.float32) for shape in ((num_rows, num_inputs), (num_inputs, num_outputs))
    )
    kernel = cpu_kernels.pack(values_KN, None)
    multiply = compiled(cpu_kernels.multiply)
    (got,) = multiply(x_RK, [kernel])
    np.testing.assert_allclose(got, x_RK.astype(np.float64) @ values_KN, atol=1e-5 * num_inputs)
    np.testing.assert_array_equal(multiply(x_RK[-1:], [kernel])[0][0], got[-1])


@pytest.mark.parametrize(("num_rows", "num_inputs", "num_outputs"), SIZES)
def test_bfloat16_products_are_near_those_of_rounded_numbers_and_a_row_knows_no_other(
    vectors, num_rows, num_inputs, num_outputs
):
    rng = np.random.default_rng(num_rows)
    x_RK, values_KN = (
        rng.standard_normal(shape, dtype=np.float32) for shape in ((num_rows, num_inputs), (num_inputs, num_outputs))
    )
    x_RK[0, ::2] = 1 + np.float32(2) ** -8  # between two of bfloat16: the even one is 1
    kernel = cpu_kernels.pack(jnp.asarray(values_KN, jnp.bfloat16), None)
    multiply = compiled(cpu_kernels.multiply)
    (got,) = multiply(x_RK, [kernel])
    rounded_RK, rounded_KN = (np.asarray(jnp.asarray(each, jnp.bfloat16), np.float64) for each in (x_RK, values_KN))
    assert (rounded_RK[0, ::2] == 1).all()
    np.testing.assert_allclose(got, rounded_RK @ rounded_KN, atol=1e-6 * num_inputs)
    np.testing.assert_array_equal(multiply(x_RK[-1:], [kernel])[0][0], got[-1])
    x_RK[-1, 0] = np.nan
    assert np.isnan(multiply(x_RK, [kernel])[0][-1]).all()


def test_large_products_are_split_over_threads_and_kernels_of_one_call_are_kept_apart(native):
    """Enough work to be shared, again and again."""
    rng = np.random.default_rng(0)
    sizes = (320, 33, 4000)
    matrices = [random_int8(rng, 512, size) for size in sizes]
    kernels = [cpu_kernels.pack(*matrix) for matrix in matrices]

    multiply = compiled(cpu_kernels.multiply)
    for num_rows in (1, 9, 300):
        x_RK = rng.standard_normal((num_rows, 512), dtype=np.float32)
        wanted = [int8_reference(x_RK, values_KN, scales_N, 1) for values_KN, scales_N in matrices]
        for _ in range(20):
            for got, want in zip(multiply(x_RK, kernels), wanted, strict=True):
                np.testing.assert_array_equal(got, want)


def rounded(array, dtype):
    """Numbers of a dtype, in float32."""
    return np.asarray(jnp.asarray(array, dtype), np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [0, 1, 5, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (2, 2, 16), (4, 1, 48)])
def test_attention_is_that_of_softmax_over_what_is_seen(vectors, heads, kv_heads, head_dim, window, dtype):
    rng = np.random.default_rng(window)
    lengths, room, num_alternatives = [0, 1, 17, 33, 40], 40, 3
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    q = 3 * draw((len(lengths), num_alternatives, heads, head_dim))
    k, v = (draw((len(lengths), num_alternatives, kv_heads, head_dim)) for _ in range(2))
    keys, values = (rounded(draw((len(lengths), kv_heads, room, head_dim)), dtype) for _ in range(2))
    cached = [jnp.asarray(each, dtype) for each in (keys, values)]
    attend = compiled(cpu_kernels.attend_next, window=window)
    got = attend(q, k, v, *cached, jnp.array(lengths))
    for row, length in enumerate(lengths):
        seen = slice(max(0, length - window + 1) if window else 0, length)
        for alternative in range(num_alternatives):
            for head in range(heads):
                of_key = head // (heads // kv_heads)
                all_keys = np.concatenate([keys[row, of_key, seen], k[row, alternative, of_key][None]])
                all_values = np.concatenate([values[row, of_key, seen], v[row, alternative, of_key][None]])
                scores = all_keys.astype(np.float64) @ q[row, alternative, head] / np.sqrt(head_dim)
                weights = np.exp(scores - scores.max())
                np.testing.assert_allclose(
                    got[row, alternative, head], weights @ all_values / weights.sum(), atol=2e-6, rtol=2e-5
                )
    alone = attend(*(array[2:3, :1] for array in (q, k, v)), *(each[2:3] for each in cached), jnp.array([17]))
    np.testing.assert_array_equal(alone[0, 0], got[2, 0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [0, 1, 6])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (2, 2, 16), (10, 2, 48)])
def test_attention_of_a_chunk_is_that_of_each_prompt_by_itself(vectors, heads, kv_heads, head_dim, window, dtype):
    """Two prompts behind 7 cached tokens and two without, and two tokens of filling."""
    rng = np.random.default_rng(window)
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    prompts = [(0, 1, 7), (1, 5, 0), (6, 20, 7), (26, 19, 0), (45, 1, 0), (46, 1, 0)]  # begin, tokens, cached before
    size, room = 47, 9
    q, k, v = (rounded(draw((1, size, number, head_dim)), dtype) for number in (heads, kv_heads, kv_heads))
    keys, values = (rounded(draw((1, kv_heads, room, head_dim)), dtype) for _ in range(2))
    cached = [jnp.asarray(each, dtype) for each in (keys, values)]
    starts, behind = np.zeros(size, np.int32), np.zeros(size, np.int32)
    for begin, count, num_cached in prompts:
        starts[begin : begin + count], behind[begin : begin + count] = begin, num_cached
    attend = compiled(cpu_kernels.attend_chunk, window=window)
    got = attend(3 * q, k, v, *cached, starts, behind)
    for begin, count, num_cached in prompts:
        for head in range(heads):
            of_key = head // (heads // kv_heads)
            all_keys, all_values = (
                np.concatenate([old[0, of_key, :num_cached], new[0, begin : begin + count, of_key]]).astype(np.float64)
                for old, new in ((keys, k), (values, v))
            )
            for place in range(count):
                last = num_cached + place + 1
                seen = slice(max(0, last - window) if window else 0, last)
                scores = all_keys[seen] @ (3 * q[0, begin + place, head]) / np.sqrt(head_dim)
                weights = np.exp(scores - scores.max())
                np.testing.assert_allclose(
                    got[0, begin + place, head], weights @ all_values[seen] / weights.sum(), atol=2e-6, rtol=2e-5
                )
    # The same prompt with its first tokens cached, and by itself: the same to the last bit.
    begin, count, cut = 26, 19, 8
    own = slice(begin + cut, begin + count)
    rest = [each[:, own] for each in (3 * q, k, v)]
    first_kv = (jnp.asarray(each[:, begin : begin + cut].swapaxes(1, 2), dtype) for each in (k, v))
    rows = (np.full(count - cut, number, np.int32) for number in (0, cut))
    np.testing.assert_array_equal(attend(*rest, *first_kv, *rows)[0], got[0, own])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_caches_follow_their_beams_where_they_differ(native, dtype):
    """Rows of beams without a prompt, with swapped, shared and own parents; what lies outside stays."""
    rng = np.random.default_rng(0)
    numbers = [rng.standard_normal((6, 2, 20, 4), dtype=np.float32) for _ in range(3)]
    caches = [np.asarray(jnp.asarray(each, dtype)) for each in numbers]
    parents, starts, ends = np.array([1, 0, 0, 3, 5, 4]), np.array([3, 3, 3, 5, 7, 7]), np.array([9, 9, 20, 9, 7, 30])
    wanted = [cache.copy() for cache in caches]
    for want, cache in zip(wanted, caches, strict=True):
        for row, (parent, start, end) in enumerate(zip(parents, starts, ends, strict=True)):
            want[row, :, start:end] = cache[parent, :, start:end]
    before = [cache.copy() for cache in caches]
    for _ in range(2):
        got = jax.jit(lambda caches, *rows: cpu_kernels.follow_beams(caches, *rows))(caches, parents, starts, ends)
        for one, want, cache, old in zip(got, wanted, caches, before, strict=True):
            np.testing.assert_array_equal(one, want)
            np.testing.assert_array_equal(cache, old)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_are_written_to_rows_and_positions_and_past_an_end_dropped(native, dtype):
    rng = np.random.default_rng(0)
    caches = [np.asarray(jnp.asarray(rng.standard_normal((4, 3, 6, 5)), dtype)) for _ in range(3)]
    tokens = [np.asarray(jnp.asarray(rng.standard_normal((7, 3, 5)), dtype)) for _ in range(3)]
    rows, places = np.array([0, 3, 3, 4, -1, 2, 1]), np.array([0, 5, 6, 0, 2, 1, -1])
    wanted = [cache.copy() for cache in caches]
    for want, new in zip(wanted, tokens, strict=True):
        for token in (0, 1, 5):
            want[rows[token], :, places[token]] = new[token]
    before = [cache.copy() for cache in caches]
    got = jax.jit(cpu_kernels.put_tokens)(caches, tokens, rows, places)
    for one, want, cache, old in zip(got, wanted, caches, before, strict=True):
        np.testing.assert_array_equal(one, want)
        np.testing.assert_array_equal(cache, old)


@pytest.mark.parametrize("width", [1, 15, 64, 1000])
def test_sums_of_exponentials_are_those_of_numpy_and_show_what_is_no_number(vectors, width):
    rng = np.random.default_rng(width)
    logits = (20 * rng.standard_normal((3, 2, width))).astype(np.float32)
    logits[0, 0, 0], logits[1, 0], logits[1, 1, -1], logits[2, 0, 0] = -1e9, -np.inf, np.nan, np.inf
    got = np.asarray(jax.jit(cpu_kernels.log_sum_exp)(logits))
    assert got[1, 0] == -np.inf and np.isnan(got[1, 1]) and got[2, 0] == np.inf
    for place in ((0, 0), (0, 1), (2, 1)):
        wanted = np.logaddexp.reduce(logits[place].astype(np.float64))
        np.testing.assert_allclose(got[place], wanted, rtol=3e-7, atol=3e-6)


def test_zeros_stay_zeros_and_what_is_no_number_shows_in_its_own_row(vectors):
    values_KN, scales_N = random_int8(np.random.default_rng(0), 20, 40)
    x_RK = np.ones((3, 20), np.float32)
    x_RK[0], x_RK[1, 3] = 0, np.nan
    (got,) = cpu_kernels.multiply(x_RK, [cpu_kernels.pack(values_KN, scales_N)])
    assert not np.asarray(got[0]).any() and np.isnan(got[1]).all() and np.isfinite(got[2]).all()


def test_buffers_of_other_sizes_are_refused(native):
    kernel = cpu_kernels.pack(np.ones((8, 32), np.float32), None)
    cache, token = jnp.zeros((2, 3, 4, 5)), jnp.zeros((1, 3, 5))
    with pytest.raises(jax.errors.JaxRuntimeError, match="different numbers"):
        jax.block_until_ready(cpu_kernels.put_tokens([cache], [token] * 2, np.zeros(1, int), np.zeros(1, int)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="different sizes"):
        cpu_kernels.multiply(np.ones((1, 9), np.float32), [kernel])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int8_weight_only"])
@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_packed_weights_hold_what_plain_ones_do(native, config, dtype):
    params = random_params(config)
    plain, packed = (weights_lib.prepare(config, params, dtype, products=name) for name in ("xla", "native"))
    assert packed.is_packed and not plain.is_packed
    tokens = jnp.arange(config.vocab_size)[::-2].reshape(2, -1)
    np.testing.assert_array_equal(
        weights_lib.look_up(packed.embedding, tokens, "float32"),
        weights_lib.look_up(plain.embedding, tokens, "float32"),
    )
    x = jax.random.normal(jax.random.key(1), (3, 2, config.d_model))
    for ours, theirs in (
        (packed.layers[1].gate, plain.layers[1].gate),
        (packed.layers[0].query, plain.layers[0].query),
    ):
        np.testing.assert_allclose(weights_lib.product(x, ours), weights_lib.product(x, theirs), atol=1e-5)
    np.testing.assert_allclose(
        weights_lib.product(x, packed.unembedding),
        weights_lib.product(x, plain.unembedding, is_embedding=True),
        atol=1e-5,
    )


WIDE_HEADS = dataclasses.replace(TINY, head_dim=16)  # which the attention kernel takes
METHODS = {"greedy": Greedy(), "beam": Beam(3), "safe_beam": SafeBeam(2, 3)}
FIRST = (("float32", "greedy"), ("bfloat16", "beam"), ("int8", "safe_beam"))


@pytest.mark.parametrize(
    ("dtype", "method"),
    [
        pytest.param(dtype, name, marks=[] if (dtype, name) in FIRST else pytest.mark.slow)
        for dtype in ("float32", "bfloat16", "int8")
        for name in METHODS
    ],
)
def test_decoding_gives_the_same_tokens(native, dtype, method):
    """Two prompts of unlike lengths beside each other."""
    params = random_params(WIDE_HEADS)
    requests = [EngineRequest(tuple(range(1, 2 + 3 * index)), METHODS[method], 8, (0,)) for index in range(2)]
    make = functools.partial(Engine, WIDE_HEADS, params, harm_tag_id=2, slots=8, weights=dtype)
    ours, theirs = (run_all(make(products=name), requests) for name in ("native", "xla"))
    for one, other in zip(ours, theirs, strict=True):
        assert one.tokens == other.tokens
        tolerance = 0.05 if dtype == "bfloat16" else 1e-3  # how XLA was told to optimise decides where it rounds
        assert one.logprob == pytest.approx(other.logprob, abs=tolerance)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("int8", marks=pytest.mark.slow)])
def test_tokens_looked_up_in_the_text_change_no_text(native, dtype):
    """A free text, and one that a bias makes repeat a token, so that guesses hold."""
    requests = [EngineRequest((1, 2, 3), Greedy(), 10, (0,))]
    requests.append(dataclasses.replace(requests[0], adjustment=Adjustment(logit_bias=((5, 100.0),))))
    make = functools.partial(Engine, WIDE_HEADS, random_params(WIDE_HEADS), harm_tag_id=2, slots=4, weights=dtype)
    plain, looked_up = (run_all(make(products="native", lookup_tokens=number), requests) for number in (0, 3))
    assert [each.tokens for each in looked_up] == [each.tokens for each in plain]
    assert list(plain[1].tokens) == [5] * 10


def test_a_mesh_takes_xla_or_says_why_not(native):
    mesh, params = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), random_params(TINY)
    assert not weights_lib.prepare(TINY, params, products="auto", has_mesh=True).is_packed
    with pytest.raises(ValueError, match="products='native' can't run: XLA doesn't split them over a mesh"):
        Engine(TINY, params, harm_tag_id=None, products="native", mesh=mesh)
    packed = weights_lib.prepare(TINY, params, products="native")
    with pytest.raises(ValueError, match="products='native' are not for a mesh"):
        placement.place(TINY, packed, mesh)


@pytest.mark.parametrize(
    ("asked", "dtype", "most_inputs", "reason"),
    [
        ("fast", "int8", 64, "products='fast': one of auto, xla, native"),
        ("native", "float16", 64, "they take weights in float32, bfloat16, int8, int8_weight_only, not float16"),
        ("native", "int8", MOST_INPUTS + 1, f"the sum of {MOST_INPUTS + 1} products of int8 may not fit into int32"),
    ],
)
def test_what_they_do_not_take_is_named(asked, dtype, most_inputs, reason):
    with pytest.raises(ValueError, match=reason):
        cpu_kernels.choose(asked, dtype, most_inputs=most_inputs)
    if asked == "native":
        assert cpu_kernels.choose("auto", dtype, most_inputs=most_inputs).products == "xla"


def _elsewhere(monkeypatch, tmp_path, place):
    monkeypatch.setenv("SAFELM_CACHE", str(tmp_path))
    if place == "another CPU":
        monkeypatch.setattr(building, "_cpu_flags", lambda: frozenset({"asimd", "neon"}))
        return "written for AVX2 and AVX-512"
    monkeypatch.setattr(building, "_cpu_flags", lambda: building.VECTORS[-1].cpu_flags)
    if place == "no compiler":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        return r"no C\+\+ compiler: none of g\+\+, clang\+\+, c\+\+ on PATH"
    if place == "no such compiler":
        monkeypatch.setenv("CXX", "/no/such/compiler")
        return "/no/such/compiler can't build them"
    if place == "a compiler that fails":
        script = tmp_path / "compiler"
        script.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'x.cc:1: error: no header' >&2\nexit 1\n")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return "can't build them: x.cc:1: error: no header"
    monkeypatch.setenv("CXX", "true")  # builds nothing
    (tmp_path / "cpu_kernels").write_text("a file")
    return "cpu_kernels"


@pytest.mark.parametrize(
    "place", ["another CPU", "no compiler", "no such compiler", "a compiler that fails", "no folder to write to"]
)
def test_where_they_cannot_run_xla_does_and_a_forced_one_says_why(place, nothing_known, monkeypatch, tmp_path, caplog):
    reason = _elsewhere(monkeypatch, tmp_path, place)
    params = random_params(TINY)
    with pytest.raises(ValueError, match=f"products='native' can't run: .*{reason}"):
        Engine(TINY, params, harm_tag_id=None, products="native")
    with caplog.at_level("INFO", logger="safelm"):
        for _ in range(2):
            (made,) = generate(TINY, params, [[1, 2]], Greedy(), max_new_tokens=2, end_ids=[0], harm_tag_id=None)
    assert made.tokens
    assert [record.message[:37] for record in caplog.records] == ["products of decoding: xla (not native"]
    assert not list(tmp_path.rglob("*.so"))


def test_they_are_built_once(native, nothing_known, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("SAFELM_CACHE", str(tmp_path))
    (vectors, *_) = building.usable_vectors(building._cpu_flags())
    with caplog.at_level("INFO", logger="safelm"):
        first = building.built(vectors)
        written = first.stat().st_mtime_ns
        assert building.built(vectors) == first and first.stat().st_mtime_ns == written
    assert [record.message.split(" in ")[0] for record in caplog.records] == [f"CPU kernels: built for {vectors.name}"]
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".so", ".lock"}
