"""The cluster scripts: their syntax, and flags that the launcher knows."""

import pathlib
import re
import subprocess

import pytest
from absl import flags

from distilljax.train import config as config_lib
from distilljax.train import sharding
from experiments import entry

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "launch"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
FILES = [*SCRIPTS, FOLDER / "jobset.yaml"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_syntax(script):
  done = subprocess.run(
    ["bash", "-n", script], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0 and not done.stderr, done.stderr


def test_yaml_reads():
  yaml = pytest.importorskip("yaml")
  spec = yaml.safe_load((FOLDER / "jobset.yaml").read_text())["spec"]
  job = spec["replicatedJobs"][0]["template"]["spec"]
  # Every pod is a process of the run: all must be there at once.
  assert job["parallelism"] == job["completions"] == 2
  (container,) = job["template"]["spec"]["containers"]
  assert container["command"][:3] == ["python", "-m", "experiments.train"]


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.name)
def test_flags_are_the_launchers(file):
  text = file.read_text()
  values = dict(re.findall(r"^([A-Z]+)=(\S+)", text, re.M))
  # What follows the launcher's name, its variables filled in.
  text = text[text.index("experiments.train") :]
  text = re.sub(r'"?\$(\w+)"?', lambda m: values[m[1]], text)
  given = dict(re.findall(r"--([\w.]+)=([^\s\"]+)", text))
  assert sorted(given) == [
    "config",
    "config.run.rules",
    "distributed",
    "workdir",
  ]
  rest, overrides = entry.split_overrides(
    [f"--{k}={v}" for k, v in given.items()]
  )
  assert overrides == [f"run.rules={given['config.run.rules']}"]
  for argument in rest:
    assert argument[2:].partition("=")[0] in flags.FLAGS
  flags.FLAGS["distributed"].parser.parse(given["distributed"])
  assert given["distributed"] == "on"
  config = config_lib.load(str(ROOT / given["config"]), overrides)
  assert config.run.rules in sharding.RULES
