"""The GPU kernels, interpreted: one small shape each, against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import kernels
from distilljax.kernels.jvp_attention import (
  common,
  pallas_gpu,
  primitives,
)
from distilljax.kernels.jvp_attention import spec as spec_lib
from tests.helpers import one_line_error
from tests.kernels import oracle, parity
from tests.kernels.attention_test import TRANSFORMS, quick_unless

# Three blocks of rows and of columns, the last of them ragged.
SIZES = {"b": 1, "n": 40, "m": 72, "h": 2, "kv_heads": 1, "d": 64, "e": 64}
CASES = {
    "causal_bias": {"causal": True, "bias": (1, 1, 1, 72)},
    "empty_rows_and_segments": {
        "b": 2, "n": 72, "m": 40, "causal": True, "bias": (2, 2, 72, 40),
        "segments": (
            np.arange(144).reshape(2, 72) // 50,
            np.arange(80).reshape(2, 40) // 30,
        ),
    },
    "wide_values": {"h": 4, "kv_heads": 2, "e": 128, "bias": (1, 4, 40, 1)},
    "one_row": {"n": 1, "kv_heads": 2},
}  # fmt: skip


@pytest.fixture
def interpreted(monkeypatch):
  """Kernels of 16 rows and 32 columns."""
  small = pallas_gpu.Config(16, 32, 4, 1)
  monkeypatch.setattr(pallas_gpu, "FLOAT32", small)
  primitives._jitted.cache_clear()
  with common.interpret():
    yield
  primitives._jitted.cache_clear()


@pytest.mark.parametrize(
    "name", quick_unless({*CASES} - {"empty_rows_and_segments"}, CASES)
)
def test_kernels_against_the_oracle(name, interpreted):
  p = oracle.problem(1, **{**SIZES, **CASES[name]})
  parity.check_first_order(pallas_gpu, p)


@pytest.mark.slow
def test_scores_of_ten_thousand(interpreted):
  parity.check_huge_scores(pallas_gpu, SIZES)


SECOND = {
    "grouped_heads": ({"h": 4, "kv_heads": 2}, "qkv", "qkv"),
    "causal_bias": (CASES["causal_bias"], "qkv", "qkv"),
    "empty_rows_and_segments": (
        CASES["empty_rows_and_segments"], "qkv", "qkv",
    ),
    "wide_values": (CASES["wide_values"], "qkv", "qkv"),
    # Nothing moves the scores: the gradient in v is zero.
    "only_v_moves": ({"causal": True}, "v", "qkv"),
    "some": ({}, "k", "vq"),
    "others": ({}, "qv", "k"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", quick_unless({*SECOND} - {"grouped_heads"}, SECOND)
)
def test_gradients_of_the_tangent_against_the_oracle(name, interpreted):
  changes, wrt, out = SECOND[name]
  p = oracle.problem(4, **{**SIZES, **changes})
  parity.check_second_order(pallas_gpu, p, wrt, out)


def test_reverse_over_forward_runs_kernels():
  text = parity.text_of_second_backward(pallas_gpu)
  for name in ("statistics", "rows", "columns"):
    assert f"jvp_attention_second_{name}" in text, name


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_with_kernels(name, interpreted):
  parity.check_transform(pallas_gpu, name)


def test_bfloat16_with_values_far_from_zero(interpreted):
  # Blocks of 128 rows and 64 columns: what is compiled for an H100. The last
  # has columns that are not there, which no causal mask hides.
  parity.check_values_far_from_zero(pallas_gpu, {**SIZES, "n": 128, "m": 250})


def test_a_tangent_that_is_zero_is_not_computed(interpreted):
  assert parity.products(pallas_gpu, "qkv") == 6
  assert parity.products(pallas_gpu, "q") == 4


def test_blocks_that_nobody_sees_are_not_read(interpreted):
  # Row i sees columns up to i - 32; blocks of 16 rows and 32 columns, the last
  # of either ragged, and a bias whose exponential overflows.
  n, m = 90, 58
  spec = spec_lib.Spec("pallas_gpu", 0.125, causal=True, bias=True)
  q, kv = jnp.ones((1, 1, n, 64)), jnp.ones((1, 1, m, 64))
  bias = jnp.full((1, 1, 1, m), 100.0)
  later, earlier = kv.at[:, :, 32:].set(np.nan), q.at[:, :, :64].set(np.nan)
  row = jnp.zeros((1, 1, n))

  @jax.jit
  def run(later, earlier):
    o, _ = pallas_gpu.forward(spec, q, later, later, bias)
    dk, dv = pallas_gpu.backward(
        spec, "kv", earlier, kv, kv, bias, q, row + 108, earlier, row
    )
    return o, dk, dv

  o, dk, dv = run(later, earlier)
  assert np.isfinite(o[:, :, :64]).all() and np.isnan(o[:, :, 64:]).all()
  for a in (dk, dv):
    assert np.isfinite(a[:, :, 32:]).all() and np.isnan(a[:, :, :32]).all()


def test_there_is_a_config_for_every_kernel_and_width():
  names = {
      "forward", "fused", "tangent", "backward_rows", "backward_columns",
      "second_statistics", "second_rows", "second_columns",
  }  # fmt: skip
  assert set(pallas_gpu.CONFIGS) == {
      (name, width) for name in names for width in (64, 128, 256)
  }
  for name, width in pallas_gpu.CONFIGS:
    found = pallas_gpu.config(name, width, 2)
    assert found == pallas_gpu.CONFIGS[name, width]
    assert {found.rows, found.columns} <= {16, 32, 64, 128}
    assert pallas_gpu.config(name, width, 4) == pallas_gpu.FLOAT32


@pytest.mark.parametrize(
    "n,rows,blocks", [(1, 16, 1), (40, 64, 1), (300, 128, 3)]
)
def test_blocks_are_no_larger_than_the_problem(n, rows, blocks):
  x = [np.zeros((1, 1, n, 64), jnp.bfloat16)] * 3
  spec = spec_lib.Spec("pallas_gpu", 1.0)
  shape = pallas_gpu._Shape.of("fused", spec, x)
  assert (shape.rows, shape.row_blocks) == (rows, blocks)
  assert shape.columns == min(64, max(16, rows))


def test_more_batch_rows_than_a_grid_has():
  x = [jax.ShapeDtypeStruct((2**16, 1, 16, 64), jnp.bfloat16)] * 3
  spec = spec_lib.Spec("pallas_gpu", 1.0)
  with one_line_error("q must be of at most 65535 batch rows.*'xla' supports"):
    jax.eval_shape(functools.partial(pallas_gpu.forward, spec), *x)


def test_on_a_cpu_a_named_kernel_is_one_line():
  q = jnp.ones((1, 128, 1, 64))
  with one_line_error("'xla' or 'reference' on cpu, got 'pallas_gpu'"):
    jax.jit(
        lambda q: kernels.attention(q, q, q, implementation="pallas_gpu")
    ).lower(q)
