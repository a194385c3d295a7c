"""Saves while the training goes on, and the best checkpoint."""

import asyncio
import gc
import logging
import math
import pathlib
import signal
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.path import async_path
from orbax.checkpoint._src.serialization import replica_slices

from distilljax import data, train
from tests import helpers
from tests.train import toy


def one_device():
  return train.make_mesh(jax.devices()[:1])


class Writers:
  """Orbax's writers, stopped or failing.

  Attributes:
    go: they wait for it, with arrays handed over and none written.
    error: what they raise in the end, if anything.
  """

  def __init__(self):
    self.go = threading.Event()
    self.error = None


@pytest.fixture
def writers(monkeypatch):
  out = Writers()
  read, rename = replica_slices.ReplicaSlices.to_fragments, async_path.rename

  def to_fragments(slices):
    if not out.go.wait(20):
      out.go.set()
      raise AssertionError("nobody let the writers go")
    return read(slices)

  async def commit(*paths):
    if out.error is not None:
      raise out.error
    await rename(*paths)

  monkeypatch.setattr(
    replica_slices.ReplicaSlices, "to_fragments", to_fragments
  )
  monkeypatch.setattr(async_path, "rename", commit)
  yield out
  out.go.set()


class Call(train.Hook):
  """Calls `fn(moment)` after every step."""

  def __init__(self, fn):
    self.on_step = fn


def run(folder, steps, *hooks, best=None, **options):
  pathlib.Path(folder).mkdir(exist_ok=True)
  logged = []
  arguments = {"log_every": 100, "log": logged.append, **options}
  arguments.setdefault("checkpoint_every", 4)
  result = train.run(
    [toy.stage(steps)._replace(best=best)],
    folder,
    mesh=one_device(),
    hooks=[Call(fn) for fn in hooks],
    **arguments,
  )
  return result, logged


def saved(folder, **options):
  return train.Checkpoints(folder / "checkpoints" / "toy", **options)


@pytest.fixture(scope="module")
def first():
  """The toy's step and the parts of its first state, on the host."""
  step = train.make_step(toy.method(), toy.optimizers(), one_device())
  params = jax.device_get(toy.init(jax.random.key(0), {}))
  return step, params


def started(first):
  step, params = first
  return step.init(params, jax.random.key(1))


def state_at(first, step):
  return started(first)._replace(step=jnp.int32(step))


def values(state):
  return jax.tree.map(np.array, jax.device_get(state.params))


def test_steps_donate_what_is_being_written(first, writers, tmp_path):
  """The writers read the arrays after five steps have been made of them."""
  step, params = first
  frozen = step.place({"teacher": params["teacher"]})
  both = ("student", "critic")
  batch = lambda i: train.put_rows(toy.batch(i), step.mesh)
  once = lambda s, i: step(both, s, frozen, batch(i))[0]
  state = once(started(first), 0)
  # The threat is real: a step writes into the arrays of the state it is given.
  place = state.params["student"]["w"].unsafe_buffer_pointer()
  state = once(state, 1)
  assert state.params["student"]["w"].unsafe_buffer_pointer() == place
  expected = values(state)
  checkpoints = train.Checkpoints(tmp_path)
  assert checkpoints.save_async(state, {"a": 1}) == 2
  for i in range(2, 7):
    state = once(state, i)
  jax.block_until_ready(state)
  assert state.params["student"]["w"].unsafe_buffer_pointer() != place
  assert checkpoints.steps() == []
  writers.go.set()
  checkpoints.wait()
  assert checkpoints.steps() == [2]
  restored, host = checkpoints.restore(started(first))
  assert host == {"a": 1}
  jax.tree.map(np.testing.assert_array_equal, values(restored), expected)
  assert not np.array_equal(
    values(state)["student"]["w"], expected["student"]["w"]
  )


def test_the_loop_trains_while_files_are_written(writers, tmp_path):
  seen = {}

  def look(moment):
    seen[moment.step] = saved(tmp_path).steps()
    if moment.step == 7:
      writers.go.set()

  run(tmp_path, 12, look)
  assert seen[7] == []  # three steps after its save began
  assert saved(tmp_path).steps() == [8, 12]


def test_a_signal_waits_for_what_is_being_written(writers, tmp_path):
  def stop(moment):
    if moment.step == 5:
      signal.raise_signal(signal.SIGTERM)
      threading.Timer(0.2, writers.go.set).start()

  with pytest.raises(train.Interrupted, match="at step 5; saved"):
    run(tmp_path, 12, stop)
  assert saved(tmp_path).steps() == [4, 5]

  def stop_full(moment):
    if moment.step == 6:
      writers.error = OSError(28, "No space left on device")
      signal.raise_signal(signal.SIGTERM)

  with helpers.one_line_error("step 6 could not be saved.*step 5", OSError):
    run(tmp_path, 12, stop_full)


def test_a_save_in_the_background_fails_in_one_line(
  first, writers, tmp_path, caplog, monkeypatch
):
  monkeypatch.setattr(logging.getLogger("absl"), "propagate", True)
  writers.go.set()
  checkpoints = train.Checkpoints(tmp_path)
  checkpoints.save(state_at(first, 1), {})
  writers.error = OSError(28, "No space left on device")
  checkpoints.save_async(state_at(first, 2), {})
  with helpers.one_line_error(
    r"step 2 could not be saved in .* \(No space left on device\); last good"
    " checkpoint: step 1",
    train.SaveError,
  ):
    until = time.monotonic() + 30
    while time.monotonic() < until:
      checkpoints.check()
  checkpoints.check()  # said once
  # The next save tells too, and so do the end of the run and the next restore.
  for tell in (
    lambda: checkpoints.save_async(state_at(first, 3), {}),
    checkpoints.close,
    lambda: checkpoints.restore(started(first)),
  ):
    checkpoints.save_async(state_at(first, 2), {})
    with helpers.one_line_error("step 2 could not be saved", train.SaveError):
      tell()
  writers.error = None
  checkpoints.save(state_at(first, 2), {})
  assert checkpoints.steps() == [1, 2]
  gc.collect()
  assert not caplog.records  # no traceback beside the line
  assert not logging.getLogger("absl").filters  # others are heard again


def test_a_writer_that_ends_after_the_failure_prints_nothing(
  first, writers, tmp_path, monkeypatch
):
  heard = []
  monkeypatch.setattr(sys, "unraisablehook", heard.append)
  loop = asyncio.new_event_loop()
  loop.close()

  def in_a_foreign_thread(fn, *args):
    try:
      fn(*args)
    except Exception as e:
      sys.unraisablehook(
        types.SimpleNamespace(exc_value=e, exc_traceback=e.__traceback__)
      )

  writers.go.set()
  writers.error = OSError(28, "No space left on device")
  checkpoints = train.Checkpoints(tmp_path)
  with helpers.one_line_error("step 1 could not be saved", train.SaveError):
    checkpoints.save(state_at(first, 1), {})
  in_a_foreign_thread(loop.call_soon_threadsafe, print)
  assert not heard
  in_a_foreign_thread(int, "x")  # what is not a writer's
  assert len(heard) == 1
  writers.error = None
  checkpoints.save(state_at(first, 1), {})
  in_a_foreign_thread(loop.call_soon_threadsafe, print)
  assert len(heard) == 2
  checkpoints.close()


def test_the_loop_stops_when_a_save_has_failed(writers, tmp_path):
  writers.go.set()
  steps = []

  def fail(moment):
    steps.append(moment.step)
    if moment.step >= 100:
      writers.error = OSError(28, "No space left on device")
      time.sleep(0.01)

  with helpers.one_line_error("step 100 could not be saved.*none", OSError):
    run(tmp_path, 300, fail, checkpoint_every=100)
  assert steps[-1] < 200  # the next save would have told

  def full(moment):
    if moment.step == 5:
      raise OSError(28, "No space left on device")  # of another file

  with helpers.one_line_error("step 4 could not be saved", train.SaveError):
    run(tmp_path, 12, full)

  logged = []

  def broken(moment):
    if moment.step == 5:
      raise KeyError("the user's own")

  with pytest.raises(KeyError, match="own"):
    run(tmp_path, 12, broken, log=logged.append)
  assert any("step 4 could not be saved" in line for line in logged)


class Far:
  """Rows of the toy that are read while it trains; some never come."""

  def __init__(self, stalled=None):
    self.rows = toy.batch(rows=80)
    self.stalled = stalled
    self.go = threading.Event()

  def __len__(self):
    return 80

  def __getitem__(self, i):
    if i == self.stalled:
      self.go.wait(60)
    return {k: v[i] for k, v in self.rows.items()}


def test_a_stalled_source_ends_the_run_and_another_goes_on_exactly(tmp_path):
  def go(folder, source):
    batches = lambda: data.source_iterator(
      source, 16, seed=0, shuffle=False, name="far", stall_seconds=0.3
    )
    folder.mkdir(exist_ok=True)
    logged = []
    result = train.run(
      [toy.stage(12)._replace(data=batches)],
      folder,
      mesh=one_device(),
      checkpoint_every=3,
      log=logged.append,
    )
    return train.params_sha256(result.params["toy"]), logged

  stalled = Far(stalled=65)  # in batch 4
  with helpers.one_line_error("far: .* no batch 4", data.StalledSource):
    go(tmp_path / "a", stalled)
  stalled.go.set()
  assert saved(tmp_path / "a").steps() == [3]
  ours, logged = go(tmp_path / "a", Far())
  assert any("resumed at step 3" in line for line in logged)
  whole, _ = go(tmp_path / "b", Far())
  assert ours == whole


NAN = math.nan


@pytest.mark.parametrize(
  "higher,watched,before,kept",
  [
    (False, {1: NAN, 2: 3.0, 6: 1.0, 7: 2.0, 10: 1.5}, 6, 6),
    (True, {2: 3.0, 3: NAN, 6: 1.0, 8: 2.0, 10: 4.0}, 2, 10),
  ],
)
def test_the_best_checkpoint_is_kept(tmp_path, higher, watched, before, kept):
  best = train.Best("eval/x", higher)

  def watch(moment):
    value = watched.get(moment.step)
    return None if value is None else {"eval/x": value, "eval/y": 7.0}

  go = lambda steps: run(tmp_path, steps, watch, best=best, keep=1)
  result, _ = go(8)
  assert saved(tmp_path).steps() == [before, 8]
  result, logged = go(12)  # resumed
  assert any("resumed at step 8" in line for line in logged)
  assert saved(tmp_path).steps() == [kept, 12]
  value = watched[kept]
  assert result.best == {
    "toy": {"step": kept, "metric": "eval/x", "value": value}
  }
  assert f"toy: best eval/x {value:.4g}, step {kept}, is kept" in logged
  assert saved(tmp_path, best=best).best() == (kept, value)


def test_the_best_checkpoint_is_of_the_step_that_was_measured(first, tmp_path):
  best = train.Best("eval/x", True)
  watch = lambda moment: {"eval/x": -abs(moment.step - 3.0)}
  run(tmp_path / "run", 8, watch, best=best, keep=1)
  short, _ = run(tmp_path / "short", 3)
  checkpoints = saved(tmp_path / "run", best=best)
  step, value = checkpoints.best()
  assert (step, value) == (3, 0.0)
  state, _ = checkpoints.restore(started(first), step)
  assert int(state.step) == 3
  for name, expected in values(state).items():
    jax.tree.map(
      np.testing.assert_array_equal, short.params["toy"][name], expected
    )
  with helpers.one_line_error(r"no step 4 in .*, only \[3, 8\]"):
    checkpoints.restore(started(first), 4)
  for file in (checkpoints.folder / "3" / "state").rglob("*"):
    if file.is_file():
      file.write_bytes(b"")
  with helpers.one_line_error("step 3 in .* cannot be read"):
    checkpoints.restore(started(first), 3)
  assert checkpoints.steps() == [3, 8]  # asked for by name: nothing is moved


def test_without_a_metric_there_is_no_best(tmp_path):
  result, logged = run(tmp_path, 4, best=train.Best("eval/x", True))
  assert result.best == {} and not any("is kept" in line for line in logged)
  assert saved(tmp_path).best() is None
