"""On-policy distillation: estimators, advantages, thresholds, token choice.

Conventions of the file: every array of log-probabilities is that of the SAMPLED
tokens, [b, l] in nats (functions on logits say so); `where` marks the response
tokens that count; the student samples, so `student_log_probs` in an advantage
is the behaviour snapshot and carries no gradient. Everything is at least
float32, unreduced, and free of random numbers: a draw is an argument.

G-OPD, the core: with teacher T, reference R and reward_scale lambda

  maximise E_{y~S}[lambda log(T/R)] - KL(S||R)
  optimum  log S = lambda log T + (1 - lambda) log R + const

lambda = 1 is plain on-policy distillation (reverse KL to T, R cancels), lambda
> 1 extrapolates past the teacher, lambda = 0 goes back to the reference.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import _checks
from distilljax.losses import _log_space
from distilljax.typing import Array, Bool, Float, Int, Scalar

# exp of more than this is useless as a ratio in float32, and so is its mean.
_MAX_LOG_RATIO = 20.0


def _log_prob_arrays(fn: str, **arrays: Any) -> list[Any]:
  """Floating arrays of one shape, in one dtype; None is passed over."""
  _checks.floating(fn, **arrays)
  _checks.same_shape(fn, **arrays)
  for name, array in arrays.items():
    _checks.holds(
      fn,
      name,
      array,
      lambda x: jnp.logical_not(jnp.isnan(x) | (x == jnp.inf)),
      "free of NaN and +inf",
    )
  return _log_space.promote(*arrays.values())


def _where(fn: str, where: Any, like: str, reference: Array) -> Array:
  """`where` as a bool array of the reference's shape; None means all."""
  if where is None:
    return jnp.ones(reference.shape, bool)
  _checks.boolean(fn, where=where)
  _checks.shape(fn, "where", where, reference.shape, "[b, l]", like)
  return jnp.asarray(where)


# --- estimators --------------------------------------------------------------


def kl_estimate(
  student_log_probs: Float[Array, "*b"],
  teacher_log_probs: Float[Array, "*b"],
  *,
  kind: Literal["k1", "k2", "k3", "abs"],
  straight_through: bool = False,
  max_log_ratio: float | int | Scalar = 20.0,
  max_value: float | int | Scalar = 10.0,
) -> Float[Array, "*b"]:
  """Estimates KL(student||teacher) from tokens the student sampled.

  With d = log T(y) - log S(y), clipped to +-max_log_ratio:

    k1 = -d               unbiased value; its direct gradient has mean ZERO
    k2 = d^2 / 2          biased value, unbiased gradient
    k3 = exp(d) - 1 - d   unbiased value, >= 0; direct gradient: forward KL's;
                          clipped to +-max_value
    abs = |d|

  straight_through keeps the value and takes the gradient of k2, which is the
  right one: stop_gradient(k - k2) + k2. Teacher stop-gradient.

  Args:
    student_log_probs: of the sampled tokens, differentiable. Shape [*b].
    teacher_log_probs: of the same tokens, frozen. Shape [*b].
    kind: "k1", "k2", "k3" or "abs".
    straight_through: value of `kind`, gradient of k2.
    max_log_ratio: clip of d, > 0; the gradient is 0 beyond it.
    max_value: clip of k3, > 0; math.inf leaves its value unbiased.

  Returns:
    Nats, shape [*b], unreduced.

  Raises:
    ValueError: an unknown kind, shapes that differ, a clip that is not > 0.

  References:
    Schulman, Approximating KL divergence, 2020; clips as in verl (there on k3
    only).
  """
  fn = "kl_estimate"
  _checks.one_of(fn, "kind", kind, ("k1", "k2", "k3", "abs"))
  _checks.in_range(fn, "max_log_ratio", max_log_ratio, 0, open_low=True)
  _checks.in_range(fn, "max_value", max_value, 0, open_low=True)
  student, teacher = _log_prob_arrays(
    fn,
    student_log_probs=student_log_probs,
    teacher_log_probs=teacher_log_probs,
  )
  d = jnp.clip(
    jax.lax.stop_gradient(teacher) - student, -max_log_ratio, max_log_ratio
  )
  k2 = d * d / 2
  if kind == "k1":
    value = -d
  elif kind == "k2":
    value = k2
  elif kind == "k3":
    value = jnp.clip(jnp.expm1(d) - d, -max_value, max_value)
  else:
    value = jnp.abs(d)
  if straight_through:
    return jax.lax.stop_gradient(value - k2) + k2
  return value


def minillm_advantage(
  student_log_probs: Float[Array, "b l"],
  teacher_log_probs: Float[Array, "b l"],
  where: Bool[Array, "b l"] | None = None,
  *,
  gamma: float | int = 0.0,
  length_norm: bool = True,
  discount: Literal["relative", "absolute"] = "relative",
) -> Float[Array, "b l"]:
  """Discounted reverse-KL reward to go of MiniLLM.

    R_t = log T(y_t) - log S(y_t)
    A_t = sum_{i>=t} gamma^(i-t) R_i [/ sum_{i>=t} gamma^(i-t)]   over valid i

  All stop-gradient. gamma = 0 gives R_t. discount="absolute" weighs by gamma^i
  instead, as TRL does: with length_norm that cancels, without it A_t is smaller
  by gamma^t.

  Args:
    student_log_probs: behaviour snapshot. Shape [b, l].
    teacher_log_probs: Shape [b, l].
    where: response tokens; None means all. Shape [b, l].
    gamma: discount in [0, 1].
    length_norm: divides by the sum of the weights.
    discount: "relative" or "absolute".

  Returns:
    Shape [b, l], 0 outside `where`, without gradient.

  Raises:
    ValueError: gamma outside [0, 1], an unknown option, wrong shapes.

  References:
    Gu et al., MiniLLM, 2023, arXiv:2306.08543, eq. 3-5. Departures from TRL:
    padding does not count in the normaliser (there 1e-4 a position).
  """
  fn = "minillm_advantage"
  _log_space.check_number(fn, "gamma", gamma, 0, 1)
  _checks.one_of(fn, "discount", discount, ("relative", "absolute"))
  _checks.rank(fn, "student_log_probs", student_log_probs, 2, "[b, l]")
  student, teacher = _log_prob_arrays(
    fn,
    student_log_probs=student_log_probs,
    teacher_log_probs=teacher_log_probs,
  )
  where = _where(fn, where, "student_log_probs", student)
  reward = jnp.where(where, jax.lax.stop_gradient(teacher - student), 0)
  if gamma == 0:
    return reward
  # weight[t, i] = gamma^(i-t) for i >= t: one [l, l] table serves the batch.
  step = np.arange(student.shape[1])
  power = np.maximum(step[None, :] - step[:, None], 0)
  weight = jnp.asarray(
    np.where(step[None, :] >= step[:, None], float(gamma) ** power, 0.0),
    student.dtype,
  )
  out = jnp.matmul(reward, weight.T, precision="highest")
  if length_norm:
    total = jnp.matmul(where.astype(out.dtype), weight.T, precision="highest")
    out = out / jnp.where(where, total, 1)
  elif discount == "absolute":
    out = out * jnp.asarray(float(gamma) ** step, out.dtype)[None, :]
  return jnp.where(where, out, 0)


# --- G-OPD -------------------------------------------------------------------


def _scale_like(fn: str, reward_scale: Any, reference: Any) -> Any:
  """A number, or an array that is a leading part of the reference's shape."""
  if _checks.is_number(reward_scale):
    _checks.finite(fn, reward_scale=reward_scale)
    return jnp.asarray(reward_scale, reference.dtype)
  shape = jnp.shape(reward_scale)
  if shape != reference.shape[: len(shape)]:
    _checks.fail(
      fn,
      "reward_scale",
      f"a number or an array over the leading axes of {list(reference.shape)}",
      list(shape),
    )
  scale = jnp.asarray(reward_scale).astype(reference.dtype)
  return jax.lax.stop_gradient(_checks.expand_like(scale, reference))


def _needs_reference(fn: str, name: str, reference: Any, scale: Any) -> bool:
  """False at reward_scale 1, where it cancels; an error if it is missing."""
  if _checks.is_number(scale) and scale == 1:
    return False
  if reference is None:
    _checks.fail(
      fn,
      name,
      "given unless reward_scale is the number 1 (plain distillation)",
      "None with reward_scale="
      f"{scale if _checks.is_number(scale) else 'an array'}",
    )
  return True


def gopd_advantage(
  student_log_probs: Float[Array, "b l"],
  teacher_log_probs: Float[Array, "b l"],
  reference_log_probs: Float[Array, "b l"] | None,
  *,
  reward_scale: Any = 1.25,
  max_log_ratio: float | int | Scalar = 20.0,
) -> Float[Array, "b l"]:
  """Advantage of generalised on-policy distillation, of the sampled tokens.

    A = lambda (log T - log R) - (log S - log R)
      = (log T - log S) + (lambda - 1) (log T - log R)

  the negated integrand of the extrapolated KL: no baseline, no discount, no
  normalisation, all of it stop-gradient. log T - log R, which is noise where
  both are tiny, is clipped to +-max_log_ratio. lambda = 0 pulls the student
  back to the reference.

  Args:
    student_log_probs: of the BEHAVIOUR snapshot (or stop_gradient of the live
      student where batch and mini-batch are one). Shape [b, l].
    teacher_log_probs: Shape [b, l]; several teachers: `route_teacher`.
    reference_log_probs: student initialisation or the teacher's own base; None
      only at reward_scale 1. Shape [b, l].
    reward_scale: lambda; 1 is plain distillation, 1.25 ExOPD. A number, or an
      array [b] or [b, l] (per teacher, or capped by `cap_reward_scale`).
    max_log_ratio: clip of log T - log R; math.inf is the official code.

  Returns:
    Nats, shape [b, l], not masked, without gradient.

  Raises:
    ValueError: a missing reference at reward_scale != 1 (the official code
      falls back silently), or shapes that do not correspond.

  References:
    G-OPD, 2026, arXiv:2602.12125; same as ListOPD's, arXiv:2605.08737.
  """
  fn = "gopd_advantage"
  used = _needs_reference(
    fn, "reference_log_probs", reference_log_probs, reward_scale
  )
  _checks.in_range(fn, "max_log_ratio", max_log_ratio, 0, open_low=True)
  student, teacher, reference = _log_prob_arrays(
    fn,
    student_log_probs=student_log_probs,
    teacher_log_probs=teacher_log_probs,
    reference_log_probs=reference_log_probs,
  )
  out = teacher - student
  if used:
    scale = _scale_like(fn, reward_scale, student)
    reward = jnp.clip(teacher - reference, -max_log_ratio, max_log_ratio)
    out = out + (scale - 1) * reward
  return jax.lax.stop_gradient(out)


def route_teacher(
  teacher_log_probs: Float[Array, "k b *s"], index: Int[Array, "b"]
) -> Float[Array, "b *s"]:
  """Picks each row's own teacher: out[i] = teacher_log_probs[index[i], i].

  Args:
    teacher_log_probs: stacked over teachers; log-probabilities or logits.
      Shape [k, b, *s].
    index: teacher of each row, in [0, k). Shape [b].

  Returns:
    Shape [b, *s].

  Raises:
    ValueError: wrong shapes; in debug mode an index outside [0, k): a domain
      without a teacher is an error, not a default.

  References:
    G-OPD, 2026, arXiv:2602.12125 (several domain experts).
  """
  fn = "route_teacher"
  _checks.floating(fn, teacher_log_probs=teacher_log_probs)
  _checks.integer(fn, index=index)
  _checks.min_rank(fn, "teacher_log_probs", teacher_log_probs, 2, "[k, b, *s]")
  stacked = jnp.asarray(teacher_log_probs)
  k, b = stacked.shape[:2]
  _checks.shape(fn, "index", index, (b,), "[b]", "teacher_log_probs")
  _checks.holds(
    fn, "index", index, lambda i: (i >= 0) & (i < k), f"in [0, {k - 1}]"
  )
  return stacked[jnp.asarray(index), jnp.arange(b)]


def gopd_target_logits(
  teacher_logits: Float[Array, "*b v"],
  reference_logits: Float[Array, "*b v"] | None,
  *,
  reward_scale: Any = 1.25,
  vocab_size: int | None = None,
) -> Float[Array, "*b v"]:
  """The policy G-OPD converges to, normalised in log space.

    log target = lambda log T + (1 - lambda) log R + const

  Args:
    teacher_logits: Shape [*b, v].
    reference_logits: None only at reward_scale 1. Shape [*b, v].
    reward_scale: lambda, a number or an array over the leading axes.
    vocab_size: number of common tokens, as in `divergence.forward_kl`.

  Returns:
    Log-probabilities, shape [*b, v], without gradient; -inf where the teacher
    has no mass.

  Raises:
    ValueError: a missing reference at reward_scale != 1, or shapes that do not
      correspond; in debug mode a teacher with mass where the reference has
      none.

  References:
    G-OPD, 2026, arXiv:2602.12125 (the optimum per position).
  """
  fn = "gopd_target_logits"
  used = _needs_reference(
    fn, "reference_logits", reference_logits, reward_scale
  )
  teacher, reference = _log_space.promote(
    *_log_space.trim(
      fn,
      vocab_size,
      teacher_logits=teacher_logits,
      reference_logits=reference_logits,
    )
  )
  log_t = _log_space.log_probs(teacher)
  if used:
    log_r = _log_space.log_probs(reference)
    _log_space.check_support(fn, "teacher", log_t, "reference", log_r)
    scale = _scale_like(fn, reward_scale, log_t)
    alive = log_t > -jnp.inf
    mixed = scale * log_t + (1 - scale) * log_r
    log_t = jax.nn.log_softmax(jnp.where(alive, mixed, -jnp.inf), axis=-1)
  return jax.lax.stop_gradient(log_t)


def gopd_loss(
  student_logits: Float[Array, "*b v"],
  teacher_logits: Float[Array, "*b w"],
  reference_logits: Float[Array, "*b u"] | None,
  *,
  reward_scale: Any = 1.25,
  top_k: int | None = None,
  temperature: Any = 1.0,
  vocab_size: int | None = None,
) -> Float[Array, "*b"]:
  """G-OPD over the full vocabulary: the same optimum without sampling noise.

    sum_v q_v [log q_v - lambda log T_v - (1 - lambda) log R_v]

  differentiated through q and log q; teacher and reference stop-gradient. It
  equals KL(q || target) minus the target's log normaliser, so it may be
  negative for lambda > 1. At lambda = 1 it is reverse KL.

  top_k keeps the student's k largest tokens and lumps the rest of all three
  models into one more outcome; the ids are constants to the gradient.

  Args:
    student_logits: trained. Shape [*b, v].
    teacher_logits: frozen. Shape [*b, v].
    reference_logits: frozen; None only at reward_scale 1. Shape [*b, v].
    reward_scale: lambda, a number or an array over the leading axes.
    top_k: number of the student's tokens kept apart; None means all.
    temperature: divides all three logits; > 0.
    vocab_size: number of common tokens, as in `divergence.forward_kl`.

  Returns:
    Nats, shape [*b], unreduced; least where the student is
    `gopd_target_logits`.

  Raises:
    ValueError: a missing reference at reward_scale != 1, top_k outside [1, v],
      shapes that do not correspond.

  References:
    G-OPD, 2026, arXiv:2602.12125; the full-vocabulary and top-k forms are ours.
  """
  fn = "gopd_loss"
  used = _needs_reference(
    fn, "reference_logits", reference_logits, reward_scale
  )
  _log_space.check_temperature(fn, temperature)
  student, teacher, reference = _log_space.promote(
    *_log_space.trim(
      fn,
      vocab_size,
      student_logits=student_logits,
      teacher_logits=teacher_logits,
      reference_logits=reference_logits if used else None,
    )
  )
  log_q = _log_space.log_probs(student, temperature)
  log_t = _log_space.log_probs(jax.lax.stop_gradient(teacher), temperature)
  _log_space.check_support(fn, "student", log_q, "teacher", log_t)
  if used:
    log_r = _log_space.log_probs(jax.lax.stop_gradient(reference), temperature)
    _log_space.check_support(fn, "student", log_q, "reference", log_r)
  if top_k is not None:
    _log_space.check_number(fn, "top_k", top_k, 1, log_q.shape[-1])
    _, ids = jax.lax.top_k(jax.lax.stop_gradient(log_q), top_k)
    log_q, log_t = (_log_space.with_tail(x, ids) for x in (log_q, log_t))
    if used:
      log_r = _log_space.with_tail(log_r, ids)
  integrand = _log_space.log_ratio(log_q, log_t)
  if used:
    # Outside the student's support nothing is looked at, so nothing is inf.
    alive = log_q > -jnp.inf
    reward = jnp.where(alive, log_t, 0) - jnp.where(alive, log_r, 0)
    scale = _scale_like(fn, reward_scale, log_q)
    integrand = integrand - (scale - 1) * reward
  return _log_space.expectation(log_q, integrand)


def policy_gradient_loss(
  log_probs: Float[Array, "*b"],
  old_log_probs: Float[Array, "*b"],
  advantages: Float[Array, "*b"],
  *,
  clip_low: float | int | Scalar = 0.2,
  clip_high: float | int | Scalar = 0.2,
  dual_clip: float | int | Scalar | None = 3.0,
) -> Float[Array, "*b"]:
  """Clipped policy-gradient loss per token, with the dual clip.

    rho = exp(clip(log pi - log pi_old, +-20))
    l = max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high))
    where A < 0:  l = min(l, -dual_clip A)

  A and log pi_old are stop-gradient. With old_log_probs = log_probs (one update
  a batch) rho is 1 and the gradient is -A grad log pi.

  Args:
    log_probs: of the sampled tokens under the live student. Shape [*b].
    old_log_probs: under the behaviour snapshot. Shape [*b].
    advantages: Shape [*b].
    clip_low: in [0, 1].
    clip_high: >= 0.
    dual_clip: > 1, bounds what a token with A < 0 can cost; None for none.

  Returns:
    Shape [*b], unreduced and unmasked: multiply by importance weights, then
    `masked_mean`.

  Raises:
    ValueError: a clip out of range or shapes that differ.

  References:
    PPO, arXiv:1707.06347, eq. 7; dual clip: arXiv:1912.09729, eq. 5.
  """
  fn = "policy_gradient_loss"
  _checks.in_range(fn, "clip_low", clip_low, 0, 1)
  _checks.in_range(fn, "clip_high", clip_high, 0)
  _checks.in_range(fn, "dual_clip", dual_clip, 1, open_low=True)
  log_probs, old, advantages = _log_prob_arrays(
    fn,
    log_probs=log_probs,
    old_log_probs=old_log_probs,
    advantages=advantages,
  )
  old = jax.lax.stop_gradient(old)
  advantages = jax.lax.stop_gradient(advantages)
  ratio = jnp.exp(jnp.clip(log_probs - old, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
  clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
  loss = jnp.maximum(-advantages * ratio, -advantages * clipped)
  if dual_clip is not None:
    bounded = jnp.minimum(loss, -dual_clip * advantages)
    loss = jnp.where(advantages < 0, bounded, loss)
  return loss


def truncated_importance_weights(
  log_probs: Float[Array, "b l"],
  behaviour_log_probs: Float[Array, "b l"],
  where: Bool[Array, "b l"] | None = None,
  *,
  level: Literal["token", "sequence"] = "token",
  cap: float | int | Scalar = 5.0,
) -> Float[Array, "b l"]:
  """Importance weights min(pi / pi_behaviour, cap), stop-gradient.

  Corrects for a sampler that is not quite the trained model (another engine,
  another precision, an older snapshot). level="sequence" takes the ratio of the
  whole response, over its valid tokens, for each of them. The log-ratio is
  clipped to +-20 first.

  Args:
    log_probs: of the sampled tokens under the trained model. Shape [b, l].
    behaviour_log_probs: under what sampled them. Shape [b, l].
    where: response tokens; None means all. Shape [b, l].
    level: "token" or "sequence".
    cap: > 0.

  Returns:
    Shape [b, l], 0 outside `where`, without gradient.

  Raises:
    ValueError: an unknown level, a cap that is not > 0, wrong shapes.

  References:
    Rollout correction of verl (G-OPD: cap 5; SDPO: cap 2).
  """
  fn = "truncated_importance_weights"
  _checks.one_of(fn, "level", level, ("token", "sequence"))
  _checks.in_range(fn, "cap", cap, 0, open_low=True)
  _checks.rank(fn, "log_probs", log_probs, 2, "[b, l]")
  ours, theirs = _log_prob_arrays(
    fn, log_probs=log_probs, behaviour_log_probs=behaviour_log_probs
  )
  where = _where(fn, where, "log_probs", ours)
  ratio = jnp.where(where, ours - theirs, 0)
  if level == "sequence":
    ratio = jnp.broadcast_to(jnp.sum(ratio, axis=1, keepdims=True), ratio.shape)
  ratio = jnp.exp(jnp.clip(ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
  weights = jnp.where(where, jnp.minimum(ratio, cap), 0)
  return jax.lax.stop_gradient(weights)


# --- the extrapolation cliff -------------------------------------------------


def _host(fn: str, **values: Any) -> list[np.ndarray]:
  """Float64 NumPy copies; a traced array has no digits left to work with."""
  for name, value in values.items():
    if isinstance(value, jax.core.Tracer):
      _checks.fail(
        fn,
        name,
        "a host number or NumPy array (inside jit use"
        " extrapolation_threshold_from_log_odds)",
        "a traced array",
      )
  arrays = [np.asarray(v, np.float64) for v in values.values()]
  for name, array in zip(values, arrays):
    inside = (array >= 1) if name == "c" else (array > 0) & (array < 1)
    if not inside.all():
      bad = array[~inside].flat[0]
      _checks.fail(fn, name, ">= 1" if name == "c" else "in (0, 1)", bad)
  return arrays


def _threshold(p, b, numerator):
  """1 + numerator / (logit p - logit b); inf where that gap is not > 0."""
  gap = (np.log(p) - np.log1p(-p)) - (np.log(b) - np.log1p(-b))
  with np.errstate(divide="ignore", invalid="ignore"):
    out = np.where(gap > 0, 1 + numerator / np.where(gap > 0, gap, 1), np.inf)
  return out[()]


def extrapolation_threshold(p: Any, b: Any, c: Any) -> Any:
  """Largest reward scale whose fixed point stays clip-safe, on the host.

    lambda* = 1 + log(1 + (c - 1) / p) / (logit p - logit b)

  At a position whose contract one token keeps, with teacher probability p, base
  probability b and importance clip c: the fixed point of lambda* has off-modal
  mass (1 - p) / c exactly, the least that the clipped ratio still holds.
  c = 1 gives 1; p <= b gives inf (no cliff upward). Quote it at the binding
  position, the smallest lambda*.

  Args:
    p: teacher's probability of the contract-keeping token(s), in (0, 1).
    b: base model's, in (0, 1).
    c: clip of the teacher/student ratio, >= 1.

  Returns:
    NumPy float64, elementwise.

  Raises:
    ValueError: a value out of range, or a traced array.

  Example:
    >>> round(float(extrapolation_threshold(0.9, 0.5, 5.0)), 4)
    1.7712

  References:
    Extrapolation cliff, 2026, arXiv:2605.08737: a reconstruction, derived from
    what the abstract names (p, b, c and a closed form); no official code.
  """
  p, b, c = _host("extrapolation_threshold", p=p, b=b, c=c)
  return _threshold(p, b, np.log1p((c - 1) / p))


def runaway_threshold(p: Any, b: Any, c: Any) -> Any:
  """Reward scale above which no interior fixed point is left, on the host.

    lambda_run = 1 + log(c / p) / (logit p - logit b)

  for the advantage whose log(T/S) is truncated at log c. Slightly above
  `extrapolation_threshold`; between the two the off-modal mass sits at the
  clip, above it goes to 0.

  Args:
    p: teacher's probability of the contract-keeping token(s), in (0, 1).
    b: base model's, in (0, 1).
    c: clip of the teacher/student ratio, >= 1.

  Returns:
    NumPy float64, elementwise; inf where p <= b.

  Raises:
    ValueError: a value out of range, or a traced array.

  References:
    Extrapolation cliff, 2026, arXiv:2605.08737: a reconstruction, see
    `extrapolation_threshold`.
  """
  p, b, c = _host("runaway_threshold", p=p, b=b, c=c)
  return _threshold(p, b, np.log(c) - np.log(p))


def extrapolation_threshold_from_log_odds(
  teacher_log_odds: Float[Array, "*b"],
  base_log_odds: Float[Array, "*b"],
  c: Any,
) -> Float[Array, "*b"]:
  """`extrapolation_threshold` from log-odds, in float32 and under jit.

  1 - p is lost in float32 from p = 1 - 6e-8 on; log p - log(1 - p), taken from
  log-sum-exps over the two classes, is not. Computed as
  log(1 + (c - 1)(1 + exp(-teacher_log_odds))), without a p in it.

  Args:
    teacher_log_odds: logit p. Shape [*b].
    base_log_odds: logit b. Shape [*b].
    c: clip of the teacher/student ratio, >= 1; a number or [*b].

  Returns:
    Shape [*b], without gradient; inf where the teacher is not sharper.

  Raises:
    ValueError: shapes that differ or c < 1.

  References:
    Extrapolation cliff, 2026, arXiv:2605.08737: a reconstruction, see
    `extrapolation_threshold`.
  """
  fn = "extrapolation_threshold_from_log_odds"
  _checks.in_range(fn, "c", c, 1)
  teacher, base = _log_prob_arrays(
    fn, teacher_log_odds=teacher_log_odds, base_log_odds=base_log_odds
  )
  extra = jnp.log(jnp.asarray(c, teacher.dtype) - 1) + jax.nn.softplus(-teacher)
  gap = teacher - base
  # softplus(log x) = log(1 + x), also where x = 0 (c = 1) or overflows.
  out = 1 + jax.nn.softplus(extra) / jnp.where(gap > 0, gap, 1)
  return jax.lax.stop_gradient(jnp.where(gap > 0, out, jnp.inf))


def extrapolation_threshold_kary(
  teacher_logits: Float[Array, "*b v"],
  base_logits: Float[Array, "*b v"],
  class_mask: Bool[Array, "..."],
  c: Any,
  *,
  iterations: int = 60,
) -> Float[Array, "*b"]:
  """`extrapolation_threshold` for a class of tokens, from full distributions.

  The mass odds of the class C at lambda are

    O(lambda) = sum_C T^lambda B^(1-lambda) / sum_notC T^lambda B^(1-lambda)

  and lambda* is the first lambda >= 1 at which O / (1 + O) = 1 - (1 - p) / c,
  p being the class's mass under T: bracketed by doubling lambda - 1 up to 2^20,
  then bisected. Equal to the two-outcome rule where T/B is constant inside each
  class, and not otherwise.

  Args:
    teacher_logits: logits or log-probabilities. Shape [*b, v].
    base_logits: Shape [*b, v].
    class_mask: tokens that keep the contract; some but not all. Shape [v] or
      [*b, v].
    c: clip of the teacher/student ratio, >= 1.
    iterations: bisections, >= 1.

  Returns:
    Shape [*b], without gradient; inf where no lambda gets there.

  Raises:
    ValueError: shapes that do not correspond or c < 1.

  References:
    Extrapolation cliff, 2026, arXiv:2605.08737: a reconstruction, see
    `extrapolation_threshold`.
  """
  fn = "extrapolation_threshold_kary"
  _checks.in_range(fn, "c", c, 1)
  _log_space.check_number(fn, "iterations", iterations, 1)
  teacher, base = _log_space.promote(
    *_log_space.trim(
      fn, None, teacher_logits=teacher_logits, base_logits=base_logits
    )
  )
  _checks.boolean(fn, class_mask=class_mask)
  if jnp.shape(class_mask) not in (teacher.shape[-1:], teacher.shape):
    _checks.fail(
      fn,
      "class_mask",
      f"[v] or [*b, v]={list(teacher.shape)} like teacher_logits",
      list(jnp.shape(class_mask)),
    )
  log_t = jax.lax.stop_gradient(_log_space.log_probs(teacher))
  log_b = jax.lax.stop_gradient(_log_space.log_probs(base))
  inside = jnp.broadcast_to(class_mask, log_t.shape)
  reward = _log_space.log_ratio(log_t, log_b)

  def log_odds(scale):
    # log T + (lambda - 1) log(T/B); a token outside T's support stays out.
    tilted = log_t + (scale - 1)[..., None] * reward
    return _log_space.logsumexp(
      jnp.where(inside, tilted, -jnp.inf)
    ) - _log_space.logsumexp(jnp.where(inside, -jnp.inf, tilted))

  outside = _log_space.logsumexp(jnp.where(inside, -jnp.inf, log_t))
  log_tail = outside - jnp.log(jnp.asarray(c, log_t.dtype))
  target = _log_space.log1mexp(log_tail) - log_tail

  def double(_, step):
    return jnp.where(log_odds(1 + step) >= target, step, 2 * step)

  one = jnp.ones(log_t.shape[:-1], log_t.dtype)
  step = jax.lax.fori_loop(0, 26, double, one / 64)
  crossed = log_odds(1 + step) >= target
  low, high = jnp.where(step > 1 / 64, step / 2, 0), step

  def halve(_, bounds):
    low, high = bounds
    middle = (low + high) / 2
    above = log_odds(1 + middle) >= target
    return jnp.where(above, low, middle), jnp.where(above, middle, high)

  low, high = jax.lax.fori_loop(0, iterations, halve, (low, high))
  out = jnp.where(log_odds(one) >= target, 1.0, 1 + high)
  return jnp.where(crossed, out, jnp.inf)


def cap_reward_scale(
  reward_scale: Any,
  teacher_logits: Float[Array, "*b v"],
  base_logits: Float[Array, "*b v"],
  class_mask: Bool[Array, "..."],
  c: Any,
  *,
  eps: float | int | Scalar = 0.1,
  iterations: int = 60,
) -> Float[Array, "*b"]:
  """Per-position reward scale that stays below the cliff.

    lambda_t = min(lambda, 1 + (1 - eps) (lambda*_t - 1))

  with lambda* of `extrapolation_threshold_kary` at each position; pass the
  result to `gopd_advantage` or `gopd_loss` as reward_scale. Where there is no
  cliff lambda is left alone. Ours: the paper keeps one global lambda.

  Args:
    reward_scale: lambda, a number or [*b].
    teacher_logits: Shape [*b, v].
    base_logits: Shape [*b, v].
    class_mask: tokens that keep the contract. Shape [v] or [*b, v].
    c: clip of the teacher/student ratio, >= 1.
    eps: margin below the cliff, in [0, 1].
    iterations: bisections.

  Returns:
    Shape [*b], without gradient.

  Raises:
    ValueError: as in `extrapolation_threshold_kary`, or eps outside [0, 1].

  References:
    Extrapolation cliff, 2026, arXiv:2605.08737 (the threshold); the scale of
    each position is ours.
  """
  fn = "cap_reward_scale"
  _log_space.check_number(fn, "eps", eps, 0, 1)
  threshold = extrapolation_threshold_kary(
    teacher_logits, base_logits, class_mask, c, iterations=iterations
  )
  scale = jnp.broadcast_to(
    _scale_like(fn, reward_scale, threshold), threshold.shape
  )
  finite = threshold < jnp.inf
  cap = 1 + (1 - eps) * (jnp.where(finite, threshold, 1) - 1)
  return jnp.where(finite, jnp.minimum(scale, cap), scale)


# --- token importance (TIP) --------------------------------------------------


class TokenImportance(NamedTuple):
  """Scores of every position, each [*b] and without gradient."""

  entropy: Array  # H(student) / log v, in [0, 1]
  reverse_kl: Array  # KL(student||teacher), nats
  forward_kl: Array  # KL(teacher||student), nats
  jsd: Array  # Jensen-Shannon divergence / log 2, in [0, 1]


def token_importance(
  student_logits: Float[Array, "*b v"],
  teacher_logits: Float[Array, "*b w"],
  *,
  jsd_top_k: int | None = None,
  vocab_size: int | None = None,
) -> TokenImportance:
  """The four numbers a position that TIP's rules choose tokens by.

  Run it in chunks of positions, without gradients, before the training pass:
  four floats a token are kept, never [b, l, v]. (`kernels.
  linear_token_statistics` gives them without logits.)

  Args:
    student_logits: Shape [*b, v].
    teacher_logits: Shape [*b, v].
    jsd_top_k: both sides renormalised on the teacher's k largest tokens, for
      the jsd alone; None means the whole vocabulary.
    vocab_size: number of REAL tokens: it is also the v of log v.

  Returns:
    `TokenImportance` of arrays [*b], all stop-gradient.

  Raises:
    ValueError: shapes that do not correspond or jsd_top_k outside [1, v].

  References:
    TIP, 2026, arXiv:2604.14084; departures from the official code: none.
  """
  fn = "token_importance"
  student, teacher = _log_space.promote(
    *_log_space.trim(
      fn,
      vocab_size,
      student_logits=student_logits,
      teacher_logits=teacher_logits,
    )
  )
  log_q = _log_space.log_probs(jax.lax.stop_gradient(student))
  log_p = _log_space.log_probs(jax.lax.stop_gradient(teacher))
  v = log_q.shape[-1]
  # v = 1 leaves nothing to be unsure about.
  entropy = -_log_space.expectation(log_q, log_q) / math.log(max(v, 2))
  jsd_q, jsd_p = log_q, log_p
  if jsd_top_k is not None:
    _log_space.check_number(fn, "jsd_top_k", jsd_top_k, 1, v)
    _, ids = jax.lax.top_k(log_p, jsd_top_k)
    jsd_q, jsd_p = (_log_space.renormalized(x, ids) for x in (log_q, log_p))
  return TokenImportance(
    entropy=entropy,
    reverse_kl=_log_space.kl(log_q, log_p),
    forward_kl=_log_space.kl(log_p, log_q),
    jsd=_log_space.jsd(jsd_q, jsd_p, 0.5) / math.log(2),
  )


def _percentile(values: Array, where: Array, percentile: Any) -> Array:
  """Linearly interpolated percentile of the selected values, as NumPy's."""
  ordered = jnp.sort(jnp.where(where, values, jnp.inf).reshape(-1))
  count = jnp.sum(where)
  position = jnp.maximum(count - 1, 0).astype(values.dtype) * (percentile / 100)
  low = jnp.floor(position).astype(jnp.int32)
  high = jnp.minimum(low + 1, jnp.maximum(count - 1, 0).astype(jnp.int32))
  weight = position - low.astype(values.dtype)
  return ordered[low] * (1 - weight) + ordered[high] * weight


def _normalize(
  values: Array, where: Array, percentile: Any, axis_name: Any
) -> Array:
  """minmax(min(values, percentile)) over the valid tokens; constant -> 0."""
  everywhere, valid = values, where
  if axis_name is not None:
    everywhere = jax.lax.all_gather(values, axis_name)
    valid = jax.lax.all_gather(where, axis_name)
  any_valid = jnp.any(valid)
  if percentile is not None:
    top = _percentile(everywhere, valid, percentile)
    top = jnp.where(any_valid, top, 0)
    values = jnp.minimum(values, top)
    everywhere = jnp.minimum(everywhere, top)
  low = jnp.min(jnp.where(valid, everywhere, jnp.inf))
  high = jnp.max(jnp.where(valid, everywhere, -jnp.inf))
  spread = jnp.where(any_valid, high - low, 0)
  scaled = (values - jnp.where(any_valid, low, 0)) / jnp.where(
    spread > 0, spread, 1
  )
  return jnp.where(where & (spread > 0), scaled, 0)


def soft_or_importance(
  entropy: Float[Array, "*b"],
  divergence: Float[Array, "*b"],
  where: Bool[Array, "*b"] | None = None,
  *,
  percentile: float | int = 98.0,
  clip_divergence: bool = False,
  axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, "*b"]:
  """TIP's soft-OR: high where a token is uncertain or the models disagree.

    h = minmax(min(entropy, its percentile)),  d = minmax(divergence)
    s = h + d - h d

  minmax and percentile over all valid tokens of the batch; a constant input
  becomes 0. One huge divergence squeezes all other d to 0: clip_divergence cuts
  it at the same percentile (ours; the paper clips h only).

  Args:
    entropy: of the student, `TokenImportance.entropy`. Shape [*b].
    divergence: `TokenImportance.reverse_kl`. Shape [*b].
    where: valid tokens; None means all. Shape [*b].
    percentile: in [0, 100].
    clip_divergence: also clips the divergence.
    axis_name: mapped axis or axes of the batch, inside shard_map or pmap.

  Returns:
    Shape [*b], in [0, 1], 0 outside `where`, without gradient.

  Raises:
    ValueError: percentile outside [0, 100] or shapes that differ.

  References:
    TIP, 2026, arXiv:2604.14084 (from the text; not in the official code).
  """
  fn = "soft_or_importance"
  _log_space.check_number(fn, "percentile", percentile, 0, 100)
  entropy, divergence = _log_prob_arrays(
    fn, entropy=entropy, divergence=divergence
  )
  where = _where(fn, where, "entropy", entropy)
  h = _normalize(entropy, where, percentile, axis_name)
  d = _normalize(
    divergence, where, percentile if clip_divergence else None, axis_name
  )
  return jax.lax.stop_gradient(h + d - h * d)


def overconfidence_importance(
  entropy: Float[Array, "*b"],
  forward_kl: Float[Array, "*b"],
  where: Bool[Array, "*b"] | None = None,
  *,
  percentile: float | int = 98.0,
  axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, "*b"]:
  """TIP's Q3 score: high where the student is sure and wrong.

    KL(teacher||student) (1 - h),  h = minmax(min(entropy, its percentile))

  FORWARD KL, for the ranking alone: the loss on the chosen tokens is reverse
  KL. An entropy rule cannot see these tokens (h = 0).

  Args:
    entropy: of the student, `TokenImportance.entropy`. Shape [*b].
    forward_kl: `TokenImportance.forward_kl`. Shape [*b].
    where: valid tokens; None means all. Shape [*b].
    percentile: in [0, 100].
    axis_name: mapped axis or axes of the batch, inside shard_map or pmap.

  Returns:
    Nats, shape [*b], >= 0, 0 outside `where`, without gradient.

  Raises:
    ValueError: percentile outside [0, 100] or shapes that differ.

  References:
    TIP, 2026, arXiv:2604.14084 (from the text; not in the official code).
  """
  fn = "overconfidence_importance"
  _log_space.check_number(fn, "percentile", percentile, 0, 100)
  entropy, forward_kl = _log_prob_arrays(
    fn, entropy=entropy, forward_kl=forward_kl
  )
  where = _where(fn, where, "entropy", entropy)
  h = _normalize(entropy, where, percentile, axis_name)
  score = jnp.where(where, forward_kl, 0) * (1 - h)
  return jax.lax.stop_gradient(score)


class TokenSelection(NamedTuple):
  """Chosen positions in two forms: slots of a static number, and a mask."""

  ids: Array  # [b, k] positions, best first
  valid: Array  # [b, k] bool: which slots are chosen tokens
  mask: Array  # [b, l] bool: the same tokens


def select_tokens(
  scores: Float[Array, "b l"],
  where: Bool[Array, "b l"] | None = None,
  *,
  rate: float | int,
  exponent: float | int = 1.0,
  noise: Float[Array, "b l"] | None = None,
) -> TokenSelection:
  """Chooses floor(rate m) of each row's m valid tokens, at least one.

  Without `noise` the highest scores win (ties: the earlier token). With
  standard Gumbel noise the tokens are drawn without replacement with weights
  score^exponent (a token of score 0 only when nothing else is left).

  The number of slots k = max(1, floor(rate l)) is static, so the output head
  can be applied to the chosen rows alone: gather hidden states at `ids`, and
  weigh the loss by `valid`. Selecting after [b, l, v] logits exist saves no
  memory.

  Args:
    scores: >= 0 where `noise` is given. Shape [b, l].
    where: valid tokens; None means all. Shape [b, l].
    rate: share of the tokens to keep, a Python number in (0, 1].
    exponent: of the score as a sampling weight; >= 0.
    noise: standard Gumbel draws (`jax.random.gumbel`), or None. Shape [b, l].

  Returns:
    `TokenSelection`; a row without valid tokens has none chosen.

  Raises:
    ValueError: rate outside (0, 1] or shapes that do not correspond; in debug
      mode negative weights.

  References:
    TIP, 2026, arXiv:2604.14084; departures: at least one token a row.
  """
  fn = "select_tokens"
  _log_space.check_number(fn, "rate", rate, 0, 1, open_low=True)
  _checks.in_range(fn, "exponent", exponent, 0)
  _checks.rank(fn, "scores", scores, 2, "[b, l]")
  scores, noise = _log_prob_arrays(fn, scores=scores, noise=noise)
  where = _where(fn, where, "scores", scores)
  b, l = scores.shape
  if l == 0:
    _checks.fail(fn, "scores", "[b, l] with l >= 1", [b, l])
  if noise is not None:
    _checks.in_range(fn, "scores", scores, 0)
    positive = scores > 0
    log_weight = exponent * jnp.log(jnp.where(positive, scores, 1))
    # Finite, and below every score that float32 can hold.
    scores = jnp.where(positive, log_weight, -1e30) + noise
  # Python's floor of a float64 product, for every possible m: a float32 product
  # under jit may round the other way.
  table = np.array([math.floor(rate * m) for m in range(l + 1)])
  table[1:] = np.maximum(table[1:], 1)
  keep = jnp.asarray(table, jnp.int32)[jnp.sum(where, axis=1)]
  slots = int(table[l])
  lowest = jnp.finfo(scores.dtype).min
  ranked = jnp.where(where, jnp.maximum(scores, lowest), -jnp.inf)
  _, ids = jax.lax.top_k(jax.lax.stop_gradient(ranked), slots)
  valid = jnp.arange(slots, dtype=jnp.int32)[None, :] < keep[:, None]
  mask = jnp.zeros((b, l), bool)
  mask = mask.at[jnp.arange(b)[:, None], ids].set(valid)
  return TokenSelection(ids, valid, mask)


# --- drift (Prune-OPD) -------------------------------------------------------


def topk_overlap(
  student_ids: Int[Array, "*b k"], teacher_ids: Int[Array, "*b k"]
) -> Float[Array, "*b"]:
  """Share of the student's k largest tokens among the teacher's k largest.

  Args:
    student_ids: distinct token ids. Shape [*b, k].
    teacher_ids: distinct token ids. Shape [*b, k].

  Returns:
    Shape [*b], float32, in [0, 1]; 1 for the same set in any order.

  Raises:
    ValueError: shapes that differ; TypeError: ids that are not integers.

  References:
    Prune-OPD, 2026, arXiv:2605.07804.
  """
  fn = "topk_overlap"
  _checks.integer(fn, student_ids=student_ids, teacher_ids=teacher_ids)
  _checks.min_rank(fn, "student_ids", student_ids, 1, "[*b, k]")
  _checks.same_shape(fn, student_ids=student_ids, teacher_ids=teacher_ids)
  student_ids, teacher_ids = jnp.asarray(student_ids), jnp.asarray(teacher_ids)
  if student_ids.shape[-1] == 0:
    _checks.fail(fn, "student_ids", "[*b, k] with k >= 1", "k=0")
  same = student_ids[..., :, None] == teacher_ids[..., None, :]
  return jnp.mean(jnp.any(same, axis=-1), axis=-1, dtype=jnp.float32)


def teacher_top_p_accept(
  ids: Int[Array, "*b"],
  teacher_ids: Int[Array, "*b k"],
  teacher_log_probs: Float[Array, "*b k"],
  *,
  threshold: float | int | Scalar,
) -> Float[Array, "*b"]:
  """1 where the sampled token lies in the teacher's nucleus, else 0.

  The nucleus is the smallest prefix of the teacher's k tokens, sorted by
  probability, whose mass reaches the threshold; all k if it never does.

  Args:
    ids: sampled tokens. Shape [*b].
    teacher_ids: the teacher's k largest tokens. Shape [*b, k].
    teacher_log_probs: their log-probabilities, in any order. Shape [*b, k].
    threshold: mass in [0, 1].

  Returns:
    Shape [*b], at least float32, 0 or 1, without gradient.

  Raises:
    ValueError: shapes that do not correspond or threshold outside [0, 1].

  References:
    Prune-OPD, 2026, arXiv:2605.07804.
  """
  fn = "teacher_top_p_accept"
  _checks.in_range(fn, "threshold", threshold, 0, 1)
  _checks.integer(fn, ids=ids, teacher_ids=teacher_ids)
  _checks.floating(fn, teacher_log_probs=teacher_log_probs)
  _checks.same_shape(
    fn, teacher_ids=teacher_ids, teacher_log_probs=teacher_log_probs
  )
  teacher_ids = jnp.asarray(teacher_ids)
  _checks.shape(fn, "ids", ids, teacher_ids.shape[:-1], "[*b]", "teacher_ids")
  (log_p,) = _log_space.promote(teacher_log_probs)
  log_p = jax.lax.stop_gradient(log_p)
  order = jnp.argsort(-log_p, axis=-1)
  p = jnp.exp(_log_space.take(log_p, order))
  before = jnp.cumsum(p, axis=-1) - p
  # A token is in the nucleus while the mass before it has not reached it.
  inside = before < threshold
  inside = inside.at[..., 0].set(True)
  hit = _log_space.take(teacher_ids, order) == jnp.asarray(ids)[..., None]
  return jnp.any(hit & inside, axis=-1).astype(log_p.dtype)


def topk_reverse_kl_reward(
  student_log_probs: Float[Array, "*b k"],
  teacher_log_probs: Float[Array, "*b k"],
) -> Float[Array, "*b k"]:
  """Dense reward of Prune-OPD on the student's k largest tokens.

    r_k = -(log S_k - log T_k) softmax_k(log S)

  with log S, log T of the FULL vocabulary; all stop-gradient. Each candidate
  token's log-probability gets its own r as the advantage.

  Args:
    student_log_probs: Shape [*b, k].
    teacher_log_probs: of the same ids. Shape [*b, k].

  Returns:
    Shape [*b, k], without gradient.

  Raises:
    ValueError: shapes that differ.

  References:
    Prune-OPD, 2026, arXiv:2605.07804.
  """
  fn = "topk_reverse_kl_reward"
  _checks.min_rank(fn, "student_log_probs", student_log_probs, 1, "[*b, k]")
  student, teacher = _log_prob_arrays(
    fn,
    student_log_probs=student_log_probs,
    teacher_log_probs=teacher_log_probs,
  )
  reward = (teacher - student) * jax.nn.softmax(student, axis=-1)
  return jax.lax.stop_gradient(reward)


def drift_events(
  monitor: Float[Array, "b l"],
  where: Bool[Array, "b l"] | None = None,
  *,
  threshold: float | int | Scalar = 0.7,
) -> Bool[Array, "b l"]:
  """Valid tokens whose monitor (overlap, acceptance) is below the threshold.

  Args:
    monitor: `topk_overlap` or `teacher_top_p_accept`. Shape [b, l].
    where: response tokens; None means all. Shape [b, l].
    threshold: for acceptance, anything in (0, 1] means "not accepted".

  Returns:
    Shape [b, l], bool, False outside `where`.

  Raises:
    ValueError: shapes that differ.

  References:
    Prune-OPD, 2026, arXiv:2605.07804.
  """
  fn = "drift_events"
  (monitor,) = _log_prob_arrays(fn, monitor=monitor)
  where = _where(fn, where, "monitor", monitor)
  return where & (monitor < threshold)


class DriftWeights(NamedTuple):
  """Weights after drift; all 0 outside the valid tokens."""

  loss_weights: Array  # [b, l]: what multiplies the loss
  weights: Array  # [b, l]: w_t in [0, 1]
  effective_length: Array  # [b]: valid tokens with w_t > 1e-8


def drift_weights(
  events: Bool[Array, "b l"],
  where: Bool[Array, "b l"] | None = None,
  *,
  drop: float | int | Scalar = 0.01,
  base: float | int | Scalar = 0.5,
  normalize: bool = False,
) -> DriftWeights:
  """Monotone down-weighting of everything after drift events.

    w_t = clip(1 - drop * (events up to and including t), 0, 1)
    loss weight = w_t + base       [/ (1 + base) if normalize]

  over valid tokens only, without gradient. With the scripts' base of .5 fresh
  tokens weigh 1.5: normalize (ours) keeps the learning rate.

  Args:
    events: drift events, `drift_events`. Shape [b, l], bool.
    where: response tokens; None means all. Shape [b, l].
    drop: weight lost per event, >= 0.
    base: weight that is never lost, >= 0.
    normalize: divides by 1 + base.

  Returns:
    `DriftWeights`, float32. The effective length is what
    `update_rollout_budget` reads.

  Raises:
    ValueError: shapes that differ, a negative drop or base.

  Example:
    >>> import jax.numpy as jnp
    >>> w = drift_weights(jnp.array([[False, True, True]]), drop=0.1, base=0.0)
    >>> [round(float(x), 1) for x in w.weights[0]]
    [1.0, 0.9, 0.8]

  References:
    Prune-OPD, 2026, arXiv:2605.07804; defaults: the released scripts.
  """
  fn = "drift_weights"
  _checks.boolean(fn, events=events)
  _checks.rank(fn, "events", events, 2, "[b, l]")
  _checks.in_range(fn, "drop", drop, 0)
  _checks.in_range(fn, "base", base, 0)
  events = jnp.asarray(events)
  where = _where(fn, where, "events", events)
  count = jnp.cumsum(events & where, axis=1, dtype=jnp.float32)
  weights = jnp.where(where, jnp.clip(1 - drop * count, 0, 1), 0)
  loss_weights = jnp.where(where, weights + base, 0)
  if normalize:
    loss_weights = loss_weights / (1 + base)
  length = jnp.sum(weights > 1e-8, axis=1, dtype=jnp.int32)
  return DriftWeights(loss_weights, weights, length)


class RolloutBudget(NamedTuple):
  """State of the controller: two int32 scalars, fit for a step's carry."""

  length: Any  # current maximum number of response tokens
  misses: Any  # steps in a row without enough hits


def update_rollout_budget(
  budget: RolloutBudget,
  effective_length: Int[Array, "b"],
  *,
  hit_ratio: float | int | Scalar = 0.1,
  margin: int = 100,
  step: int = 100,
  patience: int = 3,
  min_length: int = 1024,
  max_length: int = 12288,
  axis_name: str | tuple[str, ...] | None = None,
) -> RolloutBudget:
  """Rollout length of the next generation, from this one's useful lengths.

  A row hits when its effective length is at least max(min_length, length -
  margin). If the share of hits is >= hit_ratio the length grows by `step` (up
  to max_length) and misses are forgotten; otherwise one more miss, and the
  `patience`-th in a row shrinks it by `step` (down to min_length).

  Args:
    budget: the current `RolloutBudget`.
    effective_length: of every rollout, `DriftWeights`. Shape [b].
    hit_ratio: in [0, 1].
    margin: tokens, >= 0.
    step: tokens, >= 1.
    patience: misses in a row, >= 1.
    min_length: tokens, >= 0.
    max_length: tokens, >= min_length.
    axis_name: mapped axis or axes of the batch; the share is that of all
      devices, or they would disagree on the length.

  Returns:
    The next `RolloutBudget`, int32 scalars.

  Raises:
    ValueError: an option out of range or an empty batch.

  References:
    Prune-OPD, 2026, arXiv:2605.07804.
  """
  fn = "update_rollout_budget"
  _checks.in_range(fn, "hit_ratio", hit_ratio, 0, 1)
  _checks.in_range(fn, "margin", margin, 0)
  _checks.in_range(fn, "step", step, 1)
  _checks.in_range(fn, "patience", patience, 1)
  _checks.in_range(fn, "min_length", min_length, 0)
  _checks.not_above(fn, "min_length", min_length, "max_length", max_length)
  _checks.rank(fn, "effective_length", effective_length, 1, "[b]")
  _checks.nonempty(fn, effective_length=effective_length)
  length = jnp.asarray(budget.length, jnp.int32)
  misses = jnp.asarray(budget.misses, jnp.int32)
  bar = jnp.maximum(min_length, length - margin)
  hits = jnp.sum(
    jnp.asarray(effective_length).astype(jnp.int32) >= bar, dtype=jnp.float32
  )
  rows = jnp.asarray(jnp.shape(effective_length)[0], jnp.float32)
  if axis_name is not None:
    hits = jax.lax.psum(hits, axis_name)
    rows = jax.lax.psum(rows, axis_name)
  hit = hits / rows >= hit_ratio
  misses = jnp.where(hit, 0, misses + 1)
  shrink = misses >= patience
  shorter = jnp.where(shrink, jnp.maximum(length - step, min_length), length)
  length = jnp.where(hit, jnp.minimum(length + step, max_length), shorter)
  return RolloutBudget(length, jnp.where(shrink, 0, misses))


__all__ = [
  "DriftWeights",
  "RolloutBudget",
  "TokenImportance",
  "TokenSelection",
  "cap_reward_scale",
  "drift_events",
  "drift_weights",
  "extrapolation_threshold",
  "extrapolation_threshold_from_log_odds",
  "extrapolation_threshold_kary",
  "gopd_advantage",
  "gopd_loss",
  "gopd_target_logits",
  "kl_estimate",
  "minillm_advantage",
  "overconfidence_importance",
  "policy_gradient_loss",
  "route_teacher",
  "runaway_threshold",
  "select_tokens",
  "soft_or_importance",
  "teacher_top_p_accept",
  "token_importance",
  "topk_overlap",
  "topk_reverse_kl_reward",
  "truncated_importance_weights",
  "update_rollout_budget",
]
