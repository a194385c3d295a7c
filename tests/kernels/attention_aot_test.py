"""The TPU kernels compiled for chips that are not here: `pytest -m aot`.

Needs the extra `plan` (a TPU compiler, no TPU); one process at a time. Without
`DISTILLJAX_AOT=all` only v5e is compiled.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import kernel_schedule
from distilljax import kernels
from distilljax.kernels.jvp_attention import pallas_tpu, tpu_bounds
from distilljax.kernels.jvp_attention import spec as spec_lib
from tests.helpers import one_line_error
from tests.kernels.aot import CHIPS, devices, shapes

pytestmark = pytest.mark.aot


def test_there_is_a_bound_for_every_kernel_and_chip():
  names = {fn.__name__ for fn in pallas_tpu.kernels()}
  for chip in tpu_bounds.TOPOLOGIES:
    found = {k for c, k, _, _ in tpu_bounds.TEMPORARIES if c == chip}
    assert found == names


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "case", [c for c in tpu_bounds.TEMPORARIES if c[0] in CHIPS], ids=str
)
def test_a_kernel_within_its_bound(case, causal):
  chip, kernel, n, width = case
  fn, sizes = kernel_schedule.operands(kernel, n, width)
  spec = spec_lib.Spec("pallas_tpu", width**-0.5, causal)
  done = (
      jax.jit(lambda *a: fn(spec, *a))
      .lower(*shapes(chip, *sizes))
      .compile()
  )
  assert done.memory_analysis().temp_size_in_bytes <= (
      tpu_bounds.TEMPORARIES[case]
  )
  text = done.as_text()
  assert "jvp_attention_" in text
  assert not re.search(rf"\b{n},{n}\b", text)


@pytest.mark.parametrize("chip", CHIPS)
def test_schedules_are_no_longer_than_recorded(chip):
  devices(chip)
  kernels_ = [k for k in kernel_schedule.KERNELS if k != "jax"]
  setting = {"tile": None, "causal": False, "width": 128, "length": 4096}
  found = {}
  for kernel in kernels_:
    for row in kernel_schedule.measure(chip, kernel, **setting):
      # The second backward runs a tangent kernel first.
      found.setdefault((chip, row["kernel"]), row["bundles"])
  recorded = {k: n for k, n in tpu_bounds.BUNDLES.items() if k[0] == chip}
  assert set(found) == set(recorded)
  # Where a function stands in its file moves the schedule by a few bundles.
  longer = {k: n for k, n in found.items() if n > 1.01 * recorded[k]}
  assert not longer


def test_recorded_schedules_reach_their_goals():
  per_512 = {k: n / 4 for k, n in tpu_bounds.BUNDLES.items()}
  goals = {
      ("v5e", "fused"): 3100, ("v6e", "fused"): 2000, ("v5p", "fused"): 3250,
      ("v5e", "tangent"): 2550,
  }  # fmt: skip
  assert all(per_512[k] <= goal for k, goal in goals.items())


@pytest.mark.parametrize("chip", CHIPS)
def test_reverse_over_forward_is_linear_in_memory(chip):
  q = ((1, 4096, 4, 128), jnp.bfloat16)

  def grads(q, k, v, t):
    def loss(x):
      attend = lambda q: kernels.attention(
          q, *x[1:], causal=True, implementation="pallas_tpu"
      )
      to = jax.jvp(attend, (x[0],), (t,))[1]
      return jnp.sum(jnp.sin(to.astype(jnp.float32)))

    return jax.grad(loss)((q, k, v))

  text = jax.jit(grads).lower(*shapes(chip, q, q, q, q)).compile().as_text()
  assert not re.search(r"\b4096,4096\b", text)
  for kernel in ("second_rows", "second_columns", "tangent"):
    assert f"jvp_attention_{kernel}" in text, kernel


def masked_gradients(implementation):
  """MeanFlow's pattern with every mask: of q, k, v, a bias and ids."""

  def grads(q, k, v, bias, q_ids, kv_ids):
    def loss(x):
      attend = lambda *x: kernels.attention(
          *x, bias=bias, causal=True, q_segment_ids=q_ids,
          kv_segment_ids=kv_ids, implementation=implementation,
      )  # fmt: skip
      o, to = jax.jvp(attend, x, x)
      target = jax.lax.stop_gradient(o + to)
      return jnp.sum(((o - target) ** 2).astype(jnp.float32))

    return jax.grad(loss)((q, k, v))

  return grads


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_all_masks_and_grouped_heads_compile(chip, dtype):
  n, m = 1000, 2300
  q = ((2, n, 8, 128), dtype)
  kv = ((2, m, 2, 128), dtype)
  bias = ((1, 8, n, m), dtype)
  ids = [((2, n), jnp.int32), ((2, m), jnp.int32)]

  grads = masked_gradients("pallas_tpu")
  jax.jit(grads).lower(*shapes(chip, q, kv, kv, bias, *ids)).compile()


def mean_flow_step(implementation, n=4096, width=1024, heads=8, depth=6):
  """(gradient of MeanFlow's loss through a scan of layers, sizes)."""

  def network(w, x):
    @jax.checkpoint
    def layer(x, w):
      q, k, v = jnp.split(x @ w["qkv"], 3, axis=-1)
      split = lambda a: a.reshape(1, n, heads, width // heads)
      o = kernels.attention(
          split(q), split(k), split(v), implementation=implementation
      )
      return x + o.reshape(1, n, width) @ w["out"], None

    return jax.lax.scan(layer, x, w)[0]

  def loss(w, x, v):
    u, slope = jax.jvp(lambda x: network(w, x), (x,), (v,))
    target = jax.lax.stop_gradient(v - slope)
    return jnp.sum(jnp.square(u - target).astype(jnp.float32))

  low = jnp.bfloat16
  w = {"qkv": (depth, width, 3 * width), "out": (depth, width, width)}
  sizes = [(w["qkv"], low), (w["out"], low), ((1, n, width), low),
           ((1, n, width), low)]  # fmt: skip
  step = jax.value_and_grad(
      lambda qkv, out, x, v: loss({"qkv": qkv, "out": out}, x, v), (0, 1)
  )
  return step, sizes


@pytest.mark.parametrize("chip", tuple(set(CHIPS) & set(tpu_bounds.MEAN_FLOW)))
def test_a_mean_flow_step_fits(chip):
  step, sizes = mean_flow_step("pallas_tpu")
  done = jax.jit(step).lower(*shapes(chip, *sizes)).compile()
  assert done.memory_analysis().temp_size_in_bytes <= tpu_bounds.MEAN_FLOW[chip]
  text = done.as_text()
  assert not re.search(r"\b4096,4096\b", text)
  for kernel in ("fused", "forward", "backward_rows", "backward_columns"):
    assert f"jvp_attention_{kernel}" in text, kernel


@pytest.mark.parametrize("check_vma", [False, True])
def test_on_four_chips_inside_a_shard_map(check_vma):
  mesh = Mesh(np.asarray(devices("v5e")), ("data",))
  rows = PartitionSpec("data")
  q = jax.ShapeDtypeStruct(
      (4, 1024, 2, 128), jnp.bfloat16, sharding=NamedSharding(mesh, rows)
  )

  def grads(q):
    def loss(q):
      attend = lambda q: kernels.attention(
          q, q, q, implementation="pallas_tpu"
      )
      o, to = jax.jvp(attend, (q,), (q,))
      error = (o - jax.lax.stop_gradient(o + to)).astype(jnp.float32)
      return jnp.sum(error**2)

    return jax.grad(loss)(q)

  mapped = jax.shard_map(
      grads, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=check_vma
  )
  done = jax.jit(mapped).lower(q).compile()
  assert done.memory_analysis().temp_size_in_bytes == 0
  assert "all-gather" not in done.as_text()
  # Left to the compiler it would be a kernel that cannot be partitioned.
  with one_line_error("inside jax.shard_map on 4 devices, got 'pallas_tpu'"):
    jax.jit(grads).lower(q)
