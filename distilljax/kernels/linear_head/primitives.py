"""Derivatives of the statistics of `xla`, in both modes.

`statistics` is a `jax.custom_jvp`: its rule is the primitive `tangent`, which
is linear in the tangents of the student's head and whose transpose is the
primitive `backward`. Both loop over chunks of the vocabulary, so a gradient or
a `jax.jvp` holds no [n, v].

rows (maxima, log-normalisers, e) are those of the operands, a constant of the
first derivative. The derivative of `tangent` and `backward` in the operands is
the whole one: JAX's own forward mode through the loops, with rows computed
anew. So forward over reverse (a Hessian times a vector) is lean as well;
reverse over reverse is right and keeps arrays of [n, v].

Under shard_map nothing here adds over the shards but the psum of per-token
tangents: its transpose, and that of making the hidden states vary over the
shards, are JAX's.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core
from jax.interpreters import ad, batching, mlir

from distilljax.kernels.linear_head import xla

TRAINED = ("s_hidden", "s_kernel", "s_bias")


def _row_names(spec: xla.Spec) -> tuple[str, ...]:
  """Names of `rows`, in order."""
  keys = [*spec.compared]
  if spec.rested:
    keys.append("rest")
  for m in spec.plain:
    key = m if spec.temperature == 1 and m in spec.compared else f"{m}1"
    if key not in keys:
      keys.append(key)
  names = [f"{a}_{k}" for k in keys for a in "mg"]
  if spec.kind is not None:
    names.append("e")
  if "entropy" in spec.outputs:
    names.append("entropy")
  return tuple(names)


def _split(spec, wrt, operands, last):
  """Flat operands of a primitive -> (x, rows, tangents or cotangents)."""
  i = len(spec.inputs)
  names = _row_names(spec)
  j = i + len(names)
  return (
    dict(zip(spec.inputs, operands[:i])),
    dict(zip(names, operands[i:j])),
    dict(zip(last, operands[j:])),
  )


def _tangent(*operands, spec, wrt):
  x, rows, t = _split(spec, wrt, operands, wrt)
  out = xla.tangent(spec, wrt, x, rows, t)
  return [out[k] for k in spec.outputs]


def _backward(*operands, spec, wrt):
  x, rows, cotangents = _split(spec, wrt, operands, spec.outputs)
  out = xla.backward(spec, wrt, x, rows, cotangents)
  return [out[k] for k in wrt]


tangent_p = jex_core.Primitive("linear_head_tangent")
backward_p = jex_core.Primitive("linear_head_backward")
_FUNCTIONS = {tangent_p: _tangent, backward_p: _backward}


@functools.cache
def _jitted(primitive, spec, wrt):
  fn = functools.partial(_FUNCTIONS[primitive], spec=spec, wrt=wrt)
  named = lambda *operands: fn(*operands)
  named.__name__ = named.__qualname__ = primitive.name
  return jax.jit(named)


def _eager(primitive, *operands, spec, wrt):
  return _jitted(primitive, spec, wrt)(*operands)


def _lower(primitive, ctx, *operands, spec, wrt):
  fn = _jitted(primitive, spec, wrt)
  # The program of one device knows nothing of the mesh's axes.
  plain = [jax.core.ShapedArray(a.shape, a.dtype) for a in ctx.avals_in]
  outs = [jax.core.ShapedArray(a.shape, a.dtype) for a in ctx.avals_out]
  rule = mlir.lower_fun(lambda *a: list(fn(*a)), multiple_results=True)
  return rule(ctx.replace(avals_in=plain, avals_out=outs), *operands)


def _bind(primitive, *operands, spec, wrt):
  return primitive.bind(*xla.align(operands), spec=spec, wrt=wrt)


def _results(primitive, *operands, spec, wrt):
  plain = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands]
  fn = functools.partial(_FUNCTIONS[primitive], spec=spec, wrt=wrt)
  union = frozenset().union(*(_varying(a) for a in operands))
  like = operands[0]
  outs = []
  for a in jax.eval_shape(fn, *plain):
    if not union:
      outs.append(jax.core.ShapedArray(a.shape, a.dtype))
      continue
    cut = jax.sharding.PartitionSpec(*([None] * len(a.shape)))
    outs.append(
      jax.core.ShapedArray(
        a.shape,
        a.dtype,
        sharding=like.sharding.update(spec=cut),
        manual_axis_type=like.mat.update(varying=union),
      )
    )
  return outs


def _varying(aval):
  axis_type = getattr(aval, "mat", None)
  if axis_type is None:
    return getattr(aval, "vma", None) or frozenset()
  return axis_type.varying


# --- forward mode --------------------------------------------------------


def _plain(spec):
  """The same without a kernel, which has no derivative of its own."""
  return dataclasses.replace(spec, implementation="xla")


def _whole(primitive, spec, wrt, fixed):
  """The primitive as a function of x alone: rows follow x."""

  def fn(x):
    rows = xla.evaluate(_plain(spec), x)[2]
    names = _row_names(spec)
    flat = [x[k] for k in spec.inputs] + [rows[k] for k in names]
    operands = xla.align([*flat, *fixed])
    return _FUNCTIONS[primitive](*operands, spec=spec, wrt=wrt)

  return fn


def _jvp(primitive, primals, tangents, *, spec, wrt):
  i = len(spec.inputs)
  j = i + len(_row_names(spec))
  outs = _bind(primitive, *primals, spec=spec, wrt=wrt)
  terms = []
  moved = {
    k: t
    for k, t in zip(spec.inputs, tangents[:i])
    if k in TRAINED and not isinstance(t, ad.Zero)
  }
  if moved:
    x = dict(zip(spec.inputs, primals[:i]))
    whole = _whole(primitive, spec, wrt, primals[j:])
    along = {k: x[k] for k in moved}
    terms.append(
      jax.jvp(lambda a: whole({**x, **a}), (along,), (moved,))[1]
    )
  if any(not isinstance(t, ad.Zero) for t in tangents[j:]):
    t = [ad.instantiate_zeros(t) for t in tangents[j:]]
    terms.append(_bind(primitive, *primals[:j], *t, spec=spec, wrt=wrt))
  if not terms:
    return outs, [ad.Zero(jax.typeof(o).to_tangent_aval()) for o in outs]
  return outs, [functools.reduce(jnp.add, t) for t in zip(*terms)]


# --- reverse mode --------------------------------------------------------


def _only(spec, kept, base):
  """(spec, its operands and rows) with the kept outputs alone."""
  outputs = tuple(k for k, keep in zip(spec.outputs, kept) if keep)
  if outputs == spec.outputs:
    return spec, base
  fewer = dataclasses.replace(spec, outputs=outputs, extras=())
  i = len(spec.inputs)
  rows = dict(zip(_row_names(spec), base[i:]))
  return fewer, (*base[:i], *(rows[k] for k in _row_names(fewer)))


def _transpose(primitive, cotangents, *operands, spec, wrt):
  """`tangent` and `backward` are each other's transpose."""
  j = len(spec.inputs) + len(_row_names(spec))
  base, linear = operands[:j], operands[j:]
  zero = lambda a: (
    ad.Zero(a.aval.to_cotangent_aval()
            if hasattr(a.aval, "to_cotangent_aval")
            else a.aval.to_ct_aval())
    if ad.is_undefined_primal(a) else None
  )  # fmt: skip
  if all(isinstance(c, ad.Zero) for c in cotangents):
    return [zero(a) for a in operands]
  if primitive is tangent_p:
    # Nobody pays for the slopes of what is only logged.
    kept = [not isinstance(c, ad.Zero) for c in cotangents]
    spec, base = _only(spec, kept, base)
    cotangents = [c for c, k in zip(cotangents, kept) if k]
  cotangents = [ad.instantiate_zeros(c) for c in cotangents]
  if primitive is tangent_p:
    asked = tuple(
      k for k, a in zip(wrt, linear) if ad.is_undefined_primal(a)
    )
    found = _bind(backward_p, *base, *cotangents, spec=spec, wrt=asked)
    found = dict(zip(asked, found))
    return [None] * j + [found.get(k) for k in wrt]
  found = _bind(tangent_p, *base, *cotangents, spec=spec, wrt=wrt)
  return [None] * j + [
    c if ad.is_undefined_primal(a) else None for a, c in zip(linear, found)
  ]


def _batch(primitive, operands, dims, *, spec, wrt):
  """One mapped member after the other: chunks stay as small as they are."""
  moved = [
    a if d is None else jnp.moveaxis(a, d, 0) for a, d in zip(operands, dims)
  ]
  mapped = [a for a, d in zip(moved, dims) if d is not None]

  def one(members):
    members = iter(members)
    full = [a if d is None else next(members) for a, d in zip(moved, dims)]
    return _bind(primitive, *full, spec=spec, wrt=wrt)

  outs = jax.lax.map(one, mapped)
  return outs, [0] * len(outs)


for _p in _FUNCTIONS:
  _p.multiple_results = True
  _p.def_impl(functools.partial(_eager, _p))
  _p.def_abstract_eval(functools.partial(_results, _p))
  mlir.register_lowering(_p, functools.partial(_lower, _p))
  ad.primitive_jvps[_p] = functools.partial(_jvp, _p)
  ad.primitive_transposes[_p] = functools.partial(_transpose, _p)
  batching.primitive_batchers[_p] = functools.partial(_batch, _p)


# --- entry ---------------------------------------------------------------


# Jitted for eager callers: a loop is compiled once a spec, not once a call.
_compiled = jax.jit(xla.evaluate, static_argnums=0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_kernel(spec, x):
  return _compiled(spec, x)


@_by_kernel.defjvp
def _by_kernel_jvp(spec, primals, tangents):
  """A second derivative goes through the chunks: a kernel has none."""
  return jax.jvp(
    functools.partial(xla.evaluate, _plain(spec)), primals, tangents
  )


def _evaluate(spec, x):
  fn = _compiled if spec.implementation == "xla" else _by_kernel
  return fn(spec, x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _custom(spec, trained, frozen):
  return _evaluate(spec, {**trained, **frozen})[:2]


def _custom_jvp(spec, primals, tangents):
  trained, frozen = primals
  outputs, extras, rows = _evaluate(spec, {**trained, **frozen})
  rows = jax.lax.stop_gradient(rows)
  zero = jax.custom_derivatives.SymbolicZero
  t = {k: a for k, a in tangents[0].items() if not isinstance(a, zero)}
  wrt = tuple(k for k in TRAINED if k in t)
  if wrt:
    x = {**trained, **jax.lax.stop_gradient(frozen)}
    local = _bind(
      tangent_p,
      *(x[k] for k in spec.inputs),
      *(rows[k] for k in _row_names(spec)),
      *(t[k] for k in wrt),
      spec=spec,
      wrt=wrt,
    )
    if spec.axis is not None:
      local = jax.lax.psum(local, spec.axis)
    moved = dict(zip(spec.outputs, local))
  else:
    moved = {k: jnp.zeros_like(a) for k, a in outputs.items()}
  return (outputs, extras), (moved, jax.tree.map(_no_tangent, extras))


def _no_tangent(a):
  if jnp.issubdtype(a.dtype, jnp.floating):
    return jnp.zeros_like(a)
  return np.zeros(a.shape, jax.dtypes.float0)


_custom.defjvp(_custom_jvp, symbolic_zeros=True)


def statistics(
  spec: xla.Spec, x: dict[str, jax.Array]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """(outputs, extras) of `xla.evaluate`; outputs are differentiable."""
  trained = {k: x[k] for k in spec.inputs if k in TRAINED}
  frozen = {k: x[k] for k in spec.inputs if k not in TRAINED}
  outputs, extras = _custom(spec, trained, jax.lax.stop_gradient(frozen))
  return outputs, jax.lax.stop_gradient(extras)
