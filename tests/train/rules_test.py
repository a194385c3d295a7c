"""Sharding rules: where arrays lie, and that they change no number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from distilljax import losses, models, train
from distilljax.models import axes
from distilljax.train import sharding
from tests import helpers
from tests.train import toy

VOCAB, LENGTH = 16, 8
CUT = "fsdp+tensor"
CONTEXT = "fsdp+context"


@pytest.fixture(autouse=True)
def no_small(monkeypatch):
  """The networks here are tiny; cut them all the same."""
  monkeypatch.setattr(sharding, "SMALL", 1)


def mesh(devices, fsdp=1, tensor=1, context=1):
  return train.make_mesh(
    jax.devices()[:devices], fsdp=fsdp, tensor=tensor, context=context
  )


@functools.cache
def network(kind, seed=0):
  """A language model: of the zoo, or a block that compiles in a second."""
  key = jax.random.key(seed)
  if kind == "transformer":
    return models.make(
      kind, key, vocab_size=VOCAB, width=8, depth=1, heads=2, tied=False
    )
  if kind == "dit":  # 8 tokens
    dit = models.make(kind, key, width=8, depth=1, heads=2, second_time=True)
    # From zero nothing would be seen of the blocks.
    return dit._replace(params=jax.tree.map(lambda x: x + 0.1, dit.params))
  shapes = {"table": (VOCAB, 8), "up": (8, 24), "down": (24, 8)}
  draw = lambda name, shape: jax.random.normal(
    train.named_key(key, name), shape
  ) / np.sqrt(shape[0])
  params = {k: draw(k, v) for k, v in shapes.items()}

  def apply_fn(params, tokens):
    hidden = params["table"][tokens]
    hidden = hidden + jnp.tanh(hidden @ params["up"]) @ params["down"]
    hidden = hidden * (1 + params["scale"])
    return hidden @ params["table"].T

  return models.from_callable(apply_fn, {**params, "scale": jnp.zeros(8)})


AXES = (
  ("table", ("vocab", "embed")),
  ("up", ("embed", "mlp")),
  ("down", ("mlp", "embed")),
)


def method(kind):
  apply = network(kind).apply_fn

  def mean_flow(params, batch, context):
    del context
    x, v = batch["x"], batch["v"]
    t, h = jnp.full(len(x), 0.7), jnp.full(len(x), 0.2)
    u = lambda x, t, r: apply(params["student"], x, t, r=r)
    teacher = apply(params["teacher"], x, t, r=h)
    loss = losses.mean_flow_loss(u, x, v + teacher, t, h, norm_p=0.0)
    return {"flow": train.mean(loss)}, {}

  def student(params, batch, context):
    del context
    tokens = batch["tokens"]
    logits = apply(params["student"], tokens)
    teacher = jax.nn.log_softmax(apply(params["teacher"], tokens))
    kl = jnp.exp(teacher) * (teacher - jax.nn.log_softmax(logits))
    noise = train.draw(jax.random.normal, batch["key"], "noise", (LENGTH,))
    kl = jnp.sum(kl, -1) * (1 + 0.1 * noise)
    return {"kl": train.mean(kl, batch["where"])}, {}

  whole = toy.method()
  return whole._replace(
    networks={k: r for k, r in whole.networks.items() if k != "critic"},
    losses={"student": mean_flow if kind == "dit" else student},
    schedule=train.Schedule(cycle=(("student",),)),
  )


def batch(seed, rows=32, kind="block"):
  rng = np.random.default_rng(seed)
  if kind == "dit":
    draw = lambda: rng.normal(size=(rows, 8, 4, 1)).astype(np.float32)
    return {"x": draw(), "v": draw()}
  return {
    "tokens": rng.integers(VOCAB, size=(rows, LENGTH), dtype=np.int32),
    "where": rng.random((rows, LENGTH)) < 0.7,
  }


def params(kind):
  return {
    "student": network(kind, 0).params,
    "teacher": network(kind, 1).params,
  }


def made(mesh, rules="dp", accumulation=1, kind="block", **options):
  # Adam would make steps of the rounding of the gradient in keys' biases, which
  # is zero.
  optimizer = optax.sgd if kind == "dit" else optax.adam
  return train.make_step(
    method(kind),
    {"student": optimizer(1e-2)},
    mesh,
    rules,
    axes=AXES if kind == "block" else (),
    accumulation=accumulation,
    **options,
  )


def run(step, steps=3, kind="block"):
  start = params(kind)
  state = step.init(start, jax.random.key(2))
  frozen = step.place({"teacher": start["teacher"]})
  losses = []
  for i in range(steps):
    rows = train.put_rows(batch(i, kind=kind), step.mesh)
    state, metrics = step(("student",), state, frozen, rows)
    losses.append(metrics["student/loss"].compute())
  return state, frozen, losses


@functools.cache
def reference(kind="block"):
  state, _, losses = run(made(mesh(1), kind=kind), kind=kind)
  return jax.device_get(state.params), losses


def assert_same(found, kind="block"):
  state, _, losses = found
  expected, curve = reference(kind)
  np.testing.assert_allclose(losses, curve, rtol=1e-5)
  assert losses[2] != losses[0]
  # Adam divides by the root of the second moment: rounding of a gradient near
  # zero shows in the parameters times the learning rate over it.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    jax.device_get(state.params),
    expected,
  )


SHAPES = {
  "dp": ((1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1)),
  "fsdp": ((1, 1, 1), (2, 2, 1), (4, 4, 1), (8, 4, 1)),
  CUT: ((1, 1, 1), (2, 1, 2), (4, 2, 2), (8, 2, 2)),
  CONTEXT: ((1, 1, 1, 1), (2, 1, 1, 2), (4, 1, 1, 4), (8, 2, 1, 2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
  "rules,shape",
  [(rules, shape) for rules, shapes in SHAPES.items() for shape in shapes],
)
@pytest.mark.parametrize("kind", ["block", "transformer", "dit"])
def test_rules_change_no_number(kind, rules, shape, accumulation):
  step = made(mesh(*shape), rules, accumulation, kind)
  assert_same(run(step, kind=kind), kind)


def test_cut_states_change_no_number_keep_their_places_and_are_donated(caplog):
  step = made(mesh(8, 2, 2), CUT, accumulation=4)
  with jax.log_compiles():
    state, frozen, losses = run(step)
  compiled = [r for r in caplog.messages if "Compiling jit(traced)" in r]
  assert len(compiled) == 1  # a state is taken as it is given
  assert_same((state, frozen, losses))
  places = jax.tree.map(lambda x: x.sharding, state)
  assert places == step.places(state)
  assert places == jax.tree.map(
    lambda x: x.sharding, step.abstract(params("block"), jax.random.key(2))
  )
  assert state.params["student"]["up"].sharding.spec == P("fsdp", "tensor")
  assert state.params["student"]["scale"].sharding.spec == P()
  moments = [
    x
    for keys, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
    if "up" in str(keys)
  ]
  assert len(moments) == 2  # Adam's
  for moment in moments:
    assert moment.sharding.spec == P("fsdp", "tensor")
  assert state.step.sharding.spec == P()
  rows = train.put_rows(batch(0), step.mesh)
  after, _ = step(("student",), state, frozen, rows)
  assert state.params["student"]["up"].is_deleted()
  assert not after.params["student"]["up"].is_deleted()
  assert not frozen["teacher"]["up"].is_deleted()


@pytest.mark.slow
def test_each_network_has_a_rule_and_a_frozen_one_a_dtype():
  rules = {"student": "dp", "ema": "fsdp", "teacher": CUT}
  step = made(mesh(4, 2, 2), rules, frozen_dtype=jnp.bfloat16)
  state, frozen, losses = run(step)
  teacher = frozen["teacher"]["up"]
  assert teacher.dtype == jnp.bfloat16
  assert teacher.sharding.spec == P("fsdp", "tensor")
  assert teacher.addressable_shards[0].data.shape == (4, 12)
  assert state.params["student"]["up"].sharding.spec == P()
  assert state.params["ema"]["up"].sharding.spec == P("fsdp")
  assert state.params["student"]["up"].dtype == jnp.float32
  # A teacher rounded to bf16 (relative 2^-9) moves a KL by some parts in 100.
  _, curve = reference()
  np.testing.assert_allclose(losses, curve, rtol=5e-2)
  assert losses != curve


def test_a_checkpoint_is_restored_into_another_mesh_and_rule(tmp_path):
  step = made(mesh(4, 2, 2), CUT)
  state = step.init(params("block"), jax.random.key(2))
  train.Checkpoints(tmp_path).save(state, {"a": 1})
  other = made(mesh(8, 8), "fsdp")
  abstract = other.abstract(params("block"), jax.random.key(5))
  restored, host = train.Checkpoints(tmp_path).restore(abstract)
  assert host == {"a": 1}
  assert jax.tree.map(lambda x: x.sharding, restored) == other.places(state)
  assert restored.params["student"]["up"].sharding.spec == P("fsdp")
  plain = lambda s: jax.device_get(s._replace(key=jax.random.key_data(s.key)))
  jax.tree.map(np.testing.assert_array_equal, plain(restored), plain(state))


@pytest.mark.parametrize(
  "kind", ["transformer", pytest.param("dit", marks=pytest.mark.slow)]
)
def test_tokens_over_a_context_axis_give_the_same_logits(kind):
  found = network(kind)
  rows = batch(0, rows=4, kind=kind)
  given = (rows["x"], rows["x"][:, 0, 0, 0]) if kind == "dit" else (
    rows["tokens"],
  )  # fmt: skip
  # Padding, but for the first token of a row: it would see nothing.
  options = {} if kind == "dit" else {
    "where": rows["where"] | (np.arange(LENGTH) == 0)
  }  # fmt: skip
  four = mesh(4, context=2)

  def cut(params, *given):
    with jax.sharding.use_abstract_mesh(four.abstract_mesh):
      return found.apply_fn(params, *given, **options)

  whole = jax.jit(lambda *a: found.apply_fn(*a, **options))
  theirs = whole(found.params, *given)
  placed = jax.device_put((found.params, *given), sharding.replicated(four))
  lowered = jax.jit(cut).lower(*placed)
  assert "collective_permute" in lowered.as_text()
  ours = lowered.compile()(*placed)
  np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_an_ema_follows_its_source():
  step = made(mesh(4, 2, 2), {"student": "fsdp"})
  assert step.rules == {"student": "fsdp", "ema": "fsdp", "teacher": "dp"}


def test_a_cut_state_is_smaller():
  sizes = []
  for step in (made(mesh(4), "dp"), made(mesh(4, 4), "fsdp")):
    state = step.abstract(params("block"), jax.random.key(2))
    leaves = jax.tree.leaves((state.params, state.opt_state))
    sizes.append(
      sum(np.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
    )
  matrices = VOCAB * 8 + 2 * 8 * 24
  # Student, EMA and two moments; three quarters of each matrix are elsewhere.
  assert sizes[0] - sizes[1] == 4 * matrices * 3 // 4


@pytest.mark.slow
@pytest.mark.parametrize(
  "rule,shape,local",
  # [rows, l, mlp] on each of 4 devices: a quarter of the rows, or half of them
  # and half of their tokens.
  [("fsdp", (4, 4), "f32[8,8,24]"), (CONTEXT, (4, 2, 1, 2), "f32[16,4,24]")],
)
def test_matrices_are_gathered_and_rows_stay(rule, shape, local):
  """The compiled step of a transformer computes no row and no token twice."""
  step = made(mesh(*shape), rule, kind="transformer")
  start = params("transformer")
  state = step.abstract(start, jax.random.key(2))
  frozen = {"teacher": state.params["ema"]}
  rows = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding.rows(step.mesh)
    ),
    batch(0),
  )
  text = step.lower(("student",), state, frozen, rows).compile().as_text()
  assert "f32[8,24]{1,0} all-gather(" in text
  assert local in text
  for whole in ("[32,8,24]", "[16,8,24]", "[32,4,24]"):
    assert f"f32{whole}" not in text


# --- names and rules ----------------------------------------------------------


def specs(params, rule, mesh, table=()):
  found = sharding.shardings("net", params, rule, mesh, table)
  leaves = jax.tree_util.tree_leaves_with_path(found)
  return {
    jax.tree_util.keystr(k, simple=True, separator="/"): v.spec
    for k, v in leaves
  }


def test_transformer_is_cut_as_named():
  found = specs(network("transformer").params, CUT, mesh(8, 2, 2))
  block = "layers/0/"
  assert found == {
    "embed_tokens/weight": P("tensor", "fsdp"),
    "lm_head/kernel": P("fsdp", "tensor"),
    "norm/weight": P(),
    block + "input_layernorm/weight": P(),
    block + "post_attention_layernorm/weight": P(),
    block + "self_attn/q_proj/kernel": P("fsdp", "tensor"),
    block + "self_attn/k_proj/kernel": P("fsdp", "tensor"),
    block + "self_attn/v_proj/kernel": P("fsdp", "tensor"),
    block + "self_attn/o_proj/kernel": P("tensor", "fsdp"),
    block + "self_attn/q_norm/weight": P(),
    block + "self_attn/k_norm/weight": P(),
    block + "mlp/gate_proj/kernel": P("fsdp", "tensor"),
    block + "mlp/up_proj/kernel": P("fsdp", "tensor"),
    block + "mlp/down_proj/kernel": P("tensor", "fsdp"),
  }


ZOO = {
  "transformer": {"vocab_size": 16, "width": 16},
  "dit": {"width": 16, "heads": 2, "num_classes": 3, "second_time": True},
  "unet": {"channels": 8, "condition": 8, "num_classes": 3},
  "mlp": {"width": 16, "num_classes": 3, "second_time": True},
  "head": {"features": 8, "width": 16},
}


@pytest.mark.parametrize("kind", ZOO)
def test_every_matrix_of_the_zoo_has_names(kind):
  shapes = jax.eval_shape(
    lambda key: models.make(kind, key, **ZOO[kind]).params, jax.random.key(0)
  )
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  unnamed = []
  for keys, x in leaves:
    path = jax.tree_util.keystr(keys, simple=True, separator="/")
    names = axes.axis_names(path, x.ndim)
    if names is None and x.ndim > 1:
      unnamed.append(path)
  # A head's last matrix is one column.
  assert unnamed == (["out/kernel"] if kind == "head" else [])
  # And each can be cut in two by either rule, in one tree with a head too.
  for rule in ("fsdp", CUT):
    found = specs({"backbone": shapes}, rule, mesh(4, 2, 2))
    for keys, x in leaves:
      path = jax.tree_util.keystr(keys, simple=True, separator="/")
      spec = found[f"backbone/{path}"]
      assert ("fsdp" in spec) == (x.ndim > 1), path
      assert rule == CUT or "tensor" not in spec


def test_names_belong_to_the_last_axes():
  path = "layers/self_attn/o_proj/kernel"
  assert axes.axis_names(path, 3) == (None, "heads", "embed")
  assert axes.axis_names("other/kernel", 2) is None
  assert axes.axis_names("other/kernel", 2, [("kernel", (None, "mlp"))]) == (
    None,
    "mlp",
  )
  # The end of a path, not of a word; one's own table goes first.
  assert axes.axis_names("my_qkv/kernel", 2) is None
  own = [("qkv/kernel", ("mlp", None))]
  assert axes.axis_names("a/qkv/kernel", 2, own) == ("mlp", None)
  with helpers.one_line_error("at least the 2 axes.*got 1"):
    axes.axis_names("qkv/kernel", 1)


def test_what_no_table_names():
  four = mesh(8, 4, 2)
  leaf = lambda *shape: {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
  # The longest axis that divides, and the tensor axis leaves it alone.
  assert specs(leaf(4, 6, 8), CUT, four) == {"w": P(None, None, "fsdp")}
  assert specs(leaf(4, 6), "fsdp", four) == {"w": P("fsdp")}
  assert specs(leaf(8), "fsdp", four) == {"w": P()}
  assert specs(leaf(4, 6, 8), "dp", four) == {"w": P()}
  own = [("w", (None, "mlp"))]
  assert specs(leaf(4, 8), CUT, four, own) == {"w": P(None, "tensor")}
  with helpers.one_line_error(
    r"net/w \[6, 5\].*divisible by the 4 devices of mesh axis 'fsdp', got"
    r" axis 0=6; nearest: 8"
  ):
    specs(leaf(6, 5), "fsdp", four)
  with helpers.one_line_error("'tensor', got mlp=5; nearest: 4"):
    specs(leaf(6, 5), CUT, four, own)


def test_context_cuts_with_fsdp_together():
  leaf = lambda *shape: {"qkv/kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
  both = mesh(8, 2, 2, 2)
  found = lambda *shape: specs(leaf(*shape), CONTEXT, both)["qkv/kernel"]
  assert found(8, 6) == P(("fsdp", "context"))
  assert found(6, 8) == P(None, ("fsdp", "context"))
  # What has no name too; an axis of one device cuts nothing.
  unnamed = {"w": jax.ShapeDtypeStruct((4, 8), jnp.float32)}
  assert specs(unnamed, CONTEXT, both) == {"w": P(None, ("fsdp", "context"))}
  assert specs(unnamed, CONTEXT, mesh(2, 2)) == {"w": P(None, "fsdp")}
  assert specs(unnamed, CONTEXT, mesh(2, 1, 1, 2)) == {"w": P(None, "context")}
  with helpers.one_line_error(
    "the 4 devices of mesh axis 'fsdp' x 'context', got embed=6; nearest: 8"
  ):
    found(6, 6)
  no_context = jax.make_mesh(
    (2, 1), ("data", "fsdp"), (jax.sharding.AxisType.Auto,) * 2,
    devices=jax.devices()[:2],
  )  # fmt: skip
  with helpers.one_line_error(r"needs the mesh axis 'context'.*\(context=..."):
    made(no_context, CONTEXT)


def test_tokens_that_do_not_divide_are_one_line():
  found = network("transformer")
  tokens = batch(0, rows=4)["tokens"][:, :6]
  with jax.sharding.use_abstract_mesh(mesh(4, context=4).abstract_mesh):
    with helpers.one_line_error(
      "tokens must be of a length divisible by 2 x the 4 devices of mesh axis"
      " 'context', got 6; nearest: 8"
    ):
      found.apply_fn(found.params, tokens)
    # Decoding reads a cache, whose slots are whole everywhere.
    shapes = jax.eval_shape(
      lambda p: found.apply_fn(p, tokens, cache=8), found.params
    )
    assert shapes[0].shape == (4, 6, VOCAB)


def test_small_arrays_are_not_cut(monkeypatch):
  monkeypatch.setattr(sharding, "SMALL", 32)
  tree = {
    "a": jax.ShapeDtypeStruct((4, 8), jnp.float32),
    "b": jax.ShapeDtypeStruct((31, 1), jnp.float32),
  }
  found = specs(tree, "fsdp", mesh(4, 4))
  assert found == {"a": P(None, "fsdp"), "b": P()}


def test_like_params_needs_path_and_shape():
  tree = {"w": jnp.zeros((4, 8)), "v": jnp.zeros((4, 8))}
  two = mesh(2, 2)
  places = {
    "w": sharding.rows(two),
    "v": sharding.replicated(two),
  }
  state = optax.adafactor(1e-2, min_dim_size_to_factor=2).init(tree)
  found = sharding.like_params(state, tree, places)
  for keys, place in jax.tree_util.tree_leaves_with_path(found):
    assert place.spec == P(), keys  # factored moments have other shapes
  state = optax.adam(1e-2).init(tree)
  found = sharding.like_params(state, tree, places)
  assert found[0].mu == places
  assert found[0].count.spec == P()


def test_make_mesh():
  devices = jax.devices()
  assert dict(train.make_mesh().shape) == {
    "data": 8, "fsdp": 1, "tensor": 1, "context": 1,
  }  # fmt: skip
  shape = lambda **k: tuple(train.make_mesh(devices, **k).shape.values())
  assert shape(fsdp=4) == (2, 4, 1, 1)
  assert shape(fsdp=None, tensor=2) == (1, 4, 2, 1)
  assert shape(data=2, fsdp=None) == (2, 4, 1, 1)
  assert shape(data=2, fsdp=2, tensor=2) == (2, 2, 2, 1)
  assert shape(fsdp=None, context=4) == (1, 2, 1, 4)
  assert sharding.row_parts(train.make_mesh(fsdp=2, tensor=2)) == 4
  assert sharding.row_parts(train.make_mesh(fsdp=2, context=4)) == 2
  with helpers.one_line_error(
    "fsdp=3 x tensor=1 x context=1 = 3 must divide the 8 devices; nearest:"
    " fsdp=2"
  ):
    train.make_mesh(fsdp=3)
  with helpers.one_line_error("nearest: tensor=2"):
    train.make_mesh(fsdp=4, tensor=3)
  with helpers.one_line_error("nearest: context=2"):
    train.make_mesh(fsdp=2, context=3)
  with helpers.one_line_error("= 4 must be the number of devices, 8"):
    train.make_mesh(data=2, fsdp=2)
  with helpers.one_line_error("fsdp must be >= 1, got 0"):
    train.make_mesh(fsdp=0)


def test_bad_rules_are_one_line():
  only_data = jax.make_mesh(
    (2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
  )
  with helpers.one_line_error("'fsdp' needs the mesh axis 'fsdp', got.*'data'"):
    made(only_data, "fsdp")
  made(only_data, "dp")
  with helpers.one_line_error("did you mean 'teacher'"):
    made(mesh(2), {"teachr": "fsdp"})
  with helpers.one_line_error("rules must be one of.*did you mean 'fsdp'"):
    made(mesh(2), {"teacher": "fspd"})
  no_data = jax.make_mesh(
    (2,), ("fsdp",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
  )
  with helpers.one_line_error("rows need the mesh axis 'data'"):
    made(no_data, "fsdp")
  step = made(mesh(4, 2), "fsdp", 4)
  state = step.init(params("block"), jax.random.key(0))
  rows = train.put_rows(batch(0, rows=24), step.mesh)
  with helpers.one_line_error(
    "devices 4 x accumulation 4 = 16, got 24; nearest: 32"
  ):
    step(("student",), state, {}, rows)
  with helpers.one_line_error(r"rules: \w+/\w+ .*got embed=8; nearest: 9"):
    made(mesh(6, 3, 2), CUT).init(params("block"), jax.random.key(0))
