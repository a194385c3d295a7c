"""What the tests that compile ahead of time share."""

import os

import pytest

from benchmarks import kernel_schedule
from distilljax.kernels.jvp_attention import tpu_bounds

CHIPS = tuple(tpu_bounds.TOPOLOGIES)
CHIPS = CHIPS if os.environ.get("DISTILLJAX_AOT") == "all" else CHIPS[:1]


def devices(chip):
  """The devices of a chip that is not here."""
  pytest.importorskip("libtpu", reason="needs the extra plan")
  return kernel_schedule.devices(chip)


def shapes(chip, *sizes):
  """Abstract arrays on one device of a chip, from (shape, dtype)."""
  devices(chip)
  return kernel_schedule.shapes(chip, *sizes)
