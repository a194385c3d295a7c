"""TIP: token losses, scores and weighted choice of tokens."""

import functools

import jax
import jax.numpy as jnp

from distilljax import losses

# Many small programs, each run once or twice: compile them cheaply.
_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)

CALLS = {
  r"(loss|grad)_(reverse_kl|forward_kl|jsd_.*)": (
    "masked_mean(reverse_kl | forward_kl | generalized_jsd)"
  ),
  r"per_token_(reverse|forward)_kl": "token_importance",
  r"norm_(entropy|jsd|jsd_top\d+)": "token_importance",
  r"teacher_norm_entropy": "token_importance of the teacher",
  r"sample_k": "select_tokens(rate=.5)",
  r"inclusion_freq_.*": "select_tokens with Gumbel noise, frequency",
}
NOT_REPRODUCED = {
  r"one_sampled_index_set": "a random draw",
  r"teacher_token_prob|target_ids": "a softmax of the teacher, a metric",
}
TOLERANCE = {
  r"inclusion_freq_.*": (
    0.1,
    "frequencies of 2000 draws: .04 absolute where the largest is about .4",
  ),
}


@functools.partial(_jit, static_argnames=("name", "beta"))
def _loss(student, teacher, *, name, beta):
  fn = {
    "reverse_kl": losses.reverse_kl,
    "forward_kl": losses.forward_kl,
    "jsd": functools.partial(losses.generalized_jsd, beta=beta),
  }[name]
  return jax.value_and_grad(lambda s: losses.masked_mean(fn(s, teacher)))(
    student
  )


@functools.partial(_jit, static_argnames=("rate", "exponent", "draws", "dtype"))
def _frequency(scores, *, rate, exponent, draws, dtype):
  noise = jax.random.gumbel(jax.random.key(0), (draws, scores.shape[0]), dtype)
  chosen = losses.select_tokens(
    jnp.broadcast_to(scores, noise.shape),
    rate=rate,
    exponent=exponent,
    noise=noise,
  )
  return jnp.mean(chosen.mask, axis=0)


def reproduce(golden):
  """The keys of CALLS."""
  student, teacher = golden["student_logits"], golden["teacher_logits"]
  out = {}
  for m in golden.match(r"loss_(reverse_kl|forward_kl|jsd)(?:_([\d.]+))?"):
    beta = None if m.group(2) is None else float(m.group(2))
    loss, grad = _loss(student, teacher, name=m.group(1), beta=beta)
    out[m.group(0)] = loss
    out[m.group(0).replace("loss", "grad")] = grad
  scores = _jit(losses.token_importance)(student, teacher)
  out["per_token_reverse_kl"] = scores.reverse_kl
  out["per_token_forward_kl"] = scores.forward_kl
  out["norm_entropy"] = scores.entropy
  out["norm_jsd"] = scores.jsd
  for m in golden.match(r"norm_jsd_top(\d+)"):
    top = functools.partial(losses.token_importance, jsd_top_k=int(m.group(1)))
    out[m.group(0)] = _jit(top)(student, teacher).jsd
  out["teacher_norm_entropy"] = _jit(losses.token_importance)(
    teacher, teacher
  ).entropy
  half = losses.select_tokens(scores.entropy[None], rate=0.5)
  out["sample_k"] = jnp.sum(half.mask)
  pattern = r"inclusion_freq_ratio([\d.]+)_alpha([\d.]+)_\d+draws"
  for m in golden.match(pattern):
    out[m.group(0)] = _frequency(
      scores.entropy,
      rate=float(m.group(1)),
      exponent=float(m.group(2)),
      draws=4000,
      dtype=scores.entropy.dtype,
    )
  return {k: v for k, v in out.items() if k in golden}
