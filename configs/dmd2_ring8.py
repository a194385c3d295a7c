"""DMD2 in the plane: eight modes on a ring, a closed-form teacher, no GAN.

python -m experiments.train --config=configs/dmd2_ring8.py --workdir=/tmp/x

The critic is the closed-form denoiser plus a network that starts at zero. The
warm-up regresses the student on 512 ODE pairs, which is what keeps the
frequencies of the modes right.

Expected (3 seeds): 8 modes of 8, their frequencies at a total variation of .02
from equal (.06 to .13 without the warm-up), sliced Wasserstein .06 (.15 to
.17); about 65 CPU seconds.

Arguments: runlocal (seconds, for CI), warmup=<bool> (default true), seed=<int>.
"""

from configs import base
from distilljax.train import config as config_lib


def get_config(arg=None):
  arg = config_lib.parse_arg(arg, runlocal=False, warmup=True, seed=0)
  small = arg.runlocal
  config = base.ring8(
    "Eight modes on a ring in one step: DMD2 from the exact teacher",
    small=small,
    seed=arg.seed,
  )
  config.model = {"kind": "mlp", "width": 64, "depth": 3, "max_frequency": 3.0}
  config.stages = ("warmup", "student") if arg.warmup else ("student",)
  if arg.warmup:
    config.warmup = base.regression(20 if small else 3000, rows=512)
    config.warmup.hyper.prediction = "velocity"
  config.student = base.stage(
    "dmd2",
    50 if small else 15000,
    networks={
      "student": {"start": "warmup" if arg.warmup else "scratch"},
      "critic": {"start": "exact", "correction": True},
      "teacher": {"start": "exact"},
    },
    optimizers={
      # at 1e-3 the student loses what the warm-up gave it
      "student": {
        "learning_rate": 3e-4,
        "b1": 0.0,
        "b2": 0.99,
        "schedule": "cosine",
      },
      "critic": {
        "learning_rate": 1e-3,
        "b1": 0.0,
        "b2": 0.99,
        "schedule": "cosine",
      },
    },
    hyper={
      # velocity: what the critic adds to the closed form is scaled by t
      "prediction": "velocity",
      "ratio": 5,
      # sigma / alpha log-uniform in [.05, 5], both for student and critic
      "time_distribution": "log_sigma",
      "t_min": 0.05 / 1.05,
      "t_max": 5 / 6,
      "critic_t_min": 0.05 / 1.05,
      "critic_t_max": 5 / 6,
      "gan_weight": 0.0,
      "gan_critic_weight": 0.0,
      "ema_decay": 0.99,
    },
  )
  config.evaluation.student_steps = (1,)
  return config
