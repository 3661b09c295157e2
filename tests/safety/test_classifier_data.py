"""Labels of other schemes as scores 0 to 5, files of labelled texts, bad input, the command."""

import csv
import gzip
import json
import types
from pathlib import Path

import numpy as np
import pytest

from safelm import cli, train_classifier
from safelm.safety.classifier import balance, examples, harm_kinds, recipe_config
from safelm.safety.classifier.embedding_cache import CachedEmbedder
from safelm.safety.classifier.label_rules import LabelError
from safelm.safety.classifier.labels import LABEL_TABLE
from safelm.safety.embedding import Embedder

ROOT = Path(__file__).parents[2]
NGRAMS = "classifier_bundled"  # a config of another form
CONFIGS = sorted(p for p in (ROOT / "configs").glob("classifier_*.py") if p.stem != NGRAMS)

MAPPINGS = [
    ("harm_score", [{"harm_score": s} for s in range(6)], [0, 1, 2, 3, 4, 5]),
    ("pyrit", [{"human_score_1": str(v)} for v in (0, 0.25, 0.5, 0.75, 1)], [0, 1, 3, 4, 5]),
    ("pyrit", [{"human_score_1": "0.25", "human_score_2": "0.75", "human_score_3": "0.75"}], [3]),
    ("openai_moderation", [{"S": 0, "H": None}, {"S": 1}, {"S": 0, "H": 1, "V": 1}, {"HR": "1"}], [0, 4, 5, 4]),
    ("davidson", [{"class": str(v)} for v in range(3)], [5, 3, 0]),
    ("toxigen", [{"toxicity_score": v} for v in (1, 2, 3, 4, 5, 4.6)], [0, 1, 3, 4, 5, 5]),
    ("dynahate", [{"label": v} for v in ("0", 1, "nothate", "hate")], [0, 5, 0, 5]),
    ("implicit_hate", [{"label": "neutral"}, {"label": "hate"}], [0, 4]),
    ("edos", [{"label_category": v} for v in ("none", "3. animosity", "2. derogation")], [0, 3, 4]),
    (
        "conv_abuse",
        [
            {"A1_is_abuse.1": "1", "A1_is_abuse.-2": "0", "A2_is_abuse.1": ""},
            {"A1_is_abuse.0": "1, 1", "A2_is_abuse.-1": "1"},
            {"A1_is_abuse.-1": "1", "A2_is_abuse.-3": "1", "A3_is_abuse.-3": "1"},
        ],
        [0, 1, 5],
    ),
    ("toxic_spans", [{"spans": "[]"}, {"spans": "[3, 4, 5]"}], [1, 3]),
    ("civil_toxic", [{"n_raters": 3}], [3]),
    ("jigsaw", [dict.fromkeys(("toxic", "obscene", "insult", "severe_toxic", "threat", "identity_hate"), 0)], [0]),
    ("civil_toxicity", [{"toxicity": v} for v in (0.0, 0.1, 0.5, 1)], [0, 0, 3, 4]),
    ("safe", [{}], [0]),
    ("source", [{"source": v} for v in ("4chan", "fineweb")], [4, 0]),
]


@pytest.mark.parametrize("scheme, rows, scores", MAPPINGS, ids=[m[0] for m in MAPPINGS])
def test_each_scheme_maps_as_stated(scheme: str, rows: list[dict], scores: list[int]):
    found = LABEL_TABLE[scheme]
    assert [found.score(row, found.label_column) for row in rows] == scores


def test_every_scheme_is_tested_and_says_its_rule():
    assert {scheme for scheme, _, _ in MAPPINGS} == set(LABEL_TABLE)
    assert all(scheme.mapping for scheme in LABEL_TABLE.values())


@pytest.mark.parametrize("scheme", sorted(set(LABEL_TABLE) - {"safe"}))
@pytest.mark.parametrize("label", [None, "", "seven", -1, 6, 0.5, float("nan")])
def test_a_label_out_of_range_is_never_guessed(scheme: str, label):
    found = LABEL_TABLE[scheme]
    if (label == 0.5 and scheme in ("pyrit", "civil_toxicity")) or (label, scheme) == (6, "civil_toxic"):
        return  # in range there
    row = dict.fromkeys(("toxic", "obscene", "insult", "severe_toxic", "threat", "identity_hate"), 0)
    with pytest.raises(LabelError, match="column"):
        found.score(row | {found.label_column: label}, found.label_column)


@pytest.mark.parametrize(
    "scheme, row, expected",
    [
        ("davidson", {"class": 1, "hate_speech": 1, "offensive_language": 2, "neither": 1}, {0: 0.25, 3: 0.5, 5: 0.25}),
        ("davidson", {"class": 0}, {5: 1.0}),
        ("toxigen", {"toxicity_score": 2.25}, {1: 0.75, 3: 0.25}),
        ("toxigen", {"toxicity_score": 5}, {5: 1.0}),
        ("pyrit", {"human_score_1": 0.5, "human_score_2": 1, "human_score_3": ""}, {3: 0.5, 5: 0.5}),
        ("conv_abuse", {"A_is_abuse.1": "1", "B_is_abuse.-1": "1, 0", "C_is_abuse.-1": 1}, {0: 1 / 3, 3: 2 / 3}),
        ("civil_toxicity", {"toxicity": 0.125}, {0: 0.5, 1: 0.5}),
        ("edos", {"label_category": "2. derogation"}, {4: 1.0}),
    ],
)
def test_raters_who_disagree_give_a_distribution(scheme: str, row: dict, expected: dict[int, float]):
    found = LABEL_TABLE[scheme].distribution(row)
    np.testing.assert_allclose(found, [expected.get(score, 0.0) for score in range(6)], atol=1e-9)


@pytest.mark.parametrize(
    "scheme, row, expected",
    [
        ("openai_moderation", {"S": 0, "S3": None, "H2": 1, "V": None}, {"sexual": 0, "hate": 1, "violence": 1}),
        ("pyrit", {"harm_category": "SEXUAL_CONTENT", "human_score": 1}, {"sexual": 1}),
        ("pyrit", {"harm_category": "privacy", "human_score": 1}, {}),
        ("edos", {"label_category": "none"}, {"violence": 0}),
        ("edos", {"label_category": "1. threats, plans to harm and incitement"}, {"hate": 1, "violence": 1}),
        ("toxigen", {"toxicity_score": 2.25}, {"hate": 0.25}),
        ("davidson", {"class": 1, "hate_speech": 1, "offensive_language": 3, "neither": ""}, {"hate": 0.25}),
        ("conv_abuse", {"A_is_abuse.-2": "1", "A_sex_harassment": "1, 0"}, {"harassment": 1, "sexual": 0.5}),
        ("civil_toxic", {"n_raters": 3}, {}),
        ("safe", {}, dict.fromkeys(harm_kinds.KINDS, 0)),
    ],
)
def test_a_set_says_what_it_knows_of_kinds_and_no_more(scheme: str, row: dict, expected: dict[str, float]):
    found = LABEL_TABLE[scheme]
    assert found.kinds(row, found.distribution(row)) == pytest.approx(expected)


@pytest.mark.parametrize(
    "scheme, row, message",
    [
        ("conv_abuse", {"A1_is_abuse.-4": "1"}, r"column 'A1_is_abuse.-4': '1' is not a mark"),
        ("conv_abuse", {"A1_is_abuse.-1": "2"}, r"'2' is not a mark of 0 or 1"),
        ("davidson", {"class": 1, "hate_speech": -1}, r"column 'hate_speech': -1 is outside 0 to 1000"),
        ("toxic_spans", {"spans": "[1,x]"}, r"'\[1,x\]' is not a list of positions"),
        ("toxic_spans", {"spans": "what SECRET said"}, r"column 'spans': a text of 16 characters is not a list"),
        ("conv_abuse", {"A1_is_abuse.-1": "what SECRET said"}, r"a text of 16 characters is not a mark of 0 or 1"),
        ("edos", {"label_category": "what SECRET said"}, r"a text of 16 characters is none of none, 4\. prejudiced"),
        ("harm_score", {"harm_score": "SECRET" * 10}, r"column 'harm_score': a text of 60 characters is not a number"),
    ],
)
def test_bad_votes_are_named(scheme: str, row: dict, message: str):
    found = LABEL_TABLE[scheme]
    with pytest.raises(LabelError, match=message):
        found.score(row, found.label_column)
        found.distribution(row)


def example(text: str, score: int, source: str = "a:x", **changes) -> examples.Example:
    return examples.Example(text, score, changes.pop("group", examples.near_key(text)), source, **changes)


def test_near_duplicates_are_one_group_and_their_part_never_changes(tmp_path: Path):
    rows = [{"text": t, "harm_score": 0} for t in ("RT @one: The day, 7 http://a.b/c", "the DAY! @two", "another day")]
    first, second, third = examples.read(f"harm_score:{write(tmp_path, '.jsonl', rows)}")
    assert first.group == second.group != third.group
    elsewhere = examples.read(f"harm_score:{write(tmp_path, '.csv', rows)}")
    assert [e.group for e in elsewhere] == [e.group for e in (first, second, third)]
    shares = [sum(examples.part_of(str(i)) == part for i in range(3000)) / 3000 for part in examples.PARTS]
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.02)
    assert [examples.part_of(str(i)) for i in range(12)] == [
        "train",
        "test",
        *["train"] * 5,
        *["dev"] * 3,
        *["train"] * 2,
    ]


def test_a_text_of_two_sources_keeps_the_higher_score_and_what_both_know_of_kinds():
    same = "one text of two sources"
    votes = (0.0, 0.0, 0.0, 0.5, 0.5, 0.0)
    found = examples.without_duplicates(
        [
            example(same, 0, kinds={"hate": 0.0}, group="g"),
            example(same.upper(), 3, "b:y", votes=votes, kinds={"sexual": 1.0}, group="h"),
            example("other words in h", 0, "b:y", group="h"),
        ]
    )
    assert [(e.score, e.votes, e.kinds, e.source) for e in found[:1]] == [
        (3, votes, {"hate": 0.0, "sexual": 1.0}, "a:x")
    ]
    assert found[0].group == found[1].group


def test_greetings_do_not_make_one_group_of_all_threads():
    threads = [example(text, 0, group=g) for g in ("g", "h") for text in ("Hi there", f"what {g} says at length")]
    found = examples.without_duplicates(threads)
    assert [e.group for e in found] == ["g", "g", "h"]


def test_a_balanced_source_counts_the_same_on_both_sides():
    texts = [example(f"text {'a' * i}", 4 * (i < 2)) for i in range(10)]
    texts += [example(f"page {'b' * i}", 0, "safe:y") for i in range(20)]
    weights = balance.Balance(power=0.0).weights(texts)
    sides = [weights[:2].sum(), weights[2:10].sum(), weights[10:].sum()]
    np.testing.assert_allclose(sides, [10.0] * 3)
    np.testing.assert_allclose(balance.Balance().weights(texts), 1.0)
    kept = balance.Balance(cap=5, caps=("safe:3",)).chosen(texts)
    assert [sum(e.source == s for e in kept) for s in ("a:x", "safe:y")] == [2 + 5, 3]
    assert balance.Balance(cap=5, caps=("safe:3",)).chosen(list(reversed(texts))) == list(reversed(kept))
    for bad in ({"cap": 0}, {"power": 2.0}, {"caps": ("safe",)}):
        with pytest.raises(ValueError, match="balance"):
            balance.Balance(**bad)


def write(folder: Path, suffix: str, rows: list[dict]) -> str:
    path = folder / f"rows{suffix}"
    if suffix.startswith(".csv"):
        with (gzip.open if suffix.endswith(".gz") else open)(path, "wt", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet", ".csv", ".csv.gz", ".json"])
def test_files_of_every_format_and_columns_of_any_name(tmp_path: Path, suffix: str):
    path = write(tmp_path, suffix, [{"body": "one", "level": 0}, {"body": "two", "level": 5}])
    found = examples.read(f"harm_score:{path}#body,level")
    assert [(e.text, e.score) for e in found] == [("one", 0), ("two", 5)]
    assert found[0].group != found[1].group


def test_rows_of_a_named_group_stay_together(tmp_path: Path):
    rows = [{"text": t, "harm_score": 0, "group": g} for t, g in (("a", "x"), ("b", "x"), ("c", "y"))]
    first, second, third = examples.read(f"harm_score:{write(tmp_path, '.jsonl', rows)}")
    assert first.group == second.group != third.group


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("label, message", [("", "no label"), (7, "outside 0 to 5"), ("bad", "not a number")])
def test_a_bad_label_names_file_row_and_value(tmp_path: Path, suffix: str, label, message: str):
    path = write(tmp_path, suffix, [{"text": "fine", "harm_score": 0}, {"text": "SECRET", "harm_score": label}])
    with pytest.raises(ValueError) as caught:
        examples.read(f"harm_score:{path}")
    said = str(caught.value)
    assert path in said and "row 2" in said and message in said and (str(label) in said) and "SECRET" not in said


@pytest.mark.parametrize("scheme", ["harm_score", "pyrit"])
def test_a_table_of_uneven_rows_is_refused_without_its_text(tmp_path: Path, scheme: str):
    path = tmp_path / "rows.csv"
    for body, message in (
        ("fine,0\nit began, and SECRET went on,5\n", "row 2 has more or fewer fields than the header"),
        ("fine,0\nSECRET\n", "row 2 has more or fewer fields than the header"),
        ('fine,0\n"SECRET"s,5\n', "not CSV"),
    ):
        path.write_text(f"text,harm_score\n{body}")
        with pytest.raises(ValueError, match=rf"rows\.csv: {message}") as caught:
            examples.read(f"{scheme}:{path}#text,harm_score")
        assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    "source, message",
    [
        ("nonsense:x.jsonl", "'nonsense' is none of harm_score, pyrit"),
        ("davidson", "expected davidson:PATH"),
        ("harm_score:/nowhere.csv", "/nowhere.csv: no such file"),
        ("harm_score:/nowhere.jsonl", "/nowhere.jsonl"),
        ("synthetic_web:none", "'none' is not a number of documents"),
        ("openai_moderation:x.csv#text,label", "can't be renamed"),
    ],
)
def test_a_bad_source_is_one_clear_error(source: str, message: str):
    with pytest.raises((ValueError, OSError), match=message):
        examples.read(source)


def test_a_file_without_the_columns_says_which_it_has(tmp_path: Path):
    path = write(tmp_path, ".csv", [{"body": "one", "level": 0}])
    with pytest.raises(ValueError, match=r"missing column 'text'; it has body, level"):
        examples.read(f"harm_score:{path}")
    with pytest.raises(ValueError, match=r"missing column 'harm_score'; it has body, level"):
        examples.read(f"harm_score:{path}#body")


# --- configs and the command


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_a_recipe(path: Path):
    changes = [] if path.stem == "classifier_default" else ["backbone.source=folder"]
    recipe = recipe_config.recipe(train_classifier.read_config(str(path), changes))
    large = path.stem == "classifier_gte_large"
    assert recipe.head.harm_weight == (100.0 if large else 1.0)
    if path.stem.startswith("classifier_gte"):
        tuning = (recipe.tuning.epochs, recipe.tuning.learning_rate, recipe.tuning.batch_tokens)
        assert tuning == ((5, 1e-6, 4096) if large else (50, 1e-5, 4096))
        assert recipe.tuning.last_n is None and (recipe.head.epochs, recipe.head.batch_size) == (1, 32)
    else:
        assert recipe.tuning.last_n == (2 if path.stem == "classifier_union" else 0)


def test_config_fields_are_changed_by_flags_and_bad_ones_refused():
    path = str(ROOT / "configs" / "classifier_default.py")
    config = train_classifier.read_config(path, ["backbone.layer=9", "harm_weight=3", "head.l2=0.5", "tuning.last_n=2"])
    assert (config.backbone.layer, config.harm_weight, config.head.l2, config.tuning.last_n) == ((9,), 3.0, (0.5,), 2)
    for change in ("nonsense=1", "head.epochs=many", "head.nonsense=1"):
        with pytest.raises(cli.UserError, match=f"--config.{change}"):
            train_classifier.read_config(path, [change])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config=nowhere.py"], "nowhere.py"),
        (["--config=configs/classifier_gte_base.py", "--data=synthetic_web"], "backbone.source is not set"),
        (["--config=configs/classifier_default.py", "--data=nonsense"], "'nonsense' is none of"),
        (["--config=configs/classifier_default.py", "--target_recall=1.5"], "--target_recall=1.5"),
    ],
)
def test_bad_flags_end_in_one_line(flags: list[str], message: str, capsys, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as caught:
        cli.run(train_classifier.main, train_classifier.arguments(), [*flags, f"--output={tmp_path}/c"])
    assert caught.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in line and line.startswith("python -m safelm.train_classifier: ")


# --- embeddings on disk


class CountingEmbedder(Embedder):
    """Stands for an `Embedder`: two chunks for texts of more than three letters."""

    backbone = types.SimpleNamespace(fingerprint="f" * 64, dim=2)

    def __init__(self):
        self.texts: list[str] = []

    def embed(self, texts):
        self.texts += texts
        text_C = np.asarray([i for i, t in enumerate(texts) for _ in range(1 + (len(t) > 3))], np.int32)
        return np.asarray([[len(texts[i]), k] for k, i in enumerate(text_C)], np.float32), text_C


def test_embeddings_are_computed_once_and_survive_an_interruption(tmp_path: Path):
    first = CountingEmbedder()
    CachedEmbedder(first, str(tmp_path)).embed(["a", "long text"])
    (tmp_path / ("f" * 24) / "half.partial").write_bytes(b"half")
    (tmp_path / ("f" * 24) / ".writing-abc.npz").write_bytes(b"half")
    second = CountingEmbedder()
    x, text = CachedEmbedder(second, str(tmp_path)).embed(["long text", "new", "a", "new"])
    assert sorted(first.texts) == ["a", "long text"] and second.texts == ["new"]
    assert text.tolist() == [0, 0, 1, 2, 3] and x[:, 0].tolist() == [9, 9, 3, 1, 3]
