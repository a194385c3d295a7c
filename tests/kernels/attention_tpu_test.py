"""The TPU kernels, interpreted: one small shape each, against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from distilljax import kernels
from distilljax.kernels.jvp_attention import (
  common,
  pallas_tpu,
  primitives,
)
from tests.helpers import one_line_error
from tests.kernels import oracle, parity
from tests.kernels.attention_test import quick_unless

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
  with common.interpret(pltpu.InterpretParams(random_seed=3)):
    yield
  pltpu.reset_tpu_interpret_mode_state()


@pytest.fixture
def interpreted(small_tiles):
  """Kernels behind the public function."""
  primitives._jitted.cache_clear()
  with common.interpret():
    yield
  primitives._jitted.cache_clear()


@pytest.mark.parametrize(
    "name", quick_unless({"causal_bias"}, CASES)
)
def test_kernels_against_the_oracle(name, random_order):
  p = oracle.problem(1, **{**SIZES, **CASES[name]})
  parity.check_first_order(pallas_tpu, p)


@pytest.mark.slow
def test_scores_of_ten_thousand(interpreted):
  parity.check_huge_scores(pallas_tpu, SIZES)


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
  parity.check_second_order(pallas_tpu, p, wrt, out)


def test_reverse_over_forward_runs_kernels():
  text = parity.text_of_second_backward(pallas_tpu)
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
  parity.check_transform(pallas_tpu, name)


def test_bfloat16_with_values_far_from_zero(interpreted):
  parity.check_values_far_from_zero(pallas_tpu, {**SIZES, "n": 128, "m": 256})


def test_a_tangent_that_is_zero_is_not_computed(interpreted):
  assert parity.products(pallas_tpu, "qkv") == 6
  assert parity.products(pallas_tpu, "q") == 4


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
