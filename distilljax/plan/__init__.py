"""Plans for hardware that is not there: what a compiled step holds and moves.

`experiments.plan` puts these together; each part serves on its own.
"""

from distilljax.plan.chips import CHIPS, Chip, Topology, devices, topology
from distilljax.plan.flops import Flops
from distilljax.plan.flops import count as count_flops
from distilljax.plan.hlo import Collective, Moved
from distilljax.plan.hlo import read as read_moved
from distilljax.plan.memory import by_network, bytes_per_chip
from distilljax.plan.roofline import Bounds, bounds, weak_scaling

__all__ = [
  "CHIPS",
  "Bounds",
  "Chip",
  "Collective",
  "Flops",
  "Moved",
  "Topology",
  "bounds",
  "by_network",
  "bytes_per_chip",
  "count_flops",
  "devices",
  "read_moved",
  "topology",
  "weak_scaling",
]
