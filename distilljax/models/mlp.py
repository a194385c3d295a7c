"""A multi-layer perceptron for points of a few dimensions."""

import jax.numpy as jnp
from flax import nnx

from distilljax import _checks
from distilljax.models import layers
from distilljax.models.time_embedding import Conditioning


class MLP(nnx.Module):
  """silu MLP on [x, conditioning], for x [b, dim].

  h_0 = [x, c]; h_{i+1} = silu(W_i h_i + b_i), `depth` hidden layers; the output
  is linear in the last one.

  Call: `apply_fn(params, x, t, *, label=None, r=None, features=False)` with
  x [b, dim], t [b] in [0, 1], label [b] int32 (num_classes or None = the null
  class), r [b] in [0, 1] (None = t). Features are the last hidden
  layer [b, width].

  Args:
    dim: dimension of the points.
    width: width of the hidden layers and of the conditioning, even.
    depth: number of hidden layers, at least 1.
    num_classes: number of classes, 0 for none.
    second_time: whether the network takes r.
    max_frequency: highest time frequency, radians.
    zero_head: start with an output of zero (for a correction that is added to
      a closed form).
    rngs: NNX random streams.
  """

  def __init__(
      self,
      *,
      dim: int = 2,
      width: int = 64,
      depth: int = 3,
      num_classes: int = 0,
      second_time: bool = False,
      max_frequency: float = 10.0,
      zero_head: bool = False,
      rngs: layers.Draws | nnx.Rngs,
  ):
    if depth < 1:
      _checks.fail("MLP", "depth", ">= 1", depth)
    self.dim = dim
    self.depth = depth
    self.condition = Conditioning(
        width,
        num_classes=num_classes,
        second_time=second_time,
        max_frequency=max_frequency,
        rngs=rngs,
    )
    self.hidden_0 = layers.Linear(dim + width, width, rngs=rngs)
    for i in range(1, depth):
      setattr(self, f"hidden_{i}", layers.Linear(width, width, rngs=rngs))
    self.head = layers.Linear(width, dim, zero=zero_head, rngs=rngs)

  def __call__(self, x, t, *, label=None, r=None, features=False):
    """The prediction, like x; with `features` (prediction, features)."""
    _checks.rank("MLP", "x", x, 2, "[b, d]")
    if x.shape[-1] != self.dim:
      _checks.fail("MLP", "x", f"[b, {self.dim}]", list(x.shape))
    dtype = self.head.kernel[...].dtype
    c = self.condition("MLP", x, t, label, r)
    h = jnp.concatenate([jnp.asarray(x, dtype), c], axis=-1)
    for i in range(self.depth):
      h = nnx.silu(getattr(self, f"hidden_{i}")(layers.cut_rows(h)))
    out = _checks.at_least_float32(self.head(h))
    return (out, _checks.at_least_float32(h)) if features else out
