"""Divergences against NumPy float64 formulas, gradients by differences."""

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
from distilljax.losses import _log_space, divergence
from tests.helpers import as_user, one_line_error

# Many small programs, each run once: compile them cheaply.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
RNG = np.random.default_rng(0)
S, T = 2 * RNG.normal(size=(2, 3, 7)), 2 * RNG.normal(size=(2, 3, 7))
WHERE = np.array([[True, True, False], [True, False, False]])
LABELS = np.array([[1, 4, -100], [6, -100, -100]])


def soft(x, temperature=1.0):
  x = np.asarray(x, np.float64) / temperature
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def kl(p, q):
  return np.sum(p * (np.log(p) - np.log(q)), -1)


def akl(q, p, q0, mu):
  """Adaptive KL with weights from the frozen student q0, token by token."""
  out = np.zeros(p.shape[:-1])
  for i in np.ndindex(out.shape):
    order = np.argsort(-p[i])
    head, mass = [order[0]], p[i][order[0]]
    for v in order[1:]:
      mass += p[i][v]
      if mass <= mu:
        head.append(v)
    gap = np.abs(p[i] - q0[i])
    g_head = gap[head].sum()
    w = g_head / gap.sum()
    out[i] = w * kl(p[i], q[i]) + (1 - w) * kl(q[i], p[i])
  return out


def gamma_entropy(p, k, where=WHERE):
  h = -np.sum(p * np.log(p), -1)
  rows = [h[i][where[i]].mean() if where[i].any() else 0 for i in range(len(h))]
  return np.clip(1 - np.mean(rows) / math.log(k), 0, 1)


def mixed(q, p, gamma, floor=1e-8):
  q, p = np.maximum(q, floor), np.maximum(p, floor)
  return gamma * kl(q, p) + (1 - gamma) * kl(p, q)


CASES = {
  "forward": (
    functools.partial(divergence.forward_kl, temperature=1.7),
    lambda s, t: kl(soft(t, 1.7), soft(s, 1.7)),
  ),
  "reverse": (
    functools.partial(divergence.reverse_kl, temperature=1.7),
    lambda s, t: kl(soft(s, 1.7), soft(t, 1.7)),
  ),
  "jsd": (
    functools.partial(divergence.generalized_jsd, beta=0.3),
    lambda s, t: (
      0.3 * kl(soft(t), 0.3 * soft(t) + 0.7 * soft(s))
      + 0.7 * kl(soft(s), 0.3 * soft(t) + 0.7 * soft(s))
    ),
  ),
  "jsd0": (
    functools.partial(divergence.generalized_jsd, beta=0),
    lambda s, t: kl(soft(t), soft(s)),
  ),
  "jsd1": (
    functools.partial(divergence.generalized_jsd, beta=1),
    lambda s, t: kl(soft(s), soft(t)),
  ),
  "skew_forward": (
    functools.partial(divergence.skew_forward_kl, alpha=0.2),
    lambda s, t: kl(soft(t), 0.2 * soft(t) + 0.8 * soft(s)),
  ),
  "skew_forward0": (
    functools.partial(divergence.skew_forward_kl, alpha=0),
    lambda s, t: kl(soft(t), soft(s)),
  ),
  "skew_reverse": (
    functools.partial(divergence.skew_reverse_kl, alpha=0.2),
    lambda s, t: kl(soft(s), 0.8 * soft(t) + 0.2 * soft(s)),
  ),
  "skew_reverse0": (
    functools.partial(divergence.skew_reverse_kl, alpha=0),
    lambda s, t: kl(soft(s), soft(t)),
  ),
  "tv": (
    functools.partial(divergence.total_variation, temperature=0.6),
    lambda s, t: 0.5 * np.abs(soft(s, 0.6) - soft(t, 0.6)).sum(-1),
  ),
  "akl": (
    divergence.adaptive_kl,
    lambda s, t: akl(soft(s), soft(t), soft(S), 0.5),
  ),
  "akl.9": (
    functools.partial(divergence.adaptive_kl, mu=0.9),
    lambda s, t: akl(soft(s), soft(t), soft(S), 0.9),
  ),
  "eakl": (
    lambda s, t: divergence.entropy_aware_kl(
      s, t, jnp.asarray(WHERE), k=20, temperature=2.0
    ),
    lambda s, t: mixed(soft(s, 2), soft(t, 2), gamma_entropy(soft(t), 20)),
  ),
  "eakl_label": (
    lambda s, t: divergence.entropy_aware_kl(
      s,
      t,
      jnp.asarray(WHERE),
      labels=jnp.asarray(LABELS),
      confidence="label",
    ),
    lambda s, t: mixed(
      soft(s),
      soft(t),
      ((soft(t)[0, 0, 1] + soft(t)[0, 1, 4]) / 2 + soft(t)[1, 0, 6]) / 2,
    ),
  ),
  "eakl_floor": (
    functools.partial(
      divergence.entropy_aware_kl, confidence=0.3, min_prob=0.05
    ),
    lambda s, t: mixed(soft(s), soft(t), 0.3, 0.05),
  ),
  "eakl_exact": (
    functools.partial(
      divergence.entropy_aware_kl, per="token", min_prob=0, k=5
    ),
    lambda s, t: mixed(
      soft(s),
      soft(t),
      np.clip(1 + np.sum(soft(t) * np.log(soft(t)), -1) / math.log(5), 0, 1),
      0,
    ),
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name, x64, strict):
  fn, oracle = CASES[name]
  weight = RNG.normal(size=S.shape[:-1])

  @jit
  def both(s, t, w):
    def total(s, t):
      values = fn(s, t)
      return jnp.sum(values * w), values

    return jax.value_and_grad(total, (0, 1), has_aux=True)(s, t)

  (_, values), (grad, frozen) = both(
    jnp.asarray(S), jnp.asarray(T), jnp.asarray(weight)
  )
  assert values.dtype == jnp.float64
  np.testing.assert_allclose(values, oracle(S, T), rtol=1e-11, atol=1e-13)
  np.testing.assert_array_equal(frozen, 0)
  numeric = np.zeros_like(S)
  h = 1e-6
  for i in np.ndindex(S.shape):
    up, down = S.copy(), S.copy()
    up[i] += h
    down[i] -= h
    numeric[i] = np.sum(weight * (oracle(up, T) - oracle(down, T))) / (2 * h)
  np.testing.assert_allclose(grad, numeric, rtol=1e-6, atol=1e-8)


def test_entropy(x64, strict):
  p = soft(S, 0.7)
  ours = divergence.entropy(jnp.asarray(S), temperature=0.7)
  np.testing.assert_allclose(ours, -np.sum(p * np.log(p), -1), rtol=1e-12)
  cut = divergence.entropy(jnp.asarray(S), vocab_size=4)
  p = soft(S[..., :4])
  np.testing.assert_allclose(cut, -np.sum(p * np.log(p), -1), rtol=1e-12)
  # dH/dz_v = -p_v (log p_v + H): entropy alone is not frozen.
  p = soft(S)
  h = -np.sum(p * np.log(p), -1, keepdims=True)
  grad = jax.grad(lambda s: jnp.sum(divergence.entropy(s)))(jnp.asarray(S))
  np.testing.assert_allclose(grad, -p * (np.log(p) + h), rtol=1e-10)


def test_confidence(x64, strict):
  """Masked means by row, clips, the empty row that counts 0, no gradient."""
  t = jnp.asarray(T)
  where = jnp.asarray(WHERE)
  ours = divergence.teacher_confidence(t, where, k=20)
  np.testing.assert_allclose(ours, gamma_entropy(soft(T), 20), rtol=1e-12)
  assert ours.shape == ()
  np.testing.assert_allclose(
    divergence.teacher_confidence(t, k=9),
    gamma_entropy(soft(T), 9, np.ones_like(WHERE)),
    rtol=1e-12,
  )
  empty = WHERE.copy()
  empty[1] = False
  np.testing.assert_allclose(
    divergence.teacher_confidence(t, jnp.asarray(empty), k=9),
    gamma_entropy(soft(T), 9, empty),
    rtol=1e-12,
  )
  assert divergence.teacher_confidence(jnp.zeros((1, 7)), k=2.0) == 0
  one = divergence.teacher_confidence(
    t[0], labels=jnp.array([3, 0, 2]), kind="label"
  )
  p = soft(T)[0]
  np.testing.assert_allclose(one, (p[0, 3] + p[1, 0] + p[2, 2]) / 3, rtol=1e-12)
  grad = jax.grad(lambda t: divergence.teacher_confidence(t, k=20))(t)
  np.testing.assert_array_equal(grad, 0)


def test_confidence_over_devices(x64):
  """Under a mapped axis it is the mean over all rows, not one device's."""
  t = jnp.asarray(T)
  apart = jax.vmap(
    lambda t: divergence.teacher_confidence(t[None], k=20, axis_name="i"),
    axis_name="i",
  )(t)
  np.testing.assert_allclose(
    apart, divergence.teacher_confidence(t, k=20), rtol=1e-12
  )


def test_ends_of_the_jsd(x64):
  """jsd/beta -> forward, jsd/(1-beta) -> reverse KL; error ~ beta max p/q."""
  s, t = jnp.asarray(S) / 4, jnp.asarray(T) / 4
  forward, reverse = divergence.forward_kl(s, t), divergence.reverse_kl(s, t)
  low = divergence.generalized_jsd(s, t, beta=1e-4) / 1e-4
  high = divergence.generalized_jsd(s, t, beta=1 - 1e-4) / 1e-4
  np.testing.assert_allclose(low, forward, rtol=5e-3)
  np.testing.assert_allclose(high, reverse, rtol=5e-3)


def test_skew_at_one_is_zero(strict):
  s, t = jnp.asarray(S, jnp.float32), jnp.asarray(T, jnp.float32)
  for fn in (divergence.skew_forward_kl, divergence.skew_reverse_kl):
    out = fn(s, t, alpha=1)
    assert out.shape == (2, 3) and out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 0)


def test_defaults(x64):
  s, t = jnp.asarray(S), jnp.asarray(T)
  for fn, options in (
    (divergence.generalized_jsd, {"beta": 0.5, "temperature": 1.0}),
    (divergence.skew_forward_kl, {"alpha": 0.1, "temperature": 1.0}),
    (divergence.skew_reverse_kl, {"alpha": 0.1, "temperature": 1.0}),
    (divergence.total_variation, {"temperature": 1.0}),
    (divergence.forward_kl, {"temperature": 1.0}),
    (divergence.reverse_kl, {"temperature": 1.0}),
    (divergence.adaptive_kl, {"mu": 0.5}),
    (
      divergence.entropy_aware_kl,
      {"k": 16, "temperature": 1.0, "min_prob": 1e-8},
    ),
  ):
    np.testing.assert_array_equal(fn(s, t), fn(s, t, **options))
  q, p = soft(S * 9), soft(T * 9)
  gamma = gamma_entropy(p, 16, np.ones_like(WHERE))
  np.testing.assert_allclose(
    divergence.entropy_aware_kl(s * 9, t * 9),
    mixed(q, p, gamma, 1e-8),
    rtol=1e-9,
  )


DENSE = (
  divergence.forward_kl,
  divergence.reverse_kl,
  divergence.generalized_jsd,
  divergence.skew_forward_kl,
  divergence.skew_reverse_kl,
  divergence.total_variation,
  divergence.adaptive_kl,
  functools.partial(divergence.entropy_aware_kl, confidence=0.4, min_prob=0),
)


@jit
def _all_dense(s, t):
  def total(s):
    values = jnp.stack([fn(s, t) for fn in DENSE])
    return jnp.sum(values), values

  grad, values = jax.grad(total, has_aux=True)(s)
  return values, grad


LOGITS = hnp.arrays(np.float32, (2, 7), elements=st.floats(-30, 30, width=32))


@hypothesis.given(LOGITS, LOGITS, st.floats(-50, 50), st.permutations(range(7)))
def test_properties(s, t, shift, order):
  """>= 0, 0 iff equal, blind to a shift of logits and to the order of ids."""
  values, grad = _all_dense(s, t)
  assert np.all(np.isfinite(values)) and np.all(np.isfinite(grad))
  assert np.all(values >= -1e-6 * (1 + np.abs(values)))
  same, still = _all_dense(s, s)
  np.testing.assert_allclose(same, 0, atol=1e-6)
  np.testing.assert_allclose(still, 0, atol=1e-5)
  moved, _ = _all_dense(s + np.float32(shift), t)
  np.testing.assert_allclose(moved, values, rtol=1e-3, atol=1e-4)
  if len(np.unique(np.abs(t))) == t.size:  # no ties for the head to split
    mixed_up, _ = _all_dense(s[:, order], t[:, order])
    np.testing.assert_allclose(mixed_up, values, rtol=1e-3, atol=1e-4)


def test_padding_columns(x64):
  """-inf in the same columns: the same numbers, finite gradients, 0 there."""
  s, t = jnp.asarray(S[0]), jnp.asarray(T[0])
  pad = jnp.full((3, 2), -jnp.inf)
  values, grad = _all_dense(s, t)
  padded, padded_grad = _all_dense(
    jnp.concatenate([s, pad], 1), jnp.concatenate([t, pad], 1)
  )
  np.testing.assert_allclose(padded, values, rtol=1e-12)
  np.testing.assert_allclose(padded_grad[:, :7], grad, rtol=1e-9, atol=1e-12)
  np.testing.assert_array_equal(padded_grad[:, 7:], 0)


def test_supports_that_differ(x64):
  """Infinite where it must be, finite where a mixture covers both."""
  s = jnp.array([[0.0, 0.0, -jnp.inf]])
  t = jnp.array([[-jnp.inf, 0.0, 0.0]])
  assert divergence.forward_kl(s, t)[0] == jnp.inf
  assert divergence.reverse_kl(s, t)[0] == jnp.inf
  half = 0.5 * math.log(2)  # each side: KL((.5,.5,0)||(.25,.5,.25)) / 2, twice
  np.testing.assert_allclose(divergence.generalized_jsd(s, t)[0], half)
  np.testing.assert_allclose(divergence.total_variation(s, t)[0], 0.5)
  grad = jax.grad(lambda s: divergence.generalized_jsd(s, t)[0])(s)
  assert np.all(np.isfinite(grad))


def test_extremes_and_bf16(strict):
  s = jnp.array([[1e4, -1e4, 0.0, 3.0]], jnp.bfloat16)
  t = jnp.array([[-1e4, 1e4, 0.0, 2.0]], jnp.bfloat16)
  values, grad = _all_dense(s, t)
  assert values.dtype == jnp.float32 and grad.dtype == jnp.bfloat16
  assert np.all(np.isfinite(values)) and np.all(np.isfinite(grad))
  gap = float(t[0, 1]) - float(t[0, 0])
  np.testing.assert_allclose(values[:2, 0], gap, rtol=1e-6)
  # A bf16 student against a float32 teacher: float32, of the bf16's values.
  t32 = jnp.asarray(T[0], jnp.float32)
  s16 = jnp.asarray(S[0], jnp.bfloat16)
  np.testing.assert_allclose(
    divergence.forward_kl(s16, t32),
    kl(soft(T[0]), soft(np.asarray(s16, np.float64))),
    rtol=1e-5,
  )


def test_one_token_and_empty_batch():
  one = jnp.zeros((2, 1))
  np.testing.assert_array_equal(_all_dense(one, one + 3)[0], 0)
  assert divergence.forward_kl(jnp.zeros((0, 4)), jnp.zeros((0, 4))).shape == (
    0,
  )


def test_vocab_size(x64):
  """The cut comes before the softmax, for one pair of any two sizes."""
  s, t = jnp.asarray(S), jnp.asarray(T)[..., :5]
  for fn in DENSE[:7]:
    np.testing.assert_array_equal(
      fn(s, t, vocab_size=4), fn(s[..., :4], t[..., :4])
    )
  ours = divergence.entropy_aware_kl(s, t, k=3, vocab_size=4)
  cut = divergence.entropy_aware_kl(s[..., :4], t[..., :4], k=3)
  np.testing.assert_array_equal(ours, cut)
  with one_line_error(
    r"student_logits has v=7, teacher_logits has v=5.*"
    r"vocab_size=5"
  ):
    divergence.forward_kl(s, t)
  with one_line_error("vocab_size must be in"):
    divergence.forward_kl(s, t, vocab_size=6)


def test_bad_input():
  s, t = jnp.asarray(S, jnp.float32), jnp.asarray(T, jnp.float32)
  bad = [
    (lambda: divergence.forward_kl(s, t[:1]), "teacher_logits must be"),
    (lambda: divergence.forward_kl(s, t.astype(int)), "floating"),
    (lambda: divergence.forward_kl(s[0, 0, 0], t[0, 0, 0]), "rank >= 1"),
    (lambda: divergence.forward_kl(s[..., :0], t[..., :0]), "v >= 1"),
    (lambda: divergence.forward_kl(s, t, temperature=0), "temperature"),
    (lambda: divergence.reverse_kl(s, t, temperature=-1.0), "temperature"),
    (lambda: divergence.entropy(s, temperature=math.inf), "temperature"),
    (lambda: divergence.generalized_jsd(s, t, beta=1.1), "beta"),
    (lambda: divergence.generalized_jsd(s, t, beta=-0.1), "beta"),
    (
      lambda: jax.jit(lambda b: divergence.generalized_jsd(s, t, beta=b))(0.5),
      "beta must be a Python number",
    ),
    (lambda: divergence.skew_forward_kl(s, t, alpha=2), "alpha"),
    (lambda: divergence.skew_reverse_kl(s, t, alpha=-2), "alpha"),
    (lambda: divergence.adaptive_kl(s, t, mu=1.5), "mu"),
    (
      lambda: divergence.entropy_aware_kl(s, t, confidence="entrpy"),
      "did you mean 'entropy'",
    ),
    (lambda: divergence.entropy_aware_kl(s, t, confidence=1.5), "confidence"),
    (lambda: divergence.entropy_aware_kl(s, t, k=1), "k must be"),
    (lambda: divergence.entropy_aware_kl(s, t, min_prob=1), "min_prob"),
    (lambda: divergence.entropy_aware_kl(s, t, per="row"), "per must be"),
    (lambda: divergence.entropy_aware_kl(s, t, confidence="label"), "labels"),
    (
      lambda: divergence.entropy_aware_kl(s, t, jnp.ones((2, 2), bool)),
      "where must be",
    ),
    (lambda: divergence.entropy_aware_kl(s, t, jnp.ones((2, 3))), "bool"),
    (lambda: divergence.teacher_confidence(t, kind="x"), "kind must be"),
  ]
  for call, match in bad:
    with one_line_error(match):
      call()


def test_debug_mode():
  """Values: NaN, +inf, a dead row, mass where the other side has none."""
  s, t = jnp.asarray(S, jnp.float32), jnp.asarray(T, jnp.float32)
  inf = -jnp.inf
  for bad in (t.at[0, 0, 0].set(jnp.nan), t.at[0, 0, 0].set(jnp.inf)):
    with distilljax.debug(), one_line_error("teacher_logits must be free"):
      divergence.forward_kl(s, bad)
  with distilljax.debug(), one_line_error("student_logits must be above -inf"):
    divergence.total_variation(s.at[0, 0].set(inf), t)
  with distilljax.debug(), one_line_error("student_logits must be above -inf"):
    divergence.forward_kl(s.at[0, 0, 1].set(inf), t)
  with distilljax.debug(), one_line_error("teacher_logits must be above -inf"):
    divergence.reverse_kl(s, t.at[0, 0, 1].set(inf))
  with distilljax.debug():
    divergence.forward_kl(s, t.at[0, 0, 1].set(inf))
    divergence.reverse_kl(s.at[0, 0, 1].set(inf), t)
  with one_line_error("teacher_logits must be free"):
    distilljax.debug(divergence.forward_kl)(s, t.at[0, 0, 0].set(jnp.nan))


# --- top-k teachers -------------------------------------------------------


IDS = np.array(
  [[[3, 1, 6], [0, 5, 2], [2, 4, 1]], [[6, 0, 3], [1, 2, 3], [5, 4, 0]]]
)


def sides(s, t, tail, temperature):
  q, p = soft(s, temperature), soft(t, temperature)
  q, p = (np.take_along_axis(x, IDS, -1) for x in (q, p))
  if tail == "renormalize":
    return q / q.sum(-1, keepdims=True), p / p.sum(-1, keepdims=True)
  if tail == "bucket":
    q, p = (
      np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (q, p)
    )
  return q, p


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
def test_sparse(tail, x64, strict):
  log_p = np.take_along_axis(np.log(soft(T, 1.3)), IDS, -1)
  weight = RNG.normal(size=(2, *S.shape[:-1]))

  def oracle(s):
    q, p = sides(s, T, tail, 1.3)
    return np.stack([kl(p, q), kl(q, p)])

  @jit
  def both(s, ids, log_p, w):
    def total(s, log_p):
      values = jnp.stack(
        [
          fn(s, ids, log_p, tail=tail, temperature=1.3)
          for fn in (divergence.sparse_forward_kl, divergence.sparse_reverse_kl)
        ]
      )
      return jnp.sum(values * w), values

    return jax.grad(total, (0, 1), has_aux=True)(s, log_p)

  (grad, frozen), values = both(
    jnp.asarray(S), jnp.asarray(IDS), jnp.asarray(log_p), jnp.asarray(weight)
  )
  np.testing.assert_allclose(values, oracle(S), rtol=1e-10)
  np.testing.assert_array_equal(frozen, 0)
  numeric = np.zeros_like(S)
  for i in np.ndindex(S.shape):
    up, down = S.copy(), S.copy()
    up[i] += 1e-6
    down[i] -= 1e-6
    numeric[i] = np.sum(weight * (oracle(up) - oracle(down))) / 2e-6
  np.testing.assert_allclose(grad, numeric, rtol=1e-6, atol=1e-8)
  if tail == "bucket":
    for fn in (divergence.sparse_forward_kl, divergence.sparse_reverse_kl):
      args = jnp.asarray(S), jnp.asarray(IDS), jnp.asarray(log_p)
      np.testing.assert_array_equal(fn(*args), fn(*args, tail="bucket"))
      np.testing.assert_array_equal(fn(*args), fn(*args, temperature=1.0))


def test_sparse_with_all_tokens_is_dense(strict):
  """k = v, in float32: exact with every tail; and the order means nothing."""
  s, t = jnp.asarray(S, jnp.float32), jnp.asarray(T, jnp.float32)
  order = jnp.asarray(np.argsort(RNG.normal(size=S.shape), -1))
  log_p = jnp.take_along_axis(jax.nn.log_softmax(t), order, -1)
  for tail in ("bucket", "renormalize", "drop"):
    np.testing.assert_allclose(
      divergence.sparse_forward_kl(s, order, log_p, tail=tail),
      divergence.forward_kl(s, t),
      rtol=2e-5,
    )
    np.testing.assert_allclose(
      divergence.sparse_reverse_kl(s, order, log_p, tail=tail),
      divergence.reverse_kl(s, t),
      rtol=2e-5,
    )


def test_bucket_is_a_lower_bound(x64):
  s, t = jnp.asarray(S), jnp.asarray(T)
  log_p, ids = jax.lax.top_k(jax.nn.log_softmax(t), 5)
  out = divergence.sparse_forward_kl(s, ids, log_p)
  assert np.all(out <= divergence.forward_kl(s, t)) and np.all(out >= 0)


def test_bucket_with_an_exhausted_teacher():
  """Mass 1 up to rounding on k < v ids: nothing blows up either way."""
  s = jnp.zeros((1, 4))
  ids = jnp.array([[0, 1]])
  log_p = jnp.log(jnp.array([[0.25, 0.75]]))
  forward = divergence.sparse_forward_kl(s, ids, log_p)
  want = 0.25 * math.log(0.25 / 0.25) + 0.75 * math.log(0.75 / 0.25)
  np.testing.assert_allclose(forward, [want], rtol=1e-5)
  eps = float(jnp.finfo(jnp.float32).eps)
  want = 0.25 * math.log(1 / 3) + 0.5 * math.log(0.5 / eps)
  reverse = divergence.sparse_reverse_kl(s, ids, log_p)
  np.testing.assert_allclose(reverse, [want], rtol=1e-5)
  grad = jax.grad(lambda s: divergence.sparse_reverse_kl(s, ids, log_p)[0])(s)
  assert np.all(np.isfinite(grad))


def test_a_tiny_tail_keeps_its_digits():
  """log of a student tail of 3e-20, where 1 - sum q is 0 in float32."""
  s = jnp.array([[45.0, 44.0, 0.0, 0.0]])
  ids = jnp.array([[0, 1]])
  log_p = jnp.log(jnp.array([[0.5, 0.25]]))
  q = soft(np.array([45.0, 44.0, 0, 0]))
  want = kl(np.array([0.5, 0.25, 0.25]), np.array([q[0], q[1], q[2] + q[3]]))
  np.testing.assert_allclose(
    divergence.sparse_forward_kl(s, ids, log_p), [want], rtol=1e-6
  )


def test_temper(x64, strict):
  """Exact at a stored temperature, refused at another."""
  log_p = jnp.log(jnp.asarray(soft(T)))
  kept = jnp.take_along_axis(log_p, jnp.asarray(IDS), -1)
  cache = {t: jax.nn.logsumexp(log_p / t, axis=-1) for t in (1.0, 2.5)}
  want = np.take_along_axis(np.log(soft(T, 2.5)), IDS, -1)
  for given in (cache, cache[2.5]):
    ours = divergence.temper_log_probs(kept, given, temperature=2.5)
    np.testing.assert_allclose(ours, want, rtol=1e-12)
  with one_line_error(r"log_normalizer for \(1, 2.5\), got 2"):
    divergence.temper_log_probs(kept, cache, temperature=2)
  with one_line_error("log_normalizer must be"):
    divergence.temper_log_probs(kept, cache[1.0][:1], temperature=2.0)
  with one_line_error("temperature must be"):
    divergence.temper_log_probs(kept, cache, temperature=0)
  with distilljax.debug(), one_line_error("sum to more than 1"):
    divergence.temper_log_probs(kept, cache[1.0] - 1, temperature=1.0)
  grads = jax.grad(
    lambda a, b: jnp.sum(divergence.temper_log_probs(a, b, temperature=2.5)),
    (0, 1),
  )(kept, cache[2.5])
  for grad in grads:
    np.testing.assert_array_equal(grad, 0)


def test_sparse_bad_input():
  s = jnp.asarray(S, jnp.float32)
  ids = jnp.asarray(IDS)
  log_p = jnp.full(ids.shape, math.log(0.2))
  call = divergence.sparse_forward_kl
  bad = [
    (lambda: call(s, ids[:1], log_p), "teacher_ids must be"),
    (lambda: call(s, ids, log_p[..., :2]), "teacher_log_probs must be"),
    (lambda: call(s, ids, log_p, tail="buckt"), "did you mean 'bucket'"),
    (lambda: call(s, ids.astype(float), log_p), "integer"),
    (lambda: call(s, ids, ids), "floating"),
    (lambda: call(s[..., :2], ids, log_p), "1 <= k <= 2"),
    (lambda: call(s, ids, log_p, vocab_size=2), "1 <= k <= 2"),
    (lambda: call(s, ids, log_p, temperature=0), "temperature"),
    (lambda: divergence.sparse_reverse_kl(s, ids, log_p, tail="x"), "tail"),
  ]
  for make, match in bad:
    with one_line_error(match):
      make()
  values = [
    (ids.at[0, 0, 0].set(7), log_p, r"in \[0, 6\]"),
    (ids.at[0, 0, 0].set(-1), log_p, r"in \[0, 6\]"),
    (ids.at[0, 0, 0].set(6), log_p, "distinct"),
    (ids, log_p + 1, "sum to more than 1"),
    (ids, log_p.at[0, 0, 0].set(jnp.nan), "free of NaN"),
  ]
  for bad_ids, bad_log_p, match in values:
    with distilljax.debug(), one_line_error(match):
      call(s, bad_ids, bad_log_p)
  with as_user(), distilljax.debug():
    call(s, ids, log_p)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_written_derivatives_are_those_of_the_formula(x64, strict, beta):
  # Both arguments move: also the tangent that a frozen teacher never has.
  rng = np.random.default_rng(0)
  q, p, dq, dp = (jnp.asarray(rng.normal(size=(3, 5))) for _ in range(4))

  def house(q, p):
    return _log_space.jsd(
        jax.nn.log_softmax(q), jax.nn.log_softmax(p), beta
    ).sum()

  def formula(q, p):
    q, p = jax.nn.softmax(q), jax.nn.softmax(p)
    kl = lambda a, b: jnp.sum(a * jnp.log(a / b))
    if beta in (0.0, 1.0):
      return kl(q, p) if beta else kl(p, q)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)

  @jit
  def all_of(q, p, dq, dp):
    return [
        (
            jax.jvp(f, (q, p), (dq, dp)),
            jax.grad(f, (0, 1))(q, p),
            jax.jvp(jax.grad(f), (q, p), (dq, dp)),
        )
        for f in (house, formula)
    ]

  ours, exact = all_of(q, p, dq, dp)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
      ours, exact,
  )
