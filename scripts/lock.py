"""Makes requirements-hashed.txt anew: the pins of constraints.txt with the hashes of their files. Needs `uv` on PATH.

    python scripts/lock.py

One list for both Pythons: where their pins differ, a marker says which is whose. For Linux, x86-64, all extras but
parity and tracking; `SAFELM_HASHES=1 scripts/install.sh` installs it.
"""

import pathlib
import re
import subprocess
import tomllib

from safelm import cli

ROOT = pathlib.Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12")
PLATFORM = "x86_64-manylinux_2_31"
HEADER = """\
# The pins of constraints.txt with the hashes of their files, for `SAFELM_HASHES=1 scripts/install.sh`. Linux, x86-64,
# all extras but parity and tracking. Made by scripts/lock.py; a change of constraints.txt asks for it again.
"""


def extras() -> list[str]:
    """All of pyproject.toml's but those whose pins are not kept."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return sorted(project["optional-dependencies"].keys() - {"parity", "tracking"})


def compiled(python: str) -> dict[str, str]:
    """For one Python: "name==version" to the lines of its hashes."""
    command = ["uv", "pip", "compile", "pyproject.toml", "-", "--constraint=constraints.txt", "--quiet"]
    command += [f"--extra={extra}" for extra in extras()]
    command += [f"--python-version={python}", f"--python-platform={PLATFORM}"]
    command += ["--generate-hashes", "--no-header", "--no-annotate", "--no-emit-index-url"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, input="pip")
    entries = re.split(r"\n(?=\S)", done.stdout.strip())
    return {pin: hashes for pin, _, hashes in (entry.partition(" ") for entry in entries)}


def main() -> None:
    cli.parser("scripts.lock", __doc__).parse_args()
    first, second = map(compiled, PYTHONS)
    lines = []
    for pin in sorted(first | second):
        marker = ""
        if pin not in first or pin not in second:
            marker = f' ; python_version {"<" if pin in first else ">="} "{PYTHONS[1]}"'
        lines.append(f"{pin}{marker} {(first | second)[pin]}\n")
    (ROOT / "requirements-hashed.txt").write_text(HEADER + "".join(lines))


if __name__ == "__main__":
    main()
