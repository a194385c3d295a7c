"""The runner of the configs' small runs, and (slow) every one of them."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def load():
  spec = importlib.util.spec_from_file_location(
      "runlocal", ROOT / ".ci" / "runlocal.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


RUNLOCAL = load()


def test_every_config_has_its_turn():
  names = RUNLOCAL.configs()
  assert {"dmd2_fashion14", "mean_flow_ring8"} <= set(names)
  assert not {"base", "__init__"} & set(names)
  orders = [RUNLOCAL.rotated(names, f"commit {i}") for i in range(200)]
  assert {order[0] for order in orders} == set(names)
  for order in orders:
    assert sorted(order) == names
  assert RUNLOCAL.rotated(names, "a") == RUNLOCAL.rotated(names, "a")
  assert RUNLOCAL.rotated([], "a") == []


def test_each_config_runs_with_its_own_launcher():
  assert RUNLOCAL.launcher("dmd2_ring8") == "experiments.train"
  assert RUNLOCAL.launcher("gopd_markov") == "experiments.train_lm"
  for name in RUNLOCAL.configs():
    assert RUNLOCAL.launcher(name).startswith("experiments.train")


def test_what_a_finished_run_must_leave(tmp_path):
  assert RUNLOCAL.complaint(tmp_path).startswith("summary.json")

  def write(**summary):
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return RUNLOCAL.complaint(tmp_path)

  assert write(scores=[]) == "summary.json: no scores"
  assert "not finite" in write(scores=[{"value": float("nan")}])
  for name in ("report.html", "config.json", "metrics.jsonl"):
    assert write(scores=[{"value": 1.0}]) == f"{name} is missing or empty"
    (tmp_path / name).write_text("x")
  assert write(scores=[{"value": 1.0}]) is None
  (tmp_path / "report.html").write_text("")
  assert write(scores=[{"value": 1.0}]) == "report.html is missing or empty"


def fake_runs(monkeypatch, seconds, failing=()):
  """`main` over a clock that every run advances, without running anything."""
  clock = [0.0]
  monkeypatch.setattr(RUNLOCAL.time, "monotonic", lambda: clock[0])
  monkeypatch.setattr(RUNLOCAL, "configs", lambda: list("abcd"))

  def run(name, folder, limit):
    del folder, limit
    clock[0] += seconds
    return "exit status 1" if name in failing else None

  monkeypatch.setattr(RUNLOCAL, "run", run)


@pytest.mark.parametrize(
    ("budget", "ran"), [("inf", 4), ("40", 4), ("39", 3), ("10", 1), ("1", 1)]
)
def test_the_budget_holds(monkeypatch, capsys, budget, ran):
  fake_runs(monkeypatch, 10.0)
  monkeypatch.setattr(sys, "argv", ["runlocal.py", "--budget", budget])
  assert RUNLOCAL.main() == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == ran + 1
  done, left = lines[-1].split(": ", 1)[1].split("; left for other commits: ")
  done = done.split(", ")
  left = [] if left == "none" else left.split(", ")
  assert len(done) == ran
  assert sorted(done + left) == list("abcd")


def test_a_failed_run_fails(monkeypatch, capsys):
  fake_runs(monkeypatch, 10.0, failing="c")
  monkeypatch.setattr(sys, "argv", ["runlocal.py"])
  assert RUNLOCAL.main() == 1
  assert "configs that failed: c\n" in capsys.readouterr().out
  monkeypatch.setattr(RUNLOCAL, "configs", list)
  assert RUNLOCAL.main() == 1


def test_an_unknown_name_is_refused():
  done = subprocess.run(
      [sys.executable, ROOT / ".ci" / "runlocal.py", "none_such"],
      capture_output=True, text=True, check=False,
  )
  assert done.returncode == 2
  assert "no such config: ['none_such']" in done.stderr


def test_ci_runs_the_readmes_test_command():
  command = "pip install -e '.[test]' && pytest"
  assert command in (ROOT / "README.md").read_text().splitlines()
  script = ROOT / ".ci" / "run"
  assert f'tests="{command}"' in script.read_text()
  assert os.access(script, os.X_OK)
  subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNLOCAL.configs())
def test_every_config_runs(name):
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  done = subprocess.run(
      [sys.executable, ROOT / ".ci" / "runlocal.py", name],
      capture_output=True, text=True, env=environment, check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
