"""A small head that judges features: one logit a row."""

import jax.numpy as jnp
from flax import nnx

from distilljax import _checks
from distilljax.models import layers


class Head(nnx.Module):
  """One logit a row from features [b, d] or [b, ..., d].

  An MLP of one hidden layer at every position, the mean over the positions,
  then a linear map to a number. The input is normalised over its channels,
  since the scale of a backbone's features says nothing about realism.

  Call: `apply_fn(params, features) -> logits [b]`, at least float32.

  Args:
    features: width of the features (`feature_dim` of the backbone).
    width: width of the hidden layer.
    rngs: NNX random streams.
  """

  def __init__(
      self,
      *,
      features: int,
      width: int = 64,
      rngs: layers.Draws | nnx.Rngs,
  ):
    self.features = features
    self.hidden = layers.Linear(features, width, rngs=rngs)
    self.mix = layers.Linear(width, width, rngs=rngs)
    self.out = layers.Linear(width, 1, rngs=rngs)

  def __call__(self, features):
    """Logits [b]."""
    _checks.min_rank("Head", "features", features, 2, "[b, ..., d]")
    if features.shape[-1] != self.features:
      _checks.fail(
          "Head", "features", f"[b, ..., {self.features}]",
          list(features.shape),
      )
    h = jnp.asarray(features, self.out.kernel[...].dtype)
    h = layers.normalize(
        h.reshape(h.shape[0], -1, h.shape[-1]), groups=1
    )
    h = jnp.mean(nnx.silu(self.hidden(h)), axis=1)
    h = nnx.silu(self.mix(h))
    return _checks.at_least_float32(self.out(h)[:, 0])
