"""Matching in feature space: statistics of two sets of embeddings."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from distilljax import _checks
from distilljax.typing import Array, Bool, Float, Scalar

Kernel = Literal["linear", "rbf"]


def _product(a: Array, b: Array) -> Array:
  """a b^T with full float32 products, also where the default is lower."""
  return jnp.matmul(a, b.T, precision="highest")


def _squared_distances(a: Array, b: Array) -> Array:
  """|a_i - b_j|^2, not below 0."""
  squares = lambda x: jnp.sum(jnp.square(x), axis=1)
  cross = _product(a, b)
  distances = squares(a)[:, None] + squares(b)[None, :] - 2 * cross
  return jnp.maximum(distances, jnp.zeros_like(distances))


def median_bandwidth(
    x: Float[Array, "n d"], y: Float[Array, "m d"]
) -> Scalar:
  """Median distance between the points of two sets taken together.

  The usual scale of an RBF kernel. Each unordered pair of different points
  counts once. Stop-gradient: a bandwidth that moved with the features would
  let them cheat.

  Args:
    x: embeddings. Shape [n, d].
    y: embeddings. Shape [m, d].

  Returns:
    A scalar of at least float32, no gradient.

  Raises:
    ValueError: widths that differ, an empty set; in debug mode also non-finite
      embeddings.

  Example:
    >>> import jax.numpy as jnp
    >>> float(median_bandwidth(jnp.array([[0.0]]), jnp.array([[3.0]])))
    3.0

  References:
    Gretton et al., A Kernel Two-Sample Test, 2012, section 8.
  """
  fn = "median_bandwidth"
  x, y = _embeddings(fn, x, y)
  _checks.finite(fn, x=x, y=y)
  both = jax.lax.stop_gradient(jnp.concatenate([x, y.astype(x.dtype)]))
  distances = jnp.sqrt(_squared_distances(both, both))
  upper = jnp.triu_indices(both.shape[0], k=1)
  return jnp.median(distances[upper])


def _embeddings(fn: str, x: Array, y: Array) -> tuple[Array, Array]:
  _checks.rank(fn, "x", x, 2, "[n, d]")
  _checks.rank(fn, "y", y, 2, "[m, d]")
  _checks.nonempty(fn, x=x, y=y)
  _checks.floating(fn, x=x, y=y)
  if jnp.shape(x)[1] != jnp.shape(y)[1]:
    _checks.fail(
        fn, "y", f"[m, d={jnp.shape(x)[1]}] like x", list(jnp.shape(y))
    )
  return _checks.at_least_float32(x), _checks.at_least_float32(y)


def mmd(
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    *,
    kernel: Kernel = "linear",
    bandwidths: tuple[float, ...] = (0.5, 1.0, 2.0),
    scale: Float[Array, ""] | float | None = None,
    unbiased: bool = False,
    where_x: Bool[Array, "n"] | None = None,
    where_y: Bool[Array, "m"] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Scalar:
  """Squared maximum mean discrepancy of generated and real embeddings.

    MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)
  "linear": k(a, b) = a . b, so that the biased estimate is the squared distance
  of the two means (dataset condensation by distribution matching, Embedding
  Loss). "rbf": k(a, b) = sum over bandwidths h of
  exp(-|a - b|^2 / (2 (h scale)^2)). The biased estimate takes the means over
  all pairs and has a floor of order 1/n + 1/m where the sets match; the
  unbiased one leaves out i = j and can be negative. y is stop-gradient.

  The embeddings are an argument: run real and generated samples through the
  same frozen (random) network, with the same augmentation, and average the
  values over networks; for a class-conditional loss call it once per class, or
  with masks. It is a statistic of the whole batch: over micro-batches the mean
  of its values is another loss.

  Args:
    x: embeddings of generated samples, with gradient. Shape [n, d].
    y: embeddings of real samples. Frozen. Shape [m, d].
    kernel: "linear" or "rbf".
    bandwidths: of "rbf", as multiples of `scale`, > 0.
    scale: unit of the bandwidths; None: `median_bandwidth(x, y)`. A number
      keeps the kernel the same over steps.
    unbiased: leave out the pairs of a point with itself. Needs two points a
      set.
    where_x: which rows of x count; None: all. Shape [n].
    where_y: which rows of y count; None: all. Shape [m].
    axis_name: mapped axis of the batch, inside shard_map or pmap; only for the
      biased linear kernel, whose means can be formed there. Under jit a mean is
      global already.

  Returns:
    A scalar of at least float32. A side without rows gives 0. Biased minimum 0.

  Raises:
    ValueError: widths that differ, an empty set, an unknown kernel, masks of
      another shape, a single point with `unbiased`, no or non-positive
      bandwidths, `axis_name` with another estimate; in debug mode also
      non-finite embeddings.

  Example:
    >>> import jax.numpy as jnp
    >>> x, y = jnp.array([[1.0], [3.0]]), jnp.array([[0.0], [0.0]])
    >>> float(mmd(x, y)), float(mmd(x, y, unbiased=True))
    (4.0, 3.0)

  References:
    Gretton et al., A Kernel Two-Sample Test, 2012; Zhao and Bilen, Dataset
    Condensation with Distribution Matching, 2021, arXiv:2110.04181, eq. 4;
    Embedding Loss, 2026, arXiv:2604.22379 (abstract only: the estimator is a
    reconstruction).
  """
  fn = "mmd"
  x, y = _embeddings(fn, x, y)
  y = jax.lax.stop_gradient(y).astype(x.dtype)
  _checks.one_of(fn, "kernel", kernel, ("linear", "rbf"))
  for name, where, rows in (("where_x", where_x, x), ("where_y", where_y, y)):
    if where is not None:
      _checks.boolean(fn, **{name: where})
      _checks.shape(fn, name, where, rows.shape[:1], "[n]", name[-1])
  if axis_name is not None and (unbiased or kernel != "linear"):
    _checks.fail(
        fn, "axis_name", "None unless the estimate is biased and linear",
        repr(axis_name),
    )  # fmt: skip
  if kernel == "rbf":
    if not bandwidths:
      _checks.fail(fn, "bandwidths", "at least one number", "none")
    for bandwidth in bandwidths:
      _checks.in_range(fn, "bandwidths", bandwidth, 0.0, None, open_low=True)
    _checks.in_range(fn, "scale", scale, 0.0, None, open_low=True)
  if unbiased and min(x.shape[0], y.shape[0]) < 2:
    _checks.fail(
        fn, "x and y", "at least two rows each with unbiased=True",
        f"{x.shape[0]} and {y.shape[0]}",
    )  # fmt: skip

  weight_x, weight_y = (
      jnp.ones(rows.shape[:1], x.dtype) if where is None
      else where.astype(x.dtype)
      for where, rows in ((where_x, x), (where_y, y))
  )  # fmt: skip
  # Rows that do not count may hold anything, NaN included.
  x = jnp.where(weight_x[:, None] > 0, x, jnp.zeros_like(x))
  y = jnp.where(weight_y[:, None] > 0, y, jnp.zeros_like(y))
  _checks.finite(fn, x=x, y=y)
  count_x, count_y = jnp.sum(weight_x), jnp.sum(weight_y)

  if kernel == "linear" and not unbiased:
    sum_x, sum_y = jnp.sum(x, axis=0), jnp.sum(y, axis=0)
    if axis_name is not None:
      sum_x, sum_y, count_x, count_y = jax.lax.psum(
          (sum_x, sum_y, count_x, count_y), axis_name
      )
    gap = sum_x / jnp.maximum(count_x, 1) - sum_y / jnp.maximum(count_y, 1)
    value = jnp.sum(jnp.square(gap))
    return jnp.where((count_x > 0) & (count_y > 0), value, 0 * value)

  if kernel == "linear":
    similarity = _product
  else:
    if scale is None:
      scale = _masked_median(x, y, weight_x, weight_y)
    scale = jnp.asarray(scale, x.dtype)
    similarity = functools.partial(_rbf, bandwidths=bandwidths, scale=scale)

  def mean_within(rows, weight, count):
    table = similarity(rows, rows) * weight[:, None] * weight[None, :]
    if not unbiased:
      return jnp.sum(table) / jnp.maximum(jnp.square(count), 1)
    total = jnp.sum(table) - jnp.trace(table)
    return total / jnp.maximum(count * (count - 1), 1)

  cross = similarity(x, y) * weight_x[:, None] * weight_y[None, :]
  value = (
      mean_within(x, weight_x, count_x)
      + mean_within(y, weight_y, count_y)
      - 2 * jnp.sum(cross) / jnp.maximum(count_x * count_y, 1)
  )
  least = 1 if unbiased else 0
  enough = (count_x > least) & (count_y > least)
  return jnp.where(enough, value, 0 * value)


def _rbf(a: Array, b: Array, *, bandwidths, scale: Array) -> Array:
  distances = _squared_distances(a, b)
  return sum(
      jnp.exp(-distances / (2 * jnp.square(h * scale))) for h in bandwidths
  )


def _masked_median(
    x: Array, y: Array, weight_x: Array, weight_y: Array
) -> Array:
  """`median_bandwidth` over the rows that count, never 0."""
  both = jax.lax.stop_gradient(jnp.concatenate([x, y]))
  weight = jnp.concatenate([weight_x, weight_y])
  upper = jnp.triu_indices(both.shape[0], k=1)
  distances = jnp.sqrt(_squared_distances(both, both))[upper]
  counts = (weight[:, None] * weight[None, :])[upper] > 0
  ranked = jnp.sort(jnp.where(counts, distances, jnp.inf))
  count = jnp.sum(counts, dtype=jnp.int32)
  middle = jnp.maximum(jnp.stack([(count - 1) // 2, count // 2]), 0)
  median = jnp.mean(ranked[middle])
  # All points alike: any scale gives the same kernel. (None at all: it is
  # infinite, and no pair is left to weigh.)
  return jnp.where(median > 0, median, jnp.ones_like(median))
