"""The numpy files of token stores: written as streams, mapped into memory, checksummed in blocks."""

import errno
import hashlib
import os
import zlib
from typing import BinaryIO

import numpy as np

from safelm.io import files

BLOCK_BYTES = 1 << 16  # of a file's numbers, each with a checksum of its own


def open_array(path: str, wanted_bytes: int) -> np.ndarray:
    """A numpy file mapped into memory; FileNotFoundError if it is gone, ValueError for another size (bytes) or damage.

    Every mapped file is an open file of the process, whose limit is raised as far as it may be when it is met; OSError
    says so where that is not enough.
    """
    try:
        size = os.path.getsize(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: shard is missing, though the manifest lists it") from None
    if size != wanted_bytes:
        raise ValueError(f"{path}: truncated or replaced: {size} bytes, the manifest says {wanted_bytes}")
    return _mapped(path).view(np.ndarray)


def _mapped(path: str) -> np.ndarray:
    while True:
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            if error.errno == errno.EMFILE and files.allow_more_open_files():
                continue
            if error.errno in (errno.EMFILE, errno.ENOMEM):
                reason = f"{error.strerror}: more shards than this process may map; cache fewer, larger ones"
                raise OSError(error.errno, reason, path) from None
            raise
        except Exception as error:  # numpy raises many kinds for a header
            raise ValueError(f"{path}: damaged: its header is none of numpy's ({type(error).__name__})") from None


def check_array(path: str, array: np.ndarray, dtype: np.dtype, length: int) -> None:
    """ValueError names the file unless an array has this dtype and this many numbers."""
    if (array.dtype, array.shape) != (dtype, (length,)):
        raise ValueError(f"{path}: {array.shape} of {array.dtype}, the manifest says {length} of {dtype}")


def write_array(path: str, array: np.ndarray) -> None:
    """Writes a whole 1-D array and syncs it to the disk."""
    with open(path, "wb") as file:
        write_header(file, array.dtype, len(array))
        file.write(array.tobytes())
        files.sync(file)


def write_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    """Writes the header of a 1-D array; written again at the start with the final length, it fits exactly."""
    # numpy leaves room in the header for the first axis to grow.
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def finish(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    """Puts the final length into the header of a file written as a stream, and closes it."""
    file.seek(0)
    write_header(file, dtype, length)
    files.sync(file)
    file.close()


def checksums(path: str, data_bytes: int) -> tuple[str, np.ndarray]:
    """SHA-256 of a file, and the CRC-32 of every block of its last `data_bytes`."""
    digest, sums = hashlib.sha256(), []
    with open(path, "rb") as file:
        digest.update(file.read(os.path.getsize(path) - data_bytes))
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            sums.append(zlib.crc32(block))
    return digest.hexdigest(), np.asarray(sums, np.uint32)
