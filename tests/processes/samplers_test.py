"""Samplers against NumPy loops and against problems they solve exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distilljax
from distilljax import processes
from tests.helpers import one_line_error

RF = processes.RectifiedFlow()
EDM = processes.EDM()
TRIG = processes.TrigFlow(0.5)
TIMES = np.array([0.95, 0.6, 0.35, 0.1])


def network(x, t):
  """A stand-in that depends on both inputs, in JAX or NumPy."""
  lib = jnp if isinstance(x, jax.Array) else np
  return lib.sin(x) * t.reshape((-1,) + (1,) * (x.ndim - 1)) + 0.3


def jump_network(x, t, r):
  return network(x, t) - 0.5 * r[:, None] * x


def data(x64=True):
  rng = np.random.default_rng(0)
  dtype = np.float64 if x64 else np.float32
  return rng.normal(size=(2, 3)).astype(dtype)


def noises(n):
  return np.random.default_rng(1).normal(size=(n, 2, 3))


def rows(t):
  return np.full(2, t)


def levels(path, t):
  return float(path.alpha(float(t))), float(path.sigma(float(t)))


def test_euler(x64):
  x = data()
  expected = x
  for t, r in zip(TIMES, TIMES[1:], strict=False):
    expected = expected - (t - r) * network(expected, rows(t))
  args = jnp.asarray(x), jnp.asarray(TIMES)
  for unroll in (1, 2, True):
    out = processes.euler(network, *args, unroll=unroll)
    np.testing.assert_allclose(out, expected, rtol=1e-12)
  # A time for each row.
  per_row = jnp.stack([jnp.asarray(TIMES), jnp.asarray(TIMES) / 2], axis=1)
  out = processes.euler(network, args[0], per_row)
  np.testing.assert_allclose(out[0], expected[0], rtol=1e-12)
  other = processes.euler(network, args[0][1:], jnp.asarray(TIMES) / 2)
  np.testing.assert_allclose(out[1:], other, rtol=1e-12)


def test_heun(x64):
  x = data()
  args = jnp.asarray(x), jnp.asarray(TIMES)
  for last in (False, True):
    expected = x
    for i, (t, r) in enumerate(zip(TIMES, TIMES[1:], strict=False)):
      v = network(expected, rows(t))
      moved = expected - (t - r) * v
      if last and i == len(TIMES) - 2:
        expected = moved
      else:
        v_end = network(moved, rows(r))
        expected = expected - (t - r) * (v + v_end) / 2
    out = processes.heun(network, *args, euler_last=last)
    np.testing.assert_allclose(out, expected, rtol=1e-12)
    out = processes.heun(network, *args, euler_last=last, unroll=True)
    np.testing.assert_allclose(out, expected, rtol=1e-12)
    if not last:
      np.testing.assert_allclose(
          processes.heun(network, *args), expected, rtol=1e-12
      )


def test_orders_of_convergence(x64):
  """dx/dt = x from t=1 to 0 has the answer x / e."""
  x = jnp.ones((1, 1))
  fn = lambda x, t: x

  def errors(sampler):
    return [
        abs(float(sampler(fn, x, processes.time_grid(n))[0, 0]) - np.exp(-1))
        for n in (16, 32)
    ]

  coarse, fine = errors(processes.euler)
  assert 1.9 < coarse / fine < 2.1
  coarse, fine = errors(processes.heun)
  assert 3.8 < coarse / fine < 4.2


def test_flow_map(x64):
  x = data()
  expected = x
  for t, r in zip(TIMES, TIMES[1:], strict=False):
    expected = expected - (t - r) * jump_network(expected, rows(t), rows(r))
  args = jnp.asarray(x), jnp.asarray(TIMES)
  for unroll in (1, True):
    out = processes.flow_map(jump_network, *args, unroll=unroll)
    np.testing.assert_allclose(out, expected, rtol=1e-12)


@pytest.mark.parametrize("path", [RF, EDM, TRIG], ids=["rf", "edm", "trig"])
def test_ancestral_is_the_gaussian_posterior(path, x64):
  """q(x_r | x_t, x0) written in Ho et al.'s form."""
  x, z = data(), noises(3)
  expected = x
  for i, (t, r) in enumerate(zip(TIMES, TIMES[1:], strict=False)):
    (alpha, sigma), (alpha_r, sigma_r) = levels(path, t), levels(path, r)
    ratio = alpha / alpha_r
    variance = sigma**2 - ratio**2 * sigma_r**2
    x0 = network(expected, rows(t))
    mean = (
        ratio * sigma_r**2 * expected + alpha_r * variance * x0
    ) / sigma**2
    expected = mean + np.sqrt(variance) * sigma_r / sigma * z[i]
  for unroll in (1, True):
    out = processes.ancestral(
        network, jnp.asarray(x), jnp.asarray(TIMES), jnp.asarray(z),
        path=path, unroll=unroll,
    )
    np.testing.assert_allclose(out, expected, rtol=1e-9)


def test_ddim_is_euler_in_sigma_and_a_rotation(x64):
  x = jnp.asarray(data())
  times = jnp.asarray(TIMES)
  out = processes.ancestral(network, x, times, path=EDM, eta=0.0)
  slope = lambda x, s: (x - network(x, EDM.t_from_sigma(s))) / s[:, None]
  np.testing.assert_allclose(
      out, processes.euler(slope, x, EDM.sigma(times)), rtol=1e-9
  )
  # TrigFlow: x <- cos(d) x - sin(d) dx/d angle.
  expected = np.asarray(x)
  angle = np.pi / 2 * TIMES
  for t, a, b in zip(TIMES, angle, angle[1:], strict=False):
    slope = (np.cos(a) * expected - network(expected, rows(t))) / np.sin(a)
    expected = np.cos(a - b) * expected - np.sin(a - b) * slope
  out = processes.ancestral(network, x, times, path=TRIG, eta=0)
  np.testing.assert_allclose(out, expected, rtol=1e-9)


def test_partial_eta(x64):
  x, z = data(), noises(1)
  t, r = TIMES[:2]
  (alpha, sigma), (alpha_r, sigma_r) = levels(RF, t), levels(RF, r)
  posterior = sigma_r / sigma * np.sqrt(
      sigma**2 - (alpha / alpha_r) ** 2 * sigma_r**2
  )
  x0 = network(x, rows(t))
  eps = (x - alpha * x0) / sigma
  fresh = 0.4 * posterior
  expected = alpha_r * x0 + np.sqrt(sigma_r**2 - fresh**2) * eps + fresh * z[0]
  out = processes.ancestral(
      network, jnp.asarray(x), jnp.asarray(TIMES[:2]), jnp.asarray(z), path=RF,
      eta=0.4,
  )
  np.testing.assert_allclose(out, expected, rtol=1e-9)


@pytest.mark.parametrize("path", [RF, EDM], ids=["rf", "edm"])
def test_dpm_solver(path, x64):
  """The authors' exponential form, with l = log(alpha / sigma)."""
  x = data()
  expected, before, h_before = x, None, None
  for t, r in zip(TIMES, TIMES[1:], strict=False):
    (alpha, sigma), (alpha_r, sigma_r) = levels(path, t), levels(path, r)
    h = np.log(alpha_r / sigma_r) - np.log(alpha / sigma)
    x0 = network(expected, rows(t))
    target = x0
    if before is not None:
      ratio = h_before / h
      target = (1 + 1 / (2 * ratio)) * x0 - 1 / (2 * ratio) * before
    expected = sigma_r / sigma * expected - alpha_r * np.expm1(-h) * target
    before, h_before = x0, h
  for unroll in (1, True):
    out = processes.dpm_solver(
        network, jnp.asarray(x), jnp.asarray(TIMES), path=path, unroll=unroll
    )
    np.testing.assert_allclose(out, expected, rtol=1e-9)


def test_dpm_solver_from_pure_noise_to_data(x64):
  """alpha = 0 and sigma = 0 at the ends: first order there, no NaN."""
  times = jnp.array([1.0, 0.7, 0.3, 0.0])
  x = jnp.asarray(data())
  out = processes.dpm_solver(network, x, times, path=RF)
  first = network(x, jnp.ones(2))
  at = lambda x, x0, t, r: r / t * x + ((1 - r) - (1 - t) * r / t) * x0
  y = at(x, first, 1.0, 0.7)
  second = network(y, jnp.full(2, 0.7))
  y = at(y, second, 0.7, 0.3)
  # The last step ends at sigma = 0: the sample is its x0.
  np.testing.assert_allclose(out, network(y, jnp.full(2, 0.3)), rtol=1e-9)


def test_second_order_beats_first_on_a_gaussian(x64):
  """Exact teacher N(1, 0.5^2): the endpoint is known."""
  x0_fn = lambda x, t: (
      1 + (1 - t[:, None]) * 0.25 * (x - (1 - t[:, None]))
      / ((1 - t[:, None]) ** 2 * 0.25 + t[:, None] ** 2)
  )
  x = jnp.array([[0.7]])
  scale = lambda t: np.sqrt((1 - t) ** 2 * 0.25 + t**2)
  exact = 0.98 + (0.7 - 0.02) * scale(0.02) / scale(0.98)

  def errors(sampler):
    return [
        abs(float(sampler(n)[0, 0]) - exact) for n in (32, 64)
    ]

  grid = lambda n: processes.time_grid(n, start=0.98, end=0.02)
  coarse, fine = errors(
      lambda n: processes.dpm_solver(x0_fn, x, grid(n), path=RF)
  )
  assert 3.3 < coarse / fine < 4.7
  coarse, fine = errors(
      lambda n: processes.ancestral(x0_fn, x, grid(n), path=RF, eta=0.0)
  )
  assert 1.8 < coarse / fine < 2.2


def test_multistep_consistency(x64):
  x, z = data(), noises(3)
  for path, floor in ((RF, 0.0), (EDM, 0.005)):
    expected = network(x, rows(TIMES[0]))
    for i, t in enumerate(TIMES[1:]):
      alpha, sigma = levels(path, t)
      expected = alpha * expected + np.sqrt(sigma**2 - floor**2) * z[i]
      expected = network(expected, rows(t))
    for unroll in (1, True):
      out = processes.multistep_consistency(
          network, jnp.asarray(x), jnp.asarray(TIMES), jnp.asarray(z),
          path=path, sigma_floor=floor, unroll=unroll,
      )
      np.testing.assert_allclose(out, expected, rtol=1e-9)
  one = processes.multistep_consistency(
      network, jnp.asarray(x), jnp.asarray(TIMES[:1]), jnp.zeros((0, 2, 3)),
      path=RF,
  )
  np.testing.assert_allclose(one, network(x, rows(TIMES[0])), rtol=1e-12)
  three = jnp.asarray(x), jnp.asarray(TIMES), jnp.asarray(z)
  np.testing.assert_array_equal(
      processes.multistep_consistency(network, *three, path=RF),
      processes.multistep_consistency(
          network, *three, path=RF, sigma_floor=0.0
      ),
  )
  # A level under the floor adds nothing rather than NaN.
  low = processes.multistep_consistency(
      network, jnp.asarray(x), jnp.array([1.0, 0.0]), jnp.asarray(z[:1]),
      path=EDM, sigma_floor=0.01,
  )
  assert bool(jnp.all(jnp.isfinite(low)))


def renoised(x, z, k):
  for i in range(k):
    alpha, sigma = levels(TRIG, TIMES[i + 1])
    x = alpha * network(x, rows(TIMES[i])) + sigma * z[i]
  return x


def test_predict_and_renoise(x64):
  x, z = data(), noises(3)
  args = jnp.asarray(x), jnp.asarray(TIMES), jnp.asarray(z)

  def run(k, **kwargs):
    return processes.predict_and_renoise(network, *args, k, path=TRIG, **kwargs)

  traced = {
      (skip, unroll): jax.jit(
          lambda k, s=skip, u=unroll: run(k, skip=s, unroll=u)
      )
      for skip, unroll in ((False, 2), (False, True), (True, 2))
  }
  for k in range(4):
    expected = renoised(x, z, k)
    for out, t in (
        run(k), run(k, unroll=True), *(f(jnp.int32(k)) for f in traced.values())
    ):
      np.testing.assert_allclose(out, expected, rtol=1e-9)
      np.testing.assert_allclose(t, rows(TIMES[k]), rtol=1e-12)


def test_predict_and_renoise_of_one_step_simulates_nothing():
  x, one = jnp.ones((2, 3)), jnp.array([0.9])
  out, t = processes.predict_and_renoise(
      network, x, one, jnp.zeros((0, 2, 3)), 0, path=RF
  )
  np.testing.assert_array_equal(out, x)
  np.testing.assert_array_equal(t, [one[0], one[0]])


def test_predict_and_renoise_times_of_rows(x64):
  """rCM draws its simulation times for each row."""
  x, z = data(), noises(1)
  times = np.array([[0.95, 0.9], [0.4, 0.2]])
  out, t = processes.predict_and_renoise(
      network, jnp.asarray(x), jnp.asarray(times), jnp.asarray(z), 1, path=RF
  )
  x0 = network(x, times[0])
  np.testing.assert_allclose(t, times[1])
  np.testing.assert_allclose(
      out, (1 - times[1])[:, None] * x0 + times[1][:, None] * z[0], rtol=1e-9
  )


def test_predict_and_renoise_makes_only_the_calls_it_needs():
  calls = []

  def counted(x, t):
    jax.debug.callback(lambda: calls.append(1))
    return network(x, t)

  x, z = jnp.ones((2, 3)), jnp.ones((3, 2, 3))
  run = lambda k, **kwargs: jax.block_until_ready(
      processes.predict_and_renoise(
          counted, x, jnp.asarray(TIMES, jnp.float32), z, k, path=RF, **kwargs
      )
  )
  for k, kwargs, expected in (
      (2, {}, 2), (0, {}, 0), (jnp.int32(2), {"skip": True}, 2),
      (jnp.int32(2), {}, 3),
  ):
    calls.clear()
    run(k, **kwargs)
    jax.effects_barrier()
    assert len(calls) == expected, (k, kwargs)


def test_no_gradient_through_backward_simulation():
  def loss(scale, x, times, z, k):
    out, t = processes.predict_and_renoise(
        lambda x, t: scale * x * t[:, None], x, times, z, k, path=RF
    )
    return jnp.sum(out) + jnp.sum(t)

  x, z = jnp.ones((2, 3)), jnp.ones((3, 2, 3))
  times = jnp.asarray(TIMES, jnp.float32)
  grad = jax.grad(loss, argnums=(0, 1, 2, 3))
  for k in (0, 2, jnp.int32(2)):
    for part in grad(2.0, x, times, z, k):
      np.testing.assert_array_equal(part, 0)


SAMPLERS = {
    "euler": lambda f, x, t, z, **k: processes.euler(f, x, t, **k),
    "heun": lambda f, x, t, z, **k: processes.heun(
        f, x, t, euler_last=True, **k),
    "flow_map": lambda f, x, t, z, **k: processes.flow_map(
        lambda x, t, r: f(x, t), x, t, **k),
    "ancestral": lambda f, x, t, z, **k: processes.ancestral(
        f, x, t, z, path=RF, **k),
    "dpm_solver": lambda f, x, t, z, **k: processes.dpm_solver(
        f, x, t, path=RF, **k),
    "multistep_consistency": lambda f, x, t, z, **k: (
        processes.multistep_consistency(f, x, t, z, path=RF, **k)),
    "predict_and_renoise": lambda f, x, t, z, **k: (
        processes.predict_and_renoise(
            f, x, t, z, jnp.int32(3), path=RF, **k)[0]),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_dtypes_times_and_loops(name, strict):
  """bf16 in, float32 out; t is [b]; unroll=True leaves no loop behind."""
  seen = []

  def fn(x, t):
    seen.append((t.shape, t.dtype))
    return x.astype(jnp.bfloat16) * jnp.bfloat16(0.5)

  x = jnp.ones((2, 3), jnp.bfloat16)
  times = jnp.asarray(TIMES, jnp.float32)
  z = jnp.ones((3, 2, 3), jnp.bfloat16)
  text = {}
  for unroll in (1, True):
    lowered = jax.jit(
        lambda x, z, u=unroll: SAMPLERS[name](fn, x, times, z, unroll=u)
    ).lower(x, z)
    text[str(unroll)] = lowered.as_text()
    assert lowered.out_info.dtype == jnp.float32
    assert lowered.out_info.shape == (2, 3)
  default = str(jax.make_jaxpr(lambda x: SAMPLERS[name](fn, x, times, z))(x))
  assert "unroll=1" in default
  assert "stablehlo.while" in text["1"]
  assert "stablehlo.while" not in text["True"]
  assert all(s == ((2,), jnp.float32) for s in seen)


@pytest.mark.parametrize("name", SAMPLERS)
def test_bad_input(name):
  run = SAMPLERS[name]
  x, z = jnp.ones((2, 3)), jnp.ones((3, 2, 3))
  t = jnp.asarray(TIMES, jnp.float32)
  with one_line_error(r"times must be \[n\] or \[n, b\]"):
    run(network, x, t[:0], z)
  with one_line_error(r"times must be \[n\] or \[n, b\]"):
    run(network, x, jnp.float32(1), z)
  with one_line_error(r"times must be \[n, b\]"):
    run(network, x, jnp.ones((4, 3)), z)
  with one_line_error("non-empty"):
    run(network, jnp.ones((0, 3)), t, jnp.ones((3, 0, 3)))
  with one_line_error("floating", TypeError):
    run(network, x, jnp.array([3, 2, 1, 0]), z)
  with distilljax.debug(), one_line_error("times must be decreasing"):
    run(network, x, t[::-1], z)
  with distilljax.debug(), one_line_error("times must be decreasing"):
    run(network, x, t[jnp.array([0, 3, 2, 1])], z)  # none above the first
  if name in ("ancestral", "multistep_consistency", "predict_and_renoise"):
    with one_line_error("noises must be"):
      run(network, x, t, z[:2])
    with one_line_error("noises must be a floating", TypeError):
      run(network, x, t, jnp.ones((3, 2, 3), jnp.int32))
  else:
    if name != "flow_map":
      with one_line_error(r"n >= 2"):
        run(network, x, t[:1], z)


def test_a_row_may_be_one_number():
  x = jnp.array([1.0, 2.0])
  fn = lambda x, t: 3 * x * t
  out = processes.euler(fn, x, jnp.array([0.5, 0.25]))
  np.testing.assert_allclose(out, x - 0.25 * 1.5 * x)
  with one_line_error("x must be"):
    processes.euler(fn, x[0], jnp.array([0.5, 0.25]))


def test_more_bad_input():
  x, z = jnp.ones((2, 3)), jnp.ones((3, 2, 3))
  t = jnp.asarray(TIMES, jnp.float32)
  for k in (4, -1):
    with one_line_error(r"exit_step must be in \[0, 3\]"):
      processes.predict_and_renoise(network, x, t, z, k, path=RF)
  with one_line_error("integer", TypeError):
    processes.predict_and_renoise(
        network, x, t, z, jnp.float32(1), path=RF
    )
  with one_line_error("exit_step must be"):
    processes.predict_and_renoise(
        network, x, t, z, jnp.zeros(2, jnp.int32), path=RF
    )
  with one_line_error("noises must be given"):
    processes.ancestral(network, x, t, path=RF)
  with one_line_error("eta must be"):
    processes.ancestral(network, x, t, z, path=RF, eta=1.5)
  with one_line_error("sigma_floor must be"):
    processes.multistep_consistency(
        network, x, t, z, path=RF, sigma_floor=-1.0
    )


def test_debug_allows_equal_times_and_short_steps():
  velocity = lambda x, t: jnp.ones_like(x)
  with distilljax.debug():
    x = processes.euler(
      velocity, jnp.zeros((2, 1)), jnp.array([1.0, 0.6, 0.6, 0.0])
    )
    np.testing.assert_allclose(x, -1.0, rtol=1e-6)
    with one_line_error("times must be decreasing"):
      processes.euler(velocity, jnp.zeros((2, 1)), jnp.array([0.5, 0.6]))
