"""Labels of other schemes as scores 0 to 5, files of labelled texts, bad input, the command."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from safelm import cli, train_classifier
from safelm.safety.classifier import examples, recipe_config
from safelm.safety.classifier.embedding_cache import CachedEmbedder
from safelm.safety.classifier.labels import LABEL_TABLE, LabelError
from safelm.safety.embedding import Embedder

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("classifier_*.py"))

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
    if label == 0.5 and scheme in ("pyrit", "civil_toxicity"):
        return  # in range there
    row = dict.fromkeys(("toxic", "obscene", "insult", "severe_toxic", "threat", "identity_hate"), 0)
    with pytest.raises(LabelError, match="column"):
        found.score(row | {found.label_column: label}, found.label_column)


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
        tuning = (recipe.tuning.epochs, recipe.tuning.learning_rate, recipe.tuning.batch_size)
        assert tuning == ((5, 1e-6, 8) if large else (50, 1e-5, 8))
        assert recipe.tuning.last_n is None and (recipe.head.epochs, recipe.head.batch_size) == (1, 32)
    else:
        assert recipe.tuning.last_n == 0


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

    class backbone:  # noqa: N801
        fingerprint, dim = "f" * 64, 2

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
    second = CountingEmbedder()
    x, text = CachedEmbedder(second, str(tmp_path)).embed(["long text", "new", "a", "new"])
    assert sorted(first.texts) == ["a", "long text"] and second.texts == ["new"]
    assert text.tolist() == [0, 0, 1, 2, 3] and x[:, 0].tolist() == [9, 9, 3, 1, 3]
