"""The step on stacked arrays is the step on global ones."""

import jax
import numpy as np
import optax
import pytest

from distilljax import train
from tests import helpers
from tests.train import toy

DEVICES = 4


def stacked(batch):
  return {k: v.reshape(DEVICES, -1, *v.shape[1:]) for k, v in batch.items()}


@pytest.mark.parametrize(
  "accumulation", [2, pytest.param(1, marks=pytest.mark.slow)]
)
def test_pmap_step_gives_the_same_numbers(accumulation):
  devices = jax.devices()[:DEVICES]
  ours = train.make_pmap_step(
    toy.method(), toy.optimizers(), devices, accumulation=accumulation
  )
  step = train.make_step(
    toy.method(),
    toy.optimizers(),
    train.make_mesh(devices),
    accumulation=accumulation,
  )
  params = toy.init(jax.random.key(0), {})
  state = ours.init(params, jax.random.key(1))
  expected = step.init(params, jax.random.key(1))
  teacher = {"teacher": params["teacher"]}
  frozen = ours.stack(teacher)
  # The entry that moves every network: one program each.
  updates = max(toy.method().schedule.entries(), key=len)
  assert set(updates) == set(toy.method().losses)
  for i in range(2):
    before = state
    rows = toy.batch(i)
    state, metrics = ours(updates, state, frozen, stacked(rows))
    expected, theirs = step(
      updates, expected, teacher, train.put_rows(rows, step.mesh)
    )
    assert before.params["student"]["w"].is_deleted()
  assert state.params["student"]["w"].shape == (DEVICES, 3, 3)
  assert len(state.params["student"]["w"].sharding.device_set) == DEVICES
  for d in range(DEVICES):  # every device holds the same copy, and it is it
    one = jax.tree.map(lambda x, d=d: x[d], state.params)
    jax.tree.map(
      # The last bit of the largest is the compiler's: it fuses the relabelled
      # program anew.
      lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max()
      ),
      one,
      expected.params,
    )
  first = ours.unstack(metrics)
  assert first.keys() == theirs.keys()
  for name in theirs:
    np.testing.assert_allclose(first[name].sum, theirs[name].sum, rtol=1e-6)
    assert metrics[name].count.shape == (DEVICES,)
  assert int(state.step[0]) == 2


def test_bad_input_is_one_line():
  step = train.make_pmap_step(
    toy.method(), toy.optimizers(), jax.devices()[:DEVICES], accumulation=3
  )
  rows = {"x": np.zeros((2, 8, 3), np.float32)}
  with helpers.one_line_error(r"batch\['x'\] must be \[device=4, rows"):
    step(("critic",), None, {}, rows)
  rows = {"x": np.zeros((4, 8, 3), np.float32)}
  with helpers.one_line_error("a device divisible by accumulation 3, got 8"):
    step(("critic",), None, {}, rows)
  with helpers.one_line_error("optimizers must have an entry"):
    train.make_pmap_step(toy.method(), {"student": optax.sgd(1.0)})
