"""GKD's generalised JSD, the k-estimators and MiniLLM's advantage."""

import functools

import jax
import jax.numpy as jnp

from distilljax import losses

# Many small programs, each run once or twice: compile them cheaply.
_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)

CALLS = {
  r"loss_batchmean|loss_all_masked|loss_extreme|minillm_single_step_loss": (
    "masked_mean(generalized_jsd | reverse_kl)"
  ),
  r"loss_(num_items|sum|batchmean_nolabels)": (
    "masked_sum_and_count(generalized_jsd)"
  ),
  r"grad_b\d+_t\d+|minillm_single_step_grad": "gradient of the same",
  r"klpen_(grad_)?\w+": "kl_estimate and its gradient",
  r"minillm_adv_.*": "minillm_advantage(discount='absolute')",
}
NOT_REPRODUCED = {
  r"loss_mean_over_masked_tokens_and_vocab": (
    "a mean over the vocabulary as well: a reduction of the peer's"
  ),
  r"loss_none_masked_elementwise_beta_idx\d+": (
    "terms before the sum over the vocabulary: ours are summed"
  ),
  r"sampled_ids": "which tokens the given log-probabilities belong to",
}
TOLERANCE = {
  r"minillm_adv_gamma.*_ln1": (
    1e-3,
    "TRL counts a masked position as 1e-4 of a token in the normaliser",
  ),
}


@functools.partial(_jit, static_argnames="beta")
def _case(student, teacher, where, temperature, *, beta):
  """(token mean, sum) and the gradient of the mean."""

  def fn(student):
    values = losses.generalized_jsd(
      student, teacher, beta=beta, temperature=temperature
    )
    total, _ = losses.masked_sum_and_count(values, where)
    return losses.masked_mean(values, where), total

  return jax.value_and_grad(fn, has_aux=True)(student)


@functools.partial(_jit, static_argnames="kind")
def _estimate(student, teacher, *, kind):
  fn = functools.partial(losses.kl_estimate, kind=kind)
  value, pull = jax.vjp(lambda s: fn(s, teacher), student)
  return value, pull(jnp.ones_like(value))[0]


@_jit
def _single_step(student, teacher, where):
  return jax.value_and_grad(
    lambda s: losses.masked_mean(losses.reverse_kl(s, teacher), where)
  )(student)


def reproduce(golden):
  """The keys of CALLS."""
  student, teacher = golden["student_logits"], golden["teacher_logits"]
  where = golden["labels"] != -100
  betas = [float(b) for b in golden["betas"]]
  temperatures = golden["temperatures"]
  items = golden.number("num_items_in_batch")
  everything = jnp.ones_like(where)
  out = {}
  one = jnp.ones_like(temperatures[0])
  batchmean, extreme, sums, unmasked = [], [], [], []
  for i, beta in enumerate(betas):
    case = functools.partial(_case, beta=beta)
    row = []
    for j, temperature in enumerate(temperatures):
      (value, _), grad = case(student, teacher, where, temperature)
      row.append(value)
      out[f"grad_b{i}_t{j}"] = grad
    batchmean.append(jnp.stack(row))
    extreme.append(case(student * 20, teacher * 20, where, one)[0][0])
    sums.append(case(student, teacher, where, one)[0][1])
    unmasked.append(case(student, teacher, everything, one)[0][1])
  out["loss_batchmean"] = jnp.stack(batchmean)
  out["loss_extreme"] = jnp.stack(extreme)
  out["loss_sum"] = jnp.stack(sums)
  out["loss_num_items"] = jnp.stack(sums) / items
  out["loss_batchmean_nolabels"] = jnp.stack(unmasked) / where.shape[0]
  masked = _case(student, teacher, ~everything, one, beta=0.5)
  out["loss_all_masked"] = masked[0][0]
  s, t = golden["student_lp"], golden["teacher_lp"]
  for m in golden.match(r"klpen_(k\d|abs)"):
    value, grad = _estimate(s, t, kind=m.group(1))
    out[m.group(0)] = value
    out[f"klpen_grad_{m.group(1)}"] = grad
  mask = golden["minillm_mask"] > 0
  for m in golden.match(r"minillm_adv_gamma([\d.]+)_ln([01])"):
    out[m.group(0)] = losses.minillm_advantage(
      s,
      t,
      mask,
      gamma=float(m.group(1)),
      length_norm=m.group(2) == "1",
      discount="absolute",
    )
  loss, grad = _single_step(student, teacher, mask)
  out["minillm_single_step_loss"] = loss
  out["minillm_single_step_grad"] = grad
  return {k: v for k, v in out.items() if k in golden}
