#!/usr/bin/env bash
# A training run on a Cloud TPU VM, from the request to the log: `scripts/tpu/tpu_vm.sh --help`.
set -euo pipefail
cd "$(dirname "$0")/../.."

usage() {
  cat <<'USAGE'
usage: scripts/tpu/tpu_vm.sh COMMAND --name=NAME --zone=ZONE --project=PROJECT [FLAGS] [-- TRAINING FLAGS]

commands
  create   ask for the TPU as a queued resource (--wait: until it is there)
  setup    copy the committed files of this checkout to every worker and install the lean requirements there
  run      start `python -m safelm.train --distributed TRAINING FLAGS` on every worker, detached
  tail     follow the log of one worker (--worker=N, default 0; of slice --node=N, default 0)
  status   state of the queued resource and of the TPU, and each worker's last line of log
  stop     end the training on every worker; the TPU stays
  resume   after a preemption: delete, create, wait, setup, run; training goes on from its newest checkpoint
  delete   delete the TPU and its queued resource

flags
  --name=NAME  --zone=ZONE  --project=PROJECT       always
  --accelerator-type=TYPE  --runtime-version=VERSION create and resume: v5litepod-256 with v2-alpha-tpuv5-lite,
                                                    v5p-64 with v2-alpha-tpuv5, v6e-64 with v2-alpha-tpuv6e
  --spot | --reserved | --reservation=RESERVATION   at most one of them; --reservation goes through `gcloud alpha`
  --node-count=N                                    N slices of that type as one request (multi-slice), with every
                                                    command from create to delete; the default is 1
  --create-flag=FLAG                                a further flag of `queued-resources create`, may be repeated
  --poll-seconds=N                                  pause between two looks at the state (default 60)
  --dry-run                                         print the commands, quoted for a shell, and run nothing

example
  tpu="--name=safelm --zone=us-west4-a --project=PROJECT"
  v5e="--accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite --spot"
  training="--config=configs/smollm2_1b7.py --workdir=gs://BUCKET/run --config.mesh.fsdp=256
    --config.tokenizer=gs://BUCKET/smollm2 --config.data.root=gs://BUCKET/tokens"
  scripts/tpu/tpu_vm.sh create $tpu $v5e --wait
  scripts/tpu/tpu_vm.sh setup $tpu
  scripts/tpu/tpu_vm.sh run $tpu -- $training
  scripts/tpu/tpu_vm.sh tail $tpu
  scripts/tpu/tpu_vm.sh resume $tpu $v5e -- $training     # when it was preempted
  scripts/tpu/tpu_vm.sh delete $tpu

Needs gcloud, logged in, and for more than one worker `ssh-add ~/.ssh/google_compute_engine`. On a worker everything is
in ~/safelm: checkout/, venv/, train.log, train.pid. Workers install from PyPI, and where the image has neither Python
3.11 nor 3.12 uv downloads one: they need a way out to the internet.
USAGE
}

die() {
  echo "tpu_vm.sh $command: $1" >&2
  exit "${2:-1}"
}

# shellcheck source=scripts/tpu/tpu_vm_workers.sh
. scripts/tpu/tpu_vm_workers.sh

note() { echo "tpu_vm.sh $command: $1" >&2; }

# Runs a command, or prints it.
execute() {
  if [ "$dry_run" = 0 ]; then
    "$@"
    return
  fi
  local word line=
  for word in "$@"; do line+="$(quote "$word") "; done
  printf '%s\n' "${line% }"
}

queued_resources() { execute gcloud compute tpus queued-resources "$@" --zone="$zone" --project="$project"; }
tpu_vm() { execute gcloud compute tpus tpu-vm "$@" --zone="$zone" --project="$project"; }

# ssh and scp of one slice go by the TPU's name, of several by the queued resource's.
on_slices() {
  local verb=$1 slice=$2
  shift 2
  if [ "$node_count" = 1 ]; then tpu_vm "$verb" "$@"; else queued_resources "$verb" "$@" --node="$slice"; fi
}
on_workers() { on_slices ssh "${3:-all}" "$name" --worker="$1" --command="$2"; }

# ---- states ----

# Prints the state that a describe command gives, NOT_FOUND where there is no such thing; other errors end the script.
state_of() {
  local state
  if state=$("$@" 2>"$scratch/errors"); then
    echo "$state"
  elif grep -q NOT_FOUND "$scratch/errors"; then
    echo NOT_FOUND
  else
    cat "$scratch/errors" >&2
    die "cannot read the state of $name"
  fi
}

describe_queued() { queued_resources describe "$name" --format='value(state.state)'; }
# The TPUs of the request: one with its name, several with numbers after it.
node_names() {
  if [ "$node_count" = 1 ]; then
    echo "$name"
  else
    local number
    for ((number = 0; number < node_count; number++)); do echo "$name-$number"; done
  fi
}
describe_node() { tpu_vm describe "$1" --format='value(state)'; }

# One state for all TPUs: READY where all are, otherwise the first other one.
node_state() {
  local node state
  for node in $(node_names); do
    state=$(state_of describe_node "$node") || exit 1
    if [ "$state" != READY ]; then
      echo "$state"
      return
    fi
  done
  echo READY
}

wait_until_active() {
  if [ "$dry_run" = 1 ]; then
    echo "# every $poll_seconds s until ACTIVE:"
    describe_queued
    return
  fi
  local state
  while true; do
    state=$(state_of describe_queued)
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | NOT_FOUND) die "$name became $state while waiting for it" ;;
    esac
    note "$name is $state"
    sleep "$poll_seconds"
  done
}

# ---- commands ----

create() {
  local gcloud=(gcloud)
  case $tier in --reservation=*) gcloud+=(alpha) ;; esac
  local nodes=(--node-id="$name")
  if [ "$node_count" != 1 ]; then nodes=(--node-count="$node_count" --node-prefix="$name"); fi
  execute "${gcloud[@]}" compute tpus queued-resources create "$name" "${nodes[@]}" \
    --accelerator-type="$accelerator_type" --runtime-version="$runtime_version" ${tier:+"$tier"} \
    ${create_flags[@]+"${create_flags[@]}"} --zone="$zone" --project="$project"
}

setup() {
  local archive=safelm.tar.gz
  if [ "$dry_run" = 0 ]; then
    archive="$scratch/$archive"
    [ -z "$(git status --porcelain)" ] ||
      note "uncommitted changes are not copied: workers get $(git rev-parse --short HEAD)"
  fi
  execute git archive --format=tar.gz --output="$archive" HEAD
  on_slices scp all "$archive" "$name:safelm.tar.gz" --worker=all
  on_workers all "$remote_setup"
}

run() { on_workers all "$(remote_run "${training_flags[@]}")"; }

delete() { queued_resources delete "$name" --force --quiet; }

status() {
  if [ "$dry_run" = 1 ]; then
    describe_queued
    local node
    for node in $(node_names); do describe_node "$node"; done
    on_workers all "$remote_status"
    return
  fi
  local queued node
  queued=$(state_of describe_queued)
  node=$(node_state)
  echo "queued resource: $queued"
  echo "TPU: $node"
  if [ "$node" = READY ]; then on_workers all "$remote_status"; fi
}

# Deletes what a preemption left and asks for the TPU again; leaves a request that is still in the queue alone.
recreate() {
  if [ "$dry_run" = 1 ]; then
    describe_queued
    echo "# SUSPENDED or FAILED, or ACTIVE with its TPU preempted:"
    delete
    create
    return
  fi
  local state node
  state=$(state_of describe_queued)
  while [ "$state" = SUSPENDING ] || [ "$state" = DELETING ]; do
    note "$name is $state"
    sleep "$poll_seconds"
    state=$(state_of describe_queued)
  done
  if [ "$state" = ACTIVE ]; then
    node=$(node_state)
    case $node in
      READY)
        note "$name is ACTIVE and READY, so it was not preempted; if its training has ended, \`run\` starts it again"
        exit 0
        ;;
      PREEMPTED | TERMINATED | NOT_FOUND) state=SUSPENDED ;;
      *) die "$name is ACTIVE and its TPU $node: neither preempted nor ready; look again later" ;;
    esac
  fi
  note "$name is $state"
  case $state in
    SUSPENDED | FAILED)
      delete
      create
      ;;
    NOT_FOUND) create ;;
  esac
}

resume() {
  recreate
  wait_until_active
  setup
  run
}

# ---- the command line ----

set_flag() {
  case $1 in
    --name | --zone | --project | --accelerator-type | --runtime-version | --reservation | --create-flag | --worker | \
      --poll-seconds | --node-count | --node) [ -n "$2" ] || die "$1 has no value" 2 ;;
    *) die "unknown flag $1 (flags of the training go after --)" 2 ;;
  esac
  case $1 in
    --name) name=$2 ;;
    --zone) zone=$2 ;;
    --project) project=$2 ;;
    --accelerator-type) accelerator_type=$2 ;;
    --runtime-version) runtime_version=$2 ;;
    --reservation) set_tier "--reservation=$2" ;;
    --create-flag) create_flags+=("$2") ;;
    --worker) worker=$2 ;;
    --node) slice=$2 ;;
    --node-count) node_count=$2 ;;
    --poll-seconds) poll_seconds=$2 ;;
  esac
}

set_tier() {
  [ -z "$tier" ] || [ "$tier" = "$1" ] || die "$tier and $1 exclude each other" 2
  tier=$1
}

# The flags named that have no value yet, in one error.
require() {
  local flag variable missing=
  for flag in "$@"; do
    variable=${flag//-/_}
    [ -n "${!variable}" ] || missing+="${missing:+, }--$flag"
  done
  [ -z "$missing" ] || die "missing $missing" 2
}

require_training_flags() {
  local flags=" ${training_flags[*]-} "
  case $flags in *" --config="*) ;; *) die "missing --config=FILE after --" 2 ;; esac
  case $flags in
    *" --workdir=gs://"*) ;;
    *" --workdir="*) die "--workdir must be gs://..., which all workers see and a preemption leaves alone" 2 ;;
    *) die "missing --workdir=gs://... after --" 2 ;;
  esac
}

command=${1:-}
case $command in
  create | setup | run | tail | status | stop | resume | delete) shift ;;
  -h | --help | help) usage && exit 0 ;;
  *)
    usage >&2
    echo "tpu_vm.sh: ${command:+"'$command' is no command; "}give one of create, setup, run, tail, status, stop," \
      "resume, delete" >&2
    exit 2
    ;;
esac

# shellcheck disable=SC2034  # require reads some of them by name
name='' zone='' project='' accelerator_type='' runtime_version='' tier='' worker=0 slice=0 node_count=1
poll_seconds=60 dry_run=0 wait=0
create_flags=()
training_flags=()
while [ $# -gt 0 ]; do
  case $1 in  # --some_flag is --some-flag, as everywhere
    --*_*=* | --*_*)
      flag=${1%%=*}
      set -- "${flag//_/-}${1#"$flag"}" "${@:2}"
      ;;
  esac
  case $1 in
    -h | --help) usage && exit 0 ;;
    --dry-run) dry_run=1 ;;
    --wait) wait=1 ;;
    --spot | --reserved) set_tier "$1" ;;
    --)
      shift
      training_flags=("$@")
      break
      ;;
    --*=*) set_flag "${1%%=*}" "${1#*=}" ;;
    --*)
      case ${2:-} in '' | --*) set_flag "$1" '' ;; esac
      set_flag "$1" "$2"
      shift
      ;;
    *) die "unexpected argument '$1' (flags of the training go after --)" 2 ;;
  esac
  shift
done

require name zone project
case $command in create | resume) require accelerator-type runtime-version ;; esac
case $command in
  run | resume) require_training_flags ;;
  *) [ -z "${training_flags[*]-}" ] || die "takes no flags of the training" 2 ;;
esac
case $poll_seconds in *[!0-9]*) die "--poll-seconds is no whole number: '$poll_seconds'" 2 ;; esac
case $worker in *[!0-9]*) die "--worker is no whole number: '$worker'" 2 ;; esac
case $slice in *[!0-9]*) die "--node is no whole number: '$slice'" 2 ;; esac
case $node_count in *[!0-9]* | 0*) die "--node-count is no whole number from 1: '$node_count'" 2 ;; esac

if [ "$dry_run" = 0 ]; then
  [ -n "$(type -P gcloud)" ] || die "gcloud is not on PATH: install the Google Cloud CLI"
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
fi

case $command in
  create)
    create
    if [ "$wait" = 1 ]; then wait_until_active; fi
    ;;
  tail) on_workers "$worker" 'tail -n 50 -F ~/safelm/train.log' "$slice" ;;
  stop) on_workers all "$remote_stop" ;;
  *) "$command" ;;
esac
