"""What all implementations of attention agree on: layout, masks, sizes.

Inside this folder arrays are head-major: q [B, H, N, D], k [B, K, M, D] and
v [B, K, M, E] with H = G K, so that the G query heads of a key head are
neighbours. `x` is the tuple of what attention is a function of, in the order
(q, k, v, bias, q_segment_ids, kv_segment_ids) without what is not there.
"""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp

# What can be differentiated, by its letter.
NAMES = {"q": "q", "k": "k", "v": "v", "b": "bias"}


@dataclasses.dataclass(frozen=True)
class Spec:
  """The static facts of one attention; hashable.

  Attributes:
    implementation: name of the module that computes it.
    scale: factor of the scores.
    causal: whether row i sees only columns j <= i + M - N.
    bias: whether x has a bias.
    segments: whether x has segment ids.
    rows: rows of a block, None for the implementation's own choice.
    columns: columns of a block, None likewise.
    fallback: whether "xla" takes over, with a warning, where the program turns
      out to be one that the implementation cannot be part of.
    axis: mesh axis that rows and columns are cut over, None where they are not.
    parts: devices of that axis.
    zigzag: whether the parts are in zig-zag order (that of `zigzag_positions`).
  """

  implementation: str
  scale: float
  causal: bool = False
  bias: bool = False
  segments: bool = False
  rows: int | None = None
  columns: int | None = None
  fallback: bool = False
  axis: str | None = None
  parts: int = 1
  zigzag: bool = False

  @property
  def size(self) -> int:
    """Number of arrays in x."""
    return 3 + self.bias + 2 * self.segments

  @property
  def letters(self) -> str:
    """Those of the differentiable arrays, in the order of x."""
    return "qkvb" if self.bias else "qkv"

  def bias_of(self, x: tuple[Any, ...]) -> Any:
    """The bias in x, or None."""
    return x[3] if self.bias else None

  def segments_of(self, x: tuple[Any, ...]) -> tuple[Any, Any] | None:
    """The two arrays of segment ids in x, or None."""
    return (x[-2], x[-1]) if self.segments else None


_WARNED: set[str] = set()


def warn_once(text: str) -> None:
  """Warns, but not twice of the same."""
  if text not in _WARNED:
    _WARNED.add(text)
    warnings.warn(text, stacklevel=4)


def accumulator(dtype: Any) -> Any:
  """The dtype of statistics and sums: float32, or float64 for float64."""
  return jnp.float64 if dtype == jnp.float64 else jnp.float32


def allowed(
    spec: Spec,
    x: tuple[Any, ...],
    rows: jax.Array,
    columns: jax.Array,
    q_ids: jax.Array | None,
    kv_ids: jax.Array | None,
) -> jax.Array | None:
  """Which columns the rows of a block see, or None for all of them.

  Args:
    spec: the attention.
    x: what it is a function of.
    rows: positions of the rows, int32 [r].
    columns: positions of the columns, int32 [c].
    q_ids: segment ids of the rows, [B, r].
    kv_ids: segment ids of the columns, [B, c].

  Returns:
    bool [1 or B, 1, r, c], or None.
  """
  ok = None
  if spec.causal:
    shift = x[1].shape[2] - x[0].shape[2]
    ok = columns[None, :] <= rows[:, None] + shift
    ok = ok[None, None]
  if spec.segments:
    same = (q_ids[:, :, None] == kv_ids[:, None, :])[:, None]
    ok = same if ok is None else ok & same
  return ok


def no_derivative(spec: Spec, wrt: str, kernels: tuple[str, ...]) -> None:
  """Refuses a derivative in the bias where it would be an N x M kernel."""
  if "b" in wrt and spec.implementation in kernels:
    raise NotImplementedError(
        "attention: bias must not be differentiated with implementation="
        f"{spec.implementation!r}, got a derivative in it; 'xla' and"
        " 'reference' support it"
    )


def third_order(spec: Spec) -> None:
  """Refuses a third derivative."""
  raise NotImplementedError(
      "attention: the derivative must be of at most second order with"
      f" implementation={spec.implementation!r}, got a third one; 'reference'"
      " supports it"
  )
