"""Compiler options of a config: their form, and that a compiler gets them and is quoted where it refuses one."""

import jax
import jax.numpy as jnp
import pytest

from safelm.train import compiler


@pytest.fixture(scope="module")
def lowered() -> jax.stages.Lowered:
    return jax.jit(lambda x: x + 1).lower(jnp.ones(3))


def test_options_are_flags_with_values():
    options = ("xla_a=65536", "--xla_b=TRUE", "xla_c=false", "xla_d=x=y")
    assert compiler.parse_options(options) == {"xla_a": "65536", "xla_b": True, "xla_c": False, "xla_d": "x=y"}
    assert compiler.parse_options(()) == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("xla_a",), "'xla_a' is not of the form"),
        (("xla_a=",), "'xla_a=' is not of the form"),
        (("tpu=1",), "'tpu=1' is not of the form"),
        (("xla_a=1", "--xla_a=2"), "xla_a is given twice"),
    ],
)
def test_another_form_is_refused(options, said):
    with pytest.raises(ValueError, match=f"^compiler_options: {said}"):
        compiler.parse_options(options)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("xla_no_such_flag=1", "xla_no_such_flag=1 is refused: .*No such compile option"),
        ("xla_cpu_enable_fast_math=perhaps", "xla_cpu_enable_fast_math=perhaps is refused: .*not a valid bool"),
    ],
)
def test_the_flag_that_a_compiler_refuses_is_named_with_its_reason(lowered, option, said):
    with pytest.raises(ValueError, match=f"^compiler_options: {said}"):
        compiler.compile_with(lowered, ("xla_cpu_enable_fast_min_max=true", option), "cpu")


def test_a_program_compiled_with_options_computes_the_same(lowered):
    options = ("xla_backend_optimization_level=1", "xla_cpu_enable_fast_math=false")
    assert compiler.compile_with(lowered, options, "cpu")(jnp.arange(3.0)).tolist() == [1, 2, 3]


def test_flags_of_another_platform_are_left_out(lowered):
    flags = {"xla_a": "1", "xla_tpu_b": "2", "xla_gpu_c": "3", "xla_cpu_d": "4"}
    for platform, left in (("tpu", "xla_tpu_b"), ("gpu", "xla_gpu_c"), ("cpu", "xla_cpu_d")):
        assert list(compiler.for_platform(flags, platform)) == ["xla_a", left]
    pods = ("xla_tpu_scoped_vmem_limit_kib=65536",)
    with pytest.raises(ValueError, match="xla_tpu_scoped_vmem_limit_kib=65536 is refused"):
        compiler.compile_with(lowered, pods, "tpu")  # the compiler of CPUs hasn't got it
    assert compiler.compile_with(lowered, pods, "cpu")(jnp.arange(3.0)).tolist() == [1, 2, 3]
