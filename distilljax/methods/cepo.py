"""CEPO: verifiable rewards with credit from right and wrong answers.

CEPO, 2026, arXiv:2605.19436, read from its official code; the self-evidence
baseline is RLSD, arXiv:2604.03128, the baseline without evidence GRPO,
arXiv:2402.03300. A group of rollouts of one prompt is normalised to advantages;
the same model reads each rollout once more with the right solution shown in its
prompt and once with a rejected rollout of the group, and a token that the one
likes and the other does not gets more of the advantage, inside a band. Only the
advantage is changed: no gradient and no answer passes through the evidence.

Departures from the official code: the rollout that serves as the wrong answer
is itself held against the second worst (leave one out); where a group has no
rejected rollout the paper's README is followed (RLSD), not its code (GRPO).

credit="steps" is no method but a ceiling for them: an oracle says of every
token whether it is right, and that is normalised over the group, position by
position, in the place of the reward.

Networks: `student` (trained), whose start-of-step parameters are also the
teacher. Batch: `prompts` [b, p] with `prompt_where`, and `tokens` [b, t] with
`where` (the right solutions) where evidence is shown.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distilljax import _checks, lm, losses, train
from distilljax.methods import _common, _language

DEFAULTS = {
  "reward": None,  # (prompts, tokens) -> rewards [n], NumPy; the task's
  "evidence": None,  # (prompts, solutions) -> prompts, as long; the task's
  "steps": None,  # (prompts, tokens) -> right [n, t], NumPy; the task's
  "credit": "contrastive",  # CEPO; "self": RLSD; "grpo": none; "steps": oracle
  "mix": 0.5,  # lambda_0; official scripts
  "decay_steps": 25,  # mix falls to 0 over these; None: never; official scripts
  "band": 0.2,  # eps_w, half width of the weights' band; scripts (README .5)
  "fallback": "rlsd",  # without a wrong answer; README ("grpo": code)
  "rejected": 0.5,  # rewards below are wrong answers; official code
  "num_samples": 8,  # rollouts of a prompt; official scripts
  "sampling_temperature": 1.0,  # official scripts
  "max_new_tokens": 128,  # ours; official 2048
  "eos_id": None,  # that ends a sample and is part of it; the task's
  "pad_id": 0,  # what stands behind it; the task's
  "top_k": None,  # of the sampler: none; official scripts
  "top_p": None,  # of the sampler: none; official scripts
  "clip_low": 0.2,  # of the ratio; official scripts
  "clip_high": 0.28,  # official scripts
  "dual_clip": 3.0,  # official code
  "importance_cap": 5.0,  # of the sampler's correction; verl's, ours here
  "slices": 1,  # that the evidence's forwards are cut into; ours
}


def make(
  apply_fns: Mapping[str, Callable[..., Any]], **hyper: Any
) -> train.Method:
  """CEPO, RLSD or GRPO as a `Method`.

  Args:
    apply_fns: `student`: a network with the call form of the zoo's
      "transformer".
    **hyper: see `DEFAULTS`; `reward` and `steps` are called on the host with
      this process's rows, `evidence` is traced.

  Returns:
    The method; `sample` completes inputs["prompts"] with at most `steps`
    tokens.
  """
  slug = "cepo"
  h = _common.hyper_parameters(slug, DEFAULTS, hyper)
  credit = h["credit"]
  shown = credit in ("contrastive", "self")  # evidence
  _checks.one_of(
    slug, "credit", credit, ("contrastive", "self", "grpo", "steps")
  )
  _checks.one_of(slug, "fallback", h["fallback"], ("rlsd", "grpo"))
  _checks.in_range(slug, "num_samples", h["num_samples"], 2)
  for name, used in (
    ("reward", True), ("evidence", shown), ("steps", credit == "steps")
  ):  # fmt: skip
    if used and not callable(h[name]):
      _checks.fail(slug, name, "a function", h[name])
  (apply,) = _common.networks_for(slug, apply_fns, ["student"])
  rollouts = _language.make_rollouts(apply, h, num_samples=h["num_samples"])

  def collect(params, batch, context):
    rows = rollouts(params["student"], batch, context.key)
    scored = lambda name: train.map_rows(
      lambda p, t: h[name](p, t).astype("float32"),
      rows["prompts"],
      rows["tokens"],
    )
    rows["rewards"] = scored("reward")
    if credit == "steps":
      rows["steps"] = scored("steps")
    if shown:
      repeat = lambda a: jnp.repeat(jnp.asarray(a), h["num_samples"], axis=0)
      solutions = repeat(batch["tokens"])
      placed = getattr(batch["prompts"], "sharding", None)
      if placed is not None:
        solutions = jax.device_put(solutions, placed)
      rows["solutions"] = solutions
    return rows

  def evidence_log_probs(params, rows, solutions):
    """log P(y_t | prompt that shows a solution, y_<t), [n, t]."""

    def one(part):
      prompts = h["evidence"](part["prompts"], part["solutions"])
      logits = _language.completion_logits(
        apply, params["student"], {**part, "prompts": prompts}
      )
      return lm.token_log_probs(logits, part["tokens"])

    part = {k: rows[k] for k in ("tokens", "where")}
    part |= {**_language.prompt_rows(rows), "solutions": solutions}
    return train.map_slices(one, part, slices=h["slices"])

  def prepare(params, batch, context):
    """Advantages of every token: groups need the whole batch."""
    where, rewards = batch["where"], batch["rewards"]
    groups = jnp.arange(rewards.shape[0]) // h["num_samples"]
    normalise = lambda scores: losses.group_advantages(scores, groups)
    if credit == "steps":
      plain = jax.vmap(normalise, 1, 1)(batch["steps"])
    else:
      plain = normalise(rewards)[:, None]
    advantages = jnp.where(where, plain, 0)
    rows = {k: v for k, v in batch.items() if k != "solutions"}
    if shown:
      mix = h["mix"]
      if h["decay_steps"] is not None:
        mix = losses.evidence_mix(
          context.step, mix=mix, decay_steps=h["decay_steps"]
        )
      positive = evidence_log_probs(params, batch, batch["solutions"])
      # At temperature 1, as the evidence: the sampler's own.
      old = batch["log_probs"]
      if credit == "self":
        delta = positive - old
        advantages = losses.self_evidence_advantages(
          advantages, old, positive, where, mix=mix, clip=h["band"]
        )
        rows["without_negative"] = jnp.zeros_like(rewards)
      else:
        worst = losses.pick_negative(rewards, groups, threshold=h["rejected"])
        known = worst >= 0
        wrong = batch["tokens"][jnp.maximum(worst, 0)]
        negative = evidence_log_probs(params, batch, wrong)
        delta = jnp.where(known[:, None], positive - negative, 0)
        advantages = losses.contrastive_evidence_advantages(
          advantages,
          positive,
          negative,
          where,
          mix=mix,
          clip=h["band"],
          has_negative=known,
          old_log_probs=old,
          fallback=h["fallback"],
        )
        rows["without_negative"] = (~known).astype(jnp.float32)
      rows["delta"] = delta
    rows["advantages"] = advantages
    return rows, context.carry

  def loss(params, batch, context):
    del context
    where = batch["where"]
    logits = _language.completion_logits(apply, params["student"], batch)
    old, weights = _language.behaviour(batch, h["importance_cap"])
    values = weights * losses.policy_gradient_loss(
      lm.token_log_probs(logits, batch["tokens"]),
      old,
      batch["advantages"],
      clip_low=h["clip_low"],
      clip_high=h["clip_high"],
      dual_clip=h["dual_clip"],
    )
    metrics = _language.student_metrics(logits, None, where)
    metrics["reward"] = train.mean(batch["rewards"])
    if shown:
      metrics["evidence"] = train.mean(jnp.abs(batch["delta"]), where)
      metrics["without_negative"] = train.mean(batch["without_negative"])
    return {"policy": train.mean(values, where)}, metrics

  return train.Method(
    name=slug,
    paper="arXiv:2605.19436",
    networks={"student": train.Trained()},
    losses={"student": loss},
    schedule=train.Schedule(cycle=(("student",),)),
    sample=_language.make_sample(apply, h),
    collect=collect,
    prepare=prepare,
  )
