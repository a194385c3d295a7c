"""`kernels.attention`: values and two derivatives against NumPy and the card.

The reference implementation has no derivative of ours, so the transforms of
JAX are held against it; what no implementation may get wrong (masks, sizes,
statistics) is held against `oracle.py`.
"""

import doctest
import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from distilljax import kernels
from distilljax.kernels.jvp_attention import api, primitives, spec, xla
from tests.helpers import one_line_error
from tests.kernels import oracle

CASES = {
    "causal_cross": {
        "causal": True, "n": 4, "m": 9, "kv_heads": 1, "scale": 0.3,
    },
    # The first rows see nothing: m < n, bottom-right aligned.
    "causal_empty_rows": {"causal": True, "n": 8, "m": 5, "h": 2},
    "one_row": {"n": 1, "m": 6, "h": 2, "kv_heads": 2},
    "bias": {"bias": (2, 4, 5, 7)},
    "bias_rows": {"bias": (1, 4, 5, 1)},
    "bias_columns": {"bias": (2, 1, 1, 7), "causal": True},
    # Row 3 of the first batch row has a segment that no key has.
    "segments": {
        "bias": (1, 1, 5, 7),
        "segments": (
            [[0, 0, 1, 9, 1], [2, 2, 2, 2, 2]],
            [[0, 0, 0, 1, 1, 1, 1], [2, 2, 3, 3, 2, 3, 3]],
        ),
    },
}


def quick_unless(slow, names):
  return [
      pytest.param(n, marks=pytest.mark.slow) if n in slow else n for n in names
  ]


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks of two rows and three columns: ragged, and several of each."""
  monkeypatch.setattr(xla, "block_sides", lambda heads, n, m: (2, 3))
  primitives._jitted.cache_clear()
  yield
  primitives._jitted.cache_clear()


def arrays(tree, dtype=None):
  cast = lambda a: jnp.asarray(
      a, dtype if np.issubdtype(a.dtype, np.floating) else None
  )
  return {k: cast(a) for k, a in tree.items()}


def options(p):
  return {
      k: jnp.asarray(a) if isinstance(a, np.ndarray) else a
      for k, a in p["options"].items()
  }


def everything(p, implementation, dtype=None):
  """What the oracle gives, from one program."""

  def attend(x):
    return kernels.attention(
        **x, **options(p), implementation=implementation, return_lse=True
    )

  def inner(pair, do, dl):
    o, lse = pair
    finite = jnp.isfinite(lse)
    return jnp.sum(o * do) + jnp.sum(jnp.where(finite, lse, 0 * lse) * dl)

  @jax.jit
  def run(x, t, do, dl):
    (o, lse), (to, mu) = jax.jvp(attend, (x,), (t,))
    return {
        "o": o, "lse": lse, "to": to, "mu": mu,
        "dx": jax.grad(lambda x: inner(attend(x), do, dl))(x),
        "ddx": jax.grad(
            lambda x: inner(jax.jvp(attend, (x,), (t,))[1], do, dl)
        )(x),
    }  # fmt: skip

  do, dl = jnp.asarray(p["do"], dtype), jnp.asarray(p["dl"], dtype)
  return run(arrays(p["x"], dtype), arrays(p["t"], dtype), do, dl)


def check(ours, theirs, bound):
  paths = jax.tree_util.tree_flatten_with_path(theirs)[0]
  for (path, b), a in zip(paths, jax.tree.leaves(ours), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    finite = np.isfinite(b)
    assert (np.isneginf(b) == np.isneginf(a)).all(), path
    assert finite.any(), path
    error = np.abs(a[finite] - b[finite]).max()
    # 1: what should be exactly 0 may be of the size of the rounding.
    scale = max(np.abs(b[finite]).max(), 1.0)
    assert error <= bound * scale, f"{path}: {error:.1e} of {scale:.1e}"


# --- values, tangents, gradients, second order ---------------------------


@pytest.mark.parametrize(
    "name",
    quick_unless(("causal_cross", "bias_rows", "bias_columns"), CASES),
)
def test_in_blocks_against_the_oracle(name, x64, strict, small_blocks):
  p = oracle.problem(1, **CASES[name])
  out = everything(p, "xla")
  check(out, oracle.solve(p), 1e-13)
  empty = ~oracle.allowed(p).any(axis=2)
  assert empty.sum() == {"causal_empty_rows": 6, "segments": 1}.get(name, 0)
  assert np.isneginf(np.asarray(out["lse"])[empty]).all()
  for a in (out["o"], out["to"], out["mu"], out["dx"]["q"], out["ddx"]["q"]):
    assert (np.asarray(a)[empty] == 0).all()


def test_a_bias_whose_exponential_overflows(x64, small_blocks):
  # Blocks of two rows: the sixth is not there, but has a bias.
  p = oracle.problem(6, bias=(1, 1, 1, 7))
  p["x"]["bias"] = p["x"]["bias"] + 1000.0
  loss = lambda x: jnp.sum(
      kernels.attention(**x, implementation="xla") * p["do"]
  )
  p["dl"] = np.zeros_like(p["dl"])
  check(
      jax.jit(jax.grad(loss))(arrays(p["x"])), oracle.solve(p)["dx"], 1e-12
  )


@pytest.mark.parametrize("name", ["causal_empty_rows", "segments"])
def test_without_a_loop_against_the_oracle(name, x64, strict):
  p = oracle.problem(2, **CASES[name])
  check(everything(p, "xla"), oracle.solve(p), 1e-13)


@pytest.mark.parametrize("name", ["causal_empty_rows", "segments"])
def test_reference_against_the_oracle(name, x64, strict):
  p = oracle.problem(3, **CASES[name])
  check(everything(p, "reference"), oracle.solve(p), 1e-13)


@pytest.mark.parametrize("blocks", [False, True])
def test_logits_of_ten_thousand(blocks, request):
  if blocks:
    request.getfixturevalue("small_blocks")
  p = oracle.problem(5, scale=1e4, std=1.0, h=2, kv_heads=2)
  theirs = oracle.solve(p)
  assert np.abs(theirs["lse"]).max() > 1e4
  ours = everything(p, "xla", np.float32)
  # An error of eps * 1e4 in an exponent is 1e-3 of a probability.
  for name in ("o", "lse"):
    check(ours[name], theirs[name], 4e-3)
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(ours))


def bf16_case(offset):
  p = oracle.problem(6, b=1, n=64, m=96, h=2, kv_heads=1, d=32, e=32)
  rounded = lambda a: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64)
  p["x"]["v"] = p["x"]["v"] + offset
  p["x"] = {k: rounded(a) for k, a in p["x"].items()}
  p["t"] = {k: rounded(a) for k, a in p["t"].items()}
  return p


@pytest.mark.parametrize("offset,blocks", [(0.0, False), (3.0, True)])
def test_bfloat16_is_summed_in_float32(offset, blocks, monkeypatch):
  if blocks:
    monkeypatch.setattr(xla, "block_sides", lambda heads, n, m: (32, 32))
  primitives._jitted.cache_clear()
  p = bf16_case(offset)
  theirs = oracle.solve(p)

  @jax.jit
  def both(x, t):
    ours = jax.jvp(
        lambda x: kernels.attention(**x, implementation="xla"), (x,), (t,)
    )

    def naive(x):
      k, v = (jnp.repeat(x[n], 2, axis=2) for n in "kv")
      s = jnp.einsum("bnhd,bmhd->bhnm", x["q"], k) * 32**-0.5
      p = jax.nn.softmax(s, axis=-1)
      return jnp.einsum("bhnm,bmhe->bnhe", p, v)

    return ours, jax.jvp(naive, (x,), (t,))

  (o, to), (_, naive) = both(
      arrays(p["x"], jnp.bfloat16), arrays(p["t"], jnp.bfloat16)
  )
  primitives._jitted.cache_clear()
  assert o.dtype == to.dtype == jnp.bfloat16

  def error(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)

  assert error(o, theirs["o"]) < 3e-3
  # The card's bounds: 6e-3, and below half of plain bfloat16 autodiff.
  assert error(to, theirs["to"]) < 6e-3
  assert error(to, theirs["to"]) < 0.5 * error(naive, theirs["to"])


def test_dtypes_of_results():
  q = jnp.ones((1, 2, 1, 4), jnp.float16)
  for implementation in ("xla", "reference"):
    o, lse = jax.eval_shape(
        functools.partial(
            kernels.attention, implementation=implementation, return_lse=True
        ),
        q, q, q,
    )  # fmt: skip
    assert (o.dtype, lse.dtype) == (jnp.float16, jnp.float32)
    assert (o.shape, lse.shape) == ((1, 2, 1, 4), (1, 2, 1))


# --- all transforms ------------------------------------------------------


def inputs(seed=0, lead=()):
  rng = np.random.default_rng(seed)
  draw = lambda *s: jnp.asarray(rng.normal(size=(*lead, *s)))
  return draw(2, 3, 2, 4), draw(2, 4, 1, 4), draw(2, 4, 1, 3)


def scalar(o, scale=1.3):
  return jnp.sum(jnp.sin(scale * o))


def mean_flow(attend, x, t):
  """A value, its derivative in a stop_gradient: one residual of two streams."""
  u, du = jax.jvp(attend, x, t)
  return jnp.sum((u - jax.lax.stop_gradient(jnp.cos(u) + du)) ** 2)


def mean_flow_in_scan(attend, wrap=lambda f: f):
  """Both streams through two layers of a scan, then MeanFlow's loss."""
  q, k, v = inputs(1)
  w = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 4)))

  def loss(w, q):
    def network(q):
      def layer(q, w):
        return q + attend(q, k, v) @ w, None

      return jax.lax.scan(wrap(layer), q, w)[0]

    u, du = jax.jvp(network, (q,), (jnp.cos(q),))
    return jnp.sum((u - jax.lax.stop_gradient(jnp.cos(u) + du)) ** 2)

  return jax.grad(loss)(w, q)


def on_mesh(attend, check_vma):
  mesh = jax.make_mesh(
      (2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,),
      devices=jax.devices()[:2],
  )  # fmt: skip
  x, t = inputs(1), inputs(2)
  rows = P("data")

  # k and its tangent are the same everywhere, q and v are not.
  @functools.partial(
      jax.shard_map, mesh=mesh, check_vma=check_vma,
      in_specs=((rows, P(), rows), (rows, P(), rows)),
      out_specs=((rows, P(), rows), (rows, rows), P()),
  )  # fmt: skip
  def run(x, t):
    one = lambda a: jnp.concatenate([a, a], axis=0)[: x[0].shape[0]]
    value = lambda q, k, v: attend(q, one(k[:1]), v)
    grads = list(jax.grad(
        lambda x: mean_flow(value, x, t) + scalar(value(*x)))(x))
    if not check_vma:  # with it, JAX sums it by itself
      grads[1] = jax.lax.psum(grads[1], "data")
    pair = jax.jvp(value, x, t)
    return tuple(grads), pair, jax.lax.psum(scalar(pair[1]), "data")

  return jax.jit(run)(x, t)


def exported(attend):
  x = inputs(1)
  f = lambda *x: jax.jvp(attend, x, inputs(2))
  return jax.export.export(jax.jit(f))(*x).call(*x)


def second(attend, x, t):
  """A scalar of the tangent, which is nonlinear in it."""
  return scalar(jax.jvp(attend, x, t)[1], 0.7)


TRANSFORMS = {
    "jvp": lambda f: jax.jvp(f, inputs(1), inputs(2)),
    "grad": lambda f: jax.grad(lambda x: scalar(f(*x)))(inputs(1)),
    "grad_of_a_subset": lambda f: jax.grad(
        lambda v: scalar(f(*inputs(1)[:2], v)))(inputs(1)[2]),
    "linearize": lambda f: jax.linearize(f, *inputs(1))[1](*inputs(2)),
    "mean_flow": lambda f: jax.grad(
        lambda x, t: mean_flow(f, x, t), argnums=(0, 1)
    )(inputs(1), inputs(2)),
    "mean_flow_in_scan": mean_flow_in_scan,
    "mean_flow_in_scan_of_checkpoint": lambda f: mean_flow_in_scan(
        f, jax.checkpoint),
    "mean_flow_in_checkpoint": lambda f: jax.grad(
        jax.checkpoint(lambda x: mean_flow(f, x, inputs(2))))(inputs(1)),
    "mean_flow_of_checkpoint_that_saves": lambda f: jax.grad(
        lambda x: mean_flow(jax.checkpoint(
            f, policy=jax.checkpoint_policies.everything_saveable),
            x, inputs(2)))(inputs(1)),
    "mean_flow_of_inner_jit": lambda f: jax.grad(
        lambda x: mean_flow(jax.jit(f), x, inputs(2)))(inputs(1)),
    "reverse_over_forward": lambda f: jax.grad(
        lambda x, t: second(f, x, t), argnums=(0, 1)
    )(inputs(1), inputs(2)),
    "reverse_over_forward_in_checkpoint": lambda f: jax.grad(
        jax.checkpoint(lambda x: second(f, x, inputs(2))))(inputs(1)),
    "hvp": lambda f: jax.jvp(
        jax.grad(lambda x: scalar(f(*x))), (inputs(1),), (inputs(2),)),
    "reverse_over_reverse": lambda f: jax.grad(
        lambda x: sum(map(scalar, jax.grad(lambda x: scalar(f(*x)))(x)))
    )(inputs(1)),
    "forward_over_forward": lambda f: jax.jvp(
        lambda *x: jax.jvp(f, x, inputs(2))[1], inputs(1), inputs(3)),
    "linearize_of_jvp": lambda f: jax.linearize(
        lambda *x: jax.jvp(f, x, inputs(2)), *inputs(1))[1](*inputs(3)),
    "vmap_of_jvp": lambda f: jax.vmap(
        lambda q, tq: jax.jvp(
            lambda q: f(q, *inputs(1)[1:]), (q,), (tq,)), in_axes=(0, 1)
    )(inputs(1, (3,))[0], jnp.moveaxis(inputs(2, (3,))[0], 0, 1)),
    "vmap_of_grad": lambda f: jax.vmap(
        jax.grad(lambda x: scalar(f(*x))))(inputs(1, (3,))),
    "vmap_of_mean_flow": lambda f: jax.vmap(
        jax.grad(lambda x, t: mean_flow(f, x, t)), in_axes=(None, 0)
    )(inputs(1), inputs(2, (3,))),
    "vmap_of_reverse_over_forward": lambda f: jax.vmap(
        jax.grad(lambda x, t: second(f, x, t)), in_axes=(0, None)
    )(inputs(1, (3,)), inputs(2)),
    "jacfwd": lambda f: jax.jacfwd(
        lambda q: f(q, *inputs(1)[1:]))(inputs(1)[0]),
    "shard_map": lambda f: on_mesh(f, False),
    "shard_map_with_check_vma": lambda f: on_mesh(f, True),
    "export": exported,
}  # fmt: skip


def causal(implementation):
  return functools.partial(
      kernels.attention, causal=True, implementation=implementation
  )


# Each is a compile; what only combines others is left to `pytest -m slow`.
COMBINED = (
    "vmap_of_reverse_over_forward", "linearize_of_jvp",
    "reverse_over_forward_in_checkpoint", "mean_flow_of_inner_jit",
    "mean_flow_of_checkpoint_that_saves", "vmap_of_grad",
)  # fmt: skip


@pytest.mark.parametrize("name", quick_unless(COMBINED, TRANSFORMS))
def test_transforms_of_a_jitted_program(name, x64):
  transform = TRANSFORMS[name]
  ours, theirs = jax.jit(
      lambda: (transform(causal("xla")), transform(causal("reference")))
  )()
  check(ours, theirs, 1e-13)


EAGER = ("mean_flow_in_checkpoint", "hvp", "jacfwd")


@pytest.mark.parametrize(
    "name", quick_unless(set(TRANSFORMS) - set(EAGER), TRANSFORMS)
)
def test_transforms_without_jit(name, x64):
  transform = TRANSFORMS[name]
  theirs = jax.jit(lambda: transform(causal("reference")))()
  check(transform(causal("xla")), theirs, 1e-13)


def test_vmap_of_the_gradient_in_a_shared_bias(x64):
  bias = jnp.asarray(np.random.default_rng(3).normal(size=(1, 2, 1, 4)))

  def run(implementation):
    def loss(bias, x):
      return scalar(kernels.attention(
          *x, bias=bias, implementation=implementation))

    # One bias for all batch rows, and for all of the mapped axis.
    return jax.vmap(jax.grad(loss), in_axes=(None, 0))(bias, inputs(1, (3,)))

  ours, theirs = jax.jit(lambda: (run("xla"), run("reference")))()
  assert ours.shape == (3, 1, 2, 1, 4)
  check(ours, theirs, 1e-13)


def test_without_private_hooks(x64, monkeypatch):
  # What a JAX without them has: att then tan, and the same numbers.
  monkeypatch.setattr(primitives, "HOOKS", False)
  for table in (primitives._linearize, primitives._partial_eval,
                primitives._partial_eval_jaxpr, primitives._dce):
    for p in (primitives.att_p, primitives.fused_p):
      monkeypatch.delitem(table, p, raising=False)
  run = TRANSFORMS["mean_flow_in_scan_of_checkpoint"]
  program = jax.jit(lambda: run(causal("xla")))
  assert kernel_counts(program)["fused"] == 0
  check(program(), jax.jit(lambda: run(causal("reference")))(), 1e-13)


def test_third_order_is_refused():
  x, t = inputs(1), inputs(2)
  f = causal("xla")
  one = lambda x: second(f, x, t)
  for fn in (
      lambda: jax.hessian(one)(x),
      lambda: jax.jvp(
          jax.grad(lambda x: jax.jvp(
              jax.grad(lambda x: scalar(f(*x))), (x,), (t,))[1][0].sum()),
          (x,), (t,)),
  ):  # fmt: skip
    with one_line_error("third one; 'reference' supports", NotImplementedError):
      jax.eval_shape(fn)


# --- what is computed ----------------------------------------------------


def kernel_counts(jitted):
  return counts_in(jitted.lower())


def counts_in(lowered):
  """Calls of each primitive's function in the lowered text."""
  text = lowered.as_text()
  found = re.findall(r"call @jvp_attention_([a-z0-9]+?)(?:_\d+)?\(", text)
  return {
      name: found.count(name)
      for name in ("att", "tan", "bwd", "tan2", "jbwd", "fused")
  }


def some(**counts):
  return {**dict.fromkeys(("att", "tan", "bwd", "tan2", "jbwd", "fused"), 0),
          **counts}


@pytest.mark.parametrize(
    "name,expected",
    [
        ("jvp", some(fused=1)),
        ("grad", some(att=1, bwd=1)),
        ("linearize", some(att=1, tan=1)),
        ("mean_flow", some(fused=1, bwd=1)),
        ("mean_flow_of_inner_jit", some(fused=1, bwd=1)),
        ("mean_flow_in_scan", some(fused=1, bwd=1)),
        # All is computed again, and nobody asked for the value before.
        ("mean_flow_in_checkpoint", some(fused=1, bwd=1)),
        # The value of a layer is computed again, its tangent is not.
        ("mean_flow_in_scan_of_checkpoint", some(fused=1, att=1, bwd=1)),
        ("mean_flow_of_checkpoint_that_saves", some(fused=1, bwd=1)),
        ("hvp", some(fused=1, bwd=2, jbwd=1)),
        ("reverse_over_forward", some(fused=1, bwd=1, jbwd=1)),
        ("vmap_of_mean_flow", some(att=1, tan=1, bwd=1)),
    ],
)
def test_kernels_of_a_program(name, expected):
  counts = kernel_counts(jax.jit(lambda: TRANSFORMS[name](causal("xla"))))
  assert counts == expected


def jaxpr_of(name, length):
  """The program of a big problem, not run."""
  shapes = [jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)] * 3
  f = functools.partial(kernels.attention, implementation="xla")
  fns = {
      "mean_flow": lambda *x: jax.grad(
          lambda x: mean_flow(f, x, tuple(map(jnp.cos, x))))(x),
      "reverse_over_forward": lambda *x: jax.grad(
          lambda x: second(f, x, tuple(map(jnp.cos, x))))(x),
  }  # fmt: skip
  return jax.jit(fns[name]).lower(*shapes)


@pytest.mark.parametrize("name", ["mean_flow", "reverse_over_forward"])
def test_no_array_has_rows_and_columns(name):
  text = jaxpr_of(name, 4096).as_text()
  assert "stablehlo.while" in text
  assert not re.search(r"4096x4096|4096x\d+x4096", text)
  sizes = [
      np.prod([int(s) for s in dims.split("x")])
      for dims in re.findall(r"tensor<((?:\d+x)*\d+)xf32>", text)
  ]
  # q has 2^17 numbers and a block of scores at most 2^20.
  assert max(sizes) <= xla.BLOCK_SCORES


def test_memory_grows_with_the_length():
  def peak(n):
    done = jaxpr_of("mean_flow", n).compile()
    return done.memory_analysis().temp_size_in_bytes

  # Blocks have one size; the rest is q's. Quadratic would be 16 times.
  assert peak(16384) < 5 * peak(4096)


def test_short_sequences_have_no_loop():
  x = [jnp.ones((64, 16, 4, 16))] * 3
  f = functools.partial(kernels.attention, implementation="xla")
  loss = lambda x: mean_flow(f, x, x)
  text = jax.jit(jax.grad(loss)).lower(tuple(x)).as_text()
  assert "while" not in text
  assert "pad" not in text.replace("padding", "")


def test_causal_blocks_that_nobody_sees_are_not_visited(x64, small_blocks):
  # NaN in columns that no row of the block of rows sees must not matter.
  q, k, v = inputs(1)
  q, k, v = (jnp.tile(a, (1, 3, 1, 1)) for a in (q, k, v))
  p = xla._Blocks.of(
      spec.Spec("xla", 1.0, causal=True),
      [jnp.swapaxes(a, 1, 2) for a in (q, k[:, :9], v[:, :9])],
  )
  assert (p.row_blocks, p.rows, p.column_blocks, p.columns) == (5, 2, 3, 3)
  # Rows 0..1 see columns 0..1, rows 2..3 columns 0..3, rows 8.. all nine.
  assert [p.last_column_block(i) for i in range(5)] == [1, 2, 2, 3, 3]
  assert [int(p.last_column_block(jnp.int32(i))) for i in range(5)] == [
      1, 2, 2, 3, 3,
  ]


@pytest.mark.parametrize(
    "heads,n,m,expected",
    [
        (256, 16, 16, (16, 16)),  # a small DiT
        (1, 1024, 1024, (1024, 1024)),  # 2^20 scores
        (8, 4096, 4096, (64, 2048)),
        (8, 64, 8192, (64, 2048)),
        (8, 100_000, 100, (256, 100)),
        (4096, 1024, 1024, (64, 64)),
    ],
)
def test_sides_of_a_block(heads, n, m, expected):
  assert xla.block_sides(heads, n, m) == expected


# --- attention_jvp -------------------------------------------------------


@pytest.mark.parametrize("given", ["qkv", "q", "kv"])
def test_attention_jvp_is_jvp(given, x64, strict):
  p = oracle.problem(7, causal=True)
  p["t"] = {k: a * (k in given) for k, a in p["t"].items()}
  theirs = oracle.solve(p)
  t = [jnp.asarray(p["t"][c]) if c in given else None for c in "qkv"]
  run = jax.jit(
      lambda x: kernels.attention_jvp(
          *(x[c] for c in "qkv"), *t, causal=True, return_lse=True
      )
  )
  (o, lse), (to, mu) = run(arrays(p["x"]))
  for name, a in {"o": o, "lse": lse, "to": to, "mu": mu}.items():
    check(a, theirs[name], 1e-13)
  text = run.lower(arrays(p["x"])).as_text()
  # 2 for the value, then one a product with a tangent and one for the change.
  products = {"qkv": 6, "q": 4, "kv": 5}
  assert text.count("stablehlo.dot_general") == products[given]


# --- choice of implementation, bad input ---------------------------------


def test_docstring_example():
  done = doctest.testmod(api)
  assert done.failed == 0 and done.attempted >= 3


def test_default_on_cpu_is_xla():
  q = jnp.ones((1, 2, 1, 4))
  assert api._choose("attention", None, q, q) == "xla"


def test_a_list_falls_back_with_one_warning(monkeypatch):
  monkeypatch.setattr(spec, "_WARNED", set())
  q = jnp.ones((1, 2, 1, 48))
  run = lambda: kernels.attention(
      q, q, q, implementation=["pallas_tpu", "xla"]
  )
  with pytest.warns(UserWarning, match="falls back to 'xla': q must be of head"
                    " width 64, 128 or 256 .* got 48"):
    run()
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    run()


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_default_that_cannot_be_lowered_falls_back(platform, monkeypatch):
  monkeypatch.setattr(spec, "_WARNED", set())
  monkeypatch.setattr(api.platform, "platform", lambda: platform)
  q = jax.random.normal(jax.random.key(0), (1, 2, 1, 64))
  run = jax.jit(lambda q: kernels.attention(q, q, q))
  with pytest.warns(UserWarning, match="falls back to 'xla': implementation"
                    f" must be 'xla' or 'reference' on cpu, got"
                    f" 'pallas_{platform}'"):
    out = run(q)
  ours = jax.jit(lambda q: kernels.attention(q, q, q, implementation="xla"))(q)
  np.testing.assert_array_equal(out, ours)


@pytest.mark.parametrize(
    "platform,expected",
    [("tpu", "pallas_tpu"), ("gpu", "pallas_gpu"), ("cuda", "pallas_gpu")],
)
def test_on_a_chip_its_kernels_are_first(platform, expected, monkeypatch):
  monkeypatch.setattr(api.platform, "platform", lambda: platform)
  q = jnp.ones((1, 2, 1, 64))
  assert api._choose("attention", None, q, q) == expected


GOOD = {
    "q": np.ones((2, 3, 4, 8), np.float32),
    "k": np.ones((2, 5, 2, 8), np.float32),
    "v": np.ones((2, 5, 2, 6), np.float32),
}


@pytest.mark.parametrize(
    "changes,match",
    [
        ({"q": np.ones((2, 3, 8), np.float32)},
         r"^attention: q must be \[b, n, h, d\] \(rank 4\), got \[2, 3, 8\]"),
        ({"q": np.ones((2, 3, 4, 8), int)}, "q must be a floating array"),
        ({"q": np.ones((2, 0, 4, 8), np.float32)}, "q must be a non-empty"),
        ({"k": np.ones((2, 5, 2, 7), np.float32)},
         r"k must be \[b, m, h_kv, d\]=\[2, 5, 2, 8\] like q"),
        ({"k": np.ones((1, 5, 2, 8), np.float32)}, "k must be .* like q"),
        ({"v": np.ones((2, 4, 2, 6), np.float32)},
         r"v must be \[b, m, h_kv, e\]=\[2, 5, 2, 6\] like k, got"),
        ({"v": np.ones((2, 5, 2, 6), jnp.bfloat16)},
         "v must be float32 like q, got bfloat16"),
        ({"q": np.ones((2, 3, 3, 8), np.float32)},
         "q must be of a number of heads that is a multiple of k's 2, got 3"),
        ({"bias": np.ones((3, 5), np.float32)}, "bias must be .*rank 4"),
        ({"bias": np.ones((2, 3, 3, 5), np.float32)},
         r"bias must be broadcastable to \[b, h, n, m\]=\[2, 4, 3, 5\], got"),
        ({"bias": np.ones((2, 4, 3, 5), bool)}, "bias must be a floating"),
        ({"q_segment_ids": np.ones((2, 3), int)},
         "kv_segment_ids must be given with the other"),
        ({"kv_segment_ids": np.ones((2, 5), int)},
         "q_segment_ids must be given with the other"),
        ({"q_segment_ids": np.ones((2, 4), int),
          "kv_segment_ids": np.ones((2, 5), int)},
         r"q_segment_ids must be \[b, n\]=\[2, 3\] like q, got \[2, 4\]"),
        ({"q_segment_ids": np.ones((2, 3), int),
          "kv_segment_ids": np.ones((2, 3), int)},
         r"kv_segment_ids must be \[b, m\]=\[2, 5\] like k, got \[2, 3\]"),
        ({"q_segment_ids": np.ones((2, 3)),
          "kv_segment_ids": np.ones((2, 5))}, "must be an integer array"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"scale": np.ones(2)}, "scale must be a number or None, got ndarray"),
        ({"implementation": "xlb"}, "one of .* got 'xlb'; did you mean 'xla'"),
        ({"implementation": []}, "a name or a list of names"),
        ({"implementation": "pallas_tpu"},
         "q must be of head width 64, 128 or 256 for 'pallas_tpu' .'xla'"),
        ({"implementation": "pallas_gpu"},
         "q must be of head width 64, 128 or 256 for 'pallas_gpu' .'xla'"),
        ({"v": np.ones((2, 5, 2, 256), np.float32),
          "q": np.ones((2, 3, 4, 64), np.float32),
          "k": np.ones((2, 5, 2, 64), np.float32),
          "implementation": "pallas_gpu"},
         "q must be bfloat16 at head width 256 for 'pallas_gpu' .'xla'"),
        ({"q": np.ones((2, 3, 4, 64), np.float16),
          "k": np.ones((2, 5, 2, 64), np.float16),
          "v": np.ones((2, 5, 2, 64), np.float16),
          "implementation": "pallas_gpu"},
         "q must be float32 or bfloat16 for 'pallas_gpu' .'xla'"),
    ],
)  # fmt: skip
def test_bad_input(changes, match):
  with one_line_error(match):
    kernels.attention(**{**GOOD, **changes})


@pytest.mark.parametrize(
    "changes,match",
    [
        ({}, "^attention_jvp: tq, tk, tv must be not all None"),
        ({"tq": GOOD["k"]}, r"tq must be \[2, 3, 4, 8\] like q, got"),
        ({"tv": GOOD["v"].astype(np.float16)},
         "tv must be float32 like v, got float16"),
    ],
)  # fmt: skip
def test_bad_tangents(changes, match):
  tangents = {"tq": None, "tk": None, "tv": None, **changes}
  with one_line_error(match):
    kernels.attention_jvp(**GOOD, **tangents)


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_a_kernel_takes_no_derivative_in_the_bias(name):
  q = jnp.ones((1, 8, 1, 64))
  f = lambda bias: kernels.attention(
      q, q, q, bias=bias, implementation=name
  ).sum()
  for fn in (jax.grad(f), lambda b: jax.jvp(f, (b,), (b,))):
    with one_line_error("bias must not .* 'xla'", NotImplementedError):
      jax.eval_shape(fn, jnp.ones((1, 1, 8, 8)))
