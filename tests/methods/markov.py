"""Markov networks and batches for the tests of language methods."""

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import oracles, train

V = 5


def shift(k):
  """A model that says i + k after i, and nothing else."""
  return {"transition": 60.0 * jnp.roll(jnp.eye(V), k, axis=1)}


def random(seed, scale=1.0):
  return {
    "transition": scale * jax.random.normal(jax.random.key(seed), (V, V))
  }


def nets(*names):
  return {name: oracles.markov_apply for name in names}


def batch(n=6, t=4, seed=0):
  """Random prompts [n, 1] and completions of 1 ... t tokens."""
  rng = np.random.default_rng(seed)
  lengths = np.arange(n) % t + 1
  return {
    "prompts": jnp.asarray(rng.integers(V, size=(n, 1))),
    "tokens": jnp.asarray(rng.integers(V, size=(n, t))),
    "where": jnp.asarray(np.arange(t)[None] < lengths[:, None]),
  }


def logits(params, rows):
  """float64 log-probabilities before each token, [n, t, v]."""
  read = np.concatenate([rows["prompts"], rows["tokens"]], 1)[:, :-1]
  x = np.asarray(params["transition"], np.float64)[read]
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def soften(log_p, temperature):
  x = log_p / temperature
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def picked(log_p, rows):
  return np.take_along_axis(log_p, np.asarray(rows["tokens"])[..., None], 2)[
    ..., 0
  ]


def mean(values, rows):
  return np.sum(np.where(rows["where"], values, 0)) / np.sum(rows["where"])


def entropy(log_p):
  return -np.sum(np.exp(log_p) * log_p, -1)


def kl(log_p, log_q):
  return np.sum(np.exp(log_p) * (log_p - log_q), -1)


def gradient(method, params, rows, context):
  """Gradient of the student's objective in every network's parameters."""

  @jax.jit
  def run(params, rows):
    def objective(tree):
      terms, _ = method.losses["student"](tree, rows, context)
      return sum(t.sum / t.count for t in terms.values())

    return jax.grad(objective)(params)

  return run(params, rows)


def fit(method, params, frozen, *, steps, prompts=32, lr=0.1, rows=None):
  """Trains with collect and the real step on one device."""
  optimizer = train.make_optimizer(learning_rate=lr, steps=steps)
  mesh = train.make_mesh(jax.devices()[:1])
  step = train.make_step(method, {"student": optimizer}, mesh)
  state = step.init({"student": params}, jax.random.key(3))
  rng = np.random.default_rng(0)
  history = []
  for _ in range(steps):
    data = {"prompts": rng.integers(V, size=(prompts, 1)), **(rows or {})}
    data = train.put_rows(data, mesh)
    if method.collect is not None:
      key = jax.random.fold_in(state.key, state.step)
      context = train.Context(state.step, key, ("student",), state.carry)
      data = method.collect({**frozen, **state.params}, data, context)
    state, metrics = step(("student",), state, frozen, data)
    history.append(jax.device_get(metrics))
  return state.params["student"], history


def lm(params):
  return oracles.MarkovLM(jnp.zeros(V), params["transition"])
