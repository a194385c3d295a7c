"""What the method tests share: contexts, batches, Gaussian problems."""

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import oracles, processes, train

PATH = processes.RectifiedFlow()


def context(updates=("student",), seed=0, carry=None):
  return train.Context(
    jnp.int32(0), jax.random.key(seed), tuple(updates), carry
  )


def batch(rows, dim=2, seed=0, label=None, **arrays):
  """Rows with their keys, as the step hands them to a loss."""
  key = jax.random.key(seed + 100)
  out = {
    "x": jax.random.normal(jax.random.key(seed), (rows, dim)),
    "key": train.row_keys(key, rows),
  }
  if label is not None:
    out["label"] = jnp.full(rows, label, jnp.int32)
  return {**out, **arrays}


def gaussian(mean=(0.0, 0.0), std=1.0):
  return oracles.gaussian(np.asarray(mean), std)


def x0_of(mean, std=1.0):
  """E[x0 | x_t] of N(mean, std^2 I) on the straight path."""

  def fn(x, t):
    a, s = (1 - t)[:, None], t[:, None]
    gain = a * std**2 / (a**2 * std**2 + s**2)
    return mean + gain * (x - a * mean)

  return fn


def eager_total(method, name, params, rows, ctx):
  """The objective the step would differentiate, (terms, metrics) beside it."""
  terms, metrics = method.losses[name](params, rows, ctx)
  return sum(t.sum / t.count for t in terms.values()), (terms, metrics)


def total(method, name, params, rows, ctx):
  """`eager_total` as one program: hundreds of eager calls compile slowly."""

  @jax.jit
  def run(params, rows, step, key):
    return eager_total(
      method, name, params, rows, ctx._replace(step=step, key=key)
    )

  return run(params, rows, ctx.step, ctx.key)
