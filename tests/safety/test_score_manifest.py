"""The manifest of a scored corpus is written, and its folder can be read, whatever kind of scorer gave the scores."""

import dataclasses
import json
from types import MappingProxyType

import embedding_folders
import numpy as np
import pytest
import random_decoders
import scoring_runs
from annotation_runs import annotate
from document_files import write_rows
from openai_stub import Reply, serve, without_keys_or_pauses

from safelm import documents
from safelm.checkpoints import checkpoint as decoder_checkpoint
from safelm.safety.classifier import calibration, checkpoint
from safelm.safety.embedding.backbone import load_backbone
from safelm.safety.judge.answer import OPENING
from safelm.safety.judge.rubric import load_rubric
from safelm.safety.scorer import Verdict
from safelm.safety.scoring.scorers import describe, parse_specs
from safelm.text.tokenizer import Tokenizer

LEXICON = "python:safelm.safety.lexicon_scorer:LexiconScorer"
OWN = "python:test_score_manifest:Own"


@dataclasses.dataclass(frozen=True)
class OwnSettings:
    """Settings that are no mapping."""

    strict: bool = True


class Own:
    """A user's scorer with attributes of its own that have names like ours."""

    name, fingerprint, settings, measured = "own", "own-1", OwnSettings(), True

    def score(self, texts):
        """3 for every text."""
        return [Verdict(3) for _ in texts]


def judge(folder):
    rubric = load_rubric()
    tokenizer = Tokenizer.train([rubric.system, rubric.before, rubric.after, OPENING] * 3, 900)
    config, params = random_decoders.wild_model(tokenizer.vocab_size, max_seq_len=1024)
    decoder_checkpoint.save_params(str(folder), config, params, tokenizer)
    return f"judge:{folder}?reason_tokens=0"


def classifier(folder):
    embedding_folders.write(folder / "backbone", pooling="mean_tokens")
    backbone = load_backbone(str(folder / "backbone"), max_tokens=16)
    head, values = {"kernel": np.zeros((backbone.dim, 6)), "bias": np.zeros(6)}, {1: 0.5, 3: 0.5}
    training = {"measured": {"auroc": 0.9}}
    checkpoint.save(str(folder / "c"), backbone, head, calibration.Calibration(values, values, values), training)
    return f"classifier:{folder}/c"


@pytest.mark.parametrize("kind", ["endpoint", "judge", "classifier", "lexicon", "bundled", "python"])
def test_the_manifest_is_written_and_read_with_every_kind_of_scorer(tmp_path, monkeypatch, kind):
    without_keys_or_pauses(monkeypatch)
    write_rows(tmp_path / "web.jsonl", scoring_runs.make_rows(6))
    with serve(lambda *_: Reply()) as stub:
        spec = {
            "endpoint": lambda: f"endpoint:{stub.url}#m?retries=0",
            "judge": lambda: judge(tmp_path / "judge"),
            "classifier": lambda: classifier(tmp_path),
            "lexicon": lambda: LEXICON,
            "bundled": lambda: "bundled",
            "python": lambda: OWN,
        }[kind]()
        whole = scoring_runs.run(tmp_path / "whole", tmp_path / "web.jsonl", scorers=spec)
        beside = annotate(tmp_path / "beside", tmp_path / "web.jsonl", scorers=spec)
    (scorer,) = whole["scorers"]
    assert beside["scorers"] == [scorer] and scorer["spec"] == spec
    kept = {"endpoint": {"chunk_chars", "rubric_sha256"}, "judge": {"chunk_tokens"}}
    assert set(scorer.get("settings", {})) >= kept.get(kind, set())
    assert (scorer["measured"] == {}) == (kind not in ("classifier", "bundled"))
    assert len([row for file in documents.find(str(tmp_path / "whole")) for row in documents.read_rows(file.path)]) == 6


def test_what_a_scorer_says_of_itself_is_kept_as_json_holds_it():
    scorer, circle = Own(), []
    circle.append(circle)
    of = {("a", 1): 2, "b": OwnSettings()}
    scorer.measured = MappingProxyType({"auroc": np.float32(0.5), 3: np.arange(2), "of": of})
    scorer.manifest_settings = {"self": circle}
    (found,) = describe(parse_specs(OWN), [scorer])
    assert found.measured == {"auroc": 0.5, "3": [0, 1], "of": {"b": "OwnSettings(strict=True)"}}
    assert json.loads(json.dumps(found.settings)) == {"self": "[[...]]"}
