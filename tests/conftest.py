"""Eight CPU devices for every test, jaxtyping's shapes checked by beartype while testing, slow tests if asked for."""

import atexit
import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

# Compiling costs more than running here, so it is done with few optimizations, and without the fusion emitters, which
# take two thirds of it (jaxlib 0.12 dies of the flag); SAFELM_TESTS_XLA is for processes that tests start with another
# number of devices.
os.environ["SAFELM_TESTS_XLA"] = "--xla_backend_optimization_level=0" + (
    " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith(("0.10.", "0.11."))
)
os.environ["XLA_FLAGS"] = " ".join(
    [
        *os.environ.get("XLA_FLAGS", "").split(),
        "--xla_force_host_platform_device_count=8",
        os.environ["SAFELM_TESTS_XLA"],
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# A program is compiled once, whichever worker, process or file needs it first. Made by the process that starts the
# workers, who find it among their variables.
if "SAFELM_TESTS_COMPILED" not in os.environ:
    os.environ["SAFELM_TESTS_COMPILED"] = tempfile.mkdtemp(prefix="safelm_compiled_")
    atexit.register(shutil.rmtree, os.environ["SAFELM_TESTS_COMPILED"], ignore_errors=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.environ["SAFELM_TESTS_COMPILED"])
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import pytest
import type_checks

import safelm  # noqa: F401  what this jaxlib needs is added to XLA_FLAGS, before anything uses JAX

type_checks.install("safelm", "data_tasks")

# The files that take longest begin, so that none of them ends alone (with --dist=loadfile --no-loadscope-reorder).
_LONGEST = (
    "inference/test_engine.py",
    "inference/test_safe_beam.py",
    "ladder/test_ladder.py",
    "train/test_parallel_matrix.py",
    "inference/test_inference.py",
    "formats/test_parity.py",
    "evaluate/test_capability_parity.py",
    "evaluate/test_capability.py",
    "evaluate/test_evaluation_suites.py",
    "project/test_docs.py",
    "api/test_api.py",
    "evaluate/test_evaluation.py",
    "models/test_model.py",
    "train/test_train_kill.py",
    "robustness/test_robustness.py",
    "caching/test_cache_tasks.py",
    "safety/test_embedding_models.py",
    "synthesis/test_synthesize.py",
    "text/test_text_growth.py",
)
_MAX_MAPPINGS = 15_000
_MAPPINGS = pathlib.Path("/proc/self/maps")
_NUM_LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run also the tests marked slow (as SAFELM_SLOW=1 does)")


def _runs_slow_tests(config) -> bool:
    """Whether asked to by flag, by variable or by the name of a test (FILE::NAME)."""
    is_asked = config.getoption("slow") or os.environ.get("SAFELM_SLOW", "0") == "1"
    return is_asked or any("::" in argument for argument in config.invocation_params.args)


def pytest_collection_modifyitems(config, items):
    """Leaves out slow tests unless asked for, and sorts the files of `_LONGEST` to the front."""
    left_out = [] if _runs_slow_tests(config) else [item for item in items if item.get_closest_marker("slow")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    config.stash[_NUM_LEFT_OUT] = len(left_out)
    place = {pathlib.Path(__file__).parent / name: at for at, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_sessionfinish(session):
    """A worker tells the process that started it, which collects nothing itself."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(_NUM_LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    if hasattr(node, "workeroutput"):  # each worker collects all
        node.config.stash[_NUM_LEFT_OUT] = node.workeroutput["left_out"]


def pytest_terminal_summary(terminalreporter, config):
    if count := config.stash.get(_NUM_LEFT_OUT, 0):
        terminalreporter.write_line(f"slow tests left out: {count}; scripts/test.sh --slow runs them too")


@pytest.hookimpl(trylast=True)  # after the file's fixtures are gone
def pytest_runtest_teardown(item, nextitem):
    """Drops compiled programs between files once they hold many mappings: Linux lets a process have 65,530.

    A worker that reaches the limit dies by a segmentation fault inside the compiler.
    """
    same_file = nextitem is not None and nextitem.path == item.path
    if same_file or not _MAPPINGS.exists():
        return
    with _MAPPINGS.open("rb") as lines:
        count = sum(1 for _ in lines)
    if count > _MAX_MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules whose time is mostly compiling programs that are tiny."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hugging Face hub on loopback that has nothing yet."""
    import fake_hub

    with fake_hub.serving(monkeypatch, tmp_path) as server:
        yield server
