"""DMD2 with its GAN on fashion images: can the student beat its teacher?

python -m experiments.train \\
  --config=configs/dmd2_gan_fashion14.py --workdir=/tmp/x

The discriminator is a head on the critic's bottleneck, fed with real images and
samples at the noise of the score (one forward for both).

Expected: FCD 3.3 to 3.8 at one step, the teachers at 20 steps 3.2 to 3.4: near,
not below; about 450 CPU seconds. See docs/methods/dmd2.md.

Arguments: runlocal (seconds, for CI), gan=<float> (lambda_G, default .1; the
critic's weight is three times that; 0: no GAN), steps=<int>, seed=<int>.
"""

from configs import base
from distilljax.train import config as config_lib


def get_config(arg=None):
  arg = config_lib.parse_arg(arg, runlocal=False, gan=0.1, steps=1400, seed=0)
  config = base.fashion14(
    "Fashion images in one step: DMD2 with a GAN on real images",
    small=arg.runlocal,
    seed=arg.seed,
  )
  config.stages = ("teacher", "student")
  steps = 20 if arg.runlocal else arg.steps
  config.student = base.dmd2_gan_images(steps, arg.gan)
  return config
