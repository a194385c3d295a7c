"""Token divergences of eight KD libraries, where they mean what ours mean.

Other libraries multiply by temperature^2 and distillm drops the teacher's
entropy, a constant; both are conversions here (a factor, `losses.entropy`).
"""

import functools

import jax
import jax.numpy as jnp

from distilljax import losses

CALLS = {
  r"distillm_(forward|skewed_forward)_kl(__grad)?": (
    "masked_mean(forward_kl | skew_forward_kl), + entropy(teacher)"
  ),
  r"distillm_(reverse|skewed_reverse)_kl(__grad)?": (
    "masked_mean(reverse_kl | skew_reverse_kl)"
  ),
  r"distillm_js(__grad)?": "masked_mean(generalized_jsd(beta=1-lambda))",
  r"distillm_tv(__grad)?": "masked_mean(total_variation)",
  r"akl(__grad)?": "masked_mean(adaptive_kl)",
  r"distillkit_dense_(kl|jsd|tvd)_T.*": (
    "masked_mean(forward_kl | generalized_jsd | total_variation) x T^2"
  ),
  r"distillkit_sparse_kl_(logits_)?zero_T.*": (
    "masked_mean(sparse_forward_kl(tail='drop')) x T^2"
  ),
  r"distillkit_sparse_kl_symuniform_T.*": (
    "masked_mean(sparse_forward_kl) x T^2 at the capture's temperature"
  ),
  r"modelopt_logits_kl_(batchmean|sum|none)_T.*": "forward_kl x T^2, summed",
  r"modelopt_meg_full_(fwd|rev)(__gradsum)?": "forward_kl | reverse_kl",
  r"modelopt_meg_top\d+_(fwd|rev)(__gradsum)?": (
    "sparse_forward_kl | sparse_reverse_kl(tail='renormalize')"
  ),
  r"minima_soft_cross_entropy(__grad)?": "forward_kl + entropy(teacher)",
  r"tunix_logit_T.*_topk\d+_soft": (
    "forward_kl | sparse_forward_kl(tail='renormalize') x T^2"
  ),
  r"maxtext_.*:distill/(kl_div_T1|kl_div_at_T|soft_loss)": (
    "masked_sum_and_count(forward_kl) (x T^2)"
  ),
}
NOT_REPRODUCED = {
  r"distillm_symmetric_kl(__grad)?": "a weighted sum of two keys above",
  r"akl_(head|tail)_ratio": "weights inside adaptive_kl",
  r"distillkit_sparse_(jsd|tvd)_.*": "no sparse form of these is offered",
  r"distillkit_sparse_kl_symuniform_T.*": (
    "tail raised to a power: wrong off the capture's temperature"
  ),
  r"distillkit_(hinge|logistic_ranking).*|modelopt_mft_.*|labels_full": (
    "ranking and label-mixing losses: not in the library"
  ),
  r"distillkit_hs_.*|hs_.*|maxtext_feat_.*": "hidden-state losses",
  r"modelopt_logits_kl_mean_T.*": "divides by the vocabulary as well",
  r"modelopt_balancer_.*|maxtext_schedule_.*": "loss weights of a trainer",
  r"tunix_logit_T[\d.]+_topk\d+(__grad)?": (
    "mixed with the cross entropy of labels"
  ),
  r"maxtext_sparse_topk(__grad)?|maxtext_[a-z0-9]+_step\d+(__grad)?": (
    "mixed with cross entropy and features"
  ),
  r"maxtext_.*:distill/.*": "what the trainer logs beside the loss",
}

# Many small programs, each run once or twice: compile them cheaply.
_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
_DENSE = {
  "forward": losses.forward_kl,
  "reverse": losses.reverse_kl,
  "jsd": losses.generalized_jsd,
  "tv": losses.total_variation,
  "akl": losses.adaptive_kl,
  "skewed_forward": losses.skew_forward_kl,
  "skewed_reverse": losses.skew_reverse_kl,
}
_SPARSE = {
  "forward": losses.sparse_forward_kl,
  "reverse": losses.sparse_reverse_kl,
}


@functools.partial(_jit, static_argnames=("name", "options"))
def _dense(student, teacher, temperature, where, *, name, options=()):
  """(values, mean, gradient of the mean, gradient of the sum)."""
  fn = functools.partial(_DENSE[name], **dict(options))

  def total(student):
    values = fn(student, teacher, temperature=temperature)
    return jnp.sum(values), values

  def mean(student):
    return losses.masked_mean(total(student)[1], where)

  grad_sum, values = jax.grad(total, has_aux=True)(student)
  value, grad = jax.value_and_grad(mean)(student)
  return values, value, grad, grad_sum


@functools.partial(_jit, static_argnames=("name", "tail"))
def _sparse(student, ids, log_probs, temperature, where, *, name, tail):
  def total(student):
    values = _SPARSE[name](
      student, ids, log_probs, temperature=temperature, tail=tail
    )
    return jnp.sum(values), values

  def mean(student):
    return losses.masked_mean(total(student)[1], where)

  grad_sum, values = jax.grad(total, has_aux=True)(student)
  value, grad = jax.value_and_grad(mean)(student)
  return values, value, grad, grad_sum


def reproduce(golden):
  """The keys of CALLS."""
  student, teacher = golden["student_logits"], golden["teacher_logits"]
  where = golden["labels"] != -100
  everywhere = jnp.ones_like(where)
  jsd_weight, skew, _, _, t_gen, _ = (float(x) for x in golden["hyper"])
  hyper2 = next(m.group(0) for m in golden.match(r"hyper2_.*"))
  meg_temperature = golden[hyper2][1]
  one = jnp.ones_like(meg_temperature)
  out = {}

  def put(key, result, scale=1.0, constant=0.0, suffix="__grad"):
    out[key] = result[1] * scale + constant
    out[key + suffix] = result[2] * scale

  def dense(name, temperature=one, mask=where, **options):
    return _dense(
      student,
      teacher,
      temperature,
      mask,
      name=name,
      options=tuple(options.items()),
    )

  h = losses.entropy(teacher)
  entropy = losses.masked_mean(h, where)
  put("distillm_forward_kl", dense("forward"), constant=entropy)
  put("distillm_reverse_kl", dense("reverse"))
  put("distillm_js", dense("jsd", beta=1 - jsd_weight))
  put("distillm_tv", dense("tv"))
  put(
    "distillm_skewed_forward_kl",
    dense("skewed_forward", alpha=skew),
    constant=entropy,
  )
  put("distillm_skewed_reverse_kl", dense("skewed_reverse", alpha=skew))
  put("akl", dense("akl"))
  put(
    "minima_soft_cross_entropy",
    dense("forward", mask=everywhere),
    constant=losses.masked_mean(h),
  )
  for m in golden.match(r"distillkit_dense_(kl|jsd|tvd)_T([\d.]+)"):
    temperature = one * float(m.group(2))
    name = {"kl": "forward", "jsd": "jsd", "tvd": "tv"}[m.group(1)]
    put(m.group(0), dense(name, temperature), temperature**2)
  ids = golden["topk_ids"]
  pattern = r"distillkit_sparse_kl_(logits_zero|zero|symuniform)_T([\d.]+)"
  for m in golden.match(pattern):
    temperature = one * float(m.group(2))
    tail = "drop"
    if m.group(1) == "symuniform":
      if float(m.group(2)) != t_gen:
        continue
      tail, known = "bucket", golden["topk_logprobs"]
    else:
      # "zero": the teacher is renormalised over its k tokens beforehand.
      source = "logits" if m.group(1) == "logits_zero" else "logprobs"
      known = jax.nn.log_softmax(golden[f"topk_{source}"] / temperature)
    result = _sparse(
      student, ids, known, temperature, where, name="forward", tail=tail
    )
    put(m.group(0), result, temperature**2)
  for m in golden.match(r"modelopt_logits_kl_(batchmean|sum|none)_T([\d.]+)"):
    temperature = one * float(m.group(2))
    values, _, _, grad = dense("forward", temperature, everywhere)
    scale = temperature**2
    if m.group(1) == "none":
      out[m.group(0)] = values * scale
      continue
    scale = scale / (student.shape[0] if m.group(1) == "batchmean" else 1)
    total, _ = losses.masked_sum_and_count(values)
    out[m.group(0)] = total * scale
    out[m.group(0) + "__grad"] = grad * scale
  for m in golden.match(r"modelopt_meg_(full|top(\d+))_(fwd|rev)"):
    name = "forward" if m.group(3) == "fwd" else "reverse"
    if m.group(1) == "full":
      result = dense(name, meg_temperature, everywhere)
    else:
      top = _top(teacher, meg_temperature, int(m.group(2)))
      result = _sparse(
        student,
        *top,
        meg_temperature,
        everywhere,
        name=name,
        tail="renormalize",
      )
    out[m.group(0)], out[m.group(0) + "__gradsum"] = result[0], result[3]
  for m in golden.match(r"tunix_logit_T([\d.]+)_topk(\d+)_soft"):
    temperature = one * float(m.group(1))
    if int(m.group(2)) == 0:
      result = dense("forward", temperature, everywhere)
    else:
      top = _top(teacher, temperature, int(m.group(2)))
      result = _sparse(
        student,
        *top,
        temperature,
        everywhere,
        name="forward",
        tail="renormalize",
      )
    out[m.group(0)] = result[1] * temperature**2
  for m in golden.match(r"(maxtext_[a-z0-9]+_step\d+):distill/temperature"):
    temperature = golden[m.group(0)][0]
    for key, scale, at in (
      ("kl_div_T1", 1, one),
      ("kl_div_at_T", 1, temperature),
      ("soft_loss", temperature**2, temperature),
    ):
      values = dense("forward", at)[0]
      total, count = losses.masked_sum_and_count(values, where)
      out[f"{m.group(1)}:distill/{key}"] = jnp.stack([total * scale, count])
  return {k: v for k, v in out.items() if k in golden}


def _top(teacher, temperature, k):
  """(ids, log-probabilities) of the teacher's k largest tokens."""
  log_probs, ids = jax.lax.top_k(
    jax.nn.log_softmax(teacher / temperature, axis=-1), k
  )
  return ids, log_probs
