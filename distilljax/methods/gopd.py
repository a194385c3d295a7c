"""G-OPD: on-policy distillation, and extrapolation past the teacher.

G-OPD, 2026, arXiv:2602.12125, read from its official code. The student samples,
and every token of a rollout is worth lambda log(T/R) - log(S/R): lambda
(`reward_scale`) 1 is plain on-policy distillation (OPD: the reverse KL to the
teacher T, the reference R cancels), above 1 the student is pushed past the
teacher along the direction from reference to teacher (ExOPD). The optimum of a
position is T^lambda R^(1 - lambda), normalised.

`form="full"` (ours) differentiates the expectation over the whole vocabulary at
every position of the rollout, `form="sampled"` is the paper's: the advantage of
the sampled token in a clipped policy gradient. The behaviour snapshot is what
the rollout says of itself at temperature 1: one update for each batch of
rollouts leaves nothing to clip, rollouts from elsewhere do. Importance weights
correct for what the sampler drew differently (temperature, filters).

`ratio_cap` (sampled form) bounds T/S inside the advantage as ListOPD does, the
setting for which arXiv:2605.08737 predicts the reward scale above which a
format is lost; a reconstruction from its abstract.

Departures from the official code: a missing reference at reward_scale != 1 is
an error, not plain distillation; log(T/R) is clipped to +-20.

Networks: `student` (trained), `teacher` (frozen), `reference` (frozen; absent
at reward_scale 1). Batch: `prompts` [b, p] with `prompt_where`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from distilljax import _checks, lm, losses, train
from distilljax.methods import _common, _language

DEFAULTS = {
  "reward_scale": 1.25,  # lambda; ExOPD (OPD: 1)
  "form": "full",  # ours; "sampled" is the official code's
  "loss_top_k": None,  # student tokens kept apart in the full form; ours
  "loss_implementation": None,  # fused where networks can, or "plain"; ours
  "num_samples": 1,  # completions a prompt; official scripts
  "sampling_temperature": 1.0,  # official scripts
  "max_new_tokens": 128,  # ours; official 16384
  "eos_id": None,  # that ends a sample and is part of it; the task's
  "pad_id": 0,  # what stands behind it; the task's
  "top_k": None,  # of the sampler: none; official scripts
  "top_p": None,  # of the sampler: none; official scripts
  "clip_low": 0.2,  # of the ratio, form="sampled"; official code
  "clip_high": 0.2,  # official code
  "dual_clip": 3.0,  # official code
  "importance_cap": 5.0,  # of the sampler's correction; official code
  "max_log_ratio": 20.0,  # clip of log(T/R), form="sampled"; ours
  "ratio_cap": None,  # c: cap of T/S in the advantage; arXiv:2605.08737
}


def make(
  apply_fns: Mapping[str, Callable[..., Any]], **hyper: Any
) -> train.Method:
  """G-OPD as a `Method`.

  Args:
    apply_fns: `student`, `teacher` and, unless reward_scale is 1, `reference`:
      networks with the call form of the zoo's "transformer".
    **hyper: see `DEFAULTS`.

  Returns:
    The method; `sample` completes inputs["prompts"] with at most `steps`
    tokens.
  """
  slug = "gopd"
  h = _common.hyper_parameters(slug, DEFAULTS, hyper)
  _checks.one_of(slug, "form", h["form"], ("full", "sampled"))
  _checks.finite(slug, reward_scale=h["reward_scale"])
  _checks.in_range(slug, "ratio_cap", h["ratio_cap"], 1)
  scale = h["reward_scale"]
  extrapolates = scale != 1
  frozen = ["teacher"] + (["reference"] if extrapolates else [])
  apply, *_ = _common.networks_for(slug, apply_fns, ["student", *frozen])
  compared = {k: apply_fns[k] for k in ("student", *frozen)}
  needs_logits, full = None, {"reward_scale": scale}
  if h["loss_top_k"] is not None:
    needs_logits, full["top_k"] = "loss_top_k", h["loss_top_k"]
  if h["form"] == "sampled":
    needs_logits = "form='sampled'"
  implementation = _language.implementation_of(slug, h, compared, needs_logits)
  rollouts = _language.make_rollouts(apply, h, num_samples=h["num_samples"])

  def collect(params, batch, context):
    return rollouts(params["student"], batch, context.key)

  def loss(params, batch, context):
    del context
    tokens, where = batch["tokens"], batch["where"]
    if h["form"] == "full":
      values, metrics = _language.divergence(
        implementation,
        compared,
        params,
        batch,
        kind="gopd",
        logged="reverse_kl",
        **full,
      )
      return {"gopd": train.mean(values, where)}, metrics
    ours, teacher, *rest = (
      _language.completion_logits(f, params[k], batch)
      for k, f in compared.items()
    )
    metrics = _language.student_metrics(ours, teacher, where)
    old, weights = _language.behaviour(batch, h["importance_cap"])
    teacher_log_probs = lm.token_log_probs(teacher, tokens)
    advantages = losses.gopd_advantage(
      old,
      teacher_log_probs,
      lm.token_log_probs(rest[0], tokens) if rest else None,
      reward_scale=scale,
      max_log_ratio=h["max_log_ratio"],
    )
    if h["ratio_cap"] is not None:
      gap = teacher_log_probs - old
      advantages -= jnp.maximum(gap - math.log(h["ratio_cap"]), 0)
    values = weights * losses.policy_gradient_loss(
      lm.token_log_probs(ours, tokens),
      old,
      advantages,
      clip_low=h["clip_low"],
      clip_high=h["clip_high"],
      dual_clip=h["dual_clip"],
    )
    metrics["advantage"] = train.mean(advantages, where)
    metrics["importance"] = train.mean(weights, where)
    return {"gopd": train.mean(values, where)}, metrics

  return train.Method(
    name=slug,
    paper="arXiv:2602.12125",
    networks={
      "student": train.Trained(),
      **{name: train.Frozen() for name in frozen},
    },
    losses={"student": loss},
    schedule=train.Schedule(cycle=(("student",),)),
    sample=_language.make_sample(apply, h),
    collect=collect,
  )
