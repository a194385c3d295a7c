"""A DMD2 step at scale, to be planned and not run: DiTs at 16k tokens.

python -m experiments.plan --config=configs/plans/dmd2_dit.py:size=14b \
    --topology=v5p:8x8x8

Student, teacher, critic and the student's average are of one size; latents of
256 x 256 x 16 in patches of 2 are 16,384 tokens, one row a chip.

Arguments: size=1.3b or 14b, rows=<int> (a step over all chips), toy (small
enough for a test).
"""

from configs import base
from distilljax.train import config as config_lib

# Widths and depths of open video models; a width is that of 128-wide heads.
SIZES = {
  "1.3b": {"width": 1536, "depth": 30, "heads": 12},
  "14b": {"width": 5120, "depth": 30, "heads": 40},
}
TOY = {"width": 128, "depth": 2, "heads": 1}


def get_config(arg=None):
  arg = config_lib.parse_arg(arg, size="14b", rows=512, toy=False)
  if arg.size not in SIZES:
    raise ValueError(
      f"config argument: size must be one of {', '.join(SIZES)}, got"
      f" {arg.size!r}"
    )
  config = base.base(
    f"DMD2 with DiTs of {'a toy' if arg.toy else arg.size.upper()}",
    data="shapes",
    batch_size=arg.rows,
  )
  side = 32 if arg.toy else 256
  config.data.shape = (side, side, 16)  # of a sample, [h, w, c]
  config.data.num_classes = 1000
  config.model = {
    "kind": "dit",
    "patch": 2,
    **(TOY if arg.toy else SIZES[arg.size]),
    "scan_layers": True,  # one loop over the blocks
    "remat": "block",  # only the inputs of a block are kept
  }
  config.stages = ("student",)
  config.student = base.dmd2_images(10_000)
  for network in config.student["networks"].values():
    network["start"] = "scratch"
  config.run.update(
    rules="fsdp",
    unroll=False,
    compute_dtype="bfloat16",
    frozen_dtype="bfloat16",
  )
  return config
