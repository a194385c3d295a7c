"""Attention kernels for TPUs: forward, fused JVP, tangent and backward.

One grid step takes a block of rows and a block of columns of one head; the last
grid axis runs over what is summed, and sums live in float32 scratch. Per-row
statistics are stored as rows ([B, H, 1, N]), not as columns, which the memory
layout would widen 128 times. Causal blocks that nobody sees are neither
computed nor copied: their index is that of the last block that is seen. The
values are centred per head (by their mean over the keys) where tangents are
made: to is invariant to it, and (P tS) v - mu o then cancels less in bfloat16.

Second derivatives are those of the implementation "xla". Loaded only when a
kernel is asked for.

References:
  Lu, Song, Simplifying, Stabilizing and Scaling Continuous-Time Consistency
  Models, 2024, arXiv:2410.11081; the maths are in `xla.py`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from distilljax.kernels.jvp_attention import spec as spec_lib

LANES = 128
# Rows and columns of a block by the width of a head: a grid step has a fixed
# cost, so they are as large as the default scoped memory of v5e lets them be
# (`vmem_bytes`). Bundles a step on v5e at width 128, 512x512 and 512x1024:
# forward 2810 and 3469, fused 5043 and 7784, tangent 3035 and 5207.
TILES = {64: (512, 1024), 128: (512, 1024), 256: (256, 512)}

# What a grid step may take: v5e and v5p give 16 MiB by default.
SCOPED_BYTES = 13 * 2**20

# What a shard_map that checks its axes wants of every result, if it exists.
_MANUAL = getattr(jax.sharding, "ManualAxisType", None)

# None, or the parameters of interpret mode: for machines without a TPU.
_INTERPRET = jax.make_user_context(default_value=None)


def interpret(parameters: Any = True):
  """A context in which the kernels are interpreted, on any machine.

  Args:
    parameters: True, or `pltpu.InterpretParams`.

  Returns:
    A context manager.
  """
  return _INTERPRET(parameters)


def runs_on(platform: str) -> bool:
  """Whether the kernels can be compiled for a platform, or are interpreted."""
  return platform == "tpu" or _INTERPRET.value is not None


def vmem_bytes(
    rows: int,
    columns: int,
    width: int,
    itemsize: int,
    tangents: bool,
    bias_itemsize: int = 0,
) -> int:
  """Scoped memory of one grid step, roughly: blocks twice, scores in float32.

  Args:
    rows: of a block.
    columns: of a block.
    width: of a head, of keys and values alike.
    itemsize: bytes of an input number.
    tangents: whether tangents are streamed beside the inputs.
    bias_itemsize: bytes of a number of the bias, 0 without one.

  Returns:
    Bytes.
  """
  streams = 2 if tangents else 1
  blocks = 2 * streams * itemsize * width * (2 * rows + 2 * columns)
  sums = 4 * rows * (streams * width + 3 * LANES)
  scores = 4 * rows * columns * (4 if tangents else 2)
  bias = 2 * bias_itemsize * rows * columns
  return blocks + sums + scores + bias


def tile(width: int, itemsize: int, bias_itemsize: int = 0) -> tuple[int, int]:
  """Rows and columns of a block, fewer columns where they would not fit.

  Args:
    width: of a head, the wider of keys and values.
    itemsize: bytes of an input number.
    bias_itemsize: bytes of a number of the bias, 0 without one.

  Returns:
    (rows, columns).
  """
  rows, columns = TILES[width]
  while (
      vmem_bytes(rows, columns, width, itemsize, True, bias_itemsize)
      > SCOPED_BYTES
      and columns > LANES
  ):
    columns //= 2
  return rows, columns


@dataclasses.dataclass(frozen=True)
class _Shape:
  """Sizes of a problem after padding, and its blocks."""

  batch: int
  heads: int
  groups: int
  n: int
  m: int
  rows: int
  columns: int
  shift: int
  causal: bool

  @classmethod
  def of(cls, spec, x):
    b, h, n, d = x[0].shape
    kv_heads, m = x[1].shape[1:3]
    bias = spec.bias_of(x)
    rows, columns = tile(
        max(d, x[2].shape[3]),
        x[0].dtype.itemsize,
        0 if bias is None else bias.dtype.itemsize,
    )
    up = lambda a: -(-a // LANES) * LANES
    rows = min(spec.rows or rows, up(n))
    columns = min(spec.columns or columns, up(m))
    return cls(b, h, h // kv_heads, n, m, rows, columns, m - n, spec.causal)

  @property
  def row_blocks(self):
    return -(-self.n // self.rows)

  @property
  def column_blocks(self):
    return -(-self.m // self.columns)

  def pad_rows(self, a, axis=2):
    return _pad(a, axis, self.row_blocks * self.rows)

  def pad_columns(self, a, axis=2):
    return _pad(a, axis, self.column_blocks * self.columns)

  def last_column(self, i):
    """The last block of columns that rows i see (0 if none)."""
    if not self.causal:
      return np.int32(self.column_blocks - 1)
    top = (i + np.int32(1)) * np.int32(self.rows) + np.int32(self.shift - 1)
    block = lax.div(jnp.maximum(top, np.int32(0)), np.int32(self.columns))
    return jnp.minimum(block, np.int32(self.column_blocks - 1))

  def first_row(self, j):
    """The first block of rows that sees columns j."""
    if not self.causal:
      return np.int32(0)
    low = j * np.int32(self.columns) - np.int32(self.shift)
    block = lax.div(jnp.maximum(low, np.int32(0)), np.int32(self.rows))
    return jnp.minimum(block, np.int32(self.row_blocks - 1))

  def seen(self, i, j):
    """Whether any row of block i sees any column of block j."""
    top = (i + np.int32(1)) * np.int32(self.rows) + np.int32(self.shift)
    return top > j * np.int32(self.columns)


def _pad(a, axis, length):
  if a.shape[axis] == length:
    return a
  width = [(0, 0)] * a.ndim
  width[axis] = (0, length - a.shape[axis])
  return jnp.pad(a, width)


def _dot(a, b, dims):
  """Matrix product over one axis of each, summed in float32."""
  precision = (
      lax.Precision.HIGHEST if a.dtype == jnp.float32 else
      lax.Precision.DEFAULT
  )  # fmt: skip
  return lax.dot_general(
      a,
      b,
      (dims, ((), ())),
      precision=precision,
      preferred_element_type=jnp.float32,
  )


_NT = ((1,), (1,))  # a b'
_NN = ((1,), (0,))  # a b
_TN = ((0,), (0,))  # a' b


def _row(column):
  """[r, 1] to [1, r]."""
  return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def _column(row):
  """[1, r] to [r, LANES], every lane alike."""
  return jnp.broadcast_to(row, (LANES, row.shape[1])).T


class _Call:
  """Operands and results of a `pallas_call`, by name."""

  def __init__(self):
    self.arrays, self.in_specs, self.names = [], [], []
    self.out_shapes, self.out_specs, self.out_names = [], [], []

  def add(self, name, array, block, index):
    self.names.append(name)
    self.arrays.append(array)
    self.in_specs.append(pl.BlockSpec(block, index))

  def result(self, name, shape, dtype, block, index):
    self.out_names.append(name)
    # The program of one device: it varies over no axis that it knows of.
    axes = {} if _MANUAL is None else {"manual_axis_type": _MANUAL()}
    self.out_shapes.append(jax.ShapeDtypeStruct(shape, dtype, **axes))
    self.out_specs.append(pl.BlockSpec(block, index))

  def run(self, name, body, grid, scratch):
    """Runs `body(refs, scratch_refs)` over the grid, last axis in order."""
    count = len(self.names) + len(self.out_names)

    def kernel(*refs):
      names = (*self.names, *self.out_names)
      body(dict(zip(names, refs[:count])), dict(zip(scratch, refs[count:])))

    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=self.in_specs,
        out_specs=self.out_specs,
        out_shape=self.out_shapes,
        scratch_shapes=[
            pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3 + ("arbitrary",),
        ),
        interpret=_INTERPRET.value or False,
        name=f"jvp_attention_{name}",
    )(*self.arrays)


def _masks(call, shape, spec, x, row, column, transposed):
  """Adds bias and segment ids; `row`, `column` map grid indices to blocks."""
  rows, columns = shape.rows, shape.columns
  if spec.bias:
    bias = spec.bias_of(x)
    b, h, n, m = bias.shape
    bias = shape.pad_rows(bias) if n > 1 else bias
    bias = shape.pad_columns(bias, axis=3) if m > 1 else bias

    def index(*g):
      zero = np.int32(0)
      return (
          g[0] if b > 1 else zero,
          row(*g)[0] if h > 1 else zero,
          row(*g)[1] if n > 1 else zero,
          column(*g) if m > 1 else zero,
      )

    block = (1, 1, rows if n > 1 else 1, columns if m > 1 else 1)
    call.add("bias", bias, block, index)
  if spec.segments:
    q_ids, kv_ids = spec.segments_of(x)
    q_ids = shape.pad_rows(q_ids, axis=1)
    kv_ids = shape.pad_columns(kv_ids, axis=1)
    zero = np.int32(0)
    # What lies along the lanes is a row, the other one a column.
    q_index = lambda *g: (g[0], zero, row(*g)[1])
    kv_index = lambda *g: (g[0], column(*g), zero)
    q_block, kv_block = (1, 1, rows), (1, columns, 1)
    if not transposed:
      q_index = lambda *g: (g[0], row(*g)[1], zero)
      kv_index = lambda *g: (g[0], zero, column(*g))
      q_block, kv_block = (1, rows, 1), (1, 1, columns)
    b = q_ids.shape[0]
    q_ids = q_ids.reshape(b, *(-1 if n == rows else 1 for n in q_block[1:]))
    kv_ids = kv_ids.reshape(
        b, *(-1 if n == columns else 1 for n in kv_block[1:])
    )
    call.add("q_ids", q_ids, q_block, q_index)
    call.add("kv_ids", kv_ids, kv_block, kv_index)


def _score(refs, shape, spec, i, j, transposed=False):
  """Scores of a block [rows, columns] or its transpose; masked are -inf."""
  q, k = refs["q"][0, 0], refs["k"][0, 0]
  s = _dot(k, q, _NT) if transposed else _dot(q, k, _NT)
  s = s * np.float32(spec.scale)
  if "bias" in refs:
    bias = refs["bias"][0, 0].astype(jnp.float32)
    if transposed:
      bias = jnp.broadcast_to(bias, s.shape[::-1]).T
    s = s + jnp.broadcast_to(bias, s.shape)
  ok = None
  row_axis, column_axis = (1, 0) if transposed else (0, 1)
  columns = None
  if spec.causal or shape.column_blocks * shape.columns != shape.m:
    columns = lax.broadcasted_iota(jnp.int32, s.shape, column_axis)
    columns = columns + j * np.int32(shape.columns)
  if spec.causal:
    rows = lax.broadcasted_iota(jnp.int32, s.shape, row_axis)
    rows = rows + (i * np.int32(shape.rows) + np.int32(shape.shift))
    ok = columns <= rows
  if shape.column_blocks * shape.columns != shape.m:
    there = columns < np.int32(shape.m)
    ok = there if ok is None else ok & there
  if spec.segments:
    same = refs["q_ids"][0] == refs["kv_ids"][0]
    ok = same if ok is None else ok & same
  return s if ok is None else jnp.where(ok, s, -jnp.inf)


def _finite(a):
  return jnp.where(a == -jnp.inf, jnp.zeros_like(a), a)


def _tangent_score(refs, spec):
  """scale (tq k' + q tk'), or None where both are zero."""
  terms = []
  if "tq" in refs:
    terms.append(_dot(refs["tq"][0, 0], refs["k"][0, 0], _NT))
  if "tk" in refs:
    terms.append(_dot(refs["q"][0, 0], refs["tk"][0, 0], _NT))
  if not terms:
    return None
  return functools.reduce(jnp.add, terms) * np.float32(spec.scale)


def _values(refs):
  """The block of v, centred where a centre is given."""
  v = refs["v"][0, 0]
  if "center" not in refs:
    return v
  return (v.astype(jnp.float32) - refs["center"][0, 0]).astype(v.dtype)


def _row_maps(shape):
  """Index maps of a grid (batch, head, block of rows, block of columns)."""
  zero = np.int32(0)
  groups = np.int32(shape.groups)

  def column(b, h, i, j):
    return jnp.minimum(j, shape.last_column(i))

  return (
      lambda b, h, i, j: (b, h, i, zero),
      lambda b, h, i, j: (b, lax.div(h, groups), column(b, h, i, j), zero),
      lambda b, h, i, j: (h, i),
      column,
  )


def _by_rows(
    name: str, spec: spec_lib.Spec, wrt: str, x, t, statistics: bool
):
  """One kernel whose results are rows.

  Args:
    name: of the kernel.
    spec: the attention.
    wrt: letters of the tangents.
    x: what attention is a function of.
    t: the tangents, and with `statistics` o and lse after them.
    statistics: whether o and lse are known: the kernel gives their tangents.

  Returns:
    (o, lse) without tangents, (to, mu) with statistics, else all four.
  """
  shape = _Shape.of(spec, x)
  q_map, k_map, row, column = _row_maps(shape)
  call = _Call()
  d, e = x[0].shape[3], x[2].shape[3]
  row_block = (1, 1, shape.rows, d)
  call.add("q", shape.pad_rows(x[0]), row_block, q_map)
  call.add("k", shape.pad_columns(x[1]), (1, 1, shape.columns, d), k_map)
  call.add("v", shape.pad_columns(x[2]), (1, 1, shape.columns, e), k_map)
  _masks(call, shape, spec, x, row, column, transposed=False)
  tangents = dict(zip(wrt, t))
  for letter, a in tangents.items():
    if letter == "q":
      call.add("tq", shape.pad_rows(a), row_block, q_map)
    else:
      width = d if letter == "k" else e
      block = (1, 1, shape.columns, width)
      call.add(f"t{letter}", shape.pad_columns(a), block, k_map)
  zero = np.int32(0)
  head_map = lambda b, h, i, j: (
      b, lax.div(h, np.int32(shape.groups)), zero, zero,
  )
  stat_map = lambda b, h, i, j: (b, h, zero, i)
  if wrt:
    center = jnp.mean(x[2].astype(jnp.float32), axis=2, keepdims=True)
    call.add("center", center, (1, 1, 1, e), head_map)
  if statistics:
    o, lse = t[len(wrt) :]
    call.add("o", shape.pad_rows(o), (1, 1, shape.rows, e), q_map)
    lse = shape.pad_rows(_finite(lse))[:, :, None]
    call.add("lse", lse, (1, 1, 1, shape.rows), stat_map)
  padded = shape.row_blocks * shape.rows
  results = []
  if not statistics:
    results += ["o", "lse"]
  if wrt:
    results += ["to", "mu"]
  lead = (shape.batch, shape.heads)
  for result in results:
    if result in ("o", "to"):
      call.result(
          f"{result}_out", (*lead, padded, e), x[2].dtype,
          (1, 1, shape.rows, e), q_map,
      )  # fmt: skip
    else:
      call.result(
          f"{result}_out", (*lead, 1, padded), jnp.float32,
          (1, 1, 1, shape.rows), stat_map,
      )  # fmt: skip
  scratch = {"lse": (shape.rows, LANES)} if statistics else {
      "top": (shape.rows, LANES), "total": (shape.rows, LANES),
      "sum": (shape.rows, e),
  }  # fmt: skip
  if wrt:
    scratch |= {"mu": (shape.rows, LANES), "change": (shape.rows, e)}

  def body(refs, s):
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
      for name, ref in s.items():
        ref[...] = jnp.full(
            ref.shape, -jnp.inf if name == "top" else 0.0, jnp.float32
        )
      if statistics:
        s["lse"][...] = _column(refs["lse"][0, 0])

    def step():
      score = _score(refs, shape, spec, i, j)
      if statistics:
        p = jnp.exp(score - s["lse"][:, :1])
        rescale = None
      else:
        before = s["top"][:, :1]
        top = jnp.maximum(before, jnp.max(score, axis=1, keepdims=True))
        shift = _finite(top)
        p = jnp.exp(score - shift)
        rescale = jnp.exp(before - shift)
        s["top"][...] = jnp.broadcast_to(top, s["top"].shape)
        total = jnp.sum(p, axis=1, keepdims=True)
        s["total"][...] = s["total"][...] * rescale + total
      v = _values(refs)
      low = p.astype(v.dtype)
      if not statistics:
        s["sum"][...] = s["sum"][...] * rescale + _dot(low, v, _NN)
      if not wrt:
        return
      ts = _tangent_score(refs, spec)
      change = jnp.zeros(s["change"].shape, jnp.float32)
      if "tv" in refs:
        change = _dot(low, refs["tv"][0, 0], _NN)
      mu = s["mu"][...]
      mu = mu if rescale is None else mu * rescale
      if ts is not None:
        h = p * ts
        mu = mu + jnp.sum(h, axis=1, keepdims=True)
        change = change + _dot(h.astype(v.dtype), v, _NN)
      s["mu"][...] = mu
      old = s["change"][...]
      old = old if rescale is None else old * rescale
      s["change"][...] = old + change

    if shape.causal:
      pl.when(shape.seen(i, j))(step)
    else:
      step()

    @pl.when(j == shape.column_blocks - 1)
    def _():
      mu = s["mu"][:, :1] if wrt else None
      change = s["change"][...] if wrt else None
      if statistics:
        o = refs["o"][0, 0].astype(jnp.float32) - refs["center"][0, 0]
      else:
        total = s["total"][:, :1]
        safe = jnp.where(total == 0, jnp.ones_like(total), total)
        o = s["sum"][...] / safe
        lse = _finite(s["top"][:, :1]) + jnp.log(safe)
        lse = jnp.where(total == 0, -jnp.inf, lse)
        refs["lse_out"][0, 0] = _row(lse)
        value = o
        if wrt:
          mu, change = mu / safe, change / safe
          value = jnp.where(total == 0, o, o + refs["center"][0, 0])
        refs["o_out"][0, 0] = value.astype(refs["o_out"].dtype)
      if wrt:
        to = change - mu * o
        refs["to_out"][0, 0] = to.astype(refs["to_out"].dtype)
        refs["mu_out"][0, 0] = _row(mu)

  grid = (shape.batch, shape.heads, shape.row_blocks, shape.column_blocks)
  outs = call.run(name, body, grid, scratch)
  return tuple(
      a[:, :, 0, : shape.n] if result in ("lse", "mu") else a[:, :, : shape.n]
      for result, a in zip(results, outs)
  )


def forward(spec: spec_lib.Spec, *x: jax.Array):
  """(o, lse)."""
  return _by_rows("forward", spec, "", x, (), False)


def fused(spec: spec_lib.Spec, wrt: str, *operands: jax.Array):
  """(o, lse, to, mu): one exponential and six products a score."""
  x, t = operands[: spec.size], operands[spec.size :]
  return _by_rows("fused", spec, wrt, x, t, False)


def tangent(spec: spec_lib.Spec, wrt: str, *operands: jax.Array):
  """(to, mu) where o and lse are known."""
  x, (o, lse, *t) = operands[: spec.size], operands[spec.size :]
  return _by_rows("tangent", spec, wrt, x, (*t, o, lse), True)


def _shares(o, lse, do, dl):
  a = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1) - dl
  return jnp.where(jnp.isneginf(lse), jnp.zeros_like(a), a)


def _rows_gradient(spec, shape, x, do, lse, share):
  """dq: one kernel whose inner axis runs over the columns."""
  q_map, k_map, row, column = _row_maps(shape)
  d, e = x[0].shape[3], x[2].shape[3]
  call = _Call()
  call.add("q", shape.pad_rows(x[0]), (1, 1, shape.rows, d), q_map)
  call.add("k", shape.pad_columns(x[1]), (1, 1, shape.columns, d), k_map)
  call.add("v", shape.pad_columns(x[2]), (1, 1, shape.columns, e), k_map)
  _masks(call, shape, spec, x, row, column, transposed=False)
  call.add("do", do, (1, 1, shape.rows, e), q_map)
  zero = np.int32(0)
  stat_map = lambda b, h, i, j: (b, h, zero, i)
  call.add("lse", lse, (1, 1, 1, shape.rows), stat_map)
  call.add("share", share, (1, 1, 1, shape.rows), stat_map)
  padded = shape.row_blocks * shape.rows
  call.result(
      "dq", (shape.batch, shape.heads, padded, d), x[0].dtype,
      (1, 1, shape.rows, d), q_map,
  )  # fmt: skip
  scratch = {
      "lse": (shape.rows, LANES), "share": (shape.rows, LANES),
      "dq": (shape.rows, d),
  }  # fmt: skip

  def body(refs, s):
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
      s["lse"][...] = _column(refs["lse"][0, 0])
      s["share"][...] = _column(refs["share"][0, 0])
      s["dq"][...] = jnp.zeros(s["dq"].shape, jnp.float32)

    def step():
      p = jnp.exp(_score(refs, shape, spec, i, j) - s["lse"][:, :1])
      a = _dot(refs["do"][0, 0], refs["v"][0, 0], _NT) - s["share"][:, :1]
      k = refs["k"][0, 0]
      s["dq"][...] += _dot((p * a).astype(k.dtype), k, _NN)

    if shape.causal:
      pl.when(shape.seen(i, j))(step)
    else:
      step()

    @pl.when(j == shape.column_blocks - 1)
    def _():
      out = s["dq"][...] * np.float32(spec.scale)
      refs["dq"][0, 0] = out.astype(refs["dq"].dtype)

  grid = (shape.batch, shape.heads, shape.row_blocks, shape.column_blocks)
  (dq,) = call.run("backward_rows", body, grid, scratch)
  return dq[:, :, : shape.n]


def _columns_gradient(spec, shape, wrt, x, do, lse, share):
  """dk, dv: one kernel whose inner axis runs over the rows of a group.

  It works on transposed scores [columns, rows], so that the statistics of the
  rows, which are stored as rows, need not be turned.
  """
  d, e = x[0].shape[3], x[2].shape[3]
  zero = np.int32(0)
  n_rows = np.int32(shape.row_blocks)

  def row(b, h, j, r):
    head = h * np.int32(shape.groups) + lax.div(r, n_rows)
    return head, jnp.maximum(lax.rem(r, n_rows), shape.first_row(j))

  def q_map(b, h, j, r):
    return (b, *row(b, h, j, r), zero)

  def stat_map(b, h, j, r):
    head, i = row(b, h, j, r)
    return b, head, zero, i

  k_map = lambda b, h, j, r: (b, h, j, zero)
  column = lambda b, h, j, r: j
  call = _Call()
  call.add("q", shape.pad_rows(x[0]), (1, 1, shape.rows, d), q_map)
  call.add("k", shape.pad_columns(x[1]), (1, 1, shape.columns, d), k_map)
  call.add("v", shape.pad_columns(x[2]), (1, 1, shape.columns, e), k_map)
  _masks(call, shape, spec, x, row, column, transposed=True)
  call.add("do", do, (1, 1, shape.rows, e), q_map)
  call.add("lse", lse, (1, 1, 1, shape.rows), stat_map)
  call.add("share", share, (1, 1, 1, shape.rows), stat_map)
  lead = (shape.batch, shape.heads // shape.groups)
  padded = shape.column_blocks * shape.columns
  widths = {c: w for c, w in (("k", d), ("v", e)) if c in wrt}
  for letter, width in widths.items():
    call.result(
        f"d{letter}", (*lead, padded, width), x[0].dtype,
        (1, 1, shape.columns, width), k_map,
    )  # fmt: skip
  scratch = {c: (shape.columns, w) for c, w in widths.items()}
  steps = shape.groups * shape.row_blocks

  def body(refs, s):
    j, r = pl.program_id(2), pl.program_id(3)
    i = lax.rem(r, n_rows)

    @pl.when(r == 0)
    def _():
      for ref in s.values():
        ref[...] = jnp.zeros(ref.shape, jnp.float32)

    def step():
      score = _score(refs, shape, spec, i, j, transposed=True)
      p = jnp.exp(score - refs["lse"][0, 0])
      do = refs["do"][0, 0]
      if "v" in s:
        s["v"][...] += _dot(p.astype(do.dtype), do, _NN)
      if "k" in s:
        a = _dot(refs["v"][0, 0], do, _NT) - refs["share"][0, 0]
        q = refs["q"][0, 0]
        s["k"][...] += _dot((p * a).astype(q.dtype), q, _NN)

    if shape.causal:
      pl.when(shape.seen(i, j))(step)
    else:
      step()

    @pl.when(r == steps - 1)
    def _():
      for letter, ref in s.items():
        factor = np.float32(spec.scale if letter == "k" else 1.0)
        out = refs[f"d{letter}"]
        out[0, 0] = (ref[...] * factor).astype(out.dtype)

  grid = (*lead, shape.column_blocks, steps)
  outs = call.run("backward_columns", body, grid, scratch)
  return {c: a[:, :, : shape.m] for c, a in zip(widths, outs)}


def backward(spec: spec_lib.Spec, wrt: str, *operands: jax.Array):
  """Gradients of <do, o> + <dl, lse> in the arrays of `wrt`."""
  x, (o, lse, do, dl) = operands[: spec.size], operands[spec.size :]
  shape = _Shape.of(spec, x)
  share = shape.pad_rows(_shares(o, lse, do, dl))[:, :, None]
  lse = shape.pad_rows(_finite(lse))[:, :, None]
  do = shape.pad_rows(do)
  found = {}
  if "q" in wrt:
    found["q"] = _rows_gradient(spec, shape, x, do, lse, share)
  if set(wrt) & set("kv"):
    found |= _columns_gradient(spec, shape, wrt, x, do, lse, share)
  return tuple(found[c] for c in wrt)


def kernels() -> tuple[Callable[..., Any], ...]:
  """The functions that are kernels; the other slots are those of "xla"."""
  return forward, fused, tangent, backward
