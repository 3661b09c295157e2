"""SafeLM's side of `scripts/bench/train.py`: the step that `safelm.train` runs for a config; not started by hand.

With --write it makes the folder that all sides read: config, fresh weights under their Hugging Face names, one batch.
Otherwise it obeys stdin as `scripts/bench/train_torch.py` does.
"""

import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import safetensors.numpy

from safelm import cli
from safelm.data.batch import Batch
from safelm.formats import decoder_tensors
from safelm.io import host_memory
from safelm.models import decoder as model
from safelm.models import sharding
from safelm.train import metrics as train_metrics
from safelm.train import program as train_program
from safelm.train.defaults import default_config
from safelm.train.step import Controls

_PR_SET_THP_DISABLE = 41  # of <sys/prctl.h>


def run_config(settings: dict[str, Any]) -> ml_collections.ConfigDict:
    """A run's config: the defaults, but for the sizes and what `settings` says of the numerics."""
    config = default_config()
    config.update(batch_size=settings["batch_size"], seq_len=settings["seq_len"])
    config.model.update(settings["model"] | {"dtype": settings["dtype"], "max_seq_len": settings["seq_len"]})
    config.model.update(scan_layers=settings["scan_layers"], remat=settings["remat"])
    return config


def model_config(config: ml_collections.ConfigDict) -> model.ModelConfig:
    return model.ModelConfig(**{name: value for name, value in config.model.items() if value is not None})


def write_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Everything the sides share: settings.json, model.safetensors, batch.npz (rows of random ids)."""
    config = run_config(settings)
    sizes, fields = model_config(config), config.optimizer
    tensors = decoder_tensors.tensors_from_params(sizes, model.init(sizes, jax.random.key(0)))
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    shape = (settings["batch_size"], settings["seq_len"] + 1)
    rows = np.random.default_rng(0).integers(0, sizes.vocab_size, shape, dtype=np.int32)
    np.savez(folder / "batch.npz", inputs_BT=rows[:, :-1], targets_BT=rows[:, 1:])
    settings["hugging_face"] = {
        "vocab_size": sizes.vocab_size,
        "num_hidden_layers": sizes.num_layers,
        "hidden_size": sizes.d_model,
        "intermediate_size": sizes.d_ff,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": settings["seq_len"],
        "rope_theta": sizes.rope_theta,
        "rms_norm_eps": sizes.rms_norm_eps,
        "tie_word_embeddings": sizes.tie_embeddings,
    }
    names = ("b1", "b2", "eps", "weight_decay", "clip_norm")
    settings["adamw"] = {name: fields[name] for name in names} | {"learning_rate": 3e-4}
    settings["num_params"] = sizes.num_params
    (folder / "settings.json").write_text(json.dumps(settings, indent=1))


def make_step(folder: Path) -> tuple[Callable[[], float], dict[str, Any]]:
    """One update that waits for its end and gives its loss, and what is to be said of the device."""
    settings = json.loads((folder / "settings.json").read_text())
    config, mesh = run_config(settings), sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    sizes = model_config(config)
    program, attention = train_program.make_program(config, sizes, mesh)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    params = decoder_tensors.params_from_tensors(sizes, shapes, tensors.__getitem__, where=str(folder))
    rows = np.load(folder / "batch.npz")
    shape = rows["inputs_BT"].shape
    batch = Batch(
        inputs_BT=rows["inputs_BT"],
        targets_BT=rows["targets_BT"],
        positions_BT=np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
        segment_ids_BT=np.ones(shape, np.int32),
        loss_weight_BT=np.ones(shape, np.float32),
        source_ids_B=np.zeros(shape[0], np.int32),
        channels={},
    )
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state.params)
        state = program.start(jax.device_put(params, shardings))
        batch = jax.device_put(batch, program.batch_sharding)
    controls = Controls(np.float32(settings["adamw"]["learning_rate"]))

    def step() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = program.step(state, batch, controls)
            jax.block_until_ready(state)
        return float(metrics.loss.mean_cross_entropy())

    about = {"device": jax.devices()[0].device_kind, "attention": attention.kernel}
    return step, about | {
        "flops_per_token": sizes.flops_per_token(settings["seq_len"]),
        "peak_flops": train_metrics.peak_flops(jax.devices()[0].device_kind),
    }


def main() -> None:
    parser = cli.parser("scripts.bench.train_safelm", __doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", help="settings as JSON")
    parser.add_argument("--small_pages", action="store_true", help="the kernel gives this process no large pages")
    args = parser.parse_args()
    if args.small_pages:
        ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    if args.write:
        write_folder(args.folder, json.loads(args.write))
        return
    host_memory.keep_freed_memory()  # as `safelm.train` does
    step, about = make_step(args.folder)
    answer({"losses": [step() for _ in range(3)]} | about)
    for line in sys.stdin:
        seconds, loss = [], float("nan")
        for _ in range(int(line)):
            began = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - began)
        answer({"seconds": seconds, "loss": loss})


def answer(value: dict[str, Any]) -> None:
    print("BENCH " + json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
