"""The launcher: bad input is one line, a finished run says so."""

import json
import signal

import jax
import numpy as np
import pytest

from distilljax import data, train
from distilljax.train import config as config_lib
from experiments import job
from experiments import train as launcher
from tests import helpers
from tests.experiments.launching import (
  command,
  one_device,
  signals,  # noqa: F401 (a fixture of every test here)
)

SMALL = "configs/ode_regression_ring8.py:runlocal"
WATCHED = ("evaluation.watches=1", "run.keep_best=map_rmse")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """One small run, start to end."""
  folder = tmp_path_factory.mktemp("run")
  lines = []
  with helpers.as_user():
    config = config_lib.load(SMALL, WATCHED)
    job.train_and_evaluate(
      config, folder, command="cmd", log=lines.append, mesh=one_device()
    )
  return folder, lines


@pytest.mark.parametrize(
  "arguments,match",
  [
    (["--config=configs/ode_regresion_ring8.py"], "did you mean"),
    (
      [f"--config={SMALL}", "--config.student.stpes=3"],
      "did you mean 'student.steps'",
    ),
    (
      [f"--config={SMALL}", "--config.student.steps=many"],
      "must be a int, got 'many'",
    ),
    (
      ["--config=configs/ode_regression_ring8.py:runlocl"],
      "did you mean 'runlocal'",
    ),
    ([f"--config={SMALL}", "--config.student.method=ode"], "must be one of"),
    (
      [f"--config={SMALL}", "--config.data.batch_size=30"],
      "divisible by 8 devices, got 30; nearest: 32",
    ),
    (
      [f"--config={SMALL}", "--config.stages=('student','studnet')"],
      "stage 'studnet' has no block",
    ),
    (
      [
        f"--config={SMALL}",
        "--config.student.optimizers.student.learning_rate=-1",
      ],
      "learning_rate must be in",
    ),
    (
      [f"--config={SMALL}", "--config.student.networks.student.start=tea"],
      "start must be one of",
    ),
    ([f"--config={SMALL}", "--config.data.name=ring9"], "must be one of"),
    ([f"--config={SMALL}", "--config.model.kind=mpl"], "did you mean 'mlp'"),
    (
      [f"--config={SMALL}", "--config.run.keep_best=mode_vt"],
      "'map_rmse'), got 'mode_vt'; did you mean 'mode_tv'",
    ),
    (
      [f"--config={SMALL}", "--config.run.keep_best=mode_tv"],
      "needs evaluation.watches >= 1, got 0",
    ),
    ([f"--config={SMALL}", "more"], "unknown argument 'more'"),
    ([], "give --config="),
  ],
)
def test_bad_input_stops_before_any_work(capsys, tmp_path, arguments, match):
  folder = tmp_path / "run"
  code, _, err = command(
    launcher, capsys, *arguments, f"--workdir={folder}", "--compile_cache=off"
  )
  lines = [r for r in err.splitlines() if r.strip()]
  assert code in (1, 2), err
  assert len(lines) == 1 and match in lines[0], err
  assert not folder.exists()


def test_workdir_that_cannot_be_written(capsys, tmp_path):
  file = tmp_path / "file"
  file.write_text("")
  code, _, err = command(
    launcher, capsys,
    f"--config={SMALL}",
    f"--workdir={file}/run",
    "--compile_cache=off",
  )
  assert code == 1 and "cannot be written" in err


def test_missing_originals_are_one_line(capsys, tmp_path, monkeypatch):
  monkeypatch.setenv("DISTILLJAX_DATA", str(tmp_path))
  code, _, err = command(
    launcher, capsys,
    "--config=configs/dmd2_fashion28.py",
    f"--config.data.folder={tmp_path}",
    f"--workdir={tmp_path}/run",
    "--compile_cache=off",
  )
  assert code == 1
  assert "dataset-fashion-mnist" in err and len(err.strip().splitlines()) == 1


def test_a_run_leaves_everything(finished):
  folder, lines = finished
  for name in (
    "config.json",
    "metrics.jsonl",
    "summary.json",
    "report.html",
    "checkpoints",
  ):
    assert (folder / name).exists(), name
  summary = json.loads((folder / "summary.json").read_text())
  assert {
    "scores",
    "floors",
    "seconds",
    "cpu_seconds",
    "compile_seconds",
    "peak_memory_bytes",
    "params_sha256",
    "versions",
    "seed",
  } <= set(summary)
  row = summary["scores"][-1]
  assert set(row) == {"model", "steps", "metric", "value", "n"}
  keys = [(r["model"], r["steps"], r["metric"]) for r in summary["scores"]]
  assert len(set(keys)) == len(keys)
  assert ("student", 1, "map_rmse") in keys
  assert ("teacher", 20, "sliced_wasserstein") in keys
  assert summary["floors"][0]["model"].startswith("floor")
  assert np.isfinite(row["value"]) and row["n"] == 512
  assert "reached sliced_wasserstein" in lines[-1]
  assert str(folder / "report.html") in lines[-1]
  page = (folder / "report.html").read_text()
  assert "student, 1 step" in page and "cmd" in page


def test_the_best_checkpoint_is_kept_and_named(finished):
  folder, lines = finished
  best = json.loads((folder / "summary.json").read_text())["best"]
  assert set(best) == {"student"}  # the teacher is a formula
  found = best["student"]
  rows = (folder / "metrics.jsonl").read_text().splitlines()
  watched = [r for r in map(json.loads, rows) if found["metric"] in r]
  assert found["metric"] == "eval/map_rmse_1_steps"
  assert "eval/sliced_wasserstein_1_steps" in watched[0]
  assert found["value"] == watched[0][found["metric"]] > 0
  assert found["step"] == watched[0]["step"] == 50
  assert any("best eval/map_rmse_1_steps" in line for line in lines)
  assert (folder / "checkpoints" / "student" / "50").is_dir()


def test_the_same_command_says_that_it_is_finished(finished, capsys):
  folder, _ = finished
  before = (folder / "summary.json").read_bytes()
  code, out, _ = command(
    launcher, capsys, f"--config={SMALL}", f"--workdir={folder}",
    "--compile_cache=off", *(f"--config.{o}" for o in WATCHED),
  )
  assert code == 0 and "finished before" in out and "report.html" in out
  assert (folder / "summary.json").read_bytes() == before


def test_another_config_is_refused(finished, capsys):
  folder, _ = finished
  code, _, err = command(
    launcher, capsys,
    f"--config={SMALL}",
    "--config.seed=1",
    f"--workdir={folder}",
    "--compile_cache=off",
    *(f"--config.{o}" for o in WATCHED),
  )
  assert code == 1
  assert "holds a run of another config (seed: 0 there, 1 now)" in err


@pytest.mark.parametrize(
  "error", [data.StalledSource("far: no batch 3"), train.LostProcess("gone")]
)
def test_what_never_returns_is_not_waited_for(
  capsys, tmp_path, monkeypatch, error
):
  def fail(*arguments, **options):
    raise error

  ended = []
  monkeypatch.setattr(job, "train_and_evaluate", fail)
  monkeypatch.setattr("os._exit", ended.append)
  code, _, err = command(
    launcher, capsys, f"--config={SMALL}", f"--workdir={tmp_path}",
    "--compile_cache=off",
  )
  assert ended == [1] and code == 0  # at once, nothing is joined
  assert err.strip() == f"error: {error}"


@pytest.mark.slow
def test_interrupted_and_resumed_ends_in_the_same_bits(finished, tmp_path):
  """SIGTERM in the middle; the sha of the summary equals the whole run's."""
  folder, _ = finished
  config = config_lib.load(SMALL, WATCHED)

  class Stop(train.Hook):
    def on_step(self, moment):
      if moment.step == 17:
        signal.raise_signal(signal.SIGTERM)

  with pytest.raises(train.Interrupted, match="saved. The same command"):
    job.train_and_evaluate(
      config,
      tmp_path,
      log=lambda _: None,
      hooks=[Stop()],
      mesh=one_device(),
    )
  lines = []
  summary = job.train_and_evaluate(
    config, tmp_path, log=lines.append, mesh=one_device()
  )
  assert any("resumed at step 17" in r for r in lines)
  whole = json.loads((folder / "summary.json").read_text())
  assert summary["params_sha256"] == whole["params_sha256"]
  assert summary["scores"] == whole["scores"]


def test_every_step_of_the_schedule_has_its_optimizer_length():
  """A network updated every second step anneals over half the steps."""
  built = job.build(config_lib.load("configs/dmd2_ring8.py:runlocal"))
  stage = built.stages[-1]
  params = {"w": np.ones(1, np.float32)}
  import optax

  tx = stage.optimizers["student"]
  state = tx.init(params)
  for _ in range(10):  # 50 steps, ratio 5: ten updates
    _, state = tx.update(params, state, params)
  change, _ = tx.update(params, state, params)
  assert abs(float(change["w"][0])) < 1e-9  # cosine has ended
  assert isinstance(optax.tree_utils.tree_get(state, "mu")["w"], jax.Array)


def test_peak_memory_is_of_the_process_and_the_fullest_device():
  class Device:
    def __init__(self, stats):
      self.memory_stats = lambda: stats

  class Mesh:
    def __init__(self, *stats):
      self.local_devices = [Device(s) for s in stats]

  # No device of its own: a CPU says nothing.
  before = job.peak_memory(Mesh(None))
  assert set(before) == {"host"}
  after = job.peak_memory(Mesh({"peak_bytes_in_use": 3}, {},
                               {"peak_bytes_in_use": 5}))  # fmt: skip
  assert after["device"] == 5
  # Bytes: between an interpreter and what this machine could have.
  assert 2**26 < before["host"] <= after["host"] < 2**40
