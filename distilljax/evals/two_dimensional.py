"""Distances between small-dimensional samples, each beside its noise floor.

A score means nothing without the score of two true samples: `*_floor` draws
pairs of those, of the sizes that will be compared, and returns what the metric
says of them. With a stratified reference (equal counts a mode, see
`GaussianMixture.sample`) the floor is lower.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import _checks
from distilljax.oracles import gaussian_mixture as gaussian_mixture_lib
from distilljax.typing import Array, Float, Key, Number, Scalar


class Floor(NamedTuple):
  """A metric between true samples: its mean and standard deviation."""

  mean: float
  std: float


def _pair(fn: str, x, y):
  _checks.floating(fn, x=x, y=y)
  _checks.rank(fn, "x", x, 2, "[n, d]")
  _checks.nonempty(fn, x=x, y=y)
  if jnp.ndim(y) != 2 or jnp.shape(y)[1] != jnp.shape(x)[1]:
    _checks.fail(
        fn, "y", f"[m, {jnp.shape(x)[1]}] like x", list(jnp.shape(y))
    )
  x, y = _checks.at_least_float32(x), _checks.at_least_float32(y)
  dtype = np.promote_types(x.dtype, y.dtype)
  return x.astype(dtype), y.astype(dtype)


def _distance_sum(x: Array, y: Array, chunk: int) -> Array:
  """Sum over all pairs of |x_i - y_j|, `chunk` rows of x at a time."""
  extra = -x.shape[0] % chunk
  rows = jnp.pad(x, ((0, extra), (0, 0)))
  where = jnp.arange(rows.shape[0]) < x.shape[0]

  def part(inputs):
    rows, where = inputs
    # Coordinate by coordinate: no cancellation, and no [rows, m, d] in memory.
    squares = sum(
        jnp.square(rows[:, i, None] - y[None, :, i])
        for i in range(x.shape[1])
    )
    total = jnp.sum(jnp.sqrt(squares), axis=1)
    return jnp.sum(jnp.where(where, total, jnp.zeros_like(total)))

  rows = rows.reshape(-1, chunk, x.shape[1])
  return jnp.sum(jax.lax.map(part, (rows, where.reshape(-1, chunk))))


def energy_distance(
    x: Float[Array, "n d"], y: Float[Array, "m d"]
) -> Scalar:
  """2 E|x - y| - E|x - x'| - E|y - y'|, unbiased.

  Pairs of a point with itself are left out, so two samples of one law score 0
  on average and may score below it.

  Args:
    x: a sample, n >= 2. Shape [n, d].
    y: another, m >= 2. Shape [m, d].

  Returns:
    A scalar, in units of x.

  Raises:
    ValueError: shapes that differ in d, fewer than two points.

  References:
    Szekely and Rizzo, Energy statistics, 2013.
  """
  fn = "energy_distance"
  x, y = _pair(fn, x, y)
  n, m = x.shape[0], y.shape[0]
  if min(n, m) < 2:
    _checks.fail(fn, "x and y", "2 or more points each", f"{n} and {m}")
  chunk = min(256, n, m)
  between = _distance_sum(x, y, chunk) / (n * m)
  within_x = _distance_sum(x, x, chunk) / (n * (n - 1))
  within_y = _distance_sum(y, y, chunk) / (m * (m - 1))
  return 2 * between - within_x - within_y


def sliced_wasserstein(
    x: Float[Array, "n d"],
    y: Float[Array, "n d"],
    *,
    directions: Float[Array, "p d"] | int = 64,
) -> Scalar:
  """SW2: root of the mean over directions of the squared 1-D W2.

  Each direction's W2^2 is the mean squared difference of the two sorted
  projections.

  Args:
    x: a sample. Shape [n, d].
    y: another of the same size. Shape [n, d].
    directions: unit vectors, shape [p, d]; or, in the plane, how many evenly
      spaced ones (over a half turn: opposite directions are equal).

  Returns:
    A scalar, in units of x, >= 0.

  Raises:
    ValueError: samples of different sizes; a number of directions when d is
      not 2.

  References:
    Bonneel et al., Sliced and Radon Wasserstein Barycenters, 2015.
  """
  fn = "sliced_wasserstein"
  x, y = _pair(fn, x, y)
  _checks.same_shape(fn, x=x, y=y)
  if isinstance(directions, int):
    _checks.in_range(fn, "directions", directions, 1)
    if x.shape[1] != 2:
      _checks.fail(
          fn, "directions", f"vectors [p, {x.shape[1]}] when d is not 2",
          directions,
      )
    angle = jnp.pi * jnp.arange(directions, dtype=x.dtype) / directions
    directions = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
  _checks.rank(fn, "directions", directions, 2, "[p, d]")
  directions = jnp.asarray(directions).astype(x.dtype)

  def project(a):
    return jnp.sort(
        jnp.einsum("pd,nd->pn", directions, a, precision="highest"), axis=1
    )

  return jnp.sqrt(jnp.mean(jnp.square(project(x) - project(y))))


def mode_frequencies(
    x: Float[Array, "n d"],
    mixture: gaussian_mixture_lib.GaussianMixture,
) -> Float[Array, "k"]:
  """The share of points assigned to each mode. Shape [k], sums to 1.

  Args:
    x: a sample. Shape [n, d].
    mixture: the truth.

  Returns:
    Shares that sum to 1. Shape [k].
  """
  modes = mixture.assign(x)
  k = mixture.means.shape[0]
  hits = modes[:, None] == jnp.arange(k, dtype=modes.dtype)[None, :]
  return jnp.mean(hits.astype(mixture.weights.dtype), axis=0)


def mode_frequency_tv(
    x: Float[Array, "n d"],
    mixture: gaussian_mixture_lib.GaussianMixture,
) -> Scalar:
  """Total variation of the mode frequencies: half the L1 to the weights.

  Args:
    x: a sample. Shape [n, d].
    mixture: the truth.

  Returns:
    A scalar in [0, 1]; 0 when every mode has its share.
  """
  return 0.5 * jnp.sum(jnp.abs(mode_frequencies(x, mixture) - mixture.weights))


def modes_covered(
    x: Float[Array, "n d"],
    mixture: gaussian_mixture_lib.GaussianMixture,
    *,
    share: Number = 0.1,
) -> Scalar:
  """How many modes hold at least `share` of the points they should.

  Args:
    x: a sample. Shape [n, d].
    mixture: the truth.
    share: part of its own weight that a mode must hold to count.

  Returns:
    A number from 0 to k.
  """
  frequencies = mode_frequencies(x, mixture)
  return jnp.sum((frequencies >= share * mixture.weights).astype(jnp.int32))


def share_within(
    x: Float[Array, "n d"],
    mixture: gaussian_mixture_lib.GaussianMixture,
    *,
    radius: Number = 4.0,
) -> Scalar:
  """Share of points within `radius` standard deviations of some mean.

  For true points in the plane it is 1 - exp(-radius^2 / 2) = 0.99966 at 4.

  Args:
    x: a sample. Shape [n, d].
    mixture: the truth.
    radius: in standard deviations, > 0.

  Returns:
    A scalar in [0, 1].
  """
  _checks.in_range("share_within", "radius", radius, 0, open_low=True)
  near = jnp.min(mixture.deviations(x), axis=1) <= radius
  return jnp.mean(near.astype(mixture.weights.dtype))


def two_sample_floor(
    metric: Callable[[Array, Array], Array],
    first: Callable[[Array], Array],
    second: Callable[[Array], Array],
    key: Key[Array, ""],
    *,
    repeats: int = 8,
) -> Floor:
  """Mean and deviation of metric(first(key), second(key')) over fresh keys.

  Args:
    metric: (x, y) -> scalar.
    first: key -> a true sample, in place of the student's.
    second: key -> a true sample, made as the reference is.
    key: one key.
    repeats: how many pairs, >= 2.

  Returns:
    `Floor(mean, std)`, the deviation that of one pair.
  """
  _checks.in_range("two_sample_floor", "repeats", repeats, 2)

  def one(key):
    a, b = jax.random.split(key)
    return metric(first(a), second(b))

  values = jax.lax.map(one, jax.random.split(key, repeats))
  return Floor(float(jnp.mean(values)), float(jnp.std(values, ddof=1)))


def _floor(metric, mixture, key, n, stratified, repeats) -> Floor:
  return two_sample_floor(
      metric,
      lambda key: mixture.sample(key, n),
      lambda key: mixture.sample(key, n, stratified=stratified),
      key,
      repeats=repeats,
  )


def energy_distance_floor(
    mixture: gaussian_mixture_lib.GaussianMixture,
    key: Key[Array, ""],
    *,
    n: int = 4096,
    stratified: bool = True,
    repeats: int = 8,
) -> Floor:
  """`energy_distance` of a true sample to a reference, both of n points.

  Args:
    mixture: the truth.
    key: one key.
    n: points of each.
    stratified: whether the reference is.
    repeats: how many pairs.

  Returns:
    `Floor(mean, std)`; the mean is near 0, so compare with the deviation.
  """
  return _floor(energy_distance, mixture, key, n, stratified, repeats)


def sliced_wasserstein_floor(
    mixture: gaussian_mixture_lib.GaussianMixture,
    key: Key[Array, ""],
    *,
    n: int = 4096,
    stratified: bool = True,
    repeats: int = 8,
) -> Floor:
  """`sliced_wasserstein` of a true sample to a reference; as the above.

  Args:
    mixture: the truth.
    key: one key.
    n: points of each sample.
    stratified: whether the reference has equal counts of every mode.
    repeats: how many samples, >= 2.

  Returns:
    `Floor(mean, std)`, the deviation that of one pair.
  """
  return _floor(sliced_wasserstein, mixture, key, n, stratified, repeats)


def mode_frequency_tv_floor(
    mixture: gaussian_mixture_lib.GaussianMixture,
    key: Key[Array, ""],
    *,
    n: int = 4096,
    repeats: int = 8,
) -> Floor:
  """`mode_frequency_tv` of true samples of n points.

  Args:
    mixture: the truth.
    key: one key.
    n: points of each sample.
    repeats: how many samples, >= 2.

  Returns:
    `Floor(mean, std)`, the deviation that of one sample.
  """
  return _floor(
      lambda x, _: mode_frequency_tv(x, mixture), mixture, key, n, False,
      repeats,
  )


def share_within_floor(
    mixture: gaussian_mixture_lib.GaussianMixture,
    key: Key[Array, ""],
    *,
    n: int = 4096,
    radius: Number = 4.0,
    repeats: int = 8,
) -> Floor:
  """`share_within` of true samples of n points.

  Args:
    mixture: the truth.
    key: one key.
    n: points of each sample.
    radius: in standard deviations of a mode.
    repeats: how many samples, >= 2.

  Returns:
    `Floor(mean, std)`, the deviation that of one sample.
  """
  return _floor(
      lambda x, _: share_within(x, mixture, radius=radius), mixture, key, n,
      False, repeats,
  )
