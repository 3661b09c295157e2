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
# that PATHS names. Ends the script with 2 for a flag that neither PATHS nor the Python file FILE names, a path that is
# missing, and a word that no flag takes. FILE is read as text, since no Python may be installed yet.
read_flags() {
  local paths=" $1 " file=$2 flag name line error
  shift 2
  given=()
  while [ $# -gt 0 ]; do
    flag=$1 error='' line=''
    shift
    name=${flag%%=*} name=${name#--} name=${name//-/_}
    if [[ $name =~ ^[a-z0-9_]+$ ]]; then
      line=$(grep -m 1 -E "(DEFINE_[a-z]+|add_argument)\\(\"(--)?($name|${name#no})\"" "$file" || true)
    fi
    if [[ $flag != --?* || ( -z $line && ! $name =~ ^config(\.|$) && $paths != *" $name "* ) ]]; then
      error="unknown argument $flag"
    elif [[ $flag != *=* && $line != *DEFINE_bool* && $line != *store_true* ]]; then
      if [[ $# -gt 0 && $1 != -* ]]; then flag+="=$1" && shift; fi
      if [[ $flag != *=* && $paths == *" $name "* ]]; then error="$flag needs a value"; fi
    fi
    if [ -n "$error" ]; then
      echo "${0##*/}: $error: see ${0##*/} --help" >&2
      exit 2
    fi
    if [[ $flag == *=* && $paths == *" $name "* ]]; then flag="--$name=$(from_caller "${flag#*=}")"; fi
    given+=("$flag")
  done
}

if [ -n "${SAFELM_VENV:-}" ]; then SAFELM_VENV=$(from_caller "$SAFELM_VENV"); fi
case ${SAFELM_PYTHON:-} in */*) SAFELM_PYTHON=$(from_caller "$SAFELM_PYTHON") ;; esac
