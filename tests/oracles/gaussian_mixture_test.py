"""The oracle against quadrature, SciPy's densities and SciPy's ODE solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

import distilljax
from distilljax import oracles, processes
from distilljax.oracles import gaussian_mixture as gm
from tests.helpers import as_user, one_line_error

RF = processes.RectifiedFlow()
PATHS = {
    "rf": RF,
    "edm": processes.EDM(),
    "trig": processes.TrigFlow(0.5),
    "linear": processes.VariancePreserving.linear(),
    "cosine": processes.VariancePreserving.cosine(0.008),
}


def general():
  """Unequal weights, full covariances, two classes, in three dimensions."""
  rng = np.random.default_rng(0)
  rotations = np.linalg.qr(rng.normal(size=(4, 3, 3)))[0]
  return gm.make_gaussian_mixture(
      rng.normal(size=(4, 3)), 0.3 + rng.random((4, 3)), [1.0, 2.0, 3.0, 2.0],
      classes=[0, 1, 1, 0], rotations=rotations,
  )


def scipy_log_prob(mixture, x, alpha, sigma, components=None):
  """Log-density with SciPy's multivariate normals."""
  weights = np.asarray(mixture.weights)
  keep = range(len(weights)) if components is None else components
  total = 0.0
  for k in keep:
    rotation = (
        np.eye(mixture.dim) if mixture.rotations is None
        else np.asarray(mixture.rotations[k])
    )
    covariance = rotation @ np.diag(np.asarray(mixture.scales[k]) ** 2)
    covariance = covariance @ rotation.T
    total = total + weights[k] * stats.multivariate_normal.pdf(
        x, alpha * np.asarray(mixture.means[k]),
        alpha**2 * covariance + sigma**2 * np.eye(mixture.dim),
    )
  return np.log(total / weights[list(keep)].sum())


def test_log_prob(x64, strict):
  mixture = general()
  x = np.random.default_rng(1).normal(size=(6, 3))
  for alpha, sigma in ((1.0, 0.0), (0.6, 0.7), (1.0, 3.0)):
    np.testing.assert_allclose(
        mixture.log_prob(jnp.asarray(x), alpha, sigma),
        scipy_log_prob(mixture, x, alpha, sigma), rtol=1e-10,
    )
  np.testing.assert_allclose(
      mixture.log_prob(jnp.asarray(x)),
      scipy_log_prob(mixture, x, 1.0, 0.0), rtol=1e-10,
  )
  # A level for each row, and classes.
  alpha, sigma = np.linspace(0.2, 1, 6), np.linspace(1, 0.1, 6)
  labels = np.array([0, 1, 0, 1, 1, 0])
  ours = mixture.log_prob(
      jnp.asarray(x), jnp.asarray(alpha), jnp.asarray(sigma),
      labels=jnp.asarray(labels),
  )
  for i in range(6):
    expected = scipy_log_prob(
        mixture, x[i], alpha[i], sigma[i], [[0, 3], [1, 2]][labels[i]]
    )
    np.testing.assert_allclose(ours[i], expected, rtol=1e-10)


def test_score_is_the_gradient(x64):
  mixture = general()
  x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 3)))
  for alpha, sigma in ((1.0, 0.0), (0.6, 0.7)):
    gradient = jax.grad(
        lambda x, a=alpha, s=sigma: jnp.sum(mixture.log_prob(x, a, s))
    )(x)
    np.testing.assert_allclose(
        mixture.score(x, alpha, sigma), gradient, rtol=1e-9
    )
  np.testing.assert_allclose(
      mixture.score(x), mixture.score(x, 1.0, 0.0), rtol=1e-12
  )


def test_moments_by_quadrature(x64):
  """E[x0 | x_t] and E[noise | x_t] by integrating over x0 on a line."""
  means, scales, weights = [-1.0, 0.5, 2.0], [0.3, 0.6, 0.2], [0.2, 0.5, 0.3]
  mixture = gm.make_gaussian_mixture(
      np.array(means)[:, None], scales, weights
  )
  grid = np.linspace(-8, 8, 40001)
  prior = sum(
      w * stats.norm.pdf(grid, m, s)
      for w, m, s in zip(weights, means, scales, strict=True)
  )
  for alpha, sigma in ((0.7, 0.4), (1.0, 2.0), (0.05, 0.9)):
    for x in (-1.5, 0.2, 1.7):
      density = prior * stats.norm.pdf(x, alpha * grid, sigma)
      density = density / density.sum()
      x0 = (density * grid).sum()
      noise = (density * (x - alpha * grid) / sigma).sum()
      ours = mixture.moments(jnp.array([[x]]), alpha, sigma)
      np.testing.assert_allclose(ours[0], [[x0]], rtol=1e-7)
      np.testing.assert_allclose(ours[1], [[noise]], rtol=1e-7)


def test_moments_obey_tweedie_in_any_dimension(x64, strict):
  mixture = general()
  x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 3)))
  alpha = jnp.array([1.0, 0.7, 0.3, 0.9])
  sigma = jnp.array([2.0, 0.3, 0.9, 0.1])
  for labels in (None, jnp.array([0, 1, 1, 0])):
    x0, noise = mixture.moments(x, alpha, sigma, labels=labels)
    score = mixture.score(x, alpha, sigma, labels=labels)
    np.testing.assert_allclose(noise, -sigma[:, None] * score, rtol=1e-9)
    np.testing.assert_allclose(
        alpha[:, None] * x0 + sigma[:, None] * noise, x, rtol=1e-9
    )


@pytest.mark.parametrize("name", PATHS)
def test_predictions_on_every_path(name, x64):
  mixture, path = general(), PATHS[name]
  x = jnp.asarray(np.random.default_rng(4).normal(size=(3, 3)))
  t = jnp.array([0.1, 0.5, 0.9])
  # Both ends are finite, too.
  ends = jnp.array([0.0, 1.0, 1.0])

  @jax.jit
  def run(x, t, ends):
    x0, noise = mixture.moments(x, path.alpha(t), path.sigma(t))
    return x0, {
        kind: (
            path.target(x0, noise, t, kind),
            mixture.predict(x, t, path=path, target=kind),
            mixture.prediction_fn(path, kind)(x, t),
            mixture.predict(x, ends, path=path, target=kind),
        )
        for kind in path.predictions
    }

  with as_user():
    x0, out = run(x, t, ends)
  for kind, (expected, ours, closure, at_ends) in out.items():
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(closure, ours)
    assert bool(jnp.all(jnp.isfinite(at_ends))), kind
  np.testing.assert_allclose(mixture.predict(x, t, path=path), x0, rtol=1e-9)
  mean = np.asarray(mixture.weights) @ np.asarray(mixture.means)
  at_ends = out["x0"][3]
  if path.alpha_ends:
    np.testing.assert_allclose(at_ends[1:], np.tile(mean, (2, 1)), atol=1e-9)
  if path.sigma_starts:
    np.testing.assert_allclose(at_ends[0], x[0], atol=1e-9)


def test_classes_and_guidance(x64):
  mixture = general()
  x = jnp.asarray(np.random.default_rng(5).normal(size=(4, 3)))
  t = jnp.array([0.1, 0.4, 0.6, 0.9])
  labels = jnp.array([1, 0, 1, 0])
  kwargs = {"path": RF, "target": "velocity"}
  cond = mixture.predict(x, t, labels=labels, **kwargs)
  for label in (0, 1):
    alone = mixture.condition(label)
    assert float(alone.weights.sum()) == pytest.approx(1)
    rows = np.asarray(labels) == label
    np.testing.assert_allclose(
        cond[rows], alone.predict(x, t, **kwargs)[rows], rtol=1e-9
    )
    np.testing.assert_allclose(
        mixture.predict(x, t, labels=label, **kwargs)[rows], cond[rows],
        rtol=1e-12,
    )
  uncond = mixture.predict(x, t, **kwargs)
  guided = mixture.predict(x, t, labels=labels, guidance=3.0, **kwargs)
  np.testing.assert_allclose(guided, uncond + 3 * (cond - uncond), rtol=1e-9)
  by_row = mixture.predict(
      x, t, labels=labels, guidance=jnp.array([0.0, 1.0, 2.0, 1.0]), **kwargs
  )
  np.testing.assert_allclose(by_row[0], uncond[0], rtol=1e-9)
  np.testing.assert_allclose(by_row[1], cond[1], rtol=1e-9)
  np.testing.assert_allclose(
      mixture.prediction_fn(RF, "velocity", labels=labels, guidance=3.0)(x, t),
      guided, rtol=1e-12,
  )


def test_samples_of_any_shape(x64):
  mixture = gm.make_gaussian_mixture(
      np.random.default_rng(6).normal(size=(3, 12)), 0.5
  )
  x = jnp.asarray(np.random.default_rng(7).normal(size=(2, 2, 3, 2)))
  flat = x.reshape(2, 12)
  t = jnp.array([0.3, 0.8])
  np.testing.assert_allclose(
      mixture.predict(x, t, path=RF).reshape(2, 12),
      mixture.predict(flat, t, path=RF), rtol=1e-12,
  )
  assert mixture.score(x, 1.0, 0.5).shape == x.shape
  np.testing.assert_allclose(
      mixture.probability_flow(x, t, 0.1, path=RF, steps=4).reshape(2, 12),
      mixture.probability_flow(flat, t, 0.1, path=RF, steps=4), rtol=1e-12,
  )


@pytest.mark.parametrize("name", PATHS)
def test_flow_of_one_gaussian_is_closed(name, x64):
  rng = np.random.default_rng(8)
  rotation = np.linalg.qr(rng.normal(size=(2, 2)))[0]
  mean, scale = np.array([0.3, -1.0]), np.array([0.5, 2.0])
  mixture = gm.gaussian(mean, scale, rotations=rotation)
  path = PATHS[name]
  x = rng.normal(size=(3, 2))
  t, r = np.array([1.0, 0.8, 0.2]), np.array([0.0, 0.3, 0.9])

  @jax.jit
  def run(x, t, r):
    return (
        mixture.probability_flow(x, t, r, path=path, steps=256),
        gm.gaussian_flow_map(mixture, x, t, r, path=path),
    )

  ours, exact = run(jnp.asarray(x), jnp.asarray(t), jnp.asarray(r))
  np.testing.assert_allclose(ours, exact, rtol=1e-7, atol=1e-7)
  # Independent: along the axes x_r - alpha_r m scales with its deviation.
  (a_t, s_t), (a_r, s_r) = (
      (np.asarray(a)[:, None] for a in path.coefficients(jnp.asarray(u))[:2])
      for u in (t, r)
  )
  y = (x - a_t * mean) @ rotation
  y = y * np.sqrt(
      (a_r**2 * scale**2 + s_r**2) / (a_t**2 * scale**2 + s_t**2)
  )
  np.testing.assert_allclose(exact, y @ rotation.T + a_r * mean, rtol=1e-9)


def test_flow_of_the_ring_by_scipy(x64):
  """dx/dt = velocity on the straight path, by DOP853 at 1e-10."""
  mixture = oracles.ring8()
  x = np.random.default_rng(9).normal(size=(8, 2))
  velocity = jax.jit(mixture.prediction_fn(RF, "velocity"))

  def slope(t, flat):
    with as_user():
      return np.asarray(velocity(jnp.asarray(flat.reshape(8, 2)), t)).ravel()

  exact = integrate.solve_ivp(
      slope, (1.0, 0.0), x.ravel(), method="DOP853", rtol=1e-10, atol=1e-10
  ).y[:, -1].reshape(8, 2)

  @jax.jit
  def run(x, exact):
    flow = lambda x, t, r, path, **kwargs: mixture.probability_flow(
        x, t, r, path=path, **kwargs
    )
    return (
        flow(x, 1.0, 0.0, RF, steps=64),
        flow(x, 1.0, 0.0, RF),
        flow(exact, 0.0, 1.0, RF, steps=512),
        # A path of another time ends where this one does.
        flow(x, 1.0, 0.0, processes.VariancePreserving.cosine(), steps=512),
    )

  coarse, default, back, cosine = run(jnp.asarray(x), jnp.asarray(exact))
  errors = [float(np.abs(a - exact).max()) for a in (coarse, default, cosine)]
  assert errors[2] < 1e-7 and errors[1] < 3e-5  # steps^-4
  assert errors[1] < errors[0] / 10
  np.testing.assert_allclose(back, x, atol=1e-5)


def test_guided_flow_uses_the_guided_velocity(x64):
  mixture = oracles.two_class()
  x = jnp.asarray(np.random.default_rng(10).normal(size=(4, 2)))
  labels = jnp.array([0, 1, 1, 0])
  h, t = 1e-4, 0.6
  for kwargs in ({"labels": labels}, {"labels": labels, "guidance": 3.0}):
    moved = mixture.probability_flow(x, t, t - h, path=RF, steps=2, **kwargs)
    velocity = mixture.predict(x, t, path=RF, target="velocity", **kwargs)
    np.testing.assert_allclose((x - moved) / h, velocity, rtol=2e-3, atol=2e-3)


def test_mean_velocity(x64):
  mixture = oracles.ring8()
  x = jnp.asarray(np.random.default_rng(11).normal(size=(3, 2)))
  t, r = jnp.array([1.0, 0.8, 0.5]), jnp.array([0.0, 0.8, 0.2])

  @jax.jit
  def run(x, t, r):
    return (
        mixture.mean_velocity(x, t, r, path=RF),
        mixture.probability_flow(x, t, r, path=RF),
    )

  u, end = run(x, t, r)
  velocity = mixture.predict(x, t, path=RF, target="velocity")
  np.testing.assert_allclose(u[1], velocity[1], rtol=1e-12)
  np.testing.assert_allclose(
      x - (t - r)[:, None] * u, end, rtol=1e-9, atol=1e-12
  )
  near, _ = run(x, t, t - 1e-5)
  np.testing.assert_allclose(near, velocity, rtol=1e-3, atol=1e-3)


def test_sampling(x64):
  mixture = general()
  x, modes = mixture.sample_with_modes(jax.random.key(0), 40_000)
  assert x.shape == (40_000, 3)
  shares = np.bincount(np.asarray(modes), minlength=4) / 40_000
  np.testing.assert_allclose(shares, mixture.weights, atol=0.01)
  for k in range(4):
    own = np.asarray(x)[np.asarray(modes) == k]
    rotation = np.asarray(mixture.rotations[k])
    covariance = (
        rotation @ np.diag(np.asarray(mixture.scales[k]) ** 2) @ rotation.T
    )
    np.testing.assert_allclose(own.mean(0), mixture.means[k], atol=0.06)
    np.testing.assert_allclose(np.cov(own.T), covariance, atol=0.1)
  np.testing.assert_array_equal(
      mixture.sample(jax.random.key(0), 7),
      mixture.sample_with_modes(jax.random.key(0), 7)[0],
  )
  labels = jnp.arange(2000) % 2
  _, modes = mixture.sample_with_modes(jax.random.key(1), 2000, labels=labels)
  np.testing.assert_array_equal(mixture.classes[modes], labels)
  _, modes = mixture.sample_with_modes(jax.random.key(2), 3000, labels=1)
  shares = np.bincount(np.asarray(modes), minlength=4) / 3000
  np.testing.assert_allclose(shares, [0, 0.4, 0.6, 0], atol=0.04)


def test_stratified_sampling(x64):
  # n = 10: 0.05 | 0.15 .. 0.35 | 0.45 .. 0.65 | 0.75 .., the last at an edge.
  for n, expected in ((64, [8, 16, 24, 16]), (10, [1, 3, 3, 3])):
    _, modes = general().sample_with_modes(
        jax.random.key(0), n, stratified=True
    )
    counts = np.bincount(np.asarray(modes), minlength=4)
    assert counts.sum() == n
    assert np.abs(counts - n * np.array([1, 2, 3, 2]) / 8).max() < 1
    np.testing.assert_array_equal(counts, expected)
  _, modes = oracles.ring8().sample_with_modes(
      jax.random.key(0), 4096, stratified=True
  )
  np.testing.assert_array_equal(np.bincount(np.asarray(modes)), 512)
  with one_line_error("labels must be None"):
    general().sample(jax.random.key(0), 4, labels=0, stratified=True)


def test_assign_and_deviations(x64):
  ring = oracles.ring8()
  np.testing.assert_array_equal(ring.assign(ring.means), np.arange(8))
  x, modes = ring.sample_with_modes(jax.random.key(0), 512)
  np.testing.assert_array_equal(ring.assign(x), modes)
  # The weights decide in the middle between equal components.
  pair = gm.make_gaussian_mixture([[-1.0], [1.0]], 0.5, [1.0, 9.0])
  np.testing.assert_array_equal(pair.assign(jnp.array([[0.0], [-0.9]])), [1, 0])
  mixture = general()
  k, offset = 2, np.array([1.0, -2.0, 0.5])
  x = mixture.means[k] + mixture.rotations[k] @ (mixture.scales[k] * offset)
  np.testing.assert_allclose(
      mixture.deviations(x[None])[0, k], np.linalg.norm(offset), rtol=1e-9
  )
  np.testing.assert_allclose(
      ring.deviations(jnp.array([[1.4, 0.3]]))[0, 0], 3.0, rtol=1e-9
  )


def test_constructors(x64):
  ring = oracles.ring8()
  assert ring.means.shape == (8, 2) and ring.dim == 2
  np.testing.assert_allclose(np.linalg.norm(ring.means, axis=1), 1.4)
  np.testing.assert_allclose(ring.means[0], [1.4, 0], atol=1e-12)
  np.testing.assert_allclose(ring.means[2], [0, 1.4], atol=1e-12)
  np.testing.assert_allclose(ring.scales, 0.1)
  np.testing.assert_allclose(ring.weights, 1 / 8)
  np.testing.assert_array_equal(ring.classes, np.arange(8))
  unit = oracles.unit_ring(std=0.2)
  variance = (np.asarray(unit.means) ** 2).mean(0) + 0.04
  np.testing.assert_allclose(variance, 1, rtol=1e-12)
  np.testing.assert_allclose(unit.scales, 0.2)
  np.testing.assert_allclose(oracles.unit_ring().scales, 0.1)
  grid = oracles.grid25(spacing=2.0, std=0.3)
  assert sorted(set(np.asarray(grid.means).ravel().tolist())) == [
      -4.0, -2.0, 0.0, 2.0, 4.0
  ]
  assert len(np.unique(np.asarray(grid.means), axis=0)) == 25
  np.testing.assert_allclose(grid.scales, 0.3)
  for column in range(5):
    own = np.asarray(grid.means)[np.asarray(grid.classes) == column]
    np.testing.assert_allclose(own[:, 0], 2.0 * (column - 2))
  points = oracles.two_points()
  np.testing.assert_allclose(points.means, [[-1], [2]])
  np.testing.assert_allclose(points.scales, 0)
  classes = oracles.two_class()
  np.testing.assert_allclose(classes.weights, [1 / 3, 1 / 3, 1 / 6, 1 / 6])
  np.testing.assert_allclose(np.sign(classes.means[:, 0]), [-1, -1, 1, 1])
  np.testing.assert_array_equal(classes.classes, [0, 0, 1, 1])
  assert ring.means.dtype == jnp.float64


def test_float32_and_bfloat16(strict):
  ring = oracles.ring8()
  assert ring.means.dtype == jnp.float32
  x = jnp.ones((2, 2), jnp.bfloat16)
  t = jnp.array([0.5, 0.25], jnp.bfloat16)
  assert ring.predict(x, t, path=RF, target="v").dtype == jnp.float32
  assert ring.score(x, 1.0, 0.5).dtype == jnp.float32
  assert ring.log_prob(x).dtype == jnp.float32
  end = ring.probability_flow(x, 1.0, 0.0, path=RF, steps=2)
  assert end.dtype == jnp.float32
  far = ring.predict(
      jnp.array([[1e4, -1e4]]), jnp.array([1e-3]), path=RF, target="x0"
  )
  assert bool(jnp.all(jnp.isfinite(far)))


def test_bad_input():
  ring, make = oracles.ring8(), gm.make_gaussian_mixture
  x = jnp.ones((3, 2))
  for call, match in (
      (lambda: ring.score(jnp.ones((3, 4))), "2 values a row"),
      (lambda: ring.log_prob(x, jnp.ones(2), 0.5), "alpha must be"),
      (lambda: ring.moments(x, 1.0, jnp.ones(2)), "sigma must be"),
      (lambda: ring.predict(x, 0.5, path=RF, target="velocty"), "did you mean"),
      (lambda: ring.predict(x, 1.5, path=RF), r"t must be in \[0, 1\]"),
      (lambda: ring.predict(x, 0.5, path=RF, guidance=2.0), "labels must be"),
      (lambda: ring.condition(9), "label must be one of"),
      (lambda: ring.sample(jax.random.key(0), 0), "n must be"),
      (lambda: ring.probability_flow(x, 1.0, 0.0, path=RF, steps=0), "steps"),
      (lambda: make([1.0], 1.0), r"\[k, d\]"),
      (lambda: make(np.ones((0, 2)), 1.0), "non-empty"),
      (lambda: make([[1.0]], -1.0), "scales must be >= 0"),
      (lambda: make([[1.0]], [1.0, 2.0]), "scales must be"),
      (lambda: make([[1.0]], 1.0, [0.0]), "weights must be > 0"),
      (lambda: make([[1.0]], 1.0, [1.0, 1.0]), "weights must be"),
      (lambda: make([[1.0]], 1.0, classes=[1, 2]), "classes must be"),
      (lambda: make([[1.0]], 1.0, rotations=[[[2.0]]]), "orthogonal"),
      (lambda: make([[1.0]], 1.0, rotations=[[2.0]]), "rotations must be"),
      (lambda: oracles.ring(0), "k must be"),
      (lambda: oracles.unit_ring(2), "k must be"),
      (lambda: oracles.unit_ring(std=1.0), "std must be"),
      (lambda: oracles.gaussian([[0.0]], 1.0), "mean must be"),
  ):
    with one_line_error(match):
      call()
  with one_line_error("floating", TypeError):
    ring.score(jnp.ones((3, 2), jnp.int32))
  with one_line_error("integer", TypeError):
    ring.score(x, labels=jnp.ones(3))
  with distilljax.debug(), one_line_error("labels must be classes"):
    ring.score(x, labels=jnp.array([0, 1, 9]))
