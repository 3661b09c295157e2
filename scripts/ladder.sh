#!/usr/bin/env bash
# The ladder of data interventions through pretraining, instruction tuning and benign finetuning, measured after each.
#   scripts/ladder.sh [DIR] [FLAG...]               the embedded corpus; DIR (default runs/ladder) keeps everything;
#                                                   --output=DIR says the same
#   scripts/ladder.sh DIR --real=DATA [FLAG...]     real text from a folder with text/, classifier/, sft/, eval_prompts/
#   scripts/ladder.sh DIR --real=DATA --init_checkpoint=W/smollm2 [FLAG...]     SmolLM2-135M continued on that text
# Run again to continue after any stop. WORKERS (default 2) says how many processes work. Other flags go to
# `safelm ladder`, whose --help has them.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/help.sh
. scripts/help.sh
# shellcheck source=scripts/caller.sh
. scripts/caller.sh

run_dir=${here}runs/ladder variant=embedded flags=()
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then run_dir=$(from_caller "$1"); shift; fi
paths='output real init_checkpoint config.real config.init_checkpoint records pause_file'
read_flags "$paths" safelm/ladder/command.py "$@"
for flag in "${given[@]}"; do
  case $flag in
    --output=?*) run_dir=${flag#*=} ;;
    --real=*) flags+=("--config.real=${flag#*=}"); [ $variant = embedded ] && variant=real ;;
    --init_checkpoint=*) flags+=("--config.init_checkpoint=${flag#*=}"); variant=smollm2_135m ;;
    --config=*)
      config=${flag#*=}
      if [ -e "$caller/${config%:*}" ]; then config=$(from_caller "$config"); fi
      flags+=("--config=$config")
      ;;
    *) flags+=("$flag") ;;
  esac
done
scripts/install.sh dev eval
mkdir -p "$run_dir"
export TF_CPP_MIN_LOG_LEVEL=3 JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$(cd "$run_dir" && pwd)/compiled}"
exec "${SAFELM_VENV:-.venv}/bin/python" -m safelm.ladder --config="configs/ladder.py:$variant" --output="$run_dir" \
  --workers="${WORKERS:-2}" "${flags[@]}"
