"""Notes: places, replies, constitutions, gates, and a run of safelm.synthesize up to a store with notes in it."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet
import pytest
import side_files
import synthesis_runs
from document_files import write_rows
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from synthesis_runs import SCORER, no_charts, rows_of

from data_tasks.interventions import INTERVENTIONS, InterventionSettings, mark_documents
from data_tasks.readers import Document
from safelm import cache_tasks, documents, synthesize
from safelm.data import token_kinds
from safelm.data.store import TokenStore
from safelm.documents import notes as note_files
from safelm.documents.annotations import AnnotationFolder
from safelm.documents.notes import Note
from safelm.safety.scorer import load_scorer
from safelm.safety.synthesis.gates import GateSettings, make_gates, run_gates
from safelm.safety.synthesis.gates.notes import NoteRules
from safelm.safety.synthesis.kinds import Draft, Pause, Source, Voices
from safelm.safety.synthesis.notes import constitution as constitutions
from safelm.safety.synthesis.notes.constitution import Constitution
from safelm.safety.synthesis.notes.places import NoteSettings, ReadingPauses, reading_pause
from safelm.safety.synthesis.notes.reply import read_note
from safelm.safety.synthesis.prompt_files import load_prompts
from safelm.safety.synthesis.requests import join_replies, make_requests
from safelm.safety.synthesis.writer import Reply
from safelm.tags import HARM_TAG
from safelm.text.control_tokens import control_id, with_control_tokens
from safelm.text.token_offsets import encode_with_offsets
from safelm.text.tokenizer import Tokenizer

LIMIT = ("--max_malformed_rows=1", "--max_malformed_fraction=0.1")
RULES = Constitution("# 1 Honesty\n## 2.1 Care for people", ("1", "2.1"))
TEXT = "The garden by the river was quiet. A neighbour told of the flood and of a promise that was kept."
ALPHABET = "ab ,.\n\u00a0ü é\u0065\u0301漢字😀👩\u200d👧<>"


@pytest.fixture(scope="module")
def tokenizer():
    trained = Tokenizer.train([TEXT, "Aa bb, über 漢字 and 😀 [2.1] Verdict: safe."] * 9, 400)
    return with_control_tokens(trained, ["<note>", "</note>"])


def pauses(tokenizer, place="pause", **more):
    return ReadingPauses(NoteSettings("", RULES, place, **more), tokenizer)


# ---- places


def test_the_density_rises_over_the_first_fifth_and_is_uniform_after():
    drawn_N = np.array([reading_pause(u) for u in (np.arange(200_000) + 0.5) / 200_000])
    counts, _ = np.histogram(drawn_N, bins=20, range=(0, 1))
    height = 200_000 / 20 / 0.9  # of a bin behind the rise: the whole area is 0.9 of it
    assert np.allclose(counts[4:], height, rtol=0.01)
    assert np.allclose(counts[:4], [height * share for share in (0.125, 0.375, 0.625, 0.875)], rtol=0.01)
    assert (np.diff(drawn_N) > 0).all() and 0 < drawn_N[0] < drawn_N[-1] < 1


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    text=st.text(alphabet=ALPHABET, min_size=1, max_size=60),
    seed=st.integers(0, 9),
    place=st.sampled_from(("pause", "end", "every:3", "before")),
    limit=st.integers(1, 40),
)
def test_a_place_has_one_position_in_characters_and_tokens_and_only_what_precedes_is_seen(
    tokenizer, text, seed, place, limit
):
    found = pauses(tokenizer, place, seed=seed, document_tokens=max(limit, 3)).sources(Source("d", text, 0))
    ids = tokenizer.encode(text)
    assert len({each.id for each in found}) == len(found) and (place == "every:3" or len(found) <= 1)
    for each in found:
        at = each.pause
        assert at.token_index <= min(len(ids), max(limit, 3)) and at.vocab_hash == tokenizer.hash
        # The tokens before the place spell the characters before it, so the place is the same in both counts.
        spelled = b"".join(tokenizer.token_bytes(int(i)) for i in ids[: at.token_index])
        assert spelled == text[: at.position].encode()
        assert each.text == text[: at.position] or place == "before"
        assert each.text.strip() and text.startswith(each.text)
    assert found == pauses(tokenizer, place, seed=seed, document_tokens=max(limit, 3)).sources(Source("d", text, 0))


def test_places_of_each_kind(tokenizer):
    count = len(tokenizer.encode(TEXT))
    source = Source("d", TEXT, 0)
    (end,) = pauses(tokenizer, "end").sources(source)
    assert (end.pause.token_index, end.text) == (count, TEXT)
    (before,) = pauses(tokenizer, "before", document_tokens=5).sources(source)
    assert before.pause == Pause(0, 0, tokenizer.hash) and before.text == tokenizer.decode(tokenizer.encode(TEXT)[:5])
    several = pauses(tokenizer, "every:10").sources(source)
    assert [each.pause.token_index for each in several] == list(range(10, count + 1, 10))
    drawn = {pauses(tokenizer).sources(Source(f"d{i}", TEXT, 0))[0].pause.token_index for i in range(40)}
    assert len(drawn) > 10
    # A literal tag is no part of what is tokenised; the position is of the text as it is in the corpus.
    tagged = f"The {HARM_TAG}garden"
    (end,) = pauses(tokenizer, "end").sources(Source("d", tagged, 0))
    assert (end.text, end.pause.position) == ("The garden", len(tagged))
    assert not pauses(tokenizer).sources(Source("d", "", 0))


# ---- replies and gates

GOOD = Voices(
    "I read of a garden and a promise that was kept, and I take it as it is [2.1].",
    "The text tells of a garden and a promise that was kept, and nobody is hurt [1].",
    "safe",
)


def note_draft(voices=GOOD, category="none", text=TEXT, **facts):
    both = f"{voices.first_person}\n\n{voices.third_person}"
    return Draft(
        "reflection",
        Source("d", text, 1, pause=Pause(len(text), 3, "h")),
        "plain",
        both,
        0,
        False,
        category,
        voices,
        **facts,
    )


@pytest.fixture(scope="module")
def gates(tokenizer):
    prompts = load_prompts("reflection")
    return make_gates(
        "reflection",
        scorer=load_scorer(SCORER),
        prompt_texts=[prompts.system, prompts.user],
        notes=NoteRules(tokenizer, NoteSettings("", RULES)),
    )


def outcome(gates, draft):
    (found,) = run_gates(gates, [draft])
    return found[-1].reason


def voiced(**changes):
    return dataclasses.replace(GOOD, **changes)


def test_gates_of_notes(gates):
    assert outcome(gates, note_draft()) == ""
    long = "The garden and the promise were kept, " * 40 + "and that was it [1]."
    for draft, reason in (
        (note_draft(voiced(verdict="maybe")), "unknown_verdict"),
        (note_draft(category="sadness"), "unknown_category"),
        (note_draft(category="privacy"), "verdict_without_category"),
        (note_draft(voiced(verdict="unsafe")), "verdict_without_category"),
        (note_draft(voiced(third_person=GOOD.third_person.replace("[1]", ""))), "no_section_cited"),
        (note_draft(voiced(first_person=GOOD.first_person.replace("2.1", "2.2"))), "unknown_section"),
        (note_draft(voiced(first_person=GOOD.third_person)), "no_first_person"),
        (note_draft(voiced(third_person=GOOD.first_person)), "first_person_in_third"),
        (note_draft(voiced(third_person="The garden promise [1].")), "too_short"),
        (note_draft(voiced(third_person=long)), "too_long"),
        (
            note_draft(voiced(third_person="The text on the garden and the promise names Aunt Mabel too [1].")),
            "details_invented",
        ),
        (note_draft(text="Nothing of all that stands here, but weather and stones."), "not_grounded"),
        (dataclasses.replace(note_draft(), is_cut=True), "cut"),
        (dataclasses.replace(note_draft(), voices=None), "no_note"),
    ):
        assert outcome(gates, draft) == reason


def test_harm_is_not_quoted(gates):
    harm = "Nobody will trace it. They said"  # the lexicon scorer's abstract words
    text = f"{TEXT} {harm} so by the garden."
    voices = voiced(third_person=f"The text on the garden and a promise says: {harm} [1].", verdict="unsafe")
    copying = next(gate for gate in gates if gate.name == "copying")
    quoting, telling = note_draft(voices, "privacy", text), note_draft(voiced(verdict="unsafe"), "privacy", text)
    assert [finding.reason for finding in copying.check([quoting, telling])] == ["harmful_text_copied", ""]
    assert outcome(gates, quoting) == "score_above_1" and outcome(gates, telling) == ""


def test_a_reply_has_four_labelled_parts(tokenizer):
    reply = "**Verdict:** Safe.\nCategory: none\nFirst person: I see\nwhat is so [1].\nThird person: It is so [1]."
    voices, category = read_note(reply)
    assert (voices.verdict, category, voices.first_person) == ("safe", "none", "I see what is so [1].")
    source = pauses(tokenizer, "end").sources(Source("d", TEXT, 0))[0]

    def joined(text, stopped="end"):
        return join_replies("reflection", source, "plain", [Reply(text, stopped)])

    draft, _ = joined(reply)
    assert draft.voices == voices and draft.text == "I see what is so [1].\n\nIt is so [1]."
    cut = reply[: reply.index("Third")]
    assert joined(cut)[1] == "writer_unparseable" and joined(cut, "length")[1] == "writer_cut"
    assert joined(f"{reply}\nVerdict: unsafe")[1] == "writer_unparseable"
    assert joined("I'm sorry, but I can't help with that.")[1] == "writer_declined"


def test_the_request_holds_what_precedes_and_the_constitution(tokenizer):
    prompts = load_prompts("reflection").with_constitution(RULES.text, RULES.sections)
    for each in pauses(tokenizer, "every:10").sources(Source("d", TEXT, 0)):
        (request,) = make_requests(prompts, each, "plain", seed=0, max_document_chars=30)
        assert request.document == each.text[-30:] and RULES.text in request.system
        behind = TEXT[each.pause.position :]
        assert len(behind) < 12 or behind not in request.system + request.before + request.document + request.after
    assert prompts.hash != load_prompts("reflection").with_constitution("# 1 Other", ("1",)).hash


# ---- constitutions


@pytest.mark.parametrize(
    ("text", "sections"),
    [
        ("# 1 One\nText\n## 1.1 Two\n3 apples", ("1", "1.1")),
        ("1. One\n1.1 Two\nand 3 apples", ("1", "1.1")),
    ],
)
def test_sections(tmp_path, text, sections):
    (tmp_path / "c.md").write_text(text)
    assert constitutions.read_constitution(str(tmp_path / "c.md")).sections == sections
    assert constitutions.cited("so [1.1] and [1], [1.1], [x]") == ["1.1", "1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("no numbers", "no section there"), ("# 1 A\n\n# 1 B", "section 1 is at line 1 and at line 3")],
)
def test_bad_constitutions(tmp_path, text, message):
    (tmp_path / "c.md").write_text(text)
    with pytest.raises(ValueError, match=f"c.md: .*{message}"):
        constitutions.read_constitution(str(tmp_path / "c.md"))


# ---- files of notes


def test_parsing_refuses_what_cannot_be():
    note = {"kind": "reflection", "position": 3, "token_index": 1, "first_person": "I", "verdict": "safe"}
    (found,) = note_files.parse([note], "abcdef", "f, row 1")
    assert (found.position, found.third_person, found.sections) == (3, "", ())
    assert note_files.from_json(note_files.to_json([found])) == (found,) and note_files.from_json("") == ()
    for change, message in (
        ({"kind": "aside"}, "f, row 1, note 1: kind 'aside' is none of reflection, preflection"),
        ({"position": 7}, "position 7 is beyond the text's 6 characters"),
        ({"position": -1}, "position -1 is no whole number"),
        ({"token_index": True}, "token_index True is no whole number"),
        ({"kind": "preflection"}, "a preflection stands before the document, not at 3"),
        ({"verdict": "good"}, "verdict 'good' is none of safe, unsafe"),
        ({"first_person": 3}, "first_person is no string"),
        ({"sections": "2.1"}, "sections is no list"),
    ):
        with pytest.raises(ValueError, match=message):
            note_files.parse([note | change], "abcdef", "f, row 1")
    with pytest.raises(ValueError, match="two notes of kind 'reflection' at character 3 differ"):
        note_files.parse([note, note | {"first_person": "Me"}], "abcdef", "f, row 1")


# ---- tokens


def noted(tokenizer, note, text=TEXT, name="reflected_web", **settings):
    document = Document("d", text, 0, notes=(note,))
    (made,) = mark_documents(INTERVENTIONS[name], InterventionSettings(**settings), tokenizer, [document])
    return made


def a_note(tokenizer, index, kind="reflection", text=TEXT):
    ((_, offsets_N2),) = encode_with_offsets(tokenizer, [text])
    position = int([*offsets_N2[:, 0], len(text)][index])
    return Note(position, kind, index, tokenizer.hash, "I see it [1].", "It is so [1].", "unsafe", "privacy", ("1",))


@hypothesis_settings(max_examples=40, deadline=None)
@given(data=st.data(), loss=st.sampled_from(("both", "note", "text")))
def test_a_note_stands_at_its_place_and_without_it_the_document_is_as_it_was(tokenizer, data, loss):
    ids = tokenizer.encode(TEXT)
    index = data.draw(st.integers(0, len(ids)))
    made = noted(tokenizer, a_note(tokenizer, index), note_loss=loss)
    inside = [control_id(tokenizer, "<note>"), *tokenizer.encode("I see it [1]."), control_id(tokenizer, "</note>")]
    assert made.tokens.tolist() == [*ids[:index], *inside, *ids[index:], tokenizer.eos_id]
    is_note = np.zeros(len(made.tokens), bool)
    is_note[index : index + len(inside)] = True
    wanted = {"both": 1.0, "note": is_note, "text": ~is_note}[loss]
    assert (made.loss_weight == wanted).all()
    others = ["masked" if loss == "note" else "text"] * (len(ids) + 1)
    kinds = [*others[:index], *["note"] * len(inside), *others[index:]]
    assert [token_kinds.KINDS[kind] for kind in made.kind] == kinds


def test_forms_voices_and_kinds(tokenizer):
    note = a_note(tokenizer, 4)
    for settings, text in (
        ({"note_voice": "third_person"}, "It is so [1]."),
        ({"note_form": "verdict"}, "Verdict: unsafe (privacy)."),
        ({"note_form": "verdict_note"}, "Verdict: unsafe (privacy). I see it [1]."),
    ):
        assert f"<note>{text}</note>" in tokenizer.decode(noted(tokenizer, note, **settings).tokens.tolist())
    before = noted(tokenizer, a_note(tokenizer, 0, "preflection"), name="preflected_web")
    assert before.tokens[0] == control_id(tokenizer, "<note>")
    assert not noted(tokenizer, note, name="preflected_web").kind.any()
    # Another vocabulary finds the token from the position in characters.
    other = with_control_tokens(Tokenizer.train([TEXT], 290), ["<note>", "</note>"])
    assert other.hash != tokenizer.hash
    tokens = noted(other, note).tokens.tolist()
    at = tokens.index(control_id(other, "<note>"))
    assert TEXT.startswith(other.decode(tokens[:at])) and len(other.decode(tokens[:at])) >= note.position
    # A literal tag of the text is removed, and the place moves with it.
    moved = noted(tokenizer, dataclasses.replace(note, position=note.position + len(HARM_TAG)), HARM_TAG + TEXT)
    assert moved.tokens.tolist() == noted(tokenizer, note).tokens.tolist() and moved.removed_tags == 1


def test_the_room_is_kept(tokenizer):
    ids = tokenizer.encode(TEXT)
    cut = noted(tokenizer, a_note(tokenizer, 3), document_tokens=6, note_tokens=40)
    assert cut.cut_tokens == len(ids) - 6 and len(cut.tokens) <= 6 + 40
    assert cut.loss_weight[-1] == 0 and cut.loss_weight[:-1].all()
    for note, settings, message in (
        (
            a_note(tokenizer, 3),
            {"note_tokens": 5},
            r"id d: its notes and its end need \d+ tokens, note_tokens reserves 5",
        ),
        (a_note(tokenizer, 9), {"document_tokens": 6}, "id d: a note belongs before token 9, document_tokens is 6"),
        (
            dataclasses.replace(a_note(tokenizer, 9), token_index=8),
            {},
            r"id d: the note at character \d+ has token 8, which begins at character \d+: another tokenizer",
        ),
        (dataclasses.replace(a_note(tokenizer, 9), token_index=900), {}, "has token 900, which is not there"),
        (a_note(tokenizer, 9), {"note_open_token": "<aside>"}, "no control token '<aside>'"),
    ):
        with pytest.raises(ValueError, match=message):
            noted(tokenizer, note, **settings)
    for settings in ({"note_voice": "we"}, {"note_form": "x"}, {"note_loss": "x"}, {"note_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            InterventionSettings(**settings)


# ---- a run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notes")
    rows = rows_of((0, 1, 2, 3, 4, 5), 30)
    write_rows(folder / "corpus/raw_web/train-0.jsonl", [rows[0] | {"text": 3}, *rows[1:20]])
    write_rows(folder / "corpus/raw_web/validation-0.parquet", rows[20:])
    trained = Tokenizer.train([row["text"] for row in rows], 700)
    with_control_tokens(trained, ["<note>", "</note>"]).save(str(folder / "tokenizer"))
    (folder / "rules.md").write_text("# 1 Honesty\n\n## 2.1 Care for people\n")
    return folder


def run(folder, output, *more, kind="reflection"):
    flags = [f"--constitution={folder}/rules.md", f"--tokenizer={folder}/tokenizer", *LIMIT, *more]
    return synthesis_runs.run(folder / output, folder / "corpus/raw_web", *flags, kind=kind)


def test_from_a_corpus_to_a_store_with_notes(inputs, monkeypatch, caplog):
    no_charts(monkeypatch)
    caplog.set_level("INFO")
    manifest = run(inputs, "notes", "--note_place=every:40", "--seed=3")
    totals, files = manifest["totals"], manifest["annotations"]["files"]
    assert totals["published"] == sum(facts["notes"] for facts in files.values()) > 5
    assert {name: facts["rows"] for name, facts in files.items()} == {"train-0.parquet": 20, "validation-0.parquet": 10}
    texts = {
        r.number: r.values.get("text")
        for r in documents.iter_rows(
            str(inputs / "corpus/raw_web/train-0.jsonl"), lambda malformed: None, text_column="text"
        )
    }
    tokenizer = Tokenizer.from_pretrained(str(inputs / "tokenizer"))
    count = 0
    for row in pyarrow.parquet.read_table(inputs / "notes/train-0.parquet").to_pylist():
        assert row["row"] in texts or not row["notes"]
        for note in note_files.parse(row["notes"], texts.get(row["row"], ""), "row"):
            count += 1
            assert note.sections and set(note.sections) <= {"1", "2.1"}
            before = texts[row["row"]][: note.position]
            assert len(tokenizer.encode(before)) == note.token_index and note.token_index % 40 == 0
    assert count == files["train-0.parquet"]["notes"]
    assert run(inputs, "notes", "--note_place=every:40", "--seed=3") == manifest  # nothing is left to do
    side_files.assert_only_documents("synthesize", inputs / "notes")
    with pytest.raises(ValueError, match="--note_tokens"):
        run(inputs, "notes", "--note_place=every:40", "--seed=3", "--note_tokens=64")
    room = manifest["annotations"]["note_tokens"]
    assert room == max(facts["note_tokens"] for facts in files.values()) > 128
    assert f'--interventions=\'{{"document_tokens": 1920, "note_tokens": {room}}}\'' in caplog.text
    cached(
        inputs, "tokens", notes="notes", interventions=json.dumps({"note_tokens": room, "note_voice": "third_person"})
    )
    store = TokenStore.open(str(inputs / "tokens/reflected_web/train"))
    kinds = store.manifest.extra["token_kinds"]
    assert kinds["note"] > 10 * count and not kinds["tag"] + kinds["masked"]
    with pytest.raises(
        ValueError,
        match=r"train-0.*id doc-\d+: its notes and its end need \d+ tokens, note_tokens reserves 9: manifest",
    ):
        cached(inputs, "narrow", notes="notes", interventions='{"note_tokens": 9}')


def test_the_report_counts_each_document_once_and_whole(inputs, monkeypatch, caplog):
    no_charts(monkeypatch)
    caplog.set_level("INFO")
    cards = []
    for output, place in (("several", "every:40"), ("one", "pause")):
        totals = run(inputs, output, f"--note_place={place}")["totals"]
        report = json.loads((inputs / output / "report/report.json").read_text())
        assert "documents" not in report and report["notes"]["in"] == totals["rows"]
        assert report["notes"]["documents"] == totals["documents"] == 29  # one of 30 is malformed
        assert f"of {totals['rows']} notes on 29 documents published" in caplog.text
        page = (inputs / output / "report/report.html").read_text()
        assert f"of {totals['rows']:,} notes on 29 documents passed" in page and "notes published" in page
        cards.append(report["card"]["sources"])
    assert cards[0] == cards[1] and cards[0]["documents"] == 29
    texts = [row["text"] for row in rows_of((0, 1, 2, 3, 4, 5), 30)[1:]]
    assert sum(len(text.split()) for text in texts) <= cards[0]["tokens"]


def cached(folder, output, notes, interventions):
    argv = [f"--data_dir={folder}/corpus", f"--tokenizer={folder}/tokenizer", f"--output={folder}/{output}"]
    argv += ["--tasks=reflected_web", f"--annotations={folder}/{notes}", f"--interventions={interventions}"]
    cache_tasks.main(cache_tasks.arguments().parse_args([*argv, "--workers=1", *LIMIT]))


def test_preflections_and_reflections_stand_in_named_folders(inputs, monkeypatch):
    no_charts(monkeypatch)
    manifest = run(inputs, "before", kind="preflection")
    assert manifest["totals"]["published"] > 5
    rows = pyarrow.parquet.read_table(inputs / "before/validation-0.parquet").to_pylist()
    assert {note["position"] for row in rows for note in row["notes"]} == {0}
    assert AnnotationFolder(str(inputs / "before"), "p").column("notes") == "p_notes"


def test_flags_that_do_not_fit(inputs):
    files = ["--constitution=c", "--tokenizer=t"]
    for kind, flags, message in (
        ("safeweb", ["--note_tokens=3"], "--note_tokens goes with --kind=reflection or preflection"),
        ("reflection", files[1:], "--kind=reflection needs --constitution"),
        ("reflection", files[:1], "--kind=reflection needs --tokenizer"),
        ("preflection", [*files, "--note_place=end"], "a preflection stands before the document"),
    ):
        argv = [f"--kind={kind}", "--input=i", "--output=o", "--writer=template:", f"--scorer={SCORER}", *flags]
        with pytest.raises(ValueError, match=message):
            synthesize.note_settings(synthesize.arguments().parse_args(argv))
    for place in ("every:0", "middle", "every:2000"):
        with pytest.raises(ValueError, match=f"--note_place={place}"):
            NoteSettings("t", RULES, place)
    assert GateSettings().note_words
