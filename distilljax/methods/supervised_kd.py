"""Supervised distillation of a language model, on data or teacher samples.

Kim & Rush, Sequence-Level Knowledge Distillation, 2016, arXiv:1606.07947: the
student learns the teacher's token distributions on given completions (word
level, forward KL), or the teacher's completions themselves (sequence level,
cross entropy). With cross entropy on data it is plain fine-tuning, which is how
the jobs make their first model. Departure from the paper: a teacher's
completions are sampled, not found by beam search. Details of the paper from
memory.

Networks: `student` (trained), `teacher` (frozen; absent for cross entropy on
data). Batch: `prompts` [b, p] with `prompt_where`, `tokens` [b, t] with `where`
(completions; not read with source="teacher").
"""

from collections.abc import Callable, Mapping
from typing import Any

from distilljax import _checks, lm, train
from distilljax.methods import _common, _language

DEFAULTS = {
  "objective": "forward_kl",  # word level; or "cross_entropy"; sections 2, 3
  "source": "data",  # of completions; or "teacher": its samples, sequence level
  "temperature": 1.0,  # of the loss, both logits; TRL's GKDTrainer
  "loss_implementation": None,  # fused where networks can, or "plain"; ours
  "sampling_temperature": 1.0,  # of the teacher's samples; ours (no beam)
  "max_new_tokens": 128,  # of the teacher's samples; TRL's GKDConfig
  "eos_id": None,  # that ends a sample and is part of it; the task's
  "pad_id": 0,  # what stands behind it; the task's
  "top_k": None,  # of the sampler: none; ours
  "top_p": None,  # of the sampler: none; ours
}


def make(
  apply_fns: Mapping[str, Callable[..., Any]], **hyper: Any
) -> train.Method:
  """Supervised distillation as a `Method`.

  Args:
    apply_fns: `student` and, unless it is cross entropy on data, `teacher`:
      networks with the call form of the zoo's "transformer".
    **hyper: see `DEFAULTS`.

  Returns:
    The method; `sample` completes inputs["prompts"] with at most `steps`
    tokens.
  """
  slug = "supervised_kd"
  h = _common.hyper_parameters(slug, DEFAULTS, hyper)
  _checks.one_of(
    slug, "objective", h["objective"], ("forward_kl", "cross_entropy")
  )
  _checks.one_of(slug, "source", h["source"], ("data", "teacher"))
  by_kl = h["objective"] == "forward_kl"
  sampled = h["source"] == "teacher"
  needed = ["student"] + (["teacher"] if by_kl or sampled else [])
  apply, *teachers = _common.networks_for(slug, apply_fns, needed)
  compared = {k: apply_fns[k] for k in needed}
  implementation = _language.implementation_of(
    slug, h, compared, None if by_kl else "objective='cross_entropy'"
  )

  def loss(params, batch, context):
    del context
    where = batch["where"]
    if by_kl:
      values, metrics = _language.divergence(
        implementation,
        compared,
        params,
        batch,
        kind="forward_kl",
        logged="forward_kl",
        temperature=h["temperature"],
      )
    else:
      ours = _language.completion_logits(apply, params["student"], batch)
      values = -lm.token_log_probs(
        ours, batch["tokens"], temperature=h["temperature"]
      )
      metrics = _language.student_metrics(ours, None, where)
    return {h["objective"]: train.mean(values, where)}, metrics

  collect = None
  if sampled:
    rollouts = _language.make_rollouts(teachers[0], h)

    def collect(params, batch, context):
      rows = rollouts(params["teacher"], batch, context.key)
      return _language.fit(rows, h["max_new_tokens"], h["pad_id"])

  networks: dict[str, train.Role] = {"student": train.Trained()}
  if teachers:
    networks["teacher"] = train.Frozen()
  return train.Method(
    name=slug,
    paper="arXiv:1606.07947",
    networks=networks,
    losses={"student": loss},
    schedule=train.Schedule(cycle=(("student",),)),
    sample=_language.make_sample(apply, h),
    collect=collect,
  )
