#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as a JobSet in kubectl's current context.
#
#   launch/gke/jobset.sh --topology=v5p:4x4x4 --image=IMAGE --claim=CLAIM --spot -- \
#       --config=experiments/llama3_8b.py --workdir=/shared/llama3_8b
#
#   --topology=SLICE    such as v5p:4x4x4 or v6e:16x16
#   --num_slices=N      of them (1)
#   --image=IMAGE       with scaletrain and the experiment, see launch/gke/Dockerfile
#   --claim=CLAIM       a PersistentVolumeClaim that all pods may write to
#   --mount=DIR         where they see it (/shared)
#   --name=NAME         of the JobSet (scaletrain-WORKDIR'S LAST PART)
#   --spot              nodes that may be taken away
#   --dry-run           print the manifest and the command instead of running it
#
# Everything after -- goes to `scaletrain train` unchanged. The cluster starts the run
# again when a pod is lost or exits with 75, and ends it when one exits with 1 or 2.
# Exit codes: kubectl's; 2 when the request cannot be honoured.
set -euo pipefail

root="$(cd "$(dirname "$0")/../.." && pwd)"
dry_run="" options=()
while [[ $# -gt 0 ]]; do
  case "$1" in
    --dry-run) dry_run=yes ;;
    --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --) shift; break ;;
    *) options+=("$1") ;;
  esac
  shift
done
cd "$root" # the image holds this checkout: its paths are the pods'

python="$root/.venv/bin/python"
[[ -x "$python" ]] || python="$(dirname "$(command -v scaletrain)")/python3"
manifest="$("$python" launch/gke/render.py "${options[@]}" -- "$@")"
if [[ -n "$dry_run" ]]; then
  printf "kubectl apply --filename=- <<'END'\n%s\nEND\n" "$manifest"
else
  kubectl apply --filename=- <<<"$manifest"
fi
