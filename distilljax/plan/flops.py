"""FLOPs of a traced program, loops counted as often as they run.

The compiler's own figure (`cost_analysis()["flops"]`) is no guide here: it
counts the body of a loop once, so a network of scanned layers looks like one
layer and an accumulation over eight micro-batches like one of them; it is of
one chip after partitioning; and kernels (Mosaic, Triton) are in it as nothing.
So the program is counted before it is compiled, in JAX's own form:

* matrix products and convolutions only, two FLOPs a multiplication and addition
  (elementwise work is bound by memory and is in no roofline of FLOPs);
* a scan's body times its length, a branch as its dearest alternative;
* a `while` whose bounds are numbers as often as it runs; any other once, and it
  is named in `unknown_loops`;
* what no result depends on is left out, as the compiler does;
* what rematerialisation computes again is in the program and so in the number;
* the body of a `shard_map` once a device, of a Pallas kernel once a grid point;
* our attention and output heads as their plain formulas would cost: a causal
  mask halves it as the mask does (kernels skip blocks, so run a little more).

The number is of all chips together, for work that is divided without rest;
where a rule makes chips repeat each other's work, they run more.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core as jex_core
from jax.interpreters import partial_eval

from distilljax.kernels.jvp_attention import primitives as attention
from distilljax.kernels.linear_head import primitives as linear_head
from distilljax.typing import Number


class Flops(NamedTuple):
  """What was counted.

  Attributes:
    products: of matrix products (`dot_general`).
    convolutions: of convolutions.
    kernels: of attention and output heads, whatever computes them.
    unknown_loops: loops that were counted once, by where they stand.
  """

  products: float = 0.0
  convolutions: float = 0.0
  kernels: float = 0.0
  unknown_loops: tuple[str, ...] = ()

  @property
  def total(self) -> Number:
    """FLOPs of the whole program."""
    return self.products + self.convolutions + self.kernels

  def plus(self, other: "Flops") -> "Flops":
    """One after the other."""
    return Flops(*(a + b for a, b in zip(self, other)))

  def times(self, n: Number) -> "Flops":
    """`n` times; the names of loops stand once."""
    return Flops(
      *(n * x for x in self[:3]), self.unknown_loops if n else ()
    )

  def as_kernels(self) -> "Flops":
    """The same, counted as the inside of a kernel."""
    return Flops(0.0, 0.0, self.total, self.unknown_loops)


def count(jaxpr: Any) -> Flops:
  """FLOPs of a traced program.

  Args:
    jaxpr: a (closed) jaxpr: `jax.make_jaxpr(fn)(*args)`, or
      `jax.jit(fn).trace(*args).jaxpr`.

  Returns:
    Its FLOPs on all devices together.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> layer = lambda x, w: (x @ w, None)
    >>> fn = lambda x, w: jax.lax.scan(layer, x, w)[0]
    >>> count(jax.make_jaxpr(fn)(jnp.ones((4, 8)), jnp.ones((3, 8, 8)))).total
    1536.0
  """
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _count(jaxpr)


def _count(jaxpr: Any) -> Flops:
  out = Flops()
  for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    out = out.plus(_equation(equation))
  return out


def _equation(equation) -> Flops:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    return Flops(products=_dot(equation))
  if name == "conv_general_dilated":
    return Flops(convolutions=_convolution(equation))
  if name == "scan":
    return _count(params["jaxpr"]).times(params["length"])
  if name == "while":
    return _while(equation)
  if name == "cond":
    return max(map(_count, params["branches"]), key=lambda f: f.total)
  if name == "shard_map":
    shape = params["mesh"].shape
    axes = params["newly_manual_axes"]
    return _count(params["jaxpr"]).times(math.prod(shape[a] for a in axes))
  if name == "pallas_call":
    grid = [n for n in params["grid_mapping"].grid if isinstance(n, int)]
    return _count(params["jaxpr"]).times(math.prod(grid)).as_kernels()
  if equation.primitive in attention._SLOTS:
    return _attention(equation)
  if equation.primitive in linear_head._FUNCTIONS:
    fn = linear_head._FUNCTIONS[equation.primitive]
    return _traced(lambda *x: fn(*x, **params), equation).as_kernels()
  out = Flops()
  for value in params.values():
    if isinstance(value, (jex_core.Jaxpr, jex_core.ClosedJaxpr)):
      out = out.plus(_count(value))
  return out


def _traced(fn, equation) -> Flops:
  """FLOPs of `fn` on arrays like those of an equation."""
  shapes = [
    jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars
  ]
  return count(jax.make_jaxpr(fn)(*shapes))


def _dot(equation) -> Number:
  (contract, _), _ = equation.params["dimension_numbers"]
  left = equation.invars[0].aval.shape
  inner = math.prod(left[i] for i in contract)
  return 2.0 * math.prod(equation.outvars[0].aval.shape) * inner


def _convolution(equation) -> Number:
  """Products with what padding and dilation put in are not counted."""
  params = equation.params
  numbers = params["dimension_numbers"]
  x, kernel = (v.aval.shape for v in equation.invars)
  out = equation.outvars[0].aval.shape
  pairs = 1
  for i, (low, _) in enumerate(params["padding"]):
    n = x[numbers.lhs_spec[2 + i]]
    at = (
      np.arange(out[numbers.out_spec[2 + i]])[:, None]
      * params["window_strides"][i]
      + np.arange(kernel[numbers.rhs_spec[2 + i]])[None]
      * params["rhs_dilation"][i]
      - low
    )
    gap = params["lhs_dilation"][i]
    pairs *= int(
      np.sum((at >= 0) & (at <= (n - 1) * gap) & (at % gap == 0))
    )
  batch, features = (out[numbers.out_spec[i]] for i in (0, 1))
  inputs = kernel[numbers.rhs_spec[1]]
  return 2.0 * pairs * batch * features * inputs


def _attention(equation) -> Flops:
  """As plain formulas in one block; a causal mask leaves out what it hides."""
  params = dict(equation.params)
  spec = params.pop("spec")
  n, m = (v.aval.shape[2] for v in equation.invars[:2])
  plain = dataclasses.replace(
    spec,
    implementation="xla",
    causal=False,
    rows=n,
    columns=m,
    axis=None,
    parts=1,
    zigzag=False,
  )
  fn = attention._function(equation.primitive, plain, params)
  # Where a mesh axis cuts the sequence, own rows meet the columns of all.
  found = _traced(fn, equation).times(spec.parts)
  if spec.causal:
    n, m = n * spec.parts, m * spec.parts
    seen = np.clip(np.arange(n) + 1 + m - n, 0, m).sum()
    found = found.times(float(seen) / (n * m))
  return found.as_kernels()


def _number(x) -> int | None:
  """The value of a literal, None for anything else."""
  value = getattr(x, "val", None)
  return int(value) if value is not None and np.ndim(value) == 0 else None


def _trips(equation) -> int | None:
  """How often a while runs whose counter goes from a number up to a number."""
  params = equation.params
  condition, body = params["cond_jaxpr"].jaxpr, params["body_jaxpr"].jaxpr
  if len(condition.eqns) != 1 or condition.eqns[0].primitive.name != "lt":
    return None
  start = equation.invars[params["cond_nconsts"] + params["body_nconsts"] :]
  own = condition.invars[params["cond_nconsts"] :]
  inside = body.invars[params["body_nconsts"] :]
  counter, limit = condition.eqns[0].invars
  if counter not in own:
    return None
  i = own.index(counter)
  end = _number(limit)
  if end is None and limit in own:
    j = own.index(limit)
    end = _number(start[j]) if body.outvars[j] is inside[j] else None
  begin = _number(start[i])
  steps = [
    _number(e.invars[1])
    for e in body.eqns
    if e.primitive.name == "add"
    and e.invars[0] is inside[i]
    and e.outvars[0] is body.outvars[i]
  ]
  if begin is None or end is None or len(steps) != 1 or not steps[0]:
    return None
  return max(0, -(-(end - begin) // steps[0]))


def _while(equation) -> Flops:
  body = _count(equation.params["body_jaxpr"])
  trips = _trips(equation)
  if trips is not None:
    return body.times(trips)
  if not body.total:
    return body
  where = str(equation.source_info.name_stack) or "while"
  return body._replace(unknown_loops=(*body.unknown_loops, where))
