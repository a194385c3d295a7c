"""A small method: two networks, an EMA and a frozen target, for the tests."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distilljax import train


def loss_student(params, batch, context):
  noise = train.draw(jax.random.normal, batch["key"], "noise", (3,))
  shift = jax.random.normal(train.named_key(context.key, "shift"), ())
  x = batch["x"] + 0.1 * noise + 0.1 * shift
  ours = jnp.tanh(x @ params["student"]["w"] + params["student"]["b"])
  target = jnp.tanh(x @ params["teacher"]["w"])
  error = jnp.sum((ours - target) ** 2, axis=-1)
  pull = jnp.sum((ours - x @ params["critic"]["w"]) ** 2, axis=-1)
  terms = {
    "fit": train.mean(error, batch["where"]),
    "pull": train.weighted(0.1, train.mean(pull)),
  }
  return terms, {"size": train.mean(jnp.abs(ours).mean(-1))}


def loss_critic(params, batch, context):
  del context
  error = batch["x"] @ (params["critic"]["w"] - params["teacher"]["w"])
  return {"fit": train.mean(jnp.sum(error**2, axis=-1))}, {}


def method(**changes):
  return train.Method(
    name="toy",
    paper="arXiv:0000.00000",
    networks={
      "student": train.Trained(),
      "critic": train.Trained(),
      "teacher": train.Frozen(),
      "ema": train.Ema(of="student", decay=0.9),
    },
    losses={"student": loss_student, "critic": loss_critic},
    schedule=train.Schedule(cycle=(("student", "critic"), ("critic",))),
    sample=lambda params, inputs, key, *, steps: inputs,
  )._replace(**changes)


def init(key, earlier):
  del earlier
  draw = lambda name, *shape: jax.random.normal(
    train.named_key(key, name), shape
  )
  return {
    "student": {"w": draw("student", 3, 3), "b": jnp.zeros(3)},
    "critic": {"w": draw("critic", 3, 3)},
    "teacher": {"w": draw("teacher", 3, 3)},
  }


def optimizers():
  return {"student": optax.adam(1e-2), "critic": optax.sgd(1e-2)}


def batch(seed=0, rows=16):
  rng = np.random.default_rng(seed)
  return {
    "x": rng.normal(size=(rows, 3)).astype(np.float32),
    "where": rng.random(rows) < 0.7,
  }


class Data:
  """Batch i is `batch(i)`; the state is i."""

  def __init__(self, rows=16, poison=()):
    self.i = 0
    self.rows = rows
    self.poison = poison

  def __iter__(self):
    return self

  def __next__(self):
    out = batch(self.i, self.rows)
    if self.i in self.poison:
      out["x"][0] = np.nan
    self.i += 1
    return out

  def get_state(self):
    return json.dumps(self.i).encode()

  def set_state(self, state):
    self.i = json.loads(state)


def stage(steps=12, name="toy", poison=(), **changes):
  return train.Stage(
    name=name,
    method=method(**changes),
    optimizers=optimizers(),
    data=lambda: Data(poison=poison),
    steps=steps,
    init=init,
  )
