"""The TPU kernels, interpreted: one small shape each, against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from distilljax import kernels
from distilljax.kernels.jvp_attention import pallas_tpu, primitives
from distilljax.kernels.jvp_attention import spec as spec_lib
from tests.helpers import one_line_error
from tests.kernels import oracle
from tests.kernels.attention_test import TRANSFORMS, quick_unless

# Two or three blocks of rows and of columns, the last of them ragged.
SIZES = {"b": 1, "n": 136, "m": 264, "h": 2, "kv_heads": 1, "d": 64, "e": 64}
CASES = {
    "causal_bias": {"causal": True, "bias": (1, 2, 136, 264)},
    "empty_rows_and_segments": {
        "n": 264, "m": 136, "causal": True, "bias": (1, 1, 1, 136),
        "segments": (np.arange(264)[None] // 200, np.arange(136)[None] // 100),
    },
}  # fmt: skip


@pytest.fixture
def small_tiles(monkeypatch):
  """Blocks of 128 rows and 256 columns, parts of 128 columns."""
  tile = pallas_tpu.Tile(128, 256, 128, 128)
  monkeypatch.setattr(pallas_tpu, "TILES", dict.fromkeys((64, 128), tile))


@pytest.fixture
def random_order(small_tiles):
  """Kernels called by themselves, the parallel axes in a random order.

  This interpreter orders its callbacks, which no primitive of ours declares.
  """
  with pallas_tpu.interpret(pltpu.InterpretParams(random_seed=3)):
    yield
  pltpu.reset_tpu_interpret_mode_state()


@pytest.fixture
def interpreted(small_tiles):
  """Kernels behind the public function."""
  primitives._jitted.cache_clear()
  with pallas_tpu.interpret():
    yield
  primitives._jitted.cache_clear()


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


@pytest.mark.parametrize(
    "name", quick_unless({"causal_bias"}, CASES)
)
def test_kernels_against_the_oracle(name, random_order):
  p = oracle.problem(1, **{**SIZES, **CASES[name]})
  p["t"]["bias"] = np.zeros_like(p["t"]["bias"])
  theirs = oracle.solve(p)
  x, t = f32(p["x"]), f32(p["t"])
  options = p["options"]
  spec = spec_lib.Spec(
      "pallas_tpu", 64**-0.5, options["causal"], bias=True,
      segments="q_segment_ids" in options,
  )  # fmt: skip
  operands = [swap(x["q"]), swap(x["k"]), swap(x["v"]), x["bias"]]
  if spec.segments:
    operands += [
        jnp.asarray(options[f"{side}_segment_ids"], jnp.int32)
        for side in ("q", "kv")
    ]
  tangents = [swap(t[c]) for c in "qkv"]
  do, dl = (swap(jnp.asarray(p[n], jnp.float32)) for n in ("do", "dl"))

  @jax.jit
  def run(x, t, do, dl):
    first = pallas_tpu.fused(spec, "qkv", *x, *t)
    o, lse = pallas_tpu.forward(spec, *x)
    second = (o, lse, *pallas_tpu.tangent(spec, "qkv", *x, o, lse, *t))
    dx = pallas_tpu.backward(
        spec, "qkv", *x, o, lse, do, jnp.where(jnp.isfinite(lse), dl, 0.0)
    )
    return first, second, dx

  first, second, dx = run(operands, tangents, do, dl)
  for results in (first, second):
    for result, a in zip(("o", "lse", "to", "mu"), results):
      near(swap(a), theirs[result], 3e-6, result)
  for letter, a in zip("qkv", dx):
    near(swap(a), theirs["dx"][letter], 3e-6, f"d{letter}")


SECOND = {
    "grouped_heads": ({"n": 136, "m": 136}, "qkv", "qkv"),
    "causal_bias": (CASES["causal_bias"], "qkv", "qkv"),
    "empty_rows_and_segments": (
        CASES["empty_rows_and_segments"], "qkv", "qkv",
    ),
    # Nothing moves the scores: the gradient in v is zero.
    "only_v_moves": ({"causal": True}, "v", "qkv"),
    "some": ({}, "k", "vq"),
    "others": ({}, "qv", "k"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", quick_unless(set(SECOND) - {"grouped_heads"}, SECOND)
)
def test_gradients_of_the_tangent_against_the_oracle(name, interpreted):
  changes, wrt, out = SECOND[name]
  p = oracle.problem(4, **{**SIZES, **changes})
  p["t"] = {
      k: a if k in wrt else np.zeros_like(a) for k, a in p["t"].items()
  }  # fmt: skip
  theirs = oracle.solve(p)
  x, options = f32(p["x"]), p["options"]
  spec = spec_lib.Spec(
      "pallas_tpu", 64**-0.5, options["causal"], bias="bias" in x,
      segments="q_segment_ids" in options,
  )  # fmt: skip
  operands = [swap(x["q"]), swap(x["k"]), swap(x["v"])]
  if spec.bias:
    operands.append(x["bias"])
  if spec.segments:
    operands += [
        jnp.asarray(options[f"{side}_segment_ids"], jnp.int32)
        for side in ("q", "kv")
    ]
  rows = [
      swap(jnp.asarray(a, jnp.float32))
      for a in (theirs["o"], theirs["lse"], p["do"], p["dl"])
  ]
  tangents = [swap(f32(p["t"])[c]) for c in wrt]
  found = jax.jit(
      functools.partial(pallas_tpu.second_backward, spec, wrt, out)
  )(*operands, *rows[:2], *tangents, *rows[2:])
  for letter, a in zip(out, found, strict=True):
    near(swap(a), theirs["ddx"][letter], 3e-6, f"d{letter}")
  if wrt == "v":
    assert (np.asarray(found[2]) == 0).all()


def test_reverse_over_forward_runs_kernels():
  spec = spec_lib.Spec("pallas_tpu", 0.125)
  x = [jnp.ones((1, 1, 128, 64))] * 3
  row = jnp.ones((1, 1, 128))
  fn = primitives._function(
      primitives.jbwd_p, spec, {"wrt": "qkv", "out": "qkv"}
  )
  text = str(jax.make_jaxpr(fn)(*x, x[0], row, *x, x[0], row))
  for name in ("tangent", "second_rows", "second_columns"):
    assert f"jvp_attention_{name}" in text, name


@pytest.mark.parametrize(
    "name",
    quick_unless(
        {"hvp", "reverse_over_forward", "forward_over_forward"},
        [
            "mean_flow_in_scan_of_checkpoint", "hvp", "reverse_over_forward",
            "forward_over_forward",
        ],
    ),
)
def test_transforms_with_kernels(name, interpreted):
  width = lambda *x: [jnp.pad(a, [(0, 0)] * 3 + [(0, 61)])[..., :64] for a in x]

  def attend(implementation):
    def f(q, k, v):
      q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
      e = v.shape[-1]
      o = kernels.attention(
          *width(q, k, v), causal=True, scale=0.5, implementation=implementation
      )
      return o[..., :e]

    return f

  transform = TRANSFORMS[name]
  ours, theirs = jax.jit(
      lambda: (transform(attend("pallas_tpu")), transform(attend("reference")))
  )()
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    near(a, b, 1e-5, name)


def test_bfloat16_with_values_far_from_zero(interpreted):
  p = oracle.problem(2, **{**SIZES, "n": 128, "m": 256})
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
          lambda x: kernels.attention(**x, implementation="pallas_tpu"),
          (x,), (t,),
      )
  )(arrays(p["x"]), arrays(p["t"]))  # fmt: skip
  assert o.dtype == to.dtype == jnp.bfloat16
  norm = np.linalg.norm
  error = lambda a, b: norm(np.asarray(a, np.float64) - b) / norm(b)
  assert error(o, theirs["o"]) < 3e-3
  # The card: 4.9e-3 without a centre in this case, 2.1e-3 with one.
  assert error(to, theirs["to"]) < 3e-3


def test_a_tangent_that_is_zero_is_not_computed(interpreted):
  spec = spec_lib.Spec("pallas_tpu", 0.125)

  def products(wrt):
    fn = functools.partial(pallas_tpu.fused, spec, wrt)
    operands = [jnp.ones((1, 1, 128, 64))] * (3 + len(wrt))
    return str(jax.make_jaxpr(fn)(*operands)).count("dot_general")

  assert products("qkv") == 6
  assert products("q") == 4


def test_on_a_cpu_a_named_kernel_is_one_line():
  q = jnp.ones((1, 128, 1, 64))
  with one_line_error("'xla' or 'reference' on cpu, got 'pallas_tpu'"):
    jax.jit(
        lambda q: kernels.attention(q, q, q, implementation="pallas_tpu")
    ).lower(q)


@pytest.mark.parametrize(
    "case,expected",
    [
        ((128, 2), (512, 2048)),
        ((128, 2, 0, True), (512, 1024)),
        ((128, 4), (512, 1024)),
        ((128, 2, 2), (512, 1024)),
        ((64, 2), (512, 2048)),
        ((256, 2), (256, 1024)),
        ((256, 2, 0, True), (256, 1024)),
        ((256, 4, 4), (256, 1024)),
    ],
)
def test_tiles(case, expected):
  tile = pallas_tpu.tile(*case)
  assert (tile.rows, tile.columns) == expected
  assert (tile.part_rows, tile.part_columns) == (256, 512)


def test_scoped_memory_of_a_grid_step():
  tile = pallas_tpu.Tile(512, 1024, 256, 512)
  # Blocks in flight twice, tangents too: 2 * 2 * (q, o; k, v) of 128 bf16.
  blocks = 2 * 2 * 2 * 128 * (2 * 512 + 2 * 1024)
  sums = 4 * 512 * (2 * 128 + 3 * 128)
  scores = 4 * 4 * 256 * 1024
  total = blocks + sums + scores
  assert pallas_tpu.vmem_bytes(tile, 128, 2, True) == total
  bias = 2 * 4 * 512 * 1024
  assert pallas_tpu.vmem_bytes(tile, 128, 2, True, 4) == total + bias
