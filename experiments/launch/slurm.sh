#!/usr/bin/env bash
# One run on GPU nodes under Slurm: a process a node, all its GPUs.
# Edit the block and `sbatch experiments/launch/slurm.sh` from the checkout.
#SBATCH --job-name=distilljax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

CONFIG=configs/dmd2_fashion14.py
WORKDIR=$HOME/runs/dmd2       # on a file system that all nodes share
RULES=fsdp                    # dp, fsdp, fsdp+tensor or fsdp+context

# JAX takes one GPU a task by default; here a task has the whole node.
export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7
# TERM comes two minutes before the end: the run saves and resumes next time.
srun --kill-on-bad-exit=1 python -m experiments.train --distributed=on \
  --config="$CONFIG" --workdir="$WORKDIR" --config.run.rules="$RULES"
