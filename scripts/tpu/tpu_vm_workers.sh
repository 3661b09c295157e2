# shellcheck shell=bash disable=SC2034  # scripts/tpu/tpu_vm.sh reads this file and uses what it sets
# What runs on a TPU worker, each as one line for `ssh --command`.

# One word of a shell command: as it is where that is safe, in single quotes otherwise.
quote() {
  local escaped="'\\''"
  case $1 in
    '' | *[!A-Za-z0-9_./:=,@%+-]*) printf "'%s'" "${1//\'/$escaped}" ;;
    *) printf '%s' "$1" ;;
  esac
}

# True while the process of train.pid is a training: after a reboot its number may be another's.
# shellcheck disable=SC2016  # expands on the worker
training='training() { [ -f ~/safelm/train.pid ] && grep -aqs safelm.train /proc/"$(cat ~/safelm/train.pid)"/cmdline; }'

# shellcheck disable=SC2016
refuse_if_training='if training; then echo "$(hostname): already training" >&2; exit 1; fi'

# uv brings a Python where the image has an older one (Ubuntu 22.04 has 3.10).
# shellcheck disable=SC2016
remote_setup="set -eu; $training; $refuse_if_training; "'rm -rf ~/safelm/checkout; mkdir -p ~/safelm/checkout; '\
'tar -xzf ~/safelm.tar.gz -C ~/safelm/checkout; cd ~/safelm/checkout; PATH=$HOME/.local/bin:$PATH; '\
'command -v uv >/dev/null || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv; '\
'[ -x ../venv/bin/python ] || uv venv --quiet --python ">=3.11,<3.13" ../venv; '\
'uv pip install --quiet --python ../venv/bin/python -r requirements-train.txt -c constraints.txt "jax[tpu]"; '\
'uv pip install --quiet --python ../venv/bin/python --no-deps -e .; '\
'../venv/bin/python -c "import safelm.train"; echo "$(hostname): ready"'

# Prints the line that starts training with the given flags.
remote_run() {
  local word flags=
  for word in "$@"; do flags+=" $(quote "$word")"; done
  # shellcheck disable=SC2016
  printf '%s' "set -eu; $training; $refuse_if_training; "\
'[ -x ~/safelm/venv/bin/python ] || { echo "$(hostname): nothing installed, run setup first" >&2; exit 1; }; '\
'cd ~/safelm/checkout; trap "" HUP; '\
"setsid ../venv/bin/python -u -m safelm.train --distributed$flags"' >>../train.log 2>&1 </dev/null & '\
'echo $! >../train.pid; echo "$(hostname): started, pid $!"'
}

# shellcheck disable=SC2016
remote_status="$training; "'if training; then state=training; else state="not training"; fi; '\
'echo "$(hostname): $state: $(tail -n 1 ~/safelm/train.log 2>/dev/null)"'

# shellcheck disable=SC2016
remote_stop="$training; "'if training; then kill "$(cat ~/safelm/train.pid)"; echo "$(hostname): stopped"; '\
'else echo "$(hostname): not training"; fi'
