"""Ahead-of-time compilation: topologies, the plan's candidates, verdicts, and a real step compiled for a TPU slice."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import side_files

from safelm.aot import plan as aot_plan
from safelm.aot import program as aot_program
from safelm.aot import slices as aot_slices
from safelm.aot import table as aot_table
from safelm.aot import topology as aot_topology
from safelm.train import config as train_config
from safelm.train.defaults import default_config

ROOT = Path(__file__).parents[2]
CYCLE_SECONDS = {"0.0.42.1": 1.3408e-3}  # of `small_step` on v5e by libtpu's cycle counts
needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu (the extra tpu)")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5e:5x5", "v5e has 1x1, 2x2, 2x4"),
        ("v5e", "CHIP:SHAPE"),
        ("v9:2x2", r"v4 \(2x2x1.*v6e \(1x1"),
        ("v5p:4x4", "v5p has 2x2x1"),
    ],
)
def test_a_topology_that_does_not_exist_is_named_with_those_that_do(name, said):
    with pytest.raises(ValueError, match=f"--topology={name}: no such topology.*{said}"):
        aot_topology.parse(name)


def test_topologies_know_their_size_and_which_axes_are_rings():
    assert aot_topology.parse("v5e:4x4").num_chips == 16 and aot_topology.parse("v6e:2x2x1").shape == (2, 2)
    assert aot_topology.parse("v5e:4x4").rings() == (False, False)
    assert aot_topology.parse("v5e:8x16").rings() == (False, True)
    assert aot_topology.parse("v5p:2x4x4").rings() == (False, False, False)
    assert aot_topology.parse("v4:4x4x8", 2).rings() == (True, True, True)
    assert aot_topology.parse("v4:4x4x8", 2).num_chips == 256
    with pytest.raises(ValueError, match="--slices=0"):
        aot_topology.parse("v5e:4x4", 0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rows=0"], "--rows=0: must be at least 1"),
        (["--fsdp=0"], "--fsdp=0: must be at least 1"),
        (["--topologies=v5e:8x8,v5e:4x4", "--fsdp=32"], "--fsdp=32: must divide the 16 chips of v5e:4x4"),
        (["--topologies=v5e:3x3"], "--topologies: v5e:3x3: no such topology; v5e has"),
        (["--config=configs/nothing.py"], "configs/nothing.py: no such file"),
    ],
)
def test_a_flag_of_slices_that_cannot_be_is_named_in_one_line(flags, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["slices", "--config=configs/smollm2_1b7.py", *flags])
    with pytest.raises(SystemExit) as ended:
        aot_slices.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and said in told and told.count("\n") == 1


def test_a_plan_that_compiles_nothing_is_refused():
    config, model_config = sizes()
    with pytest.raises(ValueError, match="--max_compiles=0: must be at least 1"):
        aot_plan.plan(config, model_config, aot_topology.parse("v5e:1x1"), max_compiles=0)


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (120.00G) exceeds available HBM "
            "(15.75G).",
            120 * 2**30,
        ),
        (
            "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
            int(20.5 * 2**30),
        ),
        ("something else", None),
    ],
)
def test_what_a_refused_program_needs_is_read_from_the_refusal(message, needed):
    assert aot_program.needed_bytes("RESOURCE_EXHAUSTED: " + message) == needed


def found(**changes) -> dict:
    """A report of a step that fits and is bound by compute."""
    settings = {"mesh.data": 1, "mesh.fsdp": 16, "mesh.tensor": 1, "grad_accum_steps": 4, "model.remat": "full"}
    time = {"step": 1.0, "compute": 1.0, "hbm": 0.5, "collectives_not_hidden": 0.0, "by_compiler_cycles": None}
    report = {
        "fits": True,
        "chips": 16,
        "slices": 1,
        "settings": settings | {"batch_size": 256} | changes.pop("settings", {}),
        "time": time | changes.pop("time", {}),
        "memory": {"available": 16 * 2**30, "peak": 10 * 2**30},
        "flops": {"of_matrix_products": 1.4e12},
        "model_flops_per_chip": 1e12,
    }
    return report | changes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "lighter --config.model.remat"),
        ({"settings": {"model.remat": "none"}}, "bound by compute"),
        ({"time": {"collectives_not_hidden": 0.5}}, "communication.*50%.*fewer --config.grad_accum_steps"),
        ({"time": {"collectives_not_hidden": 0.5}, "settings": {"grad_accum_steps": 1}}, "larger --config.batch_size"),
        ({"time": {"hbm": 2.0}}, "memory traffic"),
        ({"fits": False}, "--config.grad_accum_steps=8 "),
        ({"fits": False, "settings": {"model.remat": "dots"}}, "--config.model.remat=full"),
        ({"fits": False, "settings": {"mesh.fsdp": 4, "mesh.data": 4}}, "--config.mesh.fsdp=16"),
        ({"fits": False, "settings": {"grad_accum_steps": 16}}, "more chips"),
    ],
)
def test_the_verdict_says_what_to_change(changes, said):
    assert re.search(said, aot_table.advice(found(**changes)))


def sizes(**changes):
    config = default_config()
    config.total_steps, config.batch_size, config.seq_len = 10, 64, 256
    config.model.update(vocab_size=1000, num_layers=2, d_model=256, d_ff=512, num_heads=9, num_kv_heads=3, head_dim=64)
    config.model.update(changes)
    return train_config.resolve_sizes(config)


@needs_libtpu
def test_the_plan_offers_what_divides_and_ranks_by_the_estimate():
    aot_topology.set_environment()
    config, model_config = sizes()
    tpu = aot_topology.parse("v5e:4x4")
    every = aot_plan.candidates(config, model_config, tpu)
    assert {c.tensor for c in every} == {1}  # 9 and 3 heads
    assert all(c.data * c.fsdp * c.tensor == 16 and 64 % (c.grad_accum_steps * c.data * c.fsdp) == 0 for c in every)
    assert [c.seconds for c in every] == sorted(c.seconds for c in every)
    by_settings = {(c.fsdp, c.remat, c.grad_accum_steps): c for c in every}
    one, four = by_settings[16, "full", 1], by_settings[16, "full", 4]
    assert four.memory < one.memory and four.network > one.network and four.compute == one.compute
    assert by_settings[16, "none", 1].compute < by_settings[16, "dots", 1].compute < one.compute
    assert by_settings[16, "full", 4].memory < by_settings[1, "full", 4].memory
    heads = aot_plan.candidates(*sizes(num_heads=8, num_kv_heads=4), tpu)
    assert {c.tensor for c in heads} == {1, 2, 4}
    over_slices = aot_plan.candidates(config, model_config, aot_topology.parse("v5e:2x4", 2))
    assert all(c.data % 2 == 0 for c in over_slices)
    applied = one.applied(config)
    assert (applied.mesh.fsdp, applied.model.remat, applied.grad_accum_steps) == (16, "full", 1)


def aot(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_FLAGS", "JAX_"))}
    command = [sys.executable, "-m", "safelm.aot", "--config=configs/smollm2_135m.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600)


@pytest.fixture(scope="module")
def small_step(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """A real step compiled for a slice, and the folder of its report."""
    folder = tmp_path_factory.mktemp("step")
    sizes = {"vocab_size": 1000, "num_layers": 3, "d_model": 256, "d_ff": 512, "num_heads": 4, "num_kv_heads": 2}
    done = aot(
        "--topology=v5e:2x2",
        f"--output={folder / 'found.json'}",
        *(f"--config.model.{name}={value}" for name, value in sizes.items()),
        *("--config.batch_size=16", "--config.seq_len=256", "--config.grad_accum_steps=2"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done, folder


@needs_libtpu
def test_a_real_step_compiles_for_a_slice_with_the_kernel_and_the_collectives_counted_by_hand(small_step):
    done, folder = small_step
    report = json.loads((folder / "found.json").read_text())
    assert report["fits"] and "fits" in done.stdout and 0 < report["memory"]["peak"] < report["memory"]["available"]
    assert report["settings"]["mesh.fsdp"] == report["chips"] == 4  # the mesh was left open
    kernels = report["attention"]["kernels_in_program"]
    backward = {f"splash_mha_{part}_segmented_no_residuals": 6 for part in ("dkv", "dq")}
    assert kernels == {"splash_mha_fwd_segmented_residuals": 12} | backward
    assert report["attention"]["score_buffers"] == []
    assert report["flops"]["of_matrix_products"] > report["model_flops_per_chip"]  # remat full
    layer = 256 * 64 * (2 * 4 + 2 * 2) + 3 * 256 * 512
    once = 2 * 3 * layer * 3 / 4  # the layers in bfloat16, as a chip sends them to three others
    gathered = report["collectives"]["ici all-gather"]["bytes_by_dtype"]["bf16"]
    assert 2 * 2 * once <= gathered <= 1.35 * 2 * 2 * once  # two micro-batches, forward and backward; and embeddings
    side_files.assert_only_documents("aot", folder)
    assert 0 < report["mfu"] < 1 and report["time"]["step"] <= report["time"]["nothing_overlapping"]


@needs_libtpu
def test_the_cycle_counts_of_a_step_stay_within_five_percent(small_step):
    """Of libtpu 0.0.42.1; of another compiler they are another number, to be written here."""
    version = importlib.metadata.version("libtpu")
    if version not in CYCLE_SECONDS:
        pytest.skip(f"no cycle counts of libtpu {version} are written down")
    report = json.loads((small_step[1] / "found.json").read_text())
    assert report["time"]["by_compiler_cycles"] == pytest.approx(CYCLE_SECONDS[version], rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology=v5e:4x5"], "--topology=v5e:4x5: no such topology"),
        (["--topology=v5e:4x4", "--config.compiler_options=('xla_flag',)"], "'xla_flag' is not of the form"),
        pytest.param(
            ["--topology=v5e:4x4", "--config.modle.remat=full"],
            "unknown config field --config.modle.remat",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_input_is_one_line(arguments, said):
    done = aot(*arguments)
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
