"""Interventions as tasks: spans to tokens, weights, inserted tokens; from a corpus to what a tiny run learns."""

import json
import re

import numpy as np
import pytest
import tiny_runs
from document_files import write_rows
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from data_tasks import hosts, intervention_settings, rates
from data_tasks.interventions import INTERVENTIONS, InterventionSettings, mark_documents
from data_tasks.readers import Document
from safelm import annotate, cache_tasks
from safelm.data.store import TokenStore
from safelm.data.token_kinds import KINDS
from safelm.documents.spans import Span
from safelm.tags import HARM_TAG
from safelm.text.control_tokens import control_id, with_control_tokens
from safelm.text.harm_tags import kept_characters, remove_harm_tags
from safelm.text.token_offsets import encode_with_offsets
from safelm.text.tokenizer import Tokenizer
from safelm.train import run as train
from safelm.train.data import TrainData

OF_SPANS = [name for name, each in INTERVENTIONS.items() if not each.needs_notes]
CONTROLS = ("<good>", "<bad>", "<risky>", "</risky>", "<red_flag>", "<refuse>", "<respond>")
ALPHABET = "ab ,.\n\u00a0ü é\u0065\u0301漢字😀👩\u200d👧<>"


@pytest.fixture(scope="module")
def tokenizer():
    trained = Tokenizer.train(["Aa bb, über 漢字 and 😀 the cat sat. A bad thing happened here."] * 9, 340)
    return with_control_tokens(trained, CONTROLS)


def made(name, tokenizer, text, spans=(), score=0, metadata="", **settings):
    document = Document("d", text, score, spans=tuple(spans), metadata=metadata)
    (found,) = mark_documents(INTERVENTIONS[name], InterventionSettings(**settings), tokenizer, [document])
    return found


def kinds_of(document):
    """Tokens that are tags, prefix, masked, unlikelihood and notes."""
    assert len(document.kind) == len(document.tokens)
    return np.bincount(document.kind, minlength=len(KINDS)).tolist()[1:6]


@hypothesis_settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=ALPHABET, min_size=1, max_size=40), data=st.data())
def test_the_tokens_of_a_span_have_its_characters_and_no_token_else(tokenizer, text, data):
    start = data.draw(st.integers(0, len(text) - 1))
    span = Span(start, data.draw(st.integers(start + 1, len(text))), "k", "5")
    ((ids_N, offsets_N2),) = encode_with_offsets(tokenizer, [text])
    assert ids_N.tolist() == tokenizer.encode(text)
    document = made("masked_web", tokenizer, text, [span])
    is_masked_N = document.loss_weight[:-1] == 0
    covered = {i for at in np.flatnonzero(is_masked_N) for i in range(*offsets_N2[at])}
    assert covered >= set(range(span.start, span.end))
    for is_masked, (begin, end) in zip(is_masked_N, offsets_N2.tolist(), strict=True):
        assert is_masked == (begin < span.end and end > span.start)
    # The bytes of the tokens are those of the characters that they are said to have: an offset can't be off by one.
    for at in np.flatnonzero(is_masked_N):
        begin, end = offsets_N2[at]
        assert tokenizer.token_bytes(int(ids_N[at])) in text[begin:end].encode()


def test_offsets_are_of_the_text_before_a_normalizer(tokenizer):
    from tokenizers import Tokenizer as Backend
    from tokenizers import normalizers, processors

    backend = Backend.from_str(tokenizer.to_json())
    backend.normalizer, backend.post_processor = normalizers.NFC(), processors.ByteLevel(trim_offsets=True)
    text = "e\u0301 bad\u0301 end"
    found = made("masked_web", Tokenizer(backend), text, [Span(2, 3, "k", "4"), Span(5, 7, "k", "4")])
    ((_, offsets_N2),) = encode_with_offsets(Tokenizer(backend), [text])
    masked = [text[begin:end] for begin, end in offsets_N2[found.loss_weight[:-1] == 0]]
    assert "".join(masked).startswith(" ") and "d\u0301" in "".join(masked)


@given(st.lists(st.sampled_from(["a", "<", ">", HARM_TAG, HARM_TAG[:9], HARM_TAG[9:]]), max_size=12))
def test_kept_characters_are_those_that_removing_tags_keeps(pieces):
    text = "".join(pieces)
    assert "".join(text[i] for i in kept_characters(text)) == remove_harm_tags(text)[0]


def test_spans_move_with_literal_tags_that_are_removed(tokenizer):
    text = f"the {HARM_TAG}cat sat bad"
    at = text.index("sat")
    moved = made("masked_web", tokenizer, text, [Span(at, at + 3, "k", "4")])
    plain = made("masked_web", tokenizer, "the cat sat bad", [Span(8, 11, "k", "4")])
    assert moved.removed_tags == 1 and moved.tokens.tolist() == plain.tokens.tolist()
    assert moved.loss_weight.tolist() == plain.loss_weight.tolist() and 0 in moved.loss_weight


def test_each_intervention(tokenizer):
    text = "the cat. A bad thing. the end"
    spans = [Span(0, 8, "sentence", "0"), Span(9, 21, "sentence", "4"), Span(15, 20, "lexicon", "3")]
    ids = tokenizer.encode(text)
    plain = [*ids, tokenizer.eos_id]
    masked = made("masked_web", tokenizer, text, spans)
    is_risky = masked.loss_weight == 0
    assert masked.tokens.tolist() == plain and 0 < is_risky.sum() < len(ids) and masked.loss_weight[-1] == 1
    assert kinds_of(masked) == [0, 0, is_risky.sum(), 0, 0] and not masked.unlikelihood.any()
    assert made("masked_web", tokenizer, text, spans, kinds=("lexicon",)).loss_weight.all()
    assert made("masked_unsafe_web", tokenizer, text, spans, score=3).loss_weight.all()
    assert (made("masked_unsafe_web", tokenizer, text, spans, score=4).loss_weight == masked.loss_weight).all()
    unlikely = made("unlikelihood_web", tokenizer, text, spans, unlikelihood=0.5)
    assert (unlikely.unlikelihood == 0.5 * is_risky).all() and (unlikely.loss_weight == masked.loss_weight).all()
    assert kinds_of(unlikely) == [0, 0, 0, is_risky.sum(), 0]
    table = {"4": 0.25, "3": 2.0, "0": 0.0}
    weighted = made("weighted_web", tokenizer, text, spans, weights=table)
    assert set(weighted.loss_weight[is_risky]) == {0.25} and set(weighted.loss_weight) == {0.0, 0.25, 1.0}
    only = made("weighted_web", tokenizer, text, spans, weights={"3": 2.0})
    assert set(only.loss_weight) == {1.0, 2.0}
    tagged = made("span_tagged_web", tokenizer, text, spans)
    marks = {control_id(tokenizer, token) for token in CONTROLS[2:4]}
    assert [i for i in tagged.tokens.tolist() if i not in marks] == plain and kinds_of(tagged) == [2, 0, 0, 0, 0]
    inner = tokenizer.decode(tagged.tokens.tolist()).split("<risky>")[1].split("</risky>")[0]
    assert inner.strip() == "A bad thing."
    often = made("token_tagged_web", tokenizer, text, score=5, tag_rate=1.0)
    assert often.tokens[1:-1:2].tolist() == [tokenizer.harm_tag_id] * (len(ids) - 1)
    for score, token in ((0, "<good>"), (4, "<bad>")):
        first = made("conditioned_web", tokenizer, text, score=score)
        assert first.tokens.tolist() == [control_id(tokenizer, token), *plain]
        assert first.loss_weight.tolist() == [0, *[1] * len(plain)] and kinds_of(first) == [0, 1, 0, 0, 0]


def test_a_red_flag_stands_once_in_an_unsafe_document_or_a_risky_span(tokenizer):
    text = "the cat. A bad thing. the end. A bad cat."
    spans = [Span(9, 21, "sentence", "4"), Span(31, len(text), "sentence", "5"), Span(22, 30, "sentence", "0")]
    ids, flag = tokenizer.encode(text), control_id(tokenizer, "<red_flag>")
    places = set()
    for seed in range(40):
        found = made("red_flag_web", tokenizer, text, score=4, seed=seed)
        places.add(found.tokens.tolist().index(flag))
        assert [i for i in found.tokens.tolist() if i != flag] == [*ids, tokenizer.eos_id]
        assert found.kind.tolist() == [KINDS.index("control") if i == flag else 0 for i in found.tokens.tolist()]
        assert found.loss_weight.all()
    assert places <= set(range(len(ids))) and len(places) > len(ids) / 2
    assert made("red_flag_web", tokenizer, text, score=3).tokens.tolist() == [*ids, tokenizer.eos_id]
    by_span = made("red_flag_span_web", tokenizer, text, spans)
    first, second = np.flatnonzero(by_span.tokens == flag)
    assert "bad thing" not in tokenizer.decode(by_span.tokens[:first].tolist()) and first < second < len(ids) + 1
    alone = made("red_flag_web", tokenizer, text, score=5, flag_loss="flag")
    assert (alone.loss_weight == (alone.tokens == flag)).all()
    with pytest.raises(ValueError, match="flag_loss must be one of both, flag, got 'text'"):
        InterventionSettings(flag_loss="text")


def test_metadata_stand_before_a_document_without_loss(tokenizer):
    text = "the cat sat"
    found = made("metadata_web", tokenizer, text, metadata="https://en.example.org/a?b=c")
    prefix = tokenizer.encode("URL: en.example.org\n\n")
    assert found.tokens.tolist() == [*prefix, *tokenizer.encode(text), tokenizer.eos_id]
    assert (found.loss_weight == [0] * len(prefix) + [1] * (len(found.tokens) - len(prefix))).all()
    assert kinds_of(found) == [0, len(prefix), 0, 0, 0]
    whole = made("metadata_web", tokenizer, text, metadata="News, 2020", metadata_form="{value}. ")
    assert tokenizer.decode(whole.tokens.tolist()).startswith("News, 2020. the cat")
    for bare in ("En.example.org/page", "en.example.org", "en.example.org:80?b", "//en.example.org/a"):
        assert made("metadata_web", tokenizer, text, metadata=bare).tokens.tolist() == found.tokens.tolist()
    for metadata in ("", "no url", "https://[", "CC-MAIN-2020-05", "v1.2", "a.b@c.org", "page/en.example.org"):
        assert not made("metadata_web", tokenizer, text, metadata=metadata).kind.any()
    with pytest.raises(ValueError, match=r"metadata_form must have .domain. or .value., got 'URL: '"):
        InterventionSettings(metadata_form="URL: ")


def test_a_host_is_one_however_it_is_written_and_a_file_is_none():
    for place in ("example.com", "Example.com.", "example.com:80", "example.com./x", "example.com/x"):
        assert {hosts.host(f"{scheme}{place}") for scheme in ("", "//", "http://", "https://me@")} == {"example.com"}
        assert hosts.host(place) == hosts.host(f"http://{place}") == "example.com"
    for name in ("index.html", "README.md", "old.notes.txt", "index.html?x=1", "data.tar.gz", "setup.py"):
        assert hosts.host(name) == "" and hosts.host(f"https://example.com/{name}") == "example.com"
    for name in ("www.point.md", "point.md/page", "www.com.py", "onet.pl", "b92.rs"):
        assert hosts.host(name) == name.partition("/")[0]
    assert hosts.host("http://./x") == "" and hosts.host("http://index.html/x") == "index.html"


def test_bad_parameters_and_vocabularies_are_one_line(tokenizer):
    for settings, message in (
        ({"weights": {"4": -1.0}}, "label '4' has loss weight -1.0, must be at least 0: unlikelihood_web"),
        ({"unlikelihood": 0.0}, "unlikelihood must be above 0, got 0.0"),
        ({"tag_rate": 2.0}, "tag_rate must be from 0 to 1"),
        ({"refuse_tokens": {"weapons": "<respond>"}}, "category 'weapons' has token '<respond>'"),
        ({"refuse_tokens": {"weapons": " "}}, "category 'weapons' has token ' '"),
        ({"refuse_column": ""}, "refuse_column is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            InterventionSettings(**settings)
    for settings, message in (  # as JSON can hold them
        ({"weights": {"4": "a"}}, "label '4' must be a number, got 'a'"),
        ({"labels": 4}, "labels must be a list of strings, got 4"),
        ({"labels": (4,)}, r"labels must be a list of strings, got \(4,\)"),
        ({"open_token": 1}, "open_token must be a string, got 1"),
        ({"note_tokens": 1.5}, "note_tokens must be a whole number, got 1.5"),
        ({"refuse_tokens": ("<a>",)}, "refuse_tokens must be an object, got"),
        ({"refuse_tokens": {"weapons": 1}}, "category 'weapons' must be a string, got 1"),
        ({"tag_rate": 0.1}, "no parameter 'tag_rate': there are "),
    ):
        with pytest.raises(ValueError, match=message):
            intervention_settings.read(settings, tag_rate=0.05)
    assert intervention_settings.read({"labels": ["3"], "weights": {"3": 1}}, seed=4).seed == 4
    bare = Tokenizer.train(["a b"], 262)
    with pytest.raises(ValueError, match="the vocabulary has no control token '<good>'"):
        made("conditioned_web", bare, "a")
    for token in ("", "a"):
        with pytest.raises(ValueError, match="can't be a control token"):
            with_control_tokens(tokenizer, [token])
    assert tokenizer.encode("<good>") and control_id(tokenizer, "<good>") not in tokenizer.encode("<good>")


def test_control_tokens_are_kept_and_exported(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path))
    again = Tokenizer.from_pretrained(str(tmp_path))
    assert again.hash == tokenizer.hash and [control_id(again, t) for t in CONTROLS] == [
        control_id(tokenizer, t) for t in CONTROLS
    ]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs.convert_tokens_to_ids(list(CONTROLS)) == [control_id(tokenizer, t) for t in CONTROLS]


def test_every_intervention_has_a_mixture():
    named = {source for name in rates.OTHERS for source in rates.rates(name)}
    assert named >= set(INTERVENTIONS)
    assert all(sum(rates.rates(name).values()) == pytest.approx(1) for name in rates.OTHERS)


# ---- from a corpus to a run


@pytest.fixture(scope="module")
def cached(tmp_path_factory, tokenizer):
    """Stores of every intervention on documents whose every second sentence is risky."""
    folder = tmp_path_factory.mktemp("interventions")
    texts = [f"the cat sat here. It was level{4 + i % 2} bad. the end of über {i}." for i in range(40)]
    rows = [
        {"id": f"d{i}", "text": text, "harm_score": 4 * (i % 2), "metadata": {"url": f"https://w{i % 3}.invalid/{i}"}}
        for i, text in enumerate(texts)
    ]
    write_rows(folder / "corpus/raw_web/train-0.jsonl", rows[:30])
    write_rows(folder / "corpus/raw_web/validation-0.jsonl", rows[30:])
    tokenizer.save(str(folder / "tokenizer"))
    argv = [f"--input={folder}/corpus/raw_web", f"--output={folder}/spans", "--workers=1"]
    scorer = "--scorers=python:scorers_for_tests:LevelScorer"
    annotate.main(annotate.arguments().parse_args(["--unit=sentence", scorer, *argv]))
    cache(folder, "tokens", *OF_SPANS, "raw_web", annotations=folder / "spans")
    return folder


def cache(folder, output, *names, **flags):
    argv = [f"--tasks={','.join(names)}", f"--data_dir={folder}/corpus", f"--tokenizer={folder}/tokenizer"]
    argv += [f"--output={folder}/{output}", "--workers=1", *(f"--{name}={value}" for name, value in flags.items())]
    cache_tasks.main(cache_tasks.arguments().parse_args(argv))


def test_stores_have_the_weights_and_count_their_tokens(cached):
    stores = {name: TokenStore.open(str(cached / "tokens" / name / "train")) for name in (*OF_SPANS, "raw_web")}
    kinds = {name: store.manifest.extra.get("token_kinds") for name, store in stores.items()}
    assert kinds["raw_web"] is None and kinds["conditioned_web"]["prefix"] == 30
    assert kinds["masked_web"]["masked"] == kinds["unlikelihood_web"]["unlikelihood"] > 100
    assert kinds["metadata_web"]["prefix"] > 30 * len("w0.invalid") // 4
    assert kinds["masked_unsafe_web"]["masked"] < kinds["masked_web"]["masked"]
    assert kinds["red_flag_web"]["control"] == 15 and kinds["red_flag_span_web"]["control"] == 30
    documents = {name: stores[name].num_documents for name in ("safer_web", "unsafe_web", "raw_web")}
    assert documents == {"safer_web": 15, "unsafe_web": 15, "raw_web": 30}
    assert kinds["span_tagged_web"]["tag"] == 60 and kinds["token_tagged_web"]["tag"] > 0
    for name, store in stores.items():
        has_it = "unlikelihood" in [channel.name for channel in store.channels]
        assert has_it == (name == "unlikelihood_web")
    assert stores["token_tagged_web"].manifest.num_tag_tokens == kinds["token_tagged_web"]["tag"]


def test_parameters_and_missing_spans_are_named(cached):
    cache(cached, "other", "masked_web", annotations=cached / "spans", interventions='{"labels": ["5"]}')
    manifest = TokenStore.open(str(cached / "other/masked_web/train")).manifest
    assert manifest.extra["settings"]["interventions"]["labels"] == ["5"]
    default = TokenStore.open(str(cached / "tokens/masked_web/train")).manifest
    assert 0 < manifest.extra["token_kinds"]["masked"] < default.extra["token_kinds"]["masked"]
    for flags, message in (
        ({}, "spans.*safelm.annotate --unit=sentence. writes some"),
        ({"annotations": cached / "spans", "interventions": '{"label": 1}'}, "interventions: no parameter 'label'"),
        ({"annotations": cached / "spans", "interventions": "[1]"}, "--interventions: must be an object"),
        ({"annotations": cached / "spans", "interventions": '{"weights": {"4": -1}}'}, "has loss weight -1"),
    ):
        with pytest.raises(ValueError, match=message):
            cache(cached, "failed", "masked_web", **flags)


def test_alignment_text_is_read_as_often_as_its_share_of_a_phase_asks(cached):
    write_rows(cached / "corpus/alignment_text/train-0.jsonl", [{"text": f"an honest text {i}"} for i in range(3)])
    cache(cached, "tokens", "alignment_text")
    config = tiny_runs.tiny_config(cached, total_steps=20)
    with config.unlocked():
        late = {"start": 0.5, "rates": {"raw_web": 0.75, "alignment_text": 0.25}}
        config.data.phases = ({"start": 0.0, "rates": {"raw_web": 1.0}}, late)
    data = TrainData(config.lock(), Tokenizer.from_pretrained(str(cached / "tokenizer")))
    assert data.tokens_given(10)["alignment_text"] == 0
    given = data.tokens_given(20)
    assert given["alignment_text"] == sum(given.values()) // 8
    (entry,) = [entry for entry in data.ledger(20) if entry.source == "alignment_text"]
    assert entry.epochs > 3  # of three documents, again and again


def test_the_plan_of_a_run_says_what_its_tokens_are(cached):
    config = tiny_runs.tiny_config(cached)
    with config.unlocked():
        config.data.phases = ({"start": 0.0, "rates": {"masked_web": 0.5, "token_tagged_web": 0.25, "raw_web": 0.25}},)
    data = TrainData(config.lock(), Tokenizer.from_pretrained(str(cached / "tokenizer")))
    *sources, run = data.kinds_table(config.total_steps).splitlines()
    kinds = data.stores["masked_web"].manifest.extra["token_kinds"]
    assert [line.split()[1] for line in sources] == ["masked_web:", "token_tagged_web:"]
    assert f"{kinds['masked']:,} masked" in sources[0] and " tag (" in sources[1]
    counts = {kind: int(count.replace(",", "")) for count, kind in re.findall(r"([\d,]+) (\w+) \(", run)}
    given = data.schedule.tokens_given(config.total_steps)
    assert counts.keys() == {"text", "masked", "tag"} and abs(sum(counts.values()) - sum(given.values())) <= 3
    share = kinds["masked"] / data.stores["masked_web"].num_tokens
    assert counts["masked"] == pytest.approx(share * given["masked_web"], abs=1)


def losses(cached, source, workdir, **overrides):
    config = tiny_runs.tiny_config(cached, **{"total_steps": 20, "checkpoint.every_steps": 20, **overrides})
    with config.unlocked():
        config.data.phases = ({"start": 0.0, "rates": {source: 1.0}},)
        config.model.vocab_size = Tokenizer.from_pretrained(str(cached / "tokenizer")).vocab_size
    train.train(config.lock(), str(workdir))
    return tiny_runs.metric_lines(workdir)


def test_a_run_lowers_the_probability_of_planted_spans(cached, tmp_path, capsys):
    lines = [line for line in losses(cached, "unlikelihood_web", tmp_path / "run") if "unlikelihood" in line]
    assert len(lines) == 20 and lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["loss/text"] == pytest.approx(lines[-1]["loss"], rel=1e-5)
    told = {name for name in lines[-1] if "/" in name} - {"tokens/unlikelihood_web"}
    assert told == {"loss/text", "share/text", "share/unlikelihood"}
    assert "kinds:      unlikelihood_web:" in "".join(capsys.readouterr())
    masked = losses(cached, "masked_web", tmp_path / "masked")
    assert all("unlikelihood" not in line for line in masked)
    store = TokenStore.open(str(cached / "tokens/masked_web/train"))
    share = store.manifest.extra["token_kinds"]["masked"] / store.num_tokens
    shares = [line["share/masked"] for line in masked]
    assert np.mean(shares) == pytest.approx(share, abs=0.05)
    assert json.loads((cached / "tokens/masked_web/train/manifest.json").read_text())["extra"]["token_kinds"]["masked"]
