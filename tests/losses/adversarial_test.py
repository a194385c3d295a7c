"""Adversarial losses against float64 NumPy written from the formulas."""

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


def draw(*shape, seed=0, scale=2.0):
  rng = np.random.default_rng(seed)
  return rng.normal(scale=scale, size=shape).astype(np.float32)


def softplus(x):
  return np.logaddexp(0.0, np.float64(x))


def relu(x):
  return np.maximum(np.float64(x), 0.0)


REAL, FAKE = draw(3, 2, 4), draw(3, 2, 4, seed=1)
REAL_B, FAKE_B = draw(3, 5, seed=2), draw(3, 5, seed=3)


class TestGan:

  def test_softplus(self):
    expected = softplus(-FAKE).mean((1, 2))
    np.testing.assert_allclose(
        losses.gan_generator_loss(jnp.asarray(FAKE)), expected, rtol=1e-6
    )
    expected = softplus(FAKE).mean((1, 2)) + softplus(-REAL).mean((1, 2))
    np.testing.assert_allclose(
        losses.gan_discriminator_loss(jnp.asarray(REAL), jnp.asarray(FAKE)),
        expected,
        rtol=1e-6,
    )

  def test_hinge(self):
    np.testing.assert_allclose(
        losses.gan_generator_loss(jnp.asarray(FAKE), kind="hinge"),
        -np.float64(FAKE).mean((1, 2)),
        rtol=1e-6,
    )
    expected = relu(1 + FAKE).mean((1, 2)) + relu(1 - REAL).mean((1, 2))
    np.testing.assert_allclose(
        losses.gan_discriminator_loss(
            jnp.asarray(REAL), jnp.asarray(FAKE), kind="hinge"
        ),
        expected,
        rtol=1e-6,
    )

  @pytest.mark.parametrize("kind", ["softplus", "hinge"])
  def test_heads_are_averaged_inside_and_summed(self, kind):
    # Heads of 8 and of 5 logits: neither the mean nor the sum of all 13.
    real = [jnp.asarray(REAL), jnp.asarray(REAL_B)]
    fake = [jnp.asarray(FAKE), jnp.asarray(FAKE_B)]
    single = losses.gan_generator_loss
    np.testing.assert_allclose(
        single(fake, kind=kind),
        single(fake[0], kind=kind) + single(fake[1], kind=kind),
        rtol=1e-6,
    )
    pair = losses.gan_discriminator_loss
    np.testing.assert_allclose(
        pair({"a": real[0], "b": real[1]}, {"a": fake[0], "b": fake[1]},
             kind=kind),
        pair(real[0], fake[0], kind=kind) + pair(real[1], fake[1], kind=kind),
        rtol=1e-6,
    )

  def test_gradient_raises_fake_and_the_discriminator_separates(self):
    fake, real = jnp.asarray(FAKE), jnp.asarray(REAL)
    up = jax.grad(lambda f: losses.gan_generator_loss(f).sum())(fake)
    assert (up < 0).all()
    down_real, down_fake = jax.grad(
        lambda r, f: losses.gan_discriminator_loss(r, f).sum(), argnums=(0, 1)
    )(real, fake)
    assert (down_real < 0).all() and (down_fake > 0).all()

  def test_check_grads(self, x64):
    real, fake = jnp.asarray(np.float64(REAL_B)), jnp.asarray(
        np.float64(FAKE_B)
    )
    out = losses.gan_discriminator_loss(real, fake)
    assert out.dtype == jnp.float64
    both = jax.jit(
        lambda r, f: losses.gan_discriminator_loss(r, f)
        + losses.gan_generator_loss(f)
    )
    test_util.check_grads(both, (real, fake), order=2)

  def test_vectors_and_rows(self):
    row = losses.gan_generator_loss(jnp.asarray(FAKE_B[:, 0]))
    assert row.shape == (3,)
    whole = losses.gan_generator_loss(jnp.asarray(FAKE_B))
    np.testing.assert_allclose(
        whole[1:], losses.gan_generator_loss(jnp.asarray(FAKE_B[1:])),
        rtol=1e-6,
    )

  def test_extremes_stay_finite(self):
    big = jnp.asarray([[1e4], [-1e4]], jnp.float32)
    np.testing.assert_allclose(losses.gan_generator_loss(big), [0.0, 1e4])
    np.testing.assert_allclose(
        losses.gan_discriminator_loss(big, big), [1e4, 1e4]
    )

  @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
  def test_half_in_float32_out(self, dtype):
    half = jnp.asarray(FAKE_B).astype(dtype)
    wide = half.astype(jnp.float32)
    for kind in ("softplus", "hinge"):
      out = losses.gan_generator_loss(half, kind=kind)
      assert out.dtype == jnp.float32
      np.testing.assert_array_equal(
          out, losses.gan_generator_loss(wide, kind=kind)
      )
    out = losses.gan_discriminator_loss(half, half)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(
        out, losses.gan_discriminator_loss(wide, wide)
    )


def logits_of(w, x):
  """Two heads of a quadratic: row-wise, with known slope."""
  return [
      jnp.tanh(x * jnp.reshape(w, (1, -1))),
      jnp.square(jnp.sum(x, axis=1, keepdims=True)),
  ]


class TestR1:

  def setup_method(self):
    self.x = draw(3, 4, seed=5, scale=0.7)
    self.w = draw(4, seed=6, scale=0.7)
    x, w = np.float64(self.x), np.float64(self.w)
    slope = w * (1 - np.tanh(x * w) ** 2) + 2 * x.sum(1, keepdims=True)
    self.squares = slope**2

  def test_value(self):
    fn = lambda x: logits_of(jnp.asarray(self.w), x)
    x = jnp.asarray(self.x)
    np.testing.assert_allclose(
        losses.r1_penalty(fn, x, gamma=0.3),
        0.15 * self.squares.sum(1),
        rtol=2e-5,
    )
    np.testing.assert_allclose(
        losses.r1_penalty(fn, x, gamma=0.3, elements="mean"),
        0.15 * self.squares.mean(1),
        rtol=2e-5,
    )
    # GDD's strength is the default.
    np.testing.assert_allclose(
        losses.r1_penalty(fn, x), 0.5e-4 * self.squares.sum(1), rtol=2e-5
    )

  def test_gradient_reaches_parameters_and_not_the_data(self, x64):
    x, w = jnp.asarray(np.float64(self.x)), jnp.asarray(np.float64(self.w))

    def loss(w, x):
      return losses.r1_penalty(lambda y: logits_of(w, y), x, gamma=2.0).sum()

    got_w, got_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(w, x)
    assert not np.any(got_x)
    step = 1e-6
    for i in range(4):
      e = np.zeros(4)
      e[i] = step
      numeric = (loss(w + e, x) - loss(w - e, x)) / (2 * step)
      np.testing.assert_allclose(got_w[i], numeric, rtol=1e-6)

  def test_dtypes(self, x64):
    fn = lambda x: [jnp.sum(x * x, axis=1)]
    wide = jnp.asarray(np.float64(self.x))
    assert losses.r1_penalty(fn, wide).dtype == jnp.float64
    half = wide.astype(jnp.bfloat16)
    assert losses.r1_penalty(fn, half).dtype == jnp.float32

  def test_bad_input(self):
    fn = lambda x: x
    x = jnp.ones((2, 3))
    with helpers.one_line_error("r1_penalty: gamma must be in .*got -1"):
      losses.r1_penalty(fn, x, gamma=-1.0)
    with helpers.one_line_error("elements must be one of.*did you mean 'sum'"):
      losses.r1_penalty(fn, x, elements="sums")
    with helpers.one_line_error("real must be a non-empty array"):
      losses.r1_penalty(fn, jnp.ones((0, 3)))
    with helpers.one_line_error("real must be a floating array, got int32"):
      losses.r1_penalty(fn, jnp.ones((2, 3), jnp.int32))
    with helpers.one_line_error("logit_fn.*non-empty tree"):
      losses.r1_penalty(lambda x: [], x)
    with helpers.one_line_error(r"real must be \[b, ...\] \(rank >= 1\)"):
      losses.r1_penalty(fn, jnp.float32(1.0))
    with distilljax.debug(), helpers.one_line_error("real must be finite"):
      losses.r1_penalty(fn, x.at[0, 0].set(jnp.nan))

  def test_a_number_a_row(self):
    # d(3 x)/dx = 3.
    out = losses.r1_penalty(lambda x: 3 * x, jnp.ones(2), gamma=1.0)
    np.testing.assert_allclose(out, [4.5, 4.5], rtol=1e-6)


class TestApproximateR1:

  def test_value_and_heads(self):
    expected = ((np.float64(REAL) - FAKE) ** 2).mean((1, 2))
    one = losses.approximate_r1(jnp.asarray(REAL), jnp.asarray(FAKE))
    np.testing.assert_allclose(one, expected, rtol=1e-5)
    expected = expected + ((np.float64(REAL_B) - FAKE_B) ** 2).mean(1)
    two = losses.approximate_r1(
        (jnp.asarray(REAL), jnp.asarray(REAL_B)),
        (jnp.asarray(FAKE), jnp.asarray(FAKE_B)),
    )
    np.testing.assert_allclose(two, expected, rtol=1e-5)

  def test_gradient_flows_through_both(self):
    real, other = jnp.asarray(REAL_B), jnp.asarray(FAKE_B)
    got = jax.grad(
        lambda a, b: losses.approximate_r1(a, b).sum(), argnums=(0, 1)
    )(real, other)
    expected = 2 * (REAL_B - FAKE_B) / 5
    np.testing.assert_allclose(got[0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[1], -expected, rtol=1e-5, atol=1e-6)

  def test_is_r1_to_first_order(self, x64):
    # Linear logits w.x: E over unit noise of (std w.noise)^2 = std^2 |w|^2,
    # here exactly, by noise along every axis in turn.
    w, x, std = np.float64(draw(4, seed=6)), np.float64(draw(1, 4)), 0.1
    rows = jnp.asarray(np.repeat(x, 4, 0))
    logits = lambda y: jnp.sum(y * jnp.asarray(w)[None], axis=1)
    moved = losses.approximate_r1(
        logits(rows), logits(rows + std * jnp.eye(4))
    )
    exact = losses.r1_penalty(logits, jnp.asarray(x), gamma=2.0)
    np.testing.assert_allclose(moved.sum() / std**2, exact[0], rtol=1e-9)

  def test_half_in_float32_out(self):
    a, b = jnp.asarray(REAL_B), jnp.asarray(FAKE_B)
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    out = losses.approximate_r1(a, b)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(
        out,
        losses.approximate_r1(a.astype(jnp.float32), b.astype(jnp.float32)),
    )


@hypothesis.given(seed=st.integers(0, 2**31 - 1))
def test_permutation_and_separation(seed):
  real, fake = draw(4, 6, seed=seed), draw(4, 6, seed=seed + 1)
  for kind in ("softplus", "hinge"):
    fn = _DISCRIMINATOR[kind]
    out = fn(real, fake)
    assert (out >= 0).all()
    np.testing.assert_allclose(
        fn(real[::-1], fake[::-1]), out[::-1], rtol=1e-6
    )
    # Telling the two further apart never costs more.
    assert (fn(real + 1, fake - 1) <= out).all()


_DISCRIMINATOR = {
    kind: jax.jit(
        lambda r, f, kind=kind: losses.gan_discriminator_loss(r, f, kind=kind)
    )
    for kind in ("softplus", "hinge")
}


def test_bad_input():
  x, y = jnp.asarray(REAL_B), jnp.asarray(FAKE_B)
  with helpers.one_line_error(
      "gan_generator_loss: kind must be one of.*did you mean 'softplus'"
  ):
    losses.gan_generator_loss(x, kind="softplu")
  with helpers.one_line_error("gan_discriminator_loss: kind must be one of"):
    losses.gan_discriminator_loss(x, y, kind="ns")
  with helpers.one_line_error("fake_logits must be a non-empty array"):
    losses.gan_generator_loss(jnp.zeros((0, 3)))
  with helpers.one_line_error("fake_logits must be an array or a non-empty"):
    losses.gan_generator_loss([])
  with helpers.one_line_error("fake_logits must be a floating array"):
    losses.gan_generator_loss(jnp.zeros((2, 3), jnp.int32))
  with helpers.one_line_error(r"fake_logits must be \[b, ...\] \(rank >= 1\)"):
    losses.gan_generator_loss(jnp.zeros(()))
  with helpers.one_line_error(r"\[b=3, ...\] like the first head, got \[2, 5"):
    losses.gan_generator_loss([x, y[:2]])
  with helpers.one_line_error("fake_logits must be 1 heads like real_logits"):
    losses.gan_discriminator_loss(x, [x, y])
  with helpers.one_line_error(r"fake_logits must be \[b=3, ...\] like real"):
    losses.gan_discriminator_loss(x, y[:2])
  with helpers.one_line_error(r"perturbed_logits must be \[3, 5\] like real"):
    losses.approximate_r1(x, y[:, :2])
  with helpers.one_line_error("perturbed_logits must be 1 heads"):
    losses.approximate_r1([x], [x, y])
  bad = x.at[0, 0].set(jnp.nan)
  with distilljax.debug(), helpers.one_line_error(
      "fake_logits must be finite"
  ):
    losses.gan_generator_loss(bad)
