"""The networks of the zoo call `kernels.attention`: same numbers as einsum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import kernels, losses, models
from tests.kernels.attention_test import counts_in, some

PLAIN = functools.partial(kernels.attention, implementation="reference")


def close(ours, theirs):
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    scale = max(float(jnp.abs(b).max()), 1e-3)
    assert float(jnp.abs(a - b).max()) <= 1e-5 * scale


def with_plain_attention(monkeypatch, fn, *args):
  with monkeypatch.context() as patch:
    patch.setattr(kernels, "attention", PLAIN)
    return jax.jit(lambda *args: fn(*args))(*args)


def mean_flow_step():
  """A DiT's parameters and the loss and gradient of MeanFlow."""
  network = models.make(
      "dit", jax.random.key(0), width=16, heads=2, depth=1, patch=4,
      second_time=True,
  )
  # A head and gates that are zero would hide the attention.
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda a: a + 0.2 * jnp.asarray(rng.normal(size=a.shape), a.dtype),
      network.params,
  )
  draw = lambda: jnp.asarray(rng.normal(size=(2, 8, 8, 1)), jnp.float32)
  x, v = draw(), draw()
  t, r = jnp.asarray([0.7, 0.9]), jnp.asarray([0.2, 0.9])

  def loss(params):
    u = lambda x, t, r: network.apply_fn(params, x, t, r=r)
    # Without the adaptive weight the gradient keeps its size.
    return losses.mean_flow_loss(u, x, v, t, r, norm_p=0.0).sum()

  return params, jax.value_and_grad(loss)


def test_mean_flow_of_a_dit_is_one_kernel_each_way():
  params, step = mean_flow_step()
  assert counts_in(jax.jit(step).lower(params)) == some(fused=1, bwd=1)


@pytest.mark.slow
def test_a_dit_trains_by_mean_flow_as_with_einsum(monkeypatch):
  params, step = mean_flow_step()
  close(jax.jit(step)(params), with_plain_attention(monkeypatch, step, params))


@pytest.mark.slow
def test_a_transformer_with_padding_as_with_einsum(monkeypatch):
  network = models.make(
      "transformer", jax.random.key(0), vocab_size=11, width=16, heads=4,
      kv_heads=2, depth=1,
  )  # fmt: skip
  tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 11)
  where = jnp.asarray([[True] * 6, [False, False, True, True, True, False]])

  def loss(params, where):
    logits = network.apply_fn(params, tokens, where=where)
    log_probs = jax.nn.log_softmax(logits)[..., 0]
    return jnp.sum(jnp.where(where, log_probs, 0.0))

  fn = jax.value_and_grad(lambda params: loss(params, where))
  close(
      jax.jit(fn)(network.params),
      with_plain_attention(monkeypatch, fn, network.params),
  )


def test_the_transformer_calls_one_kernel_a_layer():
  # That its logits are right is held against NumPy in tests/models.
  network = models.make(
      "transformer", jax.random.key(0), vocab_size=11, width=16, heads=4,
      kv_heads=2, depth=2,
  )  # fmt: skip
  tokens = jnp.zeros((2, 6), jnp.int32)
  loss = lambda params: network.apply_fn(params, tokens).sum()
  step = jax.jit(jax.grad(loss)).lower(network.params)
  assert counts_in(step) == some(att=2, bwd=2)
