"""GKD: whose completions a step trains on, the divergence, the coin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import methods, train
from tests import helpers
from tests.methods import common, markov

make = methods.get("gkd").make
NETS = markov.nets("student", "teacher")
ROWS = {
  "prompts": jnp.array([[0], [1]]),
  "tokens": jnp.array([[4, 4], [4, 4]]),
  "where": jnp.array([[True, True], [True, False]]),
}


def test_loss_is_the_formula():
  method = make(NETS, beta=0.3, temperature=2.0)
  params = {"student": markov.random(1), "teacher": markov.random(2)}
  rows = {**markov.batch(), "own": jnp.arange(6) < 2}
  value, (terms, metrics) = common.total(
    method, "student", params, rows, common.context()
  )
  ours, theirs = (markov.logits(params[n], rows) for n in params)
  q, p = markov.soften(ours, 2.0), markov.soften(theirs, 2.0)
  m = np.log(0.3 * np.exp(p) + 0.7 * np.exp(q))
  expected = 0.3 * markov.kl(p, m) + 0.7 * markov.kl(q, m)
  np.testing.assert_allclose(value, markov.mean(expected, rows), rtol=1e-5)
  assert set(terms) == {"jsd"}
  logged = {k: float(v.sum / v.count) for k, v in metrics.items()}
  np.testing.assert_allclose(
    logged["reverse_kl"], markov.mean(markov.kl(ours, theirs), rows), rtol=1e-5
  )
  np.testing.assert_allclose(logged["own"], 2 / 6, rtol=1e-6)
  slopes = markov.gradient(method, params, rows, common.context())
  assert not np.any(slopes["teacher"]["transition"])
  assert np.any(slopes["student"]["transition"])


@pytest.mark.parametrize(
  "hyper,tokens,where,own",
  [
    (
      {"on_policy": 1.0},
      [[1, 2, 3], [2, 3, 4]],
      [[1, 1, 1], [1, 1, 1]],
      True,
    ),
    (
      {"on_policy": 0.0},
      [[4, 4, 2], [4, 4, 2]],
      [[1, 1, 0], [1, 0, 0]],
      False,
    ),
    (
      {"on_policy": 0.0, "seq_kd": True},
      [[2, 4, 1], [3, 0, 2]],
      [[1, 1, 1], [1, 1, 1]],
      False,
    ),
  ],
)
def test_whose_completions(hyper, tokens, where, own):
  method = make(NETS, max_new_tokens=3, pad_id=2, **hyper)
  params = {"student": markov.shift(1), "teacher": markov.shift(2)}
  rows = method.collect(params, ROWS, common.context())
  np.testing.assert_array_equal(rows["tokens"], tokens)
  np.testing.assert_array_equal(rows["where"], where)
  np.testing.assert_array_equal(rows["own"], [own, own])
  np.testing.assert_array_equal(rows["prompts"], ROWS["prompts"])


def test_the_coin_is_the_steps():
  """One throw a step, from the key that all processes share."""
  method = make(NETS, on_policy=0.25, max_new_tokens=2)
  params = {"student": markov.shift(1), "teacher": markov.shift(2)}
  seen, expected = [], []
  for seed in range(40):
    context = common.context(seed=seed)
    rows = method.collect(params, ROWS, context)
    assert len(set(np.asarray(rows["own"]).tolist())) == 1
    seen.append(bool(rows["own"][0]))
    coin = jax.random.uniform(train.named_key(context.key, "source"))
    expected.append(float(coin) < 0.25)
  assert seen == expected
  assert 3 <= sum(seen) <= 18  # 10 expected, 3 standard errors are 8


def test_the_samplers_temperature_is_its_own():
  method = make(
    NETS, on_policy=1.0, sampling_temperature=0, temperature=3.0,
    max_new_tokens=1,
  )
  row = jnp.array([[0.0, 0.1, 0.2, 0.3, 0.0]])
  student = {"transition": jnp.tile(row, (5, 1))}
  rows = method.collect(
    {"student": student, "teacher": markov.shift(1)},
    {"prompts": jnp.zeros((32, 1), int)},
    common.context(),
  )
  np.testing.assert_array_equal(rows["tokens"], 3)  # the likeliest, always


def test_a_prompt_mask_is_kept():
  method = make(NETS, on_policy=0.0, max_new_tokens=2)
  mask = jnp.ones((2, 1), bool)
  rows = method.collect({}, {**ROWS, "prompt_where": mask}, common.context())
  assert rows["prompt_where"] is mask
  method = make(NETS, on_policy=1.0, max_new_tokens=2)
  params = {"student": markov.shift(1), "teacher": markov.shift(2)}
  rows = method.collect(
    params, {**ROWS, "prompt_where": mask}, common.context()
  )
  np.testing.assert_array_equal(rows["prompt_where"], mask)


def test_one_program_serves_both_sources():
  """Data and rollouts have one shape, so the step compiles once."""
  method = make(NETS, on_policy=0.5, max_new_tokens=4)
  data = markov.batch(n=32, t=2)
  rows = {k: np.asarray(v) for k, v in data.items()}
  _, history = markov.fit(
    method, markov.random(1), {"teacher": markov.random(2)}, steps=6, rows=rows
  )
  own = [float(h["student/own"].sum) for h in history]
  assert set(own) == {0.0, 32.0}
  assert history[-1]["student/jsd"].sum < history[0]["student/jsd"].sum * 2


def test_bad_input_is_one_line():
  with helpers.one_line_error("on_policy must be in"):
    make(NETS, on_policy=1.5)
  with helpers.one_line_error("beta must be in"):
    make(NETS, beta=-0.1)
  with helpers.one_line_error("got none for .'teacher'"):
    make(markov.nets("student"))
