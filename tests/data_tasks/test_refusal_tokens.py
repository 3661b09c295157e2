"""Refusal tokens: answers begin with the token of their label or category, through the task to its channels."""

import collections
import gzip
import json

import numpy as np
import pytest
import seqio

from data_tasks import tasks
from data_tasks.chats import REFUSAL_ROWS, Openings, encode_chat, refusal_rows
from data_tasks.preprocessors import NO_SCORE
from data_tasks.readers import MalformedError
from safelm.data.token_kinds import CONTROL
from safelm.synthetic_web.corpus import Recipe, write_corpus
from safelm.text.control_tokens import control_id, with_control_tokens
from safelm.text.tokenizer import Tokenizer

CONTROLS = ("<refuse>", "<respond>", "<bad>", "<risky>")


@pytest.fixture(scope="module")
def tokenizer():
    trained = Tokenizer.train(["Aa bb, über 漢字 and 😀 the cat sat. A bad thing happened here."] * 9, 340)
    return with_control_tokens(trained, CONTROLS)


def test_answers_begin_with_the_token_of_their_label(tokenizer):
    row = {"prompt": "the bad thing?", "response": "over and end", "response_harm_label": "unharmful"}
    row |= {"prompt_harm_label": "unharmful"}
    respond, refuse = (control_id(tokenizer, token) for token in ("<respond>", "<refuse>"))
    openings = Openings("<respond>", "<refuse>")
    for label, token in (("refusal", refuse), ("compliance", respond)):
        document = REFUSAL_ROWS["refusal_wildguardmix"].parse(row | {"response_refusal_label": label})
        ids, weights = encode_chat(document.text, tokenizer, openings=openings)
        plain, plain_weights = encode_chat(document.text, tokenizer)
        at = ids.tolist().index(token)
        for with_it, without in ((ids, plain), (weights, plain_weights)):
            assert np.delete(with_it, at).tolist() == without.tolist()
        assert weights[at] == 1 and not weights[:at].any() and weights[at + 1] == 1
        assert tokenizer.decode(ids[at + 1 :].tolist()).startswith("over and end")
    assert REFUSAL_ROWS["refusal_wildguardmix"].parse(row).harm_score == NO_SCORE  # without a label
    jailbreak = {"vanilla": "a bad thing", "adversarial": "", "completion": "the end"}
    for kind, token in (("vanilla_harmful", refuse), ("vanilla_benign", respond)):
        document = REFUSAL_ROWS["refusal_wildjailbreak"].parse(jailbreak | {"data_type": kind})
        assert token in encode_chat(document.text, tokenizer, openings=openings)[0]
    talk = [{"role": role, "content": "the cat"} for role in ("user", "assistant") * 2]
    document = REFUSAL_ROWS["refusal_ultrachat"].parse({"messages": talk})
    assert encode_chat(document.text, tokenizer, openings=openings)[0].tolist().count(respond) == 2


def test_a_refusal_begins_with_the_token_of_its_category(tokenizer):
    openings = Openings("<respond>", "<refuse>", {"weapons": "<bad>", "arms": "<bad>", "privacy": "<risky>"})
    rows = refusal_rows("refusal_wildguardmix", "subcategory")
    assert rows.required("")["category"] == ("subcategory",) and "subcategory" in rows.optional
    row = {"prompt": "the bad thing?", "response": "over and end", "prompt_harm_label": "harmful"}
    for label, category, token in (
        ("refusal", "weapons", "<bad>"),
        ("refusal", "arms", "<bad>"),
        ("refusal", "privacy", "<risky>"),
        ("refusal", "other", "<refuse>"),
        ("refusal", None, "<refuse>"),
        ("compliance", "weapons", "<respond>"),
    ):
        document = rows.parse(row | {"response_refusal_label": label, "subcategory": category})
        ids = encode_chat(document.text, tokenizer, openings=openings)[0].tolist()
        found = [token for token in CONTROLS if control_id(tokenizer, token) in ids]
        assert found == [token], (label, category)
    jailbreak = {"vanilla": "a bad thing", "adversarial": "", "completion": "the end", "data_type": "vanilla_harmful"}
    of_jailbreaks = refusal_rows("refusal_wildjailbreak", "tactic")
    assert "category" not in of_jailbreaks.required("") and "tactic" in of_jailbreaks.optional
    for more, token in (({}, "<refuse>"), ({"tactic": "privacy"}, "<risky>")):
        ids = encode_chat(of_jailbreaks.parse(jailbreak | more).text, tokenizer, openings=openings)[0]
        assert control_id(tokenizer, token) in ids
    with pytest.raises(MalformedError, match="field 'subcategory' is not a string"):
        rows.parse(row | {"response_refusal_label": "refusal", "subcategory": 4})
    assert refusal_rows("refusal_wildguardmix") is REFUSAL_ROWS["refusal_wildguardmix"]
    with pytest.raises(ValueError, match="no control token '<none>'"):
        Openings("<respond>", "<refuse>", {"a": "<none>"}).ids(tokenizer)


def test_openings_by_category_are_control_tokens_of_the_task(tokenizer, tmp_path):
    corpus = str(tmp_path)
    write_corpus(corpus, Recipe(documents=40, validation_documents=10, prompts=2, chats=120))
    files = (tmp_path / "wildguardmix").glob("train-*")
    rows = [json.loads(line) for path in files for line in gzip.open(path, "rt")]
    refused = {row["subcategory"] for row in rows if row["response_refusal_label"] == "refusal"}
    named = {category: f"<refuse:{category}>" for category in sorted(refused)[:2]}
    vocabulary = with_control_tokens(tokenizer, ["<refuse>", "<respond>", *named.values()])
    found = tasks.register(corpus, vocabulary, prefix="categories", interventions={"refuse_tokens": named})
    counts = collections.Counter()
    task = seqio.get_mixture_or_task(found.tasks["refusal_wildguardmix"])
    for example in task.get_dataset(split="train", shuffle=False).as_numpy_iterator():
        (opening,) = example["targets"][example["kind"] == CONTROL]
        counts[vocabulary.special_token(int(opening))] += 1
        assert example["loss_weight"][example["kind"] == CONTROL] == 1
    wanted = collections.Counter(
        "<respond>" if row["response_refusal_label"] == "compliance" else named.get(row["subcategory"], "<refuse>")
        for row in rows
        if row["response_refusal_label"] and row["response_harm_label"] == "unharmful"
    )
    assert counts == wanted and len(wanted) == 4
