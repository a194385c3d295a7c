"""What implementations share: padding, row statistics, products of kernels."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distilljax.typing import Number

# What a shard_map that checks its axes wants of every result, if it exists.
_MANUAL = getattr(jax.sharding, "ManualAxisType", None)

# None, or the parameters of interpret mode: for machines without the chip.
_INTERPRET = jax.make_user_context(default_value=None)


def interpret(parameters: Any = True):
  """A context in which the kernels are interpreted, on any machine.

  Args:
    parameters: True, or for TPU kernels `pltpu.InterpretParams`.

  Returns:
    A context manager.
  """
  return _INTERPRET(parameters)


def interpreted() -> Any:
  """What `interpret` was given, None outside of it."""
  return _INTERPRET.value


def result(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
  """A result of a kernel."""
  # The program of one device: it varies over no axis that it knows of.
  axes = {} if _MANUAL is None else {"manual_axis_type": _MANUAL()}
  return jax.ShapeDtypeStruct(shape, dtype, **axes)


def pad(a: jax.Array, axis: int, length: int, value: Number = 0) -> jax.Array:
  """`a` with an axis of `length`, filled up with `value`."""
  if a.shape[axis] == length:
    return a
  width = [(0, 0)] * a.ndim
  width[axis] = (0, length - a.shape[axis])
  return jnp.pad(a, width, constant_values=value)


def dot(
    a: jax.Array,
    b: jax.Array,
    axis: int,
    precision: Any = lax.Precision.HIGHEST,
) -> jax.Array:
  """Product of matrices, summed in float32: a b or, over axis 1 of b, a b'.

  Args:
    a: the left one.
    b: the right one.
    axis: of b that is summed over.
    precision: where they are float32.

  Returns:
    The product.
  """
  if a.dtype != jnp.float32:
    precision = lax.Precision.DEFAULT
  return lax.dot_general(
      a,
      b,
      (((1,), (axis,)), ((), ())),
      precision=precision,
      preferred_element_type=jnp.float32,
  )


@dataclasses.dataclass(frozen=True)
class Problem:
  """Sizes of a problem that a kernel cuts into blocks of rows x columns.

  A subclass says how many `rows` and `columns` a block has.

  Attributes:
    batch: B.
    heads: of the queries.
    groups: heads of the queries for one of the keys.
    n: rows.
    m: columns.
    shift: m - n: row i sees the columns j <= i + shift, where causal.
    causal: whether it does.
  """

  batch: int
  heads: int
  groups: int
  n: int
  m: int
  shift: int
  causal: bool

  @property
  def row_blocks(self) -> int:
    """Blocks of rows, the last of them perhaps ragged."""
    return -(-self.n // self.rows)

  @property
  def column_blocks(self) -> int:
    """Blocks of columns, the last of them perhaps ragged."""
    return -(-self.m // self.columns)

  @property
  def ragged(self) -> bool:
    """Whether the last block has columns that are not there."""
    return self.column_blocks * self.columns != self.m

  def pad_rows(
      self, a: jax.Array, axis: int = 2, value: Number = 0
  ) -> jax.Array:
    """`a` with whole blocks of rows along an axis."""
    return pad(a, axis, self.row_blocks * self.rows, value)

  def pad_columns(self, a: jax.Array, axis: int = 2) -> jax.Array:
    """`a` with whole blocks of columns along an axis."""
    return pad(a, axis, self.column_blocks * self.columns)


def finite(a: jax.Array) -> jax.Array:
  """0 where a is -inf: exp(-inf - 0) is 0, exp(-inf + inf) is not a number."""
  return jnp.where(a == -jnp.inf, jnp.zeros_like(a), a)


def add(sums: dict[str, jax.Array], **terms: jax.Array | None) -> None:
  """Adds arrays to those of the same name; None is zero."""
  for name, a in terms.items():
    if a is not None:
      sums[name] = sums[name] + a if name in sums else a


def shares(
    o: jax.Array, lse: jax.Array, do: jax.Array, dl: jax.Array, dtype: Any
) -> jax.Array:
  """do . o - dl per row, 0 where the row sees nothing; [B, H, N]."""
  a = jnp.sum(do.astype(dtype) * o.astype(dtype), axis=-1) - dl.astype(dtype)
  return jnp.where(jnp.isneginf(lse), jnp.zeros_like(a), a)
