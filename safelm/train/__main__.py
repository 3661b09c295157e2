r"""Trains a model: pretraining, instruction tuning, finetuning, as the config says.

    python -m safelm.train --config=configs/quickstart.py:safety --workdir=runs/safety [--config.a.b=value ...]

The workdir (local or gs://) gets `config.json`, `tokenizer/`, `metrics.jsonl`, `events.jsonl`, `tensorboard/` and
`checkpoints/`. To resume, run the same command again: it goes on from the newest checkpoint, bit for bit as if it had
never stopped. SIGTERM and Ctrl-C save and end it with code 143 and 130; bad input or a disk that is full end it with 2,
numbers that aren't finite with 3. SIGUSR1 makes a profile of the next steps.
`--dry_run` checks everything, prints parameters, memory, tokens, steps, time and the settings that are not defaults,
and trains nothing. It needs no --workdir. A tokenizer, data or devices that are not there yet are named, not checked.

A decay of its own from a checkpoint of a wsd run's stable phase, which goes on unharmed (`safelm.train.resume`):

    python -m safelm.train --config=... --workdir=runs/decayed --config.branch.workdir=runs/trunk \
        --config.branch.step=50000 --config.optimizer.decay_steps=5000
"""

import sys
from collections.abc import Sequence

import jax
from absl import app, flags
from absl import logging as absl_logging

from safelm.io import host_memory
from safelm.train import flags as train_flags
from safelm.train import processes
from safelm.train.preemption import Preempted
from safelm.train.run import train

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, local or gs://.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One process of several, which JAX finds by itself on TPU pods.")
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "Where JAX doesn't: HOST:PORT that process 0 takes.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator_address: how many there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator_address: which this is, from 0.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check everything, print the run's size, train nothing.")


def _main(_: Sequence[str]) -> None:
    host_memory.keep_freed_memory()
    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax logs whole tracebacks of what is raised here anyway
    try:
        if not train_flags.CONFIG.value:
            raise ValueError("--config is missing: give a file of configs/")
        if not _WORKDIR.value and not _DRY_RUN.value:
            raise ValueError("--workdir is missing: give the run's folder")
        if _DISTRIBUTED.value:
            timeout_s = train_flags.CONFIG.value.faults.barrier_timeout_s
            processes.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, timeout_s=timeout_s)
        elif _COORDINATOR.value or _NUM_PROCESSES.value or _PROCESS_ID.value is not None:
            raise ValueError("--coordinator_address, --num_processes and --process_id need --distributed")
        train(train_flags.CONFIG.value, _WORKDIR.value or "", dry_run=_DRY_RUN.value)
        processes.finish()
    except (ValueError, OSError) as error:
        by_jax = isinstance(error.__cause__, jax.errors.JaxRuntimeError)  # a save breaks off when a worker is gone, say
        if by_jax and (line := processes.lost(error)):
            _fail(line, processes.LOST_WORKER)
        _fail(str(error), 2)
    except FloatingPointError as error:
        _fail(str(error), 3)
    except Preempted as stop:
        _fail(str(stop), stop.exit_code)
    except jax.errors.JaxRuntimeError as error:
        if (line := processes.lost(error)) is None:
            raise
        _fail(line, processes.LOST_WORKER)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(line: str, code: int = 2) -> None:
    print("python -m safelm.train: " + " ".join(line.split()), file=sys.stderr, flush=True)
    processes.leave(code)


if __name__ == "__main__":
    app.run(_main, flags_parser=lambda arguments: train_flags.parse(arguments, _fail))
