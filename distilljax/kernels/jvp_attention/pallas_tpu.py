"""Attention kernels for TPUs: forward, fused JVP, tangent and both backwards.

One grid step takes a block of rows and a block of columns of one head; the last
grid axis runs over what is summed, and sums live in float32 scratch. Per-row
statistics are stored as rows ([B, H, 1, N]), not as columns, which the memory
layout would widen 128 times. Causal blocks that nobody sees are neither
computed nor copied: their index is that of the last block that is seen. The
values are centred per head (by their mean over the keys) where tangents are
made: to is invariant to it, and (P tS) v - mu o then cancels less in bfloat16.

A block is computed in parts of rows and columns whose scores the registers can
nearly hold; statistics of rows are alike in all lanes, or summed lane by lane
until the end, so that no step moves numbers between lanes but for the maximum;
and no step is spent on clearing sums. `benchmarks.kernel_schedule` shows what
that buys.

The reverse of the tangent has kernels, its tangent (forward over forward) is
that of the implementation "xla". Loaded only when a kernel is asked for.

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

from distilljax.kernels.jvp_attention import common
from distilljax.kernels.jvp_attention import spec as spec_lib

LANES = 128


@dataclasses.dataclass(frozen=True)
class Tile:
  """How much one grid step takes, and in which parts it computes it.

  A step has a fixed cost, so a block is as large as `vmem_bytes` lets it be. A
  part is what the registers and the scheduler can cope with.

  Attributes:
    rows: of a block.
    columns: of a block.
    part_rows: rows of a part.
    part_columns: columns of a part.
  """

  rows: int
  columns: int
  part_rows: int = 256
  part_columns: int = 512


# By the width of a head. Compiled schedules: `tpu_bounds.BUNDLES`.
TILES = {64: Tile(512, 2048), 128: Tile(512, 2048), 256: Tile(256, 1024)}
# Of causal attention: a block that is half seen is computed whole.
CAUSAL_COLUMNS = 1024

# What a step is allowed to take, and what `vmem_bytes` may say that it does.
# v5e and v6e have 128 MiB, v5p has 64.
VMEM_LIMIT = 32 * 2**20
SCOPED_BYTES = 18 * 2**20

def runs_on(platform: str) -> bool:
  """Whether the kernels can be compiled for a platform, or are interpreted."""
  return platform == "tpu" or common.interpreted() is not None


def vmem_bytes(
    tile: Tile,
    width: int,
    itemsize: int,
    tangents: bool,
    bias_itemsize: int = 0,
) -> int:
  """Scoped memory of one grid step, roughly: blocks twice, scores of a part.

  Args:
    tile: the sizes of a step.
    width: of a head, of keys and values alike.
    itemsize: bytes of an input number.
    tangents: whether tangents are streamed beside the inputs.
    bias_itemsize: bytes of a number of the bias, 0 without one.

  Returns:
    Bytes.
  """
  streams = 2 if tangents else 1
  blocks = 2 * streams * itemsize * width * (2 * tile.rows + 2 * tile.columns)
  sums = 4 * tile.rows * (streams * width + 3 * LANES)
  scores = 4 * tile.part_rows * tile.columns * (4 if tangents else 2)
  bias = 2 * bias_itemsize * tile.rows * tile.columns
  return blocks + sums + scores + bias


def tile(
    width: int, itemsize: int, bias_itemsize: int = 0, causal: bool = False
) -> Tile:
  """The sizes of a step, with fewer columns where they would not fit.

  Args:
    width: of a head, the wider of keys and values.
    itemsize: bytes of an input number.
    bias_itemsize: bytes of a number of the bias, 0 without one.
    causal: whether later columns are hidden.

  Returns:
    The sizes.
  """
  found = TILES[width]
  if causal:
    columns = min(found.columns, CAUSAL_COLUMNS)
    found = dataclasses.replace(found, columns=columns)
  while (
      vmem_bytes(found, width, itemsize, True, bias_itemsize) > SCOPED_BYTES
      and found.columns > LANES
  ):
    found = dataclasses.replace(found, columns=found.columns // 2)
  return found


@dataclasses.dataclass(frozen=True)
class _Shape(common.Problem):
  """Sizes of a problem after padding, and its blocks."""

  rows: int
  columns: int
  part_rows: int
  part_columns: int

  @classmethod
  def of(cls, spec, x):
    b, h, n, d = x[0].shape
    kv_heads, m = x[1].shape[1:3]
    bias = spec.bias_of(x)
    sizes = tile(
        max(d, x[2].shape[3]),
        x[0].dtype.itemsize,
        0 if bias is None else bias.dtype.itemsize,
        spec.causal,
    )
    up = lambda a: -(-a // LANES) * LANES
    return cls(
        b, h, h // kv_heads, n, m, m - n, spec.causal,
        rows=min(spec.rows or sizes.rows, up(n)),
        columns=min(spec.columns or sizes.columns, up(m)),
        part_rows=sizes.part_rows,
        part_columns=sizes.part_columns,
    )  # fmt: skip

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

  def when_seen(self, i, j, first, step):
    """Runs `step` if any row of block i sees any column of j, or `first`."""
    if not self.causal:
      step()
      return
    top = (i + np.int32(1)) * np.int32(self.rows) + np.int32(self.shift)
    pl.when((top > j * np.int32(self.columns)) | first)(step)


def _nn(a, b):
  """a b of matrices."""
  return common.dot(a, b, 0)


def _nt(a, b):
  """a b' of matrices."""
  return common.dot(a, b, 1)


def _wide(a, width):
  """[r, LANES], every lane alike, to [r, width]."""
  if width <= LANES:
    return a[:, :width]
  return jnp.concatenate([a] * (width // LANES), axis=1)


def _row(a):
  """[r, LANES], every lane alike, to [1, r]."""
  # The diagonal of each square: cheaper than a transpose.
  diagonal = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0)
  lane = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)
  rows = [
      jnp.where(diagonal == lane, a[part], np.float32(0))
      for part in _parts(a.shape[0], LANES)
  ]
  rows = [jnp.sum(square, axis=0, keepdims=True) for square in rows]
  return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)


def _column(row):
  """[1, r] to [r, LANES], every lane alike."""
  return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _parts(length, size):
  """Slices of `size` that cover `length`, the last one may be shorter."""
  return [
      slice(start, min(start + size, length))
      for start in range(0, length, size)
  ]


def _by_lanes(fn, a):
  """[r, c] to [r, LANES]: what lies c / LANES apart joined by `fn`."""
  parts = [a[:, part] for part in _parts(a.shape[1], LANES)]
  return functools.reduce(fn, parts)


def _sum_of_lanes(a):
  return jnp.broadcast_to(jnp.sum(a, axis=1, keepdims=True), a.shape)


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
    self.out_shapes.append(common.result(shape, dtype))
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
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        interpret=common.interpreted() or False,
        name=f"jvp_attention_{name}",
    )(*self.arrays)


def _add_rows(call, shape, name, a, q_map):
  """Adds [B, H, N, *], padded, in blocks of rows."""
  call.add(name, shape.pad_rows(a), (1, 1, shape.rows, a.shape[3]), q_map)


def _add_columns(call, shape, name, a, k_map):
  """Adds [B, H, M, *], padded, in blocks of columns."""
  block = (1, 1, shape.columns, a.shape[3])
  call.add(name, shape.pad_columns(a), block, k_map)


def _inputs(call, shape, x, q_map, k_map):
  """Adds q, k and v."""
  _add_rows(call, shape, "q", x[0], q_map)
  _add_columns(call, shape, "k", x[1], k_map)
  _add_columns(call, shape, "v", x[2], k_map)


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


def _score(refs, shape, spec, i, j, rows, columns, transposed=False):
  """Scores of part of a block, or their transpose; masked ones are -inf."""
  q, k = refs["q"][0, 0, rows], refs["k"][0, 0, columns]
  s = _nt(k, q) if transposed else _nt(q, k)
  s = s * np.float32(spec.scale)
  whole = slice(None)
  if "bias" in refs:
    ref = refs["bias"]
    bias = ref[
        0, 0, rows if ref.shape[2] > 1 else whole,
        columns if ref.shape[3] > 1 else whole,
    ].astype(jnp.float32)  # fmt: skip
    if transposed:
      bias = jnp.broadcast_to(bias, s.shape[::-1]).T
    s = s + jnp.broadcast_to(bias, s.shape)
  ok = None
  row_axis, column_axis = (1, 0) if transposed else (0, 1)
  at = None
  if spec.causal or shape.ragged:
    at = lax.broadcasted_iota(jnp.int32, s.shape, column_axis)
    at = at + (j * np.int32(shape.columns) + np.int32(columns.start))
  if spec.causal:
    row = lax.broadcasted_iota(jnp.int32, s.shape, row_axis)
    start = i * np.int32(shape.rows) + np.int32(shape.shift + rows.start)
    ok = at <= row + start
  if shape.ragged:
    there = at < np.int32(shape.m)
    ok = there if ok is None else ok & there
  if spec.segments:
    q_ids, kv_ids = refs["q_ids"], refs["kv_ids"]
    if transposed:
      same = q_ids[0, :, rows] == kv_ids[0, columns]
    else:
      same = q_ids[0, rows] == kv_ids[0, :, columns]
    ok = same if ok is None else ok & same
  return s if ok is None else jnp.where(ok, s, -jnp.inf)


def _tangent_score(refs, spec, rows, columns, transposed=False):
  """scale (tq k' + q tk') or its transpose, None where both are zero."""
  terms = []
  for row, column in (("tq", "k"), ("q", "tk")):
    if row in refs and column in refs:
      pair = refs[row][0, 0, rows], refs[column][0, 0, columns]
      terms.append(_nt(*(pair[::-1] if transposed else pair)))
  if not terms:
    return None
  return functools.reduce(jnp.add, terms) * np.float32(spec.scale)


def _values(refs, columns):
  """Part of the block of v, centred where a centre is given."""
  v = refs["v"][0, 0, columns]
  if "center" not in refs:
    return v
  return (v.astype(jnp.float32) - refs["center"][0, 0]).astype(v.dtype)


class _Sums:
  """Sums over the steps of the last grid axis, in scratch.

  Nothing clears them: in the first step what is there counts as `start`.
  """

  def __init__(self, refs, first):
    self.refs, self.first = refs, first

  def before(self, name, part, start=0.0):
    a = self.refs[name][part]
    return jnp.where(self.first, jnp.full_like(a, start), a)

  def add(self, name, part, a, rescale=None):
    old = self.before(name, part)
    if rescale is not None:
      old = old * _wide(rescale, old.shape[1])
    self.refs[name][part] = old + a


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
    name: str, spec: spec_lib.Spec, wrt: str, x, t, statistics: bool,
    to_dtype: Any = None,
):
  """One kernel whose results are rows.

  Args:
    name: of the kernel.
    spec: the attention.
    wrt: letters of the tangents.
    x: what attention is a function of.
    t: the tangents, and with `statistics` o and lse after them.
    statistics: whether o and lse are known: the kernel gives their tangents.
    to_dtype: dtype of the tangent of o, None for that of v.

  Returns:
    (o, lse) without tangents, (to, mu) with statistics, else all four.
  """
  shape = _Shape.of(spec, x)
  q_map, k_map, row, column = _row_maps(shape)
  call = _Call()
  e = x[2].shape[3]
  _inputs(call, shape, x, q_map, k_map)
  _masks(call, shape, spec, x, row, column, transposed=False)
  tangents = dict(zip(wrt, t))
  for letter, a in tangents.items():
    if letter == "q":
      _add_rows(call, shape, "tq", a, q_map)
    else:
      _add_columns(call, shape, f"t{letter}", a, k_map)
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
    lse = shape.pad_rows(common.finite(lse))[:, :, None]
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
          f"{result}_out", (*lead, padded, e),
          to_dtype if to_dtype and result == "to" else x[2].dtype,
          (1, 1, shape.rows, e), q_map,
      )  # fmt: skip
    else:
      call.result(
          f"{result}_out", (*lead, 1, padded), jnp.float32,
          (1, 1, 1, shape.rows), stat_map,
      )  # fmt: skip
  moves = bool(set(wrt) & set("qk"))
  scratch = {"lse": (shape.rows, LANES)} if statistics else {
      "top": (shape.rows, LANES), "total": (shape.rows, LANES),
      "sum": (shape.rows, e),
  }  # fmt: skip
  if wrt:
    scratch["change"] = (shape.rows, e)
  if moves:
    scratch["mu"] = (shape.rows, LANES)
  # Whether a row may see nothing at all.
  masked = spec.bias or spec.causal or spec.segments
  columns = _parts(shape.columns, shape.part_columns)

  def part_step(refs, s, i, j, rows):
    """Adds a block of columns to some rows of a block of rows."""
    sums = _Sums(s, j == 0)
    score = lambda c: _score(refs, shape, spec, i, j, rows, c)
    rescale = None
    if statistics:
      shift = s["lse"][rows]
    else:
      scores = [score(c) for c in columns]
      best = functools.reduce(
          jnp.maximum, [_by_lanes(jnp.maximum, a) for a in scores]
      )
      before = sums.before("top", rows, -jnp.inf)
      shift = jnp.maximum(before, jnp.max(best, axis=1, keepdims=True))
      s["top"][rows] = shift
      if masked:
        shift = common.finite(shift)
      rescale = jnp.exp(before - shift)
    new = {}
    for n, c in enumerate(columns):
      a = score(c) if statistics else scores[n]
      p = jnp.exp(a - _wide(shift, a.shape[1]))
      if not statistics:
        common.add(new, total=_by_lanes(jnp.add, p))
      v = _values(refs, c)
      low = p.astype(v.dtype)
      if not statistics:
        common.add(new, sum=_nn(low, v))
      # In this order, by the compiled schedule.
      if moves:
        h = p * _tangent_score(refs, spec, rows, c)
        common.add(new, mu=_by_lanes(jnp.add, h))
      if "tv" in refs:
        common.add(new, change=_nn(low, refs["tv"][0, 0, c]))
      if moves:
        common.add(new, change=_nn(h.astype(v.dtype), v))
    for name, a in new.items():
      sums.add(name, rows, a, rescale)

  def part_end(refs, s, rows):
    """Writes the results of some rows."""
    change = s["change"][rows] if wrt else None
    mu = None
    if wrt:
      mu = s["mu"][rows] if moves else jnp.zeros((LANES, LANES), jnp.float32)
      mu = _sum_of_lanes(mu)
    if statistics:
      o = refs["o"][0, 0, rows].astype(jnp.float32) - refs["center"][0, 0]
    else:
      total = _sum_of_lanes(s["total"][rows])
      lse = s["top"][rows] + jnp.log(total)
      if masked:
        empty = total == 0
        total = jnp.where(empty, jnp.ones_like(total), total)
      refs["lse_out"][0, 0, :, rows] = _row(lse)
      inverse = 1 / total
      o = s["sum"][rows] * _wide(inverse, e)
      value = o
      if wrt:
        mu, change = mu * inverse, change * _wide(inverse, e)
        value = o + refs["center"][0, 0]
        if masked:
          value = jnp.where(_wide(empty, e), o, value)
      refs["o_out"][0, 0, rows] = value.astype(refs["o_out"].dtype)
    if wrt:
      to = change - _wide(mu, e) * o
      refs["to_out"][0, 0, rows] = to.astype(refs["to_out"].dtype)
      refs["mu_out"][0, 0, :, rows] = _row(mu)

  def body(refs, s):
    i, j = pl.program_id(2), pl.program_id(3)
    if statistics:

      @pl.when(j == 0)
      def _():
        s["lse"][...] = _column(refs["lse"][0, 0])

    def step():
      for rows in _parts(shape.rows, shape.part_rows):
        part_step(refs, s, i, j, rows)

    # The first block is never left out: it starts the sums.
    shape.when_seen(i, j, j == 0, step)

    @pl.when(j == shape.column_blocks - 1)
    def _():
      for rows in _parts(shape.rows, LANES):
        part_end(refs, s, rows)

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


class _Rows:
  """The operands of a backward kernel that lie along the rows, padded.

  Attributes:
    arrays: {name: [B, H, N, *]}, blocks of rows; do, and tq with tangents.
    statistics: {name: [B, H, 1, N]}: lse, and share = do . o - dl; with
      tangents mu, and other = do . to.
  """

  def __init__(self, shape, arrays, statistics):
    self.arrays = {name: shape.pad_rows(a) for name, a in arrays.items()}
    # A row that is not there has P = 0, whatever its bias.
    pad = lambda name, a: shape.pad_rows(
        a.astype(jnp.float32), value=np.inf if name == "lse" else 0
    )
    self.statistics = {
        name: pad(name, a)[:, :, None] for name, a in statistics.items()
    }

  def add_to(self, call, shape, q_map, stat_map):
    for name, a in self.arrays.items():
      call.add(name, a, (1, 1, shape.rows, a.shape[3]), q_map)
    for name, a in self.statistics.items():
      call.add(name, a, (1, 1, 1, shape.rows), stat_map)


def _slopes(refs, spec, p, a, stat, rows, columns, wanted, transposed=False):
  """What the gradients of a part are products with.

  Args:
    refs: operands by name.
    spec: the attention.
    p: probabilities of the part.
    a: do v' - share.
    stat: name -> statistic of the rows, of p's shape.
    rows: those of the part.
    columns: those of the part.
    wanted: whether scores are differentiated at all.
    transposed: whether p is [columns, rows].

  Returns:
    (weights of do in dv, slope in the scores, slope in the tangent scores);
    what is zero or not wanted is None. Without tangents the last is None.
  """
  if "mu" not in refs:
    return p, p * a if wanted else None, None
  ts = _tangent_score(refs, spec, rows, columns, transposed)
  centered = None if ts is None else ts - stat("mu")
  weight = None if centered is None else p * centered
  if not wanted:
    return weight, None, None
  inner = -stat("other")
  if centered is not None:
    inner = inner + centered * a
  if "tv" in refs:
    pair = refs["do"][0, 0, rows], refs["tv"][0, 0, columns]
    inner = inner + _nt(*(pair[::-1] if transposed else pair))
  return weight, p * inner, p * a


def _rows_gradient(name, spec, shape, x, rows_, t):
  """dq: one kernel whose inner axis runs over the columns."""
  q_map, k_map, row, column = _row_maps(shape)
  d = x[0].shape[3]
  call = _Call()
  _inputs(call, shape, x, q_map, k_map)
  _masks(call, shape, spec, x, row, column, transposed=False)
  zero = np.int32(0)
  rows_.add_to(call, shape, q_map, lambda b, h, i, j: (b, h, zero, i))
  for key, a in t.items():
    _add_columns(call, shape, key, a, k_map)
  padded = shape.row_blocks * shape.rows
  call.result(
      "dq", (shape.batch, shape.heads, padded, d), x[0].dtype,
      (1, 1, shape.rows, d), q_map,
  )  # fmt: skip
  scratch = dict.fromkeys(rows_.statistics, (shape.rows, LANES))
  scratch["dq"] = (shape.rows, d)

  def part_step(refs, s, i, j, rows):
    sums = _Sums(s, j == 0)
    new = {}
    for c in _parts(shape.columns, shape.part_columns):
      width = c.stop - c.start
      stat = lambda key, w=width: _wide(s[key][rows], w)
      score = _score(refs, shape, spec, i, j, rows, c)
      p = jnp.exp(score - stat("lse"))
      do, v = refs["do"][0, 0, rows], refs["v"][0, 0, c]
      a = _nt(do, v) - stat("share")
      _, gs, gt = _slopes(refs, spec, p, a, stat, rows, c, True)
      k = refs["k"][0, 0, c]
      common.add(new, dq=_nn(gs.astype(k.dtype), k))
      if "tk" in refs:
        common.add(new, dq=_nn(gt.astype(k.dtype), refs["tk"][0, 0, c]))
    sums.add("dq", rows, new["dq"])

  def body(refs, s):
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
      for key in rows_.statistics:
        s[key][...] = _column(refs[key][0, 0])

    def step():
      for rows in _parts(shape.rows, shape.part_rows):
        part_step(refs, s, i, j, rows)

    shape.when_seen(i, j, j == 0, step)

    @pl.when(j == shape.column_blocks - 1)
    def _():
      out = s["dq"][...] * np.float32(spec.scale)
      refs["dq"][0, 0] = out.astype(refs["dq"].dtype)

  grid = (shape.batch, shape.heads, shape.row_blocks, shape.column_blocks)
  (dq,) = call.run(f"{name}_rows", body, grid, scratch)
  return dq[:, :, : shape.n]


def _columns_gradient(name, spec, shape, wrt, x, rows_, t):
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
  _inputs(call, shape, x, q_map, k_map)
  _masks(call, shape, spec, x, row, column, transposed=True)
  rows_.add_to(call, shape, q_map, stat_map)
  for key, a in t.items():
    _add_columns(call, shape, key, a, k_map)
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

  def part_step(refs, s, i, j, first, columns):
    sums = _Sums(s, first)
    new = {}
    for rows in _parts(shape.rows, shape.part_columns):
      stat = lambda key, rows=rows: refs[key][0, 0, :, rows]
      score = _score(refs, shape, spec, i, j, rows, columns, True)
      p = jnp.exp(score - stat("lse"))
      do, q = refs["do"][0, 0, rows], refs["q"][0, 0, rows]
      a = None
      if "k" in s or "mu" in refs:
        a = _nt(refs["v"][0, 0, columns], do) - stat("share")
      weight, gs, gt = _slopes(
          refs, spec, p, a, stat, rows, columns, "k" in s, True
      )
      if "v" in s:
        common.add(new, v=_nn(weight.astype(do.dtype), do))
      if "k" in s:
        common.add(new, k=_nn(gs.astype(q.dtype), q))
        if "tq" in refs:
          tq = refs["tq"][0, 0, rows]
          common.add(new, k=_nn(gt.astype(q.dtype), tq))
    for key, a in new.items():
      sums.add(key, columns, a)

  def body(refs, s):
    j, r = pl.program_id(2), pl.program_id(3)
    i = lax.rem(r, n_rows)

    def step():
      for columns in _parts(shape.columns, shape.part_rows):
        part_step(refs, s, i, j, r == 0, columns)

    shape.when_seen(i, j, r == 0, step)

    @pl.when(r == steps - 1)
    def _():
      for letter, ref in s.items():
        factor = np.float32(spec.scale if letter == "k" else 1.0)
        out = refs[f"d{letter}"]
        out[0, 0] = (ref[...] * factor).astype(out.dtype)

  grid = (*lead, shape.column_blocks, steps)
  outs = call.run(f"{name}_columns", body, grid, scratch)
  return {c: a[:, :, : shape.m] for c, a in zip(widths, outs)}


def backward(spec: spec_lib.Spec, wrt: str, *operands: jax.Array):
  """Gradients of <do, o> + <dl, lse> in the arrays of `wrt`."""
  x, (o, lse, do, dl) = operands[: spec.size], operands[spec.size :]
  shape = _Shape.of(spec, x)
  share = common.shares(o, lse, do, dl, jnp.float32)
  rows_ = _Rows(shape, {"do": do}, {"lse": common.finite(lse), "share": share})
  found = {}
  if "q" in wrt:
    found["q"] = _rows_gradient("backward", spec, shape, x, rows_, {})
  if set(wrt) & set("kv"):
    found |= _columns_gradient("backward", spec, shape, wrt, x, rows_, {})
  return tuple(found[c] for c in wrt)


def second_backward(
    spec: spec_lib.Spec, wrt: str, out: str, *operands: jax.Array
):
  """Gradients of <do, to> + <dl, mu> in the arrays of `out`, t being fixed."""
  x, rest = operands[: spec.size], operands[spec.size :]
  o, lse, *t = rest[: 2 + len(wrt)]
  do, dl = rest[2 + len(wrt) :]
  to, mu = _by_rows("tangent", spec, wrt, x, (*t, o, lse), True, jnp.float32)
  other = jnp.sum(do.astype(jnp.float32) * to, axis=-1)
  shape = _Shape.of(spec, x)
  tangents = {f"t{c}": a for c, a in zip(wrt, t)}
  arrays = {"do": do} | {k: a for k, a in tangents.items() if k == "tq"}
  rows_ = _Rows(
      shape,
      arrays,
      {
          "lse": common.finite(lse), "mu": mu,
          "share": common.shares(o, lse, do, dl, jnp.float32),
          "other": jnp.where(jnp.isneginf(lse), jnp.zeros_like(other), other),
      },
  )  # fmt: skip
  tangents.pop("tq", None)
  found = {}
  if "v" in out and not set(wrt) & set("qk"):
    found["v"] = jnp.zeros_like(x[2])  # nothing but the tangent score has v
  if "q" in out:
    found["q"] = _rows_gradient("second", spec, shape, x, rows_, tangents)
  rest_of_out = "".join(c for c in out if c != "q" and c not in found)
  if rest_of_out:
    found |= _columns_gradient(
        "second", spec, shape, rest_of_out, x, rows_, tangents
    )
  return tuple(found[c] for c in out)


def kernels() -> tuple[Callable[..., Any], ...]:
  """The functions that are kernels; the other slots are those of "xla"."""
  return forward, fused, tangent, backward, second_backward
