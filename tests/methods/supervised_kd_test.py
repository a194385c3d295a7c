"""Supervised distillation: its formulas, whose samples, a known optimum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import methods, oracles, train
from tests import helpers
from tests.methods import common, markov

make = methods.get("supervised_kd").make
PARAMS = {"student": markov.random(1), "teacher": markov.random(2)}


@pytest.mark.parametrize("objective", ["forward_kl", "cross_entropy"])
def test_loss_is_the_formula(objective):
  method = make(
    markov.nets("student", "teacher"), objective=objective, temperature=2.0
  )
  rows = markov.batch()
  value, (terms, metrics) = common.total(
    method, "student", PARAMS, rows, common.context()
  )
  ours, theirs = (markov.logits(PARAMS[n], rows) for n in PARAMS)
  q, p = markov.soften(ours, 2.0), markov.soften(theirs, 2.0)
  expected = {
    "forward_kl": markov.kl(p, q), "cross_entropy": -markov.picked(q, rows)
  }[objective]
  np.testing.assert_allclose(value, markov.mean(expected, rows), rtol=1e-5)
  assert set(terms) == {objective}
  assert float(terms[objective].count) == rows["where"].sum()
  # What is logged is at temperature 1, whatever the loss has.
  logged = {k: float(v.sum / v.count) for k, v in metrics.items()}
  np.testing.assert_allclose(
    logged["entropy"], markov.mean(markov.entropy(ours), rows), rtol=1e-5
  )
  np.testing.assert_allclose(logged["length"], rows["where"].sum(1).mean())
  if objective == "forward_kl":
    np.testing.assert_allclose(
      logged["forward_kl"], markov.mean(markov.kl(theirs, ours), rows),
      rtol=1e-5,
    )
  else:
    assert "forward_kl" not in logged
  slopes = markov.gradient(method, PARAMS, rows, common.context())
  assert not np.any(slopes["teacher"]["transition"])
  assert np.any(slopes["student"]["transition"])


def test_samples_are_the_teachers():
  method = make(
    markov.nets("student", "teacher"),
    source="teacher",
    max_new_tokens=4,
    eos_id=0,
    pad_id=3,
  )
  params = {"student": markov.shift(1), "teacher": markov.shift(2)}
  rows = method.collect(
    params,
    {"prompts": jnp.array([[1], [0]]), "tokens": jnp.ones((2, 2), int)},
    common.context(),
  )
  # 1 -> 3 -> 0 = EOS, then padding; 0 -> 2 -> 4 -> 1 -> 3, cut by the length.
  np.testing.assert_array_equal(rows["tokens"], [[3, 0, 3, 3], [2, 4, 1, 3]])
  np.testing.assert_array_equal(rows["where"], [[1, 1, 0, 0], [1, 1, 1, 1]])
  np.testing.assert_array_equal(rows["prompts"], [[1], [0]])


def test_rollouts_follow_the_steps_key():
  method = make(
    markov.nets("student", "teacher"), source="teacher", max_new_tokens=6
  )
  prompts = {"prompts": jnp.zeros((16, 1), int)}
  run = lambda seed: np.asarray(
    method.collect(PARAMS, prompts, common.context(seed=seed))["tokens"]
  )
  np.testing.assert_array_equal(run(0), run(0))
  assert np.any(run(0) != run(1))
  assert len(np.unique(run(0), axis=0)) > 8  # rows draw on their own


def test_it_reaches_the_teacher():
  """40 steps on the teacher's samples: exact forward KL falls 20-fold."""
  method = make(
    markov.nets("student", "teacher"), source="teacher", max_new_tokens=5
  )
  teacher = markov.random(2)
  trained, history = markov.fit(
    method, markov.random(1), {"teacher": teacher}, steps=40
  )
  kl = lambda p: float(
    oracles.sequence_kl(markov.lm(teacher), markov.lm(p), length=6)
  )
  assert kl(trained) < kl(markov.random(1)) / 20
  assert history[0]["student/forward_kl"].count == 32 * 5


def test_sample_is_the_students():
  method = make(markov.nets("student"), objective="cross_entropy")
  out = method.sample(
    {"student": markov.shift(1)},
    {"prompts": jnp.array([[0], [2]])},
    jax.random.key(0),
    steps=3,
  )
  np.testing.assert_array_equal(out.tokens, [[1, 2, 3], [3, 4, 0]])


def test_structure():
  plain = make(markov.nets("student"), objective="cross_entropy")
  assert plain.networks == {"student": train.Trained()}
  assert plain.collect is None
  assert plain.schedule.entries() == [("student",)]
  both = make(markov.nets("student", "teacher"))
  assert both.networks["teacher"] == train.Frozen()
  assert both.collect is None


def test_bad_input_is_one_line():
  with helpers.one_line_error("got none for .'teacher'"):
    make(markov.nets("student"))
  with helpers.one_line_error("got none for .'teacher'"):
    make(markov.nets("student"), objective="cross_entropy", source="teacher")
  with helpers.one_line_error("objective must be one of"):
    make(markov.nets("student"), objective="kl")
  with helpers.one_line_error("source must be one of"):
    make(markov.nets("student", "teacher"), source="student")
  with helpers.one_line_error("did you mean 'eos_id'"):
    make(markov.nets("student", "teacher"), eos=1)
