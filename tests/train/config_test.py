"""Configs: arguments, overrides, the workdir's claim."""

import json
import os

import ml_collections
import pytest

from distilljax.train import config as config_lib
from tests import helpers

TEXT = """
import ml_collections
from distilljax.train import config as config_lib

def get_config(arg=None):
  arg = config_lib.parse_arg(arg, runlocal=False, steps=10, name="x", rate=0.1)
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.times = (1.0, 0.5)
  config.where = None
  config.student = {"steps": arg.steps, "fast": arg.runlocal, "rate": arg.rate}
  return config
"""


@pytest.fixture
def path(tmp_path):
  file = tmp_path / "toy_config.py"
  file.write_text(TEXT)
  return str(file)


def test_argument_and_overrides(path):
  config = config_lib.load(path)
  assert config.student.steps == 10 and not config.student.fast
  config = config_lib.load(
    path + ":runlocal,steps=20,rate=1e-3",
    ["student.rate=0.5", "times=(1,)", "where=/data", "student.fast=false"],
  )
  assert config.student.to_dict() == {"steps": 20, "fast": False, "rate": 0.5}
  assert config.times == (1,) and config.where == "/data"
  with pytest.raises(AttributeError):
    config.student.stepz = 1  # locked


@pytest.mark.parametrize(
  "argument,overrides,match",
  [
    (":runlocl", [], "did you mean 'runlocal'"),
    (":steps=many", [], "steps must be a int, got 'many'"),
    (":runlocal=perhaps", [], "must be true or false"),
    ("", ["student.stepz=3"], "did you mean 'student.steps'"),
    ("", ["student=3"], "unknown key 'student'"),
    ("", ["seed"], "must read key=value"),
    ("", ["seed=one"], "seed must be a int"),
    ("", ["times=soon"], "times must be a tuple"),
    ("", ["student.fast=7"], "must be true or false"),
  ],
)
def test_bad_arguments_are_one_line(path, argument, overrides, match):
  with helpers.one_line_error(match):
    config_lib.load(path + argument, overrides)


def test_unknown_file_names_the_nearest(path):
  with helpers.one_line_error("no such file.*did you mean.*toy_config.py"):
    config_lib.load(path.replace("toy_config", "toy_confg"))


def test_known_block():
  config_lib.known("student", {"steps": 1}, ["steps", "method"])
  with helpers.one_line_error("student.stps; did you mean 'steps'"):
    config_lib.known("student", {"stps": 1}, ["steps", "method"])


def test_claim_workdir(tmp_path):
  config = ml_collections.ConfigDict({"a": 1, "b": {"c": (1, 2)}})
  folder = tmp_path / "deep" / "run"
  assert config_lib.claim_workdir(folder, config) is False
  assert json.loads((folder / "config.json").read_text())["b"] == {"c": [1, 2]}
  assert config_lib.claim_workdir(folder, config) is True
  config.a = 2
  with helpers.one_line_error(r"another config \(a: 1 there, 2 now\)"):
    config_lib.claim_workdir(folder, config)
  (folder / "config.json").write_text("{")
  with helpers.one_line_error("cannot be read"):
    config_lib.claim_workdir(folder, config)


def test_workdir_not_writable(tmp_path):
  file = tmp_path / "file"
  file.write_text("")
  with helpers.one_line_error("cannot be written .*choose another"):
    config_lib.claim_workdir(file / "run", ml_collections.ConfigDict({"a": 1}))
  if os.geteuid() != 0:  # root may write anywhere
    tmp_path.chmod(0o500)
    with helpers.one_line_error("cannot be written"):
      config_lib.claim_workdir(tmp_path / "x", ml_collections.ConfigDict({}))
