"""What a jaxlib needs to compute right numbers on a CPU is set, beside the user's flags, and the numbers are right."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safelm.models.loss import loss_sums
from safelm.xla_flags import merged

ROOT = Path(__file__).parents[2]
GUARD = "--xla_cpu_experimental_ynn_fusion_type=-reduce"
BLOCKS = (1, 7, 256, 257, 4097, 32_769)  # rows on either side of what one task of a fused reduction takes


@pytest.mark.parametrize("jaxlib", ["0.10.2", "0.11.0", "0.12.0.1"])
@pytest.mark.parametrize(
    "flags, kept",
    [
        ("", ""),
        (" --xla_a=1  --xla_b=x,y ", "--xla_a=1  --xla_b=x,y"),
        ("--xla_cpu_experimental_ynn_fusion_type=-dot", None),
        (GUARD, None),
        ("/no/such/file_of_flags", None),
    ],
)
def test_flags_are_merged_with_the_users(flags, kept, jaxlib):
    untouched = kept is None or jaxlib.startswith("0.12")
    assert merged(flags, jaxlib) == (flags if untouched else f"{kept} {GUARD}".strip())


def test_flags_in_a_file_are_read(tmp_path):
    (tmp_path / "flags").write_text("--xla_a=1\n--xla_b=2\n")
    assert merged(str(tmp_path / "flags"), "0.10.2").split() == ["--xla_a=1", "--xla_b=2", GUARD]


def test_importing_the_package_sets_them_without_jax():
    code = "import os, sys, safelm; print(os.environ.get('XLA_FLAGS'), 'jax' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    wanted = merged("--xla_cpu_multi_thread_eigen=false", jax.lib.__version__)
    assert done.stdout.split() == [*wanted.split(), "False"]


def assert_close(ours, wanted):
    """Every number within float32's error of sums of its own terms; a wrong block is off by a large part of them."""
    np.testing.assert_allclose(np.asarray(ours), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("width", [3, 16])
@pytest.mark.parametrize("rows", BLOCKS)
def test_squared_lengths_of_products_and_their_gradients_are_numpys(rows, width):
    rng = np.random.default_rng(rows)
    x_ND, kernel_DD = rng.normal(size=(rows, width)), rng.normal(size=(width, width))
    lengths = jax.jit(jax.vmap(lambda x_D, kernel_DD: jnp.sum((kernel_DD @ x_D) ** 2), in_axes=(0, None)))
    total = jax.jit(jax.grad(lambda x_ND, kernel_DD: lengths(x_ND, kernel_DD).sum(), argnums=(0, 1)))
    inputs = [jnp.asarray(array, jnp.float32) for array in (x_ND, kernel_DD)]
    y_ND = x_ND @ kernel_DD.T
    assert_close(lengths(*inputs), (y_ND**2).sum(1))
    grad_x_ND, grad_kernel_DD = total(*inputs)
    assert_close(grad_x_ND, 2 * y_ND @ kernel_DD)
    assert_close(grad_kernel_DD, 2 * y_ND.T @ x_ND)


@pytest.mark.parametrize("vocab_size", [3, 70])
@pytest.mark.parametrize("rows", BLOCKS)
def test_loss_and_its_gradient_are_numpys(rows, vocab_size):
    rng = np.random.default_rng(rows)
    logits_NV = rng.normal(size=(rows, vocab_size)) * 3
    targets_N, mask_N = rng.integers(0, vocab_size, rows), rng.integers(0, 2, rows)

    def loss(logits_NV):
        sums = loss_sums(logits_NV[None], jnp.asarray(targets_N)[None], jnp.asarray(mask_N, jnp.float32)[None])
        return sums.total(0.01), sums

    (_, sums), grad_NV = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(logits_NV, jnp.float32))
    log_z_N = np.log(np.exp(logits_NV).sum(1))
    losses_N = (log_z_N - logits_NV[np.arange(rows), targets_N]) * mask_N
    assert_close(sums.cross_entropy, losses_N.sum())
    assert_close(sums.z_square, (log_z_N**2 * mask_N).sum())
    wanted_NV = np.exp(logits_NV - log_z_N[:, None]) * (1 + 0.02 * log_z_N[:, None])
    wanted_NV[np.arange(rows), targets_N] -= 1
    assert_close(grad_NV, wanted_NV * mask_N[:, None])


@pytest.mark.parametrize("shape, axis", [((3, 1, 2, 2, 8, 8, 8), 3), ((2, 3, 1, 5, 4, 1, 9), 4)])
def test_products_of_seven_axes_are_summed(shape, axis):
    """Without the flag, some jaxlibs end the process here."""
    a, b = np.random.default_rng(0).normal(size=(2, *shape))
    summed = jax.jit(lambda a, b: jnp.sum(a * b, axis))(jnp.float32(a), jnp.float32(b))
    assert_close(summed, (a * b).sum(axis))


def fake_python(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_install_takes_the_newest_python_that_runs_and_can_make_environments(tmp_path):
    """A shim of 3.12 that only prints, and a 3.11 without ensurepip, are passed over."""
    checkout, programs = tmp_path / "checkout", tmp_path / "bin"
    (checkout / "scripts").mkdir(parents=True)
    programs.mkdir()
    for name in ("install.sh", "help.sh", "caller.sh", "venv.sh"):
        shutil.copy(ROOT / "scripts" / name, checkout / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        (checkout / name).touch()
    fake_python(programs, "python3.12", 'echo "pyenv: python3.12: command not found" >&2; exit 127')
    fake_python(programs, "python3.11", 'case "$2" in *ensurepip*) exit 1;; esac; exit 0')
    fake_python(programs, "python3", 'if [ "$1" = -m ]; then echo "made by python3" >&2; exit 9; fi; exit 0')
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "SAFELM_VENV": str(tmp_path / "venv")}
    done = subprocess.run(
        ["bash", checkout / "scripts" / "install.sh"], capture_output=True, text=True, env=environment, timeout=60
    )
    assert (done.returncode, done.stderr.strip()) == (9, "made by python3")
