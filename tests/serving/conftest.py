"""A module's server of one model that says what its script says, and a browser."""

import browsers
import pytest
from serving_fakes import Script, left_clean, serve


@pytest.fixture(scope="module")
def script():
    return Script()


@pytest.fixture(scope="module")
def shared(request, script):
    """A server with the module's LIMITS."""
    with serve(script, limits=request.module.LIMITS) as server:
        yield server


@pytest.fixture
def server(shared, script):
    """The shared server; afterwards nothing is left in it."""
    with left_clean(shared, script):
        yield shared


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """A headless browser; what it logs is kept."""
    yield from browsers.started(tmp_path_factory.mktemp("browser"))
