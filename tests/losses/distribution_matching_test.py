"""Distribution matching against float64 NumPy written from the papers."""

import hypothesis
from hypothesis import strategies as st
import jax
from jax import test_util
import jax.numpy as jnp
import numpy as np
import pytest

import distilljax
from distilljax import losses
from tests import helpers

pytestmark = pytest.mark.usefixtures("strict")

SHAPE = (3, 2, 4)


def draw(*shape, seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  return rng.normal(scale=scale, size=shape).astype(np.float32)


X, REAL, FAKE = (draw(*SHAPE, seed=i) for i in range(3))
X0, NOISE = draw(*SHAPE, seed=3), draw(*SHAPE, seed=4)
ROWS = np.array([0.3, 0.7, 1.9], np.float32)


def jnps(*arrays):
  return tuple(jnp.asarray(a) for a in arrays)


def col(rows):
  return np.float64(rows)[:, None, None]


def close(ours, theirs, rtol=2e-6, atol=1e-6):
  np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)


class TestSurrogateLoss:

  def test_value(self):
    x, d = jnps(X, FAKE)
    square = 0.5 * np.float64(FAKE) ** 2
    linear = np.float64(FAKE) * X
    close(losses.surrogate_loss(x, d), square.mean((1, 2)))
    close(losses.surrogate_loss(x, d, elements="sum"), square.sum((1, 2)))
    close(losses.surrogate_loss(x, d, elements="none"), square)
    close(losses.surrogate_loss(x, d, form="linear"), linear.mean((1, 2)))
    close(
        losses.surrogate_loss(x, d, elements="none", form="linear"), linear
    )

  @pytest.mark.parametrize("form", ["square", "linear"])
  @pytest.mark.parametrize("elements", ["mean", "sum"])
  def test_gradient_is_the_direction(self, form, elements):
    x, d = jnps(X, FAKE)

    def loss(x, d):
      return losses.surrogate_loss(x, d, elements=elements, form=form).sum()

    got_x, got_d = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, d)
    close(got_x, FAKE / (8 if elements == "mean" else 1))
    assert not np.any(got_d)

  def test_gradient_is_exact_for_a_large_sample(self):
    # x - (x - d) would return 0 here: d is below the spacing at 1e4.
    x, d = jnp.full((1, 1), 1e4), jnp.full((1, 1), 1e-5)
    fn = lambda x: losses.surrogate_loss(x, d).sum()
    assert jax.grad(fn)(x)[0, 0] == d[0, 0]

  @pytest.mark.parametrize("form", ["square", "linear"])
  def test_mask(self, form):
    where = np.zeros(SHAPE, bool)
    where[0, 0, :3] = True
    where[1] = True
    x, d, mask = jnps(X, FAKE, where)
    poisoned_x = x.at[0, 1, 3].set(jnp.nan)
    poisoned = d.at[0, 1, 2].set(jnp.nan).at[2, 0, 0].set(jnp.inf)

    def loss(x, elements):
      return losses.surrogate_loss(
          x, poisoned, elements=elements, where=mask, form=form
      )

    plain = np.float64(
        losses.surrogate_loss(x, d, elements="none", form=form)
    )
    counts = np.array([3, 8, 1])
    masked = np.where(where, plain, 0)
    close(loss(poisoned_x, "none"), masked)
    close(loss(poisoned_x, "sum"), masked.sum((1, 2)))
    close(loss(poisoned_x, "mean"), masked.sum((1, 2)) / counts)
    assert loss(poisoned_x, "mean")[2] == 0
    got = jax.grad(lambda x: loss(x, "mean").sum())(poisoned_x)
    close(got, np.where(where, FAKE, 0) / counts[:, None, None])

  def test_types(self, x64):
    x, d = jnps(np.float64(X), np.float64(FAKE))
    assert losses.surrogate_loss(x, d).dtype == jnp.float64
    half = losses.surrogate_loss(
        x.astype(jnp.bfloat16), d.astype(jnp.float32)
    )
    assert half.dtype == jnp.float32

  def test_bad_input(self):
    x, d = jnps(X, FAKE)
    with helpers.one_line_error(
        r"surrogate_loss: direction must be \[3, 2, 4\] like x, got \[3, 2\]"
    ):
      losses.surrogate_loss(x, d[:, :, 0])
    with helpers.one_line_error("elements must be one of.*did you mean 'mean'"):
      losses.surrogate_loss(x, d, elements="means")
    with helpers.one_line_error("form must be one of 'square', 'linear'"):
      losses.surrogate_loss(x, d, form="cubic")
    with helpers.one_line_error(r"where must be \[3, 2, 4\] like x"):
      losses.surrogate_loss(x, d, where=jnp.ones((3, 2), bool))
    with helpers.one_line_error("where must be a bool array"):
      losses.surrogate_loss(x, d, where=jnp.ones(SHAPE, jnp.int32))
    with helpers.one_line_error("x must be a non-empty array"):
      losses.surrogate_loss(x[:0], d[:0])


def dmd(x, real, fake, eps):
  x, real, fake = np.float64(x), np.float64(real), np.float64(fake)
  return (fake - real) / (
      np.abs(x - real).mean((1, 2), keepdims=True) + eps
  )


class TestDmdDirection:

  def test_value(self):
    expected = dmd(X, REAL, FAKE, 1e-6)
    close(losses.dmd_direction(*jnps(X, REAL, FAKE)), expected)
    close(
        losses.dmd_direction(*jnps(X, REAL, FAKE), eps=0.5),
        dmd(X, REAL, FAKE, 0.5),
    )
    # By hand: mean |x - real| = 2, so (4 - 3) / 2.
    out = losses.dmd_direction(
        jnp.ones((1, 2)), jnp.full((1, 2), 3.0), jnp.full((1, 2), 4.0), eps=0.0
    )
    close(out, [[0.5, 0.5]])

  def test_default_eps(self):
    # The row where x is the teacher's estimate divides by eps alone.
    real, fake = jnp.zeros((1, 2)), jnp.full((1, 2), 3e-6)
    close(losses.dmd_direction(real, real, fake), [[3.0, 3.0]], rtol=1e-5)

  def test_floor(self):
    x = REAL + 1e-5 * np.sign(X)
    x[0] = X[0]
    got = losses.dmd_direction(*jnps(x, REAL, FAKE), eps=0.0, floor=1e-3)
    expected = (np.float64(FAKE) - REAL) / 1e-3
    expected[0] = dmd(X, REAL, FAKE, 0.0)[0]
    close(got, expected, rtol=1e-5)
    # The floor comes first, then eps is added.
    both = losses.dmd_direction(*jnps(x, REAL, FAKE), eps=1e-3, floor=1e-3)
    close(both[1:], expected[1:] / 2, rtol=1e-5)

  def test_weight(self):
    got = losses.dmd_direction(
        *jnps(X, REAL, FAKE), weight=jnp.asarray(ROWS)
    )
    close(got, col(ROWS) * dmd(X, REAL, FAKE, 1e-6))
    got = losses.dmd_direction(*jnps(X, REAL, FAKE), weight=2.0)
    close(got, 2 * dmd(X, REAL, FAKE, 1e-6))

  def test_everything_is_frozen(self):
    def total(x, real, fake, weight):
      return losses.dmd_direction(x, real, fake, weight=weight).sum()

    grads = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(
        *jnps(X, REAL, FAKE, ROWS)
    )
    assert not any(np.any(g) for g in grads)

  def test_descends_to_the_teacher(self):
    # The fake score of a point mass at x is x itself: the step goes to real.
    x, real = jnps(X, REAL)
    direction = losses.dmd_direction(x, real, x)
    assert (jnp.sign(x - real) == jnp.sign(direction)).all()

  def test_fixed_point_on_gaussians(self, x64):
    # x0 ~ N(m, s^2): E[x0 | x_t] = (m t^2 + s^2 (1-t) x_t) / ((1-t)^2 s^2+t^2)
    # for the teacher, and the same for a student that has its m and s.
    def denoise(x_t, m, s, t):
      return (m * t**2 + s**2 * (1 - t) * x_t) / ((1 - t) ** 2 * s**2 + t**2)

    x_t, t = jnp.asarray(np.float64(X)), 0.4
    real = denoise(x_t, 1.5, 0.5, t)
    x = jnp.asarray(np.float64(X0))
    zero = losses.dmd_direction(x, real, denoise(x_t, 1.5, 0.5, t))
    assert not np.any(zero)
    # A student below the teacher's mean is told to grow: descend < 0.
    away = losses.dmd_direction(x, real, denoise(x_t, 1.0, 0.5, t))
    assert (away < 0).all()

  def test_types(self, x64):
    wide = jnps(np.float64(X), np.float64(REAL), np.float64(FAKE))
    assert losses.dmd_direction(*wide).dtype == jnp.float64
    half = [a.astype(jnp.bfloat16) for a in wide]
    out = losses.dmd_direction(*half, weight=jnp.asarray(ROWS))
    assert out.dtype == jnp.float32
    same = losses.dmd_direction(
        *[a.astype(jnp.float32) for a in half], weight=jnp.asarray(ROWS)
    )
    np.testing.assert_array_equal(out, same)

  def test_bad_input(self):
    x, real, fake = jnps(X, REAL, FAKE)
    with helpers.one_line_error(
        r"dmd_direction: real_x0 must be \[3, 2, 4\] like x, got \[2, 2, 4\]"
    ):
      losses.dmd_direction(x, real[:2], fake)
    with helpers.one_line_error(r"fake_x0 must be \[3, 2, 4\] like x"):
      losses.dmd_direction(x, real, fake[:, :1])
    with helpers.one_line_error("x must be a non-empty array"):
      losses.dmd_direction(x[:0], real[:0], fake[:0])
    with helpers.one_line_error("eps must be in .*got -1"):
      losses.dmd_direction(x, real, fake, eps=-1.0)
    with helpers.one_line_error("floor must be in .*got -1"):
      losses.dmd_direction(x, real, fake, floor=-1.0)
    with helpers.one_line_error(r"weight must be \[b\]=\[3\] like x, got \[2"):
      losses.dmd_direction(x, real, fake, weight=jnp.ones(2))
    with helpers.one_line_error("weight must be finite, got nan"):
      losses.dmd_direction(x, real, fake, weight=float("nan"))
    with helpers.one_line_error("x must be a floating array, got int32"):
      losses.dmd_direction(x.astype(jnp.int32), real, fake)
    with helpers.one_line_error(r"x must be \[b, ...\] \(rank >= 1\), got \[\]"):
      losses.dmd_direction(jnp.ones(()), jnp.ones(()), jnp.ones(()))
    with helpers.one_line_error("fake_x0 must be finite"):
      with distilljax.debug():
        losses.dmd_direction(x, real, fake.at[0].set(jnp.nan))


class TestDenoisingLoss:

  def targets(self):
    a, s = col(ROWS), col(ROWS[::-1])
    return {
        "x0": np.float64(X0),
        "epsilon": np.float64(NOISE),
        "score": -NOISE / s,
        "velocity": np.float64(NOISE) - X0,
        "v": a * NOISE - s * X0,
    }

  @pytest.mark.parametrize(
      "kind", ["x0", "epsilon", "score", "velocity", "v"]
  )
  def test_value(self, kind):
    prediction, x0, noise, alpha, sigma = jnps(
        X, X0, NOISE, ROWS, ROWS[::-1].copy()
    )
    squares = (np.float64(X) - self.targets()[kind]) ** 2

    def loss(**more):
      return losses.denoising_loss(
          prediction, x0, noise, (alpha, sigma, -1.0, 1.0), kind=kind, **more
      )

    close(loss(), squares.mean((1, 2)))
    close(loss(elements="sum"), squares.sum((1, 2)), rtol=1e-5)
    close(
        loss(elements="none", weight=alpha), col(ROWS) * squares, rtol=1e-5
    )

  def test_velocity_of_another_path(self):
    prediction, x0, noise, a, b = jnps(X, X0, NOISE, ROWS, ROWS - 1.0)
    got = losses.denoising_loss(
        prediction, x0, noise, (0.1, 0.2, a, b), kind="velocity"
    )
    target = col(ROWS) * X0 + col(ROWS - 1.0) * NOISE
    close(got, ((X - target) ** 2).mean((1, 2)), rtol=1e-5)

  @pytest.mark.parametrize(
      "kind", ["x0", "epsilon", "score", "velocity", "v"]
  )
  def test_only_the_prediction_has_a_gradient(self, kind):
    def total(prediction, x0, noise, alpha, sigma, weight):
      return losses.denoising_loss(
          prediction, x0, noise, (alpha, sigma, -1.0, 1.0), kind=kind,
          weight=weight,
      ).sum()

    sigma, weight = ROWS[::-1].copy(), ROWS + 1
    grads = jax.jit(jax.grad(total, argnums=tuple(range(6))))(
        *jnps(X, X0, NOISE, ROWS, sigma, weight)
    )
    expected = 2 * col(weight) * (X - self.targets()[kind]) / 8
    close(grads[0], expected, rtol=1e-5)
    assert not any(np.any(g) for g in grads[1:])

  def test_check_grads(self, x64):
    x0, noise = jnps(np.float64(X0), np.float64(NOISE))
    fn = jax.jit(
        lambda p: losses.denoising_loss(p, x0, noise, kind="velocity")
    )
    prediction = jnp.asarray(np.float64(X))
    assert fn(prediction).dtype == jnp.float64
    test_util.check_grads(fn, (prediction,), order=2)

  def test_half_in_float32_out(self):
    half = [a.astype(jnp.bfloat16) for a in jnps(X, X0, NOISE)]
    wide = [a.astype(jnp.float32) for a in half]
    out = losses.denoising_loss(*half, kind="velocity", weight=0.5)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(
        out, losses.denoising_loss(*wide, kind="velocity", weight=0.5)
    )

  def test_bad_input(self):
    p, x0, noise = jnps(X, X0, NOISE)
    with helpers.one_line_error(
        "denoising_loss: kind must be one of.*did you mean 'epsilon'"
    ):
      losses.denoising_loss(p, x0, noise, kind="epsilo")
    with helpers.one_line_error("elements must be one of"):
      losses.denoising_loss(p, x0, elements="all")
    for kind in ("epsilon", "score", "velocity", "v"):
      with helpers.one_line_error(f"noise must be given with kind='{kind}'"):
        losses.denoising_loss(p, x0, None, (1.0, 1.0, 0.0, 0.0), kind=kind)
    for kind in ("score", "v"):
      with helpers.one_line_error(f"coefficients must be given.*'{kind}'"):
        losses.denoising_loss(p, x0, noise, kind=kind)
    with helpers.one_line_error("coefficients must be .*got 2 items"):
      losses.denoising_loss(p, x0, noise, (1.0, 1.0), kind="v")
    with helpers.one_line_error(r"coefficients.sigma must be \[b\]=\[3\]"):
      losses.denoising_loss(
          p, x0, noise, (1.0, jnp.ones(2), 0.0, 0.0), kind="v"
      )
    with helpers.one_line_error(r"noise must be \[3, 2, 4\] like prediction"):
      losses.denoising_loss(p, x0, noise[:, :1], kind="epsilon")
    with helpers.one_line_error(r"x0 must be \[3, 2, 4\] like prediction"):
      losses.denoising_loss(p, x0[:1])
    with helpers.one_line_error(r"weight must be \[b\]=\[3\]"):
      losses.denoising_loss(p, x0, weight=jnp.ones(SHAPE))


class TestDenoisingWeight:

  def test_values(self):
    sigma = jnp.asarray(ROWS)
    exact = np.float64(ROWS)
    close(
        losses.denoising_weight(sigma, kind="edm", sigma_data=0.8),
        (exact**2 + 0.8**2) / (exact * 0.8) ** 2,
    )
    close(losses.denoising_weight(sigma, kind="edm"), exact**-2 + 4.0)
    close(losses.denoising_weight(sigma, kind="inverse"), exact**-2)
    close(
        losses.denoising_weight(sigma, kind="inverse", maximum=3.0),
        np.minimum(exact**-2, 3.0),
    )
    close(losses.denoising_weight(sigma, 1 - sigma, kind="alpha"),
          (1 - exact) ** 2)

  def test_is_frozen_and_wide(self):
    grads = jax.grad(
        lambda s: losses.denoising_weight(s, kind="edm").sum()
    )(jnp.asarray(ROWS))
    assert not np.any(grads)
    half = losses.denoising_weight(
        jnp.asarray(ROWS).astype(jnp.bfloat16), kind="inverse"
    )
    assert half.dtype == jnp.float32

  def test_bad_input(self):
    sigma = jnp.asarray(ROWS)
    with helpers.one_line_error("denoising_weight: kind must be one of"):
      losses.denoising_weight(sigma, kind="snr")
    with helpers.one_line_error("alpha must be given with kind='alpha'"):
      losses.denoising_weight(sigma, kind="alpha")
    with helpers.one_line_error(r"sigma_data must be in \(0, inf\), got 0"):
      losses.denoising_weight(sigma, kind="edm", sigma_data=0.0)
    with helpers.one_line_error(r"sigma must be in \(0, inf\), got 0"):
      losses.denoising_weight(0.0, kind="edm")


_DMD = jax.jit(losses.dmd_direction)


@hypothesis.given(
    seed=st.integers(0, 2**31 - 1), shift=st.floats(-8, 8, width=32)
)
def test_dmd_invariances(seed, shift):
  x, real, fake = (draw(*SHAPE, seed=seed + i) for i in range(3))
  out = np.asarray(_DMD(x, real, fake))
  # Moving all three, permuting rows, and splitting the batch change nothing.
  moved = _DMD(*(np.float32(a + np.float32(shift)) for a in (x, real, fake)))
  np.testing.assert_allclose(moved, out, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(
      _DMD(x[::-1], real[::-1], fake[::-1]), out[::-1], rtol=1e-6
  )
  twice = _DMD(*(np.concatenate([a[1:], a[1:2]]) for a in (x, real, fake)))
  np.testing.assert_allclose(twice[:2], out[1:], rtol=1e-6)
  # Rescaling data space leaves the normalised direction as it is.
  np.testing.assert_allclose(
      _DMD(*(4 * a for a in (x, real, fake))), out, rtol=1e-4
  )
