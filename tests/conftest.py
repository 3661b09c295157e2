"""Eight CPU devices for every test, and jaxtyping's shapes checked by beartype while testing."""

import os

os.environ["XLA_FLAGS"] = " ".join(
    [*os.environ.get("XLA_FLAGS", "").split(), "--xla_force_host_platform_device_count=8"]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from jaxtyping import install_import_hook

_hook = install_import_hook(["safelm", "data_tasks"], "beartype.beartype")
