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

from distilljax import _checks
from distilljax.typing import Array, Float, FlowMapFn, PredictionFn

Derivative = Literal["exact", "central", "backward"]
_DERIVATIVES = ("exact", "central", "backward")
_ELEMENTS = ("mean", "sum")


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
    clip: bound on the magnitude of X and of the target (Shortcut: 4); None
      for none.

  Returns:
    The target for u(x_t, t, r), shape [b, *s], at least float32, no gradient.

  Raises:
    ValueError: shapes that do not agree, an empty batch, `clip` not positive;
      in debug mode also times outside [0, 1] or out of order, non-finite rows.

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
  return _semigroup(fn, velocity_fn, x_t, t, s, r, first_fn, clip)


def _semigroup(
    fn, velocity_fn, x_t, t, s, r, first_fn=None, clip=None
) -> Array:
  """The semigroup target without the checks."""
  t, s, r = (_checks.at_least_float32(time) for time in (t, s, r))
  bounded = (lambda y: y) if clip is None else (lambda y: y.clip(-clip, clip))
  first = _call(fn, "first_fn(x, t, s)", first_fn or velocity_fn, x_t, t, s)
  middle = bounded(_jump(x_t, first, t, s)).astype(x_t.dtype)
  second = _call(fn, "velocity_fn(x, t, r)", velocity_fn, middle, s, r)
  whole = t - r
  share = jnp.where(
      whole > 0, (t - s) / jnp.where(whole > 0, whole, 1), jnp.ones_like(whole)
  )
  share = _checks.expand_like(share, first).astype(first.dtype)
  target = share * first + (1 - share) * second.astype(first.dtype)
  return jax.lax.stop_gradient(bounded(target))


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
