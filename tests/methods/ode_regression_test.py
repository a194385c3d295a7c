"""ODE regression: zero for the exact map, its gradient points to the pairs."""

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import methods, oracles, processes
from tests import helpers
from tests.methods import common

make = methods.get("ode_regression").make


def pairs(mixture, rows=16):
  latent = jax.random.normal(jax.random.key(1), (rows, 2))
  x = oracles.gaussian_flow_map(mixture, latent, 1.0, 0.0, path=common.PATH)
  return common.batch(rows, latent=latent, x=x)


def test_exact_map_has_no_loss():
  mixture = common.gaussian((1.0, -0.5), 0.5)
  # From N(0, I) the flow takes z to m + s z, whatever the path between.
  student = lambda params, x, t, **_: params["m"] + 0.5 * x
  method = make({"student": student}, prediction="x0")
  rows = pairs(mixture)
  value = lambda m: common.total(
    method, "student", {"student": {"m": m}}, rows, common.context()
  )[0]
  m = jnp.array([1.0, -0.5])
  assert float(value(m)) < 1e-10
  np.testing.assert_allclose(value(m + 0.3), 0.09, rtol=1e-4)
  slope = jax.grad(value)(m + 0.3)
  np.testing.assert_allclose(slope, [0.3, 0.3], rtol=1e-4)


def test_prediction_kind_and_time_are_those_of_the_path():
  seen = []

  def student(params, x, t, **_):
    seen.append(t)
    return params["w"] * x

  method = make({"student": student}, prediction="velocity")
  noise = jax.random.normal(jax.random.key(0), (4, 2))
  out = method.sample(
    {"ema": {"w": 0.25}}, {"noise": noise}, jax.random.key(0), steps=3
  )
  np.testing.assert_allclose(out, 0.75 * noise, rtol=1e-5)  # x - 1 * v
  np.testing.assert_array_equal(seen[0], 1.0)
  edm = make(
    {"student": lambda p, x, t, **_: x},
    prediction="x0",
    path=processes.EDM(),
  )
  out = edm.sample({"ema": {}}, {"noise": noise}, jax.random.key(0), steps=1)
  np.testing.assert_allclose(out, 80.0 * noise, rtol=1e-5)


def test_bad_input_is_one_line():
  with helpers.one_line_error("unknown hyper-parameter 'prediktion'"):
    make({"student": lambda p, x, t: x}, prediktion="x0")
