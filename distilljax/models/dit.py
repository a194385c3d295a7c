"""A small diffusion transformer with adaLN-zero."""

import jax.numpy as jnp
from flax import nnx

from distilljax import _checks
from distilljax.models import layers
from distilljax.models.time_embedding import Conditioning


class _Block(nnx.Module):
  """Attention and MLP, each with shift, scale and gate from c (from zero)."""

  def __init__(self, width, heads, *, rngs):
    self.heads = heads
    self.modulation = layers.Linear(width, 6 * width, zero=True, rngs=rngs)
    self.qkv = layers.Linear(width, 3 * width, rngs=rngs)
    self.out = layers.Linear(width, width, rngs=rngs)
    self.mlp_in = layers.Linear(width, 4 * width, rngs=rngs)
    self.mlp_out = layers.Linear(4 * width, width, rngs=rngs)

  def __call__(self, x, c):
    b, n, width = x.shape
    scale, shift, gate, scale_2, shift_2, gate_2 = jnp.split(
        self.modulation(c), 6, axis=-1
    )
    h = layers.modulate(layers.normalize(x, groups=1), scale, shift)
    q, k, v = jnp.split(self.qkv(h), 3, axis=-1)
    split = lambda a: a.reshape(b, n, self.heads, width // self.heads)
    h = layers.attention(split(q), split(k), split(v)).reshape(b, n, width)
    x = x + gate[:, None] * self.out(h)
    h = layers.modulate(layers.normalize(x, groups=1), scale_2, shift_2)
    h = self.mlp_out(nnx.gelu(self.mlp_in(h)))
    return x + gate_2[:, None] * h


class DiT(nnx.Module):
  """Diffusion transformer with adaLN-zero blocks on patches.

  Patches plus fixed position sines, `depth` blocks whose shifts, scales and
  gates come from time, label and second time, then a modulated linear head that
  starts at zero.

  Call: `apply_fn(params, x, t, *, label=None, r=None, features=False)` with
  x [b, h, w, in_channels] (h, w multiples of `patch`), t [b] in [0, 1], label
  [b] int32 (num_classes or None = the null class), r [b] in [0, 1] (None =
  t). The output is like x; features are the tokens of the middle block, number
  depth // 2 from 0, [b, n, width].

  Args:
    in_channels: channels of the image.
    patch: side of a patch.
    width: width of the tokens, a multiple of 4 and of `heads`.
    depth: number of blocks.
    heads: number of attention heads.
    num_classes: number of classes, 0 for none.
    second_time: whether the network takes r.
    max_frequency: highest time frequency, radians.
    remat: what of a block is kept for the backward pass: "none" (everything),
      "dots" or "block", see `layers.rematerialize`.
    scan_layers: whether the blocks are one compiled loop over parameters with a
      leading axis [depth], `blocks` in the place of `block_0`, `block_1`, ...:
      the same numbers, and a compile time that does not grow with the depth.
    rngs: NNX random streams.

  References:
    Peebles, Xie, Scalable Diffusion Models with Transformers, 2022,
    arXiv:2212.09748, section 3.2.
  """

  def __init__(
      self,
      *,
      in_channels: int = 1,
      patch: int = 2,
      width: int = 64,
      depth: int = 3,
      heads: int = 4,
      num_classes: int = 0,
      second_time: bool = False,
      max_frequency: float = 10.0,
      remat: str = "none",
      scan_layers: bool = False,
      rngs: layers.Draws | nnx.Rngs,
  ):
    if width % 4 or width % heads:
      _checks.fail(
          "DiT", "width", f"a multiple of 4 and of heads={heads}", width
      )
    _checks.one_of("DiT", "remat", remat, layers.REMAT)
    self.remat = remat
    self.in_channels = in_channels
    self.patch = patch
    self.width = width
    self.depth = depth
    self.condition = Conditioning(
        width,
        num_classes=num_classes,
        second_time=second_time,
        max_frequency=max_frequency,
        rngs=rngs,
    )
    self.stem = layers.Linear(patch**2 * in_channels, width, rngs=rngs)
    self.scan_layers = scan_layers
    blocks = [_Block(width, heads, rngs=rngs) for _ in range(depth)]
    if scan_layers:
      self.blocks = layers.stack(blocks)
    else:
      for i, block in enumerate(blocks):
        setattr(self, f"block_{i}", block)
    self.modulation = layers.Linear(width, 2 * width, zero=True, rngs=rngs)
    self.head = layers.Linear(
        width, patch**2 * in_channels, zero=True, rngs=rngs
    )

  def _blocks(self, h, c, features):
    """Tokens after all blocks, and after the middle one where it is asked."""
    chosen = self.depth // 2
    if not self.scan_layers:
      for i in range(self.depth):
        block = layers.rematerialize(getattr(self, f"block_{i}"), self.remat)
        h = block(layers.cut_rows(h, sequence=1), c)
        if i == chosen:
          middle = h
      return h, middle

    def call(block, i, carry):
      h, middle = carry
      h = block(layers.cut_rows(h, sequence=1), c)
      return h, jnp.where(i == chosen, h, middle) if features else None

    return layers.scan(
        self.blocks, call, (h, h if features else None), remat=self.remat
    )

  def __call__(self, x, t, *, label=None, r=None, features=False):
    """The prediction, like x; with `features` (prediction, features)."""
    _checks.rank("DiT", "x", x, 4, "[b, h, w, c]")
    if x.shape[-1] != self.in_channels:
      _checks.fail("DiT", "x", f"[b, h, w, {self.in_channels}]", list(x.shape))
    dtype = self.stem.kernel[...].dtype
    c = nnx.silu(self.condition("DiT", x, t, label, r))
    h = layers.patchify("DiT", jnp.asarray(x, dtype), self.patch)
    b, rows, columns, _ = h.shape
    h = self.stem(h.reshape(b, rows * columns, -1))
    position = layers.position_embedding(rows, columns, self.width)
    h = h + position.astype(dtype)[None]
    h, middle = self._blocks(h, c, features)
    scale, shift = jnp.split(self.modulation(c), 2, axis=-1)
    h = self.head(layers.modulate(layers.normalize(h, groups=1), scale, shift))
    out = _checks.at_least_float32(
        layers.unpatchify(h.reshape(b, rows, columns, -1), self.patch)
    )
    return (out, _checks.at_least_float32(middle)) if features else out
