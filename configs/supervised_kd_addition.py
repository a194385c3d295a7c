"""Supervised distillation on sums: a teacher and a smaller student.

python -m experiments.train_lm \\
  --config=configs/supervised_kd_addition.py --workdir=/tmp/x

The task and the teacher of configs/gkd_addition.py; the student learns the
teacher's distributions on given solutions (`source=data`) or on what the
teacher samples (`source=teacher`).

Expected (3 students): .928 to .940 of sampled answers right, teacher .943, see
docs/methods/supervised_kd.md; 60 CPU seconds.

Arguments: runlocal (seconds, for CI), source=data|teacher,
objective=forward_kl|cross_entropy, seed=<int>, seeds=<int>.
"""

from configs import base
from distilljax.train import config as config_lib


def get_config(arg=None):
  arg = config_lib.parse_arg(
    arg,
    runlocal=False,
    source="data",
    objective="forward_kl",
    seed=0,
    seeds=3,
  )
  config = base.addition_teacher(
    "Sums from a teacher's distributions",
    small=arg.runlocal,
    seed=arg.seed,
    seeds=arg.seeds,
  )
  config.stages = ("teacher", "student")
  networks = {
    "student": {"start": "scratch", "model": base.shallow(arg.runlocal)}
  }
  if (arg.source, arg.objective) != ("data", "cross_entropy"):
    networks["teacher"] = {"start": "teacher"}
  config.student = base.language_stage(
    "supervised_kd",
    2 if arg.runlocal else 1000,
    networks,
    5e-3,
    {"source": arg.source, "objective": arg.objective},
    schedule="cosine",
    warmup=0 if arg.runlocal else 20,
    repeat=True,
  )
  return config
