"""G-OPD where every number is exact: a Markov model of 8 tokens.

python -m experiments.train_lm --config=configs/gopd_markov.py --workdir=/tmp/x

A student starts at the base and is distilled on its own samples towards a
teacher that moved half a reward away from the base, at reward scales from 0
(back to the base) over 1 (the teacher) to 2 (past it). KL to the optimum
T^lambda R^(1-lambda) and expected return are finite sums, no sample enters
them.

Expected (3 tables): KL to the optimum below 1e-4 at every scale in the full
form, and a return that rises with the scale on every table; 17 CPU seconds.

Arguments: runlocal (seconds, for CI), form=full|sampled, seed=<int>.
"""

from configs import base
from distilljax.train import config as config_lib

SCALES = (0.0, 1.0, 1.25, 1.5, 2.0)


def get_config(arg=None):
  arg = config_lib.parse_arg(arg, runlocal=False, form="full", seed=0)
  small = arg.runlocal
  config = base.language(
    "Past the teacher, exactly: G-OPD on a Markov model",
    "markov",
    task={
      "vocab_size": 8,
      "length": 6,  # tokens, the uniformly drawn first one included
      "tilt": 0.5,  # the teacher is base + tilt * reward
    },
    seed=arg.seed,
    seeds=1 if small else 3,  # tables
  )
  config.model = {"kind": "markov"}
  scales = (1.0, 2.0) if small else SCALES
  names = {f"scale_{round(100 * s):03d}": s for s in scales}
  config.stages = tuple(names)
  for name, scale in names.items():
    config[name] = base.on_policy(
      scale,
      {
        "student": {"start": "base"},
        "teacher": {"start": "teacher"},
        "reference": {"start": "base"},
      },
      20 if small else 150,
      0.05,
      clip_norm=1e6,
      schedule="constant" if arg.form == "full" else "linear",
      hyper={"form": arg.form},
    )
  config.evaluation.update(
    headline="return",
    n=0,  # exact
    models=("base", "teacher", *names),
    labels={n: f"reward scale {s:g}" for n, s in names.items()},
    teacher="teacher",
    sweep={
      "hyper": "reward_scale",
      "stages": tuple(names),
      "metrics": ("target_kl", "return"),
    },
  )
  return config
