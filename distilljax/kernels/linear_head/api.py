"""`linear_divergence` and `linear_token_statistics`: what users call."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from distilljax import _checks
from distilljax.kernels import platform
from distilljax.kernels.linear_head import primitives, xla
from distilljax.typing import Array, Float, Int

DENSE = (
  "forward_kl",
  "reverse_kl",
  "generalized_jsd",
  "skew_forward_kl",
  "skew_reverse_kl",
  "total_variation",
  "gopd",
)
SPARSE = ("sparse_forward_kl", "sparse_reverse_kl")
Kind = Literal[
  "forward_kl",
  "reverse_kl",
  "generalized_jsd",
  "skew_forward_kl",
  "skew_reverse_kl",
  "total_variation",
  "gopd",
  "sparse_forward_kl",
  "sparse_reverse_kl",
]
Tail = Literal["bucket", "renormalize", "drop"]
IMPLEMENTATIONS = ("xla", "pallas_tpu")
# By platform, columns of a chunk without a reference, with one, and with a
# cached teacher: a pass holds a float32 array [n, chunk] a model, which on a
# CPU should stay in the cache; of those, a GPU's compiler keeps more at once,
# and every compiler where ids are gathered and scattered.
CHUNKS = {
  "tpu": (4096, 2048, 1024),
  "gpu": (2048, 2048, 1024),
  "cuda": (2048, 2048, 1024),
  "cpu": (2048, 1024, 2048),
}


class Head(NamedTuple):
  """An output head: softcap tanh(scale (hidden kernel + bias) / softcap).

  A tied embedding [v, d] goes in as it lies, `Head(embedding, tied=True)`, and
  its gradient comes back so; `embedding.T` is right as well but XLA copies it.
  """

  kernel: Any  # [d, v], or [v, d] with tied=True
  bias: Any = None  # [v]
  softcap: float | int | None = None  # > 0, a Python number; None is no cap
  scale: float | int | None = None  # of the logits, a Python number, not 0
  tied: bool = False  # the kernel is an embedding [v, d]

  @property
  def width(self) -> int:
    """d, the hidden states' width."""
    return jnp.shape(self.kernel)[1 if self.tied else 0]

  @property
  def vocabulary(self) -> int:
    """v, padding included."""
    return jnp.shape(self.kernel)[0 if self.tied else 1]


class LinearTokenStatistics(NamedTuple):
  """Per-token numbers of one pass; None where they were not asked for.

  Entropies, log-probabilities, log-normalisers and the two KLs are at
  temperature 1.
  """

  loss: Any  # [n]
  student_entropy: Array  # [n]
  teacher_entropy: Any  # [n]
  student_log_probs: Any  # like `ids`
  teacher_log_probs: Any  # like `ids`
  student_log_normalizer: Array  # [n]
  teacher_log_normalizer: Any  # [n]
  student_top_ids: Any  # [n, top_k], largest first
  student_top_log_probs: Any  # [n, top_k]
  teacher_top_ids: Any  # [n, top_k]
  teacher_top_log_probs: Any  # [n, top_k]
  student_top_teacher_log_probs: Any  # [n, top_k]: the teacher's, student's ids
  topk_overlap: Any  # [n], share of the student's top_k among the teacher's
  forward_kl: Any  # [n], KL(teacher || student)
  reverse_kl: Any  # [n], KL(student || teacher)


# --- what was given ------------------------------------------------------


def _number(fn, name, value, low=None, high=None, **bounds):
  if not _checks.is_number(value):
    _checks.fail(
      fn, name, "a Python number (it decides a branch)", type(value).__name__
    )
  _checks.in_range(fn, name, value, low, high, **bounds)


def _head(fn: str, name: str, head: Any) -> Head:
  head = head if isinstance(head, Head) else Head(head)
  _checks.floating(fn, **{name: head.kernel, f"{name} bias": head.bias})
  dims = "[v, d]" if head.tied else "[d, v]"
  _checks.rank(fn, name, head.kernel, 2, dims)
  _checks.nonempty(fn, **{name: head.kernel})
  if head.bias is not None:
    _checks.shape(
      fn, f"{name} bias", head.bias, (head.vocabulary,), "[v]", name
    )
  if head.softcap is not None:
    _number(fn, f"{name} softcap", head.softcap, 0, math.inf, open_low=True)
  if head.scale is not None:
    _number(fn, f"{name} scale", head.scale)
    if head.scale == 0 or not math.isfinite(head.scale):
      _checks.fail(fn, f"{name} scale", "finite and not 0", head.scale)
  return head


def _model(fn, name, letter, model, n, inputs, caps, tied) -> int:
  """Puts (hidden, head) or logits among the inputs; returns its vocabulary."""
  if isinstance(model, (tuple, list)) and not isinstance(model, Head):
    if len(model) != 2:
      _checks.fail(fn, name, "(hidden, head)", f"{len(model)} entries")
    hidden, head = model
    words = (f"{name}_hidden", f"{name}_head")
    head = _head(fn, words[1], head)
    _checks.floating(fn, **{words[0]: hidden})
    _checks.rank(fn, words[0], hidden, 2, "[n, d]")
    if jnp.shape(hidden)[1] != head.width:
      _checks.fail(
        fn,
        words[1],
        f"{'[v, d]' if head.tied else '[d, v]'} with"
        f" d={jnp.shape(hidden)[1]} like {words[0]}",
        list(jnp.shape(head.kernel)),
      )
    inputs[f"{letter}_hidden"] = jnp.asarray(hidden)
    inputs[f"{letter}_kernel"] = jnp.asarray(head.kernel)
    if head.bias is not None:
      inputs[f"{letter}_bias"] = jnp.asarray(head.bias)
    number = lambda a: None if a is None else float(a)
    caps.append((letter, number(head.softcap), number(head.scale)))
    if head.tied:
      tied.append(letter)
    given, v = words[0], head.vocabulary
  else:
    given = f"{name}_logits"
    if isinstance(model, Head) or model is None:
      _checks.fail(
        fn, name, "(hidden, head) or logits [n, v]", type(model).__name__
      )
    _checks.floating(fn, **{given: model})
    _checks.rank(fn, given, model, 2, "[n, v]")
    _checks.nonempty(fn, **{given: model})
    inputs[f"{letter}_logits"] = jnp.asarray(model)
    v = jnp.shape(model)[1]
  rows = jnp.shape(model if given.endswith("logits") else model[0])[0]
  if n is not None and rows != n:
    _checks.fail(fn, given, f"[n, ...] with n={n} like student_hidden", rows)
  return v


def _is_top_k(teacher: Any) -> bool:
  """(ids, log-probabilities): the first of two is an integer array."""
  return (
    isinstance(teacher, (tuple, list))
    and not isinstance(teacher, Head)
    and len(teacher) == 2
    and not isinstance(teacher[0], (tuple, list))
    and jnp.issubdtype(jnp.result_type(teacher[0]), jnp.integer)
  )


def _top_k_teacher(fn, teacher, n):
  ids, log_probs = teacher
  _checks.floating(fn, teacher_log_probs=log_probs)
  _checks.rank(fn, "teacher_ids", ids, 2, "[n, k]")
  _checks.same_shape(fn, teacher_ids=ids, teacher_log_probs=log_probs)
  if jnp.shape(ids)[0] != n:
    _checks.fail(
      fn, "teacher_ids", f"[n, k] with n={n}", list(jnp.shape(ids))
    )
  return jnp.asarray(ids), jnp.asarray(log_probs)


def _check_ids(fn, name, ids, v):
  _checks.holds(
    fn,
    name,
    ids,
    lambda i: (i >= 0) & (i < v),
    f"in [0, {v - 1}], ids of the vocabulary",
  )


def _take(rows, model):
  """Only these rows of a teacher in any of its forms."""
  if model is None:
    return None
  if isinstance(model, (tuple, list)) and not isinstance(model, Head):
    first, second = model
    if _is_top_k(model):
      second = jnp.asarray(second)[rows]
    return jnp.asarray(first)[rows], second
  return jnp.asarray(model)[rows]


# --- a sharded vocabulary ------------------------------------------------


def _size(axis_name) -> int | None:
  """Devices of a bound axis; None where no shard_map has bound it."""
  try:
    return int(jax.lax.axis_size(axis_name))
  except NameError:
    return None


def _offset(fn, x, local, axis_name):
  """Marks the first column of this shard, after a check that it is one."""
  kernel = x["s_kernel"]
  axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
  # pylint: disable=protected-access
  missing = [a for a in axes if a not in xla._varying(kernel)]
  if missing:
    _checks.fail(
      fn,
      "student_head",
      f"cut over axis_name={axis_name!r} inside jax.shard_map with"
      " check_vma=True",
      "one that does not vary over it",
    )
  shard = jax.lax.axis_index(axis_name).astype(jnp.int32)
  return {**x, "offset": shard * local}


def _axis(spec, name) -> int | None:
  """The vocabulary's axis in an operand; None where there is none."""
  model, _, what = name.partition("_")
  if what == "kernel":
    return 0 if model in spec.tied else 1
  return {"logits": 1, "bias": 0}.get(what)


def _run(fn, spec, x, axis_name, vocab_size):
  """Statistics of x, whose vocabulary may be cut over a mesh axis."""
  if axis_name is None:
    return primitives.statistics(spec, x)
  names = tuple(
    sorted([*spec.inputs, "offset", *(["limit"] if vocab_size else [])])
  )

  def local(x, size):
    columns = x["s_kernel"].shape[_axis(spec, "s_kernel")]
    for name in ("t_kernel", "t_logits", "r_kernel", "r_logits"):
      if name in x and x[name].shape[_axis(spec, name)] != columns:
        _checks.fail(
          fn,
          "vocabularies cut over axis_name",
          f"of one size, here {columns} columns a device",
          x[name].shape[_axis(spec, name)],
        )
    x = _offset(fn, x, columns, axis_name)
    if vocab_size:
      x["limit"] = vocab_size - x["offset"]
    cut = dataclasses.replace(
      spec,
      inputs=names,
      columns=columns,
      chunk=min(spec.chunk, columns),
      axis=axis_name,
      shards=size,
    )
    return primitives.statistics(cut, x)

  size = _size(axis_name)
  if size is not None:
    return local(x, size)
  axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
  mesh = jax.sharding.get_abstract_mesh()
  if any(a not in mesh.axis_names for a in axes):
    _checks.fail(
      fn,
      "axis_name",
      "an axis of a shard_map, or of the mesh in `jax.set_mesh`"
      f" ({', '.join(map(repr, mesh.axis_names)) or 'none is set'})",
      repr(axis_name),
    )
  size = math.prod(mesh.shape[a] for a in axes)
  part = jax.sharding.PartitionSpec
  places = {}
  for name, a in x.items():
    axis = _axis(spec, name)
    places[name] = (
      part() if axis is None else part(*[None] * axis, axis_name)
    )
    if axis is not None and a.shape[axis] % size:
      _checks.fail(
        fn,
        "vocabularies cut over axis_name",
        f"divisible by its {size} devices",
        a.shape[axis],
      )
  return jax.shard_map(
    lambda x: local(x, size),
    in_specs=(places,),
    out_specs=part(),
    axis_names=set(axes),
  )(x)


# --- sparse teachers -----------------------------------------------------


def _logsumexp(x):
  top = jnp.maximum(jnp.max(x, axis=-1, keepdims=True), xla.LOWEST)
  return jnp.log(jnp.sum(jnp.exp(x - top), axis=-1)) + top[..., 0]


def _log1mexp(x):
  """log(1 - exp(x)) for x <= 0, -inf at 0, accurate at both ends."""
  near = x > -math.log(2.0)
  dead = x >= 0
  small = jnp.where(near & ~dead, x, -1)
  large = jnp.where(near, -1, x)
  out = jnp.where(near, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))
  return jnp.where(dead, -jnp.inf, out)


def _sparse_loss(kind, tail, outputs, log_p, temperature, v):
  """The sparse functions of `losses.divergence`, from what a pass gives."""
  # pylint: disable=protected-access
  k = log_p.shape[1]
  log_q = outputs["picks"][:, :k] / temperature
  dtype = xla.wide(log_q, log_p)
  log_q = log_q.astype(dtype)
  log_p = jax.lax.stop_gradient(log_p.astype(dtype))
  if tail == "renormalize":
    log_q = jax.nn.log_softmax(log_q, axis=-1)
    log_p = jax.nn.log_softmax(log_p, axis=-1)
  else:
    log_q = log_q - outputs["tempered"].astype(dtype)[:, None]
  if tail == "bucket" and k < v:
    rest = (outputs["rest"] - outputs["tempered"]).astype(dtype)
    log_q = jnp.concatenate([log_q, rest[:, None]], axis=1)
    rest = _log1mexp(_logsumexp(log_p))
    if kind == "sparse_reverse_kl":
      # The teacher's rest is known to the rounding of 1 - sum p only.
      rest = jnp.maximum(rest, math.log(float(jnp.finfo(log_p.dtype).eps)))
    log_p = jnp.concatenate([log_p, rest[:, None]], axis=1)
  if kind == "sparse_reverse_kl":
    log_p, log_q = log_q, log_p
  return jnp.sum(xla._weighted(log_p, xla._log_ratio(log_p, log_q)), axis=1)


# --- the two functions ---------------------------------------------------


def _plan(
  fn,
  student_hidden,
  student_head,
  teacher,
  *,
  kind,
  reference,
  beta,
  alpha,
  reward_scale,
  tail,
  temperature,
  vocab_size,
  rows,
  exact,
  axis_name,
  chunk_size,
  implementation,
  ids=None,
  top_k=None,
  statistics=False,
):
  """(loss or None, outputs, extras, top-k of the teacher or None)."""
  if implementation is not None:
    _checks.one_of(fn, "implementation", implementation, IMPLEMENTATIONS)
  if kind is not None:
    _checks.one_of(fn, "kind", kind, DENSE + SPARSE)
  _checks.one_of(fn, "tail", tail, ("bucket", "renormalize", "drop"))
  _number(
    fn, "temperature", temperature, 0, math.inf, open_low=True, open_high=True
  )
  _number(fn, "beta", beta, 0, 1)
  _number(fn, "alpha", alpha, 0, 1)
  if chunk_size is not None:
    _number(fn, "chunk_size", chunk_size, 1)
  if rows is not None:
    _checks.integer(fn, rows=rows)
    _checks.rank(fn, "rows", rows, 1, "[k]")
    n_all = jnp.shape(student_hidden)[0]
    _checks.holds(
      fn, "rows", rows, lambda i: (i >= 0) & (i < n_all), f"in [0, {n_all - 1}]"
    )
    student_hidden, teacher, reference = (
      _take(rows, a) for a in (student_hidden, teacher, reference)
    )
  inputs, caps, tied, sizes = {}, [], [], {}
  sizes["student_head"] = _model(
    fn, "student", "s", (student_hidden, student_head), None, inputs, caps, tied
  )
  n = inputs["s_hidden"].shape[0]
  sparse = _is_top_k(teacher)
  if kind is not None and sparse != (kind in SPARSE):
    _checks.fail(
      fn,
      "teacher",
      "cached top-k (integer ids, log-probabilities)"
      if kind in SPARSE
      else f"(hidden, head) or logits for kind={kind!r}, or kind one of"
      f" {', '.join(map(repr, SPARSE))}",
      "dense" if kind in SPARSE else "cached top-k",
    )
  known = None
  if sparse:
    known = _top_k_teacher(fn, teacher, n)
  else:
    sizes["teacher"] = _model(
      fn, "teacher", "t", teacher, n, inputs, caps, tied
    )
  if kind == "gopd":
    plain_scale = _checks.is_number(reward_scale) and reward_scale == 1
    if reference is None and not plain_scale:
      _checks.fail(
        fn,
        "reference",
        "given unless reward_scale is the number 1 (plain distillation)",
        "None",
      )
    if not plain_scale:
      sizes["reference"] = _model(
        fn, "reference", "r", reference, n, inputs, caps, tied
      )
    dtype = xla.wide(*inputs.values())
    inputs["reward_scale"] = _per_row(fn, reward_scale, n, dtype)
  v = _vocabulary(fn, sizes, vocab_size, axis_name)

  excluded = 0
  picked = []
  outputs = set()
  if sparse:
    k = known[0].shape[1]
    if not 1 <= k <= v:
      _checks.fail(fn, "teacher_ids", f"[n, k] with 1 <= k <= {v}", f"k={k}")
    _check_ids(fn, "teacher_ids", known[0], v)
    _checks.holds(
      fn,
      "teacher_ids",
      jnp.sort(known[0], axis=-1),
      lambda i: jnp.all(i[..., 1:] != i[..., :-1], axis=-1),
      "distinct within a row",
    )
    if kind is not None:
      picked.append(known[0])
      outputs.add("picks")
      if tail != "renormalize":
        outputs.add("tempered")
      if tail == "bucket" and k < v:
        outputs.add("rest")
        excluded = k
  if ids is not None:
    _checks.integer(fn, ids=ids)
    if jnp.ndim(ids) not in (1, 2) or jnp.shape(ids)[0] != n:
      _checks.fail(fn, "ids", f"[n] or [n, k] with n={n}", list(jnp.shape(ids)))
    _check_ids(fn, "ids", jnp.asarray(ids), v)
    picked.append(jnp.asarray(ids).reshape(n, -1))
    outputs.add("picks")
  if picked:
    picked = [a.astype(jnp.int32) for a in picked]
    inputs["ids"] = jnp.concatenate(picked, axis=1)
  extras = set()
  if statistics:
    outputs |= {"lse", "entropy"}
    if not sparse:
      extras.add("teacher")
    if top_k is not None:
      _number(fn, "top_k", top_k, 1, v)
      extras.add("top_k")
  dense, mix = _dense_kind(kind, beta, alpha)
  if dense is not None:
    outputs.add("loss")
  chunk = chunk_size
  if chunk is None:
    chunks = CHUNKS.get(platform.platform(), CHUNKS["tpu"])
    chunk = chunks[2 if sparse else int("reference" in sizes)]
  order = ("loss", "lse", "entropy", "picks", "tempered", "rest")
  spec = xla.Spec(
    inputs=tuple(sorted(inputs)),
    outputs=tuple(k for k in order if k in outputs),
    extras=tuple(sorted(extras)),
    kind=dense,
    mix=mix,
    temperature=float(temperature),
    exact=bool(exact),
    columns=v,
    chunk=int(min(chunk, v)),
    top_k=int(top_k or 0),
    excluded=excluded,
    caps=tuple(caps),
    tied=tuple(tied),
    axis=None,
    shards=1,
    implementation=implementation or "xla",
  )
  if implementation == "pallas_tpu" and outputs:
    _check_kernel(fn, spec, inputs, axis_name)
  made, extra = {}, {}
  if outputs:
    made, extra = _run(fn, spec, inputs, axis_name, vocab_size)
  loss = made.get("loss")
  if kind in SPARSE:
    loss = _sparse_loss(kind, tail, made, known[1], float(temperature), v)
  elif kind is not None and dense is None:
    loss = jnp.zeros((n,), xla.wide(*inputs.values()))
  return loss, made, extra


def _check_kernel(fn, spec, inputs, axis_name):
  """That the TPU kernel can do the case, and where it is asked to."""
  from distilljax.kernels.linear_head import pallas_tpu

  here = platform.platform()
  if not pallas_tpu.runs_on(here):
    _checks.fail(
      fn, "implementation", f"'xla' on {here!r}, or None", "'pallas_tpu'"
    )
  needs = pallas_tpu.cannot(spec, inputs)
  if axis_name is not None:
    needs = "no axis_name"
  if needs is not None:
    _checks.fail(
      fn, "implementation", f"'xla', or {needs}", "'pallas_tpu'"
    )


def _dense_kind(kind, beta, alpha):
  """(kind, weight of its mixture); at the ends they are the KLs, or nothing."""
  if kind is None or kind in SPARSE:
    return None, 0.0
  if kind == "generalized_jsd":
    ends = {0: "forward_kl", 1: "reverse_kl"}
    return ends.get(beta, kind), float(beta)
  if kind in ("skew_forward_kl", "skew_reverse_kl"):
    ends = {0: kind.removeprefix("skew_"), 1: None}
    return ends.get(alpha, kind), float(alpha)
  return kind, 0.0


def _per_row(fn, reward_scale, n, dtype):
  """reward_scale as [n], frozen."""
  if _checks.is_number(reward_scale):
    _checks.finite(fn, reward_scale=reward_scale)
    return jnp.full((n,), reward_scale, dtype)
  if jnp.shape(reward_scale) != (n,):
    _checks.fail(
      fn,
      "reward_scale",
      f"a number or [n]=[{n}]",
      list(jnp.shape(reward_scale)),
    )
  return jnp.asarray(reward_scale).astype(dtype)


def _vocabulary(fn, sizes, vocab_size, axis_name):
  """Number of common columns (of a device inside a shard_map)."""
  least = min(sizes.values())
  if vocab_size is None:
    if len(set(sizes.values())) > 1:
      words = ", ".join(f"{k} has v={n}" for k, n in sizes.items())
      raise ValueError(
        f"{fn}: heads must share one vocabulary, got {words}: pass"
        f" vocab_size={least} (or the tokenizer's own size) to trim the padding"
        " columns before the softmax"
      )
    if axis_name is not None:
      least *= _size(axis_name) or 1
    return least
  whole = least
  if axis_name is not None:
    whole = least * (_size(axis_name) or 1)
  _number(fn, "vocab_size", vocab_size, 1, whole)
  return int(vocab_size)


def linear_divergence(
  student_hidden: Float[Array, "n d"],
  student_head: Any,
  teacher: Any,
  *,
  kind: Kind,
  reference: Any = None,
  beta: float | int = 0.5,
  alpha: float | int = 0.1,
  reward_scale: Any = 1.25,
  tail: Tail = "bucket",
  temperature: float | int = 1.0,
  vocab_size: int | None = None,
  rows: Int[Array, "k"] | None = None,
  exact: bool = False,
  axis_name: str | tuple[str, ...] | None = None,
  chunk_size: int | None = None,
  implementation: Literal["xla", "pallas_tpu"] | None = None,
) -> Float[Array, "..."]:
  """A divergence of next-token distributions, straight from hidden states.

  What the function `kind` of `losses` says of logits

    softcap tanh(scale (hidden kernel + bias) / softcap)

  of student and teacher, without ever holding [n, v]: forward and backward
  loop over chunks of the vocabulary. No factor temperature^2. The teacher and
  the reference are stop-gradient; the student's hidden states, kernel and bias
  are differentiable in both modes, a Hessian times a vector included. Matrix
  products accumulate, and everything is returned, in at least float32.

  One pass over the heads gives the KLs and G-OPD, two passes the others. The
  one-pass sums cancel: their error is a few roundings of the sums, so a KL of
  nearly equal models may come out slightly negative. `exact=True` takes two
  passes and adds up terms that are not negative.

  Args:
    student_hidden: last hidden states, trained. Shape [n, d].
    student_head: kernel [d, v] or `Head`, which also takes a tied embedding.
    teacher: (hidden [n, e], kernel [e, v] or `Head`); logits [n, v]; or, for
      the sparse kinds, cached top-k (ids [n, k], log-probabilities [n, k]
      under the full softmax at this temperature).
    kind: "forward_kl", "reverse_kl", "generalized_jsd", "skew_forward_kl",
      "skew_reverse_kl", "total_variation", "sparse_forward_kl" or
      "sparse_reverse_kl" of `losses`, or "gopd", its `gopd_loss`.
    reference: for "gopd": as `teacher`, no top-k.
    beta: of "generalized_jsd", in [0, 1]; 0 and 1 are the two KLs.
    alpha: of the skew kinds, in [0, 1].
    reward_scale: of "gopd": a number or [n]; without gradient.
    tail: of the sparse kinds: "bucket", "renormalize" or "drop".
    temperature: divides the logits; a Python number > 0.
    vocab_size: number of common tokens: columns after it are padding.
    rows: only these rows of the hidden states (and of the teacher's) reach a
      head, TIP's chosen tokens (`losses.select_tokens`); then n is k in what is
      returned. None means all. Shape [k].
    exact: two passes where one would do, for tiny divergences.
    axis_name: mesh axis over which all heads (and logits) are cut by their
      vocabulary; hidden states are whole. Inside shard_map give the local
      parts; outside of it the function maps itself over the mesh of
      `jax.set_mesh`, or of the train step that it is traced in. Collectives
      are of per-token statistics only.
    chunk_size: columns of a chunk; None is 4096 (2048 where there is a
      reference, 1024 with cached top-k), on a GPU 2048 (2048, 1024), on CPU
      2048 (1024, 2048). The kernel has blocks of its own.
    implementation: "xla", which None is, or "pallas_tpu": the passes over the
      vocabulary as a TPU kernel that keeps logits on the chip, never timed
      there; (hidden, head) of every model, whole heads, one device or the
      inside of a shard_map with check_vma=False. Gradients are those of "xla".

  Returns:
    Nats, shape [n] (or [k] of `rows`), unreduced.

  Raises:
    ValueError: widths or vocabularies that do not correspond, an option out of
      its range, a missing reference; in debug mode ids out of range.
    TypeError: arrays that are not floating.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> hidden, kernel = jnp.ones((3, 2)), jnp.eye(2, 5)
    >>> teacher = (2 * jnp.ones((3, 2)), kernel)
    >>> linear_divergence(hidden, kernel, teacher, kind="forward_kl").shape
    (3,)

  References:
    None: the identities of card lm_kd_divergences; the chunked algorithm is
    ours. Kinds: see the functions of `losses`.
  """
  return _plan(
    "linear_divergence",
    student_hidden,
    student_head,
    teacher,
    kind=kind,
    reference=reference,
    beta=beta,
    alpha=alpha,
    reward_scale=reward_scale,
    tail=tail,
    temperature=temperature,
    vocab_size=vocab_size,
    rows=rows,
    exact=exact,
    axis_name=axis_name,
    chunk_size=chunk_size,
    implementation=implementation,
  )[0]


def linear_token_statistics(
  student_hidden: Float[Array, "n d"],
  student_head: Any,
  teacher: Any,
  *,
  kind: Kind | None = "reverse_kl",
  ids: Int[Array, "..."] | None = None,
  top_k: int | None = None,
  reference: Any = None,
  beta: float | int = 0.5,
  alpha: float | int = 0.1,
  reward_scale: Any = 1.25,
  tail: Tail = "bucket",
  temperature: float | int = 1.0,
  vocab_size: int | None = None,
  rows: Int[Array, "k"] | None = None,
  exact: bool = False,
  axis_name: str | tuple[str, ...] | None = None,
  chunk_size: int | None = None,
  implementation: Literal["xla", "pallas_tpu"] | None = None,
) -> LinearTokenStatistics:
  """The loss and what on-policy methods want to know of every token.

  One pass over both heads, chunk by chunk, serves OPD (log-probabilities of
  sampled ids), TIP (entropy and divergences) and Prune-OPD (top-k of both and
  their overlap). The loss is that of `linear_divergence` at `temperature`;
  entropies H = -sum p log p, log-probabilities, log-normalisers and the two
  KLs are at temperature 1. Loss and the student's entropy, log-probabilities
  and log-normaliser are differentiable in the student; everything else, the
  KLs and top-k included, is without gradient.

  Args:
    student_hidden: Shape [n, d].
    student_head: kernel [d, v] or `Head`.
    teacher: as in `linear_divergence`; with cached top-k what needs the whole
      teacher is None.
    kind: of the loss, or None for none.
    ids: tokens whose log-probabilities are wanted. Shape [n] or [n, k].
    top_k: number of the largest tokens of both models, in [1, v].
    reference: as in `linear_divergence`, and so are all others.
    beta: as there.
    alpha: as there.
    reward_scale: as there.
    tail: as there.
    temperature: of the loss.
    vocab_size: as there.
    rows: as there; `ids` are then those of the chosen rows.
    exact: as there.
    axis_name: as there.
    chunk_size: as there.
    implementation: as there.

  Returns:
    `LinearTokenStatistics` of at least float32.

  Raises:
    ValueError: as `linear_divergence`; top_k outside [1, v].
    TypeError: arrays of the wrong kind.

  References:
    TIP, 2026, arXiv:2604.14084; Prune-OPD, 2026, arXiv:2605.07804.
  """
  fn = "linear_token_statistics"
  loss, made, extra = _plan(
    fn,
    student_hidden,
    student_head,
    teacher,
    kind=kind,
    reference=reference,
    beta=beta,
    alpha=alpha,
    reward_scale=reward_scale,
    tail=tail,
    temperature=temperature,
    vocab_size=vocab_size,
    rows=rows,
    exact=exact,
    axis_name=axis_name,
    chunk_size=chunk_size,
    implementation=implementation,
    ids=ids,
    top_k=top_k,
    statistics=True,
  )
  student_lse, teacher_lse = made["lse"], extra.get("teacher_lse")
  log_probs = lambda values, lse: (
    None if values is None or lse is None else values - lse[:, None]
  )
  own = other = None
  if ids is not None:
    shape = jnp.shape(ids)
    k = math.prod(shape[1:])
    last = lambda a: None if a is None else a[:, a.shape[1] - k :]
    shaped = lambda a: None if a is None else a.reshape(shape)
    own = shaped(log_probs(last(made["picks"]), student_lse))
    other = shaped(log_probs(last(extra.get("teacher_picks")), teacher_lse))
  frozen = jax.lax.stop_gradient(student_lse)
  overlap = None
  if "s_top_ids" in extra and "t_top_ids" in extra:
    same = extra["s_top_ids"][:, :, None] == extra["t_top_ids"][:, None, :]
    overlap = jnp.mean(jnp.any(same, axis=2), axis=1, dtype=jnp.float32)
  return LinearTokenStatistics(
    loss=loss,
    student_entropy=made["entropy"],
    teacher_entropy=extra.get("teacher_entropy"),
    student_log_probs=own,
    teacher_log_probs=other,
    student_log_normalizer=student_lse,
    teacher_log_normalizer=teacher_lse,
    student_top_ids=extra.get("s_top_ids"),
    student_top_log_probs=log_probs(extra.get("s_top"), frozen),
    teacher_top_ids=extra.get("t_top_ids"),
    teacher_top_log_probs=log_probs(extra.get("t_top"), teacher_lse),
    student_top_teacher_log_probs=log_probs(
      extra.get("s_top_other"), teacher_lse
    ),
    topk_overlap=overlap,
    forward_kl=extra.get("forward_kl"),
    reverse_kl=extra.get("reverse_kl"),
  )
