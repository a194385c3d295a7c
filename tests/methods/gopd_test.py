"""G-OPD: both forms by hand, what the cap and the weights do, the optimum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import methods, oracles, train
from tests import helpers
from tests.methods import common, markov

make = methods.get("gopd").make
NETS = markov.nets("student", "teacher", "reference")
PARAMS = {
  "student": markov.random(1),
  "teacher": markov.random(2),
  "reference": markov.random(3),
}


def logs(rows):
  return (markov.logits(PARAMS[n], rows) for n in PARAMS)


def test_full_form_is_the_formula():
  method = make(NETS, reward_scale=1.5)
  rows = markov.batch()
  value, (terms, metrics) = common.total(
    method, "student", PARAMS, rows, common.context()
  )
  s, t, r = logs(rows)
  expected = np.sum(np.exp(s) * (s - 1.5 * t + 0.5 * r), -1)
  np.testing.assert_allclose(value, markov.mean(expected, rows), rtol=1e-5)
  assert set(terms) == {"gopd"}
  logged = metrics["reverse_kl"]
  np.testing.assert_allclose(
    logged.sum / logged.count, markov.mean(markov.kl(s, t), rows), rtol=1e-5
  )
  slopes = markov.gradient(method, PARAMS, rows, common.context())
  for frozen in ("teacher", "reference"):
    assert not np.any(slopes[frozen]["transition"])
  assert np.any(slopes["student"]["transition"])


def test_loss_top_k_lumps_the_rest():
  method = make(NETS, reward_scale=1.0, loss_top_k=2)
  rows = markov.batch()
  value, _ = common.total(method, "student", PARAMS, rows, common.context())
  s, t, _ = logs(rows)
  ids = np.argsort(-s, -1)[..., :2]
  cut = []
  for x in (s, t):
    kept = np.exp(np.take_along_axis(x, ids, -1))
    cut.append(np.concatenate([kept, 1 - kept.sum(-1, keepdims=True)], -1))
  expected = np.sum(cut[0] * np.log(cut[0] / cut[1]), -1)
  np.testing.assert_allclose(value, markov.mean(expected, rows), rtol=1e-4)


def sampled_rows(drift=0.0):
  """A batch whose behaviour snapshot is the student itself, or near it."""
  rows = markov.batch()
  own = markov.picked(markov.logits(PARAMS["student"], rows), rows) - drift
  # One token was drawn at a tenth of its probability, the others as they are.
  sampling = own.copy()
  sampling[0, 0] -= np.log(10.0)
  sampling[1, 0] -= np.log(2.0)
  return {
    **rows,
    "log_probs": jnp.asarray(own, jnp.float32),
    "sampling_log_probs": jnp.asarray(sampling, jnp.float32),
  }


@pytest.mark.parametrize("scale,cap", [(1.0, None), (1.5, None), (1.5, 1.2)])
def test_sampled_form_is_the_formula(scale, cap):
  method = make(NETS, reward_scale=scale, form="sampled", ratio_cap=cap)
  rows = sampled_rows()
  value, (_, metrics) = common.total(
    method, "student", PARAMS, rows, common.context()
  )
  s, t, r = (markov.picked(x, rows) for x in logs(rows))
  gap = t - s if cap is None else np.minimum(t - s, np.log(cap))
  advantage = gap + (scale - 1) * (t - r)
  if cap is not None:
    assert np.any((t - s > np.log(cap)) & rows["where"])
  weights = np.ones(rows["where"].shape)
  weights[0, 0], weights[1, 0] = 5.0, 2.0  # 10 is capped at 5
  # At ratio 1 the loss is -A, its gradient -A grad log pi.
  np.testing.assert_allclose(
    value, markov.mean(-weights * advantage, rows), rtol=1e-4
  )
  for name, wanted in (("advantage", advantage), ("importance", weights)):
    logged = metrics[name]
    np.testing.assert_allclose(
      logged.sum / logged.count, markov.mean(wanted, rows), rtol=1e-4
    )
  slopes = markov.gradient(method, PARAMS, rows, common.context())

  def hand(tree):
    read = jnp.concatenate([rows["prompts"], rows["tokens"]], 1)[:, :-1]
    log_p = jax.nn.log_softmax(tree["transition"])[read, rows["tokens"]]
    factor = jnp.where(rows["where"], -weights * advantage, 0)
    return jnp.sum(factor * log_p) / jnp.sum(rows["where"])

  np.testing.assert_allclose(
    slopes["student"]["transition"],
    jax.grad(hand)(PARAMS["student"])["transition"],
    atol=1e-5,
  )
  for frozen in ("teacher", "reference"):
    assert not np.any(slopes[frozen]["transition"])


def test_stale_rollouts_are_clipped():
  """The student is e^.5 more likely than the snapshot: outside 1 + .2."""
  rows = sampled_rows(drift=0.5)
  options = {"form": "sampled", "reward_scale": 1.0, "importance_cap": 1.0}
  s, t, _ = (markov.picked(x, rows) for x in logs(rows))
  advantage, ratio = t - (s - 0.5), np.exp(0.5)
  for clip in (
    {"clip_high": 0.2, "dual_clip": 3.0},
    {"clip_high": 0.3, "dual_clip": 1.1},
  ):
    value, _ = common.total(
      make(NETS, **options, **clip), "student", PARAMS, rows, common.context()
    )
    loss = np.where(
      advantage > 0,
      -advantage * (1 + clip["clip_high"]),
      np.minimum(-advantage * ratio, -clip["dual_clip"] * advantage),
    )
    np.testing.assert_allclose(value, markov.mean(loss, rows), rtol=1e-4)
  # And less likely: the lower clip bounds what a token with A < 0 can lose.
  rows = sampled_rows(drift=-0.5)
  advantage, ratio = t - (s + 0.5), np.exp(-0.5)
  for low in (0.2, 0.3):
    value, _ = common.total(
      make(NETS, **options, clip_low=low),
      "student", PARAMS, rows, common.context(),
    )
    loss = np.where(
      advantage > 0, -advantage * ratio, -advantage * (1 - low)
    )
    np.testing.assert_allclose(value, markov.mean(loss, rows), rtol=1e-4)


def test_log_ratio_to_the_reference_is_clipped():
  options = {"form": "sampled", "reward_scale": 2.0}
  rows = sampled_rows()
  s, t, r = (markov.picked(x, rows) for x in logs(rows))
  value, (_, metrics) = common.total(
    make(NETS, **options, max_log_ratio=0.1), "student", PARAMS, rows,
    common.context(),
  )
  logged = metrics["advantage"]
  np.testing.assert_allclose(
    logged.sum / logged.count,
    markov.mean(t - s + np.clip(t - r, -0.1, 0.1), rows),
    rtol=1e-4,
  )


def test_rollouts_are_the_students():
  method = make(NETS, num_samples=2, max_new_tokens=2, eos_id=0, pad_id=3)
  params = {**PARAMS, "student": markov.shift(1)}
  rows = method.collect(
    params, {"prompts": jnp.array([[4], [1]])}, common.context()
  )
  np.testing.assert_array_equal(rows["prompts"], [[4], [4], [1], [1]])
  np.testing.assert_array_equal(
    rows["tokens"], [[0, 3], [0, 3], [2, 3], [2, 3]]
  )
  np.testing.assert_array_equal(rows["where"], [[1, 0], [1, 0], [1, 1], [1, 1]])
  np.testing.assert_allclose(rows["log_probs"], 0.0, atol=1e-6)
  # Two samples of a prompt are two draws.
  rows = make(NETS, num_samples=2, max_new_tokens=8).collect(
    PARAMS, {"prompts": jnp.zeros((8, 1), int)}, common.context()
  )
  first, second = rows["tokens"][::2], rows["tokens"][1::2]
  assert np.any(first != second)


@pytest.mark.parametrize("form", ["full", "sampled"])
def test_it_reaches_the_geometric_target(form):
  """From the reference, 60 steps: near T^1.5 R^-.5, away from T."""
  method = make(NETS, reward_scale=1.5, form=form, max_new_tokens=5)
  base, tilt = (markov.random(i)["transition"] for i in (3, 2))
  frozen = {
    "reference": {"transition": base}, "teacher": {"transition": base + tilt}
  }
  trained, history = markov.fit(
    method, frozen["reference"], frozen, steps=60, prompts=64
  )
  target = {
    "transition": oracles.geometric_optimum(
      frozen["teacher"]["transition"],
      frozen["reference"]["transition"],
      reward_scale=1.5,
    )
  }
  kl = lambda other: float(
    oracles.sequence_kl(markov.lm(trained), markov.lm(other), length=6)
  )
  # The sampled form keeps the noise of its advantage at a constant rate.
  assert kl(target) < {"full": 5e-3, "sampled": 0.1}[form]
  assert kl(frozen["teacher"]) > 5 * kl(target)
  assert history[0]["student/gopd"].count == 64 * 5


def test_structure():
  plain = make(markov.nets("student", "teacher"), reward_scale=1.0)
  assert set(plain.networks) == {"student", "teacher"}
  assert plain.networks["teacher"] == train.Frozen()
  assert set(make(NETS).networks) == {"student", "teacher", "reference"}
  assert plain.schedule.entries() == [("student",)]
  out = plain.sample(
    {"student": markov.shift(2)}, {"prompts": jnp.array([[0]])},
    jax.random.key(0), steps=2,
  )
  np.testing.assert_array_equal(out.tokens, [[2, 4]])


def test_bad_input_is_one_line():
  with helpers.one_line_error("got none for .'reference'"):
    make(markov.nets("student", "teacher"))
  with helpers.one_line_error("form must be one of"):
    make(NETS, form="token")
  with helpers.one_line_error("ratio_cap must be"):
    make(NETS, ratio_cap=0.5)
  with helpers.one_line_error("reward_scale"):
    make(NETS, reward_scale=float("nan"))
