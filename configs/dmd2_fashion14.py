"""The main job: a teacher of 14x14 fashion images and its one-step student.

python -m experiments.train --config=configs/dmd2_fashion14.py --workdir=/tmp/x

Arguments: runlocal (seconds, for CI), seed=<int>.
"""

from configs import base
from distilljax.train import config as config_lib


def get_config(arg=None):
  arg = config_lib.parse_arg(arg, runlocal=False, seed=0)
  small = arg.runlocal
  config = base.base(
      "Fashion images in one step: DMD2 from a small flow-matching teacher",
      data="fashion14",
      batch_size=64,
  )
  config.seed = arg.seed
  config.stages = ("teacher", "student")
  config.model = {"kind": "unet", "channels": 16 if small else 32}
  config.teacher = base.image_teacher(20 if small else 1200, 2e-3)
  config.student = base.stage(
      "dmd2",
      20 if small else 700,
      networks={
          "student": {"start": "teacher"},
          "critic": {"start": "teacher"},
          "teacher": {"start": "teacher"},
      },
      optimizers={
          "student": {
              "learning_rate": 2e-4,
              "b1": 0.0,
              "b2": 0.99,
              "schedule": "cosine",
              "clip_norm": 10.0,
          },
          "critic": {
              "learning_rate": 5e-4,
              "b1": 0.0,
              "b2": 0.99,
              "clip_norm": 10.0,
          },
      },
      hyper={
          "ratio": 2,
          "gan_weight": 0.0,
          "gan_critic_weight": 0.0,
          "ema_decay": 0.995,
      },
  )
  if small:
    config.data.rows = 1024
    config.evaluation.n = 200
    config.evaluation.watches = 0
  return config
