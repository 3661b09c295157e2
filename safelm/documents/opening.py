"""Opens files of documents, local or remote, and decompresses them according to their first bytes."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from safelm.io import remote

PACKED = (".gz", ".zst", ".zstd", ".bz2", ".xz")  # suffixes of compressed files
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz"}
_SKIPPABLE = b"\x2a\x4d\x18"  # bytes 1 to 3 of a zstd frame that holds no content
_ZSTD_MAX_WINDOW = 1 << 31  # `zstd --long=31`, the format's own limit for 64-bit machines
_FEED_BYTES = 1 << 10  # of compressed data at once: it can stand for 32 MiB at most
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)  # what reading a damaged file raises, and OSError


MAX_WHOLE_BYTES = 1 << 30


def read_text(path: str) -> str:
    """The decompressed text of a whole file, without a byte order mark.

    Raises ValueError if it is damaged, not UTF-8 or longer than 1 GiB.
    """
    try:
        with open_binary(path, decompress=True) as file:
            content = file.read(MAX_WHOLE_BYTES + 1)
        if len(content) > MAX_WHOLE_BYTES:
            raise ValueError(f"{path}: longer than {MAX_WHOLE_BYTES >> 20} MiB; make JSON lines of it")
        return content.decode("utf-8-sig")
    except (UnicodeDecodeError, *DAMAGED) as error:
        raise ValueError(f"{path}: can't be read ({type(error).__name__})") from None


@contextlib.contextmanager
def open_binary(path: str, *, decompress: bool = False) -> Iterator[Any]:
    """Opens a file to read bytes.

    Args:
      decompress: whether to decompress it; the content decides how, not the name.

    Raises ValueError for a pipe, a device or anything else that is not a file, since reading it could block for ever.
    """
    with contextlib.ExitStack() as files:
        file = files.enter_context(_open(path))
        if decompress:
            kind = _compression(file)
            if kind:
                file = files.enter_context(_DECOMPRESSORS[kind](file))
        yield file


def is_compressed(path: str) -> bool:
    """Whether the file's first bytes are those of a compression format."""
    with _open(path) as file:
        return bool(_compression(file))


def check_regular(path: str) -> None:
    """Raises ValueError for a local path that is neither file nor folder, FileNotFoundError if nothing is there."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
        raise ValueError(f"{path}: not a file but {kinds.get(stat.S_IFMT(mode), 'something else')}")


def _open(path: str) -> Any:
    local = path.removeprefix("file://")
    if remote.is_remote(local):
        return remote.open_file(path)
    check_regular(local)
    return open(local, "rb")


def _compression(file: io.IOBase) -> str:
    begin = file.read(6)
    file.seek(0)
    if begin[1:4] == _SKIPPABLE and begin[0] >> 4 == 5:
        return "zstd"
    return next((kind for magic, kind in _MAGIC.items() if begin.startswith(magic)), "")


class _FrameReader(io.RawIOBase):
    """Decompresses consecutive frames, which bz2 and xz call streams.

    Raises EOFError if one is damaged or the file ends inside it. The classes of Python's `bz2` and `lzma` would end
    before a later stream that is damaged, without a word.
    """

    def __init__(self, file: io.IOBase, new_frame: Callable[[], Any], error: type[Exception]):
        """`new_frame` makes what decompresses one frame, and raises `error` if that is damaged."""
        self._file, self._new_frame, self._error = file, new_frame, error
        self._frame: Any = None
        self._output, self._at, self._input = b"", 0, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._at == len(self._output):
            if not self._decompress_more():
                return 0
        piece = self._output[self._at : self._at + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def _decompress_more(self) -> bool:
        """Adds decompressed bytes to the output, perhaps none; returns False at the end of the file."""
        data = self._input or self._file.read(_FEED_BYTES)
        self._input = b""
        if not data:
            if self._frame is not None:
                raise EOFError("the file ends inside a compressed frame")
            return False
        if self._frame is None:
            if not (data := data.lstrip(b"\0")):  # with which xz may fill up
                return True
            self._frame = self._new_frame()
        try:
            self._output, self._at = self._frame.decompress(data), 0
        except self._error as error:
            raise EOFError(str(error)) from error
        if self._frame.eof:
            self._input, self._frame = self._frame.unused_data, None
        return True


def _frames(file: io.IOBase, new_frame: Callable[[], Any], error: type[Exception]) -> io.BufferedReader:
    return io.BufferedReader(_FrameReader(file, new_frame, error), 1 << 20)


def _zstd_frames(file: io.IOBase) -> io.BufferedReader:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW)
    return _frames(file, decompressor.decompressobj, zstandard.ZstdError)


_DECOMPRESSORS: dict[str, Any] = {
    "gzip": lambda file: gzip.GzipFile(fileobj=file),
    "bz2": lambda file: _frames(file, bz2.BZ2Decompressor, OSError),
    "xz": lambda file: _frames(file, lzma.LZMADecompressor, lzma.LZMAError),
    "zstd": _zstd_frames,
}
