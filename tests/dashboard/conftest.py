"""A browser."""

import browsers
import pytest


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """A headless browser; what it logs is kept."""
    yield from browsers.started(tmp_path_factory.mktemp("browser"))
