"""Credit for tokens from right and wrong answers: GRPO against CEPO.

python -m experiments.train_lm --config=configs/cepo_chain.py --workdir=/tmp/x

The task: chains of four operations mod 10 with their trace, and hint slots in
the prompt that may show a trace. The reward looks at the last digit alone, so
whoever guesses it from wrong steps is paid too. Each repetition has a base of
its own that can read hints, and from it GRPO and CEPO (the right trace against
a rejected rollout of the group) are trained with the same prompts, rollouts and
learning rate; beside them CEPO in the paper's own setting (band .2, mix .5,
gone after 25 steps), RLSD, which reads the right solution alone, and the
ceiling: an oracle that says of every step whether it is right.

Expected (5 repetitions): two bases are through their phase transition (.97 and
above of greedy traces right), and there is nothing to tell apart. From the
other three, .423 on the mean, GRPO falls to .323 and CEPO, at equal reward, to
.381, RLSD to .401; the oracle rises to .569, see docs/methods/cepo.md. 810 CPU
seconds. The paper's setting moves advantages by a tenth at most; the others
have mix 1 and no decay.

Arguments: runlocal (seconds, for CI), seed=<int>, seeds=<int>, band=<float>.
"""

from configs import base
from distilljax.train import config as config_lib


def get_config(arg=None):
  arg = config_lib.parse_arg(arg, runlocal=False, seed=0, seeds=5, band=0.9)
  small = arg.runlocal
  config = base.language(
    "Contrastive evidence on chains: which token earned the reward",
    "chain",
    task={
      "ops": 4,  # operations of a chain
      "operators": "+-*",
      "hints": True,  # slots for a trace in front of the prompt
    },
    seed=arg.seed,
    seeds=1 if small else arg.seeds,  # runs of each kind
    batch_size=8 if small else 16,
  )
  config.model = {"kind": "transformer", "width": 64, "depth": 2, "heads": 4}
  if small:
    config.data.rows = 512
    config.model.update(width=16, depth=1)
  config.stages = ("base", "grpo", "paper", "rlsd", "cepo", "oracle")
  config.base = base.fine_tuned(
    4 if small else 600,
    3e-3,
    data={"hints": 0.5},  # share of prompts whose slots show the solution
    batch_size=16 if small else 64,
    repeat=True,  # each repetition has a base of its own
  )
  contrastive = {"credit": "contrastive", "decay_steps": None}
  for name, hyper in (
    ("grpo", {"credit": "grpo"}),
    ("paper", {**contrastive, "decay_steps": 25, "mix": 0.5, "band": 0.2}),
    (
      "rlsd",
      {"credit": "self", "decay_steps": None, "mix": 1.0, "band": arg.band},
    ),
    ("cepo", {**contrastive, "mix": 1.0, "band": arg.band}),
    ("oracle", {"credit": "steps"}),
  ):
    config[name] = base.language_stage(
      "cepo",
      2 if small else 150,
      {"student": {"start": "base"}},
      3e-4,  # 1e-3 collapses
      {
        "reward": "reward",  # 1 for a right last digit, 0 else
        "num_samples": 8,  # rollouts of a prompt
        "fallback": "grpo",  # without a rejected rollout, as the official code
        **hyper,
      },
      repeat=True,
    )
  config.evaluation.update(
    n=64 if small else 1000,
    headline="trace_greedy",
    models=config.stages,
    labels={
      "base": "base",
      "grpo": "GRPO",
      "paper": "CEPO, the paper's setting",
      "rlsd": f"RLSD, band {arg.band:g}",
      "cepo": f"CEPO, band {arg.band:g}",
      "oracle": "oracle of the steps (ceiling)",
    },
    rollouts=("base", "grpo", "cepo"),
    watches=0 if small else 3,
    evidence="base",  # the model whose |Delta| by kind of token is reported
  )
  return config
