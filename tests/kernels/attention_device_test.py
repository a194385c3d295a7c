"""The kernels compiled, on the TPU or GPU that is here, against the oracle.

JAX_PLATFORMS= pytest -m device -n 0 tests/kernels

The bodies of the interpreted tests with the kernels' own tiles; empty where
there is no such chip. Written where there is none: no bound here has been
measured on a chip.
"""

import jax
import numpy as np
import pytest

from distilljax.kernels.jvp_attention import pallas_gpu, pallas_tpu
from tests.kernels import oracle, parity

pytestmark = pytest.mark.device
LONG_PROGRAMS = True

MODULES = {"tpu": pallas_tpu, "gpu": pallas_gpu}
# Several blocks of rows and of columns of every tile, the last ones ragged.
SIZES = {"b": 2, "n": 1100, "m": 1300, "h": 4, "kv_heads": 2, "d": 64, "e": 64}
CASES = {
    "plain": {},
    "width_128": {"d": 128, "e": 128},
    "causal_bias": {"causal": True, "bias": (1, 1, 1, 1300)},
    "empty_rows_and_segments": {
        "n": 1300, "m": 1100, "causal": True,
        "segments": (
            np.arange(2600).reshape(2, 1300) // 500,
            np.arange(2200).reshape(2, 1100) // 450,
        ),
    },
    "one_row": {"n": 1},
}  # fmt: skip
# Chips multiply float32 in three or six parts of fewer bits each.
BOUND = 2e-5


@pytest.fixture(scope="module")
def module():
  """The kernels of this platform."""
  platform = jax.default_backend()
  if platform not in MODULES:
    pytest.skip(f"needs a TPU or GPU, this is {platform}")
  return MODULES[platform]


@pytest.mark.parametrize("name", CASES)
def test_kernels_against_the_oracle(name, module):
  p = oracle.problem(1, **{**SIZES, **CASES[name]})
  parity.check_first_order(module, p, BOUND)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_the_tangent_against_the_oracle(name, module):
  p = oracle.problem(4, **{**SIZES, **CASES[name]})
  parity.check_second_order(module, p, "qkv", "qkv", BOUND)


@pytest.mark.parametrize("name", parity.TRANSFORMS)
def test_transforms(name, module):
  parity.check_transform(module, name, BOUND)


def test_bfloat16_with_values_far_from_zero(module):
  parity.check_values_far_from_zero(module, SIZES)
