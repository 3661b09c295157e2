"""A module's server of one model that says what its script says, and a browser."""

import shutil

import pytest
from serving_fakes import Script, left_clean, serve

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


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
    if BROWSER is None or DRIVER is None:
        pytest.skip("no Chromium with its chromedriver here (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield started
    started.quit()
