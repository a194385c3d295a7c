#!/usr/bin/env bash
# One run on all hosts of a Cloud TPU slice. Edit the block, run it anywhere
# where gcloud is set up. The same command resumes.
set -euo pipefail

TPU=my-slice                  # name of the TPU VM
ZONE=us-east5-a               # where it is
REPO=distilljax               # folder of the checkout on every host
CONFIG=configs/dmd2_fashion14.py
WORKDIR=/mnt/shared/dmd2      # the same folder on every host
RULES=fsdp                    # dp, fsdp, fsdp+tensor or fsdp+context

# JAX reads the slice's hosts itself; "on" fails where it cannot.
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
  cd $REPO && python -m experiments.train --distributed=on --config=$CONFIG \
    --workdir=$WORKDIR --config.run.rules=$RULES"
