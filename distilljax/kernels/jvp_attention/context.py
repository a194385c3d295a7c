"""Attention whose arrays are cut over a mesh: rows, heads and the sequence."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from distilljax import _checks
from distilljax.kernels.jvp_attention import api, exchange, primitives
from distilljax.kernels.jvp_attention import spec as spec_lib
from distilljax.typing import Array, Float, Int, Number, Shaped

STRATEGIES = ("ring", "all_to_all")
ORDERS = ("contiguous", "zigzag")


def zigzag_positions(length: int, parts: int) -> np.ndarray:
  """Positions of a sequence in zig-zag order, the one that balances causality.

  The sequence is cut into 2 parts halves, and part i gets the halves i and
  2 parts - 1 - i: an early and a late one. `x[:, positions]` puts a sequence
  into that order and `np.argsort(positions)` is the way back.

  Args:
    length: tokens of the whole sequence, divisible by 2 parts.
    parts: devices that the sequence is cut over.

  Returns:
    int32 [length]: the position of every token, those of part 0 first.

  Raises:
    ValueError: the length does not divide.

  Example:
    >>> zigzag_positions(8, 2).tolist()
    [0, 1, 6, 7, 2, 3, 4, 5]

  References:
    Liu, Zaharia, Abbeel, Ring Attention with Blockwise Transformers for
    Near-Infinite Context, 2023, arXiv:2310.01889 (the ring; the order is the
    usual mend of its idle devices under a causal mask).
  """
  fn = "zigzag_positions"
  if parts < 1:
    _checks.fail(fn, "parts", ">= 1", parts)
  _divides(fn, "length", length, 2 * parts, f"2 x parts={parts}")
  halves = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
  order = [i for p in range(parts) for i in (p, 2 * parts - 1 - p)]
  return halves[order].reshape(-1)


def from_zigzag(
    x: Shaped[Array, "b n *s"], *, axis_name: str
) -> Shaped[Array, "b n *s"]:
  """A sequence in zig-zag order back in its own, inside a shard_map.

  Every device sends and receives two halves; nothing is gathered.

  Args:
    x: this device's part in the order of `zigzag_positions`. Shape [b, n, ...].
    axis_name: axis of the shard_map that cuts the sequence.

  Returns:
    This device's part of the sequence in its own order. Shape [b, n, ...].

  Raises:
    ValueError: a part of odd length, or an axis that no shard_map binds.
  """
  fn = "from_zigzag"
  parts = _size(fn, axis_name)
  _checks.min_rank(fn, "x", x, 2, "[b, n, ...]")
  _divides(fn, "x's length a device", x.shape[1], 2, "2")
  x = jnp.asarray(x)
  if parts == 1:
    return x
  early, late = jnp.split(x, 2, axis=1)
  # Of a device's two halves one has an even number and one an odd one; device
  # i ends with the halves 2 i and 2 i + 1.
  even = lax.axis_index(axis_name) % 2 == 0
  mine = [(p, 2 * parts - 1 - p) for p in range(parts)]
  first = [(p, (a if a % 2 == 0 else b) // 2) for p, (a, b) in enumerate(mine)]
  second = [(p, (b if a % 2 == 0 else a) // 2) for p, (a, b) in enumerate(mine)]
  halves = (
      lax.ppermute(jnp.where(even, early, late), axis_name, first),
      lax.ppermute(jnp.where(even, late, early), axis_name, second),
  )
  return jnp.concatenate(halves, axis=1)


def _divides(fn, name, value, of, what):
  if value % of or value < 1:
    nearest = _checks.nearest_multiple(value, of)
    _checks.fail(
        fn, name, f"divisible by {what}", f"{value}; nearest: {nearest}"
    )


def _size(fn, axis_name):
  """Devices of the axis."""
  try:
    return int(lax.axis_size(axis_name))
  except NameError:
    return _checks.fail(
        fn,
        "axis_name",
        "an axis of the jax.shard_map around it (or call sharded_attention)",
        repr(axis_name),
    )


def context_attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h_kv d"],
    v: Float[Array, "b m h_kv e"],
    *,
    axis_name: str,
    strategy: str = "ring",
    order: str = "contiguous",
    causal: bool = False,
    q_segment_ids: Int[Array, "b n"] | None = None,
    kv_segment_ids: Int[Array, "b m"] | None = None,
    scale: Number | None = None,
    implementation: str | Sequence[str] | None = None,
    return_lse: bool = False,
) -> Float[Array, "b n h e"] | tuple[Array, Array]:
  """`attention` inside a shard_map whose axis cuts the sequence.

  The arguments are this device's rows and columns; the result is that of its
  rows over the columns of all devices of the axis. Values and both derivatives
  are those of `attention` on the whole arrays, in memory linear in this
  device's part, under every transform that `attention` knows.

  Strategies: "ring" sends keys and values (under `jax.jvp` with their tangents,
  backwards with their gradients) around the axis and merges what each hop
  gives by its log-sum-exp; "all_to_all" gives every device the whole sequence
  of some of the heads and takes the result back, one collective each way also
  under `jax.jvp`, where q, k, v and their tangents go together. The ring takes
  any number of heads and can hide what it sends behind the hops; all-to-all
  sends less, the more devices the less, and repeats key heads that do not
  divide over the devices.

  Args:
    q: this device's queries. Shape [b, n, h, d].
    k: this device's keys. Shape [b, m, h_kv, d].
    v: this device's values. Shape [b, m, h_kv, e].
    axis_name: axis of the shard_map that cuts the sequence.
    strategy: "ring" or "all_to_all".
    order: which part of the sequence a device has, which matters where causal:
      "contiguous" (the i-th), or "zigzag" (see `zigzag_positions`), with which
      no device of a ring waits for another.
    causal: whether later columns are hidden; needs m = n.
    q_segment_ids: segment of each query. Shape [b, n].
    kv_segment_ids: segment of each key. Shape [b, m].
    scale: factor of q . k; None is d^(-1/2).
    implementation: of the attention of a hop, see `attention`; "reference" with
      "all_to_all" only.
    return_lse: whether lse is returned too.

  Returns:
    o, shape [b, n, h, e]; with `return_lse` (o, lse), lse [b, n, h].

  Raises:
    ValueError: as `attention`; an axis that no shard_map binds; heads or a
      sequence that do not divide.

  References:
    Liu, Zaharia, Abbeel, Ring Attention with Blockwise Transformers for
    Near-Infinite Context, 2023, arXiv:2310.01889; Jacobs et al., DeepSpeed
    Ulysses, 2023, arXiv:2309.14509 (all-to-all); Lu, Song, arXiv:2410.11081
    (the tangent). Departures: the tangent travels with the value and is itself
    differentiable.
  """
  fn = "context_attention"
  q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
  # pylint: disable=protected-access
  api._check(fn, q, k, v, None, q_segment_ids, kv_segment_ids, scale)
  chosen = api._choose(fn, implementation, q, v)
  # pylint: enable=protected-access
  _checks.one_of(fn, "strategy", strategy, STRATEGIES)
  _checks.one_of(fn, "order", order, ORDERS)
  parts = _size(fn, axis_name)
  if causal and q.shape[1] != k.shape[1]:
    _checks.fail(
        fn, "k", f"of q's length {q.shape[1]} where causal", k.shape[1]
    )
  zigzag = order == "zigzag" and causal and parts > 1
  if zigzag:
    _divides(
        fn, "q's length a device", q.shape[1], 2, "2 for order='zigzag'"
    )
  # pylint: disable-next=protected-access
  arrays = [q, k, v, *api._segment_ids(q_segment_ids, kv_segment_ids)]
  # What is the same on all devices of the axis is from here on not so typed.
  _, *arrays = primitives.align([lax.axis_index(axis_name), *arrays])
  options = {
      "causal": causal, "scale": scale, "implementation": implementation,
      "return_lse": return_lse,
  }  # fmt: skip
  if strategy == "all_to_all":
    return _all_to_all(fn, arrays, axis_name, parts, zigzag, options)
  if chosen == "reference":
    _checks.fail(
        fn, "implementation", "another one for strategy 'ring' (or 'all_to_all'"
        " as strategy)", repr(chosen),
    )  # fmt: skip
  spec = spec_lib.Spec(
      implementation=chosen,
      scale=float(q.shape[-1] ** -0.5 if scale is None else scale),
      causal=bool(causal),
      segments=q_segment_ids is not None,
      fallback=implementation is None,
      axis=axis_name,
      parts=parts,
      zigzag=zigzag,
  )
  heads_first = lambda a: jnp.swapaxes(a, 1, 2)
  x = [*map(heads_first, arrays[:3]), *arrays[3:]]
  o, lse = map(heads_first, primitives.attention(spec, *x))
  return (o, lse) if return_lse else o


def _straight(a, parts):
  """A whole sequence [b, n, *] out of zig-zag order."""
  halves = a.reshape(a.shape[0], parts, 2, -1, *a.shape[2:])
  early, late = halves[:, :, 0], halves[:, :, 1]
  out = jnp.concatenate([early, jnp.flip(late, axis=1)], axis=1)
  return out.reshape(a.shape)


def _zigzag(a, parts):
  """The inverse of `_straight`."""
  halves = a.reshape(a.shape[0], 2 * parts, -1, *a.shape[2:])
  early, late = jnp.split(halves, 2, axis=1)
  out = jnp.stack([early, jnp.flip(late, axis=1)], axis=2)
  return out.reshape(a.shape)


def _all_to_all(fn, arrays, axis_name, parts, zigzag, options):
  """Attention to the whole sequence with some of the heads."""
  (q, k, v), ids = arrays[:3], arrays[3:]
  _divides(
      fn, "q's number of heads", q.shape[2], parts,
      f"the {parts} devices of axis {axis_name!r} for strategy 'all_to_all'"
      " ('ring' takes any)",
  )  # fmt: skip
  copies = parts // math.gcd(k.shape[2], parts)
  if copies > 1:
    k, v = (jnp.repeat(a, copies, axis=2) for a in (k, v))
  x = exchange.split_heads(axis_name, parts, q, k, v)
  # Numbers of segments are small: nothing of the width of a head is gathered.
  ids = [lax.all_gather(a, axis_name, axis=1, tiled=True) for a in ids]
  if zigzag:
    x, ids = ([_straight(a, parts) for a in part] for part in (x, ids))
  names = ("q_segment_ids", "kv_segment_ids")
  found = api.attention(*x, **dict(zip(names, ids)), **options)
  found = list(found) if options["return_lse"] else [found]
  found[1:] = [a[..., None] for a in found[1:]]
  if zigzag:
    found = [_zigzag(a, parts) for a in found]
  if len({a.dtype for a in found}) == 1:
    found = exchange.split_sequence(axis_name, parts, *found)
  else:
    found = [exchange.split_sequence(axis_name, parts, a)[0] for a in found]
  return (found[0], found[1][..., 0]) if options["return_lse"] else found[0]


def sharded_attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h_kv d"],
    v: Float[Array, "b m h_kv e"],
    *,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    batch_axes: Sequence[str] = ("data", "fsdp"),
    head_axis: str | None = "tensor",
    context_axis: str | None = "context",
    strategy: str = "ring",
    order: str = "contiguous",
    causal: bool = False,
    q_segment_ids: Int[Array, "b n"] | None = None,
    kv_segment_ids: Int[Array, "b m"] | None = None,
    scale: Number | None = None,
    implementation: str | Sequence[str] | None = None,
    return_lse: bool = False,
) -> Float[Array, "b n h e"] | tuple[Array, Array]:
  """`attention` of global arrays, computed where their parts lie on a mesh.

  Rows of the batch are cut over `batch_axes`, heads over `head_axis` and the
  sequence over `context_axis`, by one shard_map: nothing is gathered that is
  cut so already. A kernel is a program of one device, which no compiler can
  cut, and the blocks of "xla" are sized by what one device has. Axes that the
  mesh does not have, or has with one device, or that a shard_map around the
  call has bound, cut nothing.

  Args:
    q: queries, the whole array. Shape [b, n, h, d].
    k: keys. Shape [b, m, h_kv, d].
    v: values. Shape [b, m, h_kv, e].
    mesh: the mesh; None is that of `jax.set_mesh`, or of the train step that is
      being traced.
    batch_axes: axes that cut b.
    head_axis: axis that cuts h and h_kv, or None.
    context_axis: axis that cuts n and m, or None.
    strategy: see `context_attention`.
    order: see `context_attention`; with "zigzag" the sequence is expected in
      the order of `zigzag_positions` and returned in it.
    causal: see `attention`; with a context axis m = n.
    q_segment_ids: see `attention`.
    kv_segment_ids: see `attention`.
    scale: see `attention`.
    implementation: see `attention`.
    return_lse: whether lse is returned too.

  Returns:
    o, shape [b, n, h, e]; with `return_lse` (o, lse), lse [b, n, h].

  Raises:
    ValueError: as `attention` and `context_attention`; an axis of the arrays
      that does not divide over its devices.
  """
  fn = "sharded_attention"
  q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
  # pylint: disable-next=protected-access
  api._check(fn, q, k, v, None, q_segment_ids, kv_segment_ids, scale)
  _checks.one_of(fn, "strategy", strategy, STRATEGIES)
  _checks.one_of(fn, "order", order, ORDERS)
  given, mesh = mesh, jax.sharding.get_abstract_mesh() if mesh is None else mesh
  kinds = dict(zip(mesh.axis_names, mesh.axis_types))
  ours = {a for a, kind in kinds.items() if kind != AxisType.Manual}
  cut = {a: mesh.shape[a] for a in ours if mesh.shape[a] > 1}
  rows = tuple(a for a in batch_axes if a in cut)
  heads = head_axis if head_axis in cut else None
  context = context_axis if context_axis in cut else None
  options = {
      "causal": causal, "scale": scale, "implementation": implementation,
      "return_lse": return_lse,
  }  # fmt: skip
  names = ("q_segment_ids", "kv_segment_ids")
  # pylint: disable-next=protected-access
  arrays = [q, k, v, *api._segment_ids(q_segment_ids, kv_segment_ids)]
  local = api.attention
  if context is not None:
    options |= {"axis_name": context, "strategy": strategy, "order": order}
    local = context_attention
  elif not rows and heads is None:
    return local(*arrays[:3], **dict(zip(names, arrays[3:])), **options)
  double = 2 if context and causal and order == "zigzag" else 1
  for what, axis, axes, times in (
      ("batch", 0, rows, 1), ("length", 1, (context,), double),
      ("number of heads", 2, (heads,), 1),
  ):  # fmt: skip
    axes = [a for a in axes if a is not None]
    parts = math.prod(cut[a] for a in axes)
    devices = f"the {parts} devices of mesh axis {', '.join(map(repr, axes))}"
    for name, a in (("q", q), ("k", k)):
      _divides(
          fn, f"{name}'s {what}", a.shape[axis], parts * times,
          f"{times} x {devices}" if times > 1 else devices,
      )  # fmt: skip
  whole = PartitionSpec(rows or None, context, heads)
  ids = PartitionSpec(rows or None, context)

  def run(q, k, v, *ids):
    return local(q, k, v, **dict(zip(names, ids)), **options)

  return jax.shard_map(
      run,
      mesh=given,
      in_specs=(whole,) * 3 + (ids,) * (len(arrays) - 3),
      out_specs=(whole, whole) if return_lse else whole,
      # A kernel wants no axis left to the compiler, of whatever size.
      axis_names=ours,
  )(*arrays)
