"""The loop under kills, signals, broken checkpoints and full disks."""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from distilljax import train
from tests import helpers
from tests.train import toy

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 12


def start(workdir, seconds=0.0, *extra, steps=STEPS):
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      "tests.train.toy_run",
      str(workdir),
      str(steps),
      str(seconds),
      *map(str, extra),
    ],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process):
  out, _ = process.communicate(timeout=120)
  return out


def signal_at(process, number, step_line):
  """Sends `number` when the process has said `step_line` for the n-th time."""
  said = []
  for line in process.stdout:
    said.append(line)
    if line.strip() == step_line:
      process.send_signal(number)
      break
  out, _ = process.communicate(timeout=120)
  return "".join(said) + out


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole")
  process = start(folder)
  out = finish(process)
  assert process.returncode == 0, out
  return folder, re.findall("sha .*", out)


def test_killed_run_ends_in_the_same_bits(uninterrupted, tmp_path):
  """SIGKILL at a random step of stage two, resumed, twice."""
  folder, expected = uninterrupted
  assert len(expected) == 2
  step = random.randint(1, STEPS - 1)
  process = start(tmp_path, 0.05)
  seen = 0
  for line in process.stdout:
    seen += line.strip() == f"step {step}"
    if seen == 2:  # the second stage
      process.kill()
      break
  finish(process)
  assert process.returncode == -signal.SIGKILL
  process = start(tmp_path)
  out = finish(process)
  assert process.returncode == 0, out
  assert re.findall("sha .*", out) == expected, f"killed at step {step}"
  assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 8
  strip = lambda p: [
    {k: v for k, v in json.loads(r).items() if k != "samples_per_second"}
    for r in (p / "metrics.jsonl").read_text().splitlines()
  ]
  ours, theirs = strip(tmp_path), strip(folder)
  assert [(r["stage"], r["step"]) for r in ours] == [
    (r["stage"], r["step"]) for r in theirs
  ]
  # The line in whose window the run was killed averages fewer steps.
  assert sum(a != b for a, b in zip(ours, theirs)) <= 1


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path):
  """SIGKILL while starting, stepping and saving: the same bits in the end.

  No kill loses more than the interval between two checkpoints (4 steps) and
  the steps of one write, which is over when the next one begins (4 again).
  """
  steps = 60
  expected = re.findall(
    "sha .*", finish(start(tmp_path / "whole", steps=steps))
  )
  assert len(expected) == 2

  def said(lines):
    """The steps that were said, counted over both stages."""
    before, out = 0, []
    for line in lines:
      if line.startswith(("one: ", "two: ")):
        before = steps * line.startswith("two: ")
      elif line.startswith("step "):
        out.append(before + int(line.split()[1]))
    return out

  seed = random.randrange(2**32)
  rng = random.Random(seed)
  reached = 0
  for kill in range(20):
    process = start(tmp_path / "run", 0.01, steps=steps)
    wanted, lines = rng.randrange(10), []
    if wanted:
      for line in process.stdout:
        lines.append(line)
        if len(said(lines)) == wanted:
          break
    time.sleep(rng.uniform(0, 0.05 if wanted else 5.0))
    process.kill()
    lines += process.communicate()[0].splitlines()
    where = f"seed {seed}, kill {kill}:\n{''.join(lines)}"
    assert process.returncode == -signal.SIGKILL, where
    if now := said(lines):
      # A step is said before it is saved: that save may be what was killed.
      assert now[0] > reached - 8, where
      reached = max(reached, now[-1])
  process = start(tmp_path / "run", steps=steps)
  out = finish(process)
  assert process.returncode == 0, out
  assert re.findall("sha .*", out) == expected, f"seed {seed}"


def test_sigterm_saves_and_exits_0(uninterrupted, tmp_path):
  _, expected = uninterrupted
  process = start(tmp_path, 0.05)
  out = signal_at(process, signal.SIGTERM, "step 6")
  assert process.returncode == 0
  assert "stopped: stopped by SIGTERM in stage one at step" in out
  assert "The same command resumes." in out
  saved = train.Checkpoints(tmp_path / "checkpoints" / "one").steps()
  assert saved[-1] in (6, 7)  # between two regular saves (every 4)
  out = finish(start(tmp_path))
  assert re.findall("sha .*", out) == expected
  assert f"one: resumed at step {saved[-1]}" in out


def test_full_disk_is_one_line_and_keeps_the_previous(tmp_path):
  process = start(tmp_path, 0.0, 64)
  out = finish(process)
  assert process.returncode == 1, out
  stopped = [r for r in out.splitlines() if r.startswith("stopped: ")]
  assert len(stopped) == 1, out
  assert "step 8 could not be saved" in stopped[0]
  assert "last good checkpoint: step 4" in stopped[0]
  assert "Traceback" not in out
  process = start(tmp_path)
  out = finish(process)
  assert "one: resumed at step 4" in out
  assert process.returncode == 0


def run(folder, **kwargs):
  pathlib.Path(folder).mkdir(exist_ok=True)
  logged = []
  arguments = {
    "log_every": 4,
    "checkpoint_every": 4,
    "log": logged.append,
    "mesh": train.make_mesh(jax.devices()[:1]),
    **kwargs,
  }
  stages = arguments.pop("stages", [toy.stage(STEPS)])
  return train.run(stages, folder, **arguments), logged


def test_truncated_checkpoint_falls_back_and_says_so(tmp_path):
  result, _ = run(tmp_path)
  expected = train.params_sha256(result.params["toy"])
  folder = tmp_path / "checkpoints" / "toy"
  assert train.Checkpoints(folder).steps() == [8, 12]
  for file in (folder / "12" / "state").rglob("*"):
    if file.is_file() and file.stat().st_size > 100:
      os.truncate(file, file.stat().st_size // 2)
  result, logged = run(tmp_path)
  assert train.params_sha256(result.params["toy"]) == expected
  assert any("step 12" in r and "cannot be read" in r for r in logged), logged
  assert any("resumed at step 8" in r for r in logged)
  assert (tmp_path / "checkpoints" / "toy.unreadable-12").is_dir()
  assert train.Checkpoints(folder).steps() == [8, 12]


def test_no_readable_checkpoint_is_an_error(tmp_path):
  run(tmp_path, keep=1)
  folder = tmp_path / "checkpoints" / "toy"
  shutil.rmtree(folder / "12" / "state")
  with helpers.one_line_error(r"none of the checkpoints \[12\]"):
    run(tmp_path, keep=1)


def test_more_devices_resume_the_same_run(tmp_path):
  result, _ = run(tmp_path, stages=[toy.stage(8)])
  wide, _ = run(tmp_path, mesh=train.make_mesh(jax.devices()[:4]))
  whole, _ = run(tmp_path / "whole")
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
    jax.device_get(wide.params["toy"]),
    jax.device_get(whole.params["toy"]),
  )


def test_nan_batches_are_skipped_counted_and_stop_the_run(tmp_path):
  result, _ = run(tmp_path / "few", stages=[toy.stage(STEPS, poison=(2, 5))])
  assert result.skipped == {"toy/student": 1, "toy/critic": 2}
  rows = [
    json.loads(r)
    for r in (tmp_path / "few" / "metrics.jsonl").read_text().splitlines()
  ]
  assert rows[0]["critic/skipped"] == 0.25 and rows[0]["critic/fit"] > 0

  bad = toy.stage(STEPS, poison=range(4, 99))
  with helpers.one_line_error(
    r"4 updates in a row of 'critic'.*last batch by rows \[0\]; the last",
    RuntimeError,
  ):
    run(tmp_path / "many", stages=[bad], max_skips_in_a_row=3)
  good, _ = run(tmp_path / "good", stages=[toy.stage(4)])
  saved = train.Checkpoints(tmp_path / "many" / "checkpoints" / "toy")
  step = train.make_step(
    bad.method, bad.optimizers, train.make_mesh(jax.devices()[:1])
  )
  state = step.init(toy.init(jax.random.key(0), {}), jax.random.key(0))
  state, _ = saved.restore(state)
  assert int(state.step) == 8  # data and step went on, parameters did not
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get(state.params["critic"]),
    jax.device_get(good.params["toy"]["critic"]),
  )


def test_hooks_progress_and_results(tmp_path):
  seen = []

  class Note(train.Hook):
    def on_start(self, moment):
      seen.append(("start", moment.step))

    def on_log(self, moment):
      seen.append(("log", moment.step, moment.values["student/loss"] > 0))

    def on_end(self, moment):
      seen.append(("end", moment.step))

  import io

  text = io.StringIO()
  every = []
  result, logged = run(
    tmp_path,
    hooks=[
      Note(),
      train.Progress(text, line_every=0.0),
      train.Every(5, lambda m: every.append(m.step)),
    ],
  )
  assert seen == [
    ("start", 0),
    ("log", 4, True),
    ("log", 8, True),
    ("log", 12, True),
    ("end", 12),
  ]
  assert every == [5, 10]
  (first,) = [r for r in logged if "first step after" in r]
  assert re.fullmatch(
    r"toy: first step after \d+\.\d s \(\d+\.\d s compiling until now\)", first
  )
  lines = text.getvalue().splitlines()
  assert len(lines) == 3 and "step 12/12, 0 s left" in lines[-1]
  assert "student/loss=" in lines[0] and "samples/s" in lines[0]
  for field in (result.seconds, result.cpu_seconds, result.compile_seconds):
    assert field["toy"] > 0
  assert set(result.params["toy"]) == {"student", "critic", "ema", "teacher"}


def test_finished_stage_feeds_the_next_and_is_not_trained_again(tmp_path):
  def init(key, earlier):
    out = dict(toy.init(key, earlier))
    out["teacher"] = earlier["first"]["ema"] | {}
    out["teacher"] = {"w": out["teacher"]["w"]}
    return out

  stages = [toy.stage(4, "first"), toy.stage(4, "second")._replace(init=init)]
  result, _ = run(tmp_path, stages=stages)
  np.testing.assert_array_equal(
    result.params["second"]["teacher"]["w"], result.params["first"]["ema"]["w"]
  )
  before = (tmp_path / "metrics.jsonl").read_text()
  again, _ = run(tmp_path, stages=stages)
  assert (tmp_path / "metrics.jsonl").read_text() == before
  assert train.params_sha256(again.params["second"]) == train.params_sha256(
    result.params["second"]
  )


def test_bad_stages_are_one_line(tmp_path):
  with helpers.one_line_error("stage names must be distinct"):
    run(tmp_path, stages=[toy.stage(1), toy.stage(1)])
  broken = toy.stage(1)._replace(init=lambda key, earlier: {"student": {}})
  with helpers.one_line_error(r"got none for \['critic', 'teacher'\]"):
    run(tmp_path, stages=[broken])


def test_sha_is_of_sorted_arrays():
  import hashlib

  params = {"b": np.arange(3.0, dtype=np.float32), "a": {"c": np.int32(7)}}
  expected = hashlib.sha256(
    np.int32(7).tobytes() + np.arange(3.0, dtype=np.float32).tobytes()
  ).hexdigest()
  assert train.params_sha256(params) == expected
