"""What TensorFlow's C++ says while it is imported is left out of standard error, and nothing else."""

import os

import pytest

from safelm.caching import shards


def test_lines_of_tensorflow_are_left_out_and_others_told_also_after_an_error(capfd):
    said = [
        "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
        "I0000 00:00:1795978807.826254    8079 port.cc:153] oneDNN custom operations are on.",
        "E0000 00:00:1795978841.060961    8079 cuda_platform.cc:52] failed call to cuInit: UNKNOWN ERROR (303)",
        "2026-01-01 10:00:00.123456: I tensorflow/core/util/port.cc:153] oneDNN custom operations are on.",
        "W safelm.x: this stays",
    ]
    with pytest.raises(ValueError, match="stop"), shards._without_lines_of_tensorflow():
        os.write(2, "\n".join(said).encode())
        raise ValueError("stop")
    os.write(2, b"and what follows\n")
    assert capfd.readouterr().err == "W safelm.x: this stays\nand what follows\n"
