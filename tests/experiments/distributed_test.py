"""The launcher in several processes: the same numbers, one clear end."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from distilljax import train
from experiments import entry
from tests import helpers

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "configs/ode_regression_ring8.py:runlocal"
# What the documentation promises for a lost process.
SECONDS = 60


@pytest.mark.parametrize(
  "environment,expected",
  [
    ({}, False),
    ({"JAX_NUM_PROCESSES": "2"}, True),
    ({"JAX_NUM_PROCESSES": "1"}, False),
    ({"JAX_COORDINATOR_ADDRESS": "host:1"}, True),
    ({"SLURM_NTASKS": "4"}, False),  # an allocation, not a step of it
    ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, True),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, True),
  ],
)
def test_auto_looks_for_several_processes(environment, expected):
  assert entry.in_cluster(environment) == expected


def test_joining_only_when_asked_and_failing_in_one_line(monkeypatch):
  calls = []

  def initialize(**arguments):
    calls.append(arguments)
    if arguments["coordinator_address"] is None:
      raise ValueError("coordinator_address should be defined.\nmore")

  monkeypatch.setattr("jax.distributed.initialize", initialize)
  for name in (*entry._SIZES, *entry._OTHERS, "JAX_PROCESS_ID"):
    monkeypatch.delenv(name, raising=False)
  entry.join("auto")
  entry.join("off")
  assert not calls
  with helpers.one_line_error("--distributed=on: joining.*be defined"):
    entry.join("on")
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  monkeypatch.setenv("JAX_PROCESS_ID", "1")
  entry.join("auto")
  assert calls[-1] == {
    "coordinator_address": "host:1",
    "num_processes": 2,
    "process_id": 1,
    "heartbeat_timeout_seconds": entry.HEARTBEAT_SECONDS,
  }
  entry.join("off")
  assert len(calls) == 2


def free_port():
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def start(workdir, processes, *arguments, devices=2):
  """As many processes of one run, `devices` in all."""
  port = free_port()
  out = []
  for i in range(processes):
    environment = {
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_force_host_platform_device_count="
      f"{devices // processes}",
    }
    if processes > 1:
      environment |= {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(i),
      }
    out.append(
      subprocess.Popen(
        [
          sys.executable,
          "-m",
          "experiments.train",
          f"--config={CONFIG}",
          f"--workdir={workdir}",
          *arguments,
        ],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
    )
  return out


def steps(workdir):
  return train.Checkpoints(workdir / "checkpoints" / "student").steps()


def wait_for(step, workdir, seconds=240):
  began = time.monotonic()
  while not any(s >= step for s in steps(workdir)):
    assert time.monotonic() - began < seconds
    time.sleep(0.2)


LONG = (
  "--config.student.steps=100000",
  "--config.run.log_every=20",
  "--config.run.checkpoint_every=50",
)


@pytest.mark.slow
@pytest.mark.parametrize(
  "several,rules", [(2, "dp"), (2, "fsdp"), (4, "dp"), (4, "fsdp")]
)
def test_several_processes_give_the_numbers_of_one(tmp_path, several, rules):
  found = {}
  for count in (1, several):
    folder = tmp_path / str(count)
    processes = start(
      folder,
      count,
      f"--config.run.rules={rules}",
      "--config.evaluation.watches=2",
      "--config.run.keep_best=map_rmse",
      devices=several,
    )
    texts = [p.communicate(timeout=280)[0] for p in processes]
    assert [p.returncode for p in processes] == [0] * count, texts
    found[count] = json.loads((folder / "summary.json").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(r) for r in lines]
    found[count, "loss"] = [
      r["student/loss"] for r in rows if "student/loss" in r
    ]
    assert len(lines) == 3  # one process writes
    assert "reached" in texts[0]
  for text in texts[1:]:
    assert "reached" not in text and "step 50/50" not in text
  assert found[1]["devices"] == found[several]["devices"] == several
  ours, theirs = found[several, "loss"], found[1, "loss"]
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)
  best, same = (found[n]["best"]["student"] for n in (several, 1))
  assert best["step"] == same["step"]
  np.testing.assert_allclose(best["value"], same["value"], rtol=1e-3)
  values = lambda n: [r["value"] for r in found[n]["scores"]]
  np.testing.assert_allclose(values(several), values(1), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_stops_the_other(tmp_path, victim):
  processes = start(tmp_path / "run", 2, *LONG)
  wait_for(100, tmp_path / "run")
  processes[victim].kill()
  began = time.monotonic()
  text = processes[1 - victim].communicate(timeout=SECONDS)[0]
  assert time.monotonic() - began < SECONDS
  processes[victim].communicate()
  assert processes[1 - victim].returncode not in (0, None)
  clear = [r for r in text.splitlines() if r.startswith("error: ")]
  saved = steps(tmp_path / "run")
  if victim == 0 and not clear:
    # The coordinator is gone with it: JAX may end the process before we do.
    assert "another task died" in text
  else:
    assert len(clear) == 1, text
    assert "lost another process at step" in clear[0]
    assert saved and f"last checkpoint: step {saved[-1]}" in clear[0]
  # The last checkpoint is whole: the run goes on from it, and is told to stop.
  processes = start(tmp_path / "run", 2, *LONG)
  wait_for(saved[-1] + 50, tmp_path / "run")
  processes[1].send_signal(signal.SIGTERM)  # any process may be told
  texts = [p.communicate(timeout=SECONDS)[0] for p in processes]
  assert [p.returncode for p in processes] == [0, 0], texts
  assert f"student: resumed at step {saved[-1]}" in texts[0]
  for text in texts:
    assert "stopped by SIGTERM in stage student at step" in text
  assert steps(tmp_path / "run")[-1] % 20 == 0  # where both look for signals
