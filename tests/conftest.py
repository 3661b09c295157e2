"""Eight CPU devices for every test, and jaxtyping's shapes checked by beartype while testing."""

import atexit
import os
import shutil
import tempfile

# Compiling costs more than running here, so it is done with few optimizations; SAFELM_TESTS_XLA is for processes
# that tests start with another number of devices.
os.environ["SAFELM_TESTS_XLA"] = "--xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = " ".join(
    [
        *os.environ.get("XLA_FLAGS", "").split(),
        "--xla_force_host_platform_device_count=8",
        os.environ["SAFELM_TESTS_XLA"],
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# What `tiny_runs` trains is compiled once by each worker, whichever file comes first, and by the processes it starts.
os.environ["SAFELM_TESTS_COMPILED"] = tempfile.mkdtemp(prefix="safelm_compiled_")
atexit.register(shutil.rmtree, os.environ["SAFELM_TESTS_COMPILED"], ignore_errors=True)

from jaxtyping import install_import_hook  # noqa: E402

_hook = install_import_hook(["safelm", "data_tasks"], "beartype.beartype")
