"""Converts a model: Hugging Face folder, GGUF file or our checkpoint, to our checkpoint or a Hugging Face folder.

The kind of the source is found out. Our checkpoint goes to a Hugging Face folder and everything else to ours, unless
--to says otherwise. A vocabulary without the harm tag gets it: its embedding starts as the mean of all others'.
The target appears only when it is whole; one that exists is never overwritten.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safelm import checkpoint, cli, model
from safelm.formats import gguf, huggingface, llama_tensors
from safelm.tags import HARM_TAG
from safelm.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Model = tuple[model.ModelConfig, model.Params, Tokenizer]


def source_kind(source: str) -> str:
    """What is at `source`: "safelm", "huggingface" or "gguf".

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: it is none of the three.
    """
    path = Path(source)
    if "://" in source:
        return "safelm"
    if not path.exists():
        raise FileNotFoundError(f"--source={source}: no such file or folder")
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(len(gguf.MAGIC)) == gguf.MAGIC:
                return "gguf"
        raise ValueError(f"--source={source}: not a GGUF file; a Hugging Face model is given as its folder")
    if (path / "checkpoints").is_dir():
        return "safelm"
    if (path / huggingface.CONFIG_FILE).exists():
        return "huggingface"
    raise ValueError(f"--source={source}: holds neither checkpoints/ (ours) nor config.json (Hugging Face)")


def read_model(source: str, *, step: int | None = None) -> Model:
    """The model at `source`, of any kind, with the harm tag in its vocabulary.

    Args:
      step: which checkpoint of ours; the newest when not given.
    """
    kind = source_kind(source)
    if kind == "safelm":
        return checkpoint.load_for_inference(source, step=step)
    if step is not None:
        raise ValueError(f"--step={step}: only our own checkpoints have steps, {source} is of kind {kind}")
    path = Path(source)
    tokenizer = Tokenizer.from_pretrained(source)
    if kind == "gguf":
        config, params = gguf.read_file(path)
        has_tag = gguf.has_token(path, HARM_TAG)
    else:
        config, params = huggingface.read_folder(path)
        has_tag = HARM_TAG in (path / "tokenizer.json").read_text(encoding="utf-8")
    return _fit_vocabulary(config, params, tokenizer, has_tag=has_tag)


def _fit_vocabulary(config: model.ModelConfig, params: model.Params, tokenizer: Tokenizer, *, has_tag: bool) -> Model:
    """Fits the embedding to the tokenizer's ids; the tag's row starts as the mean when the source had no tag."""
    num_trained = min(config.vocab_size, tokenizer.vocab_size)
    if not has_tag:
        num_trained = min(num_trained, tokenizer.harm_tag_id)
    if config.vocab_size > tokenizer.vocab_size:
        log.info("ids %d to %d have no token: dropped", tokenizer.vocab_size, config.vocab_size - 1)
    if num_trained < tokenizer.vocab_size:
        log.info("ids from %d to %d (%s) are new: their embedding starts as the mean of the %d others",
                 num_trained, tokenizer.vocab_size - 1, HARM_TAG, num_trained)  # fmt: skip
    config, params = llama_tensors.resize_vocabulary(config, params, tokenizer.vocab_size, num_trained=num_trained)
    return config, params, tokenizer


def convert(
    source: str, target: str, *, to: str | None = None, step: int | None = None, dtype: str = "float32"
) -> None:
    """Writes the model at `source` to `target`: see the module.

    Args:
      to: "safelm" or "huggingface".
      dtype: of the stored weights of a Hugging Face folder; of the computation that a checkpoint of ours records (its
        weights are float32).

    Raises:
      FileExistsError: `target` exists.
      ValueError, FileNotFoundError: the source can't be represented; the message names the key or the tensor.
    """
    to = to or ("huggingface" if source_kind(source) == "safelm" else "safelm")
    if "://" in target:
        raise ValueError(f"--target={target}: must be a local folder; copy it on when it is whole")
    if Path(target).exists():
        raise FileExistsError(f"--target={target}: exists already; nothing was written")
    config, params, tokenizer = read_model(source, step=step)
    with _whole_or_not_at_all(Path(target)) as folder:
        if to == "huggingface":
            huggingface.write_folder(folder, config, params, tokenizer, dtype=dtype)
        else:
            checkpoint.save_params(str(folder), dataclasses.replace(config, dtype=dtype), params, tokenizer)
    log.info("%s: %s, %d parameters, %d ids", target, to, config.num_params, config.vocab_size)


@contextlib.contextmanager
def _whole_or_not_at_all(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its name when the block ends well and is removed otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)
        if target.exists():
            raise FileExistsError(f"--target={target}: appeared while writing; nothing was overwritten")
        os.rename(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def main(arguments: argparse.Namespace) -> None:
    convert(arguments.source, arguments.target, to=arguments.to, step=arguments.step, dtype=arguments.dtype)


def argument_parser() -> argparse.ArgumentParser:
    parser = cli.parser("safelm.convert", __doc__, "python -m safelm.convert --source=model.gguf --target=checkpoint")
    parser.add_argument("--source", required=True, help="Hugging Face folder, GGUF file or a checkpoint of ours")
    parser.add_argument("--target", required=True, help="folder to write; must not exist")
    parser.add_argument("--to", choices=("safelm", "huggingface"), help="kind of the target")
    parser.add_argument("--step", type=int, help="which checkpoint of ours (the newest when not given)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of a Hugging Face folder's weights, or of our checkpoint's computation")  # fmt: skip
    return parser


if __name__ == "__main__":
    cli.run(main, argument_parser())
