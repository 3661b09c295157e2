"""README and docs/: sizes, links, named files; and the newcomer's path, run command by command as it stands.

What is run: every bash block of the pages in RUN, in order, in one checkout-like folder, through the shell's expansions
and then as `python -m` would run it (in forks of one process, which saves the imports). A tiny run stands where the
quickstart's would: it is made by docs/training.md's own pipeline block. SHORTER has every change to a command, sizes
only; HEAVY every block that is not run, with the reason. What else docs show is checked in test_help.py.
"""

import os
import re
import runpy
from pathlib import Path

import documented
import forked_commands
import pytest

ROOT = documented.ROOT
ALL_PAGES = (*documented.PAGES, "CHANGELOG.md", "CONTRIBUTING.md")
RUN = ("docs/training.md", "README.md", "docs/tutorial.md")
SHORTER = (  # added to the commands that begin so: documents, vocabulary, steps, prompts, tokens
    ("safelm synthetic_web", ("--documents=240", "--validation_documents=60", "--prompts=2")),
    (
        "safelm train --config=configs/quickstart.py:safety",
        (
            "--config.total_steps=2",
            "--config.batch_size=2",
            "--config.seq_len=64",
            "--config.optimizer.warmup_steps=1",
            "--config.model.num_layers=1",
            "--config.model.d_model=16",
            "--config.model.d_ff=32",
            "--config.model.head_dim=8",
            "--config.eval.batches=1",
        ),
    ),
    ("safelm cache_tasks", ("--validation_fraction=0.2",)),
    ("safelm evaluate", ("--max_prompts=1", "--max_new_tokens=4")),
    ("safelm generate", ("--max_new_tokens=4",)),
)
HEAVY = (  # by what the block holds
    ("scripts/quickstart.sh", "minutes; test_quickstart.py runs the script with a stand-in for Python"),
    ("scripts/install.sh", "installs 3 GB; test_requirements.py looks at what it asks of pip"),
    ("safelm serve", "runs until it is stopped; tests of the server start it"),
    ("--chats=8000", "minutes; test_post_training.py runs the stages"),
    ("scripts/ladder.sh", "an hour; test_ladder.py runs all of it in small"),
    ("scripts/bench/gpu.sh", "installs PyTorch; test_bench_gpu.py runs its parts in small"),
    ("ladder.py:toxicity", "hours; test_toxicity.py runs it in small"),
    ("safelm ladder --study=", "hours; test_scaling.py runs its parts in small"),
    ("--planned_seeds", "needs an hour's study; test_ladder.py plans with a made-up one"),
)


def _is_heavy(block: str) -> bool:
    return any(mark in block for mark, _ in HEAVY)


def _shortened(command: list[str]) -> list[str]:
    """`python -m` for the console command, with what SHORTER adds."""
    words = " ".join(command)
    extra = [flag for start, flags in SHORTER if words.startswith(start) for flag in flags]
    if command[0] == "safelm":
        return [f"safelm.{command[1].replace('-', '_')}", *command[2:], *extra]
    assert command[:2] == ["python", "-m"], words
    return [*command[2:], *extra]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder with the checkout's files, where `runs/` is new."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "data_tasks", "safelm", "scripts", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "runs").mkdir()
    (folder / "runs" / "quickstart").symlink_to("mine")  # what docs/training.md makes
    (folder / "runs" / "mine").mkdir()
    (folder / "runs" / "mine" / "raw").symlink_to("safety")
    return folder


def test_the_newcomers_path_runs_as_it_stands(checkout):
    commands = [
        command
        for page in RUN
        for block in documented.blocks(page)
        if not _is_heavy(block)
        for command in documented.expand(block, cwd=checkout)
        if command[0] != "source" and command[:2] != ["safelm", "--help"]
    ]
    done = forked_commands.run_all(
        [_shortened(command) for command in commands],
        imports=(
            "tensorflow",
            "seqio",
            "apache_beam",
            "jax",
            "optax",
            "orbax.checkpoint",
            "matplotlib.figure",
            "data_tasks.tasks",
            "safelm.inference.engine",
            "safelm.train.program",
        ),
        cwd=checkout,
        stops=True,
        XLA_FLAGS=os.environ["SAFELM_TESTS_XLA"],  # one device
        JAX_COMPILATION_CACHE_DIR=os.environ["SAFELM_TESTS_COMPILED"],
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    )
    for each in done:
        print(f"{each.seconds:6.2f} s of processor  {documented.spelled(list(each.command))}")
    last = done[-1]
    assert last.code == 0, f"{documented.spelled(commands[len(done) - 1])}\n{last.output[-3000:]}"
    assert len(done) == len(commands)
    for made in ("card/card.html", "corpus/safeweb/report/report.html", "model/checkpoints", "report/results.json"):
        assert (checkout / "runs/own" / made).exists(), made


def test_every_heavy_mark_is_of_use_and_every_shortening_too():
    blocks = [block for page in RUN for block in documented.blocks(page)]
    assert all(any(mark in block for block in blocks) for mark, _ in HEAVY)
    lines = [line for block in blocks if not _is_heavy(block) for line in block.splitlines()]
    assert all(any(line.startswith(start) for line in lines) for start, _ in SHORTER)


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 8192
    cells = [cell.strip() for line in text.splitlines() if line.startswith("|") for cell in line.split("|")]
    assert max(map(len, cells)) <= 80


def test_the_drawing_is_what_its_script_draws():
    script = runpy.run_path(str(ROOT / "scripts" / "studies" / "draw_pipeline.py"))
    assert (ROOT / "docs" / "images" / "pipeline.svg").read_text(encoding="utf-8") == script["draw"]()


@pytest.mark.parametrize("page", ALL_PAGES)
def test_lines_have_120_columns(page):
    assert [line for line in (ROOT / page).read_text().splitlines() if len(line) > 120] == []


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", ALL_PAGES)
def test_links_and_named_files_exist(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), target
        assert not anchor or anchor in _anchors(linked), target
    for name in re.findall(r"`((?:safelm|data_tasks|configs|scripts|tests|docs)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), name
