"""The evaluator that exports a Hugging Face folder at chosen steps: `<workdir>/exports/<step>`.

What is written is what `safelm convert` makes of the step's checkpoint: config, weights (adapters merged), vocabulary
with the harm tag, chat template. A folder appears whole or not at all. A resumed run that comes to a step again keeps
the folder if it is of the same parameters, bit for bit, and writes it anew if not.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from safelm.checkpoints import integrity
from safelm.formats import huggingface
from safelm.io import records, remote
from safelm.io.files import whole_folder
from safelm.models import lora, routing
from safelm.models.decoder import ModelConfig
from safelm.text.tokenizer import Tokenizer
from safelm.train.evaluators import Stopped
from safelm.train.types import Params

RECORD = "safelm_export.json"  # the last file of an export


class HuggingFaceExport:
    """An evaluator: every process takes part, the first one writes."""

    name = "export"

    def __init__(
        self,
        every_steps: int,
        at_steps: Collection[int],
        workdir: str,
        model: ModelConfig,
        tokenizer: Tokenizer,
        *,
        dtype: str,
        ablate: bool = False,
        saw_tag: Callable[[], bool | None],
        should_stop: Callable[[], bool],
        note: Callable[[str], None],
    ):
        """`saw_tag`: whether the model was trained on the harm tag so far; `note` is given a line for people.

        `dtype`: of the stored weights; `ablate`: without designated units.
        """
        self._ablate, self._saw_tag = ablate, saw_tag
        self.every_steps, self.at_steps = every_steps, frozenset(at_steps)
        self._folder = f"{workdir.rstrip('/')}/exports"
        self._model, self._tokenizer, self._dtype = model, tokenizer, dtype
        self._should_stop, self._note = should_stop, note

    def __call__(self, params: Params, step: int) -> dict[str, float]:
        """Raises `Stopped` before it begins if the run is to stop, OSError naming the file if it can't be written."""
        if self._should_stop():
            raise Stopped
        record = {"step": step, "dtype": self._dtype, "parameters": integrity.fingerprints(params)}
        record |= {"ablated": True} if self._ablate else {}
        if self._is_there(step, record):
            return {}
        whole = jax.tree.map(_gathered, params)
        if jax.process_index() == 0:
            self._write(f"{self._folder}/{step}", whole, record)
            self._note(f"step {step}  exported to {self._folder}/{step}")
        return {}

    def _is_there(self, step: int, record: dict[str, Any]) -> bool:
        """Whether the first process finds an export of the same parameters; all processes answer the same."""
        found = jax.process_index() == 0 and _read(f"{self._folder}/{step}/{RECORD}") == record
        if jax.process_count() == 1:
            return found
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(found)))

    def _write(self, target: str, params: Params, record: dict[str, Any]) -> None:
        """Replaces what is there by an export of other parameters, and first of all the record that calls it whole."""
        if not remote.is_remote(target):
            (Path(target) / RECORD).unlink(missing_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            with whole_folder(Path(target), "exports") as folder:
                self._fill(folder, params)
                records.write(folder / RECORD, record)
            return
        with contextlib.suppress(FileNotFoundError):
            remote.remove(f"{target}/{RECORD}")
        with tempfile.TemporaryDirectory(prefix="safelm-export-") as folder:
            self._fill(Path(folder), params)
            for path in sorted(Path(folder).iterdir()):
                remote.upload(str(path), f"{target}/{path.name}")
        records.write(f"{target}/{RECORD}", record)

    def _fill(self, folder: Path, params: Params) -> None:
        config, whole = (routing.ablated if self._ablate else lora.merged)(self._model, params)
        told = {"dtype": self._dtype, "saw_tag": self._saw_tag()}
        huggingface.write_folder(folder, config, whole, self._tokenizer, **told)


def _gathered(leaf: jax.Array) -> np.ndarray | None:
    """An array as a whole in the first process; None in the others, which only help."""
    if jax.process_count() == 1:
        return np.asarray(leaf)
    whole = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(whole) if jax.process_index() == 0 else None


def _read(path: str) -> Any:
    try:
        return records.read(path, "")
    except (OSError, ValueError):
        return None
