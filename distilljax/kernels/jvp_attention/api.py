"""`attention` and `attention_jvp`: checks, choice of implementation, layout."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distilljax import _checks
from distilljax.kernels import platform
from distilljax.kernels.jvp_attention import primitives, reference
from distilljax.kernels.jvp_attention import spec as spec_lib
from distilljax.typing import Array, Float, Int, Number

IMPLEMENTATIONS = ("pallas_tpu", "pallas_gpu", "xla", "reference")
# What is tried where nothing is asked for, by platform.
DEFAULTS = {
    "tpu": ("pallas_tpu", "xla"),
    "gpu": ("pallas_gpu", "xla"),
    "cuda": ("pallas_gpu", "xla"),
    "cpu": ("xla",),
}
_HEAD_WIDTHS = (64, 128, 256)

Implementation = str | Sequence[str] | None


def _cannot(name: str, q: Any, v: Any) -> tuple[str, str, Any] | None:
  """(argument, expected, got) where an implementation cannot do the case."""
  if name in primitives.KERNELS:
    for argument, array in (("q", q), ("v", v)):
      if array.shape[-1] not in _HEAD_WIDTHS:
        return (
            argument,
            f"of head width 64, 128 or 256 for {name!r} ('xla' supports any)",
            array.shape[-1],
        )
    if q.dtype not in (jnp.float32, jnp.bfloat16):
      return (
          "q",
          f"float32 or bfloat16 for {name!r} ('xla' supports any)",
          q.dtype.name,
      )
    wide = max(q.shape[-1], v.shape[-1]) > 128
    if name == "pallas_gpu" and wide and q.dtype == jnp.float32:
      return (
          "q",
          "bfloat16 at head width 256 for 'pallas_gpu' ('xla' supports any)",
          q.dtype.name,
      )
  return None


def _choose(fn: str, implementation: Implementation, q: Any, v: Any) -> str:
  """The first implementation that can do the case."""
  if implementation is None:
    order = DEFAULTS.get(platform.platform(), ("xla",))
  elif isinstance(implementation, str):
    order = (implementation,)
  else:
    order = tuple(implementation)
    if not order:
      _checks.fail(fn, "implementation", "a name or a list of names", "[]")
  for name in order:
    _checks.one_of(fn, "implementation", name, IMPLEMENTATIONS)
  reasons = []
  for name in order:
    reason = _cannot(name, q, v)
    if reason is None:
      if reasons:
        argument, expected, got = reasons[0]
        spec_lib.warn_once(
            f"{fn}: falls back to {name!r}: {argument} must be {expected}, got"
            f" {got}"
        )
      return name
    reasons.append(reason)
  return _checks.fail(fn, *reasons[0])


def _check(fn, q, k, v, bias, q_ids, kv_ids, scale):
  for name, a, dims in (
      ("q", q, "[b, n, h, d]"),
      ("k", k, "[b, m, h_kv, d]"),
      ("v", v, "[b, m, h_kv, e]"),
  ):
    _checks.rank(fn, name, a, 4, dims)
  _checks.floating(fn, q=q, k=k, v=v, bias=bias)
  _checks.nonempty(fn, q=q, k=k, v=v)
  for name, a in (("k", k), ("v", v)):
    if a.dtype != q.dtype:
      raise TypeError(
          f"{fn}: {name} must be {q.dtype.name} like q, got {a.dtype.name}"
      )
  b, n, h, d = q.shape
  m, kv_heads = k.shape[1:3]
  expected = (b, m, kv_heads, d)
  _checks.shape(fn, "k", k, expected, "[b, m, h_kv, d]", "q")
  _checks.shape(
      fn, "v", v, (b, m, kv_heads, v.shape[3]), "[b, m, h_kv, e]", "k"
  )
  if h % kv_heads:
    _checks.fail(
        fn, "q", f"of a number of heads that is a multiple of k's {kv_heads}", h
    )
  if bias is not None:
    _checks.rank(fn, "bias", bias, 4, "[b, h, n, m]")
    full = (b, h, n, m)
    if any(s not in (1, f) for s, f in zip(bias.shape, full)):
      _checks.fail(
          fn,
          "bias",
          f"broadcastable to [b, h, n, m]={list(full)}",
          list(bias.shape),
      )
  if (q_ids is None) != (kv_ids is None):
    missing = "q_segment_ids" if q_ids is None else "kv_segment_ids"
    _checks.fail(fn, missing, "given with the other segment ids", None)
  if q_ids is not None:
    _checks.integer(fn, q_segment_ids=q_ids, kv_segment_ids=kv_ids)
    _checks.shape(fn, "q_segment_ids", q_ids, (b, n), "[b, n]", "q")
    _checks.shape(fn, "kv_segment_ids", kv_ids, (b, m), "[b, m]", "k")
  if scale is not None:
    if not _checks.is_number(scale):
      raise TypeError(
          f"{fn}: scale must be a number or None, got {type(scale).__name__}"
      )
    _checks.finite(fn, scale=scale)


def _segment_ids(q_ids, kv_ids):
  """The ids as arrays of int32, or nothing."""
  if q_ids is None:
    return []
  return [jnp.asarray(ids).astype(jnp.int32) for ids in (q_ids, kv_ids)]


def _heads_first(a):
  return jnp.swapaxes(a, 1, 2)


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h_kv d"],
    v: Float[Array, "b m h_kv e"],
    *,
    bias: Float[Array, "bb hb nb mb"] | None = None,
    causal: bool = False,
    q_segment_ids: Int[Array, "b n"] | None = None,
    kv_segment_ids: Int[Array, "b m"] | None = None,
    scale: Number | None = None,
    implementation: str | Sequence[str] | None = None,
    return_lse: bool = False,
) -> Float[Array, "b n h e"] | tuple[Array, Array]:
  """softmax(scale q k' + bias) v, differentiable in both modes and twice.

  S_ij = scale q_i . k_j + bias_ij where row i sees column j, -inf elsewhere;
  o_i = sum_j exp(S_ij - lse_i) v_j with lse_i = log sum_j exp(S_ij). Row i sees
  j if all of these hold: j <= i + m - n (`causal`: bottom-right aligned, the
  last row sees everything), and equal segment ids. A row that sees nothing has
  o = 0, lse = -inf and tangents 0. Sums and statistics are at least float32.

  `jax.jvp`, `jax.grad`, `jax.linearize`, `jax.vmap`, `jax.checkpoint`,
  `jax.shard_map`, forward over reverse, reverse over forward and hvp work
  as for any function; under `jax.jvp` value and tangent come from one pass. A
  third derivative is refused, but for implementation="reference".

  Implementations: "xla" works in blocks (memory linear in n and m, any
  backend, all masks, a differentiated bias); "pallas_tpu" and "pallas_gpu"
  (CUDA, by Triton) are kernels (head widths 64, 128, 256; no derivative in the
  bias; forward over forward by "xla"; on several devices inside `jax.shard_map`
  or by `sharded_attention` only), proved interpreted and compiled for chips but
  never run on one;
  "reference" is plain jax.numpy, quadratic in memory, in at least float32 at
  highest precision.

  Args:
    q: queries. Shape [b, n, h, d].
    k: keys. Shape [b, m, h_kv, d], h a multiple of h_kv: query head i reads key
      head i // (h / h_kv). Same dtype as q.
    v: values, their width may differ. Shape [b, m, h_kv, e]. Same dtype as q.
    bias: added to the scaled scores. Shape [b, h, n, m], any of them may be 1.
    causal: whether later columns are hidden, bottom-right aligned.
    q_segment_ids: segment of each query. Shape [b, n]. Padding is a segment.
    kv_segment_ids: segment of each key. Shape [b, m].
    scale: factor of q . k; None is d^(-1/2).
    implementation: a name, or names in the order of preference (a fallback
      gives one warning); None picks by the platform.
    return_lse: whether lse is returned too.

  Returns:
    o, shape [b, n, h, e], dtype of q; with `return_lse` (o, lse), lse of shape
    [b, n, h] and at least float32.

  Raises:
    ValueError: shapes that do not fit, an unknown implementation, or one that
      cannot do the case (the message names one that can).
    TypeError: dtypes that are not floating (ids: integer) or differ.
    NotImplementedError: a third derivative, or one in the bias of a kernel.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> q = jnp.ones((1, 3, 2, 4))
    >>> o, tangent = jax.jvp(lambda q: attention(q, q, q), (q,), (q,))
    >>> o.shape, tangent.shape
    ((1, 3, 2, 4), (1, 3, 2, 4))

  References:
    Lu, Song, Simplifying, Stabilizing and Scaling Continuous-Time Consistency
    Models, 2024, arXiv:2410.11081, the JVP of attention in one online pass.
    Departures: the tangent is itself differentiable, which a flow map's
    Lagrangian loss needs, and masks, a bias and grouped heads are supported.
  """
  fn = "attention"
  q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
  bias = None if bias is None else jnp.asarray(bias)
  _check(fn, q, k, v, bias, q_segment_ids, kv_segment_ids, scale)
  spec = spec_lib.Spec(
      implementation=_choose(fn, implementation, q, v),
      scale=float(q.shape[-1] ** -0.5 if scale is None else scale),
      causal=bool(causal),
      bias=bias is not None,
      segments=q_segment_ids is not None,
      fallback=implementation is None,
  )
  x = [_heads_first(q), _heads_first(k), _heads_first(v)]
  if bias is not None:
    x.append(bias)
  x += _segment_ids(q_segment_ids, kv_segment_ids)
  if spec.implementation == "reference":
    o, lse = reference.forward(spec, *x)
  else:
    o, lse = primitives.attention(spec, *x)
  o = _heads_first(o)
  return (o, _heads_first(lse)) if return_lse else o


def attention_jvp(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h_kv d"],
    v: Float[Array, "b m h_kv e"],
    tq: Float[Array, "b n h d"] | None,
    tk: Float[Array, "b m h_kv d"] | None,
    tv: Float[Array, "b m h_kv e"] | None,
    *,
    bias: Float[Array, "bb hb nb mb"] | None = None,
    causal: bool = False,
    q_segment_ids: Int[Array, "b n"] | None = None,
    kv_segment_ids: Int[Array, "b m"] | None = None,
    scale: Number | None = None,
    implementation: str | Sequence[str] | None = None,
    return_lse: bool = False,
) -> tuple[Any, Any]:
  """Attention and its tangent, for models that carry both streams themselves.

  With S, P, lse as in `attention` and tS = scale (tq k' + q tk'):
  to = P tv + (P (tS - mu)) v, and mu = sum_j P tS is the tangent of lse. The
  same as `jax.jvp` of `attention`, in one pass; a tangent that is None is zero
  and costs nothing (cross-attention to a fixed context: tk = tv = None needs 4
  products instead of 6). Both results are differentiable.

  Args:
    q: queries. Shape [b, n, h, d].
    k: keys. Shape [b, m, h_kv, d].
    v: values. Shape [b, m, h_kv, e].
    tq: tangent of q, or None for zero.
    tk: tangent of k, or None for zero.
    tv: tangent of v, or None for zero.
    bias: see `attention`; its tangent is zero.
    causal: see `attention`.
    q_segment_ids: see `attention`.
    kv_segment_ids: see `attention`.
    scale: see `attention`.
    implementation: see `attention`.
    return_lse: whether the log-sum-exp and its tangent are returned too.

  Returns:
    (o, to), both [b, n, h, e]; with `return_lse` ((o, lse), (to, mu)).

  Raises:
    ValueError: as `attention`, and no tangent at all or one of another shape.
    TypeError: as `attention`, and a tangent of another dtype.

  References:
    Lu, Song, Simplifying, Stabilizing and Scaling Continuous-Time Consistency
    Models, 2024, arXiv:2410.11081.
  """
  fn = "attention_jvp"
  primals = {"q": jnp.asarray(q), "k": jnp.asarray(k), "v": jnp.asarray(v)}
  tangents = {
      name: jnp.asarray(t)
      for name, t in (("q", tq), ("k", tk), ("v", tv))
      if t is not None
  }
  if not tangents:
    _checks.fail(fn, "tq, tk, tv", "not all None", None)
  for name, t in tangents.items():
    _checks.same_shape(fn, **{name: primals[name], f"t{name}": t})
    if t.dtype != primals[name].dtype:
      raise TypeError(
          f"{fn}: t{name} must be {primals[name].dtype.name} like {name}, got"
          f" {t.dtype.name}"
      )

  def along(moving):
    return attention(
        **{**primals, **moving},
        bias=bias,
        causal=causal,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        scale=scale,
        implementation=implementation,
        return_lse=return_lse,
    )

  return jax.jvp(along, ({n: primals[n] for n in tangents},), (tangents,))
