"""Topologies by name, and bytes and bounds worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distilljax import plan, train
from distilljax.plan.roofline import HOP_SECONDS
from tests.helpers import one_line_error


def test_a_name_is_a_chip_and_a_shape():
  found = plan.topology("v5p:8x8x8")
  assert (found.kind, found.sides, found.size) == ("v5p", (8, 8, 8), 512)
  assert plan.topology("h100:8").size == 8
  for kind, chip in plan.CHIPS.items():
    for shape in chip.shapes:
      assert plan.topology(f"{kind}:{shape}").size >= 1
    assert chip.usable <= chip.hbm * 1.01


@pytest.mark.parametrize(
  "name,match",
  [
    ("v5:8x8", "chip must be one of v5e, v5p.*got 'v5:8x8'.*did you mean"),
    ("v5e:16x15", "v5e must be one of.*nearest: v5e:16x16"),
    ("v5p:8x8", "v5p must be one of.*nearest: v5p:4x4x4"),
    ("h100:9", "h100 must be one of.*nearest: h100:8"),
    ("v5e", "v5e must be one of.*nearest: v5e:2x2"),
  ],
)
def test_an_unknown_topology_is_one_line_with_the_nearest(name, match):
  with one_line_error(match):
    plan.topology(name)


def test_bytes_of_a_chip_are_those_of_its_part():
  mesh = train.make_mesh(jax.devices()[:8], data=2, fsdp=4)
  shape = lambda size, dtype, *spec: jax.ShapeDtypeStruct(
    size, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))
  )
  tree = {
    "cut": shape((16, 6), jnp.float32, "fsdp"),
    "whole": shape((5,), jnp.bfloat16),
    "key": jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")),
  }
  assert plan.bytes_per_chip(tree) == 16 * 6 * 4 // 4 + 5 * 2 + 2 * 4
  (row,) = plan.by_network({"student": {"parameters": tree["cut"]}})
  assert row == {
    "network": "student", "kind": "parameters", "numbers": 96, "bytes": 96,
  }  # fmt: skip


def one(kind, **values):
  given = {
    "kind": kind, "axes": "fsdp", "group": 8, "members": (0, 1, 2, 3),
    "count": 1.0, "bytes": 0.0, "ahead": 0.0,
    "blocking": 0.0,
  }  # fmt: skip
  return plan.Collective(**{**given, **values})


def roofline(*collectives, flops=0.0, memory=0.0, name="v5p:2x2x4"):
  topology = plan.topology(name)
  grid = np.indices(topology.sides).reshape(len(topology.sides), -1).T
  return plan.bounds(
    flops=flops,
    moved=plan.Moved(memory, collectives, ()),
    topology=topology,
    coordinates=[tuple(int(i) for i in c) for c in grid],
  )


def test_bounds_are_work_over_rate():
  chip = plan.CHIPS["v5p"]
  found = roofline(flops=16 * chip.flops, memory=2 * chip.hbm_rate)
  assert (found.compute, found.memory, found.network) == (1.0, 2.0, 0.0)
  assert (found.binding, found.step) == ("memory", 2.0)


def test_a_group_takes_the_links_of_the_directions_it_spans():
  rate = plan.CHIPS["v5p"].link_rate
  # Chips 0..3 lie along the side of four: two links.
  line = roofline(one("all-gather", bytes=4 * rate))
  assert line.network == 2.0
  assert line.hops == 2 * HOP_SECONDS
  # All sixteen span 2 x 2 x 4: one link each way of two chips, two of four.
  whole = roofline(one("all-gather", bytes=4 * rate, members=tuple(range(16))))
  assert whole.network == 1.0
  assert whole.hops == pytest.approx(4 * HOP_SECONDS)
  assert whole.binding == "network"


def test_a_ring_takes_a_link_each_way():
  rate = plan.CHIPS["v5p"].link_rate
  ring = {"members": (0, 1), "count": 10.0}
  there = roofline(one("collective-permute", bytes=4 * rate, **ring))
  assert there.network == there.rings == 4.0
  assert there.hops == pytest.approx(10 * HOP_SECONDS)
  both = one("collective-permute", bytes=4 * rate, ahead=2 * rate, **ring)
  assert roofline(both).network == 2.0
  assert roofline(both).hops == pytest.approx(5 * HOP_SECONDS)


def test_a_gpu_has_one_port():
  rate = plan.CHIPS["h100"].link_rate
  found = roofline(one("all-gather", bytes=3 * rate), name="h100:8")
  assert found.network == 3.0


def test_weak_scaling_by_hand():
  report = {
    "topology": "v5p:2x2x4",
    "bounds": {
      "compute": 1.0, "memory": 0.1, "network": 0.75, "hops": 0.01,
      "rings": 0.25, "ring_hops": 0.008,
    },
    "memory": {"state": 64e9, "temporaries": 10e9},
  }  # fmt: skip
  same, large = plan.weak_scaling(report, ["2x2x4", "16x16x16"])
  assert same["chips"] == 16
  assert same["network"] == pytest.approx(0.75)
  assert same["hops"] == pytest.approx(0.01)
  assert same["bytes"] == 74e9
  assert same["hidden"] is True
  # A gather brings 4095/4096 instead of 15/16, over six links and not four; a
  # ring's two links stay, and it has 256 times the steps. Other hops: 24 for 4.
  part = (4095 / 4096) / (15 / 16)
  assert large["network"] == pytest.approx((0.25 + 0.5 * 4 / 6) * part)
  assert large["hops"] == pytest.approx(0.008 * 256 + 0.002 * 24 / 4)
  assert large["bytes"] == 64e9 / 256 + 10e9
  assert large["hidden"] is False
  network = large["network"] + large["hops"]
  assert large["overlapped"] == pytest.approx(1 / network)
  assert large["serial"] == pytest.approx(1 / (1 + network))
  assert same["overlapped"] == 1


def test_what_the_schedule_waits_for_is_said():
  rate = plan.CHIPS["v5p"].link_rate
  half = roofline(one("all-gather", bytes=4 * rate, blocking=2 * rate))
  assert (half.network, half.blocking) == (2.0, 1.0)
