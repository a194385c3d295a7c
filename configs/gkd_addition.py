"""GKD on sums: a teacher and a smaller student, half of the batches its own.

python -m experiments.train_lm --config=configs/gkd_addition.py --workdir=/tmp/x

The task: two-digit sums with the digits of the answer reversed ("12+34=" ->
"640"), scored on held-out sums. The teacher is fine-tuned on solutions, the
student starts from nothing and learns the teacher's distributions on data and
on its own samples in equal parts.

Expected (3 students): .929, .556, .945 of sampled answers right, teacher .943,
see docs/methods/gkd.md; 75 CPU seconds.

Arguments: runlocal (seconds, for CI), on_policy=<share>, beta=<float>,
seed=<int>, seeds=<int>.
"""

from configs import base
from distilljax.train import config as config_lib


def get_config(arg=None):
  arg = config_lib.parse_arg(
    arg, runlocal=False, on_policy=0.5, beta=0.5, seed=0, seeds=3
  )
  config = base.addition_teacher(
    "Sums from a teacher, on data and on own samples",
    small=arg.runlocal,
    seed=arg.seed,
    seeds=arg.seeds,
  )
  config.stages = ("teacher", "student")
  config.student = base.language_stage(
    "gkd",
    2 if arg.runlocal else 1000,
    {
      "student": {"start": "scratch", "model": base.shallow(arg.runlocal)},
      "teacher": {"start": "teacher"},
    },
    5e-3,
    {
      "on_policy": arg.on_policy,  # share of batches the student samples
      "beta": arg.beta,
      "sampling_temperature": 1.0,
    },
    schedule="cosine",
    warmup=0 if arg.runlocal else 20,
    repeat=True,
  )
  return config
