"""Distillation between models with different tokenizers.

ALM (approximate likelihood matching): both models read the same text in their
own tokens; the finest groups of tokens that cover the same bytes on both sides
are chunks (`distilljax.lm.alignment` finds them on the host), and the
log-likelihood of each chunk under both models is matched as a Bernoulli
outcome. Here a chunk is a segment id per token, [b, l] -> [b, c] by a segment
sum: the [b, l, c] membership matrix of the official code is never built.

Logits are unshifted: row i predicts token i + 1. The first token of a sequence
is predicted by nothing and never counts.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from distilljax import _checks
from distilljax.losses import _log_space
from distilljax.typing import Array, Bool, Float, Int, Scalar

Kind = Literal[
  "binary_ce",
  "binary_kl",
  "reverse_binary_kl",
  "binary_kl_temp_limit",
  "abs",
  "abs_exp",
  "k2",
  "k3",
  "renyi",
]
_KINDS = Kind.__args__


def _segments(
  fn: str, chunk_ids: Any, num_chunks: int, where: Any
) -> tuple[Array, Array]:
  """(rows, columns) of a scatter into [b, c]; column c drops the token."""
  _checks.integer(fn, chunk_ids=chunk_ids)
  _checks.rank(fn, "chunk_ids", chunk_ids, 2, "[b, l]")
  _log_space.check_number(fn, "num_chunks", num_chunks, 1)
  chunk_ids = jnp.asarray(chunk_ids)
  _checks.holds(
    fn,
    "chunk_ids",
    chunk_ids,
    lambda i: (i >= -1) & (i < num_chunks),
    f"in [-1, {num_chunks - 1}] (-1: in no chunk)",
  )
  member = (chunk_ids >= 0) & (chunk_ids < num_chunks)
  if where is not None:
    _checks.boolean(fn, where=where)
    _checks.shape(fn, "where", where, chunk_ids.shape, "[b, l]", "chunk_ids")
    member &= where
  columns = jnp.where(member, chunk_ids, num_chunks)
  rows = jnp.arange(chunk_ids.shape[0])[:, None]
  return rows, columns


def chunk_log_probs(
  logits: Float[Array, "b l v"],
  ids: Int[Array, "b l"],
  chunk_ids: Int[Array, "b l"],
  where: Bool[Array, "b l"] | None = None,
  *,
  num_chunks: int,
) -> Float[Array, "b c"]:
  """Log-likelihood of every chunk: the sum over its tokens.

    log p(chunk) = min(0, sum over its tokens i >= 1 of
                          log softmax(logits[i-1])[ids[i]])

  Differentiable in the logits; `alm_loss` freezes the teacher's.

  Args:
    logits: unshifted, row i predicts token i + 1. Shape [b, l, v].
    ids: token ids. Shape [b, l].
    chunk_ids: chunk of each token, -1 for none. Shape [b, l].
    where: tokens that count; None means all. Shape [b, l].
    num_chunks: c, static.

  Returns:
    Nats, shape [b, c], <= 0; 0 for a chunk without (predicted) tokens.

  Raises:
    ValueError: shapes that do not correspond; in debug mode ids outside the
      vocabulary or chunk ids outside [-1, c).

  References:
    Minixhofer et al., Universal cross-tokenizer distillation via approximate
    likelihood matching, 2025, arXiv:2503.20083.
  """
  fn = "chunk_log_probs"
  _checks.rank(fn, "logits", logits, 3, "[b, l, v]")
  _log_space.check_logits(fn, logits=logits)
  (logits,) = _log_space.promote(logits)
  v = logits.shape[-1]
  _checks.integer(fn, ids=ids)
  _checks.shape(fn, "ids", ids, logits.shape[:2], "[b, l]", "logits")
  _checks.shape(
    fn, "chunk_ids", chunk_ids, logits.shape[:2], "[b, l]", "logits"
  )
  ids = jnp.asarray(ids)
  _checks.holds(
    fn, "ids", ids, lambda i: (i >= 0) & (i < v), f"in [0, {v - 1}]"
  )
  rows, columns = _segments(fn, chunk_ids, num_chunks, where)
  log_p = _log_space.log_probs(logits[:, :-1])
  token = _log_space.take(log_p, ids[:, 1:, None])[..., 0]
  # What is dropped may be -inf or NaN (a padded token's): it must not reach
  # the gradient through 0 * inf.
  token = jnp.where(columns[:, 1:] < num_chunks, token, 0)
  total = jnp.zeros((logits.shape[0], num_chunks), logits.dtype)
  total = total.at[rows, columns[:, 1:]].add(token, mode="drop")
  return jnp.minimum(total, 0)


def chunk_token_counts(
  chunk_ids: Int[Array, "b l"],
  where: Bool[Array, "b l"] | None = None,
  *,
  num_chunks: int,
) -> Int[Array, "b c"]:
  """Number of predicted tokens of every chunk: the first of a row never counts.

  Args:
    chunk_ids: chunk of each token, -1 for none. Shape [b, l].
    where: tokens that count; None means all. Shape [b, l].
    num_chunks: c, static.

  Returns:
    int32, shape [b, c]. `counts > 0` of the teacher is the mask of `alm_loss`.

  Raises:
    ValueError: wrong shapes; in debug mode chunk ids outside [-1, c).

  References:
    Minixhofer et al., Universal Cross-Tokenizer Distillation via Approximate
    Likelihood Matching, 2025, arXiv:2503.20083.
  """
  rows, columns = _segments("chunk_token_counts", chunk_ids, num_chunks, where)
  counts = jnp.zeros((columns.shape[0], num_chunks), jnp.int32)
  return counts.at[rows, columns[:, 1:]].add(1, mode="drop")


def boundary_log_probs(
  logits: Float[Array, "b l v"],
  boundary: Bool[Array, "v"],
  chunk_ids: Int[Array, "b l"],
  where: Bool[Array, "b l"] | None = None,
  *,
  num_chunks: int,
) -> Float[Array, "b c"]:
  """Log-probability that a word boundary follows each chunk.

    w = min(0, log sum_{v in boundary} softmax(logits[i])_v),  i the LAST token

  Adding it to a chunk's log-likelihood asks for "these bytes and then a new
  word", an event that does not depend on how a tokenizer would have gone on.

  Args:
    logits: unshifted. Shape [b, l, v].
    boundary: tokens that open a word (a leading space), and the end of text.
      For a byte model: space, newline, end. Shape [v].
    chunk_ids: chunk of each token, -1 for none. Shape [b, l].
    where: tokens that count; None means all. Shape [b, l].
    num_chunks: c, static.

  Returns:
    Nats, shape [b, c], <= 0; 0 for a chunk without tokens.

  Raises:
    ValueError: shapes that do not correspond.

  References:
    arXiv:2503.20083, outcome debiasing ("append_space" of the official code).
  """
  fn = "boundary_log_probs"
  _checks.rank(fn, "logits", logits, 3, "[b, l, v]")
  _log_space.check_logits(fn, logits=logits)
  (logits,) = _log_space.promote(logits)
  _checks.boolean(fn, boundary=boundary)
  _checks.shape(fn, "boundary", boundary, logits.shape[-1:], "[v]", "logits")
  _checks.shape(
    fn, "chunk_ids", chunk_ids, logits.shape[:2], "[b, l]", "logits"
  )
  rows, columns = _segments(fn, chunk_ids, num_chunks, where)
  b, l, _ = logits.shape
  last = jnp.full((b, num_chunks), -1, jnp.int32)
  last = last.at[rows, columns].max(
    jnp.arange(l, dtype=jnp.int32)[None, :], mode="drop"
  )
  log_p = _log_space.log_probs(logits)
  mass = _log_space.logsumexp(
    jnp.where(jnp.asarray(boundary)[None, None, :], log_p, -jnp.inf)
  )
  out = jnp.take_along_axis(mass, jnp.maximum(last, 0), axis=1)
  return jnp.where(last >= 0, jnp.minimum(out, 0), 0)


class MergedChunks(NamedTuple):
  """Groups of chunks; arrays [b, c] with empty slots at the end of a row."""

  student: Array  # log-likelihoods
  teacher: Array
  student_boundary: Array  # boundary log-probabilities at a group's end
  teacher_boundary: Array
  counts: Array  # tokens per group
  official_counts: Array  # denominator of the official code, see merge_chunks


def merge_chunks(
  student_chunks: Float[Array, "b c"],
  teacher_chunks: Float[Array, "b c"],
  student_boundary: Float[Array, "b c"],
  teacher_boundary: Float[Array, "b c"],
  counts: Int[Array, "b c"],
  *,
  threshold: float | int | Scalar = 0.1,
) -> MergedChunks:
  """Joins chunks until the teacher expects a word boundary.

  A group is closed after a chunk whose teacher boundary probability exceeds the
  threshold (strictly): chunk c goes to group number(closers before c).
  Log-likelihoods add up, the boundary is that of the group's last chunk.

  The official code merges the counts once more for its denominator, reading
  group numbers as chunk numbers, which makes its loss 0-20% larger; that is
  `official_counts`, for comparisons only.

  Args:
    student_chunks: `chunk_log_probs`. Shape [b, c].
    teacher_chunks: Shape [b, c].
    student_boundary: `boundary_log_probs`. Shape [b, c].
    teacher_boundary: Shape [b, c].
    counts: the teacher's tokens per chunk; 0 marks an empty slot. Shape [b, c].
    threshold: of the boundary probability, in [0, 1].

  Returns:
    `MergedChunks`.

  Raises:
    ValueError: shapes that differ or threshold outside [0, 1].

  References:
    arXiv:2503.20083 ("merge_by_space_prob" of the official code, threshold .1).
  """
  fn = "merge_chunks"
  _checks.in_range(fn, "threshold", threshold, 0, 1)
  _checks.rank(fn, "student_chunks", student_chunks, 2, "[b, c]")
  given = {
    "student_chunks": student_chunks,
    "teacher_chunks": teacher_chunks,
    "student_boundary": student_boundary,
    "teacher_boundary": teacher_boundary,
  }
  _checks.floating(fn, **given)
  _checks.integer(fn, counts=counts)
  _checks.same_shape(fn, **given, counts=counts)
  student, teacher, student_w, teacher_w = _log_space.promote(*given.values())
  teacher = jax.lax.stop_gradient(teacher)
  teacher_w = jax.lax.stop_gradient(teacher_w)
  counts = jnp.asarray(counts)
  b, c = student.shape
  filled = counts > 0
  closer = jnp.exp(teacher_w) > threshold
  group = jnp.cumsum(closer, axis=1, dtype=jnp.int32) - closer.astype(jnp.int32)
  rows = jnp.arange(b)[:, None]

  def add(values):
    return jnp.zeros((b, c), values.dtype).at[rows, group].add(values)

  slots = jnp.where(filled, group, c)
  last = jnp.full((b, c), -1, jnp.int32)
  last = last.at[rows, slots].max(
    jnp.arange(c, dtype=jnp.int32)[None, :], mode="drop"
  )

  def at_last(values):
    taken = jnp.take_along_axis(values, jnp.maximum(last, 0), axis=1)
    return jnp.where(last >= 0, taken, 0)

  merged = add(counts)
  return MergedChunks(
    student=add(jnp.where(filled, student, 0)),
    teacher=add(jnp.where(filled, teacher, 0)),
    student_boundary=at_last(student_w),
    teacher_boundary=at_last(teacher_w),
    counts=merged,
    official_counts=add(jnp.where(filled, merged, 0)),
  )


def alm_loss(
  student_chunks: Float[Array, "b c"],
  teacher_chunks: Float[Array, "b c"],
  where: Bool[Array, "b c"] | None = None,
  *,
  kind: Kind = "binary_ce",
  temperature: float | int | Scalar = 100.0,
  eps: float | int | Scalar = 1e-6,
  alpha: float | int = 0.5,
) -> Float[Array, "b c"]:
  """Divergence between the chunk likelihoods of both models, per chunk.

  With a the teacher's and b the student's log-likelihood, a' = a / temperature
  - eps, b' likewise, and Bern(x) a coin with probability exp(x):

    binary_ce             -[exp(a') b' + (1 - exp(a')) log(1 - exp(b'))]
    binary_kl             the same minus the teacher's entropy (ours)
    reverse_binary_kl     KL(Bern(b') || Bern(a'))
    binary_kl_temp_limit  limit of temperature * binary_kl at temperature
                          inf: y - x + x log(x/y), x = -a, y = -b
    abs                   |a - b|
    abs_exp               |exp(a') - exp(b')|
    k2, k3                r^2 / 2, exp(r) - 1 - r with r = (a - b) / temperature
                          (at most 20 in k3)
    renyi                 Renyi divergence of order alpha, Bern(a) from Bern(b)

  Gradients shrink like 1 / temperature; binary_kl_temp_limit needs none and is
  the one to start new work with. The teacher is stop-gradient.

  Args:
    student_chunks: `chunk_log_probs` (plus `boundary_log_probs`). Shape [b, c].
    teacher_chunks: of the same chunks. Shape [b, c].
    where: chunks that exist: the teacher's counts > 0. None means all. Shape
      [b, c].
    kind: see above.
    temperature: > 0; not used by abs, renyi and binary_kl_temp_limit.
    eps: keeps likelihoods below 1; >= 0, 0 only where no chunk is certain.
    alpha: order of renyi, in (0, 1).

  Returns:
    Shape [b, c], unreduced, 0 outside `where`: sum it over the batch and divide
    by the number of chunks (`masked_mean(..., where)`).

  Raises:
    ValueError: an unknown kind, shapes that differ, an option out of range; in
      debug mode log-likelihoods above 0.

  References:
    arXiv:2503.20083; official names joschu_k2 and joschu_k3 are k2 and k3.
  """
  fn = "alm_loss"
  _checks.one_of(fn, "kind", kind, _KINDS)
  _log_space.check_temperature(fn, temperature)
  _checks.in_range(fn, "eps", eps, 0)
  _log_space.check_number(
    fn, "alpha", alpha, 0, 1, open_low=True, open_high=True
  )
  _checks.rank(fn, "student_chunks", student_chunks, 2, "[b, c]")
  _checks.floating(
    fn, student_chunks=student_chunks, teacher_chunks=teacher_chunks
  )
  _checks.same_shape(
    fn,
    student_chunks=student_chunks,
    teacher_chunks=teacher_chunks,
    where=where,
  )
  b, a = _log_space.promote(student_chunks, teacher_chunks)
  _checks.boolean(fn, where=where)
  where = jnp.ones(b.shape, bool) if where is None else jnp.asarray(where)
  # A finite stand-in before the arithmetic: inf * 0 would reach the gradient.
  a = jax.lax.stop_gradient(jnp.where(where, a, -1))
  b = jnp.where(where, b, -1)
  for name, x in (("teacher_chunks", a), ("student_chunks", b)):
    _checks.holds(fn, name, x, lambda x: x <= 0, "<= 0, log-likelihoods")
  a_soft, b_soft = a / temperature - eps, b / temperature - eps
  if kind in ("binary_ce", "binary_kl", "reverse_binary_kl"):
    if kind == "reverse_binary_kl":
      weight, first, second = b_soft, b_soft, a_soft
    else:
      weight, first, second = a_soft, a_soft, b_soft
    value = -jnp.exp(weight) * second + (
      jnp.expm1(weight) * _log_space.log1mexp(second)
    )
    if kind != "binary_ce":
      value += jnp.exp(weight) * first - (
        jnp.expm1(weight) * _log_space.log1mexp(first)
      )
  elif kind == "binary_kl_temp_limit":
    x, y = eps - a, eps - b
    positive = x > 0
    value = (
      y - x + jnp.where(positive, x * jnp.log(jnp.where(positive, x / y, 1)), 0)
    )
  elif kind == "abs":
    value = jnp.abs(a - b)
  elif kind == "abs_exp":
    value = jnp.abs(jnp.exp(a_soft) - jnp.exp(b_soft))
  elif kind == "renyi":
    both = jnp.exp(alpha * (a - eps) + (1 - alpha) * (b - eps)) + jnp.exp(
      alpha * _log_space.log1mexp(a - eps)
      + (1 - alpha) * _log_space.log1mexp(b - eps)
    )
    value = jnp.log(both) / (alpha - 1)
  else:
    r = (a - b) / temperature
    # exp(20) is as far off as a chunk can usefully be said to be.
    value = r * r / 2
    if kind == "k3":
      r = jnp.minimum(r, 20)
      value = jnp.expm1(r) - r
  return jnp.where(where, value, 0)


def uld_loss(
  student_logits: Float[Array, "*b v"],
  teacher_logits: Float[Array, "*b w"],
  *,
  temperature: Any = 1.0,
) -> Float[Array, "*b"]:
  """Universal logit distillation: L1 between sorted probabilities.

    sum_i |p_(i) - q_(i)|,  both in descending order, the shorter padded with 0

  Position i of one tokenization is held against position i of the other: there
  is no alignment, which is what ALM is for. Teacher stop-gradient.

  Args:
    student_logits: trained. Shape [*b, v].
    teacher_logits: frozen. Shape [*b, w]; w may differ from v.
    temperature: divides both logits; > 0.

  Returns:
    Shape [*b], unreduced, in [0, 2].

  Raises:
    ValueError: leading axes that differ, a temperature that is not positive.

  References:
    Boizard et al., Towards cross-tokenizer distillation, 2024,
    arXiv:2402.12030, eq. 3.
  """
  fn = "uld_loss"
  _log_space.check_temperature(fn, temperature)
  _log_space.check_logits(
    fn, student_logits=student_logits, teacher_logits=teacher_logits
  )
  if jnp.shape(student_logits)[:-1] != jnp.shape(teacher_logits)[:-1]:
    _checks.fail(
      fn,
      "teacher_logits",
      f"[*b, w] with *b={list(jnp.shape(student_logits)[:-1])} like"
      " student_logits",
      list(jnp.shape(teacher_logits)),
    )
  student, teacher = _log_space.promote(student_logits, teacher_logits)
  size = max(student.shape[-1], teacher.shape[-1])

  def ranked(logits):
    p = jnp.exp(_log_space.log_probs(logits, temperature))
    p = jnp.sort(p, axis=-1, descending=True)
    pad = [(0, 0)] * (p.ndim - 1) + [(0, size - p.shape[-1])]
    return jnp.pad(p, pad)

  gap = ranked(jax.lax.stop_gradient(teacher)) - ranked(student)
  return jnp.sum(jnp.abs(gap), axis=-1)


__all__ = [
  "MergedChunks",
  "alm_loss",
  "boundary_log_probs",
  "chunk_log_probs",
  "chunk_token_counts",
  "merge_chunks",
  "uld_loss",
]
