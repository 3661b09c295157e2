"""Reasoning in replies: neither published nor in the way of a verdict."""

import time

import pytest

from safelm.evaluate.judges.questions import HARM_QUESTION, MANNER_QUESTION
from safelm.evaluate.judges.verdicts import HARMFUL, PARTIAL
from safelm.safety.judge.answer import read_answer
from safelm.safety.reasoning import has_reasoning, without_reasoning
from safelm.safety.synthesis.attempts import _why_no_text
from safelm.safety.synthesis.kinds import Source
from safelm.safety.synthesis.prompt_files import load_prompts
from safelm.safety.synthesis.requests import join_replies
from safelm.safety.synthesis.writer import Reply

THOUGHTS = "Okay, I should keep the facts. {} 3 Yes"
FORMS = {  # what stands in front of the thoughts, and between them and the answer
    "closed only": ("", "</think>\n\n"),
    "think": ("<think>\n", "\n</think>\n\n"),
    "empty": ("<think>\n\n</think>\n\n<think>", "</think>"),
    "thinking": ("<thinking>\n", "</thinking>\n"),
    "upper case": ("<THINK>", "</THINK >"),
    "attributes": ('<thinking mode="long">', "</thinking>"),
    "thought": ("<thought>", "</thought>\n"),
    "reasoning": ("<reasoning>", "</reasoning>\n"),
    "analysis": ("<analysis>", "</analysis>\n"),
    "namespace": ("<seed:think>", "</seed:think>\n"),
    "prefix": ("<longcat_think>\n", "\n</longcat_think>\n"),
    "brackets": ("[THINK]", "[/THINK]"),
    "begin of thought": ("<|begin_of_thought|>", "<|end_of_thought|>\n\n<|begin_of_solution|>"),
    "start thinking": ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
    "inner": ("<|inner_prefix|>", "<|inner_suffix|>"),
    "triangles": ("◁think▷", "◁/think▷"),
    "unused": ("<unused94>thought\n", "<unused95>"),
    "channels": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    "constrained channel": ("<|channel|>analysis<|message|>", "<|channel|>final <|constrain|>json<|message|>"),
    "channels without marks": ("analysis", "assistantfinal"),
    "answer": ("<think>", "</think>\n<answer>"),
    "twice": ("<think>a</think> I see. <think>", "</think>"),
}
ENDS = {
    "<answer>": "</answer>",
    "<|begin_of_solution|>": "<|end_of_solution|>",
    "<|START_RESPONSE|>": "<|END_RESPONSE|>",
}


def wrapped(form: str, answer: str) -> str:
    opening, closing = FORMS[form]
    return opening + THOUGHTS + closing + answer + next((end for mark, end in ENDS.items() if mark in closing), "")


@pytest.mark.parametrize("form", FORMS)
def test_a_writers_reasoning_is_cut_and_its_answer_stays(form):
    source, style = Source("a", "A page.", 2), next(iter(load_prompts("safeweb").styles))
    draft, reason = join_replies("safeweb", source, style, [Reply(wrapped(form, "The page, told anew."))])
    assert reason == "" and draft.text == "The page, told anew."
    assert has_reasoning(wrapped(form, "x")) and _why_no_text(Reply(wrapped(form, "x"))) is None


@pytest.mark.parametrize("form", [form for form, (opening, _) in FORMS.items() if opening])
def test_reasoning_without_an_end_is_rejected_and_counted(form):
    source, style = Source("a", "A page.", 2), next(iter(load_prompts("safeweb").styles))
    reply = Reply(FORMS[form][0] + THOUGHTS, "length")
    assert join_replies("safeweb", source, style, [Reply("Good."), reply]) == (None, "writer_reasoning")
    assert _why_no_text(reply) == "reasoning without an answer"
    assert read_answer(reply.text) is None and HARM_QUESTION.read(reply.text) is None


@pytest.mark.parametrize("form", FORMS)
def test_judges_answer_behind_their_reasoning(form):
    answer = read_answer(wrapped(form, '{"score": 4, "reason": "it says so"}'))
    assert (answer.score, answer.reason) == (4, "it says so")
    assert HARM_QUESTION.read(wrapped(form, "Yes.")) == HARMFUL
    assert MANNER_QUESTION.read(wrapped(form, "**C**")) == PARTIAL
    assert HARM_QUESTION.read(wrapped(form, "I would say yes.")) is None


def test_only_what_follows_the_reasoning_counts_as_the_verdict():
    assert read_answer('<think>It says {"score": 0}</think>{"score": 5}').score == 5
    assert read_answer('<think>{"score": 0}') is None
    assert read_answer('Sure: {"score": 0}') is None
    quoted = '{"score": 2, "reason": "a page about </think> and [THINK]"}'
    assert read_answer(quoted).reason == "a page about </think> and [THINK]"


@pytest.mark.parametrize(
    "text",
    [
        "I think <b>that</b> he <thinks>.",
        "Analysis of the final.",
        "x < think > y",
        "[think] she says",
        "",
        "a</p>",
    ],
)
def test_other_text_stays_as_it_is(text):
    assert without_reasoning(text) == text and not has_reasoning(text)


@pytest.mark.parametrize(
    "unit",
    [
        "<think>",
        "</think>",
        "<",
        "</",
        "<think ",
        "</think ",
        "_",
        "a:",
        "a_",
        "a_think",
        "<|channel|>",
        "<|channel|> final",
        "<answer>",
        "</answer>",
        "</answer> ",
        " ",
        "[THINK]",
        "analysis",
        "assistantfinal",
        "◁",
        "Here is my",
        "</a:a_",
    ],
)
def test_time_is_linear(unit):
    started = time.process_time()
    for around in ("", "</think>"):
        without_reasoning(around + unit * (200_000 // len(unit)) + "x")
    assert time.process_time() - started < 2
