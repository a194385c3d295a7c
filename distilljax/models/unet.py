"""A small UNet on patches, for images of 8 to 32 pixels."""

import jax.numpy as jnp
from flax import nnx

from distilljax import _checks
from distilljax.models import layers
from distilljax.models.time_embedding import Conditioning

# Of every group norm.
_GROUPS = 8


class _Block(nnx.Module):
  """norm, silu, conv, norm modulated by c, silu, conv from zero, plus x."""

  def __init__(self, inputs, outputs, condition, *, implementation, rngs):
    conv = dict(implementation=implementation, rngs=rngs)
    self.conv_in = layers.Conv(inputs, outputs, **conv)
    self.conv_out = layers.Conv(outputs, outputs, zero=True, **conv)
    self.modulation = layers.Linear(condition, 2 * outputs, rngs=rngs)
    self.widens = inputs != outputs
    if self.widens:
      self.skip = layers.Linear(inputs, outputs, rngs=rngs)

  def __call__(self, x, c):
    x = layers.cut_rows(x)
    h = self.conv_in(nnx.silu(layers.normalize(x, groups=_GROUPS)))
    scale, shift = jnp.split(self.modulation(c), 2, axis=-1)
    h = layers.normalize(h, groups=_GROUPS)
    h = self.conv_out(nnx.silu(layers.modulate(h, scale, shift)))
    return (self.skip(x) if self.widens else x) + h


class UNet(nnx.Module):
  """UNet of residual blocks on patches of the image, no attention.

  A patch stem, `blocks` residual blocks a level with a stride of 2 between
  levels, one block at the bottom, the same way up with skip connections
  (nearest upsampling, cropped where a map had an odd size), and a pixel-shuffle
  head that starts at zero. Time, label and second time modulate every block.

  Call: `apply_fn(params, x, t, *, label=None, r=None, features=False)` with
  x [b, h, w, in_channels] (h, w multiples of `patch`), t [b] in [0, 1], label
  [b] int32 (num_classes or None = the null class), r [b] in [0, 1] (None =
  t). The output is like x; features are the bottom map [b, h', w', d].

  Args:
    in_channels: channels of the image.
    channels: channels of the first level, a multiple of 8.
    multipliers: channels of each level in units of `channels`.
    blocks: residual blocks a level and direction.
    patch: side of the patch of the stem.
    condition: width of the conditioning vector, even.
    num_classes: number of classes, 0 for none.
    second_time: whether the network takes r.
    max_frequency: highest time frequency, radians.
    conv: implementation of the convolutions, "native" or "dot".
    rngs: NNX random streams.
  """

  def __init__(
      self,
      *,
      in_channels: int = 1,
      channels: int = 32,
      multipliers: tuple[int, ...] = (1, 2),
      blocks: int = 1,
      patch: int = 2,
      condition: int = 128,
      num_classes: int = 0,
      second_time: bool = False,
      max_frequency: float = 10.0,
      conv: str = "native",
      rngs: layers.Draws | nnx.Rngs,
  ):
    if channels % _GROUPS:
      _checks.fail("UNet", "channels", f"a multiple of {_GROUPS}", channels)
    _checks.one_of("UNet", "conv", conv, ("native", "dot"))
    self.in_channels = in_channels
    self.patch = patch
    self.levels = len(multipliers)
    self.blocks = blocks
    shared = dict(implementation=conv, rngs=rngs)
    self.condition = Conditioning(
        condition,
        num_classes=num_classes,
        second_time=second_time,
        max_frequency=max_frequency,
        rngs=rngs,
    )
    widths = [channels * m for m in multipliers]
    self.stem = layers.Linear(patch**2 * in_channels, widths[0], rngs=rngs)
    for i, width in enumerate(widths):
      for j in range(blocks):
        down = _Block(width, width, condition, **shared)
        setattr(self, f"down_{i}_{j}", down)
        up = _Block(2 * width, width, condition, **shared)
        setattr(self, f"up_{i}_{j}", up)
      if i + 1 < self.levels:
        narrow = layers.Conv(width, widths[i + 1], stride=2, **shared)
        setattr(self, f"downsample_{i}", narrow)
        widen = layers.Linear(widths[i + 1], width, rngs=rngs)
        setattr(self, f"upsample_{i}", widen)
    self.bottom = _Block(widths[-1], widths[-1], condition, **shared)
    self.head = layers.Linear(
        widths[0], patch**2 * in_channels, zero=True, rngs=rngs
    )

  def __call__(self, x, t, *, label=None, r=None, features=False):
    """The prediction, like x; with `features` (prediction, features)."""
    _checks.rank("UNet", "x", x, 4, "[b, h, w, c]")
    if x.shape[-1] != self.in_channels:
      _checks.fail(
          "UNet", "x", f"[b, h, w, {self.in_channels}]", list(x.shape)
      )
    dtype = self.stem.kernel[...].dtype
    c = nnx.silu(self.condition("UNet", x, t, label, r))
    h = self.stem(layers.patchify("UNet", jnp.asarray(x, dtype), self.patch))
    skips = []
    for i in range(self.levels):
      for j in range(self.blocks):
        h = getattr(self, f"down_{i}_{j}")(h, c)
        skips.append(h)
      if i + 1 < self.levels:
        h = getattr(self, f"downsample_{i}")(h)
    bottom = h = self.bottom(h, c)
    for i in reversed(range(self.levels)):
      if i + 1 < self.levels:
        height, width = skips[-1].shape[1:3]
        h = getattr(self, f"upsample_{i}")(h)
        h = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)
        h = h[:, :height, :width]
      for j in range(self.blocks):
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = getattr(self, f"up_{i}_{j}")(h, c)
    h = nnx.silu(layers.normalize(h, groups=_GROUPS))
    out = _checks.at_least_float32(
        layers.unpatchify(self.head(h), self.patch)
    )
    return (out, _checks.at_least_float32(bottom)) if features else out
