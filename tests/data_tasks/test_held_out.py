"""What is held out of a corpus without validation files: by the page that a text was made from, in every task."""

import random

import pytest
import seqio
from document_files import write_rows

from data_tasks import held_out, tasks
from safelm.documents import find_named
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


def documents(name, split):
    """The documents of a split; none where it is empty."""
    try:
        return [each for batch in seqio.TaskRegistry.get(name).source.document_batches(split, 0, 1) for each in batch]
    except ValueError as error:
        assert "empty corpus" in str(error)
        return []


def split_ids(name):
    """The ids that decide, of training and of held-out documents; never one on both sides."""
    train, held_out = ({each.split_id for each in documents(name, split)} for split in SPLITS)
    assert not train & held_out
    return train, held_out


def random_corpora(folder, rng):
    """Few pages with or without scores, and rewrites of some that are scored as the page, otherwise or not at all."""
    draw_score = lambda: rng.choice([0, 1, 4, 5, None])  # noqa: E731
    pages = [{"id": f"d{rng.random()}", "text": f"the cat {i}", "harm_score": draw_score()} for i in range(20)]
    pages += [page | {"text": "again"} for page in pages[:2]]  # of one id
    write_rows(folder / "raw_web/train-0.jsonl", pages)
    for kind in ("safeweb", "refuseweb", "moral_education"):
        sources = [{"id": f"other {i}", "harm_score": draw_score()} for i in range(2)]
        sources += rng.sample(pages, rng.choice([1, 3, 12]))
        made = [
            {"text": f"of {source['id']}", "id": f"{source['id']}-{number}", "source_id": source["id"]}
            | ({"harm_score": score} if (score := rng.choice([source["harm_score"], draw_score()])) is not None else {})
            for source in sources
            for number in range(rng.choice([1, 3]))
        ]
        write_rows(folder / kind / "train-0.jsonl", made)
    return pages


@pytest.mark.parametrize("fraction", [0.01, 0.4])
@pytest.mark.parametrize("draw", range(8))
def test_a_small_corpus_of_rewrites_goes_where_its_pages_go(tmp_path, draw, fraction):
    pages = random_corpora(tmp_path, random.Random(draw))
    tasks.register(str(tmp_path), TOKENIZER, prefix="small", settings={"validation_fraction": fraction})
    train, held_out = split_ids("small_raw_web")
    of_score = {}
    for page in pages:
        of_score.setdefault(page["harm_score"], set()).add(page["id"])
    assert train | held_out == set().union(*of_score.values())
    for ids_there in of_score.values():
        assert ids_there & train and (len(ids_there) == 1 or ids_there & held_out)
    for kind in ("safeweb", "refuseweb", "moral_education"):
        of_train, of_held_out = split_ids(f"small_{kind}")
        assert not of_train & held_out and not of_held_out & train


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_the_last_page_of_a_score_is_never_held_out(tmp_path, fraction):
    """However many of its rewrites there are, and whatever its hash says."""
    one = [{"text": f"lesson {i}", "id": f"l{i}", "source_id": "page"} for i in range(3)]
    write_rows(tmp_path / "safeweb/train-0.jsonl", one)
    lessons = [{"text": f"lesson {i}", "id": f"l{i}", "source_id": f"p{i % 5}", "harm_score": i % 5} for i in range(15)]
    lessons += [{"text": f"more {i}", "id": f"m{i}", "source_id": f"q{i}", "harm_score": 4} for i in range(4)]
    write_rows(tmp_path / "moral_education/train-0.jsonl", lessons)
    tasks.register(str(tmp_path), TOKENIZER, prefix="last", settings={"validation_fraction": fraction})
    assert split_ids("last_safeweb") == ({"page"}, set())
    train, held_out = (documents("last_moral_education", split) for split in SPLITS)
    assert {each.harm_score for each in train} == {0, 1, 2, 3, 4}
    assert {each.harm_score for each in held_out} == {4}


def test_rewrites_of_unknown_pages_have_held_out_ones_too(tmp_path):
    """Beside a corpus of pages without validation files, and beside one with them."""
    write_rows(tmp_path / "raw_web/train-0.jsonl", [{"id": f"d{i}", "text": f"the cat {i}"} for i in range(9)])
    made = [{"id": f"r{i}", "text": f"a tale {i}", "harm_score": i % 2} for i in range(9)]
    write_rows(tmp_path / "refuseweb/train-0.jsonl", made)
    for prefix in ("alone", "validated"):
        tasks.register(str(tmp_path), TOKENIZER, prefix=prefix, settings={"validation_fraction": 0.0001})
        assert [each.harm_score for each in documents(f"{prefix}_refuseweb", "validation")] in ([0, 1], [1, 0])
        write_rows(tmp_path / "raw_web/validation-0.jsonl", [{"id": "v", "text": "the cat"}])


def test_pages_in_a_place_that_is_not_there_decide_nothing(tmp_path, monkeypatch):
    write_rows(tmp_path / "safeweb/train-0.jsonl", [{"id": f"r{i}", "text": f"a tale {i}"} for i in range(9)])
    monkeypatch.setattr(held_out, "find_named", find_or_raise)
    corpora = {"raw_web": "gs://no-such-bucket/raw_web"}
    tasks.register(str(tmp_path), TOKENIZER, prefix="gone", corpora=corpora, settings={"validation_fraction": 0.0001})
    assert len(documents("gone_safeweb", "train")) == 8 and len(documents("gone_safeweb", "validation")) == 1


def find_or_raise(folder, *more):
    if folder.startswith("gs://"):
        raise FileNotFoundError(f"{folder}: there is no bucket 'no-such-bucket'")
    return find_named(folder, *more)


def test_tasks_that_read_less_of_a_conversation_hold_out_the_same(tmp_path):
    """Rows without a label are no answers of the refusal task, but the split is that of all rows."""
    for draw in range(4):
        rng = random.Random(draw)
        rows = [
            {"id": f"{rng.random()}", "prompt": f"the cat {i}?", "response": "the end", "prompt_harm_label": None}
            | {"response_harm_label": rng.choice(["harmful", "unharmful"]), "subcategory": None}
            | {"response_refusal_label": rng.choice(["refusal", "compliance", None])}
            for i in range(12)
        ]
        write_rows(tmp_path / f"{draw}/wildguardmix/train-0.jsonl", rows)
        tasks.register(str(tmp_path / str(draw)), TOKENIZER, prefix="few", settings={"validation_fraction": 0.05})
        _, held_out = split_ids("few_wildguardmix")
        assert held_out and split_ids("few_refusal_wildguardmix")[1] == held_out
