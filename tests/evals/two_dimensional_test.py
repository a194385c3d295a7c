"""2-D scores against brute force, and their floors against measured ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import evals, oracles
from distilljax.evals import two_dimensional
from tests.helpers import one_line_error

LONG_PROGRAMS = True


def samples(n, m, d=2, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, d)), 0.5 + 1.5 * rng.normal(size=(m, d))


@pytest.mark.parametrize("n, m, d", [(40, 30, 2), (300, 257, 3), (2, 2, 1)])
def test_energy_distance(n, m, d, x64):
  x, y = samples(n, m, d)
  distance = lambda a, b: np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
  expected = (
      2 * distance(x, y).mean()
      - distance(x, x).sum() / (n * (n - 1))
      - distance(y, y).sum() / (m * (m - 1))
  )
  ours = evals.energy_distance(jnp.asarray(x), jnp.asarray(y))
  np.testing.assert_allclose(ours, expected, rtol=1e-10)
  np.testing.assert_allclose(
      evals.energy_distance(jnp.asarray(y), jnp.asarray(x)), expected,
      rtol=1e-10,
  )


def test_energy_distance_of_a_shift(x64):
  """Far apart it tends to twice the distance, less the spreads."""
  x, _ = samples(50, 50)
  far = evals.energy_distance(jnp.asarray(x), jnp.asarray(x) + 1e6)
  assert float(far) == pytest.approx(2e6 * np.sqrt(2), rel=1e-4)


def test_sliced_wasserstein(x64):
  x, y = samples(50, 50)
  total = 0
  for k in range(16):
    direction = np.array([np.cos(np.pi * k / 16), np.sin(np.pi * k / 16)])
    total += ((np.sort(x @ direction) - np.sort(y @ direction)) ** 2).mean()
  ours = evals.sliced_wasserstein(
      jnp.asarray(x), jnp.asarray(y), directions=16
  )
  np.testing.assert_allclose(ours, np.sqrt(total / 16), rtol=1e-10)
  # A shift s moves every projection by its component: root of |s|^2 / 2.
  shifted = jnp.asarray(x) + jnp.array([3.0, 4.0])
  assert float(
      evals.sliced_wasserstein(jnp.asarray(x), shifted)
  ) == pytest.approx(5 / np.sqrt(2), rel=1e-9)
  # Any dimension, with directions of one's own.
  x3, y3 = samples(20, 20, 3)
  axes = jnp.eye(3)
  expected = np.sqrt(((np.sort(x3, 0) - np.sort(y3, 0)) ** 2).mean())
  np.testing.assert_allclose(
      evals.sliced_wasserstein(
          jnp.asarray(x3), jnp.asarray(y3), directions=axes
      ),
      expected, rtol=1e-10,
  )
  order = np.random.default_rng(0).permutation(50)
  assert float(evals.sliced_wasserstein(
      jnp.asarray(x), jnp.asarray(x[order])
  )) < 1e-12


def test_modes():
  ring = oracles.ring8()
  # 4 points on mode 0, 3 on mode 1, 1 on mode 2.
  x = ring.means[jnp.array([0, 0, 0, 0, 1, 1, 1, 2])]
  np.testing.assert_allclose(
      evals.mode_frequencies(x, ring),
      np.array([4, 3, 1, 0, 0, 0, 0, 0]) / 8,
  )
  expected = 0.5 * (3 + 2 + 0 + 5) / 8
  assert float(evals.mode_frequency_tv(x, ring)) == pytest.approx(expected)
  assert int(evals.modes_covered(x, ring)) == 3
  assert int(evals.modes_covered(x, ring, share=1.5)) == 2
  # At exactly the share a mode counts.
  assert int(evals.modes_covered(x, ring, share=1)) == 3
  assert float(evals.mode_frequency_tv(ring.means, ring)) == pytest.approx(0)


def test_share_within(x64):
  ring = oracles.ring8()
  offsets = jnp.array([0.0, 0.25, 0.39, 0.41, 1.0])
  x = ring.means[:1] + jnp.stack([offsets, jnp.zeros(5)], axis=1)
  assert float(evals.share_within(x, ring)) == pytest.approx(3 / 5)
  assert float(evals.share_within(x, ring, radius=2.0)) == pytest.approx(1 / 5)
  with one_line_error("radius"):
    evals.share_within(x, ring, radius=0.0)


# Mean and deviation of one pair, 4096 points on ring8, 64 directions.
MEASURED = {
    "sw2 random/random": (0.060, 0.015),
    "sw2 random/stratified": (0.049, 0.013),
    "sw2 stratified/stratified": (0.0085, 0.0004),
    "energy random": (0.0, 6e-4),
    "energy stratified": (0.0, 4e-4),
    "tv": (0.017, 0.004),
}


def floors():
  ring, key = oracles.ring8(), jax.random.key(0)
  exact = functools.partial(ring.sample, n=4096, stratified=True)
  return {
      "sw2 random/random": evals.sliced_wasserstein_floor(
          ring, key, stratified=False),
      "sw2 random/stratified": evals.sliced_wasserstein_floor(ring, key),
      "sw2 stratified/stratified": evals.two_sample_floor(
          evals.sliced_wasserstein, exact, exact, key),
      "energy random": evals.energy_distance_floor(
          ring, key, stratified=False, repeats=4),
      "energy stratified": evals.energy_distance_floor(ring, key, repeats=4),
      "tv": evals.mode_frequency_tv_floor(ring, key),
  }


def test_floors_are_those_measured():
  for name, floor in floors().items():
    mean, std = MEASURED[name]
    repeats = 4 if "energy" in name else 8
    # Four standard errors of the mean; the deviation itself to a factor 2.5.
    assert abs(floor.mean - mean) < 4 * std / np.sqrt(repeats), (name, floor)
    assert std / 2.5 < floor.std < 2.5 * std, (name, floor)


def test_share_within_floor():
  floor = evals.share_within_floor(oracles.ring8(), jax.random.key(0))
  truth = 1 - np.exp(-8)
  assert floor.mean == pytest.approx(truth, abs=4e-4)
  half = evals.share_within_floor(
      oracles.ring8(), jax.random.key(0), radius=1.0, n=2048, repeats=2
  )
  assert half.mean == pytest.approx(1 - np.exp(-0.5), abs=0.03)


def test_gaussian_baseline_is_far_above_the_floor():
  ring = oracles.ring8()
  reference = ring.sample(jax.random.key(1), 4096, stratified=True)
  gaussian = jax.random.normal(jax.random.key(2), (4096, 2))
  assert float(
      evals.sliced_wasserstein(gaussian, reference)
  ) == pytest.approx(0.31, abs=0.03)
  assert float(
      evals.energy_distance(gaussian, reference)
  ) == pytest.approx(0.056, abs=0.01)


def test_two_sample_floor_draws_anew():
  keys = []

  def metric(x, y):
    keys.append(1)
    return x - y

  draw = lambda key: jax.random.normal(key)
  floor = evals.two_sample_floor(
      metric, draw, draw, jax.random.key(0), repeats=400
  )
  # Independent unit normals: the difference has variance 2.
  assert floor.std == pytest.approx(np.sqrt(2), rel=0.1)
  assert abs(floor.mean) < 0.3
  two = evals.two_sample_floor(
      lambda x, y: x + 0 * y, draw, draw, jax.random.key(0), repeats=2
  )
  a = [
      float(jax.random.normal(jax.random.split(k)[0]))
      for k in jax.random.split(jax.random.key(0), 2)
  ]
  assert two.std == pytest.approx(abs(a[0] - a[1]) / np.sqrt(2), rel=1e-5)


def test_dtypes(strict):
  x = jnp.ones((4, 2), jnp.bfloat16)
  y = jnp.ones((4, 2), jnp.float32)
  assert evals.energy_distance(x, y).dtype == jnp.float32
  assert evals.sliced_wasserstein(x, y).dtype == jnp.float32
  assert evals.mode_frequencies(x, oracles.ring8()).dtype == jnp.float32


def test_bad_input():
  x = jnp.ones((4, 2))
  for call, match in (
      (lambda: evals.energy_distance(x, jnp.ones((4, 3))), "y must be"),
      (lambda: evals.energy_distance(x[0], x), "x must be"),
      (lambda: evals.energy_distance(x[:1], x), "2 or more points"),
      (lambda: evals.energy_distance(x, x[:1]), "2 or more points"),
      (lambda: evals.energy_distance(x[:0], x), "non-empty"),
      (lambda: evals.sliced_wasserstein(x, x[:3]), "y must be"),
      (lambda: evals.sliced_wasserstein(x, x, directions=0), "directions"),
      (lambda: evals.sliced_wasserstein(x, x, directions=x[0]), "directions"),
      (lambda: evals.sliced_wasserstein(
          jnp.ones((4, 3)), jnp.ones((4, 3))), "directions must be vectors"),
      (lambda: two_dimensional.two_sample_floor(
          None, None, None, jax.random.key(0), repeats=1), "repeats"),
  ):
    with one_line_error(match):
      call()
  with one_line_error("floating", TypeError):
    evals.energy_distance(jnp.ones((4, 2), jnp.int32), x)
