"""Token credit from evidence, and self-distillation with extra context.

One model plays student and teacher: the teacher reads the same rollout with
something more in its prompt (the right answer, a wrong answer, a worked
solution, the student's own attempt). Log-probabilities are those of the sampled
tokens, [b, l]; logits are [*b, v]; `where` marks response tokens; teachers are
stop-gradient, so no answer can leak into the weights except through credit.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from distilljax import _checks
from distilljax.losses import _log_space
from distilljax.typing import Array, Bool, Float, Int, Scalar

# exp(20) is far outside every band; exp(100) would be inf in float32.
_MAX_EXPONENT = 20.0


def _same_group(fn: str, values: Any, group_ids: Any, name: str) -> Array:
  """[b, b]: which rows belong to one group."""
  _checks.floating(fn, **{name: values})
  _checks.rank(fn, name, values, 1, "[b]")
  _checks.integer(fn, group_ids=group_ids)
  _checks.per_row(fn, name, values, group_ids=group_ids)
  group_ids = jnp.asarray(group_ids)
  return group_ids[:, None] == group_ids[None, :]


def group_advantages(
  rewards: Float[Array, "b"],
  group_ids: Int[Array, "b"],
  *,
  eps: float | int | Scalar = 1e-6,
  unbiased: bool = True,
) -> Float[Array, "b"]:
  """Rewards normalised within the rollouts of one prompt (GRPO).

    A_i = (R_i - mean_group) / (std_group + eps)

  0 where all rewards of a group are equal, also for a group of one. No
  gradient. Groups are compared by id, in [b, b] memory; rows need no order.

  Args:
    rewards: Shape [b].
    group_ids: prompt of each rollout, any integers. Shape [b].
    eps: >= 0, beside the standard deviation.
    unbiased: divides the squares by n - 1 (as torch's std), not n.

  Returns:
    Shape [b], unit-free, without gradient.

  Raises:
    ValueError: shapes that differ or a negative eps; in debug mode NaN rewards.

  Example:
    >>> import jax.numpy as jnp
    >>> a = group_advantages(jnp.array([0., 1.]), jnp.array([7, 7]), eps=0.0)
    >>> [round(float(x), 4) for x in a]
    [-0.7071, 0.7071]

  References:
    DeepSeekMath (GRPO), 2024, arXiv:2402.03300; defaults as in CEPO,
    arXiv:2605.19436.
  """
  fn = "group_advantages"
  _checks.in_range(fn, "eps", eps, 0)
  same = _same_group(fn, rewards, group_ids, "rewards")
  _checks.finite(fn, rewards=rewards)
  (rewards,) = _log_space.promote(rewards)
  count = jnp.sum(same, axis=1, dtype=rewards.dtype)
  others = jnp.broadcast_to(rewards[None, :], same.shape)
  mean = jnp.sum(jnp.where(same, others, 0), axis=1) / count
  square = jnp.where(same, (others - mean[:, None]) ** 2, 0)
  degrees = jnp.maximum(count - 1, 1) if unbiased else count
  std = jnp.sqrt(jnp.sum(square, axis=1) / degrees)
  # Told by comparison: rounding of the mean over eps would be a number.
  equal = jnp.all(~same | (others == rewards[:, None]), axis=1)
  out = (rewards - mean) / jnp.where(equal, 1, std + eps)
  return jax.lax.stop_gradient(jnp.where(equal, 0, out))


def pick_negative(
  scores: Float[Array, "b"],
  group_ids: Int[Array, "b"],
  *,
  threshold: float | int | Scalar = 0.5,
  leave_one_out: bool = True,
) -> Int[Array, "b"]:
  """Which rollout's answer serves each row as the wrong one: the group's worst.

  Candidates are the rejected rollouts (score < threshold) of the same group;
  the lowest score wins, then the earlier row. leave_one_out (ours) gives that
  worst rollout itself the second worst: scored with its own answer in the
  prompt, its evidence would be biased down.

  Args:
    scores: rewards. Shape [b].
    group_ids: prompt of each rollout. Shape [b].
    threshold: below it a rollout is rejected.
    leave_one_out: never a row's own answer; False is the official code.

  Returns:
    int32 row numbers, shape [b]; -1 where there is none.

  Raises:
    ValueError: shapes that differ.

  References:
    CEPO, 2026, arXiv:2605.19436.
  """
  same = _same_group("pick_negative", scores, group_ids, "scores")
  (scores,) = _log_space.promote(scores)
  candidate = same & (scores < threshold)[None, :]
  if leave_one_out:
    candidate &= ~jnp.eye(scores.shape[0], dtype=bool)
  ranked = jnp.where(candidate, scores[None, :], jnp.inf)
  index = jnp.argmin(ranked, axis=1).astype(jnp.int32)
  return jnp.where(jnp.any(candidate, axis=1), index, -1)


def pick_sibling(
  rewards: Float[Array, "b"],
  group_ids: Int[Array, "b"],
  *,
  threshold: float | int | Scalar = 0.5,
) -> Int[Array, "b"]:
  """The first OTHER rollout of the group that succeeded: SDPO's demonstration.

  Args:
    rewards: Shape [b].
    group_ids: prompt of each rollout. Shape [b].
    threshold: a success has reward >= threshold (.5; TRL 1.0).

  Returns:
    int32 row numbers, shape [b], never the row itself; -1 where there is none:
    such a row has no teacher signal and is masked.

  Raises:
    ValueError: shapes that differ.

  References:
    SDPO, 2026, arXiv:2601.20802.
  """
  same = _same_group("pick_sibling", rewards, group_ids, "rewards")
  (rewards,) = _log_space.promote(rewards)
  good = same & (rewards >= threshold)[None, :]
  good &= ~jnp.eye(rewards.shape[0], dtype=bool)
  index = jnp.argmax(good, axis=1).astype(jnp.int32)
  return jnp.where(jnp.any(good, axis=1), index, -1)


def evidence_mix(
  step: Any, *, mix: float | int = 0.5, decay_steps: int = 25
) -> Float[Array, ""]:
  """CEPO's schedule mix * max(0, 1 - step / decay_steps); then it is GRPO.

  Args:
    step: update number, from 0.
    mix: the first value, in [0, 1].
    decay_steps: >= 1.

  Returns:
    A float32 scalar.

  Raises:
    ValueError: an option out of range.

  References:
    CEPO, 2026, arXiv:2605.19436.
  """
  fn = "evidence_mix"
  _checks.in_range(fn, "mix", mix, 0, 1)
  _checks.in_range(fn, "decay_steps", decay_steps, 1)
  step = jnp.asarray(step).astype(jnp.float32)
  return mix * jnp.maximum(0, 1 - step / decay_steps)


def _reweight(
  fn: str,
  advantages: Any,
  where: Any,
  mix: Any,
  clip: Any,
  **log_probs: Any,
) -> tuple[Array, Array, list[Any]]:
  """Checked inputs: masked advantages, the mask, and the log-probabilities."""
  _checks.in_range(fn, "mix", mix, 0, 1)
  _checks.in_range(fn, "clip", clip, 0)
  _checks.rank(fn, "advantages", advantages, 2, "[b, l]")
  given = {"advantages": advantages, **log_probs}
  _checks.floating(fn, **given)
  _checks.same_shape(fn, **given, where=where)
  _checks.boolean(fn, where=where)
  where = jnp.asarray(where)
  masked = [
    None if a is None else jnp.where(where, jax.lax.stop_gradient(a), 0)
    for a in _log_space.promote(*given.values())
  ]
  for name, array in zip(given, masked):
    _checks.finite(fn, **{name: array})
  return masked[0], where, masked[1:]


def _banded(advantages: Array, delta: Array, mix: Any, clip: Any) -> Array:
  """A [(1 - mix) + mix clip(exp(s delta), 1 - clip, 1 + clip)]."""
  sign = jnp.sign(jnp.sum(advantages, axis=1, keepdims=True))
  weight = jnp.exp(jnp.clip(sign * delta, -_MAX_EXPONENT, _MAX_EXPONENT))
  weight = jnp.clip(weight, 1 - clip, 1 + clip)
  mix = jnp.asarray(mix, advantages.dtype)
  return advantages * ((1 - mix) + mix * weight)


def contrastive_evidence_advantages(
  advantages: Float[Array, "b l"],
  positive_log_probs: Float[Array, "b l"],
  negative_log_probs: Float[Array, "b l"],
  where: Bool[Array, "b l"],
  *,
  mix: Any = 0.5,
  clip: float | int | Scalar = 0.2,
  has_negative: Bool[Array, "b"] | None = None,
  old_log_probs: Float[Array, "b l"] | None = None,
  fallback: Literal["rlsd", "grpo"] = "rlsd",
) -> Float[Array, "b l"]:
  """CEPO: gives each token of a rollout its share of the rollout's advantage.

    delta_t = log P(y_t | right answer) - log P(y_t | wrong answer)
    s = sign(sum_t A_t),   w_t = clip(exp(s delta_t), 1 - clip, 1 + clip)
    A'_t = A_t [(1 - mix) + mix w_t]

  A token that only the right answer likes is decisive; one that both like is
  filler and keeps A. For a wrong rollout (s = -1) tokens the right answer
  favours are punished LESS. Guaranteed: A' has the sign of A; |A'/A| lies in
  [1 - mix clip, 1 + mix clip]; mix = 0 is GRPO; delta = 0 changes nothing; a
  group with equal rewards stays 0; nothing here has a gradient.

  Args:
    advantages: `group_advantages` spread over the tokens. Shape [b, l].
    positive_log_probs: with the right answer in the prompt. Shape [b, l].
    negative_log_probs: with the wrong one (`pick_negative`). Shape [b, l].
    where: response tokens. Shape [b, l].
    mix: lambda in [0, 1], may be traced (`evidence_mix`).
    clip: half width of the band, >= 0.
    has_negative: rows with a wrong answer; None means all. The others' entries
      of negative_log_probs are not looked at. Shape [b].
    old_log_probs: of the rollout without any answer, for fallback="rlsd". Shape
      [b, l].
    fallback: for rows without a wrong answer: "rlsd" sets delta = log P(right)
      - log P_old (the paper's README), "grpo" delta = 0 (its code). Log how
      often it fires.

  Returns:
    Shape [b, l], 0 outside `where`, without gradient.

  Raises:
    ValueError: an option out of range, shapes that differ, fallback="rlsd" with
      has_negative but without old_log_probs.

  References:
    CEPO, 2026, arXiv:2605.19436. Departures from the official code: the
    exponent is clipped to +-20 before exp.
  """
  fn = "contrastive_evidence_advantages"
  _checks.one_of(fn, "fallback", fallback, ("rlsd", "grpo"))
  if has_negative is not None and fallback == "rlsd" and old_log_probs is None:
    _checks.fail(
      fn, "old_log_probs", "given for has_negative with fallback='rlsd'", None
    )
  if has_negative is not None:
    _checks.boolean(fn, has_negative=has_negative)
    _checks.per_row(fn, "advantages", advantages, has_negative=has_negative)
    known = jnp.asarray(has_negative)[:, None]
    negative_log_probs = jnp.where(known, negative_log_probs, 0)
  advantages, _, (positive, negative, old) = _reweight(
    fn,
    advantages,
    where,
    mix,
    clip,
    positive_log_probs=positive_log_probs,
    negative_log_probs=negative_log_probs,
    old_log_probs=old_log_probs,
  )
  delta = positive - negative
  if has_negative is not None:
    spare = positive - old if fallback == "rlsd" else jnp.zeros_like(delta)
    delta = jnp.where(known, delta, spare)
  return _banded(advantages, delta, mix, clip)


def self_evidence_advantages(
  advantages: Float[Array, "b l"],
  old_log_probs: Float[Array, "b l"],
  positive_log_probs: Float[Array, "b l"],
  where: Bool[Array, "b l"],
  *,
  mix: Any = 0.5,
  clip: float | int | Scalar = 0.2,
) -> Float[Array, "b l"]:
  """RLSD: as CEPO, with the right answer held against no answer.

    delta_t = log P(y_t | right answer) - log P_old(y_t)

  and the weights of `contrastive_evidence_advantages`. Every token that copies
  the hint gets credit, filler too: what the contrast is for.

  Args:
    advantages: spread over the tokens. Shape [b, l].
    old_log_probs: of the rollout policy. Shape [b, l].
    positive_log_probs: with the right answer in the prompt. Shape [b, l].
    where: response tokens. Shape [b, l].
    mix: lambda in [0, 1], may be traced.
    clip: half width of the band, >= 0.

  Returns:
    Shape [b, l], 0 outside `where`, without gradient.

  Raises:
    ValueError: an option out of range or shapes that differ.

  References:
    RLSD, 2026, arXiv:2604.03128, as in the code of arXiv:2605.19436.
  """
  advantages, _, (old, positive) = _reweight(
    "self_evidence_advantages",
    advantages,
    where,
    mix,
    clip,
    old_log_probs=old_log_probs,
    positive_log_probs=positive_log_probs,
  )
  return _banded(advantages, positive - old, mix, clip)


def self_distillation_loss(
  student_logits: Float[Array, "*b v"],
  teacher_logits: Float[Array, "*b w"],
  *,
  alpha: float | int = 0.5,
  top_k: int | None = None,
  support: Literal["student", "teacher"] = "student",
  tail: Literal["bucket", "renormalize"] = "bucket",
  temperature: Any = 1.0,
  vocab_size: int | None = None,
) -> Float[Array, "*b"]:
  """On-policy self-distillation per token (OPSD, SDPO, SDFT).

  The generalised JSD of `divergence.generalized_jsd` with alpha in beta's
  place (0: KL(teacher||student), 1: KL(student||teacher), between: mixture with
  weight alpha on the teacher), over all tokens or over the top_k of one model:

    tail="bucket"       k + 1 outcomes, the rest of both as the last one
    tail="renormalize"  both rescaled to sum to 1 over the k ids: mass off the
                        ids is then unseen

  The ids are constants to the gradient. Teacher stop-gradient. SDPO multiplies
  each token by `truncated_importance_weights(..., cap=2.0)`.

  Args:
    student_logits: on (x, y_<t), trained. Shape [*b, v].
    teacher_logits: on (x, extra context, y_<t), the same response positions.
      Shape [*b, v].
    alpha: a Python number in [0, 1].
    top_k: number of tokens kept; None means all.
    support: whose top_k: "student" (SDPO) or "teacher" (OPSD).
    tail: "bucket" (SDPO) or "renormalize" (OPSD).
    temperature: divides both logits; OPSD 1.1.
    vocab_size: number of common tokens, as in `divergence.forward_kl`.

  Returns:
    Nats, shape [*b], unreduced; 0 for equal contexts; with top_k = v equal to
    the full form.

  Raises:
    ValueError: an unknown or out-of-range option, shapes that differ.

  References:
    OPSD, arXiv:2601.18734; SDPO, arXiv:2601.20802; SDFT, arXiv:2601.19897.
  """
  fn = "self_distillation_loss"
  _log_space.check_number(fn, "alpha", alpha, 0, 1)
  _checks.one_of(fn, "support", support, ("student", "teacher"))
  _checks.one_of(fn, "tail", tail, ("bucket", "renormalize"))
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
  if top_k is not None:
    _log_space.check_number(fn, "top_k", top_k, 1, log_q.shape[-1])
    owner = jax.lax.stop_gradient(log_q) if support == "student" else log_p
    _, ids = jax.lax.top_k(owner, top_k)
    cut = _log_space.with_tail
    if tail == "renormalize":
      cut = _log_space.renormalized
    log_q, log_p = cut(log_q, ids), cut(log_p, ids)
  return _log_space.jsd(log_q, log_p, alpha)


def sampled_reverse_kl(
  student_log_probs: Float[Array, "*b"],
  teacher_log_probs: Float[Array, "*b"],
) -> Float[Array, "*b"]:
  """Sampled-token form: stop_gradient(log s - log t) * log s.

  Its gradient is the REINFORCE gradient of KL(student||teacher) at the sampled
  token; its value means nothing.

  Args:
    student_log_probs: of the sampled tokens, differentiable. Shape [*b].
    teacher_log_probs: frozen. Shape [*b].

  Returns:
    Shape [*b], unreduced.

  Raises:
    ValueError: shapes that differ.

  References:
    SDPO, 2026, arXiv:2601.20802 (official code).
  """
  fn = "sampled_reverse_kl"
  given = {
    "student_log_probs": student_log_probs,
    "teacher_log_probs": teacher_log_probs,
  }
  _checks.floating(fn, **given)
  _checks.same_shape(fn, **given)
  student, teacher = _log_space.promote(*given.values())
  return jax.lax.stop_gradient(student - teacher) * student


def reviser_distillation_loss(
  student_logits: Float[Array, "*b v"],
  reviser_logits: Float[Array, "*b w"],
  *,
  top_k: int | None = 64,
  tail: Literal["bucket", "renormalize"] = "bucket",
  vocab_size: int | None = None,
) -> Float[Array, "*b"]:
  """SD-Zero's second phase: the reviser teaches the generator, per token.

    KL(student || stop_gradient(reviser)) over the student's top_k + tail

  The reviser is the frozen phase-1 model on (x, the whole attempt y, a phrase
  that says whether it was right), re-reading y token by token: its row for y_t
  sits further back than the student's, gather by response position.

  Args:
    student_logits: on (x, y_<t), trained. Shape [*b, v].
    reviser_logits: on (x, y, phrase, y_<t), frozen. Shape [*b, v].
    top_k: number of the student's tokens kept, at most v; None means all.
    tail: "bucket" or "renormalize".
    vocab_size: number of common tokens, as in `divergence.forward_kl`.

  Returns:
    Nats, shape [*b], unreduced, >= 0; average over tokens (our choice). Right
    attempts (r = 1) carry loss too: do not mask them.

  Raises:
    ValueError: as in `self_distillation_loss`.

  References:
    SD-Zero, 2026, arXiv:2604.12002: read from notes, no official code. K = 64
    is the paper's; student support, tail and token mean are our reconstruction.
  """
  fn = "reviser_distillation_loss"
  _checks.one_of(fn, "tail", tail, ("bucket", "renormalize"))
  student, reviser = _log_space.promote(
    *_log_space.trim(
      fn,
      vocab_size,
      student_logits=student_logits,
      reviser_logits=reviser_logits,
    )
  )
  if top_k is not None:
    _log_space.check_number(fn, "top_k", top_k, 1)
    # The default of 64 must not refuse a toy vocabulary: k = v is exact.
    top_k = min(top_k, student.shape[-1])
  return self_distillation_loss(
    student, reviser, alpha=1.0, top_k=top_k, support="student", tail=tail
  )


__all__ = [
  "contrastive_evidence_advantages",
  "evidence_mix",
  "group_advantages",
  "pick_negative",
  "pick_sibling",
  "reviser_distillation_loss",
  "sampled_reverse_kl",
  "self_distillation_loss",
  "self_evidence_advantages",
]
