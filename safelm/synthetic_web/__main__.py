"""Writes the embedded default data: a synthetic, non-operational web with scores 0 to 5 and its counterparts."""

import argparse

from safelm import cli
from safelm.synthetic_web.corpus import FORMATS, Recipe, write_corpus


def main(arguments: argparse.Namespace) -> None:
    validation_documents = arguments.validation_documents
    if validation_documents is None:
        validation_documents = max(1, arguments.documents // 20)
    summary = write_corpus(
        arguments.output,
        Recipe(
            seed=arguments.seed,
            documents=arguments.documents,
            validation_documents=validation_documents,
            prompts=arguments.prompts,
            format=arguments.format,
            chats=arguments.chats,
            missed_harm=arguments.missed_harm,
            unsafe=arguments.unsafe,
            references=arguments.references,
        ),
    )
    for name, facts in summary["files"].items():
        print(f"{facts['rows']:>8,} rows {facts['bytes'] / 1e6:8.2f} MB  {arguments.output}/{name}")


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "safelm.synthetic_web", __doc__, "python -m safelm.synthetic_web --output=/tmp/corpus --seed=0 --documents=4000"
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives another corpus (default 0)")
    parser.add_argument(
        "--documents", type=int, default=Recipe.documents, help="raw training documents (default %(default)s)"
    )
    parser.add_argument("--validation_documents", type=int, help="raw validation documents (default: a twentieth)")
    parser.add_argument(
        "--prompts",
        type=int,
        default=Recipe.prompts,
        help="number of harmful and of safe prompts (default %(default)s)",
    )
    parser.add_argument("--chats", type=int, default=0, help="number of conversations of instruction data (default 0)")
    parser.add_argument("--missed_harm", type=float, default=0.0, help="share of unsafe documents scored 0 (default 0)")
    parser.add_argument(
        "--unsafe", type=float, default=Recipe.unsafe, help="share of documents of scores 4 and 5 (default %(default)s)"
    )
    parser.add_argument(
        "--references",
        type=float,
        default=0.0,
        help="share of the documents of score 0 that name what harm is made of, without saying what to do (default 0)",
    )
    parser.add_argument("--format", choices=FORMATS, default="jsonl", help="format of the shards (default %(default)s)")
    return parser


if __name__ == "__main__":
    cli.run(main, _parser())
