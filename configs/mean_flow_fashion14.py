"""MeanFlow distilled from a small teacher of 14x14 fashion images.

python -m experiments.train \\
  --config=configs/mean_flow_fashion14.py --workdir=/tmp/x

Expected (3 seeds): FCD 4.1 for the student at 1 step and 3.3 at 2, 3.3 for the
teacher at 20 steps and 41 at 1; about 260 CPU seconds.

Arguments: runlocal (seconds, for CI), seed=<int>.
"""

from configs import base
from distilljax.train import config as config_lib


def get_config(arg=None):
  arg = config_lib.parse_arg(arg, runlocal=False, seed=0)
  config = base.fashion14(
    "Fashion images in one step: MeanFlow from a small teacher",
    small=arg.runlocal,
    seed=arg.seed,
  )
  config.stages = ("teacher", "student")
  config.student = base.mean_flow_images(20 if arg.runlocal else 1000)
  return config
