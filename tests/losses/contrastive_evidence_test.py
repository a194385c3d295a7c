"""Token credit and self-distillation, against NumPy and the guarantees."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import distilljax
from distilljax.losses import contrastive_evidence as ce
from tests.helpers import one_line_error

# Many small programs, each run once: compile them cheaply.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
RNG = np.random.default_rng(2)
A = np.array([1.3, -0.7, 0.0])[:, None] * np.ones((3, 4))
POS, NEG, OLD = -np.abs(RNG.normal(size=(3, 3, 4)))
WHERE = np.array([[1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 1, 1]], bool)


def arrays(*values):
  return tuple(jnp.asarray(v) for v in values)


def banded(a, delta, mix, clip, where=WHERE):
  """The card's formula, row by row."""
  out = np.zeros_like(a)
  for i in range(len(a)):
    s = np.sign(a[i][where[i]].sum())
    for t in np.flatnonzero(where[i]):
      w = min(max(math.exp(s * delta[i, t]), 1 - clip), 1 + clip)
      out[i, t] = a[i, t] * ((1 - mix) + mix * w)
  return out


def test_group_advantages(x64, strict):
  r = np.array([1.0, 0.0, 0.2, 1.0, 3.0, 1.0, 0.1])
  g = np.array([5, 2, 5, 5, 2, 9, 5])
  want = np.zeros(7)
  for i in (0, 2, 3, 6):
    group = r[[0, 2, 3, 6]]
    want[i] = (r[i] - group.mean()) / (group.std(ddof=1) + 0.01)
  want[[1, 4]] = [-1.5 / (np.sqrt(4.5) + 0.01), 1.5 / (np.sqrt(4.5) + 0.01)]
  ours = ce.group_advantages(*arrays(r, g), eps=0.01)
  np.testing.assert_allclose(ours, want, rtol=1e-12, atol=1e-15)
  biased = ce.group_advantages(*arrays(r, g), eps=0.0, unbiased=False)
  np.testing.assert_allclose(biased[1], -1, rtol=1e-12)
  np.testing.assert_array_equal(
    ce.group_advantages(*arrays(r, g)),
    ce.group_advantages(*arrays(r, g), eps=1e-6),
  )
  grad = jax.grad(lambda r: ce.group_advantages(r, jnp.asarray(g))[0])(
    jnp.asarray(r)
  )
  np.testing.assert_array_equal(grad, 0)


def test_equal_rewards_give_exactly_zero(strict):
  """.1 three times: the rounding of the mean must not be divided by eps."""
  for value in (0.1, 0.7, 1.0):
    out = ce.group_advantages(
      jnp.full(7, value), jnp.zeros(7, jnp.int32), eps=0.0
    )
    np.testing.assert_array_equal(out, 0)


def test_pick_negative():
  scores = jnp.array([0.4, 0.1, 0.9, 0.2, 0.0, 1.0, 0.49, 0.1])
  groups = jnp.array([0, 0, 0, 0, 1, 1, 2, 0])
  out = ce.pick_negative(scores, groups)
  # Group 0: rejected 0, 1, 3, 7; the worst are 1 and 7 (a tie: the earlier).
  # Group 1: only 4 is rejected, and has no other. Group 2 is alone.
  np.testing.assert_array_equal(out, [1, 7, 1, 1, -1, 4, -1, 1])
  own = ce.pick_negative(scores, groups, leave_one_out=False)
  np.testing.assert_array_equal(own, [1, 1, 1, 1, 4, 4, 6, 1])
  none = ce.pick_negative(scores, groups, threshold=0.1)
  np.testing.assert_array_equal(none, [-1, -1, -1, -1, -1, 4, -1, -1])


def test_pick_sibling():
  rewards = jnp.array([0.5, 1.0, 0.0, 0.4, 1.0])
  groups = jnp.array([3, 3, 3, 4, 5])
  out = ce.pick_sibling(rewards, groups)
  np.testing.assert_array_equal(out, [1, 0, 0, -1, -1])
  strict = ce.pick_sibling(rewards, groups, threshold=1.0)
  np.testing.assert_array_equal(strict, [1, -1, 1, -1, -1])


def test_evidence_mix(strict):
  out = [float(ce.evidence_mix(s, mix=0.8, decay_steps=4)) for s in range(6)]
  np.testing.assert_allclose(out, [0.8, 0.6, 0.4, 0.2, 0, 0], atol=1e-7)
  np.testing.assert_allclose(ce.evidence_mix(5), 0.5 * (1 - 5 / 25))


def test_contrastive_and_self_evidence(x64, strict):
  where = jnp.asarray(WHERE)
  ours = ce.contrastive_evidence_advantages(
    *arrays(A, POS, NEG), where, mix=0.7, clip=0.4
  )
  np.testing.assert_allclose(ours, banded(A, POS - NEG, 0.7, 0.4), rtol=1e-12)
  ours = ce.self_evidence_advantages(
    *arrays(A, OLD, POS), where, mix=0.7, clip=0.4
  )
  np.testing.assert_allclose(ours, banded(A, POS - OLD, 0.7, 0.4), rtol=1e-12)
  default = ce.contrastive_evidence_advantages(*arrays(A, POS, NEG), where)
  np.testing.assert_allclose(default, banded(A, POS - NEG, 0.5, 0.2))
  default = ce.self_evidence_advantages(*arrays(A, OLD, POS), where)
  np.testing.assert_allclose(default, banded(A, POS - OLD, 0.5, 0.2))


@pytest.mark.parametrize("fallback", ["rlsd", "grpo"])
def test_rows_without_a_wrong_answer(fallback, x64, strict):
  known = np.array([False, True, True])
  delta = np.where(
    known[:, None], POS - NEG, POS - OLD if fallback == "rlsd" else 0
  )
  hidden = NEG.copy()
  hidden[0] = np.nan  # is not looked at
  ours = ce.contrastive_evidence_advantages(
    *arrays(A, POS, hidden, WHERE),
    mix=0.9,
    clip=0.5,
    has_negative=jnp.asarray(known),
    old_log_probs=jnp.asarray(OLD),
    fallback=fallback,
  )
  np.testing.assert_allclose(ours, banded(A, delta, 0.9, 0.5), rtol=1e-12)
  if fallback == "grpo":
    alone = ce.contrastive_evidence_advantages(
      *arrays(A, POS, hidden, WHERE),
      mix=0.9,
      clip=0.5,
      has_negative=jnp.asarray(known),
      fallback="grpo",
    )
    np.testing.assert_array_equal(alone, ours)
  else:
    same = ce.contrastive_evidence_advantages(
      *arrays(A, POS, hidden, WHERE),
      mix=0.9,
      clip=0.5,
      has_negative=jnp.asarray(known),
      old_log_probs=jnp.asarray(OLD),
    )
    np.testing.assert_array_equal(same, ours)


LOG_PROBS = hnp.arrays(
  np.float32, (3, 4), elements=st.floats(-100, 0, width=32)
)


@jit
def _equal_rewards():
  return ce.group_advantages(jnp.full(3, 0.3), jnp.zeros(3, jnp.int32))


@jit
def _cepo(a, pos, neg, mix, clip):
  where = jnp.asarray(WHERE)
  fn = lambda a, pos, neg: ce.contrastive_evidence_advantages(
    a, pos, neg, where, mix=mix, clip=clip
  )
  grads = jax.grad(lambda *x: jnp.sum(fn(*x)), (0, 1, 2))(a, pos, neg)
  return fn(a, pos, neg), fn(a, pos, pos), grads


@hypothesis.given(
  LOG_PROBS,
  LOG_PROBS,
  # Sixteenths: no subnormal numbers, which XLA flushes to 0.
  st.lists(st.integers(-48, 48), min_size=3, max_size=3),
  st.floats(0, 1, width=32),
  st.floats(0, 0.9375, width=32),
)
def test_six_guarantees(pos, neg, per_row, mix, clip):
  a = np.float32(per_row)[:, None] / 16 * np.ones((3, 4), np.float32)
  out, filler, grads = _cepo(a, pos, neg, np.float32(mix), np.float32(clip))
  valid = np.where(WHERE, a, 0)
  slack = 1e-6 * np.abs(valid)
  # 1. The sign of every token's advantage stays.
  np.testing.assert_array_equal(np.sign(out), np.sign(valid))
  # 2. The band.
  assert np.all(np.abs(out) <= (1 + mix * clip) * np.abs(valid) + slack)
  assert np.all(np.abs(out) >= (1 - mix * clip) * np.abs(valid) - slack)
  # 3. mix = 0 is GRPO.
  plain, _, _ = _cepo(a, pos, neg, np.float32(0), np.float32(clip))
  np.testing.assert_array_equal(plain, valid)
  # 4. Filler (delta = 0) keeps its advantage.
  np.testing.assert_allclose(filler, valid, rtol=1e-6)
  # 5. Equal rewards: no advantage, before and after.
  zero = np.asarray(_equal_rewards())[:, None] * np.ones((3, 4), np.float32)
  np.testing.assert_array_equal(
    _cepo(zero, pos, neg, np.float32(mix), np.float32(clip))[0], 0
  )
  # 6. No gradient reaches anything: the answer cannot leak.
  for grad in grads:
    np.testing.assert_array_equal(grad, 0)


def test_band_needs_the_exponents_clip(strict):
  """exp(100) is inf in float32; a wide band shows where the exponent stops."""
  a = jnp.ones((1, 1))
  where = jnp.ones((1, 1), bool)
  call = lambda delta: float(
    ce.contrastive_evidence_advantages(
      a,
      jnp.full((1, 1), delta),
      jnp.zeros((1, 1)),
      where,
      mix=1.0,
      clip=1e12,
    )[0, 0]
  )
  np.testing.assert_allclose(call(100.0), math.exp(20), rtol=1e-6)
  np.testing.assert_allclose(call(-100.0), math.exp(-20), rtol=1e-6)


def test_padding_is_not_looked_at():
  nan = jnp.where(jnp.asarray(WHERE), jnp.float32(-1), jnp.nan)
  out = ce.contrastive_evidence_advantages(
    jnp.asarray(A, jnp.float32), nan, nan * 2, jnp.asarray(WHERE)
  )
  assert np.all(np.isfinite(out))
  empty = ce.self_evidence_advantages(nan, nan, nan, jnp.zeros_like(WHERE))
  np.testing.assert_array_equal(empty, 0)


# --- self-distillation ----------------------------------------------------


S, T = RNG.normal(size=(2, 2, 6)) * 1.5


def soft(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def kl(p, q):
  return np.sum(p * np.log(p / q), -1)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
  "options",
  [
    {},
    {"top_k": 3},
    {"top_k": 2, "support": "teacher", "tail": "renormalize"},
    {"top_k": 3, "support": "teacher"},
  ],
)
def test_self_distillation(options, alpha, x64, strict):
  q, p = soft(S / 1.1), soft(T / 1.1)
  if k := options.get("top_k"):
    owner = p if options.get("support") == "teacher" else q
    ids = np.argsort(-owner, -1)[:, :k]
    q, p = (np.take_along_axis(x, ids, -1) for x in (q, p))
    if options.get("tail") == "renormalize":
      q, p = (x / x.sum(-1, keepdims=True) for x in (q, p))
    else:
      q, p = (
        np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (q, p)
      )
  if alpha in (0, 1):
    want = kl(p, q) if alpha == 0 else kl(q, p)
  else:
    m = alpha * p + (1 - alpha) * q
    want = alpha * kl(p, m) + (1 - alpha) * kl(q, m)
  fn = functools.partial(
    ce.self_distillation_loss, alpha=alpha, temperature=1.1, **options
  )

  @jit
  def both(s, t):
    grads = jax.grad(lambda s, t: jnp.sum(fn(s, t)), (0, 1))(s, t)
    return fn(s, t), grads

  values, (grad, frozen) = both(*arrays(S, T))
  np.testing.assert_allclose(values, want, rtol=1e-10)
  np.testing.assert_array_equal(frozen, 0)
  # A softmax's gradient sums to 0, and there is one.
  np.testing.assert_allclose(grad.sum(-1), 0, atol=1e-12)
  assert np.all(np.abs(grad).max(-1) > 1e-4)


def test_self_distillation_ends(x64, strict):
  """top_k = v is the full form; equal contexts cost nothing; defaults."""
  s, t = arrays(S, T)
  fn = ce.self_distillation_loss
  for tail in ("bucket", "renormalize"):
    np.testing.assert_allclose(
      fn(s, t, top_k=6, tail=tail), fn(s, t), rtol=1e-12
    )
  np.testing.assert_allclose(fn(s, s, top_k=3), 0, atol=1e-15)
  np.testing.assert_array_equal(
    fn(s, t, top_k=2),
    fn(
      s,
      t,
      top_k=2,
      alpha=0.5,
      support="student",
      tail="bucket",
      temperature=1.0,
    ),
  )
  np.testing.assert_array_equal(
    fn(s, t[:, :5], vocab_size=5), fn(s[:, :5], t[:, :5])
  )


def test_sampled_reverse_kl(x64, strict):
  s, t = arrays(OLD, POS)
  fn = ce.sampled_reverse_kl
  np.testing.assert_allclose(fn(s, t), (OLD - POS) * OLD, rtol=1e-12)
  grad, frozen = jax.grad(lambda s, t: jnp.sum(fn(s, t)), (0, 1))(s, t)
  np.testing.assert_allclose(grad, OLD - POS, rtol=1e-12)
  np.testing.assert_array_equal(frozen, 0)


def test_reviser(x64, strict):
  """Reverse KL on the student's k + tail; the default k = 64 fits a toy v."""
  q, p = soft(S), soft(T)
  np.testing.assert_allclose(
    ce.reviser_distillation_loss(*arrays(S, T)), kl(q, p), rtol=1e-11
  )
  ids = np.argsort(-q, -1)[:, :2]
  q, p = (np.take_along_axis(x, ids, -1) for x in (q, p))
  rest = [np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (q, p)]
  ours = ce.reviser_distillation_loss(*arrays(S, T), top_k=2)
  np.testing.assert_allclose(ours, kl(*rest), rtol=1e-11)
  q, p = (x / x.sum(-1, keepdims=True) for x in (q, p))
  ours = ce.reviser_distillation_loss(
    *arrays(S, T), top_k=2, tail="renormalize"
  )
  np.testing.assert_allclose(ours, kl(q, p), rtol=1e-11)
  grad = jax.grad(
    lambda t: jnp.sum(ce.reviser_distillation_loss(jnp.asarray(S), t))
  )(jnp.asarray(T))
  np.testing.assert_array_equal(grad, 0)
  wide = RNG.normal(size=(2, 1, 70))
  np.testing.assert_allclose(
    ce.reviser_distillation_loss(*arrays(*wide)),
    ce.reviser_distillation_loss(*arrays(*wide), top_k=64),
    rtol=1e-12,
  )
  assert ce.reviser_distillation_loss(*arrays(*wide)) < (
    ce.reviser_distillation_loss(*arrays(*wide), top_k=None)
  )


def test_bad_input():
  r, g = jnp.ones(3), jnp.zeros(3, jnp.int32)
  a = jnp.ones((3, 4))
  where = jnp.ones((3, 4), bool)
  s = jnp.ones((2, 6))
  contrast = ce.contrastive_evidence_advantages
  self_distil = ce.self_distillation_loss
  for call, match in (
    (lambda: ce.group_advantages(r, g[:2]), "group_ids"),
    (lambda: ce.group_advantages(a, g), "rank 1"),
    (lambda: ce.group_advantages(g, g), "floating"),
    (lambda: ce.group_advantages(r, r), "integer"),
    (lambda: ce.group_advantages(r, g, eps=-1), "eps"),
    (lambda: ce.pick_negative(r, g[:1]), "group_ids"),
    (lambda: ce.pick_sibling(r, g[:1]), "group_ids"),
    (lambda: ce.evidence_mix(0, mix=2), "mix"),
    (lambda: ce.evidence_mix(0, decay_steps=0), "decay_steps"),
    (lambda: contrast(a, a, a[:1], where), "negative_log_probs"),
    (lambda: contrast(a, a, a, where[:1]), "where"),
    (lambda: contrast(a, a, a, a), "bool"),
    (lambda: contrast(a[0], a[0], a[0], where[0]), "rank 2"),
    (lambda: contrast(a, a, a, where, mix=1.5), "mix"),
    (lambda: contrast(a, a, a, where, clip=-1), "clip"),
    (lambda: contrast(a, a, a, where, fallback="ppo"), "fallback"),
    (lambda: contrast(a, a, a, where, has_negative=r > 0), "old_log_probs"),
    (
      lambda: contrast(a, a, a, where, has_negative=r[:1] > 0, fallback="grpo"),
      "has_negative",
    ),
    (lambda: ce.self_evidence_advantages(a, a[:1], a, where), "old_log"),
    (lambda: self_distil(s, s, alpha=2), "alpha"),
    (lambda: self_distil(s, s, support="x"), "support"),
    (lambda: self_distil(s, s, tail="drop"), "tail"),
    (lambda: self_distil(s, s, top_k=7), "top_k"),
    (lambda: self_distil(s, s, temperature=0), "temperature"),
    (lambda: self_distil(s, s[:, :5]), "vocab_size=5"),
    (lambda: ce.sampled_reverse_kl(s, s[:1]), "teacher_log_probs"),
    (lambda: ce.reviser_distillation_loss(s, s, top_k=0), "top_k"),
    (lambda: ce.reviser_distillation_loss(s, s[:, :5]), "reviser_logits"),
    (lambda: ce.reviser_distillation_loss(s, s, tail="drop"), "tail"),
  ):
    with one_line_error(match):
      call()
  with distilljax.debug(), one_line_error("rewards must be finite"):
    ce.group_advantages(r.at[0].set(jnp.nan), g)
  with distilljax.debug(), one_line_error("positive_log_probs must be finite"):
    contrast(a, a.at[0, 0].set(-jnp.inf), a, where)


def test_low_precision(strict):
  s, t = (jnp.asarray(x, jnp.bfloat16) for x in (S, T))
  assert ce.self_distillation_loss(s, t).dtype == jnp.float32
  assert ce.sampled_reverse_kl(s, t).dtype == jnp.float32
  assert ce.group_advantages(s[0], jnp.zeros(6, jnp.int32)).dtype == jnp.float32
