"""Several processes of one run: their start, their agreement, their barriers, and how they leave together.

Every process runs the same program on its own devices; what one decides alone (to stop, to fail) would leave the others
waiting in a collective. With one process everything here is free and does nothing.

- `start` joins the processes; from then on a thread meets its like in the others every few seconds, so that a process
  that dies ends the others with one line that names it, instead of a collective that never returns.
- `agree` refuses workers whose config, code, libraries or data differ, before the first step.
- `barrier` waits for all, not for ever, and names who is missing.
- `leave` ends a process that failed without waiting for the rest; `finish` ends all of them after the last step.

Leaving at the same step (SIGTERM on one worker of several): make one `AnyProcess` before the loop, call it once a step
with this process's own flag, and save and leave in the step whose call returns True. It does so in all of them.
Install handlers of SIGTERM after the start: `jax.distributed.initialize` installs its own, which a later one replaces.

Barriers are those of JAX's coordination service, through Orbax's public `multihost`: JAX's own client is private, and a
barrier made of a collective (`multihost_utils.sync_global_devices`) knows no timeout. If the coordinator itself
(process 0) dies, JAX ends the others at once, with its own message ("the leader task died"), before we can.
"""

import collections
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import multihost

LOST_WORKER = 4  # exit code: another process is gone; start all of them again
_LONGEST_SILENCE_S = 90.0
_MAX_DIFFERENCES = 5
_LIBRARIES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")

_timeout_s = 300.0
_hosts: list[str] = []  # host name of every process, once they have met
_times_met: collections.Counter[str] = collections.Counter()
_finished = threading.Event()


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_s: float = 300.0,
) -> None:
    """Joins this process with the run's others; call it before anything else of JAX, in every process.

    Where JAX knows the cluster (TPU pods, Slurm, Open MPI, Kubernetes), no argument is needed.

    Args:
      coordinator_address: host:port on which process 0 will listen.
      process_id: 0 to num_processes - 1.
      timeout_s: how long to wait for the others, here and in every barrier. If they don't start, the process ends.

    Raises:
      ValueError: arguments that don't fit together, or none where JAX can't find them out.
    """
    global _timeout_s
    _timeout_s = timeout_s
    _check_start(coordinator_address, num_processes, process_id)
    silence_s = min(timeout_s, _LONGEST_SILENCE_S)
    patience_s = timeout_s + (2.0 if process_id else 0.0)  # process 0 first: it sees who has come
    waiting = threading.Timer(patience_s, _end_alone, (coordinator_address, num_processes, process_id))
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=int(timeout_s) + 60,  # ends the process with less of a message than ours
            heartbeat_timeout_seconds=3 * int(silence_s) + 30,
        )
    except ValueError as error:
        raise ValueError(
            f"--distributed: JAX finds no cluster here ({error}): give --coordinator_address=HOST:PORT, "
            "--num_processes and --process_id"
        ) from error
    finally:
        waiting.cancel()
    if jax.process_count() == 1:
        return
    barrier("start")
    if jax.device_count() != jax.local_device_count() * jax.process_count():
        raise ValueError(
            f"the processes have different numbers of devices: this one {jax.local_device_count()}, all "
            f"{jax.process_count()} together {jax.device_count()}"
        )
    _hosts[:] = [json.loads(text) for text in _gather(json.dumps(socket.gethostname()))]
    threading.Thread(target=_watch, args=(silence_s,), name="watch", daemon=True).start()


def _check_start(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    flags = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in flags.items() if value is None]
    if len(missing) == len(flags):
        return
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given too: the three flags of a process go together")
    if not re.fullmatch(r".+:\d+", coordinator_address):
        raise ValueError(f"--coordinator_address={coordinator_address}: must be HOST:PORT")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id={process_id}: must be 0 to --num_processes - 1 = {num_processes - 1}")


def _end_alone(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    who = "this process" if process_id is None else f"process {process_id} of {num_processes}"
    line = f"not all processes have started within {_timeout_s:g} s: {who} waits"
    if coordinator_address is not None:
        line += f" for them at {coordinator_address}"
        if process_id == 0 and (come := _connected(int(coordinator_address.rsplit(":", 1)[1]))) is not None:
            line += f"; {max(sum(come.values()) - 1, 0)} of {num_processes - 1} others have come"  # one is itself
            line += f" (connected from {', '.join(sorted(come))})" if sum(come.values()) > 1 else ""
    _end(line, LOST_WORKER)


def _connected(port: int) -> Mapping[str, int] | None:
    """How many connections to a port of this machine there are from each address, where Linux tells."""
    found: collections.Counter[str] = collections.Counter()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(table, encoding="ascii") as file:
                rows = [line.split() for line in file.readlines()[1:]]
        except OSError:
            continue
        for _, local, remote, state, *_ in rows:
            if state == "01" and int(local.rsplit(":", 1)[1], 16) == port:  # established
                words = bytes.fromhex(remote.split(":")[0])[-4:]  # the IPv4 part of a mapped address too
                found[".".join(str(byte) for byte in reversed(words))] += 1
    return found or None


def worker(index: int) -> str:
    """The name of a process in messages."""
    return f"worker {index} ({_hosts[index]})" if index < len(_hosts) else f"worker {index}"


def barrier(name: str, *, timeout_s: float | None = None) -> None:
    """Waits until every process is at the barrier of this name; TimeoutError names those that aren't in time."""
    if jax.process_count() == 1:
        return
    timeout_s = _timeout_s if timeout_s is None else timeout_s
    _times_met[name] += 1
    try:
        wait = multihost.get_barrier_sync_fn()
        wait(key=f"safelm/{name}/{_times_met[name]}", timeout_ms=int(timeout_s * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(f"barrier {name!r}: after {timeout_s:g} s {_missing(str(error))} not there") from error


def _missing(text: str) -> str:
    """Who is missing, in the words of the coordination service's error."""
    found = re.search(r"timed out task names:((?:\s*\d+)+)", text) or re.search(r"[Tt]ask:? (\d+)", text)
    indices = sorted({int(index) for index in found[1].split()} - {jax.process_index()}) if found else []
    if not indices:
        return f"not all are ({text.splitlines()[0]}), someone is"
    return f"{' and '.join(worker(index) for index in indices)} {'is' if len(indices) == 1 else 'are'}"


def _watch(silence_s: float) -> None:
    """Meets the other processes' watch threads again and again, until one doesn't come."""
    wait = multihost.get_barrier_sync_fn()
    for count in itertools.count():
        try:
            wait(key=f"safelm/alive/{count}", timeout_ms=int(silence_s * 1000))
        except jax.errors.JaxRuntimeError as error:
            if not _finished.is_set():
                _let_others_end()
                _end(f"{_missing(str(error))} gone: no sign of life for {silence_s:g} s", LOST_WORKER)
            return
        if _finished.wait(silence_s / 10):
            return


def lost(error: Exception) -> str | None:
    """A line that says which processes are gone, if that is why JAX raised `error` in this one; else None."""
    if jax.process_count() == 1:
        return None
    try:
        barrier("after an error", timeout_s=min(10.0, _timeout_s))
    except TimeoutError as missing:
        return f"{missing}, and its work with it: {str(error).splitlines()[0]}"
    return None


def finish() -> None:
    """Waits for the others at the end of a run; TimeoutError names those that don't come."""
    barrier("end")
    _finished.set()


def leave(code: int) -> NoReturn:
    """Ends the process, without waiting for processes that are in the midst of something.

    A normal exit would wait minutes for them in JAX; they end when they find this one gone.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        with contextlib.suppress(TimeoutError):
            barrier("leave", timeout_s=min(5.0, _timeout_s))  # all have failed alike: each has said so before any ends
            _let_others_end()
        _finished.set()
        _end(None, code)
    sys.exit(code)


def _let_others_end() -> None:
    """Has the process of JAX's coordinator wait a second: those that miss the coordinator are aborted by JAX."""
    time.sleep(jax.process_index() == 0)


def _end(line: str | None, code: int) -> None:
    if line is not None:
        print(f"python -m safelm.train: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def agree(values: Mapping[str, Any]) -> None:
    """Compares nested values (JSON), the code, the libraries and what the environment tells XLA over all processes.

    Raises ValueError, the same in all of them, naming each value that differs and the worker that has another one.
    """
    if jax.process_count() == 1:
        return
    barrier("agree")
    views = [json.loads(text) for text in _gather(json.dumps(dict(_flat({**values, **_installation()})), default=str))]
    if lines := differences(views, [worker(index) for index in range(len(views))]):
        more = f"; and {len(lines) - _MAX_DIFFERENCES} more" if len(lines) > _MAX_DIFFERENCES else ""
        raise ValueError(f"the workers of a run must be alike: {'; '.join(lines[:_MAX_DIFFERENCES])}{more}")


def _installation() -> dict[str, Any]:
    """The code and libraries that a compiled program depends on."""
    sources, root = hashlib.sha256(), Path(__file__).parent.parent
    for path in sorted(root.rglob("*.py")):
        sources.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    variables = {name: os.environ.get(name) for name in _VARIABLES}
    return {"code of safelm": sources.hexdigest()[:12], "version of": versions, "environment": variables}


def differences(views: Sequence[Mapping[str, Any]], workers: Sequence[str]) -> list[str]:
    """Lines that name every value in which a worker's view differs from what most have (or, in a tie, the first)."""
    lines = []
    for name in sorted(set().union(*views)):
        held = [json.dumps(view.get(name), sort_keys=True) for view in views]
        usual = max(held, key=lambda value: (held.count(value), -held.index(value)))
        with_usual = workers[held.index(usual)]
        lines += [
            f"{name} is {theirs} on {who}, {usual} on {with_usual}"
            for theirs, who in zip(held, workers, strict=True)
            if theirs != usual
        ]
    return lines


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for name, value in values.items():
        pairs += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return pairs


def _gather(text: str) -> list[str]:
    """Every process's text, in the order of the processes."""
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]


def check_shared(folder: str) -> None:
    """Raises OSError naming the worker if a file that worker 0 writes into the folder isn't seen by every other."""
    if jax.process_count() == 1:
        return
    name = _gather(f".seen-by-all-{os.urandom(8).hex()}")[0]
    path = epath.Path(folder) / name
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    barrier("shared folder")
    seen = [text == "True" for text in _gather(str(path.exists()))]
    if jax.process_index() == 0:
        path.unlink()
    if not all(seen):
        raise OSError(
            f"--workdir={folder}: {worker(seen.index(False))} doesn't see what {worker(0)} writes there: it must be "
            "one folder that all share (gs://, NFS)"
        )


class AnyProcess:
    """Tells all processes, at the same call, that at least one of them has raised its flag.

    Call it equally often in every process, always from the thread that runs the steps: each call starts a reduction of
    one number over all devices behind the work already under way, and returns the result of the call before. So it
    waits for nothing the loop has not waited for, and answers one call late (with one process: at once).
    """

    def __init__(self):
        self._alone = jax.process_count() == 1
        self._pending: jax.Array | None = None
        if not self._alone:
            mesh = Mesh(np.array(jax.devices()), ("devices",))
            self._sharding = NamedSharding(mesh, PartitionSpec("devices"))
            self._max = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, flag: bool) -> bool:
        """True if any process passed True to the call before this one; the same answer in every process."""
        if self._alone:
            return bool(flag)
        flags = np.full(jax.local_device_count(), flag, np.int32)
        raised = self._pending is not None and bool(self._pending)
        self._pending = self._max(jax.make_array_from_process_local_data(self._sharding, flags))
        return raised
