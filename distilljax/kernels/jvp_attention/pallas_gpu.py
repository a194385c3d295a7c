"""Attention kernels for GPUs (Triton): forward, fused JVP, tangent, backwards.

Nothing here was ever run on a GPU: the kernels are proved interpreted, and
compiled for an H100 ahead of time.

A program takes a block of rows of one head, the grid is (N / rows, H, B), and
walks over blocks of columns with its sums in registers; the gradients in k and
v take a block of columns and walk over the rows of the group's heads. No sum is
shared between programs, so there is nothing atomic and results are the same bit
for bit. Causal loops start and end where something is seen. Exponentials are of
base 2 inside, where a GPU has an instruction for them: S is scaled by log2(e),
the tangent of S is not. The values are centred per head (by their mean over the
keys) where tangents are made: to is invariant to it, and (P tS) v - mu o then
cancels less in bfloat16.

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
from jax.experimental.pallas import triton as plgpu

from distilljax.kernels.jvp_attention import common
from distilljax.kernels.jvp_attention import spec as spec_lib

LOG2_E = float(np.log2(np.e))
# A matrix product takes no less of either side.
LEAST_SIDE = 16


@dataclasses.dataclass(frozen=True)
class Config:
  """How much one program takes and how it is compiled.

  Attributes:
    rows: of a block of scores.
    columns: of a block of scores.
    warps: 32 threads each, that share a block.
    stages: blocks of a loop that are in flight at once.
  """

  rows: int
  columns: int
  warps: int
  stages: int


# {(kernel, width of a head): ...} for bfloat16. What they take on an H100:
# `bounds.REGISTERS`.
CONFIGS = {
    ("forward", 64): Config(128, 64, 4, 3),
    ("fused", 64): Config(128, 64, 8, 2),
    ("tangent", 64): Config(128, 64, 8, 2),
    ("backward_rows", 64): Config(128, 64, 8, 2),
    ("backward_columns", 64): Config(64, 128, 8, 2),
    ("second_statistics", 64): Config(128, 64, 8, 2),
    ("second_rows", 64): Config(128, 64, 8, 2),
    ("second_columns", 64): Config(32, 128, 8, 2),
    ("forward", 128): Config(128, 64, 8, 3),
    ("fused", 128): Config(128, 32, 8, 3),
    ("tangent", 128): Config(128, 32, 8, 3),
    ("backward_rows", 128): Config(128, 64, 8, 2),
    ("backward_columns", 128): Config(64, 128, 8, 2),
    ("second_statistics", 128): Config(128, 32, 8, 2),
    ("second_rows", 128): Config(128, 32, 8, 2),
    ("second_columns", 128): Config(32, 128, 8, 2),
    # Two sums of 256 numbers a row: wider blocks would spill.
    ("forward", 256): Config(128, 64, 8, 2),
    ("fused", 256): Config(16, 32, 8, 2),
    ("tangent", 256): Config(16, 32, 8, 2),
    ("backward_rows", 256): Config(64, 32, 8, 2),
    ("backward_columns", 256): Config(64, 32, 8, 2),
    ("second_statistics", 256): Config(16, 32, 8, 2),
    ("second_rows", 256): Config(16, 32, 8, 2),
    ("second_columns", 256): Config(16, 32, 8, 2),
}
# For float32, whose products in three parts take many registers: at width 128
# tangents and the second order spill.
FLOAT32 = Config(16, 16, 4, 1)
# What the last axis of a grid may be.
MOST_BATCH = 2**16 - 1


def runs_on(platform: str) -> bool:
  """Whether the kernels can be compiled for a platform, or are interpreted."""
  return platform == "cuda" or common.interpreted() is not None


def config(kernel: str, width: int, itemsize: int) -> Config:
  """What a kernel takes.

  Args:
    kernel: its name.
    width: of a head, the wider of keys and values.
    itemsize: bytes of an input number.

  Returns:
    The sizes.
  """
  return FLOAT32 if itemsize == 4 else CONFIGS[kernel, width]


@dataclasses.dataclass(frozen=True)
class _Shape(common.Problem):
  """Sizes of a problem, and the blocks that a kernel cuts it into."""

  config: Config

  @classmethod
  def of(cls, kernel, spec, x):
    b, h, n, d = x[0].shape
    if b > MOST_BATCH:
      raise ValueError(
          f"attention: q must be of at most {MOST_BATCH} batch rows, those of"
          f" vmap counted, for 'pallas_gpu' ('xla' supports any), got {b}"
      )
    kv_heads, m = x[1].shape[1:3]
    sizes = config(kernel, max(d, x[2].shape[3]), x[0].dtype.itemsize)
    # Powers of two, as everything in a program.
    side = lambda size, a: min(size, max(LEAST_SIDE, pl.next_power_of_2(a)))
    sizes = dataclasses.replace(
        sizes,
        rows=side(spec.rows or sizes.rows, n),
        columns=side(spec.columns or sizes.columns, m),
    )
    return cls(b, h, h // kv_heads, n, m, m - n, spec.causal, sizes)

  @property
  def rows(self):
    return self.config.rows

  @property
  def columns(self):
    return self.config.columns

  def seen_columns(self, i):
    """How many blocks of columns the rows of block i see."""
    if not self.causal:
      return np.int32(self.column_blocks)
    top = (i + np.int32(1)) * np.int32(self.rows) + np.int32(self.shift)
    top = jnp.maximum(top, np.int32(0)) + np.int32(self.columns - 1)
    blocks = lax.div(top, np.int32(self.columns))
    return jnp.minimum(blocks, np.int32(self.column_blocks))

  def first_row(self, j):
    """The first block of rows that sees a column of block j."""
    if not self.causal:
      return np.int32(0)
    low = j * np.int32(self.columns) - np.int32(self.shift)
    return lax.div(jnp.maximum(low, np.int32(0)), np.int32(self.rows))


def _precision():
  """Of products of float32: tensor cores, in three parts of 11 bits."""
  if common.interpreted() is not None:
    return lax.Precision.HIGHEST
  return lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def _nn(a, b):
  """a b of matrices, summed in float32."""
  return common.dot(a, b, 0, _precision())


def _nt(a, b):
  """a b' of matrices, summed in float32."""
  return common.dot(a, b, 1, _precision())


class _Call:
  """Operands and results of a `pallas_call`, by name.

  Those that lie along the rows or columns of a program's own block come cut to
  it; the others come whole and are read a block at a time.
  """

  def __init__(self, shape, by_rows):
    self.shape, self.by_rows = shape, by_rows
    self.arrays, self.in_specs, self.names = [], [], []
    self.out_shapes, self.out_specs, self.out_names = [], [], []

  def add_rows(self, name, a, value=0):
    """Adds [B, H, N] or [B, H, N, *]."""
    a = self.shape.pad_rows(a, value=value)
    self._add(name, a, self._rows(a.shape[3:]))

  def add_columns(self, name, a):
    """Adds [B, K, M, *]."""
    a = self.shape.pad_columns(a)
    self._add(name, a, self._columns(a.shape[3:]))

  def add_head(self, name, a):
    """Adds [B, K, *]: one row of numbers for each key head."""
    groups = np.int32(self.shape.groups if self.by_rows else 1)
    index = lambda i, h, b: (b, lax.div(h, groups), np.int32(0))
    self._add(name, a, pl.BlockSpec((None, None, a.shape[2]), index))

  def add_masks(self, spec, x):
    """Adds the bias and the segment ids."""
    shape, zero = self.shape, np.int32(0)
    if spec.bias:
      bias = spec.bias_of(x)
      b, h, n, m = bias.shape
      bias = shape.pad_rows(bias) if n > 1 else bias
      bias = shape.pad_columns(bias, axis=3) if m > 1 else bias
      heads = None if self.by_rows else shape.groups if h > 1 else 1
      block = [None, heads, *bias.shape[2:]]
      axis, side, size = (
          (2, n, shape.rows) if self.by_rows else (3, m, shape.columns)
      )
      if side > 1:
        block[axis] = size

      def index(i, head, batch):
        at = [batch if b > 1 else zero, head if h > 1 else zero, zero, zero]
        if side > 1:
          at[axis] = i
        return tuple(at)

      self._add("bias", bias, pl.BlockSpec(tuple(block), index))
    if spec.segments:
      q_ids, kv_ids = spec.segments_of(x)
      q_ids = shape.pad_rows(q_ids, axis=1)
      kv_ids = shape.pad_columns(kv_ids, axis=1)
      own = lambda size: pl.BlockSpec((None, size), lambda i, h, b: (b, i))
      whole = lambda a: pl.BlockSpec(
          (None, a.shape[1]), lambda i, h, b: (b, zero)
      )
      q_spec = own(shape.rows) if self.by_rows else whole(q_ids)
      kv_spec = whole(kv_ids) if self.by_rows else own(shape.columns)
      self._add("q_ids", q_ids, q_spec)
      self._add("kv_ids", kv_ids, kv_spec)

  def result_rows(self, name, dtype, *tail):
    shape = self.shape
    padded = (shape.batch, shape.heads, shape.row_blocks * shape.rows)
    self._result(name, (*padded, *tail), dtype, self._rows(tail))

  def result_columns(self, name, dtype, *tail):
    shape = self.shape
    heads = shape.heads // shape.groups
    padded = (shape.batch, heads, shape.column_blocks * shape.columns)
    self._result(name, (*padded, *tail), dtype, self._columns(tail))

  def _add(self, name, array, spec):
    self.names.append(name)
    self.arrays.append(array)
    self.in_specs.append(spec)

  def _result(self, name, shape, dtype, spec):
    self.out_names.append(name)
    self.out_shapes.append(common.result(shape, dtype))
    self.out_specs.append(spec)

  def _rows(self, tail):
    shape, zeros = self.shape, (np.int32(0),) * len(tail)
    if self.by_rows:
      block = (None, None, shape.rows, *tail)
      return pl.BlockSpec(block, lambda i, h, b: (b, h, i, *zeros))
    block = (None, shape.groups, shape.row_blocks * shape.rows, *tail)
    return pl.BlockSpec(block, lambda j, h, b: (b, h, np.int32(0), *zeros))

  def _columns(self, tail):
    shape, zeros = self.shape, (np.int32(0),) * len(tail)
    if not self.by_rows:
      block = (None, None, shape.columns, *tail)
      return pl.BlockSpec(block, lambda j, h, b: (b, h, j, *zeros))
    groups = np.int32(shape.groups)
    block = (None, None, shape.column_blocks * shape.columns, *tail)
    return pl.BlockSpec(
        block, lambda i, h, b: (b, lax.div(h, groups), np.int32(0), *zeros)
    )

  def run(self, name, body):
    """Runs `body(refs)` in every program."""
    shape = self.shape

    def kernel(*refs):
      body(dict(zip((*self.names, *self.out_names), refs)))

    # What the program is called where it is compiled.
    kernel.__name__ = kernel.__qualname__ = f"jvp_attention_{name}"
    blocks, heads = (
        (shape.row_blocks, shape.heads) if self.by_rows else
        (shape.column_blocks, shape.heads // shape.groups)
    )  # fmt: skip
    return pl.pallas_call(
        kernel,
        grid=(blocks, heads, shape.batch),
        in_specs=self.in_specs,
        out_specs=self.out_specs,
        out_shape=self.out_shapes,
        compiler_params=plgpu.CompilerParams(
            num_warps=shape.config.warps, num_stages=shape.config.stages
        ),
        interpret=common.interpreted() is not None,
        name=kernel.__name__,
    )(*self.arrays)


class _Block:
  """A block of scores, [rows, columns] or, by columns, its transpose.

  Attributes:
    spec: the attention.
    shape: how it is cut.
    i: index of the block of rows.
    j: index of the block of columns.
    turned: whether scores are [columns, rows].
    has: whether there is an operand of a name.
  """

  def __init__(self, spec, call, refs, own, i, j, head=None):
    self.spec, self.shape, self.i, self.j = spec, call.shape, i, j
    self.turned = not call.by_rows
    self.has = refs.__contains__
    self._refs, self._own, self._head = refs, own, head

  def __getitem__(self, name):
    """The part of an operand that belongs to the block."""
    if name in self._own:
      return self._own[name]
    shape, ref = self.shape, self._refs[name]
    rows = pl.ds(self.i * np.int32(shape.rows), shape.rows)
    columns = pl.ds(self.j * np.int32(shape.columns), shape.columns)
    if name == "bias":
      if not self.turned:
        return ref[:, columns if ref.shape[1] > 1 else slice(None)]
      head = self._head if ref.shape[0] > 1 else np.int32(0)
      return ref[head, rows if ref.shape[1] > 1 else slice(None), :]
    if name == "q_ids":
      return ref[rows]
    if self.turned:
      return ref[self._head, rows]
    return ref[columns]

  def along(self, rows=None, columns=None):
    """[rows] or [columns] to a shape that scores broadcast with."""
    a = columns if rows is None else rows
    return a[None, :] if (rows is None) != self.turned else a[:, None]

  def product(self, row, column):
    """row column' of operands, as scores are turned."""
    a, b = self[row], self[column]
    return _nt(b, a) if self.turned else _nt(a, b)

  def score(self):
    """Scores times log2(e); masked ones are -inf."""
    spec, shape = self.spec, self.shape
    s = self.product("q", "k") * np.float32(spec.scale * LOG2_E)
    if self.has("bias"):
      bias = self["bias"].astype(jnp.float32) * np.float32(LOG2_E)
      s = s + jnp.broadcast_to(bias.T if self.turned else bias, s.shape)
    ok = None
    columns = None
    if spec.causal or shape.ragged:
      columns = lax.iota(jnp.int32, shape.columns)
      columns = columns + self.j * np.int32(shape.columns)
    if spec.causal:
      rows = lax.iota(jnp.int32, shape.rows)
      rows = rows + (self.i * np.int32(shape.rows) + np.int32(shape.shift))
      ok = self.along(columns=columns) <= self.along(rows=rows)
    if shape.ragged:
      there = self.along(columns=columns < np.int32(shape.m))
      ok = there if ok is None else ok & there
    if spec.segments:
      q_ids, kv_ids = self["q_ids"], self["kv_ids"]
      same = self.along(rows=q_ids) == self.along(columns=kv_ids)
      ok = same if ok is None else ok & same
    if ok is None:
      return s
    return jnp.where(jnp.broadcast_to(ok, s.shape), s, -jnp.inf)

  def tangent_score(self):
    """scale (tq k' + q tk'), None where both are zero."""
    terms = [
        self.product(row, column)
        for row, column in (("tq", "k"), ("q", "tk"))
        if self.has(row) and self.has(column)
    ]
    if not terms:
      return None
    return functools.reduce(jnp.add, terms) * np.float32(self.spec.scale)


def _shift(lse):
  """What is subtracted from scores in base 2."""
  return common.finite(lse) * np.float32(LOG2_E)


def _by_rows(
    name: str, spec: spec_lib.Spec, wrt: str, x, t, statistics: bool, do=None
):
  """One kernel whose results are rows.

  Args:
    name: of the kernel.
    spec: the attention.
    wrt: letters of the tangents.
    x: what attention is a function of.
    t: the tangents, and with `statistics` o and lse after them.
    statistics: whether o and lse are known: the kernel gives their tangents.
    do: None, or what the tangent of o is multiplied with, which then takes the
      place of that tangent.

  Returns:
    (o, lse) without tangents, (to, mu) or (do . to, mu) with statistics, else
    (o, lse, to, mu).
  """
  shape = _Shape.of(name, spec, x)
  call = _Call(shape, by_rows=True)
  e = x[2].shape[3]
  call.add_rows("q", x[0])
  call.add_columns("k", x[1])
  call.add_columns("v", x[2])
  call.add_masks(spec, x)
  for letter, a in zip(wrt, t):
    add = call.add_rows if letter == "q" else call.add_columns
    add(f"t{letter}", a)
  if wrt:
    # Any centre will do, so it may be rounded: differences are then exact but
    # for one rounding, and need no registers of float32.
    center = jnp.mean(x[2].astype(jnp.float32), axis=2).astype(x[2].dtype)
    call.add_head("center", center)
  if statistics:
    o, lse = t[len(wrt) :]
    call.add_rows("o", o)
    call.add_rows("lse", lse)
  if do is not None:
    call.add_rows("do", do)
  if not statistics:
    call.result_rows("o_out", x[2].dtype, e)
    call.result_rows("lse_out", jnp.float32)
  if wrt:
    if do is None:
      call.result_rows("to_out", x[2].dtype, e)
    else:
      call.result_rows("other_out", jnp.float32)
    call.result_rows("mu_out", jnp.float32)
  moves = bool(set(wrt) & set("qk"))
  # Whether a row may see nothing at all.
  masked = spec.bias or spec.causal or spec.segments

  def body(refs):
    i = pl.program_id(0)
    own = {c: refs[c][...] for c in ("q", "tq", "q_ids") if c in refs}
    center = refs["center"][...][None, :] if wrt else None
    if statistics:
      shift = _shift(refs["lse"][...])

    def step(j, carry):
      block = _Block(spec, call, refs, own, i, j)
      s = block.score()
      new = {}
      if statistics:
        p = jnp.exp2(s - shift[:, None])
      else:
        top = jnp.maximum(carry["top"], jnp.max(s, axis=1))
        finite = common.finite(top) if masked else top
        p = jnp.exp2(s - finite[:, None])
        rescale = jnp.exp2(carry["top"] - finite)
        new["total"] = jnp.sum(p, axis=1)
      v = block["v"]
      if wrt:
        v = v - center
      low = p.astype(v.dtype)
      if not statistics:
        new["sum"] = _nn(low, v)
      if moves:
        h = p * block.tangent_score()
        new["mu"] = jnp.sum(h, axis=1)
        new["change"] = _nn(h.astype(v.dtype), v)
      if "tv" in refs:
        common.add(new, change=_nn(low, block["tv"]))
      for key, a in new.items():
        old = carry[key]
        if not statistics:
          old = old * (rescale[:, None] if old.ndim == 2 else rescale)
        new[key] = old + a
      return new if statistics else {**new, "top": top}

    row = lambda value=0.0: jnp.full((shape.rows,), value, jnp.float32)
    wide = lambda: jnp.zeros((shape.rows, e), jnp.float32)
    start = {}
    if not statistics:
      start = {"top": row(-jnp.inf), "total": row(), "sum": wide()}
    if wrt:
      start["change"] = wide()
    if moves:
      start["mu"] = row()
    done = lax.fori_loop(np.int32(0), shape.seen_columns(i), step, start)
    mu = done["mu"] if moves else row()
    change = done.get("change")
    if statistics:
      o = refs["o"][...].astype(jnp.float32) - center.astype(jnp.float32)
    else:
      total, top = done["total"], done["top"]
      lse = (top + jnp.log2(total)) * np.float32(1 / LOG2_E)
      empty = total == 0
      inverse = 1 / jnp.where(empty, jnp.ones_like(total), total)
      o = done["sum"] * inverse[:, None]
      value = o
      if wrt:
        mu, change = mu * inverse, change * inverse[:, None]
        value = jnp.where(empty[:, None], o, o + center.astype(jnp.float32))
      refs["o_out"][...] = value.astype(refs["o_out"].dtype)
      refs["lse_out"][...] = lse
    if wrt:
      to = change - mu[:, None] * o
      if do is None:
        refs["to_out"][...] = to.astype(refs["to_out"].dtype)
      else:
        other = jnp.sum(refs["do"][...].astype(jnp.float32) * to, axis=1)
        refs["other_out"][...] = other
      refs["mu_out"][...] = mu

  return tuple(a[:, :, : shape.n] for a in call.run(name, body))


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


def _slopes(block, p, a, stat, wanted):
  """What the gradients of a block are products with.

  Args:
    block: where the operands are read.
    p: probabilities.
    a: do v' - share.
    stat: name -> statistic of the rows, to broadcast with p.
    wanted: whether scores are differentiated at all.

  Returns:
    (weights of do in dv, slope in the scores, slope in the tangent scores);
    what is zero or not wanted is None. Without tangents the last is None.
  """
  if not block.has("mu"):
    return p, p * a if wanted else None, None
  ts = block.tangent_score()
  centered = None if ts is None else ts - stat("mu")
  weight = None if centered is None else p * centered
  if not wanted:
    return weight, None, None
  inner = -stat("other")
  if centered is not None:
    inner = inner + centered * a
  if block.has("tv"):
    inner = inner + block.product("do", "tv")
  return weight, p * inner, p * a


def _gradient_call(name, spec, x, rows, t, by_rows):
  """A call with the operands that both backward kernels take."""
  call = _Call(_Shape.of(name, spec, x), by_rows)
  call.add_rows("q", x[0])
  call.add_columns("k", x[1])
  call.add_columns("v", x[2])
  call.add_masks(spec, x)
  for key, a in rows.items():
    # A row that is not there has P = 0, whatever its bias.
    call.add_rows(key, a, np.inf if key == "lse" else 0)
  for key, a in t.items():
    add = call.add_rows if key == "tq" else call.add_columns
    add(key, a)
  return call


def _rows_gradient(name, spec, x, rows, t):
  """dq: one kernel that walks over the columns."""
  name = f"{name}_rows"
  call = _gradient_call(name, spec, x, rows, t, by_rows=True)
  shape = call.shape
  d = x[0].shape[3]
  call.result_rows("dq", x[0].dtype, d)

  def body(refs):
    i = pl.program_id(0)
    names = ("q", "tq", "q_ids", *rows)
    own = {c: refs[c][...] for c in names if c in refs}
    shift = _shift(own["lse"])

    def step(j, dq):
      block = _Block(spec, call, refs, own, i, j)
      stat = lambda key: own[key][:, None]
      p = jnp.exp2(block.score() - shift[:, None])
      a = block.product("do", "v") - stat("share")
      _, gs, gt = _slopes(block, p, a, stat, True)
      k = block["k"]
      dq = dq + _nn(gs.astype(k.dtype), k)
      if "tk" in refs:
        dq = dq + _nn(gt.astype(k.dtype), block["tk"])
      return dq

    dq = lax.fori_loop(
        np.int32(0), shape.seen_columns(i), step,
        jnp.zeros((shape.rows, d), jnp.float32),
    )  # fmt: skip
    dq = dq * np.float32(spec.scale)
    refs["dq"][...] = dq.astype(refs["dq"].dtype)

  (dq,) = call.run(name, body)
  return dq[:, :, : shape.n]


def _columns_gradient(name, spec, wrt, x, rows, t):
  """dk, dv: one kernel that walks over the rows of all heads of a group.

  It works on transposed scores [columns, rows]: the left side of a product may
  come from registers, and here that is always P or what is like it.
  """
  name = f"{name}_columns"
  call = _gradient_call(name, spec, x, rows, t, by_rows=False)
  shape = call.shape
  widths = {
      c: w for c, w in (("k", x[0].shape[3]), ("v", x[2].shape[3])) if c in wrt
  }
  for letter, width in widths.items():
    call.result_columns(f"d{letter}", x[0].dtype, width)

  def body(refs):
    j = pl.program_id(0)
    names = ("k", "v", "tk", "tv", "kv_ids")
    own = {c: refs[c][...] for c in names if c in refs}
    last = np.int32(shape.row_blocks)

    def step(head, i, sums):
      block = _Block(spec, call, refs, own, i, j, head)
      stat = lambda key: block.along(rows=block[key])
      shift = block.along(rows=_shift(block["lse"]))
      p = jnp.exp2(block.score() - shift)
      a = None
      if "k" in sums or "mu" in refs:
        a = block.product("do", "v") - stat("share")
      weight, gs, gt = _slopes(block, p, a, stat, "k" in sums)
      new = dict(sums)
      if "v" in sums:
        do = block["do"]
        common.add(new, v=_nn(weight.astype(do.dtype), do))
      if "k" in sums:
        q = block["q"]
        common.add(new, k=_nn(gs.astype(q.dtype), q))
        if "tq" in refs:
          common.add(new, k=_nn(gt.astype(q.dtype), block["tq"]))
      return new

    def over_rows(head, sums):
      return lax.fori_loop(
          shape.first_row(j), last, functools.partial(step, head), sums
      )

    sums = {
        c: jnp.zeros((shape.columns, w), jnp.float32) for c, w in widths.items()
    }
    if shape.groups == 1:
      sums = over_rows(np.int32(0), sums)
    else:
      sums = lax.fori_loop(
          np.int32(0), np.int32(shape.groups), over_rows, sums
      )
    for letter, a in sums.items():
      if letter == "k":
        a = a * np.float32(spec.scale)
      refs[f"d{letter}"][...] = a.astype(refs[f"d{letter}"].dtype)

  outs = call.run(name, body)
  return {c: a[:, :, : shape.m] for c, a in zip(widths, outs)}


def backward(spec: spec_lib.Spec, wrt: str, *operands: jax.Array):
  """Gradients of <do, o> + <dl, lse> in the arrays of `wrt`."""
  x, (o, lse, do, dl) = operands[: spec.size], operands[spec.size :]
  share = common.shares(o, lse, do, dl, jnp.float32)
  rows = {"do": do, "lse": lse, "share": share}
  found = {}
  if "q" in wrt:
    found["q"] = _rows_gradient("backward", spec, x, rows, {})
  if set(wrt) & set("kv"):
    found |= _columns_gradient("backward", spec, wrt, x, rows, {})
  return tuple(found[c] for c in wrt)


def second_backward(
    spec: spec_lib.Spec, wrt: str, out: str, *operands: jax.Array
):
  """Gradients of <do, to> + <dl, mu> in the arrays of `out`, t being fixed."""
  x, rest = operands[: spec.size], operands[spec.size :]
  o, lse, *t = rest[: 2 + len(wrt)]
  do, dl = rest[2 + len(wrt) :]
  # The tangent of o itself is not needed.
  other, mu = _by_rows(
      "second_statistics", spec, wrt, x, (*t, o, lse), True, do
  )
  share = common.shares(o, lse, do, dl, jnp.float32)
  rows = {"do": do, "lse": lse, "share": share, "mu": mu, "other": other}
  tangents = {f"t{c}": a for c, a in zip(wrt, t)}
  found = {}
  if "v" in out and not set(wrt) & set("qk"):
    found["v"] = jnp.zeros_like(x[2])  # nothing but the tangent score has v
  if "q" in out:
    found["q"] = _rows_gradient("second", spec, x, rows, tangents)
  others = "".join(c for c in out if c != "q" and c not in found)
  if others:
    found |= _columns_gradient("second", spec, others, x, rows, tangents)
  return tuple(found[c] for c in out)


def kernels() -> tuple[Callable[..., Any], ...]:
  """The functions that are kernels; the other slots are those of "xla"."""
  return forward, fused, tangent, backward, second_backward
