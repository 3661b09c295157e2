#!/usr/bin/env bash
# From a fresh clone to passed tests: creates .venv, installs, lints, tests. Arguments go to pytest.
#   scripts/test.sh                 all tests but slow ones; those that need PyTorch and real weights skip, saying so
#   scripts/test.sh --slow          all tests (as SAFELM_SLOW=1 scripts/test.sh)
#   SAFELM_PARITY=1 scripts/test.sh the same with PyTorch, transformers and SmolLM2-135M installed (as CI does)
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/help.sh
. scripts/help.sh
# shellcheck source=scripts/caller.sh
. scripts/caller.sh

extras=(dev eval serve synthesis)
if [ "$(uname -sm)" = "Linux x86_64" ]; then extras+=(tpu); fi  # its compiler: no TPU is needed
if [ "${SAFELM_PARITY:-0}" = 1 ]; then extras+=(parity); fi
scripts/install.sh "${extras[@]}"
python="${SAFELM_VENV:-.venv}/bin/python"

"$python" -m ruff check .
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" TF_CPP_MIN_LOG_LEVEL=2
# After a worker's death xdist would start another and then, by file, wait for ever.
exec "$python" -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder --max-worker-restart=0 "$@"
