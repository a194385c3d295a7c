"""Distribution matching against float64 NumPy written from the papers."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import test_util

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
    # One element that counts is a mean over one.
    one = np.zeros(SHAPE, bool)
    one[:, 1, 2] = True
    got = losses.surrogate_loss(
        *jnps(X, FAKE), form=form, where=jnp.asarray(one)
    )
    values = FAKE**2 / 2 if form == "square" else X * FAKE
    close(got, values[:, 1, 2])

  def test_types(self, x64):
    x, d = jnps(np.float64(X), np.float64(FAKE))
    assert losses.surrogate_loss(x, d).dtype == jnp.float64
    half = losses.surrogate_loss(
        x.astype(jnp.bfloat16), d.astype(jnp.float32)
    )
    assert half.dtype == jnp.float32
    # The wider of the two, whichever it is.
    assert losses.surrogate_loss(x.astype(jnp.float32), d).dtype == jnp.float64

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
    one = jnp.ones(())
    with helpers.one_line_error(r"x must be \[b, ...\] \(rank >= 1\), got"):
      losses.dmd_direction(one, one, one)
    bad = fake.at[0].set(jnp.nan)
    with distilljax.debug(), helpers.one_line_error("fake_x0 must be finite"):
      losses.dmd_direction(x, real, bad)


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
    close(losses.denoising_weight(0.5, kind="inverse"), 4.0)
    close(
        losses.denoising_weight(sigma, 1 - sigma, kind="alpha"),
        (1 - exact) ** 2,
    )

  def test_is_frozen_and_wide(self):
    grads = jax.grad(
        lambda s: losses.denoising_weight(s, kind="edm").sum()
    )(jnp.asarray(ROWS))
    assert not np.any(grads)
    half = losses.denoising_weight(
        jnp.asarray(ROWS).astype(jnp.bfloat16), kind="inverse"
    )
    assert half.dtype == jnp.float32
    half = losses.denoising_weight(
        jnp.ones(3), jnp.asarray(ROWS).astype(jnp.bfloat16), kind="alpha"
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


class TestNoiseDirections:

  @pytest.mark.parametrize(
      "fn", [losses.vsd_direction, losses.sds_direction]
  )
  def test_value(self, fn):
    teacher, other, sigma = jnps(REAL, FAKE, ROWS)
    gap = np.float64(REAL) - FAKE
    close(fn(teacher, other, sigma), col(ROWS) ** 2 * gap)
    close(fn(teacher, other, sigma, power=1), col(ROWS) * gap)
    close(fn(teacher, other, sigma, power=0), gap)
    close(fn(teacher, other, 0.5), 0.25 * gap)
    # The clip comes after the weight.
    close(
        fn(teacher, other, sigma, clip=0.3),
        np.clip(col(ROWS) ** 2 * gap, -0.3, 0.3),
    )

  @pytest.mark.parametrize(
      "fn", [losses.vsd_direction, losses.sds_direction]
  )
  def test_frozen_and_wide(self, fn, x64):
    arrays = jnps(np.float64(REAL), np.float64(FAKE), np.float64(ROWS))
    total = lambda *a: fn(*a).sum()
    grads = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*arrays)
    assert not any(np.any(g) for g in grads)
    assert fn(*arrays).dtype == jnp.float64
    half = [a.astype(jnp.bfloat16) for a in arrays]
    assert fn(*half).dtype == jnp.float32

  def test_sds_is_vsd_with_the_score_of_a_point(self):
    # A point mass at x has score -noise / sigma at x_t, so its own noise
    # estimate is the noise; SDS minus VSD is then the critic against it.
    teacher, fake, noise, sigma = jnps(REAL, FAKE, NOISE, ROWS)
    gap = losses.sds_direction(teacher, noise, sigma) - losses.vsd_direction(
        teacher, fake, sigma
    )
    close(gap, col(ROWS) ** 2 * (np.float64(FAKE) - NOISE), rtol=1e-5)

  def test_vsd_is_diff_instruct_in_noise_space(self):
    # x0 = (x_t - sigma eps) / alpha: eps_T - eps_F is alpha / sigma times
    # (fake_x0 - real_x0), the same direction.
    x_t, a, s = np.float64(X), 0.6, 0.8
    x0 = lambda eps: jnp.asarray(np.float32((x_t - s * eps) / a))
    vsd = losses.vsd_direction(*jnps(REAL, FAKE), s, power=0)
    di = losses.diff_instruct_direction(x0(REAL), x0(FAKE))
    close(vsd, a / s * di, rtol=1e-4, atol=1e-5)

  def test_bad_input(self):
    teacher, other, sigma = jnps(REAL, FAKE, ROWS)
    with helpers.one_line_error(
        r"vsd_direction: fake_epsilon must be \[3, 2, 4\] like teacher_epsilon"
    ):
      losses.vsd_direction(teacher, other[:1], sigma)
    with helpers.one_line_error("sds_direction: noise must be"):
      losses.sds_direction(teacher, other[:1], sigma)
    with helpers.one_line_error(r"clip must be in \(0, inf\), got 0"):
      losses.vsd_direction(teacher, other, sigma, clip=0.0)
    with helpers.one_line_error(r"sigma must be in \[0, inf\), got -1"):
      losses.sds_direction(teacher, other, -1.0)
    with helpers.one_line_error(r"sigma must be \[b\]=\[3\] like x"):
      losses.sds_direction(teacher, other, sigma[:2])


class TestDiffInstruct:

  def test_value_and_frozen(self):
    real, fake, weight = jnps(REAL, FAKE, ROWS)
    gap = np.float64(FAKE) - REAL
    close(losses.diff_instruct_direction(real, fake), gap)
    close(
        losses.diff_instruct_direction(real, fake, weight=weight),
        col(ROWS) * gap,
    )
    total = lambda r, f, w: losses.diff_instruct_direction(
        r, f, weight=w
    ).sum()
    grads = jax.grad(total, argnums=(0, 1, 2))(real, fake, weight)
    assert not any(np.any(g) for g in grads)
    half = losses.diff_instruct_direction(
        real.astype(jnp.bfloat16), fake.astype(jnp.bfloat16)
    )
    assert half.dtype == jnp.float32

  def test_is_dmd_without_the_normaliser(self):
    scale = np.abs(np.float64(X) - REAL).mean((1, 2), keepdims=True)
    close(
        losses.diff_instruct_direction(*jnps(REAL, FAKE)),
        losses.dmd_direction(*jnps(X, REAL, FAKE), eps=0.0) * scale,
        rtol=1e-5,
    )

  def test_bad_input(self):
    real, fake = jnps(REAL, FAKE)
    with helpers.one_line_error("diff_instruct_direction: fake_x0 must be"):
      losses.diff_instruct_direction(real, fake[:2])


def sid(x, real, fake, alpha, floor):
  x, real, fake = np.float64(x), np.float64(real), np.float64(fake)
  w = np.maximum(np.abs(x - real).mean((1, 2), keepdims=True), floor)
  return (real - fake) * ((real - x) - alpha * (real - fake)) / w


class TestSid:

  def test_value(self):
    arrays = jnps(X, REAL, FAKE)
    expected = sid(X, REAL, FAKE, 1.2, 1e-5)
    close(losses.sid_loss(*arrays), expected.mean((1, 2)), rtol=1e-5)
    close(
        losses.sid_loss(*arrays, alpha=0.7, elements="none"),
        sid(X, REAL, FAKE, 0.7, 1e-5),
        rtol=1e-5,
    )
    close(
        losses.sid_loss(*arrays, elements="sum"),
        expected.sum((1, 2)),
        rtol=1e-5,
    )

  def test_floor(self):
    x = jnp.asarray(REAL)
    close(
        losses.sid_loss(x, x, jnp.asarray(FAKE), elements="none"),
        sid(REAL, REAL, FAKE, 1.2, 1e-5),
        rtol=1e-5,
    )
    close(
        losses.sid_loss(x, x, jnp.asarray(FAKE), floor=2.0, elements="none"),
        sid(REAL, REAL, FAKE, 1.2, 2.0),
        rtol=1e-5,
    )

  def test_gradient_stops_only_in_the_normaliser(self, x64):
    x, real, fake = (np.float64(a) for a in (X, REAL, FAKE))
    w = np.abs(x - real).mean((1, 2), keepdims=True)
    gap, a = real - fake, 1.2
    got = jax.jit(
        jax.grad(
            lambda *z: losses.sid_loss(*z, elements="sum").sum(),
            argnums=(0, 1, 2),
        )
    )(*jnps(x, real, fake))
    inner = (real - x) - a * gap
    close(got[0], -gap / w, rtol=1e-10)
    close(got[1], (inner + gap * (1 - a)) / w, rtol=1e-10)
    close(got[2], (-inner + gap * a) / w, rtol=1e-10)

  def test_through_networks(self, x64):
    # Denoisers that depend on x: without that path the gradient is another.
    real_fn = lambda x: jnp.tanh(0.7 * x)
    fake_fn = lambda x: 0.5 * x
    x = jnp.asarray(np.float64(X))

    def loss(x, freeze):
      z = jax.lax.stop_gradient(x) if freeze else x
      return losses.sid_loss(x, real_fn(z), fake_fn(z)).sum()

    through = jax.grad(lambda x: loss(x, False))(x)
    cut = jax.grad(lambda x: loss(x, True))(x)
    assert np.abs(through - cut).max() > 0.01

  def test_at_alpha_one_is_the_fisher_identity(self):
    # (real - fake) * ((real - x) - (real - fake)) = (real - fake)(fake - x).
    out = losses.sid_loss(
        *jnps(X, REAL, FAKE), alpha=1.0, elements="none", floor=1e3
    )
    product = (np.float64(REAL) - FAKE) * (np.float64(FAKE) - X) / 1e3
    close(out, product, rtol=1e-5)

  def test_types_and_bad_input(self):
    x, real, fake = jnps(X, REAL, FAKE)
    half = losses.sid_loss(*(a.astype(jnp.bfloat16) for a in (x, real, fake)))
    assert half.dtype == jnp.float32
    with helpers.one_line_error("sid_loss: real_x0 must be"):
      losses.sid_loss(x, real[:1], fake)
    with helpers.one_line_error("sid_loss: floor must be in"):
      losses.sid_loss(x, real, fake, floor=-1.0)
    with helpers.one_line_error("sid_loss: elements must be one of"):
      losses.sid_loss(x, real, fake, elements="all")


class TestFDivergence:

  H = {
      "kl": lambda r: r,
      "js": lambda r: r / (1 + r),
      "sf": lambda r: 1 / (1 + r),
      "sh": lambda r: r**0.5,
      "neyman": lambda r: 1 / r,
      "jf": lambda r: 1 + r,
  }

  @pytest.mark.parametrize("kind", list(H))
  def test_weight(self, kind):
    r = np.float64([0.1, 0.6, 1.0, 7.0])
    h = self.H[kind](r)
    got = losses.f_divergence_weight(jnp.asarray(r, jnp.float32), kind=kind)
    close(got, h / (h.mean() + 1e-6))
    # The small number matters where the mean is small.
    if kind == "kl":
      tiny = losses.f_divergence_weight(jnp.full(2, 1e-6), kind="kl")
      close(tiny, [0.5, 0.5], rtol=1e-5)

  def test_reverse_kl_is_exactly_one_and_js_the_default(self):
    r = jnp.asarray([0.1, 3.0])
    assert losses.f_divergence_weight(r, kind="rkl").tolist() == [1.0, 1.0]
    np.testing.assert_array_equal(
        losses.f_divergence_weight(r), losses.f_divergence_weight(r, kind="js")
    )

  def test_density_ratio(self):
    logits = jnp.asarray(
        [[0.2, 0.6], [-30.0, 0.0], [9.0, 9.0], [-1.0, -3.0]]
    )
    got = losses.density_ratio(logits)
    close(got, [np.exp(0.4), 0.1, 20.0, np.exp(-2.0)])
    wide = losses.density_ratio(logits * 4, lower=1e-9, upper=1e9)
    close(wide[1:3], [np.exp(-10.0), np.exp(10.0)], rtol=1e-5)
    close(
        losses.density_ratio(logits, max_logit=1.0, lower=1e-9, upper=1e9),
        np.exp([0.4, -1.0, 1.0, -1.0]),
    )

  def test_histogram(self):
    assert losses.ratio_histogram().tolist() == [1.0] * 10
    # Bins of width .5 on [-1, 1]; one row below, one above the range.
    ratio = np.float64([2.0, 4.0, 1.0, 8.0, 6.0])
    t = jnp.asarray([-0.9, -0.6, 0.2, 1.5, -3.0], jnp.float32)
    state = jnp.asarray([1.0, 5.0, 2.0, 3.0])
    got, new = losses.normalize_ratio(
        jnp.asarray(ratio, jnp.float32), t, state, t_min=-1.0, t_max=1.0,
        rate=0.25,
    )
    bins = np.array([0.25 + 0.75 * 4.0, 5.0, 0.5 + 0.75, 0.75 + 0.75 * 8.0])
    close(new, bins)
    close(got, ratio / (bins[[0, 0, 2, 3, 0]] + 1e-6))

  def test_histogram_defaults(self):
    ratio, t = jnp.asarray([3.0, 5.0]), jnp.asarray([0.05, 0.95])
    got, new = losses.normalize_ratio(ratio, t, losses.ratio_histogram())
    close(new, [2.0] + [1.0] * 8 + [3.0])
    close(got, [3 / 2, 5 / 3])
    # The small number in the divisor.
    got, _ = losses.normalize_ratio(
        jnp.asarray([1e-6]), t[:1], losses.ratio_histogram(1), rate=0.0
    )
    close(got, [0.5], rtol=1e-5)

  def test_frozen(self):
    def total(logits, t, state):
      ratio = losses.density_ratio(logits)
      ratio, state = losses.normalize_ratio(ratio, t, state)
      return losses.f_divergence_weight(ratio).sum() + state.sum()

    def each(ratio, t, state):
      out, new = losses.normalize_ratio(ratio, t, state)
      return (out.sum() + new.sum()
              + losses.f_divergence_weight(ratio, kind="kl")[0]
              + losses.f_divergence_weight(ratio, kind="rkl")[0])

    logits = jnp.asarray([[0.2], [1.0]])
    t, state = jnp.asarray([0.1, 0.7]), losses.ratio_histogram(3)
    grads = jax.grad(total, argnums=(0, 1, 2))(logits, t, state)
    grads += jax.grad(each, argnums=(0, 1, 2))(jnp.exp(logits[:, 0]), t, state)
    assert not any(np.any(g) for g in grads)
    assert not np.any(
        jax.grad(lambda x: losses.density_ratio(x).sum())(logits)
    )

  def test_over_devices_equals_one_device(self):
    # Two mapped halves against the whole batch.
    ratio = jnp.asarray([0.5, 2.0, 3.0, 9.0])
    t = jnp.asarray([0.1, 0.1, 0.15, 0.9])
    state = losses.ratio_histogram(4)

    def step(ratio, t, axis_name=None):
      ratio, new = losses.normalize_ratio(ratio, t, state, axis_name=axis_name)
      weight = losses.f_divergence_weight(ratio, axis_name=axis_name)
      return ratio, weight, new

    whole = step(ratio, t)
    parts = jax.vmap(lambda r, s: step(r, s, "d"), axis_name="d")(
        ratio.reshape(2, 2), t.reshape(2, 2)
    )
    close(parts[0].reshape(4), whole[0])
    close(parts[1].reshape(4), whole[1])
    close(parts[2], np.stack([whole[2]] * 2))

  def test_types(self):
    logits = jnp.asarray([[0.5], [1.0]], jnp.bfloat16)
    ratio = losses.density_ratio(logits)
    assert ratio.dtype == jnp.float32
    weight = losses.f_divergence_weight(ratio.astype(jnp.bfloat16))
    assert weight.dtype == jnp.float32

  def test_bad_input(self):
    r, t = jnp.ones(3), jnp.ones(3)
    with helpers.one_line_error("f_divergence_weight: kind must be one of"):
      losses.f_divergence_weight(r, kind="forward")
    with helpers.one_line_error(r"ratio must be \[b\] \(rank 1\)"):
      losses.f_divergence_weight(jnp.ones((3, 1)))
    with distilljax.debug(), helpers.one_line_error(r"ratio must be in \(0"):
      losses.f_divergence_weight(jnp.asarray([1.0, 0.0]))
    with helpers.one_line_error("t must be .*like ratio"):
      losses.normalize_ratio(r, t[:2], losses.ratio_histogram())
    with helpers.one_line_error("normalize_ratio: t_max must be in"):
      losses.normalize_ratio(r, t, losses.ratio_histogram(), t_max=0.0)
    with helpers.one_line_error("rate must be in .0, 1."):
      losses.normalize_ratio(r, t, losses.ratio_histogram(), rate=1.5)
    with helpers.one_line_error(r"ratio must be \[b\] \(rank 1\)"):
      losses.normalize_ratio(r[:, None], t[:, None], losses.ratio_histogram())
    with helpers.one_line_error(r"histogram must be \[bins\] \(rank 1\)"):
      losses.normalize_ratio(r, t, jnp.ones((2, 2)))
    with helpers.one_line_error("bins must be in .1, inf., got 0"):
      losses.ratio_histogram(0)
    with helpers.one_line_error("density_ratio: lower must be in .0"):
      losses.density_ratio(r, lower=0.0)
    with helpers.one_line_error("density_ratio: upper must be in .0.1"):
      losses.density_ratio(r, upper=0.01)
    with helpers.one_line_error("density_ratio: max_logit must be in .0"):
      losses.density_ratio(r, max_logit=0.0)


class TestDecoupled:

  def setup_method(self):
    # cond and fake at the matching level, cond and uncond at the other.
    self.arrays = tuple(draw(*SHAPE, seed=10 + i) for i in range(4))

  def test_terms(self):
    cond, fake, ca_cond, ca_uncond = map(np.float64, self.arrays)
    dm, ca = losses.decoupled_dmd_terms(*jnps(*self.arrays))
    close(dm, fake - cond)
    close(ca, ca_uncond - ca_cond)

  def test_at_one_level_is_guided_dmd(self, x64):
    x, cond, fake, uncond = jnps(*map(np.float64, (X, *self.arrays[:3])))
    w = 7.5
    guided = uncond + w * (cond - uncond)
    dm, ca = losses.decoupled_dmd_terms(cond, fake, cond, uncond)
    close(dm + (w - 1) * ca, fake - guided, rtol=1e-10)
    got = losses.decoupled_dmd_loss(
        x, cond, fake, cond, uncond, guidance=w, normalizer="shared"
    )
    direction = losses.dmd_direction(x, guided, fake)
    close(got, losses.surrogate_loss(x, direction), rtol=1e-10)

  def direction(self, w, normalizer, eps):
    x = np.float64(X)
    cond, fake, ca_cond, ca_uncond = map(np.float64, self.arrays)
    guided = ca_uncond + w * (ca_cond - ca_uncond)
    mean = lambda a: np.abs(a).mean((1, 2), keepdims=True)
    n_ca = mean(x - guided) + eps
    n_dm = n_ca if normalizer == "shared" else mean(x - cond) + eps
    return (fake - cond) / n_dm + (w - 1) * (ca_uncond - ca_cond) / n_ca

  @pytest.mark.parametrize("normalizer", ["separate", "shared"])
  def test_loss_and_gradient(self, normalizer, x64):
    arrays = jnps(*map(np.float64, (X, *self.arrays)))

    def loss(*a):
      return losses.decoupled_dmd_loss(
          *a, guidance=3.5, normalizer=normalizer, eps=0.1
      )

    d = self.direction(3.5, normalizer, 0.1)
    close(loss(*arrays), 0.5 * (d**2).mean((1, 2)), rtol=1e-10)
    grads = jax.jit(
        jax.grad(lambda *a: loss(*a).sum(), argnums=tuple(range(5)))
    )(*arrays)
    close(grads[0], d / 8, rtol=1e-10)
    assert not any(np.any(g) for g in grads[1:])

  def test_defaults_and_elements(self):
    arrays = jnps(X, *self.arrays)
    d = self.direction(2.0, "separate", 1e-6)
    got = losses.decoupled_dmd_loss(*arrays, guidance=2.0, elements="sum")
    close(got, 0.5 * (d**2).sum((1, 2)), rtol=1e-5)
    # eps alone divides where the sample is the guided teacher's estimate.
    x, fake = jnp.zeros((1, 2)), jnp.full((1, 2), 1e-6)
    got = losses.decoupled_dmd_loss(x, x, fake, x, x, guidance=1.0)
    close(got, [0.5], rtol=1e-5)

  def test_without_guidance_the_augmentation_is_gone(self):
    x, cond, fake, *ca = jnps(X, *self.arrays)
    got = losses.decoupled_dmd_loss(x, cond, fake, *ca, guidance=1.0)
    plain = losses.surrogate_loss(x, losses.dmd_direction(x, cond, fake))
    close(got, plain)

  def test_terms_are_frozen_and_wide(self):
    total = lambda *a: sum(
        t.sum() for t in losses.decoupled_dmd_terms(*a)
    )
    grads = jax.grad(total, argnums=(0, 1, 2, 3))(*jnps(*self.arrays))
    assert not any(np.any(g) for g in grads)
    half = [a.astype(jnp.bfloat16) for a in jnps(X, *self.arrays)]
    assert losses.decoupled_dmd_loss(*half, guidance=2.0).dtype == jnp.float32
    assert losses.decoupled_dmd_terms(*half[1:])[0].dtype == jnp.float32

  def test_bad_input(self):
    x, cond, fake, ca_cond, ca_uncond = jnps(X, *self.arrays)
    with helpers.one_line_error("decoupled_dmd_terms: dm_fake_x0 must be"):
      losses.decoupled_dmd_terms(cond, fake[:1], ca_cond, ca_uncond)
    fn, args = losses.decoupled_dmd_loss, (x, cond, fake, ca_cond)
    with helpers.one_line_error(r"ca_uncond_x0 must be \[3, 2, 4\] like x"):
      fn(*args, ca_uncond[:1], guidance=2.0)
    with helpers.one_line_error("decoupled_dmd_loss: elements must be one"):
      fn(*args, ca_uncond, guidance=2.0, elements="all")
    with helpers.one_line_error("normalizer must be one of.*mean 'shared'"):
      fn(*args, ca_uncond, guidance=2.0, normalizer="share")
    with helpers.one_line_error("eps must be in"):
      fn(*args, ca_uncond, guidance=2.0, eps=-1.0)
    with helpers.one_line_error("guidance must be finite, got nan"):
      fn(*args, ca_uncond, guidance=float("nan"))


def straight(t):
  """The rectified-flow path, written out."""
  t = jnp.asarray(t)
  return 1 - t, t, -jnp.ones_like(t), jnp.ones_like(t)


class TestSubinterval:

  S = np.float32([0.0, 0.5, 0.2])
  T = np.float32([0.7, 0.8, 0.9])

  def kernel(self):
    s, t = np.float64(self.S), np.float64(self.T)
    alpha = (1 - t) / (1 - s)
    return s, t, alpha, np.sqrt(t**2 - alpha**2 * s**2)

  def test_coefficients(self):
    _, _, alpha, sigma = self.kernel()
    got = losses.subinterval_coefficients(straight(self.S), straight(self.T))
    close(got[0], alpha)
    close(got[1], sigma)
    one = losses.subinterval_coefficients(straight(0.5), straight(0.8))
    assert one[0].shape == one[1].shape == ()
    close(one[0], alpha[1])
    close(one[1], sigma[1])
    mixed = losses.subinterval_coefficients(straight(0.5), straight(self.T))
    assert mixed[0].shape == mixed[1].shape == (3,)
    swapped = losses.subinterval_coefficients(straight(self.S), straight(0.95))
    assert swapped[0].shape == swapped[1].shape == (3,)

  def test_floor(self):
    got = losses.subinterval_coefficients(straight(0.5), straight(0.5))
    close(got[1], 1e-4)
    got = losses.subinterval_coefficients(
        straight(0.5), straight(0.8), eps=4.0
    )
    close(got[1], 2.0)
    # Where the levels are equal, the default eps = 1e-8 alone is the variance.
    at, zero = straight(self.S), jnp.zeros(SHAPE)
    got = losses.subinterval_forward(zero, jnp.asarray(NOISE), at, at)
    close(got, 1e-4 * NOISE, atol=1e-9)
    got = losses.subinterval_velocity_target(zero, jnp.asarray(NOISE), at, at)
    s = col(self.S)
    close(got, (s + s**2 / (1 - s)) / 1e-4 * NOISE, rtol=1e-5)

  def test_noisier_is_told_by_the_signal_to_noise_ratio(self):
    with distilljax.debug():
      got = losses.subinterval_coefficients(straight(0.5), straight(0.6))
    close(got[0], 0.8)
    # (1 - s) t - (1 - t) s = t - s, not t (1 - s) less either of the two.
    with distilljax.debug(), helpers.one_line_error("at_t must be noisier"):
      losses.subinterval_coefficients(straight(0.6), straight(0.5))

  def test_forward(self):
    _, _, alpha, sigma = self.kernel()
    got = losses.subinterval_forward(
        *jnps(X, NOISE), straight(self.S), straight(self.T)
    )
    close(got, col(alpha) * X + col(sigma) * NOISE)
    floored = losses.subinterval_forward(
        *jnps(X, NOISE), straight(0.5), straight(0.5), eps=0.25
    )
    close(floored, X + 0.5 * NOISE)

  def test_target(self):
    s, t, _, sigma = self.kernel()
    got = losses.subinterval_velocity_target(
        *jnps(X, NOISE), straight(self.S), straight(self.T)
    )
    factor = (t + (1 - t) * s**2 / (1 - s) ** 2) / sigma
    close(got, col(factor) * NOISE - X / col(1 - s), rtol=1e-5)
    # From clean data it is the usual velocity.
    close(got[0], np.float64(NOISE[0]) - X[0])
    floored = losses.subinterval_velocity_target(
        *jnps(X, NOISE), straight(0.5), straight(0.5), eps=0.25
    )
    close(floored, (0.5 + 0.5) / 0.5 * np.float64(NOISE) - X / 0.5)

  def test_target_is_unbiased_and_the_naive_one_is_not(self):
    # x0 in {-1, 2} with equal odds, s = 0.5, t = 0.8, closed form: given x_t,
    # the posterior of x0 gives E[noise - x0 | x_t], the velocity. The mean of
    # a target linear in (x_s, noise) follows from the Gaussian posterior of
    # (x_s, noise) for each x0. Card: -0.74, -0.42, -0.12 against -0.60, -0.14,
    # 0.27 at x_t = -0.5, 0.3, 1.0.
    s, t, x_t = 0.5, 0.8, np.array([-0.5, 0.3, 1.0])
    modes = np.array([-1.0, 2.0])
    mean_t = (1 - t) * modes
    odds = np.exp(-((x_t[:, None] - mean_t) ** 2) / (2 * t**2))
    odds /= odds.sum(1, keepdims=True)
    residual = x_t[:, None] - mean_t  # alpha_ts sigma_s e_s + sigma_ts e
    alpha = (1 - t) / (1 - s)
    sigma = np.sqrt(t**2 - alpha**2 * s**2)
    e_s = alpha * s / t**2 * residual
    e = sigma / t**2 * residual
    x_s = (1 - s) * modes + s * e_s

    def mean(values):
      return (odds * values).sum(1)

    exact = mean((residual / t) - modes)
    target = losses.subinterval_velocity_target(
        *jnps(np.float32(x_s), np.float32(e)), straight(s), straight(t)
    )
    close(mean(np.float64(target)), exact, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(exact, [-0.74, -0.42, -0.12], atol=0.01)
    naive = mean(e - x_s)
    np.testing.assert_allclose(naive, [-0.60, -0.14, 0.27], atol=0.01)

  def test_target_on_another_path(self, x64):
    # Gaussian data N(0, c^2) on alpha = cos, sigma = sin: E[target | x_t] is
    # the path's own E[alpha' x0 + sigma' noise | x_t], linear in x_t. With
    # x_s and noise replaced by their posterior means, both are exact.
    s, t, c = 0.4, 1.1, 1.7
    at = lambda u: tuple(
        jnp.asarray(v)
        for v in (np.cos(u), np.sin(u), -np.sin(u), np.cos(u))
    )
    alpha = np.cos(t) / np.cos(s)
    sigma = np.sqrt(np.sin(t) ** 2 - alpha**2 * np.sin(s) ** 2)
    total = np.cos(t) ** 2 * c**2 + np.sin(t) ** 2
    x_t = np.float64(X)
    x_s = alpha * (np.cos(s) ** 2 * c**2 + np.sin(s) ** 2) / total * x_t
    noise = sigma / total * x_t
    got = losses.subinterval_velocity_target(*jnps(x_s, noise), at(s), at(t))
    x0, whole = np.cos(t) * c**2 / total * x_t, np.sin(t) / total * x_t
    close(got, -np.sin(t) * x0 + np.cos(t) * whole, rtol=1e-10, atol=1e-12)

  def test_frozen_and_wide(self):
    def total(x, noise, s, t):
      at = straight(s), straight(t)
      return (
          losses.subinterval_velocity_target(x, noise, *at).sum()
          + losses.subinterval_forward(x, noise, *at).sum()
          + sum(c.sum() for c in losses.subinterval_coefficients(*at))
      )

    grads = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(
        *jnps(X, NOISE, self.S, self.T)
    )
    assert not any(np.any(g) for g in grads)
    half = [a.astype(jnp.bfloat16) for a in jnps(X, NOISE)]
    at = straight(self.S), straight(self.T)
    narrow = [straight(u.astype(jnp.bfloat16)) for u in jnps(self.S, self.T)]
    for part in losses.subinterval_coefficients(*narrow):
      assert part.dtype == jnp.float32
    for fn in (losses.subinterval_velocity_target, losses.subinterval_forward):
      assert fn(*half, *at).dtype == jnp.float32

  def test_bad_input(self):
    at = straight(self.S), straight(self.T)
    x, noise = jnps(X, NOISE)
    with helpers.one_line_error(
        r"subinterval_velocity_target: noise must be \[3, 2, 4\] like x_s"
    ):
      losses.subinterval_velocity_target(x, noise[:1], *at)
    with helpers.one_line_error("subinterval_forward: noise must be"):
      losses.subinterval_forward(x, noise[:1], *at)
    with helpers.one_line_error("at_s must be .*got 2 items"):
      losses.subinterval_forward(x, noise, at[0][:2], at[1])
    with helpers.one_line_error("at_t must be .*got 3 items"):
      losses.subinterval_coefficients(at[0], at[1][:3])
    with helpers.one_line_error("eps must be in .0, inf., got -1"):
      losses.subinterval_coefficients(*at, eps=-1.0)
    with distilljax.debug(), helpers.one_line_error(
        "at_t must be noisier than at_s, got 3 of 3"
    ):
      losses.subinterval_coefficients(at[1], at[0])
    with distilljax.debug(), helpers.one_line_error(
        "at_t must be noisier than at_s, got 1 of 1"
    ):
      losses.subinterval_coefficients(straight(0.5), straight(0.5))


IDS = np.array([7, -2, 7, -2, 7])


def grouped(values, weights=None):
  """The group's mean for every row, by a loop."""
  values = np.float64(values)
  return np.stack([values[i == IDS].mean(0) for i in IDS])


class TestGroupNormalize:

  def setup_method(self):
    self.values = draw(5, 2, 3, seed=20)
    self.size = np.abs(draw(5, seed=21))

  def test_magnitude(self):
    got = losses.group_normalize(*jnps(self.values, IDS, self.size))
    scale = grouped(self.size)[:, None, None]
    close(got, self.values / (scale + 1e-6), rtol=1e-5)
    got = losses.group_normalize(
        *jnps(self.values, IDS, self.size), center=True, eps=0.5
    )
    centred = self.values - grouped(self.values)
    close(got, centred / (scale + 0.5), rtol=1e-5)

  def test_root_mean_square(self):
    got = losses.group_normalize(*jnps(self.values, IDS))
    rms = grouped((self.values**2).mean((1, 2))) ** 0.5
    close(got, self.values / rms[:, None, None], rtol=1e-5)
    centred = self.values - grouped(self.values)
    std = grouped((centred**2).mean((1, 2))) ** 0.5
    got = losses.group_normalize(*jnps(self.values, IDS), center=True)
    close(got, centred / std[:, None, None], rtol=1e-5)

  def test_rewards(self):
    rewards = self.size
    got = losses.group_normalize(*jnps(rewards, IDS), center=True)
    std = np.stack([rewards[i == IDS].std() for i in IDS])
    close(got, (rewards - grouped(rewards)) / (std + 1e-6), rtol=1e-5)

  def test_equal_values_give_zero(self):
    # 0.1 and 1e4 / 3 have means that round: what is left must not be blown up.
    for value in (0.1, 1e4 / 3):
      flat = jnp.full((5,), value, jnp.float32)
      got = losses.group_normalize(flat, jnp.asarray(IDS), center=True)
      assert got.tolist() == [0.0] * 5
    # Seven times 0.1 or 0.2, added up in float32, is not seven times as much.
    flat, ids = jnp.full((7,), 0.1, jnp.float32), jnp.zeros(7, jnp.int32)
    got = losses.group_normalize(flat, ids, center=True)
    assert got.tolist() == [0.0] * 7

  def test_a_bad_row_stays_in_its_group(self):
    values = self.values.copy()
    values[0] = np.nan
    got = losses.group_normalize(*jnps(values, IDS), center=True)
    clean = losses.group_normalize(*jnps(self.values, IDS), center=True)
    close(got[IDS == -2], clean[IDS == -2])
    assert np.isnan(got[IDS == 7]).all()

  def test_frozen_and_wide(self):
    total = lambda v, m: losses.group_normalize(
        v, jnp.asarray(IDS), m, center=True
    )[0].sum()
    grads = jax.grad(total, argnums=(0, 1))(*jnps(self.values, self.size))
    assert not any(np.any(g) for g in grads)
    half = losses.group_normalize(
        jnp.asarray(self.values).astype(jnp.bfloat16), jnp.asarray(IDS)
    )
    assert half.dtype == jnp.float32

  @pytest.mark.parametrize("center", [False, True])
  def test_over_devices_equals_one_device(self, center):
    values, ids, size = jnps(
        self.values[:4], np.array([3, 5, 5, 3]), self.size[:4]
    )
    cut = lambda a: a.reshape(2, 2, *a.shape[1:])
    for magnitude in (None, size):
      whole = losses.group_normalize(values, ids, magnitude, center=center)
      args = (values, ids) if magnitude is None else (values, ids, size)
      parts = jax.vmap(
          lambda *a: losses.group_normalize(*a, center=center, axis_name="d"),
          axis_name="d",
      )(*map(cut, args))
      close(parts.reshape(values.shape), whole, rtol=1e-5)

  def test_bad_input(self):
    values, ids, size = jnps(self.values, IDS, self.size)
    with helpers.one_line_error(
        r"group_normalize: group_ids must be \[b\]=\[5\] like values"
    ):
      losses.group_normalize(values, ids[:2])
    with helpers.one_line_error(r"magnitude must be \[b\]=\[5\]"):
      losses.group_normalize(values, ids, size[:1])
    with helpers.one_line_error("group_ids must be an integer array"):
      losses.group_normalize(values, size)
    with helpers.one_line_error("eps must be in"):
      losses.group_normalize(values, ids, eps=-1.0)


class TestGroupDmd:

  def test_value(self):
    x, real, fake = (draw(5, 2, 3, seed=30 + i) for i in range(3))
    size = np.abs(np.float64(x) - real).mean((1, 2))
    gap = np.float64(fake) - real
    scale = grouped(size)[:, None, None]
    got = losses.group_dmd_direction(*jnps(x, real, fake, IDS))
    close(got, gap / (scale + 1e-6), rtol=1e-5)
    got = losses.group_dmd_direction(
        *jnps(x, real, fake, IDS), center=True, eps=0.3
    )
    close(got, (gap - grouped(gap)) / (scale + 0.3), rtol=1e-5)

  def test_one_row_a_group_is_dmd(self):
    got = losses.group_dmd_direction(
        *jnps(X, REAL, FAKE, np.array([4, 0, 2])), eps=0.01
    )
    close(got, losses.dmd_direction(*jnps(X, REAL, FAKE), eps=0.01), rtol=1e-5)

  def test_frozen_and_devices(self):
    x, real, fake = jnps(*(draw(4, 3, seed=40 + i) for i in range(3)))
    ids = jnp.asarray([1, 2, 2, 1])
    fn = losses.group_dmd_direction
    grads = jax.grad(lambda *a: fn(*a, ids).sum(), argnums=(0, 1, 2))(
        x, real, fake
    )
    assert not any(np.any(g) for g in grads)
    parts = jax.vmap(lambda *a: fn(*a, axis_name="d"), axis_name="d")(
        *(a.reshape(2, 2, *a.shape[1:]) for a in (x, real, fake, ids))
    )
    close(parts.reshape(4, 3), fn(x, real, fake, ids), rtol=1e-5)

  def test_bad_input(self):
    x, real, fake = jnps(X, REAL, FAKE)
    with helpers.one_line_error("group_dmd_direction: real_x0 must be"):
      losses.group_dmd_direction(x, real[:1], fake, jnp.arange(3))


class TestDistillationDpo:

  def setup_method(self):
    self.samples = tuple(draw(*SHAPE, seed=50 + i) for i in range(2))
    self.estimates = tuple(draw(*SHAPE, seed=60 + i) for i in range(4))

  def test_value(self):
    w, l = map(np.float64, self.samples)
    t_w, f_w, t_l, f_l = map(np.float64, self.estimates)
    args = jnps(*self.samples, *self.estimates)
    elements = (t_w - f_w) * w - (t_l - f_l) * l
    close(losses.distillation_dpo_loss(*args), elements.mean((1, 2)))
    half = (t_w - f_w) * w - 0.5 * (t_l - f_l) * l
    close(
        losses.distillation_dpo_loss(*args, loser_weight=0.5, elements="none"),
        half,
    )
    close(
        losses.distillation_dpo_loss(*args, elements="sum"),
        elements.sum((1, 2)),
        rtol=1e-5,
    )

  def test_gradient_reaches_the_samples_alone(self):
    t_w, f_w, t_l, f_l = map(np.float64, self.estimates)

    def total(*a):
      return losses.distillation_dpo_loss(*a, loser_weight=0.5).sum()

    grads = jax.jit(jax.grad(total, argnums=tuple(range(6))))(
        *jnps(*self.samples, *self.estimates)
    )
    close(grads[0], (t_w - f_w) / 8)
    close(grads[1], -0.5 * (t_l - f_l) / 8)
    assert not any(np.any(g) for g in grads[2:])

  def test_released_factor_has_no_gradient_and_ours_has(self):
    # A generator x = theta z. The released code multiplies by noised - clean,
    # which is sigma noise whatever theta is; the sample itself is intended.
    z, noise = jnps(X, NOISE)
    teacher = lambda x: jnp.tanh(x)
    fake = lambda x: 0.3 * x

    def loss(theta, released):
      x_w, x_l = theta * z, 1.1 * theta * z
      both = []
      estimates = []
      for x in (x_w, x_l):
        x_t = x + 0.7 * noise
        both.append(x_t - x if released else x)
        estimates += [teacher(x_t), fake(x_t)]
      return losses.distillation_dpo_loss(*both, *estimates).sum()

    grad = jax.grad(loss)
    assert abs(grad(0.8, True)) < 1e-6
    assert abs(grad(0.8, False)) > 1e-2

  def test_winner_moves_to_the_teacher_and_loser_away(self):
    # eps = -sigma score: teacher at 0 and a fake score at the sample's own
    # place, so the score difference points to 0.
    x = jnp.full((1, 1), 2.0)
    towards = losses.distillation_dpo_loss
    eps_t, eps_f = x / 1.0, jnp.zeros_like(x)
    g_w, g_l = jax.grad(
        lambda w, l: towards(w, l, eps_t, eps_f, eps_t, eps_f).sum(),
        argnums=(0, 1),
    )(x, x)
    assert g_w[0, 0] > 0 > g_l[0, 0]

  def test_types_and_bad_input(self):
    args = jnps(*self.samples, *self.estimates)
    half = losses.distillation_dpo_loss(
        *(a.astype(jnp.bfloat16) for a in args)
    )
    assert half.dtype == jnp.float32
    with helpers.one_line_error("distillation_dpo_loss: loser must be"):
      losses.distillation_dpo_loss(args[0], args[1][:1], *args[2:])
    with helpers.one_line_error("loser_weight must be in .0, inf., got -1"):
      losses.distillation_dpo_loss(*args, loser_weight=-1.0)
    with helpers.one_line_error("elements must be one of"):
      losses.distillation_dpo_loss(*args, elements="all")

  def test_rank_pair(self):
    a, b = jnps(*self.samples)
    cost_a, cost_b = jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray([2.0, 1.0, 3.0])
    winner, loser = losses.rank_pair(a, b, cost_a, cost_b)
    wins = np.array([True, False, True])[:, None, None]
    np.testing.assert_array_equal(winner, np.where(wins, a, b))
    np.testing.assert_array_equal(loser, np.where(wins, b, a))
    grads = jax.grad(
        lambda *z: losses.rank_pair(*z)[0].sum(), argnums=(0, 1, 2, 3)
    )(a, b, cost_a, cost_b)
    np.testing.assert_array_equal(grads[0], np.broadcast_to(wins, SHAPE))
    np.testing.assert_array_equal(grads[1], np.broadcast_to(~wins, SHAPE))
    assert not np.any(grads[2]) and not np.any(grads[3])
    half = losses.rank_pair(
        a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), cost_a, cost_b
    )
    assert half[0].dtype == half[1].dtype == jnp.float32
    with helpers.one_line_error("rank_pair: b must be"):
      losses.rank_pair(a, b[:1], cost_a, cost_b)
    with helpers.one_line_error(r"cost_b must be \[b\]=\[3\] like a"):
      losses.rank_pair(a, b, cost_a, cost_b[:1])


_DIRECTIONS = jax.jit(
    lambda x, real, fake, rows: (
        losses.dmd_direction(x, real, fake, weight=rows),
        losses.vsd_direction(real, fake, rows),
        losses.diff_instruct_direction(real, fake, weight=rows),
        losses.sid_loss(x, real, fake),
        losses.decoupled_dmd_loss(x, real, fake, fake, real, guidance=3.0),
        losses.denoising_loss(x, real, fake, kind="velocity", weight=rows),
        losses.distillation_dpo_loss(x, real, fake, x, real, fake),
    )
)


@hypothesis.given(
    seed=st.integers(0, 2**31 - 1), order=st.permutations(range(3))
)
def test_rows_do_not_meet(seed, order):
  # Permuting rows permutes results, and a row's result does not depend on the
  # others: NaN in one stays there.
  arrays = [draw(*SHAPE, seed=seed + i) for i in range(3)]
  rows = np.abs(draw(3, seed=seed + 3)) + np.float32(0.1)
  out = _DIRECTIONS(*arrays, rows)
  moved = _DIRECTIONS(*(a[order,] for a in arrays), rows[order,])
  for a, b in zip(out, moved):
    np.testing.assert_array_equal(np.asarray(a)[order,], b)
  arrays[0][0] = np.nan
  arrays[1][0] = np.nan
  for a, b in zip(out, _DIRECTIONS(*arrays, rows)):
    np.testing.assert_array_equal(np.asarray(a)[1:], np.asarray(b)[1:])
    assert np.isnan(np.asarray(b)[0]).all()


@hypothesis.given(
    s=st.floats(0, 0.875, width=32), gap=st.floats(0.0625, 1, width=32)
)
def test_subinterval_kernel_keeps_the_marginal(s, gap):
  # Noising to s and then to t leaves alpha_t x0 + sigma_t noise: the factors of
  # the data multiply and the variances add up, at every 0 <= s < t <= 1.
  s = np.float32(s)
  t = np.float32(s + (1 - s) * gap)
  alpha, sigma = _KERNEL(s, t)
  np.testing.assert_allclose(alpha * (1 - s), 1 - t, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(alpha**2 * s**2 + sigma**2, t**2, rtol=1e-5)


_KERNEL = jax.jit(
    lambda s, t: losses.subinterval_coefficients(straight(s), straight(t))
)


def test_denoising_velocity_without_a_path_is_noise_minus_data():
  x0, noise = jnp.array([[1.0, -2.0]]), jnp.array([[3.0, 0.5]])
  error = losses.denoising_loss(
    jnp.array([[2.0, 2.5]]), x0, noise, kind="velocity"
  )
  np.testing.assert_array_equal(error, [0.0])
