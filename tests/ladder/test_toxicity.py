"""The toxicity ladder: who shares text with whom, what judges say of labels, and records for another machine."""

import csv
import dataclasses
import gzip
import io
import json
import shutil
import zipfile

import numpy as np
import pytest
import tiny_runs
from ml_collections import ConfigDict

from configs import ladder as ladder_config
from safelm.ladder import command as ladder
from safelm.ladder import data as ladder_data
from safelm.ladder import design as ladder_design
from safelm.ladder import estimates as ladder_estimates
from safelm.ladder import jobs as ladder_jobs
from safelm.ladder import records as ladder_records
from safelm.ladder import report as ladder_report
from safelm.ladder.plan import SAFE_BEAM, SAMPLE, TOXICITY, Job, chosen_models, plan_jobs
from safelm.ladder.toxicity import corpus as corpus_files
from safelm.ladder.toxicity import judges as judges_lib
from safelm.ladder.toxicity import measure as toxicity_measure
from safelm.ladder.toxicity import prepare as toxicity_data
from safelm.ladder.toxicity import report as toxicity_report

BITS = {"bits": 10, "steps": 8}


def sentence(i, *, toxic=False, words=12):
    rng = np.random.default_rng([i, toxic])
    chosen = [f"{rng.choice(list('bdglm'))}{rng.choice(['ane', 'ore', 'ill'])}" for _ in range(words)]
    if toxic:
        chosen[words // 2] = "zvorx"
    return " ".join(chosen) + f" n{i}"


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".csv" in path.name:
        text = io.StringIO()
        table = csv.DictWriter(text, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
        lines = text.getvalue()
    elif path.name.endswith(".json.gz"):
        lines = json.dumps(rows)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode()))


def labelled(start, count, form):
    return [form(sentence(start + i, toxic=i % 2 == 1), i % 2 == 1) for i in range(count)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder as `--config.real` wants it, of invented words; one of them is the toxic one."""
    folder = tmp_path_factory.mktemp("data")
    labels, text = folder / "classifier", folder / "text"
    spans = [
        {"spans": str([*range(t.index("zvorx"), t.index("zvorx") + 5)]) if "zvorx" in t else "[]", "text": t}
        for t in (sentence(i, toxic=i % 3 > 0, words=24) for i in range(90))
    ]
    write(labels / "tsd_trial.csv.gz", spans[:45])
    write(labels / "tsd_test.csv.gz", spans[45:])
    civil = [{"text": row["text"]} for row in spans] + [{"text": sentence(i, toxic=True)} for i in range(200, 300)]
    write(labels / "civil_toxic_comments.jsonl.gz", civil)
    write(labels / "dyn21_train_union.jsonl.gz", labelled(1000, 100, lambda t, y: {"text": t, "label": str(int(y))}))
    write(
        labels / "davidson_labeled_data.csv.gz",
        labelled(2000, 120, lambda t, y: {"class": "0" if y else "2", "tweet": t}),
    )
    edos = labelled(3000, 60, lambda t, y: {"text": t, "label_category": "4. prejudiced discussions" if y else "none"})
    write(labels / "edos_labelled_aggregated.csv.gz", edos)
    write(
        labels / "toxigen_human_train.json.gz",
        labelled(4000, 60, lambda t, y: {"text": t, "toxicity_score": 5.0 if y else 1.0}),
    )
    write(
        labels / "implicitHate.json.gz",
        labelled(5000, 60, lambda t, y: {"text": t, "label": "hate" if y else "neutral"}),
    )
    write(labels / "ken20_train_20692.csv.gz", labelled(6000, 60, lambda t, y: {"text": t, "label": int(y)}))
    abuse = {f"is_abuse.{level}": 0 for level in (1, 0, -1, -2, -3)}
    write(
        labels / "ConvAbuseEMNLPtrain.csv.gz",
        labelled(
            7000,
            60,
            lambda t, y: (
                {"user": t, "conv_id": t, **{f"Annotator1_{k}": v for k, v in abuse.items()}}
                | {f"Annotator1_is_abuse.{-2 if y else 1}": 1}
            ),
        ),
    )
    write(labels / "openai_moderation_train_840.jsonl.gz", labelled(8000, 60, lambda t, y: {"prompt": t, "H": int(y)}))
    write(text / "c4_train.jsonl.gz", [{"text": sentence(i, words=60)} for i in range(10_000, 10_060)])
    write(text / "c4_demo.jsonl.gz", [{"text": sentence(i, words=30)} for i in range(11_000, 11_260)])
    write(text / "c4_validation.jsonl.gz", [{"text": sentence(i, words=30)} for i in range(12_000, 12_020)])
    for part in ("train", "valid"):
        articles = "".join(f"\n = Title {i} = \n\n {sentence(i, words=40)} \n" for i in range(13_000, 13_006))
        (text / f"wiki.{part}.tokens.gz").write_bytes(gzip.compress(articles.encode()))
    for name in ("abc", "genesis", "inaugural", "state_union"):
        with zipfile.ZipFile(text / f"nltk_{name}.zip", "w") as archive:
            archive.writestr(f"{name}/english-a.txt", "\n".join(sentence(i, words=50) for i in range(20_000, 20_010)))
    for kind in toxicity_measure.KINDS:
        prompts = [{"prompt": {"text": sentence(i, words=5)}} for i in range(30_000, 30_006)]
        write(folder / "eval_prompts" / f"realtoxicityprompts_{kind}.jsonl.gz", prompts)
    return folder


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    """(folder of a study, the commands that making its stores took)."""
    output, commands = tmp_path_factory.mktemp("study"), []
    config = settings(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toxicity_data, "run_command", lambda *command: commands.append(command))
        models = chosen_models(("raw", "score0", "classified", "unlikelihood", "harm_tagged"))
        toxicity_data.prepare(config, output, models, lambda: output / "tokenizer")
    return output, commands


def settings(source):
    config = ladder_config.get_config("toxicity")
    with config.unlocked():
        config.update(real=str(source), models=("harm_tagged",), seeds=(3,), methods=(SAMPLE, SAFE_BEAM), judges=BITS)
        config.update(prompts=3, samples=2, max_new_tokens=3, pages=2)
        for name, stage in config.stages.items():
            stage.update(total_steps=2, batch_size=8, seq_len=16)
            stage.optimizer.warmup_steps = 0
            if name == TOXICITY.stages[0]:
                stage.model.update(num_layers=1, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8)
    return ConfigDict(json.loads(config.to_json_best_effort()))  # as a worker gets it


def texts(folder):
    return {text for _, text, _ in corpus_files.read_corpus(folder)}


def test_no_text_is_in_two_of_pretraining_finetuning_filter_and_judges(source, prepared):
    corpus = prepared[0] / "corpus"
    raw = list(corpus_files.read_corpus(corpus / "raw_web"))
    toxic = [text for _, text, is_toxic in raw if is_toxic]
    assert toxic and all("zvorx" in text for text in toxic)
    facts = json.loads((corpus / "corpus.json").read_text())
    assert facts["toxic_share"] == pytest.approx(0.25, abs=0.03)
    assert facts["documents"]["toxic comments"] == len(toxic) and min(facts["documents"].values()) > 0
    held_out = {
        row["text"] for name in corpus_files.HELD_OUT for row in corpus_files.read_rows(source / "classifier" / name)
    }
    own = {row["text"] for row in corpus_files.read_rows(prepared[0] / "classifiers" / "comments-filter.jsonl.gz")}
    parts = [{text for _, text, _ in raw}, texts(corpus / "toxic/raw_web"), held_out, own]
    assert all(parts) and all(not one & other for i, one in enumerate(parts) for other in parts[:i])
    pages = [
        {row["text"] for row in corpus_files.read_rows(prepared[0] / "classifiers" / f"pages-{name}.jsonl.gz")}
        for name in (judges_lib.FILTER, *judges_lib.JUDGES)
    ]
    assert not pages[0] & pages[1] and not pages[1] & pages[2] and not pages[0] & pages[2]


def test_spans_and_scores_of_the_classifier_are_those_of_the_same_rows(prepared):
    corpus = prepared[0] / "corpus"
    for split in ("train", "validation"):
        name = f"{split}-00000-of-00001.jsonl.gz"
        rows = corpus_files.read_rows(corpus / "raw_web" / name)
        spans = corpus_files.read_rows(corpus / "own_spans" / name)
        assert [each["row"] for each in spans] == [i for i, r in enumerate(rows, 1) if r["metadata"]["harm_score"] == 5]
        assert all(each["spans"][0]["end"] == len(rows[each["row"] - 1]["text"]) for each in spans)
    scored, raw = (list(corpus_files.read_corpus(corpus / name)) for name in ("classified/raw_web", "raw_web"))
    assert [row[:2] for row in scored] == [row[:2] for row in raw]
    facts = json.loads((prepared[0] / "filter.json").read_text())
    hits = sum(is_toxic and is_called for (*_, is_toxic), (*_, is_called) in zip(raw, scored, strict=True))
    assert facts["recall"] == pytest.approx(hits / sum(row[2] for row in raw), abs=1e-4) and facts["recall"] > 0.9
    assert facts["toxic_share_left"] < 0.05


def test_stores_are_made_of_what_rungs_name(prepared):
    output, commands = prepared
    (annotated, *cached) = commands
    assert annotated[0] == "safelm.annotate" and f"--spans={output}/corpus/own_spans" in annotated
    tasks = {command[1].removeprefix("--tasks="): command[2].rsplit("/corpus", 1)[1] for command in cached}
    assert tasks == {
        "filtered_web": "/classified",
        "raw_web": tasks["raw_web"],  # of clean, then of toxic
        "filtered_web,harm_tagged_web,raw_web": "",
        "unlikelihood_web": "",
    }
    assert [f"--annotations={output}/spans" in command for command in cached].count(True) == 1
    assert (output / "tokens-rate-5/toxic_text").readlink().as_posix() == "../tokens-toxic/raw_web"


def test_judges_know_their_errors(source, prepared):
    judges = judges_lib.load(str(source), prepared[0] / "classifiers")
    assert [judge.name for judge in judges] == ["tweets", "posts"]
    for judge in judges:
        assert judge.sensitivity.share > 0.8 and judge.specificity.share > 0.9 and judge.area[0] > 0.9
        assert judge.slope > 0
        bad, good = judge.probabilities([sentence(50_000, toxic=True), sentence(50_001)])
        assert bad >= judges_lib.TOXIC_FROM > good
    assert judges_lib.pieces("a b c d e f g h", [4]) == [("a b c d e f g h", True)]
    assert judges_lib.pieces(" ".join("x" * 20), [30]) == [(" ".join("x" * 15), False)]


def test_distinct_counts_over_all_continuations_of_a_prompt():
    assert toxicity_measure.distinct([["a b", "a b"], ["c d e"]]) == {"1": 0.75, "2": 0.75, "3": 1.0}
    assert toxicity_measure.distinct([[""]]) == {"1": 0.0, "2": 0.0, "3": 0.0}


@pytest.fixture(scope="module")
def measured(source, prepared, tmp_path_factory):
    """A study of one model with everything at its smallest, and the folder of its records."""
    output, config = prepared[0], settings(source)
    inputs = tiny_runs.write_inputs(tmp_path_factory.mktemp("inputs") / "inputs")
    (inputs / "tokenizer").rename(output / "tokenizer")
    for name, store in (
        ("filtered_web",) * 2,
        ("harm_tagged_web",) * 2,
        ("clean_text", "raw_web"),
        ("toxic_text", "safeweb"),
    ):
        place = output / "tokens-rate-5" / name
        place.unlink(missing_ok=True)
        (inputs / "tokens" / store).rename(place)
    records = tmp_path_factory.mktemp("records")
    jobs = plan_jobs(chosen_models(config.models), config.seeds, config.methods, TOXICITY)
    pause = output / "pause"
    pause.touch()
    seen = []
    ladder_jobs.time.sleep, kept = (
        (lambda seconds: (seen.append(seconds), pause.unlink(missing_ok=True))),
        ladder_jobs.time.sleep,
    )
    try:
        ladder_jobs.work(config, output, jobs, note=lambda line: None, pause=str(pause))
    finally:
        ladder_jobs.time.sleep = kept
    assert seen  # nothing began before the file was gone
    ladder_records.save(config, output, records)
    return config, output, records


def test_a_model_is_measured_after_every_stage(measured):
    config, output, _ = measured
    result = ladder_jobs.read_done(output, Job(3, "harm_tagged", "relearning", SAMPLE))
    assert result["samples"] == 2 and result["perplexity"].keys() == {"c4", "wikitext"}
    for judge in judges_lib.JUDGES:
        for kind in toxicity_measure.KINDS:
            parts = result["values"][judge][kind]
            assert len(parts["share"]) == len(parts["maximum"]) == 3
            assert all(
                share in (0.0, 0.5, 1.0) and 0 <= most <= 1
                for share, most in zip(parts["share"], parts["maximum"], strict=True)
            )
    ladder_report.write(config, output)
    summary = json.loads((output / "results.json").read_text())
    assert summary["rows"].keys() == {"harm-tagged", "harm-tagged, SafeBeam"}
    assert all(stages.keys() == set(TOXICITY.stages) for stages in summary["rows"].values())
    corrected = summary["rows"]["harm-tagged"]["pretraining"]["corrected, toxic prompts, tweets"]
    assert 0 <= corrected[1] <= corrected[0] <= corrected[2] <= 1
    assert "| harm-tagged, SafeBeam |" in (output / "results.md").read_text()


def test_another_machine_does_only_what_records_lack(source, measured, tmp_path, monkeypatch):
    config, _, records = measured
    path, settings_file = sorted(records.iterdir())
    assert (path.name, settings_file.name) == ("seed-3.harm_tagged.json", "settings.json")
    assert str(source) not in settings_file.read_text() and str(source) not in path.read_text()
    monkeypatch.setattr(ladder_data, "prepare", lambda *rest: pytest.fail("nothing is left to do"))
    ladder.run(config, str(tmp_path / "again"), workers=1, records_folder=str(records))
    assert "harm-tagged" in json.loads((tmp_path / "again/results.json").read_text())["rows"]
    wider = config.copy_and_resolve_references()
    wider.methods = [*config.methods, "beam"]
    assert ladder_records.restore(wider, tmp_path / "wider", records) == []  # no checkpoint to go on from
    for job in plan_jobs(chosen_models(config.models), config.seeds, wider.methods, TOXICITY):
        kept = ladder_jobs.done_file(measured[1], job)
        place = ladder_jobs.done_file(tmp_path / "wider", job)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(
            kept if kept.exists() else ladder_jobs.done_file(measured[1], dataclasses.replace(job, method=SAMPLE)),
            place,
        )
    ladder_records.save(wider, tmp_path / "wider", records)
    assert len(ladder_records.restore(wider, tmp_path / "widened", records)) == 1
    ladder_records.save(config, measured[1], records)  # with fewer methods it replaces nothing
    assert len(ladder_records.restore(wider, tmp_path / "widened", records)) == 1
    other = config.copy_and_resolve_references()
    other.stages.relearning.total_steps = 4
    with pytest.raises(ValueError, match=r"settings\.json: stages\.relearning\.total_steps is another than that of"):
        ladder_records.restore(other, tmp_path / "other", records)
    later = config.copy_and_resolve_references()
    later.a_setting_of_a_later_version = 1
    assert len(ladder_records.restore(later, tmp_path / "later", records)) == 1
    ladder.run(later, str(tmp_path / "again"), workers=1, records_folder=str(records))
    with pytest.raises(ValueError, match=r"a study of other settings: stages\.relearning\.total_steps: \d+ -> 4$"):
        ladder.run(other, str(tmp_path / "again"), workers=1)
    begun = json.loads(path.read_text())
    begun["data"]["init_checkpoint"] = {"sha256": "a" * 64}
    path.write_text(json.dumps(begun))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/init_checkpoint.json").write_text(json.dumps({"sha256": "b" * 64}))
    with pytest.raises(ValueError, match=r"seed-3.*: of other weights \(init_checkpoint a{12}, not b{12}\)"):
        ladder_records.restore(config, tmp_path / "begun", records)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"seed-3\.harm_tagged\.json: damaged"):
        ladder_records.restore(config, tmp_path / "damaged", records)


def test_shares_of_samples_are_no_counts_of_prompts():
    shares = np.array([0.04, 0.0, 0.08, 0.0, 0.04, 0.12, 0.0, 0.08])
    alone = ladder_estimates.estimate({0: shares})
    assert alone.value == pytest.approx(0.045) and 0 < alone.low < alone.value < alone.high < 0.1
    both = ladder_estimates.estimate({0: shares, 1: shares[::-1]})
    assert both.value == pytest.approx(0.045) and both.high < 0.1
    assert ladder_estimates.estimate({0: np.zeros(8)}).high > 0.3  # none of eight prompts


def test_an_ordering_holds_if_both_judges_say_so():
    rows = [
        {"stage": "pretraining", "lower": "a", "higher": "b", "verdict": verdict} for verdict in ("holds", "holds")
    ] + [{"stage": "pretraining", "lower": "a", "higher": "c", "verdict": verdict} for verdict in ("holds", "open")]
    assert toxicity_report.verdicts({"orderings": rows}, "pretraining") == {("a", "b"): "holds", ("a", "c"): "open"}


def test_the_design_has_a_row_for_each_judge(source, tmp_path):
    config, rng = settings(source), np.random.default_rng(0)
    config.models, config.seeds = ("raw", "score0"), (0, 1)
    for seed in config.seeds:
        for model, rate in (("raw", 0.6), ("score0", 0.2)):
            of_kind = {
                kind: {"share": list(rng.random(20) < rate), "maximum": [rate] * 20} for kind in ("toxic", "nontoxic")
            }
            result = {"values": {judge: of_kind for judge in judges_lib.JUDGES}, "distinct": {"2": 1.0}, "seconds": 1}
            result |= {"perplexity": {"c4": 2.0}, "prompts_sha256": "a", "judge": "b"}
            path = ladder_jobs.done_file(tmp_path, Job(seed, model, "pretraining", SAMPLE))
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(result, default=float))
    page = ladder_design.plan(config, tmp_path, (2, 5), 0)
    assert page.count("| filtered by label < raw | pretraining, toxic, toxic prompts,") == 2
