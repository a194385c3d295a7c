"""A TPU kernel of both passes over the vocabulary: logits never leave the chip.

One grid step multiplies a block of hidden states with a block of every model's
head and adds the product to logits in fast memory; the last step over the width
turns them into sums per row. What the sums are is `xla`'s, of a block of
columns instead of a chunk, and so is the rule that joins two of them. Slopes
(`xla.tangent`, `xla.backward`) stay with the compiler, which already makes the
gradient of a chunk where the second model's product ends.

The rows of a block stay in fast memory while all columns pass by, so heads are
read once a block of rows. docs/api/kernels.md says what the compiled schedule
is beside that of the chunks. Never run on a chip. Loaded only when asked for.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from distilljax.kernels.jvp_attention import common
from distilljax.kernels.linear_head import xla

LANES = 128
# A step is allowed to take the first; blocks are chosen for the second. v5p has
# 64 MiB, the others twice that.
VMEM_LIMIT = 60 * 2**20
SCOPED_BYTES = 44 * 2**20
# Ids a row whose logits are picked on the way.
MOST_IDS = 8


@dataclasses.dataclass(frozen=True)
class Tile:
  """How much one grid step takes.

  Attributes:
    rows: of a block.
    columns: of a block.
    depth: of the width that is summed over in a step.
    part: rows whose sums are taken at once.
  """

  rows: int = 1024
  columns: int = 1024
  depth: int = 512
  part: int = 64


TILE = Tile()


def runs_on(platform: str) -> bool:
  """Whether the kernel can be compiled for a platform, or is interpreted."""
  return platform == "tpu" or common.interpreted() is not None


def cannot(spec: xla.Spec, x: dict[str, Any]) -> str | None:
  """What the kernel would need to do the case; None if it can.

  Args:
    spec: of the statistics.
    x: their operands.
  """
  if any(f"{m}_logits" in x for m in spec.models):
    return "(hidden, head) of every model, no logits"
  if spec.rested:
    return "a tail other than 'bucket'"
  if "top_k" in spec.extras:
    return "no top_k"
  if "picks" in spec.outputs and x["ids"].shape[1] > MOST_IDS:
    return f"at most {MOST_IDS} ids a row"
  for m in spec.models:
    hidden, kernel = x[f"{m}_hidden"], x[f"{m}_kernel"]
    if hidden.dtype != kernel.dtype or hidden.dtype not in (
        jnp.bfloat16, jnp.float32
    ):  # fmt: skip
      return "hidden states and heads of one dtype, bfloat16 or float32"
    if hidden.shape[1] % LANES:
      return f"widths that {LANES} divides"
  return None


def vmem_bytes(tile: Tile, widths: list[int], itemsize: int) -> int:
  """Fast memory of one grid step, roughly.

  Args:
    tile: the sizes of a step.
    widths: of the models' hidden states.
    itemsize: bytes of an input number.

  Returns:
    Bytes.
  """
  heads = 2 * itemsize * tile.columns * tile.depth
  logits = 4 * tile.rows * tile.columns
  # Rows are wider in memory than what they hold: picks, scales, sums.
  rows = 6 * 4 * tile.rows * LANES
  parts = 16 * 4 * tile.part * tile.columns
  hidden = itemsize * tile.rows * sum(widths)
  return hidden + len(widths) * (heads + logits) + rows + parts


def tile(n: int, v: int, widths: list[int], itemsize: int) -> Tile:
  """The sizes of a step.

  Args:
    n: rows.
    v: columns of a head, padding included.
    widths: of the models' hidden states.
    itemsize: bytes of an input number.

  Returns:
    The sizes: as many rows as fit, since heads are read once for them.
  """
  found = TILE
  up = lambda a, to: -(-a // to) * to
  found = dataclasses.replace(
      found,
      rows=min(found.rows, up(n, found.part)),
      columns=min(found.columns, v),
      depth=math.gcd(found.depth, *widths),
  )
  while (
      vmem_bytes(found, widths, itemsize) > SCOPED_BYTES
      and found.rows > 2 * found.part
  ):
    rows = up(found.rows // 2, found.part)
    found = dataclasses.replace(found, rows=rows)
  return found


def _reduce(spec, x, rows, sums, merge, empty):
  """Sums over the columns.

  Args:
    spec: of the statistics.
    x: their operands.
    rows: {name: [n]} of what `sums` needs to know of a row.
    sums: function of ({model: logits [r, c]}, real [r, c] or None, picked,
      {name: [r, 1]}) to a tree of [r, 1].
    merge: function of two such trees and {name: [r, 1]}.
    empty: tree of the sums' values for no column.

  Returns:
    A tree of [n].
  """
  n = x["s_hidden"].shape[0]
  models = spec.models
  width = {m: x[f"{m}_hidden"].shape[1] for m in models}
  axis = {m: 0 if m in spec.tied else 1 for m in models}
  v = min(x[f"{m}_kernel"].shape[axis[m]] for m in models)
  itemsize = max(x[f"{m}_hidden"].dtype.itemsize for m in models)
  sizes = tile(n, v, list(width.values()), itemsize)
  steps = {m: width[m] // sizes.depth for m in models}
  last = max(steps.values()) - 1
  zero = np.int32(0)
  starts, tree = jax.tree.flatten(empty)

  names, arrays, in_specs = [], [], []

  def add(name, array, block, index, **options):
    names.append(name)
    arrays.append(array)
    in_specs.append(pl.BlockSpec(block, index, **options))

  by_row = lambda i, j, k: (i, zero)
  for m in models:
    # One buffer: it changes once a block of rows.
    add(
        f"{m}_hidden", x[f"{m}_hidden"], (sizes.rows, width[m]), by_row,
        pipeline_mode=pl.Buffered(1),
    )  # fmt: skip
    # The narrower model waits at its last block, which is not read again.
    end = np.int32(steps[m] - 1)
    across = lambda i, j, k, end=end: (jnp.minimum(k, end), j)
    along = lambda i, j, k, end=end: (j, jnp.minimum(k, end))
    block = (sizes.depth, sizes.columns)
    if not axis[m]:
      add(f"{m}_kernel", x[f"{m}_kernel"], block[::-1], along)
    else:
      add(f"{m}_kernel", x[f"{m}_kernel"], block, across)
    if f"{m}_bias" in x:
      bias = x[f"{m}_bias"].astype(jnp.float32)[None, :]
      block = (1, sizes.columns)
      add(f"{m}_bias", bias, block, lambda i, j, k: (zero, j))
  if rows:
    packed = jnp.stack([a.astype(jnp.float32) for a in rows.values()], axis=1)
    add("rows", packed, (sizes.rows, len(rows)), by_row)
  if "picks" in spec.outputs:
    add("ids", x["ids"], (sizes.rows, x["ids"].shape[1]), by_row)

  def body(*refs):
    given = dict(zip(names, refs))
    out, state, *logits = refs[len(names) :]
    logits = dict(zip(models, logits))
    j, k = pl.program_id(1), pl.program_id(2)

    def multiply(m):
      start = pl.multiple_of(k * np.int32(sizes.depth), LANES)
      hidden = given[f"{m}_hidden"][:, pl.ds(start, sizes.depth)]
      product = common.dot(hidden, given[f"{m}_kernel"][...], 1 - axis[m])
      old = logits[m][...]
      logits[m][...] = jnp.where(k == 0, jnp.zeros_like(old), old) + product

    for m in models:
      if steps[m] - 1 == last:
        multiply(m)
      else:
        pl.when(k < np.int32(steps[m]))(lambda m=m: multiply(m))

    def finish(part, carry):
      at = pl.ds(
          pl.multiple_of(part * np.int32(sizes.part), sizes.part), sizes.part
      )
      shape = (sizes.part, sizes.columns)
      column = lax.broadcasted_iota(jnp.int32, shape, 1)
      column = column + j * np.int32(sizes.columns)
      real = None
      if spec.columns % sizes.columns:
        real = column < np.int32(spec.columns)
      raw = {}
      for m in models:
        z = logits[m][at, :]
        if f"{m}_bias" in given:
          z = z + given[f"{m}_bias"][...]
        z, _ = xla.capped(spec, m, z)
        raw[m] = z if real is None else jnp.where(real, z, -jnp.inf)
      known = {
          name: given["rows"][at, i : i + 1] for i, name in enumerate(rows)
      }
      picked = []
      if "ids" in given:
        for i in range(given["ids"].shape[1]):
          hit = column == given["ids"][at, i : i + 1]
          picked.append(hit if real is None else hit & real)
      new = sums(raw, real, picked, known)
      before = state[at, :]
      old = [
          jnp.where(j == 0, np.float32(start), before[:, i : i + 1])
          for i, start in enumerate(starts)
      ]
      merged = merge(jax.tree.unflatten(tree, old), new, known)
      lane = lax.broadcasted_iota(jnp.int32, before.shape, 1)
      after = jnp.zeros_like(before)
      for i, a in enumerate(jax.tree.leaves(merged)):
        after = jnp.where(lane == i, a, after)
      state[at, :] = after
      return carry

    @pl.when(k == np.int32(last))
    def _():
      parts = np.int32(sizes.rows // sizes.part)
      lax.fori_loop(zero, parts, finish, zero)

      @pl.when(j == pl.num_programs(1) - 1)
      def _():
        out[...] = state[...]

  found = pl.pallas_call(
      body,
      grid=(
          pl.cdiv(n, sizes.rows), pl.cdiv(spec.columns, sizes.columns), last + 1
      ),
      in_specs=in_specs,
      out_specs=pl.BlockSpec((sizes.rows, LANES), by_row),
      out_shape=common.result((n, LANES), jnp.float32),
      scratch_shapes=[pltpu.VMEM((sizes.rows, LANES), jnp.float32)]
      + [pltpu.VMEM((sizes.rows, sizes.columns), jnp.float32) for _ in models],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary", "arbitrary"),
          vmem_limit_bytes=VMEM_LIMIT,
      ),
      interpret=common.interpreted() or False,
      name="linear_head_statistics",
  )(*arrays)  # fmt: skip
  return jax.tree.unflatten(tree, [found[:, i] for i in range(len(starts))])


def _scale(x):
  """What is given a row, by name."""
  return {k: x[k] for k in ("reward_scale",) if k in x}


def pass_one(spec: xla.Spec, x: dict[str, jax.Array]) -> dict[str, Any]:
  """Sums over the columns, as `xla.pass_one`.

  Args:
    spec: of the statistics.
    x: their operands.

  Returns:
    {statistic: {model: [n]}, ...}.
  """

  def pick(raw, picked):
    hits = lambda a: [
        jnp.sum(jnp.where(hit, a, jnp.zeros_like(a)), axis=1, keepdims=True)
        for hit in picked
    ]
    both = ("s", "t") if "teacher" in spec.extras else ("s",)
    return {m: hits(raw[m]) for m in both} if picked else {}

  def sums(raw, real, picked, known):
    y = xla.softmaxes(spec, raw)
    return {**xla.sums(spec, known, y), "picks": pick(raw, picked), "top": {}}

  like = jax.eval_shape(
      lambda raw, known, hit: sums(
          raw, None, [hit] * (x["ids"].shape[1] if "ids" in x else 0), known
      ),
      {m: jax.ShapeDtypeStruct((8, LANES), jnp.float32) for m in spec.models},
      {k: jax.ShapeDtypeStruct((8, 1), jnp.float32) for k in _scale(x)},
      jax.ShapeDtypeStruct((8, LANES), bool),
  )
  empty = jax.tree.map(lambda a: 0.0, like)
  empty["m"] = dict.fromkeys(like["m"], xla.LOWEST)
  out = _reduce(
      spec, x, _scale(x), sums,
      lambda one, two, known: xla.merge(spec, known, one, two), empty,
  )  # fmt: skip
  picks = {m: jnp.stack(a, axis=1) for m, a in out["picks"].items()}
  return {**out, "picks": picks}


def pass_two(
  spec: xla.Spec, x: dict[str, jax.Array], rows: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """(loss, e), sums over the columns, as `xla.pass_two`.

  Args:
    spec: of the statistics.
    x: their operands.
    rows: what the first pass found.

  Returns:
    [n] and [n].
  """
  keys = [f"{a}_{m}" for m in spec.compared for a in "mg"]

  def sums(raw, real, picked, known):
    ls = {
        m: raw[m] / spec.temperature - known[f"m_{m}"] - known[f"g_{m}"]
        for m in spec.compared
    }
    value, slope = xla.terms(spec, known, ls["s"], ls["t"], ls.get("r"))
    slope = jnp.zeros_like(value) if slope is None else slope
    return tuple(jnp.sum(a, axis=1, keepdims=True) for a in (value, slope))

  fewer = dataclasses.replace(
      spec, outputs=tuple(k for k in spec.outputs if k != "picks")
  )
  add = lambda one, two, known: jax.tree.map(jnp.add, one, two)
  known = {**_scale(x), **{k: rows[k] for k in keys}}
  return _reduce(fewer, x, known, sums, add, (0.0, 0.0))
