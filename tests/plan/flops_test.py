"""FLOPs against numbers worked out by hand; nothing is compiled or run."""

import jax
import jax.numpy as jnp
import pytest

from distilljax import kernels, models, plan, train
from tests.train import toy

F32 = jnp.float32
LAYERS, ROWS, WIDTH = 3, 4, 8
ONE = 2 * ROWS * WIDTH * WIDTH  # FLOPs of one layer's product
X = jax.ShapeDtypeStruct((ROWS, WIDTH), F32)
W = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), F32)


def count(fn, *shapes):
  return plan.count_flops(jax.make_jaxpr(fn)(*shapes))


def layer(x, w):
  return jnp.tanh(x @ w), None


def scanned(x, w, body=layer):
  return jnp.sum(jax.lax.scan(body, x, w)[0])


def test_a_scan_counts_its_body_as_often_as_it_runs():
  found = count(scanned, X, W)
  assert found.total == found.products == LAYERS * ONE
  assert not found.unknown_loops
  # The compiler's figure, which the docstring warns of: one layer.
  compiler = jax.jit(scanned).lower(X, W).compile().cost_analysis()["flops"]
  assert compiler < 2 * ONE


def test_a_gradient_is_two_more_and_remat_a_third():
  # Backward: one product for x and one for w a layer.
  both = (0, 1)
  assert count(jax.grad(scanned, both), X, W).total == 3 * LAYERS * ONE
  again = lambda x, w: scanned(x, w, jax.checkpoint(layer))
  assert count(jax.grad(again, both), X, W).total == 4 * LAYERS * ONE


def test_loops_and_branches():
  w = jax.ShapeDtypeStruct((WIDTH, WIDTH), F32)
  five = count(
    lambda x, w: jax.lax.fori_loop(0, 5, lambda _, x: x @ w, x), X, w
  )
  assert five == plan.Flops(products=5 * ONE)
  steps = count(
    lambda x, w: jax.lax.while_loop(
      lambda c: c[0] < 8, lambda c: (c[0] + 2, c[1] @ w), (1, x)
    ),
    X,
    w,
  )
  assert steps.total == 4 * ONE
  unknown = count(
    lambda x, w: jax.lax.while_loop(
      lambda x: jnp.sum(x) < 1, lambda x: x @ w, x
    ),
    X,
    w,
  )
  assert unknown.total == ONE
  assert len(unknown.unknown_loops) == 1
  branch = lambda x, w: jax.lax.cond(
    x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x @ w, x
  )
  assert count(branch, X, w).total == 2 * ONE


def test_batched_products_and_calls_inside_calls():
  a = jax.ShapeDtypeStruct((5, 4, 6), F32)
  b = jax.ShapeDtypeStruct((5, 6, 7), F32)
  inner = jax.jit(lambda a, b: jnp.einsum("bij,bjk->bik", a, b))
  assert count(jax.jit(lambda a, b: inner(a, b)), a, b).total == (
    2 * 5 * 4 * 6 * 7
  )


def test_convolution_counts_no_product_with_padding():
  x = jax.ShapeDtypeStruct((2, 5, 7, 3), F32)
  kernel = jax.ShapeDtypeStruct((3, 3, 3, 4), F32)
  conv = lambda stride: lambda x, k: jax.lax.conv_general_dilated(
    x, k, (stride, stride), ((1, 1), (1, 1)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )  # fmt: skip

  def by_hand(n, stride):
    inside = [
      0 <= o * stride + k - 1 < n
      for o in range(-(-n // stride))
      for k in range(3)
    ]
    return sum(inside)

  for stride in (1, 2):
    expected = 2 * by_hand(5, stride) * by_hand(7, stride) * 2 * 3 * 4
    assert count(conv(stride), x, kernel).convolutions == expected
    # Each gradient has as many products as the value, which the sine needs.
    loss = lambda x, k, s=stride: jnp.sum(jnp.sin(conv(s)(x, k)))
    found = count(jax.grad(loss, (0, 1)), x, kernel)
    assert found.total == 3 * expected


@pytest.mark.parametrize("causal", [False, True])
def test_attention_as_its_formulas(causal):
  b, n, h, d = 2, 16, 4, 8
  q = jax.ShapeDtypeStruct((b, n, h, d), F32)
  loss = lambda q, k, v: jnp.sum(kernels.attention(q, k, v, causal=causal))
  # A product of all rows with all columns; causal rows see i + 1 columns.
  share = sum(range(1, n + 1)) / n**2 if causal else 1
  product = 2 * b * h * n * n * d * share
  assert count(loss, q, q, q).kernels == 2 * product
  # The scores again, and for q, k, v and the probabilities one each.
  assert count(jax.grad(loss, (0, 1, 2)), q, q, q).total == 7 * product


@pytest.mark.parametrize("strategy", ["ring", "all_to_all"])
def test_attention_with_a_cut_sequence_costs_what_it_does_whole(strategy):
  mesh = jax.make_mesh(
    (2, 4), ("data", "context"), (jax.sharding.AxisType.Auto,) * 2,
    devices=jax.devices()[:8],
  )  # fmt: skip
  q = jax.ShapeDtypeStruct((2, 16, 4, 8), F32)
  cut = lambda q, k, v: jnp.sum(
    kernels.sharded_attention(
      q, k, v, mesh=mesh, strategy=strategy, causal=True
    )
  )
  whole = lambda q, k, v: jnp.sum(kernels.attention(q, k, v, causal=True))
  for fn in (lambda f: f, lambda f: jax.grad(f, (0, 1, 2))):
    found = count(fn(cut), q, q, q)
    assert found.kernels == pytest.approx(count(fn(whole), q, q, q).kernels)
    assert not found.unknown_loops


def test_output_heads():
  rows, width, vocabulary = 32, 8, 50
  hidden = jax.ShapeDtypeStruct((rows, width), F32)
  head = jax.ShapeDtypeStruct((width, vocabulary), F32)

  def loss(hidden, head, teacher, theirs):
    return jnp.sum(
      kernels.linear_divergence(
        hidden, head, (teacher, theirs), kind="forward_kl",
        chunk_size=vocabulary,
      )
    )  # fmt: skip

  shapes = (hidden, head, hidden, head)
  product = 2 * rows * width * vocabulary
  assert count(loss, *shapes).total == 2 * product
  # Both again, then the student's hidden states and head.
  assert count(jax.grad(loss, (0, 1)), *shapes).total == 6 * product


def test_a_shard_map_counts_every_device():
  mesh = train.make_mesh(jax.devices()[:4], fsdp=4)
  spec = jax.sharding.PartitionSpec("fsdp")
  whole = jax.sharding.PartitionSpec()
  fn = jax.shard_map(
    lambda x, w: x @ w, mesh=mesh, in_specs=(spec, whole), out_specs=spec
  )
  w = jax.ShapeDtypeStruct((WIDTH, WIDTH), F32)
  assert count(fn, X, w).total == ONE


def test_a_train_step_is_counted_without_what_nobody_uses():
  """Student and critic of the toy method, every product named."""
  method = toy.method()
  params = jax.eval_shape(toy.init, jax.random.key(0), {})
  mesh = train.make_mesh(jax.devices()[:2])
  rows = 8
  batch = jax.eval_shape(lambda: toy.batch(rows=rows))
  found = []
  for accumulation in (1, 2):
    step = train.make_step(
      method, toy.optimizers(), mesh, accumulation=accumulation, unroll=False
    )
    state = step.abstract(params, jax.random.key(0))
    frozen = step.abstract_place({"teacher": params["teacher"]})
    traced = step.trace(("student", "critic"), state, frozen, batch)
    found.append(plan.count_flops(traced.jaxpr))
  # Student: x times three matrices, and the gradient of one. Critic: x times a
  # difference, and its gradient.
  products = (3 + 1) + (1 + 1)
  assert found[0] == plan.Flops(products=products * 2 * rows * 3 * 3)
  # Micro-batches cut the rows. Their counts are summed in a pass before, whose
  # products are dead code.
  assert found[1] == found[0]


@pytest.mark.slow
def test_scanned_layers_cost_what_unrolled_ones_do():
  hyper = {"width": 16, "depth": 3, "heads": 2}
  x = jax.ShapeDtypeStruct((2, 8, 8, 1), F32)
  t = jax.ShapeDtypeStruct((2,), F32)
  totals = set()
  for scan in (False, True):
    boxes = []

    def init(key, scan=scan, boxes=boxes):
      boxes.append(models.make("dit", key, scan_layers=scan, **hyper))
      return boxes[0].params

    params = jax.eval_shape(init, jax.random.key(0))
    apply_fn = boxes[0].apply_fn
    loss = lambda p, x, t, f=apply_fn: jnp.sum(f(p, x, t))
    totals.add(count(jax.grad(loss), params, x, t).total)
  assert len(totals) == 1
