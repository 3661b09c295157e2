r"""Measures how robust our own small models are: finetuning curves, prefilled answers, attackers that know the tag.

Takes checkpoints trained on the synthetic web, whose judge it uses. Writes results.json, results.md and results.png,
and keeps every point, so that the same command continues after a stop.

    python -m safelm.robustness --checkpoint=raw=W/models/raw --checkpoint=tag=W/models/tag --tagged=tag \
        --prompts=W/corpus/chat_prompts --benign=W/tokens/gsm8k --tag_free=W/tokens/raw_web --output=W/robustness
"""

import argparse

from safelm import cli
from safelm.evaluate.suites.suite import read_prompts
from safelm.robustness import study as robustness
from safelm.robustness.report import write_report
from safelm.robustness.study import Finetuning, Study


def study_from(flags: argparse.Namespace) -> Study:
    """The study that the flags describe. Raises ValueError naming a flag that doesn't fit."""
    finetunings = []
    for name in ("benign", "tag_free"):
        if folder := getattr(flags, name):
            root, _, source = folder.rstrip("/").rpartition("/")
            finetunings.append(
                Finetuning(name, root or ".", source, _numbers(flags, "learning_rates"), _numbers(flags, "epochs"))
            )
    return Study(
        models=cli.checkpoints(flags.checkpoint),
        tagged=tuple(name for name in flags.tagged.split(",") if name),
        prompts=flags.prompts,
        output=flags.output,
        is_chat=not flags.completions,
        finetunings=tuple(finetunings),
        prefix_words=tuple(int(number) for number in _numbers(flags, "prefix_words")),
        max_prompts=flags.max_prompts,
        max_new_tokens=flags.max_new_tokens,
        batch_size=flags.batch_size,
        seq_len=flags.seq_len,
        epoch_tokens=flags.epoch_tokens,
    )


def _numbers(flags: argparse.Namespace, name: str) -> tuple[float, ...]:
    text = getattr(flags, name)
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 0 or list(numbers) != sorted(set(numbers)):
        raise ValueError(f"--{name}={text}: want ascending, comma-separated numbers of at least 0")
    return numbers


def main(flags: argparse.Namespace) -> None:
    study = study_from(flags)
    points = robustness.run(study)
    about = {"max_new_tokens": study.max_new_tokens, "batch_size": study.batch_size, "seq_len": study.seq_len}
    prompts = read_prompts(study.prompts, max_prompts=study.max_prompts)
    paths = write_report(flags.output, points, about, harmful={prompt.id for prompt in prompts if prompt.harmful})
    print(paths[1].read_text())
    print("\n".join(map(str, paths)))


def _parser() -> argparse.ArgumentParser:
    example = __doc__.strip().rpartition("\n\n")[2].strip()
    parser = cli.parser("safelm.robustness", __doc__, example)
    parser.add_argument(
        "--checkpoint",
        action="append",
        required=True,
        metavar=cli.CHECKPOINT,
        help="a model; repeatable; MODEL#SEED for models that differ in their seed",
    )
    parser.add_argument("--tagged", default="", help="comma-separated names of the models that know the harm tag")
    parser.add_argument("--prompts", required=True, metavar="DIR", help="folder with harmful.jsonl and safe.jsonl")
    parser.add_argument(
        "--completions", action="store_true", help="for base models: continue prompts instead of chatting"
    )
    parser.add_argument("--benign", default="", metavar="STORE", help="token store of benign finetuning: ROOT/SOURCE")
    parser.add_argument("--tag_free", default="", metavar="STORE", help="token store of unsafe text without tags")
    parser.add_argument("--learning_rates", default="5e-4,1e-3,2e-3")
    parser.add_argument("--epochs", default="0,0.25,0.5,1,2", help="points of each curve (default %(default)s)")
    parser.add_argument("--epoch_tokens", type=int, default=0, help="most tokens of an epoch (0: the whole store)")
    parser.add_argument("--prefix_words", default="0,2,4,8")
    parser.add_argument("--max_prompts", type=int, default=0, help="most harmful and most safe prompts; 0 = all")
    parser.add_argument("--max_new_tokens", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=16, help="rows per finetuning step")
    parser.add_argument("--seq_len", type=int, default=128, help="tokens per row")
    parser.add_argument("--output", required=True, metavar="DIR")
    return parser


if __name__ == "__main__":
    cli.run(main, _parser(), decodes=True)
