#!/usr/bin/env bash
# From a fresh clone to a table: installs into .venv, writes the synthetic web, caches it, pretrains one small model
# on the raw web and one on the safety mixture, and decodes held-out prompts with and without SafeBeam.
#   scripts/quickstart.sh [DIR]     DIR (default runs/quickstart) keeps everything; run again to continue after a stop
# Everything that a step prints goes to DIR/logs.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/help.sh
. scripts/help.sh
# shellcheck source=scripts/caller.sh
. scripts/caller.sh

run_dir=${1:-}
if [ $# -gt 1 ] || [ "${run_dir#-}" != "$run_dir" ]; then
  echo "quickstart.sh: takes a folder and no flags, got $*: see quickstart.sh --help" >&2
  exit 2
fi
run_dir=$(from_caller "$run_dir")
run_dir=${run_dir:-${here}runs/quickstart}
scripts/install.sh dev eval serve synthesis
python="${SAFELM_VENV:-${here}.venv}/bin/python"
mkdir -p "$run_dir/logs"
shown_dir=$run_dir
run_dir=$(cd "$run_dir" && pwd)
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" TF_CPP_MIN_LOG_LEVEL=3 JAX_COMPILATION_CACHE_DIR="$run_dir/compiled"
number=0 steps=10 bar='##########' rest='..........' ticker=''
trap '[ -z "$ticker" ] || kill "$ticker" 2>/dev/null || true' EXIT

# tick DONE TEXT LOG: once a second until it is killed, a bar over the steps and the last line of the log.
tick() {
  local begin=$SECONDS line
  while kill -0 $$ 2>/dev/null; do
    line=$(tail -c 400 "$3" 2>/dev/null | tr '\r' '\n' | grep -v '^ *$' | tail -n 1 | cut -c 1-45) || true
    printf '\r\e[K[%s%s] %s  %d s  %s' "${bar:0:$1}" "${rest:$1}" "$2" $((SECONDS - begin)) "$line"
    sleep 1
  done
}

# step NAME TEXT MODULE FLAG...: runs `python -m safelm.MODULE FLAG...` with its output in logs/NAME.txt and prints one
# line. Where it fails, prints the end of that log and ends the script with the same exit code.
step() {
  local log="$run_dir/logs/$1.txt" text=$2 module=$3 begin=$SECONDS code=0
  shift 3
  number=$((number + 1))
  if [ -t 1 ]; then tick $((number - 1)) "$text" "$log" & ticker=$!; fi
  "$python" -m "safelm.$module" "$@" >>"${table:-$log}" 2>>"$log" || code=$?
  if [ -n "$ticker" ]; then
    kill "$ticker" 2>/dev/null && wait "$ticker" 2>/dev/null || true
    ticker='' && printf '\r\e[K'
  fi
  if [ "$code" != 0 ]; then
    printf '%d/%d %s: exit code %d; the end of %s:\n' "$number" "$steps" "$text" "$code" "$log" >&2
    tail -n 5 "$log" >&2
    exit "$code"
  fi
  printf '%d/%d %-60s %4d s\n' "$number" "$steps" "$text" $((SECONDS - begin))
}

step corpus "a synthetic web with known harm scores" synthetic_web --output="$run_dir/corpus" --seed=0
[ -f "$run_dir/tokenizer/tokenizer.json" ] || step vocabulary "a vocabulary of 2,048 tokens" train_tokenizer \
  --input="$run_dir/corpus/*/train-*.jsonl.gz" --vocab_size=2048 --output="$run_dir/tokenizer"
number=2
step tokens "SeqIO tasks to token stores" cache_tasks --data_dir="$run_dir/corpus" --tokenizer="$run_dir/tokenizer" \
  --tasks=raw_web,filtered_web,safeweb,refuseweb,moral_education,harm_tagged_web --output="$run_dir/tokens"

# Shown on the validation documents with the classifier that comes with SafeLM; nothing trains on its scores.
step scores "harm scores by the bundled classifier" score --workers=1 --output="$run_dir/scored" \
  --input="$run_dir/corpus/raw_web/validation-*.jsonl.gz"
: >"$run_dir/agreement.txt"
table="$run_dir/agreement.txt" step agreement "how far they agree with the scores pages were written with" \
  safety.scoring.agreement --scored="$run_dir/scored"

# Shown on the validation documents with a writer that needs no model; nothing trains on what it writes.
for kind in safeweb:1,2,3 refuseweb:4,5; do
  step "${kind%:*}" "the data factory: ${kind%:*}" synthesize --kind="${kind%:*}" --scores="${kind#*:}" --workers=1 \
    --writer=template: --scorer=python:safelm.safety.lexicon_scorer:LexiconScorer \
    --output="$run_dir/synthesized/${kind%:*}" --input="$run_dir/corpus/raw_web/validation-*.jsonl.gz"
done

for variant in raw safety; do
  case $variant in
    raw) mixture="the raw web" ;;
    safety) mixture="the safety mixture" ;;
  esac
  step "$variant" "pretraining on $mixture" train --config="configs/quickstart.py:$variant" \
    --workdir="$run_dir/$variant" --config.data.root="$run_dir/tokens" --config.tokenizer="$run_dir/tokenizer"
done

mkdir -p "$run_dir/report"
table="$run_dir/report/table.txt"
: >"$table"
step evaluation "held-out prompts, greedy and SafeBeam" evaluate --suite=synthetic_web \
  --checkpoint=raw="$run_dir/raw" --checkpoint=safety="$run_dir/safety" --methods=greedy,safe_beam \
  --prompts="$run_dir/corpus/prompts" --validation="$run_dir/tokens/filtered_web/validation" --output="$run_dir/report"

echo
cat "$table"
printf '\nHow the bundled classifier agrees with the scores pages were written with (harm here is invented words):\n'
tail -n 3 "$run_dir/agreement.txt"
cat <<NEXT

Logs: $shown_dir/logs. Next, both models in a browser, every token shaded by P(tag):
  ${python%/python}/safelm serve --checkpoint=$shown_dir/raw --checkpoint=$shown_dir/safety
NEXT
