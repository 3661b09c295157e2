"""Token-level classifiers: trained on spans, used as annotators and monitors; what doesn't fit is named."""

import dataclasses
import hashlib
import json
import tracemalloc

import embedding_folders
import jax
import numpy as np
import pyarrow.parquet
import pytest
import random_decoders
from safetensors import numpy as safetensors

import safelm
from safelm import annotate, generate, train_classifier
from safelm.checkpoints import checkpoint
from safelm.documents import annotations, spans
from safelm.formats import decoder_tensors
from safelm.inference.monitors import levels
from safelm.safety.model_fingerprint import model_fingerprint
from safelm.safety.monitors import annotator, fitting, load_monitor, read_head, save_head, token_training
from safelm.text.prompting import text_prompt
from safelm.text.token_offsets import encode_with_offsets
from safelm.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")
PLAIN = "a b the cat sat on mat and dog did not rain fall log".split()
WORDS = {"model": (PLAIN, ["zork", "vult"]), "encoder": (embedding_folders.WORDS[:12], embedding_folders.WORDS[20:22])}
VOCABULARY = Tokenizer.train([" ".join([word, *PLAIN, "zork", "vult"]) for word in PLAIN for _ in range(5)], 400)


def document(rng, name):
    """A text and a span for each of its words: 5 for risky ones, else 1."""
    plain, risky = WORDS[name]
    words = [str(rng.choice(risky if rng.random() < 0.2 else plain)) for _ in range(12)]
    text, found = " ".join(words), []
    for place, word in enumerate(words):
        start = len(" ".join(words[:place])) + (place > 0)
        found.append(spans.Span(start, start + len(word), "word", "5" if word in risky else "1"))
    return text, found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A corpus with spans of its own, a decoder, an encoder, and a classifier of each."""
    folder, rng = tmp_path_factory.mktemp("tokens"), np.random.default_rng(0)
    config, params = random_decoders.wild_model(VOCABULARY.vocab_size, 64)
    checkpoint.save_params(str(folder / "model"), config, params, VOCABULARY)
    embedding_folders.write(folder / "encoder", **embedding_folders.BERT, hidden_size=64)
    for name in WORDS:
        rows = [document(rng, name) for _ in range(150)]
        lines = [{"text": text, "spans": [span.as_row() for span in of]} for text, of in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        argv = [f"--backbone={folder / name}", f"--data={folder / name}.jsonl", f"--output={folder / name}_head"]
        argv += ["--unit=token", "--layers=0,1,2"]
        train_classifier.main(train_classifier.arguments().parse_args(argv))
    return folder


def test_the_layer_is_chosen_on_development_documents_and_measured_on_others(place):
    head = read_head(str(place / "model_head"))
    found = head.training["development_auroc"]
    assert found[str(head.layer)] == max(found.values()) and set(found) == {"0", "1", "2"}
    assert head.training["measured"]["auroc"]["value"] > 0.99
    assert sum(head.training["documents"].values()) == 150 and head.kind == "token" and not head.is_encoder
    assert head.training["vocab_hash"] == VOCABULARY.hash


def test_rows_that_are_not_learned_from_are_counted_and_bounded(tmp_path):
    def line(number, *labels):
        found = [spans.Span(0, 1, "word", label).as_row() for label in labels]
        return json.dumps({"text": f"text {number}", "spans": found}) + "\n"

    lines = [line(number, "1") for number in range(60)]
    again = [line(number, "1") for number in range(30)] + [line(number, "5") for number in range(30, 60)]
    for name, some in (("a", [*lines, "{\n", '{"text": 3}\n']), ("b", again)):
        (tmp_path / f"{name}.jsonl").write_text("".join(some))
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    found, rows = token_training.read_labelled(files, [], token_training.TokenRecipe())
    assert len(found) == 60 and rows == {"read": 122, "malformed": 2, "other_spans": 30}
    assert all(each.spans[0].label == "1" for each in found), "the first"
    few, of_few = token_training.read_labelled(files, [], token_training.TokenRecipe(max_documents=20))
    assert few == found[:20] and of_few["other_spans"] == sum(int(each.text[5:]) >= 30 for each in few)
    (tmp_path / "b.jsonl").write_text("".join([*lines, *["{\n"] * 101]))
    with pytest.raises(ValueError, match=r"b.jsonl: 101 of 161 rows are malformed.*not JSON"):
        token_training.read_labelled(files, [], token_training.TokenRecipe())


def test_memory_of_reading_is_that_of_the_documents_taken(tmp_path):
    def peak(count):
        lines = (json.dumps({"text": f"text {number}", "spans": []}) + "\n" for number in range(count))
        (tmp_path / "a.jsonl").write_text("".join(lines))
        tracemalloc.start()
        token_training.read_labelled([str(tmp_path / "a.jsonl")], [], token_training.TokenRecipe(max_documents=10))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(100)
    assert peak(20_000) < peak(2_000) + 500_000  # hashes of 18,000 documents take 2 MB


@pytest.mark.parametrize("name", ["model", "encoder"])
def test_it_finds_the_words_again_in_characters_and_tokens(place, tmp_path, name):
    """In texts that it has not seen; words of two tokens or more are whole."""
    rng = np.random.default_rng(1)
    rows = [document(rng, name) for _ in range(20)]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text, _ in rows))
    argv = [f"--token_classifier={place / name}_head", f"--input={tmp_path / 'new.jsonl'}"]
    flags = annotate.arguments().parse_args([*argv, f"--output={tmp_path / 'spans'}"])
    annotate.main(flags)
    table = pyarrow.parquet.read_table(tmp_path / "spans" / "new.parquet")
    facts = json.loads(table.schema.metadata[annotations.METADATA])
    assert facts["vocab_hash"] == annotator.load(f"{place / name}_head").vocab_hash
    wanted, got, inside = 0, 0, 0
    for (text, of), row in zip(rows, table.to_pylist(), strict=True):
        risky = {place for span in of if span.label == "5" for place in range(span.start, span.end)}
        found = spans.parse(row["spans"], text, "row")
        marked = {place for span in found for place in range(span.start, span.end) if not text[place].isspace()}
        wanted, got, inside = wanted + len(risky), got + len(marked), inside + len(risky & marked)
        assert all(span.kind == "token" and span.label == "5" and span.score > 0 for span in found)
        if name == "model" and found:
            ((_, offsets_N2),) = encode_with_offsets(VOCABULARY, [text])
            for span in found:
                assert (offsets_N2[span.token_start, 0], offsets_N2[span.token_end - 1, 1]) == (span.start, span.end)
    assert wanted > 80 and inside > 0.95 * wanted and inside > 0.95 * got


def test_as_a_monitor_it_has_the_levels_by_which_it_annotates(place):
    lm, folder = safelm.load(place / "model"), str(place / "model_head")
    monitor, text = safelm.load_monitor(folder, lm), "a zork b the vult"
    level_T = lm.monitor_levels(text, monitor)
    found = annotator.load(f"{folder}?threshold=0.5").find([text])[0]
    marked = {place for span in found for place in range(span.token_start, span.token_end)}
    assert marked == set(np.flatnonzero(level_T >= 0.5).tolist()) and 0 < len(marked) < len(level_T)
    method, ids = safelm.SafeBeam(num_beams=2, num_candidates=2, monitor=monitor), text_prompt(lm.tokenizer, "a zork")
    completion = lm.complete([ids], method, max_new_tokens=4)[0]
    (whole_T,) = levels(lm.config, lm.params, monitor, [[*ids, *completion.tokens]])
    assert completion.tag_probs[0] == pytest.approx(whole_T[len(ids)], rel=1e-3)


def test_runs_of_tokens_become_spans_and_short_gaps_are_bridged():
    is_in = np.array([0, 1, 1, 0, 1, 0, 0, 1], bool)
    assert list(annotator.stretches(is_in, 0)) == [(1, 3), (4, 5), (7, 8)]
    assert list(annotator.stretches(is_in, 1)) == [(1, 5), (7, 8)]
    assert list(annotator.stretches(np.zeros(3, bool), 1)) == []
    level, truth = np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])
    assert fitting.best_threshold(level, truth) == 0.35 and fitting.area(level, truth) == 0.75
    assert np.isnan(fitting.area(level, np.zeros(4, bool)))
    assert fitting.spread_layers(3) == (1, 2, 3) and len(fitting.spread_layers(30)) == 8


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data=x"], "--backbone is missing"),
        (["--backbone=m", "--data=x", "--config=c.py"], "--config: does not go with --unit=token"),
        (["--backbone=m", "--data=x", "--layers=one"], "--layers=one: want whole numbers"),
        (["--backbone={model}", "--data={web}", "--layers=9"], "layer=9: model has layers 0 to 2"),
        (["--backbone={model}", "--data={web}", "--min_score=6"], "--min_score=6: must be 1 to 5"),
        (["--backbone={model}", "--data={bare}"], "no column 'spans': give --annotations"),
        (["--backbone={model}", "--data={web}", "--kinds=other"], "training tokens: 0 of"),
    ],
    ids=str,
)
def test_bad_flags_and_files_are_named(place, tmp_path, argv, message):
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps({"text": f"a b {i}"}) + "\n" for i in range(20)))
    named = {"model": place / "model", "web": place / "model.jsonl", "bare": tmp_path / "bare.jsonl"}
    given = ["--unit=token", f"--output={tmp_path / 'out'}", *(each.format(**named) for each in argv)]
    with pytest.raises((ValueError, safelm.cli.UserError), match=message.replace("(", r"\(")):
        train_classifier.main(train_classifier.arguments().parse_args(given))
    assert not (tmp_path / "out").exists()


def test_a_head_is_of_one_embedding_too(place, tmp_path):
    lm, head = safelm.load(place / "model"), read_head(str(place / "model_head"))
    tag = lm.tokenizer.harm_tag_id
    table = np.array(lm.params["embedder"]["embedding"])
    table[tag - 1] += 1
    other = dataclasses.replace(lm, params={**lm.params, "embedder": {"embedding": table}})
    with pytest.raises(ValueError, match="trained on another model"):
        load_monitor(str(place / "model_head"), other)
    _, added = decoder_tensors.resize_vocabulary(
        lm.config, jax.tree.map(np.asarray, lm.params), lm.config.vocab_size + 200, num_trained=tag
    )
    assert head.reads(added, lm.tokenizer.hash, tag), "a tag's row that was added when the model was read"
    blocks = model_fingerprint(
        None, {"layers": jax.tree.map(np.asarray, lm.params["layers"])}, VOCABULARY.hash, settings={}
    )
    save_head(str(tmp_path / "before"), dataclasses.replace(head, fingerprint=blocks))
    monitor = load_monitor(str(tmp_path / "before"), lm)
    assert monitor.layer == head.layer, "heads of before, which name blocks and vocabulary, still load"
    encoder = annotator.load(f"{place / 'encoder_head'}")
    params = {
        **encoder.backbone.params,
        "embeddings": jax.tree.map(lambda a: a + 1, encoder.backbone.params["embeddings"]),
    }
    assert not encoder.head.reads(params, encoder.vocab_hash, None)


def test_a_folder_that_is_not_this_model_s_or_damaged_is_refused(place, tmp_path):
    lm, head = safelm.load(place / "model"), read_head(str(place / "model_head"))
    with pytest.raises(ValueError, match="reads the encoder"):
        load_monitor(str(place / "encoder_head"), lm)
    save_head(str(tmp_path / "other"), dataclasses.replace(head, fingerprint="0" * 64))
    with pytest.raises(ValueError, match="trained on another model"):
        load_monitor(str(tmp_path / "other"), lm)
    with pytest.raises(ValueError, match="trained on another model"):
        annotator.load(str(tmp_path / "other"))
    save_head(str(tmp_path / "probe"), dataclasses.replace(head, kind="probe"))
    with pytest.raises(ValueError, match="a probe, no token-level classifier"):
        annotator.load(str(tmp_path / "probe"))
    with pytest.raises(ValueError, match="threshold=2: must be a probability"):
        annotator.load(f"{place / 'model_head'}?threshold=2")
    for kernel, bias in (((8, 5), (6,)), ((8, 6), (5,)), ((8, 5), (5,)), ((8, 6, 1), (6,)), ((6,), (6,))):
        data = safetensors.save({"kernel": np.zeros(kernel, np.float32), "bias": np.zeros(bias, np.float32)})
        (tmp_path / "other" / "head.safetensors").write_bytes(data)
        config = json.loads((tmp_path / "other" / "config.json").read_text())
        config["files"]["head.safetensors"] = hashlib.sha256(data).hexdigest()
        (tmp_path / "other" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"no kernel \[D, 6\] and bias \[6\]"):
            read_head(str(tmp_path / "other"))
    (tmp_path / "probe" / "head.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="damaged"):
        load_monitor(str(tmp_path / "probe"), lm)
    with pytest.raises(FileNotFoundError, match="no monitor's folder"):
        load_monitor("nowhere", lm)
    refusal = load_monitor("refusal?every=2", lm)
    assert VOCABULARY.decode(refusal.header_ids) == "<|im_start|>assistant\n" and refusal.every == 2
    assert load_monitor("refusal?header=%0Ab:&words=cat|dog", lm).header_ids == tuple(VOCABULARY.encode("\nb:"))
    for spec, message in (
        ("refusal?words=", "an empty one"),
        ("refusal?x=1", "no option 'x'"),
        ("tag?x=1", "'x' here"),
    ):
        with pytest.raises(ValueError, match=message):
            load_monitor(spec, lm)
    argv = [f"--checkpoint={place / 'model'}", "--prompt=a", "--monitor=tag", "--method=greedy"]
    with pytest.raises(ValueError, match="--method=greedy does not take it"):
        generate.main(generate.arguments().parse_args(argv))
