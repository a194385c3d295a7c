"""Regression on exact ODE pairs in the plane: the warm-up by itself.

python -m experiments.train \\
  --config=configs/ode_regression_ring8.py --workdir=/tmp/x

Expected: see docs/methods/ode_regression.md; about 40 CPU seconds.

Arguments: runlocal (seconds, for CI), seed=<int>.
"""

from configs import base
from distilljax.train import config as config_lib


def get_config(arg=None):
  arg = config_lib.parse_arg(arg, runlocal=False, seed=0)
  config = base.ring8(
    "Eight modes on a ring in one step: regression on exact ODE pairs",
    small=arg.runlocal,
    seed=arg.seed,
  )
  config.model = {"kind": "mlp", "width": 96, "depth": 3, "max_frequency": 3.0}
  config.stages = ("student",)
  config.student = (
    base.regression(50, rows=512)
    if arg.runlocal
    else base.regression(6000, rows=65536)
  )
  config.evaluation.student_steps = (1,)
  return config
