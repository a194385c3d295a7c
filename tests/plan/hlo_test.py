"""What compiled programs move: a small text, and a real one of 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from distilljax import plan, train
from distilljax.plan import hlo

MESH = {"data": 2, "fsdp": 4, "tensor": 1}

# Cut down from what the TPU compiler writes: a loop of four runs (from 1 to 9
# in steps of 2) with a ring gone both ways, a fusion that reads a slice and one
# that writes one, a gather of another loop's worth, and a fused reduce-scatter.
TEXT = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[8,128]) -> f32[2,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[8,128]{1,0:T(8,128)} all-reduce(%p), channel_id=9, \
replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%add
  ROOT %slice.1 = f32[2,128]{1,0:T(8,128)} slice(%all-reduce.1), slice={[0:2], \
[0:128]}
}

%reads (w: bf16[6,64,128], i: s32[]) -> bf16[1,64,128] {
  %w = bf16[6,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %zero = s32[] constant(0)
  ROOT %part = bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%w, %i, \
%zero, %zero), dynamic_slice_sizes={1,64,128}
}

%writes (o: bf16[6,64,128], u: bf16[1,64,128], i: s32[]) -> bf16[6,64,128] {
  %o = bf16[6,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %u = bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %i.1 = s32[]{:T(128)} parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %dus = bf16[6,64,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%o, %u, \
%i.1, %zero.1, %zero.1)
}

%condition (c: (s32[], bf16[6,64,128], bf16[6,64,128])) -> pred[] {
  %nine = s32[]{:T(128)} constant(9)
  %c = (s32[]{:T(128)}, bf16[6,64,128]{2,1,0}, /*index=2*/bf16[6,64,128]{2,1,0\
}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%at, %nine), direction=LT
}

%body (t: (s32[], bf16[6,64,128], bf16[6,64,128])) -> (s32[], bf16[6,64,128], \
bf16[6,64,128]) {
  %t = (s32[]{:T(128)}, bf16[6,64,128]{2,1,0}, bf16[6,64,128]{2,1,0}) \
parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %n = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = bf16[6,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %y = bf16[6,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%t), index=2
  %fusion.1 = bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)} fusion(%x, %n), \
kind=kLoop, calls=%reads
  %ring.1 = (bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,64,128]{2,1,0:T(8\
,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%fusion.\
1), channel_id=3, source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,\
7},{7,4}}
  %done.1 = bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)} collective-permute-done(%\
ring.1)
  %ring.2 = (bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,64,128]{2,1,0:T(8\
,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%done.1)\
, channel_id=4, source_target_pairs={{0,3},{1,0},{2,1},{3,2},{4,7},{5,4},{6,5}\
,{7,6}}
  %done.2 = bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)} collective-permute-done(%\
ring.2)
  %fusion.2 = bf16[6,64,128]{2,1,0:T(8,128)(2,1)} fusion(%y, %done.2, %n), \
kind=kLoop, calls=%writes
  %next = s32[]{:T(128)} add(%n, %two)
  ROOT %out = (s32[]{:T(128)}, bf16[6,64,128]{2,1,0}, bf16[6,64,128]{2,1,0}) \
tuple(%next, %x, %fusion.2)
}

ENTRY %main (w: bf16[6,64,128], g: f32[8,128]) -> (bf16[6,64,128]) {
  %w.1 = bf16[6,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %g = f32[8,128]{1,0:T(8,128)} parameter(1)
  %one = s32[]{:T(128)} constant(1)
  %start = s32[]{:T(128)} copy(%one)
  %both = (s32[]{:T(128)}, bf16[6,64,128]{2,1,0}, bf16[6,64,128]{2,1,0}) tuple\
(%start, %w.1, %w.1)
  %loop = (s32[]{:T(128)}, bf16[6,64,128]{2,1,0}, bf16[6,64,128]{2,1,0}) while\
(%both), condition=%condition, body=%body
  %fused = f32[2,128]{1,0:T(8,128)} fusion(%g), kind=kCustom, \
calls=%all-reduce-scatter.1
  %gather = f32[16,128]{1,0:T(8,128)} all-gather(%g), channel_id=5, \
replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}
  ROOT %last = bf16[6,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%loop), \
index=2
}
"""


def test_a_recorded_text():
  moved = plan.read_moved(TEXT, MESH)
  assert moved.unknown_loops == ()
  layer, runs, g = 64 * 128 * 2, 4, 8 * 128 * 4
  rows = {c.kind: c for c in moved.collectives}
  ring = rows["collective-permute"]
  assert (ring.axes, ring.group, ring.count) == ("fsdp", 4, 2 * runs)
  assert (ring.bytes, ring.ahead) == (2 * runs * layer, runs * layer)
  # The rings are started and awaited; the others stop the chip.
  assert ring.blocking == 0
  assert all(c.blocking == c.bytes for c in rows.values() if c is not ring)
  scatter = rows["reduce-scatter"]
  assert (scatter.axes, scatter.group, scatter.count) == ("fsdp", 4, 1)
  assert scatter.bytes == 3 / 4 * g
  gather = rows["all-gather"]
  assert (gather.axes, gather.group) == ("data", 2)
  assert (gather.bytes, gather.members) == (g, (0, 4))
  assert "all-reduce" not in rows
  # A run reads one layer and writes one; the rings lie in the fast memory. The
  # counter is read and written by its addition and read by the fusions, and
  # copied once. The gather writes two and reads one, the scatter a part.
  small = runs * (4 + 4 + 4 + 4 + 4) + 8
  expected = runs * 2 * layer + 3 * g + g + g / 4 + small
  assert abs(moved.memory - expected) <= small


def test_a_ring_has_a_direction():
  up, down = "{0,1},{1,2},{2,3},{3,0}", "{0,3},{1,0},{2,1},{3,2}"
  for pairs, ahead in ((up, 0), (down, 1)):
    text = (
      "ENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n"
      "  ROOT %r = f32[8]{0} collective-permute(%p), channel_id=1,"
      f" source_target_pairs={{{pairs}}}\n}}\n"
    )
    (found,) = plan.read_moved(text, {"fsdp": 4}).collectives
    assert (found.bytes, found.ahead) == (32, ahead * 32)
    assert found.blocking == 32


def test_groups_in_every_notation():
  listed = hlo.groups("replica_groups={{0,2},{1,3}}, x")
  np.testing.assert_array_equal(listed, [[0, 2], [1, 3]])
  iota = hlo.groups("channel_id=1, replica_groups=[2,4]<=[8], x")
  np.testing.assert_array_equal(iota, np.arange(8).reshape(2, 4))
  turned = hlo.groups("replica_groups=[4,2]<=[2,4]T(1,0), x")
  np.testing.assert_array_equal(turned, np.arange(8).reshape(2, 4).T)
  assert hlo.groups("replica_groups={}, x") is None
  named = hlo.groups(
    "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, x"
  )
  np.testing.assert_array_equal(named, np.arange(8).reshape(2, 4))
  plain = hlo.groups("replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}")
  np.testing.assert_array_equal(plain, np.arange(8).reshape(4, 2).T)


def test_a_real_program_on_eight_devices():
  """Cut matrices in a scan: gathered once a layer, rows reduced at the end."""
  mesh = train.make_mesh(jax.devices()[:8], data=2, fsdp=4)
  depth, width, rows = 5, 64, 16
  weights = NamedSharding(mesh, PartitionSpec(None, "fsdp", None))
  cut = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
  whole = NamedSharding(mesh, PartitionSpec())

  def loss(w, x):
    def layer(x, w):
      x = jax.lax.with_sharding_constraint(x, cut)
      w = jax.lax.with_sharding_constraint(w, whole)
      return jnp.tanh(x @ w), None

    return jnp.sum(jax.lax.scan(layer, x, w)[0])

  shape = lambda size, place: jax.ShapeDtypeStruct(
    size, jnp.float32, sharding=place
  )
  done = (
    jax.jit(loss, out_shardings=whole)
    .lower(shape((depth, width, width), weights), shape((rows, width), cut))
    .compile()
  )
  moved = plan.read_moved(done.as_text(), mesh.shape)
  assert moved.unknown_loops == ()
  rows_ = {(c.kind, c.axes): c for c in moved.collectives}
  gather = rows_["all-gather", "fsdp"]
  assert gather.group == 4
  assert gather.bytes == 3 / 4 * depth * width * width * 4
  reduced = rows_["all-reduce", "data+fsdp"]
  assert (reduced.count, reduced.group) == (1, 8)
  assert reduced.bytes == 2 * 7 / 8 * 4
  assert set(rows_) == {("all-gather", "fsdp"), ("all-reduce", "data+fsdp")}
  # Each layer's matrix is written once gathered and read by the product.
  assert moved.memory > 2 * depth * width * width * 4
