#!/usr/bin/env bash
# Trains on this machine's CPU with several processes that talk over loopback, each
# with its own fake devices: what a pod does, at the smallest scale.
#
#   launch/local.sh --processes=2 --devices=4 -- \
#       --config=experiments/quickstart.py --workdir=runs/local --config.mesh.data=-1
#
# Everything after -- goes to `scaletrain train` unchanged. If one process fails, the
# others are ended. The exit code is 75 if any of them ended with it, so that whoever
# started this starts it again; otherwise that of the one that failed first.
set -euo pipefail

processes=2
devices=4
while [[ $# -gt 0 ]]; do
  case "$1" in
    --processes=*) processes="${1#*=}" ;;
    --devices=*) devices="${1#*=}" ;;
    --processes | --devices)
      echo "local.sh: $1; no value; write $1=VALUE." >&2
      exit 2
      ;;
    --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --) shift; break ;;
    *) echo "local.sh: $1; unknown; see --help." >&2; exit 2 ;;
  esac
  shift
done

root="$(cd "$(dirname "$0")/.." && pwd)"
scaletrain="$root/.venv/bin/scaletrain"
[[ -x "$scaletrain" ]] || scaletrain=scaletrain
port="$("$(dirname "$(command -v "$scaletrain")")/python3" -c \
  'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"

export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$devices"
children=()
for ((id = 0; id < processes; id++)); do
  "$scaletrain" train "$@" --coordinator="127.0.0.1:$port" \
    --num_processes="$processes" --process_id="$id" &
  children+=($!)
done
# A process that is frozen listens to no other signal.
trap 'kill -KILL "${children[@]}" 2>/dev/null || true' EXIT
stopped=""
trap 'stopped=yes; kill "${children[@]}" 2>/dev/null || true' TERM INT

left=$processes
code=0
while ((left > 0 && code == 0)); do
  wait -n || code=$?
  if [[ -n "$stopped" ]]; then # it was the signal that ended the wait
    stopped="" code=0
  else
    left=$((left - 1))
  fi
done
# The others save, or say who is lost, and end by themselves.
for ((tenths = 0; tenths < 300 && code != 0; tenths++)); do
  [[ -n "$(jobs -rp)" ]] || break
  sleep 0.1
done
# One that was killed is seen before those that say that it is lost.
running=" $(jobs -rp | tr '\n' ' ')"
for child in "${children[@]}"; do
  [[ "$running" == *" $child "* ]] && continue
  ended=0
  wait "$child" || ended=$?
  if ((ended == 75)); then code=75; fi
done
exit "$code"
