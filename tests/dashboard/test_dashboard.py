"""What a dashboard reads: evaluations, capability, training logs, other harnesses; what never stands side by side."""

import json
import zipfile

import evaluation_results
import pytest
import side_files

from safelm.dashboard import __main__ as command
from safelm.dashboard import page
from safelm.dashboard.measures import Row
from safelm.dashboard.reading import parse_place, read_board
from safelm.dashboard.training import thin
from safelm.evaluate.comparing import compare, read_runs
from safelm.evaluate.comparing.results import ATTACK, REFUSAL
from safelm.stats.intervals import rate

LM_EVAL = {
    "results": {
        "piqa": {"alias": "piqa", "acc,none": 0.61, "acc_stderr,none": 0.01, "acc_norm,none": 0.62},
        "words": {"perplexity,none": 21.5, "perplexity_stderr,none": "N/A"},
    },
    "versions": {"piqa": 1.0},
    "n-shot": {"piqa": 0},
    "higher_is_better": {"piqa": {"acc": True, "acc_norm": True}, "words": {"perplexity": False}},
    "config": {"model_args": "checkpoint=runs/safety@chat,dtype=float32"},
}
INSPECT = {
    "version": 2,
    "status": "success",
    "eval": {
        "task": "evals/refusing",
        "task_version": 0,
        "model": "safelm/runs/safety@chat",
        "dataset": {"name": "set", "samples": 3},
        "config": {"epochs": 1},
        "model_args": {"method": "safe_beam"},
    },
    "results": {
        "scores": [
            {
                "name": "match",
                "scorer": "match",
                "scored_samples": 3,
                "metrics": {"accuracy": {"value": 0.5}, "stderr": {"value": 0.2}},
            }
        ]
    },
    "samples": [
        {"id": "a", "epoch": 1, "input": "SECRET in", "scores": {"match": {"value": "C", "answer": "SECRET out"}}},
        {"id": "a long id that spells SECRET", "epoch": 1, "scores": {"match": {"value": "SECRET value"}}},
        {"id": 3, "epoch": 1, "scores": {"match": {"value": 0.25}}},
    ],
}


def board_of(*flags, **options):
    return read_board([parse_place(str(flag)) for flag in flags], **options)


def cells(board, title):
    """Cells by row as text, of all protocols in their order."""
    return [
        {str(row): cell for row in board.rows if (cell := board.cell(column, row)) is not None}
        for column in board.columns
        if column.title == title
    ]


def measure(values, label, title):
    """A value of a board's JSON."""
    row = [each["label"] for each in values["rows"]].index(label)
    column = [each["title"] for each in values["columns"]].index(title)
    return next(each["value"] for each in values["measures"] if (each["row"], each["column"]) == (row, column))


def write_json(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    return path


def test_rates_are_those_of_the_report_over_seeds_and_prompts(tmp_path):
    evaluation_results.write(
        tmp_path / "chat", {f"{name}@chat#{seed}": (0.8, 0.1) for name in ("raw", "safety") for seed in (0, 1)}
    )
    evaluation_results.write(tmp_path / "beam", {"safety@chat#0": (0.1, 0.3)}, method="safe_beam")
    board = board_of(tmp_path)
    comparison = compare(read_runs([str(tmp_path / "chat"), str(tmp_path / "beam")]))
    for aspect, title in ((ATTACK, "harmful answers"), (REFUSAL, "safe prompts refused")):
        (found,) = cells(board, title)
        assert len(found) == 3
        for row in comparison.rows:
            want = comparison.rate(row, comparison.columns[0], aspect)
            cell = found[str(Row(row.model, "chat", row.method))]
            assert (cell.value, cell.low, cell.high) == (want.value, want.low, want.high)
    harmful = cells(board, "harmful answers")[0]["raw @ chat"]
    assert (
        harmful.by_seed == comparison.by_seed(comparison.rows[0], comparison.columns[0]) and len(harmful.by_seed) == 2
    )
    for cases, value, low, high in harmful.by_category.values():
        assert cases == 4 and low <= value <= high
        assert round(2 * cases * value) == 2 * cases * value, "two seeds"
    assert {column.title for column in board.columns if column.section == "By judge"} == {
        f"{what}, by {judge}" for what in ("harmful answers", "safe prompts refused") for judge in ("rules", "marker")
    }
    perplexity = cells(board, "perplexity of safe text")[0]
    assert perplexity["raw @ chat"].low is None and len(perplexity["raw @ chat"].by_seed) == 2
    assert perplexity["safety @ chat + safe_beam"] == perplexity["safety @ chat"], "it belongs to the checkpoint"


def test_a_categorys_interval_is_wilsons_at_its_prompts(tmp_path):
    evaluation_results.write(tmp_path, {"raw": (0.5, 0.0)}, number=80)
    by_category = cells(board_of(tmp_path), "harmful answers")[0]["raw"].by_category
    for cases, value, low, high in by_category.values():
        want = rate(round(value * cases), cases)
        assert (value, low, high) == (want.value, want.low, want.high) and cases == 8


def test_numbers_of_different_protocols_get_columns_of_their_own(tmp_path):
    evaluation_results.write(tmp_path / "short", {"raw": (0.8, 0.1), "safety": (0.1, 0.2)})
    evaluation_results.write(tmp_path / "long", {"raw": (0.9, 0.1)}, max_new_tokens=512)
    board = board_of(tmp_path)
    long, short = cells(board, "harmful answers")
    assert long.keys() == {"raw"} and short.keys() == {"raw", "safety"}
    fields = [board.protocols[key].fields for key in board.protocol_keys]
    assert {name for name in fields[0] if fields[0][name] != fields[1][name]} == {"max_new_tokens"}
    with pytest.raises(ValueError, match=r"both hold raw at no stage, seed 0, by one protocol: give one .* NAME=PATH"):
        board_of(tmp_path, may_differ=["max_new_tokens"])
    named = board_of(tmp_path / "short", f"long={tmp_path / 'long'}", may_differ=["max_new_tokens"])
    (together,) = cells(named, "harmful answers")
    assert together.keys() == {"raw", "safety", "long/raw"}


def test_a_capability_file_and_other_harnesses_stand_in_their_models_row(tmp_path):
    evaluation_results.write(tmp_path / "chat", {"safety@chat": (0.1, 0.2)})
    evaluation_results.write(tmp_path / "beam", {"safety@chat": (0.0, 0.2)}, method="safe_beam")
    share = {"value": 0.5, "low": 0.4, "high": 0.6, "cases": 90}
    capability = {"safety@chat": {"tasks": {"piqa": share}, "average": share, "protocol": {"harness": "1"}}}
    write_json(tmp_path / "capability.json", capability)
    write_json(tmp_path / "lm" / "results_2026-01-01T00-00-00.json", LM_EVAL)
    write_json(tmp_path / "logs" / "2026-01-01T00-00-00_refusing_x.json", INSPECT)
    board = board_of(tmp_path)
    kinds = sorted(source.kind for source in board.sources)
    assert kinds == ["Inspect log", "capability", "evaluation", "evaluation", "lm-eval results"]
    assert [str(row) for row in board.rows] == ["safety @ chat", "safety @ chat + safe_beam"]
    (piqa,) = cells(board, "piqa: acc")
    assert piqa["safety @ chat"].low == pytest.approx(0.61 - 1.96 * 0.01, abs=1e-4)
    (norm,) = cells(board, "piqa: acc_norm")
    assert norm["safety @ chat"].low is None, "no standard error, no interval"
    (words,) = cells(board, "words: perplexity")
    assert words["safety @ chat"].value == 21.5 and words["safety @ chat"].high is None
    (average,) = cells(board, "average, accuracy")
    assert average["safety @ chat + safe_beam"].cases == 90
    (inspect,) = cells(board, "refusing, match: accuracy")
    assert inspect.keys() == {"safety @ chat + safe_beam"}, "it says how it decoded"
    assert inspect["safety @ chat + safe_beam"].high == pytest.approx(0.5 + 1.96 * 0.2, abs=1e-3)


def test_seeds_are_one_row_with_their_mean_whatever_measured_them(tmp_path):
    def share(value):
        return {"value": value, "low": value - 0.1, "high": value + 0.1, "cases": 40}

    values = {0: 0.25, 1: 0.5, 2: 0.75}
    capability, gate = {}, {"about": {"profile": "quick", "limits": {}}, "models": {}}
    for seed, value in values.items():
        capability[f"raw@chat#{seed}"] = {"tasks": {}, "average": share(value), "protocol": {"harness": "1"}}
        criterion = {"criterion": "plain", "says": "plainly", "limit": 0.1, "rate": share(value), "verdict": "fail"}
        attack = {"name": "none", "rate": share(value)}
        gate["models"][f"raw@chat#{seed}"] = {"criteria": [criterion], "attacks": [attack]}
        lm_eval = LM_EVAL | {"results": {"piqa": {"acc,none": value, "acc_stderr,none": 0.01}}}
        write_json(tmp_path / f"lm{seed}" / "results_1.json", lm_eval)
        inspect = json.loads(json.dumps(INSPECT))
        inspect["results"]["scores"][0]["metrics"]["accuracy"]["value"] = value
        write_json(tmp_path / f"inspect{seed}" / "2026_1.json", inspect)
    own = [write_json(tmp_path / "capability.json", capability), write_json(tmp_path / "g" / "results.json", gate)]
    others = [f"raw@chat#{seed}={tmp_path / f'{name}{seed}'}" for name in ("lm", "inspect") for seed in values]
    board = board_of(*own, *others)
    titles = ("average, accuracy", "plainly (limit 10%)", "harmful answers, nobody attacks", "piqa: acc")
    for title in (*titles, "refusing, match: accuracy"):
        (of_row,) = cells(board, title)
        assert {(cell.value, cell.low, cell.high) for cell in of_row.values()} == {(0.5, None, None)}
        assert all(cell.by_seed == values for cell in of_row.values())
    assert {run.seed for run in board.cases[0].runs} == set(values)
    with pytest.raises(ValueError, match=r"piqa: acc of raw @ chat, seed 2, is there already"):
        board_of(*others, f"raw@chat#2={tmp_path / 'lm0'}")
    alone = cells(board_of(others[0]), "piqa: acc")[0]["raw @ chat"]
    assert alone.low is not None and not alone.by_seed, "one seed keeps its interval"


def test_a_harness_that_has_all_wrong_is_not_certain(tmp_path):
    wrong = LM_EVAL | {"results": {"piqa": {"acc,none": 0.0, "acc_stderr,none": 0.0, "sample_len": 30}}}
    write_json(tmp_path / "results_2026-01-01T00-00-00.json", wrong)
    (cell,) = cells(board_of(tmp_path), "piqa: acc")[0].values()
    assert (cell.value, cell.low, cell.high) == (0.0, 0.0, rate(0, 30).high)


def pack(path, **parts):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, value in parts.items():
            packed.writestr(name.replace("__", "/") + ".json", value if isinstance(value, str) else json.dumps(value))
    return path


def test_inspect_s_packed_logs_are_read_as_its_json_is(tmp_path):
    header = {name: value for name, value in INSPECT.items() if name != "samples"}
    parts = {"_journal__start": {"version": 2, "eval": INSPECT["eval"]}, "header": header}
    finished = pack(tmp_path / "a.eval", **parts, summaries=INSPECT["samples"], samples__a_epoch_1="SECRET transcript")
    write_json(tmp_path / "json" / "2026-01-01_b.json", INSPECT)
    packed, plain = board_of(finished), board_of(tmp_path / "json")
    assert cells(packed, "refusing, match: accuracy") == cells(plain, "refusing, match: accuracy")
    (cases,), (others,) = packed.cases, plain.cases
    assert sorted(cases.ids) == sorted(others.ids) and "SECRET" not in str(packed.cases)
    oldest = {"start": parts["_journal__start"], "results": {"status": "success", "results": INSPECT["results"]}}
    pack(tmp_path / "old.eval", **oldest, summary=INSPECT["samples"])
    assert cells(board_of(tmp_path / "old.eval"), "refusing, match: accuracy") == cells(
        plain, "refusing, match: accuracy"
    )
    stopped = parts["_journal__start"] | {"results": INSPECT["results"]}
    journal = {f"_journal__summaries__{n}": [{"id": n, "epoch": 1, "scores": {}}] for n in (10, 9)}
    pack(tmp_path / "stopped.eval", _journal__start=stopped, **journal)
    board = board_of(tmp_path / "stopped.eval")
    assert sorted(board.cases[0].ids) == ["10", "9"] and "not finished" in str(board.sources)
    for name, content, message in (
        ("cut.eval", b"PK", "no log of Inspect: not a zip"),
        ("other.eval", {"x": {}}, "neither header.json nor a journal"),
        ("bad.eval", {"header": "[1]"}, "header.json is no JSON of the right kind"),
        ("rows.eval", {"header": header, "summaries": [1]}, "summaries.json is no list of objects"),
    ):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            pack(tmp_path / name, **content)
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            board_of(tmp_path / name)


def test_the_gate_and_the_ladder_stand_in_columns_of_their_own_file(tmp_path):
    share = {"value": 0.25, "low": 0.2, "high": 0.3, "cases": 40}
    criterion = {
        "criterion": "inputs",
        "says": "harmful answers, worst",
        "limit": 0.1,
        "rate": share,
        "verdict": "fail",
    }
    broken = criterion | {"criterion": "benign", "rate": None, "verdict": "not measured"}
    gate = {
        "about": {"profile": "quick", "limits": {}},
        "models": {"safety@chat": {"criteria": [criterion, broken], "attacks": [{"name": "none", "rate": share}]}},
    }
    for folder in ("a", "b"):
        write_json(tmp_path / folder / "results.json", gate)
    seeds = share | {"by_seed": {"0": 0.2, "1": 0.3}}
    ladder = {"rows": {"raw": {"pretraining": {"harmful completions": seeds}}}, "orderings": []}
    write_json(tmp_path / "ladder" / "results.json", ladder)
    board = board_of(tmp_path)
    assert len(board.protocols) == 3, "two gates may have asked different prompts"
    worst = cells(board, "harmful answers, worst (limit 10%)")
    assert [found["safety @ chat + gate"].low for found in worst] == [0.2, 0.2]
    assert cells(board, "harmful answers, nobody attacks")[0]["safety @ chat + gate"].cases == 40
    (rungs,) = cells(board, "harmful completions")
    assert rungs["raw @ pretraining"].by_seed == {0: 0.2, 1: 0.3}


def test_a_judges_mean_score_is_a_column(tmp_path):
    path = evaluation_results.write(tmp_path, {"raw": (0.8, 0.1)})
    results = json.loads(path.read_text())
    score = {"value": 0.4, "low": 0.3, "high": 0.5, "cases": 20}
    results["runs"][0]["judged"]["marker"]["attack_success"]["mean_score"] = score
    path.write_text(json.dumps(results))
    assert cells(board_of(tmp_path), "mean score, marker")[0]["raw"].high == 0.5


def test_texts_are_there_for_none_but_those_who_ask(tmp_path):
    texts = {"prompt": "SECRET prompt", "answer": "SECRET answer"}
    evaluation_results.write(tmp_path / "chat", {"safety@chat": (0.5, 0.2)}, texts=texts)
    write_json(tmp_path / "2026-01-01_x.json", INSPECT)
    hidden = json.dumps(page.to_json(board_of(tmp_path), "t"))
    assert "SECRET" not in hidden and "set/0000" in hidden
    shown = page.to_json(board_of(tmp_path, show_texts=True), "t")
    assert "Inspect" in json.dumps(shown) and "SECRET in" not in json.dumps(shown)
    (run,) = shown["cases"][0]["runs"]
    assert run["texts"][0] == ("SECRET prompt", "SECRET answer") and len(run["texts"]) == 40
    assert shown["cases"][1]["labels"] == ["correct", "text", "0.25"]


def test_curves_keep_every_peak_and_know_their_tokens(tmp_path):
    lines = [{"step": step, "loss": 3.0, "eval_loss/raw_web": 2.0, "tokens_learned": 7} for step in range(1, 3001)]
    lines[1777]["loss"], lines[2000]["loss"] = 9.0, float("nan")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30')
    write_json(tmp_path / "raw" / "config.json", {"batch_size": 8, "seq_len": 16})
    board = board_of(tmp_path)
    (curves,) = board.curves
    assert curves.name == "raw" and curves.tokens_per_step == 128
    assert curves.values.keys() == {"loss", "eval_loss/raw_web"}
    loss = curves.values["loss"]
    assert len(loss) <= 400 and (1778, 9.0) in loss and loss[0][0] == 1 and loss[-1][0] == 3000
    assert not board.rows and page.to_json(board, "t")["headline"] == ""
    assert thin([(1, 2.0)]) == [(1, 2.0)]


def test_a_stage_called_by_its_tokens_is_a_place_in_pretraining():
    assert Row("raw", "20M", "greedy").tokens == 20_000_000 and Row("raw", "1.5B", "").tokens == 1_500_000_000
    assert Row("raw", "base", "greedy").tokens is None and Row("raw", "2", "greedy").tokens is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", "{", "results.json: damaged, not JSON"),
        ("results.json", '{"rows": {}}', "neither results of safelm.evaluate, release_gate or ladder nor a log"),
        ("results.json", '{"about": {"profile": "quick"}, "models": {"a": {}}}', "not results of safelm.release_gate"),
        ("results.json", '{"rows": {"a": {"base": {"neither": {}}}}, "orderings": []}', "not results of safelm.ladder"),
        ("results.json", '{"headline": {}, "runs": [{"method": "x"}]}', "not results of safelm.evaluate"),
        ("capability.json", '{"a": 1}', "not results of safelm.evaluate capability"),
        ("metrics.jsonl", '{"loss": 1}\n', "a line without a step"),
        ("metrics.jsonl", "", "holds no metrics"),
        ("2026.json", json.dumps(INSPECT | {"results": None, "status": "error"}), "without results .status error."),
        ("results_1.json", json.dumps(LM_EVAL | {"results": {}}), "without a task"),
    ],
)
def test_a_bad_file_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        board_of(tmp_path / name)
    assert name in str(caught.value)


ODD = {
    "results.json": [
        "{",
        {"about": 3, "models": {}},
        {"about": ["profile"], "models": {}},
        {"about": {"profile": "quick"}, "models": {"a": 3}},
        {"rows": {"a": 3}, "orderings": []},
        {"headline": 3, "runs": []},
        {"headline": {}, "runs": 3},
        {"headline": {}, "runs": [], "models": 3},
        {"headline": {}, "runs": [{"checkpoint": "a", "method": "m", "protocol": {}, "cases": [{"labels": 3}]}]},
        {"headline": {}, "suite": "s", "runs": [{"checkpoint": "a#x", "method": "m", "protocol": {}, "cases": []}]},
    ],
    "capability.json": [
        {"a": 1},
        {"a": {"protocol": {}, "tasks": {}, "average": {"value": "x", "low": 0, "high": 1, "cases": 1}}},
        {"a": {"protocol": {}, "tasks": {}, "average": {"value": float("nan"), "low": 0, "high": 1, "cases": 1}}},
    ],
    "metrics.jsonl": ['{"epoch": 1}\n', '{"step": 1, "loss": 1' + "0" * 400 + "}\n", ""],
    "results_1.json": [{"results": {"a": 3}, "versions": {}}, {"results": {"a": [1]}, "versions": {}}],
    "2026.json": [{"eval": {"task": 3}, "status": "success", "results": {"scores": [3]}}],
}


@pytest.mark.parametrize(
    ("name", "content"),
    [(name, content) for name, contents in ODD.items() for content in contents],
    ids=[f"{name}-{number}" for name, contents in ODD.items() for number in range(len(contents))],
)
def test_a_found_file_of_another_form_is_left_out_and_a_named_one_refused(name, content, tmp_path):
    write_json(tmp_path / "good" / "results_1.json", LM_EVAL)
    odd = tmp_path / "odd" / name
    write_json(odd, {})
    odd.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=f"^{odd}: ") as caught:
        board_of(odd)
    reason = str(caught.value).removeprefix(f"{odd}: ")
    board = board_of(tmp_path)
    left_out = {source.path: source.note for source in board.sources if source.kind == "left out"}
    assert left_out == {str(odd): reason}
    assert [str(row) for row in board.rows] == ["safety @ chat"] and not board.curves


def test_a_broken_link_is_no_file_and_a_damaged_file_alone_is_named(tmp_path):
    (tmp_path / "results.json").symlink_to(tmp_path / "gone")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"nothing to show there.*; .*/metrics.jsonl: holds no metrics"):
        board_of(tmp_path)


def test_a_number_that_two_found_files_hold_is_still_refused(tmp_path):
    for folder in ("a", "b"):
        write_json(tmp_path / folder / "results_1.json", LM_EVAL)
    with pytest.raises(ValueError, match=r"b/results_1.json: .* is there already.*NAME=PATH"):
        board_of(tmp_path)


def test_places_that_hold_nothing_are_named(tmp_path):
    with pytest.raises(ValueError, match="nothing to show there"):
        board_of(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        parse_place("name=nowhere")
    with pytest.raises(ValueError, match="gs://b/x: the dashboard reads local files"):
        parse_place("gs://b/x")


def test_the_command_writes_a_page_and_its_json(tmp_path, capsys):
    evaluation_results.write(tmp_path / "study", {"raw": (0.9, 0.0), "safety": (0.1, 0.2)})
    write_json(tmp_path / "study" / "results_of_others.json", {"rows": {}})
    output = tmp_path / "out"
    arguments = [str(tmp_path / "study"), f"--output={output}", "--title=</script><b>T"]
    command.main(command.parser().parse_args(arguments))
    told = capsys.readouterr().out
    assert "2 rows" in told and "1 file left out" in told
    values, html = json.loads((output / "dashboard.json").read_text()), (output / "dashboard.html").read_text()
    assert values["title"] == "</script><b>T" and "<b>T" not in html and html.count("</script>") == 2
    most, least = (f"{100 * measure(values, name, 'harmful answers'):.1f}% ({name})" for name in ("raw", "safety"))
    price = f"{100 * measure(values, 'safety', 'safe prompts refused'):.1f}%"
    assert values["headline"] == f"Harmful answers: {most} down to {least}, which refuses {price} of safe prompts."
    measures = {(each["row"], each["column"]): each for each in values["measures"]}
    assert len(measures) == len(values["measures"]) and all(0 <= row < 2 for row, _ in measures)
    assert [source["kind"] for source in values["sources"]] == ["evaluation", "left out"]
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "") and "https://" not in html
    side_files.assert_only_documents("dashboard", output)
