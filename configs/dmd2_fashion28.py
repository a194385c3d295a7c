"""Fashion-MNIST at its full 28x28, long: a teacher and its one-step student.

python -m experiments.train --config=configs/dmd2_fashion28.py --workdir=/tmp/x

Needs the originals: Debian's package dataset-fashion-mnist, or a folder of the
four idx files in --config.data.folder or $DISTILLJAX_DATA. With runlocal it
runs on the embedded fashion14, to test the config where they are not.

Expected (one seed, n = 2000, floor .30): FCD 3.24 for the teacher at 20 steps
and 53.7 at one, 5.47 for the student at one step and 12.9 at two; 2,900 CPU
seconds.

Arguments: runlocal (seconds, for CI), seed=<int>.
"""

from configs import base
from distilljax.train import config as config_lib


def get_config(arg=None):
  arg = config_lib.parse_arg(arg, runlocal=False, seed=0)
  config = base.fashion14(
    "Fashion-MNIST in one step: DMD2 with a GAN at 28x28",
    small=arg.runlocal,
    seed=arg.seed,
  )
  config.stages = ("teacher", "student")
  if not arg.runlocal:
    config.data.name = "fashion28"
    config.teacher = base.image_teacher(3000, 2e-3)
  config.student = base.dmd2_gan_images(20 if arg.runlocal else 1500, 0.1)
  return config
