"""MeanFlow: no residual on the true flow map, by either identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import methods, oracles, processes, train
from tests import helpers
from tests.methods import common

make = methods.get("mean_flow").make
MIXTURE = common.gaussian((1.0, -0.5), 0.5)
UNIFORM = {"time_distribution": "uniform", "equal": 0.25}


def true_map(params, x, t, *, r, **_):
  """The Gaussian's mean velocity, times a factor."""
  mean, var = jnp.array([1.0, -0.5]), 0.25
  level = lambda s: jnp.sqrt((1 - s) ** 2 * var + s**2)[:, None]
  end = (1 - r)[:, None] * mean + (x - (1 - t)[:, None] * mean) * (
    level(r) / level(t)
  )
  exact = MIXTURE.prediction_fn(common.PATH, "velocity")
  gap = (t - r)[:, None]
  u = jnp.where(
    gap > 1e-3, (x - end) / jnp.where(gap > 1e-3, gap, 1.0), exact(x, t)
  )
  return params["a"] * u


def teacher(params, x, t, **_):
  del params
  return MIXTURE.prediction_fn(common.PATH, "velocity")(x, t)


NETS = {"student": true_map, "teacher": teacher}


@pytest.mark.parametrize("identity", ["eulerian", "lagrangian"])
def test_true_map_has_no_error(identity):
  method = make(
    NETS,
    source="teacher",
    identity=identity,
    elements="mean",
    norm_p=0.0,
    **UNIFORM,
  )
  rows = common.batch(256, x=MIXTURE.sample(jax.random.key(3), 256))

  @jax.jit
  def error(a):
    _, (_, metrics) = common.eager_total(
      method,
      "student",
      {"student": {"a": a}, "teacher": {}},
      rows,
      common.context(),
    )
    return metrics["error"].sum / metrics["error"].count

  assert float(error(1.0)) < 1e-5
  assert float(error(1.2)) > 1e-2


def test_rows_with_equal_times_are_flow_matching():
  """equal = 1: the loss is (u - (noise - x))^2, with the sum over elements."""
  apply = lambda params, x, t, *, r: (
    params["w"] * x + t[:, None] * (1 + r[:, None])
  )
  method = make({"student": apply}, equal=1.0, norm_p=0.0)
  rows = common.batch(8)
  noise = train.draw(jax.random.normal, rows["key"], "noise", (2,))
  t, r = train.draw(
    lambda k, s: processes.sample_mean_flow_times(k, s, equal=1.0),
    rows["key"],
    "times",
  )
  np.testing.assert_array_equal(t, r)
  x_t = (1 - t)[:, None] * rows["x"] + t[:, None] * noise
  u = 2.0 * x_t + (t * (1 + t))[:, None]
  expected = np.mean(np.sum((u - (noise - rows["x"])) ** 2, axis=1))
  value, _ = common.total(
    method, "student", {"student": {"w": 2.0}}, rows, common.context()
  )
  np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_adaptive_weight_and_elements():
  rows = common.batch(8)
  apply = lambda params, x, t, *, r: params["w"] * x
  run = lambda **h: common.total(
    make({"student": apply}, **h),
    "student",
    {"student": {"w": 2.0}},
    rows,
    common.context(),
  )
  value, (_, metrics) = run(norm_p=1.0, norm_eps=1e-3)
  assert 0.99 < float(value) < 1.0  # about 1 whatever the error
  _, (_, halved) = run(norm_p=1.0, elements="mean")
  np.testing.assert_allclose(
    metrics["error"].sum, 2 * halved["error"].sum, rtol=1e-5
  )


def test_guided_teacher_is_the_target():
  """u is the target only where the teacher's guidance is in it."""
  student = lambda params, x, t, *, r, label: params["c"] * jnp.ones_like(x)
  guided = lambda params, x, t, *, label: (
    jnp.where(label[:, None] == 9, 1.0, 3.0) * jnp.ones_like(x)
  )
  method = make(
    {"student": student, "teacher": guided},
    source="teacher",
    guidance=2.0,
    null_label=9,
    norm_p=0.0,
  )
  rows = common.batch(8, label=0)
  for c, zero in ((5.0, True), (3.0, False)):
    value, _ = common.total(
      method,
      "student",
      {"student": {"c": c}, "teacher": {}},
      rows,
      common.context(),
    )
    assert (float(value) < 1e-9) == zero


def test_teacher_and_target_are_frozen():
  method = make(NETS, source="teacher", **UNIFORM)
  rows = common.batch(16)
  grads = jax.grad(
    lambda p: common.total(method, "student", p, rows, common.context())[0]
  )({"student": {"a": 0.7}, "teacher": {"unused": 1.0}})
  assert float(grads["teacher"]["unused"]) == 0
  assert float(grads["student"]["a"]) != 0


def test_sampling_with_the_true_map_is_exact_at_any_number_of_steps():
  method = make(NETS, source="teacher")
  noise = jax.random.normal(jax.random.key(1), (32, 2))
  exact = oracles.gaussian_flow_map(MIXTURE, noise, 1.0, 0.0, path=common.PATH)
  for steps in (1, 3):
    out = method.sample(
      {"ema": {"a": 1.0}}, {"noise": noise}, jax.random.key(0), steps=steps
    )
    np.testing.assert_allclose(out, exact, atol=1e-5)


def test_networks_and_bad_input():
  assert "teacher" not in make({"student": true_map}).networks
  assert make(NETS, source="teacher").networks["teacher"] == train.Frozen()
  with helpers.one_line_error("source must be 'teacher'"):
    make({"student": true_map}, identity="lagrangian")
  with helpers.one_line_error("source must be 'teacher'"):
    make({"student": true_map}, guidance=2.0, null_label=1)
  with helpers.one_line_error("did you mean 'eulerian'"):
    make(NETS, source="teacher", identity="eularian")
  with helpers.one_line_error("got none for .'teacher'"):
    make({"student": true_map}, source="teacher")
