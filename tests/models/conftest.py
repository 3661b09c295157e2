"""Fixtures for what runs in the C++ kernels: every build that this CPU can run, or a reason to skip."""

import pytest

from safelm.models.cpu_kernels import building


@pytest.fixture(scope="module")
def native():
    """Skips where there is no compiler or no CPU for them."""
    if isinstance(found := building.find(), str):
        pytest.skip(f"no CPU kernels: {found}")


@pytest.fixture(params=[vectors.name for vectors in building.VECTORS])
def vectors(request, native, monkeypatch):
    """Every build that this CPU can run, in turn."""
    (wanted,) = (each for each in building.VECTORS if each.name == request.param)
    if wanted not in building.usable_vectors(building._cpu_flags()):
        pytest.skip(f"no {wanted.name} here")
    building.register(wanted)
    monkeypatch.setattr(building, "find", lambda: wanted)
