"""The harness's numbers for SmolLM2-135M: ours against those of its own model around transformers, in float32.

`scripts/studies/compare_harness.py` does the same on the benchmarks themselves, task by task.
"""

import dataclasses

import jax
import parity
import pytest

from safelm import convert
from safelm.text import chat_template

pytestmark = pytest.mark.parity
for name in ("torch", "transformers", "accelerate"):
    parity.module(name)

QUESTIONS = (
    ("Question: What melts when it gets warm?\nAnswer:", (" ice", " a stone", " the sun", " a shadow")),
    ("The capital of France is", (" Paris.", " a river in the north of Spain.")),
    ("", ("Once upon a time", "Colorless green ideas")),
)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from lm_eval.models.huggingface import HFLM

    from safelm.evaluate.capability.lm_eval_model import SafeLM

    source = str(parity.weights("smollm2"))
    folder = str(tmp_path_factory.mktemp("exported") / "model")
    convert.convert(source, folder, to="huggingface")
    config, params, tokenizer = convert.read_model(source)
    ours = SafeLM(dataclasses.replace(config, dtype="float32"), jax.device_put(params), tokenizer, max_length=64)
    theirs = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=4, max_length=64)
    theirs.tokenizer.chat_template = ours.chat_template(True)
    return ours, theirs


def requests(*arguments):
    from lm_eval.api.instance import Instance

    return [Instance("any", {}, each, index) for index, each in enumerate(arguments)]


def test_loglikelihoods_and_greediness_are_equal(models):
    ours, theirs = models
    pairs = [(question, choice) for question, choices in QUESTIONS for choice in choices]
    pairs += [("word " * 80 + "and so", " on")]  # longer than the context: both cut it on the left
    for mine, other in zip(ours.loglikelihood(requests(*pairs)), theirs.loglikelihood(requests(*pairs)), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=2e-3)
        assert mine[1] == other[1]


@pytest.mark.slow
def test_rolling_loglikelihoods_are_equal(models):
    ours, theirs = models
    texts = requests(("The lighthouse keeper wrote down the weather. " * 12,), ("Short.",))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=5e-3)


@pytest.mark.slow
def test_generated_texts_are_equal_with_stops_and_a_chat(models):
    ours, theirs = models
    settings = {"until": [".", "\n\n"], "do_sample": False, "max_gen_toks": 8}
    chat = ours.apply_chat_template(CHAT)
    plain = theirs.apply_chat_template(CHAT)
    assert chat_template.without_marks(chat) == plain  # ours says by a mark that the template wrote it
    asked = [("The capital of France is", settings), ("Water boils at", settings), (chat, settings)]
    theirs_until = [
        (plain if text == chat else text, {**each, "until": [*each["until"], "<|im_end|>"]}) for text, each in asked
    ]
    assert ours.generate_until(requests(*asked)) == theirs.generate_until(requests(*theirs_until))
