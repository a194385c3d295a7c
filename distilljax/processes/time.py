"""Times and noise levels: grids, warps and random draws.

Every `sample_*` function takes one key, or an array of keys: with keys of shape
[b] each row is drawn from its own key and `shape` is the shape of a row's draw,
so that numbers do not depend on how a batch is cut. Keys are new-style
(`jax.random.key`). Draws are float32.
"""

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import _checks
from distilljax.typing import Array, Bool, Float, Key, Number


def _per_key(draw, key):
  """`draw(key)` for one key, mapped over an array of keys."""
  for _ in range(key.ndim):
    draw = jax.vmap(draw)
  return draw(key)


def shift_time(t: Float[Array, "*b"] | Number, *, shift: Number):
  """shift t / (1 + (shift - 1) t): moves times towards noise for shift > 1.

  On the straight path this multiplies sigma / alpha by `shift`. The inverse is
  the same function with 1 / shift.

  Args:
    t: times in [0, 1]. Any shape.
    shift: > 0; 1 changes nothing.

  Returns:
    Times in [0, 1] of t's shape; the ends stay.

  References:
    Esser et al., Scaling Rectified Flow Transformers, 2024, arXiv:2403.03206,
    eq. 23.
  """
  _checks.in_range("shift_time", "shift", shift, 0, open_low=True)
  _checks.in_range("shift_time", "t", t, 0, 1)
  return shift * t / (1 + (shift - 1) * t)


def time_grid(
    n: int, *, start: Number = 1.0, end: Number = 0.0, shift: Number = 1.0
) -> Float[Array, "{n}+1"]:
  """n + 1 times from `start` down to `end`, evenly spaced, then shifted.

  Args:
    n: number of steps, >= 1.
    start: first time before the shift, in [0, 1].
    end: last time before the shift, in [0, start].
    shift: see `shift_time`.

  Returns:
    Decreasing times, float32 (float64 under x64). Shape [n + 1].

  Raises:
    ValueError: n < 1, ends outside [0, 1] or not start > end.
  """
  _checks.in_range("time_grid", "n", n, 1)
  _checks.in_range("time_grid", "start", start, 0, 1)
  _checks.in_range("time_grid", "end", end, 0, start, open_high=True)
  grid = jnp.asarray(np.linspace(start, end, n + 1), jnp.result_type(float))
  return shift_time(grid, shift=shift)


def mean_flow_pair(t, r, *, shift: Number = 1.0):
  """(max, min) of two draws, both shifted: t >= r."""
  t, r = jnp.maximum(t, r), jnp.minimum(t, r)
  return shift_time(t, shift=shift), shift_time(r, shift=shift)


def first_rows(b: int, share: Number) -> Bool[Array, "b"]:
  """True for the first floor(b * share) of b rows: the official codes' split.

  Of the GLOBAL batch: rows must have been shuffled.
  """
  _checks.in_range("first_rows", "share", share, 0, 1)
  return jnp.arange(b) < int(b * share)


def sample_mean_flow_times(
    key: Key[Array, "*k"],
    shape: tuple[int, ...] = (),
    *,
    distribution: str = "logit_normal",
    mean: float = -0.4,
    std: Number = 1.0,
    equal: Number = 0.75,
    where_equal: Bool[Array, "*b"] | None = None,
    t_one: Number = 0.0,
    r_zero: Number = 0.0,
    shift: Number = 1.0,
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
  """(t, r) with r <= t, for MeanFlow and other flow maps.

  Two draws, ordered. Then, in this order: t := 1 with probability `t_one`,
  r := 0 with probability `r_zero`, r := t in a share `equal` (these rows are
  plain flow matching and ignore both masses).

  One-step sampling asks for (t, r) = (1, 0), which a logit-normal never draws:
  without mass there the one-step sample is poor though two steps look fine.

  Args:
    key: one key, or keys [b] (one a row; then `shape` is usually ()).
    shape: shape of the draw for each key.
    distribution: "logit_normal" (sigmoid of N(mean, std^2)) or "uniform".
    mean: of the logit.
    std: of the logit.
    equal: share of rows with r = t, each row drawn by itself.
    where_equal: which rows have r = t instead of drawing them, as
      `first_rows(b, 0.75)` for the official split by index. The draw's shape.
    t_one: probability of t := 1.
    r_zero: probability of r := 0.
    shift: warp of both times, before the masses; see `shift_time`.

  Returns:
    (t, r), each of the keys' shape followed by `shape`.

  Raises:
    ValueError: unknown distribution, a probability outside [0, 1].

  References:
    Geng et al., Mean Flows for One-step Generative Modeling, 2025,
    arXiv:2505.13447, section 4.3; defaults and split: the authors' released
    configuration. The end masses are ours.
  """
  fn = "sample_mean_flow_times"
  _checks.one_of(fn, "distribution", distribution, ("logit_normal", "uniform"))
  for name, value in (("equal", equal), ("t_one", t_one), ("r_zero", r_zero)):
    _checks.in_range(fn, name, value, 0, 1)
  _checks.in_range(fn, "std", std, 0)

  def draw(key):
    keys = jax.random.split(key, 4)
    if distribution == "uniform":
      pair = jax.random.uniform(keys[0], (2, *shape))
    else:
      normal = jax.random.normal(keys[0], (2, *shape))
      pair = jax.nn.sigmoid(mean + std * normal)
    t, r = mean_flow_pair(pair[0], pair[1], shift=shift)
    coins = [jax.random.uniform(k, shape) for k in keys[1:]]
    t = jnp.where(coins[0] < t_one, jnp.ones_like(t), t)
    r = jnp.where(coins[1] < r_zero, jnp.zeros_like(r), r)
    return t, r, coins[2] < equal

  t, r, same = _per_key(draw, key)
  if where_equal is not None:
    _checks.boolean(fn, where_equal=where_equal)
    _checks.shape(fn, "where_equal", where_equal, t.shape, "[b]", "the draw")
    same = where_equal
  return t, jnp.where(same, t, r)
