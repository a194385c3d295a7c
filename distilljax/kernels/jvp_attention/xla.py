"""Attention in blocks of rows and columns, as plain XLA: any backend.

No array grows with N M: a block of scores is made, used and forgotten, and
what is kept has N or M rows. Nothing here is differentiated by JAX, see
`primitives.py`; hence loops may be of any kind, and causal ones stop at the
last block that is seen.

Per row, with S = scale q k' + bias, P = exp(S - lse) and, for tangents t,
tS = scale (tq k' + q tk') + tbias, mu = sum P tS (the tangent of lse):

  o = P v;  to = P tv + (P (tS - mu)) v
  gradients of <do, o> + <dl, lse>: A = do v' - (do . o - dl), dS = P A,
    dq = scale dS k, dk = scale dS' q, dv = P' do, dbias = dS
  of <do, to> + <dl, mu>: gT = P A,
    gS = P (do tv' + (tS - mu) A - do . to),
    dq = scale (gS k + gT tk), dk = scale (gS' q + gT' tq),
    dv = (P (tS - mu))' do, dbias = gS
  derivative of (to, mu) along d, with sD, nu those of d and
    sTD = scale (tq dk' + dq tk'): Z = P ((sD - nu) (sT - mu) + sTD),
    dmu = sum Z, dto = P (sD - nu) tv + P (sT - mu) dv + Z v - dmu o

Blocks see masked scores as -inf and multiply no masked product that could be
infinite; a row that sees nothing has o = 0, lse = -inf and P = 0.

References:
  Lu, Song, Simplifying, Stabilizing and Scaling Continuous-Time Consistency
  Models, 2024, arXiv:2410.11081 (the tangent of attention in one pass); Zheng
  et al., Large Scale Diffusion Distillation via Score-Regularized
  Continuous-Time Consistency, 2025, arXiv:2510.08431 (parallel kernel).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distilljax.kernels.jvp_attention import common
from distilljax.kernels.jvp_attention import spec as spec_lib

# Scores of one block over all heads and batch rows, and the least and largest
# side of a block. On CPU a block should stay in the cache.
BLOCK_SCORES = 2**20
LEAST_SIDE = 64
MOST_ROWS = 256
MOST_COLUMNS = 2048
# Up to so many scores there is no loop at all.
ONE_BLOCK_SCORES = 2**20


def _pieces(length: int, target: int) -> tuple[int, int]:
  """(number, size) of equal pieces of about `target` that cover `length`."""
  number = -(-length // target)
  return number, -(-length // number)


def block_sides(
    heads: int, rows: int, columns: int
) -> tuple[int, int]:
  """(rows, columns) of a block for `heads` heads times batch rows."""
  if heads * rows * columns <= ONE_BLOCK_SCORES:
    return rows, columns
  room = max(BLOCK_SCORES // heads, LEAST_SIDE**2)
  wide = min(columns, MOST_COLUMNS, max(room // LEAST_SIDE, LEAST_SIDE))
  high = min(rows, MOST_ROWS, max(room // wide, LEAST_SIDE))
  return high, wide


@dataclasses.dataclass(frozen=True)
class _Blocks:
  """How one attention is cut: `number` blocks of `size` rows, and columns."""

  spec: spec_lib.Spec
  batch: int
  heads: int
  groups: int
  n: int
  m: int
  row_blocks: int
  rows: int
  column_blocks: int
  columns: int

  @classmethod
  def of(cls, spec, x):
    b, h, n, _ = x[0].shape
    kv_heads, m = x[1].shape[1:3]
    rows, columns = block_sides(b * h, n, m)
    row_blocks, rows = _pieces(n, min(n, spec.rows or rows))
    column_blocks, columns = _pieces(m, min(m, spec.columns or columns))
    return cls(
        spec, b, h, h // kv_heads, n, m, row_blocks, rows, column_blocks,
        columns,
    )  # fmt: skip

  @property
  def padded_n(self):
    return self.row_blocks * self.rows

  @property
  def padded_m(self):
    return self.column_blocks * self.columns

  def row_block(self, a, i):
    """Rows i of [B, H, N, *] as [B, K, G rows, *]."""
    if self.row_blocks > 1:
      a = lax.dynamic_slice_in_dim(a, i * self.rows, self.rows, axis=2)
    tail = a.shape[3:]
    return a.reshape(
        self.batch, self.heads // self.groups, self.groups * self.rows, *tail
    )

  def write_rows(self, out, a, i):
    """Puts [B, K, G rows, *] back into [B, H, N, *]."""
    a = a.reshape(self.batch, self.heads, self.rows, *a.shape[3:])
    if self.row_blocks == 1:
      return a.astype(out.dtype)
    return lax.dynamic_update_slice_in_dim(
        out, a.astype(out.dtype), i * self.rows, axis=2
    )

  def column_block(self, a, j, axis=2):
    """Columns j of [B, K, M, *]."""
    if self.column_blocks == 1:
      return a
    return lax.dynamic_slice_in_dim(
        a, j * self.columns, self.columns, axis=axis
    )

  def add_columns(self, out, a, j):
    """Adds [B, K, columns, *] to the columns j of [B, K, M, *]."""
    if self.column_blocks == 1:
      return out + a
    start = j * self.columns
    old = lax.dynamic_slice_in_dim(out, start, self.columns, axis=2)
    return lax.dynamic_update_slice_in_dim(out, old + a, start, axis=2)

  def pad_rows(self, a, axis=2, value=0):
    return common.pad(a, axis, self.padded_n, value)

  def pad_columns(self, a, axis=2):
    return common.pad(a, axis, self.padded_m)

  def bias_block(self, bias, i, j):
    """A block of a bias [B|1, H|1, N|1, M|1], as [B|1, K|1, G rows, cols|1]."""
    if bias.shape[2] > 1 and self.row_blocks > 1:
      bias = lax.dynamic_slice_in_dim(bias, i * self.rows, self.rows, axis=2)
    if bias.shape[3] > 1:
      bias = self.column_block(bias, j, axis=3)
    b, h, r, c = bias.shape
    shape = (b, h // self.groups, self.groups) if h > 1 else (b, 1, 1)
    bias = jnp.broadcast_to(
        bias.reshape(*shape, r, c), (b, shape[1], self.groups, self.rows, c)
    )
    return bias.reshape(b, shape[1], self.groups * self.rows, c)

  def add_bias_block(self, out, a, i, j):
    """Adds [B, K, G rows, cols] to the gradient of the bias, summed as it."""
    full = a.reshape(self.batch, self.heads, self.rows, self.columns)
    axes = tuple(k for k in range(4) if out.shape[k] == 1 and full.shape[k] > 1)
    full = jnp.sum(full, axis=axes, keepdims=True) if axes else full
    start = (
        0, 0, i * self.rows if out.shape[2] > 1 else 0,
        j * self.columns if out.shape[3] > 1 else 0,
    )  # fmt: skip
    old = lax.dynamic_slice(out, start, full.shape)
    return lax.dynamic_update_slice(out, old + full, start)

  def positions(self, i):
    """Positions of the rows of block i, [G rows]."""
    step = lax.broadcasted_iota(jnp.int32, (self.groups, self.rows), 1)
    return step.reshape(-1) + i * self.rows

  def last_column_block(self, i):
    """One more than the last block of columns that rows i see."""
    if not self.spec.causal or self.column_blocks == 1:
      return self.column_blocks
    # Of the last row that is there: (i + 1) rows - 1 + M - N.
    seen = (i + 1) * self.rows + (self.m - self.n)
    seen = -(-seen // self.columns)
    if isinstance(seen, int):
      return min(max(seen, 0), self.column_blocks)
    return jnp.clip(seen, 0, self.column_blocks)


def _dot(a, b, contract_a, contract_b, dtype):
  """Batched product of [B, K, ...] over the given axes, summed in `dtype`."""
  return lax.dot_general(
      a,
      b,
      (((contract_a,), (contract_b,)), ((0, 1), (0, 1))),
      preferred_element_type=dtype,
  )


class _Problem:
  """One attention, padded to blocks, and its blocks of scores."""

  def __init__(self, spec, x):
    self.spec = spec
    self.blocks = blocks = _Blocks.of(spec, x)
    self.dtype = spec_lib.accumulator(x[0].dtype)
    self.low = x[0].dtype
    self.q = blocks.pad_rows(x[0])
    self.k = blocks.pad_columns(x[1])
    self.v = blocks.pad_columns(x[2])
    self.bias = None
    if spec.bias:
      self.bias = self.pad_bias(spec.bias_of(x))
    self.q_ids = self.kv_ids = None
    if spec.segments:
      q_ids, kv_ids = spec.segments_of(x)
      self.q_ids = blocks.pad_rows(q_ids, axis=1)
      self.kv_ids = blocks.pad_columns(kv_ids, axis=1)
    self.x = x

  def pad_bias(self, bias):
    if bias.shape[2] > 1:
      bias = self.blocks.pad_rows(bias)
    if bias.shape[3] > 1:
      bias = self.blocks.pad_columns(bias, axis=3)
    return bias

  def qk(self, q, k):
    """[B, K, r, D] and [B, K, c, D] to [B, K, r, c], without scale."""
    return _dot(q, k, 3, 3, self.dtype)

  def pv(self, p, v):
    """[B, K, r, c] and [B, K, c, E] to [B, K, r, E]."""
    return _dot(p.astype(v.dtype), v, 3, 2, self.dtype)

  def ptq(self, p, q):
    """[B, K, r, c] and [B, K, r, E] to [B, K, c, E]."""
    return _dot(p.astype(q.dtype), q, 2, 2, self.dtype)

  def score(self, q, k, i, j):
    """Scores of a block; masked ones are -inf."""
    blocks, spec = self.blocks, self.spec
    s = self.qk(q, k) * jnp.asarray(spec.scale, self.dtype)
    if self.bias is not None:
      bias = blocks.bias_block(self.bias, i, j)
      s = s + jnp.broadcast_to(bias.astype(self.dtype), s.shape)
    ok = self.allowed(i, j)
    if ok is not None:
      s = jnp.where(jnp.broadcast_to(ok, s.shape), s, -jnp.inf)
    return s

  def allowed(self, i, j):
    blocks, spec = self.blocks, self.spec
    columns = lax.iota(jnp.int32, blocks.columns) + j * blocks.columns
    q_ids = kv_ids = None
    if spec.segments:
      q_ids = self.q_ids
      if blocks.row_blocks > 1:
        q_ids = lax.dynamic_slice_in_dim(
            q_ids, i * blocks.rows, blocks.rows, axis=1
        )
      q_ids = jnp.tile(q_ids, (1, blocks.groups))
      kv_ids = blocks.column_block(self.kv_ids, j, axis=1)
    ok = spec_lib.allowed(
        spec, self.x, blocks.positions(i), columns, q_ids, kv_ids
    )
    if blocks.padded_m != blocks.m:
      there = (columns < blocks.m)[None, None, None, :]
      ok = there if ok is None else ok & there
    return ok

  def tangent_score(self, q, tq, k, tk, tbias, i, j):
    """scale (tq k' + q tk') + tbias of a block, None for what is zero."""
    terms = []
    if tq is not None:
      terms.append(self.qk(tq, k))
    if tk is not None:
      terms.append(self.qk(q, tk))
    out = None
    if terms:
      out = functools.reduce(jnp.add, terms)
      out = out * jnp.asarray(self.spec.scale, self.dtype)
    if tbias is not None:
      block = self.blocks.bias_block(tbias, i, j).astype(self.dtype)
      shape = (*self.shape_of_scores(),)
      block = jnp.broadcast_to(block, shape)
      out = block if out is None else out + block
    return out

  def shape_of_scores(self):
    blocks = self.blocks
    return (
        blocks.batch, blocks.heads // blocks.groups,
        blocks.groups * blocks.rows, blocks.columns,
    )  # fmt: skip

  def statistic(self, a, value=0):
    """[B, H, N] padded, with a last axis of one."""
    return self.blocks.pad_rows(a.astype(self.dtype)[..., None], value=value)

  def lse(self, a):
    """lse, padded: a row that is not there has P = 0, whatever its bias."""
    return self.statistic(a, jnp.inf)

  def tangents(self, wrt, t):
    """{letter: padded tangent or None} from the tuple of those in `wrt`."""
    given = dict(zip(wrt, t, strict=True))
    out = dict.fromkeys("qkvb")
    for letter, a in given.items():
      if letter == "q":
        out[letter] = self.blocks.pad_rows(a)
      elif letter == "b":
        out[letter] = self.pad_bias(a)
      else:
        out[letter] = self.blocks.pad_columns(a)
    return out

  def zeros(self, *tail):
    """Zeros for a block of rows, [B, K, G rows, *tail]."""
    blocks = self.blocks
    return jnp.zeros(
        (
            blocks.batch, blocks.heads // blocks.groups,
            blocks.groups * blocks.rows, *tail,
        ),
        self.dtype,
    )  # fmt: skip

  def rows_out(self, outs):
    """Cuts the padding off row outputs."""
    return tuple(a[:, :, : self.blocks.n] for a in outs)

  def each_row_block(
      self,
      one: Callable[[Any, Any], tuple[tuple[jax.Array, ...], Any]],
      outs: tuple[tuple[int, Any], ...],
      carry: Any = (),
  ):
    """Runs `one(i, carry) -> (row outputs, carry)` over the blocks of rows.

    Args:
      one: gives [B, K, G rows, w] for each of `outs`, and the carry.
      outs: (w, dtype) of the row outputs.
      carry: sums over the blocks of rows.

    Returns:
      (outputs [B, H, N, w], carry).
    """
    blocks = self.blocks
    empty = tuple(
        jnp.zeros((blocks.batch, blocks.heads, blocks.padded_n, w), dtype)
        for w, dtype in outs
    )

    def body(i, state):
      done, carry = state
      new, carry = one(i, carry)
      done = tuple(blocks.write_rows(o, a, i) for o, a in zip(done, new))
      return done, carry

    if blocks.row_blocks == 1:
      done, carry = body(0, (empty, carry))
    else:
      done, carry = lax.fori_loop(0, blocks.row_blocks, body, (empty, carry))
    return self.rows_out(done), carry

  def each_column_block(self, i, step, carry):
    """Runs `step(j, carry)` over the blocks of columns that rows i see."""
    if self.blocks.column_blocks == 1:
      return step(0, carry)
    last = self.blocks.last_column_block(i)
    return lax.fori_loop(0, last, step, carry)


def _add(a, b):
  """Sum of two terms, either of which may be None for zero."""
  return b if a is None else a if b is None else a + b


def _online(problem, i, q, t, tq):
  """One pass with a running maximum: (o, lse) and, with t, (to, mu) too."""
  p_ = problem
  width = p_.v.shape[-1]
  with_t = t is not None
  one_block = p_.blocks.column_blocks == 1

  def step(j, carry):
    k = p_.blocks.column_block(p_.k, j)
    v = p_.blocks.column_block(p_.v, j)
    s = p_.score(q, k, i, j)
    top = jnp.max(s, axis=-1, keepdims=True)
    if not one_block:
      top = jnp.maximum(carry[0], top)
    shift = common.finite(top)
    p = jnp.exp(s - shift)
    new = [jnp.sum(p, axis=-1, keepdims=True), p_.pv(p, v)]
    if with_t:
      tv = None if t["v"] is None else p_.blocks.column_block(t["v"], j)
      tk = None if t["k"] is None else p_.blocks.column_block(t["k"], j)
      ts = p_.tangent_score(q, tq, k, tk, t["b"], i, j)
      change = None if tv is None else p_.pv(p, tv)
      mu = jnp.zeros_like(new[0])
      if ts is not None:
        h = p * ts
        mu = jnp.sum(h, axis=-1, keepdims=True)
        if one_block:
          # All columns at once: the sum is known, so nothing cancels.
          total = jnp.where(new[0] == 0, jnp.ones_like(new[0]), new[0])
          h = h - p * (mu / total)
        change = _add(change, p_.pv(h, v))
      new += [mu, change]
    if one_block:
      return (top, *new)
    rescale = jnp.exp(carry[0] - shift)
    return (top, *(c * rescale + a for c, a in zip(carry[1:], new)))

  start = ()
  if not one_block:
    start = [p_.zeros(1) - jnp.inf, p_.zeros(1), p_.zeros(width)]
    start = tuple(start + ([p_.zeros(1), p_.zeros(width)] if with_t else []))
  top, total, o, *rest = p_.each_column_block(i, step, start)
  safe = jnp.where(total == 0, jnp.ones_like(total), total)
  o = o / safe
  lse = jnp.where(total == 0, -jnp.inf, common.finite(top) + jnp.log(safe))
  if not with_t:
    return o, lse
  mu = rest[0] / safe
  change = rest[1] / safe
  if not one_block:
    change = change - mu * o
  return o, lse, change, mu


def forward(spec: spec_lib.Spec, *x: jax.Array):
  """(o [B, H, N, E], lse [B, H, N])."""
  p_ = _Problem(spec, x)

  def one(i, carry):
    return _online(p_, i, p_.blocks.row_block(p_.q, i), None, None), carry

  outs = ((p_.v.shape[-1], p_.low), (1, p_.dtype))
  (o, lse), _ = p_.each_row_block(one, outs)
  return o, lse[..., 0]


def fused(spec: spec_lib.Spec, wrt: str, *operands: jax.Array):
  """(o, lse, to, mu) in one pass: six products, one exponential a score."""
  x, t = operands[: spec.size], operands[spec.size :]
  p_ = _Problem(spec, x)
  t = p_.tangents(wrt, t)

  def one(i, carry):
    q = p_.blocks.row_block(p_.q, i)
    tq = None if t["q"] is None else p_.blocks.row_block(t["q"], i)
    return _online(p_, i, q, t, tq), carry

  width = p_.v.shape[-1]
  outs = ((width, p_.low), (1, p_.dtype), (width, p_.low), (1, p_.dtype))
  (o, lse, to, mu), _ = p_.each_row_block(one, outs)
  return o, lse[..., 0], to, mu[..., 0]


def _tangent(p_, lse, o, t, out_dtype):
  """(to, mu) with the statistics of the forward known, [B, H, N, *]."""
  one_block = p_.blocks.column_blocks == 1
  width = p_.v.shape[-1]

  def one(i, carry):
    q = p_.blocks.row_block(p_.q, i)
    tq = None if t["q"] is None else p_.blocks.row_block(t["q"], i)
    shift = common.finite(p_.blocks.row_block(lse, i))

    def step(j, sums):
      k = p_.blocks.column_block(p_.k, j)
      p = jnp.exp(p_.score(q, k, i, j) - shift)
      tv = None if t["v"] is None else p_.blocks.column_block(t["v"], j)
      tk = None if t["k"] is None else p_.blocks.column_block(t["k"], j)
      ts = p_.tangent_score(q, tq, k, tk, t["b"], i, j)
      change = None if tv is None else p_.pv(p, tv)
      mu = sums[0]
      if ts is not None:
        h = p * ts
        mu = mu + jnp.sum(h, axis=-1, keepdims=True)
        h = h - p * mu if one_block else h
        v = p_.blocks.column_block(p_.v, j)
        change = _add(change, p_.pv(h, v))
      return mu, sums[1] + change

    mu, to = p_.each_column_block(i, step, (p_.zeros(1), p_.zeros(width)))
    if not one_block:
      to = to - mu * p_.blocks.row_block(o, i).astype(p_.dtype)
    return (to, mu), carry

  (to, mu), _ = p_.each_row_block(one, ((width, out_dtype), (1, p_.dtype)))
  return to, mu


def tangent(spec: spec_lib.Spec, wrt: str, *operands: jax.Array):
  """(to, mu): the tangents of o and lse."""
  x, (o, lse, *t) = operands[: spec.size], operands[spec.size :]
  p_ = _Problem(spec, x)
  to, mu = _tangent(
      p_, p_.lse(lse), p_.blocks.pad_rows(o), p_.tangents(wrt, t), p_.low
  )
  return to, mu[..., 0]


def _gradients(p_, wrt, one_block_of_rows, out_dtypes):
  """The sums over blocks that both backwards share.

  Args:
    p_: the problem.
    wrt: letters of the gradients.
    one_block_of_rows: i -> (step constants, function j -> {letter: its part}).
    out_dtypes: {letter: dtype}.

  Returns:
    The gradients in the order of `wrt`, dq [B, H, N, D].
  """
  blocks = p_.blocks
  sums = {}
  if "k" in wrt:
    sums["k"] = jnp.zeros(p_.k.shape, p_.dtype)
  if "v" in wrt:
    sums["v"] = jnp.zeros(p_.v.shape, p_.dtype)
  if "b" in wrt:
    sums["b"] = jnp.zeros(p_.bias.shape, p_.dtype)
  outs = ((p_.q.shape[-1], out_dtypes["q"]),) if "q" in wrt else ()

  def one(i, sums):
    part = one_block_of_rows(i)

    def step(j, carry):
      dq, sums = carry
      new = part(j)
      sums = dict(sums)
      for letter in sums:
        if letter == "b":
          sums["b"] = blocks.add_bias_block(sums["b"], new["b"], i, j)
        else:
          sums[letter] = blocks.add_columns(sums[letter], new[letter], j)
      return (dq + new["q"] if "q" in wrt else dq), sums

    start = p_.zeros(p_.q.shape[-1]) if "q" in wrt else ()
    dq, sums = p_.each_column_block(i, step, (start, sums))
    return ((dq,) if "q" in wrt else ()), sums

  rows, sums = p_.each_row_block(one, outs, sums)
  found = dict(sums)
  for letter in set(wrt) & {"k", "v"}:
    found[letter] = found[letter][:, :, : blocks.m].astype(out_dtypes[letter])
  if "b" in wrt:
    shape = p_.spec.bias_of(p_.x).shape
    found["b"] = found["b"][:, :, : shape[2], : shape[3]].astype(
        out_dtypes["b"]
    )
  if "q" in wrt:
    found["q"] = rows[0]
  return tuple(found[letter] for letter in wrt)


def _dtypes(spec, x):
  return {c: a.dtype for c, a in zip("qkvb", x[: 3 + spec.bias])}


def backward(spec: spec_lib.Spec, wrt: str, *operands: jax.Array):
  """Gradients of <do, o> + <dl, lse> in the arrays of `wrt`."""
  x, (o, lse, do, dl) = operands[: spec.size], operands[spec.size :]
  p_ = _Problem(spec, x)
  blocks = p_.blocks
  share = p_.statistic(common.shares(o, lse, do, dl, p_.dtype))
  lse = p_.lse(lse)
  do = blocks.pad_rows(do)
  scale = jnp.asarray(spec.scale, p_.dtype)

  def rows(i):
    q, do_i = blocks.row_block(p_.q, i), blocks.row_block(do, i)
    shift = common.finite(blocks.row_block(lse, i))
    share_i = blocks.row_block(share, i)

    def part(j):
      k = blocks.column_block(p_.k, j)
      v = blocks.column_block(p_.v, j)
      p = jnp.exp(p_.score(q, k, i, j) - shift)
      new = {}
      if "v" in wrt:
        new["v"] = p_.ptq(p, do_i)
      if set(wrt) & set("qkb"):
        ds = p * (p_.qk(do_i, v) - share_i)
        new["b"] = ds
        if "q" in wrt:
          new["q"] = scale * p_.pv(ds, k)
        if "k" in wrt:
          new["k"] = scale * p_.ptq(ds, q)
      return new

    return part

  return _gradients(p_, wrt, rows, _dtypes(spec, x))


def second_backward(
    spec: spec_lib.Spec, wrt: str, out: str, *operands: jax.Array
):
  """Gradients of <do, to> + <dl, mu> in the arrays of `out`, t being fixed."""
  x, rest = operands[: spec.size], operands[spec.size :]
  o, lse, *t = rest[: 2 + len(wrt)]
  do, dl = rest[2 + len(wrt) :]
  p_ = _Problem(spec, x)
  blocks = p_.blocks
  share = p_.statistic(common.shares(o, lse, do, dl, p_.dtype))
  empty = jnp.isneginf(lse)
  lse = p_.lse(lse)
  t = p_.tangents(wrt, t)
  to, mu = _tangent(p_, lse, blocks.pad_rows(o), t, p_.dtype)
  other = jnp.sum(do.astype(p_.dtype) * to, axis=-1)
  other = p_.statistic(jnp.where(empty, jnp.zeros_like(other), other))
  mu = blocks.pad_rows(mu)
  do = blocks.pad_rows(do)
  scale = jnp.asarray(spec.scale, p_.dtype)

  def rows(i):
    q, do_i = blocks.row_block(p_.q, i), blocks.row_block(do, i)
    tq = None if t["q"] is None else blocks.row_block(t["q"], i)
    shift = common.finite(blocks.row_block(lse, i))
    share_i = blocks.row_block(share, i)
    mu_i, other_i = blocks.row_block(mu, i), blocks.row_block(other, i)

    def part(j):
      k = blocks.column_block(p_.k, j)
      v = blocks.column_block(p_.v, j)
      tk = None if t["k"] is None else blocks.column_block(t["k"], j)
      tv = None if t["v"] is None else blocks.column_block(t["v"], j)
      p = jnp.exp(p_.score(q, k, i, j) - shift)
      ts = p_.tangent_score(q, tq, k, tk, t["b"], i, j)
      centered = (jnp.zeros_like(p) if ts is None else ts) - mu_i
      new = {}
      if "v" in out:
        new["v"] = p_.ptq(p * centered, do_i)
      if set(out) & set("qkb"):
        a = p_.qk(do_i, v) - share_i
        inner = centered * a - other_i
        if tv is not None:
          inner = inner + p_.qk(do_i, tv)
        gs, gt = p * inner, p * a
        new["b"] = gs
        if "q" in out:
          new["q"] = p_.pv(gs, k)
          if tk is not None:
            new["q"] = new["q"] + p_.pv(gt, tk)
          new["q"] = scale * new["q"]
        if "k" in out:
          new["k"] = p_.ptq(gs, q)
          if tq is not None:
            new["k"] = new["k"] + p_.ptq(gt, tq)
          new["k"] = scale * new["k"]
      return new

    return part

  return _gradients(p_, out, rows, _dtypes(spec, x))


def second_tangent(
    spec: spec_lib.Spec, wrt: str, along: str, *operands: jax.Array
):
  """The derivative of (to, mu) along d, t being fixed: symmetric in t, d."""
  x, rest = operands[: spec.size], operands[spec.size :]
  o, lse = rest[:2]
  p_ = _Problem(spec, x)
  blocks = p_.blocks
  lse = p_.lse(lse)
  o = blocks.pad_rows(o)
  t = p_.tangents(wrt, rest[2 : 2 + len(wrt)])
  d = p_.tangents(along, rest[2 + len(wrt) :])
  mu = blocks.pad_rows(_tangent(p_, lse, o, t, p_.dtype)[1])
  nu = blocks.pad_rows(_tangent(p_, lse, o, d, p_.dtype)[1])
  width = p_.v.shape[-1]
  scale = jnp.asarray(spec.scale, p_.dtype)

  def one(i, carry):
    row = lambda a: None if a is None else blocks.row_block(a, i)
    q, tq, dq = row(p_.q), row(t["q"]), row(d["q"])
    shift, mu_i, nu_i = common.finite(row(lse)), row(mu), row(nu)

    def step(j, sums):
      column = lambda a: None if a is None else blocks.column_block(a, j)
      k, v = column(p_.k), column(p_.v)
      tk, tv = column(t["k"]), column(t["v"])
      dk, dv = column(d["k"]), column(d["v"])
      p = jnp.exp(p_.score(q, k, i, j) - shift)
      st = p_.tangent_score(q, tq, k, tk, t["b"], i, j)
      sd = p_.tangent_score(q, dq, k, dk, d["b"], i, j)
      st = (jnp.zeros_like(p) if st is None else st) - mu_i
      sd = (jnp.zeros_like(p) if sd is None else sd) - nu_i
      z = st * sd
      both = None
      if tq is not None and dk is not None:
        both = p_.qk(tq, dk)
      if dq is not None and tk is not None:
        both = _add(both, p_.qk(dq, tk))
      if both is not None:
        z = z + scale * both
      z = p * z
      change = p_.pv(z, v)
      if tv is not None:
        change = change + p_.pv(p * sd, tv)
      if dv is not None:
        change = change + p_.pv(p * st, dv)
      return sums[0] + jnp.sum(z, axis=-1, keepdims=True), sums[1] + change

    dmu, dto = p_.each_column_block(i, step, (p_.zeros(1), p_.zeros(width)))
    return (dto - dmu * row(o).astype(p_.dtype), dmu), carry

  (dto, dmu), _ = p_.each_row_block(one, ((width, p_.low), (1, p_.dtype)))
  return dto, dmu[..., 0]
