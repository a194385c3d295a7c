"""Properties that must hold for any time, shift, data and guidance."""

import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from distilljax import processes
from tests.helpers import as_user
from tests.processes.path_test import PATHS

B = 8
UNIT = st.floats(0, 1, width=32)
TIMES = st.lists(UNIT, min_size=B, max_size=B)
SEED = st.integers(0, 2**31 - 1)
SHIFT = st.floats(0.125, 8, width=32)


def images(seed, n):
  draw = np.random.default_rng(seed).normal(size=(n, B, 3))
  return jnp.asarray(draw, jnp.float32)


@functools.cache
def round_trips(name):
  """Errors of every pair there and back, in units of its conditioning."""
  path = PATHS[name]

  @jax.jit
  def run(x0, noise, t):
    out = {}
    # There and back again uses both directions of a pair.
    for a, b in itertools.combinations(path.predictions, 2):
      (low, high), (low2, high2) = (
          path.conversion_range(*pair) for pair in ((a, b), (b, a))
      )
      inside = jnp.clip(t, max(low, low2), min(high, high2))
      x_t = path.add_noise(x0, noise, inside)
      source = path.target(x0, noise, inside, a)
      wanted = path.target(x0, noise, inside, b)
      there = path.convert(source, x_t, inside, a, b)
      back = path.convert(there, x_t, inside, b, a)
      largest = jnp.stack([jnp.abs(source), jnp.abs(wanted), jnp.abs(x_t)])
      unit = jnp.max(largest, (0, 2)) * path.conditioning(inside, a, b)
      errors = jnp.stack([jnp.abs(there - wanted), jnp.abs(back - source)])
      out[a, b] = jnp.max(errors, 2) / unit
    return out

  return run


@pytest.mark.parametrize("name", ["rf", "edm", "trig", "linear", "cosine"])
def test_every_pair_of_predictions_round_trips(name):
  @hypothesis.given(
      t=TIMES, seed=SEED, scale=st.sampled_from([0.01, 1.0, 50.0])
  )
  def run(t, seed, scale):
    x0, noise = images(seed, 2)
    with as_user():
      errors = round_trips(name)(scale * x0, noise, jnp.float32(t))
    for pair, error in errors.items():
      assert float(jnp.max(error)) <= 1e-5, (pair, t)

  run()


@hypothesis.given(t=TIMES, a=SHIFT, b=SHIFT)
def test_shifts_are_a_group_that_keeps_order(t, a, b):
  t = jnp.float32(sorted(t))
  shift = lambda t, s: processes.shift_time(t, shift=s)
  warped = shift(t, a)
  # d t / d warped is at most max(a, 1 / a) <= 8.
  np.testing.assert_allclose(shift(warped, 1 / a), t, atol=1e-5)
  np.testing.assert_allclose(shift(warped, b), shift(t, a * b), atol=1e-5)
  assert np.all(np.diff(warped) >= 0)
  assert np.all((warped - t) * np.sign(a - 1) >= -1e-6)  # a > 1: to noise
  ends = shift(jnp.array([0.0, 1.0]), a)
  np.testing.assert_allclose(ends, [0, 1], atol=1e-6)


@hypothesis.given(
    n=st.sampled_from([1, 4, 33]), start=st.floats(0.5, 1),
    end=st.floats(0, 0.49), shift=SHIFT,
)  # fmt: skip
def test_time_grids_fall_between_their_ends(n, start, end, shift):
  grid = np.asarray(
      processes.time_grid(n, start=start, end=end, shift=shift), np.float64
  )
  assert grid.shape == (n + 1,) and np.all(np.diff(grid) < 0)
  warp = lambda t: shift * t / (1 + (shift - 1) * t)
  np.testing.assert_allclose(grid[[0, -1]], [warp(start), warp(end)], atol=1e-6)


@hypothesis.given(
    n=st.integers(2, 60), low=st.floats(1e-3, 0.1), high=st.floats(1, 100),
    rho=st.floats(1, 9),
)  # fmt: skip
def test_karras_levels_rise_between_their_ends(n, low, high, rho):
  levels = np.asarray(
      processes.karras_sigmas(n, sigma_min=low, sigma_max=high, rho=rho),
      np.float64,
  )
  assert levels.shape == (n,) and np.all(np.diff(levels) > 0)
  np.testing.assert_allclose(levels[[0, -1]], [low, high], rtol=1e-5)
  # Even in sigma^(1/rho).
  gaps = np.diff(levels ** (1 / rho))
  np.testing.assert_allclose(gaps, gaps.mean(), rtol=1e-3)


@pytest.mark.parametrize("name", PATHS)
def test_log_snr_falls_and_inverts(name):
  path = PATHS[name]
  run = jax.jit(
      lambda t: (path.log_snr(t), path.t_from_log_snr(path.log_snr(t)))
  )

  @hypothesis.given(t=TIMES)
  def check(t):
    # Apart, and away from the ends where a log-SNR is infinite.
    t = jnp.float32(0.02 + 0.9 * np.sort(t) + 0.01 * np.arange(B))
    with as_user():
      log_snr, again = run(t)
    assert np.all(np.diff(log_snr) < 0)
    np.testing.assert_allclose(again, t, atol=2e-5)

  check()


@hypothesis.given(
    steps=st.lists(st.integers(0, 5000), min_size=B, max_size=B),
    total=st.integers(100, 5000), s0=st.integers(2, 20),
    s1=st.integers(20, 1300),
)  # fmt: skip
def test_numbers_of_levels_never_fall(steps, total, s0, s1):
  steps = jnp.asarray(sorted(steps), jnp.int32)
  improved = processes.improved_ct_num_scales(steps, total, s0=s0, s1=s1)
  first, decay = processes.consistency_num_scales(
      jnp.minimum(steps, total), total, s0=s0, s1=s1
  )
  for scales in (improved, first):
    assert np.all(np.diff(scales) >= 0)
    assert np.all(scales <= s1 + 1)
  assert np.all(improved >= s0 + 1) and np.all(first >= s0)
  assert np.all(np.diff(decay) >= 0) and np.all((decay > 0) & (decay < 1))


@functools.cache
def exact_samplers(name):
  """Samplers with the exact denoiser of a one-point law (the true x0)."""
  path = PATHS[name]

  @jax.jit
  def run(x0, noise, times):
    x = path.add_noise(x0, noise, times[0])
    exact = lambda x, t: x0
    out = {
        "ddim": processes.ancestral(exact, x, times, path=path, eta=0.0),
        "dpm_solver": processes.dpm_solver(exact, x, times, path=path),
    }
    if name == "rf":
      # Straight lines: the velocity is the chord's, whatever the end.
      velocity = lambda x, t: (x - x0) / t[:, None]
      out["euler"] = processes.euler(velocity, x, times)
      out["heun"] = processes.heun(velocity, x, times, euler_last=True)
      out["flow_map"] = processes.flow_map(
          lambda x, t, r: velocity(x, t), x, times
      )
    return out, path.add_noise(x0, noise, times[-1])

  return run


@pytest.mark.parametrize("name", ["rf", "edm", "trig", "linear", "cosine"])
def test_samplers_with_the_exact_denoiser_stay_on_the_path(name):
  """x_t = alpha x0 + sigma noise at every time; at t = 0 that is the data."""

  @hypothesis.given(
      inner=st.lists(UNIT, min_size=3, max_size=3), seed=SEED,
      to_data=st.booleans(),
  )  # fmt: skip
  def check(inner, seed, to_data):
    x0, noise = images(seed, 2)
    inner = 0.05 + 0.8 * np.sort(inner)[::-1] + 0.02 * np.arange(3)[::-1]
    times = jnp.float32([0.95, *inner, 0.0 if to_data else 0.02])
    with as_user():
      out, wanted = exact_samplers(name)(x0, noise, times)
    size = 1 + float(jnp.max(jnp.abs(x0)) + jnp.max(jnp.abs(noise)))
    for sampler, x in out.items():
      np.testing.assert_allclose(
          x, wanted, atol=2e-5 * size * (10 if name == "edm" else 1),
          err_msg=sampler,
      )
      if to_data and name != "edm":  # EDM's t = 0 is sigma_min
        np.testing.assert_allclose(x, x0, atol=2e-5 * size, err_msg=sampler)

  check()


@hypothesis.given(
    seed=SEED, w=st.floats(-3, 9, width=32), u=st.floats(-3, 9, width=32)
)
def test_guidance_identities(seed, w, u):
  uncond, cond = images(seed, 2)
  guide = processes.guide
  close = functools.partial(np.testing.assert_allclose, atol=1e-3, rtol=1e-5)
  close(guide(uncond, uncond, w), uncond)
  close(guide(uncond, cond, w), guide(cond, uncond, 1 - w))
  close(
      guide(uncond, guide(uncond, cond, w), u), guide(uncond, cond, w * u)
  )
  extra = processes.guidance_from(w, convention="extra")
  close(guide(uncond, cond, extra), cond + w * (cond - uncond))


@pytest.mark.parametrize("measure", ["std", "norm"])
def test_rescaled_guidance_has_the_size_asked_for(measure):
  @hypothesis.given(
      seed=SEED, w=st.floats(1, 9, width=32), share=UNIT, k=st.floats(0.1, 10)
  )
  def check(seed, w, share, k):
    uncond, cond = images(seed, 2)
    guided = processes.guide(uncond, cond, w)
    run = functools.partial(processes.rescale_guidance, measure=measure)
    size = (
        functools.partial(np.std, axis=1) if measure == "std"
        else functools.partial(np.linalg.norm, axis=1)
    )
    out = run(guided, cond, share=share)
    np.testing.assert_allclose(
        size(out), share * size(cond) + (1 - share) * size(guided),
        rtol=1e-4, atol=1e-5,
    )
    # Only the size changes, and with share 1 the one it had is forgotten.
    np.testing.assert_allclose(
        np.asarray(out) * np.asarray(guided)[:, :1],
        np.asarray(guided) * np.asarray(out)[:, :1], rtol=1e-4, atol=1e-4,
    )
    np.testing.assert_allclose(
        run(k * guided, cond, share=1.0), run(guided, cond, share=1.0),
        rtol=1e-4, atol=1e-5,
    )

  check()
