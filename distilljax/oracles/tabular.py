"""Tabular policies: contexts x actions, with the optimum of every objective.

A policy is a table of logits [contexts, actions]; the base is N(0, 1), the
teacher is the base pushed along the true reward and off it by noise:

  teacher = base + sharpness * reward + noise * N(0, 1)

Known minimisers, context by context:

  forward, reverse KL, any JSD       the teacher
  G-OPD with reward_scale lambda     T^lambda R^(1 - lambda), normalised
  reward - KL to R / sharpness       R exp(sharpness * reward), normalised
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distilljax import _checks
from distilljax.typing import Array, Float, PRNGKeyArray


class TabularTask(NamedTuple):
  """Tables [contexts, actions]; contexts are equally likely."""

  base: Any  # logits of the reference
  teacher: Any  # logits
  reward: Any  # of each action


def make_tabular_task(
  key: PRNGKeyArray,
  *,
  contexts: int = 64,
  actions: int = 12,
  sharpness: float | int = 1.5,
  noise: float | int = 1.0,
  binary: bool = False,
) -> TabularTask:
  """Draws a task.

  Args:
    key: of the draw.
    contexts: number of rows.
    actions: number of columns.
    sharpness: how far the teacher moved along the reward.
    noise: standard deviation of what else the teacher learned.
    binary: rewards 0 or 1 in place of uniform in [0, 1).

  Returns:
    A `TabularTask`.

  References:
    Card g_opd (small test): sharpness 1.5, noise 1, 64 contexts, 12 actions.
  """
  shape = (contexts, actions)
  keys = jax.random.split(key, 3)
  base = jax.random.normal(keys[0], shape)
  reward = jax.random.uniform(keys[1], shape)
  if binary:
    reward = jnp.round(reward)
  other = jax.random.normal(keys[2], shape)
  return TabularTask(base, base + sharpness * reward + noise * other, reward)


def geometric_optimum(
  teacher: Float[Array, "*b v"],
  reference: Float[Array, "*b v"],
  *,
  reward_scale: Any,
) -> Float[Array, "*b v"]:
  """Log-policy that minimises the G-OPD objective, T^lambda R^(1-lambda).

  Args:
    teacher: logits. Shape [*b, v].
    reference: logits. Shape [*b, v].
    reward_scale: lambda; 1 is the teacher, 0 the reference.

  Returns:
    Log-probabilities, shape [*b, v].
  """
  _checks.same_shape("geometric_optimum", teacher=teacher, reference=reference)
  log_t = jax.nn.log_softmax(_checks.at_least_float32(teacher), axis=-1)
  log_r = jax.nn.log_softmax(_checks.at_least_float32(reference), axis=-1)
  return jax.nn.log_softmax(
    reward_scale * log_t + (1 - reward_scale) * log_r, axis=-1
  )


def regularized_optimum(
  reference: Float[Array, "*b v"],
  reward: Float[Array, "*b v"],
  *,
  sharpness: Any,
) -> Float[Array, "*b v"]:
  """Log-policy that maximises E[reward] - KL(policy||reference) / sharpness.

  Args:
    reference: logits. Shape [*b, v].
    reward: Shape [*b, v].
    sharpness: inverse temperature of the KL, >= 0.

  Returns:
    Log-probabilities, shape [*b, v].
  """
  _checks.same_shape("regularized_optimum", reference=reference, reward=reward)
  reference = _checks.at_least_float32(reference)
  return jax.nn.log_softmax(reference + sharpness * reward, axis=-1)


def expected_reward(
  logits: Float[Array, "*b v"], reward: Float[Array, "*b v"]
) -> Float[Array, "*b"]:
  """sum_a softmax(logits)_a reward_a, exactly; differentiable.

  Args:
    logits: of the policy. Shape [*b, v].
    reward: Shape [*b, v].

  Returns:
    Shape [*b].
  """
  _checks.same_shape("expected_reward", logits=logits, reward=reward)
  policy = jax.nn.softmax(_checks.at_least_float32(logits), axis=-1)
  return jnp.sum(policy * reward, axis=-1)


__all__ = [
  "TabularTask",
  "expected_reward",
  "geometric_optimum",
  "make_tabular_task",
  "regularized_optimum",
]
