"""Converts a model: a Hugging Face folder, one of a hub by name (hf:ORG/NAME[@REVISION]), a GGUF file or our
checkpoint, to our checkpoint or a Hugging Face folder.

The kind of the source is detected. Our checkpoint becomes a Hugging Face folder and everything else our checkpoint,
unless --to says otherwise. Adapters (`lora.rank` of a run) are merged into their model, unless --to=peft writes them
alone, as a PEFT folder; --adapter merges those of such a folder, or of a run, into the source. --ablate leaves out what
`config.routing` localised (docs/interventions.md). The harm tag is added to
a vocabulary without it; its embedding starts as the mean of all others. The target appears only once it is complete; an
existing one is never overwritten.
"""

import argparse
import dataclasses
import logging
from pathlib import Path

import jax
import numpy as np

from safelm import cli
from safelm.checkpoints import checkpoint
from safelm.formats import huggingface, peft, sources
from safelm.formats.sources import read_model, source_kind
from safelm.io import hub, records, remote
from safelm.io.files import whole_folder
from safelm.models import lora, routing
from safelm.models.decoder import ModelConfig, Params
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
    adapter: str = "",
    ablate: bool = False,
) -> None:
    """Writes the model at `source` to `target`: see the module.

    Args:
      to: "safelm", "huggingface", or "peft" for a run's adapters alone.
      chat_template: a name or file, kept with the target in place of the source's own.
      document_end: the token behind every document, kept with the target in place of the source's own.
      adapter: a PEFT folder, or a run of ours with adapters, merged into the source, which must be their model.
      ablate: leave out the units that only labelled rows trained (`safelm.models.routing`).
      dtype: of the stored weights of a Hugging Face folder; of the computation that a checkpoint of ours records (its
        weights are float32).

    Raises:
      FileExistsError: `target` exists.
      ValueError, FileNotFoundError: the source can't be represented; the message names the key or the tensor.
    """
    source, kind = _found(source, step)
    to = to or ("huggingface" if kind == "safelm" else "safelm")
    remote.check_local_output(target, "--target")
    if Path(target).exists():
        raise FileExistsError(f"--target={target}: exists already; nothing was written")
    if to == "peft":
        _write_adapter(source, target, kind, step, adapter)
        return
    config, params, tokenizer = read_model(source, step=step, chat_template=chat_template)
    saw_tag = sources.saw_tag(source, step=step)
    if adapter:
        config, params = lora.merged(*_adapted(adapter, config, params, source))
        saw_tag = _either(saw_tag, peft.saw_tag(adapter))
    if ablate:
        try:
            config, params = routing.ablated(config, params)
        except ValueError as error:
            raise ValueError(f"--ablate: {source}: {error}") from None
    tokenizer = tokenizer.with_document_end(document_end)
    name = source if hub.is_name(source) else ""
    with whole_folder(Path(target), "--target") as folder:
        if to == "huggingface":
            huggingface.write_folder(folder, config, params, tokenizer, dtype=dtype, saw_tag=saw_tag)
        else:
            config = dataclasses.replace(config, dtype=dtype, param_dtype="float32")
            params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
            checkpoint.save_params(str(folder), config, params, tokenizer, source=name, saw_tag=saw_tag)
    log.info("%s: %s, %d parameters, %d ids", target, to, config.num_params, config.vocab_size)


def _found(source: str, step: int | None) -> tuple[str, str]:
    """The source with a revision of a hub written out, and its kind."""
    try:
        source = hub.pinned(source)
        kind = source_kind(source)
    except (OSError, ValueError) as error:
        raise type(error)(f"--source={error}") from error
    if step is not None and kind != "safelm":
        raise ValueError(f"--step={step}: only our own checkpoints have steps, {source} is of kind {kind}")
    return source, kind


def _either(base: bool | None, adapter: bool | None) -> bool | None:
    """Whether one of two was trained on the tag: yes if one was, no only if both were not."""
    return True if True in (base, adapter) else None if None in (base, adapter) else False


def _adapted(adapter: str, config: ModelConfig, params: Params, source: str) -> tuple[ModelConfig, Params]:
    try:
        return peft.read_adapter(adapter, config, params, where=source)
    except (OSError, ValueError) as error:
        raise type(error)(f"--adapter={error}") from error


def _write_adapter(source: str, target: str, kind: str, step: int | None, adapter: str) -> None:
    if adapter:
        raise ValueError(f"--adapter={adapter}: --to=peft writes the source's own adapters, it merges none")
    config, params, _ = checkpoint.load(source, step=step) if kind == "safelm" else (None, None, None)
    if config is None or config.lora is None:
        raise ValueError(f"--source={source}: has no adapters for --to=peft; a run with lora.rank has some")
    settings = records.read(f"{source.rstrip('/')}/config.json", "train the run again") or {}
    base = settings.get("init_checkpoint", "")
    with whole_folder(Path(target), "--target") as folder:
        saw_tag = checkpoint.saw_tag(source, step=step)
        peft.write_folder(folder, config, params, base=base if hub.is_name(base) else "", saw_tag=saw_tag)
    log.info("%s: adapters of %d parameters", target, config.num_trained_params)


def main(arguments: argparse.Namespace) -> None:
    names = ("to", "step", "dtype", "chat_template", "document_end", "adapter", "ablate")
    convert(arguments.source, arguments.target, **{name: getattr(arguments, name) for name in names})


def argument_parser() -> argparse.ArgumentParser:
    parser = cli.parser("safelm.convert", __doc__, "python -m safelm.convert --source=model.gguf --target=checkpoint")
    parser.add_argument("--source", required=True, help="what to convert: see above")
    parser.add_argument("--target", required=True, help="folder to write; must not exist")
    parser.add_argument("--to", choices=("safelm", "huggingface", "peft"), help="kind of the target")
    parser.add_argument("--adapter", default="", metavar="DIR", help="PEFT folder or run with adapters: merged")
    meaning = "without the heads and MLP units that config.routing designated: their parameters become 0"
    parser.add_argument("--ablate", action="store_true", help=meaning)
    parser.add_argument("--step", type=int, help="step of a checkpoint of ours (default: the newest)")
    parser.add_argument("--chat_template", default="", metavar="NAME|FILE", help=f"{named_templates.HELP}; kept")
    parser.add_argument("--document_end", default="", metavar="TOKEN", help="token after every document; kept")
    of_what = "of a Hugging Face folder's weights, or of our checkpoint's computation"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help=of_what)
    return parser


if __name__ == "__main__":
    cli.run(main, argument_parser())
