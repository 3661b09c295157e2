"""The command's flags and what it runs for them."""

import sys
from collections.abc import Sequence

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from safelm.aot import decode as aot_decode
from safelm.aot import plan as aot_plan
from safelm.aot import program as aot_program
from safelm.aot import report as aot_report
from safelm.aot import table as aot_table
from safelm.aot import topology as aot_topology
from safelm.inference.methods import METHODS
from safelm.inference.weights import WEIGHTS_DTYPES
from safelm.io import records
from safelm.train import config as train_config
from safelm.train import flags as train_flags
from safelm.train.defaults import default_config

_TOPOLOGY = flags.DEFINE_string("topology", None, "A TPU slice as CHIP:SHAPE, such as v5e:4x4 or v5p:2x2x2.")
_SLICES = flags.DEFINE_integer("slices", 1, "Number of slices, joined by the data centre's network.")
_PLAN = flags.DEFINE_bool("plan", False, "Search for the fastest mesh, remat policy and gradient accumulation.")
_COMPILES = flags.DEFINE_integer("max_compiles", 6, "With --plan: the most candidates to compile.")
_DECODE = flags.DEFINE_enum("decode", None, list(METHODS), "Compile a step of decoding by this method instead.")
_DECODE_PROMPTS = flags.DEFINE_integer("decode_prompts", 1, "With --decode: prompts decoded at once.", lower_bound=1)
_DECODE_CACHE = flags.DEFINE_integer("decode_cache", 1024, "With --decode: tokens of cache per row.", lower_bound=1)
_DECODE_WEIGHTS = flags.DEFINE_enum("decode_weights", "bfloat16", WEIGHTS_DTYPES, "With --decode: the weights' dtype.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the report.")


def with_default_mesh(config: ConfigDict, tpu: aot_topology.Slice) -> ConfigDict:
    """The config, with a default mesh replaced by fsdp over a slice and data over the slices."""
    if dict(config.mesh) != dict(default_config().mesh):
        return config
    config = config.copy_and_resolve_references().unlock()
    config.mesh.update(data=tpu.num_slices, fsdp=tpu.num_chips // tpu.num_slices)
    return config.lock()


def run(config: ConfigDict, tpu: aot_topology.Slice, *, plan: bool, max_compiles: int) -> dict:
    """Compiles one config, or searches for a plan; prints progress and returns the report.

    Raises ValueError for bad input.
    """
    config, model_config = train_config.resolve_sizes(config)
    if not plan:
        compiled = aot_program.compile_step(config, model_config, tpu)
        found = aot_report.report(config, model_config, tpu, compiled)
        print("\n".join(aot_table.lines(found)), flush=True)
        return found
    return aot_plan.plan(config, model_config, tpu, max_compiles=max_compiles)


def run_decode(config: ConfigDict, tpu: aot_topology.Slice) -> dict:
    """Compiles a decoding step; prints and returns the report. Raises ValueError for bad input."""
    found = aot_decode.decode_report(
        train_config.resolve_sizes(config)[1],
        tpu,
        METHODS[_DECODE.value](),
        num_prompts=_DECODE_PROMPTS.value,
        cache_len=_DECODE_CACHE.value,
        weights=_DECODE_WEIGHTS.value,
    )
    print("\n".join(aot_decode.lines(found)), flush=True)
    return found


def _main(_: Sequence[str]) -> None:
    absl_logging.set_verbosity(absl_logging.FATAL)
    try:
        if not train_flags.CONFIG.value:
            raise ValueError("--config is missing: give a file of configs/")
        if not _TOPOLOGY.value:
            raise ValueError("--topology is missing: give a TPU slice such as v5e:4x4")
        tpu = aot_topology.parse(_TOPOLOGY.value, _SLICES.value)
        aot_topology.set_environment()
        if _DECODE.value:
            found = run_decode(train_flags.CONFIG.value, tpu)
        else:
            found = run(
                with_default_mesh(train_flags.CONFIG.value, tpu), tpu, plan=_PLAN.value, max_compiles=_COMPILES.value
            )
        if _OUTPUT.value:
            records.write(_OUTPUT.value, found)
    except (ValueError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    sys.exit(0 if found["fits"] else 1)


def _fail(line: str, code: int = 2) -> None:
    print("python -m safelm.aot: " + " ".join(line.split()), file=sys.stderr, flush=True)
    sys.exit(code)


def command() -> None:
    """Parses the command's flags and runs it."""
    app.run(_main, flags_parser=lambda arguments: train_flags.parse(arguments, _fail))
