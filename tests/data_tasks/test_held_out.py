"""What is held out of a corpus without validation files: by the page that a text was made from, in every task."""

import seqio
from document_files import write_rows

from data_tasks import tasks
from safelm.text.control_tokens import with_control_tokens
from safelm.text.tokenizer import Tokenizer

SPLITS = ("train", "validation")
TOKENIZER = Tokenizer.train(["the cat sat. A bad thing happened here."] * 9, 300)


def ids(name, split="train"):
    found = seqio.get_mixture_or_task(name).get_dataset(split=split, shuffle=False).as_numpy_iterator()
    return [example["id"].decode() for example in found]


def test_nothing_is_held_out_of_texts_that_are_there_to_be_learned(tmp_path):
    rows = [{"id": f"d{i}", "text": f"the cat {i}", "harm_score": 0} for i in range(2)]
    for folder in ("alignment_text", "canaries", "raw_web"):
        write_rows(tmp_path / folder / "train-0.jsonl", rows)
    tasks.register(str(tmp_path), TOKENIZER, prefix="few")
    for name in ("alignment_text", "canaries"):
        assert ids(f"few_{name}") == ["d0", "d1"]
        assert seqio.get_mixture_or_task(f"few_{name}").splits == ("train",)
    assert len(ids("few_raw_web")) == 1
    write_rows(tmp_path / "alignment_text/validation-0.jsonl", rows[:1])
    tasks.register(str(tmp_path), TOKENIZER, prefix="own")
    assert (ids("own_alignment_text"), ids("own_alignment_text", "validation")) == (["d0", "d1"], ["d0"])


def test_rewrites_of_held_out_pages_are_held_out(tmp_path):
    pages = [{"id": f"d{i}", "text": f"the cat {i}", "harm_score": i % 6} for i in range(300)]
    made = [
        {"text": f"a {kind} of {page['id']}", "id": f"{page['id']}-{kind}", "source_id": page["id"]}
        | {"metadata": {"int_score": page["harm_score"]}, "prompt_version": f"{kind}-v1"}
        for kind in ("safeweb", "refuseweb", "moral_education")
        for page in pages
        if page["harm_score"]
    ]
    write_rows(tmp_path / "raw_web/train-0.jsonl", pages)
    for kind in ("safeweb", "refuseweb", "moral_education"):
        write_rows(tmp_path / kind / "train-0.parquet", [row for row in made if row["id"].endswith(kind)])
    tasks.register(str(tmp_path), TOKENIZER, prefix="pages", settings={"validation_fraction": 0.1})
    held_out = set(ids("pages_raw_web", "validation"))
    assert 20 < len(held_out) < 60
    for kind in ("safeweb", "refuseweb", "moral_education"):
        sources = {split: {each.split("-")[0] for each in ids(f"pages_{kind}", split)} for split in SPLITS}
        assert not sources["train"] & held_out
        assert sources["validation"] == held_out & {row["source_id"] for row in made}


def test_a_source_id_means_nothing_in_a_corpus_of_pages(tmp_path):
    rows = [{"id": f"d{i}", "text": f"the cat {i}", "source_id": "a crawl"} for i in range(200)]
    for folder in ("raw_web", "safeweb"):
        write_rows(tmp_path / folder / "train-0.jsonl", rows)
    tasks.register(str(tmp_path), TOKENIZER, prefix="crawl", settings={"validation_fraction": 0.1})
    assert 5 < len(ids("crawl_raw_web", "validation")) < 40
    write_rows(tmp_path / "safeweb/train-0.jsonl", [rows[0] | {"source_id": 1.5}, *rows])
    tasks.register(str(tmp_path), TOKENIZER, prefix="odd", settings={"validation_fraction": 0.0})
    assert len(ids("odd_safeweb")) == 200  # an id that is a fraction is malformed


def test_a_conversation_is_held_out_of_all_of_its_tasks(tmp_path):
    rows = [
        {"prompt": f"the cat {i}?", "response": f"the end {i}", "response_harm_label": "unharmful"}
        | {"prompt_harm_label": "unharmful", "subcategory": "weapons" if i % 4 else None}
        | {"response_refusal_label": "refusal" if i % 2 else "compliance"}
        for i in range(300)
    ]
    write_rows(tmp_path / "wildguardmix/train-0.jsonl", rows)
    vocabulary = with_control_tokens(TOKENIZER, ["<refuse>", "<respond>", "<arms>"])
    fraction = {"validation_fraction": 0.1}
    tasks.register(str(tmp_path), vocabulary, prefix="told", settings=fraction)
    named = {"refuse_tokens": {"weapons": "<arms>"}}
    tasks.register(str(tmp_path), vocabulary, prefix="named", settings=fraction, interventions=named)
    plain = ids("told_wildguardmix", "validation")
    assert 10 < len(plain) < 60
    for name in ("told_refusal_wildguardmix", "named_refusal_wildguardmix"):
        assert ids(name, "validation") == plain and not set(ids(name)) & set(plain)
