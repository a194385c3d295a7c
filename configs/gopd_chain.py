"""Does extrapolation pass an RL teacher on chains? The search for a gain.

python -m experiments.train_lm --config=configs/gopd_chain.py --workdir=/tmp/x

Base and teacher as in configs/opd_chain.py (the teacher's reward is the whole
trace, so that there is no shortcut to extrapolate); students of the same size
start at the base and are distilled with G-OPD at reward scales 1, 1.25 and 1.5,
the base as reference.

Expected (3 students a scale): no gain: .473, .473, .477 of sampled answers
right, teacher .479, see docs/methods/gopd.md; 160 CPU seconds.

Arguments: runlocal (seconds, for CI), seed=<int>, seeds=<int>.
"""

from configs import base
from distilljax.train import config as config_lib

SCALES = (1.0, 1.25, 1.5)


def get_config(arg=None):
  arg = config_lib.parse_arg(arg, runlocal=False, seed=0, seeds=3)
  small = arg.runlocal
  config = base.chain_teacher(
    "Past an RL teacher on chains: reward scales 1 to 1.5",
    small=small,
    seed=arg.seed,
    seeds=arg.seeds,
  )
  names = {f"scale_{round(100 * s):03d}": s for s in SCALES}
  config.stages = ("base", "teacher", *names)
  for name, scale in names.items():
    config[name] = base.on_policy(
      scale,
      {
        "student": {"start": "base"},
        "teacher": {"start": "teacher"},
        "reference": {"start": "base"},
      },
      2 if small else 150,
      1e-3,
    )
  config.evaluation.update(
    models=config.stages,
    labels={
      "teacher": "teacher (GRPO)",
      **{n: f"reward scale {s:g}" for n, s in names.items()},
    },
    rollouts=("base", "teacher", "scale_100", "scale_150"),
    sweep={
      "hyper": "reward_scale",
      "stages": tuple(names),
      "metrics": ("answer", "trace", "reverse_kl"),
    },
  )
  return config
