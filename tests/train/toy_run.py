"""Runs the toy method in a process of its own, for the tests that kill it.

python -m tests.train.toy_run <workdir> <steps> <seconds a step> [limit bytes]
"""

import os
import pathlib
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"

from distilljax import train
from tests.train import toy


class Slow(train.Hook):
  """Says every step aloud and takes its time, so that a kill can hit it."""

  def __init__(self, seconds):
    self.seconds = seconds

  def on_step(self, moment):
    print(f"step {moment.step}", flush=True)
    time.sleep(self.seconds)


class LimitFiles(train.Hook):
  """From step 8 on, no file may grow beyond `limit` bytes: a full disk."""

  def __init__(self, limit, written):
    self.limit = limit
    self.written = written  # the checkpoint before, which is to be whole

  def on_step(self, moment):
    import resource

    if moment.step == 8:
      while not self.written.exists():
        time.sleep(0.01)
      resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))


def main():
  workdir, steps, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
  hooks = [Slow(seconds)]
  if len(sys.argv) > 4:
    written = pathlib.Path(workdir, "checkpoints", "one", "4")
    hooks.append(LimitFiles(int(sys.argv[4]), written))
  pathlib.Path(workdir).mkdir(exist_ok=True)
  try:
    result = train.run(
      [toy.stage(steps, "one"), toy.stage(steps, "two")],
      workdir,
      log_every=3,
      checkpoint_every=4,
      hooks=hooks,
    )
  except (train.Interrupted, train.SaveError) as e:
    print(f"stopped: {e}", flush=True)
    sys.exit(0 if isinstance(e, train.Interrupted) else 1)
  for stage, params in result.params.items():
    print("sha", stage, train.params_sha256(params["student"]), flush=True)


if __name__ == "__main__":
  main()
