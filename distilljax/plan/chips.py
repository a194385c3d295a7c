"""Chips that plans are made for: what they hold, how fast, and how wired.

Numbers are the vendors' own, per chip. TPU: Google Cloud's pages "TPU v5e",
"TPU v5p" and "TPU v6e" (docs.cloud.google.com/tpu/docs), whose interconnect
figure counts both directions over all ports: a link carries a `1 / (2 ports)`
part of it one way. H100: NVIDIA's data sheet of the SXM5 module (dense bf16,
NVLink 900 GB/s both directions). `usable` is what the compiler of this version
lets a program take (it says so when it refuses one); of an H100 what its
description, which the compiler is given, says.

One row of this table serves planner, kernel benchmarks and compile tests.
"""

import functools
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from distilljax import _checks

GIB = 2**30

# What a process sets before its first compile for a TPU that is not there.
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  # Two processes may compile; the lock is for a chip.
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Chip(NamedTuple):
  """What one chip has.

  Attributes:
    platform: "tpu" or "cuda".
    hbm: bytes of memory.
    usable: bytes of it that a program may take.
    flops: bf16 FLOPs a second at peak.
    hbm_rate: bytes a second from and to memory.
    link_rate: bytes a second of one link in one direction.
    shapes: known topologies.
  """

  platform: str
  hbm: int
  usable: int
  flops: float
  hbm_rate: float
  link_rate: float
  shapes: tuple[str, ...]


_TWO = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_THREE = (
  "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8",
  "8x8x16", "8x16x16", "16x16x16", "16x16x24",
)  # fmt: skip

CHIPS = {
  "v5e": Chip(
    "tpu", 16 * GIB, int(15.75 * GIB), 197e12, 819e9, 400e9 / 8, _TWO
  ),
  "v5p": Chip(
    "tpu", 95 * GIB, int(95.74 * GIB), 459e12, 2765e9, 1200e9 / 12, _THREE
  ),
  "v6e": Chip(
    "tpu", 32 * GIB, int(31.25 * GIB), 918e12, 1640e9, 800e9 / 8, _TWO
  ),
  "h100": Chip(
    "cuda", 80 * GIB, 84_978_434_048, 989e12, 3350e9, 450e9,
    ("1", "2", "4", "8"),
  ),  # fmt: skip
}


class Topology(NamedTuple):
  """A slice of chips.

  Attributes:
    name: such as "v5p:8x8x8".
    kind: a key of `CHIPS`.
    chip: what one of them has.
    sides: chips along each direction of the torus.
  """

  name: str
  kind: str
  chip: Chip
  sides: tuple[int, ...]

  @property
  def size(self) -> int:
    """Number of chips."""
    return math.prod(self.sides)


def topology(name: str) -> Topology:
  """Reads a topology's name.

  Args:
    name: chip and shape: "v5e:16x16", "v5p:8x8x8", "h100:8".

  Returns:
    The topology; nothing is compiled or loaded.

  Raises:
    ValueError: unknown chip or shape; the nearest valid name is in the line.
  """
  kind, _, shape = name.partition(":")
  examples = [f"{k}:{c.shapes[-2]}" for k, c in CHIPS.items()]
  if kind not in CHIPS:
    raise ValueError(
      f"topology: chip must be one of {', '.join(CHIPS)} (as in"
      f" {examples[0]}), got {name!r}{_checks.nearest(kind, CHIPS)}"
    )
  chip = CHIPS[kind]
  if shape not in chip.shapes:
    sides = [int(n) for n in re.findall(r"\d+", shape)]
    count = math.prod(sides) if sides else 1
    close = lambda s: abs(math.log(math.prod(_sides(s)) / max(count, 1)))
    raise ValueError(
      f"topology: {kind} must be one of"
      f" {', '.join(f'{kind}:{s}' for s in chip.shapes)}, got {name!r};"
      f" nearest: {kind}:{min(chip.shapes, key=close)}"
    )
  return Topology(name, kind, chip, _sides(shape))


def _sides(shape: str) -> tuple[int, ...]:
  return tuple(int(n) for n in shape.split("x"))


@functools.cache
def devices(name: str) -> tuple[Any, ...]:
  """The devices of a topology; none has to be there.

  Sets `ENVIRONMENT`: call it before JAX has looked for devices.

  Args:
    name: see `topology`.

  Returns:
    Devices to make a mesh of and compile for.

  Raises:
    ValueError: an unknown topology, or its compiler is not installed.
  """
  wanted = topology(name)
  os.environ.update(ENVIRONMENT)
  if not jax.config.jax_platforms:
    # Else CUDA's plugin wants a driver and cuDNN, of which a plan needs none.
    jax.config.update("jax_platforms", "cpu")
  if wanted.chip.platform == "tpu":
    options = {"platform": "tpu", "topology_name": name}
    extra = "'distilljax[plan]'"
  else:
    target = pathlib.Path(__file__).with_name(f"{wanted.kind}.txtpb")
    options = {
      "platform": "cuda",
      "topology_name": wanted.kind,
      "target_config": target.read_text(encoding="utf-8"),
      "topology": f"1x1x{wanted.size}",
    }
    extra = "the environment for H100s of docs/api/kernels.md"
  try:
    return tuple(topologies.get_topology_desc(**options).devices)
  except Exception as e:
    line = str(e).strip().splitlines()[0] if str(e) else type(e).__name__
    raise ValueError(
      f"topology: {name} cannot be compiled for here ({line}); it needs {extra}"
    ) from None
