"""On-policy losses against hand-written NumPy and exact tabular answers."""

import functools
import itertools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import distilljax
from distilljax.losses import on_policy
from tests.helpers import one_line_error

# Many small programs, each run once: compile them cheaply.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
RNG = np.random.default_rng(1)
LP = -np.abs(RNG.normal(size=(4, 3, 5))) * 2
S, T, R, B = LP
WHERE = np.array(
  [
    [True, True, False, True, False],
    [True, True, True, True, True],
    [False, False, False, False, False],
  ]
)


def soft(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def arrays(*values):
  return tuple(jnp.asarray(v) for v in values)


# --- estimators --------------------------------------------------------------


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
def test_kl_estimate(kind, straight_through, x64, strict):
  d = T - S
  value, slope = {  # value and d value / d student, d' = -1
    "k1": (-d, np.ones_like(d)),
    "k2": (d**2 / 2, -d),
    "k3": (np.exp(d) - 1 - d, 1 - np.exp(d)),
    "abs": (np.abs(d), -np.sign(d)),
  }[kind]
  fn = functools.partial(
    on_policy.kl_estimate, kind=kind, straight_through=straight_through
  )
  ours = fn(*arrays(S, T))
  np.testing.assert_allclose(ours, value, rtol=1e-9, atol=1e-12)
  grad, frozen = jax.grad(lambda s, t: jnp.sum(fn(s, t)), (0, 1))(*arrays(S, T))
  np.testing.assert_array_equal(frozen, 0)
  want = -d if straight_through else slope
  np.testing.assert_allclose(grad, want, rtol=1e-9, atol=1e-12)


def test_kl_estimate_clips(strict):
  s, t = jnp.array([0.0, -100.0, -3.0]), jnp.array([-100.0, 0.0, 0.0])
  k1 = on_policy.kl_estimate(s, t, kind="k1")
  np.testing.assert_allclose(k1, [20.0, -20.0, -3.0])
  k3 = on_policy.kl_estimate(s, t, kind="k3")
  np.testing.assert_allclose(k3, [10.0, 10.0, 10.0])  # 19, exp(20), 16.1
  free = on_policy.kl_estimate(s, t, kind="k3", max_value=math.inf)
  np.testing.assert_allclose(
    free, [math.exp(-20) + 19, math.exp(20) - 21, math.exp(3) - 4], rtol=1e-6
  )
  k2 = on_policy.kl_estimate(s, t, kind="k2", max_log_ratio=1.5)
  np.testing.assert_allclose(k2, [1.125, 1.125, 1.125])


def test_estimators_in_expectation(x64):
  """Sums over all outcomes: exact means of values and of direct gradients.

  k1 and k3 have the right value, k1's direct gradient is 0 in the mean, k2's
  and every straight-through gradient is the true one, k3's is forward KL's.
  """
  s, t = arrays(RNG.normal(size=6), RNG.normal(size=6))

  def reverse(s):
    log_q, log_p = jax.nn.log_softmax(s), jax.nn.log_softmax(t)
    return jnp.sum(jnp.exp(log_q) * (log_q - log_p))

  def forward(s):
    log_q, log_p = jax.nn.log_softmax(s), jax.nn.log_softmax(t)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q))

  def estimate(s, kind, straight_through):
    """Mean over y ~ S with the sampling distribution held still."""
    weight = jax.lax.stop_gradient(jax.nn.softmax(s))
    values = on_policy.kl_estimate(
      jax.nn.log_softmax(s),
      jax.nn.log_softmax(t),
      kind=kind,
      straight_through=straight_through,
      max_value=math.inf,
    )
    return jnp.sum(weight * values)

  @jit
  def everything(s):
    exact = jax.value_and_grad(reverse)(s), jax.grad(forward)(s)
    ours = {
      (kind, through): jax.value_and_grad(estimate)(s, kind, through)
      for kind in ("k1", "k2", "k3")
      for through in (False, True)
    }
    return exact, ours

  ((value, grad), grad_forward), ours = everything(s)
  for kind in ("k1", "k3"):
    np.testing.assert_allclose(ours[kind, False][0], value, rtol=1e-12)
  np.testing.assert_allclose(ours["k1", False][1], 0, atol=1e-14)
  np.testing.assert_allclose(ours["k2", False][1], grad, rtol=1e-10)
  np.testing.assert_allclose(ours["k3", False][1], grad_forward, rtol=1e-10)
  for kind in ("k1", "k2", "k3"):
    np.testing.assert_allclose(ours[kind, True][1], grad, rtol=1e-10)


@pytest.mark.parametrize("discount", ["relative", "absolute"])
@pytest.mark.parametrize("length_norm", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 0.8, 1.0])
def test_minillm(gamma, length_norm, discount, x64, strict):
  want = np.zeros_like(S)
  for i, t in itertools.product(range(3), range(5)):
    if not WHERE[i, t]:
      continue
    total = norm = 0.0
    for j in range(t, 5):
      if WHERE[i, j]:
        total += gamma ** (j - t) * (T[i, j] - S[i, j])
        norm += gamma ** (j - t)
    if length_norm:
      total /= norm
    elif discount == "absolute" and gamma > 0:
      total *= gamma**t
    want[i, t] = total

  def fn(s, t):
    return on_policy.minillm_advantage(
      s,
      t,
      jnp.asarray(WHERE),
      gamma=gamma,
      length_norm=length_norm,
      discount=discount,
    )

  ours = jit(fn)(*arrays(S, T))
  np.testing.assert_allclose(ours, want, rtol=1e-11, atol=1e-14)
  if gamma == 0.8:
    for grad in jax.grad(lambda s, t: jnp.sum(fn(s, t)), (0, 1))(*arrays(S, T)):
      np.testing.assert_array_equal(grad, 0)


def test_minillm_ignores_padding():
  s = jnp.asarray(S, jnp.float32).at[0, 2].set(jnp.nan)
  out = on_policy.minillm_advantage(
    s, jnp.asarray(T, jnp.float32), jnp.asarray(WHERE), gamma=0.9
  )
  assert np.all(np.isfinite(out))


# --- G-OPD ----------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.25, 2.0])
def test_gopd_advantage(scale, x64, strict):
  ours = on_policy.gopd_advantage(*arrays(S, T, R), reward_scale=scale)
  want = -((S - R) - scale * (T - R))
  np.testing.assert_allclose(ours, want, rtol=1e-12, atol=1e-13)
  if scale == 1.25:
    default = on_policy.gopd_advantage(*arrays(S, T, R))
    np.testing.assert_array_equal(default, ours)
    grads = jax.grad(
      lambda *a: jnp.sum(on_policy.gopd_advantage(*a)), (0, 1, 2)
    )(*arrays(S, T, R))
    for grad in grads:
      np.testing.assert_array_equal(grad, 0)
  if scale == 1.0:
    ours = on_policy.gopd_advantage(*arrays(S, T), None, reward_scale=1)
    np.testing.assert_array_equal(ours, T - S)


def test_gopd_advantage_scales_and_clip(x64, strict):
  per_row = jnp.array([1.0, 1.5, 2.0])
  ours = on_policy.gopd_advantage(*arrays(S, T, R), reward_scale=per_row)
  lam = np.array([1.0, 1.5, 2.0])[:, None]
  np.testing.assert_allclose(ours, lam * (T - R) - (S - R), rtol=1e-12)
  table = RNG.uniform(1, 2, size=S.shape)
  ours = on_policy.gopd_advantage(
    *arrays(S, T, R), reward_scale=jnp.asarray(table)
  )
  np.testing.assert_allclose(ours, table * (T - R) - (S - R), rtol=1e-12)
  far = jnp.full((1, 1), -60.0)
  near = jnp.zeros((1, 1))
  call = functools.partial(on_policy.gopd_advantage, near, reward_scale=2.0)
  np.testing.assert_allclose(call(near, far), [[20.0]])
  np.testing.assert_allclose(call(far, near), [[-80.0]])
  np.testing.assert_allclose(call(near, far, max_log_ratio=math.inf), [[60.0]])


def test_route_teacher():
  stacked = jnp.arange(24.0).reshape(2, 3, 4)
  out = on_policy.route_teacher(stacked, jnp.array([1, 0, 1]))
  np.testing.assert_array_equal(out[0], stacked[1, 0])
  np.testing.assert_array_equal(out[1], stacked[0, 1])
  np.testing.assert_array_equal(out[2], stacked[1, 2])
  for bad in (2, -1):
    with distilljax.debug(), one_line_error(r"index must be in \[0, 1\]"):
      on_policy.route_teacher(stacked, jnp.array([1, 0, bad]))
  with one_line_error("index must be"):
    on_policy.route_teacher(stacked, jnp.array([1, 0]))


LOGITS = RNG.normal(size=(3, 2, 6)) * 1.5


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1.25])
def test_gopd_loss(scale, top_k, x64, strict):
  """Value by hand; gradient by differences, the student's ids held still."""
  temperature = 0.8
  ids = np.argsort(-LOGITS[0], -1)[..., :3]

  def bucket(p):
    if top_k is None:
      return p
    kept = np.take_along_axis(p, ids, -1)
    return np.concatenate([kept, 1 - kept.sum(-1, keepdims=True)], -1)

  def oracle(s):
    q, t, r = (bucket(soft(x / temperature)) for x in (s, *LOGITS[1:]))
    return np.sum(
      q * (np.log(q) - scale * np.log(t) - (1 - scale) * np.log(r)), -1
    )

  @jit
  def both(s, t, r):
    def total(s, t, r):
      values = on_policy.gopd_loss(
        s, t, r, reward_scale=scale, top_k=top_k, temperature=temperature
      )
      return jnp.sum(values * jnp.array([1.0, -2.0])), values

    return jax.grad(total, (0, 1, 2), has_aux=True)(s, t, r)

  (grad, *frozen), values = both(*arrays(*LOGITS))
  np.testing.assert_allclose(values, oracle(LOGITS[0]), rtol=1e-11)
  for zero in frozen:
    np.testing.assert_array_equal(zero, 0)
  numeric = np.zeros_like(LOGITS[0])
  for i in np.ndindex(numeric.shape):
    up, down = LOGITS[0].copy(), LOGITS[0].copy()
    up[i] += 1e-6
    down[i] -= 1e-6
    numeric[i] = np.sum([1, -2] * (oracle(up) - oracle(down))) / 2e-6
  np.testing.assert_allclose(grad, numeric, rtol=1e-6, atol=1e-8)


def test_gopd_loss_and_its_target(x64, strict):
  """loss(student) - loss(target) = KL(student||target) >= 0, top_k=v dense."""
  s, t, r = arrays(*LOGITS)
  scale = jnp.array([1.25, 0.5, 2.0])
  s, t, r = (jnp.concatenate([x, x[:1]]) for x in (s, t, r))
  target = on_policy.gopd_target_logits(t, r, reward_scale=scale)
  lam = np.array([1.25, 0.5, 2.0])[:, None]
  p = soft(np.asarray(t)) ** lam * soft(np.asarray(r)) ** (1 - lam)
  p /= p.sum(-1, keepdims=True)
  np.testing.assert_allclose(np.exp(target), p, rtol=1e-11)
  loss = functools.partial(on_policy.gopd_loss, reward_scale=scale)
  q = soft(np.asarray(s))
  np.testing.assert_allclose(
    loss(s, t, r) - loss(target, t, r),
    np.sum(q * np.log(q / p), -1),
    rtol=1e-9,
  )
  np.testing.assert_allclose(loss(s, t, r, top_k=6), loss(s, t, r), rtol=1e-12)
  grad = jax.grad(
    lambda t: jnp.sum(
      on_policy.gopd_target_logits(t, r, reward_scale=scale)[:, 0]
    )
  )(t)
  np.testing.assert_array_equal(grad, 0)
  plain = on_policy.gopd_target_logits(t, None, reward_scale=1)
  np.testing.assert_allclose(plain, np.log(soft(np.asarray(t))), rtol=1e-12)
  default = on_policy.gopd_target_logits(t, r)
  np.testing.assert_array_equal(
    default, on_policy.gopd_target_logits(t, r, reward_scale=1.25)
  )
  np.testing.assert_array_equal(
    on_policy.gopd_loss(s, t, r),
    on_policy.gopd_loss(s, t, r, reward_scale=1.25, temperature=1.0),
  )


def test_gopd_padding(x64):
  """-inf columns of all three change nothing; sizes that differ are cut."""
  s, t, r = arrays(*LOGITS)
  pad = jnp.full((2, 2), -jnp.inf)
  wide = [jnp.concatenate([x, pad], 1) for x in (s, t, r)]

  @jit
  def run(s, t, r):
    return jax.value_and_grad(lambda s: jnp.sum(on_policy.gopd_loss(s, t, r)))(
      s
    )

  value, grad = run(s, t, r)
  padded, wide_grad = run(*wide)
  np.testing.assert_allclose(padded, value, rtol=1e-12)
  np.testing.assert_allclose(wide_grad[:, :6], grad, rtol=1e-10)
  np.testing.assert_array_equal(wide_grad[:, 6:], 0)
  target = on_policy.gopd_target_logits(wide[1], wide[2])
  assert np.all(target[:, 6:] == -jnp.inf)
  np.testing.assert_allclose(
    target[:, :6], on_policy.gopd_target_logits(t, r), rtol=1e-12
  )
  cut = on_policy.gopd_loss(s, wide[1], r, vocab_size=5)
  np.testing.assert_allclose(
    cut, on_policy.gopd_loss(s[:, :5], t[:, :5], r[:, :5]), rtol=1e-12
  )
  with one_line_error("vocab_size=6"):
    on_policy.gopd_loss(s, wide[1], r)
  with distilljax.debug(), one_line_error("reference_logits must be above"):
    on_policy.gopd_target_logits(t, r.at[0, 0].set(-jnp.inf))
  with distilljax.debug(), one_line_error("teacher_logits must be above"):
    on_policy.gopd_loss(s, t.at[0, 0].set(-jnp.inf), r)


def test_missing_reference_is_an_error():
  s, t, r = arrays(*np.float32(LP[:3]))
  with one_line_error("reference_log_probs must be given"):
    on_policy.gopd_advantage(s, t, None)
  with one_line_error("reference_log_probs must be given"):
    on_policy.gopd_advantage(s, t, None, reward_scale=jnp.ones(3))
  with one_line_error("reference_logits must be given"):
    on_policy.gopd_loss(s, t, None)
  with one_line_error("reference_logits must be given"):
    on_policy.gopd_target_logits(t, None)
  np.testing.assert_allclose(
    on_policy.gopd_loss(s, t, None, reward_scale=1),
    np.sum(soft(S) * np.log(soft(S) / soft(T)), -1),
    rtol=1e-4,
  )


# --- policy gradient ------------------------------------------------------


def test_policy_gradient_loss(x64, strict):
  """Every corner of the two clips, by hand, with the gradient on each side."""
  ratio = np.array([0.5, 1.0, 1.5, 0.5, 1.0, 1.5, 4.0])
  a = np.array([2.0, 2.0, 2.0, -2.0, -2.0, -2.0, -2.0])
  # a > 0: -2 max... the lower of the two gains; a < 0: the larger cost, at most
  # 3 |a|.
  want = np.array([-1.0, -2.0, -2.6, 1.6, 2.0, 3.0, 6.0])
  slope = np.array([-1.0, -2.0, 0.0, 0.0, 2.0, 3.0, 0.0])
  fn = functools.partial(
    on_policy.policy_gradient_loss, clip_low=0.2, clip_high=0.3
  )
  args = arrays(np.log(ratio), np.zeros(7), a)
  np.testing.assert_allclose(fn(*args), want, rtol=1e-12)
  grad, *frozen = jax.grad(lambda *x: jnp.sum(fn(*x)), (0, 1, 2))(*args)
  np.testing.assert_allclose(grad, slope, rtol=1e-12)
  for zero in frozen:
    np.testing.assert_array_equal(zero, 0)
  loose = fn(*args, dual_clip=None)
  np.testing.assert_allclose(loose, np.append(want[:-1], 8.0), rtol=1e-12)
  np.testing.assert_array_equal(fn(*args, dual_clip=3), fn(*args))
  default = on_policy.policy_gradient_loss(*args)
  np.testing.assert_allclose(default[2], -2.4, rtol=1e-12)
  np.testing.assert_allclose(default[3], 1.6, rtol=1e-12)
  # The exponent is clipped, so nothing overflows.
  far = on_policy.policy_gradient_loss(
    jnp.array([500.0]), jnp.array([0.0]), jnp.array([-1.0]), dual_clip=None
  )
  np.testing.assert_allclose(far, [math.exp(20)], rtol=1e-12)


def test_importance_weights(x64, strict):
  where = jnp.asarray(WHERE)
  call = functools.partial(
    on_policy.truncated_importance_weights, *arrays(2 * S, 2 * B)
  )
  d = 2 * (S - B)
  np.testing.assert_allclose(
    call(where, cap=3.0),
    np.where(WHERE, np.minimum(np.exp(d), 3), 0),
    rtol=1e-12,
  )
  total = np.where(WHERE, d, 0).sum(1, keepdims=True)
  np.testing.assert_allclose(
    call(where, level="sequence", cap=1e9),
    np.where(WHERE, np.exp(np.clip(total, -20, 20)), 0),
    rtol=1e-12,
  )
  np.testing.assert_allclose(call(), np.minimum(np.exp(d), 5), rtol=1e-12)
  one = on_policy.truncated_importance_weights(
    jnp.array([[0.0, -90.0]]), jnp.array([[-90.0, 0.0]]), cap=math.inf
  )
  np.testing.assert_allclose(one, [[math.exp(20), math.exp(-20)]])
  grad = jax.grad(
    lambda s: jnp.sum(on_policy.truncated_importance_weights(s, jnp.asarray(B)))
  )(jnp.asarray(S))
  np.testing.assert_array_equal(grad, 0)


def test_policy_gradient_averages_to_the_exact_gradient(x64):
  """Enumerated: E[G-OPD policy gradient] = gradient of the full loss."""
  s, t, r = arrays(*LOGITS[:, 0])

  def sampled(s):
    log_q, log_t, log_r = (jax.nn.log_softmax(x) for x in (s, t, r))
    weight = jax.lax.stop_gradient(jnp.exp(log_q))
    a = on_policy.gopd_advantage(
      log_q[None], log_t[None], log_r[None], reward_scale=1.5
    )
    return jnp.sum(weight * on_policy.policy_gradient_loss(log_q, log_q, a[0]))

  exact = jax.grad(lambda s: on_policy.gopd_loss(s, t, r, reward_scale=1.5))
  np.testing.assert_allclose(jax.grad(sampled)(s), exact(s), rtol=1e-9)


# --- the cliff ------------------------------------------------------------


TABLE = np.array(
  [  # card extrapolation_cliff: p, b, c, lambda*, lambda_run
    [0.9, 0.5, 5, 1.7712, 1.7804],
    [0.99, 0.5, 5, 1.3520, 1.3524],
    [0.99, 0.8, 5, 1.5041, 1.5047],
    [0.999, 0.9, 2, 1.1473, 1.1474],
    [0.99, 0.5, 1.2, 1.0400, 1.0419],
    [0.9993, 0.5, 5, 1.2216, 1.2217],
    [0.95, 0.3, 3, 1.2988, 1.3033],
  ]
)


def logit(p):
  return np.log(p) - np.log1p(-p)


def test_cliff_table():
  p, b, c, star, run = TABLE.T
  ours = on_policy.extrapolation_threshold(p, b, c)
  np.testing.assert_allclose(ours, star, atol=1e-4)
  np.testing.assert_allclose(
    on_policy.runaway_threshold(p, b, c), run, atol=1e-4
  )
  assert ours.dtype == np.float64
  # At lambda* the tail of the fixed point is (1 - p) / c to 1e-9.
  q = logit(p) + (ours - 1) * (logit(p) - logit(b))
  np.testing.assert_allclose(1 / (1 + np.exp(q)), (1 - p) / c, rtol=1e-9)
  np.testing.assert_allclose(
    on_policy.extrapolation_threshold(0.9, 0.5, 1.0), 1.0, rtol=1e-15
  )
  assert isinstance(on_policy.extrapolation_threshold(0.9, 0.5, 2), float)
  for fn in (on_policy.extrapolation_threshold, on_policy.runaway_threshold):
    assert fn(0.5, 0.5, 2.0) == np.inf and fn(0.4, 0.5, 2.0) == np.inf
    for bad in (
      (1.0, 0.5, 2),
      (0.5, 0.0, 2),
      (0.5, np.nan, 2),
      (0.5, 0.4, 0.9),
    ):
      with one_line_error("must be"):
        fn(*bad)
    with one_line_error("from_log_odds"):
      jax.jit(functools.partial(fn, b=0.5, c=2.0))(0.9)


def test_cliff_from_log_odds(strict):
  """The float32 core against the float64 form up to p = 1 - 1e-12."""
  tail = np.array([0.3, 0.1, 1e-3, 1e-6, 1e-9, 1e-12])
  p, b, c = 1 - tail, np.full(6, 0.2), np.array([1, 1.5, 2, 5, 20, 3])
  ours = on_policy.extrapolation_threshold_from_log_odds(
    *arrays(
      np.float32(np.log1p(-tail) - np.log(tail)),
      np.float32(logit(b)),
      np.float32(c),
    )
  )
  assert ours.dtype == jnp.float32
  np.testing.assert_allclose(
    ours, on_policy.extrapolation_threshold(p, b, c), rtol=2e-6
  )
  # p -> 0 and p <= b: no overflow, no cliff.
  low = on_policy.extrapolation_threshold_from_log_odds(
    jnp.array([-200.0, -1.0, 0.0]), jnp.array([-201.0, 1.0, 0.0]), 2.0
  )
  np.testing.assert_allclose(low, [201.0, np.inf, np.inf], rtol=1e-6)
  grad = jax.grad(
    lambda a: on_policy.extrapolation_threshold_from_log_odds(
      a, jnp.zeros(()), 2.0
    )
  )(1.0)
  assert grad == 0
  with one_line_error("c must be"):
    on_policy.extrapolation_threshold_from_log_odds(
      jnp.ones(1), jnp.zeros(1), 0.5
    )


@jit
def _kary(t, b, inside, c):
  return (
    on_policy.extrapolation_threshold_kary(t, b, inside, c),
    on_policy.cap_reward_scale(1.9, t, b, inside, c),
  )


def test_cliff_kary(x64):
  """Against the two-outcome rule where it holds, against a root elsewhere."""
  p, b, c = 0.9, 0.5, 5.0
  inside = jnp.array([True, True, False, False])
  share_in, share_out = np.array([0.3, 0.7]), np.array([0.2, 0.8])
  t = np.concatenate([p * share_in, (1 - p) * share_out])
  base = np.concatenate([b * share_in, (1 - b) * share_out])
  rows_t = np.stack([t, base, t, t])  # row 1: nothing to extrapolate
  rows_b = np.stack([base, base, t, np.array([0.1, 0.4, 0.3, 0.2])])
  star, capped = _kary(*arrays(np.log(rows_t), np.log(rows_b)), inside, c)
  want = on_policy.extrapolation_threshold(p, b, c)
  np.testing.assert_allclose(star[0], want, rtol=1e-9)
  assert np.all(star[1:3] == np.inf)
  np.testing.assert_allclose(capped[:3], [1 + 0.9 * (want - 1), 1.9, 1.9])

  def tail(lam):
    tilted = rows_t[3] ** lam * rows_b[3] ** (1 - lam)
    return tilted[2:].sum() / tilted.sum()

  np.testing.assert_allclose(tail(star[3]), (1 - p) / c, rtol=1e-9)
  assert tail(star[3] - 1e-3) > (1 - p) / c
  # c = 1: the cliff is at 1. A float64 call: exactly so up to rounding.
  at_one, _ = _kary(*arrays(np.log(rows_t), np.log(rows_b)), inside, 1.0)
  np.testing.assert_allclose(at_one[jnp.array([0, 3])], 1.0, atol=1e-9)
  scale = on_policy.cap_reward_scale(
    jnp.array([1.1, 5.0, 1.0, 5.0]),
    *arrays(np.log(rows_t), np.log(rows_b)),
    inside,
    c,
    eps=0.5,
  )
  np.testing.assert_allclose(
    scale, [1.1, 5.0, 1.0, 1 + 0.5 * (star[3] - 1)], rtol=1e-9
  )


def test_cliff_bad_input():
  x = jnp.zeros((2, 3))
  mask = jnp.array([True, False, False])
  kary = on_policy.extrapolation_threshold_kary
  for call, match in (
    (lambda: kary(x, x[:1], mask, 2.0), "base_logits"),
    (lambda: kary(x, x, mask[:2], 2.0), "class_mask"),
    (lambda: kary(x, x, mask.astype(int), 2.0), "bool"),
    (lambda: kary(x, x, mask, 0.5), "c must be"),
    (lambda: kary(x, x, mask, 2.0, iterations=0), "iterations"),
    (lambda: on_policy.cap_reward_scale(2.0, x, x, mask, 2.0, eps=2), "eps"),
    (
      lambda: on_policy.cap_reward_scale(jnp.ones(3), x, x, mask, 2.0),
      "reward_scale",
    ),
  ):
    with one_line_error(match):
      call()


# --- TIP ---------------------------------------------------------------------


def test_token_importance(x64, strict):
  q, p = soft(LOGITS[0]), soft(LOGITS[1])
  ours = on_policy.token_importance(*arrays(*LOGITS[:2]), jsd_top_k=3)
  m = (p + q) / 2
  kl = lambda a, b: np.sum(a * np.log(a / b), -1)
  np.testing.assert_allclose(
    ours.entropy, -np.sum(q * np.log(q), -1) / math.log(6), rtol=1e-11
  )
  np.testing.assert_allclose(ours.reverse_kl, kl(q, p), rtol=1e-11)
  np.testing.assert_allclose(ours.forward_kl, kl(p, q), rtol=1e-11)
  ids = np.argsort(-p, -1)[:, :3]
  qk, pk = (np.take_along_axis(x, ids, -1) for x in (q, p))
  qk, pk = (x / x.sum(-1, keepdims=True) for x in (qk, pk))
  mk = (qk + pk) / 2
  np.testing.assert_allclose(
    ours.jsd, (kl(pk, mk) + kl(qk, mk)) / 2 / math.log(2), rtol=1e-11
  )
  cut = on_policy.token_importance(*arrays(*LOGITS[:2]), vocab_size=4)
  q4 = soft(LOGITS[0][:, :4])
  np.testing.assert_allclose(
    cut.entropy, -np.sum(q4 * np.log(q4), -1) / math.log(4), rtol=1e-11
  )
  whole = on_policy.token_importance(*arrays(*LOGITS[:2])).jsd
  np.testing.assert_allclose(
    whole, (kl(p, m) + kl(q, m)) / 2 / math.log(2), rtol=1e-11
  )
  one = on_policy.token_importance(jnp.zeros((2, 1)), jnp.ones((2, 1)))
  for score in one:
    np.testing.assert_array_equal(score, 0)
  grads = jax.grad(
    lambda s, t: sum(jnp.sum(x) for x in on_policy.token_importance(s, t)),
    (0, 1),
  )(*arrays(*LOGITS[:2]))
  for grad in grads:
    np.testing.assert_array_equal(grad, 0)


def minmax(x):
  span = x.max() - x.min()
  return np.zeros_like(x) if span == 0 else (x - x.min()) / span


H = RNG.uniform(size=(3, 5))
D = RNG.exponential(size=(3, 5))


@pytest.mark.parametrize("clip_divergence", [False, True])
def test_soft_or(clip_divergence, x64, strict):
  h, d = H[WHERE], D[WHERE]
  cut = minmax(np.minimum(h, np.percentile(h, 70)))
  d = np.minimum(d, np.percentile(d, 70)) if clip_divergence else d
  want = np.zeros_like(H)
  want[WHERE] = cut + minmax(d) - cut * minmax(d)
  call = functools.partial(
    on_policy.soft_or_importance, clip_divergence=clip_divergence
  )
  ours = call(*arrays(H, D, WHERE), percentile=70)
  np.testing.assert_allclose(ours, want, rtol=1e-11, atol=1e-14)
  q3 = on_policy.overconfidence_importance(*arrays(H, D, WHERE), percentile=70)
  want[WHERE] = D[WHERE] * (1 - cut)
  np.testing.assert_allclose(q3, want, rtol=1e-11, atol=1e-14)
  if clip_divergence:
    np.testing.assert_array_equal(
      call(*arrays(H, D)), call(*arrays(H, D), percentile=98.0)
    )
    np.testing.assert_array_equal(
      on_policy.overconfidence_importance(*arrays(H, D)),
      on_policy.overconfidence_importance(*arrays(H, D), percentile=98),
    )
  else:
    assert np.any(
      on_policy.soft_or_importance(*arrays(H, D))
      != call(*arrays(H, D), clip_divergence=True)
    )
  grads = jax.grad(lambda h, d: jnp.sum(call(h, d)), (0, 1))(*arrays(H, D))
  grads += jax.grad(
    lambda h, d: jnp.sum(on_policy.overconfidence_importance(h, d)), (0, 1)
  )(*arrays(H, D))
  for grad in grads:
    np.testing.assert_array_equal(grad, 0)


def test_importance_edges(x64):
  """A constant input, nothing valid, NaN behind the mask, mapped axes."""
  h, d, where = arrays(H, D, WHERE)
  np.testing.assert_array_equal(
    on_policy.soft_or_importance(jnp.ones_like(h), jnp.ones_like(d)), 0
  )
  np.testing.assert_array_equal(
    on_policy.soft_or_importance(h, d, jnp.zeros_like(where)), 0
  )
  nan = jnp.where(where, h, jnp.nan), jnp.where(where, d, jnp.nan)
  for fn in (on_policy.soft_or_importance, on_policy.overconfidence_importance):
    whole = fn(h, d, where)
    np.testing.assert_array_equal(fn(*nan, where), whole)
    mapped = jax.vmap(functools.partial(fn, axis_name="i"), axis_name="i")(
      h, d, where
    )
    np.testing.assert_allclose(mapped, whole, rtol=1e-12)


def test_select_tokens(strict):
  scores = jnp.array(
    [
      [0.1, 0.9, 0.5, 0.9, 0.2],
      [5.0, 4.0, 3.0, 2.0, 1.0],
      [1.0, 1.0, 1.0, 1.0, 1.0],
    ]
  )
  out = on_policy.select_tokens(scores, jnp.asarray(WHERE), rate=0.4)
  # floor(.4 * 5) = 2 slots; the rows have 3, 5 and 0 valid tokens.
  np.testing.assert_array_equal(out.ids[:2], [[1, 3], [0, 1]])
  np.testing.assert_array_equal(
    out.valid, [[True, False], [True, True], [False, False]]
  )
  np.testing.assert_array_equal(
    out.mask,
    [[0, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]],
  )
  every = on_policy.select_tokens(scores, jnp.asarray(WHERE), rate=1)
  np.testing.assert_array_equal(every.mask, WHERE)
  few = on_policy.select_tokens(scores, rate=0.01)
  np.testing.assert_array_equal(few.mask.sum(1), 1)
  # Python's floor: .29 * 100 is 28.999... in float64 and 29 in float32.
  many = on_policy.select_tokens(jnp.ones((1, 100)), rate=0.29)
  assert many.ids.shape == (1, 28) and many.valid.all()


def test_select_by_weight(strict):
  """Gumbel top-k: the first draw has the weights, at most once each."""
  weights = jnp.array([0.5, 0.0, 2.0, 1.5, 9.0])
  where = jnp.array([True, True, True, True, False])
  noise = jax.random.gumbel(jax.random.key(0), (4000, 5))
  draw = functools.partial(
    on_policy.select_tokens,
    jnp.broadcast_to(weights, (4000, 5)),
    jnp.broadcast_to(where, (4000, 5)),
    noise=noise,
  )
  first = np.mean(draw(rate=0.25).mask, 0)
  se = 3 * 0.5 / math.sqrt(4000)
  np.testing.assert_allclose(first, [0.125, 0, 0.5, 0.375, 0], atol=se)
  square = np.mean(draw(rate=0.25, exponent=2.0).mask, 0)
  np.testing.assert_allclose(
    square, np.array([0.25, 0, 4, 2.25, 0]) / 6.5, atol=se
  )
  four = draw(rate=0.8)  # 4 slots, floor(.8 * 4) = 3 chosen: all of weight > 0
  np.testing.assert_array_equal(four.mask[0], [1, 0, 1, 1, 0])
  with distilljax.debug(), one_line_error("scores must be"):
    on_policy.select_tokens(-jnp.ones((1, 5)), rate=0.5, noise=noise[:1])


# --- Prune-OPD ------------------------------------------------------------


def test_overlap_and_acceptance(strict):
  ids = jnp.array([[1, 2, 3, 4], [9, 8, 7, 6]])
  other = jnp.array([[4, 9, 1, 7], [1, 2, 3, 4]])
  np.testing.assert_array_equal(on_policy.topk_overlap(ids, other), [0.5, 0])
  np.testing.assert_array_equal(on_policy.topk_overlap(ids, ids), [1, 1])
  # Sorted: id 2 (.5), 4 (.3), 1 (.1), 3 (.05), given in another order.
  log_p = jnp.log(jnp.array([0.1, 0.5, 0.05, 0.3]))
  call = lambda token, threshold: float(
    on_policy.teacher_top_p_accept(
      jnp.array(token), ids[0], log_p, threshold=threshold
    )
  )
  assert [call(t, 0.5) for t in (2, 4, 1, 3, 9)] == [1, 0, 0, 0, 0]
  assert [call(t, 0.6) for t in (2, 4, 1, 3, 9)] == [1, 1, 0, 0, 0]
  assert [call(t, 0.99) for t in (2, 4, 1, 3, 9)] == [1, 1, 1, 1, 0]
  assert [call(t, 0.0) for t in (2, 4)] == [1, 0]


def test_topk_reward(x64, strict):
  u = soft(S)
  ours = on_policy.topk_reverse_kl_reward(*arrays(S, T))
  np.testing.assert_allclose(ours, -(S - T) * u, rtol=1e-12)
  grads = jax.grad(
    lambda s, t: jnp.sum(on_policy.topk_reverse_kl_reward(s, t)), (0, 1)
  )(*arrays(S, T))
  for grad in grads:
    np.testing.assert_array_equal(grad, 0)


def test_drift(strict):
  monitor = jnp.array([[0.9, 0.2, 0.7, 0.1, 0.9]])
  where = jnp.array([[True, False, True, True, True]])
  events = on_policy.drift_events(monitor, where)
  np.testing.assert_array_equal(events, [[0, 0, 0, 1, 0]])
  events = on_policy.drift_events(monitor, threshold=0.8)
  np.testing.assert_array_equal(events, [[0, 1, 1, 1, 0]])
  out = on_policy.drift_weights(events, where, drop=0.6, base=0.25)
  # Events that count: tokens 2 and 3 (token 1 is not valid).
  np.testing.assert_allclose(out.weights, [[1, 0, 0.4, 0, 0]], atol=1e-7)
  np.testing.assert_allclose(
    out.loss_weights, [[1.25, 0, 0.65, 0.25, 0.25]], atol=1e-6
  )
  np.testing.assert_array_equal(out.effective_length, [2])
  scaled = on_policy.drift_weights(
    events, where, drop=0.6, base=0.25, normalize=True
  )
  np.testing.assert_allclose(scaled.loss_weights, out.loss_weights / 1.25)
  default = on_policy.drift_weights(events)
  np.testing.assert_allclose(
    default.loss_weights, [[1.5, 1.49, 1.48, 1.47, 1.47]], rtol=1e-6
  )


def test_budget():
  """The card's unit test: ten hits +1000 up to the cap, nine misses -300."""
  step = jit(on_policy.update_rollout_budget)
  long, short = jnp.full(4, 12288), jnp.zeros(4, jnp.int32)
  budget = on_policy.RolloutBudget(2048, 0)
  for _ in range(10):
    budget = step(budget, long)
  assert (int(budget.length), int(budget.misses)) == (3048, 0)
  for _ in range(9):
    budget = step(budget, short)
  assert (int(budget.length), int(budget.misses)) == (2748, 0)
  assert step(on_policy.RolloutBudget(12250, 2), long) == (12288, 0)
  assert step(on_policy.RolloutBudget(1050, 2), short) == (1024, 0)
  assert step(on_policy.RolloutBudget(1050, 1), short) == (1050, 2)


def test_budget_details():
  call = functools.partial(
    on_policy.update_rollout_budget,
    on_policy.RolloutBudget(100, 0),
    hit_ratio=0.25,
    margin=10,
    step=5,
    patience=2,
    min_length=20,
    max_length=200,
  )
  assert call(jnp.array([90, 0, 0, 0])) == (105, 0)  # the bar is 100 - 10
  assert call(jnp.array([89, 0, 0, 0])) == (100, 1)
  assert call(jnp.array([90, 0, 0, 0, 0])) == (100, 1)  # 1/5 < .25
  low = on_policy.RolloutBudget(22, 0)
  bar = functools.partial(
    on_policy.update_rollout_budget, low, margin=10, min_length=20
  )
  assert bar(jnp.array([19])).misses == 1 and bar(jnp.array([20])).misses == 0
  mapped = jax.vmap(lambda n: call(n, axis_name="i"), axis_name="i")(
    jnp.array([[90, 0], [0, 0]])
  )
  np.testing.assert_array_equal(mapped.length, [105, 105])


def test_bad_input():
  s, t = arrays(np.float32(S), np.float32(T))
  ids = jnp.zeros((2, 3), jnp.int32)
  events = jnp.zeros((1, 3), bool)
  budget = on_policy.RolloutBudget(5, 0)
  lengths = jnp.ones(3, jnp.int32)
  update = on_policy.update_rollout_budget
  for call, match in (
    (lambda: on_policy.kl_estimate(s, t, kind="k4"), "kind must be"),
    (lambda: on_policy.kl_estimate(s, t[:1], kind="k1"), "teacher_log_probs"),
    (lambda: on_policy.kl_estimate(s, t, kind="k1", max_log_ratio=0), "max"),
    (lambda: on_policy.kl_estimate(s, t, kind="k3", max_value=-1), "max_val"),
    (lambda: on_policy.minillm_advantage(s[0], t[0]), "rank 2"),
    (lambda: on_policy.minillm_advantage(s, t, gamma=1.5), "gamma"),
    (lambda: on_policy.minillm_advantage(s, t, discount="x"), "discount"),
    (lambda: on_policy.minillm_advantage(s, t, jnp.ones(3, bool)), "where"),
    (lambda: on_policy.gopd_advantage(s, t, t, max_log_ratio=0), "max_log"),
    (
      lambda: on_policy.gopd_advantage(s, t, t, reward_scale=math.nan),
      "reward_scale",
    ),
    (
      lambda: on_policy.gopd_advantage(s, t, t, reward_scale=jnp.ones(5)),
      "reward_scale",
    ),
    (lambda: on_policy.gopd_loss(s, t, t, top_k=0), "top_k"),
    (lambda: on_policy.gopd_loss(s, t, t, top_k=6), "top_k"),
    (lambda: on_policy.policy_gradient_loss(s, t, t, clip_low=1.5), "low"),
    (lambda: on_policy.policy_gradient_loss(s, t, t, clip_high=-1), "high"),
    (lambda: on_policy.policy_gradient_loss(s, t, t, dual_clip=1), "dual"),
    (lambda: on_policy.truncated_importance_weights(s, t, level="x"), "level"),
    (lambda: on_policy.truncated_importance_weights(s, t, cap=0), "cap"),
    (lambda: on_policy.token_importance(s, t, jsd_top_k=9), "jsd_top_k"),
    (lambda: on_policy.soft_or_importance(s, t, percentile=101), "percent"),
    (lambda: on_policy.soft_or_importance(s, t[:1]), "divergence"),
    (lambda: on_policy.overconfidence_importance(s, t, percentile=-1), "per"),
    (lambda: on_policy.select_tokens(s, rate=0), "rate"),
    (lambda: on_policy.select_tokens(s, rate=1.5), "rate"),
    (lambda: on_policy.select_tokens(s, rate=0.5, exponent=-1), "exponent"),
    (lambda: on_policy.select_tokens(s[:, :0], rate=0.5), "l >= 1"),
    (lambda: on_policy.topk_overlap(ids, ids[:1]), "teacher_ids"),
    (lambda: on_policy.topk_overlap(s, t), "integer"),
    (lambda: on_policy.topk_overlap(ids[:, :0], ids[:, :0]), "k >= 1"),
    (
      lambda: on_policy.teacher_top_p_accept(
        ids[:1, 0], ids, s[:2, :3], threshold=0.5
      ),
      "ids must",
    ),
    (
      lambda: on_policy.teacher_top_p_accept(
        ids[:, 0], ids, s[:2, :3], threshold=2
      ),
      "threshold",
    ),
    (lambda: on_policy.drift_weights(events.astype(int)), "bool"),
    (lambda: on_policy.drift_weights(events, drop=-1), "drop"),
    (lambda: on_policy.drift_weights(events, base=-1), "base"),
    (lambda: update(budget, lengths, hit_ratio=2), "hit_ratio"),
    (lambda: update(budget, lengths, margin=-1), "margin"),
    (lambda: update(budget, lengths, step=0), "step"),
    (lambda: update(budget, lengths, patience=0), "patience"),
    (lambda: update(budget, lengths, min_length=9, max_length=8), "min_len"),
    (lambda: update(budget, lengths[:0]), "non-empty"),
  ):
    with one_line_error(match):
      call()
  with distilljax.debug(), one_line_error("student_log_probs must be free"):
    on_policy.kl_estimate(s.at[0, 0].set(jnp.nan), t, kind="k1")


@hypothesis.given(
  hnp.arrays(np.float32, (3, 2, 6), elements=st.floats(-20, 20, width=32))
)
def test_gopd_properties(x):
  """Finite everywhere, and least at the target."""
  loss, best, grad = _gopd_property(*x)
  assert np.all(np.isfinite(loss)) and np.all(np.isfinite(grad))
  # 0 * log terms of size 20 * 6: rounding of the two sums, not of their gap.
  assert np.all(loss >= best - 1e-4)


@jit
def _gopd_property(s, t, r):
  fn = lambda s: on_policy.gopd_loss(s, t, r)
  target = on_policy.gopd_target_logits(t, r)
  return fn(s), fn(target), jax.grad(lambda s: jnp.sum(fn(s)))(s)


def test_low_precision(strict):
  s, t, r = (jnp.asarray(x, jnp.bfloat16) for x in LOGITS)
  assert on_policy.gopd_loss(s, t, r).dtype == jnp.float32
  assert on_policy.gopd_advantage(s, t, r).dtype == jnp.float32
  assert on_policy.policy_gradient_loss(s, t, r).dtype == jnp.float32
  assert on_policy.kl_estimate(s, t, kind="k3").dtype == jnp.float32


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gopd_at_huge_logits_is_finite(top_k, dtype):
  """Logits of +-1e4 that disagree: finite values and gradients, float32."""
  rng = np.random.default_rng(0)
  draw = lambda: jnp.asarray(1e4 * rng.choice([-1, 1], size=(6, 5)), dtype)
  student, teacher, reference = draw(), draw(), draw()
  loss = lambda s: on_policy.gopd_loss(s, teacher, reference, top_k=top_k)
  values, pull = jax.vjp(loss, student)
  assert values.dtype == jnp.float32 and np.isfinite(values).all()
  (slopes,) = pull(jnp.ones_like(values))
  assert np.isfinite(np.asarray(slopes, np.float32)).all()
