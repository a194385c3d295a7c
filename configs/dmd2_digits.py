"""DMD2 on 8x8 digits with a small transformer: the fastest image job.

python -m experiments.train --config=configs/dmd2_digits.py --workdir=/tmp/x

Expected (3 seeds): FCD 5.4 to 5.7 for the student at 1 step, 52 to 62 for the
teacher at 1 and 2.2 at 20; about 180 CPU seconds.

Arguments: runlocal (seconds, for CI), seed=<int>.
"""

from configs import base
from distilljax.train import config as config_lib


def get_config(arg=None):
  arg = config_lib.parse_arg(arg, runlocal=False, seed=0)
  config = base.digits(
    "Digits in one step: DMD2 from a small transformer",
    small=arg.runlocal,
    seed=arg.seed,
  )
  config.stages = ("teacher", "student")
  config.student = base.dmd2_images(20 if arg.runlocal else 800)
  return config
