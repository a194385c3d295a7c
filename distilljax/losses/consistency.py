"""Consistency models: discrete pairs, continuous time, TrigFlow, multistep.

A consistency function f(x, sigma) sends every point of a probability-flow path
to its clean end, so that f agrees at neighbouring points of one path. Discrete
losses (CT, CD, iCT, ECT, MLCM, Flash-WAM) compare two such points. Letting
their distance go to zero leaves the derivative of f along the path, which
should be zero: the continuous-time losses (sCM, rCM, TBCM) descend along it,
and are the Eulerian flow-map loss with r = 0 in other coordinates.

Two time variables occur and neither is called t. EDM functions take `sigma`:
x = x0 + sigma noise. TrigFlow functions take `angle` in radians, in
[0, pi/2]: x = cos(angle) x0 + sin(angle) z with x0 and z of standard deviation
sigma_data; every slope there is d/d(angle). The closures of the multistep loss
take whatever variable the caller's coefficients take.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import _checks
from distilljax.typing import Array, DenoiseFn, Float, Int, Metric

TrigDerivative = Literal["exact", "central", "backward", "semi"]
_TRIG_DERIVATIVES = ("exact", "central", "backward", "semi")
_ELEMENTS = ("mean", "sum")


def _rows(a: Array) -> tuple[int, ...]:
  """The non-batch axes."""
  return tuple(range(1, a.ndim))


def _reduce(values: Array, elements: str) -> Array:
  reduce = jnp.mean if elements == "mean" else jnp.sum
  return reduce(values, axis=_rows(values))


def _check_state(fn: str, name: str, x: Array, **others: Array) -> None:
  """`x` is a non-empty floating [b, *s] and the others have its shape."""
  arrays = {name: x, **others}
  _checks.min_rank(fn, name, x, 1, "[b, *s]")
  _checks.nonempty(fn, **{name: x})
  _checks.floating(fn, **arrays)
  _checks.same_shape(fn, **arrays)
  _checks.finite(fn, **arrays)


def _check_sigma(fn: str, like: str, x: Array, **sigmas: Array) -> None:
  """Noise levels [b], not negative, given from the largest down."""
  _checks.per_row(fn, like, x, **sigmas)
  _checks.floating(fn, **sigmas)
  names = list(sigmas)
  for name in names:
    _checks.in_range(fn, name, sigmas[name], 0.0)
  for high, low in zip(names, names[1:]):
    _checks.not_above(fn, low, sigmas[low], high, sigmas[high])


def _check_angle(fn: str, like: str, x: Array, angle: Array) -> None:
  _checks.per_row(fn, like, x, angle=angle)
  _checks.floating(fn, angle=angle)
  # A float32 pi / 2 is a little more than pi / 2.
  _checks.in_range(fn, "angle", angle, 0.0, np.pi / 2 + 1e-6)


def _call(fn: str, name: str, net: Callable[..., Array], x: Array, *times):
  """The network's output, at least float32, with its shape checked."""
  out = net(x, *times)
  _checks.shape(fn, name, out, jnp.shape(x), "[b, *s]", "its input")
  return _checks.at_least_float32(out)


def _wide(c: Array, like: Array) -> Array:
  """A factor per row, shaped and typed to multiply `like`."""
  return _checks.expand_like(c, like).astype(like.dtype)


def _difference(fn: str, a: Array, b: Array) -> Array:
  _check_state(fn, "a", a, b=b)
  a, b = _checks.at_least_float32(a), _checks.at_least_float32(b)
  return a - b.astype(a.dtype)


def _magnitude(x: Array) -> Array:
  """|x| with slope 0 at 0, where jnp.abs has 1."""
  return x * jnp.sign(x)


def squared_distance(
    a: Float[Array, "b *s"],
    b: Float[Array, "b *s"],
    *,
    elements: Literal["mean", "sum"] = "mean",
) -> Float[Array, "b"]:
  """Mean or sum over the elements of a row of (a - b)^2.

  Args:
    a: one batch. Shape [b, *s].
    b: the other; nothing is stop-gradient here. Shape [b, *s].
    elements: "mean" or "sum" over the non-batch axes.

  Returns:
    The distance of every row, shape [b], at least float32; 0 where a = b.

  Raises:
    ValueError: shapes that differ, an empty batch, an unknown `elements`.

  Example:
    >>> import jax.numpy as jnp
    >>> squared_distance(jnp.array([[1.0, 3.0]]), jnp.zeros((1, 2))).tolist()
    [5.0]
  """
  fn = "squared_distance"
  _checks.one_of(fn, "elements", elements, _ELEMENTS)
  return _reduce(jnp.square(_difference(fn, a, b)), elements)


def absolute_distance(
    a: Float[Array, "b *s"],
    b: Float[Array, "b *s"],
    *,
    elements: Literal["mean", "sum"] = "mean",
) -> Float[Array, "b"]:
  """Mean or sum over the elements of a row of |a - b|.

  Args:
    a: one batch. Shape [b, *s].
    b: the other; nothing is stop-gradient here. Shape [b, *s].
    elements: "mean" or "sum" over the non-batch axes.

  Returns:
    The distance of every row, shape [b], at least float32; 0 where a = b, and
    so is the gradient.

  Raises:
    ValueError: shapes that differ, an empty batch, an unknown `elements`.

  Example:
    >>> import jax.numpy as jnp
    >>> absolute_distance(jnp.array([[1.0, -3.0]]), jnp.zeros((1, 2))).tolist()
    [2.0]
  """
  fn = "absolute_distance"
  _checks.one_of(fn, "elements", elements, _ELEMENTS)
  return _reduce(_magnitude(_difference(fn, a, b)), elements)


def max_distance(
    a: Float[Array, "b *s"], b: Float[Array, "b *s"]
) -> Float[Array, "b"]:
  """Largest |a - b| of a row; the first of equal ones gets the gradient.

  Args:
    a: one batch. Shape [b, *s].
    b: the other; nothing is stop-gradient here. Shape [b, *s].

  Returns:
    The distance of every row, shape [b], at least float32; 0 where a = b, and
    so is the gradient.

  Raises:
    ValueError: shapes that differ, an empty batch.

  Example:
    >>> import jax.numpy as jnp
    >>> max_distance(jnp.array([[1.0, -3.0]]), jnp.zeros((1, 2))).tolist()
    [3.0]
  """
  difference = _difference("max_distance", a, b)
  flat = difference.reshape(difference.shape[0], -1)
  # Not jnp.max: its gradient looks for the elements that equal the maximum, and
  # where the compiler computes the difference twice, rounded differently, there
  # is none and it is 0 / 0.
  place = jnp.argmax(jnp.abs(flat), axis=1, keepdims=True)
  return _magnitude(jnp.take_along_axis(flat, place, axis=1).squeeze(1))


def pseudo_huber(
    a: Float[Array, "b *s"],
    b: Float[Array, "b *s"],
    *,
    c: float | None = None,
) -> Float[Array, "b"]:
  """Pseudo-Huber distance of rows: sqrt(|a - b|^2 + c^2) - c.

  |.| is the l2 norm over all elements of a row, not per element. Computed as
  |a-b|^2 / (sqrt(|a-b|^2 + c^2) + c), which loses no digits where the distance
  is small beside c. c = 0 is the plain l2 norm, with gradient 0 at a = b.

  Args:
    a: one batch. Shape [b, *s].
    b: the other; nothing is stop-gradient here. Shape [b, *s].
    c: where it turns from quadratic to linear, >= 0; None: 0.00054 sqrt(D)
      with D the number of elements of a row (0.03 for 32 x 32 x 3).

  Returns:
    The distance of every row, shape [b], at least float32; 0 where a = b.

  Raises:
    ValueError: shapes that differ, an empty batch, c negative.

  Example:
    >>> import jax.numpy as jnp
    >>> a, b = jnp.array([[3.0, 4.0]]), jnp.zeros((1, 2))
    >>> pseudo_huber(a, b, c=0.0).tolist()
    [5.0]

  References:
    Song and Dhariwal, Improved Techniques for Training Consistency Models,
    2023, arXiv:2310.14189, eq. 7 and section 3.3.
  """
  fn = "pseudo_huber"
  _checks.in_range(fn, "c", c, 0.0)
  difference = _difference(fn, a, b)
  if c is None:
    c = 0.00054 * float(np.sqrt(np.prod(difference.shape[1:])))
  squares = jnp.sum(jnp.square(difference), axis=_rows(difference))
  if c == 0:
    # The gradient of sqrt at 0 is infinite: the row must not reach it.
    positive = squares > 0
    safe = jnp.where(positive, squares, jnp.ones_like(squares))
    return jnp.where(positive, jnp.sqrt(safe), jnp.zeros_like(squares))
  return squares / (jnp.sqrt(squares + c**2) + c)


def edm_scalings(
    sigma: Float[Array, "*b"],
    *,
    sigma_data: float = 0.5,
    sigma_min: float = 0.0,
) -> tuple[Float[Array, "*b"], Float[Array, "*b"], Float[Array, "*b"]]:
  """(c_skip, c_out, c_in) of EDM, shifted so that f(x, sigma_min) = x.

    c_skip = d^2 / ((sigma - sigma_min)^2 + d^2)
    c_out = (sigma - sigma_min) d / sqrt(sigma^2 + d^2)
    c_in = 1 / sqrt(sigma^2 + d^2)
  f(x, sigma) = c_skip x + c_out net(c_in x, ...). Consistency models use the
  smallest noise level, diffusion teachers 0; only c_skip and the numerator of
  c_out move.

  Args:
    sigma: noise levels. Any shape.
    sigma_data: standard deviation d of the data, > 0.
    sigma_min: the level at which f is the identity, >= 0.

  Returns:
    The three factors, of the shape of sigma, at least float32.

  Raises:
    ValueError: `sigma_data` not positive, `sigma_min` negative; in debug mode
      also negative sigma.

  Example:
    >>> import jax.numpy as jnp
    >>> c_skip, c_out, _ = edm_scalings(jnp.array([0.002]), sigma_min=0.002)
    >>> float(c_skip[0]), float(c_out[0])
    (1.0, 0.0)

  References:
    Karras et al., Elucidating the Design Space of Diffusion-Based Generative
    Models, 2022, arXiv:2206.00364, table 1; Song et al., Consistency Models,
    2023, arXiv:2303.01469, appendix C.
  """
  fn = "edm_scalings"
  _checks.floating(fn, sigma=sigma)
  _checks.in_range(fn, "sigma", sigma, 0.0)
  _checks.in_range(fn, "sigma_data", sigma_data, 0.0, None, open_low=True)
  _checks.in_range(fn, "sigma_min", sigma_min, 0.0)
  sigma = _checks.at_least_float32(sigma)
  shifted = sigma - sigma_min
  c_in = 1 / jnp.sqrt(jnp.square(sigma) + sigma_data**2)
  c_skip = sigma_data**2 / (jnp.square(shifted) + sigma_data**2)
  return c_skip, shifted * sigma_data * c_in, c_in


def consistency_coefficients(
    sigma: Float[Array, "*b"],
    *,
    kind: Literal["linear", "karras", "lcm"] = "linear",
    sigma_data: float = 0.5,
    time_scale: float = 10.0,
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
  """(a, b) of a consistency function f = a x + b v on the straight path.

  With x = (1 - sigma) x0 + sigma noise and v the network's velocity, its x0 is
  x - sigma v. The boundary f(x, 0) = x asks for a(0) = 1 and b(0) = 0, and b is
  what the gradient of f with respect to the network is multiplied by:
    "linear": a = 1, b = -sigma; f is the x0 estimate, |b| = O(sigma), the
      best rate a differentiable b can have.
    "karras": c_skip + c_out and -sigma c_out, with EDM's c_skip and c_out:
      |b| = O(sigma^2), no signal at low noise. f is not x - sigma v, so that
      a self-consistent student must be read out by f, not by an Euler step.
    "lcm": the same with sigma times `time_scale` inside the scalings and
      c_out = s / sqrt(s^2 + d^2): c_skip nearly 0 and c_out nearly 1 except
      close to 0, hence nearly linear there.

  Args:
    sigma: noise levels of the straight path, in [0, 1]. Any shape.
    kind: as above. Flash-WAM: "karras" for video, "linear" for actions.
    sigma_data: d of the scalings.
    time_scale: factor on sigma in "lcm".

  Returns:
    (a, b), of the shape of sigma, at least float32.

  Raises:
    ValueError: an unknown kind, `sigma_data` or `time_scale` not positive; in
      debug mode also sigma outside [0, 1].

  Example:
    >>> import jax.numpy as jnp
    >>> a, b = consistency_coefficients(jnp.array([0.25]), kind="linear")
    >>> float(a[0]), float(b[0])
    (1.0, -0.25)

  References:
    Flash-WAM, 2026, arXiv:2606.05254 (proposition on |b|, and its two kinds);
    Luo et al., Latent Consistency Models, 2023, arXiv:2310.04378, for "lcm".
  """
  fn = "consistency_coefficients"
  _checks.floating(fn, sigma=sigma)
  _checks.in_range(fn, "sigma", sigma, 0.0, 1.0)
  _checks.one_of(fn, "kind", kind, ("linear", "karras", "lcm"))
  _checks.in_range(fn, "sigma_data", sigma_data, 0.0, None, open_low=True)
  _checks.in_range(fn, "time_scale", time_scale, 0.0, None, open_low=True)
  sigma = _checks.at_least_float32(sigma)
  if kind == "linear":
    return jnp.ones_like(sigma), -sigma
  if kind == "karras":
    c_skip, c_out, _ = edm_scalings(sigma, sigma_data=sigma_data)
  else:
    scaled = sigma * time_scale
    c_skip, c_out, _ = edm_scalings(scaled, sigma_data=sigma_data)
    c_out = c_out / sigma_data
  return c_skip + c_out, -sigma * c_out


def consistency_weight(
    sigma: Float[Array, "*b"],
    sigma_next: Float[Array, "*b"] | None = None,
    *,
    kind: Literal[
        "uniform", "snr", "snrp1", "truncated_snr", "inverse_gap"
    ] = "uniform",
) -> Float[Array, "*b"]:
  """Weight of a pair of noise levels.

  "uniform" 1, "snr" 1/sigma^2, "snrp1" 1/sigma^2 + 1, "truncated_snr"
  max(1/sigma^2, 1), "inverse_gap" 1/(sigma - sigma_next) (iCT, ECT).

  Args:
    sigma: the upper level, > 0. Any shape.
    sigma_next: the lower level, < sigma, needed by "inverse_gap".
    kind: as above. Both official recipes of CT and CD use "uniform".

  Returns:
    Weights of the shape of sigma, at least float32.

  Raises:
    ValueError: an unknown kind, `sigma_next` missing or of another shape; in
      debug mode also levels that are not positive or out of order.

  Example:
    >>> import jax.numpy as jnp
    >>> consistency_weight(jnp.array([0.5]), kind="snrp1").tolist()
    [5.0]

  References:
    Song et al., 2023, arXiv:2303.01469, appendix C; Song and Dhariwal, 2023,
    arXiv:2310.14189, section 3.5.
  """
  fn = "consistency_weight"
  kinds = ("uniform", "snr", "snrp1", "truncated_snr", "inverse_gap")
  _checks.one_of(fn, "kind", kind, kinds)
  _checks.floating(fn, sigma=sigma, sigma_next=sigma_next)
  _checks.in_range(fn, "sigma", sigma, 0.0, None, open_low=True)
  sigma = _checks.at_least_float32(sigma)
  if kind == "uniform":
    return jnp.ones_like(sigma)
  if kind == "inverse_gap":
    if sigma_next is None:
      _checks.fail(fn, "sigma_next", "given for kind='inverse_gap'", "None")
    _checks.same_shape(fn, sigma=sigma, sigma_next=sigma_next)
    gap = sigma - _checks.at_least_float32(sigma_next)
    _checks.holds(fn, "sigma_next", gap, lambda g: g > 0, "< sigma")
    return 1 / gap
  snr = 1 / jnp.square(sigma)
  if kind == "snr":
    return snr
  if kind == "snrp1":
    return snr + 1
  return jnp.maximum(snr, jnp.ones_like(snr))


def consistency_distillation_target(
    denoise_fn: DenoiseFn,
    x_t: Float[Array, "b *s"],
    sigma: Float[Array, "b"],
    sigma_next: Float[Array, "b"],
    *,
    solver: Literal["heun", "euler"] = "heun",
) -> Float[Array, "b *s"]:
  """The teacher's step from sigma down to sigma_next: where the target looks.

  dx/dsigma = (x - D(x, sigma)) / sigma. "euler" takes one slope, "heun" the
  mean of the slopes at both ends. Consistency training needs no teacher: with
  D = x0 the Euler step is x0 + sigma_next noise exactly (and Heun's second
  slope is the first).

  Args:
    denoise_fn: (x, sigma) -> x0 estimate of the frozen teacher.
    x_t: points at sigma. Shape [b, *s].
    sigma: upper levels, > 0. Shape [b].
    sigma_next: lower levels, in [0, sigma]; "heun" needs them positive.
      Shape [b].
    solver: "heun" (consistency distillation) or "euler".

  Returns:
    Points at sigma_next, shape [b, *s], at least float32, no gradient.

  Raises:
    ValueError: shapes that do not agree, an empty batch, an unknown solver; in
      debug mode also levels out of order and non-finite rows.

  Example:
    >>> import jax.numpy as jnp
    >>> x, high, low = jnp.ones((1, 1)), jnp.array([2.0]), jnp.array([1.0])
    >>> consistency_distillation_target(
    ...     lambda x, sigma: jnp.zeros_like(x), x, high, low).tolist()
    [[0.5]]

  References:
    Song et al., Consistency Models, 2023, arXiv:2303.01469, algorithm 2.
  """
  fn = "consistency_distillation_target"
  _check_state(fn, "x_t", x_t)
  _check_sigma(fn, "x_t", x_t, sigma=sigma, sigma_next=sigma_next)
  _checks.one_of(fn, "solver", solver, ("heun", "euler"))
  sigma = _checks.at_least_float32(sigma)
  sigma_next = _checks.at_least_float32(sigma_next)

  def slope(x, level):
    x0 = _call(fn, "denoise_fn(x, sigma)", denoise_fn, x, level)
    return (x.astype(x0.dtype) - x0) / _wide(level, x0)

  first = slope(x_t, sigma)
  x = _checks.at_least_float32(x_t).astype(first.dtype)
  gap = _wide(sigma_next - sigma, first)
  out = x + gap * first
  if solver == "heun":
    out = x + gap * (first + slope(out.astype(x_t.dtype), sigma_next)) / 2
  return jax.lax.stop_gradient(out)


def consistency_loss(
    denoise_fn: DenoiseFn,
    target_fn: DenoiseFn,
    x_t: Float[Array, "b *s"],
    t: Float[Array, "b"],
    x_s: Float[Array, "b *s"],
    s: Float[Array, "b"],
    *,
    metric: Metric = pseudo_huber,
    weight: Float[Array, "b"] | None = None,
    stop_target: bool = True,
) -> Float[Array, "b"]:
  """Discrete consistency: two points of one path have the same clean end.

  loss = weight metric(denoise_fn(x_t, t), stop_gradient(target_fn(x_s, s))).
  The levels t and s only reach the closures: sigma where these take sigma, path
  time where they take that. Consistency training: x_s = x0 + s noise with the
  noise of x_t; distillation: `consistency_distillation_target`. iCT and ECT use
  the student itself as target_fn (no moving average), CT and CD its average.

  Args:
    denoise_fn: (x, t) -> x0: the student's consistency function.
    target_fn: (x, s) -> x0: the target's. Frozen.
    x_t: points at the upper level. Shape [b, *s].
    t: upper levels. Shape [b].
    x_s: points of the same paths at the lower level. Frozen. Shape [b, *s].
    s: lower levels, s <= t. Shape [b].
    metric: (a, b) -> [b]. With `functools.partial` for its constants.
    weight: weight of a row, as from `consistency_weight`. Shape [b].
    stop_target: False lets the gradient into target_fn (a variant of the
      paper that trains through both evaluations).

  Returns:
    The loss, shape [b], at least float32, unreduced. Minimum 0.

  Raises:
    ValueError: shapes that do not agree, an empty batch; in debug mode also
      s > t and non-finite rows.

  Example:
    >>> import jax.numpy as jnp
    >>> x, t, s = jnp.ones((1, 2)), jnp.array([2.0]), jnp.array([1.0])
    >>> f = lambda x, t: x * t[:, None]
    >>> consistency_loss(f, f, x, t, x, s, metric=squared_distance).tolist()
    [1.0]

  References:
    Song et al., Consistency Models, 2023, arXiv:2303.01469, eq. 7 and 10;
    Song and Dhariwal, 2023, arXiv:2310.14189, eq. 6-8; Geng et al.,
    Consistency Models Made Easy, 2024, arXiv:2406.14548. Departure from the
    official code: non-finite rows are not dropped from the sum.
  """
  fn = "consistency_loss"
  _check_state(fn, "x_t", x_t, x_s=x_s)
  _checks.per_row(fn, "x_t", x_t, t=t, s=s, weight=weight)
  _checks.floating(fn, t=t, s=s, weight=weight)
  _checks.not_above(fn, "s", s, "t", t)
  t, s = _checks.at_least_float32(t), _checks.at_least_float32(s)
  prediction = _call(fn, "denoise_fn(x, t)", denoise_fn, x_t, t)
  target = _call(fn, "target_fn(x, s)", target_fn, x_s, s)
  if stop_target:
    target = jax.lax.stop_gradient(target)
  loss = metric(prediction, target)
  _checks.per_row(fn, "x_t", x_t, **{"metric(a, b)": loss})
  if weight is None:
    return loss
  weight = jax.lax.stop_gradient(_checks.at_least_float32(weight))
  return loss * weight.astype(loss.dtype)


def continuous_consistency_loss(
    denoise_fn: DenoiseFn,
    x_t: Float[Array, "b *s"],
    slope: Float[Array, "b *s"],
    sigma: Float[Array, "b"],
    *,
    kind: Literal["stop_gradient", "l2", "l1"] = "stop_gradient",
    elements: Literal["mean", "sum"] = "mean",
) -> Float[Array, "b"]:
  """The continuous-time loss of the first consistency paper.

  With f = denoise_fn(x_t, sigma) and its derivative df/dsigma along the path,
  a JVP of tangent (slope, 1):
    "stop_gradient": stop_gradient(df/dsigma) f, summed or averaged: a pseudo
      loss whose value means nothing and may be negative; its gradient is that
      of the discrete squared loss with a vanishing gap, up to the gap.
    "l2": the l2 norm (or root mean square) of df/dsigma, differentiated
      through the JVP; "l1": the sum (or mean) of its absolute values.

  Args:
    denoise_fn: (x, sigma) -> x0: the student's consistency function.
    x_t: points at sigma. Shape [b, *s].
    slope: dx/dsigma of the path: noise (training), or a teacher's
      (x - D) / sigma (distillation). Frozen. Shape [b, *s].
    sigma: noise levels, > 0. Shape [b].
    kind: as above.
    elements: "mean" or "sum" over the elements of a row; official: "sum" for
      the first two kinds, "mean" for "l1".

  Returns:
    The loss, shape [b], at least float32.

  Raises:
    ValueError: shapes that do not agree, an empty batch, an unknown option; in
      debug mode also negative levels and non-finite rows.

  Example:
    >>> import jax.numpy as jnp
    >>> x, sigma = jnp.ones((1, 2)), jnp.array([2.0])
    >>> f = lambda x, sigma: x * sigma[:, None]
    >>> continuous_consistency_loss(f, x, x, sigma, kind="l1").tolist()
    [3.0]

  References:
    Song et al., Consistency Models, 2023, arXiv:2303.01469, appendix B.
  """
  fn = "continuous_consistency_loss"
  _check_state(fn, "x_t", x_t, slope=slope)
  _check_sigma(fn, "x_t", x_t, sigma=sigma)
  _checks.one_of(fn, "kind", kind, ("stop_gradient", "l2", "l1"))
  _checks.one_of(fn, "elements", elements, _ELEMENTS)
  sigma = _checks.at_least_float32(sigma)
  f, change = jax.jvp(
      functools.partial(_call, fn, "denoise_fn(x, sigma)", denoise_fn),
      (x_t, sigma),
      (jax.lax.stop_gradient(slope).astype(x_t.dtype), jnp.ones_like(sigma)),
  )
  if kind == "stop_gradient":
    return _reduce(jax.lax.stop_gradient(change) * f, elements)
  if kind == "l1":
    return _reduce(_magnitude(change), elements)
  squares = _reduce(jnp.square(change), elements)
  # A row at a fixed point has gradient 0, not 0 / 0.
  positive = squares > 0
  safe = jnp.where(positive, squares, jnp.ones_like(squares))
  return jnp.where(positive, jnp.sqrt(safe), jnp.zeros_like(squares))


def tangent_warmup(
    step: Int[Array, ""] | int,
    *,
    warmup_steps: int,
    calm_start: int | None = None,
    calm_steps: int = 2000,
    final: float = 0.75,
) -> Float[Array, ""]:
  """Weight r of the tangent's unstable part at a step.

  r = min(1, step / warmup_steps), 1 without warm-up. With `calm_start` (TBCM)
  it is lowered again, r (1 - p) + final p with
  p = clip((step - calm_start) / calm_steps, 0, 1).

  Args:
    step: training step.
    warmup_steps: length of the rise (sCM 10000, TBCM 4000, rCM 1000); 0: none.
    calm_start: where the fall starts (TBCM 15000); None: it never does.
    calm_steps: length of the fall.
    final: value at its end.

  Returns:
    A scalar in [0, 1], at least float32.

  Raises:
    ValueError: negative lengths, calm_steps below 1, final outside [0, 1].

  Example:
    >>> float(tangent_warmup(2500, warmup_steps=10000))
    0.25

  References:
    Lu and Song, 2024, arXiv:2410.11081, section 4.1; TBCM, 2025,
    arXiv:2511.20410, from its official code.
  """
  fn = "tangent_warmup"
  _checks.in_range(fn, "warmup_steps", warmup_steps, 0)
  _checks.in_range(fn, "calm_start", calm_start, 0)
  _checks.in_range(fn, "calm_steps", calm_steps, 1)
  _checks.in_range(fn, "final", final, 0.0, 1.0)
  step = jnp.asarray(step, jnp.result_type(float))
  r = jnp.minimum(step / warmup_steps, 1.0) if warmup_steps else 1.0 + 0 * step
  if calm_start is None:
    return r
  p = jnp.clip((step - calm_start) / calm_steps, 0.0, 1.0)
  return r * (1 - p) + final * p


def trigflow_coefficients(
    angle: Float[Array, "*b"],
) -> tuple[
    Float[Array, "*b"],
    Float[Array, "*b"],
    Float[Array, "*b"],
    Float[Array, "*b"],
]:
  """(c_skip, c_out, c_in, t) that read a straight-path network on TrigFlow.

  At equal signal-to-noise ratio, with s = sin(angle) + cos(angle): the straight
  path's state is c_in x, c_in = 1/s, its time t = sin(angle)/s, and
  x0 = c_skip x + c_out velocity(c_in x, t) with c_skip = 1/s and
  c_out = -sin(angle)/s. Data of standard deviation 1 (sigma_data = 1).

  Args:
    angle: radians, in [0, pi/2]. Any shape.

  Returns:
    The four, of the shape of angle, at least float32; none is singular.

  Raises:
    TypeError: an angle that is not floating; in debug mode ValueError for one
      outside [0, pi/2].

  Example:
    >>> import jax.numpy as jnp
    >>> [float(c[0]) for c in trigflow_coefficients(jnp.zeros(1))]
    [1.0, -0.0, 1.0, 0.0]

  References:
    rCM, 2025, arXiv:2510.08431, from its official code.
  """
  fn = "trigflow_coefficients"
  _checks.floating(fn, angle=angle)
  _checks.in_range(fn, "angle", angle, 0.0, np.pi / 2 + 1e-6)
  angle = _checks.at_least_float32(angle)
  sin = jnp.sin(angle)
  scale = 1 / (sin + jnp.cos(angle))
  return scale, -sin * scale, scale, sin * scale


def make_trigflow_network(velocity_fn: DenoiseFn) -> DenoiseFn:
  """A straight-path velocity network as TrigFlow's F, with sigma_data = 1.

  F(x, angle) = ((cos - sin) x + velocity_fn(c_in x, t)) / (cos + sin), which is
  (cos x - x0)/sin without the division by sin: exact down to angle 0. See
  `trigflow_coefficients`. Differentiable in both modes.

  Args:
    velocity_fn: (x, t) -> velocity of the straight path, t in [0, 1].

  Returns:
    (x, angle) -> F, for `trigflow_tangent(sigma_data=1.0)` and `rcm_tangent`.

  Example:
    >>> import jax.numpy as jnp
    >>> network = make_trigflow_network(lambda x, t: 2.0 * x)
    >>> network(jnp.ones((1, 1)), jnp.zeros(1)).tolist()  # x + 2 x
    [[3.0]]

  References:
    Lu and Song, 2024, arXiv:2410.11081, appendix B; rCM, 2025,
    arXiv:2510.08431.
  """
  fn = "make_trigflow_network"

  def network(x, angle):
    _checks.per_row(fn, "x", x, angle=angle)
    angle = _checks.at_least_float32(angle)
    wide_x = _checks.at_least_float32(x)
    c_skip, _, c_in, t = trigflow_coefficients(angle)
    state = (_wide(c_in, wide_x) * wide_x).astype(x.dtype)
    v = _call(fn, "velocity_fn(x, t)", velocity_fn, state, t)
    turn = jnp.cos(angle) - jnp.sin(angle)
    return _wide(c_skip, v) * (_wide(turn, v) * wide_x.astype(v.dtype) + v)

  return network


def _trig_derivative(
    fn: str,
    network_fn: DenoiseFn,
    x_t: Array,
    slope: Array,
    angle: Array,
    sigma_data: float,
    kind: str,
    step: float | None,
) -> tuple[Array, Array]:
  """(F, J): the output, with gradient, and cos sin dF/d(angle), without."""
  wide_x = _checks.at_least_float32(x_t)
  slope = jax.lax.stop_gradient(_checks.at_least_float32(slope))
  slope = slope.astype(wide_x.dtype)
  rate = jnp.cos(angle) * jnp.sin(angle)

  def net(x_hat, angle):
    return _call(fn, "network_fn(x, angle)", network_fn, x_hat, angle)

  def scaled(x):
    return (x / sigma_data).astype(x_t.dtype)

  def rotated(turn):
    # Exact on a TrigFlow path with constant x0 and noise.
    turn = _wide(turn, wide_x)
    return scaled(jnp.cos(turn) * wide_x + jnp.sin(turn) * slope)

  x_hat = scaled(wide_x)
  if kind == "exact":
    # cos sin on both tangents: dF/d(angle) alone grows without bound where
    # sin or cos vanish for networks that read sigma = tan(angle).
    f, change = jax.jvp(
        net,
        (x_hat, angle),
        (scaled(_wide(rate, wide_x) * slope), rate),
    )
    return f, jax.lax.stop_gradient(change)

  f = net(x_hat, angle)
  if kind == "central":
    step = 1e-3 if step is None else step
    end = np.pi / 2 - 1e-5
    turn = jnp.maximum(step * angle, 1e-6)
    high, low = jnp.minimum(angle + turn, end), angle - turn
    change = net(rotated(high - angle), high) - net(rotated(low - angle), low)
    factor = rate / (2 * turn)
  else:
    step = 1e-4 if step is None else step
    turn = jnp.full_like(angle, step)
    before = rotated(-turn) if kind == "backward" else x_hat
    change = _wide(jnp.cos(turn), f) * f - net(before, angle - turn)
    factor = rate / jnp.sin(turn)
  change = _wide(factor, f) * change.astype(f.dtype)
  if kind == "semi":
    # The x part exactly, the time part by the difference.
    moved = jax.jvp(
        lambda x: net(x, angle),
        (x_hat,),
        (scaled(_wide(rate, wide_x) * slope),),
    )[1]
    change = change + moved.astype(f.dtype)
  return f, jax.lax.stop_gradient(change)


def trigflow_derivative(
    network_fn: DenoiseFn,
    x_t: Float[Array, "b *s"],
    slope: Float[Array, "b *s"],
    angle: Float[Array, "b"],
    *,
    sigma_data: float = 0.5,
    derivative: TrigDerivative = "exact",
    step: float | None = None,
) -> tuple[Float[Array, "b *s"], Float[Array, "b *s"]]:
  """A TrigFlow network and J = cos sin dF/d(angle) along its path.

  "exact" is one JVP of (x_t / sigma_data, angle) with both tangents multiplied
  by cos sin. Difference quotients for networks without a JVP, with the path
  continued by a rotation:
    "central": (F(+) - F(-)) / 2 turn, turn = max(step angle, 1e-6), step 1e-3.
    "backward": (cos(h) F - F(-h)) / sin(h), h = step, 1e-4 (rCM's second).
    "semi": JVP in x, and that quotient at fixed x for the angle (rCM's first).

  Args:
    network_fn: (x_t / sigma_data, angle) -> F; sigma_data F is dx/d(angle).
    x_t: TrigFlow states. Shape [b, *s].
    slope: dx/d(angle) of the path. Frozen. Shape [b, *s].
    angle: radians, in [0, pi/2]. Shape [b].
    sigma_data: standard deviation of data and noise.
    derivative: as above.
    step: of the quotient; use >= 1e-2 with bfloat16 networks.

  Returns:
    (F, J), both [b, *s], at least float32; gradients flow through F only.

  Raises:
    ValueError: shapes that do not agree, an empty batch, an unknown option; in
      debug mode also angles outside [0, pi/2] and non-finite rows.

  Example:
    >>> import jax.numpy as jnp
    >>> x, angle = jnp.ones((1, 1)), jnp.array([0.0])
    >>> _, j = trigflow_derivative(lambda x, angle: x, x, x, angle)
    >>> j.tolist()  # sin(0) = 0
    [[0.0]]

  References:
    Lu and Song, Simplifying, Stabilizing and Scaling Continuous-Time
    Consistency Models, 2024, arXiv:2410.11081, section 4 (rearranged JVP).
  """
  fn = "trigflow_derivative"
  _check_trig(fn, x_t, slope, angle, sigma_data, derivative, step)
  angle = _checks.at_least_float32(angle)
  return _trig_derivative(
      fn, network_fn, x_t, slope, angle, sigma_data, derivative, step
  )


def _check_trig(fn, x_t, slope, angle, sigma_data, derivative, step):
  _check_state(fn, "x_t", x_t, slope=slope)
  _check_angle(fn, "x_t", x_t, angle)
  _checks.in_range(fn, "sigma_data", sigma_data, 0.0, None, open_low=True)
  _checks.one_of(fn, "derivative", derivative, _TRIG_DERIVATIVES)
  _checks.in_range(fn, "step", step, 0.0, None, open_low=True)


def trigflow_tangent(
    network_fn: DenoiseFn,
    x_t: Float[Array, "b *s"],
    slope: Float[Array, "b *s"],
    angle: Float[Array, "b"],
    *,
    warmup: Float[Array, ""] | float = 1.0,
    sigma_data: float = 0.5,
    derivative: TrigDerivative = "exact",
    step: float | None = None,
) -> tuple[Float[Array, "b *s"], Float[Array, "b *s"]]:
  """sCM's tangent: cos(angle) df/d(angle), f = cos x_t - sin sigma_data F.

  g = -cos^2 (sigma_data F - slope) - r (cos sin x_t + sigma_data J), all of it
  stop-gradient, J = cos sin dF/d(angle), r the warm-up, which multiplies both
  unstable terms (`rcm_tangent` differs). At r = 1 it is the derivative of the
  consistency function along the path, times cos: zero on the exact map. With a
  trajectory's stored states and velocities as (x_t, slope) this is TBCM.

  Args:
    network_fn: (x_t / sigma_data, angle) -> F.
    x_t: TrigFlow states, cos x0 + sin z, z of std sigma_data. Shape [b, *s].
    slope: dx/d(angle): cos z - sin x0 (training), or a teacher's sigma_data F,
      guided or not (distillation). Frozen. Shape [b, *s].
    angle: radians, in [0, pi/2]. Shape [b].
    warmup: r, in [0, 1]; see `tangent_warmup`.
    sigma_data: standard deviation of data and noise.
    derivative: how J is taken; see `trigflow_derivative`.
    step: of a difference quotient.

  Returns:
    (F, g), both [b, *s], at least float32; gradients flow through F only.
    Next: `normalize_tangent`, then `scm_loss`.

  Raises:
    ValueError: shapes that do not agree, an empty batch, an unknown option,
      warmup outside [0, 1]; in debug mode also angles outside [0, pi/2] and
      non-finite rows.

  Example:
    >>> import jax.numpy as jnp
    >>> x, angle = jnp.ones((1, 1)), jnp.array([0.0])
    >>> _, g = trigflow_tangent(lambda x, angle: x, x, 3.0 * x, angle)
    >>> g.tolist()  # -(0.5 * 2 - 3)
    [[2.0]]

  References:
    Lu and Song, 2024, arXiv:2410.11081, eq. 6 and algorithm 1 (official code
    is not public: three public implementations agree on this form).
  """
  fn = "trigflow_tangent"
  _check_trig(fn, x_t, slope, angle, sigma_data, derivative, step)
  _checks.in_range(fn, "warmup", warmup, 0.0, 1.0)
  angle = _checks.at_least_float32(angle)
  f, j = _trig_derivative(
      fn, network_fn, x_t, slope, angle, sigma_data, derivative, step
  )
  x = _checks.at_least_float32(x_t).astype(f.dtype)
  slope = _checks.at_least_float32(slope).astype(f.dtype)
  cos, sin = _wide(jnp.cos(angle), f), _wide(jnp.sin(angle), f)
  warmup = jnp.asarray(warmup, f.dtype)
  g = -jnp.square(cos) * (sigma_data * f - slope)
  g = g - warmup * (cos * sin * x + sigma_data * j)
  return f, jax.lax.stop_gradient(g)


def rcm_tangent(
    network_fn: DenoiseFn,
    x_t: Float[Array, "b *s"],
    teacher: Float[Array, "b *s"],
    angle: Float[Array, "b"],
    *,
    warmup: Float[Array, ""] | float = 1.0,
    derivative: TrigDerivative = "exact",
    step: float | None = None,
) -> tuple[Float[Array, "b *s"], Float[Array, "b *s"]]:
  """rCM's tangent: sCM's with another warm-up rule, sigma_data = 1.

  g = -cos sqrt(1 - r^2 sin^2) (F - F_teacher) - (r cos sin x_t + J), all of it
  stop-gradient. Its warm-up r is its own: J is not multiplied by r, and the
  first factor goes from cos at r = 0 to cos^2 at r = 1, where both tangents
  agree.

  Args:
    network_fn: (x_t, angle) -> F, which is dx/d(angle).
    x_t: TrigFlow states. Shape [b, *s].
    teacher: the teacher's F at x_t, guided or not. Frozen. Shape [b, *s].
    angle: radians, in [0, pi/2]. Shape [b].
    warmup: r, in [0, 1].
    derivative: how J is taken; see `trigflow_derivative`.
    step: of a difference quotient.

  Returns:
    (F, g), both [b, *s], at least float32; gradients flow through F only.
    Next: `normalize_tangent(norm="l2")` (official), then `rcm_loss`.

  Raises:
    ValueError: as `trigflow_tangent`.

  Example:
    >>> import jax.numpy as jnp
    >>> x, angle = jnp.ones((1, 1)), jnp.array([0.0])
    >>> _, g = rcm_tangent(lambda x, angle: x, x, 3.0 * x, angle)
    >>> g.tolist()  # -(1 - 3)
    [[2.0]]

  References:
    rCM, 2025, arXiv:2510.08431, from its official code. Departure: rows that
    went non-finite are not zeroed in silence.
  """
  fn = "rcm_tangent"
  _check_state(fn, "x_t", x_t, teacher=teacher)
  _check_trig(fn, x_t, teacher, angle, 1.0, derivative, step)
  _checks.in_range(fn, "warmup", warmup, 0.0, 1.0)
  angle = _checks.at_least_float32(angle)
  f, j = _trig_derivative(
      fn, network_fn, x_t, teacher, angle, 1.0, derivative, step
  )
  x = _checks.at_least_float32(x_t).astype(f.dtype)
  teacher = _checks.at_least_float32(teacher).astype(f.dtype)
  cos, sin = _wide(jnp.cos(angle), f), _wide(jnp.sin(angle), f)
  warmup = jnp.asarray(warmup, f.dtype)
  factor = cos * jnp.sqrt(1 - jnp.square(warmup * sin))
  g = -factor * (f - teacher) - (warmup * cos * sin * x + j)
  return f, jax.lax.stop_gradient(g)


def normalize_tangent(
    tangent: Float[Array, "b *s"],
    *,
    c: float = 0.1,
    norm: Literal["rms", "l2"] = "rms",
) -> Float[Array, "b *s"]:
  """Brings every row's tangent to length about one: g / (norm(g) + c).

  Args:
    tangent: g. Shape [b, *s].
    c: added to the norm, > 0. Official 0.1, whichever the norm: beside "rms" it
      stands against the size of an element, beside "l2" against a length that
      grows with the square root of the number of elements.
    norm: "rms" divides by the root mean square of a row (dimension-invariant);
      "l2" by its length (the paper's formula, rCM and TBCM). They differ by the
      square root of the number of elements.

  Returns:
    The normalised tangent, shape [b, *s], at least float32, no gradient.

  Raises:
    ValueError: an empty batch, c not positive, an unknown norm; in debug mode
      also non-finite rows.

  Example:
    >>> import jax.numpy as jnp
    >>> normalize_tangent(
    ...     jnp.array([[3.0, 4.0]]), c=5.0, norm="l2").tolist()
    [[0.30000001192092896, 0.4000000059604645]]

  References:
    Lu and Song, 2024, arXiv:2410.11081, section 4.1.
  """
  fn = "normalize_tangent"
  _check_state(fn, "tangent", tangent)
  _checks.in_range(fn, "c", c, 0.0, None, open_low=True)
  _checks.one_of(fn, "norm", norm, ("rms", "l2"))
  g = jax.lax.stop_gradient(_checks.at_least_float32(tangent))
  squares = _reduce(jnp.square(g), "mean" if norm == "rms" else "sum")
  return g / (_wide(jnp.sqrt(squares), g) + c)


def scm_loss(
    prediction: Float[Array, "b *s"],
    tangent: Float[Array, "b *s"],
    angle: Float[Array, "b"],
    *,
    logvar: Float[Array, "b"] | None = None,
    weight: Float[Array, "b"] | None = None,
    sigma_data: float = 0.5,
    divide_again: bool = False,
) -> Float[Array, "b"]:
  """sCM's loss with its learned weighting.

  loss = w / exp(u) mean (F - stop_gradient(F) - g)^2 + u, over the elements of
  a row. Its value is that of g alone, its gradient -2 w / exp(u) g dF / D: F
  moves along g. With the learned log variance u every angle counts alike at the
  optimum, and the loss can be negative.

  Args:
    prediction: F, with gradient. Shape [b, *s].
    tangent: g, normalised. Frozen. Shape [b, *s].
    angle: radians, in (0, pi/2]. Shape [b].
    logvar: u, with gradient; None: 0. Shape [b].
    weight: prior weight w; None: 1 / (sigma_data tan(angle)), which is 1 over
      EDM's sigma. Shape [b].
    sigma_data: standard deviation of data and noise.
    divide_again: divide by the number of elements once more, as one public
      implementation does by default.

  Returns:
    The loss, shape [b], at least float32, unreduced.

  Raises:
    ValueError: shapes that do not agree, an empty batch; in debug mode also
      angles outside [0, pi/2] and non-finite rows.

  Example:
    >>> import jax.numpy as jnp
    >>> one = jnp.ones((1, 4))
    >>> scm_loss(one, 2.0 * one, jnp.array([1.0]), weight=jnp.ones(1)).tolist()
    [4.0]

  References:
    Lu and Song, 2024, arXiv:2410.11081, eq. 8 and algorithm 1. Departure: the
    mean over elements where the paper writes a sum divided by D (equal).
  """
  fn = "scm_loss"
  _check_state(fn, "prediction", prediction, tangent=tangent)
  _check_angle(fn, "prediction", prediction, angle)
  _checks.per_row(
      fn, "prediction", prediction, logvar=logvar, weight=weight
  )
  _checks.floating(fn, logvar=logvar, weight=weight)
  _checks.in_range(fn, "sigma_data", sigma_data, 0.0, None, open_low=True)
  loss = _move_along(prediction, tangent, "mean")
  if weight is None:
    angle = _checks.at_least_float32(angle)
    weight = jnp.cos(angle) / (sigma_data * jnp.sin(angle))
  weight = jax.lax.stop_gradient(_checks.at_least_float32(weight))
  loss = loss * weight.astype(loss.dtype)
  if divide_again:
    loss = loss / float(np.prod(jnp.shape(prediction)[1:]))
  if logvar is None:
    return loss
  logvar = _checks.at_least_float32(logvar).astype(loss.dtype)
  return loss / jnp.exp(logvar) + logvar


def _move_along(prediction: Array, tangent: Array, elements: str) -> Array:
  """(F - sg(F) - g)^2 over the elements of a row."""
  f = _checks.at_least_float32(prediction)
  g = jax.lax.stop_gradient(_checks.at_least_float32(tangent)).astype(f.dtype)
  return _reduce(jnp.square(f - jax.lax.stop_gradient(f) - g), elements)


def rcm_loss(
    prediction: Float[Array, "b *s"],
    tangent: Float[Array, "b *s"],
    *,
    scale: float = 1.0,
    elements: Literal["mean", "sum"] = "mean",
) -> Float[Array, "b"]:
  """rCM's forward-divergence term: scale (F - stop_gradient(F) - g)^2.

  No prior weight and no learned one. Official: elements "sum" with the tangent
  normalised to l2 length one and scale 100, beside a DMD term of scale 1 whose
  gradient has root mean square one: the balance of the two changes with the
  number of elements. Means and "rms" tangents do not.

  Args:
    prediction: F, with gradient. Shape [b, *s].
    tangent: g, normalised. Frozen. Shape [b, *s].
    scale: factor of the loss.
    elements: mean or sum over the elements of a row.

  Returns:
    The loss, shape [b], at least float32, unreduced.

  Raises:
    ValueError: shapes that do not agree, an empty batch, an unknown `elements`;
      in debug mode also non-finite rows.

  Example:
    >>> import jax.numpy as jnp
    >>> one = jnp.ones((1, 4))
    >>> rcm_loss(one, 2.0 * one, scale=10.0).tolist()
    [40.0]

  References:
    rCM, 2025, arXiv:2510.08431, from its official code.
  """
  fn = "rcm_loss"
  _check_state(fn, "prediction", prediction, tangent=tangent)
  _checks.one_of(fn, "elements", elements, _ELEMENTS)
  return scale * _move_along(prediction, tangent, elements)


def trajectory_keep_probability(
    x0: Float[Array, "b *s"],
    reference: Float[Array, "*r"],
    *,
    threshold: float = 1.0,
) -> Float[Array, "b"]:
  """TBCM's filter of failed teacher roll-outs: how likely a row is kept.

  min(m / threshold, 1) with m the mean squared distance of the roll-out's end
  from a reference that failures look like (the latent of a black image).

  Args:
    x0: ends of the roll-outs, in units of sigma_data. Shape [b, *s].
    reference: the failure. Shape [*s] or [b, *s].
    threshold: distance from which every row is kept, > 0.

  Returns:
    Probabilities, shape [b], at least float32, no gradient. Drop row i where
    a uniform draw is above the i-th.

  Raises:
    ValueError: shapes that do not agree, an empty batch, threshold not
      positive; in debug mode also non-finite rows.

  Example:
    >>> import jax.numpy as jnp
    >>> trajectory_keep_probability(
    ...     jnp.array([[0.5, 0.5], [2.0, 0.0]]), jnp.zeros(2)).tolist()
    [0.25, 1.0]

  References:
    TBCM, 2025, arXiv:2511.20410, from its official code.
  """
  fn = "trajectory_keep_probability"
  _check_state(fn, "x0", x0)
  _checks.in_range(fn, "threshold", threshold, 0.0, None, open_low=True)
  if jnp.ndim(reference) < jnp.ndim(x0):
    _checks.shape(fn, "reference", reference, x0.shape[1:], "[*s]", "x0")
    reference = jnp.broadcast_to(reference, x0.shape)
  distance = squared_distance(x0, reference)
  keep = jnp.minimum(distance / threshold, jnp.ones_like(distance))
  return jax.lax.stop_gradient(keep)


def multistep_consistency_loss(
    denoise_fn: DenoiseFn,
    target_fn: DenoiseFn,
    x_t: Float[Array, "b *s"],
    t: Float[Array, "b"],
    x_s: Float[Array, "b *s"],
    s: Float[Array, "b"],
    end: Float[Array, "b"],
    *,
    coefficients: Callable[[Array], tuple[Array, Array]],
    space: Literal["x0", "x"] = "x0",
    metric: Metric = squared_distance,
) -> Float[Array, "b"]:
  """Multistep consistency: agree at the end of a segment of the path.

  A DDIM step with x0 estimate X from a to b is
  (alpha_b - q alpha_a) X + q x_a, q = sigma_b / sigma_a. The target is the step
  from (x_s, s) with target_fn's estimate to `end`; where s = end it is x_s. The
  student at (x_t, t) should land there:
    "x": metric(its own DDIM step to `end`, target): vanishing gradient for
      short segments, since alpha_end - q alpha_t does.
    "x0": the target is turned into the estimate x* that leads there in one
      step from (x_t, t), and metric(denoise_fn(x_t, t), x*) is trained: no
      vanishing factor, but a division by it; keep t a grid step above `end`.
  One segment with end = 0 is (latent) consistency distillation.

  Args:
    denoise_fn: (x, t) -> x0 estimate of the student.
    target_fn: (x, s) -> x0 estimate of the target network. Frozen.
    x_t: points at t. Shape [b, *s].
    t: upper times, in the variable that the closures take. Shape [b].
    x_s: where the teacher's step from x_t lands. Frozen. Shape [b, *s].
    s: lower times, end <= s <= t. Shape [b].
    end: ends of the segments, < t. Shape [b].
    coefficients: t -> (alpha, sigma), each [b], such as
      `lambda t: (path.alpha(t), path.sigma(t))`.
    space: where the distance is measured.
    metric: (a, b) -> [b].

  Returns:
    The loss, shape [b], at least float32, unreduced. Minimum 0.

  Raises:
    ValueError: shapes that do not agree, an empty batch, an unknown space; in
      debug mode also times out of order and non-finite rows.

  Example:
    >>> import jax.numpy as jnp
    >>> one, at = jnp.ones((1, 1)), lambda t: jnp.array([t])
    >>> loss = multistep_consistency_loss(
    ...     lambda x, t: 2.0 * x, lambda x, t: x, one, at(1.0), one, at(0.5),
    ...     at(0.0), coefficients=lambda t: (1 - t, t))
    >>> loss.tolist()
    [1.0]

  References:
    Heek et al., Multistep Consistency Models, 2024, arXiv:2403.06807; MLCM,
    2024, arXiv:2406.05768. MLCM's training code is not public: this is a
    reconstruction from its abstract and the formulation it cites.
  """
  fn = "multistep_consistency_loss"
  _check_state(fn, "x_t", x_t, x_s=x_s)
  _checks.per_row(fn, "x_t", x_t, t=t, s=s, end=end)
  _checks.floating(fn, t=t, s=s, end=end)
  _checks.not_above(fn, "s", s, "t", t)
  _checks.not_above(fn, "end", end, "s", s)
  _checks.one_of(fn, "space", space, ("x0", "x"))
  t, s, end = (_checks.at_least_float32(a) for a in (t, s, end))
  alpha_end, sigma_end = coefficients(end)

  def to_end(time):
    """The factors of x0 and x in the DDIM step from `time` to the end."""
    alpha, sigma = coefficients(time)
    # At time = end = 0 both are noiseless and the step is the identity.
    noisy = sigma > 0
    safe = jnp.where(noisy, sigma, jnp.ones_like(sigma))
    q = jnp.where(noisy, sigma_end / safe, jnp.ones_like(sigma))
    return alpha_end - q * alpha, q

  prediction = _call(fn, "denoise_fn(x, t)", denoise_fn, x_t, t)
  of_x0, of_x = (_wide(c, prediction) for c in to_end(s))
  low = _checks.at_least_float32(x_s).astype(prediction.dtype)
  estimate = _call(fn, "target_fn(x, s)", target_fn, x_s, s)
  target = of_x0 * estimate.astype(prediction.dtype) + of_x * low
  of_x0, of_x = (_wide(c, prediction) for c in to_end(t))
  high = _checks.at_least_float32(x_t).astype(prediction.dtype)
  if space == "x":
    prediction = of_x0 * prediction + of_x * high
  else:
    target = (target - of_x * high) / of_x0
  return metric(prediction, jax.lax.stop_gradient(target))
