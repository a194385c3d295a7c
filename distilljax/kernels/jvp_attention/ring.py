"""The primitives of attention where the sequence is cut over a mesh axis.

Every device holds the rows and columns of its part; columns travel around the
ring of devices while each hop adds what its rows see of them, by the functions
of the implementation that `spec` names. Nothing grows with the whole sequence:
x, o and lse of a primitive are this device's, o and lse are of all columns, and
a backward sends the columns around again, with their gradients behind them.

Of a hop j, with the weight a = exp(lse_j - lse) of its columns:

  o = sum a o_j, mu = sum a mu_j, to = sum a (to_j + (mu_j - mu) o_j);
  gradients of <do, o> + <dl, lse>: the sum of the hops' own backwards at the
    global o and lse, which is all that a backward reads of a row;
  of <do, to> + <dl, mu>, with e = mu_j - mu and g = dl + do . (o_j - o): the
    sum of gradients of the hops' results by the cotangents a do of to_j, a g of
    mu_j, a e do of o_j and a (do . (to_j - to) + e g) of lse_j;
  derivative of (to, mu) along d, with f = nu_j - nu:
    dmu = sum a (f e + dmu_j),
    dto = sum a (f (to_j + e o_j) + dto_j + dmu_j o_j + e od_j) - dmu o.

A hop of which a row sees nothing has lse_j = -inf, so that a = 0.

Causal attention in zig-zag order (see `zigzag_positions`) halves the work of
every hop but the first and leaves it alike on all devices: columns from an
earlier device are seen in their first half by all rows, those from a later one
in both halves by the second half of the rows. In contiguous order a device
waits where the columns are later than its rows.

References:
  Liu, Zaharia, Abbeel, Ring Attention with Blockwise Transformers for
  Near-Infinite Context, 2023, arXiv:2310.01889.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from distilljax.kernels.jvp_attention import primitives
from distilljax.kernels.jvp_attention import spec as spec_lib

# --- around the ring -----------------------------------------------------


def _send(spec, tree):
  """Every device's arrays to the next one."""
  to_next = [(i, (i + 1) % spec.parts) for i in range(spec.parts)]
  return jax.tree.map(lambda a: lax.ppermute(a, spec.axis, to_next), tree)


def _sequence_axis(a):
  """That of [B, N] or [B, H, N, *]."""
  return 1 if a.ndim == 2 else 2


def _half(tree, second):
  """The first or second half of the rows or columns."""

  def one(a):
    axis = _sequence_axis(a)
    half = a.shape[axis] // 2
    return lax.slice_in_dim(a, second * half, (1 + second) * half, axis=axis)

  return jax.tree.map(one, tree)


def _whole(tree, fills, second):
  """The inverse of `_half`, the other half being filled."""

  def one(a, fill):
    other = jnp.full_like(a, fill)
    pair = (other, a) if second else (a, other)
    return jnp.concatenate(pair, axis=_sequence_axis(a))

  return jax.tree.map(one, tree, fills)


def _seen(spec, step, rows, columns, hop, fills):
  """What the rows see of the columns that are here at a step.

  Args:
    spec: the attention.
    step: number of the hop; the columns are those of the device so far behind.
    rows: dict of arrays of this device's rows.
    columns: dict of arrays of the columns.
    hop: (local spec, rows, columns) -> (row results, column results).
    fills: the row results of a row that sees nothing.

  Returns:
    What `hop` returns; gradients of columns that nobody sees are 0.
  """
  full = dataclasses.replace(
      spec, axis=None, parts=1, zigzag=False, causal=False
  )
  if not spec.causal:
    return hop(full, rows, columns)
  own = dataclasses.replace(full, causal=True)
  zeros = lambda tree: jax.tree.map(lambda _: 0.0, tree)

  def earlier():
    if not spec.zigzag:
      return hop(full, rows, columns)
    found, sums = hop(full, rows, _half(columns, 0))
    return found, _whole(sums, zeros(sums), 0)

  def later():
    if spec.zigzag:
      found, sums = hop(full, _half(rows, 1), columns)
      return _whole(found, fills, 1), sums
    found, sums = jax.eval_shape(lambda: hop(full, rows, columns))
    filled = lambda a, fill: jnp.full(a.shape, fill, a.dtype)
    return (
        jax.tree.map(filled, found, fills),
        jax.tree.map(filled, sums, zeros(sums)),
    )

  # That of a device before this one came here without passing the last.
  before = lax.axis_index(spec.axis) >= step
  case = jnp.where(step == 0, 0, jnp.where(before, 1, 2))
  return lax.switch(
      case, [lambda: hop(own, rows, columns), earlier, later]
  )


def _around(spec, rows, columns, hop, fills, merge, state, sums=()):
  """Runs `hop` for the columns of every device.

  Args:
    spec: the attention.
    rows: dict of arrays of this device's rows, None where there is none.
    columns: likewise of its columns, which travel.
    hop: see `_seen`.
    fills: see `_seen`.
    merge: (state, row results) -> state.
    state: of the rows, before the first hop.
    sums: zeros like the column results; sums that travel with their columns.

  Returns:
    (state, sums of this device's columns).
  """
  rows = {k: a for k, a in rows.items() if a is not None}
  columns = {k: a for k, a in columns.items() if a is not None}

  def body(step, carry):
    columns, state, sums = carry
    # Nothing here waits for the hop's own results: both overlap with it.
    onward, arrived = _send(spec, columns), _send(spec, sums)
    found, new = _seen(spec, step, rows, columns, hop, fills)
    add = lambda total, a: total + a.astype(total.dtype)
    return onward, merge(state, found), jax.tree.map(add, arrived, new)

  with primitives.untyped():
    _, state, sums = lax.fori_loop(
        jnp.int32(0), jnp.int32(spec.parts), body, (columns, state, sums)
    )
    return state, _send(spec, sums)


def _split(spec, x, wrt="", t=(), along="", d=()):
  """(rows, columns): x and its tangents by name."""
  ids = spec.segments_of(x) or (None, None)
  rows = {"q": x[0], "q_ids": ids[0]}
  columns = {"k": x[1], "v": x[2], "kv_ids": ids[1]}
  for prefix, letters, arrays in (("t", wrt, t), ("d", along, d)):
    for letter, a in zip(letters, arrays, strict=True):
      (rows if letter == "q" else columns)[prefix + letter] = a
  return rows, columns


def _x(rows, columns):
  """What a hop's attention is a function of."""
  x = [rows["q"], columns["k"], columns["v"]]
  return (*x, rows["q_ids"], columns["kv_ids"]) if "q_ids" in rows else x


def _tangents(rows, columns, wrt, prefix="t"):
  return [(rows if c == "q" else columns)[prefix + c] for c in wrt]


def _slot(primitive, spec, **params):
  """The implementation's own function of a primitive."""
  # pylint: disable-next=protected-access
  return primitives._function(primitive, spec, params)


def _sums(x, dtype, *names):
  """Zeros to be summed into: of the rows, or like q, k or v."""
  like = {
      "o": (*x[0].shape[:3], x[2].shape[3]), "mu": x[0].shape[:3],
      "q": x[0].shape, "k": x[1].shape, "v": x[2].shape,
  }  # fmt: skip
  return {name: jnp.zeros(like[name], dtype) for name in names}


def _add(state, found):
  return jax.tree.map(lambda s, a: s + a.astype(s.dtype), state, found)


def _weight(part, whole):
  """exp(part - whole) of statistics, 0 where the part has nothing."""
  empty = jnp.isneginf(whole)
  return jnp.exp(part - jnp.where(empty, jnp.zeros_like(whole), whole))


# --- slots ---------------------------------------------------------------


def _merge(state, found):
  """Two sets of columns as one: (o, lse) and, where known, (to, mu)."""
  dtype = state[1].dtype
  first = [a.astype(dtype) for a in state]
  second = [a.astype(dtype) for a in found]
  top = jnp.maximum(first[1], second[1])
  total = _weight(first[1], top) + _weight(second[1], top)
  # 0 only where top is -inf, and so is lse.
  lse = top + jnp.log(jnp.where(total == 0, jnp.ones_like(total), total))
  pairs = [(_weight(s[1], lse), s) for s in (first, second)]
  o = sum(w[..., None] * s[0] for w, s in pairs)
  if len(first) == 2:
    return o, lse
  mu = sum(w * s[3] for w, s in pairs)
  to = sum(
      w[..., None] * (s[2] + (s[3] - mu)[..., None] * s[0]) for w, s in pairs
  )
  return o, lse, to, mu


def _by_rows(spec, x, wrt, t):
  """(o, lse) or, with tangents, (o, lse, to, mu): statistics' dtype."""

  def hop(spec, rows, columns):
    if not wrt:
      return _slot(primitives.att_p, spec)(*_x(rows, columns)), ()
    operands = *_x(rows, columns), *_tangents(rows, columns, wrt)
    return _slot(primitives.fused_p, spec, wrt=wrt)(*operands), ()

  zero = _sums(x, spec_lib.accumulator(x[0].dtype), "o", "mu")
  state, fills = (zero["o"], zero["mu"] - jnp.inf), (0.0, -jnp.inf)
  if wrt:
    state, fills = (*state, zero["o"], zero["mu"]), (*fills, 0.0, 0.0)
  rows, columns = _split(spec, x, wrt, t)
  return _around(spec, rows, columns, hop, fills, _merge, state)[0]


def _low(x, found):
  """o and to in the dtype of v."""
  return tuple(
      a.astype(x[2].dtype) if i % 2 == 0 else a for i, a in enumerate(found)
  )


def forward(spec: spec_lib.Spec, *x: jax.Array):
  """(o, lse) of this device's rows over the columns of all."""
  return _low(x, _by_rows(spec, x, "", ()))


def fused(spec: spec_lib.Spec, wrt: str, *operands: jax.Array):
  """(o, lse, to, mu)."""
  x, t = operands[: spec.size], operands[spec.size :]
  return _low(x, _by_rows(spec, x, wrt, t))


def tangent(spec: spec_lib.Spec, wrt: str, *operands: jax.Array):
  """(to, mu). The hops' own statistics are made again: they were not kept."""
  x, t = operands[: spec.size], operands[spec.size + 2 :]
  return fused(spec, wrt, *x, *t)[2:]


def _gradients(spec, x, wrt, rows, columns, hop):
  """Sums over the hops of gradients in the letters of `wrt`, in their dtypes.

  `hop` gives them in the order of `wrt`.
  """

  def split(*operands):
    found = dict(zip(wrt, hop(*operands)))
    return {c: found.pop(c) for c in "q" if c in wrt}, found

  zero = _sums(x, spec_lib.accumulator(x[0].dtype), *wrt)
  state = {c: zero.pop(c) for c in "q" if c in wrt}
  fills = dict.fromkeys(state, 0.0)
  state, sums = _around(spec, rows, columns, split, fills, _add, state, zero)
  found = state | sums
  return tuple(found[c].astype(x["qkv".index(c)].dtype) for c in wrt)


def backward(spec: spec_lib.Spec, wrt: str, *operands: jax.Array):
  """Gradients of <do, o> + <dl, lse>; those of columns come home to them."""
  x, rest = operands[: spec.size], operands[spec.size :]
  names = ("o", "lse", "do", "dl")
  rows, columns = _split(spec, x)
  rows |= dict(zip(names, rest, strict=True))

  def hop(spec, rows, columns):
    slot = _slot(primitives.bwd_p, spec, wrt=wrt)
    return slot(*_x(rows, columns), *(rows[n] for n in names))

  return _gradients(spec, x, wrt, rows, columns, hop)


def second_backward(
    spec: spec_lib.Spec, wrt: str, out: str, *operands: jax.Array
):
  """Gradients of <do, to> + <dl, mu> in the arrays of `out`, t being fixed."""
  x, rest = operands[: spec.size], operands[spec.size :]
  t, (do, dl) = rest[2:-2], rest[-2:]
  o, lse, to, mu = _by_rows(spec, x, wrt, t)
  rows, columns = _split(spec, x, wrt, t)
  rows |= {"o": o, "lse": lse, "to": to, "mu": mu, "do": do, "dl": dl}

  def hop(spec, rows, columns):
    x = _x(rows, columns)
    t = _tangents(rows, columns, wrt)
    o, lse, to, mu = _slot(primitives.fused_p, spec, wrt=wrt)(*x, *t)
    do, dl = rows["do"], rows["dl"]
    high = lambda a: a.astype(lse.dtype)
    dot = lambda a, b: jnp.sum(high(a) * high(b), axis=-1)
    a, e = _weight(lse, rows["lse"]), mu - rows["mu"]
    g = dl + dot(do, high(o) - rows["o"])
    d_lse = a * (dot(do, high(to) - rows["to"]) + e * g)
    low = lambda w: (w[..., None] * high(do)).astype(do.dtype)
    first = _slot(primitives.bwd_p, spec, wrt=out)(
        *x, o, lse, low(a * e), d_lse
    )
    second = _slot(primitives.jbwd_p, spec, wrt=wrt, out=out)(
        *x, o, lse, *t, low(a), a * g
    )
    return [f + s for f, s in zip(first, second)]

  return _gradients(spec, x, out, rows, columns, hop)


def second_tangent(
    spec: spec_lib.Spec, wrt: str, along: str, *operands: jax.Array
):
  """The derivative of (to, mu) along d, t being fixed."""
  x, rest = operands[: spec.size], operands[spec.size + 2 :]
  t, d = rest[: len(wrt)], rest[len(wrt) :]
  o, lse, _, mu = _by_rows(spec, x, wrt, t)
  nu = _by_rows(spec, x, along, d)[3]
  rows, columns = _split(spec, x, wrt, t, along, d)
  rows |= {"lse": lse, "mu": mu, "nu": nu}

  def hop(spec, rows, columns):
    x = _x(rows, columns)
    t = _tangents(rows, columns, wrt)
    d = _tangents(rows, columns, along, "d")
    o, lse, to, mu = _slot(primitives.fused_p, spec, wrt=wrt)(*x, *t)
    od, nu = _slot(primitives.tan_p, spec, wrt=along)(*x, o, lse, *d)
    dto, dmu = _slot(primitives.tan2_p, spec, wrt=wrt, along=along)(
        *x, o, lse, *t, *d
    )
    a, e, f = _weight(lse, rows["lse"]), mu - rows["mu"], nu - rows["nu"]
    o, to, od, dto = (b.astype(lse.dtype) for b in (o, to, od, dto))
    wide = lambda b: b[..., None]
    change = wide(f) * (to + wide(e) * o) + dto + wide(dmu) * o + wide(e) * od
    return {"o": wide(a) * change, "mu": a * (f * e + dmu)}, ()

  zero = _sums(x, lse.dtype, "o", "mu")
  fills = dict.fromkeys(zero, 0.0)
  found = _around(spec, rows, columns, hop, fills, _add, zero)[0]
  dto = found["o"] - found["mu"][..., None] * o
  return dto.astype(x[2].dtype), found["mu"]
