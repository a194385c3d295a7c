"""Consistency losses against closed forms and hand-made derivatives."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import distilljax
from distilljax import losses
from tests import helpers

B, D = 3, 4
SIGMA = np.array([2.5, 0.7, 0.3])
LOWER = np.array([1.5, 0.6, 0.05])
ANGLE = np.array([1.3, 0.6, 0.1])


def arrays(seed=0, dtype=None, n=2):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=(B, D)), dtype) for _ in range(n)]


def col(a):
  return np.asarray(a)[:, None]


def both(*arrays):
  return [np.asarray(a) for a in arrays]


# Distances.


@pytest.mark.parametrize("elements", ["mean", "sum"])
def test_distances_by_hand(x64, strict, elements):
  a, b = arrays()
  d = np.asarray(a) - np.asarray(b)
  count = D if elements == "mean" else 1
  np.testing.assert_allclose(
      losses.squared_distance(a, b, elements=elements),
      (d**2).sum(1) / count,
      rtol=1e-12,
  )
  np.testing.assert_allclose(
      losses.absolute_distance(a, b, elements=elements),
      np.abs(d).sum(1) / count,
      rtol=1e-12,
  )
  np.testing.assert_allclose(
      losses.max_distance(a, b), np.abs(d).max(1), rtol=1e-12
  )


def test_max_distance_has_one_subgradient(x64, strict):
  a = jnp.array([[[1.0, -3.0], [3.0, 0.5]], [[0.0, 0.0], [0.0, 0.0]]])
  out, grad = jax.value_and_grad(
      lambda a: jnp.sum(losses.max_distance(a, jnp.zeros_like(a)))
  )(a)
  assert float(out) == 3.0
  # The first of the two largest elements, and nothing where a = b.
  np.testing.assert_array_equal(grad[0], [[0, -1], [0, 0]])
  np.testing.assert_array_equal(grad[1], 0)
  assert losses.max_distance(a, a).shape == (2,)


def test_absolute_distance_has_slope_zero_at_zero(strict):
  a = jnp.array([[2.0, 0.0, -1.0]])
  grad = jax.grad(lambda a: jnp.sum(losses.absolute_distance(a, 0 * a)))(a)
  np.testing.assert_allclose(grad, [[1 / 3, 0, -1 / 3]], rtol=1e-6)


def test_distances_default_to_the_mean():
  a = 2 * jnp.ones((1, 2, 2))
  assert losses.squared_distance(a, 0 * a).tolist() == [4.0]
  assert losses.absolute_distance(a, 0 * a).tolist() == [2.0]


def test_pseudo_huber_by_hand(x64, strict):
  a, b = arrays()
  squares = ((np.asarray(a) - np.asarray(b)) ** 2).sum(1)
  for c in (0.0, 0.03, 2.0):
    np.testing.assert_allclose(
        losses.pseudo_huber(a, b, c=c), np.sqrt(squares + c**2) - c, rtol=1e-9
    )
  c = 0.00054 * np.sqrt(D)
  np.testing.assert_allclose(
      losses.pseudo_huber(a, b), np.sqrt(squares + c**2) - c, rtol=1e-9
  )
  # 32 x 32 x 3: the paper's 0.03.
  big, zero = jnp.ones((1, 32, 32, 3)), jnp.zeros((1, 32, 32, 3))
  np.testing.assert_allclose(
      losses.pseudo_huber(big, zero),
      np.sqrt(3072 + 0.02993**2) - 0.02993,
      rtol=1e-6,
  )


@pytest.mark.parametrize("c", [0.0, 0.1])
def test_pseudo_huber_gradient_is_finite_at_zero(x64, c):
  (a,) = arrays(n=1)
  b = a.at[1:].add(1.0)  # row 0 is equal
  grad = jax.grad(lambda a: losses.pseudo_huber(a, b, c=c).sum())(a)
  norm = np.sqrt(D + c**2)
  expected = np.where(np.arange(B) > 0, -1 / norm, 0)
  np.testing.assert_allclose(
      grad, np.broadcast_to(col(expected), (B, D)), rtol=1e-12
  )


def test_pseudo_huber_second_order(x64):
  a, b = arrays()
  check_grads(
      lambda s: losses.pseudo_huber(s * a, b, c=0.1), (0.7,), order=2,
      modes=("fwd", "rev"),
  )  # fmt: skip


def test_pseudo_huber_keeps_small_distances():
  """sqrt(s + c^2) - c would be exactly 0 in float32 here."""
  a = jnp.full((1, 1), 1e-5)
  out = float(losses.pseudo_huber(a, 0 * a, c=1.0)[0])
  np.testing.assert_allclose(out, 0.5e-10, rtol=1e-5)


@hypothesis.given(scale=st.floats(0.1, 10.0), seed=st.integers(0, 999))
def test_pseudo_huber_lies_between_its_limits(scale, seed):
  """Below the norm and below the parabola norm^2 / 2c; symmetric."""
  a, b = arrays(seed, jnp.float32)
  out = np.asarray(_HUBER(a * scale, b * scale))
  norm = np.linalg.norm((np.asarray(a) - np.asarray(b)) * scale, axis=1)
  assert (out <= norm * 1.00001).all()
  assert (out <= norm**2 * 1.00001).all()  # c = 0.5
  np.testing.assert_allclose(_HUBER(b * scale, a * scale), out, rtol=1e-5)


_HUBER = jax.jit(functools.partial(losses.pseudo_huber, c=0.5))


# Parametrisations.


def test_edm_scalings_by_hand(x64, strict):
  sigma = jnp.asarray(SIGMA)
  for d, low in ((0.5, 0.0), (0.8, 0.002)):
    c_skip, c_out, c_in = losses.edm_scalings(
        sigma, sigma_data=d, sigma_min=low
    )
    np.testing.assert_allclose(
        c_skip, d**2 / ((SIGMA - low) ** 2 + d**2), rtol=1e-12
    )
    np.testing.assert_allclose(
        c_out, (SIGMA - low) * d / np.sqrt(SIGMA**2 + d**2), rtol=1e-12
    )
    np.testing.assert_allclose(
        c_in, 1 / np.sqrt(SIGMA**2 + d**2), rtol=1e-12
    )
  for given, default in zip(
      losses.edm_scalings(sigma, sigma_data=0.5, sigma_min=0.0),
      losses.edm_scalings(sigma),
  ):
    np.testing.assert_array_equal(given, default)
  # The boundary f(x, sigma_min) = x.
  c_skip, c_out, _ = losses.edm_scalings(jnp.asarray([0.002]), sigma_min=0.002)
  assert float(c_skip[0]) == 1 and float(c_out[0]) == 0


def test_consistency_coefficients_by_hand(x64, strict):
  s = np.array([1.0, 0.1, 0.02, 0.0])
  d = 0.5
  call = functools.partial(losses.consistency_coefficients, jnp.asarray(s))
  a, b = call(kind="linear")
  np.testing.assert_array_equal(a, np.ones(4))
  np.testing.assert_array_equal(b, -s)
  a, b = call(kind="karras")
  c_skip, c_out = d**2 / (s**2 + d**2), s * d / np.sqrt(s**2 + d**2)
  np.testing.assert_allclose(a, c_skip + c_out, rtol=1e-12)
  np.testing.assert_allclose(b, -s * c_out, rtol=1e-12)
  # The card's table of |b_linear / b_karras|.
  np.testing.assert_allclose(
      s[:3] / -np.asarray(b)[:3], [2.24, 10.2, 50.0], rtol=2e-3
  )
  for scale in (10.0, 3.0):
    a, b = call(kind="lcm", time_scale=scale)
    u = scale * s
    c_skip, c_out = d**2 / (u**2 + d**2), u / np.sqrt(u**2 + d**2)
    np.testing.assert_allclose(a, c_skip + c_out, rtol=1e-12)
    np.testing.assert_allclose(b, -s * c_out, rtol=1e-12)
  a, b = call(kind="karras", sigma_data=0.9)
  np.testing.assert_allclose(
      b, -(s**2) * 0.9 / np.sqrt(s**2 + 0.81), rtol=1e-12
  )
  a, b = call(kind="lcm", sigma_data=0.9)
  np.testing.assert_allclose(
      a - 0.81 / ((10 * s) ** 2 + 0.81),
      10 * s / np.sqrt((10 * s) ** 2 + 0.81),
      rtol=1e-12,
  )
  for given, default in zip(call(kind="linear"), call()):
    np.testing.assert_array_equal(given, default)


KINDS = ("linear", "karras", "lcm")


@pytest.mark.parametrize("kind", KINDS)
def test_boundary_of_the_coefficients(x64, kind):
  a, b = losses.consistency_coefficients(jnp.zeros(1), kind=kind)
  assert float(a[0]) == 1 and float(b[0]) == 0


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.given(seed=st.integers(0, 2**16), decade=st.floats(-3.0, -2.0))
def test_gradient_scaling_of_the_coefficients(kind, seed, decade):
  """Flash-WAM: df/dv = b(sigma), of order sigma ("linear") or sigma^2.

  The parameter gradient of a loss at a fixed residual is measured by autodiff
  at two levels a factor of 1.1 apart: its log-log slope is the order.
  """
  with jax.enable_x64(True):
    rng = np.random.default_rng(seed)
    x, v, g = (jnp.asarray(rng.normal(size=D)) for _ in range(3))

    def scale(sigma):
      a, b = losses.consistency_coefficients(sigma, kind=kind)
      assert a.shape == sigma.shape
      f = lambda v: jnp.vdot(g, a * x + b * v)
      return jnp.linalg.norm(jax.grad(f)(v)) / jnp.linalg.norm(g)

    low, high = jnp.asarray(10.0**decade), jnp.asarray(1.1 * 10.0**decade)
    order = jnp.log(scale(high) / scale(low)) / np.log(1.1)
    _, b = losses.consistency_coefficients(low, kind=kind)
    np.testing.assert_allclose(scale(low), -b, rtol=1e-6)
    if kind != "lcm":
      assert abs(float(order) - (1 if kind == "linear" else 2)) < 0.02
    else:
      # In between where 10 sigma is still below sigma_data.
      assert 1 < float(order) < 2.01
    # The proposition: no differentiable b beats |b| = O(sigma).
    assert float(scale(low)) <= float(low) * 1.000001


def test_weights_by_hand(x64, strict):
  sigma, low = jnp.asarray(SIGMA), jnp.asarray(LOWER)
  expected = {
      "uniform": np.ones(B),
      "snr": 1 / SIGMA**2,
      "snrp1": 1 / SIGMA**2 + 1,
      "truncated_snr": np.maximum(1 / SIGMA**2, 1),
      "inverse_gap": 1 / (SIGMA - LOWER),
  }
  for kind, value in expected.items():
    np.testing.assert_allclose(
        losses.consistency_weight(sigma, low, kind=kind), value, rtol=1e-12
    )
  np.testing.assert_array_equal(losses.consistency_weight(sigma), np.ones(B))


# Discrete pairs.


def gaussian_denoiser(x, sigma, d=0.5):
  """Exact for data N(0, d^2): the flow is x sqrt((s'^2 + d^2)/(s^2 + d^2))."""
  sigma = sigma[:, None]
  return x * d**2 / (sigma**2 + d**2)


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_distillation_target_by_hand(x64, strict, solver):
  (x,) = arrays(n=1)
  sigma, low = jnp.asarray(SIGMA), jnp.asarray(LOWER)
  target = losses.consistency_distillation_target(
      gaussian_denoiser, x, sigma, low, solver=solver
  )
  slope = lambda x, s: x * col(s) / (col(s) ** 2 + 0.25)
  x_np = np.asarray(x)
  first = slope(x_np, SIGMA)
  out = x_np + col(LOWER - SIGMA) * first
  if solver == "heun":
    out = x_np + col(LOWER - SIGMA) / 2 * (first + slope(out, LOWER))
    default = losses.consistency_distillation_target(
        gaussian_denoiser, x, sigma, low
    )
    np.testing.assert_array_equal(default, target)
  np.testing.assert_allclose(target, out, rtol=1e-12)
  grads = jax.grad(
      lambda d, x: losses.consistency_distillation_target(
          functools.partial(gaussian_denoiser, d=d), x, sigma, low,
          solver=solver,
      ).sum(),
      argnums=(0, 1),
  )(0.5, x)  # fmt: skip
  assert grads[0] == 0 and not np.any(grads[1])


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_training_target_shares_its_noise(x64, solver):
  """With D = x0 either solver gives x0 + sigma_next noise exactly."""
  x0, z = arrays()
  target = losses.consistency_distillation_target(
      lambda x, sigma: x0, x0 + col(SIGMA) * z, jnp.asarray(SIGMA),
      jnp.asarray(LOWER), solver=solver,
  )  # fmt: skip
  np.testing.assert_allclose(target, x0 + col(LOWER) * z, rtol=1e-10)


def test_heun_is_second_order(x64):
  """Against the exact flow of a Gaussian: error falls eightfold a halving."""
  (x,) = arrays(n=1)
  sigma = jnp.asarray(SIGMA)
  errors = []
  for gap in (0.02, 0.01):
    low = sigma - gap
    exact = x * jnp.sqrt((low**2 + 0.25) / (sigma**2 + 0.25))[:, None]
    target = losses.consistency_distillation_target(
        gaussian_denoiser, x, sigma, low
    )
    errors.append(np.abs(np.asarray(target - exact)).max())
  assert 7 < errors[0] / errors[1] < 9


def exact_consistency(x, sigma, d=0.5):
  """The clean end of the Gaussian's flow: x d / sqrt(sigma^2 + d^2)."""
  return x * d / jnp.sqrt(sigma[:, None] ** 2 + d**2)


def student(x, sigma, w=0.9):
  return jnp.sin(w * x) / (1 + sigma[:, None].astype(x.dtype))


def test_consistency_loss_vanishes_on_the_exact_function(x64, strict):
  (x,) = arrays(n=1)
  sigma, low = jnp.asarray(SIGMA), jnp.asarray(LOWER)
  x_s = x * jnp.sqrt((low**2 + 0.25) / (sigma**2 + 0.25))[:, None]
  loss = losses.consistency_loss(
      exact_consistency, exact_consistency, x, sigma, x_s, low
  )
  np.testing.assert_allclose(loss, np.zeros(B), atol=1e-20)


def test_consistency_loss_by_hand(x64, strict):
  x, y = arrays()
  t, s = jnp.asarray(SIGMA), jnp.asarray(LOWER)
  weight = jnp.asarray([1.0, 2.0, 0.5])
  target = functools.partial(student, w=0.4)
  f = np.sin(0.9 * np.asarray(x)) / (1 + col(SIGMA))
  g = np.sin(0.4 * np.asarray(y)) / (1 + col(LOWER))
  call = functools.partial(
      losses.consistency_loss, student, target, x, t, y, s
  )
  c = 0.00054 * np.sqrt(D)
  np.testing.assert_allclose(
      call(), np.sqrt(((f - g) ** 2).sum(1) + c**2) - c, rtol=1e-10
  )
  np.testing.assert_allclose(
      call(metric=losses.squared_distance, weight=weight),
      np.asarray(weight) * ((f - g) ** 2).mean(1),
      rtol=1e-12,
  )


@pytest.mark.parametrize("stop", [True, False])
def test_consistency_loss_gradient(x64, stop):
  x, y = arrays()
  t, s = jnp.asarray(SIGMA), jnp.asarray(LOWER)
  kwargs = {} if stop else {"stop_target": False}

  def total(w, w_target, x_s, weight):
    return losses.consistency_loss(
        functools.partial(student, w=w),
        functools.partial(student, w=w_target),
        x, t, x_s, s, metric=losses.squared_distance, weight=weight, **kwargs,
    ).sum()  # fmt: skip

  grads = jax.grad(total, argnums=(0, 1, 2, 3))(0.9, 0.4, y, jnp.ones(B))
  x, y = both(x, y)
  f, g = np.sin(0.9 * x) / (1 + col(SIGMA)), np.sin(0.4 * y) / (1 + col(LOWER))
  df, dg = x * np.cos(0.9 * x) / (1 + col(SIGMA)), y * np.cos(0.4 * y) / (
      1 + col(LOWER)
  )
  np.testing.assert_allclose(grads[0], (2 * (f - g) * df).sum() / D, rtol=1e-10)
  assert not np.any(grads[3])
  if stop:
    assert grads[1] == 0 and not np.any(grads[2])
  else:
    np.testing.assert_allclose(
        grads[1], -(2 * (f - g) * dg).sum() / D, rtol=1e-10
    )


# Continuous time in sigma.


def test_continuous_loss_by_hand(x64, strict):
  x, slope = arrays()
  sigma = jnp.asarray(SIGMA)
  x_np, slope_np = both(x, slope)
  scale = 1 / (1 + col(SIGMA))
  change = 0.9 * np.cos(0.9 * x_np) * scale * slope_np - np.sin(
      0.9 * x_np
  ) * scale**2
  f = np.sin(0.9 * x_np) * scale
  call = functools.partial(
      losses.continuous_consistency_loss, student, x, slope, sigma
  )
  for elements, count in (("mean", D), ("sum", 1)):
    np.testing.assert_allclose(
        call(elements=elements), (change * f).sum(1) / count, rtol=1e-10
    )
    np.testing.assert_allclose(
        call(kind="l1", elements=elements),
        np.abs(change).sum(1) / count,
        rtol=1e-10,
    )
    np.testing.assert_allclose(
        call(kind="l2", elements=elements),
        np.sqrt((change**2).sum(1) / count),
        rtol=1e-10,
    )
  np.testing.assert_array_equal(call(), call(elements="mean"))

  def total(w, slope, kind):
    return losses.continuous_consistency_loss(
        functools.partial(student, w=w), x, slope, sigma, kind=kind
    ).sum()

  grads = jax.grad(total, argnums=(0, 1))(0.9, slope, "stop_gradient")
  df = x_np * np.cos(0.9 * x_np) * scale
  np.testing.assert_allclose(grads[0], (change * df).sum() / D, rtol=1e-10)
  assert not np.any(grads[1])
  # "l1" differentiates through the JVP.
  d_change = (np.cos(0.9 * x_np) - 0.9 * x_np * np.sin(0.9 * x_np)) * (
      scale * slope_np
  ) - x_np * np.cos(0.9 * x_np) * scale**2
  grads = jax.grad(total, argnums=(0, 1))(0.9, slope, "l1")
  np.testing.assert_allclose(
      grads[0], (np.sign(change) * d_change).sum() / D, rtol=1e-10
  )
  assert not np.any(grads[1])


def test_continuous_loss_on_the_exact_function(x64):
  """Zero, with a finite gradient, on the Gaussian's consistency function."""
  (x,) = arrays(n=1)
  sigma = jnp.asarray(SIGMA)
  slope = x * (sigma / (sigma**2 + 0.25))[:, None]
  for kind in ("l1", "l2"):
    loss = losses.continuous_consistency_loss(
        exact_consistency, x, slope, sigma, kind=kind
    )
    np.testing.assert_allclose(loss, np.zeros(B), atol=1e-12)
  for kind in ("l1", "l2"):
    still = lambda a, kind=kind: losses.continuous_consistency_loss(
        lambda x, sigma: (a - 1) * sigma[:, None] + 0 * x, x, slope, sigma,
        kind=kind,
    ).sum()
    value, grad = jax.value_and_grad(still)(1.0)
    assert value == 0 and grad == 0


# TrigFlow.


W = 0.8


def trig_net(x, angle, w=W):
  return jnp.sin(w * x) * jnp.cos(angle.astype(x.dtype))[:, None] ** 2


def trig_numpy(x, angle, w=W):
  return np.sin(w * x) * np.cos(col(angle)) ** 2


def trig_slope(x, dx, angle, d):
  """dF/d(angle) of trig_net(x / d, angle) along dx."""
  x, a = np.asarray(x) / d, col(angle)
  return W * np.cos(W * x) * np.cos(a) ** 2 * np.asarray(dx) / d - 2 * np.sin(
      W * x
  ) * np.cos(a) * np.sin(a)


def tangent_numpy(x, dx, r, d):
  """sCM's g, from the card."""
  cos, sin = np.cos(col(ANGLE)), np.sin(col(ANGLE))
  x, dx = both(x, dx)
  f = trig_numpy(x / d, ANGLE)
  j = cos * sin * trig_slope(x, dx, ANGLE, d)
  return f, -(cos**2) * (d * f - dx) - r * (cos * sin * x + d * j)


@pytest.mark.parametrize("d", [0.5, 1.3])
def test_trigflow_tangent_by_hand(x64, strict, d):
  x, dx = arrays()
  angle = jnp.asarray(ANGLE)
  for r in (0.0, 0.3, 1.0):
    f, g = losses.trigflow_tangent(
        trig_net, x, dx, angle, warmup=r, sigma_data=d
    )
    expected = tangent_numpy(x, dx, r, d)
    np.testing.assert_allclose(f, expected[0], rtol=1e-10)
    np.testing.assert_allclose(g, expected[1], rtol=1e-10)
  f, j = losses.trigflow_derivative(trig_net, x, dx, angle, sigma_data=d)
  cos_sin = np.cos(col(ANGLE)) * np.sin(col(ANGLE))
  np.testing.assert_allclose(f, trig_numpy(np.asarray(x) / d, ANGLE))
  np.testing.assert_allclose(
      j, cos_sin * trig_slope(x, dx, ANGLE, d), rtol=1e-10
  )


def test_trigflow_defaults(x64):
  x, dx = arrays()
  angle = jnp.asarray(ANGLE)
  _, g = losses.trigflow_tangent(trig_net, x, dx, angle)
  np.testing.assert_allclose(g, tangent_numpy(x, dx, 1.0, 0.5)[1], rtol=1e-10)
  _, j = losses.trigflow_derivative(trig_net, x, dx, angle)
  np.testing.assert_allclose(
      j,
      np.cos(col(ANGLE)) * np.sin(col(ANGLE)) * trig_slope(x, dx, ANGLE, 0.5),
      rtol=1e-10,
  )


def test_trigflow_tangent_is_the_derivative_of_f(x64):
  """At r = 1, g = cos d/d(angle) of cos x_t - sin sigma_data F."""
  x, dx = arrays()
  angle = jnp.asarray(ANGLE)
  d = 0.5

  def f(x, angle):
    wide = angle[:, None]
    return jnp.cos(wide) * x - jnp.sin(wide) * d * trig_net(x / d, angle)

  slope = jax.jvp(f, (x, angle), (dx, jnp.ones(B)))[1]
  _, g = losses.trigflow_tangent(trig_net, x, dx, angle, sigma_data=d)
  np.testing.assert_allclose(g, np.cos(col(ANGLE)) * slope, rtol=1e-10)


def test_tangents_vanish_on_the_exact_map(x64):
  """Data N(0, d^2) on TrigFlow: x_t stays where it is, so f = x_t."""
  (x,) = arrays(n=1)
  angle = jnp.asarray(ANGLE)
  # f = cos x - sin d F = x needs d F = -tan(angle / 2) x.
  exact = lambda x, angle: -jnp.tan(angle / 2)[:, None] * x
  for d in (0.5, 1.0):
    _, g = losses.trigflow_tangent(exact, x, 0 * x, angle, sigma_data=d)
    np.testing.assert_allclose(g, np.zeros((B, D)), atol=1e-14)
  _, g = losses.rcm_tangent(exact, x, 0 * x, angle)
  np.testing.assert_allclose(g, np.zeros((B, D)), atol=1e-14)


def test_tangent_is_the_eulerian_residual(x64):
  """One core: sCM on a straight-path network is the flow map's identity.

  With tau = sin / (sin + cos) and x_rf = x / (sin + cos) the consistency
  function is x_rf - tau v, so df/d(angle) = dtau/d(angle) d/dtau of it, and the
  Eulerian residual u - target at r = 0 is minus that last derivative.
  """
  x, dx = arrays()
  angle = jnp.asarray(ANGLE)
  velocity = lambda x, t: jnp.sin(x) * (1 + t[:, None])
  _, g = losses.trigflow_tangent(
      losses.make_trigflow_network(velocity), x, dx, angle, sigma_data=1.0
  )
  s, c = np.sin(ANGLE), np.cos(ANGLE)
  tau = s / (s + c)
  rate = 1 / (s + c) ** 2  # dtau / d(angle)
  # d/d(angle) of x / (sin + cos), as a velocity in tau.
  v = (np.asarray(dx) - np.asarray(x) * col((c - s) / (s + c))) / col(
      (s + c) * rate
  )
  u, target = losses.eulerian_target(
      lambda x, t, r: velocity(x, t),
      x / col(s + c), jnp.asarray(v), jnp.asarray(tau), jnp.zeros(B),
  )  # fmt: skip
  np.testing.assert_allclose(
      g, -col(c * rate) * np.asarray(u - target), rtol=1e-8
  )


def test_difference_quotients_of_trigflow(x64, strict):
  x, dx = arrays()
  angle = jnp.asarray(ANGLE)
  d, h = 0.7, 0.02
  x_np, dx_np = both(x, dx)
  cos_sin = np.cos(col(ANGLE)) * np.sin(col(ANGLE))
  call = functools.partial(
      losses.trigflow_derivative, trig_net, x, dx, angle, sigma_data=d
  )

  def at(turn, moved=True):
    turn = np.broadcast_to(turn, ANGLE.shape)
    y = np.cos(col(turn)) * x_np + np.sin(col(turn)) * dx_np
    return trig_numpy((y if moved else x_np) / d, ANGLE + turn)

  f, j = call(derivative="central", step=h)
  turn = h * ANGLE
  np.testing.assert_allclose(f, at(0.0), rtol=1e-12)
  np.testing.assert_allclose(
      j, cos_sin * (at(turn) - at(-turn)) / (2 * col(turn)), rtol=1e-9
  )
  _, j = call(derivative="backward", step=h)
  np.testing.assert_allclose(
      j, cos_sin * (np.cos(h) * at(0.0) - at(-h)) / np.sin(h), rtol=1e-9
  )
  _, j = call(derivative="semi", step=h)
  moved = W * np.cos(W * x_np / d) * np.cos(col(ANGLE)) ** 2 * dx_np / d
  np.testing.assert_allclose(
      j,
      cos_sin
      * (moved + (np.cos(h) * at(0.0) - at(-h, moved=False)) / np.sin(h)),
      rtol=1e-9,
  )
  # Steps by default: 1e-3 of the angle, 1e-4.
  for kind, step in (("central", 1e-3), ("backward", 1e-4), ("semi", 1e-4)):
    np.testing.assert_array_equal(
        call(derivative=kind)[1], call(derivative=kind, step=step)[1]
    )


def test_central_quotient_at_the_ends(x64):
  """A turn of at least 1e-6 at angle 0; inside pi/2 - 1e-5 at the other."""
  x, dx = arrays()
  seen = []

  def spy(x, angle):
    seen.append(np.asarray(angle))
    return x

  ends = jnp.asarray([0.0, np.pi / 2 - 1e-5, 1.0])
  losses.trigflow_derivative(spy, x, dx, ends, derivative="central")
  _, high, low = seen
  np.testing.assert_allclose(
      high, [1e-6, np.pi / 2 - 1e-5, 1.001], rtol=1e-12
  )
  np.testing.assert_allclose(
      low, [-1e-6, (np.pi / 2 - 1e-5) * 0.999, 0.999], rtol=1e-12
  )


@pytest.mark.parametrize(
    "derivative", ["exact", "central", "backward", "semi"]
)
def test_trigflow_gradients(x64, derivative):
  """Through F only: not through g, the path's slope or the teacher."""
  x, dx = arrays()
  angle = jnp.asarray(ANGLE)
  ones = jnp.ones((B, D))
  expected = (
      np.asarray(x) * np.cos(W * np.asarray(x)) * np.cos(col(ANGLE)) ** 2
  ).sum()
  for fn in (
      functools.partial(losses.trigflow_tangent, sigma_data=1.0),
      losses.rcm_tangent,
      functools.partial(losses.trigflow_derivative, sigma_data=1.0),
  ):
    _, pull = jax.vjp(
        lambda w, dx, fn=fn: fn(
            functools.partial(trig_net, w=w), x, dx, angle,
            derivative=derivative,
        ),
        W,
        dx,
    )  # fmt: skip
    grads = pull((ones, 0 * ones))
    np.testing.assert_allclose(grads[0], expected, rtol=1e-9)
    assert not np.any(grads[1])
    grads = pull((0 * ones, ones))
    assert grads[0] == 0 and not np.any(grads[1])


def test_rcm_tangent_by_hand(x64, strict):
  x, teacher = arrays()
  angle = jnp.asarray(ANGLE)
  x_np, teacher_np = both(x, teacher)
  cos, sin = np.cos(col(ANGLE)), np.sin(col(ANGLE))
  f_np = trig_numpy(x_np, ANGLE)
  j = cos * sin * trig_slope(x, teacher, ANGLE, 1.0)
  for r in (0.0, 0.4, 1.0):
    f, g = losses.rcm_tangent(trig_net, x, teacher, angle, warmup=r)
    expected = -cos * np.sqrt(1 - r**2 * sin**2) * (f_np - teacher_np) - (
        r * cos * sin * x_np + j
    )
    np.testing.assert_allclose(f, f_np, rtol=1e-10)
    np.testing.assert_allclose(g, expected, rtol=1e-10)
  # At r = 1, the default, it is sCM's.
  _, g = losses.rcm_tangent(trig_net, x, teacher, angle)
  _, scm = losses.trigflow_tangent(
      trig_net, x, teacher, angle, sigma_data=1.0
  )
  np.testing.assert_allclose(g, scm, rtol=1e-10)


def test_normalize_tangent(x64, strict):
  (g,) = arrays(n=1)
  g_np = np.asarray(g)
  length = np.sqrt((g_np**2).sum(1, keepdims=True))
  np.testing.assert_allclose(
      losses.normalize_tangent(g, c=0.3, norm="l2"),
      g_np / (length + 0.3),
      rtol=1e-12,
  )
  rms = g_np / (length / np.sqrt(D) + 0.1)
  np.testing.assert_allclose(losses.normalize_tangent(g), rms, rtol=1e-12)
  grad = jax.grad(lambda g: losses.normalize_tangent(g).sum())(g)
  assert not np.any(grad)


@hypothesis.given(seed=st.integers(0, 2**16), size=st.floats(-2.0, 4.0))
def test_normalized_tangents_are_bounded(seed, size):
  (g,) = arrays(seed, jnp.float32, n=1)
  out = np.asarray(_NORMALIZED(g * 10.0**size))
  assert (np.sqrt((out**2).mean(1)) <= 1.00001).all()
  # The direction is kept.
  cosine = (out * np.asarray(g)).sum(1) / (
      np.linalg.norm(out, axis=1) * np.linalg.norm(g, axis=1)
  )
  np.testing.assert_allclose(cosine, 1, rtol=1e-5)


_NORMALIZED = jax.jit(losses.normalize_tangent)


def test_scm_loss_by_hand(x64, strict):
  f, g = arrays()
  angle = jnp.asarray(ANGLE)
  logvar = jnp.asarray([0.3, -0.5, 1.0])
  f_np, g_np, u = both(f, g, logvar)
  w = np.array([2.0, 1.0, 0.5])
  prior = 1 / (0.7 * np.tan(ANGLE))
  mean = (g_np**2).mean(1)
  call = functools.partial(losses.scm_loss, sigma_data=0.7)
  np.testing.assert_allclose(call(f, g, angle), prior * mean, rtol=1e-10)
  np.testing.assert_allclose(
      call(f, g, angle, logvar=logvar, weight=jnp.asarray(w)),
      w / np.exp(u) * mean + u,
      rtol=1e-10,
  )
  np.testing.assert_allclose(
      call(f, g, angle, logvar=logvar, divide_again=True),
      prior / np.exp(u) * mean / D + u,
      rtol=1e-10,
  )
  np.testing.assert_allclose(
      losses.scm_loss(f, g, angle), mean / (0.5 * np.tan(ANGLE)), rtol=1e-10
  )
  grads = jax.grad(
      lambda f, g, u, w: losses.scm_loss(
          f, g, angle, logvar=u, weight=w
      ).sum(),
      argnums=(0, 1, 2, 3),
  )(f, g, logvar, jnp.asarray(w))
  factor = w / np.exp(u)
  np.testing.assert_allclose(
      grads[0], -2 * col(factor) * g_np / D, rtol=1e-10
  )
  assert not np.any(grads[1]) and not np.any(grads[3])
  np.testing.assert_allclose(grads[2], 1 - factor * mean, rtol=1e-10)


@pytest.mark.parametrize("elements", ["mean", "sum"])
def test_rcm_loss_by_hand(x64, strict, elements):
  f, g = arrays()
  count = D if elements == "mean" else 1
  call = functools.partial(losses.rcm_loss, elements=elements)
  value = (np.asarray(g) ** 2).sum(1) / count
  np.testing.assert_allclose(call(f, g, scale=100.0), 100 * value, rtol=1e-12)
  np.testing.assert_allclose(call(f, g), value, rtol=1e-12)
  grads = jax.grad(lambda f, g: call(f, g).sum(), argnums=(0, 1))(f, g)
  np.testing.assert_allclose(grads[0], -2 * np.asarray(g) / count, rtol=1e-12)
  assert not np.any(grads[1])
  if elements == "mean":
    np.testing.assert_array_equal(losses.rcm_loss(f, g), call(f, g))


def test_tangent_warmup():
  at = lambda step, **kw: float(losses.tangent_warmup(step, **kw))
  assert at(0, warmup_steps=100) == 0
  assert at(25, warmup_steps=100) == 0.25
  assert at(400, warmup_steps=100) == 1
  assert at(0, warmup_steps=0) == 1
  calm = {"warmup_steps": 100, "calm_start": 1000, "calm_steps": 200}
  assert at(1000, **calm, final=0.5) == 1
  assert at(1050, **calm, final=0.5) == 0.875
  assert at(5000, **calm, final=0.5) == 0.5
  assert at(5000, **calm) == 0.75
  assert at(900, **calm) == 1  # p is clipped below
  assert at(1500, warmup_steps=1, calm_start=1000) == 0.9375  # 2000 steps
  traced = jax.jit(lambda s: losses.tangent_warmup(s, warmup_steps=100))
  assert float(traced(50)) == 0.5


def test_trajectory_keep_probability(x64, strict):
  x0, black = arrays()
  distance = ((np.asarray(x0) - np.asarray(black)) ** 2).mean(1)
  keep = losses.trajectory_keep_probability(x0, black, threshold=3.0)
  np.testing.assert_allclose(keep, np.minimum(distance / 3, 1), rtol=1e-12)
  one = losses.trajectory_keep_probability(x0, black[0])
  distance = ((np.asarray(x0) - np.asarray(black)[0]) ** 2).mean(1)
  np.testing.assert_allclose(one, np.minimum(distance, 1), rtol=1e-12)
  grad = jax.grad(
      lambda x: losses.trajectory_keep_probability(x, black).sum()
  )(0.1 * x0)
  assert not np.any(grad)


def test_trigflow_coefficients_and_network(x64, strict):
  angle = jnp.asarray([0.0, 0.4, 1.2, np.pi / 2])
  c_skip, c_out, c_in, t = losses.trigflow_coefficients(angle)
  a = np.asarray(angle)
  total = np.sin(a) + np.cos(a)
  np.testing.assert_allclose(c_skip, 1 / total, rtol=1e-12)
  np.testing.assert_allclose(c_in, 1 / total, rtol=1e-12)
  np.testing.assert_allclose(c_out, -np.sin(a) / total, rtol=1e-12)
  np.testing.assert_allclose(t, np.sin(a) / total, rtol=1e-12)
  # Numbers are checked too: the end has room for a float32, and no more.
  with helpers.as_user():
    losses.trigflow_coefficients(np.float32(np.pi / 2))
  with helpers.one_line_error("angle must be in"):
    losses.trigflow_coefficients(np.float64(np.pi / 2 + 1.5e-6))
  # F from x0 by the definition, away from angle 0.
  (x,) = arrays(n=1)
  velocity = lambda x, t: jnp.cos(x) + t[:, None]
  network = losses.make_trigflow_network(velocity)
  a = jnp.asarray(ANGLE)
  total = np.sin(ANGLE) + np.cos(ANGLE)
  v = np.cos(np.asarray(x) / col(total)) + col(np.sin(ANGLE) / total)
  x0 = (np.asarray(x) - col(np.sin(ANGLE)) * v) / col(total)
  expected = (col(np.cos(ANGLE)) * np.asarray(x) - x0) / col(np.sin(ANGLE))
  np.testing.assert_allclose(network(x, a), expected, rtol=1e-9)
  with helpers.one_line_error(r"make_trigflow_network: angle must be \[b\]"):
    network(x, a[:2])
  with helpers.one_line_error(r"velocity_fn\(x, t\) must be"):
    losses.make_trigflow_network(lambda x, t: x[:, :1])(x, a)


# Multistep.


def cosine_path(t):
  return jnp.cos(np.pi / 2 * t), jnp.sin(np.pi / 2 * t)


TIMES = [np.array([0.9, 0.6, 0.5]), np.array([0.7, 0.5, 0.5])]
END = np.array([0.5, 0.5, 0.0])


def multistep(space, w=W, w_target=0.3, x_s=None, t=None, end=END, **kw):
  x, low = arrays()
  return losses.multistep_consistency_loss(
      functools.partial(student, w=w), functools.partial(student, w=w_target),
      x, jnp.asarray(TIMES[0]), low if x_s is None else x_s,
      jnp.asarray(TIMES[1]), jnp.asarray(end), coefficients=cosine_path,
      space=space, **kw,
  )  # fmt: skip


def test_multistep_by_hand(x64, strict):
  x, low = both(*arrays())
  path = lambda t: (np.cos(np.pi / 2 * col(t)), np.sin(np.pi / 2 * col(t)))
  alpha_e, sigma_e = path(END)

  def ddim(x, x0, t):
    alpha, sigma = path(t)
    return alpha_e * x0 + sigma_e / sigma * (x - alpha * x0)

  net = lambda x, t, w: np.sin(w * x) / (1 + col(t))
  prediction = net(x, TIMES[0], W)
  target = ddim(low, net(low, TIMES[1], 0.3), TIMES[1])
  np.testing.assert_allclose(target[1], low[1], rtol=1e-12)  # s = end
  here = ddim(x, prediction, TIMES[0])
  np.testing.assert_allclose(
      multistep("x"), ((here - target) ** 2).mean(1), rtol=1e-10
  )
  alpha, sigma = path(TIMES[0])
  star = (target - sigma_e / sigma * x) / (alpha_e - sigma_e / sigma * alpha)
  np.testing.assert_allclose(
      multistep("x0"), ((prediction - star) ** 2).mean(1), rtol=1e-10
  )
  np.testing.assert_allclose(
      multistep("x0", metric=losses.max_distance),
      np.abs(prediction - star).max(1),
      rtol=1e-10,
  )


def test_multistep_default_is_x0(x64):
  x, low = arrays()
  default = losses.multistep_consistency_loss(
      functools.partial(student, w=W), functools.partial(student, w=0.3), x,
      jnp.asarray(TIMES[0]), low, jnp.asarray(TIMES[1]), jnp.asarray(END),
      coefficients=cosine_path,
  )  # fmt: skip
  np.testing.assert_array_equal(default, multistep("x0"))


@pytest.mark.parametrize("space", ["x0", "x"])
def test_multistep_gradients(x64, space):
  _, low = arrays()
  grads = jax.grad(
      lambda w, w_target, x_s: multistep(space, w, w_target, x_s).sum(),
      argnums=(0, 1, 2),
  )(W, 0.3, low)
  assert grads[0] != 0 and grads[1] == 0 and not np.any(grads[2])


@pytest.mark.parametrize("space", ["x0", "x"])
def test_multistep_vanishes_on_one_segment_of_the_exact_flow(x64, space):
  """Point data at 0.4: every x0 estimate is 0.4, all paths agree."""
  _, z = arrays()
  t, s, end = (jnp.asarray(a) for a in (*TIMES, np.zeros(B)))
  at = lambda t: col(cosine_path(t)[0]) * 0.4 + col(cosine_path(t)[1]) * z
  loss = losses.multistep_consistency_loss(
      lambda x, t: jnp.full_like(x, 0.4), lambda x, t: jnp.full_like(x, 0.4),
      at(t), t, at(s), s, end, coefficients=cosine_path, space=space,
  )  # fmt: skip
  np.testing.assert_allclose(loss, np.zeros(B), atol=1e-25)


@pytest.mark.parametrize("space", ["x0", "x"])
def test_multistep_ends_at_clean_data(x64, space):
  """s = end = 0 has no noise at all: the target is x_s, no 0 / 0."""
  x, low = arrays()
  zero = jnp.zeros(B)
  net = lambda x, t: jnp.tanh(x)
  loss = losses.multistep_consistency_loss(
      net, net, x, jnp.asarray(TIMES[0]), low, zero, zero,
      coefficients=cosine_path, space=space,
  )  # fmt: skip
  # One step to 0 lands on the estimate itself.
  expected = ((np.tanh(np.asarray(x)) - np.asarray(low)) ** 2).mean(1)
  np.testing.assert_allclose(loss, expected, rtol=1e-10)


# All of them: precision, independence of rows, bad input.


def _times(x, values):
  dtype = jnp.promote_types(x.dtype, jnp.float32) if (
      x.dtype == jnp.float64
  ) else jnp.float32
  return jnp.asarray(values, dtype)


CASES = {
    "squared": lambda x, y, a, b: losses.squared_distance(x, y),
    "absolute": lambda x, y, a, b: losses.absolute_distance(x, y),
    "max": lambda x, y, a, b: losses.max_distance(x, y),
    "huber": lambda x, y, a, b: losses.pseudo_huber(x, y),
    "distillation": lambda x, y, a, b: losses.consistency_distillation_target(
        student, x, a, b
    ),
    "consistency": lambda x, y, a, b: losses.consistency_loss(
        student, student, x, a, y, b, weight=a
    ),
    "continuous": lambda x, y, a, b: losses.continuous_consistency_loss(
        student, x, y, a
    ),
    "continuous_l2": lambda x, y, a, b: losses.continuous_consistency_loss(
        student, x, y, a, kind="l2"
    ),
    "trigflow": lambda x, y, a, b: losses.trigflow_tangent(
        trig_net, x, y, a
    )[1],
    "rcm": lambda x, y, a, b: losses.rcm_tangent(trig_net, x, y, a)[1],
    "normalize": lambda x, y, a, b: losses.normalize_tangent(x),
    "scm_loss": lambda x, y, a, b: losses.scm_loss(x, y, a, logvar=b),
    "rcm_loss": lambda x, y, a, b: losses.rcm_loss(x, y),
    "keep": lambda x, y, a, b: losses.trajectory_keep_probability(x, y),
    "network": lambda x, y, a, b: losses.make_trigflow_network(student)(x, a),
    "multistep": lambda x, y, a, b: losses.multistep_consistency_loss(
        student, student, x, a, y, b, 0 * b,
        coefficients=lambda t: (1 / (1 + t), t / (1 + t)),
    ),
}  # fmt: skip
_JITTED = {name: jax.jit(fn) for name, fn in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_precision(name, strict):
  """bf16 in, float32 out; float64 stays float64."""
  x, y = arrays(dtype=jnp.bfloat16)
  a = jnp.asarray([1.3, 0.6, 0.3], jnp.float32)
  b = jnp.asarray([0.9, 0.5, 0.2], jnp.float32)
  out = CASES[name](x, y, a, b)
  assert out.dtype == jnp.float32
  exact = CASES[name](x.astype(jnp.float32), y.astype(jnp.float32), a, b)
  np.testing.assert_allclose(
      out, exact, atol=0.05 * float(jnp.abs(exact).max())
  )
  with jax.enable_x64(True):
    wide = [jnp.asarray(z, jnp.float64) for z in (x, y, a, b)]
    assert CASES[name](*wide).dtype == jnp.float64


@pytest.mark.parametrize("name", CASES)
@hypothesis.settings(max_examples=10)
@hypothesis.given(seed=st.integers(0, 2**16))
def test_rows_are_independent(name, seed):
  rng = np.random.default_rng(seed)
  x, y = (jnp.asarray(rng.normal(size=(B, D)), jnp.float32) for _ in range(2))
  a = np.sort(rng.uniform(0.2, 1.5, size=(2, B)).astype(np.float32), axis=0)
  low, high = jnp.asarray(a[0]), jnp.asarray(a[1] + 0.05)
  order = rng.permutation(B)
  out = np.asarray(_JITTED[name](x, y, high, low))
  np.testing.assert_allclose(
      _JITTED[name](x[order], y[order], high[order], low[order]),
      out[order],
      rtol=2e-5,
  )
  assert out.shape[0] == B and np.isfinite(out).all()


def test_bad_input():
  x, y = arrays(dtype=jnp.float32)
  t, s = jnp.asarray(SIGMA, jnp.float32), jnp.asarray(LOWER, jnp.float32)
  a = jnp.asarray(ANGLE, jnp.float32)
  short = t[:2]
  error = helpers.one_line_error
  with error(r"squared_distance: b must be \[3, 4\] like a, got \[3, 2\]"):
    losses.squared_distance(x, y[:, :2])
  with error("squared_distance: elements must be one of"):
    losses.squared_distance(x, y, elements="max")
  with error("absolute_distance: elements must be one of"):
    losses.absolute_distance(x, y, elements="max")
  with error("a must be a non-empty array"):
    losses.max_distance(x[:0], y[:0])
  with error("a must be a floating array", TypeError):
    losses.pseudo_huber(x.astype(int), y)
  with error(r"pseudo_huber: c must be in \[0, inf"):
    losses.pseudo_huber(x, y, c=-1.0)
  with error(r"edm_scalings: sigma_data must be in \(0"):
    losses.edm_scalings(t, sigma_data=0.0)
  with error(r"edm_scalings: sigma_min must be in \[0"):
    losses.edm_scalings(t, sigma_min=-0.1)
  with error("consistency_coefficients: kind must be one of"):
    losses.consistency_coefficients(t, kind="karas")
  with error(r"consistency_coefficients: sigma_data must be in \(0"):
    losses.consistency_coefficients(t, sigma_data=0.0)
  with error(r"time_scale must be in \(0"):
    losses.consistency_coefficients(t, time_scale=0.0)
  with error("consistency_weight: kind must be one of"):
    losses.consistency_weight(t, kind="snr1")
  with error("sigma_next must be given for kind='inverse_gap'"):
    losses.consistency_weight(t, kind="inverse_gap")
  with error(r"sigma_next must be \[3\] like sigma"):
    losses.consistency_weight(t, short, kind="inverse_gap")
  target = losses.consistency_distillation_target
  with error("solver must be one of"):
    target(student, x, t, s, solver="rk4")
  with error(r"sigma_next must be \[b\]"):
    target(student, x, t, short)
  with error(r"denoise_fn\(x, sigma\) must be"):
    target(lambda x, t: x[:, :1], x, t, s)
  loss = losses.consistency_loss
  with error(r"consistency_loss: x_s must be \[3, 4\] like x_t"):
    loss(student, student, x, t, y[:2], s)
  with error(r"consistency_loss: s must be \[b\]"):
    loss(student, student, x, t, y, short)
  with error(r"weight must be \[b\]"):
    loss(student, student, x, t, y, s, weight=short)
  with error(r"metric\(a, b\) must be \[b\]"):
    loss(student, student, x, t, y, s, metric=lambda a, b: a)
  with error(r"target_fn\(x, s\) must be"):
    loss(student, lambda x, s: x[:, :1], x, t, y, s)
  with error(r"denoise_fn\(x, t\) must be"):
    loss(lambda x, s: x[:, :1], student, x, t, y, s)
  loss = losses.continuous_consistency_loss
  with error(r"slope must be \[3, 4\] like x_t"):
    loss(student, x, y[:2], t)
  with error(r"sigma must be \[b\]"):
    loss(student, x, y, short)
  with error("kind must be one of"):
    loss(student, x, y, t, kind="l3")
  with error("elements must be one of"):
    loss(student, x, y, t, elements="max")
  for fn in (losses.trigflow_tangent, losses.trigflow_derivative):
    with error(r"slope must be \[3, 4\] like x_t"):
      fn(trig_net, x, y[:2], a)
    with error(r"angle must be \[b\]"):
      fn(trig_net, x, y, a[:2])
    with error("derivative must be one of"):
      fn(trig_net, x, y, a, derivative="forward")
    with error(r"step must be in \(0"):
      fn(trig_net, x, y, a, step=0.0)
    with error(r"sigma_data must be in \(0"):
      fn(trig_net, x, y, a, sigma_data=0.0)
  with error(r"warmup must be in \[0, 1\]"):
    losses.trigflow_tangent(trig_net, x, y, a, warmup=1.5)
  with error(r"rcm_tangent: warmup must be in \[0, 1\]"):
    losses.rcm_tangent(trig_net, x, y, a, warmup=-0.5)
  with error(r"rcm_tangent: teacher must be \[3, 4\]"):
    losses.rcm_tangent(trig_net, x, y[:2], a)
  with error(r"rcm_tangent: step must be in \(0"):
    losses.rcm_tangent(trig_net, x, y, a, step=0.0)
  with error(r"network_fn\(x, angle\) must be"):
    losses.rcm_tangent(lambda x, a: x[:, :1], x, y, a)
  with error(r"normalize_tangent: c must be in \(0"):
    losses.normalize_tangent(x, c=0.0)
  with error("norm must be one of"):
    losses.normalize_tangent(x, norm="l1")
  with error("tangent must be a non-empty array"):
    losses.normalize_tangent(x[:0])
  with error(r"scm_loss: tangent must be \[3, 4\]"):
    losses.scm_loss(x, y[:2], a)
  with error(r"scm_loss: logvar must be \[b\]"):
    losses.scm_loss(x, y, a, logvar=x)
  with error(r"scm_loss: weight must be \[b\]"):
    losses.scm_loss(x, y, a, weight=short)
  with error(r"scm_loss: angle must be \[b\]"):
    losses.scm_loss(x, y, short)
  with error(r"scm_loss: sigma_data must be in \(0"):
    losses.scm_loss(x, y, a, sigma_data=0.0)
  with error(r"rcm_loss: tangent must be \[3, 4\]"):
    losses.rcm_loss(x, y[:2])
  with error("rcm_loss: elements must be one of"):
    losses.rcm_loss(x, y, elements="max")
  with error(r"warmup_steps must be in \[0"):
    losses.tangent_warmup(1, warmup_steps=-1)
  with error(r"calm_start must be in \[0"):
    losses.tangent_warmup(1, warmup_steps=1, calm_start=-1)
  with error(r"calm_steps must be in \[1"):
    losses.tangent_warmup(1, warmup_steps=1, calm_steps=0)
  with error(r"final must be in \[0, 1\]"):
    losses.tangent_warmup(1, warmup_steps=1, final=2.0)
  with error(r"reference must be \[\*s\]=\[4\] like x0"):
    losses.trajectory_keep_probability(x, t)
  with error(r"threshold must be in \(0"):
    losses.trajectory_keep_probability(x, y, threshold=0.0)
  loss = functools.partial(
      losses.multistep_consistency_loss, coefficients=cosine_path
  )
  with error("space must be one of"):
    loss(student, student, x, t, y, s, s, space="z")
  with error(r"end must be \[b\]"):
    loss(student, student, x, t, y, s, short)
  with error(r"x_s must be \[3, 4\]"):
    loss(student, student, x, t, y[:2], s, s)
  with error(r"denoise_fn\(x, t\) must be"):
    loss(lambda x, t: x[:, :1], student, x, t, y, s, s)
  with error(r"target_fn\(x, s\) must be"):
    loss(student, lambda x, t: x[:, :1], x, t, y, s, s)
  with error("angle must be a floating array", TypeError):
    losses.trigflow_coefficients(jnp.arange(3))
  whole = jnp.arange(1, 4)
  for fn in (losses.trigflow_tangent, losses.rcm_tangent):
    with error("angle must be a floating array, got int32"):
      fn(trig_net, x, y, whole)
  with error("scm_loss: angle must be a floating array"):
    losses.scm_loss(x, y, whole)
  with error("edm_scalings: sigma must be a floating array"):
    losses.edm_scalings(whole)
  with error("consistency_coefficients: sigma must be a floating array"):
    losses.consistency_coefficients(whole)
  with error("consistency_weight: sigma must be a floating array"):
    losses.consistency_weight(whole)
  with error("consistency_weight: sigma_next must be a floating array"):
    losses.consistency_weight(whole + 0.5, whole, kind="inverse_gap")
  with error("sigma must be a floating array"):
    target(student, x, whole, s)
  with error("sigma_next must be a floating array"):
    target(student, x, t, whole)
  with error("consistency_loss: t must be a floating array"):
    losses.consistency_loss(student, student, x, whole, y, s)
  with error("consistency_loss: weight must be a floating array"):
    losses.consistency_loss(student, student, x, t, y, s, weight=whole)
  with error("scm_loss: weight must be a floating array"):
    losses.scm_loss(x, y, a, weight=whole)
  with error("multistep_consistency_loss: end must be a floating array"):
    loss(student, student, x, t, y, s, whole)
  with error(r"warmup must be in \[0, 1\]"):
    losses.rcm_tangent(trig_net, x, y, a, warmup=1.5)


def test_bad_values_in_debug_mode():
  x, y = arrays(dtype=jnp.float32)
  t, s = jnp.asarray(SIGMA, jnp.float32), jnp.asarray(LOWER, jnp.float32)
  a = jnp.asarray(ANGLE, jnp.float32)
  nan = x.at[1, 1].set(jnp.nan)
  error = helpers.one_line_error
  multi = functools.partial(
      losses.multistep_consistency_loss, student, student,
      coefficients=cosine_path,
  )  # fmt: skip
  with distilljax.debug():
    with error("b must be finite"):
      losses.squared_distance(x, nan)
    with error(r"edm_scalings: sigma must be in \[0"):
      losses.edm_scalings(-t)
    with error(r"consistency_coefficients: sigma must be in \[0, 1\]"):
      losses.consistency_coefficients(t)
    with error(r"consistency_weight: sigma must be in \(0"):
      losses.consistency_weight(0 * t)
    with error("sigma_next must be < sigma"):
      losses.consistency_weight(t, t, kind="inverse_gap")
    with error("sigma_next must be <= sigma everywhere"):
      losses.consistency_distillation_target(student, x, s, t)
    with error(r"sigma_next must be in \[0"):
      losses.consistency_distillation_target(student, x, t, -s)
    with error("x_t must be finite"):
      losses.consistency_distillation_target(student, nan, t, s)
    with error("s must be <= t everywhere"):
      losses.consistency_loss(student, student, x, s, y, t)
    with error("x_s must be finite"):
      losses.consistency_loss(student, student, x, t, nan, s)
    with error(r"angle must be in \[0, 1.57"):
      losses.trigflow_tangent(trig_net, x, y, 2 * a)
    with error(r"angle must be in \[0, 1.57"):
      losses.scm_loss(x, y, -a)
    with error(r"angle must be in \[0, 1.57"):
      losses.trigflow_coefficients(2 * a)
    with error("teacher must be finite"):
      losses.rcm_tangent(trig_net, x, nan, a)
    with error("tangent must be finite"):
      losses.rcm_loss(x, nan)
    with error("s must be <= t everywhere"):
      multi(x, s, y, t, s)
    with error("end must be <= s everywhere"):
      multi(x, t, y, s, t)
    # A gap below 1 is a gap.
    losses.consistency_weight(t, t - 0.25, kind="inverse_gap")
    # A float32 pi / 2 is a little above pi / 2 and is welcome.
    losses.trigflow_coefficients(jnp.full(1, np.pi / 2, jnp.float32))


def _both(x, t):
  return x * t[:, None]


TIMED = {
    "distillation_target": lambda f, x, t, s: (
        losses.consistency_distillation_target(f, x, t, s)
    ),
    "consistency": lambda f, x, t, s: losses.consistency_loss(f, f, x, t, x, s),
    "continuous": lambda f, x, t, s: losses.continuous_consistency_loss(
        f, x, x, t
    ),
    "trigflow_derivative": lambda f, x, t, s: losses.trigflow_derivative(
        f, x, x, t
    )[1],
    "trigflow_tangent": lambda f, x, t, s: losses.trigflow_tangent(f, x, x, t)[
        1
    ],
    "rcm_tangent": lambda f, x, t, s: losses.rcm_tangent(f, x, x, t)[1],
    "trigflow_network": lambda f, x, t, s: losses.make_trigflow_network(f)(
        x, t
    ),
    "scm_loss": lambda f, x, t, s: losses.scm_loss(
        f(x, s.astype("float32")), x, t
    ),
    "multistep": lambda f, x, t, s: losses.multistep_consistency_loss(
        f, f, x, t, x, s, s / 2, coefficients=cosine_path
    ),
}


@pytest.mark.parametrize("name", TIMED)
def test_half_times_are_widened_before_the_network(name, strict):
  seen = set()

  def network(x, t):
    seen.add(t.dtype)
    return _both(x, t)

  x = arrays(dtype=jnp.float32)[0]
  t = jnp.asarray([0.75, 0.5, 1.0], jnp.bfloat16)
  s = jnp.asarray([0.25, 0.125, 0.5], jnp.bfloat16)
  out = TIMED[name](network, x, t, s)
  assert seen == {jnp.dtype("float32")}
  # These times are exact in bfloat16, and so must be what is made of them.
  wide = TIMED[name](_both, x, *(a.astype(jnp.float32) for a in (t, s)))
  np.testing.assert_allclose(out, wide, rtol=1e-6, atol=1e-6)


def test_half_levels_in_float32_out(strict):
  sigma = jnp.asarray([2.5, 0.703125, 0.30078125], jnp.bfloat16)
  lower = jnp.asarray([1.5, 0.6015625, 0.05004882], jnp.bfloat16)
  angle = jnp.asarray([1.3, 0.6, 0.1], jnp.bfloat16)
  calls = {
      "edm": lambda s, l, a: losses.edm_scalings(s),
      "coefficients": lambda s, l, a: losses.consistency_coefficients(
          l / 2, kind="lcm"
      ),
      "snr": lambda s, l, a: losses.consistency_weight(s, kind="snr"),
      "gap": lambda s, l, a: losses.consistency_weight(
          s, l, kind="inverse_gap"
      ),
      "uniform": lambda s, l, a: losses.consistency_weight(s),
      "trigflow": lambda s, l, a: losses.trigflow_coefficients(a),
  }
  for call in calls.values():
    half = jax.tree.leaves(call(sigma, lower, angle))
    wide = jax.tree.leaves(
        call(*(a.astype(jnp.float32) for a in (sigma, lower, angle)))
    )
    for ours, theirs in zip(half, wide):
      assert ours.dtype == jnp.float32
      np.testing.assert_array_equal(ours, theirs)
  mixed = losses.consistency_weight(
      sigma.astype(jnp.float32), lower, kind="inverse_gap"
  )
  np.testing.assert_array_equal(
      mixed, losses.consistency_weight(sigma, lower, kind="inverse_gap")
  )


def test_norms_are_flat_and_zero_at_zero(x64):
  a = jnp.ones((2, 3))
  for c in (0.0, 0.1):
    value, grad = jax.value_and_grad(
        lambda a, b, c=c: losses.pseudo_huber(a, b, c=c).sum()
    )(a, a)
    assert float(value) == 0 and not np.any(grad)
  # A network that does not change along the path: |df/dsigma| = 0.
  value, grad = jax.value_and_grad(
      lambda w: losses.continuous_consistency_loss(
          lambda x, sigma: w * x, a, 0 * a, jnp.ones(2), kind="l2"
      ).sum()
  )(jnp.float64(2.0))
  assert float(value) == 0 and float(grad) == 0


def test_no_warmup_is_one_at_every_step():
  for step in (0, 1, 5):
    assert float(losses.tangent_warmup(step, warmup_steps=0)) == 1


def test_multistep_times_have_a_gradient_at_clean_data(x64):
  x, y = arrays()
  zero = jnp.zeros(B)
  grad = jax.grad(
      lambda t: losses.multistep_consistency_loss(
          _both, _both, x, t, y, zero, zero, space="x",
          coefficients=lambda t: (1 - t, t),
      ).sum()
  )(zero)  # fmt: skip
  assert np.isfinite(grad).all()


def test_calming_may_begin_before_the_warm_up_ends():
  """Half warm (r = .5), half calmed (p = .5): .5 .5 + .75 .5."""
  value = losses.tangent_warmup(
    50, warmup_steps=100, calm_start=0, calm_steps=100
  )
  assert float(value) == pytest.approx(0.625)


def test_without_c_pseudo_huber_is_the_distance():
  a = jnp.array([[0.3, 0.4], [3.0, 4.0], [0.0, 0.0]])
  np.testing.assert_allclose(
    losses.pseudo_huber(a, jnp.zeros_like(a), c=0.0), [0.5, 5.0, 0.0], rtol=1e-6
  )


def test_states_may_be_numbers_a_row_and_no_less():
  assert losses.squared_distance(jnp.ones(3), jnp.zeros(3)).tolist() == [1] * 3
  with helpers.as_user(), helpers.one_line_error("a must"):
    losses.squared_distance(jnp.ones(()), jnp.zeros(()))


def test_warmup_of_rcm_ends_at_one():
  x = jnp.ones((2, 1))
  call = lambda warmup: losses.rcm_tangent(
    lambda x, angle: x, x, x, jnp.full(2, 0.5), warmup=warmup
  )
  call(1.0)
  with helpers.one_line_error("warmup must be"):
    call(1.5)


def test_a_float32_quarter_turn_is_an_angle():
  """It is a little more than pi / 2."""
  x, angle = jnp.ones((2, 1)), jnp.full(2, np.pi / 2, jnp.float32)
  with distilljax.debug():
    f, _ = losses.rcm_tangent(lambda x, angle: x, x, x, angle)
  assert f.tolist() == [[1.0]] * 2
