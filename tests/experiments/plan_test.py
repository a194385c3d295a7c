"""The planner on host devices that stand in for a slice; nothing is compiled.

`pytest -m aot` compiles a toy for chips that are not here.
"""

import json

import jax
import pytest
from absl.testing import flagsaver

from distilljax import models, plan, train
from distilljax.train import config as config_lib
from experiments import plan as launcher
from tests.experiments.launching import (
  command,
  signals,  # noqa: F401 (a fixture of every test here)
)

SMALL = "configs/dmd2_ring8.py:runlocal"
DIT = "configs/plans/dmd2_dit.py:toy,rows=8"
QWEN = "configs/plans/gopd_qwen.py:toy,rows=8"


@pytest.fixture(autouse=True)
def own_flags():
  with flagsaver.flagsaver():
    yield


@pytest.fixture
def here(monkeypatch):
  """Host devices in the place of the chips."""
  monkeypatch.setattr(
    plan, "devices", lambda name: jax.devices()[: plan.topology(name).size]
  )


def traced(config, topology="v5e:2x4", **options):
  config = config_lib.load(config)
  topology = plan.topology(topology)
  mesh = launcher.job_lib.make_mesh(config.run, jax.devices()[: topology.size])
  return launcher.report(
    config, topology, mesh, compile_step=False, **options
  )


def test_a_plan_holds_the_state_by_network_and_kind(here, capsys, tmp_path):
  file, page = tmp_path / "plan.json", tmp_path / "plan.md"
  code, out, err = command(
    launcher, capsys, f"--config={SMALL}", "--topology=v5e:2x4", "--nocompile",
    f"--json={file}", f"--markdown={page}",
  )  # fmt: skip
  assert code == 0, err
  found = json.loads(file.read_text())
  assert out.strip() == page.read_text().strip()
  assert launcher.markdown(found) == page.read_text()
  assert f"--config={SMALL} --topology=v5e:2x4" in out
  rows = {(r["network"], r["kind"]): r for r in found["memory"]["rows"]}
  student = rows["student", "parameters"]
  # Adam holds two more of each number, and its counts; all float32, all whole.
  assert student["bytes"] == 4 * student["numbers"]
  adam = rows["student", "optimizer"]
  assert 0 <= adam["numbers"] - 2 * student["numbers"] < 10
  assert rows["ema", "average"]["numbers"] == student["numbers"]
  assert rows["critic", "parameters"]["bytes"] > 0
  total = sum(r["bytes"] for r in rows.values())
  assert found["memory"]["state"] == total
  assert found["memory"]["needed"] == total + found["memory"]["batch"]
  assert found["memory"]["fits"] is True
  assert found["updates"] == ["student", "critic"]
  assert found["flops"]["total"] > 0
  assert "state and batch fit v5e:2x4".lower() in out.lower()


def test_networks_of_a_method_with_rollouts():
  """Shapes of rollouts are known without sampling; teachers lie in bf16."""
  config = config_lib.load(QWEN)
  mesh = launcher.job_lib.make_mesh(config.run, jax.devices()[:8])
  made = launcher.program(config, mesh)
  assert made.batch["tokens"].shape == (8, 96)
  assert made.batch["prompts"].shape == (8, 32)
  assert {"log_probs", "sampling_log_probs", "where"} <= set(made.batch)
  rows = {
    (r["network"], r["kind"]): r for r in plan.by_network(made.networks())
  }
  count = models.count_params(made.state.params["student"])
  assert rows["student", "parameters"]["numbers"] == count
  # Matrices are cut over eight chips, vectors are whole.
  student = rows["student", "parameters"]["bytes"]
  assert 4 * count / 8 < student < 1.1 * 4 * count / 8
  for name in ("teacher", "reference"):
    assert rows[name, "frozen"]["bytes"] * 2 == student
  step = made.stage.options
  assert step["unroll"] is False and made.step.accumulation == 1


@pytest.mark.parametrize(
  "arguments,match",
  [
    (["--topology=v5e:3x3"], "nearest: v5e:2x4"),
    (["--topology=v7x:2x2"], "chip must be one of v5e, v5p, v6e, h100"),
    (["--topology=v5e:2x4", "--config.data.rwos=1"], "did you mean"),
    (["--topology=v5e:2x4", "--config.run.rules=fsdp+tenser"], "'fsdp+tensor'"),
    (
      ["--topology=v5e:2x4", "--config.data.batch_size=12"],
      "divisible by 8 devices, got 12; nearest: 16",
    ),
    (["--topology=v5e:2x4", "--stage=studnet"], "stage must be one of"),
    (
      ["--topology=v5e:2x4", "--updates=student"],
      "updates must be one of ['student,critic', 'critic'], got 'student'",
    ),
    (["--topology=v5e:2x4", "--scaling=3x3"], "nearest: v5e:2x4"),
    ([], "give --config="),
    (["--topology=v5e:2x4", "more"], "unknown argument 'more'"),
  ],
)
def test_bad_input_is_one_line(here, capsys, arguments, match):
  code, _, err = command(
    launcher, capsys, f"--config={SMALL}", "--nocompile", *arguments
  )
  lines = [r for r in err.splitlines() if r.strip()]
  assert code in (1, 2), err
  assert len(lines) == 1 and match in lines[0], err


def test_rewards_of_the_host_are_one_line():
  config = config_lib.load("configs/cepo_chain.py:runlocal")
  mesh = train.make_mesh(jax.devices()[:1])
  with pytest.raises(ValueError, match="scores rollouts on the host"):
    launcher.program(config, mesh, stage="grpo_0")


def plain(**memory):
  return {
    "topology": "v5e:2x2",
    "compiled": True,
    "memory": {"usable": 2**30, "fits": memory["spare"] >= 0, **memory},
  }


def test_the_verdict_says_by_how_much():
  fits = plain(needed=2**29, spare=2**29)
  assert launcher.verdict(fits) == (
    "fits v5e:2x2: it needs 512.00 MiB of 1.00 GiB a chip, 512.00 MiB to spare"
  )
  not_so = plain(needed=3 * 2**30, spare=-2 * 2**30)
  assert launcher.verdict(not_so).endswith(
    "it needs 3.00 GiB of 1.00 GiB a chip, 2.00 GiB too much"
  )


@pytest.mark.parametrize(
  "text",
  [
    "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded"
    " hbm capacity by 4.75G.",
    "Ran out of memory on HBM, the total memory required for HLO temporaries"
    " (20.50G) exceeds available HBM (15.75G).",
  ],
)
def test_what_the_compiler_refuses_for_memory_is_read(text):
  assert launcher._refusal(RuntimeError(f"RESOURCE_EXHAUSTED: {text}")) == {
    "needed": int(20.5 * 2**30), "usable": int(15.75 * 2**30),
  }  # fmt: skip
  assert launcher._refusal(RuntimeError("INTERNAL: no")) is None


def test_a_search_tries_what_divides_and_ranks_what_fits(monkeypatch):
  config = config_lib.load(DIT)
  topology = plan.topology("v5e:2x4")
  tries = list(launcher.candidates(config, "student", topology))
  # Eight rows: one a chip, so more micro-batches only where another axis leaves
  # fewer parts of rows than chips.
  assert {t["model.remat"] for t in tries} == {"none", "dots", "block"}
  for one in tries:
    parts = 8 // one.get("run.tensor", one.get("run.context", 1))
    assert 8 % (parts * one["student.accumulation"]) == 0
  assert {"dp", "fsdp", "fsdp+tensor"} <= {t["run.rules"] for t in tries}
  calls = []

  def fake(arguments):
    calls.append(arguments)
    if "--config.run.rules=dp" in arguments:
      return {**plain(needed=2**31, spare=-(2**30))}
    if "--config.model.remat=none" in arguments:
      return {"error": "the compiler refused the step"}
    slow = 2.0 if "--config.model.remat=block" in arguments else 1.0
    bounds = {"step": slow, "binding": "compute"}
    return {**plain(needed=2**20, spare=2**29), "bounds": bounds}

  monkeypatch.setattr(launcher, "_one", fake)
  found = launcher.search(config, topology, "student", ["--config=x"])
  assert len(found) == len(tries)
  assert found[0]["bounds"]["step"] == 1.0
  assert "error" in found[-1]
  # What does not hold its state is not compiled.
  compiled = [c for c in calls if "--nocompile" not in c]
  assert not any("--config.run.rules=dp" in c for c in compiled)
  table = launcher.search_table(found)
  assert table.splitlines()[2].startswith("| 1 | fsdp")
  assert "does not fit" in table and "the compiler refused" in table


@pytest.mark.aot
@pytest.mark.parametrize("config", [DIT, QWEN])
def test_a_toy_compiled_for_chips_that_are_not_here(config):
  pytest.importorskip("libtpu", reason="needs the extra plan")
  config = config_lib.load(config)
  topology = plan.topology("v5e:2x4")
  mesh = launcher.job_lib.make_mesh(config.run, plan.devices(topology.name))
  found = launcher.report(config, topology, mesh)
  memory = found["memory"]
  assert memory["fits"] and memory["needed"] < 2**30
  # Shapes and shardings say what arguments take, but for the chip's layout.
  known = memory["state"] + memory["batch"]
  assert known <= memory["arguments"] <= 2 * known
  moved = found["moved"]
  assert not moved["unknown_loops"]
  assert not found["flops"]["unknown_loops"]
  # Every parameter is gathered at least once in bf16, and over one axis.
  numbers = memory["rows"][0]["numbers"]
  assert moved["network"] > 2 * numbers * 7 / 8
  assert {c["axes"] for c in moved["collectives"]} == {"fsdp"}
  assert found["flops"]["compiler"] < found["flops"]["chip"]
  assert found["bounds"]["binding"] in ("compute", "memory", "network")
  assert "to spare" in launcher.markdown(found)


@pytest.mark.aot
def test_what_does_not_fit_is_said_by_how_much(capsys):
  pytest.importorskip("libtpu", reason="needs the extra plan")
  # Latents of 4,096 a side are 4 million tokens: no chip holds their stream.
  code, out, err = command(
    launcher, capsys, "--config=configs/plans/dmd2_dit.py:toy,rows=4",
    "--topology=v5e:2x2", "--config.data.shape=(4096,4096,16)",
  )  # fmt: skip
  assert code == 0, err
  assert "Does not fit v5e:2x2: it needs" in out and "too much" in out
  assert "of 15.75 GiB" in out
