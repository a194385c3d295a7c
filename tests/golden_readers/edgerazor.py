"""EdgeRazor's entropy-aware KL; its factor temperature^2 is a conversion."""

import functools

import jax
import jax.numpy as jnp

from distilljax import losses

CALLS = {
  r"kld_(fwd|rev)_(batch_mean|mean|sum)_T[\d.]+(__grad)?": (
    "entropy_aware_kl(confidence=0 | 1) x T^2: the KLs of floored probabilities"
  ),
  r"eakld_(entropy|label)_k\d+_T[\d.]+(__grad)?": "entropy_aware_kl x T^2",
  r"gamma_(entropy|label)_k\d+_T[\d.]+": "teacher_confidence",
}
NOT_REPRODUCED = {
  r"adaptive_layers_.*|teacher_hidden|mse_.*|feat_[st]": (
    "layer choice and feature loss: only the KL is in scope"
  ),
  r"w|block_size|weight_quant_.*|state_.*|mp_.*": "quantisers: not in scope",
}

# Many small programs, each run once or twice: compile them cheaply.
_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def _reduce(values, where, name):
  """The official reductions, in terms of the library's."""
  if name == "batch_mean":
    return jnp.mean(jax.vmap(losses.masked_mean)(values, where))
  if name == "mean":
    return losses.masked_mean(values, where)
  return losses.masked_sum_and_count(values, where)[0]


@functools.partial(_jit, static_argnames=("confidence", "k", "reduction"))
def _loss(
  student, teacher, labels, where, temperature, *, confidence, k, reduction
):
  def fn(student):
    values = losses.entropy_aware_kl(
      student,
      teacher,
      where,
      labels=labels,
      confidence=confidence,
      k=k,
      temperature=temperature,
    )
    return temperature**2 * _reduce(values, where, reduction)

  return jax.value_and_grad(fn)(student)


def reproduce(golden):
  """The keys of CALLS."""
  student, teacher = golden["student_logits"], golden["teacher_logits"]
  labels = golden["labels"]
  where = labels != -100
  one = jnp.ones((), student.dtype)
  out = {}

  def put(key, temperature, **options):
    loss, grad = _loss(
      student, teacher, labels, where, one * float(temperature), **options
    )
    out[key], out[key + "__grad"] = loss, grad

  for m in golden.match(r"kld_(fwd|rev)_(batch_mean|mean|sum)_T([\d.]+)"):
    put(
      m.group(0),
      m.group(3),
      confidence=0.0 if m.group(1) == "fwd" else 1.0,
      k=16,
      reduction=m.group(2),
    )
  for m in golden.match(r"eakld_(entropy|label)_k(\d+)_T([\d.]+)"):
    put(
      m.group(0),
      m.group(3),
      confidence=m.group(1),
      k=int(m.group(2)),
      reduction="batch_mean",
    )
  for m in golden.match(r"gamma_(entropy|label)_k(\d+)_T[\d.]+"):
    out[m.group(0)] = losses.teacher_confidence(
      teacher, where, labels=labels, kind=m.group(1), k=int(m.group(2))
    )
  return {k: v for k, v in out.items() if k in golden}
