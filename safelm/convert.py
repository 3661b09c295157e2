"""Converts a model: a Hugging Face folder, one of a hub by name (hf:ORG/NAME[@REVISION]), a GGUF file or our
checkpoint, to our checkpoint or a Hugging Face folder.

The kind of the source is detected. Our checkpoint becomes a Hugging Face folder and everything else our checkpoint,
unless --to says otherwise. The harm tag is added to a vocabulary without it; its embedding starts as the mean of all
others. The target appears only once it is complete; an existing one is never overwritten.
"""

import argparse
import dataclasses
import logging
from pathlib import Path

from safelm import cli
from safelm.checkpoints import checkpoint
from safelm.formats import huggingface
from safelm.formats.sources import read_model, source_kind
from safelm.io import hub, remote
from safelm.io.files import whole_folder
from safelm.text import named_templates

log = logging.getLogger(__name__)


def convert(
    source: str,
    target: str,
    *,
    to: str | None = None,
    step: int | None = None,
    dtype: str = "float32",
    chat_template: str = "",
    document_end: str = "",
) -> None:
    """Writes the model at `source` to `target`: see the module.

    Args:
      to: "safelm" or "huggingface".
      chat_template: a name or file, kept with the target in place of the source's own.
      document_end: the token behind every document, kept with the target in place of the source's own.
      dtype: of the stored weights of a Hugging Face folder; of the computation that a checkpoint of ours records (its
        weights are float32).

    Raises:
      FileExistsError: `target` exists.
      ValueError, FileNotFoundError: the source can't be represented; the message names the key or the tensor.
    """
    try:
        source = hub.pinned(source)
        kind = source_kind(source)
    except (OSError, ValueError) as error:
        raise type(error)(f"--source={error}") from error
    if step is not None and kind != "safelm":
        raise ValueError(f"--step={step}: only our own checkpoints have steps, {source} is of kind {kind}")
    to = to or ("huggingface" if kind == "safelm" else "safelm")
    if remote.is_remote(target):
        raise ValueError(f"--target={target}: must be a local folder; copy the finished folder from there")
    if Path(target).exists():
        raise FileExistsError(f"--target={target}: exists already; nothing was written")
    config, params, tokenizer = read_model(source, step=step, chat_template=chat_template)
    tokenizer = tokenizer.with_document_end(document_end)
    name = source if hub.is_name(source) else ""
    with whole_folder(Path(target), "--target") as folder:
        if to == "huggingface":
            huggingface.write_folder(folder, config, params, tokenizer, dtype=dtype)
        else:
            checkpoint.save_params(
                str(folder), dataclasses.replace(config, dtype=dtype), params, tokenizer, source=name
            )
    log.info("%s: %s, %d parameters, %d ids", target, to, config.num_params, config.vocab_size)


def main(arguments: argparse.Namespace) -> None:
    names = ("to", "step", "dtype", "chat_template", "document_end")
    convert(arguments.source, arguments.target, **{name: getattr(arguments, name) for name in names})


def argument_parser() -> argparse.ArgumentParser:
    parser = cli.parser("safelm.convert", __doc__, "python -m safelm.convert --source=model.gguf --target=checkpoint")
    parser.add_argument("--source", required=True, help="what to convert: see above")
    parser.add_argument("--target", required=True, help="folder to write; must not exist")
    parser.add_argument("--to", choices=("safelm", "huggingface"), help="kind of the target")
    parser.add_argument("--step", type=int, help="step of a checkpoint of ours (default: the newest)")
    parser.add_argument("--chat_template", default="", metavar="NAME|FILE", help=f"{named_templates.HELP}; kept")
    parser.add_argument("--document_end", default="", metavar="TOKEN", help="token after every document; kept")
    of_what = "of a Hugging Face folder's weights, or of our checkpoint's computation"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help=of_what)
    return parser


if __name__ == "__main__":
    cli.run(main, argument_parser())
