#!/usr/bin/env bash
# launch/slurm.sbatch on a Slurm of this machine: a controller and two nodes.
#
#   make slurm      needs Debian's slurmctld, slurmd, slurm-client and munge
#
# Two tasks of four fake devices train; every process is told to stop in the middle, the
# job is queued again, and ends with the losses of one process that nobody disturbed.
# Another job is cancelled and stays so. Whatever becomes of it, nothing is left running.
set -euo pipefail
cd "$(dirname "$0")/.."

for program in munged slurmctld slurmd sbatch; do
  PATH="$PATH:/usr/sbin" command -v "$program" >/dev/null || {
    echo "slurm.sh: no $program; apt-get install slurmctld slurmd slurm-client munge" >&2
    exit 2
  }
done
PATH="$PATH:/usr/sbin"

limit_s=900 # for all of it
scratch="$(mktemp -d)"
daemons=()
export SLURM_CONF="$scratch/slurm.conf"
# Jobs are no children of this shell, nor of the daemons, and may be stopped or deaf to
# signals. What they all have is this cluster in their environment.
left_() {
  env --unset=SLURM_CONF grep --files-with-matches --null-data --line-regexp \
    --fixed-strings "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ 2>/dev/null | cut -d / -f 3
}
leave() {
  local code=$? left try
  timeout 5 scancel --user="$USER" 2>/dev/null || true
  for _ in $(seq 25); do [[ -n "$(timeout 2 squeue --noheader 2>/dev/null)" ]] || break; sleep 0.2; done
  ((${#daemons[@]} == 0)) || kill "${daemons[@]}" 2>/dev/null || true
  for try in $(seq 50); do # two seconds to end by themselves
    mapfile -t left < <(left_)
    ((${#left[@]})) || break
    ((try < 10)) || kill -KILL "${left[@]}" 2>/dev/null || true
    sleep 0.2
  done
  wait 2>/dev/null
  if ((code)); then tail -n 40 "$scratch"/*.log "$scratch"/*.out >&2 || true; fi
  rm -rf "$scratch"
}
trap leave EXIT
USER="${USER:-$(id --name --user)}"

start() { # NAME COMMAND..., in the background
  "${@:2}" >"$scratch/$1.out" 2>&1 &
  daemons+=($!)
}

until_() { # waits for a command to hold, while there is time
  while ((SECONDS < limit_s)); do
    if "$@"; then return; fi
    for daemon in "${daemons[@]}"; do kill -0 "$daemon"; done
    sleep 0.2
  done
  echo "slurm.sh: never came true: $*" >&2
  exit 1
}

# 1. The cluster. The nodes' names resolve, as on any other. A job is started again when
# its credential has expired, which takes two minutes otherwise.
port=$((20000 + RANDOM % 10000))
chmod 755 "$scratch"
mkdir "$scratch/state" "$scratch"/spool.127.0.0.{1,2}
touch "$scratch"/gpu{0..3}
head -c 1024 /dev/urandom >"$scratch/munge.key"
chmod 600 "$scratch/munge.key"
echo "Name=gpu File=$scratch/gpu[0-3]" >"$scratch/gres.conf"
cat >"$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort=$port
SlurmUser=$USER
SlurmdUser=$USER
AuthType=auth/munge
AuthInfo=socket=$scratch/munge.socket,cred_expire=10
StateSaveLocation=$scratch/state
SlurmdSpoolDir=$scratch/spool.%n
SlurmctldPidFile=$scratch/slurmctld.pid
SlurmdPidFile=$scratch/slurmd.%n.pid
SlurmctldLogFile=$scratch/slurmctld.log
SlurmdLogFile=$scratch/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
GresTypes=gpu
NodeName=127.0.0.[1-2] NodeHostname=localhost Port=[$((port + 1))-$((port + 2))] CPUs=1 Gres=gpu:4
PartitionName=all Nodes=127.0.0.[1-2] Default=YES State=UP
END
start munged munged --foreground --force --key-file="$scratch/munge.key" \
  --socket="$scratch/munge.socket" --pid-file="$scratch/munged.pid" \
  --log-file="$scratch/munged.log" --seed-file="$scratch/munge.seed"
until_ test -S "$scratch/munge.socket"
start slurmctld slurmctld -c -D
for node in 127.0.0.1 127.0.0.2; do start "$node" slurmd -D -N "$node"; done
idle() { [[ "$(timeout 2 sinfo --noheader --format=%T,%D 2>/dev/null)" == idle,2 ]]; }
until_ idle
sinfo

# 2. What is trained, and by one process.
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8
options=(
  --config=experiments/quickstart.py --config.num_steps=120 --config.log_every_steps=1
  --config.batch_size=8 --config.seq_len=64 --config.optim.warmup_steps=5
  --config.model.num_layers=2 --config.model.d_model=64 --config.model.d_ff=128
  --config.model.vocab_size=272 --config.eval_every_steps=0
  --config.checkpoint.every_steps=0 --config.mesh.data=-1
  --config.data.source=files "--config.data.path=$PWD/tests/*.py" --config.data.validation_fraction=0
  --config.data.tokenizer=bytes "--config.data.cache_dir=$scratch/cache"
)
timeout --foreground "$limit_s" \
  .venv/bin/scaletrain train "${options[@]}" --workdir="$scratch/one" >/dev/null 2>"$scratch/one.log"

# 3. The job: stopped in the middle, queued again, done.
export JAX_NUM_CPU_DEVICES=4
workdir="$scratch/work dir's"
submit() {
  sbatch --parsable --nodes=2 --gpus-per-node=4 --output="$scratch/%j.out" \
    launch/slurm.sbatch "${options[@]}" "$@"
}
taken() { [[ -f "$workdir/metrics.jsonl" ]] && (($(wc -l <"$workdir/metrics.jsonl") > $1)); }
field() { timeout 10 scontrol show job "$job" | tr ' ' '\n' | sed -n "s/^$1=//p"; }
is() { [[ "$(field "$1")" == "$2" ]]; }
job="$(submit --workdir="$workdir")"
until_ taken 10
scancel --signal=TERM "$job"
until_ is Restarts 1
echo "job $job was queued again"
ended() { [[ "$(field JobState)" =~ ^(COMPLETED|FAILED)$ ]]; }
until_ ended
is JobState COMPLETED
grep --extended-regexp '^(processes|scaletrain|srun: error|slurm.sbatch|resuming)' "$scratch/$job.out"
.venv/bin/python - "$scratch/one/metrics.jsonl" "$workdir/metrics.jsonl" <<'END'
import json
import sys

one, two = (
    {r["step"]: r["loss"] for r in map(json.loads, open(path)) if "loss" in r}
    for path in sys.argv[1:]
)
assert sorted(one) == sorted(two) == list(range(1, 121)), (sorted(one), sorted(two))
worst = max(abs(two[s] - one[s]) / one[s] for s in one)
print(f"120 losses of two tasks x 4 devices differ by {worst:.1e} at most")
assert worst < 1e-5
END

# 4. A job that is cancelled.
job="$(submit --workdir="$scratch/cancelled" --config.num_steps=100000)"
workdir="$scratch/cancelled"
until_ taken 3
scancel "$job"
until_ is JobState CANCELLED
sleep 3
is JobState CANCELLED && is Restarts 0
echo "job $job was cancelled and stays so"
