"""The extrapolation cliff where it is exact: one position, two outcomes.

The student is one logit, the advantage is `gopd_advantage` of the sampled
outcome, with log(T/S) truncated at log c where the update is clipped (ListOPD).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses


def logit(p):
  return np.log(p) - np.log1p(-p)


def advantages(x, p, b, scale, c):
  """Of the modal and the off-modal outcome, for a student with logit x [n]."""
  two = lambda x: jnp.stack([jax.nn.log_sigmoid(x), jax.nn.log_sigmoid(-x)], -1)
  student = two(x)
  fixed = lambda q: jnp.broadcast_to(two(jnp.asarray(logit(q))), student.shape)
  teacher, base = fixed(p), fixed(b)
  out = losses.gopd_advantage(
    student, teacher, base, reward_scale=jnp.broadcast_to(scale, x.shape)
  )
  return out - jnp.maximum(teacher - student - jnp.log(c), 0)


@pytest.mark.parametrize(
  "p,b,c", [(0.99, 0.5, 5), (0.99, 0.5, 1.2), (0.95, 0.3, 3), (0.9, 0.5, 5)]
)
def test_exact_ascent_runs_away_above_the_threshold(p, b, c, x64):
  """Ratios truncated at c: an interior tail below lambda_run, none above.

  Up to lambda* the tail is the unclipped one, from there to lambda_run the
  truncated balance log(p / q) - log c + (lambda - 1) gap = 0 gives
  1 - exp((lambda - lambda_run) gap).
  """
  star = losses.extrapolation_threshold(p, b, c)
  run = losses.runaway_threshold(p, b, c)
  gap = logit(p) - logit(b)
  scales = np.array([star - 0.02, (star + run) / 2, run + 0.002])

  @jax.jit
  def ascend(x):
    def step(x, _):
      a = advantages(x, p, b, jnp.asarray(scales), c)
      # d E_q[A] / dx = q (1 - q) (A_modal - A_off), without its small factor.
      return x + 0.2 * (a[:, 0] - a[:, 1]), None

    return jax.lax.scan(step, x, length=60000)[0]

  tails = np.asarray(jax.nn.sigmoid(-ascend(jnp.full(3, logit(b)))))
  free = 1 / (1 + np.exp(logit(b) + scales * gap))
  np.testing.assert_allclose(tails[0], free[0], rtol=1e-6)
  truncated = -np.expm1((scales[1] - run) * gap)
  np.testing.assert_allclose(tails[1], truncated, rtol=1e-3)
  assert tails[1] < (1 - p) / c
  assert tails[2] < 1e-12


def test_sampled_training_loses_the_tail_above_the_threshold():
  """Card's small test B: 512 samples a step, 6,000 steps, lr .5, one logit."""
  p, b, c = 0.97, 0.6, 3.0
  scales = np.array([1.30, 1.35, 1.40, 1.45, 1.50, 1.70])
  star = losses.extrapolation_threshold(p, b, c)
  run = losses.runaway_threshold(p, b, c)
  np.testing.assert_allclose([star, run], [1.3644, 1.3677], atol=1e-4)

  @jax.jit
  def train(key, cap):
    def step(x, key):
      q = jax.nn.sigmoid(x)
      a = advantages(x, p, b, jnp.asarray(scales, jnp.float32), cap)
      modal = jax.random.uniform(key, (512, x.shape[0])) < q
      mean = q * a[:, 0] + (1 - q) * a[:, 1]
      centred = jnp.where(modal, a[None, :, 0], a[None, :, 1]) - mean[None]
      score = modal.astype(x.dtype) - q[None]
      x = x + 0.5 * jnp.mean(centred * score, axis=0)
      return x, jax.nn.sigmoid(-x)

    x = jnp.full(scales.shape, logit(b), jnp.float32)
    _, tails = jax.lax.scan(step, x, jax.random.split(key, 6000))
    return jnp.mean(tails[4000:], axis=0)

  clipped = np.asarray(train(jax.random.key(0), c))
  smooth = np.asarray(train(jax.random.key(1), 1e9))
  fixed = 1 / (1 + np.exp(scales * logit(p) + (1 - scales) * logit(b)))
  below = scales < star
  np.testing.assert_allclose(clipped[below], fixed[below], rtol=0.05)
  lost = clipped < 0.5 * (1 - p) / c
  assert scales[lost][0] == scales[scales > run][0] == 1.40
  # The card's measured tails; three of its seeds agree within 7 %.
  np.testing.assert_allclose(
    clipped, [0.0122, 0.0105, 0.0030, 0.0015, 0.0009, 0.0004], rtol=0.15,
    atol=1e-4,
  )
  # Without truncation nothing breaks there: the tail falls smoothly.
  np.testing.assert_allclose(smooth[[2, 5]], [0.0090, 0.0036], rtol=0.1)
