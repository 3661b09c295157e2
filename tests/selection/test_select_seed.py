"""Orders that are drawn have their seed in the manifest."""

import json

from document_files import write_rows
from selection_runs import corpus, ids, run
from synthesis_runs import rows_of
from synthesis_runs import run as synthesize

from safelm import score
from safelm.train.resume import FIXED_FIELDS


def test_a_shuffle_without_seed(tmp_path):
    """Selection, estimate and rewriting give theirs, and another one gives another draw; a training run guards its."""
    write_rows(tmp_path / "web.jsonl", corpus(80))
    drawn = {}
    for seed in (0, 7):
        manifest = run(tmp_path / f"selected{seed}", tmp_path / "web.jsonl", token_budget=300, seed=seed)
        assert manifest["settings"]["seed"] == seed
        drawn[seed] = ids(tmp_path / f"selected{seed}")
        argv = [f"--input={tmp_path}/web.jsonl", f"--output={tmp_path}/estimate{seed}", f"--seed={seed}"]
        score.main(score.arguments().parse_args([*argv, "--estimate=20"]))
        assert json.loads((tmp_path / f"estimate{seed}/estimate.json").read_text())["sample"]["seed"] == seed
    assert drawn[0] != drawn[7]
    write_rows(tmp_path / "harmful.jsonl", rows_of((3,), 2))
    assert synthesize(tmp_path / "made", tmp_path / "harmful.jsonl", "--seed=5")["settings"]["seed"] == 5
    assert "seed" in FIXED_FIELDS
