"""What the extra parity brings: without it a test skips, or fails where SAFELM_PARITY=1 has asked for it."""

import importlib
import os
import pathlib
import types

import pytest

from safelm.safety import embedding

IS_ASKED_FOR = os.environ.get("SAFELM_PARITY") == "1"


def module(name: str) -> types.ModuleType:
    if IS_ASKED_FOR:
        return importlib.import_module(name)
    return pytest.importorskip(name, reason="needs the extra parity")


def weights(name: str) -> pathlib.Path:
    """Where the weights named "smollm2" (a GGUF file) or "minilm" (a folder) lie."""
    try:
        return embedding.installed_path(name)
    except FileNotFoundError as error:
        if IS_ASKED_FOR:
            raise
        pytest.skip(str(error))
