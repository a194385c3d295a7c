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
  # Another network for the first leg, and bounds on the middle and the target.
  clip = 0.4
  first = 2 * x
  middle = np.clip(x - col(T - S) * first, -clip, clip)
  second = u_numpy(middle, S, R)
  expected = (col(T - S) * first + col(S - R) * second) / col(whole)
  expected = np.where(col(T > R), expected, first)
  target = losses.semigroup_target(
      net, x, t, s, r, first_fn=lambda x, t, r: 2 * x, clip=clip
  )
  np.testing.assert_allclose(target, expected, rtol=1e-12)
  target = losses.semigroup_target(
      net,
      x,
      t,
      s,
      r,
      first_fn=lambda x, t, r: 2 * x,
      clip=clip,
      clip_target=0.3,
  )
  np.testing.assert_allclose(
      target, np.clip(expected, -0.3, 0.3), rtol=1e-12
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
  with helpers.one_line_error(r"clip_target must be in \(0, inf"):
    losses.semigroup_target(net, x, t, t, r, clip_target=-1.0)
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
  with helpers.one_line_error(r"x_t must be \[b, \*s\] \(rank >= 1\)"):
    losses.flow_map_step(x[0, 0], x[0, 0], t[0], r[0])
  whole = jnp.ones(4, jnp.int32)
  with helpers.one_line_error("t must be a floating array, got int32"):
    losses.flow_map_step(x, v, whole, r)
  with helpers.one_line_error("r must be a floating array, got int32"):
    losses.flow_map_step(x, v, t, whole)


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


# The rest of the family: settings of the core, one by one.


def test_flow_map_loss_is_its_settings(x64, strict):
  x, v = arrays()
  t, s, r = times()
  teacher = lambda x, r: jnp.cos(x) * r[:, None]
  ema = functools.partial(net, q=0.2)
  first = lambda x, t, r: 2 * x
  cases = {
      "eulerian": (
          {"v": v},
          np.subtract(*losses.eulerian_target(net, x, v, t, r)),
      ),
      "lagrangian": (
          {"teacher_fn": teacher},
          losses.lagrangian_residual(net, x, t, r, teacher),
      ),
      "semigroup": (
          {"s": s, "target_fn": ema, "first_fn": first},
          u_numpy(x, T, R)
          - losses.semigroup_target(ema, x, t, s, r, first_fn=first),
      ),
  }
  for identity, (extra, residual) in cases.items():
    residual = np.asarray(residual)
    terms = losses.flow_map_loss(net, x, t, r, identity=identity, **extra)
    error = (residual**2).mean(1)
    np.testing.assert_allclose(terms.error, error, rtol=1e-10)
    np.testing.assert_allclose(terms.loss, error / (error + 1e-2), rtol=1e-10)
    terms = losses.flow_map_loss(
        net, x, t, r, identity=identity, elements="sum",
        norm_p=0.5, norm_eps=0.2, **extra,
    )  # fmt: skip
    np.testing.assert_allclose(terms.error, D * error, rtol=1e-10)
    np.testing.assert_allclose(
        terms.loss, D * error / (D * error + 0.2) ** 0.5, rtol=1e-10
    )
  # Without target_fn the semigroup's legs are the student's own.
  terms = losses.flow_map_loss(
      net, x, t, r, identity="semigroup", s=s, norm_p=0.0
  )
  residual = u_numpy(x, T, R) - losses.semigroup_target(net, x, t, s, r)
  np.testing.assert_allclose(
      terms.loss, (np.asarray(residual) ** 2).mean(1), rtol=1e-10
  )


@pytest.mark.parametrize("elements", ["mean", "sum"])
def test_tangent_normalizer(x64, elements):
  """The value of the residual is normalised, its derivative is kept."""
  (x,) = arrays(n=1)
  t, _, r = times()
  teacher = lambda x, r: jnp.cos(x)
  c = 0.3
  residual = lambda q: losses.lagrangian_residual(
      functools.partial(net, q=q), x, t, r, teacher
  )
  value, slope = jax.jvp(residual, (Q,), (1.0,))
  value, slope = np.asarray(value), np.asarray(slope)
  count = D if elements == "mean" else 1
  norm = np.sqrt((value**2).sum(1, keepdims=True) / count)
  unit = value / (norm + c)
  call = lambda q, **kw: losses.flow_map_loss(
      functools.partial(net, q=q), x, t, r, identity="lagrangian",
      teacher_fn=teacher, normalizer="tangent", elements=elements, **kw,
  )  # fmt: skip
  terms = call(Q, tangent_c=c)
  np.testing.assert_allclose(
      terms.loss, (unit**2).sum(1) / count, rtol=1e-10
  )
  np.testing.assert_allclose(
      terms.error, (value**2).sum(1) / count, rtol=1e-10
  )
  grad = jax.grad(lambda q: call(q, tangent_c=c).loss.sum())(Q)
  np.testing.assert_allclose(
      grad, (2 * unit * slope).sum() / count, rtol=1e-10
  )
  # The default constant is 0.1; stop_tangent reaches the residual.
  unit = value / (norm + 0.1)
  np.testing.assert_allclose(
      call(Q).loss, (unit**2).sum(1) / count, rtol=1e-10
  )
  stopped = jax.jvp(
      lambda q: losses.lagrangian_residual(
          functools.partial(net, q=q), x, t, r, teacher, stop_tangent=True
      ),
      (Q,),
      (1.0,),
  )[1]
  grad = jax.grad(lambda q: call(q, stop_tangent=True).loss.sum())(Q)
  np.testing.assert_allclose(
      grad, (2 * unit * np.asarray(stopped)).sum() / count, rtol=1e-10
  )


def test_flow_map_loss_freezes(x64):
  (x,) = arrays(n=1)
  v = x[::-1]
  t, s, r = times()
  call = functools.partial(losses.flow_map_loss, net, x, t, r)
  frozen = {
      "v": lambda a: call(identity="eulerian", v=a * v),
      "teacher": lambda a: call(
          identity="lagrangian", teacher_fn=lambda x, r: a * x
      ),
      "target": lambda a: call(
          identity="semigroup", s=s, target_fn=functools.partial(net, w=a)
      ),
  }
  for fn in frozen.values():
    assert jax.grad(lambda a, fn=fn: fn(a).loss.sum())(1.0) == 0
    # error is for the log: no gradient, not even to the student.
  grad = jax.grad(
      lambda w: losses.flow_map_loss(
          functools.partial(net, w=w), x, t, r, v=v
      ).error.sum()
  )(W)
  assert grad == 0


def test_straight_path(x64, strict):
  x0, noise = arrays()
  t = jnp.asarray(T)
  for low in (0.0, 0.1):
    x_t, v = losses.straight_path(x0, noise, t, sigma_min=low)
    sigma = low + (1 - low) * col(T)
    expected = (1 - col(T)) * np.asarray(x0) + sigma * np.asarray(noise)
    np.testing.assert_allclose(x_t, expected, rtol=1e-12)
    np.testing.assert_allclose(
        v, (1 - low) * np.asarray(noise) - np.asarray(x0), rtol=1e-12
    )
    # v is the derivative of x_t.
    slope = jax.jvp(
        lambda t, low=low: losses.straight_path(x0, noise, t, sigma_min=low)[
            0
        ],
        (t,),
        (jnp.ones_like(t),),
    )[1]
    np.testing.assert_allclose(slope, v, rtol=1e-12)


def test_shortcut_target(x64, strict):
  (x,) = arrays(n=1)
  t = jnp.asarray([1.0, 0.5, 0.75, 0.5])
  d = jnp.asarray([1.0, 0.5, 0.25, 0.125])
  expected = losses.semigroup_target(
      net, x, t, t - d / 2, t - d, clip=4.0, clip_target=4.0
  )
  np.testing.assert_allclose(
      losses.shortcut_target(net, x, t, d), expected, rtol=1e-12
  )
  # Both bounds are 4 unless said otherwise.
  big = lambda x, t, r: 10 * x
  out = losses.shortcut_target(big, 3 * x, t, d)
  first = 30 * np.asarray(x)
  middle = np.clip(3 * np.asarray(x) - col(d) / 2 * first, -4, 4)
  mean = (first + 10 * middle) / 2
  np.testing.assert_allclose(out, np.clip(mean, -4, 4), rtol=1e-12)
  out = losses.shortcut_target(big, 3 * x, t, d, clip_target=None)
  np.testing.assert_allclose(out, mean, rtol=1e-12)
  out = losses.shortcut_target(big, 3 * x, t, d, clip=None, clip_target=None)
  middle = 3 * np.asarray(x) - col(d) / 2 * first
  np.testing.assert_allclose(out, (first + 10 * middle) / 2, rtol=1e-12)


def anyflow_numpy(x, v, t, r, w, weight, fused, anchors, mean_of=None):
  """AnyFlow's loss and its factor on the gradient, from the card."""
  u, n = u_numpy(x, t, r), u_numpy(x, t, r, q=0.2)
  slope = slope_numpy(x, v, t, r)
  # d/dt of the stand-in with q = 0.2 differs by (0.2 - Q) r.
  other = slope + (0.2 - Q) * col(r)
  hat = (u - (1 - w) * n) / w
  d = (slope - (1 - w) * other if fused else slope) / w
  residual = hat - np.asarray(v) + col(t - r) * d
  loss = weight * (residual**2).mean(1)
  mean = loss[anchors].mean() if mean_of is None else mean_of
  scale = np.where(anchors, 1, mean / (loss + 1e-5))
  return loss * scale, scale[:, None] * weight[:, None] * 2 * residual / D


@pytest.mark.parametrize("differentiate", ["fused", "cond"])
def test_anyflow_loss(x64, strict, differentiate):
  x, v = arrays()
  t, _, r = times()
  w = 3.0
  weight = np.array([0.5, 1.0, 2.0, 1.5])
  anchors = T == R  # row 2

  def call(w_net=W, w_uncond=W, v=v, **kw):
    return losses.anyflow_loss(
        functools.partial(net, w=w_net),
        x,
        v,
        t,
        r,
        uncond_fn=functools.partial(net, w=w_uncond, q=0.2),
        guidance_scale=w,
        differentiate=differentiate,
        time_weight=jnp.asarray(weight),
        **kw,
    )

  fused = differentiate == "fused"
  loss, pull = anyflow_numpy(x, v, T, R, w, weight, fused, anchors)
  np.testing.assert_allclose(call(), loss, rtol=1e-10)
  grads = jax.grad(lambda *a: call(*a).sum(), argnums=(0, 1, 2))(W, W, v)
  du_dw = np.asarray(x) * np.cos(W * np.asarray(x)) * col(T) ** 2
  np.testing.assert_allclose(grads[0], (pull * du_dw / w).sum(), rtol=1e-9)
  assert grads[1] == 0 and not np.any(grads[2])
  # Other anchors; the mean from elsewhere; and no anchor at all.
  chosen = np.array([True, False, True, False])
  loss, _ = anyflow_numpy(x, v, T, R, w, weight, fused, chosen)
  np.testing.assert_allclose(
      call(anchors=jnp.asarray(chosen)), loss, rtol=1e-10
  )
  loss, _ = anyflow_numpy(x, v, T, R, w, weight, fused, anchors, 0.7)
  np.testing.assert_allclose(
      call(anchor_loss=jnp.asarray(0.7)), loss, rtol=1e-10
  )
  none = np.zeros(B, bool)
  loss, _ = anyflow_numpy(x, v, T, R, w, weight, fused, ~none)
  np.testing.assert_allclose(
      call(anchors=jnp.asarray(none)), loss, rtol=1e-10
  )
  # Without anchors but with a mean every row is rescaled to it.
  loss, _ = anyflow_numpy(x, v, T, R, w, weight, fused, none, 0.7)
  np.testing.assert_allclose(
      call(anchors=jnp.asarray(none), anchor_loss=jnp.asarray(0.7)),
      loss,
      rtol=1e-10,
  )


def test_anyflow_without_guidance_is_eulerian(x64):
  x, v = arrays()
  t, _, r = times()
  u, target = losses.eulerian_target(
      net, x, v, t, r, derivative="central", step=0.02, clamp=False
  )
  error = np.square(np.asarray(u - target)).mean(1)
  out = losses.anyflow_loss(
      net, x, v, t, r, derivative="central", step=0.02, clamp=False,
      anchors=jnp.ones(B, bool),
  )  # fmt: skip
  np.testing.assert_allclose(out, error, rtol=1e-10)


def test_anyflow_fused_guidance_at_its_optimum(x64):
  """u = n + w (v - n) has zero loss where r = t."""
  x, v = arrays()
  t = jnp.asarray(T)
  n = jnp.cos(x)
  w = 2.5
  loss = losses.anyflow_loss(
      lambda x, t, r: n + w * (v - n), x, v, t, t,
      uncond_fn=lambda x, t, r: n, guidance_scale=w,
  )  # fmt: skip
  np.testing.assert_allclose(loss, np.zeros(B), atol=1e-24)


def test_anyflow_mean_over_devices(x64):
  """With an axis name the anchors of all shards make one mean."""
  x, v = arrays()
  t, _, r = times()
  anchors = jnp.asarray([True, False, True, True])
  whole = losses.anyflow_loss(net, x, v, t, r, anchors=anchors)
  shards = jax.vmap(
      lambda *a: losses.anyflow_loss(
          net, *a[:4], anchors=a[4], axis_name="d"
      ),
      axis_name="d",
  )(*(a.reshape(2, 2, *a.shape[1:]) for a in (x, v, t, r, anchors)))
  np.testing.assert_allclose(shards.reshape(-1), whole, rtol=1e-12)


def test_flow_time_weight(x64, strict):
  t = jnp.asarray([0.0, 0.31, 0.5, 0.93, 1.0])
  for kind, shape in {
      "beta": lambda tau: tau * np.sqrt(1 - tau),
      "gaussian": lambda tau: np.exp(-2 * (tau - 0.5) ** 2) - np.exp(-0.5),
  }.items():
    for shift in (1.0, 5.0):
      tau = np.array([
          shift * (k / 1000) / (1 + (shift - 1) * k / 1000)
          for k in range(1001)
      ])
      y = shape(tau)
      nearest = np.abs(tau[:, None] - np.asarray(t)[None]).argmin(0)
      np.testing.assert_allclose(
          losses.flow_time_weight(t, kind=kind, shift=shift),
          (y * 1000 / y.sum())[nearest],
          rtol=1e-9, atol=1e-12,
      )  # fmt: skip
  np.testing.assert_array_equal(
      losses.flow_time_weight(t, kind="uniform"), np.ones(5)
  )
  np.testing.assert_array_equal(
      losses.flow_time_weight(t), losses.flow_time_weight(t, kind="beta")
  )
  # A grid of 4: points 0, 1/4, ..., weights of sum 4.
  y = np.arange(5) / 4 * np.sqrt(1 - np.arange(5) / 4)
  np.testing.assert_allclose(
      losses.flow_time_weight(jnp.asarray([0.3]), grid=4),
      [4 * y[1] / y.sum()],
      rtol=1e-12,
  )


def test_backward_simulation_is_the_sampler_on_an_exact_map(x64, strict):
  (x,) = arrays(n=1)
  grid = jnp.asarray([1.0, 0.8, 0.3, 0.0])
  expected = exact_map(x, np.ones(B), np.zeros(B))
  for index in range(3):
    out = losses.backward_simulation(exact_u, x, grid, index)
    np.testing.assert_allclose(out, expected, rtol=1e-12)


@pytest.mark.parametrize("gradient", ["all", "middle"])
def test_backward_simulation_by_hand(x64, gradient):
  """A network u = a x: every jump multiplies by 1 - a (t - r)."""
  (x,) = arrays(n=1)
  grid = np.array([0.9, 0.7, 0.3, 0.1])

  def out(a, index):
    return losses.backward_simulation(
        lambda x, t, r: a * x, x, jnp.asarray(grid), index, gradient=gradient
    ).sum()

  run = jax.jit(jax.value_and_grad(out))
  a, total = 0.7, np.asarray(x).sum()
  for index in range(3):
    gaps = np.array([
        grid[0] - grid[index],
        grid[index] - grid[index + 1],
        grid[index + 1] - grid[3],
    ])
    factors = 1 - a * gaps
    value, grad = run(a, index)  # a traced index
    np.testing.assert_allclose(value, total * factors.prod(), rtol=1e-12)
    if gradient == "all":
      expected = -sum(
          gaps[i] * np.delete(factors, i).prod() for i in range(3)
      )
    else:
      # The first state and the last velocity are constants.
      expected = -gaps[1] * factors[0]
    np.testing.assert_allclose(grad, total * expected, rtol=1e-10)


def test_backward_simulation_defaults_to_all(x64):
  (x,) = arrays(n=1)
  grid = jnp.asarray([0.9, 0.7, 0.3])
  grad = [
      jax.grad(
          lambda a, kw=kw: losses.backward_simulation(
              lambda x, t, r: a * x, x, grid, 1, **kw
          ).sum()
      )(0.5)
      for kw in ({}, {"gradient": "all"})
  ]
  assert grad[0] == grad[1]


def one_time_net(x, t, w=W):
  return jnp.sin(w * x) * t[:, None].astype(x.dtype) ** 2


def mdt_slope(x, v, t):
  x, t = np.asarray(x), col(t)
  return np.asarray(v) * W * np.cos(W * x) * t**2 + 2 * t * np.sin(W * x)


@pytest.mark.parametrize("norm", ["rms", "l2", None])
def test_velocity_matching_target(x64, strict, norm):
  x, v = arrays()
  t = jnp.asarray(T)
  c = 0.2

  def target_of(slope):
    if norm is not None:
      count = D if norm == "rms" else 1
      size = np.sqrt((slope**2).sum(1, keepdims=True) / count)
      slope = slope / (size + c)
    return np.asarray(v) - col(T) * slope

  u, target = losses.velocity_matching_target(
      one_time_net, x, v, t, derivative="exact", norm=norm, c=c
  )
  at = lambda x, t: np.sin(W * np.asarray(x)) * col(t) ** 2
  np.testing.assert_allclose(u, at(x, T), rtol=1e-12)
  np.testing.assert_allclose(
      target, target_of(mdt_slope(x, v, T)), rtol=1e-10
  )
  # Default: the backward difference with step 0.01.
  h = 0.01
  back = (at(x, T) - at(np.asarray(x) - h * np.asarray(v), T - h)) / h
  _, target = losses.velocity_matching_target(
      one_time_net, x, v, t, norm=norm, c=c
  )
  np.testing.assert_allclose(target, target_of(back), rtol=1e-9)
  direction = losses.velocity_distillation_direction(
      one_time_net, x, v, t, norm=norm, c=c
  )
  np.testing.assert_allclose(
      direction, target_of(back) - at(x, T), rtol=1e-9
  )


def test_velocity_matching_defaults_and_gradients(x64):
  x, v = arrays()
  t = jnp.asarray(T)
  named = functools.partial(
      losses.velocity_matching_target, norm="rms", c=0.1, kind="velocity",
      derivative="backward", step=1e-2,
  )  # fmt: skip
  for given, default in zip(
      named(one_time_net, x, v, t),
      losses.velocity_matching_target(one_time_net, x, v, t),
  ):
    np.testing.assert_array_equal(given, default)
  np.testing.assert_array_equal(
      losses.velocity_distillation_direction(one_time_net, x, v, t),
      np.subtract(*named(one_time_net, x, v, t)[::-1]),
  )

  def pair(w, v):
    return losses.velocity_matching_target(
        functools.partial(one_time_net, w=w), x, v, t
    )

  _, pull = jax.vjp(pair, W, v)
  ones = jnp.ones((B, D))
  grads = pull((ones, 0 * ones))
  expected = (x * np.cos(W * np.asarray(x)) * col(T) ** 2).sum()
  np.testing.assert_allclose(grads[0], expected, rtol=1e-12)
  assert not np.any(grads[1])
  grads = pull((0 * ones, ones))
  assert grads[0] == 0 and not np.any(grads[1])
  grads = jax.grad(
      lambda w, v: losses.velocity_distillation_direction(
          functools.partial(one_time_net, w=w), x, v, t
      ).sum(),
      argnums=(0, 1),
  )(W, v)
  assert grads[0] == 0 and not np.any(grads[1])


def test_velocity_matching_transport(x64, strict):
  x, v = arrays()
  t = jnp.asarray([0.9, 0.7, 0.505, 0.8])
  end = np.array([0.5, 0.5, 0.5, 0.0])
  h = 0.02
  at = lambda x, t: np.sin(W * np.asarray(x)) * col(t) ** 2
  tn = np.asarray(t)

  def expected(before, end):
    y = np.asarray(x) - col(tn - before) * np.asarray(v)
    pred = np.asarray(x) - col(tn - end) * at(x, tn)
    return pred, y - col(before - end) * at(y, before)

  for kwargs, before, stop in (
      ({"end": jnp.asarray(end), "clamp": False}, tn - h, end),
      # Row 2 would pass its end: the pair then becomes the end itself.
      ({"end": jnp.asarray(end)}, np.maximum(tn - h, end), end),
      ({}, tn - h, np.zeros(B)),
  ):
    pair = losses.velocity_matching_target(
        one_time_net, x, v, t, kind="transport", step=h, **kwargs
    )
    for ours, theirs in zip(pair, expected(before, stop)):
      np.testing.assert_allclose(ours, theirs, rtol=1e-12)
  _, pull = jax.vjp(
      lambda w, v: losses.velocity_matching_target(
          functools.partial(one_time_net, w=w), x, v, t, kind="transport"
      ),
      W,
      v,
  )
  ones = jnp.ones((B, D))
  grads = pull((ones, 0 * ones))
  wanted = -(tn[:, None] ** 3 * np.asarray(x) * np.cos(W * np.asarray(x)))
  np.testing.assert_allclose(grads[0], wanted.sum(), rtol=1e-10)
  assert not np.any(grads[1])
  grads = pull((0 * ones, ones))
  assert grads[0] == 0 and not np.any(grads[1])


def test_transport_vanishes_on_the_exact_map(x64):
  """Straight lines: v constant along the path, so the pair agrees."""
  x, v = arrays()
  t = jnp.asarray([0.9, 0.7, 0.5, 0.8])
  pred, target = losses.velocity_matching_target(
      lambda x, t: v, x, v, t, kind="transport", step=0.1
  )
  np.testing.assert_allclose(pred, target, rtol=1e-12)


def test_phase_start(x64, strict):
  t = jnp.asarray([0.0, 0.2, 0.25, 0.6, 0.755, 1.0])
  np.testing.assert_array_equal(
      losses.phase_start(t, phases=4), [0, 0, 0.25, 0.5, 0.75, 0.75]
  )
  np.testing.assert_array_equal(
      losses.phase_start(t, phases=4, step=0.01), [0, 0, 0, 0.5, 0.5, 0.75]
  )
  np.testing.assert_array_equal(
      losses.phase_start(t, phases=1), np.zeros(6)
  )
  half = losses.phase_start(t.astype(jnp.bfloat16), phases=4)
  assert half.dtype == jnp.float32


def cosine_path(t):
  return jnp.cos(np.pi / 2 * t), jnp.sin(np.pi / 2 * t)


@pytest.mark.parametrize("path", ["cosine", "straight", "edm"])
def test_progressive_target_is_two_ddim_steps(x64, strict, path):
  """One DDIM step with x0* ends where two steps of the teacher do."""
  (x,) = arrays(n=1)
  coefficients = {
      "cosine": cosine_path,
      "straight": lambda t: (1 - t, t),
      "edm": lambda s: (jnp.ones_like(s), s),
  }[path]
  t, s, r = times()
  if path == "edm":
    t, s, r = (0.1 + 5 * a for a in (t, s, r))
  denoise = lambda x, t: jnp.tanh(x * t[:, None]) + x / 3
  target = losses.progressive_target(
      denoise, x, t, s, r, coefficients=coefficients
  )

  def ddim(x, x0, a, b):
    (a_a, s_a), (a_b, s_b) = (
        [col(np.asarray(c)) for c in coefficients(z)] for z in (a, b)
    )
    return a_b * x0 + s_b / s_a * (x - a_a * x0)

  first = np.asarray(denoise(x, t))
  middle = ddim(np.asarray(x), first, t, s)
  second = np.asarray(denoise(jnp.asarray(middle), s))
  two = ddim(middle, second, s, r)
  np.testing.assert_allclose(
      ddim(np.asarray(x), np.asarray(target), t, r), two, rtol=1e-9
  )
  np.testing.assert_allclose(target[2], first[2], rtol=1e-12)  # r = s = t
  # A teacher that always says the same keeps saying it.
  constant = losses.progressive_target(
      lambda x, t: jnp.full_like(x, 0.3), x, t, s, r, coefficients=coefficients
  )
  np.testing.assert_allclose(constant, np.full((B, D), 0.3), rtol=1e-12)
  grads = jax.grad(
      lambda a, x: losses.progressive_target(
          lambda x, t: a * x, x, t, s, r, coefficients=coefficients
      ).sum(),
      argnums=(0, 1),
  )(0.5, x)
  assert grads[0] == 0 and not np.any(grads[1])


def test_progressive_is_the_semigroup_on_the_straight_path(x64):
  (x,) = arrays(n=1)
  t, s, r = times()
  velocity = lambda x, t: jnp.sin(x) * t[:, None]
  u = losses.semigroup_target(lambda x, t, r: velocity(x, t), x, t, s, r)
  x0 = losses.progressive_target(
      lambda x, t: x - t[:, None] * velocity(x, t), x, t, s, r,
      coefficients=lambda t: (1 - t, t),
  )  # fmt: skip
  np.testing.assert_allclose(x0, x - col(T) * u, rtol=1e-10)


@pytest.mark.parametrize("elements", ["mean", "sum"])
def test_guidance_distillation(x64, strict, elements):
  student, cond = arrays(3)
  (uncond,) = arrays(4, n=1)
  w = jnp.asarray([1.0, 2.0, 5.0, 0.0])
  alpha, sigma = jnp.asarray(1 - 0.9 * T), jnp.asarray(T)
  s, c, n = (np.asarray(a) for a in (student, cond, uncond))
  guided = n + col(np.asarray(w)) * (c - n)
  count = D if elements == "mean" else 1
  error = ((s - guided) ** 2).sum(1) / count
  call = functools.partial(
      losses.guidance_distillation_loss, elements=elements
  )
  np.testing.assert_allclose(
      call(student, cond, uncond, w), error, rtol=1e-12
  )
  weight = np.maximum((np.asarray(alpha) / T) ** 2, 1)
  assert (weight > 1).any() and (weight == 1).any()
  weighted = call(student, cond, uncond, w, alpha=alpha, sigma=sigma)
  np.testing.assert_allclose(weighted, weight * error, rtol=1e-12)
  grads = jax.grad(lambda *a: call(*a).sum(), argnums=(0, 1, 2, 3))(
      student, cond, uncond, w
  )
  np.testing.assert_allclose(grads[0], 2 * (s - guided) / count, rtol=1e-10)
  assert not any(np.any(g) for g in grads[1:])


def test_guidance_distillation_defaults_to_the_mean():
  one = jnp.ones((1, 4))
  out = losses.guidance_distillation_loss(3 * one, one, one, jnp.ones(1))
  np.testing.assert_array_equal(out, [4.0])


def test_bad_input_of_the_rest():
  x, v = arrays(dtype=jnp.float32)
  t, s, r = times(jnp.float32)
  grid = jnp.asarray([1.0, 0.5, 0.0])
  error = helpers.one_line_error
  with error("flow_map_loss: identity must be one of.*did you mean"):
    losses.flow_map_loss(net, x, t, r, identity="eulerien", v=v)
  with error("flow_map_loss: v must be given for identity='eulerian'"):
    losses.flow_map_loss(net, x, t, r)
  with error("teacher_fn must be given for identity='lagrangian'"):
    losses.flow_map_loss(net, x, t, r, identity="lagrangian")
  with error("s must be given for identity='semigroup'"):
    losses.flow_map_loss(net, x, t, r, identity="semigroup")
  with error(r"flow_map_loss: v must be \[4, 3\]"):
    losses.flow_map_loss(net, x, t, r, v=v[:, :2])
  with error(r"flow_map_loss: s must be \[b\]"):
    losses.flow_map_loss(net, x, t, r, identity="semigroup", s=s[:2])
  with error(r"flow_map_loss: r must be \[b\]"):
    losses.flow_map_loss(net, x, t, r[:2], v=v)
  with error("normalizer must be one of"):
    losses.flow_map_loss(net, x, t, r, v=v, normalizer="batch")
  with error("elements must be one of"):
    losses.flow_map_loss(net, x, t, r, v=v, elements="max")
  with error(r"tangent_c must be in \(0"):
    losses.flow_map_loss(net, x, t, r, v=v, tangent_c=0.0)
  with error(r"straight_path: noise must be \[4, 3\] like x_t"):
    losses.straight_path(x, v[:, :2], t)
  with error(r"sigma_min must be in \[0, 1\)"):
    losses.straight_path(x, v, t, sigma_min=1.0)
  with error(r"shortcut_target: d must be \[b\]"):
    losses.shortcut_target(net, x, t, t[:2])
  with error(r"shortcut_target: clip must be in \(0"):
    losses.shortcut_target(net, x, t, t, clip=0.0)
  with error(r"shortcut_target: clip_target must be in \(0"):
    losses.shortcut_target(net, x, t, t, clip_target=0.0)
  with error("anyflow_loss: uncond_fn must be given unless"):
    losses.anyflow_loss(net, x, v, t, r, guidance_scale=3.0)
  with error(r"guidance_scale must be in \(0"):
    losses.anyflow_loss(net, x, v, t, r, guidance_scale=0.0)
  with error(r"time_weight must be \[b\]"):
    losses.anyflow_loss(net, x, v, t, r, time_weight=t[:2])
  with error("anchors must be a bool array"):
    losses.anyflow_loss(net, x, v, t, r, anchors=t)
  with error("differentiate must be one of"):
    losses.anyflow_loss(net, x, v, t, r, differentiate="both")
  with error(r"balance_eps must be in \(0"):
    losses.anyflow_loss(net, x, v, t, r, balance_eps=0.0)
  with error("anyflow_loss: derivative must be one of"):
    losses.anyflow_loss(net, x, v, t, r, derivative="forward")
  with error("flow_time_weight: kind must be one of"):
    losses.flow_time_weight(t, kind="gauss")
  with error(r"shift must be in \(0"):
    losses.flow_time_weight(t, shift=0.0)
  with error(r"backward_simulation: times must be \[n\] \(rank 1\)"):
    losses.backward_simulation(net, x, x, 0)
  with error(r"times must be \[n\] with n >= 2, got \[1\]"):
    losses.backward_simulation(net, x, grid[:1], 0)
  with error(r"index must be in \[0, 1\], got 2"):
    losses.backward_simulation(net, x, grid, 2)
  with error("gradient must be one of"):
    losses.backward_simulation(net, x, grid, 0, gradient="last")
  with error("velocity_matching_target: kind must be one of"):
    losses.velocity_matching_target(one_time_net, x, v, t, kind="cm")
  with error("norm must be one of"):
    losses.velocity_matching_target(one_time_net, x, v, t, norm="l1")
  with error(r"velocity_matching_target: c must be in \(0"):
    losses.velocity_matching_target(one_time_net, x, v, t, c=0.0)
  with error(r"velocity_matching_target: step must be in \(0"):
    losses.velocity_matching_target(one_time_net, x, v, t, step=0.0)
  with error(r"end must be \[b\]"):
    losses.velocity_matching_target(
        one_time_net, x, v, t, kind="transport", end=t[:2]
    )
  with error(r"phases must be in \[1"):
    losses.phase_start(t, phases=0)
  with error(r"progressive_target: s must be \[b\]"):
    losses.progressive_target(
        one_time_net, x, t, s[:2], r, coefficients=cosine_path
    )
  with error(r"denoise_fn\(x, t\) must be .* like x_t"):
    losses.progressive_target(
        lambda x, t: x[:, :1], x, t, s, r, coefficients=cosine_path
    )
  loss = losses.guidance_distillation_loss
  with error(r"teacher_cond must be \[4, 3\]"):
    loss(x, v[:2], x, t)
  with error(r"guidance_scale must be \[b\]"):
    loss(x, v, x, t[:2])
  with error("alpha must be given together with sigma"):
    loss(x, v, x, t, sigma=t)
  with error("elements must be one of"):
    loss(x, v, x, t, elements="max")
  with distilljax.debug():
    with error("d must be <= t everywhere"):
      losses.shortcut_target(net, x, r, t)
    with error(r"d must be in \(0, 1\]"):
      losses.shortcut_target(net, x, t, 0 * t)
    with error("end must be <= t everywhere"):
      losses.velocity_matching_target(
          one_time_net, x, v, r, kind="transport", end=t
      )
    with error(r"end must be in \[0, 1\]"):
      losses.velocity_matching_target(
          one_time_net, x, v, t, kind="transport", end=-t
      )
    with error(r"flow_time_weight: t must be in \[0, 1\]"):
      losses.flow_time_weight(t + 1)
    with error(r"phase_start: t must be in \[0, 1\]"):
      losses.phase_start(t + 1, phases=2)
    with error(r"times must be in \[0, 1\]"):
      losses.backward_simulation(net, x, grid + 1, 0)
    with error(r"index must be in \[0, 1\]"):
      losses.backward_simulation(net, x, grid, jnp.asarray(2))
    with error("s must be <= t everywhere"):
      losses.progressive_target(
          one_time_net, x, s, t, r, coefficients=cosine_path
      )
    with error("r must be <= s everywhere"):
      losses.progressive_target(
          one_time_net, x, t, r, s, coefficients=cosine_path
      )
  whole = jnp.ones(4, jnp.int32)
  with error("d must be a floating array, got int32"):
    losses.shortcut_target(net, x, t, whole)
  for three in ((whole, s, r), (t, whole, r), (t, s, whole)):
    with error("must be a floating array, got int32"):
      losses.progressive_target(
          one_time_net, x, *three, coefficients=cosine_path
      )


REST = {
    "shortcut": lambda x, v, t, r: losses.shortcut_target(net, x, t, t - r + 0),
    "anyflow": lambda x, v, t, r: losses.anyflow_loss(
        net, x, v, t, r, uncond_fn=lambda x, t, r: x, guidance_scale=2.0
    ),
    "simulation": lambda x, v, t, r: losses.backward_simulation(
        net, x, jnp.asarray([1.0, 0.5, 0.0], t.dtype), 1
    ),
    "matching": lambda x, v, t, r: losses.velocity_matching_target(
        one_time_net, x, v, t, derivative="exact"
    )[1],
    "transport": lambda x, v, t, r: losses.velocity_matching_target(
        one_time_net, x, v, t, kind="transport", step=0.2
    )[1],
    "progressive": lambda x, v, t, r: losses.progressive_target(
        one_time_net, x, t, (t + r) / 2, r, coefficients=cosine_path
    ),
    "guidance": lambda x, v, t, r: losses.guidance_distillation_loss(
        x, v, -v, t, alpha=1 - r, sigma=t
    ),
    "tangent": lambda x, v, t, r: losses.flow_map_loss(
        net, x, t, r, v=v, normalizer="tangent"
    ).loss,
    "path": lambda x, v, t, r: losses.straight_path(x, v, t, sigma_min=0.1)[0],
}


@pytest.mark.parametrize("name", REST)
def test_precision_of_the_rest(name, strict):
  """bf16 in, float32 out; float64 stays."""
  x, v = arrays(dtype=jnp.bfloat16)
  t = jnp.asarray([0.9, 0.7, 0.5, 1.0], jnp.float32)
  r = jnp.asarray([0.25, 0.5, 0.25, 0.0], jnp.float32)
  out = REST[name](x, v, t, r)
  assert out.dtype == jnp.float32
  exact = REST[name](x.astype(jnp.float32), v.astype(jnp.float32), t, r)
  np.testing.assert_allclose(
      out, exact, atol=0.05 * float(jnp.abs(exact).max())
  )
  with jax.enable_x64(True):
    wide = [jnp.asarray(a, jnp.float64) for a in (x, v, t, r)]
    assert REST[name](*wide).dtype == jnp.float64


TIMED = {
    "mean_flow": lambda f, x, t, r: losses.mean_flow_loss(f, x, x, t, r),
    "lagrangian": lambda f, x, t, r: losses.lagrangian_residual(
        f, x, t, r, lambda x, r: f(x, r, r)
    ),
    "semigroup": lambda f, x, t, r: losses.semigroup_target(f, x, t, t, r),
    "central": lambda f, x, t, r: losses.path_derivative(
        f, x, x, t, r, derivative="central"
    )[1],
    "shortcut": lambda f, x, t, r: losses.shortcut_target(f, x, t, t - r),
    "anyflow": lambda f, x, t, r: losses.anyflow_loss(f, x, x, t, r),
    "matching": lambda f, x, t, r: losses.velocity_matching_target(
        lambda x, t: f(x, t, t), x, x, t
    )[1],
    "transport": lambda f, x, t, r: losses.velocity_matching_target(
        lambda x, t: f(x, t, t), x, x, t, kind="transport", end=r
    )[1],
    "progressive": lambda f, x, t, r: losses.progressive_target(
        lambda x, t: f(x, t, t), x, t, (t + r) / 2, r, coefficients=cosine_path
    ),
    "semigroup_loss": lambda f, x, t, r: losses.flow_map_loss(
        f, x, t, r, identity="semigroup", s=(t + r) / 2
    ).loss,
    "simulation": lambda f, x, t, r: losses.backward_simulation(
        f, x, jnp.asarray([1.0, 0.5, 0.0], t.dtype), 1
    ),
}


@pytest.mark.parametrize("name", TIMED)
def test_half_times_are_widened_before_the_network(name, strict):
  seen = []

  def network(x, t, r):
    seen.append((t.dtype, r.dtype))
    return net(x, t, r)

  x = arrays(dtype=jnp.float32)[0]
  t = jnp.asarray([0.75, 0.5, 1.0, 0.625], jnp.bfloat16)
  r = jnp.asarray([0.25, 0.125, 0.5, 0.25], jnp.bfloat16)
  out = TIMED[name](network, x, t, r)
  assert set(seen) == {(jnp.dtype("float32"), jnp.dtype("float32"))}
  # These times are exact in bfloat16, and so must be what is made of them.
  exact = TIMED[name](net, x, t.astype(jnp.float32), r.astype(jnp.float32))
  np.testing.assert_allclose(out, exact, rtol=1e-6, atol=1e-6)


def test_half_precision_is_widened_before_arithmetic(strict):
  half, single = jnp.bfloat16, jnp.float32
  # 1 - 2^-10 needs more digits than bfloat16 has; its two terms do not.
  t, r = jnp.ones(1, half), jnp.full(1, 2.0**-10, half)
  one = jnp.ones((1, 2))
  np.testing.assert_array_equal(
      losses.flow_map_step(one, one, t, r), np.full((1, 2), 2.0**-10)
  )
  error = losses.adaptive_loss(jnp.full(1, 3.0, half))
  assert error.dtype == single
  np.testing.assert_allclose(error, 3 / 3.01, rtol=1e-6)
  # alpha / sigma = 1 / .3008: the quotient is taken in float32.
  alpha, sigma = jnp.ones(1, half), jnp.full(1, 0.30078125, half)
  loss = losses.guidance_distillation_loss(
      one, 0 * one, 0 * one, jnp.ones(1, half), alpha=alpha, sigma=sigma
  )
  np.testing.assert_allclose(loss, 0.30078125**-2, rtol=1e-6)
  # A velocity in half precision moves a float32 state in float32.
  x, v = arrays(dtype=half)
  x = arrays(dtype=single)[0]
  t, _, r = times(single)
  for kind in ("central", "backward"):
    ours, exact = (
        losses.path_derivative(net, x, v, t, r, derivative=kind)[1]
        for v in (v, v.astype(single))
    )
    np.testing.assert_array_equal(ours, exact)


def test_anyflow_freezes_its_weights(x64):
  x, v = arrays()
  t, _, r = times()
  grad = jax.grad(
      lambda weight, anchor: losses.anyflow_loss(
          net, x, v, t, r, time_weight=weight, anchor_loss=anchor
      ).sum(),
      argnums=(0, 1),
  )(jnp.ones(4), jnp.float64(0.5))
  assert not np.any(grad[0]) and not np.any(grad[1])


def test_semigroup_of_an_empty_step_is_the_first_network(x64):
  (x,) = arrays(n=1)
  t = jnp.full(4, 0.5)
  out = losses.semigroup_target(
      net, x, t, t, t, first_fn=lambda x, t, s: 3 * x
  )
  np.testing.assert_array_equal(out, 3 * x)


def test_simulation_of_one_step(x64):
  (x,) = arrays(n=1)
  out = losses.backward_simulation(net, x, jnp.asarray([1.0, 0.0]), 0)
  # Jumps 1 -> 1 and 0 -> 0 of length zero about the one from 1 to 0.
  one, zero = jnp.ones(4), jnp.zeros(4)
  np.testing.assert_allclose(out, x - net(x, one, zero), rtol=1e-12)


def test_distillation_direction_of_transport(x64):
  x, v = arrays()
  t, end = jnp.asarray([0.9, 0.7, 0.55, 0.8]), jnp.asarray([0.5, 0.5, 0.5, 0.0])
  pred, target = losses.velocity_matching_target(
      one_time_net, x, v, t, kind="transport", end=end
  )
  direction = losses.velocity_distillation_direction(
      one_time_net, x, v, t, kind="transport", end=end
  )
  np.testing.assert_array_equal(direction, target - pred)


def test_progressive_num_steps():
  """16 -> 8 -> 4 -> 2 (twice as long) -> 1."""
  steps = jnp.asarray([0, 9, 10, 20, 30, 40, 49, 50, 60, 900])
  out = losses.progressive_num_steps(steps, start=16, steps_per_stage=10)
  np.testing.assert_array_equal(out, [16, 16, 8, 4, 2, 2, 2, 1, 1, 1])
  assert out.dtype == jnp.int32
  assert int(losses.progressive_num_steps(50000)) == 2048
  assert int(losses.progressive_num_steps(0, start=2)) == 2  # the least
  with helpers.one_line_error("start must be a power of two"):
    losses.progressive_num_steps(0, start=12)
  with helpers.one_line_error(r"steps_per_stage must be in \[1"):
    losses.progressive_num_steps(0, steps_per_stage=0)
  with helpers.one_line_error(r"step must be in \[0"):
    losses.progressive_num_steps(-1)


def test_defaults_are_what_the_docstrings_say():
  """A call without an argument equals one with its documented value."""
  keys = jax.random.split(jax.random.key(0), 4)
  x, v, noise = (jax.random.normal(k, (3, 2)) for k in keys[:3])
  # Within a step of both ends, so that the clamp shows.
  t, r = jnp.array([0.002, 0.5, 0.998]), jnp.array([0.0, 0.2, 0.3])
  field = lambda x, t, r: jnp.sin(3 * x) * (1 + t**2 - r)[:, None]
  same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
  for kind in ("central",):
    options = {"derivative": kind}
    same(
      losses.path_derivative(field, x, v, t, r, **options),
      losses.path_derivative(
        field, x, v, t, r, **options, step=5e-3, clamp=True
      ),
    )
    same(
      losses.anyflow_loss(field, x, v, t, r, **options),
      losses.anyflow_loss(field, x, v, t, r, **options, step=5e-3, clamp=True),
    )
  same(
    losses.straight_path(x, noise, t),
    losses.straight_path(x, noise, t, sigma_min=0.0),
  )
  ends = jnp.array([0.0, 0.5, 1.0])
  same(
    losses.mean_flow_velocity(v, x, noise, ends, omega=2.0, kappa=0.5),
    losses.mean_flow_velocity(
      v, x, noise, ends, omega=2.0, kappa=0.5, t_start=0.0, t_end=1.0
    ),
  )


@pytest.mark.parametrize(
  "call,name",
  [
    (lambda x: losses.adaptive_loss(x), "error"),
    (lambda x: losses.flow_time_weight(x), "t"),
    (lambda x: losses.phase_start(x, phases=2), "t"),
    (
      lambda x: losses.backward_simulation(
        lambda x, t, r: x, jnp.ones((2, 1)), x, 0
      ),
      "times",
    ),
  ],
)
def test_whole_numbers_are_refused(call, name):
  with helpers.as_user(), helpers.one_line_error(f"{name} must be", TypeError):
    call(jnp.array([1, 0]))


def test_velocity_distillation_keeps_its_points_on_the_path():
  """Its default, where the step would leave [0, 1]."""
  keys = jax.random.split(jax.random.key(0), 2)
  x, v = (jax.random.normal(k, (2, 2)) for k in keys)
  t = jnp.array([0.004, 0.5])
  field = lambda x, t: jnp.sin(3 * x) * (1 + t**2)[:, None]
  default, kept, left = (
    np.asarray(losses.velocity_distillation_direction(field, x, v, t, **more))
    for more in ({}, {"clamp": True}, {"clamp": False})
  )
  np.testing.assert_array_equal(default, kept)
  assert np.any(default[0] != left[0])
