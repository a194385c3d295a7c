"""Times that a step cannot go below, and how they grow with the slice.

A roofline: FLOPs over peak, bytes of memory over its rate, bytes between chips
over the links that they can take. Each bound is from below, as if the others
were free; a step needs at least the largest, and if nothing overlaps their sum.

Links: a collective over a mesh axis takes those links of a chip that lie along
the directions of the torus which that axis spans, two a direction (one where
the side has two chips only), all at full rate; a ring of permutes takes one
link each way. Collectives are added up one after the other. A hop costs
`HOP_SECONDS` on top, whatever it carries.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from distilljax.plan import chips as chips_lib
from distilljax.plan import hlo
from distilljax.typing import Number

# Of a link, the usual figure for a TPU; it matters for rings of many chips.
HOP_SECONDS = 1e-6


class Bounds(NamedTuple):
  """Seconds of a step.

  Attributes:
    compute: matrix units at peak.
    memory: bytes from and to memory at its rate.
    network: bytes between chips at the rate of their links.
    hops: latencies of the links, one collective after the other.
    rings: part of `network` that is rings of permutes.
    ring_hops: part of `hops` that is.
    blocking: part of `network` that the schedule waits for, so that it hides
      behind nothing as the step was compiled.
  """

  compute: float
  memory: float
  network: float
  hops: float
  rings: float = 0.0
  ring_hops: float = 0.0
  blocking: float = 0.0

  @property
  def binding(self) -> str:
    """Name of the largest."""
    both = {
      "compute": self.compute,
      "memory": self.memory,
      "network": self.network + self.hops,
    }
    return max(both, key=lambda k: both[k])

  @property
  def step(self) -> Number:
    """What a step needs if everything overlaps."""
    return max(self.compute, self.memory, self.network + self.hops)


def directions(
  topology: chips_lib.Topology, coordinates: Sequence[Sequence[int]]
) -> list[int]:
  """Sides of the torus along which some chips differ.

  Args:
    topology: the slice.
    coordinates: of the chips.

  Returns:
    Chips along each of these directions.
  """
  if topology.chip.platform != "tpu":
    return [topology.size]
  out = []
  for i, side in enumerate(topology.sides):
    if len({c[i] for c in coordinates}) > 1:
      out.append(side)
  return out


def links(topology: chips_lib.Topology, sides: Sequence[int]) -> int:
  """Links of a chip along directions with so many chips each."""
  if topology.chip.platform != "tpu":
    return 1
  return max(1, sum(2 if side > 2 else 1 for side in sides))


def _sent(
  one: hlo.Collective, topology: chips_lib.Topology, coordinates: Any
) -> tuple[Number, Number]:
  """(seconds of the bytes, seconds of the hops) of a row of collectives."""
  rate = topology.chip.link_rate
  if one.kind == "collective-permute":
    # Both ways at once where a ring is gone both ways.
    both = min(one.ahead, one.bytes - one.ahead) > 0
    way = max(one.ahead, one.bytes - one.ahead)
    return way / rate, one.count / (2 if both else 1) * HOP_SECONDS
  sides = directions(topology, [coordinates[i] for i in one.members])
  if topology.chip.platform != "tpu":
    return one.bytes / rate, one.count * HOP_SECONDS
  hops = sum(math.ceil(side / 2) for side in sides)
  return (
    one.bytes / (links(topology, sides) * rate),
    one.count * hops * HOP_SECONDS,
  )


def bounds(
  *,
  flops: Number,
  moved: hlo.Moved,
  topology: chips_lib.Topology,
  coordinates: Sequence[Sequence[int]],
) -> Bounds:
  """The roofline of a step.

  Args:
    flops: of all chips together.
    moved: what a chip moves.
    topology: the slice.
    coordinates: of the mesh's chips, in the order of their ids.

  Returns:
    Seconds.
  """
  chip = topology.chip
  sent = [(0.0, 0.0)], [(0.0, 0.0)]
  blocking = 0.0
  for one in moved.collectives:
    ring = one.kind == "collective-permute"
    seconds = _sent(one, topology, coordinates)
    sent[ring].append(seconds)
    blocking += seconds[0] * one.blocking / max(one.bytes, 1)
  others, rings = ([sum(x) for x in zip(*part)] for part in sent)
  return Bounds(
    flops / (topology.size * chip.flops),
    moved.memory / chip.hbm_rate,
    others[0] + rings[0],
    others[1] + rings[1],
    *rings,
    blocking,
  )


def weak_scaling(
  report: Mapping[str, Any], shapes: Sequence[str]
) -> list[dict[str, Any]]:
  """A plan's step on other slices, on paper: nothing is compiled.

  Every chip keeps its rows, and the one axis that networks are cut over grows
  with the slice. So FLOPs, bytes of memory and activations of a chip stay;
  parameters and optimizer shrink as 1 / n; what a chip receives of gathers and
  scatters goes as (n - 1) / n; links are those of the slice's shape; a gather
  that the compiler made a ring has n steps, whose hops add up.

  Args:
    report: of `experiments.plan`, cut over one mesh axis.
    shapes: slices of the same chip: "2x2x4", "4x4x4", ...

  Returns:
    A row for each: chips, seconds of compute, memory, network and hops; whether
    the network can hide behind compute, the share of peak that is then left at
    most, and the share if nothing of it is hidden; bytes a chip.
  """
  base = chips_lib.topology(report["topology"])
  time, memory = report["bounds"], report["memory"]
  own = lambda n: (n - 1) / n
  rows = []
  for shape in shapes:
    there = chips_lib.topology(f"{base.kind}:{shape}")
    n = there.size
    wide = links(base, base.sides) / links(there, there.sides)
    rings = time["rings"] * own(n) / own(base.size)
    rest = (time["network"] - time["rings"]) * own(n) / own(base.size)
    steps = lambda t: sum(math.ceil(side / 2) for side in t.sides)
    hops = time["ring_hops"] * n / base.size
    hops += (time["hops"] - time["ring_hops"]) * steps(there) / steps(base)
    network = rings + rest * wide + hops
    held = memory["state"] * base.size / n + memory["temporaries"]
    rows.append(
      {
        "topology": there.name,
        "chips": n,
        "compute": time["compute"],
        "memory": time["memory"],
        "network": rings + rest * wide,
        "hops": hops,
        "hidden": network <= time["compute"],
        "overlapped": time["compute"]
        / max(time["compute"], time["memory"], network),
        "serial": time["compute"]
        / (max(time["compute"], time["memory"]) + network),
        "bytes": held,
        "fits": held <= there.chip.usable,
      }
    )
  return rows
