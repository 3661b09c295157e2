"""What may import what; training, generation and evaluation run where TensorFlow and SeqIO are absent.

That every command imports there is shown in test_help.py, which asks each for its help.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import side_files
from forked_commands import PREPARATION_ONLY, ROOT

from safelm import documents

# A package may import those before it in this list, never those behind it. A module at the root of `safelm` has a place
# of its own; `safelm` itself is the API, whose imports are lazy.
PACKAGES = (
    "xla_flags tags io cli config_files stats report text models checkpoints formats data interchange documents jobs "
    "inference lm synthetic_web safety api selection evaluate serving dashboard train aot caching robustness canaries "
    "ladder release_gate generate calibrate_knob convert score annotate report_card select serve label synthesize "
    "cache_tasks convert_tokens train_tokenizer train_classifier lm_eval __main__"  # the commands
).split()


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path, *, module_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if module_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return found


MODULES = sorted((ROOT / "safelm").rglob("*.py"))
KNOWN = {module_name(path) for path in MODULES}


@pytest.mark.parametrize("path", [path for path in MODULES if module_name(path) != "safelm"], ids=module_name)
def test_imports_point_one_way(path):
    own = package(module_name(path))
    for target in (imports(path, module_level_only=False) & KNOWN) - {"safelm"}:
        assert PACKAGES.index(package(target)) <= PACKAGES.index(own), f"{own} imports {target}, which stands later"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_no_preparation_library_at_module_level(path):
    roots = {name.split(".")[0] for name in imports(path, module_level_only=True)}
    assert not roots & set(PREPARATION_ONLY)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_safelm_never_names_the_data_tasks_statically(path):
    assert not {name for name in imports(path, module_level_only=False) if name.split(".")[0] == "data_tasks"}


def test_no_private_jax():
    for folder in ("safelm", "configs", "data_tasks", "scripts", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not {name for name in imports(path, module_level_only=False) if name.startswith("jax._src")}, path


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT, timeout=600)


BLOCKER = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {PREPARATION_ONLY!r}:
            raise ModuleNotFoundError(f'{{name}} is blocked in this test', name=name)
sys.meta_path.insert(0, Blocker())
"""


def test_train_generate_and_evaluate_load_no_tensorflow_even_where_it_is_installed():
    unwanted = set(PREPARATION_ONLY) - {"torch"}  # tensorboardX imports torch where it is installed, for types only
    done = run(
        "import sys, safelm.train.__main__, safelm.generate, safelm.evaluate.__main__, safelm.data.loader\n"
        f"loaded = sorted(set(sys.modules) & {unwanted!r})\n"
        "assert not loaded, loaded"
    )
    assert done.returncode == 0, done.stderr


def test_training_generation_and_evaluation_run_without_tensorflow(tmp_path):
    code = (
        BLOCKER
        + f"""
import pathlib, runpy
sys.path.insert(0, {str(ROOT / "tests/helpers")!r})
import tiny_runs
from safelm import synthetic_web
from safelm.train import run as train
folder = pathlib.Path({str(tmp_path)!r})
config = tiny_runs.tiny_config(tiny_runs.write_inputs(folder))
with config.unlocked():
    config.model.max_seq_len = 512
train.train(config, str(folder / "run"))
for command, *arguments in (
    ("synthetic_web", f"--output={{folder}}/corpus", "--documents=200"),
    ("generate", f"--checkpoint={{folder}}/run", "--prompt=the cat", "--method=safe_beam", "--max_new_tokens=4"),
    ("evaluate", f"--checkpoint=tiny={{folder}}/run", f"--prompts={{folder}}/corpus/prompts", "--max_prompts=2",
     "--max_new_tokens=4", "--methods=greedy", f"--output={{folder}}/report"),
):
    sys.argv = [command, *arguments]
    runpy.run_module(f"safelm.{{command}}", run_name="__main__", alter_sys=True)
assert not set(sys.modules) & set({PREPARATION_ONLY!r})
"""
    )
    done = run(code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "report" / "results.json").exists()
    logs = [path.name for path in tmp_path.rglob("*.jsonl")]
    assert {"metrics.jsonl", "events.jsonl", "harmful.jsonl"} < set(logs) and any("answers" in name for name in logs)
    side_files.assert_only_documents("train generate evaluate", tmp_path, tmp_path / "corpus")
    assert documents.list_files(str(tmp_path)) == [str(path) for path in sorted((tmp_path / "corpus").rglob("*-of-*"))]
