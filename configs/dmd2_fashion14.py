"""The main job: a teacher of 14x14 fashion images and its one-step student.

python -m experiments.train --config=configs/dmd2_fashion14.py --workdir=/tmp/x

DMD2 without its GAN (see dmd2_gan_fashion14 for the term and what it does).

Expected (3 seeds): FCD 3.2 to 3.4 for the teacher at 20 steps and 41 to 46 at
1, 4.7 to 5.6 for the student at 1 (floor .3); 3.5 minutes on two idle cores.

Arguments: runlocal (seconds, for CI), seed=<int>.
"""

from configs import base
from distilljax.train import config as config_lib


def get_config(arg=None):
  arg = config_lib.parse_arg(arg, runlocal=False, seed=0)
  config = base.fashion14(
    "Fashion images in one step: DMD2 from a small flow-matching teacher",
    small=arg.runlocal,
    seed=arg.seed,
  )
  config.stages = ("teacher", "student")
  config.student = base.dmd2_images(20 if arg.runlocal else 700)
  return config
