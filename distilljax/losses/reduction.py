"""The only place that reduces over a batch: global sums over global counts."""

import jax
import jax.numpy as jnp

from distilljax import _checks
from distilljax.typing import Array, Bool, Float, Scalar


def masked_sum_and_count(
    values: Float[Array, "*b"],
    where: Bool[Array, "*b"] | None = None,
    *,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[Scalar, Scalar]:
  """Sum of the selected values and how many there are.

  Values that are not selected are replaced by 0 before the sum, so a NaN behind
  the mask reaches neither the sum nor its gradient.

  Args:
    values: per-row or per-token values. Shape [*b].
    where: which entries count; None counts all. Shape [*b], bool.
    axis_name: mapped axis or axes to sum over, inside shard_map or pmap.

  Returns:
    (sum, count), both scalars of at least float32.

  Raises:
    ValueError: `where` has another shape than `values`.
  """
  _checks.same_shape("masked_sum_and_count", values=values, where=where)
  values = _checks.at_least_float32(values)
  if where is None:
    count = jnp.asarray(values.size, values.dtype)
  else:
    _checks.boolean("masked_sum_and_count", where=where)
    values = jnp.where(where, values, jnp.zeros_like(values))
    count = jnp.sum(where, dtype=values.dtype)
  total = jnp.sum(values)
  if axis_name is not None:
    total = jax.lax.psum(total, axis_name)
    count = jax.lax.psum(count, axis_name)
  return total, count


def masked_mean(
    values: Float[Array, "*b"],
    where: Bool[Array, "*b"] | None = None,
    *,
    axis_name: str | tuple[str, ...] | None = None,
) -> Scalar:
  """Mean of the selected values: the global sum over the global count.

  mean = sum_i where_i values_i / max(sum_i where_i, 1). With nothing selected
  the mean is 0 and so is its gradient.

  Args:
    values: per-row or per-token values. Shape [*b].
    where: which entries count; None counts all. Shape [*b], bool.
    axis_name: mapped axis or axes to reduce over, inside shard_map or pmap: the
      mean is then that of all devices' selected entries together, which a pmean
      of per-device means is not when the counts differ.

  Returns:
    A scalar of at least float32.

  Raises:
    ValueError: `where` has another shape than `values`.

  Example:
    >>> import jax.numpy as jnp
    >>> where = jnp.array([True, True, False])
    >>> float(masked_mean(jnp.array([1.0, 2.0, 9.0]), where))
    1.5
  """
  total, count = masked_sum_and_count(values, where, axis_name=axis_name)
  return total / jnp.maximum(count, 1)
