"""Estimates how one config scales over slices of growing size by compiling for them, without a TPU.

    python -m safelm.aot.slices --config=configs/smollm2_1b7.py --topologies=v5e:4x4,v5e:8x8,v5e:16x16 \\
        [--fsdp=16] [--output=DIR] [--plan] [--config.a.b=value ...]

Every slice splits parameters over all its chips, or over groups of `--fsdp`, and has micro-batches of `--rows` rows a
chip (with `--plan`, the settings that `safelm.aot --plan` finds). Prints a Markdown table: step time at best and by the
compiler's cycle counts, the collectives' share of the step and the part of it that is not overlapped. The last line
extrapolates the number of chips from which the same batch would be bound by communication.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

from safelm import cli, config_files
from safelm.aot import topology as aot_topology
from safelm.io import remote
from safelm.report import table

_HEADS = (
    "slice",
    "chips",
    "remat, micro-batches",
    "HBM",
    "at best, MFU",
    "by cycles, MFU",
    "collectives",
    "not hidden",
)


def compile_for(config: str, topology: str, folder: pathlib.Path, flags: list[str]) -> dict:
    """The report of one `safelm.aot`; the table that it prints goes to standard error."""
    path = folder / f"{topology.replace(':', '_')}.json"
    command = [sys.executable, "-m", "safelm.aot", f"--config={config}", f"--topology={topology}", f"--output={path}"]
    done = subprocess.run([*command, *flags], stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, file=sys.stderr, flush=True)
    if done.returncode not in (0, 1):
        sys.exit(done.returncode)
    return json.loads(path.read_text())


def row(found: dict) -> list[str]:
    """A slice's cells of the table."""
    values, memory = found["settings"], found["memory"]
    cells = [found["topology"], str(found["chips"]), f"{values['model.remat']}, {values['grad_accum_steps']}"]
    if "time" not in found:
        return [*cells, "does not fit", "", "", "", ""]
    time = found["time"]
    cycles = time["by_compiler_cycles"]
    return [
        *cells,
        f"{memory['peak'] / 2**30:.1f} GiB",
        f"{time['step']:.3f} s, {found['mfu']:.0%}",
        f"{cycles:.3f} s, {found['mfu'] * time['step'] / cycles:.0%}" if cycles else "",
        f"{time['collectives']:.3f} s, {time['collectives'] / time['step']:.0%}",
        f"{time['collectives_not_hidden'] / time['step']:.0%}",
    ]


def bound_from(found: dict) -> str:
    """The number of chips from which collectives take longer than compute.

    Both shrink with a chip's rows, down to one.
    """
    values, time = found["settings"], found["time"]
    rows = values["batch_size"] // found["chips"]
    per_gather = time["collectives"] / values["grad_accum_steps"]
    one_row = time["compute"] / rows
    needed = per_gather / one_row
    if needed <= 1:
        return "not bound by communication down to one row a chip"
    chips = values["batch_size"] / needed
    return f"bound by communication from about {chips:,.0f} chips on (fewer than {needed:.1f} rows a chip and step)"


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError naming a flag out of range, or that doesn't divide a slice."""
    if arguments.rows < 1:
        raise ValueError(f"--rows={arguments.rows}: must be at least 1")
    if arguments.fsdp is not None and arguments.fsdp < 1:
        raise ValueError(f"--fsdp={arguments.fsdp}: must be at least 1")
    for topology in arguments.topologies.split(","):
        try:
            chips = aot_topology.parse(topology).num_chips
        except ValueError as error:
            raise ValueError(str(error).replace("--topology=", "--topologies: ", 1)) from None
        if arguments.fsdp and not arguments.plan and chips % arguments.fsdp:
            raise ValueError(f"--fsdp={arguments.fsdp}: must divide the {chips} chips of {topology}")


def main() -> None:
    parser = cli.parser("safelm.aot.slices", __doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--topologies", default="v5e:4x4,v5e:8x8,v5e:16x16")
    parser.add_argument("--rows", type=int, default=2, help="rows of a micro-batch on a chip")
    parser.add_argument("--fsdp", type=int, help="chips that share one copy of the parameters; default: all of a slice")
    parser.add_argument("--remat", default="dots")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--output", help="folder for the JSON files")
    arguments, flags = parser.parse_known_args()
    try:
        remote.check_local_output(arguments.output or "")
        check(arguments)
        batch_size = config_files.load_config(arguments.config).batch_size
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(arguments.output or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = []
        for topology in arguments.topologies.split(","):
            chips = aot_topology.parse(topology).num_chips
            steps = max(batch_size // (chips * arguments.rows), 1)
            fixed = [f"--config.model.remat={arguments.remat}", f"--config.grad_accum_steps={steps}"]
            if arguments.fsdp:
                fixed += [f"--config.mesh.data={chips // arguments.fsdp}", f"--config.mesh.fsdp={arguments.fsdp}"]
            chosen = ["--plan"] if arguments.plan else fixed
            found.append(compile_for(arguments.config, topology, folder, [*chosen, *flags]))
    print(table.markdown(_HEADS, map(row, found)))
    print(bound_from(found[-1]) if "time" in found[-1] else "")


if __name__ == "__main__":
    main()
