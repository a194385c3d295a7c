"""The teacher alone: flow matching on 14x14 fashion images.

python -m experiments.train \\
  --config=configs/flow_matching_fashion14.py --workdir=/tmp/x

Expected (1 seed): FCD 3.3 to 3.4 at 20 steps, 38 to 41 at 1 (floor .3); about
130 CPU seconds.

Arguments: runlocal (seconds, for CI), seed=<int>.
"""

from configs import base
from distilljax.train import config as config_lib


def get_config(arg=None):
  arg = config_lib.parse_arg(arg, runlocal=False, seed=0)
  config = base.fashion14(
    "Fashion images by flow matching", small=arg.runlocal, seed=arg.seed
  )
  config.stages = ("teacher",)
  config.evaluation.teacher_steps = (20, 8, 4, 2, 1)
  return config
