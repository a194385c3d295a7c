"""What the tests that compile ahead of time share."""

import os

import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from benchmarks import kernel_schedule
from distilljax import plan
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


def mesh(topology, **axes):
  """A mesh of devices that are not here, as "v5e:2x4" or "h100:4"."""
  if topology.startswith("h100"):
    pytest.importorskip(
        "jax_cuda12_plugin", reason="needs what docs/api/kernels.md installs"
    )
  else:
    pytest.importorskip("libtpu", reason="needs the extra plan")
  found = np.asarray(plan.devices(topology))
  return Mesh(
      found.reshape(tuple(axes.values())), tuple(axes),
      axis_types=(AxisType.Auto,) * len(axes),
  )  # fmt: skip
