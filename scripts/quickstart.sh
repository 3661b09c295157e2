#!/usr/bin/env bash
# From a fresh clone to a table: installs into .venv, writes the synthetic web, caches it, pretrains one small model
# on the raw web and one on the safety mixture, and decodes held-out prompts with and without SafeBeam.
#   scripts/quickstart.sh [DIR]     DIR (default runs/quickstart) keeps everything; run again to continue after a stop
set -euo pipefail
cd "$(dirname "$0")/.."

run_dir=${1:-runs/quickstart}
scripts/install.sh dev eval synthesis
python="${SAFELM_VENV:-.venv}/bin/python"
mkdir -p "$run_dir"
run_dir=$(cd "$run_dir" && pwd)
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" TF_CPP_MIN_LOG_LEVEL=3 JAX_COMPILATION_CACHE_DIR="$run_dir/compiled"
started=$SECONDS

step() { printf '\n[%4d s] %s\n' $((SECONDS - started)) "$1"; }

step "1/7 synthetic web: known harm scores, abstract text"
"$python" -m safelm.synthetic_web --output="$run_dir/corpus" --seed=0

step "2/7 vocabulary"
[ -f "$run_dir/tokenizer/tokenizer.json" ] || "$python" -m safelm.train_tokenizer --input="$run_dir/corpus/*/train-*.jsonl.gz" \
  --vocab_size=2048 --output="$run_dir/tokenizer"

step "3/7 SeqIO tasks to token stores"
"$python" -m safelm.cache_tasks --data_dir="$run_dir/corpus" --tokenizer="$run_dir/tokenizer" \
  --tasks=raw_web,filtered_web,safeweb,refuseweb,moral_education,harm_tagged_web --output="$run_dir/tokens"

step "4/7 data factory, shown on the validation documents with a writer that needs no model (nothing trains on it)"
for kind in safeweb:1,2,3 refuseweb:4,5; do
  "$python" -m safelm.synthesize --kind="${kind%:*}" --scores="${kind#*:}" --writer=template: --workers=1 \
    --scorer=python:safelm.safety.lexicon_scorer:LexiconScorer --output="$run_dir/synthesized/${kind%:*}" \
    --input="$run_dir/corpus/raw_web/validation-*.jsonl.gz"
done

for variant in raw safety; do
  case $variant in
    raw) step "5/7 pretrain on the raw web" ;;
    safety) step "6/7 pretrain on the safety mixture" ;;
  esac
  "$python" -m safelm.train --config="configs/quickstart.py:$variant" --workdir="$run_dir/$variant" \
    --config.data.root="$run_dir/tokens" --config.tokenizer="$run_dir/tokenizer"
done

step "7/7 held-out prompts, greedy and SafeBeam"
"$python" -m safelm.evaluate --suite=synthetic_web --checkpoint=raw="$run_dir/raw" \
  --checkpoint=safety="$run_dir/safety" --methods=greedy,safe_beam --prompts="$run_dir/corpus/prompts" \
  --validation="$run_dir/tokens/filtered_web/validation" --output="$run_dir/report"

step "done: everything is in $run_dir, the report in $run_dir/report"
