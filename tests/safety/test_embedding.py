"""Chunking, buckets, the fused head and devices: the batching never shows in the results."""

import pickle

import embedding_folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from safelm.safety.embedding import Embedder, chunking, load_backbone

TEXTS = [" ".join(f"w{(i * j) % 40}" for j in range(n)) for i, n in enumerate([0, 3, 90, 1, 17, 14, 31, 200, 5, 2])]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    embedding_folders.write(folder)
    return load_backbone(str(folder), max_tokens=32)


@pytest.fixture(scope="module")
def embedder(backbone):
    return Embedder(backbone, batch_tokens=64)


def all_chunks(tokenizer, texts, max_tokens):
    """The chunks' ids, in a list for every text."""
    found = [[] for _ in texts]
    for index, chunk in tokenizer.chunks(texts, max_tokens):
        found[index].append(chunk.tolist())
    return found


def test_results_are_those_of_every_chunk_alone(backbone, embedder):
    embedding_CD, document_C = embedder.embed(TEXTS)
    pooled = jax.jit(backbone.pooled)
    chunks = list(backbone.tokenizer.chunks(TEXTS, 32))
    assert document_C.tolist() == [index for index, _ in chunks] and embedding_CD.dtype == np.float32
    assert sorted(set(document_C.tolist())) == list(range(len(TEXTS)))
    for i in (0, 1, int(np.flatnonzero(document_C == 7)[2])):
        ids = chunks[i][1]
        alone = pooled(backbone.params, jnp.asarray(ids[None]), jnp.asarray([len(ids)]))[0]
        np.testing.assert_allclose(embedding_CD[i], alone, atol=1e-5)


def test_batches_order_and_neighbours_change_nothing(backbone, embedder):
    wanted, document_C = embedder.embed(TEXTS)
    other, _ = Embedder(backbone, batch_tokens=1).embed(TEXTS)
    np.testing.assert_allclose(other, wanted, atol=1e-5)
    turned, turned_document_C = embedder.embed(TEXTS[::-1])
    for i in range(len(TEXTS)):
        theirs = turned[turned_document_C == len(TEXTS) - 1 - i]
        np.testing.assert_allclose(theirs, wanted[document_C == i], atol=1e-5)


def test_padding_takes_no_part(backbone):
    tokens_BT = jnp.asarray([[2, 8, 9, 3, 0, 0]])
    for kind in ("mean", "max", "last", "mean_last"):
        tuned = load_backbone(**backbone.spec | {"pooling": kind})
        pooled = jax.jit(tuned.pooled)
        lengths_B = jnp.asarray([4])
        np.testing.assert_allclose(
            pooled(backbone.params, tokens_BT, lengths_B),
            pooled(backbone.params, tokens_BT.at[0, 4:].set(11), lengths_B),
            atol=1e-6,
        )


def test_mean_last_is_the_mean_and_the_last_joined(backbone):
    tokens_BT, lengths_B = jnp.asarray([[2, 8, 9, 3, 0, 0], [2, 5, 0, 0, 0, 0]]), jnp.asarray([4, 2])
    kinds = {kind: load_backbone(**backbone.spec | {"pooling": kind}) for kind in ("mean", "last", "mean_last")}
    found = {kind: jax.jit(b.pooled)(b.params, tokens_BT, lengths_B) for kind, b in kinds.items()}
    np.testing.assert_allclose(found["mean_last"], np.concatenate([found["mean"], found["last"]], axis=1), atol=1e-6)
    assert found["mean_last"].shape[1] == kinds["mean_last"].dim == 2 * kinds["mean"].dim


def test_one_compilation_a_bucket(backbone):
    traced = []

    def head(_, x_BD):
        traced.append(x_BD.shape)
        return x_BD.sum(-1)

    embedder = Embedder(backbone, batch_tokens=64)
    assert embedder.buckets == (8, 16, 24, 32)
    for texts in (TEXTS, TEXTS[:3], TEXTS[5:], ["w1 w2"] * 300, [TEXTS[7]] * 9):
        embedder.map_chunks(texts, None, head)
    embedder.map_chunks(["w1 " * n for n in (10, 18)], None, head)
    # rows of a device's batch: 64 tokens are 2 x 32, 2 x 24 and 8 x 8
    assert sorted(rows for rows, *_ in traced) == [2, 2, 8]


def test_a_head_in_the_program_equals_one_behind_it(backbone, embedder):
    weights = {"kernel": jax.random.normal(jax.random.key(0), (backbone.dim, 6))}

    def head(params, x_BD):
        return x_BD @ params["kernel"]

    logits, document_C = embedder.map_chunks(TEXTS, weights, head)
    embedding_CD, same = embedder.embed(TEXTS)
    np.testing.assert_array_equal(document_C, same)
    np.testing.assert_allclose(logits, embedding_CD @ np.asarray(weights["kernel"]), atol=1e-4)
    none, documents = embedder.map_chunks([], weights, head)
    assert none.shape == (0, 6) and documents.shape == (0,)


def embedding_head(_, x_BD):
    return x_BD


def test_rows_are_split_over_all_devices(backbone, embedder):
    assert jax.device_count() == 8 and embedder.rows(32) == 16 and embedder.rows(16) == 32
    program = embedder._program(embedding_head)
    tokens_BT, lengths_B = embedder._padded([np.asarray([2, 8, 3], np.int32)], 16)
    out = program(embedder._params, None, tokens_BT, lengths_B)
    assert {shard.data.shape for shard in out.addressable_shards} == {(4, backbone.dim)}
    assert len({shard.device for shard in out.addressable_shards}) == 8


def test_fine_tuned_parameters_and_gradients(backbone, embedder):
    mask = backbone.trainable(backbone.params, 1)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves({k: v for k, v in mask.items() if k != "layer_1"}))
    assert all(np.all(leaf) for leaf in jax.tree.leaves(mask["layer_1"]))
    assert all(np.all(leaf) for leaf in jax.tree.leaves(backbone.trainable(backbone.params, None)))
    with pytest.raises(ValueError, match="last_n=3"):
        backbone.trainable(backbone.params, 3)
    tokens_BT, lengths_B = jnp.asarray([[2, 8, 9, 3, 13, 13]]), jnp.asarray([4])
    grads = jax.grad(lambda p: backbone.pooled(p, tokens_BT, lengths_B)[0, 0])(
        jax.tree.map(jnp.asarray, backbone.params)
    )
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    assert np.any(grads["embeddings"]["words"][8]) and not np.any(grads["embeddings"]["words"][13])  # 13: padding
    assert np.any(grads["layer_0"]["qkv"])
    changed = {**backbone.params, "layer_1": jax.tree.map(lambda x: x * 1.1, backbone.params["layer_1"])}
    assert not np.allclose(Embedder(backbone, changed).embed(TEXTS[:2])[0], embedder.embed(TEXTS[:2])[0], atol=1e-3)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_chunks_hold_every_token_once(backbone, monkeypatch, kind):
    monkeypatch.setattr(chunking, "PART_CHARACTERS", 64)
    monkeypatch.setattr(chunking, "BATCH_CHARACTERS", 200)
    tokenizer = backbone.tokenizer if kind == "encoder" else chunking.of_decoder(tiny_runs.tokenizer())
    texts = [*TEXTS, "the  cat\n\nsat,   on 123 mats. " * 20, "x" * 500]
    around = len(tokenizer.before) + len(tokenizer.after)
    for text, chunks in zip(texts, all_chunks(tokenizer, texts, 16), strict=True):
        assert all(1 <= len(chunk) <= 16 for chunk in chunks) and all(len(chunk) == 16 for chunk in chunks[:-1])
        if kind == "encoder":
            assert all(chunk[0] == 2 and chunk[-1] == 3 for chunk in chunks)
        inside = [i for chunk in chunks for i in chunk[len(tokenizer.before) : len(chunk) - len(tokenizer.after)]]
        if text == "x" * 500:  # no end of a word to cut at: the parts are words of their own
            continue
        (whole,) = tokenizer._encode([text])
        assert inside == (whole.tolist() or ([] if around else [tokenizer.empty]))


def test_special_tokens_in_text_are_text(backbone):
    ((chunk,),) = all_chunks(backbone.tokenizer, ["w1 [SEP] w2"], 32)
    assert chunk.count(3) == 1 and chunk[-1] == 3


def test_a_prefix_stands_in_front_of_every_chunk(backbone):
    tokenizer = backbone.tokenizer.with_prefix("query: ")
    plain = all_chunks(backbone.tokenizer, [TEXTS[4]], 64)[0][0]
    for chunk in all_chunks(tokenizer, [TEXTS[4]], 12)[0]:
        assert chunk[:3] == [2, 6, 7]
    assert all_chunks(tokenizer, [TEXTS[4]], 64)[0][0] == [2, 6, 7, *plain[1:]]
    with pytest.raises(ValueError, match="max_tokens=4: 4 of them are special"):
        list(tokenizer.chunks(["w1"], 4))


def test_any_text_in_bounded_memory(backbone, monkeypatch):
    rng = np.random.default_rng(0)
    noise = rng.bytes(3000)
    odd = ["", "\x00", "\ud800 alone", noise.decode("latin-1"), noise.decode("utf-8", "replace"), " " * 1000]
    for texts in (odd, odd[:1]):
        assert {index for index, _ in backbone.tokenizer.chunks(texts, 32)} == set(range(len(texts)))
    assert [len(c) for c in all_chunks(chunking.of_decoder(tiny_runs.tokenizer()), ["", "\ud800"], 32)] == [1, 1]
    sizes = []
    encode = chunking.ChunkTokenizer._encode

    def counted(self, texts):
        sizes.append(sum(map(len, texts)))
        return encode(self, texts)

    monkeypatch.setattr(chunking.ChunkTokenizer, "_encode", counted)
    long = "w1 w2 " * (10_000_000 // 6)
    total = sum(len(chunk) for _, chunk in backbone.tokenizer.chunks([long], 32))
    assert total > 3_300_000 and max(sizes) <= chunking.BATCH_CHARACTERS + chunking.PART_CHARACTERS


def test_backbones_and_tokenizers_travel_to_workers(backbone):
    again = pickle.loads(pickle.dumps(backbone))
    assert again.fingerprint == backbone.fingerprint
    assert all_chunks(again.tokenizer, TEXTS, 32) == all_chunks(backbone.tokenizer, TEXTS, 32)


def test_threads_change_no_result_and_compile_once_a_bucket(backbone, embedder):
    traced = []

    def head(_, x_BD):
        traced.append(x_BD.shape)
        return x_BD

    texts = TEXTS * 4
    wanted, document_C = embedder.embed(texts)
    threaded = Embedder(backbone, batch_tokens=1)
    threaded._at_once = 4
    for _ in range(2):
        found, documents = threaded.map_chunks(texts, None, head)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        np.testing.assert_array_equal(documents, document_C)
    assert len(traced) == len(threaded._compiled) > 2


def test_an_error_in_a_thread_is_raised(backbone):
    threaded = Embedder(backbone)
    threaded._at_once = 2
    calls = []

    def failing(*_):
        calls.append(None)
        if len(calls) > 1:
            raise RuntimeError("out of memory")
        return np.zeros((threaded.rows(8), 1), np.float32)

    threaded._programs[embedding_head] = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        threaded.map_chunks(["w1"] * 2 * threaded.rows(8), None, embedding_head)
