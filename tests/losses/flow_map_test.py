"""Flow maps against closed forms: exact maps, hand-made derivatives."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import distilljax
from distilljax import losses
from tests import helpers

B, D = 4, 3
T = np.array([0.9, 0.7, 0.5, 1.0])
S = np.array([0.6, 0.55, 0.5, 0.5])
R = np.array([0.25, 0.5, 0.5, 0.0])  # row 2: r = s = t


def arrays(seed=0, dtype=None, n=2):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=(B, D)), dtype) for _ in range(n)]


def times(dtype=None):
  return tuple(jnp.asarray(a, dtype) for a in (T, S, R))


def col(a):
  return a[:, None]


# The stand-in: u = sin(w x) t^2 + r^3 x + q t r, with its derivatives by hand.
W, Q = 1.3, 0.7


def net(x, t, r, w=W, q=Q):
  t, r = (time[:, None].astype(x.dtype) for time in (t, r))
  return jnp.sin(w * x) * t**2 + r**3 * x + q * t * r


def u_numpy(x, t, r, w=W, q=Q):
  x, t, r = np.asarray(x), col(t), col(r)
  return np.sin(w * x) * t**2 + r**3 * x + q * t * r


def slope_numpy(x, v, t, r):
  """d/dt along (v, 1, 0)."""
  x, v, t, r = np.asarray(x), np.asarray(v), col(t), col(r)
  return v * (W * np.cos(W * x) * t**2 + r**3) + 2 * t * np.sin(W * x) + Q * r


# An exact flow: dx/dt = a t x, so X(x, t, r) = x exp(a (r^2 - t^2) / 2).
A = 1.1


def exact_velocity(x, t):
  return A * t[:, None] * x


def exact_u(x, t, r):
  t, r = t[:, None], r[:, None]
  gap = jnp.where(t > r, t - r, 1.0)
  mean = x * -jnp.expm1(A * (r**2 - t**2) / 2) / gap
  return jnp.where(t > r, mean, A * t * x)


def exact_map(x, t, r):
  return x * np.exp(A * (col(r) ** 2 - col(t) ** 2) / 2)


def test_step_matches_exact_map(x64, strict):
  (x,) = arrays(n=1)
  t, _, r = times()
  out = losses.flow_map_step(x, exact_u(x, t, r), t, r)
  np.testing.assert_allclose(out, exact_map(x, T, R), rtol=1e-12)


def test_identities_vanish_on_the_exact_map(x64, strict):
  (x,) = arrays(n=1)
  t, s, r = times()
  u, target = losses.eulerian_target(
      exact_u, x, exact_velocity(x, t), t, r
  )
  np.testing.assert_allclose(u, target, atol=1e-12)
  residual = losses.lagrangian_residual(exact_u, x, t, r, exact_velocity)
  np.testing.assert_allclose(residual, np.zeros((B, D)), atol=1e-12)
  middle = losses.semigroup_target(exact_u, x, t, s, r)
  np.testing.assert_allclose(middle, u, rtol=1e-12)


def test_eulerian_target_by_hand(x64, strict):
  x, v = arrays()
  t, _, r = times()
  u, slope = losses.path_derivative(net, x, v, t, r)
  np.testing.assert_allclose(u, u_numpy(x, T, R), rtol=1e-12)
  np.testing.assert_allclose(slope, slope_numpy(x, v, T, R), rtol=1e-12)
  u, target = losses.eulerian_target(net, x, v, t, r)
  np.testing.assert_allclose(u, u_numpy(x, T, R), rtol=1e-12)
  expected = v - col(T - R) * slope_numpy(x, v, T, R)
  np.testing.assert_allclose(target, expected, rtol=1e-12)
  np.testing.assert_array_equal(target[2], v[2])  # r = t: flow matching


def test_difference_quotients_by_hand(x64, strict):
  x, v = arrays()
  t, _, r = times()
  h = 0.05
  call = functools.partial(losses.eulerian_target, net, x, v, t, r, step=h)

  def at(low, high):
    rise = u_numpy(x + col(high - T) * v, high, R) - u_numpy(
        x + col(low - T) * v, low, R
    )
    slope = rise / np.where(high > low, high - low, 1)[:, None]
    return v - col(T - R) * slope

  _, target = call(derivative="central", clamp=False)
  np.testing.assert_allclose(target, at(T - h, T + h), rtol=1e-12)
  _, target = call(derivative="backward", clamp=False)
  np.testing.assert_allclose(target, at(T - h, T), rtol=1e-12)
  # Clamped: row 3 (t = 1) loses its upper half, row 2 (r = t) its lower one.
  low, high = np.maximum(T - h, R), np.minimum(T + h, 1.0)
  _, target = call(derivative="central")
  np.testing.assert_allclose(target, at(low, high), rtol=1e-12)
  _, target = call(derivative="backward")
  np.testing.assert_allclose(target, at(low, T), rtol=1e-12)
  # The gap of a row with r = t = 1 is 0 / 0 without care.
  one = jnp.ones(B)
  for kind in ("central", "backward"):
    _, target = losses.eulerian_target(net, x, v, one, one, derivative=kind)
    np.testing.assert_array_equal(target, v)
  # The default step is 5e-3.
  _, target = losses.eulerian_target(
      net, x, v, t, r, derivative="central", clamp=False
  )
  np.testing.assert_allclose(target, at(T - 5e-3, T + 5e-3), rtol=1e-12)


def test_difference_quotient_never_leaves_its_interval(x64):
  seen = []

  def spy(x, t, r):
    seen.append(np.asarray(t))
    return x

  x, v = arrays()
  t, _, r = times()
  losses.eulerian_target(spy, x, v, t, r, derivative="central", step=0.3)
  assert len(seen) == 3
  for time in seen:
    assert (time >= R).all() and (time <= 1).all()


@pytest.mark.parametrize("derivative", ["exact", "central", "backward"])
def test_eulerian_gradient_reaches_the_prediction_only(x64, derivative):
  x, v = arrays()
  t, _, r = times()

  def pair(w, v):
    return losses.eulerian_target(
        functools.partial(net, w=w), x, v, t, r, derivative=derivative
    )

  ones = jnp.ones((B, D))
  _, pull = jax.vjp(pair, W, v)
  grad_w, grad_v = pull((ones, 0 * ones))
  expected = (x * np.cos(W * x) * col(T) ** 2).sum()
  np.testing.assert_allclose(grad_w, expected, rtol=1e-12)
  assert not np.any(grad_v)
  grad_w, grad_v = pull((0 * ones, ones))
  assert grad_w == 0 and not np.any(grad_v)


def test_lagrangian_residual_by_hand(x64, strict):
  (x,) = arrays(n=1)
  t, _, r = times()
  teacher = lambda x, r: jnp.cos(x) * r[:, None]
  u = u_numpy(x, T, R)
  slope = 3 * col(R) ** 2 * x + Q * col(T)
  end = x - col(T - R) * u
  expected = u - col(T - R) * slope - np.cos(end) * col(R)
  for stop in (False, True):
    residual = losses.lagrangian_residual(
        net, x, t, r, teacher, stop_tangent=stop
    )
    np.testing.assert_allclose(residual, expected, rtol=1e-10)


def test_lagrangian_gradient(x64):
  """Through u and the JVP; not through the point or the teacher."""
  (x,) = arrays(n=1)
  t, _, r = times()

  def total(q, scale, stop):
    return losses.lagrangian_residual(
        functools.partial(net, q=q),
        x,
        t,
        r,
        lambda x, r: scale * jnp.cos(x),
        stop_tangent=stop,
    ).sum()

  # d/dq: u gives t r, (t - r) du/dr gives (t - r) t.
  grads = jax.grad(total, argnums=(0, 1))(Q, 1.0, False)
  np.testing.assert_allclose(
      grads[0], D * (T * R - (T - R) * T).sum(), rtol=1e-12
  )
  assert grads[1] == 0
  grads = jax.grad(total, argnums=(0, 1))(Q, 1.0, True)
  np.testing.assert_allclose(grads[0], D * (T * R).sum(), rtol=1e-12)
  assert grads[1] == 0


def test_lagrangian_self_distillation_is_frozen(x64):
  """The student's own instantaneous velocity as teacher gets no gradient."""
  (x,) = arrays(n=1)
  t, _, r = times()

  def total(q, teacher_q):
    own = lambda x, r: net(x, r, r, q=teacher_q)
    return losses.lagrangian_residual(
        functools.partial(net, q=q), x, t, r, own
    ).sum()

  assert jax.grad(total, argnums=1)(Q, Q) == 0


def test_semigroup_target_by_hand(x64, strict):
  (x,) = arrays(n=1)
  t, s, r = times()
  first = u_numpy(x, T, S)
  middle = x - col(T - S) * first
  second = u_numpy(middle, S, R)
  whole = np.where(T > R, T - R, 1)
  expected = (col(T - S) * first + col(S - R) * second) / col(whole)
  expected = np.where(col(T > R), expected, first)  # row 2: r = s = t
  target = losses.semigroup_target(net, x, t, s, r)
  np.testing.assert_allclose(target, expected, rtol=1e-12)
  # Another network for the first leg, and a clip on the middle and the target.
  clip = 0.4
  first = 2 * x
  middle = np.clip(x - col(T - S) * first, -clip, clip)
  second = u_numpy(middle, S, R)
  expected = (col(T - S) * first + col(S - R) * second) / col(whole)
  expected = np.where(col(T > R), expected, first)
  target = losses.semigroup_target(
      net, x, t, s, r, first_fn=lambda x, t, r: 2 * x, clip=clip
  )
  np.testing.assert_allclose(
      target, np.clip(expected, -clip, clip), rtol=1e-12
  )


def test_semigroup_target_is_frozen(x64):
  (x,) = arrays(n=1)
  t, s, r = times()

  def total(w, scale, x):
    return losses.semigroup_target(
        functools.partial(net, w=w),
        x,
        t,
        s,
        r,
        first_fn=lambda x, t, r: scale * x,
    ).sum()

  grads = jax.grad(total, argnums=(0, 1, 2))(W, 1.0, jnp.asarray(x))
  assert not any(np.any(g) for g in grads)


def test_adaptive_loss(x64, strict):
  error = jnp.array([0.0, 0.5, 40.0])
  for p, eps in ((1.0, 0.01), (0.5, 0.3), (0.0, 0.01)):
    fn = functools.partial(losses.adaptive_loss, norm_p=p, norm_eps=eps)
    weight = 1 / (np.asarray(error) + eps) ** p
    np.testing.assert_allclose(fn(error), error * weight, rtol=1e-12)
    grad = jax.grad(lambda e, fn=fn: fn(e).sum())(error)
    np.testing.assert_allclose(grad, weight, rtol=1e-12)
  # The defaults are the official ones.
  np.testing.assert_allclose(
      losses.adaptive_loss(error), error / (error + 1e-2), rtol=1e-12
  )


@pytest.mark.parametrize("elements", ["mean", "sum"])
def test_mean_flow_loss_by_hand(x64, strict, elements):
  x, v = arrays()
  t, _, r = times()
  p, eps = 0.75, 0.02
  difference = u_numpy(x, T, R) - v + col(T - R) * slope_numpy(x, v, T, R)
  count = D if elements == "mean" else 1
  error = (difference**2).sum(1) / count
  weight = 1 / (error + eps) ** p
  call = functools.partial(
      losses.mean_flow_terms, norm_p=p, norm_eps=eps, elements=elements
  )
  terms = call(net, x, v, t, r)
  np.testing.assert_allclose(terms.error, error, rtol=1e-12)
  np.testing.assert_allclose(terms.loss, error * weight, rtol=1e-12)
  np.testing.assert_array_equal(
      losses.mean_flow_loss(
          net, x, v, t, r, norm_p=p, norm_eps=eps, elements=elements
      ),
      terms.loss,
  )
  # Gradient: the weight, the target and the velocity are constants.
  grads = jax.grad(
      lambda w, v: call(functools.partial(net, w=w), x, v, t, r).loss.sum(),
      argnums=(0, 1),
  )(W, jnp.asarray(v))
  du_dw = x * np.cos(W * x) * col(T) ** 2
  expected = (col(weight) * 2 * difference / count * du_dw).sum()
  np.testing.assert_allclose(grads[0], expected, rtol=1e-12)
  assert not np.any(grads[1])
  error_grad = jax.grad(
      lambda w: call(functools.partial(net, w=w), x, v, t, r).error.sum()
  )(W)
  assert error_grad == 0


def test_mean_flow_defaults(x64):
  """Mean over elements, p = 1, eps = 0.01."""
  x, v = arrays()
  t, _, r = times()
  difference = u_numpy(x, T, R) - v + col(T - R) * slope_numpy(x, v, T, R)
  error = (difference**2).mean(1)
  np.testing.assert_allclose(
      losses.mean_flow_loss(net, x, v, t, r), error / (error + 1e-2)
  )
  np.testing.assert_allclose(
      losses.mean_flow_terms(net, x, v, t, r).loss, error / (error + 1e-2)
  )


def test_mean_flow_is_flow_matching_where_r_is_t(x64):
  x, v = arrays()
  t = jnp.asarray(T)
  loss = losses.mean_flow_loss(net, x, v, t, t, norm_p=0.0)
  np.testing.assert_allclose(
      loss, ((u_numpy(x, T, T) - v) ** 2).mean(1), rtol=1e-12
  )


def test_gradients_second_order(x64):
  """Both modes through u, with the frozen target computed beforehand."""
  x, v = arrays()
  t, _, r = times()
  _, target = losses.eulerian_target(net, x, v, t, r)

  def by_constant(w):
    u, _ = losses.eulerian_target(functools.partial(net, w=w), x, v, t, r)
    return jnp.square(u - target).sum()

  check_grads(by_constant, (W,), order=2, modes=("fwd", "rev"))
  # The exact map's residual is differentiable through the JVP, twice.
  teacher = lambda x, r: jnp.zeros_like(x)
  check_grads(
      lambda q: losses.lagrangian_residual(
          functools.partial(net, q=q), x, t, r, teacher
      ),
      (Q,),
      order=2,
      modes=("fwd", "rev"),
  )


def test_mean_flow_velocity(x64, strict):
  v, c = arrays(1)
  (n,) = arrays(2, n=1)
  t = jnp.asarray(T)
  omega, kappa = 1.7, 0.4
  guided = omega * v + (1 - omega - kappa) * n + kappa * c
  call = functools.partial(
      losses.mean_flow_velocity, omega=omega, kappa=kappa
  )
  np.testing.assert_allclose(call(v, c, n, t), guided, rtol=1e-12)
  # Both ends of the interval are guided, the rest is not.
  out = call(v, c, n, t, t_start=0.7, t_end=0.9)
  inside = col((T >= 0.7) & (T <= 0.9))
  np.testing.assert_allclose(out, np.where(inside, guided, v), rtol=1e-12)
  # At the fixed point u_cond = v_g it is guidance with w = omega / (1 - kappa).
  fixed = n + omega / (1 - kappa) * (v - n)
  np.testing.assert_allclose(call(v, fixed, n, t), fixed, rtol=1e-12)
  grads = jax.grad(lambda *a: call(*a, t).sum(), argnums=(0, 1, 2))(v, c, n)
  assert not any(np.any(g) for g in grads)


LOSSES = {
    "mean_flow": lambda x, v, t, r: losses.mean_flow_loss(net, x, v, t, r),
    "lagrangian": lambda x, v, t, r: losses.lagrangian_residual(
        net, x, t, r, lambda x, r: x
    ),
    "semigroup": lambda x, v, t, r: losses.semigroup_target(
        net, x, t, (t + r) / 2, r
    ),
    "eulerian": lambda x, v, t, r: losses.eulerian_target(net, x, v, t, r)[1],
    "step": lambda x, v, t, r: losses.flow_map_step(x, v, t, r),
}


@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_in_float32_out(name, strict):
  x, v = arrays(dtype=jnp.bfloat16)
  t, _, r = times(jnp.float32)
  out = LOSSES[name](x, v, t, r)
  assert out.dtype == jnp.float32
  exact = LOSSES[name](x.astype(jnp.float32), v.astype(jnp.float32), t, r)
  # The network ran in bfloat16 (8 bits), everything else did not.
  np.testing.assert_allclose(out, exact, atol=0.05 * np.abs(exact).max())


@pytest.mark.parametrize("name", LOSSES)
def test_float64_stays(name, x64):
  x, v = arrays()
  t, _, r = times()
  assert LOSSES[name](x, v, t, r).dtype == jnp.float64


_JITTED = {name: jax.jit(fn) for name, fn in LOSSES.items()}


@pytest.mark.parametrize("name", LOSSES)
@hypothesis.given(seed=st.integers(0, 2**16))
def test_rows_are_independent(name, seed):
  """Permuting rows permutes the output; no row sees another one."""
  rng = np.random.default_rng(seed)
  x, v = (rng.normal(size=(B, D)).astype(np.float32) for _ in range(2))
  t = rng.uniform(size=B).astype(np.float32)
  r = (t * rng.uniform(size=B)).astype(np.float32)
  order = rng.permutation(B)
  fn = _JITTED[name]
  out = np.asarray(fn(x, v, t, r))
  np.testing.assert_allclose(
      fn(x[order], v[order], t[order], r[order]), out[order], rtol=1e-5
  )
  assert out.shape[0] == B and np.isfinite(out).all()


@hypothesis.given(scale=st.floats(0.01, 100.0), seed=st.integers(0, 2**16))
def test_scale_of_the_semigroup(scale, seed):
  """A linear network's target is linear in the state."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(B, D)).astype(np.float32)
  t, s, r = times(np.float32)
  fn = _LINEAR
  np.testing.assert_allclose(
      fn(scale * x, t, s, r), scale * fn(x, t, s, r), rtol=2e-5
  )


_LINEAR = jax.jit(
    lambda x, t, s, r: losses.semigroup_target(
        lambda x, t, r: x * (t + r)[:, None], x, t, s, r
    )
)


def test_bad_input():
  x, v = arrays(dtype=jnp.float32)
  t, _, r = times(jnp.float32)
  wrong = x[:, :2]
  with helpers.one_line_error(r"flow_map_step: u must be \[4, 3\] like x_t"):
    losses.flow_map_step(x, wrong, t, r)
  with helpers.one_line_error(r"mean_flow_loss: v must be \[4, 3\]"):
    losses.mean_flow_loss(net, x, wrong, t, r)
  with helpers.one_line_error(r"mean_flow_loss: r must be \[b\]=\[4\]"):
    losses.mean_flow_loss(net, x, v, t, r[:2])
  with helpers.one_line_error(r"eulerian_target: t must be \[b\]=\[4\]"):
    losses.eulerian_target(net, x, v, t[:, None], r)
  with helpers.one_line_error("eulerian_target: derivative must be one of"):
    losses.eulerian_target(net, x, v, t, r, derivative="centre")
  with helpers.one_line_error(r"eulerian_target: step must be in \(0, inf"):
    losses.eulerian_target(net, x, v, t, r, step=0.0)
  with helpers.one_line_error("path_derivative: derivative must be one of"):
    losses.path_derivative(net, x, v, t, r, derivative="centre")
  with helpers.one_line_error(r"path_derivative: v must be \[4, 3\]"):
    losses.path_derivative(net, x, wrong, t, r)
  with helpers.one_line_error(r"path_derivative: r must be \[b\]=\[4\]"):
    losses.path_derivative(net, x, v, t, r[:2])
  with helpers.one_line_error("mean_flow_loss: elements must be one of"):
    losses.mean_flow_loss(net, x, v, t, r, elements="max")
  with helpers.one_line_error(r"adaptive_loss: norm_p must be in \[0, inf"):
    losses.mean_flow_loss(net, x, v, t, r, norm_p=-1.0)
  with helpers.one_line_error(r"adaptive_loss: norm_eps must be in \(0, inf"):
    losses.mean_flow_loss(net, x, v, t, r, norm_eps=0.0)
  with helpers.one_line_error(r"adaptive_loss: error must be \[b\]"):
    losses.adaptive_loss(x)
  with helpers.one_line_error(r"semigroup_target: clip must be in \(0, inf"):
    losses.semigroup_target(net, x, t, t, r, clip=0.0)
  with helpers.one_line_error(r"velocity_fn\(x, t, r\) must be .* like x_t"):
    losses.mean_flow_loss(lambda x, t, r: x[:, :1], x, v, t, r)
  with helpers.one_line_error(r"teacher_fn\(x, r\) must be .* like x_t"):
    losses.lagrangian_residual(net, x, t, r, lambda x, r: x[:, :1])
  with helpers.one_line_error(r"first_fn\(x, t, s\) must be .* like x_t"):
    losses.semigroup_target(
        net, x, t, t, r, first_fn=lambda x, t, r: x[:, :1]
    )
  with helpers.one_line_error("x_t must be a non-empty array"):
    losses.mean_flow_loss(net, x[:0], v[:0], t[:0], r[:0])
  with helpers.one_line_error("x_t must be a floating array", TypeError):
    losses.mean_flow_loss(net, x.astype(int), v, t, r)
  with helpers.one_line_error(r"kappa must be in \[0, 1\)"):
    losses.mean_flow_velocity(x, x, x, t, omega=1.0, kappa=1.0)
  with helpers.one_line_error(r"omega must be in \[0, inf"):
    losses.mean_flow_velocity(x, x, x, t, omega=-1.0, kappa=0.0)


@pytest.mark.parametrize("name", LOSSES)
def test_bad_values_in_debug_mode(name):
  x, v = arrays(dtype=jnp.float32)
  t, _, r = times(jnp.float32)
  call = LOSSES[name]
  with distilljax.debug():
    call(x, v, t, r)
    low = "s" if name == "semigroup" else "r"
    with helpers.one_line_error(f"{low} must be <= t everywhere"):
      call(x, v, r, t)
    with helpers.one_line_error(r"t must be in \[0, 1\]"):
      call(x, v, t + 0.5, r)
    with helpers.one_line_error(r"r must be in \[0, 1\]"):
      call(x, v, t, r - 0.5)
    with helpers.one_line_error("x_t must be finite"):
      call(x.at[1, 1].set(jnp.nan), v, t, r)
