"""G-OPD's advantage, its clipped policy loss and the importance weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import losses

CALLS = {
  r"adv_(single|multi)_\d+|adv_no_base_models": (
    "gopd_advantage, route_teacher"
  ),
  r"is_w_(token|sequence)": "truncated_importance_weights",
  r"pg_(loss|grad)_.*": (
    "policy_gradient_loss x truncated_importance_weights, reduced"
  ),
}
NOT_REPRODUCED = {
  r"student_logits|sampled_ids": "what the log-probabilities were made from",
}


def _reduce(values, where, aggregation):
  """The four aggregations, in terms of the library's reductions."""
  if aggregation == "token-mean":
    return losses.masked_mean(values, where)
  if aggregation == "seq-mean-token-mean":
    return jnp.mean(jax.vmap(losses.masked_mean)(values, where))
  total, _ = losses.masked_sum_and_count(values, where)
  if aggregation == "seq-mean-token-sum":
    return total / values.shape[0]
  assert aggregation == "seq-mean-token-sum-norm", aggregation
  return total / values.shape[1]


@functools.partial(jax.jit, static_argnames=("aggregation", "on_policy"))
def _policy(lps, where, scale, cap, *, aggregation, on_policy):
  student, old, teacher, reference, rollout = lps

  def loss(student):
    behaviour = jax.lax.stop_gradient(student) if on_policy else old
    advantage = losses.gopd_advantage(
      behaviour,
      teacher,
      reference,
      reward_scale=scale,
      max_log_ratio=np.inf,
    )
    weights = losses.truncated_importance_weights(
      student, rollout, where, cap=cap
    )
    values = losses.policy_gradient_loss(student, behaviour, advantage)
    return _reduce(values * weights, where, aggregation)

  return jax.value_and_grad(loss)(student)


def reproduce(golden):
  """The keys of CALLS."""
  student, old, teacher, reference, second, rollout = (
    golden[f"{n}_lp"]
    for n in (
      "student",
      "old",
      "teacher",
      "reference",
      "second_teacher",
      "rollout",
    )
  )
  where = golden["response_mask"] > 0
  scales = [float(x) for x in golden["lambdas"]]
  cap = golden.number("is_threshold")
  advantage = functools.partial(losses.gopd_advantage, max_log_ratio=np.inf)
  out = {}
  for i, scale in enumerate(scales):
    out[f"adv_single_{i}"] = advantage(
      old, teacher, reference, reward_scale=scale
    )
  # An unknown domain gets plain distillation from the first teacher, there.
  index = golden["route_teacher_index"]
  known = index < 2
  routed = losses.route_teacher(
    jnp.stack([teacher, second]), jnp.where(known, index, 0)
  )
  for i, scale in enumerate(scales):
    out[f"adv_multi_{i}"] = advantage(
      old, routed, reference, reward_scale=jnp.where(known, scale, 1.0)
    )
  out["adv_no_base_models"] = advantage(old, teacher, None, reward_scale=1.0)
  for level in ("token", "sequence"):
    out[f"is_w_{level}"] = losses.truncated_importance_weights(
      student, rollout, where, level=level, cap=cap
    )
  lps = (student, old, teacher, reference, rollout)
  pattern = r"pg_loss_(onpolicy|offpolicy)_([a-z-]+)_lam(\d+)"
  for m in golden.match(pattern):
    loss, grad = _policy(
      lps,
      where,
      jnp.full(student.shape[:1], scales[int(m.group(3))], student.dtype),
      cap,
      aggregation=m.group(2),
      on_policy=m.group(1) == "onpolicy",
    )
    out[m.group(0)] = loss
    out[m.group(0).replace("pg_loss", "pg_grad")] = grad
  return {k: v for k, v in out.items() if k in golden}
