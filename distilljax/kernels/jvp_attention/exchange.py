"""All-to-all of several arrays as one collective, in both modes.

`split_heads` gives every device of an axis the whole sequence of some heads,
`split_sequence` gives it back. Each result is a linear function of its own
operand alone, but they travel in one message; under `jax.jvp` so do values and
tangents, which takes the same hooks of JAX as `primitives.py` (without them:
one message for the values and one for the tangents).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex_core
from jax.interpreters import ad, batching, mlir

from distilljax.kernels.jvp_attention import primitives

# Operands [B, N, H, W] -> [B, parts N, H / parts, W], or back.
exchange_p = jex_core.Primitive("jvp_attention_exchange")
exchange_p.multiple_results = True


def split_heads(axis: str, parts: int, *arrays: jax.Array) -> list[jax.Array]:
  """[b, n, h, w] of a device's rows to [b, parts n, h / parts, w]."""
  return _bind(*arrays, axis=axis, parts=parts, heads=True)


def split_sequence(
    axis: str, parts: int, *arrays: jax.Array
) -> list[jax.Array]:
  """The inverse of `split_heads`."""
  return _bind(*arrays, axis=axis, parts=parts, heads=False)


def _bind(*arrays, **params):
  return exchange_p.bind(*primitives.align(arrays), **params)


def _result(shape, parts, heads):
  b, n, h, w = shape
  if heads:
    return b, n * parts, h // parts, w
  return b, n // parts, h * parts, w


def _run(*arrays, axis, parts, heads):
  """The exchange, in one collective for arrays of one dtype."""
  width = math.gcd(*(a.shape[3] for a in arrays))
  # The axis that is cut goes first, and comes back as the other one.
  cut, join = (2, 1) if heads else (1, 2)
  sent, shapes = [], []
  for a in arrays:
    shape = list(a.shape)
    shape[cut] //= parts
    a = jnp.moveaxis(a.reshape(*a.shape[:cut], parts, *shape[cut:]), cut, 0)
    sent.append(a.reshape(parts, -1, width))
    shapes.append(shape)
  whole = jnp.concatenate(sent, axis=1)
  with primitives.untyped():
    whole = lax.all_to_all(whole, axis, 0, 0, tiled=True)
  outs, start = [], 0
  for a, shape, piece in zip(arrays, shapes, sent):
    part = whole[:, start : start + piece.shape[1]]
    start += piece.shape[1]
    part = jnp.moveaxis(part.reshape(parts, *shape), 0, join)
    outs.append(part.reshape(_result(a.shape, parts, heads)))
  return outs


def _abstract(*arrays, axis, parts, heads):
  del axis
  # pylint: disable-next=protected-access
  make = primitives._aval
  return [
      make(a, _result(a.shape, parts, heads), a.dtype, arrays) for a in arrays
  ]


def _lower(ctx, *operands, **params):
  run = functools.partial(_run, **params)
  return primitives.lower_plain(run, ctx, *operands)


exchange_p.def_abstract_eval(_abstract)
exchange_p.def_impl(lambda *a, **params: _run(*a, **params))
mlir.register_lowering(exchange_p, _lower)


# --- derivatives and batching --------------------------------------------


def _chosen(there, items):
  return [a for a, t in zip(items, there) if t]


def _spread(there, items, others):
  """`items` where `there` is true, `others` in turn where it is not."""
  items, others = iter(items), iter(others)
  return [next(items) if t else next(others) for t in there]


def _is_zero(t):
  return isinstance(t, ad.Zero)


def _zeros(avals):
  return [ad.Zero(a.to_tangent_aval()) for a in avals]


def _jvp(primals, tangents, **params):
  moving = [not _is_zero(t) for t in tangents]
  t, n = _chosen(moving, tangents), len(primals)
  if primitives.HOOKS:
    outs = _bind(*primals, *t, **params)
  else:
    outs = [*_bind(*primals, **params), *(_bind(*t, **params) if t else ())]
  still = [not m for m in moving]
  zeros = _zeros(_chosen(still, map(jax.typeof, outs[:n])))
  return outs[:n], _spread(moving, outs[n:], zeros)


def _transpose(cotangents, *operands, heads, **params):
  wanted = [
      ad.is_undefined_primal(a) and not _is_zero(c)
      for a, c in zip(operands, cotangents)
  ]
  found = ()
  if any(wanted):
    found = _bind(*_chosen(wanted, cotangents), heads=not heads, **params)
  return _spread(wanted, found, [None] * len(operands))


def _batch(operands, dims, **params):
  """A mapped axis is more batch rows, of the arrays that have it."""
  fold = lambda a: a.reshape(-1, *a.shape[2:])
  outs = _bind(
      *(
          a if d is None else fold(jnp.moveaxis(a, d, 0))
          for a, d in zip(operands, dims)
      ),
      **params,
  )
  return [
      out if d is None else out.reshape(a.shape[d], -1, *out.shape[1:])
      for out, a, d in zip(outs, operands, dims)
  ], [None if d is None else 0 for d in dims]


ad.primitive_jvps[exchange_p] = _jvp
ad.primitive_transposes[exchange_p] = _transpose
batching.primitive_batchers[exchange_p] = _batch


# --- splitting values from tangents again --------------------------------


def _linearize(is_vjp, nonzeros, *primals, **params):
  del is_vjp
  moving = list(nonzeros)
  outs = _bind(*primals, **params)
  avals = [jax.typeof(a) for a in outs]

  def linear(residuals, *tangents):
    del residuals
    t = map(ad.instantiate_zeros, _chosen(moving, tangents))
    still = [not m for m in moving]
    return _spread(moving, _bind(*t, **params), _zeros(_chosen(still, avals)))

  return outs, moving, [], linear


def _partial_eval(trace, *tracers, **params):
  known = [t.pval.get_known() for t in tracers]
  there = [a is not None for a in known]
  now = _bind(*_chosen(there, known), **params) if any(there) else ()
  later = _chosen([not t for t in there], tracers)
  if later:
    later = trace.default_process_primitive(exchange_p, later, params)
  return _spread(there, now, later)


def _part(eqn, there):
  """The equation of some of the operands, None of none."""
  if not any(there):
    return None
  # pylint: disable-next=protected-access
  return primitives._new_eqn(
      _chosen(there, eqn.invars), _chosen(there, eqn.outvars), exchange_p,
      eqn.params, eqn.effects, eqn.source_info, eqn.ctx,
  )  # fmt: skip


def _partial_eval_jaxpr(saveable, unknown, instantiated, eqn):
  """What is known now; the rest later, and with it what is not kept."""
  known = [not u for u in unknown]
  avals = [v.aval for v in _chosen(known, eqn.invars)]
  # pylint: disable=protected-access
  policy = primitives._policy(saveable(exchange_p, *avals, **eqn.params))
  saved = isinstance(policy, primitives._Saveable)
  # pylint: enable=protected-access
  staged = list(unknown) if saved else [True] * len(known)
  missing = [
      v
      for v, s, i in zip(eqn.invars, staged, instantiated)
      if s and not i and not isinstance(v, jex_core.Literal)
  ]
  return _part(eqn, known), _part(eqn, staged), list(unknown), staged, missing


def _dce(used, eqn):
  return list(used), _part(eqn, used)


if primitives.HOOKS:
  # pylint: disable=protected-access
  primitives._linearize[exchange_p] = _linearize
  primitives._partial_eval[exchange_p] = _partial_eval
  primitives._partial_eval_jaxpr[exchange_p] = _partial_eval_jaxpr
  primitives._dce[exchange_p] = _dce
