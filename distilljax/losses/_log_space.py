"""Log-space helpers shared by the language-model losses; not public.

A token outside a distribution's support (logit -inf, as in padding columns) has
log-probability -inf. 0 log 0 = 0 here, in the value and in the gradient: a sum
runs only over the support of its weights, and what is left out is replaced
before the arithmetic, never after it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from distilljax import _checks
from distilljax.typing import Array


def check_number(
  fn: str,
  name: str,
  value: Any,
  low: float | int | None = None,
  high: float | int | None = None,
  **bounds: bool,
) -> None:
  """`value` is a Python number in a range: it decides a branch."""
  if not _checks.is_number(value):
    _checks.fail(
      fn, name, "a Python number (it decides a branch)", type(value).__name__
    )
  _checks.in_range(fn, name, value, low, high, **bounds)


def check_temperature(fn: str, temperature: Any) -> None:
  """0 < temperature < inf."""
  _checks.in_range(
    fn, "temperature", temperature, 0, math.inf, open_low=True, open_high=True
  )


def check_logits(fn: str, **logits: Any) -> None:
  """Floating [*b, v], v >= 1; in debug mode no NaN, no +inf, no dead row."""
  _checks.floating(fn, **logits)
  for name, array in logits.items():
    if array is None:
      continue
    _checks.min_rank(fn, name, array, 1, "[*b, v]")
    if jnp.shape(array)[-1] == 0:
      _checks.fail(fn, name, "[*b, v] with v >= 1", list(jnp.shape(array)))
    _checks.holds(
      fn,
      name,
      array,
      lambda x: jnp.where(jnp.isnan(x), False, x < jnp.inf),
      "free of NaN and +inf",
    )
    _checks.holds(
      fn,
      name,
      array,
      lambda x: jnp.any(x > -jnp.inf, axis=-1),
      "above -inf for at least one token of every row",
    )


def trim(fn: str, vocab_size: int | None, **logits: Any) -> list[Any]:
  """The logits of the common tokens, after the check that they correspond."""
  check_logits(fn, **logits)
  given = {k: a for k, a in logits.items() if a is not None}
  sizes = {k: jnp.shape(a)[-1] for k, a in given.items()}
  first = next(iter(given))
  for name, array in given.items():
    if jnp.shape(array)[:-1] != jnp.shape(given[first])[:-1]:
      _checks.fail(
        fn,
        name,
        f"[*b, v] with *b={list(jnp.shape(given[first])[:-1])} like {first}",
        list(jnp.shape(array)),
      )
  if vocab_size is None:
    if len(set(sizes.values())) > 1:
      words = ", ".join(f"{k} has v={n}" for k, n in sizes.items())
      raise ValueError(
        f"{fn}: logits must share one vocabulary, got {words}: pass"
        f" vocab_size={min(sizes.values())} (or the tokenizer's own size) to"
        " trim the padding columns before the softmax"
      )
  else:
    check_number(fn, "vocab_size", vocab_size, 1, min(sizes.values()))
  return [
    None if a is None else jnp.asarray(a)[..., :vocab_size]
    for a in logits.values()
  ]


def check_support(
  fn: str, inner: str, log_inner: Array, outer: str, log_outer: Array
) -> None:
  """Debug mode: no mass of `inner` where `outer` has none (KL inf)."""
  _checks.holds(
    fn,
    f"{outer}_logits",
    (log_outer > -jnp.inf) | (log_inner == -jnp.inf),
    lambda ok: ok,
    f"above -inf wherever {inner}_logits is",
  )


def promote(*arrays: Any) -> list[Any]:
  """Arrays in their widest dtype, at least float32; None is passed over."""
  # By hand: under strict promotion JAX refuses to name the wider of the two.
  dtypes = [jnp.asarray(a).dtype for a in arrays if a is not None]
  dtype = jnp.float64 if jnp.float64 in dtypes else jnp.float32
  return [None if a is None else jnp.asarray(a).astype(dtype) for a in arrays]


def log_probs(logits: Array, temperature: Any = 1.0) -> Array:
  """log softmax(logits / temperature); -inf stays -inf."""
  temperature = jnp.asarray(temperature, logits.dtype)
  return jax.nn.log_softmax(logits / temperature, axis=-1)


def weighted(log_weights: Array, values: Array) -> Array:
  """exp(log_weights) values, 0 where the weight is 0 whatever the value is."""
  support = log_weights > -jnp.inf
  return jnp.where(support, jnp.exp(log_weights), 0) * jnp.where(
    support, values, 0
  )


def expectation(log_weights: Array, values: Array) -> Array:
  """sum exp(log_weights) values over the last axis, where weights are not 0.

  `values` may be infinite or NaN where the weight is 0.
  """
  return jnp.sum(weighted(log_weights, values), axis=-1)


def log_ratio(log_p: Array, log_q: Array) -> Array:
  """log p - log q, 0 where p is 0 (also where both are)."""
  support = log_p > -jnp.inf
  return jnp.where(support, log_p, 0) - jnp.where(support, log_q, 0)


@jax.custom_jvp
def kl(log_p: Array, log_q: Array) -> Array:
  """KL(p||q) over the last axis; +inf where q is 0 and p is not."""
  return expectation(log_p, log_ratio(log_p, log_q))


# Written out, here and for the JSD: of the graph of selects that guards the
# values, reverse mode would keep several arrays of the vocabulary's width.
def _kl_jvp(primals, tangents):
  log_p, log_q = primals
  d_p, d_q = tangents
  out = jnp.zeros_like(log_p[..., 0])
  if not isinstance(d_p, SymbolicZero):
    out += jnp.sum(weighted(log_p, log_ratio(log_p, log_q) + 1) * d_p, axis=-1)
  if not isinstance(d_q, SymbolicZero):
    out -= jnp.sum(jnp.exp(log_p) * d_q, axis=-1)
  return kl(log_p, log_q), out


kl.defjvp(_kl_jvp, symbolic_zeros=True)


def log_mix(log_p: Array, log_q: Array, weight: Any) -> Array:
  """log(weight p + (1 - weight) q), 0 < weight < 1, -inf where both are 0."""
  top = jax.lax.stop_gradient(jnp.maximum(log_p, log_q))
  alive = top > -jnp.inf
  top = jnp.where(alive, top, 0)
  mixed = weight * jnp.exp(log_p - top) + (1 - weight) * jnp.exp(log_q - top)
  return jnp.where(alive, jnp.log(jnp.where(alive, mixed, 1)) + top, -jnp.inf)


def jsd(log_q: Array, log_p: Array, beta: Any) -> Array:
  """beta KL(p||m) + (1-beta) KL(q||m), m = beta p + (1-beta) q.

  beta = 0 is KL(p||q) and beta = 1 is KL(q||p), not the limits, which are 0.
  """
  if beta == 0:
    return kl(log_p, log_q)
  if beta == 1:
    return kl(log_q, log_p)
  return _interior_jsd(log_q, log_p, beta)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _interior_jsd(log_q: Array, log_p: Array, beta: float) -> Array:
  """`jsd` for 0 < beta < 1."""
  log_m = log_mix(log_p, log_q, beta)
  return jnp.sum(
    beta * weighted(log_p, log_ratio(log_p, log_m))
    + (1 - beta) * weighted(log_q, log_ratio(log_q, log_m)),
    axis=-1,
  )


def _jsd_jvp(beta, primals, tangents):
  log_q, log_p = primals
  log_m = log_mix(log_p, log_q, beta)
  out = jnp.zeros_like(log_q[..., 0])
  # What the mixture's tangent adds is what the weights' own tangents take away.
  for log_w, share, d in (
    (log_q, 1 - beta, tangents[0]),
    (log_p, beta, tangents[1]),
  ):
    if not isinstance(d, SymbolicZero):
      slope = share * weighted(log_w, log_ratio(log_w, log_m))
      out += jnp.sum(slope * d, axis=-1)
  return _interior_jsd(log_q, log_p, beta), out


_interior_jsd.defjvp(_jsd_jvp, symbolic_zeros=True)


def log1mexp(x: Array) -> Array:
  """log(1 - exp(x)) for x <= 0, -inf at 0, accurate at both ends."""
  near = x > -math.log(2.0)
  dead = x >= 0
  small = jnp.where(near & ~dead, x, -1)
  large = jnp.where(near, -1, x)
  out = jnp.where(near, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))
  return jnp.where(dead, -jnp.inf, out)


def take(values: Array, ids: Array) -> Array:
  """values[..., ids[..., k]] -> [..., k]."""
  return jnp.take_along_axis(values, ids, axis=-1)


def with_tail(log_p: Array, ids: Array) -> Array:
  """[*b, v] log-probabilities -> [*b, k+1]: those of `ids`, then the rest.

  The rest is a log-sum-exp over the other tokens, not log(1 - sum of the kept):
  it keeps its relative accuracy however small it is. With k = v there is none
  and the answer is [*b, k].
  """
  kept = take(log_p, ids)
  if ids.shape[-1] == log_p.shape[-1]:
    return kept
  rest = jnp.put_along_axis(log_p, ids, -jnp.inf, axis=-1, inplace=False)
  return jnp.concatenate([kept, logsumexp(rest)[..., None]], axis=-1)


def logsumexp(x: Array) -> Array:
  """log sum exp over the last axis; -inf, with gradient 0, of an empty row."""
  top = jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))
  alive = top > -jnp.inf
  total = jnp.sum(jnp.exp(x - jnp.where(alive, top, 0)), axis=-1)
  alive = alive[..., 0]
  return jnp.where(
    alive, jnp.log(jnp.where(alive, total, 1)) + top[..., 0], -jnp.inf
  )


def renormalized(log_p: Array, ids: Array) -> Array:
  """[*b, v] log-probabilities -> [*b, k]: those of `ids`, summing to 1."""
  return jax.nn.log_softmax(take(log_p, ids), axis=-1)
