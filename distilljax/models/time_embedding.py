"""Time embeddings with low frequencies, and the optional second time."""

import jax.numpy as jnp
from flax import nnx

from distilljax import _checks
from distilljax.models import layers
from distilljax.typing import Array, Float


def fourier_features(
    t: Float[Array, "*b"], *, dim: int, max_frequency: float = 10.0
) -> Float[Array, "*b d"]:
  """Cosines and sines of t at `dim // 2` frequencies up to `max_frequency`.

  features = [cos(w_i t), sin(w_i t)], w_i = max_frequency (i + 1) / (dim // 2).
  The frequencies are low on purpose: a flow-map loss differentiates the
  network in t, and a feature of w radians multiplies that derivative by w (100
  rad in place of 10 made the one-step MeanFlow student ten times worse).

  Args:
    t: times, usually in [0, 1]. Shape [*b].
    dim: number of features, even and at least 2.
    max_frequency: highest frequency in radians a unit of t, > 0.

  Returns:
    Features in [-1, 1], at least float32 whatever the dtype of t. Shape
    [*b, dim].

  Raises:
    ValueError: `dim` is odd or below 2, or `max_frequency` is not positive.
  """
  if dim < 2 or dim % 2:
    _checks.fail("fourier_features", "dim", "even and >= 2", dim)
  _checks.in_range(
      "fourier_features", "max_frequency", max_frequency, 0.0, open_low=True
  )
  t = _checks.at_least_float32(t)
  half = dim // 2
  frequencies = (jnp.arange(half, dtype=t.dtype) + 1) * (max_frequency / half)
  angles = t[..., None] * frequencies.reshape((1,) * t.ndim + (half,))
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Conditioning(nnx.Module):
  """One vector a row from the time, the label and the second time.

  c = MLP(features(t)) + table[label] + second(features(t - r)), where `second`
  ends in a linear map that starts at zero: a network that gains r gives what it
  gave without it, for every r, until that map has been trained.

  Args:
    width: width of the vector.
    num_classes: labels are 0..num_classes - 1 and num_classes is the null
      class; 0 means that the network takes no label.
    second_time: whether the network takes r.
    max_frequency: highest frequency of the time features, radians.
    rngs: NNX random streams.
  """

  def __init__(
      self,
      width: int,
      *,
      num_classes: int = 0,
      second_time: bool = False,
      max_frequency: float = 10.0,
      rngs: layers.Draws | nnx.Rngs,
  ):
    self.width = width
    self.num_classes = num_classes
    self.max_frequency = max_frequency
    self.time_in = layers.Linear(width, width, rngs=rngs)
    self.time_out = layers.Linear(width, width, rngs=rngs)
    self.second_time = second_time
    if num_classes:
      self.label = layers.Embed(num_classes + 1, width, rngs=rngs)
    if second_time:
      self.second_in = layers.Linear(width, width, rngs=rngs)
      self.second_out = layers.Linear(width, width, zero=True, rngs=rngs)

  def __call__(self, name, x, t, label, r):
    """The vector [b, width] in the dtype of the parameters."""
    _checks.per_row(name, "x", x, t=t, label=label, r=r)
    _checks.in_range(name, "t", t, 0.0, 1.0)
    dtype = self.time_in.kernel[...].dtype

    def features(time):
      return fourier_features(
          time, dim=self.width, max_frequency=self.max_frequency
      ).astype(dtype)

    c = self.time_out(nnx.silu(self.time_in(features(t))))
    if label is not None and not self.num_classes:
      _checks.fail(
          name, "label", "None (built with num_classes=0)", "an array"
      )
    if self.num_classes:
      if label is None:
        label = jnp.full(jnp.shape(t), self.num_classes, jnp.int32)
      _checks.integer(name, label=label)
      _checks.in_range(name, "label", label, 0, self.num_classes)
      c = c + self.label(label)
    if r is not None and not self.second_time:
      _checks.fail(name, "r", "None (built with second_time=False)", "an array")
    if self.second_time:
      r = t if r is None else r
      _checks.in_range(name, "r", r, 0.0, 1.0)
      gap = _checks.at_least_float32(t) - _checks.at_least_float32(r)
      c = c + self.second_out(nnx.silu(self.second_in(features(gap))))
    return c
