#!/usr/bin/env bash
# A run on the nodes of one Slurm job: sbatch deploy/slurm.sh RECIPE RUN [--set KEY=VALUE ...]
# Not run on a Slurm: a test runs it with stand-ins for srun, scontrol, ray and equipoise.
# The checkout, its environment and RECIPE's files are at the same places on all nodes.
#SBATCH --job-name=equipoise
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGTERM comes 600 s before the time is over, or a preemption: a step and a checkpoint long. A run
# that was requeued goes on in RUN.
set -euo pipefail
umask 077

recipe=$1 run=$2
shift 2
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(head -n 1 <<<"$nodes")
count=$(wc -l <<<"$nodes")
port=${RAY_PORT:-6379}

# In the environment of this job's processes and nowhere else.
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE RAY_AUTH_TOKEN

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --block --port="$port" --labels=role=learner &
parts=($!)
if ((count > 1)); then
  # shellcheck disable=SC2016 # it is the inner shell that puts the address in
  srun --overlap --nodes=$((count - 1)) --ntasks=$((count - 1)) --exclude="$head" \
    bash -c 'until ray start --block --address="$0" --labels=role=sampler; do sleep 5; done' \
    "$head:$port" &
  parts+=($!)
fi

words=("$recipe" --output "$run")
if compgen -G "$run/checkpoints/step-*" >/dev/null; then
  words=(--resume "$run")
fi
# The batch shell is on the first node of the job, as the head is.
equipoise train "${words[@]}" --address "$head:$port" "$@" &
driver=$!
trap 'kill -TERM "$driver"' TERM
code=0
wait "$driver" || code=$?
while kill -0 "$driver" 2>/dev/null; do # the signal ended the wait, not the run
  code=0
  wait "$driver" || code=$?
done
trap - TERM
kill "${parts[@]}" 2>/dev/null || true
exit "$code"
