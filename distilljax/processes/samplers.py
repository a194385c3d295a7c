"""From noise to data: ODE, ancestral, consistency and flow-map samplers.

The network is a closure, always called with one time a row:
`velocity_fn(x, t)`, `x0_fn(x, t)` or `map_fn(x, t, r)` with t and r of shape
[b]. `times` decreases (noise to data), shape [n], or [n, b] for times of each
row. Random numbers are arguments. Loops are `lax.scan`; `unroll=True` leaves no
loop, which is what a convolutional network wants on CPU (inside a rolled loop
it runs 8 to 19 times slower there); any other network is best left rolled.
`True` is a Python loop: called eagerly with a jitted network it compiles one
step only.
"""

import jax
import jax.numpy as jnp

from distilljax import _checks
from distilljax.processes import path as path_lib
from distilljax.typing import (
    Array,
    DenoiseFn,
    Float,
    FlowMapFn,
    Number,
    PredictionFn,
)


def _grid(fn: str, x: Array, times, least: int) -> Array:
  """`times` as [n, b], in x's dtype; `least` entries at least."""
  _checks.floating(fn, x=x, times=times)
  _checks.nonempty(fn, x=x)
  _checks.min_rank(fn, "x", x, 1, "[b, *s]")
  times = jnp.asarray(times)
  n = times.shape[0] if times.ndim else 0
  if times.ndim not in (1, 2) or n < least:
    _checks.fail(
        fn, "times", f"[n] or [n, b] with n >= {least}", list(times.shape)
    )
  if times.ndim == 2:
    _checks.shape(fn, "times", times, (n, x.shape[0]), "[n, b]", "x")
  else:
    times = jnp.broadcast_to(times[:, None], (n, x.shape[0]))
  _checks.holds(
      fn, "times", times[:-1] - times[1:], lambda d: d >= 0, "decreasing"
  )
  return times.astype(x.dtype)


def _scan(step, x, xs, unroll: bool | int):
  """The last state of a scan whose steps keep the dtypes of the state."""

  def body(x, inputs):
    out = step(x, *inputs)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), out, x), None

  if unroll is True:
    for i in range(jax.tree.leaves(xs)[0].shape[0]):
      x, _ = body(x, jax.tree.map(lambda a, i=i: a[i], xs))
    return x
  return jax.lax.scan(body, x, xs, unroll=unroll)[0]


def euler(
    velocity_fn: PredictionFn,
    x: Float[Array, "b *s"],
    times: Float[Array, "..."],
    *,
    unroll: bool | int = 1,
) -> Float[Array, "b *s"]:
  """x <- x - (t - r) velocity_fn(x, t), from each time to the next.

  The variable is whatever velocity_fn differentiates by: with sigmas for times
  and (x - D(x, sigma)) / sigma for the velocity this is EDM's Euler sampler.

  Args:
    velocity_fn: (x, t) -> d x / dt. t [b].
    x: the state at times[0]. Shape [b, *s].
    times: decreasing. Shape [n + 1] or [n + 1, b].
    unroll: see the module's docstring.

  Returns:
    The state at times[-1], shape [b, *s], at least float32.

  Raises:
    ValueError: fewer than two times, or an empty batch.
  """
  x = _checks.at_least_float32(x)
  times = _grid("euler", x, times, 2)

  def step(x, t, r):
    velocity = velocity_fn(x, t).astype(x.dtype)
    return x - _checks.expand_like(t - r, x) * velocity

  return _scan(step, x, (times[:-1], times[1:]), unroll)


def heun(
    velocity_fn: PredictionFn,
    x: Float[Array, "b *s"],
    times: Float[Array, "..."],
    *,
    euler_last: bool = False,
    unroll: bool | int = 1,
) -> Float[Array, "b *s"]:
  """Heun's second-order method: x <- x - (t - r) (v_t + v_r) / 2.

  v_t = velocity_fn(x, t) and v_r is taken at (x - (t - r) v_t, r). Two calls a
  step. With sigmas for times it is EDM's deterministic sampler; see `euler`.

  Args:
    velocity_fn: (x, t) -> d x / dt. t [b].
    x: the state at times[0]. Shape [b, *s].
    times: decreasing. Shape [n + 1] or [n + 1, b].
    euler_last: the last step is Euler's: for a velocity such as (x - x0) / t
      that cannot be called at its end, t = 0.
    unroll: see the module's docstring.

  Returns:
    The state at times[-1], shape [b, *s], at least float32.

  Raises:
    ValueError: fewer than two times, or an empty batch.

  References:
    Karras et al., Elucidating the Design Space, 2022, arXiv:2206.00364,
    algorithm 1.
  """
  x = _checks.at_least_float32(x)
  times = _grid("heun", x, times, 2)

  def step(x, t, r):
    h = _checks.expand_like(t - r, x)
    first = velocity_fn(x, t).astype(x.dtype)
    second = velocity_fn(x - h * first, r).astype(x.dtype)
    return x - h * (first + second) / 2

  last = 1 if euler_last else 0
  n = times.shape[0] - 1 - last
  x = _scan(step, x, (times[:n], times[1 : n + 1]), unroll)
  if euler_last:
    t, r = times[-2], times[-1]
    velocity = velocity_fn(x, t).astype(x.dtype)
    x = x - _checks.expand_like(t - r, x) * velocity
  return x


def _levels(path: path_lib.NoisePath, times: Array, x: Array):
  """alpha and sigma at times [n, b], in x's dtype."""
  c = path.coefficients(times)
  return c.alpha.astype(x.dtype), c.sigma.astype(x.dtype)


def ancestral(
    x0_fn: DenoiseFn,
    x: Float[Array, "b *s"],
    times: Float[Array, "..."],
    noises: Float[Array, "..."] | None = None,
    *,
    path: path_lib.NoisePath,
    eta: Number = 1.0,
    unroll: bool | int = 1,
) -> Float[Array, "b *s"]:
  """DDPM's ancestral sampler (eta = 1), or DDIM (eta = 0), on any path.

  From t to r, with x0 = x0_fn(x, t) and epsilon = (x - alpha_t x0) / sigma_t:
    s = eta sigma_r sqrt(1 - (alpha_t sigma_r / (alpha_r sigma_t))^2)
    x <- alpha_r x0 + sqrt(sigma_r^2 - s^2) epsilon + s noise.
  With eta = 0 this is Euler in sigma / alpha, whatever the path's time: what
  EDM (with its warped time) and TrigFlow (a rotation) are sampled by.

  Args:
    x0_fn: (x, t) -> x0. t [b].
    x: the state at times[0]. Shape [b, *s].
    times: decreasing, and sigma > 0 at all but the last. Shape [n + 1] or
      [n + 1, b].
    noises: unit noise of each step; None only at eta 0. Shape [n, b, *s].
    path: the noise path.
    eta: share of the posterior's deviation that is drawn anew, in [0, 1].
    unroll: see the module's docstring.

  Returns:
    The state at times[-1], shape [b, *s], at least float32.

  Raises:
    ValueError: fewer than two times, noises of another shape or missing, eta
      outside [0, 1], or an empty batch.

  References:
    Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv:2006.11239,
    eq. 7; Song et al., DDIM, 2020, arXiv:2010.02502, eq. 12 and 16.
  """
  fn = "ancestral"
  x = _checks.at_least_float32(x)
  times = _grid(fn, x, times, 2)
  _checks.in_range(fn, "eta", eta, 0, 1)
  n = times.shape[0] - 1
  if noises is None:
    if eta:
      _checks.fail(fn, "noises", "given when eta > 0", None)
    noises = jnp.zeros((n, 1), x.dtype)
  else:
    noises = _noises(fn, x, noises, n)
  alpha, sigma = _levels(path, times, x)

  def step(x, t, alpha, sigma, alpha_r, sigma_r, noise):
    kept = jnp.square(alpha * sigma_r / (alpha_r * sigma))
    fresh = eta * sigma_r * jnp.sqrt(jnp.maximum(1 - kept, 0))
    old = jnp.sqrt(jnp.maximum(jnp.square(sigma_r) - jnp.square(fresh), 0))
    x0 = x0_fn(x, t).astype(x.dtype)
    alpha, sigma, alpha_r, fresh, old = (
        _checks.expand_like(a, x) for a in (alpha, sigma, alpha_r, fresh, old)
    )
    out = alpha_r * x0 + old * ((x - alpha * x0) / sigma)
    return out + fresh * noise if eta else out

  inputs = (
      times[:-1], alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], noises
  )
  return _scan(step, x, inputs, unroll)


def dpm_solver(
    x0_fn: DenoiseFn,
    x: Float[Array, "b *s"],
    times: Float[Array, "..."],
    *,
    path: path_lib.NoisePath,
    unroll: bool | int = 1,
) -> Float[Array, "b *s"]:
  """DPM-Solver++(2M): second order from two steps' predictions, one call each.

  With l = log(alpha / sigma), h = l_r - l_t and the step before it h':
    D = x0_t + h / (2 h') (x0_t - x0_before)
    x <- sigma_r / sigma_t x + (alpha_r - alpha_t sigma_r / sigma_t) D.
  The first step, and one that starts or ends where l is infinite (alpha = 0,
  sigma = 0), uses D = x0_t.

  Args:
    x0_fn: (x, t) -> x0. t [b].
    x: the state at times[0]. Shape [b, *s].
    times: strictly decreasing, and sigma > 0 at all but the last. Shape
      [n + 1] or [n + 1, b].
    path: the noise path.
    unroll: see the module's docstring.

  Returns:
    The state at times[-1], shape [b, *s], at least float32.

  Raises:
    ValueError: fewer than two times, or an empty batch.

  References:
    Lu et al., DPM-Solver++, 2022, arXiv:2211.01095, algorithm 2.
  """
  x = _checks.at_least_float32(x)
  times = _grid("dpm_solver", x, times, 2)
  alpha, sigma = _levels(path, times, x)
  steps = jnp.diff(jnp.log(alpha) - jnp.log(sigma), axis=0)
  first = jnp.ones_like(steps[:1])
  before = jnp.concatenate([first, steps[:-1]])
  usable = jnp.isfinite(steps) & jnp.isfinite(before)
  usable = usable & (jnp.arange(steps.shape[0]) > 0)[:, None]
  # 0 / inf where the step before came from pure noise.
  ratio = jnp.where(usable, steps, jnp.zeros_like(steps)) / (2 * before)

  def step(state, t, alpha, sigma, alpha_r, sigma_r, ratio):
    x, previous = state
    x0 = x0_fn(x, t).astype(x.dtype)
    shrink = sigma_r / sigma
    shrink, push, ratio = (
        _checks.expand_like(a, x)
        for a in (shrink, alpha_r - alpha * shrink, ratio)
    )
    data = x0 + ratio * (x0 - previous)
    return shrink * x + push * data, x0

  inputs = (times[:-1], alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], ratio)
  return _scan(step, (x, jnp.zeros_like(x)), inputs, unroll)[0]


def flow_map(
    map_fn: FlowMapFn,
    x: Float[Array, "b *s"],
    times: Float[Array, "..."],
    *,
    unroll: bool | int = 1,
) -> Float[Array, "b *s"]:
  """x <- x - (t - r) map_fn(x, t, r): a flow map with any number of steps.

  Args:
    map_fn: (x, t, r) -> mean velocity from t down to r. t, r [b].
    x: the state at times[0]. Shape [b, *s].
    times: decreasing; (1, 0) for one step. Shape [n + 1] or [n + 1, b].
    unroll: see the module's docstring.

  Returns:
    The state at times[-1], shape [b, *s], at least float32.

  Raises:
    ValueError: fewer than two times, or an empty batch.
  """
  x = _checks.at_least_float32(x)
  times = _grid("flow_map", x, times, 2)

  def step(x, t, r):
    mean_velocity = map_fn(x, t, r).astype(x.dtype)
    return x - _checks.expand_like(t - r, x) * mean_velocity

  return _scan(step, x, (times[:-1], times[1:]), unroll)


def _noises(fn: str, x: Array, noises, n: int) -> Array:
  _checks.floating(fn, noises=noises)
  _checks.shape(
      fn, "noises", noises, (n, *x.shape), "[n - 1, b, *s]", "times and x"
  )
  return jnp.asarray(noises).astype(x.dtype)


def multistep_consistency(
    x0_fn: DenoiseFn,
    x: Float[Array, "b *s"],
    times: Float[Array, "..."],
    noises: Float[Array, "..."],
    *,
    path: path_lib.NoisePath,
    sigma_floor: Number = 0.0,
    unroll: bool | int = 1,
) -> Float[Array, "b *s"]:
  """Predict x0, add fresh noise at the next level, predict again.

  x0 = x0_fn(x, t_0); then x = alpha(t_i) x0 + sigma(t_i) noise_i and
  x0 = x0_fn(x, t_i) for the other times. Few-step students of consistency and
  distribution-matching methods are used like this.

  Args:
    x0_fn: (x, t) -> x0. t [b].
    x: the state at times[0]. Shape [b, *s].
    times: one for each call, decreasing. Shape [n] or [n, b].
    noises: unit noise for the calls after the first. Shape [n - 1, b, *s].
    path: the noise path.
    sigma_floor: the noise that x0_fn leaves in its output; what is added is
      sqrt(sigma^2 - sigma_floor^2) noise. 0.002 (sigma_min) in the consistency
      model paper, on the EDM path.
    unroll: see the module's docstring.

  Returns:
    The last x0, shape [b, *s], at least float32.

  Raises:
    ValueError: no time, noises of another shape, or an empty batch.

  References:
    Song et al., Consistency Models, 2023, arXiv:2303.01469, algorithm 1.
  """
  fn = "multistep_consistency"
  x = _checks.at_least_float32(x)
  times = _grid(fn, x, times, 1)
  noises = _noises(fn, x, noises, times.shape[0] - 1)
  _checks.in_range(fn, "sigma_floor", sigma_floor, 0)

  def step(x0, t, noise):
    c = path.coefficients(t)
    sigma = c.sigma
    if sigma_floor:
      sigma = jnp.sqrt(jnp.maximum(sigma**2 - sigma_floor**2, 0))
    alpha, sigma = (
        _checks.expand_like(a.astype(x.dtype), x) for a in (c.alpha, sigma)
    )
    return x0_fn(alpha * x0 + sigma * noise, t)

  x0 = x0_fn(x, times[0]).astype(x.dtype)
  return _scan(step, x0, (times[1:], noises), unroll)


def predict_and_renoise(
    x0_fn: DenoiseFn,
    x: Float[Array, "b *s"],
    times: Float[Array, "..."],
    noises: Float[Array, "..."],
    exit_step,
    *,
    path: path_lib.NoisePath,
    skip: bool = False,
    unroll: bool | int = 1,
) -> tuple[Float[Array, "b *s"], Float[Array, "b"]]:
  """Backward simulation: the student's input at step `exit_step` of its loop.

  `exit_step` times: x <- alpha(t_{i+1}) x0_fn(x, t_i) + sigma(t_{i+1}) noise_i.
  The caller then makes the one call that is differentiated,
  x0_fn(x_exit, t_exit), so that training inputs are what sampling produces. No
  gradient flows through what is returned.

  Args:
    x0_fn: the student, (x, t) -> x0. t [b].
    x: pure noise at times[0]. Shape [b, *s].
    times: the student's times, decreasing. Shape [n] or [n, b] (rCM draws them
      for each row).
    noises: unit noise of each re-noising. Shape [n - 1, b, *s].
    exit_step: 0..n-1, one for the whole batch: a Python int (then only that
      many calls are made) or an integer scalar, drawn from a key that is equal
      on every device.
    path: the noise path.
    skip: with a traced exit_step, run no call past it (`lax.cond`; right on
      accelerators) instead of running and discarding it (right for
      convolutions on CPU).
    unroll: see the module's docstring.

  Returns:
    (x_exit [b, *s], t_exit [b]).

  Raises:
    ValueError: noises of another shape, a Python exit_step outside 0..n-1, or
      an empty batch.

  References:
    Yin et al., Improved Distribution Matching Distillation, 2024,
    arXiv:2405.14867, section 4.5; the random exit as in the authors' code.
  """
  fn = "predict_and_renoise"
  # Each input and every prediction is cut, not only the result, so that no
  # tangent is carried through the loop.
  x = jax.lax.stop_gradient(_checks.at_least_float32(x))
  times = jax.lax.stop_gradient(_grid(fn, x, times, 1))
  n = times.shape[0]
  noises = jax.lax.stop_gradient(_noises(fn, x, noises, n - 1))
  static = isinstance(exit_step, int)
  _checks.in_range(fn, "exit_step", exit_step, 0, n - 1)

  def jump(x, t, t_next, noise):
    c = path.coefficients(t_next)
    alpha, sigma = (
        _checks.expand_like(a.astype(x.dtype), x) for a in (c.alpha, c.sigma)
    )
    x0 = jax.lax.stop_gradient(x0_fn(x, t)).astype(x.dtype)
    return alpha * x0 + sigma * noise

  if static:
    k = exit_step
    out = _scan(
        jump, x, (times[:k], times[1 : k + 1], noises[:k]), unroll
    )
    return out, times[k]

  exit_step = jnp.asarray(exit_step)
  _checks.integer(fn, exit_step=exit_step)
  _checks.rank(fn, "exit_step", exit_step, 0, "[]")

  def step(x, t, t_next, noise, i):
    go = i < exit_step
    if skip:
      return jax.lax.cond(
          go, lambda x: jump(x, t, t_next, noise), lambda x: x, x
      )
    return jnp.where(go, jump(x, t, t_next, noise), x)

  index = jnp.arange(n - 1, dtype=exit_step.dtype)
  out = _scan(step, x, (times[:-1], times[1:], noises, index), unroll)
  return out, jnp.take(times, exit_step, axis=0)
