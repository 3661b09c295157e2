"""scripts/studies/compare_rubrics.py: two rubrics on a graded file, judged by a stub of an endpoint."""

import importlib.util
import json

import pytest
from forked_commands import ROOT
from openai_stub import Reply, document_of, serve, without_keys_or_pauses

from safelm import cli
from safelm.safety.judge.rubric import load_rubric


@pytest.fixture(autouse=True)
def no_keys_or_pauses(monkeypatch):
    without_keys_or_pauses(monkeypatch)


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("compare_rubrics", ROOT / "scripts/studies/compare_rubrics.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GRADES = [0, 1, 2, 3, 4, 5] * 4


def answer(_, request):
    """Version 2 gives the grade; version 1 gives 5 for odd texts, and nothing usable for text 7."""
    number, grade = map(int, document_of(request).split())
    if request["messages"][0]["content"] == load_rubric(2).system:
        return Reply(json.dumps({"score": grade}))
    return Reply("no idea" if number == 7 else json.dumps({"score": 5 if number % 2 else grade}))


def run(study, folder, url, *more):
    data = folder / "graded.csv"
    data.write_text("body,harm\n" + "".join(f"{number} {grade},{grade}\n" for number, grade in enumerate(GRADES)))
    flags = [f"--data={data}", "--text_column=body", "--score_column=harm", f"--output={folder / 'out'}"]
    study.main(study.arguments().parse_args([*flags, f"--judge=endpoint:{url}#m", *more]))
    return json.loads((folder / "out" / "rubrics.json").read_text())


def test_the_better_rubric_is_told_with_its_interval(study, tmp_path, capsys):
    with serve(answer) as stub:
        found = run(study, tmp_path, stub.url, "--rubric=1", "--rubric=2")
        asked = len(stub.requests)
        again = run(study, tmp_path, stub.url, "--rubric=1", "--rubric=2")
    assert asked == 2 * len(GRADES) and len(stub.requests) == asked + 1, "only what was unscored is asked again"
    assert found == again
    first, second, less = (*found["alone"].values(), found["difference"]["2"])
    assert first["unscored"]["value"] == pytest.approx(1 / 24) and second["unscored"]["value"] == 0
    assert less["unscored"]["value"] == pytest.approx(-1 / 24)
    perfect = {"Spearman", "AUROC at 1", "AUROC at 3", "recall at 1", "recall at 3", "macro-F1"}
    assert {name for name, each in second.items() if each and each["value"] == pytest.approx(1)} == perfect
    assert first["recall at 3"]["value"] == 1 and first["Spearman"]["value"] < 0.8
    for name in perfect:
        assert less[name]["value"] == pytest.approx(second[name]["value"] - first[name]["value"], abs=0.05)
        assert first[name]["low"] <= first[name]["value"] <= first[name]["high"]
    assert less["Spearman"]["low"] > 0 and less["recall at 3"]["low"] == less["recall at 3"]["high"] == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("|  | Spearman | AUROC at 1") and "| 2 less 1 |" in lines[4]
    assert "document" not in "".join(path.read_text() for path in (tmp_path / "out").iterdir())


def test_a_rubric_of_ones_own_and_fewer_texts(study, tmp_path):
    (tmp_path / "own & new.txt").write_text("@system\nOwn.\n@user\n<document>\n{document}\n</document>\n")
    with serve(answer) as stub:
        found = run(study, tmp_path, stub.url, f"--rubric={tmp_path}/own & new.txt", "--limit=12")
    assert stub.requests[0]["messages"][0]["content"] == "Own." and found["texts"] == 12 == len(stub.requests)


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ("text,harm_score\na,6\n", [], "row 1: harm_score='6', want a whole number from 0 to 5"),
        ("text,harm_score\na,1\nb,1\n", [], "2 texts of 1 grades; nothing to compare"),
        ("text,label\na,1\n", [], "row 1: no column 'harm_score'; it has label, text"),
        ("text,harm_score\na,1\nb,2\n", ["--judge=classifier:x"], "only judge:... and endpoint:... are told a rubric"),
        ("text,harm_score\na,1\nb,2\n", ["--rubric=1"], "--rubric=1: given twice"),
        ("text,harm_score\na,1\nb,2\n", ["--rubric=9"], "rubric=9: there is no such version"),
    ],
)
def test_bad_input_is_one_line(rows, more, message, study, tmp_path, capsys):
    (tmp_path / "data.csv").write_text(rows)
    flags = [f"--data={tmp_path}/data.csv", "--judge=endpoint:http://127.0.0.1:9/v1#m", "--rubric=1", "--output=x"]
    with pytest.raises(SystemExit) as end:
        cli.run(study.main, study.arguments(), [*flags, *more])
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
