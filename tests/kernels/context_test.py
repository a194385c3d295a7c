"""Attention cut over a mesh, held against the whole one.

On host devices: values, tangents, gradients and second order against
`oracle.py` in float64, the transforms of JAX against the reference, collectives
counted in the lowered text.
"""

import dataclasses
import doctest
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from distilljax import kernels
from distilljax.kernels.jvp_attention import (
    context,
    exchange,
    primitives,
    ring,
    xla,
)
from distilljax.kernels.jvp_attention import spec as spec_lib
from tests.helpers import one_line_error
from tests.kernels import attention_test, oracle

AXIS = "context"
# Local parts of four: a zig-zag half has two rows.
LOCAL = 4


def mesh(**axes):
  devices = jax.devices()[: int(np.prod(list(axes.values())))]
  auto = (jax.sharding.AxisType.Auto,) * len(axes)
  return jax.make_mesh(tuple(axes.values()), tuple(axes), auto, devices=devices)


def problem(parts, *, causal, segments, seed=0, **sizes):
  """Groups of two heads; with segments a whole part sees nothing."""
  n = LOCAL * parts
  rng = np.random.default_rng(seed)
  ids = None
  if segments:
    ids = rng.integers(2, size=(2, 1, n))
    ids[0, 0, LOCAL : 2 * LOCAL] = 7  # queries whose segment no key has
  sizes = {"b": 1, "h": 8, "kv_heads": 4, "d": 4, "e": 3} | sizes
  return oracle.problem(
      seed, n=n, m=n, causal=causal, segments=ids, **sizes
  )


def cut(parts, strategy, order="contiguous", check_vma=True, **options):
  """(q, k, v, ids) -> (o, lse) of whole arrays in their natural order."""

  def attend(q, k, v, q_segment_ids=None, kv_segment_ids=None, **rest):
    n = q.shape[1]
    to = (
        context.zigzag_positions(n, parts)
        if order == "zigzag" else np.arange(n)
    )  # fmt: skip
    arrays = [q, k, v]
    if q_segment_ids is not None:
      arrays += [q_segment_ids, kv_segment_ids]

    def local(q, k, v, *ids):
      names = ("q_segment_ids", "kv_segment_ids")
      return kernels.context_attention(
          q, k, v, axis_name=AXIS, strategy=strategy, order=order,
          return_lse=True, **dict(zip(names, ids)), **options, **rest,
      )  # fmt: skip

    sequence = P(None, AXIS)
    found = jax.shard_map(
        local, mesh=mesh(context=parts), check_vma=check_vma,
        in_specs=(sequence,) * len(arrays), out_specs=(sequence, sequence),
    )(*(a[:, to] for a in arrays))  # fmt: skip
    return tuple(a[:, np.argsort(to)] for a in found)

  return attend


def both_modes(attend, p, second):
  """What the oracle gives, from one program."""
  options = attention_test.options(p)

  def inner(pair, do, dl):
    o, lse = pair
    finite = jnp.isfinite(lse)
    return jnp.sum(o * do) + jnp.sum(jnp.where(finite, lse, 0 * lse) * dl)

  @jax.jit
  def run(x, t, do, dl):
    f = lambda x: attend(**x, **options)
    (o, lse), (to, mu) = jax.jvp(f, (x,), (t,))
    found = {"o": o, "lse": lse, "to": to, "mu": mu}
    found["dx"] = jax.grad(lambda x: inner(f(x), do, dl))(x)
    if second:
      found["ddx"] = jax.grad(
          lambda x: inner(jax.jvp(f, (x,), (t,))[1], do, dl)
      )(x)
    return found

  x, t = attention_test.arrays(p["x"]), attention_test.arrays(p["t"])
  return run(x, t, jnp.asarray(p["do"]), jnp.asarray(p["dl"]))


def check(attend, p, second=True):
  theirs = oracle.solve(p)
  if not second:
    theirs.pop("ddx")
  attention_test.check(both_modes(attend, p, second), theirs, 1e-13)


# --- one device's part of the sequence -----------------------------------


def test_a_causal_ring_in_zigzag_order(x64, strict):
  p = problem(4, causal=True, segments=True)
  assert np.isneginf(oracle.solve(p)["lse"]).any()
  check(cut(4, "ring", "zigzag"), p, second=False)


def test_all_to_all_in_zigzag_order(x64, strict):
  # Two key heads on four devices: they are repeated.
  p = problem(4, causal=True, segments=True, kv_heads=2, h=4)
  check(cut(4, "all_to_all", "zigzag"), p, second=False)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [4, 8])
@pytest.mark.parametrize("strategy", context.STRATEGIES)
@pytest.mark.parametrize("order", context.ORDERS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segments", [False, True])
def test_both_orders_of_derivatives(
    parts, strategy, order, causal, segments, x64, strict
):
  p = problem(parts, causal=causal, segments=segments)
  check(cut(parts, strategy, order), p)


def test_second_order_of_a_ring(x64):
  """Its slots on two parts of a mapped axis: no mesh, a quick compile."""
  draw = np.random.default_rng(5).normal
  sizes = {"q": (2, 1, 4, 3, 4), "k": (2, 1, 2, 3, 4), "v": (2, 1, 2, 3, 3)}
  x, t, d = ([draw(size=s) for s in sizes.values()] for _ in range(3))
  do, dl = draw(size=(2, 1, 4, 3, 3)), draw(size=(2, 1, 4, 3))
  whole = spec_lib.Spec("xla", 0.5)
  parts = dataclasses.replace(whole, axis=AXIS, parts=2)

  def run(module, spec, x, t, d, do, dl):
    o, lse, to, mu = module.fused(spec, "qkv", *x, *t)
    return {
        "fused": (o, lse, to, mu),
        "tangent": module.tangent(spec, "qk", *x, o, lse, *t[:2]),
        "gradients": module.second_backward(
            spec, "qkv", "vqk", *x, o, lse, *t, do, dl
        ),
        "tangents": module.second_tangent(
            spec, "qkv", "kv", *x, o, lse, *t, *d[1:]
        ),
    }

  one = lambda a: jnp.moveaxis(a, 0, 2).reshape(
      *a.shape[1:3], -1, *a.shape[4:]
  )
  found = jax.vmap(
      functools.partial(run, ring, parts), axis_name=AXIS
  )
  ours, theirs = jax.jit(
      lambda *a: (
          jax.tree.map(one, found(*a)),
          run(xla, whole, *jax.tree.map(one, a)),
      )
  )(x, t, d, do, dl)
  attention_test.check(ours, theirs, 1e-13)


TRANSFORMS = (
    "linearize", "mean_flow", "mean_flow_in_checkpoint",
    "mean_flow_of_checkpoint_that_saves", "mean_flow_of_inner_jit",
    "reverse_over_forward_in_checkpoint", "hvp", "forward_over_forward",
    "linearize_of_jvp",
)  # fmt: skip


def plain(strategy, check_vma, order="zigzag"):
  """(q, k, v) -> o of whole arrays, causal."""
  attend = cut(4, strategy, order, check_vma)
  return lambda q, k, v: attend(q, k, v, causal=True)[0]


def wide_inputs(seed=0):
  """Those of `attention_test`, of a length and of heads that can be cut."""
  rng = np.random.default_rng(seed)
  draw = lambda *s: jnp.asarray(rng.normal(size=s))
  return draw(1, 16, 4, 4), draw(1, 16, 2, 4), draw(1, 16, 2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("strategy", context.STRATEGIES)
@pytest.mark.parametrize("check_vma", [False, True])
def test_transforms_of_a_cut_sequence(
    name, strategy, check_vma, x64, monkeypatch
):
  monkeypatch.setattr(attention_test, "inputs", wide_inputs)
  transform = attention_test.TRANSFORMS[name]
  whole = lambda *x: kernels.attention(
      *x, causal=True, implementation="reference"
  )
  ours, theirs = jax.jit(
      lambda: (transform(plain(strategy, check_vma)), transform(whole))
  )()
  attention_test.check(ours, theirs, 1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", context.STRATEGIES)
def test_transforms_of_mapped_cut_sequences(strategy, x64):
  x, t = wide_inputs(1), wide_inputs(2)
  both = lambda a: jnp.stack([a, jnp.cos(a)], axis=1)

  def run(f):
    jvp = lambda x, t: jax.jvp(f, x, t)
    grad = jax.grad(lambda x, t: attention_test.mean_flow(f, x, t))
    one = lambda tq: jvp(x, (tq, *t[1:]))
    return (
        jax.vmap(jvp, in_axes=1)(tuple(map(both, x)), tuple(map(both, t))),
        jax.vmap(one, in_axes=1, out_axes=(None, 0))(both(t[0])),
        jax.vmap(grad, in_axes=(None, 1))(x, tuple(map(both, t))),
    )

  whole = lambda *x: kernels.attention(
      *x, causal=True, implementation="reference"
  )
  ours, theirs = jax.jit(lambda: (run(plain(strategy, True)), run(whole)))()
  attention_test.check(ours, theirs, 1e-13)


def collectives(lowered):
  text = lowered.as_text()
  found = re.findall(r"stablehlo\.(all_to_all|collective_permute|all_gather)",
                     text)  # fmt: skip
  return {name: found.count(name) for name in sorted(set(found))}


@pytest.mark.parametrize(
    "strategy,transform,expected",
    [
        # q, k, v there and o back; with tangents not one more.
        ("all_to_all", "value", {"all_to_all": 2}),
        ("all_to_all", "jvp", {"all_to_all": 2}),
        # And do there, dq, dk, dv back.
        ("all_to_all", "mean_flow", {"all_to_all": 4}),
        ("all_to_all", "checkpoint", {"all_to_all": 4}),
        ("all_to_all", "saved", {"all_to_all": 4}),
        # k, v; with their tangents; with gradients, which go home at the end.
        ("ring", "value", {"collective_permute": 2}),
        ("ring", "jvp", {"collective_permute": 4}),
        ("ring", "mean_flow", {"collective_permute": 10}),
    ],
)
def test_collectives_of_a_program(strategy, transform, expected):
  x = tuple(jnp.asarray(a, jnp.float32) for a in wide_inputs())
  f = plain(strategy, True, "contiguous")
  loss = lambda x, f=f: attention_test.mean_flow(f, x, x)
  policy = jax.checkpoint_policies.everything_saveable
  run = {
      "value": lambda x: f(*x),
      "jvp": lambda x: jax.jvp(f, x, x),
      "mean_flow": jax.grad(loss),
      "checkpoint": jax.grad(jax.checkpoint(loss)),
      "saved": jax.grad(
          lambda x: loss(x, jax.checkpoint(f, policy=policy))
      ),
  }[transform]
  assert collectives(jax.jit(run).lower(x)) == expected


def test_tangents_that_nobody_wants_are_not_sent():
  x = tuple(jnp.asarray(a, jnp.float32) for a in wide_inputs())
  f = plain("all_to_all", True, "contiguous")

  def sent(run):
    text = jax.jit(run).lower(x).as_text()
    return re.findall(r"all_to_all.*-> tensor<4x(\d+)x\d+xf32>", text)

  value = sent(lambda x: f(*x))
  assert len(value) == 2
  assert sent(lambda x: jax.jvp(f, x, x)[0]) == value
  assert sent(lambda x: jax.jvp(f, x, x)) != value


def test_without_private_hooks(x64, monkeypatch):
  monkeypatch.setattr(primitives, "HOOKS", False)
  monkeypatch.delitem(primitives._partial_eval, exchange.exchange_p)
  monkeypatch.delitem(primitives._linearize, exchange.exchange_p)
  monkeypatch.delitem(primitives._linearize, primitives.att_p)
  x, t = wide_inputs(1), wide_inputs(2)
  run = lambda f: jax.jvp(f, x, t)
  mapped = jax.jit(lambda: run(plain("all_to_all", True, "contiguous")))
  # Values and tangents apart, each there and back.
  assert collectives(mapped.lower()) == {"all_to_all": 4}


def test_no_device_waits_in_zigzag_order():
  """Hops of half the work: no product of all rows with all columns twice."""
  shape = jax.ShapeDtypeStruct((1, 64, 2, 4), jnp.float32)
  sizes = {}
  for order in context.ORDERS:
    f = plain("ring", True, order)
    text = jax.jit(lambda q, f=f: f(q, q, q)).lower(shape).as_text()
    found = re.findall(
        r"dot_general .*-> tensor<1x2x(\d+)x(\d+)xf32>", text
    )
    sizes[order] = sorted(
        {(int(n), int(m)) for n, m in found if m != "4"}
    )
  assert sizes["zigzag"] == [(8, 16), (16, 8), (16, 16)]
  assert sizes["contiguous"] == [(16, 16)]


# --- a mesh around whole arrays ------------------------------------------


def whole_inputs():
  rng = np.random.default_rng(0)
  draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
  return draw(4, 8, 4, 4), draw(4, 8, 2, 4), draw(4, 8, 2, 3)


@pytest.mark.slow
def test_rows_heads_and_sequence_over_a_mesh():
  x = whole_inputs()
  ids = jnp.arange(32).reshape(4, 8) % 8 // 5
  options = {"q_segment_ids": ids, "kv_segment_ids": ids, "return_lse": True}
  found = mesh(data=2, tensor=2, context=2)
  cut = lambda *x: kernels.sharded_attention(*x, mesh=found, **options)
  ours = jax.jit(lambda: jax.jvp(cut, x, x))()
  whole = functools.partial(
      kernels.attention, implementation="reference", **options
  )
  attention_test.check(ours, jax.jit(lambda: jax.jvp(whole, x, x))(), 1e-5)
  places = [a.sharding.spec for a in jax.tree.leaves(ours)]
  assert places == [P("data", AXIS, "tensor")] * 4


def test_what_a_mesh_does_not_cut_is_no_shard_map():
  x = whole_inputs()
  text = lambda f: str(jax.make_jaxpr(f)(*x))
  assert "shard_map" not in text(kernels.sharded_attention)
  other = mesh(data=1, model=2)
  cut = functools.partial(kernels.sharded_attention, mesh=other)
  assert "shard_map" not in text(cut)
  # The names of one's own mesh.
  own = functools.partial(cut, head_axis="model", batch_axes=())
  assert text(own).count("shard_map[") == 1
  # In a train step the mesh is in context; a shard_map around it has bound it.
  with jax.sharding.use_abstract_mesh(mesh(data=2).abstract_mesh):
    assert text(kernels.sharded_attention).count("shard_map[") == 1
  inside = jax.shard_map(
      kernels.sharded_attention, mesh=mesh(data=2), in_specs=(P("data"),) * 3,
      out_specs=P("data"),
  )  # fmt: skip
  assert text(inside).count("shard_map[") == 1


def test_positions_in_zigzag_order():
  found = kernels.zigzag_positions(12, 3)
  assert found.tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
  # Each part attends to as many positions before its own.
  assert np.unique(found.reshape(3, -1).sum(axis=1)).size == 1
  with one_line_error("length must be divisible by 2 x parts=3, got 8.* 6"):
    kernels.zigzag_positions(8, 3)
  with one_line_error("parts must be >= 1, got 0"):
    kernels.zigzag_positions(8, 0)


def call_inside(parts, q=(1, 8, 4, 4), k=(1, 8, 2, 4), **options):
  q, k = jnp.ones(q), jnp.ones(k)
  local = lambda q, k: kernels.context_attention(
      q, k, k, **{"axis_name": AXIS} | options
  )
  jax.eval_shape(
      jax.shard_map(
          local, mesh=mesh(context=parts), in_specs=P(None, AXIS),
          out_specs=P(None, AXIS),
      ), q, k,
  )  # fmt: skip


def call_around(parts, q=(1, 8, 4, 4), k=(1, 8, 2, 4), **options):
  q, k = jnp.ones(q), jnp.ones(k)
  axes = {"data": 1, "tensor": 1, AXIS: 1} | parts
  kernels.sharded_attention(q, k, k, mesh=mesh(**axes), **options)


@pytest.mark.parametrize(
    "call,parts,options,match",
    [
        (call_inside, 2, {"strategy": "rings"}, "strategy.*you mean 'ring'"),
        (call_inside, 2, {"order": "zigzags"}, "order.*did you mean 'zigzag'"),
        (
            call_inside, 2, {"axis_name": "seq"},
            "axis_name must be an axis of the jax.shard_map.*got 'seq'",
        ),
        (
            call_inside, 2, {"k": (1, 16, 2, 4), "causal": True},
            "k must be of q's length 4 where causal, got 8",
        ),
        (
            call_inside, 8, {"causal": True, "order": "zigzag"},
            "q's length a device must be divisible by 2.*got 1; nearest: 2",
        ),
        (
            call_inside, 8, {"strategy": "all_to_all"},
            "heads must be divisible by the 8 devices of axis 'context'.*'ring'"
            ".*got 4; nearest: 8",
        ),
        (
            call_inside, 2, {"implementation": "reference"},
            "implementation.*strategy 'ring'.*got 'reference'",
        ),
        (
            call_around, {AXIS: 8}, {"q": (1, 20, 4, 4)},
            "q's length must be divisible by the 8 devices of mesh axis"
            " 'context', got 20; nearest: 16",
        ),
        (
            call_around, {AXIS: 8}, {"causal": True, "order": "zigzag"},
            "q's length.* 2 x the 8 devices.*got 8; nearest: 16",
        ),
        (call_around, {AXIS: 8}, {"k": (1, 12, 2, 4)}, "k's length.*got 12"),
        (
            call_around, {"tensor": 4}, {}, "k's number of heads.*the 4 devices"
            " of mesh axis 'tensor', got 2; nearest: 4",
        ),
        (call_around, {"data": 2}, {}, "q's batch.*the 2 dev.*got 1; .* 2"),
        (call_around, {}, {"strategy": "rings"}, "strategy"),
        (call_around, {}, {"order": "rings"}, "order"),
        (call_around, {}, {"q": (1, 8, 4, 5)}, "k must be"),
    ],
)  # fmt: skip
def test_bad_input(call, parts, options, match):
  with one_line_error(match):
    call(parts, **options)


def test_docstring_example():
  assert doctest.testmod(context).failed == 0
