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
_MEASURES = ("std", "norm")
_OVER = ("row", "last", "batch")


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


def rescale_guidance(
    guided: Float[Array, "b *s"],
    cond: Float[Array, "b *s"],
    *,
    share: Number = 0.7,
    measure: str = "std",
    over: str = "row",
) -> Float[Array, "b *s"]:
  """Gives a guided prediction back the size of the conditional one.

  guided (share m(cond) / m(guided) + 1 - share), with m the standard deviation
  or the l2 norm. Large guidance scales the prediction up and so overexposes the
  sample; its direction is kept here, its size is not. Where m(guided) = 0 the
  prediction is left alone.

  Args:
    guided: what `guide` gave. Shape [b, *s].
    cond: the conditional prediction in it. Shape [b, *s].
    share: phi, in [0, 1]: 0 changes nothing, 1 is the size of `cond`.
    measure: "std" (of the paper), or "norm".
    over: "row" (one factor a row, of the paper), "last" (one for every vector
      along the last axis) or "batch" (one for all: rows then depend on how the
      batch is cut).

  Returns:
    The rescaled prediction, shape [b, *s], at least float32.

  Raises:
    ValueError: shapes that differ, an empty batch, share outside [0, 1], an
      unknown measure or axis.

  References:
    Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed,
    2023, arXiv:2305.08891, eqs. 14-16 (phi = 0.7). The norms over the last axis
    and over everything, with share 1, are those of Phased DMD's released
    trainer (arXiv:2510.27684).

  Example:
    >>> import jax.numpy as jnp
    >>> guided, cond = jnp.array([[6.0, 8.0]]), jnp.array([[3.0, 4.0]])
    >>> rescale_guidance(guided, cond, share=1.0, measure="norm")
    Array([[3., 4.]], dtype=float32)
  """
  fn = "rescale_guidance"
  _checks.floating(fn, guided=guided, cond=cond)
  _checks.same_shape(fn, guided=guided, cond=cond)
  _checks.nonempty(fn, guided=guided)
  _checks.one_of(fn, "measure", measure, _MEASURES)
  _checks.one_of(fn, "over", over, _OVER)
  _checks.in_range(fn, "share", share, 0, 1)
  guided = _checks.at_least_float32(guided)
  cond = _checks.at_least_float32(cond)
  dtype = np.promote_types(guided.dtype, cond.dtype)
  guided, cond = guided.astype(dtype), cond.astype(dtype)
  axes = {
      "row": tuple(range(1, guided.ndim)),
      "last": (-1,),
      "batch": tuple(range(guided.ndim)),
  }[over]

  def square(x):
    if measure == "std":
      x = x - jnp.mean(x, axes, keepdims=True)
    return jnp.sum(jnp.square(x), axes, keepdims=True)

  ours, wanted = square(guided), square(cond)
  # The number of elements cancels in the ratio. Both roots have an infinite
  # slope at 0, also where the result is not selected.
  usable = (ours > 0) & (wanted > 0)
  ratio = jnp.where(usable, wanted, 1) / jnp.where(usable, ours, 1)
  ratio = jnp.where(usable, jnp.sqrt(ratio), jnp.where(ours > 0, 0.0, 1.0))
  return guided * (1 + share * (ratio - 1))


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
