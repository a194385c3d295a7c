"""Adapters, parameter transfer and heads, against NumPy."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distilljax import models
from tests.helpers import one_line_error


class _Dense(nnx.Module):
  """Two linear maps in a list, with batch statistics between them."""

  def __init__(self, rngs):
    self.parts = nnx.List(
        [nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)]
    )
    self.norm = nnx.BatchNorm(5, use_running_average=True, rngs=rngs)

  def __call__(self, x, *, scale=1.0):
    return self.parts[1](jnp.tanh(self.norm(self.parts[0](x)))) * scale


def _dense():
  module = _Dense(nnx.Rngs(0))
  module.norm.mean[...] = jnp.arange(5.0) / 10
  module.norm.var[...] = 1 + jnp.arange(5.0)
  return module


def _dense_numpy(params, x):
  first, second = params["parts"]["0"], params["parts"]["1"]
  norm = params["norm"]
  h = x @ first["kernel"] + first["bias"]
  h = (h - np.arange(5) / 10) / np.sqrt(1 + np.arange(5) + 1e-5)
  h = np.tanh(h * norm["scale"] + norm["bias"])
  return h @ second["kernel"] + second["bias"]


def _numpy(tree):
  return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def _names_only(tree):
  if isinstance(tree, dict):
    return all(isinstance(k, str) and _names_only(v) for k, v in tree.items())
  return isinstance(tree, jax.Array)


def test_from_nnx_is_the_module_under_every_transform(key):
  network = models.from_nnx(_dense())
  assert _names_only(network.params)
  x = jax.random.normal(key, (4, 3))
  v = jax.random.normal(jax.random.fold_in(key, 1), (4, 3))
  params, px, pv = _numpy(network.params), np.asarray(x), np.asarray(v)
  want = _dense_numpy(params, px.astype(np.float64))
  fn = jax.jit(network.apply_fn)
  np.testing.assert_allclose(fn(network.params, x), want, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
      fn(network.params, x, scale=2.0), 2 * want, rtol=1e-5, atol=1e-6
  )
  rows = jax.vmap(network.apply_fn, (None, 0))(network.params, x[:, None])
  np.testing.assert_allclose(rows[:, 0], want, rtol=1e-5, atol=1e-6)
  step = 1e-5
  slope = (
      _dense_numpy(params, px + step * pv.astype(np.float64))
      - _dense_numpy(params, px - step * pv.astype(np.float64))
  ) / (2 * step)
  _, tangent = jax.jvp(lambda x: fn(network.params, x), (x,), (v,))
  np.testing.assert_allclose(tangent, slope, rtol=1e-4, atol=1e-5)
  # Gradient with respect to the parameters: the last bias sees each row once.
  grad = jax.grad(lambda p: jnp.sum(fn(p, x)))(network.params)
  np.testing.assert_allclose(grad["parts"]["1"]["bias"], [4.0, 4.0])
  assert jax.tree.structure(grad) == jax.tree.structure(network.params)


def test_from_nnx_takes_the_parameters_it_is_given(key):
  network = models.from_nnx(_dense())
  other = jax.tree.map(lambda a: a + 0.5, network.params)
  x = jax.random.normal(key, (4, 3))
  np.testing.assert_allclose(
      network.apply_fn(other, x),
      _dense_numpy(_numpy(other), np.asarray(x, np.float64)),
      rtol=1e-5,
      atol=1e-6,
  )


def test_from_nnx_keeps_ten_list_entries_in_order():
  class Chain(nnx.Module):

    def __init__(self):
      self.parts = nnx.List([nnx.Param(jnp.full((), i)) for i in range(11)])

    def __call__(self, x):
      for part in self.parts:
        x = x * 2 + part[...]
      return x

  network = models.from_nnx(Chain())
  want = 1.0
  for i in range(11):
    want = want * 2 + i
  assert float(network.apply_fn(network.params, jnp.ones(()))) == want


def test_from_nnx_refuses_training_mode():
  with one_line_error("from_nnx: module must be in evaluation mode.*BatchNorm"):
    models.from_nnx(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))

  class Dropping(nnx.Module):

    def __init__(self):
      self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x):
      return self.drop(x)

  with one_line_error("from_nnx: module must be in.*Dropout at drop"):
    models.from_nnx(Dropping())
  module = Dropping()
  module.eval()
  network = models.from_nnx(module)
  assert network.params == {}
  np.testing.assert_array_equal(network.apply_fn({}, jnp.ones(3)), np.ones(3))


def test_adapters_refuse_what_they_cannot_adapt():
  with one_line_error("from_nnx: module must be a flax.nnx.Module, got str"):
    models.from_nnx("net")
  with one_line_error("from_linen: module must be a flax.linen.Module"):
    models.from_linen(3, {"params": {}})
  with one_line_error("from_linen: variables must be .*got .'batch_stats'"):
    models.from_linen(nn.Dense(2), {"batch_stats": {}})
  with one_line_error("from_callable: fn must be a function, got int"):
    models.from_callable(3, {})
  with one_line_error("from_callable: params must be a nested dict"):
    models.from_callable(lambda p, x: x, [jnp.ones(2)])


def test_from_linen_is_the_module(key):

  class Net(nn.Module):

    @nn.compact
    def __call__(self, x, *, shift=0.0):
      x = nn.BatchNorm(use_running_average=True)(x)
      return nn.Dense(2)(x) + shift

  x = jax.random.normal(key, (4, 3))
  variables = Net().init(key, x)
  stats = variables["batch_stats"]["BatchNorm_0"]
  stats["mean"] = stats["mean"] + 0.5
  stats["var"] = stats["var"] * 4
  network = models.from_linen(Net(), variables)
  assert set(network.params) == {"BatchNorm_0", "Dense_0"}
  assert set(variables) == {"params", "batch_stats"}  # left as it was
  params = jax.tree.map(lambda a: a + 0.25, network.params)
  p = _numpy(params)
  h = (np.asarray(x, np.float64) - 0.5) / np.sqrt(4 + 1e-5)
  h = h * p["BatchNorm_0"]["scale"] + p["BatchNorm_0"]["bias"]
  want = h @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
  out = jax.jit(network.apply_fn)(params, x)
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
  out = network.apply_fn(params, x, shift=3.0)
  np.testing.assert_allclose(out, want + 3, rtol=1e-5, atol=1e-6)
  grad = jax.grad(lambda q: jnp.sum(network.apply_fn(q, x)))(params)
  np.testing.assert_allclose(grad["Dense_0"]["bias"], [4.0, 4.0])


def test_from_linen_unboxes_partitioned_and_frozen_variables(key):
  dense = nn.Dense(
      2, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "model"))
  )
  variables = flax.core.freeze(dense.init(key, jnp.ones((1, 3))))
  network = models.from_linen(dense, variables)
  assert type(network.params) is dict
  assert _names_only(network.params)
  np.testing.assert_allclose(
      network.apply_fn(network.params, jnp.ones((1, 3))), [[3.0, 3.0]]
  )


def test_from_callable_is_the_pair_itself():
  fn = lambda params, x: params["a"] * x
  params = {"a": jnp.ones(2)}
  network = models.from_callable(fn, params)
  assert network.apply_fn is fn and network.params is params


def test_count_params_counts_scalars():
  tree = {
      "a": jnp.zeros((3, 5)),
      "b": {"c": jax.ShapeDtypeStruct((7,), jnp.float32), "d": jnp.zeros(())},
  }
  assert models.count_params(tree) == 15 + 7 + 1
  assert models.count_params({}) == 0


# Transfer.


def test_transfer_keeps_what_only_the_target_has_and_copies_the_rest():
  source = {"a": {"w": jnp.arange(3.0)}, "b": jnp.ones(2)}
  target = {
      "a": {"w": jnp.zeros(3), "extra": jnp.full(4, 7.0)},
      "b": jnp.zeros(2),
  }
  out = models.transfer(source, target)
  np.testing.assert_array_equal(out["a"]["w"], [0, 1, 2])
  np.testing.assert_array_equal(out["b"], [1, 1])
  np.testing.assert_array_equal(out["a"]["extra"], np.full(4, 7.0))
  # A donated student must not take its teacher along, nor the other way round.
  for leaf in jax.tree.leaves((source, target)):
    leaf.delete()
  assert float(sum(jnp.sum(leaf) for leaf in jax.tree.leaves(out))) == 33.0


def test_transfer_fills_the_backbone_of_a_headed_target():
  source = {"w": jnp.ones(2)}
  headed = {"backbone": {"w": jnp.zeros(2)}, "head": {"w": jnp.full(2, 5.0)}}
  out = models.transfer(source, headed)
  np.testing.assert_array_equal(out["backbone"]["w"], [1, 1])
  np.testing.assert_array_equal(out["head"]["w"], [5, 5])
  headed["head"]["w"].delete()
  again = models.transfer(out, out)
  np.testing.assert_array_equal(again["head"]["w"], [5, 5])


def test_transfer_refuses_a_mismatch():
  target = {"dense": {"kernel": jnp.zeros((2, 3))}}
  with one_line_error(
      "transfer: target_params must be a tree with the source's leaf"
      " 'dense/kernal', got none; did you mean 'dense/kernel'"
  ):
    models.transfer({"dense": {"kernal": jnp.zeros((2, 3))}}, target)
  with one_line_error(
      r"transfer: target_params\['dense/kernel'\] must be \[2, 4\] like the"
      r" source, got \[2, 3\]"
  ):
    models.transfer({"dense": {"kernel": jnp.zeros((2, 4))}}, target)
  with one_line_error("must be bfloat16 like the source .*, got float32"):
    models.transfer(
        {"dense": {"kernel": jnp.zeros((2, 3), jnp.bfloat16)}}, target
    )


# Heads.


def _toy_backbone():
  def apply_fn(params, x, t, *, label=None, features=False):
    hidden = x * params["w"] + (0 if label is None else label[:, None])
    out = hidden + t[:, None]
    return (out, hidden) if features else out

  return models.from_callable(apply_fn, {"w": jnp.asarray([2.0, 3.0])})


def test_with_head_gives_prediction_logits_or_features():
  head = models.from_callable(
      lambda params, features: jnp.sum(features * params["v"], axis=-1),
      {"v": jnp.asarray([1.0, 10.0])},
  )
  both = models.with_head(_toy_backbone(), head)
  assert set(both.params) == {"backbone", "head"}
  x, t = jnp.asarray([[1.0, 2.0]]), jnp.asarray([0.5])
  label = jnp.asarray([4])
  plain = both.apply_fn(both.params, x, t)
  np.testing.assert_allclose(plain, [[2.5, 6.5]])
  out, logits = both.apply_fn(both.params, x, t, label=label, logits=True)
  np.testing.assert_allclose(out, [[6.5, 10.5]])
  np.testing.assert_allclose(logits, [6 + 100])
  out, features = both.apply_fn(both.params, x, t, features=True)
  np.testing.assert_allclose(out, plain)
  np.testing.assert_allclose(features, [[2, 6]])
  with one_line_error("with_head: logits and features must be asked for one"):
    both.apply_fn(both.params, x, t, logits=True, features=True)


def test_feature_dim_is_the_last_axis():
  assert models.feature_dim(_toy_backbone(), (2,)) == 2


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 2, 6), (4, 5, 6)])
def test_head_is_the_formula_of_its_docstring(key, shape, x64):
  head = models.make("head", key, features=6, width=5)
  params = jax.tree.map(
      lambda a: np.asarray(a, np.float64)
      + np.random.default_rng(0).normal(size=a.shape),
      head.params,
  )
  features = np.random.default_rng(1).normal(size=shape) * 3 + 1
  p = params
  silu = lambda a: a / (1 + np.exp(-a))
  h = features.reshape(4, -1, 6)
  h = (h - h.mean(-1, keepdims=True)) / np.sqrt(
      h.var(-1, keepdims=True) + 1e-5
  )
  h = silu(h @ p["hidden"]["kernel"] + p["hidden"]["bias"]).mean(1)
  h = silu(h @ p["mix"]["kernel"] + p["mix"]["bias"])
  want = (h @ p["out"]["kernel"] + p["out"]["bias"])[:, 0]
  out = jax.jit(head.apply_fn)(params, features)
  assert out.shape == (4,) and out.dtype == jnp.float64
  np.testing.assert_allclose(out, want, rtol=1e-10)


def test_head_refuses_other_features(key):
  head = models.make("head", key, features=6, width=4)
  with one_line_error(r"Head: features must be \[b, \.\.\., 6\], got \[2, 5\]"):
    head.apply_fn(head.params, jnp.zeros((2, 5)))
  with one_line_error(r"Head: features must be \[b, \.\.\., d\] \(rank >= 2\)"):
    head.apply_fn(head.params, jnp.zeros(6))
