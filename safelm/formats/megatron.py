"""Megatron's indexed token files: `NAME.bin` has the tokens of all sequences end to end, `NAME.idx` where each is.

The index, little-endian (Megatron-LM, `megatron/core/datasets/indexed_dataset.py`):

    9 bytes   MMIDIDX, two zeros
    uint64    version 1
    uint8     the tokens' dtype, a code of `DTYPES`
    uint64    number of sequences n
    uint64    number of entries d in the last list
    int32     n lengths, in tokens
    int64     n places of a sequence's first byte in the .bin
    int64     d numbers of a document's first sequence, and n at the end

Most files have a sequence for every document, or for every window of fixed length.
"""

import os
import struct
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Integer

from safelm.formats.token_files import FlatFile
from safelm.io import files

MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # 6 and 7 are floats
_HEADER = struct.Struct("<9sQBQQ")
_UINT16_BELOW = 65_500  # Megatron's own choice; beyond it has int32 and no uint32
_AT_ONCE = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that Megatron gives the tokens of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_BELOW else np.int32)


class IndexedFile(FlatFile):
    """The sequences of a .bin and its .idx.

    Attributes:
      documents: the last list of the index.
      one_each: whether every sequence is a document of its own.
    """

    def __init__(self, prefix: str):
        """`prefix`: the path without `.bin` or `.idx`.

        Raises FileNotFoundError if one of the two is missing, ValueError naming what is wrong with one of them.
        """
        index, path = f"{prefix}.idx", f"{prefix}.bin"
        size = os.path.getsize(index)
        dtype, count, num_documents = _header(index, size)
        lengths = np.memmap(index, "<i4", "r", _HEADER.size, (count,))
        pointers = np.memmap(index, "<i8", "r", _HEADER.size + 4 * count, (count,))
        self.documents = np.memmap(index, "<i8", "r", _HEADER.size + 12 * count, (num_documents,))
        _check_places(index, path, lengths, pointers, dtype)
        self.one_each = _check_documents(index, self.documents, count)
        tokens = np.memmap(path, dtype, "r")
        super().__init__(path, tokens, count, lambda start, stop: np.asarray(lengths[start:stop]))


def write_index(
    path: str,
    dtype: np.dtype,
    lengths: Iterable[Integer[np.ndarray, " n"]],
    num_sequences: int,
    documents: Integer[np.ndarray, " d"] | None = None,
) -> None:
    """Writes an .idx.

    Args:
      dtype: of the tokens.
      lengths: of all sequences, a part at a time; gone through twice, so a list or the like.
      documents: the last list; None: every sequence is a document.
    """
    count = num_sequences + 1 if documents is None else len(documents)
    code = next(code for code, known in DTYPES.items() if np.dtype(known) == dtype)
    with files.synced(path) as file:
        file.write(_HEADER.pack(MAGIC, 1, code, num_sequences, count))
        for part in lengths:
            file.write(part.astype("<i4").tobytes())
        place = 0
        for part in lengths:
            stops = place + np.cumsum(part, dtype=np.int64) * dtype.itemsize
            file.write(np.concatenate([[place], stops[:-1]]).astype("<i8").tobytes() if len(part) else b"")
            place = int(stops[-1]) if len(part) else place
        for start in range(0, count, _AT_ONCE):
            stop = min(start + _AT_ONCE, count)
            part = np.arange(start, stop) if documents is None else documents[start:stop]
            file.write(part.astype("<i8").tobytes())


def _header(index: str, size: int) -> tuple[np.dtype, int, int]:
    """The tokens' dtype and the lengths of the lists; ValueError if it is no such index or another size (bytes)."""
    with open(index, "rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(MAGIC):
        raise ValueError(f"{index}: not a Megatron index: it doesn't begin with MMIDIDX, or is cut in its header")
    _, version, code, count, num_documents = _HEADER.unpack(head)
    if version != 1:
        raise ValueError(f"{index}: version {version}, this program reads 1")
    if code not in DTYPES:
        raise ValueError(f"{index}: dtype code {code}: tokens have one of {', '.join(map(str, DTYPES))}")
    wanted = _HEADER.size + 12 * count + 8 * num_documents
    if size != wanted:
        hint = "; multimodal files aren't read" if size == wanted + count else ""
        raise ValueError(
            f"{index}: {size} bytes, {count} sequences and {num_documents} document places take {wanted}{hint}"
        )
    if not count:
        raise ValueError(f"{index}: it has no sequences")
    return np.dtype(DTYPES[code]).newbyteorder("<"), count, num_documents


def _check_places(index: str, path: str, lengths: np.ndarray, pointers: np.ndarray, dtype: np.dtype) -> None:
    """ValueError unless the sequences lie end to end in the .bin and fill it."""
    place = 0
    for start, sizes in _in_parts(lengths):
        if (sizes <= 0).any():
            bad = start + int(np.argmax(sizes <= 0))
            raise ValueError(f"{index}: sequence {bad} has {int(lengths[bad])} tokens, must have at least 1")
        stops = place + np.cumsum(sizes, dtype=np.int64) * dtype.itemsize
        starts = np.concatenate([[place], stops[:-1]])
        if (wrong := np.asarray(pointers[start : start + len(sizes)]) != starts).any():
            bad = int(np.argmax(wrong))
            found, wanted = int(pointers[start + bad]), int(starts[bad])
            raise ValueError(
                f"{index}: sequence {start + bad} is at byte {found} of the .bin; end to end it is at {wanted}"
            )
        place = int(stops[-1])
    size = os.path.getsize(path)
    if size != place:
        kind = "truncated" if size < place else "longer than its index says"
        raise ValueError(f"{path}: {kind}: {size} bytes, the index has {len(lengths)} sequences of {place} bytes")


def _check_documents(index: str, documents: np.ndarray, count: int) -> bool:
    """Whether every sequence is a document; ValueError if the last list names no sequences in order."""
    before = -1
    for _, part in _in_parts(documents):
        if (np.diff(part, prepend=before) <= 0).any():
            raise ValueError(f"{index}: its document places don't increase: a document without sequences, or damage")
        before = int(part[-1])
    if not len(documents) or documents[0] != 0 or before != count:
        raise ValueError(f"{index}: its document places don't go from 0 to its {count} sequences")
    return len(documents) == count + 1


def _in_parts(numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(numbers), _AT_ONCE):
        yield start, np.asarray(numbers[start : start + _AT_ONCE])
