# shellcheck shell=bash
# Makes virtual environments; to be sourced: `. scripts/venv.sh`.

# has_pip VENV: whether there is a virtual environment that can install.
has_pip() { "$1/bin/python" -m pip --version >/dev/null 2>&1; }

# make_venv PYTHON VENV [FLAG...]: makes one. An interrupted `-m venv` leaves one without a whole pip, which is cleared
# unless it holds packages.
make_venv() {
  local python=$1 venv=$2 packages clear=()
  shift 2
  packages=$(find "$venv"/lib/python*/site-packages -mindepth 1 -maxdepth 1 ! -name 'pip*' ! -name '~*' \
    ! -name 'setuptools*' ! -name pkg_resources ! -name '*distutils*' -print -quit 2>/dev/null) || true
  if [ -f "$venv/pyvenv.cfg" ] && [ -z "$packages" ]; then clear=(--clear); fi
  "$python" -m venv "${clear[@]}" "$@" "$venv"
}
