"""MeanFlow in the plane, distilled from the exact velocity of a ring's modes.

python -m experiments.train --config=configs/mean_flow_ring8.py --workdir=/tmp/x

`map_rmse` is the distance to the exact end point of the same latent.

Expected (3 seeds): RMSE to the exact map .167 to .175 at 1 step, .118 to .122
with identity=lagrangian; about 45 CPU seconds.

Arguments: runlocal (seconds, for CI), source=teacher|data, identity=eulerian|
lagrangian, seed=<int>.
"""

from configs import base
from distilljax.train import config as config_lib


def get_config(arg=None):
  arg = config_lib.parse_arg(
    arg, runlocal=False, source="teacher", identity="eulerian", seed=0
  )
  small = arg.runlocal
  config = base.ring8(
    "Eight modes on a ring in one step: MeanFlow from the exact velocity",
    small=small,
    seed=arg.seed,
  )
  config.model = {"kind": "mlp", "width": 96, "depth": 3, "max_frequency": 3.0}
  config.stages = ("student",)
  networks = {"student": {"start": "scratch", "second_time": True}}
  if arg.source == "teacher":
    networks["teacher"] = {"start": "exact"}
  config.student = base.stage(
    "mean_flow",
    50 if small else 6000,
    networks=networks,
    optimizers={"student": {"learning_rate": 1e-3, "schedule": "cosine"}},
    hyper={
      "source": arg.source,
      "identity": arg.identity,
      "time_distribution": "uniform",
      "equal": 0.5,
      "t_one": 0.2,
      "r_zero": 0.2,
      "norm_p": 0.5,
      "norm_eps": 0.01,
      "ema_decay": 0.995,
    },
  )
  config.evaluation.student_steps = (1, 2)
  return config
