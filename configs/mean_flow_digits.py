"""MeanFlow distilled from a small transformer of 8x8 digits.

python -m experiments.train \\
  --config=configs/mean_flow_digits.py --workdir=/tmp/x

Expected (3 seeds): FCD 4.2 to 4.7 for the student at 1 step and 2.7 to 3.0 at
2, 52 to 62 for the teacher at 1; about 165 CPU seconds.

Arguments: runlocal (seconds, for CI), seed=<int>.
"""

from configs import base
from distilljax.train import config as config_lib


def get_config(arg=None):
  arg = config_lib.parse_arg(arg, runlocal=False, seed=0)
  config = base.digits(
    "Digits in one step: MeanFlow from a small transformer",
    small=arg.runlocal,
    seed=arg.seed,
  )
  config.stages = ("teacher", "student")
  config.student = base.mean_flow_images(20 if arg.runlocal else 1000)
  return config
