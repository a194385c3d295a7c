"""GKD: generalised distillation on a mixture of own samples and data.

Agarwal et al., On-Policy Distillation of Language Models, 2023,
arXiv:2306.13649; values as in TRL's GKDConfig. A step's whole batch is, with
probability `on_policy`, the student's own completions (no gradient through
sampling), else the teacher's (`seq_kd`) or the data's; the loss is a divergence
between forward (beta 0) and reverse (beta 1) KL to the teacher's token
distributions. Two temperatures, because they are two things: the sampler's and
the loss's.

Networks: `student` (trained), `teacher` (frozen). Batch: `prompts` [b, p] with
`prompt_where`, `tokens` [b, t] with `where` (completions of the data, at most
`max_new_tokens` long; not read where they cannot be needed).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distilljax import _checks, train
from distilljax.methods import _common, _language

DEFAULTS = {
  "on_policy": 0.5,  # probability of the student's samples (lmbda); TRL
  "seq_kd": False,  # other batches from the teacher, not the data; TRL
  "beta": 0.5,  # weight of the teacher in the mixture of the JSD; TRL
  "temperature": 1.0,  # of the loss, both logits; TRL
  "loss_implementation": None,  # fused where networks can, or "plain"; ours
  "sampling_temperature": 0.9,  # TRL
  "max_new_tokens": 128,  # TRL
  "eos_id": None,  # that ends a sample and is part of it; the task's
  "pad_id": 0,  # what stands behind it; the task's
  "top_k": None,  # of the sampler: none; TRL
  "top_p": None,  # of the sampler: none; TRL
}


def make(
  apply_fns: Mapping[str, Callable[..., Any]], **hyper: Any
) -> train.Method:
  """GKD as a `Method`.

  Args:
    apply_fns: `student`, `teacher`: networks with the call form of the zoo's
      "transformer".
    **hyper: see `DEFAULTS`.

  Returns:
    The method; `sample` completes inputs["prompts"] with at most `steps`
    tokens.
  """
  slug = "gkd"
  h = _common.hyper_parameters(slug, DEFAULTS, hyper)
  _checks.in_range(slug, "on_policy", h["on_policy"], 0, 1)
  _checks.in_range(slug, "beta", h["beta"], 0, 1)
  names = ["student", "teacher"]
  apply, teacher = _common.networks_for(slug, apply_fns, names)
  compared = {k: apply_fns[k] for k in names}
  implementation = _language.implementation_of(slug, h, compared)
  own = _language.make_rollouts(apply, h)
  theirs = _language.make_rollouts(teacher, h, name="teacher rollout")

  def collect(params, batch, context):
    # The step's key is the same on every process, and so is the coin.
    coin = jax.random.uniform(train.named_key(context.key, "source"))
    mine = float(coin) < h["on_policy"]
    if mine:
      rows = own(params["student"], batch, context.key)
    elif h["seq_kd"]:
      rows = theirs(params["teacher"], batch, context.key)
    else:
      rows = batch
    rows = _language.fit(rows, h["max_new_tokens"], h["pad_id"])
    return {**rows, "own": jnp.full_like(rows["where"][:, 0], mine)}

  def loss(params, batch, context):
    del context
    values, metrics = _language.divergence(
      implementation,
      compared,
      params,
      batch,
      kind="generalized_jsd",
      logged="reverse_kl",
      beta=h["beta"],
      temperature=h["temperature"],
    )
    metrics["own"] = train.mean(batch["own"].astype(jnp.float32))
    return {"jsd": train.mean(values, batch["where"])}, metrics

  return train.Method(
    name=slug,
    paper="arXiv:2306.13649",
    networks={"student": train.Trained(), "teacher": train.Frozen()},
    losses={"student": loss},
    schedule=train.Schedule(cycle=(("student",),)),
    sample=_language.make_sample(apply, h),
    collect=collect,
  )
