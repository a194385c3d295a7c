"""Consistency models: distances, discrete and continuous-time losses."""

from typing import Literal

import jax.numpy as jnp

from distilljax import _checks
from distilljax.typing import Array, Float


def _rows(a: Array) -> tuple[int, ...]:
  """The non-batch axes."""
  return tuple(range(1, a.ndim))


def _difference(fn: str, a: Array, b: Array) -> Array:
  _checks.min_rank(fn, "a", a, 1, "[b, *s]")
  _checks.nonempty(fn, a=a)
  _checks.floating(fn, a=a, b=b)
  _checks.same_shape(fn, a=a, b=b)
  a, b = _checks.at_least_float32(a), _checks.at_least_float32(b)
  return a - b.astype(a.dtype)


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
    elements: "mean" (default) or "sum" over the non-batch axes.

  Returns:
    The distance of every row, shape [b], at least float32; 0 where a = b.

  Raises:
    ValueError: shapes that differ, an empty batch, an unknown `elements`.

  Example:
    >>> import jax.numpy as jnp
    >>> squared_distance(jnp.array([[1.0, 3.0]]), jnp.zeros((1, 2))).tolist()
    [5.0]
  """
  _checks.one_of("squared_distance", "elements", elements, ("mean", "sum"))
  squares = jnp.square(_difference("squared_distance", a, b))
  reduce = jnp.mean if elements == "mean" else jnp.sum
  return reduce(squares, axis=_rows(squares))
