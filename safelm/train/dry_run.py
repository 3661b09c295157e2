"""`safelm.train --dry_run`: checks a run and prints its size, without starting it."""

import textwrap

import jax
from ml_collections import ConfigDict

from safelm.io import hub, remote
from safelm.models import sharding
from safelm.train import config as train_config
from safelm.train import config_fields, safety_watch
from safelm.train import data as train_data
from safelm.train import plan as train_plan
from safelm.train import program as train_program


def dry_run(config: ConfigDict, workdir: str = "") -> None:
    """Prints parameters, memory, tokens, steps, time and the settings that are not defaults.

    What the config names and is there is checked. Tokenizer, token stores and devices that are not there yet are named
    instead. Raises ValueError or OSError for what can't be right.
    """
    absent_parts = []
    if config.model.vocab_size and _is_absent(config.tokenizer):
        settled, model_config = train_config.resolve_sizes(config)
        tokenizer = None
        absent_parts.append(f"tokenizer {config.tokenizer}: the vocabulary is taken to be model.vocab_size")
    else:
        run = train_config.resolve(config, workdir)
        settled, model_config, tokenizer = run.config, run.model, run.tokenizer
    data = None
    if _is_absent(config.data.root):
        absent_parts.append(f"data.root {config.data.root}: what the sources hold is not known")
    elif tokenizer is None:
        absent_parts.append(f"data.root {config.data.root}: not read without the tokenizer")
    else:
        data = train_data.TrainData(settled, tokenizer)
    if tokenizer is not None:
        safety_watch.read_pages(settled, tokenizer)
    mesh, attention = train_plan.absent_mesh(settled.mesh.to_dict(), jax.device_count()), None
    if mesh is None:
        mesh = sharding.make_mesh(settled.mesh.to_dict())
        _, attention = train_program.make_program(settled, model_config, mesh)
    if jax.process_index() == 0:
        lines = [train_plan.summary(settled, model_config, data, mesh, attention)]
        lines += textwrap.wrap(
            "set:        " + " ".join(config_fields.not_default(config)), 120, subsequent_indent=" " * 12
        )
        lines += [f"not there:  {line}" for line in absent_parts]
        print("\n".join(lines), flush=True)


def _is_absent(path: str) -> bool:
    """Whether a path is given and nothing is there; what a hub has is asked for when it is read."""
    if not path or hub.is_name(path):
        return False
    return not remote.exists(path)
