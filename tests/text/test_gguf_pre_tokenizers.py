"""GGUF files name how a text is cut: each name cuts as llama.cpp's patterns do, and as the models' own tokenizers."""

import gguf
import parity
import pytest
import regex
from tokenizers import normalizers, pre_tokenizers

from safelm.text import gguf_tokenizer, spelling
from safelm.text.tokenizer import Tokenizer

TEXTS = [
    "I'll say it's 'S' and we'Ve done; don't SHOUT'D",
    "  two lead,  and trail  \n\n\n  \r\n\t tabs\t\n x\n",
    "1 12 123 1234 12345.67890e-12 $1,000,000 ½²٣٤٥ 4٣",
    "HTTPServer camelCase ÉCOLE Ǆungla ﬁn naïve cafe\u0301 o\u0308 İstanbul",
    "def f(x): return x**2  # <=> ^~| `a` [b]{c}//d\\e\n\tpass;;;\n//\n\n",
    "川が流れる。Река течёт 한국어 ไทย हिन्दी עִבְרִית 🦊👩\u200d👩\u200d👧 ｆｕｌｌ！？",
    "\x00\x07\x7f\u00a0\u3000\u2028a\u200bb …“q” ‘x’—y",
    "a" * 30 + " " * 7 + "9" * 8 + "!" * 5 + "\n" * 4,
]
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
SUFFIXES = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
GPT4 = SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's patterns, one after the other on what the former ones cut; what lies between matches is a piece too.
REFERENCES = {
    "gpt-2": [WORDS],
    "smollm": [r"\p{N}", WORDS],
    "llama-bpe": [GPT4 % "{1,3}"],
    "qwen2": [GPT4 % ""],
    "tekken": [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", WORDS, r"\p{N}+", "[0-9][0-9][0-9]"],
}
SAME = {"starcoder": "smollm", "refact": "smollm", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}
SAME |= {"smaug-bpe": "llama-bpe"}


def pieces(text: str, patterns: list[str]) -> list[str]:
    found = [text]
    for pattern in patterns:
        whole, found = found, []
        for piece in whole:
            at = 0
            for match in regex.finditer(pattern, piece):
                found += [piece[at : match.start()], match[0]]
                at = match.end()
            found.append(piece[at:])
    return [piece for piece in found if piece]


def test_every_name_has_a_reference():
    assert gguf_tokenizer._CUTS.keys() == REFERENCES.keys() | SAME.keys()


@pytest.mark.parametrize("name", [*REFERENCES, *SAME])
def test_a_name_cuts_as_llama_cpp_does(name):
    characters = spelling.byte_characters()
    cut = gguf_tokenizer._CUTS[name].pre_tokenizer()
    for text in TEXTS:
        expected = pieces(text, REFERENCES[SAME.get(name, name)])
        mapped = ["".join(characters[byte] for byte in piece.encode()) for piece in expected]
        assert [piece for piece, _ in cut.pre_tokenize_str(text)] == mapped, text


@pytest.mark.parity
def test_names_cut_as_the_models_own_tokenizers():
    parity.module("transformers")
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    split = {name: cut.patterns for name, cut in gguf_tokenizer._CUTS.items() if name in GGUF_PRE_TOKENIZER_SPLITS}
    assert len(split) == 6
    for name, patterns in split.items():
        assert patterns == (GGUF_PRE_TOKENIZER_SPLITS[name],), name
    assert gguf_tokenizer._CUTS["llama-bpe"].patterns == (TikTokenConverter().pattern,)
    qwen = Qwen2Tokenizer(vocab={"a": 0}, merges=[]).backend_tokenizer
    ours = gguf_tokenizer._CUTS["qwen2"]
    assert qwen.pre_tokenizer.__getstate__() == ours.pre_tokenizer().__getstate__()
    assert isinstance(qwen.normalizer, normalizers.NFC) and ours.is_nfc


def write(path, pre: str, **fields: bool):
    """A file of all bytes, `ab`, `abc` without a way to it by merges, and a composed letter's two bytes."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", *characters, "ab", "abc", "Ã©"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(tokens) - 1)])
    writer.add_token_merges(["a b", "Ã ©"])
    writer.add_bos_token_id(0)
    for name, value in fields.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
        step()
    return Tokenizer.from_pretrained(path), tokens


def test_what_goes_without_saying_for_a_name(tmp_path):
    for pre, is_whole, begins, is_nfc in (
        ("llama-bpe", True, True, False),
        ("tekken", True, True, False),
        ("smaug-bpe", False, False, False),
        ("qwen2", False, False, True),
        ("default", False, False, False),
    ):
        tokenizer, tokens = write(tmp_path / f"{pre}.gguf", pre)
        assert [tokens[i] for i in tokenizer.encode("abc")] == (["abc"] if is_whole else ["ab", "c"]), pre
        assert tokenizer.conventions.begin_ids == ((0,) if begins else ())
        assert (tokenizer.encode("e\u0301") == [tokens.index("Ã©")]) == is_nfc
        tokenizer.save(str(tmp_path / pre))
        again = Tokenizer.from_pretrained(str(tmp_path / pre))
        assert (again.hash, again.encode("abc")) == (tokenizer.hash, tokenizer.encode("abc"))
        assert again.conventions.begin_ids == tokenizer.conventions.begin_ids
    tokenizer, _ = write(tmp_path / "said.gguf", "llama-bpe", add_bos_token=False)
    assert tokenizer.conventions.begin_ids == ()
