"""Paths and conversions against formulas written out in NumPy float64."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distilljax
from distilljax import processes
from distilljax.processes import path as path_lib
from tests.helpers import as_user, one_line_error

TABLE = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 50) ** 2)
ZERO_TABLE = np.array([1.0, 0.7, 0.2, 0.0])

PATHS = {
    "rf": processes.RectifiedFlow(),
    "edm": processes.EDM(sigma_min=0.01, sigma_max=50.0, rho=5.0),
    "trig": processes.TrigFlow(0.5),
    "trig1": processes.TrigFlow(),
    "linear": processes.VariancePreserving.linear(0.2, 15.0),
    "cosine": processes.VariancePreserving.cosine(),
    "offset": processes.VariancePreserving.cosine(0.008),
    "table": processes.VariancePreserving.from_table(TABLE),
    "zero_table": processes.VariancePreserving.from_table(ZERO_TABLE),
}


def angle_of_table(table, t):
  """arctan(sigma / alpha) and its slope: linear between the entries."""
  nodes = np.arccos(np.sqrt(table))
  n = len(table) - 1
  i = np.clip(np.floor(t * n).astype(int), 0, n - 1)
  slope = (nodes[i + 1] - nodes[i]) * n
  return nodes[i] + (t - i / n) * slope, slope


def truth(name, t):
  """(alpha, sigma, alpha', sigma') from the papers' formulas."""
  t = np.asarray(t, np.float64)
  half_pi = np.pi / 2
  if name == "rf":
    return 1 - t, t, -np.ones_like(t), np.ones_like(t)
  if name == "edm":
    low, high = 0.01 ** (1 / 5), 50 ** (1 / 5)
    root = low + t * (high - low)
    return (
        np.ones_like(t), root**5, np.zeros_like(t),
        5 * root**4 * (high - low),
    )
  if name in ("trig", "trig1"):
    scale = 0.5 if name == "trig" else 1.0
    cos, sin = np.cos(half_pi * t), np.sin(half_pi * t)
    return cos, scale * sin, -half_pi * sin, scale * half_pi * cos
  if name == "linear":
    log_alpha = -0.25 * t**2 * (15 - 0.2) - 0.5 * t * 0.2
    alpha = np.exp(log_alpha)
    sigma = np.sqrt(1 - alpha**2)
    beta = 0.2 + t * (15 - 0.2)
    with np.errstate(divide="ignore"):
      return alpha, sigma, -beta / 2 * alpha, beta * alpha**2 / (2 * sigma)
  if name in ("cosine", "offset"):
    s = 0.0 if name == "cosine" else 0.008
    f = np.cos((t + s) / (1 + s) * half_pi) / np.cos(s / (1 + s) * half_pi)
    slope = -half_pi / (1 + s) * np.sin((t + s) / (1 + s) * half_pi) / np.cos(
        s / (1 + s) * half_pi
    )
    sigma = np.sqrt(np.maximum(1 - f**2, 0))
    if name == "cosine":
      return f, np.sin(half_pi * t), slope, half_pi * np.cos(half_pi * t)
    with np.errstate(divide="ignore"):
      return f, sigma, slope, -f * slope / sigma
  angle, slope = angle_of_table(TABLE if name == "table" else ZERO_TABLE, t)
  return (
      np.cos(angle), np.sin(angle), -slope * np.sin(angle),
      slope * np.cos(angle),
  )


def combination(name, prediction, t):
  """(of x0, of noise) that a prediction is, from the definitions."""
  alpha, sigma, alpha_prime, sigma_prime = truth(name, t)
  zero, one = np.zeros_like(alpha), np.ones_like(alpha)
  scale = 0.5 if name == "trig" else 1.0
  with np.errstate(divide="ignore"):
    return {
        "x0": (one, zero),
        "epsilon": (zero, one),
        "score": (zero, -1 / sigma),
        "velocity": (alpha_prime, sigma_prime),
        "v": (-sigma, alpha),
        # cos z - sin x0 with z = sigma_data noise, over sigma_data.
        "F": (
            -np.sin(np.pi / 2 * t) / scale,
            np.cos(np.pi / 2 * t),
        ),
    }[prediction]


def pairs(path):
  return list(itertools.permutations(path.predictions, 2))


INSIDE = np.linspace(0.013, 0.987, 23)


@pytest.mark.parametrize("name", PATHS)
def test_coefficients(name, x64):
  path = PATHS[name]
  ours = path.coefficients(jnp.asarray(INSIDE))
  for mine, theirs in zip(ours, truth(name, INSIDE), strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)
  t = jnp.asarray(INSIDE)
  for method, field in (
      (path.alpha, ours.alpha), (path.sigma, ours.sigma),
      (path.alpha_prime, ours.alpha_prime),
      (path.sigma_prime, ours.sigma_prime),
  ):
    np.testing.assert_array_equal(method(t), field)
  # The derivatives are those of the functions themselves.
  one = jnp.ones_like(t)
  for fn, slope in (
      (path.alpha, ours.alpha_prime), (path.sigma, ours.sigma_prime)
  ):
    np.testing.assert_allclose(
        jax.jvp(fn, (t,), (one,))[1], slope, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", PATHS)
def test_log_snr_and_its_inverse(name, x64):
  path = PATHS[name]
  alpha, sigma, _, _ = truth(name, INSIDE)
  log_snr = path.log_snr(jnp.asarray(INSIDE))
  np.testing.assert_allclose(
      log_snr, np.log(alpha**2 / sigma**2), rtol=1e-9, atol=1e-9
  )
  np.testing.assert_allclose(
      path.t_from_log_snr(log_snr), INSIDE, rtol=1e-9, atol=1e-12
  )


@pytest.mark.parametrize("name", PATHS)
def test_ends(name):
  path = PATHS[name]
  start, end = path.coefficients(0.0), path.coefficients(1.0)
  alpha, sigma, _, _ = truth(name, np.array([0.0, 1.0]))
  assert float(start.alpha) == pytest.approx(alpha[0], abs=1e-7)
  assert float(start.sigma) == pytest.approx(sigma[0], abs=1e-7)
  assert float(end.alpha) == pytest.approx(alpha[1], abs=1e-7)
  assert float(end.sigma) == pytest.approx(sigma[1], rel=2e-6)
  # Singular ends are exactly 0, and the path says which it has.
  assert path.alpha_ends == (alpha[1] < 1e-12)
  assert path.sigma_starts == (sigma[0] < 1e-12)
  with np.errstate(divide="ignore"):
    assert path.velocity_starts == np.isinf(truth(name, np.array([0.0]))[3][0])
  if path.sigma_starts:
    assert float(start.sigma) == 0
  if path.alpha_ends and "table" not in name:
    assert float(end.alpha) == 0


@pytest.mark.parametrize("name", ["trig", "cosine", "offset", "linear"])
def test_float32_keeps_its_digits_at_both_ends(name):
  near = np.float32([1e-4, 1e-3, 0.999, 0.9999])
  alpha, sigma, _, _ = truth(name, near)
  t = jnp.asarray(near)
  np.testing.assert_allclose(PATHS[name].alpha(t), alpha, rtol=3e-6)
  np.testing.assert_allclose(PATHS[name].sigma(t), sigma, rtol=3e-6)


@pytest.mark.parametrize("name", PATHS)
def test_conversions_and_conditioning(name, x64):
  path = PATHS[name]
  t = np.array([0.05, 0.31, 0.5, 0.77, 0.96])
  rng = np.random.default_rng(0)
  x0, noise = rng.normal(size=(2, 5, 3, 2))
  col = lambda a: a[:, None, None]
  alpha, sigma, _, _ = truth(name, t)
  x_t = col(alpha) * x0 + col(sigma) * noise

  # Eager: the few primitives compile once for all paths and pairs.
  def run(predictions, x_t, t):
    with as_user():
      return {
          (a, b): (
              path.convert(jnp.asarray(predictions[a]), x_t, t, a, b),
              path.conditioning(t, a, b),
          )
          for a, b in pairs(path)
      }

  values = {}
  for kind in path.predictions:
    of_x0, of_noise = combination(name, kind, t)
    values[kind] = col(of_x0) * x0 + col(of_noise) * noise
  out = run(values, jnp.asarray(x_t), jnp.asarray(t))
  for (a, b), (converted, conditioning) in out.items():
    np.testing.assert_allclose(
        converted, values[b], rtol=1e-9, atol=1e-9, err_msg=f"{a} -> {b}"
    )
    # The 2x2 system solved by LAPACK, row by row.
    for i in range(len(t)):
      system = np.array([
          [alpha[i], sigma[i]],
          [c[i] for c in combination(name, a, t)],
      ])
      target = np.array([c[i] for c in combination(name, b, t)])
      of_x, of_source = np.linalg.solve(system.T, target)
      expected = max(
          1, abs(of_x) + abs(of_source),
          (abs(of_x) + 1) / abs(of_source) if of_source else np.inf,
      )
      np.testing.assert_allclose(
          conditioning[i], expected, rtol=1e-8, err_msg=f"{a} -> {b}"
      )


def test_conditioning_of_the_straight_path(x64):
  """The growth that the docstring states, in its simplest case."""
  path = processes.RectifiedFlow()
  t = jnp.array([1e-3, 1 - 1e-3])
  for a, b, at_data, at_noise in (
      ("x0", "epsilon", 1e3, 1e3),
      ("x0", "score", 1e6, 1e3),
      ("epsilon", "score", 1e3, 1),
      ("x0", "velocity", 1e3, 1),
      ("epsilon", "velocity", 1, 1e3),
      ("x0", "v", 1e3, 1),
      ("epsilon", "v", 1, 1e3),
      ("velocity", "v", 1, 1),
  ):
    for source, target in ((a, b), (b, a)):
      got = path.conditioning(t, source, target)
      for value, order in zip(got, (at_data, at_noise), strict=True):
        assert order <= value <= 4 * order, (source, target, value)


GRID = np.concatenate([
    [0.0, 1e-5, 1e-4, 1e-3], np.linspace(0.01, 0.99, 25), [0.999, 0.9999, 1.0]
]).astype(np.float32)


@pytest.mark.parametrize("name", PATHS)
def test_float32_round_trips_on_the_whole_path(name, strict):
  path = PATHS[name]
  rng = np.random.default_rng(1)
  x0, noise = rng.normal(size=(2, len(GRID), 16)).astype(np.float32)
  x0 = x0 * np.float32(0.5 if name == "trig" else 1.0)

  def run(x0, noise, t):
    out = {}
    for a, b in pairs(path):
      low, high = path.conversion_range(a, b)
      low_back, high_back = path.conversion_range(b, a)
      inside = jnp.clip(t, max(low, low_back), min(high, high_back))
      x_t = path.add_noise(x0, noise, inside)
      source = path.target(x0, noise, inside, a)
      there = path.convert(source, x_t, inside, a, b)
      back = path.convert(there, x_t, inside, b, a)
      size = jnp.max(
          jnp.stack([jnp.abs(source), jnp.abs(there), jnp.abs(x_t)]), (0, 2)
      )
      error = jnp.max(jnp.abs(back - source), 1) / size
      out[a, b] = error / path.conditioning(inside, a, b)
    return out

  with as_user():
    errors = run(jnp.asarray(x0), jnp.asarray(noise), jnp.asarray(GRID))
  for pair, error in errors.items():
    assert float(jnp.max(error)) < 1e-5 / 10, pair  # measured: 1.4e-7


@pytest.mark.parametrize("name", PATHS)
def test_conversion_range(name):
  path = PATHS[name]
  with np.errstate(all="ignore"):
    for a, b in pairs(path):
      expected = []
      for t in (np.array([0.0]), np.array([1.0])):
        alpha, sigma, _, _ = truth(name, t)
        system = np.array(
            [[alpha[0], sigma[0]], [c[0] for c in combination(name, a, t)]]
        )
        target = np.array([c[0] for c in combination(name, b, t)])
        if a == "score":  # known up to the factor -sigma: epsilon
          system[1] = 0, 1
        if (a, b) == ("epsilon", "score") or (a, b) == ("score", "epsilon"):
          singular = not np.isfinite(target).all()
        else:
          singular = (
              not np.isfinite(system).all() or not np.isfinite(target).all()
              or abs(np.linalg.det(system)) < 1e-12
          )
        expected.append(singular)
      low, high = path.conversion_range(a, b)
      assert (low == path.end_clamp, high == 1 - path.end_clamp) == tuple(
          expected
      ), (a, b)
      assert low in (0, path.end_clamp) and high in (1, 1 - path.end_clamp)
  assert path.conversion_range("x0", "x0") == (0, 1)


def test_convert_clamps_t_and_nothing_else():
  path = processes.RectifiedFlow(end_clamp=1e-3)
  ones = jnp.ones((1, 2))
  at = functools.partial(path.convert, 3 * ones, 2 * ones)
  end, inside = jnp.array([1.0]), jnp.array([1 - 1e-3])
  np.testing.assert_array_equal(
      at(end, "epsilon", "x0"), at(inside, "epsilon", "x0")
  )
  # (x_t - t eps) / (1 - t) at the clamp, not cut to any range.
  np.testing.assert_allclose(at(end, "epsilon", "x0"), -997.0, rtol=1e-4)
  np.testing.assert_array_equal(at(end, "velocity", "x0"), -ones)
  start = jnp.array([0.0])
  np.testing.assert_allclose(at(start, "x0", "epsilon"), -997.0, rtol=1e-4)
  np.testing.assert_array_equal(at(start, "epsilon", "x0"), 2 * ones)


def test_same_kind_is_the_identity(strict):
  path = processes.RectifiedFlow()
  x = jnp.arange(6.0).reshape(2, 3)
  t = jnp.array([0.0, 1.0])
  for kind in path.predictions:
    np.testing.assert_array_equal(path.convert(x, 7 * x, t, kind, kind), x)


def test_add_noise_velocity_and_target(x64, strict):
  rng = np.random.default_rng(2)
  x0, noise = rng.normal(size=(2, 4, 3))
  t = np.array([0.2, 0.4, 0.6, 0.8])
  for name, path in PATHS.items():
    alpha, sigma, alpha_prime, sigma_prime = (
        a[:, None] for a in truth(name, t)
    )
    args = jnp.asarray(x0), jnp.asarray(noise), jnp.asarray(t)
    np.testing.assert_allclose(
        path.add_noise(*args), alpha * x0 + sigma * noise, rtol=1e-9
    )
    velocity = alpha_prime * x0 + sigma_prime * noise
    np.testing.assert_allclose(path.velocity(*args), velocity, rtol=1e-8)
    for kind in path.predictions:
      a, b = (c[:, None] for c in combination(name, kind, t))
      np.testing.assert_allclose(
          path.target(*args, kind), a * x0 + b * noise, rtol=1e-8, atol=1e-12
      )


def test_edm_in_sigma(x64):
  path = processes.EDM()
  sigma = jnp.array([0.002, 0.5, 80.0])
  t = path.t_from_sigma(sigma)
  np.testing.assert_allclose(t[jnp.array([0, 2])], [0, 1], atol=1e-12)
  np.testing.assert_allclose(path.sigma(t), sigma, rtol=1e-12)
  c = path.at_sigma(sigma)
  np.testing.assert_array_equal(c.alpha, 1)
  np.testing.assert_array_equal(c.sigma, sigma)
  np.testing.assert_array_equal(c.alpha_prime, 0)
  np.testing.assert_array_equal(c.sigma_prime, 1)
  # Karras: the default levels at t = 1/2.
  middle = ((0.002 ** (1 / 7) + 80 ** (1 / 7)) / 2) ** 7
  assert float(path.sigma(0.5)) == pytest.approx(middle, rel=1e-12)


def test_trigflow_in_its_angle(x64):
  path = processes.TrigFlow(0.5)
  angle = jnp.array([0.1, 0.8, 1.5])
  t = path.t_from_angle(angle)
  np.testing.assert_allclose(t, np.asarray(angle) / (np.pi / 2), rtol=1e-12)
  np.testing.assert_allclose(path.angle(t), angle, rtol=1e-12)
  c = path.at_angle(angle)
  np.testing.assert_allclose(c.alpha, np.cos(angle), rtol=1e-12)
  np.testing.assert_allclose(c.sigma, 0.5 * np.sin(angle), rtol=1e-12)
  np.testing.assert_allclose(c.alpha_prime, -np.sin(angle), rtol=1e-12)
  np.testing.assert_allclose(c.sigma_prime, 0.5 * np.cos(angle), rtol=1e-12)
  # F is the velocity in the angle over sigma_data.
  x = jnp.ones((3, 2))
  f = processes.convert_prediction(
      x, 2 * x, c, source="velocity", target="F", sigma_data=0.5
  )
  np.testing.assert_allclose(f, x / 0.5, rtol=1e-12)


def test_table(x64):
  path = PATHS["table"]
  index = jnp.arange(50)
  t = path.t_from_index(index)
  np.testing.assert_allclose(t, np.arange(50) / 49, rtol=1e-12)
  np.testing.assert_allclose(path.alpha(t) ** 2, TABLE, rtol=1e-9)
  np.testing.assert_allclose(path.sigma(t) ** 2, 1 - TABLE, rtol=1e-9)
  assert not path.alpha_ends and not path.sigma_starts
  again = processes.VariancePreserving.from_table(TABLE)
  np.testing.assert_allclose(again.sigma(t) ** 2, 1 - TABLE, rtol=1e-9)
  two = processes.VariancePreserving.from_table([0.9, 0.1])
  np.testing.assert_allclose(two.alpha(jnp.array([0.0, 1.0])) ** 2, [0.9, 0.1])
  zero = PATHS["zero_table"]
  assert zero.alpha_ends and zero.sigma_starts
  for bad, match in (
      ([0.9], "alphas_cumprod must be 2 or more entries"),
      ([0.5, 0.5], "strictly decreasing"),
      ([0.5, 0.9], "strictly decreasing"),
      ([0.9, 0.5, 0.7], "strictly decreasing"),
      ([1.5, 0.5], r"in \[0, 1\]"),
      ([0.5, -0.1], r"in \[0, 1\]"),
      ([[0.5, 0.1]], r"\[n\]"),
  ):
    with one_line_error(match):
      processes.VariancePreserving.from_table(bad)
  with one_line_error("kind must be 'table'"):
    processes.RectifiedFlow and PATHS["linear"].t_from_index(index)
  with one_line_error("integer array", TypeError):
    path.t_from_index(jnp.array([0.5]))


def test_defaults():
  kind = processes.VariancePreserving
  linear = kind(kind="linear", beta_min=0.1, beta_max=20.0)
  assert kind() == kind.linear() == linear  # those of DDPM and of score SDEs
  assert kind(kind="cosine") == kind.cosine() == kind.cosine(0.0)
  assert processes.EDM() == processes.EDM(
      sigma_min=0.002, sigma_max=80.0, rho=7.0
  )
  assert processes.TrigFlow() == processes.TrigFlow(sigma_data=1.0)
  for path in (kind(), processes.EDM(), processes.RectifiedFlow()):
    assert path.end_clamp == 1e-4


def test_variance_is_preserved(x64):
  t = jnp.linspace(0.0, 1.0, 41)
  for name in ("linear", "cosine", "offset", "table", "zero_table"):
    c = PATHS[name].coefficients(t)
    np.testing.assert_allclose(c.alpha**2 + c.sigma**2, 1, rtol=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_a_path_is_static(name):
  path = PATHS[name]
  assert hash(path) == hash(dataclasses.replace(path))
  assert path == dataclasses.replace(path)
  assert not jax.tree.leaves(path)
  traces = []

  @jax.jit
  def f(path, t):
    traces.append(1)
    return path.sigma(t)

  t = jnp.array([0.25])
  np.testing.assert_allclose(f(path, t), path.sigma(t), rtol=1e-6)
  f(dataclasses.replace(path), t)
  assert len(traces) == 1


def test_dtypes(strict):
  path = processes.RectifiedFlow()
  x = jnp.ones((2, 3), jnp.bfloat16)
  t = jnp.array([0.5, 0.25], jnp.bfloat16)
  for out in (
      path.add_noise(x, x, t), path.velocity(x, x, t),
      path.convert(x, x, t, "velocity", "x0"),
      path.convert(x, x, t, "x0", "x0"), path.sigma(t),
      path.target(x, x, t, "v"), path.conditioning(t, "x0", "v"),
  ):
    assert out.dtype == jnp.float32
  with jax.enable_x64(True):
    wide = jnp.ones((2, 3), jnp.float64)
    single = jnp.array([0.5, 0.25], jnp.float32)
    assert path.add_noise(wide, wide, single).dtype == jnp.float64
    narrow = jnp.ones((2, 3), jnp.float32)
    assert path.add_noise(narrow, narrow, single).dtype == jnp.float32


def test_times_of_rows_frames_and_numbers(strict):
  path = processes.RectifiedFlow()
  x0, noise = jnp.zeros((2, 3, 4)), jnp.ones((2, 3, 4))
  by_frame = jnp.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
  np.testing.assert_allclose(
      path.add_noise(x0, noise, by_frame), by_frame[..., None] * noise
  )
  np.testing.assert_allclose(path.add_noise(x0, noise, 0.25), 0.25 * noise)
  np.testing.assert_allclose(
      path.convert(noise, noise, by_frame, "velocity", "x0"),
      1 - by_frame[..., None] * noise,
      rtol=1e-6,
  )


def test_bad_input():
  path = processes.RectifiedFlow()
  x, t = jnp.ones((2, 3)), jnp.array([0.5, 0.5])
  with one_line_error("noise must be .2, 3. like x0, got .2, 4."):
    path.add_noise(x, jnp.ones((2, 4)), t)
  with one_line_error("x_t must be .2, 3. like prediction"):
    path.convert(x, jnp.ones((2, 4)), t, "x0", "v")
  with one_line_error("t must be"):
    path.add_noise(x, x, jnp.ones(3) / 2)
  with one_line_error("non-empty"):
    path.convert(jnp.ones((0, 3)), jnp.ones((0, 3)), jnp.ones(0), "x0", "v")
  with one_line_error("non-empty"):
    path.add_noise(jnp.ones((0, 3)), jnp.ones((0, 3)), jnp.ones(0))
  with one_line_error("did you mean 'velocity'"):
    path.convert(x, x, t, "velocty", "x0")
  with one_line_error("target must be one of"):
    path.convert(x, x, t, "velocity", "F")
  with one_line_error("target must be one of"):
    path.definition(t, "F")
  with one_line_error("source must be one of"):
    path_lib.conversion_weights(
        path.coefficients(t), source="F", target="x0"
    )
  with one_line_error("floating", TypeError):
    path.add_noise(jnp.ones((2, 3), jnp.int32), x, t)
  with one_line_error("floating", TypeError):
    path.alpha(jnp.array([0, 1]))
  for t_bad in (1.5, -0.1, float("nan"), np.float32(2)):
    with one_line_error(r"t must be in \[0, 1\], got"):
      path.add_noise(x, x, t_bad)
    with one_line_error(r"t must be in \[0, 1\]"):
      path.sigma(t_bad)
    with one_line_error(r"conditioning: t must be in \[0, 1\]"):
      path.conditioning(t_bad, "x0", "v")
  np.testing.assert_allclose(
      path.conditioning(0.5, "x0", "v"), path.conditioning(t, "x0", "v")[0]
  )
  with one_line_error(r"t must be in \[0, 0.9999\].*epsilon -> x0 is singular"):
    path.convert(x, x, 1.0, "epsilon", "x0")
  with one_line_error(r"t must be in \[0.0001, 1\].*x0 -> score is singular"):
    path.convert(x, x, 0.0, "x0", "score")
  with distilljax.debug():
    with one_line_error("t must be"):
      path.sigma(jnp.array([0.5, 1.5]))
    with one_line_error("singular"):
      path.convert(x, x, jnp.array([0.5, 1.0]), "epsilon", "x0")
    path.convert(x, x, jnp.array([0.0, 1.0]), "velocity", "x0")
  with one_line_error("singular"):
    distilljax.debug(lambda t: path.convert(x, x, t, "epsilon", "x0"))(
        jnp.array([0.5, 1.0])
    )


def test_bad_paths():
  for make, match in (
      (lambda: processes.EDM(sigma_min=0.0), "sigma_min"),
      (lambda: processes.EDM(sigma_min=2.0, sigma_max=1.0), "sigma_max"),
      (lambda: processes.EDM(rho=0.0), "rho"),
      (lambda: processes.TrigFlow(0.0), "sigma_data"),
      (lambda: processes.TrigFlow(-1.0), "sigma_data"),
      (lambda: processes.RectifiedFlow(end_clamp=0.0), "end_clamp"),
      (lambda: processes.RectifiedFlow(end_clamp=0.5), "end_clamp"),
      (lambda: processes.VariancePreserving.linear(0.0), "beta_min"),
      (lambda: processes.VariancePreserving.linear(2.0, 1.0), "beta_max"),
      (lambda: processes.VariancePreserving.cosine(-0.1), "offset"),
      (lambda: processes.VariancePreserving(kind="cosin"), "did you mean"),
      (lambda: processes.VariancePreserving(kind="table"), "angles"),
      (lambda: PATHS["edm"].t_from_sigma(-1.0), "sigma"),
      (lambda: PATHS["edm"].at_sigma(-1.0), "sigma"),
      (lambda: PATHS["trig"].t_from_angle(2.0), "angle"),
  ):
    with one_line_error(match):
      make()


def test_conversions_name_what_is_known():
  path = processes.RectifiedFlow()
  for source, target in (("speed", "x0"), ("x0", "speed")):
    with one_line_error("'speed'"):
      path.conversion_range(source, target)
    with one_line_error("'speed'"):
      path_lib.conversion_weights(
        path.coefficients(jnp.array([0.5])), source=source, target=target
      )


def test_both_ends_of_the_other_variables():
  """What is in range is converted, what is beside it is refused."""
  trig, edm = processes.TrigFlow(), processes.EDM()
  quarters = np.pi / 2 * jnp.array([0, 0.5, 1])
  np.testing.assert_allclose(
    trig.t_from_angle(quarters), [0, 0.5, 1], rtol=1e-6
  )
  for angle in (0.2, 1.5):
    assert float(trig.t_from_angle(angle)) == pytest.approx(2 * angle / np.pi)
  assert float(edm.at_sigma(0.5).sigma) == 0.5
  assert float(edm.t_from_sigma(0.5)) > 0
  for bad in (-0.1, 1.58):
    with one_line_error("angle must be"):
      trig.t_from_angle(bad)
  for fn in (edm.at_sigma, edm.t_from_sigma):
    with one_line_error("sigma must be"):
      fn(-0.1)


@pytest.mark.parametrize("source,target", [("x0", "epsilon"), ("score", "v")])
def test_conditioning_stops_where_the_pair_does(source, target):
  """At an end it is what it is at the pair's last time, in both directions."""
  path = processes.RectifiedFlow()
  ranges = [
    path.conversion_range(source, target), path.conversion_range(target, source)
  ]  # fmt: skip
  low, high = max(r[0] for r in ranges), min(r[1] for r in ranges)
  assert 0 < low < high < 1
  ask = lambda *t: np.asarray(
    path.conditioning(jnp.asarray(t), source=source, target=target)
  )
  ends = ask(0.0, 1.0)
  np.testing.assert_array_equal(ends, ask(low, high))
  assert np.all(np.isfinite(ends)) and np.all(ends > 10)
  assert np.all(ask(0.3, 0.5, 0.7) >= 1)


def test_edges_of_the_kinds_options():
  assert processes.EDM(rho=0.5).rho == 0.5
  with one_line_error("sigma_max must be"):
    processes.EDM(sigma_min=1.0, sigma_max=1.0)
  short = processes.VariancePreserving(kind="table", angles=(0.1, 1.2))
  assert not short.alpha_ends and not short.sigma_starts
