"""What every method and every config must come with."""

import ast
import inspect
import pathlib
import re
import tokenize

import pytest

from distilljax import methods
from distilljax.train import config as config_lib
from experiments import job, language_job

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted(
    p for p in (ROOT / "configs").glob("*.py")
    if p.stem not in ("__init__", "base")
)
SLUGS = methods.names()


def test_there_are_methods_and_configs():
  assert {"flow_matching", "dmd2", "mean_flow"} <= set(SLUGS)
  assert CONFIGS


def slug_of(config):
  """The longest slug that a config's file name starts with, or None."""
  fitting = [s for s in SLUGS if config.stem.startswith(f"{s}_")]
  return max(fitting, key=len, default=None)


def speaks(config):
  """Whether a config is one of language models, by its blocks."""
  return "task" in config


@pytest.mark.parametrize("slug", SLUGS)
class TestMethod:

  def test_it_has_config_test_and_page(self, slug):
    assert any(slug_of(c) == slug for c in CONFIGS), f"configs/{slug}_<task>.py"
    for wanted in (f"tests/methods/{slug}_test.py", f"docs/methods/{slug}.md"):
      assert (ROOT / wanted).is_file(), wanted

  def test_it_is_listed(self, slug):
    readme = (ROOT / "README.md").read_text()
    paper = papers(slug)
    assert re.search(rf"^\| `{slug}` \| {paper} \|", readme, re.MULTILINE)
    assert f"methods/{slug}" in (ROOT / "docs" / "index.md").read_text()

  def test_its_page_says_what_a_user_asks(self, slug):
    page = (ROOT / "docs" / "methods" / f"{slug}.md").read_text()
    for heading in (
        "## What it does", "## Networks", "## Hyper-parameters", "## Configs",
        "## Expected figures", "## Pitfalls",
    ):
      assert heading in page, heading
    assert papers(slug) in page
    # A table that a reader can trust: every entry of DEFAULTS and no other.
    table = page.split("## Hyper-parameters")[1].split("\n## ")[0]
    row = re.compile(r"^\| `(\w+)` \| `([^`|]*)` \|", re.MULTILINE)
    rows = dict(row.findall(table))
    defaults = methods.get(slug).DEFAULTS
    assert rows == {name: shown(value) for name, value in defaults.items()}
    for config in CONFIGS:
      if slug_of(config) == slug:
        assert f"`configs/{config.name}`" in page

  def test_its_module_is_documented(self, slug):
    module = methods.get(slug)
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", module.__doc__)
    assert "Networks:" in module.__doc__
    assert "Batch:" in module.__doc__
    assert papers(slug) in module.__doc__

  def test_every_default_says_where_it_is_from(self, slug):
    module = methods.get(slug)
    path = pathlib.Path(inspect.getfile(module))
    missing = uncommented_defaults(path)
    assert not missing, f"{path.name}: no comment beside {missing}"


def papers(slug):
  """The `paper` entry of the Method that a module makes, from its source."""
  tree = ast.parse(inspect.getsource(methods.get(slug)))
  found = [
      keyword.value.value
      for node in ast.walk(tree)
      if isinstance(node, ast.Call)
      and ast.unparse(node.func) == "train.Method"
      for keyword in node.keywords
      if keyword.arg == "paper"
  ]
  assert len(found) == 1, f"{slug}: one train.Method with paper="
  assert re.fullmatch(r"arXiv:\d{4}\.\d{4,5}", found[0]), found[0]
  return found[0]


def shown(value):
  """How a page writes a default."""
  return value if isinstance(value, str) else re.sub(r"\s+", " ", repr(value))


def uncommented_defaults(path):
  """Keys of DEFAULTS with no comment on their lines or on the one above."""
  beside, above = set(), set()
  with tokenize.open(path) as f:
    for token in tokenize.generate_tokens(f.readline):
      if token.type == tokenize.COMMENT:
        alone = token.line.strip().startswith("#")
        (above if alone else beside).add(token.start[0])
  for node in ast.parse(path.read_text()).body:
    if ast.unparse(node).startswith("DEFAULTS = "):
      return [
          key.value
          for key, value in zip(node.value.keys, node.value.values)
          if key.lineno - 1 not in above
          and not beside & set(range(key.lineno, value.end_lineno + 1))
      ]
  raise AssertionError(f"{path}: no DEFAULTS")


def test_the_comment_rule_finds_a_bare_default(tmp_path):
  path = tmp_path / "x.py"
  path.write_text(
      'DEFAULTS = {\n    "a": 1,  # table 1\n    "b": 2,\n'
      '    # table 3\n    "c": 3,\n    "d": (\n        4,  # ours\n    ),\n'
      '    "e": 5,\n}\n'
  )
  assert uncommented_defaults(path) == ["b", "e"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
class TestConfig:

  def test_it_is_documented(self, path):
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc, "no docstring"
    doc = re.sub(r"\\\n\s*", "", doc)
    launcher = "train_lm" if speaks(config_lib.load(str(path))) else "train"
    command = f"python -m experiments.{launcher} --config=configs/{path.name}"
    assert f"{command} --workdir=" in doc
    assert "runlocal" in doc
    assert "Expected" in doc, "no line on expected figures and run time"

  def test_it_belongs_to_a_method_and_uses_it(self, path):
    slug = slug_of(path)
    config = config_lib.load(str(path))
    used = {config[stage].method for stage in config.stages}
    # A job that compares several methods is named after its question.
    assert slug in used or (slug is None and len(used) > 1), path.name

  @pytest.mark.parametrize("argument", ["", ":runlocal"])
  def test_it_builds(self, path, argument):
    config = config_lib.load(f"{path}{argument}")
    config_lib.to_json(config)  # plain values only
    if not speaks(config):
      built = job.build(config, log=lambda line: None)
      assert [s.name for s in built.stages] == list(config.stages)
      return
    built = language_job.build(config)
    repeated = [
        f"{name}_{i}" if config[name].repeat else name
        for name in config.stages
        for i in range(config.seeds if config[name].repeat else 1)
    ]
    assert [s.name for s in built.stages] == repeated

  def test_runlocal_is_smaller(self, path):
    whole, small = (
        config_lib.load(f"{path}{argument}") for argument in ("", ":runlocal")
    )
    steps = [
        sum(config[stage].steps for stage in config.stages)
        for config in (whole, small)
    ]
    assert steps[1] < steps[0] / 4

  def test_a_misspelt_argument_is_one_line(self, path):
    with pytest.raises(ValueError, match="runlocal") as info:
      config_lib.load(f"{path}:runlocla")
    assert "\n" not in str(info.value)
