"""Layers as one loop, and attention cut by hand: the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import kernels, models, train
from distilljax.models import layers
from distilljax.train import sharding
from tests.helpers import exact_jit
from tests.models import memory_test

CASES = memory_test.CASES


def stacked(kind, params):
  """Parameters of the unrolled network in the layout of the loop."""
  tree = lambda blocks: jax.tree.map(lambda *x: jnp.stack(x), *blocks)
  if kind == "transformer":
    blocks = [params["layers"][str(i)] for i in range(2)]
    return {**params, "layers": tree(blocks)}
  rest = {k: v for k, v in params.items() if not k.startswith("block_")}
  return {**rest, "blocks": tree([params[f"block_{i}"] for i in range(2)])}


def pair(kind, **hyper):
  """(unrolled, loop) of the same key."""
  return [
    models.make(
      kind, jax.random.key(0), scan_layers=loop, **CASES[kind], **hyper
    )
    for loop in (False, True)
  ]


def inputs(kind):
  if kind == "dit":
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    return x, jnp.array([0.2, 0.7, 0.1, 0.9])
  return (jax.random.randint(jax.random.key(1), (4, 8), 0, 16),)


def run(network, kind, params):
  out, features = network.apply_fn(params, *inputs(kind), features=True)
  return jnp.mean(jnp.sin(out)) + jnp.mean(jnp.cos(3 * features))


def moved(params):
  """Nothing may hide behind the zeros that some layers start from."""
  return jax.tree.map(lambda x: x + 0.1, params)


@pytest.mark.parametrize("kind", CASES)
def test_loop_has_the_initial_values_and_numbers_of_the_unrolled(kind):
  unrolled, loop = pair(kind)
  expected = stacked(kind, unrolled.params)
  jax.tree.map(np.testing.assert_array_equal, loop.params, expected)
  first, second = exact_jit(
    lambda p, q: (run(unrolled, kind, p), run(loop, kind, q))
  )(moved(unrolled.params), moved(loop.params))
  assert float(first) == float(second)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_loop_has_the_gradients_of_the_unrolled(kind, x64):
  unrolled, loop = pair(kind)
  wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float64))
  grads, ours = (
    jax.jit(jax.grad(lambda p, n=n: run(n, kind, p)))(
      jax.tree.map(wide, moved(n.params))
    )
    for n in (unrolled, loop)
  )
  # What all layers share is a sum over them, in another order.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-15),
    ours,
    stacked(kind, grads),
  )


def test_loop_reads_a_cache_like_the_unrolled():
  unrolled, loop = pair("transformer")
  (tokens,) = inputs("transformer")

  @jax.jit
  def read(first, second):
    out = []
    for network, params in ((unrolled, first), (loop, second)):
      _, cache = network.apply_fn(params, tokens[:, :6], cache=8)
      out.append(network.apply_fn(params, tokens[:, 6:], cache=cache)[0])
    return out

  a, b = read(unrolled.params, loop.params)
  np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  "kind", [pytest.param("dit", marks=pytest.mark.slow), "transformer"]
)
def test_remat_of_a_loop_keeps_less(kind):
  sizes = []
  for remat in ("none", "block"):
    network = pair(kind, remat=remat)[1]
    loss = lambda p, n=network: jnp.mean(n.apply_fn(p, *inputs(kind)))
    back = jax.eval_shape(lambda p, f=loss: jax.vjp(f, p)[1], network.params)
    sizes.append(sum(x.size for x in jax.tree.leaves(back)))
  assert sizes[1] < 0.7 * sizes[0]


def test_vectors_of_a_stack_are_not_cut(monkeypatch):
  monkeypatch.setattr(sharding, "SMALL", 1)
  mesh = train.make_mesh(jax.devices()[:8], fsdp=2, tensor=4)
  for kind in CASES:
    params = pair(kind)[1].params
    places = sharding.shardings("student", params, "fsdp+tensor", mesh)
    flat = jax.tree_util.tree_leaves_with_path(places)
    for keys, place in flat:
      path = jax.tree_util.keystr(keys, simple=True, separator="/")
      inside = "/" in path and path.split("/")[0] in ("blocks", "layers")
      if inside and path.endswith("kernel"):
        assert place.spec[0] is None
        assert set(place.spec[1:]) == {"fsdp", "tensor"}, path
      elif inside:
        assert not any(place.spec), path


def attended(mesh, q, k, v, **options):
  def run(q, k, v, ids):
    if ids is not None:
      options.update(q_segment_ids=ids, kv_segment_ids=ids)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return layers.attention(q, k, v, **options)

  return run


@pytest.mark.parametrize(
  "case", ["rows and heads", "heads do not divide", "rows do not divide"]
)
def test_attention_is_cut_by_hand_where_the_mesh_divides(case):
  mesh = train.make_mesh(jax.devices()[:8], data=2, fsdp=2, tensor=2)
  rows = 6 if case == "rows do not divide" else 4
  kv_heads = 1 if case == "heads do not divide" else 2
  keys = jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(keys[0], (rows, 5, 4, 8))
  k = jax.random.normal(keys[1], (rows, 5, kv_heads, 8))
  v = jax.random.normal(keys[2], (rows, 5, kv_heads, 8))
  ids = jnp.arange(5, dtype=jnp.int32)[None] // 2 + jnp.zeros((rows, 1), int)
  run = attended(mesh, q, k, v, causal=True)
  text = str(jax.make_jaxpr(run)(q, k, v, ids))
  local = {
    "rows and heads": "f32[1,5,2,8]",
    "heads do not divide": "f32[1,5,4,8]",
    "rows do not divide": "f32[6,5,2,8]",
  }[case]
  assert "shard_map" in text
  assert local in text
  expected = kernels.attention(
    q, k, v, causal=True, q_segment_ids=ids, kv_segment_ids=ids
  )
  placed = jax.device_put((q, k, v, ids), sharding.replicated(mesh))
  np.testing.assert_allclose(jax.jit(run)(*placed), expected, atol=1e-6)


def test_attention_is_left_alone_without_a_mesh():
  q = jnp.ones((2, 3, 2, 4))
  assert "shard_map" not in str(jax.make_jaxpr(layers.attention)(q, q, q))
