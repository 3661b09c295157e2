# shellcheck shell=bash
# Prints a script's first comment and ends it where --help is among its arguments; to be sourced: `. scripts/help.sh`.
for argument in "$@"; do
  case $argument in
    --) break ;;
    -h | --help)
      sed -n "2,/^[^#]/s/^# \{0,1\}//p" "$(find scripts -name "${0##*/}" -print -quit)"
      exit 0
      ;;
  esac
done
