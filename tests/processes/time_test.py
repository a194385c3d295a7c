"""Grids and draws of times: tables worked out by hand, and moments."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from distilljax import processes
from tests.helpers import as_user, one_line_error

N = 20_000


def keys(n=N, seed=0):
  return jax.random.split(jax.random.key(seed), n)


def close(values, mean, std):
  """The sample mean lies within 5 standard errors of the truth."""
  values = np.asarray(values, np.float64)
  assert abs(values.mean() - mean) < 5 * std / np.sqrt(len(values))


def test_shift_time(strict):
  t = jnp.array([0.0, 0.25, 0.5, 1.0])
  expected = [0, 5 * 0.25 / (1 + 4 * 0.25), 5 * 0.5 / (1 + 4 * 0.5), 1]
  shifted = processes.shift_time(t, shift=5.0)
  np.testing.assert_allclose(shifted, expected, rtol=1e-6)
  np.testing.assert_allclose(
      processes.shift_time(shifted, shift=1 / 5), t, atol=1e-7
  )
  # sigma / alpha of the straight path is multiplied.
  odds = shifted[1] / (1 - shifted[1])
  assert float(odds) == pytest.approx(5 * 0.25 / 0.75, rel=1e-6)
  with one_line_error(r"shift must be in \(0, inf\)"):
    processes.shift_time(t, shift=0.0)
  with one_line_error(r"t must be in \[0, 1\]"):
    processes.shift_time(1.5, shift=2.0)


def test_time_grid():
  np.testing.assert_allclose(
      processes.time_grid(4), [1, 0.75, 0.5, 0.25, 0], atol=1e-7
  )
  np.testing.assert_allclose(
      processes.time_grid(2, start=0.8, end=0.2, shift=3.0),
      [3 * 0.8 / 2.6, 3 * 0.5 / 2, 3 * 0.2 / 1.4], rtol=1e-6,
  )
  with one_line_error("n must be in"):
    processes.time_grid(0)
  with one_line_error("end must be"):
    processes.time_grid(2, start=0.5, end=0.5)
  with one_line_error("start must be"):
    processes.time_grid(2, start=1.5)


def test_uniform_times():
  t = processes.sample_uniform_times(keys(), low=0.2, high=0.8)
  assert t.shape == (N,) and t.min() >= 0.2 and t.max() <= 0.8
  close(t, 0.5, 0.6 / math.sqrt(12))
  assert float(jnp.mean(t < 0.35)) == pytest.approx(0.25, abs=0.02)
  plain = processes.sample_uniform_times(keys())
  np.testing.assert_allclose(
      processes.sample_uniform_times(keys(), shift=4.0),
      processes.shift_time(plain, shift=4.0), rtol=1e-6,
  )
  with one_line_error("low must be"):
    processes.sample_uniform_times(keys(1)[0], low=0.9, high=0.5)
  with one_line_error("high must be"):
    processes.sample_uniform_times(keys(1)[0], high=1.5)


def test_logit_normal_times():
  t = processes.sample_logit_normal_times(keys(), mean=-0.7, std=1.3)
  logit = np.log(t) - np.log1p(-t)
  close(logit, -0.7, 1.3)
  assert np.std(logit) == pytest.approx(1.3, rel=0.03)
  np.testing.assert_allclose(
      processes.sample_logit_normal_times(
          keys(), mean=-0.7, std=1.3, shift=3.0
      ),
      processes.shift_time(t, shift=3.0), rtol=1e-5,
  )
  with one_line_error("std must be"):
    processes.sample_logit_normal_times(keys(1)[0], std=-1.0)


def test_logit_normal_defaults():
  t = processes.sample_logit_normal_times(keys())
  np.testing.assert_array_equal(
      t, processes.sample_logit_normal_times(keys(), mean=0, std=1, shift=1)
  )
  logit = np.log(t) - np.log1p(-t)
  close(logit, 0, 1)
  close(logit**2, 1, math.sqrt(2))


def test_log_normal_sigmas():
  sigma = processes.sample_log_normal_sigmas(keys())
  close(np.log(sigma), -1.2, 1.2)
  assert np.std(np.log(sigma)) == pytest.approx(1.2, rel=0.03)
  other = processes.sample_log_normal_sigmas(keys(), mean=0.5, std=0.3)
  close(np.log(other), 0.5, 0.3)
  with one_line_error("std must be"):
    processes.sample_log_normal_sigmas(keys(1)[0], std=-1.0)


@pytest.mark.parametrize("draw", [
    processes.sample_uniform_times,
    processes.sample_logit_normal_times,
    processes.sample_log_normal_sigmas,
    processes.sample_mean_flow_times,
    processes.sample_any_flow_times,
    processes.sample_guidance,
    lambda key, shape: processes.sample_guidance(
        key, shape, choices=(4.0, 4.5, 5.0)),
    lambda key, shape: processes.sample_levels(
        key, jnp.array([0.2, 0.3, 0.5]), shape),
])
def test_a_row_depends_on_its_own_key_only(draw):
  many = keys(4)
  for shape in ((), (2, 3)):
    whole = jax.tree.leaves(draw(many, shape))
    for part in whole:
      assert part.shape == (4, *shape)
    alone = jax.tree.leaves(draw(many[2], shape))
    for part, row in zip(whole, alone, strict=True):
      np.testing.assert_allclose(part[2], row, rtol=1e-6)
    # Rows differ: the key is used.
    assert any(len(np.unique(np.asarray(p))) > 1 for p in whole)


def test_mean_flow_times():
  t, r = processes.sample_mean_flow_times(keys(), equal=0.3)
  assert bool(jnp.all(r <= t))
  assert float(jnp.mean(r == t)) == pytest.approx(0.3, abs=0.02)
  free = np.asarray(r < t)
  # Of two logit-normal draws the mean of max and min is the plain mean.
  logit = lambda x: np.log(x) - np.log1p(-x)
  both = (logit(np.asarray(t)) + logit(np.asarray(r)))[free] / 2
  close(both, -0.4, 1 / math.sqrt(2))
  assert np.std(both) == pytest.approx(1 / math.sqrt(2), rel=0.05)
  # ... and the larger exceeds it by std / sqrt(pi).
  close(logit(np.asarray(t)[free]), -0.4 + 1 / math.sqrt(math.pi), 0.83)
  scaled, _ = processes.sample_mean_flow_times(
      keys(), equal=0.0, mean=1.0, std=2.0
  )
  close(logit(np.asarray(scaled)), 1 + 2 / math.sqrt(math.pi), 1.66)
  defaults, equal = processes.sample_mean_flow_times(keys())
  assert float(jnp.mean(defaults == equal)) == pytest.approx(0.75, abs=0.02)


def test_mean_flow_times_uniform_and_shift():
  kwargs = {"distribution": "uniform", "equal": 0.0}
  t, r = processes.sample_mean_flow_times(keys(), **kwargs)
  close(t, 2 / 3, math.sqrt(1 / 18))
  close(r, 1 / 3, math.sqrt(1 / 18))
  t5, r5 = processes.sample_mean_flow_times(keys(), shift=5.0, **kwargs)
  np.testing.assert_allclose(t5, processes.shift_time(t, shift=5.0), rtol=1e-5)
  np.testing.assert_allclose(r5, processes.shift_time(r, shift=5.0), rtol=1e-5)


def test_mean_flow_end_masses():
  t, r = processes.sample_mean_flow_times(
      keys(), equal=0.5, t_one=0.2, r_zero=0.3, distribution="uniform"
  )
  free = np.asarray(r < t)
  share = lambda x: float(np.mean(np.asarray(x)))
  assert share(free) == pytest.approx(0.5, abs=0.02)
  # The masses are independent of each other and of the anchors.
  assert share((t == 1)[free]) == pytest.approx(0.2, abs=0.02)
  assert share((r == 0)[free]) == pytest.approx(0.3, abs=0.02)
  assert share(((t == 1) & (r == 0))[free]) == pytest.approx(0.06, abs=0.015)
  none = processes.sample_mean_flow_times(keys(), distribution="uniform")
  assert not bool(jnp.any(none[0] == 1)) and not bool(jnp.any(none[1] == 0))
  always = processes.sample_mean_flow_times(
      keys(8), equal=0.0, t_one=1.0, r_zero=1.0
  )
  np.testing.assert_array_equal(always[0], 1)
  np.testing.assert_array_equal(always[1], 0)


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_mean_flow_masses_do_not_see_the_pair(distribution):
  sample = functools.partial(
      processes.sample_mean_flow_times, keys(), distribution=distribution
  )
  t, r = (np.asarray(a) for a in sample(equal=0.0))
  t_one, _ = sample(equal=0.0, t_one=0.2)
  _, r_zero = sample(equal=0.0, r_zero=0.2)
  _, same = sample(equal=0.2)
  # The draws are those of t, r; where each mass fell must not matter to them.
  for hit in (t_one == 1, r_zero == 0, same == t):
    hit = np.asarray(hit)
    assert hit.mean() == pytest.approx(0.2, abs=0.02)
    for a in (t, r, t - r):
      close(a[hit], a.mean(), a.std())


def test_mean_flow_split_by_index():
  rows = processes.first_rows(10, 0.75)
  np.testing.assert_array_equal(rows, np.arange(10) < 7)
  t, r = processes.sample_mean_flow_times(
      keys(1)[0], (10,), equal=0.0, where_equal=rows
  )
  np.testing.assert_array_equal(t == r, rows)
  with one_line_error("where_equal must be"):
    processes.sample_mean_flow_times(keys(1)[0], (9,), where_equal=rows)
  with one_line_error("share must be"):
    processes.first_rows(4, 1.5)


def test_mean_flow_bad_input():
  for kwargs, match in (
      ({"distribution": "unifrom"}, "did you mean 'uniform'"),
      ({"equal": 1.5}, "equal must be"),
      ({"t_one": -0.1}, "t_one must be"),
      ({"r_zero": 2.0}, "r_zero must be"),
      ({"std": -1.0}, "std must be"),
  ):
    with one_line_error(match):
      processes.sample_mean_flow_times(keys(1)[0], **kwargs)


def test_any_flow_times():
  t, r, same = processes.sample_any_flow_times(keys(), shift=1.0)
  assert bool(jnp.all(r <= t))
  np.testing.assert_array_equal(same, t == r)
  assert float(jnp.mean(same)) == pytest.approx(0.5, abs=0.02)
  assert float(jnp.mean(r == 0)) == pytest.approx(0.25, abs=0.02)
  close(t, 2 / 3, math.sqrt(1 / 18))
  close(np.asarray(r)[np.asarray(~same & (r > 0))], 1 / 3, math.sqrt(1 / 18))
  part = jnp.arange(8) / 8
  t, r, same = processes.sample_any_flow_times(
      keys(1)[0], (8,), part=part, diffusion=0.25, consistency=0.5, shift=1.0
  )
  np.testing.assert_array_equal(same, np.arange(8) < 2)
  np.testing.assert_array_equal(t == r, np.arange(8) < 2)
  rows = np.arange(8)
  np.testing.assert_array_equal(r == 0, (rows >= 2) & (rows < 6))
  shifted = processes.sample_any_flow_times(
      keys(1)[0], (8,), part=part, diffusion=0.25, consistency=0.5
  )
  for a, b in zip((t, r), shifted[:2], strict=True):
    np.testing.assert_allclose(
        processes.shift_time(a, shift=5.0), b, rtol=1e-5
    )
  with one_line_error("consistency must be"):
    processes.sample_any_flow_times(
        keys(1)[0], diffusion=0.6, consistency=0.5
    )
  with one_line_error("part must be"):
    processes.sample_any_flow_times(keys(1)[0], (4,), part=part)
  with one_line_error("part must be a floating", TypeError):
    processes.sample_any_flow_times(keys(1)[0], (8,), part=jnp.arange(8))
  with one_line_error("diffusion must be"):
    processes.sample_any_flow_times(keys(1)[0], diffusion=1.6)


def test_ordered_pair():
  t, r = processes.ordered_pair(jnp.array([0.2, 0.9]), jnp.array([0.7, 0.1]))
  np.testing.assert_allclose(t, [0.7, 0.9])
  np.testing.assert_allclose(r, [0.2, 0.1])


def test_karras_sigmas(x64):
  i = np.arange(18)
  a, b = 0.002 ** (1 / 7), 80 ** (1 / 7)
  expected = (a + i / 17 * (b - a)) ** 7
  np.testing.assert_allclose(processes.karras_sigmas(18), expected, rtol=1e-12)
  np.testing.assert_allclose(
      processes.karras_sigmas(jnp.int32(18), length=18), expected, rtol=1e-9
  )
  padded = processes.karras_sigmas(jnp.int32(18), length=25)
  np.testing.assert_allclose(padded[:18], expected, rtol=1e-9)
  np.testing.assert_allclose(padded[18:], 80, rtol=1e-9)
  np.testing.assert_allclose(
      processes.karras_sigmas(18, length=25), padded, rtol=1e-9
  )
  np.testing.assert_allclose(
      processes.karras_sigmas(3, sigma_min=1.0, sigma_max=9.0, rho=2.0),
      [1, 4, 9], rtol=1e-12,
  )
  # EDM's own time runs over the same levels.
  np.testing.assert_allclose(
      processes.EDM().sigma(jnp.linspace(0, 1, 18)), expected, rtol=1e-9
  )
  for bad, match in (
      (dict(n=1), "n must be"),
      (dict(n=9, length=5), "n must be"),
      (dict(n=9, sigma_min=0.0), "sigma_min"),
      (dict(n=9, sigma_max=0.001), "sigma_max"),
      (dict(n=9, sigma_max=0.002), "sigma_max"),
      (dict(n=9, rho=0.0), "rho"),
      (dict(n=jnp.int32(9)), "length must be given"),
  ):
    with one_line_error(match):
      processes.karras_sigmas(**bad)


def test_lognormal_levels(x64):
  sigmas = processes.karras_sigmas(11)
  z = (np.log(sigmas) + 1.1) / (math.sqrt(2) * 2.0)
  mass = special.erf(z[1:]) - special.erf(z[:-1])
  p = processes.lognormal_levels(sigmas)
  np.testing.assert_allclose(p, mass / mass.sum(), rtol=1e-9)
  assert float(p.sum()) == pytest.approx(1, rel=1e-12)
  narrow = processes.lognormal_levels(sigmas, mean=0.3, std=0.2)
  z = (np.log(sigmas) - 0.3) / (math.sqrt(2) * 0.2)
  upper = special.erfc(z[:-1]) - special.erfc(z[1:])
  lower = special.erfc(-z[1:]) - special.erfc(-z[:-1])
  mass = np.where(z[:-1] > 0, upper, lower)
  np.testing.assert_allclose(narrow, mass / mass.sum(), rtol=1e-9)
  assert (np.asarray(mass) > 0).all()
  # Padding has no mass.
  padded = processes.lognormal_levels(processes.karras_sigmas(11, length=14))
  np.testing.assert_allclose(padded[:10], p, rtol=1e-9)
  np.testing.assert_array_equal(padded[10:], 0)
  with one_line_error("std must be"):
    processes.lognormal_levels(sigmas, std=0.0)
  np.testing.assert_array_equal(processes.lognormal_levels(sigmas[:2]), [1])
  with one_line_error("2 or more levels"):
    processes.lognormal_levels(sigmas[:1])
  half = processes.lognormal_levels(sigmas.astype(jnp.bfloat16))
  assert half.dtype == jnp.float32
  with one_line_error(r"\[n\]"):
    processes.lognormal_levels(sigmas[None])


def test_lognormal_levels_keep_the_far_tail_in_float32():
  sigmas = jnp.array([1e-3, 1.0, 3000.0, 4000.0])
  p = processes.lognormal_levels(sigmas, mean=0.0, std=1.0)
  z = np.log(np.array([1e-3, 1.0, 3000.0, 4000.0])) / math.sqrt(2)
  tail = special.erfc(z[2]) - special.erfc(z[3])
  assert float(p[2]) == pytest.approx(tail / 2, rel=1e-2) and tail > 0


def test_sample_levels():
  p = jnp.array([0.5, 0.0, 0.2, 0.3])
  drawn = np.asarray(processes.sample_levels(keys(), p))
  shares = np.bincount(drawn, minlength=4) / N
  np.testing.assert_allclose(shares, p, atol=0.02)
  assert shares[1] == 0
  with one_line_error("probabilities must be"):
    processes.sample_levels(keys(1)[0], p[None])


def test_improved_ct_num_scales():
  # K = 8000, s1 / s0 = 128 = 2^7: 8 stages of 1000 steps.
  steps = jnp.array([0, 999, 1000, 2500, 6999, 7000, 7999, 10**6])
  np.testing.assert_array_equal(
      processes.improved_ct_num_scales(steps, 8000),
      np.array([10, 10, 20, 40, 640, 1280, 1280, 1280]) + 1,
  )
  # floor(100 / 3) = 33: log2(33) + 1 = 6.04 stages of floor(600 / 6.04) = 99.
  np.testing.assert_array_equal(
      processes.improved_ct_num_scales(
          jnp.array([98, 99, 494, 495, 594]), 600, s0=3, s1=100
      ),
      [4, 7, 3 * 2**4 + 1, 97, 101],
  )
  assert processes.improved_ct_num_scales(0, 5).dtype == jnp.int32
  assert int(processes.improved_ct_num_scales(2, 5)) == 41  # one step a stage
  for kwargs, match in (
      (dict(step=-1, total=5), "step"), (dict(step=0, total=0), "total"),
      (dict(step=0, total=5, s0=0), "s0"),
      (dict(step=0, total=5, s0=9, s1=8), "s1"),
  ):
    with one_line_error(match):
      processes.improved_ct_num_scales(**kwargs)


def test_consistency_num_scales(x64):
  k, total, s0, s1, mu0 = np.arange(0, 1001, 50), 1000, 2, 150, 0.9
  scales = np.ceil(np.sqrt(k / total * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1)
  scales = np.maximum(scales, 1) + 1
  n, mu = processes.consistency_num_scales(jnp.asarray(k), total)
  np.testing.assert_array_equal(n, scales)
  np.testing.assert_allclose(
      mu, np.exp(s0 * np.log(mu0) / (scales - 1)), rtol=1e-12
  )
  assert int(n[0]) == 2 and int(n[-1]) == 151
  n, mu = processes.consistency_num_scales(0, total, s0=2, s1=5, mu0=0.5)
  assert int(n) == 2 and float(mu) == pytest.approx(0.25)
  for kwargs, match in (
      (dict(step=-1, total=5), "step"), (dict(step=0, total=0), "total"),
      (dict(step=0, total=5, s0=1), "s0"),
      (dict(step=0, total=5, s0=9, s1=8), "s1"),
      (dict(step=0, total=5, mu0=1.0), "mu0"),
      (dict(step=0, total=5, mu0=0.0), "mu0"),
  ):
    with one_line_error(match):
      processes.consistency_num_scales(**kwargs)


def test_phase_intervals():
  assert processes.phase_intervals((1.0, 0.6, 0.0)) == ((0.6, 1.0), (0.0, 1.0))
  assert processes.phase_intervals((1.0, 0.5, 0.0), margin=0.02) == (
      (0.52, 1.0), (0.02, 1.0),
  )
  assert processes.phase_intervals((1.0, 0.0)) == ((0.0, 1.0),)
  for bad in ((1.0,), (0.9, 0.0), (1.0, 0.1), (1.0, 0.5, 0.5, 0.0)):
    with one_line_error("falling from 1 to 0"):
      processes.phase_intervals(bad)
  for margin in (0.5, -0.1):
    with one_line_error("margin"):
      processes.phase_intervals((1.0, 0.5, 0.0), margin=margin)


def test_ect_next_times(x64):
  t = np.array([0.01, 0.3, 2.0, 30.0])
  for stage, q, k, b in ((0, 2.0, 8.0, 1.0), (3, 4.0, 2.0, 0.5)):
    n = 1 + k / (1 + np.exp(b * t))
    np.testing.assert_allclose(
        processes.ect_next_times(jnp.asarray(t), stage, q=q, k=k, b=b),
        np.maximum(t * (1 - n / q ** (stage + 1)), 0), rtol=1e-12,
    )
    np.testing.assert_allclose(
        processes.ect_next_times(jnp.asarray(t), stage, q=q, adjust="const"),
        t * (1 - 1 / q ** (stage + 1)), rtol=1e-12,
    )
  assert float(processes.ect_next_times(jnp.array([0.01]), 0)[0]) == 0
  with one_line_error("did you mean 'sigmoid'"):
    processes.ect_next_times(jnp.asarray(t), 0, adjust="sigmod")
  with one_line_error("stage"):
    processes.ect_next_times(jnp.asarray(t), -1)
  with one_line_error("q must be"):
    processes.ect_next_times(jnp.asarray(t), 0, q=1.0)


def test_tbcm_route_lengths():
  assert processes.tbcm_route().shape == (16,)
  # u = 1 and 1/2 of a model with two times, shifted twice: 2.5 / 3.5, then
  # 2.5 x / (1 + 1.5 x).
  low = 2.5 / 3.5
  low = 2.5 * low / (1 + 1.5 * low)
  np.testing.assert_allclose(
      processes.tbcm_route(2, num_train=2),
      [math.pi / 2, math.atan2(low, 1 - low)], rtol=1e-6,
  )


def test_ect_next_times_are_wide():
  half = processes.ect_next_times(jnp.ones(2, jnp.bfloat16), 1)
  assert half.dtype == jnp.float32


def test_tbcm_route(x64):
  shift = lambda u, s: s * u / (1 + (s - 1) * u)
  for n, s in ((16, 2.5), (4, 3.0)):
    u = np.linspace(1, shift(1 / 1000, s), n)
    tau = shift(u, s)
    with np.errstate(divide="ignore"):
      expected = np.arctan(tau / (1 - tau))
    np.testing.assert_allclose(
        processes.tbcm_route(n, shift=s), expected, rtol=1e-9
    )
  route = processes.tbcm_route()
  assert float(route[0]) == pytest.approx(math.pi / 2)
  draws = jax.vmap(lambda key: processes.sample_tbcm_route(key, route))(
      keys(2000)
  )
  np.testing.assert_array_equal(draws[:, 0], route[0])
  place = (draws[:, 1:] - route[1:]) / (route[:-1] - route[1:])
  assert float(place.min()) >= 0 and float(place.max()) <= 1
  for k in (0, 7, 14):
    close(place[:, k], 0.5, 1 / math.sqrt(12))
  # The steps are drawn independently.
  assert abs(np.corrcoef(place[:, 0], place[:, 1])[0, 1]) < 0.1
  with one_line_error("n must be"):
    processes.tbcm_route(1)
  with one_line_error("num_train"):
    processes.tbcm_route(num_train=1)
  with one_line_error("route must be"):
    processes.sample_tbcm_route(keys(1)[0], route[None])


def test_ect_defaults_are_the_papers():
  """q = 2, k = 8, b = 1, in NumPy."""
  t = np.array([0.1, 1.0, 5.0], np.float32)
  n = 1 + 8 / (1 + np.exp(t))
  np.testing.assert_allclose(
    processes.ect_next_times(jnp.asarray(t), 4),
    t * (1 - n / 2**5),
    rtol=2e-6,
  )


def test_schedules_of_the_shortest_runs():
  """One step in all; as many stages as steps, each a step long."""
  assert processes.improved_ct_num_scales(0, 1, s0=1, s1=1) == 2
  levels = processes.improved_ct_num_scales(jnp.arange(5), 3, s0=1, s1=8)
  assert levels.tolist() == [2, 3, 5, 9, 9]
  # One interval at least where the square root asks for less.
  found, decay = processes.consistency_num_scales(0, 1, s0=2, s1=2)
  assert found == 2 and abs(float(decay) - 0.9**2) < 1e-6


def test_karras_counts_are_whole():
  with as_user(), one_line_error("length must be given when n is an array"):
    processes.karras_sigmas(2.5)


def test_mean_flow_equality_is_boolean():
  with as_user(), one_line_error("where_equal must be", TypeError):
    processes.sample_mean_flow_times(
      jax.random.split(jax.random.key(0), 2), where_equal=jnp.ones(2)
    )


def test_consistency_schedule_is_its_formula():
  k, s0, s1, total = np.arange(11), 3, 8, 10
  root = np.sqrt(k / total * ((s1 + 1) ** 2 - s0**2) + s0**2)
  levels, _ = processes.consistency_num_scales(
    jnp.arange(11), total, s0=s0, s1=s1
  )
  assert levels.tolist() == (np.ceil(root - 1) + 1).astype(int).tolist()


@pytest.mark.parametrize(
  "sample",
  [processes.sample_mean_flow_times, processes.sample_logit_normal_times],
)
def test_a_deviation_may_be_small(sample):
  keys = jax.random.split(jax.random.key(0), 4)
  narrow = sample(keys, mean=0.0, std=0.01)
  narrow = narrow[0] if isinstance(narrow, tuple) else narrow
  assert np.all(np.abs(np.asarray(narrow) - 0.5) < 0.02)
