"""The regular expressions of a stranger's tokenizer end in a line, not in a panic and not after hours."""

import json
import time

import pytest
import tokenizers
from tokenizers import Regex, pre_tokenizers

from safelm.safety.embedding import chunking
from safelm.text import gguf_tokenizer, patterns, stranger_worker
from safelm.text.tokenizer import Tokenizer

TRAINED = Tokenizer.train(["Some words about rain, and more words."], 300)
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
CATASTROPHIC = ["(a+)+$", "(x+x+)+y", "(?=(a+)+b)", r"q(?:\d|\d\d)+$", "(?:ab|ab)+z", r"(\s*\n?)+x"]
SLOW = [".*.*y"]
HARMLESS = [r"\w+|[^\w\s]+|\s+", "[0-9]", r"\s+(?!\S)|\s+"]


def write(folder, **parts):
    spec = json.loads(TRAINED.to_json()) | parts
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return str(folder)


def splitting(pattern: str) -> dict:
    return {"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": {"Regex": pattern}}, BYTES]}


def replacing(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize("pattern", [*CATASTROPHIC, *SLOW])
def test_a_catastrophic_pattern_is_refused(tmp_path, pattern):
    started = time.monotonic()
    for parts in ({"pre_tokenizer": splitting(pattern)}, {"normalizer": replacing({"Regex": pattern}, "b")}):
        with pytest.raises(ValueError, match=r"its patterns \(.*\) can't be used: ") as error:
            Tokenizer.from_pretrained(write(tmp_path, **parts))
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500
    assert time.monotonic() - started < 60


def test_an_encoder_s_catastrophic_pattern_is_refused(tmp_path):
    write(tmp_path, pre_tokenizer=splitting(CATASTROPHIC[0]))
    with pytest.raises(ValueError, match=r"tokenizer.json: its patterns \('\(a\+\)\+\$'\) can't be used: .*retry"):
        chunking.of_encoder(tmp_path)


@pytest.mark.parametrize(
    ("normalizer", "message"),
    [
        (replacing({"String": "a"}, "b" * 1000), "characters of 200"),
        (replacing({"String": "a"}, "b" * 10**6), "more than 512 MB of memory"),
        (replacing({"Regex": "("}, "b"), "can't be used"),
    ],
)
def test_a_normalizer_that_swells_or_is_broken_is_refused(tmp_path, normalizer, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(write(tmp_path, normalizer=normalizer))


@pytest.mark.parametrize("pattern", HARMLESS)
def test_a_harmless_pattern_is_taken(tmp_path, pattern):
    tokenizer = Tokenizer.from_pretrained(write(tmp_path, pre_tokenizer=splitting(pattern)))
    assert tokenizer.decode(tokenizer.encode("Some words, 12345 of\n them")) == "Some words, 12345 of\n them"


@pytest.mark.parametrize("name", [name for name, cut in gguf_tokenizer._CUTS.items() if cut.patterns])
def test_known_patterns_are_harmless_and_not_tried_each_time(tmp_path, monkeypatch, name):
    cut = gguf_tokenizer._CUTS[name]
    parts = {"pre_tokenizer": json.loads(cut.pre_tokenizer().__getstate__())}
    stranger_worker.try_cutting(parts, list(patterns.texts(cut.patterns)))
    monkeypatch.setattr(stranger_worker, "try_cutting", None)
    Tokenizer.from_pretrained(write(tmp_path, **parts))


def test_a_pattern_that_gives_up_on_a_text_later_ends_in_a_line():
    backend = tokenizers.Tokenizer.from_str(TRAINED.to_json())
    cuts = [pre_tokenizers.Split(Regex("(a+)+$"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer = Tokenizer(backend, origin="the/file")
    assert tokenizer.decode(tokenizer.encode("aab")) == "aab"
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(ValueError, match=r"the/file: its patterns can't cut a text \(.*retry-limit"):
            encode("a" * 40 + "!")
    chunks = chunking.ChunkTokenizer(backend, origin="the/file")
    with pytest.raises(ValueError, match="the/file: its patterns can't cut a text"):
        list(chunks.chunks(["a" * 40 + "!"], 8))
