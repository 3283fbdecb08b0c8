#!/usr/bin/env bash
# Stands in for gcloud and kubectl: writes down what it is called with and answers from
# files in $STAND_IN. Every describe takes a line of `states`, every training one of
# `codes`, where "real" runs the worker's command here, in a home of its own.
set -euo pipefail
cd "$STAND_IN"
words="$(printf '\t%s' "$@")"
echo "$(basename "$0")$words" >>calls

next() { # takes the first line of a file
  head -n 1 "$1"
  sed -i 1d "$1"
}

on_worker() {
  for word in "$@"; do
    [[ "$word" != --command=* ]] || command="${word#*=}"
  done
  cd "$STAND_IN/home"
  HOME="$PWD" bash -c "$command"
}

case "$*" in
  *" describe "*)
    now="$(next states)"
    [[ "$now" != NONE ]] || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }
    echo "$now"
    ;;
  *" scp "*) cp "$5" home/ ;;
  *" ssh "*" install "*) on_worker "$@" ;;
  *" ssh "*)
    code="$(next codes)"
    [[ "$code" == real ]] || exit "$code"
    on_worker "$@"
    ;;
  apply*) cat >manifest ;;
esac
