"""Flow matching: its minimum is the exact velocity, its sampler the flow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import methods, oracles, processes, train
from tests import helpers
from tests.methods import common

make = methods.get("flow_matching").make


def scaled_exact(mixture):
  exact = mixture.prediction_fn(common.PATH, "velocity")
  return lambda params, x, t, **_: params["a"] * exact(x, t)


def test_exact_velocity_is_the_minimum():
  """E[(a v - target) v] = 0 at a = 1 only, when data and velocity agree."""
  mixture = common.gaussian((1.0, -0.5), 0.5)
  method = make({"student": scaled_exact(mixture)})
  rows = common.batch(
    4096, x=mixture.sample(jax.random.key(7), 4096).astype(jnp.float32)
  )

  @jax.jit
  def slope(a):
    return jax.grad(
      lambda p: common.eager_total(
        method, "student", {"student": p}, rows, common.context()
      )[0]
    )({"a": a})["a"]

  # The slope is 2 (a - 1) E[v^2] up to the sampling error of 4096 rows.
  assert abs(float(slope(jnp.float32(1.0)))) < 0.12
  assert float(slope(jnp.float32(0.5))) < -0.5
  assert float(slope(jnp.float32(1.5))) > 0.5


def test_loss_is_the_formula():
  apply = lambda params, x, t, **_: params["w"] * x + t[:, None]
  method = make({"student": apply}, time_distribution="uniform")
  rows = common.batch(8)
  noise = train.draw(jax.random.normal, rows["key"], "noise", (2,))
  t = train.draw(jax.random.uniform, rows["key"], "time")
  x_t = (1 - t)[:, None] * rows["x"] + t[:, None] * noise
  expected = np.mean((3.0 * x_t + t[:, None] - (noise - rows["x"])) ** 2)
  value, (terms, _) = common.total(
    method, "student", {"student": {"w": 3.0}}, rows, common.context()
  )
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert float(terms["velocity"].count) == 8


def test_times_are_logit_normal():
  seen = []

  def apply(params, x, t, **_):
    seen.append(t)
    return params["w"] * x

  method = make({"student": apply}, time_mean=1.0, time_std=0.5)
  common.eager_total(
    method,
    "student",
    {"student": {"w": 0.0}},
    common.batch(4096),
    common.context(),
  )
  logit = np.log(seen[0] / (1 - seen[0]))
  assert abs(logit.mean() - 1.0) < 0.05 and abs(logit.std() - 0.5) < 0.03


def test_labels_are_dropped_at_the_stated_share():
  seen = []

  def apply(params, x, t, *, label=None):
    seen.append(label)
    return params["w"] * x

  rows = common.batch(2000, label=3)
  run = lambda m: common.eager_total(
    m, "student", {"student": {"w": 1.0}}, rows, common.context()
  )
  run(make({"student": apply}, label_drop=0.25, null_label=10))
  dropped = float(np.mean(np.asarray(seen[-1]) == 10))
  assert abs(dropped - 0.25) < 0.04  # 4 standard errors
  assert set(np.unique(seen[-1])) == {3, 10}
  run(make({"student": apply}, label_drop=0.25))
  assert set(np.unique(seen[-1])) == {3}


def test_sample_follows_the_flow_and_guides():
  mixture = common.gaussian((1.0, 0.0), 0.5)
  method = make({"student": scaled_exact(mixture)})
  noise = jax.random.normal(jax.random.key(1), (32, 2))
  out = method.sample(
    {"ema": {"a": 1.0}}, {"noise": noise}, jax.random.key(0), steps=200
  )
  exact = oracles.gaussian_flow_map(mixture, noise, 1.0, 0.0, path=common.PATH)
  np.testing.assert_allclose(out, exact, atol=0.02)

  apply = lambda params, x, t, *, label: (
    jnp.where(label[:, None] == 9, 1.0, 3.0) * jnp.ones_like(x)
  )
  guided = make({"student": apply}, guidance=2.0, null_label=9)
  out = guided.sample(
    {"ema": {}},
    {"noise": noise, "label": jnp.zeros(32, jnp.int32)},
    jax.random.key(0),
    steps=1,
  )
  # One Euler step of uncond + 2 (cond - uncond) = 1 + 2 * 2 = 5.
  np.testing.assert_allclose(out, noise - 5.0, atol=1e-5)


def test_structure():
  method = make({"student": lambda p, x, t: x}, ema_decay=0.5)
  assert method.networks["ema"] == train.Ema(of="student", decay=0.5)
  assert method.schedule.entries() == [("student",)]
  assert methods.get("flow_matching").DEFAULTS["path"] == (
    processes.RectifiedFlow()
  )


def test_bad_input_is_one_line():
  apply = {"student": lambda p, x, t: x}
  with helpers.one_line_error("'ema_decai'; did you mean 'ema_decay'"):
    make(apply, ema_decai=1.0)
  with helpers.one_line_error("got none for .'student'"):
    make({})
  with helpers.one_line_error("null_label must be given"):
    make(apply, guidance=2.0)
  with helpers.one_line_error("guidance must be in"):
    make(apply, guidance=-1.0)
  with helpers.one_line_error("did you mean 'flow_matching'"):
    methods.get("flow_maching")


@pytest.mark.parametrize("name", methods.names())
def test_every_method_states_its_paper(name):
  module = methods.get(name)
  assert "arXiv:" in module.__doc__
