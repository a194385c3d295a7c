"""The primitives of attention: a family that is closed under differentiation.

| primitive | operands -> results | jvp | transpose |
|---|---|---|---|
| att | x -> o, lse | tan (or fused) | - |
| tan | x, o, lse; t -> to, mu | t: tan; x: tan2 | bwd |
| bwd | x, o, lse; do, dl -> gradients | do, dl: bwd; x: jbwd | tan |
| tan2 | x, o, lse; t, d -> d(to, mu) | t, d: tan2 | jbwd |
| jbwd | x, o, lse; t; do, dl -> gradients | t, do, dl: jbwd | jbwd, tan2 |
| fused | x; t -> o, lse, to, mu | tan, tan2 | - |

x is (q, k, v) with bias and segment ids where there are any, t and d hold only
the tangents that are not zero (the letters of `wrt` and `along`), and gradients
are those of the letters asked for: a gradient in a subset computes no other.
The derivative of tan2 and jbwd in x would be of third order and is refused.

o and lse are always those of x, so `tan2` and `jbwd` carry the whole derivative
and nothing is ever propagated through o and lse as operands. Second derivatives
of o are symmetric, which is why `jbwd` is its own transpose in t.

`att` differentiates as `fused` (one kernel for value and tangent) where JAX
lets a rule be split afterwards, which needs hooks that are not public; without
them it is `att` then `tan`, with the same numbers.
"""

import contextlib
import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core
from jax.interpreters import ad, batching, mlir

from distilljax.kernels.jvp_attention import spec as spec_lib

try:
  from jax._src.core import new_jaxpr_eqn as _new_eqn
  from jax._src.interpreters.ad import primitive_linearizations as _linearize
  from jax._src.interpreters.partial_eval import (
      SaveableType as _Saveable,
  )
  from jax._src.interpreters.partial_eval import (
      custom_partial_eval_rules as _partial_eval,
  )
  from jax._src.interpreters.partial_eval import (
      dce_rules as _dce,
  )
  from jax._src.interpreters.partial_eval import (
      ensure_enum as _policy,
  )
  from jax._src.interpreters.partial_eval import (
      partial_eval_jaxpr_custom_rules as _partial_eval_jaxpr,
  )

  HOOKS = True
except ImportError:
  HOOKS = False

try:
  from jax._src.config import _check_vma
except ImportError:
  _check_vma = None

# Implementations whose slots are kernels: no derivative in the bias.
KERNELS = ("pallas_tpu", "pallas_gpu")


def _primitive(name: str) -> jex_core.Primitive:
  p = jex_core.Primitive(f"jvp_attention_{name}")
  p.multiple_results = True
  return p


att_p = _primitive("att")
tan_p = _primitive("tan")
bwd_p = _primitive("bwd")
tan2_p = _primitive("tan2")
jbwd_p = _primitive("jbwd")
fused_p = _primitive("fused")

# Function of an implementation's module that computes a primitive, and the
# names of its parameters beside the spec.
_SLOTS = {
    att_p: ("forward", ()),
    tan_p: ("tangent", ("wrt",)),
    bwd_p: ("backward", ("wrt",)),
    tan2_p: ("second_tangent", ("wrt", "along")),
    jbwd_p: ("second_backward", ("wrt", "out")),
    fused_p: ("fused", ("wrt",)),
}


def _function(primitive, spec, params):
  """What computes a primitive, named so that it shows in a program's text."""
  slot, names = _SLOTS[primitive]
  package = __name__.rpartition(".")[0]
  name = spec.implementation if spec.axis is None else "ring"
  module = importlib.import_module(f"{package}.{name}")
  if not hasattr(module, slot):  # a slot that has no kernel of its own
    module = importlib.import_module(f"{package}.xla")
  fn = functools.partial(
      getattr(module, slot), spec, *(params[n] for n in names)
  )
  named = lambda *operands: fn(*operands)
  named.__name__ = named.__qualname__ = primitive.name
  return named


@functools.cache
def _jitted(primitive, spec, items):
  return jax.jit(_function(primitive, spec, dict(items)))


def _eager(primitive, *operands, spec, **params):
  return _jitted(primitive, spec, tuple(sorted(params.items())))(*operands)


def _cannot_lower(spec, context):
  """Why a kernel cannot be part of this program, or None."""
  if spec.implementation not in KERNELS:
    return None
  package = __name__.rpartition(".")[0]
  module = importlib.import_module(f"{package}.{spec.implementation}")
  for platform in context.platforms:
    if not module.runs_on(platform):
      return f"'xla' or 'reference' on {platform}"
  devices = getattr(context.axis_context, "num_devices", None) or 1
  if devices > 1:
    return f"'xla' or inside jax.shard_map on {devices} devices"
  return None


def _lower(primitive, ctx, *operands, spec, **params):
  expected = _cannot_lower(spec, ctx.module_context)
  if expected is not None:
    text = f"implementation must be {expected}, got {spec.implementation!r}"
    if not spec.fallback:
      raise ValueError(f"attention: {text}")
    spec_lib.warn_once(f"attention: falls back to 'xla': {text}")
    spec = dataclasses.replace(spec, implementation="xla")
  fn = _jitted(primitive, spec, tuple(sorted(params.items())))
  return lower_plain(fn, ctx, *operands)


def lower_plain(fn, ctx, *operands):
  """Lowers a function whose program knows nothing of the mesh's axes."""
  plain = [jax.core.ShapedArray(a.shape, a.dtype) for a in ctx.avals_in]
  outs = [jax.core.ShapedArray(a.shape, a.dtype) for a in ctx.avals_out]
  rule = mlir.lower_fun(lambda *a: list(fn(*a)), multiple_results=True)
  return rule(ctx.replace(avals_in=plain, avals_out=outs), *operands)


def untyped():
  """For collectives in such a program, whose arrays vary over no axis."""
  return contextlib.nullcontext() if _check_vma is None else _check_vma(False)


# --- shapes and mesh axes ------------------------------------------------


def _varying(aval: Any) -> frozenset:
  axis_type = getattr(aval, "mat", None)
  if axis_type is None:
    return getattr(aval, "vma", None) or frozenset()
  return axis_type.varying


def align(operands):
  """Makes all operands vary over the same manual axes of a shard_map."""
  varying = [_varying(jax.typeof(a)) for a in operands]
  union = frozenset().union(*varying)
  return [
      jax.lax.pcast(a, tuple(sorted(union - v)), to="varying")
      if union - v else a
      for a, v in zip(operands, varying)
  ]  # fmt: skip


def _bind(primitive, *operands, **params):
  return primitive.bind(*align(operands), **params)


def _aval(like, shape, dtype, operands):
  union = frozenset().union(*(_varying(a) for a in operands))
  if not union:
    return jax.core.ShapedArray(shape, dtype)
  spec = jax.sharding.PartitionSpec(*([None] * len(shape)))
  return jax.core.ShapedArray(
      shape,
      dtype,
      sharding=like.sharding.update(spec=spec),
      manual_axis_type=like.mat.update(varying=union),
  )


def _row_results(operands, *, spec, **params):
  """(o or to, lse or mu), once or twice."""
  del params
  q, v = operands[0], operands[2]
  o = (*q.shape[:3], v.shape[3])
  return [
      _aval(q, o, v.dtype, operands),
      _aval(q, q.shape[:3], spec_lib.accumulator(q.dtype), operands),
  ]


def _gradient_results(operands, *, spec, wrt=None, out=None):
  x = dict(zip(spec.letters, operands))
  letters = wrt if out is None else out
  return [_aval(x["q"], x[c].shape, x[c].dtype, operands) for c in letters]


for _p in (att_p, tan_p, tan2_p):
  _p.def_abstract_eval(lambda *a, **params: _row_results(a, **params))
fused_p.def_abstract_eval(lambda *a, **params: 2 * _row_results(a, **params))
for _p in (bwd_p, jbwd_p):
  _p.def_abstract_eval(lambda *a, **params: _gradient_results(a, **params))
for _p in _SLOTS:
  _p.def_impl(functools.partial(_eager, _p))
  mlir.register_lowering(_p, functools.partial(_lower, _p))


# --- forward mode --------------------------------------------------------


def _is_zero(t):
  return isinstance(t, ad.Zero)


def _letters(spec, tangents):
  """The letters whose tangent is not zero, and those tangents."""
  found = [
      (c, t)
      for c, t in zip(spec.letters, tangents)
      if not _is_zero(t)
  ]
  wrt = "".join(c for c, _ in found)
  spec_lib.no_derivative(spec, wrt, KERNELS)
  return wrt, [t for _, t in found]


def _dense(tangents):
  return [ad.instantiate_zeros(t) for t in tangents]


def _sum(terms, outs):
  """Sum of lists of tangents, zeros where there is none."""
  if not terms:
    return [ad.Zero(jax.typeof(o).to_tangent_aval()) for o in outs]
  return list(functools.reduce(lambda a, b: map(ad.add_tangents, a, b), terms))


def _att_jvp(primals, tangents, *, spec):
  wrt, t = _letters(spec, tangents)
  if HOOKS:
    o, lse, to, mu = _bind(fused_p, *primals, *t, spec=spec, wrt=wrt)
  else:
    o, lse = _bind(att_p, *primals, spec=spec)
    to, mu = _bind(tan_p, *primals, o, lse, *t, spec=spec, wrt=wrt)
  return [o, lse], [to, mu]


def _tan_jvp(primals, tangents, *, spec, wrt):
  n = spec.size + 2
  base, t = primals[:n], primals[n:]
  outs = _bind(tan_p, *primals, spec=spec, wrt=wrt)
  terms = []
  along, d = _letters(spec, tangents)
  if along:
    terms.append(
        _bind(tan2_p, *base, *t, *d, spec=spec, wrt=wrt, along=along)
    )
  if any(not _is_zero(a) for a in tangents[n:]):
    terms.append(
        _bind(tan_p, *base, *_dense(tangents[n:]), spec=spec, wrt=wrt)
    )
  return outs, _sum(terms, outs)


def _bwd_jvp(primals, tangents, *, spec, wrt):
  n = spec.size + 2
  base, cotangents = primals[:n], primals[n:]
  outs = _bind(bwd_p, *primals, spec=spec, wrt=wrt)
  terms = []
  along, d = _letters(spec, tangents)
  if along:
    terms.append(
        _bind(jbwd_p, *base, *d, *cotangents, spec=spec, wrt=along, out=wrt)
    )
  if any(not _is_zero(a) for a in tangents[n:]):
    terms.append(
        _bind(bwd_p, *base, *_dense(tangents[n:]), spec=spec, wrt=wrt)
    )
  return outs, _sum(terms, outs)


def _tan2_jvp(primals, tangents, *, spec, wrt, along):
  if _letters(spec, tangents)[0]:
    spec_lib.third_order(spec)
  n, m = spec.size + 2, spec.size + 2 + len(wrt)
  base, t, d = primals[:n], primals[n:m], primals[m:]
  params = {"spec": spec, "wrt": wrt, "along": along}
  outs = _bind(tan2_p, *primals, **params)
  terms = []
  if any(not _is_zero(a) for a in tangents[n:m]):
    terms.append(_bind(tan2_p, *base, *_dense(tangents[n:m]), *d, **params))
  if any(not _is_zero(a) for a in tangents[m:]):
    terms.append(_bind(tan2_p, *base, *t, *_dense(tangents[m:]), **params))
  return outs, _sum(terms, outs)


def _jbwd_jvp(primals, tangents, *, spec, wrt, out):
  if _letters(spec, tangents)[0]:
    spec_lib.third_order(spec)
  n, m = spec.size + 2, spec.size + 2 + len(wrt)
  base, t, cotangents = primals[:n], primals[n:m], primals[m:]
  params = {"spec": spec, "wrt": wrt, "out": out}
  outs = _bind(jbwd_p, *primals, **params)
  terms = []
  if any(not _is_zero(a) for a in tangents[n:m]):
    new = _dense(tangents[n:m])
    terms.append(_bind(jbwd_p, *base, *new, *cotangents, **params))
  if any(not _is_zero(a) for a in tangents[m:]):
    terms.append(_bind(jbwd_p, *base, *t, *_dense(tangents[m:]), **params))
  return outs, _sum(terms, outs)


def _fused_jvp(primals, tangents, *, spec, wrt):
  x, t = primals[: spec.size], primals[spec.size :]
  o, lse, to, mu = outs = _bind(fused_p, *primals, spec=spec, wrt=wrt)
  first, second = [], []
  along, d = _letters(spec, tangents)
  if along:
    first.append(_bind(tan_p, *x, o, lse, *d, spec=spec, wrt=along))
    second.append(
        _bind(tan2_p, *x, o, lse, *t, *d, spec=spec, wrt=wrt, along=along)
    )
  if any(not _is_zero(a) for a in tangents[spec.size :]):
    new = _dense(tangents[spec.size :])
    second.append(_bind(tan_p, *x, o, lse, *new, spec=spec, wrt=wrt))
  return outs, [*_sum(first, (o, lse)), *_sum(second, (to, mu))]


ad.primitive_jvps[att_p] = _att_jvp
ad.primitive_jvps[tan_p] = _tan_jvp
ad.primitive_jvps[bwd_p] = _bwd_jvp
ad.primitive_jvps[tan2_p] = _tan2_jvp
ad.primitive_jvps[jbwd_p] = _jbwd_jvp
ad.primitive_jvps[fused_p] = _fused_jvp


# --- reverse mode --------------------------------------------------------


def _wanted(letters, operands):
  """The letters whose operand is being solved for."""
  return "".join(
      c for c, a in zip(letters, operands) if ad.is_undefined_primal(a)
  )


def _spread(letters, operands, wanted, found):
  """Cotangents in the places of the operands, None elsewhere."""
  found = dict(zip(wanted, found))
  return [found.get(c) for c, _ in zip(letters, operands)]


def _zeros_for(operands):
  return [
      ad.Zero(a.aval.to_cotangent_aval()
              if hasattr(a.aval, "to_cotangent_aval")
              else a.aval.to_ct_aval())
      if ad.is_undefined_primal(a) else None
      for a in operands
  ]  # fmt: skip


def _transpose(rule):
  """Nothing comes back of nothing."""

  @functools.wraps(rule)
  def wrapped(cotangents, *operands, **params):
    if all(_is_zero(c) for c in cotangents):
      return _zeros_for(operands)
    return rule(cotangents, *operands, **params)

  return wrapped


@_transpose
def _tan_transpose(cotangents, *operands, spec, wrt):
  n = spec.size + 2
  base, t = operands[:n], operands[n:]
  wanted = _wanted(wrt, t)
  found = _bind(bwd_p, *base, *_dense(cotangents), spec=spec, wrt=wanted)
  return [None] * n + _spread(wrt, t, wanted, found)


@_transpose
def _bwd_transpose(cotangents, *operands, spec, wrt):
  n = spec.size + 2
  base, rows = operands[:n], operands[n:]
  along = "".join(c for c, t in zip(wrt, cotangents) if not _is_zero(t))
  t = [t for t in cotangents if not _is_zero(t)]
  found = _bind(tan_p, *base, *t, spec=spec, wrt=along)
  return [None] * n + [
      c if ad.is_undefined_primal(a) else None for a, c in zip(rows, found)
  ]


@_transpose
def _tan2_transpose(cotangents, *operands, spec, wrt, along):
  n, m = spec.size + 2, spec.size + 2 + len(wrt)
  base, t, d = operands[:n], operands[n:m], operands[m:]
  cotangents = _dense(cotangents)
  wanted = _wanted(along, d)
  if wanted:
    found = _bind(
        jbwd_p, *base, *t, *cotangents, spec=spec, wrt=wrt, out=wanted
    )
    return [None] * m + _spread(along, d, wanted, found)
  wanted = _wanted(wrt, t)
  found = _bind(
      jbwd_p, *base, *d, *cotangents, spec=spec, wrt=along, out=wanted
  )
  return [None] * n + _spread(wrt, t, wanted, found) + [None] * len(d)


@_transpose
def _jbwd_transpose(cotangents, *operands, spec, wrt, out):
  n, m = spec.size + 2, spec.size + 2 + len(wrt)
  base, t, rows = operands[:n], operands[n:m], operands[m:]
  along = "".join(c for c, a in zip(out, cotangents) if not _is_zero(a))
  d = [a for a in cotangents if not _is_zero(a)]
  wanted = _wanted(wrt, t)
  if wanted:
    found = _bind(jbwd_p, *base, *d, *rows, spec=spec, wrt=along, out=wanted)
    return [None] * n + _spread(wrt, t, wanted, found) + [None] * 2
  found = _bind(tan2_p, *base, *t, *d, spec=spec, wrt=wrt, along=along)
  return [None] * m + [
      c if ad.is_undefined_primal(a) else None for a, c in zip(rows, found)
  ]


ad.primitive_transposes[tan_p] = _tan_transpose
ad.primitive_transposes[bwd_p] = _bwd_transpose
ad.primitive_transposes[tan2_p] = _tan2_transpose
ad.primitive_transposes[jbwd_p] = _jbwd_transpose


# --- batching ------------------------------------------------------------


def _kinds(primitive, spec, params):
  """"bias" or "rows" for each operand: how its leading axis is to be read."""
  kinds = ["rows"] * spec.size
  if spec.bias:
    kinds[3] = "bias"
  tangent_kinds = lambda s: ["bias" if c == "b" else "rows" for c in s]
  if primitive is not att_p and primitive is not fused_p:
    kinds += ["rows"] * 2
  if primitive is not bwd_p:
    kinds += tangent_kinds(params.get("wrt", ""))
  kinds += tangent_kinds(params.get("along", ""))
  if primitive in (bwd_p, jbwd_p):
    kinds += ["rows"] * 2
  return kinds


def _batch(primitive, operands, dims, *, spec, **params):
  """A mapped axis is more batch rows: B becomes size * B."""
  x, t = operands[: spec.size], operands[spec.size :]
  if primitive is fused_p and all(d is None for d in dims[: spec.size]):
    # The value must stay without the axis, as it would outside of vmap.
    o, lse = _bind(att_p, *x, spec=spec)
    outs, out_dims = _batch(
        tan_p,
        (*x, o, lse, *t),
        (*dims[: spec.size], None, None, *dims[spec.size :]),
        spec=spec,
        **params,
    )
    return [o, lse, *outs], [None, None, *out_dims]
  size = next(
      a.shape[d] for a, d in zip(operands, dims) if d is not None
  )
  kinds = _kinds(primitive, spec, params)
  q_dim = dims[0]
  batch = x[0].shape[0 if q_dim is None else (1 if q_dim == 0 else 0)]
  gradients = primitive in (bwd_p, jbwd_p)
  letters = params.get("out", params["wrt"]) if gradients else ""
  bias_is_mapped = "b" in letters or any(
      kind == "bias" and d is not None for kind, d in zip(kinds, dims)
  )
  bias_rows = None
  folded = []
  for a, d, kind in zip(operands, dims, kinds):
    if d is not None:
      a = jnp.moveaxis(a, d, 0)
    rows = a.shape[0 if d is None else 1]
    if kind == "bias":
      bias_rows = rows
      if not bias_is_mapped and rows == 1:
        folded.append(a)
        continue
    if d is None:
      a = jnp.broadcast_to(a[None], (size, *a.shape))
    if rows != batch:
      a = jnp.broadcast_to(a, (size, batch, *a.shape[2:]))
    folded.append(a.reshape(size * batch, *a.shape[2:]))
  outs = _bind(primitive, *folded, spec=spec, **params)
  unfolded = []
  for i, a in enumerate(outs):
    a = a.reshape(size, batch, *a.shape[1:])
    if gradients and letters[i] == "b" and bias_rows != batch:
      a = jnp.sum(a, axis=1, keepdims=True)
    unfolded.append(a)
  return unfolded, [0] * len(outs)


for _p in _SLOTS:
  batching.primitive_batchers[_p] = functools.partial(_batch, _p)


# --- splitting `fused` again ---------------------------------------------


def _att_linearize(is_vjp, nonzeros, *primals, spec):
  """The value now, `tan` later: a gradient runs no fused kernel."""
  del is_vjp
  wrt = "".join(c for c, nz in zip(spec.letters, nonzeros) if nz)
  spec_lib.no_derivative(spec, wrt, KERNELS)
  o, lse = _bind(att_p, *primals, spec=spec)

  def linear(residuals, *tangents):
    t = [
        ad.instantiate_zeros(t) for c, t in zip(spec.letters, tangents)
        if c in wrt
    ]  # fmt: skip
    return _bind(tan_p, *residuals, *t, spec=spec, wrt=wrt)

  return [o, lse], [True, True], [*primals, o, lse], linear


def _fused_partial_eval(trace, *tracers, spec, wrt):
  known = [t.pval.get_known() for t in tracers]
  if all(a is not None for a in known):
    return _bind(fused_p, *known, spec=spec, wrt=wrt)
  x = known[: spec.size]
  if any(a is None for a in x):
    return trace.default_process_primitive(
        fused_p, tracers, {"spec": spec, "wrt": wrt}
    )
  o, lse = _bind(att_p, *x, spec=spec)
  staged = (*x, o, lse, *tracers[spec.size :])
  return [
      o, lse, *trace.default_process_primitive(
          tan_p, staged, {"spec": spec, "wrt": wrt}
      ),
  ]  # fmt: skip


def _as_att(eqn):
  """The equation of `att` for the first two results of one of `fused`."""
  n = eqn.params["spec"].size
  return _new_eqn(
      eqn.invars[:n], eqn.outvars[:2], att_p, {"spec": eqn.params["spec"]},
      eqn.effects, eqn.source_info, eqn.ctx,
  )  # fmt: skip


def _fused_partial_eval_jaxpr(saveable, unknown, instantiated, eqn):
  """Known x: `att` now; the tangent with whatever it needs later."""
  n = eqn.params["spec"].size
  missing = lambda atoms, inst: [
      a for a, i in zip(atoms, inst)
      if not i and not isinstance(a, jex_core.Literal)
  ]
  if any(unknown[:n]):
    new = missing(eqn.invars, instantiated)
    return None, eqn, [True] * 4, [True] * 4, new
  which = att_p if any(unknown) else fused_p
  avals = [a.aval for a in eqn.invars[: n if any(unknown) else None]]
  params = {"spec": eqn.params["spec"]}
  params = params if any(unknown) else eqn.params
  saved = isinstance(_policy(saveable(which, *avals, **params)), _Saveable)
  new = missing(eqn.invars, instantiated)
  if not any(unknown):
    if saved:
      return eqn, None, [False] * 4, [False] * 4, []
    return eqn, eqn, [False] * 4, [True] * 4, new
  if not saved:
    out_unknown = [False, False, True, True]
    return _as_att(eqn), eqn, out_unknown, [True] * 4, new
  o, lse, to, mu = eqn.outvars
  staged = _new_eqn(
      [*eqn.invars[:n], o, lse, *eqn.invars[n:]], [to, mu], tan_p, eqn.params,
      eqn.effects, eqn.source_info, eqn.ctx,
  )  # fmt: skip
  out_instantiated = [False, False, True, True]
  return (
      _as_att(eqn), staged, [False, False, True, True], out_instantiated,
      [*new, o, lse],
  )  # fmt: skip


def _fused_dce(used, eqn):
  n = eqn.params["spec"].size
  if not any(used):
    return [False] * len(eqn.invars), None
  if any(used[2:]):
    return [True] * len(eqn.invars), eqn
  return [i < n for i in range(len(eqn.invars))], _as_att(eqn)


if HOOKS:
  _linearize[att_p] = _att_linearize
  _partial_eval[fused_p] = _fused_partial_eval
  _partial_eval_jaxpr[fused_p] = _fused_partial_eval_jaxpr
  _dce[fused_p] = _fused_dce


# --- entry ---------------------------------------------------------------


def attention(spec: spec_lib.Spec, *x: jax.Array):
  """(o, lse) of x, head-major, differentiable twice in either mode."""
  return _bind(att_p, *x, spec=spec)
