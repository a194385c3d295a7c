"""Tabular optima: losses descend to them and nowhere else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses, oracles
from tests.helpers import one_line_error

# Many small programs, each run once: compile them cheaply.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def soft(x):
  e = np.exp(np.asarray(x) - np.max(x, -1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def test_task_and_optima(x64):
  task = oracles.make_tabular_task(jax.random.key(0))
  assert task.base.shape == task.teacher.shape == task.reward.shape == (64, 12)
  clean = oracles.make_tabular_task(jax.random.key(0), noise=0)
  np.testing.assert_allclose(
    clean.teacher, clean.base + 1.5 * clean.reward, rtol=1e-12
  )
  assert np.all((task.reward >= 0) & (task.reward < 1))
  spread = np.std(np.asarray(task.teacher - clean.teacher))
  assert 0.9 < spread < 1.1
  binary = oracles.make_tabular_task(jax.random.key(0), binary=True)
  assert set(np.unique(binary.reward)) == {0.0, 1.0}
  t, r = soft(task.teacher), soft(task.base)
  for scale in (0.0, 0.7, 1.0, 1.25):
    want = t**scale * r ** (1 - scale)
    want /= want.sum(-1, keepdims=True)
    ours = oracles.geometric_optimum(
      task.teacher, task.base, reward_scale=scale
    )
    np.testing.assert_allclose(np.exp(ours), want, rtol=1e-10)
  want = r * np.exp(1.5 * np.asarray(task.reward))
  want /= want.sum(-1, keepdims=True)
  ours = oracles.regularized_optimum(task.base, task.reward, sharpness=1.5)
  np.testing.assert_allclose(np.exp(ours), want, rtol=1e-10)
  # Without noise the teacher IS the regularised optimum.
  np.testing.assert_allclose(
    soft(clean.teacher),
    np.exp(
      oracles.regularized_optimum(clean.base, clean.reward, sharpness=1.5)
    ),
    rtol=1e-10,
  )
  np.testing.assert_allclose(
    oracles.expected_reward(task.base, task.reward),
    np.sum(r * np.asarray(task.reward), -1),
    rtol=1e-12,
  )


def test_gradients_vanish_at_the_optimum_only(x64):
  """Every objective of the family is stationary at its own optimum."""
  task = oracles.make_tabular_task(jax.random.key(1), contexts=4, actions=6)
  teacher, base = task.teacher, task.base
  target = oracles.geometric_optimum(teacher, base, reward_scale=1.5)
  teacher_policy = jax.nn.log_softmax(teacher)
  objectives = {
    "forward": (lambda s: losses.forward_kl(s, teacher), teacher_policy),
    "reverse": (lambda s: losses.reverse_kl(s, teacher), teacher_policy),
    "jsd": (
      lambda s: losses.generalized_jsd(s, teacher, beta=0.3),
      teacher_policy,
    ),
    "skew": (lambda s: losses.skew_forward_kl(s, teacher), teacher_policy),
    "adaptive": (lambda s: losses.adaptive_kl(s, teacher), teacher_policy),
    "gopd": (
      lambda s: losses.gopd_loss(s, teacher, base, reward_scale=1.5),
      target,
    ),
  }

  @jit
  def gradients():
    return {
      name: [
        jax.grad(lambda s, fn=fn: jnp.sum(fn(s)))(at)
        for at in (best, base, target, teacher_policy)
      ]
      for name, (fn, best) in objectives.items()
    }

  for name, (at_best, at_base, at_target, at_teacher) in gradients().items():
    np.testing.assert_allclose(at_best, 0, atol=1e-12, err_msg=name)
    assert np.abs(at_base).max() > 1e-3, name
    other = at_teacher if name == "gopd" else at_target
    assert np.abs(other).max() > 1e-3, name


def test_sampled_fixed_point():
  """Card g_opd: sampled policy gradient reaches the geometric target.

  8 contexts x 6 actions, 8 samples a context, lr .15, 4000 steps: KL to the
  target < 1e-4 (averaged iterate), KL to the teacher > 5e-3.
  """
  task = oracles.make_tabular_task(jax.random.key(2), contexts=8, actions=6)
  scale = 1.25
  log_t = jax.nn.log_softmax(task.teacher)
  log_r = jax.nn.log_softmax(task.base)

  def loss(logits, actions):
    pick = functools.partial(jnp.take_along_axis, indices=actions, axis=1)
    student = pick(jax.nn.log_softmax(logits))
    advantage = losses.gopd_advantage(
      student, pick(log_t), pick(log_r), reward_scale=scale
    )
    values = losses.policy_gradient_loss(student, student, advantage)
    return jnp.sum(jnp.mean(values, axis=1))

  def step(state, key):
    logits, mean = state
    actions = jax.random.categorical(key, logits[:, None, :], shape=(8, 8))
    logits = logits - 0.15 * jax.grad(loss)(logits, actions)
    return (logits, mean + logits), None

  @jax.jit
  def train(key):
    state = task.base, jnp.zeros_like(task.base)
    keys = jax.random.split(key, 4000)
    (logits, _), _ = jax.lax.scan(step, state, keys[:2000])
    (_, total), _ = jax.lax.scan(
      step, (logits, jnp.zeros_like(logits)), keys[2000:]
    )
    return total / 2000

  final = train(jax.random.key(3))
  target = oracles.geometric_optimum(
    task.teacher, task.base, reward_scale=scale
  )
  to_target = jnp.mean(losses.reverse_kl(final, target))
  to_teacher = jnp.mean(losses.reverse_kl(final, task.teacher))
  assert to_target < 1e-4, to_target
  assert to_teacher > 5e-3, to_teacher


@pytest.mark.slow
def test_reward_grows_with_the_reward_scale():
  """Card g_opd: E[r] at the optimum is strictly growing in lambda, 20 seeds."""
  for seed in range(20):
    task = oracles.make_tabular_task(jax.random.key(seed))
    earned = [
      float(
        jnp.mean(
          oracles.expected_reward(
            oracles.geometric_optimum(
              task.teacher, task.base, reward_scale=scale
            ),
            task.reward,
          )
        )
      )
      for scale in (0.5, 1.0, 1.25, 1.5, 2.0)
    ]
    assert earned == sorted(earned), (seed, earned)


def test_bad_input():
  x = jnp.zeros((2, 3))
  with one_line_error("reference must be"):
    oracles.geometric_optimum(x, x[:1], reward_scale=1.0)
  with one_line_error("reward must be"):
    oracles.regularized_optimum(x, x[:1], sharpness=1.0)
  with one_line_error("reward must be"):
    oracles.expected_reward(x, x[:1])
