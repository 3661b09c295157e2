"""The ladder: its jobs, what they share, their resumption, and what its report says of known numbers."""

import dataclasses
import gzip
import importlib
import json
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import side_files
import tiny_runs
from ml_collections import ConfigDict

from configs import ladder as ladder_config
from safelm.data.store import TokenStore
from safelm.ladder import answers as ladder_answers
from safelm.ladder import command as ladder
from safelm.ladder import data as ladder_data
from safelm.ladder import design as ladder_design
from safelm.ladder import estimates as ladder_estimates
from safelm.ladder import jobs as ladder_jobs
from safelm.ladder import measure as ladder_measure
from safelm.ladder import preferences as ladder_preferences
from safelm.ladder import real as ladder_real
from safelm.ladder import report as ladder_report
from safelm.ladder.plan import (
    CELLS,
    GREEDY,
    MODELS,
    OF_TOXICITY,
    ORDERINGS,
    RUNGS,
    SAFE_BEAM,
    STAGES,
    Job,
    chosen_models,
    measured,
    needed_by,
    plan_jobs,
    trained,
)
from safelm.models import decoder as model_lib
from safelm.models.decoder import ModelConfig
from safelm.synthetic_web.corpus import Recipe, write_corpus
from safelm.text.control_tokens import control_id
from safelm.text.tokenizer import Tokenizer

PAPERS = [model.name for model in chosen_models(())]


@pytest.fixture
def config():
    return ladder_config.get_config("embedded")


def all_jobs(seeds=(0, 1, 2)):
    return plan_jobs(chosen_models(()), seeds, (GREEDY, SAFE_BEAM))


def test_every_job_comes_after_what_it_needs_and_once():
    jobs = all_jobs()
    place = {job: i for i, job in enumerate(jobs)}
    assert len(place) == len(jobs) == len({job.name for job in jobs})
    for job in jobs:
        before = needed_by(job)
        assert before is None or place[before] < place[job]


def test_shared_work_is_done_once():
    trainings = [job for job in all_jobs((0,)) if not job.method]
    by_stage = {stage: [job.model for job in trainings if job.stage == stage] for stage in STAGES}
    assert sorted(by_stage["pretraining"]) == sorted(set(PAPERS) - {"tag_at_instruction"})
    assert sorted(by_stage["instruction"]) == sorted(by_stage["benign"]) == sorted(PAPERS)
    assert trained(0, "tag_at_instruction", "pretraining") == trained(0, "moral_education", "pretraining")
    safe_beam = next(cell for cell in CELLS if cell.name == "safe_beam")
    assert (safe_beam.model, safe_beam.method) == ("harm_tagged", SAFE_BEAM)


def test_the_rungs_of_all_seeds_come_first():
    is_rung = [job.model in RUNGS for job in all_jobs()]
    assert is_rung == sorted(is_rung, reverse=True)


def test_a_model_without_the_tag_is_not_steered():
    assert measured(0, "tag_at_instruction", "pretraining", SAFE_BEAM) is None
    assert measured(0, "tag_at_instruction", "instruction", SAFE_BEAM) is not None
    assert measured(0, "raw", "benign", GREEDY) == Job(0, "raw", "benign", GREEDY)


def test_orderings_and_cells_name_what_there_is():
    names = {cell.name for cell in CELLS}
    assert len(names) == len(CELLS)
    assert {name for low, high, _ in ORDERINGS for name in (low, high)} <= names
    assert [model.name for model in chosen_models(("score0,raw",))] == ["raw", "score0"]  # as a flag gives them
    with pytest.raises(ValueError, match="models names 'rwa': there are raw, score0"):
        chosen_models(("rwa",))


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("real", {}, "--config.real: this config needs it"),
        ("smollm2_135m", {"real": "."}, "--config.init_checkpoint: this config needs it"),
        ("real", {"real": "no"}, "--config.real=no: there is no folder text/"),
        ("embedded", {"init_checkpoint": "no"}, "--config.init_checkpoint=no: no checkpoint with a tokenizer/"),
        ("embedded", {"methods": ("beam",)}, "--config.methods=('beam',): want some of greedy, safe_beam"),
        ("embedded", {"seeds": ()}, "--config.seeds=(): want different whole numbers"),
        ("embedded", {"seeds": (1, 1)}, "--config.seeds=(1, 1): want different"),
        ("embedded", {"models": ("masked",)}, "--config.models: masked needs a config with rates of masked"),
        (
            "interventions",
            {"control_tokens": ("<good>",)},
            "--config.control_tokens: span_tagged needs <risky>, </risky>",
        ),
    ],
)
def test_settings_that_cannot_be_leave_no_folder(variant, changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ladder_config.get_config(variant)
    with config.unlocked():
        config.update(changes)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        ladder.run(config, str(tmp_path / "study"), workers=1)
    assert not (tmp_path / "study").exists()


def test_cells_differ_in_what_they_are_said_to_differ_in(config, tmp_path):
    def settled(model, stage):
        return ladder_jobs.training_config(config, tmp_path, trained(1, model, stage))

    raw, tagged = (settled(name, "pretraining") for name in ("raw", "harm_tagged"))
    assert raw.seed == 1 and raw.data.phases[0]["rates"] == {"raw_web": 1.0}
    assert tagged.data.phases[0]["rates"]["harm_tagged_web"] == 0.2 and raw.total_steps == tagged.total_steps
    late = settled("start_60", "pretraining")
    assert [phase["start"] for phase in late.data.phases] == [0.0, 0.6]
    assert late.data.phases[0]["rates"] == {"raw_web": 1.0}
    assert late.data.phases[1]["rates"] == tagged.data.phases[0]["rates"]
    roots = {settled(name, "pretraining").data.root for name in ("harm_tagged", "rate_3", "rate_10")}
    assert len(roots) == 3
    for name, model in ((name, MODELS[name]) for name in PAPERS):
        tuned, finetuned = settled(name, "instruction"), settled(name, "benign")
        shares = tuned.data.phases[0]["rates"]
        assert ("harm_tagged_chat" in shares) == model.tagged_tuning and sum(shares.values()) == pytest.approx(1.0)
        assert tuned.init_checkpoint == str(ladder_jobs.workdir(tmp_path, trained(1, name, "pretraining")))
        assert finetuned.init_checkpoint == str(ladder_jobs.workdir(tmp_path, trained(1, name, "instruction")))
        assert finetuned.data.phases[0]["rates"] == {"gsm8k": 1.0}


def test_a_stopped_study_does_only_what_is_left_and_two_workers_share(config, tmp_path, monkeypatch):
    done, jobs = [], all_jobs((0,))

    def run_job(config, output, job):
        done.append(job)
        if len(done) == 7:
            raise KeyboardInterrupt
        path = ladder_jobs.done_file(output, job)
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"seconds": 0}')

    monkeypatch.setattr(ladder_jobs, "run_job", run_job)
    monkeypatch.setattr(ladder_jobs.gc, "collect", lambda: 0)  # half a second after every job, where much is imported
    with pytest.raises(KeyboardInterrupt):
        ladder_jobs.work(config, tmp_path, jobs, note=lambda line: None)
    with ladder_jobs._claim(tmp_path, jobs[7]) as is_mine, ladder_jobs._claim(tmp_path, jobs[7]) as again:
        assert is_mine and not again
    ladder_jobs.work(config, tmp_path, jobs, note=lambda line: None)
    assert done == [*jobs[:7], *jobs[6:]]


def test_a_pretraining_known_by_its_record_alone_is_done_again_for_another_model(tmp_path):
    of_both, recorded = (
        trained(0, "moral_education", "pretraining"),
        plan_jobs(chosen_models(["moral_education"]), (0,), (GREEDY, SAFE_BEAM)),
    )
    jobs = plan_jobs(chosen_models(["moral_education", "tag_at_instruction"]), (0,), (GREEDY, SAFE_BEAM))
    (tmp_path / "done").mkdir()
    for job in recorded:
        ladder_jobs.done_file(tmp_path, job).write_text("{}")
    ladder_jobs.reopen(tmp_path, recorded)
    assert all(ladder_jobs.read_done(tmp_path, job) is not None for job in recorded)  # nothing is left to go on
    ladder_jobs.reopen(tmp_path, jobs)
    assert [job for job in recorded if ladder_jobs.read_done(tmp_path, job) is None] == [of_both]
    ladder_jobs.done_file(tmp_path, of_both).write_text("{}")
    ladder_jobs.workdir(tmp_path, of_both).mkdir(parents=True)
    ladder_jobs.reopen(tmp_path, jobs)
    assert ladder_jobs.read_done(tmp_path, of_both) is not None


def write_result(output, job, harmful, prompts="a"):
    labels = {
        "harmful": {f"h{i}": "harmful" if x else "refusal" for i, x in enumerate(harmful)},
        "safe": {"s": "answer"},
    }
    path = ladder_jobs.done_file(output, job)
    path.parent.mkdir(exist_ok=True)
    result = {"labels": labels, "prompts_sha256": prompts, "judge": "j", "seconds": 1, "perplexity": 5.0 + job.seed}
    path.write_text(json.dumps(result))


def test_the_report_has_rates_intervals_and_verdicts(config, tmp_path):
    rng = np.random.default_rng(0)
    for seed in (0, 1, 2):
        for model, rate in (("raw", 0.9), ("score0", 0.88), ("moral_education", 0.1)):
            for stage in STAGES:
                write_result(tmp_path, Job(seed, model, stage, GREEDY), rng.random(80) < rate)
    ladder_report.write(config, tmp_path)
    summary = json.loads((tmp_path / "results.json").read_text())
    assert set(summary["rows"]) == {"raw", "score0", "moral_education", "tag_at_instruction"}
    assert set(summary["rows"]["tag_at_instruction"]) == {"pretraining"}  # that is moral_education's
    raw = summary["rows"]["raw"]["benign"]["harmful completions"]
    assert raw["low"] < 0.9 < raw["high"] and len(raw["by_seed"]) == 3
    verdicts = {
        (row["lower"], row["higher"]): row["verdict"] for row in summary["orderings"] if row["stage"] == "benign"
    }
    assert verdicts == {("raw", "score0"): "open", ("moral_education", "raw"): "holds"}
    table = (tmp_path / "results.md").read_text()
    change = summary["rows"]["raw"]["benign"]["change by benign finetuning"]
    assert change["low"] < 0 < change["high"]
    assert table.count("6.00 [5.00, 7.00]") == 3 * 2 + 1  # tag_at_instruction has but the first stage
    assert "| raw |" in table and "holds" in table and (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_the_design_says_what_more_seeds_and_prompts_would_tell(config, tmp_path):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="no two models of an ordering are measured with two common seeds"):
        ladder_design.plan(config, tmp_path, (3,), 0)
    for seed in (0, 1, 2):
        for model, rate in (("raw", 0.6), ("score0", 0.5)):
            write_result(tmp_path, Job(seed, model, "benign", GREEDY), rng.random(80) < rate)
    page = ladder_design.plan(config, tmp_path, (3, 8), 400)
    row = next(line for line in page.splitlines() if line.startswith("| raw < score0"))
    few, many = (float(cell.split()[0]) for cell in row.split("|")[-3:-1])
    assert 0 < many < few < 100 and "benign | 3 x 80" in row and "400 harmful prompts" in page
    _, jobs, _ = next(line for line in page.splitlines() if line.startswith("| 8 |")).strip("| ").split(" | ")
    assert int(jobs) == len(all_jobs(range(8)))
    for seeds, prompts, message in (((1,), 0, "--planned_seeds=1"), ((3,), 1, "--planned_prompts=1")):
        with pytest.raises(ValueError, match=message):
            ladder_design.plan(config, tmp_path, seeds, prompts)


def test_a_verdict_counts_how_many_orderings_were_asked(config, tmp_path):
    """The same two models: clear by themselves, open where fourteen others are asked that show nothing."""
    rng = np.random.default_rng(2)
    better = {seed: (rng.random(120) < 0.24).astype(float) for seed in range(3)}
    worse = {seed: (rng.random(120) < 0.42).astype(float) for seed in range(3)}
    found = {("moral_education", "benign", ladder_report.HARMFUL): better}
    found["raw", "benign", ladder_report.HARMFUL] = worse
    (alone,) = ladder_estimates.orderings(found, ORDERINGS, "benign", ladder_report.HARMFUL)
    assert 0.003 < alone["p_value"] == alone["holm_p_value"] < 0.05 and alone["verdict"] == "holds"
    assert alone["difference"]["high"] < 0
    found |= {
        (cell.name, "benign", ladder_report.HARMFUL): worse for cell in CELLS if cell.name not in ("moral_education",)
    }
    rows = ladder_estimates.orderings(found, ORDERINGS, "benign", ladder_report.HARMFUL)
    assert len(rows) == len(ORDERINGS)
    among = next(row for row in rows if (row["lower"], row["higher"]) == ("moral_education", "raw"))
    assert among["p_value"] == alone["p_value"] and among["holm_p_value"] > 0.05 and among["verdict"] == "open"
    assert ladder_estimates.verdict(0.1, 0.04) == "reversed"


def judged(found):
    return ladder_estimates.orderings(found, ORDERINGS, "benign", ladder_report.HARMFUL)


def test_one_seed_has_no_verdict_and_does_not_count_among_the_others(config, tmp_path):
    rng = np.random.default_rng(2)
    rates = {"raw": 0.9, "moral_education": 0.1}
    rows = {name: {seed: (rng.random(120) < rate).astype(float) for seed in range(3)} for name, rate in rates.items()}
    found = {(name, "benign", ladder_report.HARMFUL): counts for name, counts in rows.items()}
    (alone,) = judged(found)
    found["score0", "benign", ladder_report.HARMFUL] = {0: rows["raw"][0]}
    by_names = {(row["lower"], row["higher"]): row for row in judged(found)}
    one = by_names["raw", "score0"]
    assert (one["p_value"], one["holm_p_value"], one["verdict"]) == (None, None, "one seed")
    assert by_names["moral_education", "raw"] == alone
    assert ladder_estimates.p_text(one) == ""


def test_results_of_other_prompts_are_not_averaged(config, tmp_path):
    write_result(tmp_path, Job(0, "raw", "benign", GREEDY), [1, 0])
    write_result(tmp_path, Job(1, "raw", "benign", GREEDY), [1, 0], prompts="b")
    with pytest.raises(ValueError, match="raw at benign was measured with different prompts or judges"):
        ladder_report.collect(config, tmp_path)


def by_seed(counts_SP):
    return dict(enumerate(counts_SP))


def test_a_difference_of_perplexities_may_reach_beyond_one():
    worse, better = ({seed: np.array([value]) for seed, value in enumerate(row)} for row in ((5.9, 4.1), (5.0, 5.0)))
    found = ladder_estimates.estimate(worse, better)
    assert found.value == pytest.approx(0) and found.high == -found.low > 1


def test_intervals_widen_with_seeds_that_disagree_and_pairing_narrows_a_difference():
    rng = np.random.default_rng(1)
    agree = (rng.random((3, 100)) < 0.5).astype(float)
    disagree = np.stack([np.zeros(100), agree[1], np.ones(100)])
    narrow, wide = (ladder_estimates.estimate(by_seed(counts)) for counts in (agree, disagree))
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    better = agree.copy()
    better[:, :20] = 0
    paired = ladder_estimates.estimate(by_seed(better), by_seed(agree))
    unpaired = ladder_estimates.estimate(by_seed(better), by_seed(rng.permuted(agree, axis=1)))
    assert paired.high - paired.low < unpaired.high - unpaired.low
    assert paired.high < 0 and ladder_estimates.p_value(by_seed(better), by_seed(agree)) < 0.01
    same = ladder_estimates.estimate(by_seed(agree), by_seed(agree))
    assert same.value == 0.0 and same.low == -same.high < 0
    assert ladder_estimates.p_value(by_seed(agree), by_seed(agree)) == 1.0
    zero = ladder_estimates.estimate(by_seed(np.zeros((3, 100))))
    assert zero.low == 0.0 and zero.high > 0.03  # none of 100 prompts is not never


def test_a_difference_is_of_the_seeds_that_both_have():
    ones, zeros = np.ones(50), np.zeros(50)
    difference = ladder_estimates.estimate({0: zeros, 2: ones}, {1: zeros, 2: ones})
    assert difference.value == 0.0 and difference.cases == 50


def test_a_model_goes_through_all_stages_and_is_measured_after_each(tmp_path):
    """With the smallest data and models there are; the data is laid out as `safelm.ladder.data.prepare` does it."""
    inputs = tiny_runs.write_inputs(tmp_path / "inputs")
    (tmp_path / "study").mkdir()
    for name, place in (("tokenizer", "tokenizer"), ("tokens", "tokens-rate-5")):
        (inputs / name).rename(tmp_path / "study" / place)
    write_corpus(str(tmp_path / "study" / "corpus"), Recipe(documents=8, validation_documents=2, prompts=2, chats=4))
    config = ladder_config.get_config("embedded")
    with config.unlocked():
        config.models, config.seeds, config.methods, config.max_new_tokens = ("harm_tagged",), (3,), (GREEDY,), 3
        for name, stage in config.stages.items():
            stage.update(total_steps=2, batch_size=8, seq_len=16)
            stage.optimizer.warmup_steps = 0
            if name == STAGES[0]:
                stage.model.update(num_layers=2, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8)
    jobs = plan_jobs(chosen_models(config.models), config.seeds, config.methods)
    settings = ConfigDict(json.loads(config.to_json_best_effort()))  # as a worker gets it
    ladder_jobs.work(settings, tmp_path / "study", jobs, note=lambda line: None)
    ladder_report.write(settings, tmp_path / "study")
    summary = json.loads((tmp_path / "study" / "results.json").read_text())
    assert summary["rows"].keys() == {"harm_tagged"} and summary["rows"]["harm_tagged"].keys() == set(STAGES)
    labels = ladder_jobs.read_done(tmp_path / "study", Job(3, "harm_tagged", "benign", GREEDY))["labels"]
    assert len(labels["harmful"]) == len(labels["safe"]) == 2
    side_files.assert_only_documents("ladder", tmp_path / "study", tmp_path / "study" / "corpus")


def test_interventions_are_rungs_on_request():
    config = ladder_config.get_config("interventions")
    names = {model.name for model in chosen_models(config.models)}
    others = {*ladder_config.OF_RAW, "refusal_tokens", "routed", "token_tagged"}
    assert names - {"raw", "score0", "harm_tagged"} == others
    assert {*others, *OF_TOXICITY} <= MODELS.keys() and not {*others, *OF_TOXICITY} & set(PAPERS)
    assert all(sum(config.rates[MODELS[name].rung].values()) == pytest.approx(1.0) for name in names)
    assert {len(config.rates[name]) for name in ladder_config.OF_RAW} == {1}
    assert {cell.name for cell in CELLS if cell.model == "token_tagged"} == {"token_tagged", "token_tagged+safe_beam"}


@pytest.fixture
def commands_run_here(monkeypatch):
    """Commands of the data's preparation in this process, where they can be."""
    run_elsewhere = ladder_data.run_command

    def run_here(module, *argv):
        command = importlib.import_module(module)
        if hasattr(command, "arguments"):
            command.main(command.arguments().parse_args([*argv]))
        else:
            run_elsewhere(module, *argv)

    monkeypatch.setattr(ladder_data, "run_command", run_here)


def smallest(variant, *models):
    """The variant with some models, and the smallest data and models there are."""
    config = ladder_config.get_config(variant)
    with config.unlocked():
        config.models, config.seeds, config.methods, config.max_new_tokens = models, (0,), (GREEDY,), 3
        config.corpus.update(documents=60, validation_documents=4, prompts=2, chats=60)
        config.vocab_size = 400
        for name, stage in config.stages.items():
            stage.update(total_steps=2, batch_size=8, seq_len=16)
            stage.optimizer.warmup_steps = 0
            if name == STAGES[0]:
                stage.model.update(num_layers=2, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8)
    return ConfigDict(json.loads(config.to_json_best_effort()))


def kinds(output, task):
    """A store's tokens by kind, and its documents."""
    manifest = json.loads((output / f"tokens-rate-5/{task}/train/manifest.json").read_text())
    return manifest["extra"].get("token_kinds", {}), manifest["num_documents"]


def test_interventions_go_from_a_corpus_to_a_table(tmp_path, monkeypatch, commands_run_here):
    """One with spans and one with control tokens."""
    settings = smallest("interventions", "masked", "conditioned", "refusal_tokens")
    models = chosen_models(settings.models)
    ladder_data.check(settings)
    ladder_data.prepare(settings, tmp_path, models)
    assert kinds(tmp_path, "masked_web")[0]["masked"] > 0
    found, documents = kinds(tmp_path, "refusal_wildguardmix")
    assert found["control"] == documents > 0
    asked = []
    generate = ladder_measure.inference.generate

    def generated(config, params, prompts, *rest, **settings):
        asked.append(prompts)
        return generate(config, params, prompts, *rest, **settings)

    monkeypatch.setattr(ladder_measure.inference, "generate", generated)
    jobs = plan_jobs(chosen_models(("conditioned",)), settings.seeds, settings.methods)
    ladder_jobs.work(settings, tmp_path, jobs, note=lambda line: None)
    ladder_report.write(settings, tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows.keys() == {"conditioned"} and all(row.keys() == set(STAGES) for row in rows.values())
    good = control_id(Tokenizer.from_pretrained(str(tmp_path / "tokenizer")), "<good>")
    opened = [all(good in prompt[:2] for prompt in prompts) for prompts in asked]
    assert opened.count(True) == 1 and len(opened) == 3  # conditioned after pretraining; its chats have none
    assert not any(
        good in prompt for prompts, is_open in zip(asked, opened, strict=True) if not is_open for prompt in prompts
    )


def test_notes_urls_and_alignment_text_are_made_and_come_when_they_should(tmp_path, commands_run_here):
    settings = smallest("notes", "reflected", "metadata", "alignment")
    ladder_data.prepare(settings, tmp_path, chosen_models(settings.models))
    assert kinds(tmp_path, "reflected_web")[0]["note"] > 0
    found, documents = kinds(tmp_path, "metadata_web")
    assert found["prefix"] > 10 * documents  # the whole URL
    lessons, texts = (kinds(tmp_path, task)[1] for task in ("moral_education", "alignment_text"))
    assert 0 < texts < lessons
    starts = {
        model: [
            (phase["start"], *sorted(phase["rates"]))
            for phase in ladder_jobs.training_config(settings, tmp_path, Job(0, model, STAGES[0])).data.phases
        ]
        for model in settings.models
    }
    assert starts == {
        "reflected": [(0.0, "reflected_web")],
        "metadata": [(0.0, "metadata_web"), (0.9, "raw_web")],
        "alignment": [(0.0, "raw_web"), (0.8, "alignment_text", "raw_web")],
    }


def test_refusals_of_a_group_of_categories_begin_with_its_token(tmp_path, commands_run_here):
    settings = smallest("refusals_by_category", "refusal_tokens")
    ladder_data.prepare(settings, tmp_path, chosen_models(settings.models))
    tokenizer = Tokenizer.from_pretrained(str(tmp_path / "tokenizer"))
    store = TokenStore.open(str(tmp_path / "tokens-rate-5/refusal_wildguardmix/train"))
    ids = {int(token) for index in range(store.num_documents) for token in store.document(index)}
    assert {control_id(tokenizer, f"<refuse_{group}>") for group in ladder_config.REFUSAL_GROUPS} & ids
    assert control_id(tokenizer, "<respond>") in ids


def test_real_text_that_was_broken_off_is_prepared_anew(tmp_path, monkeypatch):
    (tmp_path / "raw_web").mkdir()
    (tmp_path / "raw_web" / "train-00000-of-00001.jsonl.gz").write_bytes(b"")
    called = []
    monkeypatch.setattr(ladder_real, "run_command", lambda module, *_: called.append((module, *tmp_path.iterdir())))
    with pytest.raises(FileNotFoundError, match="raw_web"):  # as nothing was written
        ladder_real.write_real_corpus("data", tmp_path)
    assert called == [("safelm.ladder.prepare_real_text",)]


def test_real_text_is_known_by_what_is_read_of_it(tmp_path):
    def written(name, rows):
        for kind, row in rows.items():
            (tmp_path / name / kind).mkdir(parents=True)
            with gzip.open(tmp_path / name / kind / "train-0.jsonl.gz", "wt") as file:
                file.write(json.dumps(row) + "\n")
        return ladder_real.text_hash(tmp_path / name)

    rows = {"web": {"id": "1", "text": "a"}, "chats": {"messages": [{"role": "user", "content": "b"}]}}
    first = written("first", rows)
    assert written("other_ids", rows | {"web": {"id": "2", "text": "a"}}) == first
    assert written("other_text", rows | {"web": {"id": "1", "text": "c"}}) != first
    assert written("other_source", {"pages": rows["web"], "chats": rows["chats"]}) != first


def test_a_request_is_refused_where_it_leans_further_than_nine_in_ten_plain_ones(tmp_path):
    (tmp_path / "eval_prompts").mkdir()
    (tmp_path / "eval_prompts" / "advbench_harmful_behaviors.csv").write_text(
        "goal,target\nbad,x\nwedge,z\nworse,y\nno,y\n"
    )
    (tmp_path / "eval_prompts" / "xstest_prompts.csv").write_text("prompt,label\ngood,safe\nhidden,unsafe\nfine,safe\n")
    prompts = ladder_preferences.read_real_prompts(str(tmp_path), 2)
    assert [(p.prompt, p.harmful) for p in prompts] == [("bad", 1), ("worse", 1), ("good", 0), ("fine", 0)]
    assert len({p.id for p in prompts}) == 4
    plain_N = np.r_[np.arange(40.0), 1000 + np.arange(40.0)]  # orders, then questions
    alarm_P = np.array([36.0, 35.0, 35.0, 36.0])  # the ninth tenth of 0 to 39 is 35.1
    wanted = ["refusal", "harmful", "answer", "refusal"]
    asking = [dataclasses.replace(prompt, prompt=f"{prompt.prompt}?") for prompt in prompts]
    assert ladder_preferences.label(asking, alarm_P, plain_N) == ["harmful", "harmful", "answer", "answer"]
    assert ladder_preferences.label(asking, alarm_P + 1000, plain_N) == wanted
    assert ladder_preferences.label(prompts, alarm_P, plain_N) == wanted
    assert ladder_preferences.label(prompts, alarm_P - 90.0, plain_N - 90.0) == wanted  # only differences count
    assert len(ladder_preferences.read_real_prompts(str(tmp_path), 9)) == 6
    (tmp_path / "eval_prompts" / "xstest_prompts.csv").write_text("text\nx\n")
    with pytest.raises(ValueError, match=r"xstest_prompts.csv: missing column 'prompt'"):
        ladder_preferences.read_real_prompts(str(tmp_path), 2)
    with pytest.raises(FileNotFoundError, match=r"--config.real=.*: there is no file eval_prompts/advbench"):
        ladder_preferences.read_real_prompts(str(tmp_path / "no"), 2)


def test_leanings_are_log_probs_of_answers_and_of_the_tag():
    vocabulary = tiny_runs.tokenizer()
    config = ModelConfig(**tiny_runs.model_fields(max_seq_len=128))
    params = model_lib.init(config, jax.random.key(0))
    contexts = [[5, 6, 7], [8] * 40]

    def log_probs(context, answer):
        logits = np.asarray(model_lib.apply(config, params, jnp.array([[*context, *answer]])))[0]
        normal = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return [normal[len(context) + i - 1, token] for i, token in enumerate(answer)]

    leanings = ladder_preferences.refusal_leanings(config, params, vocabulary, contexts)
    tags = ladder_preferences.tag_log_probs(config, params, vocabulary, contexts)
    complies, refuses = (
        [vocabulary.encode(text) for text in texts]
        for texts in (ladder_preferences.COMPLIANCES, ladder_preferences.REFUSALS)
    )
    for context, leaning, tag in zip(contexts, leanings, tags, strict=True):
        means = [np.mean([np.mean(log_probs(context, answer)) for answer in each]) for each in (refuses, complies)]
        assert leaning == pytest.approx(means[0] - means[1], abs=1e-4)
        wanted = [log_probs([*context, *answer], [vocabulary.harm_tag_id])[0] for answer in complies]
        assert tag == pytest.approx(np.mean(wanted), abs=1e-4)


def test_real_prompts_are_measured_by_both_methods(tmp_path, monkeypatch):
    (tmp_path / "eval_prompts").mkdir()
    (tmp_path / "eval_prompts" / "advbench_harmful_behaviors.csv").write_text("goal,target\ncat sat,x\na mat,y\n")
    (tmp_path / "eval_prompts" / "xstest_prompts.csv").write_text("prompt,label\nwho sat?,safe\n")
    for module in (ladder_measure, ladder_preferences):
        monkeypatch.setattr(module, "PLAIN_REQUESTS", ("a dog sat", "a dog sat?"))
    tiny = ModelConfig(**tiny_runs.model_fields(max_seq_len=128))
    loaded = tiny, model_lib.init(tiny, jax.random.key(0)), tiny_runs.tokenizer()
    monkeypatch.setattr(ladder_measure.checkpoint, "load_for_inference", lambda folder: loaded)
    config = ladder_config.get_config("real")
    with config.unlocked():
        config.real, config.prompts = str(tmp_path), 2
    for job in (Job(0, "raw", "pretraining", GREEDY), Job(0, "harm_tagged", "benign", SAFE_BEAM)):
        found = ladder_measure.measure(config, tmp_path, job, tmp_path)
        assert found["judge"] == ladder_preferences.PREFERENCE_JUDGE and len(found["labels"]["harmful"]) == 2
        assert set(found["labels"]["harmful"].values()) <= {"harmful", "refusal"}
        assert set(found["labels"]["safe"].values()) <= {"answer", "refusal"} and len(found["labels"]["safe"]) == 1


def test_a_worker_that_was_killed_is_named():
    assert ladder.how_ended([0, 1]) == ""
    killed = ladder.how_ended([0, -signal.SIGKILL, -signal.SIGTERM])
    assert killed == "; worker 1 was ended by SIGKILL (out of memory?); worker 2 was ended by SIGTERM"


def test_workers_end_with_the_command_however_it_ends(tmp_path):
    """Else a worker of a killed command would train on beside those of the next one."""
    script = """
import multiprocessing, os, signal, time
from safelm.jobs.parent import end_with_parent
def worker():
    end_with_parent(signal.SIGTERM)
    print(os.getpid(), flush=True)
    time.sleep(600)
if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=worker).start()
    input()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "command.py"
    path.write_text(script)
    command = subprocess.Popen([sys.executable, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert int(command.stdout.readline()) > 0
    command.stdin.write("\n")
    command.stdin.close()
    assert command.stdout.read() == ""  # the pipe closes when the last of both processes has ended
    assert command.wait() == -signal.SIGKILL


SUITES = {  # of eval_prompts/, by file: rows of invented requests
    "advbench_harmful_behaviors.csv": "goal,target\nsteal a cat today,Sure\nsteal a dog today,Sure\n",
    "harmbench_behaviors_text_test.csv": (
        "Behavior,FunctionalCategory,SemanticCategory,BehaviorID\nSteal a cat today.,standard,x,one\n"
        "print a song,copyright,x,two\n"
    ),
    "tdc2023_test_phase_behaviors.csv": "Behavior,Category,BehaviorID\nhide a hat,x,three\n",
    "jbb_harmful.csv": "Goal,Target,Category\nsell a stolen mat,Sure,x\n",
    "xstest_prompts.csv": "id,prompt,type,label\n1,who sat?,safe_x,safe\n2,who stole?,contrast_x,unsafe\n",
    "or-bench-hard-1k.jsonl": '{"prompt": "how do cats sit?", "category": "x"}\n',
}


@pytest.fixture
def suites(tmp_path):
    (tmp_path / "eval_prompts").mkdir()
    for name, text in SUITES.items():
        (tmp_path / "eval_prompts" / name).write_text(text)
    return tmp_path


def test_requests_of_several_suites_come_once_and_contrasts_are_left_out(suites):
    found = ladder_answers.read_requests(str(suites), 0)
    assert sorted(prompt.prompt for prompt in found if prompt.harmful) == [
        *("hide a hat", "sell a stolen mat", "steal a cat today", "steal a dog today")
    ]
    assert sorted(prompt.prompt for prompt in found if not prompt.harmful) == ["how do cats sit?", "who sat?"]
    assert ladder_answers.read_requests(str(suites), 1) == ladder_answers.read_requests(str(suites), 1)
    assert len(ladder_answers.read_requests(str(suites), 1)) == 2
    (suites / "eval_prompts" / "jbb_harmful.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"jbb_harmful\.csv"):
        ladder_answers.read_requests(str(suites), 1)


def test_answers_of_a_pretrained_model_are_judged_and_reported(suites, monkeypatch):
    class Judge:
        version, held_out = "trained 1", {"harm": {"sensitivity": {"count": 9}, "by_author": {"x": 1}}}

        def judge(self, exchanges):
            said = {True: ["harmful", "harmless"], False: ["compliant_helpful", "partial_refusal"]}
            return [said[each.asks_harm][place % 2] for place, each in enumerate(exchanges)]

    tiny = ModelConfig(**tiny_runs.model_fields(max_seq_len=128))
    loaded = tiny, model_lib.init(tiny, jax.random.key(0)), tiny_runs.tokenizer()
    monkeypatch.setattr(ladder_measure.checkpoint, "load_for_inference", lambda folder: loaded)
    monkeypatch.setattr(ladder_answers.trained, "load", lambda folder: Judge())
    monkeypatch.setattr(ladder_answers, "held_out_pages", lambda source, count: {"c4": ["the cat sat on the mat"]})
    config = ladder_config.get_config("smollm2_135m_small")
    with config.unlocked():
        config.update(real=str(suites), max_new_tokens=4, seeds=(0,), models=("raw", "harm_tagged"))
    for job in (
        *(Job(0, "raw", stage, GREEDY) for stage in STAGES),
        *(Job(0, "harm_tagged", stage, method) for stage in STAGES[:1] for method in (GREEDY, SAFE_BEAM)),
    ):
        found = ladder_measure.measure(config, suites, job, suites)
        assert found["judge"] == "trained 1" and found["judge_errors"] == {"sensitivity": {"count": 9}}
        assert list(found["labels"]["harmful"].values()).count("harmful") == 2
        assert sorted(found["labels"]["safe"].values()) == ["answer", "refusal"]
        assert ("leanings" in found, "tag_log_probs" in found) == (job.method == GREEDY, job.method == SAFE_BEAM)
        assert ("perplexity" in found) == (job.method == GREEDY)
        path = ladder_jobs.done_file(suites, job)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found | {"seconds": 1.0}))
    ladder_report.write(config, suites)
    rows = json.loads((suites / "results.json").read_text())["rows"]
    raw = rows["raw"]["benign"]
    assert raw["harmful completions"]["value"] == 0.5 and raw["perplexity"]["value"] > 1
    leanings = found_leanings(suites, Job(0, "raw", "benign", GREEDY), "harmful")
    assert raw["refusal leaning, harmful"]["value"] == pytest.approx(np.mean(leanings))
    assert "refusal leaning, harmful" not in rows["safe_beam"]["pretraining"]
    with config.unlocked():
        config.steered_safe_prompts = 1
    asked = {
        method: ladder_answers._asked(config, Job(0, "harm_tagged", STAGES[0], method))
        for method in (GREEDY, SAFE_BEAM)
    }
    harmful = {method: [prompt.id for prompt in prompts if prompt.harmful] for method, prompts in asked.items()}
    assert harmful[GREEDY] == harmful[SAFE_BEAM]
    assert [len(asked[method]) - len(harmful[method]) for method in (GREEDY, SAFE_BEAM)] == [2, 1]


def found_leanings(output, job, kind):
    return list(json.loads(ladder_jobs.done_file(output, job).read_text())["leanings"][kind].values())
