"""Noise paths x_t = alpha(t) x0 + sigma(t) noise, and what a network predicts.

Time runs from t=0 (data) to t=1 (noise) on every path; `noise` has unit
variance. A path is a frozen dataclass of plain numbers: it can be closed over
in a jitted function, passed to one, or used as a static argument.

Every prediction a network may make is a fixed linear combination of x0 and
noise, so `convert` solves two equations in two unknowns:

  x0        = x0
  epsilon   = noise
  score     = -noise / sigma
  velocity  = alpha' x0 + sigma' noise      (d x_t / dt)
  v         = alpha noise - sigma x0
  F         = cos(angle) noise - sin(angle) x0 / sigma_data   (TrigFlow only:
              its velocity d x_t / d angle, divided by sigma_data)
"""

import abc
import dataclasses
import functools
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import _checks
from distilljax.typing import Array, Float, Number

PREDICTIONS = ("x0", "epsilon", "score", "velocity", "v")


class Coefficients(NamedTuple):
  """A path at given times: four arrays of one shape, [b] or [].

  The derivatives are with respect to the path's time, unless a method that
  names another variable (`EDM.at_sigma`, `TrigFlow.at_angle`) made them.
  """

  alpha: Array
  sigma: Array
  alpha_prime: Array
  sigma_prime: Array


def _as_time(fn: str, name: str, t) -> Array:
  """A time as an array of at least float32, checked to be floating."""
  if isinstance(t, (int, float)):
    t = jnp.asarray(t, jnp.result_type(float))
  _checks.floating(fn, **{name: t})
  return _checks.at_least_float32(t)


def _together(fn: str, t, **arrays):
  """Arrays and per-row t in their common dtype, t shaped to broadcast."""
  _checks.floating(fn, **arrays)
  _checks.nonempty(fn, **arrays)
  _checks.same_shape(fn, **arrays)
  shape = jnp.shape(next(iter(arrays.values())))
  n = jnp.ndim(t[0] if isinstance(t, tuple) else t)
  for part in t if isinstance(t, tuple) else (t,):
    _checks.shape(fn, "t", part, shape[:n], "[b]", next(iter(arrays)))
  values = [_checks.at_least_float32(a) for a in arrays.values()]
  times = [_checks.at_least_float32(s) for s in jax.tree.leaves(t)]
  # NumPy decides: under strict promotion JAX refuses to.
  dtype = functools.reduce(
      np.promote_types, (a.dtype for a in (*values, *times))
  )
  values = [a.astype(dtype) for a in values]
  times = [_checks.expand_like(s.astype(dtype), values[0]) for s in times]
  return values, times


def _definition(
    name: str, c: Coefficients, sigma_data: float | None
) -> tuple[Array, Array]:
  """(of x0, of noise): the combination that `name` is; not for score."""
  zero, one = jnp.zeros_like(c.alpha), jnp.ones_like(c.alpha)
  if name == "x0":
    return one, zero
  if name == "epsilon":
    return zero, one
  if name == "velocity":
    return c.alpha_prime, c.sigma_prime
  if name == "v":
    return -c.sigma, c.alpha
  # F: sigma = sigma_data sin(angle).
  return -c.sigma / sigma_data**2, c.alpha


def conversion_weights(
    coefficients: Coefficients,
    *,
    source: str,
    target: str,
    sigma_data: float | None = None,
) -> tuple[Array, Array]:
  """(of x_t, of the prediction): the target as a combination of the two.

  With source = a x0 + b noise, target = c x0 + d noise and
  D = alpha b - sigma a, the weights are (c b - d a) / D and
  (d alpha - c sigma) / D. D is a sum of terms of one sign on every path here,
  so nothing cancels in it; it is 0 where a conversion is singular.

  Args:
    coefficients: the path at the times wanted. Each of shape [b] or [].
    source: what is known, one of `PREDICTIONS`, or "F" with `sigma_data`.
    target: what is wanted, likewise.
    sigma_data: TrigFlow's data deviation, which defines F.

  Returns:
    Two arrays of the coefficients' shape.

  Raises:
    ValueError: unknown source or target.
  """
  fn = "conversion_weights"
  known = PREDICTIONS + (("F",) if sigma_data is not None else ())
  _checks.one_of(fn, "source", source, known)
  _checks.one_of(fn, "target", target, known)
  c = coefficients
  zero, one = jnp.zeros_like(c.alpha), jnp.ones_like(c.alpha)
  if source == target:
    return zero, one
  # score and epsilon differ by the factor -sigma, also where alpha = 0.
  before, after = one, one
  if source == "score":
    before, source = -c.sigma, "epsilon"
  if target == "score":
    after, target = -1 / c.sigma, "epsilon"
  if source == target:
    return zero, before * after
  a, b = _definition(source, c, sigma_data)
  u, w = _definition(target, c, sigma_data)
  determinant = c.alpha * b - c.sigma * a
  of_x = (u * b - w * a) / determinant
  of_prediction = (w * c.alpha - u * c.sigma) / determinant
  return after * of_x, after * of_prediction * before


def convert_prediction(
    prediction: Float[Array, "*s"],
    x_t: Float[Array, "*s"],
    coefficients: Coefficients,
    *,
    source: str,
    target: str,
    sigma_data: float | None = None,
) -> Float[Array, "*s"]:
  """What `target` is, given a prediction of `source` at x_t.

  The form for coefficients that do not come from a path's own time (an EDM
  network that is called with sigma, a TrigFlow one with its angle); nothing is
  clamped here.

  Args:
    prediction: the network's output. Shape [b, *s].
    x_t: the point at which it was made. Shape [b, *s].
    coefficients: the path there. Each [b] or [].
    source: what `prediction` is, one of `PREDICTIONS`, or "F".
    target: what is wanted, likewise.
    sigma_data: TrigFlow's data deviation, needed for "F".

  Returns:
    The target, shape [b, *s], at least float32.

  Raises:
    ValueError: unknown source or target, shapes that differ, empty batch.
  """
  (prediction, x_t), parts = _together(
      "convert_prediction",
      tuple(coefficients),
      prediction=prediction,
      x_t=x_t,
  )
  of_x, of_prediction = conversion_weights(
      Coefficients(*parts), source=source, target=target, sigma_data=sigma_data
  )
  if source == target:
    return prediction
  return of_x * x_t + of_prediction * prediction


@dataclasses.dataclass(frozen=True)
class NoisePath(abc.ABC):
  """A noise path; see the module's docstring for the conventions.

  Attributes:
    end_clamp: how far `convert` keeps t from an end at which the conversion
      asked for divides by zero (for no other conversion, and never from the
      result). The ends where each path is singular are the class attributes
      `alpha_ends` (alpha(1) = 0: from epsilon or score to anything else),
      `sigma_starts` (sigma(0) = 0: from x0 to anything else, and to score) and
      `velocity_starts` (sigma'(0) infinite: from and to velocity).
  """

  end_clamp: Number = dataclasses.field(default=1e-4, kw_only=True)

  alpha_ends: ClassVar[bool] = True
  sigma_starts: ClassVar[bool] = True
  velocity_starts: ClassVar[bool] = False
  predictions: ClassVar[tuple[str, ...]] = PREDICTIONS

  def __init_subclass__(cls, **kwargs):
    super().__init_subclass__(**kwargs)
    jax.tree_util.register_static(cls)

  def __post_init__(self):
    _checks.in_range(
        type(self).__name__, "end_clamp", self.end_clamp, 0, 0.5,
        open_low=True, open_high=True,
    )

  @abc.abstractmethod
  def _coefficients(self, t: Array) -> Coefficients:
    """The four coefficients at t, an array of at least float32."""

  @abc.abstractmethod
  def _t_from_log_snr(self, log_snr: Array) -> Array:
    """The inverse of `log_snr`."""

  def _sigma_data(self) -> float | None:
    return None

  def _time(self, fn: str, t) -> Array:
    fn = f"{type(self).__name__}.{fn}"
    _checks.in_range(fn, "t", t, 0, 1)
    return _as_time(fn, "t", t)

  def coefficients(self, t: Float[Array, "*b"] | Number) -> Coefficients:
    """(alpha, sigma, alpha', sigma') at t in [0, 1]; each of t's shape."""
    return self._coefficients(self._time("coefficients", t))

  def alpha(self, t: Float[Array, "*b"] | Number) -> Float[Array, "*b"]:
    """The factor of the data at t in [0, 1]."""
    return self._coefficients(self._time("alpha", t)).alpha

  def sigma(self, t: Float[Array, "*b"] | Number) -> Float[Array, "*b"]:
    """The factor of the unit noise at t in [0, 1]."""
    return self._coefficients(self._time("sigma", t)).sigma

  def alpha_prime(self, t: Float[Array, "*b"] | Number) -> Float[Array, "*b"]:
    """d alpha / dt."""
    return self._coefficients(self._time("alpha_prime", t)).alpha_prime

  def sigma_prime(self, t: Float[Array, "*b"] | Number) -> Float[Array, "*b"]:
    """d sigma / dt."""
    return self._coefficients(self._time("sigma_prime", t)).sigma_prime

  def log_snr(self, t: Float[Array, "*b"] | Number) -> Float[Array, "*b"]:
    """log(alpha^2 / sigma^2), decreasing in t; infinite where one is 0."""
    c = self._coefficients(self._time("log_snr", t))
    return 2 * (jnp.log(c.alpha) - jnp.log(c.sigma))

  def t_from_log_snr(
      self, log_snr: Float[Array, "*b"] | Number
  ) -> Float[Array, "*b"]:
    """The time with this log-SNR: how a network of another path is called."""
    fn = f"{type(self).__name__}.t_from_log_snr"
    return self._t_from_log_snr(_as_time(fn, "log_snr", log_snr))

  def add_noise(
      self,
      x0: Float[Array, "*s"],
      noise: Float[Array, "*s"],
      t: Float[Array, "*b"] | Number,
  ) -> Float[Array, "*s"]:
    """alpha(t) x0 + sigma(t) noise.

    Args:
      x0: data. Shape [b, *s].
      noise: unit noise. Shape [b, *s].
      t: times in [0, 1]. Shape [b] (or leading axes of x0, or one number).

    Returns:
      x_t, shape [b, *s], at least float32.

    Raises:
      ValueError: shapes that differ, an empty batch, t outside [0, 1].
    """
    c = self._coefficients(self._time("add_noise", t))
    fn = f"{type(self).__name__}.add_noise"
    (x0, noise), (alpha, sigma, _, _) = _together(
        fn, tuple(c), x0=x0, noise=noise
    )
    return alpha * x0 + sigma * noise

  def velocity(
      self,
      x0: Float[Array, "*s"],
      noise: Float[Array, "*s"],
      t: Float[Array, "*b"] | Number,
  ) -> Float[Array, "*s"]:
    """alpha'(t) x0 + sigma'(t) noise, the derivative of x_t; as `add_noise`."""
    c = self._coefficients(self._time("velocity", t))
    fn = f"{type(self).__name__}.velocity"
    (x0, noise), (_, _, alpha_prime, sigma_prime) = _together(
        fn, tuple(c), x0=x0, noise=noise
    )
    return alpha_prime * x0 + sigma_prime * noise

  def definition(
      self, t: Float[Array, "*b"] | Number, target: str
  ) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """(of x0, of noise): the combination that a prediction is.

    target = of_x0 x0 + of_noise noise: what a network trained on `target`
    regresses on. Unknown targets are a ValueError.
    """
    fn = f"{type(self).__name__}.definition"
    _checks.one_of(fn, "target", target, self.predictions)
    c = self._coefficients(self._time("definition", t))
    if target == "score":
      return jnp.zeros_like(c.sigma), -1 / c.sigma
    return _definition(target, c, self._sigma_data())

  def target(
      self,
      x0: Float[Array, "*s"],
      noise: Float[Array, "*s"],
      t: Float[Array, "*b"] | Number,
      kind: str,
  ) -> Float[Array, "*s"]:
    """What a network of prediction `kind` should give; as `add_noise`."""
    (x0, noise), (of_x0, of_noise) = _together(
        f"{type(self).__name__}.target", self.definition(t, kind),
        x0=x0, noise=noise,
    )
    return of_x0 * x0 + of_noise * noise

  def conversion_range(self, source: str, target: str) -> tuple[float, float]:
    """The times between which a conversion is not singular.

    (0, 1) for most pairs; an end moves inwards by `end_clamp` where the
    conversion divides by zero there. Outside it `convert` uses the nearest
    time inside; in debug mode, and for a number, that is an error instead.
    """
    fn = f"{type(self).__name__}.convert"
    _checks.one_of(fn, "source", source, self.predictions)
    _checks.one_of(fn, "target", target, self.predictions)
    low, high = 0.0, 1.0
    if source == target:
      return low, high
    noises = ("epsilon", "score")
    if self.alpha_ends and source in noises and target not in noises:
      high = 1 - self.end_clamp
    if self.sigma_starts and (source == "x0" or target == "score"):
      low = self.end_clamp
    if self.velocity_starts and "velocity" in (source, target):
      low = self.end_clamp
    return low, high

  def _converting(self, fn: str, t, source: str, target: str) -> Coefficients:
    low, high = self.conversion_range(source, target)
    name = f"{type(self).__name__}.{fn}"
    reason = "" if (low, high) == (0, 1) else (
        f" (the conversion {source} -> {target} is singular beyond it)"
    )
    _checks.holds(
        name, "t", t, lambda x: (x >= low) & (x <= high),
        f"in [{low:g}, {high:g}]{reason}",
    )
    return self._coefficients(jnp.clip(_as_time(name, "t", t), low, high))

  def convert(
      self,
      prediction: Float[Array, "*s"],
      x_t: Float[Array, "*s"],
      t: Float[Array, "*b"] | Number,
      source: str,
      target: str,
  ) -> Float[Array, "*s"]:
    """Turns a prediction of one kind into another.

    Solves prediction = a x0 + b noise, x_t = alpha x0 + sigma noise. t is kept
    inside `conversion_range(source, target)`; the result is never clamped. How
    much rounding grows is `conditioning(t, source, target)`.

    Args:
      prediction: the network's output at (x_t, t). Shape [b, *s].
      x_t: the noisy point. Shape [b, *s].
      t: times in [0, 1]. Shape [b] (or leading axes of x_t, or one number).
      source: what `prediction` is: one of "x0", "epsilon", "score",
        "velocity", "v"; on TrigFlow also "F".
      target: what is wanted, likewise.

    Returns:
      The target at x_t, shape [b, *s], at least float32.

    Raises:
      ValueError: an unknown prediction, shapes that differ, an empty batch; t
        outside the conversion's range (a number, or in debug mode).

    Example:
      >>> import jax.numpy as jnp
      >>> path = RectifiedFlow()
      >>> x_t, velocity = jnp.array([[0.5]]), jnp.array([[2.0]])
      >>> path.convert(velocity, x_t, jnp.array([0.25]), "velocity", "x0")
      Array([[0.]], dtype=float32)
    """
    c = self._converting("convert", t, source, target)
    return convert_prediction(
        prediction, x_t, c,
        source=source, target=target, sigma_data=self._sigma_data(),
    )

  def conditioning(
      self, t: Float[Array, "*b"] | Number, source: str, target: str
  ) -> Float[Array, "*b"]:
    """How much rounding grows when a pair of predictions is converted.

    With target = A x_t + B source (and back: source = (target - A x_t) / B),
    the number is max(1, |A| + |B|, |A| / |B| + 1 / |B|): the worse of the two
    directions. For entries of x_t and both predictions of size at most m, a
    conversion and its round trip are off by a few ulps of m times this. Where
    it is infinite the two predictions do not determine each other.

    The growth at the ends, by pair (in either order):
      x0, epsilon         1/alpha, 1/sigma
      x0, score           1/alpha, 1/sigma^2
      epsilon, score      sigma, 1/sigma
      x0, velocity        1/(sigma W), W = alpha sigma' - sigma alpha'
      epsilon, velocity   1/(alpha W)
      score, velocity     1/(alpha W), W/(alpha sigma)
      x0, v or F          1/sigma
      epsilon, v or F     1/alpha
      score, v or F       1/alpha, 1/sigma
      velocity, v or F    W, 1/W    (bounded on RectifiedFlow and TrigFlow)
      v, F                bounded

    Args:
      t: times in [0, 1], kept inside the pair's range in both directions.
      source: one of the path's predictions.
      target: another.

    Returns:
      Numbers >= 1 of t's shape.
    """
    low, high = self.conversion_range(source, target)
    low2, high2 = self.conversion_range(target, source)
    name = f"{type(self).__name__}.conditioning"
    _checks.in_range(name, "t", t, 0, 1)
    t = jnp.clip(
        _as_time(name, "t", t), max(low, low2), min(high, high2)
    )
    of_x, of_prediction = conversion_weights(
        self._coefficients(t),
        source=source, target=target, sigma_data=self._sigma_data(),
    )
    of_x, of_prediction = jnp.abs(of_x), jnp.abs(of_prediction)
    there = of_x + of_prediction
    back = (of_x + 1) / of_prediction
    return jnp.maximum(jnp.maximum(there, back), jnp.ones_like(there))


@dataclasses.dataclass(frozen=True)
class RectifiedFlow(NoisePath):
  """The straight path: alpha = 1 - t, sigma = t, velocity = noise - x0.

  References:
    Liu et al., Flow Straight and Fast, 2022, arXiv:2209.03003; Lipman et al.,
    Flow Matching, 2022, arXiv:2210.02747 (there with time reversed).
  """

  def _coefficients(self, t):
    one = jnp.ones_like(t)
    return Coefficients(1 - t, t, -one, one)

  def _t_from_log_snr(self, log_snr):
    return jax.nn.sigmoid(-log_snr / 2)


@dataclasses.dataclass(frozen=True)
class EDM(NoisePath):
  """Variance exploding, with Karras's warp as its time: alpha = 1.

  sigma(t) = (a + t (b - a))^rho, a = sigma_min^(1/rho), b = sigma_max^(1/rho).
  t=0 is sigma_min, not clean data. The velocity is d x / dt, i.e. sigma'(t)
  noise; with sigma itself as the variable (d x / d sigma = noise) take the
  coefficients of `at_sigma`, or give the ODE samplers sigmas for times.

  Attributes:
    sigma_min: noise level at t=0, > 0.
    sigma_max: noise level at t=1.
    rho: exponent of the warp, > 0.

  References:
    Karras et al., Elucidating the Design Space, 2022, arXiv:2206.00364, eq. 5.
  """

  sigma_min: Number = 0.002
  sigma_max: Number = 80.0
  rho: Number = 7.0

  alpha_ends: ClassVar[bool] = False
  sigma_starts: ClassVar[bool] = False

  def __post_init__(self):
    super().__post_init__()
    _checks.in_range("EDM", "sigma_min", self.sigma_min, 0, open_low=True)
    _checks.in_range(
        "EDM", "sigma_max", self.sigma_max, self.sigma_min, open_low=True
    )
    _checks.in_range("EDM", "rho", self.rho, 0, open_low=True)

  def _ends(self) -> tuple[float, float]:
    return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

  def _coefficients(self, t):
    low, high = self._ends()
    root = low + t * (high - low)
    sigma = root**self.rho
    return Coefficients(
        jnp.ones_like(t),
        sigma,
        jnp.zeros_like(t),
        self.rho * (high - low) * root ** (self.rho - 1),
    )

  def _t_from_log_snr(self, log_snr):
    return self.t_from_sigma(jnp.exp(-log_snr / 2))

  def t_from_sigma(
      self, sigma: Float[Array, "*b"] | Number
  ) -> Float[Array, "*b"]:
    """The time at which the noise level is `sigma`; the inverse of `sigma`."""
    _checks.in_range("EDM.t_from_sigma", "sigma", sigma, 0)
    sigma = _as_time("EDM.t_from_sigma", "sigma", sigma)
    low, high = self._ends()
    return (sigma ** (1 / self.rho) - low) / (high - low)

  def at_sigma(self, sigma: Float[Array, "*b"] | Number) -> Coefficients:
    """The path with sigma as the variable: alpha' = 0 and sigma' = 1."""
    _checks.in_range("EDM.at_sigma", "sigma", sigma, 0)
    sigma = _as_time("EDM.at_sigma", "sigma", sigma)
    one, zero = jnp.ones_like(sigma), jnp.zeros_like(sigma)
    return Coefficients(one, sigma, zero, one)


@dataclasses.dataclass(frozen=True)
class TrigFlow(NoisePath):
  """alpha = cos(angle), sigma = sigma_data sin(angle), angle = pi t / 2.

  The noise has unit variance, so x_t keeps the variance sigma_data^2 of the
  data. Papers write z = sigma_data noise. F, the network's output there, is
  (d x / d angle) / sigma_data = velocity / (sigma_data pi / 2).

  Attributes:
    sigma_data: standard deviation of the data, > 0.

  References:
    Lu and Song, Simplifying, Stabilizing and Scaling Continuous-Time
    Consistency Models, 2024, arXiv:2410.11081, section 3.
  """

  sigma_data: Number = 1.0

  predictions: ClassVar[tuple[str, ...]] = PREDICTIONS + ("F",)

  def __post_init__(self):
    super().__post_init__()
    _checks.in_range(
        "TrigFlow", "sigma_data", self.sigma_data, 0, open_low=True
    )

  def _sigma_data(self):
    return self.sigma_data

  def _coefficients(self, t):
    half_pi = math.pi / 2
    sine = jnp.sin(half_pi * t)
    # cos near t=1 as a sine of what is left, or alpha would lose its digits.
    cosine = jnp.sin(half_pi * (1 - t))
    return Coefficients(
        cosine,
        self.sigma_data * sine,
        -half_pi * sine,
        self.sigma_data * half_pi * cosine,
    )

  def _t_from_log_snr(self, log_snr):
    tangent = jnp.exp(-log_snr / 2) / self.sigma_data
    return jnp.arctan(tangent) / (math.pi / 2)

  def angle(self, t: Float[Array, "*b"] | Number) -> Float[Array, "*b"]:
    """pi t / 2, in [0, pi / 2]."""
    return self._time("angle", t) * (math.pi / 2)

  def t_from_angle(
      self, angle: Float[Array, "*b"] | Number
  ) -> Float[Array, "*b"]:
    """angle / (pi / 2)."""
    _checks.in_range("TrigFlow.t_from_angle", "angle", angle, 0, math.pi / 2)
    return _as_time("TrigFlow.t_from_angle", "angle", angle) / (math.pi / 2)

  def at_angle(self, angle: Float[Array, "*b"] | Number) -> Coefficients:
    """The path with the angle as the variable: derivatives d / d angle."""
    c = self._coefficients(self.t_from_angle(angle))
    factor = 2 / math.pi
    return Coefficients(
        c.alpha, c.sigma, factor * c.alpha_prime, factor * c.sigma_prime
    )


@dataclasses.dataclass(frozen=True)
class VariancePreserving(NoisePath):
  """alpha^2 + sigma^2 = 1: made by `linear`, `cosine` or `from_table`.

  * linear: beta(t) = beta_min + t (beta_max - beta_min),
    log alpha = -(beta_min t + (beta_max - beta_min) t^2 / 2) / 2;
  * cosine: alpha = cos(a(t)) / cos(a(0)),
    a(t) = pi/2 (t + offset) / (1 + offset);
  * table: entry i of n lies at t = i / (n - 1); arctan(sigma / alpha) is linear
    in t between entries, which keeps alpha^2 + sigma^2 = 1 exactly and admits
    alpha = 0 in the last one.

  sigma' is infinite at t=0 for linear and for cosine with an offset: there
  conversions from and to velocity are clamped too.

  References:
    Song et al., Score-Based Generative Modeling through SDEs, 2020,
    arXiv:2011.13456, eq. 33; Nichol and Dhariwal, Improved DDPM, 2021,
    arXiv:2102.09672, eq. 17.
  """

  kind: str = "linear"
  beta_min: Number = 0.1
  beta_max: Number = 20.0
  offset: Number = 0.0
  angles: tuple[float, ...] = ()

  def __post_init__(self):
    super().__post_init__()
    fn = "VariancePreserving"
    _checks.one_of(fn, "kind", self.kind, ("linear", "cosine", "table"))
    _checks.in_range(fn, "beta_min", self.beta_min, 0, open_low=True)
    _checks.in_range(fn, "beta_max", self.beta_max, self.beta_min)
    _checks.in_range(fn, "offset", self.offset, 0)
    if self.kind == "table" and len(self.angles) < 2:
      _checks.fail(fn, "angles", "2 or more entries", len(self.angles))

  @classmethod
  def linear(
      cls, beta_min: Number = 0.1, beta_max: Number = 20.0, **kwargs
  ) -> "VariancePreserving":
    """The continuous form of DDPM's linear schedule."""
    return cls(kind="linear", beta_min=beta_min, beta_max=beta_max, **kwargs)

  @classmethod
  def cosine(cls, offset: Number = 0.0, **kwargs) -> "VariancePreserving":
    """The cosine schedule; iDDPM's own has offset 0.008."""
    return cls(kind="cosine", offset=offset, **kwargs)

  @classmethod
  def from_table(cls, alphas_cumprod, **kwargs) -> "VariancePreserving":
    """A path through alpha^2 = alphas_cumprod[i], least noise first.

    Args:
      alphas_cumprod: numbers in [0, 1], strictly decreasing. Shape [n], n >= 2;
        concrete (host) values.
      **kwargs: further fields (`end_clamp`).

    Raises:
      ValueError: not such a table.
    """
    fn = "VariancePreserving.from_table"
    table = np.asarray(alphas_cumprod, np.float64)
    _checks.rank(fn, "alphas_cumprod", table, 1, "[n]")
    if len(table) < 2:
      _checks.fail(fn, "alphas_cumprod", "2 or more entries", len(table))
    if not ((table >= 0) & (table <= 1)).all():
      _checks.fail(
          fn, "alphas_cumprod", "in [0, 1]", f"{table.min()} to {table.max()}"
      )
    if not (np.diff(table) < 0).all():
      _checks.fail(
          fn, "alphas_cumprod", "strictly decreasing (least noise first)",
          f"{table[0]:g}, {table[1]:g}, ...",
      )
    angles = np.arctan2(np.sqrt(1 - table), np.sqrt(table))
    return cls(kind="table", angles=tuple(angles.tolist()), **kwargs)

  # Whether an end is singular depends on the kind, so these hide the class
  # attributes of the base.
  @property
  def alpha_ends(self) -> bool:
    """True where alpha(1) = 0."""
    if self.kind == "table":
      return self.angles[-1] >= math.pi / 2
    return self.kind == "cosine"

  @property
  def sigma_starts(self) -> bool:
    """True where sigma(0) = 0."""
    return self.kind != "table" or self.angles[0] == 0

  @property
  def velocity_starts(self) -> bool:
    """True where sigma'(0) is infinite."""
    return self.kind == "linear" or (self.kind == "cosine" and self.offset > 0)

  def _coefficients(self, t):
    if self.kind == "table":
      nodes = jnp.asarray(np.asarray(self.angles), t.dtype)
      n = len(self.angles) - 1
      index = jnp.clip(jnp.floor(t * n).astype(jnp.int32), 0, n - 1)
      left, right = nodes[index], nodes[index + 1]
      angle = left + (t * n - index.astype(t.dtype)) * (right - left)
      rate = (right - left) * n
      alpha, sigma = jnp.cos(angle), jnp.sin(angle)
      return Coefficients(alpha, sigma, -rate * sigma, rate * alpha)
    if self.kind == "linear":
      slope = self.beta_max - self.beta_min
      log_alpha = -(self.beta_min * t + slope * t**2 / 2) / 2
      alpha = jnp.exp(log_alpha)
      sigma = jnp.sqrt(-jnp.expm1(2 * log_alpha))
      rate = (self.beta_min + slope * t) / 2
      return Coefficients(
          alpha, sigma, -rate * alpha, rate * alpha * alpha / sigma
      )
    start = math.pi / 2 * self.offset / (1 + self.offset)
    rate = math.pi / 2 / (1 + self.offset)
    # The angle past its start, and what is left of it up to pi / 2: sines of
    # these keep their digits at the two ends.
    past, left = rate * t, rate * (1 - t)
    scale = math.cos(start)
    alpha, alpha_prime = jnp.sin(left) / scale, -rate * jnp.cos(left) / scale
    if self.offset == 0:
      return Coefficients(
          alpha, jnp.sin(past), alpha_prime, rate * jnp.cos(past)
      )
    sigma = jnp.sqrt(jnp.sin(past) * jnp.sin(past + 2 * start)) / scale
    return Coefficients(alpha, sigma, alpha_prime, -alpha * alpha_prime / sigma)

  def _t_from_log_snr(self, log_snr):
    if self.kind == "table":
      angle = jnp.arctan(jnp.exp(-log_snr / 2))
      nodes = jnp.asarray(np.asarray(self.angles), angle.dtype)
      times = jnp.linspace(0, 1, len(self.angles), dtype=angle.dtype)
      return jnp.interp(angle, nodes, times)
    if self.kind == "linear":
      # -2 log alpha = log(1 + exp(-log_snr)) = beta_min t + slope t^2 / 2.
      total = jax.nn.softplus(-log_snr)
      slope = self.beta_max - self.beta_min
      root = jnp.sqrt(self.beta_min**2 + 2 * slope * total)
      return 2 * total / (self.beta_min + root)
    start = math.pi / 2 * self.offset / (1 + self.offset)
    alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
    angle = jnp.arccos(jnp.clip(alpha * math.cos(start), 0, 1))
    return (angle - start) / (math.pi / 2 / (1 + self.offset))

  def t_from_index(self, index) -> Array:
    """The time of table entry `index` (integers in 0..n-1)."""
    if self.kind != "table":
      _checks.fail(
          "VariancePreserving.t_from_index", "kind", "'table'", repr(self.kind)
      )
    index = jnp.asarray(index)
    _checks.integer("VariancePreserving.t_from_index", index=index)
    n = len(self.angles) - 1
    return index.astype(jnp.result_type(float)) / n
