"""The tokenizer inside a GGUF file, rebuilt for the `tokenizers` package.

A GGUF file carries vocabulary, merges and token types, but only the *name* of its pre-tokenizer. Those known here, with
what goes without saying for them in llama.cpp, are in `_CUTS`. Anything else is refused: a wrong pre-tokenizer would
encode text almost, but not quite, right.
"""

import dataclasses
from collections.abc import Sequence

import gguf
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from safelm.io.gguf_file import GGUFFile
from safelm.text.conventions import Declared, declared_in_gguf

_ARCHITECTURES = ("llama", "qwen3")
_CONTROL, _USER_DEFINED = int(gguf.TokenType.CONTROL), int(gguf.TokenType.USER_DEFINED)


def smollm_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """SmolLM2's pre-tokenizer: single digits, then GPT-2's word pattern over bytes, without a leading space."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How a text is cut into the pieces that are merged into tokens.

    Attributes:
      patterns: each cuts what the former ones made, its matches and what lies between them; none: GPT-2's words.
      single_digits: every digit is cut out before GPT-2's words are.
      is_nfc: the text is composed first (NFC).
      ignores_merges: a piece that is a token stays one, whatever the merges make of it.
      begins: a text begins with the beginning token where the file doesn't say whether it does.
    """

    patterns: tuple[str, ...] = ()
    single_digits: bool = False
    is_nfc: bool = False
    ignores_merges: bool = False
    begins: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        if self.single_digits:
            return smollm_pre_tokenizer()
        if not self.patterns:
            return pre_tokenizers.ByteLevel(add_prefix_space=False)
        cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_LLAMA3 = _SUFFIXES + _GPT4_WORDS + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN2 = _SUFFIXES + _GPT4_WORDS + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_llama3 = _Cut((_LLAMA3,), ignores_merges=True, begins=True)
_digits = _Cut(single_digits=True)
_CUTS = {
    "smollm": _digits,
    "starcoder": _digits,
    "refact": _digits,
    "gpt-2": _Cut(),
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "llama-v3": _llama3,
    "smaug-bpe": _Cut((_LLAMA3,)),
    "qwen2": _Cut((_QWEN2,), is_nfc=True),
    "tekken": _Cut((_TEKKEN,), ignores_merges=True, begins=True),
    "deepseek-coder": _Cut((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")),
    "default": _Cut((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}

KNOWN_PATTERNS = frozenset(pattern for cut in _CUTS.values() for pattern in cut.patterns)


def read_gguf_tokenizer(path: str) -> tuple[tokenizers.Tokenizer, Declared]:
    """Reads a GGUF file's byte-level BPE vocabulary and how its texts begin and end.

    Its control tokens become special tokens.

    Raises:
        ValueError: not a whole GGUF file, or an architecture, tokenizer model or pre-tokenizer not known here.
    """
    file = GGUFFile(path)
    _expect(file, "general.architecture", _ARCHITECTURES)
    _expect(file, "tokenizer.ggml.model", ("gpt2",))
    cut = _CUTS[_expect(file, "tokenizer.ggml.pre", tuple(_CUTS))]

    tokens = file.array("tokenizer.ggml.tokens", str)
    merges = [_merge_pair(path, merge) for merge in file.array("tokenizer.ggml.merges", str)]
    types = file.array("tokenizer.ggml.token_type", int)
    if not tokens or len(set(tokens)) != len(tokens) or len(types) != len(tokens):
        raise ValueError(
            f"{path}: broken vocabulary: {len(tokens)} tokens, {len(set(tokens))} distinct, {len(types)} token types"
        )
    known = set(tokens)
    if unknown := next((merge for merge in merges if not {*merge, "".join(merge)} <= known), None):
        raise ValueError(f"{path}: tokenizer.ggml.merges joins {' and '.join(unknown)}, not all of them tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut.ignores_merges))
    backend.pre_tokenizer = cut.pre_tokenizer()
    if cut.is_nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(_added(tokens, types, _CONTROL))
    backend.add_tokens(_added(tokens, types, _USER_DEFINED))
    return backend, declared_in_gguf(file.scalars(), tokens, begins=cut.begins, path=path)


def _added(tokens: Sequence[str], types: Sequence[int], kind: int) -> list[AddedToken]:
    special = kind == _CONTROL
    pairs = zip(tokens, types, strict=True)
    return [AddedToken(token, normalized=False, special=special) for token, type_ in pairs if type_ == kind]


def _expect(file: GGUFFile, key: str, known: tuple[str, ...]) -> str:
    value = file.string(key)
    if value not in known:
        raise ValueError(f"{file.path}: {key} is {value!r}; supported: {', '.join(known)}")
    return value


def _merge_pair(path: str, merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        raise ValueError(f"{path}: tokenizer.ggml.merges holds {merge!r}, not two tokens and a space")
    return left, right
