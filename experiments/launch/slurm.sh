#!/bin/bash
# Trains on the nodes of a SLURM job; submit it from the root of the checkout:
#
#   sbatch --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 \
#     experiments/launch/slurm.sh \
#     --config=experiments/configs/continued_training.py:mini \
#     --workdir=/shared/runs/mini --config.mesh.fsdp=32
#
# The arguments are those of experiments/continued_training.py. One process a
# node takes all GPUs of the node; with --ntasks-per-node=8 each takes one. The
# work directory and the checkout must lie on a file system that all nodes see.
# PYTHON is the interpreter. DRY_RUN=1 prints what would run, in any shell.
#
#SBATCH --job-name=dsv32
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
# A lost node or a preemption puts the job back into the queue; the same command
# then goes on from the newest checkpoint.
#SBATCH --requeue
# Two minutes before the time limit every process gets SIGTERM: they agree on a
# step, save, and end.
#SBATCH --signal=TERM@120
set -u

cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
command=(
  srun
  # When a process is lost the others notice, say so and end within a minute;
  # what is left then is killed.
  --kill-on-bad-exit=0
  --wait=45
  --label
  "${PYTHON:-python}" experiments/continued_training.py "$@"
)
if [[ -n "${DRY_RUN:-}" ]]; then
  printf '%q ' "${command[@]}"
  printf '\n'
  exit
fi
"${command[@]}"
status=$?
if ((status != 0)); then
  echo "The job ended with status $status. Once the cause (above) is gone," >&2
  echo "submit the same command again: it goes on from the newest" >&2
  echo "checkpoint, on the same or another number of nodes." >&2
fi
exit "$status"
