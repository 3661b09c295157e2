#!/usr/bin/env bash
# Measures SafeLM on one GPU in under 8 minutes, from an image that has JAX and PyTorch for it: parity, training at
# 135M, 360M and 1.7B with MFU, decoding, scoring, beside PyTorch and transformers. Results: runs/gpu/results.md, .json.
#   scripts/bench/gpu.sh [FLAG...]     goes on if run again; flags are those of scripts/bench/gpu.py:
#                                      --output --parts --seconds --sides --small (python scripts/bench/gpu.py --help)
#   scripts/bench/gpu.sh --small       a minute on a CPU: shows that the parts run, and says nothing of a GPU
# SAFELM_PYTHON is the Python that has JAX and PyTorch (default: .venv/bin/python if there, else python3). Other
# packages that lack are installed into .venv-gpu, which sees that Python's own; SAFELM_WHEELS names a folder of wheels
# to take them from where there is no network. JAX and PyTorch are never installed or replaced.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=scripts/help.sh
. scripts/help.sh
# shellcheck source=scripts/caller.sh
. scripts/caller.sh
# shellcheck source=scripts/venv.sh
. scripts/venv.sh

read_flags output scripts/bench/gpu.py "$@"
python=${SAFELM_PYTHON:-}
wheels=$(from_caller "${SAFELM_WHEELS:-}")
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python || python=python3; }
"$python" -c 'import jax' 2>/dev/null || { echo "gpu.sh: $python has no JAX (set SAFELM_PYTHON)" >&2; exit 2; }
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" XLA_PYTHON_CLIENT_PREALLOCATE=false
needed='import flax, fsspec, grain, jinja2, matplotlib, ml_collections, optax, orbax.checkpoint, pyarrow'
needed+=', safetensors, tokenizers, tqdm'
if ! "$python" -c "$needed" 2>/dev/null; then
  venv=.venv-gpu
  echo "gpu.sh: installing what $python lacks into $venv" >&2
  has_pip "$venv" || make_venv "$python" "$venv" --system-site-packages
  # The image's Python may itself be a venv, whose packages --system-site-packages does not see.
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/image.pth"
  from=(); [ -z "$wheels" ] || from=(--no-index --find-links "$wheels")
  grep -vE '^(#|jax[>= ])' requirements-train.txt > "$venv/needed.txt"
  grep -vE '^(jax|jaxlib|torch|nvidia)' constraints.txt > "$venv/pins.txt"
  "$venv/bin/python" -m pip install --quiet "${from[@]}" -r "$venv/needed.txt" -c "$venv/pins.txt" || {
    echo "gpu.sh: the packages of requirements-train.txt can't be installed; SAFELM_WHEELS names a folder of wheels" >&2
    exit 2
  }
  "$venv/bin/python" -c 'import transformers' 2>/dev/null ||
    "$venv/bin/python" -m pip install --quiet "${from[@]}" 'transformers>=5.0,<6' ||
    echo "gpu.sh: no transformers; its sides will be left out" >&2
  python=$venv/bin/python
fi
exec "$python" scripts/bench/gpu.py "${given[@]}"
