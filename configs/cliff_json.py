"""Is a format lost above the predicted reward scale? A small structured task.

python -m experiments.train_lm --config=configs/cliff_json.py --workdir=/tmp/x

The task: "372=" -> "[2,3,7]", three sorted digits under a format contract. The
base closes its lists too early in four of ten solutions, the teacher in three
of a hundred. Students start at the base and are pushed past the teacher by
G-OPD in its sampled form, T/S capped at c, at reward scales across the
threshold lambda*(p, b, c) that the measured p and b of the binding position
predict (`cliff` in summary.json). Parse rate, off-modal mass and content reward
of what parses are reported, whatever they are: the threshold itself is proved
elsewhere (tests/losses), that a format is lost above it is not known.

Expected (3 students a scale): threshold 1.38; parse rate .932 at scale 1,
rising to .974 at 1.6, see docs/methods/gopd.md; 150 CPU seconds.

Arguments: runlocal (seconds, for CI), seed=<int>, seeds=<int>, steps=<int>.
"""

from configs import base
from distilljax.train import config as config_lib

SCALES = (1.0, 1.15, 1.3, 1.45, 1.6, 2.0)
CAP = 3.0


def get_config(arg=None):
  arg = config_lib.parse_arg(arg, runlocal=False, seed=0, seeds=3, steps=200)
  small = arg.runlocal
  config = base.language(
    "Reward scales across the predicted cliff, on lists under a contract",
    "json_list",
    task={
      "items": 3,  # digits of a list
      "content": "sort",
    },
    seed=arg.seed,
    seeds=1 if small else arg.seeds,  # students at each scale
    batch_size=16 if small else 64,
  )
  config.model = {"kind": "transformer", "width": 32, "depth": 2, "heads": 4}
  if small:
    config.data.rows = 512
    config.model.update(width=16, depth=1)
  scales = (1.0, 2.0) if small else SCALES
  names = {f"scale_{round(100 * s):03d}": s for s in scales}
  config.stages = ("base", "teacher", *names)
  config.base = base.fine_tuned(
    4 if small else 300, 3e-3, data={"broken": 0.4}
  )
  config.teacher = base.language_stage(
    "supervised_kd",
    4 if small else 200,
    {"student": {"start": "base"}},
    1e-3,
    {"objective": "cross_entropy"},
    schedule="cosine",
    data={"broken": 0.03},
  )
  for name, scale in names.items():
    config[name] = base.on_policy(
      scale,
      {
        "student": {"start": "base"},
        "teacher": {"start": "teacher"},
        "reference": {"start": "base"},
      },
      2 if small else arg.steps,
      1e-3,
      hyper={"form": "sampled", "ratio_cap": CAP},
    )
  config.evaluation.update(
    n=64 if small else 500,  # of the 125 held-out prompts, with repetition
    headline="parsed",
    models=config.stages,
    labels={n: f"reward scale {s:g}" for n, s in names.items()},
    teacher="teacher",
    rollouts=("base", "teacher", *list(names)[::2]),
    sweep={
      "hyper": "reward_scale",
      "stages": tuple(names),
      "metrics": ("parsed", "off_modal", "content"),
    },
    threshold={"teacher": "teacher", "base": "base", "c": CAP},
  )
  return config
