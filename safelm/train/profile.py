"""A profile of some steps by XLA's profiler, for TensorBoard or xprof: asked for in the config, or by SIGUSR1.

A trace ends as the step after its last one is dispatched; the devices may not be done with that last one by then.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator

import jax
from etils import epath
from ml_collections import ConfigDict

from safelm.io import remote


class Profile:
    """Traces `log.profile_steps` steps from `log.profile_start_step` on, and whenever it is asked to."""

    def __init__(self, workdir: str, log: ConfigDict, *, note: Callable[[str], None]):
        """Raises ValueError naming the field. Writes to `<workdir>/profile`."""
        if log.profile_start_step < 0:
            raise ValueError(f"log.profile_start_step is {log.profile_start_step}: it can't be negative (0: none)")
        if log.profile_steps < 1:
            raise ValueError(f"log.profile_steps is {log.profile_steps}: it must be at least 1")
        self._folder, self._log, self._note = f"{workdir}/profile", log, note
        self._last: int | None = None  # the step that ends the trace under way

    @contextlib.contextmanager
    def step(self, step: int, *, asked: bool) -> Iterator[None]:
        """Around every step; `asked`: begin a trace with this one."""
        if self._last is not None and step > self._last:
            self._stop()
        if self._last is None and (asked or step == self._log.profile_start_step):
            self._last = step + self._log.profile_steps - 1
            self._scratch = tempfile.mkdtemp(prefix="profile_") if remote.is_remote(self._folder) else self._folder
            jax.profiler.start_trace(self._scratch)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(Exception) if error_type else contextlib.nullcontext():
            if self._last is not None:
                self._stop()

    def _stop(self) -> None:
        self._last = None
        jax.profiler.stop_trace()
        if self._scratch != self._folder:
            _upload(epath.Path(self._scratch), epath.Path(self._folder))
        self._note(f"profile written to {self._folder}")


def _upload(source: epath.Path, target: epath.Path) -> None:
    for path in source.glob("**/*"):
        if path.is_file():
            path.copy(target / str(path.relative_to(source)), overwrite=True)
    source.rmtree()
