#!/usr/bin/env bash
# Makes .venv-bench with what SafeLM is measured against: LitGPT, LitData and HF datasets, pinned. They need versions
# that SafeLM's own environment does not take (huggingface-hub below 1.4, older fsspec). `scripts/bench/rivals.sh [PYTHON]`.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=scripts/help.sh
. scripts/help.sh
# shellcheck source=scripts/caller.sh
. scripts/caller.sh
# shellcheck source=scripts/venv.sh
. scripts/venv.sh
venv=$(from_caller "${SAFELM_BENCH_VENV:-}") python=${1:-.venv/bin/python}
venv=${venv:-.venv-bench}
case ${1:-} in */*) python=$(from_caller "$1") ;; esac
has_pip "$venv" || make_venv "$python" "$venv"
# torch first and by itself: so pip takes the build it is configured for (CPU or CUDA).
"$venv/bin/python" -m pip install --quiet torch==2.13.0
"$venv/bin/python" -m pip install --quiet torch==2.13.0 litgpt==0.5.13 litdata==0.2.76 datasets==5.0.1
# LitData asks for it, text needs none, and a build for CUDA beside torch for the CPU breaks `import lightning`.
"$venv/bin/python" -m pip uninstall --quiet --yes torchvision
