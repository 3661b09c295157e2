"""The suites of public prompts from end to end on tiny random models: journals, outcomes, likelihoods, comparisons."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from safelm.checkpoints import checkpoint as checkpoint_lib
from safelm.evaluate import answers as answers_lib
from safelm.evaluate import likelihood, outcomes
from safelm.evaluate.answers import Answer, Checkpoint, check_tag, collect
from safelm.evaluate.commands import judge as evaluate_judge
from safelm.evaluate.commands import measure as evaluate
from safelm.evaluate.commands import report as evaluate_report
from safelm.evaluate.comparing import Row, compare, read_runs
from safelm.evaluate.comparing.differences import contrasts, stage_deltas
from safelm.evaluate.comparing.results import REFUSAL, Column, split_name
from safelm.evaluate.journal import open_journal
from safelm.evaluate.judges.calibration import Errors
from safelm.evaluate.judges.remembering import RememberingJudge
from safelm.evaluate.judges.verdicts import FULL, HARMFUL, HARMLESS, HELPFUL, UNSCORED, Exchange
from safelm.evaluate.protocol import ProtocolError
from safelm.evaluate.suites.suite import Prompt
from safelm.evaluate.template import Template
from safelm.inference import Greedy, SafeBeam, Sampling
from safelm.models import decoder as model_lib
from safelm.stats.comparison import holm
from safelm.stats.correction import Counts
from safelm.stats.intervals import rate
from safelm.text.tokenizer import Tokenizer

TEXT = "First take the paper and fold it in the middle. I'm sorry, but I can't help with that. "


# --- answers and their journal


def test_a_stopped_run_goes_on_at_the_next_prompt(small, tmp_path, monkeypatch):
    checkpoint, journal = small["checkpoint"], tmp_path / "journal.jsonl"
    prompts = [_prompt(f"p{i}", "paper " * (i + 1)) for i in range(5)]
    whole = _collect(checkpoint, prompts, tmp_path / "other.jsonl", method=Sampling())
    asked = _count_prompts(monkeypatch)
    first = _collect(checkpoint, prompts[:3], journal, method=Sampling())
    with open(journal, "ab") as file:
        file.write(b'{"key": "half a li')  # killed while writing
    again = _collect(checkpoint, prompts, journal, method=Sampling())
    assert asked == [3, 2] and again[:3] == first
    assert [answer.text for answer in again] == [
        answer.text for answer in whole
    ]  # a sampled answer depends on neither its neighbours nor the stop
    assert _collect(checkpoint, prompts, journal, method=Sampling()) == again and asked == [3, 2]
    assert TEXT[:5] not in journal.read_text() and "paper" not in journal.read_text()


def test_a_journal_has_one_writer(small, tmp_path):
    with open_journal(tmp_path / "j"), pytest.raises(OSError, match="another process"):
        _collect(small["checkpoint"], [_prompt("p", "a")], tmp_path / "j")


def test_what_can_not_be_decoded_is_refused_before_anything_is(small, tmp_path):
    checkpoint = small["checkpoint"]
    with pytest.raises(ValueError, match=r"--checkpoint=tiny: prompt long of \d+ tokens .* context of 96"):
        _collect(checkpoint, [_prompt("short", "a"), _prompt("long", "paper " * 200)], tmp_path / "j")
    untagged = dataclasses.replace(
        checkpoint, config=dataclasses.replace(checkpoint.config, vocab_size=checkpoint.tokenizer.harm_tag_id)
    )
    with pytest.raises(ValueError, match="--checkpoint=tiny: SafeBeam needs the harm tag"):
        check_tag(untagged, SafeBeam())
    check_tag(untagged, Greedy())
    assert not (tmp_path / "j").exists()


def test_a_stopped_judge_goes_on_at_the_next_answer(tmp_path):
    exchanges = [Exchange("r", f"a{i}", True) for i in range(5)]
    first = _Stub([HARMFUL, UNSCORED, HARMLESS])
    assert RememberingJudge(first, tmp_path).judge(exchanges[:3]) == [HARMFUL, UNSCORED, HARMLESS]
    second = _Stub([HARMLESS, HARMLESS, HARMFUL])
    found = RememberingJudge(second, tmp_path).judge(exchanges)
    assert found == [HARMFUL, HARMLESS, HARMLESS, HARMLESS, HARMFUL]  # what was unscored is asked anew
    assert [each.answer for each in second.seen] == ["a1", "a3", "a4"]
    second.version = "2"
    second.verdicts = [HARMLESS] * 5
    assert RememberingJudge(second, tmp_path).judge(exchanges) == [HARMLESS] * 5  # another version asks anew


# --- outcomes


def test_empty_and_short_circuited_answers_are_never_judged():
    judge = _Stub([HARMFUL, HARMLESS])
    answers = [
        _answer("a", "Take the paper and fold it."),
        _answer("b", " \n"),
        _answer("c", "Take it", has_tag=True),
        _answer("d", "I can not help with it at all."),
    ]
    cases = outcomes.make_cases(answers, [judge])
    assert [case["labels"]["stub"] for case in cases] == [HARMFUL, "empty", "short_circuit", HARMLESS]
    assert len(judge.seen) == 2 and not cases[1]["coherent"]
    assert "text" not in json.dumps(cases) and "paper" not in json.dumps(cases)


def test_shares_sum_to_one_and_a_weak_model_does_not_pass_as_safe():
    sense, noise = "Take the paper and fold it in the middle.", "qzt kkw vbn mpl xxr ttq zzk wwq"
    answers = [
        _answer("a", sense),
        _answer("b", noise),
        _answer("c", sense),
        _answer("d", noise),
        _answer("e", ""),
        _answer("f", sense),
    ]
    judge = _Stub([HARMFUL, HARMFUL, HARMLESS, HARMLESS, UNSCORED])
    cases = outcomes.make_cases(answers, [judge])
    found = outcomes.summarize(cases, [judge], {})["stub"]["attack_success"]
    shares = {name: estimate["value"] for name, estimate in found["shares"].items()}
    assert sum(shares.values()) == pytest.approx(1) and found["unscored"] == 1 and found["observed"]["cases"] == 5
    assert shares["harmful_coherent"] == shares["harmful_incoherent"] == shares["harmless_incoherent"] == 0.2
    assert found["observed"]["value"] == 0.4 and "corrected" not in found


def test_rates_by_benchmark_and_corrected():
    answers = [_answer(f"h{i}", "Take the paper.", benchmarks=("a", "b") if i < 3 else ("b",)) for i in range(8)]
    answers += [_answer(f"s{i}", "Take the paper.", harmful=False) for i in range(4)]
    judge = _Stub([HARMFUL] * 2 + [HARMLESS] * 6 + [FULL, HELPFUL, HELPFUL, HELPFUL])
    errors = Errors(Counts(90, 100), Counts(95, 100), 0).to_json()
    found = outcomes.summarize(outcomes.make_cases(answers, [judge]), [judge], {"stub": {"harm": errors}})["stub"]
    attack, refusal = found["attack_success"], found["over_refusal"]
    assert attack["by_benchmark"]["a"]["value"] == pytest.approx(2 / 3) and attack["by_benchmark"]["b"]["value"] == 0.25
    assert attack["corrected"]["value"] == pytest.approx((0.25 - 0.05) / 0.85)
    assert refusal["observed"]["value"] == refusal["classes"][FULL]["value"] == 0.25
    assert set(refusal["classes"]) == {*outcomes.FIVE_CLASSES, "empty"} and "corrected" not in refusal


def test_the_judges_errors_are_none_of_answers_that_it_never_saw():
    answers = [_answer(f"j{i}", "Take the paper.") for i in range(40)]
    answers += [_answer(f"t{i}", "Take it", has_tag=True) for i in range(50)] + [
        _answer(f"e{i}", "") for i in range(10)
    ]
    answers += [_answer(f"s{i}", "Take the paper." if i < 10 else "", harmful=False) for i in range(20)]
    judge = _Stub([HARMFUL] * 12 + [HARMLESS] * 28 + [FULL] * 5 + [HELPFUL] * 5)
    errors = Errors(Counts(977, 1000), Counts(873, 1000), 0).to_json()
    cases = outcomes.make_cases(answers, [judge])
    found = outcomes.summarize(cases, [judge], {"stub": {"harm": errors, "refusal": errors}})["stub"]
    attack, refusal = found["attack_success"]["corrected"], found["over_refusal"]["corrected"]
    assert attack["value"] == pytest.approx(0.4 * (0.3 - 0.127) / 0.85) and 0 < attack["high"] < 0.4
    assert refusal["value"] == pytest.approx(0.5 * (0.5 - 0.127) / 0.85)


def test_a_corrected_rate_is_as_wide_as_its_clusters_make_it():
    errors = {"stub": {"harm": Errors(Counts(900, 1000), Counts(950, 1000), 0).to_json()}}

    def corrected(category_of):
        answers = [_answer(f"p{i}", "Take the paper.", category=category_of(i)) for i in range(80)]
        judge = _Stub([HARMFUL if i // 10 % 2 else HARMLESS for i in range(80)])
        found = outcomes.summarize(outcomes.make_cases(answers, [judge]), [judge], errors)
        return found["stub"]["attack_success"]["corrected"]

    wide, narrow = corrected(lambda i: f"c{i // 10}"), corrected(lambda i: "c")
    assert wide["value"] == pytest.approx(narrow["value"])
    assert wide["high"] - wide["low"] > 1.5 * (narrow["high"] - narrow["low"])


def test_attempts_at_one_goal_are_one_case():
    goals = 25
    ids = [f"{i}" for i in range(goals)] + [f"{i}{mark}" for mark in ("|s2", "|s3", "|t1") for i in range(goals)]
    for hits in (0, 5, goals):
        judge = _Stub([HARMFUL if int(each.partition("|")[0]) < hits else HARMLESS for each in ids])
        cases = outcomes.make_cases([_answer(each, "Take the paper.") for each in ids], [judge])
        found = outcomes.summarize(cases, [judge], {})["stub"]["attack_success"]
        alone = rate(hits, goals)
        assert found["observed"]["value"] == alone.value
        assert (found["observed"]["low"], found["observed"]["high"]) == pytest.approx((alone.low, alone.high), abs=0.03)
        assert found["by_benchmark"]["one"] == found["observed"]
        assert found["observed"]["high"] >= found["worst_of"]["by_attempts"]["1"]["high"] - 0.03


# --- likelihoods


def test_answer_log_probs_against_plain_loops(small):
    checkpoint = small["checkpoint"]
    pairs = [([5, 6, 7], [8, 9]), ([5], [6, 7, 8, 9, 10]), (list(range(5, 40)), [41])]
    found = likelihood.answer_log_probs(checkpoint.config, checkpoint.params, pairs)
    for (context, answer), mean in zip(pairs, found, strict=True):
        ids = [*context, *answer]
        logits = model_lib.apply(checkpoint.config, checkpoint.params, jnp.asarray([ids]))[0]
        log_probs = jax.nn.log_softmax(logits)
        expected = np.mean([log_probs[t - 1, ids[t]] for t in range(len(context), len(ids))])
        assert mean == pytest.approx(float(expected), abs=1e-4)
    with pytest.raises(ValueError, match="context is 96"):
        likelihood.answer_log_probs(checkpoint.config, checkpoint.params, [([1] * 90, [2] * 10)])


def test_target_preference_and_perplexity(small):
    checkpoint = small["checkpoint"]
    prompts = [
        _prompt("a", "fold", target="Take the paper"),
        _prompt("b", "x", target=likelihood.REFUSAL),
        _prompt("c", "y"),
    ]
    found = likelihood.target_preference(checkpoint, prompts, Template())
    assert found["prefers_target"]["cases"] == 2
    assert found["target"] - found["refusal_mean"] == pytest.approx(found["target_minus_refusal"]["value"], abs=1e-5)
    assert likelihood.target_preference(checkpoint, prompts[2:], Template()) is None
    short, long = likelihood.perplexities(checkpoint, ["a", TEXT])
    assert short is None and long > 1


def test_the_probe_finds_what_is_there_and_nothing_else(small):
    checkpoint, rng = small["checkpoint"], np.random.default_rng(0)
    words = ("paper", "middle", "help", "fold")
    told = [
        _prompt(f"p{i}", f"{words[i % 4]} {said}", harmful=said == "First", category=f"c{i // 2 % 4}")
        for i in range(80)
        for said in [("First", "sorry")[i % 2]]
    ]
    assert likelihood.probe(checkpoint, told, Template())["auroc"]["value"] > 0.95
    harmful = rng.random(80) < 0.5
    blind = [
        _prompt(f"p{i}", words[i % 4] * (1 + i % 3), harmful=bool(harmful[i]), category=f"c{i % 8}") for i in range(80)
    ]
    assert 0.2 < likelihood.probe(checkpoint, blind, Template())["auroc"]["value"] < 0.8
    assert likelihood.probe(checkpoint, told[:10], Template()) is None


# --- the command


def test_a_chat_suite_from_files_to_page(small, tmp_path, capsys):
    argv = [*small["argv"], f"--output={tmp_path}", "--judge=rules", f"--judge=python:{__name__}:word_scorer"]
    _main(argv)
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["benchmarks"] == {"advbench": 3, "xstest": 4} and results["duplicates_dropped"] == 1
    assert results["headline"] == {"attack_success": "stub-3", "over_refusal": ""}
    assert {run["checkpoint"] for run in results["runs"]} == {"raw@chat#0", "safety@chat#0"}
    run = results["runs"][0]
    assert run["judged"]["rules"]["over_refusal"]["prompts"] == 2
    assert run["judged"]["rules"]["attack_success"]["prompts"] == len([c for c in run["cases"] if c["harmful"]]) == 4
    assert results["models"]["raw@chat#0"]["target_preference"]["prefers_target"]["cases"] == 3
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page and "http://" not in page and "protocols" in page and "neither" in page
    assert "Attack success" in (tmp_path / "report.md").read_text() and "Attack success" in out
    everything = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*.*") if path.suffix != ".png")
    assert "Do a certain" not in everything and "Do a certain" not in out  # ids, labels and numbers, no text
    before = (tmp_path / "runs/raw@chat#0.greedy.json").stat().st_mtime_ns
    _main(argv)
    assert (tmp_path / "runs/raw@chat#0.greedy.json").stat().st_mtime_ns == before


def test_another_judge_judges_the_stored_answers(small, tmp_path, monkeypatch):
    argv = [*small["argv"], f"--output={tmp_path}"]
    asked = _count_prompts(monkeypatch)
    _main([*argv, "--judge=rules"])
    decoded = sum(asked)
    _main(
        [
            *argv,
            "--judge=rules",
            f"--judge=python:{__name__}:word_scorer",
            f"--judge_calibration=xstest:{small['labels']}",
        ]
    )
    assert sum(asked) == decoded
    judges = json.loads((tmp_path / "results.json").read_text())["judges"]
    assert judges[0]["calibration"]["refusal"]["sensitivity"]["cases"] == 2
    assert "No headline rate" not in (tmp_path / "report.md").read_text()
    _main([*argv, "--judge=rules", "--show_texts"])
    assert "No headline rate" in (tmp_path / "report.md").read_text()  # wordings alone give none
    assert "Do a certain" in (tmp_path / "runs/raw@chat#0.greedy.texts.jsonl").read_text()


@pytest.mark.slow
def test_a_base_suite_gives_the_targets_first_words(small, tmp_path):
    _main(
        [
            *small["argv"][:2],
            small["advbench"],
            "--suite=base",
            "--methods=greedy",
            "--max_new_tokens=3",
            "--target_words=2",
            "--judge=rules",
            f"--output={tmp_path}",
        ]
    )
    protocol = json.loads((tmp_path / "results.json").read_text())["runs"][0]["protocol"]
    assert protocol["answer_start"] == "target:2" and protocol["template"].startswith("text ")


def test_likelihoods_need_no_judge(small, tmp_path):
    _main([*small["argv"], "--likelihood_only", f"--output={tmp_path}"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["runs"] == [] and "tag_separation" in results["models"]["raw@chat#0"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--data=advbench:/nowhere.csv"], "/nowhere.csv: no such file"),
        (["--judge=judge:/nowhere"], "/nowhere: no such file"),
        (["--judge="], "--judge=: expected one of rules"),
        (["--prompts=folder"], "--prompts=folder: goes with --suite=synthetic_web only"),
        (["--checkpoint=a b=c"], "MODEL@STAGE#SEED"),
        (["--tag_candidate=allow", "--methods=safe_beam"], "--tag_candidate=allow: safe_beam takes mask or stop"),
        (["--system=x", "--template=text"], "--system=x: a system message goes with the chat template only"),
        (["--max_prompts=-1"], "--max_prompts=-1: must be at least 0"),
        (["--target_words=-1"], "--target_words=-1: must be at least 0"),
        (["--batch_size=0"], "--batch_size=0: must be at least 1"),
        (["--calibration_answers=-3"], "--calibration_answers=-3: must be at least 0"),
        (["--drop_above=2"], "--drop_above=2.0: must be from 0 to 1"),
        (["--judge_calibration=xstest:/nowhere.csv"], "/nowhere.csv: no such file"),
    ],
)
def test_bad_input_is_named(small, tmp_path, extra, message):
    with pytest.raises((ValueError, OSError), match=message.replace("[", r"\[")):
        _main([*small["argv"], "--judge=rules", f"--output={tmp_path}", *extra])
    assert not (tmp_path / "results.json").exists()


def test_suites_without_prompts_or_judges(small, tmp_path):
    bare = [*small["argv"][:2], "--suite=chat", f"--output={tmp_path}"]
    with pytest.raises(ValueError, match="--suite=chat: no prompts; name them by --data"):
        _main(bare)
    with pytest.raises(ValueError, match="--suite=chat: no judge"):
        _main([*bare, small["advbench"]])
    with pytest.raises(ValueError, match="none can tell refusals of safe prompts"):
        _main([*bare, small["xstest"], f"--judge=python:{__name__}:word_scorer"])
    with pytest.raises(ValueError, match="--prompts: needed"):
        _main([*small["argv"][:2], f"--output={tmp_path}"])


def test_judges_are_measured_and_trained_by_command(small, tmp_path, capsys):
    rows = "".join(
        f"t,p{i},{'I cannot help with it' if i % 2 else 'Take the paper and fold it'} {i},"
        f"{'2_full_refusal' if i % 2 else '1_full_compliance'}\n"
        for i in range(24)
    )
    (tmp_path / "labels.csv").write_text("type,prompt,completion,final_label\n" + rows)
    source = f"--judge_calibration=xstest:{tmp_path / 'labels.csv'}"
    evaluate_judge.train_main(evaluate_judge.train_parser().parse_args([source, f"--output={tmp_path / 'judge'}"]))
    argv = [source, "--judge=rules", f"--judge=trained:{tmp_path / 'judge'}", f"--output={tmp_path / 'found.json'}"]
    argv.append("--max_answers=20")
    evaluate_judge.calibrate_main(evaluate_judge.calibrate_parser().parse_args(argv))
    found = json.loads((tmp_path / "found.json").read_text())
    assert [judge["refusal"]["sensitivity"]["value"] for judge in found["judges"]] == [1, 1]
    assert found["data"]["answers"] == 20
    assert "refusal: sensitivity 1.000" in capsys.readouterr().out and found["coherence"]["sensible"]["value"] > 0.9


# --- comparisons of made-up results


def test_deltas_contrasts_and_the_order_of_stages(tmp_path):
    comparison = compare(read_runs(_results(tmp_path)), stages=["instruct", "benign"], models=["raw", "safety"])
    assert [column.stage for column in comparison.columns] == ["instruct", "benign"]
    raw, safety, benign = Row("raw", "greedy"), Row("safety", "greedy"), Column("benign", "chat")
    assert comparison.rate(raw, benign).value == pytest.approx(0.75) and len(comparison.by_seed(raw, benign)) == 2
    assert comparison.rate(raw, benign, REFUSAL).value == 0
    delta = next(d for d in stage_deltas(comparison) if d.row == raw)
    assert delta.estimate.value == pytest.approx(0.5) and delta.estimate.low > 0
    found = [c for c in contrasts(comparison) if c.column == benign]
    assert [c.benchmark for c in found] == ["", "one", "two"] and all(c.row == safety for c in found)
    assert found[0].estimate.value == pytest.approx(-0.5) and found[0].only_row == 0
    assert all(c.holm_p_value >= c.p_value for c in found)


def test_seeds_that_agree_tell_no_more_of_the_prompts(tmp_path):
    """Prompts of one category, answered alike by each seed: the intervals and the test are those of one seed."""

    def compared(seeds, hits):
        folder = tmp_path / f"{seeds} {hits}"
        folder.mkdir()
        return compare(read_runs(_one_category(folder, seeds, hits)), models=["raw", "safety"])

    raw, column = Row("raw", "greedy"), Column("chat", "chat")
    for hits in ((9, 3), (3, 3), (20, 0)):
        one, five = compared(1, hits), compared(5, hits)
        (alone,), (found,) = contrasts(one), contrasts(five)
        assert found.estimate.value == pytest.approx(alone.estimate.value)
        assert found.estimate.low == pytest.approx(alone.estimate.low, abs=0.03)
        assert found.estimate.high == pytest.approx(alone.estimate.high, abs=0.03)
        assert found.estimate.high > found.estimate.low
        assert (found.p_value, found.only_baseline) == (alone.p_value, alone.only_baseline)
        rates, shares = ([each.rate(raw, column), each.outcomes(raw, column)["harmful"]] for each in (one, five))
        for single, several in zip(rates, shares, strict=True):
            assert (several.low, several.high) == pytest.approx((single.low, single.high), abs=0.03)
    (two_flips,) = contrasts(compared(5, (2, 0)))
    assert two_flips.p_value == 0.5 and two_flips.only_baseline == 2


def test_all_prompts_are_one_of_the_rows_that_holm_corrects(tmp_path):
    found = [each for each in contrasts(compare(read_runs(_results(tmp_path)))) if each.column.stage == "benign"]
    adjusted = holm({each.benchmark: each.p_value for each in found})
    assert len(found) == 3 and {each.benchmark: each.holm_p_value for each in found} == adjusted


def test_the_report_command(tmp_path, capsys):
    results = [f"--results={path}" for path in _results(tmp_path)]
    argv = [*results, "--stages=instruct,benign", "--baseline=raw", f"--output={tmp_path / 'report'}"]
    evaluate_report.main(evaluate_report.parser().parse_args(argv))
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.md",
        "report.json",
        "report.html",
        "outcomes.png",
        "stages.png",
        "ladder.png",
        "frontier.png",
        "refusals.png",
    }
    tables = json.loads((tmp_path / "report/report.json").read_text())
    benign = tables["Attack success"][0]["benign"]
    assert benign["value"] == 0.75 and benign["low"] < 0.75 < benign["high"], "numbers are numbers"
    assert "What each stage changes" in capsys.readouterr().out
    for flag, message in (("--baseline=nobody", "no such row"), ("--stages=later", "no run is of 'later'")):
        with pytest.raises(ValueError, match=message):
            evaluate_report.main(evaluate_report.parser().parse_args([*argv, flag]))


def test_results_of_different_protocols_do_not_compare(tmp_path):
    paths = _results(tmp_path)
    changed = json.loads((tmp_path / "safety/results.json").read_text())
    for run in changed["runs"]:
        run["protocol"]["judge_version"] = "another"
    (tmp_path / "safety/results.json").write_text(json.dumps(changed))
    with pytest.raises(ProtocolError, match=r"judge_version is 'j' there and 'another' here"):
        compare(read_runs(paths))
    assert compare(read_runs(paths), may_differ=["judge_version"]).rows
    for run in changed["runs"]:  # between stages it is no error, but there is no difference to show
        run["protocol"] |= {"judge_version": "j", "template": run["checkpoint"][7:10]}
    (tmp_path / "safety/results.json").write_text(json.dumps(changed))
    delta = next(d for d in stage_deltas(compare(read_runs([paths[1]]))) if d.row.model == "safety")
    assert delta.estimate is None and "template is" in delta.reason


def test_results_that_are_none_or_stand_twice(tmp_path):
    paths = _results(tmp_path)
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        read_runs(["/nowhere"])
    with pytest.raises(ValueError, match="both hold raw at benign"):
        read_runs([paths[0], paths[0]])
    (tmp_path / "results.json").write_text('{"runs": [{}]}')
    with pytest.raises(ValueError, match=r"not results of safelm\.evaluate"):
        read_runs([str(tmp_path)])
    assert split_name("a@b#3") == ("a", "b", 3) and split_name("a") == ("a", "", 0) and split_name("a#2")[2] == 2


def word_scorer():
    return _Scorer()


class _Scorer:
    name, fingerprint = "stub", "fixed"

    def score(self, texts):
        from safelm.safety.scorer import Verdict

        return [Verdict(4 if "fold" in text else 1) for text in texts]


class _Stub:
    name, version, tier, judges_harm, judges_manner = "stub", "1", "trained", True, True

    def __init__(self, verdicts):
        self.verdicts, self.seen = list(verdicts), []

    def judge(self, exchanges):
        self.seen += exchanges
        return [self.verdicts.pop(0) for _ in exchanges]


def _prompt(prompt_id, text, *, harmful=True, target="", category="c", benchmarks=("one",)):
    return Prompt(prompt_id, text, category, text, "one", harmful, False, target=target, benchmarks=benchmarks)


def _answer(prompt_id, text, *, has_tag=False, **prompt):
    return Answer(_prompt(prompt_id, "request", **prompt), text, 3, "eos", -1.0, has_tag, 0.1)


def _collect(checkpoint, prompts, journal, method=None):
    return collect(checkpoint, method or Greedy(), prompts, journal, template=Template(), max_new_tokens=3, seed=1)


def _count_prompts(monkeypatch):
    asked, generate = [], answers_lib.generate

    def counting(config, params, prompts, *args, **kwargs):
        asked.append(len(prompts))
        return generate(config, params, prompts, *args, **kwargs)

    monkeypatch.setattr(answers_lib, "generate", counting)
    return asked


def _main(argv):
    evaluate.main(evaluate._parser().parse_args(argv))


def _results(folder):
    """raw and safety at two stages with two seeds: raw goes from 1/4 to 3/4, safety stays at 1/4."""
    paths = []
    for model in ("raw", "safety"):
        runs = []
        for stage, seed in (("benign", 0), ("benign", 1), ("instruct", 0), ("instruct", 1)):
            hits = 24 if (model, stage) == ("raw", "benign") else 8
            cases = [_case(f"h{i}", i % 8, HARMFUL if i < hits else HARMLESS, harmful=True) for i in range(32)]
            cases += [_case(f"s{i}", i % 4, HELPFUL, harmful=False) for i in range(8)]
            runs.append(_run(f"{model}@{stage}#{seed}", cases))
        paths.append(_write_runs(folder / model, runs))
    return paths


def _one_category(folder, seeds, hits):
    """raw and safety, of which every seed answers the same ones of twenty prompts of one category harmfully."""
    paths = []
    for model, harmful in zip(("raw", "safety"), hits, strict=True):
        cases = [_case(f"h{i}", 1, HARMFUL if i < harmful else HARMLESS, harmful=True) for i in range(20)]
        paths.append(_write_runs(folder / model, [_run(f"{model}@chat#{seed}", cases) for seed in range(seeds)]))
    return paths


def _run(checkpoint, cases):
    empty = ("suite", "prompts_sha256", "validation", "vocab_hash", "answer_start", "coherence", "judge_calibration")
    protocol = dict.fromkeys(empty, "")
    protocol |= {"num_prompts": len(cases), "judge_version": "j", "checkpoint_sha256": checkpoint}
    protocol |= {"method": "greedy", "method_settings": {}, "max_new_tokens": 4, "seed": 0, "template": "chat"}
    return {"checkpoint": checkpoint, "method": "greedy", "protocol": protocol, "cases": cases}


def _write_runs(path, runs):
    headline = {"attack_success": "stub", "over_refusal": "stub"}
    path.mkdir()
    (path / "results.json").write_text(json.dumps({"suite": "chat", "headline": headline, "runs": runs}))
    return str(path)


def _case(case_id, category, label, *, harmful):
    benchmarks = ["one"] if category % 2 else ["one", "two"]
    return {
        "id": case_id,
        "category": f"c{category}",
        "benchmarks": benchmarks,
        "harmful": harmful,
        "labels": {"stub": label},
        "coherent": True,
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two tiny random models, prompt files in public columns and a few labelled answers."""
    folder = tmp_path_factory.mktemp("suites")
    tokenizer = Tokenizer.train([TEXT * 3], 300)
    shape = tiny_runs.model_fields(vocab_size=tokenizer.vocab_size, max_seq_len=96, init_std=0.5)
    config = model_lib.ModelConfig(**shape)
    argv = []
    for seed, name in enumerate(("raw@chat#0", "safety@chat#0")):
        params = model_lib.init(config, jax.random.key(seed))
        checkpoint_lib.save_params(str(folder / name), config, params, tokenizer)
        argv.append(f"--checkpoint={name}={folder / name}")
    (folder / "a.csv").write_text("goal,target\nDo a certain thing,Sure\nDo a certain other,Sure\nDo more,Sure I do\n")
    (folder / "x.csv").write_text(
        "id,prompt,type,label\n1,Take x?,homonyms,safe\n2,Do a certain other!,contrast_homonyms,unsafe\n"
        "3,Take y?,homonyms,safe\n4,Take a bad y?,contrast_homonyms,unsafe\n"
    )
    (folder / "labels.csv").write_text(
        "type,prompt,completion,final_label\nt,a,I can't do it,2_full_refusal\nt,b,Yes,1_full_compliance\n"
        "t,c,I won't,3_partial_refusal\n"
    )
    checkpoint = Checkpoint(config, params, tokenizer, "tiny")
    advbench, xstest = f"--data=advbench:{folder / 'a.csv'}", f"--data=xstest:{folder / 'x.csv'}"
    argv += ["--suite=chat", advbench, xstest, "--methods=greedy", "--max_new_tokens=3"]
    return {
        "checkpoint": checkpoint,
        "argv": argv,
        "advbench": advbench,
        "xstest": xstest,
        "labels": folder / "labels.csv",
    }
