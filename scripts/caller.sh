# shellcheck shell=bash
# Paths that a script's caller gives are meant from the folder of the call. To be sourced right behind the `cd` to the
# checkout: `. scripts/caller.sh`. Whoever calls from the checkout gets them as given.
caller=$OLDPWD
# shellcheck disable=SC2034  # begins the paths of the checkout that the script shows
if [ "$caller" = "$PWD" ]; then here=''; else here=$PWD/; fi

# from_caller PATH: prints the path as it is to be used in the checkout; URLs and models of a hub stay as they are.
from_caller() {
  case $1 in
    '' | /* | hf:* | *://*) echo "$1" ;;
    *) if [ "$caller" = "$PWD" ]; then echo "$1"; else echo "$caller/$1"; fi ;;
  esac
}

# read_flags PATHS FILE FLAG...: sets the array `given` to the flags as --name=value, with the paths from here of those
# that PATHS names. Ends the script with 2 for a flag that neither PATHS nor the Python file FILE names.
read_flags() {
  local paths=" $1 " file=$2 flag name
  shift 2
  given=()
  while [ $# -gt 0 ]; do
    flag=$1
    shift
    if [[ $flag == --?* && $flag != *=* && $# -gt 0 && ${1-} != -* ]]; then
      flag+="=$1"
      shift
    fi
    name=${flag%%=*} name=${name#--} name=${name//-/_}
    if [[ $flag != --?* ]] || { [[ ! $name =~ ^config(\.|$) && $paths != *" $name "* ]] &&
        ! grep -qE "\\(\"(--)?${name#no}\"" "$file"; }; then
      echo "${0##*/}: unknown argument $flag: see ${0##*/} --help" >&2
      exit 2
    fi
    if [[ $flag == *=* && $paths == *" $name "* ]]; then flag="--$name=$(from_caller "${flag#*=}")"; fi
    given+=("$flag")
  done
}

if [ -n "${SAFELM_VENV:-}" ]; then SAFELM_VENV=$(from_caller "$SAFELM_VENV"); fi
case ${SAFELM_PYTHON:-} in */*) SAFELM_PYTHON=$(from_caller "$SAFELM_PYTHON") ;; esac
