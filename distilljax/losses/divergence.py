"""Divergences between a teacher's and a student's next-token distribution.

Notation of the whole file: p is the teacher, q the student, both softmax of
logits / temperature over the last axis, and

  forward KL   KL(p||q) = sum_v p (log p - log q)    covers the teacher's modes
  reverse KL   KL(q||p) = sum_v q (log q - log p)    seeks one of them

Every function returns one value per row, [*b, v] -> [*b], in nats and in at
least float32; no function multiplies by temperature^2 (other libraries do: ask
for it where you weigh the loss); the teacher is stop-gradiented. Reduce with
`masked_mean(values, where)`.

Vocabularies padded to different sizes (151936 against 152064 in one family)
are cut to the common ids, before the softmax, by `vocab_size=`. A token with
logit -inf is outside the support: 0 log 0 = 0, in the gradient too. A KL whose
first argument has mass there is +inf (refused under `distilljax.debug()`).
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from distilljax import _checks
from distilljax.losses import _log_space
from distilljax.typing import Array, Bool, Float, Int

Tail = Literal["bucket", "renormalize", "drop"]


def _pair(
  fn: str,
  student_logits: Any,
  teacher_logits: Any,
  temperature: Any,
  vocab_size: int | None,
) -> tuple[Array, Array]:
  """(log q, log p), the teacher frozen, after all checks."""
  _log_space.check_temperature(fn, temperature)
  student, teacher = _log_space.promote(
    *_log_space.trim(
      fn,
      vocab_size,
      student_logits=student_logits,
      teacher_logits=teacher_logits,
    )
  )
  log_q = _log_space.log_probs(student, temperature)
  log_p = _log_space.log_probs(jax.lax.stop_gradient(teacher), temperature)
  return log_q, log_p


def entropy(
  logits: Float[Array, "*b v"],
  *,
  temperature: Any = 1.0,
  vocab_size: int | None = None,
) -> Float[Array, "*b"]:
  """Entropy of softmax(logits / temperature), H = -sum_v p log p.

  Differentiable in the logits: freeze a teacher's yourself.

  Args:
    logits: unnormalised log-probabilities. Shape [*b, v].
    temperature: > 0.
    vocab_size: number of real tokens; the columns after it are padding. None
      means all.

  Returns:
    Nats, shape [*b], in [0, log v]; log v for equal logits.

  Raises:
    ValueError: no vocabulary axis, or a temperature that is not positive.
    TypeError: logits are not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> bool(jnp.allclose(entropy(jnp.zeros((2, 8))), jnp.log(8.0)))
    True
  """
  _log_space.check_temperature("entropy", temperature)
  (logits,) = _log_space.promote(
    *_log_space.trim("entropy", vocab_size, logits=logits)
  )
  log_p = _log_space.log_probs(logits, temperature)
  return -_log_space.expectation(log_p, log_p)


def forward_kl(
  student_logits: Float[Array, "*b v"],
  teacher_logits: Float[Array, "*b w"],
  *,
  temperature: Any = 1.0,
  vocab_size: int | None = None,
) -> Float[Array, "*b"]:
  """Forward KL divergence, KL(teacher||student) = sum_v p (log p - log q).

  p and q are the softmax of logits / temperature; there is no temperature^2.
  The teacher is stop-gradient; the gradient in the student's logits is
  (q - p) / temperature.

  Args:
    student_logits: trained. Shape [*b, v].
    teacher_logits: frozen. Shape [*b, v].
    temperature: divides both logits; > 0.
    vocab_size: cuts both vocabularies to their first ids before the softmax;
      needed where they are padded to different sizes. None means all.

  Returns:
    Nats, shape [*b], unreduced; >= 0, and 0 where the distributions are equal.

  Raises:
    ValueError: shapes that do not correspond, two vocabulary sizes without
      `vocab_size`, a temperature that is not positive.
    TypeError: logits are not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> float(forward_kl(jnp.ones((1, 4)), jnp.zeros((1, 4)))[0])
    0.0

  References:
    Hinton et al., Distilling the Knowledge in a Neural Network, 2015,
    arXiv:1503.02531, sec. 2, without the factor temperature^2.
  """
  log_q, log_p = _pair(
    "forward_kl", student_logits, teacher_logits, temperature, vocab_size
  )
  _log_space.check_support("forward_kl", "teacher", log_p, "student", log_q)
  return _log_space.kl(log_p, log_q)


def reverse_kl(
  student_logits: Float[Array, "*b v"],
  teacher_logits: Float[Array, "*b w"],
  *,
  temperature: Any = 1.0,
  vocab_size: int | None = None,
) -> Float[Array, "*b"]:
  """Reverse KL divergence, KL(student||teacher) = sum_v q (log q - log p).

  Differentiated through q and log q; the teacher is stop-gradient. This is the
  per-token loss of on-policy distillation with its full vocabulary.

  Args:
    student_logits: trained. Shape [*b, v].
    teacher_logits: frozen. Shape [*b, v].
    temperature: divides both logits; > 0.
    vocab_size: as in `forward_kl`.

  Returns:
    Nats, shape [*b], unreduced; >= 0, and 0 where the distributions are equal.

  Raises:
    ValueError: as in `forward_kl`.
    TypeError: logits are not floating.

  References:
    Gu et al., MiniLLM, 2023, arXiv:2306.08543, eq. 1 (here per token).
  """
  log_q, log_p = _pair(
    "reverse_kl", student_logits, teacher_logits, temperature, vocab_size
  )
  _log_space.check_support("reverse_kl", "student", log_q, "teacher", log_p)
  return _log_space.kl(log_q, log_p)


def generalized_jsd(
  student_logits: Float[Array, "*b v"],
  teacher_logits: Float[Array, "*b w"],
  *,
  beta: float | int = 0.5,
  temperature: Any = 1.0,
  vocab_size: int | None = None,
) -> Float[Array, "*b"]:
  """Generalised Jensen-Shannon divergence of GKD.

  m = beta p + (1 - beta) q;  beta KL(p||m) + (1 - beta) KL(q||m).
  beta = 0 is forward KL and beta = 1 reverse KL, exactly, in branches of their
  own. The value jumps there: inside (0, 1) it tends to beta * forward KL as
  beta -> 0 and to (1 - beta) * reverse KL as beta -> 1. Teacher stop-gradient.

  Args:
    student_logits: trained. Shape [*b, v].
    teacher_logits: frozen. Shape [*b, v].
    beta: weight of the teacher in the mixture, a Python number in [0, 1].
    temperature: divides both logits; > 0.
    vocab_size: as in `forward_kl`.

  Returns:
    Nats, shape [*b], unreduced; inside (0, 1) between 0 and the entropy of
    (beta, 1 - beta), and finite even where the supports differ.

  Raises:
    ValueError: beta outside [0, 1] or not a Python number; else as in
      `forward_kl`.
    TypeError: logits are not floating.

  References:
    Agarwal et al., GKD, 2023, arXiv:2306.13649, eq. 1; the ends as in TRL.
  """
  fn = "generalized_jsd"
  _log_space.check_number(fn, "beta", beta, 0, 1)
  log_q, log_p = _pair(
    fn, student_logits, teacher_logits, temperature, vocab_size
  )
  return _log_space.jsd(log_q, log_p, beta)


def skew_forward_kl(
  student_logits: Float[Array, "*b v"],
  teacher_logits: Float[Array, "*b w"],
  *,
  alpha: float | int = 0.1,
  temperature: Any = 1.0,
  vocab_size: int | None = None,
) -> Float[Array, "*b"]:
  """Skew forward KL, KL(p || alpha p + (1 - alpha) q).

  alpha = 0 is forward KL and alpha = 1 is 0, exactly. Bounded by
  log(1 / alpha), and so is its gradient where q is near 0 on a mode of p.
  Teacher stop-gradient, also inside the mixture.

  Args:
    student_logits: trained. Shape [*b, v].
    teacher_logits: frozen. Shape [*b, v].
    alpha: weight of the teacher in the mixture, a Python number in [0, 1].
    temperature: divides both logits; > 0.
    vocab_size: as in `forward_kl`.

  Returns:
    Nats, shape [*b], unreduced; >= 0, and 0 where the distributions are equal.

  Raises:
    ValueError: alpha outside [0, 1] or not a Python number; else as in
      `forward_kl`.
    TypeError: logits are not floating.

  References:
    Ko et al., DistiLLM, 2024, arXiv:2402.03898, eq. 4. The released code drops
    the teacher's entropy (a constant); this is the divergence itself.
  """
  return _skew(
    "skew_forward_kl",
    student_logits,
    teacher_logits,
    alpha,
    temperature,
    vocab_size,
    forward=True,
  )


def skew_reverse_kl(
  student_logits: Float[Array, "*b v"],
  teacher_logits: Float[Array, "*b w"],
  *,
  alpha: float | int = 0.1,
  temperature: Any = 1.0,
  vocab_size: int | None = None,
) -> Float[Array, "*b"]:
  """Skew reverse KL, KL(q || (1 - alpha) p + alpha q).

  alpha = 0 is reverse KL and alpha = 1 is 0, exactly. Bounded by
  log(1 / alpha). Differentiated through both places of q; teacher
  stop-gradient.

  Args:
    student_logits: trained. Shape [*b, v].
    teacher_logits: frozen. Shape [*b, v].
    alpha: weight of the student in the mixture, a Python number in [0, 1].
    temperature: divides both logits; > 0.
    vocab_size: as in `forward_kl`.

  Returns:
    Nats, shape [*b], unreduced; >= 0, and 0 where the distributions are equal.

  Raises:
    ValueError: alpha outside [0, 1] or not a Python number; else as in
      `forward_kl`.
    TypeError: logits are not floating.

  References:
    Ko et al., DistiLLM, 2024, arXiv:2402.03898, sec. 3.1.
  """
  return _skew(
    "skew_reverse_kl",
    student_logits,
    teacher_logits,
    alpha,
    temperature,
    vocab_size,
    forward=False,
  )


def _skew(
  fn, student_logits, teacher_logits, alpha, temperature, vocab_size, *, forward
):
  _log_space.check_number(fn, "alpha", alpha, 0, 1)
  log_q, log_p = _pair(
    fn, student_logits, teacher_logits, temperature, vocab_size
  )
  first, second = (log_p, log_q) if forward else (log_q, log_p)
  if alpha == 1:
    return jnp.zeros(first.shape[:-1], first.dtype)
  if alpha > 0:
    second = _log_space.log_mix(first, second, alpha)
  return _log_space.kl(first, second)


def total_variation(
  student_logits: Float[Array, "*b v"],
  teacher_logits: Float[Array, "*b w"],
  *,
  temperature: Any = 1.0,
  vocab_size: int | None = None,
) -> Float[Array, "*b"]:
  """Total variation distance, 0.5 sum_v |p - q|.

  Teacher stop-gradient; the gradient is 0 at a token where p = q.

  Args:
    student_logits: trained. Shape [*b, v].
    teacher_logits: frozen. Shape [*b, v].
    temperature: divides both logits; > 0.
    vocab_size: as in `forward_kl`.

  Returns:
    Shape [*b], unreduced, in [0, 1]; 0 where the distributions are equal and 1
    where their supports are disjoint.

  Raises:
    ValueError: as in `forward_kl`.
    TypeError: logits are not floating.

  References:
    Wen et al., f-divergence minimization for sequence-level KD, 2023,
    arXiv:2307.15190, sec. 3.3.
  """
  log_q, log_p = _pair(
    "total_variation", student_logits, teacher_logits, temperature, vocab_size
  )
  return 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)


def adaptive_kl(
  student_logits: Float[Array, "*b v"],
  teacher_logits: Float[Array, "*b w"],
  *,
  mu: float | int = 0.5,
  temperature: Any = 1.0,
  vocab_size: int | None = None,
) -> Float[Array, "*b"]:
  """Adaptive KL: forward and reverse KL weighed by where the models differ.

  The head is the teacher's largest tokens until their mass exceeds mu (the
  token that crosses mu belongs to the tail, the largest one always to the
  head); g_h and g_t are sum |p - q| over head and tail, stop-gradient:

    g_h / (g_h + g_t) KL(p||q) + g_t / (g_h + g_t) KL(q||p)

  Forward KL fits the head faster and reverse KL the tail. Where the models
  agree both weights are 1/2. Teacher stop-gradient.

  Args:
    student_logits: trained. Shape [*b, v].
    teacher_logits: frozen. Shape [*b, v].
    mu: mass of the head, a Python number in [0, 1].
    temperature: divides both logits; > 0.
    vocab_size: as in `forward_kl`.

  Returns:
    Nats, shape [*b], unreduced; >= 0, and 0 where the distributions are equal.

  Raises:
    ValueError: mu outside [0, 1]; else as in `forward_kl`.
    TypeError: logits are not floating.

  References:
    Wu et al., Rethinking KL divergence in KD for LLMs, 2024, arXiv:2404.02657,
    eq. 13-15; departures from the official code: none.
  """
  fn = "adaptive_kl"
  _log_space.check_number(fn, "mu", mu, 0, 1)
  log_q, log_p = _pair(
    fn, student_logits, teacher_logits, temperature, vocab_size
  )
  p = jnp.exp(log_p)
  gap = jax.lax.stop_gradient(jnp.abs(p - jnp.exp(log_q)))
  sorted_p, sorted_gap = jax.lax.sort((-p, gap), num_keys=1)
  tail = jnp.cumsum(-sorted_p, axis=-1) > mu
  tail = tail.at[..., 0].set(False)
  tail_gap = jnp.sum(jnp.where(tail, sorted_gap, 0), axis=-1)
  total_gap = jnp.sum(gap, axis=-1)
  equal = total_gap == 0
  tail_weight = jnp.where(equal, 0.5, tail_gap / jnp.where(equal, 1, total_gap))
  return (1 - tail_weight) * _log_space.kl(log_p, log_q) + (
    tail_weight * _log_space.kl(log_q, log_p)
  )


def teacher_confidence(
  teacher_logits: Float[Array, "*b v"],
  where: Bool[Array, "*b"] | None = None,
  *,
  labels: Int[Array, "*b"] | None = None,
  kind: Literal["entropy", "label"] = "entropy",
  k: float | int = 16,
  per: Literal["batch", "token"] = "batch",
  vocab_size: int | None = None,
  axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, "..."]:
  """How sure the teacher is, in [0, 1]: the weight of `entropy_aware_kl`.

    kind="entropy":  clip(1 - mean H(p) / log k, 0, 1)
    kind="label":    clip(mean p[label], 0, 1)          (BitDistiller's form)

  at temperature 1 over the whole vocabulary: k only sets the scale, it cuts
  nothing. The mean is over the valid tokens of a sequence and then over
  sequences, so short sequences weigh more; a sequence without valid tokens
  counts 0. No gradient.

  Args:
    teacher_logits: Shape [*b, v]; the last axis of *b is a sequence's length.
    where: valid tokens; None means all. Shape [*b].
    labels: the right token ids, for kind="label". Shape [*b].
    kind: "entropy" or "label".
    k: > 1; entropy log k is no confidence at all.
    per: "batch" for one number, "token" for one a token (ours: no mean).
    vocab_size: number of real tokens; None means all.
    axis_name: mapped axis or axes of the batch, inside shard_map or pmap.

  Returns:
    A scalar, or [*b] for per="token".

  Raises:
    ValueError: an unknown option, k <= 1, missing labels, wrong shapes.

  References:
    EdgeRazor, 2026, arXiv:2605.04062; BitDistiller, 2024, arXiv:2402.10631.
  """
  fn = "teacher_confidence"
  _checks.one_of(fn, "kind", kind, ("entropy", "label"))
  _checks.one_of(fn, "per", per, ("batch", "token"))
  (logits,) = _log_space.promote(
    *_log_space.trim(fn, vocab_size, teacher_logits=teacher_logits)
  )
  _checks.boolean(fn, where=where)
  b = logits.shape[:-1]
  if where is not None:
    _checks.shape(fn, "where", where, b, "[*b]", "teacher_logits")
  log_p = jax.lax.stop_gradient(_log_space.log_probs(logits))
  if kind == "entropy":
    _log_space.check_number(fn, "k", k, 1, open_low=True)
    value = -_log_space.expectation(log_p, log_p)
  else:
    if labels is None:
      _checks.fail(fn, "labels", "token ids for kind='label'", None)
    _checks.integer(fn, labels=labels)
    _checks.shape(fn, "labels", labels, b, "[*b]", "teacher_logits")
    ids = jnp.clip(labels, 0, logits.shape[-1] - 1)
    value = jnp.exp(_log_space.take(log_p, ids[..., None])[..., 0])
  where = jnp.ones(b, bool) if where is None else where
  value = jnp.where(where, value, 0)
  if per == "batch":
    if value.ndim:
      count = jnp.sum(where, axis=-1, dtype=value.dtype)
      value = jnp.sum(value, axis=-1) / jnp.maximum(count, 1)
    total = jnp.sum(value)
    rows = jnp.asarray(value.size, value.dtype)
    if axis_name is not None:
      total = jax.lax.psum(total, axis_name)
      rows = jax.lax.psum(rows, axis_name)
    value = total / jnp.maximum(rows, 1)
  if kind == "entropy":
    value = 1 - value / math.log(k)
  return jnp.clip(value, 0, 1)


def entropy_aware_kl(
  student_logits: Float[Array, "*b v"],
  teacher_logits: Float[Array, "*b w"],
  where: Bool[Array, "*b"] | None = None,
  *,
  labels: Int[Array, "*b"] | None = None,
  confidence: Any = "entropy",
  k: float | int = 16,
  per: Literal["batch", "token"] = "batch",
  temperature: Any = 1.0,
  min_prob: float | int = 1e-8,
  vocab_size: int | None = None,
  axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, "*b"]:
  """Slides from forward to reverse KL as the teacher gets more confident.

    gamma KL(q||p) + (1 - gamma) KL(p||q),  gamma = `teacher_confidence(...)`

  gamma is at temperature 1 and without gradient: a sure teacher is followed to
  its mode, an unsure one is covered. As in the official code both KLs are those
  of max(p, min_prob) and max(q, min_prob), not renormalised (gradient 0 where
  q is clipped); min_prob=0 gives the exact KLs. No temperature^2 (the official
  code multiplies by it) and no floor under the temperature (there 0.1).
  Teacher stop-gradient.

  Args:
    student_logits: trained. Shape [*b, v].
    teacher_logits: frozen. Shape [*b, v].
    where: valid tokens: they enter gamma, and the mask is yours to apply once
      more in the reduction. None means all. Shape [*b].
    labels: right token ids, for confidence="label". Shape [*b].
    confidence: "entropy", "label", or gamma itself in [0, 1] (a number, or an
      array that broadcasts against [*b]).
    k: scale of the entropy, see `teacher_confidence`.
    per: "batch" (official) or "token" (ours).
    temperature: divides both logits of the KLs; > 0.
    min_prob: floor of the probabilities, in [0, 1).
    vocab_size: as in `forward_kl`.
    axis_name: mapped axis or axes of the batch, inside shard_map or pmap.

  Returns:
    Nats, shape [*b], unreduced; 0 where the distributions are equal.

  Raises:
    ValueError: an unknown option, gamma outside [0, 1], missing labels; else as
      in `forward_kl`.
    TypeError: logits are not floating.

  References:
    EdgeRazor, 2026, arXiv:2605.04062 (read from the official code).
  """
  fn = "entropy_aware_kl"
  log_q, log_p = _pair(
    fn, student_logits, teacher_logits, temperature, vocab_size
  )
  _log_space.check_number(fn, "min_prob", min_prob, 0, 1, open_high=True)
  if isinstance(confidence, str):
    _checks.one_of(fn, "confidence", confidence, ("entropy", "label"))
    gamma = teacher_confidence(
      jnp.asarray(teacher_logits)[..., : log_p.shape[-1]],
      where,
      labels=labels,
      kind=confidence,
      k=k,
      per=per,
      axis_name=axis_name,
    )
  else:
    _checks.in_range(fn, "confidence", confidence, 0, 1)
    gamma = jax.lax.stop_gradient(jnp.asarray(confidence))
  gamma = jnp.broadcast_to(gamma.astype(log_q.dtype), log_q.shape[:-1])
  if min_prob == 0:
    reverse = _log_space.kl(log_q, log_p)
    forward = _log_space.kl(log_p, log_q)
  else:
    q = jnp.maximum(jnp.exp(log_q), min_prob)
    p = jnp.maximum(jnp.exp(log_p), min_prob)
    log_gap = jnp.log(q) - jnp.log(p)
    reverse = jnp.sum(q * log_gap, axis=-1)
    forward = -jnp.sum(p * log_gap, axis=-1)
  return gamma * reverse + (1 - gamma) * forward


def temper_log_probs(
  log_probs: Float[Array, "*b k"],
  log_normalizer: Any,
  *,
  temperature: Any,
) -> Float[Array, "*b k"]:
  """Cached top-k log-probabilities at another temperature, exactly.

    log p_i^(1/T) - log sum_v p_v^(1/T)

  Top-k alone does not determine the tail's mass at another temperature, so a
  cache stores log_normalizer = log sum_v p_v^(1/T) over the whole vocabulary
  for every T it will be used at. Frozen: no gradient.

  Args:
    log_probs: log-probabilities at temperature 1 under the full softmax. Shape
      [*b, k].
    log_normalizer: the stored value for this temperature, shape [*b]; or the
      cache's dict {temperature: [*b]}, in which a temperature that was not
      stored is refused by name.
    temperature: T > 0, a Python number.

  Returns:
    Log-probabilities at temperature T under the full softmax, shape [*b, k].

  Raises:
    ValueError: a temperature that was not stored, or shapes that do not
      correspond; in debug mode a row whose mass exceeds 1.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> log_p = jax.nn.log_softmax(jnp.arange(4.0))
    >>> norm = jax.nn.logsumexp(log_p / 2.0)
    >>> bool(jnp.allclose(temper_log_probs(log_p, norm, temperature=2.0),
    ...                   jax.nn.log_softmax(jnp.arange(4.0) / 2.0), atol=1e-6))
    True

  References:
    None: an identity; the cache that stores the normaliser is ours.
  """
  fn = "temper_log_probs"
  _checks.floating(fn, log_probs=log_probs)
  _checks.min_rank(fn, "log_probs", log_probs, 1, "[*b, k]")
  _log_space.check_number(
    fn, "temperature", temperature, 0, math.inf, open_low=True, open_high=True
  )
  if isinstance(log_normalizer, Mapping):
    if temperature not in log_normalizer:
      stored = ", ".join(f"{t:g}" for t in log_normalizer) or "none"
      _checks.fail(
        fn,
        "temperature",
        f"one that the cache has a log_normalizer for ({stored})",
        temperature,
      )
    log_normalizer = log_normalizer[temperature]
  _checks.floating(fn, log_normalizer=log_normalizer)
  _checks.shape(
    fn,
    "log_normalizer",
    log_normalizer,
    jnp.shape(log_probs)[:-1],
    "[*b]",
    "log_probs",
  )
  log_probs, log_normalizer = _log_space.promote(log_probs, log_normalizer)
  out = log_probs / temperature - log_normalizer[..., None]
  _check_mass(fn, "log_normalizer", out)
  return jax.lax.stop_gradient(out)


def _check_mass(fn: str, name: str, log_probs: Array) -> None:
  """Debug mode: no row of probabilities sums to more than 1."""
  _checks.holds(
    fn,
    name,
    log_probs,
    lambda x: jnp.sum(jnp.exp(x), axis=-1) <= 1 + 1e-4,
    "such that no row's probabilities sum to more than 1",
  )


def _sparse_sides(
  fn: str,
  student_logits: Any,
  teacher_ids: Any,
  teacher_log_probs: Any,
  temperature: Any,
  tail: str,
  vocab_size: int | None,
) -> tuple[Array, Array]:
  """(log q, log p) over the k tokens and, for the bucket, the rest."""
  _checks.one_of(fn, "tail", tail, ("bucket", "renormalize", "drop"))
  _log_space.check_temperature(fn, temperature)
  (student,) = _log_space.trim(fn, vocab_size, student_logits=student_logits)
  _checks.integer(fn, teacher_ids=teacher_ids)
  _checks.floating(fn, teacher_log_probs=teacher_log_probs)
  _checks.min_rank(fn, "teacher_ids", teacher_ids, 1, "[*b, k]")
  k, v = jnp.shape(teacher_ids)[-1], student.shape[-1]
  if not 1 <= k <= v:
    _checks.fail(
      fn,
      "teacher_ids",
      f"[*b, k] with 1 <= k <= {v}, the vocabulary",
      f"k={k}",
    )
  _checks.shape(
    fn,
    "teacher_ids",
    teacher_ids,
    student.shape[:-1] + (k,),
    "[*b, k]",
    "student_logits",
  )
  _checks.shape(
    fn,
    "teacher_log_probs",
    teacher_log_probs,
    jnp.shape(teacher_ids),
    "[*b, k]",
    "teacher_ids",
  )
  teacher_ids = jnp.asarray(teacher_ids)
  _checks.holds(
    fn,
    "teacher_ids",
    teacher_ids,
    lambda i: (i >= 0) & (i < v),
    f"in [0, {v - 1}], ids of the vocabulary",
  )
  _checks.holds(
    fn,
    "teacher_ids",
    jnp.sort(teacher_ids, axis=-1),
    lambda i: jnp.all(i[..., 1:] != i[..., :-1], axis=-1),
    "distinct within a row",
  )
  _checks.holds(
    fn,
    "teacher_log_probs",
    teacher_log_probs,
    lambda x: jnp.logical_not(jnp.isnan(x)),
    "free of NaN",
  )
  _check_mass(fn, "teacher_log_probs", teacher_log_probs)
  student, log_p = _log_space.promote(student, teacher_log_probs)
  log_p = jax.lax.stop_gradient(log_p)
  log_q = _log_space.log_probs(student, temperature)
  if tail == "bucket":
    log_q = _log_space.with_tail(log_q, teacher_ids)
    if k < v:
      rest = _log_space.log1mexp(_log_space.logsumexp(log_p))
      log_p = jnp.concatenate([log_p, rest[..., None]], axis=-1)
  elif tail == "renormalize":
    log_q = _log_space.renormalized(log_q, teacher_ids)
    log_p = jax.nn.log_softmax(log_p, axis=-1)
  else:
    log_q = _log_space.take(log_q, teacher_ids)
  return log_q, log_p


def sparse_forward_kl(
  student_logits: Float[Array, "*b v"],
  teacher_ids: Int[Array, "*b k"],
  teacher_log_probs: Float[Array, "*b k"],
  *,
  temperature: Any = 1.0,
  tail: Tail = "bucket",
  vocab_size: int | None = None,
) -> Float[Array, "*b"]:
  """Forward KL against a teacher of which only k tokens are known.

  With the student's full softmax q (at `temperature`) and the teacher's full
  softmax p at the same temperature, known on k ids:

    tail="bucket"       KL over k + 1 outcomes, the rest of both as the last one
    tail="renormalize"  both sides rescaled to sum to 1 over the k ids
    tail="drop"         sum over the k ids of p (log p - log q), nothing else

  The bucket is a lower bound of the full KL and equal to it at k = v;
  renormalize lets the student move its mass off the k ids unseen; drop is not
  a divergence (it may be negative) but has the gradient of the cross entropy.
  Teacher stop-gradient.

  Args:
    student_logits: trained. Shape [*b, v].
    teacher_ids: distinct token ids, in any order. Shape [*b, k].
    teacher_log_probs: log-probabilities of these ids under the teacher's FULL
      softmax at the same temperature (`temper_log_probs`). Shape [*b, k].
    temperature: divides the student's logits; > 0.
    tail: "bucket", "renormalize" or "drop".
    vocab_size: number of real tokens of the student; None means all.

  Returns:
    Nats, shape [*b], unreduced; >= 0 except for tail="drop".

  Raises:
    ValueError: shapes that do not correspond, k > v, an unknown tail; in debug
      mode ids outside the vocabulary, duplicate ids, mass above 1, NaN.
    TypeError: ids are not integers, or the others are not floating.

  References:
    Card lm_kd_divergences ("tail bucket", "renormalise both"); the bucket as
    in DistillKit at the temperature of the capture. "zero tail" there is
    tail="drop" with teacher_log_probs renormalised beforehand.
  """
  fn = "sparse_forward_kl"
  log_q, log_p = _sparse_sides(
    fn,
    student_logits,
    teacher_ids,
    teacher_log_probs,
    temperature,
    tail,
    vocab_size,
  )
  return _log_space.kl(log_p, log_q)


def sparse_reverse_kl(
  student_logits: Float[Array, "*b v"],
  teacher_ids: Int[Array, "*b k"],
  teacher_log_probs: Float[Array, "*b k"],
  *,
  temperature: Any = 1.0,
  tail: Tail = "bucket",
  vocab_size: int | None = None,
) -> Float[Array, "*b"]:
  """Reverse KL against a teacher of which only k tokens are known.

  As `sparse_forward_kl` with sum q (log q - log p) over k + 1 outcomes, over
  the k ids with both sides rescaled, or over the k ids alone. The mass a
  teacher leaves for its bucket is known to the rounding of 1 - sum p only, so
  log p of the bucket is at least log of the dtype's epsilon.

  Args:
    student_logits: trained. Shape [*b, v].
    teacher_ids: distinct token ids, in any order. Shape [*b, k].
    teacher_log_probs: log-probabilities under the teacher's FULL softmax at the
      same temperature. Shape [*b, k].
    temperature: divides the student's logits; > 0.
    tail: "bucket", "renormalize" or "drop".
    vocab_size: number of real tokens of the student; None means all.

  Returns:
    Nats, shape [*b], unreduced; >= 0 except for tail="drop".

  Raises:
    ValueError: as in `sparse_forward_kl`.
    TypeError: as in `sparse_forward_kl`.

  References:
    Card lm_kd_divergences; the bucket as in SDPO, arXiv:2601.20802.
  """
  fn = "sparse_reverse_kl"
  log_q, log_p = _sparse_sides(
    fn,
    student_logits,
    teacher_ids,
    teacher_log_probs,
    temperature,
    tail,
    vocab_size,
  )
  if log_p.shape[-1] > jnp.shape(teacher_ids)[-1]:
    floor = math.log(float(jnp.finfo(log_p.dtype).eps))
    log_p = log_p.at[..., -1].max(floor)
  return _log_space.kl(log_q, log_p)


__all__ = [
  "adaptive_kl",
  "entropy",
  "entropy_aware_kl",
  "forward_kl",
  "generalized_jsd",
  "reverse_kl",
  "skew_forward_kl",
  "skew_reverse_kl",
  "sparse_forward_kl",
  "sparse_reverse_kl",
  "teacher_confidence",
  "temper_log_probs",
  "total_variation",
]
