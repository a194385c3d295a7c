"""Optimizers from plain values: clipping, AdamW, a learning-rate schedule."""

import jax.numpy as jnp
import optax

from distilljax import _checks

LEARNING_RATE_SCHEDULES = ("constant", "cosine", "linear")


def make_schedule(
  kind: str, peak: float, steps: int, warmup: int = 0
) -> optax.Schedule:
  """A learning rate as a function of the update count.

  Args:
    kind: "constant", "cosine" (to 0 at `steps`) or "linear" (to 0 at `steps`).
    peak: learning rate after the warm-up.
    steps: number of updates in all.
    warmup: updates of linear warm-up from 0.

  Returns:
    An optax schedule.
  """
  _checks.one_of("make_schedule", "kind", kind, LEARNING_RATE_SCHEDULES)
  if not 0 <= warmup < max(steps, 1):
    _checks.fail("make_schedule", "warmup", f"in [0, steps={steps})", warmup)
  if kind == "constant":
    rest = optax.constant_schedule(peak)
  elif kind == "cosine":
    rest = optax.cosine_decay_schedule(peak, max(steps - warmup, 1))
  else:
    rest = optax.linear_schedule(peak, 0.0, max(steps - warmup, 1))
  if not warmup:
    return rest
  return optax.join_schedules(
    [optax.linear_schedule(0.0, peak, warmup), rest], [warmup]
  )


def make_optimizer(
  *,
  learning_rate: float,
  steps: int,
  schedule: str = "constant",
  warmup: int = 0,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  clip_norm: float | None = None,
) -> optax.GradientTransformation:
  """AdamW behind a clip of the global gradient norm, from plain values.

  Args:
    learning_rate: peak learning rate, > 0.
    steps: number of updates of this network, for the schedule.
    schedule: "constant", "cosine" or "linear".
    warmup: updates of linear warm-up.
    b1: Adam's first decay, in [0, 1).
    b2: Adam's second decay, in [0, 1).
    eps: Adam's epsilon.
    weight_decay: decoupled weight decay, >= 0.
    clip_norm: largest global gradient norm; None does not clip.

  Returns:
    An optax transformation.

  Raises:
    ValueError: a value outside its range.
  """
  fn = "make_optimizer"
  _checks.in_range(fn, "learning_rate", learning_rate, 0, open_low=True)
  _checks.in_range(fn, "b1", b1, 0, 1, open_high=True)
  _checks.in_range(fn, "b2", b2, 0, 1, open_high=True)
  _checks.in_range(fn, "weight_decay", weight_decay, 0)
  _checks.in_range(fn, "clip_norm", clip_norm, 0, open_low=True)
  rate = make_schedule(schedule, learning_rate, steps, warmup)
  adam = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
  if clip_norm is None:
    return adam
  return optax.chain(optax.clip_by_global_norm(clip_norm), adam)


def ema_decay(decay: float):
  """EMA decay with a warm-up: min(decay, (1 + step) / (10 + step)).

  The average then forgets its initial value quickly, also in short runs.

  Args:
    decay: the decay reached, in [0, 1].

  Returns:
    A function of the step, for `Ema(decay=...)`.
  """
  _checks.in_range("ema_decay", "decay", decay, 0, 1)

  def at(step):
    step = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + step) / (10 + step))

  return at
