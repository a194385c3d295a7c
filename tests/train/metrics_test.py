"""(sum, count) metrics and the JSON-lines file."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import train
from tests import helpers


def test_mean_and_weight():
  values = jnp.array([1.0, 2.0, 6.0])
  where = jnp.array([True, False, True])
  assert train.mean(values).compute() == 3.0
  assert train.mean(values, where).compute() == 3.5
  assert train.weighted(2.0, train.mean(values)).compute() == 6.0
  assert math.isnan(train.mean(values, jnp.zeros(3, bool)).compute())
  assert train.once(jnp.float32(4)).compute() == 4.0


def test_totals_divide_sums_by_counts_and_names_may_come_and_go():
  totals = train.Totals()
  totals.add({"a": train.Mean(jnp.float32(10), jnp.float32(1))})
  totals.add(
    {
      "a": train.Mean(jnp.float32(2), jnp.float32(3)),
      "b": train.Mean(jnp.float32(5), jnp.float32(2)),
      "none": train.Mean(jnp.float32(0), jnp.float32(0)),
    }
  )
  assert totals.flush() == {"a": 3.0, "b": 2.5}  # not (10 + 2/3) / 2
  assert totals.flush() == {}


def test_json_lines_rewind(tmp_path):
  path = tmp_path / "metrics.jsonl"
  lines = train.JsonLines(path)
  lines.rewind("a", 0, [])  # nothing there yet
  for stage, step in [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3)]:
    lines.write(stage, step, {"x": float(step), "bad": math.nan})
  with path.open("a") as f:
    f.write('{"stage": "b", "st')  # killed while writing
  lines.rewind("b", 2, ["a"])
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert [(r["stage"], r["step"]) for r in rows] == [
    ("a", 1),
    ("a", 2),
    ("b", 1),
    ("b", 2),
  ]
  assert rows[0]["x"] == 1.0 and rows[0]["bad"] is None
  lines.rewind("a", 1, [])
  assert len(path.read_text().splitlines()) == 1


def test_make_schedule_and_optimizer():
  cosine = train.make_schedule("cosine", 2.0, 110, warmup=10)
  assert float(cosine(0)) == 0 and float(cosine(5)) == pytest.approx(1.0)
  assert float(cosine(10)) == pytest.approx(2.0)
  assert float(cosine(60)) == pytest.approx(1.0)
  assert float(cosine(110)) == pytest.approx(0.0, abs=1e-6)
  assert float(train.make_schedule("constant", 2.0, 10)(9)) == 2.0
  linear = train.make_schedule("linear", 2.0, 10)
  assert float(linear(5)) == pytest.approx(1.0)
  # Adam's first step is the learning rate times the sign of the gradient, so
  # a clip does not show there; its second moment does.
  tx = train.make_optimizer(learning_rate=0.1, steps=10, clip_norm=1.0)
  params = {"w": jnp.zeros(2)}
  change, state = tx.update(
    {"w": jnp.array([3.0, 4.0])}, tx.init(params), params
  )
  np.testing.assert_allclose(change["w"], [-0.1, -0.1], rtol=1e-4)
  import optax

  nu = optax.tree_utils.tree_get(state, "nu")["w"]
  np.testing.assert_allclose(nu, 0.001 * np.array([0.36, 0.64]), rtol=1e-4)
  decayed = train.make_optimizer(learning_rate=0.1, steps=9, weight_decay=0.5)
  params = {"w": jnp.ones(1)}
  change, _ = decayed.update({"w": jnp.zeros(1)}, decayed.init(params), params)
  np.testing.assert_allclose(change["w"], [-0.05], rtol=1e-6)


def test_ema_decay_warms_up():
  decay = train.ema_decay(0.99)
  assert float(decay(jnp.int32(0))) == pytest.approx(0.1)
  assert float(decay(jnp.int32(90))) == pytest.approx(0.91)
  assert float(decay(jnp.int32(10**6))) == pytest.approx(0.99)


def test_bad_values_are_one_line():
  with helpers.one_line_error("learning_rate must be in"):
    train.make_optimizer(learning_rate=0.0, steps=1)
  with helpers.one_line_error("b2 must be in"):
    train.make_optimizer(learning_rate=0.1, steps=1, b2=1.0)
  with helpers.one_line_error("clip_norm must be in"):
    train.make_optimizer(learning_rate=0.1, steps=1, clip_norm=-1.0)
  with helpers.one_line_error("did you mean 'cosine'"):
    train.make_schedule("cosin", 1.0, 10)
  with helpers.one_line_error("warmup must be in"):
    train.make_schedule("linear", 1.0, 10, warmup=10)
  with helpers.one_line_error("decay must be in"):
    train.ema_decay(1.5)
