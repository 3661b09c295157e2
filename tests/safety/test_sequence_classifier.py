"""Published sequence classifiers as scorers: the released one against a reference, labels, what is refused."""

import json

import embedding_folders
import gte_reference
import numpy as np
import pytest
import safetensors.numpy
import scoring_runs
import sequence_classifiers
from huggingface_hub import constants

import safelm
from safelm import score
from safelm.evaluate import judges
from safelm.evaluate.judges.verdicts import HARMFUL, Exchange
from safelm.safety import sequence_classifier
from safelm.safety.scorer import ThresholdScorer, load_scorer
from safelm.safety.sequence_classifier.labels import LabelTable, label_names, table_for

TEXTS = ["w1 w2 w3", "", "w5 w30", *(" ".join(f"w{(7 * i + k) % 40}" for i in range(100)) for k in range(3))]
RELEASED = "locuslab/safety-classifier_gte-large-en-v1.5"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Folder, config and tensors of a small classifier of the released form."""
    folder = tmp_path_factory.mktemp("released")
    return folder, *sequence_classifiers.write(folder)


def ids_of(text):
    backend = embedding_folders.tokenizer()
    backend.no_truncation()
    backend.no_padding()
    return backend.encode(text, add_special_tokens=False).ids


def expected_logits(released, text, max_length):
    """By the reference, one row a chunk."""
    _, config, tensors = released
    ids, room = ids_of(text), max_length - 2
    chunks = [ids[i : i + room] for i in range(0, max(len(ids), 1), room)]
    return np.stack([gte_reference.logits(config, tensors, [2, *chunk, 3]) for chunk in chunks])


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def test_the_released_form_has_the_logits_of_an_independent_implementation(released):
    scorer = sequence_classifier.load(str(released[0]), max_length=32)
    logits_CL, text_C = scorer.logits(TEXTS)
    for i, text in enumerate(TEXTS):
        wanted = expected_logits(released, text, 32)
        print("largest difference", np.abs(logits_CL[text_C == i] - wanted).max())
        np.testing.assert_allclose(logits_CL[text_C == i], wanted, atol=1e-4)
    assert text_C.tolist() == [0, 1, 2, *[3] * 4, *[4] * 4, *[5] * 4]


@pytest.mark.parametrize("decide", ["argmax", "expected"])
def test_a_text_is_as_harmful_as_its_worst_chunk(released, decide):
    scorer = sequence_classifier.load(str(released[0]), max_length=16, decide=decide)
    numbers = set()
    for text, verdict in zip(TEXTS, scorer.score(TEXTS), strict=True):
        p_C6 = softmax(expected_logits(released, text, 16))
        mean_C = p_C6 @ np.arange(6)
        score_C = p_C6.argmax(1) if decide == "argmax" else np.rint(mean_C)
        worst = max(range(len(p_C6)), key=lambda c: (score_C[c], mean_C[c]))
        assert verdict.score == score_C[worst] and verdict.details["n_chunks"] == len(p_C6)
        found = [verdict.details[f"probability_{i}"] for i in range(6)]
        np.testing.assert_allclose(found, p_C6[worst], atol=1e-5)
        for name, value in (("expected_score", mean_C[worst]), ("unsafe_probability_3", p_C6[worst, 3:].sum())):
            assert verdict.details[name] == pytest.approx(value, abs=1e-4)
        numbers.add(worst)
    assert len(numbers) > 1  # not always the first


def test_without_chunks_a_text_is_cut_off_and_its_neighbours_are_whole(released):
    scorer = sequence_classifier.load(str(released[0]), max_length=16, chunks=False)
    texts = [TEXTS[3], "w9 " * 60_000, "w7 w8", "", TEXTS[4]]
    logits_NL, text_N = scorer.logits(texts)
    assert text_N.tolist() == [0, 1, 2, 3, 4] and "n_chunks" not in scorer.score(["w1"])[0].details
    wanted = [expected_logits(released, " ".join(text.split()[:14]), 16)[0] for text in texts]
    np.testing.assert_allclose(logits_NL, wanted, atol=1e-4)
    whole = sequence_classifier.load(str(released[0]), max_length=16)
    assert whole.fingerprint != scorer.fingerprint


def test_bfloat16_is_near_and_another_scorer(released):
    one, other = (sequence_classifier.load(str(released[0]), dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert 0 < np.abs(one.logits(TEXTS[:3])[0] - other.logits(TEXTS[:3])[0]).max() < 0.3
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint == sequence_classifier.load(str(released[0])).fingerprint


def test_an_answer_that_is_not_finite_is_no_score(tmp_path):
    _, tensors = sequence_classifiers.write(tmp_path)
    tensors["new.embeddings.word_embeddings.weight"][embedding_folders.VOCABULARY["w9"]] = np.nan
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    verdicts = sequence_classifier.load(str(tmp_path)).score(["w1", "w9 w1", "w2"])
    assert [verdict.score is None for verdict in verdicts] == [False, True, False]
    assert np.isnan([verdict.details["unsafe_probability"] for verdict in verdicts]).tolist() == [False, True, False]


def test_labels_with_one_score_are_added():
    table = table_for(("a", "b", "c"), "a:0;b:4;c:4", is_multi_label=False, where="x")
    p_CL = table.probabilities(np.log([[0.4, 0.3, 0.3], [0.7, 0.2, 0.1]]))
    np.testing.assert_allclose(table.by_score(p_CL)[:, [0, 4]], [[0.4, 0.6], [0.7, 0.3]])
    assert not table.has_thresholds and table.to_json() == {"a": 0, "b": 4, "c": 4}


@pytest.mark.parametrize("is_multi_label", [True, False])
def test_thresholds_give_the_largest_score_that_is_reached(tmp_path, is_multi_label):
    (tmp_path / "t.json").write_text('{"clean": 0, "toxic": {"2": 0.3, "4": 0.75}, "threat": {"5": 0.5}}')
    spelled = "clean:0;toxic:2@0.3;toxic:4@0.75;threat:5"
    for given in (spelled, str(tmp_path / "t.json")):
        table = table_for(("clean", "toxic", "threat"), given, is_multi_label=is_multi_label, where="x")
        p_CL = np.array([[0.9, 0.29, 0.1], [0.1, 0.31, 0.49], [0.1, 0.76, 0.4], [0.1, 0.1, 0.5], [0, 0.9, 0.9]])
        assert table.reached(p_CL).tolist() == [0, 2, 4, 5, 5]
        assert table.labels_from(1) == [1, 2] and table.labels_from(5) == [2]
    logits = np.array([[0.0, 1.0, -2.0]])
    wanted = 1 / (1 + np.exp(-logits)) if is_multi_label else softmax(logits)
    np.testing.assert_allclose(table.probabilities(logits), wanted)


def test_names_that_end_in_the_scores_need_no_table_and_others_do():
    backwards = tuple(f"score {i}" for i in range(5, -1, -1))
    table = table_for(backwards, None, is_multi_label=False, where="x")
    assert [levels[0][0] for levels in table.levels] == [5, 4, 3, 2, 1, 0]
    moods = ("sadness", "joy", "love", "anger", "fear", "surprise")
    with pytest.raises(ValueError, match=r"x: its 6 labels \(sadness, .*\?labels=sadness:0;joy:1;\.\.\."):
        table_for(moods, None, is_multi_label=False, where="x")
    with pytest.raises(ValueError, match="independently"):
        table_for(sequence_classifiers.IN_ORDER, None, is_multi_label=True, where="x")
    by_order = table_for(moods, None, is_multi_label=False, published=RELEASED, where="x")
    assert [levels[0][0] for levels in by_order.levels] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a:0", "no score is given for 'b'"),
        ("a:0;b:3;c:1", "it has no label 'c'; it has a, b"),
        ("a:0;b:6", "'b' has score '6': want 0 to 5"),
        ("a:0;b", "'b': want LABEL:SCORE or LABEL:SCORE@PROBABILITY"),
        ("a:0;b:3@1.5", "'b' has probability '1.5'"),
        ("a:0;b:3@", "'b' has probability ''"),
        ("a:0;b:3;b:4", "'b' has two scores and no probability"),
        ("a:0;b:0", "every label has score 0"),
        ("in_order", "labels=in_order: want 6 classes, it has 2 labels"),
        ("nothing.json", "labels=nothing.json: no such file"),
    ],
)
def test_tables_that_do_not_fit_are_one_line(given, message):
    with pytest.raises((ValueError, FileNotFoundError), match=f"^x: .*{message}"):
        table_for(("a", "b"), given, is_multi_label=False, where="x")


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": true, "b": 1}', '{"a": {}, "b": 1}', '{"a": {"1": "x"}, "b": 1}'])
def test_broken_files_of_labels_are_refused(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=r"^x: labels"):
        table_for(("a", "b"), str(tmp_path / "t.json"), is_multi_label=False, where="x")


def test_counts_of_labels_are_checked():
    assert label_names("c", None, 2) == ("LABEL_0", "LABEL_1")
    assert label_names("c", {"1": "b", "0": "a"}, 2) == ("a", "b")
    for wrong in ({"0": "a"}, {"1": "a", "2": "b"}, {"0": "a", "1": "b", "2": "c"}):
        with pytest.raises(ValueError, match=f"id2label has {len(wrong)} labels, the classifier's weights have 2"):
            label_names("c", wrong, 2)
    with pytest.raises(ValueError, match="want an object"):
        label_names("c", ["a", "b"], 2)


@pytest.mark.parametrize("thresholds", [{1: 0.9}, {3: 0.2}, {1: 0.7, 3: 0.4}, {1: 0.0, 3: 1.5}, {1: 1.5, 3: 1.5}])
def test_thresholds_decide_by_the_worst_chunk_s_probabilities(released, thresholds):
    options = "&".join(f"threshold_{level}={value}" for level, value in thresholds.items())
    plain = load_scorer(f"hf:{released[0]}?max_length=32")
    scorer = load_scorer(f"hf:{released[0]}?max_length=32&{options}")
    assert isinstance(scorer, ThresholdScorer) and scorer.fingerprint != plain.fingerprint
    assert scorer.thresholds == {1: None, 3: None} | thresholds
    given = scorer.score(TEXTS)
    for before, after in zip(plain.score(TEXTS), given, strict=True):
        assert before.details == after.details
        reached = {
            level: after.details[name] >= thresholds[level] if level in thresholds else before.score >= level
            for level, name in ((1, "unsafe_probability"), (3, "unsafe_probability_3"))
        }
        among = range(3, 6) if reached[3] else range(1, 3) if reached[1] else [0]
        assert after.score == max(among, key=lambda score: after.details[f"probability_{score}"])


def test_a_bound_on_safe_pages_holds_for_a_published_classifier(released, tmp_path):
    pages = [{"text": " ".join(f"w{(7 * i + k) % 40}" for i in range(3 + k % 60))} for k in range(120)]
    (tmp_path / "pages.jsonl").write_text("\n".join(map(json.dumps, pages)))
    argv = [f"--input={tmp_path}/pages.jsonl", f"--output={tmp_path}/out", f"--scorers=hf:{released[0]}?max_length=32"]
    argv += ["--max_flagged_safe=0.1,0.05", f"--safe_sample={tmp_path}/pages.jsonl", "--workers=1"]
    score.main(score.arguments().parse_args(argv))
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    flagged = sum(manifest["totals"][f"score={level}"] for level in range(1, 6))
    levels = manifest["safe_bound"]["scorers"]["hf"]
    assert flagged <= 12 and levels[">=1"]["threshold_before"] is None and levels[">=1"]["recall"] is None
    assert sum(manifest["totals"][f"score={level}"] for level in (3, 4, 5)) == levels[">=3"]["flagged"] <= 6


def test_a_table_with_thresholds_takes_no_others(tmp_path):
    sequence_classifiers.write(tmp_path)
    labels = ";".join(f"LABEL_{score}:{score}@0.5" for score in range(6))
    with pytest.raises(ValueError, match="its table of labels has thresholds"):
        load_scorer(f"hf:{tmp_path}?labels={labels}&threshold_1=0.5")
    assert not isinstance(load_scorer(f"hf:{tmp_path}?labels={labels}"), ThresholdScorer)


def test_a_multi_label_model_by_its_thresholds(tmp_path):
    names = ["toxic", "severe toxic", "threat"]
    sequence_classifiers.write(tmp_path, names, problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="say which score"):
        sequence_classifier.load(str(tmp_path))
    scorer = safelm.load_scorer(f"hf:{tmp_path}?labels=toxic:2@0.4;severe toxic:5;threat:3&name=toxicity")
    assert scorer.name == "toxicity" and scorer.manifest_settings["rule"] == "thresholds"
    logits_NL, _ = scorer.logits(TEXTS[:3])
    p_NL = 1 / (1 + np.exp(-logits_NL))
    for verdict, p_L in zip(scorer.score(TEXTS[:3]), p_NL, strict=True):
        assert verdict.score == max(2 * (p_L[0] >= 0.4), 5 * (p_L[1] >= 0.5), 3 * (p_L[2] >= 0.5))
        assert verdict.details["probability_severe_toxic"] == pytest.approx(p_L[1], abs=1e-6)
        assert verdict.details["unsafe_probability_3"] == pytest.approx(max(p_L[1:]), abs=1e-6)
    other = safelm.load_scorer(f"hf:{tmp_path}?labels=toxic:2@0.5;severe toxic:5;threat:3")
    assert other.fingerprint != scorer.fingerprint


def test_two_labels_that_would_share_a_column_are_refused(tmp_path):
    names = ["Toxic!", "toxic?", "threat"]
    sequence_classifiers.write(tmp_path, names, problem_type="multi_label_classification")
    with pytest.raises(ValueError, match=r"labels 'Toxic!' and 'toxic\?' would both be the column probability_toxic_:"):
        sequence_classifier.load(str(tmp_path), labels="Toxic!:2;toxic?:5;threat:3")
    sequence_classifiers.write(tmp_path, names)
    assert sequence_classifier.load(str(tmp_path), labels="Toxic!:2;toxic?:5;threat:0").score(["a"])[0].details


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "distilbert"}, r"config.json: model_type = 'distilbert' is no sequence classifier known here"),
        ({"architectures": ["NewModel"]}, r"architectures = \['NewModel'\]: want NewForSequenceClassification"),
        ({"id2label": {"0": "a", "1": "b"}}, "id2label has 2 labels, the classifier's weights have 6"),
        ({"problem_type": "regression"}, "is a regression"),
        ({"pack_qkv": False}, "pack_qkv = False is not supported"),
        ({"hidden_act": "mish"}, "hidden_act = 'mish' is not supported"),
    ],
)
def test_configs_that_cannot_be_represented_are_refused_by_key(tmp_path, changes, message):
    sequence_classifiers.write(tmp_path)
    sequence_classifiers.change_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        sequence_classifier.load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_folders_and_options_that_are_wrong_are_named(tmp_path):
    _, tensors = sequence_classifiers.write(tmp_path)
    for options, message in (
        ({"max_length": 65}, "max_length=65: the model has positions for 64"),
        ({"max_length": 0}, "max_length=0: must be at least 1"),
        ({"dtype": "int8"}, "dtype='int8': one of float32, bfloat16"),
        ({"decide": "median"}, "decide='median': one of argmax, expected"),
        ({"length": 5}, "no option 'length'"),
        ({"chunks": "yes"}, "chunks='yes': expected bool"),
    ):
        with pytest.raises(ValueError, match=message):
            sequence_classifier.load(str(tmp_path), **options)
    by_default = sequence_classifier.load(str(tmp_path))
    assert by_default.manifest_settings["max_length"] == 64  # the model's own limit, below 512
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("new.pooler")}
    safetensors.numpy.save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensor new\.pooler\.dense\.weight is missing"):
        sequence_classifier.load(str(tmp_path))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no safetensors, only pickles \(pytorch_model.bin\)"):
        sequence_classifier.load(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        safelm.load_scorer(f"hf:{tmp_path}/nothing")


def run_refused(output, *inputs, scorers):
    with pytest.raises((ValueError, OSError)) as caught:
        scoring_runs.run(output, *inputs, scorers=scorers)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_command_scores_by_a_model_of_a_hub_and_again_offline(hub, tmp_path, monkeypatch):
    sequence_classifiers.write(tmp_path / "model", ["safe", "minimal", "mild", "moderate", "significant", "severe"])
    (tmp_path / "model" / "modeling.py").write_text("raise SystemExit('code of a hub was run')")
    commit = hub.add(RELEASED, tmp_path / "model", kind="models")
    (tmp_path / "web.jsonl").write_text(
        "".join(json.dumps({"id": str(i), "text": t}) + "\n" for i, t in enumerate(TEXTS))
    )
    spec = f"hf:{RELEASED}?max_length=32"
    manifest = scoring_runs.run(tmp_path / "out", tmp_path / "web.jsonl", scorers=spec)
    (scorer,) = manifest["scorers"]
    assert scorer["spec"] == f"hf:{RELEASED}@{commit}?max_length=32" and "modeling.py" not in hub.downloads()
    settings = scorer["settings"]
    assert (settings["repository"], settings["commit"], settings["max_length"]) == (RELEASED, commit, 32)
    assert settings["id2label"]["5"] == "severe" and settings["labels"]["severe"] == 5 and settings["chunks"] is True
    assert manifest["columns"]["hf_probability_5"] == "float64" and manifest["totals"]["rows"] == len(TEXTS)
    loaded = sequence_classifier.load(f"hf:{RELEASED}", max_length=32)
    wanted = {str(i): verdict.score for i, verdict in enumerate(loaded.score(TEXTS)) if TEXTS[i]}
    rows = [row for folder in scoring_runs.FOLDERS for row in scoring_runs.rows_of(tmp_path / "out", folder)]
    assert {row["id"]: row["harm_score"] for row in rows if row["text"]} == wanted

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    offline = scoring_runs.run(tmp_path / "offline", tmp_path / "web.jsonl", scorers=f"released={spec}")
    assert offline["scorers"][0]["fingerprint"] == scorer["fingerprint"] and not hub.asked
    assert offline["columns"]["score_released"] == "int64"
    message = run_refused(tmp_path / "no", tmp_path / "web.jsonl", scorers="hf:someone/else")
    assert message.startswith("hf:someone/else: not in the cache")


def test_a_folder_of_this_machine_and_its_move(hub, tmp_path, monkeypatch):
    sequence_classifiers.write(tmp_path / "model")
    (tmp_path / "web.jsonl").write_text('{"text": "w1 w2"}\n')
    monkeypatch.chdir(tmp_path)
    first = scoring_runs.run(tmp_path / "out", tmp_path / "web.jsonl", scorers="hf:./model")
    (tmp_path / "model").rename(tmp_path / "moved")
    second = scoring_runs.run(tmp_path / "out", tmp_path / "web.jsonl", scorers=f"hf:{tmp_path / 'moved'}")
    assert second["scorers"][0]["fingerprint"] == first["scorers"][0]["fingerprint"] and not hub.asked
    message = run_refused(tmp_path / "no", tmp_path / "web.jsonl", scorers="hf:./model?labels=LABEL_0:0")
    assert "no such folder" in message
    assert (
        score.arguments().parse_args([f"--input={tmp_path}", "--output=x", "--scorers=hf:./moved"]).scorers
        == "hf:./moved"
    )


def test_it_judges_answers_too(released):
    judge = judges.load_judge(f"hf:{released[0]}?chunks=false&max_length=32&labels=in_order&threshold=4")
    answers = ["w1 w2 w3", "w5 w30", TEXTS[4]]
    scores = [v.score for v in sequence_classifier.load(str(released[0]), max_length=32, chunks=False).score(answers)]
    exchanges = [Exchange("q", answer, asks_harm=True) for answer in answers]
    assert [verdict == HARMFUL for verdict in judge.judge(exchanges)] == [score >= 4 for score in scores]


def test_a_table_keeps_its_labels_in_the_order_of_the_logits():
    table = LabelTable(("a", "b"), (((0, None),), ((5, None),)), is_multi_label=False)
    p_CL = table.probabilities(np.array([[0.0, 100.0], [1e4, -1e4]]))
    np.testing.assert_allclose(p_CL, [[0, 1], [1, 0]], atol=1e-12)
