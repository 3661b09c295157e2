"""Where a tuning run stands, beside its output folder: an interrupted one goes on after its last whole epoch."""

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp

from safelm.io import remote
from safelm.io.files import write_whole
from safelm.safety.classifier import tuning
from safelm.safety.classifier.examples import Example
from safelm.safety.embedding import Backbone

_logger = logging.getLogger(__name__)


def _path(output: str) -> pathlib.Path | None:
    place = pathlib.Path(output)
    return None if remote.is_remote(output) else place.parent / f"{place.name}.unfinished"


def remove(output: str) -> None:
    """Drops the state of a finished run."""
    if path := _path(output):
        path.unlink(missing_ok=True)


class Place:
    """The state file of a run: `<output>.unfinished`, one file that is always whole. None behind a URL."""

    def __init__(self, output: str, recipe: Any, texts: Sequence[Example], fingerprint: str):
        self._path = _path(output)
        said = json.dumps(
            [
                dataclasses.asdict(recipe),
                [(e.text, e.distribution, dict(e.kinds), e.group) for e in texts],
                fingerprint,
            ],
            default=str,
        )
        self._run = hashlib.sha256(said.encode("utf-8", "replace")).hexdigest()

    def write(self, state: tuning.State) -> None:
        """Keeps the state of the epoch just finished, in place of the one before."""
        if self._path is None:
            return
        data = flax.serialization.to_bytes({"run": self._run, "state": _plain(state)})
        write_whole(self._path, data)

    def read(self, backbone: Backbone, recipe: tuning.TuningRecipe, head: Any) -> tuning.State | None:
        """The state to go on from; None without one. ValueError if it is another run's or damaged."""
        if self._path is None or not self._path.exists():
            return None
        _, part = tuning.split(backbone, backbone.params, recipe.last_n)
        trained = {"backbone": part, "head": {name: jnp.asarray(value) for name, value in head.items()}}
        optimizer = recipe.optimizer(1).init(trained)
        like = {"run": "", "state": _plain(tuning.State(0, trained, optimizer, trained, (0.0, 0.0)))}
        try:
            found = flax.serialization.from_bytes(like, self._path.read_bytes())
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._path}: damaged; remove it to begin anew ({type(error).__name__})") from None
        if found["run"] != self._run:
            raise ValueError(
                f"{self._path}: belongs to a run with another recipe or other data; remove it or rename --output"
            )
        state = found["state"]
        _logger.info("going on after epoch %d", state["epoch"])
        return tuning.State(**{**state, "best_measure": tuple(map(float, state["best_measure"]))})


def _plain(state: tuning.State) -> dict[str, Any]:
    values = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return jax.device_get(values)
