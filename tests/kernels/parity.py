"""Interpreted kernels against the oracle: what the tests of all chips share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import kernels
from distilljax.kernels.jvp_attention import primitives
from distilljax.kernels.jvp_attention import spec as spec_lib
from tests.kernels import oracle
from tests.kernels.attention_test import TRANSFORMS


def f32(tree):
  return {k: jnp.asarray(a, jnp.float32) for k, a in tree.items()}


def near(ours, theirs, bound, name):
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs)
  finite = np.isfinite(theirs)
  assert (np.isneginf(ours) == np.isneginf(theirs)).all(), name
  error = np.abs(ours[finite] - theirs[finite]).max()
  assert error <= bound * np.abs(theirs[finite]).max(), f"{name}: {error:.1e}"


def swap(a):
  return jnp.swapaxes(a, 1, 2)


def implementation(module):
  return module.__name__.rpartition(".")[2]


def operands(module, p):
  """(spec, what attention is a function of) of a problem, in float32."""
  x, options = f32(p["x"]), p["options"]
  spec = spec_lib.Spec(
      implementation(module), p["x"]["q"].shape[-1] ** -0.5,
      options["causal"], bias="bias" in x, segments="q_segment_ids" in options,
  )  # fmt: skip
  found = [swap(x["q"]), swap(x["k"]), swap(x["v"])]
  if spec.bias:
    found.append(x["bias"])
  if spec.segments:
    found += [
        jnp.asarray(options[f"{side}_segment_ids"], jnp.int32)
        for side in ("q", "kv")
    ]
  return spec, found


def check_first_order(module, p, bound=3e-6):
  """Value, both ways to the tangent, and the gradients."""
  p["t"] = {k: a * (k != "bias") for k, a in p["t"].items()}
  theirs = oracle.solve(p)
  spec, x = operands(module, p)
  t = f32(p["t"])
  tangents = [swap(t[c]) for c in "qkv"]
  do, dl = (swap(jnp.asarray(p[n], jnp.float32)) for n in ("do", "dl"))

  @jax.jit
  def run(x, t, do, dl):
    first = module.fused(spec, "qkv", *x, *t)
    o, lse = module.forward(spec, *x)
    second = (o, lse, *module.tangent(spec, "qkv", *x, o, lse, *t))
    dx = module.backward(
        spec, "qkv", *x, o, lse, do, jnp.where(jnp.isfinite(lse), dl, 0.0)
    )
    return first, second, dx

  first, second, dx = run(x, tangents, do, dl)
  for results in (first, second):
    for result, a in zip(("o", "lse", "to", "mu"), results, strict=True):
      near(swap(a), theirs[result], bound, result)
  for letter, a in zip("qkv", dx, strict=True):
    near(swap(a), theirs["dx"][letter], bound, f"d{letter}")


def check_huge_scores(module, sizes):
  """Scores of ten thousand, and a bias whose exponential overflows."""
  p = oracle.problem(
      5, **sizes, std=30.0, bias=(1, 1, 1, sizes["m"]), causal=True
  )
  p["x"]["bias"] = p["x"]["bias"] + 100.0
  # S, lse, their difference and its factor log2(e) are rounded, each by 2^-24
  # of the largest score at most.
  q, k = (np.abs(p["x"][c]).max() for c in "qk")
  largest = q * k * p["x"]["q"].shape[-1] ** 0.5
  check_first_order(module, p, 4 * 2.0**-24 * largest)


def check_second_order(module, p, wrt, out, bound=3e-6):
  """The gradients `out` of the tangent along `wrt`."""
  p["t"] = {k: a * (k in wrt) for k, a in p["t"].items()}
  theirs = oracle.solve(p)
  spec, x = operands(module, p)
  rows = [
      swap(jnp.asarray(a, jnp.float32))
      for a in (theirs["o"], theirs["lse"], p["do"], p["dl"])
  ]
  tangents = [swap(f32(p["t"])[c]) for c in wrt]
  found = jax.jit(
      functools.partial(module.second_backward, spec, wrt, out)
  )(*x, *rows[:2], *tangents, *rows[2:])
  for letter, a in zip(out, found, strict=True):
    near(swap(a), theirs["ddx"][letter], bound, f"d{letter}")
  if wrt == "v":
    assert (np.asarray(found[out.index("v")]) == 0).all()


def check_transform(module, name, bound=1e-5):
  """A transform of JAX against the same of the reference."""
  width = lambda *x: [jnp.pad(a, [(0, 0)] * 3 + [(0, 61)])[..., :64] for a in x]

  def attend(which):
    def f(q, k, v):
      q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
      e = v.shape[-1]
      o = kernels.attention(
          *width(q, k, v), causal=True, scale=0.5, implementation=which
      )
      return o[..., :e]

    return f

  transform = TRANSFORMS[name]
  ours, theirs = jax.jit(
      lambda: (
          transform(attend(implementation(module))),
          transform(attend("reference")),
      )
  )()
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    near(a, b, bound, name)


def check_values_far_from_zero(module, sizes):
  """bfloat16: what the centre of the values is for."""
  p = oracle.problem(2, **sizes)
  low = lambda a: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64)
  p["x"]["v"] = p["x"]["v"] + 3.0
  for tree in ("x", "t"):
    p[tree] = {k: low(a) for k, a in p[tree].items()}
  theirs = oracle.solve(p)
  arrays = lambda tree: {
      k: jnp.asarray(a, jnp.bfloat16) for k, a in tree.items()
  }
  o, to = jax.jit(
      lambda x, t: jax.jvp(
          lambda x: kernels.attention(
              **x, implementation=implementation(module)
          ),
          (x,), (t,),
      )
  )(arrays(p["x"]), arrays(p["t"]))  # fmt: skip
  assert o.dtype == to.dtype == jnp.bfloat16
  norm = np.linalg.norm
  error = lambda a, b: norm(np.asarray(a, np.float64) - b) / norm(b)
  assert error(o, theirs["o"]) < 3e-3
  # The card: 4.9e-3 without a centre in this case, 2.1e-3 with one.
  assert error(to, theirs["to"]) < 3e-3


def products(module, wrt):
  """Matrix products of the fused kernel."""
  spec = spec_lib.Spec(implementation(module), 0.125)
  fn = functools.partial(module.fused, spec, wrt)
  arrays = [jnp.ones((1, 1, 128, 64))] * (3 + len(wrt))
  return str(jax.make_jaxpr(fn)(*arrays)).count("dot_general")


def text_of_second_backward(module):
  """The program of reverse over forward."""
  spec = spec_lib.Spec(implementation(module), 0.125)
  x = [jnp.ones((1, 1, 128, 64))] * 3
  row = jnp.ones((1, 1, 128))
  fn = primitives._function(
      primitives.jbwd_p, spec, {"wrt": "qkv", "out": "qkv"}
  )
  return str(jax.make_jaxpr(fn)(*x, x[0], row, *x, x[0], row))
