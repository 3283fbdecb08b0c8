#!/usr/bin/env bash
# Trains on Cloud TPU VMs: queues for the slices, installs this checkout on every
# worker, starts `scaletrain train` there and stays until the run has ended.
#
#   launch/tpu_vm.sh --topology=v5p:4x4x4 --zone=us-east5-a --spot -- \
#       --config=experiments/llama3_8b.py --workdir=/shared/llama3_8b
#
#   --topology=SLICE    such as v5p:4x4x4, v5p-128 or v6e:16x16
#   --num_slices=N      of them (1)
#   --name=NAME         of the queued resource (scaletrain-WORKDIR'S LAST PART)
#   --zone=ZONE --project=ID      (what gcloud is configured with)
#   --spot              capacity that may be taken away, and is queued for again
#   --create=FLAG       one more flag of `queued-resources create`; may be repeated
#   --setup=COMMAND     that every worker runs before it trains, such as a mount
#   --max_restarts=N    in a row without ten minutes of training between them (20)
#   --delete            the slices when the run has ended, however it ended
#   --dry-run           print every command instead of running it
#
# Everything after -- goes to `scaletrain train` unchanged. A preempted slice is deleted
# and queued for again; a run that was interrupted (75) is started again. Ctrl-C leaves
# the run going, and the same command joins it.
# Exit codes: the run's; 75 when it did not get far in --max_restarts attempts.
set -euo pipefail

root="$(cd "$(dirname "$0")/.." && pwd)"
topology="" name="" delete="" dry_run="" setup="" num_slices=1 max_restarts=20
place=(--quiet) create=()
while [[ $# -gt 0 ]]; do
  case "$1" in
    --topology=*) topology="${1#*=}" ;;
    --num_slices=*) num_slices="${1#*=}" ;;
    --name=*) name="${1#*=}" ;;
    --zone=* | --project=*) place+=("$1") ;;
    --spot) create+=("$1") ;;
    --create=*) create+=("${1#*=}") ;;
    --setup=*) setup="${1#*=}" ;;
    --max_restarts=*) max_restarts="${1#*=}" ;;
    --delete) delete=yes ;;
    --dry-run) dry_run=yes ;;
    --topology | --num_slices | --name | --zone | --project | --create | --setup | \
      --max_restarts)
      echo "tpu_vm.sh: $1; no value; write $1=VALUE." >&2
      exit 2
      ;;
    --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --) shift; break ;;
    *) echo "tpu_vm.sh: $1; unknown; see --help." >&2; exit 2 ;;
  esac
  shift
done
cd "$root" # the workers get this checkout: its paths are theirs

say() { echo "tpu_vm.sh: $*" >&2; }

refuse() {
  say "$*"
  exit 2
}

# Runs a command, or prints it as it would be typed.
run() {
  if [[ -z "$dry_run" ]]; then
    "$@"
    return
  fi
  local word plain='^[A-Za-z0-9_./:=,@+-]+$'
  for word in "$@"; do
    if [[ "$word" =~ $plain ]]; then printf '%s ' "$word"; else printf '%s ' "${word@Q}"; fi
  done
  echo
}

queued() { run gcloud compute tpus queued-resources "$@" "${place[@]}"; }

# Every worker of every slice at once: they wait for each other.
on_all() { queued "$@" --node=all --worker=all --batch-size=all; }

# 1. What is asked for, and whether the mesh covers it.
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python="$(dirname "$(command -v scaletrain)")/python3"
said="$("$python" -m scaletrain.preflight --topology="$topology" \
  --num_slices="$num_slices" -- "$@")"
declare -A slice
while IFS='=' read -r key value; do slice["$key"]="$value"; done <<<"$said"
name="${name:-${slice[name]}}"
[[ -n "${slice[runtime]}" ]] ||
  refuse "--topology=$topology; not to be had as TPU VMs; see launch/gke."
[[ "${slice[default_shape]}" == "${slice[shape]}" ]] ||
  refuse "--topology=$topology; ${slice[accelerator_type]} is a" \
    "${slice[default_shape]} here; take that, or launch/gke."
if ((num_slices > 1)); then
  create+=(--node-count="$num_slices" --node-prefix="$name")
else
  create+=(--node-id="$name")
fi

# 2. The code: what git tracks and what it does not ignore, as it is now.
scratch="$(mktemp -d "${TMPDIR:-/tmp}/scaletrain.XXXXXX")"
trap 'rm -rf "$scratch"' EXIT
cp "$(git rev-parse --git-path index)" "$scratch/index"
GIT_INDEX_FILE="$scratch/index" git add --all
tree="$(GIT_INDEX_FILE="$scratch/index" git write-tree)"
git cat-file -e "$tree:${slice[config]}" 2>/dev/null ||
  refuse "--config=${slice[config]}; not a file of $root, which is all that the" \
    "workers get; put it there, and name it from there."
git archive --format=tar.gz --output="$scratch/$name.tar.gz" "$tree"
there="scaletrain/${tree:0:12}"
worker="$there/launch/tpu_worker.sh"

# Prints the state of the queued resource, NONE when there is none.
state() {
  local said
  if said="$(queued describe "$name" --format='value(state.state)' 2>&1)"; then
    echo "${said##*$'\n'}" # warnings come first
  elif [[ "$said" == *NOT_FOUND* ]]; then
    echo NONE
  else
    say "$said"
    echo UNKNOWN
  fi
}

order() {
  queued create "$name" --accelerator-type="${slice[accelerator_type]}" \
    --runtime-version="${slice[runtime]}" "${create[@]}"
}

# Returns when the slices are there; what is left of preempted ones is deleted first.
acquire() {
  local now before=""
  while :; do
    now="$(state)"
    [[ "$now" == "$before" ]] || say "$name is $now"
    before="$now"
    case "$now" in
      ACTIVE) return ;;
      NONE) order || return ;;
      SUSPENDED) queued delete "$name" --force || return ;;
      FAILED)
        queued delete "$name" --force
        return 1
        ;;
      *) sleep 30 ;;
    esac
  done
}

# Brings the code to the workers, unless these have it.
install() {
  [[ -z "$installed" ]] || return 0
  local unpack="mkdir -p $there && tar -xzf $name.tar.gz -C $there"
  on_all scp "$scratch/$name.tar.gz" "$name:" || return
  on_all ssh "$name" \
    --command="$unpack && $worker install $(printf '%q' "$setup")" || return
  installed=yes
}

train() {
  on_all ssh "$name" --command="$worker train $name $(printf '%q ' "$@")"
}

finish() {
  [[ -z "$delete" ]] || queued delete "$name" --force || say "could not delete $name"
  exit "$1"
}

installed=""
if [[ -n "$dry_run" ]]; then
  order
  queued describe "$name" --format='value(state.state)'
  install
  train "$@"
  finish 0
fi

# 3. Attempts, until the run has ended. The worker adds 100 to the run's exit code, so
# that it is told from gcloud's own.
trap 'say "the run goes on; the same command joins it"; exit 130' INT
restarts=0 pause=10
while :; do
  began=$SECONDS code=75
  if acquire && install; then
    began=$SECONDS code=0
    train "$@" || code=$?
  fi
  case "$code" in
    0) finish 0 ;;
    102) finish 2 ;;
    101) [[ "$(state)" != ACTIVE ]] || finish 1 ;; # else its end was the preemption's
    175) ;;
    *) installed="" ;; # nothing is known of workers that gcloud did not reach
  esac
  ((SECONDS - began < 600)) || restarts=0 pause=10
  ((restarts++ < max_restarts)) || {
    say "$max_restarts restarts in a row without ten minutes of training; given up"
    finish 75
  }
  say "attempt ended with $code; starting again in $pause s"
  sleep "$pause"
  pause=$((pause * 2 < 600 ? pause * 2 : 600))
done
