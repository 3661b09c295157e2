"""Which documents are chosen, what a journal keeps, what the labels are worth, and the training file."""

import json
import random

import pytest

from safelm.safety.classifier import examples
from safelm.safety.classifier.harm_kinds import KINDS
from safelm.safety.labelling import export, folder, journal, measures, uncertainty
from safelm.safety.labelling.choice import Candidate, ChoiceSettings, Chooser
from safelm.safety.labelling.folder import Document, LabelFolder
from safelm.safety.labelling.journal import Label
from safelm.safety.labelling.session import Session, StaleError
from safelm.safety.labelling.uncertainty import Opinion, opinion
from safelm.safety.labelling.uncertainty import uncertainty as unsure


def candidate(number, *scores, text=""):
    words = random.Random(number).choices([f"word{i}" for i in range(300)], k=30)
    opinions = {f"s{place}": Opinion(score, float(score)) for place, score in enumerate(scores)}
    return Candidate("web/part", number, f"d{number}", text or " ".join(words), max(scores, default=0), opinions)


def choose(candidates, **settings):
    chooser = Chooser(ChoiceSettings(**settings))
    for each in candidates:
        chooser.add(each)
    return chooser, chooser.chosen()


def rows(chosen, *, is_random):
    return [each.row for each, drawn in chosen if drawn == is_random]


def begun(root, count=6, **settings):
    """A folder of `count` documents with scores 0, 1, 2, ..; every second one is of the random share."""
    chosen = [(candidate(number, number % 6, 0), number % 2 == 0) for number in range(count)]
    folder.begin(root, settings, chosen)
    return LabelFolder(root)


def test_disagreement_entropy_and_margin_by_hand():
    assert unsure("disagreement", {"a": Opinion(1, 1.0), "b": Opinion(4, 3.5)}) == pytest.approx(0.5)
    sure, flat = opinion(0, {"unsafe_probability": 0.0}), opinion(1, {"unsafe_probability": 0.5})
    for method in ("entropy", "margin"):
        assert [unsure(method, {"a": each}) for each in (sure, flat)] == [0, 1]
    three = opinion(3, {"expected_score": 2.5, "unsafe_probability": 0.75, "unsafe_probability_3": 0.25})
    assert three.graded == 2.5 and three.probabilities == pytest.approx((0.25, 0.5, 0.25))
    assert unsure("margin", {"a": three}) == pytest.approx(0.75)
    assert unsure("entropy", {"a": three}) == pytest.approx(0.9463946)


def test_the_method_follows_from_what_there_is_and_one_that_lacks_its_columns_is_refused():
    one, other = Opinion(1, 1.0), Opinion(1, 1.0, (0.5, 0.5))
    pools = ({"a": one, "b": one}, {"a": other}, {"a": one})
    found = [uncertainty.check_method(None, [each]) for each in pools]
    assert found == ["disagreement", "entropy", "score"]
    assert uncertainty.check_method("random", [pools[2]]) == "random"
    for method in ("disagreement", "entropy", "margin"):
        with pytest.raises(ValueError, match=f"--choose_by={method}: needs .*there is a"):
            uncertainty.check_method(method, [pools[2]])


def test_the_most_disputed_documents_and_a_random_share_whatever_the_order():
    pool = [candidate(number, 0, 5 if number >= 90 else number % 2) for number in range(100)]
    _, chosen = choose(pool, documents=10, random_share=0.3)
    drawn, disputed = rows(chosen, is_random=True), rows(chosen, is_random=False)
    assert len(drawn) == 3 and set(disputed) <= set(range(90, 100)) - set(drawn) and len(disputed) == 7
    mixed = pool[:]
    random.Random(1).shuffle(mixed)
    assert choose(mixed, documents=10, random_share=0.3)[1] == chosen
    assert choose(pool, documents=10, random_share=0.3, seed=1)[1] != chosen
    assert [is_random for _, is_random in chosen[:4]].count(True) >= 1, "whoever stops early has some of either"


def test_the_random_share_stands_for_the_pool():
    pool = [candidate(number, 0, 5 if number < 100 else 0) for number in range(1000)]
    _, chosen = choose(pool, documents=300, random_share=0.5)
    disputed = sum(number < 100 for number in rows(chosen, is_random=True))
    assert 5 <= disputed <= 28, "a tenth of 150, not what was chosen for being disputed"


def test_near_duplicates_are_passed_over_among_the_chosen_not_in_the_random_share():
    text = " ".join(f"same{i}" for i in range(40))
    pool = [candidate(number, 0, 5, text=f"{text} end{number}") for number in range(30)]
    pool += [candidate(number, 0, 1) for number in range(30, 40)]
    chooser, chosen = choose(pool, documents=8, random_share=0.0)
    assert sum(number < 30 for number in rows(chosen, is_random=False)) == 1 and len(chosen) == 8
    assert chooser.near_duplicates == 29
    _, drawn = choose(pool[:30], documents=8, method="random")
    assert len(drawn) == 8 and all(is_random for _, is_random in drawn)


def test_scores_alone_give_as_many_of_each():
    pool = [candidate(number, 0 if number < 90 else number % 6) for number in range(100)]
    _, chosen = choose(pool, documents=6, random_share=0.0, method="score")
    assert sorted(each.harm_score for each, _ in chosen) == [0, 1, 2, 3, 4, 5]
    _, everything = choose(pool[:3], documents=50)
    assert len(everything) == 3, "fewer than were asked for"


def test_labels_are_on_the_disk_before_the_next_document_and_half_a_line_is_cut_off(tmp_path):
    found = begun(tmp_path)
    with found.journal("ada") as own:
        session = Session(found, own)
        session.label(0, 4, ["violence", "hate"], "a note")
        session.skip(1)
        session.label(2, 0, [], "")
        kept = (tmp_path / "_journals/ada.jsonl").read_bytes()  # what a kill would leave
    (tmp_path / "_journals/ada.jsonl").write_bytes(kept + b'{"event": "lab')
    with found.journal("ada") as own:
        assert own.labels[0] == Label(4, ("hate", "violence"), "a note", own.labels[0].time)
        assert own.labels[0].time.endswith("+00:00") and own.skipped == {1}
        session = Session(found, own)
        assert session.at == 3
        for at in (2, 1, 0, 0):
            session.undo()
            assert session.at == at
        assert not own.labels and not own.skipped
        session.label(0, 5, [], "")
    with found.journal("ada") as own:
        assert {number: label.score for number, label in own.labels.items()} == {0: 5}


def test_an_answer_to_another_document_than_the_one_shown_is_refused(tmp_path):
    found = begun(tmp_path, 2)
    with found.journal("ada") as own:
        session = Session(found, own)
        session.label(0, 1, [], "")
        with pytest.raises(StaleError):
            session.label(0, 5, [], "")
        session.label(1, 2, [], "")
        assert session.at is None and session.state()["document"] is None


def test_a_full_disk_keeps_the_journal_whole(tmp_path):
    class Full:
        def __init__(self, file):
            self._file, self.name = file, file.name

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, data):
            return self._file.write(data[:5])

    found = begun(tmp_path)
    with found.journal("ada") as own:
        own.label(0, Label(1))
        before, own._file = own._file, Full(own._file)
        with pytest.raises(OSError, match="No space left"):
            own.label(1, Label(2))
        own._file = before
        own.label(1, Label(3))
    with found.journal("ada") as own:
        assert {number: label.score for number, label in own.labels.items()} == {0: 1, 1: 3}


BEGIN = {"event": "begin", "annotator": "bob"}
LABEL = {"event": "label", "document": 0, "score": 1, "kinds": [], "note": "", "time": "t"}


@pytest.mark.parametrize(
    ("begin", "event", "told"),
    [
        ({}, {"score": 7}, "line 2: score 7 is outside 0 to 5"),
        ({}, {"score": "3"}, "line 2: score is str, not int"),
        ({}, {"document": 6}, "line 2: document 6 is none of 6"),
        ({}, {"kinds": ["rude"]}, "line 2: kind 'rude' is none of hate"),
        ({}, {"event": "undo"}, "line 2: nothing to undo"),
        ({}, {"event": "guess"}, "line 2: event 'guess'"),
        ({"documents": "other"}, {}, "a journal of other documents"),
        ({"event": "label"}, {}, "line 1: no beginning of a journal"),
        ({"annotator": "ada"}, {}, "the journal of ada, not of bob"),
    ],
)
def test_a_bad_journal_is_named_with_its_line(tmp_path, begin, event, told):
    found = begun(tmp_path)
    path = tmp_path / "_journals/bob.jsonl"
    path.parent.mkdir()
    lines = [BEGIN | {"documents": found.sha256} | begin, LABEL | event]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError) as error, found.journal("bob"):
        pass
    assert str(path) in str(error.value) and told in str(error.value) and "\n" not in str(error.value)


def test_damage_inside_a_journal_is_no_half_line(tmp_path):
    found = begun(tmp_path)
    with found.journal("ada") as own:
        own.label(0, Label(1))
    path = tmp_path / "_journals/ada.jsonl"
    begin, label = path.read_text().splitlines()
    path.write_text(f"{begin}\n{label[:9]}\n{label}\n")
    with pytest.raises(ValueError, match=r"ada\.jsonl, line 2: damaged"), found.journal("ada"):
        pass


def test_two_processes_on_one_folder_or_journal_are_refused(tmp_path):
    found = begun(tmp_path)
    with folder.only_process(tmp_path), pytest.raises(ValueError, match="another process is labelling there"):
        with folder.only_process(tmp_path):
            pass
    with found.journal("ada"), pytest.raises(ValueError, match=r"ada\.jsonl: another process"), found.journal("ada"):
        pass


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 65])
def test_a_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(ValueError, match="--annotator="):
        journal.check_name(name)


def label_all(found, annotator, scores, kinds=()):
    with found.journal(annotator) as own:
        for number, score in enumerate(scores):
            own.label(number, Label(score, kinds if score else ()))


def test_the_error_is_that_of_the_random_share_and_agreement_that_of_all(tmp_path):
    found = begun(tmp_path)  # scored 0 to 5, the even ones random
    label_all(found, "ada", [0, 1, 0, 3, 4, 5])
    measured = measures.measure(found.documents, found.labels())
    error = measured["error"][""]
    assert error["exact"]["value"] == pytest.approx(1 / 3) and error["exact"]["cases"] == 3
    assert error["1"]["value"] == pytest.approx(1 / 3) and error["3"]["value"] == 0
    assert 0 < error["1"]["low"] < error["1"]["high"] < 1
    assert measured["agreement"][""]["exact"]["value"] == pytest.approx(5 / 6)
    assert measured["agreement"]["s1"]["exact"]["value"] == pytest.approx(2 / 6), "the scorer that says 0"
    assert measured["random"] == {"documents": 3, "labelled": 3} and measured["alpha"] is None
    empty = measures.measure(found.documents, {})
    assert empty["error"][""]["exact"] is None and empty["labelled"] == 0


def test_several_annotators_become_one_row_with_votes_that_training_reads(tmp_path):
    found = begun(tmp_path, 4)
    label_all(found, "ada", [0, 1, 5], ("hate",))
    label_all(found, "bob", [0, 4], ("violence",))
    label_all(found, "cleo", [0, 4])
    measured = export.export(found)
    assert measured["labels"] == {"ada": 3, "bob": 2, "cleo": 2} and measured["alpha"]["cases"] == 2
    rows = [json.loads(line) for line in (tmp_path / export.NAME).read_text().splitlines()]
    assert [row["harm_score"] for row in rows] == [0, 3, 5]
    assert rows[1]["harm_votes"] == [0, 1, 0, 0, 2, 0] and rows[1]["annotators"] == ["ada", "bob", "cleo"]
    assert rows[1]["harm_kinds"]["hate"] == 0.5, "of two that named any"
    assert set(rows[0]["harm_kinds"].values()) == {0.0}
    assert "note" not in json.dumps(rows)
    for place in (tmp_path / export.NAME, tmp_path):
        read = examples.read(f"harm_score:{place}")
        assert [(each.text, each.score) for each in read] == [(row["text"], row["harm_score"]) for row in rows]
        assert read[1].votes == pytest.approx((0, 1 / 3, 0, 0, 2 / 3, 0)), "disagreement is a soft label"
        assert read[1].kinds["hate"] == 0.5 and read[0].kinds == dict.fromkeys(KINDS, 0.0)
    rows[1]["harm_votes"] = [0, 1]
    (tmp_path / "damaged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"damaged\.jsonl: row 2: column 'harm_votes': not a list of 6 counts"):
        examples.read(f"harm_score:{tmp_path / 'damaged.jsonl'}")


def test_a_colleagues_journal_put_beside_counts_and_one_of_other_documents_does_not(tmp_path):
    here, there = begun(tmp_path / "here"), begun(tmp_path / "there")
    label_all(here, "ada", [0, 1])
    label_all(there, "bob", [0, 2])
    source = tmp_path / "there/_journals/bob.jsonl"
    target = tmp_path / "here/_journals/bob.jsonl"
    target.write_bytes(source.read_bytes())
    assert set(here.labels()[1]) == {"ada", "bob"}
    label_all(begun(tmp_path / "other", 5), "bob", [3])
    target.write_bytes((tmp_path / "other/_journals/bob.jsonl").read_bytes())
    with pytest.raises(ValueError, match=r"bob\.jsonl: a journal of other documents"):
        here.labels()


def test_a_changed_choice_is_noticed(tmp_path):
    begun(tmp_path)
    path = tmp_path / folder.DOCUMENTS
    path.write_text(path.read_text().replace("d0", "d9"))
    with pytest.raises(ValueError, match=r"_documents\.jsonl: not what was chosen"):
        LabelFolder(tmp_path)


def test_documents_show_no_text_when_printed():
    assert "secret" not in repr(Document("a", "f", 1, "secret", 0, {}, True)) + repr(candidate(1, 0, text="secret"))
