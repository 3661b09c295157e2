"""A checkpoint as a model of Inspect, through Inspect's own evaluation; skipped where inspect_ai isn't installed."""

import importlib.metadata

import pytest
from serving_fakes import tiny_model

from safelm.checkpoints import checkpoint


def test_inspect_finds_the_provider():
    found = importlib.metadata.entry_points(group="inspect_ai")
    if not found:
        pytest.skip("SafeLM was installed before the entry point was there: pip install -e . again")
    assert found["safelm"].value == "safelm.serving.inspect_provider"


def test_an_evaluation_runs_on_a_checkpoint(tmp_path):
    inspect_ai = pytest.importorskip("inspect_ai", reason="Inspect isn't installed: pip install inspect_ai openai")
    from inspect_ai.dataset import Sample
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.scorer import includes
    from inspect_ai.solver import generate

    from safelm.serving import inspect_provider  # noqa: F401  registers `safelm`

    tiny = tiny_model()
    checkpoint.save_params(str(tmp_path / "model"), tiny.config, tiny.params, tiny.tokenizer)
    config = GenerateConfig(max_tokens=8, seed=1, logprobs=True, top_logprobs=2, frequency_penalty=0.5)
    task = inspect_ai.Task(
        dataset=[Sample(input="the cat", target="mat"), Sample(input="a dog", target="sat")],
        solver=[generate()],
        scorer=includes(),
        config=config,
    )
    model = get_model(f"safelm/{tmp_path}/model", method="greedy")
    (log,) = inspect_ai.eval(task, model=model, log_dir=str(tmp_path / "logs"), display="none")
    assert log.status == "success" and len(log.samples) == 2
    for sample in log.samples:
        assert len(sample.output.choices[0].logprobs.content) in range(9)
        assert sample.output.usage.output_tokens in range(1, 9)
    with pytest.raises(Exception, match="unknown; want one of method"):
        get_model(f"safelm/{tmp_path}/model", temprature=1)
