#!/usr/bin/env bash
# From a fresh clone to a table: installs into .venv, writes the synthetic web, caches it, pretrains one small model
# on the raw web and one on the safety mixture, and decodes held-out prompts with and without SafeBeam.
#   scripts/quickstart.sh [DIR]     DIR (default runs/quickstart) keeps everything; run again to continue after a stop
set -euo pipefail
cd "$(dirname "$0")/.."

run_dir=${1:-runs/quickstart}
scripts/install.sh dev eval
python="${SAFELM_VENV:-.venv}/bin/python"
mkdir -p "$run_dir"
run_dir=$(cd "$run_dir" && pwd)
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" TF_CPP_MIN_LOG_LEVEL=3 JAX_COMPILATION_CACHE_DIR="$run_dir/compiled"
started=$SECONDS

step() { printf '\n[%4d s] %s\n' $((SECONDS - started)) "$1"; }

step "1/6 synthetic web: known harm scores, abstract text"
"$python" -m safelm.synthetic_web --output="$run_dir/corpus" --seed=0

step "2/6 vocabulary"
[ -f "$run_dir/tokenizer/tokenizer.json" ] || "$python" -m safelm.train_tokenizer --input="$run_dir/corpus/*/train-*.jsonl.gz" \
  --vocab_size=2048 --output="$run_dir/tokenizer"

step "3/6 SeqIO tasks to token stores"
"$python" -m safelm.cache_tasks --data_dir="$run_dir/corpus" --tokenizer="$run_dir/tokenizer" \
  --tasks=raw_web,filtered_web,safeweb,refuseweb,moral_education,harm_tagged_web --output="$run_dir/tokens"

for variant in raw safety; do
  case $variant in
    raw) step "4/6 pretrain on the raw web" ;;
    safety) step "5/6 pretrain on the safety mixture" ;;
  esac
  "$python" -m safelm.train --config="configs/quickstart.py:$variant" --workdir="$run_dir/$variant" \
    --config.data.root="$run_dir/tokens" --config.tokenizer="$run_dir/tokenizer"
done

step "6/6 held-out prompts, greedy and SafeBeam"
"$python" -m safelm.evaluate --suite=synthetic_web --checkpoint=raw="$run_dir/raw" \
  --checkpoint=safety="$run_dir/safety" --methods=greedy,safe_beam --prompts="$run_dir/corpus/prompts" \
  --validation="$run_dir/tokens/filtered_web/validation" --output="$run_dir/report"

step "done: everything is in $run_dir, the report in $run_dir/report"
