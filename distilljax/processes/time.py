"""Times and noise levels: grids, warps and random draws.

Every `sample_*` function takes one key, or an array of keys: with keys of shape
[b] each row is drawn from its own key and `shape` is the shape of a row's draw,
so that numbers do not depend on how a batch is cut. Keys are new-style
(`jax.random.key`). Draws are float32.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import _checks
from distilljax.typing import Array, Bool, Float, Int, Key, Number


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


def ordered_pair(t: Float[Array, "*b"], r: Float[Array, "*b"]):
  """(t, r) = (max, min) of two draws, elementwise.

  Args:
    t: one draw. Shape [*b].
    r: another. Shape [*b].

  Returns:
    The larger and the smaller, each of shape [*b].
  """
  return jnp.maximum(t, r), jnp.minimum(t, r)


def first_rows(b: int, share: Number) -> Bool[Array, "b"]:
  """True for the first floor(b * share) of b rows: the official codes' split.

  Of the GLOBAL batch: rows must have been shuffled.

  Args:
    b: number of rows of the global batch.
    share: share of rows that are True, in [0, 1].

  Returns:
    A mask over the rows. Shape [b], bool.
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
    t, r = ordered_pair(*shift_time(pair, shift=shift))
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


def sample_uniform_times(
    key: Key[Array, "*k"],
    shape: tuple[int, ...] = (),
    *,
    low: Number = 0.0,
    high: Number = 1.0,
    shift: Number = 1.0,
) -> Float[Array, "*b"]:
  """Uniform times in [low, high), then shifted (`shift_time`).

  Args:
    key: one key, or keys [b].
    shape: shape of the draw for each key.
    low: >= 0, before the shift.
    high: <= 1, before the shift.
    shift: > 0.

  Returns:
    Times of the keys' shape followed by `shape`.
  """
  fn = "sample_uniform_times"
  _checks.in_range(fn, "high", high, 0, 1)
  _checks.in_range(fn, "low", low, 0, high)
  t = _per_key(
      lambda k: jax.random.uniform(k, shape, minval=low, maxval=high), key
  )
  return shift_time(t, shift=shift)


def sample_logit_normal_times(
    key: Key[Array, "*k"],
    shape: tuple[int, ...] = (),
    *,
    mean: Number = 0.0,
    std: Number = 1.0,
    shift: Number = 1.0,
) -> Float[Array, "*b"]:
  """sigmoid(mean + std n), n standard normal, then shifted.

  On the straight path sigma / alpha is then log-normal. As
  `sample_uniform_times`.

  Args:
    key: one key, or keys [b].
    shape: shape of the draw for each key.
    mean: of the logit.
    std: of the logit, >= 0.
    shift: > 0, see `shift_time`.

  Returns:
    Times of the keys' shape followed by `shape`.

  References:
    Esser et al., Scaling Rectified Flow Transformers, 2024, arXiv:2403.03206,
    eq. 19.
  """
  _checks.in_range("sample_logit_normal_times", "std", std, 0)
  normal = _per_key(lambda k: jax.random.normal(k, shape), key)
  return shift_time(jax.nn.sigmoid(mean + std * normal), shift=shift)


def sample_log_normal_sigmas(
    key: Key[Array, "*k"],
    shape: tuple[int, ...] = (),
    *,
    mean: Number = -1.2,
    std: Number = 1.2,
) -> Float[Array, "*b"]:
  """sigma = exp(mean + std n), n standard normal: EDM's training levels.

  Give them to `EDM.t_from_sigma`, or to any path by
  `path.t_from_log_snr(-2 log sigma)`: on TrigFlow that is arctan(sigma /
  sigma_data), the draw of sCM (mean -1.0, std 1.4) and rCM.

  Args:
    key: one key, or keys [b].
    shape: shape of the draw for each key.
    mean: of log sigma.
    std: of log sigma, >= 0.

  Returns:
    Levels > 0 of the keys' shape followed by `shape`.

  References:
    Karras et al., Elucidating the Design Space, 2022, arXiv:2206.00364,
    table 1.
  """
  _checks.in_range("sample_log_normal_sigmas", "std", std, 0)
  normal = _per_key(lambda k: jax.random.normal(k, shape), key)
  return jnp.exp(mean + std * normal)


def karras_sigmas(
    n,
    *,
    sigma_min: Number = 0.002,
    sigma_max: Number = 80.0,
    rho: Number = 7.0,
    length: int | None = None,
) -> Float[Array, "n"]:
  """n noise levels from sigma_min up to sigma_max, even in sigma^(1/rho).

  Entry i (from 0) is (a + i / (n - 1) (b - a))^rho with a = sigma_min^(1/rho),
  b = sigma_max^(1/rho). Samplers want them decreasing: `[::-1]`.

  Args:
    n: how many, >= 2; an integer array (a number of levels that grows during
      training) needs `length`.
    sigma_min: > 0.
    sigma_max: > sigma_min.
    rho: > 0.
    length: pad to this many entries by repeating sigma_max, so that the shape
      does not depend on n. Padding has no probability in `lognormal_levels`.

  Returns:
    Increasing levels, computed on the host in float64 when n is a Python
    number. Shape [n], or [length].

  Raises:
    ValueError: a range that is not one, or n < 2, or n > length.

  References:
    Karras et al., 2022, arXiv:2206.00364, eq. 5.
  """
  fn = "karras_sigmas"
  _checks.in_range(fn, "sigma_min", sigma_min, 0, open_low=True)
  _checks.in_range(fn, "sigma_max", sigma_max, sigma_min, open_low=True)
  _checks.in_range(fn, "rho", rho, 0, open_low=True)
  _checks.in_range(fn, "n", n, 2, length)
  if length is None:
    if not isinstance(n, int):
      _checks.fail(fn, "length", "given when n is an array", None)
    length = n
  low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
  dtype = jnp.result_type(float)
  if isinstance(n, int):
    place = np.minimum(np.arange(length) / (n - 1), 1)
    return jnp.asarray((low + place * (high - low)) ** rho, dtype)
  place = jnp.arange(length, dtype=dtype) / (jnp.asarray(n, dtype) - 1)
  return (low + jnp.minimum(place, 1) * (high - low)) ** rho


def lognormal_levels(
    sigmas: Float[Array, "n"], *, mean: Number = -1.1, std: Number = 2.0
) -> Float[Array, "{sigmas.shape[0]}-1"]:
  """Probability of each pair (sigma_i, sigma_{i+1}) of neighbouring levels.

  p_i proportional to erf(z_{i+1}) - erf(z_i), z = (log sigma - mean) /
  (sqrt(2) std): a log-normal over noise levels, made discrete.

  Args:
    sigmas: increasing levels. Shape [n], n >= 2.
    mean: of log sigma.
    std: of log sigma, > 0.

  Returns:
    Probabilities that sum to 1. Shape [n - 1].

  References:
    Song and Dhariwal, Improved Techniques for Training Consistency Models,
    2023, arXiv:2310.14189, section 3.5.
  """
  fn = "lognormal_levels"
  _checks.rank(fn, "sigmas", sigmas, 1, "[n]")
  _checks.in_range(fn, "std", std, 0, open_low=True)
  if jnp.shape(sigmas)[0] < 2:
    _checks.fail(fn, "sigmas", "2 or more levels", list(jnp.shape(sigmas)))
  sigmas = _checks.at_least_float32(sigmas)
  z = (jnp.log(sigmas) - mean) / (math.sqrt(2) * std)
  # erf(b) - erf(a) cancels where both are near 1; erfc keeps the far tail.
  upper = jax.lax.erfc(z[:-1]) - jax.lax.erfc(z[1:])
  lower = jax.lax.erfc(-z[1:]) - jax.lax.erfc(-z[:-1])
  mass = jnp.where(z[:-1] > 0, upper, lower)
  return mass / jnp.sum(mass)


def sample_levels(
    key: Key[Array, "*k"],
    probabilities: Float[Array, "n"],
    shape: tuple[int, ...] = (),
) -> Int[Array, "*b"]:
  """Indices drawn with the given probabilities.

  With `lognormal_levels` index i stands for the pair (sigma_i, sigma_{i+1}).

  Args:
    key: one key, or keys [b].
    probabilities: >= 0. Shape [n].
    shape: shape of the draw for each key.

  Returns:
    Integers in 0..n-1 of the keys' shape followed by `shape`.
  """
  _checks.rank("sample_levels", "probabilities", probabilities, 1, "[n]")
  logits = jnp.log(_checks.at_least_float32(probabilities))
  return _per_key(
      lambda k: jax.random.categorical(k, logits, shape=shape), key
  )


def improved_ct_num_scales(
    step, total: int, *, s0: int = 10, s1: int = 1280
) -> Int[Array, "*b"]:
  """Levels at a step of iCT: doubling from s0 + 1 to s1 + 1 points.

  N(k) = min(s0 2^floor(k / K'), s1) + 1,
  K' = floor(K / (log2(floor(s1 / s0)) + 1)).

  Args:
    step: k, >= 0; a Python int or an integer array.
    total: K, steps of the whole run, >= 1.
    s0: first number of intervals, >= 1.
    s1: last, >= s0.

  Returns:
    The number of levels (points, not intervals), int32, of step's shape.

  References:
    Song and Dhariwal, 2023, arXiv:2310.14189, eq. 11.
  """
  fn = "improved_ct_num_scales"
  _checks.in_range(fn, "step", step, 0)
  _checks.in_range(fn, "total", total, 1)
  _checks.in_range(fn, "s0", s0, 1)
  _checks.in_range(fn, "s1", s1, s0)
  stages = math.log2(s1 // s0) + 1
  # At least one step a stage: a run shorter than its stages would divide by 0.
  length = max(int(total // stages), 1)
  step = jnp.asarray(step, jnp.int32)
  # Beyond the last doubling the exponent has no effect; kept small so that
  # the power stays an int32.
  doublings = jnp.minimum(step // length, math.ceil(stages))
  return jnp.minimum(s0 * 2**doublings, s1).astype(jnp.int32) + 1


def consistency_num_scales(
    step, total: int, *, s0: int = 2, s1: int = 150, mu0: Number = 0.9
) -> tuple[Int[Array, "*b"], Float[Array, "*b"]]:
  """(levels, decay of the target's EMA) at a step of consistency training.

  N(k) = ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 and
  mu(k) = exp(s0 log(mu0) / (N(k) - 1)), with N >= 2.

  Args:
    step: k, >= 0; a Python int or an integer array.
    total: K, steps of the whole run, >= 1.
    s0: first number of levels, >= 2.
    s1: last number of intervals, >= s0.
    mu0: decay at the start, in (0, 1).

  Returns:
    (N int32, mu float32), of step's shape.

  References:
    Song et al., Consistency Models, 2023, arXiv:2303.01469, appendix C.
  """
  fn = "consistency_num_scales"
  _checks.in_range(fn, "step", step, 0)
  _checks.in_range(fn, "total", total, 1)
  _checks.in_range(fn, "s0", s0, 2)
  _checks.in_range(fn, "s1", s1, s0)
  _checks.in_range(fn, "mu0", mu0, 0, 1, open_low=True, open_high=True)
  dtype = jnp.result_type(float)
  place = jnp.asarray(step).astype(dtype) / total
  root = jnp.sqrt(place * ((s1 + 1) ** 2 - s0**2) + s0**2)
  scales = jnp.maximum(jnp.ceil(root - 1), 1) + 1
  decay = jnp.exp(s0 * math.log(mu0) / (scales - 1))
  return scales.astype(jnp.int32), decay


def phase_intervals(
    boundaries: tuple[Number, ...], *, margin: Number = 0.0
) -> tuple[tuple[float, float], ...]:
  """The times at which each phase's score is matched: (t_k + margin, 1).

  Boundaries 1 = t_0 > t_1 > ... > t_K = 0 cut the path into K phases; phase k
  carries samples from t_{k-1} to t_k and its score lives on (t_k, 1): up to
  1, not to t_{k-1}, as the paper found better. The target explodes as t falls
  to t_k, hence the margin.

  Args:
    boundaries: decreasing, from 1 to 0, already shifted.
    margin: distance kept from t_k (0.02 in the released trainer, for t_k > 0
      and the last phase alike).

  Returns:
    K pairs (low, high), first phase (most noise) first.

  Raises:
    ValueError: boundaries that do not fall from 1 to 0.

  References:
    Phased DMD, 2025, arXiv:2510.27684; a reconstruction from the released
    trainer and a summary.
  """
  fn = "phase_intervals"
  bounds = [float(b) for b in boundaries]
  if len(bounds) < 2 or bounds[0] != 1 or bounds[-1] != 0 or not all(
      a > b for a, b in zip(bounds, bounds[1:], strict=False)
  ):
    _checks.fail(fn, "boundaries", "falling from 1 to 0", bounds)
  _checks.in_range(fn, "margin", margin, 0, 1 - bounds[1], open_high=True)
  return tuple((low + margin, 1.0) for low in bounds[1:])


def sample_any_flow_times(
    key: Key[Array, "*k"],
    shape: tuple[int, ...] = (),
    *,
    diffusion: Number = 0.5,
    consistency: Number = 0.25,
    part: Float[Array, "*b"] | None = None,
    shift: Number = 5.0,
) -> tuple[Float[Array, "*b"], Float[Array, "*b"], Bool[Array, "*b"]]:
  """AnyFlow's (t, r): two uniforms, ordered, then by part of the batch.

  The first `diffusion` of the batch has r = t, the next `consistency` has
  r = 0, the rest keeps its pair; then both are shifted.

  Args:
    key: one key, or keys [b].
    shape: shape of the draw for each key.
    diffusion: share with r = t.
    consistency: share with r = 0; the two sum to at most 1.
    part: each row's place in the batch, in [0, 1): `jnp.arange(b) / b` for the
      official split by index of the global batch. None draws it, so that the
      shares hold in expectation. The draw's shape.
    shift: warp of both times.

  Returns:
    (t, r, is_diffusion), each of the keys' shape followed by `shape`.

  References:
    AnyFlow, 2026, arXiv:2605.13724, stage 1 of the released trainer.
  """
  fn = "sample_any_flow_times"
  _checks.in_range(fn, "diffusion", diffusion, 0, 1)
  _checks.in_range(fn, "consistency", consistency, 0, 1 - diffusion)

  def draw(key):
    of_pair, of_part = jax.random.split(key)
    pair = jax.random.uniform(of_pair, (2, *shape))
    return (*ordered_pair(*pair), jax.random.uniform(of_part, shape))

  t, r, place = _per_key(draw, key)
  if part is not None:
    _checks.floating(fn, part=part)
    _checks.shape(fn, "part", part, t.shape, "[b]", "the draw")
    place = part
  same = place < diffusion
  r = jnp.where(place < diffusion + consistency, jnp.zeros_like(r), r)
  r = jnp.where(same, t, r)
  return shift_time(t, shift=shift), shift_time(r, shift=shift), same


def ect_next_times(
    t: Float[Array, "*b"],
    stage: int,
    *,
    q: Number = 2.0,
    k: Number = 8.0,
    b: Number = 1.0,
    adjust: str = "sigmoid",
) -> Float[Array, "*b"]:
  """The lower noise level r that ECT pairs with the level t (EDM sigmas).

  r = t (1 - q^-(stage+1) n(t)), kept >= 0, with n(t) = 1 + k sigmoid(-b t) for
  "sigmoid" and 1 for "const". Where r = 0 the target is the clean sample.

  Args:
    t: noise levels, > 0. Any shape.
    stage: how often the gap was halved already, >= 0.
    q: factor of a stage, > 1.
    k: how much wider the gap is at little noise.
    b: how fast that fades with t.
    adjust: "sigmoid" or "const".

  Returns:
    Levels in [0, t), of t's shape.

  References:
    Geng et al., Consistency Models Made Easy, 2024, arXiv:2406.14548,
    section 3.2 and the released code.
  """
  fn = "ect_next_times"
  _checks.one_of(fn, "adjust", adjust, ("sigmoid", "const"))
  _checks.in_range(fn, "stage", stage, 0)
  _checks.in_range(fn, "q", q, 1, open_low=True)
  t = _checks.at_least_float32(t)
  ratio = 1 - q ** -(stage + 1.0)
  if adjust == "const":
    return jnp.maximum(t * ratio, 0)
  widen = 1 + k * jax.nn.sigmoid(-b * t)
  return jnp.maximum(t * (1 - (1 - ratio) * widen), 0)


def tbcm_route(
    n: int = 16, *, shift: Number = 2.5, num_train: int = 1000
) -> Float[Array, "{n}"]:
  """TBCM's n angles, from pi/2 down: where its teacher's sampler stops.

  u falls evenly from 1 to shift(1 / num_train) in n points, tau = shift(u)
  (the end is shifted twice, as in the authors' code) and the angle is
  arctan(tau / (1 - tau)).

  Args:
    n: number of teacher calls, >= 2.
    shift: see `shift_time`.
    num_train: number of training times of the base model.

  Returns:
    Decreasing angles of TrigFlow. Shape [n].

  References:
    TBCM, 2025, arXiv:2511.20410, released training script.
  """
  fn = "tbcm_route"
  _checks.in_range(fn, "n", n, 2)
  _checks.in_range(fn, "num_train", num_train, 2)
  low = shift_time(1 / num_train, shift=shift)
  tau = shift_time(
      jnp.asarray(np.linspace(1.0, low, n), jnp.result_type(float)),
      shift=shift,
  )
  return jnp.arctan2(tau, 1 - tau)


def sample_tbcm_route(
    key: Key[Array, ""], route: Float[Array, "n"]
) -> Float[Array, "n"]:
  """A jittered route: angle k is uniform between route[k] and route[k - 1].

  The first angle stays. One draw serves the whole batch: give the step's key.

  Args:
    key: one key.
    route: decreasing angles, as `tbcm_route`. Shape [n].

  Returns:
    Decreasing angles. Shape [n].
  """
  _checks.rank("sample_tbcm_route", "route", route, 1, "[n]")
  place = jax.random.uniform(key, (route.shape[0] - 1,), route.dtype)
  rest = route[1:] + place * (route[:-1] - route[1:])
  return jnp.concatenate([route[:1], rest])
