"""ALM: chunk alignment, chunk likelihoods, their divergences, ULD."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import losses
from distilljax.lm import alignment

CALLS = {
  r"alignment_(student|teacher)_\w+": "lm.alignment.align_chunks",
  r"(grad_)?alm__.*": (
    "alm_loss of chunk_log_probs (+ boundary_log_probs, merge_chunks)"
  ),
  r"alm_num_(log1p_)?token_count": "alm_loss x token counts",
  r"uld_(loss|grad)": "masked_mean(uld_loss)",
  r"div_(fkl|rkl)_T.*": "forward_kl | reverse_kl",
  r"div_(sfkl|srkl)_T.*": "skew_forward_kl | skew_reverse_kl",
}
NOT_REPRODUCED = {
  r"sft_loss": "cross entropy of labels, a metric",
  r"log1mexp_[xy]": "private to the losses",
  r"(hidden|latents)_.*": "hidden-state losses",
  r"div_akl_T.*": (
    "tokenkit gives the token that crosses the head's mass to the head, and"
    " 1 - a is that mass; adaptive_kl follows its authors' code"
    " (lm_kd_divergences, akl)"
  ),
  r"mt_.*": "gradient balancing of a trainer",
}
_KINDS = {"joschu_k2": "k2", "joschu_k3": "k3"}

# Many small programs, each run once or twice: compile them cheaply.
_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def _pieces(golden, side):
  """Every row's tokens as bytes; the end of text is bytes like any other."""
  key = f"{side}_pieces"
  golden.read.add(key)  # text: no array to be had from `golden[key]`
  pieces = [str(p) for p in golden.theirs(key)]
  tokens = alignment.token_bytes(
    pieces, kind="byte_level", special=["<pad>", "<eos>"]
  )
  tokens = [t.encode() if isinstance(t, str) else t for t in tokens]
  ids = np.asarray(golden[f"input_ids_{side}"])
  mask = np.asarray(golden[f"attention_mask_{side}"]) > 0
  return [[tokens[i] for i in row[m]] for row, m in zip(ids, mask)]


def _align(teacher, student, lengths, kind):
  rows = [
    alignment.align_chunks(t, s, kind=kind) for t, s in zip(teacher, student)
  ]
  return alignment.pad_alignments(
    rows, teacher_length=lengths[0], student_length=lengths[1]
  )


def _chunks(student, teacher, ids, chunk_ids, boundaries, mode, c):
  """(student's, teacher's log-likelihoods, counts, official counts) [b, c]."""
  a, b = (
    losses.chunk_log_probs(x, i, s, num_chunks=c)
    for x, i, s in zip((teacher, student), ids, chunk_ids)
  )
  wa, wb = (
    losses.boundary_log_probs(x, w, s, num_chunks=c)
    for x, w, s in zip((teacher, student), boundaries, chunk_ids)
  )
  counts = official = losses.chunk_token_counts(chunk_ids[0], num_chunks=c)
  if "merge_by_space_prob" in mode:
    merged = losses.merge_chunks(b, a, wb, wa, counts, threshold=0.1)
    b, a, wb, wa, counts, official = merged
  if "append_space" in mode:
    a, b = a + wa, b + wb
  return b, a, counts, official


# The chunks and the loss on them are two programs: a case is one of each, and
# the chain rule joins them.
@functools.partial(_jit, static_argnames=("mode", "c"))
def _prepare(student, teacher, ids, chunk_ids, boundaries, *, mode, c):
  return _chunks(student, teacher, ids, chunk_ids, boundaries, mode, c)


@functools.partial(_jit, static_argnames=("mode", "c"))
def _pull(cotangent, student, teacher, ids, chunk_ids, boundaries, *, mode, c):
  def chunks(student):
    return _chunks(student, teacher, ids, chunk_ids, boundaries, mode, c)[0]

  return jax.vjp(chunks, student)[1](cotangent)[0]


@functools.partial(_jit, static_argnames=("kind", "numerator"))
def _loss(b, a, counts, official, temperature, *, kind, numerator="chunk"):
  def loss(b):
    values = losses.alm_loss(
      b, a, counts > 0, kind=kind, temperature=temperature
    )
    weight, total = {
      "chunk": (1, jnp.sum(official > 0)),
      "token": (counts, jnp.sum(official)),
      "log1p": (jnp.log1p(counts), jnp.sum(official > 0)),
    }[numerator]
    return jnp.sum(values * weight) / total

  return jax.value_and_grad(loss)(b)


@_jit
def _uld(student, teacher, where):
  return jax.value_and_grad(
    lambda s: losses.masked_mean(losses.uld_loss(s, teacher), where)
  )(student)


def reproduce(golden):
  """The keys of CALLS."""
  student, teacher = golden["student_logits"], golden["teacher_logits"]
  ids = (golden["input_ids_teacher"], golden["input_ids_student"])
  lengths = tuple(i.shape[1] for i in ids)
  tokens = _pieces(golden, "teacher"), _pieces(golden, "student")
  out, chunk_ids = {}, {}
  for m in golden.match(r"alignment_student_(\w+)"):
    kind = m.group(1)
    *chunk_ids[kind], c = _align(*tokens, lengths, kind)
    for side, chunks in zip(("teacher", "student"), chunk_ids[kind]):
      out[f"alignment_{side}_{kind}"] = chunks[..., None] == np.arange(c)
  c = min(lengths)
  spaces = tuple(golden[f"space_mask_{s}"] > 0 for s in ("teacher", "student"))
  ends = tuple(
    jnp.asarray(np.asarray(golden.theirs(f"{s}_pieces")) == "<eos>")
    for s in ("teacher", "student")
  )
  known = functools.cache(
    lambda chunks, mode: (
      (
        student,
        teacher,
        ids,
        tuple(chunk_ids[chunks]),
        ends if "eos_as_space" in mode else spaces,
      )
    )
  )
  prepared = functools.cache(
    lambda chunks, mode: _prepare(*known(chunks, mode), mode=mode, c=c)
  )
  one = jnp.ones((), student.dtype)
  for m in golden.match(r"alm__(\w+?)__([\w+]+?)__(\w+?)__tau([\d.]+)"):
    chunks, mode, kind, temperature = m.groups()
    out[m.group(0)], cotangent = _loss(
      *prepared(chunks, mode),
      one * float(temperature),
      kind=_KINDS.get(kind, kind),
    )
    if f"grad_{m.group(0)}" in golden:
      out[f"grad_{m.group(0)}"] = _pull(
        cotangent, *known(chunks, mode), mode=mode, c=c
      )
  for m in golden.match(r"alm_num_(log1p_)?token_count"):
    out[m.group(0)], _ = _loss(
      *prepared("unconstrained", "merge_by_space_prob+append_space"),
      one * 100,
      kind="binary_ce",
      numerator="log1p" if m.group(1) else "token",
    )
  where = golden["attention_mask_student"] > 0
  out["uld_loss"], out["uld_grad"] = _uld(student, teacher, where)
  s, t = golden["div_student_logits"], golden["div_teacher_logits"]
  pattern = r"div_(fkl|rkl|sfkl|srkl)_T([\d.]+)(?:_s([\d.]+))?"
  for m in golden.match(pattern):
    name, temperature, weight = m.groups()
    fn = {
      "fkl": losses.forward_kl,
      "rkl": losses.reverse_kl,
      "sfkl": losses.skew_forward_kl,
      "srkl": losses.skew_reverse_kl,
    }[name]
    if weight is not None:
      fn = functools.partial(fn, alpha=float(weight))
    out[m.group(0)] = _jit(fn)(s, t, temperature=float(temperature))
  return {k: v for k, v in out.items() if k in golden}
