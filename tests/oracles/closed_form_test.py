"""Losses held against problems whose answer is known; nothing is trained.

A loss is right when its fixed point is the truth: the exact score of the
student's own samples, the exact flow map, the exact consistency function.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses, oracles, processes
from distilljax.oracles import gaussian_mixture as gm

RF = processes.RectifiedFlow()
COL = lambda a: a[:, None]


def noisy(mixture, path, n=4, seed=0):
  """(x0, noise, t, x_t) of the mixture's own samples, float64."""
  of_x0, of_noise, of_t = jax.random.split(jax.random.key(seed), 3)
  x0 = mixture.sample(of_x0, n)
  noise = jax.random.normal(of_noise, x0.shape, x0.dtype)
  t = jax.random.uniform(of_t, (n,), x0.dtype, 0.05, 0.95)
  return x0, noise, t, path.add_noise(x0, noise, t)


# --- distribution matching ---------------------------------------------------


def test_the_fake_scores_fixed_point_leaves_no_direction(x64):
  """A student with the teacher's law, and the critic that fits it exactly."""
  teacher, student = oracles.ring8(), oracles.ring8()
  x, _, t, x_t = noisy(student, RF)
  real = teacher.predict(x_t, t, path=RF)
  fake = student.predict(x_t, t, path=RF)
  eps = functools.partial(student.predict, x_t, t, path=RF, target="epsilon")
  for direction in (
      losses.dmd_direction(x, real, fake),
      losses.diff_instruct_direction(real, fake),
      losses.vsd_direction(eps(), eps(), RF.sigma(t)),
  ):
    np.testing.assert_array_equal(direction, 0)
  np.testing.assert_array_equal(losses.sid_loss(x, real, fake), 0)
  # Any other student has one.
  other = oracles.ring(8, radius=1.2, std=0.1).predict(x_t, t, path=RF)
  assert float(jnp.min(jnp.max(
      jnp.abs(losses.dmd_direction(x, real, other)), axis=1
  ))) > 1e-6


def test_directions_are_the_gradient_of_a_known_divergence(x64):
  """Equal Gaussians about m (student) and M: one closed form everywhere.

  fake_x0 - real_x0 = (sigma^2 / alpha) (score_fake - score_real) and the scores
  differ by alpha (m - M) / c, c = alpha^2 s^2 + sigma^2, so that it is
  sigma^2 (m - M) / c: along the gradient of KL in m, away from the truth.
  """
  m, big_m, s = np.array([1.0, -0.5]), np.array([0.2, 0.7]), 0.6
  student, teacher = oracles.gaussian(m, s), oracles.gaussian(big_m, s)
  x, noise, t, x_t = noisy(student, RF)
  alpha, sigma = RF.alpha(t), RF.sigma(t)
  c = COL(alpha**2 * s**2 + sigma**2)
  real, fake = (p.predict(x_t, t, path=RF) for p in (teacher, student))
  expected = COL(sigma) ** 2 * (m - big_m) / c
  np.testing.assert_allclose(
      losses.diff_instruct_direction(real, fake), expected, rtol=1e-9
  )
  scale = jnp.mean(jnp.abs(x - real), axis=1, keepdims=True)
  np.testing.assert_allclose(
      losses.dmd_direction(x, real, fake, eps=0.0), expected / scale, rtol=1e-9
  )
  # VSD: sigma^2 (eps_T - eps_F) = sigma^3 (score_F - score_T).
  eps = [p.predict(x_t, t, path=RF, target="epsilon")
         for p in (teacher, student)]
  np.testing.assert_allclose(
      losses.vsd_direction(*eps, sigma),
      COL(sigma**3 * alpha) * (m - big_m) / c, rtol=1e-9,
  )
  # Descending along it is descending the KL between the noised laws.
  kl = lambda m, a, c: jnp.sum((a * (m - big_m)) ** 2) / (2 * c)
  slope = jax.vmap(jax.grad(kl), (None, 0, 0))(jnp.asarray(m), alpha, c[:, 0])
  ratio = slope / expected
  np.testing.assert_allclose(ratio[:, 0], ratio[:, 1], rtol=1e-9)
  assert float(ratio.min()) > 0


def test_sds_minus_vsd_is_the_critics_denoising_error(x64):
  """w (eps_F - noise): no bias with an exact critic, all noise and no signal.

  And SDS is VSD whose critic is the exact score of a point mass at the sample.
  """
  teacher = oracles.ring8()
  student = oracles.ring(8, radius=1.1, std=0.2)
  x, noise, t, x_t = noisy(student, RF, n=20_000)
  sigma = RF.sigma(t)
  eps_teacher, eps_student = (
      p.predict(x_t, t, path=RF, target="epsilon") for p in (teacher, student)
  )
  sds = losses.sds_direction(eps_teacher, noise, sigma)
  vsd = losses.vsd_direction(eps_teacher, eps_student, sigma)
  gap = sds - vsd
  np.testing.assert_allclose(
      gap, COL(sigma) ** 2 * (eps_student - noise), atol=1e-9
  )
  # Zero on average given x_t: against any function of x_t, within 5 errors.
  for g in (jnp.ones_like(x_t), x_t, jnp.sin(3 * x_t), COL(t) * x_t):
    product = np.asarray(gap * g)
    error = product.std() / np.sqrt(product.size)
    assert abs(product.mean()) < 5 * error
  one = oracles.gaussian(np.asarray(x[0]), 0.0)
  eps_point = one.predict(x_t[:1], t[:1], path=RF, target="epsilon")
  np.testing.assert_allclose(
      losses.vsd_direction(eps_teacher[:1], eps_point, sigma[:1]), sds[:1],
      rtol=1e-9,
  )


def test_the_exact_denoiser_minimises_the_critics_loss(x64):
  """E[(prediction - target) g(x_t)] = 0 for every kind of prediction."""
  student = oracles.ring(8, radius=1.1, std=0.2)
  x, noise, t, x_t = noisy(student, RF, n=20_000)
  at = RF.coefficients(t)
  for kind in RF.predictions:
    exact = student.predict(x_t, t, path=RF, target=kind)
    slope = jax.grad(lambda p, k=kind: jnp.sum(
        losses.denoising_loss(p, x, noise, at, kind=k)
    ))(exact)
    for g in (jnp.ones_like(x_t), jnp.cos(2 * x_t)):
      product = np.asarray(slope * g)
      error = product.std() / np.sqrt(product.size)
      assert abs(product.mean()) < 5 * error, kind


def test_phased_target_is_unbiased(x64):
  """The card's case: x0 in {-1, 2}, s = 0.5, t = 0.8.

  x_s is a mixture itself, so E[x_s | x_t] and E[noise | x_t] are known, and
  the targets are linear in the two.
  """
  s, t = 0.5, 0.8
  at_s, at_t = RF.coefficients(s), RF.coefficients(t)
  alpha, sigma = losses.subinterval_coefficients(at_s, at_t)
  law_of_x_s = gm.make_gaussian_mixture([[-1 * (1 - s)], [2 * (1 - s)]], s)
  x_t = jnp.array([[-0.5], [0.3], [1.0]])
  x_s, noise = law_of_x_s.moments(x_t, alpha, sigma)
  target = losses.subinterval_velocity_target(x_s, noise, at_s, at_t)
  exact = oracles.two_points().predict(x_t, t, path=RF, target="velocity")
  np.testing.assert_allclose(target, exact, rtol=1e-9)
  naive = noise - x_s
  # The card's figures were bin means of a simulation: two digits.
  np.testing.assert_allclose(target[:, 0], [-0.74, -0.42, -0.12], atol=0.015)
  np.testing.assert_allclose(naive[:, 0], [-0.60, -0.14, 0.27], atol=0.015)
  # From clean data the two agree.
  clean = RF.coefficients(0.0)
  np.testing.assert_allclose(
      losses.subinterval_velocity_target(x_s, noise, clean, at_t),
      noise - x_s, rtol=1e-9,
  )


@pytest.mark.parametrize("path", [
    processes.VariancePreserving.cosine(), processes.EDM(),
    processes.TrigFlow(0.5),
], ids=["cosine", "edm", "trig"])
def test_phased_target_is_unbiased_on_other_paths(path, x64):
  mixture = oracles.ring8()
  at_s, at_t = path.coefficients(0.3), path.coefficients(0.6)
  alpha, sigma = losses.subinterval_coefficients(at_s, at_t)
  law_of_x_s = gm.make_gaussian_mixture(
      at_s.alpha * mixture.means,
      np.sqrt((at_s.alpha * 0.1) ** 2 + at_s.sigma**2),
  )
  x_t = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
  x_s, noise = law_of_x_s.moments(x_t, alpha, sigma)
  np.testing.assert_allclose(
      losses.subinterval_velocity_target(x_s, noise, at_s, at_t),
      mixture.predict(x_t, 0.6, path=path, target="velocity"), rtol=1e-8,
  )


# --- flow maps ---------------------------------------------------------------

GAUSSIAN = functools.partial(oracles.gaussian, [0.4, -0.8], [0.3, 0.7])


def gaussian_map(x, t, r):
  """The exact mean velocity of one Gaussian, r < t."""
  end = oracles.gaussian_flow_map(GAUSSIAN(), x, t, r, path=RF)
  return (x - end) / COL(t - r)


def ring_map(x, t, r):
  return oracles.ring8().mean_velocity(x, t, r, path=RF, steps=128)


TIMES = np.array([1.0, 0.9, 0.6, 0.35]), np.array([0.0, 0.5, 0.2, 0.05])


def residuals(map_fn, teacher, x, t, r):
  """Every identity's residual at once, so that they share one compile."""
  v = teacher(x, t)
  s = r + 0.4 * (t - r)
  u, target = losses.eulerian_target(map_fn, x, v, t, r)
  _, central = losses.eulerian_target(
      map_fn, x, v, t, r, derivative="central", step=1e-4
  )
  return {
      "eulerian": u - target,
      "central": u - central,
      "lagrangian": losses.lagrangian_residual(map_fn, x, t, r, teacher),
      "semigroup": u - losses.semigroup_target(map_fn, x, t, s, r),
  }


@pytest.mark.parametrize("mixture, map_fn, bound", [
    # Exact but for rounding; the difference quotient has step^2 left.
    (GAUSSIAN, gaussian_map, 1e-9),
    # The Runge-Kutta map: steps^-4, amplified by its derivatives.
    (oracles.ring8, ring_map, 1e-4),
], ids=["gaussian", "ring8"])
def test_residuals_vanish_on_the_true_flow_map(mixture, map_fn, bound, x64):
  mixture = mixture()
  teacher = mixture.prediction_fn(RF, "velocity")
  x, _, _, _ = noisy(mixture, RF)
  t, r = (jnp.asarray(a) for a in TIMES)
  x_t = RF.add_noise(x, jnp.asarray(
      np.random.default_rng(1).normal(size=(4, 2))
  ), t)

  @jax.jit
  def run(scale, x, t, r):
    # The true map, and a map that is wrong by a factor.
    return residuals(lambda *a: scale * map_fn(*a), teacher, x, t, r)

  right = run(jnp.float64(1.0), x_t, t, r)
  wrong = run(jnp.float64(1.05), x_t, t, r)
  for name, value in right.items():
    limit = bound
    if name == "central":
      # At t = 1 the difference is one-sided: first order in its step.
      assert float(jnp.abs(value[0]).max()) < 1e-4 + bound
      value, limit = value[1:], max(bound, 1e-7)
    assert float(jnp.abs(value).max()) < limit, name
    assert float(jnp.abs(wrong[name]).max()) > 10 * limit, name


def test_flow_map_step_and_sampler_follow_the_true_map(x64):
  t, r = (jnp.asarray(a) for a in TIMES)
  x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 2)))
  end = oracles.gaussian_flow_map(GAUSSIAN(), x, t, r, path=RF)
  np.testing.assert_allclose(
      losses.flow_map_step(x, gaussian_map(x, t, r), t, r), end, rtol=1e-9
  )
  whole = oracles.gaussian_flow_map(GAUSSIAN(), x, 1.0, 0.0, path=RF)
  for n in (1, 3):
    np.testing.assert_allclose(
        processes.flow_map(gaussian_map, x, processes.time_grid(n)), whole,
        rtol=1e-8,
    )
  # As a consistency function it lands there from every point of the path.
  x0_fn = lambda x, t: x - COL(t) * gaussian_map(x, t, jnp.zeros_like(t))
  np.testing.assert_allclose(x0_fn(x, jnp.ones(4)), whole, rtol=1e-9)


def test_at_r_equal_t_every_identity_is_flow_matching(x64):
  mixture = oracles.ring8()
  x0, noise, t, x_t = noisy(mixture, RF)
  v = noise - x0
  net = lambda x, t, r: jnp.tanh(x + COL(t) - COL(r))
  u, target = losses.eulerian_target(net, x_t, v, t, t)
  np.testing.assert_allclose(target, v, rtol=1e-12)
  teacher = mixture.prediction_fn(RF, "velocity")
  np.testing.assert_allclose(
      losses.lagrangian_residual(net, x_t, t, t, teacher),
      u - teacher(x_t, t), rtol=1e-9,
  )


# --- consistency -------------------------------------------------------------


def test_consistency_loss_vanishes_along_a_trajectory(x64):
  """Two points of one trajectory, the exact consistency function."""
  edm, mixture = processes.EDM(), GAUSSIAN()
  x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 2))) * 3
  sigma, lower = jnp.array([5.0, 1.0, 0.3, 40.0]), jnp.array(
      [2.0, 0.9, 0.01, 0.5]
  )

  def consistency(x, sigma):
    return oracles.gaussian_flow_map(
        mixture, x, edm.t_from_sigma(sigma), 0.0, path=edm
    )

  x_s = oracles.gaussian_flow_map(
      mixture, x, edm.t_from_sigma(sigma), edm.t_from_sigma(lower), path=edm
  )
  loss = functools.partial(
      losses.consistency_loss, consistency, consistency, x, sigma,
      metric=losses.squared_distance,
  )
  assert float(jnp.max(loss(x_s, lower))) < 1e-20
  # The teacher's Heun step reaches the point to third order in the gap.
  denoise = lambda x, sigma: mixture.moments(x, 1.0, sigma)[0]
  errors = []
  for gap in (0.04, 0.02):
    near = sigma * (1 - gap)
    exact = oracles.gaussian_flow_map(
        mixture, x, edm.t_from_sigma(sigma), edm.t_from_sigma(near), path=edm
    )
    step = losses.consistency_distillation_target(denoise, x, sigma, near)
    errors.append(float(jnp.abs(step - exact).max()))
    assert float(jnp.max(loss(step, near))) < 1e-6
  assert 6 < errors[0] / errors[1] < 10
  # A point off the trajectory is seen.
  assert float(jnp.min(loss(x_s + 0.1, lower))) > 1e-6


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_tangent_vanishes_on_the_true_consistency_function(sigma_data, x64):
  """sCM's and rCM's tangent are d f / d angle, which is 0 on the exact map."""
  path, mixture = processes.TrigFlow(sigma_data), GAUSSIAN()
  angle = jnp.array([0.2, 0.7, 1.2, 1.5])
  t = path.t_from_angle(angle)
  x = jnp.asarray(np.random.default_rng(4).normal(size=(4, 2)))
  # d x / d angle = sigma_data F of the exact teacher.
  teacher = mixture.predict(x, t, path=path, target="F")

  def network(x_hat, angle):
    """F of the exact f = cos x - sin sigma_data F."""
    x = x_hat * sigma_data
    f = oracles.gaussian_flow_map(
        mixture, x, path.t_from_angle(angle), 0.0, path=path
    )
    return (COL(jnp.cos(angle)) * x - f) / (COL(jnp.sin(angle)) * sigma_data)

  @jax.jit
  def run(scale, x, angle):
    net = lambda x, a: scale * network(x, a)
    out = {"sCM": losses.trigflow_tangent(
        net, x, sigma_data * teacher, angle, sigma_data=sigma_data
    )[1]}
    if sigma_data == 1:
      out["rCM"] = losses.rcm_tangent(net, x, teacher, angle)[1]
    return out

  for name, g in run(jnp.float64(1.0), x, angle).items():
    assert float(jnp.abs(g).max()) < 1e-10, name
  for name, g in run(jnp.float64(1.05), x, angle).items():
    assert float(jnp.abs(g).max()) > 1e-3, name
