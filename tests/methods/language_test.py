"""What language methods share: the loss from hidden states and from logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distilljax import kernels, methods, models, oracles, train
from tests import helpers
from tests.methods import common, markov

# Slug, hyper-parameters, and the one logged KL: with temperature and mixture.
CASES = {
  "supervised_kd": ("supervised_kd", {"temperature": 2.0}, "forward_kl"),
  "gkd": ("gkd", {"beta": 0.3, "temperature": 1.5}, "reverse_kl"),
  "opd": ("gopd", {"reward_scale": 1.0}, "reverse_kl"),
  "gopd": ("gopd", {"reward_scale": 1.5}, "reverse_kl"),
}
V = markov.V


def table(params, tokens, *, where=None, features=False):
  """Vectors by token under an output head: a language model in three lines."""
  del where
  hidden = jnp.take(params["table"], tokens, axis=0)
  logits = hidden @ (params["head"] if "head" in params else params["tied"].T)
  # What a head adds is not in the matrix product.
  logits = 2.0 * (logits + params["bias"].reshape(1, 1, -1))
  return (logits, hidden) if features else logits


def table_head(params):
  tied = "tied" in params
  return kernels.Head(
    params["tied" if tied else "head"], params["bias"], scale=2.0, tied=tied
  )


table.linear_head = table_head


def table_params(seed, width, tied, v=V):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  head = {"tied": draw(v, width)} if tied else {"head": draw(width, v)}
  return {"table": draw(V, width), "bias": draw(v), **head}


PARAMS = {
  "student": table_params(1, 3, tied=True),
  "teacher": table_params(2, 4, tied=False),
  "reference": table_params(3, 2, tied=False),
}


def nets(apply_fn):
  return dict.fromkeys(PARAMS, apply_fn)


def evaluated(method, params, rows):
  """((objective, metrics), gradients of all networks)."""

  def objective(params):
    total, (_, metrics) = common.eager_total(
      method, "student", params, rows, common.context()
    )
    return total, metrics

  return jax.jit(jax.value_and_grad(objective, has_aux=True))(params)


def rows_of(slug):
  rows = markov.batch()
  return {**rows, "own": jnp.arange(6) < 2} if slug == "gkd" else rows


def programs_of(slug, apply_fn=table, **hyper):
  return [
    methods.get(slug).make(
      nets(apply_fn), loss_implementation=implementation, **hyper
    )
    for implementation in ("fused", "plain", None)
  ]


@pytest.mark.parametrize(
  "case",
  [
    pytest.param(c, marks=pytest.mark.slow) if c == "opd" else c for c in CASES
  ],
)
def test_fused_and_plain_are_one_loss(case):
  slug, hyper, logged = CASES[case]
  rows = rows_of(slug)
  fused, plain, _ = programs_of(slug, **hyper)
  (got, metrics), slopes = evaluated(fused, PARAMS, rows)
  (want, wanted), expected = evaluated(plain, PARAMS, rows)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert set(metrics) == set(wanted) >= {"entropy", "length", logged}
  for name in metrics:
    for a, b in zip(metrics[name], wanted[name]):
      np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=name)
  for a, b in zip(*map(jax.tree.leaves, (slopes, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  assert np.any(slopes["student"]["tied"])
  assert not any(map(np.any, jax.tree.leaves(slopes["teacher"])))


def test_who_is_fused():
  """By default whatever says that it has a head."""
  rows = rows_of("gkd")

  def is_fused(method):
    run = lambda params: evaluated(method, params, rows)
    return "linear_head_backward" in str(jax.make_jaxpr(run)(PARAMS))

  for method, fused in zip(
    programs_of("gkd"), (True, False, True), strict=True
  ):
    assert is_fused(method) == fused
  # A function that only looks like one has not said that it has a head.
  bare = lambda params, tokens, *, where=None: table(params, tokens)
  assert not is_fused(methods.get("gkd").make(nets(bare)))
  mixed = {**nets(table), "teacher": bare}
  assert not is_fused(methods.get("gkd").make(mixed))
  with helpers.one_line_error("'plain' or None .teacher has no linear_head"):
    methods.get("gkd").make(mixed, loss_implementation="fused")


def test_hidden_states_meet_a_head_in_its_dtype(monkeypatch):
  """bfloat16 parameters: products in bfloat16, whatever features are in."""
  seen = []

  def spy(hidden, head, teacher, **options):
    seen.extend([hidden.dtype, teacher[0].dtype, hidden.shape])
    return kernels_function(hidden, head, teacher, **options)

  def wide(params, tokens, **options):
    logits, hidden = table(params, tokens, **options)
    return logits, hidden.astype(jnp.float32)

  wide.linear_head = table_head
  kernels_function = kernels.linear_token_statistics
  monkeypatch.setattr(kernels, "linear_token_statistics", spy)
  low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), PARAMS)
  method = methods.get("gkd").make(nets(wide))
  jax.eval_shape(
    lambda p: common.eager_total(
      method, "student", p, rows_of("gkd"), common.context()
    )[0],
    low,
  )
  assert seen == [jnp.bfloat16, jnp.bfloat16, (6 * 4, 3)]


def test_what_needs_logits_says_so():
  gopd, supervised = (methods.get(s).make for s in ("gopd", "supervised_kd"))
  options = {"loss_implementation": "fused"}
  with helpers.one_line_error("None .loss_top_k.* got 'fused'"):
    gopd(nets(table), loss_top_k=2, **options)
  with helpers.one_line_error("None .form='sampled'.* got 'fused'"):
    gopd(nets(table), form="sampled", **options)
  with helpers.one_line_error("objective='cross_entropy'.* got 'fused'"):
    supervised(nets(table), objective="cross_entropy", **options)
  with helpers.one_line_error("did you mean 'fused'"):
    supervised(nets(table), loss_implementation="fussed")
  with helpers.one_line_error("student has no linear_head"):
    gopd(nets(oracles.markov_apply), **options)
  # None takes what there is.
  gopd(nets(table), loss_top_k=2)
  gopd(nets(table), form="sampled")
  supervised(nets(table), objective="cross_entropy")


def test_a_step_with_its_heads_cut_is_the_whole_step():
  """By rules alone; no device ever holds a whole head or its gradient."""
  # More than a chunk a device: an uncut loop would gather the heads.
  v, widths = 2304, {"student": 16, "teacher": 24, "reference": 20}
  params = {
    k: table_params(i, width, k == "student", v)
    for i, (k, width) in enumerate(widths.items())
  }
  frozen = {k: params[k] for k in ("teacher", "reference")}
  method = methods.get("gopd").make(nets(table))
  rows = markov.batch(8)
  optimizer = optax.sgd(0.1)  # Adam would make much of a small gradient

  def run(mesh, rules):
    step = train.make_step(
      method, {"student": optimizer}, mesh, rules,
      axes=[("tied", ("vocab", None)), ("head", (None, "vocab"))],
    )
    state = step.init({"student": params["student"]}, jax.random.key(3))
    batch = train.put_rows(jax.tree.map(np.asarray, rows), mesh)
    placed = step.place(frozen)
    program = step.lower(("student",), state, placed, batch).compile()
    for _ in range(2):
      state, metrics = program(state, placed, batch)
    return state.params["student"], metrics, program.as_text()

  whole, expected, held = run(train.make_mesh(jax.devices()[:1]), "dp")
  mesh = train.make_mesh(jax.devices()[:4], fsdp=1, tensor=2)
  cut, metrics, text = run(mesh, "fsdp+tensor")
  assert cut["tied"].sharding.spec[0] == "tensor"
  for a, b in zip(*map(jax.tree.leaves, ((cut, metrics), (whole, expected)))):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6)
  for width in widths.values():
    assert f"[{v},{width}]" not in text and f"[{width},{v}]" not in text
  assert f"[24,{v}]" in held and f"[24,{v // 2}]" in text


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_fused_and_plain_are_one_training_curve(case):
  """20 steps of transformers of different widths on two devices."""
  slug, hyper, _ = CASES[case]
  rng = np.random.default_rng(0)
  make = lambda i, width, tied: models.make(
    "transformer", jax.random.key(i), vocab_size=13, width=width, depth=1,
    heads=2, tied=tied,
  )
  networks = {
    "student": make(1, 8, True),
    "teacher": make(2, 16, False),
    "reference": make(3, 8, True),
  }
  apply_fns = {k: n.apply_fn for k, n in networks.items()}
  mask = np.arange(5)[None, :] >= np.arange(8)[:, None] % 3
  rows = {
    "prompts": rng.integers(13, size=(8, 5)),
    "prompt_where": mask,
    "tokens": rng.integers(13, size=(8, 6)),
    "where": np.arange(6)[None, :] < 1 + np.arange(8)[:, None] % 6,
  }
  if slug == "gkd":
    rows["own"] = np.ones(8, bool)

  def curve(implementation):
    method = methods.get(slug).make(
      apply_fns, loss_implementation=implementation, **hyper
    )
    mesh = train.make_mesh(jax.devices()[:2])
    optimizer = train.make_optimizer(learning_rate=0.02, steps=20)
    step = train.make_step(method, {"student": optimizer}, mesh)
    state = step.init(
      {"student": networks["student"].params}, jax.random.key(3)
    )
    frozen = {k: networks[k].params for k in method.named(train.Frozen)}
    batch = train.put_rows(rows, mesh)
    history = []
    for _ in range(20):
      state, metrics = step(("student",), state, frozen, batch)
      history.append({k: v.sum / v.count for k, v in metrics.items()})
    return jax.tree.map(lambda *x: np.stack(x), *jax.device_get(history))

  got, want = curve(None), curve("plain")
  assert set(got) == set(want)
  for name in got:
    # Adam divides a gradient by its size: rounding grows with the steps.
    np.testing.assert_allclose(
      got[name], want[name], rtol=2e-4, atol=1e-6, err_msg=name
    )
  loss = want["student/loss"]
  assert loss[-1] < loss[0] - 0.05
