"""Attention cut over eight chips that are not here: `pytest -m aot`."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distilljax import kernels, losses, models
from distilljax.train import sharding
from tests.kernels import aot

pytestmark = pytest.mark.aot

TOPOLOGY = "v5e:2x4"
KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute")


def mean_flow(**options):
  """Gradient of MeanFlow's loss in q, k and v."""

  def grads(q, k, v, t):
    attend = lambda *x: kernels.sharded_attention(
        *x, implementation="pallas_tpu", **options
    )

    def loss(x):
      o, to = jax.jvp(attend, x, (t, t, t))
      error = (o - jax.lax.stop_gradient(o + to)).astype(jnp.float32)
      return jnp.sum(error**2)

    return jax.grad(loss)((q, k, v))

  return grads


def compiled(fn, mesh, place, shape):
  q = jax.ShapeDtypeStruct(
      shape, jnp.bfloat16, sharding=NamedSharding(mesh, place)
  )
  out = jax.jit(fn).lower(q, q, q, q).compile()
  text = out.as_text()
  counts = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text))
            for kind in KINDS}  # fmt: skip
  return out, text, {kind: n for kind, n in counts.items() if n}


@pytest.mark.parametrize(
    "strategy,expected,bound",
    [
        # k, v, tk, tv; k, v and their gradients, and the gradients' way home.
        # By the size of q on a chip: four arrays that travel, four that arrive,
        # o and to summed in float32, and q, k, v, t copied for the loop.
        ("ring", {"collective-permute": 10}, 16),
        # Six there, two back; do there, three gradients back.
        ("all_to_all", {"all-to-all": 4}, 16),
    ],
)
def test_a_sequence_over_eight_chips(strategy, expected, bound):
  mesh = aot.mesh(TOPOLOGY, context=8)
  n = 16384
  fn = mean_flow(mesh=mesh, strategy=strategy, causal=True, order="zigzag")
  out, text, found = compiled(fn, mesh, P(None, "context"), (1, n, 8, 128))
  assert found == expected
  local = n // 8 * 8 * 128 * 2
  assert out.memory_analysis().temp_size_in_bytes <= bound * local
  assert not re.search(rf"\b({n},{n}|{n // 8},{n // 8}|{n},8,)\b", text)
  for kernel in ("fused", "backward_rows", "backward_columns"):
    assert f"jvp_attention_{kernel}" in text, kernel


def test_rows_and_heads_over_eight_chips():
  mesh = aot.mesh(TOPOLOGY, data=2, tensor=4)
  fn = mean_flow(mesh=mesh)
  shape = (4, 2048, 8, 128)
  _, text, found = compiled(fn, mesh, P("data", None, "tensor"), shape)
  assert not found
  assert "jvp_attention_fused" in text


def test_a_dit_under_the_rule_gathers_no_token():
  mesh = aot.mesh(TOPOLOGY, data=1, fsdp=2, tensor=1, context=4)
  made = {}

  def init(key):
    made["dit"] = models.make(
        "dit", key, width=512, heads=4, depth=2, second_time=True,
        scan_layers=True, remat="block",
    )  # fmt: skip
    return made["dit"].params

  shapes = jax.eval_shape(init, jax.random.key(0))
  places = sharding.shardings("student", shapes, "fsdp+context", mesh)
  array = lambda shape, place: jax.ShapeDtypeStruct(
      shape, jnp.bfloat16, sharding=place
  )
  params = jax.tree.map(lambda a, p: array(a.shape, p), shapes, places)
  rows = sharding.rows(mesh)
  x, t = array((2, 128, 128, 1), rows), array((2,), rows)

  def loss(params, x, v, t, r):
    u = lambda x, t, r: made["dit"].apply_fn(params, x, t, r=r)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return losses.mean_flow_loss(u, x, v, t, r, norm_p=0.0).sum()

  grads = jax.jit(jax.grad(loss), out_shardings=places)
  text = grads.lower(params, x, x, t, t).compile().as_text()
  for kernel in ("fused", "forward", "backward_rows"):
    assert f"jvp_attention_{kernel}" in text, kernel
  # 64 x 64 patches, a quarter of them on a chip.
  assert re.search(r"\[1,1024,512\]", text)
  assert not re.search(r"\b4096,512\b", text)
  gathered = re.findall(r"\[([\d,]+)\]\S* all-gather\(", text)
  assert "1,512,1536" in gathered  # a layer's matrix
  assert not [shape for shape in gathered if "1024,512" in shape]
