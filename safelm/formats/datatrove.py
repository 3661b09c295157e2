"""datatrove's token files: `NAME.ds` has tokens end to end, `NAME.ds.index` where each document ends.

Little-endian (datatrove, `pipeline/tokens/tokenizer.py`): `.ds` uint16 or uint32; `.ds.index` a uint64 for each
document, the number of tokens up to its end; `.ds.metadata` three lines of text, of which the first is the tokenizer's
name, `|` and the bytes of a token, the second the number of tokens, the third the same for people.
"""

import os
import re

import numpy as np
from jaxtyping import Integer

from safelm.formats.token_files import FlatFile
from safelm.io import files

_DTYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
_AT_ONCE = 1 << 20


class DatatroveFile(FlatFile):
    """The documents of a .ds and its .ds.index."""

    def __init__(self, path: str, token_bytes: int | None = None):
        """`token_bytes`: where there is no .ds.metadata, what it would say (2 or 4).

        Raises FileNotFoundError if the index is missing, ValueError naming what is wrong with a file.
        """
        index, size = f"{path}.index", os.path.getsize(path)
        dtype = _DTYPES[_token_bytes(path, size, token_bytes)]
        if (index_size := os.path.getsize(index)) % 8 or not index_size:
            raise ValueError(f"{index}: {index_size} bytes: not a list of uint64, or empty")
        ends = np.memmap(index, "<u8", "r")
        before = 0
        for start in range(0, len(ends), _AT_ONCE):
            part = np.concatenate([[before], ends[start : start + _AT_ONCE].astype(np.int64)])
            if (wrong := np.diff(part) <= 0).any():
                bad = int(np.argmax(wrong))
                raise ValueError(
                    f"{index}: document {start + bad} ends at token {part[bad + 1]} and begins at {part[bad]}"
                )
            before = int(part[-1])
        if size != before * dtype.itemsize:
            kind = "truncated" if size < before * dtype.itemsize else "longer than its index says"
            raise ValueError(f"{path}: {kind}: {size} bytes, the index has {before} tokens of {dtype.itemsize}")

        def lengths(start: int, stop: int) -> np.ndarray:
            first = 0 if start == 0 else int(ends[start - 1])
            return np.diff(ends[start:stop].astype(np.int64), prepend=first)

        super().__init__(path, np.memmap(path, dtype, "r"), len(ends), lengths)


def write_index(path: str, bounds: Integer[np.ndarray, " bounds"], *, tokenizer: str, token_bytes: int) -> None:
    """Writes the .ds.index and .ds.metadata of a .ds.

    Args:
      path: of the .ds.
      bounds: 0 and every document's end, in tokens.
      tokenizer: its name.
    """
    with files.synced(f"{path}.index") as file:
        for start in range(1, len(bounds), _AT_ONCE):
            file.write(np.asarray(bounds[start : start + _AT_ONCE]).astype("<u8").tobytes())
    count = int(bounds[-1])
    files.write_whole(f"{path}.metadata", f"{tokenizer}|{token_bytes}\n{count}\n{_for_people(count)}")


def _token_bytes(path: str, size: int, given: int | None) -> int:
    metadata = f"{path}.metadata"
    if not os.path.exists(metadata):
        if given in _DTYPES:
            return given
        raise ValueError(f"{path}: no {os.path.basename(metadata)} says how many bytes a token has: give --token_bytes")
    with open(metadata, encoding="utf-8", errors="replace") as file:
        first, second = [*file.read(1 << 16).split("\n"), ""][:2]
    found = re.search(r"\|([24])$", first)
    if not found or not second.isascii() or not second.isdigit():
        raise ValueError(f"{metadata}: its lines must be TOKENIZER|2 or TOKENIZER|4, then a number of tokens")
    if size != int(second) * int(found[1]):
        raise ValueError(f"{path}: {size} bytes, its metadata says {second} tokens of {found[1]} bytes")
    return int(found[1])


def _for_people(count: int) -> str:
    for factor, unit in ((10**12, "TT"), (10**9, "GT"), (10**6, "MT"), (10**3, "kT")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} T"
