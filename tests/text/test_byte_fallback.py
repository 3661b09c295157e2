"""Vocabularies of SentencePiece's kind (Gemma): BPE over words with spaces as they are, bytes for what has no token."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from safelm.tags import HARM_TAG
from safelm.text.conventions import Declared
from safelm.text.tokenizer import Tokenizer

SPACE = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIALS = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
CORPUS = ["the cat sat on the mat, the dog did not; the cat  ran", "12 dogs and\n34 cats"] * 20


def gemma_like(**changes):
    """A tokenizer.json as Gemma's, but small; `changes` of its parts."""
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.Replace(" ", SPACE)
    made.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}?\\w+|[^\\w]"), "isolated")  # to train; then as published
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=90, show_progress=False))
    spec = json.loads(made.to_str())
    tokens = [*SPECIALS, *BYTES, *sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].__getitem__)]
    spec["model"] |= {"byte_fallback": True, "vocab": {token: place for place, token in enumerate(tokens)}}
    spec["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    made = tokenizers.Tokenizer.from_str(json.dumps(spec | changes))
    if "decoder" not in changes:
        made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    return made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    gemma_like().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))
    return Tokenizer.from_pretrained(folder)


def test_ids_are_those_of_tokenizers_and_nothing_is_lost(tokenizer, tmp_path):
    theirs = gemma_like()
    for text in ("the cat sat", " a", "the  dogs\n", "caf\u00e9 \u4e2d\u6587 \U0001f600", "\x00\x07"):
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids and tokenizer.decode(ids) == text
        assert tokenizer.count_lost_bytes(text) == 0 and tokenizer.normalized(text) == text
    assert len(tokenizer.encode("the cat sat")) < len("the cat sat") / 2  # merges are used, over spaces too
    assert tokenizer.special_token(tokenizer.eos_id) == "<eos>"
    tokenizer.save(str(tmp_path))
    assert Tokenizer.from_pretrained(tmp_path).hash == tokenizer.hash


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(exclude_categories=("Cs",), exclude_characters=SPACE)))
def test_a_token_adds_the_bytes_that_it_spells(tokenizer, text):
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode() and tokenizer.decode(ids) == text


def test_text_forges_no_special_token_and_a_tag_between_words_changes_no_other_id(tokenizer):
    for special in (*SPECIALS, HARM_TAG):
        assert tokenizer.decode(tokenizer.encode(special)) == special
        assert all(tokenizer.special_token(token) is None for token in tokenizer.encode(special))
    tagged = tokenizer.encode_tagged(f"the cat{HARM_TAG} sat on")
    assert [token for token in tagged if token != tokenizer.harm_tag_id] == tokenizer.encode("the cat sat on")


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
BACK = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
PREPENDS = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, REPLACE]}
STRIPS = {"type": "Sequence", "decoders": [*BACK, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}


@pytest.mark.parametrize("changes", [{"normalizer": PREPENDS}, {"decoder": STRIPS}], ids=["prepends", "strips"])
def test_a_vocabulary_that_adds_or_takes_a_space_is_refused_as_llama_2s(changes):
    declared = Declared(special_tokens=(("eos_token", "<eos>"),))
    assert Tokenizer(gemma_like(), declared=declared).vocab_size
    with pytest.raises(ValueError, match=r"BPE with byte fallback .as of Gemma., without a prefix space"):
        Tokenizer(gemma_like(**changes), declared=declared)
