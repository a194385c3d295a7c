"""SDPO, TRL's SDFT/SDPO and OPSD: self-distillation per token."""

import functools

import jax
import jax.numpy as jnp

from distilljax import losses

CALLS = {
  r"sdpo_(loss|grad)_(full|topk_tail|topk_renorm)_.*": (
    "masked_mean(self_distillation_loss x truncated_importance_weights)"
  ),
  r"sdpo_(loss|grad)_sampled": (
    "masked_mean(sampled_reverse_kl x truncated_importance_weights)"
  ),
  r"trl_(full|topk)_per_token_.*": "self_distillation_loss",
  r"trl_sampled_per_token": "sampled_reverse_kl",
  r"trl_is_clip": "truncated_importance_weights(cap=2)",
  r"opsd_jsd_.*": (
    "masked_mean(self_distillation_loss(support='teacher', temperature=1.1))"
  ),
}
NOT_REPRODUCED = {r"alphas": "repeated in the names of the keys"}
_MODES = {
  "full": lambda k: {"top_k": None, "tail": "bucket"},
  "topk_tail": lambda k: {"top_k": k, "tail": "bucket"},
  "topk_renorm": lambda k: {"top_k": k, "tail": "renormalize"},
}


def _log_probs(logits, ids):
  """Of the given tokens: what a rollout records."""
  log_p = jax.nn.log_softmax(logits, axis=-1)
  return jnp.take_along_axis(log_p, ids[..., None], axis=-1)[..., 0]


# Many small programs, each run once or twice: compile them cheaply.
_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@functools.partial(_jit, static_argnames=("alpha", "top_k", "tail"))
def _sdpo(student, teacher, ids, old, where, cap, *, alpha, top_k, tail):
  """((loss, per-token values), gradient); cap = inf: no correction at all."""

  def loss(student):
    values = losses.self_distillation_loss(
      student, teacher, alpha=alpha, top_k=top_k, tail=tail
    )
    weights = losses.truncated_importance_weights(
      _log_probs(student, ids), old, where, cap=cap
    )
    weights = jnp.where(jnp.isinf(cap), 1.0, weights).astype(values.dtype)
    return losses.masked_mean(values * weights, where), values

  return jax.value_and_grad(loss, has_aux=True)(student)


@functools.partial(_jit, static_argnames=("alpha", "top_k"))
def _opsd(student, teacher, where, *, alpha, top_k):
  values = losses.self_distillation_loss(
    student,
    teacher,
    alpha=alpha,
    top_k=top_k,
    tail="renormalize",
    temperature=1.1,
    support="teacher",
  )
  return losses.masked_mean(values, where)


@_jit
def _sampled(student, teacher, ids, old, where):
  def loss(student):
    log_probs = _log_probs(student, ids)
    values = losses.sampled_reverse_kl(log_probs, _log_probs(teacher, ids))
    weights = losses.truncated_importance_weights(
      log_probs, old, where, cap=2.0
    )
    return losses.masked_mean(values * weights, where), values

  return jax.value_and_grad(loss, has_aux=True)(student)


def reproduce(golden):
  """The keys of CALLS."""
  student, teacher = golden["student_logits"], golden["teacher_logits"]
  ids, old = golden["completion_ids"], golden["old_lp"]
  response = golden["response_mask"] > 0
  where = response & (golden["self_distillation_mask"] > 0)[:, None]
  k = golden.number("topk")
  sdpo = functools.partial(_sdpo, student, teacher, ids, old, where)
  out = {}
  pattern = (
    r"sdpo_loss_(full|topk_tail|topk_renorm)_alpha([\d.]+)_clip(None|[\d.]+)"
  )
  for m in golden.match(pattern):
    cap = jnp.inf if m.group(3) == "None" else float(m.group(3))
    (loss, _), grad = sdpo(
      cap, alpha=float(m.group(2)), **_MODES[m.group(1)](k)
    )
    out[m.group(0)] = loss
    out[m.group(0).replace("loss", "grad", 1)] = grad
  (loss, values), grad = _sampled(student, teacher, ids, old, where)
  out["sdpo_loss_sampled"], out["sdpo_grad_sampled"] = loss, grad
  out["trl_sampled_per_token"] = values
  pattern = r"trl_(full|topk)_per_token_alpha([\d.]+)(?:_tail([01]))?"
  for m in golden.match(pattern):
    mode = {None: "full", "0": "topk_renorm", "1": "topk_tail"}[m.group(3)]
    (_, values), _ = sdpo(jnp.inf, alpha=float(m.group(2)), **_MODES[mode](k))
    out[m.group(0)] = values
  out["trl_is_clip"] = losses.truncated_importance_weights(
    _log_probs(student, ids), old, cap=2.0
  )
  kept = golden["labels"] != -100
  for m in golden.match(r"opsd_jsd_beta([\d.]+)_topk(None|\d+)"):
    out[m.group(0)] = _opsd(
      student,
      teacher,
      kept,
      alpha=float(m.group(1)),
      top_k=None if m.group(2) == "None" else int(m.group(2)),
    )
  return {k: v for k, v in out.items() if k in golden}
