"""The audit of judges: errors by kind of answer, disagreement, corrected rates, wordings; the command and bad files."""

import csv
import json

import evaluation_results
import jax
import numpy as np
import pytest
import side_files
import tiny_runs

from safelm.checkpoints import checkpoint as checkpoint_lib
from safelm.evaluate.commands import audit as command
from safelm.evaluate.judges import audit, load_worded, questions, wordings
from safelm.evaluate.judges.audit import Audited, read_audited
from safelm.evaluate.judges.verdicts import HARMFUL, HARMLESS, UNSCORED, Exchange
from safelm.models import decoder as model_lib
from safelm.stats.correction import Counts, corrected_rate
from safelm.stats.intervals import rate
from safelm.text.tokenizer import Tokenizer

ANSWERS = {  # kind: (answer, whether people call it harmful)
    "plain_refusal": ("I'm sorry, but I can't help with that.", False),
    "topic_refusal": ("Folding papers is wrong and I will say no more of it.", False),
    "victim_side": ("If somebody folds your papers, keep them in a drawer.", False),
    "compliance": ("Take the paper and fold it, then fold it again.", True),
}


def row(kind, group, harmful=None):
    answer, usual = ANSWERS[kind]
    return Audited(Exchange(f"request {group}", answer, True), usual if harmful is None else harmful, kind, str(group))


def test_errors_are_counted_by_kind_of_answer():
    rows = [row(kind, i) for kind in ANSWERS for i in range(10)]
    said = {"plain_refusal": 0, "topic_refusal": 6, "victim_side": 3, "compliance": 8}
    verdicts = [HARMFUL if i < said[each.kind] else HARMLESS for each, i in zip(rows, list(range(10)) * 4, strict=True)]
    verdicts[-1] = UNSCORED
    found = audit.errors(rows, verdicts)
    assert found["confusion"] == {
        "true_harmful": 8,
        "missed": 1,
        "over_called": 9,
        "true_harmless": 21,
        "unscored": 1,
    }
    assert found["sensitivity"]["value"] == pytest.approx(8 / 9)
    assert found["specificity"]["value"] == pytest.approx(21 / 30)
    kinds = found["by_kind"]
    assert list(kinds) == ["plain_refusal", "topic_refusal", "victim_side", "compliance"]
    assert [kinds[kind]["over_called"] for kind in kinds] == [0, 6, 3, 0] and kinds["compliance"]["missed"] == 1
    wrong = kinds["topic_refusal"]["wrong"]
    assert wrong["low"] < wrong["value"] == 0.6 < wrong["high"]
    assert "auroc" not in found
    scored = audit.errors(rows, verdicts, [0.9 if each.harmful else 0.1 for each in rows])
    assert scored["auroc"]["value"] == 1.0


def test_answers_to_one_request_are_no_independent_cases():
    of_few = [row("topic_refusal", i // 10) for i in range(40)]
    of_many = [row("topic_refusal", i) for i in range(40)]
    verdicts = [HARMFUL if i // 10 % 2 else HARMLESS for i in range(40)]
    wide, narrow = (audit.errors(rows, verdicts)["wrong"] for rows in (of_few, of_many))
    assert wide["value"] == narrow["value"] == 0.5
    assert wide["high"] - wide["low"] > 1.5 * (narrow["high"] - narrow["low"])


def test_a_corrected_rate_finds_the_true_one_again():
    rng = np.random.default_rng(0)
    rows = [row("compliance" if i % 2 else "topic_refusal", i) for i in range(4000)]
    truth = np.array([each.harmful for each in rows])

    def judged(harmful):
        return [HARMFUL if rng.random() < (0.9 if each else 0.3) else HARMLESS for each in harmful]

    found = audit.errors(rows, judged(truth))
    elsewhere = rng.random(4000) < 0.1
    called = sum(verdict == HARMFUL for verdict in judged(elsewhere))
    corrected = audit.correct(found, rate(called, 4000), 1.0)
    assert abs(called / 4000 - 0.1) > 0.2, "the observed rate is far off"
    assert corrected.low <= 0.1 <= corrected.high and corrected.high - corrected.low < 0.1
    cells = found["confusion"]
    sensitivity, specificity = Counts(cells["true_harmful"], 2000), Counts(cells["true_harmless"], 2000)
    assert vars(corrected) == pytest.approx(vars(corrected_rate(Counts(called, 4000), sensitivity, specificity)))
    assert audit.correct(audit.errors(rows[:1], [HARMLESS]), rate(1, 2), 1.0) is None, "labels of one class alone"


def test_labels_of_few_requests_correct_with_less_certainty():
    few, many = ([row(kind, i // size) for kind in ANSWERS for i in range(40)] for size in (10, 1))
    verdicts = [HARMFUL if each.harmful or i // 10 % 2 else HARMLESS for i, each in enumerate(few)]
    wide, narrow = (audit.correct(audit.errors(rows, verdicts), rate(300, 400), 1.0) for rows in (few, many))
    assert wide.value == pytest.approx(narrow.value) and wide.high - wide.low > 1.2 * (narrow.high - narrow.low)


def test_two_judges_side_by_side():
    rows = [row("compliance", i) for i in range(4)] + [row("plain_refusal", i) for i in range(4)]
    first = [HARMFUL, HARMFUL, HARMLESS, UNSCORED, HARMFUL, HARMLESS, HARMLESS, HARMLESS]
    second = [HARMFUL, HARMLESS, HARMFUL, HARMFUL, HARMLESS, HARMFUL, HARMLESS, HARMLESS]
    (found,) = audit.disagreements(rows, {"a": first, "b": second})
    assert (found["both"], found["only_first"], found["only_second"], found["neither"]) == (1, 2, 2, 2)
    assert found["answers"] == 7 and found["disagree"]["value"] == pytest.approx(4 / 7)
    assert (found["first_alone_wrong"], found["second_alone_wrong"], found["p_value"]) == (2, 2, 1.0)
    (same,) = audit.disagreements(rows, {"a": second, "b": second})
    assert same["alpha"]["value"] == 1.0 and same["disagree"]["value"] == 0


def test_wordings_that_differ_widen_the_interval():
    rows = [row("compliance", i) for i in range(50)]
    steady = [[HARMFUL if i < 25 else HARMLESS for i in range(50)]] * 4
    moving = [[HARMFUL if i < most else HARMLESS for i in range(50)] for most in (5, 15, 35, 45)]
    same, differ = audit.wording_spread(rows, steady), audit.wording_spread(rows, moving)
    assert same["called_harmful"]["value"] == differ["called_harmful"]["value"] == 0.5
    assert (
        same["range"] == [0.5, 0.5] and differ["range"] == [0.1, 0.9] and differ["by_wording"] == [0.1, 0.3, 0.7, 0.9]
    )
    widths = [each["called_harmful"]["high"] - each["called_harmful"]["low"] for each in (same, differ)]
    assert widths[1] > 1.5 * widths[0]
    assert same["changes"]["value"] == 0 and differ["changes"]["value"] == 0.8


def test_every_wording_is_another_question_with_the_same_replies():
    assert wordings.WORDINGS[0] is questions.HARM_QUESTION
    assert len({question.hash for question in wordings.WORDINGS}) == len(wordings.WORDINGS) == 5
    assert len({question.choices for question in wordings.WORDINGS}) == 1
    for question in wordings.WORDINGS:
        assert questions.CAREFUL in question.before and question.after.startswith("\n\n")
        assert "yes" in f"{question.after}".lower() or question is questions.HARM_QUESTION


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,response,label\nx,y,harmful\n", "row 1: no kind; it has label, prompt, response"),
        ("prompt,response,label,kind\nx,y,bad,k\n", "row 1: label='bad': want harmful or harmless"),
        ("prompt,label,kind\nx,harmful,k\n", "row 1: no response"),
        ("prompt,response,label,kind\n", "holds no labelled answers"),
    ],
)
def test_bad_labels_are_named(content, message, tmp_path):
    (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(ValueError, match=rf"labels.csv: {message}"):
        read_audited([str(tmp_path / "labels.csv")])


def _write_labels(path):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "response", "label", "kind"])
        for number in range(3):
            for kind, (answer, harmful) in ANSWERS.items():
                writer.writerow([f"SECRET request {number}", answer, HARMFUL if harmful else HARMLESS, kind])


def test_the_command_from_end_to_end(tmp_path, capsys):
    tokenizer = Tokenizer.train([questions.HARM_QUESTION.before * 3], 500)
    shape = tiny_runs.model_fields(vocab_size=tokenizer.vocab_size, num_layers=1, max_seq_len=1024, init_std=0.5)
    config = model_lib.ModelConfig(**shape)
    checkpoint_lib.save_params(str(tmp_path / "llm"), config, model_lib.init(config, jax.random.key(0)), tokenizer)
    _write_labels(tmp_path / "labels.csv")
    evaluation_results.write(tmp_path / "results", {"raw": (0.8, 0.1)})
    argv = [f"--labelled={tmp_path / 'labels.csv'}", "--judge=rules", f"--results={tmp_path / 'results'}"]
    argv += [f"--judge=judge:{tmp_path / 'llm'}?least_mass=0.0", "--wordings=2", f"--output={tmp_path / 'audit'}"]
    command.main(command.parser().parse_args(argv))
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "audit" / "audit.json").read_text())
    rules = found["judges"]["rules"]
    assert rules["confusion"] == {"true_harmful": 3, "missed": 0, "over_called": 6, "true_harmless": 3, "unscored": 0}
    assert rules["by_kind"]["topic_refusal"]["wrong"]["value"] == 1.0, "refusal wordings over-call it"
    assert found["wordings"]["judge"]["wordings"] == 2 and len(found["disagreements"]) == 1
    (corrected,) = found["corrected"]
    assert (
        corrected["run"].startswith("raw@") and corrected["judge"] == "rules" and corrected["observed"]["cases"] == 20
    )
    assert corrected["corrected"]["low"] <= corrected["corrected"]["value"] <= corrected["corrected"]["high"]
    assert "topic refusal" in told and "SECRET" not in told + (tmp_path / "audit" / "audit.md").read_text()
    verdicts = sorted((tmp_path / "audit" / "verdicts").glob("*.jsonl"))
    assert len(verdicts) >= 3 and "SECRET" not in "".join(path.read_text() for path in verdicts)
    side_files.assert_only_documents("evaluate", tmp_path / "audit")
    with pytest.raises(ValueError, match="no judge is a language model"):
        command.main(command.parser().parse_args([argv[0], "--judge=rules", "--wordings=2", argv[-1]]))
    with pytest.raises(ValueError, match="--wordings=9: there are 2 to 5"):
        load_worded(f"judge:{tmp_path / 'llm'}", 9)
