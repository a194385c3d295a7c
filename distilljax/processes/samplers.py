"""From noise to data: ODE, ancestral, consistency and flow-map samplers.

The network is a closure, always called with one time a row:
`velocity_fn(x, t)`, `x0_fn(x, t)` or `map_fn(x, t, r)` with t and r of shape
[b]. `times` decreases (noise to data), shape [n], or [n, b] for times of each
row. Random numbers are arguments. Loops are `lax.scan`; `unroll=True` leaves no
loop, which is what a convolutional network wants on CPU (inside a rolled loop
it runs 8 to 19 times slower there); any other network is best left rolled. It is
a Python loop: called eagerly with a jitted network it compiles one step only.
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
  """The last state of a scan whose steps keep x's dtype."""
  if unroll is True:
    for i in range(jax.tree.leaves(xs)[0].shape[0]):
      x = step(x, *jax.tree.map(lambda a, i=i: a[i], xs)).astype(x.dtype)
    return x

  def body(x, inputs):
    return step(x, *inputs).astype(x.dtype), None

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
    return x - _checks.expand_like(t - r, x) * velocity_fn(x, t)

  return _scan(step, x, (times[:-1], times[1:]), unroll)


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
    return x - _checks.expand_like(t - r, x) * map_fn(x, t, r)

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
  x = jax.lax.stop_gradient(_checks.at_least_float32(x))
  times = _grid(fn, x, times, 1)
  n = times.shape[0]
  noises = _noises(fn, x, noises, n - 1)
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
    return jax.lax.stop_gradient(out), times[k]

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
  return jax.lax.stop_gradient(out), jnp.take(times, exit_step, axis=0)
