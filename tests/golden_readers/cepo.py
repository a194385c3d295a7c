"""CEPO and RLSD: group advantages, their re-weighting, the policy loss."""

import functools

import jax
import jax.numpy as jnp

from distilljax import losses

CALLS = {
  r"grpo_advantages": "group_advantages",
  r"cepo_adv_\d+": "contrastive_evidence_advantages",
  r"rlsd_adv_\d+": "self_evidence_advantages",
  r"pg_(loss|grad)_\d+_(token|seq)": (
    "policy_gradient_loss(clip_low=.2, clip_high=.28)"
  ),
}
NOT_REPRODUCED = {}
TOLERANCE = {
  r"pg_loss_.*": (
    5e-4,
    "a mean of terms of both signs that nearly cancels, taken in float32",
  ),
}


@jax.jit
def _advantages(rewards, groups, where, lps, mix, clip):
  old, positive, negative = lps
  one = losses.group_advantages(rewards, groups)
  spread = jnp.where(where, one[:, None], 0)
  contrast = losses.contrastive_evidence_advantages(
    spread, positive, negative, where, mix=mix, clip=clip
  )
  alone = losses.self_evidence_advantages(
    spread, old, positive, where, mix=mix, clip=clip
  )
  return spread, contrast, alone


@functools.partial(jax.jit, static_argnames="per_sequence")
def _policy(student, old, advantages, where, *, per_sequence):
  def loss(student):
    values = losses.policy_gradient_loss(
      student, old, advantages, clip_low=0.2, clip_high=0.28, dual_clip=3.0
    )
    if per_sequence:
      return jnp.mean(jax.vmap(losses.masked_mean)(values, where))
    return losses.masked_mean(values, where)

  return jax.value_and_grad(loss)(student)


def reproduce(golden):
  """The keys of CALLS."""
  where = golden["response_mask"] > 0
  rewards = jnp.sum(golden["token_level_rewards"], axis=1)
  student, old = golden["student_lp"], golden["old_lp"]
  lps = (old, golden["pos_teacher_lp"], golden["neg_teacher_lp"])
  out = {}
  for i, (mix, clip) in enumerate(golden["lam_eps"]):
    spread, contrast, alone = _advantages(
      rewards, golden["group_index"], where, lps, mix, clip
    )
    out["grpo_advantages"] = spread
    out[f"cepo_adv_{i}"] = contrast
    out[f"rlsd_adv_{i}"] = alone
    for name in ("token", "seq"):
      loss, grad = _policy(
        student, old, contrast, where, per_sequence=name == "seq"
      )
      out[f"pg_loss_{i}_{name}"] = loss
      out[f"pg_grad_{i}_{name}"] = grad
  return {k: v for k, v in out.items() if k in golden}
