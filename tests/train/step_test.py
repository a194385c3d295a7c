"""The train step against the same step written by hand, on 1 to 8 devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distilljax import train
from tests import helpers
from tests.train import toy

SEED = 3


def mesh(devices=1):
  return train.make_mesh(jax.devices()[:devices])


@functools.cache
def made(devices=1, accumulation=1, unroll=True, dtype=None):
  return train.make_step(
    toy.method(),
    toy.optimizers(),
    mesh(devices),
    accumulation=accumulation,
    unroll=unroll,
    compute_dtype=dtype,
  )


def run(step, steps=3, rows=16, batch=toy.batch):
  params = toy.init(jax.random.key(SEED), {})
  state = step.init(params, jax.random.key(SEED + 1))
  frozen = {"teacher": params["teacher"]}
  out = []
  for i in range(steps):
    updates = step.method.schedule.updates(i)
    state, metrics = step(
      updates, state, frozen, train.put_rows(batch(i, rows), step.mesh)
    )
    out.append(jax.device_get(metrics))
  return state, out


def by_hand(steps=3, rows=16):
  """The toy method's steps, written out: no library step, no Mean."""
  params = toy.init(jax.random.key(SEED), {})
  ema = params["student"]
  optimizers = toy.optimizers()
  states = {n: optimizers[n].init(params[n]) for n in optimizers}
  root = jax.random.key(SEED + 1)
  for i in range(steps):
    key = jax.random.fold_in(root, i)
    batch = {k: jnp.asarray(v) for k, v in toy.batch(i, rows).items()}
    batch["key"] = train.row_keys(key, rows)
    context = train.Context(jnp.int32(i), key, ("student", "critic"))

    def total(tree, name, loss, params=params, batch=batch, context=context):
      terms, _ = loss({**params, name: tree}, batch, context)
      return sum(t.sum / t.count for t in terms.values())

    new = dict(params)
    names = ["student", "critic"] if i % 2 == 0 else ["critic"]
    for name in names:
      loss = {"student": toy.loss_student, "critic": toy.loss_critic}[name]
      grads = jax.grad(total)(params[name], name, loss)
      change, states[name] = optimizers[name].update(
        grads, states[name], params[name]
      )
      new[name] = optax.apply_updates(params[name], change)
    if "student" in names:
      ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, ema, new["student"])
    params = new
  return {**params, "ema": ema}


def assert_close(ours, theirs, atol=1e-6):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol),
    jax.device_get(dict(ours)),
    jax.device_get({k: theirs[k] for k in ours}),
  )


def test_step_is_the_step_by_hand():
  state, _ = run(made())
  assert_close(state.params, by_hand())
  assert int(state.step) == 3


@pytest.mark.parametrize(
  "devices,accumulation,unroll",
  [(4, 1, True), (8, 2, True), (1, 4, True), (1, 4, False)],
)
def test_devices_and_accumulation_change_nothing(devices, accumulation, unroll):
  state, metrics = run(made())
  other, theirs = run(made(devices, accumulation, unroll))
  assert_close(other.params, state.params)
  for ours, them in zip(metrics, theirs):
    assert ours.keys() == them.keys()
    for name in ours:
      np.testing.assert_allclose(
        ours[name].sum / ours[name].count,
        them[name].sum / them[name].count,
        rtol=2e-5,
        atol=1e-6,
      )


def test_ragged_masks_are_means_over_the_global_count():
  """A micro-batch masked away: a mean of means would give NaN or half."""

  def batch(seed, rows):
    out = toy.batch(seed, rows)
    out["where"] = np.arange(rows) % 4 == 1  # strided parts: 3 of 4 are empty
    return out

  state, _ = run(made(), batch=batch)
  other, _ = run(made(1, 4, True), batch=batch)
  assert_close(other.params, state.params)


def test_step_metrics_are_sums_and_counts():
  _, (first, second, _) = run(made())
  where = toy.batch(0)["where"]
  assert first["student/fit"].count == where.sum()
  assert first["student/pull"].count == 16
  assert not any(k.startswith("student/") for k in second)
  assert second["critic/grad_norm"].sum > 0


def test_frozen_and_aliased_parameters_survive_donation():
  step = made()
  params = toy.init(jax.random.key(SEED), {})
  params["student"]["w"] = params["teacher"]["w"]  # an alias
  state = step.init(params, jax.random.key(0))
  frozen = {"teacher": params["teacher"]}
  for i in range(2):
    state, _ = step(
      step.method.schedule.updates(i),
      state,
      frozen,
      train.put_rows(toy.batch(i), step.mesh),
    )
  assert np.isfinite(jax.device_get(params["teacher"]["w"])).all()
  assert np.isfinite(jax.device_get(params["student"]["w"])).all()


def test_non_finite_gradient_leaves_network_optimizer_and_ema():
  step = made()
  params = toy.init(jax.random.key(SEED), {})
  frozen = {"teacher": params["teacher"]}
  state = step.init(params, jax.random.key(0))
  bad = toy.batch(0)
  bad["x"][0] = np.nan
  before = jax.device_get(state._replace(key=None))
  state, metrics = step(
    ("student", "critic"), state, frozen, train.put_rows(bad, step.mesh)
  )
  after = jax.device_get(state._replace(key=None))
  jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
  jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)
  assert after.step == before.step + 1
  np.testing.assert_array_equal(after.skipped["student"], [1, 1])
  metrics = jax.device_get(metrics)
  assert metrics["critic/skipped"].sum == 1
  assert metrics["critic/fit"].count == 0  # not in the averages, and not NaN
  assert metrics["critic/fit"].sum == 0
  state, metrics = step(
    ("student", "critic"),
    state,
    frozen,
    train.put_rows(toy.batch(1), step.mesh),
  )
  np.testing.assert_array_equal(state.skipped["student"], [1, 0])
  assert float(metrics["student/skipped"].sum) == 0
  assert not np.array_equal(state.params["ema"]["w"], before.params["ema"]["w"])


def test_bf16_compute_keeps_float32_masters():
  state, _ = run(made(dtype=jnp.bfloat16), steps=1)
  exact, _ = run(made(), steps=1)
  w, e = state.params["critic"]["w"], exact.params["critic"]["w"]
  assert w.dtype == jnp.float32
  assert not np.array_equal(w, e)
  np.testing.assert_allclose(w, e, atol=2e-3)


def test_prepare_carry_and_ema_hard_copy():
  """`prepare` sees the whole batch; its carry is what losses read and keeps."""

  def prepare(params, batch, context):
    del params
    total = context.carry + jnp.sum(batch["x"])
    return {
      **batch,
      "total": jnp.broadcast_to(total, batch["x"].shape[:1]),
    }, total

  def loss(params, batch, context):
    seen = jnp.sum(params["student"]["w"]) * context.carry
    rows = jnp.broadcast_to(seen, batch["total"].shape)
    return {"x": train.mean(rows)}, {"total": train.mean(batch["total"])}

  method = toy.method(
    networks={
      "student": train.Trained(),
      "copy": train.Ema(
        of="student", decay=lambda s: jnp.where(s % 2 == 1, 0.0, 1.0)
      ),
    },
    losses={"student": loss},
    schedule=train.Schedule(cycle=(("student",),)),
    prepare=prepare,
    carry=lambda: jnp.float32(10),
  )
  step = train.make_step(
    method, {"student": optax.sgd(0.1)}, mesh(), accumulation=2
  )
  state = step.init({"student": {"w": jnp.ones(2)}}, jax.random.key(0))
  x = [np.full((4, 1), 0.5, np.float32), np.full((4, 1), 1.0, np.float32)]
  # carry: 10 + 2 = 12; the gradient of sum(w) * 12 is 12 an element.
  state, metrics = step(("student",), state, {}, {"x": jnp.asarray(x[0])})
  assert float(state.carry) == 12
  assert float(metrics["student/total"].sum) == 12 * 4
  np.testing.assert_allclose(state.params["student"]["w"], 1 - 1.2, atol=1e-6)
  np.testing.assert_array_equal(state.params["copy"]["w"], [1, 1])  # decay 1
  state, _ = step(("student",), state, {}, {"x": jnp.asarray(x[1])})
  assert float(state.carry) == 16
  np.testing.assert_array_equal(
    state.params["copy"]["w"], state.params["student"]["w"]
  )  # decay 0
  state, _ = step(("student",), state, {}, {"x": jnp.asarray(x[0]) * np.nan})
  assert float(state.carry) == 16  # a non-finite carry is not kept


def test_own_gradients_hook():
  """Per-row clipping: what a plain gradient of the mean cannot give."""

  def loss(params, batch, context):
    del context
    return {"x": train.mean(batch["x"] @ params["student"]["w"])}, {}

  def clipped(evaluate, tree, batch, context, accumulate):
    def row(tree, one):
      terms, _ = evaluate(tree, jax.tree.map(lambda a: a[None], one))
      return terms["x"].sum

    def part(rows):
      grads = jax.vmap(lambda r: jax.grad(row)(tree, r)["w"])({"x": rows["x"]})
      norm = jnp.linalg.norm(grads, axis=-1, keepdims=True)
      grads = grads * jnp.minimum(1, 1 / norm)
      return {"w": jnp.sum(grads, 0)}, train.mean(norm[:, 0])

    grads, norm = accumulate(part)
    return jax.tree.map(lambda g: g / norm.count, grads), {"norm": norm}

  method = toy.method(
    networks={"student": train.Trained()},
    losses={"student": loss},
    schedule=train.Schedule(cycle=(("student",),)),
    gradients=clipped,
  )
  x = np.array([[3.0, 4.0], [0.3, 0.4]], np.float32)
  for accumulation in (1, 2):
    step = train.make_step(
      method, {"student": optax.sgd(1.0)}, mesh(), accumulation=accumulation
    )
    state = step.init({"student": {"w": jnp.zeros(2)}}, jax.random.key(0))
    state, metrics = step(("student",), state, {}, {"x": jnp.asarray(x)})
    expected = -(x[0] / 5 + x[1]) / 2
    np.testing.assert_allclose(
      state.params["student"]["w"], expected, atol=1e-6
    )
    assert float(metrics["student/norm"].sum) == pytest.approx(5.5)


def test_second_call_does_not_compile_again():
  step = made()
  run(step, steps=4)
  assert step.jitted._cache_size() == len(step.method.schedule.entries())


@pytest.mark.parametrize("unroll", [True, False])
def test_map_slices_is_the_function(unroll):
  x = jnp.arange(12.0).reshape(6, 2)
  out = train.map_slices(
    lambda b: {"y": b["x"] * 2 + 1}, {"x": x}, slices=3, unroll=unroll
  )
  np.testing.assert_array_equal(out["y"], x * 2 + 1)


def test_bad_input_is_one_line():
  with helpers.one_line_error("optimizers must have an entry.*critic"):
    train.make_step(toy.method(), {"student": optax.sgd(1.0)})
  with helpers.one_line_error("accumulation must be 1 for toy"):
    train.make_step(
      toy.method(couples_rows=True), toy.optimizers(), accumulation=2
    )
  with helpers.one_line_error("accumulation must be >= 1"):
    train.make_step(toy.method(), toy.optimizers(), accumulation=0)
  with helpers.one_line_error("rules must be one of.*did you mean 'dp'"):
    train.make_step(toy.method(), toy.optimizers(), rules="ddp")
  with helpers.one_line_error("divisible by 8 devices, got 12; nearest: 16"):
    train.put_rows(toy.batch(0, 12), mesh(8))
  with helpers.one_line_error("1 x accumulation 3 = 3, got 16; nearest: 15"):
    run(made(1, 3, True), steps=1)
  with helpers.one_line_error("losses must be given for"):
    train.make_step(toy.method(losses={}), {})
  with helpers.one_line_error("schedule must name trained networks"):
    train.make_step(
      toy.method(schedule=train.Schedule(cycle=(("ema",),))),
      toy.optimizers(),
    )
  with helpers.one_line_error("'ema' must follow one of"):
    train.make_step(
      toy.method(
        networks={
          **toy.method().networks,
          "ema": train.Ema(of="teacher"),
        }
      ),
      toy.optimizers(),
    )
