"""The benchmarks of the training step and of scoring: their tables' form, and why a rival was left out."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts/bench/train.py"), "--threads=1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_our_side_gives_a_table_and_an_absent_rival_says_why():
    done = bench("--shapes=smoke", "--rounds=2", "--only=litgpt", "--rivals_python=/no/python")
    assert done.returncode == 0, done.stderr
    assert "litgpt skipped: no /no/python: scripts/bench/rivals.sh" in done.stdout
    assert re.search(
        r"^smoke: 26,784 parameters, 2 x 16, float32, cpu, 1 threads, losses 5\.\d+ to ", done.stdout, re.M
    )
    assert re.search(r"^safelm +\d+\.\d +\d+\.\d +\d+\.\d +\d+ +-  1\.00 \(1\.00 to 1\.00\)$", done.stdout, re.M)
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["shape"] == "smoke" and len(record["sides"]["safelm"]["ms"]) == 4
    assert len(record["sides"]["safelm"]["losses"]) == 3


def test_settings_for_gpus_parse_and_a_wrong_shape_is_named():
    done = bench("--device=gpu", "--shapes=135m,7b")
    assert done.returncode == 2
    assert "--shapes=135m,7b: 7b is not one of 135m, 360m, 1b7" in done.stderr


def test_the_score_benchmark_times_every_way():
    flags = ["--scorer=python:score:Free", "--documents=40", "--rounds=1", "--workers=1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/bench/score.py"), *flags],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "\n40 documents, " in f"\n{done.stdout}" and "| plain loop, written | " in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("| safelm.score, ")]
    assert len(rows) == 2 and all(float(row.split("|")[2].replace(",", "")) > 0 for row in rows)


@pytest.mark.slow
def test_the_benchmark_of_the_bundled_classifier_has_a_row_a_side(tmp_path):
    pages = tmp_path / "pages.jsonl"
    pages.write_text("\n".join(json.dumps({"text": f"The meadow and the river, page {i}."}) for i in range(20)))
    command = [sys.executable, str(ROOT / "scripts/bench/bundled.py"), f"--pages={pages}", "--rounds=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "20 pages, " in done.stdout and re.search(
        r"^\| bundled \| [\d,]+ \| 1\.0 \[1\.0, 1\.0\] \|$", done.stdout, re.M
    )
    assert re.search(r"^\| TF-IDF, words and pairs, logistic regression \| [\d,]+ \|", done.stdout, re.M)
