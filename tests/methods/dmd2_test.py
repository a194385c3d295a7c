"""DMD2: its direction in closed form, who gets which gradient, its options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import methods, processes, train
from tests import helpers
from tests.methods import common

make = methods.get("dmd2").make
NO_GAN = {"gan_weight": 0.0, "gan_critic_weight": 0.0}


def student(params, x, t, **_):
  """A Gaussian around `m`, whatever the input time."""
  return params["m"] + 0.0 * t[:, None] + params["s"] * x


def teacher(params, x, t, **_):
  return common.x0_of(params["m"])(x, t)


def critic(params, x, t, *, logits=False, **_):
  prediction = common.x0_of(params["m"])(x, t)
  if not logits:
    return prediction
  return prediction, params["w"] * jnp.sum(x, axis=-1)


NETS = {"student": student, "teacher": teacher, "critic": critic}


def params(m=0.5, critic_m=None, w=0.3):
  m = jnp.asarray(m) * jnp.ones(2)
  return {
    "student": {"m": m, "s": jnp.float32(1.0)},
    "critic": {
      "m": m if critic_m is None else critic_m * jnp.ones(2),
      "w": jnp.float32(w),
    },
    "teacher": {"m": jnp.zeros(2)},
  }


def gradient(method, name, p, rows, ctx=None):
  ctx = common.context(("student", "critic")) if ctx is None else ctx

  @jax.jit
  def run(p, rows, step, key):
    here = ctx._replace(step=step, key=key)
    return jax.grad(
      lambda tree: common.eager_total(method, name, tree, rows, here)[0]
    )(p)

  return run(p, rows, ctx.step, ctx.key)


def test_direction_moves_the_student_to_the_teacher():
  method = make(NETS, prediction="x0", **NO_GAN)
  rows = common.batch(512)
  for m in (0.5, -0.5):
    slope = gradient(method, "student", params(m), rows)["student"]["m"]
    assert np.all(np.sign(slope) == np.sign(m)), slope  # descend towards 0
  none = gradient(method, "student", params(0.0), rows)["student"]["m"]
  np.testing.assert_allclose(none, 0.0, atol=1e-7)  # fake = real: at rest


def test_student_loss_is_the_formula():
  """Written out with NumPy from the same named draws."""
  method = make(NETS, prediction="x0", eps=0.0, **NO_GAN)
  rows, p = common.batch(8), params(0.7, critic_m=0.4)
  latent = train.draw(jax.random.normal, rows["key"], "latent", (2,))
  noise = train.draw(jax.random.normal, rows["key"], "score/noise", (2,))
  u = train.draw(jax.random.uniform, rows["key"], "score/time")
  t = 0.02 + 0.96 * u
  x = 0.7 + latent
  x_t = (1 - t)[:, None] * x + t[:, None] * noise
  real, fake = common.x0_of(0.0)(x_t, t), common.x0_of(0.4)(x_t, t)
  scale = np.mean(np.abs(x - real), axis=1, keepdims=True)
  direction = (fake - real) / scale
  expected = 0.5 * np.mean(direction**2)
  value, (_, metrics) = common.total(
    method, "student", p, rows, common.context()
  )
  np.testing.assert_allclose(value, expected, rtol=1e-4)
  np.testing.assert_allclose(
    metrics["direction"].sum / 8, np.mean(np.abs(direction)), rtol=1e-4
  )
  slope = gradient(method, "student", p, rows)
  np.testing.assert_allclose(
    slope["student"]["m"], np.mean(direction, axis=0) / 2, rtol=1e-4
  )
  for frozen in ("critic", "teacher"):
    for leaf in jax.tree.leaves(slope[frozen]):
      np.testing.assert_array_equal(leaf, 0.0)


def test_critic_learns_the_students_samples_only():
  method = make(NETS, prediction="x0", **NO_GAN)
  rows = common.batch(4096)
  slope = lambda m: gradient(method, "critic", params(0.5, critic_m=m), rows)
  at_truth, below = slope(0.5), slope(0.0)
  assert np.all(np.abs(at_truth["critic"]["m"]) < 0.02)
  assert np.all(below["critic"]["m"] < -0.05)
  for leaf in jax.tree.leaves(below["student"]):
    np.testing.assert_array_equal(leaf, 0.0)  # the sample is stop-gradient


@pytest.mark.parametrize("shared", [False, True])
def test_gan_terms(shared):
  """logit = w sum(x_t): what each side pays and where its gradient goes."""
  method = make(
    NETS,
    prediction="x0",
    gan_weight=0.5,
    gan_critic_weight=0.25,
    gan_shares_noise=shared,
  )
  rows, p = common.batch(64), params(0.5)
  name = "score" if shared else "gan"
  noise = train.draw(jax.random.normal, rows["key"], f"{name}/noise", (2,))
  u = train.draw(jax.random.uniform, rows["key"], f"{name}/time")
  t = 0.02 + 0.96 * u if shared else u
  latent = train.draw(jax.random.normal, rows["key"], "latent", (2,))
  x_t = (1 - t)[:, None] * (0.5 + latent) + t[:, None] * noise
  logits = 0.3 * jnp.sum(x_t, axis=1)
  _, (terms, _) = common.total(method, "student", p, rows, common.context())
  np.testing.assert_allclose(
    terms["gan"].sum, 0.5 * np.sum(np.log1p(np.exp(-logits))), rtol=1e-4
  )
  _, (terms, metrics) = common.total(
    method, "critic", p, rows, common.context()
  )
  draw = lambda n, low=0.0, high=1.0: (
    train.draw(jax.random.normal, rows["key"], f"{n}/noise", (2,)),
    low
    + (high - low) * train.draw(jax.random.uniform, rows["key"], f"{n}/time"),
  )
  fake_noise, fake_t = draw("critic", 0.001, 1.0) if shared else draw("fake")
  real_noise, real_t = draw("real")
  at = lambda x, n, s: (
    0.3 * np.sum((1 - s)[:, None] * x + s[:, None] * n, axis=1)
  )
  fake = at(0.5 + latent, fake_noise, fake_t)
  real = at(rows["x"], real_noise, real_t)
  expected = np.log1p(np.exp(fake)) + np.log1p(np.exp(-real))
  np.testing.assert_allclose(terms["gan"].sum, 0.25 * expected.sum(), rtol=1e-4)
  np.testing.assert_allclose(
    metrics["fake_logit"].sum, fake.sum(), rtol=2e-3, atol=2e-3
  )
  slope = gradient(method, "critic", p, rows)
  assert float(slope["critic"]["w"]) != 0
  np.testing.assert_array_equal(slope["student"]["m"], 0.0)


def test_discriminator_on_outside_features():
  nets = {
    **NETS,
    "features": lambda p, x, t, *, features: (x, p["k"] * x),
    "discriminator": lambda p, f: p["w"] * jnp.sum(f, -1),
  }
  method = make(nets, prediction="x0", gan_features="outside")
  assert method.networks["features"] == train.Frozen()
  assert method.networks["discriminator"] == train.Trained()
  assert method.schedule.updates(1) == ("critic", "discriminator")
  rows = common.batch(16)
  p = params(0.5) | {
    "features": {"k": jnp.float32(2.0)},
    "discriminator": {"w": jnp.float32(0.3)},
  }
  _, (terms, _) = common.total(method, "critic", p, rows, common.context())
  assert set(terms) == {"denoising"}
  slope = gradient(method, "discriminator", p, rows)
  assert float(slope["discriminator"]["w"]) != 0
  np.testing.assert_array_equal(slope["student"]["m"], 0.0)
  assert np.any(gradient(method, "student", p, rows)["student"]["m"] != 0)


def test_edm_weight_of_the_critic():
  """1 / sigma^2 + 1 / sigma_data^2 at sigma = t / (1 - t), a row."""
  rows, p = common.batch(16), params(0.5, critic_m=0.2)
  low, high = 0.1, 0.8
  bounds = {"critic_t_min": low, "critic_t_max": high, "sigma_data": 0.7}
  method = make(
    NETS, prediction="x0", critic_weight="edm", **bounds, **NO_GAN
  )
  _, (terms, _) = common.total(method, "critic", p, rows, common.context())
  latent = train.draw(jax.random.normal, rows["key"], "latent", (2,))
  noise = train.draw(jax.random.normal, rows["key"], "critic/noise", (2,))
  u = train.draw(jax.random.uniform, rows["key"], "critic/time")
  t = low + (high - low) * u
  x = 0.5 + latent
  x_t = (1 - t)[:, None] * x + t[:, None] * noise
  error = np.mean((common.x0_of(0.2)(x_t, t) - x) ** 2, axis=1)
  weight = ((1 - t) / t) ** 2 + 1 / 0.7**2
  np.testing.assert_allclose(
    terms["denoising"].sum, np.sum(weight * error), rtol=1e-4
  )
  with helpers.one_line_error("critic_weight must be one of"):
    make(NETS, critic_weight="sigma")


def test_two_time_scales():
  method = make(NETS, prediction="x0", ratio=3, **NO_GAN)
  played = [method.schedule.updates(i) for i in range(4)]
  assert played == [
    ("student", "critic"),
    ("critic",),
    ("critic",),
    ("student", "critic"),
  ]


def test_few_step_inputs_are_what_sampling_produces():
  """The exit step is one for all rows, and its input is a re-noised x0."""
  seen = []

  def watched(p, x, t, **_):
    seen.append((x, t))
    return student(p, x, t)

  nets = {**NETS, "student": watched}
  times = (1.0, 0.6, 0.2)
  method = make(nets, prediction="x0", times=times, **NO_GAN)
  rows, p = common.batch(8), params(0.5)
  found = set()
  for seed in range(12):
    seen.clear()
    ctx = common.context(seed=seed)
    common.eager_total(method, "student", p, rows, ctx)
    x, t = seen[-1]  # the differentiated call is the last
    assert len(set(np.asarray(t).tolist())) == 1
    exit_step = times.index(round(float(t[0]), 3))
    found.add(exit_step)
    latent = train.draw(jax.random.normal, rows["key"], "latent", (2,))
    noise = train.draw(jax.random.normal, rows["key"], "renoise", (2, 2))
    state = latent
    for i in range(exit_step):
      s = times[i + 1]
      state = (1 - s) * (0.5 + state) + s * noise[:, i]
    np.testing.assert_allclose(x, state, rtol=1e-4, atol=1e-5)
  assert found == {0, 1, 2}


def test_sampling_renoises_at_the_trained_times():
  seen = []

  def watched(p, x, t, **_):
    seen.append(t)
    return student(p, x, t)

  nets = {**NETS, "student": watched}
  method = make(nets, prediction="x0", times=(1.0, 0.3), **NO_GAN)
  noise = jax.random.normal(jax.random.key(0), (4, 2))
  with jax.disable_jit():
    method.sample(
      {"ema": params()["student"]},
      {"noise": noise},
      jax.random.key(1),
      steps=2,
    )
    np.testing.assert_allclose([t[0] for t in seen], [1.0, 0.3], rtol=1e-6)
    seen.clear()
    method.sample(
      {"ema": params()["student"]},
      {"noise": noise},
      jax.random.key(1),
      steps=4,
    )
  np.testing.assert_allclose([t[0] for t in seen], [1, 0.75, 0.5, 0.25])


def test_guidance_changes_the_teacher_only():
  guided = lambda p, x, t, *, label: (
    jnp.where(label[:, None] == 9, 0.0, 1.0) * jnp.ones_like(x)
  )
  plain = lambda p, x, t, *, label: p["m"] + 0 * x
  nets = {"student": plain, "teacher": guided, "critic": plain}
  rows, p = common.batch(4, label=0), params(0.5)
  for w in (1.0, 3.0):
    method = make(
      nets, prediction="x0", guidance=w, null_label=9, eps=0.0, **NO_GAN
    )
    _, (_, metrics) = common.total(method, "student", p, rows, common.context())
    # real = w, fake = x = .5: |.5 - w| / |.5 - w| = 1 at any w but .5
    np.testing.assert_allclose(metrics["direction"].sum, 4.0, rtol=1e-5)
    slope = gradient(method, "student", p, rows)["student"]["m"]
    np.testing.assert_allclose(slope, -0.5, rtol=1e-5)
  below = make(nets, prediction="x0", guidance=0.25, null_label=9, **NO_GAN)
  assert np.all(gradient(below, "student", p, rows)["student"]["m"] > 0)


def test_log_sigma_times():
  seen = []

  def watched(p, x, t, **_):
    seen.append(t)
    return teacher(p, x, t)

  method = make(
    {**NETS, "teacher": watched},
    prediction="x0",
    time_distribution="log_sigma",
    t_min=0.05 / 1.05,
    t_max=5 / 6,
    critic_t_max=0.9,
    **NO_GAN,
  )
  common.eager_total(
    method, "student", params(), common.batch(2048), common.context()
  )
  log_sigma = np.log(seen[0] / (1 - seen[0]))
  low, high = np.log(0.05), np.log(5.0)
  assert log_sigma.min() >= low - 1e-3 and log_sigma.max() <= high + 1e-3
  assert abs(log_sigma.mean() - (low + high) / 2) < 0.15  # 5 standard errors
  assert abs(log_sigma.std() - (high - low) / np.sqrt(12)) < 0.08


def test_bad_input_is_one_line():
  with helpers.one_line_error("did you mean 'gan_weight'"):
    make(NETS, gan_weigth=1.0)
  with helpers.one_line_error("ratio must be in"):
    make(NETS, ratio=0)
  with helpers.one_line_error("gan_features must be one of"):
    make(NETS, gan_features="student")
  with helpers.one_line_error("gan_shares_noise must be False"):
    make(
      {**NETS, "discriminator": critic},
      gan_features="teacher",
      gan_shares_noise=True,
    )
  with helpers.one_line_error("time_distribution must be one of"):
    make(NETS, time_distribution="log")
  with helpers.one_line_error("got none for .'critic'"):
    make({"student": student, "teacher": teacher})


def test_on_the_edm_path_the_latent_has_its_sigma():
  method = make(NETS, prediction="x0", path=processes.EDM(), **NO_GAN)
  out = method.sample(
    {"ema": {"m": jnp.zeros(2), "s": jnp.float32(1.0)}},
    {"noise": jnp.ones((1, 2))},
    jax.random.key(0),
    steps=1,
  )
  np.testing.assert_allclose(out, 80.0, rtol=1e-5)
