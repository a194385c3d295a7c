"""Gaussian mixtures: a diffusion problem whose every answer is known.

If x0 is drawn from sum_k w_k N(m_k, S_k) and x_t = alpha x0 + sigma noise, then
x_t is a mixture too, of N(alpha m_k, C_k) with C_k = alpha^2 S_k + sigma^2 I,
and with the posterior weights p_k of the components at x_t

  E[x0 | x_t]    = sum_k p_k (m_k + alpha S_k C_k^-1 (x_t - alpha m_k))
  E[noise | x_t] = sum_k p_k sigma C_k^-1 (x_t - alpha m_k) = -sigma score.

These are the best predictions any network can make, at every level of every
path: a loss that is right has its fixed point here, and a student that is
right reaches `probability_flow`.

  mixture = ring8()
  teacher = mixture.prediction_fn(path, "velocity")      # (x, t) -> velocity
  target = mixture.probability_flow(noise, 1.0, 0.0, path=path)
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import _checks
from distilljax.processes import path as path_lib
from distilljax.typing import Array, Float, Int, Key, Number


class GaussianMixture(NamedTuple):
  """A mixture of k Gaussians in d dimensions; samples may have any shape.

  Points are arrays [b, *s] with d values a row. Levels (alpha and sigma, or t)
  are one number or one a row. With `labels` (one a row) the mixture of every
  row is restricted to the components of that class.

  Attributes:
    means: m_k. Shape [k, d].
    scales: standard deviations along each component's own axes, >= 0; 0 makes a
      point mass, which has no density at sigma = 0. Shape [k, d].
    weights: probabilities, summing to 1. Shape [k].
    classes: the class of each component. Integers, shape [k].
    rotations: orthogonal matrices whose columns are the axes of a component
      (S_k = R_k diag(scales_k^2) R_k^T), or None: the coordinate axes. Shape
      [k, d, d].
  """

  means: Array
  scales: Array
  weights: Array
  classes: Array
  rotations: Array | None = None

  @property
  def dim(self) -> int:
    """d."""
    return self.means.shape[1]

  def _flat(self, fn: str, x) -> Array:
    """x as [b, d]."""
    fn = f"GaussianMixture.{fn}"
    _checks.floating(fn, x=x)
    _checks.min_rank(fn, "x", x, 1, "[b, *s]")
    size = int(np.prod(np.shape(x)[1:], dtype=int))
    if size != self.dim:
      _checks.fail(
          fn, "x", f"[b, *s] with {self.dim} values a row", list(np.shape(x))
      )
    x = _checks.at_least_float32(x)
    dtype = np.promote_types(x.dtype, self.means.dtype)
    return jnp.reshape(x.astype(dtype), (x.shape[0], size))

  def _levels(self, fn: str, x, **levels):
    """Levels as [b] or [] in x's dtype, checked."""
    out = []
    for name, level in levels.items():
      level = jnp.asarray(level, x.dtype)
      if level.ndim:
        _checks.per_row(f"GaussianMixture.{fn}", "x", x, **{name: level})
      out.append(level)
    return out

  def _labels(self, fn: str, labels) -> Array | None:
    """Labels as an array, checked."""
    if labels is None:
      return None
    fn = f"GaussianMixture.{fn}"
    labels = jnp.asarray(labels)
    _checks.integer(fn, labels=labels)
    _checks.holds(
        fn, "labels", labels,
        lambda y: jnp.any(
            y[..., None] == jnp.reshape(
                self.classes.astype(y.dtype), (1,) * y.ndim + (-1,)
            ),
            axis=-1,
        ),
        "classes of the mixture",
    )
    return labels

  def _log_weights(self, b: int, labels, dtype) -> Array:
    """[b, k] log weights, normalised within each row's class."""
    logits = jnp.broadcast_to(
        jnp.log(self.weights.astype(dtype))[None, :], (b, len(self.weights))
    )
    if labels is None:
      return logits
    labels = jnp.broadcast_to(labels, (b,))
    same = labels[:, None] == self.classes.astype(labels.dtype)[None, :]
    logits = jnp.where(same, logits, -jnp.inf)
    return jax.nn.log_softmax(logits, axis=1)

  def _rotate(self, y: Array, *, back: bool) -> Array:
    """[b, k, d] into the components' axes, or back."""
    if self.rotations is None:
      return y
    return jnp.einsum(
        "bki,kji->bkj" if back else "bki,kij->bkj",
        y, self.rotations.astype(y.dtype), precision="highest",
    )

  def _parts(self, x, alpha, sigma, labels):
    """Everything that the closed forms share, at flat x [b, d].

    Returns:
      (log joint density of row and component [b, k], C_k^-1 (x - alpha m_k) in
      the components' axes [b, k, d], alpha [b, 1, 1], sigma [b, 1, 1]).
    """
    alpha, sigma = (
        jnp.broadcast_to(a, x.shape[:1])[:, None, None] for a in (alpha, sigma)
    )
    difference = x[:, None, :] - alpha * self.means.astype(x.dtype)[None]
    difference = self._rotate(difference, back=False)
    variance = (
        jnp.square(alpha) * jnp.square(self.scales.astype(x.dtype))[None]
        + jnp.square(sigma)
    )
    whitened = difference / variance
    log_normal = -0.5 * jnp.sum(
        difference * whitened + jnp.log(2 * jnp.pi * variance), axis=2
    )
    logits = self._log_weights(x.shape[0], labels, x.dtype)
    return logits + log_normal, whitened, alpha, sigma

  def moments(
      self,
      x: Float[Array, "b *s"],
      alpha: Float[Array, "..."] | Number,
      sigma: Float[Array, "..."] | Number,
      *,
      labels: Int[Array, "..."] | int | None = None,
  ) -> tuple[Float[Array, "b *s"], Float[Array, "b *s"]]:
    """(E[x0 | x_t = x], E[noise | x_t = x]) at levels given as numbers.

    Args:
      x: noisy points. Shape [b, *s], d values a row.
      alpha: factor of the data. Shape [b] or [].
      sigma: factor of the unit noise. Shape [b] or [].
      labels: class of each row, or None for the whole mixture. Shape [b].

    Returns:
      Two arrays of x's shape, at least float32.
    """
    flat = self._flat("moments", x)
    levels = self._levels("moments", flat, alpha=alpha, sigma=sigma)
    x0, noise = _moments(self, flat, *levels, self._labels("moments", labels))
    return jnp.reshape(x0, x.shape), jnp.reshape(noise, x.shape)

  def score(
      self,
      x: Float[Array, "b *s"],
      alpha: Float[Array, "..."] | Number = 1.0,
      sigma: Float[Array, "..."] | Number = 0.0,
      *,
      labels: Int[Array, "..."] | int | None = None,
  ) -> Float[Array, "b *s"]:
    """Gradient of `log_prob` in x, at sigma = 0 too. As `moments`."""
    flat = self._flat("score", x)
    levels = self._levels("score", flat, alpha=alpha, sigma=sigma)
    score = _score(self, flat, *levels, self._labels("score", labels))
    return jnp.reshape(score, x.shape)

  def log_prob(
      self,
      x: Float[Array, "b *s"],
      alpha: Float[Array, "..."] | Number = 1.0,
      sigma: Float[Array, "..."] | Number = 0.0,
      *,
      labels: Int[Array, "..."] | int | None = None,
  ) -> Float[Array, "b"]:
    """Log-density of x_t in nats; of the data by default. As `moments`."""
    flat = self._flat("log_prob", x)
    levels = self._levels("log_prob", flat, alpha=alpha, sigma=sigma)
    labels = self._labels("log_prob", labels)
    return jax.nn.logsumexp(_log_joint(self, flat, *levels, labels), axis=1)

  def predict(
      self,
      x_t: Float[Array, "b *s"],
      t: Float[Array, "..."] | Number,
      *,
      path: path_lib.NoisePath,
      target: str = "x0",
      labels: Int[Array, "..."] | int | None = None,
      guidance: Float[Array, "..."] | Number | None = None,
  ) -> Float[Array, "b *s"]:
    """The best prediction of any kind at time t of a path.

    Made from both moments, so no end of a path is singular (but the score at
    sigma = 0 of a point mass, and the velocity where sigma' is infinite, where
    t is kept `path.end_clamp` away).

    Args:
      x_t: noisy points. Shape [b, *s], d values a row.
      t: times in [0, 1]. Shape [b] or [].
      path: the noise path.
      target: one of `path.predictions`.
      labels: class of each row, or None for the whole mixture. Shape [b].
      guidance: w of uncond + w (cond - uncond), or None for 1; needs labels.

    Returns:
      The prediction, of x_t's shape.
    """
    fn = "GaussianMixture.predict"
    _checks.one_of(fn, "target", target, path.predictions)
    _checks.in_range(fn, "t", t, 0, 1)
    if guidance is not None and labels is None:
      _checks.fail(fn, "labels", "given when guidance is", None)
    flat = self._flat("predict", x_t)
    rows = {"t": t} if guidance is None else {"t": t, "guidance": guidance}
    out = _predict(
        self,
        flat,
        *self._levels("predict", flat, **rows),
        labels=self._labels("predict", labels),
        path=path,
        target=target,
    )
    return jnp.reshape(out, x_t.shape)

  def prediction_fn(
      self,
      path: path_lib.NoisePath,
      target: str = "x0",
      *,
      labels: Int[Array, "..."] | int | None = None,
      guidance: Float[Array, "..."] | Number | None = None,
  ) -> Callable[[Array, Array], Array]:
    """`predict` as a closure (x, t) -> prediction: a perfect teacher."""

    def fn(x, t):
      return self.predict(
          x, t, path=path, target=target, labels=labels, guidance=guidance
      )

    return fn

  def probability_flow(
      self,
      x: Float[Array, "b *s"],
      t: Float[Array, "..."] | Number,
      r: Float[Array, "..."] | Number,
      *,
      path: path_lib.NoisePath,
      labels: Int[Array, "..."] | int | None = None,
      guidance: Float[Array, "..."] | Number | None = None,
      steps: int = 128,
      unroll: bool | int = 1,
  ) -> Float[Array, "b *s"]:
    """The exact flow map: where the ODE that passes x at t is at time r.

    Every path has the same trajectories up to scale and time: with
    z = x / sqrt(alpha^2 + sigma^2) and angle = arctan(sigma / alpha),
    dz / d angle = cos(angle) noise - sin(angle) x0, smooth from data to noise.
    That is integrated by the classical Runge-Kutta method in equal steps of
    the angle, so the result can be differentiated in both modes, in x, t and r.
    Measured on ring8 from t=1 to 0 in float64: see the tests; in float32
    rounding dominates.

    Args:
      x: points at time t. Shape [b, *s].
      t: start, in [0, 1]. Shape [b] or [].
      r: end, in [0, 1], smaller or larger than t. Shape [b] or [].
      path: the noise path.
      labels: as in `predict`.
      guidance: as in `predict`.
      steps: Runge-Kutta steps; the error falls like steps^-4.
      unroll: of the scan over steps.

    Returns:
      The points at time r, of x's shape.
    """
    fn = "GaussianMixture.probability_flow"
    _checks.in_range(fn, "steps", steps, 1)
    _checks.in_range(fn, "t", t, 0, 1)
    _checks.in_range(fn, "r", r, 0, 1)
    if guidance is not None and labels is None:
      _checks.fail(fn, "labels", "given when guidance is", None)
    flat = self._flat("probability_flow", x)
    rows = {"t": t, "r": r}
    if guidance is not None:
      rows["guidance"] = guidance
    out = _probability_flow(
        self,
        flat,
        *self._levels("probability_flow", flat, **rows),
        labels=self._labels("probability_flow", labels),
        path=path,
        steps=steps,
        unroll=unroll,
    )
    return jnp.reshape(out, x.shape)

  def mean_velocity(
      self,
      x: Float[Array, "b *s"],
      t: Float[Array, "..."] | Number,
      r: Float[Array, "..."] | Number,
      *,
      path: path_lib.NoisePath,
      steps: int = 128,
  ) -> Float[Array, "b *s"]:
    """(x - probability_flow(x, t, r)) / (t - r): the true flow map's output.

    Where t = r it is the velocity. Arguments as in `probability_flow`.
    """
    end = self.probability_flow(x, t, r, path=path, steps=steps)
    velocity = self.predict(x, t, path=path, target="velocity")
    gap = jnp.broadcast_to(
        jnp.asarray(t, end.dtype) - jnp.asarray(r, end.dtype), end.shape[:1]
    )
    gap = _checks.expand_like(gap, end)
    safe = jnp.where(gap == 0, jnp.ones_like(gap), gap)
    return jnp.where(gap == 0, velocity, (x - end) / safe)

  def sample(
      self,
      key: Key[Array, ""],
      n: int,
      *,
      labels: Int[Array, "n"] | int | None = None,
      stratified: bool = False,
  ) -> Float[Array, "n d"]:
    """Draws n points.

    Args:
      key: one key.
      n: how many.
      labels: class of each point, or None: any. Shape [n].
      stratified: the number of points of every component is as near to
        n * weight as whole numbers allow (a better reference for distances:
        their noise floor falls); not with labels. Points are in the order of
        their components.

    Returns:
      Points, shape [n, d].
    """
    return self.sample_with_modes(
        key, n, labels=labels, stratified=stratified
    )[0]

  def sample_with_modes(
      self,
      key: Key[Array, ""],
      n: int,
      *,
      labels: Int[Array, "n"] | int | None = None,
      stratified: bool = False,
  ) -> tuple[Float[Array, "n d"], Int[Array, "n"]]:
    """`sample`, and the component of each point. Shapes [n, d] and [n]."""
    fn = "sample"
    _checks.in_range(f"GaussianMixture.{fn}", "n", n, 1)
    if stratified and labels is not None:
      _checks.fail(f"GaussianMixture.{fn}", "labels", "None", "labels")
    return _sample(
        self, key, self._labels(fn, labels), n=n, stratified=stratified
    )

  def assign(self, x: Float[Array, "b *s"]) -> Int[Array, "b"]:
    """The component most likely to have made each point. Shape [b]."""
    flat = self._flat("assign", x)
    levels = self._levels("assign", flat, alpha=1.0, sigma=0.0)
    return jnp.argmax(_log_joint(self, flat, *levels, None), axis=1)

  def deviations(self, x: Float[Array, "b *s"]) -> Float[Array, "b k"]:
    """Distance to each mean in that component's standard deviations."""
    flat = self._flat("deviations", x)
    difference = flat[:, None, :] - self.means.astype(flat.dtype)[None]
    difference = self._rotate(difference, back=False)
    scaled = difference / self.scales.astype(flat.dtype)[None]
    return jnp.sqrt(jnp.sum(jnp.square(scaled), axis=2))

  def condition(self, label: int) -> "GaussianMixture":
    """The mixture of one class: the other components' weights become 0."""
    classes = np.asarray(self.classes)
    if label not in classes:
      _checks.fail(
          "GaussianMixture.condition", "label",
          f"one of {sorted(set(classes.tolist()))}", label,
      )
    weights = jnp.where(
        jnp.asarray(classes == label), self.weights,
        jnp.zeros_like(self.weights),
    )
    return self._replace(weights=weights / jnp.sum(weights))


# The closed forms as programs of their own: an eager call then compiles and
# runs one thing instead of thirty. Values are checked before they get here.


@jax.jit
def _log_joint(mixture, x, alpha, sigma, labels):
  return mixture._parts(x, alpha, sigma, labels)[0]


@jax.jit
def _moments(mixture, x, alpha, sigma, labels):
  """`GaussianMixture.moments` at flat x [b, d]."""
  log_joint, whitened, alpha, sigma = mixture._parts(x, alpha, sigma, labels)
  posterior = jax.nn.softmax(log_joint, axis=1)[:, :, None]
  pull = jnp.square(mixture.scales.astype(x.dtype))[None] * whitened
  mean = mixture.means.astype(x.dtype)[None] + alpha * mixture._rotate(
      pull, back=True
  )
  noise = sigma * mixture._rotate(whitened, back=True)
  return jnp.sum(posterior * mean, axis=1), jnp.sum(posterior * noise, axis=1)


@functools.partial(jax.jit, static_argnames=("n", "stratified"))
def _sample(mixture, key, labels, *, n, stratified):
  of_mode, of_point = jax.random.split(key)
  dtype = mixture.means.dtype
  if stratified:
    # Point i takes the component whose share of [0, 1) holds (i + 1/2) / n.
    edges = jnp.cumsum(mixture.weights)
    place = (jnp.arange(n, dtype=dtype) + 0.5) / n
    modes = jnp.searchsorted(edges, place, side="right")
    modes = jnp.minimum(modes, len(edges) - 1).astype(jnp.int32)
  else:
    logits = mixture._log_weights(n, labels, dtype)
    modes = jax.random.categorical(of_mode, logits, axis=1).astype(jnp.int32)
  normal = jax.random.normal(of_point, (n, mixture.dim), dtype)
  offset = mixture.scales[modes] * normal
  if mixture.rotations is not None:
    offset = jnp.einsum(
        "bi,bji->bj", offset, mixture.rotations[modes], precision="highest"
    )
  return mixture.means[modes] + offset, modes


@jax.jit
def _score(mixture, x, alpha, sigma, labels):
  log_joint, whitened, _, _ = mixture._parts(x, alpha, sigma, labels)
  posterior = jax.nn.softmax(log_joint, axis=1)[:, :, None]
  return -jnp.sum(posterior * mixture._rotate(whitened, back=True), axis=1)


@functools.partial(jax.jit, static_argnames=("path", "target"))
def _predict(mixture, x, t, guidance=None, *, labels, path, target):
  """`GaussianMixture.predict` at flat x [b, d], t and guidance [b] or []."""
  if path.velocity_starts and target == "velocity":
    t = jnp.maximum(t, path.end_clamp)
  c = path.coefficients(t)
  alpha, sigma = c.alpha.astype(x.dtype), c.sigma.astype(x.dtype)
  of_x0, of_noise = (
      jnp.broadcast_to(a.astype(x.dtype), x.shape[:1])[:, None]
      for a in path.definition(t, target)
  )

  def given(labels):
    if target == "score":
      return _score(mixture, x, alpha, sigma, labels)
    x0, noise = _moments(mixture, x, alpha, sigma, labels)
    return of_x0 * x0 + of_noise * noise

  cond = given(labels)
  if guidance is None:
    return cond
  uncond = given(None)
  guidance = jnp.broadcast_to(guidance, x.shape[:1])[:, None]
  return uncond + guidance * (cond - uncond)


@functools.partial(jax.jit, static_argnames=("path", "steps", "unroll"))
def _probability_flow(
    mixture, x, t, r, guidance=None, *, labels, path, steps, unroll
):
  """`GaussianMixture.probability_flow` at flat x [b, d]."""

  def level(time):
    c = path.coefficients(time)
    rows = [
        jnp.broadcast_to(a.astype(x.dtype), x.shape[:1])
        for a in (c.alpha, c.sigma)
    ]
    return jnp.arctan2(rows[1], rows[0]), jnp.hypot(*rows)[:, None]

  start, size = level(t)
  end, final = level(r)
  step = (end - start) / steps
  h = step[:, None]

  def turning(z, cos, sin, labels):
    x0, noise = _moments(mixture, z, cos, sin, labels)
    return cos[:, None] * noise - sin[:, None] * x0

  def slope(z, angle):
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    cond = turning(z, cos, sin, labels)
    if guidance is None:
      return cond
    uncond = turning(z, cos, sin, None)
    weight = jnp.broadcast_to(guidance, z.shape[:1])[:, None]
    return uncond + weight * (cond - uncond)

  def body(z, i):
    angle = start + i * step
    k1 = slope(z, angle)
    k2 = slope(z + h / 2 * k1, angle + step / 2)
    k3 = slope(z + h / 2 * k2, angle + step / 2)
    k4 = slope(z + h * k3, angle + step)
    return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

  z, _ = jax.lax.scan(
      body, x / size, jnp.arange(steps, dtype=x.dtype), unroll=unroll
  )
  return z * final


def make_gaussian_mixture(
    means,
    scales,
    weights=None,
    *,
    classes=None,
    rotations=None,
) -> GaussianMixture:
  """A mixture from anything array-like; float32, or float64 under x64.

  Args:
    means: Shape [k, d].
    scales: standard deviations, >= 0: one number, [k] or [k, d].
    weights: > 0, normalised here; None: equal. Shape [k].
    classes: integer class of each component; None: each is its own. Shape [k].
    rotations: orthogonal axes, or None. Shape [k, d, d].

  Returns:
    A `GaussianMixture` with normalised weights.

  Raises:
    ValueError: shapes that do not fit, negative scales or weights.

  Example:
    >>> mixture = make_gaussian_mixture([[-1.0], [2.0]], 0.1)
    >>> mixture.means.shape
    (2, 1)
  """
  fn = "make_gaussian_mixture"
  means = np.asarray(means, np.float64)
  _checks.rank(fn, "means", means, 2, "[k, d]")
  _checks.nonempty(fn, means=means)
  k, d = means.shape
  scales = np.asarray(scales, np.float64)
  if scales.ndim < 2:
    if scales.ndim:
      _checks.shape(fn, "scales", scales, (k,), "[k]", "means")
      scales = scales[:, None]
    scales = np.broadcast_to(scales, (k, d))
  _checks.shape(fn, "scales", scales, (k, d), "[k, d]", "means")
  if not (scales >= 0).all():
    _checks.fail(fn, "scales", ">= 0", f"{scales.min():g}")
  weights = np.asarray(np.ones(k) if weights is None else weights, np.float64)
  _checks.shape(fn, "weights", weights, (k,), "[k]", "means")
  if not (weights > 0).all():
    _checks.fail(fn, "weights", "> 0", f"{weights.min():g}")
  classes = np.asarray(np.arange(k) if classes is None else classes)
  _checks.shape(fn, "classes", classes, (k,), "[k]", "means")
  dtype = jnp.result_type(float)
  if rotations is not None:
    rotations = np.asarray(rotations, np.float64)
    _checks.shape(fn, "rotations", rotations, (k, d, d), "[k, d, d]", "means")
    off = np.abs(rotations @ rotations.transpose(0, 2, 1) - np.eye(d)).max()
    if off > 1e-5:
      _checks.fail(fn, "rotations", "orthogonal", f"off by {off:.1e}")
    rotations = jnp.asarray(rotations, dtype)
  return GaussianMixture(
      jnp.asarray(means, dtype),
      jnp.asarray(scales, dtype),
      jnp.asarray(weights / weights.sum(), dtype),
      jnp.asarray(classes, jnp.int32),
      rotations,
  )


def ring(
    k: int = 8, *, radius: Number = 1.4, std: Number = 0.1
) -> GaussianMixture:
  """k equal modes on a circle in the plane, the first at angle 0.

  Args:
    k: number of modes.
    radius: of the circle.
    std: standard deviation of a mode, >= 0.

  Returns:
    A mixture of k components in the plane, each its own class.
  """
  _checks.in_range("ring", "k", k, 1)
  angles = 2 * np.pi * np.arange(k) / k
  means = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
  return make_gaussian_mixture(means, std)


def ring8() -> GaussianMixture:
  """The ring of the house's 2-D experiments: 8 modes, radius 1.4, sd 0.1."""
  return ring(8, radius=1.4, std=0.1)


def unit_ring(k: int = 8, *, std: Number = 0.1) -> GaussianMixture:
  """A ring with variance exactly 1 in each coordinate (k >= 3).

  radius^2 / 2 + std^2 = 1.

  Args:
    k: number of modes, >= 3.
    std: standard deviation of a mode, below 1.

  Returns:
    A mixture of k components in the plane, each its own class.
  """
  _checks.in_range("unit_ring", "k", k, 3)
  _checks.in_range("unit_ring", "std", std, 0, 1, open_high=True)
  return ring(k, radius=float(np.sqrt(2 * (1 - std**2))), std=std)


def grid25(*, spacing: Number = 1.0, std: Number = 0.1) -> GaussianMixture:
  """25 equal modes on a square grid around the origin; class = column.

  Args:
    spacing: distance between neighbours.
    std: standard deviation of a mode, >= 0.

  Returns:
    A mixture of 25 components in the plane.
  """
  line = spacing * np.arange(-2, 3)
  means = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1)
  return make_gaussian_mixture(
      means.reshape(25, 2), std, classes=np.repeat(np.arange(5), 5)
  )


def two_class() -> GaussianMixture:
  """Two overlapping classes in the plane, two modes each: for guidance.

  Class 0 on the left, class 1 on the right, near enough that guidance moves
  samples: means (-1, +-1) and (1, +-1), sd 0.5, class 1 half as likely.
  """
  means = [[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]
  return make_gaussian_mixture(
      means, 0.5, [2.0, 2.0, 1.0, 1.0], classes=[0, 0, 1, 1]
  )


def two_points(low: Number = -1.0, high: Number = 2.0) -> GaussianMixture:
  """Two equal point masses on a line (no density at sigma = 0).

  Args:
    low: where the first lies.
    high: where the second lies.

  Returns:
    A mixture of two components on the line, of deviation 0.
  """
  return make_gaussian_mixture([[low], [high]], 0.0)


def gaussian(mean, std, *, rotations=None) -> GaussianMixture:
  """One Gaussian: its flow map has a closed form, `gaussian_flow_map`.

  Args:
    mean: Shape [d].
    std: one number or [d].
    rotations: axes, or None. Shape [d, d].

  Returns:
    A mixture of one component.
  """
  mean = np.asarray(mean, np.float64)
  _checks.rank("gaussian", "mean", mean, 1, "[d]")
  std = np.broadcast_to(np.asarray(std, np.float64), mean.shape)
  return make_gaussian_mixture(
      mean[None], std[None],
      rotations=None if rotations is None else np.asarray(rotations)[None],
  )


def gaussian_flow_map(
    mixture: GaussianMixture,
    x: Float[Array, "b d"],
    t: Float[Array, "..."] | Number,
    r: Float[Array, "..."] | Number,
    *,
    path: path_lib.NoisePath,
) -> Float[Array, "b d"]:
  """The probability-flow map of one Gaussian, in closed form.

  Along each axis x_r = alpha_r m + (x_t - alpha_t m) q_r / q_t with
  q^2 = alpha^2 s^2 + sigma^2.

  Args:
    mixture: one component.
    x: points at time t. Shape [b, d].
    t: start. Shape [b] or [].
    r: end. Shape [b] or [].
    path: the noise path.

  Returns:
    The points at time r. Shape [b, d].

  Raises:
    ValueError: more than one component.
  """
  if mixture.means.shape[0] != 1:
    _checks.fail(
        "gaussian_flow_map", "mixture", "one component",
        f"{mixture.means.shape[0]}",
    )
  x = mixture._flat("gaussian_flow_map", x)

  def level(time):
    c = path.coefficients(time)
    alpha, sigma = (
        jnp.broadcast_to(a.astype(x.dtype), x.shape[:1])[:, None, None]
        for a in (c.alpha, c.sigma)
    )
    scale = jnp.sqrt(
        jnp.square(alpha * mixture.scales.astype(x.dtype)[None])
        + jnp.square(sigma)
    )
    return alpha * mixture.means.astype(x.dtype)[None], scale

  (mean_t, scale_t), (mean_r, scale_r) = level(t), level(r)
  y = mixture._rotate(x[:, None, :] - mean_t, back=False)
  y = mixture._rotate(y * scale_r / scale_t, back=True)
  return (y + mean_r)[:, 0]
