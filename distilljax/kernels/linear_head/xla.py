"""Token statistics of output heads, chunk by chunk of the vocabulary.

No array grows with n v. Per chunk of columns, x are a model's logits and
y = x / T; s, t, r are those of student, teacher and reference:

* `pass_one` gathers a maximum m, l = sum exp(y - m) and, where the kind allows
  it, D = sum exp(w - m_w) u over the chunks, w the logits whose softmax weighs
  and u = sum_b c_b (b - m_b) over the models, so that

    loss = D / l_w - sum_b c_b log l_b;

* `pass_two` adds up the loss and e = E_q r for the other kinds;
* `tangent` and `backward` use the slopes of every output in the student's
  logits, for a divergence q (r - e) / T with r = dF/dq.

The last chunk ends with the vocabulary: it overlaps the one before and leaves
out the columns that were seen, so heads are never padded. The columns of the
overlap get the same gradient twice, written and not added.

Every maximum is a constant to a derivative: the results do not depend on it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Below every logit, and finite: its differences and products stay finite.
LOWEST = -1e30
# Kinds whose value is known after one pass.
ONE_PASS = ("forward_kl", "reverse_kl", "gopd")


@dataclasses.dataclass(frozen=True)
class Spec:
  """What is static: hashable, a parameter of the primitives."""

  # Names of the operands. s, t and r are student, teacher and reference:
  # s_hidden, s_kernel, s_bias, t_logits, ...; ids [n, k]; reward_scale [n];
  # offset and limit, scalars of a sharded vocabulary.
  inputs: tuple[str, ...]
  # Differentiable outputs among loss, lse, entropy, picks, tempered, rest.
  outputs: tuple[str, ...]
  # Statistics without a derivative: teacher (lse, entropy, picks, the KLs to
  # it at temperature 1), top_k.
  extras: tuple[str, ...]
  kind: str | None
  mix: float
  temperature: float
  exact: bool
  columns: int
  chunk: int
  top_k: int
  # How many of `ids`, from the left, are left out of `rest`.
  excluded: int
  # (softcap, scale) of each model's head.
  caps: tuple[tuple[str, float | None, float | None], ...]
  # Models whose kernel is [v, d].
  tied: tuple[str, ...]
  axis: Any
  shards: int
  # Of the two passes: "xla" or "pallas_tpu".
  implementation: str

  @property
  def models(self) -> tuple[str, ...]:
    """Letters of the models that are there."""
    return tuple(
      m
      for m in "str"
      if f"{m}_kernel" in self.inputs or f"{m}_logits" in self.inputs
    )

  @property
  def compared(self) -> tuple[str, ...]:
    """Models whose softmax at the temperature is needed."""
    if self.kind is not None:
      return self.models
    return ("s",) if "tempered" in self.outputs else ()

  @property
  def single(self) -> bool:
    """The loss is known after the first pass."""
    return self.kind in ONE_PASS and not self.exact

  @property
  def rested(self) -> bool:
    """The mass outside `ids` is asked for."""
    return "rest" in self.outputs

  @property
  def plain(self) -> tuple[str, ...]:
    """Models whose softmax at temperature 1 is needed."""
    student = {"lse", "entropy"} & set(self.outputs)
    return (("s",) if student else ()) + (
      ("t",) if "teacher" in self.extras else ()
    )


def wide(*arrays: Any) -> Any:
  """float64 if any array is, else float32."""
  return (
    jnp.float64 if any(a.dtype == jnp.float64 for a in arrays) else jnp.float32
  )


def _accumulator(x):
  return wide(*(a for a in x.values() if jnp.issubdtype(a.dtype, jnp.floating)))


def _dot(a, b, contract, dtype):
  """Contracts axes (i of a, j of b) in the low dtype of both, or in `dtype`."""
  if a.dtype != b.dtype:
    a, b = a.astype(dtype), b.astype(dtype)
  return lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    precision="highest",
    preferred_element_type=dtype,
  )


def _varying(a):
  aval = jax.typeof(a)
  axis_type = getattr(aval, "mat", None)
  if axis_type is None:
    return getattr(aval, "vma", None) or frozenset()
  return axis_type.varying


def align(operands):
  """Makes all operands vary over the same manual axes of a shard_map."""
  varying = [_varying(a) for a in operands]
  union = frozenset().union(*varying)
  return [
    lax.pcast(a, tuple(sorted(union - v)), to="varying") if union - v else a
    for a, v in zip(operands, varying)
  ]


def _loop(spec, x, body, init):
  """Runs body(carry, first new column, first column) over the chunks."""
  leaves, tree = jax.tree.flatten(init)
  operands = list(x.values())
  leaves = align([*leaves, *operands])[: len(leaves)]
  last = spec.columns - spec.chunk

  def step(carry, i):
    new = i * spec.chunk
    return body(carry, new, jnp.minimum(new, last)), None

  chunks = -(-spec.columns // spec.chunk)
  steps = jnp.arange(chunks, dtype=jnp.int32)
  return lax.scan(step, jax.tree.unflatten(tree, leaves), steps)[0]


# --- one chunk -----------------------------------------------------------


def _slice(a, start, spec, axis):
  return lax.dynamic_slice_in_dim(a, start, spec.chunk, axis=axis)


def _times_kernel(spec, model, hidden, kernel, start, dtype):
  """hidden [n, d] times a chunk of the kernel's columns."""
  # A tied kernel is cut as it lies: its transpose would be a copy.
  axis = 0 if model in spec.tied else 1
  kernel = _slice(kernel, start, spec, axis)
  return _dot(hidden, kernel, (1, 1 - axis), dtype)


def _linear(x, model, start, spec, dtype):
  """hidden kernel + bias of one chunk, before scale and soft-cap."""
  hidden, kernel = x[f"{model}_hidden"], x[f"{model}_kernel"]
  z = _times_kernel(spec, model, hidden, kernel, start, dtype)
  if f"{model}_bias" in x:
    z = z + _slice(x[f"{model}_bias"], start, spec, 0).astype(dtype)[None, :]
  return z


def _logits(spec, x, model, start, dtype):
  """(logits [n, c], their slope in `_linear`: an array or a number)."""
  if f"{model}_logits" in x:
    return _slice(x[f"{model}_logits"], start, spec, 1).astype(dtype), 1.0
  return capped(spec, model, _linear(x, model, start, spec, dtype))


def capped(spec, model, z):
  """(logits, their slope in z: an array or a number)."""
  softcap, scale = {m: rest for m, *rest in spec.caps}[model]
  slope = 1.0
  if scale is not None:
    z, slope = z * scale, scale
  if softcap is not None:
    t = jnp.tanh(z / softcap)
    z, slope = softcap * t, slope * (1 - t * t)
  return z, slope


def _columns(spec, x, new, start):
  """(columns that no earlier chunk had, columns of the vocabulary)."""
  column = start + jnp.arange(spec.chunk, dtype=jnp.int32)
  real = jnp.ones(column.shape, bool)
  if "limit" in x:
    real = column < x["limit"]
  return ((column >= new) & real)[None, :], real[None, :]


def _places(spec, x, start):
  """(rows [n, 1], columns [n, k] of `ids` in the chunk, `chunk` if outside)."""
  ids = x["ids"]
  at = ids - start
  if "offset" in x:
    at = at - x["offset"]
  # A negative index would count from the end.
  inside = (at >= 0) & (at < spec.chunk)
  at = jnp.where(inside, at, spec.chunk)
  return jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None], at


def _pick(spec, x, values, new, start):
  """values [n, c] at `ids` [n, k], 0 where they are in another chunk."""
  rows, at = _places(spec, x, start)
  fresh = at + start >= new
  if "limit" in x:
    fresh &= at + start < x["limit"]
  found = values.at[rows, at].get(mode="fill", fill_value=0)
  return jnp.where(fresh & (at < spec.chunk), found, 0)


def _without(spec, x, values, start):
  """`values` [n, c] with those of the excluded ids at -inf."""
  rows, at = _places(spec, x, start)
  at = at[:, : spec.excluded]
  return values.at[rows, at].set(-jnp.inf, mode="drop")


def _weighted(log_weights, values):
  """exp(log_weights) values; 0 where the weight is 0, whatever the value."""
  alive = log_weights > -jnp.inf
  return jnp.where(alive, jnp.exp(log_weights), 0) * jnp.where(alive, values, 0)


def _log_ratio(log_p, log_q):
  alive = log_p > -jnp.inf
  return jnp.where(alive, log_p, 0) - jnp.where(alive, log_q, 0)


def _mixture(log_p, log_q, weight):
  """(m, log m) of m = weight p + (1 - weight) q; log m is 0 where m is 0."""
  if min(weight, 1 - weight) > 1e-6:
    # What underflows here weighs nothing: m > 0 wherever p or q counts.
    m = weight * jnp.exp(log_p) + (1 - weight) * jnp.exp(log_q)
    alive = m > 0
    return m, jnp.log(jnp.where(alive, m, 1))
  top = lax.stop_gradient(jnp.maximum(jnp.maximum(log_p, log_q), LOWEST))
  mixed = weight * jnp.exp(log_p - top) + (1 - weight) * jnp.exp(log_q - top)
  alive = mixed > 0
  log_m = jnp.log(jnp.where(alive, mixed, 1)) + top
  return mixed * jnp.exp(top), jnp.where(alive, log_m, 0)


# --- first pass ----------------------------------------------------------


def _coefficients(spec, x, dtype):
  """(model whose softmax weighs, {model: c [n] or number})."""
  if spec.kind == "forward_kl":
    return "t", {"s": -1.0, "t": 1.0}
  if spec.kind == "reverse_kl":
    return "s", {"s": 1.0, "t": -1.0}
  scale = x["reward_scale"].astype(dtype)
  out = {"s": 1.0, "t": -scale}
  if "r" in spec.models:
    out["r"] = scale - 1
  return "s", out


def _column(c):
  return c if isinstance(c, float) or c.ndim == 2 else c[:, None]


def _rebase(spec, x, stats, maxima):
  """Sums that were taken at stats["m"], at other maxima; with what is added."""
  m = stats["m"]
  shrink = {k: jnp.exp(m[k] - maxima[k]) for k in m}
  out = {"l": {k: stats["l"][k] * shrink[k] for k in m}}
  if "d" in stats:
    weight, c = _coefficients(spec, x, stats["d"].dtype)
    shift = sum(c[b] * (m[b] - maxima[b]) for b in c)
    out["d"] = (stats["d"] + stats["l"][weight] * shift) * shrink[weight]
  # sum exp(x - m) (x - m), for the entropies.
  out["a"] = {
    k: (a + stats["l"][k] * (m[k] - maxima[k])) * shrink[k]
    for k, a in stats["a"].items()
  }
  # sum exp(x - m) (x' - m') with the other model's x', for the KLs.
  other = _others(spec) if stats["x"] else {}
  out["x"] = {
    k: (a + stats["l"][k] * (m[other[k]] - maxima[other[k]])) * shrink[k]
    for k, a in stats["x"].items()
  }
  out["picks"] = stats["picks"]
  return out


def merge(spec, x, one, two):
  """Statistics of two sets of columns from those of each."""
  maxima = {k: jnp.maximum(one["m"][k], two["m"][k]) for k in one["m"]}
  out = jax.tree.map(
    jnp.add, _rebase(spec, x, one, maxima), _rebase(spec, x, two, maxima)
  )
  top = {}
  for k, mine in one["top"].items():
    # The earlier column first: it wins a tie, as in top_k of the whole row.
    pairs = zip(mine, two["top"][k])
    top[k] = _best(*(jnp.concatenate(p, axis=1) for p in pairs), k=spec.top_k)
  return {**out, "m": maxima, "top": top}


def _best(values, *others, k):
  """The k largest values, and what the other arrays have there."""
  values, at = lax.top_k(values, k)
  return values, *(jnp.take_along_axis(a, at, axis=1) for a in others)


def _key(spec, model):
  """Where the softmax at temperature 1 of a model stands."""
  same = spec.temperature == 1 and model in spec.compared
  return model if same else f"{model}1"


def _others(spec):
  """Student and teacher at temperature 1, each with the other."""
  s, t = (_key(spec, m) for m in "st")
  return {s: t, t: s}


def softmaxes(spec, raw):
  """What a softmax is taken of, by its key, from the models' logits."""
  y = {m: raw[m] / spec.temperature for m in spec.compared}
  return {**y, **{_key(spec, m): raw[m] for m in spec.plain}}


def sums(spec, x, y):
  """Statistics of the columns of y {key: [r, c]}; all are [r, 1]."""
  total = lambda a: jnp.sum(a, axis=1, keepdims=True)
  highest = lambda a: lax.stop_gradient(
    jnp.maximum(jnp.max(a, axis=1, keepdims=True), LOWEST)
  )
  top_m = {k: highest(a) for k, a in y.items()}
  centred = {k: a - top_m[k] for k, a in y.items()}
  stats = {
    "m": top_m,
    "l": {k: total(jnp.exp(a)) for k, a in centred.items()},
    "a": {},
    "x": {},
  }
  if spec.single:
    weight, c = _coefficients(spec, x, centred["s"].dtype)
    alive = centred[weight] > -jnp.inf
    u = sum(_column(c[b]) * jnp.where(alive, centred[b], 0) for b in c)
    stats["d"] = total(_weighted(centred[weight], u))
  for m in spec.plain:
    if "teacher" in spec.extras or "entropy" in spec.outputs:
      a = centred[_key(spec, m)]
      stats["a"][_key(spec, m)] = total(_weighted(a, a))
  if "teacher" in spec.extras:
    for k, other in _others(spec).items():
      stats["x"][k] = total(_weighted(centred[k], centred[other]))
  return stats


def _first_of_chunk(spec, x, new, start, dtype):
  """Statistics of one chunk."""
  fresh, _ = _columns(spec, x, new, start)
  raw = {
    m: jnp.where(fresh, _logits(spec, x, m, start, dtype)[0], -jnp.inf)
    for m in spec.models
  }
  y = softmaxes(spec, raw)
  if spec.rested:
    y["rest"] = _without(spec, x, y["s"], start)
  stats = jax.tree.map(lambda a: jnp.squeeze(a, 1), sums(spec, x, y))
  stats.update(picks={}, top={})
  if "picks" in spec.outputs:
    stats["picks"]["s"] = _pick(spec, x, raw["s"], new, start)
    if "teacher" in spec.extras:
      stats["picks"]["t"] = _pick(spec, x, raw["t"], new, start)
  if "top_k" in spec.extras:
    k = min(spec.top_k, spec.chunk)
    for m in spec.models:
      if m != "r":
        mine = lax.stop_gradient(raw[m])
        other = lax.stop_gradient(raw.get("t" if m == "s" else "s", mine))
        values, at = lax.top_k(mine, k)
        ids = at.astype(jnp.int32) + start
        other = jnp.take_along_axis(other, at, axis=1)
        stats["top"][m] = (values, ids, other)
  return stats


def _empty(spec, x, n, dtype):
  """Statistics of no column."""
  like = jax.eval_shape(
    lambda x: _first_of_chunk(spec, x, 0, 0, dtype), _abstract(x)
  )
  out = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
  out["m"] = {k: jnp.full((n,), LOWEST, dtype) for k in like["m"]}
  out["top"] = {
    k: (
      jnp.full((n, spec.top_k), -jnp.inf, dtype),
      jnp.zeros((n, spec.top_k), jnp.int32),
      jnp.zeros((n, spec.top_k), dtype),
    )
    for k in like["top"]
  }
  return out


def _kernel():
  """Pallas is loaded only where it is asked for."""
  from distilljax.kernels.linear_head import pallas_tpu

  return pallas_tpu


def _abstract(x):
  return {k: jax.ShapeDtypeStruct(a.shape, a.dtype) for k, a in x.items()}


def _rows_of(x):
  a = x["s_hidden"]
  return a.shape[0]


def pass_one(spec, x):
  """Sums over this device's columns."""
  if spec.implementation == "pallas_tpu":
    return _kernel().pass_one(spec, x)
  dtype = _accumulator(x)
  init = _empty(spec, x, _rows_of(x), dtype)

  def body(stats, new, start):
    return merge(
      spec, x, stats, _first_of_chunk(spec, x, new, start, dtype)
    )

  return _loop(spec, x, body, init)


def _over_shards(spec, x, stats):
  """The same sums over the whole vocabulary: three collectives."""
  if spec.axis is None:
    return stats
  # No derivative goes through a maximum, and pmax has none.
  maxima = lax.pmax(lax.stop_gradient(stats["m"]), spec.axis)
  out = lax.psum(_rebase(spec, x, stats, maxima), spec.axis)
  top = {}
  shard = lax.axis_index(spec.axis)
  mine = jnp.arange(spec.shards, dtype=shard.dtype) == shard
  for k, (values, ids, other) in stats["top"].items():
    local = (values, ids + x["offset"], other)
    # Each shard fills its own slot: the sum is the same on all of them.
    slots = [jnp.where(mine[:, None, None], a[None], 0) for a in local]
    everyone = lax.psum(slots, spec.axis)
    n = values.shape[0]
    flat = [jnp.moveaxis(a, 0, 1).reshape(n, -1) for a in everyone]
    top[k] = _best(*flat, k=spec.top_k)
  return {**out, "m": maxima, "top": top}


# --- second pass ---------------------------------------------------------


def _log_probs(rows, key, y):
  return y - rows[f"m_{key}"][:, None] - rows[f"g_{key}"][:, None]


def _compared(spec, x, rows, start, fresh, raw, dtype):
  """log q, log p, log r of one chunk at the temperature."""
  out = {}
  for m in spec.compared:
    y = raw if m == "s" else _logits(spec, x, m, start, dtype)[0]
    y = jnp.where(fresh, y / spec.temperature, -jnp.inf)
    out[m] = _log_probs(rows, m, y)
  return out


def _kl_terms(log_p, log_q, centred=False, q=None):
  """p (log p - log q), or with + q - p, which sums to 0 and keeps tiny KLs."""
  d = _log_ratio(log_p, log_q)
  terms = _weighted(log_p, d)
  if not centred:
    return terms
  p = jnp.exp(log_p)
  q = jnp.exp(log_q) if q is None else q
  near = (jnp.abs(d) < 0.5) & (p > 0)
  small = jnp.where(near, d, 0)
  return jnp.where(near, p * (small + jnp.expm1(-small)), terms + (q - p))


def terms(spec, x, lq, lp, lr):
  """(F, q r) of one chunk; q r is None where e is the loss or not needed."""
  kind, a = spec.kind, spec.mix
  if kind == "forward_kl":
    return _kl_terms(lp, lq, spec.exact), None
  if kind == "reverse_kl":
    return _kl_terms(lq, lp, spec.exact), None
  if kind == "gopd":
    return _weighted(lq, _gopd(x, lq, lp, lr)), None
  if kind == "generalized_jsd":
    m, lm = _mixture(lp, lq, a)
    right = (1 - a) * _kl_terms(lq, lm)
    if not spec.exact:
      return a * _kl_terms(lp, lm) + right, right
    first, second = (_kl_terms(x, lm, True, m) for x in (lp, lq))
    return a * first + (1 - a) * second, right
  if kind == "skew_forward_kl":
    m, lm = _mixture(lp, lq, a)
    p = jnp.exp(lp)
    slope = -(1 - a) * jnp.exp(lq) * (p / jnp.where(m > 0, m, 1))
    return _kl_terms(lp, lm, spec.exact, m), slope
  if kind == "skew_reverse_kl":
    m, lm = _mixture(lq, lp, a)
    q = jnp.exp(lq)
    terms = _kl_terms(lq, lm, spec.exact, m)
    slope = _kl_terms(lq, lm) - a * q * (q / jnp.where(m > 0, m, 1))
    return terms, slope
  gap = jnp.exp(lq) - jnp.exp(lp)
  return 0.5 * jnp.abs(gap), 0.5 * jnp.exp(lq) * jnp.sign(gap)


def _gopd(x, lq, lp, lr):
  """log q - scale log p - (1 - scale) log r, over q's support."""
  scale = _column(x["reward_scale"].astype(lq.dtype))
  out = _log_ratio(lq, lp)
  if lr is not None:
    alive = lq > -jnp.inf
    reward = jnp.where(alive, lp, 0) - jnp.where(alive, lr, 0)
    out = out - (scale - 1) * reward
  return out


def pass_two(spec, x, rows):
  """(loss, e), sums over this device's columns."""
  if spec.implementation == "pallas_tpu":
    return _kernel().pass_two(spec, x, rows)
  dtype = _accumulator(x)
  zero = jnp.zeros((_rows_of(x),), dtype)

  def body(sums, new, start):
    fresh, _ = _columns(spec, x, new, start)
    raw, _ = _logits(spec, x, "s", start, dtype)
    ls = _compared(spec, x, rows, start, fresh, raw, dtype)
    value, slope = terms(spec, x, ls["s"], ls["t"], ls.get("r"))
    slope = jnp.zeros_like(value) if slope is None else slope
    return sums[0] + jnp.sum(value, axis=1), sums[1] + jnp.sum(slope, axis=1)

  return _loop(spec, {**x, **rows}, body, (zero, zero))


# --- everything about a row ----------------------------------------------


def evaluate(spec, x):
  """(outputs, extras, rows): rows is what the slopes of the outputs need."""
  dtype = _accumulator(x)
  stats = _over_shards(spec, x, pass_one(spec, x))
  rows = {}
  for k, m in stats["m"].items():
    l = stats["l"][k]
    rows[f"m_{k}"] = m
    # No mass outside `ids`: log 0, without the infinite derivative.
    alive = l > 0
    rows[f"g_{k}"] = jnp.where(
      alive, jnp.log(jnp.where(alive, l, 1)), -jnp.inf
    )
  outputs, extras = {}, {}
  if spec.kind is not None:
    if spec.single:
      weight, c = _coefficients(spec, x, dtype)
      loss = stats["d"] / stats["l"][weight]
      for b in c:
        loss = loss - c[b] * rows[f"g_{b}"]
      slope = jnp.zeros_like(loss)
    else:
      loss, slope = pass_two(spec, x, rows)
      if spec.axis is not None:
        loss, slope = lax.psum((loss, slope), spec.axis)
    outputs["loss"] = loss
    rows["e"] = loss if spec.kind in ("reverse_kl", "gopd") else slope
  entropies = {
    k: rows[f"g_{k}"] - a / stats["l"][k] for k, a in stats["a"].items()
  }
  lse = lambda k: rows[f"m_{k}"] + rows[f"g_{k}"]
  if "lse" in spec.outputs:
    outputs["lse"] = lse(_key(spec, "s"))
  if "entropy" in spec.outputs:
    outputs["entropy"] = rows["entropy"] = entropies[_key(spec, "s")]
  if "picks" in spec.outputs:
    outputs["picks"] = stats["picks"]["s"]
  if "tempered" in spec.outputs:
    outputs["tempered"] = lse("s")
  if spec.rested:
    outputs["rest"] = lse("rest")
  if "teacher" in spec.extras:
    key = _key(spec, "t")
    extras["teacher_lse"] = lse(key)
    extras["teacher_entropy"] = entropies[key]
    for k, other in _others(spec).items():
      name = "forward_kl" if k == key else "reverse_kl"
      cross = rows[f"g_{other}"] - stats["x"][k] / stats["l"][k]
      extras[name] = cross - entropies[k]
    if "t" in stats["picks"]:
      extras["teacher_picks"] = stats["picks"]["t"]
  for m, found in stats["top"].items():
    names = (f"{m}_top", f"{m}_top_ids", f"{m}_top_other")
    extras.update(zip(names, found))
  return outputs, extras, rows


# --- slopes --------------------------------------------------------------


def _loss_slope(spec, x, rows, ls):
  """q (r - e) / T, [n, c]."""
  lq, lp, lr = ls["s"], ls["t"], ls.get("r")
  e = rows["e"][:, None]
  if spec.kind == "forward_kl":
    out = jnp.exp(lq) - jnp.exp(lp)
  elif spec.kind == "reverse_kl":
    out = _weighted(lq, _log_ratio(lq, lp) - e)
  elif spec.kind == "gopd":
    out = _weighted(lq, _gopd(x, lq, lp, lr) - e)
  else:
    out = terms(spec, x, lq, lp, lr)[1] - jnp.exp(lq) * e
  return out / spec.temperature


def _slopes(spec, x, rows, start, dtype):
  """({output: d output / d linear [n, c]}, slope of the logits alone)."""
  raw, factor = _logits(spec, x, "s", start, dtype)
  _, real = _columns(spec, x, start, start)
  out = {}
  ls = _compared(spec, x, rows, start, real, raw, dtype)
  if "loss" in spec.outputs:
    out["loss"] = _loss_slope(spec, x, rows, ls)
  if "tempered" in spec.outputs:
    out["tempered"] = jnp.exp(ls["s"]) / spec.temperature
  if spec.rested:
    y = _without(spec, x, raw / spec.temperature, start)
    y = jnp.where(real, y, -jnp.inf)
    # Nothing is there where the sum is empty.
    g = jnp.where(rows["g_rest"] > -jnp.inf, rows["g_rest"], 0)
    log_p = y - rows["m_rest"][:, None] - g[:, None]
    out["rest"] = jnp.exp(log_p) / spec.temperature
  if "s" in spec.plain:
    log_q = _log_probs(rows, _key(spec, "s"), jnp.where(real, raw, -jnp.inf))
    if "lse" in spec.outputs:
      out["lse"] = jnp.exp(log_q)
    if "entropy" in spec.outputs:
      h = rows["entropy"][:, None]
      out["entropy"] = -_weighted(log_q, log_q + h)
  return {k: a * factor for k, a in out.items()}, factor


def tangent(spec, wrt, x, rows, t):
  """{output: its tangent}, sums over this device's columns.

  wrt: names of the operands that have a tangent, among those of the student's
  head; t: those tangents.
  """
  dtype = _accumulator(x)
  n = _rows_of(x)
  init = {k: jnp.zeros((n,), dtype) for k in spec.outputs if k != "picks"}
  if "picks" in spec.outputs:
    init["picks"] = jnp.zeros(x["ids"].shape, dtype)

  def body(sums, new, start):
    fresh, _ = _columns(spec, x, new, start)
    slopes, factor = _slopes(spec, x, rows, start, dtype)
    d = jnp.zeros((n, spec.chunk), dtype)
    if "s_hidden" in wrt:
      d = d + _times_kernel(
        spec, "s", t["s_hidden"], x["s_kernel"], start, dtype
      )
    if "s_kernel" in wrt:
      d = d + _times_kernel(
        spec, "s", x["s_hidden"], t["s_kernel"], start, dtype
      )
    if "s_bias" in wrt:
      d = d + _slice(t["s_bias"], start, spec, 0).astype(dtype)[None, :]
    d = jnp.where(fresh, d, 0)
    out = {k: sums[k] + jnp.sum(a * d, axis=1) for k, a in slopes.items()}
    if "picks" in sums:
      out["picks"] = sums["picks"] + _pick(spec, x, d * factor, new, start)
    return out

  return _loop(spec, {**x, **rows, **_tagged(t)}, body, init)


def backward(spec, wrt, x, rows, cotangents):
  """{operand in wrt: gradient} of sum <cotangent, output>, in its dtype."""
  dtype = _accumulator(x)
  init = {
    k: jnp.zeros(x[k].shape, dtype if k == "s_hidden" else x[k].dtype)
    for k in wrt
  }

  def body(grads, new, start):
    fresh, _ = _columns(spec, x, new, start)
    slopes, factor = _slopes(spec, x, rows, start, dtype)
    d = jnp.zeros((_rows_of(x), spec.chunk), dtype)
    for k, a in slopes.items():
      d = d + cotangents[k][:, None] * a
    if "picks" in spec.outputs:
      at = _places(spec, x, start)
      picked = jnp.zeros_like(d).at[at].add(cotangents["picks"], mode="drop")
      if "limit" in x:
        picked = jnp.where(_columns(spec, x, new, start)[1], picked, 0)
      d = d + picked * factor
    out = dict(grads)
    axis = 0 if "s" in spec.tied else 1
    low = x["s_kernel"].dtype
    if "s_hidden" in wrt:
      kernel = _slice(x["s_kernel"], start, spec, axis)
      seen = jnp.where(fresh, d, 0).astype(low)
      part = _dot(seen, kernel, (1, axis), dtype)
      out["s_hidden"] = grads["s_hidden"] + part
    if "s_kernel" in wrt:
      hidden = x["s_hidden"]
      pair = (hidden, d.astype(hidden.dtype))
      part = _dot(*(pair if axis else pair[::-1]), (0, 0), dtype)
      out["s_kernel"] = lax.dynamic_update_slice_in_dim(
        grads["s_kernel"], part.astype(low), start, axis=axis
      )
    if "s_bias" in wrt:
      part = jnp.sum(d, axis=0).astype(x["s_bias"].dtype)
      out["s_bias"] = lax.dynamic_update_slice_in_dim(
        grads["s_bias"], part, start, axis=0
      )
    return out

  out = _loop(spec, {**x, **rows, **_tagged(cotangents)}, body, init)
  return {k: out[k].astype(x[k].dtype) for k in wrt}


def _tagged(arrays):
  return {f"_{k}": a for k, a in arrays.items()}
