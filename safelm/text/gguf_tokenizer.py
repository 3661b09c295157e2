"""The tokenizer inside a GGUF file, rebuilt for the `tokenizers` package.

A GGUF file carries vocabulary, merges and token types, but only the *name* of its pre-tokenizer; those known here are
in `_PRE_TOKENIZERS`. Anything else is refused: a wrong pre-tokenizer would encode text almost, but not quite, right.
"""

from collections.abc import Sequence

import gguf
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from safelm.io.gguf_file import GGUFFile
from safelm.text.conventions import Declared, declared_in_gguf

_ARCHITECTURES = ("llama",)
_CONTROL, _USER_DEFINED = int(gguf.TokenType.CONTROL), int(gguf.TokenType.USER_DEFINED)


def smollm_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """SmolLM2's: every digit alone, then GPT-2's word pattern over bytes, no space put in front."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _gpt2_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


_PRE_TOKENIZERS = {"smollm": smollm_pre_tokenizer, "gpt-2": _gpt2_pre_tokenizer}


def read_gguf_tokenizer(path: str) -> tuple[tokenizers.Tokenizer, Declared]:
    """The byte-level BPE of the GGUF file at `path`, and what the file says about texts.

    Its control tokens become special tokens.

    Raises:
        ValueError: not a whole GGUF file, or an architecture, tokenizer model or pre-tokenizer not known here.
    """
    file = GGUFFile(path)
    _expect(file, "general.architecture", _ARCHITECTURES)
    _expect(file, "tokenizer.ggml.model", ("gpt2",))
    pre_name = _expect(file, "tokenizer.ggml.pre", tuple(_PRE_TOKENIZERS))

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
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre_name]()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(_added(tokens, types, _CONTROL))
    backend.add_tokens(_added(tokens, types, _USER_DEFINED))
    return backend, declared_in_gguf(file.scalars(), tokens, path=path)


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
