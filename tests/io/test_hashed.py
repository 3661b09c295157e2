"""Records in files by their hash: equal hashes together, nothing lost, nothing left behind."""

import itertools

import numpy as np
import pytest

from safelm.io import hashed
from safelm.io.hashed import HashedFiles

KIND = np.dtype([("hash", "<u8"), ("number", "<u4")])


@pytest.mark.parametrize("part_bytes", [1, 500, 1 << 20])
def test_equal_hashes_are_in_one_file_in_the_order_in_which_they_came(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr(hashed, "_BUFFER_BYTES", 300)
    rng, records = np.random.default_rng(0), np.zeros(900, KIND)
    records["hash"] = hashed.mixed(rng.integers(0, 200, 900).astype(np.uint64))
    records["number"] = np.arange(900)
    files = HashedFiles(str(tmp_path / "a"), KIND, 900, part_bytes)
    for at in range(0, 900, 70):
        files.add(records[at : at + 70], records["hash"][at : at + 70])
    files.add(records[:0], records["hash"][:0])
    groups = list(files.read())
    assert (len(groups) > 1) == (part_bytes < 1 << 20)
    seen = [set(group["hash"].tolist()) for group in groups]
    assert sum(map(len, seen)) == len(set().union(*seen)) == len(np.unique(records["hash"]))
    assert all(max(one) < min(other) for one, other in itertools.pairwise(seen))
    assert all((np.diff(group["number"].astype(int)) > 0).all() for group in groups)
    assert sorted(np.concatenate(groups)["number"].tolist()) == list(range(900))
    assert not list(tmp_path.iterdir())


def test_without_records_there_is_nothing(tmp_path):
    assert not list(HashedFiles(str(tmp_path / "a"), KIND, 0).read())
