"""The parts of `scripts/bench/gpu.py` that no other script of this folder does; not started by hand.

Each prints one line, `RESULT` and a JSON object. Weights are random at the published sizes, so nothing is downloaded:
what is timed does not depend on their values, and parity is compared on the very same ones.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from decode import our_runs, plain_safe_beam, with_transformers
from score import flops_per_token
from train import SMOKE, SMOLLM2_135M

from safelm import cli
from safelm.train import metrics as train_metrics

ROOT = Path(__file__).parents[2]
PACKAGES = ("jax", "jaxlib", "torch", "transformers", "flax", "numpy")
ENCODERS = {  # sizes of a published encoder: MiniLM-L6, and the GTE-base v1.5 of the paper's released classifier
    "MiniLM-L6": {"model_type": "bert", "num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536},
    "GTE-base": {"model_type": "new", "num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072},
}
TEXT_LENGTHS = (62, 126, 254)  # words of one token; with the two special ones a chunk of 64, 128 and 256
SAFE_BEAM = (4, 4)  # beams, candidates


class MissingPackageError(Exception):
    """A package that a side needs is not installed."""


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What stands in the report's head, and how fast a large product is."""
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    about = {"device": device.device_kind, "platform": device.platform, "devices": len(jax.devices())}
    about |= {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0)), "versions": versions}
    about |= {"system": platform.platform(), "driver": _driver(), "torch_cuda": _torch_cuda()}
    about |= {"peak_flops": train_metrics.peak_flops(device.device_kind)}
    if device.platform != "gpu" and not args.small:
        return about  # which is refused: a large product takes minutes there
    return about | {"product_flops": _product_flops(512 if args.small else 8192)}


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else None


def _torch_cuda() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch.version.cuda if torch.cuda.is_available() else "no GPU for PyTorch"


def _product_flops(size: int) -> float:
    """FLOP/s of a bfloat16 product of two square matrices, the median of ten."""
    x = jax.numpy.ones((size, size), jax.numpy.bfloat16)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    return 2 * size**3 / statistics.median(seconds_of(lambda: product(x).block_until_ready(), 10))


def seconds_of(call: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each of so many calls."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return found


def parity(args: argparse.Namespace) -> dict[str, Any]:
    """Logits in float32 against transformers', else against the plain PyTorch model; raises ValueError beyond 2e-4."""
    theirs_by, folder = _rival(), Path(args.folder)
    settings = _write(folder, args, batch_size=2, seq_len=32 if args.small else 256)
    config, params = _ours(folder, settings)
    tokens = np.load(folder / "batch.npz")["inputs_BT"]
    from safelm.models import decoder

    with jax.default_matmul_precision("highest"):  # the default on a GPU is TF32
        ours = np.asarray(jax.jit(decoder.apply, static_argnums=0)(config, params, tokens))
    theirs = _their_logits(theirs_by, folder, settings, tokens, args)
    difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    result = {"against": theirs_by, "largest_difference": difference, "tolerance": 2e-4, "tokens": tokens.size}
    result["same_next_token"] = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    if difference > result["tolerance"]:
        raise ValueError(f"logits differ by {difference:.1e} of the largest, more than 2e-4: {json.dumps(result)}")
    return result


def _rival() -> str:
    if importlib.util.find_spec("torch") is None:
        raise MissingPackageError("PyTorch is not installed")
    return "transformers" if importlib.util.find_spec("transformers") else "plain PyTorch"


def _write(folder: Path, args: argparse.Namespace, *, batch_size: int, seq_len: int) -> dict[str, Any]:
    """Random weights under Hugging Face's names, as `scripts/bench/train.py` gives them to its sides."""
    import train_safelm

    sizes = SMOKE | {"head_dim": 16} if args.small else SMOLLM2_135M | {"head_dim": 64}
    settings = {"model": sizes, "batch_size": batch_size, "seq_len": seq_len}
    settings |= {"dtype": "float32", "remat": "none", "scan_layers": False}
    with jax.default_device(jax.devices("cpu")[0]):
        train_safelm.write_folder(folder, settings)
    return settings


def _ours(folder: Path, settings: dict[str, Any]) -> tuple[Any, Any]:
    import safetensors.numpy
    import train_safelm

    from safelm.formats import decoder_tensors

    config = train_safelm.model_config(train_safelm.run_config(settings))
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    params = decoder_tensors.params_from_tensors(config, shapes, tensors.__getitem__, where=str(folder))
    return config, jax.device_put(params)


def _their_model(kind: str, folder: Path, settings: dict[str, Any], args: argparse.Namespace) -> Any:
    import plain_torch
    import train_torch
    from safetensors.torch import load_file

    make = train_torch.transformers_model if kind == "transformers" else plain_torch.model
    device = "cpu" if args.small else "cuda"
    return make(settings["hugging_face"], load_file(folder / "model.safetensors")).to(device).eval()


def _their_logits(kind: str, folder: Path, settings: Any, tokens: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    theirs = _their_model(kind, folder, settings, args)
    with torch.inference_mode():
        found = theirs(torch.from_numpy(tokens.astype(np.int64)).to("cpu" if args.small else "cuda"))
    return (found.logits if kind == "transformers" else found).float().cpu().numpy()


def decode(args: argparse.Namespace) -> dict[str, Any]:
    """New tokens/s of greedy decoding and SafeBeam, one sequence and 32, beside transformers on the same weights."""
    folder, weights, count = Path(args.folder), "float32" if args.small else "bfloat16", 8 if args.small else 128
    settings = _write(folder, args, batch_size=1, seq_len=256)
    config, params = _ours(folder, settings)
    config = dataclasses.replace(config, dtype=weights)
    prompt, unused = list(range(5, 45)), config.vocab_size - 1
    tag = argparse.Namespace(harm_tag_id=3)
    made = our_runs(config, params, tag, prompt, count, unused, *SAFE_BEAM, [(weights, "auto")])
    runs = {f"greedy {weights}": made[f"greedy {weights}"], f"safe_beam {weights}": made[f"safe_beam {weights}"]}
    many = 4 if args.small else 32
    runs[f"greedy {weights}, {many} at once"] = _at_once(config, params, weights, prompt, count, unused, many)
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        rival = _their_model("transformers", folder, settings, args)
        rival = rival if args.small else rival.bfloat16()
        rival.config.use_cache = rival.generation_config.use_cache = True
        runs["transformers greedy"] = functools.partial(with_transformers, rival, prompt, count, unused)
        runs["transformers safe_beam"] = functools.partial(plain_safe_beam, rival, prompt, 3, count, *SAFE_BEAM)
    tokens = {name: count * (many if name.endswith("at once") else 1) for name in runs}
    found = _in_turns(runs, 2 if args.small else 3)
    rates = {name: tokens[name] / statistics.median(values) for name, values in found.items()}
    ratios = {
        name: _ratio(found[f"{name} {weights}"], found[f"transformers {name}"])
        for name in ("greedy", "safe_beam")
        if f"transformers {name}" in found
    }
    left_out = {} if ratios else {"left_out": "torch or transformers is not installed: no rival"}
    return {"new_tokens": count, "weights": weights, "tokens_per_s": rates, "ours_over_theirs": ratios} | left_out


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """Theirs / ours by rounds, the median."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def _at_once(config: Any, params: Any, weights: str, prompt: list[int], count: int, unused: int, many: int) -> Callable:
    from safelm.inference import Engine, EngineRequest, Greedy

    engine = Engine(config, params, harm_tag_id=3, slots=many, weights=weights, steps_per_call=16)

    def run() -> None:
        for number in range(many):
            engine.submit(EngineRequest((*prompt, number + 50), Greedy(), count, (unused,)))
        while not engine.is_idle:
            engine.step()

    return run


def _in_turns(runs: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run, in turn, after one of each to compile; said as it goes."""
    for name, run in runs.items():
        print(f"{name}: first {seconds_of(run, 1)[0]:.1f} s", file=sys.stderr, flush=True)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name] += seconds_of(run, 1)
    return found


def scoring(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s of encoders on texts of 64, 128 and 256 tokens; MiniLM's beside transformers' on the same weights."""
    sys.path.append(str(ROOT / "tests/helpers"))
    import embedding_folders

    from safelm.safety.embedding import Embedder, load_backbone

    rng, peak = np.random.default_rng(0), train_metrics.peak_flops(jax.devices()[0].device_kind)
    count, dtype = (6, "float32") if args.small else (3000, "bfloat16")
    texts = [" ".join(rng.choice(embedding_folders.WORDS, TEXT_LENGTHS[i % 3])) for i in range(count)]
    sides = {}
    for name, sizes in {"MiniLM-L6": SMALL_ENCODER}.items() if args.small else ENCODERS.items():
        folder = Path(args.folder) / name
        embedding_folders.write(
            folder, num_attention_heads=sizes["hidden_size"] // 32, max_position_embeddings=512, **sizes
        )
        backbone = load_backbone(str(folder), dtype=dtype, max_tokens=512)
        embedder = Embedder(backbone)
        embedder.embed(texts)
        tokens = sum(len(chunk) for _, chunk in backbone.tokenizer.chunks(texts, 512))
        seconds = seconds_of(functools.partial(embedder.embed, texts), 3)
        layers = [backbone.params[name] for name in backbone.params if name.startswith("layer_")]
        matrices = sum(leaf.size for leaf in jax.tree.leaves(layers) if leaf.ndim > 1)
        side = {"tokens_per_s": tokens / statistics.median(seconds), "documents": count, "dtype": dtype}
        flops = flops_per_token(matrices, sizes["num_hidden_layers"], sizes["hidden_size"], 149)
        side["share_of_peak"] = side["tokens_per_s"] * flops / peak if peak else None
        if sizes["model_type"] == "bert":
            side |= _their_encoder(folder, backbone, texts, embedder, seconds, args)
        sides[name] = side
    return {"sides": sides}


SMALL_ENCODER = {"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}


def _their_encoder(
    folder: Path, backbone: Any, texts: list[str], embedder: Any, seconds: list[float], args: argparse.Namespace
) -> dict[str, Any]:
    """The ratio to transformers' model in batches of 64 sorted by length, or why there is none."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        return {"left_out": "torch or transformers is not installed: no rival"}
    import torch
    import transformers

    device = "cpu" if args.small else "cuda"
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="sdpa").to(device).eval()
    theirs = theirs if args.small else theirs.bfloat16()
    chunks = [chunk for _, chunk in backbone.tokenizer.chunks(texts, 512)]
    order = sorted(range(len(chunks)), key=lambda i: len(chunks[i]))

    def embed() -> np.ndarray:
        found: list[Any] = [None] * len(chunks)
        with torch.inference_mode():
            for start in range(0, len(order), 64):
                rows = order[start : start + 64]
                width = max(len(chunks[i]) for i in rows)
                mask = torch.zeros((len(rows), width), dtype=torch.long)
                tokens = torch.zeros_like(mask)
                for row, i in enumerate(rows):
                    tokens[row, : len(chunks[i])] = torch.from_numpy(np.asarray(chunks[i], np.int64))
                    mask[row, : len(chunks[i])] = 1
                mask = mask.to(device)
                states = theirs(input_ids=tokens.to(device), attention_mask=mask).last_hidden_state
                pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
                for i, row in zip(rows, pooled.float().cpu().numpy(), strict=True):
                    found[i] = row
        return np.stack(found)

    found, ours = embed(), embedder.embed(texts)[0]
    difference = float((np.abs(ours - found).max(1) / np.linalg.norm(found, axis=1)).max())
    ratio = statistics.median(seconds_of(embed, 3)) / statistics.median(seconds)
    return {"ours_over_theirs": ratio, "largest_difference": difference}


PARTS = {"machine": machine, "parity": parity, "decode": decode, "scoring": scoring}


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser("scripts.bench.gpu_parts", __doc__)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as args.folder:
        try:
            print("RESULT " + json.dumps(PARTS[args.part](args)), flush=True)
        except MissingPackageError as missing:
            print(f"MISSING {missing}", flush=True)
            return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
