"""Documentation that runs: README, worked example, docstrings, notebook."""

import doctest
import importlib
import os
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import distilljax

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])
# Nobody else's clock or cache decides what these print.
QUICK_DOCTESTS = ("losses", "processes", "train", "oracles", "models", "lm")


def code(path):
  """The Python blocks of a page, joined; line numbers are those of the page."""
  text, out, inside = path.read_text(), [], False
  for line in text.splitlines():
    if line.startswith("```"):
      inside = line == "```python" and not inside
      line = "```"
    out.append(line if inside and line != "```" else "")
  return "\n".join(out)


def run_fresh(*command, **environment):
  """Runs a command as a user would: one device, no run-time type checks."""
  return subprocess.run(
      [sys.executable, *command],
      cwd=ROOT,
      env={
          **{k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
          "PYTHONPATH": str(ROOT), **environment,
      },
      capture_output=True, text=True, check=False,
  )


def test_readme_example():
  lines = [line for line in code(ROOT / "README.md").splitlines() if line]
  assert len(lines) <= 12
  assert sum("distilljax" in line for line in lines) == 1
  names = {}
  exec(code(ROOT / "README.md"), names)
  start, _ = names["loss"](0 * names["params"])
  assert float(start) > 1.0
  assert abs(float(names["value"])) < 0.01


def test_adding_a_method(tmp_path):
  script = tmp_path / "example.py"
  script.write_text(
      code(DOCS / "adding_a_method.md")
      + "\nprint(method.name, one_step, teacher_step)\n"
  )
  done = run_fresh(script)
  assert done.returncode == 0, done.stderr
  name, one_step, teacher_step = done.stdout.split("\n")[-2].split()
  assert name == "semigroup"
  assert float(one_step) < 0.12  # one seed, measured .07
  assert float(teacher_step) > 3 * float(one_step)


def test_links_between_pages_lead_somewhere():
  broken = []
  for page in PAGES:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
      if not target.startswith("http") and not (page.parent / target).exists():
        broken.append(f"{page.relative_to(ROOT)}: {target}")
  assert PAGES
  assert not broken


def test_commands_name_files_that_exist():
  wrong = []
  for page in PAGES:
    for name in re.findall(r"configs/\w+\.py", page.read_text()):
      if not (ROOT / name).is_file():
        wrong.append(f"{page.relative_to(ROOT)}: {name}")
  assert not wrong


def documented_modules():
  for package in QUICK_DOCTESTS:
    module = importlib.import_module(f"distilljax.{package}")
    yield module.__name__
    for found in pkgutil.iter_modules(module.__path__, f"{module.__name__}."):
      yield found.name


@pytest.mark.parametrize(
    "name", [*documented_modules(), "distilljax._checks"]
)
def test_docstring_examples(name):
  result = doctest.testmod(
      importlib.import_module(name),
      optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
  )
  assert result.failed == 0, f"{result.failed} of {result.attempted} failed"


def test_there_are_docstring_examples():
  finder = doctest.DocTestFinder()
  examples = sum(
      len(test.examples) for test in finder.find(distilljax.losses.divergence)
  )
  assert examples > 10
