"""Markov oracle against enumeration, and losses against the oracle."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses, oracles
from tests.helpers import one_line_error

# Many small programs, each run once: compile them cheaply.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
V, LENGTH = 3, 4
RNG = np.random.default_rng(4)
SEQUENCES = np.array(list(itertools.product(range(V), repeat=LENGTH)))


def model():
  return oracles.MarkovLM(
    jnp.asarray(RNG.normal(size=V)), jnp.asarray(RNG.normal(size=(V, V)))
  )


def log_soft(x):
  x = np.asarray(x)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def log_probs(lm):
  """log P of all V^LENGTH sequences, by hand."""
  start, step = log_soft(lm.initial), log_soft(lm.transition)
  return np.array(
    [
      start[y[0]] + sum(step[a, b] for a, b in zip(y[:-1], y[1:]))
      for y in SEQUENCES
    ]
  )


def test_against_enumeration(x64):
  p, q = model(), model()
  log_p, log_q = log_probs(p), log_probs(q)
  np.testing.assert_allclose(np.exp(log_p).sum(), 1, rtol=1e-12)
  np.testing.assert_allclose(
    oracles.sequence_kl(p, q, length=LENGTH),
    np.sum(np.exp(log_p) * (log_p - log_q)),
    rtol=1e-11,
  )
  np.testing.assert_allclose(
    oracles.sequence_entropy(p, length=LENGTH),
    -np.sum(np.exp(log_p) * log_p),
    rtol=1e-11,
  )
  mass = oracles.occupancy(p, length=LENGTH)
  assert mass.shape == (LENGTH, V)
  for t, v in itertools.product(range(LENGTH), range(V)):
    want = np.exp(log_p)[SEQUENCES[:, t] == v].sum()
    np.testing.assert_allclose(mass[t, v], want, rtol=1e-11)
  reward = RNG.normal(size=(V, V))
  returns = reward[SEQUENCES[:, :-1], SEQUENCES[:, 1:]].sum(1)
  np.testing.assert_allclose(
    oracles.expected_return(p, jnp.asarray(reward), length=LENGTH),
    np.sum(np.exp(log_p) * returns),
    rtol=1e-11,
  )
  ids = jnp.asarray(SEQUENCES)
  np.testing.assert_allclose(
    oracles.token_log_probs(p, ids).sum(1), log_p, rtol=1e-12
  )
  logits = oracles.sequence_logits(p, ids)
  np.testing.assert_allclose(jnp.exp(logits).sum(-1), 1, rtol=1e-12)


def test_outcome_posterior(x64):
  """P(y_{t+1} | y_t, outcome) by enumerating and dividing."""
  p = model()
  likelihood = np.array([0.9, 0.2, 0.0])
  with np.errstate(divide="ignore"):
    start, step = oracles.outcome_posterior(
      p, jnp.asarray(np.log(likelihood)), length=LENGTH
    )
  joint = np.exp(log_probs(p)) * likelihood[SEQUENCES[:, -1]]
  assert step.shape == (LENGTH - 1, V, V)
  for v in range(V):
    want = joint[SEQUENCES[:, 0] == v].sum() / joint.sum()
    np.testing.assert_allclose(np.exp(start[v]), want, rtol=1e-11)
  for t, a, b in itertools.product(range(LENGTH - 1), range(V), range(V)):
    here = SEQUENCES[:, t] == a
    both = here & (SEQUENCES[:, t + 1] == b)
    want = joint[both].sum() / joint[here].sum()
    np.testing.assert_allclose(np.exp(step[t, a, b]), want, atol=1e-12)


def test_sampling():
  """Frequencies of 20000 draws within 4 standard errors of the occupancy."""
  p = oracles.make_markov_lm(jax.random.key(1), V, scale=2.0)
  draw = jit(
    functools.partial(
      oracles.sample_sequences, model=p, rows=20000, length=LENGTH
    )
  )
  ids = np.asarray(draw(jax.random.key(0)))
  assert ids.shape == (20000, LENGTH) and ids.dtype == np.int32
  mass = np.asarray(oracles.occupancy(p, length=LENGTH))
  for t, v in itertools.product(range(LENGTH), range(V)):
    error = 4 * np.sqrt(mass[t, v] * (1 - mass[t, v]) / 20000)
    assert abs((ids[:, t] == v).mean() - mass[t, v]) < error
  np.testing.assert_allclose(p.initial, 0)
  assert 1 < float(jnp.std(p.transition)) < 3


def test_losses_against_the_oracle(x64):
  """Means over all sequences, weighed exactly: values and gradients.

  The full-vocabulary reverse KL has the sequence KL as its mean. Its gradient
  lacks the part through the sampling of later states; REINFORCE with the
  undiscounted MiniLLM advantage has both, and equals the exact gradient.
  """
  student, teacher = model(), model()
  ids = jnp.asarray(SEQUENCES)

  def weights(lm):
    return jax.lax.stop_gradient(
      jnp.exp(jnp.sum(oracles.token_log_probs(lm, ids), axis=1))
    )

  def reverse(lm):
    per_token = losses.reverse_kl(
      oracles.sequence_logits(lm, ids), oracles.sequence_logits(teacher, ids)
    )
    return jnp.sum(weights(lm)[:, None] * per_token)

  def forward(lm):
    per_token = losses.forward_kl(
      oracles.sequence_logits(lm, ids), oracles.sequence_logits(teacher, ids)
    )
    return jnp.sum(weights(teacher)[:, None] * per_token)

  def estimate(lm, kind):
    values = losses.kl_estimate(
      oracles.token_log_probs(lm, ids),
      oracles.token_log_probs(teacher, ids),
      kind=kind,
      max_value=1e9,
    )
    return jnp.sum(weights(lm)[:, None] * values)

  def reinforce(lm):
    s = oracles.token_log_probs(lm, ids)
    t = oracles.token_log_probs(teacher, ids)
    advantage = losses.minillm_advantage(s, t, gamma=1, length_norm=False)
    return jnp.sum(
      weights(lm)[:, None] * losses.policy_gradient_loss(s, s, advantage)
    )

  kl = functools.partial(oracles.sequence_kl, length=LENGTH)

  @jit
  def everything(lm):
    return (
      kl(lm, teacher),
      kl(teacher, lm),
      jax.grad(lambda m: kl(m, teacher))(lm),
      jax.grad(lambda m: kl(teacher, m))(lm),
      reverse(lm),
      jax.value_and_grad(forward)(lm),
      {k: estimate(lm, k) for k in ("k1", "k3")},
      jax.grad(reinforce)(lm),
      jax.grad(lambda m: estimate(m, "k1"))(lm),
    )

  out = everything(student)
  rkl, fkl, rkl_grad, fkl_grad, full, (forward_value, forward_grad), *rest = out
  estimates, reinforce_grad, k1_grad = rest
  np.testing.assert_allclose(full, rkl, rtol=1e-11)
  np.testing.assert_allclose(forward_value, fkl, rtol=1e-11)
  for value in estimates.values():
    np.testing.assert_allclose(value, rkl, rtol=1e-10)
  for ours, exact in (
    (forward_grad, fkl_grad),
    (reinforce_grad, rkl_grad),
    (k1_grad, jax.tree.map(jnp.zeros_like, rkl_grad)),
  ):
    for a, b in zip(ours, exact):
      np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.25, 2.0])
def test_return_grows_with_the_reward_scale(scale, x64):
  """The geometric target of a rewarded teacher earns more at a larger scale."""
  key = jax.random.key(3)
  base = oracles.make_markov_lm(key, 8)
  reward = jax.random.normal(jax.random.key(4), (8, 8))
  table = jax.nn.log_softmax(base.transition)
  teacher = jax.nn.log_softmax(table + reward / 2)

  def exact(scale):
    policy = oracles.geometric_optimum(teacher, table, reward_scale=scale)
    return oracles.expected_return(
      oracles.MarkovLM(base.initial, policy), reward, length=6
    )

  h = 1e-3
  assert exact(scale + h) > exact(scale)
  target = losses.gopd_target_logits(teacher, table, reward_scale=scale)
  np.testing.assert_allclose(
    target,
    oracles.geometric_optimum(teacher, table, reward_scale=scale),
    rtol=1e-10,
  )


def test_the_call_form_of_a_language_model():
  """Row t is the transition of token t; nothing is remembered."""
  model = oracles.make_markov_lm(jax.random.key(0), 4)
  params = {"transition": model.transition}
  ids = jnp.array([[0, 3, 1], [2, 2, 0]])
  logits = oracles.markov_apply(params, ids)
  np.testing.assert_array_equal(logits, model.transition[ids])
  np.testing.assert_allclose(
    jax.nn.log_softmax(logits[:, :-1]),
    oracles.sequence_logits(model, ids)[:, 1:],
    rtol=1e-6,
  )
  last, cache = oracles.markov_apply(
    params, ids, where=None, cache=7, last=True
  )
  np.testing.assert_array_equal(last, logits[:, -1:])
  again, cache = oracles.markov_apply(params, ids[:, :1], cache=cache)
  np.testing.assert_array_equal(again, logits[:, :1])
  assert cache.shape == (2, 0)


def test_bad_input():
  p = oracles.make_markov_lm(jax.random.key(0), 4)
  with one_line_error("model.transition must be"):
    oracles.occupancy(oracles.MarkovLM(p.initial, p.transition[0]), length=2)
  with one_line_error("model.initial must be"):
    oracles.occupancy(oracles.MarkovLM(p.initial[:3], p.transition), length=2)
  with one_line_error("reward must be"):
    oracles.expected_return(p, jnp.ones((3, 3)), length=2)
  with one_line_error("outcome_log_likelihood must be"):
    oracles.outcome_posterior(p, jnp.ones(3), length=2)
