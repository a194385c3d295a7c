"""Rematerialisation and the placement of rows: same numbers, less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import models
from tests import helpers

CASES = {
  "dit": {"width": 16, "depth": 2, "heads": 2},
  "transformer": {"vocab_size": 16, "width": 16, "depth": 2, "heads": 2},
}


def loss_of(kind, remat):
  network = models.make(kind, jax.random.key(0), remat=remat, **CASES[kind])
  # Nothing may hide behind the zeros that some layers start from.
  params = jax.tree.map(lambda x: x + 0.1, network.params)
  if kind == "dit":
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    inputs = (x, jnp.array([0.2, 0.7]))
  else:
    inputs = (jax.random.randint(jax.random.key(1), (2, 8), 0, 16),)
  return lambda p: jnp.mean(jnp.sin(network.apply_fn(p, *inputs))), params


def saved_bytes(kind, remat):
  """Bytes that the backward pass is handed; nothing is computed."""
  loss, params = loss_of(kind, remat)
  backward = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))


@pytest.mark.parametrize(
  "kind", ["dit", pytest.param("transformer", marks=pytest.mark.slow)]
)
def test_remat_needs_less_memory(kind):
  none, dots, block = (saved_bytes(kind, r) for r in ("none", "dots", "block"))
  assert block < dots < none


@pytest.mark.parametrize(
  "kind,remat",
  [
    pytest.param("dit", "block", marks=pytest.mark.slow),
    pytest.param("dit", "dots", marks=pytest.mark.slow),
    pytest.param("transformer", "block", marks=pytest.mark.slow),
    pytest.param("transformer", "dots", marks=pytest.mark.slow),
  ],
)
def test_remat_changes_no_number(kind, remat):
  loss, params = loss_of(kind, "none")
  expected = jax.jit(jax.grad(loss))(params)
  ours = jax.jit(jax.grad(loss_of(kind, remat)[0]))(params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    ours,
    expected,
  )


def test_unknown_remat_is_one_line():
  for kind, hyper in CASES.items():
    with helpers.one_line_error("remat must be one of.*did you mean 'block'"):
      models.make(kind, jax.random.key(0), remat="blocks", **hyper)


def mesh(*names, kind=jax.sharding.AxisType.Auto):
  sizes = (2,) * len(names)
  devices = jax.devices()[: 2 ** len(names)]
  return jax.make_mesh(sizes, names, (kind,) * len(names), devices=devices)


def constraints(x, mesh=None):
  def fn(x):
    if mesh is None:
      return models.cut_rows(x)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return models.cut_rows(x)

  return str(jax.make_jaxpr(fn)(x)).count("sharding_constraint")


def test_rows_are_cut_where_a_mesh_says_so():
  x = jnp.zeros((8, 3))
  assert constraints(x, mesh("data", "fsdp", "tensor")) == 1
  assert constraints(x, mesh("data")) == 1
  assert constraints(x, mesh("tensor")) == 0
  assert constraints(x) == 0
  assert constraints(jnp.zeros((2, 3)), mesh("data", "fsdp")) == 0  # 4 devices
  by_hand = mesh("data", kind=jax.sharding.AxisType.Manual)
  assert constraints(x, by_hand) == 0  # inside a shard_map rows are local

  both = mesh("data", "fsdp", "tensor")

  @jax.jit
  def fn(x):
    with jax.sharding.use_abstract_mesh(both.abstract_mesh):
      return models.cut_rows(x)

  place = jax.sharding.NamedSharding(both, jax.sharding.PartitionSpec())
  out = fn(jax.device_put(x, place))
  np.testing.assert_array_equal(out, x)
  assert out.sharding.shard_shape(x.shape) == (2, 3)
