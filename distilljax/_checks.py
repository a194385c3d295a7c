"""One-line errors for bad input, and the debug mode that checks values.

Static facts (rank, shape, dtype kind, a Python number out of range, an unknown
option) are checked at every call, at trace time, and cost nothing afterwards.
Facts about the values of arrays (NaN, a time outside [0, 1], an id outside the
vocabulary) are checked for Python and NumPy numbers always, for arrays only in
debug mode:

* `with distilljax.debug(): ...` checks eager calls as they happen;
* `distilljax.debug(fn)` is `fn` with the checks staged into its program, which
  also reaches the inside of `jax.jit`.

Every message reads `<function>: <argument> must be <expected>, got <got>`.
"""

import difflib
import functools
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# None, "eager" or "staged". A user context is part of jit's cache key, so a
# function traced outside debug mode is traced again, with checks, inside it.
_MODE = jax.make_user_context(default_value=None)


class debug:  # pylint: disable=invalid-name
  """Checks values (NaN, ranges, ids), not only shapes.

  `with distilljax.debug():` checks eager calls; `distilljax.debug(fn)` returns
  `fn` jitted with the checks inside, raising `ValueError` with the same line.

  Args:
    fn: function of arrays whose calls are to be checked, or None for the
      context manager.

  Example:
    >>> import distilljax
    >>> with distilljax.debug():
    ...   pass
  """

  def __new__(cls, fn: Callable[..., Any] | None = None):
    if fn is None:
      return super().__new__(cls)
    return _staged(fn)

  def __enter__(self):
    self._context = _MODE("eager")
    self._context.__enter__()
    return self

  def __exit__(self, *exception):
    return self._context.__exit__(*exception)


def _staged(fn: Callable[..., Any]) -> Callable[..., Any]:
  from jax.experimental import checkify  # pylint: disable=g-import-not-at-top

  checked = jax.jit(checkify.checkify(fn, errors=checkify.user_checks))

  @functools.wraps(fn)
  def wrapper(*args, **kwargs):
    with _MODE("staged"):
      error, out = checked(*args, **kwargs)
    message = error.get()
    if message:
      raise ValueError(message.split(" (`check` failed)")[0].splitlines()[0])
    return out

  return wrapper


def fail(fn: str, argument: str, expected: str, got: Any) -> None:
  """Raises the library's one-line `ValueError`."""
  raise ValueError(f"{fn}: {argument} must be {expected}, got {got}")


def nearest_multiple(value: int, of: int) -> int:
  """The positive multiple of `of` that is nearest to `value`."""
  return max(1, round(value / of)) * of


def _dims(shape: Sequence[Any]) -> str:
  return "[" + ", ".join(str(n) for n in shape) + "]"


def rank(fn: str, name: str, array: Any, expected: int, dims: str) -> None:
  """`array` has `expected` axes; `dims` names them, as in "[b, l, v]"."""
  if jnp.ndim(array) != expected:
    fail(fn, name, f"{dims} (rank {expected})", _dims(jnp.shape(array)))


def min_rank(fn: str, name: str, array: Any, expected: int, dims: str) -> None:
  """`array` has at least `expected` axes."""
  if jnp.ndim(array) < expected:
    fail(fn, name, f"{dims} (rank >= {expected})", _dims(jnp.shape(array)))


def shape(
  fn: str, name: str, array: Any, expected: Sequence[int], dims: str, like: str
) -> None:
  """`array` has exactly the shape `expected`, the one that `like` implies."""
  if tuple(jnp.shape(array)) != tuple(expected):
    fail(
      fn,
      name,
      f"{dims}={_dims(expected)} like {like}",
      _dims(jnp.shape(array)),
    )


def same_shape(fn: str, **arrays: Any) -> None:
  """All given arrays have the shape of the first one; None is passed over."""
  given = {k: a for k, a in arrays.items() if a is not None}
  first, *others = given
  for name in others:
    if jnp.shape(given[name]) != jnp.shape(given[first]):
      fail(
        fn,
        name,
        f"{_dims(jnp.shape(given[first]))} like {first}",
        _dims(jnp.shape(given[name])),
      )


def per_row(fn: str, like: str, reference: Any, **arrays: Any) -> None:
  """Each array is [b] where b is the leading axis of `reference`."""
  b = jnp.shape(reference)[:1]
  for name, array in arrays.items():
    if array is not None and tuple(jnp.shape(array)) != tuple(b):
      fail(fn, name, f"[b]={_dims(b)} like {like}", _dims(jnp.shape(array)))


def nonempty(fn: str, **arrays: Any) -> None:
  """No array has an axis of length 0 (an empty batch)."""
  for name, array in arrays.items():
    if array is not None and 0 in jnp.shape(array):
      fail(fn, name, "a non-empty array", _dims(jnp.shape(array)))


def floating(fn: str, **arrays: Any) -> None:
  """Every array has a floating dtype."""
  for name, array in arrays.items():
    if array is not None and not jnp.issubdtype(
      jnp.result_type(array), jnp.floating
    ):
      raise TypeError(
        f"{fn}: {name} must be a floating array, got"
        f" {jnp.result_type(array).name}"
      )


def integer(fn: str, **arrays: Any) -> None:
  """Every array has an integer dtype."""
  for name, array in arrays.items():
    if array is not None and not jnp.issubdtype(
      jnp.result_type(array), jnp.integer
    ):
      raise TypeError(
        f"{fn}: {name} must be an integer array, got"
        f" {jnp.result_type(array).name}"
      )


def boolean(fn: str, **arrays: Any) -> None:
  """Every array has dtype bool (None is passed over)."""
  for name, array in arrays.items():
    if array is not None and jnp.result_type(array) != jnp.bool_:
      raise TypeError(
        f"{fn}: {name} must be a bool array, got {jnp.result_type(array).name}"
      )


def nearest(value: str, choices: Iterable[str]) -> str:
  """`; did you mean 'x'?` for the nearest choice, or an empty string."""
  close = difflib.get_close_matches(str(value), list(choices), n=1)
  return f"; did you mean {close[0]!r}?" if close else ""


def one_of(fn: str, name: str, value: Any, choices: Iterable[str]) -> None:
  """`value` is one of the named options."""
  choices = list(choices)
  if value not in choices:
    fail(
      fn,
      name,
      f"one of {', '.join(repr(c) for c in choices)}",
      f"{value!r}{nearest(value, choices)}",
    )


def is_number(value: Any) -> bool:
  """True for a Python or NumPy number, whose value can always be checked."""
  return isinstance(value, (numbers.Number, np.generic)) or (
    isinstance(value, np.ndarray) and value.ndim == 0
  )


def holds(
  fn: str,
  name: str,
  value: Any,
  predicate: Callable[[Any], Any],
  expected: str,
) -> None:
  """Checks `all(predicate(value))`: a number always, an array in debug mode.

  The predicate gets the value as given (a number) or as an array and returns a
  bool (array). With an array outside debug mode this does nothing at all.
  """
  if value is None:
    return
  if is_number(value):
    if not np.all(predicate(value)):
      fail(fn, name, expected, value)
    return
  mode = _MODE.value
  if mode is None:
    return
  if isinstance(value, jax.core.Tracer):
    if mode == "staged":
      from jax.experimental import checkify  # pylint: disable=g-import-not-at-top

      ok = predicate(value)
      bad = jnp.sum(jnp.logical_not(ok))
      checkify.check(
        jnp.all(ok),
        f"{fn}: {name} must be {expected}, got {{bad}} of"
        f" {np.size(ok)} entries that are not",
        bad=bad,
      )
    return
  ok = np.asarray(predicate(jnp.asarray(value)))
  if not ok.all():
    first = tuple(int(i) for i in np.argwhere(~ok)[0])
    got = f"{int((~ok).sum())} of {ok.size} entries that are not"
    if ok.shape == np.shape(value):
      where = f" at {list(first)}" if first else ""
      got += f" (first: {np.asarray(value)[first]}{where})"
    fail(fn, name, expected, got)


def finite(fn: str, **arrays: Any) -> None:
  """No NaN and no infinity (numbers always, arrays in debug mode)."""

  def predicate(x):
    # NumPy for a number: inside a trace jnp would make a tracer of it.
    return np.isfinite(x) if is_number(x) else jnp.isfinite(x)

  for name, array in arrays.items():
    holds(fn, name, array, predicate, "finite")


def in_range(
  fn: str,
  name: str,
  value: Any,
  low: float | int | None = None,
  high: float | int | None = None,
  *,
  open_low: bool = False,
  open_high: bool = False,
) -> None:
  """low <= value <= high (strict where `open_*`); NaN fails."""
  low_text = "(-inf" if low is None else f"{'(' if open_low else '['}{low:g}"
  high_text = "inf)" if high is None else f"{high:g}{')' if open_high else ']'}"

  def predicate(x):
    ok = x == x  # pylint: disable=comparison-with-itself
    if low is not None:
      ok = ok & (x > low if open_low else x >= low)
    if high is not None:
      ok = ok & (x < high if open_high else x <= high)
    return ok

  holds(fn, name, value, predicate, f"in {low_text}, {high_text}")


def not_above(
  fn: str, low_name: str, low: Any, high_name: str, high: Any
) -> None:
  """low <= high elementwise (r <= t), numbers always, arrays in debug mode."""
  if is_number(low) and is_number(high):
    if not low <= high:
      fail(fn, low_name, f"<= {high_name} ({high})", low)
    return
  difference = jnp.asarray(high) - jnp.asarray(low)
  holds(
    fn, low_name, difference, lambda d: d >= 0, f"<= {high_name} everywhere"
  )


def at_least_float32(x: Any) -> jax.Array:
  """`x` in at least float32: bf16 and fp16 promote, float64 stays."""
  x = jnp.asarray(x)
  # Not promote_types, which refuses any mixture under strict promotion.
  return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def expand_like(t: Any, x: Any) -> jax.Array:
  """Reshapes per-row `t` [b] (or a scalar) to broadcast over `x` [b, *s]."""
  t = jnp.asarray(t)
  if t.ndim == 0:
    return jnp.reshape(t, (1,) * jnp.ndim(x))
  return jnp.reshape(t, t.shape + (1,) * (jnp.ndim(x) - t.ndim))
