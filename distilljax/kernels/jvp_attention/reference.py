"""Attention in plain jax.numpy: quadratic memory, every derivative JAX has.

Nothing here is a primitive of ours and no derivative is written down, so that
the other implementations can be held against JAX's own differentiation.
"""

import jax
import jax.numpy as jnp

from distilljax.kernels.jvp_attention import spec as spec_lib


def forward(
    spec: spec_lib.Spec, *x: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """softmax(scale q k' + bias) v and its log-sum-exp, in at least float32.

  Args:
    spec: the attention.
    *x: what it is a function of.

  Returns:
    (o [B, H, N, E] in the dtype of v, lse [B, H, N]).
  """
  dtype = spec_lib.accumulator(x[0].dtype)
  q, k, v = (a.astype(dtype) for a in x[:3])
  groups = q.shape[1] // k.shape[1]
  k, v = jnp.repeat(k, groups, axis=1), jnp.repeat(v, groups, axis=1)
  score = spec.scale * jnp.einsum(
      "bhnd,bhmd->bhnm", q, k, precision=jax.lax.Precision.HIGHEST
  )
  if spec.bias:
    score = score + spec.bias_of(x).astype(dtype)
  rows = jnp.arange(q.shape[2], dtype=jnp.int32)
  columns = jnp.arange(k.shape[2], dtype=jnp.int32)
  ids = spec.segments_of(x) or (None, None)
  ok = spec_lib.allowed(spec, x, rows, columns, *ids)
  if ok is not None:
    ok = jnp.broadcast_to(ok, score.shape)
    score = jnp.where(ok, score, -jnp.inf)
  top = jax.lax.stop_gradient(jnp.max(score, axis=-1, keepdims=True))
  top = jnp.where(jnp.isneginf(top), jnp.zeros_like(top), top)
  score = score - top
  if ok is not None:
    # The slope of exp at -inf is 0, but that of -inf - -inf is not a number.
    score = jnp.where(ok, score, jnp.zeros_like(score))
  p = jnp.exp(score)
  if ok is not None:
    p = jnp.where(ok, p, jnp.zeros_like(p))
  total = jnp.sum(p, axis=-1, keepdims=True)
  empty = total == 0
  safe = jnp.where(empty, jnp.ones_like(total), total)
  o = jnp.einsum(
      "bhnm,bhme->bhne", p / safe, v, precision=jax.lax.Precision.HIGHEST
  )
  lse = jnp.where(empty, -jnp.inf, top + jnp.log(safe))[..., 0]
  return o.astype(x[2].dtype), lse
