#!/usr/bin/env bash
# What tpu_vm.sh does on every worker of a slice, from the code it has brought there.
#
#   launch/tpu_worker.sh install SETUP     a .venv with the code, then the command SETUP
#   launch/tpu_worker.sh train RUN ...     starts `scaletrain train ...`, or joins RUN
#
# The run outlives the connection it was started through. `train` prints the run's output
# and ends with its exit code plus 100, or with 0.
set -euo pipefail
cd "$(dirname "$0")/.."

install() {
  if [[ ! -e .venv/ready ]]; then
    # The image's Python is older than what scaletrain needs.
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    PATH="$HOME/.local/bin:$PATH"
    uv venv --clear --python=3.12 .venv
    uv pip install --python=.venv/bin/python -c constraints.txt --editable '.[tpu,gcs]'
    touch .venv/ready
  fi
  bash -c "$1"
}

# Runs `scaletrain train` and leaves its exit code in a file.
attempt() {
  local file="$1" code=0
  shift
  .venv/bin/scaletrain train "$@" 9>&- || code=$?
  echo "$code" >"$file"
}

train() {
  local run="$HOME/scaletrain/$1" lines=100
  shift
  exec 9>>"$run.lock" # held by a run as long as it goes
  if flock --nonblock 9; then
    rm -f "$run.code"
    : >"$run.log" # tail may be there before the run is
    setsid bash launch/tpu_worker.sh attempt "$run.code" "$@" >>"$run.log" 2>&1 </dev/null &
    echo $! >"$run.pid"
    lines=+1
  else
    echo "joining the run that is going; its options are those it was started with" >&2
  fi
  exec 9>&-
  tail --lines="$lines" --follow --sleep-interval=0.2 --pid="$(cat "$run.pid")" "$run.log"
  # Without a code it was killed; what ends by a signal is started again.
  local code=128
  [[ ! -e "$run.code" ]] || code="$(cat "$run.code")"
  ((code == 0)) || exit $((100 + (code < 128 ? code : 75)))
}

"$@"
