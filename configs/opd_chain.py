"""Distilling a small language model: on its own samples, or the teacher's.

python -m experiments.train_lm --config=configs/opd_chain.py --workdir=/tmp/x

The task: chains of four operations mod 10 with their trace ("3+4*2-1*7=" ->
"7437"), scored on 1,000 held-out prompts. A base is fine-tuned on solutions,
the teacher is trained from it by reinforcement learning (GRPO, reward for a
right trace), and students of half the width start from one warm model
(forward KL on the teacher's samples): `kd` goes on that way, `kd_ce` learns the
teacher's samples alone, `opd` its own samples by reverse KL.

Expected (3 students each): .522 +- .009 of sampled answers right on-policy,
.441 +- .017 supervised, .427 +- .024 from the teacher's tokens, teacher .479,
base .382; more in docs/methods/gopd.md. 240 CPU seconds.

Arguments: runlocal (seconds, for CI), seed=<int>, seeds=<int>.
"""

from configs import base
from distilljax.train import config as config_lib


def get_config(arg=None):
  arg = config_lib.parse_arg(arg, runlocal=False, seed=0, seeds=3)
  small = arg.runlocal
  config = base.chain_teacher(
    "A small language model distilled on its own samples",
    small=small,
    seed=arg.seed,
    seeds=arg.seeds,
  )
  config.stages = ("base", "teacher", "warm", "kd_ce", "kd", "opd")
  config.warm = base.language_stage(
    "supervised_kd",
    4 if small else 600,
    {
      "student": {"start": "scratch", "model": base.narrow(small)},
      "teacher": {"start": "teacher"},
    },
    2e-3,
    {"source": "teacher"},
    warmup=2 if small else 20,
    repeat=True,
  )
  pair = {"student": {"start": "warm"}, "teacher": {"start": "teacher"}}
  steps = 2 if small else 300
  for name, objective in (("kd_ce", "cross_entropy"), ("kd", "forward_kl")):
    config[name] = base.language_stage(
      "supervised_kd",
      steps,
      pair,
      2e-3,
      {"source": "teacher", "objective": objective},
      repeat=True,
    )
  config.opd = base.on_policy(1.0, pair, steps, 2e-3)
  config.evaluation.update(
    models=config.stages,
    labels={
      "base": "base",
      "teacher": "teacher (GRPO)",
      "warm": "student, warm start",
      "kd_ce": "student, teacher's tokens",
      "kd": "student, supervised KD",
      "opd": "student, on-policy",
    },
    rollouts=("warm", "kd", "opd", "teacher"),
    watches=0 if small else 3,
  )
  return config
