"""CEPO: rollouts, rewards and evidence by hand; GRPO learns a known answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import methods, train
from tests import helpers
from tests.methods import common, markov

make = methods.get("cepo").make
V = markov.V


def reader(params, tokens, **_):
  """Transitions plus a bias that the first token, the hint slot, picks."""
  return params["transition"][tokens] + params["hint"][tokens[:, :1]]


def show(prompts, solutions):
  return prompts.at[:, 0].set(solutions[:, 0])


def reward(prompts, tokens):
  """1 for the prompt's successor in the first place."""
  return tokens[:, 0] == (prompts[:, -1] + 1) % V


PARAMS = {
  "student": {
    **markov.random(1), "hint": jax.random.normal(jax.random.key(9), (V, V))
  }
}


def group_rows():
  """Two prompts with a slot, four rollouts each; the second has no wrong."""
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(V, size=(8, 3)))
  where = jnp.arange(3)[None] < jnp.array([3, 2, 3, 1, 3, 3, 2, 3])[:, None]
  return {
    "prompts": jnp.asarray([[0, 2]] * 4 + [[0, 1]] * 4),
    "tokens": tokens,
    "where": where,
    "rewards": jnp.asarray([0, 1.0, 1, 0.25, 1, 0.75, 1, 1]),
    "solutions": jnp.asarray([[3, 4, 0]] * 4 + [[1, 2, 2]] * 4),
    "log_probs": jnp.asarray(rng.normal(size=(8, 3)) - 2, jnp.float32),
    "sampling_log_probs": jnp.zeros((8, 3)) - 2.0,
    "key": train.row_keys(jax.random.key(0), 8),
  }


def advantages(rows, **hyper):
  method = make(
    {"student": reader}, reward=reward, evidence=show, num_samples=4, **hyper
  )
  run = jax.jit(
    lambda params, rows: method.prepare(params, rows, common.context())[0]
  )
  return run(PARAMS, rows)


def plain(rows):
  """(R - mean) / (unbiased sd + 1e-6) of each group, over its tokens."""
  r = np.asarray(rows["rewards"], np.float64).reshape(2, 4)
  a = (r - r.mean(1, keepdims=True)) / (r.std(1, ddof=1, keepdims=True) + 1e-6)
  return np.where(rows["where"], a.reshape(8, 1), 0)


def log_probs(rows, hints):
  """log P(token | hint, token before), float64."""
  read = np.concatenate([rows["prompts"], rows["tokens"]], 1)[:, 1:-1]
  p = {k: np.asarray(v, np.float64) for k, v in PARAMS["student"].items()}
  x = p["transition"][read] + p["hint"][np.asarray(hints)][:, None]
  x = x - np.log(np.exp(x).sum(-1, keepdims=True))
  tokens = np.asarray(rows["tokens"])[..., None]
  return np.take_along_axis(x, tokens, 2)[..., 0]


def test_grpo_is_the_group_normalised_reward():
  rows = group_rows()
  found = advantages(rows, credit="grpo")
  np.testing.assert_allclose(found["advantages"], plain(rows), rtol=1e-5)
  assert "delta" not in found


def test_an_oracle_of_steps_is_normalised_position_by_position():
  rows = group_rows()
  rng = np.random.default_rng(2)
  steps = rng.integers(2, size=(8, 3)).astype(np.float32)
  steps[4:, 1] = 1  # all right in a group: no credit
  found = advantages(
    rows | {"steps": jnp.asarray(steps)}, credit="steps",
    steps=lambda p, t: t > 0,
  )  # fmt: skip
  s = steps.astype(np.float64).reshape(2, 4, 3)
  a = (s - s.mean(1, keepdims=True)) / (s.std(1, ddof=1, keepdims=True) + 1e-6)
  wanted = np.where(rows["where"], a.reshape(8, 3), 0)
  np.testing.assert_allclose(found["advantages"], wanted, rtol=1e-5)
  assert not np.any(found["advantages"][4:, 1])
  assert "delta" not in found and "without_negative" not in found


def banded(a, delta, mix, band):
  sign = np.sign(a.sum(1, keepdims=True))
  weight = np.clip(np.exp(sign * delta), 1 - band, 1 + band)
  return a * ((1 - mix) + mix * weight)


@pytest.mark.parametrize("fallback", ["rlsd", "grpo"])
@pytest.mark.parametrize("slices", [1, 2])
def test_contrastive_advantages(fallback, slices):
  """Wrong answers: row 0 for its group, row 3 for row 0; none in group two."""
  rows = group_rows()
  found = advantages(
    rows, mix=0.75, band=0.5, decay_steps=None, fallback=fallback,
    slices=slices,
  )
  positive = log_probs(rows, rows["solutions"][:, 0])
  worst = np.array([3, 0, 0, 0, 0, 0, 0, 0])
  negative = log_probs(rows, rows["tokens"][worst, 0])
  delta = positive - negative
  spare = positive - np.asarray(rows["log_probs"])
  known = np.arange(8)[:, None] < 4
  np.testing.assert_allclose(
    found["delta"], np.where(known, delta, 0), atol=1e-5
  )
  used = np.where(known, delta, spare if fallback == "rlsd" else 0.0)
  expected = banded(plain(rows), used, 0.75, 0.5)
  np.testing.assert_allclose(found["advantages"], expected, atol=1e-5)
  np.testing.assert_array_equal(found["without_negative"], [0] * 4 + [1] * 4)
  assert "solutions" not in found
  # The evidence changed something, and not only by rounding.
  assert np.abs(expected - plain(rows)).max() > 0.1


def test_self_evidence_and_the_decay():
  rows = group_rows()
  positive = log_probs(rows, rows["solutions"][:, 0])
  delta = positive - np.asarray(rows["log_probs"])
  method = make(
    {"student": reader}, reward=reward, evidence=show, num_samples=4,
    credit="self", mix=0.8, band=0.3, decay_steps=20,
  )
  run = jax.jit(
    lambda step: method.prepare(
      PARAMS, rows, common.context()._replace(step=step)
    )[0]
  )
  for step, mix in ((0, 0.8), (5, 0.6), (20, 0.0), (30, 0.0)):
    found = run(jnp.int32(step))
    np.testing.assert_allclose(
      found["advantages"], banded(plain(rows), delta, mix, 0.3), atol=1e-5
    )
  np.testing.assert_allclose(found["delta"], delta, atol=1e-5)
  np.testing.assert_array_equal(found["without_negative"], 0)


def test_the_threshold_of_what_is_wrong():
  rows = group_rows()
  found = advantages(rows, rejected=0.8, decay_steps=None)
  # .75 is now a wrong answer of the second group, for all rows but itself.
  np.testing.assert_array_equal(
    found["without_negative"], [0, 0, 0, 0, 0, 1, 0, 0]
  )


@pytest.mark.parametrize("credit", ["grpo", "contrastive", "steps"])
def test_collect(credit):
  method = make(
    markov.nets("student"), reward=reward, evidence=show, credit=credit,
    steps=lambda p, t: t > p[:, :1], num_samples=3, max_new_tokens=2,
    eos_id=0, pad_id=4,
  )
  rows = method.collect(
    {"student": markov.shift(1)},
    {"prompts": jnp.array([[4], [2]]), "tokens": jnp.array([[1, 2], [3, 4]])},
    common.context(),
  )
  np.testing.assert_array_equal(rows["prompts"][:, 0], [4, 4, 4, 2, 2, 2])
  np.testing.assert_array_equal(rows["tokens"], [[0, 4]] * 3 + [[3, 4]] * 3)
  np.testing.assert_array_equal(rows["rewards"], np.ones(6))
  assert rows["rewards"].dtype == jnp.float32
  assert ("steps" in rows) == (credit == "steps")
  if credit == "steps":
    np.testing.assert_array_equal(
      rows["steps"], [[0, 0]] * 3 + [[1, 1]] * 3
    )
    assert rows["steps"].dtype == jnp.float32
  if credit != "contrastive":
    assert "solutions" not in rows
  else:
    np.testing.assert_array_equal(
      rows["solutions"], [[1, 2]] * 3 + [[3, 4]] * 3
    )


def test_loss_and_its_gradient():
  """-w A grad log pi at the snapshot; no gradient through anything else."""
  method = make({"student": reader}, reward=reward, evidence=show)
  rows = group_rows()
  own = log_probs(rows, rows["prompts"][:, 0])
  sampling = own.copy()
  sampling[0, 0] -= np.log(2.0)
  sampling[2, 1] -= np.log(9.0)
  weights = np.ones((8, 3))
  weights[0, 0], weights[2, 1] = 2.0, 5.0
  a = np.random.default_rng(1).normal(size=(8, 3))
  rows = {
    **rows,
    "advantages": jnp.asarray(a, jnp.float32),
    "delta": jnp.asarray(a - 1, jnp.float32),
    "without_negative": jnp.asarray([1.0, 1] + [0] * 6),
    "log_probs": jnp.asarray(own, jnp.float32),
    "sampling_log_probs": jnp.asarray(sampling, jnp.float32),
  }
  value, (terms, metrics) = common.total(
    method, "student", PARAMS, rows, common.context()
  )
  mean = lambda x: np.sum(np.where(rows["where"], x, 0)) / 20
  assert int(rows["where"].sum()) == 20
  np.testing.assert_allclose(value, mean(-weights * a), rtol=1e-4)
  assert set(terms) == {"policy"}
  logged = {k: float(v.sum / v.count) for k, v in metrics.items()}
  np.testing.assert_allclose(logged["reward"], 6 / 8)
  np.testing.assert_allclose(logged["evidence"], mean(np.abs(a - 1)), rtol=1e-5)
  np.testing.assert_allclose(logged["without_negative"], 0.25)

  def hand(tree):
    read = jnp.concatenate([rows["prompts"], rows["tokens"]], 1)
    x = jax.nn.log_softmax(reader(tree, read[:, :-1])[:, 1:])
    x = jnp.take_along_axis(x, rows["tokens"][..., None], 2)[..., 0]
    return jnp.sum(jnp.where(rows["where"], -weights * a * x, 0)) / 20

  slopes = markov.gradient(method, PARAMS, rows, common.context())
  wanted = jax.grad(hand)(PARAMS["student"])
  for name in wanted:
    np.testing.assert_allclose(
      slopes["student"][name], wanted[name], atol=1e-5
    )


def test_stale_rollouts_are_clipped():
  rows = group_rows()
  own = log_probs(rows, rows["prompts"][:, 0])
  a = np.random.default_rng(1).normal(size=(8, 3))
  mean = lambda x: np.sum(np.where(rows["where"], x, 0)) / 20
  for drift in (0.5, -0.5):
    old = jnp.asarray(own - drift, jnp.float32)
    given = {
      **rows, "advantages": jnp.asarray(a, jnp.float32), "log_probs": old,
      "sampling_log_probs": old,
    }
    for clips in ((0.2, 0.28, 3.0), (0.3, 0.4, 1.1)):
      low, high, dual = clips
      method = make(
        {"student": reader}, reward=reward, credit="grpo", clip_low=low,
        clip_high=high, dual_clip=dual,
      )
      value, _ = common.total(
        method, "student", PARAMS, given, common.context()
      )
      ratio = np.exp(drift)
      loss = np.maximum(-a * ratio, -a * np.clip(ratio, 1 - low, 1 + high))
      loss = np.where(a < 0, np.minimum(loss, -dual * a), loss)
      np.testing.assert_allclose(value, mean(loss), rtol=1e-4)
  assert methods.get("cepo").DEFAULTS["clip_high"] == 0.28


def test_grpo_learns_the_rewarded_token():
  """From a uniform policy: reward .2 to above .9 in 40 steps of 32 x 4."""
  method = make(
    markov.nets("student"), reward=reward, credit="grpo", num_samples=4,
    max_new_tokens=1,
  )
  trained, history = markov.fit(
    method, {"transition": jnp.zeros((V, V))}, {}, steps=40, lr=0.2
  )
  rewards = [float(h["student/reward"].compute()) for h in history]
  assert rewards[0] < 0.4 and np.mean(rewards[-5:]) > 0.9
  best = np.argmax(trained["transition"], axis=1)
  np.testing.assert_array_equal(best, (np.arange(V) + 1) % V)


def test_structure():
  method = make(markov.nets("student"), reward=reward, credit="grpo")
  assert method.networks == {"student": train.Trained()}
  assert method.schedule.entries() == [("student",)]
  assert not method.couples_rows  # groups are normalised in `prepare`


def test_bad_input_is_one_line():
  nets = markov.nets("student")
  with helpers.one_line_error("reward must be a function"):
    make(nets)
  with helpers.one_line_error("evidence must be a function"):
    make(nets, reward=reward)
  with helpers.one_line_error("steps must be a function"):
    make(nets, reward=reward, credit="steps")
  with helpers.one_line_error("credit must be one of"):
    make(nets, reward=reward, credit="ppo")
  with helpers.one_line_error("fallback must be one of"):
    make(nets, reward=reward, evidence=show, fallback="none")
  with helpers.one_line_error("num_samples must be"):
    make(nets, reward=reward, credit="grpo", num_samples=1)
