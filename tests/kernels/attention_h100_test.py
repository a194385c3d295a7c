"""The GPU kernels compiled for an H100 that is not here: `pytest -m aot`.

Needs CUDA's compilers and no GPU, in an environment of their own; skipped
without. docs/api/kernels.md has the command. One process at a time.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import kernel_schedule
from distilljax import kernels
from distilljax.kernels.jvp_attention import gpu_bounds, pallas_gpu
from distilljax.kernels.jvp_attention import spec as spec_lib
from tests.helpers import one_line_error
from tests.kernels import aot, h100
from tests.kernels.attention_aot_test import masked_gradients, mean_flow_step

pytestmark = pytest.mark.aot

N = gpu_bounds.LENGTH


def test_there_is_a_bound_for_every_kernel():
  assert set(gpu_bounds.REGISTERS) == set(pallas_gpu.CONFIGS)
  names = {fn.__name__ for fn in pallas_gpu.kernels()}
  assert set(gpu_bounds.TEMPORARIES) == {
      (name, width) for name in names for width in (64, 128, 256)
  }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", gpu_bounds.TEMPORARIES, ids=str)
def test_a_kernel_within_its_bounds(case, causal):
  slot, width = case
  fn, sizes = kernel_schedule.operands(slot, N, width, module=pallas_gpu)
  spec = spec_lib.Spec("pallas_gpu", width**-0.5, causal)
  done, found = h100.compile_kernels(functools.partial(fn, spec), *sizes)
  assert done.memory_analysis().temp_size_in_bytes <= (
      gpu_bounds.TEMPORARIES[case]
  )
  assert not re.search(rf"\b{N},{N}\b", done.as_text())
  parts = {
      "backward": {"backward_rows", "backward_columns"},
      "second_backward": {
          "second_statistics", "second_rows", "second_columns"
      },
  }.get(slot, {slot})
  assert set(found) == parts
  for name, took in found.items():
    assert took.spilled == 0, name
    assert took.tensor_cores > 0, name
    assert took.registers <= gpu_bounds.REGISTERS[name, width], (name, took)


@pytest.mark.parametrize("width", [64, 128])
def test_a_tangent_that_is_zero_takes_no_more(width):
  fn, sizes = kernel_schedule.operands("fused_q", N, width, module=pallas_gpu)
  spec = spec_lib.Spec("pallas_gpu", width**-0.5)
  _, found = h100.compile_kernels(functools.partial(fn, spec), *sizes)
  assert found["fused"].spilled == 0
  assert found["fused"].registers <= gpu_bounds.REGISTERS["fused", width]


def grads_of_second_order(q, k, v, t):
  def loss(x):
    attend = lambda q: kernels.attention(
        q, *x[1:], causal=True, implementation="pallas_gpu"
    )
    to = jax.jvp(attend, (x[0],), (t,))[1]
    return jnp.sum(jnp.sin(to.astype(jnp.float32)))

  return jax.grad(loss)((q, k, v))


def test_reverse_over_forward_is_linear_in_memory():
  q = ((1, N, 4, 128), jnp.bfloat16)
  done, found = h100.compile_kernels(grads_of_second_order, q, q, q, q)
  assert not re.search(rf"\b{N},{N}\b", done.as_text())
  assert {"second_statistics", "second_rows", "second_columns"} <= set(found)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_all_masks_and_grouped_heads_compile(dtype):
  n, m = 1000, 2300
  q = ((2, n, 8, 64), dtype)
  kv = ((2, m, 2, 64), dtype)
  v = ((2, m, 2, 128), dtype)
  bias = ((1, 8, n, m), dtype)
  ids = [((2, n), jnp.int32), ((2, m), jnp.int32)]

  grads = masked_gradients("pallas_gpu")
  _, found = h100.compile_kernels(grads, q, kv, v, bias, *ids)
  assert set(found) == {"fused", "backward_rows", "backward_columns"}
  # Products of float32 take more registers than there are.
  if dtype == jnp.bfloat16:
    assert not any(took.spilled for took in found.values())


def test_a_mean_flow_step_fits():
  step, sizes = mean_flow_step("pallas_gpu")
  done, found = h100.compile_kernels(step, *sizes)
  assert done.memory_analysis().temp_size_in_bytes <= gpu_bounds.MEAN_FLOW
  assert not re.search(rf"\b{N},{N}\b", done.as_text())
  assert set(found) == {
      "fused", "forward", "backward_rows", "backward_columns"
  }  # fmt: skip


def test_on_a_mesh_of_gpus_the_kernels_are_the_default():
  q = ((1, 256, 2, 64), jnp.bfloat16)
  with jax.set_mesh(aot.mesh("h100:1", x=1)):
    _, found = h100.compile_kernels(
        lambda q: kernels.attention(q, q, q), q
    )
  assert set(found) == {"forward"}


@pytest.mark.parametrize("check_vma", [False, True])
def test_on_four_gpus_inside_a_shard_map(check_vma):
  mesh = aot.mesh("h100:4", data=4)
  rows = PartitionSpec("data")
  q = jax.ShapeDtypeStruct(
      (4, 1024, 2, 128), jnp.bfloat16, sharding=NamedSharding(mesh, rows)
  )

  def grads(q):
    def loss(q):
      attend = lambda q: kernels.attention(
          q, q, q, implementation="pallas_gpu"
      )
      o, to = jax.jvp(attend, (q,), (q,))
      error = (o - jax.lax.stop_gradient(o + to)).astype(jnp.float32)
      return jnp.sum(error**2)

    return jax.grad(loss)(q)

  mapped = jax.shard_map(
      grads, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=check_vma
  )
  done = jax.jit(mapped).lower(q).compile()
  assert "all-gather" not in done.as_text()
  # Left to the compiler every device would silently get the whole of q.
  with one_line_error("inside jax.shard_map on 4 devices, got 'pallas_gpu'"):
    jax.jit(grads).lower(q)
