"""MMD against pair sums in NumPy."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distilljax
from distilljax import losses
from tests import helpers

N, M, D = 5, 4, 3

# One program a setting; eager calls would compile every operation.
mmd = jax.jit(
    losses.mmd, static_argnames=("kernel", "bandwidths", "unbiased")
)


def sets(seed=0, dtype=None):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(N, D))
  y = 0.7 * rng.normal(size=(M, D)) + 0.5
  return jnp.asarray(x, dtype), jnp.asarray(y, dtype)


def kernel_numpy(a, b, kernel, bandwidths=(), scale=1.0):
  if kernel == "linear":
    return float(np.dot(a, b))
  distance = ((a - b) ** 2).sum()
  return sum(np.exp(-distance / (2 * (h * scale) ** 2)) for h in bandwidths)


def mmd_numpy(x, y, unbiased, **kw):
  """The definition, pair by pair."""
  x, y = np.asarray(x), np.asarray(y)
  k = functools.partial(kernel_numpy, **kw)

  def within(a):
    pairs = [
        k(a[i], a[j])
        for i in range(len(a))
        for j in range(len(a))
        if i != j or not unbiased
    ]
    return np.mean(pairs)

  cross = np.mean([k(a, b) for a in x for b in y])
  return within(x) + within(y) - 2 * cross


SETTINGS = [
    {"kernel": "linear", "unbiased": False},
    {"kernel": "linear", "unbiased": True},
    {"kernel": "rbf", "unbiased": False},
    {"kernel": "rbf", "unbiased": True},
]
IDS = [f"{s['kernel']}-{s['unbiased']}" for s in SETTINGS]


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_mmd_by_pairs(x64, strict, setting):
  x, y = sets()
  rbf = {}
  if setting["kernel"] == "rbf":
    rbf = {"bandwidths": (0.3, 1.0, 2.5), "scale": 1.4}
  expected = mmd_numpy(x, y, **setting, **rbf)
  np.testing.assert_allclose(
      mmd(x, y, **setting, **rbf), expected, rtol=1e-9
  )
  # Masked rows are not there, whatever they hold.
  where_x = jnp.asarray([True, False, True, True, False])
  where_y = jnp.asarray([True, True, False, True])
  expected = mmd_numpy(x[where_x], y[where_y], **setting, **rbf)
  call = functools.partial(mmd, **setting, **rbf)
  dirty_x = jnp.where(where_x[:, None], x, jnp.nan)
  dirty_y = jnp.where(where_y[:, None], y, jnp.nan)
  value, grad = jax.value_and_grad(call)(
      dirty_x, dirty_y, where_x=where_x, where_y=where_y
  )
  np.testing.assert_allclose(value, expected, rtol=1e-9)
  assert np.isfinite(grad).all() and not np.any(grad[~where_x])
  np.testing.assert_allclose(
      call(dirty_x, y, where_x=where_x),
      mmd_numpy(x[where_x], y, **setting, **rbf),
      rtol=1e-9,
  )


def test_mmd_defaults(x64):
  x, y = sets()
  x_np, y_np = np.asarray(x), np.asarray(y)
  expected = ((x_np.mean(0) - y_np.mean(0)) ** 2).sum()
  np.testing.assert_allclose(mmd(x, y), expected, rtol=1e-12)
  both = np.concatenate([x_np, y_np])
  median = np.median([
      np.linalg.norm(both[i] - both[j])
      for i in range(N + M)
      for j in range(i)
  ])
  np.testing.assert_allclose(
      losses.median_bandwidth(x, y), median, rtol=1e-9
  )
  expected = mmd_numpy(
      x, y, False, kernel="rbf", bandwidths=(0.5, 1.0, 2.0), scale=median
  )
  np.testing.assert_allclose(
      mmd(x, y, kernel="rbf"), expected, rtol=1e-9
  )
  # The median of the rows that count.
  where = jnp.asarray([True, True, True, False, False])
  np.testing.assert_allclose(
      mmd(x, y, kernel="rbf", where_x=where),
      mmd(x[:3], y, kernel="rbf"),
      rtol=1e-9,
  )
  # One pair is its own median, below 1 or not.
  x, y = x / 50, y / 50
  one = {"where_x": jnp.arange(N) < 1, "where_y": jnp.arange(M) < 1}
  distance = np.linalg.norm(np.asarray(x[0] - y[0]))
  assert distance < 1
  np.testing.assert_allclose(
      mmd(x, y, kernel="rbf", **one),
      mmd_numpy(
          x[:1], y[:1], False, kernel="rbf", bandwidths=(0.5, 1.0, 2.0),
          scale=distance,
      ),
      rtol=1e-9,
  )


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_mmd_gradient(x64, setting):
  """By finite differences at a fixed scale; none to y or to the scale."""
  x, y = sets()
  call = functools.partial(mmd, **setting, scale=1.2)
  grads = jax.grad(call, argnums=(0, 1))(x, y)
  assert not np.any(grads[1])
  h = 1e-6
  for i, j in ((0, 0), (3, 2)):
    bump = jnp.zeros_like(x).at[i, j].set(h)
    slope = (call(x + bump, y) - call(x - bump, y)) / (2 * h)
    np.testing.assert_allclose(grads[0][i, j], slope, rtol=1e-6)
  if setting == {"kernel": "rbf", "unbiased": False}:
    fixed = float(losses.median_bandwidth(x, y))
    moving = jax.grad(mmd)(x, y, **setting)
    np.testing.assert_allclose(
        moving, jax.grad(mmd)(x, y, **setting, scale=fixed), rtol=1e-9
    )
  grads = jax.grad(losses.median_bandwidth, argnums=(0, 1))(x, y)
  assert not np.any(grads[0]) and not np.any(grads[1])


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_unbiased_is_unbiased(x64, kernel):
  """Mean over all splits of a pool in halves, both from the same pool."""
  rng = np.random.default_rng(1)
  draws = jnp.asarray(rng.normal(size=(2000, 2, 4, 2)))
  values = {}
  for unbiased in (False, True):
    values[unbiased] = jax.jit(
        jax.vmap(
            lambda s, u=unbiased: mmd(
                s[0], s[1], kernel=kernel, scale=1.0, unbiased=u
            )
        )
    )(draws)
  mean, error = (
      float(values[True].mean()),
      float(values[True].std()) / np.sqrt(2000),
  )
  assert abs(mean) < 4 * error  # both sets have the same distribution
  if kernel == "linear":
    # The biased floor: variance (2 dimensions) x (1/n + 1/m) = 2 (1/4 + 1/4).
    floor = float(values[False].mean())
    assert abs(floor - 1.0) < 4 * float(values[False].std()) / np.sqrt(2000)


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
@hypothesis.given(seed=st.integers(0, 2**16))
def test_mmd_is_a_statistic_of_sets(setting, seed):
  """Order does not matter; the biased value is not negative; equal sets: 0."""
  x, y = sets(seed, jnp.float32)
  rng = np.random.default_rng(seed)
  fn = _JITTED[IDS[SETTINGS.index(setting)]]
  out = float(fn(x, y))
  again = float(fn(x[rng.permutation(N)], y[rng.permutation(M)]))
  np.testing.assert_allclose(again, out, rtol=1e-4, atol=1e-6)
  if not setting["unbiased"]:
    assert out >= -1e-6


_JITTED = {
    name: jax.jit(functools.partial(losses.mmd, **setting, scale=1.3))
    for name, setting in zip(IDS, SETTINGS)
}


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_extremes(setting):
  """Too few rows give 0 with gradient 0; equal points do not divide by 0."""
  x, y = sets(0, jnp.float32)
  few = jnp.arange(N) < (1 if setting["unbiased"] else 0)
  call = jax.jit(functools.partial(mmd, **setting, scale=1.3))
  run = jax.jit(jax.value_and_grad(call))
  every_x, every_y = jnp.ones(N, bool), jnp.ones(M, bool)
  value, grad = run(x, y, where_x=few, where_y=every_y)
  assert value == 0 and not np.any(grad)
  value, grad = run(x, y, where_x=every_x, where_y=few[:M])
  assert value == 0 and not np.any(grad)
  # Sets alike: terms of size 9 or less cancel to float32 rounding.
  same = jnp.ones((N, D))
  value, grad = run(same, same[:M], where_x=every_x, where_y=every_y)
  assert abs(value) < 9 * 2**-23 * 4 and np.isfinite(grad).all()


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_one_row_each_is_enough_for_the_biased(kernel):
  x, y = sets(0, jnp.float32)
  first_x, first_y = jnp.arange(N) < 1, jnp.arange(M) < 1
  setting = {"kernel": kernel, "bandwidths": (0.5, 2.0), "scale": 1.3}
  got = mmd(x, y, where_x=first_x, where_y=first_y, **setting)
  want = mmd_numpy(x[:1], y[:1], False, **setting)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_two_rows_each_are_enough_for_the_unbiased(x64):
  x, y = sets()
  got = losses.mmd(x[:2], y[:2], unbiased=True)
  want = mmd_numpy(x[:2], y[:2], True, kernel="linear")
  np.testing.assert_allclose(got, want, rtol=1e-9)


def test_median_of_three_points_and_of_the_rows_that_count():
  # Distances 1, 3, 4: the middle one, not a mean of two.
  x, y = jnp.asarray([[0.0], [1.0]]), jnp.asarray([[4.0]])
  assert float(losses.median_bandwidth(x, y)) == 3
  half = losses.median_bandwidth(
      x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
  )
  assert half.dtype == jnp.float32 and float(half) == 3
  # Fourth and fifth point do not count.
  x = jnp.concatenate([x, jnp.asarray([[70.0]])])
  y = jnp.concatenate([y, jnp.asarray([[-90.0]])])
  rows = {
      "where_x": jnp.asarray([True, True, False]),
      "where_y": jnp.asarray([True, False]),
  }
  np.testing.assert_allclose(
      mmd(x, y, kernel="rbf", **rows),
      mmd(x, y, kernel="rbf", scale=3.0, **rows),
      rtol=1e-6,
  )


def test_points_that_all_coincide_have_a_bandwidth():
  """A median distance of 0 must not be divided by."""
  same = jnp.ones((N, D))
  value, grad = jax.jit(
      jax.value_and_grad(functools.partial(losses.mmd, kernel="rbf"))
  )(same, same[:M])
  assert abs(value) < 9 * 2**-23 * 4 and np.isfinite(grad).all()


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_precision(setting, strict):
  x, y = sets(0, jnp.bfloat16)
  out = mmd(x, y, **setting, scale=1.3)
  assert out.dtype == jnp.float32
  wide = mmd(
      x.astype(jnp.float32), y.astype(jnp.float32), **setting, scale=1.3
  )
  np.testing.assert_array_equal(out, wide)  # promoted before anything else
  with jax.enable_x64(True):
    out = mmd(*sets(0, jnp.float64), **setting, scale=1.3)
    assert out.dtype == jnp.float64


def test_mmd_over_devices(x64):
  """Shards of unequal counts make the global means."""
  rng = np.random.default_rng(2)
  x, y = (jnp.asarray(rng.normal(size=(4, D))) for _ in range(2))
  where = jnp.asarray([True, True, True, False])
  shards = jax.vmap(
      lambda x, y, w: losses.mmd(x, y, where_x=w, axis_name="d"),
      axis_name="d",
  )(*(a.reshape(2, 2, *a.shape[1:]) for a in (x, y, where)))
  whole = mmd(x, y, where_x=where)
  np.testing.assert_allclose(shards, [whole, whole], rtol=1e-12)


def test_bad_input():
  x, y = sets(0, jnp.float32)
  error = helpers.one_line_error
  with error(r"mmd: x must be \[n, d\] \(rank 2\)"):
    losses.mmd(x[0], y)
  with error(r"mmd: y must be \[m, d\] \(rank 2\)"):
    losses.mmd(x, y[0])
  with error(r"mmd: y must be \[m, d=3\] like x, got \[4, 2\]"):
    losses.mmd(x, y[:, :2])
  with error("x must be a non-empty array"):
    losses.mmd(x[:0], y)
  with error("y must be a floating array", TypeError):
    losses.mmd(x, y.astype(int))
  with error("kernel must be one of"):
    losses.mmd(x, y, kernel="gauss")
  with error(r"where_x must be \[n\]=\[5\] like x"):
    losses.mmd(x, y, where_x=jnp.ones(3, bool))
  with error(r"where_y must be \[n\]=\[4\] like y"):
    losses.mmd(x, y, where_y=jnp.ones(3, bool))
  with error("where_x must be a bool array"):
    losses.mmd(x, y, where_x=jnp.ones(5))
  with error("axis_name must be None unless"):
    losses.mmd(x, y, kernel="rbf", axis_name="d")
  with error("axis_name must be None unless"):
    losses.mmd(x, y, unbiased=True, axis_name="d")
  with error("bandwidths must be at least one number"):
    losses.mmd(x, y, kernel="rbf", bandwidths=())
  with error(r"bandwidths must be in \(0"):
    losses.mmd(x, y, kernel="rbf", bandwidths=(0.0,))
  with error(r"scale must be in \(0"):
    losses.mmd(x, y, kernel="rbf", scale=0.0)
  for few in ((x[:1], y), (x, y[:1])):
    with error("x and y must be at least two rows each"):
      losses.mmd(*few, unbiased=True)
  with error(r"median_bandwidth: y must be \[m, d=3\]"):
    losses.median_bandwidth(x, y[:, :2])
  dirty = y.at[0, 0].set(jnp.nan)
  with distilljax.debug():
    with error("mmd: y must be finite"):
      losses.mmd(x, dirty)
    losses.mmd(x, dirty, where_y=jnp.arange(M) > 0)  # not there
    with error("median_bandwidth: y must be finite"):
      losses.median_bandwidth(x, dirty)
