"""Flow maps: one core for Eulerian, Lagrangian and semigroup self-distillation.

A flow map carries a state along dx/dt = v(x, t) from t down to r <= t (t = 0
data, t = 1 noise). Written as X(x, t, r) = x - (t - r) u(x, t, r) it is the
identity at r = t by construction, and u is the mean velocity from t to r, with
u(x, t, t) = v(x, t). Three identities tell u apart from any other function:

* Eulerian, d/dt X(x_t, t, r) = 0 along the path (the start moves):
    u = v - (t - r) D,   D = du/dt = v . grad_x u + partial_t u.
* Lagrangian, d/dr X(x, t, r) = v(X, r) (the end moves):
    u - (t - r) partial_r u = v(x - (t - r) u, r).
* Semigroup, X(X(x, t, s), s, r) = X(x, t, r) for t >= s >= r:
    u(x, t, r) = l u(x, t, s) + (1 - l) u(X(x, t, s), s, r), l = (t-s)/(t-r).

Every function of this file is a setting of that core: which identity, which
velocity v (data, teacher, guided), how D is taken, and how a row's error is
weighted. Path, times and guidance are arguments: `x_t`, `v`, `t` and `r`. r = t
turns all three into flow matching, r = 0 into consistency training.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import _checks
from distilljax.typing import (
    Array,
    Bool,
    Float,
    FlowMapFn,
    Int,
    PredictionFn,
)

Derivative = Literal["exact", "central", "backward"]
_DERIVATIVES = ("exact", "central", "backward")
_ELEMENTS = ("mean", "sum")
Identity = Literal["eulerian", "lagrangian", "semigroup"]
_IDENTITIES = ("eulerian", "lagrangian", "semigroup")
_NORMS = ("rms", "l2")


class LossAndError(NamedTuple):
  """What to train and what to log.

  Attributes:
    loss: the weighted loss, shape [b].
    error: the squared error before the adaptive weight, shape [b], no gradient.
  """

  loss: Float[Array, "b"]
  error: Float[Array, "b"]


def _check_state(fn: str, x_t: Array, **others: Array) -> None:
  """`x_t` is a non-empty floating [b, *s] and the others have its shape."""
  _checks.min_rank(fn, "x_t", x_t, 1, "[b, *s]")
  _checks.nonempty(fn, x_t=x_t)
  _checks.floating(fn, x_t=x_t, **others)
  _checks.same_shape(fn, x_t=x_t, **others)
  _checks.finite(fn, x_t=x_t, **others)


def _check_times(fn: str, x_t: Array, **times: Array) -> None:
  """Times [b] in [0, 1], given from the largest to the smallest."""
  _checks.per_row(fn, "x_t", x_t, **times)
  _checks.floating(fn, **times)
  for name, time in times.items():
    _checks.in_range(fn, name, time, 0.0, 1.0)
  names = list(times)
  for high, low in zip(names, names[1:]):
    _checks.not_above(fn, low, times[low], high, times[high])


def _call(fn: str, name: str, net: Callable[..., Array], x: Array, *times):
  """The network's output, at least float32, with its shape checked."""
  out = net(x, *times)
  _checks.shape(fn, name, out, jnp.shape(x), "[b, *s]", "x_t")
  return _checks.at_least_float32(out)


def _gap(t: Array, r: Array, like: Array) -> Array:
  """t - r in the dtype of `like`, shaped to multiply it."""
  gap = _checks.at_least_float32(t) - _checks.at_least_float32(r)
  return _checks.expand_like(gap, like).astype(like.dtype)


def _reduce(squares: Float[Array, "b *s"], elements: str) -> Float[Array, "b"]:
  """Mean or sum over the non-batch axes."""
  axes = tuple(range(1, squares.ndim))
  reduce = jnp.mean if elements == "mean" else jnp.sum
  return reduce(squares, axis=axes)


def flow_map_step(
    x_t: Float[Array, "b *s"],
    u: Float[Array, "b *s"],
    t: Float[Array, "b"],
    r: Float[Array, "b"],
) -> Float[Array, "b *s"]:
  """One jump of a flow map: X(x_t, t, r) = x_t - (t - r) u.

  Exact for any distance when `u` is the mean velocity from t to r; with
  u = v(x_t, t) it is an Euler step. Nothing is stop-gradient.

  Args:
    x_t: states at time t. Shape [b, *s].
    u: mean velocities from t down to r. Shape [b, *s].
    t: start times, in [0, 1]. Shape [b].
    r: end times, in [0, t]. Shape [b].

  Returns:
    The states at time r, shape [b, *s], at least float32.

  Raises:
    ValueError: shapes that do not agree, an empty batch; in debug mode also
      times outside [0, 1], r > t and non-finite rows.

  Example:
    >>> import jax.numpy as jnp
    >>> one, half = jnp.ones((1, 2)), jnp.array([0.5])
    >>> flow_map_step(3.0 * one, one, 2.0 * half, half).tolist()
    [[2.5, 2.5]]

  References:
    Boffi et al., Flow Map Matching, 2024, arXiv:2406.07507; Geng et al., Mean
    Flows for One-step Generative Modeling, 2025, arXiv:2505.13447, eq. 12.
  """
  _check_state("flow_map_step", x_t, u=u)
  _check_times("flow_map_step", x_t, t=t, r=r)
  return _jump(x_t, _checks.at_least_float32(u), t, r)


def _jump(x: Array, u: Array, t: Array, r: Array) -> Array:
  x = _checks.at_least_float32(x).astype(u.dtype)
  return x - _gap(t, r, u) * u


def _derivative(
    fn: str,
    net: FlowMapFn,
    x: Array,
    v: Array,
    t: Array,
    r: Array,
    kind: str,
    step: float,
    clamp: bool,
) -> tuple[Array, Array]:
  """(u, D): the output, with gradient, and d/dt of it along (v, 1, 0), without.

  The network gets `x` in the dtype it was given and times of at least float32.
  """
  v = jax.lax.stop_gradient(v)
  call = functools.partial(_call, fn, "velocity_fn(x, t, r)", net)
  if kind == "exact":
    u, slope = jax.jvp(
        call,
        (x, t, r),
        (v.astype(x.dtype), jnp.ones_like(t), jnp.zeros_like(r)),
    )
    return u, jax.lax.stop_gradient(slope)

  u = call(x, t, r)
  # Where t + step or t - step leaves [r, 1] the difference becomes one-sided.
  low = jnp.maximum(t - step, r) if clamp else t - step

  def shifted(time):
    # x_t at another time of the straight line through x_t along v.
    moved = _jump(x, _checks.at_least_float32(v), t, time)
    return call(moved.astype(x.dtype), time, r)

  if kind == "central":
    high = jnp.minimum(t + step, 1.0) if clamp else t + step
    upper = shifted(high)
  else:
    high, upper = t, u
  width = high - low
  # r = t = 1 leaves no room at all; its derivative is multiplied by t - r = 0.
  width = jnp.where(width > 0, width, jnp.ones_like(width))
  width = _checks.expand_like(width, u).astype(u.dtype)
  return u, jax.lax.stop_gradient((upper - shifted(low)) / width)


def path_derivative(
    velocity_fn: FlowMapFn,
    x_t: Float[Array, "b *s"],
    v: Float[Array, "b *s"],
    t: Float[Array, "b"],
    r: Float[Array, "b"],
    *,
    derivative: Derivative = "exact",
    step: float = 5e-3,
    clamp: bool = True,
) -> tuple[Float[Array, "b *s"], Float[Array, "b *s"]]:
  """A mean velocity and its derivative along the path.

  u = velocity_fn(x_t, t, r) and D = v . grad_x u + partial_t u, with r held.
  "exact" is one JVP of tangent (v, 1, 0), which also gives u; the difference
  quotients move along the straight line x_t + (t' - t) v.

  Args:
    velocity_fn: (x, t, r) -> mean velocity from t down to r. Gets x_t in the
      dtype given and times of at least float32.
    x_t: states on the path. Shape [b, *s].
    v: velocity of the path at x_t. Frozen. Shape [b, *s].
    t: start times, in [0, 1]. Shape [b].
    r: end times, in [0, t]. Shape [b].
    derivative: "exact"; "central", a central difference of width 2 step;
      "backward", from u itself and one more evaluation at t - step.
    step: distance of the difference quotient in time.
    clamp: keep both ends of the difference inside [r, 1], where it becomes
      one-sided. False reproduces code that does not (AnyFlow, MDT-dist).

  Returns:
    (u, D), both [b, *s], at least float32; gradients flow through u only.

  Raises:
    ValueError: shapes that do not agree, an empty batch, an unknown
      `derivative`, a step that is not positive; in debug mode also times
      outside [0, 1], r > t and non-finite rows.

  Example:
    >>> import jax.numpy as jnp
    >>> x, t = jnp.ones((1, 1)), jnp.array([0.5])
    >>> u, slope = path_derivative(
    ...     lambda x, t, r: x * t[:, None], x, 3.0 * x, t, t)
    >>> slope.tolist()  # 3 t + x
    [[2.5]]

  References:
    Geng et al., Mean Flows, 2025, arXiv:2505.13447, eq. 8.
  """
  fn = "path_derivative"
  _check_state(fn, x_t, v=v)
  _check_times(fn, x_t, t=t, r=r)
  _check_derivative(fn, derivative, step)
  t, r = _checks.at_least_float32(t), _checks.at_least_float32(r)
  return _derivative(fn, velocity_fn, x_t, v, t, r, derivative, step, clamp)


def eulerian_target(
    velocity_fn: FlowMapFn,
    x_t: Float[Array, "b *s"],
    v: Float[Array, "b *s"],
    t: Float[Array, "b"],
    r: Float[Array, "b"],
    *,
    derivative: Derivative = "exact",
    step: float = 5e-3,
    clamp: bool = True,
) -> tuple[Float[Array, "b *s"], Float[Array, "b *s"]]:
  """The Eulerian target of a mean velocity, and the prediction it is held to.

  u = velocity_fn(x_t, t, r) and target = stop_gradient(v - (t - r) D), where D
  is the derivative of u along the path: the velocity moves x, time moves at
  rate 1 and r stands still, a JVP with tangent (v, 1, 0). The prediction comes
  from that same JVP, so the network runs once.

  Args:
    velocity_fn: (x, t, r) -> mean velocity from t down to r. Gets x_t in the
      dtype given and times of at least float32.
    x_t: states on the path. Shape [b, *s].
    v: velocity of the path at x_t: noise - x0, a teacher's or a guided one;
      it is both the target's and the tangent's velocity. Frozen. Shape [b, *s].
    t: start times, in [0, 1]. Shape [b].
    r: end times, in [0, t]. Shape [b].
    derivative: "exact" is the JVP; "central" is a central difference of width
      2 step along the straight line x_t + (t' - t) v; "backward" uses the
      student's own output at t and one more evaluation at t - step.
    step: distance of the difference quotient in time.
    clamp: keep both ends of the difference inside [r, 1]. False reproduces
      code that does not (AnyFlow, MDT-dist).

  Returns:
    (u, target), both [b, *s], at least float32; gradients flow through u only.

  Raises:
    ValueError: shapes that do not agree, an empty batch, an unknown
      `derivative`, a step that is not positive; in debug mode also times
      outside [0, 1], r > t and non-finite rows.

  Example:
    >>> import jax.numpy as jnp
    >>> x, t, r = jnp.ones((1, 2)), jnp.array([0.5]), jnp.array([0.25])
    >>> u, target = eulerian_target(lambda x, t, r: x, x, 2.0 * x, t, r)
    >>> target.tolist()  # 2 - (0.5 - 0.25) 2
    [[1.5, 1.5]]

  References:
    Geng et al., Mean Flows for One-step Generative Modeling, 2025,
    arXiv:2505.13447, eq. 6 and 10. Departure from the official code: t - r is
    not clipped to [0, 1]; r <= t is checked in debug mode instead.
  """
  fn = "eulerian_target"
  _check_state(fn, x_t, v=v)
  _check_times(fn, x_t, t=t, r=r)
  _check_derivative(fn, derivative, step)
  return _eulerian(fn, velocity_fn, x_t, v, t, r, derivative, step, clamp)


def _check_derivative(fn: str, derivative: str, step: float) -> None:
  _checks.one_of(fn, "derivative", derivative, _DERIVATIVES)
  _checks.in_range(fn, "step", step, 0.0, None, open_low=True)


def _eulerian(
    fn, velocity_fn, x_t, v, t, r, derivative="exact", step=5e-3, clamp=True
) -> tuple[Array, Array]:
  """The Eulerian pair (u, target) without the checks."""
  t, r = _checks.at_least_float32(t), _checks.at_least_float32(r)
  u, slope = _derivative(
      fn, velocity_fn, x_t, v, t, r, derivative, step, clamp
  )
  v = jax.lax.stop_gradient(_checks.at_least_float32(v)).astype(u.dtype)
  return u, v - _gap(t, r, u) * slope


def lagrangian_residual(
    velocity_fn: FlowMapFn,
    x_t: Float[Array, "b *s"],
    t: Float[Array, "b"],
    r: Float[Array, "b"],
    teacher_fn: PredictionFn,
    *,
    stop_tangent: bool = False,
) -> Float[Array, "b *s"]:
  """How far the end of a flow map is from moving with the teacher's velocity.

  residual = u - (t - r) du/dr - stop_gradient(teacher_fn(X, r)), with
  X = stop_gradient(x_t - (t - r) u) and u = velocity_fn(x_t, t, r): dX/dr minus
  the teacher's velocity at the student's own point. The gradient runs through
  u and through the JVP du/dr (reverse over forward), so that an attention layer
  must have a differentiable tangent; with `stop_tangent` (t - r) du/dr is a
  constant. x_t needs no data pair: noise alone (t = 1) will do.

  Args:
    velocity_fn: (x, t, r) -> mean velocity from t down to r.
    x_t: states at time t. Shape [b, *s].
    t: start times, in [0, 1]. Shape [b].
    r: end times, in [0, t]. Shape [b].
    teacher_fn: (x, r) -> velocity. A frozen teacher, or the student's own
      `lambda x, r: velocity_fn(x, r, r)`: its output is stop-gradient.
    stop_tangent: no gradient through (t - r) du/dr.

  Returns:
    The residual, shape [b, *s], at least float32: zero exactly on the true
    flow map. Its squares, reduced by `adaptive_loss` or a mean, are the loss.

  Raises:
    ValueError: shapes that do not agree, an empty batch; in debug mode also
      times outside [0, 1], r > t and non-finite rows.

  Example:
    >>> import jax.numpy as jnp
    >>> x, t, r = jnp.ones((1, 2)), jnp.array([0.75]), jnp.array([0.25])
    >>> constant = lambda x, t, r: 2.0 * jnp.ones_like(x)
    >>> lagrangian_residual(
    ...     constant, x, t, r, lambda x, r: 2.0 * jnp.ones_like(x)).tolist()
    [[0.0, 0.0]]

  References:
    Boffi et al., Flow Map Matching, 2024, arXiv:2406.07507 (Lagrangian map
    distillation); Sabour et al., Align Your Flow, 2025, arXiv:2506.14603. The
    cards hold these from general knowledge, not from official code.
  """
  fn = "lagrangian_residual"
  _check_state(fn, x_t)
  _check_times(fn, x_t, t=t, r=r)
  return _lagrangian(fn, velocity_fn, x_t, t, r, teacher_fn, stop_tangent)


def _lagrangian(
    fn, velocity_fn, x_t, t, r, teacher_fn, stop_tangent=False
) -> Array:
  """The Lagrangian residual without the checks."""
  t, r = _checks.at_least_float32(t), _checks.at_least_float32(r)
  u, slope = jax.jvp(
      lambda end: _call(fn, "velocity_fn(x, t, r)", velocity_fn, x_t, t, end),
      (r,),
      (jnp.ones_like(r),),
  )
  if stop_tangent:
    slope = jax.lax.stop_gradient(slope)
  # The target is stopped below; this one only spares tracing its derivative.
  end = jax.lax.stop_gradient(_jump(x_t, u, t, r))
  target = _call(fn, "teacher_fn(x, r)", teacher_fn, end.astype(x_t.dtype), r)
  target = jax.lax.stop_gradient(target).astype(u.dtype)
  return u - _gap(t, r, u) * slope - target


def semigroup_target(
    velocity_fn: FlowMapFn,
    x_t: Float[Array, "b *s"],
    t: Float[Array, "b"],
    s: Float[Array, "b"],
    r: Float[Array, "b"],
    *,
    first_fn: FlowMapFn | None = None,
    clip: float | None = None,
    clip_target: float | None = None,
) -> Float[Array, "b *s"]:
  """The mean velocity from t to r by way of s: two jumps made into one.

  target = l first_fn(x_t, t, s) + (1 - l) velocity_fn(X, s, r) with
  X = x_t - (t - s) first_fn(x_t, t, s) and l = (t - s)/(t - r), all of it
  stop-gradient. Where t = r it is first_fn(x_t, t, t). With s the midpoint and
  a frozen teacher for both legs this is progressive distillation; with s just
  below t and a teacher for the first leg, consistency distillation.

  Args:
    velocity_fn: (x, t, r) -> mean velocity from t down to r; the second leg.
    x_t: states at time t. Shape [b, *s].
    t: start times, in [0, 1]. Shape [b].
    s: times between, r <= s <= t. Shape [b].
    r: end times, in [0, t]. Shape [b].
    first_fn: (x, t, s) -> mean velocity of the first leg; None: velocity_fn.
    clip: bound on the magnitude of the state X between the legs; None for none.
    clip_target: bound on the magnitude of the target; None for none.

  Returns:
    The target for u(x_t, t, r), shape [b, *s], at least float32, no gradient.

  Raises:
    ValueError: shapes that do not agree, an empty batch, a bound that is not
      positive; in debug mode also times outside [0, 1] or out of order and
      non-finite rows.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.ones((1, 1))
    >>> t, s, r = jnp.array([1.0]), jnp.array([0.5]), jnp.array([0.0])
    >>> semigroup_target(lambda x, t, r: x, x, t, s, r).tolist()  # (1 + .5)/2
    [[0.75]]

  References:
    Frans et al., One Step Diffusion via Shortcut Models, 2024,
    arXiv:2410.12557; Boffi et al., 2024, arXiv:2406.07507 (progressive map
    matching).
  """
  fn = "semigroup_target"
  _check_state(fn, x_t)
  _check_times(fn, x_t, t=t, s=s, r=r)
  _checks.in_range(fn, "clip", clip, 0.0, None, open_low=True)
  _checks.in_range(fn, "clip_target", clip_target, 0.0, None, open_low=True)
  return _semigroup(
      fn, velocity_fn, x_t, t, s, r, first_fn, clip, clip_target
  )


def _bounded(x: Array, bound: float | None) -> Array:
  return x if bound is None else jnp.clip(x, -bound, bound)


def _semigroup(
    fn, velocity_fn, x_t, t, s, r, first_fn=None, clip=None, clip_target=None
) -> Array:
  """The semigroup target without the checks."""
  t, s, r = (_checks.at_least_float32(time) for time in (t, s, r))
  first = _call(fn, "first_fn(x, t, s)", first_fn or velocity_fn, x_t, t, s)
  middle = _bounded(_jump(x_t, first, t, s), clip).astype(x_t.dtype)
  second = _call(fn, "velocity_fn(x, t, r)", velocity_fn, middle, s, r)
  whole = t - r
  share = jnp.where(
      whole > 0, (t - s) / jnp.where(whole > 0, whole, 1), jnp.ones_like(whole)
  )
  share = _checks.expand_like(share, first).astype(first.dtype)
  target = share * first + (1 - share) * second.astype(first.dtype)
  return jax.lax.stop_gradient(_bounded(target, clip_target))


def adaptive_loss(
    error: Float[Array, "b"], *, norm_p: float = 1.0, norm_eps: float = 1e-2
) -> Float[Array, "b"]:
  """Squared errors weighted by a power of their own size.

  loss = error / stop_gradient(error + norm_eps)^norm_p. p = 0 is the squared
  error, p = 0.5 is like a pseudo-Huber distance, and at p = 1 every row counts
  alike: the loss is then about 1 whatever the error, so log `error` itself.

  Args:
    error: squared error of a row, not negative. Shape [b].
    norm_p: power, >= 0.
    norm_eps: added to the error before the power, > 0.

  Returns:
    The weighted loss, shape [b], at least float32; zero where the error is.

  Raises:
    ValueError: `norm_p` negative or `norm_eps` not positive.

  Example:
    >>> import jax.numpy as jnp
    >>> adaptive_loss(jnp.array([3.0]), norm_p=1.0, norm_eps=1.0).tolist()
    [0.75]

  References:
    Geng et al., Mean Flows, 2025, arXiv:2505.13447, section 4.3 and eq. 22.
  """
  fn = "adaptive_loss"
  _checks.rank(fn, "error", error, 1, "[b]")
  _checks.floating(fn, error=error)
  _checks.in_range(fn, "norm_p", norm_p, 0.0)
  _checks.in_range(fn, "norm_eps", norm_eps, 0.0, None, open_low=True)
  error = _checks.at_least_float32(error)
  return error / jax.lax.stop_gradient((error + norm_eps) ** norm_p)


def mean_flow_terms(
    velocity_fn: FlowMapFn,
    x_t: Float[Array, "b *s"],
    v: Float[Array, "b *s"],
    t: Float[Array, "b"],
    r: Float[Array, "b"],
    *,
    norm_p: float = 1.0,
    norm_eps: float = 1e-2,
    elements: Literal["mean", "sum"] = "mean",
) -> LossAndError:
  """`mean_flow_loss` together with the unweighted error, which is what to log.

  At norm_p = 1 the loss is about 1 however good the student is; `error` is the
  squared distance of u to its target and tells runs apart.

  Args:
    velocity_fn: as in `mean_flow_loss`, like everything below.
    x_t: states on the path. Shape [b, *s].
    v: velocity of the path. Shape [b, *s].
    t: start times. Shape [b].
    r: end times. Shape [b].
    norm_p: power of the adaptive weight.
    norm_eps: constant of the adaptive weight.
    elements: mean or sum over the elements of a row.

  Returns:
    LossAndError(loss [b], error [b]); no gradient flows through `error`.

  Raises:
    ValueError: as `mean_flow_loss`.

  Example:
    >>> import jax.numpy as jnp
    >>> x, t = jnp.ones((1, 2)), jnp.array([0.5])
    >>> terms = mean_flow_terms(lambda x, t, r: 3.0 * x, x, x, t, t)
    >>> float(terms.error[0])  # (3 - 1)^2
    4.0

  References:
    Geng et al., Mean Flows, 2025, arXiv:2505.13447, eq. 9-10 and 22.
  """
  fn = "mean_flow_loss"
  _check_state(fn, x_t, v=v)
  _check_times(fn, x_t, t=t, r=r)
  _checks.one_of(fn, "elements", elements, _ELEMENTS)
  u, target = _eulerian(fn, velocity_fn, x_t, v, t, r)
  error = _reduce(jnp.square(u - target), elements)
  loss = adaptive_loss(error, norm_p=norm_p, norm_eps=norm_eps)
  return LossAndError(loss, jax.lax.stop_gradient(error))


def mean_flow_loss(
    velocity_fn: FlowMapFn,
    x_t: Float[Array, "b *s"],
    v: Float[Array, "b *s"],
    t: Float[Array, "b"],
    r: Float[Array, "b"],
    *,
    norm_p: float = 1.0,
    norm_eps: float = 1e-2,
    elements: Literal["mean", "sum"] = "mean",
) -> Float[Array, "b"]:
  """MeanFlow: the Eulerian identity with an adaptive weight on every row.

  error = mean over elements of (u - stop_gradient(v - (t - r) du/dt))^2 and
  loss = error / stop_gradient(error + norm_eps)^norm_p, with du/dt the JVP of
  velocity_fn along (v, 1, 0). Rows with r = t are plain flow matching.
  `mean_flow_terms` also returns the error.

  Args:
    velocity_fn: (x, t, r) -> mean velocity from t down to r.
    x_t: states on the path, (1 - t) x0 + t noise. Shape [b, *s].
    v: velocity at x_t: noise - x0, or a teacher's (MeanFlow distillation), or a
      guided one (`processes.guidance`). Frozen, and the JVP's tangent too.
      Shape [b, *s].
    t: start times, in [0, 1]. Shape [b].
    r: end times, in [0, t]. Shape [b].
    norm_p: power of the weight; 1 makes every row count alike, 0 is the
      squared error.
    norm_eps: constant of the weight, > 0, beside the reduced error. The
      official value 1e-2 stands beside a sum (`elements="sum"`); beside our
      mean the same number is as large as 1e-2 times the number of elements
      there.
    elements: "mean" over the elements of a row does not change with the
      resolution; "sum" is the official scale.

  Returns:
    The loss, shape [b], at least float32, unreduced. Minimum 0, where u equals
    its own target.

  Raises:
    ValueError: shapes that do not agree, an empty batch, an unknown `elements`,
      `norm_p` negative or `norm_eps` not positive; in debug mode also times
      outside [0, 1], r > t and non-finite rows.

  Example:
    >>> import jax.numpy as jnp
    >>> x, t = jnp.ones((1, 2)), jnp.array([0.5])
    >>> u = lambda x, t, r: 3.0 * x
    >>> float(mean_flow_loss(u, x, x, t, t, norm_p=0.0)[0])  # (3 - 1)^2
    4.0

  References:
    Geng et al., Mean Flows for One-step Generative Modeling, 2025,
    arXiv:2505.13447, eq. 9-10 and 22. Departures from the official code: mean
    over elements by default; t - r is not clipped to [0, 1].
  """
  return mean_flow_terms(
      velocity_fn,
      x_t,
      v,
      t,
      r,
      norm_p=norm_p,
      norm_eps=norm_eps,
      elements=elements,
  ).loss


def mean_flow_velocity(
    v: Float[Array, "b *s"],
    u_cond: Float[Array, "b *s"],
    u_uncond: Float[Array, "b *s"],
    t: Float[Array, "b"],
    *,
    omega: float,
    kappa: float,
    t_start: float = 0.0,
    t_end: float = 1.0,
) -> Float[Array, "b *s"]:
  """MeanFlow's guided velocity: what replaces `v` in `mean_flow_loss`.

  v_g = omega v + (1 - omega - kappa) u_uncond + kappa u_cond for t in
  [t_start, t_end] (both ends included), v outside. At its fixed point
  u_cond = v_g, so that v_g = u_uncond + w (v - u_uncond) with
  w = omega / (1 - kappa), in the library's one convention. All inputs are
  stop-gradient.

  Args:
    v: velocity of the path, noise - x0. Shape [b, *s].
    u_cond: the network's own u(x_t, t, t) with the row's label. Shape [b, *s].
    u_uncond: the same without a label. Shape [b, *s].
    t: times, in [0, 1]. Shape [b].
    omega: weight of the data's velocity; with kappa = 0 the guidance scale.
    kappa: share of the network's own conditional output, < 1.
    t_start: first time that is guided.
    t_end: last time that is guided.

  Returns:
    The guided velocity, shape [b, *s], at least float32, no gradient.

  Raises:
    ValueError: shapes that do not agree, an empty batch, kappa of 1 or more; in
      debug mode also times outside [0, 1] and non-finite rows.

  Example:
    >>> import jax.numpy as jnp
    >>> one, t = jnp.ones((1, 1)), jnp.array([0.5])
    >>> mean_flow_velocity(
    ...     one, 3.0 * one, 2.0 * one, t, omega=1.0, kappa=0.5).tolist()
    [[1.5]]

  References:
    Geng et al., Mean Flows, 2025, arXiv:2505.13447, appendix on improved CFG.
  """
  fn = "mean_flow_velocity"
  _check_state(fn, v, u_cond=u_cond, u_uncond=u_uncond)
  _check_times(fn, v, t=t)
  _checks.in_range(fn, "omega", omega, 0.0)
  _checks.in_range(fn, "kappa", kappa, 0.0, 1.0, open_high=True)
  v, u_cond, u_uncond = (
      jax.lax.stop_gradient(_checks.at_least_float32(a))
      for a in (v, u_cond, u_uncond)
  )
  guided = omega * v + (1 - omega - kappa) * u_uncond + kappa * u_cond
  inside = (t >= t_start) & (t <= t_end)
  return jnp.where(_checks.expand_like(inside, v), guided, v)


def _row_norm(a: Array, norm: str) -> Array:
  """Norm over the non-batch axes, [b, 1, ...]; its gradient is not needed."""
  squares = jnp.square(a)
  axes = tuple(range(1, a.ndim))
  reduce = jnp.mean if norm == "rms" else jnp.sum
  return jnp.sqrt(reduce(squares, axis=axes, keepdims=True))


def flow_map_loss(
    velocity_fn: FlowMapFn,
    x_t: Float[Array, "b *s"],
    t: Float[Array, "b"],
    r: Float[Array, "b"],
    *,
    identity: Identity = "eulerian",
    v: Float[Array, "b *s"] | None = None,
    s: Float[Array, "b"] | None = None,
    teacher_fn: PredictionFn | None = None,
    target_fn: FlowMapFn | None = None,
    first_fn: FlowMapFn | None = None,
    stop_tangent: bool = False,
    normalizer: Literal["adaptive", "tangent"] = "adaptive",
    norm_p: float = 1.0,
    norm_eps: float = 1e-2,
    tangent_c: float = 0.1,
    elements: Literal["mean", "sum"] = "mean",
) -> LossAndError:
  """Any flow-map loss: an identity and a normaliser on a residual.

  residual = u - eulerian_target, lagrangian_residual, or u - semigroup_target,
  with u = velocity_fn(x_t, t, r). "adaptive" trains `adaptive_loss` of its
  squares. "tangent" replaces the residual's value (not its derivative) by
  residual / (norm + tangent_c) before it is squared, so that no row pulls
  harder than another: the gradient of the loss is then that of half the
  squares, times 2 / (norm + tangent_c).

  Path, times and guidance are the arguments x_t, t, r and v; MeanFlow, MeanFlow
  distillation, Lagrangian and progressive map distillation are settings.

  Args:
    velocity_fn: (x, t, r) -> mean velocity from t down to r.
    x_t: states at time t. Shape [b, *s].
    t: start times, in [0, 1]. Shape [b].
    r: end times, in [0, t]. Shape [b].
    identity: which identity the residual is of.
    v: velocity at x_t, needed by "eulerian". Frozen. Shape [b, *s].
    s: times between r and t, needed by "semigroup". Shape [b].
    teacher_fn: (x, r) -> velocity, needed by "lagrangian". Frozen.
    target_fn: (x, t, r) -> mean velocity of the semigroup's legs, such as the
      student's moving average; None: velocity_fn. Frozen.
    first_fn: its first leg alone; None: target_fn. Frozen.
    stop_tangent: no gradient through the Lagrangian (t - r) du/dr.
    normalizer: "adaptive" or "tangent".
    norm_p: power of the adaptive weight; 0 leaves the squares as they are.
    norm_eps: constant of the adaptive weight, beside the reduced error.
    tangent_c: constant of the tangent normaliser, beside the norm: the root
      mean square under elements="mean", the l2 norm under "sum".
    elements: mean or sum over the elements of a row.

  Returns:
    LossAndError(loss [b], error [b]): what to train, and the squared residual
    before the normaliser, without gradient.

  Raises:
    ValueError: shapes that do not agree, an empty batch, an unknown option, an
      argument that the identity needs and did not get; in debug mode also
      times outside [0, 1] or out of order and non-finite rows.

  Example:
    >>> import jax.numpy as jnp
    >>> x, t = jnp.ones((1, 2)), jnp.array([0.5])
    >>> terms = flow_map_loss(
    ...     lambda x, t, r: 3.0 * x, x, t, t, identity="lagrangian",
    ...     teacher_fn=lambda x, r: x, norm_p=0.0)
    >>> float(terms.loss[0])  # (3 - 1)^2
    4.0

  References:
    Boffi et al., Flow Map Matching, 2024, arXiv:2406.07507; Geng et al., Mean
    Flows, 2025, arXiv:2505.13447; Sabour et al., Align Your Flow, 2025,
    arXiv:2506.14603 (tangent normalisation, from general knowledge).
  """
  fn = "flow_map_loss"
  _check_state(fn, x_t)
  _check_times(fn, x_t, t=t, r=r)
  _checks.one_of(fn, "identity", identity, _IDENTITIES)
  _checks.one_of(fn, "normalizer", normalizer, ("adaptive", "tangent"))
  _checks.one_of(fn, "elements", elements, _ELEMENTS)
  _checks.in_range(fn, "tangent_c", tangent_c, 0.0, None, open_low=True)
  needed = {"eulerian": "v", "lagrangian": "teacher_fn", "semigroup": "s"}
  name = needed[identity]
  if {"v": v, "teacher_fn": teacher_fn, "s": s}[name] is None:
    _checks.fail(fn, name, f"given for identity={identity!r}", "None")

  if identity == "eulerian":
    _check_state(fn, x_t, v=v)
    u, target = _eulerian(fn, velocity_fn, x_t, v, t, r)
    residual = u - target
  elif identity == "lagrangian":
    residual = _lagrangian(
        fn, velocity_fn, x_t, t, r, teacher_fn, stop_tangent
    )
  else:
    _check_times(fn, x_t, t=t, s=s, r=r)
    u = _call(
        fn,
        "velocity_fn(x, t, r)",
        velocity_fn,
        x_t,
        _checks.at_least_float32(t),
        _checks.at_least_float32(r),
    )
    residual = u - _semigroup(
        fn, target_fn or velocity_fn, x_t, t, s, r, first_fn
    ).astype(u.dtype)

  error = _reduce(jnp.square(residual), elements)
  if normalizer == "adaptive":
    loss = adaptive_loss(error, norm_p=norm_p, norm_eps=norm_eps)
  else:
    frozen = jax.lax.stop_gradient(residual)
    norm = _row_norm(frozen, "rms" if elements == "mean" else "l2")
    unit = frozen / (norm + tangent_c)
    loss = _reduce(jnp.square(residual - frozen + unit), elements)
  return LossAndError(loss, jax.lax.stop_gradient(error))


def straight_path(
    x0: Float[Array, "b *s"],
    noise: Float[Array, "b *s"],
    t: Float[Array, "b"],
    *,
    sigma_min: float = 0.0,
) -> tuple[Float[Array, "b *s"], Float[Array, "b *s"]]:
  """State and velocity of the straight path that keeps a little noise.

  x_t = (1 - t) x0 + (sigma_min + (1 - sigma_min) t) noise and
  v = (1 - sigma_min) noise - x0. Shortcut models and MDT-dist train on it with
  sigma_min = 1e-5; with 0 it is rectified flow.

  Args:
    x0: data. Shape [b, *s].
    noise: unit noise. Shape [b, *s].
    t: times, in [0, 1]. Shape [b].
    sigma_min: noise left at t = 0, in [0, 1).

  Returns:
    (x_t, v), both [b, *s], at least float32.

  Raises:
    ValueError: shapes that do not agree, an empty batch, sigma_min outside
      [0, 1); in debug mode also times outside [0, 1] and non-finite rows.

  Example:
    >>> import jax.numpy as jnp
    >>> x_t, v = straight_path(
    ...     jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.array([0.5]),
    ...     sigma_min=0.5)
    >>> float(x_t[0, 0]), float(v[0, 0])
    (0.75, 0.5)

  References:
    Lipman et al., Flow Matching for Generative Modeling, 2022,
    arXiv:2210.02747, eq. 22 (time reversed).
  """
  fn = "straight_path"
  _check_state(fn, x0, noise=noise)
  _check_times(fn, x0, t=t)
  _checks.in_range(fn, "sigma_min", sigma_min, 0.0, 1.0, open_high=True)
  x0, noise = _checks.at_least_float32(x0), _checks.at_least_float32(noise)
  time = _checks.expand_like(_checks.at_least_float32(t), x0).astype(x0.dtype)
  x_t = (1 - time) * x0 + (sigma_min + (1 - sigma_min) * time) * noise
  return x_t, (1 - sigma_min) * noise - x0


def shortcut_target(
    velocity_fn: FlowMapFn,
    x_t: Float[Array, "b *s"],
    t: Float[Array, "b"],
    d: Float[Array, "b"],
    *,
    clip: float | None = 4.0,
    clip_target: float | None = 4.0,
) -> Float[Array, "b *s"]:
  """Shortcut models: one step of size d is two steps of size d / 2.

  The semigroup target at the midpoint, (u1 + u2)/2 with
  u1 = velocity_fn(x_t, t, t - d/2) and u2 the same from the midpoint on. The
  paper's network reads the step size, which is t - r here; its time runs the
  other way. With a frozen teacher as `velocity_fn` and no `clip_target` this is
  progressive distillation in flow form.

  Args:
    velocity_fn: (x, t, r) -> mean velocity from t down to r: the student's
      moving average, or the frozen teacher.
    x_t: states at time t. Shape [b, *s].
    t: start times, in [0, 1]. Shape [b].
    d: step sizes, 0 < d <= t. Shape [b].
    clip: bound on the magnitude of the midpoint; None for none.
    clip_target: bound on the magnitude of the target; None for none.

  Returns:
    The target for u(x_t, t, t - d), shape [b, *s], at least float32, no
    gradient.

  Raises:
    ValueError: shapes that do not agree, an empty batch, a bound that is not
      positive; in debug mode also times outside [0, 1], d > t and non-finite
      rows.

  Example:
    >>> import jax.numpy as jnp
    >>> x, t, d = jnp.ones((1, 1)), jnp.array([1.0]), jnp.array([1.0])
    >>> shortcut_target(lambda x, t, r: x, x, t, d).tolist()  # (1 + .5)/2
    [[0.75]]

  References:
    Frans et al., One Step Diffusion via Shortcut Models, 2024,
    arXiv:2410.12557, eq. 4.
  """
  fn = "shortcut_target"
  _check_state(fn, x_t)
  _check_times(fn, x_t, t=t)
  _checks.per_row(fn, "x_t", x_t, d=d)
  _checks.floating(fn, d=d)
  _checks.in_range(fn, "d", d, 0.0, 1.0, open_low=True)
  _checks.not_above(fn, "d", d, "t", t)
  _checks.in_range(fn, "clip", clip, 0.0, None, open_low=True)
  _checks.in_range(fn, "clip_target", clip_target, 0.0, None, open_low=True)
  t, d = _checks.at_least_float32(t), _checks.at_least_float32(d)
  return _semigroup(
      fn, velocity_fn, x_t, t, t - d / 2, t - d, None, clip, clip_target
  )


def anyflow_loss(
    velocity_fn: FlowMapFn,
    x_t: Float[Array, "b *s"],
    v: Float[Array, "b *s"],
    t: Float[Array, "b"],
    r: Float[Array, "b"],
    *,
    uncond_fn: FlowMapFn | None = None,
    guidance_scale: float = 1.0,
    differentiate: Literal["fused", "cond"] = "fused",
    time_weight: Float[Array, "b"] | None = None,
    anchors: Bool[Array, "b"] | None = None,
    anchor_loss: Float[Array, ""] | None = None,
    balance_eps: float = 1e-5,
    derivative: Derivative = "exact",
    step: float = 5e-3,
    clamp: bool = True,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, "b"]:
  """AnyFlow's first stage: Eulerian, with fused guidance and balanced rows.

  Fused guidance puts the guidance on the student's side: with
  u = velocity_fn(x_t, t, r), n = stop_gradient(uncond_fn(x_t, t, r)) and scale
  w, the prediction is u_hat = (u - (1 - w) n) / w, so that at the optimum u
  itself is n + w (target - n) and needs no guidance at sampling.
    L_i = weight_i mean (u_hat - stop_gradient(v - (t - r) D))^2
  D is the derivative of u_hat along the path ("fused"), or of its conditional
  part u / w alone ("cond", the official code). Rows that are not anchors are
  then rescaled to count like one: L_i * stop_gradient(A / (L_i + balance_eps))
  with A the mean loss of the anchors over the whole batch.

  Args:
    velocity_fn: (x, t, r) -> mean velocity from t down to r, conditional.
    x_t: states on the path. Shape [b, *s].
    v: velocity of the path at x_t. Frozen. Shape [b, *s].
    t: start times, in [0, 1]. Shape [b].
    r: end times, in [0, t]. Shape [b].
    uncond_fn: the same network without the condition, needed when
      `guidance_scale` is not 1. Frozen.
    guidance_scale: w > 0 of uncond + w (cond - uncond); official 3.
    differentiate: what D is the derivative of.
    time_weight: weight of every row, as from `flow_time_weight`. Shape [b].
    anchors: rows of plain flow matching; None: those with r = t. Shape [b].
    anchor_loss: the mean A if it was formed elsewhere, over a batch of which
      these rows are a part; None: formed here. A batch without anchors (and
      without A) is not rescaled.
    balance_eps: constant of the rescaling.
    derivative: "exact" (JVP), "central" (official) or "backward".
    step: distance of the difference quotient (official 5 of 1000).
    clamp: keep the difference inside [r, 1]; the official code does not.
    axis_name: mapped axis for A, inside shard_map or pmap.

  Returns:
    The loss, shape [b], at least float32. Minimum 0.

  Raises:
    ValueError: shapes that do not agree, an empty batch, an unknown option, a
      guidance scale that is not positive, or not 1 without `uncond_fn`; in
      debug mode also times outside [0, 1], r > t and non-finite rows.

  Example:
    >>> import jax.numpy as jnp
    >>> x, t = jnp.ones((1, 2)), jnp.array([0.5])
    >>> float(anyflow_loss(lambda x, t, r: 3.0 * x, x, x, t, t)[0])
    4.0

  References:
    AnyFlow, 2026, arXiv:2605.13724, stage 1. Departures from the official
    code, each with its switch: exact derivative of the fused prediction, time
    kept inside [r, 1].
  """
  fn = "anyflow_loss"
  _check_state(fn, x_t, v=v)
  _check_times(fn, x_t, t=t, r=r)
  _checks.per_row(
      fn, "x_t", x_t, time_weight=time_weight, anchors=anchors
  )
  _checks.boolean(fn, anchors=anchors)
  _checks.one_of(fn, "differentiate", differentiate, ("fused", "cond"))
  _check_derivative(fn, derivative, step)
  _checks.in_range(
      fn, "guidance_scale", guidance_scale, 0.0, None, open_low=True
  )
  _checks.in_range(fn, "balance_eps", balance_eps, 0.0, None, open_low=True)
  if uncond_fn is None and not (
      _checks.is_number(guidance_scale) and guidance_scale == 1
  ):
    _checks.fail(
        fn, "uncond_fn", "given unless guidance_scale is 1", "None"
    )
  if anchors is None:
    anchors = t == r
  t, r = _checks.at_least_float32(t), _checks.at_least_float32(r)

  slope_of = functools.partial(
      _derivative,
      fn,
      x=x_t,
      v=v,
      t=t,
      r=r,
      kind=derivative,
      step=step,
      clamp=clamp,
  )
  u, slope = slope_of(velocity_fn)
  if uncond_fn is not None:
    if differentiate == "fused":
      uncond, uncond_slope = slope_of(uncond_fn)
    else:
      uncond = _call(fn, "uncond_fn(x, t, r)", uncond_fn, x_t, t, r)
      uncond_slope = jnp.zeros_like(slope)
    uncond = jax.lax.stop_gradient(uncond).astype(u.dtype)
    u = (u - (1 - guidance_scale) * uncond) / guidance_scale
    slope = (slope - (1 - guidance_scale) * uncond_slope) / guidance_scale
  target = jax.lax.stop_gradient(
      _checks.at_least_float32(v).astype(u.dtype) - _gap(t, r, u) * slope
  )
  loss = _reduce(jnp.square(u - target), "mean")
  if time_weight is not None:
    weight = _checks.at_least_float32(time_weight).astype(loss.dtype)
    loss = loss * jax.lax.stop_gradient(weight)

  frozen = jax.lax.stop_gradient(loss)
  if anchor_loss is None:
    total = jnp.sum(jnp.where(anchors, frozen, jnp.zeros_like(frozen)))
    count = jnp.sum(anchors, dtype=frozen.dtype)
    if axis_name is not None:
      total = jax.lax.psum(total, axis_name)
      count = jax.lax.psum(count, axis_name)
    mean = total / jnp.maximum(count, 1)
    apart = jnp.logical_not(anchors) & (count > 0)
  else:
    mean = jax.lax.stop_gradient(_checks.at_least_float32(anchor_loss))
    apart = jnp.logical_not(anchors)
  scale = jnp.where(
      apart, mean.astype(loss.dtype) / (frozen + balance_eps), 1.0
  )
  return loss * scale.astype(loss.dtype)


def flow_time_weight(
    t: Float[Array, "*b"],
    *,
    kind: Literal["beta", "gaussian", "uniform"] = "beta",
    shift: float = 1.0,
    grid: int = 1000,
) -> Float[Array, "*b"]:
  """Weight of a training time, of mean one over a shifted grid.

  y(tau) is tau sqrt(1 - tau) for "beta", exp(-2 (tau - 1/2)^2) minus its
  smallest value on the grid for "gaussian". On the points
  tau_k = shift u / (1 + (shift - 1) u), u = k / grid, the weight is
  y grid / sum(y); a time takes the weight of the nearest point.

  Args:
    t: times, in [0, 1]. Any shape.
    kind: "beta", "gaussian" or "uniform" (1 everywhere).
    shift: warp of the grid, > 0.
    grid: number of steps of the grid; it has one point more.

  Returns:
    Weights of the shape of t, at least float32.

  Raises:
    ValueError: an unknown kind, `shift` not positive; in debug mode also times
      outside [0, 1].

  Example:
    >>> import jax.numpy as jnp
    >>> flow_time_weight(jnp.array([0.0, 1.0]), kind="beta").tolist()
    [0.0, 0.0]

  References:
    AnyFlow, 2026, arXiv:2605.13724, from its official scheduler (the kind
    "beta" is its "beta08").
  """
  fn = "flow_time_weight"
  _checks.floating(fn, t=t)
  _checks.in_range(fn, "t", t, 0.0, 1.0)
  _checks.one_of(fn, "kind", kind, ("beta", "gaussian", "uniform"))
  _checks.in_range(fn, "shift", shift, 0.0, None, open_low=True)
  t = _checks.at_least_float32(t)
  if kind == "uniform":
    return jnp.ones_like(t)
  # The table is a constant of the program: NumPy, float64.
  u = np.arange(grid + 1) / grid
  tau = shift * u / (1 + (shift - 1) * u)
  if kind == "beta":
    y = tau * np.sqrt(1 - tau)
  else:
    y = np.exp(-2 * np.square(tau - 0.5))
    y = y - y.min()
  table = jnp.asarray(y * grid / y.sum(), t.dtype)
  middles = jnp.asarray((tau[1:] + tau[:-1]) / 2, t.dtype)
  return table[jnp.searchsorted(middles, t)]


def backward_simulation(
    velocity_fn: FlowMapFn,
    noise: Float[Array, "b *s"],
    times: Float[Array, "n"],
    index: Int[Array, ""] | int,
    *,
    gradient: Literal["all", "middle"] = "all",
) -> Float[Array, "b *s"]:
  """AnyFlow's roll-out: an n-step sample by three jumps of the flow map.

  noise at times[0] jumps to times[index], from there to times[index + 1] and
  then to times[-1], one evaluation each: what an n-step sampler would give, at
  a constant cost, with step `index` singled out. Jumps of length zero change
  nothing. "all" differentiates through all three; "middle" holds the state
  before the middle jump and the velocity of the last jump constant, so that
  only the middle jump trains and backpropagation runs through one evaluation.

  Args:
    velocity_fn: (x, t, r) -> mean velocity from t down to r.
    noise: states at times[0]. Shape [b, *s].
    times: the sampler's grid, decreasing, in [0, 1]. Shape [n + 1], n >= 1.
    index: which step is singled out, in [0, n - 1]: a number or a traced
      integer, the same for the whole batch.
    gradient: "all" or "middle".

  Returns:
    The samples at times[-1], shape [b, *s], at least float32.

  Raises:
    ValueError: a grid of less than two times, an unknown option, an empty
      batch; for a number, and in debug mode, also an index outside
      [0, n - 1]; in debug mode also times outside [0, 1].

  Example:
    >>> import jax.numpy as jnp
    >>> grid = jnp.array([1.0, 0.5, 0.0])
    >>> backward_simulation(
    ...     lambda x, t, r: x, jnp.ones((1, 1)), grid, 1).tolist()
    [[0.25]]

  References:
    AnyFlow, 2026, arXiv:2605.13724, stage 2.
  """
  fn = "backward_simulation"
  _check_state(fn, noise)
  _checks.rank(fn, "times", times, 1, "[n]")
  _checks.floating(fn, times=times)
  if jnp.shape(times)[0] < 2:
    _checks.fail(fn, "times", "[n] with n >= 2", list(jnp.shape(times)))
  _checks.in_range(fn, "times", times, 0.0, 1.0)
  _checks.in_range(fn, "index", index, 0, jnp.shape(times)[0] - 2)
  _checks.one_of(fn, "gradient", gradient, ("all", "middle"))
  times = _checks.at_least_float32(times)
  b = noise.shape[:1]

  def jump(x, start, end, frozen):
    t = jnp.broadcast_to(start, b)
    r = jnp.broadcast_to(end, b)
    u = _call(
        fn, "velocity_fn(x, t, r)", velocity_fn, x.astype(noise.dtype), t, r
    )
    if frozen:
      u = jax.lax.stop_gradient(u)
    return _jump(x, u, t, r)

  middle = gradient == "middle"
  start, end = times[index], times[index + 1]
  x = jump(noise, times[0], start, False)
  if middle:
    x = jax.lax.stop_gradient(x)
  x = jump(x, start, end, False)
  return jump(x, end, times[-1], middle)


def velocity_matching_target(
    velocity_fn: PredictionFn,
    x_t: Float[Array, "b *s"],
    v: Float[Array, "b *s"],
    t: Float[Array, "b"],
    *,
    kind: Literal["velocity", "transport"] = "velocity",
    end: Float[Array, "b"] | None = None,
    derivative: Derivative = "backward",
    step: float = 1e-2,
    clamp: bool = True,
    norm: Literal["rms", "l2"] | None = "rms",
    c: float = 0.1,
) -> tuple[Float[Array, "b *s"], Float[Array, "b *s"]]:
  """MDT-dist's velocity matching: the Eulerian target of a map to the data.

  The student reads one time and means the average velocity from t to 0.
  "velocity": u = velocity_fn(x_t, t) and target = v - t D, D its derivative
  along the path, normalised per row to D / (norm(D) + c). "transport": the same
  identity for points, which is discrete consistency distillation:
  x_t - (t - end) u against y - (t - step - end) velocity_fn(y, t - step), where
  y = x_t - step v. Targets are stop-gradient.

  Args:
    velocity_fn: (x, t) -> average velocity from t down to `end`.
    x_t: states on the path. Shape [b, *s].
    v: a teacher's velocity at x_t, guided or not, or the path's. Frozen.
      Shape [b, *s].
    t: times, in [0, 1]. Shape [b].
    kind: "velocity" or "transport".
    end: where a map of "transport" ends, <= t - step; None: 0. See
      `phase_start`. Shape [b].
    derivative: how D is taken; the official default is "backward".
    step: distance of the difference quotient, and of the transport's pair.
    clamp: keep the difference inside [0, 1]; the official code does not.
    norm: "rms" normalises D to a root mean square below 1, whatever the
      number of elements; "l2" (official) to an l2 norm below 1, which in many
      dimensions leaves nearly plain velocity matching; None for neither.
    c: constant beside that norm; official 0.1 beside the l2 norm.

  Returns:
    (prediction, target), both [b, *s], at least float32; the loss is the mean
    of their squared difference, gradients flow through the prediction only.

  Raises:
    ValueError: shapes that do not agree, an empty batch, an unknown option, a
      step or c that is not positive; in debug mode also times outside [0, 1]
      and non-finite rows.

  Example:
    >>> import jax.numpy as jnp
    >>> x, t = jnp.ones((1, 1)), jnp.array([0.5])
    >>> u, target = velocity_matching_target(
    ...     lambda x, t: x, x, x, t, derivative="exact", norm=None)
    >>> target.tolist()  # 1 - 0.5
    [[0.5]]

  References:
    MDT-dist, 2025, arXiv:2509.04406. Departures from the official code, each
    with its switch: root mean square in place of the l2 norm, the difference
    kept inside [0, 1].
  """
  fn = "velocity_matching_target"
  _check_state(fn, x_t, v=v)
  _check_times(fn, x_t, t=t)
  _checks.one_of(fn, "kind", kind, ("velocity", "transport"))
  _check_derivative(fn, derivative, step)
  if norm is not None:
    _checks.one_of(fn, "norm", norm, _NORMS)
  _checks.in_range(fn, "c", c, 0.0, None, open_low=True)
  t = _checks.at_least_float32(t)
  if kind == "transport":
    end = jnp.zeros_like(t) if end is None else end
    _checks.per_row(fn, "x_t", x_t, end=end)
    end = _checks.at_least_float32(end).astype(t.dtype)
    _checks.in_range(fn, "end", end, 0.0, 1.0)
    _checks.not_above(fn, "end", end, "t", t)
    name = "velocity_fn(x, t)"
    u = _call(fn, name, velocity_fn, x_t, t)
    v = _checks.at_least_float32(v).astype(u.dtype)
    # Neither leg passes the end, where the pair becomes one point.
    before = jnp.maximum(t - step, end) if clamp else t - step
    y = _jump(x_t, v, t, before)
    second = _call(fn, name, velocity_fn, y.astype(x_t.dtype), before)
    target = _jump(y, second.astype(u.dtype), before, end)
    return _jump(x_t, u, t, end), jax.lax.stop_gradient(target)

  zero = jnp.zeros_like(t)
  net = lambda x, t, r: velocity_fn(x, t)
  u, slope = _derivative(
      fn, net, x_t, v, t, zero, derivative, step, clamp
  )
  if norm is not None:
    slope = slope / (_row_norm(slope, norm) + c)
  v = _checks.at_least_float32(v).astype(u.dtype)
  return u, jax.lax.stop_gradient(v - _gap(t, zero, u) * slope)


def phase_start(
    t: Float[Array, "b"], *, phases: int, step: float = 0.0
) -> Float[Array, "b"]:
  """The left edge of the phase of t - step, for phases of equal length.

  Args:
    t: times, in [0, 1]. Shape [b].
    phases: number of phases, >= 1; their edges are k / phases.
    step: subtracted from t first, so that a pair (t, t - step) shares a phase.

  Returns:
    The edges, shape [b], at least float32: where the map of a phase ends.

  Raises:
    ValueError: fewer than one phase; in debug mode also times outside [0, 1].

  Example:
    >>> import jax.numpy as jnp
    >>> phase_start(jnp.array([0.3, 0.6]), phases=2).tolist()
    [0.0, 0.5]

  References:
    MDT-dist, 2025, arXiv:2509.04406 (its option `multiphase`).
  """
  fn = "phase_start"
  _checks.floating(fn, t=t)
  _checks.in_range(fn, "t", t, 0.0, 1.0)
  _checks.in_range(fn, "phases", phases, 1)
  t = _checks.at_least_float32(t)
  edges = jnp.asarray(np.arange(1, phases) / phases, t.dtype)
  passed = jnp.searchsorted(edges, t - step, side="right")
  return passed.astype(t.dtype) / phases


def velocity_distillation_direction(
    velocity_fn: PredictionFn,
    x_t: Float[Array, "b *s"],
    v: Float[Array, "b *s"],
    t: Float[Array, "b"],
    *,
    kind: Literal["velocity", "transport"] = "velocity",
    end: Float[Array, "b"] | None = None,
    derivative: Derivative = "backward",
    step: float = 1e-2,
    clamp: bool = True,
    norm: Literal["rms", "l2"] | None = "rms",
    c: float = 0.1,
) -> Float[Array, "b *s"]:
  """MDT-dist's velocity distillation: a gradient for the student's samples.

  direction = target - prediction of `velocity_matching_target` at x_t, a
  re-noised sample of the student: its own velocity plays the fake score, the
  teacher's target the real one. For the one-step sample x = noise - u the
  official loss (stop_gradient(prediction - target) + u - stop_gradient(u))^2 is
  2 surrogate_loss(x, direction), in value and gradient. All of it is
  stop-gradient.

  Args:
    velocity_fn: (x, t) -> average velocity from t down to 0: the student.
    x_t: its samples, noised to time t. Shape [b, *s].
    v: the teacher's velocity at x_t. Shape [b, *s].
    t: times, in [0, 1]. Shape [b].
    kind: as in `velocity_matching_target`, like everything below.
    end: where a map of "transport" ends. Shape [b].
    derivative: how the derivative is taken.
    step: distance of the difference quotient.
    clamp: keep the difference inside [0, 1].
    norm: normalisation of the derivative. Without one this direction diverged
      in our measurements.
    c: constant beside that norm.

  Returns:
    The gradient to descend on the sample, shape [b, *s], at least float32.

  Raises:
    ValueError: as `velocity_matching_target`.

  Example:
    >>> import jax.numpy as jnp
    >>> x, t = jnp.ones((1, 1)), jnp.array([0.5])
    >>> velocity_distillation_direction(
    ...     lambda x, t: x, x, x, t, derivative="exact", norm=None).tolist()
    [[-0.5]]

  References:
    MDT-dist, 2025, arXiv:2509.04406.
  """
  prediction, target = velocity_matching_target(
      velocity_fn,
      x_t,
      v,
      t,
      kind=kind,
      end=end,
      derivative=derivative,
      step=step,
      clamp=clamp,
      norm=norm,
      c=c,
  )
  return jax.lax.stop_gradient(target - prediction)


def progressive_target(
    denoise_fn: PredictionFn,
    x_t: Float[Array, "b *s"],
    t: Float[Array, "b"],
    s: Float[Array, "b"],
    r: Float[Array, "b"],
    *,
    coefficients: Callable[[Array], tuple[Array, Array]],
) -> Float[Array, "b *s"]:
  """Progressive distillation: the x0 whose one DDIM step equals two steps.

  A DDIM step from t to s is x_s = (alpha_s - q alpha_t) x0(x_t, t) + q x_t with
  q = sigma_s / sigma_t (an Euler step on the variance-exploding and the
  straight path). Two of them, t to s to r, land where one would with
    x0* = l x0(x_t, t) + (1 - l) x0(x_s, s),
    l = q2 a1 / (q2 a1 + a2),
    a1 = alpha_s - q1 alpha_t, a2 = alpha_r - q2 alpha_s,
  the semigroup target in x0 space, free of the usual difference quotient of
  nearly equal states. All of it is stop-gradient.

  Args:
    denoise_fn: (x, t) -> x0 estimate of the frozen teacher.
    x_t: states at t. Shape [b, *s].
    t: start, in the variable that `coefficients` and `denoise_fn` take: path
      time, or sigma. Positive noise. Shape [b].
    s: between; the middle by default choice of the method. Shape [b].
    r: end. Shape [b].
    coefficients: t -> (alpha, sigma), each [b], such as
      `lambda t: (path.alpha(t), path.sigma(t))`; for EDM levels
      `lambda sigma: (jnp.ones_like(sigma), sigma)`.

  Returns:
    The target for x0(x_t, t), shape [b, *s], at least float32, no gradient.
    Where s = r = t it is the teacher's own estimate.

  Raises:
    ValueError: shapes that do not agree, an empty batch; in debug mode also
      times out of order and non-finite rows.

  Example:
    >>> import jax.numpy as jnp
    >>> sigma = jnp.array([4.0])
    >>> progressive_target(
    ...     lambda x, sigma: jnp.zeros_like(x), jnp.ones((1, 1)), sigma,
    ...     sigma / 2, sigma / 4,
    ...     coefficients=lambda s: (jnp.ones_like(s), s)).tolist()
    [[0.0]]

  References:
    Salimans and Ho, Progressive Distillation for Fast Sampling of Diffusion
    Models, 2022, arXiv:2202.00512, algorithm 2 and appendix G.
  """
  fn = "progressive_target"
  _check_state(fn, x_t)
  _checks.per_row(fn, "x_t", x_t, t=t, s=s, r=r)
  _checks.floating(fn, t=t, s=s, r=r)
  _checks.not_above(fn, "s", s, "t", t)
  _checks.not_above(fn, "r", r, "s", s)
  t, s, r = (_checks.at_least_float32(time) for time in (t, s, r))
  (a_t, s_t), (a_s, s_s), (a_r, s_r) = (coefficients(x) for x in (t, s, r))
  q1, q2 = s_s / s_t, s_r / s_s
  a1, a2 = a_s - q1 * a_t, a_r - q2 * a_s
  whole = q2 * a1 + a2
  share = jnp.where(
      whole > 0, q2 * a1 / jnp.where(whole > 0, whole, 1), jnp.ones_like(whole)
  )
  name = "denoise_fn(x, t)"
  first = _call(fn, name, denoise_fn, x_t, t)
  wide = lambda c: _checks.expand_like(c, first).astype(first.dtype)
  x = _checks.at_least_float32(x_t).astype(first.dtype)
  x_s = wide(a1) * first + wide(q1) * x
  second = _call(fn, name, denoise_fn, x_s.astype(x_t.dtype), s)
  share = wide(share)
  return jax.lax.stop_gradient(
      share * first + (1 - share) * second.astype(first.dtype)
  )


def progressive_num_steps(
    step: Int[Array, "*n"] | int,
    *,
    start: int = 4096,
    steps_per_stage: int = 50000,
) -> Int[Array, "*n"]:
  """The student's number of steps at a training step: halved every stage.

  start, start / 2, ... for `steps_per_stage` each, except that 2 lasts twice as
  long; 1 to the end. At a change the student becomes the teacher and the
  optimiser state is reset.

  Args:
    step: training step, >= 0. Any shape.
    start: number of steps of the first student, a power of two, >= 2.
    steps_per_stage: length of a stage.

  Returns:
    int32 of the shape of step.

  Raises:
    ValueError: start not a power of two, steps_per_stage below 1.

  Example:
    >>> int(progressive_num_steps(100000, start=16))
    4

  References:
    Song et al., Consistency Models, 2023, arXiv:2303.01469, official code of
    its progressive-distillation baseline.
  """
  fn = "progressive_num_steps"
  _checks.in_range(fn, "steps_per_stage", steps_per_stage, 1)
  if start < 2 or start & (start - 1):
    _checks.fail(fn, "start", "a power of two, at least 2", start)
  _checks.in_range(fn, "step", step, 0)
  stage = jnp.asarray(step) // steps_per_stage
  halvings = start.bit_length() - 1
  power = jnp.clip(halvings - stage, 1, halvings)
  power = jnp.where(stage > halvings, jnp.zeros_like(power), power)
  return jnp.left_shift(jnp.ones_like(power), power).astype(jnp.int32)


def guidance_distillation_loss(
    student: Float[Array, "b *s"],
    teacher_cond: Float[Array, "b *s"],
    teacher_uncond: Float[Array, "b *s"],
    guidance_scale: Float[Array, "b"],
    *,
    alpha: Float[Array, "b"] | None = None,
    sigma: Float[Array, "b"] | None = None,
    elements: Literal["mean", "sum"] = "mean",
) -> Float[Array, "b"]:
  """Folds classifier-free guidance into one network that reads the scale.

  loss = lambda (student - stop_gradient(uncond + w (cond - uncond)))^2 over the
  elements, w the row's guidance scale (1: none). lambda is 1, right for
  velocities and v; for x0 predictions pass alpha and sigma to get the truncated
  SNR weight max(alpha^2 / sigma^2, 1).

  Args:
    student: the student's prediction at (x_t, t, w). Shape [b, *s].
    teacher_cond: the teacher's with the condition. Frozen. Shape [b, *s].
    teacher_uncond: the teacher's without it. Frozen. Shape [b, *s].
    guidance_scale: w of every row. Shape [b].
    alpha: data coefficient at t; given together with sigma. Shape [b].
    sigma: noise coefficient at t, > 0. Shape [b].
    elements: mean or sum over the elements of a row.

  Returns:
    The loss, shape [b], at least float32. Minimum 0.

  Raises:
    ValueError: shapes that do not agree, an empty batch, an unknown option,
      only one of alpha and sigma.

  Example:
    >>> import jax.numpy as jnp
    >>> one, w = jnp.ones((1, 1)), jnp.array([3.0])
    >>> guidance_distillation_loss(one, 2.0 * one, one, w).tolist()  # (1 - 4)^2
    [9.0]

  References:
    Meng et al., On Distillation of Guided Diffusion Models, 2022,
    arXiv:2210.03142, eq. 2 (from general knowledge, not from code).
  """
  fn = "guidance_distillation_loss"
  _check_state(
      fn,
      student,
      teacher_cond=teacher_cond,
      teacher_uncond=teacher_uncond,
  )
  _checks.per_row(
      fn,
      "student",
      student,
      guidance_scale=guidance_scale,
      alpha=alpha,
      sigma=sigma,
  )
  _checks.one_of(fn, "elements", elements, _ELEMENTS)
  if (alpha is None) != (sigma is None):
    _checks.fail(fn, "alpha", "given together with sigma", "one of them")
  student = _checks.at_least_float32(student)
  cond, uncond = (
      jax.lax.stop_gradient(_checks.at_least_float32(a)).astype(student.dtype)
      for a in (teacher_cond, teacher_uncond)
  )
  w = jax.lax.stop_gradient(_checks.at_least_float32(guidance_scale))
  w = _checks.expand_like(w, student).astype(student.dtype)
  loss = _reduce(
      jnp.square(student - (uncond + w * (cond - uncond))), elements
  )
  if alpha is None:
    return loss
  snr = jnp.square(
      _checks.at_least_float32(alpha) / _checks.at_least_float32(sigma)
  )
  return loss * jnp.maximum(snr, jnp.ones_like(snr)).astype(loss.dtype)
