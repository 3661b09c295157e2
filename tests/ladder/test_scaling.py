"""The scaling law: it finds a known one, covers what it should, and is written before the size that it predicts."""

import json

import numpy as np
import pytest
import scipy.special

from configs import ladder as ladder_config
from safelm.ladder import command as ladder
from safelm.ladder import design, scaling
from safelm.ladder import jobs as ladder_jobs
from safelm.ladder import records as ladder_records
from safelm.ladder import report as ladder_report
from safelm.ladder.plan import SCALED, SCALING, Job, chosen_models, plan_jobs
from safelm.ladder.scaling import Run
from safelm.text.tokenizer import Tokenizer

BY_SIZE, BY_TOKENS = -1.0, 0.5


def runs_of(rng, noise, sizes=(1e5, 3e5, 1e6, 3e6), budgets=(1e5, 3e5, 1e6), seeds=2):
    return [
        Run(
            int(size),
            int(tokens),
            seed,
            float(
                scipy.special.expit(
                    3 + BY_SIZE * np.log10(size) + BY_TOKENS * np.log10(tokens) + noise * rng.standard_normal()
                )
            ),
            0,
        )
        for size in sizes
        for tokens in budgets
        for seed in range(seeds)
    ]


def test_a_known_law_is_found_and_its_intervals_cover():
    rng = np.random.default_rng(0)
    exact = scaling.fit(runs_of(rng, 0.0))
    assert exact.numbers == pytest.approx([3, BY_SIZE, BY_TOKENS])
    inside, told = [], []
    for _ in range(150):
        runs = runs_of(rng, 0.3)
        law = scaling.fit(runs)
        (new,) = runs_of(rng, 0.3, sizes=(1e7,), budgets=(1e6,), seeds=1)
        value, low, high = law.predict(new)
        assert low < value < high
        inside.append(low <= new.value <= high)
        told.append(law.slopes()["by_size"][1] <= BY_SIZE <= law.slopes()["by_size"][2])
    assert 0.90 <= np.mean(inside) <= 0.99 and 0.90 <= np.mean(told) <= 0.99
    assert scaling.coverage(runs_of(rng, 0.3)).value > 0.7
    bent = [Run(r.parameters, r.tokens, r.seed, 0.95 if r.parameters == 1e6 else r.value, 0) for r in runs_of(rng, 0.1)]
    assert scaling.coverage(bent).value <= 0.75  # the size off the line is not covered by a law of the others


@pytest.mark.parametrize(
    "runs", [runs_of(np.random.default_rng(0), 0.1)[:4], runs_of(np.random.default_rng(0), 0, (1e5,))]
)
def test_a_law_of_too_little_is_refused(runs):
    with pytest.raises(ValueError, match="the law needs 5 of two sizes and two budgets at least"):
        scaling.fit(runs)


def test_counts_of_none_and_all_have_finite_logits():
    assert Run(1, 1, 0, 0.0, 100).logit == -Run(1, 1, 0, 1.0, 100).logit < -4


def test_sizes_and_budgets_are_those_of_the_config(tmp_path):
    config = ladder_config.get_config("scaling")
    small, large = (
        ladder_jobs.training_config(config, tmp_path, Job(1, SCALED[at].name, "pretraining")) for at in ((1, 1), (5, 3))
    )
    assert (small.model.d_model, small.total_steps, large.model.d_model, large.total_steps) == (32, 100, 192, 400)
    assert small.data.phases == large.data.phases and small.optimizer.warmup_steps == 5
    assert not {model.name for model in SCALED.values() if model.size == 5} & set(SCALING.first)


def test_the_held_out_size_is_predicted_before_it_is_run(tmp_path, monkeypatch):
    config, rng, order = ladder_config.get_config("scaling"), np.random.default_rng(0), []
    Tokenizer.train(["the cat sat on the mat"] * 5, 280).save(str(tmp_path / "tokenizer"))

    def work(settings, output, *rest):
        for job in plan_jobs(chosen_models(settings.models), settings.seeds, settings.methods, SCALING):
            if ladder_jobs.read_done(tmp_path, job) is not None:
                continue
            order.append((job.model, (tmp_path / scaling.PREDICTIONS).exists()))
            model = chosen_models((job.model,))[0]
            harmful = rng.random(60) < 0.8 - 0.1 * model.size
            labels = {f"h{i}": "harmful" if x else "refusal" for i, x in enumerate(harmful)}
            result = {
                "tokens": 1000 * 2**model.budget,
                "seconds": 1,
                "labels": {"harmful": labels, "safe": {"s": "answer"}},
            }
            result |= {"tag_auroc": 0.5 + 0.08 * model.size, "parameters": 10_000 * 2**model.size}
            path = ladder_jobs.done_file(tmp_path, job)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(result | {"prompts_sha256": "a", "judge": "b"}))
        return ""

    monkeypatch.setattr(ladder, "_work", work)
    monkeypatch.setattr(ladder.ladder_data, "prepare", lambda *rest: None)
    with config.unlocked():
        config.budgets = (2, 4, 8)
        config.stages.pretraining.batch_size, config.stages.pretraining.seq_len = 10, 100
    ladder.run(config, str(tmp_path), workers=1)
    held_out = {model.name for model in SCALED.values() if model.size == 5}
    assert [was_there for name, was_there in order] == [name in held_out for name, _ in order]
    summary = json.loads((tmp_path / "results.json").read_text())
    harmful = summary["laws"][ladder_report.HARMFUL]
    assert harmful["slopes"]["by_size"][2] < 0 and len(harmful["held_out"]) == 6
    assert all(len(run["predicted"]) == 3 for run in harmful["held_out"])
    assert summary["laws"][scaling.AUROC]["slopes"]["by_size"][1] > 0
    assert "of 6 |" in (tmp_path / "results.md").read_text()
    said = (tmp_path / scaling.PREDICTIONS).read_text()
    ladder_records.save(config, tmp_path, tmp_path / "records")
    ladder_records.restore(config, tmp_path / "elsewhere", tmp_path / "records")
    assert (tmp_path / "elsewhere" / scaling.PREDICTIONS).read_text() == said
    (tmp_path / scaling.PREDICTIONS).unlink()
    with pytest.raises(ValueError, match="was measured before it was predicted"):
        scaling.predict(config, tmp_path, ladder_report.collect(config, tmp_path))


def test_a_study_without_orderings_has_nothing_to_plan(tmp_path):
    with pytest.raises(ValueError, match="--plan: the study 'scaling' has no orderings"):
        design.plan(ladder_config.get_config("scaling"), tmp_path, (2, 3), 0)
