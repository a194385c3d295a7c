"""Classifier-free guidance under one convention, and the way to it from others.

Everywhere in the library the guidance w means uncond + w (cond - uncond):
w = 1 is the conditional prediction, w = 0 the unconditional one.
"""

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import _checks
from distilljax.processes import time as time_lib
from distilljax.typing import Array, Float, Key, Number, PredictionFn

CONVENTIONS = ("interpolation", "extra", "mean_flow")


def guide(
    uncond: Float[Array, "b *s"],
    cond: Float[Array, "b *s"],
    guidance: Float[Array, "..."] | Number,
) -> Float[Array, "b *s"]:
  """uncond + guidance (cond - uncond).

  Args:
    uncond: prediction without the condition (or with a negative one). Shape
      [b, *s].
    cond: prediction with it, of the same kind. Shape [b, *s].
    guidance: w, one number or one a row. Shape [] or [b].

  Returns:
    The guided prediction, shape [b, *s], at least float32.

  Raises:
    ValueError: shapes that differ, or an empty batch.

  References:
    Ho and Salimans, Classifier-Free Diffusion Guidance, 2022, arXiv:2207.12598
    (there with 1 + w in place of w).

  Example:
    >>> import jax.numpy as jnp
    >>> guide(jnp.array([1.0]), jnp.array([2.0]), 3.0)
    Array([4.], dtype=float32)
  """
  _checks.floating("guide", uncond=uncond, cond=cond)
  _checks.same_shape("guide", uncond=uncond, cond=cond)
  _checks.nonempty("guide", uncond=uncond)
  uncond = _checks.at_least_float32(uncond)
  cond = _checks.at_least_float32(cond)
  dtype = np.promote_types(uncond.dtype, cond.dtype)
  uncond, cond = uncond.astype(dtype), cond.astype(dtype)
  guidance = jnp.asarray(guidance, dtype)
  if guidance.ndim:
    _checks.per_row("guide", "uncond", uncond, guidance=guidance)
  return uncond + _checks.expand_like(guidance, cond) * (cond - uncond)


def guided(
    uncond_fn: PredictionFn,
    cond_fn: PredictionFn,
    guidance: Float[Array, "..."] | Number,
) -> PredictionFn:
  """`guide` for closures: (x, t) -> the guided prediction, two calls.

  Args:
    uncond_fn: (x, t) -> prediction without the condition.
    cond_fn: (x, t) -> prediction with it.
    guidance: w of uncond + w (cond - uncond); 1 is cond. Shape [] or [b].

  Returns:
    A closure (x, t) -> guided prediction.
  """

  def fn(x, t):
    return guide(uncond_fn(x, t), cond_fn(x, t), guidance)

  return fn


def guidance_from(
    value, *, convention: str, kappa: Number = 0.0
):
  """The library's w for a number given under another convention.

  Args:
    value: the number (or an array of them) as the paper or its code has it.
    convention:
      "interpolation": (1 - w) uncond + w cond and uncond + w (cond - uncond):
        already w (SNOOPI's kappa, AnyFlow's fused scale, DMD2, rCM);
      "extra": cond + g (cond - uncond) = (1 + g) cond - g uncond: w = g + 1
        (AnyFlow's and Self-Forcing's score guidance, MDT-dist, the original
        paper);
      "mean_flow": MeanFlow's omega beside `kappa`: w = omega / (1 - kappa).
    kappa: of MeanFlow, in [0, 1).

  Returns:
    w, of value's shape.

  Raises:
    ValueError: an unknown convention, kappa outside [0, 1), or a kappa where
      the convention has none.
  """
  fn = "guidance_from"
  _checks.one_of(fn, "convention", convention, CONVENTIONS)
  _checks.in_range(fn, "kappa", kappa, 0, 1, open_high=True)
  if convention == "mean_flow":
    return value / (1 - kappa)
  if kappa:
    _checks.fail(fn, "kappa", f"0 with convention {convention!r}", kappa)
  return value + 1 if convention == "extra" else value


def sample_guidance(
    key: Key[Array, "*k"],
    shape: tuple[int, ...] = (),
    *,
    low: Number = 0.5,
    high: Number = 4.0,
    choices: tuple[Number, ...] | None = None,
) -> Float[Array, "*b"]:
  """Random-scale guidance: w uniform in [low, high), or one of `choices`.

  Both teachers of an iteration must share the draw.

  Args:
    key: one key, or keys [b].
    shape: shape of the draw for each key.
    low: of the range.
    high: of the range, >= low.
    choices: values drawn with equal probability instead, such as (4, 4.5, 5).

  Returns:
    Guidance of the keys' shape followed by `shape`.

  References:
    SNOOPI, 2024, arXiv:2412.02687 (PG-SB; U(0.5, 4) for SD 1.5 and 2.1); TBCM,
    2025, arXiv:2511.20410 (choices).
  """
  fn = "sample_guidance"
  if choices is not None:
    table = np.asarray(choices, np.float32)
    _checks.nonempty(fn, choices=table)
    table = jnp.asarray(table)
    return time_lib._per_key(
        lambda k: table[jax.random.randint(k, shape, 0, len(choices))], key
    )
  _checks.in_range(fn, "high", high, low)
  return time_lib._per_key(
      lambda k: jax.random.uniform(k, shape, minval=low, maxval=high), key
  )
