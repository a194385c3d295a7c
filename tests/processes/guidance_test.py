import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import processes
from tests.helpers import one_line_error


def test_guide(strict):
  uncond = jnp.array([[1.0, 2.0], [3.0, -1.0]])
  cond = jnp.array([[2.0, 0.0], [5.0, 1.0]])
  np.testing.assert_allclose(
      processes.guide(uncond, cond, 3.0), [[4.0, -4.0], [9.0, 5.0]]
  )
  np.testing.assert_array_equal(processes.guide(uncond, cond, 1.0), cond)
  np.testing.assert_array_equal(processes.guide(uncond, cond, 0.0), uncond)
  by_row = processes.guide(uncond, cond, jnp.array([0.0, 2.0]))
  np.testing.assert_allclose(by_row, [[1.0, 2.0], [7.0, 3.0]])
  low = uncond.astype(jnp.bfloat16)
  assert processes.guide(low, low, 2.0).dtype == jnp.float32
  assert processes.guide(low, cond, 2.0).dtype == jnp.float32
  with jax.enable_x64(True):
    wide = jnp.ones((2, 2), jnp.float64)
    assert processes.guide(wide, wide, 2.0).dtype == jnp.float64


def test_guided_calls_both_networks():
  fn = processes.guided(lambda x, t: x, lambda x, t: x + t[:, None], 4.0)
  out = fn(jnp.ones((2, 3)), jnp.array([0.0, 0.5]))
  np.testing.assert_allclose(out, [[1.0] * 3, [3.0] * 3])


@pytest.mark.parametrize("w", [0.5, 1.0, 4.0])
def test_conventions_are_those_of_the_papers(w):
  rng = np.random.default_rng(0)
  u, c = rng.normal(size=(2, 3, 4))
  ours = lambda value, **kwargs: np.asarray(processes.guide(
      jnp.asarray(u, jnp.float32), jnp.asarray(c, jnp.float32),
      processes.guidance_from(value, **kwargs),
  ))
  np.testing.assert_allclose(
      ours(w, convention="interpolation"), (1 - w) * u + w * c, rtol=1e-5,
      atol=1e-6,
  )
  np.testing.assert_allclose(
      ours(w, convention="extra"), c + w * (c - u), rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(
      ours(w, convention="extra"), (1 + w) * c - w * u, rtol=1e-5, atol=1e-5
  )


def test_mean_flow_convention_is_its_fixed_point():
  # v_g = omega v + (1 - omega - kappa) u + kappa c has c = v_g for its mean:
  # the conditional field c that trains on itself is u + w (v - u).
  u, v, omega, kappa = 0.3, 2.0, 1.2, 0.4
  c = v
  for _ in range(200):
    c = omega * v + (1 - omega - kappa) * u + kappa * c
  w = processes.guidance_from(omega, convention="mean_flow", kappa=kappa)
  assert w == pytest.approx(omega / (1 - kappa))
  assert u + w * (v - u) == pytest.approx(c)


def test_guidance_from_bad_input():
  with one_line_error("did you mean 'extra'"):
    processes.guidance_from(1.0, convention="extr")
  with one_line_error("kappa must be in"):
    processes.guidance_from(1.0, convention="mean_flow", kappa=1.0)
  with one_line_error("kappa must be 0"):
    processes.guidance_from(1.0, convention="extra", kappa=0.5)


def test_sample_guidance():
  keys = jax.random.split(jax.random.key(0), 4000)
  w = processes.sample_guidance(keys)
  assert float(w.min()) >= 0.5 and float(w.max()) <= 4
  assert float(w.mean()) == pytest.approx(2.25, abs=0.08)
  w = processes.sample_guidance(keys, low=2.0, high=5.0)
  assert float(w.min()) >= 2 and float(w.mean()) == pytest.approx(3.5, abs=0.07)
  w = np.asarray(processes.sample_guidance(keys, choices=(4, 4.5, 5)))
  values, counts = np.unique(w, return_counts=True)
  np.testing.assert_array_equal(values, [4, 4.5, 5])
  np.testing.assert_allclose(counts / 4000, 1 / 3, atol=0.04)
  with one_line_error("high must be"):
    processes.sample_guidance(keys[0], low=2.0, high=1.0)
  with one_line_error("non-empty"):
    processes.sample_guidance(keys[0], choices=())


def _by_loop(guided, cond, share, measure, over):
  """Lin et al. eqs. 14-16, one group of elements after the other."""
  out = np.empty_like(guided)
  groups = {
      "row": [(i,) for i in range(guided.shape[0])],
      "last": list(np.ndindex(guided.shape[:-1])),
      "batch": [()],
  }[over]
  size = np.std if measure == "std" else lambda x: np.sqrt((x**2).sum())
  for i in groups:
    rescaled = guided[i] * size(cond[i]) / size(guided[i])
    out[i] = share * rescaled + (1 - share) * guided[i]
  return out


@pytest.mark.parametrize("over", ["row", "last", "batch"])
@pytest.mark.parametrize("measure", ["std", "norm"])
def test_rescale_guidance(measure, over, x64, strict):
  guided, cond = 1 + np.random.default_rng(0).normal(size=(2, 3, 2, 4))
  args = jnp.asarray(3 * guided), jnp.asarray(cond)
  for share in (0.0, 0.3, 1.0):
    np.testing.assert_allclose(
        processes.rescale_guidance(
            *args, share=share, measure=measure, over=over
        ),
        _by_loop(3 * guided, cond, share, measure, over),
        rtol=1e-12,
    )


def test_rescale_guidance_defaults_are_the_papers(x64):
  guided, cond = 1 + np.random.default_rng(0).normal(size=(2, 3, 2, 4))
  np.testing.assert_allclose(
      processes.rescale_guidance(jnp.asarray(guided), jnp.asarray(cond)),
      _by_loop(guided, cond, 0.7, "std", "row"),
      rtol=1e-12,
  )


def test_rescale_guidance_where_nothing_is_left(strict):
  guided = jnp.array([[0.0, 0.0], [0.3, 0.4], [0.0, 0.0], [3.0, 4.0]])
  cond = jnp.array([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [0.0, 10.0]])

  def fn(guided, cond):
    return processes.rescale_guidance(
        guided, cond, share=0.5, measure="norm"
    )

  np.testing.assert_allclose(
      fn(guided, cond), [[0, 0], [0.15, 0.2], [0, 0], [4.5, 6]], rtol=1e-6
  )
  grads = jax.grad(lambda *a: jnp.sum(fn(*a)), argnums=(0, 1))(guided, cond)
  assert all(bool(jnp.all(jnp.isfinite(g))) for g in grads)
  # Left alone where it is 0; half of it is left where cond is 0.
  np.testing.assert_allclose(grads[0][:3], [[1, 1], [0.5, 0.5], [1, 1]])
  np.testing.assert_array_equal(grads[1][:3], 0)
  # d/d cond of 0.5 g |c| / |g| is 0.5 (sum g / |g|) c / |c|.
  np.testing.assert_allclose(grads[1][3], [0, 0.5 * 7 / 5], rtol=1e-6)


def test_rescale_guidance_widens(strict):
  low = jnp.ones((2, 3), jnp.bfloat16)
  single = jnp.ones((2, 3))
  fn = processes.rescale_guidance
  assert fn(low, low).dtype == jnp.float32
  assert fn(low, single).dtype == fn(single, low).dtype == jnp.float32
  with jax.enable_x64(True):
    wide = jnp.ones((2, 3), jnp.float64)
    assert fn(wide, low).dtype == fn(low, wide).dtype == jnp.float64
    assert fn(wide, single).dtype == fn(single, wide).dtype == jnp.float64


def test_rescale_guidance_bad_input():
  x = jnp.ones((2, 3))
  fn = processes.rescale_guidance
  with one_line_error("cond must be .2, 3. like guided"):
    fn(x, jnp.ones((2, 4)))
  with one_line_error("guided must be a non-empty"):
    fn(x[:0], x[:0])
  with one_line_error("guided must be a floating", TypeError):
    fn(jnp.ones((2, 3), jnp.int32), x)
  with one_line_error("cond must be a floating", TypeError):
    fn(x, jnp.ones((2, 3), jnp.int32))
  with one_line_error("did you mean 'norm'"):
    fn(x, x, measure="norms")
  with one_line_error("did you mean 'last'"):
    fn(x, x, over="lost")
  for share in (-0.1, 1.1):
    with one_line_error(r"share must be in \[0, 1\]"):
      fn(x, x, share=share)


def test_bad_input():
  x = jnp.ones((2, 3))
  with one_line_error("cond must be .2, 3. like uncond"):
    processes.guide(x, jnp.ones((2, 4)), 1.0)
  with one_line_error("non-empty"):
    processes.guide(jnp.ones((0, 3)), jnp.ones((0, 3)), 1.0)
  with one_line_error("guidance must be"):
    processes.guide(x, x, jnp.ones(3))
  with one_line_error("floating", TypeError):
    processes.guide(jnp.ones((2, 3), jnp.int32), x, 1.0)
