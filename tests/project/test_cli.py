"""What every command shares: how flags, checkpoints and configs are named."""

import argparse
import pathlib

import pytest

from safelm import cli, config_files
from safelm.train import flags as train_flags

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("base", "__init__"))


def test_dashes_and_underscores_are_the_same_flag():
    parser = cli.parser("safelm.x", "A command.")
    parser.add_argument("--max_prompts", type=int)
    parser.add_argument("--show_text", action="store_true")
    parser.add_argument("rest", nargs="*")
    for given in (["--max-prompts=3", "--show-text"], ["--max_prompts", "3", "--show_text"]):
        expected = {"max_prompts": 3, "show_text": True, "rest": [], "progress_file": ""}
        assert vars(parser.parse_args(given)) == expected
    given = ["--max-prompts=3", "a-b", "--", "--job-endpoint=x-y"]
    assert parser.parse_args(given).rest == ["a-b", "--job-endpoint=x-y"]
    assert cli.with_underscores(["--a-b=c-d", "-x", "--config.a-b=1"]) == ["--a_b=c-d", "-x", "--config.a_b=1"]


def test_a_misspelt_flag_is_named_where_the_one_that_is_meant_is_missing(capsys):
    parser = cli.parser("safelm.x", "A command.")
    parser.add_argument("--input", required=True)
    parser.add_argument("--text_column")
    one = parser.add_mutually_exclusive_group(required=True)
    one.add_argument("--join")
    one.add_argument("--check")
    expected = {
        "--inputs=a --join=b": "unknown: --inputs (is --input meant?); the following arguments are required: --input",
        "--input a --joint=b --zzz": "unknown: --joint (is --join meant?), --zzz; one of the arguments --join",
        "--join=b -- --inputs": "error: the following arguments are required: --input",
        "--input=a --join=b --zzz": "error: unrecognized arguments: --zzz",
    }
    for given, line in expected.items():
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(given.split())
        assert ended.value.code == 2 and line in capsys.readouterr().err, given


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("raw=runs/a", ("raw", "runs/a")),
        ("tag@instruct#0=runs/a", ("tag@instruct#0", "runs/a")),
        ("runs/quickstart/safety", ("safety", "runs/quickstart/safety")),
        ("gs://bucket/run-2/", ("run-2", "gs://bucket/run-2/")),
        ("models/x.gguf", ("x.gguf", "models/x.gguf")),
        ("/data/lr=3/run", ("run", "/data/lr=3/run")),
        ("raw=/data/lr=3/run", ("raw", "/data/lr=3/run")),
    ],
)
def test_a_checkpoint_is_a_folder_with_or_without_a_name(flag, expected):
    assert cli.checkpoint(flag) == expected


@pytest.mark.parametrize("flag", ["", "raw=", "=runs/a", "a b=x", "my run", "raw@=x"])
def test_another_form_of_checkpoint_is_named(flag):
    with pytest.raises(cli.UserError, match=f"--checkpoint={flag}: want NAME=DIR or DIR"):
        cli.checkpoint(flag)


def test_two_checkpoints_of_one_name_are_refused():
    assert cli.checkpoints(["runs/a", "b=runs/a"]) == {"a": "runs/a", "b": "runs/a"}
    with pytest.raises(cli.UserError, match="--checkpoint=a=other/a: the name a is given twice"):
        cli.checkpoints(["runs/a", "other/a"])


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Sampling: top_p=0.0, want above 0", "Sampling: --top_p=0.0, want above 0"),
        ("prompt 0: its 9 tokens and max_tokens=99 make 108", "prompt 0: its 9 tokens and --max_tokens=99 make 108"),
        ("rate must be from 0 to 1, got 2.0", "--rate must be from 0 to 1, got 2.0"),
        ("--top_p=0.0: want more", "--top_p=0.0: want more"),
        (
            "prefix_top_p=0.0, bundled?top_p=0.0, top_p=0.01, max_tokens=9",
            "prefix_top_p=0.0, bundled?top_p=0.0, top_p=0.01, max_tokens=9",
        ),
        ("rate must be from 0 to 1, got 2.05", "rate must be from 0 to 1, got 2.05"),
        (
            "step=7: no such checkpoint in a/b.jsonl, which has 3, 6",
            "--step=7: no such checkpoint in a/b.jsonl, which has 3, 6",
        ),
        ("--judge: says nothing of harm", "--judge=rules,xy: says nothing of harm"),
        ("--judge needs --suite=chat, got rules,xy", "--judge needs --suite=chat, got rules,xy"),
        ("--other: is missing", "--other: is missing"),
        ("a/b.jsonl: no such file", "--input=a/b.jsonl: no such file"),
        ("a/b/config.json: no such file", "--scorers=n=classifier:a/b?x=1: a/b/config.json: no such file"),
        ("judge 'xy': expected rules", "--judge=rules,xy: judge 'xy': expected rules"),
        ("c: row 3: field 'text' is missing", "c: row 3: field 'text' is missing"),
        ("empty: no file matches a/b.jsonl/raw", "--input=a/b.jsonl: empty: no file matches a/b.jsonl/raw"),
        ("a/b.jsonl: missing column 'xy'", "--judge=rules,xy: a/b.jsonl: missing column 'xy'"),
        ("rules needs a chat: safelm.x --y adds one", "--judge=rules,xy: rules needs a chat: safelm.x --y adds one"),
        ("judge: labels must be a list", "--judge=rules,xy: labels must be a list"),
    ],
)
def test_a_librarys_error_names_the_flag_that_has_the_settings_value(message, expected):
    given = argparse.Namespace(step=7, top_p=0.0, max_tokens=99, rate=2.0, other=None, judge="rules,xy", shows=True)
    given.input, given.scorers = ["a/b.jsonl", "c"], "n=classifier:a/b?x=1"
    assert cli.named_by_flags(message, given) == expected


@pytest.fixture
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.parametrize("name", CONFIGS)
def test_an_unknown_variant_names_those_that_there_are_and_all_of_them_load(in_the_checkout, name):
    path = f"configs/{name}.py"
    config_files.load_config(path)
    with pytest.raises(cli.UserError) as error:
        config_files.load_config(f"{path}:nonsense")
    line = str(error.value)
    assert line.startswith(f"--config={path}:nonsense: no variant 'nonsense': {path} has ") and "\n" not in line
    known = line.partition(" has ")[2]
    takes_one = "get_config()" not in (ROOT / path).read_text()
    assert takes_one == (known != "no variants")
    for variant in known.split(", ") if takes_one else []:
        config_files.load_config(f"{path}:{variant}")


def test_safety_is_among_the_variants_of_the_quickstart(in_the_checkout, capsys):
    class FailedError(Exception):
        pass

    def fail(line: str) -> None:
        raise FailedError(line)

    for given in (["--config=configs/quickstart.py:nonsense"], ["--config", "configs/quickstart.py:nonsense"]):
        with pytest.raises(FailedError, match=r"configs/quickstart\.py has safety, raw, score0, safeweb, "):
            train_flags.parse(["train", *given, "--dry-run"], fail)
    with pytest.raises(FailedError, match=r"--config=configs/nothing\.py: no such file"):
        train_flags.parse(["train", "--config=configs/nothing.py"], fail)
    with pytest.raises(FailedError, match="Unknown command line flag 'nothing'"):
        train_flags.parse(["train", "--config=configs/quickstart.py", "--nothing=1"], fail)
    with pytest.raises(FailedError, match=r"--config=README\.md: not a config file"):
        train_flags.parse(["train", "--config=README.md"], fail)
